/* SPDX-License-Identifier: Apache-2.0 */
/* Between the sources of libpacketstack; not seen by Python. */
#ifndef PACKETSTACK_NATIVE_H
#define PACKETSTACK_NATIVE_H

#include "packetstack.h"

/* Puts one line into *e; -> -1 */
int ps_fail(struct ps_error *e, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* New file of `bytes` zeros, mapped shared. *keep (may be NULL) gets its descriptor. */
void *ps_file_create(const char *path, uint64_t bytes, int *keep, struct ps_error *e);
/* Runs `work` in a thread whose network namespace is `netns` (-1: the caller's); the caller's never changes. */
int ps_in_netns(int netns, int (*work)(void *), void *argument, struct ps_error *e);
/* A queue of an engine, in shared memory. */
struct ps_queue *ps_queue_of(const struct ps_fence_engine *f, uint32_t queue);
/* Wakes all cores of an engine. */
void ps_wake_engine(const struct ps_fence_engine *f);

#endif
