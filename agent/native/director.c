/* SPDX-License-Identifier: Apache-2.0 */
/*
 * BPF programs and maps of a node. Everything is pinned below one directory, so it outlives the
 * agent; opening again takes over the maps as they are and replaces the programs in place.
 */
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/magic.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "native.h"
#include "packetstack/forms.h"
#include "packetstack/shard.h"

struct ps_director {
	char objects[256], pins[256];
	struct bpf_object *director, *host;
	uint64_t *words, *egress, *known;
	uint16_t *pair_numbers;
	struct ps_watch *watches;
	struct ps_own_filter *filter;
	int cpus;
};

static char last_line[256]; /* what libbpf said last */

static int remember(enum libbpf_print_level level, const char *format, va_list arguments)
{
	if (level == LIBBPF_WARN) {
		vsnprintf(last_line, sizeof(last_line), format, arguments);
		last_line[strcspn(last_line, "\n")] = 0;
	}
	return 0;
}

static int map_fd(struct bpf_object *o, const char *name) { return bpf_object__find_map_fd_by_name(o, name); }

static int mount_bpffs(const char *path, struct ps_error *e)
{
	struct statfs fs;

	if (mkdir(path, 0700) && errno != EEXIST)
		return ps_fail(e, "%s: cannot create: %s", path, strerror(errno));
	if (statfs(path, &fs))
		return ps_fail(e, "%s: %s", path, strerror(errno));
	if (fs.f_type != BPF_FS_MAGIC && mount("packetstack", path, "bpf", 0, "mode=0700"))
		return ps_fail(e, "%s: cannot mount a bpf file system: %s", path, strerror(errno));
	return 0;
}

/*
 * A device map that is pinned at `path` is taken as it is: the kernel adds a flag to those, and libbpf would
 * refuse them for it. -> 0, also when there is none
 */
static int reuse_devices(struct bpf_map *map, const char *path)
{
	struct bpf_map_info info = { 0 };
	uint32_t size = sizeof(info);
	int fd = bpf_obj_get(path), result = -EINVAL;

	if (fd < 0)
		return errno == ENOENT ? 0 : -errno;
	if (!bpf_obj_get_info_by_fd(fd, &info, &size) && info.type == bpf_map__type(map) &&
	    info.key_size == bpf_map__key_size(map) && info.value_size == bpf_map__value_size(map) &&
	    info.max_entries == bpf_map__max_entries(map))
		result = bpf_map__reuse_fd(map, fd);
	close(fd);
	return result;
}

int ps_pins_check(const char *objects, const char *file, const char *prefix, struct ps_error *e)
{
	LIBBPF_OPTS(bpf_obj_get_opts, reading, .file_flags = BPF_F_RDONLY);
	struct bpf_object *o;
	struct bpf_map *map;
	char path[600];
	int result = 0;

	libbpf_set_print(remember);
	snprintf(path, sizeof(path), "%s/%s", objects, file);
	o = bpf_object__open_file(path, NULL);
	if (!o)
		return ps_fail(e, "%s: cannot open: %s", path, strerror(errno));
	bpf_object__for_each_map(map, o)
	{
		struct bpf_map_info info = { 0 };
		uint32_t size = sizeof(info);
		int fd;

		snprintf(path, sizeof(path), "%s%s", prefix, bpf_map__name(map));
		if (result || bpf_map__is_internal(map) || (fd = bpf_obj_get_opts(path, &reading)) < 0)
			continue;
		if (bpf_obj_get_info_by_fd(fd, &info, &size))
			result = ps_fail(e, "%s: cannot be read: %s", path, strerror(errno));
		else if (info.type != bpf_map__type(map) || info.key_size != bpf_map__key_size(map) ||
			 info.value_size != bpf_map__value_size(map) || info.max_entries != bpf_map__max_entries(map))
			result = ps_fail(e, "%s: is a map of another build", path);
		close(fd);
	}
	bpf_object__close(o);
	return result;
}

/* A program that knows whose end it is on: its read-only data, and no other program of the object. */
static int specialize(struct bpf_object *o, const char *name, const struct ps_end *of)
{
	struct bpf_map *map = bpf_object__find_map_by_name(o, ".rodata.end");
	struct bpf_program *program;

	bpf_object__for_each_program(program, o)
		bpf_program__set_autoload(program, !strcmp(bpf_program__name(program), name));
	return map ? bpf_map__set_initial_value(map, of, sizeof(*of)) : -ENOENT;
}

/*
 * Maps of the object that are pinned as `prefix`NAME are used again; others are pinned there. of: its `program` alone,
 * for the end of one engine.
 */
