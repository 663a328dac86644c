/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The connection list is memory that engines of two sets write, and either may be out of its mind. Here somebody writes
 * rubbish into it, blind or well aimed, between all that a keeper and a newcomer do by it: whatever it says, they stay in
 * their memory, come to an end, keep their shards whole, and take no port or address that is not the bucket's.
 */
#include "segments.h"

enum {
	BUCKETS = 256,
	USED = 2,
	FIRST = BUCKETS - USED,
	ENTRIES = 48,
	INDEX = 64,
	CLIENTS_USED = 60,
	ROUNDS = 40,
	STEPS = 600
};

enum side { KEEPER, NEWCOMER, SIDES };

static struct stack set[SIDES];
static struct ps_connection_list list;
static uint64_t handled[SIDES];

static void pick_address(uint8_t out[16])
{
	const struct stack *t = &set[0];
	uint32_t family = random_below(2);

	switch (random_below(4)) {
	case 0: memcpy(out, t->vip[family], 16); break;
	case 1: memcpy(out, t->snat[family][random_below(2)], 16); break;
	case 2: memcpy(out, t->backend[family][random_below(3)], 16); break;
	default: mapped(out, 0x0a010000 + random_below(CLIENTS_USED)); break;
	}
}

/* An entry that could be one: names that there are, any state, any port. */
static void write_entry(struct ps_connection *c)
{
	uint16_t ports[] = { htons(80), htons(8080), (uint16_t)random_below(65536) };

	switch (random_below(8)) {
	case 0: pick_address(c->client); break;
	case 1: pick_address(c->vip); break;
	case 2: pick_address(c->snat); break;
	case 3: pick_address(c->backend); break;
	case 4: c->snat_port = ports[random_below(3)]; break;
	case 5: c->backend_port = ports[random_below(3)]; break;
	case 6: c->flags = (uint8_t)random_below(256); break;
	default: c->state = (uint8_t)random_below(256); break;
	}
}

static void write_rubbish(void)
{
	struct ps_connections *c = ps_connections_of(&list, FIRST + random_below(USED));
	uint16_t *index = ps_connections_index(&list, c, random_below(2));
	uint8_t *bytes = (uint8_t *)c;

	switch (random_below(9)) {
	case 8:
		ps_connections_clients(&list)[random_below(CLIENTS)] = (uint64_t)random_below(UINT32_MAX) << 32 | 1;
		break;
	case 0: bytes[random_below((uint32_t)list.stride)] = (uint8_t)random_below(256); break;
	case 1: /* a search finds no end */
		for (uint32_t i = 0; i < INDEX; i++)
			index[i] = (uint16_t)(1 + random_below(random_below(2) ? ENTRIES : 65535));
		break;
	case 2: index[random_below(INDEX)] = (uint16_t)random_below(65536); break;
	case 3: c->high = random_below(2) ? UINT32_MAX : random_below(ENTRIES); break;
	case 4: c->left = random_below(UINT32_MAX); break;
	case 5: c->published = random_below(3); break;
	default:
		for (uint32_t i = 0; i < 8; i++)
			write_entry(ps_connection_at(&list, c, random_below(ENTRIES)));
	}
}

/* A packet of somebody, of any kind, or an answer to a port that some flow may have. */
static void handle(enum side side, bool mirrored)
{
	struct stack *t = &set[side];
	struct ps_stamp stamp = { .magic = PS_STAMP_MAGIC, .epoch = 1 };
	uint8_t *frame = malloc(PS_FRAME_BYTES), verdict;
	struct build b = { .ttl = 64, .protocol = random_below(3) ? 6 : 17, .payload = (uint16_t)random_below(20) };
	uint32_t family = !random_below(4), length, l3;

	CHECK(frame, "out of memory");
	b.tcp_flags = (uint8_t[]){ 2, 2, 16, 17, 4, 18, 20 }[random_below(7)];
	if (random_below(3)) {
		if (family)
			address6(b.source, 9, random_below(CLIENTS_USED));
		else
			mapped(b.source, 0x0a010000 + random_below(CLIENTS_USED));
		memcpy(b.destination, t->vip[family], 16);
		b.sport = (uint16_t)(1000 + random_below(4));
		b.dport = htons(80);
		stamp = stamp_of_flow(t, b.source, b.sport, b.destination, b.dport, b.protocol);
		stamp.bucket = (uint16_t)(FIRST + stamp.bucket % USED);
	} else {
		stamp.flags = PS_STAMP_REPLY;
		stamp.bucket = (uint16_t)(FIRST + random_below(USED));
		memcpy(b.source, t->backend[family][random_below(3)], 16);
		memcpy(b.destination, t->snat[family][random_below(2)], 16);
		b.sport = htons(8080);
		b.dport = htons((uint16_t)((4 + random_below(20)) * BUCKETS + stamp.bucket));
	}
	length = b.protocol == 6 ? build_segment(frame, &b, random_below(1000), random_below(1000), 0)
				 : build_frame(frame, &b, &l3);
	if (mirrored)
		stamp.flags |= PS_STAMP_MIRROR | (NEWCOMER + 1) << PS_STAMP_SLOT;
	t->handler.list = mirrored ? &list : NULL;
	verdict = ps_handle(&t->handler, frame, length, &stamp);
	CHECK(PS_VERDICT(verdict) <= PS_TRANSMIT, "verdict %u", verdict);
	handled[side]++;
	free(frame);
}

static void sweep(uint32_t bucket)
{
	struct stack *k = &set[KEEPER], *n = &set[NEWCOMER];

	ps_kept_sweep(&list, ps_connections_of(&list, bucket), k->arena, ps_shard_at(k->arena, bucket),
		      k->config->timeout, k->handler.now, k->handler.now - random_below(100));
	ps_shard_sweep(n->arena, ps_shard_at(n->arena, bucket), n->config->timeout, n->handler.now);
}

