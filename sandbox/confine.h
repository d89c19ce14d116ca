/* Confinement of a role, from the inside: the steps that follow its exec.
 *
 * The launcher puts struct cm_confinement, sealed, at CM_CONFINEMENT_FD. A role's main calls
 * cm_confine_begin first of all, and cm_confine_serve when it is ready; between the two it starts
 * under its start filter. Order and reasons: sandbox/README.md. */
#ifndef CASEMATE_SANDBOX_CONFINE_H
#define CASEMATE_SANDBOX_CONFINE_H

#include <stdbool.h>

#include "runtime/base/frame.h"
#include "sandbox/filter.h"
#include "sandbox/layers.h"

#define CM_CONFINEMENT_FD 31 /* below the image's descriptors */
#define CM_CONFINE_UID                                                                             \
    1900000000u /* first of the roles' user ids: a range that nobody hands out                     \
                 */

struct cm_confinement {
    uint32_t layers;       /* bits to apply; one that then fails ends the role */
    uint32_t landlock_abi; /* use no more than this; 0: none */
    uint32_t role;         /* enum cm_role */
    uint32_t uid;          /* with IDENTITY: user and group to become */
    uint32_t descriptors;  /* bits of enum cm_fd that are there */
    uint64_t files_max, file_bytes_max, memory_bytes_max; /* RLIMIT_NOFILE, _FSIZE, _AS or _DATA */
    uint32_t memory_data; /* 1: RLIMIT_DATA instead of _AS (a device may reserve addresses), and
                           * locked memory without bound where that is ours to give */
    uint32_t filter_start, filter_serve; /* enum cm_filter_id */
    uint32_t probed; /* filled by cm_confine_begin: what only the role itself can tell */
};

/* Apply everything of `wanted` that precedes the filter, as far as it goes: bits that hold now, and
 * in ret_errors the errno of each that does not. Trial runs call it too. */
uint32_t cm_confine_apply(const struct cm_confinement *wanted, int ret_errors[CM_LAYER_COUNT]);

/* The whole start of a role: take the confinement, close the image's descriptors, take the name,
 * apply, let a canary die by each filter, install the start filter. Fails: SANDBOX. */
CM_MUST_USE enum cm_status
cm_confine_begin(const char *name, struct cm_confinement *ret_confinement, struct cm_error *err);
/* For whoever starts a role by hand (enrolment, tests): put a confinement of nothing at
 * CM_CONFINEMENT_FD, before the exec. */
CM_MUST_USE bool cm_confinement_none_place(void);
/* From now on the serving filter. */
CM_MUST_USE enum cm_status cm_confine_serve(const struct cm_confinement *confinement,
                                            struct cm_error *err);

/* A build with sanitizers needs more calls and addresses than any policy permits. */
bool cm_confine_sanitized(void);

#endif
