/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libpacketstack: what the agent must do exactly, called from Python through cffi. No policy.
 * Functions return 0, or -1 with one line in *e that names the thing and what is wrong with it.
 */
#ifndef PACKETSTACK_H
#define PACKETSTACK_H

#ifndef PS_CDEF
#include <stddef.h>
#include <stdint.h>
#include "packetstack/abi.h"
#endif

struct ps_error {
	char text[512];
};

/* ---- director.c: BPF programs and maps, pinned so that they outlive the agent --------------------- */

struct ps_director;

/* Loads the programs in `objects` (director.bpf.o, host.bpf.o), or takes over what is pinned below `pins`. */
struct ps_director *ps_director_open(const char *objects, const char *pins, struct ps_error *e);
/*
 * May this build take over the maps of `file` that are pinned as `prefix`NAME? Opens them to read, changes nothing.
 * -> 0, also when none is pinned
 */
int ps_pins_check(const char *objects, const char *file, const char *prefix, struct ps_error *e);
void ps_director_close(struct ps_director *d); /* forgets; everything stays attached */

/* role of a device the director runs on */
enum ps_role { PS_ROLE_ROUTED = 0, PS_ROLE_UPLINK = 1 };

/*
 * Attaching says whether it was needed: 1 if the program was not there, 0 if it was.
 *
 * Native XDP on `ifindex`; the link is pinned as `name`. Attaching again replaces the program in place.
 */
int ps_director_attach(struct ps_director *d, uint32_t ifindex, int role, const char *name, struct ps_error *e);
int ps_director_detach(struct ps_director *d, const char *name, struct ps_error *e);
/* The interface that the program pinned as `name`, or that of an engine, is on, whatever it is called now; 0 = none. */
uint32_t ps_link_device(const struct ps_director *d, const char *name);
int ps_link_rename(const struct ps_director *d, const char *name, const char *to, struct ps_error *e);

/*
 * The uplinks: these and no others. Packets are taken on an interface only while it is one of them. A
 * PS_UPLINK_NO_METADATA that stands in the director's map for the same interface stays.
 */
int ps_director_uplinks(struct ps_director *d, const struct ps_uplink *uplinks, int n, struct ps_error *e);
/* The node's addresses, 16 bytes each, IPv4 mapped, with PS_OWN_NODE or PS_OWN_BROADCAST: these and no others. */
int ps_director_node(struct ps_director *d, const uint8_t *addresses, const uint8_t *kinds, int n, struct ps_error *e);

/* tc programs. `routed_ifindex` is ps0, the end whose ingress takes what the FIB cannot decide. */
/* The program of an engine's host end, for this engine alone. -> descriptor, or -1 */
int ps_host_program(struct ps_director *d, const struct ps_end *of, struct ps_error *e);
/* On the ingress of that end. */
int ps_host_attach(uint32_t ifindex, int program, struct ps_error *e);
int ps_routed_attach(struct ps_director *d, uint32_t routed_ifindex, const uint8_t mac[6], struct ps_error *e);

/* The engine's XDP program on `ifname` in the network namespace `netns`; own queue map. -> xskmap fd, or -1 */
int ps_engine_attach(struct ps_director *d, int netns, const char *ifname, const char *name, const struct ps_end *of,
		     struct ps_error *e);
int ps_engine_detach(struct ps_director *d, const char *name, struct ps_error *e);
/* Frames the engine's program dropped: {without a stamp, markers without the engine's token, stamped for another engine} */
int ps_engine_refused(struct ps_director *d, const char *name, uint64_t frames[3], struct ps_error *e);

uint64_t *ps_director_words(struct ps_director *d);  /* PS_TABLE_WORDS flow-table words, mmap of the map */
uint64_t *ps_director_egress(struct ps_director *d); /* PS_MAX_SLOTS * PS_MAX_CPUS: last egress fence seen */

