/* SPDX-License-Identifier: Apache-2.0 */
/* Random histories of one shard beside a plain reference: an array of flows in order of their age. */
#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "arena.h"
#include "packetstack/ports.h"

enum { MOST = 512, BUCKET = 3 };

struct reference {
	struct ps_entry flow[MOST]; /* state FREE = empty */
	uint64_t listed[MOST];	    /* when it came onto its list */
	uint64_t order;
};

static const uint32_t timeout[16] = { 0, 300, 600, 74400, 1200, 100, 700, 300, 500, 1800 };

/* Listeners' numbers: TCP, UDP, and two that share a class (number % 64). */
static const uint16_t numbers[4] = { 7, 8, 64 + 1, 1 };

/* One shard of a stack that would have `buckets`, with its listeners, backends and SNAT addresses. */
static struct ps_arena *one_shard(uint32_t buckets, uint32_t entries, uint32_t index_slots)
{
	struct ps_arena *a = arena_new(9, entries, index_slots);
	uint8_t address[16];

	a->buckets = buckets;
	for (uint32_t i = 0; i < 3; i++)
		mapped(a->address[i].bytes, 0xc6336400 + i);
	for (uint32_t i = 0; i < 4; i++) {
		mapped(address, 0xc0000200 + i);
		listener_is(a, numbers[i], address, (uint16_t)(80 + i), i & 1 ? 17 : 6);
	}
	for (uint32_t i = 0; i < 3; i++) {
		mapped(address, 0x0a010000 + i);
		backend_is(a, i, address, 8080);
	}
	return a;
}

static int find(const struct reference *r, const struct ps_entry *f)
{
	for (int i = 0; i < MOST; i++)
		if (r->flow[i].state && r->flow[i].client_port == f->client_port &&
		    r->flow[i].listener == f->listener && !memcmp(r->flow[i].client, f->client, 16))
			return i;
	return -1;
}

/* The flow that is longest on a list. */
static int oldest(const struct reference *r, uint32_t list)
{
	int best = -1;

	for (int i = 0; i < MOST; i++) {
		uint8_t state = r->flow[i].state;

		if (state && ps_list_of(state) == list && (best < 0 || r->listed[i] < r->listed[best]))
			best = i;
	}
	return best;
}

/* The half-open flow that goes first: the oldest of the class with most. Those before it go to the end of the list. */
static int half_open_victim(struct reference *r)
{
	int count[64] = { 0 }, most = 0, at;

	for (int i = 0; i < MOST; i++)
		if (r->flow[i].state && ps_state_half_open(r->flow[i].state))
			count[r->flow[i].listener % 64]++;
	for (int c = 1; c < 64; c++)
		if (count[c] > count[most])
			most = c;
	if (!count[most])
		return -1;
	while ((at = oldest(r, PS_LIST_HALF_OPEN)) >= 0 && r->flow[at].listener % 64 != most)
		r->listed[at] = ++r->order;
	return at;
}

static struct ps_entry *look(const struct ps_arena *a, struct ps_shard *s, const struct ps_entry *f)
{
	const struct ps_listener_name *l = &a->listener[f->listener];
	struct ps_key k = { .sport = f->client_port, .dport = l->port, .udp = f->flags & PS_FLOW_UDP, .hash = f->hash };

	memcpy(k.source, f->client, 16);
	memcpy(k.destination, l->address, 16);
	return ps_find_forward(a, s, &k);
}

static void draw(struct ps_entry *f, uint32_t clients)
{
	uint32_t c = random_below(clients), listener = random_below(3) ? random_below(2) * 2 : 1 + random_below(2) * 2;

	memset(f, 0, sizeof(*f));
	mapped(f->client, 0x0a000000 + c / 4);
	f->client_port = (uint16_t)(1000 + c % 4);
	f->flags = listener & 1 ? PS_FLOW_UDP : 0;
	/* Few values: homes collide, chains wrap around the end. */
	f->hash = (c * 2654435761u + f->flags) % 61;
	f->listener = numbers[listener];
	f->snat = (uint16_t)(1 + random_below(2));
	f->backend = (uint16_t)random_below(3);
	f->state = f->flags & PS_FLOW_UDP ? PS_FLOW_UNANSWERED : PS_FLOW_SYN;
}

