/* One step of the decoder over a mixed batch, as one program that every thread runs: the same
 * phases in the same order, with a barrier after each. Data's way: tokens → embedding → per layer {
 * norm → QKV, RoPE, KV pages | attention | out, residual | norm → gate, up, SiLU | down, residual }
 * → norm → head → token → bytes. What a thread takes never changes a result, only who computes it.
 */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>
#include <string.h>

struct run { /* one thread's view of the step */
    struct cm_device *device;
    const struct cm_model *model;
    const struct cm_path *path;
    struct cm_scratch *scratch;
    struct cm_thread_scratch *own;
    struct cm_worker *worker;
    const struct cm_bound_layer *layer;
    uint32_t index; /* of the layer */
};

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static void embed(struct run *run)
{
    uint32_t first, last, width = run->model->width;
    const float scale = run->model->decoder.embedding_scale;
    cm_pool_phase(run->worker, run->device->token_count);
    while (cm_pool_take(run->worker, &first, &last)) {
        for (uint32_t t = first; t < last; t++) {
            float *x = run->scratch->x + (size_t)t * width;
            cm_matrix_row(&run->device->embedding, run->device->tokens[t].token, x, width);
            for (uint32_t i = 0; scale > 0.0f && i < width; i++) {
                x[i] = x[i] * scale;
            }
        }
    }
    cm_pool_barrier(run->worker);
}

/* ------------------------------------------------------------------ activations */

/* Rows of floats that become activations: norm first, if there is a weight. */
struct rows {
    const float *from;
    size_t stride;
    const uint32_t *pick; /* rows to take, NULL: 0 .. count-1 */
    uint32_t count;
    uint32_t exact; /* the first ones, of class D */
    uint32_t columns;
    const float *weight;
};

/* Blocks of a row, in the form of its class. */
static void blocks_put(const struct run *run, const float *x, const struct cm_inputs *inputs,
                       uint32_t row, uint32_t block, uint32_t count)
{
    const uint32_t exact = inputs->of[CM_CLASS_D].tokens;
    if (row < exact) {
        run->path->quantise(x, &inputs->of[CM_CLASS_D], row, block, count);
    } else {
        run->device->prompts->round(x, &inputs->of[CM_CLASS_P], row - exact, block, count);
    }
}

static void row_put(struct run *run, const struct rows *rows, uint32_t row,
                    const struct cm_inputs *inputs)
{
    const float *x = rows->from + (rows->pick ? rows->pick[row] : row) * rows->stride;
    if (rows->weight != NULL) {
        run->path->norm(x, rows->weight, rows->columns, run->model->norm_epsilon, run->own->row);
        x = run->own->row;
    }
    blocks_put(run, x, inputs, row, 0, rows->columns / CM_TILE_COLUMNS);
}

/* `count` rows, the first `exact` of class D, in the forms that a matrix multiplies. */
static struct cm_inputs inputs_of(const struct cm_activations *room, const struct cm_matrix *matrix,
                                  uint32_t exact, uint32_t count)
{
    struct cm_inputs inputs = {{*room, *room}};
    struct cm_activations *d = &inputs.of[CM_CLASS_D], *p = &inputs.of[CM_CLASS_P];
    d->columns = p->columns = matrix->blocks * CM_TILE_COLUMNS;
    d->tokens = exact;
    d->x = matrix->kind == CM_TENSOR_BF16 ? d->x : NULL;
    d->rounded = NULL;
    p->tokens = count - exact;
    return inputs;
}

/* What a product multiplies. A single exact row is quantised by each thread for itself, after its
 * first take: cheaper than to wait for another's. */
struct input {
    struct cm_inputs inputs;
    const struct rows *row; /* that is still to be quantised; NULL: none */
};

