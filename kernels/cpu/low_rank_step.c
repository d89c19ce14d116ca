/* Adapters in a step: W x + scale * B (A x). A x is a phase of its own, before the product that it
 * belongs to; B's part is added where a part of the product is finished. */
#include "kernels/cpu/cpu_internal.h"

/* A target of a site: its row tiles among those of the site's matrix. */
struct target {
    uint32_t target;
    uint32_t first, count; /* row tiles: first, first + step, … */
    uint32_t step;
};

static uint32_t targets_of(const struct cm_model *m, enum cm_site site, struct target ret[3])
{
    const uint32_t query = m->heads * m->head_width / CM_TILE_ROWS;
    const uint32_t kv = m->kv_heads * m->head_width / CM_TILE_ROWS;
    const uint32_t ffn = m->ffn_width / CM_TILE_ROWS, width = m->width / CM_TILE_ROWS;
    switch (site) {
    case CM_SITE_QKV:
        ret[0] = (struct target){CM_TARGET_Q, 0, query, 1};
        ret[1] = (struct target){CM_TARGET_K, query, kv, 1};
        ret[2] = (struct target){CM_TARGET_V, query + kv, kv, 1};
        return 3;
    case CM_SITE_GATE_UP:
        ret[0] = (struct target){CM_TARGET_GATE, 0, ffn, 2};
        ret[1] = (struct target){CM_TARGET_UP, 1, ffn, 2};
        return 2;
    case CM_SITE_OUT:
        ret[0] = (struct target){CM_TARGET_ATTENTION_OUT, 0, width, 1};
        return 1;
    case CM_SITE_DOWN:
        ret[0] = (struct target){CM_TARGET_DOWN, 0, width, 1};
        return 1;
    }
    return 0;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

void cm_low_rank_plan(struct cm_device *device)
{
    device->run_count = device->rank_tiles = 0;
    for (uint32_t t = 0; t < device->token_count; t++) {
        const struct cm_adapter_region *adapter = device->tokens[t].adapter;
        if (adapter == NULL) {
            continue;
        }
        struct cm_low_rank_run *run = &device->scratch.runs[device->run_count];
        if (device->run_count > 0 && run[-1].adapter == adapter && t != device->exact_count &&
            run[-1].token + run[-1].tokens == t && run[-1].tokens < CM_LOW_RANK_TOKENS) {
            run[-1].tokens++;
            continue;
        }
        *run = (struct cm_low_rank_run){t, 1, adapter};
        device->run_count++;
        uint32_t tiles = cm_rank_tiles(adapter->rank);
        device->rank_tiles = tiles > device->rank_tiles ? tiles : device->rank_tiles;
    }
}

/* Where the parts of (target of the site, row tile) of a token lie, chunk after chunk. */
static float *parts_of(const struct cm_device *device, uint32_t token, uint32_t target,
                       uint32_t tile, uint32_t chunks)
{
    return device->scratch.low + (size_t)token * device->low_floats +
           (size_t)(target * device->rank_tiles + tile) * chunks * CM_TILE_ROWS;
}

/* Does any adapter of the step have a target of the site in this layer? */
static bool site_adapted(const struct cm_device *device, uint32_t layer,
                         const struct target *targets, uint32_t count)
{
    bool found = false;
    for (uint32_t r = 0; !found && r < device->run_count; r++) {
        for (uint32_t i = 0; i < count; i++) {
            found = found ||
                    device->scratch.runs[r].adapter->layers[layer][targets[i].target].a != NULL;
        }
    }
    return found;
}

uint32_t cm_low_rank_items(const struct cm_device *device, uint32_t layer, enum cm_site site,
                           const struct cm_inputs *inputs)
{
    struct target targets[3];
    const uint32_t count = targets_of(&device->model, site, targets);
    return site_adapted(device, layer, targets, count)
               ? count * device->rank_tiles * cm_low_rank_chunks(inputs->of[CM_CLASS_D].columns) *
                     device->run_count
               : 0;
}

/* Runs fastest, for they share what A is there. */
void cm_low_rank_shrink(const struct cm_device *device, uint32_t layer, enum cm_site site,
                        const struct cm_inputs *inputs, uint32_t item)
{
    struct target targets[3];
    (void)targets_of(&device->model, site, targets);
    const uint32_t runs = device->run_count, exact = device->exact_count;
    const struct cm_low_rank_run *run = &device->scratch.runs[item % runs];
    const bool first_class = run->token < exact;
    const struct cm_activations *x = &inputs->of[first_class ? CM_CLASS_D : CM_CLASS_P];
    const uint32_t chunks = cm_low_rank_chunks(x->columns);
    const uint32_t chunk = item / runs % chunks, tile = item / runs / chunks % device->rank_tiles;
    const uint32_t target = item / runs / chunks / device->rank_tiles;
    const uint16_t *a = run->adapter->layers[layer][targets[target].target].a;
    const uint32_t column = chunk * CM_LOW_RANK_COLUMNS;
    if (a == NULL || tile >= cm_rank_tiles(run->adapter->rank)) {
        return;
    }
    device->path->shrink(
        a + ((size_t)tile * x->columns + column) * CM_TILE_ROWS, x,
        first_class ? run->token : run->token - exact, run->tokens, column / CM_TILE_COLUMNS,
        least(CM_LOW_RANK_COLUMNS, x->columns - column) / CM_TILE_COLUMNS,
        parts_of(device, run->token, target, tile, chunks) + (size_t)chunk * CM_TILE_ROWS,
        device->low_floats);
}

/* scale * A x, its parts summed ascending. */
static void parts_sum(const float *parts, uint32_t chunks, float scale, float ret[CM_TILE_ROWS])
{
    for (uint32_t r = 0; r < CM_TILE_ROWS; r++) {
        ret[r] = parts[r];
    }
    for (uint32_t c = 1; c < chunks; c++) {
        for (uint32_t r = 0; r < CM_TILE_ROWS; r++) {
            ret[r] = ret[r] + parts[c * CM_TILE_ROWS + r];
        }
    }
    for (uint32_t r = 0; r < CM_TILE_ROWS; r++) {
        ret[r] = ret[r] * scale;
    }
}

static uint32_t columns_of(const struct cm_model *m, enum cm_site site)
{
    return site == CM_SITE_DOWN  ? m->ffn_width
           : site == CM_SITE_OUT ? m->heads * m->head_width
                                 : m->width;
}

/* Row tiles from .. to of a target that lie in a span. Spans of interleaved targets begin at an
 * even tile. */
static void target_cut(const struct target *target, struct cm_span span, uint32_t *ret_from,
                       uint32_t *ret_to)
{
    const uint32_t first = target->first, step = target->step;
    *ret_from = span.tile_first > first ? (span.tile_first - first + step - 1) / step : 0;
    *ret_to = span.tile_last > first
                  ? least((span.tile_last - first + step - 1) / step, target->count)
                  : 0;
}

void cm_low_rank_expand(const struct cm_device *device, uint32_t layer, enum cm_site site,
                        struct cm_span span, float *y, size_t stride)
{
    struct target targets[3];
    const uint32_t count = device->run_count > 0 ? targets_of(&device->model, site, targets) : 0;
    const uint32_t chunks = cm_low_rank_chunks(columns_of(&device->model, site));
    for (uint32_t i = 0; i < count; i++) {
        const struct target *target = &targets[i];
        uint32_t from, to;
        target_cut(target, span, &from, &to);
        const uint32_t row = (target->first + from * target->step - span.tile_first) * CM_TILE_ROWS;
        for (uint32_t t = span.token_first; from < to && t < span.token_last; t++) {
            const struct cm_adapter_region *adapter = device->tokens[t].adapter;
            const uint16_t *b = adapter != NULL ? adapter->layers[layer][target->target].b : NULL;
            float u[CM_ADAPTER_RANK_MAX];
            for (uint32_t tile = 0; b != NULL && tile < cm_rank_tiles(adapter->rank); tile++) {
                parts_sum(parts_of(device, t, i, tile, chunks), chunks, adapter->scale,
                          u + (size_t)tile * CM_TILE_ROWS);
            }
            if (b != NULL) {
                device->path->expand(b + (size_t)from * adapter->rank * CM_TILE_ROWS, adapter->rank,
                                     to - from, u, y + (t - span.token_first) * stride + row,
                                     (size_t)target->step * CM_TILE_ROWS);
            }
        }
    }
}
