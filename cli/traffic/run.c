/* SPDX-License-Identifier: Apache-2.0 */
/* The client: keeps thousands of flows busy at an even pace, and knows how each of them fared. */
#include "protocol.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum {
	MAX_ENDPOINTS = 64,
	MAX_SOURCES = 256,
	CHUNK = 65536,
	WHEEL = 8192, /* slots of 1 ms; what is due later goes round */
	KEPT_BREAKAGES = 50,
	BINS = 64 * 16, /* latencies: 16 bins for each power of two of nanoseconds */
};

static const uint64_t MS = 1000000;

enum kind { LONG, SHORT, FLOW, TICK, SIGNALS, INPUT };
enum state { UNUSED, CONNECTING, IDLE, WAITING, BROKEN, CLOSED };
enum breakage { RESET, TIMEOUT, WRONG, HUNG_UP, REFUSED, BREAKAGES };

static const char *const breakage_names[] = { "reset", "timeout", "wrong", "closed", "refused" };

/* A TCP connection or a UDP flow. */
struct item {
	enum kind kind;
	enum state state;
	int fd;
	uint32_t number;
	uint64_t due;	/* when its next turn is, ns */
	uint64_t since; /* when the request in progress was due, or connecting began */
	uint64_t asked; /* when it was sent */
	uint64_t sequence;
	struct item *wheel_next;
	struct item *older, *newer; /* connections that wait for something, by `since` */
	/* TCP */
	uint32_t size, got; /* of the answer, its header included */
	struct answer header;
	/* UDP */
	uint64_t interval; /* between its datagrams, ns */
	uint64_t received, highest_arrival, last_received, server_arrivals;
	uint32_t reordered_back, duplicates_back, server_reordered, server_duplicates;
	int summarised;
	struct window window;
};

struct latencies {
	uint64_t count, bins[BINS], longest;
};

static struct {
	union endpoint targets[MAX_ENDPOINTS], udp_targets[MAX_ENDPOINTS], sources[MAX_SOURCES];
	const char *target_names[MAX_ENDPOINTS];
	int target_count, udp_target_count, source_count;
	uint64_t connections, flows, new_rate;
	uint64_t request_interval, udp_interval, timeout, duration, ramp, leave;
	uint64_t least_size, most_size, datagram_size;
	uint64_t udp_rate, warm_up;
	double udp_skew;
	const char *report, *series;
	long cpu;
	int until_eof;
} wish = {
	.connections = 1000,
	.request_interval = 2000,
	.udp_interval = 100,
	.timeout = 10,
	.duration = 10,
	.least_size = 64,
	.most_size = 2048,
	.datagram_size = 200,
	.cpu = -1,
};

static struct {
	uint64_t opened, open, short_opened, short_done, short_open;
	uint64_t requests, answers, bytes, broken, short_broken, by_breakage[BREAKAGES];
	uint64_t sent, received, unsent, wrong_datagrams, reordered_back, duplicates_back;
	uint64_t longest_gap, interval_gap, longest_connect, longest_datagram_gap;
	uint32_t longest_gap_connection;
} count;

static struct {
	enum breakage how;
	int short_lived, error;
	uint32_t number;
	uint16_t port;
	double at;
} breakages[KEPT_BREAKAGES];

static int poller;
static uint64_t run_id, begin, stop_at, wheel_at; /* wheel_at: ms since begin, handled so far */
static uint64_t leaving;			  /* since when, 0 = not yet */
static int stopping;
static struct item *items, *flows, *wheel[WHEEL];
static struct item *oldest, *newest;
static struct item *free_short;
static struct latencies interval_latencies, total_latencies, datagram_latencies;
static FILE *series;

/* ---- latencies --------------------------------------------------------------------------------- */

static void note_latency(struct latencies *latencies, uint64_t ns)
{
	int power = 63 - __builtin_clzll(ns | 16);

	latencies->bins[power * 16 + (ns >> (power - 4) & 15)]++;
	latencies->count++;
	if (ns > latencies->longest)
		latencies->longest = ns;
}

/* The longest that a bin holds. */
static double upper_ms(const struct latencies *latencies, int bin)
{
	uint64_t upper = (16ull + bin % 16 + 1) << (bin / 16 - 4);

	return (upper < latencies->longest ? upper : latencies->longest) / 1e6;
}

static double quantile_ms(const struct latencies *latencies, double quantile)
{
	uint64_t wanted = latencies->count * quantile, seen = 0;

	if (!latencies->count)
		return 0;
	for (int bin = 0; bin < BINS; bin++) {
		seen += latencies->bins[bin];
		if (seen > wanted)
			return upper_ms(latencies, bin);
	}
	return latencies->longest / 1e6;
}

/* ---- turns -------------------------------------------------------------------------------------- */

static void schedule(struct item *item, uint64_t due)
{
	uint64_t ms = due > begin ? (due - begin + MS - 1) / MS : 0;

	if (ms <= wheel_at)
		ms = wheel_at + 1;
	item->due = due;
	item->wheel_next = wheel[ms % WHEEL];
	wheel[ms % WHEEL] = item;
}

