/* The fast twins of the package's cryptography against OpenSSL: AES-256-GCM by VAES, SHA-256 in
 * lanes and of a pair, at every tail length, in place, with each bit of tag and text that is
 * turned. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loader/package/internal.h"

#define SIZE_MAX_TESTED (CM_PACKAGE_SEGMENT_BYTES + 1)

static struct cm_error err;
static uint8_t key[CM_AEAD_KEY_BYTES], tag[CM_AEAD_TAG_BYTES];
static uint8_t plain[SIZE_MAX_TESTED], cipher[SIZE_MAX_TESTED], found[SIZE_MAX_TESTED];

static void random_fill(uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        bytes[i] = (uint8_t)rand();
    }
}

static void scene(size_t size, uint64_t index)
{
    random_fill(key, sizeof(key));
    random_fill(plain, size);
    cr_assert_eq(cm_aead_seal(CM_SUITE_AES_256_GCM, key, index, plain, size, cipher, tag, &err),
                 CM_OK);
}

/* Whatever this CPU has: on one without VAES both are OpenSSL, and the test says so. */
static void setup(void)
{
    srand(31);
    printf("package_crypto: VAES %s, SHA-256 in lanes %s\n",
           cm_gcm_vaes_available() ? "yes" : "no: OpenSSL alone is tested",
           cm_sha256_lanes_available() ? "yes" : "no: OpenSSL alone is tested");
}
TestSuite(package_crypto, .init = setup);

static const uint64_t indices[] = {0, 1, 255, 0x0102030405060708ull, UINT64_MAX};

Test(package_crypto, gcm_opens_what_openssl_sealed_at_every_tail)
{
    for (size_t size = 0; size <= 1200; size++) {
        scene(size, indices[size % 5]);
        memset(found, 0xee, size + 1);
        cr_assert_eq(cm_aead_open(CM_SUITE_AES_256_GCM, key, indices[size % 5], cipher, size, tag,
                                  found, &err),
                     CM_OK, "%zu bytes", size);
        cr_assert_eq(memcmp(found, plain, size), 0, "%zu bytes", size);
        cr_assert_eq(found[size], 0xee, "%zu bytes: written beyond the end", size);
        memcpy(found, cipher, size); /* in place */
        cr_assert_eq(cm_aead_open(CM_SUITE_AES_256_GCM, key, indices[size % 5], found, size, tag,
                                  found, &err),
                     CM_OK);
        cr_assert_eq(memcmp(found, plain, size), 0, "%zu bytes, in place", size);
    }
}

Test(package_crypto, gcm_opens_whole_segments)
{
    for (size_t size = CM_PACKAGE_SEGMENT_BYTES - 1; size <= SIZE_MAX_TESTED; size++) {
        scene(size, 3);
        cr_assert_eq(cm_aead_open(CM_SUITE_AES_256_GCM, key, 3, cipher, size, tag, found, &err),
                     CM_OK);
        cr_assert_eq(memcmp(found, plain, size), 0);
        cr_assert_eq(cm_aead_open_evp(CM_SUITE_AES_256_GCM, key, 3, cipher, size, tag, found, &err),
                     CM_OK);
        cr_assert_eq(memcmp(found, plain, size), 0);
    }
}

