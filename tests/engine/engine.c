/* The engine for tests, without roles: a package, its key, token ids in; logits or tokens out.
 * engine logits PACKAGE KEYFILE [FIRST]  stdin: u32 count, tokens; stdout: from position FIRST on,
 *                                        vocabulary f32 each
 * engine greedy PACKAGE KEYFILE N CHUNK  stdin the same; stdout: N tokens, one a line
 * engine guard PACKAGE KEYFILE           decode with the built-in rules ÷ without, as JSON
 * engine adapter PACKAGE KEYFILE         decode and prefill with the adapter ÷ without, as JSON
 * CASEMATE_CPU and CASEMATE_THREADS force path and threads, CASEMATE_PROMPTS=bf16 class P;
 * CASEMATE_ADAPTER and
 * CASEMATE_ADAPTER_KEY give slots an adapter. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "policies/guard/rules.h"
#include "tests/engine/open.h"

#define CONTEXT 4608u
#define CHUNK   256u

static struct cm_error err;

static void must(enum cm_status status)
{
    engine_must(status, &err);
}

static struct cm_step_result part_step(struct engine *e, uint32_t slot, uint32_t position,
                                       const uint32_t *tokens, uint32_t count, bool prompt,
                                       bool sample)
{
    static struct cm_step_result result;
    struct cm_step_entry entry = {.slot = slot,
                                  .position = position,
                                  .token_count = count,
                                  .tokens = tokens,
                                  .pages = e->pages,
                                  .page_count = e->page_count,
                                  .prompt = prompt,
                                  .sample = sample};
    must(cm_device_step_submit(e->device, &entry, 1, &err));
    must(cm_device_step_wait(e->device, &result, 1, &err));
    return result;
}

/* A piece of a prompt. */
static struct cm_step_result read_step(struct engine *e, uint32_t slot, uint32_t position,
                                       const uint32_t *tokens, uint32_t count, bool sample)
{
    return part_step(e, slot, position, tokens, count, true, sample);
}

/* A reply's next token, after this one. */
static uint32_t reply_step(struct engine *e, uint32_t slot, uint32_t position, uint32_t token)
{
    return part_step(e, slot, position, &token, 1, false, true).token;
}

static uint32_t tokens_read(uint32_t **ret_tokens)
{
    uint32_t count;
    if (fread(&count, sizeof(count), 1, stdin) != 1 || count == 0 || count > CONTEXT) {
        exit(2);
    }
    *ret_tokens = calloc(count, sizeof(uint32_t));
    if (fread(*ret_tokens, sizeof(uint32_t), count, stdin) != count) {
        exit(2);
    }
    return count;
}

/* Logits from position `first` on; what is before it is stepped without a look. */
static void logits_run(struct engine *e, uint32_t first)
{
    uint32_t *tokens, slot = engine_slot(e), count = tokens_read(&tokens);
    uint32_t vocabulary = e->manifest.vocabulary;
    float *probe = calloc((size_t)CHUNK * vocabulary, sizeof(float));
    for (uint32_t at = 0, take; at < count; at += take) {
        uint32_t end = at < first && first < count ? first : count;
        take = end - at < CHUNK ? end - at : CHUNK;
        e->device->probe = at < first ? NULL : probe;
        read_step(e, slot, at, tokens + at, take, false);
        if (at >= first) {
            fwrite(probe, sizeof(float), (size_t)take * vocabulary, stdout);
        }
    }
    e->device->probe = probe;
}

