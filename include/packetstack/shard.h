/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The shard: the live flows of one bucket, in shared memory. Changed by the bucket's owner alone,
 * readable by others through the version words.
 *
 * The entries are the truth. Indexes, lists and counts are derived from them and can be built again
 * (ps_shard_rebuild); `dirty` is non-zero while they are being changed, so whoever takes over after a
 * death knows. An entry with an odd version was being written when its writer died.
 */
#ifndef PACKETSTACK_SHARD_H
#define PACKETSTACK_SHARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "packetstack/abi.h"
#include "packetstack/hash.h"

#define PS_BARRIER() __asm__ volatile("" ::: "memory")

/* Where tests let the process die; see enum ps_point. */
#ifdef PS_INJECT
void ps_point(enum ps_point at);
#define PS_POINT(name) ps_point(PS_AT_##name)
#else
#define PS_POINT(name) ((void)0)
#endif

_Static_assert(!(sizeof(struct ps_entry) % 64) && sizeof(struct ps_listener_count) == 64 &&
		       sizeof(struct ps_shard) == 64 && !(sizeof(struct ps_share) * PS_CLASSES % 64),
	       "shards and entries begin at a cache line");

/* The form of this build's shards. */
static inline struct ps_shard_form ps_shard_form(void)
{
	return (struct ps_shard_form){
		.layout = PS_SHARD_LAYOUT,
		.index_bytes = 2 * sizeof(uint16_t),
		.entry_bytes = sizeof(struct ps_entry),
		.tail_bytes = sizeof(struct ps_share) * PS_CLASSES,
		.version = offsetof(struct ps_entry, version),
		.state = offsetof(struct ps_entry, state),
		.last_seen = offsetof(struct ps_entry, last_seen),
		.hash = offsetof(struct ps_entry, hash),
		.client = offsetof(struct ps_entry, client),
		.client_port = offsetof(struct ps_entry, client_port),
		.snat_port = offsetof(struct ps_entry, snat_port),
		.snat = offsetof(struct ps_entry, snat),
		.backend = offsetof(struct ps_entry, backend),
		.listener = offsetof(struct ps_entry, listener),
		.flags = offsetof(struct ps_entry, flags),
	};
}

/* A flow as its packets name it; wire order */
struct ps_key {
	uint8_t source[16], destination[16];
	uint16_t sport, dport;
	bool udp;
	uint32_t hash; /* forward direction only */
};

static inline struct ps_shard *ps_shard_at(const struct ps_arena *a, uint32_t bucket)
{
	return (struct ps_shard *)((uint8_t *)a + a->shards_offset + bucket * a->shard_stride);
}

static inline uint16_t *ps_shard_forward(struct ps_shard *s) { return (uint16_t *)(s + 1); }

static inline uint16_t *ps_shard_reply(const struct ps_arena *a, struct ps_shard *s)
{
	return ps_shard_forward(s) + a->index_slots;
}

static inline struct ps_entry *ps_shard_flows(const struct ps_arena *a, struct ps_shard *s)
{
	return (struct ps_entry *)(ps_shard_reply(a, s) + a->index_slots);
}

static inline struct ps_share *ps_shard_shares(const struct ps_arena *a, struct ps_shard *s)
{
	return (struct ps_share *)(ps_shard_flows(a, s) + a->entries);
}

/*
 * A shard's first user looks at its header and indexes only (ps_shard_sane). Until the sweep has read
 * the entries too, one may hold anything: no number in it leads out of where it points.
 */
static inline const uint8_t *ps_address(const struct ps_arena *a, uint16_t number)
{
	return a->address[number & (PS_MAX_ADDRESSES - 1)].bytes;
}

static inline const struct ps_backend *ps_backend_of(const struct ps_arena *a, const struct ps_entry *f)
{
	return &a->backend[f->backend & (PS_MAX_BACKENDS - 1)];
}

static inline const struct ps_listener_name *ps_listener_of(const struct ps_arena *a, const struct ps_entry *f)
{
	return &a->listener[f->listener & (PS_MAX_NUMBERS - 1)];
}

static inline uint32_t ps_class(const struct ps_entry *f) { return f->listener & (PS_CLASSES - 1); }

static inline uint16_t ps_link(const struct ps_shard *s, uint16_t link) { return link <= s->high ? link : 0; }

