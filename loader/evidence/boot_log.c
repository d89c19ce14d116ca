/* Reading and replaying the firmware's event log. */
#include "loader/evidence/boot_log.h"

#include <openssl/evp.h>
#include <string.h>

#include "runtime/base/cursor.h"

#define ALGORITHMS_MAX 8u
#define EVENT_MAX      (256u << 10)
#define PCR_NONE       0xffffffffu /* of events that are not extended */
#define PCR_MAX        23u
/* After their separator the firmware has no more to say there: code and data of the platform, and
 * of option ROMs. PCRs 1, 4, 5 and 7 go on in the boot manager. */
#define PCRS_CLOSED (1u << 0 | 1u << 2 | 1u << 3 | 1u << 6)

enum event_type {
    EV_NO_ACTION = 0x3,
    EV_SEPARATOR = 0x4,
    EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001,
    EV_EFI_ACTION = 0x80000007,
    EV_EFI_VARIABLE_AUTHORITY = 0x800000e0,
};

/* TPM_ALG_ID and the bytes of its digest (TCG Algorithm Registry). */
static const struct algorithm {
    uint16_t id, bytes;
} known[] = {{0x0004, 20}, {0x000b, 32}, {0x000c, 48}, {0x000d, 64}, {0x0012, 32}};
#define ALG_SHA256 0x000bu

struct reading {
    struct cm_cursor cursor;
    struct cm_boot_log *log;
    uint32_t algorithm_count;
    struct algorithm algorithms[ALGORITHMS_MAX];
    uint32_t separated; /* PCRs that have their separator */
    bool located;
    struct cm_error *err;
};

struct event {
    uint32_t pcr, type, bytes;
    uint8_t digest[CM_DIGEST_BYTES];
    const uint8_t *data;
};

static enum cm_status form_refuse(struct reading *r)
{
    return cm_error_set(r->err, CM_E_EVIDENCE, "CM-BOOT-FORM",
                        "the boot log is cut or malformed at offset %zu: is it the whole "
                        "binary_bios_measurements?",
                        r->cursor.offset);
}

static enum cm_status algorithms_read(struct reading *r, struct cm_cursor *id)
{
    bool sha256 = false;
    r->algorithm_count = cm_cursor_u32(id);
    if (r->algorithm_count < 1 || r->algorithm_count > ALGORITHMS_MAX) {
        return form_refuse(r);
    }
    for (uint32_t i = 0; i < r->algorithm_count; i++) {
        struct algorithm *row = &r->algorithms[i];
        row->id = cm_cursor_u16(id);
        row->bytes = cm_cursor_u16(id);
        bool good = false;
        for (size_t k = 0; k < sizeof(known) / sizeof(known[0]); k++) {
            good = good || (known[k].id == row->id && known[k].bytes == row->bytes);
        }
        for (uint32_t k = 0; k < i; k++) {
            good = good && r->algorithms[k].id != row->id;
        }
        if (!good || !cm_cursor_ok(id)) {
            return cm_error_set(
                r->err, CM_E_EVIDENCE, "CM-BOOT-ALGORITHMS",
                "the boot log's list of algorithms names 0x%04x with %u bytes, which is "
                "unknown, wrong or there twice",
                row->id, row->bytes);
        }
        sha256 = sha256 || row->id == ALG_SHA256;
    }
    return sha256 ? CM_OK
                  : cm_error_set(r->err, CM_E_EVIDENCE, "CM-BOOT-ALGORITHMS",
                                 "the boot log has no SHA-256: let the firmware extend that bank");
}

