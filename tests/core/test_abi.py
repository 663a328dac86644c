"""The native part as built: Python and C agree on layouts, words and hashes."""

import random
from ipaddress import IPv4Address, IPv6Address

import pytest

from packetstack_core import abi, hashing


def test_all_shared_structures_have_the_same_size_in_c_and_python():
    abi.check_layout()


def test_a_structure_of_another_size_is_refused():
    class Library:
        @staticmethod
        def ps_size_of(name):
            return abi.lib().ps_size_of(name) + (name == b"ps_shard")

    with pytest.raises(abi.NativeError, match="struct ps_shard: 65 bytes in libpacketstack"):
        abi._check(Library)


def test_what_fills_cache_lines_does():
    sizes = {
        "ps_entry": 64, "ps_shard": 64, "ps_listener_count": 64, "ps_stamp": 16, "ps_descriptor": 16, "ps_ring": 128,
    }  # fmt: skip
    for name, size in sizes.items():
        assert abi.ffi.sizeof(f"struct {name}") == size
    assert abi.ffi.sizeof("struct ps_core") % 64 == abi.ffi.sizeof("struct ps_queue") % 8 == 0


def test_every_shared_structure_is_known_to_the_library():
    assert abi.lib().ps_size_of(b"ps_nothing") == 0
    assert all(abi.lib().ps_size_of(name.encode()) for name in abi.SHARED)


def test_names_of_enumerators_are_those_of_c():
    assert abi.enum_names("ps_flow_state")[3] == "PS_FLOW_ESTABLISHED"
    assert len(abi.enum_names("ps_flow_state")) <= 16, "room in ps_config.timeout"
    counters = abi.enum_names("ps_counter")
    assert list(counters) == list(range(len(counters)))
    assert counters[abi.lib().PS_COUNTERS] == "PS_COUNTERS"
    assert abi.lib().PS_COUNTERS <= 64, "room in struct ps_core"


def test_an_unknown_enum_is_refused():
    with pytest.raises(abi.NativeError, match="enum ps_nothing: not declared"):
        abi.enum_names("ps_nothing")


def test_a_missing_build_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(abi, "NATIVE", tmp_path)
    with pytest.raises(abi.NativeError, match="not built; run `make build`"):
        abi.native("packetstack-datapath")


def test_the_library_hashes_and_packs_as_python_does():
    lib, ffi, random_ = abi.lib(), abi.ffi, random.Random(7)
    for _ in range(500):
        key0, key1 = random_.getrandbits(64), random_.getrandbits(64)
        sport, dport = random_.getrandbits(16), random_.getrandbits(16)
        wire = [int.from_bytes(p.to_bytes(2, "big"), "little") for p in (sport, dport)]
        for kind, bits in ((IPv4Address, 32), (IPv6Address, 128)):
            source, destination = kind(random_.getrandbits(bits)), kind(random_.getrandbits(bits))
            mapped = [b"\0" * 10 + b"\xff\xff" + a.packed if bits == 32 else a.packed for a in (source, destination)]
            buffers = [ffi.from_buffer("uint8_t[]", m) for m in mapped]
            assert lib.ps_flow_hash(key0, key1, *buffers, *wire, 17) == hashing.flow_hash(
                key0, key1, source, destination, sport, dport, 17
            )
        word = hashing.Word(*(random_.getrandbits(n) for n in (32, 10, 6, 10, 6)))
        fields = (word.epoch, word.slot, word.queue, word.prev_slot, word.prev_queue)
        assert lib.ps_make_word(*fields) == word.pack()


def test_limits_in_the_resource_are_those_of_the_layouts():
    from packetstack_core import limits, maglev

    lib = abi.lib()
    assert (limits.MIN_BUCKETS, limits.MAX_BUCKETS) == (lib.PS_MIN_BUCKETS, lib.PS_MAX_BUCKETS)
    assert (limits.MAX_CORES, limits.MAX_QUEUES) == (lib.PS_MAX_CORES, lib.PS_MAX_QUEUES)
    assert (limits.MAX_LISTENERS, limits.MAX_BACKENDS) == (lib.PS_MAX_LISTENERS, lib.PS_MAX_BACKENDS)
    assert limits.MAX_SNAT_ADDRESSES == lib.PS_MAX_SNAT
    assert limits.MAX_REPLICAS < lib.PS_MAX_SLOTS
    assert maglev.PRIMES[-1] <= lib.PS_MAX_LOOKUP


def test_declarations_are_read_as_the_build_has_parsed_them_and_parsed_when_they_are_others(monkeypatch, tmp_path):
    for name in ("packetstack.cdef", "declarations.py"):
        (tmp_path / name).write_text((abi.NATIVE / name).read_text())
    monkeypatch.setattr(abi, "NATIVE", tmp_path)
    read = abi._ffi.__wrapped__
    assert type(read()).__module__ == "_cffi_backend", "nothing is parsed"
    with (tmp_path / "packetstack.cdef").open("a") as cdef:
        cdef.write("struct ps_newer { uint64_t field[7]; };\n")
    assert read().sizeof("struct ps_newer") == 56
    (tmp_path / "declarations.py").unlink()
    assert read().sizeof("struct ps_newer") == 56
