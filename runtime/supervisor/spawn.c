/* The launcher: a process beside the supervisor that starts the roles for it.
 *
 * Starting a role takes rights and system calls that a supervisor should not keep, and a filter is
 * inherited by every child. So, once everything is open, the supervisor forks the launcher, which
 * keeps the sealed images and the groups and nothing else, and then confines itself. A request
 * names a role and brings its descriptors; the role becomes the supervisor's own child
 * (CLONE_PARENT). */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/base/sealed.h"
#include "runtime/supervisor/supervisor_internal.h"
#include "sandbox/steps.h"

#define FDS_MOST        4096 /* closed one by one in the launcher */
#define GROUPS_WAIT_MS  2000 /* for the last role's end, before its group is removed */
#define REQUEST_WAIT_MS 10000

struct request {
    uint32_t ring_bytes; /* not 0: make a pair of rings of this size, and nothing else */
    uint32_t child;      /* enum child_index */
    uint32_t fds;        /* bits by number: these follow, in order */
    struct cm_confinement confinement;
};

struct answer {
    int32_t pid;     /* 0: error is set, or it was about rings */
    uint32_t status; /* enum cm_status */
    struct cm_error error;
};

enum spawned_fd { SPAWNED_PIDFD, SPAWNED_CONTROL, SPAWNED_LOG, SPAWNED_FDS };
#define RING_SET_FDS (sizeof(struct ring_set) / sizeof(int))

/* ------------------------------------------------------------------ one packet with descriptors */

static bool packet_send(int fd, const void *bytes, size_t size, const int *fds, size_t count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * CM_FD_COUNT)];
    } control = {.bytes = {0}};
    struct iovec part = {(void *)bytes, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int) * count);
        memcpy(CMSG_DATA(rights), fds, sizeof(int) * count);
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)size;
}

/* Number of descriptors, or -1: closed, or not of this size. */
static int packet_receive(int fd, void *bytes, size_t size, int ret_fds[static CM_FD_COUNT])
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * CM_FD_COUNT)];
    } control;
    struct iovec part = {bytes, size};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    ssize_t got;
    do {
        got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    struct cmsghdr *rights = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    int count = rights != NULL ? (int)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
    if (count > 0) {
        memcpy(ret_fds, CMSG_DATA(rights), sizeof(int) * (size_t)count);
    }
    return got == (ssize_t)size && (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0 ? count : -1;
}

/* ------------------------------------------------------------------ in the launcher */

/* Only what a role is made of, the groups and our socket stay open. */
static void launcher_keep(const struct service *service, int own)
{
    for (int fd = 3; fd < FDS_MOST; fd++) {
        bool keep = fd == own;
        for (uint32_t i = 0; i < service->store.count && !keep; i++) {
            keep = service->store.files[i].fd == fd;
        }
        for (uint32_t i = 0; i < service->groups.count && !keep; i++) {
            const struct cm_cgroup *group = &service->groups.groups[i];
            keep = fd == group->born_fd || fd == group->join_fds[0] || fd == group->join_fds[1] ||
                   fd == group->join_fds[2];
        }
        if (!keep) {
            close(fd);
        }
    }
    (void)syscall(SYS_close_range, FDS_MOST, ~0u, 0);
}

/* The role's channel and log; [1] of each pair is the role's. It must never wait for its log: the
 * pipe drops what does not fit. */
static bool channels_make(int ret_control[2], int ret_log[2])
{
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ret_control) != 0) {
        return false;
    }
    if (pipe2(ret_log, O_CLOEXEC | O_NONBLOCK) != 0) {
        close(ret_control[0]);
        close(ret_control[1]);
        return false;
    }
    return true;
}

