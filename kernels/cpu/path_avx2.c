/* Matrix product with AVX2: the same lanes as AVX-512 VNNI in two halves of 8 rows. Byte products
 * go through 16 bits; nibbles of 0..15 times int8 summed over 8 columns stay below 2^15 (15*127*16
 * = 30480), so nothing saturates; bytes are taken as two nibbles. */
#include "kernels/cpu/cpu_internal.h"

#include <immintrin.h>
#include <string.h>

static inline __m256i four(const int8_t *x)
{
    int32_t value;
    memcpy(&value, x, sizeof(value));
    return _mm256_set1_epi32(value);
}

static inline __m256 half8(const uint8_t *at)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}

static inline __m256i widen(__m256i sixteen)
{
    return _mm256_madd_epi16(sixteen, _mm256_set1_epi16(1));
}

/* Sums over one u4 tile, 8 rows at `quants` (rows 8..15 lie 32 bytes further). */
static inline __m256i sums_u4(const uint8_t *quants, const int8_t *x)
{
    const __m256i low = _mm256_set1_epi8(15);
    __m256i sum = _mm256_setzero_si256();
    for (uint32_t j = 0; j < 4; j++) {
        __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)(quants + 64 * j));
        __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
        sum =
            _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_and_si256(w, low), four(x + 4 * j)));
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w1, four(x + 16 + 4 * j)));
    }
    return widen(sum);
}

static inline __m256i sums_u8(const uint8_t *quants, const int8_t *x)
{
    const __m256i low = _mm256_set1_epi8(15);
    __m256i sum0 = _mm256_setzero_si256(), sum1 = _mm256_setzero_si256();
    for (uint32_t j = 0; j < 8; j++) {
        __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)(quants + 64 * j));
        __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
        __m256i a = four(x + 4 * j);
        sum0 = _mm256_add_epi16(sum0, _mm256_maddubs_epi16(_mm256_and_si256(w, low), a));
        sum1 = _mm256_add_epi16(sum1, _mm256_maddubs_epi16(w1, a));
    }
    return _mm256_add_epi32(widen(sum0), _mm256_slli_epi32(widen(sum1), 4));
}

/* Eight rows of one tile row for one token. */
static inline __attribute__((always_inline)) void
half_row(uint32_t kind, const struct cm_matrix *matrix, const struct cm_activations *x,
         uint32_t token, uint32_t tile, uint32_t half, float *y)
{
    const bool affine = kind == CM_TENSOR_U4A, wide = kind == CM_TENSOR_U8S;
    const uint32_t blocks = matrix->blocks;
    const size_t quant_bytes = wide ? 512 : 256, scale_bytes = affine ? 64 : 32;
    const int32_t zero = wide ? 128 : (affine ? 0 : 8);
    const uint8_t *quants = matrix->quants + (size_t)tile * blocks * quant_bytes + half * 32;
    const uint8_t *scales = matrix->scales + (size_t)tile * blocks * scale_bytes + half * 16;
    __m256 out = _mm256_setzero_ps(), p = out, m = out;
    for (uint32_t b = 0; b < blocks; b++) {
        size_t at = (size_t)token * blocks + b;
        const int8_t *from = x->q + at * CM_TILE_COLUMNS;
        __m256i sum = wide ? sums_u8(quants, from) : sums_u4(quants, from);
        if (zero != 0) {
            sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(zero * x->count[at]));
        }
        p = _mm256_fmadd_ps(_mm256_mul_ps(half8(scales), _mm256_set1_ps(x->scale[at])),
                            _mm256_cvtepi32_ps(sum), p);
        if (affine) {
            m = _mm256_fmadd_ps(half8(scales + 32), _mm256_set1_ps(x->sum[at]), m);
        }
        if (b % 8 == 7 || b + 1 == blocks) {
            out = _mm256_add_ps(out, _mm256_add_ps(p, m));
            p = m = _mm256_setzero_ps();
        }
        quants += quant_bytes;
        scales += scale_bytes;
    }
    _mm256_storeu_ps(y + half * 8, out);
}

void cm_gemm_avx2(const struct cm_matrix *matrix, const struct cm_activations *x, float *y,
                  size_t stride, uint32_t first, uint32_t last)
{
    for (uint32_t tile = first; tile < last; tile++) {
        for (uint32_t t = 0; t < x->tokens; t++) {
            float *at = y + t * stride + (size_t)tile * CM_TILE_ROWS;
            for (uint32_t half = 0; half < 2; half++) {
                if (matrix->kind == CM_TENSOR_U4A) {
                    half_row(CM_TENSOR_U4A, matrix, x, t, tile, half, at);
                } else if (matrix->kind == CM_TENSOR_U4S) {
                    half_row(CM_TENSOR_U4S, matrix, x, t, tile, half, at);
                } else {
                    half_row(CM_TENSOR_U8S, matrix, x, t, tile, half, at);
                }
            }
        }
    }
}
