/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Opens a flow: finds the listener, chooses the backend, keeps the limits, finds a port and a place.
 */
#ifndef PACKETSTACK_OPENING_H
#define PACKETSTACK_OPENING_H

#include "packetstack/hash.h"
#include "packetstack/parse.h"
#include "packetstack/ports.h"
#include "handler.h"
#include "track.h"

static inline const struct ps_listener *ps_listener_find(const struct ps_config *c, const uint8_t *address,
							 uint16_t port, uint8_t protocol)
{
	uint8_t key[19];
	uint32_t low = 0, high = c->listeners;

	memcpy(key, address, 16);
	memcpy(key + 16, &port, 2);
	key[18] = protocol;
	while (low < high) {
		uint32_t middle = (low + high) / 2;
		int order = memcmp(key, &c->listener[middle], sizeof(key));

		if (!order)
			return &c->listener[middle];
		if (order < 0)
			high = middle;
		else
			low = middle + 1;
	}
	return NULL;
}

/* -> index into c->backend. The listener has at least one backend. */
static inline uint32_t ps_backend_choose(struct ps_handler *h, const struct ps_listener *l, const struct ps_key *k)
{
	const struct ps_config *c = h->config;
	uint64_t hash = k->hash * 0x9e3779b97f4a7c15ull;

	if (l->flags & PS_LISTENER_CLIENT_IP) {
		uint32_t none[4] = { 0 }, client[4];

		memcpy(client, k->source, 16);
		hash = ps_hash6(c->key0, c->key1, client, none, 0, 0, 0);
	} else if (l->balancing == PS_ROUND_ROBIN) {
		/* By weight: the Maglev table holds each backend as often as its weight asks. */
		uint32_t *turn = &h->turn[l - c->listener];

		hash = (uint64_t)(*turn)++ << 32;
		if (*turn >= l->lookup_size)
			*turn = 0;
	} else if (l->balancing == PS_LEAST_FLOWS) {
		uint32_t best = l->first_backend;
		uint64_t best_load = UINT64_MAX;
		uint32_t start = (uint32_t)(hash >> 40) % l->backends;

		for (uint32_t i = 0; i < l->backends; i++) {
			uint32_t at = l->first_backend + (start + i) % l->backends;
			int32_t live =
				__atomic_load_n(&h->arena->backend_count[c->backend[at].id].live, __ATOMIC_RELAXED);
			uint32_t kept = h->arena->backend[c->backend[at].id].kept;
			/* With the flow that it would get: so weights count among the idle too. */
			uint64_t flows = (uint64_t)(live > 0 ? live : 0) + kept + 1;
			uint64_t load = (flows << 16) / c->backend[at].weight;

			if (load < best_load) {
				best_load = load;
				best = at;
			}
		}
		return best;
	}
	return l->first_backend + c->lookup[l->lookup + (uint32_t)(hash >> 32) % l->lookup_size];
}

static inline bool ps_is_v6(const uint8_t *address)
{
	static const uint8_t mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

	return memcmp(address, mapped, 12) != 0;
}

/* spec.listeners[].limits.newFlowsPerSecond: a bucket of one second's worth, which all engines of the node share. */
static inline bool ps_rate_allows(struct ps_listener_count *count, uint32_t per_second, uint64_t now)
{
	uint64_t step = 1000000000ull / per_second, at = __atomic_load_n(&count->next_ns, __ATOMIC_RELAXED), from;

	do {
		from = at > now ? at : now;
		if (from - now > 1000000000ull - step)
			return false;
	} while (!__atomic_compare_exchange_n(&count->next_ns, &at, from + step, false, __ATOMIC_RELAXED,
					      __ATOMIC_RELAXED));
	return true;
}

/*
 * Only proven flows count for limits: with forged sources nobody can use up what others may have. What is not proven
 * is bounded by the shares of a shard. What the set before has left counts too. -> the reason to refuse, or PS_COUNTERS
 */
static inline enum ps_counter ps_limit_reached(const struct ps_handler *h, const struct ps_listener *l,
					       const uint8_t client[16])
{
	const struct ps_listener_count *count = &h->arena->listener_count[l->number & (PS_MAX_NUMBERS - 1)];
	uint32_t kept = h->arena->listener[l->number & (PS_MAX_NUMBERS - 1)].kept;

	if (l->max_flows && (int64_t)__atomic_load_n(&count->proven, __ATOMIC_RELAXED) + kept >= (int64_t)l->max_flows)
		return PS_C_DROP_LIMIT_FLOWS;
	if (l->max_flows_per_client && (uint64_t)ps_client_flows(ps_arena_clients(h->arena), client, l->number) +
						       ps_client_flows_kept(h->list, h->arena, client, l->number) >=
					       l->max_flows_per_client)
		return PS_C_DROP_LIMIT_CLIENT;
	return PS_COUNTERS;
}

/* May this client open a flow, or use one that has ended again? -> the reason to refuse, or PS_COUNTERS */
static inline enum ps_counter ps_opener_refused(const struct ps_handler *h, const struct ps_listener *l,
						const uint8_t client[16])
{
	enum ps_counter refused = ps_limit_reached(h, l, client);

	if (refused == PS_COUNTERS && l->new_flows_per_second &&
	    !ps_rate_allows(&h->arena->listener_count[l->number & (PS_MAX_NUMBERS - 1)], l->new_flows_per_second,
			    h->now_ns))
		return PS_C_DROP_LIMIT_RATE;
	return refused;
}

