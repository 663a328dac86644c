/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an engine does with one packet: find or make its flow in the bucket's shard, follow the
 * connection's state, rewrite addresses and ports. No I/O; the caller owns the bucket.
 *
 * Everything written lies in the first PS_UNDO_BYTES of the frame, so that one undo copy covers it.
 */
#ifndef PACKETSTACK_NAT_H
#define PACKETSTACK_NAT_H

#include <arpa/inet.h>

#include "packetstack/checksum.h"
#include "packetstack/connections.h"
#include "packetstack/hash.h"
#include "packetstack/parse.h"
#include "packetstack/ports.h"
#include "packetstack/shard.h"
#include "track.h"

#ifdef PS_INJECT
#include <stdlib.h>
#define PS_POISON "poison!!" /* the first 8 bytes of a UDP payload that no process survives */
#endif

enum ps_verdict { PS_DROP = 0, PS_TRANSMIT = 1, PS_PARK = 2, PS_CONSUMED = 3 };

/* What few packets need stays out of ps_handle: inlined, it takes the registers of what all need. */
#define PS_RARE	      __attribute__((noinline))

#define PS_VERDICT(v) ((v)&15)
#define PS_SHIFT(v)   (((v) >> 4) * 4) /* how far the frame's start moved: VLAN tags are not sent on */

struct ps_handler { /* one per core */
	struct ps_arena *arena;
	const struct ps_config *config;
	const struct ps_engine *engine;
	uint64_t *counters; /* enum ps_counter */
	uint64_t now_ns;    /* CLOCK_MONOTONIC */
	uint32_t now;	    /* the same in ticks */
	uint32_t since;	    /* when `config` was taken, ticks */
	uint64_t classes;   /* of the configured listeners: bit per class */
	uint32_t turn[256]; /* round robin, per listener */
	/* Where traffic is mirrored; NULL: nowhere */
	const struct ps_connection_list *list;
	/* Of the packet at hand: what the previous owner keeps of its bucket, and a connection that was claimed from it */
	struct ps_connections *kept;
	const struct ps_connection *claimed;
};

static inline void ps_configure(struct ps_handler *h, const struct ps_config *c)
{
	h->config = c;
	h->since = h->now;
	h->classes = 0;
	for (uint32_t i = 0; i < c->listeners; i++)
		h->classes |= 1ull << (c->listener[i].number & (PS_CLASSES - 1));
}

static inline uint8_t ps_refuse(struct ps_handler *h, enum ps_counter reason)
{
	h->counters[reason]++;
	return PS_DROP;
}

/* ---- opening a flow ------------------------------------------------------------------------------- */

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
			/* With the flow that it would get: so weights count among the idle too. */
			uint64_t load = ((uint64_t)(live > 0 ? live + 1 : 1) << 16) / c->backend[at].weight;

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
 * is bounded by the shares of a shard. -> the reason to refuse, or PS_COUNTERS
 */
