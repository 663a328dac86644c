/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sends through a path between network namespaces that a benchmark made, and counts what arrives. One slice, then it
 * ends and has left nothing behind: its programs go with it.
 *
 *   generator, client (XDP, c0) -> up0: what is measured: dn0 -> s0: server (XDP)
 *
 * Every flow is used and answered before it counts. Prints NAME VALUE lines.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <arpa/inet.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

enum { FRAME = 60, BATCH = 64, WINDOW = 256, STALL_MS = 20, CPUS = 512 };

struct path { /* as in path.bpf.c */
	uint64_t begun, forgotten, ended;
	uint32_t flows, window, vip;
	uint16_t port;
	uint8_t connections, silent, gateway[6], client[6];
};

static struct {
	const char *object, *prefix, *pass;
	uint64_t first;
	uint32_t flows;
	double seconds, warm_seconds;
	int cpu, nice, warm;
	bool connections;
	struct sockaddr_in target;
} wish = { .seconds = 1, .warm = 1, .flows = 1024 };

static struct bpf_object *object;
static volatile struct path *path;
static volatile bool ended;

static void enter(const char *room)
{
	char name[200];
	int fd;

	snprintf(name, sizeof(name), "/run/netns/%s-%s", wish.prefix, room);
	fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || setns(fd, CLONE_NEWNET))
		err(1, "%s", name);
	close(fd);
}

static struct bpf_program *program(const char *name) { return bpf_object__find_program_by_name(object, name); }

static int map(const char *name) { return bpf_object__find_map_fd_by_name(object, name); }

/* Until this process ends. */
static void attach(const char *device, const char *name)
{
	if (!bpf_program__attach_xdp(program(name), (int)if_nametoindex(device)))
		err(1, "%s: XDP", device);
}

static void address_of(const char *device, volatile uint8_t mac[6])
{
	struct ifreq request = { 0 };
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	strncpy(request.ifr_name, device, IFNAMSIZ - 1);
	if (fd < 0 || ioctl(fd, SIOCGIFHWADDR, &request))
		err(1, "%s", device);
	close(fd);
	for (int i = 0; i < 6; i++)
		mac[i] = (uint8_t)request.ifr_hwaddr.sa_data[i];
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t arrived(void)
{
	static uint64_t values[CPUS];
	uint64_t total = 0;
	uint32_t zero = 0;

	if (bpf_map_lookup_elem(map("arrived"), &zero, values))
		err(1, "arrived");
	for (int i = 0; i < libbpf_num_possible_cpus(); i++)
		total += values[i];
	return total;
}

static void interrupted(int number) { (void)number; }

static void *generator(void *unused)
{
	uint8_t frame[FRAME] = { 0 };
	cpu_set_t set;
	LIBBPF_OPTS(bpf_test_run_opts, o, .data_in = frame, .data_size_in = FRAME, .repeat = 1 << 30,
		    .flags = BPF_F_TEST_XDP_LIVE_FRAMES, .batch_size = BATCH);

	CPU_ZERO(&set);
	CPU_SET(wish.cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "CPU %d", wish.cpu);
	setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), wish.nice);
	while (!ended)
		if (bpf_prog_test_run_opts(bpf_program__fd(program("generate")), &o) && errno != EINTR)
			err(1, "generator");
	return unused;
}

/* What the window waits for in vain is given up, so that a lost packet costs 20 ms of one slot and not the slice. */
static void unstick(uint64_t *ended_then, double *since)
{
	if (path->ended != *ended_then) {
		*ended_then = path->ended;
		*since = now();
	} else if (now() - *since > STALL_MS * 1e-3) {
		path->forgotten = path->begun - path->ended;
		*since = now();
	}
}

/* Until so many have begun and `least` seconds are over, at most `limit` seconds. */
static void until(uint64_t begun, double least, double limit)
{
	double from = now(), since = from;
	uint64_t then = path->ended;

	while ((path->begun < begun || now() - from < least) && now() - from < limit) {
		usleep(1000);
		unstick(&then, &since);
	}
}

