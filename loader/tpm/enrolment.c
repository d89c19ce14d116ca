/* The enrolment record: fixed order, little-endian, signed by the node's attestation key.
 *
 * "CMENROL\0" · u32 version 2 · u32 development · name[64] · node[32] · 3 × (u32 size,
 * TPM2B_PUBLIC) EK, SRK, AK · counter name[34] · u16 reserved · u32 counter handle · u64 counter
 * value · u32 PCR · u32 reserved · PCR value[32] · u32 certificate size · its SHA-256 (zeros if
 * there is none) · signature[64] · the EK's certificate. The certificate follows the signature
 * because one TPM2_Hash takes 1024 bytes only; its digest is signed. */
#include "loader/tpm/internal.h"

#include <string.h>

#include "runtime/base/cursor.h"

#define VERSION 2u

/* SHA-256 of the certificate, or zeros. */
static void certificate_digest(const struct cm_enrolment *e,
                               uint8_t ret_digest[static CM_DIGEST_BYTES])
{
    struct cm_be part = {(uint8_t *)e->ek_certificate, e->ek_certificate_bytes,
                         e->ek_certificate_bytes, false};
    memset(ret_digest, 0, CM_DIGEST_BYTES);
    if (e->ek_certificate_bytes > 0) {
        (void)!cm_tpm_hash(ret_digest, NULL, &part, NULL);
    }
}

static void body_put(struct cm_writer *writer, const struct cm_enrolment *e)
{
    uint8_t digest[CM_DIGEST_BYTES];
    cm_writer_bytes(writer, "CMENROL", 8);
    cm_writer_u32(writer, VERSION);
    cm_writer_u32(writer, e->development);
    cm_writer_bytes(writer, e->node_name, sizeof(e->node_name));
    cm_writer_bytes(writer, e->node, sizeof(e->node));
    cm_writer_u32(writer, e->ek_public_bytes);
    cm_writer_bytes(writer, e->ek_public, e->ek_public_bytes);
    cm_writer_u32(writer, e->srk_public_bytes);
    cm_writer_bytes(writer, e->srk_public, e->srk_public_bytes);
    cm_writer_u32(writer, e->ak_public_bytes);
    cm_writer_bytes(writer, e->ak_public, e->ak_public_bytes);
    cm_writer_bytes(writer, e->counter_name, sizeof(e->counter_name));
    cm_writer_u16(writer, 0);
    cm_writer_u32(writer, e->counter_handle);
    cm_writer_u64(writer, e->counter_value);
    cm_writer_u32(writer, e->pcr);
    cm_writer_u32(writer, 0);
    cm_writer_bytes(writer, e->pcr_value, sizeof(e->pcr_value));
    cm_writer_u32(writer, e->ek_certificate_bytes);
    certificate_digest(e, digest);
    cm_writer_bytes(writer, digest, sizeof(digest));
}

enum cm_status cm_enrolment_encode(const struct cm_enrolment *enrolment, uint8_t *ret_bytes,
                                   size_t size, size_t *ret_used, struct cm_error *err)
{
    struct cm_writer writer = cm_writer_init(ret_bytes, size);
    body_put(&writer, enrolment);
    cm_writer_bytes(&writer, enrolment->signature, sizeof(enrolment->signature));
    cm_writer_bytes(&writer, enrolment->ek_certificate, enrolment->ek_certificate_bytes);
    if (writer.failed) {
        return cm_error_set(err, CM_E_BUG, "CM-SEAL-FORM", "no room for the enrolment record");
    }
    *ret_used = writer.offset;
    return CM_OK;
}

enum cm_status cm_enrolment_digest(const struct cm_enrolment *enrolment,
                                   uint8_t ret_digest[static CM_DIGEST_BYTES], struct cm_error *err)
{
    uint8_t bytes[CM_ENROLMENT_BYTES_MAX];
    struct cm_writer writer = cm_writer_init(bytes, sizeof(bytes));
    body_put(&writer, enrolment);
    struct cm_be part = {bytes, writer.offset, writer.offset, writer.failed};
    return cm_tpm_hash(ret_digest, err, &part, NULL);
}

static uint32_t size_take(struct cm_cursor *cursor, uint32_t most)
{
    uint32_t size = cm_cursor_u32(cursor);
    cursor->failed = cursor->failed || size > most;
    return cursor->failed ? 0 : size;
}

static uint32_t public_take(struct cm_cursor *cursor, uint8_t ret_bytes[CM_ENROLMENT_PUBLIC_MAX])
{
    uint32_t size = size_take(cursor, CM_ENROLMENT_PUBLIC_MAX);
    cm_cursor_copy(cursor, ret_bytes, size);
    return size;
}

static enum cm_status refuse(struct cm_error *err, const char *what)
{
    return cm_error_set(err, CM_E_POLICY, "CM-SEAL-ENROLMENT",
                        "enrolment record: %s: make it again on the node with `casemate init`",
                        what);
}

