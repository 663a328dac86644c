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

#include "addresses.h"

#define NOINLINE static __attribute__((noinline))
/* The verifier checks a function that is not static once, with any arguments, and not once for each way to each call. */
#define APART	 __attribute__((noinline))

enum limits {
	FRAGMENT_WAYS = 8,
	FRAGMENT_SETS = 128,  /* of each of a stack's two regions: 2048 datagrams under way */
	FRAGMENT_TICKS = 298, /* 5 s: how long a datagram's later fragments are expected */
	QUOTED = 128,	      /* bytes of a packet that an ICMP error can repeat */
	ANSWERS = 200,	      /* ICMP errors, and as many resets, of a CPU in a second */
};

/* The first fragment of a datagram. What it belongs to is known by a keyed hash alone: nobody can aim at another's. */
struct fragment {
	uint64_t mark;	/* upper 40 bits of the hash, 24 bits of the tick it came at; 0 = free */
	uint64_t ports; /* source and destination port, protocol, lower 24 bits of the hash */
};

struct fragment_set {
	struct fragment way[FRAGMENT_WAYS];
};

struct allowance {
	uint64_t since_ns;
	uint32_t answers[2];
	uint64_t spare;
};

struct scratch {
	uint8_t bytes[40 + 20 + QUOTED + 4];
};

struct counters {
	uint64_t value[PS_D_COUNTERS];
};

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

/* Slot -> the host end of the engine's veth pair. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, PS_MAX_SLOTS);
	__type(key, uint32_t);
	__type(value, uint32_t);
} engines SEC(".maps");

/* Four buckets' pairs. Written by the agent through its mapping, before the word that names a previous owner. */
struct pair_numbers {
	uint16_t pair[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PS_TABLE_WORDS / 4);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, struct pair_numbers);
} pair_numbers SEC(".maps");

/* The host ends of two engines, owner and previous owner, that get a copy each. */
struct pair {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 2);
	__type(key, uint32_t);
	__type(value, uint32_t);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, PS_MAX_PAIRS);
	__type(key, uint32_t);
	__type(value, uint32_t);
	__array(values, struct pair);
} pairs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct counters);
} counters SEC(".maps");

/*
 * First fragments. A stack's are in its own two regions, so no other's flood takes their room: "kept", in sets by source
 * and destination, where each has its place until it expires, and "recent" for what finds none, where the oldest goes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PS_MAX_STACKS * 2 * FRAGMENT_SETS);
	__type(key, uint32_t);
	__type(value, struct fragment_set);
} fragments SEC(".maps");

/* ifindex & (PS_MAX_UPLINKS - 1), or one of the places behind it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PS_MAX_UPLINKS);
	__type(key, uint32_t);
	__type(value, struct ps_uplink);
} uplinks SEC(".maps");

/* Address -> ps_own_kind. The filter has a bit for each: most sources are seen not to be here without a look. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 17);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address6);
	__type(value, uint32_t);
} own SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, struct ps_own_filter);
} own_filter SEC(".maps");

/* Sources that a listener with PS_TARGET_ALLOWED takes packets from. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, PS_MAX_STACKS *PS_MAX_LISTENERS *PS_MAX_ALLOWED);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ps_allowed4);
	__type(value, uint32_t);
} allowed4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, PS_MAX_STACKS *PS_MAX_LISTENERS *PS_MAX_ALLOWED);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ps_allowed6);
	__type(value, uint32_t);
} allowed6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct allowance);
} allowances SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct scratch);
} scratches SEC(".maps");

/* The packet at hand, where it takes more than a look at fixed places. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct ps_packet);
} parsed SEC(".maps");

PS_INLINE int refuse(struct counters *count, uint32_t why)
{
	if (why < PS_D_COUNTERS)
		count->value[why]++;
	return XDP_DROP;
}

PS_INLINE int not_ours(struct counters *count, const struct ps_uplink *here)
{
	count->value[here ? PS_D_PASSED : PS_D_DROP_NOT_OURS]++;
	return here ? XDP_PASS : XDP_DROP;
}

/* ---- who may send ------------------------------------------------------------------------------------------- */