static void begin_wait(struct item *item, uint64_t since)
{
	item->since = since;
	item->older = newest;
	item->newer = NULL;
	*(newest ? &newest->newer : &oldest) = item;
	newest = item;
}

static void end_wait(struct item *item)
{
	*(item->older ? &item->older->newer : &oldest) = item->newer;
	*(item->newer ? &item->newer->older : &newest) = item->older;
}

static void note_gap(const struct item *item, uint64_t gap)
{
	if (gap > count.interval_gap)
		count.interval_gap = gap;
	if (gap > count.longest_gap) {
		count.longest_gap = gap;
		count.longest_gap_connection = item->number;
	}
}

/* ---- TCP ---------------------------------------------------------------------------------------- */

static void close_connection(struct item *item, enum state state)
{
	close(item->fd);
	item->fd = -1;
	item->state = state;
	if (item->kind == SHORT) {
		item->wheel_next = free_short;
		free_short = item;
		count.short_open--;
	}
}

static void break_connection(struct item *item, enum breakage how, int error)
{
	union endpoint local = { 0 };
	socklen_t length = sizeof(local);
	uint64_t broken = count.broken + count.short_broken;

	if (item->state == CONNECTING || item->state == WAITING) {
		note_gap(item, now_ns() - item->since);
		end_wait(item);
	}
	if (item->kind == LONG && item->state != CONNECTING)
		count.open--;
	getsockname(item->fd, &local.any, &length);
	if (broken < KEPT_BREAKAGES) {
		breakages[broken].how = how;
		breakages[broken].error = error;
		breakages[broken].short_lived = item->kind == SHORT;
		breakages[broken].number = item->number;
		breakages[broken].port = ntohs(local.v4.sin_port); /* at the same place in IPv6 */
		breakages[broken].at = (now_ns() - begin) / 1e9;
	}
	count.by_breakage[how]++;
	if (item->kind == SHORT)
		count.short_broken++;
	else
		count.broken++;
	close_connection(item, BROKEN);
}

