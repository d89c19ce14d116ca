/* Enrolment: run casemate-keeper --provision once, with a TPM at descriptor 13. For a development
 * TPM we stand in for the supervisor: casemate-devtpm gets its control channel from us. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "loader/tpm/enrolment.h"
#include "runtime/base/hex.h"
#include "runtime/cli/cli_internal.h"
#include "sandbox/confine.h"

#define READY_MS  15000
#define RECORD_MS 120000 /* a real TPM may take tens of seconds for its keys */
#define HIGH_FD   64

struct helper {
    pid_t pid;
    int pidfd;
};

/* What a child has: its standard output, and descriptors 3.. as in the supervisor's table. */
struct place {
    int output;
    int fds[CM_FD_COUNT];
};

__attribute__((noreturn)) static void helper_run(const char *path, char *const *arguments,
                                                 const struct place *place, pid_t parent)
{
    int high[CM_FD_COUNT];
    char *const environment[] = {NULL};
    const struct rlimit none = {0, 0};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setrlimit(RLIMIT_CORE, &none);
    if (getppid() != parent) {
        _exit(127);
    }
    for (int i = CM_FD_CONTROL; i < CM_FD_COUNT; i++) {
        high[i] = place->fds[i] >= 0 ? fcntl(place->fds[i], F_DUPFD_CLOEXEC, HIGH_FD) : -1;
    }
    int output = place->output >= 0 ? dup2(place->output, STDOUT_FILENO) : 0;
    for (int i = CM_FD_CONTROL; i < CM_FD_COUNT; i++) {
        close(i);
        if (high[i] >= 0 && dup2(high[i], i) < 0) {
            _exit(127);
        }
    }
    if (output < 0 || syscall(SYS_close_range, CM_FD_COUNT, ~0u, 0) != 0 ||
        !cm_confinement_none_place()) {
        _exit(127);
    }
    execve(path, arguments, environment);
    _exit(127);
}

static enum cm_status helper_start(char *const *arguments, const struct place *place,
                                   struct helper *ret_helper, struct cm_error *err)
{
    char path[4200];
    enum cm_status status = cli_program_path(arguments[0], path, sizeof(path), err);
    if (status != CM_OK) {
        return status;
    }
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid == 0) {
        helper_run(path, arguments, place, parent);
    }
    int pidfd = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
    if (pidfd < 0) {
        return cm_error_errno(err, errno, "CM-CLI-FORK", "cannot start %s", arguments[0]);
    }
    *ret_helper = (struct helper){pid, pidfd};
    return CM_OK;
}

/* Wait for the end, then SIGKILL. Returns the exit code, or -1. */
static int helper_end(struct helper *helper, int wait_ms)
{
    siginfo_t how = {0};
    if (helper->pid == 0) {
        return -1;
    }
    struct pollfd poller = {.fd = helper->pidfd, .events = POLLIN};
    if (poll(&poller, 1, wait_ms) != 1) {
        syscall(SYS_pidfd_send_signal, helper->pidfd, SIGKILL, NULL, 0);
    }
    waitid(P_PID, (id_t)helper->pid, &how, WEXITED);
    close(helper->pidfd);
    helper->pid = 0;
    return how.si_code == CLD_EXITED ? how.si_status : -1;
}

static struct place place_empty(void)
{
    struct place place = {.output = -1};
    memset(place.fds, 0xff, sizeof(place.fds)); /* -1 each */
    place.fds[CM_FD_LOG] = STDERR_FILENO;
    return place;
}

static enum cm_status devtpm_ready(struct cm_channel *channel, struct cm_error *err)
{
    static struct cm_frame frame;
    struct cm_config_devtpm config = {.reserved = 0};
    enum cm_status status =
        cm_channel_send(channel, CM_FRAME_CONFIG, &config, sizeof(config), NULL, 0, err);
    while (status == CM_OK) {
        status = cm_channel_wait(channel, &frame, READY_MS, err);
        if (status != CM_OK) {
            return cm_error_wrap(err, "development TPM");
        }
        cm_frame_close_fds(&frame);
        if (frame.type == CM_FRAME_READY) {
            return CM_OK;
        }
        if (frame.type == CM_FRAME_FAILED) {
            memcpy(err, frame.payload, sizeof(*err));
            cm_error_sanitise(err);
            return (enum cm_status)err->status;
        }
    }
    return status;
}

