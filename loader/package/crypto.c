/* The package's cryptography over OpenSSL's EVP: key schedule, AEAD, MAC, signature check. */
#include "loader/package/internal.h"

#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/ecdsa.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/kdf.h>
#include <openssl/params.h>

static enum cm_status crypto_failed(struct cm_error *err, const char *what)
{
    return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "the crypto library failed at %s", what);
}

enum cm_status cm_key_derive(const uint8_t key[static CM_KEY_BYTES],
                             const uint8_t salt[static CM_PACKAGE_SALT_BYTES], uint32_t suite,
                             enum cm_purpose purpose, uint32_t shard, uint8_t *ret_key, size_t size,
                             struct cm_error *err)
{
    enum cm_status status = CM_OK;
    uint8_t info[16] = "casemate/1";
    info[10] = (uint8_t)suite;
    info[11] = (uint8_t)purpose;
    for (int i = 0; i < 4; i++) {
        info[12 + i] = (uint8_t)(shard >> (8 * i));
    }
    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *context = kdf != NULL ? EVP_KDF_CTX_new(kdf) : NULL;
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, (char *)"SHA256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)key, CM_KEY_BYTES),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SALT, (void *)salt, CM_PACKAGE_SALT_BYTES),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, info, sizeof(info)),
        OSSL_PARAM_construct_end()};
    if (context == NULL || EVP_KDF_derive(context, ret_key, size, params) != 1) {
        cm_wipe(ret_key, size);
        status = crypto_failed(err, "HKDF");
    }
    EVP_KDF_CTX_free(context);
    EVP_KDF_free(kdf);
    return status;
}

enum cm_status cm_sha256(const void *bytes, size_t size, uint8_t ret_digest[static CM_DIGEST_BYTES],
                         struct cm_error *err)
{
    if (EVP_Digest(bytes, size, ret_digest, NULL, EVP_sha256(), NULL) != 1) {
        return crypto_failed(err, "SHA-256");
    }
    return CM_OK;
}

enum cm_status cm_hmac_sha256(const uint8_t key[static CM_KEY_BYTES], const void *part1,
                              size_t bytes1, const void *part2, size_t bytes2,
                              uint8_t ret_mac[static CM_DIGEST_BYTES], struct cm_error *err)
{
    enum cm_status status = CM_OK;
    size_t used = 0;
    EVP_MAC *mac = EVP_MAC_fetch(NULL, "HMAC", NULL);
    EVP_MAC_CTX *context = mac != NULL ? EVP_MAC_CTX_new(mac) : NULL;
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, (char *)"SHA256", 0),
        OSSL_PARAM_construct_end()};
    if (context == NULL || EVP_MAC_init(context, key, CM_KEY_BYTES, params) != 1 ||
        EVP_MAC_update(context, part1, bytes1) != 1 ||
        (bytes2 > 0 && EVP_MAC_update(context, part2, bytes2) != 1) ||
        EVP_MAC_final(context, ret_mac, &used, CM_DIGEST_BYTES) != 1 || used != CM_DIGEST_BYTES) {
        status = crypto_failed(err, "HMAC");
    }
    EVP_MAC_CTX_free(context);
    EVP_MAC_free(mac);
    return status;
}

static void nonce_make(const uint8_t *key, uint64_t index, uint8_t nonce[CM_AEAD_NONCE_BYTES])
{
    memcpy(nonce, key + CM_KEY_BYTES, 4);
    for (int i = 0; i < 8; i++) {
        nonce[4 + i] = (uint8_t)(index >> (56 - 8 * i));
    }
}

static const EVP_CIPHER *suite_cipher(uint32_t suite)
{
    return suite == CM_SUITE_AES_256_GCM ? EVP_aes_256_gcm() : EVP_chacha20_poly1305();
}

