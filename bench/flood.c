/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sends packets of one kind to a listener at an even rate, each from another of many sources, past the sender's own
 * stack. For tests and benchmarks, between network namespaces that they made: it sends nowhere but to the MAC address
 * that it is told, and ends by itself.
 */
#include "../cli/traffic/protocol.h"

#include <errno.h>
#include <getopt.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

enum { BATCH = 64, FRAME = 160, HEAD = 14, BEHIND_MS = 20 };
enum kind { SYN, UDP, ACK, FRAGMENT, ECHO, UNREACHABLE, KINDS };

static const char *const kind_names[] = { "syn", "udp", "ack", "fragment", "echo", "unreachable" };

static struct {
	enum kind kind;
	struct sockaddr_in target;
	uint32_t network, hosts; /* sources: host order */
	uint8_t mac[6];
	const char *device;
	double seconds;
	uint64_t rate, seed;
	long cpu;
} wish = { .kind = KINDS, .seconds = 1, .cpu = -1 };

static volatile sig_atomic_t stopped;

static void stop(int number) { stopped = 1; }

static uint64_t draw(void) /* splitmix64 */
{
	uint64_t z = wish.seed += 0x9e3779b97f4a7c15ull;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

static uint32_t sum(const void *bytes, size_t size, uint32_t from)
{
	const uint8_t *at = bytes;

	for (size_t i = 0; i + 1 < size; i += 2)
		from += (uint32_t)at[i] << 8 | at[i + 1];
	return size & 1 ? from + ((uint32_t)at[size - 1] << 8) : from;
}

static uint16_t folded(uint32_t from)
{
	while (from >> 16)
		from = (from & 0xffff) + (from >> 16);
	return htons((uint16_t)~from);
}

/* Checksum of a TCP segment or UDP datagram. */
static uint16_t transport_sum(const struct iphdr *ip, const void *segment, size_t size)
{
	return folded(sum(segment, size, sum(&ip->saddr, 8, (uint32_t)ip->protocol + (uint32_t)size)));
}

static void ip_header(struct iphdr *ip, uint8_t protocol, uint32_t source, uint32_t destination, size_t payload,
		      uint16_t id, uint16_t offset)
{
	*ip = (struct iphdr){ .version = 4,
			      .ihl = 5,
			      .ttl = 64,
			      .protocol = protocol,
			      .saddr = source,
			      .daddr = destination,
			      .id = id,
			      .frag_off = htons(offset),
			      .tot_len = htons((uint16_t)(sizeof(*ip) + payload)) };
	ip->check = folded(sum(ip, sizeof(*ip), 0));
}

/* One frame behind its Ethernet header; of a datagram in two fragments its first, then its second. -> bytes */
static size_t make(uint8_t *at)
{
	static uint32_t halves, source;
	static uint16_t port, id;
	struct iphdr *ip = (struct iphdr *)at;
	uint8_t *body = at + sizeof(*ip);
	uint32_t vip = wish.target.sin_addr.s_addr;
	uint64_t chance = draw();
	size_t size;

	if (wish.kind != FRAGMENT || !(halves & 1)) {
		source = htonl(wish.network | ((uint32_t)chance & wish.hosts));
		port = htons((uint16_t)(1024 + (chance >> 32) % 64000));
		id = (uint16_t)(chance >> 48);
	}
	switch (wish.kind) {
	case SYN:
	case ACK: {
		struct tcphdr tcp = { .source = port, .dest = wish.target.sin_port, .window = htons(64240), .doff = 5 };

		tcp.seq = (uint32_t)draw();
		tcp.syn = wish.kind == SYN;
		tcp.ack = wish.kind == ACK;
		tcp.ack_seq = tcp.ack ? (uint32_t)draw() : 0;
		size = sizeof(tcp);
		ip_header(ip, IPPROTO_TCP, source, vip, size, id, IP_DF);
		tcp.check = transport_sum(ip, &tcp, size);
		memcpy(body, &tcp, size);
		break;
	}
	case UDP:
	case FRAGMENT: {
		struct datagram ask = { .magic = DATAGRAM_MAGIC, .kind = DATAGRAM_SUMMARY };
		uint8_t whole[sizeof(struct udphdr) + sizeof(ask)];
		struct udphdr udp = { .source = port, .dest = wish.target.sin_port, .len = htons(sizeof(whole)) };
		size_t first = sizeof(whole) / 2 & ~7ul;

		size = sizeof(whole);
		memcpy(whole, &udp, sizeof(udp));
		memcpy(whole + sizeof(udp), &ask, sizeof(ask));
		ip_header(ip, IPPROTO_UDP, source, vip, size, id, 0);
		udp.check = transport_sum(ip, whole, size);
		memcpy(whole, &udp, sizeof(udp));
		if (wish.kind == UDP) {
			memcpy(body, whole, size);
		} else if (!(halves++ & 1)) {
			size = first;
			ip_header(ip, IPPROTO_UDP, source, vip, size, id, IP_MF);
			memcpy(body, whole, size);
		} else {
			size -= first;
			ip_header(ip, IPPROTO_UDP, source, vip, size, id, (uint16_t)(first / 8));
			memcpy(body, whole + first, size);
		}
		break;
	}
	case ECHO: {
		struct icmphdr icmp = { .type = ICMP_ECHO, .un.echo = { .id = port, .sequence = id } };

		size = sizeof(icmp);
		ip_header(ip, IPPROTO_ICMP, source, vip, size, id, 0);
		icmp.checksum = folded(sum(&icmp, size, 0));
		memcpy(body, &icmp, size);
		break;
	}
	default: { /* about a segment that the listener has sent, says whoever sends this */
		struct icmphdr icmp = { .type = ICMP_DEST_UNREACH, .code = ICMP_HOST_UNREACH };
		struct iphdr quoted;
		uint16_t ports[4] = { wish.target.sin_port, port, (uint16_t)chance, (uint16_t)(chance >> 16) };

		ip_header(&quoted, IPPROTO_TCP, vip, source, 20, id, IP_DF);
		size = sizeof(icmp) + sizeof(quoted) + sizeof(ports);
		ip_header(ip, IPPROTO_ICMP, source, vip, size, id, 0);
		memcpy(body + sizeof(icmp), &quoted, sizeof(quoted));
		memcpy(body + sizeof(icmp) + sizeof(quoted), ports, sizeof(ports));
		memcpy(body, &icmp, sizeof(icmp));
		icmp.checksum = folded(sum(body, size, 0));
		memcpy(body, &icmp, sizeof(icmp));
	}
	}
	return sizeof(*ip) + size;
}

static uint64_t number(const char *text, uint64_t most)
{
	char *rest;
	unsigned long long value = strtoull(text, &rest, 10);

	if (*rest || !value || value > most)
		errx(2, "%s: is not a number from 1 to %llu", text, (unsigned long long)most);
	return value;
}

static void sources(const char *text)
{
	const char *slash = strchr(text, '/');
	char address[32] = "";
	struct in_addr in;
	int prefix = slash ? atoi(slash + 1) : 0;

	if (slash && slash - text < (int)sizeof(address))
		memcpy(address, text, (size_t)(slash - text));
	if (inet_pton(AF_INET, address, &in) != 1 || prefix < 8 || prefix > 32)
		errx(2, "%s: is not an IPv4 network of /8 or less", text);
	wish.hosts = prefix == 32 ? 0 : 0xffffffffu >> prefix;
	wish.network = ntohl(in.s_addr) & ~wish.hosts;
}

static void options(int argc, char **argv)
{
	static const struct option known[] = {
		{ "device", 1, NULL, 'd' },  { "mac", 1, NULL, 'm' },	  { "kind", 1, NULL, 'k' },
		{ "target", 1, NULL, 't' },  { "sources", 1, NULL, 's' }, { "rate", 1, NULL, 'r' },
		{ "seconds", 1, NULL, 'l' }, { "seed", 1, NULL, 'e' },	  { "cpu", 1, NULL, 'c' },
		{ NULL, 0, NULL, 0 },
	};
	unsigned mac[6];
	int option, have_mac = 0;

	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (option) {
		case 'd': wish.device = optarg; break;
		case 'm':
			have_mac = sscanf(optarg, "%x:%x:%x:%x:%x:%x", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4],
					  &mac[5]) == 6;
			for (int i = 0; i < 6 && have_mac; i++)
				wish.mac[i] = (uint8_t)mac[i];
			break;
		case 'k':
			for (wish.kind = 0; wish.kind < KINDS && strcmp(kind_names[wish.kind], optarg);)
				wish.kind++;
			break;
		case 't': wish.target = endpoint_parse(optarg, 1).v4; break;
		case 's': sources(optarg); break;
		case 'r': wish.rate = number(optarg, 10000000); break;
		case 'l': wish.seconds = atof(optarg); break;
		case 'e': wish.seed = number(optarg, UINT64_MAX - 1); break;
		case 'c': wish.cpu = atol(optarg); break;
		default: exit(2);
		}
	}
	if (!wish.device || !have_mac || wish.kind == KINDS || wish.target.sin_family != AF_INET || !wish.network ||
	    !wish.rate || wish.seconds <= 0 || wish.seconds > 600)
		errx(2,
		     "usage: packetstack-flood --device IF --mac MAC --kind syn|udp|ack|fragment|echo|unreachable\n"
		     "  --target IPV4:PORT --sources NETWORK/PREFIX --rate PACKETS/S [--seconds N] [--seed N] [--cpu N]");
}

