/* One stream through every rule: candidates, marks, and what may leave. */
#include "kernels/guard/guard.h"

#include <string.h>

#define MASK      (CM_GUARD_RING - 1u)
#define FORBIDDEN 0x8000u
#define NOWHERE   UINT64_MAX

_Static_assert((CM_GUARD_RING & MASK) == 0, "positions are taken modulo a power of two");
_Static_assert(CM_GUARD_HELD_MAX + 1 + CM_GUARD_SLICE <= CM_GUARD_RING &&
                   CM_GUARD_HELD_MAX + 1 + CM_STOP_BYTES_MAX <= CM_GUARD_RING,
               "what is held, and the byte before it, stay in the ring while more is taken");
_Static_assert(CM_GUARD_RULES_MAX < CM_GUARD_RULE_OVERFLOW, "a rule and a bit fit into a mark");

enum { OUTPUT = 0 }; /* the machine of replies; all others read prompts */

void cm_guard_begin(struct cm_guard_state *state, enum cm_guard_class stage)
{
    memset(state, 0, sizeof(*state));
    state->stage = (uint8_t)__builtin_ctz((uint32_t)stage);
    state->where = CM_GUARD_ANYWHERE;
    state->limit = state->refused = NOWHERE;
}

static bool in_set(const uint8_t set[static 32], uint8_t byte)
{
    return (set[byte >> 3] >> (byte & 7) & 1) != 0;
}

/* ------------------------------------------------------------------ verdicts */

static void verdict_put(struct cm_guard_state *state, const struct cm_guard_verdict *verdict)
{
    if (verdict->start >= state->limit) {
        return; /* in what followed a cut */
    }
    uint32_t at = state->verdict_count;
    if (at < CM_GUARD_VERDICTS_MAX) {
        state->verdict_count++;
    } else {
        state->verdicts_lost++;
        for (at = 0; at < CM_GUARD_VERDICTS_MAX; at++) { /* what only reports gives way */
            if (verdict->action == CM_VERDICT_REFUSE &&
                state->verdicts[at].action != CM_VERDICT_REFUSE) {
                break;
            }
        }
    }
    if (at < CM_GUARD_VERDICTS_MAX) {
        state->verdicts[at] = *verdict;
        state->verdicts[at].end = verdict->end < state->limit ? verdict->end : state->limit;
    }
}

static void span_drop(struct cm_guard_state *state, uint32_t index)
{
    memmove(&state->spans[index], &state->spans[index + 1],
            (--state->span_count - index) * sizeof(state->spans[0]));
}

/* Note a span; it swallows those of the same rule that it meets. */
static void span_add(struct cm_guard_state *state, uint16_t rule, uint8_t action, uint64_t start,
                     uint64_t end)
{
    struct cm_guard_verdict span = {rule, action, start, end};
    for (uint32_t i = 0; i < state->span_count;) {
        const struct cm_guard_verdict *other = &state->spans[i];
        if (other->rule == rule && other->start <= span.end && other->end >= span.start) {
            span.start = other->start < span.start ? other->start : span.start;
            span.end = other->end > span.end ? other->end : span.end;
            if (other->start == span.start && other->end == span.end) {
                return; /* nothing new */
            }
            span_drop(state, i);
        } else {
            i++;
        }
    }
    if (state->span_count == CM_GUARD_SPANS_MAX) { /* said early, and perhaps in two parts */
        verdict_put(state, &state->spans[0]);
        span_drop(state, 0);
    }
    state->spans[state->span_count++] = span;
}

/* Could a span of this rule still begin at or before `end`? */
static bool span_grows(const struct cm_guard_state *state, const struct cm_guard_verdict *span)
{
    for (uint32_t i = 0; i < state->candidate_count; i++) {
        const struct cm_guard_candidate *c = &state->candidates[i];
        if (c->rule == span->rule && c->start <= span->end) {
            return true;
        }
    }
    return false;
}

