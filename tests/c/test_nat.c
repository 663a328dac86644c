/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random packets through an engine's packet handler: what comes out is compared with what a translation
 * from scratch gives. Checksums are computed in full. Nothing behind PS_UNDO_BYTES may change.
 */
#include "frames.h"

enum { ROOM = 2048, GUARD = 64 };

struct conversation {
	struct build forward; /* client -> VIP */
	struct ps_stamp stamp;
	struct build sent;  /* what the backend saw: SNAT address -> backend */
	bool open, settled; /* settled: later packets may come in fragments */
	bool closed[2];	    /* TCP: has sent a FIN, and so no data any more */
	uint32_t next[2];   /* TCP: number behind what each side has sent, by ps_side */
};

static struct stack t;
static uint8_t raw[ROOM + 2 * GUARD], *frame = raw + GUARD;

/* Runs the frame through the handler. -> the verdict; `before` is what the frame was. */
static uint8_t handle(uint32_t length, const struct ps_stamp *stamp, uint8_t *before)
{
	uint8_t verdict;

	memset(raw, 0x5a, GUARD);
	memset(frame + length, 0x5a, ROOM - length + GUARD);
	memcpy(before, frame, length);
	verdict = ps_handle(&t.handler, frame, length, stamp);
	for (uint32_t i = 0; i < GUARD; i++)
		CHECK(raw[i] == 0x5a && frame[length + i] == 0x5a, "byte %u outside the frame", i);
	if (length > PS_UNDO_BYTES)
		CHECK(!memcmp(frame + PS_UNDO_BYTES, before + PS_UNDO_BYTES, length - PS_UNDO_BYTES),
		      "a byte behind the first %d was changed", PS_UNDO_BYTES);
	return verdict;
}

/* The frame at `out` is a right translation: addresses, ports, TTL, Ethernet; the rest of the packet as it was. */
static void expect(const uint8_t *out, const uint8_t *before, uint32_t l3, uint32_t length, const struct build *b,
		   const struct build *want, uint16_t mss)
{
	const uint8_t *ip = out + 14, *was = before + l3;
	struct ps_packet p;
	bool v6 = ps_is_v6(b->source);
	uint8_t copy[ROOM];
	int kind;

	CHECK(!memcmp(out, t.engine.gateway_mac, 6) && !memcmp(out + 6, t.engine.mac, 6), "Ethernet addresses");
	memcpy(copy, out, length - (l3 - 14));
	kind = ps_parse(copy, copy + length - (l3 - 14), &p);
	CHECK(kind == (b->fragment_offset ? PS_PKT_FRAGMENT : PS_PKT_FLOW), "kind %d", kind);
	CHECK(p.l3 == 14 && p.ttl == b->ttl - 1, "TTL %u", p.ttl);
	CHECK(!memcmp(p.src, want->source, 16) && !memcmp(p.dst, want->destination, 16), "addresses");
	if (!v6)
		CHECK(ps_fold(ps_sum(ip, (ip[0] & 15) * 4u, 0)) == 0xffff, "IP checksum");
	if (b->fragment_offset) {
		CHECK(!memcmp(copy + p.l4, before + l3 + (p.l4 - 14), p.end - p.l4), "payload of a fragment");
		return;
	}
	CHECK(p.sport == want->sport && p.dport == want->dport, "ports");
	if (b->no_checksum && b->protocol == 17 && !v6)
		CHECK(!copy[p.l4 + 6] && !copy[p.l4 + 7], "UDP without a checksum got one");
	else if (b->more_fragments)
		; /* covers the other fragments too: see the sum below */
	else
		CHECK(!l4_check(ip, copy + p.l4, p.end - p.l4, b->protocol), "checksum of protocol %u", b->protocol);
	if (b->more_fragments && !(b->no_checksum && b->protocol == 17 && !v6)) {
		/* The same sum as before, whatever it is: the fragment was made with the sum of itself. */
		CHECK(!l4_check(ip, copy + p.l4, p.end - p.l4, b->protocol), "checksum of a first fragment");
	}
	{
		uint32_t l4 = p.l4 - 14, skip = b->protocol == 6 ? 18 : 8;

		if (mss) {
			put16(copy + p.l4 + 20 + b->mss_at + 1, b->mss);
			CHECK(ip[l4 - 0 + 20 + b->mss_at + 1] == mss >> 8 &&
				      ip[l4 + 20 + b->mss_at + 2] == (mss & 0xff),
			      "MSS");
		}
		CHECK(!memcmp(copy + p.l4 + 4, was + l4 + 4, b->protocol == 6 ? 12 : 2), "header");
		CHECK(!memcmp(copy + p.l4 + skip, was + l4 + skip, p.end - p.l4 - skip), "payload");
	}
}

static void draw_forward(struct build *b, bool udp, uint32_t clients)
{
	bool v6 = random_below(2);

	memset(b, 0, sizeof(*b));
	if (v6)
		address6(b->source, 9, 1 + random_below(clients));
	else
		mapped(b->source, 0x0a630000 + random_below(clients));
	memcpy(b->destination, t.vip[v6], 16);
	b->sport = (uint16_t)random_below(65536);
	b->dport = htons(80);
	b->protocol = udp ? 17 : 6;
	b->ttl = (uint8_t)(2 + random_below(250));
}

static void draw_shape(struct build *b)
{
	b->vlans = (uint8_t)(random_below(4) ? 0 : 1 + random_below(2));
	b->options = (uint8_t)(random_below(4) ? 0 : 4 * random_below(5));
	b->payload = (uint16_t)(random_below(3) ? random_below(64) : random_below(1300));
	b->no_checksum = !random_below(4);
	b->ttl = (uint8_t)(2 + random_below(250));
	b->mss_at = 0;
	b->more_fragments = false;
	b->fragment_offset = 0;
}

/* Sends one packet of a conversation in either direction and checks what comes out. */
static void one_packet(struct conversation *c, uint8_t tcp_flags, bool reply)
{
	struct build b = c->forward, want;
	struct ps_stamp stamp = c->stamp;
	uint32_t l3, length, clamp = 0;
	uint8_t before[ROOM], verdict;
	struct ps_packet p;

	if (reply) {
		memcpy(b.source, c->sent.destination, 16);
		memcpy(b.destination, c->sent.source, 16);
		b.sport = c->sent.dport;
		b.dport = c->sent.sport;
		stamp.flags = PS_STAMP_REPLY;
		stamp.hash = 0;
		CHECK((ntohs(b.dport) & t.config->mask) == stamp.bucket, "the SNAT port does not lead to the bucket");
	}
	draw_shape(&b);
	b.tcp_flags = tcp_flags;
	if (b.protocol == 6 && tcp_flags & TCP_SYN && random_below(2)) {
		b.mss_at = (uint8_t)(1 + random_below(6));
		b.mss = (uint16_t)random_below(65536);
		if (t.config->mtu && b.mss > t.config->mtu - (ps_is_v6(b.source) ? 60 : 40))
			clamp = t.config->mtu - (ps_is_v6(b.source) ? 60 : 40);
	}
	if (c->settled && !b.options && tcp_flags == TCP_ACK && !random_below(6)) {
		b.more_fragments = random_below(2);
		if (!b.more_fragments || random_below(2)) {
			b.fragment_offset = (uint16_t)(1 + random_below(100));
			stamp.flags |= PS_STAMP_FRAGMENT;
			stamp.hash = (uint32_t)ntohs(b.sport) << 16 | ntohs(b.dport);
		}
	}
	b.seq = c->next[reply];
	b.ack = tcp_flags & TCP_ACK ? c->next[!reply] : 0;
	b.window = 65535;
	if (tcp_flags & TCP_SYN || c->closed[reply])
		b.payload = 0;
	c->closed[reply] |= tcp_flags & TCP_FIN;
	if (tcp_flags & TCP_SYN && !random_below(2))
		b.scale = (uint8_t)(1 + random_below(15));
	if (!b.fragment_offset)
		c->next[reply] += b.payload + !!(tcp_flags & TCP_SYN) + !!(tcp_flags & TCP_FIN);
	length = build_frame(frame, &b, &l3);
	verdict = handle(length, &stamp, before);
	CHECK(PS_VERDICT(verdict) == PS_TRANSMIT, "verdict %u, protocol %u flags %x reply %d", verdict, b.protocol,
	      tcp_flags, reply);
	CHECK(PS_SHIFT(verdict) == (int)l3 - 14, "shift %d", PS_SHIFT(verdict));
	if (!c->open) {
		uint8_t copy[ROOM];
		bool v6 = ps_is_v6(b.source), backend = false, snat = false;

		memcpy(copy, frame + l3 - 14, length - (l3 - 14));
		CHECK(ps_parse(copy, copy + length - (l3 - 14), &p) == PS_PKT_FLOW, "an opener");
		memcpy(c->sent.source, p.src, 16);
		memcpy(c->sent.destination, p.dst, 16);
		c->sent.sport = p.sport;
		c->sent.dport = p.dport;
		for (int i = 0; i < 3; i++)
			backend |= !memcmp(p.dst, t.backend[v6][i], 16);
		for (int i = 0; i < 2; i++)
			snat |= !memcmp(p.src, t.snat[v6][i], 16);
		CHECK(backend && snat && p.dport == htons(8080), "an opener goes from a SNAT address to a backend");
		c->open = true;
	}
	want = c->sent;
	if (reply) {
		memcpy(want.source, c->forward.destination, 16);
		memcpy(want.destination, c->forward.source, 16);
		want.sport = c->forward.dport;
		want.dport = c->forward.sport;
	}
	expect(frame + l3 - 14, before, l3, length, &b, &want, (uint16_t)clamp);
}

