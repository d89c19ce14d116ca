/* AES-256-GCM decryption with VAES and VPCLMULQDQ on 512-bit registers: four blocks at a time.
 *
 * The tag is checked in a pass of its own before anything is decrypted, so ciphertext and plaintext
 * may be the same memory and a wrong tag never yields plaintext. No table is looked up by a secret
 * and no branch depends on one: AES rounds and carry-less products are instructions.
 * Sources: NIST SP 800-38D (GCM); RFC 8452 appendix A (GHASH by POLYVAL of byte-reversed blocks,
 * with the hash key times x); the fold by the field polynomial's upper half is Montgomery's. */
#include "loader/package/internal.h"

#include <immintrin.h>
#include <string.h>

#define ROUNDS      14
#define WIDE        8u /* registers of four blocks in one pass of a loop */
#define WIDE_BYTES  (64u * WIDE)
#define FIELD_UPPER 0xc200000000000000ull /* x^127 + x^126 + x^121: the polynomial's upper half */

/* Everything secret in one place, so that one wipe ends it. */
struct gcm {
    __m128i round_keys[ROUNDS + 1];
    __m512i powers[WIDE]; /* of the hash key, falling: four in each, the last holds 4, 3, 2, 1 */
    __m128i hash;
};

/* ------------------------------------------------------------------ keys */

/* One step of the AES-256 key schedule (FIPS 197 section 5.2). */
static inline __m128i key_fold(__m128i key, __m128i from)
{
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
    return _mm_xor_si128(key, from);
}

/* The round constant must be a literal. */
#define KEY_PAIR(i, constant)                                                                      \
    k[2 * (i)] = key_fold(                                                                         \
        k[2 * (i)-2], _mm_shuffle_epi32(_mm_aeskeygenassist_si128(k[2 * (i)-1], constant), 0xff)); \
    if (2 * (i) < ROUNDS) {                                                                        \
        k[2 * (i) + 1] = key_fold(                                                                 \
            k[2 * (i)-1], _mm_shuffle_epi32(_mm_aeskeygenassist_si128(k[2 * (i)], 0), 0xaa));      \
    }

static void keys_expand(const uint8_t *key, __m128i k[ROUNDS + 1])
{
    k[0] = _mm_loadu_si128((const __m128i *)(const void *)key);
    k[1] = _mm_loadu_si128((const __m128i *)(const void *)(key + 16));
    KEY_PAIR(1, 0x01)
    KEY_PAIR(2, 0x02)
    KEY_PAIR(3, 0x04)
    KEY_PAIR(4, 0x08)
    KEY_PAIR(5, 0x10)
    KEY_PAIR(6, 0x20)
    KEY_PAIR(7, 0x40)
}

static inline __m128i block_encrypt(const __m128i k[ROUNDS + 1], __m128i block)
{
    block = _mm_xor_si128(block, k[0]);
    for (int i = 1; i < ROUNDS; i++) {
        block = _mm_aesenc_si128(block, k[i]);
    }
    return _mm_aesenclast_si128(block, k[ROUNDS]);
}

/* ------------------------------------------------------------------ the hash */

