/* The measurement log: build, encode, parse, replay. */
#include "loader/tpm/measure.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loader/tpm/internal.h"
#include "runtime/base/cursor.h"

#define LOG_MARK    "CMLOG\0\0"
#define LOG_VERSION 1u

static const char *const names[CM_EVENT_TYPE_COUNT] = {
    [CM_EVENT_PROGRAM] = "program",
    [CM_EVENT_FILTERS] = "filters",
    [CM_EVENT_CONFIGURATION] = "configuration",
    [CM_EVENT_RULES] = "rules",
    [CM_EVENT_DEVICE] = "device",
    [CM_EVENT_PACKAGE] = "package",
    [CM_EVENT_TLS_KEY] = "tls-key",
    [CM_EVENT_READY] = "ready",
};

const char *cm_event_name(uint32_t type)
{
    return type >= 1 && type < CM_EVENT_TYPE_COUNT ? names[type] : "unknown";
}

static enum cm_status crypto_failed(struct cm_error *err)
{
    return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "SHA-256 failed");
}

/* NULL if an event of this type and size may follow what is there, else why not. */
static const char *event_refusal(const struct cm_measurement *m, uint32_t type, size_t bytes)
{
    uint32_t last = m->count > 0 ? m->events[m->count - 1].type : 0;
    if (type == 0 || type >= CM_EVENT_TYPE_COUNT) {
        return "unknown type";
    }
    if (type < last || (type == last && type != CM_EVENT_PROGRAM)) {
        return "out of order";
    }
    if (m->count == CM_EVENTS_MAX || bytes > CM_EVENT_BYTES_MAX) {
        return "too many or too large";
    }
    return NULL;
}

enum cm_status cm_measurement_add(struct cm_measurement *measurement, uint32_t type,
                                  const void *data, size_t bytes, struct cm_error *err)
{
    const char *refusal = event_refusal(measurement, type, bytes);
    if (refusal != NULL) {
        return cm_error_set(err, CM_E_BUG, "CM-MEASURE-ORDER", "event %u (%s, type %u): %s",
                            measurement->count, cm_event_name(type), type, refusal);
    }
    struct cm_event *event = &measurement->events[measurement->count++];
    *event = (struct cm_event){.type = type, .bytes = (uint32_t)bytes};
    if (bytes > 0) {
        memcpy(event->data, data, bytes);
    }
    return CM_OK;
}

static enum cm_status fd_digest(int fd, uint8_t ret_digest[static CM_DIGEST_BYTES],
                                struct cm_error *err)
{
    static uint8_t part[256u << 10];
    EVP_MD_CTX *hash = EVP_MD_CTX_new();
    bool ok = hash != NULL && EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1;
    off_t at = 0;
    ssize_t got = 0;
    while (ok && (got = pread(fd, part, sizeof(part), at)) > 0) {
        ok = EVP_DigestUpdate(hash, part, (size_t)got) == 1;
        at += got;
    }
    int error_number = errno;
    ok = ok && got == 0 && EVP_DigestFinal_ex(hash, ret_digest, NULL) == 1;
    EVP_MD_CTX_free(hash);
    if (got < 0) {
        return cm_error_errno(err, error_number, "CM-MEASURE-READ", "cannot read what is measured");
    }
    return ok ? CM_OK : crypto_failed(err);
}

/* As fd_digest, but a file that nobody can change is read once. */
static enum cm_status file_digest(int fd, struct cm_digest_cache *cache,
                                  uint8_t ret_digest[static CM_DIGEST_BYTES], struct cm_error *err)
{
    struct stat facts;
    int seals = fcntl(fd, F_GET_SEALS);
    bool sealed = seals >= 0 && (seals & F_SEAL_WRITE) != 0 && fstat(fd, &facts) == 0;
    for (uint32_t i = 0; sealed && i < cache->count; i++) {
        if (cache->rows[i].device == facts.st_dev && cache->rows[i].inode == facts.st_ino) {
            memcpy(ret_digest, cache->rows[i].digest, CM_DIGEST_BYTES);
            return CM_OK;
        }
    }
    enum cm_status status = fd_digest(fd, ret_digest, err);
    if (status == CM_OK && sealed && cache->count < CM_DIGEST_CACHE_MAX) {
        cache->rows[cache->count].device = facts.st_dev;
        cache->rows[cache->count].inode = facts.st_ino;
        memcpy(cache->rows[cache->count++].digest, ret_digest, CM_DIGEST_BYTES);
    }
    return status;
}

bool cm_event_file_next(const struct cm_event *event, uint32_t *at, const char **ret_name,
                        const uint8_t **ret_digest)
{
    struct cm_cursor cursor = cm_cursor_init(event->data, event->bytes);
    cm_cursor_skip(&cursor, *at);
    const char *name = (const char *)event->data + *at;
    cm_cursor_skip(&cursor, strnlen(name, cm_cursor_left(&cursor)) + 1);
    const uint8_t *digest = cm_cursor_take(&cursor, CM_DIGEST_BYTES);
    if (digest == NULL) {
        return false;
    }
    *at = (uint32_t)cursor.offset;
    *ret_name = name;
    *ret_digest = digest;
    return true;
}

