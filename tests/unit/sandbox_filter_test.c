/* Every shipped filter against the text of its policy, and against libseccomp's filter of the same
 * text: all call numbers, three architectures, arguments at and around every constant. */
#include <criterion/criterion.h>
#include <linux/audit.h>
#include <linux/futex.h>
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/base/error.h"
#include "sandbox/compile/policy.h"
#include "sandbox/confine.h"
#include "sandbox/filter.h"
#include "tests/unit/random.h"

#define VALUES_MAX 400
#define NUMBERS    512

static struct policy policy;
static uint64_t values[VALUES_MAX];
static size_t value_count;

static void value_add(uint64_t value)
{
    for (size_t i = 0; i < value_count; i++) {
        if (values[i] == value) {
            return;
        }
    }
    cr_assert_lt(value_count, (size_t)VALUES_MAX);
    values[value_count++] = value;
}

/* Each constant of the policy, its neighbours, one bit more on either side, its upper half set. */
static void values_collect(void)
{
    static const uint64_t always[] = {
        0, 1, 2, 3, 4, 5, 7, 0x7fffffff, 0x80000000, UINT32_MAX, 1ull << 32, UINT64_MAX};
    value_count = 0;
    for (size_t i = 0; i < sizeof(always) / sizeof(always[0]); i++) {
        value_add(always[i]);
    }
    for (uint32_t i = 0; i < policy.count; i++) {
        for (uint32_t k = 0; k < policy.rules[i].condition_count; k++) {
            const struct policy_condition *condition = &policy.rules[i].conditions[k];
            value_add(condition->value);
            value_add(condition->value + 1);
            value_add(condition->value - 1);
            value_add(condition->value | 1ull << 32);
            value_add(condition->value ^ 1ull << 63);
            value_add(condition->mask);
            value_add(~condition->mask | condition->value);
        }
    }
}

static void path_of(size_t filter, char path[static 512])
{
    snprintf(path, 512, "%s/%s.policy", CASEMATE_POLICIES, cm_filters[filter].name);
}

/* libseccomp's filter of the same policy, read back from the pipe that it writes to. */
static struct cm_bpf rival_make(const struct policy *p)
{
    static struct sock_filter code[BPF_MAXINSNS];
    int ends[2];
    scmp_filter_ctx context = seccomp_init(SCMP_ACT_KILL_PROCESS);
    cr_assert_eq(pipe(ends), 0);
    cr_assert_eq(seccomp_attr_set(context, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS), 0);
    for (uint32_t i = 0; i < p->count; i++) {
        const struct policy_rule *rule = &p->rules[i];
        struct scmp_arg_cmp compare[POLICY_CONDITIONS_MAX];
        for (uint32_t k = 0; k < rule->condition_count; k++) {
            compare[k] = (struct scmp_arg_cmp){.arg = rule->conditions[k].argument,
                                               .op = SCMP_CMP_MASKED_EQ,
                                               .datum_a = rule->conditions[k].mask,
                                               .datum_b = rule->conditions[k].value};
        }
        uint32_t action =
            rule->error_number == 0 ? SCMP_ACT_ALLOW : SCMP_ACT_ERRNO(rule->error_number);
        cr_assert_eq(
            seccomp_rule_add_array(context, action, rule->number, rule->condition_count, compare),
            0, "%s", rule->name);
    }
    cr_assert_eq(seccomp_export_bpf(context, ends[1]), 0);
    close(ends[1]);
    ssize_t got = read(ends[0], code, sizeof(code));
    close(ends[0]);
    seccomp_release(context);
    cr_assert_gt(got, 0);
    return (struct cm_bpf){code, (uint32_t)((size_t)got / sizeof(code[0]))};
}

static uint64_t evaluations;

static void agree(struct cm_bpf ours, struct cm_bpf rival, const struct seccomp_data *data)
{
    uint32_t expected = policy_decide(&policy, data);
    evaluations++;
    cr_assert_eq(cm_bpf_run(ours, data), expected, "%s: call %d arch %x: text %x", policy.name,
                 data->nr, data->arch, expected);
    cr_assert_eq(cm_bpf_run(rival, data), expected, "libseccomp, %s: call %d", policy.name,
                 data->nr);
}

