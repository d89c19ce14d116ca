/* The TLS key is made here, before any gateway exists: the process that parses the network is given
 * it, generation after generation, and cannot choose it. */
#include "runtime/keeper/keeper.h"
#include "runtime/base/cursor.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#define VALID_DAYS 90

static bool extension_add(X509 *certificate, int kind, const char *value)
{
    X509V3_CTX context;
    X509V3_set_ctx_nodb(&context);
    X509V3_set_ctx(&context, certificate, certificate, NULL, NULL, 0);
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, &context, kind, value);
    bool ok = extension != NULL && X509_add_ext(certificate, extension, -1) == 1;
    X509_EXTENSION_free(extension);
    return ok;
}

static bool name_is_address(const char *name)
{
    uint8_t bytes[16];
    return inet_pton(AF_INET, name, bytes) == 1 || inet_pton(AF_INET6, name, bytes) == 1;
}

/* "DNS:localhost,IP:127.0.0.1": names are letters, digits, '-', '.', ':' only. */
static bool alternatives_make(const char (*names)[CM_NAME_BYTES], uint32_t count, char *ret,
                              size_t size)
{
    size_t used = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (strspn(names[i], "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.:") !=
                strnlen(names[i], CM_NAME_BYTES) ||
            names[i][0] == '\0' || strnlen(names[i], CM_NAME_BYTES) == CM_NAME_BYTES) {
            return false;
        }
        int more = snprintf(ret + used, size - used, "%s%s:%s", i > 0 ? "," : "",
                            name_is_address(names[i]) ? "IP" : "DNS", names[i]);
        used += (size_t)more;
        if (used >= size) {
            return false;
        }
    }
    return true;
}

static X509 *certificate_make(EVP_PKEY *key, const char *alternatives)
{
    uint8_t serial[16];
    X509 *certificate = X509_new();
    BIGNUM *number =
        RAND_bytes(serial, sizeof(serial)) == 1 ? BN_bin2bn(serial, sizeof(serial), NULL) : NULL;
    X509_NAME *name = certificate != NULL ? X509_get_subject_name(certificate) : NULL;
    bool ok = name != NULL && number != NULL && X509_set_version(certificate, 2) == 1 &&
              BN_to_ASN1_INTEGER(number, X509_get_serialNumber(certificate)) != NULL &&
              X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const uint8_t *)"casemate", -1,
                                         -1, 0) == 1 &&
              X509_set_issuer_name(certificate, name) == 1 &&
              X509_gmtime_adj(X509_getm_notBefore(certificate), -300) != NULL &&
              X509_gmtime_adj(X509_getm_notAfter(certificate), VALID_DAYS * 86400L) != NULL &&
              X509_set_pubkey(certificate, key) == 1 &&
              extension_add(certificate, NID_basic_constraints, "critical,CA:TRUE,pathlen:0") &&
              extension_add(certificate, NID_key_usage, "critical,digitalSignature,keyCertSign") &&
              extension_add(certificate, NID_ext_key_usage, "serverAuth") &&
              extension_add(certificate, NID_subject_key_identifier, "hash") &&
              extension_add(certificate, NID_subject_alt_name, alternatives) &&
              X509_sign(certificate, key, EVP_sha256()) > 0;
    BN_free(number);
    if (!ok) {
        X509_free(certificate);
        return NULL;
    }
    return certificate;
}

/* PKCS#8 DER straight into secret memory. */
static enum cm_status key_store(EVP_PKEY *key, struct cm_secret **ret_secret, struct cm_error *err)
{
    PKCS8_PRIV_KEY_INFO *info = EVP_PKEY2PKCS8(key);
    int size = info != NULL ? i2d_PKCS8_PRIV_KEY_INFO(info, NULL) : 0;
    struct cm_secret *secret = NULL;
    enum cm_status status =
        size > 0 && (uint32_t)size <= CM_TLS_KEY_BYTES_MAX
            ? cm_secret_new((size_t)size + 4, &secret, err)
            : cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "cannot encode the TLS key");
    if (status == CM_OK) {
        uint8_t *at = cm_secret_bytes(secret);
        for (int i = 0; i < 4; i++) {
            *at++ = (uint8_t)((uint32_t)size >> (8 * i));
        }
        i2d_PKCS8_PRIV_KEY_INFO(info, &at);
        *ret_secret = secret;
    }
    PKCS8_PRIV_KEY_INFO_free(info);
    return status;
}

