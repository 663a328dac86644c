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

enum { CLIENTS = 64 }; /* places of the table of clients: few, so that groups fill up */

static inline struct ps_arena *arena_new(uint32_t buckets, uint32_t entries, uint32_t index_slots)
{
	uint64_t stride = ps_shard_bytes(entries, index_slots), offset = (sizeof(struct ps_arena) + 63) & ~63ull;
	uint64_t clients = offset + stride * buckets;
	uint64_t bytes = (clients + CLIENTS * sizeof(ps_client_count) + 4095) & ~4095ull;
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
	a->clients = CLIENTS;
	a->clients_offset = clients;
	a->clients_key[0] = 0x1716151413121110ull;
	a->clients_key[1] = 0x1f1e1d1c1b1a1918ull;
	return a;
}

static inline void listener_is(struct ps_arena *a, uint32_t number, const uint8_t *address, uint16_t port,
			       uint8_t protocol)
{
	memcpy(a->listener[number].address, address, 16);
	a->listener[number].port = port;
	a->listener[number].protocol = protocol;
	a->listener[number].used = 1;
}

static inline void backend_is(struct ps_arena *a, uint32_t number, const uint8_t *address, uint16_t port)
{
	memcpy(a->backend[number].address, address, 16);
	a->backend[number].port = port;
	a->backend[number].used = 1;
	if (a->backends <= number)
		a->backends = number + 1;
}

/*
 * What must hold of a shard at any time when nobody is changing it: each entry in use is found by both
 * indexes and by nothing twice, the lists hold exactly the entries their state asks for, the free list
 * and the counts are right, those by class of listener too.
 */
static inline void shard_check(const struct ps_arena *a, struct ps_shard *s, const uint32_t *timeout)
{
	static const uint8_t lists[PS_FLOW_STATES] = {
		[PS_FLOW_FREE] = 9,
		[PS_FLOW_SYN] = PS_LIST_HALF_OPEN,
		[PS_FLOW_SYN_ACK] = PS_LIST_HALF_OPEN,
		[PS_FLOW_ESTABLISHED] = 9,
		[PS_FLOW_CLOSING] = 9,
		[PS_FLOW_CLOSED] = PS_LIST_CLOSED,
		[PS_FLOW_TIME_WAIT] = PS_LIST_TIME_WAIT,
		[PS_FLOW_UNANSWERED] = PS_LIST_HALF_OPEN,
		[PS_FLOW_ANSWERED] = PS_LIST_HALF_OPEN,
		[PS_FLOW_ASSURED] = 9,
	};
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t live = 0, listed[PS_LISTS] = { 0 }, held[64] = { 0 }, half[64] = { 0 };
	uint32_t on_free = 0, slots[2] = { 0, 0 }, at, before;
	const char *wrong = ps_shard_check(a, s);

	CHECK(!wrong, "%s", wrong);
	CHECK(!s->dirty, "a shard at rest");
	CHECK(s->high <= a->entries, "%u of %u", s->high, a->entries);
	for (uint32_t i = 0; i < a->entries; i++) {
		struct ps_entry *f = &flows[i];
		const struct ps_listener_name *l = &a->listener[f->listener];
		const struct ps_backend *b = &a->backend[f->backend];
		struct ps_key k = {
			.sport = f->client_port, .dport = l->port, .udp = f->flags & PS_FLOW_UDP, .hash = f->hash
		};
		bool ended = f->state == PS_FLOW_CLOSED || f->state == PS_FLOW_TIME_WAIT;

		CHECK(!(f->version & 1), "entry %u is half written", i);
		if (f->state == PS_FLOW_FREE) {
			CHECK(!(f->flags &
				(PS_FLOW_LISTED | PS_FLOW_COUNTED | PS_FLOW_PROVEN | PS_FLOW_CLIENT_COUNTED)),
			      "entry %u is free and counted", i);
			continue;
		}
		CHECK(i < s->high, "entry %u beyond %u", i, s->high);
		CHECK(f->state < PS_FLOW_STATES, "state %u", f->state);
		live++;
		if (lists[f->state] < PS_LISTS)
			listed[lists[f->state]]++;
		CHECK(!!(f->flags & PS_FLOW_LISTED) == (lists[f->state] < PS_LISTS), "entry %u, state %u", i, f->state);
		CHECK(!(f->flags & PS_FLOW_COUNTED) == ended, "entry %u, state %u, flags %x", i, f->state, f->flags);
		CHECK(!ended || !(f->flags & PS_FLOW_PROVEN), "entry %u has ended and is counted as proven", i);
		CHECK(f->flags & PS_FLOW_PROVEN || !(f->flags & PS_FLOW_CLIENT_COUNTED), "entry %u, flags %x", i,
		      f->flags);
		held[f->listener % 64] += !ended;
		half[f->listener % 64] += lists[f->state] == PS_LIST_HALF_OPEN;
		memcpy(k.source, f->client, 16);
		memcpy(k.destination, l->address, 16);
		CHECK(ps_find_forward(a, s, &k) == f, "entry %u by its client", i);
		memcpy(k.source, b->address, 16);
		memcpy(k.destination, a->address[f->snat].bytes, 16);
		k.sport = b->port;
		k.dport = f->snat_port;
		CHECK(ps_find_reply(a, s, &k) == f, "entry %u by its backend", i);
		CHECK((int32_t)(s->next_expiry - f->last_seen - timeout[f->state]) <= 0, "entry %u would expire late",
		      i);
	}
	CHECK(live == s->live, "%u flows, counted %u", live, s->live);
	for (uint32_t c = 0; c < 64; c++)
		CHECK(held[c] == ps_shard_shares(a, s)[c].held && half[c] == ps_shard_shares(a, s)[c].half_open,
		      "class %u: %u %u, counted %u %u", c, held[c], half[c], ps_shard_shares(a, s)[c].held,
		      ps_shard_shares(a, s)[c].half_open);
	for (uint32_t i = 0; i < a->index_slots; i++) {
		slots[0] += ps_shard_forward(s)[i] != 0;
		slots[1] += ps_shard_reply(a, s)[i] != 0;
	}
	CHECK(slots[0] == live && slots[1] == live, "index slots %u %u for %u flows", slots[0], slots[1], live);
	for (uint32_t list = 0; list < PS_LISTS; list++) {
		uint32_t n = 0;

		before = 0;
		for (at = s->list[list].head; at; at = flows[at - 1].next) {
			CHECK(flows[at - 1].prev == before, "list %u at %u", list, at);
			CHECK(lists[flows[at - 1].state] == list, "list %u at %u", list, at);
			before = at;
			CHECK(++n <= live, "list %u has a loop", list);
		}
		CHECK(before == s->list[list].tail, "tail of list %u", list);
		CHECK(n == listed[list] && n == s->list[list].count, "list %u: %u", list, n);
	}
	for (at = s->free; at; at = flows[at - 1].next) {
		CHECK(flows[at - 1].state == PS_FLOW_FREE, "entry %u on the free list", at - 1);
		CHECK(++on_free <= s->high, "the free list has a loop");
	}
	CHECK(on_free + live == s->high, "%u free + %u live of %u", on_free, live, s->high);
}

