/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transfer: buckets change their owner while packets flow. docs/architecture.md explains the fence.
 *
 *   1. The new words are stored: directors send the buckets' packets to the new owner, who parks them.
 *   2. From every CPU that may run a director, one ingress marker goes to every queue that loses a
 *      bucket. A director's run ends before process context runs on its CPU, and its frames stand
 *      before the marker in the same ring; so when a queue has all markers, it has all old packets.
 *   3. The queue transmits what it has, marks its shards PS_FENCED, and acknowledges.
 *   4. From every CPU one egress marker leaves through the engine's interface, behind all that the
 *      engine ever sent from that CPU; it is counted where the last queue of the node ends.
 *   5. Every CPU is visited once more: what the egress programs redirected has left.
 *   6. The shards are released to the new owners, which are woken.
 *
 * Nothing is released by a timer. Markers are sent again until they are answered. Of an engine that is gone,
 * processes and interface, nothing can be under way: its buckets need no markers. Its shards may be torn: their next
 * owner finds that. Engines write shards, and may write what they like: of a shard only its owner is read here, and it
 * leads nowhere but to queues that there are.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "native.h"
#include "packetstack/shard.h"

#define LOAD(p)	    __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

enum { RESEND_NS = 20000000 };

/*
 * Where tests let the agent die: PACKETSTACK_DIE_AT=STEP:PASS. The shipped library has no such place.
 */
#ifdef PS_STEPS
static void step(const char *name)
{
	static int passes;
	const char *wanted = getenv("PACKETSTACK_DIE_AT");
	size_t length = strlen(name);

	if (wanted && !strncmp(wanted, name, length) && wanted[length] == ':' && ++passes >= atoi(wanted + length + 1))
		kill(getpid(), SIGKILL);
}
#define STEP(name) step(name)
#else
#define STEP(name) ((void)0)
#endif

struct transfer {
	struct ps_arena *arena;
	uint64_t *words, *egress;
	uint32_t offset;
	struct ps_fence_engine *engines;
	int n_engines;
	const struct ps_move *moves;
	int n_moves;
	uint32_t limit_ms;
	struct ps_transfer_report *report;
	struct ps_error *e;
	cpu_set_t cpus; /* all online CPUs */
	int all_cpus;
	uint32_t attempt;
	uint64_t id;
	/* Queues that lose a bucket, queues that get one: bit per queue, by place in `engines`. */
	uint64_t sources[PS_MAX_SLOTS], targets[PS_MAX_SLOTS];
};

static int engine_at(const struct transfer *t, uint32_t slot)
{
	for (int i = 0; i < t->n_engines; i++)
		if (t->engines[i].slot == slot)
			return i;
	return -1;
}

static int is_gone(const struct ps_fence_engine *f) { return !f->engine; }

/* An owner that an engine wrote may name a queue that the engine at this place has not. Of others nothing is known. */
static int has_queue(const struct transfer *t, int at, uint64_t owner)
{
	return at < 0 || is_gone(&t->engines[at]) || ps_word_queue(owner) < t->engines[at].engine->queues;
}

/* ---- visits ------------------------------------------------------------------------------------------ */

static int send_marker(int socket, const struct ps_marker *m)
{
	uint8_t frame[64] = { 0xff,
			      0xff,
			      0xff,
			      0xff,
			      0xff,
			      0xff,
			      2,
			      0x50,
			      0x4b,
			      0,
			      0,
			      1,
			      PS_MARKER_ETHERTYPE >> 8,
			      PS_MARKER_ETHERTYPE & 0xff };

	memcpy(frame + 14, m, sizeof(*m));
	for (int i = 0; i < 1000; i++) {
		if (send(socket, frame, sizeof(frame), 0) >= 0)
			return 0;
		if (errno != ENOBUFS && errno != EAGAIN)
			return -1;
	}
	return -1;
}

