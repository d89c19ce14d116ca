#include "tests/engine/open.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void engine_must(enum cm_status status, const struct cm_error *err)
{
    if (status != CM_OK) {
        fprintf(stderr, "engine: %s (%s)\n", err->text, err->id);
        exit(cm_status_exit_code(status));
    }
}

static void *room(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (memory == NULL) {
        exit(9);
    }
    return memory;
}

static struct cm_package *package_open(int fd, const char *key_path, struct cm_error *err)
{
    uint8_t key[CM_KEY_BYTES];
    struct cm_package *package;
    int key_fd = open(key_path, O_RDONLY);
    uint8_t *head = room(1, CM_PACKAGE_HEAD_BYTES);
    struct cm_package_head *parsed = room(1, sizeof(*parsed));
    if (key_fd < 0 || read(key_fd, key, sizeof(key)) != (ssize_t)sizeof(key) ||
        pread(fd, head, CM_PACKAGE_HEAD_BYTES, 0) < 0) {
        fprintf(stderr, "engine: cannot read the package or %s\n", key_path);
        exit(9);
    }
    engine_must(cm_package_head_parse(head, CM_PACKAGE_HEAD_BYTES, parsed, err), err);
    engine_must(cm_package_open(fd, key, parsed->core.owner_key, &package, err), err);
    free(head);
    free(parsed);
    close(key_fd);
    return package;
}

static void model_open(struct engine *e, int fd, const char *key_path, struct cm_error *err)
{
    size_t bytes;
    e->package = package_open(fd, key_path, err);
    const uint8_t *manifest = cm_package_manifest(e->package, &bytes);
    const uint64_t payload_bytes = cm_package_head_of(e->package)->core.payload_bytes;
    engine_must(cm_manifest_parse(manifest, bytes, payload_bytes, &e->manifest, err), err);
    const char *context = getenv("CASEMATE_CONTEXT");
    const uint32_t context_max = context != NULL ? (uint32_t)strtoul(context, NULL, 10) : 0;
    engine_must(cm_worker_model_make(&e->manifest, context_max, &e->model, err), err);
}

static enum cm_status segment_open(void *context, uint64_t index, const uint8_t *ciphertext,
                                   size_t bytes, uint8_t *plaintext, struct cm_error *err)
{
    return cm_package_segment_open(context, index, ciphertext, bytes, plaintext, err);
}

static void adapter_load(struct engine *e, const char *path, const char *key_path)
{
    static struct cm_error err;
    static struct cm_manifest_tensor tensors[CM_MANIFEST_ADAPTER_TENSORS_MAX];
    static struct cm_adapter_layer layers[CM_LAYERS_MAX];
    struct cm_manifest_adapter manifest;
    size_t bytes;
    int fd = open(path, O_RDONLY);
    struct cm_package *package = package_open(fd, key_path, &err);
    const struct cm_package_core *core = &cm_package_head_of(package)->core;
    const struct cm_device_cipher cipher = {segment_open, package};
    const uint8_t *sealed = cm_package_manifest(package, &bytes);
    engine_must(cm_manifest_adapter_parse(sealed, bytes, core->payload_bytes, tensors,
                                          CM_MANIFEST_ADAPTER_TENSORS_MAX, &manifest, &err),
                &err);
    e->adapter = 1;
    for (uint64_t i = 0; i < core->segment_count; i++) {
        uint64_t offset;
        cm_package_segment_place(package, i, &offset, &bytes);
        uint8_t *place = cm_device_adapter_place(e->device, e->adapter, i);
        if (place == NULL || pread(fd, place, bytes, (off_t)offset) != (ssize_t)bytes) {
            fprintf(stderr, "engine: cannot read segment %llu of %s\n", (unsigned long long)i,
                    path);
            exit(9);
        }
        engine_must(cm_device_adapter_submit(e->device, &cipher, e->adapter, i, place, bytes, &err),
                    &err);
    }
    struct cm_adapter adapter;
    engine_must(cm_worker_adapter_make(&manifest, e->model.model.layers, layers, &adapter, &err),
                &err);
    engine_must(cm_device_adapter_bind(e->device, e->adapter, &adapter, core->payload_bytes, &err),
                &err);
    cm_package_close(package);
    close(fd);
}

void engine_open(struct engine *e, const char *path, const char *key_path,
                 const struct engine_limits *limits)
{
    static struct cm_error err;
    int fd = open(path, O_RDONLY);
    const char *threads = getenv("CASEMATE_THREADS");
    struct cm_device_options options = {.threads = threads ? (uint32_t)atoi(threads) : 0,
                                        .path = getenv("CASEMATE_CPU")};
    const char *prompts = getenv("CASEMATE_PROMPTS");
    options.prompts =
        prompts != NULL && strcmp(prompts, "bf16") == 0 ? CM_PROMPTS_BF16 : CM_PROMPTS_EXACT;
    model_open(e, fd, key_path, &err);
    const char *adapter = getenv("CASEMATE_ADAPTER"), *its_key = getenv("CASEMATE_ADAPTER_KEY");
    const struct cm_package_core *core = &cm_package_head_of(e->package)->core;
    engine_must(cm_device_open("cpu", &options, &e->device, &err), &err);
    const char *kv = getenv("CASEMATE_KV");
    struct cm_device_reserve reserve = {
        .model = &e->model.model,
        .payload_bytes = core->payload_bytes,
        .segment_bytes = core->segment_bytes,
        .slots = limits->slots,
        .kv_pages = limits->pages,
        .kv_kind = kv != NULL && strcmp(kv, "int8") == 0 ? CM_KV_INT8 : CM_KV_FP16,
        .context_max = limits->context,
        .step_tokens_max = limits->step_tokens};
    if (adapter != NULL) {
        reserve.adapters = 1;
        reserve.adapter_bytes = 64u << 20;
        reserve.adapter_rank_max = CM_ADAPTER_RANK_MAX;
    }
    const struct cm_stream_options stream = {.threads = 2};
    engine_must(cm_device_reserve(e->device, &reserve, &err), &err);
    engine_must(cm_stream_load(e->package, fd, e->device, &stream, &e->times, &err), &err);
    engine_must(cm_device_model_bind(e->device, &e->model.model, &err), &err);
    if (adapter != NULL) {
        adapter_load(e, adapter, its_key);
    }
    e->page_count = limits->pages;
    e->pages = room(limits->pages, sizeof(*e->pages));
    for (uint32_t i = 0; i < e->page_count; i++) {
        e->pages[i] = e->page_count - 1 - i; /* any order must do */
    }
    close(fd);
}

void engine_close(struct engine *e)
{
    free(e->pages);
    cm_device_close(e->device);
    cm_worker_model_done(&e->model);
    cm_manifest_done(&e->manifest);
    cm_package_close(e->package);
}

uint32_t engine_slot(struct engine *e)
{
    static struct cm_error err;
    uint32_t slot;
    struct cm_slot_params params = {.sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f},
                                    .max_tokens = UINT32_MAX,
                                    .ignore_eos = true,
                                    .adapter = e->adapter};
    engine_must(cm_device_slot_open(e->device, &params, &slot, &err), &err);
    return slot;
}
