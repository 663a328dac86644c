/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mirror: buckets get an owner of another set while their connections stay with the set before, the keeper.
 * docs/architecture.md explains why nobody handles a packet twice.
 *
 *   Switch: 1. The newcomer's shards are PS_WAITING, then the words name both: from here on both get a copy. The
 *              newcomer parks its copies; so does the keeper.
 *           2. Ingress markers of every CPU to the keeper's queues. When a queue has them all it can make no more flows
 *              of these buckets: it publishes which it has, its shards become PS_KEPT, and it acknowledges.
 *           3. The newcomer's shards are released. No flow changes its engine, so nothing can be overtaken on the way out.
 *   End:    1. The words name the newcomer alone, at the same epoch.
 *           2. Ingress markers to the queues of both: all copies have been handled.
 *           3. The keeper's shards are nobody's.
 *
 * Words and shards say how far either has come: a call that was interrupted is finished by the next.
 */
#include <string.h>

#include "fence.h"
#include "packetstack/connections.h"

struct mirror {
	struct fence fence; /* first: see fence_run */
	const struct ps_sets *sets;
	const struct ps_switch *moves;
	int n_moves;
	const uint32_t *buckets;
	int n_buckets;
};

static struct mirror mirror_of(const struct ps_sets *sets, struct ps_transfer_report *report, struct ps_error *e)
{
	return (struct mirror){
		.fence = { .engines = sets->engines,
			   .n_engines = sets->n_engines,
			   .limit_ms = sets->limit_ms,
			   .all_cpus = sets->all_cpus,
			   .report = report,
			   .e = e },
		.sets = sets,
	};
}

static uint64_t *word_at(const struct mirror *m, uint32_t bucket) { return &m->sets->words[m->sets->offset + bucket]; }

static uint64_t *keeper_at(const struct mirror *m, uint32_t bucket)
{
	return &ps_shard_at(m->sets->keeper, bucket)->owner;
}

static uint64_t *newcomer_at(const struct mirror *m, uint32_t bucket)
{
	return &ps_shard_at(m->sets->newcomer, bucket)->owner;
}

/* One id in both arenas, newer than any of either: an engine acknowledges them in turn. */
static void fence_of_both(struct mirror *m)
{
	uint64_t a = m->sets->keeper->next_fence, b = m->sets->newcomer->next_fence;

	m->fence.id = a > b ? a : b;
	m->sets->keeper->next_fence = m->sets->newcomer->next_fence = m->fence.id + 1;
}

static int check(const struct mirror *m)
{
	if (m->sets->keeper->buckets != m->sets->newcomer->buckets)
		return ps_fail(m->fence.e, "the sets have %u and %u buckets; a stack's sets have equally many",
			       m->sets->keeper->buckets, m->sets->newcomer->buckets);
	for (int i = 0; i < m->n_moves; i++) {
		const struct ps_switch *s = &m->moves[i];

		if (s->bucket >= m->sets->keeper->buckets || !s->pair || s->pair >= PS_MAX_PAIRS ||
		    !fence_reaches(&m->fence, ps_word(0, s->slot, s->queue, 0, 0)))
			return ps_fail(m->fence.e, "bucket %u: no queue %u of engine %u, or no pair %u", s->bucket,
				       s->queue, s->slot, s->pair);
	}
	for (int i = 0; i < m->n_buckets; i++)
		if (m->buckets[i] >= m->sets->keeper->buckets)
			return ps_fail(m->fence.e, "bucket %u: there are only %u", m->buckets[i],
				       m->sets->keeper->buckets);
	return 0;
}

/* ---- switch ------------------------------------------------------------------------------------------- */

/* Is the newcomer waiting for this bucket? */
static int is_open(const struct mirror *m, uint32_t bucket)
{
	uint64_t word = LOAD(word_at(m, bucket));

	return ps_word_prev_slot(word) && LOAD(newcomer_at(m, bucket)) == (ps_owner(word) | PS_WAITING);
}