/* Runs on every online CPU in turn. kind 0: the visit alone is the point. */
static void visit(struct transfer *t, int kind)
{
	for (uint32_t cpu = 0; cpu < PS_MAX_CPUS; cpu++) {
		cpu_set_t one;

		if (!CPU_ISSET(cpu, &t->cpus))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		if (sched_setaffinity(0, sizeof(one), &one))
			continue; /* the marker will be missing, so nothing is released; sent again later */
		for (int i = 0; i < t->n_engines && kind; i++) {
			struct ps_marker m = {
				.magic = PS_MARKER_MAGIC,
				.kind = (uint8_t)kind,
				.cpu = (uint16_t)cpu,
				.slot = (uint16_t)t->engines[i].slot,
				.attempt = t->attempt,
				.fence = t->id,
			};

			if (!t->sources[i])
				continue;
			m.token = t->engines[i].engine->token;
			if (kind == PS_MARKER_EGRESS) {
				t->report->markers += !send_marker(t->engines[i].egress, &m);
				continue;
			}
			for (uint32_t q = 0; q < PS_MAX_QUEUES; q++) {
				if (!(t->sources[i] >> q & 1) ||
				    LOAD(&ps_queue_of(&t->engines[i], q)->fence_acked) >= t->id)
					continue;
				m.queue = (uint8_t)q;
				t->report->markers += !send_marker(t->engines[i].ingress, &m);
			}
		}
	}
	sched_setaffinity(0, sizeof(t->cpus), &t->cpus);
}

/* -> slot of an engine that has not answered, 0 = all have */
static uint32_t unanswered(const struct transfer *t, int kind)
{
	for (int i = 0; i < t->n_engines; i++) {
		uint32_t slot = t->engines[i].slot;

		if (!t->sources[i])
			continue;
		if (kind == PS_MARKER_EGRESS) {
			for (uint32_t cpu = 0; cpu < PS_MAX_CPUS; cpu++)
				if (CPU_ISSET(cpu, &t->cpus) && LOAD(&t->egress[slot * PS_MAX_CPUS + cpu]) != t->id)
					return slot;
			continue;
		}
		for (uint32_t q = 0; q < PS_MAX_QUEUES; q++)
			if (t->sources[i] >> q & 1 && LOAD(&ps_queue_of(&t->engines[i], q)->fence_acked) < t->id)
				return slot;
	}
	return 0;
}

/* Sends markers of `kind` until all are answered or limit_ms have passed. */
static uint32_t fence_side(struct transfer *t, int kind)
{
	uint64_t begun = clock_ns(), sent = begun;
	uint32_t slot;
	long pause = 20000;

	visit(t, kind);
	STEP(kind == PS_MARKER_INGRESS ? "ingress" : "egress");
	while ((slot = unanswered(t, kind))) {
		uint64_t now = clock_ns();

		if (now - begun > t->limit_ms * 1000000ull)
			return slot;
		if (now - sent > RESEND_NS) {
			t->attempt++;
			t->report->resent++;
			visit(t, kind);
			sent = now;
		}
		pause_ns(pause);
		if (pause < 500000)
			pause += pause / 4;
	}
	return 0;
}

int ps_probe(const struct ps_fence_engine *f, struct ps_error *e)
{
	struct ps_marker m = { .magic = PS_MARKER_MAGIC,
			       .kind = PS_MARKER_INGRESS,
			       .slot = (uint16_t)f->slot,
			       .token = f->engine->token };

	for (uint32_t q = 0; q < f->engine->queues; q++) {
		m.queue = (uint8_t)q;
		if (send_marker(f->ingress, &m))
			return ps_fail(e, "engine %u: cannot send a probe to queue %u: %s", f->slot, q,
				       strerror(errno));
	}
	return 0;
}

/* ---- the move ---------------------------------------------------------------------------------------- */

