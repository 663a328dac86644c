/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The arena's file as the agent makes it: sizes and alignment, and which numbers of backends and listeners are given to
 * others.
 */
#include "arena.h"
#include "files.c"
#include "parts.c"
#include "addresses.c"

static const uint32_t timeout[16] = { 0, 600, 600, 600, 600, 600, 600, 600, 600, 600 };

static struct ps_arena *made(uint32_t buckets, uint64_t flows)
{
	struct ps_error e = { "" };
	char path[64];
	struct ps_arena *a;

	snprintf(path, sizeof(path), "/tmp/packetstack-test-files-%d", getpid());
	a = ps_arena_create(path, NULL, buckets, flows, NULL, &e);
	CHECK(a, "%s", e.text);
	unlink(path);
	return a;
}

/* What the datapath reads at once lies on one cache line each. */
static void entries_and_tables_lie_on_cache_lines(void)
{
	for (uint32_t buckets = PS_MIN_BUCKETS; buckets <= 2048; buckets *= 2) {
		struct ps_arena *a = made(buckets, 1000 + buckets * 7);

		for (uint32_t b = 0; b < buckets; b += 17)
			CHECK(!((uintptr_t)ps_shard_flows(a, ps_shard_at(a, b)) % 64), "bucket %u", b);
		CHECK(!(((uintptr_t)a + a->clients_offset) % 64) && !((uintptr_t)a->listener % 64), "tables");
		CHECK(a->clients_offset + a->clients * sizeof(ps_client_count) <= a->bytes, "the file is too short");
		CHECK(!(a->clients & (a->clients - 1)) && a->clients >= 8, "%u clients", a->clients);
		ps_unmap(a);
	}
}

static int backend(struct ps_arena *a, uint32_t n)
{
	uint8_t address[16];

	mapped(address, 0x0a000000 + n);
	return ps_arena_backend(a, address, 8080);
}

static int listener(struct ps_arena *a, uint32_t n)
{
	uint8_t address[16];

	mapped(address, 0xc0000000 + n);
	return ps_arena_listener(a, address, 80, 6);
}

static struct ps_entry *flow(struct ps_arena *a, uint32_t bucket, uint16_t number, uint16_t to, uint8_t state)
{
	struct ps_entry value = { .hash = number, .client_port = number, .snat_port = number };
	struct ps_shard *s = ps_shard_at(a, bucket);
	uint32_t recycled = 0;
	struct ps_entry *room = ps_flow_room(a, s, &recycled);

	mapped(value.client, 0x0a630000 + number);
	value.listener = number;
	value.backend = to;
	value.state = PS_FLOW_SYN;
	ps_flow_insert(a, s, room, &value, timeout, 10);
	ps_flow_set_state(a, s, room, state, timeout, 10);
	return room;
}

/* Backends come and go for ever; a number is given to another one when no flow names it, in whatever state. */
static void the_number_of_a_backend_is_used_again_when_no_flow_names_it(void)
{
	static struct ps_config c;
	struct ps_arena *a = made(256, 1000);
	struct ps_entry *ended, *lives;
	struct ps_flow seen;

	listener(a, 0);
	for (uint32_t n = 0; n < PS_MAX_BACKENDS; n++)
		CHECK(backend(a, n) == (int)n, "backend %u", n);
	for (uint32_t n = 0; n < PS_MAX_BACKENDS; n += 100)
		CHECK(backend(a, n) == (int)n, "a known backend gets another number");
	CHECK(backend(a, 5000) == -1, "all are in use");
	ended = flow(a, 3, 0, 70, PS_FLOW_TIME_WAIT);
	lives = flow(a, 200, 0, 71, PS_FLOW_ESTABLISHED);
	/* The configuration names all but 70 to 73. */
	for (uint32_t n = 0; n < PS_MAX_BACKENDS; n++)
		if (n < 70 || n > 73)
			c.backend[c.backends++].id = (uint16_t)n;
	c.listeners = 1;
	ps_arena_used(a, &c);
	a->backend_count[72].created = 9;
	CHECK(backend(a, 5000) == 72, "the first that no flow names");
	CHECK(!a->backend_count[72].live && !a->backend_count[72].created, "it begins with the counts of another one");
	CHECK(backend(a, 5000) == 72, "the same again");
	CHECK(backend(a, 5001) == 73, "the next");
	CHECK(backend(a, 5002) == -1, "the others are named by flows");
	CHECK(backend(a, 71) == 71, "a backend that comes back has the number that its flows name");
	CHECK(ps_arena_flows(a, 200, &seen, 1) == 1 && seen.backend_id == 71 && seen.backend[15] == 71, "backend %u",
	      seen.backend[15]);
	ps_flow_remove(a, ps_shard_at(a, 3), ended);
	CHECK(backend(a, 5002) == 70, "its flow is gone");
	ps_flow_remove(a, ps_shard_at(a, 200), lives);
	CHECK(backend(a, 5003) == -1, "71 came back: it is used");
	CHECK(a->backends == PS_MAX_BACKENDS, "%u", a->backends);
	ps_unmap(a);
}

