/* What holds for a running process, read from /proc from outside. */
#ifndef CASEMATE_SANDBOX_REPORT_H
#define CASEMATE_SANDBOX_REPORT_H

#include <stdbool.h>
#include <sys/types.h>

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

#endif
