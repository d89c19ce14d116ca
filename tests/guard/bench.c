/* How fast the output filter is, and the compiler: `guard bench FILE…`. Arms are interleaved; the
 * text comes in pieces of four bytes, about as tokens do. */
#include "tests/guard/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/guard/guard.h"
#include "policies/guard/rules.h"

#define ROUNDS      9
#define PIECE       4u
#define ROUND_BYTES (4u << 20)

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* The built-in output rules, then made-up providers up to `count`: a prefix of their own, a key. */
static struct cm_guard_pack *pack_make(uint32_t count, double *ret_compile_ms)
{
    static const char *const tails[] = {"[A-Za-z0-9]{20,}", "[0-9a-f]{32}(?![0-9a-f])",
                                        "[A-Za-z0-9_-]{24}\\.[A-Za-z0-9_-]{6,40}",
                                        "[A-Z2-7]{16,52}", "(live|test)_[A-Za-z0-9]{16,}"};
    struct cm_rules rules = {.count = 0};
    struct cm_guard_pack *pack = NULL;
    struct cm_error err;
    uint8_t *bytes = NULL;
    size_t size, used = 0, room = 400u * count + 100;
    char *yaml = malloc(room);
    bool built_in;
    if (cm_rules_built_in(&rules, &err) != CM_OK) {
        abort();
    }
    used += (size_t)snprintf(yaml, room, "rules:\n");
    for (uint32_t i = rules.count; i < count; i++) {
        used += (size_t)snprintf(
            yaml + used, room - used,
            "  - {id: made-up-%u, class: output, category: secret, pattern: "
            "'%c%c%c%u_%s', action: redact, replacement: '[x]', positive: [a], "
            "negative: [b]}\n",
            i, 'a' + i % 26, 'a' + i / 26 % 26, 'a' + i / 7 % 26, i % 97, tails[i % 5]);
    }
    if (count > rules.count &&
        cm_rules_read(&rules, "bench", (const uint8_t *)yaml, used, &built_in, &err) != CM_OK) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    double started = seconds();
    if (cm_rules_compile(&rules, &bytes, &size, &err) != CM_OK ||
        cm_guard_pack_new(bytes, size, &pack, &err) != CM_OK) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    *ret_compile_ms = 1e3 * (seconds() - started);
    printf("%u rules: pack of %zu bytes, hold at most %u bytes, compiled and read in %.1f ms\n",
           rules.count, size, pack->hold_bytes, *ret_compile_ms);
    free(bytes);
    free(yaml);
    cm_rules_free(&rules);
    return pack;
}

/* One round; what is held after each piece goes into `held`, by bytes. */
static double round_run(const struct cm_guard_pack *pack, const uint8_t *text, size_t size,
                        uint64_t *held)
{
    static struct cm_guard_state state;
    static uint8_t out[CM_GUARD_OUT_BYTES(CM_GUARD_RING + PIECE)];
    double started = seconds();
    cm_guard_begin(&state, CM_GUARD_OUTPUT);
    for (size_t taken = 0, at = 0; taken < ROUND_BYTES; taken += PIECE, at += PIECE) {
        uint32_t used = 0;
        at = at + PIECE > size ? 0 : at;
        if (!cm_guard_feed(pack, &state, text + at, PIECE, out, &used)) {
            abort(); /* the built-in rules refuse nothing */
        }
        state.verdict_count = 0;
        held[cm_guard_held(&state)]++;
    }
    return ROUND_BYTES / (seconds() - started) / 1e6;
}

static int order(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

static uint32_t percentile(const uint64_t *held, uint64_t total, uint32_t thousandths)
{
    uint64_t seen = 0;
    uint32_t bytes = 0;
    for (; bytes < CM_GUARD_RING; bytes++) {
        seen += held[bytes];
        if (seen * 1000 >= total * thousandths) {
            break;
        }
    }
    return bytes;
}

bool bench_run(int count, char **paths)
{
    static const uint32_t rule_counts[] = {0, 200, 2000};
    static uint8_t text[1u << 20];
    static uint64_t held[3][CM_GUARD_RING];
    struct cm_guard_pack *packs[3];
    double speeds[3][ROUNDS], compile_ms[3];
    size_t size = 0;
    for (int i = 0; i < count; i++) {
        FILE *file = fopen(paths[i], "re");
        if (file == NULL) {
            perror(paths[i]);
            return false;
        }
        size += fread(text + size, 1, sizeof(text) - size, file);
        fclose(file);
    }
    if (size < PIECE) {
        fprintf(stderr, "guard bench: no text\n");
        return false;
    }
    for (int arm = 0; arm < 3; arm++) {
        packs[arm] = pack_make(rule_counts[arm], &compile_ms[arm]);
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int arm = 0; arm < 3; arm++) {
            speeds[arm][round] = round_run(packs[arm], text, size, held[arm]);
        }
    }
    for (int arm = 0; arm < 3; arm++) {
        uint64_t total = (uint64_t)ROUNDS * ROUND_BYTES / PIECE;
        qsort(speeds[arm], ROUNDS, sizeof(double), order);
        printf("{\"rules\": %u, \"mb_per_s\": %.1f, \"least\": %.1f, \"greatest\": %.1f, "
               "\"compile_ms\": %.1f, \"held_bytes_p50\": %u, \"held_bytes_p99\": %u}\n",
               packs[arm]->rule_count, speeds[arm][ROUNDS / 2], speeds[arm][0],
               speeds[arm][ROUNDS - 1], compile_ms[arm], percentile(held[arm], total, 500),
               percentile(held[arm], total, 990));
        cm_guard_pack_free(packs[arm]);
    }
    printf("time with 10 times the rules: %.2f\n", speeds[1][ROUNDS / 2] / speeds[2][ROUNDS / 2]);
    return true;
}