/* A port of the flow's pair of SNAT address and backend; *victim: whose port may be taken if there is none. */
static uint16_t port_of(struct ps_arena *a, struct ps_shard *s, const struct ps_entry *f, struct ps_entry **victim)
{
	static const struct ps_opening never; /* no backend takes its SYN while it keeps an older connection */
	const struct ps_backend *b = &a->backend[f->backend];

	*victim = NULL;
	return ps_port_find(a, s, BUCKET, f->snat, b->address, b->port, f->flags & PS_FLOW_UDP ? NULL : &never, NULL,
			    NULL, victim);
}

/* How readily a flow gives its port up: one that has ended, then one of the listener with most half-open flows. */
static int readiness(const struct ps_entry *f, uint32_t flooded)
{
	return f->state == PS_FLOW_CLOSED ? 2 : f->listener % 64 == flooded;
}

/* The victim is of the pair, and none of the pair should rather go: by readiness, then the oldest. */
static void check_port_victim(const struct reference *r, const struct ps_entry *victim, const struct ps_entry *f)
{
	uint32_t ports = 0, half_open[64] = { 0 }, flooded = 0;

	for (int i = 0; i < MOST; i++)
		half_open[r->flow[i].listener % 64] += ps_state_half_open(r->flow[i].state);
	for (uint32_t c = 1; c < 64; c++)
		if (half_open[c] > half_open[flooded])
			flooded = c;

	for (int i = 0; i < MOST; i++) {
		const struct ps_entry *other = &r->flow[i];

		if (!other->state || other->snat != f->snat || other->backend != f->backend ||
		    (other->flags ^ f->flags) & PS_FLOW_UDP)
			continue;
		ports++;
		if (other->state != PS_FLOW_CLOSED && !ps_state_half_open(other->state))
			continue;
		CHECK(victim, "a port could be taken, of a flow in state %u", other->state);
		CHECK(readiness(victim, flooded) > readiness(other, flooded) ||
			      (readiness(victim, flooded) == readiness(other, flooded) &&
			       victim->last_seen <= other->last_seen),
		      "state %u of %u goes before state %u of %u", victim->state, victim->last_seen, other->state,
		      other->last_seen);
	}
	CHECK(ports >= 7, "no port is found with %u in use", ports);
	if (victim)
		CHECK(victim->snat == f->snat && victim->backend == f->backend &&
			      (victim->state == PS_FLOW_CLOSED || ps_state_half_open(victim->state)),
		      "state %u", victim->state);
}

static uint32_t history(uint64_t seed, uint32_t steps)
{
	static struct reference r;
	uint32_t entries = 16 + random_below(100), slots = 16, now = random_below(1u << 30), taken = 0;
	struct ps_arena *a;
	struct ps_shard *s;

	while (slots < entries + entries / 4)
		slots *= 2;
	a = one_shard(random_below(2) ? 256 : 8192, entries, slots); /* of 8192 a pair has 7 ports */
	s = ps_shard_at(a, BUCKET);
	memset(&r, 0, sizeof(r));
	for (uint32_t step = 0; step < steps; step++) {
		struct ps_entry f, *have;
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
			struct ps_entry *room, *victim;
			int n = 0, half = 0;

			if (have)
				break;
			f.snat_port = port_of(a, s, &f, &victim);
			if (!f.snat_port) {
				check_port_victim(&r, victim, &f);
				if (!victim)
					break;
				f.snat_port = victim->snat_port;
				r.flow[find(&r, victim)].state = 0;
				ps_flow_remove(a, s, victim);
				taken++;
			}
			CHECK((__builtin_bswap16(f.snat_port) & (a->buckets - 1)) == BUCKET, "port %u", f.snat_port);
			CHECK(__builtin_bswap16(f.snat_port) >= 1024, "port %u", f.snat_port);
			for (int i = 0; i < MOST; i++) {
				n += r.flow[i].state != 0;
				half += r.flow[i].state && ps_state_half_open(r.flow[i].state);
				CHECK(!r.flow[i].state || r.flow[i].snat_port != f.snat_port ||
					      r.flow[i].snat != f.snat ||
					      (r.flow[i].flags & PS_FLOW_UDP) != (f.flags & PS_FLOW_UDP) ||
					      r.flow[i].backend != f.backend,
				      "seed %lu step %u: a SNAT port given out twice", seed, step);
			}
			if (half >= (int)entries / 2) {
				r.flow[half_open_victim(&r)].state = 0;
				expected++;
				n--;
			}
			if (n == (int)entries) {
				int goes = oldest(&r, PS_LIST_CLOSED);

				if (goes < 0)
					goes = half_open_victim(&r);
				if (goes < 0)
					goes = oldest(&r, PS_LIST_TIME_WAIT);
				if (goes >= 0) {
					r.flow[goes].state = 0;
					expected++;
					n--;
				}
			}
			room = ps_flow_room(a, s, &recycled);
			CHECK(recycled == expected, "seed %lu step %u: %u recycled, expected %u", seed, step, recycled,
			      expected);
			CHECK((room != NULL) == (n < (int)entries), "seed %lu step %u", seed, step);
			if (!room)
				break;
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
			if (!random_below(8)) { /* or shows that it is in use */
				ps_flow_renew(a, s, have);
				r.listed[at] = ++r.order;
				break;
			}
			ps_flow_set_state(a, s, have, state, timeout, now);
			if (!ps_state_ended(state) && random_below(2))
				ps_proven_add(a, have, random_below(2));
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
			for (uint32_t list = 0; list < PS_LISTS; list++)
				for (uint32_t e = s->list[list].head; e; e = ps_shard_flows(a, s)[e - 1].next)
					r.listed[find(&r, &ps_shard_flows(a, s)[e - 1])] = ++r.order;
		}
		if (step % 16 == 0) {
			shard_check(a, s, timeout);
			counts_check(a, BUCKET, 1, 0);
		}
	}
	now += 200000;
	ps_shard_sweep(a, s, timeout, now);
	CHECK(!s->live, "%u flows", s->live);
	counts_check(a, BUCKET, 1, 0); /* nothing is counted any more */
	free(a);
	return taken;
}

