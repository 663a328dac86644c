/* SPDX-License-Identifier: Apache-2.0 */
/* The files that outlive processes: arena, configuration, engine. Layouts: packetstack/abi.h. */
#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "native.h"
#include "packetstack/forms.h"
#include "packetstack/parts.h"
#include "packetstack/shard.h"

static uint64_t pages(uint64_t bytes) { return (bytes + PS_PAGE - 1) & ~(uint64_t)(PS_PAGE - 1); }

static int is_power_of_two(uint32_t n) { return n && !(n & (n - 1)); }

/* Where the parts of an arena with these numbers lie. */
struct arena_places {
	uint64_t shards, stride, clients, bytes;
};

static struct arena_places arena_places(const struct ps_shard_form *form, uint32_t buckets, uint32_t entries,
					uint32_t index, uint32_t clients)
{
	struct arena_places at = { .shards = pages(sizeof(struct ps_arena)),
				   .stride = ps_form_shard_bytes(form, entries, index) };

	at.clients = at.shards + at.stride * buckets;
	at.bytes = pages(at.clients + clients * sizeof(ps_client_count));
	return at;
}

/* Does each number of an arena fit to the others? */
static int arena_fits(const struct ps_arena *a)
{
	struct ps_shard_form form = ps_form_of(&a->form);
	struct arena_places at = arena_places(&form, a->buckets, a->entries, a->index_slots, a->clients);

	return ps_form_fits(&form) && is_power_of_two(a->buckets) && a->buckets >= PS_MIN_BUCKETS &&
	       a->buckets <= PS_MAX_BUCKETS && a->entries >= 16 && a->entries <= PS_MAX_ENTRIES &&
	       is_power_of_two(a->index_slots) && a->index_slots > a->entries && a->index_slots <= 65536 &&
	       is_power_of_two(a->clients) && a->clients >= 8 && a->addresses <= PS_MAX_ADDRESSES &&
	       a->backends <= PS_MAX_BACKENDS && a->shards_offset == at.shards && a->shard_stride == at.stride &&
	       a->clients_offset == at.clients && a->bytes == at.bytes;
}

struct ps_shard_form ps_own_form(void) { return ps_shard_form(); }

struct ps_shard_form ps_arena_form(const struct ps_arena *a) { return ps_form_of(&a->form); }

struct ps_arena *ps_arena_create(const char *path, const char *pin, uint32_t buckets, uint64_t max_flows,
				 const struct ps_shard_form *given, struct ps_error *e)
{
	struct ps_shard_form form = given ? ps_form_of(given) : ps_shard_form();
	uint64_t mean, entries, index, clients;
	struct arena_places at;
	struct ps_arena *a;

	if (!ps_form_fits(&form)) {
		ps_fail(e, "%s: no memory is made for shard layout %u: its numbers do not fit together", path,
			form.layout);
		return NULL;
	}
	if (buckets < PS_MIN_BUCKETS || buckets > PS_MAX_BUCKETS || buckets & (buckets - 1)) {
		ps_fail(e, "buckets: %u is not possible; use a power of two from %d to %d", buckets, PS_MIN_BUCKETS,
			PS_MAX_BUCKETS);
		return NULL;
	}
	/* Flows fall into buckets at random: mean + 5 standard deviations, so that no bucket refuses early. */
	mean = (max_flows + buckets - 1) / buckets;
	for (entries = 1; entries * entries < mean; entries++)
		;
	entries = mean + 5 * entries;
	if (entries < 16)
		entries = 16;
	if (entries > PS_MAX_ENTRIES) {
		ps_fail(e, "maxFlows: %lu in %u buckets is more than a shard can hold; use more buckets or at most %lu",
			(unsigned long)max_flows, buckets, 30000ul * buckets);
		return NULL;
	}
	for (index = 16; index < entries + entries / 4; index *= 2)
		;
	for (clients = 1024; clients < max_flows / 16; clients *= 2)
		;
	at = arena_places(&form, buckets, (uint32_t)entries, (uint32_t)index, (uint32_t)clients);
	a = ps_parts_create(path, pin, PS_ARENA_FILE_BYTES, at.bytes, e);
	if (!a)
		return NULL;
	a->layout = PS_LAYOUT_VERSION;
	a->form = form;
	a->bytes = at.bytes;
	a->buckets = buckets;
	a->entries = (uint32_t)entries;
	a->index_slots = (uint32_t)index;
	a->shards_offset = at.shards;
	a->shard_stride = at.stride;
	a->clients = (uint32_t)clients;
	a->clients_offset = at.clients;
	if (getrandom(a->clients_key, sizeof(a->clients_key), 0) != sizeof(a->clients_key)) {
		ps_fail(e, "%s: no random numbers: %s", path, strerror(errno));
		munmap(a, at.bytes);
		unlink(path);
		if (pin)
			unlink(pin);
		return NULL;
	}
	a->next_fence = 1;
	__atomic_store_n(&a->magic, PS_ARENA_MAGIC, __ATOMIC_RELEASE);
	return a;
}

