/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two sets of engines get each packet of a bucket: which of them handles it, by the connection list.
 *
 * The rules and their proof: tests/model/mirror.py.
 */
#ifndef PACKETSTACK_SETS_H
#define PACKETSTACK_SETS_H

#include "packetstack/connections.h"
#include "follow.h"
#include "rewrite.h"

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

#endif