Test(package_crypto, gcm_refuses_each_turned_bit_and_leaves_zeros)
{
    static const size_t sizes[] = {1, 16, 63, 64, 100, 512, 700};
    unsigned refused = 0;
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
        const size_t size = sizes[s];
        scene(size, 1);
        for (size_t bit = 0; bit < 8 * (size + sizeof(tag)); bit++) {
            uint8_t *at = bit / 8 < size ? &cipher[bit / 8] : &tag[bit / 8 - size];
            *at ^= (uint8_t)(1u << bit % 8);
            memset(found, 0xee, size);
            cr_assert_eq(cm_aead_open(CM_SUITE_AES_256_GCM, key, 1, cipher, size, tag, found, &err),
                         CM_E_PACKAGE, "%zu bytes, bit %zu", size, bit);
            cr_assert_str_eq(err.id, "CM-PKG-TAG");
            for (size_t i = 0; i < size; i++) {
                cr_assert_eq(found[i], 0);
            }
            *at ^= (uint8_t)(1u << bit % 8);
            refused++;
        }
        cr_assert_eq(cm_aead_open(CM_SUITE_AES_256_GCM, key, 2, cipher, size, tag, found, &err),
                     CM_E_PACKAGE, "another nonce");
        cr_assert_eq(cm_aead_open(CM_SUITE_AES_256_GCM, key, 1, cipher, size, tag, found, &err),
                     CM_OK);
    }
    printf("package_crypto: %u turned bits refused\n", refused);
}

/* The VAES path checks before it writes: a wrong tag never shows plaintext, not even for a while.
 */
Test(package_crypto, a_wrong_tag_writes_nothing)
{
    if (!cm_gcm_vaes_available()) {
        cr_skip_test("no VAES");
    }
    uint8_t nonce[CM_AEAD_NONCE_BYTES] = {0};
    scene(1000, 0);
    memcpy(nonce, key + CM_KEY_BYTES, 4);
    tag[15] ^= 1;
    memset(found, 0xee, 1000);
    cr_assert_not(cm_gcm_vaes_open(key, nonce, cipher, 1000, tag, found));
    for (size_t i = 0; i < 1000; i++) {
        cr_assert_eq(found[i], 0xee);
    }
    tag[15] ^= 1;
    cr_assert(cm_gcm_vaes_open(key, nonce, cipher, 1000, tag, found));
    cr_assert_eq(memcmp(found, plain, 1000), 0);
}

Test(package_crypto, sha256_of_a_pair_is_openssls)
{
    static uint8_t bytes[CM_SHA256_PAIR][4096];
    const uint8_t *const messages[CM_SHA256_PAIR] = {bytes[0], bytes[1]};
    uint8_t pair[CM_SHA256_PAIR][CM_DIGEST_BYTES], alone[CM_DIGEST_BYTES];
    if (!cm_sha256_pair_available()) {
        cr_skip_test("no SHA instructions");
    }
    random_fill(bytes[0], sizeof(bytes));
    for (size_t size = 0; size <= 4096; size += 64) {
        cm_sha256_pair(messages, size, pair);
        for (uint32_t i = 0; i < CM_SHA256_PAIR; i++) {
            cr_assert_eq(cm_sha256(bytes[i], size, alone, &err), CM_OK);
            cr_assert_eq(memcmp(pair[i], alone, sizeof(alone)), 0, "%zu bytes, %u", size, i);
        }
    }
}

Test(package_crypto, sha256_in_lanes_is_openssls)
{
    static uint8_t bytes[CM_SHA256_LANES][4096];
    const uint8_t *messages[CM_SHA256_LANES];
    uint8_t lanes[CM_SHA256_LANES][CM_DIGEST_BYTES], alone[CM_DIGEST_BYTES];
    if (!cm_sha256_lanes_available()) {
        cr_skip_test("no AVX-512");
    }
    random_fill(bytes[0], sizeof(bytes));
    for (size_t size = 0; size <= sizeof(bytes[0]); size += 64) {
        for (uint32_t i = 0; i < CM_SHA256_LANES; i++) {
            messages[i] = bytes[(i * 7 + 3) % CM_SHA256_LANES]; /* any order */
        }
        cm_sha256_lanes(messages, size, lanes);
        for (uint32_t i = 0; i < CM_SHA256_LANES; i++) {
            cr_assert_eq(cm_sha256(messages[i], size, alone, &err), CM_OK);
            cr_assert_eq(memcmp(lanes[i], alone, sizeof(alone)), 0, "%zu bytes, lane %u", size, i);
        }
    }
}
