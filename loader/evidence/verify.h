/* Is this evidence to be believed? Each check has its own id; the first that fails is the verdict.
 */
#ifndef CASEMATE_LOADER_EVIDENCE_VERIFY_H
#define CASEMATE_LOADER_EVIDENCE_VERIFY_H

#include "loader/evidence/attest.h"
#include "loader/evidence/evidence.h"
#include "loader/evidence/trust.h"

#define CM_EVIDENCE_FUTURE_MAX_S 60u /* clocks differ */

struct cm_evidence_live { /* what the verifier saw of its own connection */
    uint8_t nonce[CM_EVIDENCE_NONCE_BYTES];
    uint8_t tls_key_digest[CM_DIGEST_BYTES];
    uint8_t exporter[CM_DIGEST_BYTES];
};

struct cm_evidence_last { /* the TPM's clock in the last evidence of this node */
    uint32_t reset_count, restart_count;
    uint64_t clock_ms;
};

struct cm_evidence_question {
    const struct cm_evidence *evidence;
    const struct cm_trust *trust;
    const struct cm_evidence_live *live; /* NULL: a file; then boot evidence is accepted too */
    const uint8_t *nonce;                /* a file's expected nonce, or NULL */
    const struct cm_evidence_last *last; /* NULL: none */
    uint64_t now_unix_s;
};

struct cm_evidence_facts { /* of accepted evidence */
    struct cm_enrolment enrolment;
    struct cm_attest attest;
    struct cm_measurement log;
};

/* Fails: EVIDENCE CM-EVD-…: what, expected, found, next step. */
CM_MUST_USE enum cm_status cm_evidence_verify(const struct cm_evidence_question *question,
                                              struct cm_evidence_facts *ret_facts,
                                              struct cm_error *err);

#endif
