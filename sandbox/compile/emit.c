/* From a policy to classic BPF (seccomp(2), Linux Documentation/userspace-api/seccomp_filter.rst).
 *
 * One comparison of the number for each call, in the policy's order; conditions follow their call.
 * Every jump but those over one call's block is a few instructions long. */
#include <linux/audit.h>
#include <stddef.h>
#include <string.h>

#include "sandbox/compile/policy.h"

#define X32_BIT   0x40000000u
#define AT(field) ((uint32_t)offsetof(struct seccomp_data, field))

struct emitter {
    struct sock_filter *code;
    uint32_t count;
    bool full;
};

static void put(struct emitter *out, uint16_t code, uint8_t jt, uint8_t jf, uint32_t k)
{
    if (out->count == BPF_MAXINSNS) {
        out->full = true;
        return;
    }
    out->code[out->count++] = (struct sock_filter){code, jt, jf, k};
}

static void put_return(struct emitter *out, uint32_t action)
{
    put(out, BPF_RET | BPF_K, 0, 0, action);
}

/* One half of an argument; failing it jumps `away` instructions past this half's own. */
static void put_half(struct emitter *out, uint32_t offset, uint32_t mask, uint32_t value,
                     uint8_t away)
{
    put(out, BPF_LD | BPF_W | BPF_ABS, 0, 0, offset);
    if (mask != UINT32_MAX) {
        put(out, BPF_ALU | BPF_AND | BPF_K, 0, 0, mask);
    }
    put(out, BPF_JMP | BPF_JEQ | BPF_K, 0, away, value);
}

static uint32_t half_lines(uint32_t mask)
{
    return mask == 0 ? 0 : (mask == UINT32_MAX ? 2 : 3);
}

static uint32_t condition_lines(const struct policy_condition *condition)
{
    return half_lines((uint32_t)condition->mask) + half_lines((uint32_t)(condition->mask >> 32));
}

/* All conditions, then the action; a failed one falls to what follows the action. */
static void put_rule(struct emitter *out, const struct policy_rule *rule)
{
    uint32_t left = 1;
    for (uint32_t i = 0; i < rule->condition_count; i++) {
        left += condition_lines(&rule->conditions[i]);
    }
    for (uint32_t i = 0; i < rule->condition_count; i++) {
        const struct policy_condition *condition = &rule->conditions[i];
        const uint32_t offset = AT(args) + 8 * condition->argument;
        const uint32_t masks[2] = {(uint32_t)condition->mask, (uint32_t)(condition->mask >> 32)};
        const uint32_t values[2] = {(uint32_t)condition->value, (uint32_t)(condition->value >> 32)};
        for (uint32_t half = 0; half < 2; half++) { /* little-endian: low half first */
            if (masks[half] != 0) {
                left -= half_lines(masks[half]);
                put_half(out, offset + 4 * half, masks[half], values[half], (uint8_t)left);
            }
        }
    }
    put_return(out, rule->error_number == 0 ? SECCOMP_RET_ALLOW
                                            : SECCOMP_RET_ERRNO | rule->error_number);
}

static bool is_first(const struct policy *policy, uint32_t index)
{
    for (uint32_t i = 0; i < index; i++) {
        if (policy->rules[i].number == policy->rules[index].number) {
            return false;
        }
    }
    return true;
}

/* Everything about one call: `jeq number` over a block of its alternatives. */
static bool put_call(struct emitter *out, const struct policy *policy, uint32_t first)
{
    uint32_t head = out->count;
    bool always = false;
    put(out, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, (uint32_t)policy->rules[first].number);
    for (uint32_t i = first; i < policy->count && !always; i++) {
        if (policy->rules[i].number == policy->rules[first].number) {
            put_rule(out, &policy->rules[i]);
            always = policy->rules[i].condition_count == 0;
        }
    }
    if (!always) {
        put_return(out, SECCOMP_RET_KILL_PROCESS);
    }
    uint32_t over = out->count - head - 1;
    if (over > UINT8_MAX) {
        return false;
    }
    if (!out->full) {
        out->code[head].jf = (uint8_t)over;
    }
    return true;
}

enum cm_status policy_emit(const struct policy *policy,
                           struct sock_filter ret_code[static BPF_MAXINSNS], uint32_t *ret_count,
                           struct cm_error *err)
{
    struct emitter out = {.code = ret_code};
    bool fits = true;
    put(&out, BPF_LD | BPF_W | BPF_ABS, 0, 0, AT(arch));
    put(&out, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, AUDIT_ARCH_X86_64);
    put_return(&out, SECCOMP_RET_KILL_PROCESS);
    put(&out, BPF_LD | BPF_W | BPF_ABS, 0, 0, AT(nr));
    put(&out, BPF_JMP | BPF_JGE | BPF_K, 0, 1, X32_BIT);
    put_return(&out, SECCOMP_RET_KILL_PROCESS);
    for (uint32_t i = 0; fits && i < policy->count; i++) {
        fits = !is_first(policy, i) || put_call(&out, policy, i);
    }
    put_return(&out, SECCOMP_RET_KILL_PROCESS);
    if (!fits || out.full) {
        return cm_error_set(err, CM_E_CONFIG, "CM-SANDBOX-POLICY", "%s: the filter is too large",
                            policy->name);
    }
    *ret_count = out.count;
    return CM_OK;
}
