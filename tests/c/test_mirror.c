/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two sets and mirrored traffic, at random: the handlers of a keeper and of a newcomer, and clients and backends that
 * open, use, end and reuse connections while each of the two handles its copies whenever chance has it. Of each packet
 * exactly one copy goes on; nobody answers for the other set; no port is used twice; the keeper's end comes.
 * In half of the histories the two die all the time, at each point where tests/crash lets a datapath die: what one has left
 * of its shard and of the list is what the next one begins with, and the packet is handled again, later.
 * In some engines vanish with their queues: another one of the set, with another slot, goes on with the shards, and the
 * ends send again what was lost.
 */
#define PS_INJECT 1
#include <setjmp.h>

#include "segments.h"

/* All conversations fall into few buckets, so that they are in want of each other's ports. */
enum {
	BUCKETS = 256,
	USED = 2,
	ENTRIES = 64,
	INDEX = 128,
	CONVERSATIONS = 40,
	QUEUE = 4096,
	STEPS = 5000,
	SYN = 2,
	FIN = 1,
	ACK = 16
};

enum side { KEEPER, NEWCOMER, SIDES };

enum phase { IDLE, OPENING, ANSWERING, CONFIRMING, TALKING, CLIENT_CLOSED, BACKEND_CLOSED, LAST, PHASES };

struct conversation {
	struct build forward; /* client -> VIP */
	struct build reply;   /* backend -> SNAT address, as the opener came out */
	bool udp, first_is_backend;
	enum phase phase;
	uint32_t next[2], tries;
	uint32_t packet; /* the last that was sent; 0 = none is under way */
	uint32_t opened; /* number of the SYN that has opened it, */
	int by;		 /* the side that has taken it; -1: none yet */
	struct copy {
		uint8_t frame[160];
		uint32_t length, packet, conversation, number;
		bool reply, opener;
	} last;
};

static struct stack set[SIDES];
static struct ps_connection_list list;
static struct conversation all[CONVERSATIONS];
static struct copy queue[SIDES][QUEUE];
static uint32_t head[SIDES], tail[SIDES], packets, mirrored, now, empty, lost, moves;
static uint8_t went_on[1 << 20], seen[1 << 20], vanished[1 << 20];

static jmp_buf grave;
static bool dying, vanishing, mortal;
static uint32_t deaths[PS_AT_ADOPT_BEGUN];

void ps_point(enum ps_point at)
{
	if (!mortal || random_below(at >= PS_AT_PUBLISH_BEGUN ? 8 : 60))
		return;
	mortal = false;
	deaths[at]++;
	longjmp(grave, 1);
}

/* What the next process does with a shard before it uses it. */
static void look_at_shard(enum side side, uint32_t bucket)
{
	struct ps_shard *s = ps_shard_at(set[side].arena, bucket);

	if (ps_shard_check(set[side].arena, s))
		ps_shard_rebuild(set[side].arena, s);
}

static void begin(uint32_t seed)
{
	random_state = seed;
	for (int i = 0; i < SIDES; i++) {
		stack_new(&set[i], BUCKETS, ENTRIES, INDEX);
		set[i].engine.slot = (uint32_t)i + 1;
	}
	CHECK(ps_connections_are(&list, BUCKETS, ENTRIES, INDEX, CLIENTS), "numbers");
	list.at = aligned_alloc(64, ps_connections_bytes(&list));
	memset(list.at, 0, ps_connections_bytes(&list));
	memset(all, 0, sizeof(all));
	memset(went_on, 0, sizeof(went_on));
	memset(seen, 0, sizeof(seen));
	memset(vanished, 0, sizeof(vanished));
	memset(head, 0, sizeof(head));
	memset(tail, 0, sizeof(tail));
	packets = mirrored = lost = 0;
	now = empty = 1000;
	for (uint32_t i = 0; i < CONVERSATIONS; i++) {
		struct build *b = &all[i].forward;

		mapped(b->source, 0x0a010000 + i);
		memcpy(b->destination, set[0].vip[0], 16);
		b->dport = htons(80);
		all[i].udp = i % 4 == 3;
		b->protocol = all[i].udp ? 17 : 6;
		b->ttl = 64;
		for (uint16_t port = 10000;; port++) {
			b->sport = htons(port);
			if (stamp_of_flow(&set[0], b->source, b->sport, b->destination, b->dport, b->protocol).bucket <
			    USED)
				break;
		}
	}
}

