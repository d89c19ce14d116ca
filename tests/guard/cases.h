/* Texts and rule sets that try the guard against its reference. */
#ifndef CASEMATE_TESTS_GUARD_CASES_H
#define CASEMATE_TESTS_GUARD_CASES_H

#include <stdio.h>

#include "kernels/guard/guard.h"
#include "tests/guard/reference.h"

struct cases {
    uint64_t texts, runs; /* a run: one text, one way of cutting it into pieces, one end */
    uint64_t refused, redacted, cut, dropped, refused_rules;
    uint64_t random;    /* state of the generator */
    char failure[4096]; /* empty: none */
};

/* All strings of up to `length` <= 16 bytes over {a, b, c}, every rule set, every one of the
 * 2^(n-1) splits, and every end. */
bool cases_exhaustive(struct cases *cases, uint32_t length);
/* `runs` runs over random rules and over the built-in ones. */
bool cases_random(struct cases *cases, uint64_t runs, uint64_t seed);

#define CASES_TOKEN_BYTES 63

struct cases_token {
    uint8_t size, bytes[CASES_TOKEN_BYTES];
};

struct cases_vocabulary {
    uint32_t count;
    struct cases_token *tokens; /* sorted */
};

/* A line for each token, its bytes in hexadecimal. False: something else, or none. */
bool cases_vocabulary_read(struct cases_vocabulary *vocabulary, FILE *from);
/* Every positive sample of the built-in rules for replies, in text, whole and cut, in pieces as
 * tokens of the vocabulary may bring it: `segmentations` random ones for each text. */
bool cases_tokens(struct cases *cases, const struct cases_vocabulary *vocabulary,
                  uint32_t segmentations, uint64_t seed);

#endif
