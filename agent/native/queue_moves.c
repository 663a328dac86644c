/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A queue moves to another core of its engine: the agent writes which core shall serve it (ps_engine.want), and the core
 * that serves it hands it over after the batch at hand (ps_queue.cur; run() in engine/datapath/datapath.c).
 * Who decides that it moves: core/packetstack_core/rebalancing.py, or a person (`packetstack move --queue`).
 */
#include <sys/socket.h>

#include "native.h"

#define LOAD(p)	    __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

struct ps_queue *ps_queue_of(const struct ps_fence_engine *f, uint32_t queue)
{
	return (struct ps_queue *)((uint8_t *)f->engine + f->engine->queues_offset + queue * f->engine->queue_stride);
}

/* Whatever the engine has done with its end, and whatever it calls the socket's mode: this never waits. */
void ps_wake(int socket)
{
	if (socket >= 0 && send(socket, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		return; /* it has been woken and has not looked yet, or nobody is there */
}

void ps_wake_engine(const struct ps_fence_engine *f)
{
	for (uint32_t i = 0; i < f->engine->cores && i < PS_MAX_CORES; i++)
		ps_wake(f->wake[i]);
}

int ps_queue_to_core(struct ps_fence_engine *f, uint32_t queue, uint32_t core, uint32_t limit_ms, uint64_t *took_ns,
		     struct ps_error *e)
{
	uint64_t begun = clock_ns();
	const struct ps_queue *q;
	uint32_t cur;

	if (queue >= f->engine->queues || core >= f->engine->cores)
		return ps_fail(e, "engine %u: no queue %u or no core %u; it has %u queues and %u cores", f->slot, queue,
			       core, f->engine->queues, f->engine->cores);
	q = ps_queue_of(f, queue);
	STORE(&f->engine->want[queue], core + 1);
	ps_wake_engine(f);
	while (((cur = LOAD(&q->cur)) & 0xff) != core + 1) {
		if (clock_ns() - begun > limit_ms * 1000000ull)
			return ps_fail(e, "engine %u: queue %u stays at core %u, which has not answered for %u ms",
				       f->slot, queue, (cur & 0xff) - 1, limit_ms);
		pause_ns(20000);
	}
	*took_ns = clock_ns() - begun;
	return 0;
}