static enum cm_status launch(const struct service *service, const struct request *request,
                             const int *fds, pid_t *ret_pid, int ret_fds[SPAWNED_FDS],
                             struct cm_error *err)
{
    int control[2], log[2];
    int all[CM_LAUNCH_FDS];
    const struct child *child = &service->children[request->child];
    const struct cm_cgroup *group = &service->groups.groups[request->child];
    bool grouped = (request->confinement.layers & CM_LAYER_BIT(CM_LAYER_CGROUP)) != 0;
    if (!channels_make(control, log)) {
        return cm_error_errno(err, errno, "CM-SUP-CHANNEL", "cannot open channels for %s",
                              child->name);
    }
    memset(all, 0xff, sizeof(all)); /* -1 each */
    for (int number = 0, next = 0; number < CM_FD_COUNT; number++) {
        all[number] = (request->fds >> number & 1) != 0 ? fds[next++] : -1;
    }
    all[CM_FD_CONTROL] = control[1];
    all[CM_FD_LOG] = log[1];
    (void)cm_image_fds(&service->store, &child->image, all + CM_IMAGE_FD_FIRST);
    int spec = cm_memfd_sealed("confinement", &request->confinement, sizeof(request->confinement));
    all[CM_CONFINEMENT_FD] = spec;
    struct cm_launch what = {.program = child->program,
                             .image = &child->image,
                             .fds = all,
                             .confinement = request->confinement,
                             .cgroup_fd = grouped ? group->born_fd : -1,
                             .join_fds = {-1, -1, -1}};
    if (grouped) {
        memcpy(what.join_fds, group->join_fds, sizeof(what.join_fds));
    }
    enum cm_status status =
        spec >= 0 ? cm_launch(&what, ret_pid, &ret_fds[SPAWNED_PIDFD], err)
                  : cm_error_errno(err, errno, "CM-SUP-FORK", "no memory to start %s", child->name);
    if (spec >= 0) {
        close(spec);
    }
    close(control[1]);
    close(log[1]);
    if (status != CM_OK) {
        close(control[0]);
        close(log[0]);
        return status;
    }
    ret_fds[SPAWNED_CONTROL] = control[0];
    ret_fds[SPAWNED_LOG] = log[0];
    return CM_OK;
}

static enum cm_status request_serve(const struct service *service, const struct request *request,
                                    const int *fds, int count, struct answer *answer,
                                    int ret_fds[static CM_FD_COUNT], size_t *ret_count)
{
    struct ring_set rings;
    enum cm_status status = CM_OK;
    pid_t pid = 0;
    if (request->ring_bytes != 0) {
        status = rings_make(request->ring_bytes, &rings, &answer->error);
        *ret_count = status == CM_OK ? RING_SET_FDS : 0;
        memcpy(ret_fds, &rings, *ret_count * sizeof(int));
    } else if (request->child < CHILD_COUNT && __builtin_popcount(request->fds) == count &&
               request->fds < 1u << CM_FD_COUNT) {
        status = launch(service, request, fds, &pid, ret_fds, &answer->error);
        *ret_count = status == CM_OK ? SPAWNED_FDS : 0;
    } else {
        status = cm_error_set(&answer->error, CM_E_BUG, "CM-SUP-FORK", "a malformed request");
    }
    answer->pid = (int32_t)pid;
    return status;
}

__attribute__((noreturn)) static void launcher_run(const struct service *service, int own)
{
    struct request request;
    int fds[CM_FD_COUNT], count;
    (void)prctl(PR_SET_NAME, "casemate-launch");
    launcher_keep(service, own);
    while ((count = packet_receive(own, &request, sizeof(request), fds)) >= 0) {
        struct answer answer = {.pid = 0};
        int made[CM_FD_COUNT];
        size_t made_count = 0;
        answer.status =
            (uint32_t)request_serve(service, &request, fds, count, &answer, made, &made_count);
        for (int i = 0; i < count; i++) {
            close(fds[i]);
        }
        bool sent = packet_send(own, &answer, sizeof(answer), made, made_count);
        for (size_t i = 0; i < made_count; i++) {
            close(made[i]);
        }
        if (!sent) {
            break;
        }
    }
    /* The supervisor is gone or done, and its children with it: their groups empty themselves. */
    for (int waited = 0; !cm_cgroups_remove(&service->groups) && waited < GROUPS_WAIT_MS;
         waited += 10) {
        usleep(10000);
    }
    _exit(0);
}

