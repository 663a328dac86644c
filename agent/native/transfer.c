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
 *
 * Of a bucket in mirror the newcomer's side can be moved, away from an engine that is gone; its keeper stays. Its pair is
 * stored before its word: copies that are stamped by the old word then come to an engine that they do not name, and go no
 * further (tests/model/mirror.py). The keeper's side: ps_mirror_adopt.
 */
#include <string.h>

#include "fence.h"
#include "packetstack/shard.h"

struct transfer {
	struct fence fence; /* first: see fence_run */
	struct ps_arena *arena;
	uint64_t *words;
	uint16_t *pairs; /* beside the words; NULL where the set is no newcomer */
	uint32_t offset;
	const struct ps_move *moves;
	int n_moves;
	uint64_t targets[PS_MAX_SLOTS]; /* queues that get a bucket, as fence.sources are those that lose one */
};

/* An owner that an engine wrote may name a queue that the engine at this place has not. Of others nothing is known. */
static int has_queue(const struct transfer *t, int at, uint64_t owner)
{
	return at < 0 || fence_is_gone(&t->fence.engines[at]) ||
	       ps_word_queue(owner) < t->fence.engines[at].engine->queues;
}

/* ---- the move ---------------------------------------------------------------------------------------- */

/*
 * Is the bucket none of ours to touch? This set waits for it or keeps connections of it, or its word names an engine of
 * another set: of which no shard is here, or to which its traffic is mirrored.
 */
static int is_others(const struct transfer *t, uint64_t word, uint64_t owner)
{
	uint32_t state = owner & 0xffff;

	return (ps_word_prev_slot(word) && !t->pairs) || state == PS_WAITING || state == PS_KEPT ||
	       (!ps_word_slot(owner) && ps_word_slot(word) && fence_engine_at(&t->fence, ps_word_slot(word)) < 0);
}

/* The word of a bucket that is moved: whoever keeps connections of it goes on doing so. */
static uint64_t moved_word(uint64_t word, const struct ps_move *m)
{
	return ps_word(ps_word_epoch(word) + 1, m->slot, m->queue, ps_word_prev_slot(word), ps_word_prev_queue(word));
}

/* A bucket whose word and shard differ: its fence is open. Adds its source. -> 1 if it is to be fenced */
static int add_source(struct transfer *t, struct ps_fence *fence, uint32_t bucket)
{
	uint64_t word = LOAD(&t->words[t->offset + bucket]), owner = LOAD(&ps_shard_at(t->arena, bucket)->owner);
	int at;

	if ((ps_owner(word) == ps_owner(owner) && !(owner & 0xffff)) || is_others(t, word, owner))
		return 0;
	at = fence_engine_at(&t->fence, ps_word_slot(owner));
	if (!ps_word_slot(owner) || !has_queue(t, at, owner)) {
		/* Nobody owns it, so nobody handles packets of it: nothing to wait for. */
		STORE(&ps_shard_at(t->arena, bucket)->owner, ps_owner(word));
		return 0;
	}
	if (ps_owner(word) == ps_owner(owner))
		return 0; /* fenced without a new word: not ours to release */
	if (at < 0) {	  /* it may still be handling packets: left open until it is known again, or gone */
		t->fence.report->stalled_slot = ps_word_slot(owner);
		return 0;
	}
	if (!fence_is_gone(&t->fence.engines[at]))
		t->fence.sources[at] |= 1ull << ps_word_queue(owner);
	fence_bucket(fence, bucket);
	return 1;
}

static uint64_t *side(struct transfer *t, uint64_t *queues, uint64_t word)
{
	int at = fence_engine_at(&t->fence, ps_word_slot(word));

	return at < 0 || fence_is_gone(&t->fence.engines[at]) || !has_queue(t, at, word) ? NULL : &queues[at];
}

static uint64_t queue_bit(uint64_t word) { return 1ull << ps_word_queue(word); }

static void take_part(struct transfer *t, uint64_t from, uint64_t to)
{
	uint64_t *source = side(t, t->fence.sources, from), *target = side(t, t->targets, to);

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
	uint64_t *gets = side(t, t->targets, from), *gives = side(t, t->fence.sources, to);

	return !(gets && *gets & queue_bit(from)) && !(gives && *gives & queue_bit(to));
}

