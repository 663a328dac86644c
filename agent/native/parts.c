/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory in two parts (packetstack/parts.h): files that the agent alone writes, and the pinned BPF maps behind them that
 * engines write. Both outlive every process. What a file says of sizes is held against the file and its map once, when
 * it is opened; after that only the agent can have changed it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"
#include "packetstack/connections.h"
#include "packetstack/parts.h"

int ps_fail(struct ps_error *e, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	if (e)
		vsnprintf(e->text, sizeof(e->text), format, arguments);
	va_end(arguments);
	return -1;
}

/* ---- maps: raw calls, for benches and tests link this without libbpf -------------------------------------- */

static int bpf(int command, union bpf_attr *attribute, size_t size)
{
	return (int)syscall(SYS_bpf, command, attribute, size);
}

/* Elements of a page, so that no kernel's limit on an element's size is met. Nobody reads them as such. */
static int map_create(const char *pin, uint64_t bytes)
{
	union bpf_attr create = { .map_type = BPF_MAP_TYPE_ARRAY,
				  .key_size = 4,
				  .value_size = PS_PAGE,
				  .max_entries = (uint32_t)(bytes / PS_PAGE),
				  .map_flags = BPF_F_MMAPABLE,
				  .map_name = "ps_engines_part" };
	union bpf_attr place = { .pathname = (uint64_t)(uintptr_t)pin };
	int fd = bpf(BPF_MAP_CREATE, &create, sizeof(create));

	if (fd < 0)
		return -1;
	place.bpf_fd = (uint32_t)fd;
	unlink(pin); /* of one whose file is gone */
	if (!bpf(BPF_OBJ_PIN, &place, sizeof(place)))
		return fd;
	close(fd);
	return -1;
}

int ps_map_open(const char *pin, int read_only, struct ps_error *e)
{
	union bpf_attr place = { .pathname = (uint64_t)(uintptr_t)pin, .file_flags = read_only ? BPF_F_RDONLY : 0 };
	int fd = bpf(BPF_OBJ_GET, &place, sizeof(place));

	return fd < 0 ? ps_fail(e, "%s: cannot open this map: %s", pin, strerror(errno)) : fd;
}

/* What the kernel has taken for it; 0: it is of another kind */
static uint64_t map_bytes(int fd)
{
	struct bpf_map_info info = { 0 };
	union bpf_attr ask = { .info = { .bpf_fd = (uint32_t)fd, .info_len = sizeof(info), .info = (uintptr_t)&info } };

	if (bpf(BPF_OBJ_GET_INFO_BY_FD, &ask, sizeof(ask)) || info.type != BPF_MAP_TYPE_ARRAY ||
	    !(info.map_flags & BPF_F_MMAPABLE) || info.value_size != PS_PAGE)
		return 0;
	return (uint64_t)info.max_entries * PS_PAGE;
}

uint64_t ps_map_bytes(const char *pin)
{
	int fd = ps_map_open(pin, 1, NULL);
	uint64_t bytes = fd < 0 ? 0 : map_bytes(fd);

	if (fd >= 0)
		close(fd);
	return bytes;
}

/* ---- both parts --------------------------------------------------------------------------------------------- */

void *ps_parts_create(const char *path, const char *pin, uint64_t file_bytes, uint64_t bytes, struct ps_error *e)
{
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600), map = -1;
	void *at = MAP_FAILED;

	if (fd < 0) {
		ps_fail(e, "%s: cannot create: %s", path, strerror(errno));
		return NULL;
	}
	/* All of it now: a file system that is full later would end whoever touches a new page by SIGBUS. */
	errno = posix_fallocate(fd, 0, (off_t)file_bytes);
	if (!errno && pin && bytes > file_bytes)
		map = map_create(pin, bytes - file_bytes);
	if (!errno || map >= 0)
		at = bytes > file_bytes
			     ? ps_parts_map(fd, map, file_bytes, bytes, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE)
			     : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED) {
		ps_fail(e, "%s: cannot take %lu MiB for it: %s", path, (unsigned long)(bytes + (1 << 20) - 1) >> 20,
			strerror(errno));
		unlink(path);
		if (map >= 0)
			unlink(pin);
	}
	close(fd);
	if (map >= 0)
		close(map);
	return at == MAP_FAILED ? NULL : at;
}

/* What arena, engine file and, but for `bytes`, configuration begin with */
struct head {
	uint32_t magic, layout;
	uint64_t bytes;
};

