/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writes the first inputs of fuzz_nat into a directory: well-formed frames of every kind, to be mutated, and
 * connections from the first SYN to the last acknowledgement.
 */
#include "../c/frames.h"

static void add(FILE *out, const struct stack *t, const struct build *b, uint16_t flags)
{
	uint8_t frame[2048];
	uint32_t l3, length = build_frame(frame, b, &l3);
	uint8_t head[5] = { (uint8_t)flags, 1, 7, (uint8_t)length, (uint8_t)(length >> 8) };

	(void)t;
	if (b->protocol == 6)
		head[0] |= 128;
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
	for (uint32_t i = 0; i < 8; i++) {
		static const uint8_t flags[] = { TCP_SYN,	    TCP_SYN | TCP_ACK, TCP_ACK, TCP_ACK,
						 TCP_FIN | TCP_ACK, TCP_FIN | TCP_ACK, TCP_ACK };
		struct ps_stamp stamp = { .magic = PS_STAMP_MAGIC, .epoch = 1, .bucket = 1, .hash = 7 };
		uint32_t next[2] = { 1000 * i, 77 }, l3, length;
		struct build b = { .sport = htons(1234),
				   .dport = htons(80),
				   .protocol = 6,
				   .ttl = 64,
				   .tcp_flags = TCP_SYN },
			     back;
		uint8_t frame[2048];
		struct ps_packet p;
		FILE *out;

		mapped(b.source, 0x0a640000 + i);
		memcpy(b.destination, t.vip[0], 16);
		/* The engine itself says where the backend sees it come from. */
		length = build_frame(frame, &b, &l3);
		CHECK(PS_VERDICT(ps_handle(&t.handler, frame, length, &stamp)) == PS_TRANSMIT, "an opener");
		ps_parse(frame, frame + length, &p);
		back = b;
		memcpy(back.source, p.dst, 16);
		memcpy(back.destination, p.src, 16);
		back.sport = p.dport;
		back.dport = p.sport;
		snprintf(path, sizeof(path), "%s/seed-tcp-%02u", argv[1], i);
		out = fopen(path, "wb");
		CHECK(out, "%s: cannot be written", path);
		for (uint32_t n = 0; n < sizeof(flags); n++) {
			bool reply = n == 1 || (n > 2 && n < 6 && (n + i) & 1);
			struct build *now = reply ? &back : &b;

			now->tcp_flags = n == 4 && i & 4 ? TCP_RST : flags[n];
			now->seq = next[reply];
			now->ack = n ? next[!reply] : 0;
			now->window = 4096;
			now->payload = n == 3 ? 8 : 0;
			next[reply] += now->payload + !!(now->tcp_flags & TCP_SYN) + !!(now->tcp_flags & TCP_FIN);
			add(out, &t, now, reply ? PS_STAMP_REPLY : 0);
		}
		fclose(out);
	}
	stack_free(&t);
	return 0;
}
