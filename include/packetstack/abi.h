/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What C and Python both know: the flow-table word, the stamp, the marker, and the layouts in
 * shared memory. Defined here once. BPF programs, datapath and agent include it; Python reads the
 * preprocessed text through cffi (packetstack_core.abi). Therefore: no macros that Python would
 * need (constants are enumerators), natural alignment only, no packed structures.
 *
 * Byte order: addresses and ports are kept as they are on the wire. All else is host order.
 * An address is 16 bytes; IPv4 is kept IPv4-mapped (::ffff:a.b.c.d).
 */
#ifndef PACKETSTACK_ABI_H
#define PACKETSTACK_ABI_H

#ifndef PS_CDEF
#include <stdint.h>
#endif

enum ps_limits {
	PS_LAYOUT_VERSION = 5, /* of all that agent and engines share, but for what lies behind a shard's header */
#ifdef PS_OTHER_SHARD_LAYOUT
	PS_SHARD_LAYOUT = 1000, /* for tests */
#else
	PS_SHARD_LAYOUT = 1, /* of that: see ps_shard_form */
#endif
	PS_MAX_STACKS = 64,
	PS_MIN_BUCKETS = 256,
	PS_MAX_BUCKETS = 8192,
	PS_TABLE_WORDS = 524288, /* PS_MAX_STACKS * PS_MAX_BUCKETS, one table for the node */
	PS_MAX_SLOTS = 1024,	 /* engine slots of a node; slot 0 means "none" */
	PS_MAX_QUEUES = 64,	 /* queues of an engine */
	PS_MAX_CORES = 32,	 /* worker threads of a datapath process */
	PS_MAX_CPUS = 256,
	PS_MAX_ADDRESSES = 4096, /* SNAT addresses that a configuration or live flows of a stack may name */
	PS_MAX_BACKENDS = 4096,	 /* backends (address, port), as for addresses */
	PS_MAX_LISTENERS = 256,
	PS_MAX_ENTRIES = 32000, /* flows of a shard */
	PS_MAX_NUMBERS = 1024,	/* listeners that a stack's live flows may name, those that were removed too */
	PS_CLASSES = 64,	/* listeners are told apart in a shard by number % PS_CLASSES */
	PS_MAX_SNAT = 1024,
	PS_MAX_UPLINKS = 64,	 /* a power of two */
	PS_UPLINK_PROBES = 4,	 /* places at which an uplink may be found, from its interface's index on */
	PS_MAX_ALLOWED = 64,	 /* allowed sources of a listener */
	PS_DIRECT_SLOTS = 1024,	 /* of the director's direct table; 2^10, see ps_direct_slot */
	PS_MAX_LOOKUP = 1048576, /* Maglev entries of all listeners */
	PS_MAX_FENCES = 16,	 /* open fences of a stack */
	PS_MAX_PAIRS = 4096,	 /* pairs of engines that traffic is mirrored to; pair 0 is none */
	PS_BATCH = 64,		 /* frames of one ring transaction */
	PS_UNDO_BYTES = 128,	 /* all that rewriting one frame may touch */
	PS_FRAME_BYTES = 2048,
	PS_MAX_FRAME = 1518,	  /* what an engine's interface takes: an MTU of 1500, and one VLAN tag */
	PS_TICKS_PER_SECOND = 10, /* unit of ps_entry.last_seen, CLOCK_MONOTONIC */
	PS_CAPTURES = 8,
	PS_CAPTURE_BYTES = 256,
};

enum ps_magic {
	PS_STAMP_MAGIC = 0x50c5,
	PS_MARKER_MAGIC = 0x504b4d52,
	PS_ARENA_MAGIC = 0x504b4152,
	PS_ENGINE_MAGIC = 0x504b454e,
	PS_CONFIG_MAGIC = 0x504b434f,
	PS_MARKER_ETHERTYPE = 0x88b5, /* IEEE 802 local experimental 1 */
};

/* ---- the stamp: what the director tells the engine about one packet -------------------------- */

enum ps_stamp_flags {
	PS_STAMP_REPLY = 1,    /* addressed to a SNAT address: the bucket came from the port */
	PS_STAMP_FRAGMENT = 2, /* a later fragment: `hash` holds source port << 16 | destination port */
	PS_STAMP_ICMP = 4,     /* an ICMP error: bucket and hash are those of the embedded flow */
	PS_STAMP_MIRROR = 8,   /* there are two copies: for the owner, and for the previous owner */
	PS_STAMP_UDP = 16,     /* a later fragment of UDP, although its own header names an extension header */
	PS_STAMP_SLOT = 6,     /* flags >> this: the owner's slot, by which each of the two knows which copy it has */
};

/* 16 bytes of XDP metadata, directly before the Ethernet header. */
struct ps_stamp {
	uint16_t magic; /* PS_STAMP_MAGIC */
	uint16_t flags; /* ps_stamp_flags, and the owner's slot */
	uint32_t epoch;
	uint16_t bucket;
	uint8_t queue;	    /* the owner's queue */
	uint8_t prev_queue; /* the previous owner's queue, when mirrored */
	uint32_t hash;	    /* upper half of the flow's 64-bit hash */
};

/* ---- the marker: the frame of a fence ---------------------------------------------------------- */

enum ps_marker_kind {
	PS_MARKER_INGRESS = 1, /* host side -> engine queue */
	PS_MARKER_EGRESS = 2,  /* engine interface -> host side -> routed end */
};

/* Follows an Ethernet header with ethertype PS_MARKER_ETHERTYPE. Host order. */
struct ps_marker {
	uint32_t magic; /* PS_MARKER_MAGIC */
	uint8_t kind;
	uint8_t queue;
	uint16_t cpu;  /* the CPU that sent it */
	uint16_t slot; /* the engine that is being fenced */
	uint16_t spare;
	uint32_t attempt;
	uint64_t fence; /* id, rises; its description is at fences[id % PS_MAX_FENCES]. 0: a probe, of no fence */
	uint64_t token; /* the engine's: others who reach its interface do not know it */
};

