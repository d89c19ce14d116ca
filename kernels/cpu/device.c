/* The CPU device: open, one arena, loading, slots, steps. */
#include "kernels/cpu/cpu_internal.h"
#include "runtime/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define HUGE_PAGE   (2ull << 20)
#define SPARE_BYTES (512ull << 20) /* addresses behind what is prepared: scratch and tables */

static uint32_t threads_choose(const struct cm_device_options *options)
{
    uint32_t threads = options->threads;
    if (threads == 0) {
        threads = cm_threads_available();
        threads =
            options->cpus_max > 0 && options->cpus_max < threads ? options->cpus_max : threads;
    }
    return threads > CM_THREADS_MAX ? CM_THREADS_MAX : threads;
}

enum cm_status cm_device_open(const char *backend, const struct cm_device_options *options,
                              struct cm_device **ret_device, struct cm_error *err)
{
    const struct cm_path *path = cm_path_choose(options->path);
    if (backend != NULL && strcmp(backend, "cpu") != 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-DEV-BACKEND",
                            "device '%s' is not in this build; there are: cpu", backend);
    }
    if (path == NULL) {
        return cm_error_set(err, CM_E_DEVICE, "CM-DEV-CPU",
                            "this CPU lacks %s: the CPU device needs AVX2 and FMA at least",
                            options->path != NULL ? options->path : "AVX2 or FMA");
    }
    const struct cm_prompt_path *prompts = NULL;
    if (options->prompts == CM_PROMPTS_BF16 && (prompts = cm_prompt_path_choose()) == NULL) {
        return cm_error_set(err, CM_E_CONFIG, "CM-DEV-PROMPTS",
                            "prompts in bf16 need AMX-bf16 and AVX512-BF16, which this CPU or its "
                            "kernel does not give: say `prompts: exact`");
    }
    struct cm_device *device = calloc(1, sizeof(*device));
    const uint32_t threads = threads_choose(options);
    if (device == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "device");
    }
    enum cm_status status = cm_pool_new(threads, &device->pool, err);
    if (status != CM_OK) {
        free(device);
        return status;
    }
    device->path = path;
    device->prompts = prompts;
    *ret_device = device;
    return CM_OK;
}

static void arena_drop(struct cm_device *device)
{
    if (device->arena != NULL) {
        munmap(device->arena, device->arena_bytes);
    }
    device->arena = NULL;
    device->arena_bytes = device->arena_populated = 0;
}

void cm_device_close(struct cm_device *device)
{
    if (device == NULL) {
        return;
    }
    cm_device_scrub(device);
    cm_pool_free(device->pool);
    arena_drop(device);
    free(device->segment_seen);
    free(device->layers);
    free(device->tables);
    cm_guard_pack_free(device->guard);
    cm_classifier_free(device->classifier);
    free(device);
}

void cm_device_describe(const struct cm_device *device, struct cm_device_facts *ret_facts)
{
    *ret_facts = (struct cm_device_facts){.threads = cm_pool_threads(device->pool),
                                          .prompts = device->prompts != NULL ? CM_PROMPTS_BF16
                                                                             : CM_PROMPTS_EXACT,
                                          .arena_locked = device->arena_locked,
                                          .arena_bytes = device->arena_bytes,
                                          .kv_page_bytes = device->page_bytes};
    snprintf(ret_facts->name, sizeof(ret_facts->name), "cpu: %s, %s%s%u threads",
             device->path->name, device->prompts != NULL ? device->prompts->name : "",
             device->prompts != NULL ? " prompts, " : "", ret_facts->threads);
    snprintf(ret_facts->path, sizeof(ret_facts->path), "%s", device->path->name);
}

/* ------------------------------------------------------------------ the arena */

struct layout {
    uint8_t *base; /* NULL: only measure */
    uint64_t used;
};

/* The next piece, on a cache line (or a page, for the payload and KV). */
static void *piece(struct layout *layout, uint64_t count, uint64_t size, uint64_t align)
{
    layout->used = (layout->used + align - 1) / align * align;
    void *at = layout->base != NULL ? layout->base + layout->used : NULL;
    layout->used += count * size;
    return at;
}

static uint64_t page_bytes_of(const struct cm_device_reserve *r)
{
    const struct cm_model *m = r->model;
    return (uint64_t)m->layers * 2 * m->kv_heads * cm_kv_head_bytes(r->kv_kind, m->head_width);
}