static void numbers_check(struct cm_bpf ours, struct cm_bpf rival)
{
    static const uint32_t arches[] = {AUDIT_ARCH_X86_64, AUDIT_ARCH_I386, AUDIT_ARCH_AARCH64};
    random_state = 1;
    for (size_t a = 0; a < 3; a++) {
        for (uint32_t number = 0; number < 2 * NUMBERS; number++) {
            /* the second half: the same numbers of x32 */
            struct seccomp_data data = {
                .nr = (int)(number % NUMBERS + (number >= NUMBERS ? 0x40000000u : 0)),
                .arch = arches[a]};
            for (uint32_t argument = 0; argument < 6; argument++) {
                for (size_t v = 0; v < value_count; v++) {
                    for (uint32_t i = 0; i < 6; i++) {
                        data.args[i] = values[below(value_count)];
                    }
                    data.args[argument] = values[v];
                    agree(ours, rival, &data);
                }
            }
        }
    }
}

Test(sandbox_filter, every_filter_says_what_its_policy_says_and_so_does_libseccomp, .timeout = 240)
{
    evaluations = 0;
    for (size_t i = 0; i < CM_FILTER_COUNT; i++) {
        char path[512];
        path_of(i, path);
        policy_load(path, &policy);
        values_collect();
        numbers_check(cm_filters[i].program, rival_make(&policy));
    }
    cr_assert_gt(evaluations, 1000000ull);
    fprintf(stderr, "%llu verdicts agree\n", (unsigned long long)evaluations);
}

Test(sandbox_filter, counting_from_the_filter_gives_the_calls_of_the_text)
{
    static const struct {
        enum cm_filter_id filter;
        uint32_t most;
    } goals[] = {{CM_FILTER_GATEWAY, 24}, {CM_FILTER_KEEPER, 12}, {CM_FILTER_WORKER_SERVE, 14}};
    for (size_t i = 0; i < CM_FILTER_COUNT; i++) {
        char path[512];
        uint32_t count = 0;
        path_of(i, path);
        policy_load(path, &policy);
        for (uint32_t number = 0; number < CM_CALLS_MAX; number++) {
            count += cm_bpf_may_allow(cm_filters[i].program, number);
        }
        cr_assert_eq(count, policy_calls(&policy), "%s", policy.name);
    }
    for (size_t i = 0; i < sizeof(goals) / sizeof(goals[0]); i++) {
        uint32_t count = 0;
        for (uint32_t number = 0; number < CM_CALLS_MAX; number++) {
            count += cm_bpf_may_allow(cm_filters[goals[i].filter].program, number);
        }
        cr_assert_leq(count, goals[i].most, "%s", cm_filters[goals[i].filter].name);
    }
}

Test(sandbox_filter, the_canary_s_call_is_in_no_policy)
{
    for (size_t i = 0; i < CM_FILTER_COUNT; i++) {
        cr_assert_not(cm_bpf_may_allow(cm_filters[i].program, SYS_getppid));
    }
}

/* A serving filter that allowed more than its start filter would be dead text. */
Test(sandbox_filter, a_serving_filter_only_narrows)
{
    static const enum cm_filter_id pairs[][2] = {{CM_FILTER_GATEWAY_START, CM_FILTER_GATEWAY},
                                                 {CM_FILTER_KEEPER_START, CM_FILTER_KEEPER},
                                                 {CM_FILTER_WORKER_LOAD, CM_FILTER_WORKER_SERVE},
                                                 {CM_FILTER_DEVTPM_START, CM_FILTER_DEVTPM}};
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) {
        for (uint32_t number = 0; number < CM_CALLS_MAX; number++) {
            if (cm_bpf_may_allow(cm_filters[pairs[i][1]].program, number)) {
                cr_assert(cm_bpf_may_allow(cm_filters[pairs[i][0]].program, number), "%s: %s",
                          cm_filters[pairs[i][1]].name, cm_call_name(number));
            }
        }
    }
}

/* The kernel's priority inheritance has been a way out of sandboxes before (CVE-2014-3153): the
 * worker's threads only wait and wake. */
