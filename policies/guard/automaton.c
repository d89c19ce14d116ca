/* Positions → deterministic automaton (Rabin and Scott, 1959), and the proof that it holds back a
 * bounded number of bytes. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policies/guard/rules_internal.h"

#define SLOTS 16384u /* of the table of known states: a power of two, above CM_GUARD_STATES_MAX */
#define START 1u

struct work {
    const struct cm_rule *rule;
    const struct positions *from;
    struct automaton *made;
    uint64_t *masks;   /* [columns][words] positions that take a column's bytes */
    uint64_t *members; /* [CM_GUARD_STATES_MAX][words] positions of a state */
    uint16_t slots[SLOTS];
};

static void *words_of(const struct positions *from, size_t count)
{
    return calloc(count * from->words, sizeof(uint64_t));
}

/* Bytes that no position tells apart share a column. */
static void columns_make(struct work *work)
{
    struct automaton *made = work->made;
    made->columns = 1;
    for (uint32_t p = 0; p < work->from->count; p++) {
        const uint8_t *set = work->from->sets[p];
        int16_t in[256], out[256]; /* a column's number on each side of the set */
        uint32_t columns = 0;
        if (p > 0 && memcmp(set, work->from->sets[p - 1], 32) == 0) {
            continue;
        }
        memset(in, 0xff, sizeof(in));
        memset(out, 0xff, sizeof(out));
        for (uint32_t byte = 0; byte < 256; byte++) {
            int16_t *side = (set[byte >> 3] >> (byte & 7) & 1) != 0 ? in : out;
            int16_t *number = &side[made->map[byte]];
            *number = *number >= 0 ? *number : (int16_t)columns++;
            made->map[byte] = (uint8_t)*number;
        }
        made->columns = columns;
    }
}

static void masks_make(struct work *work)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint64_t *mask = work->masks + (size_t)work->made->map[byte] * work->from->words;
        for (uint32_t p = 0; p < work->from->count; p++) {
            if ((work->from->sets[p][byte >> 3] >> (byte & 7) & 1) != 0) {
                mask[p / 64] |= 1ull << (p % 64);
            }
        }
    }
}

static bool meets(const uint64_t *a, const uint64_t *b, uint32_t words)
{
    uint64_t any = 0;
    for (uint32_t i = 0; i < words; i++) {
        any |= a[i] & b[i];
    }
    return any != 0;
}

/* The state of these positions, new if need be; 0 if there are none. UINT32_MAX: too many. */
static uint32_t state_of(struct work *work, uint64_t *positions)
{
    const uint32_t words = work->from->words;
    uint64_t hash = 0x9e3779b97f4a7c15u, any = 0;
    bool stop = meets(positions, work->from->stop, words);
    if (stop) { /* nothing longer counts: all such states are one */
        memcpy(positions, work->from->stop, words * sizeof(uint64_t));
    }
    for (uint32_t i = 0; i < words; i++) {
        any |= positions[i];
        hash = (hash ^ positions[i]) * 0xff51afd7ed558ccdu;
        hash ^= hash >> 32;
    }
    if (any == 0) {
        return 0;
    }
    uint32_t slot = (uint32_t)hash & (SLOTS - 1);
    for (; work->slots[slot] != 0; slot = (slot + 1) & (SLOTS - 1)) {
        const uint64_t *known = work->members + (size_t)work->slots[slot] * words;
        if (memcmp(known, positions, words * sizeof(uint64_t)) == 0) {
            return work->slots[slot];
        }
    }
    if (work->made->states == CM_GUARD_STATES_MAX) {
        return UINT32_MAX;
    }
    uint32_t state = work->made->states++;
    work->slots[slot] = (uint16_t)state;
    memcpy(work->members + (size_t)state * words, positions, words * sizeof(uint64_t));
    bool accept = meets(positions, work->from->accept, words);
    work->made->flags[state] =
        (uint8_t)((accept ? CM_GUARD_STATE_ACCEPT : 0) | (stop ? CM_GUARD_STATE_TERMINAL : 0));
    return state;
}