/*
 * Nothing may wait in a keeper's queue for a bucket that came to it just now: it would stand behind copies that wait for
 * the end of this fence. -> slot of an engine whose queue does not get empty in time, or 0
 */
static uint32_t let_queues_drain(const struct mirror *m)
{
	uint64_t begun = clock_ns();

	for (int i = 0; i < m->n_moves; i++) {
		uint64_t owner = LOAD(keeper_at(m, m->moves[i].bucket));
		const struct ps_queue *q;

		if (!fence_reaches(&m->fence, owner))
			continue;
		q = ps_queue_of(&m->fence.engines[fence_engine_at(&m->fence, ps_word_slot(owner))],
				ps_word_queue(owner));
		while (LOAD(&q->park.producer) != LOAD(&q->park.consumer)) {
			if (clock_ns() - begun > m->fence.limit_ms * 1000000ull)
				return ps_word_slot(owner);
			pause_ns(20000);
		}
	}
	return 0;
}

static void begin_switch(struct mirror *m)
{
	struct ps_transfer_report *r = m->fence.report;

	for (int i = 0; i < m->n_moves; i++) {
		const struct ps_switch *s = &m->moves[i];
		uint64_t word = LOAD(word_at(m, s->bucket)), next;

		if (ps_word_prev_slot(word) || !ps_word_slot(word) ||
		    ps_owner(word) != LOAD(keeper_at(m, s->bucket))) { /* mirrored already, or being moved */
			r->skipped++;
			continue;
		}
		next = ps_word(ps_word_epoch(word) + 1, s->slot, s->queue, ps_word_slot(word), ps_word_queue(word));
		STORE(newcomer_at(m, s->bucket), ps_owner(next) | PS_WAITING);
		STEP("waiting");
		STORE(&m->sets->pairs[m->sets->offset + s->bucket], s->pair);
		STORE(word_at(m, s->bucket), next);
		r->moved++;
		STEP("mirrored");
	}
}

static int switch_run(struct fence *f)
{
	struct mirror *m = (struct mirror *)f;
	struct ps_fence *description;
	uint64_t begun;

	if (check(m))
		return -1;
	f->report->stalled_slot = let_queues_drain(m);
	if (f->report->stalled_slot)
		return 0;
	begun = clock_ns();
	f->id = m->sets->keeper->next_fence++;
	description = fence_begin(f, m->sets->keeper, PS_FENCE_SWITCH);
	begin_switch(m);
	for (uint32_t b = 0; b < m->sets->keeper->buckets; b++) {
		uint64_t keeper = LOAD(keeper_at(m, b));

		if (!is_open(m, b))
			continue;
		if ((keeper & 0xffff) == PS_OWNED && ps_word_slot(keeper)) {
			int at = fence_engine_at(f, ps_word_slot(keeper));

			if (at < 0) /* it may still make flows */
				f->report->stalled_slot = ps_word_slot(keeper);
			if (at < 0 || fence_is_gone(&f->engines[at]))
				continue; /* nobody publishes what it has until it is adopted */
			fence_add(f, keeper);
		}
		fence_bucket(description, b);
	}
	if (!description->buckets)
		return 0;
	STORE(&description->id, f->id);
	STEP("opened");
	if (!f->report->stalled_slot)
		f->report->stalled_slot = fence_side(f, PS_MARKER_INGRESS);
	f->report->acked_ns = f->report->total_ns = clock_ns() - begun;
	if (f->report->stalled_slot)
		return 0;
	STEP("acknowledged");
	for (uint32_t b = 0; b < m->sets->keeper->buckets; b++)
		if (fence_has(description, b)) {
			STORE(newcomer_at(m, b), ps_owner(LOAD(word_at(m, b))));
			STEP("release");
		}
	f->report->total_ns = clock_ns() - begun;
	for (int i = 0; i < f->n_engines; i++)
		if (!fence_is_gone(&f->engines[i]))
			ps_wake_engine(&f->engines[i]);
	return 0;
}

