/* SPDX-License-Identifier: Apache-2.0 */
/* Random histories of one shard beside a plain reference: an array of flows in order of their age. */
#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "arena.h"

enum { MOST = 512 };

struct reference {
	struct ps_flow flow[MOST]; /* state FREE = empty */
	uint64_t listed[MOST];	   /* when it came onto its list */
	uint64_t order;
};

static const uint32_t timeout[8] = { 0, 300, 600, 74400, 1200, 100, 300, 1800 };

static int find(const struct reference *r, const struct ps_flow *f)
{
	for (int i = 0; i < MOST; i++)
		if (r->flow[i].state && r->flow[i].client_port == f->client_port &&
		    (r->flow[i].flags & PS_FLOW_UDP) == (f->flags & PS_FLOW_UDP) &&
		    !memcmp(r->flow[i].client, f->client, 16))
			return i;
	return -1;
}

static int oldest(const struct reference *r, bool closed)
{
	int best = -1;

	for (int i = 0; i < MOST; i++) {
		uint8_t state = r->flow[i].state;

		if (state && (closed ? state == PS_FLOW_CLOSED : ps_state_half_open(state)) &&
		    (best < 0 || r->listed[i] < r->listed[best]))
			best = i;
	}
	return best;
}

static struct ps_flow *look(const struct ps_arena *a, struct ps_shard *s, const struct ps_flow *f)
{
	struct ps_key k = {
		.sport = f->client_port, .dport = f->vip_port, .udp = f->flags & PS_FLOW_UDP, .hash = f->hash
	};

	memcpy(k.source, f->client, 16);
	memcpy(k.destination, a->address[f->vip].bytes, 16);
	return ps_find_forward(a, s, &k);
}

static void draw(struct ps_flow *f, uint32_t clients)
{
	uint32_t c = random_below(clients);

	memset(f, 0, sizeof(*f));
	mapped(f->client, 0x0a000000 + c / 4);
	f->client_port = (uint16_t)(1000 + c % 4);
	f->flags = random_below(3) ? 0 : PS_FLOW_UDP;
	/* Few values: homes collide, chains wrap around the end. */
	f->hash = (c * 2654435761u + f->flags) % 61;
	f->vip_port = 80;
	f->vip = 0;
	f->snat = (uint16_t)(1 + random_below(2));
	mapped(f->backend, 0x0a010000 + random_below(3));
	f->backend_port = 8080;
	f->backend_id = (uint16_t)random_below(3);
	f->state = f->flags & PS_FLOW_UDP ? PS_FLOW_UNANSWERED : PS_FLOW_SYN;
}