/* Bytes of a shard: header, two indexes, entries, shares; a multiple of a cache line. */
static inline uint64_t ps_shard_bytes(uint32_t entries, uint32_t index_slots)
{
	return sizeof(struct ps_shard) + 4ull * index_slots + sizeof(struct ps_entry) * entries +
	       sizeof(struct ps_share) * PS_CLASSES;
}

/* ---- indexes: open addressing, linear probing, deletion by shifting back ---------------------------- */

static inline uint32_t ps_home_forward(const struct ps_arena *a, uint32_t hash)
{
	return (hash ^ hash >> 15) & (a->index_slots - 1);
}

/* Backends are configured, not attackers: a multiplicative hash is enough here. */
static inline uint32_t ps_home_reply(const struct ps_arena *a, const uint8_t *backend, uint16_t backend_port,
				     const uint8_t *snat, uint16_t snat_port)
{
	uint64_t x, y;
	uint32_t low;

	memcpy(&x, backend, 8);
	memcpy(&y, backend + 8, 8);
	memcpy(&low, snat + 12, 4);
	x ^= (uint64_t)backend_port | (uint64_t)snat_port << 16 | (uint64_t)low << 32;
	x = (x ^ x >> 29) * 0x9e3779b97f4a7c15ull + y;
	x = (x ^ x >> 32) * 0xd6e8feb86659fd93ull;
	return (uint32_t)(x >> 40) & (a->index_slots - 1);
}

static inline uint32_t ps_home_of(const struct ps_arena *a, const struct ps_entry *f, bool reply)
{
	const struct ps_backend *b = ps_backend_of(a, f);

	return reply ? ps_home_reply(a, b->address, b->port, ps_address(a, f->snat), f->snat_port)
		     : ps_home_forward(a, f->hash);
}

static inline void ps_index_add(const struct ps_arena *a, uint16_t *index, uint32_t home, uint32_t entry)
{
	uint32_t mask = a->index_slots - 1;

	while (index[home])
		home = (home + 1) & mask;
	index[home] = (uint16_t)(entry + 1);
}

static inline void ps_index_remove(const struct ps_arena *a, struct ps_shard *s, uint32_t entry, bool reply)
{
	uint16_t *index = reply ? ps_shard_reply(a, s) : ps_shard_forward(s);
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t mask = a->index_slots - 1, hole = ps_home_of(a, &flows[entry], reply), next;

	while (index[hole] != entry + 1) {
		if (!index[hole])
			return;
		hole = (hole + 1) & mask;
	}
	for (next = (hole + 1) & mask; index[next]; next = (next + 1) & mask) {
		uint32_t home = ps_home_of(a, &flows[index[next] - 1], reply);

		/* May the one at `next` move to the hole? Only if its home is not between them. */
		if (((next - home) & mask) >= ((next - hole) & mask)) {
			index[hole] = index[next];
			hole = next;
		}
	}
	index[hole] = 0;
}

static inline struct ps_entry *ps_find_forward(const struct ps_arena *a, struct ps_shard *s, const struct ps_key *k)
{
	uint16_t *index = ps_shard_forward(s);
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t mask = a->index_slots - 1, at;

	for (at = ps_home_forward(a, k->hash); index[at]; at = (at + 1) & mask) {
		struct ps_entry *f = &flows[index[at] - 1];

		if (f->hash == k->hash && f->client_port == k->sport && ps_listener_of(a, f)->port == k->dport &&
		    !(f->flags & PS_FLOW_UDP) == !k->udp && !memcmp(f->client, k->source, 16) &&
		    !memcmp(ps_listener_of(a, f)->address, k->destination, 16))
			return f;
	}
	return NULL;
}

/* k: source = backend, destination = SNAT address. */
static inline struct ps_entry *ps_find_reply(const struct ps_arena *a, struct ps_shard *s, const struct ps_key *k)
{
	uint16_t *index = ps_shard_reply(a, s);
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t mask = a->index_slots - 1, at;

	for (at = ps_home_reply(a, k->source, k->sport, k->destination, k->dport); index[at]; at = (at + 1) & mask) {
		struct ps_entry *f = &flows[index[at] - 1];

		if (f->snat_port == k->dport && ps_backend_of(a, f)->port == k->sport &&
		    !(f->flags & PS_FLOW_UDP) == !k->udp && !memcmp(ps_backend_of(a, f)->address, k->source, 16) &&
		    !memcmp(ps_address(a, f->snat), k->destination, 16))
			return f;
	}
	return NULL;
}