static struct input activate(struct run *run, const struct rows *rows,
                             const struct cm_matrix *matrix)
{
    const bool single = rows->count == 1 && rows->exact == 1;
    const struct input input = {
        inputs_of(single ? &run->own->act : &run->scratch->act, matrix, rows->exact, rows->count),
        single ? rows : NULL};
    uint32_t first, last;
    if (single) {
        return input;
    }
    cm_pool_phase(run->worker, rows->count);
    while (cm_pool_take(run->worker, &first, &last)) {
        for (uint32_t row = first; row < last; row++) {
            row_put(run, rows, row, &input.inputs);
        }
    }
    cm_pool_barrier(run->worker);
    return input;
}

static void input_fill(struct run *run, struct input *input)
{
    if (input->row != NULL) {
        row_put(run, input->row, 0, &input->inputs);
        input->row = NULL;
    }
}

/* ------------------------------------------------------------------ products */

/* What becomes of a finished part of a product: y[token][row], `stride` floats a token. */
typedef void (*epilogue)(struct run *run, struct cm_span span, float *y, size_t stride);

/* Tokens of one work item of a product. */
static const uint32_t block_tokens[CM_CLASSES] = {CM_BLOCK_TOKENS, CM_PROMPT_TOKENS};

static uint32_t blocks_of(const struct cm_inputs *inputs, enum cm_class class)
{
    return (inputs->of[class].tokens + block_tokens[class] - 1) / block_tokens[class];
}

/* Block `block` of the tokens of a class × row tiles from `tile` on: product, adapters, finish. */
static void block_multiply(struct run *run, enum cm_site site, const struct cm_matrix *matrix,
                           const struct cm_inputs *inputs, enum cm_class class, uint32_t block,
                           uint32_t tile, uint32_t tile_last, epilogue finish)
{
    const struct cm_activations *x = &inputs->of[class];
    const uint32_t token = block * block_tokens[class];
    struct cm_span span = {token, least(token + block_tokens[class], x->tokens), tile, tile_last};
    const size_t stride = (size_t)(tile_last - tile) * CM_TILE_ROWS;
    if (class == CM_CLASS_D) {
        run->path->gemm(matrix, x, span, run->own->y, stride);
    } else {
        run->device->prompts->gemm(matrix, x, span, run->own->y, stride);
        span.token_first += inputs->of[CM_CLASS_D].tokens; /* from here on, of the step */
        span.token_last += inputs->of[CM_CLASS_D].tokens;
    }
    cm_low_rank_expand(run->device, run->index, site, span, run->own->y, stride);
    finish(run, span, run->own->y, stride);
}

/* A x of the site's adapters. */
static void shrink(struct run *run, enum cm_site site, struct input *input)
{
    uint32_t first, last;
    cm_pool_phase(run->worker, cm_low_rank_items(run->device, run->index, site, &input->inputs));
    while (cm_pool_take(run->worker, &first, &last)) {
        input_fill(run, input);
        for (uint32_t i = first; i < last; i++) {
            cm_low_rank_shrink(run->device, run->index, site, &input->inputs, i);
        }
    }
    cm_pool_barrier(run->worker);
}

/* A matrix from this row tile on, for whom does something else before he multiplies. */
static void tile_fetch(const struct cm_matrix *matrix, uint32_t tile)
{
    const struct cm_tile_shape shape = cm_tile_shape(matrix->kind);
    const size_t at = (size_t)tile * matrix->blocks;
    for (uint32_t i = 0; i < CM_FETCH_BLOCKS * shape.quant_bytes; i += 64) {
        __builtin_prefetch(matrix->quants + at * shape.quant_bytes + i);
    }
    for (uint32_t i = 0; i < CM_FETCH_BLOCKS * shape.scale_bytes; i += 64) {
        __builtin_prefetch(matrix->scales + at * shape.scale_bytes + i);
    }
}

/* Work items are `unit` row tiles × a block of tokens of one class. Adapters add to a part before
 * it is finished. */
