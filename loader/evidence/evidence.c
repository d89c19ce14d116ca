/* Evidence: encoding, its form, and the quote's data. */
#include "loader/evidence/evidence.h"

#include <openssl/evp.h>
#include <string.h>

#include "runtime/base/cursor.h"

#define MARK        "CMEVID\0"
#define VERSION     3u
#define QUOTE_LABEL "casemate-quote-v2"

static void sized_put(struct cm_writer *writer, const uint8_t *bytes, uint32_t size)
{
    cm_writer_u32(writer, size);
    cm_writer_bytes(writer, bytes, size);
}

#define ADAPTERS_BYTES_MAX (4 + CM_ADAPTERS_MAX * sizeof(struct cm_evidence_adapter))

static void adapters_put(struct cm_writer *writer, const struct cm_evidence *e)
{
    cm_writer_u32(writer, e->adapter_count);
    for (uint32_t i = 0; i < e->adapter_count; i++) {
        const struct cm_evidence_adapter *adapter = &e->adapters[i];
        cm_writer_u64(writer, adapter->serial);
        cm_writer_bytes(writer, adapter->name, sizeof(adapter->name));
        cm_writer_bytes(writer, adapter->core_digest, sizeof(adapter->core_digest));
        cm_writer_bytes(writer, adapter->owner_key, sizeof(adapter->owner_key));
        cm_writer_bytes(writer, adapter->owner_signature, sizeof(adapter->owner_signature));
    }
}

enum cm_status cm_evidence_encode(const struct cm_evidence *e, uint8_t *ret_bytes, size_t size,
                                  size_t *ret_used, struct cm_error *err)
{
    struct cm_writer writer = cm_writer_init(ret_bytes, size);
    cm_writer_bytes(&writer, MARK, 8);
    cm_writer_u32(&writer, VERSION);
    cm_writer_u32(&writer, e->kind);
    cm_writer_u32(&writer, e->mode);
    cm_writer_u64(&writer, e->made_unix_s);
    cm_writer_bytes(&writer, e->nonce, sizeof(e->nonce));
    cm_writer_bytes(&writer, e->tls_key_digest, sizeof(e->tls_key_digest));
    cm_writer_bytes(&writer, e->exporter, sizeof(e->exporter));
    cm_writer_bytes(&writer, e->core_digest, sizeof(e->core_digest));
    cm_writer_bytes(&writer, e->owner_key, sizeof(e->owner_key));
    cm_writer_bytes(&writer, e->owner_signature, sizeof(e->owner_signature));
    sized_put(&writer, e->enrolment, e->enrolment_bytes);
    sized_put(&writer, e->log, e->log_bytes);
    sized_put(&writer, e->attest, e->attest_bytes);
    cm_writer_bytes(&writer, e->attest_signature, sizeof(e->attest_signature));
    cm_writer_u32(&writer, e->pcr_count);
    for (uint32_t i = 0; i < e->pcr_count; i++) {
        cm_writer_u32(&writer, e->pcrs[i]);
        cm_writer_bytes(&writer, e->pcr_values[i], CM_DIGEST_BYTES);
    }
    adapters_put(&writer, e);
    if (writer.failed) {
        return cm_error_set(err, CM_E_BUG, "CM-EVD-FORM", "no room for the evidence");
    }
    *ret_used = writer.offset;
    return CM_OK;
}

static uint32_t sized_take(struct cm_cursor *cursor, uint8_t *ret_bytes, uint32_t most)
{
    uint32_t size = cm_cursor_u32(cursor);
    if (size > most) {
        cursor->failed = true;
        return 0;
    }
    cm_cursor_copy(cursor, ret_bytes, size);
    return size;
}

/* Ascending, each once, 0 to 23. */
static bool pcrs_take(struct cm_cursor *cursor, struct cm_evidence *e)
{
    e->pcr_count = cm_cursor_u32(cursor);
    if (e->pcr_count < 1 || e->pcr_count > CM_EVIDENCE_PCRS_MAX) {
        return false;
    }
    for (uint32_t i = 0; i < e->pcr_count; i++) {
        e->pcrs[i] = cm_cursor_u32(cursor);
        cm_cursor_copy(cursor, e->pcr_values[i], CM_DIGEST_BYTES);
        if (e->pcrs[i] > 23 || (i > 0 && e->pcrs[i] <= e->pcrs[i - 1])) {
            return false;
        }
    }
    return true;
}

static bool name_sound(const char name[static CM_NAME_BYTES])
{
    static const char zeros[CM_NAME_BYTES];
    size_t size = strnlen(name, CM_NAME_BYTES);
    return size < CM_NAME_BYTES && cm_name_valid(name) &&
           memcmp(name + size, zeros, CM_NAME_BYTES - size) == 0;
}