/* The uplink that the frame came in on, if the frame is for the device itself. */
PS_INLINE struct ps_uplink *uplink_of(struct xdp_md *ctx)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	uint32_t ifindex = ctx->ingress_ifindex;
	struct ps_uplink *at;

	for (uint32_t i = 0; i < PS_UPLINK_PROBES; i++) {
		uint32_t place = (ifindex + i) & (PS_MAX_UPLINKS - 1);

		at = bpf_map_lookup_elem(&uplinks, &place);
		if (!at)
			return 0;
		if (at->ifindex != ifindex)
			continue;
		if (data + 14 > end || *(uint32_t *)data != at->mac_high || *(uint16_t *)(data + 4) != at->mac_low)
			return 0;
		return at;
	}
	return 0;
}

/* 0.0.0.0/8, 127.0.0.0/8, and all from 224.0.0.0 on. */
PS_INLINE int martian4(uint32_t source)
{
	uint8_t first = (uint8_t)source;

	return (uint8_t)(first - 1) >= 223 || first == 127;
}

/* ::, ::1, IPv4-mapped, multicast, and link-local, which no router forwards. */
PS_INLINE int martian6(const uint32_t s[4])
{
	if ((s[0] & 0xff) == 0xff || (s[0] & 0xc0ff) == 0x80fe)
		return 1;
	return !s[0] && !s[1] && (s[2] == 0xffff0000 || (!s[2] && (!s[3] || s[3] == 0x01000000)));
}

/* May the address be one of our own? A bit that is not set is a sure no. */
PS_INLINE int maybe_own(uint32_t mixed)
{
	uint32_t zero = 0, bit = ps_own_bit(mixed);
	struct ps_own_filter *filter = bpf_map_lookup_elem(&own_filter, &zero);

	return filter && filter->word[bit >> 6] >> (bit & 63) & 1;
}

/* Why a packet from this address of our own is refused, or 0. The node's are those of clients on it, on the pair. */
APART int own_fault(const struct address6 *source, int uplink)
{
	uint32_t *kind = source ? bpf_map_lookup_elem(&own, source) : 0;

	if (!kind)
		return 0;
	if (*kind & PS_OWN_BROADCAST)
		return PS_D_DROP_MARTIAN;
	return *kind & PS_OWN_STACK || (uplink && *kind & PS_OWN_NODE) ? PS_D_DROP_OWN_SOURCE : 0;
}

/* Why nobody can be behind this source, or 0. */
PS_INLINE int source_fault(const struct ps_uplink *here, uint8_t family, const uint32_t source[4])
{
	struct address6 key = { { source[0], source[1], source[2], source[3] } };

	if (family == 4 ? martian4(source[3]) : martian6(source))
		return PS_D_DROP_MARTIAN;
	if (!maybe_own(family == 4 ? source[3] : ps_own_mix(source)))
		return 0;
	return own_fault(&key, here != 0);
}

APART int allowed(const struct ps_packet *p)
{
	if (!p)
		return 0;
	if (p->family == 4) {
		struct ps_allowed4 key = { 96, { p->dst[3], p->dport, p->protocol, 0 }, p->src[3] };

		return bpf_map_lookup_elem(&allowed4, &key) != 0;
	} else {
		struct ps_allowed6 key = { 288,
					   { { p->dst[0], p->dst[1], p->dst[2], p->dst[3] }, p->dport, p->protocol, 0 },
					   { p->src[0], p->src[1], p->src[2], p->src[3] } };

		return bpf_map_lookup_elem(&allowed6, &key) != 0;
	}
}

/* Is the frame in a VLAN in which the node is? What the driver has taken off cannot be seen here. */
PS_INLINE int in_vlan(const struct ps_uplink *here, const uint8_t *data, const uint8_t *end)
{
	uint16_t type, inner;
	uint32_t id;

	if (data + 18 > end)
		return 1;
	type = *(uint16_t *)(data + 12);
	if (type != PS_SWAP16(0x8100) && type != PS_SWAP16(0x88a8))
		return 1;
	inner = *(uint16_t *)(data + 16);
	if (type != PS_SWAP16(0x8100) || inner == PS_SWAP16(0x8100) || inner == PS_SWAP16(0x88a8))
		return 0;
	id = PS_SWAP16(*(uint16_t *)(data + 14)) & 4095;
	return !id || here->vlans[id >> 6] >> (id & 63) & 1;
}

/*
 * Do the options of this IPv4 header, of `size` bytes, hold a source route? Hosts and routers refuse those (RFC 7126, 4.3
 * and 4.4). What is no well-formed option ends the search.
 */
