/* The interpreter. */
#include "sandbox/bpf.h"

#include <linux/audit.h>
#include <stddef.h>
#include <string.h>

/* One word of seccomp_data; false: outside of it, or not at a word. */
static bool word_load(const struct seccomp_data *data, uint32_t offset, uint32_t *ret_word)
{
    if (offset % 4 != 0 || offset > sizeof(*data) - 4) {
        return false;
    }
    memcpy(ret_word, (const uint8_t *)data + offset, 4);
    return true;
}

static bool jump_taken(uint16_t code, uint32_t left, uint32_t right)
{
    switch (BPF_OP(code)) {
    case BPF_JEQ:
        return left == right;
    case BPF_JGT:
        return left > right;
    case BPF_JGE:
        return left >= right;
    default: /* BPF_JSET */
        return (left & right) != 0;
    }
}

static bool jump_known(uint16_t code)
{
    uint16_t op = BPF_OP(code);
    return BPF_CLASS(code) == BPF_JMP && BPF_SRC(code) == BPF_K &&
           (op == BPF_JEQ || op == BPF_JGT || op == BPF_JGE || op == BPF_JSET);
}

uint32_t cm_bpf_run(struct cm_bpf filter, const struct seccomp_data *data)
{
    uint32_t accumulator = 0;
    for (uint64_t at = 0; at < filter.count;) {
        const struct sock_filter *line = &filter.code[at++];
        if (line->code == (BPF_LD | BPF_W | BPF_ABS)) {
            if (!word_load(data, line->k, &accumulator)) {
                return SECCOMP_RET_KILL_PROCESS;
            }
        } else if (line->code == (BPF_ALU | BPF_AND | BPF_K)) {
            accumulator &= line->k;
        } else if (line->code == (BPF_JMP | BPF_JA)) {
            at += line->k;
        } else if (jump_known(line->code)) {
            at += jump_taken(line->code, accumulator, line->k) ? line->jt : line->jf;
        } else if (line->code == (BPF_RET | BPF_K)) {
            return line->k;
        } else {
            break;
        }
    }
    return SECCOMP_RET_KILL_PROCESS;
}

struct state {
    uint32_t at;
    bool known; /* the accumulator holds number or architecture, not an argument */
    uint32_t accumulator;
};

/* One step; returns the number of states that follow (0: the way has ended). */
static uint32_t step(struct cm_bpf filter, const struct seccomp_data *data, struct state state,
                     struct state ret_next[static 2], bool *allowed)
{
    const struct sock_filter *line = &filter.code[state.at++];
    ret_next[0] = ret_next[1] = state;
    if (line->code == (BPF_LD | BPF_W | BPF_ABS)) {
        ret_next[0].known = line->k < offsetof(struct seccomp_data, instruction_pointer);
        return word_load(data, line->k, &ret_next[0].accumulator);
    }
    if (line->code == (BPF_ALU | BPF_AND | BPF_K)) {
        ret_next[0].accumulator &= line->k;
        return 1;
    }
    if (line->code == (BPF_JMP | BPF_JA)) {
        ret_next[0].at += line->k;
        return 1;
    }
    if (jump_known(line->code)) {
        bool taken = jump_taken(line->code, state.accumulator, line->k);
        ret_next[0].at += state.known && !taken ? line->jf : line->jt;
        ret_next[1].at += line->jf;
        return state.known ? 1 : 2;
    }
    *allowed = *allowed || (line->code == (BPF_RET | BPF_K) &&
                            (line->k & SECCOMP_RET_ACTION_FULL) == SECCOMP_RET_ALLOW);
    return 0;
}

bool cm_bpf_may_allow(struct cm_bpf filter, uint32_t number)
{
    /* Jumps go forward only: an instruction is worth one visit for each kind of accumulator. */
    static struct state waiting[2 * BPF_MAXINSNS];
    static uint8_t seen[BPF_MAXINSNS];
    struct seccomp_data data = {.nr = (int)number, .arch = AUDIT_ARCH_X86_64};
    uint32_t count = 1;
    bool allowed = false;
    if (filter.count > BPF_MAXINSNS) {
        return true; /* no filter of the kernel's: nothing can be promised of it */
    }
    memset(seen, 0, filter.count);
    waiting[0] = (struct state){.at = 0};
    while (count > 0 && !allowed) {
        struct state next[2], state = waiting[--count];
        uint8_t bit = state.known ? 1 : 2;
        if (state.at >= filter.count || (seen[state.at] & bit) != 0) {
            continue;
        }
        seen[state.at] |= bit;
        uint32_t ways = step(filter, &data, state, next, &allowed);
        for (uint32_t i = 0; i < ways; i++) {
            waiting[count++] = next[i];
        }
    }
    return allowed;
}