enum cm_status cm_aead_seal(uint32_t suite, const uint8_t *key, uint64_t index,
                            const uint8_t *plaintext, size_t bytes, uint8_t *ciphertext,
                            uint8_t ret_tag[static CM_AEAD_TAG_BYTES], struct cm_error *err)
{
    enum cm_status status = CM_OK;
    uint8_t nonce[CM_AEAD_NONCE_BYTES];
    int used = 0, rest = 0;
    CM_ASSERT(bytes <= CM_PACKAGE_MANIFEST_BYTES_MAX);
    nonce_make(key, index, nonce);
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (context == NULL ||
        EVP_EncryptInit_ex(context, suite_cipher(suite), NULL, key, nonce) != 1 ||
        EVP_EncryptUpdate(context, ciphertext, &used, plaintext, (int)bytes) != 1 ||
        EVP_EncryptFinal_ex(context, ciphertext + used, &rest) != 1 ||
        EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, CM_AEAD_TAG_BYTES, ret_tag) != 1) {
        status = crypto_failed(err, "encryption");
    }
    EVP_CIPHER_CTX_free(context);
    return status;
}

enum cm_status cm_aead_open_evp(uint32_t suite, const uint8_t *key, uint64_t index,
                                const uint8_t *ciphertext, size_t bytes,
                                const uint8_t tag[static CM_AEAD_TAG_BYTES], uint8_t *plaintext,
                                struct cm_error *err)
{
    enum cm_status status = CM_OK;
    uint8_t nonce[CM_AEAD_NONCE_BYTES];
    int used = 0, rest = 0;
    CM_ASSERT(bytes <= CM_PACKAGE_MANIFEST_BYTES_MAX);
    nonce_make(key, index, nonce);
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (context == NULL ||
        EVP_DecryptInit_ex(context, suite_cipher(suite), NULL, key, nonce) != 1 ||
        EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, CM_AEAD_TAG_BYTES, (void *)tag) != 1 ||
        EVP_DecryptUpdate(context, plaintext, &used, ciphertext, (int)bytes) != 1) {
        status = crypto_failed(err, "decryption");
    } else if (EVP_DecryptFinal_ex(context, plaintext + used, &rest) != 1) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-PKG-TAG", "authentication tag is wrong");
    }
    if (status != CM_OK) {
        cm_wipe(plaintext, bytes);
    }
    EVP_CIPHER_CTX_free(context);
    return status;
}

#ifdef __x86_64__
bool cm_sha256_pair_available(void)
{
    unsigned a, b = 0, c, d; /* the compilers of Debian 12 have no name for it */
    return __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &a, &b, &c, &d) == 1 &&
           (b & 1u << 29) != 0;
}
#endif

enum cm_status cm_aead_open(uint32_t suite, const uint8_t *key, uint64_t index,
                            const uint8_t *ciphertext, size_t bytes,
                            const uint8_t tag[static CM_AEAD_TAG_BYTES], uint8_t *plaintext,
                            struct cm_error *err)
{
    uint8_t nonce[CM_AEAD_NONCE_BYTES];
    if (suite != CM_SUITE_AES_256_GCM || !cm_gcm_vaes_available()) {
        return cm_aead_open_evp(suite, key, index, ciphertext, bytes, tag, plaintext, err);
    }
    CM_ASSERT(bytes <= CM_PACKAGE_MANIFEST_BYTES_MAX);
    nonce_make(key, index, nonce);
    if (!cm_gcm_vaes_open(key, nonce, ciphertext, bytes, tag, plaintext)) {
        cm_wipe(plaintext, bytes);
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-TAG", "authentication tag is wrong");
    }
    return CM_OK;
}

/* r ‖ s to the DER form that EVP takes. Returns its size, 0 on failure. */
static int signature_to_der(const uint8_t *signature, uint8_t *ret_der, size_t size)
{
    int used = 0;
    ECDSA_SIG *pair = ECDSA_SIG_new();
    BIGNUM *r = BN_bin2bn(signature, 32, NULL);
    BIGNUM *s = BN_bin2bn(signature + 32, 32, NULL);
    if (pair != NULL && r != NULL && s != NULL && ECDSA_SIG_set0(pair, r, s) == 1) {
        r = s = NULL;
        int need = i2d_ECDSA_SIG(pair, NULL);
        uint8_t *at = ret_der;
        used = need > 0 && (size_t)need <= size ? i2d_ECDSA_SIG(pair, &at) : 0;
    }
    BN_free(r);
    BN_free(s);
    ECDSA_SIG_free(pair);
    return used;
}