APART int source_route(struct xdp_md *ctx, uint32_t l3, uint32_t size)
{
	uint8_t options[64] = { 0 };
	uint32_t at = 0;

	size = (size - 20) & 63;
	if (!size || size > 40 || bpf_xdp_load_bytes(ctx, l3 + 20, options, size))
		return 0;
	for (int i = 0; i < 40 && at < 40; i++) {
		uint8_t kind = options[at & 63];
		uint32_t length = options[(at + 1) & 63];

		if (kind == 131 || kind == 137)
			return at + 1 < size;
		if (!kind || (kind != 1 && length < 2))
			return 0;
		at += kind == 1 ? 1 : length;
	}
	return 0;
}

#include "shedding.h"
#include "stamp.h"

/* ---- what is done ------------------------------------------------------------------------------------------- */

/* A copy each to the owner and to the previous owner of the word at this place. -> as bpf_redirect_map */
APART int mirror(uint32_t at)
{
	uint32_t four = at / 4, number;
	struct pair_numbers *numbers = bpf_map_lookup_elem(&pair_numbers, &four);
	void *pair;

	if (!numbers)
		return XDP_DROP;
	number = *(volatile uint16_t *)&numbers->pair[at & 3];
	pair = bpf_map_lookup_elem(&pairs, &number);
	return pair ? (int)bpf_redirect_map(pair, 0, BPF_F_BROADCAST) : XDP_DROP;
}

/* Stamps the frame for the bucket's owner and sends it there. */
PS_INLINE int send_to_owner(struct xdp_md *ctx, struct counters *count, const struct ps_uplink *here,
			    const struct ps_target *target, uint32_t bucket, uint32_t hash, uint32_t flags)
{
	uint32_t at = target->offset + (bucket & target->mask), slot;
	volatile uint64_t *word_at = bpf_map_lookup_elem(&words, &at);
	uint64_t word;
	int action;

	if (!word_at)
		return XDP_ABORTED;
	word = *word_at; /* the only read */
	slot = ps_word_slot(word);
	if (!slot) {
		count->value[PS_D_DROP_NO_OWNER]++;
		return XDP_DROP;
	}
	if (here && ctx->data_end - ctx->data > PS_MAX_FRAME) {
		/* No engine's interface takes it. The kernel cuts it up or tells its sender, as on any way to the pair. */
		count->value[PS_D_PASSED_TOO_LONG]++;
		return XDP_PASS;
	}
	if ((here && here->flags & PS_UPLINK_NO_METADATA) || !stamp_frame(ctx, word, bucket, hash, flags)) {
		/* Some drivers leave no room (ENA, netvsc). The routed pair's does. */
		count->value[here ? PS_D_PASSED_METADATA : PS_D_DROP_METADATA]++;
		return here ? XDP_PASS : XDP_DROP;
	}
	action = ps_word_prev_slot(word) ? mirror(at) : (int)bpf_redirect_map(&engines, slot, XDP_DROP);
	if (action != XDP_REDIRECT) {
		count->value[PS_D_DROP_NO_ENGINE]++;
		return XDP_DROP;
	}
	count->value[PS_D_FORWARDED]++;
	if (ps_word_prev_slot(word))
		count->value[PS_D_MIRRORED]++;
	return action;
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

PS_INLINE void turn_round(uint8_t *data)
{
	uint8_t mac[6];

	__builtin_memcpy(mac, data, 6);
	__builtin_memcpy(data, data + 6, 6);
	__builtin_memcpy(data + 6, mac, 6);
}

/*
 * An echo request to a VIP goes back as its reply, each fragment of one by itself. Options and extension headers stay
 * as they are. Headers too long to reach: -1, nothing was changed.
 */
PS_INLINE int echo_reply(struct xdp_md *ctx, const struct ps_packet *p)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	uint32_t l3 = p->l3 & 31, l4 = p->l4 & 511;
	uint8_t *ip = data + l3, *icmp = data + l4;
	uint16_t was;

	if (data + 14 > end || l4 != p->l4)
		return -1;
	if (p->kind == PS_PKT_ECHO) { /* else a later fragment */
		if (icmp + 8 > end)
			return -1;
		was = *(uint16_t *)icmp;
		icmp[0] = p->family == 4 ? 0 : 129;
		checksum_change((uint16_t *)(icmp + 2), was, *(uint16_t *)icmp);
	}
	if (p->family == 4) {
		uint32_t address;

		if (ip + 20 > end)
			return -1;
		address = *(uint32_t *)(ip + 12);
		*(uint32_t *)(ip + 12) = *(uint32_t *)(ip + 16);
		*(uint32_t *)(ip + 16) = address;
		was = *(uint16_t *)(ip + 8);
		ip[8] = 64;
		checksum_change((uint16_t *)(ip + 10), was, *(uint16_t *)(ip + 8));
	} else {
		if (ip + 40 > end)
			return -1;
		for (int i = 0; i < 4; i++) {
			uint32_t word = *(uint32_t *)(ip + 8 + 4 * i);

			*(uint32_t *)(ip + 8 + 4 * i) = *(uint32_t *)(ip + 24 + 4 * i);
			*(uint32_t *)(ip + 24 + 4 * i) = word;
		}
		ip[7] = 64;
	}
	turn_round(data);
	return XDP_TX;
}