static uint32_t greatest(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* Has the model a matrix of bf16, whose activations are floats? */
static bool bfloats_any(const struct cm_model *m)
{
    bool any = m->embedding.kind == CM_TENSOR_BF16 || m->head.kind == CM_TENSOR_BF16;
    for (uint32_t i = 0; m->layer != NULL && i < m->layers; i++) {
        for (uint32_t role = 0; role < CM_LAYER_ROLE_COUNT; role++) {
            any = any || m->layer[i].tensors[role].kind == CM_TENSOR_BF16;
        }
    }
    return any;
}

/* Room for every form that the model's matrices and the classes of tokens want. */
static struct cm_activations activations_lay(const struct cm_device *device, struct layout *layout,
                                             uint64_t tokens, uint32_t columns)
{
    uint64_t blocks = tokens * (columns / CM_TILE_COLUMNS);
    uint16_t *rounded = device->prompts != NULL
                            ? piece(layout, blocks, CM_TILE_COLUMNS * sizeof(uint16_t), 64)
                            : NULL;
    float *x = device->bfloats ? piece(layout, blocks, CM_TILE_COLUMNS * sizeof(float), 64) : NULL;
    return (struct cm_activations){.rounded = rounded,
                                   .x = x,
                                   .q = piece(layout, blocks, CM_TILE_COLUMNS, 64),
                                   .scale = piece(layout, blocks, 4, 64),
                                   .sum = piece(layout, blocks, 4, 64),
                                   .count = piece(layout, blocks, 4, 64)};
}

/* Scratch of the threads and of the step. */
static void scratch_lay(struct cm_device *device, struct layout *layout,
                        const struct cm_device_reserve *r, uint32_t tokens)
{
    const struct cm_model *m = r->model;
    struct cm_scratch *s = &device->scratch;
    uint32_t attention = m->heads * m->head_width, group = m->heads / m->kv_heads;
    uint32_t threads = cm_pool_threads(device->pool);
    uint32_t inputs = greatest(m->width, attention), widest = greatest(inputs, m->ffn_width);
    uint32_t unit = greatest(cm_heads_per_unit(m->head_width) * m->head_width, 4 * CM_TILE_ROWS);
    uint64_t scores = cm_attention_floats(greatest(CM_ATTENTION_ROWS, group), m->head_width);
    if (device->prompts != NULL) {
        uint64_t more = cm_prompt_attention_floats(greatest(CM_PROMPT_ROWS, group), m->head_width);
        scores = more > scores ? more : scores;
    }
    uint32_t block = device->prompts != NULL ? CM_PROMPT_TOKENS : CM_BLOCK_TOKENS;
    s->x = piece(layout, (uint64_t)tokens * m->width, 4, 64);
    s->query = piece(layout, (uint64_t)tokens * attention, 4, 64);
    s->attention = piece(layout, (uint64_t)tokens * attention, 4, 64);
    s->partials = piece(layout, (uint64_t)CM_SPLITS * threads * device->chunks_max,
                        cm_partial_floats(group, m->head_width) * 4, 64);
    s->act = activations_lay(device, layout, tokens, inputs);
    s->hidden = activations_lay(device, layout, tokens, m->ffn_width);
    if (m->decoder.post_norms) {
        s->result = piece(layout, (uint64_t)tokens * m->width, 4, 64);
    }
    s->logits = piece(layout, (uint64_t)r->slots * cm_padded(m->vocabulary, CM_ROWS_PAD), 4, 64);
    s->threads = piece(layout, threads, sizeof(*s->threads), 64);
    for (uint32_t i = 0; i < threads; i++) {
        struct cm_thread_scratch own = {
            .row = piece(layout, widest + CM_TILE_ROWS, 4, 64),
            .y = piece(layout, (uint64_t)block * unit, 4, 64),
            .attention = piece(layout, scores, 4, 64),
            .act = activations_lay(device, layout, 1, inputs),
            .candidates = piece(layout, m->vocabulary, sizeof(struct cm_candidate), 64)};
        if (layout->base != NULL) {
            s->threads[i] = own;
        }
    }
}

/* Regions of adapters and what binding one fills. */
static void adapters_lay(struct cm_device *device, struct layout *layout,
                         const struct cm_device_reserve *r)
{
    const struct cm_model *m = r->model;
    const uint32_t tokens = greatest(r->step_tokens_max, r->slots);
    /* Q, K and V share an input; so do gate and up. */
    const uint32_t chunks = greatest(
        3 * cm_low_rank_chunks(m->width),
        greatest(cm_low_rank_chunks(m->heads * m->head_width), cm_low_rank_chunks(m->ffn_width)));
    device->low_floats = cm_rank_tiles(r->adapter_rank_max) * chunks * CM_TILE_ROWS;
    if (r->adapters > 0) {
        device->scratch.low = piece(layout, (uint64_t)tokens * device->low_floats, 4, 64);
        device->scratch.runs = piece(layout, tokens, sizeof(struct cm_low_rank_run), 64);
    }
    for (uint32_t i = 0; i < r->adapters; i++) {
        device->regions[i] = (struct cm_adapter_region){
            .payload = piece(layout, 1, r->adapter_bytes, 4096),
            .segment_seen = piece(layout, r->adapter_bytes / r->segment_bytes + 1, 1, 64),
            .layers = piece(layout, m->layers, sizeof(struct cm_low_rank[CM_TARGET_COUNT]), 64)};
    }
}

/* One function measures and places, so that the two cannot differ. */
static void arena_lay(struct cm_device *device, struct layout *layout,
                      const struct cm_device_reserve *r)
{
    const struct cm_model *m = r->model;
    uint32_t tokens = greatest(r->step_tokens_max, r->slots);
    device->chunks_max = (r->context_max + CM_ATTENTION_CHUNK - 1) / CM_ATTENTION_CHUNK;
    device->bfloats = bfloats_any(m);
    device->payload = piece(layout, 1, r->payload_bytes, 4096);
    /* Weights are read ahead by up to 4 KiB. */
    (void)piece(layout, 1, 8192, 64);
    device->kv = piece(layout, r->kv_pages, page_bytes_of(r), 4096);
    scratch_lay(device, layout, r, tokens);
    const uint64_t turns = (uint64_t)r->context_max * m->rope_width / 2 + 16;
    device->cosine = piece(layout, turns, 4, 64);
    device->sine = piece(layout, turns, 4, 64);
    if (m->decoder.window_rope_base > 0.0f) {
        device->window_cosine = piece(layout, turns, 4, 64);
        device->window_sine = piece(layout, turns, 4, 64);
    }
    device->slots = piece(layout, r->slots, sizeof(struct cm_slot), 64);
    for (uint32_t i = 0; i < r->slots; i++) {
        uint16_t *generated = piece(layout, m->vocabulary, 2, 64);
        uint8_t *seen = piece(layout, m->vocabulary, 1, 64);
        if (layout->base != NULL) {
            device->slots[i].generated = generated;
            device->slots[i].seen = seen;
        }
    }
    device->tokens = piece(layout, tokens, sizeof(struct cm_step_token), 64);
    adapters_lay(device, layout, r);
    device->items = piece(
        layout, tokens + (uint64_t)CM_SPLITS * cm_pool_threads(device->pool) * device->chunks_max,
        sizeof(struct cm_attention_item), 64);
    device->results = piece(layout, CM_STEP_ENTRIES_MAX, sizeof(struct cm_step_result), 64);
}

static enum cm_status reserve_check(const struct cm_device_reserve *r, struct cm_error *err)
{
    const struct cm_model *m = r->model;
    bool ok = m->vocabulary >= 2 && m->vocabulary <= CM_VOCABULARY_MAX && m->layers >= 1 &&
              m->layers <= CM_LAYERS_MAX && m->width >= 32 && m->width <= 1u << 17 &&
              m->width % CM_TILE_COLUMNS == 0 && m->heads >= 1 && m->heads <= 1024 &&
              m->kv_heads >= 1 && m->heads % m->kv_heads == 0 && m->heads / m->kv_heads <= 64 &&
              m->head_width >= 2 && m->head_width <= 1024 &&
              m->heads * m->head_width % CM_TILE_COLUMNS == 0 && m->rope_width <= m->head_width &&
              m->rope_width % 2 == 0 && m->ffn_width >= 32 && m->ffn_width <= 1u << 18 &&
              m->ffn_width % CM_TILE_COLUMNS == 0;
    if (!ok) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-SHAPE",
                            "this device does not run the model's shape: width %u, heads %u of %u, "
                            "FFN %u (widths must be multiples of 32)",
                            m->width, m->heads, m->head_width, m->ffn_width);
    }
    if (r->payload_bytes == 0 || r->payload_bytes > 1ull << 42 || r->segment_bytes == 0 ||
        r->slots == 0 || r->slots > CM_STEP_ENTRIES_MAX || r->kv_pages == 0 ||
        r->kv_pages > 1u << 24 || r->kv_kind >= CM_KV_KIND_COUNT || r->context_max == 0 ||
        r->context_max > 1u << 22 || r->step_tokens_max == 0 || r->step_tokens_max > 65536) {
        return cm_error_set(
            err, CM_E_CONFIG, "CM-DEV-RESERVE",
            "impossible reservation: %u slots, %u KV pages, %u positions, %u tokens "
            "a step",
            r->slots, r->kv_pages, r->context_max, r->step_tokens_max);
    }
    bool some = r->adapters > 0;
    if (r->adapters > CM_ADAPTER_REGIONS_MAX || r->adapter_bytes > 1ull << 36 ||
        r->adapter_rank_max > CM_ADAPTER_RANK_MAX || some != (r->adapter_bytes > 0) ||
        some != (r->adapter_rank_max > 0)) {
        return cm_error_set(err, CM_E_CONFIG, "CM-DEV-RESERVE",
                            "impossible reservation: %u adapters (at most %u) of %llu bytes, rank "
                            "%u (at most %u)",
                            r->adapters, CM_ADAPTER_REGIONS_MAX,
                            (unsigned long long)r->adapter_bytes, r->adapter_rank_max,
                            CM_ADAPTER_RANK_MAX);
    }
    return CM_OK;
}

