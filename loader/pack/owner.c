/* Owner and policy keys over OpenSSL. */
#include "loader/pack/owner.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <openssl/core_names.h>
#include <openssl/ecdsa.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

struct cm_owner_key {
    EVP_PKEY *key;
    uint8_t point[CM_PUBLIC_KEY_BYTES];
};

static const char *const names[] = {"owner", "policy"};

static enum cm_status path_make(char ret_path[4096], const char *folder, const char *name,
                                const char *suffix, struct cm_error *err)
{
    int size = snprintf(ret_path, 4096, "%s/%s.%s", folder, name, suffix);
    return size > 0 && size < 4096
               ? CM_OK
               : cm_error_set(err, CM_E_USAGE, "CM-PACK-PATH", "path is too long: %s", folder);
}

/* One PEM file, new, with the given mode. */
static enum cm_status pem_write(const char *path, EVP_PKEY *key, bool secret, struct cm_error *err)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, secret ? 0600 : 0644);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-PACK-KEY",
                              "cannot create %s (existing keys are never overwritten)", path);
    }
    FILE *file = fdopen(fd, "w");
    bool ok = file != NULL &&
              (secret ? PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL) == 1
                      : PEM_write_PUBKEY(file, key) == 1) &&
              fflush(file) == 0 && fsync(fd) == 0;
    if (file != NULL) {
        fclose(file);
    } else {
        close(fd);
    }
    if (!ok) {
        unlink(path);
        return cm_error_set(err, CM_E_SYSTEM, "CM-PACK-KEY", "cannot write %s", path);
    }
    return CM_OK;
}

static enum cm_status pair_write(const char *folder, const char *name, struct cm_error *err)
{
    char secret_path[4096], public_path[4096];
    EVP_PKEY *key = EVP_EC_gen("P-256");
    enum cm_status status = path_make(secret_path, folder, name, "key", err);
    if (status == CM_OK) {
        status = path_make(public_path, folder, name, "pub", err);
    }
    if (status == CM_OK && key == NULL) {
        status = cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "cannot make a P-256 key");
    }
    if (status == CM_OK) {
        status = pem_write(secret_path, key, true, err);
    }
    if (status == CM_OK) {
        status = pem_write(public_path, key, false, err);
        if (status != CM_OK) {
            unlink(secret_path);
        }
    }
    EVP_PKEY_free(key);
    return status;
}

enum cm_status cm_owner_make(const char *folder, struct cm_error *err)
{
    char path[4096];
    if (mkdir(folder, 0700) != 0 && errno != EEXIST) {
        return cm_error_errno(err, errno, "CM-PACK-KEY", "cannot make folder %s", folder);
    }
    /* Refuse before anything is written. */
    for (size_t i = 0; i < 4; i++) {
        enum cm_status status = path_make(path, folder, names[i / 2], i % 2 ? "pub" : "key", err);
        if (status == CM_OK && access(path, F_OK) == 0) {
            status =
                cm_error_set(err, CM_E_USAGE, "CM-PACK-KEY",
                             "%s exists: keys are never overwritten; use another folder", path);
        }
        if (status != CM_OK) {
            return status;
        }
    }
    enum cm_status status = pair_write(folder, names[0], err);
    if (status == CM_OK) {
        status = pair_write(folder, names[1], err);
        for (size_t i = 0; status != CM_OK && i < 2; i++) {
            if (path_make(path, folder, names[0], i ? "pub" : "key", NULL) == CM_OK) {
                unlink(path);
            }
        }
    }
    return status;
}

enum cm_status cm_owner_load(const char *folder, const char *which, struct cm_owner_key **ret_key,
                             struct cm_error *err)
{
    char path[4096], group[32] = "";
    size_t used = 0;
    enum cm_status status = path_make(path, folder, which, "key", err);
    if (status != CM_OK) {
        return status;
    }
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return cm_error_errno(err, errno, "CM-PACK-KEY",
                              "cannot open %s (make keys with `casemate-pack keygen`)", path);
    }
    struct cm_owner_key *key = calloc(1, sizeof(*key));
    EVP_PKEY *pkey = PEM_read_PrivateKey(file, NULL, NULL, NULL);
    fclose(file);
    if (key == NULL || pkey == NULL ||
        EVP_PKEY_get_utf8_string_param(pkey, OSSL_PKEY_PARAM_GROUP_NAME, group, sizeof(group),
                                       &used) != 1 ||
        strcmp(group, "prime256v1") != 0 ||
        EVP_PKEY_get_octet_string_param(pkey, OSSL_PKEY_PARAM_PUB_KEY, key->point,
                                        sizeof(key->point), &used) != 1 ||
        used != CM_PUBLIC_KEY_BYTES) {
        EVP_PKEY_free(pkey);
        free(key);
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-KEY", "%s is not a P-256 private key in PEM",
                            path);
    }
    key->key = pkey;
    *ret_key = key;
    return CM_OK;
}

void cm_owner_free(struct cm_owner_key *key)
{
    if (key != NULL) {
        EVP_PKEY_free(key->key);
        free(key);
    }
}

void cm_owner_public(const struct cm_owner_key *key, uint8_t ret_point[static CM_PUBLIC_KEY_BYTES])
{
    memcpy(ret_point, key->point, CM_PUBLIC_KEY_BYTES);
}

enum cm_status cm_owner_sign(void *context, const uint8_t digest[CM_DIGEST_BYTES],
                             uint8_t ret_signature[CM_PACKAGE_SIGNATURE_BYTES],
                             struct cm_error *err)
{
    const struct cm_owner_key *key = context;
    uint8_t der[80];
    size_t der_bytes = sizeof(der);
    const uint8_t *at = der;
    EVP_PKEY_CTX *signer = EVP_PKEY_CTX_new(key->key, NULL);
    ECDSA_SIG *pair = NULL;
    bool ok = signer != NULL && EVP_PKEY_sign_init(signer) == 1 &&
              EVP_PKEY_sign(signer, der, &der_bytes, digest, CM_DIGEST_BYTES) == 1 &&
              (pair = d2i_ECDSA_SIG(NULL, &at, (long)der_bytes)) != NULL &&
              BN_bn2binpad(ECDSA_SIG_get0_r(pair), ret_signature, 32) == 32 &&
              BN_bn2binpad(ECDSA_SIG_get0_s(pair), ret_signature + 32, 32) == 32;
    ECDSA_SIG_free(pair);
    EVP_PKEY_CTX_free(signer);
    return ok ? CM_OK : cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "cannot sign");
}