/* Serials ascending, each once. */
static bool adapters_take(struct cm_cursor *cursor, struct cm_evidence *e)
{
    uint64_t last = 0;
    e->adapter_count = cm_cursor_u32(cursor);
    if (e->adapter_count > CM_ADAPTERS_MAX) {
        return false;
    }
    for (uint32_t i = 0; i < e->adapter_count; i++) {
        struct cm_evidence_adapter *adapter = &e->adapters[i];
        adapter->serial = cm_cursor_u64(cursor);
        cm_cursor_copy(cursor, adapter->name, sizeof(adapter->name));
        cm_cursor_copy(cursor, adapter->core_digest, sizeof(adapter->core_digest));
        cm_cursor_copy(cursor, adapter->owner_key, sizeof(adapter->owner_key));
        cm_cursor_copy(cursor, adapter->owner_signature, sizeof(adapter->owner_signature));
        if (!cm_cursor_ok(cursor) || adapter->serial <= last || !name_sound(adapter->name)) {
            return false;
        }
        last = adapter->serial;
    }
    return true;
}

enum cm_status cm_evidence_parse(const uint8_t *bytes, size_t size,
                                 struct cm_evidence *ret_evidence, struct cm_error *err)
{
    struct cm_evidence *e = ret_evidence;
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    const uint8_t *mark = cm_cursor_take(&cursor, 8);
    memset(e, 0, sizeof(*e));
    if (size > CM_EVIDENCE_BYTES_MAX || mark == NULL || memcmp(mark, MARK, 8) != 0 ||
        cm_cursor_u32(&cursor) != VERSION) {
        return cm_error_set(
            err, CM_E_EVIDENCE, "CM-EVD-FORM",
            "this is no evidence of version 3: is it the whole file, of the same release?");
    }
    e->kind = cm_cursor_u32(&cursor);
    e->mode = cm_cursor_u32(&cursor);
    e->made_unix_s = cm_cursor_u64(&cursor);
    cm_cursor_copy(&cursor, e->nonce, sizeof(e->nonce));
    cm_cursor_copy(&cursor, e->tls_key_digest, sizeof(e->tls_key_digest));
    cm_cursor_copy(&cursor, e->exporter, sizeof(e->exporter));
    cm_cursor_copy(&cursor, e->core_digest, sizeof(e->core_digest));
    cm_cursor_copy(&cursor, e->owner_key, sizeof(e->owner_key));
    cm_cursor_copy(&cursor, e->owner_signature, sizeof(e->owner_signature));
    e->enrolment_bytes = sized_take(&cursor, e->enrolment, sizeof(e->enrolment));
    e->log_bytes = sized_take(&cursor, e->log, sizeof(e->log));
    e->attest_bytes = sized_take(&cursor, e->attest, sizeof(e->attest));
    cm_cursor_copy(&cursor, e->attest_signature, sizeof(e->attest_signature));
    bool lists = pcrs_take(&cursor, e) && adapters_take(&cursor, e);
    bool kinds = (e->kind == CM_QUOTE_BOOT || e->kind == CM_QUOTE_SESSION) &&
                 (e->mode == CM_ATTEST_STRICT || e->mode == CM_ATTEST_RESTARTABLE);
    if (!cm_cursor_ok(&cursor) || cm_cursor_left(&cursor) != 0 || !lists || !kinds) {
        size_t offset = cursor.offset;
        memset(e, 0, sizeof(*e));
        return cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-FORM",
                            "evidence is cut, too long or malformed at offset %zu of %zu", offset,
                            size);
    }
    return CM_OK;
}

enum cm_status cm_evidence_quote_data(const struct cm_evidence *evidence,
                                      uint8_t ret_digest[static CM_DIGEST_BYTES],
                                      struct cm_error *err)
{
    uint8_t bytes[256], adapters[ADAPTERS_BYTES_MAX], adapters_digest[CM_DIGEST_BYTES];
    struct cm_writer list = cm_writer_init(adapters, sizeof(adapters));
    struct cm_writer writer = cm_writer_init(bytes, sizeof(bytes));
    adapters_put(&list, evidence);
    CM_ASSERT(!list.failed);
    bool good = EVP_Digest(adapters, list.offset, adapters_digest, NULL, EVP_sha256(), NULL) == 1;
    cm_writer_bytes(&writer, QUOTE_LABEL, strlen(QUOTE_LABEL));
    cm_writer_u8(&writer, (uint8_t)evidence->kind);
    cm_writer_bytes(&writer, evidence->nonce, sizeof(evidence->nonce));
    cm_writer_bytes(&writer, evidence->tls_key_digest, sizeof(evidence->tls_key_digest));
    cm_writer_bytes(&writer, evidence->exporter, sizeof(evidence->exporter));
    cm_writer_bytes(&writer, evidence->core_digest, sizeof(evidence->core_digest));
    cm_writer_bytes(&writer, adapters_digest, sizeof(adapters_digest));
    CM_ASSERT(!writer.failed);
    if (!good || EVP_Digest(bytes, writer.offset, ret_digest, NULL, EVP_sha256(), NULL) != 1) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "SHA-256 failed");
    }
    return CM_OK;
}
