/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any frame with any stamp through an engine's packet handler, a few after each other against the same
 * shards. Input: {stamp flags, bucket, hash byte, length low, length high} and that many bytes, repeated.
 * Flag 128: the TCP checksum is made right, for a wrong one changes no state. After each input the shards are
 * whole and the counters add up.
 */
#include "../c/frames.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void right_checksum(uint8_t *frame, uint32_t length)
{
	struct ps_packet p = { 0 };

	if (ps_parse(frame, frame + length, &p) == PS_PKT_FLOW && p.protocol == 6)
		l4_checksum(frame + p.l3, frame + p.l4, p.end - p.l4, 6);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct stack t;
	static uint64_t handled;
	uint64_t sum = 0;

	if (!t.arena) {
		stack_new(&t, 256, 16, 32);
		t.config->mtu = 1400;
		for (uint32_t i = 0; i < t.config->listeners; i++) {
			t.config->listener[i].max_flows = 20;
			t.config->listener[i].max_flows_per_client = 3;
			t.config->listener[i].flags = i & 1 ? PS_LISTENER_REFUSE : PS_LISTENER_RESET_BACKEND_DOWN;
		}
	}
	while (size > 5) {
		struct ps_stamp stamp = { .magic = PS_STAMP_MAGIC,
					  .epoch = 1,
					  .flags = data[0] & 15,
					  .bucket = data[1] & 3,
					  .hash = data[2] };
		uint32_t length = (uint32_t)data[3] | (uint32_t)(data[4] & 7) << 8;
		uint8_t *frame, before[2048], verdict;
		bool right = data[0] & 128;

		data += 5;
		size -= 5;
		if (length > size)
			length = (uint32_t)size;
		/* Exactly as long as the frame: the sanitizer sees each byte read behind it. */
		frame = malloc(length ? length : 1);
		CHECK(frame, "out of memory");
		memcpy(frame, data, length);
		if (right)
			right_checksum(frame, length);
		memcpy(before, frame, length);
		t.handler.now += stamp.hash & 7;
		verdict = ps_handle(&t.handler, frame, length, &stamp);
		CHECK(PS_VERDICT(verdict) <= PS_TRANSMIT, "verdict %u", verdict);
		if (length > PS_UNDO_BYTES)
			CHECK(!memcmp(frame + PS_UNDO_BYTES, before + PS_UNDO_BYTES, length - PS_UNDO_BYTES),
			      "a byte behind the first %d was changed", PS_UNDO_BYTES);
		free(frame);
		handled++;
		data += length;
		size -= length;
	}
	for (int reason = PS_C_DROP_NO_STAMP; reason < PS_COUNTERS; reason++)
		sum += t.counters[reason];
	CHECK(t.counters[PS_C_FORWARDED] + sum == handled, "%lu forwarded, %lu dropped", t.counters[PS_C_FORWARDED],
	      sum);
	for (uint32_t b = 0; b < 4; b++) {
		ps_shard_sweep(t.arena, ps_shard_at(t.arena, b), t.config->timeout, t.handler.now);
		shard_check(t.arena, ps_shard_at(t.arena, b), t.config->timeout);
	}
	counts_check(t.arena, 0, 4, 0);
	return 0;
}