/* Whether this CPU may answer once more in this second. which: 0 ICMP errors, 1 resets */
PS_INLINE int may_answer(uint32_t which)
{
	uint32_t zero = 0;
	struct allowance *a = bpf_map_lookup_elem(&allowances, &zero);
	uint64_t now = bpf_ktime_get_ns();

	if (!a)
		return 0;
	if (now - a->since_ns > 1000000000ull) {
		a->since_ns = now;
		a->answers[0] = a->answers[1] = 0;
	}
	return a->answers[which & 1]++ < ANSWERS;
}

PS_INLINE uint16_t fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

/* An IP header from the packet's destination to its source, before `length` bytes of `protocol`. -> its size */
PS_INLINE uint32_t answer_header(uint8_t *ip, const struct ps_packet *p, uint8_t protocol, uint32_t length)
{
	if (p->family == 4) {
		*(uint32_t *)ip = 0x0045 | (uint32_t)PS_SWAP16(20 + length) << 16;
		*(uint32_t *)(ip + 4) = 0;
		*(uint32_t *)(ip + 8) = 64 | (uint32_t)protocol << 8;
		*(uint32_t *)(ip + 12) = p->dst[3];
		*(uint32_t *)(ip + 16) = p->src[3];
		*(uint16_t *)(ip + 10) = fold((uint64_t)bpf_csum_diff(0, 0, (void *)ip, 20, 0));
		return 20;
	}
	*(uint32_t *)ip = 0x60;
	*(uint32_t *)(ip + 4) = PS_SWAP16(length) | (uint32_t)protocol << 16 | 64u << 24;
	for (int i = 0; i < 4; i++) {
		*(uint32_t *)(ip + 8 + 4 * i) = p->dst[i];
		*(uint32_t *)(ip + 24 + 4 * i) = p->src[i];
	}
	return 40;
}

/* What a checksum of the answer begins with: the pseudo header. ICMP has none in IPv4. */
PS_INLINE uint32_t pseudo(uint8_t *ip, const struct ps_packet *p, uint8_t protocol, uint32_t length)
{
	uint32_t sum = PS_SWAP16(length) + PS_SWAP16((uint16_t)protocol);

	return p->family == 4 ? (uint32_t)bpf_csum_diff(0, 0, (void *)(ip + 12), 8, sum)
			      : (uint32_t)bpf_csum_diff(0, 0, (void *)(ip + 8), 32, sum);
}

/* The frame becomes its Ethernet header, turned round, and these bytes. It grows at its head: veth leaves room there alone. */
PS_INLINE int answer(struct xdp_md *ctx, uint8_t *bytes, uint32_t size)
{
	uint8_t ethernet[14];

	if (bpf_xdp_load_bytes(ctx, 0, ethernet, 14) ||
	    bpf_xdp_adjust_head(ctx, (int)bpf_xdp_get_buff_len(ctx) - 14 - (int)size))
		return -1;
	turn_round(ethernet);
	if (bpf_xdp_store_bytes(ctx, 0, ethernet, 14) || bpf_xdp_store_bytes(ctx, 14, bytes, size))
		return -1;
	return XDP_TX;
}

/* The packet goes back inside an ICMP error. -> XDP_TX, or -1: nothing was changed */
APART int icmp_error(struct xdp_md *ctx, const struct ps_packet *p, uint32_t type, uint32_t code)
{
	uint32_t zero = 0, quoted, header;
	struct scratch *s = bpf_map_lookup_elem(&scratches, &zero);
	uint8_t *icmp;
	uint16_t sum;

	if (!s || !p)
		return -1;
	quoted = (uint32_t)p->l4 - p->l3 + 8;
	if (p->l3 != 14 || quoted < 28 || quoted > QUOTED || !may_answer(0))
		return -1;
	__builtin_memset(s, 0, sizeof(*s));
	header = p->family == 4 ? 20 : 40;
	icmp = s->bytes + header;
	if (bpf_xdp_load_bytes(ctx, 14, icmp + 8, quoted))
		return -1;
	answer_header(s->bytes, p, p->family == 4 ? PS_ICMP : PS_ICMPV6, 8 + quoted);
	icmp[0] = (uint8_t)type;
	icmp[1] = (uint8_t)code;
	/* Zeros behind what is quoted add nothing. */
	sum = fold((uint64_t)bpf_csum_diff(0, 0, (void *)icmp, 8 + QUOTED,
					   p->family == 4 ? 0 : pseudo(s->bytes, p, PS_ICMPV6, 8 + quoted)));
	*(uint16_t *)(icmp + 2) = sum;
	return answer(ctx, s->bytes, header + 8 + quoted);
}

