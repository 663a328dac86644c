/* SPDX-License-Identifier: Apache-2.0 */
/*
 * packetstack-init [--linger FILE] [--log FILE] --datapath COMMAND ARGS... [--supervisor COMMAND ARGS...]
 *
 * First process of an engine's container. Starts the datapath and the supervisor as siblings, reaps
 * whatever dies, and starts the one that died again: at once if it had run for a second, else with growing
 * pauses, up to 0.1 s for one that was killed, which may happen again and again to a good program, and up to
 * half a second for one that ended by itself. The death of one never ends the other.
 *
 * SIGHUP starts a second datapath, of the build that is installed now. The agent lets it take over from the
 * first, which then ends. SIGTERM ends all; what does not end by itself within two seconds is killed. With
 * --linger it ends nothing while FILE, the agent's socket, is there: packets may still need the engine. A
 * second SIGTERM does not wait.
 *
 * With --log all that it and its children say goes into FILE, which is cut when it has grown to a megabyte: what was
 * said last stays. Children have a pipe to it, not the file: whatever one of them says, the file system does not fill up.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

struct child {
	const char *name;
	char **argv;
	pid_t pid, successor;
	int64_t started_ms, next_ms, pause_ms;
};

enum { LONG_MS = 1000, PAUSE_MS = 10, KILLED_PAUSE_MS = 100, LONGEST_PAUSE_MS = 500, TERM_MS = 2000, LINGER_MS = 100 };

/* Bytes of the log at which it is cut, and of its end that stay. What is taken out of the pipe at once, and how often. */
enum { LOG_BYTES = 1 << 20, LOG_KEPT = 1 << 19, LOG_CHUNK = 1 << 16, LOG_PAUSE_MS = 10 };

static int log_file = -1, log_pipe[2] = { -1, -1 };
static int64_t log_ms;	  /* when the pipe may be looked at again: who never stops talking has to wait */
static int64_t unwritten; /* bytes, since the file system was full */

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static pid_t start(const struct child *c)
{
	sigset_t none;
	pid_t pid = fork();

	if (pid)
		return pid > 0 ? pid : 0; /* out of processes or memory: tried again after a pause */
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (log_file >= 0) {
		dup2(log_pipe[1], 1);
		dup2(log_pipe[1], 2);
	}
	execv(c->argv[0], c->argv);
	fprintf(stderr, "packetstack-init: %s: cannot run %s: %s\n", c->name, c->argv[0], strerror(errno));
	_exit(127);
}

static void wait_before_start(struct child *c, int longest_ms)
{
	int64_t now = now_ms();

	if (now - c->started_ms > LONG_MS)
		c->pause_ms = 0;
	c->next_ms = now + c->pause_ms;
	c->pause_ms = c->pause_ms ? c->pause_ms * 2 : PAUSE_MS;
	if (c->pause_ms > longest_ms)
		c->pause_ms = longest_ms;
}

static void died(struct child *c, pid_t pid, int status)
{
	const char *then = c->pid != pid  ? "; the one before goes on"
			   : c->successor ? "; the next one is there"
					  : "; starting it again";

	if (WIFSIGNALED(status))
		fprintf(stderr, "packetstack-init: %s (pid %d) was killed by signal %d%s\n", c->name, pid,
			WTERMSIG(status), then);
	else
		fprintf(stderr, "packetstack-init: %s (pid %d) exited with %d%s\n", c->name, pid, WEXITSTATUS(status),
			then);
	if (c->pid == pid)
		c->pid = c->successor;
	c->successor = 0;
	if (!c->pid)
		wait_before_start(c, WIFSIGNALED(status) ? KILLED_PAUSE_MS : LONGEST_PAUSE_MS);
}

static void signal_all(const struct child *children, int n, int number)
{
	for (int i = 0; i < n; i++) {
		if (children[i].pid)
			kill(children[i].pid, number);
		if (children[i].successor)
			kill(children[i].successor, number);
	}
}

/* ---- the log ------------------------------------------------------------------------------------------ */

static void log_open(const char *path)
{
	log_file = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (log_file < 0 || pipe2(log_pipe, O_CLOEXEC)) {
		fprintf(stderr, "packetstack-init: %s: cannot be written: %s; nothing is logged there\n", path,
			strerror(errno));
		log_file = -1;
		return;
	}
	fcntl(log_pipe[0], F_SETFL, O_NONBLOCK);
	fflush(stderr);
	dup2(log_file, 1);
	dup2(log_file, 2);
}

static void log_write(const char *text, size_t bytes)
{
	ssize_t written = write(log_file, text, bytes);

	unwritten += (int64_t)bytes - (written > 0 ? written : 0);
	if (unwritten && written == (ssize_t)bytes) {
		int64_t lost = unwritten;

		unwritten = 0;
		fprintf(stderr, "\npacketstack-init: the file system was full: %lld bytes of this log were lost\n",
			(long long)lost);
	}
}

