/* A child's life outside its program: start, log lines, death, and when it may come again. */
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

uint64_t clock_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void child_init(struct child *child, enum cm_role role, const char *name, const char *program)
{
    memset(child, 0, sizeof(*child));
    child->role = role;
    child->name = name;
    child->program = program;
    child->pidfd = -1;
    child->log_fd = -1;
    child->channel.fd = -1;
}

bool child_alive(const struct child *child)
{
    return child->state == CHILD_STARTING || child->state == CHILD_SERVING;
}

enum cm_status child_start(struct service *service, struct child *child, int input,
                           const int *rings, int tpm, struct cm_error *err)
{
    int fds[CM_FD_COUNT];
    struct spawned spawned;
    memset(fds, 0xff, sizeof(fds)); /* -1 each */
    fds[CM_FD_INPUT] = input;
    fds[CM_FD_TPM] = tpm;
    if (rings != NULL) {
        memcpy(fds + CM_FD_REQUEST_DATA, rings, CM_RING_FD_COUNT * sizeof(int));
    }
    enum cm_status status = spawn(service, child, fds, &spawned, err);
    if (status != CM_OK) {
        return status;
    }
    child->pid = spawned.pid;
    child->pidfd = spawned.pidfd;
    child->log_fd = spawned.log_fd;
    cm_channel_init(&child->channel, spawned.control_fd, CM_ROLE_SUPERVISOR, child->role);
    child->state = CHILD_STARTING;
    child->generation++;
    child->started_ms = clock_ms();
    child->ready_ms = 0;
    child->heard_ms = child->started_ms;
    child->stop_ms = 0;
    child->closed = child->keyed = false;
    child->log_used = 0;
    child->log_cut = false;
    child->stop_sent = child->drain_sent = child->drained = child->error_set = false;
    CM_LOG(&service->log, CM_LOG_INFO, "role_started", CM_LOG_S("name", child->name),
           CM_LOG_I("pid", child->pid), CM_LOG_I("generation", child->generation));
    return CM_OK;
}

void child_kill(struct service *service, struct child *child, enum cm_role_end end,
                const struct cm_error *why)
{
    if (!child_alive(child)) {
        return;
    }
    child->kill = end;
    if (!child->error_set) {
        child->error = *why;
        child->error_set = true;
    }
    cm_log_error(&service->log, "role_killed", why);
    syscall(SYS_pidfd_send_signal, child->pidfd, SIGKILL, NULL, 0);
    child->state = CHILD_KILLED;
    child->killed_ms = clock_ms();
}

/* One whole line to our stderr. A reader that stands still costs lines, never the service. */
static void line_out(const char *line, size_t bytes)
{
    struct pollfd poller = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (poll(&poller, 1, 0) == 1 && (poller.revents & POLLOUT) != 0) {
        ssize_t written = write(STDERR_FILENO, line, bytes);
        (void)written;
    }
}

static void log_take(struct child *child, const char *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        bool end = bytes[i] == '\n';
        if (!child->log_cut || end) {
            child->log_line[child->log_used++] = bytes[i];
        }
        if (end) {
            line_out(child->log_line, child->log_used);
            child->log_used = 0;
            child->log_cut = false;
        } else if (child->log_used == LOG_LINE_BYTES - 1) {
            child->log_cut = true;
        }
    }
}

/* At most 64 KiB a call: a role that floods its log gets no more than its share. */
void child_log_copy(struct child *child)
{
    char bytes[4096];
    for (int i = 0; i < 16; i++) {
        ssize_t got = read(child->log_fd, bytes, sizeof(bytes));
        if (got <= 0) {
            return;
        }
        log_take(child, bytes, (size_t)got);
    }
}

void child_reap(struct service *service, struct child *child)
{
    siginfo_t how = {0};
    waitid(P_PIDFD, (id_t)child->pidfd, &how, WEXITED);
    child_log_copy(child);
    if (child->log_used > 0) {
        log_take(child, "\n", 1);
    }
    uint64_t kills = cm_cgroup_oom_kills(&service->groups.groups[child - service->children]);
    violation_take(service, child, &how);
    end_take(service, child, &how, kills > child->memory_kills);
    child->memory_kills = kills;
    close(child->channel.fd);
    close(child->pidfd);
    close(child->log_fd);
    child->channel.fd = child->pidfd = child->log_fd = -1;
    child->pid = 0;
    child->resident_bytes = 0;
    child->state = CHILD_ABSENT;
}

bool backoff_next(struct backoff *backoff, uint64_t started_ms, uint64_t now_ms, uint32_t random,
                  uint64_t *ret_delay_ms)
{
    if (now_ms - started_ms >= BUDGET_WINDOW_MS) {
        backoff->streak = 0;
    }
    uint64_t oldest = backoff->deaths_ms[backoff->death_count % BUDGET_DEATHS];
    bool spent = backoff->death_count >= BUDGET_DEATHS && now_ms - oldest < BUDGET_WINDOW_MS;
    backoff->deaths_ms[backoff->death_count++ % BUDGET_DEATHS] = now_ms;
    if (spent) {
        return false;
    }
    uint64_t delay = BACKOFF_LEAST_MS;
    for (uint32_t i = 0; i < backoff->streak && delay < BACKOFF_MOST_MS; i++) {
        delay *= 2;
    }
    delay = delay < BACKOFF_MOST_MS ? delay : BACKOFF_MOST_MS;
    backoff->streak++;
    /* Half fixed, half random: restarts of a fleet spread, and none comes at once. */
    *ret_delay_ms = delay / 2 + random % (delay / 2 + 1);
    return true;
}
