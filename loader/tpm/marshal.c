/* TPM structures by hand, and the little cryptography around them. */
#include "loader/tpm/internal.h"

#include <string.h>

#include <openssl/core_names.h>
#include <openssl/ecdsa.h>
#include <openssl/evp.h>
#include <openssl/params.h>

const uint8_t cm_tpm_ek_policy[CM_DIGEST_BYTES] = {
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xB3, 0xF8, 0x1A, 0x90, 0xCC, 0x8D, 0x46, 0xA5, 0xD7, 0x24,
    0xFD, 0x52, 0xD7, 0x6E, 0x06, 0x52, 0x0B, 0x64, 0xF2, 0xA1, 0xDA, 0x1B, 0x33, 0x14, 0x69, 0xAA};

void cm_be_bytes(struct cm_be *be, const void *bytes, size_t size)
{
    if (be->failed || size > be->size - be->used) {
        be->failed = true;
        return;
    }
    if (size > 0) {
        memcpy(be->bytes + be->used, bytes, size);
    }
    be->used += size;
}

static void be_number(struct cm_be *be, uint64_t value, size_t size)
{
    uint8_t bytes[8];
    for (size_t i = 0; i < size; i++) {
        bytes[i] = (uint8_t)(value >> (8 * (size - 1 - i)));
    }
    cm_be_bytes(be, bytes, size);
}

void cm_be_u16(struct cm_be *be, uint32_t value)
{
    be_number(be, value, 2);
}

void cm_be_u32(struct cm_be *be, uint32_t value)
{
    be_number(be, value, 4);
}

void cm_be_u64(struct cm_be *be, uint64_t value)
{
    be_number(be, value, 8);
}

void cm_be_sized(struct cm_be *be, const void *bytes, size_t size)
{
    cm_be_u16(be, (uint32_t)size);
    cm_be_bytes(be, bytes, size);
}

uint16_t cm_be_u16_at(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] << 8 | bytes[1]);
}

enum cm_status cm_tpm_hash(uint8_t ret_digest[static CM_DIGEST_BYTES], struct cm_error *err,
                           const struct cm_be *part1, const struct cm_be *part2)
{
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    bool ok = !part1->failed && (part2 == NULL || !part2->failed) && context != NULL &&
              EVP_DigestInit_ex(context, EVP_sha256(), NULL) == 1 &&
              EVP_DigestUpdate(context, part1->bytes, part1->used) == 1 &&
              (part2 == NULL || EVP_DigestUpdate(context, part2->bytes, part2->used) == 1) &&
              EVP_DigestFinal_ex(context, ret_digest, NULL) == 1;
    EVP_MD_CTX_free(context);
    return ok ? CM_OK : cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "SHA-256 failed");
}

enum cm_status cm_tpm_name(const uint8_t *public_bytes, size_t size,
                           uint8_t ret_name[static CM_TPM_NAME_BYTES], struct cm_error *err)
{
    if (size < 2 || cm_be_u16_at(public_bytes) != size - 2) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-FORM", "a TPM public area is malformed");
    }
    uint8_t digest[CM_DIGEST_BYTES];
    struct cm_be part = {(uint8_t *)public_bytes + 2, size - 2, size - 2, false};
    enum cm_status status = cm_tpm_hash(digest, err, &part, NULL);
    if (status == CM_OK) {
        ret_name[0] = 0;
        ret_name[1] = CM_TPM_ALG_SHA256;
        memcpy(ret_name + 2, digest, sizeof(digest));
    }
    return status;
}

/* Skip a TPM2B; false past the end. */
static bool sized_skip(const uint8_t *bytes, size_t size, size_t *at)
{
    if (size - *at < 2 || cm_be_u16_at(bytes + *at) > size - *at - 2) {
        return false;
    }
    *at += 2u + cm_be_u16_at(bytes + *at);
    return true;
}

