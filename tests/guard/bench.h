#ifndef CASEMATE_TESTS_GUARD_BENCH_H
#define CASEMATE_TESTS_GUARD_BENCH_H

#include <stdbool.h>

/* Texts to be filtered. Prints figures; false: none. */
bool bench_run(int count, char **paths);

#endif