/* A reset for a segment that nobody waits for (RFC 9293, 3.10.7.1). -> XDP_TX, or -1: nothing was changed */
APART int reset(struct xdp_md *ctx, const struct ps_packet *p)
{
	uint32_t zero = 0, header, sequence, length;
	struct scratch *s = bpf_map_lookup_elem(&scratches, &zero);
	uint8_t theirs[20], *tcp;

	if (!s || !p || p->l3 != 14 || p->tcp_flags & PS_TCP_RST || bpf_xdp_load_bytes(ctx, p->l4, theirs, 20) ||
	    !may_answer(1))
		return -1;
	__builtin_memset(s, 0, sizeof(*s));
	header = p->family == 4 ? 20 : 40;
	tcp = s->bytes + header;
	answer_header(s->bytes, p, PS_TCP, 20);
	*(uint16_t *)tcp = p->dport;
	*(uint16_t *)(tcp + 2) = p->sport;
	tcp[12] = 5 << 4;
	if (p->tcp_flags & PS_TCP_ACK) {
		*(uint32_t *)(tcp + 4) = *(uint32_t *)(theirs + 8);
		tcp[13] = PS_TCP_RST;
	} else {
		length = (uint32_t)p->end - p->l4 - (theirs[12] >> 4) * 4 + !!(p->tcp_flags & PS_TCP_SYN) +
			 !!(p->tcp_flags & PS_TCP_FIN);
		sequence = __builtin_bswap32(*(uint32_t *)(theirs + 4)) + length;
		*(uint32_t *)(tcp + 8) = __builtin_bswap32(sequence);
		tcp[13] = PS_TCP_RST | PS_TCP_ACK;
	}
	*(uint16_t *)(tcp + 16) = fold((uint64_t)bpf_csum_diff(0, 0, (void *)tcp, 20, pseudo(s->bytes, p, PS_TCP, 20)));
	return answer(ctx, s->bytes, header + 20);
}

/* ---- fragments ---------------------------------------------------------------------------------------------- */

struct fragment_place {
	uint64_t hash;
	uint32_t kept, recent; /* keys of the sets it may be in */
	uint32_t now;	       /* ticks of 2^24 ns */
};

/* Ticks since it came; 24 bits of them are kept, and CPUs differ by one. */
PS_INLINE uint32_t age_of(uint64_t mark, uint32_t now) { return (now + 1 - (uint32_t)mark) & 0xffffff; }

PS_INLINE struct fragment *fragment_in(uint32_t set, const struct fragment_place *at)
{
	struct fragment_set *s = bpf_map_lookup_elem(&fragments, &set);

	if (!s)
		return 0;
	for (int i = 0; i < FRAGMENT_WAYS; i++) {
		uint64_t mark = s->way[i].mark;

		if (mark && !((mark ^ at->hash) >> 24) && !((s->way[i].ports ^ at->hash) & 0xffffff) &&
		    age_of(mark, at->now) <= FRAGMENT_TICKS)
			return &s->way[i];
	}
	return 0;
}

PS_INLINE int fragment_put(struct fragment *way, uint64_t was, uint64_t mark, uint64_t ports)
{
	if (__sync_val_compare_and_swap(&way->mark, was, mark) != was)
		return -1;
	*(volatile uint64_t *)&way->ports = ports;
	return 0;
}

PS_INLINE void fragment_place(const struct ps_target *t, const struct ps_packet *p, struct fragment_place *at)
{
	/* IPv6 identifies a packet without its protocol (RFC 8200, 4.5). */
	uint8_t protocol = p->family == 4 ? p->protocol : 0;
	uint32_t first = (t->stack & (PS_MAX_STACKS - 1)) * 2 * FRAGMENT_SETS;

	at->hash = ps_hash6(t->key0, t->key1, p->src, p->dst, (uint16_t)p->fragment_id,
			    (uint16_t)(p->fragment_id >> 16), protocol);
	at->kept = first + (ps_hash6(t->key0, t->key1, p->src, p->dst, 0, 0, 255) & (FRAGMENT_SETS - 1));
	at->recent = first + FRAGMENT_SETS + (at->hash >> 32 & (FRAGMENT_SETS - 1));
	at->now = (uint32_t)(bpf_ktime_get_ns() >> 24) & 0xffffff;
}

