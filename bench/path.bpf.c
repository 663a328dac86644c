// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* The two ends of a path that is measured: the client sends and counts what comes back, the server answers or counts. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "packetstack/abi.h"
#include "packetstack/parse.h"

/* Shared with bench/path.c. */
struct path {
	uint64_t begun;	    /* packets sent, or connections begun */
	uint64_t forgotten; /* of these, given up as lost: for the window alone */
	uint64_t ended;	    /* answers that came back, or connections closed */
	uint32_t flows;	    /* a power of two */
	uint32_t window;    /* most under way; 0: no limit */
	uint32_t vip;
	uint16_t port;
	uint8_t connections; /* TCP connections instead of UDP datagrams */
	uint8_t silent;	     /* the server counts and answers nothing */
	uint8_t gateway[6], client[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, struct path);
} paths SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint64_t);
} arrived SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint32_t);
} out SEC(".maps");

enum { SYN = 0x5002, SYN_ACK = 0x5012, FIN_ACK = 0x5011, ACK = 0x5010, WINDOW = 8192 };
enum { CLIENT_SEQUENCE = 100, SERVER_SEQUENCE = 300 };

PS_INLINE uint16_t fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

PS_INLINE struct path *the_path(void)
{
	uint32_t zero = 0;

	return bpf_map_lookup_elem(&paths, &zero);
}

/* Live frames come back as the last program left them, so every byte of the headers is written. */
SEC("xdp")
int generate(struct xdp_md *ctx)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct path *p = the_path();
	uint32_t flow, source;
	uint16_t sport, length, protocol;

	if (!p || data + 60 > end)
		return XDP_ABORTED;
	if (p->window && (int64_t)(p->begun - p->forgotten - *(volatile uint64_t *)&p->ended) >= (int64_t)p->window)
		return XDP_DROP;
	flow = (uint32_t)p->begun++;
	flow = p->connections ? flow : flow * 2654435761u;
	flow &= p->flows - 1;
	source = __builtin_bswap32(0x0a800000 | flow >> 14); /* 10.128.0.0/9, 16,384 ports an address */
	sport = PS_SWAP16(1024 + (flow & 16383));
	length = p->connections ? PS_SWAP16(40) : PS_SWAP16(46);
	protocol = (uint16_t)(64 | (p->connections ? PS_TCP : PS_UDP) << 8);
	__builtin_memcpy(data, p->gateway, 6);
	__builtin_memcpy(data + 6, p->client, 6);
	*(uint16_t *)(data + 12) = PS_SWAP16(0x0800);
	*(uint16_t *)(data + 14) = 0x0045;
	*(uint16_t *)(data + 16) = length;
	*(uint32_t *)(data + 18) = 0;
	*(uint16_t *)(data + 22) = protocol;
	*(uint16_t *)(data + 24) = (uint16_t)~fold(0x0045ull + length + protocol + source + p->vip);
	*(uint32_t *)(data + 26) = source;
	*(uint32_t *)(data + 30) = p->vip;
	*(uint16_t *)(data + 34) = sport;
	*(uint16_t *)(data + 36) = p->port;
	if (!p->connections) {
		*(uint16_t *)(data + 38) = PS_SWAP16(26);
		*(uint16_t *)(data + 40) = 0;
		*(uint32_t *)(data + 42) = 0;
		*(uint32_t *)(data + 46) = 0;
		*(uint32_t *)(data + 50) = 0;
	} else {
		*(uint32_t *)(data + 38) = __builtin_bswap32(CLIENT_SEQUENCE);
		*(uint32_t *)(data + 42) = 0;
		*(uint16_t *)(data + 46) = PS_SWAP16(SYN);
		*(uint16_t *)(data + 48) = PS_SWAP16(WINDOW);
		*(uint16_t *)(data + 50) =
			(uint16_t)~fold((uint64_t)source + p->vip + PS_SWAP16(20) + PS_SWAP16(PS_TCP) + sport +
					p->port + PS_SWAP16(CLIENT_SEQUENCE) + PS_SWAP16(SYN) + PS_SWAP16(WINDOW));
		*(uint16_t *)(data + 52) = 0;
	}
	return bpf_redirect_map(&out, 0, XDP_DROP);
}

