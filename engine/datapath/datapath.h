/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PACKETSTACK_DATAPATH_H
#define PACKETSTACK_DATAPATH_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "packetstack/connections.h"

struct kernel_ring { /* an AF_XDP ring; both indexes are shared with the kernel */
	uint32_t *producer, *consumer;
	void *slots;
	uint32_t mask;
};

struct queue {
	struct ps_queue *shared;
	struct kernel_ring rx, tx;
	struct ps_descriptor *park;
	uint64_t *free;
	/* Frames in the park ring, per bucket; derived from the ring. */
	uint16_t *parked; /* Those that wait for the bucket to come, or for others of them */
	uint16_t *kept;	  /* the copies that a previous owner holds until it knows which connections it keeps */
	/* All that had come by `handled_ns` is handled. Found out by marks: what stood in the rings at `marked_ns`. */
	uint64_t handled_ns, marked_ns;
	uint32_t mark, park_mark;
	bool past; /* the receive ring is past its mark, the park ring perhaps not */
	int socket;
};

enum trust { UNKNOWN, LINKS, WHOLE }; /* how far this process has looked at a shard */

struct datapath {
	struct ps_engine *engine;
	struct ps_arena *arena;
	const struct ps_config_file *config;
	const struct ps_connection_list *list; /* atomic; NULL: no traffic is mirrored */
	uint8_t *umem;
	size_t umem_bytes;
	struct kernel_ring fill, completion;
	struct queue queue[PS_MAX_QUEUES];
	struct ps_core *core[PS_MAX_CORES];
	uint8_t trusted[PS_MAX_BUCKETS]; /* enum trust; written by the bucket's server */
	int wake[PS_MAX_CORES], woken[PS_MAX_CORES];
	int pin[PS_MAX_CORES];
	uint32_t generation;
	uint32_t queues, cores;
	pthread_t thread[PS_MAX_CORES];
	bool stop; /* atomic */
};

/* Maps what the agent handed over; fds as in PS_MSG_ATTACH. -> 0 or -1 */
int datapath_map(struct datapath *d, const struct ps_message *attach, const int *fds, int n, char *error, int size);
/* Takes over all queues, whose server is gone (or never was), then runs the cores. */
int datapath_start(struct datapath *d, char *error, int size);
/*
 * Uses the connection list behind `fd`, with the numbers of a PS_MSG_CONNECTIONS, from now on; fd -1: none. Returns when no
 * core uses the one before. -> 0, or -1: all is as it was
 */
int datapath_connect(struct datapath *d, int fd, const struct ps_message *m, char *error, int size);
/* Every core finishes its batch and ends; then nothing here touches the rings any more. */
void datapath_stop(struct datapath *d);

#endif
