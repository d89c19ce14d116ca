/* The guard's automata: every rule of a pack over one byte stream, in one pass.
 *
 * What a rule forbids, on a whole text: for each start where the left condition holds, the bytes up
 * to the longest end that the pattern, its right condition and its validator accept. A byte is
 * forbidden if any redact or refuse rule's span covers it. Released are the other bytes up to the
 * first byte of the first refuse span; each run of forbidden bytes leaves as one replacement, that
 * of the rule whose span begins the run (the first in the pack, where several do).
 *
 * On a stream: a byte is released as soon as, and not before, no live candidate can still cover it.
 * A trigger automaton (Aho and Corasick, 1975) over the literal beginnings of all rules starts a
 * candidate at its exact first byte; each candidate walks its rule's own deterministic automaton.
 * So what is held back follows from states, never from a constant, and the outcome depends on the
 * bytes alone, not on how they came. Integers only; nothing is allocated after cm_guard_pack_new.
 * Tables are flat arrays and a state has a fixed size, so that a device can hold both. */
#ifndef CASEMATE_KERNELS_GUARD_H
#define CASEMATE_KERNELS_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/guard_pack.h"

struct cm_guard_rule { /* what each byte needs first */
    uint32_t map;      /* index into maps, × 256 */
    uint32_t cells;    /* index of state 0's row; state 0 is dead, state 1 the start */
    uint32_t flags;    /* index of state 0's flags */
    uint16_t states, columns;
    uint8_t action;    /* enum cm_verdict_action */
    uint8_t validator; /* enum cm_guard_validator */
    uint8_t where;     /* enum cm_guard_where bits */
    bool has_right;
    uint8_t classes;             /* enum cm_guard_class bits */
    uint8_t firm_byte;           /* a candidate that holds it is firm; 0: none */
    uint16_t firm_bytes;         /* or one that is as long */
    uint8_t left[32], right[32]; /* sets of bytes: not before, not after */
    uint32_t argument;
    uint32_t hold_bytes;  /* proven bound */
    uint32_t least_bytes; /* of a span */
    uint16_t replacement_bytes;
    uint8_t replacement[CM_GUARD_REPLACEMENT_MAX];
    char id[CM_RULE_ID_BYTES];
    char category[CM_CATEGORY_BYTES];
};

struct cm_guard_hit { /* a trigger is complete */
    uint16_t rule, state, length;
};

/* Where candidates begin, for one class of rules. */
struct cm_guard_machine {
    uint32_t nodes, columns;
    uint8_t column[256];
    uint16_t *next;      /* [nodes][columns] */
    uint8_t *depth;      /* [nodes] longest tail of the text that a trigger begins with */
    uint32_t *hit_first; /* [nodes + 1] */
    struct cm_guard_hit *hits;
    uint16_t start_first[257]; /* by byte: rules that begin with a class, in start_rules */
    uint16_t *start_rules;
    /* the same as bits: of `starts`, which begin with a byte, and which may stand after one */
    uint32_t start_count;
    uint16_t starts[CM_GUARD_STARTS_MAX];
    uint64_t begin_with[256], stand_after[256];
};

#define CM_GUARD_CELL_FLAGS 12u
#define CM_GUARD_CELL_STATE ((1u << CM_GUARD_CELL_FLAGS) - 1u)

struct cm_guard_pack {
    uint32_t rule_count;
    uint32_t hold_bytes; /* greatest of all rules */
    struct cm_guard_rule *rules;
    uint8_t *maps;   /* [][256] byte → column */
    uint16_t *cells; /* next state; its flags in the bits from CM_GUARD_CELL_FLAGS on */
    uint8_t *flags;
    struct cm_guard_machine machines[CM_GUARD_MACHINES]; /* by bit of enum cm_guard_class */
    uint8_t *memory;
};

/* Parse, check and copy a pack; nothing in it is believed. Fails: CONFIG CM-RULES-PACK, SYSTEM. */
CM_MUST_USE enum cm_status cm_guard_pack_new(const uint8_t *bytes, size_t size,
                                             struct cm_guard_pack **ret_pack, struct cm_error *err);
void cm_guard_pack_free(struct cm_guard_pack *pack); /* NULL is fine */