static inline __m128i bytes_reverse(__m128i block)
{
    return _mm_shuffle_epi8(block,
                            _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

/* The parts of products, summed; each lane by itself. */
struct product {
    __m512i low, middle, high;
};

static inline void product_add(struct product *p, __m512i a, __m512i b)
{
    p->low = _mm512_xor_si512(p->low, _mm512_clmulepi64_epi128(a, b, 0x00));
    p->high = _mm512_xor_si512(p->high, _mm512_clmulepi64_epi128(a, b, 0x11));
    p->middle =
        _mm512_ternarylogic_epi64(p->middle, _mm512_clmulepi64_epi128(a, b, 0x01),
                                  _mm512_clmulepi64_epi128(a, b, 0x10), 0x96); /* xor of three */
}

static inline __m128i lanes_xor(__m512i a)
{
    __m256i half = _mm256_xor_si256(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    return _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

static inline __m128i halves_fold(__m128i a)
{
    const __m128i upper = _mm_set_epi64x(0, (long long)FIELD_UPPER);
    return _mm_xor_si128(_mm_shuffle_epi32(a, 0x4e), _mm_clmulepi64_si128(a, upper, 0x00));
}

/* The sum over the lanes, back in the field. */
static inline __m128i product_reduce(const struct product *p)
{
    __m128i middle = lanes_xor(p->middle);
    __m128i low = _mm_xor_si128(lanes_xor(p->low), _mm_slli_si128(middle, 8));
    __m128i high = _mm_xor_si128(lanes_xor(p->high), _mm_srli_si128(middle, 8));
    return _mm_xor_si128(high, halves_fold(halves_fold(low)));
}

static inline struct product product_none(void)
{
    const __m512i zero = _mm512_setzero_si512();
    return (struct product){zero, zero, zero};
}

static __m128i multiply(__m128i a, __m128i b)
{
    struct product p = product_none();
    product_add(&p, _mm512_zextsi128_si512(a), _mm512_zextsi128_si512(b));
    return product_reduce(&p);
}

/* RFC 8452 mulX_POLYVAL, then the powers 1 .. 4 * WIDE. */
static void powers_make(struct gcm *gcm)
{
    uint64_t h[2];
    __m128i falling[4 * WIDE];
    __m128i key = bytes_reverse(block_encrypt(gcm->round_keys, _mm_setzero_si128()));
    memcpy(h, &key, sizeof(h));
    uint64_t carry = 0 - (h[1] >> 63); /* all ones or none */
    key = _mm_set_epi64x((long long)((h[1] << 1 | h[0] >> 63) ^ (carry & FIELD_UPPER)),
                         (long long)(h[0] << 1 ^ (carry & 1)));
    falling[4 * WIDE - 1] = key;
    for (int i = 4 * WIDE - 2; i >= 0; i--) {
        falling[i] = multiply(falling[i + 1], key);
    }
    memcpy(gcm->powers, falling, sizeof(falling));
    cm_wipe(falling, sizeof(falling));
    cm_wipe(h, sizeof(h));
}

static inline __m512i four_reversed(const uint8_t *at)
{
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    return _mm512_shuffle_epi8(_mm512_loadu_si512(at), order);
}

/* Hash registers of four blocks; `count` of them, at most WIDE. */
static inline __attribute__((always_inline)) void fours_hash(struct gcm *gcm, const uint8_t *bytes,
                                                             uint32_t count)
{
    struct product p = product_none();
    __m512i first = _mm512_xor_si512(four_reversed(bytes), _mm512_zextsi128_si512(gcm->hash));
    product_add(&p, first, gcm->powers[WIDE - count]);
    for (uint32_t i = 1; i < count; i++) {
        _mm_prefetch((const char *)bytes + 64 * i + 4096, _MM_HINT_T0);
        product_add(&p, four_reversed(bytes + 64 * i), gcm->powers[WIDE - count + i]);
    }
    gcm->hash = product_reduce(&p);
}

static void block_hash(struct gcm *gcm, __m128i block)
{
    const __m128i key = _mm512_extracti32x4_epi32(gcm->powers[WIDE - 1], 3);
    gcm->hash = multiply(_mm_xor_si128(gcm->hash, block), key);
}

static void tag_make(struct gcm *gcm, __m128i counter0, const uint8_t *bytes, size_t size,
                     uint8_t ret_tag[CM_AEAD_TAG_BYTES])
{
    const uint64_t bits = 8 * (uint64_t)size;
    gcm->hash = _mm_setzero_si128();
    size_t at = 0;
    for (; size - at >= WIDE_BYTES; at += WIDE_BYTES) {
        fours_hash(gcm, bytes + at, WIDE);
    }
    for (; size - at >= 64; at += 64) {
        fours_hash(gcm, bytes + at, 1);
    }
    for (; at < size; at += 16) {
        const size_t rest = size - at < 16 ? size - at : 16;
        const __mmask16 mask = (__mmask16)((1u << rest) - 1);
        block_hash(gcm, bytes_reverse(_mm_maskz_loadu_epi8(mask, bytes + at)));
    }
    block_hash(gcm, _mm_set_epi64x(0, (long long)bits)); /* no associated data */
    __m128i tag = _mm_xor_si128(bytes_reverse(gcm->hash), block_encrypt(gcm->round_keys, counter0));
    memcpy(ret_tag, &tag, CM_AEAD_TAG_BYTES);
}

/* ------------------------------------------------------------------ the cipher */

/* `count` registers of key stream from `counters` on (little-endian, the count in each lane's low
 * word), xored over `bytes`. */
static inline __attribute__((always_inline)) void fours_decrypt(const __m512i k[ROUNDS + 1],
                                                                __m512i *counters,
                                                                const uint8_t *from, uint8_t *to,
                                                                uint32_t count)
{
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i four = _mm512_broadcast_i32x4(_mm_set_epi32(0, 0, 0, 4));
    __m512i stream[WIDE];
    for (uint32_t i = 0; i < count; i++) {
        stream[i] = _mm512_xor_si512(_mm512_shuffle_epi8(*counters, order), k[0]);
        *counters = _mm512_add_epi32(*counters, four);
    }
    for (int round = 1; round < ROUNDS; round++) {
        for (uint32_t i = 0; i < count; i++) {
            stream[i] = _mm512_aesenc_epi128(stream[i], k[round]);
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        stream[i] = _mm512_aesenclast_epi128(stream[i], k[ROUNDS]);
        _mm512_storeu_si512(to + 64 * i,
                            _mm512_xor_si512(stream[i], _mm512_loadu_si512(from + 64 * i)));
    }
}

static void decrypt(const struct gcm *gcm, __m128i counter0, const uint8_t *ciphertext, size_t size,
                    uint8_t *plaintext)
{
    __m512i k[ROUNDS + 1];
    uint8_t rest[64];
    for (int i = 0; i <= ROUNDS; i++) {
        k[i] = _mm512_broadcast_i32x4(gcm->round_keys[i]);
    }
    /* The text starts at count 2: NIST SP 800-38D section 7.2. */
    __m512i counters =
        _mm512_add_epi32(_mm512_broadcast_i32x4(bytes_reverse(counter0)),
                         _mm512_set_epi32(0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 1));
    size_t at = 0;
    for (; size - at >= WIDE_BYTES; at += WIDE_BYTES) {
        fours_decrypt(k, &counters, ciphertext + at, plaintext + at, WIDE);
    }
    for (; size - at >= 64; at += 64) {
        fours_decrypt(k, &counters, ciphertext + at, plaintext + at, 1);
    }
    if (at < size) {
        memcpy(rest, ciphertext + at, size - at);
        fours_decrypt(k, &counters, rest, rest, 1);
        memcpy(plaintext + at, rest, size - at);
        cm_wipe(rest, sizeof(rest));
    }
    cm_wipe(k, sizeof(k));
}

bool cm_gcm_vaes_open(const uint8_t key[static CM_KEY_BYTES],
                      const uint8_t nonce[static CM_AEAD_NONCE_BYTES], const uint8_t *ciphertext,
                      size_t bytes, const uint8_t tag[static CM_AEAD_TAG_BYTES], uint8_t *plaintext)
{
    struct gcm gcm;
    uint8_t block[16] = {[15] = 1}, found[CM_AEAD_TAG_BYTES];
    memcpy(block, nonce, CM_AEAD_NONCE_BYTES);
    const __m128i counter0 = _mm_loadu_si128((const __m128i *)(const void *)block);
    keys_expand(key, gcm.round_keys);
    powers_make(&gcm);
    tag_make(&gcm, counter0, ciphertext, bytes, found);
    bool right = cm_ct_equal(found, tag, CM_AEAD_TAG_BYTES);
    if (right) {
        decrypt(&gcm, counter0, ciphertext, bytes, plaintext);
    }
    cm_wipe(&gcm, sizeof(gcm));
    cm_wipe(found, sizeof(found));
    return right;
}
