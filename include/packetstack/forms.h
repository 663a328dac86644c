/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shards of any layout, as their arena's form describes them: all that an agent reads of them. A form comes from a build
 * that nobody here has read, so it is held against bounds (ps_form_fits) before there is memory of it.
 */
#ifndef PACKETSTACK_FORMS_H
#define PACKETSTACK_FORMS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "packetstack/abi.h"

/* At most so many bytes for a slot of the indexes, an entry, and what lies behind the entries. */
enum { PS_FORM_INDEX = 16, PS_FORM_ENTRY = 256, PS_FORM_TAIL = 65536 - 64 };

/* Of layout 1: arenas and builds from before there was another do not say so. */
static const struct ps_shard_form ps_form_first = {
	.layout = 1,
	.index_bytes = 4,
	.entry_bytes = 64,
	.tail_bytes = 256,
	.version = 0,
	.state = 2,
	.last_seen = 4,
	.hash = 8,
	.client = 16,
	.client_port = 52,
	.snat_port = 54,
	.snat = 56,
	.backend = 58,
	.listener = 60,
	.flags = 62,
};

/* What a build or an arena means by the form that it has given. */
static inline struct ps_shard_form ps_form_of(const struct ps_shard_form *given)
{
	return given->layout ? *given : ps_form_first;
}

static inline bool ps_form_has(const struct ps_shard_form *f, uint16_t at, uint16_t bytes)
{
	return !(at % bytes) && at + bytes <= f->entry_bytes;
}

/* Can there be memory of this form, and be read by it? */
static inline bool ps_form_fits(const struct ps_shard_form *f)
{
	return f->layout && f->index_bytes && f->index_bytes <= PS_FORM_INDEX && !(f->index_bytes % 4) &&
	       f->entry_bytes && f->entry_bytes <= PS_FORM_ENTRY && !(f->entry_bytes % 64) && f->tail_bytes &&
	       f->tail_bytes <= PS_FORM_TAIL && !(f->tail_bytes % 64) && ps_form_has(f, f->version, 2) &&
	       ps_form_has(f, f->state, 1) && ps_form_has(f, f->last_seen, 4) && ps_form_has(f, f->hash, 4) &&
	       f->client + 16 <= f->entry_bytes && ps_form_has(f, f->client_port, 2) &&
	       ps_form_has(f, f->snat_port, 2) && ps_form_has(f, f->snat, 2) && ps_form_has(f, f->backend, 2) &&
	       ps_form_has(f, f->listener, 2) && ps_form_has(f, f->flags, 2) && !f->spare;
}

/* Bytes of a shard: header, indexes, entries, and what else; a multiple of a cache line. */
static inline uint64_t ps_form_shard_bytes(const struct ps_shard_form *f, uint32_t entries, uint32_t index_slots)
{
	return sizeof(struct ps_shard) + (uint64_t)f->index_bytes * index_slots + (uint64_t)f->entry_bytes * entries +
	       f->tail_bytes;
}

/* Entry i of a shard; i < a->entries. f: the arena's, as ps_form_of has read it once */
static inline const uint8_t *ps_form_entry(const struct ps_arena *a, const struct ps_shard_form *f, uint32_t bucket,
					   uint32_t i)
{
	const uint8_t *shard = (const uint8_t *)a + a->shards_offset + bucket * a->shard_stride;

	return shard + sizeof(struct ps_shard) + (uint64_t)f->index_bytes * a->index_slots +
	       (uint64_t)f->entry_bytes * i;
}

static inline uint16_t ps_form_u16(const uint8_t *entry, uint16_t at)
{
	uint16_t value;

	memcpy(&value, entry + at, 2);
	return value;
}

static inline uint32_t ps_form_u32(const uint8_t *entry, uint16_t at)
{
	uint32_t value;

	memcpy(&value, entry + at, 4);
	return value;
}

#endif
