/* Endorsement-key certificates: X.509 by OpenSSL, under authorities that the caller believes. */
#include "loader/tpm/internal.h"

#include <openssl/core_names.h>
#include <openssl/objects.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <string.h>

/* tcg-kp-EKCertificate; TCG EK Credential Profile, section 3.2.16. */
#define EK_PURPOSE "2.23.133.8.1"

static X509 *certificate_read(const uint8_t *der, uint32_t size)
{
    const uint8_t *at = der;
    X509 *certificate = size > 0 ? d2i_X509(NULL, &at, (long)size) : NULL;
    if (certificate != NULL && at != der + size) {
        X509_free(certificate); /* bytes follow */
        return NULL;
    }
    return certificate;
}

/* The certified key is the enrolled one: the same P-256 point. */
static bool key_same(X509 *certificate, const struct cm_enrolment *enrolment)
{
    EVP_PKEY *key = X509_get0_pubkey(certificate);
    uint8_t enrolled[CM_PUBLIC_KEY_BYTES], certified[CM_PUBLIC_KEY_BYTES];
    char group[32] = "";
    uint32_t attributes;
    size_t used = 0;
    return key != NULL &&
           cm_tpm_ecc_public(enrolment->ek_public, enrolment->ek_public_bytes, &attributes,
                             enrolled) &&
           EVP_PKEY_get_group_name(key, group, sizeof(group), &used) == 1 &&
           strcmp(group, "prime256v1") == 0 &&
           EVP_PKEY_get_octet_string_param(key, OSSL_PKEY_PARAM_PUB_KEY, certified,
                                           sizeof(certified), &used) == 1 &&
           used == sizeof(certified) && memcmp(certified, enrolled, sizeof(enrolled)) == 0;
}

/* It is no authority, and where it says what it is for, it says: an endorsement key. */
static bool purpose_good(X509 *certificate)
{
    EXTENDED_KEY_USAGE *usage = X509_get_ext_d2i(certificate, NID_ext_key_usage, NULL, NULL);
    ASN1_OBJECT *wanted = OBJ_txt2obj(EK_PURPOSE, 1);
    bool found = usage == NULL;
    for (int i = 0; usage != NULL && wanted != NULL && i < sk_ASN1_OBJECT_num(usage); i++) {
        found = found || OBJ_cmp(sk_ASN1_OBJECT_value(usage, i), wanted) == 0;
    }
    EXTENDED_KEY_USAGE_free(usage);
    ASN1_OBJECT_free(wanted);
    return found && X509_check_ca(certificate) == 0;
}

static X509_STORE *store_make(const struct cm_ek_authorities *authorities)
{
    X509_STORE *store = X509_STORE_new();
    bool good = store != NULL;
    for (uint32_t i = 0; good && i < authorities->count; i++) {
        X509 *authority = certificate_read(authorities->rows[i].der, authorities->rows[i].bytes);
        good = authority != NULL && X509_STORE_add_cert(store, authority) == 1;
        X509_free(authority);
    }
    if (!good) {
        X509_STORE_free(store);
        return NULL;
    }
    return store;
}

/* X509_V_OK or the first thing that is wrong; no purpose of OpenSSL's own fits an EK. */
static int chain_check(X509 *certificate, X509_STORE *store, uint64_t now_unix_s)
{
    int result = X509_V_ERR_OUT_OF_MEM;
    X509_STORE_CTX *context = X509_STORE_CTX_new();
    if (context != NULL && X509_STORE_CTX_init(context, store, certificate, NULL) == 1) {
        X509_VERIFY_PARAM *parameters = X509_STORE_CTX_get0_param(context);
        X509_VERIFY_PARAM_set_time(parameters, (time_t)now_unix_s);
        X509_VERIFY_PARAM_set_flags(parameters, X509_V_FLAG_PARTIAL_CHAIN);
        X509_VERIFY_PARAM_set_depth(parameters, (int)CM_EK_AUTHORITIES_MAX);
        X509_VERIFY_PARAM_set_auth_level(parameters, 1); /* no SHA-1, no RSA below 1024 bits */
        result = X509_verify_cert(context) == 1 ? X509_V_OK : X509_STORE_CTX_get_error(context);
    }
    X509_STORE_CTX_free(context);
    return result;
}

static enum cm_status chain_refuse(int result, const char *node, struct cm_error *err)
{
    switch (result) {
    case X509_V_OK:
        return CM_OK;
    case X509_V_ERR_CERT_HAS_EXPIRED:
    case X509_V_ERR_CERT_NOT_YET_VALID:
        return cm_error_set(err, CM_E_POLICY, "CM-EK-EXPIRED",
                            "node %s: the endorsement key's certificate, or one above it, is not "
                            "valid at this time (%s): set the clock right, or pin the key",
                            node, X509_verify_cert_error_string(result));
    default:
        return cm_error_set(err, CM_E_POLICY, "CM-EK-CHAIN",
                            "node %s: no believed authority vouches for its endorsement key (%s): "
                            "it is no TPM of these makers, or an authority between is missing",
                            node, X509_verify_cert_error_string(result));
    }
}

enum cm_status cm_ek_certificate_check(const struct cm_enrolment *enrolment,
                                       const struct cm_ek_authorities *authorities,
                                       uint64_t now_unix_s, struct cm_error *err)
{
    const char *node = enrolment->node_name;
    enum cm_status status = CM_OK;
    if (enrolment->ek_certificate_bytes == 0) {
        return cm_error_set(err, CM_E_POLICY, "CM-EK-ABSENT",
                            "node %s: its TPM holds no certificate of its P-256 endorsement key: "
                            "pin the key instead, after you have enrolled it in person",
                            node);
    }
    X509 *certificate =
        certificate_read(enrolment->ek_certificate, enrolment->ek_certificate_bytes);
    X509_STORE *store = store_make(authorities);
    if (certificate == NULL) {
        status =
            cm_error_set(err, CM_E_POLICY, "CM-EK-FORM",
                         "node %s: what its TPM holds as certificate is no X.509 in DER", node);
    } else if (store == NULL) {
        status = cm_error_set(err, CM_E_CONFIG, "CM-EK-FORM",
                              "a believed authority is no X.509 certificate");
    } else if (!key_same(certificate, enrolment)) {
        status = cm_error_set(err, CM_E_POLICY, "CM-EK-KEY",
                              "node %s: the certificate is of another endorsement key than the "
                              "enrolled one: it was taken from another TPM",
                              node);
    } else if (!purpose_good(certificate)) {
        status = cm_error_set(err, CM_E_POLICY, "CM-EK-PURPOSE",
                              "node %s: the certificate is not one of an endorsement key", node);
    } else {
        status = chain_refuse(chain_check(certificate, store, now_unix_s), node, err);
    }
    X509_STORE_free(store);
    X509_free(certificate);
    return status;
}