static void end(void)
{
	for (int i = 0; i < SIDES; i++)
		stack_free(&set[i]);
	free(list.at);
}

static void push(struct copy *copy)
{
	copy->packet = ++packets;
	CHECK(packets < sizeof(went_on), "too many packets");
	for (int i = 0; i < SIDES; i++)
		if (i == KEEPER || mirrored) {
			CHECK(tail[i] - head[i] < QUEUE, "a queue is full");
			queue[i][tail[i]++ % QUEUE] = *copy;
		} else {
			seen[packets]++;
		}
}

/* An engine is gone with its queue. Another one of the set has its shards from now on, and openers may be lost. */
static void vanish(enum side side)
{
	while (head[side] != tail[side]) {
		const struct copy *copy = &queue[side][head[side]++ % QUEUE];

		seen[copy->packet]++;
		vanished[copy->packet] = 1;
	}
	if (side == KEEPER)
		empty = now;
	set[side].engine.slot += SIDES;
	for (uint32_t b = 0; b < USED; b++)
		look_at_shard(side, b);
	moves++;
}

/* again: a SYN that comes a second time although the first may be under way */
static void send_packet(uint32_t number, bool reply, uint8_t flags, bool opener, bool again)
{
	struct conversation *c = &all[number];
	struct build b = reply ? c->reply : c->forward;
	struct copy copy = { .conversation = number, .reply = reply, .opener = opener };
	uint32_t l3, payload = c->phase == TALKING && !(flags & FIN) && !c->udp ? random_below(2) * 8 : 0;

	b.payload = (uint16_t)(c->udp ? 8 : payload);
	b.tcp_flags = flags;
	copy.length = c->udp ? build_frame(copy.frame, &b, &l3)
			     : build_segment(copy.frame, &b, c->next[reply], flags & ACK ? c->next[!reply] : 0, 0);
	c->next[reply] += payload + !!(flags & (SYN | FIN));
	copy.number = c->next[reply] - payload - !!(flags & (SYN | FIN));
	push(&copy);
	if (again)
		return;
	c->packet = packets;
	c->last = copy;
}

/* No two connections that live have the same port at a backend. */
static void check_ports(uint32_t number)
{
	for (uint32_t i = 0; i < CONVERSATIONS; i++) {
		const struct build *a = &all[i].reply, *b = &all[number].reply;

		if (i == number || all[i].phase == IDLE || all[i].phase == OPENING || all[i].udp != all[number].udp)
			continue;
		CHECK(a->dport != b->dport || a->sport != b->sport || memcmp(a->source, b->source, 16) ||
			      memcmp(a->destination, b->destination, 16),
		      "conversations %u and %u have the same port at a backend", i, number);
	}
}

/* What the two ends do when a packet has arrived. */
static void arrived(const struct copy *copy, const uint8_t *frame, int by)
{
	struct conversation *c = &all[copy->conversation];

	if (copy->opener && !c->udp && copy->number == c->opened) {
		CHECK(c->by < 0 || c->by == by, "the SYN of conversation %u went on by both", copy->conversation);
		c->by = by;
	}
	if (copy->packet != c->packet)
		return;
	if (copy->opener) {
		c->reply = reply_to(frame);
		c->reply.protocol = c->forward.protocol;
		c->tries = 0;
		if (c->phase == OPENING || c->phase == IDLE)
			check_ports(copy->conversation);
	}
	c->packet = 0;
	switch (c->phase) {
	case OPENING: c->phase = ANSWERING; break;
	case ANSWERING: c->phase = CONFIRMING; break;
	case CONFIRMING: c->phase = TALKING; break;
	case CLIENT_CLOSED:
	case BACKEND_CLOSED: break;
	case LAST: c->phase = IDLE; break;
	default: break;
	}
}