enum cm_status cm_device_need(const struct cm_device *device,
                              const struct cm_device_reserve *reserve, uint64_t *ret_arena_bytes,
                              uint64_t *ret_page_bytes, struct cm_error *err)
{
    enum cm_status status = reserve_check(reserve, err);
    if (status == CM_OK) {
        struct cm_device scratch = {.pool = device->pool, .prompts = device->prompts};
        struct layout layout = {.base = NULL};
        arena_lay(&scratch, &layout, reserve);
        *ret_arena_bytes = (layout.used + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        *ret_page_bytes = page_bytes_of(reserve);
    }
    return status;
}

struct region {
    uint8_t *from;
    uint64_t bytes; /* huge pages */
};

/* All threads take huge pages; what limits is how fast the kernel zeroes them (bench/README.md). A
 * kernel older than 5.14 does not know the advice: then every page is touched. */
static void span_populate(void *context, struct cm_worker *worker)
{
    const struct region *span = context;
    uint32_t first, last;
    cm_pool_phase(worker, (uint32_t)(span->bytes / HUGE_PAGE));
    while (cm_pool_take(worker, &first, &last)) {
        uint8_t *from = span->from + first * HUGE_PAGE;
        const uint64_t bytes = (last - first) * HUGE_PAGE;
        if (madvise(from, bytes, MADV_POPULATE_WRITE) != 0) {
            for (uint64_t at = 0; at < bytes; at += 4096) {
                *(volatile uint8_t *)(from + at) = 0;
            }
        }
    }
    cm_pool_barrier(worker);
}

static void limit_lower(uint64_t value, const char *name, uint64_t *limit, const char **ret_name)
{
    if (value < *limit) {
        *limit = value;
        *ret_name = name;
    }
}

/* The least of what this process may have: its own limits, its group's, the machine's. Files that
 * cannot be read (a sandbox) say nothing: there the group's limit is the process's too. */
static uint64_t memory_limit(const char **ret_name)
{
    static const char *const groups[] = {"/sys/fs/cgroup/memory.max",
                                         "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
    struct rlimit own;
    uint64_t limit = UINT64_MAX;
    long pages = sysconf(_SC_PHYS_PAGES);
    if (getrlimit(RLIMIT_DATA, &own) == 0 && own.rlim_cur != RLIM_INFINITY) {
        limit_lower(own.rlim_cur, "RLIMIT_DATA", &limit, ret_name);
    }
    if (getrlimit(RLIMIT_AS, &own) == 0 && own.rlim_cur != RLIM_INFINITY) {
        limit_lower(own.rlim_cur, "RLIMIT_AS", &limit, ret_name);
    }
    if (pages > 0) {
        limit_lower((uint64_t)pages * 4096u, "the machine's memory", &limit, ret_name);
    }
    for (size_t i = 0; i < sizeof(groups) / sizeof(groups[0]); i++) {
        FILE *file = fopen(groups[i], "re");
        unsigned long long value;
        if (file != NULL && fscanf(file, "%20llu", &value) == 1) {
            limit_lower(value, groups[i], &limit, ret_name);
        }
        if (file != NULL) {
            fclose(file);
        }
    }
    return limit;
}

/* Better refused now, with both numbers, than killed when the last page is touched. */
static enum cm_status memory_check(uint64_t bytes, struct cm_error *err)
{
    const char *name = "";
    uint64_t limit = memory_limit(&name);
    return bytes <= limit
               ? CM_OK
               : cm_error_set(err, CM_E_CONFIG, "CM-DEV-MEMORY",
                              "weights, KV pages and scratch need %llu MiB, %s allows %llu MiB: "
                              "lower kv_bytes, sequences_max or context_max, or raise the limit",
                              (unsigned long long)(bytes >> 20), name,
                              (unsigned long long)(limit >> 20));
}

static bool arena_map(struct cm_device *device, uint64_t bytes)
{
    /* One huge page more, so that the arena can start on a 2 MiB border. */
    uint8_t *raw = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) {
        return false;
    }
    uint64_t lead = (HUGE_PAGE - (uintptr_t)raw % HUGE_PAGE) % HUGE_PAGE;
    if (lead > 0) {
        munmap(raw, lead);
    }
    if (lead < HUGE_PAGE) {
        munmap(raw + lead + bytes, HUGE_PAGE - lead);
    }
    device->arena = raw + lead;
    device->arena_bytes = bytes;
    (void)madvise(device->arena, bytes, MADV_HUGEPAGE);
    (void)madvise(device->arena, bytes, MADV_DONTDUMP);
    (void)madvise(device->arena, bytes, MADV_DONTFORK);
    return true;
}

static void arena_populate(struct cm_device *device, uint64_t bytes)
{
    const struct region span = {device->arena + device->arena_populated,
                                bytes > device->arena_populated ? bytes - device->arena_populated
                                                                : 0};
    if (span.bytes > 0) {
        cm_pool_run(device->pool, span_populate, (void *)&span);
        device->arena_populated = bytes;
    }
}

/* An arena of exactly `bytes`: what was prepared, if it lies in a wide enough range. */
static bool arena_fit(struct cm_device *device, uint64_t bytes)
{
    if (device->arena_bytes < bytes) {
        arena_drop(device);
        return arena_map(device, bytes);
    }
    if (device->arena_bytes > bytes) {
        munmap(device->arena + bytes, device->arena_bytes - bytes);
        device->arena_bytes = bytes;
    }
    if (device->arena_populated > bytes) {
        device->arena_populated = bytes;
    }
    return true;
}

void cm_device_prepare(struct cm_device *device, uint64_t bytes)
{
    const char *name = "";
    bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    if (!device->reserved && device->arena == NULL && bytes > 0 && bytes <= memory_limit(&name) &&
        arena_map(device, bytes + SPARE_BYTES)) {
        arena_populate(device, bytes);
    }
}

enum cm_status cm_device_reserve(struct cm_device *device, const struct cm_device_reserve *reserve,
                                 struct cm_error *err)
{
    uint64_t bytes, page;
    if (device->reserved) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "reserved twice");
    }
    enum cm_status status = cm_device_need(device, reserve, &bytes, &page, err);
    if (status == CM_OK) {
        status = memory_check(bytes, err);
    }
    if (status != CM_OK) {
        return status;
    }
    uint64_t segments =
        (reserve->payload_bytes + reserve->segment_bytes - 1) / reserve->segment_bytes;
    device->segment_seen = calloc(segments, 1);
    if (device->segment_seen == NULL || !arena_fit(device, bytes)) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-MEMORY", "no memory for an arena of %llu MiB",
                            (unsigned long long)(bytes >> 20));
    }
    arena_populate(device, bytes);
    device->arena_locked = mlock(device->arena, bytes) == 0;
    device->limits = *reserve;
    device->model = *reserve->model;
    device->limits.model = NULL;
    device->page_bytes = page;
    device->segment_count = segments;
    struct layout layout = {.base = device->arena};
    struct cm_device_reserve again = *reserve;
    arena_lay(device, &layout, &again);
    CM_ASSERT(layout.used <= bytes);
    device->reserved = true;
    return CM_OK;
}

