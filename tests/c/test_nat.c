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

int main(int argc, char **argv)
{
	uint32_t seeds = argc > 1 ? (uint32_t)atoi(argv[1]) : 20;

	for (uint32_t seed = 1; seed <= seeds; seed++)
		conversations(seed);
	leaving(1);
	flood();
	garbage();
	printf("%u seeds\n", seeds);
	return 0;
}