static struct bpf_object *load(const char *objects, const char *file, const char *prefix, const char *program,
			       const struct ps_end *of, struct ps_error *e)
{
	struct bpf_object *o;
	struct bpf_map *map;
	char path[600];
	int result;

	snprintf(path, sizeof(path), "%s/%s", objects, file);
	o = bpf_object__open_file(path, NULL);
	if (!o) {
		ps_fail(e, "%s: cannot open: %s", path, strerror(errno));
		return NULL;
	}
	bpf_object__for_each_map(map, o)
	{
		if (!bpf_map__is_internal(map)) {
			snprintf(path, sizeof(path), "%s%s", prefix, bpf_map__name(map));
			bpf_map__set_pin_path(map, path);
			if (bpf_map__type(map) == BPF_MAP_TYPE_DEVMAP && reuse_devices(map, path)) {
				ps_fail(e,
					"%s: another version directs packets by this map; end that one first: packetstack down --all",
					path);
				bpf_object__close(o);
				return NULL;
			}
		}
	}
	result = of ? specialize(o, program, of) : 0;
	if (!result)
		result = bpf_object__load(o);
	if (result) {
		if (result == -EPERM)
			ps_fail(e,
				"%s: no permission to load BPF programs; run as root or with CAP_BPF and CAP_NET_ADMIN",
				file);
		else
			ps_fail(e, "%s: the kernel refused it: %s (%s)", file, strerror(-result), last_line);
		bpf_object__close(o);
		return NULL;
	}
	return o;
}

static int is_v4(const uint8_t *address)
{
	static const uint8_t mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

	return !memcmp(address, mapped, 12);
}

static uint32_t own_bit(const uint8_t *address)
{
	uint32_t words[4];

	memcpy(words, address, 16);
	return ps_own_bit(is_v4(address) ? words[3] : ps_own_mix(words));
}

/* The filter from the map of our addresses. Bits of addresses that went stay until then: they cost a look-up. */
static void filter_again(struct ps_director *d)
{
	struct ps_own_filter fresh = { 0 };
	int fd = map_fd(d->director, "own");
	uint8_t at[16], *from = NULL;

	while (!bpf_map_get_next_key(fd, from, at)) {
		uint32_t bit = own_bit(at);

		fresh.word[bit >> 6] |= 1ull << (bit & 63);
		from = at;
	}
	for (size_t i = 0; i < sizeof(fresh.word) / 8; i++)
		__atomic_store_n(&d->filter->word[i], fresh.word[i], __ATOMIC_RELAXED);
}

struct ps_director *ps_director_open(const char *objects, const char *pins, struct ps_error *e)
{
	struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	struct ps_director *d;
	struct utsname kernel;
	char prefix[300];
	int major = 0, minor = 0;

	libbpf_set_print(remember);
	if (uname(&kernel) || sscanf(kernel.release, "%d.%d", &major, &minor) != 2 || major < 6 ||
	    (major == 6 && minor < 1)) {
		ps_fail(e, "kernel %s is too old; use 6.1 or newer", kernel.release);
		return NULL;
	}
	if (strlen(objects) >= sizeof(d->objects) || strlen(pins) >= sizeof(d->pins)) {
		ps_fail(e, "%s: path too long", pins);
		return NULL;
	}
	setrlimit(RLIMIT_MEMLOCK, &unlimited);
	if (mount_bpffs(pins, e))
		return NULL;
	d = calloc(1, sizeof(*d));
	if (!d)
		return NULL;
	strcpy(d->objects, objects);
	strcpy(d->pins, pins);
	d->cpus = libbpf_num_possible_cpus();
	snprintf(prefix, sizeof(prefix), "%s/", pins);
	d->director = load(objects, "director.bpf.o", prefix, NULL, NULL, e);
	d->host = d->director ? load(objects, "host.bpf.o", prefix, NULL, NULL, e) : NULL;
	if (!d->host)
		goto failed;
	d->known =
		mmap(NULL, PS_KNOWN_WORDS * 16ul, PROT_READ | PROT_WRITE, MAP_SHARED, map_fd(d->director, "known"), 0);
	d->watches = mmap(NULL, PS_MAX_WATCHED * sizeof(*d->watches), PROT_READ | PROT_WRITE, MAP_SHARED,
			  map_fd(d->director, "watches"), 0);
	if (d->known == MAP_FAILED || d->watches == MAP_FAILED) {
		ps_fail(e, "cannot map the watched listeners: %s", strerror(errno));
		goto failed;
	}
	d->words =
		mmap(NULL, PS_TABLE_WORDS * 8ul, PROT_READ | PROT_WRITE, MAP_SHARED, map_fd(d->director, "words"), 0);
	d->egress = mmap(NULL, PS_MAX_SLOTS * PS_MAX_CPUS * 8ul, PROT_READ | PROT_WRITE, MAP_SHARED,
			 map_fd(d->host, "egress"), 0);
	d->filter = mmap(NULL, sizeof(*d->filter), PROT_READ | PROT_WRITE, MAP_SHARED,
			 map_fd(d->director, "own_filter"), 0);
	d->pair_numbers = mmap(NULL, PS_TABLE_WORDS * 2ul, PROT_READ | PROT_WRITE, MAP_SHARED,
			       map_fd(d->director, "pair_numbers"), 0);
	if (d->words == MAP_FAILED || d->egress == MAP_FAILED || d->filter == MAP_FAILED ||
	    d->pair_numbers == MAP_FAILED) {
		ps_fail(e, "cannot map the flow table: %s", strerror(errno));
		goto failed;
	}
	filter_again(d);
	return d;
failed:
	bpf_object__close(d->director);
	bpf_object__close(d->host);
	free(d);
	return NULL;
}