/* ------------------------------------------------------------------ loading */

uint8_t *cm_device_segment_place(struct cm_device *device, uint64_t index)
{
    return device->reserved && index < device->segment_count
               ? device->payload + index * device->limits.segment_bytes
               : NULL;
}

/* Claim the segments that `bytes` from `index` on span; each with one exchange, for they come from
 * several threads. False: not whole segments, or one came twice. */
static bool segments_claim(struct cm_device *device, uint64_t index, size_t bytes)
{
    const uint64_t segment = device->limits.segment_bytes;
    uint64_t start = index * segment, left = device->limits.payload_bytes - start;
    bool ok = bytes > 0 && bytes <= left && (bytes % segment == 0 || bytes == left);
    for (uint64_t i = index; ok && i < index + (bytes + segment - 1) / segment; i++) {
        ok = __atomic_exchange_n(&device->segment_seen[i], 1, __ATOMIC_ACQ_REL) == 0;
    }
    return ok;
}

/* One of possibly several at a time. A failure forbids all that comes; the last one out wipes, so
 * that nobody writes plaintext behind the wipe, or fails because of it. */
static enum cm_status segments_open(struct cm_device *device, const struct cm_device_cipher *cipher,
                                    uint64_t index, const uint8_t *ciphertext, size_t bytes,
                                    struct cm_error *err)
{
    if (!segments_claim(device, index, bytes)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-SEGMENT",
                            "segment %llu has the wrong size or came twice",
                            (unsigned long long)index);
    }
    uint64_t before = cm_clock_ns();
    enum cm_status status = cipher->open(cipher->context, index, ciphertext, bytes,
                                         cm_device_segment_place(device, index), err);
    __atomic_add_fetch(&device->stats.decrypt_ns_total, cm_clock_ns() - before, __ATOMIC_RELAXED);
    return status;
}

