/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state of a TCP connection as somebody between its ends can know it. Only the two ends change it: a segment counts
 * when its numbers show that its sender sees the connection's packets, and its checksum is right. Any segment is passed
 * on; what one says is believed or not. No I/O, no shard: values of one entry.
 *
 * What is checked is what a stateful NAT checks (RFC 5382, RFC 7857) and what receivers of today do (RFC 9293 with
 * RFC 5961):
 *
 *   in the window  sequence and acknowledgement lie in what the other end offered and has sent. Such a segment keeps
 *                  the flow from idling out, and moves what is known of its sender.
 *   a handshake    is proven by the client's acknowledgement of the backend's first number.
 *   a reset        counts when its number is the very next one: what was acknowledged last, or what would be sent next.
 *   a FIN          counts when nothing is missing before it, or once it has been acknowledged.
 *   a SYN          counts when the connection has ended.
 */
#ifndef PACKETSTACK_TRACK_H
#define PACKETSTACK_TRACK_H

#include <arpa/inet.h>

#include "packetstack/checksum.h"
#include "packetstack/parse.h"
#include "packetstack/shard.h"

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };

enum {
	PS_NO_SCALE = 15,
	PS_MAX_SCALE = 14,	   /* RFC 7323, 2.3 */
	PS_LATE_ACK = 66000,	   /* an acknowledgement may be that old, whatever the window */
	PS_FAST_OPEN = 1460,	   /* data of a SYN that its acknowledgement may cover (RFC 7413) */
	PS_UDP_EXCHANGES = 3,	   /* questions after an answer until UDP may be assured, */
	PS_UDP_ASSURED_TICKS = 20, /* and the time since its first answer */
};

/* Difference of two sequence numbers: negative when a comes before b. */
static inline int32_t ps_seq(uint32_t a, uint32_t b) { return (int32_t)(a - b); }

struct ps_segment {
	uint32_t seq, ack;
	uint32_t next;	 /* number behind it: seq + payload + SYN + FIN */
	uint16_t window; /* as it stands there */
	uint8_t flags;
};

static inline void ps_segment_read(struct ps_segment *g, const uint8_t *frame, const struct ps_packet *p)
{
	const uint8_t *tcp = frame + p->l4;
	uint32_t words[2];
	uint16_t window;

	memcpy(words, tcp + 4, 8);
	memcpy(&window, tcp + 14, 2);
	g->seq = ntohl(words[0]);
	g->ack = ntohl(words[1]);
	g->window = ntohs(window);
	g->flags = p->tcp_flags;
	g->next = g->seq + (p->end - p->l4 - (tcp[12] >> 4) * 4u) + !!(g->flags & TCP_SYN) + !!(g->flags & TCP_FIN);
}

/* Is the checksum right? Only asked of segments that would change a state. A first fragment cannot show it. */
static inline bool ps_segment_intact(const uint8_t *frame, const struct ps_packet *p)
{
	const uint8_t *ip = frame + p->l3;
	uint32_t length = p->end - p->l4;
	uint64_t sum = (uint64_t)htons((uint16_t)length) + htons(6);

	if (p->first_fragment)
		return false;
	sum = p->family == 4 ? ps_sum(ip + 12, 8, sum) : ps_sum(ip + 8, 32, sum);
	return ps_fold(ps_sum(frame + p->l4, length, sum)) == 0xffff;
}

/* Options that matter here (RFC 7323). */
struct ps_options {
	uint8_t scale; /* PS_NO_SCALE: none offered */
	bool stamped;
	uint32_t stamp, echo; /* TSval, TSecr */
};

static inline struct ps_options ps_segment_options(const uint8_t *frame, const struct ps_packet *p)
{
	struct ps_options o = { .scale = PS_NO_SCALE };
	const uint8_t *tcp = frame + p->l4;
	uint32_t end = (tcp[12] >> 4) * 4u, at = 20, words[2];

	while (at + 1 < end && tcp[at]) {
		if (tcp[at] == 1) {
			at++;
			continue;
		}
		if (tcp[at + 1] < 2 || at + tcp[at + 1] > end)
			break;
		if (tcp[at] == 3 && tcp[at + 1] == 3) {
			o.scale = tcp[at + 2] < PS_MAX_SCALE ? tcp[at + 2] : PS_MAX_SCALE;
		} else if (tcp[at] == 8 && tcp[at + 1] == 10) {
			memcpy(words, tcp + at + 2, 8);
			o.stamped = true;
			o.stamp = ntohl(words[0]);
			o.echo = ntohl(words[1]);
		}
		at += tcp[at + 1];
	}
	return o;
}