/* A writer may die after any of its stores: what the next owner rebuilds is whole, and other flows are untouched. */
static void deaths(void)
{
	struct ps_arena *a = one_shard(256, 64, 128);
	struct ps_shard *s = ps_shard_at(a, BUCKET);
	uint32_t recycled = 0;

	for (uint32_t i = 0; i < 20000; i++) {
		struct ps_entry f, *have, *flows = ps_shard_flows(a, s), *victim;
		uint32_t live;

		draw(&f, 90);
		have = look(a, s, &f);
		if (!have) {
			struct ps_entry *room = ps_flow_room(a, s, &recycled);

			f.snat_port = room ? port_of(a, s, &f, &victim) : 0;
			if (f.snat_port)
				ps_flow_insert(a, s, room, &f, timeout, i);
			continue;
		}
		if (random_below(2))
			ps_flow_set_state(a, s, have, (uint8_t)(1 + random_below(PS_FLOW_STATES - 1)), timeout, i);
		if (!ps_state_ended(have->state))
			ps_proven_add(a, have, random_below(2));
		live = s->live;
		switch (random_below(6)) {
		case 0: /* within the entry */
			s->dirty = 1;
			ps_flow_begin(have);
			have->state = (uint8_t)random_below(256);
			memset(have->client, (int)random_below(256), 1 + random_below(15));
			/* A writer has taken it from the counts before, or has not added it yet. */
			memcpy(have->client, f.client, 16);
			ps_proven_subtract(a, have);
			ps_count_subtract(a, s, have);
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
		case 3: /* within a change of state, before it is counted */
			s->dirty = 1;
			ps_list_remove(a, s, have);
			have->state = (uint8_t)(1 + random_below(PS_FLOW_STATES - 1));
			CHECK(ps_shard_rebuild(a, s) == 0, "no entry was half written");
			break;
		case 4: /* within a removal: it is counted no more */
			s->dirty = 1;
			ps_proven_subtract(a, have);
			if (random_below(2))
				ps_count_subtract(a, s, have);
			CHECK(ps_shard_rebuild(a, s) == 0, "no entry was half written");
			break;
		default: /* anywhere in what is derived */
			s->dirty = 1;
			s->live = (uint16_t)random_below(65536);
			s->free = (uint16_t)random_below(65536);
			s->list[random_below(PS_LISTS)].head = (uint16_t)random_below(65536);
			s->list[random_below(PS_LISTS)].tail = (uint16_t)random_below(65536);
			s->list[random_below(PS_LISTS)].count = (uint16_t)random_below(65536);
			ps_shard_shares(a, s)[random_below(64)].held = (uint16_t)random_below(65536);
			ps_shard_shares(a, s)[random_below(64)].half_open = (uint16_t)random_below(65536);
			ps_shard_forward(s)[random_below(128)] = (uint16_t)random_below(65536);
			CHECK(ps_shard_rebuild(a, s) == 0, "no entry was half written");
		}
		CHECK(s->live == live, "%u flows, expected %u", s->live, live);
		shard_check(a, s, timeout);
		counts_check(a, BUCKET, 1, 0);
	}
	free(a);
}

