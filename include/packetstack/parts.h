/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Memory in two parts, one behind the other: a file that the agent writes and engines read, and a BPF map that engines
 * write. A map cannot be cut or grown; all its memory is taken when it is made. The kernel refuses to map more of it
 * than there is.
 */
#ifndef PACKETSTACK_PARTS_H
#define PACKETSTACK_PARTS_H

#include <stddef.h>
#include <sys/mman.h>

#include "packetstack/abi.h"

_Static_assert(offsetof(struct ps_engine, ready) == PS_ENGINE_FILE_BYTES, "the agent's part is a page");
_Static_assert(offsetof(struct ps_arena, backend_count) == PS_ARENA_FILE_BYTES && !(PS_ARENA_FILE_BYTES % PS_PAGE),
	       "the agent's part is whole pages");
_Static_assert(!(offsetof(struct ps_arena, backend) % 32) && !(offsetof(struct ps_arena, listener) % 32) &&
		       !(offsetof(struct ps_arena, listener_count) % 64),
	       "an entry is on one cache line");

/*
 * `file_bytes` of `file` and behind them the rest of `bytes` from `map`; -1: memory of this process alone, for tests.
 * -> where, or MAP_FAILED
 */
static inline void *ps_parts_map(int file, int map, uint64_t file_bytes, uint64_t bytes, int file_protection,
				 int map_protection)
{
	uint8_t *at = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return at;
	if (mmap(at, file_bytes, file_protection, MAP_SHARED | MAP_FIXED, file, 0) != MAP_FAILED &&
	    mmap(at + file_bytes, bytes - file_bytes, map_protection,
		 MAP_SHARED | MAP_FIXED | (map < 0 ? MAP_ANONYMOUS : 0), map, 0) != MAP_FAILED)
		return at;
	munmap(at, bytes);
	return MAP_FAILED;
}

#endif
