"""The director's program, loaded to be asked about one frame at a time (BPF_PROG_TEST_RUN), and frames made from scratch."""

import struct
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import cffi
import pytest

from packetstack_core import abi
from packetstack_core.hashing import flow_hash

LIBBPF = """
struct bpf_object; struct bpf_program; struct bpf_map;
struct bpf_map *bpf_object__next_map(const struct bpf_object *o, const struct bpf_map *m);
const char *bpf_map__name(const struct bpf_map *m);
int bpf_map__reuse_fd(struct bpf_map *m, int fd);
int bpf_obj_get(const char *path);
struct bpf_object *bpf_object__open_file(const char *path, const void *opts);
int bpf_object__load(struct bpf_object *o);
void bpf_object__close(struct bpf_object *o);
int bpf_object__find_map_fd_by_name(const struct bpf_object *o, const char *name);
struct bpf_program *bpf_object__find_program_by_name(const struct bpf_object *o, const char *name);
int bpf_program__fd(const struct bpf_program *p);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int libbpf_num_possible_cpus(void);
struct bpf_test_run_opts {
    size_t sz; const void *data_in; void *data_out; uint32_t data_size_in, data_size_out; const void *ctx_in;
    void *ctx_out; uint32_t ctx_size_in, ctx_size_out, retval; int repeat; uint32_t duration, flags, cpu, batch_size;
};
int bpf_prog_test_run_opts(int fd, struct bpf_test_run_opts *o);
"""
ABORTED, DROP, PASS, TX, REDIRECT = range(5)
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
REPLY, FRAGMENT, ICMP_FLAG = 1, 2, 4
MAGIC = 0x50C5
LOOPBACK = 1
OUR_MAC = bytes.fromhex("020000000001")
CLIENTS, BACKENDS, NO_METADATA = 1, 2, 4
OWN_STACK, OWN_NODE, OWN_BROADCAST = 1, 2, 4
VLAN = 100
NODE = {4: "192.0.2.1", 6: "2001:db8:9::1"}
BROADCAST = "192.0.2.255"
ALLOWED = 1


@dataclass(frozen=True)
class Stack:
    """What the director knows of a stack."""

    number: int
    key0: int
    key1: int
    offset: int
    buckets: int
    vip: dict[int, str]
    snat: dict[int, str]

    def word(self, bucket: int) -> int:
        """Each bucket has its own owner, so that a wrong bucket shows."""
        return (1000 + bucket) << 32 | (1 + bucket % 3) << 22 | (bucket * 7 % 64) << 16 | (bucket % 64)

    def stamp(self, bucket: int, flags: int, hash32: int) -> tuple[int, ...]:
        word = self.word(bucket)
        return MAGIC, flags | (word >> 22 & 1023) << 6, word >> 32, bucket, word >> 16 & 63, word & 63, hash32

    def forward(self, family: int, source: str, sport: int, dport: int, protocol: int) -> tuple[int, int]:
        """-> bucket, upper half of the hash"""
        h = flow_hash(self.key0, self.key1, source, self.vip[family], sport, dport, protocol)
        return h & (self.buckets - 1), h >> 32


ONE = Stack(
    0, 0x1122334455667788, 0x99AABBCCDDEEFF01, 0, 4096,
    {4: "198.51.100.1", 6: "2001:db8:1::1"}, {4: "203.0.113.1", 6: "2001:db8:5::1"},
)  # fmt: skip
TWO = Stack(
    1, 0xFEDCBA9876543210, 0x0F1E2D3C4B5A6978, 8192, 256,
    {4: "198.51.100.2", 6: "2001:db8:1::2"}, {4: "203.0.113.2", 6: "2001:db8:5::2"},
)  # fmt: skip
CLIENT = {4: "192.0.2.77", 6: "2001:db8:9::77"}
BACKEND = {4: "10.1.2.3", 6: "2001:db8:a::3"}


def packed(text: str) -> bytes:
    """16 bytes, IPv4 mapped."""
    address = ip_address(text)
    return bytes(10) + b"\xff\xff" + address.packed if address.version == 4 else address.packed


@dataclass(frozen=True)
class Result:
    action: int
    frame: bytes
    stamp: tuple[int, ...] | None
    counted: dict[str, int]


