// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * On the engine's interface: puts each frame into the queue that its stamp names. Only the director can stamp: frames
 * of anybody else who reaches the interface, as on a bridge, have no metadata. Of a mirrored packet the owner and the
 * previous owner have got a copy with the same stamp.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <stdbool.h>

#include "packetstack/abi.h"

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, PS_MAX_QUEUES);
	__type(key, uint32_t);
	__type(value, uint32_t);
} queues SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint64_t);
} unstamped SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint64_t);
} forged SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint64_t);
} misdirected SEC(".maps");

/* Whose interface this is; set before the program is loaded. */
const volatile struct ps_end end SEC(".rodata.end") = { 0 };

SEC("xdp")
int engine(struct xdp_md *ctx)
{
	uint8_t *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct ps_stamp *stamp = (void *)(long)ctx->data_meta;
	struct ps_marker *marker = (void *)(data + 14);
	uint32_t zero = 0, queue;
	uint64_t *count;

	if ((uint8_t *)(stamp + 1) <= data && stamp->magic == PS_STAMP_MAGIC) {
		bool mine = stamp->flags >> PS_STAMP_SLOT == end.slot;

		queue = mine ? stamp->queue : stamp->prev_queue;
		if ((mine || stamp->flags & PS_STAMP_MIRROR) &&
		    bpf_redirect_map(&queues, queue, XDP_DROP) == XDP_REDIRECT)
			return XDP_REDIRECT;
		count = bpf_map_lookup_elem(&misdirected, &zero);
	} else if (data + 14 <= data_end && data[12] == PS_MARKER_ETHERTYPE >> 8 &&
		   data[13] == (PS_MARKER_ETHERTYPE & 0xff)) {
		if ((uint8_t *)(marker + 1) <= data_end && marker->magic == PS_MARKER_MAGIC &&
		    marker->kind == PS_MARKER_INGRESS && marker->token == end.token)
			return bpf_redirect_map(&queues, marker->queue, XDP_DROP);
		count = bpf_map_lookup_elem(&forged, &zero);
	} else {
		count = bpf_map_lookup_elem(&unstamped, &zero);
	}
	if (count)
		(*count)++;
	return XDP_DROP;
}

char program_license[] SEC("license") = "Dual MIT/GPL";
