/* Our engine as an arm of the bench: ours PACKAGE KEYFILE. The device alone, as the worker drives
 * it; CASEMATE_CPU and CASEMATE_THREADS force path and threads, CASEMATE_PROMPTS=bf16 class P. */
#include "bench/arm.h"

#include <stdio.h>

#include "tests/engine/open.h"

#define CHUNK      512u /* tokens of one step, as llama.cpp's n_ubatch */
#define LONG_PAGES (ARM_CONTEXT / CM_KV_PAGE_POSITIONS)
#define PAGES      (ARM_STREAM_SPACE / CM_KV_PAGE_POSITIONS)

static struct engine engine;
static uint32_t slots[1 + ARM_STREAMS];

static struct cm_step_entry entry_of(uint32_t sequence, uint32_t position, const uint32_t *tokens,
                                     uint32_t count)
{
    return (struct cm_step_entry){
        .slot = slots[sequence],
        .position = position,
        .token_count = count,
        .tokens = tokens,
        .pages = engine.pages + (sequence == 0 ? 0 : LONG_PAGES + (sequence - 1) * PAGES),
        .page_count = sequence == 0 ? LONG_PAGES : PAGES,
        .sample = true};
}

static void run(const struct cm_step_entry *entries, uint32_t count)
{
    static struct cm_step_result results[1 + ARM_STREAMS];
    static struct cm_error err;
    engine_must(cm_device_step_submit(engine.device, entries, count, &err), &err);
    engine_must(cm_device_step_wait(engine.device, results, count, &err), &err);
}

void arm_prompt(uint32_t sequence, uint32_t position, const uint32_t *tokens, uint32_t count)
{
    for (uint32_t at = 0; at < count; at += CHUNK) {
        uint32_t take = count - at < CHUNK ? count - at : CHUNK;
        struct cm_step_entry entry = entry_of(sequence, position + at, tokens + at, take);
        entry.prompt = true;
        entry.sample = at + take == count;
        run(&entry, 1);
    }
}

void arm_step(uint32_t first, uint32_t count, uint32_t position, uint32_t token)
{
    struct cm_step_entry entries[ARM_STREAMS];
    for (uint32_t i = 0; i < count; i++) {
        entries[i] = entry_of(first + i, position, &token, 1);
    }
    run(entries, count);
}

int main(int count, char **words)
{
    struct cm_device_facts facts;
    const struct engine_limits limits = {1 + ARM_STREAMS, ARM_CONTEXT,
                                         LONG_PAGES + ARM_STREAMS * PAGES, CHUNK};
    if (count != 3) {
        fprintf(stderr, "usage: ours PACKAGE KEYFILE\n");
        return 2;
    }
    engine_open(&engine, words[1], words[2], &limits);
    for (uint32_t i = 0; i <= ARM_STREAMS; i++) {
        slots[i] = engine_slot(&engine);
    }
    cm_device_describe(engine.device, &facts);
    printf("{\"name\": \"%s\", \"load_ms\": %.1f, \"read_ms\": %.1f, \"verify_ms\": %.1f, "
           "\"decrypt_ms\": %.1f, \"weight_bytes\": %llu, \"kv_bytes_per_position\": %llu}\n",
           facts.name, (double)engine.times.total_us / 1e3, (double)engine.times.read_us / 1e3,
           (double)engine.times.verify_us / 1e3, (double)engine.times.decrypt_us / 1e3,
           (unsigned long long)cm_package_head_of(engine.package)->core.payload_bytes,
           (unsigned long long)facts.kv_page_bytes / CM_KV_PAGE_POSITIONS);
    fflush(stdout);
    int status = arm_serve(engine.manifest.vocabulary);
    engine_close(&engine);
    return status;
}