/* Say the spans that nothing can change any more: those that end before `position`. */
static void spans_say(struct cm_guard_state *state, uint64_t position)
{
    for (uint32_t i = 0; i < state->span_count;) {
        if (state->spans[i].end < position && !span_grows(state, &state->spans[i])) {
            verdict_put(state, &state->spans[i]);
            span_drop(state, i);
        } else {
            i++;
        }
    }
}

/* The reply ends at `refused`: say what begins there or before, what ended it first of all. */
static void spans_say_refused(struct cm_guard_state *state)
{
    for (int turn = 0; turn < 2; turn++) {
        for (uint32_t i = 0; i < state->span_count;) {
            const struct cm_guard_verdict *span = &state->spans[i];
            bool cause = span->action == CM_VERDICT_REFUSE && span->start == state->refused;
            if (span->start <= state->refused && (turn == 1 || cause)) {
                verdict_put(state, span);
                span_drop(state, i);
            } else {
                i++;
            }
        }
    }
}

/* ------------------------------------------------------------------ spans */

/* What begins after a cut never leaves anyway. */
static void refuse_from(struct cm_guard_state *state, uint64_t start)
{
    if (start < state->limit && start < state->refused) {
        state->refused = start;
    }
}

/* Forbid bytes from `from` on; the span begins at `start`, or with the stream. Of several rules
 * that begin there, the first in the pack gives the replacement. */
static void span_mark(struct cm_guard_state *state, uint16_t rule, uint64_t start, uint64_t from,
                      uint64_t end)
{
    start = start > state->base ? start : state->base;
    from = from > state->base ? from : state->base;
    if (from == start) {
        uint16_t *mark = &state->marks[start & MASK];
        uint16_t known = *mark & (uint16_t)~FORBIDDEN;
        if (known == 0 || rule + 1u < known) {
            *mark = (uint16_t)((*mark & FORBIDDEN) | (rule + 1u));
        }
    }
    for (uint64_t at = from; at < end; at++) {
        state->marks[at & MASK] |= FORBIDDEN;
    }
    state->marked = end > state->marked ? end : state->marked;
}

/* Does the rule's validator accept bytes [start, end)? */
static bool span_valid(const struct cm_guard_state *state, const struct cm_guard_rule *rule,
                       uint64_t start, uint64_t end)
{
    uint8_t bytes[CM_GUARD_RING];
    if (end - start > CM_GUARD_HOLD_MAX) {
        return true; /* longer than its proven bound: not to be believed, so forbidden */
    }
    for (uint64_t at = start; at < end; at++) {
        bytes[at - start] = state->ring[at & MASK];
    }
    return cm_guard_valid((enum cm_guard_validator)rule->validator, rule->argument, bytes,
                          (uint32_t)(end - start));
}

/* A candidate for which there is no room could be anything: it ends the reply. */
static void overflow(struct cm_guard_state *state, uint64_t start)
{
    if (state->base == NOWHERE) {
        state->refused = 0; /* in what stands before: cm_guard_follow sees to it */
        return;
    }
    start = start > state->base ? start : state->base;
    if (state->stage == OUTPUT) {
        span_mark(state, CM_GUARD_RULE_OVERFLOW - 1u, start, start, start + 1);
    }
    refuse_from(state, start);
    span_add(state, CM_GUARD_RULE_OVERFLOW, CM_VERDICT_REFUSE, start, start + 1);
}

/* The pattern and its right condition accept [c->start, end). False: the candidate is over. */
static bool span_confirm(struct cm_guard_state *state, const struct cm_guard_rule *rule,
                         struct cm_guard_candidate *c, uint64_t end)
{
    bool gate = rule->validator == CM_GUARD_VALID_ENTROPY; /* asked once, of the shortest span */
    if (end - c->start < rule->least_bytes) { /* a pack that lies: its replacement has no room */
        overflow(state, c->start);
        return false;
    }
    if (rule->validator != CM_GUARD_VALID_ALWAYS && !(gate && c->end != 0) &&
        !span_valid(state, rule, c->start, end)) {
        return !gate;
    }
    if (end <= state->base) { /* as a whole in what stands before */
        c->end = end;
        return true;
    }
    uint64_t start = c->start > state->base ? c->start : state->base;
    if (state->stage == OUTPUT && rule->action != CM_VERDICT_REPORT) {
        span_mark(state, c->rule, c->start, c->end != 0 ? c->end : c->start, end);
        if (rule->action == CM_VERDICT_REFUSE) {
            refuse_from(state, start);
        }
    }
    c->end = end;
    span_add(state, c->rule, rule->action, start, end);
    return true;
}