int ps_director_engine(struct ps_director *d, uint32_t slot, uint32_t ifindex, struct ps_error *e); /* 0 removes */
/* target NULL removes. address: 16 bytes, IPv4 mapped. port: wire order. */
int ps_director_listener(struct ps_director *d, const uint8_t *address, uint16_t port, uint8_t protocol,
			 const struct ps_target *target, struct ps_error *e);
/* A source prefix that a listener with PS_TARGET_ALLOWED takes packets from. */
struct ps_allowed {
	uint8_t address[16]; /* the listener's, */
	uint16_t port;	     /* wire order, */
	uint8_t protocol;
	uint8_t prefix; /* bits of the source, of its own family */
	uint8_t source[16];
};
int ps_director_allow(struct ps_director *d, const struct ps_allowed *a, int allow, struct ps_error *e); /* 0 removes */
/* Copies up to `max` of those there are; -> how many */
int ps_director_allowed(struct ps_director *d, struct ps_allowed *out, int max);
int ps_director_snat(struct ps_director *d, const uint8_t *address, const struct ps_target *target, struct ps_error *e);
int ps_director_counters(struct ps_director *d, uint64_t *out,
			 struct ps_error *e); /* PS_D_COUNTERS, summed over CPUs */
/* PS_H_COUNTERS, summed over CPUs */
int ps_host_counters(struct ps_director *d, uint64_t *out, struct ps_error *e);

/*
 * Watched listeners. number: place among PS_MAX_WATCHED, 0 = watch it no more. A listener that is written anew
 * (ps_director_listener) is not watched until this is called again; one that is not there is none. Idempotent.
 */
int ps_director_watch(struct ps_director *d, const uint8_t *address, uint16_t port, uint8_t protocol, uint32_t number,
		      struct ps_error *e);
struct ps_watch *ps_director_watches(struct ps_director *d); /* PS_MAX_WATCHED, mmap of the map */
int ps_director_watched(struct ps_director *d, uint32_t number, struct ps_watched *out,
			struct ps_error *e); /* summed over CPUs, since the map was made */
/* Half 0 or 1 of the known flows' bits is emptied; flows of an arena whose packets are let through are added. */
void ps_director_forget(struct ps_director *d, uint32_t half);
void ps_director_know(struct ps_director *d, uint32_t half, struct ps_arena *a);

/* A flow with all that names it, as others than its owner read it. Addresses 16 bytes, ports in wire order. */
struct ps_flow {
	uint8_t client[16], vip[16], snat[16], backend[16];
	uint16_t client_port, vip_port, snat_port, backend_port;
	uint32_t hash;				/* upper half of the forward hash */
	uint32_t last_seen;			/* ticks of 1/PS_TICKS_PER_SECOND s */
	uint16_t flags;				/* ps_flow_flags */
	uint16_t backend_id, listener, snat_id; /* indexes into the arena's tables */
	uint8_t state;				/* ps_flow_state */
};

/* ---- files.c, parts.c: arena, engine file, configuration file ----------------------------------------------- */

/*
 * Creates (refuses to overwrite) or opens, to be written; maps shared. What is of another layout, or has numbers that do
 * not fit to each other, to the file and to its map, is refused. `pin`: where the map is pinned that engines write
 * (packetstack/parts.h); for the creation of an arena in tests it may be NULL, then that part is nobody else's.
 * `form`: of the engines that shall use the arena, perhaps of another build; NULL: of this one.
 */
struct ps_arena *ps_arena_create(const char *path, const char *pin, uint32_t buckets, uint64_t max_flows,
				 const struct ps_shard_form *form, struct ps_error *e);