#define CM_GUARD_CANDIDATES_MAX 48u
#define CM_GUARD_RING           1024u /* a power of two: hold, one slice, one trigger */
#define CM_GUARD_SLICE          128u
#define CM_GUARD_SPANS_MAX      16u
#define CM_GUARD_VERDICTS_MAX   8u

struct cm_guard_candidate {
    uint64_t start;
    uint64_t end; /* of the longest span so far; 0: none */
    uint16_t rule, state;
    bool pending; /* accepted, the right condition is still to be seen */
};

struct cm_guard_verdict { /* overlapping and touching spans of one rule are one */
    uint16_t rule;
    uint8_t action;
    uint64_t start, end; /* bytes of the stream */
};

/* One stream. Plain data: a copy is a snapshot, zeros are no stream. Holds unreleased text: wipe.
 */
struct cm_guard_state {
    uint64_t count;    /* bytes taken */
    uint64_t released; /* bytes decided: released or swallowed */
    uint64_t limit;    /* bytes from here on only decide about those before */
    uint64_t marked;   /* end of the last forbidden byte */
    uint64_t refused;  /* start of the first refuse span; UINT64_MAX: none */
    uint64_t base;     /* bytes before it are not of this stream: cm_guard_follow */
    uint32_t node;
    uint8_t stage; /* of machines; input marks and releases nothing */
    uint8_t where; /* enum cm_guard_where bits; rules of other places rest */
    bool inside;   /* the last decided byte was forbidden */
    bool over;
    uint32_t candidate_count, span_count, verdict_count, verdicts_lost;
    struct cm_guard_candidate candidates[CM_GUARD_CANDIDATES_MAX];
    struct cm_guard_verdict spans[CM_GUARD_SPANS_MAX];       /* may still grow */
    struct cm_guard_verdict verdicts[CM_GUARD_VERDICTS_MAX]; /* for the caller to take */
    uint16_t marks[CM_GUARD_RING]; /* rule + 1 of the span that starts here, high bit: forbidden */
    uint8_t ring[CM_GUARD_RING];
};

enum cm_guard_end {
    CM_GUARD_TEXT_END, /* the text is whole: candidates are decided as it stands */
    CM_GUARD_CUT,      /* the text was cut: what a firm candidate holds is dropped */
};

#define CM_GUARD_HELD_MAX (CM_GUARD_HOLD_MAX + CM_GUARD_TRIGGER_MAX) /* between two calls */
/* Bytes that `taken` bytes may release, over all the calls that took them. */
#define CM_GUARD_OUT_BYTES(taken) (3u * (taken))

void cm_guard_begin(struct cm_guard_state *state, enum cm_guard_class stage);
/* Right after _begin: what the stream goes on from, at most CM_GUARD_HELD_MAX bytes. Nothing of it
 * is released or said, but a span may begin in it: half of a key may stand at the end of a prompt.
 * Such a span is forbidden from the stream's first byte on; its replacement may need
 * CM_GUARD_REPLACEMENT_MAX bytes more than CM_GUARD_OUT_BYTES, once. Positions count it: less
 * `base` they are of the stream. */
void cm_guard_follow(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                     const uint8_t *before, size_t size);
/* Take bytes; released ones are appended at ret_out + *ret_used, which must have room for
 * CM_GUARD_OUT_BYTES of all that is held and taken. False: a refuse rule has ended the reply.
 * Input: ret_out NULL, nothing is released and nothing ends. */
bool cm_guard_feed(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                   const uint8_t *bytes, size_t size, uint8_t *ret_out, uint32_t *ret_used);
/* No more bytes: decide what is left. As _feed. `unseen` bytes are known to have followed (a stop
 * string): they decide, and are never released. */
bool cm_guard_finish(const struct cm_guard_pack *pack, struct cm_guard_state *state,
                     enum cm_guard_end end, const uint8_t *unseen, size_t unseen_bytes,
                     uint8_t *ret_out, uint32_t *ret_used);
/* Bytes taken and not yet decided. */
static inline uint64_t cm_guard_held(const struct cm_guard_state *state)
{
    return state->over ? 0 : state->count - state->released;
}

/* validate.c: does the span pass? bytes <= CM_GUARD_RING. */
bool cm_guard_valid(enum cm_guard_validator validator, uint32_t argument, const uint8_t *bytes,
                    uint32_t size);

#endif