static int transfer_run(struct fence *f)
{
	struct transfer *t = (struct transfer *)f;
	struct ps_transfer_report *r = t->fence.report;
	uint8_t touched[PS_MAX_SLOTS / 8] = { 0 };
	struct ps_fence *fence;
	uint64_t begun;
	uint32_t open = 0, unknown;

	t->fence.id = t->arena->next_fence++;
	fence = fence_begin(&t->fence, t->arena, PS_FENCE_TRANSFER);

	for (int i = 0; i < t->n_moves; i++) {
		const struct ps_move *m = &t->moves[i];
		int at = fence_engine_at(&t->fence, m->slot);

		if (m->bucket >= t->arena->buckets)
			return ps_fail(t->fence.e, "bucket %u: there are only %u", m->bucket, t->arena->buckets);
		if (m->slot &&
		    (at < 0 || fence_is_gone(&t->fence.engines[at]) || m->queue >= t->fence.engines[at].engine->queues))
			return ps_fail(t->fence.e, "bucket %u: no queue %u of engine %u", m->bucket, m->queue, m->slot);
		if (m->pair >= PS_MAX_PAIRS)
			return ps_fail(t->fence.e, "bucket %u: there is no pair %u", m->bucket, m->pair);
	}
	begun = clock_ns();
	/* What an interrupted call left open counts: its queues wait already. */
	for (uint32_t b = 0; b < t->arena->buckets; b++) {
		uint64_t word = LOAD(&t->words[t->offset + b]), owner = LOAD(&ps_shard_at(t->arena, b)->owner);

		if (ps_owner(word) != ps_owner(owner) && !is_others(t, word, owner))
			take_part(t, owner, word);
	}
	for (int i = 0; i < t->n_moves; i++) {
		const struct ps_move *m = &t->moves[i];
		uint64_t *at = &t->words[t->offset + m->bucket], word = LOAD(at), next = moved_word(word, m);
		uint64_t owner = LOAD(&ps_shard_at(t->arena, m->bucket)->owner);

		if (ps_owner(word) != ps_owner(owner) || is_others(t, word, owner) ||
		    (ps_word_prev_slot(word) && (!m->pair || !m->slot)) ||
		    (ps_word_slot(word) == m->slot && ps_word_queue(word) == m->queue) ||
		    !may_take_part(t, word, next)) {
			r->skipped++; /* there already, or it must wait for the next fence */
			continue;
		}
		take_part(t, word, next);
		if (ps_word_prev_slot(word)) {
			STORE(&t->pairs[t->offset + m->bucket], (uint16_t)m->pair);
			STEP("paired");
		}
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
	STORE(&fence->id, t->fence.id);
	STEP("opened");

	unknown = r->stalled_slot;
	r->stalled_slot = fence_side(&t->fence, PS_MARKER_INGRESS);
	STEP("acknowledged");
	r->acked_ns = clock_ns() - begun;
	if (!r->stalled_slot) {
		r->stalled_slot = fence_side(&t->fence, PS_MARKER_EGRESS);
		r->stalled_egress = r->stalled_slot != 0;
	}
	if (r->stalled_slot) {
		r->total_ns = clock_ns() - begun;
		return 0;
	}
	r->stalled_slot = unknown;
	STEP("fenced");
	fence_visit(&t->fence, 0);
	STEP("visited");
	for (uint32_t b = 0; b < t->arena->buckets; b++) {
		uint64_t word;

		if (!fence_has(fence, b))
			continue;
		word = LOAD(&t->words[t->offset + b]);
		STEP("release");
		STORE(&ps_shard_at(t->arena, b)->owner, ps_owner(word));
		touched[ps_word_slot(word) / 8] |= (uint8_t)(1 << ps_word_slot(word) % 8);
	}
	r->total_ns = clock_ns() - begun;
	STEP("released");
	for (int i = 0; i < t->fence.n_engines; i++)
		if (touched[t->fence.engines[i].slot / 8] >> (t->fence.engines[i].slot % 8) & 1 &&
		    !fence_is_gone(&t->fence.engines[i]))
			ps_wake_engine(&t->fence.engines[i]);
	return 0;
}

int ps_transfer(struct ps_arena *a, uint64_t *words, uint16_t *pairs, uint32_t offset, uint64_t *egress,
		struct ps_fence_engine *engines, int n_engines, const struct ps_move *moves, int n_moves,
		uint32_t limit_ms, int all_cpus, struct ps_transfer_report *report, struct ps_error *e)
{
	struct transfer t = {
		.fence = { .engines = engines,
			   .n_engines = n_engines,
			   .egress = egress,
			   .limit_ms = limit_ms,
			   .all_cpus = all_cpus,
			   .report = report,
			   .e = e },
		.arena = a,
		.words = words,
		.pairs = pairs,
		.offset = offset,
		.moves = moves,
		.n_moves = n_moves,
	};

	return fence_run(&t.fence, transfer_run);
}
