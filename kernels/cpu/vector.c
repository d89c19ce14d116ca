/* Vector arithmetic of a path, in the order of kernels/NUMERICS.md. Compiled once for each path. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/lanes.h"

void LANES_NAME(quantise)(const float *x, const struct cm_activations *act, uint32_t token,
                          uint32_t block_first, uint32_t count)
{
    for (uint32_t b = 0; b < count; b++) {
        size_t at = cm_activation_at(act, token, block_first + b);
        if (act->x != NULL) {
            memcpy(act->x + at * CM_TILE_COLUMNS, x + b * CM_TILE_COLUMNS,
                   CM_TILE_COLUMNS * sizeof(float));
            continue;
        }
        const float *from = x + b * CM_TILE_COLUMNS;
        int32_t n = lanes_quantise(lanes_load(from), lanes_load(from + LANES), 0.0f,
                                   act->q + at * CM_TILE_COLUMNS, &act->scale[at]);
        act->count[at] = n;
        act->sum[at] = act->scale[at] * (float)n;
    }
}

void LANES_NAME(norm)(const float *x, const float *weight, uint32_t size, float epsilon, float *ret)
{
    lanes sum = lanes_set(0.0f);
    uint32_t whole = size / LANES * LANES, rest = size - whole;
    for (uint32_t i = 0; i < whole; i += LANES) {
        lanes v = lanes_load(x + i);
        sum = lanes_fma(v, v, sum);
    }
    if (rest > 0) {
        float tail[LANES] = {0};
        memcpy(tail, x + whole, rest * sizeof(float));
        lanes v = lanes_load(tail);
        sum = lanes_fma(v, v, sum);
    }
    float r = 1.0f / sqrtf(lanes_sum(sum) / (float)size + epsilon);
    for (uint32_t i = 0; i < whole; i += LANES) {
        lanes_store(ret + i,
                    lanes_mul(lanes_mul(lanes_load(x + i), lanes_set(r)), lanes_load(weight + i)));
    }
    for (uint32_t i = whole; i < size; i++) {
        ret[i] = (x[i] * r) * weight[i];
    }
}

/* What x is divided by 1 + exp(-…) of: x, or nearly x + 0.044715 x^3 (Hendrycks and Gimpel 2016).
 */
static inline lanes gate_turn(uint32_t activation, lanes x)
{
    if (activation == CM_ACTIVATION_SILU) {
        return x;
    }
    lanes t = lanes_fma(lanes_mul(x, x), lanes_set(0.044715f), lanes_set(1.0f));
    return lanes_mul(lanes_mul(x, t), lanes_set(CM_GELU_SCALE));
}

void LANES_NAME(gate)(const float *gate_up, uint32_t size, uint32_t activation, float *ret)
{
    const lanes one = lanes_set(1.0f), minus = lanes_set(-0.0f);
    for (uint32_t i = 0; i < size; i += LANES) {
        lanes gate = lanes_load(gate_up + 2 * i);
        lanes up = lanes_load(gate_up + 2 * i + LANES);
        lanes e = lanes_exp(lanes_flip(gate_turn(activation, gate), minus));
        lanes_store(ret + i, lanes_mul(lanes_div(gate, lanes_add(one, e)), up));
    }
}

void LANES_NAME(rope)(float *x, const float *cosine, const float *sine, uint32_t rope_width)
{
    const lanes signs = lanes_load((const float[LANES]){-0.0f, 0, -0.0f, 0, -0.0f, 0, -0.0f, 0,
                                                        -0.0f, 0, -0.0f, 0, -0.0f, 0, -0.0f, 0});
    uint32_t i = 0;
    for (; i + LANES <= rope_width; i += LANES) {
        lanes v = lanes_load(x + i), s = lanes_flip(lanes_twice(sine + i / 2), signs);
        lanes_store(x + i, lanes_fma(v, lanes_twice(cosine + i / 2), lanes_mul(lanes_swap(v), s)));
    }
    for (; i < rope_width; i += 2) {
        float a = x[i], b = x[i + 1], c = cosine[i / 2], s = sine[i / 2];
        x[i] = fmaf(a, c, b * -s);
        x[i + 1] = fmaf(b, c, a * s);
    }
}

void LANES_NAME(add)(float *x, const float *y, uint32_t size)
{
    for (uint32_t i = 0; i < size; i += LANES) {
        lanes_store(x + i, lanes_add(lanes_load(x + i), lanes_load(y + i)));
    }
}

