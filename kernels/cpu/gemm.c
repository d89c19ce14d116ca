/* Plain matrix product: the definition of kernels/NUMERICS.md, one tile and token at a time. The
 * oracle of the fast paths; nothing serves from it. */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>

static int32_t block_sum(const struct cm_matrix *matrix, size_t tile, uint32_t r, const int8_t *x)
{
    int32_t sum = 0;
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        uint32_t q;
        if (matrix->kind == CM_TENSOR_U8S) {
            q = matrix->quants[tile * 512 + 64 * (k / 4) + 4 * r + k % 4];
        } else {
            uint8_t pair = matrix->quants[tile * 256 + 64 * ((k % 16) / 4) + 4 * r + k % 4];
            q = k < 16 ? pair & 15u : (uint32_t)pair >> 4;
        }
        sum += (int32_t)q * x[k];
    }
    return sum;
}

static float row_product(const struct cm_matrix *matrix, const struct cm_activations *x, uint32_t t,
                         uint32_t tile_row, uint32_t r)
{
    const uint16_t *scales = (const uint16_t *)(const void *)matrix->scales;
    const size_t scale_stride = matrix->kind == CM_TENSOR_U4A ? 32 : 16;
    const int32_t zero = matrix->kind == CM_TENSOR_U8S   ? 128
                         : matrix->kind == CM_TENSOR_U4S ? 8
                                                         : 0;
    float y = 0.0f, p = 0.0f, m = 0.0f;
    for (uint32_t b = 0; b < matrix->blocks; b++) {
        size_t tile = (size_t)tile_row * matrix->blocks + b;
        size_t at = (size_t)t * matrix->blocks + b;
        int32_t sum = block_sum(matrix, tile, r, x->q + at * CM_TILE_COLUMNS) - zero * x->count[at];
        p = fmaf(cm_half_float(scales[tile * scale_stride + r]) * x->scale[at], (float)sum, p);
        if (matrix->kind == CM_TENSOR_U4A) {
            m = fmaf(cm_half_float(scales[tile * scale_stride + 16 + r]), x->sum[at], m);
        }
        if (b % 8 == 7 || b + 1 == matrix->blocks) {
            y = y + (p + m);
            p = m = 0.0f;
        }
    }
    return y;
}

void cm_gemm_plain(const struct cm_matrix *matrix, const struct cm_activations *x, float *y,
                   size_t stride, uint32_t first, uint32_t last)
{
    for (uint32_t tile = first; tile < last; tile++) {
        for (uint32_t t = 0; t < x->tokens; t++) {
            for (uint32_t r = 0; r < CM_TILE_ROWS; r++) {
                y[t * stride + tile * CM_TILE_ROWS + r] = row_product(matrix, x, t, tile, r);
            }
        }
    }
}