/* Listeners get the classes that others leave free, and numbers again when no flow names them. */
static void the_number_of_a_listener_is_used_again_when_no_flow_names_it(void)
{
	static struct ps_config c;
	struct ps_arena *a = made(256, 1000);
	uint8_t in_class[64] = { 0 };
	struct ps_entry *f;

	backend(a, 0);
	for (uint32_t n = 0; n < PS_MAX_NUMBERS; n++) {
		int number = listener(a, n);

		CHECK(number >= 0 && in_class[number % 64]++ == n / 64, "listener %u in class %d", n, number % 64);
		CHECK(listener(a, n) == number, "a known listener gets another number");
	}
	CHECK(listener(a, 5000) == -1, "all are in use");
	f = flow(a, 9, 7, 0, PS_FLOW_CLOSED);
	for (uint32_t n = 0; n < 6; n++)
		c.listener[c.listeners++].number = (uint16_t)n;
	c.backends = 1;
	ps_arena_used(a, &c);
	CHECK(listener(a, 5000) == 6, "the first of a class that has none");
	CHECK(listener(a, 5001) == 8, "7 is named by a flow");
	ps_flow_remove(a, ps_shard_at(a, 9), f);
	a->listener_count[7].created = a->listener_count[7].proven = 3;
	CHECK(listener(a, 5002) == 7 && !a->listener_count[7].created && !a->listener_count[7].proven,
	      "its flow is gone");
	ps_unmap(a);
}

static int address(struct ps_arena *a, const struct ps_config_file *c, uint32_t n)
{
	uint8_t bytes[16];

	mapped(bytes, 0xc6330000 + n);
	return ps_arena_address(a, c, bytes);
}

/* SNAT addresses may be replaced for ever, too. */
static void the_number_of_an_address_is_used_again_when_nothing_names_it(void)
{
	static struct ps_config_file c;
	struct ps_arena *a = made(256, 1000);
	struct ps_entry *f;
	uint32_t n;

	backend(a, 0);
	listener(a, 0);
	for (n = 0; n < PS_MAX_ADDRESSES; n++)
		CHECK(address(a, &c, n) == (int)n, "address %u", n);
	for (uint32_t i = 0; i < PS_MAX_SNAT; i++) {
		c.buffer[0].snat[i].id = (uint16_t)(2 * i);
		c.buffer[1].snat[i].id = (uint16_t)(2 * i + 1);
	}
	f = flow(a, 9, 0, 0, PS_FLOW_TIME_WAIT);
	f->snat = 2 * PS_MAX_SNAT;
	CHECK(address(a, &c, n) == 2 * PS_MAX_SNAT + 1, "the first that neither a buffer nor a flow names");
	CHECK(address(a, &c, n) == 2 * PS_MAX_SNAT + 1 && a->addresses == PS_MAX_ADDRESSES, "the same again");
	CHECK(address(a, &c, 2 * PS_MAX_SNAT) == 2 * PS_MAX_SNAT, "one that a flow names keeps its number");
	for (uint32_t i = 0; i < PS_MAX_SNAT; i++) /* it is written into the next configuration, one by one */
		c.buffer[1].snat[i].id = (uint16_t)address(a, &c, n + i);
	for (uint32_t i = 0; i < PS_MAX_SNAT; i++) {
		uint32_t number = c.buffer[1].snat[i].id;

		CHECK(address(a, &c, n + i) == (int)number, "address %u has lost its number", n + i);
		CHECK(number % 2 || number > 2 * PS_MAX_SNAT, "address %u got number %u, which is used", n + i, number);
	}
	ps_unmap(a);
}

