// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* What the director is measured with and beside: a generator, a sink, and programs that do less. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "packetstack/abi.h"
#include "packetstack/parse.h"

/* Written by bench/director.c. */
struct setting {
	uint64_t next;	/* number of the next packet */
	uint32_t flows; /* a power of two */
	uint32_t address;
	uint16_t port;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct setting);
} settings SEC(".maps");

/* 0: where the generator sends, 1: where `table` sends. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 2);
	__type(key, uint32_t);
	__type(value, uint32_t);
} out SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__type(key, uint32_t);
	__type(value, uint64_t);
} bare_table SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 4096);
	__type(key, uint32_t);
	__type(value, uint64_t);
} bare_packets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint64_t);
} sunk SEC(".maps");

/* Live frames come back as the last program left them, so every byte of the header is written. */
SEC("xdp")
int generate(struct xdp_md *ctx)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	uint32_t zero = 0, flow;
	struct setting *s = bpf_map_lookup_elem(&settings, &zero);

	if (!s || data + 42 > end)
		return XDP_ABORTED;
	flow = (uint32_t)(s->next++ * 2654435761u) & (s->flows - 1);
	*(uint32_t *)data = 0x02020202;
	*(uint32_t *)(data + 4) = 0x02020202;
	*(uint32_t *)(data + 8) = 0x02020202;
	*(uint16_t *)(data + 12) = PS_SWAP16(0x0800);
	*(uint16_t *)(data + 14) = 0x0045;
	*(uint16_t *)(data + 16) = PS_SWAP16(46);
	*(uint32_t *)(data + 18) = 0;
	*(uint16_t *)(data + 22) = 64 | PS_UDP << 8;
	*(uint16_t *)(data + 24) = 0;
	*(uint32_t *)(data + 26) = 10 | flow >> 8 << 8; /* 10.x.y.0 and the port: a flow */
	*(uint32_t *)(data + 30) = s->address;
	*(uint16_t *)(data + 34) = PS_SWAP16(1024 + (flow & 255));
	*(uint16_t *)(data + 36) = s->port;
	*(uint16_t *)(data + 38) = PS_SWAP16(26);
	*(uint16_t *)(data + 40) = 0;
	return bpf_redirect_map(&out, 0, XDP_DROP);
}

SEC("xdp")
int sink(struct xdp_md *ctx)
{
	uint32_t zero = 0;
	uint64_t *count = bpf_map_lookup_elem(&sunk, &zero);

	if (count)
		__sync_fetch_and_add(count, 1);
	return XDP_DROP;
}

/* Its run time is what measuring itself costs. */
SEC("xdp")
int empty(struct xdp_md *ctx) { return XDP_DROP; }

/* The least that could be called a director: no hash, no stamp, no listener. */
SEC("xdp")
int table(struct xdp_md *ctx)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	uint64_t *word, *packets;
	uint32_t bucket;

	if (data + 42 > end)
		return XDP_DROP;
	bucket = (*(uint32_t *)(data + 26) >> 8 ^ PS_SWAP16(*(uint16_t *)(data + 34))) & 4095;
	word = bpf_map_lookup_elem(&bare_table, &bucket);
	packets = bpf_map_lookup_elem(&bare_packets, &bucket);
	if (!word || !packets)
		return XDP_DROP;
	(*packets)++;
	return bpf_redirect_map(&out, *word + 1, XDP_DROP);
}

/* Sends the frame back. */
SEC("xdp")
int swap(struct xdp_md *ctx)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	uint32_t high;
	uint16_t low;

	if (data + 14 > end)
		return XDP_DROP;
	high = *(uint32_t *)data;
	low = *(uint16_t *)(data + 4);
	*(uint32_t *)data = *(uint32_t *)(data + 6);
	*(uint16_t *)(data + 4) = *(uint16_t *)(data + 10);
	*(uint32_t *)(data + 6) = high;
	*(uint16_t *)(data + 10) = low;
	return XDP_TX;
}

char program_license[] SEC("license") = "Dual MIT/GPL";
