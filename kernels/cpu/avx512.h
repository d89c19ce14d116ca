/* What the AVX-512 VNNI and AMX products share: a tile's block as bytes, its scales as floats. */
#ifndef CASEMATE_KERNELS_CPU_AVX512_H
#define CASEMATE_KERNELS_CPU_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "kernels/cpu/cpu_internal.h"

#define PREFETCH_BYTES 4096 /* ahead of the quants: measured best on both kinds of CPU */
#define INLINE         static inline __attribute__((always_inline))

/* What a kind stores per block of 16 rows × 32 columns. */
struct block_shape {
    bool affine, wide; /* has m; a byte a weight */
    size_t quant_bytes, scale_bytes;
    int32_t zero;
};

INLINE struct block_shape shape_of(uint32_t kind)
{
    const bool affine = kind == CM_TENSOR_U4A, wide = kind == CM_TENSOR_U8S;
    return (struct block_shape){affine, wide, wide ? 512 : 256, affine ? 64 : 32,
                                wide ? 128 : (affine ? 0 : 8)};
}

INLINE __m512 half16(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}

/* One block of 32 columns: w[j] holds columns 4j .. 4j+3 of 16 rows, one byte each. */
INLINE void unpack(bool wide, const uint8_t *quants, __m512i w[8])
{
    const __m512i low = _mm512_set1_epi8(15);
    for (uint32_t j = 0; j < (wide ? 8u : 4u); j++) {
        _mm_prefetch((const char *)quants + 64 * j + PREFETCH_BYTES, _MM_HINT_T0);
        __m512i pair = _mm512_loadu_si512(quants + 64 * j);
        if (wide) {
            w[j] = pair;
        } else {
            w[j] = _mm512_and_si512(pair, low);
            w[4 + j] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
        }
    }
}

#endif