/* A first fragment. -> -1: it contradicts one of a datagram that is under way */
APART int fragment_remember(const struct ps_target *t, const struct ps_packet *p)
{
	struct fragment_place at = { 0 };
	struct fragment_set *kept, *recent;
	struct fragment *found;
	uint64_t mark, ports, oldest_mark = 0;
	uint32_t oldest = 0, oldest_age = 0;

	if (!t || !p)
		return 0;
	fragment_place(t, p, &at);
	mark = at.hash >> 24 << 24 | at.now;
	ports = (uint64_t)p->sport << 48 | (uint64_t)p->dport << 32 | (uint64_t)p->protocol << 24 |
		(at.hash & 0xffffff);
	found = fragment_in(at.kept, &at);
	if (!found)
		found = fragment_in(at.recent, &at);
	if (found) {
		if (found->ports != ports)
			return -1;
		found->mark = mark;
		return 0;
	}
	kept = bpf_map_lookup_elem(&fragments, &at.kept);
	recent = bpf_map_lookup_elem(&fragments, &at.recent);
	if (!kept || !recent)
		return 0;
	for (int i = 0; i < FRAGMENT_WAYS; i++) {
		uint64_t was = kept->way[i].mark;

		if ((!was || age_of(was, at.now) > FRAGMENT_TICKS) && !fragment_put(&kept->way[i], was, mark, ports))
			return 0;
	}
	for (int i = 0; i < FRAGMENT_WAYS; i++) {
		uint64_t was = recent->way[i].mark;
		uint32_t age = was ? age_of(was, at.now) : ~0u;

		if (age >= oldest_age) {
			oldest = i;
			oldest_age = age;
			oldest_mark = was;
		}
	}
	fragment_put(&recent->way[oldest & (FRAGMENT_WAYS - 1)], oldest_mark, mark, ports);
	return 0;
}

/* A later fragment gets ports and protocol of its first. -> -1: that is not known */
APART int fragment_recall(const struct ps_target *t, struct ps_packet *p)
{
	struct fragment_place at = { 0 };
	struct fragment *found;
	uint64_t ports;

	if (!t || !p)
		return -1;
	fragment_place(t, p, &at);
	found = fragment_in(at.kept, &at);
	if (!found)
		found = fragment_in(at.recent, &at);
	if (!found)
		return -1;
	ports = found->ports;
	p->sport = (uint16_t)(ports >> 48);
	p->dport = (uint16_t)(ports >> 32);
	p->protocol = (uint8_t)(ports >> 24);
	return 0;
}

/* ---- the programs ------------------------------------------------------------------------------------------- */

/* Parses the frame into `parsed`. -> ps_packet_kind */
APART int parse(struct xdp_md *ctx)
{
	uint32_t zero = 0;
	struct ps_packet *p = bpf_map_lookup_elem(&parsed, &zero);

	if (!p)
		return PS_PKT_OTHER;
	__builtin_memset(p, 0, sizeof(*p));
	return ps_parse((void *)(long)ctx->data, (void *)(long)ctx->data_end, p);
}

