/* TPMS_ATTEST over the cursor. */
#include "loader/evidence/attest.h"

#include <string.h>

#include "runtime/base/cursor.h"

#define MAGIC      0xff544347u
#define TYPE_QUOTE 0x8018u
#define ALG_SHA256 0x000Bu

static uint64_t be(struct cm_cursor *cursor, size_t size)
{
    const uint8_t *at = cm_cursor_take(cursor, size);
    uint64_t value = 0;
    for (size_t i = 0; at != NULL && i < size; i++) {
        value = value << 8 | at[i];
    }
    return value;
}

static enum cm_status selection_take(struct cm_cursor *cursor, struct cm_attest *attest,
                                     struct cm_error *err)
{
    uint64_t banks = be(cursor, 4), algorithm = be(cursor, 2), size = be(cursor, 1);
    const uint8_t *bits = cm_cursor_take(cursor, 3);
    if (!cm_cursor_ok(cursor) || banks != 1 || algorithm != ALG_SHA256 || size != 3) {
        return cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-SELECTION",
                            "the quote selects %llu banks, first algorithm 0x%llx, expected one "
                            "SHA-256 bank: ask for a quote of this version",
                            (unsigned long long)banks, (unsigned long long)algorithm);
    }
    attest->pcrs = (uint32_t)bits[0] | (uint32_t)bits[1] << 8 | (uint32_t)bits[2] << 16;
    return CM_OK;
}

enum cm_status cm_attest_parse(const uint8_t *bytes, size_t size, struct cm_attest *ret_attest,
                               struct cm_error *err)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    struct cm_attest attest = {.extra_bytes = 0};
    uint64_t magic = be(&cursor, 4);
    if (magic != MAGIC) {
        return cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-MAGIC",
                            "what is signed begins with 0x%08llx, expected 0x%08x: no TPM made it",
                            (unsigned long long)magic, MAGIC);
    }
    uint64_t type = be(&cursor, 2);
    if (type != TYPE_QUOTE) {
        return cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-TYPE",
                            "what is signed has type 0x%04llx, expected 0x%04x: it is no quote",
                            (unsigned long long)type, TYPE_QUOTE);
    }
    cm_cursor_skip(&cursor, (size_t)be(&cursor, 2)); /* qualified signer: the AK is pinned */
    attest.extra_bytes = (uint32_t)be(&cursor, 2);
    if (attest.extra_bytes > sizeof(attest.extra)) {
        cursor.failed = true;
    }
    cm_cursor_copy(&cursor, attest.extra, cursor.failed ? 0 : attest.extra_bytes);
    attest.clock_ms = be(&cursor, 8);
    attest.reset_count = (uint32_t)be(&cursor, 4);
    attest.restart_count = (uint32_t)be(&cursor, 4);
    cm_cursor_skip(&cursor, 1 + 8); /* safe; firmware version: the AK's is obfuscated */
    enum cm_status status = cm_cursor_ok(&cursor) ? selection_take(&cursor, &attest, err) : CM_OK;
    if (status != CM_OK) {
        return status;
    }
    uint64_t digest_bytes = be(&cursor, 2);
    cm_cursor_copy(&cursor, attest.pcr_digest, sizeof(attest.pcr_digest));
    if (!cm_cursor_ok(&cursor) || digest_bytes != CM_DIGEST_BYTES || cm_cursor_left(&cursor) != 0) {
        return cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-ATTEST",
                            "the quote is malformed at offset %zu of %zu: fetch it again",
                            cursor.offset, size);
    }
    *ret_attest = attest;
    return CM_OK;
}
