/* The definitions of kernels/NUMERICS.md in plain C, one value at a time: the oracle of the fast
 * paths. Nothing heavy is served from here. */
#include "kernels/cpu/cpu_internal.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

float cm_half_float(uint16_t half)
{
    return _cvtsh_ss(half);
}

uint16_t cm_half_of(float x)
{
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

float cm_expf(float x)
{
    const float log2_e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
    float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(clamped * log2_e);
    float r = fmaf(n, -ln2_low, fmaf(n, -ln2_high, clamped));
    /* Taylor coefficients up to r^6: |r| <= ln2 / 2, error below 2 ulp. */
    float p = 0x1.6c16c2p-10f;
    p = fmaf(p, r, 0x1.111112p-7f);
    p = fmaf(p, r, 0x1.555556p-5f);
    p = fmaf(p, r, 0x1.555556p-3f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof(power));
    return p * power;
}

float cm_capf(float x, float cap)
{
    return cap * (1.0f + -2.0f / (1.0f + cm_expf(x / cap * 2.0f)));
}

/* ------------------------------------------------------------------ matrices */

/* The stored quant of row r, column k of a tile. */
static uint32_t quant_of(const struct cm_matrix *matrix, size_t tile, uint32_t r, uint32_t k)
{
    const struct cm_tile_shape shape = cm_tile_shape(matrix->kind);
    const uint8_t *quants = matrix->quants + tile * shape.quant_bytes;
    const uint32_t column = 4 * r + k % 4; /* of a line of 64 bytes */
    if (shape.bits == 8) {
        return quants[64 * (k / 4) + column];
    }
    const uint8_t pair = quants[64 * ((k % 16) / 4) + column];
    const uint32_t low = k < 16 ? pair & 15u : (uint32_t)pair >> 4;
    return shape.bits == 4 ? low : low | ((uint32_t)quants[256 + column] >> k / 4 & 1u) << 4;
}

/* d, and m (0 where the kind has none). */
static void scales_of(const struct cm_matrix *matrix, size_t tile, uint32_t r, float *ret_d,
                      float *ret_m)
{
    const uint16_t *scales = (const uint16_t *)(const void *)matrix->scales;
    const struct cm_tile_shape shape = cm_tile_shape(matrix->kind);
    scales += tile * shape.scale_bytes / 2;
    *ret_d = cm_half_float(scales[r]);
    *ret_m = shape.affine ? cm_half_float(scales[16 + r]) : 0.0f;
}

/* Of a bf16 matrix: row r, column k of a tile. */
static float bfloat_of(const struct cm_matrix *matrix, size_t tile, uint32_t r, uint32_t k)
{
    const uint8_t *at = matrix->quants + tile * 1024 + 64 * (k / 2) + 4 * r + 2 * (k % 2);
    const uint32_t bits = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 24;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

void cm_matrix_row(const struct cm_matrix *matrix, uint32_t row, float *ret, uint32_t columns)
{
    uint32_t r = row % CM_TILE_ROWS;
    for (uint32_t k = 0; k < columns; k++) {
        size_t tile = (size_t)(row / CM_TILE_ROWS) * matrix->blocks + k / CM_TILE_COLUMNS;
        float d, m;
        if (matrix->kind == CM_TENSOR_BF16) {
            ret[k] = bfloat_of(matrix, tile, r, k % CM_TILE_COLUMNS);
            continue;
        }
        scales_of(matrix, tile, r, &d, &m);
        int32_t q = (int32_t)quant_of(matrix, tile, r, k % CM_TILE_COLUMNS) -
                    cm_tile_shape(matrix->kind).zero;
        ret[k] = fmaf(d, (float)q, m);
    }
}

static float row_product(const struct cm_matrix *matrix, const struct cm_activations *x, uint32_t t,
                         uint32_t tile_row, uint32_t r)
{
    const struct cm_tile_shape shape = cm_tile_shape(matrix->kind);
    float y = 0.0f, p = 0.0f;
    for (uint32_t b = 0; b < matrix->blocks; b++) {
        size_t tile = (size_t)tile_row * matrix->blocks + b, at = cm_activation_at(x, t, b);
        const int8_t *q = x->q + at * CM_TILE_COLUMNS;
        int32_t sum = -shape.zero * x->count[at];
        float d, m;
        for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
            sum += (int32_t)quant_of(matrix, tile, r, k) * q[k];
        }
        scales_of(matrix, tile, r, &d, &m);
        p = fmaf(d * x->scale[at], (float)sum, p);
        if (shape.affine) {
            p = fmaf(m, x->sum[at], p);
        }
        if (b % 8 == 7 || b + 1 == matrix->blocks) {
            y = y + p;
            p = 0.0f;
        }
    }
    return y;
}

static float bfloat_product(const struct cm_matrix *matrix, const struct cm_activations *x,
                            uint32_t t, uint32_t tile_row, uint32_t r)
{
    float y = 0.0f;
    for (uint32_t b = 0; b < matrix->blocks; b++) {
        const float *values = x->x + cm_activation_at(x, t, b) * CM_TILE_COLUMNS;
        float p = 0.0f;
        for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
            p = fmaf(bfloat_of(matrix, (size_t)tile_row * matrix->blocks + b, r, k), values[k], p);
        }
        y = y + p;
    }
    return y;
}

