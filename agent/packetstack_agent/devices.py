"""Network devices: switches and counters that netlink does not carry (SIOCETHTOOL), and sysctls."""

import array
import errno
import fcntl
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from packetstack_agent.errors import AgentError
from packetstack_core.preconditions import Device, Part

_SIOCETHTOOL = 0x8946
# From <linux/ethtool.h>.
_GSTRINGS = 0x1B
_GSTATS = 0x1D
_GSSET_INFO = 0x37
_GCHANNELS = 0x3C
_STRING_BYTES = 32
_SS_STATS = 1
_SWITCHES = {"rx": 0x15, "tx": 0x17, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}
_STATES = {"tx": 0x16, "tso": 0x1E, "gso": 0x23, "gro": 0x2B}
# From <linux/sockios.h> and <linux/if.h>.
_SIOCGIFNAME, _SIOCSIFNAME = 0x8910, 0x8923
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCGIFMTU, _SIOCSIFMTU = 0x8921, 0x8922
_SIOCGIFHWADDR, _SIOCSIFHWADDR = 0x8927, 0x8924
_IFF_UP, _IFF_NOARP = 1, 0x80
_ARPHRD_ETHER = 1


@contextmanager
def _control() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        yield control


def _ethtool(control: socket.socket, device: str, request: "array.array[int]") -> None:
    address, _ = request.buffer_info()
    fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", device.encode(), address))


def switch(device: str, on: bool, *features: str, control: socket.socket | None = None) -> None:
    """Turn offloads on or off; `features` as `ethtool -K` names them: rx tx tso gso gro. `control`: see there."""
    with nullcontext(control) if control is not None else _control() as by:
        for feature in features:
            try:
                _ethtool(by, device, array.array("I", [_SWITCHES[feature], int(on)]))
            except OSError as e:
                # Not to be had at all, as segmentation on a veth whose peer runs an XDP program: off already.
                if on or e.errno != errno.EOPNOTSUPP:
                    raise


def control() -> socket.socket:
    """A socket to look at devices by, and to change them: those of the namespace in which it was made, for good."""
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def look(control: socket.socket, index: int) -> Device | None:
    """A device by its index; None if there is none. Whose port it is only netlink knows: nobody's, it says."""
    try:
        name = fcntl.ioctl(control, _SIOCGIFNAME, struct.pack("16si20x", b"", index))[:16].split(b"\0", 1)[0]
        request = struct.pack("16s24x", name)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        (mtu,) = struct.unpack_from("i", fcntl.ioctl(control, _SIOCGIFMTU, request), 16)
        mac = fcntl.ioctl(control, _SIOCGIFHWADDR, request)[18:24]
        on = set()
        for feature, state in _STATES.items():
            value = array.array("I", [state, 0])
            _ethtool(control, name.decode(), value)
            if value[1]:
                on.add(feature)
    except OSError as e:
        if e.errno in (errno.ENODEV, errno.ENXIO):
            return None
        raise
    return Device(name.decode(), bool(flags & _IFF_UP), not flags & _IFF_NOARP, mtu, mac, 0, frozenset(on))


def put_back(control: socket.socket, seen: Device, made: Device, parts: Iterable[Part]) -> None:
    """Make these parts of a device what they were; that it is somebody's port only netlink can change."""
    name, parts = seen.name, set(parts)
    if "name" in parts:
        request = struct.pack("16s16s8x", name.encode(), made.name.encode())
        try:
            fcntl.ioctl(control, _SIOCSIFNAME, request)
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            _set_flags(control, name, clear=_IFF_UP)  # before Linux 6.2 one that is up keeps its name
            fcntl.ioctl(control, _SIOCSIFNAME, request)
            parts.add("up")
        name = made.name
    named = name.encode()
    if "mac" in parts:
        fcntl.ioctl(control, _SIOCSIFHWADDR, struct.pack("16sH6s16x", named, _ARPHRD_ETHER, made.mac))
    if "mtu" in parts:
        fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", named, made.mtu))
    if "offloads" in parts:
        switch(name, False, *sorted(seen.offloads - made.offloads), control=control)
    if "arp" in parts:
        _set_flags(control, name, add=_IFF_NOARP)
    if "up" in parts:
        _set_flags(control, name, add=_IFF_UP)


def _set_flags(control: socket.socket, name: str, add: int = 0, clear: int = 0) -> None:
    (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16s24x", name.encode())), 16)
    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), (flags | add) & ~clear))


def statistics(device: str) -> dict[str, int]:
    """The driver's counters, as `ethtool -S` prints them; empty when it has none."""
    try:
        with _control() as control:
            info = array.array("I", [_GSSET_INFO, 0, 1 << _SS_STATS, 0, 0])
            _ethtool(control, device, info)
            count = info[4]
            names = array.array("B", struct.pack("III", _GSTRINGS, _SS_STATS, count) + bytes(count * _STRING_BYTES))
            _ethtool(control, device, names)
            values = array.array("B", struct.pack("II", _GSTATS, count) + bytes(count * 8))
            _ethtool(control, device, values)
    except OSError:
        return {}
    text, numbers = names.tobytes()[12:], struct.unpack_from(f"{count}Q", values.tobytes(), 8)
    keys = (text[i * _STRING_BYTES :][:_STRING_BYTES].split(b"\0", 1)[0].decode() for i in range(count))
    return dict(zip(keys, numbers, strict=True))


def receive_queues(device: str) -> int:
    """How many the device has now; 1 when its driver does not say."""
    try:
        with _control() as control:
            channels = array.array("I", [_GCHANNELS, *[0] * 8])
            _ethtool(control, device, channels)
    except OSError:
        return 1
    return max(1, channels[5] + channels[8])  # rx_count, combined_count


SYSCTLS = (Path("/proc/sys"), Path("/proc/1/root/proc/sys"))
"""Where sysctls can be written: a container without privileges has them read-only, the node's first process has not."""


def sysctl(name: str) -> str | None:
    """Value of a sysctl by its path below /proc/sys, None when this kernel has none."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except FileNotFoundError:
        return None


def set_sysctl(name: str, value: str) -> None:
    """Set a sysctl when it differs; OSError if it cannot be written."""
    if sysctl(name) in (None, value):
        return
    for root in SYSCTLS:
        try:
            (root / name).write_text(value)
        except OSError as e:
            if e.errno != errno.EROFS or root == SYSCTLS[-1]:
                raise
        else:
            return


def check_preemption(path: Path = Path("/sys/kernel/realtime")) -> None:
    """AgentError on a PREEMPT_RT kernel: there a fence's marker may overtake packets that it must come behind.

    A fence counts on this: once a thread runs on a CPU, no director is in the middle of a packet there.
    """
    if _is_realtime(path):
        raise AgentError(
            f"{path}: is 1, so packets are handled in threads that can be interrupted (PREEMPT_RT); handovers would mix "
            "up their order. Use a kernel without PREEMPT_RT"
        )


def _is_realtime(path: Path) -> bool:
    try:
        return path.read_text().strip() == "1"
    except OSError:
        return False
