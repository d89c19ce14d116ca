/* The engine for tests and benches, without roles: a package, its key, token ids in; logits, tokens
 * or times out. engine logits PACKAGE KEYFILE            stdin: u32 count, tokens; stdout: count ×
 * vocabulary f32 engine greedy PACKAGE KEYFILE N CHUNK    stdin the same; stdout: N tokens, one a
 * line engine bench  PACKAGE KEYFILE            prefill of 512 and 128 decodes, figures as JSON
 * CASEMATE_CPU and CASEMATE_THREADS force path and threads. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cpu/cpu_internal.h"
#include "loader/stream/stream.h"
#include "runtime/worker/bind.h"

#define CONTEXT 4608u
#define CHUNK   256u

static struct cm_error err;

static void must(enum cm_status status)
{
    if (status != CM_OK) {
        fprintf(stderr, "engine: %s (%s)\n", err.text, err.id);
        exit(cm_status_exit_code(status));
    }
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

struct engine {
    struct cm_device *device;
    struct cm_package *package;
    struct cm_manifest manifest;
    struct cm_worker_model model;
    struct cm_stream_times times;
    uint32_t pages[CONTEXT / CM_KV_PAGE_POSITIONS];
    uint32_t page_count;
};

static void engine_open(struct engine *e, const char *path, const char *key_path)
{
    uint8_t key[CM_KEY_BYTES];
    size_t bytes;
    int key_fd = open(key_path, O_RDONLY), fd = open(path, O_RDONLY);
    const char *threads = getenv("CASEMATE_THREADS");
    struct cm_device_options options = {.threads = threads ? (uint32_t)atoi(threads) : 0,
                                        .path = getenv("CASEMATE_CPU")};
    if (key_fd < 0 || fd < 0 || read(key_fd, key, sizeof(key)) != (ssize_t)sizeof(key)) {
        fprintf(stderr, "engine: cannot read %s or %s\n", path, key_path);
        exit(9);
    }
    uint8_t *head = malloc(CM_PACKAGE_HEAD_BYTES);
    struct cm_package_head *parsed = malloc(sizeof(*parsed));
    if (head == NULL || parsed == NULL || pread(fd, head, CM_PACKAGE_HEAD_BYTES, 0) < 0) {
        exit(9);
    }
    must(cm_package_head_parse(head, CM_PACKAGE_HEAD_BYTES, parsed, &err));
    must(cm_package_open(fd, key, parsed->core.owner_key, &e->package, &err));
    const struct cm_package_core *core = &cm_package_head_of(e->package)->core;
    const uint8_t *manifest = cm_package_manifest(e->package, &bytes);
    must(cm_manifest_parse(manifest, bytes, core->payload_bytes, &e->manifest, &err));
    must(cm_worker_model_make(&e->manifest, &e->model, &err));
    must(cm_device_open("cpu", &options, &e->device, &err));
    e->page_count = CONTEXT / CM_KV_PAGE_POSITIONS;
    struct cm_device_reserve reserve = {.model = &e->model.model,
                                        .payload_bytes = core->payload_bytes,
                                        .segment_bytes = core->segment_bytes,
                                        .slots = 8,
                                        .kv_pages = e->page_count,
                                        .context_max = CONTEXT,
                                        .step_tokens_max = CHUNK};
    must(cm_device_reserve(e->device, &reserve, &err));
    const struct cm_stream_options stream = {.threads = 2};
    must(cm_stream_load(e->package, fd, e->device, &stream, &e->times, &err));
    must(cm_device_model_bind(e->device, &e->model.model, &err));
    for (uint32_t i = 0; i < e->page_count; i++) {
        e->pages[i] = e->page_count - 1 - i; /* any order must do */
    }
    free(head);
    free(parsed);
    close(fd);
    close(key_fd);
}

static uint32_t slot_open(struct engine *e)
{
    uint32_t slot;
    struct cm_slot_params params = {.sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f},
                                    .max_tokens = UINT32_MAX,
                                    .ignore_eos = true};
    must(cm_device_slot_open(e->device, &params, &slot, &err));
    return slot;
}

