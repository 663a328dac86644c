/* SPDX-License-Identifier: Apache-2.0 */
/*
 * packetstack-datapath --socket PATH
 *
 * Gets everything it needs from the agent as descriptors, gives up all privileges, and moves packets
 * until it is told to end. The agent may go away and come back; that changes nothing here.
 */
#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "datapath.h"

enum { NOBODY = 65534, MAX_FDS = 6 + PS_MAX_QUEUES + 2 * PS_MAX_CORES, SHARED_FILES = 5 };

static struct datapath datapath;

/*
 * The socket lies in the directory this process was started for. It is reached from there, since later, without
 * privileges, the way to that directory is closed.
 */
static int agent_connect(const char *name)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	strcpy(address.sun_path, name);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		close(fd);
		return -1;
	}
	return fd;
}

static const char *enter_directory(char *path)
{
	char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;

	if (strlen(name) >= sizeof(((struct sockaddr_un *)0)->sun_path)) {
		fprintf(stderr, "packetstack-datapath: --socket %s: its name is too long\n", path);
		exit(2);
	}
	if (slash) {
		*slash = 0;
		if (chdir(*path ? path : "/")) {
			fprintf(stderr, "packetstack-datapath: --socket: directory %s: %s\n", path, strerror(errno));
			exit(1);
		}
	}
	return name;
}

/* With `n` descriptors, if there are any. -> 0 or -1 */
static int send_message(int fd, uint32_t kind, uint32_t generation, const int *fds, int n)
{
	struct ps_message m = {
		.kind = kind,
		.layout = PS_LAYOUT_VERSION,
		.pid = (uint32_t)getpid(),
		.generation = generation,
		.shard = ps_shard_form(),
	};
	union {
		char bytes[CMSG_SPACE(sizeof(int) * MAX_FDS)];
		struct cmsghdr align;
	} control = { { 0 } };
	struct iovec io = { &m, sizeof(m) };
	struct msghdr h = { .msg_iov = &io, .msg_iovlen = 1 };

	if (n) {
		struct cmsghdr *c = &control.align;

		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN((size_t)n * sizeof(int));
		memcpy(CMSG_DATA(c), fds, (size_t)n * sizeof(int));
		h.msg_control = control.bytes;
		h.msg_controllen = CMSG_SPACE((size_t)n * sizeof(int));
	}
	return sendmsg(fd, &h, MSG_NOSIGNAL) == sizeof(m) ? 0 : -1;
}

/* -> number of descriptors, or -1 */
static int receive_message(int fd, struct ps_message *m, int *fds)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int) * MAX_FDS)];
		struct cmsghdr align;
	} control;
	struct iovec io = { m, sizeof(*m) };
	struct msghdr h = {
		.msg_iov = &io, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
	};
	ssize_t got = recvmsg(fd, &h, MSG_CMSG_CLOEXEC);
	int n = 0;

	m->text[sizeof(m->text) - 1] = 0;
	if (got != sizeof(*m) || h.msg_flags & (MSG_CTRUNC | MSG_TRUNC))
		return -1;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&h); c; c = CMSG_NXTHDR(&h, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		n = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(c), (size_t)n * sizeof(int));
	}
	return n;
}

/* All that was privileged has been done by the agent: nothing is kept. */
static int give_up_privileges(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = { { 0, 0, 0 }, { 0, 0, 0 } };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -1;
	if (!geteuid()) {
		for (int cap = 0; cap < 64; cap++)
			prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
		if (setgroups(0, NULL) || setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY))
			return -1;
	}
	return (int)syscall(SYS_capset, &header, data);
}

static void end(int signal) { _exit(signal == SIGTERM ? 0 : 1); }

/* Uses the list that the agent has sent, or none any more, and answers. */
static void connect_list(int agent, const struct ps_message *m, const int *fds, int n)
{
	struct ps_message answer = { .kind = PS_MSG_CONNECTED, .layout = PS_LAYOUT_VERSION };

	datapath_connect(&datapath, n == 1 ? fds[0] : -1, m, answer.text, sizeof(answer.text));
	for (int i = 0; i < n; i++)
		close(fds[i]);
	send(agent, &answer, sizeof(answer), MSG_NOSIGNAL);
}