/* What the programs at both ends of an engine's interface know of it. */
struct ps_end {
	uint64_t token; /* ps_engine.token */
	uint32_t slot;
	uint32_t stack; /* 0 .. PS_MAX_STACKS-1 */
};

/* ---- director maps ----------------------------------------------------------------------------- */

struct ps_listener_key4 {
	uint32_t address;
	uint16_t port;
	uint8_t protocol;
	uint8_t zero;
};

struct ps_listener_key6 {
	uint32_t address[4];
	uint16_t port;
	uint8_t protocol;
	uint8_t zero;
};

/* Value of the listener and SNAT maps: where a stack's flow table is, and its secret. */
struct ps_target {
	uint64_t key0, key1; /* SipHash-1-3 key */
	uint32_t offset;     /* first word of the stack's table */
	uint32_t mask;	     /* buckets - 1 */
	uint32_t stack;	     /* 0 .. PS_MAX_STACKS-1 */
	uint32_t flags;	     /* ps_target_flags */
};

enum ps_target_flags {
	PS_TARGET_ALLOWED = 1, /* a listener that takes packets from its allowed sources alone */
};

/* An IPv4 listener at its place in the director's direct table, which most packets are found in at once. */
struct ps_direct {
	uint64_t key; /* ps_direct_key; 0 = free */
	struct ps_target target;
};

/* Keys of the tries of allowed sources. */
struct ps_allowed4 {
	uint32_t prefix; /* bits, the first 64 of them the listener's */
	struct ps_listener_key4 listener;
	uint32_t source;
};

struct ps_allowed6 {
	uint32_t prefix; /* bits, the first 160 of them the listener's */
	struct ps_listener_key6 listener;
	uint32_t source[4];
};

enum ps_uplink_flags {
	PS_UPLINK_CLIENTS = 1,	   /* packets to listeners are taken */
	PS_UPLINK_BACKENDS = 2,	   /* packets to SNAT addresses are taken */
	PS_UPLINK_NO_METADATA = 4, /* nothing is stamped here, as if the driver left no room; for tests */
};

/* A device the director runs on ahead of the kernel. */
struct ps_uplink {
	uint32_t ifindex;  /* 0 = free */
	uint32_t flags;	   /* ps_uplink_flags */
	uint32_t mac_high; /* the device's own address as on the wire: four bytes, */
	uint16_t mac_low;  /* and two */
	uint16_t spare;
	uint64_t vlans[64]; /* a bit for each VLAN in which the node is on this device */
};

/* Addresses that are no client's and no backend's. */
enum ps_own_kind {
	PS_OWN_STACK = 1,     /* a virtual or SNAT address of a stack of this node */
	PS_OWN_NODE = 2,      /* the node's: nobody else's on an uplink */
	PS_OWN_BROADCAST = 4, /* of a network of the node */
};

/* A bit for each of them, and for others by chance. */
struct ps_own_filter {
	uint64_t word[512];
};

enum ps_director_counter {
	PS_D_RECEIVED,		 /* every frame the director saw */
	PS_D_FORWARDED,		 /* stamped and sent to an engine */
	PS_D_MIRRORED,		 /* of these: to a second engine too, the bucket's previous owner */
	PS_D_PASSED,		 /* not ours, left to the kernel (uplink) */
	PS_D_PASSED_METADATA,	 /* ours, but no room for the stamp: takes the routed pair (uplink) */
	PS_D_PASSED_TOO_LONG,	 /* ours, but longer than PS_MAX_FRAME: takes the routed pair (uplink) */
	PS_D_ECHO_REPLIED,	 /* ICMP echo to a VIP, answered */
	PS_D_TIME_EXCEEDED_SENT, /* no hops left: ICMP time exceeded sent back */
	PS_D_UNREACHABLE_SENT,	 /* UDP to a VIP's port without listener: ICMP port unreachable sent back */
	PS_D_RESET_SENT,	 /* the same of TCP, answered by a reset */
	PS_D_DROP_NOT_OURS,	 /* not a listener's or SNAT address's traffic, on the routed pair */
	PS_D_DROP_MALFORMED,
	PS_D_DROP_MARTIAN,	     /* a source that nobody can have */
	PS_D_DROP_OWN_SOURCE,	     /* a source that is one of our addresses, or on an uplink one of the node's */
	PS_D_DROP_WRONG_UPLINK,	     /* to a listener on an uplink for backends, or a reply on one for clients */
	PS_D_DROP_NOT_ALLOWED,	     /* not among the listener's allowed sources */
	PS_D_DROP_NO_OWNER,	     /* the bucket's word names no engine */
	PS_D_DROP_NO_ENGINE,	     /* the engine's device is gone */
	PS_D_DROP_FRAGMENT_EARLY,    /* a fragment before its first */
	PS_D_DROP_FRAGMENT_CONFLICT, /* a first fragment with other ports than one under way with its id */
	PS_D_DROP_METADATA,	     /* no room for the stamp, on the routed pair */
	PS_D_DROP_TTL,		     /* no hops left, and not answered */
	PS_D_DROP_SHED, /* of a flow that is not known, to a listener that gets more of them than its share */
	PS_D_COUNTERS
};

/* What engines transmitted, at the host side */
enum ps_host_counter {
	PS_H_RECEIVED, /* frames */
	PS_H_MARKERS,
	PS_H_FORWARDED, /* next hop known, sent on */
	PS_H_RESOLVED,	/* sent on, the kernel resolves the next hop */
	PS_H_TO_KERNEL, /* left to the kernel: local processes, smaller MTU, no route */
	PS_H_DROP_NOT_IP,
	PS_H_DROP_FOREIGN_SOURCE, /* no virtual or SNAT address of the engine's stack */
	PS_H_DROP_FORGED_MARKER,  /* not of the engine whose end it came through, or without its token */
	PS_H_COUNTERS
};

/* ---- watched listeners: those of stacks whose engines have more to do than they can ------------------ */

enum ps_watching {
	PS_MAX_WATCHED = 1024, /* places of a node, 0 is none */
	PS_WATCH_SHIFT = 16,   /* ps_target.flags >> this: the place of a listener that is watched */
	PS_WATCH_BURST_NS = 50000000,
	PS_KNOWN_WORDS = 262144, /* of 64 bits, twice: the one half is used while the other is written */
};

