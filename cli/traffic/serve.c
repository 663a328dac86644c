/* SPDX-License-Identifier: Apache-2.0 */
/* The server: answers requests over TCP, sends datagrams back with what it has counted. */
#include "protocol.h"

#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum { MAX_LISTENERS = 64, CHUNK = 65536, BATCH = 64, MAX_FLOWS = 1 << 20 };

enum kind { LISTENER, CONNECTION, DATAGRAMS, SIGNALS };

struct socket {
	enum kind kind;
	int fd;
	uint32_t got;  /* bytes of `request` */
	uint32_t left; /* of the answer in progress, its header included */
	int blocked;   /* waits for room in the socket */
	struct request request;
};

struct flow {
	uint64_t run;
	uint32_t flow;
	uint32_t reordered, duplicates;
	uint32_t used;
	uint64_t arrivals;
	struct window window;
};

static struct {
	uint64_t connections, open, answers, bytes, malformed;
	uint64_t datagrams, reordered, duplicates, unsent, forgotten;
} count;

static int poller;
static struct flow *flows;
static uint64_t flows_used, flows_size = 4096;

static void watch(struct socket *socket, uint32_t events, int operation)
{
	struct epoll_event event = { .events = events, .data.ptr = socket };

	if (epoll_ctl(poller, operation, socket->fd, &event))
		err(1, "epoll");
}

static struct socket *add(enum kind kind, int fd)
{
	struct socket *socket = calloc(1, sizeof(*socket));

	if (!socket)
		err(1, "memory");
	socket->kind = kind;
	socket->fd = fd;
	watch(socket, EPOLLIN, EPOLL_CTL_ADD);
	return socket;
}

static void hang_up(struct socket *socket)
{
	close(socket->fd);
	free(socket);
	count.open--;
}

/* Returns 0 when the socket is gone. */
static int answer(struct socket *socket)
{
	static uint8_t chunk[CHUNK];

	while (socket->left) {
		uint32_t total = socket->request.size + sizeof(struct answer);
		uint32_t done = total - socket->left, fill = 0;

		if (done < sizeof(struct answer)) {
			struct answer header = { ANSWER_MAGIC, socket->request.size, socket->request.sequence };

			fill = sizeof(header) - done;
			memcpy(chunk, (uint8_t *)&header + done, fill);
		}
		uint32_t offset = done + fill - sizeof(struct answer);
		uint32_t part = socket->left - fill < CHUNK - fill ? socket->left - fill : CHUNK - fill;

		stream_bytes(chunk + fill, socket->request.seed, socket->request.sequence, offset, part);
		ssize_t sent = send(socket->fd, chunk, fill + part, MSG_NOSIGNAL);

		if (sent < 0) {
			if (errno == EAGAIN) {
				if (!socket->blocked)
					watch(socket, EPOLLOUT, EPOLL_CTL_MOD);
				socket->blocked = 1;
				return 1;
			}
			hang_up(socket);
			return 0;
		}
		socket->left -= sent;
		count.bytes += sent;
	}
	count.answers++;
	if (socket->blocked)
		watch(socket, EPOLLIN, EPOLL_CTL_MOD);
	socket->blocked = 0;
	return 1;
}

static void read_request(struct socket *socket)
{
	ssize_t got =
		recv(socket->fd, (uint8_t *)&socket->request + socket->got, sizeof(socket->request) - socket->got, 0);

	if (got < 0 && errno == EAGAIN)
		return;
	if (got <= 0) {
		hang_up(socket);
		return;
	}
	socket->got += got;
	if (socket->got < sizeof(socket->request))
		return;
	socket->got = 0;
	if (socket->request.magic != REQUEST_MAGIC || socket->request.size > MAX_ANSWER) {
		count.malformed++;
		hang_up(socket);
		return;
	}
	socket->left = socket->request.size + sizeof(struct answer);
	answer(socket);
}