/*
 * A shard's first user looks at header and indexes only: until the sweep comes, entries may hold anything.
 * Whatever its flows do then, memory outside the shard stays as it was, and the sweep's look puts all right.
 */
static void rubbish(uint32_t rounds)
{
	struct ps_arena *a = one_shard(256, 64, 128);
	struct ps_shard *s = ps_shard_at(a, BUCKET);
	uint8_t *flows = (uint8_t *)ps_shard_flows(a, s);
	uint32_t recycled = 0, unseen = 0;

	memset(ps_shard_at(a, BUCKET - 1), 0x5a, a->shard_stride);
	memset(ps_shard_at(a, BUCKET + 1), 0x5a, a->shard_stride);
	for (uint32_t round = 0; round < rounds; round++) {
		for (uint32_t i = random_below(40); i < 40; i++)
			flows[random_below(a->entries * sizeof(struct ps_entry))] = (uint8_t)random_below(256);
		if (ps_shard_sane(a, s))
			ps_shard_rebuild(a, s);
		unseen += ps_shard_check(a, s) != NULL;
		for (uint32_t step = 0; step < 60; step++) {
			struct ps_entry f, *have, *room, *victim;

			draw(&f, 90);
			have = look(a, s, &f);
			if (have && random_below(2)) {
				ps_flow_set_state(a, s, have, (uint8_t)(1 + random_below(PS_FLOW_STATES - 1)), timeout,
						  round);
				if (!ps_state_ended(have->state))
					ps_proven_add(a, have, random_below(2));
				ps_flow_renew(a, s, have);
			} else if (have) {
				ps_flow_remove(a, s, have);
			} else if (ps_share_left(a, s, ps_class(&f), 0x182) && (room = ps_flow_room(a, s, &recycled))) {
				f.snat_port = port_of(a, s, &f, &victim);
				if (f.snat_port)
					ps_flow_insert(a, s, room, &f, timeout, round);
			}
		}
		for (uint32_t neighbour = BUCKET - 1; neighbour <= BUCKET + 1; neighbour += 2)
			for (uint64_t i = 0; i < a->shard_stride; i++)
				CHECK(((uint8_t *)ps_shard_at(a, neighbour))[i] == 0x5a, "round %u", round);
		if (ps_shard_check(a, s))
			ps_shard_rebuild(a, s);
		CHECK(!ps_shard_check(a, s), "round %u: %s", round, ps_shard_check(a, s));
	}
	CHECK(unseen > rounds / 2, "%u rounds began with rubbish", unseen);
	free(a);
}

enum change { INSERT, REMOVE, END, PROVE, REOPEN, CHANGES };

static void change_one(struct ps_arena *a, struct ps_shard *s, enum change change, struct ps_entry *f)
{
	uint32_t recycled = 0;
	struct ps_entry *have = look(a, s, f);

	if (change == INSERT) {
		ps_flow_insert(a, s, ps_flow_room(a, s, &recycled), f, timeout, 50);
	} else if (change == REMOVE) {
		ps_flow_remove(a, s, have);
	} else if (change == END) {
		ps_flow_set_state(a, s, have, PS_FLOW_CLOSED, timeout, 50);
	} else if (change == PROVE) {
		ps_proven_add(a, have, true);
		ps_flow_set_state(a, s, have, PS_FLOW_ESTABLISHED, timeout, 50);
	} else {
		ps_flow_set_state(a, s, have, PS_FLOW_SYN, timeout, 50);
	}
}

/*
 * The same with a real writer: a child is single-stepped through one change, and after each instruction
 * a copy of its memory is what its successor would find.
 */