static inline enum ps_counter ps_limit_reached(const struct ps_handler *h, const struct ps_listener *l,
					       const uint8_t client[16])
{
	const struct ps_listener_count *count = &h->arena->listener_count[l->number & (PS_MAX_NUMBERS - 1)];

	if (l->max_flows && __atomic_load_n(&count->proven, __ATOMIC_RELAXED) >= (int64_t)l->max_flows)
		return PS_C_DROP_LIMIT_FLOWS;
	if (l->max_flows_per_client && ps_client_flows(h->arena, client, l->number) >= l->max_flows_per_client)
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

static inline bool ps_among(const struct ps_config *c, uint32_t first, uint32_t number, const struct ps_entry *f)
{
	for (uint32_t i = 0; i < number; i++)
		if (c->backend[first + i].id == f->backend)
			return true;
	return false;
}

/* Does the flow's backend get new flows of this listener? */
static inline bool ps_backend_serves(const struct ps_config *c, const struct ps_entry *f, const struct ps_listener *l)
{
	return l && ps_among(c, l->first_backend, l->backends, f);
}

static inline bool ps_backend_down(const struct ps_config *c, const struct ps_entry *f, const struct ps_listener *l)
{
	return l && ps_among(c, l->first_backend + l->backends, l->down, f);
}

/* May a new connection have the flow's backend and SNAT address? */
static inline bool ps_place_serves(const struct ps_config *c, const struct ps_entry *f, const struct ps_listener *l)
{
	if (!ps_backend_serves(c, f, l))
		return false;
	for (uint32_t i = 0; i < c->snats; i++)
		if (c->snat[i].id == f->snat)
			return true;
	return false;
}

/*
 * What a packet of the client finds out about its flow's backend, once a flow and configuration. A UDP flow has no end
 * that anybody would wait for: it leaves a backend that gets no new flows, if there is another. -> whether it is to end
 */
enum ps_leaving { PS_STAYS = 0, PS_LEAVES, PS_IS_RESET };

static PS_RARE enum ps_leaving ps_leaves_now(const struct ps_handler *h, const struct ps_entry *f)
{
	const struct ps_listener_name *state = ps_listener_of(h->arena, f);
	bool udp = f->flags & PS_FLOW_UDP;
	const struct ps_listener *l;

	l = ps_listener_find(h->config, state->address, state->port, udp ? 17 : 6);
	if (udp)
		return l && l->backends && !ps_backend_serves(h->config, f, l) ? PS_LEAVES : PS_STAYS;
	if (l && l->flags & PS_LISTENER_RESET_BACKEND_DOWN && ps_backend_down(h->config, f, l))
		return PS_IS_RESET;
	return PS_STAYS;
}

static inline enum ps_leaving ps_flow_leaves(const struct ps_handler *h, const struct ps_entry *f)
{
	return __builtin_expect((int32_t)(f->last_seen - h->since) > 0, 1) ? PS_STAYS : ps_leaves_now(h, f);
}

/*
 * The client asks again for a connection that its backend has answered. It has not got the answer, and gets none any more
 * from one that is down. From one that was only taken out it may, unless this is the SYN that was answered: another may be
 * made up. -> whether to begin anew, elsewhere
 */
static inline bool ps_asks_anew(const struct ps_handler *h, const struct ps_entry *f, const uint8_t *frame,
				const struct ps_packet *p, const struct ps_listener *l)
{
	struct ps_segment g;

	if (ps_backend_serves(h->config, f, l) || !ps_segment_intact(frame, p))
		return false;
	ps_segment_read(&g, frame, p, p->tcp_flags);
	return ps_backend_down(h->config, f, l) || ps_answers(g.seq + 1, f->end[PS_CLIENT]);
}

/* A SYN of a flow that is half open or has ended. -> whether another backend or SNAT address is to be found for it */
static PS_RARE bool ps_begins_anew(const struct ps_handler *h, const struct ps_entry *f, const uint8_t *frame,
				   const struct ps_packet *p, const struct ps_key *k)
{
	const struct ps_listener *l = ps_listener_find(h->config, k->destination, k->dport, 6);

	return f->state == PS_FLOW_SYN_ACK ? ps_asks_anew(h, f, frame, p, l) : !ps_place_serves(h->config, f, l);
}

/* ---- connection state ------------------------------------------------------------------------------ */

static inline void ps_seen(const struct ps_handler *h, struct ps_entry *f)
{
	if (f->last_seen != h->now)
		f->last_seen = h->now;
}

/*
 * The flow is about to be proven, or again after a reset that was none, which no limit keeps it from. -> the reason why
 * it may not, or PS_COUNTERS
 */
static inline enum ps_counter ps_prove(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f, bool again)
{
	const struct ps_listener_name *state = ps_listener_of(h->arena, f);
	const struct ps_listener *l =
		ps_listener_find(h->config, state->address, state->port, f->flags & PS_FLOW_UDP ? 17 : 6);
	enum ps_counter refused = PS_COUNTERS;

	if (f->flags & PS_FLOW_PROVEN)
		return PS_COUNTERS;
	if (l && !again)
		refused = ps_limit_reached(h, l, f->client);
	/* From now on it cannot be evicted: what is kept for other listeners is not for it. */
	if (refused == PS_COUNTERS && !again && !ps_share_left(h->arena, s, ps_class(f), h->classes))
		refused = PS_C_DROP_SHARD_FULL;
	if (refused == PS_COUNTERS)
		ps_proven_add(h->arena, f, l && l->max_flows_per_client);
	return refused;
}

/*
 * UDP: assured after questions and answers in turns, over some time. Who asks with a forged source gets no answer that
 * he could go on from, but may ask again; so until then the flow may be recycled, the longest unused first.
 * Of the fields for numbers: end[0] is the tick of the first answer, window[0] counts questions after an answer,
 * window[1] is 1 when an answer came last.
 */
static inline void ps_track_udp(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f, bool reply)
{
	ps_seen(h, f);
	if (f->state == PS_FLOW_ASSURED)
		return;
	if (!reply) {
		if (!f->window[1])
			return;
		f->window[1] = 0;
		f->window[0]++;
		ps_flow_renew(h->arena, s, f);
		return;
	}
	f->window[1] = 1;
	if (f->state == PS_FLOW_UNANSWERED) {
		f->end[0] = h->now;
		ps_flow_set_state(h->arena, s, f, PS_FLOW_ANSWERED, h->config->timeout, h->now);
	} else if (f->window[0] >= PS_UDP_EXCHANGES && h->now - f->end[0] >= PS_UDP_ASSURED_TICKS &&
		   ps_prove(h, s, f, false) == PS_COUNTERS) {
		ps_flow_set_state(h->arena, s, f, PS_FLOW_ASSURED, h->config->timeout, h->now);
	}
}

/*
 * A segment that is not of this connection, as far as is known. If both ends send such, they have another one, whose SYN
 * was not believed because they ended this one unseen: it must not idle out while they talk. -> do they?
 */
static inline bool ps_astray(const struct ps_handler *h, struct ps_entry *f, bool reply)
{
	bool both = reply && f->flags & PS_FLOW_ASTRAY;

	if (!reply) {
		f->flags |= PS_FLOW_ASTRAY;
	} else if (both) {
		f->flags &= (uint16_t)~PS_FLOW_ASTRAY;
		ps_seen(h, f);
	}
	return both;
}

/* A segment of a flow that opens, ends, or is not as most are. -> false when it is dropped, its reason counted */
static PS_RARE bool ps_track_rare(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f, const uint8_t *frame,
				  const struct ps_packet *p, bool reply)
{
	int side = reply ? PS_BACKEND : PS_CLIENT;
	uint8_t state = f->state;
	enum ps_counter refused;
	struct ps_segment g;
	bool moved = false;

	ps_segment_read(&g, frame, p, p->tcp_flags);
	if (state == PS_FLOW_SYN || state == PS_FLOW_SYN_ACK) {
		state = ps_track_opening(f, &g, side, frame, p, &moved);
		if (state == PS_FLOW_ESTABLISHED) {
			refused = ps_prove(h, s, f, false);
			if (refused != PS_COUNTERS) { /* it stays half open, and goes first */
				h->counters[refused]++;
				return false;
			}
			ps_track_confirm(f, &g);
			ps_flow_set_state(h->arena, s, f, state, h->config->timeout, h->now);
		}
	}
	if (__builtin_expect(state == PS_FLOW_ESTABLISHED && !(g.flags & (TCP_SYN | TCP_FIN | TCP_RST)) &&
				     !(f->flags & (PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND)),
			     1)) {
		if (__builtin_expect(ps_believed(f, &g, side), 1)) {
			ps_track_move(f, &g, side);
			ps_seen(h, f);
		} else {
			ps_astray(h, f, reply);
		}
		return true;
	}
	if (state != PS_FLOW_SYN && state != PS_FLOW_SYN_ACK && f->state == state)
		state = ps_track_control(f, &g, side, frame, p, &moved);
	if (moved)
		ps_seen(h, f);
	else if (g.flags & (TCP_SYN | TCP_FIN | TCP_RST) || f->state == PS_FLOW_SYN_ACK)
		h->counters[PS_C_UNPROVEN]++;
	if (!moved && (state == PS_FLOW_ESTABLISHED || (state == PS_FLOW_CLOSING && f->flags & PS_FLOW_FORGOTTEN)) &&
	    ps_astray(h, f, reply))
		state = PS_FLOW_ESTABLISHED;
	if (state == PS_FLOW_TIME_WAIT && f->state != state) {
		struct ps_options o = ps_segment_options(frame, p);

		ps_track_wait(f, side, &o);
	}
	if (ps_state_ended(f->state) && state == PS_FLOW_SYN_ACK) {
		ps_created_add(h->arena, f);
		h->counters[PS_C_FLOWS_ENDED]++;
		h->counters[PS_C_FLOWS_CREATED]++;
	} else if (ps_state_ended(f->state) && !ps_state_ended(state)) {
		ps_prove(h, s, f, true);
	}
	ps_flow_set_state(h->arena, s, f, state, h->config->timeout, h->now);
	return true;
}

/* -> false when the segment is dropped, its reason counted */
static inline bool ps_track_tcp(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f, const uint8_t *frame,
				const struct ps_packet *p, bool reply)
{
	if (__builtin_expect(f->state != PS_FLOW_ESTABLISHED ||
				     (p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) != TCP_ACK,
			     0))
		return ps_track_rare(h, s, f, frame, p, reply);
#ifndef PS_WITHOUT_TRACKING /* bench/tracking.c: what this costs */
	if (__builtin_expect(
		    !(reply ? ps_track_usual(f, frame, p, PS_BACKEND) : ps_track_usual(f, frame, p, PS_CLIENT)), 0))
		return ps_track_rare(h, s, f, frame, p, reply);
#endif
	ps_seen(h, f);
	return true;
}

/* -> false when the packet is dropped, its reason counted */
static inline bool ps_follow(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f, const uint8_t *frame,
			     const struct ps_packet *p, bool udp, bool reply)
{
	if (!udp && __builtin_expect(p->kind != PS_PKT_FRAGMENT, 1))
		return ps_track_tcp(h, s, f, frame, p, reply);
	if (udp)
		ps_track_udp(h, s, f, reply);
	else
		f->flags |= PS_FLOW_FRAGMENTED;
	return true;
}

/* What others than its client send must not hide that a flow is to leave its backend: see ps_flow_leaves. */
static PS_RARE bool ps_follow_leaving(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f,
				      const uint8_t *frame, const struct ps_packet *p, bool udp, bool reply)
{
	uint32_t seen = f->last_seen;
	uint8_t state = f->state;
	bool passes = ps_follow(h, s, f, frame, p, udp, reply);

	if (f->state == state)
		f->last_seen = seen;
	return passes;
}

/*
 * Does the client itself ask for a connection that is to be reset? Its answer is a reset that the client must believe, and
 * the flow is over then: somebody else must not bring that about. A reset of the client's own is followed as always.
 */
static PS_RARE bool ps_asks_itself(const struct ps_entry *f, const uint8_t *frame, const struct ps_packet *p)
{
	struct ps_entry value = *f;
	struct ps_segment g;

	if (p->kind != PS_PKT_FLOW || p->tcp_flags & TCP_RST || !ps_segment_intact(frame, p))
		return false;
	ps_segment_read(&g, frame, p, p->tcp_flags);
	if (f->state == PS_FLOW_SYN_ACK)
		return g.flags & TCP_ACK && ps_confirms(f, &g);
	return (f->state == PS_FLOW_ESTABLISHED || f->state == PS_FLOW_CLOSING) && ps_believed(&value, &g, PS_CLIENT);
}

/* ---- rewriting ------------------------------------------------------------------------------------- */

static inline void ps_ethernet(const struct ps_engine *e, uint8_t *frame, uint32_t l3, uint8_t family)
{
	uint8_t *at = frame + l3 - 14;

	memcpy(at, e->gateway_mac, 6);
	memcpy(at + 6, e->mac, 6);
	at[12] = family == 4 ? 0x08 : 0x86;
	at[13] = family == 4 ? 0x00 : 0xdd;
}

/* Sets addresses of the IP header at `ip`; -> difference for checksums over the pseudo header. */
static inline uint64_t ps_set_addresses(uint8_t *ip, uint8_t family, const uint8_t *source, const uint8_t *destination)
{
	uint64_t d;

	if (family == 4) {
		uint32_t was[2], is[2];

		memcpy(was, ip + 12, 8);
		memcpy(&is[0], source + 12, 4);
		memcpy(&is[1], destination + 12, 4);
		memcpy(ip + 12, is, 8);
		return (uint64_t)(uint32_t)~was[0] + (uint32_t)~was[1] + is[0] + is[1];
	}
	d = ps_replace(ip + 8, source, 16);
	return d + ps_replace(ip + 24, destination, 16);
}

/* MSS option of a SYN down to what fits into `mtu`. -> difference for the TCP checksum. */
static inline uint64_t ps_clamp_mss(struct ps_handler *h, uint8_t *tcp, uint32_t length, uint8_t family)
{
	uint32_t mtu = h->config->mtu, end = (tcp[12] >> 4) * 4u;
	uint32_t most = mtu - (family == 4 ? 40 : 60);

	if (!mtu || end > length)
		return 0;
	for (uint32_t at = ps_option(tcp, end, 20); at; at = ps_option(tcp, end, at + tcp[at + 1])) {
		if (tcp[at] == 2 && tcp[at + 1] == 4) {
			uint32_t mss = (uint32_t)tcp[at + 2] << 8 | tcp[at + 3];
			uint8_t word[2] = { (uint8_t)(most >> 8), (uint8_t)most };

			if (mss <= most)
				return 0;
			h->counters[PS_C_MSS_CLAMPED]++;
			if (!(at & 1))
				return ps_replace(tcp + at + 2, word, 2);
			/* At an odd offset each byte counts in the other half of its 16-bit word. */
			{
				uint8_t four[4];

				memcpy(four, tcp + at + 1, 4);
				four[1] = word[0];
				four[2] = word[1];
				return ps_replace(tcp + at + 1, four, 4);
			}
		}
	}
	return 0;
}

static inline uint8_t ps_rewrite(struct ps_handler *h, const struct ps_entry *f, uint8_t *frame,
				 const struct ps_packet *p, bool reply)
{
	const struct ps_arena *a = h->arena;
	const struct ps_listener_name *listener = ps_listener_of(a, f);
	const struct ps_backend *backend = ps_backend_of(a, f);
	const uint8_t *source = reply ? listener->address : ps_address(a, f->snat);
	const uint8_t *destination = reply ? f->client : backend->address;
	uint8_t *ip = frame + p->l3, *l4 = frame + p->l4;
	uint64_t d;

	d = ps_set_addresses(ip, p->family, source, destination);
	PS_POINT(REWRITE_ADDRESSES);
#ifdef PS_INJECT
	if (p->kind != PS_PKT_FRAGMENT && p->l4 + 28u <= p->end && !memcmp(frame + p->l4 + 8, PS_POISON, 8))
		abort();
#endif
	if (p->family == 4) {
		uint64_t header = d;
		uint8_t word[2] = { (uint8_t)(ip[8] - 1), ip[9] };

		header += ps_replace(ip + 8, word, 2);
		if ((ip[6] & 0x3f) | ip[7]) {
			/* Two clients behind one SNAT address, or two backends behind one virtual address, must not
			 * share an id: all fragments of a flow get the same change. */
			uint16_t id, mix = (uint16_t)(f->hash ^ f->hash >> 16);

			memcpy(&id, ip + 4, 2);
			id ^= mix;
			header += ps_replace(ip + 4, &id, 2);
		}
		ps_checksum_apply(ip + 10, header);
	} else {
		ip[7]--;
	}
	if (p->kind != PS_PKT_FRAGMENT) {
		uint16_t ports[2] = { reply ? listener->port : f->snat_port, reply ? f->client_port : backend->port };

		d += ps_replace(l4, ports, 4);
		PS_POINT(REWRITE_PORTS);
		if (p->protocol == 6) {
			if (p->tcp_flags & TCP_SYN)
				d += ps_clamp_mss(h, l4, p->end - p->l4, p->family);
			ps_checksum_apply(l4 + 16, d);
		} else {
			ps_checksum_apply_udp(l4 + 6, d);
		}
	}
	PS_POINT(REWRITE_CHECKSUMS);
	ps_ethernet(h->engine, frame, p->l3, p->family);
	h->counters[PS_C_FORWARDED]++;
	h->counters[PS_C_FORWARDED_BYTES] += p->end - p->l3 + 14u;
	return (uint8_t)(PS_TRANSMIT | (p->l3 - 14) / 4 << 4);
}

/*
 * An ICMP error about one of our flows. Towards the backend when its embedded packet is what we sent
 * to the client, towards the client when it is what we sent to the backend. The embedded header is
 * translated to what its sender knows.
 */
static PS_RARE uint8_t ps_translate_icmp(struct ps_handler *h, const struct ps_entry *f, uint8_t *frame,
					 const struct ps_packet *p, bool reply)
{
	const struct ps_listener_name *listener = ps_listener_of(h->arena, f);
	const struct ps_backend *backend = ps_backend_of(h->arena, f);
	const uint8_t *vip = listener->address, *snat = ps_address(h->arena, f->snat);
	uint8_t *ip = frame + p->l3, *icmp = frame + p->l4, *inner = frame + p->inner_l3, *l4 = frame + p->inner_l4;
	uint32_t check = p->protocol == 6 ? 16 : 6;
	uint16_t ports[2];
	uint64_t outer, addresses, inside, changed;

	outer = ps_set_addresses(ip, p->family, reply ? vip : snat, reply ? f->client : backend->address);
	addresses = reply ? ps_set_addresses(inner, p->family, f->client, vip)
			  : ps_set_addresses(inner, p->family, backend->address, snat);
	changed = addresses;
	if (p->family == 4)
		changed += ps_checksum_apply(inner + 10, addresses);
	ports[0] = reply ? f->client_port : backend->port;
	ports[1] = reply ? listener->port : f->snat_port;
	inside = ps_replace(l4, ports, 4);
	changed += inside;
	if (p->inner_l4 + check + 2u <= p->end && p->inner_l4 + check + 2u <= PS_UNDO_BYTES)
		changed += p->protocol == 6 ? ps_checksum_apply(l4 + check, addresses + inside)
					    : ps_checksum_apply_udp(l4 + check, addresses + inside);
	if (p->family == 4) {
		uint8_t word[2] = { (uint8_t)(ip[8] - 1), ip[9] };

		ps_checksum_apply(ip + 10, outer + ps_replace(ip + 8, word, 2));
		ps_checksum_apply(icmp + 2, changed);
	} else {
		ip[7]--;
		ps_checksum_apply(icmp + 2, changed + outer);
	}
	ps_ethernet(h->engine, frame, p->l3, p->family);
	h->counters[PS_C_ICMP_TRANSLATED]++;
	h->counters[PS_C_FORWARDED]++;
	h->counters[PS_C_FORWARDED_BYTES] += p->end - p->l3 + 14u;
	return (uint8_t)(PS_TRANSMIT | (p->l3 - 14) / 4 << 4);
}

/* Answers a TCP segment by a reset (RFC 9293, 3.10.7.1), in place. -> verdict */
static inline uint8_t ps_reset(struct ps_handler *h, uint8_t *frame, const struct ps_packet *p)
{
	uint8_t *ip = frame + p->l3, *tcp = frame + p->l4;
	uint32_t header = p->l4 - p->l3, sequence, acknowledged, payload = p->end - p->l4 - (tcp[12] >> 4) * 4u;
	uint16_t ports[2], zero = 0, length, check;
	uint64_t sum;

	if (p->tcp_flags & TCP_RST || (p->family == 6 && header != 40) || p->l4 + 20u > PS_UNDO_BYTES)
		return PS_DROP;
	memcpy(ports, tcp, 4);
	memcpy(&sequence, tcp + 4, 4);
	memcpy(&acknowledged, tcp + 8, 4);
	sequence = htonl(ntohl(sequence) + payload + !!(p->tcp_flags & TCP_SYN) + !!(p->tcp_flags & TCP_FIN));
	memset(tcp, 0, 20);
	memcpy(tcp, &ports[1], 2);
	memcpy(tcp + 2, &ports[0], 2);
	if (p->tcp_flags & TCP_ACK)
		memcpy(tcp + 4, &acknowledged, 4);
	else
		memcpy(tcp + 8, &sequence, 4);
	tcp[12] = 5 << 4;
	tcp[13] = p->tcp_flags & TCP_ACK ? TCP_RST : TCP_RST | TCP_ACK;
	ps_set_addresses(ip, p->family, (const uint8_t *)p->dst, (const uint8_t *)p->src);
	sum = ps_sum(tcp, 20, (uint64_t)htons(20) + htons(6));
	if (p->family == 4) {
		length = htons((uint16_t)(header + 20));
		memcpy(ip + 2, &length, 2);
		memset(ip + 4, 0, 4);
		ip[8] = 64;
		memcpy(ip + 10, &zero, 2);
		check = (uint16_t)~ps_fold(ps_sum(ip, header, 0));
		memcpy(ip + 10, &check, 2);
		sum = ps_sum(ip + 12, 8, sum);
	} else {
		length = htons(20);
		memcpy(ip + 4, &length, 2);
		ip[7] = 64;
		sum = ps_sum(ip + 8, 32, sum);
	}
	check = (uint16_t)~ps_fold(sum);
	memcpy(tcp + 16, &check, 2);
	ps_ethernet(h->engine, frame, p->l3, p->family);
	h->counters[PS_C_RESETS_SENT]++;
	h->counters[PS_C_FORWARDED]++;
	h->counters[PS_C_FORWARDED_BYTES] += header + 20u + 14u;
	return (uint8_t)(PS_TRANSMIT | (p->l3 - 14) / 4 << 4);
}

/* A packet without a flow that begins none, or may begin none: answered if the resource says so, or dropped. */
static PS_RARE uint8_t ps_turn_away(struct ps_handler *h, uint8_t *frame, const struct ps_packet *p, bool answer,
				    enum ps_counter reason)
{
	if (answer && p->kind == PS_PKT_FLOW && p->protocol == 6) {
		uint8_t verdict = ps_reset(h, frame, p);

		if (PS_VERDICT(verdict) == PS_TRANSMIT)
			return verdict;
	}
	return ps_refuse(h, reason);
}

/*
 * An opener: makes its flow, or begins a new connection in `f`, one that has ended between the same two. -> the flow, or
 * NULL with the verdict
 */
static PS_RARE struct ps_entry *ps_begin(struct ps_handler *h, struct ps_shard *s, uint32_t bucket, uint8_t *frame,
					 const struct ps_packet *p, const struct ps_key *k, struct ps_entry *f,
					 uint8_t *verdict)
{
	struct ps_options o = { .scale = PS_NO_SCALE };
	struct ps_opening syn = { 0 };
	struct ps_segment g = { 0 };
	const struct ps_listener *l;
	enum ps_counter refused;

	if (!k->udp) {
		if (!ps_segment_intact(frame, p)) {
			*verdict = ps_refuse(h, PS_C_DROP_BAD_CHECKSUM);
			return NULL;
		}
		ps_segment_read(&g, frame, p, p->tcp_flags);
		o = ps_segment_options(frame, p);
		syn = (struct ps_opening){ .seq = g.seq, .stamp = o.stamp, .stamped = o.stamped };
	}
	l = ps_listener_find(h->config, k->destination, k->dport, k->udp ? 17 : 6);
	if (f) {
		refused = ps_opener_refused(h, l, k->source);
		if (refused != PS_COUNTERS) {
			*verdict = ps_refuse(h, refused);
			return NULL;
		}
		ps_flow_set_state(h->arena, s, f, PS_FLOW_SYN, h->config->timeout, h->now);
		ps_created_add(h->arena, f);
		h->counters[PS_C_FLOWS_ENDED]++;
		h->counters[PS_C_FLOWS_CREATED]++;
	} else {
		f = ps_flow_open(h, s, bucket, k, l, k->udp ? NULL : &syn, &refused);
		if (!f) {
			*verdict = ps_turn_away(
				h, frame, p, refused == PS_C_DROP_NO_BACKEND && l->flags & PS_LISTENER_REFUSE, refused);
			return NULL;
		}
	}
	if (!k->udp)
		ps_track_open(f, &g, o.scale);
	ps_seen(h, f);
	return f;
}

/* ---- two sets ---------------------------------------------------------------------------------------- */

/* Whose copy of a packet is this? */
enum ps_side_of_mirror {
	PS_ALONE, /* there is one copy, or no list to go by yet */
	PS_NEWCOMER,
	PS_KEEPER
};

static PS_RARE enum ps_side_of_mirror ps_mirrored(struct ps_handler *h, struct ps_shard *s,
						  const struct ps_stamp *stamp)
{
	bool newcomer = stamp->flags >> PS_STAMP_SLOT == h->engine->slot;

	h->counters[PS_C_MIRRORED]++;
	h->claimed = NULL;
	h->kept = h->list ? ps_connections_of(h->list, stamp->bucket) : NULL;
	if (h->kept && !__atomic_load_n(&h->kept->published, __ATOMIC_ACQUIRE))
		h->kept = NULL;
	if (newcomer && h->kept && !s->port_cursor) /* not with ports that backends keep in TIME-WAIT */
		s->port_cursor = h->kept->port_cursor;
	return !newcomer ? PS_KEEPER : h->kept ? PS_NEWCOMER : PS_ALONE;
}

/* The number of a TCP segment, host order. */
static inline uint32_t ps_sequence(const uint8_t *frame, const struct ps_packet *p)
{
	uint32_t number;

	memcpy(&number, frame + p->l4 + 4, 4);
	return ntohl(number);
}

/*
 * The owner's copy, of a packet without a flow: is it the previous owner's? An opener of a connection that is ending is
 * claimed, but for one that has opened that very connection: this copy of it is late. -> PS_COUNTERS, or why it is rejected
 */
static PS_RARE enum ps_counter ps_rejected_by_newcomer(struct ps_handler *h, const uint8_t *frame,
						       const struct ps_packet *p, const struct ps_key *k, bool reply,
						       bool opener)
{
	struct ps_connection *c = ps_connection_find(h->list, h->kept, k, reply);
	uint8_t state = c ? ps_connection_state(c) : PS_CONNECTION_NONE;

	for (;;) {
		switch (state & PS_CONNECTION_STATE) {
		case PS_CONNECTION_LIVE:
			if (opener && !(state & PS_CONNECTION_ASKED)) {
				if (!ps_connection_change(c, &state, state | PS_CONNECTION_ASKED))
					continue;
				PS_POINT(ASKED);
			}
			return PS_C_REJECTED_KEPT;
		case PS_CONNECTION_CLOSING:
			if (!opener)
				return PS_C_REJECTED_CLOSING;
			if (!k->udp && c->flags & PS_CONNECTION_SYN && c->syn == ps_sequence(frame, p)) {
				/* If it comes again it is the keeper's again. */
				if (!(state & PS_CONNECTION_ASKED) &&
				    !ps_connection_change(c, &state, state | PS_CONNECTION_ASKED))
					continue;
				return PS_C_REJECTED_CLOSING;
			}
			if (!ps_connection_change(c, &state, PS_CONNECTION_CLAIMED))
				continue;
			PS_POINT(CLAIMED);
			h->claimed = c;
			return PS_COUNTERS;
		default: /* never the keeper's, no more, or claimed before */ return PS_COUNTERS;
		}
	}
}

static inline struct ps_connection *ps_connection_of_flow(const struct ps_handler *h, struct ps_shard *s,
							  const struct ps_entry *f)
{
	uint32_t i = (uint32_t)(f - ps_shard_flows(h->arena, s));

	return h->kept && i < h->list->entries ? ps_connection_at(h->list, h->kept, i) : NULL;
}

static inline void ps_forget_kept(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f)
{
	struct ps_connection *c = ps_connection_of_flow(h, s, f);

	ps_flow_remove(h->arena, s, f);
	h->counters[PS_C_FLOWS_ENDED]++;
	PS_POINT(KEPT_REMOVED);
	if (c)
		ps_connection_gone(c);
}

/* The previous owner's copy: does it keep this connection still? -> PS_COUNTERS, or why the packet is rejected */
static PS_RARE enum ps_counter ps_rejected_by_keeper(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f,
						     const uint8_t *frame, const struct ps_packet *p, bool syn)
{
	struct ps_connection *c = f ? ps_connection_of_flow(h, s, f) : NULL;
	uint8_t state;

	if (!c)
		return PS_C_REJECTED_NOT_KEPT;
	state = ps_connection_state(c);
	for (;;) {
		switch (state & PS_CONNECTION_STATE) {
		case PS_CONNECTION_LIVE:
			if (syn) {
				c->syn = ps_sequence(frame, p);
				c->flags |= PS_CONNECTION_SYN;
			}
			return PS_COUNTERS;
		case PS_CONNECTION_CLOSING:
			/* A new connection of the two is the newcomer's, unless that one has left it to us. */
			if (syn && !(state & PS_CONNECTION_ASKED))
				return PS_C_REJECTED_CLAIMED;
			if (!ps_connection_change(
				    c, &state, (uint8_t)(PS_CONNECTION_LIVE | (syn ? 0 : state & PS_CONNECTION_ASKED))))
				continue;
			PS_POINT(KEPT_REVIVED);
			state = PS_CONNECTION_LIVE;
			continue;
		default: ps_forget_kept(h, s, f); return PS_C_REJECTED_CLAIMED;
		}
	}
}

/* After the keeper has handled a packet of a flow. */
static PS_RARE void ps_kept_handled(struct ps_handler *h, struct ps_shard *s, const struct ps_entry *f)
{
	struct ps_connection *c = ps_connection_of_flow(h, s, f);
	uint8_t state;

	if (!c || !ps_state_ended(f->state))
		return;
	PS_POINT(KEPT_ENDED);
	c->since = (uint16_t)h->now;
	state = ps_connection_state(c);
	while ((state & PS_CONNECTION_STATE) == PS_CONNECTION_LIVE &&
	       !ps_connection_change(c, &state, (uint8_t)(PS_CONNECTION_CLOSING | (state & PS_CONNECTION_ASKED))))
		;
}

/* The keeper has no more time: the sender is told, and the flow goes when both ends have been. -> verdict */
static PS_RARE uint8_t ps_end_kept(struct ps_handler *h, struct ps_shard *s, struct ps_entry *f, uint8_t *frame,
				   const struct ps_packet *p, bool reply)
{
	enum { BOTH = PS_CONNECTION_RESET_CLIENT | PS_CONNECTION_RESET_BACKEND };
	struct ps_connection *c = ps_connection_of_flow(h, s, f);
	bool tcp = !(f->flags & PS_FLOW_UDP);
	uint8_t verdict = ps_turn_away(h, frame, p, tcp, PS_C_DROP_DEADLINE);

	if (c && PS_VERDICT(verdict) == PS_TRANSMIT)
		c->flags |= reply ? PS_CONNECTION_RESET_BACKEND : PS_CONNECTION_RESET_CLIENT;
	if (!c || !tcp || (c->flags & BOTH) == BOTH || p->tcp_flags & TCP_RST)
		ps_forget_kept(h, s, f);
	return verdict;
}

/* ---- one packet ------------------------------------------------------------------------------------ */

/*
 * frame: `length` bytes, writable; at least PS_UNDO_BYTES may be touched behind it if it is shorter.
 * -> verdict | shift/4 << 4. The caller owns stamp->bucket. Every drop is counted with its reason.
 */
static inline uint8_t ps_handle(struct ps_handler *h, uint8_t *frame, uint32_t length, const struct ps_stamp *stamp)
{
	struct ps_shard *s = ps_shard_at(h->arena, stamp->bucket);
	bool reply = stamp->flags & PS_STAMP_REPLY, opener, fresh, leaves = false;
	enum ps_side_of_mirror side = PS_ALONE;
	struct ps_packet p = { 0 };
	struct ps_entry *f;
	struct ps_key k;
	uint32_t touched;
	uint8_t verdict = PS_TRANSMIT;

	if (ps_parse(frame, frame + length, &p) == PS_PKT_MALFORMED)
		return ps_refuse(h, PS_C_DROP_MALFORMED);
	if (p.kind != PS_PKT_FLOW && p.kind != PS_PKT_FRAGMENT && p.kind != PS_PKT_ICMP_ERROR)
		return ps_refuse(h, PS_C_DROP_UNSUPPORTED);
	if (frame[p.l3 + (p.family == 4 ? 8 : 7)] <= 1)
		return ps_refuse(h, PS_C_DROP_TTL);
	touched = p.kind == PS_PKT_ICMP_ERROR ? p.inner_l4 + 8u
		  : p.kind == PS_PKT_FRAGMENT ? p.l3 + 40u
		  : p.protocol == 17	      ? p.l4 + 8u
					      : p.l4 + (p.tcp_flags & TCP_SYN ? (frame[p.l4 + 12] >> 4) * 4u : 20u);
	if (touched > PS_UNDO_BYTES)
		return ps_refuse(h, PS_C_DROP_UNSUPPORTED);

	s->packets++;
	k.udp = p.protocol == 17 || stamp->flags & PS_STAMP_UDP;
	k.hash = stamp->hash;
	if (p.kind == PS_PKT_ICMP_ERROR) {
		/* Embedded is what we sent, so its destination is the peer of the flow on that side. */
		memcpy(k.source, p.dst, 16);
		memcpy(k.destination, p.src, 16);
		k.sport = p.dport;
		k.dport = p.sport;
	} else {
		memcpy(k.source, p.src, 16);
		memcpy(k.destination, p.dst, 16);
		k.sport = p.sport;
		k.dport = p.dport;
	}
	if (p.kind == PS_PKT_FRAGMENT) {
		k.sport = htons((uint16_t)(stamp->hash >> 16));
		k.dport = htons((uint16_t)stamp->hash);
	}
	if (p.kind == PS_PKT_FRAGMENT || (!k.hash && !reply)) {
		const struct ps_config *c = h->config;
		uint64_t hash =
			p.family == 4 ? ps_hash4(c->key0, c->key1, p.src[3], p.dst[3], k.sport, k.dport, k.udp ? 17 : 6)
				      : ps_hash6(c->key0, c->key1, p.src, p.dst, k.sport, k.dport, k.udp ? 17 : 6);
		k.hash = (uint32_t)(hash >> 32);
	}

	f = reply ? ps_find_reply(h->arena, s, &k) : ps_find_forward(h->arena, s, &k);
	opener = p.kind == PS_PKT_FLOW && !reply &&
		 (k.udp || (p.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN);
	if (__builtin_expect(stamp->flags & PS_STAMP_MIRROR, 0)) {
		enum ps_counter rejected = PS_COUNTERS;

		side = ps_mirrored(h, s, stamp);
		if (side == PS_KEEPER)
			rejected = ps_rejected_by_keeper(h, s, f, frame, &p, opener && !k.udp);
		else if (side == PS_NEWCOMER && !f)
			rejected = ps_rejected_by_newcomer(h, frame, &p, &k, reply, opener);
		if (rejected != PS_COUNTERS) {
			s->packets--; /* the other set's */
			h->counters[PS_C_COPIED_BYTES] += length;
			return ps_refuse(h, rejected);
		}
		if (side == PS_KEEPER && h->config->kept_reset && p.kind == PS_PKT_FLOW)
			return ps_end_kept(h, s, f, frame, &p, reply);
	}
	if (__builtin_expect(p.kind == PS_PKT_ICMP_ERROR, 0))
		return f ? ps_translate_icmp(h, f, frame, &p, reply) : ps_refuse(h, PS_C_DROP_NO_FLOW);
	fresh = opener && !f;
	if (f && !reply) {
		enum ps_leaving leaving = ps_flow_leaves(h, f);
		bool again = opener && !k.udp && (ps_state_ended(f->state) || ps_state_half_open(f->state));

		if (leaving == PS_IS_RESET && !opener && !ps_asks_itself(f, frame, &p)) {
			leaving = PS_STAYS;
			leaves = true;
		}
		if (leaving || (again && ps_begins_anew(h, f, frame, &p, &k))) {
			if (side == PS_KEEPER) { /* what comes next is the newcomer's */
				ps_forget_kept(h, s, f);
				return leaving == PS_IS_RESET && !opener
					       ? ps_turn_away(h, frame, &p, true, PS_C_DROP_NO_BACKEND)
					       : ps_refuse(h, PS_C_DROP_NO_BACKEND);
			}
			ps_flow_remove(h->arena, s, f);
			h->counters[PS_C_FLOWS_ENDED]++;
			f = NULL;
			if (leaving == PS_IS_RESET && !opener)
				return ps_turn_away(h, frame, &p, true, PS_C_DROP_NO_BACKEND);
		}
		/* The client's port is used again: same backend, SNAT address and port, if both still serve. */
		fresh = opener && (!f || (again && ps_state_ended(f->state)));
	}
	if (__builtin_expect(fresh, 0)) {
		if (side == PS_ALONE) {
			h->kept = NULL;
			h->claimed = NULL;
		}
		f = ps_begin(h, s, stamp->bucket, frame, &p, &k, f, &verdict);
		if (!f)
			return verdict;
	} else if (__builtin_expect(!f, 0)) {
		return ps_turn_away(h, frame, &p, h->config->unknown_flow_reset && !reply, PS_C_DROP_NO_FLOW);
	} else {
		leaves = leaves || (reply && ps_flow_leaves(h, f) != PS_STAYS);
		if (__builtin_expect(leaves, 0) ? !ps_follow_leaving(h, s, f, frame, &p, k.udp, reply)
						: !ps_follow(h, s, f, frame, &p, k.udp, reply))
			verdict = PS_DROP;
	}
	if (__builtin_expect(side == PS_KEEPER, 0))
		ps_kept_handled(h, s, f);
	return verdict == PS_DROP ? PS_DROP : ps_rewrite(h, f, frame, &p, reply);
}

#endif
