"""The arithmetic of include/packetstack/hash.h and abi.h in Python: an oracle for tests and for `explain`.

Addresses are `ipaddress` objects or their text, ports are ordinary numbers; the C code takes both as they are
on the wire.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

_MASK = (1 << 64) - 1


def _rotate(x: int, n: int) -> int:
    return (x << n | x >> (64 - n)) & _MASK


def siphash(key0: int, key1: int, message: bytes, compress: int = 1, finish: int = 3) -> int:
    """SipHash-c-d of `message` (Aumasson, Bernstein 2012) under the 128-bit key (key0 is its first half)."""
    v0, v1 = key0 ^ 0x736F6D6570736575, key1 ^ 0x646F72616E646F6D
    v2, v3 = key0 ^ 0x6C7967656E657261, key1 ^ 0x7465646279746573

    def rounds(count: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0 = (v0 + v1) & _MASK
            v1 = _rotate(v1, 13) ^ v0
            v0 = _rotate(v0, 32)
            v2 = (v2 + v3) & _MASK
            v3 = _rotate(v3, 16) ^ v2
            v0 = (v0 + v3) & _MASK
            v3 = _rotate(v3, 21) ^ v0
            v2 = (v2 + v1) & _MASK
            v1 = _rotate(v1, 17) ^ v2
            v2 = _rotate(v2, 32)

    tail = len(message) & ~7
    words = [int.from_bytes(message[i : i + 8], "little") for i in range(0, tail, 8)]
    words.append(int.from_bytes(message[tail:], "little") | (len(message) & 255) << 56)
    for word in words:
        v3 ^= word
        rounds(compress)
        v0 ^= word
    v2 ^= 0xFF
    rounds(finish)
    return v0 ^ v1 ^ v2 ^ v3


Address = IPv4Address | IPv6Address | str


def flow_hash(
    key0: int, key1: int, source: Address, destination: Address, sport: int, dport: int, protocol: int
) -> int:
    """The 64-bit hash of a flow as the client's packets show it. `protocol`: 6 TCP, 17 UDP."""
    src, dst = ip_address(source), ip_address(destination)
    if src.version != dst.version:
        raise ValueError(f"{src} and {dst} are of two families; use one")
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    return siphash(key0, key1, src.packed + dst.packed + ports + bytes([protocol, src.version, 0, 0]))


def bucket_of(hash_: int, buckets: int) -> int:
    """The bucket of a flow's hash."""
    return hash_ & (buckets - 1)


def choice(hash_: int, size: int) -> int:
    """The entry of a listener's lookup table, of `size` entries, that a new flow with this hash is dealt."""
    upper = hash_ >> 32  # which is what engines are told
    return ((upper * 0x9E3779B97F4A7C15 & _MASK) >> 32) % size


def choice_by_client(key0: int, key1: int, client: Address, size: int) -> int:
    """The same with session affinity: by the client's address alone."""
    address = ip_address(client)
    mapped = address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed
    return (siphash(key0, key1, mapped + bytes(16) + bytes([0, 0, 0, 0, 0, 6, 0, 0])) >> 32) % size


def reply_bucket(snat_port: int, buckets: int) -> int:
    """The bucket that a reply to this SNAT port belongs to."""
    return snat_port & (buckets - 1)


def snat_ports(bucket: int, buckets: int) -> tuple[int, ...]:
    """The SNAT ports that carry `bucket`: `65536 / buckets` less what lies below 1024, or the first one."""
    return tuple(range(_first_port(buckets) + bucket, 65536, buckets))


def ports_per_bucket(buckets: int) -> int:
    """How many SNAT ports carry each bucket: 15 at 4,096 buckets."""
    return (65536 - _first_port(buckets)) // buckets


def _first_port(buckets: int) -> int:
    return max(1, 1024 // buckets) * buckets


@dataclass(frozen=True, slots=True)
class Word:
    """A flow-table word. Slot 0 means none. Raises ValueError for a value that has no room."""

    epoch: int
    slot: int
    queue: int
    prev_slot: int = 0
    prev_queue: int = 0

    def __post_init__(self) -> None:
        for name, bits in (("epoch", 32), ("slot", 10), ("queue", 6), ("prev_slot", 10), ("prev_queue", 6)):
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name}: {value} has no room in {bits} bits; use 0 to {(1 << bits) - 1}")

    def pack(self) -> int:
        """The 64-bit word."""
        return self.epoch << 32 | self.slot << 22 | self.queue << 16 | self.prev_slot << 6 | self.prev_queue

    @classmethod
    def unpack(cls, word: int) -> "Word":
        """From the 64-bit word."""
        return cls(word >> 32, word >> 22 & 1023, word >> 16 & 63, word >> 6 & 1023, word & 63)


def owner_of(word: int) -> int:
    """The owner in a shard header that belongs to a flow-table word."""
    return word & ~0xFFFF


def epoch_newer(a: int, b: int) -> bool:
    """Is epoch a newer than b? Epochs are 32 bits wide and wrap around."""
    return 0 < (a - b) & 0xFFFFFFFF < 1 << 31


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the director tells a virtual function about a packet, in the source MAC. `epoch` is its low 12 bits."""

    bucket: int
    epoch: int
    queue: int
    prev_queue: int = 0
    reply: bool = False
    mirror: bool = False
    icmp: bool = False

    def to_mac(self) -> bytes:
        """The locally administered source MAC that carries the stamp."""
        flags = self.reply | self.mirror << 1 | self.icmp << 2
        bits = (self.bucket & 8191) << 27 | (self.queue & 63) << 21 | (self.prev_queue & 63) << 15
        return bytes([2]) + (bits | (self.epoch & 4095) << 3 | flags).to_bytes(5, "big")

    @classmethod
    def from_mac(cls, mac: bytes) -> "Stamp":
        """The stamp in a source MAC."""
        bits = int.from_bytes(mac[1:6], "big")
        return cls(
            bucket=bits >> 27 & 8191,
            epoch=bits >> 3 & 4095,
            queue=bits >> 21 & 63,
            prev_queue=bits >> 15 & 63,
            reply=bool(bits & 1),
            mirror=bool(bits & 2),
            icmp=bool(bits & 4),
        )
