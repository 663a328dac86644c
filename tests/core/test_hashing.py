"""The Python oracle against the published SipHash vectors and against the C headers, compiled here."""

import random
import shutil
import subprocess
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packetstack_core import hashing
from packetstack_core.hashing import Stamp, Word

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = r"""
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include "packetstack/abi.h"
#include "packetstack/hash.h"
/* Reads lines of hexadecimal numbers, answers each with one. */
int main(void)
{
	char kind;
	uint64_t k0, k1, a, b, c, d, e, f, g;

	while (scanf(" %c %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64
		" %" SCNx64, &kind, &k0, &k1, &a, &b, &c, &d, &e, &f, &g) == 10) {
		if (kind == '4') {
			printf("%" PRIx64 "\n", ps_hash4(k0, k1, a, b, e, f, g));
		} else if (kind == '6') {
			uint32_t s[4], t[4];
			uint64_t sw[2] = { a, b }, tw[2] = { c, d };
			memcpy(s, sw, 16);
			memcpy(t, tw, 16);
			printf("%" PRIx64 "\n", ps_hash6(k0, k1, s, t, e, f, g));
		} else if (kind == 'w') {
			printf("%" PRIx64 "\n", ps_word(k0, k1, a, b, c));
		} else if (kind == 'n') {
			printf("%x\n", ps_epoch_newer(k0, k1));
		} else if (kind == 'm') {
			struct ps_stamp stamp = { .bucket = k0, .epoch = k1, .queue = a, .prev_queue = b, .flags = c }, back;
			uint8_t mac[6];
			ps_stamp_to_mac(&stamp, mac);
			ps_stamp_from_mac(mac, &back);
			if (back.bucket != (k0 & 8191) || back.epoch != (k1 & 4095) || back.queue != a || back.flags != c)
				return 1;
			for (int i = 0; i < 6; i++)
				printf("%02x", mac[i]);
			printf("\n");
		}
	}
	return 0;
}
"""


@pytest.fixture(scope="module")
def in_c(tmp_path_factory):
    """Answers of the C code to many questions at once."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "no C compiler; run `make setup`"
    folder = tmp_path_factory.mktemp("hash")
    (folder / "oracle.c").write_text(PROGRAM)
    command = [compiler, "-O1", "-std=gnu11", f"-I{ROOT}/include", "-o", str(folder / "oracle"), "oracle.c"]
    subprocess.run(command, cwd=folder, check=True)

    def ask(questions):
        text = "".join(
            f"{kind} " + " ".join(f"{n:x}" for n in [*numbers, *[0] * (9 - len(numbers))]) + "\n"
            for kind, *numbers in questions
        )
        run = subprocess.run([str(folder / "oracle")], input=text, capture_output=True, text=True, check=True)
        answers = run.stdout.split()
        assert len(answers) == len(questions)
        return answers

    return ask


def test_siphash_2_4_gives_the_published_vectors():
    """Appendix A of the paper, and the first and last of the reference implementation's vectors."""
    key = bytes(range(16))
    key0, key1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    assert hashing.siphash(key0, key1, bytes(range(15)), 2, 4) == 0xA129CA6149BE45E5
    assert hashing.siphash(key0, key1, b"", 2, 4) == 0x726FDB47DD0E0E31


def wire16(port):
    return int.from_bytes(port.to_bytes(2, "big"), "little")


def test_ten_thousand_flows_hash_alike_in_c_and_python(in_c):
    random_ = random.Random(20)
    questions, expected = [], []
    for _ in range(5000):
        key0, key1 = random_.getrandbits(64), random_.getrandbits(64)
        sport, dport, protocol = random_.getrandbits(16), random_.getrandbits(16), random_.choice((6, 17))
        source, destination = random_.getrandbits(32), random_.getrandbits(32)
        addresses = [IPv4Address(source), IPv4Address(destination)]
        words = [int.from_bytes(x.packed, "little") for x in addresses]
        questions.append(("4", key0, key1, *words, 0, 0, wire16(sport), wire16(dport), protocol))
        expected.append(hashing.flow_hash(key0, key1, *addresses, sport, dport, protocol))
        addresses6 = [IPv6Address(random_.getrandbits(128)) for _ in range(2)]
        halves = [int.from_bytes(x.packed[i : i + 8], "little") for x in addresses6 for i in (0, 8)]
        questions.append(("6", key0, key1, *halves, wire16(sport), wire16(dport), protocol))
        expected.append(hashing.flow_hash(key0, key1, str(addresses6[0]), str(addresses6[1]), sport, dport, protocol))
    assert [int(a, 16) for a in in_c(questions)] == expected


