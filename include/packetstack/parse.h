/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The packet parser: one text for the BPF programs, the datapath and the tests.
 *
 * Safe on any input between data and data_end: no byte outside is read, whatever the bytes inside
 * say. Reads headers only, changes nothing, verifies no checksum. Ethernet (up to two VLAN tags),
 * IPv4 with options, IPv6 with up to PS_EXTENSIONS extension headers, TCP, UDP, ICMP.
 */
#ifndef PACKETSTACK_PARSE_H
#define PACKETSTACK_PARSE_H

#include <stdint.h>

#ifndef PS_INLINE
#define PS_INLINE static inline __attribute__((always_inline))
#endif

/* Loads from the wire. BPF loads a word as it is told; elsewhere alignment must not be assumed. */
#ifdef __bpf__
#define PS_LOAD(type, p) (*(const type *)(p))
#else
#define PS_LOAD(type, p)                                        \
	({                                                      \
		type ps_value;                                  \
		__builtin_memcpy(&ps_value, (p), sizeof(type)); \
		ps_value;                                       \
	})
#endif
#define PS_LOAD16(p) PS_LOAD(uint16_t, p)
#define PS_LOAD32(p) PS_LOAD(uint32_t, p)

/* Little-endian hosts only, as all of PacketStack. */
#define PS_SWAP16(x) ((uint16_t)((uint16_t)(x) << 8 | (uint16_t)(x) >> 8))

enum ps_packet_kind {
	PS_PKT_OTHER = 0, /* nothing we handle: not IP, another protocol, ICMP that is neither error nor echo request */
	PS_PKT_FLOW,	  /* TCP or UDP with ports; may be a first fragment */
	PS_PKT_FRAGMENT,  /* a later fragment: no ports */
	PS_PKT_ICMP_ERROR, /* about a TCP or UDP packet, whose tuple the fields hold */
	PS_PKT_ECHO,	   /* ICMP or ICMPv6 echo request; may be a first fragment */
	PS_PKT_MALFORMED,  /* truncated, or lengths that contradict each other */
};

enum ps_parse_limits {
	PS_VLAN_TAGS = 2,
#ifdef __bpf__
	PS_EXTENSIONS = 4, /* what the verifier can follow; each more doubles its work. Longer chains are not ours */
#else
	PS_EXTENSIONS = 6,
#endif
};

enum ps_tcp_flag { PS_TCP_FIN = 1, PS_TCP_SYN = 2, PS_TCP_RST = 4, PS_TCP_ACK = 16 };

enum ps_protocol {
	PS_ICMP = 1,
	PS_TCP = 6,
	PS_UDP = 17,
	PS_ICMPV6 = 58,
};

/*
 * What is set, by kind: OTHER and MALFORMED nothing but `kind`; all others the block "always", and
 * what the comments name. Offsets are bytes from `data`. Addresses and ports are in wire order,
 * addresses 16 bytes, IPv4 mapped.
 */
struct ps_packet {
	/* always */
	uint32_t src[4], dst[4]; /* ICMP_ERROR: of the embedded header */
	uint8_t kind;		 /* ps_packet_kind */
	uint8_t family;		 /* 4 or 6 */
	uint8_t protocol;	 /* FLOW, ICMP_ERROR (the embedded one): PS_TCP or PS_UDP; FRAGMENT: as announced */
	uint8_t ttl;		 /* hop limit, of the outer header */
	uint8_t first_fragment;	 /* 1: more fragments follow this one, at offset 0 */
	uint8_t tcp_flags;	 /* FLOW: TCP's flag byte; 0 for UDP */
	uint16_t l3, l4;	 /* l4: what follows the IP header and its extensions */
	uint16_t end;		 /* end of the IP packet, Ethernet padding excluded */
	/* FLOW, ICMP_ERROR */
	uint16_t sport, dport;
	/* FRAGMENT, and first_fragment */
	uint32_t fragment_id; /* wire order; IPv4's 16 bits in the lower half */
	/* ICMP_ERROR */
	uint16_t inner_l3, inner_l4;
	uint32_t outer_src[4], outer_dst[4];
};

PS_INLINE void ps_map4(uint32_t out[4], uint32_t address)
{
	out[0] = 0;
	out[1] = 0;
	out[2] = 0xffff0000; /* ::ffff:a.b.c.d, loaded little-endian */
	out[3] = address;
}

PS_INLINE void ps_load6(uint32_t out[4], const uint8_t *p)
{
	out[0] = PS_LOAD32(p);
	out[1] = PS_LOAD32(p + 4);
	out[2] = PS_LOAD32(p + 8);
	out[3] = PS_LOAD32(p + 12);
}

