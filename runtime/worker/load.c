/* Loading: the only phase in which the worker holds a key. */
#include "runtime/worker/worker.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "runtime/base/hex.h"
#include "runtime/base/clock.h"

struct reporter {
    struct cm_worker *worker;
    struct cm_progress progress;
    uint64_t started_us, stage_started_us, said_us;
};

static void progress_send(struct reporter *reporter)
{
    const uint64_t now = cm_clock_us();
    struct cm_progress *progress = &reporter->progress;
    progress->stage_us[progress->stage] += now - reporter->stage_started_us;
    progress->elapsed_us = now - reporter->started_us;
    reporter->stage_started_us = reporter->said_us = now;
    /* A full socket loses a progress line, nothing else. */
    (void)!cm_channel_send(&reporter->worker->channel, CM_FRAME_PROGRESS, progress,
                           sizeof(*progress), NULL, 0, NULL);
}

static void stage_begin(struct reporter *reporter, enum cm_load_stage stage)
{
    const uint64_t now = cm_clock_us();
    reporter->progress.stage_us[reporter->progress.stage] += now - reporter->stage_started_us;
    reporter->stage_started_us = now;
    reporter->progress.stage = (uint32_t)stage;
    progress_send(reporter);
}

static void bytes_report(void *context, uint64_t done, uint64_t total)
{
    struct reporter *reporter = context;
    reporter->progress.bytes_done = done;
    reporter->progress.bytes_total = total;
    if (done == total || cm_clock_us() - reporter->said_us > 50000) {
        progress_send(reporter);
    }
}

/* Copy the key out of the page; the page is wiped at once, for both sides. */
static enum cm_status key_take(int fd, struct cm_secret **ret_key, struct cm_error *err)
{
    uint8_t *page;
    struct cm_secret *key;
    enum cm_status status = cm_key_page_map(fd, &page, err);
    if (status != CM_OK) {
        return status;
    }
    status = cm_secret_new(CM_KEY_BYTES, &key, err);
    if (status == CM_OK) {
        memcpy(cm_secret_bytes(key), page, CM_KEY_BYTES);
        *ret_key = key;
    }
    cm_wipe(page, CM_KEY_PAGE_BYTES);
    cm_key_page_unmap(page);
    return status;
}

static enum cm_status package_open(struct cm_worker *worker, struct cm_error *err)
{
    struct cm_secret *key = NULL;
    size_t bytes;
    enum cm_status status = key_take(worker->key_page, &key, err);
    if (status == CM_OK) {
        status = cm_package_open(CM_FD_INPUT, cm_secret_view(key), worker->config.owner_key,
                                 &worker->package, err);
    }
    cm_secret_free(key);
    if (status == CM_OK) {
        const struct cm_package_core *core = &cm_package_head_of(worker->package)->core;
        const uint8_t *manifest = cm_package_manifest(worker->package, &bytes);
        status = cm_manifest_parse(manifest, bytes, core->payload_bytes, &worker->manifest, err);
    }
    return status == CM_OK ? cm_worker_model_make(&worker->manifest, worker->config.context_max,
                                                  &worker->model, err)
                           : status;
}

/* Beside the arena: manifest, tokenizer, scheduler, rings, program. Held to by test_pressure.py. */
#define MEMORY_BESIDE_BYTES (64ull << 20)

/* What does not fit is refused now, not killed later. */
static enum cm_status memory_check(const struct cm_worker *worker,
                                   const struct cm_device_reserve *reserve, struct cm_error *err)
{
    uint64_t arena, page;
    const uint64_t limit = worker->config.memory_bytes_max;
    enum cm_status status = cm_device_need(worker->device, reserve, &arena, &page, err);
    if (status == CM_OK && limit > 0 && arena + MEMORY_BESIDE_BYTES > limit) {
        return cm_error_set(err, CM_E_CONFIG, "CM-WRK-MEMORY",
                            "model and cache need %llu MiB (weights %llu, %u KV pages %llu), this "
                            "machine or its control group allows %llu MiB: lower kv_bytes, "
                            "sequences_max or context_max, or allow more",
                            (unsigned long long)((arena + MEMORY_BESIDE_BYTES) >> 20),
                            (unsigned long long)(reserve->payload_bytes >> 20), reserve->kv_pages,
                            (unsigned long long)(reserve->kv_pages * page >> 20),
                            (unsigned long long)(limit >> 20));
    }
    return status;
}