/* ------------------------------------------------------------------ candidates */

/* Nothing that is still to be asked: bytes alone decide. */
static bool settled(const struct cm_guard_pack *pack, const struct cm_guard_candidate *c)
{
    uint8_t validator = pack->rules[c->rule].validator;
    return validator == CM_GUARD_VALID_ALWAYS ||
           (validator == CM_GUARD_VALID_ENTROPY && c->end != 0);
}

/* Two settled candidates of a rule in one state have one future, and the earlier covers more.
 * Called when room is short. */
static void candidates_merge(const struct cm_guard_pack *pack, struct cm_guard_state *state)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < state->candidate_count; i++) {
        const struct cm_guard_candidate *c = &state->candidates[i];
        bool covered = false;
        for (uint32_t k = 0; k < kept && !covered; k++) {
            const struct cm_guard_candidate *other = &state->candidates[k];
            covered = other->rule == c->rule && other->state == c->state && settled(pack, other) &&
                      settled(pack, c) && other->pending == c->pending &&
                      other->start <= c->start && (c->end == 0 || other->end == c->end);
        }
        if (!covered) {
            state->candidates[kept++] = *c;
        }
    }
    state->candidate_count = kept;
}

/* It is in `c->state` now, `count` bytes were taken. False: it is over. */
static bool candidate_look(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                           struct cm_guard_candidate *c)
{
    const struct cm_guard_rule *rule = &pack->rules[c->rule];
    uint8_t flags = pack->flags[rule->flags + c->state];
    bool accept = (flags & CM_GUARD_STATE_ACCEPT) != 0;
    c->pending = accept && rule->has_right;
    if (accept && !c->pending && !span_confirm(state, rule, c, state->count)) {
        return false;
    }
    return c->pending || (flags & CM_GUARD_STATE_TERMINAL) == 0;
}

static void candidate_start(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                            uint16_t rule_index, uint16_t rule_state, uint64_t start)
{
    const struct cm_guard_rule *rule = &pack->rules[rule_index];
    struct cm_guard_candidate c = {.start = start, .rule = rule_index, .state = rule_state};
    if (rule_state == 0 || (rule->where & state->where) == 0 ||
        (start > 0 && in_set(rule->left, state->ring[(start - 1) & MASK]))) {
        return;
    }
    if (state->candidate_count == CM_GUARD_CANDIDATES_MAX) {
        candidates_merge(pack, state);
    }
    if (state->candidate_count == CM_GUARD_CANDIDATES_MAX) {
        overflow(state, start);
    } else if (candidate_look(pack, state, &c)) {
        state->candidates[state->candidate_count++] = c;
    }
}

/* Every candidate sees the byte that was just taken. */
static void candidates_step(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                            uint8_t byte)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < state->candidate_count; i++) {
        struct cm_guard_candidate *c = &state->candidates[i];
        const struct cm_guard_rule *rule = &pack->rules[c->rule];
        if (c->pending) {
            c->pending = false;
            if (!in_set(rule->right, byte) && !span_confirm(state, rule, c, state->count - 1)) {
                continue;
            }
        }
        uint32_t column = pack->maps[rule->map * 256u + byte];
        uint16_t cell = pack->cells[rule->cells + (uint32_t)c->state * rule->columns + column];
        c->state = cell & CM_GUARD_CELL_STATE;
        if (cell != 0 && (cell <= CM_GUARD_CELL_STATE || candidate_look(pack, state, c))) {
            if (kept != i) {
                state->candidates[kept] = *c;
            }
            kept++;
        }
    }
    state->candidate_count = kept;
}