static inline uint8_t ps_scale(const struct ps_entry *f, int side)
{
	uint8_t client = f->scales & 15, backend = f->scales >> 4;

	if (client == PS_NO_SCALE || backend == PS_NO_SCALE)
		return 0;
	return side == PS_CLIENT ? client : backend;
}

/* Largest window that this side has offered, in bytes. */
static inline uint32_t ps_window(const struct ps_entry *f, int side)
{
	return (uint32_t)f->window[side] << ps_scale(f, side);
}

/*
 * Could the segment be one of this side's? Its end is not older than a window of the other side, it begins within
 * what the other side has offered, and it acknowledges what the other side has sent.
 */
static inline bool ps_in_window(const struct ps_entry *f, const struct ps_segment *g, int side)
{
	int other = !side;
	uint32_t window = ps_window(f, other), late = ps_window(f, side);

	if (late < PS_LATE_ACK)
		late = PS_LATE_ACK;
	return g->flags & TCP_ACK && ps_seq(g->seq, f->acked[other] + window + 1) <= 0 &&
	       ps_seq(g->next, f->end[side] - window - 1) >= 0 && ps_seq(g->ack, f->end[other]) <= 0 &&
	       ps_seq(g->ack, f->end[other] - late) >= 0;
}

/* A SYN begins a connection, or a new one with the addresses of one that has ended. */
static inline void ps_track_open(struct ps_entry *f, const struct ps_segment *g, uint8_t scale)
{
	f->end[PS_CLIENT] = f->end[PS_BACKEND] = g->seq + 1;
	f->acked[PS_CLIENT] = f->acked[PS_BACKEND] = 0;
	f->window[PS_CLIENT] = f->window[PS_BACKEND] = 0;
	f->scales = (uint8_t)(PS_NO_SCALE << 4 | scale);
	f->flags &= (uint16_t) ~(PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND | PS_FLOW_BACKEND_FIRST | PS_FLOW_RESET |
				 PS_FLOW_RESET_BACKEND | PS_FLOW_RESET_EARLY | PS_FLOW_STAMPED);
}

/* Does the number answer this SYN, data that it may have carried included? */
static inline bool ps_answers(uint32_t syn, uint32_t number) { return number - syn <= PS_FAST_OPEN; }

/* In SYN_ACK windows are not looked at: window[] holds the number behind a SYN that has not been answered. */
static inline uint32_t ps_other_syn(const struct ps_entry *f) { return (uint32_t)f->window[0] << 16 | f->window[1]; }

static inline void ps_other_syn_set(struct ps_entry *f, uint32_t number)
{
	f->window[0] = (uint16_t)(number >> 16);
	f->window[1] = (uint16_t)number;
}

/* The backend's SYN answers a SYN, and not the one at `other`. */
static inline void ps_track_answer(struct ps_entry *f, const struct ps_segment *g, uint32_t other, uint8_t client_scale,
				   uint8_t backend_scale)
{
	f->scales = (uint8_t)(backend_scale << 4 | client_scale);
	f->end[PS_CLIENT] = f->acked[PS_BACKEND] = g->ack;
	f->end[PS_BACKEND] = g->next;
	f->acked[PS_CLIENT] = g->seq; /* not acknowledged yet: what an acknowledgement must be beyond */
	ps_other_syn_set(f, other);
}

/* What a segment in the window shows of its sender. A byte behind a FIN shows that it was none. */
static inline void ps_track_move(struct ps_entry *f, const struct ps_segment *g, int side)
{
	if (ps_seq(g->next, f->end[side]) > 0) {
		f->end[side] = g->next;
		if (f->flags & (side == PS_CLIENT ? PS_FLOW_FIN_CLIENT : PS_FLOW_FIN_BACKEND))
			f->flags &= (uint16_t) ~(side == PS_CLIENT ? PS_FLOW_FIN_CLIENT
								   : PS_FLOW_FIN_BACKEND | PS_FLOW_BACKEND_FIRST);
	}
	if (ps_seq(g->ack, f->acked[side]) > 0)
		f->acked[side] = g->ack;
	if (g->window > f->window[side])
		f->window[side] = g->window;
}