void cm_plain_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                   struct cm_span span, float *y, size_t stride)
{
    for (uint32_t tile = span.tile_first; tile < span.tile_last; tile++) {
        for (uint32_t t = span.token_first; t < span.token_last; t++) {
            for (uint32_t r = 0; r < CM_TILE_ROWS; r++) {
                y[(t - span.token_first) * stride + (tile - span.tile_first) * CM_TILE_ROWS + r] =
                    matrix->kind == CM_TENSOR_BF16 ? bfloat_product(matrix, x, t, tile, r)
                                                   : row_product(matrix, x, t, tile, r);
            }
        }
    }
}

/* ------------------------------------------------------------------ adapters */

/* Row `r` of a tile of a factor: column j, j + 4, … ascending in part j. */
static float factor_product(const uint16_t *tile, uint32_t r, uint32_t columns, const float *x)
{
    float part[4] = {0};
    for (uint32_t k = 0; k < columns; k++) {
        float w = cm_half_float(tile[(size_t)k * CM_TILE_ROWS + r]);
        part[k % 4] = fmaf(w, x[k], part[k % 4]);
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

void cm_plain_shrink(const uint16_t *tile, const struct cm_activations *x, uint32_t token,
                     uint32_t tokens, uint32_t block, uint32_t blocks, float *ret, size_t stride)
{
    float wide[CM_LOW_RANK_COLUMNS];
    for (uint32_t t = 0; t < tokens; t++) {
        for (uint32_t k = 0; k < blocks * CM_TILE_COLUMNS; k++) {
            size_t at = cm_activation_at(x, token + t, block + k / CM_TILE_COLUMNS);
            const size_t value = at * CM_TILE_COLUMNS + k % CM_TILE_COLUMNS;
            wide[k] = x->rounded != NULL ? cm_bfloat_float(x->rounded[value])
                      : x->x != NULL     ? x->x[value]
                                         : (float)x->q[value] * x->scale[at];
        }
        for (uint32_t r = 0; r < CM_TILE_ROWS; r++) {
            ret[t * stride + r] = factor_product(tile, r, blocks * CM_TILE_COLUMNS, wide);
        }
    }
}

void cm_plain_expand(const uint16_t *tile, uint32_t rank, uint32_t tiles, const float *u, float *y,
                     size_t step)
{
    for (uint32_t i = 0; i < tiles; i++) {
        for (uint32_t r = 0; r < CM_TILE_ROWS; r++) {
            y[i * step + r] += factor_product(tile + (size_t)i * rank * CM_TILE_ROWS, r, rank, u);
        }
    }
}

/* ------------------------------------------------------------------ attention */

static float tree_sum(float lane[16])
{
    for (uint32_t step = 8; step > 0; step /= 2) {
        for (uint32_t l = 0; l < step; l++) {
            lane[l] += lane[l + step];
        }
    }
    return lane[0];
}

const uint8_t *cm_plain_page(const struct cm_attention *a, uint32_t position, size_t offset)
{
    return a->kv + (size_t)a->pages[position / CM_KV_PAGE_POSITIONS] * a->page_bytes + offset;
}

static float half_at(const uint8_t *halfs, size_t index)
{
    uint16_t half;
    memcpy(&half, halfs + index * sizeof(half), sizeof(half));
    return cm_half_float(half);
}

/* int8: the scale of a block of K or V. */
static float scale_at(const struct cm_attention *a, const uint8_t *page, uint32_t block, uint32_t t)
{
    return half_at(page + cm_kv_scales_offset(a->head_width), block * CM_KV_PAGE_POSITIONS + t);
}

/* The Walsh-Hadamard transform of 32 values, without a factor. */
static void block_turn(float x[CM_TILE_COLUMNS])
{
    for (uint32_t step = CM_TILE_COLUMNS / 2; step > 0; step /= 2) {
        for (uint32_t i = 0; i < CM_TILE_COLUMNS; i++) {
            if ((i & step) == 0) {
                float a = x[i], b = x[i + step];
                x[i] = a + b;
                x[i + step] = a - b;
            }
        }
    }
}

/* A block as int8; returns its scale. */
static float block_quantise(const float x[CM_TILE_COLUMNS], int32_t q[CM_TILE_COLUMNS])
{
    float most = 0.0f;
    for (uint32_t i = 0; i < CM_TILE_COLUMNS; i++) {
        most = fmaxf(most, fabsf(x[i]));
    }
    for (uint32_t i = 0; i < CM_TILE_COLUMNS; i++) {
        q[i] = (int32_t)rintf(x[i] * (most > 0x1p-100f ? 127.0f / most : 0.0f));
    }
    return most / 127.0f;
}

/* The same of a part of a query, turned. */
static float query_quantise(const float *from, uint32_t count, int32_t q[CM_TILE_COLUMNS])
{
    float x[CM_TILE_COLUMNS] = {0};
    memcpy(x, from, count * sizeof(*x));
    block_turn(x);
    return block_quantise(x, q) / CM_TILE_COLUMNS;
}

static float bytes_dot(const struct cm_attention *a, const float *query, const uint8_t *page,
                       uint32_t t)
{
    float dot = 0.0f;
    for (uint32_t b = 0; b < cm_kv_blocks(a->head_width); b++) {
        int32_t q[CM_TILE_COLUMNS], sum = 0;
        uint32_t first = b * CM_TILE_COLUMNS, left = a->head_width - first;
        left = left < CM_TILE_COLUMNS ? left : CM_TILE_COLUMNS;
        float scale = query_quantise(query + first, left, q);
        for (uint32_t i = 0; i < CM_TILE_COLUMNS; i++) {
            uint32_t at = ((first + i) / 4 * CM_KV_PAGE_POSITIONS + t) * 4 + i % 4;
            sum += q[i] * (int8_t)page[at];
        }
        dot = fmaf(scale_at(a, page, b, t) * scale, (float)sum, dot);
    }
    return dot;
}

static float halfs_dot(const struct cm_attention *a, const float *query, const uint8_t *page,
                       uint32_t t)
{
    float dot = 0.0f;
    for (uint32_t i = 0; i < a->head_width; i++) {
        dot = fmaf(query[i], half_at(page, i * CM_KV_PAGE_POSITIONS + t), dot);
    }
    return dot;
}

static void halfs_blend(const struct cm_attention *a, const float *weights, uint32_t chunk,
                        uint32_t first, uint32_t last, float *out)
{
    for (uint32_t t = first; t < last; t++) {
        const uint8_t *page = cm_plain_page(a, t, a->v_offset);
        for (uint32_t i = 0; i < a->head_width; i++) {
            size_t at = (size_t)(t % CM_KV_PAGE_POSITIONS) * a->head_width + i;
            out[i] = fmaf(weights[t - chunk], half_at(page, at), out[i]);
        }
    }
}

/* Column i of a page of int8 values: the weights of its positions become int8, too. */
static float bytes_column(const struct cm_attention *a, const uint8_t *page, uint32_t i,
                          const float weights[CM_KV_PAGE_POSITIONS], float before)
{
    float scaled[CM_KV_PAGE_POSITIONS];
    int32_t q[CM_KV_PAGE_POSITIONS], sum = 0;
    const uint32_t b = i / CM_TILE_COLUMNS;
    for (uint32_t t = 0; t < CM_KV_PAGE_POSITIONS; t++) {
        scaled[t] = weights[t] > 0.0f ? weights[t] * scale_at(a, page, b, t) : 0.0f;
    }
    float scale = block_quantise(scaled, q);
    for (uint32_t t = 0; t < CM_KV_PAGE_POSITIONS; t++) {
        sum += q[t] *
               (int8_t)page[((b * 8 + t / 4) * CM_TILE_COLUMNS + i % CM_TILE_COLUMNS) * 4 + t % 4];
    }
    return fmaf(scale, (float)sum, before);
}

static void bytes_blend(const struct cm_attention *a, const float *weights, uint32_t chunk,
                        uint32_t first, uint32_t last, float *out)
{
    const uint32_t size = CM_KV_PAGE_POSITIONS;
    for (uint32_t start = first / size * size; start < last; start += size) {
        float own[CM_KV_PAGE_POSITIONS] = {0};
        for (uint32_t t = 0; t < size; t++) {
            own[t] = start + t >= first && start + t < last ? weights[start + t - chunk] : 0.0f;
        }
        for (uint32_t i = 0; i < a->head_width; i++) {
            out[i] = bytes_column(a, cm_plain_page(a, start, a->v_offset), i, own, out[i]);
        }
    }
}

static float score_of(const struct cm_attention *a, const float *query, uint32_t position)
{
    const uint8_t *page = cm_plain_page(a, position, a->k_offset);
    const uint32_t t = position % CM_KV_PAGE_POSITIONS;
    return a->kv_kind == CM_KV_INT8 ? bytes_dot(a, query, page, t) : halfs_dot(a, query, page, t);
}

static void values_of(const struct cm_attention *a, const float *weights, uint32_t chunk,
                      uint32_t first, uint32_t last, float *ret)
{
    memset(ret, 0, a->head_width * sizeof(*ret));
    (a->kv_kind == CM_KV_INT8 ? bytes_blend : halfs_blend)(a, weights, chunk, first, last, ret);
}

/* One chunk for one query head: greatest score, sum of weights, weighted values. */
static float chunk_of(const struct cm_plain_attention *by, const struct cm_attention *a,
                      const float *query, uint32_t first, uint32_t begin, uint32_t last,
                      float *ret_sum, float *out)
{
    float scores[CM_ATTENTION_CHUNK], lane[16] = {0}, greatest = -INFINITY;
    begin = begin > first ? begin : first;
    for (uint32_t t = begin; t < last; t++) {
        float score = by->score(a, query, t) * a->scale;
        scores[t - first] = a->cap > 0.0f ? cm_capf(score, a->cap) : score;
        greatest = scores[t - first] > greatest ? scores[t - first] : greatest;
    }
    for (uint32_t t = begin; t < last; t++) {
        scores[t - first] = cm_expf(scores[t - first] - greatest);
        lane[(t - first) % 16] += scores[t - first];
    }
    by->values(a, scores, first, begin, last, out);
    *ret_sum = tree_sum(lane);
    return greatest;
}

static void row_attend(const struct cm_plain_attention *by, const struct cm_attention *a,
                       const float *query, uint32_t positions, float *out)
{
    float part[1024], total = 0.0f, greatest = -INFINITY;
    uint32_t begin = a->window != 0 && positions > a->window ? positions - a->window : 0;
    const uint32_t start = begin / CM_ATTENTION_CHUNK * CM_ATTENTION_CHUNK;
    for (uint32_t first = start; first < positions; first += CM_ATTENTION_CHUNK) {
        uint32_t last =
            positions - first < CM_ATTENTION_CHUNK ? positions : first + CM_ATTENTION_CHUNK;
        float sum,
            most = chunk_of(by, a, query, first, begin, last, &sum, first == start ? out : part);
        if (first == start) {
            greatest = most;
            total = sum;
            continue;
        }
        float both = most > greatest ? most : greatest;
        float old = cm_expf(greatest - both), new = cm_expf(most - both);
        total = fmaf(total, old, sum * new);
        for (uint32_t i = 0; i < a->head_width; i++) {
            out[i] = fmaf(out[i], old, part[i] * new);
        }
        greatest = both;
    }
    for (uint32_t i = 0; i < a->head_width; i++) {
        out[i] = out[i] / total;
    }
}

void cm_plain_attend_by(const struct cm_plain_attention *by, const struct cm_attention *a)
{
    for (uint32_t t = 0; t < a->tokens; t++) {
        for (uint32_t h = 0; h < a->group; h++) {
            row_attend(by, a, a->query + t * a->query_stride + (size_t)h * a->head_width,
                       a->position + t + 1, a->out + t * a->out_stride + (size_t)h * a->head_width);
        }
    }
}

void cm_plain_attend(const struct cm_attention *a)
{
    static const struct cm_plain_attention by = {score_of, values_of};
    cm_plain_attend_by(&by, a);
}