static void multiply(struct run *run, enum cm_site site, const struct cm_matrix *matrix,
                     struct input *input, uint32_t unit, epilogue finish)
{
    const struct cm_inputs *inputs = &input->inputs;
    shrink(run, site, input);
    const uint32_t exact = blocks_of(inputs, CM_CLASS_D);
    const uint32_t blocks = exact + blocks_of(inputs, CM_CLASS_P);
    uint32_t first, last;
    cm_pool_phase(run->worker, (matrix->row_tiles + unit - 1) / unit * blocks);
    while (cm_pool_take(run->worker, &first, &last)) {
        if (input->row != NULL) {
            tile_fetch(matrix, first / blocks * unit);
        }
        input_fill(run, input);
        for (uint32_t i = first; i < last; i++) {
            const uint32_t tile = i / blocks * unit, block = i % blocks;
            const bool d = block < exact;
            block_multiply(run, site, matrix, inputs, d ? CM_CLASS_D : CM_CLASS_P,
                           d ? block : block - exact, tile, least(tile + unit, matrix->row_tiles),
                           finish);
        }
    }
    cm_pool_barrier(run->worker);
}

/* Of one KV head's K (0) or V (1) of this layer in a page: [layer][K, V][head]. */
static size_t kv_offset(const struct run *run, uint32_t which, uint32_t head)
{
    const struct cm_model *model = run->model;
    return (((size_t)run->index * 2 + which) * model->kv_heads + head) *
           cm_kv_head_bytes(run->device->limits.kv_kind, model->head_width);
}

/* Bias, norm of a query or a key, RoPE: what this decoder has of them. */
static void head_turn(struct run *run, uint32_t position, uint32_t head, float *x)
{
    const struct cm_model *model = run->model;
    const struct cm_bound_layer *layer = run->layer;
    const float *norm = head < model->heads ? layer->q_norm : layer->k_norm;
    const float *bias = layer->qkv_bias;
    for (uint32_t i = 0; bias != NULL && i < model->head_width; i++) {
        x[i] = x[i] + bias[(size_t)head * model->head_width + i];
    }
    if (head < model->heads + model->kv_heads) {
        size_t at = (size_t)position * model->rope_width / 2;
        if (norm != NULL) {
            run->path->norm(x, norm, model->head_width, model->norm_epsilon, x);
        }
        run->path->rope(x, layer->cosine + at, layer->sine + at, model->rope_width);
    }
}

/* One head of one token, as the product left it: a query is turned and kept, K and V go to their
 * page. Heads are numbered as the rows of QKV lie: queries, keys, values. */
static void head_put(struct run *run, uint32_t t, uint32_t head, float *x)
{
    const struct cm_model *model = run->model;
    const struct cm_step_token *token = &run->device->tokens[t];
    const uint32_t keys = model->heads, values = model->heads + model->kv_heads;
    head_turn(run, token->position, head, x);
    if (head < keys) {
        memcpy(run->scratch->query + ((size_t)t * model->heads + head) * model->head_width, x,
               model->head_width * sizeof(float));
        return;
    }
    uint32_t which = head < values ? 0 : 1;
    uint32_t page =
        run->device->entries[token->entry].pages[token->position / CM_KV_PAGE_POSITIONS];
    uint8_t *at = run->device->kv + page * run->device->page_bytes +
                  kv_offset(run, which, head - (which == 0 ? keys : values));
    (which == 0 ? run->path->key_put
                : run->path->value_put)(run->device->limits.kv_kind, x, model->head_width, at,
                                        token->position % CM_KV_PAGE_POSITIONS);
}

static void heads_finish(struct run *run, struct cm_span span, float *y, size_t stride)
{
    const struct cm_model *model = run->model;
    uint32_t first = span.tile_first * CM_TILE_ROWS / model->head_width;
    uint32_t end = model->heads + 2 * model->kv_heads;
    for (uint32_t t = span.token_first; t < span.token_last; t++) {
        float *x = y + (t - span.token_first) * stride;
        for (uint32_t head = first; head < end && (head - first + 1) * model->head_width <= stride;
             head++) {
            head_put(run, t, head, x + (size_t)(head - first) * model->head_width);
        }
    }
}