enum cm_status cm_event_file_add(struct cm_event *event, const char *name, int fd,
                                 struct cm_digest_cache *cache, struct cm_error *err)
{
    uint8_t digest[CM_DIGEST_BYTES];
    struct cm_writer writer = cm_writer_init(event->data, sizeof(event->data));
    enum cm_status status = file_digest(fd, cache, digest, err);
    if (status != CM_OK) {
        return status;
    }
    writer.offset = event->bytes;
    cm_writer_bytes(&writer, name, strlen(name) + 1);
    cm_writer_bytes(&writer, digest, sizeof(digest));
    if (writer.failed) {
        return cm_error_set(err, CM_E_CONFIG, "CM-MEASURE-SIZE",
                            "'%s' needs more libraries than one event holds", name);
    }
    event->type = CM_EVENT_PROGRAM;
    event->bytes = (uint32_t)writer.offset;
    return CM_OK;
}

enum cm_status cm_event_digest(const struct cm_event *event,
                               uint8_t ret_digest[static CM_DIGEST_BYTES], struct cm_error *err)
{
    uint8_t bytes[4];
    struct cm_writer writer = cm_writer_init(bytes, sizeof(bytes));
    cm_writer_u32(&writer, event->type);
    const struct cm_be type = {bytes, sizeof(bytes), sizeof(bytes), false};
    const struct cm_be data = {(uint8_t *)event->data, event->bytes, event->bytes, false};
    return cm_tpm_hash(ret_digest, err, &type, &data);
}

enum cm_status cm_measurement_replay(const struct cm_measurement *measurement, uint32_t first,
                                     uint32_t count, uint8_t pcr[static CM_DIGEST_BYTES],
                                     struct cm_error *err)
{
    CM_ASSERT(first <= measurement->count && count <= measurement->count - first);
    enum cm_status status = CM_OK;
    for (uint32_t i = first; status == CM_OK && i < first + count; i++) {
        uint8_t digest[CM_DIGEST_BYTES];
        const struct cm_be old = {pcr, CM_DIGEST_BYTES, CM_DIGEST_BYTES, false};
        const struct cm_be event = {digest, sizeof(digest), sizeof(digest), false};
        status = cm_event_digest(&measurement->events[i], digest, err);
        if (status == CM_OK) {
            status = cm_tpm_hash(pcr, err, &old, &event);
        }
    }
    return status;
}

enum cm_status cm_measurement_encode(const struct cm_measurement *measurement, uint8_t *ret_bytes,
                                     size_t size, size_t *ret_used, struct cm_error *err)
{
    struct cm_writer writer =
        cm_writer_init(ret_bytes, size < CM_LOG_BYTES_MAX ? size : CM_LOG_BYTES_MAX);
    cm_writer_bytes(&writer, LOG_MARK, 8);
    cm_writer_u32(&writer, LOG_VERSION);
    cm_writer_u32(&writer, measurement->count);
    for (uint32_t i = 0; i < measurement->count; i++) {
        const struct cm_event *event = &measurement->events[i];
        cm_writer_u32(&writer, event->type);
        cm_writer_u32(&writer, event->bytes);
        cm_writer_bytes(&writer, event->data, event->bytes);
    }
    if (writer.failed) {
        return cm_error_set(err, CM_E_BUG, "CM-MEASURE-SIZE", "no room for the measurement log");
    }
    *ret_used = writer.offset;
    return CM_OK;
}

enum cm_status cm_measurement_parse(const uint8_t *bytes, size_t size,
                                    struct cm_measurement *ret_measurement, struct cm_error *err)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    const uint8_t *mark = cm_cursor_take(&cursor, 8);
    const char *refusal = NULL;
    if (size > CM_LOG_BYTES_MAX || mark == NULL || memcmp(mark, LOG_MARK, 8) != 0 ||
        cm_cursor_u32(&cursor) != LOG_VERSION) {
        refusal = "not a log of this version";
    }
    uint32_t count = cm_cursor_u32(&cursor);
    ret_measurement->count = 0;
    for (uint32_t i = 0; refusal == NULL && i < count; i++) {
        uint32_t type = cm_cursor_u32(&cursor);
        uint32_t data_bytes = cm_cursor_u32(&cursor);
        const uint8_t *data = cm_cursor_take(&cursor, data_bytes);
        refusal = data == NULL ? "cut" : event_refusal(ret_measurement, type, data_bytes);
        if (refusal == NULL) {
            refusal = cm_measurement_add(ret_measurement, type, data, data_bytes, err) == CM_OK
                          ? NULL
                          : "malformed";
        }
    }
    if (refusal == NULL && (!cm_cursor_ok(&cursor) || cm_cursor_left(&cursor) != 0)) {
        refusal = "cut, or followed by more";
    }
    if (refusal != NULL) {
        uint32_t event = ret_measurement->count;
        ret_measurement->count = 0;
        return cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-LOG",
                            "measurement log: event %u at offset %zu: %s", event, cursor.offset,
                            refusal);
    }
    return CM_OK;
}
