/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What following sequence numbers costs an established flow: cycles a packet of ps_handle with and without it, in one
 * process, the two taking turns. Prints lines of name value.
 *
 * This file is compiled twice: with PS_WITHOUT_TRACKING it is the half that only looks at flags.
 */
#include <stdio.h>
#include <stdlib.h>

#include "nat.h"

typedef uint8_t handle_function(struct ps_handler *, uint8_t *, uint32_t, const struct ps_stamp *);
handle_function handle_tracked, handle_plain;

#ifdef PS_WITHOUT_TRACKING
__attribute__((noinline, noclone)) uint8_t handle_plain(struct ps_handler *h, uint8_t *frame, uint32_t length,
							const struct ps_stamp *stamp)
{
	return ps_handle(h, frame, length, stamp);
}
#else
#include <unistd.h>
#include <x86intrin.h>

#include "native.h"

enum { FLOWS = 4096, BUCKETS = 4096, ROUNDS = 101, TURNS = 4, BYTES = 60 };

struct one { /* a flow, and its next segment in each direction */
	struct ps_stamp stamp[2];
	uint8_t frame[2][64];
};

__attribute__((noinline, noclone)) uint8_t handle_tracked(struct ps_handler *h, uint8_t *frame, uint32_t length,
							  const struct ps_stamp *stamp)
{
	return ps_handle(h, frame, length, stamp);
}

static void address(uint8_t out[16], uint32_t host)
{
	memset(out, 0, 16);
	out[10] = out[11] = 0xff;
	host = htonl(host);
	memcpy(out + 12, &host, 4);
}

/* A segment in IPv4 with its checksum: a SYN, or six bytes of data. */
static void segment(uint8_t *frame, uint32_t source, uint32_t destination, uint16_t sport, uint16_t dport,
		    uint8_t flags, uint32_t seq, uint32_t ack)
{
	uint32_t words[2] = { htonl(source), htonl(destination) }, numbers[2] = { htonl(seq), htonl(ack) };
	uint16_t bytes = flags & TCP_SYN ? 40 : 46, ports[2] = { htons(sport), htons(dport) }, check,
		 length = htons(bytes);
	uint8_t *ip = frame + 14, *tcp = ip + 20;

	memset(frame, 0, 64);
	frame[12] = 8;
	ip[0] = 0x45;
	memcpy(ip + 2, &length, 2);
	ip[8] = 64;
	ip[9] = 6;
	memcpy(ip + 12, words, 8);
	check = (uint16_t)~ps_fold(ps_sum(ip, 20, 0));
	memcpy(ip + 10, &check, 2);
	memcpy(tcp, ports, 4);
	memcpy(tcp + 4, numbers, 8);
	tcp[12] = 5 << 4;
	tcp[13] = flags;
	tcp[14] = 0xfa;
	check = (uint16_t)~ps_fold(
		ps_sum(tcp, bytes - 20u, ps_sum(ip + 12, 8, (uint64_t)htons((uint16_t)(bytes - 20)) + htons(6))));
	memcpy(tcp + 16, &check, 2);
}

/* The frame carries 6 bytes: the next segment begins behind them and acknowledges the other side's. */
static void advance(uint8_t *frame)
{
	uint32_t numbers[2];

	memcpy(numbers, frame + 38, 8);
	numbers[0] = htonl(ntohl(numbers[0]) + 6);
	numbers[1] = htonl(ntohl(numbers[1]) + 6);
	memcpy(frame + 38, numbers, 8);
}

static void must(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "tracking: %s\n", what);
		exit(1);
	}
}

/* -> cycles a packet, both directions of all flows */
static double turn(struct ps_handler *h, struct one *flows, handle_function *handle)
{
	uint64_t begun = __rdtsc(), forwarded = 0;

	for (int i = 0; i < TURNS; i++)
		for (int side = 0; side < 2; side++)
			for (uint32_t f = 0; f < FLOWS; f++) {
				uint8_t copy[128];

				__builtin_prefetch(ps_shard_at(h->arena, flows[(f + 8) % FLOWS].stamp[0].bucket));
				memcpy(copy, flows[f].frame[side], 64);
				advance(flows[f].frame[side]);
				forwarded += handle(h, copy, BYTES, &flows[f].stamp[side]) == PS_TRANSMIT;
			}
	must(forwarded == 2ull * TURNS * FLOWS, "a segment was not forwarded");
	return (double)(__rdtsc() - begun) / (2. * TURNS * FLOWS);
}

/* Does the flow's entry know the last segment of the client? */
static bool followed(struct ps_handler *h, const struct one *flow)
{
	struct ps_key k = { .hash = flow->stamp[0].hash, .dport = htons(80) };
	const struct ps_entry *f;
	uint32_t number;

	address(k.destination, 0xc000020a);
	k.source[10] = k.source[11] = 0xff;
	memcpy(k.source + 12, flow->frame[0] + 26, 4);
	memcpy(&k.sport, flow->frame[0] + 34, 2);
	memcpy(&number, flow->frame[0] + 38, 4);
	f = ps_find_forward(h->arena, ps_shard_at(h->arena, flow->stamp[0].bucket), &k);
	return f && f->end[PS_CLIENT] == ntohl(number);
}