/*
 * A port for the flow: of other SNAT addresses first, then of other backends (never with affinity). If none is free,
 * one that a flow has which has ended or is half open, of the first pair of address and backend. -> whether there is
 */
static inline bool ps_place(struct ps_handler *h, struct ps_shard *s, uint32_t bucket, const struct ps_listener *l,
			    const struct ps_key *k, const struct ps_opening *syn, struct ps_entry *value)
{
	enum { PAIRS = 32 }; /* that are tried: a flood must not make each opener dear */
	const struct ps_config *c = h->config;
	uint16_t family = ps_is_v6(k->destination) ? 6 : 4;
	uint32_t backend = ps_backend_choose(h, l, k), tried = 0;
	struct ps_entry *victim = NULL, first = *value;

	for (uint32_t try = 0; try < l->backends && try < 8 && tried < PAIRS; try++) {
		const struct ps_config_backend *b = &c->backend[backend];

		value->backend = b->id;
		for (uint32_t i = 0; i < c->snats && tried < PAIRS; i++) {
			const struct ps_config_snat *n = &c->snat[((k->hash >> 8) + i) % c->snats];
			bool none = !victim;

			if (n->family != family)
				continue;
			tried++;
			value->snat = n->id;
			value->snat_port = ps_port_find(h->arena, s, bucket, n->id, b->address, b->port, syn, h->list,
							h->kept, &victim);
			if (value->snat_port)
				return true;
			if (none && victim)
				first = *value;
		}
		if (l->flags & PS_LISTENER_CLIENT_IP)
			break;
		if (++backend == l->first_backend + l->backends)
			backend = l->first_backend;
	}
	if (!victim)
		return false;
	*value = first;
	value->snat_port = victim->snat_port;
	ps_flow_remove(h->arena, s, victim);
	h->counters[PS_C_FLOWS_RECYCLED]++;
	h->counters[PS_C_FLOWS_ENDED]++;
	return true;
}

/*
 * The place of a connection that was claimed from the keeper: its port is nobody else's until that one has forgotten it,
 * and its backend expects the client there. -> whether both still serve
 */
static PS_RARE bool ps_place_claimed(struct ps_handler *h, struct ps_shard *s, uint32_t bucket,
				     const struct ps_listener *l, const struct ps_connection *c, struct ps_entry *value)
{
	const struct ps_config *config = h->config;
	const struct ps_connection was = *c; /* the keeper may write it */
	struct ps_key k = { .sport = was.backend_port, .dport = was.snat_port, .udp = value->flags & PS_FLOW_UDP };
	uint32_t b = l->first_backend, end = l->first_backend + l->backends, n = 0;

	while (b < end &&
	       (config->backend[b].port != was.backend_port || memcmp(config->backend[b].address, was.backend, 16)))
		b++;
	while (n < config->snats && memcmp(config->snat[n].address, was.snat, 16))
		n++;
	memcpy(k.source, was.backend, 16);
	memcpy(k.destination, was.snat, 16);
	if (b == end || n == config->snats || (config->snat[n].family == 6) != !!(value->flags & PS_FLOW_V6) ||
	    !ps_port_is_of(h->arena, bucket, was.snat_port) || ps_find_reply(h->arena, s, &k))
		return false;
	value->backend = config->backend[b].id;
	value->snat = config->snat[n].id;
	value->snat_port = was.snat_port;
	return true;
}

/*
 * Makes the flow of an opener: backend, SNAT address and port. NULL with the reason in *refused, not yet counted.
 * `syn`: NULL for UDP.
 */
static inline struct ps_entry *ps_flow_open(struct ps_handler *h, struct ps_shard *s, uint32_t bucket,
					    const struct ps_key *k, const struct ps_listener *l,
					    const struct ps_opening *syn, enum ps_counter *refused)
{
	struct ps_entry value = { .hash = k->hash, .client_port = k->sport };
	uint32_t recycled = 0;
	struct ps_entry *room;

	*refused = !l		  ? PS_C_DROP_NO_LISTENER
		   : !l->backends ? PS_C_DROP_NO_BACKEND
		   : !ps_share_left(h->arena, s, l->number & (PS_CLASSES - 1), h->classes)
			   ? PS_C_DROP_SHARD_FULL
			   : ps_opener_refused(h, l, k->source);
	if (*refused != PS_COUNTERS)
		return NULL;
	memcpy(value.client, k->source, 16);
	value.listener = l->number;
	value.flags = (k->udp ? PS_FLOW_UDP : 0) | (ps_is_v6(k->destination) ? PS_FLOW_V6 : 0);
	value.state = k->udp ? PS_FLOW_UNANSWERED : PS_FLOW_SYN;
	if (!(h->claimed && ps_place_claimed(h, s, bucket, l, h->claimed, &value)) &&
	    !ps_place(h, s, bucket, l, k, syn, &value)) {
		*refused = PS_C_DROP_NO_PORT;
		return NULL;
	}
	room = ps_flow_room(h->arena, s, &recycled);
	h->counters[PS_C_FLOWS_RECYCLED] += recycled;
	h->counters[PS_C_FLOWS_ENDED] += recycled;
	if (!room) {
		*refused = PS_C_DROP_SHARD_FULL;
		return NULL;
	}
	ps_flow_insert(h->arena, s, room, &value, h->config->timeout, h->now);
	h->counters[PS_C_FLOWS_CREATED]++;
	return room;
}

#endif
