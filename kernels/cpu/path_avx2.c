/* Matrix product with AVX2: the same lanes as AVX-512 VNNI in two halves of 8 rows. Byte products
 * go through 16 bits, and nothing may saturate: u4 sums all 32 columns (15*127*16 = 30480 < 2^15),
 * u5 each half of them for itself (31*127*8 = 31496), and bytes are taken as two nibbles. A block's
 * quants are unpacked once for up to 4 tokens. */
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

INLINE __m256i bytes32(const uint8_t *at)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)at);
}

/* Sums of `count` tokens over one tile, 8 rows at `quants` (rows 8..15 lie 32 bytes further). Low
 * and high nibbles meet columns 4j and 16+4j (u4, u5), or are two digits of column 4j (u8). */
INLINE void block_sums(uint32_t bits, const uint8_t *quants, const int8_t *x, uint32_t count,
                       __m256i *sums)
{
    const __m256i low = _mm256_set1_epi8(15), sixteen = _mm256_set1_epi8(16);
    const __m256i plane = bits == 5 ? bytes32(quants + 256) : low;
    __m256i others[TOKENS];
    if (bits == 5) {
        _mm_prefetch((const char *)quants + 256 + PREFETCH_BYTES, _MM_HINT_T0);
    }
    for (uint32_t c = 0; c < count; c++) {
        sums[c] = others[c] = _mm256_setzero_si256();
    }
    for (uint32_t j = 0; j < (bits == 8 ? 8u : 4u); j++) {
        _mm_prefetch((const char *)quants + 64 * j + PREFETCH_BYTES, _MM_HINT_T0);
        __m256i w = bytes32(quants + 64 * j);
        __m256i w0 = _mm256_and_si256(w, low);
        __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
        if (bits == 5) { /* bits j and 4+j of a byte of the plane are these columns' fifths */
            w0 = _mm256_or_si256(
                w0, _mm256_and_si256(_mm256_slli_epi16(plane, (uint8_t)(4 - j)), sixteen));
            w1 = _mm256_or_si256(w1,
                                 _mm256_and_si256(_mm256_srli_epi16(plane, (uint8_t)j), sixteen));
        }
        for (uint32_t c = 0; c < count; c++) {
            const int8_t *from = x + c * CM_TILE_COLUMNS + 4 * j;
            __m256i *second = bits == 4 ? &sums[c] : &others[c];
            sums[c] = _mm256_add_epi16(sums[c], _mm256_maddubs_epi16(w0, four(from)));
            from += bits == 8 ? 0 : 16;
            *second = _mm256_add_epi16(*second, _mm256_maddubs_epi16(w1, four(from)));
        }
    }
    for (uint32_t c = 0; c < count; c++) {
        sums[c] = widen(sums[c]);
        if (bits != 4) {
            sums[c] =
                _mm256_add_epi32(sums[c], _mm256_slli_epi32(widen(others[c]), bits == 8 ? 4 : 0));
        }
    }
}

/* Eight rows of one tile row for `count` tokens of a panel of `width`; at: of the first's block 0.
 */
INLINE void half_rows(uint32_t kind, const struct cm_matrix *matrix, const struct cm_activations *x,
                      size_t at, uint32_t width, uint32_t count, uint32_t tile, uint32_t half,
                      float *y, size_t stride)
{
    const struct cm_tile_shape shape = cm_tile_shape(kind);
    const uint32_t blocks = matrix->blocks;
    const uint8_t *quants = matrix->quants + (size_t)tile * blocks * shape.quant_bytes + half * 32;
    const uint8_t *scales = matrix->scales + (size_t)tile * blocks * shape.scale_bytes + half * 16;
    __m256 out[TOKENS], p[TOKENS];
    __m256i sums[TOKENS];
    for (uint32_t c = 0; c < count; c++) {
        out[c] = p[c] = _mm256_setzero_ps();
    }
    for (uint32_t b = 0; b < blocks; b++, at += width) {
        block_sums(shape.bits, quants, x->q + at * CM_TILE_COLUMNS, count, sums);
        const __m256 d = half8(scales), m = shape.affine ? half8(scales + 32) : d;
        for (uint32_t c = 0; c < count; c++) {
            __m256i sum = sums[c];
            if (shape.zero != 0) {
                sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(shape.zero * x->count[at + c]));
            }
            p[c] = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(x->scale[at + c])),
                                   _mm256_cvtepi32_ps(sum), p[c]);
            if (shape.affine) {
                p[c] = _mm256_fmadd_ps(m, _mm256_set1_ps(x->sum[at + c]), p[c]);
            }
            if (b % 8 == 7 || b + 1 == blocks) {
                out[c] = _mm256_add_ps(out[c], p[c]);
                p[c] = _mm256_setzero_ps();
            }
        }
        quants += shape.quant_bytes;
        scales += shape.scale_bytes;
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

#define KIND(kind)                                                                                 \
    case kind:                                                                                     \
        kind_run(kind, matrix, x, span, y, stride);                                                \
        return;

void cm_avx2_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                  struct cm_span span, float *y, size_t stride)
{
    switch (matrix->kind) {
        CM_QUANT_KINDS(KIND)
    default:
        CM_ASSERT(matrix->kind == CM_TENSOR_BF16);
        cm_avx2_bfloat_gemm(matrix, x, span, y, stride);
    }
}
