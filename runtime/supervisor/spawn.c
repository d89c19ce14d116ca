/* One child: from fork to the exec of its program, with exact descriptors and an empty environment.
 *
 * The order is that of the design; steps that belong to the sandbox stand here as comments at their
 * place, so that they come in without moving anything. The supervisor has one thread, so the child
 * may use more than async-signal-safe functions; it still only makes system calls. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

#define HIGH_FD  128 /* above the table and any image */
#define FDS_MOST (CM_IMAGE_FD_FIRST + (int)CM_IMAGE_FILES_MAX)

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
static bool descriptors_place(const int fds[static FDS_MOST])
{
    int high[FDS_MOST];
    for (int i = CM_FD_CONTROL; i < FDS_MOST; i++) {
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
    for (int i = CM_FD_CONTROL; i < FDS_MOST; i++) {
        close(i);
        if (high[i] >= 0 && dup2(high[i], i) < 0) {
            return false;
        }
    }
    return syscall(SYS_close_range, FDS_MOST, ~0u, 0) == 0;
}

__attribute__((noreturn)) static void child_run(const char *program, const struct cm_image *image,
                                                const int fds[static FDS_MOST], pid_t parent)
{
    static const char lost[] = "{\"level\":\"error\",\"event\":\"exec_failed\"}\n";
    const struct rlimit none = {0, 0};
    char *const arguments[] = {(char *)program, NULL};
    char *const environment[] = {NULL};
    /* Here: own namespaces and the cgroup (clone3 instead of fork), and the wait for "go". */
    setsid();
    umask(077);
    signals_default();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(127); /* the supervisor died between fork and prctl */
    }
    if (!descriptors_place(fds)) {
        _exit(127);
    }
    /* Here: root file system, exact descriptor check. */
    setrlimit(RLIMIT_CORE, &none);
    /* Here: the other limits, capabilities, no new namespaces, no_new_privs, Landlock; the role
     * itself allocates its memory and sets the filter before it says READY. */
    cm_image_exec(image, arguments, environment);
    ssize_t written = write(CM_FD_LOG, lost, sizeof(lost) - 1);
    (void)written;
    _exit(127);
}

enum cm_status spawn(const struct cm_image_store *store, const struct cm_image *image,
                     const char *program, const int fds[static CM_FD_COUNT], pid_t *ret_pid,
                     int *ret_pidfd, struct cm_error *err)
{
    int all[FDS_MOST];
    memset(all, 0xff, sizeof(all)); /* -1 each */
    memcpy(all, fds, CM_FD_COUNT * sizeof(int));
    (void)cm_image_fds(store, image, all + CM_IMAGE_FD_FIRST);
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid == 0) {
        child_run(program, image, all, parent);
    }
    int error_number = errno;
    if (pid < 0) {
        return cm_error_errno(err, error_number, "CM-SUP-FORK", "cannot fork for %s", program);
    }
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0); /* close-on-exec by definition */
    if (pidfd < 0) {
        error_number = errno;
        kill(pid, SIGKILL);
        return cm_error_errno(err, error_number, "CM-SUP-FORK", "cannot watch %s", program);
    }
    *ret_pid = pid;
    *ret_pidfd = pidfd;
    return CM_OK;
}