/* ------------------------------------------------------------------ in the supervisor */

enum cm_status launcher_open(struct service *service, struct cm_error *err)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
        return cm_error_errno(err, errno, "CM-SUP-FORK", "cannot make the launcher's channel");
    }
    pid_t pid = fork();
    if (pid == 0) {
        launcher_run(service, ends[1]);
    }
    int error_number = errno;
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        return cm_error_errno(err, error_number, "CM-SUP-FORK", "cannot start the launcher");
    }
    const struct timeval patience = {REQUEST_WAIT_MS / 1000, 0};
    (void)setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    service->launcher_fd = ends[0];
    service->launcher_pid = pid;
    return CM_OK;
}

void launcher_close(struct service *service)
{
    if (service->launcher_fd >= 0) {
        close(service->launcher_fd);
        (void)waitid(P_PID, (id_t)service->launcher_pid, &(siginfo_t){0}, WEXITED);
        service->launcher_fd = -1;
    }
}

/* Ask, and take exactly `expected` descriptors back. */
static enum cm_status ask(struct service *service, const struct request *request, const int *fds,
                          size_t count, const char *what, size_t expected, pid_t *ret_pid,
                          int ret_fds[static CM_FD_COUNT], struct cm_error *err)
{
    struct answer answer;
    if (!packet_send(service->launcher_fd, request, sizeof(*request), fds, count)) {
        return cm_error_errno(err, errno, "CM-SUP-FORK", "the launcher does not take %s", what);
    }
    int got = packet_receive(service->launcher_fd, &answer, sizeof(answer), ret_fds);
    if (got < 0) {
        return cm_error_errno(err, errno, "CM-SUP-FORK", "the launcher is gone: cannot start %s",
                              what);
    }
    if (answer.status != CM_OK || (size_t)got != expected) {
        cm_error_sanitise(&answer.error);
        *err = answer.error;
        return (enum cm_status)err->status;
    }
    *ret_pid = answer.pid;
    return CM_OK;
}

enum cm_status spawn(struct service *service, const struct child *child,
                     const int fds[static CM_FD_COUNT], struct spawned *ret_spawned,
                     struct cm_error *err)
{
    struct request request = {.child = (uint32_t)(child - service->children)};
    int sent[CM_FD_COUNT], received[CM_FD_COUNT];
    size_t count = 0;
    for (int number = CM_FD_INPUT; number < CM_FD_COUNT; number++) {
        if (fds[number] >= 0) {
            request.fds |= 1u << number;
            sent[count++] = fds[number];
        }
    }
    confinement_make(service, child, request.fds | 1u << CM_FD_CONTROL | 1u << CM_FD_LOG,
                     &request.confinement);
    enum cm_status status = ask(service, &request, sent, count, child->name, SPAWNED_FDS,
                                &ret_spawned->pid, received, err);
    if (status == CM_OK) {
        ret_spawned->pidfd = received[SPAWNED_PIDFD];
        ret_spawned->control_fd = received[SPAWNED_CONTROL];
        ret_spawned->log_fd = received[SPAWNED_LOG];
    }
    return status;
}

enum cm_status rings_ask(struct service *service, uint32_t capacity, struct ring_set *ret_rings,
                         struct cm_error *err)
{
    const struct request request = {.ring_bytes = capacity};
    int received[CM_FD_COUNT];
    pid_t none;
    enum cm_status status =
        ask(service, &request, NULL, 0, "rings", RING_SET_FDS, &none, received, err);
    if (status == CM_OK) {
        memcpy(ret_rings, received, sizeof(*ret_rings));
    }
    return status;
}