/*
 * The arena's counts are those of the flows in `buckets` shards from `first` on, or higher by `slack` at most, all
 * together: a writer that dies between a counter and the flag which says that the flow is in it leaves the counter one
 * too high. -> how much they are too high
 */
static inline uint32_t counts_check(const struct ps_arena *a, uint32_t first, uint32_t buckets, uint32_t slack)
{
	enum { NUMBERS = 128 }; /* none of the tests' listeners has a higher one */
	int32_t backend[16] = { 0 }, listener[NUMBERS] = { 0 }, proven[NUMBERS] = { 0 };
	const ps_client_count *clients = (const ps_client_count *)((const uint8_t *)a + a->clients_offset);
	uint32_t high = 0;
	int64_t by_client = 0;

	for (uint32_t b = first; b < first + buckets; b++) {
		struct ps_shard *s = ps_shard_at(a, b);

		for (uint32_t i = 0; i < s->high; i++) {
			const struct ps_entry *f = &ps_shard_flows(a, s)[i];

			if (f->state == PS_FLOW_FREE)
				continue;
			CHECK(f->backend < 16 && f->listener < NUMBERS, "backend %u listener %u", f->backend,
			      f->listener);
			if (f->state != PS_FLOW_CLOSED && f->state != PS_FLOW_TIME_WAIT) {
				backend[f->backend]++;
				listener[f->listener]++;
			}
			proven[f->listener] += !!(f->flags & PS_FLOW_PROVEN);
			if (f->flags & PS_FLOW_CLIENT_COUNTED) {
				CHECK(ps_client_flows(ps_arena_clients(a), f->client, f->listener),
				      "a counted client is not there");
				by_client--;
			}
		}
	}
	for (uint32_t i = 0; i < a->clients; i++)
		by_client += (uint32_t)clients[i];
	CHECK(by_client >= 0, "%ld flows of clients are not counted", -by_client);
	high += (uint32_t)by_client;
	for (uint32_t i = 0; i < 16; i++) {
		CHECK(a->backend_count[i].live >= backend[i], "backend %u counts %d of %d", i, a->backend_count[i].live,
		      backend[i]);
		high += (uint32_t)(a->backend_count[i].live - backend[i]);
	}
	for (uint32_t i = 0; i < NUMBERS; i++) {
		const struct ps_listener_count *l = &a->listener_count[i];

		CHECK(l->live >= listener[i], "listener %u counts %d of %d", i, l->live, listener[i]);
		CHECK(l->proven >= proven[i], "listener %u counts %d of %d proven", i, l->proven, proven[i]);
		high += (uint32_t)(l->live - listener[i]) + (uint32_t)(l->proven - proven[i]);
	}
	CHECK(high <= slack, "counters are %u too high", high);
	return high;
}

#endif
