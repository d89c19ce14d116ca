/* One step of the decoder over a mixed batch. Data's way: tokens → embedding → per layer { norm →
 * QKV → RoPE → KV pages → attention → out; norm → gate, up → down } → norm → head → logits → token
 * → bytes. Each phase is one pool run; what a thread does never changes a result, only who computes
 * it. */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>
#include <string.h>

/* Which share of `count` is a thread's. */
static void share(uint32_t count, uint32_t thread, uint32_t threads, uint32_t *ret_first,
                  uint32_t *ret_last)
{
    *ret_first = (uint32_t)((uint64_t)count * thread / threads);
    *ret_last = (uint32_t)((uint64_t)count * (thread + 1) / threads);
}

struct phase {
    struct cm_device *device;
    const struct cm_bound_layer *layer;
    uint32_t index; /* of the layer */
    const struct cm_matrix *matrix;
    const float *weight; /* of the norm */
    const float *from;
    size_t from_stride;
    float *to;
    size_t to_stride;
    uint32_t rows;
    uint32_t columns;
};

static void embed_task(void *context, uint32_t thread, uint32_t threads)
{
    struct cm_device *device = ((struct phase *)context)->device;
    uint32_t first, last;
    share(device->token_count, thread, threads, &first, &last);
    for (uint32_t t = first; t < last; t++) {
        cm_matrix_row(&device->embedding, device->tokens[t].token,
                      device->scratch.x + (size_t)t * device->model.width, device->model.width);
    }
}

/* Norm (if there is a weight), then quantise rows of `from` into the activations. */
static void quantise_task(void *context, uint32_t thread, uint32_t threads)
{
    struct phase *phase = context;
    struct cm_scratch *scratch = &phase->device->scratch;
    uint32_t first, last, blocks = phase->columns / CM_TILE_COLUMNS;
    share(phase->rows, thread, threads, &first, &last);
    for (uint32_t t = first; t < last; t++) {
        const float *row = phase->from + t * phase->from_stride;
        size_t at = (size_t)t * blocks;
        if (phase->weight != NULL) {
            float *normed = scratch->normed + (size_t)t * phase->columns;
            cm_vector_norm(row, phase->weight, phase->columns, phase->device->model.norm_epsilon,
                           normed);
            row = normed;
        }
        cm_vector_quantise(row, phase->columns, scratch->act.q + at * CM_TILE_COLUMNS,
                           scratch->act.scale + at, scratch->act.sum + at, scratch->act.count + at);
    }
}

static void gemm_task(void *context, uint32_t thread, uint32_t threads)
{
    struct phase *phase = context;
    struct cm_activations *act = &phase->device->scratch.act;
    uint32_t first, last;
    share(phase->matrix->row_tiles, thread, threads, &first, &last);
    phase->device->path->gemm(phase->matrix, act, phase->to, phase->to_stride, first, last);
}

/* quantise(norm(from)) × matrix → to */
static void multiply(struct cm_device *device, const struct cm_matrix *matrix, const float *weight,
                     const float *from, uint32_t columns, uint32_t rows, float *to)
{
    struct phase phase = {.device = device,
                          .matrix = matrix,
                          .weight = weight,
                          .from = from,
                          .from_stride = columns,
                          .to = to,
                          .to_stride = (size_t)matrix->row_tiles * CM_TILE_ROWS,
                          .rows = rows,
                          .columns = columns};
    device->scratch.act.columns = columns;
    device->scratch.act.tokens = rows;
    cm_pool_run(device->pool, quantise_task, &phase);
    cm_pool_run(device->pool, gemm_task, &phase);
}

static size_t head_bytes(const struct cm_model *model)
{
    return (size_t)CM_KV_PAGE_POSITIONS * model->head_width * sizeof(uint16_t);
}

/* Offset of one KV head's K (kind 0) or V (kind 1) in a page: [layer][K, V][head][position][width].
 */
static size_t kv_offset(const struct cm_model *model, uint32_t layer, uint32_t kind, uint32_t head)
{
    return (((size_t)layer * 2 + kind) * model->kv_heads + head) * head_bytes(model);
}

