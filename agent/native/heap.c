/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The heap of the process. glibc gives each thread one of its own and keeps what was freed in it: an agent that has
 * looked through ten thousand flows in each of its worker threads would have that memory for good.
 */
#include <malloc.h>

#include "native.h"

void ps_heap_share(void)
{
#ifdef __GLIBC__
	mallopt(M_ARENA_MAX, 1);
#endif
}

void ps_heap_give_back(void)
{
#ifdef __GLIBC__
	malloc_trim(0);
#endif
}
