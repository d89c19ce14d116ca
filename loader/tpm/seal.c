/* Sealing without a TPM: an object that only one TPM can import, under a policy; and a challenge
 * that only one TPM can answer.
 *
 * Method: TPM 2.0 Library Part 1, "Duplication" (23.3), "Credential Protection" (24), KDFe and KDFa
 * (11.4.10), ECDH secret sharing (C.6.1). */
#include "loader/tpm/internal.h"

#include <string.h>

#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/rand.h>

#include "runtime/base/secret.h"

#define SEED_BYTES        32u
#define WRAPPED_BYTES_MAX 112u

static enum cm_status crypto_failed(struct cm_error *err, const char *what)
{
    return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "sealing: %s failed", what);
}

static bool hmac(const uint8_t *key, size_t key_size, const struct cm_be *data, uint8_t ret[32])
{
    size_t used = 0;
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, (char *)"SHA256", 0),
        OSSL_PARAM_construct_end()};
    EVP_MAC *mac = EVP_MAC_fetch(NULL, "HMAC", NULL);
    EVP_MAC_CTX *context = mac != NULL ? EVP_MAC_CTX_new(mac) : NULL;
    bool ok = context != NULL && !data->failed &&
              EVP_MAC_init(context, key, key_size, params) == 1 &&
              EVP_MAC_update(context, data->bytes, data->used) == 1 &&
              EVP_MAC_final(context, ret, &used, 32) == 1 && used == 32;
    EVP_MAC_CTX_free(context);
    EVP_MAC_free(mac);
    return ok;
}

/* KDFa: HMAC(key, 1 ‖ label 0 ‖ context ‖ bits); one block is enough for up to 256 bits. */
static bool kdfa(const uint8_t seed[SEED_BYTES], const char *label, const uint8_t *context,
                 size_t context_size, uint32_t bits, uint8_t ret[32])
{
    uint8_t bytes[128];
    struct cm_be be = {bytes, sizeof(bytes), 0, false};
    cm_be_u32(&be, 1);
    cm_be_bytes(&be, label, strlen(label) + 1);
    cm_be_bytes(&be, context, context_size);
    cm_be_u32(&be, bits);
    return hmac(seed, SEED_BYTES, &be, ret);
}

/* An ephemeral P-256 key and the shared x with `peer`. */
static bool ecdh(const uint8_t peer[static CM_PUBLIC_KEY_BYTES],
                 uint8_t ret_ephemeral[static CM_PUBLIC_KEY_BYTES], uint8_t ret_x[32])
{
    size_t size = 32, used;
    EVP_PKEY *theirs = NULL, *ours = EVP_EC_gen("P-256");
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_PKEY_PARAM_GROUP_NAME, (char *)"P-256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_PKEY_PARAM_PUB_KEY, (void *)peer,
                                          CM_PUBLIC_KEY_BYTES),
        OSSL_PARAM_construct_end()};
    EVP_PKEY_CTX *maker = EVP_PKEY_CTX_new_from_name(NULL, "EC", NULL);
    EVP_PKEY_CTX *derive = ours != NULL ? EVP_PKEY_CTX_new(ours, NULL) : NULL;
    bool ok = maker != NULL && derive != NULL && EVP_PKEY_fromdata_init(maker) == 1 &&
              EVP_PKEY_fromdata(maker, &theirs, EVP_PKEY_PUBLIC_KEY, params) == 1 &&
              EVP_PKEY_derive_init(derive) == 1 && EVP_PKEY_derive_set_peer(derive, theirs) == 1 &&
              EVP_PKEY_derive(derive, ret_x, &size) == 1 && size == 32 &&
              EVP_PKEY_get_octet_string_param(ours, OSSL_PKEY_PARAM_PUB_KEY, ret_ephemeral,
                                              CM_PUBLIC_KEY_BYTES, &used) == 1 &&
              used == CM_PUBLIC_KEY_BYTES;
    EVP_PKEY_CTX_free(maker);
    EVP_PKEY_CTX_free(derive);
    EVP_PKEY_free(theirs);
    EVP_PKEY_free(ours);
    return ok;
}

