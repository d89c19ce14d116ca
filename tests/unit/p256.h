/* ECDSA P-256 for tests: raw signatures and points, by OpenSSL alone. */
#ifndef CASEMATE_TESTS_P256_H
#define CASEMATE_TESTS_P256_H

#include <criterion/criterion.h>
#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/ecdsa.h>
#include <openssl/evp.h>
#include <stdint.h>

/* r ‖ s over a digest. */
static inline void p256_sign(EVP_PKEY *key, const uint8_t digest[32], uint8_t ret[64])
{
    uint8_t der[80];
    size_t size = sizeof(der);
    EVP_PKEY_CTX *signer = EVP_PKEY_CTX_new(key, NULL);
    cr_assert(EVP_PKEY_sign_init(signer) == 1 &&
              EVP_PKEY_sign(signer, der, &size, digest, 32) == 1);
    EVP_PKEY_CTX_free(signer);
    const uint8_t *at = der;
    ECDSA_SIG *pair = d2i_ECDSA_SIG(NULL, &at, (long)size);
    cr_assert_eq(BN_bn2binpad(ECDSA_SIG_get0_r(pair), ret, 32), 32);
    cr_assert_eq(BN_bn2binpad(ECDSA_SIG_get0_s(pair), ret + 32, 32), 32);
    ECDSA_SIG_free(pair);
}

/* The public key, uncompressed. */
static inline void p256_point(EVP_PKEY *key, uint8_t ret[65])
{
    size_t used;
    cr_assert_eq(EVP_PKEY_get_octet_string_param(key, OSSL_PKEY_PARAM_PUB_KEY, ret, 65, &used), 1);
}

#endif
