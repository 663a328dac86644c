/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An engine's queues: UMEM, rings and AF_XDP sockets, made by the agent in the engine's network
 * namespace. The agent's descriptors keep them alive whatever happens to the process that serves them.
 *
 * All queues share one receive queue of the device, one UMEM, one fill and one completion ring. There
 * are more frames than all receive and transmit rings can hold, so one stuck queue cannot starve others.
 */
#include <bpf/bpf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_xdp.h>
#include <net/if.h>
#include <arpa/inet.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "native.h"
#include "packetstack/census.h"
#include "packetstack/shard.h"

#define LOAD(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)

#ifndef SOL_XDP
#define SOL_XDP 283
#endif

struct netns_call {
	int netns, result;
	int (*work)(void *);
	void *argument;
	struct ps_error *e;
};

static void *netns_thread(void *argument)
{
	struct netns_call *c = argument;

	if (c->netns >= 0 && setns(c->netns, CLONE_NEWNET))
		c->result = ps_fail(c->e, "cannot enter the engine's network namespace: %s", strerror(errno));
	else
		c->result = c->work(c->argument);
	return NULL;
}

int ps_in_netns(int netns, int (*work)(void *), void *argument, struct ps_error *e)
{
	struct netns_call c = { netns, -1, work, argument, e };
	pthread_t thread;

	if (netns < 0)
		return work(argument);
	if (pthread_create(&thread, NULL, netns_thread, &c))
		return ps_fail(e, "cannot start a thread: %s", strerror(errno));
	pthread_join(thread, NULL);
	return c.result;
}

/* ---- packet sockets for markers ---------------------------------------------------------------------- */

struct packet_call {
	uint32_t ifindex;
	const char *ifname;
	struct ps_error *e;
};

static int packet_socket(void *argument)
{
	struct packet_call *c = argument;
	struct sockaddr_ll address = { .sll_family = AF_PACKET };
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0); /* protocol 0: sends only */
	int one = 1;

	address.sll_ifindex = c->ifname ? (int)if_nametoindex(c->ifname) : (int)c->ifindex;
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address))) {
		ps_fail(c->e, "interface %u: cannot open a packet socket: %s", (unsigned int)address.sll_ifindex,
			strerror(errno));
		if (fd >= 0)
			close(fd);
		return -1;
	}
	/* A qdisc could hold a marker back while frames pass: send past it. */
	setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one));
	return fd;
}

int ps_packet_socket(int netns, uint32_t ifindex, struct ps_error *e)
{
	struct packet_call c = { ifindex, NULL, e };

	return ps_in_netns(netns, packet_socket, &c, e);
}

/* ---- AF_XDP ------------------------------------------------------------------------------------------ */

struct create_call {
	const char *ifname;
	int xskmap;
	const struct ps_queue_options *o;
	struct ps_queue_fds *fds;
	struct ps_engine *engine;
	struct ps_error *e;
};

static uint32_t power_of_two(uint32_t n)
{
	uint32_t p = 1;

	while (p < n)
		p *= 2;
	return p;
}

static int bind_socket(int fd, const struct sockaddr_xdp *address)
{
	/* An earlier socket on this queue may still be going away in the kernel: 30 to 40 ms. */
	for (int i = 0; i < 50; i++) {
		struct timespec pause = { 0, 10000000 };

		if (!bind(fd, (const struct sockaddr *)address, sizeof(*address)))
			return 0;
		if (errno != EBUSY)
			return -1;
		nanosleep(&pause, NULL);
	}
	return -1;
}