static int ascending(const void *a, const void *b) { return *(const double *)a < *(const double *)b ? -1 : 1; }

int main(int argc, char **argv)
{
	struct ps_config *c = calloc(1, sizeof(*c));
	struct one *flows = calloc(FLOWS, sizeof(*flows)), *same = calloc(FLOWS, sizeof(*flows));
	struct ps_engine engine = { .slot = 1 };
	uint64_t counters[64] = { 0 };
	struct ps_handler h = { .config = c, .engine = &engine, .counters = counters, .now = 1, .now_ns = 100000000 };
	static double tracked[ROUNDS], plain[ROUNDS], ratio[ROUNDS];
	struct ps_error e;

	must(argc == 2 && c && flows && same, "usage: FILE (on tmpfs; made and removed)");
	h.arena = ps_arena_create(argv[1], NULL, BUCKETS, 65536, NULL, &e);
	must(h.arena != NULL, e.text);
	unlink(argv[1]);
	*c = (struct ps_config){ .key0 = 1, .key1 = 2, .mask = BUCKETS - 1, .listeners = 1, .snats = 1, .backends = 1 };
	for (int i = 0; i < 16; i++)
		c->timeout[i] = 1000;
	c->listener[0] = (struct ps_listener){ .port = htons(80), .protocol = 6, .backends = 1, .lookup_size = 1 };
	address(c->listener[0].address, 0xc000020a);
	c->listener[0].number = (uint16_t)ps_arena_listener(h.arena, c->listener[0].address, htons(80), 6);
	c->backend[0] = (struct ps_config_backend){ .port = htons(8080), .weight = 1 };
	address(c->backend[0].address, 0x0a020001);
	c->backend[0].id = (uint16_t)ps_arena_backend(h.arena, c->backend[0].address, htons(8080));
	c->snat[0].family = 4;
	address(c->snat[0].address, 0xc0000240);
	c->snat[0].id = (uint16_t)ps_arena_address(h.arena, NULL, c->snat[0].address);
	ps_configure(&h, c);
	for (uint32_t i = 0, made = 0; made < FLOWS; i++) {
		uint32_t source = 0x0a000000 + i, seq = i * 7919, theirs = i * 104729;
		uint64_t hash = ps_hash4(1, 2, htonl(source), htonl(0xc000020a), htons(40000), htons(80), 6);
		struct one *f = &flows[made];
		uint8_t frame[128];
		uint16_t port;

		for (int side = 0; side < 2; side++)
			f->stamp[side] = (struct ps_stamp){ .magic = PS_STAMP_MAGIC,
							    .bucket = (uint16_t)(hash & c->mask),
							    .hash = side ? 0 : (uint32_t)(hash >> 32),
							    .flags = side ? PS_STAMP_REPLY : 0 };
		segment(frame, source, 0xc000020a, 40000, 80, TCP_SYN, seq - 1, 0);
		if (handle_tracked(&h, frame, 54, &f->stamp[0]) != PS_TRANSMIT)
			continue; /* its bucket has no port left: another flow */
		memcpy(&port, frame + 34, 2);
		segment(frame, 0x0a020001, 0xc0000240, 8080, ntohs(port), TCP_SYN | TCP_ACK, theirs - 1, seq);
		must(handle_tracked(&h, frame, 54, &f->stamp[1]) == PS_TRANSMIT, "the answer to a SYN");
		segment(frame, source, 0xc000020a, 40000, 80, TCP_ACK, seq - 6, theirs);
		must(handle_tracked(&h, frame, BYTES, &f->stamp[0]) == PS_TRANSMIT, "the end of a handshake");
		segment(f->frame[0], source, 0xc000020a, 40000, 80, TCP_ACK, seq, theirs);
		segment(f->frame[1], 0x0a020001, 0xc0000240, 8080, ntohs(port), TCP_ACK, theirs, seq);
		made++;
	}
	/* Who does not look at numbers does not know that the connection went on: frames of its own. */
	memcpy(same, flows, FLOWS * sizeof(*flows));
	turn(&h, flows, handle_tracked);
	turn(&h, same, handle_plain);
	for (int i = 0; i < ROUNDS; i++) {
		h.now++; /* both have the idle time to write, once a flow */
		if (i & 1) {
			tracked[i] = turn(&h, flows, handle_tracked);
			plain[i] = turn(&h, same, handle_plain);
		} else {
			plain[i] = turn(&h, same, handle_plain);
			tracked[i] = turn(&h, flows, handle_tracked);
		}
		ratio[i] = tracked[i] / plain[i];
	}
	for (uint32_t i = 0; i < FLOWS; i++)
		must(followed(&h, &flows[i]), "a segment was not believed");
	qsort(tracked, ROUNDS, sizeof(double), ascending);
	qsort(plain, ROUNDS, sizeof(double), ascending);
	qsort(ratio, ROUNDS, sizeof(double), ascending);
	printf("tracked_cycles %.1f\nplain_cycles %.1f\n", tracked[ROUNDS / 2], plain[ROUNDS / 2]);
	printf("ratio %.3f\nratio_low %.3f\nratio_high %.3f\n", ratio[ROUNDS / 2], ratio[ROUNDS / 10],
	       ratio[ROUNDS * 9 / 10]);
	return 0;
}
#endif
