/* Classify one message of a prompt: every input rule over every view of every document in it.
 *
 * Deterministic rules alone (the first tier). Nothing is cut off, whatever the length; memory is
 * fixed, time linear, nothing is allocated after cm_classifier_new. Where a machine is at its
 * bounds the message is refused: fails closed. Same tables and integers on every backend. */
#ifndef CASEMATE_KERNELS_GUARD_CLASSIFY_H
#define CASEMATE_KERNELS_GUARD_CLASSIFY_H

#include "kernels/guard/document.h"
#include "kernels/guard/guard.h"

#define CM_FINDINGS_MAX 16u

struct cm_finding {
    char rule[CM_RULE_ID_BYTES];
    char category[CM_CATEGORY_BYTES];
    uint8_t action; /* enum cm_verdict_action */
    uint8_t class;  /* enum cm_guard_class: raw bytes, or which view */
    uint8_t document;
    uint32_t start, end; /* raw bytes that the match came from */
};

struct cm_findings {
    uint32_t count;
    uint32_t lost; /* reports for which there was no room; what refuses is kept */
    bool refused;
    struct cm_finding each[CM_FINDINGS_MAX];
};

struct cm_classifier;

CM_MUST_USE enum cm_status cm_classifier_new(struct cm_classifier **ret_classifier,
                                             struct cm_error *err);
void cm_classifier_free(struct cm_classifier *classifier); /* wipes; NULL is fine */

/* What the pack's input rules find in a message, in the order in which it was confirmed. Keeps
 * nothing of the text. */
void cm_classify(struct cm_classifier *classifier, const struct cm_guard_pack *pack,
                 const uint8_t *text, size_t size, struct cm_findings *ret_findings);

#endif
