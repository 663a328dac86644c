/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The packet loop. One thread per core; a queue is served by exactly one core at a time.
 *
 * There are no private cursors: all positions are the ring indexes themselves, which the agent's
 * descriptors keep alive. So a queue is handed to another thread, or adopted after a death, by
 * changing one word (ps_queue.cur), and the new server simply goes on.
 */
#include "datapath.h"

#include <errno.h>
#include <linux/if_xdp.h>
#include <linux/sock_diag.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "packetstack/census.h"
#include "packetstack/forms.h"
#include "packetstack/parts.h"
#include "nat.h"

#define LOAD(p)	    __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

enum { SOURCE_RX = 0, SOURCE_PARK = 1 };

struct worker {
	struct datapath *d;
	struct ps_core *core;
	struct ps_handler handler;
	uint32_t index;	      /* core number */
	uint32_t me;	      /* generation << 8 | core + 1 */
	uint32_t sweep;	      /* next shard to sweep */
	uint32_t reckon;      /* so many of the next ones are looked at whatever they say about their next expiry */
	uint32_t timeout[16]; /* of the configuration, ticks by ps_flow_state */
	uint64_t swept_ns;
	uint64_t now_ns;
	uint64_t free_ns; /* test builds: when it is done with the packets that it had */
};

static uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static uint32_t ring_used(const struct kernel_ring *r) { return LOAD(r->producer) - LOAD(r->consumer); }

/* ---- deaths that a test orders ----------------------------------------------------------------------- */

#ifdef PS_INJECT
static struct ps_engine *ordered_by;

void ps_point(enum ps_point at)
{
	struct ps_engine *e = ordered_by;

	if (e && LOAD(&e->die_at) == at && __atomic_sub_fetch(&e->die_after, 1, __ATOMIC_ACQ_REL) == 0) {
		STORE(&e->die_at, PS_AT_NOWHERE);
		raise(SIGKILL);
	}
}

static bool without(enum ps_protection what) { return ordered_by->protection_off & what; }

/* ---- what a test lets a packet cost ------------------------------------------------------------------ */

/* Frames of a batch: with a cost one, so that each leaves when its time is over. */
static uint32_t at_once(const struct datapath *d) { return d->engine->work_ns ? 1 : PS_BATCH; }

/*
 * Waits as long as the packet costs, and so is busy without taking a CPU from anybody. What a late wake-up took is
 * made good with the next packets: a core handles as many packets as it should whatever else the machine does.
 */
static void take_time(struct worker *w)
{
	uint64_t cost = w->d->engine->work_ns, now = clock_ns();
	struct timespec until;

	if (!cost)
		return;
	if (w->free_ns + 200000000 < now) /* it was idle, or stood still for long */
		w->free_ns = now;
	w->free_ns += cost;
	if (w->free_ns <= now)
		return;
	until = (struct timespec){ .tv_sec = (time_t)(w->free_ns / 1000000000),
				   .tv_nsec = (long)(w->free_ns % 1000000000) };
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
		;
}
#else
static bool without(enum ps_protection what) { return false; }
static uint32_t at_once(const struct datapath *d) { return PS_BATCH; }
static void take_time(struct worker *w) {}
#endif

/* ---- transmission ---------------------------------------------------------------------------------- */