static int create_sockets(void *argument)
{
	struct create_call *c = argument;
	struct ps_engine *n = c->engine;
	struct ps_error *e = c->e;
	struct xdp_umem_reg umem = { .chunk_size = PS_FRAME_BYTES };
	struct sockaddr_xdp address = { .sxdp_family = AF_XDP };
	struct xdp_mmap_offsets offsets;
	socklen_t length = sizeof(offsets);
	uint64_t bytes = (uint64_t)n->frames * PS_FRAME_BYTES, *slots;
	struct packet_call packet = { 0, c->ifname, e };
	uint32_t *producer;
	int buffer = 64 << 20;
	uint8_t *at;

	address.sxdp_ifindex = if_nametoindex(c->ifname);
	if (!address.sxdp_ifindex)
		return ps_fail(e, "interface %s: not found in the engine's network namespace", c->ifname);
	at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, c->fds->umem, 0);
	if (at == MAP_FAILED)
		return ps_fail(e, "engine %u: no memory for %u frames (%lu MiB)", n->slot, n->frames, bytes >> 20);
	umem.addr = (uint64_t)(uintptr_t)at;
	umem.len = bytes;
	for (uint32_t i = 0; i < n->queues; i++) {
		int fd = c->fds->sockets[i] = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
		uint32_t key = i;

		if (fd < 0)
			return ps_fail(e, "engine %u: cannot open an AF_XDP socket: %s", n->slot, strerror(errno));
		if (!i && (setsockopt(fd, SOL_XDP, XDP_UMEM_REG, &umem, sizeof(umem)) ||
			   setsockopt(fd, SOL_XDP, XDP_UMEM_FILL_RING, &n->fill_slots, 4) ||
			   setsockopt(fd, SOL_XDP, XDP_UMEM_COMPLETION_RING, &n->completion_slots, 4)))
			return ps_fail(e, "engine %u: cannot register %u frames: %s", n->slot, n->frames,
				       strerror(errno));
		if (setsockopt(fd, SOL_XDP, XDP_RX_RING, &n->rx_slots, 4) ||
		    setsockopt(fd, SOL_XDP, XDP_TX_RING, &n->tx_slots, 4))
			return ps_fail(e, "engine %u: cannot make the rings of queue %u: %s", n->slot, i,
				       strerror(errno));
		setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof(buffer));
		address.sxdp_flags = i ? XDP_SHARED_UMEM : XDP_COPY;
		address.sxdp_shared_umem_fd = (uint32_t)c->fds->sockets[0];
		if (bind_socket(fd, &address))
			return ps_fail(e, "interface %s: cannot bind queue %u: %s", c->ifname, i, strerror(errno));
		if (bpf_map_update_elem(c->xskmap, &key, &fd, BPF_ANY))
			return ps_fail(e, "interface %s: cannot direct packets to queue %u: %s", c->ifname, i,
				       strerror(errno));
	}
	munmap(at, bytes); /* the kernel has pinned the pages; the memfd keeps them */

	/* All frames begin in the fill ring. */
	if (getsockopt(c->fds->sockets[0], SOL_XDP, XDP_MMAP_OFFSETS, &offsets, &length))
		return ps_fail(e, "engine %u: cannot map its fill ring: %s", n->slot, strerror(errno));
	bytes = offsets.fr.desc + n->fill_slots * 8ull;
	at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, c->fds->sockets[0],
		  XDP_UMEM_PGOFF_FILL_RING);
	if (at == MAP_FAILED)
		return ps_fail(e, "engine %u: cannot map its fill ring: %s", n->slot, strerror(errno));
	producer = (uint32_t *)(at + offsets.fr.producer);
	slots = (uint64_t *)(at + offsets.fr.desc);
	for (uint32_t i = 0; i < n->frames; i++)
		slots[i] = (uint64_t)i * PS_FRAME_BYTES;
	__atomic_store_n(producer, n->frames, __ATOMIC_RELEASE);
	munmap(at, bytes);

	c->fds->egress = packet_socket(&packet);
	return c->fds->egress < 0 ? -1 : 0;
}

void ps_queues_close(struct ps_queue_fds *fds)
{
	int *all = (int *)fds; /* it has nothing else */

	for (size_t i = 0; i < sizeof(*fds) / sizeof(int); i++) {
		if (all[i] >= 0)
			close(all[i]);
		all[i] = -1;
	}
}

