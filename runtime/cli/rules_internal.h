/* Rules with what runs them, for `casemate rules` and `casemate guard`. */
#ifndef CASEMATE_RUNTIME_CLI_RULES_INTERNAL_H
#define CASEMATE_RUNTIME_CLI_RULES_INTERNAL_H

#include <jansson.h>

#include "kernels/guard/classify.h"
#include "policies/guard/rules.h"
#include "runtime/cli/cli_internal.h"

struct cli_rules {
    struct cm_rules rules;
    struct cm_guard_pack *pack; /* NULL: there were faults */
    struct cm_classifier *classifier;
    size_t pack_bytes;
    bool as_json;
    json_t *rows;
    uint32_t faults;
    struct cm_error first; /* the first fault decides the exit code */
};

/* Read and compile the files, or without any the built-in rules. Each rule's fault is told and
 * counted; fails only where nothing can be read. */
CM_MUST_USE enum cm_status cli_rules_load(struct cli_rules *trial, const struct words *files,
                                          struct cm_error *err);
void cli_rules_free(struct cli_rules *trial);

const char *cli_class_name(uint32_t class);
const char *cli_action_name(uint32_t action);

/* A reply of this text: its verdicts, and what of it would leave (ret_out: CM_GUARD_OUT_BYTES of
 * the size and one replacement). False: a rule ends it. */
typedef void (*cli_finding_each)(void *context, const struct cm_finding *finding);
bool cli_output_read(const struct cm_guard_pack *pack, const uint8_t *text, size_t size,
                     uint8_t *ret_out, uint32_t *ret_used, cli_finding_each each, void *context);

/* The first word names what to do; it is taken out. "" if there is none. */
const char *words_verb_take(struct words *words);
/* Fails: USAGE if a word still begins with "--". */
CM_MUST_USE enum cm_status words_options_refuse(const struct words *words, struct cm_error *err);

#endif