/* CLOSING, CLOSED or TIME_WAIT, by the FINs and what has been acknowledged of them. `state`: if there is none. */
static inline uint8_t ps_track_fins(const struct ps_entry *f, uint8_t state)
{
	bool client = f->flags & PS_FLOW_FIN_CLIENT, backend = f->flags & PS_FLOW_FIN_BACKEND;

	if (client && backend && f->acked[PS_CLIENT] == f->end[PS_BACKEND] && f->acked[PS_BACKEND] == f->end[PS_CLIENT])
		return f->flags & PS_FLOW_BACKEND_FIRST ? PS_FLOW_TIME_WAIT : PS_FLOW_CLOSED;
	if ((client && f->acked[PS_BACKEND] == f->end[PS_CLIENT]) ||
	    (backend && f->acked[PS_CLIENT] == f->end[PS_BACKEND]))
		return PS_FLOW_CLOSING;
	return state;
}

/*
 * A segment of `side` in ESTABLISHED or CLOSING that is more than data and acknowledgements, or one after a reset.
 * -> the state that it leads to. *moved: it lay in the window.
 */
static inline uint8_t ps_track_control(struct ps_entry *f, const struct ps_segment *g, int side, const uint8_t *frame,
				       const struct ps_packet *p, bool *moved)
{
	uint16_t fin = side == PS_CLIENT ? PS_FLOW_FIN_CLIENT : PS_FLOW_FIN_BACKEND;
	bool by_it = !(f->flags & PS_FLOW_RESET_BACKEND) == (side == PS_CLIENT), more;
	uint8_t state = f->state;

	*moved = false;
	if (g->flags & TCP_RST) {
		/* The next number, or the one that its elicitor acknowledged, which is how a host without the
		 * connection makes one (RFC 9293, 3.10.7.1). The receiver takes no other (RFC 5961, 3.2). */
		if ((g->seq != f->end[side] && g->seq != f->acked[!side]) || !ps_segment_intact(frame, p))
			return state;
		*moved = true;
		f->flags &= (uint16_t) ~(PS_FLOW_RESET_BACKEND | PS_FLOW_RESET_EARLY);
		f->flags |= PS_FLOW_RESET;
		if (side == PS_BACKEND)
			f->flags |= PS_FLOW_RESET_BACKEND;
		if (g->seq != f->end[side])
			f->flags |= PS_FLOW_RESET_EARLY;
		return PS_FLOW_CLOSED;
	}
	if (g->flags & TCP_SYN || !ps_in_window(f, g, side))
		return state;
	*moved = true;
	/*
	 * Somebody goes on after a reset: there is a byte, or the acknowledgement of one, that was not there before it.
	 * Its sender: then it was none of its. Its receiver, with more on the way: then it has not taken it. Else it may
	 * just not have had it when it sent this.
	 */
	more = ps_seq(g->ack, f->acked[side]) > 0;
	if (f->flags & PS_FLOW_RESET &&
	    (by_it ? more || ps_seq(g->next, f->end[side]) > 0 : more && f->flags & PS_FLOW_RESET_EARLY) &&
	    ps_segment_intact(frame, p)) {
		f->flags &= (uint16_t) ~(PS_FLOW_RESET | PS_FLOW_RESET_BACKEND | PS_FLOW_RESET_EARLY);
		state = PS_FLOW_ESTABLISHED;
	}
	if (g->flags & TCP_FIN && ps_seq(g->next, f->end[side]) >= 0 && ps_segment_intact(frame, p)) {
		bool exact = (ps_seq(g->seq, f->end[side]) <= 0 && ps_seq(g->next, f->end[side]) > 0) ||
			     (f->flags & fin && g->next == f->end[side]);

		ps_track_move(f, g, side); /* forgets a FIN of it that was none */
		if (side == PS_BACKEND && !(f->flags & PS_FLOW_FIN_BACKEND) &&
		    !(f->flags & PS_FLOW_FIN_CLIENT && g->ack == f->end[PS_CLIENT]))
			f->flags |= PS_FLOW_BACKEND_FIRST;
		f->flags |= fin;
		if (exact && state == PS_FLOW_ESTABLISHED)
			state = PS_FLOW_CLOSING;
	} else {
		ps_track_move(f, g, side);
	}
	if (f->flags & PS_FLOW_RESET)
		return state;
	state = ps_track_fins(f, state);
	/* A FIN that turned out to be none */
	if (state == PS_FLOW_CLOSING && !(f->flags & (PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND)))
		state = PS_FLOW_ESTABLISHED;
	return state;
}

/* What a SYN must be beyond to begin a connection with addresses and ports that the backend still keeps. */
static inline void ps_track_wait(struct ps_entry *f, int side, const struct ps_options *o)
{
	uint32_t stamp = side == PS_CLIENT ? o->stamp : o->echo;

	if (!o->stamped)
		return;
	f->flags |= PS_FLOW_STAMPED;
	f->window[0] = (uint16_t)(stamp >> 16);
	f->window[1] = (uint16_t)stamp;
}