static uint64_t clock_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static enum cm_status record_read(int fd, uint8_t *bytes, size_t size, size_t *ret_used,
                                  struct cm_error *err)
{
    size_t used = 0;
    uint64_t until = clock_ms() + RECORD_MS;
    for (;;) {
        struct pollfd poller = {.fd = fd, .events = POLLIN};
        uint64_t now = clock_ms();
        if (now >= until || poll(&poller, 1, (int)(until - now)) != 1) {
            return cm_error_set(err, CM_E_TPM, "CM-CLI-RECORD", "no enrolment record within %d s",
                                RECORD_MS / 1000);
        }
        ssize_t got = read(fd, bytes + used, size - used);
        if (got < 0) {
            return cm_error_errno(err, errno, "CM-CLI-RECORD", "cannot read the enrolment record");
        }
        if (got == 0) {
            *ret_used = used;
            return CM_OK;
        }
        used += (size_t)got;
        if (used == size) {
            return cm_error_set(err, CM_E_BUG, "CM-CLI-RECORD", "the enrolment record is too long");
        }
    }
}

static enum cm_status keeper_run(char *const *arguments, int tpm_fd,
                                 uint8_t ret_record[static CM_ENROLMENT_BYTES_MAX],
                                 size_t *ret_bytes, struct cm_error *err)
{
    uint8_t record[CM_ENROLMENT_BYTES_MAX + 1];
    size_t used = 0;
    int pipes[2];
    struct helper keeper = {0, -1};
    if (pipe2(pipes, O_CLOEXEC) != 0) {
        return cm_error_errno(err, errno, "CM-CLI-PIPE", "cannot make a pipe");
    }
    struct place place = place_empty();
    place.output = pipes[1];
    place.fds[CM_FD_TPM] = tpm_fd;
    enum cm_status status = helper_start(arguments, &place, &keeper, err);
    close(pipes[1]);
    if (status == CM_OK) {
        status = record_read(pipes[0], record, sizeof(record), &used, err);
    }
    int code = helper_end(&keeper, status == CM_OK ? 5000 : 0);
    if (status == CM_OK && (code != 0 || used == 0)) {
        /* It has said why on our stderr; its exit code names the kind. */
        status = code == 5 ? CM_E_POLICY : code == 6 ? CM_E_TPM : CM_E_SYSTEM;
        cm_error_set(err, status, "CM-CLI-PROVISION",
                     "casemate-keeper %s ended with code %d and %zu bytes", arguments[1], code,
                     used);
    }
    close(pipes[0]);
    if (status == CM_OK) {
        memcpy(ret_record, record, used);
        *ret_bytes = used;
    }
    return status;
}

static enum cm_status development_run(char *const *keeper, const char *state,
                                      uint8_t ret_record[static CM_ENROLMENT_BYTES_MAX],
                                      size_t *ret_bytes, struct cm_error *err)
{
    int control[2] = {-1, -1};
    int tpm[2] = {-1, -1};
    struct helper devtpm = {0, -1};
    struct cm_channel channel;
    char *arguments[] = {"casemate-devtpm", NULL};
    enum cm_status status = CM_OK;
    int state_fd = open(state, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (state_fd < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control) != 0 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, tpm) != 0) {
        status = cm_error_errno(err, errno, "CM-CLI-DEVTPM", "cannot prepare %s", state);
        goto out;
    }
    struct place place = place_empty();
    place.fds[CM_FD_CONTROL] = control[1];
    place.fds[CM_FD_INPUT] = state_fd;
    place.fds[CM_FD_TPM] = tpm[1];
    status = helper_start(arguments, &place, &devtpm, err);
    if (status != CM_OK) {
        goto out;
    }
    close(control[1]); /* only the child's: its death shows as the end of the channel */
    close(tpm[1]);
    control[1] = tpm[1] = -1;
    cm_channel_init(&channel, control[0], CM_ROLE_SUPERVISOR, CM_ROLE_DEVTPM);
    status = devtpm_ready(&channel, err);
    if (status == CM_OK) {
        status = keeper_run(keeper, tpm[0], ret_record, ret_bytes, err);
    }
    if (status == CM_OK) {
        status = cm_channel_send(&channel, CM_FRAME_STOP, NULL, 0, NULL, 0, err);
    }
    if (helper_end(&devtpm, status == CM_OK ? 5000 : 0) != 0 && status == CM_OK) {
        status = cm_error_set(err, CM_E_TPM, "CM-CLI-DEVTPM",
                              "the development TPM did not end cleanly; its state may be lost");
    }