int ps_mirror_switch(const struct ps_sets *sets, const struct ps_switch *moves, int n_moves,
		     struct ps_transfer_report *report, struct ps_error *e)
{
	struct mirror m = mirror_of(sets, report, e);

	m.moves = moves;
	m.n_moves = n_moves;
	return fence_run(&m.fence, switch_run);
}

/* ---- end ---------------------------------------------------------------------------------------------- */

static int end_run(struct fence *f)
{
	struct mirror *m = (struct mirror *)f;
	uint64_t begun = clock_ns();
	struct ps_fence *at_keeper, *at_newcomer;

	if (check(m))
		return -1;
	fence_of_both(m);
	at_keeper = fence_begin(f, m->sets->keeper, PS_FENCE_PASS);
	at_newcomer = fence_begin(f, m->sets->newcomer, PS_FENCE_PASS);
	for (int i = 0; i < m->n_buckets; i++) {
		uint64_t word = LOAD(word_at(m, m->buckets[i]));

		if (!ps_word_prev_slot(word) || is_open(m, m->buckets[i])) {
			f->report->skipped++;
			continue;
		}
		STORE(word_at(m, m->buckets[i]), ps_owner(word));
		f->report->moved++;
		STEP("alone");
	}
	/* Also those that an interrupted call has left so. */
	for (uint32_t b = 0; b < m->sets->keeper->buckets; b++) {
		uint64_t word = LOAD(word_at(m, b)), keeper = LOAD(keeper_at(m, b));

		if (ps_word_prev_slot(word) || !ps_word_slot(keeper) || LOAD(newcomer_at(m, b)) != ps_owner(word))
			continue;
		fence_add(f, keeper);
		fence_add(f, word);
		fence_bucket(at_keeper, b);
		fence_bucket(at_newcomer, b);
	}
	if (!at_keeper->buckets)
		return 0;
	STORE(&at_keeper->id, f->id);
	STORE(&at_newcomer->id, f->id);
	f->report->stalled_slot = fence_side(f, PS_MARKER_INGRESS);
	f->report->acked_ns = f->report->total_ns = clock_ns() - begun;
	if (f->report->stalled_slot)
		return 0;
	STEP("passed");
	for (uint32_t b = 0; b < m->sets->keeper->buckets; b++)
		if (fence_has(at_keeper, b)) {
			STORE(&m->sets->pairs[m->sets->offset + b], 0);
			STORE(keeper_at(m, b), 0);
			STEP("ended");
		}
	return 0;
}

int ps_mirror_end(const struct ps_sets *sets, const uint32_t *buckets, int n_buckets, struct ps_transfer_report *report,
		  struct ps_error *e)
{
	struct mirror m = mirror_of(sets, report, e);

	m.buckets = buckets;
	m.n_buckets = n_buckets;
	return fence_run(&m.fence, end_run);
}

/* ---- a keeper is gone --------------------------------------------------------------------------------- */

int ps_mirror_adopt(const struct ps_sets *sets, const struct ps_switch *moves, int n_moves, struct ps_error *e)
{
	struct mirror m = mirror_of(sets, NULL, e);

	m.moves = moves;
	m.n_moves = n_moves;
	if (check(&m))
		return -1;
	for (int i = 0; i < n_moves; i++) {
		const struct ps_switch *s = &moves[i];
		uint64_t word = LOAD(word_at(&m, s->bucket)), keeper = LOAD(keeper_at(&m, s->bucket));
		int at = fence_engine_at(&m.fence, ps_word_prev_slot(word));

		if (!ps_word_prev_slot(word) || (at >= 0 && !fence_is_gone(&m.fence.engines[at])))
			continue; /* it is there, or nobody keeps anything */
		STORE(keeper_at(&m, s->bucket),
		      ps_owner(ps_word(ps_word_epoch(keeper), s->slot, s->queue, 0, 0)) | (keeper & 0xffff));
		STORE(&sets->pairs[sets->offset + s->bucket], s->pair);
		STORE(word_at(&m, s->bucket), ps_owner(word) | ps_word(0, 0, 0, s->slot, s->queue));
	}
	return 0;
}