/* Copy mode sends at most 32 frames a call. -> true when the transmit ring is empty */
static bool kick(struct queue *q)
{
	for (int i = 0; i < 64; i++) {
		if (!ring_used(&q->tx)) {
			q->shared->kick = 0;
			return true;
		}
		if (sendto(q->socket, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0 && errno != EAGAIN && errno != EBUSY)
			break;
	}
	if (!ring_used(&q->tx)) {
		q->shared->kick = 0;
		return true;
	}
	return false;
}

/* ---- frames back to the fill ring ------------------------------------------------------------------ */

static void recycle_publish(struct datapath *d)
{
	struct ps_recycle *r = &d->engine->recycle;

	STORE(d->fill.producer, r->fill);
	PS_POINT(RECYCLE_FILL);
	STORE(d->completion.consumer, r->completion);
	PS_POINT(RECYCLE_COMPLETION);
	for (uint32_t i = 0; i < d->queues; i++) {
		STORE(&d->queue[i].shared->free.consumer, r->free_consumer[i]);
		PS_POINT(RECYCLE_FREE);
	}
}

static uint32_t recycle_check(const struct ps_recycle *r, uint32_t queues)
{
	uint32_t check = (r->fill * 31 + r->completion) ^ 0x504b5243;

	for (uint32_t i = 0; i < queues; i++)
		check = check * 31 + r->free_consumer[i];
	return check;
}

/* Writes the frame of `address` into the fill slot `at`. What is no frame goes nowhere. -> slots written */
static uint32_t recycle_frame(const struct datapath *d, uint32_t at, uint64_t address)
{
	if (address >= d->umem_bytes)
		return 0;
	((uint64_t *)d->fill.slots)[at & d->fill.mask] = address & ~(uint64_t)(PS_FRAME_BYTES - 1);
	PS_POINT(RECYCLE_SLOT);
	return 1;
}

/* Completed and dropped frames of all queues become fill descriptors. Somebody else at it: go on. */
static uint32_t recycle(struct worker *w, uint32_t at_least)
{
	struct datapath *d = w->d;
	struct ps_recycle *r = &d->engine->recycle;
	const uint64_t *completion = d->completion.slots;
	uint32_t available = ring_used(&d->completion), zero = 0, n = 0, room, producer, consumer;

	for (uint32_t i = 0; i < d->queues; i++)
		available += LOAD(&d->queue[i].shared->free.producer) - LOAD(&d->queue[i].shared->free.consumer);
	if (available < at_least)
		return 0;
	if (!__atomic_compare_exchange_n(&d->engine->lock, &zero, w->me, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
		return 0;
	PS_POINT(RECYCLE_LOCKED);
	producer = LOAD(d->fill.producer);
	room = d->fill.mask + 1 - (producer - LOAD(d->fill.consumer));
	if (room > 256)
		room = 256;
	consumer = LOAD(d->completion.consumer);
	while (n < room && consumer != LOAD(d->completion.producer))
		n += recycle_frame(d, producer + n, completion[consumer++ & d->completion.mask]);
	r->completion = consumer;
	for (uint32_t i = 0; i < d->queues; i++) {
		struct ps_ring *f = &d->queue[i].shared->free;
		uint32_t mask = d->engine->free_slots - 1;

		consumer = LOAD(&f->consumer);
		while (n < room && consumer != LOAD(&f->producer))
			n += recycle_frame(d, producer + n, d->queue[i].free[consumer++ & mask]);
		r->free_consumer[i] = consumer;
	}
	r->fill = producer + n;
	r->check = recycle_check(r, d->queues);
	PS_POINT(RECYCLE_WRITTEN);
	PS_BARRIER();
	r->commit = 1;
	PS_BARRIER();
	PS_POINT(RECYCLE_COMMITTED);
	recycle_publish(d);
	PS_BARRIER();
	r->commit = 0;
	PS_POINT(RECYCLE_CLEARED);
	STORE(&d->engine->lock, 0);
	return n;
}

/* ---- one batch of a queue: a transaction over ring indexes ------------------------------------------ */

static void journal_publish(struct queue *q)
{
	struct ps_queue *s = q->shared;
	struct ps_journal *j = &s->journal;

	STORE(q->tx.producer, j->tx);
	PS_POINT(PUBLISHED_TX);
	STORE(&s->park.producer, j->park_prod);
	PS_POINT(PUBLISHED_PARKED);
	STORE(&s->free.producer, j->free_prod);
	PS_POINT(PUBLISHED_FREE);
	STORE(&s->park.consumer, j->park_cons);
	PS_POINT(PUBLISHED_UNPARKED);
	STORE(q->rx.consumer, j->rx);
	PS_POINT(PUBLISHED_RX);
}

static uint32_t journal_check(const struct ps_journal *j)
{
	return ((((j->tx * 31 + j->park_prod) * 31 + j->free_prod) * 31 + j->park_cons) * 31 + j->rx) ^ 0x504b4a4c;
}

static const struct ps_stamp *stamp_of(const uint8_t *frame)
{
	return (const struct ps_stamp *)(frame - sizeof(struct ps_stamp));
}

static const struct ps_marker *marker_of(const uint8_t *frame, uint32_t length)
{
	if (length < 14 + sizeof(struct ps_marker) || frame[12] != PS_MARKER_ETHERTYPE >> 8 ||
	    frame[13] != (PS_MARKER_ETHERTYPE & 0xff))
		return NULL;
	return (const struct ps_marker *)(frame + 14);
}

static void marker_received(struct worker *w, struct queue *q, const uint8_t *frame)
{
	const struct ps_fence *f;
	struct ps_queue *s = q->shared;
	struct ps_marker m;
	uint32_t seen = 0;

	memcpy(&m, frame + 14, sizeof(m));
	f = &w->d->arena->fences[m.fence % PS_MAX_FENCES];
	if (m.magic != PS_MARKER_MAGIC || m.kind != PS_MARKER_INGRESS || m.token != w->d->engine->token ||
	    m.cpu >= PS_MAX_CPUS || (m.fence > s->fence_acked && LOAD(&f->id) != m.fence)) {
		w->core->counters[PS_C_DROP_UNKNOWN_MARKER]++;
		return;
	}
	w->core->counters[PS_C_MARKERS]++;
	if (m.fence <= s->fence_acked)
		return;
	if (m.fence > s->fence) {
		memset(s->fence_cpus, 0, sizeof(s->fence_cpus));
		s->fence = m.fence;
	} else if (m.fence < s->fence) {
		return;
	}
	s->fence_cpus[m.cpu / 64] |= 1ull << (m.cpu % 64);
	for (int i = 0; i < 4; i++)
		seen += (uint32_t)__builtin_popcountll(s->fence_cpus[i]);
	if (seen >= f->cpus)
		s->fence_complete = m.fence; /* acknowledged when everything before it has left */
	PS_POINT(MARKER);
}

static void look_at_shard(struct worker *w, uint32_t bucket, struct ps_shard *s, enum trust wanted);

/*
 * Every packet of this queue's bucket with the old stamp has been handled: no flow begins here any more, and the owner,
 * which is of another set, learns which there are.
 */
static void keep(struct worker *w, uint32_t bucket, struct ps_shard *s)
{
	struct datapath *d = w->d;

	if (d->trusted[bucket] != WHOLE)
		look_at_shard(w, bucket, s, WHOLE);
	ps_connections_publish(w->handler.list, ps_connections_of(w->handler.list, bucket), d->arena, s,
			       w->handler.now);
	STORE(&s->owner, ps_owner(s->owner) | PS_KEPT);
	PS_POINT(KEPT);
}

/*
 * All markers of a fence are here, so every packet with the old stamp has been handled. When the
 * transmit ring is empty too and nothing is parked for them, the buckets are declared fenced: from
 * here on this queue touches them no more. The agent then lets the egress side pass and releases.
 * With PS_FENCE_SWITCH they are kept instead; with PS_FENCE_PASS nothing changes.
 */
static void fence_acknowledge(struct worker *w, struct queue *q)
{
	struct datapath *d = w->d;
	struct ps_queue *s = q->shared;
	uint64_t id = s->fence_complete;
	const struct ps_fence *f = &d->arena->fences[id % PS_MAX_FENCES];
	uint32_t index = (uint32_t)(q - d->queue);

	if (id <= s->fence_acked || LOAD(&f->id) != id)
		return;
	if (f->kind == PS_FENCE_SWITCH && !w->handler.list)
		return; /* nowhere to publish what would be kept: the agent sees that nobody answers */
	/* A predecessor may have seen the last marker in a batch that it did not publish: that comes first. */
	if (s->journal.progress[SOURCE_RX].end != LOAD(q->rx.consumer))
		return;
	if (!kick(q))
		return;
	PS_POINT(FENCE_EMPTY);
	for (int pass = 0; pass < 2; pass++) {
		for (uint32_t b = 0; b < d->arena->buckets; b++) {
			struct ps_shard *shard;
			uint64_t owner;

			if (!(f->bitmap[b / 8] >> (b % 8) & 1))
				continue;
			shard = ps_shard_at(d->arena, b);
			owner = LOAD(&shard->owner);
			if (ps_word_slot(owner) != d->engine->slot || ps_word_queue(owner) != index)
				continue;
			if (!pass && (q->parked[b] || (f->kind == PS_FENCE_PASS && q->kept[b])))
				return;
			if (pass && f->kind == PS_FENCE_SWITCH && (owner & 0xffff) == PS_OWNED) {
				keep(w, b, shard);
			} else if (pass && f->kind == PS_FENCE_TRANSFER) {
				d->trusted[b] = UNKNOWN;
				STORE(&shard->owner, ps_owner(owner) | PS_FENCED);
				PS_POINT(FENCE_SHARD);
			}
		}
	}
	PS_POINT(FENCE_SHARDS);
	STORE(&s->fence_acked, id);
}

/* Is this the previous owner's copy of a packet? */
static bool for_keeper(const struct datapath *d, const struct ps_stamp *stamp)
{
	return stamp->flags & PS_STAMP_MIRROR && stamp->flags >> PS_STAMP_SLOT != d->engine->slot;
}

static void park_count(const struct datapath *d, struct queue *q, const struct ps_stamp *stamp, int change)
{
	uint16_t *parked = &(for_keeper(d, stamp) ? q->kept : q->parked)[stamp->bucket & (PS_MAX_BUCKETS - 1)];

	if (change > 0 || *parked)
		*parked = (uint16_t)(*parked + change);
}

/*
 * No shard is used that this process has not looked at: its last writer may have died in a change, or
 * worse. What the owner's first packet needs is cheap; the sweep, which reads all entries anyway, looks
 * at the rest.
 */
static void look_at_shard(struct worker *w, uint32_t bucket, struct ps_shard *s, enum trust wanted)
{
	struct datapath *d = w->d;

	if (without(PS_WITHOUT_REBUILD))
		return;
	if (wanted == WHOLE ? ps_shard_check(d->arena, s) : ps_shard_sane(d->arena, s)) {
		ps_shard_rebuild(d->arena, s);
		w->core->counters[PS_C_SHARDS_REBUILT]++;
		wanted = WHOLE;
	}
	d->trusted[bucket] = (uint8_t)wanted;
}

static uint8_t late(struct worker *w)
{
	w->core->counters[PS_C_LATE]++;
	w->core->counters[PS_C_DROP_NOT_OWNER]++;
	return PS_DROP;
}

/* The same of a previous owner's copy: it waits until nothing that was sent before can begin a flow here. */
static uint8_t admit_kept(struct worker *w, struct queue *q, const struct ps_stamp *stamp, bool from_park)
{
	struct datapath *d = w->d;
	struct ps_shard *s = ps_shard_at(d->arena, stamp->bucket);
	uint64_t owner = LOAD(&s->owner);

	if (ps_word_slot(owner) != d->engine->slot || ps_word_queue(owner) != (uint32_t)(q - d->queue))
		return late(w);
	if ((owner & 0xffff) == PS_OWNED && ps_epoch_newer(stamp->epoch, ps_word_epoch(owner)))
		return PS_PARK;
	if ((owner & 0xffff) != PS_KEPT)
		return late(w);
	if (!from_park && q->kept[stamp->bucket])
		return PS_PARK;
	if (__builtin_expect(d->trusted[stamp->bucket] == UNKNOWN, 0))
		look_at_shard(w, stamp->bucket, s, LINKS);
	return PS_TRANSMIT;
}

/* What is to be done with a frame, before anything is rewritten: its own bucket, or wait, or too late? */
static uint8_t admit(struct worker *w, struct queue *q, const struct ps_stamp *stamp, bool from_park)
{
	struct datapath *d = w->d;
	uint64_t mine, owner;

	if (stamp->magic != PS_STAMP_MAGIC || stamp->bucket >= d->arena->buckets) {
		w->core->counters[PS_C_DROP_NO_STAMP]++;
		return PS_DROP;
	}
	if (__builtin_expect(for_keeper(d, stamp), 0))
		return admit_kept(w, q, stamp, from_park);
	mine = ps_word(stamp->epoch, d->engine->slot, (uint32_t)(q - d->queue), 0, 0);
	owner = LOAD(&ps_shard_at(d->arena, stamp->bucket)->owner);
	if (owner == mine) {
		if (!from_park && q->parked[stamp->bucket])
			return PS_PARK;
		if (__builtin_expect(d->trusted[stamp->bucket] == UNKNOWN, 0))
			look_at_shard(w, stamp->bucket, ps_shard_at(d->arena, stamp->bucket), LINKS);
		return PS_TRANSMIT;
	}
	if (ps_epoch_newer(stamp->epoch, ps_word_epoch(owner)) || !owner || owner == (mine | PS_WAITING))
		return PS_PARK;
	return late(w);
}

/* Does the descriptor name a frame of ours, with its stamp and all that a rewrite may touch? */
static bool in_umem(const struct datapath *d, const struct ps_descriptor *in)
{
	uint32_t offset = in->address & (PS_FRAME_BYTES - 1);
	uint32_t length = in->length > PS_UNDO_BYTES ? in->length : PS_UNDO_BYTES;

	return in->address < d->umem_bytes && offset >= sizeof(struct ps_stamp) && length <= PS_FRAME_BYTES - offset;
}

/*
 * The process died while it rewrote this frame. Once may be chance; after the second time the frame is
 * to blame: it is kept for whoever wants to know, and dropped. -> whether it is to be dropped
 */
static bool poison(struct worker *w, struct queue *q, int source, uint32_t at, const uint8_t *frame, uint32_t length)
{
	struct ps_journal *j = &q->shared->journal;
	struct ps_engine *e = w->d->engine;
	struct ps_capture *c = (struct ps_capture *)((uint8_t *)e + e->captures_offset);
	uint32_t bucket = stamp_of(frame)->bucket;

	if (j->torn[source] != at)
		j->torn_times[source] = 0;
	PS_BARRIER();
	j->torn[source] = at;
	PS_BARRIER();
	j->torn_times[source]++;
	PS_POINT(TORN_COUNTED);
	if (bucket < w->d->arena->buckets)
		look_at_shard(w, bucket, ps_shard_at(w->d->arena, bucket), WHOLE);
	if (j->torn_times[source] < 2)
		return false;
	c += __atomic_fetch_add(&e->captured, 1, __ATOMIC_ACQ_REL) % PS_CAPTURES;
	c->time_ns = clock_ns();
	c->bucket = bucket;
	c->queue = (uint32_t)(q - w->d->queue);
	c->length = length;
	memset(c->bytes, 0, sizeof(c->bytes));
	memcpy(c->bytes, frame, length < sizeof(c->bytes) ? length : sizeof(c->bytes));
	w->core->counters[PS_C_DROP_POISON]++;
	return true;
}

/* The descriptor that sends a rewritten frame: begins at the Ethernet header, ends with the IP packet. */
static struct ps_descriptor outgoing(const uint8_t *umem, const struct ps_descriptor *in, uint8_t verdict)
{
	struct ps_descriptor out = { in->address + PS_SHIFT(verdict), 0, 0 };
	const uint8_t *ip = umem + out.address + 14;

	out.length = 14u + ((ip[0] >> 4) == 4 ? (uint32_t)ip[2] << 8 | ip[3] : 40u + ((uint32_t)ip[4] << 8 | ip[5]));
	return out;
}

/*
 * Moves up to PS_BATCH frames from `source` to the transmit, park and free rings. -> frames handled.
 * The same code runs after an adoption: what the predecessor rewrote is sent on, not rewritten again;
 * what it was rewriting when it died is undone first.
 */
static uint32_t batch(struct worker *w, struct queue *q, int source)
{
	struct datapath *d = w->d;
	struct ps_queue *s = q->shared;
	struct ps_journal *j = &s->journal;
	struct ps_progress *p = &j->progress[source];
	struct ps_descriptor *in = source == SOURCE_RX ? q->rx.slots : q->park, *tx = q->tx.slots;
	uint32_t in_mask = source == SOURCE_RX ? q->rx.mask : d->engine->park_slots - 1;
	uint32_t consumer = source == SOURCE_RX ? LOAD(q->rx.consumer) : LOAD(&s->park.consumer);
	uint32_t producer = source == SOURCE_RX ? LOAD(q->rx.producer) : LOAD(&s->park.producer);
	uint32_t tx_at = LOAD(q->tx.producer), park_at = LOAD(&s->park.producer), free_at = LOAD(&s->free.producer);
	uint32_t tx_room = q->tx.mask + 1 - ring_used(&q->tx);
	uint32_t park_room = d->engine->park_slots - (park_at - LOAD(&s->park.consumer));
	uint32_t free_room = d->engine->free_slots - (free_at - LOAD(&s->free.consumer));
	uint32_t n = producer - consumer, i, markers = 0;
	uint32_t tx_begin = tx_at, forwarded;
	uint64_t bytes = 0;

	if (n > at_once(d))
		n = at_once(d);
	if (n > free_room)
		n = free_room;
	if (n > tx_room)
		n = tx_room;
	PS_POINT(BATCH_SIZED);
	for (i = 0; i < n; i++) {
		const struct ps_descriptor *desc = &in[(consumer + i) & in_mask];

		__builtin_prefetch(d->umem + desc->address);
		__builtin_prefetch(d->umem + desc->address - 16);
	}
	for (i = 0; i < n; i++) {
		const struct ps_descriptor *desc = &in[(consumer + i) & in_mask];
		const struct ps_stamp *stamp = stamp_of(d->umem + desc->address);
		struct ps_shard *shard;

		if (!in_umem(d, desc))
			continue;
		shard = ps_shard_at(d->arena, stamp->bucket & (d->arena->buckets - 1));
		__builtin_prefetch(shard);
		__builtin_prefetch((uint8_t *)(shard + 1) + 2 * ps_home_forward(d->arena, stamp->hash));
	}
	for (i = 0; i < n; i++) {
		uint32_t at = consumer + i;
		const struct ps_descriptor *desc = &in[at & in_mask];
		uint8_t *frame = d->umem + desc->address;
		uint8_t verdict;

		if (__builtin_expect(!in_umem(d, desc), 0)) {
			w->core->counters[PS_C_DROP_BAD_DESCRIPTOR]++;
			p->end = at + 1; /* whose frame it was, the next census finds out */
			continue;
		}
		if (__builtin_expect(p->end != at, 0) && !without(PS_WITHOUT_UNDO)) {
			verdict = p->verdict[at & 63]; /* the predecessor finished this one and did not publish */
		} else {
			bool torn = p->begin == at && !without(PS_WITHOUT_UNDO);

			if (__builtin_expect(torn, 0)) {
				memcpy(frame, p->undo, PS_UNDO_BYTES); /* it died inside this rewrite */
				PS_POINT(UNDO_RESTORED);
				PS_BARRIER();
				p->begin = at - 1; /* only a rewrite that begins again counts again */
				PS_BARRIER();
			}
			if (source == SOURCE_RX && marker_of(frame, desc->length)) {
				marker_received(w, q, frame);
				verdict = PS_CONSUMED;
			} else if (__builtin_expect(torn, 0) && poison(w, q, source, at, frame, desc->length)) {
				verdict = PS_DROP;
			} else {
				verdict = admit(w, q, stamp_of(frame), source == SOURCE_PARK);
				if (verdict == PS_PARK && source == SOURCE_PARK)
					break; /* not released yet: everything behind it waits, in order */
				if (verdict == PS_PARK && !park_room) {
					w->core->counters[PS_C_DROP_PARK_FULL]++;
					verdict = PS_DROP;
				}
				if (verdict == PS_TRANSMIT) {
					memcpy(p->undo, frame, PS_UNDO_BYTES / 2);
					PS_POINT(UNDO_HALF_SAVED);
					memcpy(p->undo + PS_UNDO_BYTES / 2, frame + PS_UNDO_BYTES / 2,
					       PS_UNDO_BYTES / 2);
					PS_POINT(UNDO_SAVED);
					PS_BARRIER();
					p->begin = at;
					PS_BARRIER();
					PS_POINT(REWRITE_BEGUN);
					verdict = ps_handle(&w->handler, frame, desc->length, stamp_of(frame));
					take_time(w);
					PS_POINT(REWRITE_DONE);
					PS_BARRIER();
				}
			}
			p->verdict[at & 63] = verdict;
			PS_POINT(VERDICT);
			PS_BARRIER();
			p->end = at + 1;
			PS_POINT(FRAME_DONE);
		}
		if (PS_VERDICT(verdict) == PS_TRANSMIT) {
			struct ps_descriptor out = outgoing(d->umem, desc, verdict);

			if (__builtin_expect(in_umem(d, &out), 1))
				tx[tx_at++ & q->tx.mask] = out;
			else /* a verdict that nobody gave */
				q->free[free_at++ & (d->engine->free_slots - 1)] = desc->address;
		} else if (PS_VERDICT(verdict) == PS_PARK && source == SOURCE_RX && park_room) {
			q->park[park_at++ & (d->engine->park_slots - 1)] = *desc;
			park_count(d, q, stamp_of(frame), 1);
			w->core->counters[PS_C_PARKED]++;
			park_room--;
		} else {
			markers += verdict == PS_CONSUMED;
			q->free[free_at++ & (d->engine->free_slots - 1)] = desc->address;
		}
		PS_POINT(SLOT_WRITTEN);
		bytes += desc->length;
		if (source == SOURCE_PARK)
			park_count(d, q, stamp_of(frame), -1);
	}
	if (!i)
		return 0;
	j->tx = tx_at;
	j->park_prod = park_at;
	j->free_prod = free_at;
	j->park_cons = LOAD(&s->park.consumer) + (source == SOURCE_PARK ? i : 0);
	j->rx = LOAD(q->rx.consumer) + (source == SOURCE_RX ? i : 0);
	j->check = journal_check(j);
	PS_POINT(JOURNAL_WRITTEN);
	PS_BARRIER();
	j->commit = 1;
	PS_BARRIER();
	PS_POINT(COMMITTED);
	journal_publish(q);
	PS_BARRIER();
	j->commit = 0;
	PS_POINT(BATCH_DONE);

	forwarded = tx_at - tx_begin;
	s->forwarded += forwarded;
	if (source == SOURCE_RX) {
		s->received += i - markers;
		s->received_bytes += bytes;
		w->core->counters[PS_C_RECEIVED] += i - markers;
		w->core->counters[PS_C_RECEIVED_BYTES] += bytes;
		if (j->park_prod != j->park_cons && !s->hold_since)
			s->hold_since = w->now_ns;
	} else {
		w->core->counters[PS_C_UNPARKED] += i;
		if (s->hold_since) {
			uint64_t hold = clock_ns() - s->hold_since;

			s->hold_ns += hold;
			s->holds++;
			if (hold > s->hold_max_ns)
				s->hold_max_ns = hold;
			s->hold_since = j->park_prod != j->park_cons ? w->now_ns : 0;
		}
	}
	if (forwarded)
		s->kick = 1;
	return i;
}

/* A queue that has much to do is never empty; but what stood in its rings at a time is handled some day. */
static void note_handled(struct worker *w, struct queue *q)
{
	struct ps_queue *s = q->shared;

	if (!q->past && (int32_t)(LOAD(q->rx.consumer) - q->mark) >= 0) {
		q->past = true;
		q->park_mark = LOAD(&s->park.producer);
	}
	if (!q->past || (int32_t)(LOAD(&s->park.consumer) - q->park_mark) < 0)
		return;
	q->handled_ns = q->marked_ns;
	q->marked_ns = w->now_ns;
	q->mark = LOAD(q->rx.producer);
	q->past = false;
}

static uint32_t serve(struct worker *w, struct queue *q)
{
	struct ps_queue *s = q->shared;
	uint64_t begun = __rdtsc();
	uint32_t parked = LOAD(&s->park.producer) - LOAD(&s->park.consumer), waiting = ring_used(&q->rx), done = 0;

	if (s->depth != parked + waiting)
		s->depth = parked + waiting;
	note_handled(w, q);
	if (parked)
		done += batch(w, q, SOURCE_PARK);
	if (waiting)
		done += batch(w, q, SOURCE_RX);
	if (s->kick)
		kick(q);
	PS_POINT(KICKED);
	if (s->fence_complete > s->fence_acked)
		fence_acknowledge(w, q);
	if (done) {
		uint64_t spent = __rdtsc() - begun;

		s->cycles += spent;
		w->core->busy_cycles += spent;
	}
	return done;
}

/* ---- taking over ------------------------------------------------------------------------------------ */

static bool alive(const struct datapath *d, uint32_t server) { return server >> 8 == (d->generation & 0xffffff); }

/* Is `to` where a ring's index at `from` can have been moved by one transaction over at most `most` frames? */
static bool moved(uint32_t from, uint32_t to, uint32_t most) { return to - from <= most; }

/* A journal is believed when its check fits and each index leads from the ring's own to where it could be. */
static bool journal_sane(const struct datapath *d, const struct queue *q)
{
	const struct ps_queue *s = q->shared;
	const struct ps_journal *j = &s->journal;

	return j->commit == 1 && j->check == journal_check(j) && moved(LOAD(q->tx.producer), j->tx, PS_BATCH) &&
	       moved(LOAD(&s->park.producer), j->park_prod, PS_BATCH) &&
	       moved(LOAD(&s->free.producer), j->free_prod, PS_BATCH) &&
	       moved(LOAD(&s->park.consumer), j->park_cons, PS_BATCH) && moved(LOAD(q->rx.consumer), j->rx, PS_BATCH) &&
	       moved(LOAD(q->tx.consumer), j->tx, q->tx.mask + 1) &&
	       moved(j->rx, LOAD(q->rx.producer), q->rx.mask + 1) &&
	       moved(j->park_cons, j->park_prod, d->engine->park_slots) &&
	       moved(LOAD(&s->free.consumer), j->free_prod, d->engine->free_slots);
}

static bool recycle_sane(const struct datapath *d)
{
	const struct ps_recycle *r = &d->engine->recycle;
	bool sane = r->commit == 1 && r->check == recycle_check(r, d->queues) &&
		    moved(LOAD(d->fill.producer), r->fill, 256) &&
		    moved(LOAD(d->fill.consumer), r->fill, d->fill.mask + 1) &&
		    moved(r->completion, LOAD(d->completion.producer), d->completion.mask + 1);

	for (uint32_t i = 0; i < d->queues; i++) {
		const struct ps_ring *f = &d->queue[i].shared->free;

		sane = sane && moved(LOAD(&f->consumer), r->free_consumer[i], 256) &&
		       moved(r->free_consumer[i], LOAD(&f->producer), d->engine->free_slots);
	}
	return sane;
}

/* What is finished lies in the ring and is one batch at the most; what was begun is among it, or the next. */
static bool progress_sane(const struct ps_progress *p, uint32_t consumer, uint32_t producer)
{
	return p->end - consumer <= PS_BATCH && p->end - consumer <= producer - consumer &&
	       (p->begin - consumer >= PS_BATCH || p->begin - consumer <= p->end - consumer);
}

static void progress_check(struct datapath *d, struct queue *q, int source, uint32_t consumer, uint32_t producer)
{
	struct ps_progress *p = &q->shared->journal.progress[source];

	if (progress_sane(p, consumer, producer))
		return;
	d->core[0]->counters[PS_C_JOURNALS_REFUSED]++;
	p->begin = consumer - 1;
	p->end = consumer;
}

/* ---- taking stock: each frame is in exactly one ring, or something is to be repaired ------------------ */

struct stock {
	uint8_t *times;			  /* per frame: how many rings hold it */
	uint32_t received[PS_MAX_QUEUES]; /* receive rings' producers at that time */
	struct ps_census found;
};

static void count_ring(const struct datapath *d, struct stock *k, const struct kernel_ring *r, uint32_t stride)
{
	uint32_t consumer = LOAD(r->consumer);

	ps_census_ring(k->times, d->engine->frames, r->slots, r->mask, stride, consumer, LOAD(r->producer), &k->found);
}

static void take_stock(const struct datapath *d, struct stock *k)
{
	uint32_t frames = d->engine->frames;

	memset(k->times, 0, frames);
	k->found = (struct ps_census){ 0 };
	/* The fill ring before the receive rings: what the kernel takes out of the one comes into the other. */
	count_ring(d, k, &d->fill, 8);
	for (uint32_t i = 0; i < d->queues; i++) {
		const struct queue *q = &d->queue[i];
		const struct ps_queue *s = q->shared;

		k->received[i] = LOAD(q->rx.producer);
		count_ring(d, k, &q->rx, sizeof(struct ps_descriptor));
		count_ring(d, k, &q->tx, sizeof(struct ps_descriptor));
		ps_census_ring(k->times, frames, q->park, d->engine->park_slots - 1, sizeof(struct ps_descriptor),
			       s->park.consumer, s->park.producer, &k->found);
		ps_census_ring(k->times, frames, q->free, d->engine->free_slots - 1, 8, s->free.consumer,
			       s->free.producer, &k->found);
	}
	count_ring(d, k, &d->completion, 8);
	ps_census_sum(k->times, frames, &k->found);
}

/* After a receive ring was full the kernel keeps one frame back, for the next packet. */
static bool receive_ring_was_full(const struct datapath *d)
{
	for (uint32_t i = 0; i < d->queues; i++) {
		struct xdp_statistics s = { 0 };
		socklen_t length = sizeof(s);

		if (getsockopt(d->queue[i].socket, SOL_XDP, XDP_STATISTICS, &s, &length) || s.rx_ring_full)
			return true;
	}
	return false;
}

/* Frames that were sent are in no ring until the node has passed them on. Nobody sends while we take over. */
static bool under_way(const struct datapath *d)
{
	for (uint32_t i = 0; i < d->queues; i++) {
		uint32_t memory[SK_MEMINFO_VARS] = { 0 };
		socklen_t length = sizeof(memory);

		if (getsockopt(d->queue[i].socket, SOL_SOCKET, SO_MEMINFO, memory, &length) ||
		    memory[SK_MEMINFO_WMEM_ALLOC])
			return true;
	}
	return false;
}

static bool claim(const struct datapath *d, uint8_t *held, uint64_t address)
{
	uint64_t frame = address / PS_FRAME_BYTES;

	if (frame >= d->engine->frames || held[frame])
		return false;
	held[frame] = 1;
	return true;
}

/*
 * Makes the rings add up again. The kernel's rings come first; a frame that they hold is taken out of ours, one
 * that nobody holds is given back. May be interrupted by death at any point: the next adopter finds what is left.
 */
static void repair(struct datapath *d, const struct stock *before, uint8_t *held)
{
	uint32_t frames = d->engine->frames, fill_mask = d->fill.mask;
	const uint64_t *fill = d->fill.slots;
	uint64_t *completion = d->completion.slots;
	bool kernel_keeps = receive_ring_was_full(d) || under_way(d);
	struct ps_ring *free = &d->queue[0].shared->free;

	memset(held, 0, frames);
	for (uint32_t at = LOAD(d->fill.consumer); at != LOAD(d->fill.producer); at++)
		claim(d, held, fill[at & fill_mask]);
	for (uint32_t i = 0; i < d->queues; i++) {
		struct queue *q = &d->queue[i];
		const struct ps_descriptor *tx = q->tx.slots;

		for (uint32_t at = LOAD(q->tx.consumer); at != LOAD(q->tx.producer); at++)
			claim(d, held, tx[at & q->tx.mask].address);
	}
	for (uint32_t at = LOAD(d->completion.consumer); at != LOAD(d->completion.producer); at++)
		if (!claim(d, held, completion[at & d->completion.mask]))
			completion[at & d->completion.mask] = ~0ull; /* recycling goes past it */
	for (uint32_t i = 0; i < d->queues; i++) {
		struct queue *q = &d->queue[i];
		struct ps_descriptor *rx = q->rx.slots;

		for (uint32_t at = LOAD(q->rx.consumer); at != LOAD(q->rx.producer); at++) {
			bool fresh = at - before->received[i] <
				     q->rx.mask + 1; /* may still seem to be in the fill ring */

			if (!claim(d, held, rx[at & q->rx.mask].address) && !fresh)
				rx[at & q->rx.mask].address = ~0ull;
		}
	}
	for (uint32_t i = 0; i < d->queues; i++) {
		struct queue *q = &d->queue[i];
		struct ps_ring *park = &q->shared->park;
		uint32_t mask = d->engine->park_slots - 1, to = park->consumer;

		if (park->producer - park->consumer > mask + 1)
			park->producer = park->consumer;
		for (uint32_t at = to; at != park->producer; at++)
			if (in_umem(d, &q->park[at & mask]) && claim(d, held, q->park[at & mask].address))
				q->park[to++ & mask] = q->park[at & mask];
		STORE(&park->producer, to);
	}
	for (uint32_t i = 0; i < d->queues; i++) {
		struct queue *q = &d->queue[i];
		struct ps_ring *f = &q->shared->free;
		uint32_t mask = d->engine->free_slots - 1, to = f->consumer;

		if (f->producer - f->consumer > mask + 1)
			f->producer = f->consumer;
		for (uint32_t at = to; at != f->producer; at++)
			if (claim(d, held, q->free[at & mask]))
				q->free[to++ & mask] = q->free[at & mask];
		STORE(&f->producer, to);
	}
	for (uint32_t i = 0; i < frames && !kernel_keeps; i++) {
		if (held[i] || before->times[i])
			continue;
		d->queue[0].free[free->producer & (d->engine->free_slots - 1)] = (uint64_t)i * PS_FRAME_BYTES;
		STORE(&free->producer, free->producer + 1);
		d->core[0]->counters[PS_C_FRAMES_RECOVERED]++;
	}
}

/*
 * Looked at twice, since the kernel moves frames meanwhile: only what is wrong with the same frame both times
 * was done by the dead process.
 */
static bool adds_up(const struct datapath *d, const struct stock *first, const struct stock *now)
{
	uint32_t missing = 0;

	if (now->found.bad)
		return false;
	for (uint32_t i = 0; i < d->engine->frames; i++) {
		if (first->times[i] > 1 && now->times[i] > 1)
			return false;
		missing += !first->times[i] && !now->times[i];
	}
	return !missing || (missing == 1 && receive_ring_was_full(d)) || under_way(d);
}

/*
 * In an orderly death all frames are where they belong. If they are not, the kernel may just be moving some: that
 * takes microseconds. What is still wrong after 10 ms was done by the dead process.
 */
static void put_in_order(struct datapath *d)
{
	struct stock first = { .times = malloc(d->engine->frames) }, now = { .times = malloc(d->engine->frames) };
	uint64_t begun = clock_ns();

	if (first.times && now.times && !without(PS_WITHOUT_REDO)) {
		take_stock(d, &first);
		if (!adds_up(d, &first, &first)) {
			do
				take_stock(d, &now);
			while (!adds_up(d, &first, &now) && clock_ns() - begun < 10000000);
			if (!adds_up(d, &first, &now)) {
				d->core[0]->counters[PS_C_JOURNALS_REFUSED]++;
				repair(d, &first, now.times);
			}
		}
	}
	free(first.times);
	free(now.times);
}

/*
 * The dead server's transactions are finished: a committed one is published (again: storing the same
 * indexes twice is harmless, the owner is the only writer of each), an uncommitted one never happened.
 * What cannot be true is not believed. Shards are looked at when they are first used.
 */
static void adopt(struct datapath *d)
{
	struct ps_recycle *r = &d->engine->recycle;
	uint32_t lock = LOAD(&d->engine->lock);

	PS_POINT(ADOPT_BEGUN);
	if (!lock || !alive(d, lock)) {
		if (r->commit && !without(PS_WITHOUT_REDO)) {
			if (lock && recycle_sane(d))
				recycle_publish(d);
			else
				d->core[0]->counters[PS_C_JOURNALS_REFUSED]++;
		}
		PS_POINT(ADOPT_RECYCLED);
		r->commit = 0;
		PS_POINT(ADOPT_UNLOCKED);
		STORE(&d->engine->lock, 0);
	}
	for (uint32_t i = 0; i < d->queues; i++) {
		struct queue *q = &d->queue[i];
		struct ps_journal *j = &q->shared->journal;

		if (j->commit && !without(PS_WITHOUT_REDO)) {
			if (journal_sane(d, q))
				journal_publish(q);
			else
				d->core[0]->counters[PS_C_JOURNALS_REFUSED]++;
		}
		PS_POINT(ADOPT_PUBLISHED);
		j->commit = 0;
		PS_POINT(ADOPT_CLEARED);
	}
	put_in_order(d);
	PS_POINT(ADOPT_COUNTED);
	for (uint32_t i = 0; i < d->queues; i++) {
		struct queue *q = &d->queue[i];
		struct ps_queue *s = q->shared;
		uint32_t want = LOAD(&d->engine->want[i]), core = want && want <= d->cores ? want - 1 : i % d->cores;
		uint32_t me;

		me = (d->generation & 0xffffff) << 8 | (core + 1);
		progress_check(d, q, SOURCE_RX, LOAD(q->rx.consumer), LOAD(q->rx.producer));
		progress_check(d, q, SOURCE_PARK, s->park.consumer, s->park.producer);
		for (uint32_t at = s->park.consumer; at != s->park.producer; at++) {
			const struct ps_descriptor *parked = &q->park[at & (d->engine->park_slots - 1)];

			if (in_umem(d, parked))
				park_count(d, q, stamp_of(d->umem + parked->address), 1);
		}
		q->mark = LOAD(q->rx.consumer);
		PS_POINT(ADOPT_PARKED);
		s->kick = 1;
		STORE(&s->cur, me);
		PS_POINT(ADOPT_TAKEN);
	}
}

/* ---- the loop --------------------------------------------------------------------------------------- */

static void wake(struct datapath *d, uint32_t core)
{
	if (core < d->cores && send(d->wake[core], "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		return; /* it has been woken and has not looked yet */
}

static void take_configuration(struct worker *w)
{
	const struct ps_config_file *file = w->d->config;
	uint64_t generation = LOAD(&file->generation);

	if (generation == w->core->config_seen)
		return;
	ps_configure(&w->handler, &file->buffer[generation & 1]);
	/* When a shard's next flow expires was reckoned with the timers of before. */
	if (memcmp(w->timeout, w->handler.config->timeout, sizeof(w->timeout)))
		w->reckon = w->d->arena->buckets;
	memcpy(w->timeout, w->handler.config->timeout, sizeof(w->timeout));
	STORE(&w->core->config_seen, generation);
}

/* A shard's flows that have timed out go. Without a list nobody knows whose a kept one's are: nothing goes. */
static uint32_t sweep_flows(struct worker *w, uint32_t bucket, struct ps_shard *s, uint64_t owner)
{
	const struct ps_connection_list *list = w->handler.list;
	const uint32_t *timeout = w->handler.config->timeout;
	uint64_t handled = w->d->queue[ps_word_queue(owner)].handled_ns;

	if ((owner & 0xffff) == PS_OWNED)
		return ps_shard_sweep(w->d->arena, s, timeout, w->handler.now);
	return list ? ps_kept_sweep(list, ps_connections_of(list, bucket), w->d->arena, s, timeout, w->handler.now,
				    (uint32_t)(handled / (1000000000 / PS_TICKS_PER_SECOND)))
		    : 0;
}

/* Sweeps a shard if this core owns it. -> whether there were flows */
static bool sweep_shard(struct worker *w, uint32_t bucket)
{
	struct datapath *d = w->d;
	struct ps_shard *s = ps_shard_at(d->arena, bucket);
	uint64_t owner = LOAD(&s->owner), state = owner & 0xffff;
	uint32_t queue = ps_word_queue(owner);

	if (ps_word_slot(owner) != d->engine->slot || (state != PS_OWNED && state != PS_KEPT) || queue >= d->queues ||
	    LOAD(&d->queue[queue].shared->cur) != w->me)
		return false;
	if (d->trusted[bucket] != WHOLE)
		look_at_shard(w, bucket, s, WHOLE);
	if (w->reckon)
		s->next_expiry = w->handler.now;
	if (!s->live && state == PS_OWNED)
		return false;
	w->core->counters[PS_C_FLOWS_ENDED] += sweep_flows(w, bucket, s, owner);
	w->core->counters[PS_C_SWEPT_SHARDS]++;
	PS_POINT(SWEPT);
	return true;
}

/*
 * Visits all shards about once a second, a few at a time; touches only those this core owns. Packets wait meanwhile, so
 * it stops after SWEEP_NS and goes on in the next turn.
 */
static void sweep(struct worker *w)
{
	enum { SWEEP_NS = 50000, LOOK_EACH = 4 };
	struct datapath *d = w->d;
	uint64_t due = (w->now_ns - w->swept_ns) * d->arena->buckets / 1000000000ull, begun, swept = 0;

	if (due < 16 && d->arena->buckets >= 16)
		return;
	if (due > d->arena->buckets)
		due = d->arena->buckets;
	w->swept_ns = w->now_ns;
	begun = w->now_ns;
	while (due--) {
		bool look = sweep_shard(w, w->sweep) && !(++swept % LOOK_EACH);

		if (++w->sweep >= d->arena->buckets)
			w->sweep = 0;
		if (w->reckon)
			w->reckon--;
		if (look && clock_ns() - begun > SWEEP_NS) {
			w->swept_ns -= due * 1000000000ull / d->arena->buckets; /* still due */
			return;
		}
	}
}

static void sleep_until_work(struct worker *w)
{
	struct datapath *d = w->d;
	struct pollfd fds[PS_MAX_QUEUES + 1] = { { .fd = d->woken[w->index], .events = POLLIN } };
	int n = 1, timeout = 100;
	char once;

	for (uint32_t i = 0; i < d->queues; i++) {
		struct queue *q = &d->queue[i];

		if (LOAD(&q->shared->cur) != w->me)
			continue;
		if (ring_used(&q->tx) || q->shared->fence_complete > q->shared->fence_acked)
			timeout = 1;
		fds[n++] = (struct pollfd){ .fd = q->socket, .events = POLLIN };
	}
	STORE(&w->core->asleep, 1);
	poll(fds, (nfds_t)n, timeout);
	STORE(&w->core->asleep, 0);
	w->core->wakeups++;
	while (fds[0].revents & POLLIN && recv(fds[0].fd, &once, 1, MSG_DONTWAIT) >= 0)
		;
}

static void *run(void *argument)
{
	struct worker *w = argument;
	struct datapath *d = w->d;
	uint64_t idle_since = 0, before = __rdtsc();

	w->core->thread = (uint32_t)syscall(SYS_gettid);
	w->core->pinned_cpu = ~0u;
#ifdef PS_INJECT
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
#endif
	if (d->pin[w->index] >= 0) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET(d->pin[w->index], &set);
		if (!sched_setaffinity(0, sizeof(set), &set))
			w->core->pinned_cpu = (uint32_t)d->pin[w->index];
	}
	w->swept_ns = clock_ns();
	while (!LOAD(&d->stop)) {
		uint32_t done = 0;
		uint64_t cycles;

		w->now_ns = clock_ns();
		w->handler.now_ns = w->now_ns;
		w->handler.now = (uint32_t)(w->now_ns / (1000000000 / PS_TICKS_PER_SECOND));
		/* Seen by all before the list is read: see wait_for_a_turn. */
		__atomic_fetch_add(&w->core->heartbeat, 1, __ATOMIC_SEQ_CST);
		w->core->cpu = (uint32_t)sched_getcpu();
		w->handler.list = LOAD(&d->list);
		take_configuration(w);
		for (uint32_t i = 0; i < d->queues && w->handler.config; i++) {
			struct ps_queue *s = d->queue[i].shared;
			uint32_t want;

			if (LOAD(&s->cur) != w->me)
				continue;
			want = LOAD(&d->engine->want[i]);
			if (want != w->index + 1 && want && want <= d->cores && kick(&d->queue[i])) {
				/* Between batches nothing of the queue is ours alone: one store hands it over. What it sent
				 * has left the ring, so the new core's frames do not meet it there. */
				STORE(&s->cur, (w->me & ~0xffu) | want);
				PS_POINT(HANDED);
				d->core[want - 1]->counters[PS_C_HANDOFFS]++;
				wake(d, want - 1);
				continue;
			}
			done += serve(w, &d->queue[i]);
		}
		if (w->handler.config)
			sweep(w);
		recycle(w, done ? 64 : 1);
		cycles = __rdtsc();
		w->core->total_cycles += cycles - before;
		before = cycles;
		if (done) {
			idle_since = 0;
			continue;
		}
		w->free_ns = 0;
		if (!idle_since)
			idle_since = w->now_ns;
		if (w->now_ns - idle_since < d->engine->spin_us * 1000ull)
			continue;
		sleep_until_work(w);
		idle_since = 0;
	}
	return NULL;
}

/* ---- start ------------------------------------------------------------------------------------------ */

static void *map_file(int fd, int protection, size_t *size)
{
	struct stat st;
	void *at;

	if (fstat(fd, &st) || st.st_size <= 0)
		return NULL;
	at = mmap(NULL, (size_t)st.st_size, protection, MAP_SHARED, fd, 0);
	*size = (size_t)st.st_size;
	return at == MAP_FAILED ? NULL : at;
}

/* What the agent writes may be read here, what engines write stands behind it (packetstack/parts.h). */
static void *map_parts(int file, int map, uint64_t file_bytes, uint32_t magic)
{
	struct {
		uint32_t magic, layout;
		uint64_t bytes;
	} head;
	void *at;

	if (pread(file, &head, sizeof(head), 0) != sizeof(head) || head.magic != magic ||
	    head.layout != PS_LAYOUT_VERSION || head.bytes <= file_bytes)
		return NULL;
	at = ps_parts_map(file, map, file_bytes, head.bytes, PROT_READ, PROT_READ | PROT_WRITE);
	return at == MAP_FAILED ? NULL : at;
}

static int map_ring(struct kernel_ring *r, int fd, const struct xdp_ring_offset *o, uint32_t slots, size_t slot_bytes,
		    off_t page)
{
	uint8_t *at =
		mmap(NULL, o->desc + slots * slot_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, page);

	if (at == MAP_FAILED)
		return -1;
	r->producer = (uint32_t *)(at + o->producer);
	r->consumer = (uint32_t *)(at + o->consumer);
	r->slots = at + o->desc;
	r->mask = slots - 1;
	return 0;
}

int datapath_map(struct datapath *d, const struct ps_message *attach, const int *fds, int n, char *error, int size)
{
	struct xdp_mmap_offsets offsets;
	socklen_t length = sizeof(offsets);
	struct ps_engine *e;
	struct ps_shard_form form, own = ps_shard_form();
	size_t config_bytes = 0;

	if (attach->queues < 1 || attach->queues > PS_MAX_QUEUES || attach->cores < 1 || attach->cores > PS_MAX_CORES ||
	    n != 6 + (int)(attach->queues + 2 * attach->cores)) {
		snprintf(error, (size_t)size, "attach: %d descriptors for %u queues and %u cores; expected %u", n,
			 attach->queues, attach->cores, 6 + attach->queues + 2 * attach->cores);
		return -1;
	}
	d->queues = attach->queues;
	d->cores = attach->cores;
	d->generation = attach->generation;
	errno = 0;
	d->arena = map_parts(fds[0], fds[1], PS_ARENA_FILE_BYTES, PS_ARENA_MAGIC);
	d->engine = e = map_parts(fds[2], fds[3], PS_ENGINE_FILE_BYTES, PS_ENGINE_MAGIC);
	d->config = map_file(fds[4], PROT_READ, &config_bytes);
	d->umem = map_file(fds[5], PROT_READ | PROT_WRITE, &d->umem_bytes);
	if (!d->arena || !e || !d->config || !d->umem) {
		snprintf(error, (size_t)size, "attach: cannot map shared memory of layout %d: %s", PS_LAYOUT_VERSION,
			 errno ? strerror(errno) : "it is another one");
		return -1;
	}
	if (d->config->magic != PS_CONFIG_MAGIC || d->config->layout != PS_LAYOUT_VERSION ||
	    config_bytes < sizeof(*d->config) || e->queues != d->queues || e->cores != d->cores) {
		snprintf(error, (size_t)size, "LayoutMismatch: shared memory is not of layout %d, this datapath's",
			 PS_LAYOUT_VERSION);
		return -1;
	}
	form = ps_form_of(&d->arena->form);
	if (memcmp(&form, &own, sizeof(own))) {
		snprintf(error, (size_t)size, "LayoutMismatch: the arena has shard layout %u, this datapath serves %u",
			 form.layout, own.layout);
		return -1;
	}
#ifdef PS_INJECT
	ordered_by = e;
#endif
	for (uint32_t i = 0; i < d->queues; i++) {
		struct queue *q = &d->queue[i];

		q->socket = fds[6 + i];
		q->shared = (struct ps_queue *)((uint8_t *)e + e->queues_offset + i * e->queue_stride);
		q->park = (struct ps_descriptor *)(q->shared + 1);
		q->free = (uint64_t *)(q->park + e->park_slots);
		q->parked = calloc(2 * PS_MAX_BUCKETS, sizeof(*q->parked));
		q->kept = q->parked + PS_MAX_BUCKETS;
		if (!q->parked || getsockopt(q->socket, SOL_XDP, XDP_MMAP_OFFSETS, &offsets, &length) ||
		    map_ring(&q->rx, q->socket, &offsets.rx, e->rx_slots, sizeof(struct xdp_desc), XDP_PGOFF_RX_RING) ||
		    map_ring(&q->tx, q->socket, &offsets.tx, e->tx_slots, sizeof(struct xdp_desc), XDP_PGOFF_TX_RING)) {
			snprintf(error, (size_t)size, "queue %u: cannot map its rings: %s", i, strerror(errno));
			return -1;
		}
	}
	if (map_ring(&d->fill, d->queue[0].socket, &offsets.fr, e->fill_slots, 8, XDP_UMEM_PGOFF_FILL_RING) ||
	    map_ring(&d->completion, d->queue[0].socket, &offsets.cr, e->completion_slots, 8,
		     XDP_UMEM_PGOFF_COMPLETION_RING)) {
		snprintf(error, (size_t)size, "cannot map fill and completion rings: %s", strerror(errno));
		return -1;
	}
	for (uint32_t i = 0; i < d->cores; i++) {
		d->core[i] = (struct ps_core *)((uint8_t *)e + e->cores_offset) + i;
		d->wake[i] = fds[6 + d->queues + i];
		d->woken[i] = fds[6 + d->queues + d->cores + i];
		d->pin[i] = attach->pin[i];
	}
	return 0;
}

/*
 * Until no core is in a turn that it began before. One that begins a turn shows it first and reads then, we store first and
 * look then: a core whose new turn is seen here has read what was stored.
 */
static void wait_for_a_turn(struct datapath *d)
{
	for (uint32_t i = 0; i < d->cores; i++) {
		uint64_t before = LOAD(&d->core[i]->heartbeat);

		while (d->thread[i] && LOAD(&d->core[i]->heartbeat) == before && !LOAD(&d->core[i]->asleep))
			usleep(100);
	}
}

int datapath_connect(struct datapath *d, int fd, const struct ps_message *m, char *error, int size)
{
	struct ps_connection_list *list = NULL, *before = (struct ps_connection_list *)d->list;

	if (fd >= 0) {
		list = malloc(sizeof(*list));
		if (!list || !ps_connections_are(list, m->buckets, m->entries, m->index_slots, m->clients) ||
		    list->buckets != d->arena->buckets) {
			snprintf(error, (size_t)size, "a connection list of %u buckets with %u entries is not possible",
				 m->buckets, m->entries);
			free(list);
			return -1;
		}
		list->at = mmap(NULL, ps_connections_bytes(list), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (list->at == MAP_FAILED) {
			snprintf(error, (size_t)size, "the connection list cannot be mapped: %s", strerror(errno));
			free(list);
			return -1;
		}
	}
	__atomic_store_n(&d->list, list, __ATOMIC_SEQ_CST);
	wait_for_a_turn(d);
	if (before) {
		munmap(before->at, ps_connections_bytes(before));
		free(before);
	}
	return 0;
}

int datapath_start(struct datapath *d, char *error, int size)
{
	adopt(d);
	for (uint32_t i = 0; i < d->cores; i++) {
		struct worker *w = aligned_alloc(64, (sizeof(*w) + 63) & ~63ul);

		if (!w) {
			snprintf(error, (size_t)size, "core %u: out of memory", i);
			return -1;
		}
		memset(w, 0, sizeof(*w));
		w->d = d;
		w->index = i;
		w->me = (d->generation & 0xffffff) << 8 | (i + 1);
		w->core = d->core[i];
		w->core->config_seen = 0;
		w->handler.arena = d->arena;
		w->handler.engine = d->engine;
		w->handler.counters = w->core->counters;
		w->sweep = d->arena->buckets / d->cores * i;
		if (pthread_create(&d->thread[i], NULL, run, w)) {
			snprintf(error, (size_t)size, "core %u: cannot start its thread: %s", i, strerror(errno));
			return -1;
		}
	}
	return 0;
}

void datapath_stop(struct datapath *d)
{
	STORE(&d->stop, true);
	for (uint32_t i = 0; i < d->cores; i++)
		wake(d, i);
	for (uint32_t i = 0; i < d->cores; i++)
		pthread_join(d->thread[i], NULL);
}