/* -> descriptor of a file with this magic, of this build's layout and of this size, or -1 */
static int open_file(const char *path, int read_only, uint32_t magic, uint64_t file_bytes, const char *what,
		     struct head *head, struct ps_error *e)
{
	int fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOFOLLOW);
	struct stat st;

	if (fd < 0)
		return ps_fail(e, "%s: cannot open this %s: %s", path, what, strerror(errno));
	if (fstat(fd, &st) || pread(fd, head, sizeof(*head), 0) != sizeof(*head))
		ps_fail(e, "%s: cannot open this %s: it is too short", path, what);
	else if (head->magic != magic || head->layout != PS_LAYOUT_VERSION)
		ps_fail(e, "LayoutMismatch: %s: has memory layout %u, and this build reads %d (magic %08x, %08x)", path,
			head->layout, PS_LAYOUT_VERSION, head->magic, magic);
	else if ((uint64_t)st.st_size != file_bytes)
		ps_fail(e, "%s: is %lu bytes long instead of %lu: this %s is damaged and not used", path,
			(unsigned long)st.st_size, (unsigned long)file_bytes, what);
	else
		return fd;
	close(fd);
	return -1;
}

void *ps_file_open(const char *path, int read_only, uint32_t magic, uint64_t bytes, const char *what,
		   struct ps_error *e)
{
	struct head head;
	int fd = open_file(path, read_only, magic, bytes, what, &head, e);
	void *at;

	if (fd < 0)
		return NULL;
	at = mmap(NULL, bytes, read_only ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED)
		ps_fail(e, "%s: cannot map: %s", path, strerror(errno));
	close(fd);
	return at == MAP_FAILED ? NULL : at;
}

void *ps_parts_open(const char *path, const char *pin, uint32_t magic, uint64_t file_bytes, const char *what,
		    struct ps_error *e)
{
	int protection = PROT_READ | PROT_WRITE, map, fd;
	struct head head;
	void *at = NULL;
	uint64_t has;

	fd = open_file(path, 0, magic, file_bytes, what, &head, e);
	if (fd < 0)
		return NULL;
	map = ps_map_open(pin, 0, e);
	has = map < 0 ? 0 : map_bytes(map);
	if (map >= 0 && (head.bytes <= file_bytes || has != head.bytes - file_bytes)) {
		ps_fail(e, "%s: has %lu bytes, and %s says that this %s has %lu with its own %lu: it is not used", pin,
			(unsigned long)has, path, what, (unsigned long)head.bytes, (unsigned long)file_bytes);
	} else if (map >= 0) {
		at = ps_parts_map(fd, map, file_bytes, head.bytes, protection, protection);
		if (at == MAP_FAILED) {
			ps_fail(e, "%s: cannot map: %s", pin, strerror(errno));
			at = NULL;
		}
	}
	close(fd);
	if (map >= 0)
		close(map);
	return at;
}

/* ---- connection list: a map alone ---------------------------------------------------------------------------- */

struct ps_connection_list *ps_connections_open(const char *pin, const struct ps_arena *keeper, int create,
					       struct ps_error *e)
{
	struct ps_connection_list *l = calloc(1, sizeof(*l));
	uint64_t bytes;
	int map;

	if (!l || !ps_connections_are(l, keeper->buckets, keeper->entries, keeper->index_slots, keeper->clients)) {
		ps_fail(e, "%s: no connection list of %u buckets with %u entries is possible", pin, keeper->buckets,
			keeper->entries);
		free(l);
		return NULL;
	}
	bytes = ps_connections_bytes(l);
	map = create ? map_create(pin, bytes) : ps_map_open(pin, 0, e);
	if (map < 0 && create)
		ps_fail(e, "%s: cannot take %lu MiB for it: %s", pin, (unsigned long)(bytes + (1 << 20) - 1) >> 20,
			strerror(errno));
	if (map >= 0 && !create && map_bytes(map) != bytes) { /* an earlier build's */
		l->clients = 0;
		bytes = ps_connections_bytes(l);
	}
	if (map >= 0 && map_bytes(map) != bytes) {
		ps_fail(e, "%s: has %lu bytes instead of %lu: this connection list is not used", pin,
			(unsigned long)map_bytes(map), (unsigned long)bytes);
		close(map);
		map = -1;
	}
	if (map < 0) {
		free(l);
		return NULL;
	}
	l->at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, map, 0);
	close(map);
	if (l->at != MAP_FAILED)
		return l;
	ps_fail(e, "%s: cannot map: %s", pin, strerror(errno));
	free(l);
	return NULL;
}

void ps_connections_close(struct ps_connection_list *l)
{
	if (!l)
		return;
	munmap(l->at, ps_connections_bytes(l));
	free(l);
}
