/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The connection list: what two sets of engines know of each other while their traffic is mirrored. For each bucket the
 * keeper, its previous owner, publishes which connections it keeps; the newcomer, its owner, leaves these alone and may
 * claim those that are ending. docs/architecture.md explains the protocol.
 *
 * Engines of both sets write it, and their builds may differ: it has a version and hashes of its own, and says nothing of
 * shards but that connection i is the keeper's flow i. Neither believes the other: no number in it leads out of where it
 * points, and no search goes on for ever.
 */
#ifndef PACKETSTACK_CONNECTIONS_H
#define PACKETSTACK_CONNECTIONS_H

#include "packetstack/shard.h"

enum { PS_CONNECTIONS_VERSION = 2 };

/* Changed by compare-and-swap, but for PS_CONNECTION_GONE, which is the keeper's last word. */
enum ps_connection_state {
	PS_CONNECTION_NONE = 0,	   /* there was no flow */
	PS_CONNECTION_LIVE = 1,	   /* the keeper handles all its packets */
	PS_CONNECTION_CLOSING = 2, /* so it does, but an opener may be claimed */
	PS_CONNECTION_CLAIMED = 3, /* the newcomer handles all its packets */
	PS_CONNECTION_GONE = 4,	   /* it is the keeper's no more, and its port is free */
	PS_CONNECTION_STATE = 15,
	/* The newcomer has left an opener of a live one to the keeper, who may take it though it has closed meanwhile */
	PS_CONNECTION_ASKED = 128,
};

enum ps_connection_flags {
	PS_CONNECTION_UDP = 1,
	PS_CONNECTION_SYN = 2,		 /* `syn` is one */
	PS_CONNECTION_RESET_CLIENT = 4,	 /* its set has no more time, and the client knows, */
	PS_CONNECTION_RESET_BACKEND = 8, /* and so does the backend */
};

/* 80 bytes. Addresses and ports as on the wire. */
struct ps_connection {
	uint8_t client[16], vip[16], snat[16], backend[16];
	uint16_t client_port, vip_port, snat_port, backend_port;
	uint32_t syn;	/* number of the last SYN that the keeper has taken; host order */
	uint16_t since; /* tick at which it began to close, lower half; the keeper's */
	uint8_t flags;	/* ps_connection_flags */
	uint8_t state;	/* ps_connection_state */
};

/* One bucket's. Behind it: uint16_t forward[index_slots], reply[index_slots]; ps_connection at[entries]. */
struct ps_connections {
	uint32_t published; /* 1: complete. Until then the newcomer has nothing to go by */
	uint32_t left;	    /* connections that are not gone, as of the last sweep */
	uint32_t high;	    /* entries used */
	uint32_t oldest;    /* of those left: when the one that was seen longest ago was seen, ticks */
	uint16_t port_cursor;
	uint16_t spare0;
	uint32_t spare[11];
};

_Static_assert(sizeof(struct ps_connection) == 80 && sizeof(struct ps_connections) == 64, "as other builds have it");

/*
 * Where one is mapped; its numbers come from the agent, not from the list. Behind the buckets: ps_client_count[clients],
 * the keeper's table of clients as the agent saw it last. 0: an agent made the list that has no such table.
 */
struct ps_connection_list {
	uint8_t *at;
	uint64_t stride;
	uint32_t buckets, entries, index_slots, clients;
};

static inline uint64_t ps_connections_stride(uint32_t entries, uint32_t index_slots)
{
	return (sizeof(struct ps_connections) + 4ull * index_slots + sizeof(struct ps_connection) * entries + 63) &
	       ~63ull;
}

static inline uint64_t ps_connections_bytes(const struct ps_connection_list *l)
{
	return (l->buckets * l->stride + l->clients * sizeof(ps_client_count) + PS_PAGE - 1) & ~(uint64_t)(PS_PAGE - 1);
}

static inline ps_client_count *ps_connections_clients(const struct ps_connection_list *l)
{
	return (ps_client_count *)(l->at + l->buckets * l->stride);
}

/* -> proven flows of this client of this listener that the keeper of the set with this arena had when the agent last looked */
static inline uint32_t ps_client_flows_kept(const struct ps_connection_list *l, const struct ps_arena *a,
					    const uint8_t client[16], uint16_t listener)
{
	uint16_t kept_as = a->listener[listener & (PS_MAX_NUMBERS - 1)].kept_as;

	if (!l || !l->clients || !kept_as)
		return 0;
	return ps_client_flows((struct ps_clients){ ps_connections_clients(l), l->clients, a->kept_key }, client,
			       kept_as - 1);
}

/* -> 0 if the numbers are not possible */
static inline int ps_connections_are(struct ps_connection_list *l, uint32_t buckets, uint32_t entries,
				     uint32_t index_slots, uint32_t clients)
{
	l->buckets = buckets;
	l->entries = entries;
	l->index_slots = index_slots;
	l->clients = clients;
	l->stride = ps_connections_stride(entries, index_slots);
	return buckets >= PS_MIN_BUCKETS && buckets <= PS_MAX_BUCKETS && !(buckets & (buckets - 1)) && entries &&
	       entries <= PS_MAX_ENTRIES && index_slots > entries && index_slots <= 65536 &&
	       !(index_slots & (index_slots - 1)) &&
	       (!clients || (clients >= PS_CLIENT_GROUP && clients <= 1 << 24 && !(clients & (clients - 1))));
}

