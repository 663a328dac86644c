/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An engine's packet handler for tests in Python (tests/model/engine.py): frames in, frames out, flows to look at.
 * It does the director's part as well: the stamp. Of the layout it knows what engine_new and engine_flows say; all else
 * goes through ps_handle, ps_shard_sweep and ps_shard_check.
 */
#include "segments.h"

/* Flows, in terms of packets; host order */
struct engine_flow {
	uint32_t state, udp; /* ps_flow_state */
	uint32_t client, vip, snat, backend;
	uint32_t client_port, vip_port, snat_port, backend_port;
	uint32_t bucket, idle; /* ticks */
};

struct engine {
	struct stack stack, kept_stack;
	uint64_t handled, kept_handled;
	uint8_t *kept_arena;
	uint8_t raw[PS_FRAME_BYTES + PS_UNDO_BYTES];
	const char *wrong;
};

struct engine *engine_new(uint32_t entries, uint32_t index_slots);
void engine_free(struct engine *e);
int engine_handle(struct engine *e, uint8_t *frame, uint32_t length);
void engine_advance(struct engine *e, uint32_t ticks);
uint32_t engine_flows(const struct engine *e, struct engine_flow *out, uint32_t most);
const char *engine_unsound(struct engine *e);
uint32_t engine_bucket(const struct engine *e, uint32_t client, uint16_t client_port, uint16_t vip_port);
uint32_t engine_timeout(const struct engine *e, uint32_t state);
uint64_t engine_counter(const struct engine *e, uint32_t counter);
void engine_keep(struct engine *e);
void engine_restore(struct engine *e);
void engine_flood(struct engine *e, uint32_t bucket, uint16_t vip_port, uint8_t protocol, uint32_t openers);
void engine_crowd(struct engine *e, uint32_t bucket, uint16_t vip_port, uint32_t clients);

/* VIP 192.0.2.10: TCP and UDP 80, TCP 81; SNAT 192.0.2.64 and .65; backends 10.2.0.0 to .2, port 8080. 256 buckets. */
struct engine *engine_new(uint32_t entries, uint32_t index_slots)
{
	struct engine *e = calloc(1, sizeof(*e));
	struct ps_config *c;

	CHECK(e, "out of memory");
	stack_new(&e->stack, 256, entries, index_slots);
	c = e->stack.config;
	/* A second listener of the family, behind its first two. */
	memmove(&c->listener[3], &c->listener[2], sizeof(c->listener[0]) * (c->listeners - 2));
	c->listener[2] = c->listener[0];
	c->listener[2].port = htons(81);
	c->listener[2].number = 8;
	listener_is(e->stack.arena, 8, c->listener[2].address, c->listener[2].port, 6);
	c->listeners++;
	ps_configure(&e->stack.handler, c);
	e->kept_arena = malloc(e->stack.arena->bytes);
	CHECK(e->kept_arena, "out of memory");
	return e;
}

void engine_free(struct engine *e)
{
	stack_free(&e->stack);
	free(e->kept_arena);
	free(e);
}

static uint32_t host_order(const uint8_t *address)
{
	uint32_t value;

	memcpy(&value, address + 12, 4);
	return ntohl(value);
}

/* Stamps and handles a frame as it left a client or a backend; -> the verdict, PS_PARK if the director passes it by. */
int engine_handle(struct engine *e, uint8_t *frame, uint32_t length)
{
	struct stack *t = &e->stack;
	struct ps_stamp stamp;
	struct ps_packet p = { 0 };
	uint8_t verdict;
	bool reply = false;

	CHECK(length <= PS_FRAME_BYTES, "%u bytes", length);
	if (ps_parse(frame, frame + length, &p) != PS_PKT_FLOW || p.family != 4)
		return PS_PARK;
	for (int i = 0; i < 2; i++)
		reply |= !memcmp(p.dst, t->snat[0][i], 16);
	if (!reply && memcmp(p.dst, t->vip[0], 16))
		return PS_PARK;
	if (reply)
		stamp = (struct ps_stamp){ .magic = PS_STAMP_MAGIC,
					   .epoch = 1,
					   .flags = PS_STAMP_REPLY,
					   .bucket = (uint16_t)(ntohs(p.dport) & t->config->mask) };
	else
		stamp = stamp_of_flow(t, (const uint8_t *)p.src, p.sport, (const uint8_t *)p.dst, p.dport, p.protocol);
	memcpy(e->raw, frame, length);
	memset(e->raw + length, 0x5a, PS_UNDO_BYTES);
	verdict = ps_handle(&t->handler, e->raw, length, &stamp);
	e->handled++;
	if (length > PS_UNDO_BYTES && memcmp(e->raw + PS_UNDO_BYTES, frame + PS_UNDO_BYTES, length - PS_UNDO_BYTES))
		e->wrong = "a byte was changed that no undo copy has";
	memcpy(frame, e->raw, length);
	return PS_VERDICT(verdict);
}

/* Time passes, and the sweep comes by. */
void engine_advance(struct engine *e, uint32_t ticks)
{
	struct stack *t = &e->stack;

	t->handler.now += ticks;
	t->handler.now_ns += ticks * (1000000000ull / PS_TICKS_PER_SECOND);
	for (uint32_t b = 0; b < t->arena->buckets; b++)
		t->counters[PS_C_FLOWS_ENDED] +=
			ps_shard_sweep(t->arena, ps_shard_at(t->arena, b), t->config->timeout, t->handler.now);
}