void ps_director_close(struct ps_director *d)
{
	munmap(d->known, PS_KNOWN_WORDS * 16ul);
	munmap(d->watches, PS_MAX_WATCHED * sizeof(*d->watches));
	munmap(d->words, PS_TABLE_WORDS * 8ul);
	munmap(d->pair_numbers, PS_TABLE_WORDS * 2ul);
	munmap(d->egress, PS_MAX_SLOTS * PS_MAX_CPUS * 8ul);
	munmap(d->filter, sizeof(*d->filter));
	bpf_object__close(d->director);
	bpf_object__close(d->host);
	free(d);
}

uint64_t *ps_director_words(struct ps_director *d) { return d->words; }
uint64_t *ps_director_egress(struct ps_director *d) { return d->egress; }
uint16_t *ps_director_pair_numbers(struct ps_director *d) { return d->pair_numbers; }

/* ---- XDP links ----------------------------------------------------------------------------------------- */

static void link_path(const struct ps_director *d, const char *name, char *path, size_t size)
{
	snprintf(path, size, "%s/link_%s", d->pins, name);
}

static int link_remove(const struct ps_director *d, const char *name)
{
	char path[600];
	int fd;

	link_path(d, name, path, sizeof(path));
	fd = bpf_obj_get(path);
	if (fd >= 0) {
		bpf_link_detach(fd);
		close(fd);
	}
	return unlink(path);
}

/* The program on `ifindex` in the current network namespace, its link pinned. -> 1 if it was not there */
static int link_make(struct ps_director *d, int program, uint32_t ifindex, const char *name, struct ps_error *e)
{
	LIBBPF_OPTS(bpf_link_create_opts, options, .flags = XDP_FLAGS_DRV_MODE);
	char path[600], ifname[IF_NAMESIZE] = "?";
	struct bpf_link_info info = { 0 };
	uint32_t length = sizeof(info), other = 0;
	int fd;

	link_path(d, name, path, sizeof(path));
	fd = bpf_obj_get(path);
	if (fd >= 0) {
		int same = !bpf_obj_get_info_by_fd(fd, &info, &length) && info.xdp.ifindex == ifindex;
		int updated = same && !bpf_link_update(fd, program, NULL);
		int why = errno;

		close(fd);
		if (updated)
			return 0;
		if (same) /* the old program goes on */
			return ps_fail(e, "interface %u: cannot replace its XDP program: %s", ifindex, strerror(why));
		link_remove(d, name); /* its device is gone, or another one now */
	}
	if_indextoname(ifindex, ifname);
	fd = bpf_link_create(program, (int)ifindex, BPF_XDP, &options);
	if (fd < 0) {
		int why = errno;

		if (!bpf_xdp_query_id((int)ifindex, 0, &other) && other)
			return ps_fail(e, "interface %s: another XDP program (id %u) is attached; detach it first",
				       ifname, other);
		if (why == EOPNOTSUPP)
			return ps_fail(e, "interface %s: its driver has no native XDP; leave it out of --uplink",
				       ifname);
		if (why == ERANGE || why == EINVAL)
			return ps_fail(e,
				       "interface %s: its MTU or offloads do not allow XDP (%s); use an MTU up to 3498",
				       ifname, strerror(why));
		return ps_fail(e, "interface %s: cannot attach the XDP program: %s", ifname, strerror(why));
	}
	if (bpf_obj_pin(fd, path)) {
		ps_fail(e, "%s: cannot pin: %s", path, strerror(errno));
		close(fd);
		return -1;
	}
	close(fd);
	return 1;
}

uint32_t ps_link_device(const struct ps_director *d, const char *name)
{
	struct bpf_link_info info = { 0 };
	uint32_t length = sizeof(info);
	char path[600];
	int fd;

	link_path(d, name, path, sizeof(path));
	fd = bpf_obj_get(path);
	if (fd < 0)
		return 0;
	if (bpf_obj_get_info_by_fd(fd, &info, &length))
		info.xdp.ifindex = 0;
	close(fd);
	return info.xdp.ifindex;
}

