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

#define PS_BARRIER() __asm__ volatile("" ::: "memory")

/* Where tests let the process die; see enum ps_point. */
#ifdef PS_INJECT
void ps_point(enum ps_point at);
#define PS_POINT(name) ps_point(PS_AT_##name)
#else
#define PS_POINT(name) ((void)0)
#endif

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

static inline struct ps_flow *ps_shard_flows(const struct ps_arena *a, struct ps_shard *s)
{
	return (struct ps_flow *)(ps_shard_reply(a, s) + a->index_slots);
}

/*
 * A shard's first user looks at its header and indexes only (ps_shard_sane). Until the sweep has read
 * the entries too, one may hold anything: no number in it leads out of where it points.
 */
static inline const uint8_t *ps_address(const struct ps_arena *a, uint16_t number)
{
	return a->address[number & (PS_MAX_ADDRESSES - 1)].bytes;
}

static inline struct ps_backend_count *ps_backend_of(struct ps_arena *a, const struct ps_flow *f)
{
	return &a->backend[f->backend_id & (PS_MAX_BACKENDS - 1)];
}

static inline uint16_t ps_link(const struct ps_shard *s, uint16_t link) { return link <= s->high ? link : 0; }

/* Bytes of a shard: header, two indexes, entries; a multiple of a cache line. */
static inline uint64_t ps_shard_bytes(uint32_t entries, uint32_t index_slots)
{
	return sizeof(struct ps_shard) + 4ull * index_slots + 64ull * entries;
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

static inline uint32_t ps_home_of(const struct ps_arena *a, const struct ps_flow *f, bool reply)
{
	return reply ? ps_home_reply(a, f->backend, f->backend_port, ps_address(a, f->snat), f->snat_port)
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
	struct ps_flow *flows = ps_shard_flows(a, s);
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

static inline struct ps_flow *ps_find_forward(const struct ps_arena *a, struct ps_shard *s, const struct ps_key *k)
{
	uint16_t *index = ps_shard_forward(s);
	struct ps_flow *flows = ps_shard_flows(a, s);
	uint32_t mask = a->index_slots - 1, at;

	for (at = ps_home_forward(a, k->hash); index[at]; at = (at + 1) & mask) {
		struct ps_flow *f = &flows[index[at] - 1];

		if (f->hash == k->hash && f->client_port == k->sport && f->vip_port == k->dport &&
		    !(f->flags & PS_FLOW_UDP) == !k->udp && !memcmp(f->client, k->source, 16) &&
		    !memcmp(ps_address(a, f->vip), k->destination, 16))
			return f;
	}
	return NULL;
}

/* k: source = backend, destination = SNAT address. */
static inline struct ps_flow *ps_find_reply(const struct ps_arena *a, struct ps_shard *s, const struct ps_key *k)
{
	uint16_t *index = ps_shard_reply(a, s);
	struct ps_flow *flows = ps_shard_flows(a, s);
	uint32_t mask = a->index_slots - 1, at;

	for (at = ps_home_reply(a, k->source, k->sport, k->destination, k->dport); index[at]; at = (at + 1) & mask) {
		struct ps_flow *f = &flows[index[at] - 1];

		if (f->snat_port == k->dport && f->backend_port == k->sport && !(f->flags & PS_FLOW_UDP) == !k->udp &&
		    !memcmp(f->backend, k->source, 16) && !memcmp(ps_address(a, f->snat), k->destination, 16))
			return f;
	}
	return NULL;
}

/* ---- lists of what may be recycled: half-open and closed flows, oldest first ------------------------- */

static inline bool ps_state_half_open(uint8_t state)
{
	return state == PS_FLOW_SYN || state == PS_FLOW_SYN_ACK || state == PS_FLOW_UNANSWERED;
}

static inline bool ps_state_listed(uint8_t state) { return ps_state_half_open(state) || state == PS_FLOW_CLOSED; }

static inline void ps_list_add(const struct ps_arena *a, struct ps_shard *s, struct ps_flow *f)
{
	struct ps_flow *flows = ps_shard_flows(a, s);
	bool closed = f->state == PS_FLOW_CLOSED;
	uint16_t *head = closed ? &s->closed_head : &s->half_head;
	uint16_t *tail = closed ? &s->closed_tail : &s->half_tail;
	uint16_t me = (uint16_t)(f - flows + 1);

	f->prev = *tail;
	f->next = 0;
	if (*tail)
		flows[*tail - 1].next = me;
	else
		*head = me;
	*tail = me;
	f->flags |= PS_FLOW_LISTED;
	if (closed)
		s->closed++;
	else
		s->half_open++;
}

static inline void ps_list_remove(const struct ps_arena *a, struct ps_shard *s, struct ps_flow *f)
{
	struct ps_flow *flows = ps_shard_flows(a, s);
	bool closed = f->state == PS_FLOW_CLOSED;
	uint16_t *head = closed ? &s->closed_head : &s->half_head;
	uint16_t *tail = closed ? &s->closed_tail : &s->half_tail;
	uint16_t prev = ps_link(s, f->prev), next = ps_link(s, f->next);

	if (!(f->flags & PS_FLOW_LISTED))
		return;
	if (prev)
		flows[prev - 1].next = next;
	else
		*head = next;
	if (next)
		flows[next - 1].prev = prev;
	else
		*tail = prev;
	f->prev = f->next = 0;
	f->flags &= (uint8_t)~PS_FLOW_LISTED;
	if (closed)
		s->closed--;
	else
		s->half_open--;
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
static inline void ps_flow_begin(struct ps_flow *f)
{
	f->version |= 1;
	PS_BARRIER();
}
static inline void ps_flow_end(struct ps_flow *f)
{
	PS_BARRIER();
	f->version = (f->version | 1) + 1;
	PS_BARRIER();
}

static inline void ps_shard_expect(struct ps_shard *s, uint32_t tick)
{
	if ((int32_t)(tick - s->next_expiry) < 0)
		s->next_expiry = tick;
}

/* A flow's state changes: keeps the lists right and the next expiry a lower bound. */
static inline void ps_flow_set_state(const struct ps_arena *a, struct ps_shard *s, struct ps_flow *f, uint8_t state,
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
	ps_shard_end(s);
}

/* The flag is set after the counter and cleared before it: a rebuild counts whoever has none. */
static inline void ps_backend_add(struct ps_arena *a, struct ps_flow *f)
{
	__atomic_fetch_add(&ps_backend_of(a, f)->live, 1, __ATOMIC_RELAXED);
	f->flags |= PS_FLOW_COUNTED;
}

static inline void ps_backend_subtract(struct ps_arena *a, struct ps_flow *f)
{
	if (!(f->flags & PS_FLOW_COUNTED))
		return;
	f->flags &= (uint8_t)~PS_FLOW_COUNTED;
	PS_BARRIER();
	__atomic_fetch_sub(&ps_backend_of(a, f)->live, 1, __ATOMIC_RELAXED);
}

static inline void ps_flow_remove(struct ps_arena *a, struct ps_shard *s, struct ps_flow *f)
{
	struct ps_flow *flows = ps_shard_flows(a, s);
	uint32_t entry = (uint32_t)(f - flows);

	ps_shard_begin(s);
	ps_list_remove(a, s, f);
	PS_POINT(REMOVE_UNLISTED);
	ps_index_remove(a, s, entry, false);
	PS_POINT(REMOVE_FORWARD);
	ps_index_remove(a, s, entry, true);
	PS_POINT(REMOVE_REPLY);
	ps_backend_subtract(a, f);
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

/*
 * Makes room: a free entry, or NULL when every entry holds a flow that may not be evicted. Half-open
 * flows may hold `half_limit` entries at the most; then, and when the shard is full, the oldest of
 * them goes. Established flows are never evicted. *recycled counts those that had to go.
 */
static inline struct ps_flow *ps_flow_room(struct ps_arena *a, struct ps_shard *s, uint32_t half_limit,
					   uint32_t *recycled)
{
	struct ps_flow *flows = ps_shard_flows(a, s);

	if (s->half_open >= half_limit && s->half_head) {
		ps_flow_remove(a, s, &flows[s->half_head - 1]);
		++*recycled;
	}
	if (s->free && flows[s->free - 1].state != PS_FLOW_FREE)
		s->free = 0; /* a flow lives there: the list is rubbish from here on */
	if (!s->free && s->high >= a->entries) {
		uint16_t oldest = s->closed_head ? s->closed_head : s->half_head;

		if (!oldest)
			return NULL;
		ps_flow_remove(a, s, &flows[oldest - 1]);
		++*recycled;
	}
	return s->free ? &flows[s->free - 1] : &flows[s->high];
}

/* Puts a flow whose fields `value` holds (key, backend, ports, state) into `room` from ps_flow_room. */
static inline void ps_flow_insert(struct ps_arena *a, struct ps_shard *s, struct ps_flow *room,
				  const struct ps_flow *value, const uint32_t *timeout, uint32_t now)
{
	struct ps_flow *flows = ps_shard_flows(a, s);
	uint32_t entry = (uint32_t)(room - flows);
	struct ps_flow copy = *value;

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
	__atomic_fetch_add(&ps_backend_of(a, room)->created, 1, __ATOMIC_RELAXED);
	ps_backend_add(a, room);
	PS_POINT(INSERT_COUNTED);
	ps_shard_end(s);
}

/* Removes what has timed out. -> flows removed. Cheap when nothing can have expired. */
static inline uint32_t ps_shard_sweep(struct ps_arena *a, struct ps_shard *s, const uint32_t *timeout, uint32_t now)
{
	struct ps_flow *flows = ps_shard_flows(a, s);
	uint32_t removed = 0, next = now + 0x3fffffff;

	if (!s->live || (int32_t)(now - s->next_expiry) < 0)
		return 0;
	for (uint32_t i = 0; i < s->high; i++) {
		struct ps_flow *f = &flows[i];
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
static inline bool ps_flow_sane(const struct ps_flow *f)
{
	return f->state != PS_FLOW_FREE && f->state < PS_FLOW_STATES && f->vip < PS_MAX_ADDRESSES &&
	       f->snat < PS_MAX_ADDRESSES && f->backend_id < PS_MAX_BACKENDS;
}

static inline struct ps_flow *ps_find_twin(const struct ps_arena *a, struct ps_shard *s, const struct ps_flow *f,
					   bool reply)
{
	struct ps_key k = { .udp = f->flags & PS_FLOW_UDP, .hash = f->hash };

	memcpy(k.source, reply ? f->backend : f->client, 16);
	memcpy(k.destination, ps_address(a, reply ? f->snat : f->vip), 16);
	k.sport = reply ? f->backend_port : f->client_port;
	k.dport = reply ? f->snat_port : f->vip_port;
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
	struct ps_flow *flows = ps_shard_flows(a, s);
	uint32_t dropped = 0;

	ps_shard_begin(s);
	memset(ps_shard_forward(s), 0, 4ul * a->index_slots);
	s->live = s->high = s->free = s->half_open = s->closed = 0;
	s->half_head = s->half_tail = s->closed_head = s->closed_tail = 0;
	s->next_expiry = 0;
	PS_POINT(REBUILD_EMPTIED);
	for (uint32_t i = 0; i < a->entries; i++) {
		struct ps_flow *f = &flows[i];

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
		struct ps_flow *f = &flows[i];

		f->flags &= (uint8_t)~PS_FLOW_LISTED;
		f->prev = f->next = 0;
		if (!ps_flow_sane(f) || ps_find_twin(a, s, f, false) || ps_find_twin(a, s, f, true)) {
			dropped += f->state != PS_FLOW_FREE;
			if (f->backend_id < PS_MAX_BACKENDS)
				ps_backend_subtract(a, f);
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
		if (!(f->flags & PS_FLOW_COUNTED))
			ps_backend_add(a, f);
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
	uint32_t links[] = { s->free, s->half_head, s->half_tail, s->closed_head, s->closed_tail };

	if (s->dirty)
		return "its writer died inside a change";
	if (s->high > a->entries || s->live > s->high || s->half_open + s->closed > s->live)
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
	struct ps_flow *flows = ps_shard_flows(a, s);
	uint32_t live = 0, half = 0, closed = 0, on_free = 0;

	if (wrong)
		return wrong;
	for (uint32_t i = 0; i < a->entries; i++) {
		struct ps_flow *f = &flows[i];

		if (f->version & 1)
			return "an entry is half written";
		if (f->state == PS_FLOW_FREE)
			continue;
		if (!ps_flow_sane(f) || i >= s->high)
			return "an entry cannot be a flow";
		if (!!(f->flags & PS_FLOW_LISTED) != ps_state_listed(f->state) || f->prev > s->high ||
		    f->next > s->high)
			return "an entry's links are not those of its state";
		if (!(f->flags & PS_FLOW_COUNTED))
			return "a flow is not counted";
		live++;
		half += ps_state_half_open(f->state);
		closed += f->state == PS_FLOW_CLOSED;
	}
	if (live != s->live || half != s->half_open || closed != s->closed)
		return "its counts are not those of its flows";
	for (uint32_t i = 0; i < s->high; i++)
		if (flows[i].state != PS_FLOW_FREE && (ps_find_twin(a, s, &flows[i], false) != &flows[i] ||
						       ps_find_twin(a, s, &flows[i], true) != &flows[i]))
			return "a flow is not found, or another one in its place";
	for (int list = 0; list < 2; list++) {
		uint32_t n = 0, before = 0, at = list ? s->closed_head : s->half_head;

		for (; at; before = at, at = flows[at - 1].next)
			if (flows[at - 1].prev != before || (flows[at - 1].state == PS_FLOW_CLOSED) != list ||
			    !ps_state_listed(flows[at - 1].state) || ++n > live)
				return "a list is broken";
		if (before != (list ? s->closed_tail : s->half_tail) || n != (list ? closed : half))
			return "a list is not whole";
	}
	for (uint32_t at = s->free; at; at = flows[at - 1].next)
		if (flows[at - 1].state != PS_FLOW_FREE || flows[at - 1].next > s->high || ++on_free > s->high)
			return "the free list is broken";
	return on_free + live == s->high ? NULL : "the free list is not whole";
}

/* ---- SNAT ports: the port names the bucket, port & (buckets - 1) == bucket ---------------------------- */

/* First usable multiple: ports below 1024 are left alone. */
static inline uint32_t ps_port_first(uint32_t buckets) { return buckets >= 1024 ? 1 : 1024 / buckets; }
static inline uint32_t ps_ports_per_bucket(uint32_t buckets) { return 65536 / buckets - ps_port_first(buckets); }

/*
 * A port that is free for (SNAT address, backend), taking up the search where the last one ended, so
 * that a port given back is used again last. -> port in wire order, 0 = none.
 */
static inline uint16_t ps_port_find(const struct ps_arena *a, struct ps_shard *s, uint32_t bucket, uint16_t snat,
				    const uint8_t *backend, uint16_t backend_port, bool udp)
{
	uint32_t n = ps_ports_per_bucket(a->buckets), first = ps_port_first(a->buckets);
	struct ps_key k = { .sport = backend_port, .udp = udp };

	memcpy(k.source, backend, 16);
	memcpy(k.destination, ps_address(a, snat), 16);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t at = (s->port_cursor + i) % n;
		uint32_t port = (first + at) * a->buckets + bucket;

		k.dport = __builtin_bswap16((uint16_t)port);
		if (!ps_find_reply(a, s, &k)) {
			s->port_cursor = (uint16_t)((at + 1) % n);
			return k.dport;
		}
	}
	return 0;
}

#endif
