"""Network devices: switches and counters that netlink does not carry (SIOCETHTOOL), and sysctls."""

import array
import errno
import fcntl
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packetstack_agent.errors import AgentError

_SIOCETHTOOL = 0x8946
# From <linux/ethtool.h>.
_GSTRINGS = 0x1B
_GSTATS = 0x1D
_GSSET_INFO = 0x37
_GCHANNELS = 0x3C
_STRING_BYTES = 32
_SS_STATS = 1
_SWITCHES = {"rx": 0x15, "tx": 0x17, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}


@contextmanager
def _control() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        yield control


def _ethtool(control: socket.socket, device: str, request: "array.array[int]") -> None:
    address, _ = request.buffer_info()
    fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", device.encode(), address))


def switch(device: str, on: bool, *features: str) -> None:
    """Turn offloads on or off; `features` as `ethtool -K` names them: rx tx tso gso gro."""
    with _control() as control:
        for feature in features:
            try:
                _ethtool(control, device, array.array("I", [_SWITCHES[feature], int(on)]))
            except OSError as e:
                # Not to be had at all, as segmentation on a veth whose peer runs an XDP program: off already.
                if on or e.errno != errno.EOPNOTSUPP:
                    raise


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


def sysctl(name: str) -> str | None:
    """Value of a sysctl by its path below /proc/sys, None when this kernel has none."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except FileNotFoundError:
        return None


def set_sysctl(name: str, value: str) -> None:
    """Set a sysctl when it differs."""
    if sysctl(name) not in (None, value):
        Path("/proc/sys", name).write_text(value)


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