/* Fill the limits: what the configuration leaves open follows from the model. */
static enum cm_status limits_make(struct cm_worker *worker, struct cm_device_reserve *ret_reserve,
                                  struct cm_error *err)
{
    const struct cm_config_worker *config = &worker->config;
    const struct cm_package_core *core = &cm_package_head_of(worker->package)->core;
    const struct cm_model *model = &worker->model.model;
    uint32_t context = model->context_max;
    uint64_t arena, page;
    if (config->context_max != 0 && config->context_max < context) {
        context = config->context_max;
    }
    *ret_reserve =
        (struct cm_device_reserve){.model = model,
                                   .payload_bytes = core->payload_bytes,
                                   .segment_bytes = core->segment_bytes,
                                   .slots = config->sequences_max,
                                   .kv_pages = 1,
                                   .kv_kind = config->kv_int8 == 1 ? CM_KV_INT8 : CM_KV_FP16,
                                   .context_max = context,
                                   .step_tokens_max = config->step_tokens_max};
    if (config->adapters_max > 0) {
        ret_reserve->adapters = config->adapters_max;
        ret_reserve->adapter_bytes = config->adapter_bytes_max;
        ret_reserve->adapter_rank_max = config->adapter_rank_max;
    }
    enum cm_status status = cm_device_need(worker->device, ret_reserve, &arena, &page, err);
    if (status != CM_OK) {
        return status;
    }
    uint64_t pages = config->kv_pages != 0 ? config->kv_pages : config->kv_bytes / page;
    if (pages == 0) {
        return cm_error_set(
            err, CM_E_CONFIG, "CM-WRK-KV",
            "kv_bytes %llu is less than one KV page of this model (%llu bytes): give at "
            "least that",
            (unsigned long long)config->kv_bytes, (unsigned long long)page);
    }
    ret_reserve->kv_pages = (uint32_t)(pages < 1u << 24 ? pages : 1u << 24);
    worker->limits = (struct cm_scheduler_limits){.sequences_max = config->sequences_max,
                                                  .queue_max = config->queue_max,
                                                  .kv_pages = ret_reserve->kv_pages,
                                                  .context_max = context,
                                                  .step_tokens_max = config->step_tokens_max,
                                                  .prefix_cache = config->prefix_cache == 1,
                                                  .steps_bounded = true};
    return memory_check(worker, ret_reserve, err);
}

static void hello_make(struct cm_worker *worker)
{
    struct cm_device_facts facts;
    struct cm_wire_hello *hello = &worker->hello;
    const struct cm_manifest_text *name = &worker->manifest.model_name;
    const uint8_t *digest = cm_package_head_of(worker->package)->core.core_digest;
    cm_device_describe(worker->device, &facts);
    if (worker->config.model_name[0] != '\0') {
        snprintf(hello->model_name, sizeof(hello->model_name), "%s", worker->config.model_name);
    } else {
        snprintf(hello->model_name, sizeof(hello->model_name), "%.*s", (int)name->size,
                 name->bytes);
    }
    cm_hex_write(digest, CM_DIGEST_BYTES, hello->package_digest);
    snprintf(hello->device, sizeof(hello->device), "%.62s", facts.name);
    hello->context_max = worker->limits.context_max;
    hello->vocabulary = worker->manifest.vocabulary;
    hello->sequences_max = worker->limits.sequences_max;
    hello->queue_max = worker->limits.queue_max;
    hello->kv_pages = worker->limits.kv_pages;
    hello->kv_page_positions = CM_KV_PAGE_POSITIONS;
    hello->kv_page_bytes = facts.kv_page_bytes;
    hello->kv_int8 = worker->config.kv_int8;
    hello->created_unix_s = (uint64_t)time(NULL);
}