static void byte_take(const struct cm_guard_pack *pack, struct cm_guard_state *state, uint8_t byte)
{
    const struct cm_guard_machine *machine = &pack->machines[state->stage];
    uint64_t at = state->count++;
    state->ring[at & MASK] = byte;
    state->marks[at & MASK] = 0;
    if (state->candidate_count > 0) {
        candidates_step(pack, state, byte);
    }
    uint64_t starts = machine->begin_with[byte];
    starts &= at > 0 ? machine->stand_after[state->ring[(at - 1) & MASK]] : ~0ull;
    for (; starts != 0; starts &= starts - 1) {
        uint16_t rule = machine->starts[__builtin_ctzll(starts)];
        const struct cm_guard_rule *facts = &pack->rules[rule];
        uint32_t column = pack->maps[facts->map * 256u + byte];
        uint16_t cell = pack->cells[facts->cells + facts->columns + column];
        candidate_start(pack, state, rule, cell & CM_GUARD_CELL_STATE, at);
    }
    state->node = machine->next[state->node * machine->columns + machine->column[byte]];
    for (uint32_t i = machine->hit_first[state->node]; i < machine->hit_first[state->node + 1];
         i++) {
        const struct cm_guard_hit *hit = &machine->hits[i];
        if (hit->length <= state->count) { /* always, in a pack that was compiled */
            candidate_start(pack, state, hit->rule, hit->state, state->count - hit->length);
        }
    }
}

/* ------------------------------------------------------------------ out */

/* Where the first byte is that a candidate may still cover; `firm`: only firm ones count. */
static uint64_t candidates_hold(const struct cm_guard_pack *pack,
                                const struct cm_guard_state *state, bool firm)
{
    uint64_t hold = state->count;
    for (uint32_t i = 0; i < state->candidate_count; i++) {
        const struct cm_guard_candidate *c = &state->candidates[i];
        const struct cm_guard_rule *rule = &pack->rules[c->rule];
        uint64_t from = c->end != 0 ? c->end : c->start;
        if (rule->action == CM_VERDICT_REPORT || from >= hold) {
            continue;
        }
        bool counts = !firm || c->end != 0 || state->count - c->start >= rule->firm_bytes;
        for (uint64_t at = c->start; !counts && at < state->count; at++) {
            counts = rule->firm_byte != 0 && state->ring[at & MASK] == rule->firm_byte;
        }
        hold = counts ? from : hold;
    }
    return hold;
}

static uint64_t frontier(const struct cm_guard_pack *pack, const struct cm_guard_state *state)
{
    uint64_t hold = candidates_hold(pack, state, false);
    uint64_t begun = state->count - pack->machines[state->stage].depth[state->node];
    return hold < begun ? hold : begun;
}

static void copy_out(const struct cm_guard_state *state, uint64_t to, uint8_t *ret_out,
                     uint32_t *ret_used)
{
    for (uint64_t at = state->released; at < to;) {
        uint32_t from = (uint32_t)(at & MASK);
        uint32_t bytes =
            to - at < CM_GUARD_RING - from ? (uint32_t)(to - at) : CM_GUARD_RING - from;
        memcpy(ret_out + *ret_used, state->ring + from, bytes);
        *ret_used += bytes;
        at += bytes;
    }
}

/* Decide the bytes before `to`. False: a refuse span begins there. */
static bool drain(const struct cm_guard_pack *pack, struct cm_guard_state *state, uint64_t to,
                  uint8_t *ret_out, uint32_t *ret_used)
{
    to = to < state->limit ? to : state->limit;
    while (state->released < to) {
        if (state->released >= state->marked) {
            copy_out(state, to, ret_out, ret_used);
            state->released = to;
            state->inside = false;
            return true;
        }
        uint16_t mark = state->marks[state->released & MASK];
        if (state->released == state->refused) {
            return false;
        }
        if ((mark & FORBIDDEN) == 0) {
            ret_out[(*ret_used)++] = state->ring[state->released & MASK];
        } else if (!state->inside) { /* a run begins where a span begins */
            const struct cm_guard_rule *rule = &pack->rules[(mark & (uint16_t)~FORBIDDEN) - 1u];
            memcpy(ret_out + *ret_used, rule->replacement, rule->replacement_bytes);
            *ret_used += rule->replacement_bytes;
        }
        state->inside = (mark & FORBIDDEN) != 0;
        state->released++;
    }
    return true;
}

