/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the two halves of packetstack-traffic say to each other. Host byte order: both run on one
 * machine.
 */
#ifndef TRAFFIC_PROTOCOL_H
#define TRAFFIC_PROTOCOL_H

#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

enum {
	REQUEST_MAGIC = 0x50537171,
	ANSWER_MAGIC = 0x50536161,
	DATAGRAM_MAGIC = 0x50536464,
	MAX_ANSWER = 16 << 20,
	MAX_DATAGRAM = 9000,
};

/* A request for `size` bytes of the stream that (seed, sequence) names. */
struct request {
	uint32_t magic;
	uint32_t size;
	uint64_t sequence;
	uint64_t seed;
};

/* Precedes those bytes. */
struct answer {
	uint32_t magic;
	uint32_t size;
	uint64_t sequence;
};

enum datagram_kind {
	DATAGRAM_DATA = 1,
	DATAGRAM_SUMMARY = 2, /* asks for the server's counters; is not counted itself */
};

/* The server sends it back with its own counters of the flow filled in. */
struct datagram {
	uint32_t magic;
	uint32_t kind;
	uint64_t run; /* one run of the client: flow numbers start again with each */
	uint32_t flow;
	uint32_t reordered;  /* server: data that came after data with a higher sequence */
	uint64_t sequence;   /* from 1 */
	uint64_t sent_ns;    /* CLOCK_MONOTONIC of the client */
	uint64_t arrival;    /* server: data received so far, this one included, without duplicates */
	uint32_t duplicates; /* server */
	uint32_t zero;
};

/* Which of the last 64 sequence numbers came. */
struct window {
	uint64_t highest;
	uint64_t seen;
};

enum arrival { IN_ORDER, REORDERED, DUPLICATE };

static inline enum arrival window_add(struct window *window, uint64_t sequence)
{
	if (sequence > window->highest) {
		uint64_t step = sequence - window->highest;

		window->seen = step < 64 ? window->seen << step | 1 : 1;
		window->highest = sequence;
		return IN_ORDER;
	}
	uint64_t age = window->highest - sequence;

	if (age < 64) {
		if (window->seen >> age & 1)
			return DUPLICATE;
		window->seen |= 1ull << age;
	}
	return REORDERED;
}

/* Word `index` of the stream (splitmix64): any part of an answer can be made or checked by itself. */
static inline uint64_t stream_word(uint64_t seed, uint64_t sequence, uint64_t index)
{
	uint64_t z = seed + sequence * 0xd1342543de82ef95ull + (index + 1) * 0x9e3779b97f4a7c15ull;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

static inline void stream_bytes(uint8_t *to, uint64_t seed, uint64_t sequence, uint32_t offset, uint32_t size)
{
	for (uint32_t done = 0; done < size;) {
		uint64_t word = stream_word(seed, sequence, (offset + done) / 8);
		uint32_t skip = (offset + done) % 8;
		uint32_t part = 8 - skip < size - done ? 8 - skip : size - done;

		memcpy(to + done, (uint8_t *)&word + skip, part);
		done += part;
	}
}

union endpoint {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

static inline socklen_t endpoint_length(const union endpoint *endpoint)
{
	return endpoint->any.sa_family == AF_INET ? sizeof(endpoint->v4) : sizeof(endpoint->v6);
}

/* "192.0.2.1:80", "[2001:db8::1]:80"; without a port when `port` is 0. Exits on anything else. */
static inline union endpoint endpoint_parse(const char *text, int port)
{
	union endpoint endpoint = { 0 };
	char address[64];
	const char *end = text + strlen(text), *colon = port ? strrchr(text, ':') : NULL;
	long number = 0;

	if (port) {
		char *rest;

		if (!colon)
			errx(2, "%s: has no port; use ADDRESS:PORT or [ADDRESS]:PORT", text);
		number = strtol(colon + 1, &rest, 10);
		if (*rest || number < 1 || number > 65535)
			errx(2, "%s: %s is not a port; use 1 to 65535", text, colon + 1);
		end = colon;
	}
	if (*text == '[' && end > text + 1 && end[-1] == ']') {
		text++;
		end--;
	}
	if ((size_t)(end - text) >= sizeof(address))
		errx(2, "%s: is not an address", text);
	memcpy(address, text, end - text);
	address[end - text] = 0;
	if (inet_pton(AF_INET, address, &endpoint.v4.sin_addr) == 1) {
		endpoint.v4.sin_family = AF_INET;
		endpoint.v4.sin_port = htons(number);
	} else if (inet_pton(AF_INET6, address, &endpoint.v6.sin6_addr) == 1) {
		endpoint.v6.sin6_family = AF_INET6;
		endpoint.v6.sin6_port = htons(number);
	} else {
		errx(2, "%s: is not an IPv4 or IPv6 address", address);
	}
	return endpoint;
}

static inline uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static inline double processor_seconds(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

/* Datagrams that the socket had no room for. */
static inline uint32_t socket_drops(int fd)
{
	uint32_t info[16] = { 0 };
	socklen_t length = sizeof(info);

	if (getsockopt(fd, SOL_SOCKET, 55 /* SO_MEMINFO */, info, &length))
		return 0;
	return info[8]; /* SK_MEMINFO_DROPS of linux/sock_diag.h */
}

/* Descriptors for `least` sockets, or the reason why not; for `most` if that can be had. */
static inline void raise_descriptor_limit(uint64_t least, uint64_t most)
{
	struct rlimit limit, raised;

	getrlimit(RLIMIT_NOFILE, &limit);
	if (limit.rlim_cur >= most)
		return;
	raised.rlim_cur = most;
	raised.rlim_max = limit.rlim_max > most ? limit.rlim_max : most;
	if (!setrlimit(RLIMIT_NOFILE, &raised))
		return;
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur < least)
		errx(1, "%llu sockets need more open files than the limit of %llu (ulimit -n)",
		     (unsigned long long)least, (unsigned long long)limit.rlim_max);
}

/* One CPU for all that it sends: packets of a flow that leave from two CPUs may pass each other. */
static inline void pin(long cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "CPU %ld", cpu);
}

int serve(int argc, char **argv);
int run(int argc, char **argv);

#endif