/* An ICMP error about a packet that we sent, towards the other side of the flow. */
static void one_error(struct conversation *c, bool about_backend_side)
{
	const struct build *seen = about_backend_side ? &c->sent : &c->forward;
	bool v6 = ps_is_v6(c->forward.source);
	uint8_t inner[ROOM], before[ROOM], outer_protocol = v6 ? 58 : 1, *icmp, verdict;
	struct build embedded = { .protocol = c->forward.protocol, .ttl = 3, .payload = (uint16_t)random_below(40) };
	struct build outer = { .ttl = (uint8_t)(2 + random_below(200)) };
	struct ps_stamp stamp = c->stamp;
	uint32_t l3, inner_length, header, kept, inner_header = v6 ? 40 : 20;
	struct ps_packet p;

	/* Towards the client side the embedded packet runs VIP -> client, else SNAT -> backend. */
	memcpy(embedded.source, about_backend_side ? seen->source : seen->destination, 16);
	memcpy(embedded.destination, about_backend_side ? seen->destination : seen->source, 16);
	embedded.sport = about_backend_side ? seen->sport : seen->dport;
	embedded.dport = about_backend_side ? seen->dport : seen->sport;
	embedded.no_checksum = !random_below(4);
	inner_length = build_frame(inner, &embedded, &l3) - l3;
	kept = random_below(3) ? inner_length : inner_header + 8;
	if (v6)
		address6(outer.source, 77, 1);
	else
		mapped(outer.source, 0x0a4d0001);
	memcpy(outer.destination, embedded.source, 16);
	memset(frame, 0xaa, 12);
	put16(frame + 12, v6 ? 0x86dd : 0x0800);
	header = build_ip(frame + 14, &outer, outer_protocol, 8 + kept);
	icmp = frame + 14 + header;
	memset(icmp, 0, 8);
	icmp[0] = v6 ? 2 : 3;
	icmp[1] = v6 ? 0 : 4;
	put16(icmp + 6, 1400);
	memcpy(icmp + 8, inner + l3, kept);
	l4_checksum(frame + 14, icmp, 8 + kept, outer_protocol);
	stamp.flags = PS_STAMP_ICMP | (about_backend_side ? PS_STAMP_REPLY : 0);
	verdict = handle(14 + header + 8 + kept, &stamp, before);
	CHECK(PS_VERDICT(verdict) == PS_TRANSMIT, "verdict %u", verdict);
	if (!v6)
		CHECK(ps_fold(ps_sum(frame + 14, 20, 0)) == 0xffff, "outer IP checksum");
	CHECK(!l4_check(frame + 14, icmp, 8 + kept, outer_protocol), "ICMP checksum");
	CHECK(ps_parse(frame, frame + 14 + header + 8 + kept, &p) == PS_PKT_ICMP_ERROR, "kind %u", p.kind);
	seen = about_backend_side ? &c->forward : &c->sent;
	if (about_backend_side) {
		/* The client knows the flow as client -> VIP; this is what it once sent. */
		CHECK(!memcmp(p.src, seen->source, 16) && !memcmp(p.dst, seen->destination, 16), "embedded addresses");
		CHECK(p.sport == seen->sport && p.dport == seen->dport, "embedded ports");
		CHECK(!memcmp(p.outer_dst, seen->source, 16), "it goes to the client");
	} else {
		CHECK(!memcmp(p.src, seen->destination, 16) && !memcmp(p.dst, seen->source, 16), "embedded addresses");
		CHECK(p.sport == seen->dport && p.dport == seen->sport, "embedded ports");
		CHECK(!memcmp(p.outer_dst, seen->destination, 16), "it goes to the backend");
	}
	if (!v6)
		CHECK(ps_fold(ps_sum(icmp + 8, 20, 0)) == 0xffff, "embedded IP checksum");
	if (kept == inner_length && !(embedded.no_checksum && embedded.protocol == 17 && !v6))
		CHECK(!l4_check(icmp + 8, icmp + 8 + inner_header, kept - inner_header, embedded.protocol),
		      "embedded checksum");
}

/* The entry of a conversation, NULL if there is none. */
static struct ps_entry *entry_of(const struct conversation *c)
{
	struct ps_key k = { .sport = c->forward.sport,
			    .dport = c->forward.dport,
			    .udp = c->forward.protocol == 17,
			    .hash = c->stamp.hash };

	memcpy(k.source, c->forward.source, 16);
	memcpy(k.destination, c->forward.destination, 16);
	return ps_find_forward(t.arena, ps_shard_at(t.arena, c->stamp.bucket), &k);
}

/* The three packets that open a connection; a question, its answer and another question. */
static void open_both(struct conversation *c)
{
	c->stamp = stamp_of_flow(&t, c->forward.source, c->forward.sport, c->forward.destination, c->forward.dport,
				 c->forward.protocol);
	c->next[PS_CLIENT] = random_below(0xffffffff);
	c->next[PS_BACKEND] = random_below(0xffffffff);
	one_packet(c, TCP_SYN, false);
	one_packet(c, TCP_SYN | TCP_ACK, true);
	one_packet(c, TCP_ACK, false);
	CHECK(entry_of(c)->state == (c->forward.protocol == 6 ? PS_FLOW_ESTABLISHED : PS_FLOW_ANSWERED), "state %u",
	      entry_of(c)->state);
}

/* Questions and answers until a UDP flow is assured: it may not be recycled any more. */
static void assure(struct conversation *c)
{
	for (int i = 0; i < 5 && c->forward.protocol == 17; i++) {
		t.handler.now += PS_UDP_ASSURED_TICKS / 4;
		one_packet(c, TCP_ACK, true);
		one_packet(c, TCP_ACK, false);
	}
	CHECK(c->forward.protocol == 6 || entry_of(c)->state == PS_FLOW_ASSURED, "state %u", entry_of(c)->state);
}

static void whole(void)
{
	for (uint32_t b = 0; b < t.arena->buckets; b++)
		shard_check(t.arena, ps_shard_at(t.arena, b), t.config->timeout);
	counts_check(t.arena, 0, t.arena->buckets, 0);
}

static void conversations(uint64_t seed)
{
	static struct conversation all[300];

	random_state = seed;
	stack_new(&t, 256, 64, 128);
	t.config->mtu = random_below(2) ? 1400 : 0;
	memset(all, 0, sizeof(all));
	for (uint32_t i = 0; i < 300; i++) {
		struct conversation *c = &all[i];
		bool udp = random_below(2), twice = false;

		draw_forward(&c->forward, udp, 50);
		for (uint32_t j = 0; j < i; j++)
			twice |= all[j].forward.sport == c->forward.sport &&
				 all[j].forward.protocol == c->forward.protocol &&
				 !memcmp(all[j].forward.source, c->forward.source, 16);
		if (twice) {
			memset(c, 0, sizeof(*c));
			continue;
		}
		open_both(c);
		c->settled = true;
	}
	for (uint32_t i = 0; i < 3000; i++) {
		struct conversation *c = &all[random_below(300)];

		if (!c->open)
			continue;
		if (random_below(8))
			one_packet(c, TCP_ACK, random_below(2));
		else
			one_error(c, random_below(2));
	}
	whole();
	/* Both sides close, in any order; the shards are empty when the timers have run. */
	for (uint32_t i = 0; i < 300; i++)
		if (all[i].open && all[i].forward.protocol == 6) {
			bool first = random_below(2);

			all[i].settled = false; /* nothing of this comes in fragments */
			one_packet(&all[i], TCP_FIN | TCP_ACK, first);
			CHECK(entry_of(&all[i])->state == PS_FLOW_CLOSING, "state %u", entry_of(&all[i])->state);
			one_packet(&all[i], TCP_FIN | TCP_ACK, !first);
			one_packet(&all[i], TCP_ACK, first);
			CHECK(entry_of(&all[i])->state == (first ? PS_FLOW_TIME_WAIT : PS_FLOW_CLOSED), "state %u",
			      entry_of(&all[i])->state);
		}
	whole();
	t.handler.now += 3000;
	for (uint32_t b = 0; b < 256; b++) {
		ps_shard_sweep(t.arena, ps_shard_at(t.arena, b), t.config->timeout, t.handler.now);
		CHECK(!ps_shard_at(t.arena, b)->live, "bucket %u has %u flows", b, ps_shard_at(t.arena, b)->live);
	}
	whole();
	stack_free(&t);
}

/* With its next packet a UDP flow leaves a backend that a new configuration does not have; a TCP flow stays. */
static void leaving(uint64_t seed)
{
	static struct conversation all[60];
	uint32_t left = 0;

	random_state = seed;
	stack_new(&t, 256, 64, 128);
	memset(all, 0, sizeof(all));
	for (uint32_t i = 0; i < 60; i++) {
		struct conversation *c = &all[i];

		draw_forward(&c->forward, i % 2, 50);
		c->forward.sport = htons((uint16_t)(2000 + i));
		open_both(c);
	}
	/* The third backend of each family goes. */
	for (uint32_t i = 0; i < t.config->listeners; i++)
		t.config->listener[i].backends = 2;
	for (uint32_t i = 0; i < 7; i++)
		t.config->lookup[i] = (uint16_t)(i % 2);
	t.handler.now += 5;
	ps_configure(&t.handler, t.config);
	for (int round = 0; round < 2; round++) {
		t.handler.now += 5;
		for (uint32_t i = 0; i < 60; i++) {
			struct conversation *c = &all[i];
			bool v6 = ps_is_v6(c->forward.source);
			bool gone = !memcmp(c->sent.destination, t.backend[v6][2], 16);

			left += gone && i % 2;
			c->open = !(gone && i % 2); /* what it is sent as now is noted, and holds from then on */
			one_packet(c, TCP_ACK, false);
			CHECK(!(i % 2) || memcmp(c->sent.destination, t.backend[v6][2], 16), "it stays");
			one_packet(c, TCP_ACK, true);
		}
	}
	CHECK(left > 5, "%u flows had to leave", left);
	/* No backend is left: a flow stays with the one it has. */
	for (uint32_t i = 0; i < t.config->listeners; i++)
		t.config->listener[i].backends = 0;
	t.handler.now += 5;
	ps_configure(&t.handler, t.config);
	for (uint32_t i = 0; i < 60; i++)
		one_packet(&all[i], TCP_ACK, false);
	whole();
	stack_free(&t);
}

/* ---- one connection, segment by segment -------------------------------------------------------------- */

/* First numbers of client and backend: nothing below depends on them, wherever they wrap around. */
static uint32_t first[2];
/* What segment() adds to a segment: options, window, a wrong checksum. */
static struct build shape;

/* A TCP client of the IPv4 listener, another one with each number. */
static struct conversation client(uint32_t number)
{
	struct conversation c = { .forward = { .protocol = 6, .ttl = 64, .dport = htons(80) } };

	mapped(c.forward.source, 0x0a630000 + number / 256);
	memcpy(c.forward.destination, t.vip[0], 16);
	c.forward.sport = htons((uint16_t)(2000 + number % 256));
	c.stamp = stamp_of_flow(&t, c.forward.source, c.forward.sport, c.forward.destination, c.forward.dport, 6);
	return c;
}

