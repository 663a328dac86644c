/* SPDX-License-Identifier: Apache-2.0 */
/* The files that outlive processes: arena, configuration, engine. Layouts: packetstack/abi.h. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
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
		ps_fail(e, "LayoutMismatch: %s: magic %08x layout %u; this build reads magic %08x layout %d", path,
			at[0], at[1], magic, PS_LAYOUT_VERSION);
		munmap(at, (size_t)st.st_size);
		return NULL;
	}
	return at;
}

struct ps_arena *ps_arena_create(const char *path, uint32_t buckets, uint64_t max_flows, struct ps_error *e)
{
	uint64_t mean = (max_flows + buckets - 1) / buckets, entries, index, stride, offset, bytes;
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
	bytes = (offset + stride * buckets + 4095) & ~4095ull;
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

int ps_arena_address(struct ps_arena *a, const uint8_t *address)
{
	for (uint32_t i = 0; i < a->addresses; i++)
		if (!memcmp(a->address[i].bytes, address, 16))
			return (int)i;
	if (a->addresses >= PS_MAX_ADDRESSES)
		return -1;
	memcpy(a->address[a->addresses].bytes, address, 16);
	return (int)__atomic_fetch_add(&a->addresses, 1, __ATOMIC_RELEASE);
}

int ps_arena_backend(struct ps_arena *a, const uint8_t *address, uint16_t port)
{
	int unused = -1;

	for (uint32_t i = 0; i < a->backends; i++) {
		if (a->backend[i].port == port && !memcmp(a->backend[i].address, address, 16))
			return (int)i;
		/* Counting only: a place whose backend has no flow left may serve another one. */
		if (unused < 0 && a->backend[i].live <= 0 && !a->backend[i].used)
			unused = (int)i;
	}
	if (a->backends >= PS_MAX_BACKENDS) {
		if (unused < 0)
			return -1;
	} else {
		unused = (int)a->backends;
	}
	memcpy(a->backend[unused].address, address, 16);
	a->backend[unused].port = port;
	a->backend[unused].live = 0;
	if ((uint32_t)unused == a->backends)
		__atomic_fetch_add(&a->backends, 1, __ATOMIC_RELEASE);
	return unused;
}

struct ps_shard *ps_arena_shard(struct ps_arena *a, uint32_t bucket)
{
	return bucket < a->buckets ? ps_shard_at(a, bucket) : NULL;
}

int ps_arena_flows(struct ps_arena *a, uint32_t bucket, struct ps_flow *out, int max)
{
	struct ps_shard *s = ps_shard_at(a, bucket);
	struct ps_flow *flows = ps_shard_flows(a, s);
	int n = 0;

	for (uint32_t i = 0; i < s->high && i < a->entries && n < max; i++) {
		uint32_t version = __atomic_load_n(&flows[i].version, __ATOMIC_ACQUIRE);

		out[n] = flows[i];
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (!(version & 1) && version == __atomic_load_n(&flows[i].version, __ATOMIC_RELAXED) &&
		    out[n].state != PS_FLOW_FREE)
			n++;
	}
	return n;
}

void ps_arena_headers(struct ps_arena *a, uint64_t *owners, uint16_t *live)
{
	for (uint32_t b = 0; b < a->buckets; b++) {
		const struct ps_shard *s = ps_shard_at(a, b);

		owners[b] = __atomic_load_n(&s->owner, __ATOMIC_ACQUIRE);
		live[b] = s->live;
	}
}

uint64_t ps_arena_live(struct ps_arena *a)
{
	uint64_t live = 0;

	for (uint32_t b = 0; b < a->buckets; b++)
		live += ps_shard_at(a, b)->live;
	return live;
}
