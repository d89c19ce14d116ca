/* Control groups of the roles: memory, swap and processes, on version 1, 2 or both.
 *
 * One folder for the service, one group in it for each role. Version 2 is used for its controllers
 * where it has them, and for placement otherwise; version 1 hierarchies give what it has not. What
 * cannot be had is told, never guessed. Method: Linux Documentation/admin-guide/cgroup-v2.rst and
 * cgroup-v1/memory.rst. */
#ifndef CASEMATE_SANDBOX_CGROUP_H
#define CASEMATE_SANDBOX_CGROUP_H

#include <stdbool.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "sandbox/launch.h"

#define CM_CGROUP_PATH_BYTES  512
#define CM_CGROUP_GROUPS      4
#define CM_CGROUP_HIERARCHIES 3 /* version 2, memory, pids */

struct cm_cgroup_limits {
    const char *name; /* of the role's group */
    uint64_t memory_bytes;
    uint32_t processes;
};

struct cm_cgroup {
    int born_fd;                   /* version 2 folder, or -1 */
    int join_fds[CM_LAUNCH_JOINS]; /* cgroup.procs of version 1, or -1 */
    int oom_fd;                    /* where the kernel counts its kills, or -1 */
    bool memory, processes, swap;  /* bounded by the kernel */
};

struct cm_cgroups {
    uint32_t count;
    struct cm_cgroup groups[CM_CGROUP_GROUPS];
    /* folders that were made, to be removed: the service's, then the roles' */
    char folders[CM_CGROUP_HIERARCHIES][CM_CGROUP_PATH_BYTES]; /* "": not used */
    char names[CM_CGROUP_GROUPS][32];
    char lacks[160]; /* what could not be had, as text; "": nothing */
};

/* Make the groups, as far as this machine lets us. */
void cm_cgroups_make(const struct cm_cgroup_limits *limits, uint32_t count,
                     struct cm_cgroups *ret_groups);
/* The least memory that the groups above us, of either version, or the machine itself allow. Before
 * cm_cgroups_make, which moves us. */
uint64_t cm_cgroup_memory_limit(void);
/* The least number in `file` of `folder` and of each folder above it; UINT64_MAX: none. For tests.
 */
uint64_t cm_cgroup_least(const char *folder, const char *file);
/* Whole CPUs that the quotas of the groups above us, of either version, allow, at least 1; 0: no
 * quota. Rounded down: a thread too many runs into the quota and stalls everybody for the rest of
 * the period. */
uint32_t cm_cgroup_cpus(void);
/* The same of `folder` and of each folder above it. For tests. */
uint32_t cm_cgroup_least_cpus(const char *folder);
/* How many processes of this group the kernel has killed for memory; 0 where it cannot be told. */
uint64_t cm_cgroup_oom_kills(const struct cm_cgroup *group);
/* Remove the folders; they must be empty. False: not yet. */
bool cm_cgroups_remove(const struct cm_cgroups *groups);
void cm_cgroups_close(struct cm_cgroups *groups);

#endif
