/* Asking a live host for evidence over TLS 1.3. */
#ifndef CASEMATE_LOADER_EVIDENCE_LIVE_H
#define CASEMATE_LOADER_EVIDENCE_LIVE_H

#include "loader/evidence/verify.h"

/* "https://HOST:PORT": connect, make a nonce, GET /v1/attestation, and note key and exporter of
 * this very connection. The certificate needs no authority: the evidence binds its key. At most 10
 * s for each wait. Fails: USAGE (address), SYSTEM (network), EVIDENCE CM-EVD-HTTP. */
CM_MUST_USE enum cm_status cm_live_fetch(const char *url, uint8_t *ret_bytes, size_t size,
                                         size_t *ret_used, struct cm_evidence_live *ret_live,
                                         struct cm_error *err);

#endif
