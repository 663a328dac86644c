// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * The director: takes packets for our addresses, stamps them, sends each to the owner of its bucket.
 * One program for all stacks of a node; no per-flow state, but for fragments.
 *
 * The owner is one 64-bit read of the flow-table word, so owner and epoch never disagree.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "packetstack/abi.h"
#include "packetstack/hash.h"
#include "packetstack/parse.h"

#define NOINLINE    static __attribute__((noinline))
#define FRAGMENT_NS 5000000000ull /* how long a datagram's later fragments are expected */

struct fragment_key {
	uint32_t src[4], dst[4];
	uint32_t id;
	uint32_t protocol;
};

struct fragment {
	uint16_t sport, dport;
	uint32_t spare;
	uint64_t expires_ns;
};

struct counters {
	uint64_t value[PS_D_COUNTERS];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PS_MAX_STACKS *PS_MAX_LISTENERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ps_listener_key4);
	__type(value, struct ps_target);
} listeners4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PS_MAX_STACKS *PS_MAX_LISTENERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ps_listener_key6);
	__type(value, struct ps_target);
} listeners6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PS_MAX_STACKS *PS_MAX_SNAT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, uint32_t);
	__type(value, struct ps_target);
} snat4 SEC(".maps");

struct address6 {
	uint32_t word[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PS_MAX_STACKS *PS_MAX_SNAT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address6);
	__type(value, struct ps_target);
} snat6 SEC(".maps");

/*
 * Copies of listeners4, each at one place only. A listener whose place is taken by another is found in
 * listeners4, at about 20 ns more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PS_DIRECT_SLOTS);
	__type(key, uint32_t);
	__type(value, struct ps_direct);
} direct4 SEC(".maps");

/* The flow table. Written by the agent through its mapping, one atomic store a word. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PS_TABLE_WORDS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, uint64_t);
} words SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PS_TABLE_WORDS);
	__type(key, uint32_t);
	__type(value, uint64_t);
} bucket_packets SEC(".maps");

/* Slot -> the host end of the engine's veth pair. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, PS_MAX_SLOTS);
	__type(key, uint32_t);
	__type(value, uint32_t);
} engines SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
} fragments SEC(".maps");

#include "shedding.h"

/* Stamps the frame for the bucket's owner and sends it there. */
PS_INLINE int send_to_owner(struct xdp_md *ctx, struct counters *count, const struct ps_target *target, uint32_t bucket,
			    uint32_t hash, uint32_t flags)
{
	uint32_t at = target->offset + (bucket & target->mask), slot;
	volatile uint64_t *word_at = bpf_map_lookup_elem(&words, &at);
	uint64_t *packets, word;
	struct ps_stamp *stamp;
	long have;
	int action;

	if (!word_at)
		return XDP_ABORTED;
	word = *word_at; /* the only read */
	slot = ps_word_slot(word);
	if (!slot) {
		count->value[PS_D_DROP_NO_OWNER]++;
		return XDP_DROP;
	}
	/* adjust_meta is relative, and a frame may come with metadata: make it 16 bytes exactly. */
	have = (long)ctx->data - (long)ctx->data_meta;
	if (have != sizeof(*stamp) && bpf_xdp_adjust_meta(ctx, (int)have - (int)sizeof(*stamp))) {
		count->value[PS_D_DROP_METADATA]++;
		return XDP_DROP;
	}
	stamp = (void *)(long)ctx->data_meta;
	if ((void *)(stamp + 1) > (void *)(long)ctx->data)
		return XDP_ABORTED;
	stamp->magic = PS_STAMP_MAGIC;
	stamp->flags = flags;
	stamp->epoch = ps_word_epoch(word);
	stamp->bucket = bucket;
	stamp->queue = ps_word_queue(word);
	stamp->prev_queue = ps_word_prev_queue(word);
	stamp->hash = hash;
	action = bpf_redirect_map(&engines, slot, XDP_DROP);
	if (action != XDP_REDIRECT) {
		count->value[PS_D_DROP_NO_ENGINE]++;
		return XDP_DROP;
	}
	packets = bpf_map_lookup_elem(&bucket_packets, &at);
	if (packets)
		(*packets)++;
	count->value[PS_D_FORWARDED]++;
	return action;
}

PS_INLINE struct ps_target *listener_of(uint8_t family, const uint32_t address[4], uint16_t port, uint8_t protocol)
{
	if (family == 4) {
		struct ps_listener_key4 key = { address[3], port, protocol, 0 };

		return bpf_map_lookup_elem(&listeners4, &key);
	} else {
		struct ps_listener_key6 key = { { address[0], address[1], address[2], address[3] }, port, protocol, 0 };

		return bpf_map_lookup_elem(&listeners6, &key);
	}
}

PS_INLINE struct ps_target *snat_of(uint8_t family, const uint32_t address[4])
{
	if (family == 4) {
		return bpf_map_lookup_elem(&snat4, &address[3]);
	} else {
		struct address6 key = { { address[0], address[1], address[2], address[3] } };

		return bpf_map_lookup_elem(&snat6, &key);
	}
}

