/* SPDX-License-Identifier: Apache-2.0 */
/* What tests and `explain` ask of the C code: its hash, its words, its sizes. */
#include <string.h>

#include "packetstack.h"
#include "packetstack/hash.h"

static int is_mapped(const uint8_t *address)
{
	static const uint8_t prefix[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

	return !memcmp(address, prefix, sizeof(prefix));
}

uint64_t ps_flow_hash(uint64_t key0, uint64_t key1, const uint8_t *source, const uint8_t *destination, uint16_t sport,
		      uint16_t dport, uint8_t protocol)
{
	uint32_t s[4], d[4];

	memcpy(s, source, sizeof(s));
	memcpy(d, destination, sizeof(d));
	if (is_mapped(source) && is_mapped(destination))
		return ps_hash4(key0, key1, s[3], d[3], sport, dport, protocol);
	return ps_hash6(key0, key1, s, d, sport, dport, protocol);
}

uint64_t ps_make_word(uint32_t epoch, uint32_t slot, uint32_t queue, uint32_t prev_slot, uint32_t prev_queue)
{
	return ps_word(epoch, slot, queue, prev_slot, prev_queue);
}

#define SIZE(name)                         \
	{                                  \
#name, sizeof(struct name) \
	}

uint64_t ps_size_of(const char *structure)
{
	static const struct {
		const char *name;
		uint64_t bytes;
	} sizes[] = {
		SIZE(ps_stamp),	     SIZE(ps_marker),	     SIZE(ps_listener_key4),  SIZE(ps_listener_key6),
		SIZE(ps_target),     SIZE(ps_core),	     SIZE(ps_progress),	      SIZE(ps_journal),
		SIZE(ps_ring),	     SIZE(ps_descriptor),    SIZE(ps_queue),	      SIZE(ps_recycle),
		SIZE(ps_engine),     SIZE(ps_flow),	     SIZE(ps_entry),	      SIZE(ps_listener_name),
		SIZE(ps_shard),	     SIZE(ps_fence),	     SIZE(ps_address),	      SIZE(ps_backend),
		SIZE(ps_arena),	     SIZE(ps_listener),	     SIZE(ps_config_backend), SIZE(ps_config_snat),
		SIZE(ps_config),     SIZE(ps_config_file),   SIZE(ps_message),	      SIZE(ps_capture),
		SIZE(ps_census),     SIZE(ps_allowed4),	     SIZE(ps_allowed6),	      SIZE(ps_uplink),
		SIZE(ps_own_filter), SIZE(ps_backend_count), SIZE(ps_listener_count), SIZE(ps_watch),
		SIZE(ps_watched),    SIZE(ps_end),	     SIZE(ps_shard_form),
	};

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		if (!strcmp(sizes[i].name, structure))
			return sizes[i].bytes;
	return 0;
}