static void log_cut(void)
{
	static char kept[LOG_KEPT];
	const char *from;
	struct stat st;
	ssize_t got;

	if (log_file < 0 || fstat(log_file, &st) || st.st_size < LOG_BYTES)
		return;
	got = pread(log_file, kept, sizeof(kept), st.st_size - LOG_KEPT);
	if (ftruncate(log_file, 0) || got <= 0)
		return;
	from = memchr(kept, '\n', (size_t)got);
	from = from ? from + 1 : kept;
	got -= from - kept;
	fprintf(stderr, "packetstack-init: this log was cut: %lld bytes that stood before are gone\n",
		(long long)st.st_size - got);
	log_write(from, (size_t)got);
}

/* Takes what children have said. */
static void log_take(int64_t now)
{
	static char said[LOG_CHUNK];
	ssize_t got = read(log_pipe[0], said, sizeof(said));

	if (got > 0)
		log_write(said, (size_t)got);
	if (got == LOG_CHUNK)
		log_ms = now + LOG_PAUSE_MS;
}

int main(int argc, char **argv)
{
	struct child children[2] = { { .name = NULL } };
	int n = 0, events;
	sigset_t set;
	int64_t kill_ms = 0; /* ending: when what still runs is killed */
	const char *linger = NULL;
	int told_to_end = 0, absent = 0; /* looks in a row that did not find `linger`: an agent may renew it */

	for (int i = 1; i < argc; i++) {
		if (!n && !strcmp(argv[i], "--linger") && i + 1 < argc)
			linger = argv[++i];
		if (!n && !strcmp(argv[i], "--log") && i + 1 < argc)
			log_open(argv[++i]);
		if (n < 2 && (!strcmp(argv[i], "--datapath") || !strcmp(argv[i], "--supervisor")) && i + 1 < argc) {
			children[n].name = argv[i] + 2;
			children[n++].argv = &argv[i + 1];
			argv[i] = NULL;
		}
	}
	if (!n) {
		fprintf(stderr,
			"usage: packetstack-init [--linger FILE] [--log FILE] --datapath COMMAND ARGS... [--supervisor COMMAND ARGS...]\n");
		return 2;
	}
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	events = signalfd(-1, &set, SFD_CLOEXEC);
	for (;;) {
		struct pollfd p[2] = { { .fd = events, .events = POLLIN }, { .fd = log_pipe[0], .events = POLLIN } };
		struct signalfd_siginfo info;
		int64_t wait = -1, now = now_ms();
		int status, told, running = 0;
		pid_t pid;

		for (int i = 0; i < n; i++) {
			struct child *c = &children[i];

			if (!c->pid && !kill_ms) {
				if (c->next_ms <= now) {
					c->started_ms = now;
					c->pid = start(c);
					if (!c->pid)
						wait_before_start(c, LONGEST_PAUSE_MS);
				}
				if (!c->pid && (wait < 0 || c->next_ms - now < wait))
					wait = c->next_ms - now;
			}
			running += c->pid > 0;
		}
		if (kill_ms) {
			if (!running)
				return 0;
			if (now >= kill_ms)
				signal_all(children, n, SIGKILL);
			wait = now < kill_ms ? kill_ms - now : 100;
		}
		if (told_to_end && !kill_ms) {
			absent = access(linger, F_OK) ? absent + 1 : 0;
			if (absent > 1) {
				kill_ms = now + TERM_MS;
				signal_all(children, n, SIGTERM);
			} else if (wait < 0 || wait > LINGER_MS) {
				wait = LINGER_MS;
			}
		}
		if (log_file >= 0 && log_ms > now) {
			p[1].fd = -1;
			wait = wait < 0 || wait > log_ms - now ? log_ms - now : wait;
		}
		told = poll(p, 2, (int)wait) > 0 && p[0].revents && read(events, &info, sizeof(info)) == sizeof(info);
		if (p[1].revents & POLLIN)
			log_take(now_ms());
		log_cut();
		/* First who is dead: what is told may be about who comes next. */
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
			for (int i = 0; i < n; i++)
				if (children[i].pid == pid || children[i].successor == pid)
					died(&children[i], pid, status);
		if (!told || kill_ms || info.ssi_signo == SIGCHLD)
			continue;
		if (info.ssi_signo != SIGHUP && linger && !told_to_end) {
			told_to_end = 1;
			continue;
		}
		if (info.ssi_signo != SIGHUP) {
			kill_ms = now_ms() + TERM_MS;
			signal_all(children, n, SIGTERM);
			continue;
		}
		for (int i = 0; i < n; i++)
			if (!strcmp(children[i].name, "datapath") && children[i].pid && !children[i].successor)
				children[i].successor = start(&children[i]);
	}
}