int ps_link_rename(const struct ps_director *d, const char *name, const char *to, struct ps_error *e)
{
	char path[600], fresh[600];

	link_path(d, name, path, sizeof(path));
	link_path(d, to, fresh, sizeof(fresh));
	return rename(path, fresh) ? ps_fail(e, "%s: cannot become %s: %s", path, fresh, strerror(errno)) : 0;
}

static int program_fd(struct bpf_object *o, const char *name)
{
	return bpf_program__fd(bpf_object__find_program_by_name(o, name));
}

int ps_director_attach(struct ps_director *d, uint32_t ifindex, int role, const char *name, struct ps_error *e)
{
	const char *program = role == PS_ROLE_UPLINK ? "director_uplink" : "director_routed";

	return link_make(d, program_fd(d->director, program), ifindex, name, e);
}

int ps_director_detach(struct ps_director *d, const char *name, struct ps_error *e)
{
	return link_remove(d, name) ? ps_fail(e, "%s: no director is attached under this name", name) : 0;
}

/* ---- tc ------------------------------------------------------------------------------------------------ */

/* What is there already is not replaced: each change would be told to those who watch the node's devices. */
static int tc_attach(int program, const char *name, uint32_t ifindex, struct ps_error *e)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = (int)ifindex, .attach_point = BPF_TC_INGRESS);
	LIBBPF_OPTS(bpf_tc_opts, there, .handle = 1, .priority = 1);
	LIBBPF_OPTS(bpf_tc_opts, options, .prog_fd = program, .handle = 1, .priority = 1, .flags = BPF_TC_F_REPLACE);
	struct bpf_prog_info info = { 0 };
	uint32_t length = sizeof(info);
	int result;

	if (!bpf_tc_query(&hook, &there) && !bpf_obj_get_info_by_fd(options.prog_fd, &info, &length) &&
	    there.prog_id == info.id)
		return 0;
	result = bpf_tc_hook_create(&hook);
	if (result && result != -EEXIST)
		return ps_fail(e, "interface %u: cannot add clsact: %s", ifindex, strerror(-result));
	result = bpf_tc_attach(&hook, &options);
	return result ? ps_fail(e, "interface %u: cannot attach %s: %s", ifindex, name, strerror(-result)) : 1;
}

int ps_host_program(struct ps_director *d, const struct ps_end *of, struct ps_error *e)
{
	struct bpf_object *o;
	char prefix[300];
	int fd;

	snprintf(prefix, sizeof(prefix), "%s/", d->pins);
	o = load(d->objects, "host.bpf.o", prefix, "host_egress", of, e);
	if (!o)
		return -1;
	fd = fcntl(program_fd(o, "host_egress"), F_DUPFD_CLOEXEC, 0);
	if (fd < 0)
		ps_fail(e, "engine %u: out of file descriptors", of->slot);
	bpf_object__close(o);
	return fd;
}

int ps_host_attach(uint32_t ifindex, int program, struct ps_error *e)
{
	return tc_attach(program, "host_egress", ifindex, e);
}

int ps_routed_attach(struct ps_director *d, uint32_t routed_ifindex, const uint8_t mac[6], struct ps_error *e)
{
	struct {
		uint32_t ifindex;
		uint8_t mac[8];
	} value = { .ifindex = routed_ifindex };
	uint32_t zero = 0;
	int link, filter;

	memcpy(value.mac, mac, 6);
	if (bpf_map_update_elem(map_fd(d->host, "routed"), &zero, &value, BPF_ANY))
		return ps_fail(e, "interface %u: cannot be made the routed end: %s", routed_ifindex, strerror(errno));
	link = link_make(d, program_fd(d->host, "routed_pass"), routed_ifindex, "routed_end", e);
	filter = link < 0 ? -1 : tc_attach(program_fd(d->host, "routed_ingress"), "routed_ingress", routed_ifindex, e);
	return filter < 0 ? -1 : link | filter;
}

/* ---- engines ------------------------------------------------------------------------------------------- */

struct engine_call {
	struct ps_director *d;
	const char *ifname, *name;
	const struct ps_end *of;
	struct ps_error *e;
};