/* Turn Q and K, put K and V into their pages. */
static void scatter_task(void *context, uint32_t thread, uint32_t threads)
{
    struct phase *phase = context;
    struct cm_device *device = phase->device;
    const struct cm_model *model = &device->model;
    uint32_t first, last;
    share(device->token_count, thread, threads, &first, &last);
    for (uint32_t t = first; t < last; t++) {
        const struct cm_step_token *token = &device->tokens[t];
        const struct cm_step_entry *entry = &device->entries[token->entry];
        float *row = phase->to + t * phase->to_stride;
        const float *cosine = device->cosine + (size_t)token->position * model->rope_width / 2;
        const float *sine = device->sine + (size_t)token->position * model->rope_width / 2;
        uint32_t page = entry->pages[token->position / CM_KV_PAGE_POSITIONS];
        size_t place = (size_t)(token->position % CM_KV_PAGE_POSITIONS) * model->head_width;
        uint8_t *base = device->kv + page * device->page_bytes;
        for (uint32_t h = 0; h < model->heads + model->kv_heads; h++) {
            cm_vector_rope(row + (size_t)h * model->head_width, cosine, sine, model->rope_width);
        }
        for (uint32_t kind = 0; kind < 2; kind++) {
            for (uint32_t h = 0; h < model->kv_heads; h++) {
                const float *from =
                    row + (size_t)(model->heads + kind * model->kv_heads + h) * model->head_width;
                uint8_t *to = base + kv_offset(model, phase->index, kind, h);
                cm_vector_to_half(from, (uint16_t *)(void *)to + place, model->head_width);
            }
        }
    }
}

/* Work items: token × KV head, taken in turn so that long contexts spread over the threads. */
static void attention_task(void *context, uint32_t thread, uint32_t threads)
{
    struct phase *phase = context;
    struct cm_device *device = phase->device;
    const struct cm_model *model = &device->model;
    uint32_t group = model->heads / model->kv_heads;
    for (uint32_t i = thread; i < device->token_count * model->kv_heads; i += threads) {
        uint32_t t = i / model->kv_heads, h = i % model->kv_heads;
        const struct cm_step_token *token = &device->tokens[t];
        size_t head = (size_t)h * group * model->head_width;
        struct cm_attention attention = {.query = phase->from + t * phase->from_stride + head,
                                         .group = group,
                                         .head_width = model->head_width,
                                         .positions = token->position + 1,
                                         .pages = device->entries[token->entry].pages,
                                         .kv = device->kv,
                                         .page_bytes = device->page_bytes,
                                         .k_offset = kv_offset(model, phase->index, 0, h),
                                         .v_offset = kv_offset(model, phase->index, 1, h),
                                         .scale = 1.0f / sqrtf((float)model->head_width),
                                         .out = phase->to + t * phase->to_stride + head};
        cm_attention_run(&attention);
    }
}

static void gate_task(void *context, uint32_t thread, uint32_t threads)
{
    struct phase *phase = context;
    uint32_t first, last;
    share(phase->rows, thread, threads, &first, &last);
    for (uint32_t t = first; t < last; t++) {
        cm_vector_gate(phase->from + t * phase->from_stride, phase->columns,
                       phase->to + t * phase->to_stride);
    }
}

static void add_task(void *context, uint32_t thread, uint32_t threads)
{
    struct phase *phase = context;
    uint32_t first, last;
    share(phase->rows, thread, threads, &first, &last);
    for (uint32_t t = first; t < last; t++) {
        for (uint32_t k = 0; k < phase->columns; k++) {
            phase->to[t * phase->to_stride + k] += phase->from[t * phase->from_stride + k];
        }
    }
}

static size_t padded_rows(const struct cm_matrix *matrix)
{
    return (size_t)matrix->row_tiles * CM_TILE_ROWS;
}

/* x += from, where from has the matrix's padded rows. */
static void residual_add(struct cm_device *device, const struct cm_matrix *matrix)
{
    struct phase phase = {.device = device,
                          .from = device->scratch.wide,
                          .from_stride = padded_rows(matrix),
                          .to = device->scratch.x,
                          .to_stride = device->model.width,
                          .rows = device->token_count,
                          .columns = device->model.width};
    cm_pool_run(device->pool, add_task, &phase);
}

static void layer_run(struct cm_device *device, uint32_t index)
{
    const struct cm_model *model = &device->model;
    const struct cm_bound_layer *layer = &device->layers[index];
    struct cm_scratch *scratch = &device->scratch;
    uint32_t tokens = device->token_count, attention_width = model->heads * model->head_width;
    multiply(device, &layer->qkv, layer->attention_norm, scratch->x, model->width, tokens,
             scratch->wide);
    struct phase phase = {.device = device,
                          .index = index,
                          .to = scratch->wide,
                          .to_stride = padded_rows(&layer->qkv)};
    cm_pool_run(device->pool, scatter_task, &phase);
    phase.from = scratch->wide;
    phase.from_stride = padded_rows(&layer->qkv);
    phase.to = scratch->attention;
    phase.to_stride = attention_width;
    cm_pool_run(device->pool, attention_task, &phase);
    multiply(device, &layer->attention_out, NULL, scratch->attention, attention_width, tokens,
             scratch->wide);
    residual_add(device, &layer->attention_out);
    multiply(device, &layer->gate_up, layer->ffn_norm, scratch->x, model->width, tokens,
             scratch->wide);
    struct phase gate = {.device = device,
                         .from = scratch->wide,
                         .from_stride = padded_rows(&layer->gate_up),
                         .to = scratch->normed,
                         .to_stride = model->ffn_width,
                         .rows = tokens,
                         .columns = model->ffn_width};
    cm_pool_run(device->pool, gate_task, &gate);
    multiply(device, &layer->down, NULL, scratch->normed, model->ffn_width, tokens, scratch->wide);
    residual_add(device, &layer->down);
}

