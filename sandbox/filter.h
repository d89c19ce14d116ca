/* The compiled filters: one for each role and stage, from policies/seccomp by sandbox/compile.
 *
 * A start filter holds from the moment the role is confined; the serving filter is added when it
 * is ready, and narrows: the kernel runs both, and the stricter verdict counts. */
#ifndef CASEMATE_SANDBOX_FILTER_H
#define CASEMATE_SANDBOX_FILTER_H

#include <stddef.h>

#include "runtime/base/error.h"
#include "sandbox/bpf.h"

enum cm_filter_id { /* the order of sandbox/CMakeLists.txt */
                    CM_FILTER_SUPERVISOR,
                    CM_FILTER_GATEWAY_START,
                    CM_FILTER_GATEWAY,
                    CM_FILTER_KEEPER_START,
                    CM_FILTER_KEEPER,
                    CM_FILTER_WORKER_LOAD,
                    CM_FILTER_WORKER_SERVE,
                    CM_FILTER_DEVTPM_START,
                    CM_FILTER_DEVTPM,
                    CM_FILTER_COUNT
};

struct cm_filter {
    const char *name; /* the policy's */
    struct cm_bpf program;
};
extern const struct cm_filter cm_filters[CM_FILTER_COUNT];

#define CM_CALL_NAMES 512
extern const char *const cm_call_names[CM_CALL_NAMES];
/* "openat", or "call 999". Never NULL; the text of an unknown one lives until the next call. */
const char *cm_call_name(uint32_t number);

/* Install a filter for every thread of this process. no_new_privs must be set. Fails: SANDBOX. */
CM_MUST_USE enum cm_status cm_filter_install(enum cm_filter_id id, struct cm_error *err);

/* All filters as one text of bytes, for the measurement: name '\0' u32 lines, then the lines.
 * Returns the bytes used; 0: it does not fit. */
#define CM_FILTERS_BYTES_MAX (64u << 10)
size_t cm_filters_encode(uint8_t *ret_bytes, size_t size);

#endif