static void options(int argc, char **argv)
{
	static const struct option known[] = {
		{ "object", 1, NULL, 'o' }, { "prefix", 1, NULL, 'p' },
		{ "pass", 1, NULL, 'a' },   { "flows", 1, NULL, 'f' },
		{ "first", 1, NULL, 'b' },  { "seconds", 1, NULL, 's' },
		{ "cpu", 1, NULL, 'c' },    { "nice", 1, NULL, 'n' },
		{ "warm", 1, NULL, 'w' },   { "warm-seconds", 1, NULL, 'W' },
		{ "target", 1, NULL, 't' }, { "connections", 0, NULL, 'C' },
		{ NULL, 0, NULL, 0 },
	};
	char address[32], *colon;
	int option;

	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (option) {
		case 'o': wish.object = optarg; break;
		case 'p': wish.prefix = optarg; break;
		case 'a': wish.pass = optarg; break;
		case 'f': wish.flows = (uint32_t)strtoul(optarg, NULL, 10); break;
		case 'b': wish.first = strtoull(optarg, NULL, 10); break;
		case 's': wish.seconds = atof(optarg); break;
		case 'c': wish.cpu = atoi(optarg); break;
		case 'n': wish.nice = atoi(optarg); break;
		case 'w': wish.warm = atoi(optarg); break;
		case 'W': wish.warm_seconds = atof(optarg); break;
		case 't':
			snprintf(address, sizeof(address), "%s", optarg);
			colon = strchr(address, ':');
			if (colon)
				*colon = 0;
			if (!colon || inet_pton(AF_INET, address, &wish.target.sin_addr) != 1)
				errx(2, "%s: is not IPV4:PORT", optarg);
			wish.target.sin_port = htons((uint16_t)atoi(colon + 1));
			break;
		case 'C': wish.connections = true; break;
		default: exit(2);
		}
	}
	if (!wish.object || !wish.prefix || !wish.target.sin_port || !wish.flows || wish.flows & (wish.flows - 1) ||
	    wish.flows > 1 << 24 || wish.seconds <= 0 || wish.seconds > 60)
		errx(2,
		     "usage: bench_path --object FILE --prefix LAB --target IPV4:PORT [--flows 2^N] [--seconds N] [--cpu N]\n"
		     "  [--nice N] [--warm PASSES] [--warm-seconds N] [--pass DEVICES] [--connections [--first N]]");
}

static void set_up(void)
{
	char devices[100], *rest = devices;
	uint32_t zero = 0, ifindex;

	object = bpf_object__open_file(wish.object, NULL);
	if (!object || bpf_object__load(object))
		errx(1, "%s: cannot be loaded; needs root", wish.object);
	path = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, map("paths"), 0);
	if (path == MAP_FAILED)
		err(1, "paths");
	enter("server");
	attach("s0", "server");
	enter("node");
	address_of("up0", path->gateway);
	snprintf(devices, sizeof(devices), "%s", wish.pass ? wish.pass : "");
	for (char *one; (one = strsep(&rest, ","));)
		if (*one)
			attach(one, "pass");
	enter("client");
	address_of("c0", path->client);
	attach("c0", "client");
	ifindex = if_nametoindex("c0");
	if (bpf_map_update_elem(map("out"), &zero, &ifindex, BPF_ANY))
		err(1, "c0");
	path->vip = wish.target.sin_addr.s_addr;
	path->port = wish.target.sin_port;
	path->flows = wish.connections ? 1 << 24 : wish.flows;
	path->connections = wish.connections;
	path->window = WINDOW;
	path->begun = path->ended = wish.first;
}

int main(int argc, char **argv)
{
	uint64_t begun, ended0, arrived0, forgotten;
	struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	pthread_t thread;
	double from, took;

	options(argc, argv);
	alarm((unsigned)wish.seconds + 90);
	setrlimit(RLIMIT_MEMLOCK, &unlimited);
	signal(SIGUSR1, interrupted);
	set_up();
	if (pthread_create(&thread, NULL, generator, NULL))
		err(1, "thread");
	if (wish.connections) {
		usleep(200000);
	} else {
		until((uint64_t)wish.flows * (uint64_t)wish.warm, wish.warm_seconds, 60);
		usleep(50000);
		/* Those that are under way are no more than the window. */
		printf("answered_percent %.2f\n", 100. * (double)(path->ended + WINDOW) / (double)(path->begun + 1));
		path->silent = 1;
		path->window = 0;
		usleep(200000);
	}
	from = now();
	begun = path->begun;
	ended0 = path->ended;
	arrived0 = arrived();
	forgotten = path->forgotten;
	if (wish.connections)
		until(UINT64_MAX, 0, wish.seconds);
	else
		usleep((useconds_t)(wish.seconds * 1e6));
	took = now() - from;
	printf("sent_kpps %.2f\narrived_kpps %.2f\nended_k %.3f\nforgotten %lld\n",
	       (double)(path->begun - begun) / took / 1e3, (double)(arrived() - arrived0) / took / 1e3,
	       (double)(path->ended - ended0) / took / 1e3, (long long)(path->forgotten - forgotten));
	printf("next %llu\n", (unsigned long long)path->begun);
	ended = true;
	for (int i = 0; i < 100 && pthread_tryjoin_np(thread, NULL); i++) {
		pthread_kill(thread, SIGUSR1);
		usleep(2000);
	}
	return 0;
}