static void accept_connections(int listener)
{
	for (int i = 0; i < BATCH; i++) {
		int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), one = 1;

		if (fd < 0)
			return;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		add(CONNECTION, fd);
		count.connections++;
		count.open++;
	}
}

static struct flow *find_flow(uint64_t run, uint32_t number)
{
	if (flows_used * 2 >= flows_size) {
		struct flow *old = flows;
		uint64_t old_size = flows_size;

		flows_size *= 2;
		flows = calloc(flows_size, sizeof(*flows));
		if (!flows)
			err(1, "memory");
		flows_used = 0;
		for (uint64_t i = 0; i < old_size; i++)
			if (old[i].used)
				*find_flow(old[i].run, old[i].flow) = old[i];
		free(old);
	}
	uint64_t slot = stream_word(run, number, 0) & (flows_size - 1);

	while (flows[slot].used && (flows[slot].run != run || flows[slot].flow != number))
		slot = (slot + 1) & (flows_size - 1);
	if (!flows[slot].used) {
		flows_used++;
		flows[slot] = (struct flow){ .run = run, .flow = number, .used = 1 };
	}
	return &flows[slot];
}

static void count_datagram(struct datagram *datagram)
{
	if (flows_used >= MAX_FLOWS) { /* a server that runs for days */
		memset(flows, 0, flows_size * sizeof(*flows));
		count.forgotten += flows_used;
		flows_used = 0;
	}
	struct flow *flow = find_flow(datagram->run, datagram->flow);

	if (datagram->kind == DATAGRAM_DATA) {
		enum arrival how = window_add(&flow->window, datagram->sequence);

		if (how == DUPLICATE) {
			flow->duplicates++;
			count.duplicates++;
		} else {
			flow->arrivals++;
			count.datagrams++;
		}
		if (how == REORDERED) {
			flow->reordered++;
			count.reordered++;
		}
	}
	datagram->arrival = flow->arrivals;
	datagram->reordered = flow->reordered;
	datagram->duplicates = flow->duplicates;
}

static void echo(int fd)
{
	static uint8_t bytes[BATCH][MAX_DATAGRAM];
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	union endpoint peers[BATCH];

	for (int i = 0; i < BATCH; i++) {
		parts[i] = (struct iovec){ bytes[i], sizeof(bytes[i]) };
		messages[i] = (struct mmsghdr){ .msg_hdr = { &peers[i], sizeof(peers[i]), &parts[i], 1, NULL, 0, 0 } };
	}
	int got = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL), good = 0;

	for (int i = 0; i < got; i++) {
		struct datagram *datagram = (struct datagram *)bytes[i];

		if (messages[i].msg_len < sizeof(*datagram) || datagram->magic != DATAGRAM_MAGIC) {
			count.malformed++;
			continue;
		}
		count_datagram(datagram);
		parts[i].iov_len = messages[i].msg_len;
		messages[good] = messages[i];
		good++;
	}
	for (int sent = 0; sent < good;) {
		int more = sendmmsg(fd, messages + sent, good - sent, 0);

		if (more <= 0) { /* an earlier ICMP error is reported once: the datagram itself may go */
			if (errno == EAGAIN || errno == ENOBUFS || errno == EPERM) {
				count.unsent++;
				sent++;
			}
			continue;
		}
		sent += more;
	}
}

static int bind_socket(const char *text, int type)
{
	union endpoint endpoint = endpoint_parse(text, 1);
	int one = 1, size = 64 << 20;
	int fd = socket(endpoint.any.sa_family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		err(1, "%s", text);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (type == SOCK_DGRAM && setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	if (type == SOCK_DGRAM && setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)))
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	if (bind(fd, &endpoint.any, endpoint_length(&endpoint)))
		err(1, "%s", text);
	if (type == SOCK_STREAM && listen(fd, 4096))
		err(1, "%s", text);
	return fd;
}

