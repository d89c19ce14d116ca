/* Sixteen floats at once, in the order of kernels/NUMERICS.md. One interface, three bodies:
 * AVX-512, two halves of AVX2, and plain C, which is the definition. The files that use it are
 * compiled once for each path; what a lane computes is the same in all of them. */
#ifndef CASEMATE_KERNELS_CPU_LANES_H
#define CASEMATE_KERNELS_CPU_LANES_H

#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define LANES 16u
/* The name of a function on this path: LANES_NAME(cm, gate) is cm_avx2_gate. */
#define LANES_JOIN_(a, b, c) a##_##b##_##c
#define LANES_JOIN(a, b, c)  LANES_JOIN_(a, b, c)
#define LANES_NAME(what)     LANES_JOIN(cm, CM_PATH, what)

#if defined(__AVX512F__)

typedef __m512 lanes;
#define LANES_SCORE_ROWS      6u /* rows of attention that one pass over K serves, and over V */
#define LANES_VALUE_ROWS      6u
#define LANES_LOW_RANK_TOKENS 4u  /* that one pass over a factor serves */
#define LANES_TOKENS          16u /* of a panel, in one pass over bf16 weights */

static inline lanes lanes_set(float x)
{
    return _mm512_set1_ps(x);
}
static inline lanes lanes_load(const float *at)
{
    return _mm512_loadu_ps(at);
}
static inline void lanes_store(float *at, lanes x)
{
    _mm512_storeu_ps(at, x);
}
static inline lanes lanes_add(lanes a, lanes b)
{
    return _mm512_add_ps(a, b);
}
static inline lanes lanes_mul(lanes a, lanes b)
{
    return _mm512_mul_ps(a, b);
}
static inline lanes lanes_div(lanes a, lanes b)
{
    return _mm512_div_ps(a, b);
}
static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    return _mm512_fmadd_ps(a, b, c);
}
static inline lanes lanes_max(lanes a, lanes b)
{
    return _mm512_max_ps(a, b);
}
static inline lanes lanes_min(lanes a, lanes b)
{
    return _mm512_min_ps(a, b);
}
static inline lanes lanes_abs(lanes a)
{
    return _mm512_abs_ps(a);
}
static inline lanes lanes_flip(lanes a, lanes signs) /* exclusive or */
{
    return _mm512_xor_ps(a, signs);
}
static inline lanes lanes_round(lanes a) /* to even */
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline lanes lanes_power(lanes n) /* 2^n of whole n, -126 .. 127 */
{
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}
/* The first `count` lanes of a, the others `rest`. */
static inline lanes lanes_first(lanes a, uint32_t count, float rest)
{
    __mmask16 mask = (__mmask16)(count >= LANES ? 0xffffu : (1u << count) - 1u);
    return _mm512_mask_mov_ps(_mm512_set1_ps(rest), mask, a);
}
/* The first `count` lanes `rest`, the others of a. */
static inline lanes lanes_after(lanes a, uint32_t count, float rest)
{
    __mmask16 mask = (__mmask16)(count >= LANES ? 0xffffu : (1u << count) - 1u);
    return _mm512_mask_mov_ps(a, mask, _mm512_set1_ps(rest));
}
static inline lanes lanes_half_load(const uint16_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}
static inline void lanes_half_store(uint16_t *at, lanes x)
{
    _mm256_storeu_si256((__m256i *)(void *)at, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
/* 32 whole numbers of int8 range. Returns their sum. */
static inline int32_t lanes_bytes_store(int8_t *at, lanes first, lanes second)
{
    __m512i a = _mm512_cvtps_epi32(first), b = _mm512_cvtps_epi32(second);
    _mm_storeu_si128((__m128i *)(void *)at, _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(void *)(at + 16), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}
static inline lanes lanes_bytes_load(const int8_t *at)
{
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)at)));
}
/* Lane l of lane l ^ step. */
static inline lanes lanes_partner(lanes a, int32_t step)
{
    const __m512i own = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_permutexvar_ps(_mm512_xor_si512(own, _mm512_set1_epi32(step)), a);
}
/* Exact products of int8: four of each lane, -127 .. 127, with the same four of another vector,
 * whose sum over all that a lane adds up is known to lanes_sums_begin. */
