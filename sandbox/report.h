/* What holds for a running process, read from /proc from outside. */
#ifndef CASEMATE_SANDBOX_REPORT_H
#define CASEMATE_SANDBOX_REPORT_H

#include <stdbool.h>
#include <sys/types.h>

#include "sandbox/filter.h"
#include "sandbox/layers.h"

struct cm_observed {
    uint32_t layers;   /* that can be told from outside, and hold */
    uint32_t readable; /* layers that could be told at all */
    uint32_t filters;  /* seccomp filters that are installed */
    uint32_t uid;
    uint64_t core_bytes, file_bytes, files, memory_bytes; /* limits; UINT64_MAX: none */
};

/* `group`: last part of the control group that the process belongs into. */
void cm_observe(pid_t pid, const char *group, struct cm_observed *ret_observed);

/* The calls that all filters of a process together allow, read back from the kernel
 * (PTRACE_SECCOMP_GET_FILTER). The process is stopped for a moment. False: not permitted, which
 * takes CAP_SYS_ADMIN, or no filter is there. */
struct cm_call_set {
    uint32_t count;
    bool allowed[CM_CALLS_MAX];
};
bool cm_calls_read(pid_t pid, struct cm_call_set *ret_calls);

#endif