/* Source and destination change places. */
PS_INLINE void turn(uint8_t *data)
{
	uint32_t address = *(uint32_t *)(data + 26), high = *(uint32_t *)data;
	uint16_t port = *(uint16_t *)(data + 34), low = *(uint16_t *)(data + 4);

	*(uint32_t *)(data + 26) = *(uint32_t *)(data + 30);
	*(uint32_t *)(data + 30) = address;
	*(uint16_t *)(data + 34) = *(uint16_t *)(data + 36);
	*(uint16_t *)(data + 36) = port;
	*(uint32_t *)data = *(uint32_t *)(data + 6);
	*(uint16_t *)(data + 4) = *(uint16_t *)(data + 10);
	*(uint32_t *)(data + 6) = high;
	*(uint16_t *)(data + 10) = low;
}

/* A segment without data becomes another one; its checksum with it. */
PS_INLINE void becomes(uint8_t *data, uint16_t flags, uint32_t sequence, uint32_t acknowledged)
{
	uint64_t sum = (uint16_t) ~*(uint16_t *)(data + 50);

	sum += (uint32_t) ~*(uint32_t *)(data + 38);
	sum += (uint32_t) ~*(uint32_t *)(data + 42);
	sum += (uint16_t) ~*(uint16_t *)(data + 46);
	*(uint32_t *)(data + 38) = __builtin_bswap32(sequence);
	*(uint32_t *)(data + 42) = __builtin_bswap32(acknowledged);
	*(uint16_t *)(data + 46) = PS_SWAP16(flags);
	sum += *(uint32_t *)(data + 38);
	sum += *(uint32_t *)(data + 42);
	sum += *(uint16_t *)(data + 46);
	*(uint16_t *)(data + 50) = (uint16_t)~fold(sum);
}

SEC("xdp")
int server(struct xdp_md *ctx)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct path *p = the_path();
	uint32_t zero = 0;
	uint64_t *n = bpf_map_lookup_elem(&arrived, &zero);
	uint16_t flags;

	if (!p || !n || data + 54 > end || *(uint16_t *)(data + 12) != PS_SWAP16(0x0800) ||
	    (data[23] != PS_UDP && data[23] != PS_TCP))
		return XDP_PASS;
	(*n)++;
	if (p->silent)
		return XDP_DROP;
	if (data[23] == PS_UDP) {
		turn(data);
		return XDP_TX;
	}
	flags = PS_SWAP16(*(uint16_t *)(data + 46));
	if (flags != SYN && flags != FIN_ACK)
		return XDP_DROP;
	turn(data);
	if (flags == SYN)
		becomes(data, SYN_ACK, SERVER_SEQUENCE, CLIENT_SEQUENCE + 1);
	else
		becomes(data, FIN_ACK, SERVER_SEQUENCE + 1, CLIENT_SEQUENCE + 2);
	return XDP_TX;
}

/* Five packets make a connection: SYN, SYN|ACK, FIN|ACK, FIN|ACK, ACK. */
SEC("xdp")
int client(struct xdp_md *ctx)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct path *p = the_path();
	uint16_t flags;

	if (!p || data + 54 > end || *(uint16_t *)(data + 12) != PS_SWAP16(0x0800))
		return XDP_PASS;
	if (data[23] == PS_UDP) {
		__sync_fetch_and_add(&p->ended, 1);
		return XDP_DROP;
	}
	if (data[23] != PS_TCP)
		return XDP_PASS;
	flags = PS_SWAP16(*(uint16_t *)(data + 46));
	if (flags != SYN_ACK && flags != FIN_ACK)
		return XDP_DROP;
	turn(data);
	if (flags == SYN_ACK) {
		becomes(data, FIN_ACK, CLIENT_SEQUENCE + 1, SERVER_SEQUENCE + 1);
	} else {
		__sync_fetch_and_add(&p->ended, 1);
		becomes(data, ACK, CLIENT_SEQUENCE + 2, SERVER_SEQUENCE + 2);
	}
	return XDP_TX;
}

/* On the node's devices: a veth takes frames of XDP programs only if its other end has one, too. */
SEC("xdp")
int pass(struct xdp_md *ctx) { return XDP_PASS; }

char program_license[] SEC("license") = "Dual MIT/GPL";