/*
 * A segment of `side` while the connection opens. -> the state that it leads to. *moved: it was one of the two ends'.
 */
static inline uint8_t ps_track_opening(struct ps_entry *f, const struct ps_segment *g, int side, const uint8_t *frame,
				       const struct ps_packet *p, bool *moved)
{
	uint8_t kind = g->flags & (TCP_SYN | TCP_RST | TCP_ACK);

	*moved = false;
	if (f->state == PS_FLOW_SYN) {
		bool first = ps_answers(f->end[PS_CLIENT], g->ack);

		/*
		 * No reset ends this: who sent the SYN that it refuses is not known, and the other may be answered yet.
		 * The flow gives way to others as it is.
		 */
		if (side == PS_CLIENT) {
			*moved = kind == TCP_SYN && ps_segment_intact(frame, p);
			if (*moved)
				f->end[PS_BACKEND] = g->seq + 1; /* the latest; the first is kept as well */
			return f->state;
		}
		*moved = kind & TCP_ACK && (first || ps_answers(f->end[PS_BACKEND], g->ack)) &&
			 ps_segment_intact(frame, p);
		if (!*moved || kind != (TCP_SYN | TCP_ACK))
			return f->state;
		/* It may answer a later SYN, whose options nobody has kept. */
		ps_track_answer(f, g, f->end[first ? PS_BACKEND : PS_CLIENT], first ? f->scales & 15 : PS_MAX_SCALE,
				ps_segment_options(frame, p).scale);
		return PS_FLOW_SYN_ACK;
	}
	/* SYN_ACK */
	if (kind & TCP_RST) {
		if ((g->seq != f->end[side] &&
		     g->seq != (side == PS_CLIENT ? f->acked[PS_BACKEND] : f->acked[PS_CLIENT] + 1)) ||
		    !ps_segment_intact(frame, p))
			return f->state;
		*moved = true; /* the other SYN may be answered yet */
		f->end[PS_CLIENT] = f->acked[PS_BACKEND];
		f->end[PS_BACKEND] = ps_other_syn(f);
		return PS_FLOW_SYN;
	}
	if (side == PS_BACKEND) {
		if (kind == (TCP_SYN | TCP_ACK)) {
			bool same = g->ack == f->acked[PS_BACKEND];

			if ((!same && !ps_answers(ps_other_syn(f), g->ack)) || !ps_segment_intact(frame, p))
				return f->state;
			*moved = true;
			if (!same || g->seq != f->acked[PS_CLIENT])
				ps_track_answer(f, g, same ? ps_other_syn(f) : f->acked[PS_BACKEND],
						same ? f->scales & 15 : PS_MAX_SCALE,
						ps_segment_options(frame, p).scale);
		} else if (kind == TCP_ACK && ps_seq(g->next, f->end[PS_BACKEND]) > 0 &&
			   ps_seq(g->next, f->acked[PS_CLIENT] + (65535u << ps_scale(f, PS_CLIENT)) + 1) <= 0 &&
			   ps_seq(g->ack, f->acked[PS_BACKEND]) >= 0 && ps_seq(g->ack, f->end[PS_CLIENT]) <= 0) {
			*moved = true; /* it need not wait for the client's acknowledgement (RFC 7413) */
			f->end[PS_BACKEND] = g->next;
		}
		return f->state;
	}
	if (kind == TCP_SYN) {
		*moved = ps_segment_intact(frame, p);
		/* Again, while the answer is under way; or another one. */
		if (*moved && !ps_answers(g->seq + 1, f->acked[PS_BACKEND]))
			ps_other_syn_set(f, g->seq + 1);
		return f->state;
	}
	if (kind != TCP_ACK || g->ack - f->acked[PS_CLIENT] - 1 >= f->end[PS_BACKEND] - f->acked[PS_CLIENT] ||
	    ps_seq(g->seq, f->acked[PS_BACKEND] - 1) < 0 ||
	    ps_seq(g->seq, f->acked[PS_BACKEND] + (65535u << ps_scale(f, PS_BACKEND)) + 1) > 0 ||
	    !ps_segment_intact(frame, p))
		return f->state;
	f->window[PS_CLIENT] = g->window;
	f->window[PS_BACKEND] = (uint16_t)(65535u >> ps_scale(f, PS_BACKEND)); /* that of a SYN, not scaled, at most */
	*moved = true;
	return PS_FLOW_ESTABLISHED;
}

#endif
