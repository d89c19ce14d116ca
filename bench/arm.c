#include "bench/arm.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define STEPS_MAX 4096u

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static uint32_t token_of(uint32_t vocabulary, uint32_t i)
{
    return 100 + (i * 7919) % (vocabulary - 100);
}

/* The JSON line: tokens, seconds, CPU seconds of all threads, and the steps' spread. */
static void print(uint32_t tokens, double wall, double cpu, double *steps, uint32_t count)
{
    qsort(steps, count, sizeof(*steps), compare);
    printf("{\"tokens\": %u, \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"step_median_ms\": %.4f, "
           "\"step_slowest_ms\": %.4f}\n",
           tokens, wall, cpu, 1e3 * steps[count / 2], 1e3 * steps[count - 1]);
    fflush(stdout);
}

static void prefill(uint32_t vocabulary, uint32_t count)
{
    static uint32_t tokens[ARM_CONTEXT];
    for (uint32_t i = 0; i < count; i++) {
        tokens[i] = token_of(vocabulary, i);
    }
    double wall = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
    arm_prompt(0, 0, tokens, count);
    cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    wall = seconds(CLOCK_MONOTONIC) - wall;
    print(count, wall, cpu, &wall, 1);
}

static void steps_run(uint32_t vocabulary, uint32_t first, uint32_t streams, uint32_t context,
                      uint32_t count)
{
    static double steps[STEPS_MAX];
    double cpu = seconds(CLOCK_PROCESS_CPUTIME_ID), begun = seconds(CLOCK_MONOTONIC),
           before = begun;
    for (uint32_t i = 0; i < count; i++) {
        arm_step(first, streams, context + i, token_of(vocabulary, i));
        double now = seconds(CLOCK_MONOTONIC);
        steps[i] = now - before;
        before = now;
    }
    cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    print(count * streams, before - begun, cpu, steps, count);
}

/* The prompt stays in sequence 0 for the next round. */
static void decode(uint32_t vocabulary, uint32_t context, uint32_t count)
{
    static uint32_t filled, tokens[ARM_CONTEXT];
    for (uint32_t i = 0; i < context; i++) {
        tokens[i] = token_of(vocabulary, i);
    }
    if (filled < context || context < 64) {
        arm_prompt(0, 0, tokens, context);
        filled = context;
    }
    steps_run(vocabulary, 0, 1, context, count);
}

static void streams(uint32_t vocabulary, uint32_t sequences, uint32_t count)
{
    uint32_t tokens[16];
    for (uint32_t i = 0; i < 16; i++) {
        tokens[i] = token_of(vocabulary, i);
    }
    for (uint32_t s = 1; s <= sequences; s++) {
        arm_prompt(s, 0, tokens, 16);
    }
    steps_run(vocabulary, 1, sequences, 16, count);
}

int arm_serve(uint32_t vocabulary)
{
    char line[128];
    unsigned a, b;
    while (fgets(line, sizeof(line), stdin) != NULL) {
        if (sscanf(line, "prefill %u", &a) == 1 && a >= 1 && a <= ARM_CONTEXT) {
            prefill(vocabulary, a);
        } else if (sscanf(line, "decode %u %u", &a, &b) == 2 && a >= 1 && b >= 1 &&
                   b <= STEPS_MAX && a + b <= ARM_CONTEXT) {
            decode(vocabulary, a, b);
        } else if (sscanf(line, "streams %u %u", &a, &b) == 2 && a >= 1 && a <= ARM_STREAMS &&
                   b >= 1 && b + 16 <= ARM_STREAM_SPACE) {
            streams(vocabulary, a, b);
        } else {
            fprintf(stderr, "arm: cannot do: %s", line);
            return 2;
        }
    }
    return 0;
}
