/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which SNAT addresses flows have, also those that have just ended (a reset may be a stranger's): one that has left the
 * resource must stay until none names it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

int ps_arena_snat_flows(struct ps_arena *a, uint32_t *flows, struct ps_error *e)
{
	struct ps_flow *found = calloc(a->entries, sizeof(*found));

	if (!found)
		return ps_fail(e, "cannot look through the flows: %s", strerror(errno));
	memset(flows, 0, PS_MAX_ADDRESSES * sizeof(*flows));
	for (uint32_t b = 0; b < a->buckets; b++) {
		int n = ps_arena_flows(a, b, found, (int)a->entries);

		for (int i = 0; i < n; i++)
			if (found[i].snat_id < PS_MAX_ADDRESSES)
				flows[found[i].snat_id]++;
	}
	free(found);
	return 0;
}