static int engine_attach(void *argument)
{
	struct engine_call *c = argument;
	uint32_t ifindex = if_nametoindex(c->ifname);
	struct bpf_object *o;
	char prefix[400];
	int fd = -1;

	if (!ifindex)
		return ps_fail(c->e, "interface %s: not found in the engine's network namespace", c->ifname);
	snprintf(prefix, sizeof(prefix), "%s/%s_", c->d->pins, c->name);
	o = load(c->d->objects, "engine.bpf.o", prefix, "engine", c->of, c->e);
	if (!o)
		return -1;
	if (link_make(c->d, program_fd(o, "engine"), ifindex, c->name, c->e) >= 0) {
		fd = dup(map_fd(o, "queues"));
		if (fd < 0)
			ps_fail(c->e, "engine %s: out of file descriptors", c->name);
	}
	bpf_object__close(o);
	return fd;
}

int ps_engine_attach(struct ps_director *d, int netns, const char *ifname, const char *name, const struct ps_end *of,
		     struct ps_error *e)
{
	struct engine_call c = { d, ifname, name, of, e };

	return ps_in_netns(netns, engine_attach, &c, e);
}

int ps_engine_detach(struct ps_director *d, const char *name, struct ps_error *e)
{
	static const char *const maps[] = { "queues", "unstamped", "forged", "misdirected" };
	char path[600];
	int missing = link_remove(d, name);

	for (int i = 0; i < 4; i++) {
		snprintf(path, sizeof(path), "%s/%s_%s", d->pins, name, maps[i]);
		unlink(path);
	}
	return missing ? ps_fail(e, "engine %s: no program is attached under this name", name) : 0;
}

static uint64_t sum(const struct ps_director *d, const uint64_t *values, int stride)
{
	uint64_t total = 0;

	for (int i = 0; i < d->cpus; i++)
		total += values[i * stride];
	return total;
}

int ps_engine_refused(struct ps_director *d, const char *name, uint64_t frames[3], struct ps_error *e)
{
	static const char *const maps[] = { "unstamped", "forged", "misdirected" };

	for (int i = 0; i < 3; i++) {
		uint64_t values[1024];
		uint32_t zero = 0;
		char path[600];
		int fd, result;

		snprintf(path, sizeof(path), "%s/%s_%s", d->pins, name, maps[i]);
		fd = bpf_obj_get(path);
		if (fd < 0)
			return ps_fail(e, "%s: %s", path, strerror(errno));
		result = d->cpus > 1024 ? -1 : bpf_map_lookup_elem(fd, &zero, values);
		close(fd);
		if (result)
			return ps_fail(e, "%s: cannot read", path);
		frames[i] = sum(d, values, 1);
	}
	return 0;
}

/* ---- maps ---------------------------------------------------------------------------------------------- */

int ps_director_engine(struct ps_director *d, uint32_t slot, uint32_t ifindex, struct ps_error *e)
{
	int fd = map_fd(d->director, "engines");
	int result = ifindex ? bpf_map_update_elem(fd, &slot, &ifindex, BPF_ANY) : bpf_map_delete_elem(fd, &slot);

	if (result && !(!ifindex && errno == ENOENT))
		return ps_fail(e, "engine %u: cannot direct packets to interface %u: %s", slot, ifindex,
			       strerror(errno));
	return 0;
}

/* -> descriptor of the map that holds a pair, 0 if there is none, or -1 */
static int pair_map(int pairs, uint32_t number)
{
	uint32_t id;

	if (!bpf_map_lookup_elem(pairs, &number, &id))
		return bpf_map_get_fd_by_id(id);
	return errno == ENOENT ? 0 : -1;
}

int ps_director_pairs(struct ps_director *d, const struct ps_pair *wanted, int n, struct ps_error *e)
{
	int pairs = map_fd(d->director, "pairs"), result = 0;
	uint32_t *numbers = calloc((size_t)n + 1, sizeof(*numbers)), fresh = 0;
	int *fds = calloc((size_t)n + 1, sizeof(*fds));

	for (int i = 0; i < n && !result; i++) {
		int fd = numbers && fds && wanted[i].number < PS_MAX_PAIRS ? pair_map(pairs, wanted[i].number) : -1;
		int made = fd == 0;

		if (made)
			fd = bpf_map_create(BPF_MAP_TYPE_DEVMAP, "pair", 4, 4, 2, NULL);
		for (uint32_t side = 0; side < 2 && fd >= 0 && !result; side++)
			result = bpf_map_update_elem(fd, &side, &wanted[i].ifindex[side], BPF_ANY);
		if (fd < 0 || result)
			result = ps_fail(e, "pair %u of interfaces %u and %u: cannot be made: %s", wanted[i].number,
					 wanted[i].ifindex[0], wanted[i].ifindex[1], strerror(errno));
		if (made && fd >= 0) {
			numbers[fresh] = wanted[i].number;
			fds[fresh++] = fd;
		} else if (fd >= 0) {
			close(fd);
		}
	}
	if (!result && fresh) {
		uint32_t done = fresh;

		if (bpf_map_update_batch(pairs, numbers, fds, &done, NULL))
			result = ps_fail(e, "pairs: the director's map takes no more of them: %s", strerror(errno));
	}
	for (uint32_t i = 0; i < fresh; i++)
		close(fds[i]);
	free(numbers);
	free(fds);
	return result;
}