static enum cm_status weights_load(struct cm_worker *worker, struct reporter *reporter,
                                   struct cm_loaded *ret_loaded, struct cm_error *err)
{
    struct cm_device_reserve reserve;
    struct cm_device_facts facts;
    struct cm_stream_times times;
    reporter->progress.bytes_total = cm_package_head_of(worker->package)->core.payload_bytes;
    stage_begin(reporter, CM_LOAD_RESERVE);
    enum cm_status status = limits_make(worker, &reserve, err);
    if (status == CM_OK) {
        status = cm_device_reserve(worker->device, &reserve, err);
    }
    if (status == CM_OK) {
        cm_device_describe(worker->device, &facts);
        stage_begin(reporter, CM_LOAD_WEIGHTS);
        const struct cm_stream_options stream = {
            .threads = facts.threads, .progress = bytes_report, .progress_context = reporter};
        status = cm_stream_load(worker->package, CM_FD_INPUT, worker->device, &stream, &times, err);
    }
    if (status == CM_OK) {
        stage_begin(reporter, CM_LOAD_BIND);
        status = cm_device_model_bind(worker->device, &worker->model.model, err);
    }
    if (status == CM_OK) {
        *ret_loaded = (struct cm_loaded){.arena_locked = facts.arena_locked,
                                         .bytes = times.bytes,
                                         .read_us = times.read_us,
                                         .verify_us = times.verify_us,
                                         .decrypt_us = times.decrypt_us,
                                         .total_us = times.total_us};
    }
    return status;
}

/* Same-tick emission into the response ring. */
static bool emit(void *context, enum cm_wire_type type, uint64_t request, const void *part1,
                 size_t bytes1, const void *part2, size_t bytes2)
{
    struct cm_worker *worker = context;
    if (!worker->rings_open || cm_ring_put(&worker->responses, (uint32_t)type, request, part1,
                                           bytes1, part2, bytes2, NULL) != CM_OK) {
        return false;
    }
    worker->wake = true;
    return true;
}

static enum cm_status serving_make(struct cm_worker *worker, struct cm_error *err)
{
    worker->payload_bytes = worker->config.ring_data_bytes / 4;
    worker->payload = malloc(worker->payload_bytes);
    if (worker->payload == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "request buffer");
    }
    enum cm_status status = cm_tokenizer_new(
        &worker->manifest, cm_chat_text_bytes(&worker->manifest, worker->payload_bytes),
        &worker->tokenizer, err);
    if (status == CM_OK) {
        status = cm_chat_new(&worker->manifest, worker->tokenizer, worker->payload_bytes,
                             &worker->chat, err);
    }
    if (status == CM_OK) {
        status = cm_adapters_make(worker, err);
    }
    if (status == CM_OK) {
        status = cm_scheduler_new(worker->device, &worker->limits, emit, worker, &worker->scheduler,
                                  err);
    }
    return status;
}

static void loaded_log(const struct cm_worker *worker, const struct reporter *reporter,
                       const struct cm_loaded *loaded)
{
    const uint64_t *stage_us = reporter->progress.stage_us;
    CM_LOG(&worker->log, CM_LOG_INFO, "loaded", CM_LOG_S("model", worker->hello.model_name),
           CM_LOG_S("device", worker->hello.device), CM_LOG_I("payload_bytes", loaded->bytes),
           CM_LOG_I("head_us", stage_us[CM_LOAD_HEAD]),
           CM_LOG_I("reserve_us", stage_us[CM_LOAD_RESERVE]),
           CM_LOG_I("weights_us", stage_us[CM_LOAD_WEIGHTS]),
           CM_LOG_I("bind_us", stage_us[CM_LOAD_BIND]), CM_LOG_I("read_us", loaded->read_us),
           CM_LOG_I("verify_us", loaded->verify_us), CM_LOG_I("decrypt_us", loaded->decrypt_us),
           CM_LOG_I("total_us", loaded->total_us), CM_LOG_I("kv_pages", worker->limits.kv_pages),
           CM_LOG_S("kv_kind", worker->hello.kv_int8 == 1 ? "int8" : "fp16"),
           CM_LOG_I("kv_page_bytes", worker->hello.kv_page_bytes),
           CM_LOG_I("context_max", worker->limits.context_max),
           CM_LOG_S("weights", loaded->arena_locked ? "locked" : "not locked"));
}

/* Weights and cache, as far as the clear part of the head and the configuration tell their size. A
 * head that cannot be read is refused by the keeper first, and here once there is a key. */