static int is_ring_size(uint32_t n) { return n >= 64 && n <= 65536 && !(n & (n - 1)); }

/* ---- descriptors that are known again ----------------------------------------------------------------- */

static uint64_t cookie_of(int socket)
{
	uint64_t cookie = 0;
	socklen_t length = sizeof(cookie);

	return getsockopt(socket, SOL_SOCKET, SO_COOKIE, &cookie, &length) ? 0 : cookie;
}

static uint64_t inode_of(int fd)
{
	struct stat st;

	return fstat(fd, &st) ? 0 : st.st_ino;
}

/* No two sockets of a machine ever have the same cookie; a memfd's inode is its own while it is there. */
static void remember(struct ps_engine *n, const struct ps_queue_fds *fds)
{
	n->umem_inode = inode_of(fds->umem);
	for (uint32_t i = 0; i < n->queues; i++)
		n->socket_cookie[i] = cookie_of(fds->sockets[i]);
	for (uint32_t i = 0; i < n->cores; i++) {
		n->wake_cookie[i] = cookie_of(fds->wake[i]);
		n->woken_cookie[i] = cookie_of(fds->woken[i]);
	}
}

/* The engine could map another file with an inode of this number, but none that is sealed and of this size. */
static int is_umem(const struct ps_engine *n, int fd)
{
	struct stat st;

	return !fstat(fd, &st) && st.st_ino == n->umem_inode && st.st_size == (off_t)n->frames * PS_FRAME_BYTES &&
	       (fcntl(fd, F_GET_SEALS) & (F_SEAL_SHRINK | F_SEAL_GROW)) == (F_SEAL_SHRINK | F_SEAL_GROW);
}

int ps_queues_known(const struct ps_engine *n, const int *fds, int count, struct ps_error *e)
{
	const struct {
		const char *name;
		const uint64_t *cookies;
		uint32_t number;
	} kinds[] = {
		{ "socket of queue", n->socket_cookie, n->queues },
		{ "socket that wakes core", n->wake_cookie, n->cores },
		{ "socket on which waits core", n->woken_cookie, n->cores },
	};

	if (count != 1 + (int)(n->queues + 2 * n->cores))
		return ps_fail(e, "it has %d descriptors instead of %u", count, 1 + n->queues + 2 * n->cores);
	if (!is_umem(n, *fds++))
		return ps_fail(e, "its first descriptor is not the frames' memory");
	for (int k = 0; k < 3; k++)
		for (uint32_t i = 0; i < kinds[k].number; i++, fds++)
			if (!kinds[k].cookies[i] || cookie_of(*fds) != kinds[k].cookies[i])
				return ps_fail(e, "it has another descriptor than the %s %u", kinds[k].name, i);
	return 0;
}

/* ---- an engine's memory and sockets -------------------------------------------------------------------- */