static int update(int fd, const void *key, const void *value, struct ps_error *e, const char *what)
{
	int result = value ? bpf_map_update_elem(fd, key, value, BPF_ANY) : bpf_map_delete_elem(fd, key);

	if (result && !(!value && errno == ENOENT))
		return ps_fail(e, "%s: cannot change the director's map: %s", what, strerror(errno));
	return 0;
}

/* Sets or clears one ps_own_kind of an address. */
static int own(struct ps_director *d, const uint8_t *address, uint32_t kind, int is, struct ps_error *e)
{
	int fd = map_fd(d->director, "own");
	uint32_t had = 0, kinds, bit = own_bit(address);

	bpf_map_lookup_elem(fd, address, &had);
	kinds = is ? had | kind : had & ~kind;
	if (kinds == had)
		return 0;
	if (is)
		__atomic_fetch_or(&d->filter->word[bit >> 6], 1ull << (bit & 63), __ATOMIC_RELAXED);
	return update(fd, address, kinds ? &kinds : NULL, e, "address");
}

int ps_director_node(struct ps_director *d, const uint8_t *addresses, const uint8_t *kinds, int n, struct ps_error *e)
{
	int fd = map_fd(d->director, "own"), more;
	uint8_t at[16], next[16];

	for (int i = 0; i < n; i++)
		for (uint32_t kind = PS_OWN_NODE; kind <= PS_OWN_BROADCAST; kind <<= 1)
			if (own(d, addresses + 16 * i, kind, !!(kinds[i] & kind), e))
				return -1;
	more = !bpf_map_get_next_key(fd, NULL, next);
	while (more) {
		int i = 0;

		memcpy(at, next, 16);
		more = !bpf_map_get_next_key(fd, at, next);
		while (i < n && memcmp(addresses + 16 * i, at, 16))
			i++;
		if (i == n && (own(d, at, PS_OWN_NODE, 0, e) || own(d, at, PS_OWN_BROADCAST, 0, e)))
			return -1;
	}
	return 0;
}

int ps_director_uplinks(struct ps_director *d, const struct ps_uplink *uplinks, int n, struct ps_error *e)
{
	int fd = map_fd(d->director, "uplinks");
	struct ps_uplink at[PS_MAX_UPLINKS], fresh;
	uint32_t place[PS_MAX_UPLINKS];
	uint64_t used = 0;

	if (n > PS_MAX_UPLINKS)
		return ps_fail(e, "%d uplinks: use at most %d", n, PS_MAX_UPLINKS);
	for (uint32_t i = 0; i < PS_MAX_UPLINKS; i++)
		if (bpf_map_lookup_elem(fd, &i, &at[i]))
			return ps_fail(e, "uplinks: cannot read the director's map: %s", strerror(errno));
	/* Those that have a place keep it; the others take what is free near their index. */
	for (int pass = 0; pass < 2; pass++) {
		for (int i = 0; i < n; i++) {
			uint32_t probe = 0, p = 0;

			if (pass && place[i] < PS_MAX_UPLINKS)
				continue;
			for (place[i] = PS_MAX_UPLINKS; probe < PS_UPLINK_PROBES; probe++) {
				p = (uplinks[i].ifindex + probe) & (PS_MAX_UPLINKS - 1);
				if (!(used >> p & 1) && (pass || at[p].ifindex == uplinks[i].ifindex))
					break;
			}
			if (probe < PS_UPLINK_PROBES) {
				place[i] = p;
				used |= 1ull << p;
			} else if (pass) {
				return ps_fail(
					e,
					"interface %u: the director has no place for another uplink; leave it out of --uplink",
					uplinks[i].ifindex);
			}
		}
	}
	for (int i = 0; i < n; i++) {
		uint32_t p = place[i];

		fresh = uplinks[i];
		if (at[p].ifindex == fresh.ifindex)
			fresh.flags |= at[p].flags & PS_UPLINK_NO_METADATA;
		if (memcmp(&fresh, &at[p], sizeof(fresh)) && update(fd, &p, &fresh, e, "uplink"))
			return -1;
	}
	memset(&fresh, 0, sizeof(fresh));
	for (uint32_t i = 0; i < PS_MAX_UPLINKS; i++)
		if (!(used >> i & 1) && at[i].ifindex && update(fd, &i, &fresh, e, "uplink"))
			return -1;
	return 0;
}

