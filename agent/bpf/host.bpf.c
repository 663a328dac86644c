// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * The node's side of an engine's transmissions (tc). The engine knows no next hops: here the FIB
 * decides, and the kernel resolves neighbours. What the FIB cannot decide (local processes, a path
 * with a smaller MTU) enters the kernel through the routed end's ingress, where even a strict
 * reverse-path filter accepts our addresses as sources.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "packetstack/abi.h"
#include "packetstack/parse.h"

#include "addresses.h"

enum { AF_INET = 2, AF_INET6 = 10 };

struct routed {
	uint32_t ifindex;
	uint8_t mac[8];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct routed);
} routed SEC(".maps");

enum { HOPS = 1024, TURN_SHIFT = 8 /* of jiffies: 0.26 s to 2.6 s, as the kernel was built */ };

/*
 * When a packet last took the kernel's own way to a next hop: 32 bits of the hop's hash, 32 of the turn. Of two that
 * share a place, each takes that way whenever the other was there last, which costs time alone.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HOPS);
	__type(key, uint32_t);
	__type(value, uint64_t);
} hops SEC(".maps");

/*
 * Does this packet go the kernel's own way? One each turn to each next hop does: by its use alone the kernel learns that
 * it has to ask a neighbour whether it is still there. With the FIB's MAC alone, one that has changed would never be found.
 */
PS_INLINE int is_due(const struct bpf_fib_lookup *fib)
{
	uint64_t hash = ((uint64_t)fib->ipv6_dst[0] << 32 | fib->ipv6_dst[1]) * 0x9e3779b97f4a7c15;
	uint64_t now = (uint32_t)(bpf_jiffies64() >> TURN_SHIFT), *last;
	uint32_t place;

	hash ^= ((uint64_t)fib->ipv6_dst[2] << 32 | fib->ipv6_dst[3]) + fib->ifindex;
	hash *= 0xd6e8feb86659fd93;
	place = hash >> 54;
	now |= hash << 10 & 0xffffffff00000000;
	last = bpf_map_lookup_elem(&hops, &place);
	if (!last || *last == now)
		return 0;
	*last = now;
	return 1;
}

struct host_counts {
	uint64_t value[PS_H_COUNTERS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct host_counts);
} host_counters SEC(".maps");

/* slot * PS_MAX_CPUS + CPU -> fence of the last egress marker that came by */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PS_MAX_SLOTS *PS_MAX_CPUS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, uint64_t);
} egress SEC(".maps");

/* Whose host end this is; set before the program is loaded. */
const volatile struct ps_end end SEC(".rodata.end") = { 0 };

/* An engine may answer for itself alone, and only what the agent has asked: the agent alone knows the token too. */
static int is_own_marker(struct __sk_buff *skb)
{
	struct ps_marker marker;

	return !bpf_skb_load_bytes(skb, 14, &marker, sizeof(marker)) && marker.magic == PS_MARKER_MAGIC &&
	       marker.kind == PS_MARKER_EGRESS && marker.slot == end.slot && marker.token == end.token &&
	       marker.cpu < PS_MAX_CPUS;
}

/*
 * Is this source one of the stack's: a listener, or a SNAT address? `port` and `protocol` are 0 where a packet shows no
 * ports in the usual place (fragments, options, ICMP): then the address alone counts.
 */
PS_INLINE int is_own_source(uint32_t family, const uint32_t address[4], uint16_t port, uint8_t protocol)
{
	uint8_t version = family == AF_INET ? 4 : 6;
	struct ps_target *target = listener_of(version, address, port, protocol ? protocol : PS_ICMP);

	if (!target)
		target = snat_of(version, address);
	return target && target->stack == end.stack;
}