static void greedy_run(struct engine *e, uint32_t want, uint32_t chunk)
{
    uint32_t *tokens, slot = engine_slot(e), count = tokens_read(&tokens), next = 0, at = 0;
    while (at < count) {
        uint32_t take = count - at < chunk ? count - at : chunk;
        next = read_step(e, slot, at, tokens + at, take, at + take == count).token;
        at += take;
    }
    for (uint32_t i = 0; i < want; i++, at++) {
        printf("%u\n", next);
        next = reply_step(e, slot, at, next);
    }
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int speed_order(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

/* Decode with the built-in rules and without, in turns: only the rules differ. */
static void guard_run(struct engine *e)
{
    enum { ROUNDS = 15, PROMPT = 16, DECODES = 96 };
    struct cm_rules rules = {.count = 0};
    struct cm_guard_pack *pack;
    uint8_t *bytes;
    size_t size;
    double speeds[2][ROUNDS];
    must(cm_rules_built_in(&rules, &err));
    must(cm_rules_compile(&rules, &bytes, &size, &err));
    must(cm_device_guard_bind(e->device, bytes, size, &err));
    pack = e->device->guard;
    for (int i = 0; i < 2 * ROUNDS; i++) {
        uint32_t prompt[PROMPT], slot = engine_slot(e), next;
        e->device->guard = i % 2 == 0 ? pack : NULL;
        for (uint32_t k = 0; k < PROMPT; k++) {
            prompt[k] = 300 + 7 * k;
        }
        next = read_step(e, slot, 0, prompt, PROMPT, true).token;
        double started = seconds();
        for (uint32_t k = 0; k < DECODES; k++) {
            next = reply_step(e, slot, PROMPT + k, next);
        }
        speeds[i % 2][i / 2] = DECODES / (seconds() - started);
        cm_device_slot_close(e->device, slot);
    }
    e->device->guard = pack;
    for (int arm = 0; arm < 2; arm++) {
        qsort(speeds[arm], ROUNDS, sizeof(double), speed_order);
    }
    printf("{\"decode_guard_on\": %.1f, \"decode_guard_off\": %.1f, \"on_by_off\": %.4f, "
           "\"best_on_by_off\": %.4f}\n",
           speeds[0][ROUNDS / 2], speeds[1][ROUNDS / 2],
           speeds[0][ROUNDS / 2] / speeds[1][ROUNDS / 2],
           speeds[0][ROUNDS - 1] / speeds[1][ROUNDS - 1]);
    free(bytes);
    cm_rules_free(&rules);
}

/* Tokens a second of reading PROMPT tokens and of decoding behind them. */
enum { ADAPTER_PROMPT = 256, ADAPTER_DECODES = 96, ADAPTER_ROUNDS = 11 };
static void adapter_round(struct engine *e, double speeds[2])
{
    uint32_t prompt[ADAPTER_PROMPT], slot = engine_slot(e), next;
    for (uint32_t k = 0; k < ADAPTER_PROMPT; k++) {
        prompt[k] = 300 + 7 * k;
    }
    double started = seconds();
    next = read_step(e, slot, 0, prompt, ADAPTER_PROMPT, true).token;
    double read = seconds();
    for (uint32_t k = 0; k < ADAPTER_DECODES; k++) {
        next = reply_step(e, slot, ADAPTER_PROMPT + k, next);
    }
    speeds[0] = ADAPTER_PROMPT / (read - started);
    speeds[1] = ADAPTER_DECODES / (seconds() - read);
    cm_device_slot_close(e->device, slot);
}

/* With the adapter and without, in turns. */
static void adapter_run(struct engine *e)
{
    static double found[2][2][ADAPTER_ROUNDS]; /* prefill, decode; without, with */
    const uint32_t adapter = e->adapter;
    for (int i = -2; i < 2 * ADAPTER_ROUNDS; i++) { /* the first two warm up */
        double speeds[2];
        e->adapter = i % 2 == 0 ? CM_ADAPTER_NONE : adapter;
        adapter_round(e, speeds);
        for (int what = 0; what < 2 && i >= 0; what++) {
            found[what][i % 2][i / 2] = speeds[what];
        }
    }
    for (int what = 0; what < 2; what++) {
        double middle[2];
        for (int arm = 0; arm < 2; arm++) {
            qsort(found[what][arm], ADAPTER_ROUNDS, sizeof(double), speed_order);
            middle[arm] = found[what][arm][ADAPTER_ROUNDS / 2];
        }
        printf("%s\"%s_without\": %.1f, \"%s_with\": %.1f, \"%s_with_by_without\": %.4f%s",
               what == 0 ? "{" : ", ", what == 0 ? "prefill" : "decode", middle[0],
               what == 0 ? "prefill" : "decode", middle[1], what == 0 ? "prefill" : "decode",
               middle[1] / middle[0], what == 0 ? "" : "}\n");
    }
}

int main(int count, char **words)
{
    static struct engine engine;
    const struct engine_limits limits = {1, CONTEXT, CONTEXT / CM_KV_PAGE_POSITIONS, CHUNK};
    bool logits = count >= 4 && strcmp(words[1], "logits") == 0;
    bool greedy = count == 6 && strcmp(words[1], "greedy") == 0;
    bool guard = count == 4 && strcmp(words[1], "guard") == 0;
    bool adapter = count == 4 && strcmp(words[1], "adapter") == 0;
    if (!logits && !greedy && !guard && !adapter) {
        fprintf(stderr, "usage: engine logits PACKAGE KEYFILE | greedy PACKAGE KEYFILE N CHUNK | "
                        "guard PACKAGE KEYFILE | adapter PACKAGE KEYFILE\n");
        return 2;
    }
    engine_open(&engine, words[2], words[3], &limits);
    if (logits) {
        logits_run(&engine, count > 4 ? (uint32_t)atoi(words[4]) : 0);
    } else if (guard) {
        guard_run(&engine);
    } else if (adapter) {
        adapter_run(&engine);
    } else {
        greedy_run(&engine, (uint32_t)atoi(words[4]), (uint32_t)atoi(words[5]));
    }
    free(engine.device->probe);
    engine_close(&engine);
    return 0;
}
