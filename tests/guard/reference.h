/* The guard's semantics on whole texts, written a second time and by other means: PCRE2 finds the
 * spans, everything else is the definition at the head of kernels/guard/guard.h, byte by byte. */
#ifndef CASEMATE_TESTS_GUARD_REFERENCE_H
#define CASEMATE_TESTS_GUARD_REFERENCE_H

#include "policies/guard/rules.h"

#define REFERENCE_TEXT_MAX     4096
#define REFERENCE_VERDICTS_MAX 256

struct reference;

struct reference_verdict {
    uint32_t rule;
    size_t start, end;
};

struct reference_result {
    bool refused;
    size_t bytes;
    uint8_t text[4 * REFERENCE_TEXT_MAX];
    uint32_t verdict_count; /* sorted by rule and start; REPORT rules too */
    struct reference_verdict verdicts[REFERENCE_VERDICTS_MAX];
};

/* Rules must be compiled before: what makes a candidate firm depends on its trigger. Borrowed. */
struct reference *reference_new(const struct cm_rules *rules);
void reference_free(struct reference *reference);
/* The reply `text`. cut: it was cut, and `unseen` bytes followed. */
void reference_run(const struct reference *reference, const uint8_t *text, size_t size, bool cut,
                   const uint8_t *unseen, size_t unseen_size, struct reference_result *ret);

#endif