static void history(uint64_t seed, uint32_t steps)
{
	static struct reference r;
	uint32_t entries = 16 + random_below(100), slots = 16, now = random_below(1u << 30), half_limit, bucket;
	struct ps_arena *a;
	struct ps_shard *s;

	while (slots < entries + entries / 4)
		slots *= 2;
	a = arena_new(256, entries, slots);
	bucket = random_below(256);
	s = ps_shard_at(a, bucket);
	memset(&r, 0, sizeof(r));
	half_limit = entries / 2;
	for (uint32_t i = 0; i < 3; i++)
		mapped(a->address[i].bytes, 0xc0000200 + i);
	for (uint32_t step = 0; step < steps; step++) {
		struct ps_flow f, *have;
		int at;

		draw(&f, 3 * entries);
		at = find(&r, &f);
		have = look(a, s, &f);
		CHECK((at >= 0) == (have != NULL), "seed %lu step %u", seed, step);
		if (have) {
			CHECK(have->state == r.flow[at].state && have->snat_port == r.flow[at].snat_port,
			      "seed %lu step %u", seed, step);
		}
		switch (random_below(12)) {
		case 0:
		case 1:
		case 2:
		case 3:
		case 4:
		case 5: { /* open */
			uint32_t recycled = 0, expected = 0;
			struct ps_flow *room;
			int n = 0;

			if (have)
				break;
			for (int i = 0; i < MOST; i++)
				n += r.flow[i].state != 0;
			if (s->half_open >= half_limit) {
				r.flow[oldest(&r, false)].state = 0;
				expected++;
				n--;
			}
			if (n == (int)entries) {
				int victim = oldest(&r, true);

				if (victim < 0)
					victim = oldest(&r, false);
				if (victim >= 0) {
					r.flow[victim].state = 0;
					expected++;
					n--;
				}
			}
			room = ps_flow_room(a, s, half_limit, &recycled);
			CHECK(recycled == expected, "seed %lu step %u: %u recycled, expected %u", seed, step, recycled,
			      expected);
			CHECK((room != NULL) == (n < (int)entries), "seed %lu step %u", seed, step);
			if (!room)
				break;
			f.snat_port =
				ps_port_find(a, s, bucket, f.snat, f.backend, f.backend_port, f.flags & PS_FLOW_UDP);
			if (!f.snat_port)
				break;
			CHECK((__builtin_bswap16(f.snat_port) & (a->buckets - 1)) == bucket, "port %u", f.snat_port);
			CHECK(__builtin_bswap16(f.snat_port) >= 1024, "port %u", f.snat_port);
			for (int i = 0; i < MOST; i++)
				CHECK(!r.flow[i].state || r.flow[i].snat_port != f.snat_port ||
					      r.flow[i].snat != f.snat ||
					      (r.flow[i].flags & PS_FLOW_UDP) != (f.flags & PS_FLOW_UDP) ||
					      memcmp(r.flow[i].backend, f.backend, 16),
				      "seed %lu step %u: a SNAT port given out twice", seed, step);
			ps_flow_insert(a, s, room, &f, timeout, now);
			for (at = 0; r.flow[at].state; at++)
				;
			r.flow[at] = f;
			r.flow[at].last_seen = now;
			r.listed[at] = ++r.order;
			break;
		}
		case 6:
		case 7:
		case 8: { /* a packet changes its state */
			uint8_t state = (uint8_t)(1 + random_below(PS_FLOW_STATES - 1));

			if (!have)
				break;
			have->last_seen = now;
			r.flow[at].last_seen = now;
			ps_flow_set_state(a, s, have, state, timeout, now);
			/* A flow that stays half-open goes to the end of the list with each change of state. */
			if (state != r.flow[at].state)
				r.listed[at] = ++r.order;
			r.flow[at].state = state;
			break;
		}
		case 9: /* it ends */
			if (!have)
				break;
			ps_flow_remove(a, s, have);
			r.flow[at].state = 0;
			break;
		case 10: { /* time passes */
			uint32_t gone = 0;

			now += random_below(random_below(8) ? 50 : 5000);
			for (int i = 0; i < MOST; i++)
				if (r.flow[i].state &&
				    (int32_t)(now - r.flow[i].last_seen - timeout[r.flow[i].state]) >= 0) {
					r.flow[i].state = 0;
					gone++;
				}
			at = (int)ps_shard_sweep(a, s, timeout, now);
			CHECK(at == (int)gone, "seed %lu step %u: %d swept, expected %u", seed, step, at, gone);
			break;
		}
		default:
			if (random_below(8))
				break;
			CHECK(!ps_shard_rebuild(a, s), "seed %lu step %u", seed, step);
			/* Entries remember no age: after a rebuild the lists begin in the order of the entries. */
			for (uint32_t list = 0; list < 2; list++)
				for (uint32_t e = list ? s->closed_head : s->half_head; e;
				     e = ps_shard_flows(a, s)[e - 1].next)
					r.listed[find(&r, &ps_shard_flows(a, s)[e - 1])] = ++r.order;
		}
		if (step % 16 == 0)
			shard_check(a, s, timeout);
	}
	free(a);
}