out:
    helper_end(&devtpm, 0);
    for (int i = 0; i < 2; i++) {
        if (control[i] >= 0) {
            close(control[i]);
        }
        if (tpm[i] >= 0) {
            close(tpm[i]);
        }
    }
    if (state_fd >= 0) {
        close(state_fd);
    }
    return status;
}

/* Run casemate-keeper once with a TPM at descriptor 13, and take what it writes. */
static enum cm_status tpm_run(char *const *keeper, const char *tpm_path,
                              const char *development_state,
                              uint8_t ret_record[static CM_ENROLMENT_BYTES_MAX], size_t *ret_bytes,
                              struct cm_error *err)
{
    signal(SIGPIPE, SIG_IGN);
    if (development_state != NULL) {
        return development_run(keeper, development_state, ret_record, ret_bytes, err);
    }
    int fd = -1;
    enum cm_status status = cm_config_tpm_open(tpm_path, &fd, err);
    if (status == CM_OK) {
        status = keeper_run(keeper, fd, ret_record, ret_bytes, err);
        close(fd);
    }
    return status;
}

enum cm_status cli_provision(const char *node_name, const char *tpm_path,
                             const char *development_state,
                             uint8_t ret_record[static CM_ENROLMENT_BYTES_MAX], size_t *ret_bytes,
                             struct cm_error *err)
{
    char *arguments[] = {"casemate-keeper",
                         "--provision",
                         "--node-name",
                         (char *)node_name,
                         development_state != NULL ? "--development" : NULL,
                         NULL};
    return tpm_run(arguments, tpm_path, development_state, ret_record, ret_bytes, err);
}

enum cm_status cli_counter_step(const char *tpm_path, const char *development_state,
                                uint64_t *ret_counter, struct cm_error *err)
{
    char *arguments[] = {"casemate-keeper", "--revoke", NULL};
    uint8_t text[CM_ENROLMENT_BYTES_MAX];
    size_t bytes = 0;
    enum cm_status status = tpm_run(arguments, tpm_path, development_state, text, &bytes, err);
    if (status == CM_OK) {
        text[bytes < sizeof(text) ? bytes : sizeof(text) - 1] = '\0';
        *ret_counter = strtoull((const char *)text, NULL, 10);
    }
    return status;
}

enum cm_status cli_challenge_answer(const char *tpm_path, const char *development_state,
                                    const uint8_t *challenge, size_t size,
                                    uint8_t ret_secret[static CM_DIGEST_BYTES],
                                    struct cm_error *err)
{
    char hex[2 * CM_CREDENTIAL_BYTES_MAX + 1];
    char *arguments[] = {"casemate-keeper", "--answer", hex, NULL};
    uint8_t answer[CM_ENROLMENT_BYTES_MAX];
    size_t bytes = 0;
    CM_ASSERT(size <= CM_CREDENTIAL_BYTES_MAX);
    cm_hex_write(challenge, size, hex);
    enum cm_status status = tpm_run(arguments, tpm_path, development_state, answer, &bytes, err);
    if (status == CM_OK && bytes != CM_DIGEST_BYTES) {
        status = cm_error_set(err, CM_E_BUG, "CM-CLI-ANSWER", "the keeper gave %zu bytes", bytes);
    }
    if (status == CM_OK) {
        memcpy(ret_secret, answer, CM_DIGEST_BYTES);
    }
    return status;
}

enum cm_status cli_keeper_look(const char *tpm_path, const char *development_state,
                               struct cli_tpm_facts *ret_facts, struct cm_error *err)
{
    char *arguments[] = {"casemate-keeper", "--look", NULL};
    uint8_t answer[CM_ENROLMENT_BYTES_MAX];
    size_t bytes = 0;
    enum cm_status status = tpm_run(arguments, tpm_path, development_state, answer, &bytes, err);
    if (status == CM_OK && bytes != sizeof(ret_facts->counter) + sizeof(ret_facts->pcrs)) {
        status = cm_error_set(err, CM_E_BUG, "CM-CLI-LOOK", "the keeper gave %zu bytes", bytes);
    }
    if (status == CM_OK) {
        memcpy(&ret_facts->counter, answer, sizeof(ret_facts->counter));
        memcpy(ret_facts->pcrs, answer + sizeof(ret_facts->counter), sizeof(ret_facts->pcrs));
    }
    return status;
}