PS_INLINE uint64_t hash_of(const struct ps_target *t, uint8_t family, const uint32_t source[4],
			   const uint32_t destination[4], uint16_t sport, uint16_t dport, uint8_t protocol)
{
	return family == 4 ? ps_hash4(t->key0, t->key1, source[3], destination[3], sport, dport, protocol)
			   : ps_hash6(t->key0, t->key1, source, destination, sport, dport, protocol);
}

PS_INLINE void checksum_change(uint16_t *check, uint16_t was, uint16_t is)
{
	uint32_t sum = (uint16_t) ~*check + (uint32_t)(uint16_t)~was + is; /* RFC 1624, equation 3 */

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	*check = (uint16_t)~sum;
}

/* An echo request to a VIP goes back as its reply. Headers with options or extensions: -1, nothing was changed. */
PS_INLINE int echo_reply(struct xdp_md *ctx, const struct ps_packet *p)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end, mac[6];
	uint32_t l3 = p->l3 & 31;
	uint8_t *ip = data + l3, *icmp;
	uint16_t was;

	if (p->family == 4) {
		uint32_t address;

		icmp = ip + 20;
		if (data + 14 > end || icmp + 8 > end || ip[0] != 0x45)
			return -1;
		address = *(uint32_t *)(ip + 12);
		*(uint32_t *)(ip + 12) = *(uint32_t *)(ip + 16);
		*(uint32_t *)(ip + 16) = address;
		was = *(uint16_t *)(ip + 8);
		ip[8] = 64;
		checksum_change((uint16_t *)(ip + 10), was, *(uint16_t *)(ip + 8));
		was = *(uint16_t *)icmp;
		icmp[0] = 0;
	} else {
		icmp = ip + 40;
		if (data + 14 > end || icmp + 8 > end || ip[6] != PS_ICMPV6)
			return -1;
		for (int i = 0; i < 4; i++) {
			uint32_t word = *(uint32_t *)(ip + 8 + 4 * i);

			*(uint32_t *)(ip + 8 + 4 * i) = *(uint32_t *)(ip + 24 + 4 * i);
			*(uint32_t *)(ip + 24 + 4 * i) = word;
		}
		ip[7] = 64;
		was = *(uint16_t *)icmp;
		icmp[0] = 129;
	}
	checksum_change((uint16_t *)(icmp + 2), was, *(uint16_t *)icmp);
	__builtin_memcpy(mac, data, 6);
	__builtin_memcpy(data, data + 6, 6);
	__builtin_memcpy(data + 6, mac, 6);
	return XDP_TX;
}

/* Everything but plain IPv4 TCP and UDP: IPv6, VLAN tags, options, fragments, ICMP. */
NOINLINE int slow(struct xdp_md *ctx, int uplink)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct ps_target *target;
	struct ps_packet p = { 0 };
	uint32_t zero = 0, flags = 0, bucket, stamped;
	struct counters *count = bpf_map_lookup_elem(&counters, &zero);
	struct fragment_key key = { 0 };
	uint64_t hash = 0;

	if (!count)
		return XDP_ABORTED;
	ps_parse(data, data_end, &p);
	switch (p.kind) {
	case PS_PKT_MALFORMED:
		if (uplink)
			goto pass;
		count->value[PS_D_DROP_MALFORMED]++;
		return XDP_DROP;
	case PS_PKT_ECHO:
		/*
		 * Answered on the routed pair alone: XDP_TX on a veth uplink is lost unless its peer runs a
		 * program or GRO, and nobody can tell here.
		 */
		if (uplink || !listener_of(p.family, p.dst, 0, PS_ICMP))
			goto pass;
		if (echo_reply(ctx, &p) != XDP_TX)
			goto pass;
		count->value[PS_D_ECHO_REPLIED]++;
		return XDP_TX;
	case PS_PKT_ICMP_ERROR:
		/* Its embedded packet is one that we sent; else it is not about us. */
		if (p.src[0] != p.outer_dst[0] || p.src[1] != p.outer_dst[1] || p.src[2] != p.outer_dst[2] ||
		    p.src[3] != p.outer_dst[3])
			goto pass;
		target = listener_of(p.family, p.src, p.sport, p.protocol);
		flags = PS_STAMP_ICMP;
		if (target) {
			hash = hash_of(target, p.family, p.dst, p.src, p.dport, p.sport, p.protocol);
			if (target->flags >> PS_WATCH_SHIFT && too_many(count, target, (uint32_t)(hash >> 32), 0, 0))
				return XDP_DROP;
			return send_to_owner(ctx, count, target, (uint32_t)hash & target->mask, (uint32_t)(hash >> 32),
					     flags);
		}
		target = snat_of(p.family, p.src);
		if (!target)
			goto pass;
		bucket = PS_SWAP16(p.sport) & target->mask;
		return send_to_owner(ctx, count, target, bucket, 0, flags | PS_STAMP_REPLY);
	case PS_PKT_FLOW:
	case PS_PKT_FRAGMENT: break;
	default: goto pass;
	}
	if (p.kind == PS_PKT_FRAGMENT || p.first_fragment) {
		struct fragment *known, made = { 0 };

		__builtin_memcpy(key.src, p.src, 16);
		__builtin_memcpy(key.dst, p.dst, 16);
		key.id = p.fragment_id;
		/* IPv6 identifies a packet without its protocol (RFC 8200, 4.5). */
		key.protocol = p.family == 4 ? p.protocol : 0;
		if (p.kind == PS_PKT_FRAGMENT) {
			known = bpf_map_lookup_elem(&fragments, &key);
			if (!known || known->expires_ns < bpf_ktime_get_ns()) {
				if (!listener_of(p.family, p.dst, 0, PS_ICMP) && !snat_of(p.family, p.dst))
					goto pass;
				count->value[PS_D_DROP_FRAGMENT_EARLY]++;
				return XDP_DROP;
			}
			p.sport = known->sport;
			p.dport = known->dport;
			flags = PS_STAMP_FRAGMENT;
		} else {
			made.sport = p.sport;
			made.dport = p.dport;
			made.expires_ns = bpf_ktime_get_ns() + FRAGMENT_NS;
		}
		target = listener_of(p.family, p.dst, p.dport, p.protocol);
		if (p.kind == PS_PKT_FLOW && (target || snat_of(p.family, p.dst)))
			bpf_map_update_elem(&fragments, &key, &made, BPF_ANY);
	} else {
		target = listener_of(p.family, p.dst, p.dport, p.protocol);
	}
	if (target) {
		hash = hash_of(target, p.family, p.src, p.dst, p.sport, p.dport, p.protocol);
		bucket = (uint32_t)hash & target->mask;
		if (target->flags >> PS_WATCH_SHIFT &&
		    too_many(count, target, (uint32_t)(hash >> 32), p.protocol, p.tcp_flags))
			return XDP_DROP;
	} else {
		target = snat_of(p.family, p.dst);
		if (!target)
			goto pass;
		bucket = PS_SWAP16(p.dport) & target->mask;
		flags |= PS_STAMP_REPLY;
	}
	stamped = flags & PS_STAMP_FRAGMENT ? (uint32_t)PS_SWAP16(p.sport) << 16 | PS_SWAP16(p.dport)
					    : (uint32_t)(hash >> 32);
	return send_to_owner(ctx, count, target, bucket, stamped, flags);
