/* SPDX-License-Identifier: Apache-2.0 */
/* Frames made from scratch, and their checksums computed in full: what incremental updates are held against. */
#ifndef PACKETSTACK_TEST_FRAMES_H
#define PACKETSTACK_TEST_FRAMES_H

#include "arena.h"
#include "nat.h"

struct build {
	uint8_t source[16], destination[16]; /* IPv4 mapped */
	uint16_t sport, dport;		     /* wire order */
	uint8_t protocol, tcp_flags, ttl;
	uint8_t vlans;	 /* 0 .. 2 tags */
	uint8_t options; /* bytes of IPv4 options or IPv6 extension headers / of TCP options */
	uint8_t mss_at;	 /* TCP: NOPs before an MSS option; 0 = none, 1 = no NOP */
	uint8_t scale;	 /* TCP: 1 + window scale; 0 = no such option */
	uint16_t mss;
	uint16_t window;
	uint32_t seq, ack;
	uint16_t payload;
	uint16_t fragment_offset; /* in units of 8 bytes */
	bool more_fragments, no_checksum, bad_checksum;
};

static inline void put16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static inline uint64_t pseudo_sum(const uint8_t *ip, uint32_t l4_length, uint8_t protocol)
{
	uint8_t tail[8] = { 0, 0, (uint8_t)(l4_length >> 8), (uint8_t)l4_length, 0, 0, 0, protocol };

	return ps_sum(tail, 8, ip[0] >> 4 == 4 ? ps_sum(ip + 12, 8, 0) : ps_sum(ip + 8, 32, 0));
}

/* 0 when the checksum of TCP, UDP, ICMP or ICMPv6 at l4 is right. */
static inline uint16_t l4_check(const uint8_t *ip, const uint8_t *l4, uint32_t length, uint8_t protocol)
{
	uint64_t sum = protocol == 1 ? 0 : pseudo_sum(ip, length, protocol);

	return (uint16_t)~ps_fold(ps_sum(l4, length, sum));
}

static inline void l4_checksum(const uint8_t *ip, uint8_t *l4, uint32_t length, uint8_t protocol)
{
	uint32_t at = protocol == 6 ? 16 : protocol == 17 ? 6 : 2;
	uint16_t check;

	l4[at] = l4[at + 1] = 0;
	check = l4_check(ip, l4, length, protocol);
	if (!check && protocol == 17)
		check = 0xffff;
	memcpy(l4 + at, &check, 2);
}

static inline void ip_checksum(uint8_t *ip)
{
	uint16_t check;

	ip[10] = ip[11] = 0;
	check = (uint16_t)~ps_fold(ps_sum(ip, (ip[0] & 15) * 4u, 0));
	memcpy(ip + 10, &check, 2);
}

/* IP header for `length` bytes behind it. -> its size */
static inline uint32_t build_ip(uint8_t *ip, const struct build *b, uint8_t protocol, uint32_t length)
{
	bool fragment = b->fragment_offset || b->more_fragments;
	uint32_t header;

	if (!ps_is_v6(b->source)) {
		header = 20u + (b->options & ~3u);
		memset(ip, 1, header); /* options: no operation */
		ip[0] = (uint8_t)(0x40 | header / 4);
		ip[1] = 0;
		put16(ip + 2, header + length);
		put16(ip + 4, random_below(65536));
		put16(ip + 6, (fragment ? 0u : 0x4000u) | (b->more_fragments ? 0x2000u : 0u) | b->fragment_offset);
		ip[8] = b->ttl;
		ip[9] = protocol;
		memcpy(ip + 12, b->source + 12, 4);
		memcpy(ip + 16, b->destination + 12, 4);
		ip_checksum(ip);
		return header;
	}
	memset(ip, 0, 64);
	ip[0] = 0x60;
	ip[7] = b->ttl;
	memcpy(ip + 8, b->source, 16);
	memcpy(ip + 24, b->destination, 16);
	header = 40;
	ip[6] = protocol;
	if (fragment) {
		ip[6] = 44;
		ip[40] = protocol;
		put16(ip + 42, (uint32_t)b->fragment_offset << 3 | b->more_fragments);
		put16(ip + 46, random_below(65536));
		header = 48;
	} else if (b->options >= 8) {
		ip[6] = 60; /* destination options, all padding */
		ip[40] = protocol;
		ip[41] = 0;
		ip[42] = 1;
		ip[43] = 4;
		header = 48;
	}
	put16(ip + 4, header - 40 + length);
	return header;
}