static void report(const char *path, const int *datagram_sockets, int sockets)
{
	FILE *file = path ? fopen(path, "w") : stdout;
	uint64_t drops = 0;

	if (!file)
		err(1, "%s", path);
	for (int i = 0; i < sockets; i++)
		drops += socket_drops(datagram_sockets[i]);
	fprintf(file,
		"{\"connections\": %lu, \"open\": %lu, \"answers\": %lu, \"bytes\": %lu, \"malformed\": %lu,"
		" \"datagrams\": %lu, \"reordered\": %lu, \"duplicates\": %lu, \"unsent\": %lu,"
		" \"socket_drops\": %lu, \"flows\": %lu, \"cpu_seconds\": %.3f}\n",
		count.connections, count.open, count.answers, count.bytes, count.malformed, count.datagrams,
		count.reordered, count.duplicates, count.unsent, drops, flows_used + count.forgotten,
		processor_seconds());
	if (fflush(file))
		err(1, "%s", path ? path : "standard output");
}

static void usage(FILE *to)
{
	fputs("packetstack-traffic serve [--bind ADDRESS:PORT]... [--udp ADDRESS:PORT]... [--cpu N] [--report FILE]\n"
	      "\n"
	      "  --bind    answer requests over TCP\n"
	      "  --udp     send datagrams back, with the number of those received\n"
	      "  --cpu     run on this CPU\n"
	      "  --report  write counts as JSON at the end (SIGTERM); default: standard output\n"
	      "\n"
	      "Prints \"ready\" when all sockets are open.\n",
	      to);
}

int serve(int argc, char **argv)
{
	static const struct option options[] = {
		{ "bind", required_argument, NULL, 'b' }, { "udp", required_argument, NULL, 'u' },
		{ "cpu", required_argument, NULL, 'c' },  { "report", required_argument, NULL, 'r' },
		{ "help", no_argument, NULL, 'h' },	  { NULL, 0, NULL, 0 },
	};
	const char *binds[MAX_LISTENERS], *udps[MAX_LISTENERS], *report_path = NULL;
	int bind_count = 0, udp_count = 0, datagram_sockets[MAX_LISTENERS], option;
	struct epoll_event events[256];
	sigset_t signals;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'b':
			if (bind_count == MAX_LISTENERS)
				errx(2, "--bind: at most %d", MAX_LISTENERS);
			binds[bind_count++] = optarg;
			break;
		case 'u':
			if (udp_count == MAX_LISTENERS)
				errx(2, "--udp: at most %d", MAX_LISTENERS);
			udps[udp_count++] = optarg;
			break;
		case 'c': pin(atol(optarg)); break;
		case 'r': report_path = optarg; break;
		case 'h': usage(stdout); return 0;
		default: usage(stderr); return 2;
		}
	}
	if (optind != argc || bind_count + udp_count == 0) {
		usage(stderr);
		return 2;
	}
	raise_descriptor_limit(1024, 65536);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	flows = calloc(flows_size, sizeof(*flows));
	poller = epoll_create1(EPOLL_CLOEXEC);
	if (poller < 0 || !flows)
		err(1, "epoll");
	add(SIGNALS, signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC));
	for (int i = 0; i < bind_count; i++)
		add(LISTENER, bind_socket(binds[i], SOCK_STREAM));
	for (int i = 0; i < udp_count; i++) {
		datagram_sockets[i] = bind_socket(udps[i], SOCK_DGRAM);
		add(DATAGRAMS, datagram_sockets[i]);
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int ready = epoll_wait(poller, events, 256, -1);

		for (int i = 0; i < ready; i++) {
			struct socket *socket = events[i].data.ptr;

			switch (socket->kind) {
			case LISTENER: accept_connections(socket->fd); break;
			case CONNECTION:
				if (socket->left)
					answer(socket);
				else
					read_request(socket);
				break;
			case DATAGRAMS: echo(socket->fd); break;
			case SIGNALS: report(report_path, datagram_sockets, udp_count); return 0;
			}
		}
	}
}