/* Everything but plain IPv4 TCP and UDP with hops left: IPv6, VLAN tags, options, fragments, ICMP. */
APART int slow(struct xdp_md *ctx, int uplink)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	const struct ps_uplink *here = uplink ? uplink_of(ctx) : 0;
	struct ps_target *target, *home;
	uint32_t zero = 0, flags = 0, bucket, stamped, side = PS_UPLINK_CLIENTS;
	struct ps_packet *p = bpf_map_lookup_elem(&parsed, &zero);
	struct counters *count = bpf_map_lookup_elem(&counters, &zero);
	uint8_t announced;
	uint64_t hash = 0;
	int why;

	if (!count || !p || (uplink && !here))
		return XDP_ABORTED;
	if (here && !in_vlan(here, data, data_end))
		return not_ours(count, here);
	parse(ctx);
	if (p->kind == PS_PKT_MALFORMED && !here)
		return refuse(count, PS_D_DROP_MALFORMED);
	if (p->kind == PS_PKT_MALFORMED || p->kind == PS_PKT_OTHER)
		return not_ours(count, here);
	if (p->family == 4 && p->l4 - p->l3 != 20 && source_route(ctx, p->l3, (uint32_t)p->l4 - p->l3))
		return not_ours(count, here);

	if (p->kind == PS_PKT_ICMP_ERROR) {
		/* Its embedded packet is one that we sent; else it is not about us. */
		if (p->src[0] != p->outer_dst[0] || p->src[1] != p->outer_dst[1] || p->src[2] != p->outer_dst[2] ||
		    p->src[3] != p->outer_dst[3])
			return not_ours(count, here);
		target = listener_of(p->family, p->src, p->sport, p->protocol);
		flags = PS_STAMP_ICMP;
		if (target) {
			hash = hash_of(target, p->family, p->dst, p->src, p->dport, p->sport, p->protocol);
			bucket = (uint32_t)hash & target->mask;
		} else {
			target = snat_of(p->family, p->src);
			if (!target)
				return not_ours(count, here);
			bucket = PS_SWAP16(p->sport) & target->mask;
			flags |= PS_STAMP_REPLY;
			side = PS_UPLINK_BACKENDS;
		}
		why = source_fault(here, p->family, p->outer_src);
		if (why)
			return refuse(count, why);
		if (here && !(here->flags & side))
			return refuse(count, PS_D_DROP_WRONG_UPLINK);
		if (side == PS_UPLINK_CLIENTS && target->flags >> PS_WATCH_SHIFT &&
		    too_many(count, target, (uint32_t)(hash >> 32), 0, 0))
			return XDP_DROP;
		return send_to_owner(ctx, count, here, target, bucket, (uint32_t)(hash >> 32), flags);
	}

	/* The address itself: who answers echo requests, and where its fragments are remembered. */
	home = listener_of(p->family, p->dst, 0, PS_ICMP);
	announced = p->protocol;
	if (p->kind == PS_PKT_FRAGMENT) {
		if (!home)
			home = snat_of(p->family, p->dst);
		if (!home)
			return not_ours(count, here);
		if (fragment_recall(home, p))
			return refuse(count, PS_D_DROP_FRAGMENT_EARLY);
		flags = PS_STAMP_FRAGMENT;
	}
	if (p->protocol == PS_ICMP || p->protocol == PS_ICMPV6) {
		if (!home)
			return not_ours(count, here);
		why = source_fault(here, p->family, p->src);
		if (why)
			return refuse(count, why);
		if (p->first_fragment && fragment_remember(home, p))
			return refuse(count, PS_D_DROP_FRAGMENT_CONFLICT);
		/*
		 * Answered on the routed pair alone: XDP_TX on a veth uplink is lost unless its peer runs a
		 * program or GRO, and nobody can tell here.
		 */
		if (here || echo_reply(ctx, p) != XDP_TX)
			return not_ours(count, here);
		count->value[PS_D_ECHO_REPLIED]++;
		return XDP_TX;
	}

	target = listener_of(p->family, p->dst, p->dport, p->protocol);
	if (target) {
		hash = hash_of(target, p->family, p->src, p->dst, p->sport, p->dport, p->protocol);
		bucket = (uint32_t)hash & target->mask;
	} else {
		target = snat_of(p->family, p->dst);
		if (!target && (here || !home))
			return not_ours(count, here);
		bucket = target ? PS_SWAP16(p->dport) & target->mask : 0;
		flags |= PS_STAMP_REPLY;
		side = PS_UPLINK_BACKENDS;
	}
	why = source_fault(here, p->family, p->src);
	if (why)
		return refuse(count, why);
	if (!target) {
		/* A port of a virtual address at which nobody listens: its sender is told, as by a host. */
		if (p->kind == PS_PKT_FRAGMENT || p->first_fragment)
			return not_ours(count, here);
		why = p->protocol == PS_TCP ? PS_D_RESET_SENT : PS_D_UNREACHABLE_SENT;
		if ((p->protocol == PS_TCP
			     ? reset(ctx, p)
			     : icmp_error(ctx, p, p->family == 4 ? 3 : 1, p->family == 4 ? 3 : 4)) != XDP_TX)
			return not_ours(count, here);
		count->value[why & 31]++;
		return XDP_TX;
	}
	if (here && !(here->flags & side))
		return refuse(count, PS_D_DROP_WRONG_UPLINK);
	if (!(flags & PS_STAMP_REPLY) && target->flags & PS_TARGET_ALLOWED && !allowed(p))
		return refuse(count, PS_D_DROP_NOT_ALLOWED);
	if (p->first_fragment && fragment_remember(target, p))
		return refuse(count, PS_D_DROP_FRAGMENT_CONFLICT);
	if (p->ttl <= 1) {
		if (here) /* the kernel answers */
			return not_ours(count, here);
		if (p->kind == PS_PKT_FRAGMENT || icmp_error(ctx, p, p->family == 4 ? 11 : 3, 0) != XDP_TX)
			return refuse(count, PS_D_DROP_TTL);
		count->value[PS_D_TIME_EXCEEDED_SENT]++;
		return XDP_TX;
	}
	if (side == PS_UPLINK_CLIENTS && target->flags >> PS_WATCH_SHIFT &&
	    too_many(count, target, (uint32_t)(hash >> 32), p->protocol, p->tcp_flags))
		return XDP_DROP;
	stamped = (uint32_t)(hash >> 32);
	if (flags & PS_STAMP_FRAGMENT) {
		stamped = (uint32_t)PS_SWAP16(p->sport) << 16 | PS_SWAP16(p->dport);
		if (p->protocol == PS_UDP && announced != PS_UDP)
			flags |= PS_STAMP_UDP;
	}
	return send_to_owner(ctx, count, here, target, bucket, stamped, flags);
}