/* Flows that have ended are shown, but not counted as live. */
static void ended_flows_are_listed_and_not_counted(void)
{
	struct ps_arena *a = made(256, 1000);
	uint64_t owners[256];
	uint16_t live[256];
	struct ps_flow out[8];

	backend(a, 0);
	for (uint32_t n = 0; n < 4; n++)
		listener(a, n);
	flow(a, 5, 0, 0, PS_FLOW_ESTABLISHED);
	flow(a, 5, 1, 0, PS_FLOW_CLOSED);
	flow(a, 5, 2, 0, PS_FLOW_TIME_WAIT);
	flow(a, 5, 3, 0, PS_FLOW_SYN_ACK);
	ps_arena_headers(a, owners, live);
	CHECK(ps_arena_live(a) == 2 && live[5] == 2 && !live[6], "%lu live", ps_arena_live(a));
	CHECK(ps_arena_flows(a, 5, out, 8) == 4 && ps_arena_flows(a, 5, out, 3) == 3, "four flows");
	CHECK(out[2].state == PS_FLOW_TIME_WAIT && out[2].vip_port == 80 && out[2].listener == 2, "state %u",
	      out[2].state);
	shard_check(a, ps_shard_at(a, 5), timeout);
	counts_check(a, 0, 256, 0);
	ps_unmap(a);
}

/* Whatever engines write: the agent reads no place that is not the arena's, in a time that depends on sizes alone. */
static void rubbish_of_engines_leads_nowhere(void)
{
	static uint32_t by_address[PS_MAX_ADDRESSES];
	struct ps_arena *a = made(256, 4096);
	uint64_t *owners = calloc(a->buckets, sizeof(*owners)), *packets = calloc(a->buckets, sizeof(*packets));
	uint16_t *live = calloc(a->buckets, sizeof(*live));
	struct ps_flow *flows = calloc(a->entries, sizeof(*flows));
	struct ps_error e;

	CHECK(owners && packets && live && flows, "out of memory");
	for (uint32_t round = 0; round < 40; round++) {
		uint8_t *part = (uint8_t *)a + PS_ARENA_FILE_BYTES;

		for (uint64_t i = 0; i < a->bytes - PS_ARENA_FILE_BYTES; i++)
			part[i] = (uint8_t)(round == 0 ? 0xff : random_below(256));
		ps_arena_headers(a, owners, live);
		ps_arena_packets(a, packets);
		ps_arena_live(a);
		CHECK(!ps_arena_snat_flows(a, by_address, &e), "%s", e.text);
		for (uint32_t b = 0; b < a->buckets; b++) {
			int n = ps_arena_flows(a, b, flows, (int)a->entries);

			CHECK(n >= 0 && n <= (int)a->entries, "%d flows", n);
			for (int i = 0; i < n; i++)
				CHECK(flows[i].state < PS_FLOW_STATES && flows[i].backend_id < PS_MAX_BACKENDS,
				      "state %u", flows[i].state);
			ps_shard_sane(a, ps_shard_at(a, b));
		}
		CHECK(backend(a, round) == (int)round, "a place of its own");
		listener(a, round);
	}
	free(owners);
	free(packets);
	free(live);
	free(flows);
	ps_unmap(a);
}

int main(void)
{
	entries_and_tables_lie_on_cache_lines();
	the_number_of_a_backend_is_used_again_when_no_flow_names_it();
	the_number_of_a_listener_is_used_again_when_no_flow_names_it();
	the_number_of_an_address_is_used_again_when_nothing_names_it();
	ended_flows_are_listed_and_not_counted();
	rubbish_of_engines_leads_nowhere();
	return 0;
}