class Director:
    """The program, loaded for this test alone and attached to nothing, with maps of its own or those below `pins`.

    `live`: those are an agent's, so nothing in them is changed here.
    """

    def __init__(self, pins: Path | None = None, live: bool = False) -> None:
        self.ffi = cffi.FFI()
        self.ffi.cdef(LIBBPF)
        self.bpf: Any = self.ffi.dlopen("libbpf.so.1")
        self.object = self.bpf.bpf_object__open_file(str(abi.native("director.bpf.o")).encode(), self.ffi.NULL)
        assert self.object != self.ffi.NULL
        at = self.bpf.bpf_object__next_map(self.object, self.ffi.NULL)
        while pins and at != self.ffi.NULL:
            name = self.ffi.string(self.bpf.bpf_map__name(at)).decode()
            if "." not in name:  # not the compiler's own
                assert self.bpf.bpf_map__reuse_fd(at, self.bpf.bpf_obj_get(str(pins / name).encode())) == 0
            at = self.bpf.bpf_object__next_map(self.object, at)
        assert self.bpf.bpf_object__load(self.object) == 0
        self.names = [n.removeprefix("PS_D_").lower() for n in abi.enum_names("ps_director_counter").values()][:-1]
        for slot in () if live else (1, 2, 3):
            self.put("engines", struct.pack("<I", slot), struct.pack("<I", LOOPBACK))
        if not pins:
            self.uplink(CLIENTS | BACKENDS)
            for address in NODE.values():
                self.own(address, OWN_NODE)
            self.own(BROADCAST, OWN_BROADCAST)
        for stack in () if pins else (ONE, TWO):
            for address in (*stack.vip.values(), *stack.snat.values()):
                self.own(address, OWN_STACK)
            target = struct.pack("<QQIIII", stack.key0, stack.key1, stack.offset, stack.buckets - 1, stack.number, 0)
            for family, vip in stack.vip.items():
                for port, protocol in ((80, TCP), (53, UDP), (0, ICMP)):
                    key = ip_address(vip).packed + struct.pack(">HBB", port, protocol, 0)
                    self.put(f"listeners{family}", key, target)
                    # Stack one is found at once, stack two only behind a place that another listener took.
                    if family == 4 and port:
                        wide = int.from_bytes(key, "little")
                        place = (wide * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 54
                        taken = struct.pack("<Q", wide if stack is ONE else wide ^ 1 << 63)
                        self.put("direct4", struct.pack("<I", place), taken + target)
                self.put(f"snat{family}", ip_address(stack.snat[family]).packed, target)
            for bucket in range(stack.buckets):
                self.give(stack, bucket, stack.word(bucket))

    def close(self) -> None:
        self.bpf.bpf_object__close(self.object)

    def _map(self, name: str) -> int:
        fd = int(self.bpf.bpf_object__find_map_fd_by_name(self.object, name.encode()))
        assert fd >= 0, name
        return fd

    def put(self, name: str, key: bytes, value: bytes) -> None:
        assert self.bpf.bpf_map_update_elem(self._map(name), key, value, 0) == 0, name

    def get(self, name: str, index: int, size: int) -> bytes:
        """A value of an array."""
        out = self.ffi.new("char[]", size)
        assert self.bpf.bpf_map_lookup_elem(self._map(name), struct.pack("<I", index), out) == 0
        return bytes(self.ffi.buffer(out))

    def answers_again(self) -> None:
        """As if a second had gone by since it sent an error or a reset."""
        self.put("allowances", bytes(4), bytes(24 * self.bpf.libbpf_num_possible_cpus()))

    def uplink(self, flags: int, vlans: tuple[int, ...] = (VLAN,)) -> None:
        """Makes the device that test frames come in on an uplink."""
        bits = sum(1 << vlan for vlan in vlans).to_bytes(512, "little")
        self.put(
            "uplinks", struct.pack("<I", LOOPBACK), struct.pack("<II", LOOPBACK, flags) + OUR_MAC + bytes(2) + bits
        )

    def own(self, text: str, kind: int) -> None:
        """Tells it an address that is no client's."""
        address = ip_address(text)
        words = struct.unpack("<4I", packed(text))
        mixed = words[3] if address.version == 4 else words[0] ^ words[1] * 3 ^ words[2] * 5 ^ words[3] * 7
        bit = (mixed * 0x9E3779B1 & 0xFFFFFFFF) >> 17
        filter_ = bytearray(4096)
        out = self.ffi.from_buffer(filter_)
        assert self.bpf.bpf_map_lookup_elem(self._map("own_filter"), bytes(4), out) == 0
        filter_[bit // 8] |= 1 << bit % 8
        self.put("own", packed(text), struct.pack("<I", kind))
        self.put("own_filter", bytes(4), bytes(filter_))

    def listen(self, stack: Stack, family: int, port: int, protocol: int, flags: int) -> None:
        """A listener beside those that there are."""
        target = struct.pack("<QQIIII", stack.key0, stack.key1, stack.offset, stack.buckets - 1, stack.number, flags)
        key = ip_address(stack.vip[family]).packed + struct.pack(">HBB", port, protocol, 0)
        self.put(f"listeners{family}", key, target)

    def allow(self, stack: Stack, family: int, port: int, protocol: int, source: str) -> None:
        network = ip_network(source)
        key = ip_address(stack.vip[family]).packed + struct.pack(">HBB", port, protocol, 0)
        prefix = struct.pack("<I", len(key) * 8 + network.prefixlen)
        self.put(f"allowed{family}", prefix + key + network.network_address.packed, struct.pack("<I", 1))

    def give(self, stack: Stack, bucket: int, word: int) -> None:
        self.put("words", struct.pack("<I", stack.offset + bucket), struct.pack("<Q", word))

    def per_cpu(self, name: str, index: int, words: int) -> list[int]:
        cpus = self.bpf.libbpf_num_possible_cpus()
        out = self.ffi.new("char[]", cpus * words * 8)
        assert self.bpf.bpf_map_lookup_elem(self._map(name), struct.pack("<I", index), out) == 0
        values = struct.unpack(f"<{cpus * words}Q", bytes(self.ffi.buffer(out)))
        return [sum(values[i::words]) for i in range(words)]

    def counters(self) -> dict[str, int]:
        return dict(zip(self.names, self.per_cpu("counters", 0, len(self.names)), strict=True))

    def run(self, frame: bytes, *, uplink: bool = False, metadata: bytes = b"") -> Result:
        program = self.bpf.bpf_object__find_program_by_name(
            self.object, b"director_uplink" if uplink else b"director_routed"
        )
        given = self.ffi.from_buffer(metadata + frame)
        out = self.ffi.new("char[]", 4096)
        context_in = self.ffi.new("uint32_t[6]", [len(metadata), len(metadata) + len(frame), 0, 0, 0, 0])
        context = self.ffi.new("uint32_t[6]")
        options = self.ffi.new("struct bpf_test_run_opts *")
        options.sz = self.ffi.sizeof("struct bpf_test_run_opts")
        options.data_in, options.data_size_in = given, len(metadata) + len(frame)
        options.data_out, options.data_size_out = out, 4096
        options.ctx_in, options.ctx_size_in = context_in, 24
        options.ctx_out, options.ctx_size_out = context, 24
        before = self.counters()
        assert self.bpf.bpf_prog_test_run_opts(self.bpf.bpf_program__fd(program), options) == 0
        after = self.counters()
        counted = {name: after[name] - before[name] for name in self.names if after[name] != before[name]}
        data = bytes(self.ffi.buffer(out, options.data_size_out))
        size = context[0]
        stamp = struct.unpack("<HHIHBBI", data[size - 16 : size]) if size == 16 else None
        return Result(int(options.retval), data[size:], stamp, counted)


# ---- frames ------------------------------------------------------------------------------------------------


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def transport(protocol: int, sport: int, dport: int, payload: bytes = b"payload!") -> bytes:
    if protocol == TCP:
        return struct.pack(">HHIIBBHHH", sport, dport, 1, 2, 5 << 4, 2, 1000, 0, 0) + payload
    return struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload


def ip(
    source: str,
    destination: str,
    protocol: int,
    body: bytes,
    *,
    options: bytes = b"",
    extensions: tuple[tuple[int, bytes], ...] = (),
    ident: int = 0,
    fragment: int | None = None,
    ttl: int = 64,
) -> bytes:
    """`fragment`: the offset field as on the wire (IPv4: flags and offset; IPv6: offset << 3 | more)."""
    src, dst = ip_address(source), ip_address(destination)
    if src.version == 4:
        head = struct.pack(
            ">BBHHHBBH4s4s", 0x40 | (20 + len(options)) // 4, 0, 20 + len(options) + len(body), ident, fragment or 0, ttl,
            protocol, 0, src.packed, dst.packed,
        ) + options  # fmt: skip
        head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
        return head + body
    chain = list(extensions)
    if fragment is not None:
        chain.append((44, struct.pack(">xxHI", fragment, ident)))
    following = [kind for kind, _ in chain[1:]] + [protocol]
    packed = b"".join(bytes([after]) + text[1:] for after, (_, text) in zip(following, chain, strict=False))
    first = chain[0][0] if chain else protocol
    return struct.pack(">IHBB16s16s", 6 << 28, len(packed + body), first, ttl, src.packed, dst.packed) + packed + body


def options_header(length: int = 8) -> bytes:
    """A hop-by-hop or destination options header full of padding."""
    return bytes([0, length // 8 - 1]) + bytes(length - 2)


def ethernet(packet: bytes, tags: tuple[int, ...] = (), *, to: bytes = OUR_MAC, vlan: int = VLAN) -> bytes:
    kind = 0x0800 if packet[:1] and packet[0] >> 4 == 4 else 0x86DD
    tagged = b"".join(struct.pack(">HH", tag, vlan + i) for i, tag in enumerate(tags))
    return to + bytes.fromhex("020000000002") + tagged + struct.pack(">H", kind) + packet


def icmp(family: int, kind: int, body: bytes, source: str, destination: str, code: int = 0) -> bytes:
    message = struct.pack(">BBHI", kind, code, 0, 0) + body
    pseudo = b""
    if family == 6:
        pseudo = (
            ip_address(source).packed + ip_address(destination).packed + struct.pack(">IxxxB", len(message), ICMPV6)
        )
    message = message[:2] + struct.pack(">H", checksum(pseudo + message)) + message[4:]
    return ip(source, destination, ICMP if family == 4 else ICMPV6, message)


FAMILIES = pytest.mark.parametrize("family", [4, 6])
PROTOCOLS = pytest.mark.parametrize(("protocol", "port"), [(TCP, 80), (UDP, 53)])