static inline struct ps_connections *ps_connections_of(const struct ps_connection_list *l, uint32_t bucket)
{
	return (struct ps_connections *)(l->at + (bucket & (l->buckets - 1)) * l->stride);
}

static inline uint16_t *ps_connections_index(const struct ps_connection_list *l, struct ps_connections *c, bool reply)
{
	return (uint16_t *)(c + 1) + (reply ? l->index_slots : 0);
}

static inline struct ps_connection *ps_connection_at(const struct ps_connection_list *l, struct ps_connections *c,
						     uint32_t i)
{
	return (struct ps_connection *)(ps_connections_index(l, c, true) + l->index_slots) + i;
}

/* hash: upper half of the forward hash */
static inline uint32_t ps_connection_home(const struct ps_connection_list *l, const struct ps_connection *c,
					  uint32_t hash, bool reply)
{
	uint64_t x, y;
	uint32_t low;

	if (!reply)
		return (hash ^ hash >> 15) & (l->index_slots - 1);
	memcpy(&x, c->backend, 8);
	memcpy(&y, c->backend + 8, 8);
	memcpy(&low, c->snat + 12, 4);
	x ^= (uint64_t)c->backend_port | (uint64_t)c->snat_port << 16 | (uint64_t)low << 32;
	x = (x ^ x >> 29) * 0x9e3779b97f4a7c15ull + y;
	x = (x ^ x >> 32) * 0xd6e8feb86659fd93ull;
	return (uint32_t)(x >> 40) & (l->index_slots - 1);
}

/* k: as a packet names it; reply: source = backend, destination = SNAT address. -> the connection, or NULL */
static inline struct ps_connection *ps_connection_find(const struct ps_connection_list *l, struct ps_connections *c,
						       const struct ps_key *k, bool reply)
{
	const uint16_t *index = ps_connections_index(l, c, reply);
	uint32_t mask = l->index_slots - 1, at;
	struct ps_connection wanted = { .backend_port = k->sport, .snat_port = k->dport };

	if (reply) {
		memcpy(wanted.backend, k->source, 16);
		memcpy(wanted.snat, k->destination, 16);
	}
	at = ps_connection_home(l, &wanted, k->hash, reply);
	for (uint32_t n = 0; n <= mask && index[at]; n++, at = (at + 1) & mask) {
		uint32_t i = index[at] - 1u;
		struct ps_connection *f = ps_connection_at(l, c, i);

		if (i >= l->entries || !(f->flags & PS_CONNECTION_UDP) != !k->udp)
			continue;
		if (reply ? f->snat_port == k->dport && f->backend_port == k->sport &&
				    !memcmp(f->backend, k->source, 16) && !memcmp(f->snat, k->destination, 16)
			  : f->client_port == k->sport && f->vip_port == k->dport &&
				    !memcmp(f->client, k->source, 16) && !memcmp(f->vip, k->destination, 16))
			return f;
	}
	return NULL;
}

static inline uint8_t ps_connection_state(const struct ps_connection *c)
{
	return __atomic_load_n(&c->state, __ATOMIC_ACQUIRE);
}