/* ---- what both sets have together --------------------------------------------------------------------- */

/* -> number of a backend or listener, by its name, the first `bytes` of an entry; it is looked for from *next on, for both
 * sets have most of them in one order. -1: there is none */
static int number_of(const void *name, size_t bytes, const void *entries, size_t stride, uint32_t n, uint32_t *next)
{
	for (uint32_t i = 0; i < n; i++) {
		uint32_t at = (*next + i) % n;

		if (!memcmp((const uint8_t *)entries + at * stride, name, bytes)) {
			*next = at + 1;
			return (int)at;
		}
	}
	return -1;
}

static uint32_t least_0(int32_t n) { return n > 0 ? (uint32_t)n : 0; }

void ps_mirror_share(const struct ps_sets *sets, const struct ps_connection_list *l)
{
	struct ps_arena *keeper = sets->keeper, *newcomer = sets->newcomer;
	const ps_client_count *from = ps_arena_clients(keeper).at;
	ps_client_count *to = ps_connections_clients(l);
	uint32_t next = 0;

	for (uint32_t i = 0; i < newcomer->backends && i < PS_MAX_BACKENDS; i++) {
		struct ps_backend *b = &newcomer->backend[i];
		int at = number_of(b, offsetof(struct ps_backend, used), keeper->backend, sizeof(*b),
				   keeper->backends < PS_MAX_BACKENDS ? keeper->backends : PS_MAX_BACKENDS, &next);

		STORE(&b->kept, at < 0 ? 0 : least_0(LOAD(&keeper->backend_count[at].live)));
	}
	memcpy(newcomer->kept_key, keeper->clients_key, sizeof(newcomer->kept_key));
	for (uint32_t i = 0; i < l->clients && i < keeper->clients; i++) {
		ps_client_count count = LOAD(&from[i]);

		if (LOAD(&to[i]) != count)
			STORE(&to[i], count);
	}
	for (uint32_t i = next = 0; i < PS_MAX_NUMBERS; i++) {
		struct ps_listener_name *name = &newcomer->listener[i];
		int at = !name->used ? -1
				     : number_of(name, offsetof(struct ps_listener_name, used), keeper->listener,
						 sizeof(*name), PS_MAX_NUMBERS, &next);

		STORE(&name->kept, at < 0 ? 0 : least_0(LOAD(&keeper->listener_count[at].proven)));
		STORE(&name->kept_as, (uint16_t)(at + 1));
	}
}

void ps_mirror_share_no_more(struct ps_arena *newcomer)
{
	for (uint32_t i = 0; i < PS_MAX_BACKENDS; i++)
		STORE(&newcomer->backend[i].kept, 0);
	for (uint32_t i = 0; i < PS_MAX_NUMBERS; i++) {
		STORE(&newcomer->listener[i].kept, 0);
		STORE(&newcomer->listener[i].kept_as, 0);
	}
}

/* ---- the list ----------------------------------------------------------------------------------------- */

void ps_connections_numbers(const struct ps_connection_list *l, uint32_t out[4])
{
	out[0] = l->buckets;
	out[1] = l->entries;
	out[2] = l->index_slots;
	out[3] = l->clients;
}

void ps_connections_left(const struct ps_connection_list *l, uint32_t *left, uint32_t *oldest)
{
	for (uint32_t b = 0; b < l->buckets; b++) {
		struct ps_connections *c = ps_connections_of(l, b);
		uint32_t published = LOAD(&c->published); /* first: behind it stands the number of all */
		uint32_t n = LOAD(&c->left);

		left[b] = !published ? UINT32_MAX : n > l->entries ? l->entries : n;
		oldest[b] = LOAD(&c->oldest);
	}
}