/* -> length of the frame. *l3 is where the IP header is. */
static inline uint32_t build_frame(uint8_t *frame, const struct build *b, uint32_t *l3)
{
	uint32_t at = 14, header, tcp = 20, l4_bytes;
	bool v6 = ps_is_v6(b->source);
	uint8_t *ip, *l4;

	memset(frame, 0xaa, 12);
	for (uint8_t i = 0; i < b->vlans; i++, at += 4) {
		put16(frame + at - 2, i + 1 < b->vlans ? 0x88a8 : 0x8100);
		put16(frame + at, 100);
	}
	put16(frame + at - 2, v6 ? 0x86dd : 0x0800);
	*l3 = at;
	ip = frame + at;
	if (b->mss_at)
		tcp += (b->mss_at + 3u + 3u) & ~3u;
	if (b->scale)
		tcp += 4;
	l4_bytes = b->fragment_offset ? b->payload : b->payload + (b->protocol == 6 ? tcp : 8u);
	header = build_ip(ip, b, b->protocol, l4_bytes);
	l4 = ip + header;
	for (uint32_t i = 0; i < l4_bytes; i++)
		l4[i] = (uint8_t)random_below(256);
	if (b->fragment_offset)
		return at + header + l4_bytes;
	memcpy(l4, &b->sport, 2);
	memcpy(l4 + 2, &b->dport, 2);
	if (b->protocol == 6) {
		l4[12] = (uint8_t)(tcp / 4 << 4);
		l4[13] = b->tcp_flags;
		put16(l4 + 4, b->seq >> 16);
		put16(l4 + 6, b->seq);
		put16(l4 + 8, b->ack >> 16);
		put16(l4 + 10, b->ack);
		put16(l4 + 14, b->window);
		memset(l4 + 20, 1, tcp - 20);
		if (b->scale)
			memcpy(l4 + tcp - 4, (uint8_t[]){ 1, 3, 3, (uint8_t)(b->scale - 1) }, 4);
		if (b->mss_at) {
			l4[20 + b->mss_at - 1] = 2;
			l4[20 + b->mss_at] = 4;
			put16(l4 + 20 + b->mss_at + 1, b->mss);
		}
	} else {
		put16(l4 + 4, l4_bytes);
	}
	l4_checksum(ip, l4, l4_bytes, b->protocol);
	if (b->bad_checksum)
		l4[b->protocol == 6 ? 16 : 6] ^= 1;
	if (b->no_checksum && b->protocol == 17 && !v6)
		l4[6] = l4[7] = 0;
	return at + header + l4_bytes;
}

/* An engine, its configuration and its arena in private memory: one VIP a family, three backends, two SNAT addresses. */
struct stack {
	struct ps_arena *arena;
	struct ps_config *config;
	struct ps_engine engine;
	struct ps_handler handler;
	uint64_t counters[64];
	uint8_t vip[2][16], snat[2][2][16], backend[2][3][16];
};

static inline void address6(uint8_t out[16], uint32_t net, uint32_t host)
{
	memset(out, 0, 16);
	out[0] = 0x20;
	out[1] = 0x01;
	put16(out + 2, 0xdb8);
	put16(out + 4, net);
	put16(out + 14, host);
}

