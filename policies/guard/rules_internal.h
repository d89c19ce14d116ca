/* Inside of the rule compiler: pattern → positions → automaton → pack. Its tests may include it. */
#ifndef CASEMATE_POLICIES_GUARD_RULES_INTERNAL_H
#define CASEMATE_POLICIES_GUARD_RULES_INTERNAL_H

#include "policies/guard/rules.h"

#define POSITIONS_MAX 2048u
#define WORDS_MAX     (POSITIONS_MAX / 64u)

/* "<file>:<line>: rule '<id>': <text>" */
CM_MUST_USE enum cm_status rule_refuse(const struct cm_rule *rule, const char *id, const char *text,
                                       struct cm_error *err);

/* A pattern as a position automaton (Glushkov, 1961): one position for each byte set in it, bounded
 * repeats written out. A path first → follow … → last spells a match. */
struct positions {
    uint32_t count, words; /* words: of one bit set over positions */
    uint8_t (*sets)[32];   /* [count] bytes that a position takes */
    uint64_t *follow;      /* [count][words] */
    uint64_t first[WORDS_MAX];
    uint64_t accept[WORDS_MAX]; /* in one of these: the bytes so far are a span */
    uint64_t stop[WORDS_MAX];   /* in one of these: and nothing longer is */
    bool has_right;
    uint8_t left[32], right[32]; /* not before, not after */
};

/* pattern.c. On CM_OK positions_free. */
CM_MUST_USE enum cm_status positions_make(const struct cm_rule *rule, struct positions *ret,
                                          struct cm_error *err);
void positions_free(struct positions *positions);

struct automaton { /* deterministic; state 0 is dead, state 1 the start */
    uint32_t states, columns;
    uint8_t map[256]; /* byte → column */
    uint16_t *next;   /* [states][columns] */
    uint8_t *flags;   /* [states] CM_GUARD_STATE_… */
    uint32_t hold_bytes, least_bytes;
};

/* automaton.c: subset construction, then the proof of the bound. On CM_OK automaton_free. */
CM_MUST_USE enum cm_status automaton_make(const struct cm_rule *rule,
                                          const struct positions *positions, struct automaton *ret,
                                          struct cm_error *err);
void automaton_free(struct automaton *automaton);

/* phrase.c: no phrase of three words refuses a prompt. Every match of a rule that refuses, and
 * reads the view words, lies between spaces and has four words; of folded, it has four signs that
 * are no letter, digit or space; of squeezed, twelve bytes. Fails: CONFIG CM-RULES-PHRASE. */
CM_MUST_USE enum cm_status phrase_prove(const struct cm_rule *rule,
                                        const struct automaton *automaton, struct cm_error *err);

struct compiled {
    struct automaton automaton;
    bool has_right;
    uint8_t left[32], right[32];
};

/* One machine of the pack (FORMAT.md), still in parts. */
struct trigger {
    uint16_t rule, state;
    uint8_t length;
    uint8_t bytes[CM_GUARD_TRIGGER_MAX];
    uint32_t after; /* the next trigger that ends at the same node, + 1; 0: none */
};

struct machine {
    uint32_t nodes, columns, trigger_count, hit_count, start_count;
    struct trigger *triggers;
    uint8_t column[256];
    uint16_t *next;
    uint8_t *depth;
    uint32_t *ends; /* [nodes] first trigger that ends here, + 1 */
    uint16_t *fail;
    uint16_t starts[CM_GUARD_STARTS_MAX]; /* rules that begin with a class */
};

/* trigger.c: how many bytes of this rule the trigger automaton takes; 0: it begins with a class. */
uint32_t trigger_length(const struct automaton *automaton);
/* On CM_OK machine_free. */
CM_MUST_USE enum cm_status machine_make(const struct cm_rules *rules,
                                        const struct compiled *compiled, uint8_t class,
                                        struct machine *ret, struct cm_error *err);
void machine_free(struct machine *machine);

#endif