static void residual_finish(struct run *run, struct cm_span span, float *y, size_t stride)
{
    uint32_t row = span.tile_first * CM_TILE_ROWS, width = run->model->width;
    for (uint32_t t = span.token_first; t < span.token_last; t++) {
        run->path->add(run->scratch->x + (size_t)t * width + row,
                       y + (t - span.token_first) * stride, least((uint32_t)stride, width - row));
    }
}

/* The same into a buffer of its own: it is normed whole before it is added. */
static void result_finish(struct run *run, struct cm_span span, float *y, size_t stride)
{
    uint32_t row = span.tile_first * CM_TILE_ROWS, width = run->model->width;
    for (uint32_t t = span.token_first; t < span.token_last; t++) {
        memcpy(run->scratch->result + (size_t)t * width + row, y + (t - span.token_first) * stride,
               least((uint32_t)stride, width - row) * sizeof(float));
    }
}

static void result_add(struct run *run, const float *weight)
{
    uint32_t first, last, width = run->model->width;
    cm_pool_phase(run->worker, run->device->token_count);
    while (cm_pool_take(run->worker, &first, &last)) {
        for (uint32_t t = first; t < last; t++) {
            run->path->norm(run->scratch->result + (size_t)t * width, weight, width,
                            run->model->norm_epsilon, run->own->row);
            run->path->add(run->scratch->x + (size_t)t * width, run->own->row, width);
        }
    }
    cm_pool_barrier(run->worker);
}

/* A product that goes into the residual, through the norm if there is one. */
static void multiply_add(struct run *run, enum cm_site site, const struct cm_matrix *matrix,
                         struct input *input, const float *norm)
{
    multiply(run, site, matrix, input, 2, norm != NULL ? result_finish : residual_finish);
    if (norm != NULL) {
        result_add(run, norm);
    }
}

/* Four tiles hold gate and up of 32 columns: one block of the next product's activations. */
static void gate_finish(struct run *run, struct cm_span span, float *y, size_t stride)
{
    const struct cm_inputs hidden = inputs_of(&run->scratch->hidden, &run->layer->down,
                                              run->device->exact_count, run->device->token_count);
    uint32_t block = span.tile_first / 4, blocks = (span.tile_last - span.tile_first) / 4;
    for (uint32_t t = span.token_first; t < span.token_last; t++) {
        run->path->gate(y + (t - span.token_first) * stride, blocks * CM_TILE_COLUMNS,
                        run->model->decoder.activation, run->own->row);
        blocks_put(run, run->own->row, &hidden, t, block, blocks);
    }
}

/* ------------------------------------------------------------------ attention */

/* K and V of int8 are class D's in prompts too. */
static enum cm_class attention_class(const struct cm_device *device,
                                     const struct cm_step_entry *entry)
{
    return device->limits.kv_kind == CM_KV_FP16 ? cm_entry_class(device, entry) : CM_CLASS_D;
}

/* The step's attention, for one KV head: prompts in tiles of tokens, single tokens whole, or chunk
 * by chunk where there are too few of them to keep all threads at work. */
