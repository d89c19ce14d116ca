/* PEM public key → P-256 point, by hand: the supervisor links no OpenSSL. A P-256
 * SubjectPublicKeyInfo in DER has one form of 91 bytes (RFC 5480, uncompressed point): a constant
 * prefix and the point. */
#include "policies/config/config.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define DER_BYTES 91u
#define PEM_BYTES 4096u

static const uint8_t prefix[DER_BYTES - CM_PUBLIC_KEY_BYTES] = {
    0x30, 0x59,                                                 /* SEQUENCE, 89 bytes */
    0x30, 0x13,                                                 /* AlgorithmIdentifier */
    0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,       /* id-ecPublicKey */
    0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, /* prime256v1 */
    0x03, 0x42, 0x00};                                          /* BIT STRING, 66 bytes */

static int base64_value(char c)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c != '\0' ? strchr(digits, c) : NULL;
    return at != NULL ? (int)(at - digits) : -1;
}

/* The 91 bytes between the markers; false if they are not exactly that. 91 = 30 * 3 + 1, so the
 * text ends in two digits and "==", and the last digit's low four bits are zero. */
static bool der_decode(const char *text, size_t bytes, uint8_t ret_der[static DER_BYTES])
{
    uint32_t bits = 0;
    uint32_t held = 0;
    size_t used = 0;
    size_t pads = 0;
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] == '\n' || text[i] == '\r') {
            continue;
        }
        if (text[i] == '=') {
            pads++;
            continue;
        }
        int value = base64_value(text[i]);
        if (value < 0 || pads != 0) {
            return false;
        }
        bits = (bits << 6 | (uint32_t)value) & 0xffffff;
        held += 6;
        if (held >= 8) {
            held -= 8;
            if (used == DER_BYTES) {
                return false;
            }
            ret_der[used++] = (uint8_t)(bits >> held);
        }
    }
    return used == DER_BYTES && pads == 2 && held == 4 && (bits & 15) == 0;
}

enum cm_status cm_config_point_parse(const char *pem, size_t bytes,
                                     uint8_t ret_point[static CM_PUBLIC_KEY_BYTES],
                                     struct cm_error *err)
{
    static const char begin[] = "-----BEGIN PUBLIC KEY-----";
    static const char end[] = "-----END PUBLIC KEY-----";
    uint8_t der[DER_BYTES];
    const char *first = memmem(pem, bytes, begin, sizeof(begin) - 1);
    const char *last = memmem(pem, bytes, end, sizeof(end) - 1);
    if (memmem(pem, bytes, "PRIVATE KEY", 11) != NULL) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-PRIVATE",
                            "a private key lies here: a node needs the public key only "
                            "(openssl pkey -in KEY -pubout); move the private one away");
    }
    if (first == NULL || last == NULL || last < first + sizeof(begin) - 1) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-PEM",
                            "expected a PEM block \"PUBLIC KEY\"");
    }
    first += sizeof(begin) - 1;
    if (!der_decode(first, (size_t)(last - first), der) ||
        memcmp(der, prefix, sizeof(prefix)) != 0 || der[sizeof(prefix)] != 4) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-KEY",
                            "expected an uncompressed P-256 public key of 91 bytes in base64");
    }
    memcpy(ret_point, der + sizeof(prefix), CM_PUBLIC_KEY_BYTES);
    return CM_OK;
}

/* A small file of public keys, whole. */
static enum cm_status pem_read(const char *path, char ret_pem[static PEM_BYTES], size_t *ret_bytes,
                               struct cm_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-KEY", "cannot open public key %s: %s",
                            path, strerrordesc_np(errno));
    }
    ssize_t got = read(fd, ret_pem, PEM_BYTES);
    close(fd);
    if (got < 0 || (size_t)got == PEM_BYTES) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-KEY",
                            "public key %s: cannot be read, or is longer than 4 KiB", path);
    }
    *ret_bytes = (size_t)got;
    return CM_OK;
}

enum cm_status cm_config_point_read(const char *path, uint8_t ret_point[static CM_PUBLIC_KEY_BYTES],
                                    struct cm_error *err)
{
    char pem[PEM_BYTES];
    size_t bytes = 0;
    struct cm_error cause;
    enum cm_status status = pem_read(path, pem, &bytes, err);
    if (status == CM_OK) {
        status = cm_config_point_parse(pem, bytes, ret_point, &cause);
        if (status != CM_OK) {
            (void)cm_error_set(err, status, cause.id, "public key %s: %s", path, cause.text);
        }
    }
    return status;
}

/* Keys one after the other; two make an owner. */
static enum cm_status owners_parse(const char *pem, size_t bytes, struct cm_adapter_owners *owners,
                                   struct cm_error *err)
{
    static const char end[] = "-----END PUBLIC KEY-----";
    uint32_t keys = 0;
    for (size_t at = 0; at < bytes;) {
        const char *last = memmem(pem + at, bytes - at, end, sizeof(end) - 1);
        if (last == NULL) {
            break;
        }
        size_t next = (size_t)(last - pem) + sizeof(end) - 1;
        if (keys == 2 * CM_ADAPTER_OWNERS_MAX) {
            return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-OWNERS", "more than %u owners",
                                CM_ADAPTER_OWNERS_MAX);
        }
        struct cm_adapter_owner *owner = &owners->each[keys / 2];
        enum cm_status status = cm_config_point_parse(
            pem + at, next - at, keys % 2 == 0 ? owner->package : owner->policy, err);
        if (status != CM_OK) {
            return status;
        }
        keys++;
        at = next;
    }
    if (keys == 0 || keys % 2 != 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-OWNERS",
                            "%u public keys: expected two for each owner, who signs packages and "
                            "then who signs states (cat owner.pub policy.pub)",
                            keys);
    }
    owners->count = keys / 2;
    return CM_OK;
}

enum cm_status cm_config_owners_read(const struct cm_configuration *configuration,
                                     struct cm_adapter_owners *ret_owners, struct cm_error *err)
{
    char pem[PEM_BYTES];
    size_t bytes = 0;
    struct cm_error cause;
    const char *path = configuration->adapter_owners;
    memset(ret_owners, 0, sizeof(*ret_owners));
    if (configuration->adapters_max == 0) {
        return CM_OK;
    }
    if (path[0] == '\0') {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-MISSING",
                            "sealed: adapters_max is %llu, and adapter_owners is missing: whose?",
                            (unsigned long long)configuration->adapters_max);
    }
    enum cm_status status = pem_read(path, pem, &bytes, err);
    if (status == CM_OK) {
        status = owners_parse(pem, bytes, ret_owners, &cause);
        if (status != CM_OK) {
            (void)cm_error_set(err, status, cause.id, "adapter_owners %s: %s", path, cause.text);
        }
    }
    return status;
}
