"""libpacketstack with Python's manners: errors are exceptions, addresses are `ipaddress` values."""

import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from packetstack_agent.errors import NativeError
from packetstack_core import abi
from packetstack_core.values import Address

ffi = abi.ffi

PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP}


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function whose last parameter is a `struct ps_error *`; -1 or NULL becomes NativeError."""
    error = ffi.new("struct ps_error *")
    result = function(*arguments, error)
    if result == ffi.NULL if isinstance(result, ffi.CData) else result < 0:
        text = ffi.string(error.text).decode(errors="replace")
        raise NativeError(text or f"{getattr(function, '__name__', 'libpacketstack')}: failed without a reason")
    return result


def lib() -> Any:
    """The library itself."""
    return abi.lib()


def text(value: str | Path) -> bytes:
    """A C string."""
    return str(value).encode()


def packed(address: Address) -> bytes:
    """16 bytes, IPv4 mapped."""
    return bytes(10) + b"\xff\xff" + address.packed if isinstance(address, IPv4Address) else address.packed


def unpacked(data: bytes) -> Address:
    """The address that `packed` made."""
    address = ip_address(bytes(data))
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def wire(port: int) -> int:
    """A port as it stands in shared memory: network byte order."""
    return socket.htons(port)


def constant(name: str) -> int:
    """Value of an enumerator of abi.h."""
    return int(getattr(abi.lib(), name))