static void attention_plan(struct cm_device *device)
{
    const struct cm_model *model = &device->model;
    static const uint32_t rows[CM_CLASSES] = {CM_ATTENTION_ROWS, CM_PROMPT_ROWS};
    uint32_t group = model->heads / model->kv_heads, singles = 0;
    for (uint32_t e = 0; e < device->entry_count; e++) {
        singles += device->entries[e].token_count == 1;
    }
    bool split = singles * model->kv_heads <= CM_SPLITS * cm_pool_threads(device->pool);
    device->item_count = device->splits = 0;
    for (uint32_t e = 0; e < device->entry_count; e++) {
        const struct cm_step_entry *entry = &device->entries[e];
        uint32_t chunks = entry->position / CM_ATTENTION_CHUNK + 1, token = device->entry_token[e];
        const enum cm_class class = attention_class(device, entry);
        const uint32_t tile = rows[class] / group > 1 ? rows[class] / group : 1;
        if (split && class == CM_CLASS_D && entry->token_count == 1 && chunks > 1) {
            for (uint32_t c = 0; c < chunks; c++) {
                device->items[device->item_count++] =
                    (struct cm_attention_item){e, token, 1, c, device->splits};
            }
            device->splits++;
        } else {
            for (uint32_t t = 0; t < entry->token_count; t += tile) {
                device->items[device->item_count++] = (struct cm_attention_item){
                    e, token + t, least(tile, entry->token_count - t), CM_CHUNKS_ALL, 0};
            }
        }
    }
}

static struct cm_attention attention_of(struct run *run, const struct cm_attention_item *item,
                                        uint32_t head)
{
    const struct cm_model *model = run->model;
    const struct cm_decoder *decoder = &model->decoder;
    uint32_t group = model->heads / model->kv_heads;
    size_t stride = (size_t)model->heads * model->head_width;
    size_t at = item->token * stride + (size_t)head * group * model->head_width;
    return (struct cm_attention){.query = run->scratch->query + at,
                                 .query_stride = stride,
                                 .tokens = item->tokens,
                                 .group = group,
                                 .head_width = model->head_width,
                                 .position = run->device->tokens[item->token].position,
                                 .pages = run->device->entries[item->entry].pages,
                                 .kv = run->device->kv,
                                 .page_bytes = run->device->page_bytes,
                                 .kv_kind = run->device->limits.kv_kind,
                                 .k_offset = kv_offset(run, 0, head),
                                 .v_offset = kv_offset(run, 1, head),
                                 .scale = decoder->attention_scale > 0.0f
                                              ? decoder->attention_scale
                                              : 1.0f / sqrtf((float)model->head_width),
                                 .cap = decoder->attention_cap,
                                 .window = run->layer->window,
                                 .out = run->scratch->attention + at,
                                 .out_stride = stride,
                                 .scratch = run->own->attention};
}

static float *partial_of(struct run *run, const struct cm_attention_item *item, uint32_t head,
                         uint32_t chunk)
{
    const struct cm_model *model = run->model;
    size_t row = (size_t)item->partial * model->kv_heads + head;
    return run->scratch->partials +
           (row * run->device->chunks_max + chunk) *
               cm_partial_floats(model->heads / model->kv_heads, model->head_width);
}

static void item_run(struct run *run, const struct cm_attention_item *item, uint32_t head)
{
    struct cm_attention attention = attention_of(run, item, head);
    if (attention_class(run->device, &run->device->entries[item->entry]) == CM_CLASS_P) {
        run->device->prompts->attend(&attention);
    } else if (item->chunk == CM_CHUNKS_ALL) {
        run->path->attend(&attention);
    } else {
        run->path->attend_chunk(&attention, item->chunk, partial_of(run, item, head, item->chunk));
    }
}

/* The first chunk's item of a split token merges all of them. */
static void item_merge(struct run *run, const struct cm_attention_item *item, uint32_t head)
{
    if (item->chunk == 0) {
        struct cm_attention attention = attention_of(run, item, head);
        run->path->attend_merge(&attention, attention.position / CM_ATTENTION_CHUNK + 1,
                                partial_of(run, item, head, 0));
    }
}

static void attend(struct run *run,
                   void (*work)(struct run *, const struct cm_attention_item *, uint32_t))
{
    uint32_t first, last, items = run->device->item_count;
    cm_pool_phase(run->worker, items * run->model->kv_heads);
    while (cm_pool_take(run->worker, &first, &last)) {
        for (uint32_t i = first; i < last; i++) {
            work(run, &run->device->items[i % items], i / items);
        }
    }
    cm_pool_barrier(run->worker);
}

/* ------------------------------------------------------------------ the program */

