/* The definitions of class P (kernels/NUMERICS.md) in plain C, one value at a time: the oracle of
 * AMX-bf16. A multiply-add of two bf16 numbers and a sum as the tile unit makes them: rounded to
 * even, denormals of what goes in and comes out are 0 (Intel SDM vol. 2, TDPBF16PS). */
#include "kernels/cpu/cpu_internal.h"

#include <float.h>
#include <math.h>
#include <string.h>

static float flushed(float x)
{
    return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x;
}

uint16_t cm_bfloat_of(float x)
{
    uint32_t bits;
    x = flushed(x);
    memcpy(&bits, &x, sizeof(bits));
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float cm_bfloat_float(uint16_t bfloat)
{
    const uint32_t bits = (uint32_t)bfloat << 16;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return flushed(x);
}

/* y + one block: even columns and odd ones apart, ascending, then both together. */
static float block_add(float y, const uint16_t *w, const uint16_t *x)
{
    float even = 0.0f, odd = 0.0f;
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k += 2) {
        even = flushed(fmaf(cm_bfloat_float(x[k]), cm_bfloat_float(w[k]), even));
        odd = flushed(fmaf(cm_bfloat_float(x[k + 1]), cm_bfloat_float(w[k + 1]), odd));
    }
    return flushed(y + flushed(even + odd));
}

void cm_plain_bf16_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                        struct cm_span span, float *y, size_t stride)
{
    float row[CM_PLAIN_COLUMNS_MAX];
    uint16_t w[CM_PLAIN_COLUMNS_MAX];
    const uint32_t columns = matrix->blocks * CM_TILE_COLUMNS;
    CM_ASSERT(columns <= CM_PLAIN_COLUMNS_MAX);
    for (uint32_t r = span.tile_first * CM_TILE_ROWS; r < span.tile_last * CM_TILE_ROWS; r++) {
        cm_matrix_row(matrix, r, row, columns);
        for (uint32_t k = 0; k < columns; k++) {
            w[k] = cm_bfloat_of(row[k]);
        }
        for (uint32_t t = span.token_first; t < span.token_last; t++) {
            float sum = 0.0f;
            for (uint32_t b = 0; b < matrix->blocks; b++) {
                sum = block_add(sum, w + (size_t)b * CM_TILE_COLUMNS,
                                x->rounded + cm_activation_at(x, t, b) * CM_TILE_COLUMNS);
            }
            y[(t - span.token_first) * stride + r - (size_t)span.tile_first * CM_TILE_ROWS] = sum;
        }
    }
}

/* ------------------------------------------------------------------ attention */

static float half_at(const struct cm_attention *a, uint32_t position, size_t offset, size_t index)
{
    const uint8_t *page = cm_plain_page(a, position, offset);
    return cm_half_float(((const uint16_t *)(const void *)page)[index]);
}

static float score_of(const struct cm_attention *a, const float *query, uint32_t position)
{
    float score = 0.0f;
    for (uint32_t first = 0; first < a->head_width; first += CM_TILE_COLUMNS) {
        uint16_t q[CM_TILE_COLUMNS] = {0}, k[CM_TILE_COLUMNS] = {0};
        for (uint32_t i = 0; i < CM_TILE_COLUMNS && first + i < a->head_width; i++) {
            const size_t at = (size_t)(first + i) * CM_KV_PAGE_POSITIONS;
            q[i] = cm_bfloat_of(query[first + i]);
            k[i] = cm_bfloat_of(
                half_at(a, position, a->k_offset, at + position % CM_KV_PAGE_POSITIONS));
        }
        score = block_add(score, k, q);
    }
    return score;
}

/* Of a position's value; what is not finite counts as the greatest half. */
static uint16_t value_of(const struct cm_attention *a, uint32_t position, uint32_t i)
{
    const size_t at = (size_t)(position % CM_KV_PAGE_POSITIONS) * a->head_width;
    const float value = half_at(a, position, a->v_offset, at + i);
    return cm_bfloat_of(isnan(value) ? 65504.0f : fminf(fmaxf(value, -65504.0f), 65504.0f));
}

/* Page by page: positions that are not seen weigh 0. */
static void values_of(const struct cm_attention *a, const float *weights, uint32_t chunk,
                      uint32_t first, uint32_t last, float *ret)
{
    for (uint32_t i = 0; i < a->head_width; i++) {
        ret[i] = 0.0f;
        for (uint32_t page = chunk; page < last; page += CM_KV_PAGE_POSITIONS) {
            uint16_t e[CM_KV_PAGE_POSITIONS] = {0}, v[CM_KV_PAGE_POSITIONS] = {0};
            for (uint32_t t = page; t < page + CM_KV_PAGE_POSITIONS; t++) {
                if (t >= first && t < last) {
                    e[t - page] = cm_bfloat_of(weights[t - chunk]);
                    v[t - page] = value_of(a, t, i);
                }
            }
            ret[i] = block_add(ret[i], v, e);
        }
    }
}

void cm_plain_bf16_attend(const struct cm_attention *a)
{
    static const struct cm_plain_attention by = {score_of, values_of};
    cm_plain_attend_by(&by, a);
}
