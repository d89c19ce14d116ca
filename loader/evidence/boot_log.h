/* The firmware's own event log, beside evidence: does it lead to the PCRs that were quoted?
 *
 * TCG PC Client Platform Firmware Profile 1.05, sections 9.2 (crypto-agile log) and 10.4 (events);
 * on Linux /sys/kernel/security/tpm0/binary_bios_measurements. Untrusted bytes: the quote vouches
 * for it. */
#ifndef CASEMATE_LOADER_EVIDENCE_BOOT_LOG_H
#define CASEMATE_LOADER_EVIDENCE_BOOT_LOG_H

#include "loader/evidence/evidence.h"

#define CM_BOOT_LOG_BYTES_MAX  (1u << 20)
#define CM_BOOT_LOG_EVENTS_MAX 2048u
#define CM_BOOT_LOG_PCRS       8u /* the firmware's: 0 to 7 */

struct cm_boot_event {
    uint32_t pcr, type;
    uint8_t digest[CM_DIGEST_BYTES]; /* as extended, SHA-256 bank */
};

struct cm_boot_log {
    uint32_t count; /* of events that were extended */
    struct cm_boot_event events[CM_BOOT_LOG_EVENTS_MAX];
    uint32_t seen;                                   /* PCRs with events, as bits */
    uint8_t pcrs[CM_BOOT_LOG_PCRS][CM_DIGEST_BYTES]; /* after all events */
};

/* Form, digests that must cover their data, separators, the start's locality. Fails: EVIDENCE
 * CM-BOOT-FORM, -ALGORITHMS, -DIGEST, -LOCALITY, -SEPARATOR. */
CM_MUST_USE enum cm_status cm_boot_log_parse(const uint8_t *bytes, size_t size,
                                             struct cm_boot_log *ret_log, struct cm_error *err);
/* Each quoted PCR of the firmware is what the log leads to. Fails: EVIDENCE CM-BOOT-REPLAY; also
 * where the evidence quotes none of them. */
CM_MUST_USE enum cm_status cm_boot_log_check(const struct cm_boot_log *log,
                                             const struct cm_evidence *evidence,
                                             struct cm_error *err);

#endif