int main(int argc, char **argv)
{
	static uint8_t frames[BATCH][FRAME];
	struct mmsghdr messages[BATCH] = { 0 };
	struct iovec parts[BATCH];
	struct sockaddr_ll at = { .sll_family = AF_PACKET };
	uint64_t sent = 0, refused = 0, skipped = 0, begun, due, total, done = 0;
	int fd, one = 1, buffer = 8 << 20;

	options(argc, argv);
	pin(wish.cpu);
	signal(SIGTERM, stop);
	signal(SIGINT, stop);
	at.sll_ifindex = (int)if_nametoindex(wish.device);
	fd = socket(AF_PACKET, SOCK_RAW, 0);
	if (fd < 0 || !at.sll_ifindex || bind(fd, (struct sockaddr *)&at, sizeof(at)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one)))
		err(1, "%s", wish.device);
	setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof(buffer));
	for (int i = 0; i < BATCH; i++) {
		memcpy(frames[i], wish.mac, 6);
		memcpy(frames[i] + 6, "\x02\x00\x00\x00\x00\x01", 6);
		frames[i][12] = ETHERTYPE_IP >> 8;
		frames[i][13] = ETHERTYPE_IP & 0xff;
		parts[i].iov_base = frames[i];
		messages[i].msg_hdr.msg_iov = &parts[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	begun = now_ns();
	total = (uint64_t)((double)wish.rate * wish.seconds);
	while (done < total && !stopped) {
		uint64_t most = wish.rate * BEHIND_MS / 1000 + BATCH;
		int n, now_sent;

		due = (uint64_t)((double)(now_ns() - begun) / 1e9 * (double)wish.rate);
		if (due > total)
			due = total;
		if (due <= done) {
			usleep(100);
			continue;
		}
		if (due - done > most) { /* it got no CPU for a while: an even rate matters, not the number */
			skipped += due - done - most;
			done = due - most;
		}
		n = due - done < BATCH ? (int)(due - done) : BATCH;
		for (int i = 0; i < n; i++)
			parts[i].iov_len = HEAD + make(frames[i] + HEAD);
		now_sent = sendmmsg(fd, messages, (unsigned)n, 0);
		if (now_sent < 0 && errno != ENOBUFS && errno != EAGAIN && errno != EINTR)
			err(1, "%s", wish.device);
		sent += now_sent > 0 ? (uint64_t)now_sent : 0;
		refused += (uint64_t)(n - (now_sent > 0 ? now_sent : 0));
		done += (uint64_t)n;
	}
	printf("{\"kind\": \"%s\", \"sent\": %llu, \"refused\": %llu, \"skipped\": %llu, \"seconds\": %.3f}\n",
	       kind_names[wish.kind], (unsigned long long)sent, (unsigned long long)refused,
	       (unsigned long long)skipped, (double)(now_ns() - begun) / 1e9);
	return 0;
}