/* ---- lists of what may have to go, oldest first --------------------------------------------------------- */

static inline bool ps_state_half_open(uint8_t state)
{
	return state == PS_FLOW_SYN || state == PS_FLOW_SYN_ACK || state == PS_FLOW_UNANSWERED ||
	       state == PS_FLOW_ANSWERED;
}

/* Both ends have done with it. */
static inline bool ps_state_ended(uint8_t state) { return state == PS_FLOW_CLOSED || state == PS_FLOW_TIME_WAIT; }

/* -> ps_list, or PS_LISTS: on none, nobody may take its place */
static inline uint32_t ps_list_of(uint8_t state)
{
	return ps_state_half_open(state)    ? PS_LIST_HALF_OPEN
	       : state == PS_FLOW_CLOSED    ? PS_LIST_CLOSED
	       : state == PS_FLOW_TIME_WAIT ? PS_LIST_TIME_WAIT
					    : PS_LISTS;
}

static inline bool ps_state_listed(uint8_t state) { return ps_list_of(state) != PS_LISTS; }

static inline void ps_list_add(const struct ps_arena *a, struct ps_shard *s, struct ps_entry *f)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	struct ps_flow_list *list = &s->list[ps_list_of(f->state)];
	uint16_t me = (uint16_t)(f - flows + 1);

	f->prev = list->tail;
	f->next = 0;
	if (list->tail)
		flows[list->tail - 1].next = me;
	else
		list->head = me;
	list->tail = me;
	f->flags |= PS_FLOW_LISTED;
	list->count++;
	if (ps_state_half_open(f->state))
		ps_shard_shares(a, s)[ps_class(f)].half_open++;
}

static inline void ps_list_remove(const struct ps_arena *a, struct ps_shard *s, struct ps_entry *f)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	struct ps_flow_list *list;
	uint16_t prev = ps_link(s, f->prev), next = ps_link(s, f->next);

	if (!(f->flags & PS_FLOW_LISTED) || !ps_state_listed(f->state))
		return;
	list = &s->list[ps_list_of(f->state)];
	if (prev)
		flows[prev - 1].next = next;
	else
		list->head = next;
	if (next)
		flows[next - 1].prev = prev;
	else
		list->tail = prev;
	f->prev = f->next = 0;
	f->flags &= (uint16_t)~PS_FLOW_LISTED;
	list->count--;
	if (ps_state_half_open(f->state))
		ps_shard_shares(a, s)[ps_class(f)].half_open--;
}

/* ---- changes --------------------------------------------------------------------------------------- */

static inline void ps_shard_begin(struct ps_shard *s)
{
	s->dirty = 1;
	PS_BARRIER();
}
static inline void ps_shard_end(struct ps_shard *s)
{
	PS_BARRIER();
	s->dirty = 0;
	PS_BARRIER();
}
static inline void ps_flow_begin(struct ps_entry *f)
{
	f->version |= 1;
	PS_BARRIER();
}
static inline void ps_flow_end(struct ps_entry *f)
{
	PS_BARRIER();
	f->version = (uint16_t)((f->version | 1) + 1);
	PS_BARRIER();
}

static inline void ps_shard_expect(struct ps_shard *s, uint32_t tick)
{
	if ((int32_t)(tick - s->next_expiry) < 0)
		s->next_expiry = tick;
}

/*
 * The flag is set after the counters and cleared before them: a rebuild counts whoever has none. A death in between
 * leaves a counter of the arena one too high, never too low. So it is with the counts of proven flows.
 */
static inline void ps_count_add(struct ps_arena *a, struct ps_shard *s, struct ps_entry *f)
{
	if (f->flags & PS_FLOW_COUNTED)
		return;
	ps_shard_shares(a, s)[ps_class(f)].held++;
	__atomic_fetch_add(&a->backend_count[f->backend & (PS_MAX_BACKENDS - 1)].live, 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&a->listener_count[f->listener & (PS_MAX_NUMBERS - 1)].live, 1, __ATOMIC_RELAXED);
	f->flags |= PS_FLOW_COUNTED;
}