/* *was becomes what is there if that is something else. -> whether it was changed */
static inline bool ps_connection_change(struct ps_connection *c, uint8_t *was, uint8_t to)
{
	return __atomic_compare_exchange_n(&c->state, was, to, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* Is the SNAT port of this key, a reply's, one that the keeper may still send from? */
static inline bool ps_connection_holds_port(const struct ps_connection_list *l, struct ps_connections *c,
					    const struct ps_key *k)
{
	const struct ps_connection *f = ps_connection_find(l, c, k, true);
	uint8_t state = f ? ps_connection_state(f) & PS_CONNECTION_STATE : PS_CONNECTION_NONE;

	return state != PS_CONNECTION_NONE && state != PS_CONNECTION_GONE;
}

/* ---- the keeper --------------------------------------------------------------------------------------------- */

/* Ticks for which a closed flow is kept for what may still come of it; its own timer, if that is shorter. */
enum { PS_CLOSED_TICKS = 50 };

/*
 * Publishes the flows of a shard, which is whole and whose owner alone calls this. From the start each time, so that
 * somebody who died halfway is of no account; the newcomer does not begin before.
 */
static inline void ps_connections_publish(const struct ps_connection_list *l, struct ps_connections *c,
					  const struct ps_arena *a, struct ps_shard *s, uint32_t now)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	uint32_t mask = l->index_slots - 1, n = s->high < l->entries ? s->high : l->entries;

	if (n > a->entries)
		n = a->entries;
	__atomic_store_n(&c->published, 0, __ATOMIC_RELEASE);
	memset(ps_connections_index(l, c, false), 0, 4ul * l->index_slots);
	c->left = 0;
	c->high = n;
	c->oldest = now;
	c->port_cursor = s->port_cursor;
	PS_POINT(PUBLISH_BEGUN);
	for (uint32_t i = 0; i < n; i++) {
		struct ps_connection *to = ps_connection_at(l, c, i);
		const struct ps_entry *f = &flows[i];
		const struct ps_backend *b = ps_backend_of(a, f);

		to->state = PS_CONNECTION_NONE;
		if (f->state == PS_FLOW_FREE)
			continue;
		memcpy(to->client, f->client, 16);
		memcpy(to->vip, ps_listener_of(a, f)->address, 16);
		memcpy(to->snat, ps_address(a, f->snat), 16);
		memcpy(to->backend, b->address, 16);
		to->client_port = f->client_port;
		to->vip_port = ps_listener_of(a, f)->port;
		to->snat_port = f->snat_port;
		to->backend_port = b->port;
		to->since = (uint16_t)now;
		to->flags = f->flags & PS_FLOW_UDP ? PS_CONNECTION_UDP : 0;
		to->state = ps_state_ended(f->state) ? PS_CONNECTION_CLOSING : PS_CONNECTION_LIVE;
		for (int reply = 0; reply < 2; reply++) {
			uint16_t *index = ps_connections_index(l, c, reply);
			uint32_t at = ps_connection_home(l, to, f->hash, reply);

			for (uint32_t tries = 0; index[at] && tries < mask; tries++)
				at = (at + 1) & mask;
			index[at] = (uint16_t)(i + 1);
		}
		c->left++;
		PS_POINT(PUBLISH_HALF);
	}
	__atomic_store_n(&c->published, 1, __ATOMIC_RELEASE);
	PS_POINT(PUBLISHED_LIST);
}

/* The flow has gone from the keeper's shard: so has the connection. */
static inline void ps_connection_gone(struct ps_connection *c)
{
	__atomic_store_n(&c->state, PS_CONNECTION_GONE, __ATOMIC_RELEASE);
	PS_POINT(KEPT_GONE);
}

/* May this flow go, which has been closing for so many ticks? One that is idle is looked at once more a sweep later. */
static inline bool ps_kept_is_over(const struct ps_entry *f, uint32_t ticks, const uint32_t *timeout, uint32_t now)
{
	bool expired = (int32_t)(now - (f->last_seen + timeout[f->state])) >= 0;

	if (f->state == PS_FLOW_CLOSED)
		return ticks >= PS_CLOSED_TICKS || (expired && ticks >= PS_TICKS_PER_SECOND);
	return expired && ticks >= PS_TICKS_PER_SECOND;
}

/*
 * The sweep of a shard that is kept: what has timed out or ended begins to close, what was claimed is forgotten, and what
 * has been closing for long enough goes. `handled`: tick by which all that came is handled: what the newcomer has left
 * to the keeper while it was live is not thrown away. -> flows removed
 */
static inline uint32_t ps_kept_sweep(const struct ps_connection_list *l, struct ps_connections *c, struct ps_arena *a,
				     struct ps_shard *s, const uint32_t *timeout, uint32_t now, uint32_t handled)
{
	struct ps_entry *flows = ps_shard_flows(a, s);
	/* Which flows there are says the shard: the newcomer cannot hide them. What the list has beyond is gone. */
	uint32_t high = s->high > c->high ? s->high : c->high, left = 0, removed = 0, oldest = now;

	for (uint32_t i = 0; i < high && i < l->entries && i < a->entries; i++) {
		struct ps_connection *to = ps_connection_at(l, c, i);
		struct ps_entry *f = &flows[i];
		uint8_t state = ps_connection_state(to), is = state & PS_CONNECTION_STATE;
		uint16_t closing = (uint16_t)((uint16_t)now - to->since);

		if (f->state == PS_FLOW_FREE) {
			if (is != PS_CONNECTION_NONE && is != PS_CONNECTION_GONE)
				ps_connection_gone(to);
			continue;
		}
		if (is == PS_CONNECTION_LIVE &&
		    (ps_state_ended(f->state) || (int32_t)(now - (f->last_seen + timeout[f->state])) >= 0)) {
			to->since = (uint16_t)now;
			ps_connection_change(to, &state,
					     (uint8_t)(PS_CONNECTION_CLOSING | (state & PS_CONNECTION_ASKED)));
			PS_POINT(KEPT_CLOSING);
		} else if (is != PS_CONNECTION_LIVE &&
			   (is != PS_CONNECTION_CLOSING ||
			    (ps_kept_is_over(f, closing, timeout, now) && (int32_t)(handled - (now - closing)) > 0))) {
			ps_flow_remove(a, s, f);
			PS_POINT(KEPT_REMOVED);
			ps_connection_gone(to);
			removed++;
			continue;
		}
		if ((int32_t)(f->last_seen - oldest) < 0)
			oldest = f->last_seen;
		left++;
	}
	c->oldest = oldest;
	__atomic_store_n(&c->left, left, __ATOMIC_RELEASE);
	return removed;
}

#endif