/* Fill a state's row: what may follow its positions, by column. */
static bool row_make(struct work *work, uint32_t state)
{
    const struct positions *from = work->from;
    uint64_t follow[WORDS_MAX] = {0}, next[WORDS_MAX];
    uint32_t ways = 0;
    const uint64_t *members = work->members + (size_t)state * from->words;
    if (state == START) {
        memcpy(follow, from->first, sizeof(follow));
    }
    for (uint32_t w = 0;
         w < from->words && (work->made->flags[state] & CM_GUARD_STATE_TERMINAL) == 0; w++) {
        for (uint64_t left = members[w]; left != 0; left &= left - 1) {
            uint32_t position = w * 64 + (uint32_t)__builtin_ctzll(left);
            for (uint32_t i = 0; i < from->words; i++) {
                follow[i] |= from->follow[(size_t)position * from->words + i];
            }
        }
    }
    for (uint32_t column = 0; column < work->made->columns; column++) {
        for (uint32_t i = 0; i < from->words; i++) {
            next[i] = follow[i] & work->masks[(size_t)column * from->words + i];
        }
        uint32_t to = state_of(work, next);
        if (to == UINT32_MAX) {
            return false;
        }
        work->made->next[(size_t)state * work->made->columns + column] = (uint16_t)to;
        ways += to != 0;
    }
    work->made->flags[state] |= ways == 0 ? CM_GUARD_STATE_TERMINAL : 0;
    return true;
}

/* ------------------------------------------------------------------ the proof */

/* Does reaching this state end all doubt about the bytes so far? Not where a right condition or a
 * check digit is still to be asked: there the whole match is held. */
static bool decides(const struct cm_rule *rule, const struct positions *from,
                    const struct automaton *a, uint32_t state)
{
    bool whole = from->has_right || rule->validator == CM_GUARD_VALID_LUHN ||
                 rule->validator == CM_GUARD_VALID_IBAN;
    return !whole && (a->flags[state] & CM_GUARD_STATE_ACCEPT) != 0;
}

/* Longest way through undecided states: what a candidate may hold. Kahn's order; a rest is a cycle.
 * False: unbounded. `counts`, `longest`, `queue`: scratch, [states] each. */
static bool hold_find(const struct cm_rule *rule, const struct positions *from, struct automaton *a,
                      uint32_t *counts, uint32_t *longest, uint32_t *queue)
{
    uint32_t head = 0, tail = 0, open = 0;
    memset(counts, 0, a->states * sizeof(*counts));
    memset(longest, 0, a->states * sizeof(*longest));
    for (uint32_t s = START; s < a->states; s++) {
        bool inner = s != START && !decides(rule, from, a, s);
        open += inner;
        for (uint32_t c = 0; inner && c < a->columns; c++) {
            counts[a->next[(size_t)s * a->columns + c]]++;
        }
    }
    for (uint32_t s = START; s < a->states; s++) {
        bool begins = s == START || decides(rule, from, a, s);
        for (uint32_t c = 0; begins && c < a->columns; c++) { /* one byte after what is decided */
            longest[a->next[(size_t)s * a->columns + c]] = 1;
        }
    }
    for (uint32_t s = START + 1; s < a->states; s++) {
        if (!decides(rule, from, a, s) && counts[s] == 0) {
            queue[tail++] = s;
        }
    }
    while (head < tail) {
        uint32_t s = queue[head++];
        a->hold_bytes = longest[s] > a->hold_bytes ? longest[s] : a->hold_bytes;
        for (uint32_t c = 0; c < a->columns; c++) {
            uint32_t to = a->next[(size_t)s * a->columns + c];
            if (to == 0 || decides(rule, from, a, to)) {
                continue;
            }
            longest[to] = longest[s] + 1 > longest[to] ? longest[s] + 1 : longest[to];
            queue[tail] = to;
            tail += --counts[to] == 0;
        }
    }
    a->hold_bytes += from->has_right ? 1 : 0; /* the byte that is looked at */
    return tail == open;
}

