/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Segments of a few connections in one bucket, by both ends and by somebody who sees neither; time, sweeps, floods.
 * Input: four bytes a step {what, connection and direction, argument, argument}. Numbers are made from those that the
 * connection uses, so that few bytes lead far. After each step:
 *   - the shard is whole and the counters add up;
 *   - a connection that both ends hold is ESTABLISHED, is where it was, and its packets pass;
 *   - only a client that has sent the backend's number is ESTABLISHED;
 *   - a connection that has been closed or reset by its ends is not held.
 */
#include "../c/segments.h"

enum { CONNECTIONS = 6, BUCKET = 1, ASKED = 8, NEAR = 1 << 17 };
enum { PAYLOAD = 64 };		  /* not a flag that anybody looks at: with data */
enum { CLIENT = 0, BACKEND = 1 }; /* index of what an end sent or got */

enum step {
	STEP_SYN,
	STEP_SYN_ACK,
	STEP_ACK,
	STEP_OPEN, /* the three above */
	STEP_DATA,
	STEP_DATA_LOST, /* passes, but does not arrive */
	STEP_FIN,
	STEP_RESET,
	STEP_CLOSE, /* by both ends, with all acknowledgements */
	STEP_REPEAT,
	STEP_INJECT,
	STEP_INJECT_SPOILT,
	STEP_TIME,
	STEP_FLOOD,
	STEP_UDP,
	STEP_FLIP,
	STEPS
};

struct connection {
	struct build out[2]; /* by the client, by the backend */
	uint32_t number[2], next[2], got[2], acknowledged[2];
	uint32_t asked[ASKED];	  /* numbers of all SYNs that may be answered */
	uint32_t asks;		  /* how many */
	uint32_t claimed[ASKED];  /* numbers behind answers that somebody else gave as the backend */
	uint32_t claims;	  /* how many */
	uint32_t doubt;		  /* how many since it last ended */
	uint32_t seen;		  /* ticks */
	bool answered, confirmed; /* the second and the third segment of its handshake have passed */
	bool proved;		  /* the client has sent the backend's number, or what may be taken for it */
	bool held;		  /* by both ends, and nothing has passed that may end it */
	bool ended;		  /* by both, and nothing has passed since that may open it */
};

static struct stack t;
static struct connection all[CONNECTIONS];
static uint64_t handled;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Runs a frame of exactly this length through the handler. -> passed? `frame` is what was sent on. */
static bool handle(uint8_t *frame, uint32_t length, const struct build *b, bool reply)
{
	struct ps_stamp stamp = stamp_of_flow(&t, b->source, b->sport, b->destination, b->dport, b->protocol);
	uint8_t *exact = malloc(length), verdict;

	CHECK(exact, "out of memory");
	memcpy(exact, frame, length);
	stamp.bucket = BUCKET;
	if (reply) {
		stamp.flags = PS_STAMP_REPLY;
		stamp.hash = 0;
	}
	verdict = PS_VERDICT(ps_handle(&t.handler, exact, length, &stamp));
	CHECK(verdict <= PS_TRANSMIT, "verdict %u", verdict);
	handled++;
	memcpy(frame, exact, length);
	free(exact);
	return verdict == PS_TRANSMIT;
}

static struct ps_entry *flow_of(const struct connection *c)
{
	struct ps_shard *s = ps_shard_at(t.arena, BUCKET);
	const struct build *b = &c->out[CLIENT];
	struct ps_key k = { .sport = b->sport, .dport = b->dport };

	memcpy(k.source, b->source, 16);
	memcpy(k.destination, b->destination, 16);
	k.hash = stamp_of_flow(&t, b->source, b->sport, b->destination, b->dport, 6).hash;
	return ps_find_forward(t.arena, s, &k);
}

/* A segment by one of the ends themselves. */
static bool say(struct connection *c, int from, uint8_t flags, uint32_t sequence, uint16_t payload)
{
	struct build b = c->out[from];
	uint8_t frame[PS_FRAME_BYTES];
	uint32_t length;
	bool passed;

	b.tcp_flags = flags;
	b.payload = payload;
	length = build_segment(frame, &b, sequence, flags & TCP_ACK ? c->got[from] : 0, 0);
	passed = handle(frame, length, &b, from == BACKEND);
	CHECK(passed || !c->held, "a packet of a connection that both ends hold was dropped");
	if (passed)
		c->seen = t.handler.now;
	if (passed && flags & TCP_ACK)
		c->acknowledged[from] = c->got[from];
	if (flags == TCP_SYN && passed) {
		struct build reply = reply_to(frame);

		c->out[BACKEND] = reply;
	}
	return passed;
}