bool cm_tpm_ecc_public(const uint8_t *bytes, size_t size, uint32_t *ret_attributes,
                       uint8_t ret_point[static CM_PUBLIC_KEY_BYTES])
{
    if (size < 12 || cm_be_u16_at(bytes) != size - 2 || cm_be_u16_at(bytes + 2) != CM_TPM_ALG_ECC ||
        cm_be_u16_at(bytes + 4) != CM_TPM_ALG_SHA256) {
        return false;
    }
    size_t at = 10;
    if (!sized_skip(bytes, size, &at) || size - at < 2) {
        return false;
    }
    at += cm_be_u16_at(bytes + at) == CM_TPM_ALG_NULL ? 2 : 6; /* symmetric: alg [bits mode] */
    if (size < at || size - at < 2) {
        return false;
    }
    at += cm_be_u16_at(bytes + at) == CM_TPM_ALG_NULL ? 2 : 4; /* scheme: alg [hash] */
    if (size < at || size - at < 4 + 68 || cm_be_u16_at(bytes + at) != CM_TPM_ECC_P256 ||
        cm_be_u16_at(bytes + at + 2) != CM_TPM_ALG_NULL || cm_be_u16_at(bytes + at + 4) != 32 ||
        cm_be_u16_at(bytes + at + 38) != 32 || size - at != 4 + 68) {
        return false;
    }
    *ret_attributes = (uint32_t)cm_be_u16_at(bytes + 6) << 16 | cm_be_u16_at(bytes + 8);
    ret_point[0] = 4;
    memcpy(ret_point + 1, bytes + at + 6, 32);
    memcpy(ret_point + 33, bytes + at + 40, 32);
    return true;
}

void cm_tpm_authority_public(const uint8_t point[static CM_PUBLIC_KEY_BYTES], struct cm_be *be)
{
    uint8_t area[128];
    struct cm_be body = {area, sizeof(area), 0, false};
    cm_be_u16(&body, CM_TPM_ALG_ECC);
    cm_be_u16(&body, CM_TPM_ALG_SHA256);
    cm_be_u32(&body, CM_TPMA_SIGN | CM_TPMA_USER_WITH_AUTH);
    cm_be_u16(&body, 0); /* no policy */
    cm_be_u16(&body, CM_TPM_ALG_NULL);
    cm_be_u16(&body, CM_TPM_ALG_ECDSA);
    cm_be_u16(&body, CM_TPM_ALG_SHA256);
    cm_be_u16(&body, CM_TPM_ECC_P256);
    cm_be_u16(&body, CM_TPM_ALG_NULL);
    cm_be_sized(&body, point + 1, 32);
    cm_be_sized(&body, point + 33, 32);
    cm_be_sized(be, area, body.used);
}

bool cm_tpm_signature_good(const uint8_t point[static CM_PUBLIC_KEY_BYTES],
                           const uint8_t digest[static CM_DIGEST_BYTES],
                           const uint8_t signature[static 64])
{
    uint8_t der[80], *at = der;
    EVP_PKEY *key = NULL;
    EVP_PKEY_CTX *check = NULL, *maker = EVP_PKEY_CTX_new_from_name(NULL, "EC", NULL);
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_PKEY_PARAM_GROUP_NAME, (char *)"P-256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_PKEY_PARAM_PUB_KEY, (void *)point,
                                          CM_PUBLIC_KEY_BYTES),
        OSSL_PARAM_construct_end()};
    ECDSA_SIG *pair = ECDSA_SIG_new();
    BIGNUM *r = BN_bin2bn(signature, 32, NULL), *s = BN_bin2bn(signature + 32, 32, NULL);
    bool ok = pair != NULL && r != NULL && s != NULL && ECDSA_SIG_set0(pair, r, s) == 1;
    if (!ok) {
        BN_free(r);
        BN_free(s);
    }
    int size = ok ? i2d_ECDSA_SIG(pair, &at) : 0;
    ok = size > 0 && maker != NULL && EVP_PKEY_fromdata_init(maker) == 1 &&
         EVP_PKEY_fromdata(maker, &key, EVP_PKEY_PUBLIC_KEY, params) == 1 &&
         (check = EVP_PKEY_CTX_new(key, NULL)) != NULL && EVP_PKEY_verify_init(check) == 1 &&
         EVP_PKEY_verify(check, der, (size_t)size, digest, CM_DIGEST_BYTES) == 1;
    ECDSA_SIG_free(pair);
    EVP_PKEY_CTX_free(check);
    EVP_PKEY_CTX_free(maker);
    EVP_PKEY_free(key);
    return ok;
}

enum cm_status cm_tpm_counter_name(uint32_t handle, const uint8_t node[static CM_DIGEST_BYTES],
                                   uint8_t ret_name[static CM_TPM_NAME_BYTES], struct cm_error *err)
{
    uint8_t area[64];
    struct cm_be be = {area, sizeof(area), 0, false};
    cm_be_u32(&be, handle);
    cm_be_u16(&be, CM_TPM_ALG_SHA256);
    cm_be_u32(&be, CM_TPM_COUNTER_ATTRIBUTES | CM_TPM_NV_WRITTEN);
    cm_be_sized(&be, node, CM_DIGEST_BYTES);
    cm_be_u16(&be, 8);
    ret_name[0] = 0;
    ret_name[1] = CM_TPM_ALG_SHA256;
    return cm_tpm_hash(ret_name + 2, err, &be, NULL);
}