static inline void ps_created_add(struct ps_arena *a, const struct ps_entry *f)
{
	__atomic_fetch_add(&a->backend_count[f->backend & (PS_MAX_BACKENDS - 1)].created, 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&a->listener_count[f->listener & (PS_MAX_NUMBERS - 1)].created, 1, __ATOMIC_RELAXED);
}

static inline void ps_count_subtract(struct ps_arena *a, struct ps_shard *s, struct ps_entry *f)
{
	if (!(f->flags & PS_FLOW_COUNTED))
		return;
	f->flags &= (uint16_t)~PS_FLOW_COUNTED;
	PS_BARRIER();
	ps_shard_shares(a, s)[ps_class(f)].held--;
	__atomic_fetch_sub(&a->backend_count[f->backend & (PS_MAX_BACKENDS - 1)].live, 1, __ATOMIC_RELAXED);
	__atomic_fetch_sub(&a->listener_count[f->listener & (PS_MAX_NUMBERS - 1)].live, 1, __ATOMIC_RELAXED);
}

/*
 * The table of clients: a group of eight places, one cache line, by a keyed hash of listener and client. A place
 * whose count is 0 is free. A client that finds its group full is not limited.
 */
enum { PS_CLIENT_GROUP = 8 };

struct ps_clients {
	ps_client_count *at;
	uint32_t places; /* a power of two */
	const uint64_t *key;
};

static inline struct ps_clients ps_arena_clients(const struct ps_arena *a)
{
	return (struct ps_clients){ (ps_client_count *)((uint8_t *)a + a->clients_offset), a->clients, a->clients_key };
}

static inline ps_client_count *ps_client_group(struct ps_clients t, const uint8_t client[16], uint16_t listener,
					       uint64_t *tag)
{
	uint32_t words[4], none[4] = { 0 };
	uint64_t hash;

	memcpy(words, client, 16);
	hash = ps_hash6(t.key[0], t.key[1], words, none, listener, 0, 0);
	*tag = hash & ~0xffffffffull;
	return t.at + ((uint32_t)hash & (t.places - 1) & ~(PS_CLIENT_GROUP - 1u));
}

/* -> proven flows of this client of this listener */
static inline uint32_t ps_client_flows(struct ps_clients t, const uint8_t client[16], uint16_t listener)
{
	uint64_t tag;
	ps_client_count *group = ps_client_group(t, client, listener, &tag);

	for (int i = 0; i < PS_CLIENT_GROUP; i++) {
		uint64_t at = __atomic_load_n(&group[i], __ATOMIC_RELAXED);

		if ((at & ~0xffffffffull) == tag && (uint32_t)at)
			return (uint32_t)at;
	}
	return 0;
}