/* KDFe: H(1 ‖ Z ‖ label 0 ‖ ephemeral x ‖ parent x) */
static enum cm_status seed_make(const uint8_t parent[static CM_PUBLIC_KEY_BYTES], const char *label,
                                uint8_t ret_ephemeral[static CM_PUBLIC_KEY_BYTES],
                                uint8_t ret_seed[SEED_BYTES], struct cm_error *err)
{
    uint8_t shared[32], bytes[128];
    if (!ecdh(parent, ret_ephemeral, shared)) {
        return crypto_failed(err, "ECDH");
    }
    struct cm_be be = {bytes, sizeof(bytes), 0, false};
    cm_be_u32(&be, 1);
    cm_be_bytes(&be, shared, sizeof(shared));
    cm_be_bytes(&be, label, strlen(label) + 1);
    cm_be_bytes(&be, ret_ephemeral + 1, 32);
    cm_be_bytes(&be, parent + 1, 32);
    enum cm_status status = cm_tpm_hash(ret_seed, err, &be, NULL);
    cm_wipe(shared, sizeof(shared));
    cm_wipe(bytes, sizeof(bytes));
    return status;
}

/* TPM2B_PUBLIC of the sealed object: only NODA; unique = H(obfuscation ‖ secret). */
static enum cm_status object_public(const uint8_t policy[CM_DIGEST_BYTES],
                                    const uint8_t obfuscation[32], const uint8_t *key,
                                    struct cm_be *ret, struct cm_error *err)
{
    uint8_t area[128], secret[64], unique[CM_DIGEST_BYTES];
    struct cm_be both = {secret, sizeof(secret), 0, false};
    cm_be_bytes(&both, obfuscation, 32);
    cm_be_bytes(&both, key, CM_KEY_BYTES);
    enum cm_status status = cm_tpm_hash(unique, err, &both, NULL);
    cm_wipe(secret, sizeof(secret));
    struct cm_be body = {area, sizeof(area), 0, false};
    cm_be_u16(&body, CM_TPM_ALG_KEYEDHASH);
    cm_be_u16(&body, CM_TPM_ALG_SHA256);
    cm_be_u32(&body, CM_TPMA_NO_DA);
    cm_be_sized(&body, policy, CM_DIGEST_BYTES);
    cm_be_u16(&body, CM_TPM_ALG_NULL);
    cm_be_sized(&body, unique, sizeof(unique));
    cm_be_sized(ret, area, body.used);
    return status;
}

static bool aes_cfb(const uint8_t key[16], const uint8_t *in, size_t size, uint8_t *out)
{
    const uint8_t iv[16] = {0};
    int used = 0;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    bool ok = context != NULL &&
              EVP_EncryptInit_ex(context, EVP_aes_128_cfb128(), NULL, key, iv) == 1 &&
              EVP_EncryptUpdate(context, out, &used, in, (int)size) == 1 && (size_t)used == size;
    EVP_CIPHER_CTX_free(context);
    return ok;
}

/* What goes to a TPM's key for one object's name: TPM2B_DIGEST(HMAC) ‖ AES-CFB(content). */
static enum cm_status wrap(const uint8_t seed[SEED_BYTES], const uint8_t name[CM_TPM_NAME_BYTES],
                           const struct cm_be *content, struct cm_be *ret, struct cm_error *err)
{
    uint8_t sealed[WRAPPED_BYTES_MAX + CM_TPM_NAME_BYTES], storage[32], integrity[32], tag[32];
    bool ok = !content->failed && content->used <= WRAPPED_BYTES_MAX &&
              kdfa(seed, "STORAGE", name, CM_TPM_NAME_BYTES, 128, storage) &&
              kdfa(seed, "INTEGRITY", NULL, 0, 256, integrity) &&
              aes_cfb(storage, content->bytes, content->used, sealed);
    struct cm_be covered = {sealed, sizeof(sealed), ok ? content->used : 0, false};
    cm_be_bytes(&covered, name, CM_TPM_NAME_BYTES);
    ok = ok && hmac(integrity, sizeof(integrity), &covered, tag);
    if (ok) {
        cm_be_sized(ret, tag, sizeof(tag));
        cm_be_bytes(ret, sealed, content->used);
    }
    cm_wipe(storage, sizeof(storage));
    cm_wipe(integrity, sizeof(integrity));
    return ok && !ret->failed ? CM_OK : crypto_failed(err, "the wrapping");
}