/* The next message, which has to be of this kind; ends the process if it is not. -> number of descriptors */
static int expect(int agent, uint32_t kind, struct ps_message *m, int *fds)
{
	int n;

	while ((n = receive_message(agent, m, fds)) >= 0 && m->kind == PS_MSG_CONNECTIONS)
		connect_list(agent, m, fds, n);
	if (n >= 0 && m->kind == kind)
		return n;
	if (n >= 0 && m->kind == PS_MSG_REFUSED)
		fprintf(stderr, "packetstack-datapath: the agent does not let this process in: %s\n", m->text);
	else
		fprintf(stderr,
			"packetstack-datapath: the agent ended before this process had the queues; init starts another\n");
	exit(1);
}

/* The numbers of struct ps_shard_form in their order, with dots between them: before it starts a build, an agent asks this. */
static int print_form(void)
{
	struct ps_shard_form form = ps_shard_form();
	uint16_t numbers[sizeof(form) / sizeof(uint16_t)];

	memcpy(numbers, &form, sizeof(form));
	for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++)
		printf(i ? ".%u" : "%u", numbers[i]);
	return puts("") < 0;
}

int main(int argc, char **argv)
{
	struct ps_message m, order;
	int fds[MAX_FDS], none[MAX_FDS], n, agent;
	char error[256] = "";
	const char *name;

	if (argc == 2 && !strcmp(argv[1], "--shard-form"))
		return print_form();
	if (argc != 3 || strcmp(argv[1], "--socket")) {
		fprintf(stderr, "usage: packetstack-datapath --socket PATH | --shard-form\n");
		return 2;
	}
	signal(SIGTERM, end);
	signal(SIGPIPE, SIG_IGN);
	name = enter_directory(argv[2]);
	for (int i = 0; (agent = agent_connect(name)) < 0; i++) {
		if (i == 100) {
			fprintf(stderr,
				"packetstack-datapath: %s: no agent answered for 10 s: %s; init starts another\n", name,
				strerror(errno));
			return 1;
		}
		usleep(100000);
	}
	send_message(agent, PS_MSG_HELLO, 0, NULL, 0);
	n = expect(agent, PS_MSG_ATTACH, &m, fds);
	if (datapath_map(&datapath, &m, fds, n, error, sizeof(error)) || give_up_privileges()) {
		fprintf(stderr, "packetstack-datapath: %s\n", *error ? error : strerror(errno));
		return 1;
	}
	send_message(agent, PS_MSG_PREPARED, m.generation, NULL, 0);
	expect(agent, PS_MSG_GO, &order, none);
	if (datapath_start(&datapath, error, sizeof(error))) {
		fprintf(stderr, "packetstack-datapath: %s\n", error);
		return 1;
	}
	__atomic_store_n(&datapath.engine->ready, m.generation, __ATOMIC_RELEASE);
	send_message(agent, PS_MSG_READY, m.generation, NULL, 0);
	for (;;) {
		int came = receive_message(agent, &order, none);

		if (came >= 0) {
			if (order.kind == PS_MSG_CONNECTIONS)
				connect_list(agent, &order, none, came);
			if (order.kind == PS_MSG_STOP) {
				datapath_stop(&datapath);
				send_message(agent, PS_MSG_STOPPED, m.generation, NULL, 0);
				return 0;
			}
			if (order.kind == PS_MSG_REFUSED) {
				fprintf(stderr, "packetstack-datapath: the agent does not let this process in: %s\n",
					order.text);
				return 1;
			}
			continue;
		}
		/* The agent is gone. Packets go on; tell the next one who we are, and give it what we hold. */
		close(agent);
		do {
			usleep(50000); /* also when it hung up at once */
		} while ((agent = agent_connect(name)) < 0);
		send_message(agent, PS_MSG_HELLO, m.generation, fds + SHARED_FILES, n - SHARED_FILES);
	}
}
