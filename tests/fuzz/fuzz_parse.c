/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes through the packet parser. The sanitizers see each byte that it reads outside of the frame; what
 * it says of the frame must lie inside of it, and must not depend on what follows the IP packet.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "packetstack/parse.h"

#define CHECK(condition)                                                                        \
	do {                                                                                    \
		if (!(condition)) {                                                             \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
			abort();                                                                \
		}                                                                               \
	} while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The frame in memory of its own, exactly as long as it is. */
static int parse(const uint8_t *data, size_t size, struct ps_packet *p)
{
	uint8_t *frame = malloc(size ? size : 1);
	int kind;

	CHECK(frame);
	memcpy(frame, data, size);
	/* Fields that a kind does not set are not zero by chance. */
	memset(p, 0xa5, sizeof(*p));
	kind = ps_parse(frame, frame + size, p);
	CHECK(!memcmp(frame, data, size));
	free(frame);
	CHECK(kind == p->kind && kind >= PS_PKT_OTHER && kind <= PS_PKT_MALFORMED);
	return kind;
}

static void check(const struct ps_packet *p, size_t size)
{
	uint32_t header = p->family == 4 ? 20 : 40;

	CHECK(p->family == 4 || p->family == 6);
	CHECK(p->l3 == 14 || p->l3 == 18 || p->l3 == 22);
	CHECK(p->l4 >= p->l3 + header && p->l4 <= p->end && p->end <= size);
	CHECK(p->first_fragment <= 1);
	switch (p->kind) {
	case PS_PKT_FLOW:
		CHECK(p->protocol == PS_TCP || p->protocol == PS_UDP);
		CHECK(p->l4 + (p->protocol == PS_TCP ? 20 : 8) <= p->end);
		break;
	case PS_PKT_ICMP_ERROR:
		CHECK(p->protocol == PS_TCP || p->protocol == PS_UDP);
		CHECK(p->inner_l3 == p->l4 + 8 && p->inner_l4 >= p->inner_l3 + header && p->inner_l4 + 8 <= p->end);
		break;
	case PS_PKT_ECHO: CHECK(p->l4 + 8 <= p->end); break;
	}
	if (p->family == 4)
		CHECK(!p->src[0] && !p->src[1] && p->src[2] == 0xffff0000 && !p->dst[0] && p->dst[2] == 0xffff0000);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ps_packet p, shorter;
	int kind = parse(data, size, &p);

	if (kind == PS_PKT_OTHER || kind == PS_PKT_MALFORMED)
		return 0;
	check(&p, size);
	/* Padding says nothing. */
	CHECK(parse(data, p.end, &shorter) == kind);
	CHECK(!memcmp(&p, &shorter, offsetof(struct ps_packet, sport)));
	if (kind == PS_PKT_FLOW || kind == PS_PKT_ICMP_ERROR)
		CHECK(p.sport == shorter.sport && p.dport == shorter.dport);
	/* One byte less than the IP packet says is not that packet. */
	CHECK(parse(data, p.end - 1u, &shorter) == PS_PKT_MALFORMED);
	return 0;
}
