/* clone3, and the steps of the child that precede its exec. */
#include "sandbox/launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sandbox/steps.h"

#define HIGH_FD 128 /* above the table and any image */

static void signals_default(void)
{
    sigset_t none;
    for (int number = 1; number < NSIG; number++) {
        signal(number, SIG_DFL);
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* Move every descriptor out of the way first, then to its number: no order of dup2 can clobber. The
 * image's are not close-on-exec: its loader opens them; the role closes them first of all. */
static bool descriptors_place(const int fds[static CM_LAUNCH_FDS])
{
    int high[CM_LAUNCH_FDS];
    for (int i = CM_FD_CONTROL; i < CM_LAUNCH_FDS; i++) {
        high[i] = fds[i] >= 0 ? fcntl(fds[i], F_DUPFD_CLOEXEC, HIGH_FD) : -1;
        if (fds[i] >= 0 && high[i] < 0) {
            return false;
        }
    }
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null_fd < 0 || dup2(null_fd, 0) < 0 || dup2(null_fd, 1) < 0 ||
        dup2(high[CM_FD_LOG], 2) < 0) {
        return false;
    }
    for (int i = CM_FD_CONTROL; i < CM_LAUNCH_FDS; i++) {
        close(i);
        if (high[i] >= 0 && dup2(high[i], i) < 0) {
            return false;
        }
    }
    return syscall(SYS_close_range, CM_LAUNCH_FDS, ~0u, 0) == 0;
}

/* An ordinary user's role makes its namespaces itself, after its exec: cm_step_user_namespaces. */
static uint64_t namespaces(uint32_t layers)
{
    return (layers & CM_LAYER_BIT(CM_LAYER_USER_NS)) != 0 ? 0 : cm_step_namespaces(layers);
}

static void die(const char *why)
{
    dprintf(CM_FD_LOG, "{\"level\":\"error\",\"event\":\"launch_failed\",\"text\":\"%s\"}\n", why);
    _exit(127);
}

__attribute__((noreturn)) static void child_run(const struct cm_launch *launch)
{
    const struct rlimit none = {0, 0};
    char *const arguments[] = {(char *)launch->program, NULL};
    char *const environment[] = {NULL};
    uint32_t layers = launch->confinement.layers;
    for (size_t i = 0; i < CM_LAUNCH_JOINS; i++) {
        if (launch->join_fds[i] >= 0 && write(launch->join_fds[i], "0", 1) != 1) {
            _exit(125);
        }
    }
    setsid();
    umask(077);
    signals_default();
    if (layers != 0) {
        (void)syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL); /* none of our keys */
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!descriptors_place(launch->fds)) {
        _exit(127);
    }
    setrlimit(RLIMIT_CORE, &none);
    cm_image_exec(launch->image, arguments, environment);
    die("exec");
    _exit(127);
}

static pid_t clone_call(uint64_t flags, int cgroup_fd, int *ret_pidfd)
{
    struct clone_args args = {.flags = flags, .pidfd = (uintptr_t)ret_pidfd};
    args.flags |= CLONE_PIDFD;
    args.flags |= CLONE_PARENT;
    if (cgroup_fd >= 0) {
        args.flags |= (uint64_t)CLONE_INTO_CGROUP;
        args.cgroup = (uint32_t)cgroup_fd;
    }
    return (pid_t)syscall(SYS_clone3, &args, sizeof(args));
}

enum cm_status cm_launch(const struct cm_launch *launch, pid_t *ret_pid, int *ret_pidfd,
                         struct cm_error *err)
{
    int pidfd = -1;
    pid_t pid = clone_call(namespaces(launch->confinement.layers), launch->cgroup_fd, &pidfd);
    if (pid == 0) {
        child_run(launch);
    }
    if (pid < 0) {
        return cm_error_errno(err, errno, "CM-SUP-FORK", "cannot start %s", launch->program);
    }
    *ret_pid = pid;
    *ret_pidfd = pidfd;
    return CM_OK;
}

/* ------------------------------------------------------------------ what the host offers */

/* Try `layers` in a child of our own; what holds, and the errors of the rest, into *trial. */
static bool trial_run(uint32_t layers, uint32_t uid, struct cm_host *trial)
{
    struct clone_args args = {.flags = namespaces(layers), .exit_signal = SIGCHLD};
    int status = 0;
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof(args));
    if (pid == 0) {
        struct cm_confinement c = {.layers = layers,
                                   .landlock_abi = UINT32_MAX,
                                   .uid = uid,
                                   .files_max = 64,
                                   .file_bytes_max = 1u << 20,
                                   .memory_bytes_max = 1u << 30};
        int errors[CM_LAYER_COUNT];
        trial->available = cm_confine_apply(&c, errors);
        memcpy(trial->errors, errors, sizeof(errors));
        _exit(0);
    }
    int error_number = errno;
    if (pid < 0) {
        trial->errors[CM_LAYER_USER_NS] = error_number;
        return false;
    }
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void cm_host_probe(struct cm_host *ret_host)
{
    static const uint32_t spaces = CM_LAYER_BIT(CM_LAYER_PID_NS) | CM_LAYER_BIT(CM_LAYER_NET_NS) |
                                   CM_LAYER_BIT(CM_LAYER_OTHER_NS) | CM_LAYER_BIT(CM_LAYER_ROOT);
    const uint32_t users = CM_LAYER_BIT(CM_LAYER_USER_NS), own = CM_LAYER_BIT(CM_LAYER_IDENTITY);
    const uint32_t rest = CM_LAYERS_ALL & ~spaces & ~users & ~own & ~CM_LAYER_BIT(CM_LAYER_CGROUP) &
                          ~CM_LAYER_BIT(CM_LAYER_FILTER);
    struct cm_host *trial =
        mmap(NULL, sizeof(*trial), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset(ret_host, 0, sizeof(*ret_host));
    if (trial == MAP_FAILED) {
        return;
    }
    /* As root without a user namespace; else with one; else what needs no namespace. */
    bool root = geteuid() == 0;
    bool good = (root && trial_run(rest | spaces | own, CM_CONFINE_UID, trial)) ||
                trial_run((rest | spaces | users) & ~CM_LAYER_BIT(CM_LAYER_PID_NS), 0, trial) ||
                trial_run(rest, 0, trial);
    if (good) {
        *ret_host = *trial;
    }
    for (uint32_t i = CM_LAYER_PID_NS; i <= CM_LAYER_ROOT; i++) {
        bool missing = (ret_host->available & CM_LAYER_BIT(i)) == 0;
        ret_host->errors[i] = missing && ret_host->errors[i] == 0 ? EPERM : ret_host->errors[i];
    }
    if (syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &(uint32_t){SECCOMP_RET_KILL_PROCESS}) ==
        0) {
        ret_host->available |= CM_LAYER_BIT(CM_LAYER_FILTER);
    } else {
        ret_host->errors[CM_LAYER_FILTER] = errno;
    }
    if (cm_confine_sanitized()) {
        ret_host->available &= ~(CM_LAYER_BIT(CM_LAYER_FILTER) | CM_LAYER_BIT(CM_LAYER_MDWE));
        ret_host->errors[CM_LAYER_FILTER] = ENOTSUP;
    }
    ret_host->landlock_abi = cm_landlock_abi();
    munmap(trial, sizeof(*trial));
}
