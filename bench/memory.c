/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of live flows (T7): an arena as the agent makes it for 1M flows, filled with flows as an engine
 * opens them, and what the file system says the arena takes. Then the cost of a lookup at that size.
 * Prints lines of name value.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "nat.h"
#include "native.h"

enum { FLOWS = 1000000, BUCKETS = 4096, SNATS = 8, BACKENDS = 8 };

static uint64_t state = 1;

static uint32_t next(void) /* splitmix64 (Steele, Lea, Flood, 2014), upper half */
{
	uint64_t z = state += 0x9e3779b97f4a7c15ull;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return (uint32_t)((z ^ z >> 31) >> 32);
}

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void address(uint8_t out[16], uint32_t host)
{
	memset(out, 0, 16);
	out[10] = out[11] = 0xff;
	host = htonl(host);
	memcpy(out + 12, &host, 4);
}

static void draw(const struct ps_config *c, struct ps_key *k, uint32_t *bucket)
{
	uint32_t source, vip;
	uint64_t hash;

	memset(k, 0, sizeof(*k));
	address(k->source, next());
	address(k->destination, 0xc000020a);
	k->sport = (uint16_t)next();
	k->dport = htons(80);
	memcpy(&source, k->source + 12, 4);
	memcpy(&vip, k->destination + 12, 4);
	hash = ps_hash4(c->key0, c->key1, source, vip, k->sport, k->dport, 6);
	*bucket = (uint32_t)hash & c->mask;
	k->hash = (uint32_t)(hash >> 32);
}

int main(int argc, char **argv)
{
	struct ps_config *c = calloc(1, sizeof(*c));
	struct ps_handler h = { .config = c, .now = 1 };
	uint64_t counters[64] = { 0 }, made = 0, refused = 0, found = 0;
	struct ps_error e;
	struct ps_key k;
	uint32_t bucket;
	double begun;

	if (argc != 2 || !c) {
		fprintf(stderr, "usage: %s FILE (on tmpfs; made and removed)\n", argv[0]);
		return 2;
	}
	h.arena = ps_arena_create(argv[1], NULL, BUCKETS, FLOWS, NULL, &e);
	if (!h.arena) {
		fprintf(stderr, "%s\n", e.text);
		return 1;
	}
	h.counters = counters;
	c->key0 = 1;
	c->key1 = 2;
	c->mask = BUCKETS - 1;
	c->listeners = 1;
	c->snats = SNATS;
	c->backends = BACKENDS;
	c->timeout[PS_FLOW_SYN] = 300;
	address(c->listener[0].address, 0xc000020a);
	c->listener[0].port = htons(80);
	c->listener[0].protocol = 6;
	c->listener[0].backends = BACKENDS;
	c->listener[0].lookup_size = BACKENDS;
	for (uint32_t i = 0; i < BACKENDS; i++) {
		c->lookup[i] = (uint16_t)i;
		address(c->backend[i].address, 0x0a020001 + i);
		c->backend[i].port = htons(8080);
		c->backend[i].id = (uint16_t)ps_arena_backend(h.arena, c->backend[i].address, c->backend[i].port);
		c->backend[i].weight = 1;
	}
	for (uint32_t i = 0; i < SNATS; i++) {
		address(c->snat[i].address, 0xc0000240 + i);
		c->snat[i].family = 4;
		c->snat[i].id = (uint16_t)ps_arena_address(h.arena, NULL, c->snat[i].address);
	}
	c->listener[0].number = (uint16_t)ps_arena_listener(h.arena, c->listener[0].address, c->listener[0].port, 6);
	ps_configure(&h, c);
	begun = seconds();
	while (made < FLOWS) {
		struct ps_opening syn = { 0 };
		enum ps_counter why;
		struct ps_entry *f;

		draw(c, &k, &bucket);
		f = ps_flow_open(&h, ps_shard_at(h.arena, bucket), bucket, &k, c->listener, &syn, &why);
		if (!f) {
			refused++;
			made++;
			continue;
		}
		ps_flow_set_state(h.arena, ps_shard_at(h.arena, bucket), f, PS_FLOW_ESTABLISHED, c->timeout, 1);
		made++;
	}
	printf("open_ns %.1f\n", (seconds() - begun) * 1e9 / FLOWS);
	state = 1;
	begun = seconds();
	for (uint32_t i = 0; i < FLOWS; i++) {
		draw(c, &k, &bucket);
		found += ps_find_forward(h.arena, ps_shard_at(h.arena, bucket), &k) != NULL;
	}
	printf("lookup_ns %.1f\n", (seconds() - begun) * 1e9 / FLOWS);
	unlink(argv[1]);
	printf("flows %lu\nrefused %lu\nbytes %lu\n", found, refused, h.arena->bytes);
	printf("bytes_per_flow %.2f\n", (double)h.arena->bytes / (double)(FLOWS - refused));
	return found == FLOWS - refused ? 0 : 1;
}