enum cm_status cm_device_segment_submit(struct cm_device *device,
                                        const struct cm_device_cipher *cipher, uint64_t index,
                                        const uint8_t *ciphertext, size_t bytes,
                                        struct cm_error *err)
{
    enum cm_status status;
    __atomic_add_fetch(&device->opening, 1, __ATOMIC_ACQ_REL);
    if (__atomic_load_n(&device->poisoned, __ATOMIC_ACQUIRE) || !device->reserved ||
        device->loaded || index >= device->segment_count) {
        status = cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "segment %llu out of order",
                              (unsigned long long)index);
    } else {
        status = segments_open(device, cipher, index, ciphertext, bytes, err);
        if (status != CM_OK) {
            __atomic_store_n(&device->poisoned, true, __ATOMIC_RELEASE);
        }
    }
    if (__atomic_sub_fetch(&device->opening, 1, __ATOMIC_ACQ_REL) == 0 &&
        __atomic_load_n(&device->poisoned, __ATOMIC_ACQUIRE)) {
        cm_device_scrub(device);
    }
    return status;
}

enum cm_status cm_device_load_finish(struct cm_device *device, struct cm_error *err)
{
    if (device->poisoned || !device->reserved || device->loaded) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "load_finish out of order");
    }
    for (uint64_t i = 0; i < device->segment_count; i++) {
        if (device->segment_seen[i] == 0) {
            cm_device_scrub(device);
            return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-SEGMENT",
                                "segment %llu of %llu never came", (unsigned long long)i,
                                (unsigned long long)device->segment_count);
        }
    }
    device->stats.segments = device->segment_count;
    device->loaded = true;
    return CM_OK;
}