/* Packets to a listener of flows that are not known, by what they may be */
enum ps_stranger {
	PS_OPENERS, /* TCP SYN, UDP */
	PS_STRAYS,  /* others */
	PS_STRANGERS
};

/* Written by the agent, but for next_ns. One cache line. */
struct ps_watch {
	uint64_t next_ns[2]; /* by ps_stranger: when an even stream would bring its next packet */
	uint64_t step_ns[2]; /* between two packets of the stream that is let through; 0 = all are */
	uint32_t half;	     /* of the known flows' bits, that is valid */
	uint32_t spare0;
	uint64_t spare[3];
};

/* Per CPU; by ps_stranger */
struct ps_watched {
	uint64_t offered[2], shed[2];
};

/*
 * ---- memory in two parts ---------------------------------------------------------------------------
 *
 * Arena and engine file begin with what the agent alone writes: a file that engines get to read. Right behind it is
 * mapped what engines write: a BPF map, which nobody can cut, grow or take away from others (packetstack/parts.h).
 * The agent believes nothing of that second part: no size, offset or index of it leads anywhere unchecked.
 */

enum ps_parts {
	PS_PAGE = 4096,
	PS_ENGINE_FILE_BYTES = 4096,  /* the agent's part of ps_engine */
	PS_ARENA_FILE_BYTES = 249856, /* the agent's part of ps_arena */
};

/* ---- engine file: one per engine, rings and queue objects -------------------------------------- */

/* Per core; frames unless said otherwise */
enum ps_counter {
	PS_C_RECEIVED,	/* taken out of receive rings, markers excluded */
	PS_C_FORWARDED, /* put into transmit rings */
	PS_C_RECEIVED_BYTES,
	PS_C_FORWARDED_BYTES,
	PS_C_PARKED, /* put into a park ring (later also forwarded or dropped) */
	PS_C_UNPARKED,
	PS_C_LATE, /* stamped with an epoch that had been released: a fence was broken */
	PS_C_MARKERS,
	PS_C_FLOWS_CREATED,
	PS_C_FLOWS_ENDED,
	PS_C_FLOWS_RECYCLED, /* half-open or closing flows ended early to make room */
	PS_C_HANDOFFS,	     /* queues acquired from another core */
	PS_C_SWEPT_SHARDS,
	PS_C_ICMP_TRANSLATED,
	PS_C_MSS_CLAMPED,
	PS_C_RESETS_SENT,
	PS_C_MIRRORED,		/* of the received: copies of which another set's engine has got one too */
	PS_C_REJECTED_NOT_KEPT, /* as the previous owner: of no connection that it keeps, so the owner's */
	PS_C_REJECTED_CLAIMED,	/* as the previous owner: of one that the owner has taken over, or may */
	PS_C_REJECTED_KEPT,	/* as the owner: of a connection that the previous owner keeps */
	PS_C_REJECTED_CLOSING,	/* the same of one that is ending there */
	PS_C_UNPROVEN, /* segments that would have changed a connection's state, by somebody who does not know its numbers */
	PS_C_DROP_NO_STAMP,
	PS_C_DROP_UNKNOWN_MARKER, /* of no fence that is open, or not the agent's */
	PS_C_DROP_MALFORMED,
	PS_C_DROP_BAD_CHECKSUM,
	PS_C_DROP_NO_LISTENER,
	PS_C_DROP_NO_BACKEND, /* the listener has no healthy backend */
	PS_C_DROP_NO_PORT,    /* all SNAT ports of the bucket are in use */
	PS_C_DROP_NO_FLOW,    /* TCP without state and without SYN, or a reply without a flow */
	PS_C_DROP_SHARD_FULL,
	PS_C_DROP_LIMIT_FLOWS,	/* the listener has spec.listeners[].limits.maxFlows */
	PS_C_DROP_LIMIT_RATE,	/* more openers than limits.newFlowsPerSecond */
	PS_C_DROP_LIMIT_CLIENT, /* the client has limits.maxFlowsPerClient */
	PS_C_DROP_TTL,
	PS_C_DROP_PARK_FULL,
	PS_C_DROP_TX_FULL,
	PS_C_DROP_TOO_BIG,
	PS_C_DROP_NOT_OWNER, /* late and could not be handed on */
	PS_C_DROP_UNSUPPORTED,
	PS_C_DROP_DEADLINE,	  /* of a connection that had not ended when its set had no more time */
	PS_C_DROP_POISON,	  /* the process died twice while it rewrote this frame */
	PS_C_DROP_BAD_DESCRIPTOR, /* a ring named memory that is no frame: not followed */
	PS_C_JOURNALS_REFUSED,	  /* what a dead process left of a journal or ring made no sense */
	PS_C_FRAMES_RECOVERED,	  /* were in no ring at an adoption: given back */
	PS_C_SHARDS_REBUILT,
	PS_C_COPIED_BYTES, /* of the received bytes: those of copies that were rejected */
	PS_COUNTERS
};

/* Written by its thread alone */
struct ps_core {
	uint64_t heartbeat;   /* loop turns */
	uint64_t busy_cycles; /* TSC spent in turns that handled frames */
	uint64_t total_cycles;
	uint64_t config_seen; /* generation of the configuration in use */
	uint32_t thread;      /* tid, 0 = not running */
	uint32_t cpu;	      /* last CPU seen */
	uint32_t pinned_cpu;  /* ~0 = not pinned */
	uint32_t asleep;      /* 1 while it waits in poll() */
	uint64_t wakeups;
	uint64_t spare[9];
	uint64_t counters[64]; /* enum ps_counter */
};

/*
 * The journal of a queue. User space never owns a frame: each frame is in exactly one ring. A batch
 * is a transaction over ring indexes: new absolute indexes are written, `commit` is set, indexes are
 * published, `commit` is cleared. Rewriting of a frame is covered by begin/end (absolute indexes of
 * the source ring) and one undo copy. Whoever adopts the queue redoes what was committed and undoes
 * a torn rewrite.
 */
