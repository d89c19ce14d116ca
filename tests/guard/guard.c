/* The guard without roles: `guard exhaustive [LENGTH]`, `guard random [RUNS [SEED]]`, both against
 * the reference. Exit 0: all equal; 1: the first difference is shown. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/guard/cases.h"

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int report(const struct cases *cases, bool good, double started)
{
    printf(
        "%llu runs over %llu texts, %llu redacted, %llu refused, %llu cut, %llu random rule sets "
        "refused by the compiler, %.0f s%s%s\n",
        (unsigned long long)cases->runs, (unsigned long long)cases->texts,
        (unsigned long long)cases->redacted, (unsigned long long)cases->refused,
        (unsigned long long)cases->cut, (unsigned long long)cases->refused_rules,
        seconds() - started, good ? "" : "\nDIFFERS: ", cases->failure);
    return good ? 0 : 1;
}

int main(int argc, char **argv)
{
    static struct cases cases;
    double started = seconds();
    const char *command = argc > 1 ? argv[1] : "";
    if (strcmp(command, "exhaustive") == 0) {
        bool good = cases_exhaustive(&cases, argc > 2 ? (uint32_t)atoi(argv[2]) : 8);
        return report(&cases, good, started);
    }
    if (strcmp(command, "random") == 0) {
        uint64_t runs = argc > 2 ? strtoull(argv[2], NULL, 10) : 1000000;
        uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
        bool good = cases_random(&cases, runs, seed);
        return report(&cases, good, started);
    }
    fprintf(stderr, "usage: guard exhaustive [LENGTH] | random [RUNS [SEED]]\n");
    return 2;
}
