/* A TPMS_ATTEST of a quote, parsed (TPM 2.0 Library Part 2, section 10.12). Big-endian. */
#ifndef CASEMATE_LOADER_EVIDENCE_ATTEST_H
#define CASEMATE_LOADER_EVIDENCE_ATTEST_H

#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/frame.h"

struct cm_attest {
    uint8_t extra[64];
    uint32_t extra_bytes;
    uint64_t clock_ms;
    uint32_t reset_count, restart_count;
    uint32_t pcrs; /* bits; of the one SHA-256 bank */
    uint8_t pcr_digest[CM_DIGEST_BYTES];
};

/* Fails: EVIDENCE CM-EVD-MAGIC (not made by a TPM), CM-EVD-TYPE (no quote), CM-EVD-SELECTION (other
 * than one SHA-256 bank), CM-EVD-ATTEST (form). */
CM_MUST_USE enum cm_status cm_attest_parse(const uint8_t *bytes, size_t size,
                                           struct cm_attest *ret_attest, struct cm_error *err);

#endif