/* The flow is proven: its listener counts it, and its client too if the listener limits clients. */
static inline void ps_proven_add(struct ps_arena *a, struct ps_entry *f, bool by_client)
{
	uint64_t tag;
	ps_client_count *group;

	if (f->flags & PS_FLOW_PROVEN)
		return;
	__atomic_fetch_add(&a->listener_count[f->listener & (PS_MAX_NUMBERS - 1)].proven, 1, __ATOMIC_RELAXED);
	f->flags |= PS_FLOW_PROVEN;
	if (!by_client)
		return;
	group = ps_client_group(ps_arena_clients(a), f->client, f->listener, &tag);
	for (int pass = 0; pass < 2; pass++)
		for (int i = 0; i < PS_CLIENT_GROUP; i++) {
			uint64_t at = __atomic_load_n(&group[i], __ATOMIC_RELAXED);

			while (pass ? !(uint32_t)at : (uint32_t)at && (at & ~0xffffffffull) == tag)
				if (__atomic_compare_exchange_n(&group[i], &at, pass ? tag | 1 : at + 1, false,
								__ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
					f->flags |= PS_FLOW_CLIENT_COUNTED;
					return;
				}
		}
}

static inline void ps_proven_subtract(struct ps_arena *a, struct ps_entry *f)
{
	uint64_t tag;
	ps_client_count *group;

	if (f->flags & PS_FLOW_PROVEN) {
		f->flags &= (uint16_t)~PS_FLOW_PROVEN;
		PS_BARRIER();
		__atomic_fetch_sub(&a->listener_count[f->listener & (PS_MAX_NUMBERS - 1)].proven, 1, __ATOMIC_RELAXED);
	}
	if (!(f->flags & PS_FLOW_CLIENT_COUNTED))
		return;
	group = ps_client_group(ps_arena_clients(a), f->client, f->listener, &tag);
	f->flags &= (uint16_t)~PS_FLOW_CLIENT_COUNTED;
	PS_BARRIER();
	for (int i = 0; i < PS_CLIENT_GROUP; i++) {
		uint64_t at = __atomic_load_n(&group[i], __ATOMIC_RELAXED);

		while ((uint32_t)at && (at & ~0xffffffffull) == tag)
			if (__atomic_compare_exchange_n(&group[i], &at, at - 1, false, __ATOMIC_RELAXED,
							__ATOMIC_RELAXED))
				return;
	}
}

/* A flow's state changes: keeps lists and counts right and the next expiry a lower bound. */
static inline void ps_flow_set_state(struct ps_arena *a, struct ps_shard *s, struct ps_entry *f, uint8_t state,
				     const uint32_t *timeout, uint32_t now)
{
	if (f->state == state)
		return;
	ps_shard_begin(s);
	ps_shard_expect(s, now + timeout[state]);
	ps_list_remove(a, s, f);
	PS_POINT(STATE_UNLISTED);
	f->state = state;
	PS_POINT(STATE_SET);
	if (ps_state_listed(state))
		ps_list_add(a, s, f);
	PS_POINT(STATE_LISTED);
	if (ps_state_ended(state)) {
		ps_proven_subtract(a, f);
		ps_count_subtract(a, s, f);
	} else {
		ps_count_add(a, s, f);
	}
	PS_POINT(STATE_COUNTED);
	ps_shard_end(s);
}

/* To the end of its list: it is no longer among those that go first. */
static inline void ps_flow_renew(struct ps_arena *a, struct ps_shard *s, struct ps_entry *f)
{
	if (!ps_state_listed(f->state) || !ps_link(s, f->next))
		return;
	ps_shard_begin(s);
	ps_list_remove(a, s, f);
	PS_POINT(STATE_UNLISTED);
	ps_list_add(a, s, f);
	PS_POINT(STATE_LISTED);
	ps_shard_end(s);
}

static inline void ps_flow_remove(struct ps_arena *a, struct ps_shard *s, struct ps_entry *f)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t entry = (uint32_t)(f - flows);

	ps_shard_begin(s);
	ps_list_remove(a, s, f);
	PS_POINT(REMOVE_UNLISTED);
	ps_index_remove(a, s, entry, false);
	PS_POINT(REMOVE_FORWARD);
	ps_index_remove(a, s, entry, true);
	PS_POINT(REMOVE_REPLY);
	ps_proven_subtract(a, f);
	ps_count_subtract(a, s, f);
	ps_flow_begin(f);
	PS_POINT(REMOVE_WRITING);
	f->state = PS_FLOW_FREE;
	f->flags = 0;
	f->next = s->free;
	f->prev = 0;
	ps_flow_end(f);
	PS_POINT(REMOVE_WRITTEN);
	s->free = (uint16_t)(entry + 1);
	s->live--;
	PS_POINT(REMOVE_FREED);
	ps_shard_end(s);
}

/* The class that has most half-open flows: those beyond a few are a flood's. */
static inline uint32_t ps_class_flooded(const struct ps_arena *a, struct ps_shard *s)
{
	const struct ps_share *share = ps_shard_shares(a, s);
	uint32_t most = 0;

	for (uint32_t c = 1; c < PS_CLASSES; c++)
		if (share[c].half_open > share[most].half_open)
			most = c;
	return most;
}

/*
 * The oldest half-open flow of the class that has most of them. Those of other
 * classes that stand before it go to the end of the list, so that each is passed once; some 64 at a time, then whoever
 * is next has to go.
 */
static inline struct ps_entry *ps_half_open_victim(struct ps_arena *a, struct ps_shard *s)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	const struct ps_flow_list *list = &s->list[PS_LIST_HALF_OPEN];
	uint32_t most = ps_class_flooded(a, s);

	for (int i = 0; i < 64 && list->head && ps_class(&flows[list->head - 1]) != most; i++)
		ps_flow_renew(a, s, &flows[list->head - 1]);
	return list->head ? &flows[list->head - 1] : NULL;
}

/*
 * May a listener of this class have one more entry? Half of the entries are dealt out in equal parts to the
 * classes that there are: what one has not taken of its part is kept for it. Only flows that cannot be evicted count.
 */