static void handle(enum side side)
{
	struct copy *copy = &queue[side][head[side] % QUEUE];
	struct stack *t = &set[side];
	struct ps_stamp stamp = { .magic = PS_STAMP_MAGIC, .epoch = 1 };
	struct build *b = copy->reply ? &all[copy->conversation].reply : &all[copy->conversation].forward;
	uint8_t raw[PS_FRAME_BYTES], verdict;
	uint16_t port;

	memcpy(&port, copy->frame + 36, 2);
	if (copy->reply) {
		stamp.flags = PS_STAMP_REPLY;
		stamp.bucket = (uint16_t)(ntohs(port) & (BUCKETS - 1));
	} else {
		stamp = stamp_of_flow(t, b->source, b->sport, b->destination, b->dport, b->protocol);
	}
	if (mirrored)
		stamp.flags |= (uint16_t)(PS_STAMP_MIRROR | set[NEWCOMER].engine.slot << PS_STAMP_SLOT);
	memcpy(raw, copy->frame, copy->length);
	t->handler.list = mirrored ? &list : NULL;
	t->handler.now = now;
	t->handler.now_ns = now * 100000000ull;
	if (setjmp(grave)) {
		look_at_shard(side, stamp.bucket);
		return;
	}
	mortal = dying;
	verdict = ps_handle(&t->handler, raw, copy->length, &stamp);
	mortal = false;
	head[side]++;
	seen[copy->packet]++;
	if (PS_VERDICT(verdict) != PS_TRANSMIT)
		return;
	went_on[copy->packet]++;
	CHECK(went_on[copy->packet] == 1, "packet %u went on twice", copy->packet);
	arrived(copy, raw, side);
}

static void step_conversation(uint32_t number)
{
	struct conversation *c = &all[number];

	if (c->packet) {
		if (seen[c->packet] < SIDES)
			return; /* a copy is under way still */
		if (vanished[c->packet]) {
			push(&c->last);
			c->packet = packets;
			return;
		}
		CHECK(c->phase == OPENING || (c->udp && c->tries < 3),
		      "packet %u of conversation %u in phase %d is lost", c->packet, number, c->phase);
		CHECK(++c->tries < 4, "nobody takes the opener of conversation %u", number);
		lost++;
		if (c->udp) {
			c->packet = 0;
			return;
		}
		c->next[PS_CLIENT]--;
		send_packet(number, false, SYN, true, false);
		return;
	}
	if (c->udp) {
		if (c->phase == IDLE || random_below(2)) {
			c->phase = TALKING;
			send_packet(number, false, 0, true, false);
		} else {
			send_packet(number, true, 0, false, false);
		}
		return;
	}
	switch (c->phase) {
	case IDLE:
		if (random_below(8))
			return;
		c->next[PS_CLIENT] += 100000 + random_below(1 << 20);
		c->next[PS_BACKEND] = random_below(1u << 31);
		c->phase = OPENING;
		c->tries = 0;
		c->opened = c->next[PS_CLIENT];
		c->by = -1;
		send_packet(number, false, SYN, true, false);
		return;
	case ANSWERING:
		if (!random_below(4)) {
			c->next[PS_CLIENT]--;
			send_packet(number, false, SYN, true, true);
		}
		send_packet(number, true, SYN | ACK, false, false);
		return;
	case CONFIRMING: send_packet(number, false, ACK, false, false); return;
	case TALKING:
		if (random_below(6)) {
			send_packet(number, random_below(2), ACK, false, false);
			return;
		}
		c->first_is_backend = random_below(2);
		c->phase = c->first_is_backend ? BACKEND_CLOSED : CLIENT_CLOSED;
		send_packet(number, c->first_is_backend, FIN | ACK, false, false);
		return;
	case CLIENT_CLOSED:
	case BACKEND_CLOSED:
		/* The other end closes too, and this one acknowledges. */
		if (c->tries == 0) {
			c->tries = 1;
			send_packet(number, !c->first_is_backend, FIN | ACK, false, false);
		} else {
			c->tries = 0;
			c->phase = LAST;
			send_packet(number, c->first_is_backend, ACK, false, false);
		}
		return;
	default: return;
	}
}

static void sweep_kept(uint32_t bucket)
{
	if (setjmp(grave))
		look_at_shard(KEEPER, bucket);
	mortal = dying;
	ps_kept_sweep(&list, ps_connections_of(&list, bucket), set[KEEPER].arena,
		      ps_shard_at(set[KEEPER].arena, bucket), set[KEEPER].config->timeout, now, empty);
	mortal = false;
}

static void publish(uint32_t bucket)
{
	if (setjmp(grave))
		look_at_shard(KEEPER, bucket);
	mortal = dying;
	ps_connections_publish(&list, ps_connections_of(&list, bucket), set[KEEPER].arena,
			       ps_shard_at(set[KEEPER].arena, bucket), now);
	mortal = false;
}