static inline void stack_new(struct stack *t, uint32_t buckets, uint32_t entries, uint32_t index_slots)
{
	static const uint32_t timeout[16] = { 0, 600, 600, 74400, 2400, 2400, 600, 1200, 1800, 1800 };
	struct ps_config *c = calloc(1, sizeof(*c));
	struct ps_arena *a = arena_new(buckets, entries, index_slots);

	CHECK(c, "out of memory");
	memset(t, 0, sizeof(*t));
	t->arena = a;
	t->config = c;
	c->generation = 1;
	c->key0 = 0x0706050403020100ull;
	c->key1 = 0x0f0e0d0c0b0a0908ull;
	c->mask = buckets - 1;
	memcpy(c->timeout, timeout, sizeof(timeout));
	memcpy(t->engine.mac, "\2\0\0\0\0\1", 6);
	memcpy(t->engine.gateway_mac, "\2\0\0\0\0\2", 6);
	for (uint32_t v6 = 0; v6 < 2; v6++) {
		for (uint32_t i = 0; i < 3; i++) {
			struct ps_config_backend *b = &c->backend[v6 * 3 + i];

			if (v6)
				address6(t->backend[v6][i], 2, 10 + i);
			else
				mapped(t->backend[v6][i], 0x0a020000 + i);
			memcpy(b->address, t->backend[v6][i], 16);
			b->port = htons(8080);
			b->id = (uint16_t)(v6 * 3 + i);
			b->weight = 1;
			backend_is(a, b->id, b->address, b->port);
		}
		for (uint32_t i = 0; i < 2; i++) {
			struct ps_config_snat *n = &c->snat[v6 * 2 + i];

			if (v6)
				address6(t->snat[v6][i], 3, 64 + i);
			else
				mapped(t->snat[v6][i], 0xc0000240 + i);
			memcpy(n->address, t->snat[v6][i], 16);
			n->id = (uint16_t)(v6 * 2 + i);
			n->family = v6 ? 6 : 4;
			memcpy(a->address[n->id].bytes, n->address, 16);
		}
		if (v6)
			address6(t->vip[v6], 1, 10);
		else
			mapped(t->vip[v6], 0xc000020a);
	}
	a->addresses = 4;
	c->backends = 6;
	c->snats = 4;
	/* Memory order: 2001:... sorts behind ::ffff:..., TCP before UDP. */
	for (uint32_t v6 = 0; v6 < 2; v6++)
		for (uint32_t udp = 0; udp < 2; udp++) {
			struct ps_listener *l = &c->listener[c->listeners++];

			memcpy(l->address, t->vip[v6], 16);
			l->port = htons(80);
			l->protocol = udp ? 17 : 6;
			l->balancing = udp ? PS_LEAST_FLOWS : PS_MAGLEV;
			l->first_backend = v6 * 3;
			l->backends = 3;
			l->lookup = 0;
			l->lookup_size = 7;
			l->number = (uint16_t)(v6 * 2 + udp);
			listener_is(a, l->number, l->address, l->port, l->protocol);
		}
	for (uint32_t i = 0; i < 7; i++)
		c->lookup[i] = (uint16_t)(i % 3);
	t->handler.arena = a;
	t->handler.engine = &t->engine;
	t->handler.counters = t->counters;
	t->handler.now = 1000;
	t->handler.now_ns = 100000000000ull;
	ps_configure(&t->handler, c);
}

static inline void stack_free(struct stack *t)
{
	free(t->arena);
	free(t->config);
}

/* What the director would write for this flow (client -> VIP). */
static inline struct ps_stamp stamp_of_flow(const struct stack *t, const uint8_t *client, uint16_t sport,
					    const uint8_t *vip, uint16_t dport, uint8_t protocol)
{
	struct ps_stamp s = { .magic = PS_STAMP_MAGIC, .epoch = 1 };
	uint32_t c[4], v[4];
	uint64_t hash;

	memcpy(c, client, 16);
	memcpy(v, vip, 16);
	hash = ps_is_v6(vip) ? ps_hash6(t->config->key0, t->config->key1, c, v, sport, dport, protocol)
			     : ps_hash4(t->config->key0, t->config->key1, c[3], v[3], sport, dport, protocol);
	s.bucket = (uint16_t)(hash & t->config->mask);
	s.hash = (uint32_t)(hash >> 32);
	return s;
}

#endif
