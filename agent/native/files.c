/* SPDX-License-Identifier: Apache-2.0 */
/* The files that outlive processes: arena, configuration, engine. Layouts: packetstack/abi.h. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "native.h"
#include "packetstack/shard.h"

int ps_fail(struct ps_error *e, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	if (e)
		vsnprintf(e->text, sizeof(e->text), format, arguments);
	va_end(arguments);
	return -1;
}

void *ps_file_create(const char *path, uint64_t bytes, int *keep, struct ps_error *e)
{
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	void *at;

	if (fd < 0) {
		ps_fail(e, "%s: cannot create: %s", path, strerror(errno));
		return NULL;
	}
	/* All of it now: a file system that is full later would end whoever touches a new page by SIGBUS. */
	errno = posix_fallocate(fd, 0, (off_t)bytes);
	if (errno || (at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED) {
		ps_fail(e, "%s: cannot take %lu MiB for it: %s", path, (unsigned long)(bytes + (1 << 20) - 1) >> 20,
			strerror(errno));
		unlink(path);
		close(fd);
		return NULL;
	}
	if (keep)
		*keep = fd;
	else
		close(fd);
	return at;
}

static void *file_open(const char *path, int read_only, uint32_t magic, const char *what, struct ps_error *e)
{
	int fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	struct stat st;
	uint32_t *at;

	if (fd < 0 || fstat(fd, &st) || st.st_size < 4096) {
		ps_fail(e, "%s: cannot open this %s: %s", path, what, fd < 0 ? strerror(errno) : "it is too short");
		if (fd >= 0)
			close(fd);
		return NULL;
	}
	at = mmap(NULL, (size_t)st.st_size, read_only ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (at == MAP_FAILED) {
		ps_fail(e, "%s: cannot map: %s", path, strerror(errno));
		return NULL;
	}
	if (at[0] != magic || at[1] != PS_LAYOUT_VERSION) {
		ps_fail(e, "LayoutMismatch: %s: has memory layout %u, and this build reads %d (magic %08x, %08x)", path,
			at[1], PS_LAYOUT_VERSION, at[0], magic);
		munmap(at, (size_t)st.st_size);
		return NULL;
	}
	return at;
}

struct ps_arena *ps_arena_create(const char *path, uint32_t buckets, uint64_t max_flows, struct ps_error *e)
{
	uint64_t mean = (max_flows + buckets - 1) / buckets, entries, index, stride, offset, bytes;
	uint64_t clients;
	struct ps_arena *a;

	if (buckets < PS_MIN_BUCKETS || buckets > PS_MAX_BUCKETS || buckets & (buckets - 1)) {
		ps_fail(e, "buckets: %u is not possible; use a power of two from %d to %d", buckets, PS_MIN_BUCKETS,
			PS_MAX_BUCKETS);
		return NULL;
	}
	/* Flows fall into buckets at random: mean + 5 standard deviations, so that no bucket refuses early. */
	for (entries = 1; entries * entries < mean; entries++)
		;
	entries = mean + 5 * entries;
	if (entries < 16)
		entries = 16;
	if (entries > 32000) {
		ps_fail(e, "maxFlows: %lu in %u buckets is more than a shard can hold; use more buckets or at most %lu",
			(unsigned long)max_flows, buckets, 30000ul * buckets);
		return NULL;
	}
	for (index = 16; index < entries + entries / 4; index *= 2)
		;
	stride = ps_shard_bytes((uint32_t)entries, (uint32_t)index);
	offset = (sizeof(*a) + 4095) & ~4095ull;
	for (clients = 1024; clients < max_flows / 16; clients *= 2)
		;
	bytes = (offset + stride * buckets + clients * sizeof(ps_client_count) + 4095) & ~4095ull;
	a = ps_file_create(path, bytes, NULL, e);
	if (!a)
		return NULL;
	a->layout = PS_LAYOUT_VERSION;
	a->buckets = buckets;
	a->entries = (uint32_t)entries;
	a->index_slots = (uint32_t)index;
	a->bytes = bytes;
	a->shards_offset = offset;
	a->shard_stride = stride;
	a->clients = (uint32_t)clients;
	a->clients_offset = offset + stride * buckets;
	if (getrandom(a->clients_key, sizeof(a->clients_key), 0) != sizeof(a->clients_key)) {
		ps_fail(e, "%s: no random numbers: %s", path, strerror(errno));
		munmap(a, bytes);
		unlink(path);
		return NULL;
	}
	a->next_fence = 1;
	__atomic_store_n(&a->magic, PS_ARENA_MAGIC, __ATOMIC_RELEASE);
	return a;
}

struct ps_arena *ps_arena_open(const char *path, int read_only, struct ps_error *e)
{
	return file_open(path, read_only, PS_ARENA_MAGIC, "arena", e);
}

struct ps_config_file *ps_config_create(const char *path, struct ps_error *e)
{
	struct ps_config_file *c = ps_file_create(path, sizeof(*c), NULL, e);

	if (c) {
		c->layout = PS_LAYOUT_VERSION;
		__atomic_store_n(&c->magic, PS_CONFIG_MAGIC, __ATOMIC_RELEASE);
	}
	return c;
}

struct ps_config_file *ps_config_open(const char *path, int read_only, struct ps_error *e)
{
	return file_open(path, read_only, PS_CONFIG_MAGIC, "configuration", e);
}

struct ps_engine *ps_engine_open(const char *path, int read_only, struct ps_error *e)
{
	return file_open(path, read_only, PS_ENGINE_MAGIC, "engine file", e);
}

void ps_unmap(void *map)
{
	uint32_t *magic = map;

	if (!map)
		return;
	if (*magic == PS_ARENA_MAGIC)
		munmap(map, ((struct ps_arena *)map)->bytes);
	else if (*magic == PS_CONFIG_MAGIC)
		munmap(map, sizeof(struct ps_config_file));
	else if (*magic == PS_ENGINE_MAGIC)
		munmap(map, ((struct ps_engine *)map)->bytes);
}

/*
 * Takes marks of numbers that flows name out of the arrays of bytes by number. Exact: a number that the
 * configuration of no core names can come into no new flow.
 */
static void keep_named(struct ps_arena *a, uint8_t *free_backend, uint8_t *free_listener, uint8_t *free_address)
{
	for (uint32_t b = 0; b < a->buckets; b++) {
		struct ps_shard *s = ps_shard_at(a, b);
		const struct ps_entry *flows = ps_shard_flows(a, s);

		for (uint32_t i = 0; i < s->high && i < a->entries; i++) {
			if (flows[i].state == PS_FLOW_FREE)
				continue;
			free_backend[flows[i].backend & (PS_MAX_BACKENDS - 1)] = 0;
			free_listener[flows[i].listener & (PS_MAX_NUMBERS - 1)] = 0;
			free_address[flows[i].snat & (PS_MAX_ADDRESSES - 1)] = 0;
		}
	}
}

int ps_arena_address(struct ps_arena *a, const struct ps_config_file *config, const uint8_t *address)
{
	static uint8_t backends[PS_MAX_BACKENDS], listeners[PS_MAX_NUMBERS], unused[PS_MAX_ADDRESSES];

	for (uint32_t i = 0; i < a->addresses && i < PS_MAX_ADDRESSES; i++)
		if (!memcmp(a->address[i].bytes, address, 16))
			return (int)i;
	if (a->addresses < PS_MAX_ADDRESSES) {
		memcpy(a->address[a->addresses].bytes, address, 16);
		return (int)__atomic_fetch_add(&a->addresses, 1, __ATOMIC_RELEASE);
	}
	memset(unused, 1, sizeof(unused));
	/* Whatever stands in a buffer is kept, be it of an older configuration. */
	for (int b = 0; b < 2; b++)
		for (uint32_t i = 0; i < PS_MAX_SNAT; i++)
			unused[config->buffer[b].snat[i].id & (PS_MAX_ADDRESSES - 1)] = 0;
	keep_named(a, backends, listeners, unused);
	for (int i = 0; i < PS_MAX_ADDRESSES; i++)
		if (unused[i]) {
			memcpy(a->address[i].bytes, address, 16);
			return i;
		}
	return -1;
}

int ps_arena_backend(struct ps_arena *a, const uint8_t *address, uint16_t port)
{
	static uint8_t unused[PS_MAX_BACKENDS], listeners[PS_MAX_NUMBERS], addresses[PS_MAX_ADDRESSES];
	int found = -1;

	for (uint32_t i = 0; i < a->backends && i < PS_MAX_BACKENDS; i++)
		if (a->backend[i].port == port && !memcmp(a->backend[i].address, address, 16)) {
			a->backend[i].used = 1; /* from now on it may come into flows */
			return (int)i;
		}
	if (a->backends < PS_MAX_BACKENDS) {
		found = (int)a->backends;
	} else {
		for (int i = 0; i < PS_MAX_BACKENDS; i++)
			unused[i] = !a->backend[i].used;
		keep_named(a, unused, listeners, addresses);
		for (int i = 0; i < PS_MAX_BACKENDS && found < 0; i++)
			if (unused[i])
				found = i;
		if (found < 0)
			return -1;
	}
	a->backend[found] = (struct ps_backend){ .port = port, .used = 1 };
	memcpy(a->backend[found].address, address, 16);
	if ((uint32_t)found == a->backends)
		__atomic_fetch_add(&a->backends, 1, __ATOMIC_RELEASE);
	return found;
}

int ps_arena_listener(struct ps_arena *a, const uint8_t *address, uint16_t port, uint8_t protocol)
{
	static uint8_t backends[PS_MAX_BACKENDS], unused[PS_MAX_NUMBERS], addresses[PS_MAX_ADDRESSES];
	uint32_t in_class[PS_CLASSES] = { 0 };
	int found = -1;

	for (int i = 0; i < PS_MAX_NUMBERS; i++) {
		struct ps_listener_state *l = &a->listener[i];

		if (l->protocol == protocol && l->port == port && !memcmp(l->address, address, 16)) {
			l->used = 1;
			return i;
		}
		unused[i] = !l->used;
		in_class[i % PS_CLASSES] += l->used;
	}
	keep_named(a, backends, unused, addresses);
	/* Of the class with fewest listeners: those of one class share what a shard sets apart for it. */
	for (int i = 0; i < PS_MAX_NUMBERS; i++)
		if (unused[i] && (found < 0 || in_class[i % PS_CLASSES] < in_class[found % PS_CLASSES]))
			found = i;
	if (found < 0)
		return -1;
	a->listener[found] = (struct ps_listener_state){ .port = port, .protocol = protocol, .used = 1 };
	memcpy(a->listener[found].address, address, 16);
	return found;
}

void ps_arena_used(struct ps_arena *a, const struct ps_config *c)
{
	static uint8_t backends[PS_MAX_BACKENDS], listeners[PS_MAX_NUMBERS];

	memset(backends, 0, sizeof(backends));
	memset(listeners, 0, sizeof(listeners));
	for (uint32_t i = 0; i < c->backends && i < PS_MAX_BACKENDS; i++)
		backends[c->backend[i].id & (PS_MAX_BACKENDS - 1)] = 1;
	for (uint32_t i = 0; i < c->listeners && i < PS_MAX_LISTENERS; i++)
		listeners[c->listener[i].number & (PS_MAX_NUMBERS - 1)] = 1;
	for (int i = 0; i < PS_MAX_BACKENDS; i++)
		a->backend[i].used = backends[i];
	for (int i = 0; i < PS_MAX_NUMBERS; i++)
		a->listener[i].used = listeners[i];
}

struct ps_shard *ps_arena_shard(struct ps_arena *a, uint32_t bucket)
{
	return bucket < a->buckets ? ps_shard_at(a, bucket) : NULL;
}

int ps_arena_flows(struct ps_arena *a, uint32_t bucket, struct ps_flow *out, int max)
{
	struct ps_shard *s = ps_shard_at(a, bucket);
	struct ps_entry *flows = ps_shard_flows(a, s);
	int n = 0;

	for (uint32_t i = 0; i < s->high && i < a->entries && n < max; i++) {
		uint16_t version = __atomic_load_n(&flows[i].version, __ATOMIC_ACQUIRE);
		struct ps_entry f = flows[i];
		const struct ps_listener_state *l = ps_listener_of(a, &f);
		const struct ps_backend *b = ps_backend_of(a, &f);

		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (version & 1 || version != __atomic_load_n(&flows[i].version, __ATOMIC_RELAXED) ||
		    f.state == PS_FLOW_FREE)
			continue;
		out[n] = (struct ps_flow){
			.client_port = f.client_port,
			.vip_port = l->port,
			.snat_port = f.snat_port,
			.backend_port = b->port,
			.hash = f.hash,
			.last_seen = f.last_seen,
			.flags = f.flags,
			.backend_id = f.backend,
			.listener = f.listener,
			.snat_id = f.snat,
			.state = f.state,
		};
		memcpy(out[n].client, f.client, 16);
		memcpy(out[n].vip, l->address, 16);
		memcpy(out[n].snat, ps_address(a, f.snat), 16);
		memcpy(out[n].backend, b->address, 16);
		n++;
	}
	return n;
}

static uint16_t not_ended(const struct ps_shard *s)
{
	return (uint16_t)(s->live - s->list[PS_LIST_CLOSED].count - s->list[PS_LIST_TIME_WAIT].count);
}

void ps_arena_headers(struct ps_arena *a, uint64_t *owners, uint16_t *live)
{
	for (uint32_t b = 0; b < a->buckets; b++) {
		const struct ps_shard *s = ps_shard_at(a, b);

		owners[b] = __atomic_load_n(&s->owner, __ATOMIC_ACQUIRE);
		live[b] = not_ended(s);
	}
}

void ps_arena_packets(struct ps_arena *a, uint64_t *out)
{
	for (uint32_t b = 0; b < a->buckets; b++)
		out[b] = __atomic_load_n(&ps_shard_at(a, b)->packets, __ATOMIC_RELAXED);
}

uint64_t ps_arena_live(struct ps_arena *a)
{
	uint64_t live = 0;

	for (uint32_t b = 0; b < a->buckets; b++)
		live += not_ended(ps_shard_at(a, b));
	return live;
}