/* The first event, in the old form: it says that the others have the new one, and their digests. */
static enum cm_status header_read(struct reading *r)
{
    static const uint8_t zeros[20];
    uint32_t pcr = cm_cursor_u32(&r->cursor), type = cm_cursor_u32(&r->cursor);
    const uint8_t *digest = cm_cursor_take(&r->cursor, sizeof(zeros));
    uint32_t bytes = cm_cursor_u32(&r->cursor);
    const uint8_t *data = bytes <= EVENT_MAX ? cm_cursor_take(&r->cursor, bytes) : NULL;
    if (pcr != 0 || type != EV_NO_ACTION || digest == NULL || data == NULL ||
        memcmp(digest, zeros, sizeof(zeros)) != 0 || bytes < 28 ||
        memcmp(data, "Spec ID Event03", 16) != 0) {
        return form_refuse(r);
    }
    struct cm_cursor id = cm_cursor_init(data, bytes);
    cm_cursor_skip(&id, 16 + 4 + 4); /* mark; platform class; version, sizes */
    enum cm_status status = algorithms_read(r, &id);
    if (status == CM_OK) {
        cm_cursor_skip(&id, cm_cursor_u8(&id)); /* the vendor's */
        status = cm_cursor_ok(&id) && cm_cursor_left(&id) == 0 ? CM_OK : form_refuse(r);
    }
    return status;
}

/* A digest for each algorithm of the list, each once. */
static bool digests_read(struct reading *r, struct event *event)
{
    uint32_t count = cm_cursor_u32(&r->cursor), met = 0;
    for (uint32_t i = 0; i < count && count == r->algorithm_count; i++) {
        uint16_t id = cm_cursor_u16(&r->cursor);
        uint32_t at = 0;
        while (at < r->algorithm_count && r->algorithms[at].id != id) {
            at++;
        }
        const uint8_t *digest =
            at < r->algorithm_count ? cm_cursor_take(&r->cursor, r->algorithms[at].bytes) : NULL;
        if (digest == NULL || (met & 1u << at) != 0) {
            return false;
        }
        met |= 1u << at;
        if (id == ALG_SHA256) {
            memcpy(event->digest, digest, CM_DIGEST_BYTES);
        }
    }
    return count == r->algorithm_count;
}

/* Types whose digest is that of the event's data; what the others say of themselves proves nothing.
 */
static bool digest_covers(const struct event *event)
{
    uint8_t digest[CM_DIGEST_BYTES];
    switch (event->type) {
    case EV_SEPARATOR:
    case EV_EFI_VARIABLE_DRIVER_CONFIG:
    case EV_EFI_ACTION:
    case EV_EFI_VARIABLE_AUTHORITY:
        return EVP_Digest(event->data, event->bytes, digest, NULL, EVP_sha256(), NULL) == 1 &&
               memcmp(digest, event->digest, sizeof(digest)) == 0;
    default:
        return true;
    }
}

/* Not extended; but one says where PCR 0 began: at its own locality, before anything else. */
static enum cm_status no_action_take(struct reading *r, const struct event *event)
{
    if (event->bytes != 17 || memcmp(event->data, "StartupLocality", 16) != 0) {
        return CM_OK;
    }
    uint8_t locality = event->data[16];
    if (r->located || (r->log->seen & 1u) != 0 || event->pcr != 0 ||
        (locality != 0 && locality != 3 && locality != 4)) {
        return cm_error_set(
            r->err, CM_E_EVIDENCE, "CM-BOOT-LOCALITY",
            "the boot log names the start's locality %u twice, too late, or one that "
            "there is not",
            locality);
    }
    r->located = true;
    r->log->pcrs[0][CM_DIGEST_BYTES - 1] = locality;
    return CM_OK;
}

static enum cm_status separator_check(struct reading *r, const struct event *event)
{
    uint32_t bit = 1u << event->pcr;
    bool separator = event->type == EV_SEPARATOR && event->pcr < CM_BOOT_LOG_PCRS;
    if ((r->separated & bit) != 0 && (separator || (PCRS_CLOSED & bit) != 0)) {
        return cm_error_set(r->err, CM_E_EVIDENCE, "CM-BOOT-SEPARATOR",
                            "the boot log has an event (type 0x%x) in PCR %u after that was closed",
                            event->type, event->pcr);
    }
    r->separated |= separator ? bit : 0;
    return CM_OK;
}