/* A bucket whose word and shard differ: its fence is open. Adds its source. -> 1 if it is to be fenced */
static int add_source(struct transfer *t, struct ps_fence *fence, uint32_t bucket)
{
	uint64_t word = LOAD(&t->words[t->offset + bucket]), owner = LOAD(&ps_shard_at(t->arena, bucket)->owner);
	int at;

	if (ps_owner(word) == ps_owner(owner) && !(owner & 0xffff))
		return 0;
	at = engine_at(t, ps_word_slot(owner));
	if (!ps_word_slot(owner) || !has_queue(t, at, owner)) {
		/* Nobody owns it, so nobody handles packets of it: nothing to wait for. */
		STORE(&ps_shard_at(t->arena, bucket)->owner, ps_owner(word));
		return 0;
	}
	if (ps_owner(word) == ps_owner(owner))
		return 0; /* fenced without a new word: not ours to release */
	if (at < 0) {	  /* it may still be handling packets: left open until it is known again, or gone */
		t->report->stalled_slot = ps_word_slot(owner);
		return 0;
	}
	if (!is_gone(&t->engines[at]))
		t->sources[at] |= 1ull << ps_word_queue(owner);
	fence->bitmap[bucket / 8] |= (uint8_t)(1 << bucket % 8);
	fence->buckets++;
	return 1;
}

static uint64_t *side(struct transfer *t, uint64_t *queues, uint64_t word)
{
	int at = engine_at(t, ps_word_slot(word));

	return at < 0 || is_gone(&t->engines[at]) || !has_queue(t, at, word) ? NULL : &queues[at];
}

static uint64_t queue_bit(uint64_t word) { return 1ull << ps_word_queue(word); }

static void take_part(struct transfer *t, uint64_t from, uint64_t to)
{
	uint64_t *source = side(t, t->sources, from), *target = side(t, t->targets, to);

	if (source)
		*source |= queue_bit(from);
	if (target)
		*target |= queue_bit(to);
}

/*
 * No queue may give and get buckets in one fence: frames that wait for a bucket to come would stand
 * before frames of a bucket that leaves, and each would wait for the other.
 */
static int may_take_part(struct transfer *t, uint64_t from, uint64_t to)
{
	uint64_t *gets = side(t, t->targets, from), *gives = side(t, t->sources, to);

	return !(gets && *gets & queue_bit(from)) && !(gives && *gives & queue_bit(to));
}

static int transfer_run(struct transfer *t)
{
	struct ps_transfer_report *r = t->report;
	uint8_t touched[PS_MAX_SLOTS / 8] = { 0 };
	struct ps_fence *fence;
	uint64_t begun;
	uint32_t open = 0, unknown;

	t->id = t->arena->next_fence++;
	fence = &t->arena->fences[t->id % PS_MAX_FENCES];
	STORE(&fence->id, 0);
	memset(fence->bitmap, 0, sizeof(fence->bitmap));
	fence->buckets = 0;
	fence->cpus = (uint32_t)CPU_COUNT(&t->cpus);

	for (int i = 0; i < t->n_moves; i++) {
		const struct ps_move *m = &t->moves[i];
		int at = engine_at(t, m->slot);

		if (m->bucket >= t->arena->buckets)
			return ps_fail(t->e, "bucket %u: there are only %u", m->bucket, t->arena->buckets);
		if (m->slot && (at < 0 || is_gone(&t->engines[at]) || m->queue >= t->engines[at].engine->queues))
			return ps_fail(t->e, "bucket %u: no queue %u of engine %u", m->bucket, m->queue, m->slot);
	}
	begun = clock_ns();
	/* What an interrupted call left open counts: its queues wait already. */
	for (uint32_t b = 0; b < t->arena->buckets; b++) {
		uint64_t word = LOAD(&t->words[t->offset + b]), owner = LOAD(&ps_shard_at(t->arena, b)->owner);

		if (ps_owner(word) != ps_owner(owner))
			take_part(t, owner, word);
	}
	for (int i = 0; i < t->n_moves; i++) {
		const struct ps_move *m = &t->moves[i];
		uint64_t *at = &t->words[t->offset + m->bucket], word = LOAD(at);
		uint64_t next = ps_word(ps_word_epoch(word) + 1, m->slot, m->queue, 0, 0);

		if (ps_owner(word) != ps_owner(LOAD(&ps_shard_at(t->arena, m->bucket)->owner)) ||
		    (ps_word_slot(word) == m->slot && ps_word_queue(word) == m->queue) ||
		    !may_take_part(t, word, next)) {
			r->skipped++; /* there already, or it must wait for the next fence */
			continue;
		}
		take_part(t, word, next);
		STORE(at, next);
		r->moved++;
		STEP("word");
	}
	for (uint32_t b = 0; b < t->arena->buckets; b++) {
		int added = add_source(t, fence, b);

		if (added < 0)
			return -1;
		open += (uint32_t)added;
	}
	if (!open)
		return 0;
	STEP("described");
	STORE(&fence->id, t->id);
	STEP("opened");

	unknown = r->stalled_slot;
	r->stalled_slot = fence_side(t, PS_MARKER_INGRESS);
	STEP("acknowledged");
	r->acked_ns = clock_ns() - begun;
	if (!r->stalled_slot) {
		r->stalled_slot = fence_side(t, PS_MARKER_EGRESS);
		r->stalled_egress = r->stalled_slot != 0;
	}
	if (r->stalled_slot) {
		r->total_ns = clock_ns() - begun;
		return 0;
	}
	r->stalled_slot = unknown;
	STEP("fenced");
	visit(t, 0);
	STEP("visited");
	for (uint32_t b = 0; b < t->arena->buckets; b++) {
		uint64_t word;

		if (!(fence->bitmap[b / 8] >> (b % 8) & 1))
			continue;
		word = LOAD(&t->words[t->offset + b]);
		STEP("release");
		STORE(&ps_shard_at(t->arena, b)->owner, ps_owner(word));
		touched[ps_word_slot(word) / 8] |= (uint8_t)(1 << ps_word_slot(word) % 8);
	}
	r->total_ns = clock_ns() - begun;
	STEP("released");
	for (int i = 0; i < t->n_engines; i++)
		if (touched[t->engines[i].slot / 8] >> (t->engines[i].slot % 8) & 1 && !is_gone(&t->engines[i]))
			ps_wake_engine(&t->engines[i]);
	return 0;
}