static int open_socket(int type, uint64_t number, const union endpoint *target)
{
	int one = 1, fd = socket(target->any.sa_family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		err(1, "socket");
	for (int i = 0; i < wish.source_count; i++) {
		const union endpoint *source = &wish.sources[(number + i) % wish.source_count];

		if (source->any.sa_family != target->any.sa_family)
			continue;
		setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
		if (bind(fd, &source->any, endpoint_length(source)))
			err(1, "a source address");
		break;
	}
	return fd;
}

static void watch(int fd, void *item, uint32_t events, int operation)
{
	struct epoll_event event = { .events = events, .data.ptr = item };

	if (epoll_ctl(poller, operation, fd, &event))
		err(1, "epoll");
}

static void start_connecting(struct item *item, uint64_t now)
{
	const union endpoint *target = &wish.targets[item->number % wish.target_count];
	int one = 1;

	item->fd = open_socket(SOCK_STREAM, item->number / wish.target_count, target);
	setsockopt(item->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	item->state = CONNECTING;
	item->sequence = 0;
	item->got = 0;
	begin_wait(item, now);
	if (connect(item->fd, &target->any, endpoint_length(target)) && errno != EINPROGRESS) {
		break_connection(item, REFUSED, errno);
		return;
	}
	watch(item->fd, item, EPOLLOUT, EPOLL_CTL_ADD);
}

static void send_request(struct item *item, uint64_t due)
{
	struct request request = { .magic = REQUEST_MAGIC, .sequence = ++item->sequence };
	uint64_t spread = wish.most_size - wish.least_size + 1;

	request.seed = run_id ^ (uint64_t)item->number << 32 ^ item->kind;
	request.size = wish.least_size + stream_word(request.seed, request.sequence, ~0ull) % spread;
	item->size = request.size + sizeof(struct answer);
	item->got = 0;
	item->state = WAITING;
	begin_wait(item, due);
	count.requests++;
	item->asked = now_ns();
	ssize_t sent = send(item->fd, &request, sizeof(request), MSG_NOSIGNAL);

	/* The socket has room: the answer to all that was sent before has come. */
	if (sent != sizeof(request))
		break_connection(item, RESET, sent < 0 ? errno : EMSGSIZE);
}

static void connected(struct item *item, uint64_t now)
{
	int error = 0;
	socklen_t length = sizeof(error);

	getsockopt(item->fd, SOL_SOCKET, SO_ERROR, &error, &length);
	if (error) {
		break_connection(item, error == ETIMEDOUT ? TIMEOUT : REFUSED, error);
		return;
	}
	end_wait(item);
	if (now - item->since > count.longest_connect)
		count.longest_connect = now - item->since;
	watch(item->fd, item, EPOLLIN, EPOLL_CTL_MOD);
	item->state = IDLE;
	if (item->kind == SHORT) {
		count.short_opened++;
		send_request(item, now);
		return;
	}
	count.opened++;
	count.open++;
	/* Phases by the golden ratio: evenly spread, however many there are. */
	double phase = item->number * 0.6180339887498949;

	schedule(item, now + (uint64_t)((phase - (uint64_t)phase) * wish.request_interval));
}

static int is_right(const struct item *item, const uint8_t *bytes, uint32_t offset, uint32_t size)
{
	static uint8_t expected[CHUNK];
	uint64_t seed = run_id ^ (uint64_t)item->number << 32 ^ item->kind;

	stream_bytes(expected, seed, item->sequence, offset, size);
	return !memcmp(expected, bytes, size);
}

static void answered(struct item *item, uint64_t now)
{
	uint64_t took = now - item->since;

	end_wait(item);
	count.answers++;
	note_latency(&interval_latencies, now - item->asked);
	note_latency(&total_latencies, now - item->asked);
	note_gap(item, took);
	item->state = IDLE;
	if (item->kind == SHORT) {
		count.short_done++;
		close_connection(item, CLOSED);
		return;
	}
	uint64_t due = item->since + wish.request_interval;

	if (now > due + wish.request_interval) /* turns that passed while it waited are left out */
		due += (now - due) / wish.request_interval * wish.request_interval;
	if (due > now)
		schedule(item, due);
	else if (stopping)
		return;
	else
		send_request(item, due);
}

static void readable(struct item *item, uint64_t now)
{
	static uint8_t chunk[CHUNK];
	ssize_t got = recv(item->fd, chunk, sizeof(chunk), 0);

	if (got < 0 && errno == EAGAIN)
		return;
	if (got <= 0) {
		break_connection(item, got == 0 ? HUNG_UP : errno == ETIMEDOUT ? TIMEOUT : RESET, got ? errno : 0);
		return;
	}
	count.bytes += got;
	if (item->state != WAITING || got > item->size - item->got) {
		break_connection(item, WRONG, 0); /* nobody asked for that */
		return;
	}
	uint32_t header = 0;

	if (item->got < sizeof(item->header)) {
		header = sizeof(item->header) - item->got;
		if (header > got)
			header = got;
		memcpy((uint8_t *)&item->header + item->got, chunk, header);
		item->got += header;
		if (item->got == sizeof(item->header) &&
		    (item->header.magic != ANSWER_MAGIC || item->header.sequence != item->sequence ||
		     item->header.size != item->size - sizeof(item->header))) {
			break_connection(item, WRONG, 0);
			return;
		}
	}
	if (got > header && !is_right(item, chunk + header, item->got - sizeof(item->header), got - header)) {
		break_connection(item, WRONG, 0);
		return;
	}
	item->got += got - header;
	if (item->got == item->size)
		answered(item, now);
}

static void end_overdue(uint64_t now)
{
	while (oldest && now > oldest->since + wish.timeout)
		break_connection(oldest, TIMEOUT, 0);
}

static struct item *new_short(void)
{
	static uint32_t numbers;
	struct item *item = free_short;

	if (item)
		free_short = item->wheel_next;
	else
		item = calloc(1, sizeof(*item));
	if (!item)
		err(1, "memory");
	item->kind = SHORT;
	item->number = numbers++;
	count.short_open++;
	return item;
}

/* ---- UDP ---------------------------------------------------------------------------------------- */

static void open_flow(struct item *item)
{
	const union endpoint *target = &wish.udp_targets[item->number % wish.udp_target_count];

	item->fd = open_socket(SOCK_DGRAM, item->number / wish.udp_target_count, target);
	if (connect(item->fd, &target->any, endpoint_length(target)))
		err(1, "a UDP target");
	item->state = IDLE;
	watch(item->fd, item, EPOLLIN, EPOLL_CTL_ADD);
}

static int send_datagram(struct item *item, enum datagram_kind kind, uint64_t now)
{
	static uint8_t bytes[MAX_DATAGRAM];
	struct datagram *datagram = (struct datagram *)bytes;

	*datagram = (struct datagram){ .magic = DATAGRAM_MAGIC,
				       .kind = kind,
				       .run = run_id,
				       .flow = item->number,
				       .sequence = item->sequence + 1,
				       .sent_ns = now };
	return send(item->fd, bytes, wish.datagram_size, MSG_NOSIGNAL) == (ssize_t)wish.datagram_size;
}

static void flow_turn(struct item *item, uint64_t now)
{
	if (item->fd < 0)
		open_flow(item);
	if (send_datagram(item, DATAGRAM_DATA, item->due)) {
		item->sequence++;
		count.sent++;
	} else {
		count.unsent++; /* never left, so it is not lost; an ICMP error may be the reason */
	}
	uint64_t due = item->due + item->interval;

	if (due < now && !wish.udp_rate) /* with a rate all are sent, however late */
		due += (now - due) / item->interval * item->interval;
	schedule(item, due);
}

static void flow_readable(struct item *item, uint64_t now)
{
	static uint8_t bytes[MAX_DATAGRAM];
	struct datagram *datagram = (struct datagram *)bytes;
	ssize_t got;

	while ((got = recv(item->fd, bytes, sizeof(bytes), MSG_DONTWAIT)) >= 0) {
		if (got != (ssize_t)wish.datagram_size || datagram->magic != DATAGRAM_MAGIC ||
		    datagram->run != run_id || datagram->flow != item->number) {
			count.wrong_datagrams++;
			continue;
		}
		if (datagram->arrival > item->server_arrivals)
			item->server_arrivals = datagram->arrival;
		if (datagram->reordered > item->server_reordered)
			item->server_reordered = datagram->reordered;
		if (datagram->duplicates > item->server_duplicates)
			item->server_duplicates = datagram->duplicates;
		if (datagram->kind == DATAGRAM_SUMMARY) {
			item->summarised = 1;
			continue;
		}
		enum arrival how = window_add(&item->window, datagram->sequence);

		if (how == DUPLICATE) {
			item->duplicates_back++;
			count.duplicates_back++;
			continue;
		}
		/* Against the order in which the server sent them. */
		if (datagram->arrival < item->highest_arrival) {
			item->reordered_back++;
			count.reordered_back++;
		} else {
			item->highest_arrival = datagram->arrival;
		}
		if (item->last_received && now - item->last_received > count.longest_datagram_gap)
			count.longest_datagram_gap = now - item->last_received;
		item->last_received = now;
		if (datagram->sent_ns >= begin + wish.warm_up)
			note_latency(&datagram_latencies, now - datagram->sent_ns);
		item->received++;
		count.received++;
	}
}

/* ---- reports ------------------------------------------------------------------------------------ */

/* So that quantiles of several intervals, or of several generators, can be taken together. */
static void write_latencies(const struct latencies *latencies)
{
	const char *comma = "";

	fputs(" \"rtt_counts\": [", series);
	for (int bin = 0; bin < BINS; bin++) {
		if (!latencies->bins[bin])
			continue;
		fprintf(series, "%s[%.4f, %lu]", comma, upper_ms(latencies, bin), latencies->bins[bin]);
		comma = ", ";
	}
	fputs("],", series);
}

static void sample(uint64_t now)
{
	static uint64_t last, requests, answers, sent, received, bytes, done;
	struct timespec clock;
	double seconds = (now - last) / 1e9;

	clock_gettime(CLOCK_REALTIME, &clock);
	if (last && series) {
		fputs("{", series);
		write_latencies(&interval_latencies);
		fprintf(series,
			" \"time\": %.3f, \"elapsed\": %.3f, \"open\": %lu, \"requests_per_second\": %.0f,"
			" \"answers_per_second\": %.0f, \"bytes_per_second\": %.0f, \"rtt_p50_ms\": %.3f,"
			" \"rtt_p99_ms\": %.3f, \"waiting_ms\": %.1f, \"gap_ms\": %.3f, \"longest_gap_ms\": %.1f,"
			" \"datagrams_per_second\": %.0f, \"echoes_per_second\": %.0f, \"datagrams_sent\": %lu,"
			" \"datagrams_received\": %lu, \"new_per_second\": %.0f, \"new_connections\": %lu,"
			" \"broken\": %lu, \"reordered\": %lu, \"ready\": %s, \"stopping\": %s}\n",
			clock.tv_sec + clock.tv_nsec / 1e9, (now - begin) / 1e9, count.open,
			(count.requests - requests) / seconds, (count.answers - answers) / seconds,
			(count.bytes - bytes) / seconds, quantile_ms(&interval_latencies, 0.5),
			quantile_ms(&interval_latencies, 0.99),
			/* A request that was asked since `now` was read has waited for nothing. */
			oldest && oldest->since < now ? (now - oldest->since) / 1e6 : 0.0, count.interval_gap / 1e6,
			count.longest_gap / 1e6, (count.sent - sent) / seconds, (count.received - received) / seconds,
			count.sent, count.received, (count.short_done - done) / seconds, count.short_done,
			count.broken + count.short_broken, count.reordered_back,
			count.open + count.broken >= wish.connections ? "true" : "false", stopping ? "true" : "false");
		fflush(series);
	}
	last = now;
	requests = count.requests;
	answers = count.answers;
	sent = count.sent;
	received = count.received;
	bytes = count.bytes;
	done = count.short_done;
	count.interval_gap = 0;
	memset(&interval_latencies, 0, sizeof(interval_latencies));
}

static void report(uint64_t traffic_ns)
{
	FILE *file = wish.report ? fopen(wish.report, "w") : stdout;
	uint64_t arrivals = 0, reordered = 0, duplicates = 0, unsummarised = 0, flows_with_loss = 0, drops = 0;
	uint64_t worst = 0, open = 0;

	if (!file)
		err(1, "%s", wish.report);
	for (uint64_t i = 0; i < wish.flows; i++) {
		struct item *item = &flows[i];

		if (item->fd < 0)
			continue;
		open++;
		arrivals += item->server_arrivals;
		reordered += item->server_reordered;
		duplicates += item->server_duplicates;
		unsummarised += !item->summarised;
		drops += socket_drops(item->fd);
		flows_with_loss += item->received < item->sequence;
		if (item->sequence - item->received > worst)
			worst = item->sequence - item->received;
	}
	fprintf(file,
		"{\n  \"seconds\": %.3f,\n  \"cpu_seconds\": %.3f,\n"
		"  \"connections\": {\"wanted\": %lu, \"opened\": %lu, \"open_at_end\": %lu, \"broken\": %lu},\n"
		"  \"short_connections\": {\"opened\": %lu, \"done\": %lu, \"broken\": %lu},\n",
		traffic_ns / 1e9, processor_seconds(), wish.connections, count.opened, count.open, count.broken,
		count.short_opened, count.short_done, count.short_broken);
	fprintf(file, "  \"broken\": %lu,\n  \"broken_by\": {", count.broken + count.short_broken);
	for (int how = 0; how < BREAKAGES; how++)
		fprintf(file, "%s\"%s\": %lu", how ? ", " : "", breakage_names[how], count.by_breakage[how]);
	fprintf(file, "},\n  \"breakages\": [");
	for (uint64_t i = 0; i < count.broken + count.short_broken && i < KEPT_BREAKAGES; i++)
		fprintf(file,
			"%s\n    {\"how\": \"%s\", \"error\": \"%s\", \"short\": %s, \"connection\": %u,"
			" \"port\": %u, \"at_seconds\": %.3f}",
			i ? "," : "", breakage_names[breakages[i].how],
			breakages[i].error ? strerror(breakages[i].error) : "",
			breakages[i].short_lived ? "true" : "false", breakages[i].number, breakages[i].port,
			breakages[i].at);
	fprintf(file,
		"],\n  \"requests\": %lu,\n  \"answers\": %lu,\n  \"answer_bytes\": %lu,\n"
		"  \"rtt_ms\": {\"p50\": %.3f, \"p99\": %.3f, \"p999\": %.3f, \"longest\": %.3f},\n"
		"  \"longest_gap_ms\": %.3f,\n  \"longest_gap_connection\": %u,\n  \"longest_connect_ms\": %.3f,\n",
		count.requests, count.answers, count.bytes, quantile_ms(&total_latencies, 0.5),
		quantile_ms(&total_latencies, 0.99), quantile_ms(&total_latencies, 0.999),
		total_latencies.longest / 1e6, count.longest_gap / 1e6, count.longest_gap_connection,
		count.longest_connect / 1e6);
	/* Without the summary of a flow the server may have received more than the last echo told. */
	fprintf(file,
		"  \"datagrams\": {\"flows\": %lu, \"sent\": %lu, \"unsent\": %lu, \"at_server\": %lu,"
		" \"received\": %lu, \"lost\": %lu, \"lost_forward\": %lu, \"lost_back\": %lu,"
		" \"reordered\": %lu, \"reordered_forward\": %lu, \"reordered_back\": %lu,"
		" \"duplicates\": %lu, \"wrong\": %lu, \"socket_drops\": %lu, \"flows_with_loss\": %lu,"
		" \"worst_flow_lost\": %lu, \"flows_without_summary\": %lu, \"longest_gap_ms\": %.3f,"
		" \"latency_ms\": {\"p50\": %.3f, \"p95\": %.3f, \"p99\": %.3f, \"longest\": %.3f}}\n}\n",
		open, count.sent, count.unsent, arrivals, count.received, count.sent - count.received,
		count.sent - arrivals, arrivals - count.received, reordered + count.reordered_back, reordered,
		count.reordered_back, duplicates + count.duplicates_back, count.wrong_datagrams, drops, flows_with_loss,
		worst, unsummarised, count.longest_datagram_gap / 1e6, quantile_ms(&datagram_latencies, 0.5),
		quantile_ms(&datagram_latencies, 0.95), quantile_ms(&datagram_latencies, 0.99),
		datagram_latencies.longest / 1e6);
	if (fflush(file) || (wish.report && fclose(file)))
		err(1, "%s", wish.report ? wish.report : "standard output");
}

/* ---- the loop ----------------------------------------------------------------------------------- */

/* Has its time to end come? Those opened first are the first to go. */
static int leaves(const struct item *item, uint64_t now)
{
	uint64_t all = item->kind == FLOW ? wish.flows : wish.connections;

	return leaving && item->kind != SHORT && now >= leaving + wish.leave * item->number / all;
}

static void turn(struct item *item, uint64_t now)
{
	if (stopping)
		return;
	if (leaves(item, now) && (item->kind == FLOW || item->state == IDLE)) {
		if (item->kind == FLOW)
			return;
		close_connection(item, CLOSED);
		count.open--;
	} else if (item->kind == FLOW)
		flow_turn(item, now);
	else if (item->state == UNUSED)
		start_connecting(item, now);
	else if (item->state == IDLE)
		send_request(item, item->due);
}

static void turns(uint64_t now)
{
	static uint64_t started;
	uint64_t until = (now - begin) / MS;

	while (wheel_at < until) {
		struct item *item = wheel[++wheel_at % WHEEL];

		wheel[wheel_at % WHEEL] = NULL;
		while (item) {
			struct item *next = item->wheel_next;

			if (item->due > begin + wheel_at * MS)
				schedule(item, item->due); /* another round */
			else
				turn(item, now);
			item = next;
		}
	}
	if (stopping)
		return;
	for (uint64_t due = (now - begin) / 1e9 * wish.new_rate; started < due; started++)
		start_connecting(new_short(), now);
}

static void handle(const struct epoll_event *event)
{
	struct item *item = event->data.ptr;
	uint64_t now = now_ns(), expirations;
	uint8_t bytes[sizeof(struct signalfd_siginfo)];

	switch (item->kind) {
	case LONG:
	case SHORT:
		if (item->fd < 0)
			break;
		if (item->state == CONNECTING)
			connected(item, now);
		else
			readable(item, now);
		break;
	case FLOW: flow_readable(item, now); break;
	case TICK:
		if (read(item->fd, &expirations, sizeof(expirations)) > 0)
			turns(now);
		break;
	case INPUT:
		if (read(item->fd, bytes, sizeof(bytes)) > 0)
			break;
		watch(item->fd, item, 0, EPOLL_CTL_DEL);
		stop_at = now;
		break;
	case SIGNALS:
		if (read(item->fd, bytes, sizeof(bytes)) > 0)
			stop_at = now;
		break;
	}
}

/* Serves events until `until`, or until `done` says so. */
static void serve_until(uint64_t until, int (*done)(void))
{
	static uint64_t next_sample;
	struct epoll_event events[256];

	for (;;) {
		int ready = epoll_wait(poller, events, 256, 20);
		uint64_t now = now_ns();

		for (int i = 0; i < ready; i++)
			handle(&events[i]);
		end_overdue(now);
		if (now >= next_sample) {
			sample(now);
			next_sample = now - now % (100 * MS) + 100 * MS;
		}
		if (now >= until || (done && done()))
			return;
	}
}

static int stop_asked(void) { return now_ns() >= stop_at; }

static int all_left(void) { return !count.open && now_ns() >= leaving + wish.leave; }

static int nothing_waits(void) { return !oldest; }

static int all_received(void) { return count.received == count.sent; }

static int all_summarised(void)
{
	for (uint64_t i = 0; i < wish.flows; i++)
		if (flows[i].fd >= 0 && !flows[i].summarised)
			return 0;
	return 1;
}

/* Datagrams under way arrive; then each flow asks for the server's counters. */
static void finish_flows(void)
{
	uint64_t last;
	int quiet = 0;

	do {
		last = count.received;
		serve_until(now_ns() + 500 * MS, all_received);
		quiet = count.received == last ? quiet + 1 : 0;
	} while (!all_received() && quiet < 2);
	for (int attempt = 0; attempt < 5 && !all_summarised(); attempt++) {
		for (uint64_t i = 0; i < wish.flows; i++) {
			if (flows[i].fd >= 0 && !flows[i].summarised)
				send_datagram(&flows[i], DATAGRAM_SUMMARY, now_ns());
			if (i % 50 == 49)
				serve_until(now_ns() + 2 * MS, NULL);
		}
		serve_until(now_ns() + 300 * MS, all_summarised);
	}
}

/* Connections end in the ordinary way, not all at once. */
static void close_all(void)
{
	for (uint64_t i = 0; i < wish.connections; i++) {
		if (items[i].fd >= 0)
			close(items[i].fd);
		items[i].fd = -1;
		if (i % 100 == 99)
			usleep(10000);
	}
}

static void usage(FILE *to)
{
	fputs("packetstack-traffic run --target ADDRESS:PORT... [OPTION]...\n"
	      "\n"
	      "  --target ADDRESS:PORT        a server; connections are spread over all that are given\n"
	      "  --connections N              that stay (1000)\n"
	      "  --request-interval-ms MS     between the requests of one (2000)\n"
	      "  --answer-bytes LEAST-MOST    size of answers (64-2048)\n"
	      "  --new-rate R                 more connections a second, of one request each (0)\n"
	      "  --udp-target ADDRESS:PORT    a server\n"
	      "  --udp-flows N                (0)\n"
	      "  --udp-interval-ms MS         between the datagrams of one (100)\n"
	      "  --udp-rate R                 datagrams a second of all together, instead; late ones are sent too\n"
	      "  --udp-skew S                 with a rate: flow n sends as many as the first by n to the power of S (0)\n"
	      "  --warm-up-s S                latencies of datagrams sent before are not counted (0)\n"
	      "  --udp-bytes N                size of datagrams (200)\n"
	      "  --sources ADDRESS,...        own addresses to use\n"
	      "  --duration S                 (10)\n"
	      "  --ramp-s S                   in which all are opened (connections / 2000)\n"
	      "  --leave-s S                  in which all end, one after the other, once it is to stop (0: at once)\n"
	      "  --timeout-s S                after which an answer is missing (10)\n"
	      "  --until-eof                  stop when standard input is closed; SIGTERM stops in any case\n"
	      "  --cpu N                      run on this CPU\n"
	      "  --report FILE                the outcome as JSON (standard output)\n"
	      "  --series FILE                a line of JSON every 100 ms (standard output if --report is given)\n"
	      "\n"
	      "Latency of a datagram counts from the time at which it was to be sent.\n"
	      "A connection is broken when it is reset, refused, closed by the server, without an answer for the\n"
	      "timeout, or wrongly answered. Exit code: 0 if all were opened and none broke, 1 otherwise.\n",
	      to);
}

static uint64_t number(const char *option, const char *text, uint64_t least, uint64_t most)
{
	char *end;
	uint64_t value = strtoull(text, &end, 10);

	if (end == text || *end || *text == '-' || value < least || value > most)
		errx(2, "--%s: %s is not a number from %" PRIu64 " to %" PRIu64, option, text, least, most);
	return value;
}

static double decimal(const char *option, const char *text, double most, const char *what)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end || !(value >= 0 && value <= most))
		errx(2, "--%s: %s is not a number%s from 0 to %g", option, text, what, most);
	return value;
}

