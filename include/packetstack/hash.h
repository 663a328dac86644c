/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * SipHash-1-3 (Aumasson, Bernstein: "SipHash: a fast short-input PRF", 2012; one compression and
 * three finalisation rounds) over a flow. The message is
 *   IPv4: source 4, destination 4, source port 2, destination port 2, protocol, 4, 0, 0  (16 bytes)
 *   IPv6: source 16, destination 16, the same eight bytes with family 6                  (40 bytes)
 * all in wire order. packetstack_core.hashing is the same in Python.
 */
#ifndef PACKETSTACK_HASH_H
#define PACKETSTACK_HASH_H

#include <stdint.h>

#ifndef PS_INLINE
#define PS_INLINE static inline __attribute__((always_inline))
#endif

struct ps_sip {
	uint64_t v0, v1, v2, v3;
};

PS_INLINE uint64_t ps_rotl(uint64_t x, int n) { return x << n | x >> (64 - n); }

PS_INLINE void ps_sip_round(struct ps_sip *s)
{
	s->v0 += s->v1;
	s->v1 = ps_rotl(s->v1, 13);
	s->v1 ^= s->v0;
	s->v0 = ps_rotl(s->v0, 32);
	s->v2 += s->v3;
	s->v3 = ps_rotl(s->v3, 16);
	s->v3 ^= s->v2;
	s->v0 += s->v3;
	s->v3 = ps_rotl(s->v3, 21);
	s->v3 ^= s->v0;
	s->v2 += s->v1;
	s->v1 = ps_rotl(s->v1, 17);
	s->v1 ^= s->v2;
	s->v2 = ps_rotl(s->v2, 32);
}

PS_INLINE void ps_sip_word(struct ps_sip *s, uint64_t m)
{
	s->v3 ^= m;
	ps_sip_round(s);
	s->v0 ^= m;
}

PS_INLINE struct ps_sip ps_sip_start(uint64_t key0, uint64_t key1)
{
	struct ps_sip s = {
		key0 ^ 0x736f6d6570736575ULL,
		key1 ^ 0x646f72616e646f6dULL,
		key0 ^ 0x6c7967656e657261ULL,
		key1 ^ 0x7465646279746573ULL,
	};
	return s;
}

PS_INLINE uint64_t ps_sip_end(struct ps_sip *s, uint64_t length)
{
	ps_sip_word(s, length << 56);
	s->v2 ^= 0xff;
	ps_sip_round(s);
	ps_sip_round(s);
	ps_sip_round(s);
	return s->v0 ^ s->v1 ^ s->v2 ^ s->v3;
}

/* Ports as they stand in a little-endian load from the wire. Little-endian hosts only. */
PS_INLINE uint64_t ps_hash_ports(uint16_t sport, uint16_t dport, uint8_t protocol, uint8_t family)
{
	return (uint64_t)sport | (uint64_t)dport << 16 | (uint64_t)protocol << 32 | (uint64_t)family << 40;
}

PS_INLINE uint64_t ps_hash4(uint64_t key0, uint64_t key1, uint32_t source, uint32_t destination, uint16_t sport,
			    uint16_t dport, uint8_t protocol)
{
	struct ps_sip s = ps_sip_start(key0, key1);

	ps_sip_word(&s, (uint64_t)source | (uint64_t)destination << 32);
	ps_sip_word(&s, ps_hash_ports(sport, dport, protocol, 4));
	return ps_sip_end(&s, 16);
}

/* source, destination: four 32-bit words each, as loaded from the wire. */
PS_INLINE uint64_t ps_hash6(uint64_t key0, uint64_t key1, const uint32_t source[4], const uint32_t destination[4],
			    uint16_t sport, uint16_t dport, uint8_t protocol)
{
	struct ps_sip s = ps_sip_start(key0, key1);

	ps_sip_word(&s, (uint64_t)source[0] | (uint64_t)source[1] << 32);
	ps_sip_word(&s, (uint64_t)source[2] | (uint64_t)source[3] << 32);
	ps_sip_word(&s, (uint64_t)destination[0] | (uint64_t)destination[1] << 32);
	ps_sip_word(&s, (uint64_t)destination[2] | (uint64_t)destination[3] << 32);
	ps_sip_word(&s, ps_hash_ports(sport, dport, protocol, 6));
	return ps_sip_end(&s, 40);
}

#endif