/* A writer may die after any of its stores: what the next owner rebuilds is whole, and other flows are untouched. */
static void deaths(void)
{
	struct ps_arena *a = arena_new(256, 64, 128);
	struct ps_shard *s = ps_shard_at(a, 7);
	uint32_t recycled = 0;

	for (uint32_t i = 0; i < 20000; i++) {
		struct ps_flow f, *have, *flows = ps_shard_flows(a, s);
		uint32_t live;

		draw(&f, 90);
		have = look(a, s, &f);
		if (!have) {
			struct ps_flow *room = ps_flow_room(a, s, 32, &recycled);

			f.snat_port =
				room ? ps_port_find(a, s, 7, f.snat, f.backend, f.backend_port, f.flags & PS_FLOW_UDP)
				     : 0;
			if (f.snat_port)
				ps_flow_insert(a, s, room, &f, timeout, i);
			continue;
		}
		live = s->live;
		switch (random_below(4)) {
		case 0: /* within the entry */
			s->dirty = 1;
			ps_flow_begin(have);
			have->state = (uint8_t)random_below(256);
			memset(have->client, (int)random_below(256), 1 + random_below(15));
			CHECK(ps_shard_rebuild(a, s) == 1, "one entry was half written");
			live--;
			break;
		case 1: /* within an index */
			s->dirty = 1;
			ps_index_remove(a, s, (uint32_t)(have - flows), random_below(2));
			CHECK(ps_shard_rebuild(a, s) == 0, "no entry was half written");
			break;
		case 2: /* within a list */
			s->dirty = 1;
			if (have->flags & PS_FLOW_LISTED)
				ps_list_remove(a, s, have);
			CHECK(ps_shard_rebuild(a, s) == 0, "no entry was half written");
			break;
		default: /* anywhere in what is derived */
			s->dirty = 1;
			s->live = (uint16_t)random_below(65536);
			s->free = (uint16_t)random_below(65536);
			s->half_head = (uint16_t)random_below(65536);
			s->closed_tail = (uint16_t)random_below(65536);
			ps_shard_forward(s)[random_below(128)] = (uint16_t)random_below(65536);
			CHECK(ps_shard_rebuild(a, s) == 0, "no entry was half written");
		}
		CHECK(s->live == live, "%u flows, expected %u", s->live, live);
		shard_check(a, s, timeout);
	}
	free(a);
}

/*
 * A shard's first user looks at header and indexes only: until the sweep comes, entries may hold anything.
 * Whatever its flows do then, memory outside the shard stays as it was, and the sweep's look puts all right.
 */
static void rubbish(uint32_t rounds)
{
	struct ps_arena *a = arena_new(256, 64, 128);
	struct ps_shard *s = ps_shard_at(a, 7);
	uint8_t *flows = (uint8_t *)ps_shard_flows(a, s);
	uint32_t recycled = 0, unseen = 0;

	memset(ps_shard_at(a, 6), 0x5a, a->shard_stride);
	memset(ps_shard_at(a, 8), 0x5a, a->shard_stride);
	for (uint32_t round = 0; round < rounds; round++) {
		for (uint32_t i = random_below(40); i < 40; i++)
			flows[random_below(a->entries * sizeof(struct ps_flow))] = (uint8_t)random_below(256);
		if (ps_shard_sane(a, s))
			ps_shard_rebuild(a, s);
		unseen += ps_shard_check(a, s) != NULL;
		for (uint32_t step = 0; step < 60; step++) {
			struct ps_flow f, *have, *room;

			draw(&f, 90);
			have = look(a, s, &f);
			if (have && random_below(2)) {
				ps_flow_set_state(a, s, have, (uint8_t)(1 + random_below(7)), timeout, round);
			} else if (have) {
				ps_flow_remove(a, s, have);
			} else if ((room = ps_flow_room(a, s, 32, &recycled))) {
				f.snat_port =
					ps_port_find(a, s, 7, f.snat, f.backend, f.backend_port, f.flags & PS_FLOW_UDP);
				if (f.snat_port)
					ps_flow_insert(a, s, room, &f, timeout, round);
			}
		}
		for (uint32_t neighbour = 6; neighbour <= 8; neighbour += 2)
			for (uint64_t i = 0; i < a->shard_stride; i++)
				CHECK(((uint8_t *)ps_shard_at(a, neighbour))[i] == 0x5a, "round %u", round);
		if (ps_shard_check(a, s))
			ps_shard_rebuild(a, s);
		CHECK(!ps_shard_check(a, s), "round %u: %s", round, ps_shard_check(a, s));
	}
	CHECK(unseen > rounds / 2, "%u rounds began with rubbish", unseen);
	free(a);
}

enum change { INSERT, REMOVE, STATE, CHANGES };

static void change_one(struct ps_arena *a, struct ps_shard *s, enum change change, struct ps_flow *f)
{
	uint32_t recycled = 0;

	if (change == INSERT)
		ps_flow_insert(a, s, ps_flow_room(a, s, 32, &recycled), f, timeout, 50);
	else if (change == REMOVE)
		ps_flow_remove(a, s, look(a, s, f));
	else
		ps_flow_set_state(a, s, look(a, s, f), PS_FLOW_CLOSED, timeout, 50);
}

/*
 * The same with a real writer: a child is single-stepped through one change, and after each instruction
 * a copy of its memory is what its successor would find.
 */
