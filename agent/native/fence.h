/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fence: markers from every CPU through the queues of some engines, and their answers. What is stored in words before
 * it is seen by every packet that comes behind a marker. Who changes owners by it: transfer.c, mirror.c.
 */
#ifndef PACKETSTACK_FENCE_H
#define PACKETSTACK_FENCE_H

#include <sched.h>

#include "native.h"

#define LOAD(p)	    __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

/* Where tests let the agent die: PACKETSTACK_DIE_AT=STEP:PASS. The shipped library has no such place. */
#ifdef PS_STEPS
void fence_step(const char *name);
#define STEP(name) fence_step(name)
#else
#define STEP(name) ((void)0)
#endif

struct fence {
	struct ps_fence_engine *engines; /* all that may take part */
	int n_engines;
	uint64_t *egress; /* of the director; NULL if nothing waits for the way out */
	uint32_t limit_ms;
	int all_cpus;
	struct ps_transfer_report *report;
	struct ps_error *e;
	cpu_set_t cpus; /* all online CPUs */
	uint32_t attempt;
	uint64_t id;
	/* Queues that have to answer: bit per queue, by place in `engines`. */
	uint64_t sources[PS_MAX_SLOTS];
};

/* Runs `work` in a thread that may visit every CPU, its fence first in its argument. -> what it returns, or -1 */
int fence_run(struct fence *f, int (*work)(struct fence *));
/* -> place of the engine in `engines`, or -1 */
int fence_engine_at(const struct fence *f, uint32_t slot);
/* May the queue that an owner names be waited for: is its engine there, with that queue? */
int fence_reaches(const struct fence *f, uint64_t owner);
/* The queue of an owner that is there has to answer. */
void fence_add(struct fence *f, uint64_t owner);
/* An empty description of fence `id` in an arena. It is open when its id is stored. */
struct ps_fence *fence_begin(struct fence *f, struct ps_arena *a, uint32_t kind);
void fence_bucket(struct ps_fence *description, uint32_t bucket);
int fence_has(const struct ps_fence *description, uint32_t bucket);
/* Sends markers of `kind` until all are answered or limit_ms have passed. -> slot of an engine that has not, or 0 */
uint32_t fence_side(struct fence *f, int kind);
/* On every online CPU in turn. kind 0: the visit alone is the point. */
void fence_visit(struct fence *f, int kind);

static inline int fence_is_gone(const struct ps_fence_engine *f) { return !f->engine; }

#endif