static enum cm_status extend(struct reading *r, const struct event *event)
{
    struct cm_boot_log *log = r->log;
    uint8_t both[2 * CM_DIGEST_BYTES];
    log->events[log->count++] = (struct cm_boot_event){.pcr = event->pcr, .type = event->type};
    memcpy(log->events[log->count - 1].digest, event->digest, CM_DIGEST_BYTES);
    log->seen |= 1u << event->pcr;
    if (event->pcr >= CM_BOOT_LOG_PCRS) {
        return CM_OK;
    }
    memcpy(both, log->pcrs[event->pcr], CM_DIGEST_BYTES);
    memcpy(both + CM_DIGEST_BYTES, event->digest, CM_DIGEST_BYTES);
    return EVP_Digest(both, sizeof(both), log->pcrs[event->pcr], NULL, EVP_sha256(), NULL) == 1
               ? CM_OK
               : cm_error_set(r->err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "SHA-256 failed");
}

static enum cm_status event_read(struct reading *r)
{
    struct event event = {.pcr = cm_cursor_u32(&r->cursor), .type = cm_cursor_u32(&r->cursor)};
    bool good = digests_read(r, &event);
    event.bytes = cm_cursor_u32(&r->cursor);
    event.data = event.bytes <= EVENT_MAX ? cm_cursor_take(&r->cursor, event.bytes) : NULL;
    bool placed = event.pcr <= PCR_MAX || (event.type == EV_NO_ACTION && event.pcr == PCR_NONE);
    if (!good || !placed || !cm_cursor_ok(&r->cursor) || (event.data == NULL && event.bytes > 0) ||
        r->log->count == CM_BOOT_LOG_EVENTS_MAX) {
        return form_refuse(r);
    }
    if (event.type == EV_NO_ACTION) {
        return no_action_take(r, &event);
    }
    if (!digest_covers(&event)) {
        return cm_error_set(
            r->err, CM_E_EVIDENCE, "CM-BOOT-DIGEST",
            "the boot log's event %u (type 0x%x, PCR %u) has data that does not hash to "
            "its digest",
            r->log->count, event.type, event.pcr);
    }
    enum cm_status status = separator_check(r, &event);
    return status == CM_OK ? extend(r, &event) : status;
}

enum cm_status cm_boot_log_parse(const uint8_t *bytes, size_t size, struct cm_boot_log *ret_log,
                                 struct cm_error *err)
{
    struct reading r = {.cursor = cm_cursor_init(bytes, size), .log = ret_log, .err = err};
    memset(ret_log, 0, sizeof(*ret_log));
    enum cm_status status = size <= CM_BOOT_LOG_BYTES_MAX ? header_read(&r) : form_refuse(&r);
    while (status == CM_OK && cm_cursor_left(&r.cursor) > 0) {
        status = event_read(&r);
    }
    return status;
}

enum cm_status cm_boot_log_check(const struct cm_boot_log *log, const struct cm_evidence *evidence,
                                 struct cm_error *err)
{
    bool any = false;
    for (uint32_t i = 0; i < evidence->pcr_count; i++) {
        uint32_t pcr = evidence->pcrs[i];
        if (pcr >= CM_BOOT_LOG_PCRS) {
            continue;
        }
        any = true;
        if (memcmp(log->pcrs[pcr], evidence->pcr_values[i], CM_DIGEST_BYTES) != 0) {
            return cm_error_set(err, CM_E_EVIDENCE, "CM-BOOT-REPLAY",
                                "the boot log leads PCR %u to %02x%02x%02x%02x…, quoted is "
                                "%02x%02x%02x%02x…: it is of another boot, or was changed",
                                pcr, log->pcrs[pcr][0], log->pcrs[pcr][1], log->pcrs[pcr][2],
                                log->pcrs[pcr][3], evidence->pcr_values[i][0],
                                evidence->pcr_values[i][1], evidence->pcr_values[i][2],
                                evidence->pcr_values[i][3]);
        }
    }
    return any ? CM_OK
               : cm_error_set(
                     err, CM_E_EVIDENCE, "CM-BOOT-REPLAY",
                     "the evidence quotes no PCR of the firmware (0 to 7): nothing vouches for "
                     "this boot log");
}