static void every_instruction(enum change change, uint64_t seed)
{
	struct ps_arena *prototype, *a, *copy;
	struct ps_flow value, others[40];
	uint32_t n = 0, steps = 0;
	struct ps_shard *s;
	bool before = false, after = false;
	int status;
	pid_t child;

	random_state = seed;
	prototype = arena_new(256, 64, 128);
	prototype->buckets = 256;
	prototype->bytes = (prototype->shards_offset + 2 * prototype->shard_stride + 4095) & ~4095ull;
	a = mmap(NULL, prototype->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	copy = malloc(prototype->bytes);
	CHECK(a != MAP_FAILED && copy, "out of memory");
	memcpy(a, prototype, prototype->bytes);
	free(prototype);
	s = ps_shard_at(a, 1);
	for (uint32_t i = 0; i < 3; i++)
		mapped(a->address[i].bytes, 0xc0000200 + i);
	while (n < 40) {
		uint32_t recycled = 0;
		struct ps_flow *f = &others[n];

		draw(f, 90);
		if (look(a, s, f))
			continue;
		f->state = (uint8_t)(1 + random_below(PS_FLOW_STATES - 1));
		f->snat_port = ps_port_find(a, s, 1, f->snat, f->backend, f->backend_port, f->flags & PS_FLOW_UDP);
		if (!f->snat_port)
			continue;
		ps_flow_insert(a, s, ps_flow_room(a, s, 64, &recycled), f, timeout, 40);
		n++;
	}
	/* Some entries are free again, so that a new flow takes one that was used before. */
	for (n = 40; seed & 1 && n > 36; n--)
		ps_flow_remove(a, s, look(a, s, &others[n - 1]));
	value = others[0];
	if (change == INSERT) {
		do {
			draw(&value, 900);
			value.snat_port = ps_port_find(a, s, 1, value.snat, value.backend, value.backend_port,
						       value.flags & PS_FLOW_UDP);
		} while (look(a, s, &value) || !value.snat_port);
	} else if (change == STATE && value.state == PS_FLOW_CLOSED) {
		ps_flow_set_state(a, s, look(a, s, &value), PS_FLOW_ESTABLISHED, timeout, 40);
	}
	child = fork();
	CHECK(child >= 0, "fork");
	if (!child) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		change_one(a, s, change, &value);
		raise(SIGSTOP);
		_exit(0);
	}
	waitpid(child, &status, 0);
	for (;;) {
		struct ps_shard *c;
		struct ps_flow *found;

		CHECK(!ptrace(PTRACE_SINGLESTEP, child, NULL, NULL), "single step");
		waitpid(child, &status, 0);
		if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP)
			break;
		steps++;
		memcpy(copy, a, a->bytes);
		c = ps_shard_at(copy, 1);
		if (c->dirty)
			ps_shard_rebuild(copy, c);
		shard_check(copy, c, timeout);
		for (uint32_t i = change == INSERT ? 0 : 1; i < n; i++) {
			found = look(copy, c, &others[i]);
			CHECK(found && found->snat_port == others[i].snat_port &&
				      !memcmp(found->backend, others[i].backend, 16),
			      "change %d, seed %lu, instruction %u: flow %u is lost", change, seed, steps, i);
		}
		found = look(copy, c, &value);
		CHECK(!found || (found->snat_port == value.snat_port && found->snat == value.snat &&
				 !memcmp(found->backend, value.backend, 16)),
		      "change %d, seed %lu, instruction %u: a flow with wrong contents", change, seed, steps);
		if (change == STATE)
			CHECK(found, "instruction %u: the flow is lost", steps);
		before |= (change == INSERT) != (found != NULL);
		after |= (change == INSERT) == (found != NULL);
	}
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	CHECK(steps > 100 && (change == STATE || (before && after)), "%u steps", steps);
	munmap(a, copy->bytes);
	free(copy);
}

int main(int argc, char **argv)
{
	uint32_t seeds = argc > 1 ? (uint32_t)atoi(argv[1]) : 60;

	for (uint32_t seed = 1; seed <= seeds; seed++) {
		random_state = seed;
		history(seed, 4000);
	}
	deaths();
	rubbish(20000);
	for (int change = 0; change < CHANGES; change++)
		for (uint64_t seed = 1; seed <= 2; seed++)
			every_instruction(change, seed);
	printf("%u histories\n", seeds);
	return 0;
}