void LANES_NAME(cap)(float *x, uint32_t size, float cap)
{
    for (uint32_t i = 0; i < size; i += LANES) {
        lanes_store(x + i, lanes_cap(lanes_load(x + i), cap));
    }
}

/* One block of a head into its page of int8: quants here, the scale there. */
static void block_put(const float *head, uint32_t head_width, uint32_t block, bool turned,
                      uint8_t *page, uint32_t position, int8_t quants[CM_TILE_COLUMNS])
{
    uint16_t half[LANES];
    float scale;
    const uint32_t first = block * CM_TILE_COLUMNS, left = head_width - first;
    (void)lanes_quantise_head(head + first, left, turned, quants, &scale);
    lanes_half_store(half, lanes_set(scale));
    memcpy(page + cm_kv_scales_offset(head_width) +
               ((size_t)block * CM_KV_PAGE_POSITIONS + position) * sizeof(uint16_t),
           half, sizeof(uint16_t));
}

static void key_put_bytes(const float *key, uint32_t head_width, uint8_t *page, uint32_t position)
{
    int8_t quants[CM_TILE_COLUMNS];
    for (uint32_t b = 0; b < cm_kv_blocks(head_width); b++) {
        block_put(key, head_width, b, true, page, position, quants);
        uint8_t *to = page + ((size_t)b * CM_KV_PAGE_POSITIONS * 8 + position) * 4;
        for (uint32_t i = 0; i < CM_TILE_COLUMNS; i += 4) {
            memcpy(to + (size_t)i * CM_KV_PAGE_POSITIONS, quants + i, 4);
        }
    }
}

static void value_put_bytes(const float *value, uint32_t head_width, uint8_t *page,
                            uint32_t position)
{
    int8_t quants[CM_TILE_COLUMNS];
    for (uint32_t b = 0; b < cm_kv_blocks(head_width); b++) {
        block_put(value, head_width, b, false, page, position, quants);
        uint8_t *to = page + (b * 8u + position / 4) * CM_TILE_COLUMNS * 4 + position % 4;
        for (uint32_t i = 0; i < CM_TILE_COLUMNS; i++) {
            to[(size_t)4 * i] = (uint8_t)quants[i];
        }
    }
}

void LANES_NAME(key_put)(enum cm_kv_kind kind, const float *key, uint32_t head_width, uint8_t *page,
                         uint32_t position)
{
    uint16_t half[LANES], *halfs = (uint16_t *)(void *)page;
    if (kind == CM_KV_INT8) {
        key_put_bytes(key, head_width, page, position);
        return;
    }
    for (uint32_t i = 0; i < head_width; i += LANES) {
        lanes_half_store(half, lanes_load(key + i));
        for (uint32_t l = 0; l < LANES && i + l < head_width; l++) {
            halfs[(size_t)(i + l) * CM_KV_PAGE_POSITIONS + position] = half[l];
        }
    }
}

void LANES_NAME(value_put)(enum cm_kv_kind kind, const float *value, uint32_t head_width,
                           uint8_t *page, uint32_t position)
{
    uint16_t half[LANES], *row = (uint16_t *)(void *)page + (size_t)position * head_width;
    if (kind == CM_KV_INT8) {
        value_put_bytes(value, head_width, page, position);
        return;
    }
    for (uint32_t i = 0; i < head_width; i += LANES) {
        lanes_half_store(half, lanes_load(value + i));
        memcpy(row + i, half, (head_width - i < LANES ? head_width - i : LANES) * sizeof(uint16_t));
    }
}

static float piece_greatest(const float *x, uint32_t size)
{
    lanes most = lanes_set(-INFINITY);
    uint32_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        most = lanes_max(most, lanes_load(x + i));
    }
    float greatest = lanes_greatest(most);
    for (; i < size; i++) {
        greatest = x[i] > greatest ? x[i] : greatest;
    }
    return greatest;
}

/* Only the piece that holds it is searched for its place. */
uint32_t LANES_NAME(greatest)(const float *x, uint32_t size)
{
    const uint32_t piece = 1024;
    float greatest = -INFINITY;
    uint32_t at = 0;
    for (uint32_t i = 0; i < size; i += piece) {
        const float own = piece_greatest(x + i, size - i < piece ? size - i : piece);
        at = own > greatest ? i : at;
        greatest = own > greatest ? own : greatest;
    }
    for (uint32_t i = at; i < size; i++) {
        if (x[i] == greatest) {
            return i;
        }
    }
    return 0;
}
