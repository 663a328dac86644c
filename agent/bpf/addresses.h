/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The stacks' addresses: maps that director and host programs share by their pins, and how something is found in them. */
#ifndef PACKETSTACK_BPF_ADDRESSES_H
#define PACKETSTACK_BPF_ADDRESSES_H

/* With port 0 and ICMP: a whole virtual address. */
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

#endif