static struct cm_step_result step(struct engine *e, uint32_t slot, uint32_t position,
                                  const uint32_t *tokens, uint32_t count, bool sample)
{
    static struct cm_step_result result;
    struct cm_step_entry entry = {.slot = slot,
                                  .position = position,
                                  .token_count = count,
                                  .tokens = tokens,
                                  .pages = e->pages,
                                  .page_count = e->page_count,
                                  .sample = sample};
    must(cm_device_step_submit(e->device, &entry, 1, &err));
    must(cm_device_step_wait(e->device, &result, 1, &err));
    return result;
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

static void logits_run(struct engine *e)
{
    uint32_t *tokens, slot = slot_open(e), count = tokens_read(&tokens);
    uint32_t vocabulary = e->manifest.vocabulary;
    e->device->probe = calloc((size_t)CHUNK * vocabulary, sizeof(float));
    for (uint32_t at = 0; at < count; at += CHUNK) {
        uint32_t take = count - at < CHUNK ? count - at : CHUNK;
        step(e, slot, at, tokens + at, take, false);
        fwrite(e->device->probe, sizeof(float), (size_t)take * vocabulary, stdout);
    }
}

static void greedy_run(struct engine *e, uint32_t want, uint32_t chunk)
{
    uint32_t *tokens, slot = slot_open(e), count = tokens_read(&tokens), next = 0, at = 0;
    while (at < count) {
        uint32_t take = count - at < chunk ? count - at : chunk;
        next = step(e, slot, at, tokens + at, take, at + take == count).token;
        at += take;
    }
    for (uint32_t i = 0; i < want; i++, at++) {
        printf("%u\n", next);
        next = step(e, slot, at, &next, 1, true).token;
    }
}

static void bench_run(struct engine *e)
{
    uint32_t tokens[512], slot = slot_open(e), at = 0, next = 0;
    struct cm_device_facts facts;
    for (uint32_t i = 0; i < 512; i++) {
        tokens[i] = 100 + (i * 7919) % (e->manifest.vocabulary - 100);
    }
    double start = seconds();
    for (; at < 512; at += CHUNK) {
        next = step(e, slot, at, tokens + at, CHUNK, at + CHUNK == 512).token;
    }
    double prefill = seconds() - start;
    slot = slot_open(e);
    next = step(e, slot, 0, tokens, 16, true).token;
    start = seconds();
    for (at = 16; at < 16 + 128; at++) {
        next = step(e, slot, at, &next, 1, true).token;
    }
    double decode = seconds() - start;
    cm_device_describe(e->device, &facts);
    printf(
        "{\"device\": \"%s\", \"prefill_512_tokens_per_s\": %.1f, \"decode_tokens_per_s\": %.1f, "
        "\"load_ms\": %.1f, \"read_ms\": %.1f, \"verify_ms\": %.1f, \"decrypt_ms\": %.1f}\n",
        facts.name, 512 / prefill, 128 / decode, (double)e->times.total_us / 1e3,
        (double)e->times.read_us / 1e3, (double)e->times.verify_us / 1e3,
        (double)e->times.decrypt_us / 1e3);
}

int main(int count, char **words)
{
    static struct engine engine;
    if (count < 4) {
        fprintf(stderr, "usage: engine logits|greedy|bench PACKAGE KEYFILE …\n");
        return 2;
    }
    engine_open(&engine, words[2], words[3]);
    if (strcmp(words[1], "logits") == 0) {
        logits_run(&engine);
    } else if (strcmp(words[1], "greedy") == 0 && count == 6) {
        greedy_run(&engine, (uint32_t)atoi(words[4]), (uint32_t)atoi(words[5]));
    } else {
        bench_run(&engine);
    }
    free(engine.device->probe);
    cm_device_close(engine.device);
    cm_worker_model_done(&engine.model);
    cm_manifest_done(&engine.manifest);
    cm_package_close(engine.package);
    return 0;
}