/* Tests: logits of every token of the step. */
static void probe_run(struct cm_device *device)
{
    const struct cm_model *model = &device->model;
    for (uint32_t t = 0; t < device->token_count; t++) {
        multiply(device, &device->head, device->out_norm,
                 device->scratch.x + (size_t)t * model->width, model->width, 1,
                 device->scratch.logits);
        memcpy(device->probe + (size_t)t * model->vocabulary, device->scratch.logits,
               model->vocabulary * sizeof(float));
    }
}

static void entry_finish(struct cm_device *device, const struct cm_step_entry *entry, float *logits,
                         struct cm_step_result *result, struct cm_candidate *scratch)
{
    const struct cm_model *model = &device->model;
    struct cm_slot *slot = &device->slots[entry->slot];
    uint32_t masked = slot->drawn < slot->min_tokens ? model->end_token_count : 0;
    uint32_t token = cm_sample(slot, logits, model->vocabulary, model->end_tokens, masked, scratch);
    bool end = false;
    for (uint32_t i = 0; i < model->end_token_count; i++) {
        end = end || (!slot->ignore_eos && token == model->end_tokens[i]);
    }
    slot->drawn++;
    slot->seen[token] = 1;
    if (slot->generated[token] < UINT16_MAX) {
        slot->generated[token]++;
    }
    bool shown = !end && model->token_control[token] == 0;
    const uint8_t *bytes = model->token_bytes + model->token_offsets[token];
    uint32_t size = shown ? model->token_offsets[token + 1] - model->token_offsets[token] : 0;
    bool full = slot->drawn >= slot->max_tokens;
    bool stopped = cm_slot_release(slot, bytes, size, end || full, result->text, &result->bytes);
    result->sampled = true;
    result->token = token;
    result->completion_tokens = slot->drawn;
    result->finish = end || stopped ? CM_FINISH_STOP : (full ? CM_FINISH_LENGTH : CM_FINISH_NONE);
}

struct finish {
    struct cm_device *device;
    const uint32_t *wanted; /* entries that sample */
    uint32_t count;
    size_t stride;
};

static void finish_task(void *context, uint32_t thread, uint32_t threads)
{
    struct finish *finish = context;
    struct cm_device *device = finish->device;
    for (uint32_t i = thread; i < finish->count; i += threads) {
        uint32_t entry = finish->wanted[i];
        entry_finish(device, &device->entries[entry], device->scratch.logits + i * finish->stride,
                     &device->results[entry],
                     device->scratch.candidates + (size_t)thread * device->model.vocabulary);
    }
}

/* Logits and tokens of the entries that want one. */
static void sample_run(struct cm_device *device)
{
    uint32_t wanted[CM_STEP_ENTRIES_MAX], count = 0, end = 0;
    const uint32_t width = device->model.width;
    for (uint32_t e = 0; e < device->entry_count; e++) {
        end += device->entries[e].token_count;
        if (device->entries[e].sample) {
            memcpy(device->scratch.last + (size_t)count * width,
                   device->scratch.x + (size_t)(end - 1) * width, width * sizeof(float));
            wanted[count++] = e;
        }
    }
    if (count > 0) {
        multiply(device, &device->head, device->out_norm, device->scratch.last, width, count,
                 device->scratch.logits);
        struct finish finish = {device, wanted, count, padded_rows(&device->head)};
        cm_pool_run(device->pool, finish_task, &finish);
    }
}

/* Prompt tokens count as seen, unless this is a replay. */
static void seen_mark(struct cm_device *device)
{
    for (uint32_t t = 0; t < device->token_count; t++) {
        const struct cm_step_entry *entry = &device->entries[device->tokens[t].entry];
        if (!entry->replay) {
            device->slots[entry->slot].seen[device->tokens[t].token] = 1;
        }
    }
}

void cm_forward(struct cm_device *device)
{
    struct phase phase = {.device = device};
    seen_mark(device);
    cm_pool_run(device->pool, embed_task, &phase);
    for (uint32_t layer = 0; layer < device->model.layers; layer++) {
        layer_run(device, layer);
    }
    if (device->probe != NULL) {
        probe_run(device);
    }
    sample_run(device);
}
