/* SPDX-License-Identifier: Apache-2.0 */
/* An arena in private memory, and random numbers that a seed repeats. */
#ifndef PACKETSTACK_TEST_ARENA_H
#define PACKETSTACK_TEST_ARENA_H

#include <stdio.h>
#include <stdlib.h>

#include "packetstack/shard.h"

#define CHECK(condition, ...)                                                                     \
	do {                                                                                      \
		if (!(condition)) {                                                               \
			fprintf(stderr, "%s:%d: not true: %s: ", __FILE__, __LINE__, #condition); \
			fprintf(stderr, __VA_ARGS__);                                             \
			fputc('\n', stderr);                                                      \
			abort();                                                                  \
		}                                                                                 \
	} while (0)

static uint64_t random_state = 1;

static inline uint32_t random_below(uint32_t n)
{
	/* splitmix64 (Steele, Lea, Flood, 2014) */
	uint64_t z = random_state += 0x9e3779b97f4a7c15ull;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return n ? (uint32_t)((z ^ z >> 31) >> 32) % n : 0;
}

static inline void mapped(uint8_t out[16], uint32_t host_order)
{
	memset(out, 0, 10);
	out[10] = out[11] = 0xff;
	out[12] = (uint8_t)(host_order >> 24);
	out[13] = (uint8_t)(host_order >> 16);
	out[14] = (uint8_t)(host_order >> 8);
	out[15] = (uint8_t)host_order;
}

static inline struct ps_arena *arena_new(uint32_t buckets, uint32_t entries, uint32_t index_slots)
{
	uint64_t stride = ps_shard_bytes(entries, index_slots), offset = (sizeof(struct ps_arena) + 63) & ~63ull;
	uint64_t bytes = (offset + stride * buckets + 4095) & ~4095ull;
	struct ps_arena *a = aligned_alloc(4096, bytes);

	CHECK(a, "out of memory");
	memset(a, 0, bytes);
	a->magic = PS_ARENA_MAGIC;
	a->layout = PS_LAYOUT_VERSION;
	a->buckets = buckets;
	a->entries = entries;
	a->index_slots = index_slots;
	a->bytes = bytes;
	a->shards_offset = offset;
	a->shard_stride = stride;
	return a;
}

/*
 * What must hold of a shard at any time when nobody is changing it: each entry in use is found by both
 * indexes and by nothing twice, the lists hold exactly the entries their state asks for, the free list
 * and the counts are right.
 */
static inline void shard_check(const struct ps_arena *a, struct ps_shard *s, const uint32_t *timeout)
{
	struct ps_flow *flows = ps_shard_flows(a, s);
	uint32_t live = 0, half = 0, closed = 0, on_free = 0, slots[2] = { 0, 0 }, at, before;

	CHECK(!s->dirty, "a shard at rest");
	CHECK(s->high <= a->entries, "%u of %u", s->high, a->entries);
	for (uint32_t i = 0; i < a->entries; i++) {
		struct ps_flow *f = &flows[i];
		struct ps_key k = {
			.sport = f->client_port, .dport = f->vip_port, .udp = f->flags & PS_FLOW_UDP, .hash = f->hash
		};

		CHECK(!(f->version & 1), "entry %u is half written", i);
		if (f->state == PS_FLOW_FREE)
			continue;
		CHECK(i < s->high, "entry %u beyond %u", i, s->high);
		CHECK(f->state < PS_FLOW_STATES, "state %u", f->state);
		live++;
		half += ps_state_half_open(f->state);
		closed += f->state == PS_FLOW_CLOSED;
		CHECK(!!(f->flags & PS_FLOW_LISTED) == ps_state_listed(f->state), "entry %u, state %u", i, f->state);
		memcpy(k.source, f->client, 16);
		memcpy(k.destination, a->address[f->vip].bytes, 16);
		CHECK(ps_find_forward(a, s, &k) == f, "entry %u by its client", i);
		memcpy(k.source, f->backend, 16);
		memcpy(k.destination, a->address[f->snat].bytes, 16);
		k.sport = f->backend_port;
		k.dport = f->snat_port;
		CHECK(ps_find_reply(a, s, &k) == f, "entry %u by its backend", i);
		CHECK((int32_t)(s->next_expiry - f->last_seen - timeout[f->state]) <= 0, "entry %u would expire late",
		      i);
	}
	CHECK(live == s->live && half == s->half_open && closed == s->closed, "%u %u %u, counted %u %u %u", live, half,
	      closed, s->live, s->half_open, s->closed);
	for (uint32_t i = 0; i < a->index_slots; i++) {
		slots[0] += ps_shard_forward(s)[i] != 0;
		slots[1] += ps_shard_reply(a, s)[i] != 0;
	}
	CHECK(slots[0] == live && slots[1] == live, "index slots %u %u for %u flows", slots[0], slots[1], live);
	for (int list = 0; list < 2; list++) {
		uint32_t n = 0;

		before = 0;
		for (at = list ? s->closed_head : s->half_head; at; at = flows[at - 1].next) {
			CHECK(flows[at - 1].prev == before, "list %d at %u", list, at);
			CHECK((flows[at - 1].state == PS_FLOW_CLOSED) == list, "list %d at %u", list, at);
			before = at;
			CHECK(++n <= live, "list %d has a loop", list);
		}
		CHECK(before == (list ? s->closed_tail : s->half_tail), "tail of list %d", list);
		CHECK(n == (list ? closed : half), "list %d: %u", list, n);
	}
	for (at = s->free; at; at = flows[at - 1].next) {
		CHECK(flows[at - 1].state == PS_FLOW_FREE, "entry %u on the free list", at - 1);
		CHECK(++on_free <= s->high, "the free list has a loop");
	}
	CHECK(on_free + live == s->high, "%u free + %u live of %u", on_free, live, s->high);
}

#endif