enum cm_status cm_signature_check(const uint8_t key[static CM_PUBLIC_KEY_BYTES],
                                  const uint8_t digest[static CM_DIGEST_BYTES],
                                  const uint8_t signature[static CM_PACKAGE_SIGNATURE_BYTES],
                                  struct cm_error *err)
{
    enum cm_status status = CM_OK;
    uint8_t der[80];
    EVP_PKEY *pkey = NULL;
    EVP_PKEY_CTX *check = NULL;
    EVP_PKEY_CTX *maker = EVP_PKEY_CTX_new_from_name(NULL, "EC", NULL);
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_PKEY_PARAM_GROUP_NAME, (char *)"P-256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_PKEY_PARAM_PUB_KEY, (void *)key,
                                          CM_PUBLIC_KEY_BYTES),
        OSSL_PARAM_construct_end()};
    if (maker == NULL || EVP_PKEY_fromdata_init(maker) != 1 ||
        EVP_PKEY_fromdata(maker, &pkey, EVP_PKEY_PUBLIC_KEY, params) != 1) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-PKG-SIGNATURE",
                              "the owner's key is not a point of P-256");
        goto out;
    }
    int der_bytes = signature_to_der(signature, der, sizeof(der));
    check = EVP_PKEY_CTX_new(pkey, NULL);
    if (der_bytes == 0 || check == NULL || EVP_PKEY_verify_init(check) != 1 ||
        EVP_PKEY_verify(check, der, (size_t)der_bytes, digest, CM_DIGEST_BYTES) != 1) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-PKG-SIGNATURE",
                              "core header: the owner's signature (offset %u) is wrong",
                              CM_PACKAGE_CORE_OFFSET + CM_CORE_SIGNED_BYTES);
    }
out:
    EVP_PKEY_CTX_free(check);
    EVP_PKEY_CTX_free(maker);
    EVP_PKEY_free(pkey);
    return status;
}

enum cm_status cm_header_mac(const uint8_t key[static CM_KEY_BYTES],
                             const struct cm_package_core *core,
                             uint8_t ret_mac[static CM_DIGEST_BYTES], struct cm_error *err)
{
    uint8_t mac_key[CM_KEY_BYTES];
    enum cm_status status = cm_key_derive(key, core->salt, core->suite, CM_PURPOSE_HEADER_MAC, 0,
                                          mac_key, sizeof(mac_key), err);
    if (status == CM_OK) {
        status = cm_hmac_sha256(mac_key, core->core_digest, CM_DIGEST_BYTES, NULL, 0, ret_mac, err);
    }
    cm_wipe(mac_key, sizeof(mac_key));
    return status;
}

enum cm_status cm_slots_mac(const uint8_t key[static CM_KEY_BYTES],
                            const struct cm_package_core *core,
                            const uint8_t slots_digest[static CM_DIGEST_BYTES],
                            uint8_t ret_mac[static CM_DIGEST_BYTES], struct cm_error *err)
{
    uint8_t mac_key[CM_KEY_BYTES];
    enum cm_status status = cm_key_derive(key, core->salt, core->suite, CM_PURPOSE_SLOTS, 0,
                                          mac_key, sizeof(mac_key), err);
    if (status == CM_OK) {
        status = cm_hmac_sha256(mac_key, core->core_digest, CM_DIGEST_BYTES, slots_digest,
                                CM_DIGEST_BYTES, ret_mac, err);
    }
    cm_wipe(mac_key, sizeof(mac_key));
    return status;
}

void cm_sha256_padding(size_t message_bytes, uint8_t ret_block[static 64])
{
    memset(ret_block, 0, 64);
    ret_block[0] = 0x80;
    for (int i = 0; i < 8; i++) {
        ret_block[56 + i] = (uint8_t)((uint64_t)message_bytes * 8 >> (56 - 8 * i));
    }
}
