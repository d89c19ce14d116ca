/* What class P's product and attention share. */
#ifndef CASEMATE_KERNELS_CPU_AMX_BF16_H
#define CASEMATE_KERNELS_CPU_AMX_BF16_H

#include <immintrin.h>

#include "kernels/cpu/amx.h"

#define TILE_BYTES 1024u /* 16 lines of 64 bytes: 16 × 32 bf16, or 16 × 16 floats */

/* Two rows of floats as pairs (first, second) of bf16, one a lane. Rounds to even; denormals become
 * 0. */
static inline __attribute__((always_inline)) __m512i pairs_of(__m512 first, __m512 second)
{
    const __m512i turns =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

#endif