static uint64_t seconds(const char *option, const char *text)
{
	return decimal(option, text, 86400, " of seconds") * 1e9;
}

static void read_options(int argc, char **argv)
{
	static const struct option options[] = {
		{ "target", 1, NULL, 't' },
		{ "udp-target", 1, NULL, 'u' },
		{ "connections", 1, NULL, 'c' },
		{ "udp-flows", 1, NULL, 'f' },
		{ "request-interval-ms", 1, NULL, 'i' },
		{ "udp-interval-ms", 1, NULL, 'j' },
		{ "udp-rate", 1, NULL, 'q' },
		{ "udp-skew", 1, NULL, 'k' },
		{ "warm-up-s", 1, NULL, 'm' },
		{ "new-rate", 1, NULL, 'n' },
		{ "duration", 1, NULL, 'd' },
		{ "sources", 1, NULL, 's' },
		{ "timeout-s", 1, NULL, 'w' },
		{ "report", 1, NULL, 'r' },
		{ "series", 1, NULL, 'l' },
		{ "answer-bytes", 1, NULL, 'b' },
		{ "udp-bytes", 1, NULL, 'g' },
		{ "ramp-s", 1, NULL, 'a' },
		{ "leave-s", 1, NULL, 'v' },
		{ "cpu", 1, NULL, 'p' },
		{ "until-eof", 0, NULL, 'e' },
		{ "help", 0, NULL, 'h' },
		{ NULL, 0, NULL, 0 },
	};
	int option, index;
	char *rest;

	while ((option = getopt_long(argc, argv, "", options, &index)) != -1) {
		const char *name = option == '?' ? "" : options[index].name;

		switch (option) {
		case 't':
			if (wish.target_count == MAX_ENDPOINTS)
				errx(2, "--target: at most %d", MAX_ENDPOINTS);
			wish.targets[wish.target_count++] = endpoint_parse(optarg, 1);
			break;
		case 'u':
			if (wish.udp_target_count == MAX_ENDPOINTS)
				errx(2, "--udp-target: at most %d", MAX_ENDPOINTS);
			wish.udp_targets[wish.udp_target_count++] = endpoint_parse(optarg, 1);
			break;
		case 's':
			for (char *part = strtok_r(optarg, ",", &rest); part; part = strtok_r(NULL, ",", &rest)) {
				if (wish.source_count == MAX_SOURCES)
					errx(2, "--sources: at most %d", MAX_SOURCES);
				wish.sources[wish.source_count++] = endpoint_parse(part, 0);
			}
			break;
		case 'b':
			rest = strchr(optarg, '-');
			if (rest)
				*rest++ = 0;
			wish.least_size = number(name, optarg, 1, MAX_ANSWER);
			wish.most_size = rest ? number(name, rest, wish.least_size, MAX_ANSWER) : wish.least_size;
			break;
		case 'c': wish.connections = number(name, optarg, 0, 1000000); break;
		case 'f': wish.flows = number(name, optarg, 0, 1000000); break;
		case 'i': wish.request_interval = number(name, optarg, 1, 3600000); break;
		case 'j': wish.udp_interval = number(name, optarg, 1, 3600000); break;
		case 'n': wish.new_rate = number(name, optarg, 0, 100000); break;
		case 'g': wish.datagram_size = number(name, optarg, sizeof(struct datagram), MAX_DATAGRAM); break;
		case 'q': wish.udp_rate = number(name, optarg, 1, 1000000); break;
		case 'k': wish.udp_skew = decimal(name, optarg, 10, ""); break;
		case 'm': wish.warm_up = seconds(name, optarg); break;
		case 'd': wish.duration = seconds(name, optarg); break;
		case 'a': wish.ramp = seconds(name, optarg) + 1; break;
		case 'v': wish.leave = seconds(name, optarg); break;
		case 'w': wish.timeout = seconds(name, optarg); break;
		case 'r': wish.report = optarg; break;
		case 'l': wish.series = optarg; break;
		case 'p': wish.cpu = number(name, optarg, 0, 1023); break;
		case 'e': wish.until_eof = 1; break;
		case 'h': usage(stdout); exit(0);
		default: usage(stderr); exit(2);
		}
	}
	if (optind != argc)
		errx(2, "%s: is not an option", argv[optind]);
	if ((wish.connections || wish.new_rate) && !wish.target_count)
		errx(2, "--target: is missing; where shall %" PRIu64 " connections go?", wish.connections);
	if (wish.flows && !wish.udp_target_count)
		errx(2, "--udp-target: is missing; where shall %" PRIu64 " flows go?", wish.flows);
	if (wish.timeout < MS)
		errx(2, "--timeout-s: at least 0.001");
	wish.request_interval *= MS;
	wish.udp_interval *= MS;
	if (!wish.ramp)
		wish.ramp = wish.connections * 1000000000ull / 2000 + 1;
}