typedef __m512i lanes_sums;
typedef __m512i lanes_quads;
static inline lanes_quads lanes_quads_load(const int8_t *at)
{
    return _mm512_xor_si512(_mm512_loadu_si512(at), _mm512_set1_epi8(-128)); /* + 128, unsigned */
}
static inline lanes_sums lanes_sums_begin(int32_t total)
{
    return _mm512_set1_epi32(-128 * total);
}
static inline lanes_sums lanes_sums_add(lanes_sums sums, lanes_quads quads, int32_t four)
{
    return _mm512_dpbusd_epi32(sums, quads, _mm512_set1_epi32(four));
}
static inline lanes lanes_sums_float(lanes_sums sums)
{
    return _mm512_cvtepi32_ps(sums);
}
/* Lanes 2i and 2i+1 exchanged. */
static inline lanes lanes_swap(lanes a)
{
    return _mm512_permute_ps(a, 0xb1);
}
/* Eight floats, each in two neighbouring lanes. */
static inline lanes lanes_twice(const float *at)
{
    const __m512i pairs = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(_mm256_loadu_ps(at)));
}
/* Sixteen pairs of bf16: the first and the second of each. */
static inline void lanes_bfloats_load(const uint8_t *at, lanes *first, lanes *second)
{
    const __m512i pairs = _mm512_loadu_si512(at);
    *first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xffff0000u)));
}
static inline void lanes_halves(lanes a, __m256 *low, __m256 *high)
{
    *low = _mm512_castps512_ps256(a);
    *high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
}

#elif defined(__AVX2__)

typedef struct {
    __m256 low, high;
} lanes;
#define LANES_SCORE_ROWS      2u
#define LANES_VALUE_ROWS      1u
#define LANES_LOW_RANK_TOKENS 1u
#define LANES_TOKENS          4u