struct ps_arena *ps_arena_open(const char *path, const char *pin, struct ps_error *e);
struct ps_shard_form ps_own_form(void);
struct ps_shard_form ps_arena_form(const struct ps_arena *a);
struct ps_config_file *ps_config_create(const char *path, struct ps_error *e);
struct ps_config_file *ps_config_open(const char *path, int read_only, struct ps_error *e);
struct ps_engine *ps_engine_open(const char *path, const char *pin, struct ps_error *e);
/* To read alone, from descriptors that the agent has given (PS_MSG_VIEW). */
struct ps_engine *ps_engine_view(int file, int map, struct ps_error *e);
/* A descriptor of a pinned map, or -1. */
int ps_map_open(const char *pin, int read_only, struct ps_error *e);
uint64_t ps_map_bytes(const char *pin); /* 0: it is not there, or no memory of engines */
void ps_unmap(void *map);		/* any of the above */

/*
 * Index in the arena's table, added if it is new; -1 if the table is full. Entries that no flow names any more, and no
 * configuration, are given to others.
 */
int ps_arena_address(struct ps_arena *a, const struct ps_config_file *config, const uint8_t *address);
int ps_arena_backend(struct ps_arena *a, const uint8_t *address, uint16_t port);
int ps_arena_listener(struct ps_arena *a, const uint8_t *address, uint16_t port, uint8_t protocol);
/* Marks what this configuration names as used, all else as not. Every core must have taken it. */
void ps_arena_used(struct ps_arena *a, const struct ps_config *c);
struct ps_shard *ps_arena_shard(struct ps_arena *a, uint32_t bucket);
/* Up to `max` flows of a bucket, those that have ended too; -> how many. Safe beside the writer (version words). */
int ps_arena_flows(struct ps_arena *a, uint32_t bucket, struct ps_flow *out, int max);
uint64_t ps_arena_live(struct ps_arena *a); /* flows in all shards that have not ended */
/* Owner of each shard, and how many of its flows have not ended, into arrays with a place for each bucket. */
void ps_arena_headers(struct ps_arena *a, uint64_t *owners, uint16_t *live);
/* Packets handled by bucket */
void ps_arena_packets(struct ps_arena *a, uint64_t *out);

/* ---- addresses.c ------------------------------------------------------------------------------------- */

/* Flows by SNAT address, those that have ended too: an index into the arena's addresses, into an array of PS_MAX_ADDRESSES. */
int ps_arena_snat_flows(struct ps_arena *a, uint32_t *flows, struct ps_error *e);

/* ---- queues.c: an engine's rings, made by the agent in the engine's network namespace --------------- */

struct ps_queue_options {
	uint32_t slot, queues, cores;
	uint32_t rx_slots, tx_slots; /* per queue, powers of two */
	uint32_t spare_frames;	     /* beyond sum of all receive and transmit rings */
	uint32_t mtu, spin_us;
	uint64_t token; /* as its ends have it (ps_end) */
	uint8_t mac[8], gateway_mac[8];
};

/* Descriptors of an engine. The agent keeps them; the datapath gets copies. */
struct ps_queue_fds {
	int engine, map; /* engine file, to read alone; its map */
	int umem;
	int sockets[64];
	int wake[32], woken[32]; /* per core: to wake it, and what it waits on. Two ends of a socket pair */
	int egress;		 /* AF_PACKET socket on the engine's interface, for egress markers */
};

int ps_queues_create(const char *path, const char *pin, int netns, const char *ifname, int xskmap,
		     const struct ps_queue_options *o, struct ps_queue_fds *out, struct ps_error *e);
void ps_queues_close(struct ps_queue_fds *fds);
/* Drops the kernel counted for a queue: {rx_dropped, rx_ring_full, rx_fill_ring_empty, tx_invalid, ...} (6). */
int ps_queue_statistics(int socket, uint64_t *out, struct ps_error *e);
/*
 * Are these the descriptors that ps_queues_create has made for the engine? `fds`: UMEM, a socket a queue, `wake` and
 * `woken` of each core, `n` in all. -1: no, *e says which is not.
 */
int ps_queues_known(const struct ps_engine *engine, const int *fds, int n, struct ps_error *e);
/* Walks all rings: each frame is in exactly one. Exact while no packets flow. */
int ps_queues_census(struct ps_engine *engine, const struct ps_queue_fds *fds, struct ps_census *out,
		     struct ps_error *e);