/* The same with a given bucket: the director may have put it there. */
static struct conversation client_in(uint32_t bucket, uint32_t number)
{
	struct conversation c = client(number);

	c.stamp.bucket = (uint16_t)bucket;
	return c;
}

/* What the handler makes of a packet of a conversation. An opener that is sent on shows where the backend sees it. */
static uint8_t say(struct conversation *c, struct build b, bool reply)
{
	struct ps_stamp stamp = c->stamp;
	uint8_t before[ROOM], verdict;
	struct ps_packet p;
	uint32_t l3, length;

	if (reply) {
		stamp.flags = PS_STAMP_REPLY;
		stamp.hash = 0;
	}
	length = build_frame(frame, &b, &l3);
	verdict = PS_VERDICT(handle(length, &stamp, before));
	if (verdict == PS_TRANSMIT && !reply) {
		CHECK(ps_parse(frame, frame + length, &p) == PS_PKT_FLOW, "kind %u", p.kind);
		if (memcmp(p.dst, c->forward.source, 16)) { /* not an answer to it */
			memcpy(c->sent.source, p.src, 16);
			memcpy(c->sent.destination, p.dst, 16);
			c->sent.sport = p.sport;
			c->sent.dport = p.dport;
		}
	}
	return verdict;
}

/* A packet of one side, its addresses and ports: to be sent by say() */
static struct build from(const struct conversation *c, int side)
{
	struct build b = c->forward;

	if (side == PS_BACKEND) {
		memcpy(b.source, c->sent.destination, 16);
		memcpy(b.destination, c->sent.source, 16);
		b.sport = c->sent.dport;
		b.dport = c->sent.sport;
	}
	return b;
}

/* A segment of one side; numbers count from the first of each side. -> verdict */
static uint8_t segment(struct conversation *c, int side, uint8_t flags, uint32_t seq, uint32_t ack, uint16_t payload)
{
	struct build b = from(c, side);

	b.tcp_flags = flags;
	b.seq = first[side] + seq;
	b.ack = flags & TCP_ACK ? first[!side] + ack : 0;
	b.payload = payload;
	b.window = shape.window ? shape.window : 10000;
	b.scale = shape.scale;
	b.bad_checksum = shape.bad_checksum;
	return say(c, b, side == PS_BACKEND);
}

/* Each segment is sent on, whatever is believed of it, and leads to a state. */
#define LEADS(c, side, flags, seq, ack, payload, to)                                                      \
	do {                                                                                              \
		CHECK(segment(&(c), side, flags, seq, ack, payload) == PS_TRANSMIT, "it is not sent on"); \
		CHECK(entry_of(&(c)) && entry_of(&(c))->state == PS_FLOW_##to, "state %d",                \
		      entry_of(&(c)) ? entry_of(&(c))->state : -1);                                       \
	} while (0)

#define CLIENT	PS_CLIENT
#define BACKEND PS_BACKEND

static struct conversation established(uint32_t bucket, uint32_t number)
{
	struct conversation c = client_in(bucket, number);

	LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	LEADS(c, CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	return c;
}

/* After orderly ends of both sides. Of the client first: CLOSED; of the backend first: TIME_WAIT. */
static void end_orderly(struct conversation *c, int who)
{
	segment(c, who, TCP_FIN | TCP_ACK, 1, 1, 0);
	segment(c, !who, TCP_FIN | TCP_ACK, 1, 2, 0);
	segment(c, who, TCP_ACK, 2, 2, 0);
	CHECK(entry_of(c)->state == (who == CLIENT ? PS_FLOW_CLOSED : PS_FLOW_TIME_WAIT), "state %u",
	      entry_of(c)->state);
}

/* Is the flow's idle time counted from now on? */
static bool refreshed(const struct conversation *c) { return entry_of(c)->last_seen == t.handler.now; }

static bool entry_established(const struct conversation *c) { return entry_of(c)->state == PS_FLOW_ESTABLISHED; }

static int32_t proven(uint32_t listener) { return t.arena->listener_count[listener].proven; }

/* A handshake is proven by the right acknowledgement and a right checksum, and by nothing else. */
static void a_handshake_needs_the_right_acknowledgements(void)
{
	struct conversation c = client(1);
	uint64_t unproven;

	LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(c, CLIENT, TCP_ACK, 1, 1, 0, SYN); /* nobody has answered */
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 0, 0, SYN);
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 1 + PS_FAST_OPEN + 1, 0, SYN);
	LEADS(c, BACKEND, TCP_RST | TCP_ACK, 0, 5000, 0, SYN);
	LEADS(c, BACKEND, TCP_SYN, 0, 0, 0, SYN);
	LEADS(c, CLIENT, TCP_RST, 5000, 0, 0, SYN);
	CHECK(t.counters[PS_C_UNPROVEN] >= 5, "%lu unproven", t.counters[PS_C_UNPROVEN]);
	shape.bad_checksum = true;
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN);
	shape.bad_checksum = false;
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	unproven = t.counters[PS_C_UNPROVEN];
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK); /* again: the client's acknowledgement was lost */
	LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN_ACK);
	CHECK(t.counters[PS_C_UNPROVEN] == unproven, "what is sent again is of one who knows the numbers");
	LEADS(c, CLIENT, TCP_ACK, 1, 0, 0, SYN_ACK);
	LEADS(c, CLIENT, TCP_ACK, 1, 2, 0, SYN_ACK);
	LEADS(c, CLIENT, TCP_ACK, 1 + 70000, 1, 0, SYN_ACK);
	LEADS(c, CLIENT, TCP_RST, 5000, 0, 0, SYN_ACK);
	shape.bad_checksum = true;
	LEADS(c, CLIENT, TCP_ACK, 1, 1, 0, SYN_ACK);
	shape.bad_checksum = false;
	CHECK(!proven(0) && t.arena->listener_count[0].live == 1, "%d of %d proven", proven(0),
	      t.arena->listener_count[0].live);
	LEADS(c, CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	CHECK(proven(0) == 1, "%d proven", proven(0));
}