/* TCP or UDP at `at`, `room` bytes to the end of the IP packet. -> 0, or -1 when malformed. */
PS_INLINE int ps_parse_transport(const uint8_t *at, const uint8_t *data_end, uint32_t room, struct ps_packet *p)
{
	if (p->protocol == PS_TCP) {
		uint32_t header;

		if (room < 20 || at + 20 > data_end)
			return -1;
		header = (at[12] >> 4) * 4;
		if (header < 20 || header > room)
			return -1;
		p->tcp_flags = at[13];
	} else {
		uint32_t length;

		if (room < 8 || at + 8 > data_end)
			return -1;
		length = PS_SWAP16(PS_LOAD16(at + 4));
		/* The length counts all fragments. */
		if (length < 8 || (length > room && !p->first_fragment))
			return -1;
		p->tcp_flags = 0;
	}
	p->sport = PS_LOAD16(at);
	p->dport = PS_LOAD16(at + 2);
	return 0;
}

/*
 * Walks the extension headers from `at` on, whose type is `next`. Sets protocol, and fragment
 * fields. -> where the last one ends, or 0 when malformed; *fragment: 1 first, 2 later.
 * Stops at anything that is not an extension header, and after PS_EXTENSIONS of them.
 */
PS_INLINE const uint8_t *ps_parse_extensions(const uint8_t *at, const uint8_t *data_end, uint8_t next,
					     uint8_t *protocol, uint32_t *fragment_id, uint8_t *fragment)
{
	*fragment = 0;
	for (int i = 0; i < PS_EXTENSIONS; i++) {
		uint32_t size;

		if (next != 0 && next != 43 && next != 60 && next != 44)
			break;
		if (at + 8 > data_end)
			return 0;
		if (next == 44) {
			uint16_t offset = PS_SWAP16(PS_LOAD16(at + 2));

			*fragment_id = PS_LOAD32(at + 4);
			size = 8;
			if (offset & 0xfff8)
				*fragment = 2;
			else if (offset & 1)
				*fragment = 1;
		} else {
			/* A route with hops left: we are not its destination. */
			if (next == 43 && at[3]) {
				*protocol = 43;
				return at;
			}
			size = (at[1] + 1) * 8;
		}
		next = at[0];
		at += size;
		if (at > data_end)
			return 0;
		if (*fragment == 2)
			break;
	}
	*protocol = next;
	return at;
}

/* The header embedded in an ICMP error, `room` bytes from `at` on. -> ps_packet_kind */
PS_INLINE int ps_parse_embedded(const uint8_t *data, const uint8_t *at, const uint8_t *data_end, struct ps_packet *p)
{
	const uint8_t *l4;

	p->inner_l3 = at - data;
	for (int i = 0; i < 4; i++) {
		p->outer_src[i] = p->src[i];
		p->outer_dst[i] = p->dst[i];
	}
	if (p->family == 4) {
		uint32_t header;

		if (at + 20 > data_end || at[0] >> 4 != 4)
			return PS_PKT_MALFORMED;
		header = (at[0] & 15) * 4;
		if (header < 20)
			return PS_PKT_MALFORMED;
		p->protocol = at[9];
		if (PS_LOAD16(at + 6) & PS_SWAP16(0x1fff))
			return PS_PKT_OTHER;
		ps_map4(p->src, PS_LOAD32(at + 12));
		ps_map4(p->dst, PS_LOAD32(at + 16));
		l4 = at + header;
	} else {
		uint32_t id;
		uint8_t fragment;

		if (at + 40 > data_end || at[0] >> 4 != 6)
			return PS_PKT_MALFORMED;
		ps_load6(p->src, at + 8);
		ps_load6(p->dst, at + 24);
		l4 = ps_parse_extensions(at + 40, data_end, at[6], &p->protocol, &id, &fragment);
		if (!l4)
			return PS_PKT_MALFORMED;
		if (fragment == 2)
			return PS_PKT_OTHER;
	}
	if (p->protocol != PS_TCP && p->protocol != PS_UDP)
		return PS_PKT_OTHER;
	/* RFC 792 promises eight bytes: ports, and TCP's sequence or UDP's length and checksum. */
	if (l4 + 8 > data_end)
		return PS_PKT_MALFORMED;
	p->inner_l4 = l4 - data;
	p->sport = PS_LOAD16(l4);
	p->dport = PS_LOAD16(l4 + 2);
	p->tcp_flags = 0;
	return PS_PKT_ICMP_ERROR;
}

/* What is behind the IP header: protocol, first_fragment and l4 are known. `ip_end` <= data_end. */
PS_INLINE int ps_parse_payload(const uint8_t *data, const uint8_t *at, const uint8_t *data_end, uint32_t room,
			       struct ps_packet *p)
{
	uint8_t type;

