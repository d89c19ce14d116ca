/* Evidence: one file that says what a host runs, and its verification. No TPM library here.
 *
 * FORMAT.md beside this file is the specification. The keeper encodes; casemate-verify and routers
 * parse and verify. Everything parsed is borrowed from the caller's bytes or copied. */
#ifndef CASEMATE_LOADER_EVIDENCE_EVIDENCE_H
#define CASEMATE_LOADER_EVIDENCE_EVIDENCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "loader/tpm/enrolment.h"
#include "loader/tpm/measure.h"
#include "runtime/base/error.h"
#include "runtime/base/frame.h"

#define CM_EVIDENCE_ATTEST_MAX  512u
#define CM_EVIDENCE_PCRS_MAX    24u
#define CM_EVIDENCE_NONCE_BYTES 32u
#define CM_EVIDENCE_AGE_MAX_S   600u

enum cm_attest_mode { CM_ATTEST_STRICT = 1, CM_ATTEST_RESTARTABLE = 2 };

/* An adapter whose key the keeper holds: it is loaded, or can be. */
struct cm_evidence_adapter {
    uint64_t serial;          /* of its adding on this node; none is given twice, nor is it 0 */
    char name[CM_NAME_BYTES]; /* by which requests choose it; cm_name_valid, padded with zeros */
    uint8_t core_digest[CM_DIGEST_BYTES];
    uint8_t owner_key[CM_PUBLIC_KEY_BYTES];
    uint8_t owner_signature[64];
};

struct cm_evidence {
    uint32_t kind; /* enum cm_quote_kind */
    uint32_t mode; /* enum cm_attest_mode */
    uint64_t made_unix_s;
    uint8_t nonce[CM_EVIDENCE_NONCE_BYTES];
    uint8_t tls_key_digest[CM_DIGEST_BYTES];
    uint8_t exporter[CM_DIGEST_BYTES];
    uint8_t core_digest[CM_DIGEST_BYTES];
    uint8_t owner_key[CM_PUBLIC_KEY_BYTES];
    uint8_t owner_signature[64];
    uint8_t enrolment[CM_ENROLMENT_BYTES_MAX];
    uint32_t enrolment_bytes;
    uint8_t log[CM_LOG_BYTES_MAX];
    uint32_t log_bytes;
    uint8_t attest[CM_EVIDENCE_ATTEST_MAX];
    uint32_t attest_bytes;
    uint8_t attest_signature[64];
    uint32_t pcr_count;
    uint32_t pcrs[CM_EVIDENCE_PCRS_MAX];
    uint8_t pcr_values[CM_EVIDENCE_PCRS_MAX][CM_DIGEST_BYTES];
    uint32_t adapter_count;
    struct cm_evidence_adapter adapters[CM_ADAPTERS_MAX]; /* by serial */
};

CM_MUST_USE enum cm_status cm_evidence_encode(const struct cm_evidence *evidence,
                                              uint8_t *ret_bytes, size_t size, size_t *ret_used,
                                              struct cm_error *err);
/* Form alone. What it accepts, encode gives back byte by byte. Fails: EVIDENCE CM-EVD-FORM. */
CM_MUST_USE enum cm_status cm_evidence_parse(const uint8_t *bytes, size_t size,
                                             struct cm_evidence *ret_evidence,
                                             struct cm_error *err);
/* What the quote must carry as extraData. */
CM_MUST_USE enum cm_status cm_evidence_quote_data(const struct cm_evidence *evidence,
                                                  uint8_t ret_digest[static CM_DIGEST_BYTES],
                                                  struct cm_error *err);

#endif