static void layer_run(struct run *run)
{
    const struct cm_model *model = run->model;
    const struct cm_bound_layer *layer = run->layer;
    struct cm_scratch *scratch = run->scratch;
    const uint32_t tokens = run->device->token_count, exact = run->device->exact_count;
    const uint32_t attention = model->heads * model->head_width;
    uint32_t head_tiles = cm_heads_per_unit(model->head_width) * model->head_width / CM_TILE_ROWS;
    struct rows x = {scratch->x,   model->width,         NULL, tokens, exact,
                     model->width, layer->attention_norm};
    struct input input = activate(run, &x, &layer->qkv);
    multiply(run, CM_SITE_QKV, &layer->qkv, &input, head_tiles, heads_finish);
    attend(run, item_run);
    if (run->device->splits > 0) {
        attend(run, item_merge);
    }
    struct rows out = {scratch->attention, attention, NULL, tokens, exact, attention, NULL};
    input = activate(run, &out, &layer->attention_out);
    multiply_add(run, CM_SITE_OUT, &layer->attention_out, &input, layer->post_attention_norm);
    x.weight = layer->ffn_norm;
    input = activate(run, &x, &layer->gate_up);
    multiply(run, CM_SITE_GATE_UP, &layer->gate_up, &input, 4, gate_finish);
    input = (struct input){inputs_of(&scratch->hidden, &layer->down, exact, tokens), NULL};
    multiply_add(run, CM_SITE_DOWN, &layer->down, &input, layer->post_ffn_norm);
}

static size_t padded_rows(const struct cm_matrix *matrix)
{
    return (size_t)matrix->row_tiles * CM_TILE_ROWS;
}

/* Logits of the picked tokens, in class D always: weights are read once for a few of them. */
static void head_run(struct run *run, const uint32_t *pick, uint32_t count)
{
    const struct cm_matrix *head = &run->device->head;
    const float cap = run->model->decoder.logits_cap;
    const uint32_t unit = 4;
    uint32_t first, last;
    struct rows rows = {run->scratch->x,   run->model->width,    pick, count, count,
                        run->model->width, run->device->out_norm};
    struct input input = activate(run, &rows, head);
    cm_pool_phase(run->worker, (head->row_tiles + unit - 1) / unit);
    while (cm_pool_take(run->worker, &first, &last)) {
        input_fill(run, &input);
        struct cm_span span = {0, count, first * unit, least(last * unit, head->row_tiles)};
        float *logits = run->scratch->logits + (size_t)span.tile_first * CM_TILE_ROWS;
        run->path->gemm(head, &input.inputs.of[CM_CLASS_D], span, logits, padded_rows(head));
        for (uint32_t t = 0; cap > 0.0f && t < count; t++) {
            run->path->cap(logits + t * padded_rows(head),
                           (span.tile_last - span.tile_first) * CM_TILE_ROWS, cap);
        }
    }
    cm_pool_barrier(run->worker);
}

/* Tests: logits of every token of the step. */
static void probe_run(struct run *run)
{
    uint32_t vocabulary = run->model->vocabulary, first, last;
    for (uint32_t t = 0; t < run->device->token_count; t++) {
        head_run(run, &t, 1);
        cm_pool_phase(run->worker, 1);
        while (cm_pool_take(run->worker, &first, &last)) {
            memcpy(run->device->probe + (size_t)t * vocabulary, run->scratch->logits,
                   vocabulary * sizeof(float));
        }
        cm_pool_barrier(run->worker);
    }
}

static void verdicts_take(struct cm_guard_state *guard, struct cm_step_result *result)
{
    _Static_assert(CM_GUARD_VERDICTS_MAX <= CM_STEP_VERDICTS_MAX, "a step tells all of them");
    for (uint32_t i = 0; i < guard->verdict_count; i++) {
        const struct cm_guard_verdict *from = &guard->verdicts[i];
        result->verdicts[i] = (struct cm_step_verdict){
            from->rule, from->action, from->start - guard->base, from->end - from->start};
    }
    result->verdict_count = guard->verdict_count;
    result->verdicts_lost = guard->verdicts_lost;
    guard->verdict_count = guard->verdicts_lost = 0;
}