/* An opener with a wrong checksum makes no flow. */
static void an_opener_needs_a_right_checksum(void)
{
	struct conversation c = client(1);

	shape.bad_checksum = true;
	CHECK(segment(&c, CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && !entry_of(&c), "it made a flow");
	shape.bad_checksum = false;
	CHECK(t.counters[PS_C_DROP_BAD_CHECKSUM] == 1, "%lu", t.counters[PS_C_DROP_BAD_CHECKSUM]);
}

/* A reset does not end a handshake: it may refuse a SYN of somebody else. The flow stays half open, and gives way. */
static void a_reset_leaves_an_opening_connection_half_open(void)
{
	struct conversation c = client(1), d = client(2);

	LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(c, BACKEND, TCP_RST | TCP_ACK, 0, 1, 0, SYN); /* refused */
	LEADS(c, CLIENT, TCP_RST, 1, 0, 0, SYN);
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	LEADS(d, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(d, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	LEADS(d, CLIENT, TCP_RST, 2, 0, 0, SYN_ACK);
	LEADS(d, BACKEND, TCP_RST, 2, 0, 0, SYN_ACK);
	LEADS(d, CLIENT, TCP_RST, 1, 0, 0, SYN); /* it does not want this answer */
	LEADS(d, CLIENT, TCP_ACK, 1, 1, 0, SYN);
	LEADS(d, CLIENT, TCP_SYN, 70000, 0, 0, SYN);
	LEADS(d, BACKEND, TCP_SYN | TCP_ACK, 90000, 70001, 0, SYN_ACK);
	LEADS(d, BACKEND, TCP_RST, 90001, 0, 0, SYN);
	LEADS(d, BACKEND, TCP_SYN | TCP_ACK, 95000, 70001, 0, SYN_ACK);
	LEADS(d, CLIENT, TCP_ACK, 70001, 95001, 0, ESTABLISHED);
	CHECK(t.arena->listener_count[0].live == 2 && proven(0) == 1, "%d live", t.arena->listener_count[0].live);
}

/* Who does not know the connection's numbers ends nothing: reset, FIN and SYN are sent on and not believed. */
static void blind_segments_leave_it_established(void)
{
	for (int side = 0; side < 2; side++) {
		struct conversation c = established(9, (uint32_t)side);
		uint64_t unproven = t.counters[PS_C_UNPROVEN];

		LEADS(c, side, TCP_ACK, 1, 1, 500, ESTABLISHED);
		t.handler.now += 10;
		LEADS(c, side, TCP_RST, 502, 0, 0, ESTABLISHED); /* in the window, but not the next */
		LEADS(c, side, TCP_RST, 500, 0, 0, ESTABLISHED);
		LEADS(c, side, TCP_RST | TCP_ACK, 70000, 1, 0, ESTABLISHED);
		LEADS(c, side, TCP_FIN | TCP_ACK, 1 + 70000, 1, 0, ESTABLISHED); /* beyond the window */
		LEADS(c, side, TCP_FIN | TCP_ACK, 501, 2, 0, ESTABLISHED);	 /* acknowledges what nobody sent */
		LEADS(c, side, TCP_FIN, 501, 0, 0, ESTABLISHED);
		LEADS(c, side, TCP_SYN, 501, 0, 0, ESTABLISHED);
		LEADS(c, side, TCP_SYN | TCP_ACK, 501, 1, 0, ESTABLISHED);
		CHECK(t.counters[PS_C_UNPROVEN] == unproven + 8, "%lu", t.counters[PS_C_UNPROVEN] - unproven);
		shape.bad_checksum = true;
		LEADS(c, side, TCP_RST, 501, 0, 0, ESTABLISHED);
		CHECK(!refreshed(&c), "a blind segment keeps it from idling out");
		LEADS(c, side, TCP_FIN | TCP_ACK, 501, 1, 0, ESTABLISHED);
		shape.bad_checksum = false;
		LEADS(c, side, TCP_ACK, 501, 1, 10, ESTABLISHED);
		CHECK(refreshed(&c), "its own segment does");
	}
}

/* A reset whose number is the very next one ends it, or the one acknowledged last, as a host without it makes one. */
static void an_exact_reset_closes(void)
{
	for (int side = 0; side < 2; side++)
		for (uint32_t seq = 1; seq <= 501; seq += 500) {
			struct conversation c = established(9, (uint32_t)side * 2 + seq);

			LEADS(c, side, TCP_ACK, 1, 1, 500, ESTABLISHED);
			LEADS(c, side, TCP_RST, seq, 0, 0, CLOSED);
			CHECK(!proven(0) && !t.arena->listener_count[0].live, "it is still counted");
			LEADS(c, side, TCP_RST, seq, 0, 0, CLOSED);
		}
}

/* Its receiver goes on after a reset that was none: a challenge acknowledgement, or data that it has accepted. */
static void who_goes_on_after_an_early_reset_has_not_taken_it(void)
{
	for (int side = 0; side < 2; side++) {
		struct conversation c = established(9, (uint32_t)side), d = established(9, 10 + (uint32_t)side);

		LEADS(c, side, TCP_ACK, 1, 1, 500, ESTABLISHED);
		LEADS(c, side, TCP_RST, 1, 0, 0, CLOSED);
		LEADS(c, !side, TCP_ACK, 1, 501, 0, ESTABLISHED); /* it has all, so it took no reset before that */
		LEADS(d, side, TCP_ACK, 1, 1, 500, ESTABLISHED);
		LEADS(d, side, TCP_RST, 1, 0, 0, CLOSED);
		LEADS(d, !side, TCP_ACK, 1, 1, 100, CLOSED); /* may have been under way */
		LEADS(d, side, TCP_ACK, 501, 101, 10, ESTABLISHED);
		CHECK(proven(0) == 2 * (side + 1), "%d proven", proven(0));
	}
	whole();
}

/* The host that is asked again by what was under way resets again: it stays closed. */
static void what_was_under_way_when_a_reset_came_revives_nothing(void)
{
	struct conversation c = established(9, 1);

	LEADS(c, CLIENT, TCP_RST, 1, 0, 0, CLOSED);
	LEADS(c, BACKEND, TCP_ACK, 1, 1, 100, CLOSED);
	LEADS(c, CLIENT, TCP_RST, 1, 0, 0, CLOSED);
	CHECK(!proven(0), "%d proven", proven(0));
}

/* The client's FIN first: nothing keeps the backend from a new connection. */
static void the_client_closes_first(void)
{
	struct conversation c = established(9, 1);

	LEADS(c, CLIENT, TCP_ACK, 1, 1, 100, ESTABLISHED);
	LEADS(c, CLIENT, TCP_FIN | TCP_ACK, 101, 1, 0, CLOSING);
	LEADS(c, BACKEND, TCP_ACK, 1, 102, 0, CLOSING);
	for (uint32_t i = 0; i < 5; i++) { /* half closed: the backend sends on, the client acknowledges */
		t.handler.now += 100;
		LEADS(c, BACKEND, TCP_ACK, 1 + 1000 * i, 102, 1000, CLOSING);
		LEADS(c, CLIENT, TCP_ACK, 102, 1001 + 1000 * i, 0, CLOSING);
		CHECK(refreshed(&c), "a half-closed connection idles out");
	}
	LEADS(c, BACKEND, TCP_FIN | TCP_ACK, 5001, 102, 0, CLOSING);
	LEADS(c, BACKEND, TCP_FIN | TCP_ACK, 5001, 102, 0, CLOSING); /* again */
	CHECK(t.arena->listener_count[0].live == 1, "%d", t.arena->listener_count[0].live);
	LEADS(c, CLIENT, TCP_ACK, 102, 5002, 0, CLOSED);
	CHECK(!t.arena->listener_count[0].live && !proven(0), "it is still counted");
}

/* The backend's FIN first, or both at once: the backend keeps addresses and ports for a while. */
static void the_backend_closes_first_or_both_at_once(void)
{
	struct conversation c = established(9, 1), d = established(9, 2);

	LEADS(c, BACKEND, TCP_FIN | TCP_ACK, 1, 1, 0, CLOSING);
	LEADS(c, CLIENT, TCP_ACK, 1, 2, 0, CLOSING);
	LEADS(c, CLIENT, TCP_FIN | TCP_ACK, 1, 2, 0, CLOSING);
	LEADS(c, BACKEND, TCP_ACK, 2, 2, 0, TIME_WAIT);
	LEADS(c, CLIENT, TCP_FIN | TCP_ACK, 1, 2, 0, TIME_WAIT); /* again: the backend's answer was lost */
	LEADS(c, BACKEND, TCP_ACK, 2, 2, 0, TIME_WAIT);

	LEADS(d, CLIENT, TCP_FIN | TCP_ACK, 1, 1, 0, CLOSING);
	LEADS(d, BACKEND, TCP_FIN | TCP_ACK, 1, 1, 0, CLOSING); /* it has not seen the client's */
	LEADS(d, CLIENT, TCP_ACK, 2, 2, 0, CLOSING);
	LEADS(d, BACKEND, TCP_ACK, 2, 2, 0, TIME_WAIT);
	CHECK(!t.arena->listener_count[0].live && !proven(0), "they are still counted");
}

/* A client that uses its port again after an orderly end comes from the same port to the same backend. */
static void a_port_used_again_keeps_its_translation(void)
{
	for (int who = 0; who < 2; who++) {
		struct conversation c = established(9, (uint32_t)who);
		struct build was = c.sent;
		uint32_t live = ps_shard_at(t.arena, 9)->live;

		end_orderly(&c, who);
		shape.bad_checksum = true;
		segment(&c, CLIENT, TCP_SYN, 100000, 0, 0);
		CHECK(ps_state_ended(entry_of(&c)->state), "a wrong checksum opens it");
		shape.bad_checksum = false;
		first[CLIENT] += 100000;
		first[BACKEND] += 900000;
		LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN);
		CHECK(!memcmp(c.sent.source, was.source, 16) && c.sent.sport == was.sport &&
			      !memcmp(c.sent.destination, was.destination, 16),
		      "another translation");
		CHECK(ps_shard_at(t.arena, 9)->live == live, "a second entry");
		CHECK(t.counters[PS_C_FLOWS_CREATED] == 2 * ((uint32_t)who + 1) &&
			      t.counters[PS_C_FLOWS_ENDED] == (uint32_t)who + 1 &&
			      t.arena->listener_count[0].created == 2 * ((uint32_t)who + 1),
		      "it is no new flow");
		LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
		LEADS(c, CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
		CHECK(proven(0) == 1 + who, "%d proven", proven(0));
		LEADS(c, CLIENT, TCP_ACK, 1, 1, 10, ESTABLISHED);
	}
}

/* A FIN with bytes missing before it counts once the other side has acknowledged it. */
static void a_fin_ahead_of_a_gap_counts_when_it_is_acknowledged(void)
{
	for (int side = 0; side < 2; side++) {
		struct conversation c = established(9, (uint32_t)side);

		LEADS(c, side, TCP_FIN | TCP_ACK, 101, 1, 0, ESTABLISHED);
		LEADS(c, !side, TCP_ACK, 1, 1, 0, ESTABLISHED);
		LEADS(c, side, TCP_ACK, 1, 1, 100, ESTABLISHED);
		LEADS(c, !side, TCP_ACK, 1, 102, 0, CLOSING);
	}
}

/* A byte behind a FIN shows that it was none. */
static void data_behind_a_fin_shows_that_it_was_none(void)
{
	for (int side = 0; side < 2; side++) {
		struct conversation c = established(9, (uint32_t)side);

		LEADS(c, side, TCP_FIN | TCP_ACK, 1, 1, 0, CLOSING);
		LEADS(c, side, TCP_ACK, 1, 1, 100, ESTABLISHED);
		LEADS(c, !side, TCP_ACK, 1, 101, 0, ESTABLISHED);
	}
}

/* The end that the backend made first is so too if a FIN came before that was none. */
static void a_fin_that_was_none_does_not_hide_that_the_backend_closed_first(void)
{
	struct conversation c = established(9, 1);

	LEADS(c, BACKEND, TCP_FIN | TCP_ACK, 1, 1, 0, CLOSING);
	LEADS(c, BACKEND, TCP_FIN | TCP_ACK, 1, 1, 100, CLOSING); /* the real one, behind 100 bytes */
	LEADS(c, CLIENT, TCP_FIN | TCP_ACK, 1, 102, 0, CLOSING);
	LEADS(c, BACKEND, TCP_ACK, 102, 2, 0, TIME_WAIT);
}

/* Only segments in the window keep a connection from idling out; windows are scaled if both sides said so. */
static void the_window_decides_what_keeps_a_connection(void)
{
	struct conversation c = established(9, 1), d = client_in(9, 2), e = client_in(9, 3);

	t.handler.now += 10;
	LEADS(c, BACKEND, TCP_ACK, 1 + 10000 + 5, 1, 10, ESTABLISHED); /* beyond what the client has offered */
	LEADS(c, BACKEND, TCP_ACK, 1 - 20000u, 1, 10, ESTABLISHED);    /* long past */
	LEADS(c, CLIENT, TCP_ACK, 1 + 65535 + 5, 1, 10, ESTABLISHED);  /* beyond what a SYN can offer */
	LEADS(c, CLIENT, TCP_ACK, 1, 2, 10, ESTABLISHED);	       /* acknowledges what it has not sent */
	CHECK(!refreshed(&c), "none of them is of a side");
	LEADS(c, CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	CHECK(refreshed(&c), "a keepalive's answer is");
	t.handler.now += 10;
	LEADS(c, BACKEND, TCP_ACK, 0, 1, 0, ESTABLISHED);
	CHECK(refreshed(&c), "a keepalive is");

	shape.window = 1000;
	shape.scale = 1 + 7;
	LEADS(d, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(d, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	shape.scale = 0;
	LEADS(d, CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	LEADS(d, BACKEND, TCP_ACK, 1, 1, 0, ESTABLISHED);
	t.handler.now += 10;
	LEADS(d, BACKEND, TCP_ACK, 1 + 1000 * 128 + 100, 1, 10, ESTABLISHED);
	LEADS(d, CLIENT, TCP_ACK, 1 + 1000 * 128 + 100, 1, 10, ESTABLISHED);
	CHECK(!refreshed(&d), "beyond 1000 << 7");
	LEADS(d, CLIENT, TCP_ACK, 1 + 1000 * 128, 1, 10, ESTABLISHED);
	CHECK(refreshed(&d), "up to 1000 << 7");
	t.handler.now += 10;
	LEADS(d, BACKEND, TCP_ACK, 1 + 1000 * 128, 11 + 1000 * 128, 10, ESTABLISHED);
	CHECK(refreshed(&d), "up to 1000 << 7 of the other side");

	shape.scale = 1 + 7; /* the client alone */
	LEADS(e, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	shape.scale = 0;
	LEADS(e, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	LEADS(e, CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	t.handler.now += 10;
	LEADS(e, BACKEND, TCP_ACK, 1 + 1100, 1, 10, ESTABLISHED);
	LEADS(e, CLIENT, TCP_ACK, 1 + 65535 + 5, 1, 10, ESTABLISHED);
	CHECK(!refreshed(&e), "a window is scaled though the backend did not say so");
	LEADS(e, CLIENT, TCP_ACK, 1 + 900, 1, 10, ESTABLISHED);
	CHECK(refreshed(&e), "in a window of 1000");
}

/* A client may ask again with another number, and others with its addresses; the backend may answer any. */
static void any_of_several_syns_may_be_answered(void)
{
	for (uint32_t asked = 2; asked <= 5; asked++)
		for (uint32_t answered = 0; answered < asked; answered++) {
			struct conversation c = client_in(9, asked * 10 + answered);
			uint32_t number = answered * 50000 + 1;

			shape.scale = 1 + 7;
			for (uint32_t i = 0; i < asked; i++)
				LEADS(c, CLIENT, TCP_SYN, i * 50000, 0, 0, SYN);
			if (asked == 2) /* neither */
				LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 700, 30000, 0, SYN);
			segment(&c, BACKEND, TCP_SYN | TCP_ACK, 0, number, 0);
			shape.scale = 0;
			segment(&c, BACKEND, TCP_SYN | TCP_ACK, 800, 40000, 0); /* by somebody else: to none of them */
			CHECK(!entry_established(&c), "of %u the answer to %u", asked, answered);
			segment(&c, CLIENT, TCP_ACK, number, 2, 0);
			segment(&c, CLIENT, TCP_ACK, number, 0, 0);
			CHECK(!entry_established(&c), "it has not acknowledged the answer");
			/* The last one takes the place of an answer to a SYN that was forgotten. */
			if (answered && answered < asked - 1)
				segment(&c, BACKEND, TCP_SYN | TCP_ACK, 0, number, 0);
			LEADS(c, CLIENT, TCP_ACK, number, 1, 0, ESTABLISHED);
			LEADS(c, BACKEND, TCP_ACK, 1, number, 1000, ESTABLISHED);
			t.handler.now += 10;
			LEADS(c, CLIENT, TCP_ACK, number, 1001, 1000, ESTABLISHED);
			CHECK(refreshed(&c), "its numbers are not those of the connection");
		}
}

/* Resets of hosts that somebody asked in the client's name, and SYNs that come again, do not hide the client's own. */
static void a_syn_that_comes_again_pushes_none_out(void)
{
	struct conversation c = client_in(9, 1);

	LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(c, CLIENT, TCP_SYN, 70000, 0, 0, SYN);
	LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(c, CLIENT, TCP_SYN, 70000, 0, 0, SYN);
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN_ACK);
	LEADS(c, CLIENT, TCP_RST, 1, 0, 0, SYN);
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 500, 9999, 0, SYN); /* no SYN has been forgotten */
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 900, 70001, 0, SYN_ACK);
	LEADS(c, CLIENT, TCP_ACK, 70001, 901, 0, ESTABLISHED);
}

/* Data in a SYN may be acknowledged, and the backend may send before the client has confirmed (RFC 7413). */
static void fast_open_data_belongs_to_the_connection(void)
{
	struct conversation c = client_in(9, 1), d = client_in(9, 2);

	LEADS(c, CLIENT, TCP_SYN, 0, 0, 400, SYN);
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 401, 0, SYN_ACK);
	LEADS(c, BACKEND, TCP_ACK, 1, 401, 1000, SYN_ACK);
	LEADS(c, CLIENT, TCP_ACK, 401, 1001, 0, ESTABLISHED);
	LEADS(c, CLIENT, TCP_FIN | TCP_ACK, 401, 1001, 0, CLOSING);
	LEADS(d, CLIENT, TCP_SYN, 0, 0, 400, SYN);
	LEADS(d, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK); /* the data is not taken: it comes again */
	LEADS(d, CLIENT, TCP_ACK, 1, 1, 400, ESTABLISHED);
}

/* A backend may say all that it has to say, and its FIN, before the client has confirmed. */
static void a_fin_before_the_client_has_confirmed_is_remembered(void)
{
	struct conversation c = client_in(9, 1);

	LEADS(c, CLIENT, TCP_SYN, 0, 0, 400, SYN);
	LEADS(c, BACKEND, TCP_SYN | TCP_ACK, 0, 401, 0, SYN_ACK);
	LEADS(c, BACKEND, TCP_FIN | TCP_ACK, 1, 401, 100, SYN_ACK);
	LEADS(c, CLIENT, TCP_ACK, 401, 102, 0, CLOSING);
	LEADS(c, CLIENT, TCP_FIN | TCP_ACK, 401, 102, 0, CLOSING);
	LEADS(c, BACKEND, TCP_ACK, 102, 402, 0, TIME_WAIT);
}

/* A first fragment does not show where its segment ends: its receiver does, by what it acknowledges. */
static void the_end_of_a_fragmented_segment_is_learned_from_its_acknowledgement(void)
{
	for (int side = 0; side < 2; side++) {
		struct conversation c = established(9, (uint32_t)side);
		struct build b = from(&c, side);

		LEADS(c, !side, TCP_ACK, 1, 1 + 5000, 0, ESTABLISHED);
		b.tcp_flags = TCP_ACK;
		b.seq = first[side] + 1;
		b.ack = first[!side] + 1;
		b.payload = 800;
		b.window = 10000;
		b.more_fragments = true;
		CHECK(say(&c, b, side == BACKEND) == PS_TRANSMIT, "the first fragment");
		t.handler.now += 10;
		LEADS(c, !side, TCP_ACK, 1, 1 + 5000, 0, ESTABLISHED);
		CHECK(!refreshed(&c), "5000 bytes are acknowledged, and 800 were sent");
		entry_of(&c)->flags |= PS_FLOW_FRAGMENTED; /* as the next fragment does */
		LEADS(c, !side, TCP_ACK, 1, 1 + 70000, 0, ESTABLISHED);
		CHECK(!refreshed(&c), "no packet is that long");
		LEADS(c, !side, TCP_ACK, 1, 1 + 5000, 0, ESTABLISHED);
		CHECK(refreshed(&c), "its receiver has all of it");
		LEADS(c, side, TCP_RST, 5001, 0, 0, CLOSED);
	}
}

/* ---- UDP ---------------------------------------------------------------------------------------------------- */

static struct conversation asks(uint32_t bucket, uint32_t number)
{
	struct conversation c = client(number);

	c.forward.protocol = 17;
	c.stamp = stamp_of_flow(&t, c.forward.source, c.forward.sport, c.forward.destination, c.forward.dport, 17);
	c.stamp.bucket = (uint16_t)bucket;
	CHECK(say(&c, c.forward, false) == PS_TRANSMIT, "a question");
	c.open = true;
	return c;
}

static void exchange(struct conversation *c, uint8_t state)
{
	CHECK(say(c, from(c, BACKEND), true) == PS_TRANSMIT, "an answer");
	CHECK(say(c, c->forward, false) == PS_TRANSMIT, "a question");
	CHECK(entry_of(c)->state == state, "state %u, expected %u", entry_of(c)->state, state);
}

/* One answer makes a UDP flow answered; only exchanges over two seconds make it assured. */
static void udp_is_assured_by_exchanges_over_some_time(void)
{
	struct conversation c = asks(9, 1), d = asks(9, 2), e = asks(9, 3);

	CHECK(entry_of(&c)->state == PS_FLOW_UNANSWERED, "state %u", entry_of(&c)->state);
	for (int i = 0; i < 30; i++)
		CHECK(say(&c, c.forward, false) == PS_TRANSMIT, "a question");
	t.handler.now += 100;
	CHECK(say(&c, c.forward, false) == PS_TRANSMIT && entry_of(&c)->state == PS_FLOW_UNANSWERED,
	      "questions alone prove nothing");
	exchange(&c, PS_FLOW_ANSWERED);
	for (int i = 0; i < 30; i++)
		exchange(&c, PS_FLOW_ANSWERED); /* all at once */
	t.handler.now += PS_UDP_ASSURED_TICKS - 1;
	exchange(&c, PS_FLOW_ANSWERED);
	t.handler.now += 1;
	CHECK(!proven(1), "%d proven", proven(1));
	exchange(&c, PS_FLOW_ASSURED);
	CHECK(proven(1) == 1, "%d proven", proven(1));
	/* One question and many answers, as an attacker with a forged source would have them. */
	for (int i = 0; i < 30; i++) {
		t.handler.now += 5;
		CHECK(say(&d, from(&d, BACKEND), true) == PS_TRANSMIT, "an answer");
		CHECK(entry_of(&d)->state == PS_FLOW_ANSWERED, "state %u", entry_of(&d)->state);
	}
	/* Two exchanges, far from each other. */
	exchange(&e, PS_FLOW_ANSWERED);
	t.handler.now += 500;
	exchange(&e, PS_FLOW_ANSWERED);
}

/* ---- what a shard holds, and who goes when it is full ------------------------------------------------------- */

/* One listener (IPv4, TCP), one backend, one SNAT address: a pair of address and backend has few ports. */
static void one_pair(void)
{
	struct ps_config *c = t.config;

	c->listeners = c->snats = 1;
	c->listener[0].backends = c->listener[0].lookup_size = 1;
	c->lookup[0] = 0;
	ps_configure(&t.handler, c);
}

/* A flood that nobody answers of one listener takes nothing that half-open flows of another one have. */
static void a_flood_of_one_listener_leaves_the_half_open_flows_of_others(void)
{
	struct conversation asked[12], opening[4];

	for (uint32_t i = 0; i < 12; i++)
		asked[i] = asks(9, i);
	for (uint32_t i = 0; i < 4; i++) {
		opening[i] = client_in(9, i);
		memcpy(opening[i].forward.destination, t.vip[0], 16);
	}
	for (uint32_t i = 0; i < 5000; i++) {
		struct conversation c = client_in(9, 1000 + i);

		CHECK(segment(&c, CLIENT, TCP_SYN, 0, 0, 0) == PS_TRANSMIT, "the flood itself goes on");
	}
	CHECK(ps_shard_at(t.arena, 9)->list[PS_LIST_HALF_OPEN].count <= 32, "half-open flows are bounded");
	for (uint32_t i = 0; i < 12; i++)
		CHECK(entry_of(&asked[i]), "flow %u of the other listener went", i);
	for (uint32_t i = 0; i < 4; i++) {
		/* In the middle of it a client of the flooded listener still gets through. */
		LEADS(opening[i], CLIENT, TCP_SYN, 0, 0, 0, SYN);
		LEADS(opening[i], BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
		LEADS(opening[i], CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	}
}

/* The same with more of them than a victim is looked for among at once: hardly any goes. */
static void a_flood_behind_many_older_flows_of_another_listener_takes_hardly_any(void)
{
	struct conversation asked[90];
	uint32_t gone = 0;

	stack_free(&t);
	stack_new(&t, 256, 400, 512);
	for (uint32_t i = 0; i < 90; i++)
		asked[i] = asks(9, i);
	for (uint32_t i = 0; i < 5000; i++) {
		struct conversation c = client_in(9, 1000 + i);

		segment(&c, CLIENT, TCP_SYN, 0, 0, 0);
	}
	for (uint32_t i = 0; i < 90; i++)
		gone += !entry_of(&asked[i]);
	CHECK(gone <= 2, "%u flows of the other listener went", gone);
}

/* Established flows of one listener leave others the part of the shard that is theirs. */
static void a_listener_cannot_take_the_part_of_another(void)
{
	/* Half of 64 entries for 4 listeners: 8 each. */
	uint32_t mine = 0;

	for (uint32_t i = 0; i < 100; i++) {
		struct conversation c = client_in(9, i);

		if (segment(&c, CLIENT, TCP_SYN, 0, 0, 0) != PS_TRANSMIT)
			continue;
		segment(&c, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0);
		mine += segment(&c, CLIENT, TCP_ACK, 1, 1, 0) == PS_TRANSMIT;
	}
	CHECK(mine == 64 - 3 * 8, "%u flows of one listener in 64 entries", mine);
	CHECK(t.counters[PS_C_DROP_SHARD_FULL] == 100 - mine, "%lu", t.counters[PS_C_DROP_SHARD_FULL]);
	for (uint32_t i = 0; i < 8; i++) {
		struct conversation c = asks(9, i);

		exchange(&c, PS_FLOW_ANSWERED);
		assure(&c);
	}
	whole();
}

/* Nor can it with connections that it opens first and confirms later. */
static void what_is_kept_for_others_is_kept_when_a_handshake_ends_too(void)
{
	static struct conversation opened[64];
	uint32_t mine = 0, n = 0;

	for (uint32_t i = 0; i < 32; i++)
		established(9, i);
	for (uint32_t i = 0; i < 32; i++) {
		opened[n] = client_in(9, 100 + i);
		if (segment(&opened[n], CLIENT, TCP_SYN, 0, 0, 0) == PS_TRANSMIT &&
		    segment(&opened[n], BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0) == PS_TRANSMIT)
			n++;
	}
	CHECK(n > 20, "%u half-open flows beside 32 established ones", n);
	for (uint32_t i = 0; i < n; i++)
		if (entry_of(&opened[i]))
			mine += segment(&opened[i], CLIENT, TCP_ACK, 1, 1, 0) == PS_TRANSMIT;
	CHECK(32 + mine == 64 - 3 * 8, "%u flows of one listener in 64 entries", 32 + mine);
	for (uint32_t i = 0; i < 8; i++) {
		struct conversation c = asks(9, i);

		exchange(&c, PS_FLOW_ANSWERED);
		assure(&c);
	}
}

/* A full shard evicts flows that have closed, the oldest first, then half-open ones, then TIME_WAIT, never others. */
static void a_full_shard_evicts_in_order(void)
{
	struct conversation lives[8], closed[2], waiting[2], half[4];
	uint32_t n = 100;

	stack_free(&t);
	stack_new(&t, 256, 16, 32);
	one_pair();
	for (uint32_t i = 0; i < 8; i++)
		lives[i] = established(9, i);
	for (uint32_t i = 0; i < 2; i++) {
		waiting[i] = established(9, 10 + i);
		end_orderly(&waiting[i], BACKEND);
		closed[i] = established(9, 20 + i);
		end_orderly(&closed[i], CLIENT);
	}
	for (uint32_t i = 0; i < 4; i++) {
		half[i] = client_in(9, 30 + i);
		LEADS(half[i], CLIENT, TCP_SYN, 0, 0, 0, SYN);
	}
	CHECK(ps_shard_at(t.arena, 9)->live == 16, "it is full");
	for (uint32_t i = 0; i < 2; i++, n++) {
		established(9, n);
		CHECK(!entry_of(&closed[i]) && (i || entry_of(&closed[1])), "closed flow %u is still there", i);
	}
	for (uint32_t i = 0; i < 4; i++, n++) {
		established(9, n);
		CHECK(!entry_of(&half[i]) && (i == 3 || entry_of(&half[i + 1])), "half-open flow %u is still there", i);
		CHECK(entry_of(&waiting[0]) && entry_of(&waiting[1]), "TIME_WAIT went before");
	}
	for (uint32_t i = 0; i < 2; i++, n++) {
		established(9, n);
		CHECK(!entry_of(&waiting[i]) && (i || entry_of(&waiting[1])), "flow %u in TIME_WAIT is there", i);
	}
	half[0] = client_in(9, n);
	CHECK(segment(&half[0], CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && t.counters[PS_C_DROP_SHARD_FULL] == 1,
	      "16 connections live");
	for (uint32_t i = 0; i < 8; i++)
		LEADS(lives[i], CLIENT, TCP_ACK, 1, 1, 10, ESTABLISHED);
	CHECK(t.counters[PS_C_FLOWS_RECYCLED] == 8, "%lu recycled", t.counters[PS_C_FLOWS_RECYCLED]);
}

/* Without a free port an opener takes that of a closed flow, then of a half-open one, the oldest first. */
static void an_opener_takes_the_port_of_an_ended_or_half_open_flow(void)
{
	struct conversation c[8], more;

	stack_free(&t);
	stack_new(&t, 8192, 16, 32);
	one_pair(); /* 7 ports in a bucket */
	for (uint32_t i = 0; i < 7; i++) {
		t.handler.now++;
		c[i] = established(9, i);
	}
	more = client_in(9, 50);
	CHECK(segment(&more, CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && t.counters[PS_C_DROP_NO_PORT] == 1,
	      "an eighth connection");
	end_orderly(&c[0], BACKEND);
	CHECK(segment(&more, CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && t.counters[PS_C_DROP_NO_PORT] == 2,
	      "the backend keeps the port of one in TIME_WAIT");
	t.handler.now++;
	end_orderly(&c[2], CLIENT);
	t.handler.now++;
	end_orderly(&c[1], CLIENT);
	t.handler.now++;
	LEADS(more, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	CHECK(more.sent.sport == c[2].sent.sport && !entry_of(&c[2]) && entry_of(&c[1]),
	      "not that of the one longest closed");
	t.handler.now++;
	more = client_in(9, 51);
	LEADS(more, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	CHECK(more.sent.sport == c[1].sent.sport && !entry_of(&c[1]), "not that of the other");
	t.handler.now++;
	more = client_in(9, 52);
	LEADS(more, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	CHECK(more.sent.sport == c[2].sent.sport, "not that of the half-open flow that is longest unused");
	for (uint32_t i = 3; i < 7; i++)
		LEADS(c[i], CLIENT, TCP_ACK, 1, 1, 10, ESTABLISHED);
	CHECK(entry_of(&c[0])->state == PS_FLOW_TIME_WAIT, "TIME_WAIT went");
}

/* Listeners with the same backends share their ports, but a flood of one takes those of its own half-open flows. */
static void a_flood_without_ports_takes_those_of_its_own_half_open_flows(void)
{
	struct ps_config *config;
	struct conversation opening[2];

	stack_free(&t);
	stack_new(&t, 8192, 64, 128);
	config = t.config;
	config->listener[1] = config->listener[0];
	config->listener[1].port = htons(ntohs(config->listener[0].port) + 1);
	config->listener[1].number = 8;
	listener_is(t.arena, 8, config->listener[1].address, config->listener[1].port, 6);
	one_pair(); /* 7 ports in a bucket */
	config->listeners = 2;
	config->listener[1].backends = config->listener[1].lookup_size = 1;
	ps_configure(&t.handler, config);
	for (uint32_t i = 0; i < 2; i++) {
		opening[i] = client_in(9, i);
		opening[i].forward.dport = config->listener[1].port;
		LEADS(opening[i], CLIENT, TCP_SYN, 0, 0, 0, SYN);
	}
	for (uint32_t i = 0; i < 200; i++) {
		struct conversation c = client_in(9, 1000 + i);

		t.handler.now += i % 3 == 0;
		LEADS(c, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	}
	for (uint32_t i = 0; i < 2; i++) {
		CHECK(entry_of(&opening[i]), "flow %u of the other listener went", i);
		LEADS(opening[i], BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
		LEADS(opening[i], CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	}
}

/* ---- limits --------------------------------------------------------------------------------------------------- */

/* newFlowsPerSecond: a second's worth at once, then one each part of a second; ports that are used again count. */
static void openers_beyond_the_rate_are_dropped(void)
{
	struct conversation c;
	uint32_t passed = 0, n;

	t.config->listener[0].new_flows_per_second = 5;
	for (n = 0; n < 20; n++) {
		c = client(n);
		passed += segment(&c, CLIENT, TCP_SYN, 0, 0, 0) == PS_TRANSMIT;
	}
	CHECK(passed == 5 && t.counters[PS_C_DROP_LIMIT_RATE] == 15, "%u passed", passed);
	for (uint32_t i = 0; i < 10; i++) {
		t.handler.now_ns += 100000000;
		for (uint32_t j = 0; j < 3; j++, n++) {
			c = client(n);
			passed += segment(&c, CLIENT, TCP_SYN, 0, 0, 0) == PS_TRANSMIT;
		}
	}
	CHECK(passed == 10, "%u in a second more", passed - 5);
	t.handler.now_ns += 1000000000;
	c = established(9, n);
	end_orderly(&c, CLIENT);
	for (passed = 0, n = 0; n < 20; n++) {
		passed += segment(&c, CLIENT, TCP_SYN, 100000 * (n + 1), 0, 0) == PS_TRANSMIT;
		segment(&c, BACKEND, TCP_SYN | TCP_ACK, 100000 * (n + 1), 100000 * (n + 1) + 1, 0);
		segment(&c, CLIENT, TCP_ACK, 100000 * (n + 1) + 1, 100000 * (n + 1) + 1, 0);
		segment(&c, CLIENT, TCP_RST, 100000 * (n + 1) + 1, 0, 0);
	}
	CHECK(passed == 4, "%u connections of one port", passed);
}

/* maxFlows counts proven flows only; at the limit neither an opener passes nor a proof, until one ends. */
static void proven_flows_are_limited(void)
{
	struct conversation c[4], d[2], more;

	t.config->listener[0].max_flows = 4;
	for (uint32_t i = 0; i < 200; i++) {
		more = client(1000 + i);
		CHECK(segment(&more, CLIENT, TCP_SYN, 0, 0, 0) == PS_TRANSMIT, "forged openers use up nothing");
	}
	for (uint32_t i = 0; i < 2; i++) {
		d[i] = client_in(9, 50 + i);
		LEADS(d[i], CLIENT, TCP_SYN, 0, 0, 0, SYN);
		LEADS(d[i], BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	}
	for (uint32_t i = 0; i < 4; i++)
		c[i] = established(9, i);
	CHECK(segment(&d[0], CLIENT, TCP_ACK, 1, 1, 0) == PS_DROP && t.counters[PS_C_DROP_LIMIT_FLOWS] == 1, "a proof");
	CHECK(entry_of(&d[0])->state == PS_FLOW_SYN_ACK, "state %u", entry_of(&d[0])->state);
	more = client_in(9, 60);
	CHECK(segment(&more, CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && t.counters[PS_C_DROP_LIMIT_FLOWS] == 2,
	      "an opener");
	for (uint32_t i = 0; i < 4; i++)
		LEADS(c[i], CLIENT, TCP_ACK, 1, 1, 10, ESTABLISHED);
	LEADS(c[0], CLIENT, TCP_RST, 11, 0, 0, CLOSED);
	LEADS(d[0], CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	CHECK(segment(&c[0], CLIENT, TCP_SYN, 100000, 0, 0) == PS_DROP, "a port that is used again");
	CHECK(proven(0) == 4, "%d proven", proven(0));
}

/* maxFlowsPerClient: of one listener and one client, others are not concerned; no count is left when flows end. */
static void the_proven_flows_of_a_client_are_limited(void)
{
	struct conversation c[3], more;

	for (uint32_t i = 0; i < 4; i++)
		t.config->listener[i].max_flows_per_client = 3;
	for (uint32_t i = 0; i < 3; i++)
		c[i] = established(9, i);
	more = client_in(9, 3);
	CHECK(segment(&more, CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && t.counters[PS_C_DROP_LIMIT_CLIENT] == 1,
	      "a fourth");
	more = asks(9, 4); /* another listener */
	exchange(&more, PS_FLOW_ANSWERED);
	assure(&more);
	for (uint32_t i = 0; i < 3; i++)
		established(9, 256 + i); /* another client */
	CHECK(ps_client_flows(ps_arena_clients(t.arena), c[0].forward.source, 0) == 3, "a client's flows");
	end_orderly(&c[0], CLIENT);
	more = client_in(9, 3);
	LEADS(more, CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(more, BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	c[0] = client_in(9, 5);
	LEADS(c[0], CLIENT, TCP_SYN, 0, 0, 0, SYN);
	LEADS(c[0], BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	LEADS(c[0], CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
	CHECK(segment(&more, CLIENT, TCP_ACK, 1, 1, 0) == PS_DROP && t.counters[PS_C_DROP_LIMIT_CLIENT] == 2,
	      "a proof");
	/* An early reset of its own does not make a flow one that nobody counts. */
	LEADS(c[1], CLIENT, TCP_ACK, 1, 1, 100, ESTABLISHED);
	LEADS(c[1], CLIENT, TCP_RST, 1, 0, 0, CLOSED);
	LEADS(c[1], BACKEND, TCP_ACK, 1, 101, 0, ESTABLISHED);
	CHECK(ps_client_flows(ps_arena_clients(t.arena), c[0].forward.source, 0) == 3, "a client's flows");
	t.handler.now += 80000;
	for (uint32_t b = 0; b < 256; b++)
		ps_shard_sweep(t.arena, ps_shard_at(t.arena, b), t.config->timeout, t.handler.now);
	for (uint32_t i = 0; i < 4; i++)
		CHECK(!t.arena->listener_count[i].live && !proven(i), "listener %u counts", i);
	CHECK(!ps_client_flows(ps_arena_clients(t.arena), c[0].forward.source, 0), "the client counts");
}

/* What the set before has left counts for the limits, and as load of its backends. */
static void what_the_set_before_has_left_counts_too(void)
{
	static ps_client_count table[CLIENTS];
	struct ps_connection_list list = { .at = (uint8_t *)table, .clients = CLIENTS }; /* of no bucket */
	struct ps_clients kept = { table, CLIENTS, t.arena->kept_key };
	struct ps_listener_name *name = &t.arena->listener[0];
	struct ps_listener *l = &t.config->listener[0];
	struct conversation c, more = client_in(9, 1);
	ps_client_count *place;
	uint64_t tag;

	t.arena->kept_key[0] = 77;
	name->kept_as = 700 + 1;
	t.handler.list = &list;
	l->max_flows_per_client = 3;
	c = established(9, 0);
	place = ps_client_group(kept, c.forward.source, 700, &tag);
	*place = tag | 2;
	CHECK(segment(&more, CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && t.counters[PS_C_DROP_LIMIT_CLIENT] == 1, "1 + 2");
	established(9, 256); /* another client */
	*place = tag | 1;
	l->max_flows = 5;
	name->kept = 3;
	CHECK(segment(&more, CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && t.counters[PS_C_DROP_LIMIT_FLOWS] == 1, "2 + 3");
	name->kept = 2;
	established(9, 1);
	t.handler.list = NULL; /* all has ended */
	name->kept = name->kept_as = 0;
	established(9, 2);
	t.arena->backend[0].kept = t.arena->backend[2].kept = 5;
	for (uint32_t i = 0; i < 5; i++) {
		c = asks(9, 300 + i);
		CHECK(entry_of(&c)->backend == 1, "flow %u: backend %u", i, entry_of(&c)->backend);
	}
}

/* ---- backends that get no new flows ----------------------------------------------------------------------------- */

/* The last of the three backends of a listener is down from now on. */
static void third_backend_down(uint32_t flags)
{
	struct ps_listener *l = &t.config->listener[0];

	l->backends = 2;
	l->down = 1;
	l->flags = flags;
	for (uint32_t i = 0; i < 7; i++)
		t.config->lookup[i] = (uint16_t)(i % 2);
	t.handler.now += 5;
	ps_configure(&t.handler, t.config);
	t.handler.now += 5;
}

static bool at_third(const struct conversation *c) { return !memcmp(c->sent.destination, t.backend[0][2], 16); }

/* A client that asks again for a connection gets another backend if its own gets no new flows any more. */
static void a_syn_again_leaves_a_backend_that_does_not_serve(void)
{
	struct conversation c[40];
	uint32_t moved = 0;

	for (uint32_t i = 0; i < 40; i++) {
		c[i] = client(i);
		LEADS(c[i], CLIENT, TCP_SYN, 0, 0, 0, SYN);
		if (i >= 20) { /* one that has ended */
			LEADS(c[i], BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
			LEADS(c[i], CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
			LEADS(c[i], CLIENT, TCP_RST, 1, 0, 0, CLOSED);
		}
	}
	third_backend_down(0);
	for (uint32_t i = 0; i < 40; i++) {
		struct build was = c[i].sent;
		bool leaves = at_third(&c[i]);

		moved += leaves;
		LEADS(c[i], CLIENT, TCP_SYN, i < 20 ? 0 : 90000, 0, 0, SYN);
		CHECK(!at_third(&c[i]), "it stays with a backend that does not serve");
		CHECK(leaves || !memcmp(&was, &c[i].sent, sizeof(was)), "it left one that does");
	}
	CHECK(moved > 5, "%u moved", moved);
	/* One that is answered has left no backend. */
	CHECK(t.arena->backend_count[2].live == 0, "%d", t.arena->backend_count[2].live);
}

/* The backend has answered, but its answer was lost, and then it died: the client's SYN comes again. */
static void a_syn_again_leaves_a_backend_that_has_answered_and_is_gone(void)
{
	struct conversation c[60];
	uint32_t moved = 0;

	for (uint32_t i = 0; i < 60; i++) {
		c[i] = client(i);
		LEADS(c[i], CLIENT, TCP_SYN, 0, 0, 0, SYN);
		LEADS(c[i], BACKEND, TCP_SYN | TCP_ACK, 0, 1, 0, SYN_ACK);
	}
	third_backend_down(0);
	for (uint32_t i = 0; i < 60; i++) {
		bool leaves = at_third(&c[i]), removed = i >= 20, made_up = i >= 40;

		if (i == 20) /* not in the configuration any more */
			t.config->listener[0].down = 0;
		if (!leaves)
			LEADS(c[i], CLIENT, TCP_SYN, 0, 0, 0, SYN_ACK);
		else if (made_up) /* a backend that was taken out may still finish it */
			LEADS(c[i], CLIENT, TCP_SYN, 90000, 0, 0, SYN_ACK);
		else /* of one that is down nothing can be expected, whoever asks */
			LEADS(c[i], CLIENT, TCP_SYN, removed ? 0 : i * 1000, 0, 0, SYN);
		CHECK(at_third(&c[i]) == (leaves && made_up), "client %u is at the wrong backend", i);
		if (made_up)
			LEADS(c[i], CLIENT, TCP_ACK, 1, 1, 0, ESTABLISHED);
		moved += leaves && !made_up;
	}
	CHECK(moved > 5, "%u moved", moved);
}

/* Who does not see the connection does not bring about its end by asking for it. */
static void a_made_up_segment_resets_no_flow_of_a_backend_that_is_down(void)
{
	struct conversation c[20];
	uint32_t down = 0;

	for (uint32_t i = 0; i < 20; i++)
		c[i] = established(client(i).stamp.bucket, i);
	third_backend_down(PS_LISTENER_RESET_BACKEND_DOWN);
	for (uint32_t i = 0; i < 20; i++) {
		down += at_third(&c[i]);
		LEADS(c[i], CLIENT, TCP_ACK, 0x40000000, 1, 0, ESTABLISHED);
		LEADS(c[i], CLIENT, TCP_ACK, 1, 0x40000000, 10, ESTABLISHED);
		LEADS(c[i], CLIENT, TCP_FIN | TCP_ACK, 0x40000000, 0x40000000, 0, ESTABLISHED);
		LEADS(c[i], CLIENT, TCP_RST, 0x40000000, 0, 0, ESTABLISHED);
		LEADS(c[i], CLIENT, TCP_RST | TCP_ACK, 2, 1, 0, ESTABLISHED);
		LEADS(c[i], CLIENT, 0, 1, 0, 0, ESTABLISHED);
		shape.bad_checksum = true;
		LEADS(c[i], CLIENT, TCP_ACK, 1, 1, 10, ESTABLISHED);
		shape.bad_checksum = false;
		CHECK(segment(&c[i], CLIENT, TCP_ACK, 1, 1, 10) == PS_TRANSMIT && !entry_of(&c[i]) == at_third(&c[i]),
		      "the client itself");
	}
	CHECK(down > 2 && t.counters[PS_C_RESETS_SENT] == down, "%u down, %lu resets", down,
	      t.counters[PS_C_RESETS_SENT]);
}

/* RESET_BACKEND_DOWN: the next packet of the client is answered by a reset, and the flow is over. */
static void flows_of_a_backend_that_is_down_are_reset(void)
{
	struct conversation c[40];
	uint32_t reset = 0;

	for (uint32_t i = 0; i < 40; i++) {
		uint32_t bucket = client(i).stamp.bucket;

		c[i] = established(bucket, i);
	}
	third_backend_down(PS_LISTENER_RESET_BACKEND_DOWN);
	for (uint32_t i = 0; i < 40; i++) {
		bool down = at_third(&c[i]);

		if (i == 20)
			t.config->listener[0].flags = 0; /* without the flag they stay */
		if (i & 1)				 /* what the backend still sends does not change that */
			LEADS(c[i], BACKEND, TCP_ACK, 1, 1, 10, ESTABLISHED);
		CHECK(segment(&c[i], CLIENT, TCP_ACK, 1, 1, 10) == PS_TRANSMIT, "neither answered nor sent on");
		if (!down || i >= 20) {
			CHECK(entry_of(&c[i])->state == PS_FLOW_ESTABLISHED, "state %u", entry_of(&c[i])->state);
			continue;
		}
		reset++;
		CHECK(!entry_of(&c[i]), "the flow is still there");
		CHECK(!memcmp(frame + 26, t.vip[0] + 12, 4) && !memcmp(frame + 30, c[i].forward.source + 12, 4) &&
			      frame[47] == TCP_RST && !l4_check(frame + 14, frame + 34, 20, 6),
		      "no reset to the client");
		CHECK(frame[41] == (uint8_t)(first[BACKEND] + 1), "its number is not what the client acknowledged");
		CHECK(segment(&c[i], CLIENT, TCP_ACK, 11, 1, 10) == PS_DROP, "it goes on without a flow");
	}
	CHECK(reset > 2 && t.counters[PS_C_RESETS_SENT] == reset, "%u reset", reset);
	CHECK(t.counters[PS_C_FLOWS_ENDED] == reset, "%lu ended", t.counters[PS_C_FLOWS_ENDED]);
}

/* REFUSE: a SYN that finds no backend is answered by a reset; without it, it is dropped. */
static void a_listener_without_backends_refuses_or_drops(void)
{
	struct conversation c = client(1);

	t.config->listener[0].backends = 0;
	CHECK(segment(&c, CLIENT, TCP_SYN, 0, 0, 0) == PS_DROP && t.counters[PS_C_DROP_NO_BACKEND] == 1, "dropped");
	t.config->listener[0].flags = PS_LISTENER_REFUSE;
	CHECK(segment(&c, CLIENT, TCP_SYN, 0, 0, 0) == PS_TRANSMIT && t.counters[PS_C_DROP_NO_BACKEND] == 1, "refused");
	CHECK(frame[47] == (TCP_RST | TCP_ACK) && frame[45] == (uint8_t)(first[CLIENT] + 1), "flags %x", frame[47]);
	CHECK(!entry_of(&c), "a flow");
}

/* Openers that are never answered take no entry and no port from a flow that lives. */
static void flood(void)
{
	static struct conversation lives[40];
	uint8_t before[ROOM];
	uint32_t l3;

	stack_new(&t, 256, 64, 128);
	random_state = 42;
	for (uint32_t i = 0; i < 40; i++) {
		struct conversation *c = &lives[i];

		do {
			draw_forward(&c->forward, random_below(2), 60000);
			c->stamp = stamp_of_flow(&t, c->forward.source, c->forward.sport, c->forward.destination,
						 htons(80), c->forward.protocol);
		} while (c->stamp.bucket != 9);
		open_both(c);
		assure(c);
		c->settled = true;
	}
	for (uint32_t i = 0; i < 20000; i++) {
		struct build b;
		struct ps_stamp stamp;

		draw_forward(&b, random_below(2), 60000);
		b.tcp_flags = TCP_SYN;
		stamp = stamp_of_flow(&t, b.source, b.sport, b.destination, htons(80), b.protocol);
		stamp.bucket = 9; /* all of them in one place */
		handle(build_frame(frame, &b, &l3), &stamp, before);
		CHECK(ps_shard_at(t.arena, 9)->list[PS_LIST_HALF_OPEN].count <= t.arena->entries / 2,
		      "half-open flows are bounded");
		if (i % 500 == 0)
			shard_check(t.arena, ps_shard_at(t.arena, 9), t.config->timeout);
	}
	for (uint32_t i = 0; i < 40; i++) {
		one_packet(&lives[i], TCP_ACK, false);
		one_packet(&lives[i], TCP_ACK, true);
	}
	CHECK(t.counters[PS_C_FLOWS_RECYCLED] > 10000, "%lu recycled", t.counters[PS_C_FLOWS_RECYCLED]);
	stack_free(&t);
}

/* received = forwarded + dropped(reason), whatever comes. */
static void garbage(void)
{
	uint8_t before[ROOM];
	uint64_t sum = 0;
	uint32_t l3, n = 200000;

	stack_new(&t, 256, 64, 128);
	random_state = 7;
	for (uint32_t i = 0; i < n; i++) {
		struct ps_stamp stamp = { .magic = PS_STAMP_MAGIC,
					  .epoch = 1,
					  .bucket = (uint16_t)random_below(256),
					  .flags = (uint16_t)random_below(16),
					  .hash = random_below(1000) };
		struct build b;
		uint32_t length;

		draw_forward(&b, random_below(2), 100);
		draw_shape(&b);
		b.tcp_flags = (uint8_t)random_below(64);
		length = build_frame(frame, &b, &l3);
		for (uint32_t hits = random_below(4); hits; hits--)
			frame[12 + random_below(length - 12)] ^= (uint8_t)(1 << random_below(8));
		if (!random_below(4))
			length = random_below(length);
		handle(length, &stamp, before);
	}
	for (int reason = PS_C_DROP_NO_STAMP; reason < PS_COUNTERS; reason++)
		sum += t.counters[reason];
	CHECK(t.counters[PS_C_FORWARDED] + sum == n, "%lu forwarded + %lu dropped of %u", t.counters[PS_C_FORWARDED],
	      sum, n);
	CHECK(t.counters[PS_C_FORWARDED] > n / 20, "%lu forwarded", t.counters[PS_C_FORWARDED]);
	whole();
	stack_free(&t);
}

static void each(void (*const tests[])(void), uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		memset(&shape, 0, sizeof(shape));
		stack_new(&t, 256, 64, 128);
		tests[i]();
		whole();
		stack_free(&t);
	}
}

int main(int argc, char **argv)
{
	static void (*const tests[])(void) = {
		a_handshake_needs_the_right_acknowledgements,
		an_opener_needs_a_right_checksum,
		a_reset_leaves_an_opening_connection_half_open,
		blind_segments_leave_it_established,
		an_exact_reset_closes,
		who_goes_on_after_an_early_reset_has_not_taken_it,
		what_was_under_way_when_a_reset_came_revives_nothing,
		the_client_closes_first,
		the_backend_closes_first_or_both_at_once,
		a_port_used_again_keeps_its_translation,
		a_fin_ahead_of_a_gap_counts_when_it_is_acknowledged,
		data_behind_a_fin_shows_that_it_was_none,
		a_fin_that_was_none_does_not_hide_that_the_backend_closed_first,
		the_window_decides_what_keeps_a_connection,
		any_of_several_syns_may_be_answered,
		a_syn_that_comes_again_pushes_none_out,
		fast_open_data_belongs_to_the_connection,
		a_fin_before_the_client_has_confirmed_is_remembered,
		the_end_of_a_fragmented_segment_is_learned_from_its_acknowledgement,
		udp_is_assured_by_exchanges_over_some_time,
		a_flood_of_one_listener_leaves_the_half_open_flows_of_others,
		a_flood_behind_many_older_flows_of_another_listener_takes_hardly_any,
		a_listener_cannot_take_the_part_of_another,
		what_is_kept_for_others_is_kept_when_a_handshake_ends_too,
		a_full_shard_evicts_in_order,
		an_opener_takes_the_port_of_an_ended_or_half_open_flow,
		a_flood_without_ports_takes_those_of_its_own_half_open_flows,
		openers_beyond_the_rate_are_dropped,
		proven_flows_are_limited,
		the_proven_flows_of_a_client_are_limited,
		what_the_set_before_has_left_counts_too,
		a_syn_again_leaves_a_backend_that_does_not_serve,
		a_syn_again_leaves_a_backend_that_has_answered_and_is_gone,
		a_made_up_segment_resets_no_flow_of_a_backend_that_is_down,
		flows_of_a_backend_that_is_down_are_reset,
		a_listener_without_backends_refuses_or_drops,
	};
	static const uint32_t firsts[][2] = { { 1000, 500000 },
					      { 0xfffffff0, 0xffffff00 },
					      { 0x7ffffff0, 0xffffffff } };
	uint32_t seeds = argc > 1 ? (uint32_t)atoi(argv[1]) : 20;

	for (uint32_t seed = 1; seed <= seeds; seed++)
		conversations(seed);
	for (uint32_t i = 0; i < sizeof(firsts) / sizeof(firsts[0]); i++) {
		memcpy(first, firsts[i], sizeof(first));
		each(tests, sizeof(tests) / sizeof(tests[0]));
	}
	leaving(1);
	flood();
	garbage();
	printf("%u seeds\n", seeds);
	return 0;
}