SEC("tc")
int host_egress(struct __sk_buff *skb)
{
	struct bpf_fib_lookup fib = { .ifindex = skb->ingress_ifindex };
	uint32_t zero = 0, source[4] = { 0 };
	struct host_counts *count;
	uint8_t *data, *data_end, *ip, protocol = 0;
	struct routed *r;
	uint16_t port = 0;
	long result;

	r = bpf_map_lookup_elem(&routed, &zero);
	count = bpf_map_lookup_elem(&host_counters, &zero);
	if (!r || !count)
		return TC_ACT_SHOT;
	count->value[PS_H_RECEIVED]++;
	if (skb->protocol == PS_SWAP16(PS_MARKER_ETHERTYPE)) {
		if (!is_own_marker(skb)) {
			count->value[PS_H_DROP_FORGED_MARKER]++;
			return TC_ACT_SHOT;
		}
		count->value[PS_H_MARKERS]++;
		return bpf_redirect(r->ifindex, BPF_F_INGRESS);
	}
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	ip = data + 14;
	if (skb->protocol == PS_SWAP16(0x0800) && ip + 20 <= data_end) {
		fib.family = AF_INET;
		fib.tos = ip[1];
		fib.l4_protocol = ip[9];
		fib.tot_len = PS_SWAP16(*(uint16_t *)(ip + 2));
		fib.ipv4_src = source[3] = *(uint32_t *)(ip + 12);
		fib.ipv4_dst = *(uint32_t *)(ip + 16);
		if (ip[0] == 0x45 && !(*(uint16_t *)(ip + 6) & PS_SWAP16(0x3fff)) && ip + 22 <= data_end &&
		    (ip[9] == PS_TCP || ip[9] == PS_UDP)) {
			protocol = ip[9];
			port = *(uint16_t *)(ip + 20);
		}
	} else if (skb->protocol == PS_SWAP16(0x86dd) && ip + 40 <= data_end) {
		fib.family = AF_INET6;
		fib.l4_protocol = ip[6];
		fib.tot_len = PS_SWAP16(*(uint16_t *)(ip + 4)) + 40;
		for (int i = 0; i < 4; i++) {
			fib.ipv6_src[i] = source[i] = *(uint32_t *)(ip + 8 + 4 * i);
			fib.ipv6_dst[i] = *(uint32_t *)(ip + 24 + 4 * i);
		}
		if ((ip[6] == PS_TCP || ip[6] == PS_UDP) && ip + 42 <= data_end) {
			protocol = ip[6];
			port = *(uint16_t *)(ip + 40);
		}
	} else {
		count->value[PS_H_DROP_NOT_IP]++;
		return TC_ACT_SHOT;
	}
	if (!is_own_source(fib.family, source, port, protocol)) {
		count->value[PS_H_DROP_FOREIGN_SOURCE]++;
		return TC_ACT_SHOT;
	}
	/* A lookup as for a packet that came in on the routed end: its forwarding settings are ours. */
	fib.ifindex = r->ifindex;
	result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (result == BPF_FIB_LKUP_RET_SUCCESS && fib.ifindex != r->ifindex) {
		count->value[PS_H_FORWARDED]++;
		if (is_due(&fib)) {
			struct bpf_redir_neigh hop = { .nh_family = fib.family };

			__builtin_memcpy(hop.ipv6_nh, fib.ipv6_dst, 16); /* a gateway, if there is one */
			return bpf_redirect_neigh(fib.ifindex, &hop, sizeof(hop), 0);
		}
		__builtin_memcpy(data, fib.dmac, 6);
		__builtin_memcpy(data + 6, fib.smac, 6);
		return bpf_redirect(fib.ifindex, 0);
	}
	if (result == BPF_FIB_LKUP_RET_NO_NEIGH && fib.ifindex != r->ifindex) {
		count->value[PS_H_RESOLVED]++;
		return bpf_redirect_neigh(fib.ifindex, 0, 0, 0);
	}
	count->value[PS_H_TO_KERNEL]++;
	__builtin_memcpy(data, r->mac, 6);
	return bpf_redirect(r->ifindex, BPF_F_INGRESS);
}

/* On the routed end's ingress, the last queue of the node: counts egress markers, which host ends have let through. */
SEC("tc")
int routed_ingress(struct __sk_buff *skb)
{
	struct ps_marker marker;
	uint64_t *seen;
	uint32_t key;

	if (skb->protocol != PS_SWAP16(PS_MARKER_ETHERTYPE))
		return TC_ACT_OK;
	if (bpf_skb_load_bytes(skb, 14, &marker, sizeof(marker)) || marker.magic != PS_MARKER_MAGIC ||
	    marker.kind != PS_MARKER_EGRESS || marker.cpu >= PS_MAX_CPUS || marker.slot >= PS_MAX_SLOTS)
		return TC_ACT_SHOT;
	key = (uint32_t)marker.slot * PS_MAX_CPUS + marker.cpu;
	seen = bpf_map_lookup_elem(&egress, &key);
	if (seen)
		*(volatile uint64_t *)seen = marker.fence;
	return TC_ACT_SHOT;
}

/* A veth end takes what the other end sends back by XDP_TX (echo replies) only if it runs a program itself. */
SEC("xdp")
int routed_pass(struct xdp_md *ctx) { return XDP_PASS; }

char program_license[] SEC("license") = "Dual MIT/GPL";
