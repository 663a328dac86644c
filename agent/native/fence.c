/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fence.h"

enum { RESEND_NS = 20000000 };

#ifdef PS_STEPS
void fence_step(const char *name)
{
	static int passes;
	const char *wanted = getenv("PACKETSTACK_DIE_AT");
	size_t length = strlen(name);

	if (wanted && !strncmp(wanted, name, length) && wanted[length] == ':' && ++passes >= atoi(wanted + length + 1))
		kill(getpid(), SIGKILL);
}
#endif

int fence_engine_at(const struct fence *f, uint32_t slot)
{
	for (int i = 0; i < f->n_engines; i++)
		if (f->engines[i].slot == slot)
			return i;
	return -1;
}

int fence_reaches(const struct fence *f, uint64_t owner)
{
	int at = fence_engine_at(f, ps_word_slot(owner));

	return at >= 0 && !fence_is_gone(&f->engines[at]) && ps_word_queue(owner) < f->engines[at].engine->queues;
}

void fence_add(struct fence *f, uint64_t owner)
{
	if (fence_reaches(f, owner))
		f->sources[fence_engine_at(f, ps_word_slot(owner))] |= 1ull << ps_word_queue(owner);
}

struct ps_fence *fence_begin(struct fence *f, struct ps_arena *a, uint32_t kind)
{
	struct ps_fence *description = &a->fences[f->id % PS_MAX_FENCES];

	STORE(&description->id, 0);
	memset(description->bitmap, 0, sizeof(description->bitmap));
	description->kind = kind;
	description->buckets = 0;
	description->cpus = (uint32_t)CPU_COUNT(&f->cpus);
	return description;
}

void fence_bucket(struct ps_fence *description, uint32_t bucket)
{
	description->bitmap[bucket / 8] |= (uint8_t)(1 << bucket % 8);
	description->buckets++;
}

int fence_has(const struct ps_fence *description, uint32_t bucket)
{
	return description->bitmap[bucket / 8] >> (bucket % 8) & 1;
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

void fence_visit(struct fence *f, int kind)
{
	for (uint32_t cpu = 0; cpu < PS_MAX_CPUS; cpu++) {
		cpu_set_t one;

		if (!CPU_ISSET(cpu, &f->cpus))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		if (sched_setaffinity(0, sizeof(one), &one))
			continue; /* the marker will be missing, so nothing is released; sent again later */
		for (int i = 0; i < f->n_engines && kind; i++) {
			struct ps_marker m = {
				.magic = PS_MARKER_MAGIC,
				.kind = (uint8_t)kind,
				.cpu = (uint16_t)cpu,
				.slot = (uint16_t)f->engines[i].slot,
				.attempt = f->attempt,
				.fence = f->id,
			};

			if (!f->sources[i])
				continue;
			m.token = f->engines[i].engine->token;
			if (kind == PS_MARKER_EGRESS) {
				f->report->markers += !send_marker(f->engines[i].egress, &m);
				continue;
			}
			for (uint32_t q = 0; q < PS_MAX_QUEUES; q++) {
				if (!(f->sources[i] >> q & 1) ||
				    LOAD(&ps_queue_of(&f->engines[i], q)->fence_acked) >= f->id)
					continue;
				m.queue = (uint8_t)q;
				f->report->markers += !send_marker(f->engines[i].ingress, &m);
			}
		}
	}
	sched_setaffinity(0, sizeof(f->cpus), &f->cpus);
}

/* -> slot of an engine that has not answered, 0 = all have */
static uint32_t unanswered(const struct fence *f, int kind)
{
	for (int i = 0; i < f->n_engines; i++) {
		uint32_t slot = f->engines[i].slot;

		if (!f->sources[i])
			continue;
		if (kind == PS_MARKER_EGRESS) {
			for (uint32_t cpu = 0; cpu < PS_MAX_CPUS; cpu++)
				if (CPU_ISSET(cpu, &f->cpus) && LOAD(&f->egress[slot * PS_MAX_CPUS + cpu]) != f->id)
					return slot;
			continue;
		}
		for (uint32_t q = 0; q < PS_MAX_QUEUES; q++)
			if (f->sources[i] >> q & 1 && LOAD(&ps_queue_of(&f->engines[i], q)->fence_acked) < f->id)
				return slot;
	}
	return 0;
}

uint32_t fence_side(struct fence *f, int kind)
{
	uint64_t begun = clock_ns(), sent = begun;
	uint32_t slot;
	long pause = 20000;

	fence_visit(f, kind);
	STEP(kind == PS_MARKER_INGRESS ? "ingress" : "egress");
	while ((slot = unanswered(f, kind))) {
		uint64_t now = clock_ns();

		if (now - begun > f->limit_ms * 1000000ull)
			return slot;
		if (now - sent > RESEND_NS) {
			f->attempt++;
			f->report->resent++;
			fence_visit(f, kind);
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

/* ---- the thread -------------------------------------------------------------------------------------- */

struct running {
	struct fence *f;
	int (*work)(struct fence *);
};

/* A thread of its own: affinity and priority of the caller never change. */
static void *fence_thread(void *argument)
{
	struct running *r = argument;
	struct fence *f = r->f;
	struct sched_param first = { .sched_priority = 10 };
	long online = sysconf(_SC_NPROCESSORS_ONLN);

	/* A director may run on any CPU. Writing fails where the thread is to stay in its cpuset; told below. */
	if (f->all_cpus >= 0 && write(f->all_cpus, "0", 1) < 0)
		f->all_cpus = -1;
	for (int i = 0; i < CPU_SETSIZE && i < PS_MAX_CPUS; i++)
		CPU_SET(i, &f->cpus);
	sched_setaffinity(0, sizeof(f->cpus), &f->cpus);
	if (sched_getaffinity(0, sizeof(f->cpus), &f->cpus) || CPU_COUNT(&f->cpus) < online)
		return (void *)(intptr_t)ps_fail(
			f->e, "the agent may run on %d of %ld CPUs, so no bucket can move: a fence must visit all",
			CPU_COUNT(&f->cpus), online);
	f->report->cpus = (uint32_t)CPU_COUNT(&f->cpus);
	sched_setscheduler(0, SCHED_FIFO, &first); /* shorter holds; correct without it */
	return (void *)(intptr_t)r->work(f);
}

int fence_run(struct fence *f, int (*work)(struct fence *))
{
	struct running r = { f, work };
	pthread_t thread;
	void *result;

	memset(f->report, 0, sizeof(*f->report));
	if (f->n_engines > PS_MAX_SLOTS)
		return ps_fail(f->e, "%d engines; at most %d", f->n_engines, PS_MAX_SLOTS);
	if (pthread_create(&thread, NULL, fence_thread, &r))
		return ps_fail(f->e, "cannot start the fence thread: %s", strerror(errno));
	pthread_join(thread, &result);
	return (int)(intptr_t)result;
}
