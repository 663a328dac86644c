/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the director costs, beside programs that do less, in turns.
 *
 *   generator -> gen0 | gen1: the program measured -> eng0 | eng1: sink
 *                                            mirrored -> kept0 | kept1: sink, too
 *
 * All in a network namespace of its own, on one CPU. Packets come from BPF_PROG_TEST_RUN with live
 * frames. Each line of the output is one round: NAME VALUE; values are ns in the program (its run time as
 * the kernel counts it) or thousand packets/s through the whole pipeline.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <arpa/inet.h>
#include <linux/if_link.h>
#include <net/if.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include "packetstack/abi.h"

enum { BUCKETS = 4096, FRAME = 60, BATCH = 256, TURNS = 6 };

struct setting { /* as in director.bpf.c */
	uint64_t next;
	uint32_t flows;
	uint32_t address;
	uint16_t port;
};

static struct bpf_object *director, *tools;
static uint64_t *words;
static int gen0, gen1, eng0, eng1;
static atomic_bool rewriting, done;

static void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

static void run(const char *command)
{
	if (system(command))
		fail("failed: %s", command);
}

static struct bpf_object *load(const char *path)
{
	struct bpf_object *o = bpf_object__open_file(path, NULL);

	if (!o || bpf_object__load(o))
		fail("%s: cannot be loaded: %s; needs root", path, strerror(errno));
	return o;
}

static int program(struct bpf_object *o, const char *name)
{
	return bpf_program__fd(bpf_object__find_program_by_name(o, name));
}

static void put(struct bpf_object *o, const char *map, const void *key, const void *value)
{
	if (bpf_map_update_elem(bpf_object__find_map_fd_by_name(o, map), key, value, BPF_ANY))
		fail("map %s: %s", map, strerror(errno));
}

static void attach(int ifindex, int prog)
{
	if (bpf_xdp_attach(ifindex, prog, XDP_FLAGS_DRV_MODE, NULL))
		fail("XDP: cannot be attached: %s", strerror(errno));
}

static struct bpf_prog_info info_of(int prog)
{
	struct bpf_prog_info info = { 0 };
	uint32_t size = sizeof(info);

