/* Matrix product with AVX-512 VNNI: 16 rows of a tile are the 16 lanes of a register, so no
 * horizontal sum is ever taken. A block's quants are unpacked once and serve a panel of up to 16
 * tokens, whose activations come as broadcasts from memory. Bytes read per block: 256 (u4), 320
 * (u5) or 512 (u8) of quants and 32 or 64 of scales. */
#include "kernels/cpu/avx512.h"

/* Four activations, in every lane. */
INLINE __m512i four(const int8_t *x)
{
    int32_t value;
    memcpy(&value, x, sizeof(value));
    return _mm512_set1_epi32(value);
}

/* y[c] of one row tile for the `count` tokens of a panel; at: of the panel's first block. */
INLINE void tile_panel(uint32_t kind, const struct cm_matrix *matrix,
                       const struct cm_activations *x, size_t at, uint32_t count, uint32_t tile,
                       float *y, size_t stride)
{
    const struct cm_tile_shape shape = cm_tile_shape(kind);
    const uint32_t blocks = matrix->blocks;
    const uint8_t *quants = matrix->quants + (size_t)tile * blocks * shape.quant_bytes;
    const uint8_t *scales = matrix->scales + (size_t)tile * blocks * shape.scale_bytes;
    __m512 p[CM_PANEL];
    for (uint32_t c = 0; c < count; c++) {
        p[c] = _mm512_setzero_ps();
        _mm512_storeu_ps(y + c * stride, p[c]);
    }
    for (uint32_t b = 0; b < blocks; b++, at += count) {
        __m512i w[8];
        unpack(shape, quants, w);
        const __m512 d = half16(scales), m = shape.affine ? half16(scales + 32) : d;
        const int8_t *q = x->q + at * CM_TILE_COLUMNS;
#pragma GCC unroll 16
        for (uint32_t c = 0; c < count; c++) {
            __m512i sum = shape.zero == 0 ? _mm512_setzero_si512()
                                          : _mm512_set1_epi32(-shape.zero * x->count[at + c]);
#pragma GCC unroll 8
            for (uint32_t j = 0; j < 8; j++) {
                sum = _mm512_dpbusd_epi32(sum, w[j], four(q + c * CM_TILE_COLUMNS + 4 * j));
            }
            p[c] = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(x->scale[at + c])),
                                   _mm512_cvtepi32_ps(sum), p[c]);
            if (shape.affine) {
                p[c] = _mm512_fmadd_ps(m, _mm512_set1_ps(x->sum[at + c]), p[c]);
            }
        }
        if (b % 8 == 7 || b + 1 == blocks) {
            for (uint32_t c = 0; c < count; c++) {
                _mm512_storeu_ps(y + c * stride,
                                 _mm512_add_ps(_mm512_loadu_ps(y + c * stride), p[c]));
                p[c] = _mm512_setzero_ps();
            }
        }
        quants += shape.quant_bytes;
        scales += shape.scale_bytes;
    }
}

#define COUNT(n)                                                                                   \
    case n:                                                                                        \
        tile_panel(kind, matrix, x, at, n, tile, y, stride);                                       \
        return;

/* A constant count keeps all sums in registers. */
INLINE void panel_run(uint32_t kind, const struct cm_matrix *matrix, const struct cm_activations *x,
                      size_t at, uint32_t count, uint32_t tile, float *y, size_t stride)
{
    switch (count) {
        CM_COUNTS_16(COUNT)
    default:
        CM_ASSERT(false);
    }
}

INLINE void kind_run(uint32_t kind, const struct cm_matrix *matrix, const struct cm_activations *x,
                     struct cm_span span, float *y, size_t stride)
{
    for (uint32_t tile = span.tile_first; tile < span.tile_last; tile++) {
        for (uint32_t t = span.token_first; t < span.token_last; t += CM_PANEL) {
            uint32_t count = span.token_last - t < CM_PANEL ? span.token_last - t : CM_PANEL;
            float *to = y + (t - span.token_first) * stride +
                        (size_t)(tile - span.tile_first) * CM_TILE_ROWS;
            panel_run(kind, matrix, x, cm_activation_at(x, t, 0), count, tile, to, stride);
        }
    }
}

#define KIND(kind)                                                                                 \
    case kind:                                                                                     \
        kind_run(kind, matrix, x, span, y, stride);                                                \
        return;

void cm_avx512vnni_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                        struct cm_span span, float *y, size_t stride)
{
    switch (matrix->kind) {
        CM_QUANT_KINDS(KIND)
    default:
        CM_ASSERT(matrix->kind == CM_TENSOR_BF16);
        cm_avx512vnni_bfloat_gemm(matrix, x, span, y, stride);
    }
}