	if (p->protocol == PS_TCP || p->protocol == PS_UDP)
		return ps_parse_transport(at, data_end, room, p) ? PS_PKT_MALFORMED : PS_PKT_FLOW;
	if (p->protocol != (p->family == 4 ? PS_ICMP : PS_ICMPV6))
		return PS_PKT_OTHER;
	if (room < 8 || at + 8 > data_end)
		return PS_PKT_MALFORMED;
	type = at[0];
	if (p->family == 4 ? type == 3 || type == 11 || type == 12 : type >= 1 && type <= 4) {
		int kind = ps_parse_embedded(data, at + 8, data_end, p);

		/* Padding behind the IP packet may have been taken for the embedded header. */
		if (kind == PS_PKT_ICMP_ERROR && p->inner_l4 + 8 > p->end)
			return PS_PKT_MALFORMED;
		return kind;
	}
	if (type == (p->family == 4 ? 8 : 128))
		return PS_PKT_ECHO;
	return PS_PKT_OTHER;
}

/* An IPv4 packet at `at`. -> ps_packet_kind, not yet stored */
PS_INLINE int ps_parse4(const uint8_t *data, const uint8_t *at, const uint8_t *data_end, struct ps_packet *p)
{
	uint32_t header, length;
	uint16_t fragment;

	if (at + 20 > data_end || at[0] >> 4 != 4)
		return PS_PKT_MALFORMED;
	header = (at[0] & 15) * 4;
	length = PS_SWAP16(PS_LOAD16(at + 2));
	if (header < 20 || length < header || length > (uint64_t)(data_end - at))
		return PS_PKT_MALFORMED;
	fragment = PS_SWAP16(PS_LOAD16(at + 6));
	p->family = 4;
	p->ttl = at[8];
	p->protocol = at[9];
	p->l3 = at - data;
	p->l4 = p->l3 + header;
	p->end = p->l3 + length;
	ps_map4(p->src, PS_LOAD32(at + 12));
	ps_map4(p->dst, PS_LOAD32(at + 16));
	p->fragment_id = PS_LOAD16(at + 4);
	p->first_fragment = (fragment & 0x3fff) == 0x2000;
	if (fragment & 0x1fff)
		return PS_PKT_FRAGMENT;
	return ps_parse_payload(data, at + header, data_end, length - header, p);
}

/* An IPv6 packet at `at`. -> ps_packet_kind, not yet stored */
PS_INLINE int ps_parse6(const uint8_t *data, const uint8_t *at, const uint8_t *data_end, struct ps_packet *p)
{
	const uint8_t *l4;
	uint32_t length, header;
	uint8_t fragment;

	if (at + 40 > data_end || at[0] >> 4 != 6)
		return PS_PKT_MALFORMED;
	length = 40u + PS_SWAP16(PS_LOAD16(at + 4));
	if (length > (uint64_t)(data_end - at))
		return PS_PKT_MALFORMED;
	p->family = 6;
	p->ttl = at[7];
	p->l3 = at - data;
	p->end = p->l3 + length;
	ps_load6(p->src, at + 8);
	ps_load6(p->dst, at + 24);
	p->fragment_id = 0;
	l4 = ps_parse_extensions(at + 40, data_end, at[6], &p->protocol, &p->fragment_id, &fragment);
	if (!l4)
		return PS_PKT_MALFORMED;
	header = l4 - at;
	if (header > length)
		return PS_PKT_MALFORMED;
	p->l4 = p->l3 + header;
	p->first_fragment = fragment == 1;
	if (fragment == 2)
		return PS_PKT_FRAGMENT;
	return ps_parse_payload(data, l4, data_end, length - header, p);
}

/* Parses the frame [data, data_end), at most 65535 bytes. -> p->kind */
PS_INLINE int ps_parse(void *data, void *data_end, struct ps_packet *p)
{
	const uint8_t *start = data, *end = data_end, *at = start + 14;
	uint16_t type;
	int kind;

	p->kind = PS_PKT_MALFORMED;
	if (at > end)
		return PS_PKT_MALFORMED;
	type = PS_LOAD16(start + 12);
	for (int i = 0; i < PS_VLAN_TAGS; i++) {
		if (type != PS_SWAP16(0x8100) && type != PS_SWAP16(0x88a8))
			break;
		if (at + 4 > end)
			return PS_PKT_MALFORMED;
		type = PS_LOAD16(at + 2);
		at += 4;
	}
	if (type == PS_SWAP16(0x0800))
		kind = ps_parse4(start, at, end, p);
	else if (type == PS_SWAP16(0x86dd))
		kind = ps_parse6(start, at, end, p);
	else
		kind = PS_PKT_OTHER;
	p->kind = kind;
	return kind;
}

#endif