static void sweep(void)
{
	for (uint32_t b = 0; b < BUCKETS; b++) {
		struct ps_shard *k = ps_shard_at(set[KEEPER].arena, b), *n = ps_shard_at(set[NEWCOMER].arena, b);

		if (mirrored)
			sweep_kept(b);
		else
			ps_shard_sweep(set[KEEPER].arena, k, set[KEEPER].config->timeout, now);
		ps_shard_sweep(set[NEWCOMER].arena, n, set[NEWCOMER].config->timeout, now);
		CHECK(!ps_shard_check(set[KEEPER].arena, k) && !ps_shard_check(set[NEWCOMER].arena, n),
		      "the shards of bucket %u", b);
	}
}

static uint32_t left(void)
{
	uint32_t n = 0;

	for (uint32_t b = 0; b < BUCKETS; b++)
		n += ps_connections_of(&list, b)->left;
	return n;
}

static void some(uint32_t steps, bool lag)
{
	for (uint32_t i = 0; i < steps; i++) {
		/* One of the two is far behind for a while. */
		enum side slow = (enum side)(i / 512 & 1), side = (enum side)random_below(SIDES);

		step_conversation(random_below(CONVERSATIONS));
		for (int n = 0; n < 2; n++, side = (enum side) !side)
			if (head[side] != tail[side] && !(lag && side == slow && random_below(16)))
				handle(side);
		if (head[KEEPER] == tail[KEEPER])
			empty = now;
		if (!random_below(64))
			now += random_below(random_below(20) ? 4 : 60);
		if (!random_below(512))
			sweep();
		if (vanishing && mirrored && !random_below(700))
			vanish((enum side)random_below(SIDES));
	}
}

static void drain(void)
{
	for (int side = 0; side < SIDES; side++)
		while (head[side] != tail[side])
			handle((enum side)side);
	empty = now;
}

static void a_history(uint32_t seed)
{
	static const enum ps_counter counted[] = { PS_C_REJECTED_NOT_KEPT, PS_C_REJECTED_CLAIMED, PS_C_REJECTED_KEPT,
						   PS_C_REJECTED_CLOSING };
	uint64_t rejected[SIDES] = { 0 };

	begin(seed);
	dying = seed % 2;
	vanishing = seed % 4 >= 2;
	some(1500, false);
	drain();
	for (uint32_t b = 0; b < BUCKETS; b++)
		publish(b);
	mirrored = 1;
	CHECK(left() > 10, "%u connections", left());
	some(STEPS, true);
	drain();
	/* All that the keeper has left ends or times out. UDP flows may go on for ever: here they fall silent. */
	for (int i = 0; i < 80; i++) {
		now += 1000;
		empty = now;
		sweep();
	}
	CHECK(!left(), "%u connections are left", left());
	for (uint32_t b = 0; b < BUCKETS; b++)
		CHECK(!ps_shard_at(set[KEEPER].arena, b)->live, "the keeper has flows in bucket %u", b);
	for (int side = 0; side < SIDES; side++)
		for (size_t i = 0; i < sizeof(counted) / sizeof(counted[0]); i++)
			rejected[side] += set[side].counters[counted[i]];
	printf("seed %u: %u packets, %u openers again; kept %lu claimed %lu / kept %lu closing %lu\n", seed, packets,
	       lost, (unsigned long)set[KEEPER].counters[PS_C_REJECTED_NOT_KEPT],
	       (unsigned long)set[KEEPER].counters[PS_C_REJECTED_CLAIMED],
	       (unsigned long)set[NEWCOMER].counters[PS_C_REJECTED_KEPT],
	       (unsigned long)set[NEWCOMER].counters[PS_C_REJECTED_CLOSING]);
	CHECK(rejected[KEEPER] && rejected[NEWCOMER], "nothing was rejected");
	CHECK(!lost, "%u openers were taken by nobody", lost);
	CHECK(!set[KEEPER].counters[PS_C_RESETS_SENT] && !set[NEWCOMER].counters[PS_C_RESETS_SENT],
	      "somebody answered");
	end();
}

int main(int argc, char **argv)
{
	uint32_t histories = argc > 1 ? (uint32_t)atoi(argv[1]) : 60, died = 0;

	for (uint32_t seed = 1; seed <= histories; seed++)
		a_history(seed);
	for (int at = 1; at < PS_AT_ADOPT_BEGUN; at++) {
		died += deaths[at];
		if (at >= PS_AT_PUBLISH_BEGUN && at <= PS_AT_KEPT_GONE && at != PS_AT_KEPT) /* that is the datapath's */
			CHECK(deaths[at] || histories < 20, "nobody died at point %d", at);
	}
	CHECK(moves || histories < 3, "no engine has vanished");
	printf("%u deaths, %u engines vanished\n", died, moves);
	return 0;
}