/*
 * Keeps the copy in the direct table. The kernel copies a value word by word while packets read it: the key
 * stands there only while the target is whole. A failure costs speed alone.
 */
static void direct(struct ps_director *d, const struct ps_listener_key4 *key, const struct ps_target *target)
{
	uint64_t wide = ps_direct_key(key->address, key->port, key->protocol);
	uint32_t slot = ps_direct_slot(wide);
	int fd = map_fd(d->director, "direct4");
	struct ps_direct at;

	if (bpf_map_lookup_elem(fd, &slot, &at) || (at.key && at.key != wide))
		return;
	if (at.key && target && !memcmp(&at.target, target, sizeof(*target)))
		return;
	at.key = 0;
	bpf_map_update_elem(fd, &slot, &at, BPF_ANY);
	if (!target)
		return;
	at.target = *target;
	bpf_map_update_elem(fd, &slot, &at, BPF_ANY);
	at.key = wide;
	bpf_map_update_elem(fd, &slot, &at, BPF_ANY);
}

static int listener(struct ps_director *d, const uint8_t *address, uint16_t port, uint8_t protocol,
		    const struct ps_target *target, struct ps_error *e)
{
	struct ps_listener_key4 key4 = { 0, port, protocol, 0 };
	struct ps_listener_key6 key6 = { { 0 }, port, protocol, 0 };

	memcpy(&key4.address, address + 12, 4);
	memcpy(key6.address, address, 16);
	if (!is_v4(address))
		return update(map_fd(d->director, "listeners6"), &key6, target, e, "listener");
	if (!target && port)
		direct(d, &key4, NULL);
	if (update(map_fd(d->director, "listeners4"), &key4, target, e, "listener"))
		return -1;
	if (target && port)
		direct(d, &key4, target);
	return 0;
}

/* Does any listener use this address still? */
static int address_used(struct ps_director *d, const uint8_t *address)
{
	int v4 = is_v4(address), fd = map_fd(d->director, v4 ? "listeners4" : "listeners6");
	union {
		struct ps_listener_key4 v4;
		struct ps_listener_key6 v6;
	} at, next;
	void *from = NULL;

	while (!bpf_map_get_next_key(fd, from, &next)) {
		if (v4 ? !memcmp(&next.v4.address, address + 12, 4) && next.v4.port
		       : !memcmp(next.v6.address, address, 16) && next.v6.port)
			return 1;
		at = next;
		from = &at;
	}
	return 0;
}

int ps_director_listener(struct ps_director *d, const uint8_t *address, uint16_t port, uint8_t protocol,
			 const struct ps_target *target, struct ps_error *e)
{
	struct ps_target whole;

	if (listener(d, address, port, protocol, target, e))
		return -1;
	/* Port 0, ICMP: the address answers echo requests while it has a listener. */
	if (target) {
		whole = *target;
		whole.flags = 0;
		return listener(d, address, 0, 1, &whole, e) || own(d, address, PS_OWN_STACK, 1, e) ? -1 : 0;
	}
	if (address_used(d, address))
		return 0;
	return listener(d, address, 0, 1, NULL, e) || own(d, address, PS_OWN_STACK, 0, e) ? -1 : 0;
}

int ps_director_allow(struct ps_director *d, const struct ps_allowed *a, int allow, struct ps_error *e)
{
	struct ps_allowed4 key4 = { 64u + a->prefix, { 0, a->port, a->protocol, 0 }, 0 };
	struct ps_allowed6 key6 = { 160u + a->prefix, { { 0 }, a->port, a->protocol, 0 }, { 0 } };
	uint32_t value = 1;

	memcpy(&key4.listener.address, a->address + 12, 4);
	memcpy(&key4.source, a->source + 12, 4);
	memcpy(key6.listener.address, a->address, 16);
	memcpy(key6.source, a->source, 16);
	return is_v4(a->address)
		       ? update(map_fd(d->director, "allowed4"), &key4, allow ? &value : NULL, e, "allowed source")
		       : update(map_fd(d->director, "allowed6"), &key6, allow ? &value : NULL, e, "allowed source");
}

int ps_director_allowed(struct ps_director *d, struct ps_allowed *out, int max)
{
	static const uint8_t mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };
	int fd4 = map_fd(d->director, "allowed4"), fd6 = map_fd(d->director, "allowed6"), n = 0;
	struct ps_allowed4 at4, *from4 = NULL;
	struct ps_allowed6 at6, *from6 = NULL;

	for (; n < max && !bpf_map_get_next_key(fd4, from4, &at4); from4 = &at4, n++) {
		out[n] = (struct ps_allowed){ .port = at4.listener.port,
					      .protocol = at4.listener.protocol,
					      .prefix = (uint8_t)(at4.prefix - 64) };
		memcpy(out[n].address, mapped, 12);
		memcpy(out[n].address + 12, &at4.listener.address, 4);
		memcpy(out[n].source, mapped, 12);
		memcpy(out[n].source + 12, &at4.source, 4);
	}
	for (; n < max && !bpf_map_get_next_key(fd6, from6, &at6); from6 = &at6, n++) {
		out[n] = (struct ps_allowed){ .port = at6.listener.port,
					      .protocol = at6.listener.protocol,
					      .prefix = (uint8_t)(at6.prefix - 160) };
		memcpy(out[n].address, at6.listener.address, 16);
		memcpy(out[n].source, at6.source, 16);
	}
	return n;
}

