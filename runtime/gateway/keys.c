/* The table of API keys, and the check. */
#include "runtime/gateway/keys.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#define SCHEME "Bearer "

void cm_keys_free(struct cm_keys *keys)
{
    free(keys->rows);
    *keys = (struct cm_keys){0};
}

/* Names go into logs and metrics as they are: terminated, printable, no quote or backslash. */
static bool name_sound(const char name[static sizeof(((struct cm_api_key *)0)->name)])
{
    size_t size = strnlen(name, sizeof(((struct cm_api_key *)0)->name));
    if (size == sizeof(((struct cm_api_key *)0)->name)) {
        return false;
    }
    for (size_t i = 0; i < size; i++) {
        if (name[i] < 0x20 || name[i] == 0x7f || name[i] == '"' || name[i] == '\\') {
            return false;
        }
    }
    return true;
}

static bool grants_sound(const struct cm_api_key *row)
{
    if (row->adapter_count == CM_API_KEY_EVERY_ADAPTER) {
        return true;
    }
    for (uint32_t i = 0; i < row->adapter_count && i < CM_ADAPTERS_MAX; i++) {
        if (!cm_name_valid(row->adapters[i])) {
            return false;
        }
    }
    return row->adapter_count <= CM_ADAPTERS_MAX;
}

static const char *rows_refusal(const struct cm_api_key *rows, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if (!name_sound(rows[i].name)) {
            return "a name is malformed";
        }
        if (!grants_sound(&rows[i])) {
            return "a grant is malformed";
        }
        if (i > 0 && memcmp(rows[i - 1].id, rows[i].id, sizeof(rows[i].id)) >= 0) {
            return "rows are not in order";
        }
    }
    return NULL;
}

static enum cm_status rows_read(int fd, struct cm_api_key *rows, size_t bytes, struct cm_error *err)
{
    size_t used = 0;
    while (used < bytes) {
        ssize_t got = pread(fd, (uint8_t *)rows + used, bytes - used, (off_t)used);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return cm_error_errno(err, got < 0 ? errno : EIO, "CM-GW-KEYS",
                                  "cannot read the key table");
        }
        used += (size_t)got;
    }
    return CM_OK;
}

enum cm_status cm_keys_load(struct cm_keys *keys, int fd, const struct cm_keys_info *info,
                            struct cm_error *err)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
    struct stat facts;
    struct cm_api_key *rows = NULL;
    uint64_t generation = keys->generation;
    size_t bytes = (size_t)info->count * sizeof(*rows);
    int held = fcntl(fd, F_GET_SEALS);
    enum cm_status status = CM_OK;
    cm_keys_free(keys);
    keys->generation = generation;
    if (held < 0 || (held & seals) != seals || fstat(fd, &facts) != 0 ||
        info->count > CM_API_KEYS_MAX || facts.st_size < 0 || (size_t)facts.st_size != bytes) {
        return cm_error_set(err, CM_E_INPUT, "CM-GW-KEYS",
                            "the key table is not sealed or not %u rows long", info->count);
    }
    if (info->generation < generation) {
        return cm_error_set(err, CM_E_INPUT, "CM-GW-KEYS", "key table of an older generation");
    }
    rows = calloc((size_t)info->count + 1, sizeof(*rows)); /* one more: never of size 0 */
    CM_ASSERT(rows != NULL);
    status = rows_read(fd, rows, bytes, err);
    const char *refusal = status == CM_OK ? rows_refusal(rows, info->count) : NULL;
    if (refusal != NULL) {
        status = cm_error_set(err, CM_E_INPUT, "CM-GW-KEYS", "key table refused: %s", refusal);
    }
    if (status != CM_OK) {
        free(rows);
        return status;
    }
    *keys = (struct cm_keys){rows, info->count, info->generation, true};
    return CM_OK;
}

