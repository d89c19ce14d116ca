/* Matrix product with AVX2: the same lanes as AVX-512 VNNI in two halves of 8 rows. Byte products
 * go through 16 bits; nibbles of 0..15 times int8 summed over 8 columns stay below 2^15 (15*127*16
 * = 30480), so nothing saturates; bytes are taken as two nibbles. A block's quants are unpacked
 * once for up to 4 tokens. */
#include "kernels/cpu/cpu_internal.h"

#include <immintrin.h>
#include <string.h>

#define PREFETCH_BYTES 4096
#define TOKENS         4u /* of a pass: their sums stay in registers */
#define INLINE         static inline __attribute__((always_inline))

INLINE __m256i four(const int8_t *x)
{
    int32_t value;
    memcpy(&value, x, sizeof(value));
    return _mm256_set1_epi32(value);
}

INLINE __m256 half8(const uint8_t *at)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}

INLINE __m256i widen(__m256i sixteen)
{
    return _mm256_madd_epi16(sixteen, _mm256_set1_epi16(1));
}

/* Sums of `count` tokens over one tile, 8 rows at `quants` (rows 8..15 lie 32 bytes further). Low
 * and high nibbles meet columns 4j and 16+4j (u4), or are two digits of column 4j (u8). */
INLINE void block_sums(bool wide, const uint8_t *quants, const int8_t *x, uint32_t count,
                       __m256i *sums)
{
    const __m256i low = _mm256_set1_epi8(15);
    __m256i digits[TOKENS];
    for (uint32_t c = 0; c < count; c++) {
        sums[c] = digits[c] = _mm256_setzero_si256();
    }
    for (uint32_t j = 0; j < (wide ? 8u : 4u); j++) {
        _mm_prefetch((const char *)quants + 64 * j + PREFETCH_BYTES, _MM_HINT_T0);
        __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)(quants + 64 * j));
        __m256i w0 = _mm256_and_si256(w, low);
        __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
        for (uint32_t c = 0; c < count; c++) {
            const int8_t *from = x + c * CM_TILE_COLUMNS + 4 * j;
            sums[c] = _mm256_add_epi16(sums[c], _mm256_maddubs_epi16(w0, four(from)));
            if (wide) {
                digits[c] = _mm256_add_epi16(digits[c], _mm256_maddubs_epi16(w1, four(from)));
            } else {
                sums[c] = _mm256_add_epi16(sums[c], _mm256_maddubs_epi16(w1, four(from + 16)));
            }
        }
    }
    for (uint32_t c = 0; c < count; c++) {
        sums[c] = widen(sums[c]);
        if (wide) {
            sums[c] = _mm256_add_epi32(sums[c], _mm256_slli_epi32(widen(digits[c]), 4));
        }
    }
}

/* Eight rows of one tile row for `count` tokens of a panel of `width`; at: of the first's block 0.
 */
INLINE void half_rows(uint32_t kind, const struct cm_matrix *matrix, const struct cm_activations *x,
                      size_t at, uint32_t width, uint32_t count, uint32_t tile, uint32_t half,
                      float *y, size_t stride)
{
    const bool affine = kind == CM_TENSOR_U4A, wide = kind == CM_TENSOR_U8S;
    const uint32_t blocks = matrix->blocks;
    const size_t quant_bytes = wide ? 512 : 256, scale_bytes = affine ? 64 : 32;
    const int32_t zero = wide ? 128 : (affine ? 0 : 8);
    const uint8_t *quants = matrix->quants + (size_t)tile * blocks * quant_bytes + half * 32;
    const uint8_t *scales = matrix->scales + (size_t)tile * blocks * scale_bytes + half * 16;
    __m256 out[TOKENS], p[TOKENS];
    __m256i sums[TOKENS];
    for (uint32_t c = 0; c < count; c++) {
        out[c] = p[c] = _mm256_setzero_ps();
    }
    for (uint32_t b = 0; b < blocks; b++, at += width) {
        block_sums(wide, quants, x->q + at * CM_TILE_COLUMNS, count, sums);
        const __m256 d = half8(scales), m = affine ? half8(scales + 32) : d;
        for (uint32_t c = 0; c < count; c++) {
            __m256i sum = sums[c];
            if (zero != 0) {
                sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(zero * x->count[at + c]));
            }
            p[c] = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(x->scale[at + c])),
                                   _mm256_cvtepi32_ps(sum), p[c]);
            if (affine) {
                p[c] = _mm256_fmadd_ps(m, _mm256_set1_ps(x->sum[at + c]), p[c]);
            }
            if (b % 8 == 7 || b + 1 == blocks) {
                out[c] = _mm256_add_ps(out[c], p[c]);
                p[c] = _mm256_setzero_ps();
            }
        }
        quants += quant_bytes;
        scales += scale_bytes;
    }
    for (uint32_t c = 0; c < count; c++) {
        _mm256_storeu_ps(y + c * stride + half * 8, out[c]);
    }
}

INLINE void panel_run(uint32_t kind, const struct cm_matrix *matrix, const struct cm_activations *x,
                      uint32_t token, uint32_t width, uint32_t tile, float *y, size_t stride)
{
    for (uint32_t c = 0; c < width;) {
        uint32_t step = width - c >= TOKENS ? TOKENS : 1;
        size_t at = cm_activation_at(x, token + c, 0);
        for (uint32_t half = 0; half < 2; half++) {
            if (step == 1) {
                half_rows(kind, matrix, x, at, width, 1, tile, half, y + c * stride, stride);
            } else {
                half_rows(kind, matrix, x, at, width, TOKENS, tile, half, y + c * stride, stride);
            }
        }
        c += step;
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
            panel_run(kind, matrix, x, t, count, tile, to, stride);
        }
    }
}

void cm_avx2_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                  struct cm_span span, float *y, size_t stride)
{
    if (matrix->kind == CM_TENSOR_U4A) {
        kind_run(CM_TENSOR_U4A, matrix, x, span, y, stride);
    } else if (matrix->kind == CM_TENSOR_U4S) {
        kind_run(CM_TENSOR_U4S, matrix, x, span, y, stride);
    } else if (matrix->kind == CM_TENSOR_BF16) {
        cm_avx2_bfloat_gemm(matrix, x, span, y, stride);
    } else {
        kind_run(CM_TENSOR_U8S, matrix, x, span, y, stride);
    }
}
