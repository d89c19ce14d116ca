/* Texts and rule sets that try the guard against its reference. */
#ifndef CASEMATE_TESTS_GUARD_CASES_H
#define CASEMATE_TESTS_GUARD_CASES_H

#include "kernels/guard/guard.h"
#include "tests/guard/reference.h"

struct cases {
    uint64_t texts, runs; /* a run: one text, one way of cutting it into pieces, one end */
    uint64_t refused, redacted, cut, dropped, refused_rules;
    uint64_t random;    /* state of the generator */
    char failure[4096]; /* empty: none */
};

/* All strings of up to `length` bytes over {a, b, c}, every rule set, every two-way split, byte by
 * byte, and every end. */
bool cases_exhaustive(struct cases *cases, uint32_t length);
/* `runs` runs over random rules and over the built-in ones. */
bool cases_random(struct cases *cases, uint64_t runs, uint64_t seed);

#endif