static inline bool ps_share_left(const struct ps_arena *a, struct ps_shard *s, uint32_t class, uint64_t classes)
{
	const struct ps_share *share = ps_shard_shares(a, s);
	uint32_t firm = s->live, part, kept = 0, mine = share[class].held - share[class].half_open;

	for (int i = 0; i < PS_LISTS; i++)
		firm -= s->list[i].count;
	if (firm < a->entries / 2 || !classes)
		return true;
	part = a->entries / 2 / (uint32_t)__builtin_popcountll(classes);
	if (mine < part)
		return true;
	for (uint32_t c = 0; c < PS_CLASSES; c++) {
		uint32_t has = share[c].held - share[c].half_open;

		if (classes >> c & 1 && has < part)
			kept += part - has;
	}
	return firm + kept < a->entries;
}

/*
 * Makes room: a free entry, or NULL when every entry holds a flow that may not be evicted. Half-open flows may hold
 * half of the entries; then, and when the shard is full, one of them goes, of the listener that has most. Those that
 * have ended go before, and those whose ports the backend still keeps after them. *recycled counts who had to go.
 */
static inline struct ps_entry *ps_flow_room(struct ps_arena *a, struct ps_shard *s, uint32_t *recycled)
{
	struct ps_entry *flows = ps_shard_flows(a, s), *victim = NULL;

	if (s->list[PS_LIST_HALF_OPEN].count >= a->entries / 2 && (victim = ps_half_open_victim(a, s))) {
		ps_flow_remove(a, s, victim);
		++*recycled;
	}
	if (s->free && flows[s->free - 1].state != PS_FLOW_FREE)
		s->free = 0; /* a flow lives there: the list is rubbish from here on */
	if (!s->free && s->high >= a->entries) {
		if (s->list[PS_LIST_CLOSED].head)
			victim = &flows[s->list[PS_LIST_CLOSED].head - 1];
		else if (!(victim = ps_half_open_victim(a, s)) && s->list[PS_LIST_TIME_WAIT].head)
			victim = &flows[s->list[PS_LIST_TIME_WAIT].head - 1];
		if (!victim)
			return NULL;
		ps_flow_remove(a, s, victim);
		++*recycled;
	}
	return s->free ? &flows[s->free - 1] : &flows[s->high];
}

/* Puts a flow whose fields `value` holds (key, backend, ports, state) into `room` from ps_flow_room. */
static inline void ps_flow_insert(struct ps_arena *a, struct ps_shard *s, struct ps_entry *room,
				  const struct ps_entry *value, const uint32_t *timeout, uint32_t now)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t entry = (uint32_t)(room - flows);
	struct ps_entry copy = *value;

	ps_shard_begin(s);
	ps_shard_expect(s, now + timeout[copy.state]);
	if (s->free == entry + 1)
		s->free = ps_link(s, room->next);
	else
		s->high = (uint16_t)(entry + 1);
	PS_POINT(INSERT_TAKEN);
	ps_flow_begin(room);
	PS_POINT(INSERT_WRITING);
	/* The version stays odd throughout: it must never be overwritten by what `value` holds there. */
	copy.version = room->version;
	copy.prev = copy.next = 0;
	copy.last_seen = now;
	*room = copy;
	ps_flow_end(room);
	PS_POINT(INSERT_WRITTEN);
	ps_index_add(a, ps_shard_forward(s), ps_home_of(a, room, false), entry);
	PS_POINT(INSERT_FORWARD);
	ps_index_add(a, ps_shard_reply(a, s), ps_home_of(a, room, true), entry);
	PS_POINT(INSERT_REPLY);
	if (ps_state_listed(room->state))
		ps_list_add(a, s, room);
	PS_POINT(INSERT_LISTED);
	s->live++;
	ps_created_add(a, room);
	ps_count_add(a, s, room);
	PS_POINT(INSERT_COUNTED);
	ps_shard_end(s);
}