static void syn(struct connection *c, uint32_t number)
{
	struct ps_entry *f = flow_of(c);

	/* Ends that hold a connection do not ask for another. */
	if (c->held || c->asks == ASKED)
		return;
	c->doubt++;
	c->asked[c->asks++] = c->number[CLIENT] = number;
	c->next[CLIENT] = number + 1;
	c->answered = c->confirmed = c->ended = false;
	/* What one before it has proved holds until the backend answers. */
	c->proved = f && (f->state == PS_FLOW_ESTABLISHED || f->state == PS_FLOW_CLOSING);
	say(c, CLIENT, TCP_SYN, number, 0);
}

static void syn_ack(struct connection *c, uint32_t number)
{
	if (c->held || !c->asks || c->answered || !flow_of(c))
		return;
	c->number[BACKEND] = number;
	c->next[BACKEND] = number + 1;
	c->got[BACKEND] = c->number[CLIENT] + 1;
	c->answered = say(c, BACKEND, TCP_SYN | TCP_ACK, number, 0);
}

static void ack(struct connection *c)
{
	if (c->held || !c->answered || c->confirmed)
		return;
	c->got[CLIENT] = c->number[BACKEND] + 1;
	c->confirmed = c->proved = true;
	/* With one SYN there is no doubt about who is meant. */
	c->held = say(c, CLIENT, TCP_ACK, c->number[CLIENT] + 1, 0) && c->doubt == 1;
}

static void speak(struct connection *c, int from, uint8_t bytes, bool arrives)
{
	if (!c->held || c->next[from] - c->acknowledged[!from] > 60000)
		return;
	say(c, from, TCP_ACK, c->next[from], bytes);
	c->next[from] += bytes;
	/* Only what is next arrives: something lost before it holds it up. */
	if (arrives && c->got[!from] + bytes == c->next[from]) {
		c->got[!from] = c->next[from];
		say(c, !from, TCP_ACK, c->next[!from], 0);
	} else if (!arrives) {
		/* Sent again at once. */
		say(c, from, TCP_ACK, c->got[!from], (uint16_t)(c->next[from] - c->got[!from]));
		c->got[!from] = c->next[from];
	}
}

static void close_both(struct connection *c, int first)
{
	if (!c->held)
		return;
	for (int i = 0; i < 2; i++) {
		int from = i ? !first : first;

		c->held = c->held && !i;
		say(c, from, TCP_FIN | TCP_ACK, c->next[from]++, 0);
		c->held = false;
		c->got[!from] = c->next[from];
		say(c, !from, TCP_ACK, c->next[!from], 0);
	}
	c->ended = true;
	c->doubt = 0;
}

static uint32_t distance(uint8_t byte)
{
	static const int32_t near[] = { 0,     1,     -1,     2,     7,	     100,     -100,	 1460,
					65534, 65535, 65536,  65537, -65535, -65536,  131072,	 -131072,
					1000,  -1000, 262144, 20000, -20000, 1 << 30, -(1 << 30) };

	if (byte < sizeof(near) / sizeof(near[0]))
		return (uint32_t)near[byte];
	return byte == 255 ? 1u << 31 : byte * 0x9e3779b1u;
}

/* By luck, numbers were hit that an end may believe: what the connection is from here on is not known. */
static void lucky(struct connection *c)
{
	c->held = c->ended = false;
	c->doubt = 2;
}

