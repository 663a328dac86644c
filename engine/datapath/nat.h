/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an engine does with one packet: find or make its flow in the bucket's shard, follow the
 * connection's state, rewrite addresses and ports. No I/O; the caller owns the bucket.
 *
 * Everything written lies in the first PS_UNDO_BYTES of the frame, so that one undo copy covers it.
 */
#ifndef PACKETSTACK_NAT_H
#define PACKETSTACK_NAT_H

#include "follow.h"
#include "opening.h"
#include "rewrite.h"
#include "sets.h"

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