/* Fewest bytes of a span: breadth first. */
static void least_find(struct automaton *a, uint32_t *distance, uint32_t *queue)
{
    uint32_t head = 0, tail = 0;
    memset(distance, 0, a->states * sizeof(*distance));
    queue[tail++] = START;
    while (head < tail) {
        uint32_t s = queue[head++];
        if ((a->flags[s] & CM_GUARD_STATE_ACCEPT) != 0) {
            a->least_bytes = distance[s];
            return;
        }
        for (uint32_t c = 0; c < a->columns; c++) {
            uint32_t to = a->next[(size_t)s * a->columns + c];
            if (to != 0 && distance[to] == 0) {
                distance[to] = distance[s] + 1;
                queue[tail++] = to;
            }
        }
    }
}

static enum cm_status bounds_prove(const struct cm_rule *rule, const struct positions *from,
                                   struct automaton *a, struct cm_error *err)
{
    char text[240];
    uint32_t *scratch = calloc((size_t)a->states * 4, sizeof(*scratch));
    if (scratch == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rule '%s'", rule->id);
    }
    bool bounded = hold_find(rule, from, a, scratch, scratch + a->states, scratch + 2 * a->states);
    least_find(a, scratch, scratch + a->states);
    free(scratch);
    if (!bounded) {
        return rule_refuse(
            rule, "CM-RULES-HOLD",
            from->has_right || rule->validator != CM_GUARD_VALID_ALWAYS
                ? "it could hold text back without end: a condition on the right or a check digit "
                  "needs the whole match, so its repeats must be bounded"
                : "it could hold text back without end: bound its inner repeats with {n,m}; only "
                  "what follows a complete match may go on for ever",
            err);
    }
    if (a->hold_bytes > CM_GUARD_HOLD_MAX) {
        snprintf(text, sizeof(text), "it would hold back up to %u bytes; %u are allowed",
                 a->hold_bytes, CM_GUARD_HOLD_MAX);
        return rule_refuse(rule, "CM-RULES-HOLD", text, err);
    }
    return CM_OK;
}

static enum cm_status states_make(struct work *work, struct cm_error *err)
{
    char text[160];
    struct automaton *made = work->made;
    made->states = START + 1;
    for (uint32_t state = START; state < made->states; state++) {
        if (!row_make(work, state)) {
            snprintf(text, sizeof(text),
                     "its automaton has more than %u states (%u positions): shorten its repeats, "
                     "or make what follows them differ",
                     CM_GUARD_STATES_MAX, work->from->count);
            return rule_refuse(work->rule, "CM-RULES-STATES", text, err);
        }
    }
    return CM_OK;
}

enum cm_status automaton_make(const struct cm_rule *rule, const struct positions *positions,
                              struct automaton *ret, struct cm_error *err)
{
    struct work *work = calloc(1, sizeof(*work));
    enum cm_status status = CM_OK;
    memset(ret, 0, sizeof(*ret));
    if (work == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rule '%s'", rule->id);
    }
    work->rule = rule;
    work->from = positions;
    work->made = ret;
    columns_make(work);
    ret->next = calloc((size_t)CM_GUARD_STATES_MAX * ret->columns, sizeof(*ret->next));
    ret->flags = calloc(CM_GUARD_STATES_MAX, 1);
    work->masks = words_of(positions, ret->columns);
    work->members = words_of(positions, CM_GUARD_STATES_MAX);
    if (ret->next == NULL || ret->flags == NULL || work->masks == NULL || work->members == NULL) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rule '%s'", rule->id);
        goto out;
    }
    masks_make(work);
    status = states_make(work, err);
    if (status == CM_OK) {
        status = bounds_prove(rule, positions, ret, err);
    }
    if (status == CM_OK) {
        size_t bytes = (size_t)ret->states * ret->columns * sizeof(*ret->next);
        void *less = realloc(ret->next, bytes);
        ret->next = less != NULL ? less : ret->next;
    }
out:
    free(work->masks);
    free(work->members);
    free(work);
    if (status != CM_OK) {
        automaton_free(ret);
    }
    return status;
}

void automaton_free(struct automaton *automaton)
{
    free(automaton->next);
    free(automaton->flags);
    automaton->next = NULL;
    automaton->flags = NULL;
}