/* The duplicate: the sealed object's TPM2B_SENSITIVE, wrapped. */
static enum cm_status duplicate_make(const uint8_t seed[SEED_BYTES],
                                     const uint8_t name[CM_TPM_NAME_BYTES],
                                     const uint8_t obfuscation[32], const uint8_t *key,
                                     struct cm_be *ret, struct cm_error *err)
{
    uint8_t area[96], sensitive[WRAPPED_BYTES_MAX];
    struct cm_be body = {area, sizeof(area), 0, false};
    cm_be_u16(&body, CM_TPM_ALG_KEYEDHASH);
    cm_be_u16(&body, 0); /* no auth value: the policy is the only way */
    cm_be_sized(&body, obfuscation, 32);
    cm_be_sized(&body, key, CM_KEY_BYTES);
    struct cm_be whole = {sensitive, sizeof(sensitive), 0, false};
    cm_be_sized(&whole, area, body.used);
    enum cm_status status = wrap(seed, name, &whole, ret, err);
    cm_wipe(area, sizeof(area));
    cm_wipe(sensitive, sizeof(sensitive));
    return status;
}

/* A point as TPM2B_ENCRYPTED_SECRET's content: TPMS_ECC_POINT. */
static void point_put(const uint8_t point[static CM_PUBLIC_KEY_BYTES], struct cm_be *ret)
{
    cm_be_sized(ret, point + 1, 32);
    cm_be_sized(ret, point + 33, 32);
}

enum cm_status cm_credential_make(const struct cm_enrolment *enrolment,
                                  const uint8_t secret[static CM_DIGEST_BYTES],
                                  uint8_t ret_bytes[static CM_CREDENTIAL_BYTES_MAX],
                                  uint32_t *ret_used, struct cm_error *err)
{
    uint8_t ek[CM_PUBLIC_KEY_BYTES], ephemeral[CM_PUBLIC_KEY_BYTES], seed[SEED_BYTES] = {0};
    uint8_t name[CM_TPM_NAME_BYTES], value[CM_DIGEST_BYTES + 2], object[160], point[80];
    uint32_t attributes;
    struct cm_be content = {value, sizeof(value), 0, false};
    struct cm_be identity = {object, sizeof(object), 0, false};
    struct cm_be shared = {point, sizeof(point), 0, false};
    struct cm_be out = {ret_bytes, CM_CREDENTIAL_BYTES_MAX, 0, false};
    if (!cm_tpm_ecc_public(enrolment->ek_public, enrolment->ek_public_bytes, &attributes, ek)) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-ENROLMENT", "no usable endorsement key");
    }
    cm_be_sized(&content, secret, CM_DIGEST_BYTES);
    enum cm_status status =
        cm_tpm_name(enrolment->ak_public, enrolment->ak_public_bytes, name, err);
    if (status == CM_OK) {
        status = seed_make(ek, "IDENTITY", ephemeral, seed, err);
    }
    if (status == CM_OK) {
        status = wrap(seed, name, &content, &identity, err);
    }
    point_put(ephemeral, &shared);
    cm_be_bytes(&out, CM_CREDENTIAL_MARK, 8);
    cm_be_sized(&out, object, identity.used);
    cm_be_sized(&out, point, shared.used);
    cm_wipe(seed, sizeof(seed));
    cm_wipe(value, sizeof(value));
    if (status == CM_OK && out.failed) {
        status = cm_error_set(err, CM_E_BUG, "CM-SEAL-FORM", "no room for the challenge");
    }
    if (status == CM_OK) {
        *ret_used = (uint32_t)out.used;
    }
    return status;
}