words = st.builds(
    Word,
    st.integers(0, 2**32 - 1), st.integers(0, 1023), st.integers(0, 63), st.integers(0, 1023), st.integers(0, 63),
)  # fmt: skip


def test_words_epochs_and_stamps_are_alike_in_c_and_python(in_c):
    random_ = random.Random(21)
    questions, expected = [], []
    for _ in range(2000):
        word = Word(*(random_.getrandbits(n) for n in (32, 10, 6, 10, 6)))
        questions.append(("w", word.epoch, word.slot, word.queue, word.prev_slot, word.prev_queue))
        expected.append(word.pack())
        a = random_.getrandbits(32)
        b = (a + random_.choice((0, 1, -1, 2**31, 2**31 - 1, random_.getrandbits(32)))) % 2**32
        questions.append(("n", a, b))
        expected.append(int(hashing.epoch_newer(a, b)) if (a - b) % 2**32 != 2**31 else None)
        flags = random_.choice((0, 1, 8, 4, 5, 13))
        stamp = Stamp(
            random_.getrandbits(13), random_.getrandbits(12), random_.getrandbits(6), random_.getrandbits(6),
            bool(flags & 1), bool(flags & 8), bool(flags & 4),
        )  # fmt: skip
        questions.append(("m", stamp.bucket, stamp.epoch, stamp.queue, stamp.prev_queue, flags))
        expected.append(int.from_bytes(stamp.to_mac(), "big"))
    for question, answer, right in zip(questions, in_c(questions), expected, strict=True):
        assert right is None or int(answer, 16) == right, question


@given(words)
def test_a_word_survives_packing(word):
    assert Word.unpack(word.pack()) == word
    assert hashing.owner_of(word.pack()) == Word(word.epoch, word.slot, word.queue).pack()


@given(st.builds(Stamp, st.integers(0, 8191), st.integers(0, 4095), st.integers(0, 63), st.integers(0, 63),
                 st.booleans(), st.booleans(), st.booleans()))  # fmt: skip
def test_a_stamp_survives_the_mac(stamp):
    mac = stamp.to_mac()
    assert Stamp.from_mac(mac) == stamp
    assert mac[0] & 3 == 2, "locally administered, not a group address"


def test_values_without_room_are_refused():
    with pytest.raises(ValueError, match="slot: 1024 has no room in 10 bits; use 0 to 1023"):
        Word(1, 1024, 0)


@pytest.mark.parametrize("buckets", [256, 512, 1024, 2048, 4096, 8192])
def test_snat_ports_carry_their_bucket_and_no_port_has_two(buckets):
    seen = {}
    for bucket in range(buckets):
        for port in hashing.snat_ports(bucket, buckets):
            assert hashing.reply_bucket(port, buckets) == bucket
            assert port >= 1024
            assert seen.setdefault(port, bucket) == bucket
    assert len(hashing.snat_ports(0, buckets)) == min(65536 // buckets - 1, (65536 - 1024) // buckets)


def test_there_are_fifteen_ports_in_each_of_4096_buckets():
    assert {len(hashing.snat_ports(b, 4096)) for b in range(4096)} == {15}


def test_two_families_have_no_common_hash():
    with pytest.raises(ValueError, match="two families"):
        hashing.flow_hash(0, 0, "192.0.2.1", "2001:db8::1", 1, 2, 6)


def test_flows_spread_evenly_over_buckets():
    counts = [0] * 256
    for port in range(25600):
        counts[hashing.bucket_of(hashing.flow_hash(1, 2, "192.0.2.1", "192.0.2.10", port, 80, 6), 256)] += 1
    chi_square = sum((n - 100) ** 2 / 100 for n in counts)
    assert 170 < chi_square < 350, "255 degrees of freedom"
