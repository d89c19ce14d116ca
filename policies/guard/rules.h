/* Guard rules: from YAML to one rule pack.
 *
 * policies/guard/ *.yaml → cm_rules_read (schema, limits) → cm_rules_compile (pattern → automaton
 * → proven bound → triggers → pack). Same text, same bytes. The supervisor compiles at start what
 * is not of this build, the command line checks; nothing else knows YAML or patterns. Not
 * thread-safe; all memory is the set's. */
#ifndef CASEMATE_POLICIES_GUARD_RULES_H
#define CASEMATE_POLICIES_GUARD_RULES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/guard_pack.h"

#define CM_RULES_FILE_BYTES    (8u << 20)
#define CM_RULES_PATTERN_BYTES 2048u
#define CM_RULES_SAMPLE_BYTES  4096u
#define CM_RULES_SAMPLES_MAX   32u /* of each kind, in one rule */

struct cm_rules_text {
    uint8_t *bytes; /* terminated besides */
    size_t size;
};

struct cm_rule {
    char id[CM_RULE_ID_BYTES];
    char category[CM_CATEGORY_BYTES];
    uint8_t classes;   /* enum cm_guard_class bits */
    uint8_t action;    /* enum cm_verdict_action */
    uint8_t validator; /* enum cm_guard_validator */
    uint8_t view;      /* of input: its enum cm_guard_class; 0: raw bytes */
    uint8_t where;     /* of input: enum cm_guard_where bits */
    uint32_t argument; /* entropy: hundredths of a bit a byte */
    uint32_t firm_bytes;
    uint8_t firm_byte;
    struct cm_rules_text pattern, until, replacement;
    uint32_t positive_count, negative_count;
    struct cm_rules_text positive[CM_RULES_SAMPLES_MAX], negative[CM_RULES_SAMPLES_MAX];
    char file[256]; /* where it stands, for errors */
    uint32_t line;
    /* set by cm_rules_compile */
    uint32_t hold_bytes, least_bytes, states;
    uint32_t trigger_bytes; /* a candidate exists from here on */
};

struct cm_rules {
    struct cm_rule *rules;
    uint32_t count, capacity;
};

/* Append the rules of one file (already in memory); `name` stands in errors. *ret_built_in: does it
 * leave the built-in rules in force? Fails: CONFIG CM-RULES-FORM with file and line. */
CM_MUST_USE enum cm_status cm_rules_read(struct cm_rules *rules, const char *name,
                                         const uint8_t *text, size_t bytes, bool *ret_built_in,
                                         struct cm_error *err);
/* Append the rules that are part of this build. */
CM_MUST_USE enum cm_status cm_rules_built_in(struct cm_rules *rules, struct cm_error *err);
/* What `guard_rules` says: the rules of the file at `path`, and the built-in ones unless it says
 * `built_in: false`; path "": the built-in ones alone. */
CM_MUST_USE enum cm_status cm_rules_load(struct cm_rules *rules, const char *path,
                                         struct cm_error *err);
/* Compile into *ret_pack (malloc). Fails: CONFIG CM-RULES-PATTERN, CM-RULES-HOLD, CM-RULES-STATES,
 * CM-RULES-SIZE, with the rule's place, id and figure. */
CM_MUST_USE enum cm_status cm_rules_compile(struct cm_rules *rules, uint8_t **ret_pack,
                                            size_t *ret_bytes, struct cm_error *err);
void cm_rules_free(struct cm_rules *rules);
/* The pack of what `guard_rules` says (malloc): cm_rules_load and cm_rules_compile, or, for path
 * "", the same bytes as they were compiled with this build. In cm_rules_packed. */
CM_MUST_USE enum cm_status cm_rules_pack(const char *path, uint8_t **ret_pack, size_t *ret_bytes,
                                         struct cm_error *err);

#endif