	if (bpf_obj_get_info_by_fd(prog, &info, &size))
		fail("program: %s", strerror(errno));
	return info;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void generate(uint32_t flows, uint32_t packets)
{
	struct setting s = { .flows = flows, .address = inet_addr("198.51.100.1"), .port = htons(80) };
	uint8_t frame[FRAME] = { 0 };
	uint32_t zero = 0;
	LIBBPF_OPTS(bpf_test_run_opts, o, .data_in = frame, .data_size_in = FRAME, .repeat = (int)packets,
		    .flags = BPF_F_TEST_XDP_LIVE_FRAMES, .batch_size = BATCH);

	put(tools, "settings", &zero, &s);
	if (bpf_prog_test_run_opts(program(tools, "generate"), &o))
		fail("generator: %s", strerror(errno));
}

/* `subject` on gen1. -> ns a packet inside it, as the kernel counts */
static double time_in(int subject, uint32_t flows, uint32_t packets)
{
	struct bpf_prog_info before, after;

	attach(gen1, subject);
	generate(flows, packets / 8); /* warm */
	before = info_of(subject);
	generate(flows, packets);
	after = info_of(subject);
	if (after.run_cnt - before.run_cnt < packets / 4)
		fail("only %llu of %u packets came", after.run_cnt - before.run_cnt, packets);
	return (double)(after.run_time_ns - before.run_time_ns) / (double)(after.run_cnt - before.run_cnt);
}

/* `subject` on gen1. -> thousand packets/s that reach the sink. Without run times: counting them costs, too. */
static double rate(int subject, uint32_t flows, uint32_t packets)
{
	uint64_t first, last;
	uint32_t zero = 0;
	double seconds;
	int map = bpf_object__find_map_fd_by_name(tools, "sunk");

	attach(gen1, subject);
	generate(flows, packets / 8);
	if (bpf_map_lookup_elem(map, &zero, &first))
		fail("sink: cannot be read");
	seconds = now();
	generate(flows, packets);
	seconds = now() - seconds;
	if (bpf_map_lookup_elem(map, &zero, &last))
		fail("sink: cannot be read");
	return (double)(last - first) / seconds / 1e3;
}

/* A handover of every bucket each millisecond, which is about what one takes. */
static void *rewrite(void *unused)
{
	struct timespec pause = { .tv_nsec = 1000000 };

	(void)unused;
	for (uint32_t epoch = 1; !atomic_load(&done); nanosleep(&pause, NULL)) {
		if (!atomic_load(&rewriting))
			continue;
		epoch++;
		for (uint32_t b = 0; b < BUCKETS; b++)
			__atomic_store_n(&words[b], ps_word(epoch, 1 + (epoch & 1), 0, 0, 0), __ATOMIC_RELEASE);
	}
	return NULL;
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

static void put_fd(int map, uint32_t key, int value)
{
	if (bpf_map_update_elem(map, &key, &value, BPF_ANY))
		fail("pair: %s", strerror(errno));
}

static void set_up(void)
{
	uint16_t *numbers;
	int pair;
	struct ps_listener_key4 key = { .address = inet_addr("198.51.100.1"), .port = htons(80), .protocol = 17 };
	struct ps_target target = { .key0 = 0x0123456789abcdef, .key1 = 0xfedcba9876543210, .mask = BUCKETS - 1 };
	struct ps_uplink uplink = { .flags = PS_UPLINK_CLIENTS | PS_UPLINK_BACKENDS,
				    .mac_high = 0x02020202, /* where the generator sends to */
				    .mac_low = 0x0202 };
	struct ps_direct at;
	uint32_t place;

	if (unshare(CLONE_NEWNET))
		fail("network namespace: %s; needs root", strerror(errno));
	run("ip link add gen0 type veth peer name gen1 && ip link add eng0 type veth peer name eng1 && "
	    "ip link add kept0 type veth peer name kept1 && for d in gen0 gen1 eng0 eng1 kept0 kept1; do ip link set $d addrgenmode none up || exit 1; done");
	gen0 = (int)if_nametoindex("gen0");
	gen1 = (int)if_nametoindex("gen1");
	eng0 = (int)if_nametoindex("eng0");
	eng1 = (int)if_nametoindex("eng1");
	words = mmap(NULL, PS_TABLE_WORDS * 8ul, PROT_READ | PROT_WRITE, MAP_SHARED,
		     bpf_object__find_map_fd_by_name(director, "words"), 0);
	if (words == MAP_FAILED)
		fail("flow table: %s", strerror(errno));
	for (uint32_t b = 0; b < BUCKETS; b++)
		words[b] = ps_word(1, 1, 0, 0, 0);
	at.key = ps_direct_key(key.address, key.port, key.protocol);
	at.target = target;
	place = ps_direct_slot(at.key);
	put(director, "listeners4", &key, &target);
	put(director, "direct4", &place, &at);
	uplink.ifindex = (uint32_t)gen1;
	place = uplink.ifindex & (PS_MAX_UPLINKS - 1);
	put(director, "uplinks", &place, &uplink);
	for (uint32_t slot = 1; slot <= 2; slot++)
		put(director, "engines", &slot, &eng0);
	put(tools, "out", &(uint32_t){ 0 }, &gen0);
	put(tools, "out", &(uint32_t){ 1 }, &eng0);
	attach(gen0, program(tools, "sink"));
	attach(eng1, program(tools, "sink"));
	attach((int)if_nametoindex("kept1"), program(tools, "sink"));
	pair = bpf_map_create(BPF_MAP_TYPE_DEVMAP, "pair", 4, 4, 2, NULL);
	put_fd(pair, 0, eng0);
	put_fd(pair, 1, (int)if_nametoindex("kept0"));
	put(director, "pairs", &(uint32_t){ 1 }, &pair);
	numbers = mmap(NULL, PS_TABLE_WORDS * 2ul, PROT_READ | PROT_WRITE, MAP_SHARED,
		       bpf_object__find_map_fd_by_name(director, "pair_numbers"), 0);
	if (numbers == MAP_FAILED)
		fail("pairs: %s", strerror(errno));
	for (uint32_t b = 0; b < BUCKETS; b++)
		numbers[b] = 1;
}

/* Every bucket has a previous owner, or none has. */
static void mirror(int on)
{
	for (uint32_t b = 0; b < BUCKETS; b++)
		__atomic_store_n(&words[b], ps_word(2, 1, 0, on ? 2 : 0, 0), __ATOMIC_RELEASE);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		uint32_t flows;
	} sizes[] = { { "1k", 1 << 10 }, { "1M", 1 << 20 } };
	int empty, table, swap, routed, uplink, cpus = (int)sysconf(_SC_NPROCESSORS_ONLN), rounds, statistics;
	pthread_t thread;
	uint32_t packets;

	if (argc != 5)
		fail("usage: %s director.bpf.o bench.bpf.o ROUNDS PACKETS", argv[0]);
	rounds = atoi(argv[3]);
	packets = (uint32_t)atoi(argv[4]);
	director = load(argv[1]);
	tools = load(argv[2]);
	set_up();
	if (pthread_create(&thread, NULL, rewrite, NULL))
		fail("no thread");
	pin(cpus - 1);
	empty = program(tools, "empty");
	table = program(tools, "table");
	swap = program(tools, "swap");
	routed = program(director, "director_routed");
	uplink = program(director, "director_uplink");
	for (int round = 0; round < rounds; round++) {
		for (int i = 0; i < 2; i++) {
			const char *size = sizes[i].name;
			uint32_t flows = sizes[i].flows;
			double base, steady, ahead, moving, bare, mirrored, away, back;

			statistics = bpf_enable_stats(BPF_STATS_RUN_TIME);
			if (statistics < 0)
				fail("run times: %s", strerror(errno));
			base = time_in(empty, flows, packets);
			bare = time_in(table, flows, packets) - base;
			steady = time_in(routed, flows, packets) - base;
			ahead = time_in(uplink, flows, packets) - base;
			atomic_store(&rewriting, true);
			moving = time_in(routed, flows, packets) - base;
			atomic_store(&rewriting, false);
			mirror(1);
			mirrored = time_in(routed, flows, packets) - base;
			mirror(0);
			close(statistics);
			printf("empty_%s %.2f\ntable_%s %.2f\ndirector_%s %.2f\nuplink_%s %.2f\nhandover_%s %.2f\n"
			       "mirror_%s %.2f\n",
			       size, base, size, bare, size, steady, size, ahead, size, moving, size, mirrored);
			/* In short turns, so that what else the machine does meets both alike. */
			for (int turn = 0; turn < TURNS; turn++) {
				away = rate(routed, flows, packets / TURNS);
				back = rate(swap, flows, packets / TURNS);
				mirror(1);
				mirrored = rate(routed, flows, packets / TURNS) / 2; /* the sinks of both count */
				mirror(0);
				printf("pipeline_%s %.1f\nswap_%s %.1f\ndoubled_%s %.1f\n", size, away, size, back,
				       size, mirrored);
			}
			fflush(stdout);
		}
	}
	atomic_store(&done, true);
	pthread_join(thread, NULL);
	return 0;
}