static void entry_finish(struct run *run, const struct cm_step_entry *entry, float *logits,
                         struct cm_step_result *result)
{
    const struct cm_model *model = run->model;
    struct cm_slot *slot = &run->device->slots[entry->slot];
    uint32_t masked = slot->drawn < slot->min_tokens ? model->end_token_count : 0;
    uint32_t token = cm_sample(slot, run->path, logits, model->vocabulary, model->end_tokens,
                               masked, run->own->candidates);
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
    enum cm_finish finish =
        cm_slot_release(run->device->guard, slot, bytes, size,
                        end ? CM_SLOT_TEXT_END : (full ? CM_SLOT_CUT : CM_SLOT_GOES_ON),
                        result->text, &result->bytes);
    verdicts_take(&slot->guard, result);
    result->sampled = true;
    result->token = token;
    result->completion_tokens = slot->drawn;
    if (finish == CM_FINISH_NONE) {
        finish = end ? CM_FINISH_STOP : (full ? CM_FINISH_LENGTH : CM_FINISH_NONE);
    }
    result->finish = finish;
}

/* Whether a residual can be normed: its squares' sum is a number. Weights are finite, sums of them
 * may still overflow, and an infinity or a NaN that is rounded to int8 would become a token. */
static bool sound(const float *x, uint32_t size)
{
    float sum = 0.0f;
    for (uint32_t i = 0; i < size; i++) {
        sum += x[i] * x[i];
    }
    return isfinite(sum);
}

/* Logits and tokens of the entries that want one; who cannot have one fails alone. */
static void sample_run(struct run *run)
{
    struct cm_device *device = run->device;
    uint32_t first, last;
    head_run(run, device->wanted_token, device->wanted_count);
    cm_pool_phase(run->worker, device->wanted_count);
    while (cm_pool_take(run->worker, &first, &last)) {
        for (uint32_t i = first; i < last; i++) {
            const uint32_t entry = device->wanted[i], width = device->model.width;
            struct cm_step_result *result = &device->results[entry];
            if (!sound(run->scratch->x + (size_t)device->wanted_token[i] * width, width)) {
                result->sampled = true;
                result->finish = CM_FINISH_FAILED;
                result->completion_tokens = device->slots[device->entries[entry].slot].drawn;
                continue;
            }
            entry_finish(run, &device->entries[entry],
                         run->scratch->logits + i * padded_rows(&device->head), result);
        }
    }
    cm_pool_barrier(run->worker);
}

static void program(void *context, struct cm_worker *worker)
{
    struct cm_device *device = context;
    struct run run = {.device = device,
                      .model = &device->model,
                      .path = device->path,
                      .scratch = &device->scratch,
                      .own = &device->scratch.threads[worker->index],
                      .worker = worker};
    embed(&run);
    for (run.index = 0; run.index < device->model.layers; run.index++) {
        run.layer = &device->layers[run.index];
        layer_run(&run);
    }
    if (device->probe != NULL) {
        probe_run(&run);
    }
    if (device->wanted_count > 0) {
        sample_run(&run);
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

static void wanted_find(struct cm_device *device)
{
    device->wanted_count = 0;
    for (uint32_t e = 0; e < device->entry_count; e++) {
        if (device->entries[e].sample) {
            device->wanted_token[device->wanted_count] =
                device->entry_token[e] + device->entries[e].token_count - 1;
            device->wanted[device->wanted_count++] = e;
        }
    }
}

void cm_forward(struct cm_device *device)
{
    seen_mark(device);
    wanted_find(device);
    attention_plan(device);
    cm_low_rank_plan(device);
    cm_pool_run(device->pool, program, device);
}