static void every_instruction(enum change change, uint64_t seed)
{
	static const uint8_t from[CHANGES] = { [REMOVE] = PS_FLOW_ESTABLISHED,
					       [END] = PS_FLOW_ESTABLISHED,
					       [PROVE] = PS_FLOW_SYN_ACK,
					       [REOPEN] = PS_FLOW_TIME_WAIT };
	struct ps_arena *prototype, *a, *copy;
	struct ps_entry value, others[40];
	uint32_t n = 0, steps = 0, doubtful = 0;
	struct ps_shard *s;
	bool before = false, after = false;
	int status;
	pid_t child;

	random_state = seed;
	prototype = one_shard(256, 64, 128);
	a = mmap(NULL, prototype->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	copy = malloc(prototype->bytes);
	CHECK(a != MAP_FAILED && copy, "out of memory");
	memcpy(a, prototype, prototype->bytes);
	free(prototype);
	s = ps_shard_at(a, BUCKET);
	while (n < 40) {
		uint32_t recycled = 0;
		struct ps_entry *f = &others[n], *have;

		draw(f, 90);
		if (look(a, s, f))
			continue;
		f->state = (uint8_t)(1 + random_below(PS_FLOW_STATES - 1));
		if (n == 0 && change != INSERT)
			f->state = from[change];
		f->snat_port = port_of(a, s, f, &have);
		if (!f->snat_port || s->list[PS_LIST_HALF_OPEN].count >= 31)
			continue;
		ps_flow_insert(a, s, ps_flow_room(a, s, &recycled), f, timeout, 40);
		have = look(a, s, f);
		if (ps_state_ended(f->state))
			ps_count_subtract(a, s, have);
		else if (f->state != PS_FLOW_SYN_ACK)
			ps_proven_add(a, have, n & 2 || !n);
		n++;
	}
	/* Some entries are free again, so that a new flow takes one that was used before. */
	for (n = 40; seed & 1 && n > 36; n--)
		ps_flow_remove(a, s, look(a, s, &others[n - 1]));
	value = others[0];
	if (change == INSERT) {
		struct ps_entry *victim;

		do {
			draw(&value, 900);
			value.snat_port = port_of(a, s, &value, &victim);
		} while (look(a, s, &value) || !value.snat_port);
	}
	shard_check(a, s, timeout);
	counts_check(a, BUCKET, 1, 0);
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
		struct ps_entry *found;

		CHECK(!ptrace(PTRACE_SINGLESTEP, child, NULL, NULL), "single step");
		waitpid(child, &status, 0);
		if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP)
			break;
		steps++;
		memcpy(copy, a, a->bytes);
		c = ps_shard_at(copy, BUCKET);
		if (c->dirty)
			ps_shard_rebuild(copy, c);
		shard_check(copy, c, timeout);
		/* Of a backend, of a listener, its proven flows and a client's: each may count one too many. */
		doubtful += counts_check(copy, BUCKET, 1, 2) != 0;
		for (uint32_t i = change == INSERT ? 0 : 1; i < n; i++) {
			found = look(copy, c, &others[i]);
			CHECK(found && found->snat_port == others[i].snat_port && found->backend == others[i].backend,
			      "change %d, seed %lu, instruction %u: flow %u is lost", change, seed, steps, i);
		}
		found = look(copy, c, &value);
		CHECK(!found || (found->snat_port == value.snat_port && found->snat == value.snat &&
				 found->backend == value.backend),
		      "change %d, seed %lu, instruction %u: a flow with wrong contents", change, seed, steps);
		if (change != INSERT && change != REMOVE) {
			CHECK(found, "instruction %u: the flow is lost", steps);
			before |= found->state == value.state;
			after |= found->state != value.state;
		} else {
			before |= (change == INSERT) != (found != NULL);
			after |= (change == INSERT) == (found != NULL);
		}
	}
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	CHECK(steps > 100 && before && after, "%u steps", steps);
	CHECK(doubtful * 5 < steps, "change %d: %u of %u instructions leave a counter wrong", change, doubtful, steps);
	munmap(a, copy->bytes);
	free(copy);
}

int main(int argc, char **argv)
{
	uint32_t seeds = argc > 1 ? (uint32_t)atoi(argv[1]) : 60, taken = 0;

	for (uint32_t seed = 1; seed <= seeds; seed++) {
		random_state = seed;
		taken += history(seed, 4000);
	}
	CHECK(taken > seeds, "%u ports were taken from others", taken);
	deaths();
	rubbish(20000);
	for (int change = 0; change < CHANGES; change++)
		for (uint64_t seed = 1; seed <= 2; seed++)
			every_instruction((enum change)change, seed);
	printf("%u histories, %u ports taken from others\n", seeds, taken);
	return 0;
}
