/* Launching a role: from clone3 to the exec of its sealed image. Runs in the launcher, which has
 * one thread; the child is the supervisor's (CLONE_PARENT), which alone reaps it. */
#ifndef CASEMATE_SANDBOX_LAUNCH_H
#define CASEMATE_SANDBOX_LAUNCH_H

#include <sys/types.h>

#include "sandbox/confine.h"
#include "sandbox/image.h"

#define CM_LAUNCH_FDS   (CM_IMAGE_FD_FIRST + (int)CM_IMAGE_FILES_MAX)
#define CM_LAUNCH_JOINS 3

struct cm_launch {
    const char *program; /* name in process lists, argv[0] */
    const struct cm_image *image;
    const int *fds; /* [CM_LAUNCH_FDS] by number, -1: none; 3 and up become the child's */
    struct cm_confinement confinement;
    int cgroup_fd;                 /* version 2 group to be born in, or -1 */
    int join_fds[CM_LAUNCH_JOINS]; /* cgroup.procs of version 1 groups, or -1 */
};

/* Fails: SYSTEM, SANDBOX (namespaces that cannot be made). */
CM_MUST_USE enum cm_status cm_launch(const struct cm_launch *launch, pid_t *ret_pid, int *ret_pidfd,
                                     struct cm_error *err);

/* What this machine offers: a trial child confines itself and says how far it came. */
struct cm_host {
    uint32_t available; /* layers; FILTER and CGROUP as far as they can be told here */
    uint32_t landlock_abi;
    int32_t errors[CM_LAYER_COUNT]; /* why a layer is missing; 0: not applicable */
};
void cm_host_probe(struct cm_host *ret_host);

#endif