/* ------------------------------------------------------------------ the guard */

enum cm_status cm_device_guard_bind(struct cm_device *device, const uint8_t *pack, size_t bytes,
                                    struct cm_error *err)
{
    if (device->poisoned || device->guard != NULL) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "guard_bind out of order");
    }
    enum cm_status status = cm_classifier_new(&device->classifier, err);
    return status == CM_OK ? cm_guard_pack_new(pack, bytes, &device->guard, err) : status;
}

void cm_device_guard_name(const struct cm_device *device, uint32_t rule,
                          struct cm_wire_verdict *verdict)
{
    if (device->guard != NULL && rule < device->guard->rule_count) {
        const struct cm_guard_rule *facts = &device->guard->rules[rule];
        memcpy(verdict->rule, facts->id, sizeof(verdict->rule));
        memcpy(verdict->category, facts->category, sizeof(verdict->category));
    } else { /* CM_GUARD_RULE_OVERFLOW: more candidates at once than a slot has room for */
        snprintf(verdict->rule, sizeof(verdict->rule), "overflow");
        snprintf(verdict->category, sizeof(verdict->category), "guard");
    }
}

static void verdict_keep(struct cm_prompt_verdicts *verdicts, const struct cm_wire_verdict *verdict)
{
    bool refuses = verdict->action == CM_VERDICT_REFUSE;
    if (verdicts->count < CM_PROMPT_VERDICTS_MAX) {
        verdicts->each[verdicts->count++] = *verdict;
    } else if (refuses && !verdicts->refused) {
        verdicts->each[CM_PROMPT_VERDICTS_MAX - 1] = *verdict;
    }
    verdicts->refused = verdicts->refused || refuses;
}

void cm_device_classify(struct cm_device *device, uint32_t part, const uint8_t *text, size_t bytes,
                        struct cm_prompt_verdicts *verdicts)
{
    if (device->guard == NULL) {
        return;
    }
    cm_classify(device->classifier, device->guard, text, bytes, &device->findings);
    for (uint32_t i = 0; i < device->findings.count; i++) {
        const struct cm_finding *finding = &device->findings.each[i];
        struct cm_wire_verdict verdict = {.action = finding->action,
                                          .stage = CM_VERDICT_INPUT,
                                          .part = part,
                                          .offset = finding->start,
                                          .bytes = finding->end - finding->start};
        memcpy(verdict.rule, finding->rule, sizeof(verdict.rule));
        memcpy(verdict.category, finding->category, sizeof(verdict.category));
        verdict_keep(verdicts, &verdict);
    }
}

