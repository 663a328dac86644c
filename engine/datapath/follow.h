/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Follows a flow: whether its backend still serves, what a packet makes of the connection's state.
 */
#ifndef PACKETSTACK_FOLLOW_H
#define PACKETSTACK_FOLLOW_H

#include "opening.h"

/* ---- flows that have to leave their backend ---------------------------------------------------------- */

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

#endif