struct ps_progress {
	uint32_t begin;	     /* last frame whose rewriting began; ~0u initially */
	uint32_t end;	     /* frames before this one are finished; published when the consumer is here */
	uint8_t verdict[64]; /* by source index & 63: ps_verdict | shift/4 << 4 */
	uint8_t undo[128];   /* PS_UNDO_BYTES */
};

struct ps_journal {
	uint32_t commit;
	uint32_t rx, tx, park_prod, park_cons, free_prod;
	uint32_t check;		/* over the five above: rubbish is not published */
	uint32_t torn[2];	/* by source: index of the frame whose rewrite was found torn, */
	uint32_t torn_times[2]; /* and how often */
	uint32_t spare[5];
	struct ps_progress progress[2]; /* source: receive ring, park ring */
};

/* An index pair of a ring that lives in this file; kernel rings have the like. */
struct ps_ring {
	uint32_t producer;
	uint32_t pad0[15];
	uint32_t consumer;
	uint32_t pad1[15];
};

/* struct xdp_desc of linux/if_xdp.h */
struct ps_descriptor {
	uint64_t address;
	uint32_t length;
	uint32_t options;
};

struct ps_queue {
	uint32_t cur;  /* core that serves it: generation << 8 | core + 1; 0 = none. Which one shall: ps_engine.want */
	uint32_t kick; /* transmit ring has frames that were not kicked */
	uint32_t spare0[2];
	uint64_t fence;		 /* fence whose markers are being collected */
	uint64_t fence_cpus[4];	 /* bit per CPU whose marker came */
	uint64_t fence_complete; /* last fence whose markers have all come */
	uint64_t fence_acked;	 /* last fence that is done: handled, transmitted, shards fenced */
	uint64_t received, forwarded, dropped, received_bytes; /* since start, markers excluded */
	uint64_t hold_max_ns, hold_ns, holds;		       /* time from first parked to released */
	uint64_t hold_since; /* CLOCK_MONOTONIC ns of the oldest parked frame's parking, 0 = none */
	uint64_t cycles;     /* busy cycles spent on this queue */
	uint64_t depth;	     /* frames in its receive and park rings when it was last looked at */
	uint64_t spare1[3];
	struct ps_ring park; /* ps_descriptor slots; the stamp stays before the frame */
	struct ps_ring free; /* uint64_t slots: frames to give back to the fill ring */
	struct ps_journal journal;
	/* park_slots * ps_descriptor, then free_slots * uint64_t */
};

/* The recycle transaction (completion and free rings -> fill ring), under `lock`. */
struct ps_recycle {
	uint32_t commit;
	uint32_t fill, completion;
	uint32_t free_consumer[64]; /* PS_MAX_QUEUES */
	uint32_t check;		    /* over those above, of the queues there are */
};

/* A frame that killed its process twice, as it came in. */
struct ps_capture {
	uint64_t time_ns; /* CLOCK_MONOTONIC */
	uint32_t bucket, queue;
	uint32_t length; /* of the frame */
	uint32_t spare;
	uint8_t bytes[256]; /* PS_CAPTURE_BYTES */
};

/* What a walk through all rings of an engine found. */
struct ps_census {
	uint32_t missing; /* frames in no ring */
	uint32_t twice;	  /* frames in more than one place */
	uint32_t bad;	  /* slots that name no frame, rings whose indexes make no sense */
};

struct ps_engine {
	/* the agent's part, one page */
	uint32_t magic, layout;
	uint64_t bytes; /* of both parts */
	uint32_t slot;
	uint32_t queues, cores;
	uint32_t frames; /* frames of the UMEM */
	uint32_t rx_slots, tx_slots, fill_slots, completion_slots, park_slots, free_slots;
	uint64_t token;		  /* of its markers: random, made with the engine */
	uint64_t captures_offset; /* ps_capture[PS_CAPTURES] */
	uint64_t cores_offset;	  /* ps_core[cores], stride sizeof */
	uint64_t queues_offset;	  /* ps_queue and its slots */
	uint64_t queue_stride;
	uint32_t generation; /* raised whenever a datapath process attaches */
	uint32_t mtu;
	uint32_t spin_us;	 /* how long a core polls empty queues before it sleeps */
	uint32_t work_ns;	 /* test builds: artificial cost of a packet */
	uint32_t protection_off; /* packetstack-datapath-inject only: ps_protection bits to leave out */
	uint32_t spare0;
	uint8_t mac[8];		/* of the engine's interface */
	uint8_t gateway_mac[8]; /* destination of all that it sends */
	uint32_t want[64];	/* PS_MAX_QUEUES: core + 1 that shall serve a queue */
	/* By these an agent knows the descriptors again that it gave to a datapath */
	uint64_t umem_inode;
	uint64_t socket_cookie[64];		    /* PS_MAX_QUEUES: SO_COOKIE */
	uint64_t wake_cookie[32], woken_cookie[32]; /* PS_MAX_CORES */
	uint8_t spare1[2672];
	/* the engines' part */
	uint32_t ready;	   /* generation that serves packets */
	uint32_t captured; /* poison frames ever; the last PS_CAPTURES are kept */
	/* packetstack-datapath-inject only: die at this ps_point, at which pass */
	uint32_t die_at, die_after;
	uint32_t lock; /* generation << 8 | core + 1 of the holder; 0 = free */
	struct ps_recycle recycle;
	/* captures, cores, queues */
};

/* ---- injected deaths (packetstack-datapath-inject) ---------------------------------------------- */