/* Nothing more will come of this stream; what it held is gone. */
static bool end_here(struct cm_guard_state *state, bool whole)
{
    if (!whole) {
        spans_say_refused(state);
    }
    state->over = true;
    state->candidate_count = state->span_count = 0;
    memset(state->ring, 0, sizeof(state->ring));
    return whole;
}

static bool slice_take(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                       const uint8_t *bytes, size_t size, uint8_t *ret_out, uint32_t *ret_used)
{
    bool open = true;
    for (size_t i = 0; i < size && open; i++) {
        byte_take(pack, state, bytes[i]);
        /* Stop at the very byte that decides, so that verdicts too depend on the bytes alone. */
        open = state->refused == NOWHERE || state->stage != OUTPUT ||
               frontier(pack, state) <= state->refused;
    }
    if (state->stage == OUTPUT) {
        open = drain(pack, state, frontier(pack, state), ret_out, ret_used) && open;
    }
    spans_say(state, state->count - pack->machines[state->stage].depth[state->node]);
    return open;
}

void cm_guard_follow(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                     const uint8_t *before, size_t size)
{
    CM_ASSERT(state->count == 0 && size <= CM_GUARD_HELD_MAX);
    state->base = NOWHERE;
    for (size_t i = 0; i < size; i++) {
        byte_take(pack, state, before[i]);
    }
    state->base = state->released = state->marked = state->count;
    if (state->refused != NOWHERE) { /* more began there than there was room for */
        state->refused = NOWHERE;
        overflow(state, state->base);
    }
}

/* Only a pack that lies about its bounds holds more. */
static bool overlong(const struct cm_guard_state *state)
{
    return state->stage == OUTPUT && state->limit == NOWHERE &&
           cm_guard_held(state) > CM_GUARD_HELD_MAX;
}

bool cm_guard_feed(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                   const uint8_t *bytes, size_t size, uint8_t *ret_out, uint32_t *ret_used)
{
    for (size_t at = 0; at < size; at += CM_GUARD_SLICE) {
        size_t take = size - at < CM_GUARD_SLICE ? size - at : CM_GUARD_SLICE;
        if (!state->over && overlong(state)) {
            overflow(state, state->released);
            return end_here(state, false);
        }
        if (state->over || !slice_take(pack, state, bytes + at, take, ret_out, ret_used)) {
            return end_here(state, false);
        }
    }
    return !state->over;
}

/* Nothing stands on the right: what waits for that is a span. Those that cannot go on are over. */
static void candidates_settle(const struct cm_guard_pack *pack, struct cm_guard_state *state)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < state->candidate_count; i++) {
        struct cm_guard_candidate *c = &state->candidates[i];
        const struct cm_guard_rule *rule = &pack->rules[c->rule];
        bool open = (pack->flags[rule->flags + c->state] & CM_GUARD_STATE_TERMINAL) == 0;
        if (c->pending) {
            open = span_confirm(state, rule, c, state->count) && open;
        }
        if (open) {
            state->candidates[kept++] = *c;
        }
    }
    state->candidate_count = kept;
}

bool cm_guard_finish(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                     enum cm_guard_end end, const uint8_t *unseen, size_t unseen_bytes,
                     uint8_t *ret_out, uint32_t *ret_used)
{
    if (state->over || overlong(state) || unseen_bytes > CM_STOP_BYTES_MAX) {
        return end_here(state, false);
    }
    state->limit = end == CM_GUARD_CUT ? state->count : NOWHERE;
    if (unseen_bytes > 0 && !cm_guard_feed(pack, state, unseen, unseen_bytes, ret_out, ret_used)) {
        return false;
    }
    candidates_settle(pack, state);
    uint64_t to = end == CM_GUARD_CUT ? candidates_hold(pack, state, true) : state->count;
    state->candidate_count = 0;
    bool whole = state->stage != OUTPUT || drain(pack, state, to, ret_out, ret_used);
    if (whole) {
        spans_say(state, NOWHERE);
    }
    return end_here(state, whole);
}
