/* Products of bf16 matrices: weights and activations as floats, one sum a row and block, in the
 * order of kernels/NUMERICS.md. 16 rows are the lanes; a pair of columns of all of them is one
 * load. Compiled once for each path. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/lanes.h"

#define INLINE         static inline __attribute__((always_inline))
#define PREFETCH_BYTES 4096
#define TILE_BYTES     (CM_TILE_ROWS * CM_TILE_COLUMNS * sizeof(uint16_t))
#define PAIRS_BYTES    (CM_TILE_ROWS * 2 * sizeof(uint16_t))

/* y[c] of one row tile for `count` tokens of a panel of `width`; x: of the first's block 0. Blocks
 * come one after the other, as they lie: their sums do not wait for each other, and a CPU looks far
 * enough ahead to begin the next (several at once, strided, were read half as fast). */
INLINE void tile_tokens(uint32_t count, const struct cm_matrix *matrix, const float *x,
                        uint32_t width, uint32_t tile, float *y, size_t stride)
{
    const uint8_t *pairs = matrix->quants + (size_t)tile * matrix->blocks * TILE_BYTES;
    lanes sum[LANES_TOKENS], p[LANES_TOKENS];
    for (uint32_t c = 0; c < count; c++) {
        sum[c] = lanes_set(0.0f);
    }
    for (uint32_t b = 0; b < matrix->blocks; b++, x += (size_t)width * CM_TILE_COLUMNS) {
#pragma GCC unroll 16
        for (uint32_t c = 0; c < count; c++) {
            p[c] = lanes_set(0.0f);
        }
        for (uint32_t k = 0; k < CM_TILE_COLUMNS; k += 2, pairs += PAIRS_BYTES) {
            lanes first, second;
            _mm_prefetch((const char *)pairs + PREFETCH_BYTES, _MM_HINT_T0);
            lanes_bfloats_load(pairs, &first, &second);
#pragma GCC unroll 16
            for (uint32_t c = 0; c < count; c++) {
                const float *pair = x + c * CM_TILE_COLUMNS + k;
                p[c] = lanes_fma(first, lanes_set(pair[0]), p[c]);
                p[c] = lanes_fma(second, lanes_set(pair[1]), p[c]);
            }
        }
#pragma GCC unroll 16
        for (uint32_t c = 0; c < count; c++) {
            sum[c] = lanes_add(sum[c], p[c]);
        }
    }
    for (uint32_t c = 0; c < count; c++) {
        lanes_store(y + c * stride, sum[c]);
    }
}

#define COUNT(n)                                                                                   \
    case n:                                                                                        \
        tile_tokens(n, matrix, x, width, tile, y, stride);                                         \
        return;

/* A constant count keeps all sums in registers. */
INLINE void tokens_run(uint32_t count, const struct cm_matrix *matrix, const float *x,
                       uint32_t width, uint32_t tile, float *y, size_t stride)
{
    switch (count) {
#if LANES_TOKENS > 4
        CM_COUNTS_16(COUNT)
#else
        CM_COUNTS_4(COUNT)
#endif
    default:
        CM_ASSERT(false);
    }
}

void LANES_NAME(bfloat_gemm)(const struct cm_matrix *matrix, const struct cm_activations *x,
                             struct cm_span span, float *y, size_t stride)
{
    for (uint32_t tile = span.tile_first; tile < span.tile_last; tile++) {
        for (uint32_t t = span.token_first, count; t < span.token_last; t += count) {
            uint32_t left = span.token_last - t, panel = t / CM_PANEL * CM_PANEL;
            uint32_t width = x->tokens - panel < CM_PANEL ? x->tokens - panel : CM_PANEL;
            count = left < LANES_TOKENS ? left : LANES_TOKENS;
            tokens_run(count, matrix, x->x + cm_activation_at(x, t, 0) * CM_TILE_COLUMNS, width,
                       tile,
                       y + (t - span.token_first) * stride +
                           (size_t)(tile - span.tile_first) * CM_TILE_ROWS,
                       stride);
        }
    }
}