/* A thread of its own: affinity and priority of the caller never change. */
static void *transfer_thread(void *argument)
{
	struct transfer *t = argument;
	struct sched_param first = { .sched_priority = 10 };
	long online = sysconf(_SC_NPROCESSORS_ONLN);

	/* A director may run on any CPU. Writing fails where the thread is to stay in its cpuset; told below. */
	if (t->all_cpus >= 0 && write(t->all_cpus, "0", 1) < 0)
		t->all_cpus = -1;
	for (int i = 0; i < CPU_SETSIZE && i < PS_MAX_CPUS; i++)
		CPU_SET(i, &t->cpus);
	sched_setaffinity(0, sizeof(t->cpus), &t->cpus);
	if (sched_getaffinity(0, sizeof(t->cpus), &t->cpus) || CPU_COUNT(&t->cpus) < online)
		return (void *)(intptr_t)ps_fail(
			t->e, "the agent may run on %d of %ld CPUs, so no bucket can move: a fence must visit all",
			CPU_COUNT(&t->cpus), online);
	t->report->cpus = (uint32_t)CPU_COUNT(&t->cpus);
	sched_setscheduler(0, SCHED_FIFO, &first); /* shorter holds; correct without it */
	return (void *)(intptr_t)transfer_run(t);
}

int ps_transfer(struct ps_arena *a, uint64_t *words, uint32_t offset, uint64_t *egress, struct ps_fence_engine *engines,
		int n_engines, const struct ps_move *moves, int n_moves, uint32_t limit_ms, int all_cpus,
		struct ps_transfer_report *report, struct ps_error *e)
{
	struct transfer t = {
		.arena = a,
		.words = words,
		.offset = offset,
		.egress = egress,
		.engines = engines,
		.n_engines = n_engines,
		.moves = moves,
		.n_moves = n_moves,
		.limit_ms = limit_ms,
		.all_cpus = all_cpus,
		.report = report,
		.e = e,
	};
	pthread_t thread;
	void *result;

	memset(report, 0, sizeof(*report));
	if (n_engines > PS_MAX_SLOTS)
		return ps_fail(e, "%d engines; at most %d", n_engines, PS_MAX_SLOTS);
	if (pthread_create(&thread, NULL, transfer_thread, &t))
		return ps_fail(e, "cannot start the fence thread: %s", strerror(errno));
	pthread_join(thread, &result);
	return (int)(intptr_t)result;
}
