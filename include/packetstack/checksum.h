/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Internet checksums, updated incrementally (RFC 1624, equation 3). A difference is a 64-bit sum of
 * ~old + new in 16-bit one's complement arithmetic; 32-bit words may be added whole, since
 * 2^16 = 1 (mod 2^16 - 1). An incremental update keeps a wrong checksum wrong: corruption stays visible.
 */
#ifndef PACKETSTACK_CHECKSUM_H
#define PACKETSTACK_CHECKSUM_H

#include <stdint.h>
#include <string.h>

static inline uint16_t ps_fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

/* Writes `length` (even) bytes of `value` over `field`; -> what that adds to a checksum's difference. */
static inline uint64_t ps_replace(void *field, const void *value, unsigned int length)
{
	uint64_t difference = 0;
	uint8_t *f = field;
	const uint8_t *v = value;

	for (unsigned int i = 0; i < length; i += 2) {
		uint16_t was, is;

		memcpy(&was, f + i, 2);
		memcpy(&is, v + i, 2);
		difference += (uint16_t)~was;
		difference += is;
	}
	memcpy(field, value, length);
	return difference;
}

/* Applies a difference to a checksum field; -> what the change of the field itself adds elsewhere. */
static inline uint64_t ps_checksum_apply(void *field, uint64_t difference)
{
	uint16_t check;

	memcpy(&check, field, 2);
	check = (uint16_t)~ps_fold((uint64_t)(uint16_t)~check + difference);
	return ps_replace(field, &check, 2);
}

/* As above for UDP: 0 means "no checksum" and stays; a computed 0 is sent as 0xffff. */
static inline uint64_t ps_checksum_apply_udp(void *field, uint64_t difference)
{
	uint16_t check;

	memcpy(&check, field, 2);
	if (!check)
		return 0;
	check = (uint16_t)~ps_fold((uint64_t)(uint16_t)~check + difference);
	if (!check)
		check = 0xffff;
	return ps_replace(field, &check, 2);
}

/* One's complement sum over a block, for full computations and tests. */
static inline uint64_t ps_sum(const void *data, unsigned int length, uint64_t sum)
{
	const uint8_t *p = data;
	uint16_t word;

	for (; length > 1; length -= 2, p += 2) {
		memcpy(&word, p, 2);
		sum += word;
	}
	if (length) {
		word = 0;
		memcpy(&word, p, 1);
		sum += word;
	}
	return sum;
}

#endif
