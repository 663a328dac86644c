/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Part of the director: drops packets of strangers ahead of engines that have more to do than they can. How many are let
 * through, the agent decides: packetstack_core/shedding.py.
 */
#ifndef PACKETSTACK_BPF_SHEDDING_H
#define PACKETSTACK_BPF_SHEDDING_H

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PS_MAX_WATCHED);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, struct ps_watch);
} watches SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PS_MAX_WATCHED);
	__type(key, uint32_t);
	__type(value, struct ps_watched);
} watched SEC(".maps");

/* A bit for each known flow, by its hash. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2 * PS_KNOWN_WORDS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, uint64_t);
} known SEC(".maps");

/*
 * Is this packet one too many? Asked only for a listener that is watched. hash: upper half of the flow's. A SYN is a
 * stranger's whatever its addresses.
 */
APART int too_many(struct counters *count, const struct ps_target *target, uint32_t hash, int protocol,
		   uint32_t tcp_flags)
{
	int syn = protocol == PS_TCP && (tcp_flags & 0x12) == 0x02; /* not with an ACK */
	uint32_t number = target ? target->flags >> PS_WATCH_SHIFT : 0, at;
	struct ps_watch *w = bpf_map_lookup_elem(&watches, &number);
	struct ps_watched *seen = bpf_map_lookup_elem(&watched, &number);
	uint64_t now, next, from, step, *bits;
	int kind = syn || protocol == PS_UDP ? PS_OPENERS : PS_STRAYS;

	if (!w || !seen || !count)
		return 0;
	if (!syn) {
		at = ps_known_word(hash) + (w->half & 1) * PS_KNOWN_WORDS;
		bits = bpf_map_lookup_elem(&known, &at);
		if (bits && *bits >> (hash & 63) & 1)
			return 0;
	}
	seen->offered[kind]++;
	step = w->step_ns[kind];
	if (!step)
		return 0;
	now = bpf_ktime_get_ns();
	/* Of those that come at the same instant on several CPUs few pass at once: losing the race is being late. */
	for (int i = 0; i < 4; i++) {
		next = w->next_ns[kind];
		from = next > now ? next : now;
		if (from - now > PS_WATCH_BURST_NS)
			break;
		if (__sync_val_compare_and_swap(&w->next_ns[kind], next, from + step) == next)
			return 0;
	}
	seen->shed[kind]++;
	count->value[PS_D_DROP_SHED]++;
	return 1;
}

#endif
