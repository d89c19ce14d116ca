/* The guard without roles: `guard exhaustive [LENGTH]`, `guard random [RUNS [SEED]]`,
 * `guard tokens [SEGMENTATIONS [SEED]]` with a vocabulary on stdin, all against the reference; exit
 * 0: all equal; 1: the first difference is shown. `guard classify FILE...`: how
 * fast each file is read as a prompt, and what is found in it. `guard bench FILE...`: how fast the
 * files are filtered as replies, by the number of rules. `guard messages`: each line of stdin is a
 * message in hexadecimal; the line of stdout says "passes" or "refused", then rule:start:end of all
 * that was found. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/guard/classify.h"
#include "policies/guard/rules.h"
#include "tests/guard/bench.h"
#include "tests/guard/cases.h"

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
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
        seconds(CLOCK_MONOTONIC) - started, good ? "" : "\nDIFFERS: ", cases->failure);
    return good ? 0 : 1;
}

/* A file as one message, over and over for a second of this thread's own time. */
static bool classify_file(struct cm_classifier *classifier, const struct cm_guard_pack *pack,
                          const char *path)
{
    static uint8_t text[64u << 20];
    static struct cm_findings findings;
    FILE *file = fopen(path, "re");
    size_t size = file != NULL ? fread(text, 1, sizeof(text), file) : 0;
    double started = seconds(CLOCK_PROCESS_CPUTIME_ID), taken = 0;
    uint32_t rounds = 0;
    if (file == NULL) {
        perror(path);
        return false;
    }
    fclose(file);
    for (; taken < 1; rounds++) {
        cm_classify(classifier, pack, text, size, &findings);
        taken = seconds(CLOCK_PROCESS_CPUTIME_ID) - started;
    }
    printf("%s: %zu bytes, %.1f MB/s, %.1f us each, %u found%s\n", path, size,
           (double)size * rounds / taken / 1e6, taken / rounds * 1e6,
           findings.count + findings.lost, findings.refused ? ", refused" : "");
    for (uint32_t i = 0; i < findings.count; i++) {
        const struct cm_finding *f = &findings.each[i];
        printf("  %s %u..%u: %.*s\n", f->rule, f->start, f->end,
               f->end - f->start < 200 ? (int)(f->end - f->start) : 200,
               (const char *)text + f->start);
    }
    return true;
}

static void message_line(struct cm_classifier *classifier, const struct cm_guard_pack *pack,
                         const char *line)
{
    static uint8_t text[1u << 20];
    static struct cm_findings findings;
    size_t size = 0;
    for (unsigned byte; size < sizeof(text) && sscanf(line + 2 * size, "%2x", &byte) == 1; size++) {
        text[size] = (uint8_t)byte;
    }
    cm_classify(classifier, pack, text, size, &findings);
    printf("%s", findings.refused ? "refused" : "passes");
    for (uint32_t i = 0; i < findings.count; i++) {
        const struct cm_finding *f = &findings.each[i];
        printf(" %s:%u:%u", f->rule, f->start, f->end);
    }
    putchar('\n');
}

/* Files, or without any the messages of stdin. */
static int classify(int count, char **paths)
{
    struct cm_rules rules = {0};
    struct cm_guard_pack *pack = NULL;
    struct cm_classifier *classifier = NULL;
    struct cm_error err = {.status = CM_OK};
    uint8_t *bytes = NULL;
    size_t size = 0;
    bool good = cm_rules_built_in(&rules, &err) == CM_OK &&
                cm_rules_compile(&rules, &bytes, &size, &err) == CM_OK &&
                cm_guard_pack_new(bytes, size, &pack, &err) == CM_OK &&
                cm_classifier_new(&classifier, &err) == CM_OK;
    if (!good) {
        fprintf(stderr, "%s\n", err.text);
    }
    for (int i = 0; good && i < count; i++) {
        good = classify_file(classifier, pack, paths[i]);
    }
    static char line[(2u << 20) + 2];
    while (good && count == 0 && fgets(line, sizeof(line), stdin) != NULL) {
        message_line(classifier, pack, line);
    }
    free(bytes);
    cm_guard_pack_free(pack);
    cm_classifier_free(classifier);
    cm_rules_free(&rules);
    return good ? 0 : 1;
}

int main(int argc, char **argv)
{
    static struct cases cases;
    double started = seconds(CLOCK_MONOTONIC);
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
    if (strcmp(command, "tokens") == 0) {
        struct cases_vocabulary vocabulary;
        uint32_t segmentations = argc > 2 ? (uint32_t)atoi(argv[2]) : 1000;
        bool read = cases_vocabulary_read(&vocabulary, stdin);
        bool good = read && cases_tokens(&cases, &vocabulary, segmentations,
                                         argc > 3 ? strtoull(argv[3], NULL, 10) : 1);
        printf("%u tokens: ", vocabulary.count);
        free(vocabulary.tokens);
        return report(&cases, good, started);
    }
    if (strcmp(command, "classify") == 0 || strcmp(command, "messages") == 0) {
        return classify(argc - 2, argv + 2);
    }
    if (strcmp(command, "bench") == 0) {
        return bench_run(argc - 2, argv + 2) ? 0 : 1;
    }
    fprintf(stderr,
            "usage: guard exhaustive [LENGTH] | random [RUNS [SEED]] | tokens | classify FILE... | "
            "bench FILE... | messages\n");
    return 2;
}
