/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where an engine's frames are. Each is in exactly one ring; whoever walks all rings can tell. Exact while
 * nobody moves frames; the kernel publishes what it took from the fill ring late or early, so under traffic
 * a frame may look missing, or seem to be in fill and receive ring, for the time of one softirq.
 */
#ifndef PACKETSTACK_CENSUS_H
#define PACKETSTACK_CENSUS_H

#include "packetstack/abi.h"

/* Counts the frames of slots [from, to) into times[frame]; a slot is `stride` bytes, the address comes first. */
static inline void ps_census_ring(uint8_t *times, uint32_t frames, const void *slots, uint32_t mask, uint32_t stride,
				  uint32_t from, uint32_t to, struct ps_census *c)
{
	if (to - from > mask + 1) {
		c->bad++;
		return;
	}
	for (; from != to; from++) {
		/* Once: whoever writes there may be doing so now. */
		uint64_t address =
			__atomic_load_n((const uint64_t *)((const uint8_t *)slots + (uint64_t)(from & mask) * stride),
					__ATOMIC_RELAXED);

		if (address / PS_FRAME_BYTES >= frames)
			c->bad++;
		else if (times[address / PS_FRAME_BYTES] < 255)
			times[address / PS_FRAME_BYTES]++;
	}
}

static inline void ps_census_sum(const uint8_t *times, uint32_t frames, struct ps_census *c)
{
	for (uint32_t i = 0; i < frames; i++) {
		c->missing += times[i] == 0;
		c->twice += times[i] > 1;
	}
}

#endif