/* Where ps_engine.die_at can kill the process; named after what has just been done. */
enum ps_point {
	PS_AT_NOWHERE,
	PS_AT_BATCH_SIZED,
	PS_AT_MARKER,
	PS_AT_UNDO_RESTORED,
	PS_AT_TORN_COUNTED,
	PS_AT_UNDO_HALF_SAVED,
	PS_AT_UNDO_SAVED,
	PS_AT_REWRITE_BEGUN,
	PS_AT_REWRITE_ADDRESSES,
	PS_AT_REWRITE_PORTS,
	PS_AT_REWRITE_CHECKSUMS,
	PS_AT_REWRITE_DONE,
	PS_AT_VERDICT,
	PS_AT_FRAME_DONE,
	PS_AT_SLOT_WRITTEN,
	PS_AT_JOURNAL_WRITTEN,
	PS_AT_COMMITTED,
	PS_AT_PUBLISHED_TX,
	PS_AT_PUBLISHED_PARKED,
	PS_AT_PUBLISHED_FREE,
	PS_AT_PUBLISHED_UNPARKED,
	PS_AT_PUBLISHED_RX,
	PS_AT_BATCH_DONE,
	PS_AT_KICKED,
	PS_AT_FENCE_EMPTY,
	PS_AT_FENCE_SHARD,
	PS_AT_FENCE_SHARDS,
	PS_AT_RECYCLE_LOCKED,
	PS_AT_RECYCLE_SLOT,
	PS_AT_RECYCLE_WRITTEN,
	PS_AT_RECYCLE_COMMITTED,
	PS_AT_RECYCLE_FILL,
	PS_AT_RECYCLE_COMPLETION,
	PS_AT_RECYCLE_FREE,
	PS_AT_RECYCLE_CLEARED,
	PS_AT_INSERT_TAKEN,
	PS_AT_INSERT_WRITING,
	PS_AT_INSERT_WRITTEN,
	PS_AT_INSERT_FORWARD,
	PS_AT_INSERT_REPLY,
	PS_AT_INSERT_LISTED,
	PS_AT_INSERT_COUNTED,
	PS_AT_REMOVE_UNLISTED,
	PS_AT_REMOVE_FORWARD,
	PS_AT_REMOVE_REPLY,
	PS_AT_REMOVE_WRITING,
	PS_AT_REMOVE_WRITTEN,
	PS_AT_REMOVE_FREED,
	PS_AT_STATE_UNLISTED,
	PS_AT_STATE_SET,
	PS_AT_STATE_LISTED,
	PS_AT_STATE_COUNTED,
	PS_AT_SWEPT,
	PS_AT_HANDED,
	PS_AT_PUBLISH_BEGUN, /* from here on: points of engines whose traffic is mirrored */
	PS_AT_PUBLISH_HALF,
	PS_AT_PUBLISHED_LIST,
	PS_AT_KEPT,
	PS_AT_ASKED,
	PS_AT_CLAIMED,
	PS_AT_KEPT_ENDED,
	PS_AT_KEPT_CLOSING,
	PS_AT_KEPT_REVIVED,
	PS_AT_KEPT_REMOVED,
	PS_AT_KEPT_GONE,
	PS_AT_REBUILD_EMPTIED, /* from here on: points of a process that takes over */
	PS_AT_REBUILD_ENTRIES,
	PS_AT_REBUILD_HALF,
	PS_AT_ADOPT_BEGUN,
	PS_AT_ADOPT_RECYCLED,
	PS_AT_ADOPT_UNLOCKED,
	PS_AT_ADOPT_PUBLISHED,
	PS_AT_ADOPT_CLEARED,
	PS_AT_ADOPT_COUNTED,
	PS_AT_ADOPT_PARKED,
	PS_AT_ADOPT_TAKEN,
	PS_POINTS
};

/* Bits of ps_engine.protection_off: a test that sees nothing with these set would see nothing at all. */
enum ps_protection {
	PS_WITHOUT_REDO = 1,	/* the adopter clears a commit without publishing it */
	PS_WITHOUT_UNDO = 2,	/* a torn rewrite is not undone, a finished one not remembered */
	PS_WITHOUT_REBUILD = 4, /* shards are taken as they are */
};

/* ---- arena: one per stack, live flows ----------------------------------------------------------- */

enum ps_flow_state {
	PS_FLOW_FREE = 0,
	PS_FLOW_SYN = 1,     /* TCP: SYN seen, no answer yet */
	PS_FLOW_SYN_ACK = 2, /* TCP: answered, the client has not confirmed */
	PS_FLOW_ESTABLISHED = 3,
	PS_FLOW_CLOSING = 4,	/* TCP: one side's FIN has been acknowledged or is under way */
	PS_FLOW_CLOSED = 5,	/* TCP: both FINs or a reset; nothing keeps the backend from a new connection */
	PS_FLOW_TIME_WAIT = 6,	/* TCP: both FINs, the backend's first: it keeps the addresses and ports for a while */
	PS_FLOW_UNANSWERED = 7, /* UDP: the backend has not answered */
	PS_FLOW_ANSWERED = 8,	/* UDP: it has; whether the client is where it says is not known */
	PS_FLOW_ASSURED = 9,	/* UDP: questions and answers over some time */
	PS_FLOW_STATES
};

enum ps_flow_flags {
	PS_FLOW_UDP = 1,
	PS_FLOW_FIN_CLIENT = 2,	 /* TCP: a FIN stands at the end of what the client sent */
	PS_FLOW_FIN_BACKEND = 4, /* the same of the backend */
	PS_FLOW_V6 = 8,
	PS_FLOW_LISTED = 16,	     /* on one of the shard's lists */
	PS_FLOW_COUNTED = 32,	     /* in `live` of its backend and of its listener, and in `held` */
	PS_FLOW_CLIENT_COUNTED = 64, /* in the table of clients */
	PS_FLOW_BACKEND_FIRST = 128, /* TCP: the backend's FIN was the first */
	PS_FLOW_RESET = 256,	     /* TCP: a reset ended it, so it seemed */
	PS_FLOW_RESET_BACKEND = 512, /* the backend's, else the client's */
	PS_FLOW_RESET_EARLY = 1024,  /* its number was the last acknowledged one, with more on the way */
	PS_FLOW_UNSENT = 2048,	     /* changed since it was last sent to a replica; not used yet */
	PS_FLOW_PROVEN = 4096,	     /* in `proven` of its listener */
	PS_FLOW_STAMPED = 8192,	   /* TIME_WAIT: window[] holds the last timestamp that the backend has of the client */
	PS_FLOW_FORGOTTEN = 8192,  /* else: the client has sent SYNs that are not kept */
	PS_FLOW_ASTRAY = 16384,	   /* TCP: the client has sent a segment out of the window; the backend not since */
	PS_FLOW_FRAGMENTED = 32768 /* TCP: fragments have come by, of which only the first shows numbers */
};