int ps_director_snat(struct ps_director *d, const uint8_t *address, const struct ps_target *target, struct ps_error *e)
{
	int failed = is_v4(address) ? update(map_fd(d->director, "snat4"), address + 12, target, e, "SNAT address")
				    : update(map_fd(d->director, "snat6"), address, target, e, "SNAT address");

	return failed ? -1 : own(d, address, PS_OWN_STACK, target != NULL, e);
}

/* Element `at` of a per-CPU map, `n` counters, summed over CPUs. */
static int read_counters(struct ps_director *d, int map, uint32_t at, int n, uint64_t *out, struct ps_error *e)
{
	uint64_t *values = calloc((size_t)d->cpus, (size_t)n * 8);

	if (!values || bpf_map_lookup_elem(map, &at, values)) {
		free(values);
		return ps_fail(e, "cannot read the director's counters: %s", strerror(errno));
	}
	for (int i = 0; i < n; i++)
		out[i] = sum(d, values + i, n);
	free(values);
	return 0;
}

int ps_director_counters(struct ps_director *d, uint64_t *out, struct ps_error *e)
{
	return read_counters(d, map_fd(d->director, "counters"), 0, PS_D_COUNTERS, out, e);
}

int ps_host_counters(struct ps_director *d, uint64_t *out, struct ps_error *e)
{
	return read_counters(d, map_fd(d->host, "host_counters"), 0, PS_H_COUNTERS, out, e);
}

/* ---- shedding ------------------------------------------------------------------------------------------ */

int ps_director_watch(struct ps_director *d, const uint8_t *address, uint16_t port, uint8_t protocol, uint32_t number,
		      struct ps_error *e)
{
	struct ps_listener_key4 key4 = { 0, port, protocol, 0 };
	struct ps_listener_key6 key6 = { { 0 }, port, protocol, 0 };
	int v4 = is_v4(address), fd = map_fd(d->director, v4 ? "listeners4" : "listeners6");
	const void *key = v4 ? (const void *)&key4 : &key6;
	struct ps_target target;
	uint32_t flags;

	memcpy(&key4.address, address + 12, 4);
	memcpy(key6.address, address, 16);
	if (number >= PS_MAX_WATCHED || bpf_map_lookup_elem(fd, key, &target))
		return 0;
	flags = (target.flags & ((1u << PS_WATCH_SHIFT) - 1)) | number << PS_WATCH_SHIFT;
	if (flags == target.flags)
		return 0;
	target.flags = flags;
	if (update(fd, key, &target, e, "listener"))
		return -1;
	if (v4)
		direct(d, &key4, &target);
	return 0;
}

struct ps_watch *ps_director_watches(struct ps_director *d) { return d->watches; }

int ps_director_watched(struct ps_director *d, uint32_t number, struct ps_watched *out, struct ps_error *e)
{
	return read_counters(d, map_fd(d->director, "watched"), number, sizeof(*out) / 8, (uint64_t *)out, e);
}

void ps_director_forget(struct ps_director *d, uint32_t half)
{
	memset(d->known + (half & 1) * PS_KNOWN_WORDS, 0, PS_KNOWN_WORDS * 8ul);
}

/* Beside the writers of the shards: an entry that is read half written gives one bit too many or too few. */
void ps_director_know(struct ps_director *d, uint32_t half, struct ps_arena *a)
{
	uint64_t *bits = d->known + (half & 1) * PS_KNOWN_WORDS;
	struct ps_shard_form form = ps_form_of(&a->form);

	for (uint32_t b = 0; b < a->buckets; b++) {
		uint32_t high = ps_shard_at(a, b)->high;

		for (uint32_t i = 0; i < high && i < a->entries; i++) {
			const uint8_t *f = ps_form_entry(a, &form, b, i);
			uint32_t hash = ps_form_u32(f, form.hash);
			uint8_t state = f[form.state];

			if (state == PS_FLOW_ESTABLISHED || state == PS_FLOW_CLOSING || state == PS_FLOW_ASSURED)
				bits[ps_known_word(hash)] |= 1ull << (hash & 63);
		}
	}
}
