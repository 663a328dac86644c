/* SPDX-License-Identifier: Apache-2.0 */
/* TCP segments whose numbers matter, made from the frames of frames.h. */
#ifndef PACKETSTACK_TEST_SEGMENTS_H
#define PACKETSTACK_TEST_SEGMENTS_H

#include "frames.h"

/* A TCP frame with these numbers and the whole window open. Its checksum is right, or differs by `spoilt`. -> length */
static inline uint32_t build_segment(uint8_t *frame, const struct build *b, uint32_t sequence, uint32_t acknowledged,
				     uint16_t spoilt)
{
	uint32_t l3, length = build_frame(frame, b, &l3);
	uint8_t *ip = frame + l3, *tcp = ip + (ip[0] >> 4 == 4 ? (ip[0] & 15) * 4u : 40u);

	sequence = htonl(sequence);
	acknowledged = htonl(acknowledged);
	memcpy(tcp + 4, &sequence, 4);
	memcpy(tcp + 8, &acknowledged, 4);
	put16(tcp + 14, 65535);
	l4_checksum(ip, tcp, length - (uint32_t)(tcp - frame), 6);
	tcp[16] ^= (uint8_t)(spoilt >> 8);
	tcp[17] ^= (uint8_t)spoilt;
	return length;
}

/* What the backend must send so that it is a reply to `sent`, the IPv4 TCP frame that an opener became. */
static inline struct build reply_to(const uint8_t *sent)
{
	struct build b = { .protocol = 6, .ttl = 64 };

	mapped(b.source, (uint32_t)sent[30] << 24 | (uint32_t)sent[31] << 16 | (uint32_t)sent[32] << 8 | sent[33]);
	mapped(b.destination, (uint32_t)sent[26] << 24 | (uint32_t)sent[27] << 16 | (uint32_t)sent[28] << 8 | sent[29]);
	memcpy(&b.sport, sent + 36, 2);
	memcpy(&b.dport, sent + 34, 2);
	return b;
}

#endif