static void memory_prepare(struct cm_worker *worker)
{
    struct cm_package_head head;
    const struct cm_config_worker *config = &worker->config;
    if (cm_package_head_read(CM_FD_INPUT, &head, NULL) != CM_OK) {
        return;
    }
    const uint64_t limit = config->memory_bytes_max;
    const uint64_t cache = config->kv_pages == 0 ? config->kv_bytes : 0;
    const uint64_t bytes = head.core.payload_bytes + cache;
    if (limit == 0 || bytes + MEMORY_BESIDE_BYTES <= limit) {
        cm_device_prepare(worker->device, bytes);
    }
}

enum cm_status cm_worker_prepare(struct cm_worker *worker, struct cm_error *err)
{
    const struct cm_device_options options = {
        .threads = worker->config.threads,
        .cpus_max = worker->config.cpus_max,
        .prompts = worker->config.prompts_bf16 == 1 ? CM_PROMPTS_BF16 : CM_PROMPTS_EXACT};
    const uint64_t start = cm_clock_us();
    enum cm_status status = cm_device_open(worker->config.device, &options, &worker->device, err);
    if (status == CM_OK) {
        memory_prepare(worker);
    }
    const uint64_t memory = cm_clock_us();
    if (status == CM_OK && worker->rules != NULL) {
        status = cm_device_guard_bind(worker->device, worker->rules, worker->rules_bytes, err);
    }
    if (status == CM_OK) {
        CM_LOG(&worker->log, CM_LOG_INFO, "prepared", CM_LOG_I("memory_us", memory - start),
               CM_LOG_I("rules_us", cm_clock_us() - memory));
    }
    return status;
}

/* The gateway was replaced: its new rings are the ones to open. */
static enum cm_status waiting_take(void *context, struct cm_frame *frame, struct cm_error *err)
{
    struct cm_worker *worker = context;
    if (frame->type != CM_FRAME_RINGS) {
        cm_frame_close_fds(frame);
        return cm_error_set(err, CM_E_BUG, "CM-WRK-FRAME", "frame %u came instead of the key",
                            frame->type);
    }
    for (size_t i = 0; i < CM_RING_FD_COUNT; i++) {
        close(worker->ring_fds[i]);
        worker->ring_fds[i] = frame->fds[i];
    }
    return CM_OK;
}

enum cm_status cm_worker_key_wait(struct cm_worker *worker, struct cm_error *err)
{
    static struct cm_frame frame;
    enum cm_status status =
        cm_channel_await(&worker->channel, CM_FRAME_KEY_PAGE, waiting_take, worker, &frame, err);
    worker->stopping = status == CM_OK && frame.type == CM_FRAME_STOP;
    if (status == CM_OK && !worker->stopping) {
        worker->key_page = frame.fds[0];
    }
    return status;
}

enum cm_status cm_worker_load(struct cm_worker *worker, struct cm_error *err)
{
    const uint64_t now = cm_clock_us();
    struct reporter reporter = {.worker = worker,
                                .progress = {.stage = CM_LOAD_HEAD},
                                .started_us = now,
                                .stage_started_us = now};
    struct cm_loaded loaded = {.bytes = 0};
    progress_send(&reporter);
    enum cm_status status = package_open(worker, err);
    if (status == CM_OK) {
        status = weights_load(worker, &reporter, &loaded, err);
    }
    if (status == CM_OK) {
        status = serving_make(worker, err);
    }
    close(worker->key_page);
    worker->key_page = -1;
    close(CM_FD_INPUT);
    if (status == CM_OK) {
        progress_send(&reporter);
        hello_make(worker);
        loaded_log(worker, &reporter, &loaded);
        status = cm_channel_send(&worker->channel, CM_FRAME_LOADED, &loaded, sizeof(loaded), NULL,
                                 0, err);
    }
    return status;
}

void cm_worker_wipe(struct cm_worker *worker)
{
    if (worker->device != NULL) {
        cm_device_scrub(worker->device);
    }
    if (worker->scheduler != NULL) {
        cm_scheduler_wipe(worker->scheduler);
    }
    cm_adapters_wipe(&worker->adapters);
    if (worker->payload != NULL) {
        cm_wipe(worker->payload, worker->payload_bytes);
    }
}