struct ps_arena *ps_arena_open(const char *path, const char *pin, struct ps_error *e)
{
	struct ps_arena *a = ps_parts_open(path, pin, PS_ARENA_MAGIC, PS_ARENA_FILE_BYTES, "arena", e);

	if (a && !arena_fits(a)) {
		ps_fail(e, "%s: its numbers do not fit together: this arena is damaged and not used", path);
		munmap(a, a->bytes);
		return NULL;
	}
	return a;
}

struct ps_config_file *ps_config_create(const char *path, struct ps_error *e)
{
	struct ps_config_file *c = ps_parts_create(path, NULL, sizeof(*c), sizeof(*c), e);

	if (c) {
		c->layout = PS_LAYOUT_VERSION;
		__atomic_store_n(&c->magic, PS_CONFIG_MAGIC, __ATOMIC_RELEASE);
	}
	return c;
}

struct ps_config_file *ps_config_open(const char *path, int read_only, struct ps_error *e)
{
	return ps_file_open(path, read_only, PS_CONFIG_MAGIC, sizeof(struct ps_config_file), "configuration", e);
}

static uint64_t queue_stride(const struct ps_engine *n)
{
	return pages(sizeof(struct ps_queue) + n->park_slots * sizeof(struct ps_descriptor) + n->free_slots * 8ull);
}

void ps_engine_places(struct ps_engine *n)
{
	n->captures_offset = (sizeof(*n) + 63) & ~63ull;
	n->cores_offset = pages(n->captures_offset + PS_CAPTURES * sizeof(struct ps_capture));
	n->queues_offset = pages(n->cores_offset + n->cores * sizeof(struct ps_core));
	n->queue_stride = queue_stride(n);
	n->bytes = n->queues_offset + n->queues * n->queue_stride;
}

static int engine_fits(const struct ps_engine *n)
{
	const uint32_t rings[] = { n->rx_slots,		n->tx_slots,   n->fill_slots,
				   n->completion_slots, n->park_slots, n->free_slots };
	struct ps_engine at = {
		.queues = n->queues, .cores = n->cores, .park_slots = n->park_slots, .free_slots = n->free_slots
	};

	for (size_t i = 0; i < sizeof(rings) / sizeof(rings[0]); i++)
		if (!is_power_of_two(rings[i]) || rings[i] > 1 << 24)
			return 0;
	ps_engine_places(&at);
	return n->slot && n->slot < PS_MAX_SLOTS && n->queues && n->queues <= PS_MAX_QUEUES && n->cores &&
	       n->cores <= PS_MAX_CORES && n->frames && n->frames <= n->fill_slots && n->frames <= n->free_slots &&
	       n->captures_offset == at.captures_offset && n->cores_offset == at.cores_offset &&
	       n->queues_offset == at.queues_offset && n->queue_stride == at.queue_stride && n->bytes == at.bytes;
}

struct ps_engine *ps_engine_open(const char *path, const char *pin, struct ps_error *e)
{
	struct ps_engine *n = ps_parts_open(path, pin, PS_ENGINE_MAGIC, PS_ENGINE_FILE_BYTES, "engine file", e);

	if (n && !engine_fits(n)) {
		ps_fail(e, "%s: its numbers do not fit together: this engine file is damaged and not used", path);
		munmap(n, n->bytes);
		return NULL;
	}
	return n;
}