/* Sides of a flow, index of the arrays below. */
enum ps_side { PS_CLIENT = 0, PS_BACKEND = 1 };

/*
 * One cache line. What names the flow is complete in itself but for two tables of the arena, whose entries outlive the
 * flows that name them: listeners (virtual address, port, protocol) and backends. Engines of a set agree on this and on
 * what else lies behind a shard's header; others know no more of it than ps_shard_form says. A change of it, or of what
 * engines mean by it, is another PS_SHARD_LAYOUT.
 */
#ifndef PS_OTHER_SHARD_LAYOUT
struct ps_entry {
	uint16_t version;    /* odd while being written */
	uint8_t state;	     /* ps_flow_state */
	uint8_t scales;	     /* TCP: window scale of the client, of the backend << 4; 15 = none offered */
	uint32_t last_seen;  /* ticks of 1/PS_TICKS_PER_SECOND s */
	uint32_t hash;	     /* upper half of the forward hash */
	uint16_t prev, next; /* list links: index + 1, 0 = end */
	uint8_t client[16];
	/* By ps_side. TCP, once it is established; what is in them before, and for UDP, say track.h and follow.h: */
	uint32_t end[2];    /* number behind the last byte it sent */
	uint32_t acked[2];  /* highest number it has acknowledged */
	uint16_t window[2]; /* largest window it has offered, unscaled. In TIME_WAIT a timestamp */
	uint16_t client_port, snat_port;
	uint16_t snat;	   /* index into the arena's addresses */
	uint16_t backend;  /* index into the arena's backends */
	uint16_t listener; /* number: index into the arena's listeners */
	uint16_t flags;	   /* ps_flow_flags */
};
#else
/* Larger, and all in other places: for tests of sets whose builds differ in this. */
struct ps_entry {
	uint16_t flags, listener;
	uint8_t unlike[58];
	uint8_t scales, state;
	uint8_t client[16];
	uint16_t backend, snat, snat_port, client_port;
	uint16_t window[2];
	uint32_t acked[2], end[2];
	uint16_t next, prev;
	uint32_t hash, last_seen;
	uint16_t version;
	uint8_t behind[6];
};
#endif

/*
 * What an agent has to know of a shard layout, which may be another build's: it makes memory for it, looks which numbers
 * of the arena flows name, and shows them. Behind the header lie the indexes, then the entries, then so many bytes more.
 * Sizes in bytes; then the place of each field in an entry, whose type, states and flags are those of all layouts.
 */
struct ps_shard_form {
	uint16_t layout;      /* 0: not said. That of builds before there was another */
	uint16_t index_bytes; /* for each of ps_arena.index_slots */
	uint16_t entry_bytes, tail_bytes;
	uint16_t version, state, last_seen, hash, client, client_port, snat_port, snat, backend, listener, flags;
	uint16_t spare;
};

enum ps_owner_state {
	PS_OWNED = 0,
	PS_FENCED = 1,	/* its owner touches it no more */
	PS_WAITING = 2, /* its owner shall begin when the previous one has published what it keeps */
	PS_KEPT = 3,	/* by the previous owner of a bucket whose traffic is mirrored: no flow begins here any more */
};

/* Flows that may have to go, oldest first. Links are index + 1, 0 = none. */
enum ps_list {
	PS_LIST_HALF_OPEN = 0, /* SYN, SYN_ACK, UNANSWERED, ANSWERED */
	PS_LIST_CLOSED = 1,    /* CLOSED */
	PS_LIST_TIME_WAIT = 2, /* TIME_WAIT: their ports are not given to others */
	PS_LISTS
};

struct ps_flow_list {
	uint16_t head, tail; /* oldest, newest */
	uint16_t count;
};

/* What the listeners of a class have of a shard. */
#ifndef PS_OTHER_SHARD_LAYOUT
struct ps_share {
	uint16_t held;	    /* entries of flows that have not ended */
	uint16_t half_open; /* of these, those that are half open */
};
#else
struct ps_share {
	uint32_t half_open, held;
};
#endif

/*
 * The header is the same in every shard layout. One cache line, since each packet needs it. What only openings need lies behind the entries, so that the indexes are
 * close to it and each entry is one line too.
 */
struct ps_shard {
	uint64_t owner;		     /* epoch 32 | slot 10 | queue 6 | ps_owner_state 16; as in the word */
	uint32_t dirty;		     /* index, lists and counts below are being changed: rebuild if a writer died */
	uint32_t next_expiry;	     /* tick before which no entry can expire */
	uint16_t live;		     /* entries in use */
	uint16_t high;		     /* entries ever used: the rest was never touched */
	uint16_t free;		     /* free list: index + 1 */
	uint16_t port_cursor;	     /* where the search for a free SNAT port goes on */
	struct ps_flow_list list[3]; /* by ps_list */
	uint16_t spare0[3];
	uint64_t packets; /* handled, for load per bucket */
	uint64_t spare1;
	/* uint16_t forward[index_slots], reply[index_slots]; ps_entry flows[entries];
	 * ps_share share[PS_CLASSES], by class of the listener: number % PS_CLASSES */
};

enum ps_fence_kind {
	PS_FENCE_TRANSFER = 0, /* the buckets go: their shards become PS_FENCED */
	PS_FENCE_SWITCH = 1,   /* another set takes new connections: their shards become PS_KEPT */
	PS_FENCE_PASS = 2,     /* what was sent before has been handled; no shard changes */
};

struct ps_fence {
	uint64_t id;
	uint32_t kind; /* ps_fence_kind */
	uint32_t buckets;
	uint32_t cpus; /* how many send a marker */
	uint32_t spare;
	uint8_t bitmap[1024]; /* PS_MAX_BUCKETS bits */
};

struct ps_address {
	uint8_t bytes[16];
};

/* Entries are given to another backend only when no flow in any shard names them. */
struct ps_backend {
	uint8_t address[16];
	uint16_t port;
	uint16_t used; /* the configuration names it */
	uint32_t kept; /* flows of it that the set before has left */
	uint32_t spare[2];
};