/* ------------------------------------------------------------------ slots */

static bool sampling_ok(const struct cm_sampling *s)
{
    return s->temperature >= 0.0f && s->temperature <= 2.0f && s->top_p > 0.0f &&
           s->top_p <= 1.0f && s->min_p >= 0.0f && s->min_p <= 1.0f &&
           fabsf(s->frequency_penalty) <= 2.0f && fabsf(s->presence_penalty) <= 2.0f &&
           s->repetition_penalty > 0.0f && s->repetition_penalty <= 4.0f;
}

enum cm_status cm_device_slot_open(struct cm_device *device, const struct cm_slot_params *params,
                                   uint32_t *ret_slot, struct cm_error *err)
{
    uint32_t index = 0;
    bool ok = sampling_ok(&params->sampling) && params->max_tokens >= 1 &&
              params->stop_count <= CM_STOPS_MAX;
    for (uint32_t i = 0; ok && i < params->stop_count; i++) {
        ok = params->stop_bytes[i] >= 1 && params->stop_bytes[i] <= CM_STOP_BYTES_MAX;
    }
    if (!ok) {
        return cm_error_set(err, CM_E_INPUT, "CM-DEV-SLOT",
                            "sampling or stop strings out of bounds");
    }
    const struct cm_adapter_region *region = cm_adapter_region_of(device, params->adapter);
    if (params->adapter != CM_ADAPTER_NONE && (region == NULL || !region->bound)) {
        return cm_error_set(err, CM_E_INPUT, "CM-DEV-SLOT", "no adapter is bound to region %u",
                            params->adapter);
    }
    while (index < device->limits.slots && device->slots[index].open) {
        index++;
    }
    if (!device->bound || index == device->limits.slots) {
        return cm_error_set(err, CM_E_BUSY, "CM-DEV-SLOT", "all %u slots are taken",
                            device->limits.slots);
    }
    struct cm_slot *slot = &device->slots[index];
    slot->open = true;
    slot->sampling = params->sampling;
    slot->max_tokens = params->max_tokens;
    slot->min_tokens = params->min_tokens;
    slot->ignore_eos = params->ignore_eos;
    slot->adapter = params->adapter;
    _Static_assert(CM_SLOT_BEFORE_MAX == CM_GUARD_HELD_MAX, "all that a span may reach back over");
    cm_guard_begin(&slot->guard, CM_GUARD_OUTPUT);
    if (device->guard != NULL && params->before_bytes > 0) {
        cm_guard_follow(device->guard, &slot->guard, params->before, params->before_bytes);
    }
    slot->stop_count = params->stop_count;
    for (uint32_t i = 0; i < params->stop_count; i++) {
        slot->stop_bytes[i] = params->stop_bytes[i];
        memcpy(slot->stops[i], params->stops[i], params->stop_bytes[i]);
    }
    *ret_slot = index;
    return CM_OK;
}

void cm_device_slot_skip(struct cm_device *device, uint32_t index, const uint32_t *tokens,
                         uint32_t count)
{
    CM_ASSERT(index < device->limits.slots && device->slots[index].open);
    for (uint32_t i = 0; i < count; i++) {
        CM_ASSERT(tokens[i] < device->model.vocabulary);
        device->slots[index].seen[tokens[i]] = 1;
    }
}

void cm_device_slot_close(struct cm_device *device, uint32_t index)
{
    CM_ASSERT(index < device->limits.slots && device->slots[index].open);
    struct cm_slot *slot = &device->slots[index];
    uint16_t *generated = slot->generated;
    uint8_t *seen = slot->seen;
    explicit_bzero(generated, device->model.vocabulary * sizeof(*generated));
    explicit_bzero(seen, device->model.vocabulary);
    explicit_bzero(slot, sizeof(*slot));
    slot->generated = generated;
    slot->seen = seen;
}

/* ------------------------------------------------------------------ steps */

