/* What the AVX-512 VNNI and AMX products share: a tile's block as bytes, its scales as floats. */
#ifndef CASEMATE_KERNELS_CPU_AVX512_H
#define CASEMATE_KERNELS_CPU_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "kernels/cpu/cpu_internal.h"

#define PREFETCH_BYTES 4096 /* ahead of the quants: measured best on both kinds of CPU */
#define INLINE         static inline __attribute__((always_inline))

INLINE __m512 half16(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}

/* One block of 32 columns: w[j] holds columns 4j .. 4j+3 of 16 rows, one byte each. */
INLINE void unpack(struct cm_tile_shape shape, const uint8_t *quants, __m512i w[8])
{
    const __m512i low = _mm512_set1_epi8(15), sixteen = _mm512_set1_epi8(16);
    for (uint32_t at = 0; at < shape.quant_bytes; at += 64) {
        _mm_prefetch((const char *)quants + at + PREFETCH_BYTES, _MM_HINT_T0);
    }
    for (uint32_t j = 0; j < (shape.bits == 8 ? 8u : 4u); j++) {
        __m512i pair = _mm512_loadu_si512(quants + 64 * j);
        if (shape.bits == 8) {
            w[j] = pair;
        } else {
            w[j] = _mm512_and_si512(pair, low);
            w[4 + j] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
        }
    }
    if (shape.bits == 5) {
        const __m512i plane = _mm512_loadu_si512(quants + 256);
#pragma GCC unroll 8
        for (uint32_t j = 0; j < 8; j++) { /* bit j of a byte is column group j's fifth */
            const __m512i fifth = j < 4 ? _mm512_slli_epi16(plane, (uint8_t)(4 - j))
                                        : _mm512_srli_epi16(plane, (uint8_t)(j - 4));
            w[j] = _mm512_ternarylogic_epi32(w[j], fifth, sixteen, 0xf8); /* w | (fifth & 16) */
        }
    }
}

#endif