static int hex_digit(char byte)
{
    if (byte >= '0' && byte <= '9') {
        return byte - '0';
    }
    return byte >= 'a' && byte <= 'f' ? byte - 'a' + 10 : -1;
}

/* The lower bound by id; only ids, which are no secret, steer it. */
const struct cm_api_key *cm_keys_find(const struct cm_keys *keys, const uint8_t id[8])
{
    uint32_t low = 0;
    uint32_t high = keys->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (memcmp(keys->rows[middle].id, id, 8) < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < keys->count && memcmp(keys->rows[low].id, id, 8) == 0 ? &keys->rows[low] : NULL;
}

bool cm_keys_adapter_granted(const struct cm_api_key *key, bool every, const char *adapter)
{
    bool granted = every || (key != NULL && key->adapter_count == CM_API_KEY_EVERY_ADAPTER);
    for (uint32_t i = 0; !granted && key != NULL && i < key->adapter_count; i++) {
        granted = strcmp(key->adapters[i], adapter) == 0;
    }
    return granted;
}

/* Fills text and id with zeros where the credential has no key's shape; the rest of the check then
 * runs over those. */
static bool key_shape(struct cm_span authorization, char text[static CM_KEY_TEXT_BYTES],
                      uint8_t id[static 8])
{
    const size_t scheme = sizeof(SCHEME) - 1;
    memset(text, 0, CM_KEY_TEXT_BYTES);
    memset(id, 0, 8);
    if (authorization.size != scheme + CM_KEY_TEXT_BYTES ||
        strncasecmp(authorization.at, SCHEME, scheme) != 0) {
        return false;
    }
    const char *from = authorization.at + scheme;
    bool shaped = memcmp(from, "cm-", 3) == 0 && from[19] == '-';
    for (size_t i = 0; i < 8; i++) {
        int high = hex_digit(from[3 + 2 * i]);
        int low = hex_digit(from[4 + 2 * i]);
        shaped = shaped && high >= 0 && low >= 0;
        id[i] = (uint8_t)((high & 15) << 4 | (low & 15));
    }
    memcpy(text, from, CM_KEY_TEXT_BYTES);
    return shaped;
}

const struct cm_api_key *cm_keys_check(const struct cm_keys *keys, struct cm_span authorization,
                                       uint64_t now_unix_s)
{
    static const struct cm_api_key nobody = {.expires_unix_s = 1};
    char text[CM_KEY_TEXT_BYTES];
    uint8_t id[8];
    uint8_t hash[SHA256_DIGEST_LENGTH];
    bool shaped = key_shape(authorization, text, id);
    SHA256((const uint8_t *)text, sizeof(text), hash);
    OPENSSL_cleanse(text, sizeof(text));
    const struct cm_api_key *row = cm_keys_find(keys, id);
    const struct cm_api_key *compared = row != NULL ? row : &nobody;
    bool equal = CRYPTO_memcmp(hash, compared->hash, sizeof(hash)) == 0;
    bool alive = compared->expires_unix_s == 0 || now_unix_s < compared->expires_unix_s;
    return (shaped & equal & alive & (row != NULL)) ? row : NULL;
}

enum cm_admission cm_keys_admit(const struct cm_keys *keys, const struct cm_route *route,
                                bool metrics_open, struct cm_span authorization,
                                uint64_t now_unix_s, const struct cm_api_key **ret_key)
{
    *ret_key = NULL;
    switch (route->permission) {
    case CM_PERMISSION_OPEN:
        return CM_ADMITTED;
    case CM_PERMISSION_METRICS:
        if (metrics_open) {
            return CM_ADMITTED;
        }
        break;
    case CM_PERMISSION_KEY:
        break;
    }
    if (!keys->present) {
        return CM_KEYS_MISSING;
    }
    *ret_key = cm_keys_check(keys, authorization, now_unix_s);
    return *ret_key != NULL ? CM_ADMITTED : CM_UNAUTHORISED;
}