static void check_side(enum side side)
{
	const struct stack *t = &set[side];
	uint64_t sum = t->counters[PS_C_FORWARDED];

	for (uint32_t b = FIRST; b < BUCKETS; b++) {
		struct ps_shard *s = ps_shard_at(t->arena, b);
		const struct ps_entry *flows = ps_shard_flows(t->arena, s);

		shard_check(t->arena, s, t->config->timeout);
		for (uint32_t i = 0; i < s->high; i++) {
			const struct ps_entry *f = &flows[i];

			if (f->state == PS_FLOW_FREE)
				continue;
			CHECK(ps_port_is_of(t->arena, b, f->snat_port), "port %u in bucket %u", ntohs(f->snat_port), b);
			CHECK(ps_is_v6(ps_address(t->arena, f->snat)) == !!(f->flags & PS_FLOW_V6), "another family");
		}
	}
	counts_check(t->arena, FIRST, USED, 0);
	for (int reason = PS_C_REJECTED_NOT_KEPT; reason <= PS_C_REJECTED_CLOSING; reason++)
		sum += t->counters[reason];
	for (int reason = PS_C_DROP_NO_STAMP; reason < PS_C_JOURNALS_REFUSED; reason++)
		sum += t->counters[reason];
	CHECK(sum == handled[side], "side %d: %lu of %lu packets are counted", side, (unsigned long)sum,
	      (unsigned long)handled[side]);
}

static void a_round(uint32_t seed)
{
	uint64_t bytes;

	random_state = seed;
	memset(handled, 0, sizeof(handled));
	for (int i = 0; i < SIDES; i++) {
		stack_new(&set[i], BUCKETS, i == KEEPER ? ENTRIES : ENTRIES / 2, INDEX);
		set[i].engine.slot = (uint32_t)i + 1;
	}
	CHECK(ps_connections_are(&list, BUCKETS, ENTRIES, INDEX, CLIENTS), "numbers");
	set[KEEPER].config->kept_reset = !(seed % 5);
	for (int i = 0; i < 4; i++) {
		set[NEWCOMER].arena->listener[i].kept_as = (uint16_t)(i + 1);
		set[NEWCOMER].config->listener[i].max_flows_per_client = 1 << 20;
	}
	/* Ends where the table of clients ends: the sanitizer sees each byte behind it. */
	bytes = list.stride * list.buckets + CLIENTS * sizeof(ps_client_count);
	list.at = aligned_alloc(64, bytes);
	CHECK(list.at, "out of memory");
	memset(list.at, 0, bytes);
	for (int i = 0; i < 400; i++)
		handle(KEEPER, false);
	for (uint32_t step = 0; step < STEPS; step++) {
		uint32_t bucket = FIRST + random_below(USED);

		if (step == 0 || !random_below(100)) {
			ps_connections_publish(&list, ps_connections_of(&list, bucket), set[KEEPER].arena,
					       ps_shard_at(set[KEEPER].arena, bucket), set[KEEPER].handler.now);
			ps_connections_of(&list, bucket ^ 1)->published = 1;
		}
		if (!random_below(seed % 8 + 1))
			write_rubbish();
		for (int i = 0; i < 4; i++)
			handle((enum side)random_below(SIDES), true);
		if (!random_below(16))
			sweep(bucket);
		for (int i = 0; i < SIDES; i++) {
			set[i].handler.now += random_below(3);
			set[i].handler.now_ns += 300000000;
		}
		if (!random_below(20))
			for (int i = 0; i < SIDES; i++)
				check_side((enum side)i);
	}
	for (int i = 0; i < SIDES; i++) {
		check_side((enum side)i);
		stack_free(&set[i]);
	}
	free(list.at);
}

/* A newcomer says that the keeper has nothing: that one counts its own flows, and forgets them when it is their time. */
static void nobody_hides_what_the_keeper_has(void)
{
	struct stack *k = &set[KEEPER];
	struct ps_connections *c;
	struct ps_shard *s;

	random_state = 1;
	stack_new(k, BUCKETS, ENTRIES, INDEX);
	k->engine.slot = KEEPER + 1;
	CHECK(ps_connections_are(&list, BUCKETS, ENTRIES, INDEX, CLIENTS), "numbers");
	list.at = aligned_alloc(64, list.stride * list.buckets);
	CHECK(list.at, "out of memory");
	memset(list.at, 0, list.stride * list.buckets);
	for (int i = 0; i < 400; i++)
		handle(KEEPER, false);
	s = ps_shard_at(k->arena, FIRST);
	c = ps_connections_of(&list, FIRST);
	ps_connections_publish(&list, c, k->arena, s, k->handler.now);
	CHECK(s->live > 10 && c->left == s->live, "%u of %u flows", c->left, s->live);
	c->high = c->left = 0;
	ps_kept_sweep(&list, c, k->arena, s, k->config->timeout, k->handler.now, k->handler.now);
	CHECK(c->left == s->live, "%u of %u flows are left", c->left, s->live);
	for (int i = 0; i < 4; i++) {
		c->high = 0;
		k->handler.now += 100000;
		ps_kept_sweep(&list, c, k->arena, s, k->config->timeout, k->handler.now, k->handler.now);
	}
	CHECK(!s->live && !c->left, "%u flows are left", s->live);
	stack_free(k);
	free(list.at);
}

int main(int argc, char **argv)
{
	uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : ROUNDS;

	for (uint32_t seed = 1; seed <= rounds; seed++)
		a_round(seed);
	nobody_hides_what_the_keeper_has();
	printf("%u rounds\n", rounds);
	return 0;
}