struct ps_backend_count {
	int32_t live; /* flows that have not ended, added to atomically */
	uint32_t spare0;
	uint64_t created;
};

/* A listener that flows may name. */
struct ps_listener_name {
	uint8_t address[16];
	uint16_t port;	  /* wire order */
	uint8_t protocol; /* 0: the entry is free */
	uint8_t used;	  /* the configuration names it */
	uint32_t kept;	  /* proven flows of it that the set before has left */
	uint16_t kept_as; /* its number there + 1; 0: it has none */
	uint16_t spare0;
	uint32_t spare1;
};

/* Its flows over all engines of the node. One cache line. */
struct ps_listener_count {
	int32_t live;	/* flows that have not ended, added to atomically */
	int32_t proven; /* flows whose client is where it says, not ended; added to atomically */
	uint64_t created;
	uint64_t next_ns; /* newFlowsPerSecond: when an even stream would bring its next opener */
	uint64_t spare[5];
};

/* Proven flows of one client of one listener that has maxFlowsPerClient: tag of both 32 | flows 32 */
typedef uint64_t ps_client_count;

struct ps_arena {
	/* the agent's part */
	uint32_t magic, layout;
	uint64_t bytes; /* of both parts */
	uint32_t buckets;
	uint32_t entries;     /* flows a shard can hold */
	uint32_t index_slots; /* power of two */
	uint32_t addresses;   /* in use, from 0 */
	uint32_t backends;    /* in use, from 0 */
	uint32_t clients;     /* places of the table of clients, a power of two */
	uint64_t shards_offset, shard_stride;
	uint64_t clients_offset; /* ps_client_count[clients] */
	uint64_t clients_key[2]; /* of its hash, a secret */
	uint64_t next_fence;
	uint64_t kept_key[2]; /* of the table of clients in the connection list */
	uint64_t spare0[3];
	struct ps_fence fences[16];		/* PS_MAX_FENCES */
	struct ps_address address[4096];	/* PS_MAX_ADDRESSES: SNAT and virtual addresses */
	struct ps_backend backend[4096];	/* PS_MAX_BACKENDS */
	struct ps_listener_name listener[1024]; /* PS_MAX_NUMBERS */
	struct ps_shard_form form;		/* of its shards */
	uint8_t spare1[3552];
	/* the engines' part */
	struct ps_backend_count backend_count[4096];
	struct ps_listener_count listener_count[1024];
	/* shards, table of clients */
};

/* ---- configuration: one file per stack, two buffers --------------------------------------------- */

enum ps_balancing { PS_MAGLEV = 0, PS_ROUND_ROBIN = 1, PS_LEAST_FLOWS = 2 };

enum ps_listener_flags {
	PS_LISTENER_CLIENT_IP = 1, /* sessionAffinity: ClientIP */
	PS_LISTENER_REFUSE = 2,	   /* a SYN that finds no backend is answered by a reset */
	PS_LISTENER_RESET_BACKEND_DOWN =
		4, /* flows of a backend that is down end with their next packet; TCP by a reset */
};

/* Sorted by address, port, protocol (memcmp order) */
struct ps_listener {
	uint8_t address[16];
	uint16_t port; /* wire order */
	uint8_t protocol;
	uint8_t balancing;
	uint32_t flags;
	uint32_t first_backend, backends; /* range in ps_config.backend: healthy, weight > 0 */
	uint32_t down;			  /* so many behind that range have failed their health check */
	uint32_t lookup, lookup_size;	  /* Maglev: range in ps_config.lookup, values are offsets in the range above */
	uint16_t number;		  /* index into the arena's listeners */
	uint16_t spare0;
	/* limits; 0 = none */
	uint32_t max_flows, max_flows_per_client;
	uint32_t new_flows_per_second;
	uint32_t spare1;
};

struct ps_config_backend {
	uint8_t address[16];
	uint16_t port;
	uint16_t id; /* index into the arena's backends */
	uint32_t weight;
};

struct ps_config_snat {
	uint8_t address[16];
	uint16_t id;	 /* index into the arena's addresses */
	uint16_t family; /* 4 or 6 */
	uint32_t spare;
};

struct ps_config {
	uint64_t generation;
	uint64_t key0, key1;
	uint32_t mask; /* buckets - 1 */
	uint32_t listeners, backends, snats;
	uint32_t unknown_flow_reset; /* 1: answer TCP without state by a reset */
	uint32_t mtu;		     /* path MTU behind the engines: MSS is clamped to it; 0 = leave */
	uint32_t kept_reset;	     /* 1: connections that a keeper has left end, TCP by a reset to each side */
	uint32_t spare0;
	uint32_t timeout[16]; /* ticks, by ps_flow_state */
	struct ps_listener listener[256];
	struct ps_config_snat snat[1024];
	struct ps_config_backend backend[4096];
	uint16_t lookup[1048576];
};

/*
 * The writer fills buffer (generation & 1), then stores `generation` (release). It must not begin
 * generation g + 1 before every running core has published config_seen >= g.
 */
struct ps_config_file {
	uint32_t magic, layout;
	uint64_t generation; /* 0 = none yet */
	uint64_t spare[6];
	struct ps_config buffer[2];
};

/*
 * ---- the datapath's socket to the agent (SOCK_SEQPACKET, path based) ------------------------------
 *
 *   a new process:                          HELLO (generation 0) -> ATTACH -> PREPARED -> GO -> READY
 *   one that serves, to a restarted agent:  HELLO (its generation, with its descriptors)
 *   one that has a successor:               STOP -> STOPPED
 *
 * PREPARED: everything is mapped, nothing is touched yet. A successor waits there until the process that
 * serves has stopped or died, so the pause of a change is that between STOP and GO.
 */

