/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A connection list of which any byte may be changed between all that a keeper and a newcomer do by it. Input: steps of
 * four bytes, {what, a, b, c}. Whatever the list says, both stay in their memory, come to an end, keep their shards whole
 * and count each packet.
 */
#include <sys/mman.h>

#include "../c/segments.h"

enum { BUCKETS = 256, USED = 1, FIRST = BUCKETS - USED, ENTRIES = 12, INDEX = 16, SIDES = 2, KEEPER = 0, NEWCOMER = 1 };

static struct stack set[SIDES];
static struct ps_connection_list list;
static uint64_t handled[SIDES];

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* a: who sends, of 16, and whether it is a reply; b: kind and protocol; c: numbers */
static void packet(int side, bool mirrored, uint8_t a, uint8_t b, uint8_t c)
{
	static const uint8_t flags[] = { 2, 16, 17, 18, 4, 20, 2, 16 };
	struct stack *t = &set[side];
	struct ps_stamp stamp = { .magic = PS_STAMP_MAGIC, .epoch = 1 };
	struct build p = { .ttl = 64, .protocol = b & 8 ? 17 : 6, .tcp_flags = flags[b & 7], .payload = c & 8 };
	uint8_t frame[PS_FRAME_BYTES], verdict;
	uint32_t length, l3, family = a >> 6 & 1;

	if (a & 128) {
		stamp.flags = PS_STAMP_REPLY;
		stamp.bucket = (uint16_t)(FIRST + c % USED);
		memcpy(p.source, t->backend[family][b >> 4 & 1], 16);
		memcpy(p.destination, t->snat[family][b >> 5 & 1], 16);
		p.sport = htons(8080);
		p.dport = htons((uint16_t)((4 + a % 16) * BUCKETS + stamp.bucket));
	} else {
		if (family)
			address6(p.source, 9, a % 16);
		else
			mapped(p.source, 0x0a010000 + a % 16);
		memcpy(p.destination, t->vip[family], 16);
		p.sport = htons(1000);
		p.dport = htons(80);
		stamp = stamp_of_flow(t, p.source, p.sport, p.destination, p.dport, p.protocol);
		stamp.bucket = (uint16_t)(FIRST + stamp.bucket % USED);
	}
	length = p.protocol == 6 ? build_segment(frame, &p, c, c >> 4, 0) : build_frame(frame, &p, &l3);
	if (mirrored)
		stamp.flags |= PS_STAMP_MIRROR | (NEWCOMER + 1) << PS_STAMP_SLOT;
	t->handler.list = mirrored ? &list : NULL;
	verdict = ps_handle(&t->handler, frame, length, &stamp);
	CHECK(PS_VERDICT(verdict) <= PS_TRANSMIT, "verdict %u", verdict);
	handled[side]++;
}

static void publish(uint32_t bucket)
{
	struct stack *k = &set[KEEPER];

	ps_connections_publish(&list, ps_connections_of(&list, bucket), k->arena, ps_shard_at(k->arena, bucket),
			       k->handler.now);
}

static void step(uint8_t what, uint8_t a, uint8_t b, uint8_t c)
{
	struct stack *k = &set[KEEPER], *n = &set[NEWCOMER];
	uint32_t bucket = FIRST + a % USED;

	switch (what % 8) {
	case 0:
	case 1: /* the header and the indexes are short, so that they are met often */
		list.at[bucket * list.stride + (what & 8 ? b : (uint32_t)b << 8 | c) % list.stride] = c;
		return;
	case 2:
		ps_kept_sweep(&list, ps_connections_of(&list, bucket), k->arena, ps_shard_at(k->arena, bucket),
			      k->config->timeout, k->handler.now, k->handler.now - b);
		ps_shard_sweep(n->arena, ps_shard_at(n->arena, bucket), n->config->timeout, n->handler.now);
		return;
	case 3:
		if (what & 8)
			publish(bucket);
		for (int i = 0; i < SIDES; i++) {
			set[i].handler.now += b * (c & 15u);
			set[i].handler.now_ns += 100000000ull * b;
		}
		return;
	default: packet(what & 1, true, a, b, c);
	}
}

static void check(int side)
{
	const struct stack *t = &set[side];
	uint64_t sum = t->counters[PS_C_FORWARDED];

	for (uint32_t b = FIRST; b < BUCKETS; b++)
		shard_check(t->arena, ps_shard_at(t->arena, b), t->config->timeout);
	counts_check(t->arena, FIRST, USED, 0);
	for (int reason = PS_C_REJECTED_NOT_KEPT; reason <= PS_C_REJECTED_CLOSING; reason++)
		sum += t->counters[reason];
	for (int reason = PS_C_DROP_NO_STAMP; reason < PS_C_JOURNALS_REFUSED; reason++)
		sum += t->counters[reason];
	CHECK(sum == handled[side], "%lu of %lu packets are counted", (unsigned long)sum, (unsigned long)handled[side]);
}

/* Memory that ends where nobody may read or write, as far as an index of 16 bits leads. */
static uint8_t *guarded(size_t bytes)
{
	size_t behind = 65536 * sizeof(struct ps_connection), whole = (bytes + PS_PAGE - 1) & ~(size_t)(PS_PAGE - 1);
	uint8_t *at = mmap(NULL, whole + behind, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED && !mprotect(at, whole, PROT_READ | PROT_WRITE), "out of memory");
	return at + whole - bytes;
}

/* Everything as it is when the first packets have come and the keeper has published. */
static void begin(void)
{
	static struct stack kept[SIDES];
	static uint8_t *arena[SIDES], *first_list;
	static uint64_t kept_handled;
	size_t bytes = list.buckets * list.stride + CLIENTS * sizeof(ps_client_count);

	if (first_list) {
		for (int i = 0; i < SIDES; i++) {
			memcpy(set[i].arena, arena[i], set[i].arena->bytes);
			set[i].handler = kept[i].handler;
			memcpy(set[i].counters, kept[i].counters, sizeof(kept[i].counters));
			handled[i] = i == KEEPER ? kept_handled : 0;
		}
		memcpy(list.at, first_list, bytes);
		return;
	}
	CHECK(ps_connections_are(&list, BUCKETS, ENTRIES, INDEX, CLIENTS), "numbers");
	bytes = list.buckets * list.stride + CLIENTS * sizeof(ps_client_count);
	list.at = guarded(bytes);
	first_list = malloc(bytes);
	CHECK(first_list, "out of memory");
	random_state = 1;
	for (int i = 0; i < SIDES; i++) {
		stack_new(&set[i], BUCKETS, i == KEEPER ? ENTRIES : ENTRIES / 2, INDEX);
		set[i].engine.slot = (uint32_t)i + 1;
	}
	for (uint8_t a = 0; a < 32; a++)
		packet(KEEPER, false, a % 16, a & 16 ? 8 : 0, 0);
	for (uint32_t b = FIRST; b < BUCKETS; b++)
		publish(b);
	kept_handled = handled[KEEPER];
	memcpy(first_list, list.at, bytes);
	for (int i = 0; i < SIDES; i++) {
		kept[i] = set[i];
		arena[i] = malloc(set[i].arena->bytes);
		CHECK(arena[i], "out of memory");
		memcpy(arena[i], set[i].arena, set[i].arena->bytes);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	begin();
	set[KEEPER].config->kept_reset = size & 1;
	for (; size >= 4; data += 4, size -= 4)
		step(data[0], data[1], data[2], data[3]);
	for (int i = 0; i < SIDES; i++)
		check(i);
	return 0;
}