/* By somebody who sees nothing of it. What may be believed all the same is noted. */
static void inject(struct connection *c, int from, uint8_t sequence_at, uint8_t acknowledged_at, uint8_t flags,
		   bool right)
{
	uint32_t sequence = c->got[!from] + distance(sequence_at),
		 acknowledged = c->next[!from] + distance(acknowledged_at);
	struct build b = c->out[from];
	uint8_t frame[PS_FRAME_BYTES];
	uint32_t length;

	if (!b.protocol)
		return;
	b.tcp_flags = (uint8_t)(flags & ~PAYLOAD);
	b.payload = flags & PAYLOAD ? 40 : 0;
	length = build_segment(frame, &b, sequence, acknowledged, right ? 0 : 0x1234);
	handle(frame, length, &b, from == BACKEND);
	if (!right)
		return;
	if (flags & TCP_RST) {
		bool hit = sequence == c->got[!from] || sequence == c->next[from] ||
			   sequence == c->acknowledged[!from] || sequence - c->number[from] < 2;

		for (uint32_t i = 0; i < c->asks; i++)
			hit |= acknowledged == c->asked[i] + 1;
		if (hit)
			lucky(c);
	} else if (flags & TCP_SYN) {
		bool hit = c->asks == ASKED;

		for (uint32_t i = 0; from == BACKEND && i < c->asks; i++)
			hit |= acknowledged == c->asked[i] + 1;
		if (from == BACKEND && flags & TCP_ACK)
			c->claimed[c->claims++ % ASKED] = sequence + 1;
		if (from == CLIENT && !(flags & TCP_ACK)) {
			c->doubt++;
			if (!hit)
				c->asked[c->asks++] = sequence;
		}
		if (hit) {
			lucky(c);
			c->proved = true;
		}
	} else if (flags & TCP_ACK) {
		bool proof = from == CLIENT && acknowledged == c->number[BACKEND] + 1;

		/* Who plays both ends proves whatever he wants: more answers than are remembered are too many. */
		for (uint32_t i = 0; from == CLIENT && i < c->claims; i++)
			proof |= i >= ASKED || acknowledged == c->claimed[i];

		c->proved |= proof;
		if (proof ||
		    (sequence - c->got[!from] + NEAR <= 2 * NEAR && acknowledged - c->next[!from] + NEAR <= 2 * NEAR))
			lucky(c);
	}
}

static void flood(uint8_t openers, uint8_t protocol)
{
	struct build b = { .dport = htons(80), .protocol = protocol, .tcp_flags = TCP_SYN, .ttl = 64 };
	uint8_t frame[PS_FRAME_BYTES];

	memcpy(b.destination, t.vip[0], 16);
	for (uint32_t i = 0; i < openers; i++) {
		uint32_t l3, length;

		mapped(b.source, 0xc6120000 + random_below(1 << 16));
		b.sport = (uint16_t)random_below(65536);
		length = build_frame(frame, &b, &l3);
		handle(frame, length, &b, false);
		if (protocol == 17 && i & 1) {
			struct build reply = reply_to(frame);

			reply.protocol = 17;
			length = build_frame(frame, &reply, &l3);
			handle(frame, length, &reply, true);
		}
	}
}

/* A client's data with one bit wrong, and then as it should be. */
static void flip(struct connection *c, uint16_t bit)
{
	struct build b = c->out[CLIENT];
	uint8_t frame[PS_FRAME_BYTES];
	uint32_t length;

	if (c->next[CLIENT] - c->acknowledged[BACKEND] > 60000)
		return;
	b.tcp_flags = TCP_ACK;
	b.payload = 20;
	length = build_segment(frame, &b, c->next[CLIENT], c->got[CLIENT], 0);
	bit = (uint16_t)(bit % ((length - 34) * 8)); /* of the segment: the sum over it has every bit */
	frame[34 + bit / 8] ^= (uint8_t)(1 << (bit & 7));
	/* Not its ports: another flow is not this one. Nor the lower bytes of its numbers: luck keeps them in the window. */
	if (bit >= 32 && !(bit >= 40 && bit < 64) && !(bit >= 72 && bit < 96))
		handle(frame, length, &b, false);
	speak(c, CLIENT, 20, true);
}

static void check(void)
{
	struct ps_shard *s = ps_shard_at(t.arena, BUCKET);
	uint32_t established = 0, ours = 0;
	uint64_t sum = 0;

	shard_check(t.arena, s, t.config->timeout);
	for (int reason = PS_C_DROP_NO_STAMP; reason < PS_COUNTERS; reason++)
		sum += t.counters[reason];
	CHECK(t.counters[PS_C_FORWARDED] + sum == handled, "%lu forwarded, %lu dropped of %lu",
	      t.counters[PS_C_FORWARDED], sum, handled);
	for (uint32_t i = 0; i < t.arena->entries; i++)
		established += ps_shard_flows(t.arena, s)[i].state == PS_FLOW_ESTABLISHED;
	for (uint32_t i = 0; i < CONNECTIONS; i++) {
		struct connection *c = &all[i];
		struct ps_entry *f = flow_of(c);

		if (t.handler.now - c->seen >= t.config->timeout[PS_FLOW_ESTABLISHED])
			c->held = false;
		ours += f && f->state == PS_FLOW_ESTABLISHED;
		if (c->held) {
			CHECK(f, "connection %u: both ends hold it, and the flow is gone", i);
			CHECK(f->state == PS_FLOW_ESTABLISHED, "connection %u: both ends hold it, and its state is %u",
			      i, f->state);
			CHECK(f->snat_port == c->out[BACKEND].dport, "connection %u goes by another port", i);
		} else if (f && f->state == PS_FLOW_ESTABLISHED) {
			CHECK(c->proved, "connection %u: established, and nobody has proved anything", i);
		}
		/* Somebody may have asked since, with the same addresses. */
		if (c->ended)
			CHECK(!f || (f->state != PS_FLOW_ESTABLISHED && f->state != PS_FLOW_CLOSING),
			      "connection %u: both ends have ended it, state %u", i, f->state);
	}
	CHECK(established == ours, "%u flows are established, %u of them with both ends", established, ours);
}

