/* SPDX-License-Identifier: Apache-2.0 */
/* Between the sources of libpacketstack; not seen by Python. */
#ifndef PACKETSTACK_NATIVE_H
#define PACKETSTACK_NATIVE_H

#include <time.h>

#include "packetstack.h"

/* CLOCK_MONOTONIC */
static inline uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline void pause_ns(long ns)
{
	struct timespec t = { 0, ns };

	nanosleep(&t, NULL);
}

/* Puts one line into *e; -> -1 */
int ps_fail(struct ps_error *e, const char *format, ...) __attribute__((format(printf, 2, 3)));
/*
 * parts.c. New file of zeros and, if `bytes` is more than `file_bytes`, behind it a map of zeros, pinned as `pin`; NULL:
 * memory of this process alone, for tests. Mapped to be written.
 */
void *ps_parts_create(const char *path, const char *pin, uint64_t file_bytes, uint64_t bytes, struct ps_error *e);
/* Opens what ps_parts_create has made; refuses what is not of this magic, layout and size. `what`: what to call it */
void *ps_parts_open(const char *path, const char *pin, uint32_t magic, uint64_t file_bytes, const char *what,
		    struct ps_error *e);
/* The same of a file without a map. */
void *ps_file_open(const char *path, int read_only, uint32_t magic, uint64_t bytes, const char *what,
		   struct ps_error *e);
/* files.c. Sets offsets and `bytes` of an engine file by its other numbers. */
void ps_engine_places(struct ps_engine *n);
/* Runs `work` in a thread whose network namespace is `netns` (-1: the caller's); the caller's never changes. */
int ps_in_netns(int netns, int (*work)(void *), void *argument, struct ps_error *e);
/* A queue of an engine, in shared memory. */
struct ps_queue *ps_queue_of(const struct ps_fence_engine *f, uint32_t queue);
/* Wakes all cores of an engine. */
void ps_wake_engine(const struct ps_fence_engine *f);

#endif
