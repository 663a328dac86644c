/* SPDX-License-Identifier: Apache-2.0 */
/* Which SNAT ports a bucket has, and which of them a new flow gets. */
#ifndef PACKETSTACK_PORTS_H
#define PACKETSTACK_PORTS_H

#include "packetstack/connections.h"
#include "packetstack/shard.h"

/* ---- SNAT ports: the port names the bucket, port & (buckets - 1) == bucket ---------------------------- */

/* First usable multiple: ports below 1024 are left alone. */
static inline uint32_t ps_port_first(uint32_t buckets) { return buckets >= 1024 ? 1 : 1024 / buckets; }
static inline uint32_t ps_ports_per_bucket(uint32_t buckets) { return 65536 / buckets - ps_port_first(buckets); }

/* Is this port, in wire order, one that the bucket may use? */
static inline bool ps_port_is_of(const struct ps_arena *a, uint32_t bucket, uint16_t port)
{
	uint32_t number = __builtin_bswap16(port);

	return (number & (a->buckets - 1)) == bucket && number / a->buckets >= ps_port_first(a->buckets);
}

/* A SYN that looks for a port. */
struct ps_opening {
	uint32_t seq;
	uint32_t stamp; /* its timestamp */
	bool stamped;
};

/*
 * Will a backend that keeps this flow in TIME-WAIT take the SYN for a new connection (RFC 6191)? Then its timestamp, or
 * without timestamps its number, is beyond all that the old connection's client has sent.
 */
static inline bool ps_may_follow(const struct ps_entry *f, const struct ps_opening *syn)
{
	uint32_t last = (uint32_t)f->window[0] << 16 | f->window[1];

	if (f->flags & PS_FLOW_STAMPED && syn->stamped)
		return (int32_t)(syn->stamp - last) > 0;
	return (int32_t)(syn->seq - f->end[PS_CLIENT]) > 0;
}

/* Whose port may be taken, best first. 0: it may not. `flooded`: see ps_class_flooded */
static inline int ps_port_rank(const struct ps_entry *f, const struct ps_opening *syn, uint32_t flooded)
{
	if (f->state == PS_FLOW_CLOSED)
		return 4;
	if (ps_state_half_open(f->state))
		return ps_class(f) == flooded ? 3 : 2;
	return f->state == PS_FLOW_TIME_WAIT && syn && ps_may_follow(f, syn);
}

/*
 * A port that is free for (SNAT address, backend), taking up the search where the last one ended, so that a port
 * given back is used again last. -> port in wire order, 0 = none. Then *oldest, unless it is set already, is the flow
 * whose port may be taken: one that has ended, else one that is half open, of the listener that has most of these if it
 * can be, else one whose port the backend still keeps but will give to this SYN. Of several the one that was seen longest ago. `syn`: NULL for UDP.
 * `kept`: connections of the bucket that another set keeps, in `list`; their ports are not free. NULL: none are.
 */
static inline uint16_t ps_port_find(const struct ps_arena *a, struct ps_shard *s, uint32_t bucket, uint16_t snat,
				    const uint8_t *backend, uint16_t backend_port, const struct ps_opening *syn,
				    const struct ps_connection_list *list, struct ps_connections *kept,
				    struct ps_entry **oldest)
{
	uint32_t n = ps_ports_per_bucket(a->buckets), first = ps_port_first(a->buckets), flooded = PS_CLASSES;
	struct ps_key k = { .sport = backend_port, .udp = !syn };
	struct ps_entry *best = NULL;
	int best_rank = 0;

	memcpy(k.source, backend, 16);
	memcpy(k.destination, ps_address(a, snat), 16);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t at = (s->port_cursor + i) % n;
		uint32_t port = (first + at) * a->buckets + bucket;
		struct ps_entry *f;
		int rank;

		k.dport = __builtin_bswap16((uint16_t)port);
		f = ps_find_reply(a, s, &k);
		if (!f && kept && ps_connection_holds_port(list, kept, &k))
			continue;
		if (!f) {
			s->port_cursor = (uint16_t)((at + 1) % n);
			return k.dport;
		}
		if (*oldest)
			continue;
		if (flooded == PS_CLASSES)
			flooded = ps_class_flooded(a, s);
		rank = ps_port_rank(f, syn, flooded);
		if (rank > best_rank || (best && rank == best_rank && (int32_t)(f->last_seen - best->last_seen) < 0)) {
			best = f;
			best_rank = rank;
		}
	}
	if (!*oldest)
		*oldest = best;
	return 0;
}

#endif