enum cm_status cm_seal_to_node(const struct cm_enrolment *enrolment,
                               const uint8_t policy_key[static CM_PUBLIC_KEY_BYTES],
                               const char *policy_ref, const uint8_t key[static CM_KEY_BYTES],
                               uint8_t *ret_payload, size_t size, uint32_t *ret_bytes,
                               struct cm_error *err)
{
    uint8_t ek[CM_PUBLIC_KEY_BYTES], ephemeral[CM_PUBLIC_KEY_BYTES], seed[SEED_BYTES] = {0};
    uint8_t policy[CM_DIGEST_BYTES], obfuscation[32], name[CM_TPM_NAME_BYTES];
    uint8_t public[160], duplicate[192], point[80];
    uint32_t attributes;
    struct cm_be object = {public, sizeof(public), 0, false};
    struct cm_be private = {duplicate, sizeof(duplicate), 0, false};
    struct cm_be shared = {point, sizeof(point), 0, false};
    if (strlen(policy_ref) >= CM_POLICY_REF_BYTES_MAX ||
        !cm_tpm_ecc_public(enrolment->ek_public, enrolment->ek_public_bytes, &attributes, ek)) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-ENROLMENT", "no usable endorsement key");
    }
    if (RAND_priv_bytes(obfuscation, sizeof(obfuscation)) != 1) {
        return crypto_failed(err, "randomness");
    }
    enum cm_status status = cm_policy_authorize_digest(policy_key, policy_ref, policy, err);
    if (status == CM_OK) {
        status = object_public(policy, obfuscation, key, &object, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_name(public, object.used, name, err);
    }
    if (status == CM_OK) {
        status = seed_make(ek, "DUPLICATE", ephemeral, seed, err);
    }
    if (status == CM_OK) {
        status = duplicate_make(seed, name, obfuscation, key, &private, err);
    }
    point_put(ephemeral, &shared);
    struct cm_be out = {ret_payload, size, 0, false};
    cm_be_sized(&out, public, object.used);
    cm_be_sized(&out, duplicate, private.used);
    cm_be_sized(&out, point, shared.used);
    cm_be_sized(&out, policy_ref, strlen(policy_ref));
    cm_wipe(seed, sizeof(seed));
    cm_wipe(obfuscation, sizeof(obfuscation));
    if (status == CM_OK && out.failed) {
        status = cm_error_set(err, CM_E_BUG, "CM-SEAL-FORM", "no room for the sealed key");
    }
    if (status == CM_OK) {
        *ret_bytes = (uint32_t)out.used;
    }
    return status;
}

static bool part_take(const uint8_t *payload, size_t size, size_t *at, const uint8_t **ret_bytes,
                      uint16_t *ret_size)
{
    if (size - *at < 2 || cm_be_u16_at(payload + *at) > size - *at - 2) {
        return false;
    }
    *ret_size = cm_be_u16_at(payload + *at);
    *ret_bytes = payload + *at + 2;
    *at += 2u + *ret_size;
    return true;
}

bool cm_credential_parse(const uint8_t *bytes, size_t size, struct cm_credential *ret)
{
    size_t at = 8;
    return size >= at && memcmp(bytes, CM_CREDENTIAL_MARK, 8) == 0 &&
           part_take(bytes, size, &at, &ret->object, &ret->object_size) &&
           part_take(bytes, size, &at, &ret->seed, &ret->seed_size) && at == size;
}

enum cm_status cm_tpm_sealed_parse(const uint8_t *payload, size_t size,
                                   struct cm_tpm_sealed *ret_sealed, struct cm_error *err)
{
    struct cm_tpm_sealed sealed = {.public_bytes = NULL};
    const uint8_t *ref;
    uint16_t ref_size;
    size_t at = 0;
    bool ok = part_take(payload, size, &at, &sealed.public_bytes, &sealed.public_size) &&
              part_take(payload, size, &at, &sealed.duplicate, &sealed.duplicate_size) &&
              part_take(payload, size, &at, &sealed.seed, &sealed.seed_size) &&
              part_take(payload, size, &at, &ref, &ref_size) && at == size &&
              ref_size < CM_POLICY_REF_BYTES_MAX && memchr(ref, '\0', ref_size) == NULL;
    if (!ok) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-FORM",
                            "the sealed key in the package's slot is malformed");
    }
    memcpy(sealed.policy_ref, ref, ref_size);
    *ret_sealed = sealed;
    return CM_OK;
}