uint32_t engine_flows(const struct engine *e, struct engine_flow *out, uint32_t most)
{
	const struct ps_arena *a = e->stack.arena;
	uint32_t n = 0;

	for (uint32_t bucket = 0; bucket < a->buckets; bucket++) {
		struct ps_shard *s = ps_shard_at(a, bucket);

		for (uint32_t i = 0; s->live && i < a->entries && n < most; i++) {
			const struct ps_entry *f = &ps_shard_flows(a, s)[i];
			const struct ps_listener_name *l = ps_listener_of(a, f);
			const struct ps_backend *b = ps_backend_of(a, f);

			if (f->state == PS_FLOW_FREE)
				continue;
			out[n++] = (struct engine_flow){ .state = f->state,
							 .udp = !!(f->flags & PS_FLOW_UDP),
							 .client = host_order(f->client),
							 .vip = host_order(l->address),
							 .snat = host_order(ps_address(a, f->snat)),
							 .backend = host_order(b->address),
							 .client_port = ntohs(f->client_port),
							 .vip_port = ntohs(l->port),
							 .snat_port = ntohs(f->snat_port),
							 .backend_port = ntohs(b->port),
							 .bucket = bucket,
							 .idle = e->stack.handler.now - f->last_seen };
		}
	}
	return n;
}

/* -> what is wrong with shards or counters, or NULL. */
const char *engine_unsound(struct engine *e)
{
	const struct ps_arena *a = e->stack.arena;
	const uint64_t *count = e->stack.counters;
	uint64_t dropped = 0, live = 0;

	for (int reason = PS_C_DROP_NO_STAMP; reason < PS_COUNTERS; reason++)
		dropped += count[reason];
	for (uint32_t b = 0; !e->wrong && b < a->buckets; b++) {
		struct ps_shard *s = ps_shard_at(a, b);

		live += s->live;
		if (s->live || s->high || s->packets)
			e->wrong = ps_shard_check(a, s);
	}
	if (!e->wrong && count[PS_C_FORWARDED] + dropped != e->handled)
		e->wrong = "forwarded and dropped frames are not those that came";
	if (!e->wrong && count[PS_C_FLOWS_CREATED] - count[PS_C_FLOWS_ENDED] != live)
		e->wrong = "created less ended flows are not those that live";
	return e->wrong;
}

uint32_t engine_bucket(const struct engine *e, uint32_t client, uint16_t client_port, uint16_t vip_port)
{
	uint8_t address[16];

	mapped(address, client);
	return stamp_of_flow(&e->stack, address, htons(client_port), e->stack.vip[0], htons(vip_port), 6).bucket;
}

uint32_t engine_timeout(const struct engine *e, uint32_t state) { return e->stack.config->timeout[state]; }
uint64_t engine_counter(const struct engine *e, uint32_t counter) { return e->stack.counters[counter]; }

/* Remembers everything, so that what follows can be tried and taken back. */
void engine_keep(struct engine *e)
{
	memcpy(e->kept_arena, e->stack.arena, e->stack.arena->bytes);
	e->kept_stack = e->stack;
	e->kept_handled = e->handled;
}

void engine_restore(struct engine *e)
{
	memcpy(e->stack.arena, e->kept_arena, e->stack.arena->bytes);
	e->stack = e->kept_stack;
	e->handled = e->kept_handled;
}

/* A packet without payload, of this bucket. -> its verdict; `frame` is what was sent on. */
static int send_packet(struct engine *e, uint8_t *frame, const struct build *b, uint32_t bucket, bool reply,
		       uint32_t sequence, uint32_t acknowledged)
{
	uint32_t l3, length = b->protocol == 6 ? build_segment(frame, b, sequence, acknowledged, 0)
					       : build_frame(frame, b, &l3);
	struct ps_stamp stamp = stamp_of_flow(&e->stack, b->source, b->sport, b->destination, b->dport, b->protocol);

	stamp.bucket = (uint16_t)bucket;
	if (reply) {
		stamp.flags = PS_STAMP_REPLY;
		stamp.hash = 0;
	}
	e->handled++;
	return PS_VERDICT(ps_handle(&e->stack.handler, frame, length, &stamp));
}

static struct build opener(const struct engine *e, uint32_t network, uint32_t i, uint16_t vip_port, uint8_t protocol)
{
	struct build b = { .dport = htons(vip_port), .protocol = protocol, .tcp_flags = TCP_SYN, .ttl = 64 };

	mapped(b.source, network + i);
	memcpy(b.destination, e->stack.vip[0], 16);
	b.sport = htons((uint16_t)(1024 + i));
	return b;
}

/* Openers from as many sources that nobody has, all of one bucket. */
void engine_flood(struct engine *e, uint32_t bucket, uint16_t vip_port, uint8_t protocol, uint32_t openers)
{
	uint8_t frame[PS_FRAME_BYTES];

	for (uint32_t i = 0; i < openers; i++) {
		struct build b = opener(e, 0xc6120000, i, vip_port, protocol);

		send_packet(e, frame, &b, bucket, false, random_below(~0u), 0);
	}
}

/* As many other clients, each of which opens a connection that both ends hold. */
void engine_crowd(struct engine *e, uint32_t bucket, uint16_t vip_port, uint32_t clients)
{
	uint8_t frame[PS_FRAME_BYTES];

	for (uint32_t i = 0; i < clients; i++) {
		struct build b = opener(e, 0xc6130000, i, vip_port, 6), reply;
		uint32_t ours = random_below(~0u), theirs = random_below(~0u);

		if (send_packet(e, frame, &b, bucket, false, ours, 0) != PS_TRANSMIT)
			continue;
		reply = reply_to(frame);
		reply.tcp_flags = TCP_SYN | TCP_ACK;
		send_packet(e, frame, &reply, bucket, true, theirs, ours + 1);
		b.tcp_flags = TCP_ACK;
		send_packet(e, frame, &b, bucket, false, ours + 1, theirs + 1);
	}
}
