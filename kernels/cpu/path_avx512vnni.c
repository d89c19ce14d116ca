/* Matrix product with AVX-512 VNNI: 16 rows of a tile are the 16 lanes of a register, so no
 * horizontal sum is ever taken. One pass over the weights serves up to 8 tokens. Bytes read per
 * block: 256 (u4) or 512 (u8) of quants and 32 or 64 of scales. */
#include "kernels/cpu/cpu_internal.h"

#include <immintrin.h>
#include <string.h>

#define PREFETCH_BYTES 4096 /* ahead of the quants: measured best on both kinds of CPU */

/* Four activations, in every lane. */
static inline __m512i four(const int8_t *x)
{
    int32_t value;
    memcpy(&value, x, sizeof(value));
    return _mm512_set1_epi32(value);
}

static inline __m512 half16(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}

/* Block sums of `count` tokens over one tile. */
static inline __attribute__((always_inline)) void block_sums(bool wide, const uint8_t *quants,
                                                             const int8_t *x, size_t token_stride,
                                                             uint32_t count, __m512i *sums)
{
    const __m512i low = _mm512_set1_epi8(15);
    for (uint32_t c = 0; c < count; c++) {
        sums[c] = _mm512_setzero_si512();
    }
    for (uint32_t j = 0; j < (wide ? 8u : 4u); j++) {
        const uint8_t *at = quants + 64 * j;
        _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T0);
        __m512i w = _mm512_loadu_si512(at);
        if (wide) {
            for (uint32_t c = 0; c < count; c++) {
                sums[c] = _mm512_dpbusd_epi32(sums[c], w, four(x + c * token_stride + 4 * j));
            }
            continue;
        }
        __m512i w0 = _mm512_and_si512(w, low);
        __m512i w1 = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
        for (uint32_t c = 0; c < count; c++) {
            const int8_t *from = x + c * token_stride + 4 * j;
            sums[c] = _mm512_dpbusd_epi32(sums[c], w0, four(from));
            sums[c] = _mm512_dpbusd_epi32(sums[c], w1, four(from + 16));
        }
    }
}

static inline __attribute__((always_inline)) void
tile_row(uint32_t kind, const struct cm_matrix *matrix, const struct cm_activations *x,
         uint32_t token, uint32_t count, uint32_t tile, float *y, size_t stride)
{
    const bool affine = kind == CM_TENSOR_U4A, wide = kind == CM_TENSOR_U8S;
    const uint32_t blocks = matrix->blocks;
    const size_t quant_bytes = wide ? 512 : 256, scale_bytes = affine ? 64 : 32;
    const int32_t zero = wide ? 128 : (affine ? 0 : 8);
    const uint8_t *quants = matrix->quants + (size_t)tile * blocks * quant_bytes;
    const uint8_t *scales = matrix->scales + (size_t)tile * blocks * scale_bytes;
    __m512 out[CM_GEMM_TOKENS], p[CM_GEMM_TOKENS], m[CM_GEMM_TOKENS];
    __m512i sums[CM_GEMM_TOKENS];
    for (uint32_t c = 0; c < count; c++) {
        out[c] = p[c] = m[c] = _mm512_setzero_ps();
    }
    for (uint32_t b = 0; b < blocks; b++) {
        size_t at = (size_t)token * blocks + b;
        block_sums(wide, quants, x->q + at * CM_TILE_COLUMNS, (size_t)blocks * CM_TILE_COLUMNS,
                   count, sums);
        __m512 d = half16(scales);
        __m512 base = affine ? half16(scales + 32) : d;
        for (uint32_t c = 0; c < count; c++, at += blocks) {
            __m512i sum = sums[c];
            if (zero != 0) {
                sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(zero * x->count[at]));
            }
            p[c] = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(x->scale[at])),
                                   _mm512_cvtepi32_ps(sum), p[c]);
            if (affine) {
                m[c] = _mm512_fmadd_ps(base, _mm512_set1_ps(x->sum[at]), m[c]);
            }
        }
        if (b % 8 == 7 || b + 1 == blocks) {
            for (uint32_t c = 0; c < count; c++) {
                out[c] = _mm512_add_ps(out[c], _mm512_add_ps(p[c], m[c]));
                p[c] = m[c] = _mm512_setzero_ps();
            }
        }
        quants += quant_bytes;
        scales += scale_bytes;
    }
    for (uint32_t c = 0; c < count; c++) {
        _mm512_storeu_ps(y + (token + c) * stride + (size_t)tile * CM_TILE_ROWS, out[c]);
    }
}

/* Constant counts let the compiler keep all sums in registers. */
static inline __attribute__((always_inline)) void tile_all(uint32_t kind,
                                                           const struct cm_matrix *matrix,
                                                           const struct cm_activations *x,
                                                           uint32_t tile, float *y, size_t stride)
{
    uint32_t t = 0;
    for (; t + 8 <= x->tokens; t += 8) {
        tile_row(kind, matrix, x, t, 8, tile, y, stride);
    }
    for (; t + 4 <= x->tokens; t += 4) {
        tile_row(kind, matrix, x, t, 4, tile, y, stride);
    }
    for (; t + 2 <= x->tokens; t += 2) {
        tile_row(kind, matrix, x, t, 2, tile, y, stride);
    }
    if (t < x->tokens) {
        tile_row(kind, matrix, x, t, 1, tile, y, stride);
    }
}

void cm_gemm_avx512vnni(const struct cm_matrix *matrix, const struct cm_activations *x, float *y,
                        size_t stride, uint32_t first, uint32_t last)
{
    for (uint32_t tile = first; tile < last; tile++) {
        if (matrix->kind == CM_TENSOR_U4A) {
            tile_all(CM_TENSOR_U4A, matrix, x, tile, y, stride);
        } else if (matrix->kind == CM_TENSOR_U4S) {
            tile_all(CM_TENSOR_U4S, matrix, x, tile, y, stride);
        } else {
            tile_all(CM_TENSOR_U8S, matrix, x, tile, y, stride);
        }
    }
}