struct ps_engine *ps_engine_view(int file, int map, struct ps_error *e)
{
	struct ps_engine *n, head;

	if (pread(file, &head, PS_ENGINE_FILE_BYTES, 0) != PS_ENGINE_FILE_BYTES || head.magic != PS_ENGINE_MAGIC ||
	    head.layout != PS_LAYOUT_VERSION || !engine_fits(&head)) {
		ps_fail(e, "what the agent has given is no engine's memory of layout %d", PS_LAYOUT_VERSION);
		return NULL;
	}
	n = ps_parts_map(file, map, PS_ENGINE_FILE_BYTES, head.bytes, PROT_READ, PROT_READ);
	if (n == MAP_FAILED) {
		ps_fail(e, "the engine's memory cannot be mapped: %s", strerror(errno));
		return NULL;
	}
	return n;
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
	struct ps_shard_form form = ps_form_of(&a->form);

	for (uint32_t b = 0; b < a->buckets; b++) {
		const struct ps_shard *s = ps_shard_at(a, b);

		for (uint32_t i = 0; i < s->high && i < a->entries; i++) {
			const uint8_t *f = ps_form_entry(a, &form, b, i);

			if (f[form.state] == PS_FLOW_FREE)
				continue;
			free_backend[ps_form_u16(f, form.backend) & (PS_MAX_BACKENDS - 1)] = 0;
			free_listener[ps_form_u16(f, form.listener) & (PS_MAX_NUMBERS - 1)] = 0;
			free_address[ps_form_u16(f, form.snat) & (PS_MAX_ADDRESSES - 1)] = 0;
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
	a->backend_count[found] = (struct ps_backend_count){ 0 };
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
		struct ps_listener_name *l = &a->listener[i];

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
	a->listener_count[found] = (struct ps_listener_count){ 0 };
	a->listener[found] = (struct ps_listener_name){ .port = port, .protocol = protocol, .used = 1 };
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

/* Could this be a flow at all? */
static int flow_sane(const struct ps_flow *f)
{
	return f->state != PS_FLOW_FREE && f->state < PS_FLOW_STATES && f->listener < PS_MAX_NUMBERS &&
	       f->snat_id < PS_MAX_ADDRESSES && f->backend_id < PS_MAX_BACKENDS;
}

int ps_arena_flows(struct ps_arena *a, uint32_t bucket, struct ps_flow *out, int max)
{
	struct ps_shard_form form = ps_form_of(&a->form);
	const struct ps_shard *s = ps_shard_at(a, bucket);
	int n = 0;

	for (uint32_t i = 0; i < s->high && i < a->entries && n < max; i++) {
		const uint8_t *entry = ps_form_entry(a, &form, bucket, i);
		const uint16_t *written = (const uint16_t *)(entry + form.version);
		uint16_t version = __atomic_load_n(written, __ATOMIC_ACQUIRE);
		struct ps_flow f = {
			.client_port = ps_form_u16(entry, form.client_port),
			.snat_port = ps_form_u16(entry, form.snat_port),
			.hash = ps_form_u32(entry, form.hash),
			.last_seen = ps_form_u32(entry, form.last_seen),
			.flags = ps_form_u16(entry, form.flags),
			.backend_id = ps_form_u16(entry, form.backend),
			.listener = ps_form_u16(entry, form.listener),
			.snat_id = ps_form_u16(entry, form.snat),
			.state = entry[form.state],
		};
		const struct ps_listener_name *l = &a->listener[f.listener & (PS_MAX_NUMBERS - 1)];
		const struct ps_backend *b = &a->backend[f.backend_id & (PS_MAX_BACKENDS - 1)];

		memcpy(f.client, entry + form.client, 16);
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (version & 1 || version != __atomic_load_n(written, __ATOMIC_RELAXED) || !flow_sane(&f))
			continue;
		f.vip_port = l->port;
		f.backend_port = b->port;
		memcpy(f.vip, l->address, 16);
		memcpy(f.snat, ps_address(a, f.snat_id), 16);
		memcpy(f.backend, b->address, 16);
		out[n++] = f;
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