/* Are a shard's indexes, lists and counts those of its flows? Nobody may be changing it. Of this build's form alone. */
int ps_arena_check(struct ps_arena *a, uint32_t bucket, struct ps_error *e);

/* ---- transfer.c: moves of ownership ------------------------------------------------------------------ */

struct ps_fence_engine { /* an engine that a fence may have to visit */
	uint32_t slot;
	uint32_t ifindex;	  /* host end */
	int ingress;		  /* AF_PACKET socket in the node's namespace */
	int egress;		  /* AF_PACKET socket on the engine's interface */
	int wake[32];		  /* wake its cores */
	struct ps_engine *engine; /* NULL: it is gone, its processes have ended and its interface does not exist */
};

struct ps_move {
	uint32_t bucket, slot, queue; /* new owner; slot 0 = none: its packets are dropped and counted */
	uint32_t pair; /* of it and of who keeps connections of the bucket, without which that one is not moved; or 0 */
};

struct ps_transfer_report {
	uint32_t moved, skipped; /* skipped: there already, or its queues take part on the other side of this fence */
	uint32_t markers, resent;
	uint64_t total_ns; /* word stored -> last shard released */
	uint64_t acked_ns; /* word stored -> last source has acknowledged */
	uint32_t
		stalled_slot; /* not 0: this engine has not acknowledged in limit_ms, or is not in `engines`; call again */
	uint32_t stalled_egress; /* it has acknowledged: what does not come by are the markers behind its packets */
	uint32_t cpus;
};

int ps_packet_socket(int netns, uint32_t ifindex, struct ps_error *e); /* for markers; netns -1 = here */
/* One marker of no fence to each queue: an engine whose path works counts them (PS_C_MARKERS). */
int ps_probe(const struct ps_fence_engine *engine, struct ps_error *e);
/*
 * Moves buckets of one stack. Stores the words, runs the fence, releases the shards. Never releases
 * by a timer: with stalled_slot set, some shards are not released and the caller must repeat the
 * call (same or other moves) when the engine answers again. Idempotent: buckets whose word and
 * shard differ from an earlier, interrupted call are fenced too. all_cpus: the `tasks` file of a cpuset
 * with every CPU, which the fence's thread enters when its own lacks one; or -1. pairs: of a newcomer's set
 * (ps_director_pair_numbers), whose mirrored buckets may be moved; else NULL, and they stay.
 */
int ps_transfer(struct ps_arena *a, uint64_t *words, uint16_t *pairs, uint32_t offset, uint64_t *egress,
		struct ps_fence_engine *engines, int n_engines, const struct ps_move *moves, int n_moves,
		uint32_t limit_ms, int all_cpus, struct ps_transfer_report *report, struct ps_error *e);
/* ---- mirror.c: a second set of engines takes new connections, the first keeps those that it has ---------------------- */

/* Two sets of one stack. */
struct ps_sets {
	struct ps_arena *keeper, *newcomer;
	uint64_t *words;
	uint32_t offset;		 /* of the stack's words, and of its pair numbers */
	uint16_t *pairs;		 /* ps_director_pair_numbers */
	struct ps_fence_engine *engines; /* of both sets */
	int n_engines;
	uint32_t limit_ms;
	int all_cpus; /* see ps_transfer */
};

struct ps_switch {
	uint32_t bucket, slot, queue; /* owner in the newcomer's set */
	uint32_t pair;		      /* of it and the present owner: ps_director_pairs */
};

/*
 * Gives buckets to the newcomer's set; their connections stay with their owners of now, which get a copy of each packet.
 * Every engine of both has the connection list. As with ps_transfer nothing is released by a timer; a call that was
 * interrupted, or was not answered, is finished by the next, without moves too. Of a keeper's engine that is gone (engine
 * NULL) the buckets wait until another has adopted them, which publishes.
 */
