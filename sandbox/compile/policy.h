/* A policy text: which system calls a role may make, and why. Build time and tests only.
 *
 * One rule a line:   call [condition {, condition}] [-> ERRNO] : reason
 * condition:         aN == VALUE   or   aN & MASK == VALUE     (N: 0 to 5; all 64 bits count)
 * VALUE, MASK:       decimal, 0x…, a name of the table in policy.c, or names joined by |
 *
 * Several lines of one call are alternatives, tried in order. What no rule allows kills the
 * process; so does every other architecture and x32. Ordered comparisons are left out on purpose:
 * libseccomp, our rival in the tests, gets them wrong. */
#ifndef CASEMATE_SANDBOX_COMPILE_POLICY_H
#define CASEMATE_SANDBOX_COMPILE_POLICY_H

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stdint.h>

#include "runtime/base/error.h"

#define POLICY_RULES_MAX      160
#define POLICY_CONDITIONS_MAX 4
#define POLICY_REASON_BYTES   160
#define POLICY_NAME_BYTES     32

struct policy_condition {
    uint32_t argument;
    uint64_t mask, value;
};

struct policy_rule {
    char name[POLICY_NAME_BYTES];
    int number; /* of x86-64 */
    uint32_t condition_count;
    struct policy_condition conditions[POLICY_CONDITIONS_MAX];
    uint32_t error_number; /* 0: allow */
    char reason[POLICY_REASON_BYTES];
    char condition_text[POLICY_REASON_BYTES]; /* as written, for the documentation */
};

struct policy {
    char name[POLICY_NAME_BYTES];
    uint32_t count;
    struct policy_rule rules[POLICY_RULES_MAX];
};

/* `name` stands in errors. Fails: CONFIG with the line. */
CM_MUST_USE enum cm_status policy_parse(const char *name, const char *text,
                                        struct policy *ret_policy, struct cm_error *err);
/* The same from a file; a line `include NAME` stands for the rules of NAME.policy beside it. A
 * fault ends the process with its place: this runs at build time and in tests. */
void policy_load(const char *path, struct policy *ret_policy);
/* What the text says of one call: SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | n or _KILL_PROCESS. The
 * reference that filters are held against: it shares no code with the emitter. */
uint32_t policy_decide(const struct policy *policy, const struct seccomp_data *data);
/* Distinct calls that some rule allows. */
uint32_t policy_calls(const struct policy *policy);
/* The filter. Fails: CONFIG (too large). */
CM_MUST_USE enum cm_status policy_emit(const struct policy *policy,
                                       struct sock_filter ret_code[static BPF_MAXINSNS],
                                       uint32_t *ret_count, struct cm_error *err);
/* Name of a call, NULL if there is none. */
const char *policy_call_name(int number);

#endif