enum ps_message_kind {
	PS_MSG_HELLO =
		1, /* datapath -> agent: layout, shard, pid, generation; descriptors as in ATTACH from the UMEM on */
	PS_MSG_ATTACH = 2,  /* agent -> datapath, with descriptors: arena and its map, engine file and its map,
				   configuration; UMEM, one AF_XDP socket a queue, for each core a socket that
				   wakes it, for each core its end of that */
	PS_MSG_REFUSED = 3, /* agent -> datapath: text says why */
	PS_MSG_READY = 4,   /* datapath -> agent: it serves its queues */
	PS_MSG_PREPARED = 5,
	PS_MSG_GO = 6,		 /* agent -> datapath: whoever served before is gone; take over and serve */
	PS_MSG_STOP = 7,	 /* agent -> datapath: finish the batches at hand and serve no more */
	PS_MSG_STOPPED = 8,	 /* datapath -> agent: nothing here touches the rings any more */
	PS_MSG_LOOK = 9,	 /* supervisor -> agent: what may I read? */
	PS_MSG_VIEW = 10,	 /* agent -> supervisor, with descriptors: engine file, to read, and its map */
	PS_MSG_CONNECTIONS = 11, /* agent -> datapath, with the descriptor of a connection list and its numbers: packets
				   are mirrored. Without: they are not any more. Also before GO */
	PS_MSG_CONNECTED = 12,	 /* datapath -> agent: it uses that list from now on, or none; text: why it cannot */
};

struct ps_message {
	uint32_t kind, layout;
	uint32_t pid;
	uint32_t slot, queues, cores;
	uint32_t generation;
	uint32_t spare;
	uint32_t buckets, entries, index_slots, clients; /* CONNECTIONS: of the list */
	int32_t pin[32];				 /* CPU per core, -1 = not pinned */
	char text[96];
	struct ps_shard_form shard; /* HELLO: of the shards that this build serves */
};

#ifndef PS_CDEF

/* ---- the flow-table word: epoch 32 | slot 10 | queue 6 | previous slot 10 | previous queue 6 ------- */

static inline uint64_t ps_word(uint32_t epoch, uint32_t slot, uint32_t queue, uint32_t prev_slot, uint32_t prev_queue)
{
	return (uint64_t)epoch << 32 | (uint64_t)(slot & 1023) << 22 | (queue & 63) << 16 | (prev_slot & 1023) << 6 |
	       (prev_queue & 63);
}

static inline uint32_t ps_word_epoch(uint64_t word) { return (uint32_t)(word >> 32); }
static inline uint32_t ps_word_slot(uint64_t word) { return (uint32_t)(word >> 22) & 1023; }
static inline uint32_t ps_word_queue(uint64_t word) { return (uint32_t)(word >> 16) & 63; }
static inline uint32_t ps_word_prev_slot(uint64_t word) { return (uint32_t)(word >> 6) & 1023; }
static inline uint32_t ps_word_prev_queue(uint64_t word) { return (uint32_t)word & 63; }

/* Address and port as loaded from the wire. Never 0, for no protocol is. */
static inline uint64_t ps_direct_key(uint32_t address, uint16_t port, uint8_t protocol)
{
	return (uint64_t)address | (uint64_t)port << 32 | (uint64_t)protocol << 48;
}

/* Its place among the PS_DIRECT_SLOTS: the upper bits of a product (Knuth's multiplicative hashing). */
static inline uint32_t ps_direct_slot(uint64_t key) { return (uint32_t)(key * 0x9e3779b97f4a7c15ull >> 54); }

/* Where the bit of a known flow is, in either half: this word, at hash & 63. hash: upper half of the flow's */
static inline uint32_t ps_known_word(uint32_t hash) { return hash >> 6 & (PS_KNOWN_WORDS - 1); }

/* One word of an IPv6 address, for ps_own_bit; an IPv4 address is one. */
static inline uint32_t ps_own_mix(const uint32_t address[4])
{
	return address[0] ^ address[1] * 3 ^ address[2] * 5 ^ address[3] * 7;
}

/* The bit of an address in ps_own_filter. */
static inline uint32_t ps_own_bit(uint32_t mixed) { return mixed * 0x9e3779b1u >> 17; }

/* The owner in a shard header that belongs to a flow-table word: its upper 48 bits. */
static inline uint64_t ps_owner(uint64_t word) { return word & ~(uint64_t)0xffff; }

/* Serial comparison: is epoch a newer than b? */
static inline int ps_epoch_newer(uint32_t a, uint32_t b) { return (int32_t)(a - b) > 0; }

/*
 * The stamp on a VF travels in the source MAC: 02 | bucket 13 | queue 6 | previous queue 6 | low 12
 * bits of the epoch | reply, mirror, icmp flag. The hash is computed again by the engine.
 */
static inline void ps_stamp_to_mac(const struct ps_stamp *s, uint8_t mac[6])
{
	uint64_t bits = (uint64_t)(s->bucket & 8191) << 27 | (uint64_t)(s->queue & 63) << 21 |
			(uint64_t)(s->prev_queue & 63) << 15 | (uint64_t)(s->epoch & 4095) << 3 |
			(s->flags & PS_STAMP_REPLY ? 1 : 0) | (s->flags & PS_STAMP_MIRROR ? 2 : 0) |
			(s->flags & PS_STAMP_ICMP ? 4 : 0);

	mac[0] = 2;
	mac[1] = bits >> 32;
	mac[2] = bits >> 24;
	mac[3] = bits >> 16;
	mac[4] = bits >> 8;
	mac[5] = bits;
}

static inline void ps_stamp_from_mac(const uint8_t mac[6], struct ps_stamp *s)
{
	uint64_t bits = (uint64_t)mac[1] << 32 | (uint64_t)mac[2] << 24 | mac[3] << 16 | mac[4] << 8 | mac[5];

	s->magic = PS_STAMP_MAGIC;
	s->bucket = bits >> 27 & 8191;
	s->queue = bits >> 21 & 63;
	s->prev_queue = bits >> 15 & 63;
	s->epoch = bits >> 3 & 4095;
	s->flags = (bits & 1 ? PS_STAMP_REPLY : 0) | (bits & 2 ? PS_STAMP_MIRROR : 0) | (bits & 4 ? PS_STAMP_ICMP : 0);
	s->hash = 0;
}

#endif /* PS_CDEF */
#endif