int ps_mirror_switch(const struct ps_sets *sets, const struct ps_switch *moves, int n_moves,
		     struct ps_transfer_report *report, struct ps_error *e);
/* These buckets, and those that an interrupted call has left, are the newcomer's alone. Then the keeper may go. */
int ps_mirror_end(const struct ps_sets *sets, const uint32_t *buckets, int n_buckets, struct ps_transfer_report *report,
		  struct ps_error *e);

/*
 * Other keepers (`slot`, `queue`) for buckets whose own are gone for good: nothing of them is under way, so their owners go on
 * at the same epoch. What has not been published is by the next ps_mirror_switch.
 */
int ps_mirror_adopt(const struct ps_sets *sets, const struct ps_switch *moves, int n_moves, struct ps_error *e);

/* A pair of engines that packets are mirrored to: the interfaces of their host ends. */
struct ps_pair {
	uint32_t number; /* 1 .. PS_MAX_PAIRS-1 */
	uint32_t ifindex[2];
};

/* New numbers cost one grace period of the kernel, some 10 ms, for all of them together; known ones nothing. */
int ps_director_pairs(struct ps_director *d, const struct ps_pair *pairs, int n, struct ps_error *e);
/* By bucket, as the words are: PS_TABLE_WORDS numbers, mmap of the map */
uint16_t *ps_director_pair_numbers(struct ps_director *d);

/* The connection list of a keeper's set (packetstack/connections.h): pinned, for engines of both sets to write. */
struct ps_connection_list;
struct ps_connection_list *ps_connections_open(const char *pin, const struct ps_arena *keeper, int create,
					       struct ps_error *e); /* create: there is none yet */
void ps_connections_close(struct ps_connection_list *l);
/* Its buckets, entries, index slots and places for clients, as PS_MSG_CONNECTIONS names them */
void ps_connections_numbers(const struct ps_connection_list *l, uint32_t out[4]);
/*
 * By bucket: connections that the keeper has left, UINT32_MAX if it has published none yet; and when the one of them was
 * seen that is silent for the longest time, in ticks.
 */
void ps_connections_left(const struct ps_connection_list *l, uint32_t *left, uint32_t *oldest);

/*
 * Tells the newcomer what the keeper has left now of each backend, listener and client: for its limits, and for LeastFlows.
 * The keeper's counts are believed as far as they go: a wrong one may keep the newcomer from opening flows, no more.
 */
void ps_mirror_share(const struct ps_sets *sets, const struct ps_connection_list *l);
/* The keeper has nothing left. */
void ps_mirror_share_no_more(struct ps_arena *newcomer);

/* Wakes a core by its `wake`. Never waits. */
void ps_wake(int socket);
/* Gives a queue to another core of the same engine; returns when it has it, or after limit_ms with -1. */
int ps_queue_to_core(struct ps_fence_engine *engine, uint32_t queue, uint32_t core, uint32_t limit_ms,
		     uint64_t *took_ns, struct ps_error *e);

/* ---- heap.c: the process's own memory ------------------------------------------------------------------- */

/* One heap for all threads from now on, instead of one each. */
void ps_heap_share(void);
/* What was freed goes back to the node. Takes milliseconds. */
void ps_heap_give_back(void);

/* ---- oracle access for tests and `explain` ----------------------------------------------------------- */

uint64_t ps_flow_hash(uint64_t key0, uint64_t key1, const uint8_t *source, const uint8_t *destination, uint16_t sport,
		      uint16_t dport, uint8_t protocol); /* 16-byte addresses, wire-order ports */
uint64_t ps_make_word(uint32_t epoch, uint32_t slot, uint32_t queue, uint32_t prev_slot, uint32_t prev_queue);
/* Sizes of shared structures as the C compiler has them, in the order named in packetstack_core/abi.py. */
uint64_t ps_size_of(const char *structure);

#endif