PS_INLINE int direct(struct xdp_md *ctx, int uplink)
{
	uint8_t *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end, *ip = data + 14;
	struct ps_listener_key4 key = { 0 };
	struct ps_uplink *here = 0;
	struct ps_target *target;
	struct ps_direct *at;
	struct counters *count;
	uint32_t zero = 0, source, slot;
	uint64_t hash, wide;
	uint16_t sport;
	int why;

	count = bpf_map_lookup_elem(&counters, &zero);
	if (!count)
		return XDP_ABORTED;
	count->value[PS_D_RECEIVED]++;
	if (uplink) {
		here = uplink_of(ctx);
		if (!here) {
			count->value[PS_D_PASSED]++;
			return XDP_PASS;
		}
	}
	if (data + 14 + 20 + 8 > end || *(uint16_t *)(data + 12) != PS_SWAP16(0x0800) || ip[0] != 0x45 ||
	    *(uint16_t *)(ip + 6) & PS_SWAP16(0x3fff) || (ip[9] != PS_TCP && ip[9] != PS_UDP) || ip[8] <= 1)
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
	if (!target) {
		target = bpf_map_lookup_elem(&snat4, &key.address);
		if (!target)
			return slow(ctx, uplink);
		if (martian4(source) || maybe_own(source) || (here && !(here->flags & PS_UPLINK_BACKENDS)))
			return slow(ctx, uplink);
		return send_to_owner(ctx, count, here, target, PS_SWAP16(key.port) & target->mask, 0, PS_STAMP_REPLY);
	}
	if (martian4(source))
		return refuse(count, PS_D_DROP_MARTIAN);
	if (maybe_own(source)) {
		struct address6 own = { { 0, 0, 0xffff0000, source } };

		why = own_fault(&own, uplink);
		if (why)
			return refuse(count, why);
	}
	if (here && !(here->flags & PS_UPLINK_CLIENTS))
		return refuse(count, PS_D_DROP_WRONG_UPLINK);
	if (target->flags & PS_TARGET_ALLOWED) {
		struct ps_allowed4 trie = { 96, key, source };

		if (!bpf_map_lookup_elem(&allowed4, &trie))
			return refuse(count, PS_D_DROP_NOT_ALLOWED);
	}
	hash = ps_hash4(target->key0, target->key1, source, key.address, sport, key.port, key.protocol);
	if (target->flags >> PS_WATCH_SHIFT &&
	    too_many(count, target, (uint32_t)(hash >> 32), key.protocol, ip + 34 <= end ? ip[33] : 0))
		return XDP_DROP;
	return send_to_owner(ctx, count, here, target, (uint32_t)hash & target->mask, (uint32_t)(hash >> 32), 0);
}

/* On ps1, behind the routed end: all that comes here was routed to one of our addresses. */
SEC("xdp")
int director_routed(struct xdp_md *ctx) { return direct(ctx, 0); }

/* On an uplink, ahead of the kernel: what is not ours goes on untouched. */
SEC("xdp")
int director_uplink(struct xdp_md *ctx) { return direct(ctx, 1); }

char program_license[] SEC("license") = "Dual MIT/GPL";