static struct item *make_items(uint64_t wanted, enum kind kind)
{
	struct item *made = calloc(wanted + 1, sizeof(*made));

	if (!made)
		err(1, "memory");
	for (uint64_t i = 0; i < wanted; i++) {
		made[i].kind = kind;
		made[i].number = i;
		made[i].fd = -1;
	}
	return made;
}

/* All flows begin within the ramp, at phases that stay evenly spread. */
static void schedule_flows(void)
{
	uint64_t rounds = wish.ramp / wish.udp_interval + 1;
	double weights = 0;

	for (uint64_t i = 0; i < wish.flows; i++)
		weights += pow(i + 1, -wish.udp_skew);
	for (uint64_t i = 0; i < wish.flows; i++) {
		struct item *item = &flows[i];
		double phase = (i + 1) * 0.6180339887498949;

		if (wish.udp_rate) {
			item->interval = 1e9 / wish.udp_rate * weights * pow(i + 1, wish.udp_skew);
			schedule(item, begin + (uint64_t)((phase - (uint64_t)phase) * item->interval));
		} else {
			item->interval = wish.udp_interval;
			schedule(item, begin + wish.udp_interval * rounds * i / wish.flows);
		}
	}
}

int run(int argc, char **argv)
{
	struct item tick = { .kind = TICK }, ends = { .kind = SIGNALS }, input = { .kind = INPUT, .fd = 0 };
	struct itimerspec every_ms = { { 0, 1000000 }, { 0, 1000000 } };
	sigset_t signals;

	wish.duration *= 1000000000ull;
	wish.timeout *= 1000000000ull;
	read_options(argc, argv);
	pin(wish.cpu);
	raise_descriptor_limit(wish.connections + wish.flows + 64, wish.connections + wish.flows + 20000);
	if (getrandom(&run_id, sizeof(run_id), 0) != sizeof(run_id))
		err(1, "random");
	series = wish.series ? fopen(wish.series, "w") : wish.report ? stdout : NULL;
	if (wish.series && !series)
		err(1, "%s", wish.series);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	signal(SIGPIPE, SIG_IGN); /* nobody reads the series any more: go on */
	poller = epoll_create1(EPOLL_CLOEXEC);
	tick.fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	ends.fd = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
	if (poller < 0 || tick.fd < 0 || ends.fd < 0 || timerfd_settime(tick.fd, 0, &every_ms, NULL))
		err(1, "timer");
	watch(tick.fd, &tick, EPOLLIN, EPOLL_CTL_ADD);
	watch(ends.fd, &ends, EPOLLIN, EPOLL_CTL_ADD);
	if (wish.until_eof)
		watch(input.fd, &input, EPOLLIN, EPOLL_CTL_ADD);

	begin = now_ns();
	stop_at = begin + wish.duration;
	items = make_items(wish.connections, LONG);
	flows = make_items(wish.flows, FLOW);
	for (uint64_t i = 0; i < wish.connections; i++)
		schedule(&items[i], begin + wish.ramp * i / wish.connections);
	schedule_flows();
	serve_until(UINT64_MAX, stop_asked);
	if (wish.leave) {
		leaving = now_ns();
		serve_until(leaving + wish.leave + wish.request_interval + wish.timeout, all_left);
	}
	uint64_t traffic_ns = now_ns() - begin;

	stopping = 1;
	serve_until(now_ns() + wish.timeout + 100 * MS, nothing_waits);
	finish_flows();
	sample(now_ns());
	report(traffic_ns);
	close_all();
	return count.broken || count.short_broken || count.wrong_datagrams || count.opened < wish.connections;
}