static const char *entry_refusal(const struct cm_device *device, const struct cm_step_entry *entry)
{
    uint64_t end = (uint64_t)entry->position + entry->token_count;
    if (entry->slot >= device->limits.slots || !device->slots[entry->slot].open) {
        return "slot is not open";
    }
    if (entry->token_count == 0 || end > device->limits.context_max) {
        return "positions are outside the context";
    }
    if ((uint64_t)entry->page_count * CM_KV_PAGE_POSITIONS < end) {
        return "too few KV pages";
    }
    for (uint32_t i = 0; i < entry->page_count; i++) {
        if (entry->pages[i] >= device->limits.kv_pages) {
            return "KV page does not exist";
        }
    }
    for (uint32_t i = 0; i < entry->token_count; i++) {
        if (entry->tokens[i] >= device->model.vocabulary) {
            return "token does not exist";
        }
    }
    return NULL;
}

/* Tokens of class D come first, so that no panel holds both classes. */
static void tokens_lay(struct cm_device *device, const struct cm_step_entry *entries,
                       uint32_t count)
{
    device->token_count = 0;
    for (enum cm_class class = CM_CLASS_D; class < CM_CLASSES; class ++) {
        for (uint32_t e = 0; e < count; e++) {
            if (cm_entry_class(device, &entries[e]) != class) {
                continue;
            }
            const struct cm_adapter_region *adapter =
                cm_adapter_region_of(device, device->slots[entries[e].slot].adapter);
            device->entry_token[e] = device->token_count;
            for (uint32_t i = 0; i < entries[e].token_count; i++) {
                device->tokens[device->token_count++] = (struct cm_step_token){
                    e, entries[e].tokens[i], entries[e].position + i, adapter};
            }
        }
        device->exact_count = class == CM_CLASS_D ? device->token_count : device->exact_count;
    }
}

static enum cm_status step_take(struct cm_device *device, const struct cm_step_entry *entries,
                                uint32_t count, struct cm_error *err)
{
    uint32_t tokens = 0;
    for (uint32_t e = 0; e < count; e++) {
        const char *refusal = entry_refusal(device, &entries[e]);
        for (uint32_t k = 0; refusal == NULL && k < e; k++) {
            refusal = entries[k].slot == entries[e].slot ? "slot appears twice" : NULL;
        }
        if (refusal == NULL && entries[e].token_count > device->limits.step_tokens_max - tokens) {
            refusal = "more tokens than a step takes";
        }
        if (refusal != NULL) {
            return cm_error_set(err, CM_E_BUG, "CM-DEV-STEP", "step entry %u: %s", e, refusal);
        }
        tokens += entries[e].token_count;
        device->entries[e] = entries[e];
        memset(&device->results[e], 0, offsetof(struct cm_step_result, text));
        device->results[e].slot = entries[e].slot;
    }
    device->entry_count = count;
    tokens_lay(device, entries, count);
    return CM_OK;
}

/* The CPU computes at once; `step_wait` hands the results out. */
enum cm_status cm_device_step_submit(struct cm_device *device, const struct cm_step_entry *entries,
                                     uint32_t count, struct cm_error *err)
{
    if (device->poisoned || !device->bound || device->step_pending || count == 0 ||
        count > CM_STEP_ENTRIES_MAX) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "step of %u entries out of order",
                            count);
    }
    enum cm_status status = step_take(device, entries, count, err);
    if (status != CM_OK) {
        return status;
    }
    uint64_t before = cm_clock_ns();
    cm_forward(device);
    device->stats.step_ns_total += cm_clock_ns() - before;
    device->stats.steps++;
    device->stats.tokens += device->token_count;
    device->step_pending = true;
    return CM_OK;
}

enum cm_status cm_device_step_wait(struct cm_device *device, struct cm_step_result *results,
                                   uint32_t count, struct cm_error *err)
{
    if (!device->step_pending || count != device->entry_count) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "no step of %u entries is in flight",
                            count);
    }
    for (uint32_t i = 0; i < count; i++) {
        struct cm_step_result *from = &device->results[i];
        memcpy(&results[i], from, offsetof(struct cm_step_result, text) + from->bytes);
        explicit_bzero(from->text, from->bytes);
    }
    device->step_pending = false;
    return CM_OK;
}

/* ------------------------------------------------------------------ wiping */

void cm_device_scrub_pages(struct cm_device *device, const uint32_t *pages, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        CM_ASSERT(pages[i] < device->limits.kv_pages);
        explicit_bzero(device->kv + pages[i] * device->page_bytes, device->page_bytes);
    }
}

void cm_device_scrub(struct cm_device *device)
{
    if (device->reserved) { /* nothing is written before */
        explicit_bzero(device->arena, device->arena_bytes);
    }
    device->poisoned = true;
}

void cm_device_stats(const struct cm_device *device, struct cm_device_stats *ret_stats)
{
    *ret_stats = device->stats;
}