static void step(const uint8_t at[4])
{
	static const uint8_t flags[8] = { TCP_RST,	     TCP_RST | TCP_ACK, TCP_FIN | TCP_ACK, TCP_SYN,
					  TCP_SYN | TCP_ACK, TCP_ACK,		TCP_FIN,	   TCP_ACK | PAYLOAD };
	struct connection *c = &all[(at[1] & 15) % CONNECTIONS];
	int from = at[1] >> 7;

	switch (at[0] % STEPS) {
	case STEP_SYN: syn(c, at[2] * 0x01010101u + at[3]); break;
	case STEP_SYN_ACK: syn_ack(c, at[2] * 0x01010101u + at[3]); break;
	case STEP_ACK: ack(c); break;
	case STEP_OPEN:
		syn(c, at[2] * 0x01010101u);
		syn_ack(c, at[3] * 0x01010101u);
		ack(c);
		break;
	case STEP_DATA: speak(c, from, at[2], true); break;
	case STEP_DATA_LOST: speak(c, from, at[2], false); break;
	case STEP_FIN:
		if (c->held)
			say(c, from, TCP_FIN | TCP_ACK, c->next[from]++, 0);
		c->held = false;
		break;
	case STEP_RESET:
		if (!c->held)
			break;
		say(c, from, TCP_RST | TCP_ACK, c->next[from], 0);
		c->held = false;
		c->ended = true;
		c->doubt = 0;
		break;
	case STEP_CLOSE: close_both(c, from); break;
	case STEP_REPEAT: /* an old copy, and a keep-alive */
		if (c->held)
			say(c, from, TCP_ACK, c->next[from] - at[2] % 2000u, 0);
		break;
	case STEP_INJECT: inject(c, from, at[2], at[3], flags[at[1] >> 4 & 7], true); break;
	case STEP_INJECT_SPOILT: inject(c, from, at[2] % 23, 0, at[3], false); break;
	case STEP_TIME:
		t.handler.now += at[2] < 128 ? at[2] : (uint32_t)at[2] * at[3];
		t.counters[PS_C_FLOWS_ENDED] +=
			ps_shard_sweep(t.arena, ps_shard_at(t.arena, BUCKET), t.config->timeout, t.handler.now);
		break;
	case STEP_FLOOD: flood(at[2] & 63, 6); break;
	case STEP_UDP: flood(at[2] & 7, 17); break;
	case STEP_FLIP:
		if (c->held)
			flip(c, (uint16_t)(at[2] << 8 | at[3]));
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct stack fresh;
	static struct ps_arena *empty;

	if (!empty) {
		stack_new(&fresh, 4, 24, 64);
		empty = arena_new(4, 24, 64);
		memcpy(empty, fresh.arena, empty->bytes);
	}
	t = fresh;
	t.handler.counters = t.counters;
	t.handler.engine = &t.engine;
	memcpy(t.arena, empty, empty->bytes);
	random_state = 1;
	handled = 0;
	memset(all, 0, sizeof(all));
	for (uint32_t i = 0; i < CONNECTIONS; i++) {
		struct build *b = &all[i].out[CLIENT];

		*b = (struct build){
			.sport = htons((uint16_t)(40000 + i)), .dport = htons(80), .protocol = 6, .ttl = 64
		};
		mapped(b->source, 0xc6336407);
		memcpy(b->destination, t.vip[0], 16);
	}
	for (; size >= 4; data += 4, size -= 4) {
		step(data);
		check();
	}
	return 0;
}