int ps_queues_create(const char *path, const char *pin, int netns, const char *ifname, int xskmap,
		     const struct ps_queue_options *o, struct ps_queue_fds *out, struct ps_error *e)
{
	struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	struct ps_engine layout = { .layout = PS_LAYOUT_VERSION }, *n;
	struct create_call c = { ifname, xskmap, o, out, NULL, e };

	memset(out, 0xff, sizeof(*out));
	if (o->queues < 1 || o->queues > PS_MAX_QUEUES || o->cores < 1 || o->cores > PS_MAX_CORES || o->slot < 1 ||
	    o->slot >= PS_MAX_SLOTS)
		return ps_fail(e, "engine %u: %u queues on %u cores is not possible; at most %d queues, %d cores",
			       o->slot, o->queues, o->cores, PS_MAX_QUEUES, PS_MAX_CORES);
	if (!is_ring_size(o->rx_slots) || !is_ring_size(o->tx_slots))
		return ps_fail(e, "engine %u: rings of %u and %u slots; use powers of two from 64 to 65536", o->slot,
			       o->rx_slots, o->tx_slots);
	layout.slot = o->slot;
	layout.token = o->token;
	layout.queues = o->queues;
	layout.cores = o->cores;
	layout.rx_slots = o->rx_slots;
	layout.tx_slots = o->tx_slots;
	layout.frames = o->queues * (o->rx_slots + o->tx_slots) + o->spare_frames;
	layout.fill_slots = power_of_two(layout.frames);
	layout.completion_slots = power_of_two(o->queues * o->tx_slots);
	layout.park_slots =
		power_of_two(layout.frames / 2 / o->queues + 1) / 2; /* all queues together: half the frames */
	layout.free_slots = power_of_two(layout.frames);
	layout.mtu = o->mtu;
	layout.spin_us = o->spin_us;
	memcpy(layout.mac, o->mac, 8);
	memcpy(layout.gateway_mac, o->gateway_mac, 8);
	ps_engine_places(&layout);
	n = ps_parts_create(path, pin, PS_ENGINE_FILE_BYTES, layout.bytes, e);
	if (!n)
		return -1;
	memcpy(n, &layout, PS_ENGINE_FILE_BYTES);
	for (uint32_t i = 0; i < o->queues; i++) {
		struct ps_queue *q = (struct ps_queue *)((uint8_t *)n + n->queues_offset + i * n->queue_stride);

		for (int p = 0; p < 2; p++)
			q->journal.progress[p].begin = ~0u; /* 0 would be a torn rewrite of the first frame */
		n->want[i] = i % o->cores + 1;
	}
	c.engine = n;
	setrlimit(RLIMIT_MEMLOCK, &unlimited);
	out->engine = open(path, O_RDONLY | O_CLOEXEC);
	out->map = ps_map_open(pin, 0, e);
	if (out->engine < 0 || out->map < 0) {
		ps_fail(e, "engine %u: cannot open its memory again: %s", o->slot, strerror(errno));
		goto failed;
	}
	out->umem = memfd_create("packetstack-umem", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (out->umem < 0 || ftruncate(out->umem, (off_t)layout.frames * PS_FRAME_BYTES) ||
	    fcntl(out->umem, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) {
		ps_fail(e, "engine %u: no memory for %u frames: %s", o->slot, layout.frames, strerror(errno));
		goto failed;
	}
	for (uint32_t i = 0; i < o->cores; i++) {
		int pair[2];

		if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair)) {
			ps_fail(e, "engine %u: cannot make a socket pair: %s", o->slot, strerror(errno));
			goto failed;
		}
		out->wake[i] = pair[0];
		out->woken[i] = pair[1];
	}
	if (ps_in_netns(netns, create_sockets, &c, e))
		goto failed;
	remember(n, out);
	__atomic_store_n(&n->magic, PS_ENGINE_MAGIC, __ATOMIC_RELEASE);
	munmap(n, layout.bytes);
	return 0;
failed:
	munmap(n, layout.bytes);
	unlink(path);
	unlink(pin);
	ps_queues_close(out);
	return -1;
}

int ps_queue_statistics(int socket, uint64_t *out, struct ps_error *e)
{
	struct xdp_statistics s = { 0 };
	socklen_t length = sizeof(s);

	if (getsockopt(socket, SOL_XDP, XDP_STATISTICS, &s, &length))
		return ps_fail(e, "cannot read the statistics of an AF_XDP socket: %s", strerror(errno));
	out[0] = s.rx_dropped;
	out[1] = s.rx_ring_full;
	out[2] = s.rx_fill_ring_empty_descs;
	out[3] = s.rx_invalid_descs;
	out[4] = s.tx_invalid_descs;
	out[5] = s.tx_ring_empty_descs;
	return 0;
}

/* ---- what became of the frames ------------------------------------------------------------------------ */

