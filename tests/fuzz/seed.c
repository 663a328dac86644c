/* SPDX-License-Identifier: Apache-2.0 */
/* Writes the first inputs of fuzz_nat into a directory: well-formed frames of every kind, to be mutated. */
#include "../c/frames.h"

static void add(FILE *out, const struct stack *t, const struct build *b, uint16_t flags)
{
	uint8_t frame[2048];
	uint32_t l3, length = build_frame(frame, b, &l3);
	uint8_t head[5] = { (uint8_t)flags, 1, 7, (uint8_t)length, (uint8_t)(length >> 8) };

	(void)t;
	fwrite(head, 1, sizeof(head), out);
	fwrite(frame, 1, length, out);
}

int main(int argc, char **argv)
{
	static struct stack t;
	char path[4096];

	CHECK(argc == 2, "usage: %s DIRECTORY", argv[0]);
	stack_new(&t, 256, 16, 32);
	for (uint32_t i = 0; i < 24; i++) {
		bool v6 = i & 1;
		struct build b = { .sport = htons(1234),
				   .dport = htons(80),
				   .protocol = i & 2 ? 17 : 6,
				   .ttl = 64,
				   .tcp_flags = TCP_SYN,
				   .vlans = (uint8_t)(i / 4 % 3),
				   .options = i & 8 ? 8 : 0,
				   .mss_at = (uint8_t)(i % 5),
				   .mss = 1460,
				   .payload = (uint16_t)(i * 9) };
		FILE *out;

		if (v6)
			address6(b.source, 9, i);
		else
			mapped(b.source, 0x0a630000 + i);
		memcpy(b.destination, t.vip[v6], 16);
		snprintf(path, sizeof(path), "%s/seed-%02u", argv[1], i);
		out = fopen(path, "wb");
		CHECK(out, "%s: cannot be written", path);
		add(out, &t, &b, 0);
		b.tcp_flags = TCP_ACK;
		b.mss_at = 0;
		add(out, &t, &b, 0);
		b.options = 0;
		b.more_fragments = true;
		add(out, &t, &b, 0);
		b.fragment_offset = 3;
		add(out, &t, &b, PS_STAMP_FRAGMENT);
		fclose(out);
	}
	stack_free(&t);
	return 0;
}
