/* SHA-256 of several messages of one length at once (FIPS 180-4).
 *
 * A single message cannot fill a core: each round waits for the one before. Sixteen messages do,
 * one in each 32-bit lane of the AVX-512 registers: 4.3 GB/s where OpenSSL's SHA instructions
 * give 2.0 for one message, and two or four messages in turn through those instructions 2.3
 * (measured). */
#include "loader/package/internal.h"

#include <immintrin.h>
#include <string.h>

const uint32_t cm_sha256_constants[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

const uint32_t cm_sha256_beginning[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

#define XOR3   0x96 /* truth tables for ternarylogic */
#define CHOOSE 0xca
#define MOST   0xe8

static inline __m512i sum3(__m512i a, __m512i b, __m512i c)
{
    return _mm512_ternarylogic_epi32(a, b, c, XOR3);
}

/* Rows of 16 words become columns: lane i of ret[j] is word j of message i. */
static inline void words_load(const uint8_t *const at[16], size_t offset, __m512i ret[16])
{
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3));
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) {
        a[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(at[i] + offset), order);
    }
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        ret[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        ret[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        ret[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        ret[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
}

static inline __attribute__((always_inline)) void round_one(__m512i s[8], __m512i word,
                                                            uint32_t constant)
{
    const __m512i a = s[0], e = s[4];
    __m512i big1 = sum3(_mm512_ror_epi32(e, 6), _mm512_ror_epi32(e, 11), _mm512_ror_epi32(e, 25));
    __m512i big0 = sum3(_mm512_ror_epi32(a, 2), _mm512_ror_epi32(a, 13), _mm512_ror_epi32(a, 22));
    __m512i first = _mm512_add_epi32(
        _mm512_add_epi32(s[7], _mm512_add_epi32(word, _mm512_set1_epi32((int)constant))),
        _mm512_add_epi32(big1, _mm512_ternarylogic_epi32(e, s[5], s[6], CHOOSE)));
    __m512i second = _mm512_add_epi32(big0, _mm512_ternarylogic_epi32(a, s[1], s[2], MOST));
    s[7] = s[6];
    s[6] = s[5];
    s[5] = e;
    s[4] = _mm512_add_epi32(s[3], first);
    s[3] = s[2];
    s[2] = s[1];
    s[1] = a;
    s[0] = _mm512_add_epi32(first, second);
}

static inline __attribute__((always_inline)) __m512i word_next(const __m512i w[16], int i)
{
    const __m512i from15 = w[(i + 1) % 16], from2 = w[(i + 14) % 16];
    __m512i small0 = sum3(_mm512_ror_epi32(from15, 7), _mm512_ror_epi32(from15, 18),
                          _mm512_srli_epi32(from15, 3));
    __m512i small1 = sum3(_mm512_ror_epi32(from2, 17), _mm512_ror_epi32(from2, 19),
                          _mm512_srli_epi32(from2, 10));
    return _mm512_add_epi32(_mm512_add_epi32(w[i], small0),
                            _mm512_add_epi32(w[(i + 9) % 16], small1));
}

/* gcc orders instructions better before it gives out registers than behind it: a block takes 1,025
 * cycles in place of 1,118 (Zen 4). clang, which does not know these words, takes 1,020. */
#ifdef __clang__
#define ORDERED_EARLY
#else
#define ORDERED_EARLY                                                                              \
    __attribute__((optimize("schedule-insns", "sched-pressure", "no-schedule-insns2")))
#endif

ORDERED_EARLY static void blocks_take(__m512i state[8], const uint8_t *const at[16], size_t bytes)
{
    for (size_t offset = 0; offset < bytes; offset += 64) {
        __m512i w[16], s[8];
        words_load(at, offset, w);
        memcpy(s, state, sizeof(s));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            round_one(s, w[i], cm_sha256_constants[i]);
        }
        for (int turn = 16; turn < 64; turn += 16) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                w[i] = word_next(w, i);
                round_one(s, w[i], cm_sha256_constants[turn + i]);
            }
        }
        for (int i = 0; i < 8; i++) {
            state[i] = _mm512_add_epi32(state[i], s[i]);
        }
    }
}

void cm_sha256_lanes(const uint8_t *const messages[CM_SHA256_LANES], size_t bytes,
                     uint8_t ret_digests[CM_SHA256_LANES][CM_DIGEST_BYTES])
{
    uint8_t last[64];
    const uint8_t *at[CM_SHA256_LANES];
    __m512i state[8];
    CM_ASSERT(bytes % 64 == 0);
    for (int i = 0; i < 8; i++) {
        state[i] = _mm512_set1_epi32((int)cm_sha256_beginning[i]);
    }
    blocks_take(state, messages, bytes);
    cm_sha256_padding(bytes, last);
    for (uint32_t i = 0; i < CM_SHA256_LANES; i++) {
        at[i] = last;
    }
    blocks_take(state, at, sizeof(last));
    for (uint32_t word = 0; word < 8; word++) {
        uint32_t lanes[CM_SHA256_LANES];
        memcpy(lanes, &state[word], sizeof(lanes));
        for (uint32_t i = 0; i < CM_SHA256_LANES; i++) {
            for (uint32_t k = 0; k < 4; k++) {
                ret_digests[i][4 * word + k] = (uint8_t)(lanes[i] >> (24 - 8 * k));
            }
        }
    }
}
