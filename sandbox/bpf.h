/* Classic BPF as seccomp uses it: run a filter, count what it lets through. For reports and tests;
 * the kernel has its own. Method: Linux Documentation/networking/filter.rst, seccomp(2). */
#ifndef CASEMATE_SANDBOX_BPF_H
#define CASEMATE_SANDBOX_BPF_H

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stdint.h>

struct cm_bpf {
    const struct sock_filter *code;
    uint32_t count;
};

/* The filter's verdict. An instruction that no filter of ours has, or a jump outside: kill. */
uint32_t cm_bpf_run(struct cm_bpf filter, const struct seccomp_data *data);

/* Can this call be allowed with any arguments? Both ways of every comparison of an argument are
 * followed; the architecture is ours. */
bool cm_bpf_may_allow(struct cm_bpf filter, uint32_t number);

#define CM_CALLS_MAX 1024u /* numbers that are looked at */

#endif