/* Templates and signature: everything that can be checked without the TPM. */
static enum cm_status record_check(const struct cm_enrolment *e, struct cm_error *err)
{
    uint8_t digest[CM_DIGEST_BYTES], point[CM_PUBLIC_KEY_BYTES], name[CM_TPM_NAME_BYTES];
    uint32_t attributes;
    if (!cm_tpm_ecc_public(e->ek_public, e->ek_public_bytes, &attributes, point) ||
        attributes != CM_TPM_EK_ATTRIBUTES ||
        cm_tpm_name(e->ek_public, e->ek_public_bytes, name, err) != CM_OK ||
        memcmp(name + 2, e->node, CM_DIGEST_BYTES) != 0) {
        return refuse(err, "endorsement key is not of the P-256 template, or not the node's");
    }
    if (!cm_tpm_ecc_public(e->srk_public, e->srk_public_bytes, &attributes, point) ||
        attributes != CM_TPM_SRK_ATTRIBUTES) {
        return refuse(err, "storage key is not of the template");
    }
    if (!cm_tpm_ecc_public(e->ak_public, e->ak_public_bytes, &attributes, point) ||
        attributes != CM_TPM_AK_ATTRIBUTES) {
        return refuse(err, "attestation key is not of the template");
    }
    enum cm_status status = cm_tpm_counter_name(e->counter_handle, e->node, name, err);
    if (status == CM_OK && memcmp(name, e->counter_name, sizeof(name)) != 0) {
        return refuse(err, "its counter is not the node's own, or could go back: another program "
                           "has its NV index");
    }
    if (status == CM_OK) {
        status = cm_enrolment_digest(e, digest, err);
    }
    if (status == CM_OK && !cm_tpm_signature_good(point, digest, e->signature)) {
        status = refuse(err, "the attestation key's signature is wrong");
    }
    return status;
}

enum cm_status cm_enrolment_parse(const uint8_t *bytes, size_t size,
                                  struct cm_enrolment *ret_enrolment, struct cm_error *err)
{
    struct cm_enrolment e = {.development = false};
    uint8_t wanted[CM_DIGEST_BYTES], digest[CM_DIGEST_BYTES];
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    const uint8_t *mark = cm_cursor_take(&cursor, 8);
    if (mark == NULL || memcmp(mark, "CMENROL", 8) != 0 || cm_cursor_u32(&cursor) != VERSION) {
        return refuse(err, "not a record of this version");
    }
    uint32_t development = cm_cursor_u32(&cursor);
    e.development = development == 1;
    cm_cursor_copy(&cursor, e.node_name, sizeof(e.node_name));
    cm_cursor_copy(&cursor, e.node, sizeof(e.node));
    e.ek_public_bytes = public_take(&cursor, e.ek_public);
    e.srk_public_bytes = public_take(&cursor, e.srk_public);
    e.ak_public_bytes = public_take(&cursor, e.ak_public);
    cm_cursor_copy(&cursor, e.counter_name, sizeof(e.counter_name));
    uint16_t reserved = cm_cursor_u16(&cursor);
    e.counter_handle = cm_cursor_u32(&cursor);
    e.counter_value = cm_cursor_u64(&cursor);
    e.pcr = cm_cursor_u32(&cursor);
    uint32_t reserved_too = cm_cursor_u32(&cursor);
    cm_cursor_copy(&cursor, e.pcr_value, sizeof(e.pcr_value));
    e.ek_certificate_bytes = size_take(&cursor, CM_EK_CERTIFICATE_MAX);
    cm_cursor_copy(&cursor, wanted, sizeof(wanted));
    cm_cursor_copy(&cursor, e.signature, sizeof(e.signature));
    cm_cursor_copy(&cursor, e.ek_certificate, e.ek_certificate_bytes);
    certificate_digest(&e, digest);
    if (!cm_cursor_ok(&cursor) || cm_cursor_left(&cursor) != 0 || development > 1 ||
        reserved != 0 || reserved_too != 0 || e.pcr > 23 || e.node_name[0] == '\0' ||
        memchr(e.node_name, '\0', sizeof(e.node_name)) == NULL ||
        memcmp(wanted, digest, sizeof(digest)) != 0) {
        return refuse(err, "cut, too long or malformed");
    }
    enum cm_status status = record_check(&e, err);
    if (status == CM_OK) {
        *ret_enrolment = e;
    }
    return status;
}

enum cm_status cm_enrolment_ak_digest(const struct cm_enrolment *enrolment,
                                      uint8_t ret_digest[static CM_DIGEST_BYTES],
                                      struct cm_error *err)
{
    uint8_t name[CM_TPM_NAME_BYTES];
    enum cm_status status =
        cm_tpm_name(enrolment->ak_public, enrolment->ak_public_bytes, name, err);
    if (status == CM_OK) {
        memcpy(ret_digest, name + 2, CM_DIGEST_BYTES);
    }
    return status;
}
