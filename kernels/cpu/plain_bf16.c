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