/* Removes what has timed out. -> flows removed. Cheap when nothing can have expired. */
static inline uint32_t ps_shard_sweep(struct ps_arena *a, struct ps_shard *s, const uint32_t *timeout, uint32_t now)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t removed = 0, next = now + 0x3fffffff;

	if (!s->live || (int32_t)(now - s->next_expiry) < 0)
		return 0;
	for (uint32_t i = 0; i < s->high; i++) {
		struct ps_entry *f = &flows[i];
		uint32_t expiry;

		if (f->state == PS_FLOW_FREE)
			continue;
		expiry = f->last_seen + timeout[f->state];
		if ((int32_t)(now - expiry) >= 0) {
			ps_flow_remove(a, s, f);
			removed++;
		} else if ((int32_t)(expiry - next) < 0) {
			next = expiry;
		}
	}
	s->next_expiry = next;
	return removed;
}

/* Could this entry be a flow at all? What else is wrong with it harms only itself. */
static inline bool ps_flow_sane(const struct ps_entry *f)
{
	return f->state != PS_FLOW_FREE && f->state < PS_FLOW_STATES && f->listener < PS_MAX_NUMBERS &&
	       f->snat < PS_MAX_ADDRESSES && f->backend < PS_MAX_BACKENDS;
}

static inline struct ps_entry *ps_find_twin(const struct ps_arena *a, struct ps_shard *s, const struct ps_entry *f,
					    bool reply)
{
	struct ps_key k = { .udp = f->flags & PS_FLOW_UDP, .hash = f->hash };

	memcpy(k.source, reply ? ps_backend_of(a, f)->address : f->client, 16);
	memcpy(k.destination, reply ? ps_address(a, f->snat) : ps_listener_of(a, f)->address, 16);
	k.sport = reply ? ps_backend_of(a, f)->port : f->client_port;
	k.dport = reply ? f->snat_port : ps_listener_of(a, f)->port;
	return reply ? ps_find_reply(a, s, &k) : ps_find_forward(a, s, &k);
}

/*
 * Builds indexes, lists and counts again from the entries, after the writer died while `dirty` was set
 * or left anything else behind. Half-written entries are dropped, and those that cannot be flows or
 * are there twice. Whatever bytes the shard holds, the result is whole (ps_shard_check) and nothing
 * outside of it is touched. -> entries dropped.
 */
static inline uint32_t ps_shard_rebuild(struct ps_arena *a, struct ps_shard *s)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t dropped = 0;

	ps_shard_begin(s);
	memset(ps_shard_forward(s), 0, 4ul * a->index_slots);
	s->live = s->high = s->free = 0;
	memset(s->list, 0, sizeof(s->list));
	memset(ps_shard_shares(a, s), 0, sizeof(struct ps_share) * PS_CLASSES);
	s->next_expiry = 0;
	PS_POINT(REBUILD_EMPTIED);
	for (uint32_t i = 0; i < a->entries; i++) {
		struct ps_entry *f = &flows[i];

		if (f->version & 1) {
			f->state = PS_FLOW_FREE;
			f->version++;
			dropped++;
		}
		if (f->version || f->state != PS_FLOW_FREE)
			s->high = (uint16_t)(i + 1);
	}
	PS_POINT(REBUILD_ENTRIES);
	for (uint32_t i = s->high; i-- > 0;) {
		struct ps_entry *f = &flows[i];

		f->flags &= (uint16_t)~PS_FLOW_LISTED;
		f->prev = f->next = 0;
		ps_shard_shares(a, s)[ps_class(f)].held += !!(f->flags & PS_FLOW_COUNTED); /* as when it was counted */
		if (!ps_flow_sane(f) || ps_find_twin(a, s, f, false) || ps_find_twin(a, s, f, true)) {
			dropped += f->state != PS_FLOW_FREE;
			ps_proven_subtract(a, f);
			ps_count_subtract(a, s, f);
			f->state = PS_FLOW_FREE;
			f->flags = 0;
			f->next = s->free;
			s->free = (uint16_t)(i + 1);
			continue;
		}
		ps_index_add(a, ps_shard_forward(s), ps_home_of(a, f, false), i);
		ps_index_add(a, ps_shard_reply(a, s), ps_home_of(a, f, true), i);
		if (ps_state_listed(f->state))
			ps_list_add(a, s, f);
		if (ps_state_ended(f->state) || !(f->flags & PS_FLOW_PROVEN))
			ps_proven_subtract(a, f);
		if (ps_state_ended(f->state))
			ps_count_subtract(a, s, f);
		else
			ps_count_add(a, s, f);
		s->live++;
		PS_POINT(REBUILD_HALF);
	}
	ps_shard_end(s);
	return dropped;
}

/* ---- is a shard what its writer would have left? ---------------------------------------------------- */