static bool key_digest(EVP_PKEY *key, uint8_t ret_digest[static CM_DIGEST_BYTES])
{
    uint8_t *info = NULL;
    int size = i2d_PUBKEY(key, &info);
    bool ok = size > 0 && EVP_Digest(info, (size_t)size, ret_digest, NULL, EVP_sha256(), NULL) == 1;
    OPENSSL_free(info);
    return ok;
}

enum cm_status cm_tls_identity_make(const char (*names)[CM_NAME_BYTES], uint32_t count,
                                    struct cm_tls_identity *ret_identity, struct cm_error *err)
{
    static const char defaults[3][CM_NAME_BYTES] = {"localhost", "127.0.0.1", "::1"};
    char alternatives[1024];
    struct cm_tls_identity identity = {.key = NULL};
    if (count == 0) {
        names = defaults;
        count = 3;
    }
    if (!alternatives_make(names, count, alternatives, sizeof(alternatives))) {
        return cm_error_set(err, CM_E_CONFIG, "CM-KEEPER-NAMES",
                            "site: tls_names holds something that is no DNS name and no address");
    }
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = key != NULL ? certificate_make(key, alternatives) : NULL;
    uint8_t *at = identity.certificate;
    int size = certificate != NULL ? i2d_X509(certificate, NULL) : 0;
    enum cm_status status = CM_OK;
    if (size <= 0 || (uint32_t)size > CM_CERTIFICATE_BYTES_MAX) {
        status = cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "cannot make the TLS certificate");
    } else {
        identity.certificate_bytes = (uint32_t)i2d_X509(certificate, &at);
        status = key_digest(key, identity.key_digest)
                     ? key_store(key, &identity.key, err)
                     : cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "cannot digest the TLS key");
    }
    X509_free(certificate);
    EVP_PKEY_free(key);
    if (status == CM_OK) {
        *ret_identity = identity;
    }
    return status;
}

enum cm_status cm_tls_identity_take(const uint8_t page[static CM_KEY_PAGE_BYTES],
                                    const struct cm_tls_page *certificate,
                                    struct cm_tls_identity *ret_identity, struct cm_error *err)
{
    struct cm_tls_identity identity = {.certificate_bytes = certificate->certificate_bytes};
    struct cm_cursor cursor = cm_cursor_init(page, CM_KEY_PAGE_BYTES);
    uint32_t size = cm_cursor_u32(&cursor);
    const uint8_t *at = certificate->certificate;
    X509 *parsed = identity.certificate_bytes <= sizeof(identity.certificate)
                       ? d2i_X509(NULL, &at, (long)identity.certificate_bytes)
                       : NULL;
    EVP_PKEY *public_key = parsed != NULL ? X509_get0_pubkey(parsed) : NULL;
    bool sound = public_key != NULL && size > 0 && size <= CM_TLS_KEY_BYTES_MAX &&
                 key_digest(public_key, identity.key_digest);
    X509_free(parsed);
    enum cm_status status =
        sound ? cm_secret_new(size + sizeof(size), &identity.key, err)
              : cm_error_set(err, CM_E_INPUT, "CM-KEEPER-TLS",
                             "the earlier keeper's TLS identity is malformed: start the service "
                             "again for a fresh one");
    if (status == CM_OK) {
        memcpy(identity.certificate, certificate->certificate, identity.certificate_bytes);
        memcpy(cm_secret_bytes(identity.key), page, cm_secret_size(identity.key));
        *ret_identity = identity;
    }
    return status;
}