Test(sandbox_filter, the_worker_s_futexes_only_wait_and_wake)
{
    const enum cm_filter_id filters[] = {CM_FILTER_WORKER_SERVE, CM_FILTER_WORKER_LOAD};
    const uint32_t wait = FUTEX_WAIT_BITSET & FUTEX_CMD_MASK;
    for (size_t i = 0; i < 2; i++) {
        for (uint32_t op = 0; op < 1024; op++) {
            const struct seccomp_data data = {
                .nr = SYS_futex, .arch = AUDIT_ARCH_X86_64, .args = {0, op}};
            uint32_t command = op & (uint32_t)FUTEX_CMD_MASK;
            bool allowed = cm_bpf_run(cm_filters[filters[i]].program, &data) == SECCOMP_RET_ALLOW;
            bool harmless = command == FUTEX_WAIT || command == FUTEX_WAKE || command == wait;
            cr_assert(!allowed || harmless, "%s: operation %u", cm_filters[filters[i]].name, op);
            cr_assert(allowed || (op != FUTEX_WAIT_PRIVATE && op != FUTEX_WAKE_PRIVATE));
        }
    }
}

Test(sandbox_filter, policies_that_are_wrong_are_refused_with_their_line)
{
    static const struct {
        const char *text, *part;
    } rows[] = {
        {"read : x\nopenfile : y\n", ":2: no such system call"},
        {"read\n", ":1: a rule ends with"},
        {"read : \n", ":1: a rule ends with"},
        {"mmap a2 < 4 : x\n", ":1: a condition is"},
        {"mmap a6 == 4 : x\n", ":1: a condition is"},
        {"mmap a2 == PROT_NOTHING : x\n", ":1: a condition is"},
        {"mmap a2 & 4 == 8 : x\n", ":1: a condition is"},
        {"openat -> 0 : x\n", ":1: an errno follows"},
        {"openat -> 5000 : x\n", ":1: an errno follows"},
    };
    struct cm_error err;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        cr_assert_eq(policy_parse("p", rows[i].text, &policy, &err), CM_E_CONFIG, "%zu", i);
        cr_assert(strstr(err.text, rows[i].part) != NULL, "%s", err.text);
    }
    cr_assert_eq(
        policy_parse("p", "# c\n\nread a0 == 3, a1 & 0xf == 2 -> EPERM : why\n", &policy, &err),
        CM_OK);
    cr_assert_eq(policy.rules[0].condition_count, 2u);
}

/* A filter with one wrong jump must be found: the proof can fail. */
Test(sandbox_filter, a_wrong_filter_is_found)
{
    static struct sock_filter code[BPF_MAXINSNS];
    char path[512];
    uint32_t differ = 0;
    const struct cm_bpf filter = cm_filters[CM_FILTER_GATEWAY].program;
    path_of(CM_FILTER_GATEWAY, path);
    policy_load(path, &policy);
    values_collect();
    for (uint32_t line = 0; line < filter.count; line++) {
        bool found = false;
        memcpy(code, filter.code, filter.count * sizeof(code[0]));
        if (BPF_CLASS(code[line].code) != BPF_JMP) {
            continue;
        }
        uint8_t jt = code[line].jt;
        code[line].jt = code[line].jf;
        code[line].jf = jt;
        for (uint32_t number = 0; number < NUMBERS && !found; number++) {
            for (size_t v = 0; v < value_count && !found; v++) {
                const uint64_t same = values[v];
                struct seccomp_data data = {.nr = (int)number,
                                            .arch = AUDIT_ARCH_X86_64,
                                            .args = {same, same, same, same, same, same}};
                found = cm_bpf_run((struct cm_bpf){code, filter.count}, &data) !=
                        policy_decide(&policy, &data);
            }
        }
        differ += found;
        cr_assert(found, "line %u", line);
    }
    cr_assert_gt(differ, 20u);
}

Test(sandbox_filter, a_bug_is_named_before_a_role_ends)
{
    if (cm_confine_sanitized()) {
        cr_skip_test("AddressSanitizer calls sigaltstack before a call that does not return");
    }
    for (size_t i = 0; i < CM_FILTER_COUNT; i++) {
        char text[256] = "";
        int ends[2], status = 0;
        cr_assert_eq(pipe(ends), 0);
        pid_t child = fork();
        if (child == 0) {
            if (dup2(ends[1], STDERR_FILENO) >= 0 &&
                cm_filter_install((enum cm_filter_id)i, NULL) == CM_OK) {
                cm_assert_failed("two == 3", "file.c", 7);
            }
            _exit(1);
        }
        close(ends[1]);
        cr_assert_eq(waitpid(child, &status, 0), child);
        cr_expect_gt(read(ends[0], text, sizeof(text) - 1), 0);
        close(ends[0]);
        cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 70, "%s: status 0x%x",
                  cm_filters[i].name, (unsigned)status);
        cr_expect(strstr(text, "two == 3 at file.c:7") != NULL, "%s", cm_filters[i].name);
    }
}
