/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A core's handler of packets: what it goes by, and what it counts.
 */
#ifndef PACKETSTACK_HANDLER_H
#define PACKETSTACK_HANDLER_H

#include "packetstack/connections.h"
#include "packetstack/shard.h"

enum ps_verdict { PS_DROP = 0, PS_TRANSMIT = 1, PS_PARK = 2, PS_CONSUMED = 3 };

/* What few packets need stays out of ps_handle: inlined, it takes the registers of what all need. */
#define PS_RARE	      __attribute__((noinline))

#define PS_VERDICT(v) ((v)&15)
#define PS_SHIFT(v)   (((v) >> 4) * 4) /* how far the frame's start moved: VLAN tags are not sent on */

struct ps_handler { /* one per core */
	struct ps_arena *arena;
	const struct ps_config *config;
	const struct ps_engine *engine;
	uint64_t *counters; /* enum ps_counter */
	uint64_t now_ns;    /* CLOCK_MONOTONIC */
	uint32_t now;	    /* the same in ticks */
	uint32_t since;	    /* when `config` was taken, ticks */
	uint64_t classes;   /* of the configured listeners: bit per class */
	uint32_t turn[256]; /* round robin, per listener */
	/* Where traffic is mirrored; NULL: nowhere */
	const struct ps_connection_list *list;
	/* Of the packet at hand: what the previous owner keeps of its bucket, and a connection that was claimed from it */
	struct ps_connections *kept;
	const struct ps_connection *claimed;
};

static inline void ps_configure(struct ps_handler *h, const struct ps_config *c)
{
	h->config = c;
	h->since = h->now;
	h->classes = 0;
	for (uint32_t i = 0; i < c->listeners; i++)
		h->classes |= 1ull << (c->listener[i].number & (PS_CLASSES - 1));
}

static inline uint8_t ps_refuse(struct ps_handler *h, enum ps_counter reason)
{
	h->counters[reason]++;
	return PS_DROP;
}

#endif
