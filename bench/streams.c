/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Round trips in a closed loop and bulk transfers, by ordinary sockets. Ends by itself.
 *
 *   bench_streams serve TCP_PORT UDP_PORT ADDRESS...
 *   bench_streams tcp|udp|bulk IPV4:PORT SECONDS [CONNECTIONS]
 *
 * The first byte of a connection says what the server does with it. Prints NAME VALUE lines.
 */
#include "../cli/traffic/protocol.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { SIZE = 64, CHUNK = 1 << 17, SAMPLES = 1 << 22, WAIT_MS = 500, CONNECTIONS = 64, SERVE_SECONDS = 900 };

static struct sockaddr_in endpoint(const char *text) { return endpoint_parse(text, 1).v4; }

static void *serve_connection(void *argument)
{
	int fd = (int)(intptr_t)argument;
	char *buffer = malloc(CHUNK);
	ssize_t n;

	if (buffer && read(fd, buffer, 1) == 1) {
		int echo = buffer[0] == 'e';

		while ((n = read(fd, buffer, CHUNK)) > 0)
			if (echo && write(fd, buffer, (size_t)n) != n)
				break;
	}
	free(buffer);
	close(fd);
	return NULL;
}

static void *serve_datagrams(void *argument)
{
	int fd = (int)(intptr_t)argument;
	char buffer[2048];

	for (;;) {
		struct sockaddr_in from;
		socklen_t size = sizeof(from);
		ssize_t n = recvfrom(fd, buffer, sizeof(buffer), 0, (struct sockaddr *)&from, &size);

		if (n > 0)
			sendto(fd, buffer, (size_t)n, 0, (struct sockaddr *)&from, size);
	}
	return NULL;
}

static void in_thread(void *(*function)(void *), int fd)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, function, (void *)(intptr_t)fd))
		errx(1, "thread");
	pthread_detach(thread);
}

static void serve_all(int argc, char **argv)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[0])) };
	int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

	alarm(SERVE_SECONDS);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof(at)) || listen(fd, 64))
		err(1, "TCP port %s", argv[0]);
	at.sin_port = htons((uint16_t)atoi(argv[1]));
	for (int i = 2; i < argc; i++) { /* a socket an address: an answer comes from where it was asked */
		int udp = socket(AF_INET, SOCK_DGRAM, 0);

		if (inet_pton(AF_INET, argv[i], &at.sin_addr) != 1 || udp < 0 ||
		    bind(udp, (struct sockaddr *)&at, sizeof(at)))
			err(1, "%s", argv[i]);
		in_thread(serve_datagrams, udp);
	}
	for (;;) {
		int connection = accept(fd, NULL, NULL);

		if (connection < 0)
			continue;
		setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		in_thread(serve_connection, connection);
	}
}

static int opened(const struct sockaddr_in *to, int type, char first)
{
	int one = 1, fd = socket(AF_INET, type, 0);

	if (fd < 0 || connect(fd, (const struct sockaddr *)to, sizeof(*to)))
		err(1, "connect");
	if (type == SOCK_STREAM) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (write(fd, &first, 1) != 1)
			err(1, "write");
	}
	return fd;
}

static int by_value(const void *a, const void *b)
{
	uint32_t one = *(const uint32_t *)a, other = *(const uint32_t *)b;

	return (one > other) - (one < other);
}

/* One answer of SIZE bytes, within WAIT_MS. */
static int answered(int fd, char *buffer)
{
	for (size_t got = 0; got < SIZE;) {
		struct pollfd wait = { .fd = fd, .events = POLLIN };
		ssize_t n = poll(&wait, 1, WAIT_MS) == 1 ? recv(fd, buffer, SIZE - got, 0) : -1;

		if (n <= 0)
			return 0;
		got += (size_t)n;
	}
	return 1;
}

static void round_trips(const struct sockaddr_in *to, int type, double seconds)
{
	uint32_t *took = malloc(SAMPLES * sizeof(*took));
	uint64_t begun = now_ns(), sent, lost = 0;
	int fd = opened(to, type, 'e');
	char buffer[SIZE] = { 0 };
	size_t n = 0;

	if (!took)
		errx(1, "memory");
	while (n < SAMPLES && (double)(sent = now_ns()) < (double)begun + seconds * 1e9) {
		if (send(fd, buffer, SIZE, 0) != SIZE)
			err(1, "send");
		if (answered(fd, buffer))
			took[n++] = (uint32_t)(now_ns() - sent);
		else if (type == SOCK_STREAM)
			errx(1, "a connection was not answered for %d ms", WAIT_MS);
		else
			lost++;
	}
	if (n < 100)
		errx(1, "only %zu answers", n);
	qsort(took, n, sizeof(*took), by_value);
	printf("p50_us %.2f\np99_us %.2f\nrounds %zu\nlost %llu\n", took[n / 2] / 1e3, took[n * 99 / 100] / 1e3, n,
	       (unsigned long long)lost);
}

static void bulk(const struct sockaddr_in *to, double seconds, int connections)
{
	static char chunk[CHUNK];
	struct pollfd each[CONNECTIONS];
	uint64_t begun, bytes = 0, again = 0;

	for (int i = 0; i < connections; i++)
		each[i] = (struct pollfd){ .fd = opened(to, SOCK_STREAM, 's'), .events = POLLOUT };
	begun = now_ns();
	while ((double)(now_ns() - begun) < seconds * 1e9) {
		if (poll(each, (nfds_t)connections, WAIT_MS) < 0)
			err(1, "poll");
		for (int i = 0; i < connections; i++) {
			ssize_t n = each[i].revents & POLLOUT ? send(each[i].fd, chunk, CHUNK, MSG_DONTWAIT) : 0;

			if (n < 0 && errno != EAGAIN)
				err(1, "send");
			bytes += n > 0 ? (uint64_t)n : 0;
		}
	}
	for (int i = 0; i < connections; i++) { /* what still waits here has not been transferred */
		struct tcp_info info = { 0 };
		socklen_t size = sizeof(info);

		int waiting = 0;

		if (!getsockopt(each[i].fd, IPPROTO_TCP, TCP_INFO, &info, &size))
			again += info.tcpi_total_retrans;
		if (!ioctl(each[i].fd, SIOCOUTQ, &waiting))
			bytes -= (uint64_t)waiting;
	}
	printf("gbit_s %.4f\nretransmitted %llu\n", (double)bytes * 8 / (double)(now_ns() - begun),
	       (unsigned long long)again);
}

int main(int argc, char **argv)
{
	double seconds = argc > 3 ? atof(argv[3]) : 0;
	int connections = argc > 4 ? atoi(argv[4]) : 1;
	struct sockaddr_in to;

	if (argc > 4 && !strcmp(argv[1], "serve")) {
		serve_all(argc - 2, argv + 2);
		return 0;
	}
	if (argc < 4 || seconds <= 0 || seconds > 60 || connections < 1 || connections > CONNECTIONS)
		errx(2,
		     "usage: bench_streams serve TCP_PORT UDP_PORT ADDRESS... | tcp|udp|bulk IPV4:PORT SECONDS [CONNECTIONS]");
	alarm((unsigned)seconds + 10);
	to = endpoint(argv[2]);
	if (!strcmp(argv[1], "bulk"))
		bulk(&to, seconds, connections);
	else
		round_trips(&to, strcmp(argv[1], "udp") ? SOCK_STREAM : SOCK_DGRAM, seconds);
	return 0;
}
