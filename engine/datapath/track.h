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
	PS_FAST_OPEN = 2048,	   /* data of a SYN that its acknowledgement may cover (RFC 7413): at most a frame's */
	PS_FRAGMENTS = 65535,	   /* and what may be in fragments behind the first one */
	PS_UDP_EXCHANGES = 3,	   /* questions after an answer until UDP may be assured, */
	PS_UDP_ASSURED_TICKS = 20, /* and the time since its first answer */
};

/* Difference of two sequence numbers: negative when a comes before b. */
static inline int32_t ps_seq(uint32_t a, uint32_t b) { return (int32_t)(a - b); }

struct ps_segment {
	uint32_t seq, ack;
	uint32_t next;	 /* number behind it: seq + payload + SYN + FIN. Of a first fragment: behind what it holds */
	uint16_t window; /* as it stands there */
	uint8_t flags;
};

/* `flags`: p->tcp_flags, or what is known of them */
static inline void ps_segment_read(struct ps_segment *g, const uint8_t *frame, const struct ps_packet *p, uint8_t flags)
{
	const uint8_t *tcp = frame + p->l4;
	uint32_t words[2];
	uint16_t window;

	memcpy(words, tcp + 4, 8);
	memcpy(&window, tcp + 14, 2);
	g->seq = ntohl(words[0]);
	g->ack = ntohl(words[1]);
	g->window = ntohs(window);
	g->flags = flags;
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

/*
 * The first option at `at` or behind it that is no padding, of a header that ends at `end`: -> where its kind stands,
 * its size behind it and all of it before `end`; 0 = none. The first one is at 20, or behind.
 */
static inline uint32_t ps_option(const uint8_t *tcp, uint32_t end, uint32_t at)
{
	while (at + 1 < end && tcp[at] == 1)
		at++;
	return at + 1 < end && tcp[at] && tcp[at + 1] >= 2 && at + tcp[at + 1] <= end ? at : 0;
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
	uint32_t end = (tcp[12] >> 4) * 4u, words[2];

	for (uint32_t at = ps_option(tcp, end, 20); at; at = ps_option(tcp, end, at + tcp[at + 1])) {
		if (tcp[at] == 3 && tcp[at + 1] == 3) {
			o.scale = tcp[at + 2] < PS_MAX_SCALE ? tcp[at + 2] : PS_MAX_SCALE;
		} else if (tcp[at] == 8 && tcp[at + 1] == 10) {
			memcpy(words, tcp + at + 2, 8);
			o.stamped = true;
			o.stamp = ntohl(words[0]);
			o.echo = ntohl(words[1]);
		}
	}
	return o;
}

/* Windows are scaled only when both sides said how (RFC 7323, 2.2). ps_track_confirm makes `scales` say so itself. */
static inline uint8_t ps_scale(const struct ps_entry *f, int side)
{
	uint8_t client = f->scales & 15, backend = f->scales >> 4;

	if (client == PS_NO_SCALE || backend == PS_NO_SCALE)
		return 0;
	return side == PS_CLIENT ? client : backend;
}

/* Largest window that this side has offered, in bytes. Of a connection whose handshake is over. */
static inline uint32_t ps_window(const struct ps_entry *f, int side)
{
	return (uint32_t)f->window[side] << (side == PS_CLIENT ? f->scales & 15 : f->scales >> 4);
}

/*
 * Could the segment be one of this side's? Its end is not older by a window, nor its beginning ahead by more, than what
 * the other side has acknowledged, and it acknowledges what the other side has sent.
 */
static inline bool ps_in_window(const struct ps_entry *f, const struct ps_segment *g, int side)
{
	int other = !side;
	uint32_t window = ps_window(f, other), late = ps_window(f, side);

	if (late < PS_LATE_ACK)
		late = PS_LATE_ACK;
	return g->flags & TCP_ACK && ps_seq(g->seq, f->acked[other] + window + 1) <= 0 &&
	       ps_seq(g->next, f->acked[other] - window - 1) >= 0 && ps_seq(g->ack, f->end[other]) <= 0 &&
	       ps_seq(g->ack, f->end[other] - late) >= 0;
}

/*
 * Where a segment ends whose first fragment alone shows numbers is learned from what acknowledges it.
 * -> is it in the window?
 */
static inline bool ps_acknowledges_fragments(struct ps_entry *f, const struct ps_segment *g, int side)
{
	uint32_t known = f->end[!side];

	if (!(f->flags & PS_FLOW_FRAGMENTED) || g->ack - known > PS_FRAGMENTS)
		return false;
	f->end[!side] = g->ack;
	if (ps_in_window(f, g, side))
		return true;
	f->end[!side] = known;
	return false;
}

/* Most segments acknowledge no less than the one before, and lie in what the other side has not acknowledged yet. */
static inline bool ps_in_order(const struct ps_entry *f, const struct ps_segment *g, int side)
{
	return g->flags & TCP_ACK && g->ack - f->acked[side] <= f->end[!side] - f->acked[side] &&
	       g->seq - f->acked[!side] <= ps_window(f, !side);
}

static inline bool ps_believed(struct ps_entry *f, const struct ps_segment *g, int side)
{
	return __builtin_expect(ps_in_order(f, g, side), 1) || ps_in_window(f, g, side) ||
	       ps_acknowledges_fragments(f, g, side);
}

/* A SYN begins a connection, or a new one with the addresses of one that has ended. */
static inline void ps_track_open(struct ps_entry *f, const struct ps_segment *g, uint8_t scale)
{
	f->end[PS_CLIENT] = f->end[PS_BACKEND] = g->seq + 1;
	f->acked[PS_CLIENT] = f->acked[PS_BACKEND] = 0;
	f->window[PS_CLIENT] = f->window[PS_BACKEND] = 0;
	f->scales = (uint8_t)(PS_NO_SCALE << 4 | scale);
	f->flags &= (uint16_t) ~(PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND | PS_FLOW_BACKEND_FIRST | PS_FLOW_RESET |
				 PS_FLOW_RESET_BACKEND | PS_FLOW_RESET_EARLY | PS_FLOW_STAMPED | PS_FLOW_FRAGMENTED);
}

/*
 * ---- opening -----------------------------------------------------------------------------------------------
 *
 * Anybody may send SYNs with the client's addresses, and the client itself several, of which the backend answers one.
 * Two are kept: in SYN the first and the latest, behind which end[] points; in SYN_ACK the one that was answered, by
 * what its answer acknowledges, in end[CLIENT], and the latest other one, in window[] (windows are not looked at before
 * the handshake is over). If there were more (PS_FLOW_FORGOTTEN), an answer may be to one of those: the latest such is
 * kept beside the first answer, by the number behind it in acked[BACKEND]. Whichever the client acknowledges was the one.
 */

/* Does the number answer this SYN, data that it may have carried included? */
static inline bool ps_answers(uint32_t syn, uint32_t number) { return number - syn <= PS_FAST_OPEN; }

static inline uint32_t ps_other_syn(const struct ps_entry *f) { return (uint32_t)f->window[0] << 16 | f->window[1]; }

static inline void ps_other_syn_set(struct ps_entry *f, uint32_t number)
{
	f->window[0] = (uint16_t)(number >> 16);
	f->window[1] = (uint16_t)number;
}

/* In SYN_ACK: is there another answer? If not, acked[BACKEND] is the number behind the first one. */
static inline bool ps_other_answer(const struct ps_entry *f) { return f->acked[PS_BACKEND] != f->acked[PS_CLIENT] + 1; }

/* The backend's SYN answers a SYN, and not the one at `other`. */
static inline void ps_track_answer(struct ps_entry *f, const struct ps_segment *g, uint32_t other, uint8_t client_scale,
				   uint8_t backend_scale)
{
	bool alone = f->state == PS_FLOW_SYN || !ps_other_answer(f);

	f->scales = (uint8_t)(backend_scale << 4 | client_scale);
	f->end[PS_CLIENT] = g->ack;
	f->end[PS_BACKEND] = g->next;
	f->acked[PS_CLIENT] = g->seq; /* not acknowledged yet: what an acknowledgement must be beyond */
	if (alone)
		f->acked[PS_BACKEND] = g->seq + 1;
	f->flags &= (uint16_t) ~(PS_FLOW_FIN_BACKEND | PS_FLOW_BACKEND_FIRST);
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

/*
 * The shortest way for what nearly all segments are: data or an acknowledgement, in order, of a connection without a FIN.
 * -> false: it may be something else, and nothing has changed
 */
static inline bool ps_track_usual(struct ps_entry *f, const uint8_t *frame, const struct ps_packet *p, int side)
{
	struct ps_segment g;

	ps_segment_read(&g, frame, p, TCP_ACK);
	if (f->flags & (PS_FLOW_FIN_CLIENT | PS_FLOW_FIN_BACKEND) || !ps_in_order(f, &g, side))
		return false;
	/* ps_track_move, with what is known */
	f->acked[side] = g.ack;
	if (ps_seq(g.next, f->end[side]) > 0)
		f->end[side] = g.next;
	if (g.window > f->window[side])
		f->window[side] = g.window;
	return true;
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
	uint16_t other_fin = side == PS_CLIENT ? PS_FLOW_FIN_BACKEND : PS_FLOW_FIN_CLIENT;
	bool by_it = !(f->flags & PS_FLOW_RESET_BACKEND) == (side == PS_CLIENT), more, telling;
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
	if (g->flags & TCP_SYN) {
		uint8_t kind = g->flags & (TCP_SYN | TCP_ACK);
		bool asks = side == PS_CLIENT && kind == TCP_SYN && !ps_state_ended(state);
		bool answers = side == PS_BACKEND && kind == (TCP_SYN | TCP_ACK) && state == PS_FLOW_CLOSED &&
			       f->flags & PS_FLOW_FORGOTTEN;

		/* A SYN does nothing to a connection that lives. It may be answered when that has ended. */
		if ((!asks && !answers) || !ps_segment_intact(frame, p))
			return state;
		f->flags |= PS_FLOW_FORGOTTEN;
		if (!answers)
			return state;
		*moved = true;
		ps_track_open(f, &(struct ps_segment){ .seq = g->ack - 1 }, PS_MAX_SCALE);
		f->flags |= PS_FLOW_FORGOTTEN;
		ps_track_answer(f, g, g->ack, PS_MAX_SCALE, ps_segment_options(frame, p).scale);
		f->acked[PS_BACKEND] = g->seq + 1;
		return PS_FLOW_SYN_ACK;
	}
	/* It may change the state: a FIN, a byte behind one, the acknowledgement of one, or anything after the end. */
	telling = g->flags & TCP_FIN || state == PS_FLOW_CLOSED || state == PS_FLOW_TIME_WAIT ||
		  (f->flags & fin && ps_seq(g->next, f->end[side]) > 0) ||
		  (f->flags & other_fin && f->acked[side] != f->end[!side] && g->ack == f->end[!side]);
	if (!ps_believed(f, g, side) || (telling && !ps_segment_intact(frame, p)))
		return state;
	*moved = true;
	/*
	 * Somebody goes on after a reset: there is a byte, or the acknowledgement of one, that was not there before it.
	 * Its sender: then it was none of its. (The reset may have overtaken a FIN alone.) Its receiver, with more on the
	 * way: then it has not taken it. Else it may just not have had it when it sent this.
	 */
	more = ps_seq(g->ack, f->acked[side]) > 0;
	if (f->flags & PS_FLOW_RESET && (by_it ? more || ps_seq(g->next - !!(g->flags & TCP_FIN), f->end[side]) > 0
					       : more && f->flags & PS_FLOW_RESET_EARLY)) {
		f->flags &= (uint16_t) ~(PS_FLOW_RESET | PS_FLOW_RESET_BACKEND | PS_FLOW_RESET_EARLY);
		state = PS_FLOW_ESTABLISHED;
	}
	if (g->flags & TCP_FIN && (ps_seq(g->next, f->end[side]) >= 0 || ps_seq(g->next, f->acked[!side]) > 0)) {
		bool exact = ps_seq(g->seq, f->end[side]) <= 0;

		/* Nothing is behind a FIN: what seemed to be was not its. Only now a checksum has been looked at. */
		if (ps_seq(g->next, f->end[side]) < 0)
			f->end[side] = g->next;
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

	f->flags &= (uint16_t)~PS_FLOW_FORGOTTEN; /* the same bit */
	if (!o->stamped)
		return;
	f->flags |= PS_FLOW_STAMPED;
	f->window[0] = (uint16_t)(stamp >> 16);
	f->window[1] = (uint16_t)stamp;
}

/* In SYN_ACK: does the client acknowledge the first answer, or data behind it? */
static inline bool ps_confirms(const struct ps_entry *f, const struct ps_segment *g)
{
	return g->ack - f->acked[PS_CLIENT] - 1 < f->end[PS_BACKEND] - f->acked[PS_CLIENT] &&
	       ps_seq(g->seq, f->end[PS_CLIENT] - 1) >= 0 &&
	       ps_seq(g->seq, f->end[PS_CLIENT] + (65535u << ps_scale(f, PS_BACKEND)) + 1) <= 0;
}

/* The handshake is proven by this segment of the client. Who dies in the middle of this leaves it as provable as before. */
static inline void ps_track_confirm(struct ps_entry *f, const struct ps_segment *g)
{
	uint32_t unit;

	if (!ps_answers(ps_other_syn(f), f->end[PS_CLIENT]))
		f->flags |= PS_FLOW_FORGOTTEN;
	if (!ps_confirms(f, g)) { /* the other answer; nobody has kept the options of these two SYNs */
		f->scales = (uint8_t)(PS_MAX_SCALE << 4 | PS_MAX_SCALE);
		f->flags &= (uint16_t) ~(PS_FLOW_FIN_BACKEND | PS_FLOW_BACKEND_FIRST);
		f->end[PS_CLIENT] = g->seq;
		PS_BARRIER();
		f->end[PS_BACKEND] = g->ack;
		PS_BARRIER();
	}
	f->acked[PS_CLIENT] = g->ack - 1; /* the rest is like that of any segment in the window */
	PS_BARRIER();
	f->acked[PS_BACKEND] = f->end[PS_CLIENT];
	f->scales = (uint8_t)(ps_scale(f, PS_BACKEND) << 4 | ps_scale(f, PS_CLIENT));
	unit = 1u << ps_scale(f, PS_BACKEND); /* the window of a SYN is not scaled */
	f->window[PS_BACKEND] = (uint16_t)((65535u + unit - 1) / unit);
	f->window[PS_CLIENT] = g->window;
}

/* A SYN of the client, or of somebody with its addresses: kept beside the first, or the one that was answered. */
static inline void ps_track_again(struct ps_entry *f, uint32_t number)
{
	bool answered = f->state == PS_FLOW_SYN_ACK;
	uint32_t other = answered ? ps_other_syn(f) : f->end[PS_BACKEND];

	if (number == other || (answered ? ps_answers(number, f->end[PS_CLIENT]) : number == f->end[PS_CLIENT]))
		return;
	if (answered ? !ps_answers(other, f->end[PS_CLIENT]) : other != f->end[PS_CLIENT])
		f->flags |= PS_FLOW_FORGOTTEN;
	if (answered)
		ps_other_syn_set(f, number);
	else
		f->end[PS_BACKEND] = number;
}

/*
 * A segment of `side` while the connection opens. -> the state that it leads to; ESTABLISHED: see ps_track_confirm.
 * *moved: it was one of the two ends'.
 */
static inline uint8_t ps_track_opening(struct ps_entry *f, const struct ps_segment *g, int side, const uint8_t *frame,
				       const struct ps_packet *p, bool *moved)
{
	uint8_t kind = g->flags & (TCP_SYN | TCP_RST | TCP_ACK);
	bool answered = f->state == PS_FLOW_SYN_ACK;

	*moved = false;
	if (kind & TCP_RST) {
		/*
		 * No reset ends this: who sent the SYN that it refuses is not known, and the other may be answered yet.
		 * The flow gives way to others as it is.
		 */
		if (!answered ||
		    (g->seq != f->end[side] &&
		     g->seq != (side == PS_CLIENT ? f->end[PS_CLIENT] : f->acked[PS_CLIENT] + 1)) ||
		    !ps_segment_intact(frame, p))
			return f->state;
		*moved = true;
		if (ps_other_answer(f))
			return f->state;
		f->end[PS_BACKEND] = ps_other_syn(f);
		return PS_FLOW_SYN;
	}
	if (side == PS_CLIENT) {
		bool proven = answered && kind == TCP_ACK &&
			      (ps_confirms(f, g) || (ps_other_answer(f) && g->ack == f->acked[PS_BACKEND]));

		*moved = (proven || kind == TCP_SYN) && ps_segment_intact(frame, p);
		if (*moved && !proven)
			ps_track_again(f, g->seq + 1);
		return *moved && proven ? PS_FLOW_ESTABLISHED : f->state;
	}
	if (kind == (TCP_SYN | TCP_ACK)) {
		uint32_t other = answered ? ps_other_syn(f) : f->end[PS_BACKEND];
		bool first = answered ? g->ack == f->end[PS_CLIENT] : ps_answers(f->end[PS_CLIENT], g->ack);
		bool exact = g->ack == f->end[PS_CLIENT] || g->ack == other;

		*moved = (exact || first || ps_answers(other, g->ack) || f->flags & PS_FLOW_FORGOTTEN) &&
			 ps_segment_intact(frame, p);
		if (!*moved)
			return f->state;
		if (!exact)
			f->flags |= PS_FLOW_FORGOTTEN;
		if (answered && !exact) {
			f->acked[PS_BACKEND] = g->next;
		} else if (!answered || !first || g->seq != f->acked[PS_CLIENT]) {
			/* The other SYN is the one before, unless that was this one with data that it did not have. */
			if (!first && exact)
				other = ps_answers(g->ack, f->end[PS_CLIENT]) ? g->ack : f->end[PS_CLIENT];
			/* It may answer a later SYN, whose options nobody has kept. */
			ps_track_answer(f, g, other, first ? f->scales & 15 : PS_MAX_SCALE,
					ps_segment_options(frame, p).scale);
		}
		return PS_FLOW_SYN_ACK;
	}
	if (kind != TCP_ACK)
		return f->state;
	if (!answered) {
		*moved = (ps_answers(f->end[PS_CLIENT], g->ack) || ps_answers(f->end[PS_BACKEND], g->ack)) &&
			 ps_segment_intact(frame, p);
	} else if (ps_seq(g->next, f->end[PS_BACKEND]) >= 0 && g->next - f->acked[PS_CLIENT] - 1 <= 65535 &&
		   g->ack == f->end[PS_CLIENT] && ps_segment_intact(frame, p)) {
		*moved = true; /* it need not wait for the client's acknowledgement (RFC 7413) */
		if (g->next != f->end[PS_BACKEND])
			f->flags &= (uint16_t) ~(PS_FLOW_FIN_BACKEND | PS_FLOW_BACKEND_FIRST);
		f->end[PS_BACKEND] = g->next;
		if (g->flags & TCP_FIN)
			f->flags |= PS_FLOW_FIN_BACKEND | PS_FLOW_BACKEND_FIRST;
	}
	return f->state;
}

#endif