pass:
	count->value[uplink ? PS_D_PASSED : PS_D_DROP_NOT_OURS]++;
	return uplink ? XDP_PASS : XDP_DROP;
}

PS_INLINE int direct(struct xdp_md *ctx, int uplink)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end, *ip = data + 14;
	struct ps_listener_key4 key = { 0 };
	struct ps_target *target;
	struct ps_direct *at;
	struct counters *count;
	uint32_t zero = 0, source, slot;
	uint64_t hash, wide;
	uint16_t sport;

	count = bpf_map_lookup_elem(&counters, &zero);
	if (!count)
		return XDP_ABORTED;
	count->value[PS_D_RECEIVED]++;
	if (data + 14 + 20 + 8 > end || *(uint16_t *)(data + 12) != PS_SWAP16(0x0800) || ip[0] != 0x45 ||
	    *(uint16_t *)(ip + 6) & PS_SWAP16(0x3fff) || (ip[9] != PS_TCP && ip[9] != PS_UDP))
		return slow(ctx, uplink);
	source = *(uint32_t *)(ip + 12);
	sport = *(uint16_t *)(ip + 20);
	key.address = *(uint32_t *)(ip + 16);
	key.port = *(uint16_t *)(ip + 22);
	key.protocol = ip[9];
	wide = ps_direct_key(key.address, key.port, key.protocol);
	slot = ps_direct_slot(wide);
	at = bpf_map_lookup_elem(&direct4, &slot);
	if (at && at->key == wide)
		target = &at->target;
	else
		target = bpf_map_lookup_elem(&listeners4, &key);
	if (target) {
		hash = ps_hash4(target->key0, target->key1, source, key.address, sport, key.port, key.protocol);
		if (target->flags >> PS_WATCH_SHIFT &&
		    too_many(count, target, (uint32_t)(hash >> 32), key.protocol, ip + 34 <= end ? ip[33] : 0))
			return XDP_DROP;
		return send_to_owner(ctx, count, target, (uint32_t)hash & target->mask, (uint32_t)(hash >> 32), 0);
	}
	target = bpf_map_lookup_elem(&snat4, &key.address);
	if (target)
		return send_to_owner(ctx, count, target, PS_SWAP16(key.port) & target->mask, 0, PS_STAMP_REPLY);
	count->value[uplink ? PS_D_PASSED : PS_D_DROP_NOT_OURS]++;
	return uplink ? XDP_PASS : XDP_DROP;
}

/* On ps1, behind the routed end: all that comes here was routed to one of our addresses. */
SEC("xdp")
int director_routed(struct xdp_md *ctx) { return direct(ctx, 0); }

/* On an uplink, ahead of the kernel: what is not ours goes on untouched. */
SEC("xdp")
int director_uplink(struct xdp_md *ctx) { return direct(ctx, 1); }

char program_license[] SEC("license") = "Dual MIT/GPL";
