/* SPDX-License-Identifier: Apache-2.0 */
/*
 * packetstack-init --datapath COMMAND ARGS... [--supervisor COMMAND ARGS...]
 *
 * First process of an engine's container. Starts the datapath and the supervisor as siblings, reaps
 * whatever dies, and starts the one that died again (at once, then with growing pauses up to 5 s). The
 * death of one never ends the other. SIGTERM ends both.
 */
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

struct child {
	const char *name;
	char **argv;
	pid_t pid;
	int64_t started_ms, next_ms, pause_ms;
};

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void start(struct child *c)
{
	sigset_t none;

	c->started_ms = now_ms();
	c->pid = fork();
	if (c->pid)
		return;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execv(c->argv[0], c->argv);
	fprintf(stderr, "packetstack-init: %s: cannot run %s: %s\n", c->name, c->argv[0], strerror(errno));
	_exit(127);
}

static void died(struct child *c, int status)
{
	int64_t now = now_ms();

	if (WIFSIGNALED(status))
		fprintf(stderr, "packetstack-init: %s (pid %d) was killed by signal %d; starting it again\n", c->name,
			c->pid, WTERMSIG(status));
	else
		fprintf(stderr, "packetstack-init: %s (pid %d) exited with %d; starting it again\n", c->name, c->pid,
			WEXITSTATUS(status));
	c->pid = 0;
	c->pause_ms = now - c->started_ms > 10000 ? 0 : c->pause_ms ? c->pause_ms * 2 : 100;
	if (c->pause_ms > 5000)
		c->pause_ms = 5000;
	c->next_ms = now + (c->pause_ms > 100 ? c->pause_ms : 0);
}

int main(int argc, char **argv)
{
	struct child children[2] = { { .name = NULL } };
	int n = 0, events;
	sigset_t set;
	bool ending = false;

	for (int i = 1; i < argc; i++) {
		if (n < 2 && (!strcmp(argv[i], "--datapath") || !strcmp(argv[i], "--supervisor")) && i + 1 < argc) {
			children[n].name = argv[i] + 2;
			children[n++].argv = &argv[i + 1];
			argv[i] = NULL;
		}
	}
	if (!n) {
		fprintf(stderr, "usage: packetstack-init --datapath COMMAND ARGS... [--supervisor COMMAND ARGS...]\n");
		return 2;
	}
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigprocmask(SIG_BLOCK, &set, NULL);
	events = signalfd(-1, &set, SFD_CLOEXEC);
	for (int i = 0; i < n; i++)
		start(&children[i]);
	for (;;) {
		struct pollfd p = { .fd = events, .events = POLLIN };
		struct signalfd_siginfo info;
		int64_t wait = -1, now = now_ms();
		int status, running = 0;
		pid_t pid;

		for (int i = 0; i < n; i++) {
			if (!children[i].pid && !ending) {
				int64_t left = children[i].next_ms - now;

				if (left <= 0)
					start(&children[i]);
				else if (wait < 0 || left < wait)
					wait = left;
			}
			running += children[i].pid > 0;
		}
		if (ending && !running)
			return 0;
		if (poll(&p, 1, (int)wait) > 0 && read(events, &info, sizeof(info)) == sizeof(info) &&
		    info.ssi_signo != SIGCHLD) {
			ending = true;
			for (int i = 0; i < n; i++)
				if (children[i].pid > 0)
					kill(children[i].pid, SIGTERM);
		}
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
			for (int i = 0; i < n; i++)
				if (children[i].pid == pid)
					died(&children[i], status);
	}
}
