/* The trust file, line by line. */
#include "loader/evidence/trust.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/base/hex.h"

#define LINE_BYTES 4608 /* base64 of the longest certificate, and its key */
#define WORDS_MAX  5

struct line {
    char text[LINE_BYTES];
    char *words[WORDS_MAX];
    int count;
};

static bool hex_read(const char *text, uint8_t *ret_bytes, size_t size)
{
    return cm_hex_read(text, strlen(text), ret_bytes, size);
}

/* Each reader: NULL, or what was expected. */
static const char *node_read(struct cm_trust *trust, const struct line *line)
{
    if (trust->node_count == CM_TRUST_NODES_MAX || line->count != 4 ||
        strcmp(line->words[2], "ak") != 0 ||
        !hex_read(line->words[1], trust->nodes[trust->node_count].ek, CM_DIGEST_BYTES) ||
        !hex_read(line->words[3], trust->nodes[trust->node_count].ak, CM_DIGEST_BYTES)) {
        return "node EK ak AK, digests of 64 hex digits, at most 64 lines";
    }
    trust->node_count++;
    return NULL;
}

static const char *ak_read(struct cm_trust *trust, const struct line *line)
{
    if (trust->ak_count == CM_TRUST_NODES_MAX || line->count != 2 ||
        !hex_read(line->words[1], trust->aks[trust->ak_count], CM_DIGEST_BYTES)) {
        return "ak and a digest of 64 hex digits, at most 64 lines";
    }
    trust->ak_count++;
    return NULL;
}

static const char *ek_authority_read(struct cm_trust *trust, const struct line *line)
{
    struct cm_ek_authorities *authorities = &trust->ek_authorities;
    uint8_t der[LINE_BYTES]; /* EVP_DecodeBlock writes up to three bytes more than it means */
    size_t text = line->count == 2 ? strlen(line->words[1]) : 0;
    int size = text > 0 ? EVP_DecodeBlock(der, (const uint8_t *)line->words[1], (int)text) : -1;
    for (size_t i = text; size > 0 && i > 0 && text - i < 2 && line->words[1][i - 1] == '='; i--) {
        size--;
    }
    if (authorities->count == CM_EK_AUTHORITIES_MAX || size <= 0 ||
        size > (int)CM_EK_CERTIFICATE_MAX) {
        return "ek-authority and an X.509 certificate as base64 of its DER, at most 8 lines";
    }
    memcpy(authorities->rows[authorities->count].der, der, (size_t)size);
    authorities->rows[authorities->count++].bytes = (uint32_t)size;
    return NULL;
}

static const char *owner_read(struct cm_trust *trust, const struct line *line)
{
    if (trust->owner_count == CM_TRUST_OWNERS_MAX || line->count != 2 ||
        !hex_read(line->words[1], trust->owners[trust->owner_count], CM_PUBLIC_KEY_BYTES)) {
        return "owner and a P-256 point of 130 hex digits, at most 8 lines";
    }
    trust->owner_count++;
    return NULL;
}

static const char *package_read(struct cm_trust *trust, const struct line *line)
{
    if (trust->package_count == CM_TRUST_PACKAGES_MAX || line->count != 2 ||
        !hex_read(line->words[1], trust->packages[trust->package_count], CM_DIGEST_BYTES)) {
        return "package and a core digest of 64 hex digits, at most 64 lines";
    }
    trust->package_count++;
    return NULL;
}

static const char *adapter_read(struct cm_trust *trust, const struct line *line)
{
    bool none = line->count == 2 && strcmp(line->words[1], "none") == 0;
    if (!none &&
        (trust->adapter_count == CM_TRUST_ADAPTERS_MAX || line->count != 2 ||
         !hex_read(line->words[1], trust->adapters[trust->adapter_count], CM_DIGEST_BYTES))) {
        return "adapter none, or adapter and a core digest of 64 hex digits, at most 64 lines";
    }
    trust->adapter_count += !none;
    trust->adapters_judged = true;
    return NULL;
}