/*
 * The cheap part: no link leads out of the shard and every search ends. Reads indexes, not entries.
 * -> what is wrong, or NULL.
 */
static inline const char *ps_shard_sane(const struct ps_arena *a, struct ps_shard *s)
{
	const uint16_t *index = ps_shard_forward(s);
	const struct ps_share *share = ps_shard_shares(a, s);
	uint32_t links[] = { s->free,	      s->list[0].head, s->list[0].tail, s->list[1].head,
			     s->list[1].tail, s->list[2].head, s->list[2].tail };
	uint32_t listed = 0, held = 0, half = 0;

	if (s->dirty)
		return "its writer died inside a change";
	for (int i = 0; i < PS_LISTS; i++)
		listed += s->list[i].count;
	for (int c = 0; c < PS_CLASSES; c++) {
		if (share[c].half_open > share[c].held)
			return "its counts are impossible";
		held += share[c].held;
		half += share[c].half_open;
	}
	if (s->high > a->entries || s->live > s->high || listed > s->live || half != s->list[0].count ||
	    held + s->list[1].count + s->list[2].count != s->live)
		return "its counts are impossible";
	for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++)
		if (links[i] > s->high)
			return "the end of a list is no entry";
	for (int reply = 0; reply < 2; reply++, index += a->index_slots) {
		uint32_t used = 0, most = 0;

		for (uint32_t i = 0; i < a->index_slots; i++) {
			used += index[i] != 0;
			most = index[i] > most ? index[i] : most;
		}
		if (used != s->live || most > s->high)
			return "an index is not that of its flows";
	}
	return NULL;
}

/* All of it: what can be derived from the entries is there, and nothing else. -> what is wrong, or NULL. */
static inline const char *ps_shard_check(const struct ps_arena *a, struct ps_shard *s)
{
	const char *wrong = ps_shard_sane(a, s);
	const struct ps_share *share = ps_shard_shares(a, s);
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t live = 0, listed[PS_LISTS] = { 0 }, held[PS_CLASSES] = { 0 }, half[PS_CLASSES] = { 0 }, on_free = 0;

	if (wrong)
		return wrong;
	for (uint32_t i = 0; i < a->entries; i++) {
		struct ps_entry *f = &flows[i];

		if (f->version & 1)
			return "an entry is half written";
		if (f->state == PS_FLOW_FREE)
			continue;
		if (!ps_flow_sane(f) || i >= s->high)
			return "an entry cannot be a flow";
		if (!!(f->flags & PS_FLOW_LISTED) != ps_state_listed(f->state) || f->prev > s->high ||
		    f->next > s->high)
			return "an entry's links are not those of its state";
		if (!(f->flags & PS_FLOW_COUNTED) != ps_state_ended(f->state))
			return "a flow is not counted, or one that has ended is";
		live++;
		held[ps_class(f)] += !ps_state_ended(f->state);
		half[ps_class(f)] += ps_state_half_open(f->state);
		if (ps_state_listed(f->state))
			listed[ps_list_of(f->state)]++;
	}
	if (live != s->live)
		return "its counts are not those of its flows";
	for (int c = 0; c < PS_CLASSES; c++)
		if (held[c] != share[c].held || half[c] != share[c].half_open)
			return "its counts are not those of its flows";
	for (uint32_t i = 0; i < s->high; i++)
		if (flows[i].state != PS_FLOW_FREE && (ps_find_twin(a, s, &flows[i], false) != &flows[i] ||
						       ps_find_twin(a, s, &flows[i], true) != &flows[i]))
			return "a flow is not found, or another one in its place";
	for (uint32_t list = 0; list < PS_LISTS; list++) {
		uint32_t n = 0, before = 0, at = s->list[list].head;

		for (; at; before = at, at = flows[at - 1].next)
			if (flows[at - 1].prev != before || ps_list_of(flows[at - 1].state) != list || ++n > live)
				return "a list is broken";
		if (before != s->list[list].tail || n != listed[list] || n != s->list[list].count)
			return "a list is not whole";
	}
	for (uint32_t at = s->free; at; at = flows[at - 1].next)
		if (flows[at - 1].state != PS_FLOW_FREE || flows[at - 1].next > s->high || ++on_free > s->high)
			return "the free list is broken";
	return on_free + live == s->high ? NULL : "the free list is not whole";
}

#endif
