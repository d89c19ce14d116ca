/* The gateway's process, started as the launcher does it. Of its confinement the filters alone:
 * what it does in any test, its policies must allow; the other layers tests/escape tests. */
#include "tests/harness/gateway/harness.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/base/sealed.h"
#include "sandbox/confine.h"

#define HIGH_FD 100 /* beyond all that a role is given */

static pid_t gateway = -1;

static void gateway_kill(void)
{
    if (gateway > 0) {
        kill(gateway, SIGKILL);
    }
}

static bool confinement_place(const int fds[static CM_FD_COUNT])
{
    struct cm_confinement c = {.layers =
                                   CM_LAYER_BIT(CM_LAYER_NO_NEW) | CM_LAYER_BIT(CM_LAYER_FILTER),
                               .role = CM_ROLE_GATEWAY,
                               .filter_start = CM_FILTER_GATEWAY_START,
                               .filter_serve = CM_FILTER_GATEWAY};
    for (int i = CM_FD_CONTROL; i < CM_FD_COUNT; i++) {
        c.descriptors |= fds[i] >= 0 ? 1u << i : 0;
    }
    if (cm_confine_sanitized()) {
        c.layers = 0;
    }
    int fd = cm_memfd_sealed("confinement", &c, sizeof(c));
    return fd >= 0 && dup2(fd, CM_CONFINEMENT_FD) == CM_CONFINEMENT_FD && close(fd) == 0;
}

/* Each at its number. By way of high numbers: a source may stand where another's place is. */
static void descriptors_place(const int fds[static CM_FD_COUNT])
{
    int high[CM_FD_COUNT];
    for (int i = CM_FD_CONTROL; i < CM_FD_COUNT; i++) {
        high[i] = fds[i] >= 0 ? fcntl(fds[i], F_DUPFD_CLOEXEC, HIGH_FD) : -1;
    }
    for (int i = CM_FD_CONTROL; i < CM_FD_COUNT; i++) {
        close(i);
        if (high[i] >= 0) {
            dup2(high[i], i);
        }
    }
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    dup2(null_fd, 0);
    close(null_fd);
    dup2(0, 1);
    dup2(CM_FD_LOG, 2);
    (void)close_range(CM_FD_COUNT, ~0u, 0);
}

void gateway_spawn(const char *program, const int fds[static CM_FD_COUNT])
{
    gateway = fork();
    check(gateway >= 0, "fork");
    if (gateway > 0) {
        check(atexit(gateway_kill) == 0, "atexit"); /* however the harness ends */
        return;
    }
    descriptors_place(fds);
    check(confinement_place(fds), "confinement");
    execl(program, "casemate-gateway", (char *)NULL);
    _exit(127);
}

bool gateway_ended(void)
{
    int status = 0;
    if (waitpid(gateway, &status, WNOHANG) != gateway) {
        return false;
    }
    gateway = -1; /* the number may be another's now */
    event("exit", ",\"code\":%d,\"signal\":%d", WIFEXITED(status) ? WEXITSTATUS(status) : -1,
          WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    return true;
}

void gateway_report(uint64_t beats)
{
    char path[64];
    char line[256];
    long resident = 0;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)gateway);
    FILE *file = fopen(path, "re");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        (void)sscanf(line, "VmRSS: %ld", &resident);
    }
    if (file != NULL) {
        fclose(file);
    }
    event("memory", ",\"kib\":%ld,\"beats\":%llu", resident, (unsigned long long)beats);
}