static const char *adapter_owner_read(struct cm_trust *trust, const struct line *line)
{
    if (trust->adapter_owner_count == CM_TRUST_OWNERS_MAX || line->count != 2 ||
        !hex_read(line->words[1], trust->adapter_owners[trust->adapter_owner_count],
                  CM_PUBLIC_KEY_BYTES)) {
        return "adapter-owner and a P-256 point of 130 hex digits, at most 8 lines";
    }
    trust->adapter_owner_count++;
    trust->adapters_judged = true;
    return NULL;
}

static const char *pcr_read(struct cm_trust *trust, const struct line *line)
{
    char *end = NULL;
    unsigned long pcr = line->count == 3 ? strtoul(line->words[1], &end, 10) : 99;
    if (trust->pcr_count == CM_TRUST_PCRS_MAX || pcr > 23 || end == line->words[1] ||
        *end != '\0' ||
        !hex_read(line->words[2], trust->pcrs[trust->pcr_count].value, CM_DIGEST_BYTES)) {
        return "pcr N VALUE, N 0 to 23, 64 hex digits, at most 128 lines";
    }
    trust->pcrs[trust->pcr_count++].pcr = (uint32_t)pcr;
    return NULL;
}

static const char *development_read(struct cm_trust *trust, const struct line *line)
{
    if (line->count != 2 || strcmp(line->words[1], "allowed") != 0) {
        return "development allowed";
    }
    trust->development = true;
    return NULL;
}

static const struct {
    const char *key;
    const char *(*read)(struct cm_trust *trust, const struct line *line);
} keys[] = {{"node", node_read},
            {"ak", ak_read},
            {"ek-authority", ek_authority_read},
            {"owner", owner_read},
            {"package", package_read},
            {"adapter", adapter_read},
            {"adapter-owner", adapter_owner_read},
            {"pcr", pcr_read},
            {"development", development_read}};

static const char *line_read(struct cm_trust *trust, struct line *line)
{
    char *rest = NULL;
    line->count = 0;
    line->text[strcspn(line->text, "#")] = '\0';
    for (char *word = strtok_r(line->text, " \t\r", &rest); word != NULL;
         word = strtok_r(NULL, " \t\r", &rest)) {
        if (line->count == WORDS_MAX) {
            return "fewer words";
        }
        line->words[line->count++] = word;
    }
    for (size_t i = 0; line->count > 0 && i < sizeof(keys) / sizeof(keys[0]); i++) {
        if (strcmp(line->words[0], keys[i].key) == 0) {
            return keys[i].read(trust, line);
        }
    }
    return line->count == 0
               ? NULL
               : "one of node, ak, ek-authority, owner, package, adapter, adapter-owner, "
                 "pcr, development";
}

enum cm_status cm_trust_parse(const char *text, size_t size, const char *name,
                              struct cm_trust *ret_trust, struct cm_error *err)
{
    struct line line;
    size_t at = 0;
    memset(ret_trust, 0, sizeof(*ret_trust));
    for (unsigned number = 1; at < size; number++) {
        const char *end = memchr(text + at, '\n', size - at);
        size_t bytes = end != NULL ? (size_t)(end - text) - at : size - at;
        const char *expected = "a line of at most 4607 bytes without NUL";
        if (bytes < sizeof(line.text) && memchr(text + at, '\0', bytes) == NULL) {
            memcpy(line.text, text + at, bytes);
            line.text[bytes] = '\0';
            expected = line_read(ret_trust, &line);
        }
        if (expected != NULL) {
            return cm_error_set(err, CM_E_CONFIG, "CM-TRUST-LINE", "%s:%u: expected %s", name,
                                number, expected);
        }
        at += bytes + 1;
    }
    bool whole = ret_trust->node_count + ret_trust->ak_count > 0 && ret_trust->owner_count > 0 &&
                 ret_trust->pcr_count > 0;
    if (!whole || (ret_trust->ak_count > 0) != (ret_trust->ek_authorities.count > 0)) {
        return cm_error_set(err, CM_E_CONFIG, "CM-TRUST-LINE",
                            "%s: needs at least one node (or ak with ek-authority), one owner and "
                            "one pcr: `casemate-pack trust` writes them",
                            name);
    }
    return CM_OK;
}