static inline lanes lanes_set(float x)
{
    return (lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
static inline lanes lanes_load(const float *at)
{
    return (lanes){_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
}
static inline void lanes_store(float *at, lanes x)
{
    _mm256_storeu_ps(at, x.low);
    _mm256_storeu_ps(at + 8, x.high);
}
static inline lanes lanes_add(lanes a, lanes b)
{
    return (lanes){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
static inline lanes lanes_mul(lanes a, lanes b)
{
    return (lanes){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
static inline lanes lanes_div(lanes a, lanes b)
{
    return (lanes){_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
static inline lanes lanes_fma(lanes a, lanes b, lanes c)
{
    return (lanes){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
static inline lanes lanes_max(lanes a, lanes b)
{
    return (lanes){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
static inline lanes lanes_min(lanes a, lanes b)
{
    return (lanes){_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
static inline lanes lanes_abs(lanes a)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (lanes){_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
static inline lanes lanes_flip(lanes a, lanes signs)
{
    return (lanes){_mm256_xor_ps(a.low, signs.low), _mm256_xor_ps(a.high, signs.high)};
}
static inline lanes lanes_round(lanes a)
{
    return (lanes){_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                   _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 lanes_power_half(__m256 n)
{
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
static inline lanes lanes_power(lanes n)
{
    return (lanes){lanes_power_half(n.low), lanes_power_half(n.high)};
}
static inline lanes lanes_first(lanes a, uint32_t count, float rest)
{
    const __m256i index = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256 other = _mm256_set1_ps(rest);
    __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)count), index);
    __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)count - 8), index);
    return (lanes){_mm256_blendv_ps(other, a.low, _mm256_castsi256_ps(low)),
                   _mm256_blendv_ps(other, a.high, _mm256_castsi256_ps(high))};
}
static inline lanes lanes_after(lanes a, uint32_t count, float rest)
{
    const __m256i index = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256 other = _mm256_set1_ps(rest);
    __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)count), index);
    __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)count - 8), index);
    return (lanes){_mm256_blendv_ps(a.low, other, _mm256_castsi256_ps(low)),
                   _mm256_blendv_ps(a.high, other, _mm256_castsi256_ps(high))};
}
static inline lanes lanes_half_load(const uint16_t *at)
{
    return (lanes){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at)),
                   _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(at + 8)))};
}
static inline void lanes_half_store(uint16_t *at, lanes x)
{
    _mm_storeu_si128((__m128i *)(void *)at, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(void *)(at + 8),
                     _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
static inline __m128i lanes_bytes(__m256i low, __m256i high)
{
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
static inline int32_t lanes_bytes_store(int8_t *at, lanes first, lanes second)
{
    __m256i a = _mm256_cvtps_epi32(first.low), b = _mm256_cvtps_epi32(first.high);
    __m256i c = _mm256_cvtps_epi32(second.low), d = _mm256_cvtps_epi32(second.high);
    _mm_storeu_si128((__m128i *)(void *)at, lanes_bytes(a, b));
    _mm_storeu_si128((__m128i *)(void *)(at + 16), lanes_bytes(c, d));
    __m256i sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
static inline lanes lanes_bytes_load(const int8_t *at)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)at);
    return (lanes){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                   _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
static inline lanes lanes_partner(lanes a, int32_t step)
{
    if (step == 8) {
        return (lanes){a.high, a.low};
    }
    const __m256i own = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i other = _mm256_xor_si256(own, _mm256_set1_epi32(step));
    return (lanes){_mm256_permutevar8x32_ps(a.low, other), _mm256_permutevar8x32_ps(a.high, other)};
}
typedef struct {
    __m256i low, high;
} lanes_sums;
typedef lanes_sums lanes_quads;
static inline lanes_quads lanes_quads_load(const int8_t *at)
{
    return (lanes_quads){_mm256_loadu_si256((const __m256i *)(const void *)at),
                         _mm256_loadu_si256((const __m256i *)(const void *)(at + 32))};
}
static inline lanes_sums lanes_sums_begin(int32_t total)
{
    (void)total; /* signs move to the other vector here */
    return (lanes_sums){_mm256_setzero_si256(), _mm256_setzero_si256()};
}
/* A pair's sum is at most 2 * 127 * 127 < 2^15, so nothing saturates. */
static inline __m256i lanes_quads_dot(__m256i quads, __m256i four)
{
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(quads), _mm256_sign_epi8(four, quads));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
static inline lanes_sums lanes_sums_add(lanes_sums sums, lanes_quads quads, int32_t four)
{
    const __m256i all = _mm256_set1_epi32(four);
    return (lanes_sums){_mm256_add_epi32(sums.low, lanes_quads_dot(quads.low, all)),
                        _mm256_add_epi32(sums.high, lanes_quads_dot(quads.high, all))};
}
static inline lanes lanes_sums_float(lanes_sums sums)
{
    return (lanes){_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)};
}
static inline lanes lanes_swap(lanes a)
{
    return (lanes){_mm256_permute_ps(a.low, 0xb1), _mm256_permute_ps(a.high, 0xb1)};
}
static inline lanes lanes_twice(const float *at)
{
    __m256 x = _mm256_loadu_ps(at);
    return (lanes){
        _mm256_permutevar8x32_ps(x, _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0)),
        _mm256_permutevar8x32_ps(x, _mm256_set_epi32(7, 7, 6, 6, 5, 5, 4, 4)),
    };
}
static inline void lanes_bfloats_load(const uint8_t *at, lanes *first, lanes *second)
{
    const __m256i mask = _mm256_set1_epi32((int32_t)0xffff0000u);
    const __m256i low = _mm256_loadu_si256((const __m256i *)(const void *)at);
    const __m256i high = _mm256_loadu_si256((const __m256i *)(const void *)(at + 32));
    *first = (lanes){_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
                     _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    *second = (lanes){_mm256_castsi256_ps(_mm256_and_si256(low, mask)),
                      _mm256_castsi256_ps(_mm256_and_si256(high, mask))};
}
static inline void lanes_halves(lanes a, __m256 *low, __m256 *high)
{
    *low = a.low;
    *high = a.high;
}

#else
#error "compile with AVX2, FMA and F16C at least"
#endif

/* Lanes added in a tree: l and l+8, l and l+4, l and l+2, l and l+1. */
static inline float lanes_sum(lanes a)
{
    __m256 low, high;
    lanes_halves(a, &low, &high);
    __m256 eight = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

static inline float lanes_greatest(lanes a)
{
    __m256 low, high;
    lanes_halves(a, &low, &high);
    __m256 eight = _mm256_max_ps(low, high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#define CM_BYTES_LEAST 0x1p-100f /* what is below 127 / x would not be finite for */

/* 32 floats as int8 times *ret_scale (kernels/NUMERICS.md, "Activations"), as zeros where none is
 * above `least`. Returns their sum. */
static inline int32_t lanes_quantise(lanes low, lanes high, float least, int8_t *to,
                                     float *ret_scale)
{
    float greatest = lanes_greatest(lanes_max(lanes_abs(low), lanes_abs(high)));
    lanes inverse = lanes_set(greatest > least ? 127.0f / greatest : 0.0f);
    *ret_scale = greatest / 127.0f;
    return lanes_bytes_store(to, lanes_round(lanes_mul(low, inverse)),
                             lanes_round(lanes_mul(high, inverse)));
}

/* One step of the fast Walsh-Hadamard transform within 16 lanes: of each pair `step` apart, sum and
 * difference. */
static inline lanes lanes_turn_step(lanes a, int32_t step)
{
    float signs[LANES];
    for (int32_t l = 0; l < (int32_t)LANES; l++) {
        signs[l] = (l & step) != 0 ? -0.0f : 0.0f;
    }
    return lanes_add(lanes_partner(a, step), lanes_flip(a, lanes_load(signs)));
}

static inline lanes lanes_turn(lanes a)
{
    return lanes_turn_step(lanes_turn_step(lanes_turn_step(lanes_turn_step(a, 8), 4), 2), 1);
}

/* A block of a head as int8: up to 32 floats at `from`, what is missing is 0. turned: after the
 * Walsh-Hadamard transform, as keys and queries are. */
static inline int32_t lanes_quantise_head(const float *from, uint32_t count, bool turned,
                                          int8_t *to, float *ret_scale)
{
    float whole[2 * LANES] = {0};
    if (count < 2 * LANES) {
        memcpy(whole, from, count * sizeof(float));
        from = whole;
    }
    lanes low = lanes_load(from), high = lanes_load(from + LANES);
    if (turned) {
        const lanes sum = lanes_add(low, high);
        high = lanes_turn(lanes_add(low, lanes_flip(high, lanes_set(-0.0f))));
        low = lanes_turn(sum);
    }
    return lanes_quantise(low, high, CM_BYTES_LEAST, to, ret_scale);
}

/* As cm_expf, lane by lane. */
static inline lanes lanes_exp(lanes x)
{
    lanes r = lanes_min(lanes_max(x, lanes_set(-87.0f)), lanes_set(88.0f));
    lanes n = lanes_round(lanes_mul(r, lanes_set(0x1.715476p+0f)));
    r = lanes_fma(n, lanes_set(-0x1.62e4p-1f), r);
    r = lanes_fma(n, lanes_set(-0x1.7f7d1cp-20f), r);
    lanes p = lanes_set(0x1.6c16c2p-10f);
    p = lanes_fma(p, r, lanes_set(0x1.111112p-7f));
    p = lanes_fma(p, r, lanes_set(0x1.555556p-5f));
    p = lanes_fma(p, r, lanes_set(0x1.555556p-3f));
    p = lanes_fma(p, r, lanes_set(0.5f));
    p = lanes_fma(p, r, lanes_set(1.0f));
    p = lanes_fma(p, r, lanes_set(1.0f));
    return lanes_mul(p, lanes_power(n));
}

/* As cm_capf. */
static inline lanes lanes_cap(lanes x, float cap)
{
    lanes e = lanes_exp(lanes_mul(lanes_div(x, lanes_set(cap)), lanes_set(2.0f)));
    lanes part = lanes_div(lanes_set(-2.0f), lanes_add(lanes_set(1.0f), e));
    return lanes_mul(lanes_set(cap), lanes_add(lanes_set(1.0f), part));
}

#endif