struct census_ring {
	uint8_t *at;
	size_t bytes;
	const uint32_t *producer, *consumer;
	const void *slots;
};

static int census_map(struct census_ring *r, int socket, const struct xdp_ring_offset *o, uint32_t slots,
		      uint32_t stride, off_t page)
{
	r->bytes = o->desc + (size_t)slots * stride;
	r->at = mmap(NULL, r->bytes, PROT_READ, MAP_SHARED, socket, page);
	if (r->at == MAP_FAILED)
		return -1;
	r->producer = (const uint32_t *)(r->at + o->producer);
	r->consumer = (const uint32_t *)(r->at + o->consumer);
	r->slots = r->at + o->desc;
	return 0;
}

/* One kernel ring: mapped, counted, unmapped. */
static int census_kernel(uint8_t *times, uint32_t frames, int socket, const struct xdp_ring_offset *o, uint32_t slots,
			 uint32_t stride, off_t page, struct ps_census *out)
{
	struct census_ring r;
	uint32_t consumer;

	if (census_map(&r, socket, o, slots, stride, page))
		return -1;
	consumer = __atomic_load_n(r.consumer, __ATOMIC_ACQUIRE);
	ps_census_ring(times, frames, r.slots, slots - 1, stride, consumer,
		       __atomic_load_n(r.producer, __ATOMIC_ACQUIRE), out);
	munmap(r.at, r.bytes);
	return 0;
}

int ps_queues_census(struct ps_engine *n, const struct ps_queue_fds *fds, struct ps_census *out, struct ps_error *e)
{
	struct xdp_mmap_offsets o;
	socklen_t length = sizeof(o);
	uint8_t *times = calloc(1, n->frames);
	int failed;

	memset(out, 0, sizeof(*out));
	failed = !times || getsockopt(fds->sockets[0], SOL_XDP, XDP_MMAP_OFFSETS, &o, &length) ||
		 census_kernel(times, n->frames, fds->sockets[0], &o.fr, n->fill_slots, 8, XDP_UMEM_PGOFF_FILL_RING,
			       out);
	for (uint32_t i = 0; i < n->queues && !failed; i++) {
		const struct ps_queue *q =
			(const struct ps_queue *)((uint8_t *)n + n->queues_offset + i * n->queue_stride);
		const struct ps_descriptor *park = (const struct ps_descriptor *)(q + 1);

		failed = census_kernel(times, n->frames, fds->sockets[i], &o.rx, n->rx_slots, sizeof(struct xdp_desc),
				       XDP_PGOFF_RX_RING, out) ||
			 census_kernel(times, n->frames, fds->sockets[i], &o.tx, n->tx_slots, sizeof(struct xdp_desc),
				       XDP_PGOFF_TX_RING, out);
		ps_census_ring(times, n->frames, park, n->park_slots - 1, sizeof(*park), LOAD(&q->park.consumer),
			       LOAD(&q->park.producer), out);
		ps_census_ring(times, n->frames, park + n->park_slots, n->free_slots - 1, 8, LOAD(&q->free.consumer),
			       LOAD(&q->free.producer), out);
	}
	failed = failed || census_kernel(times, n->frames, fds->sockets[0], &o.cr, n->completion_slots, 8,
					 XDP_UMEM_PGOFF_COMPLETION_RING, out);
	if (!failed)
		ps_census_sum(times, n->frames, out);
	free(times);
	return failed ? ps_fail(e, "engine %u: cannot map its rings: %s", n->slot, strerror(errno)) : 0;
}

int ps_arena_check(struct ps_arena *a, uint32_t bucket, struct ps_error *e)
{
	struct ps_shard_form form = ps_arena_form(a), own = ps_own_form();
	const char *wrong = memcmp(&form, &own, sizeof(own)) ? "its shard has another build's form"
							     : ps_shard_check(a, ps_shard_at(a, bucket));

	return wrong ? ps_fail(e, "bucket %u: %s", bucket, wrong) : 0;
}
