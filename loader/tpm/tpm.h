/* Talking to the node's TPM over an inherited descriptor. Keeper only; blocks on the TPM.
 *
 * One own TCTI serves /dev/tpmrm0, swtpm's data socket and casemate-devtpm. Every command has a
 * time limit. Errors carry the TPM's response code in subcode. */
#ifndef CASEMATE_LOADER_TPM_TPM_H
#define CASEMATE_LOADER_TPM_TPM_H

#include "loader/tpm/enrolment.h"
#include "runtime/base/secret.h"

struct cm_tpm;

/* Borrows fd. Flushes transient objects and sessions that an earlier user left behind (the
 * development TPM has no resource manager). Fails: TPM. */
CM_MUST_USE enum cm_status cm_tpm_open(int fd, struct cm_tpm **ret_tpm, struct cm_error *err);
void cm_tpm_close(struct cm_tpm *tpm); /* NULL is fine */

/* Time spent in the TPM since it was opened, by command code (TPM_CC, Part 2). */
#define CM_TPM_TIMES_MAX 32u
struct cm_tpm_time {
    uint32_t command, calls;
    uint64_t us;
};
struct cm_tpm_times {
    uint32_t count;
    struct cm_tpm_time rows[CM_TPM_TIMES_MAX];
};
const struct cm_tpm_times *cm_tpm_times(const struct cm_tpm *tpm);
const char *cm_tpm_command_name(uint32_t command); /* "other" where we send none */

/* Make (or find) EK, SRK, AK and the counter, and sign the record. Idempotent. */
CM_MUST_USE enum cm_status cm_tpm_provision(struct cm_tpm *tpm, const char *node_name,
                                            bool development, struct cm_enrolment *ret_enrolment,
                                            struct cm_error *err);

/* Answer a challenge (cm_credential_make) made for this TPM's EK and AK. Fails: POLICY
 * CM-SEAL-CHALLENGE. */
CM_MUST_USE enum cm_status cm_tpm_credential_answer(struct cm_tpm *tpm, const uint8_t *bytes,
                                                    size_t size,
                                                    uint8_t ret_secret[static CM_DIGEST_BYTES],
                                                    struct cm_error *err);

/* Unseal a package key into `key`, CM_KEY_BYTES of the caller's, wiped on failure: the slot's
 * payload under the policy list; *ret_state is the one that did it. Checks first that this is the
 * enrolled TPM. Fails: TPM; POLICY CM-SEAL-PCR, CM-SEAL-COUNTER, CM-SEAL-POLICY, CM-SEAL-OBJECT,
 * CM-SEAL-NODE … with what to do next. */
CM_MUST_USE enum cm_status cm_tpm_unseal(struct cm_tpm *tpm, const struct cm_enrolment *enrolment,
                                         const uint8_t *payload, size_t payload_bytes,
                                         const struct cm_policy_list *list,
                                         const uint8_t policy_key[static CM_PUBLIC_KEY_BYTES],
                                         struct cm_secret *key, struct cm_policy_state *ret_state,
                                         struct cm_error *err);

struct cm_tpm_quote {
    uint8_t attest[512]; /* TPMS_ATTEST as signed */
    uint32_t attest_bytes;
    uint8_t signature[64]; /* r ‖ s by the AK */
    uint8_t pcr_values[CM_POLICY_PCRS_MAX][CM_DIGEST_BYTES];
    uint32_t reset_count, restart_count; /* as signed: nobody on the TPM's bus can change them */
};

/* Quote PCRs (ascending, SHA-256 bank) with `data` as extraData, by the enrolled AK; the values are
 * read again until they are the quoted ones. The signature is checked here, before anybody gets it.
 * Fails: TPM CM-TPM-QUOTE; POLICY CM-SEAL-NODE. */
CM_MUST_USE enum cm_status cm_tpm_quote(struct cm_tpm *tpm, const struct cm_enrolment *enrolment,
                                        const uint32_t *pcrs, uint32_t count,
                                        const uint8_t data[static CM_DIGEST_BYTES],
                                        struct cm_tpm_quote *ret_quote, struct cm_error *err);

/* What differs after a TPM reset: a boot's mark. Compare with memcmp. */
struct cm_tpm_boot {
    uint8_t null_name[36]; /* name of a primary key of the null hierarchy */
    uint32_t reset_count, restart_count;
};
CM_MUST_USE enum cm_status cm_tpm_boot_read(struct cm_tpm *tpm, struct cm_tpm_boot *ret_boot,
                                            struct cm_error *err);

/* SHA-256 bank. Fails: TPM CM-TPM-BANK. */
CM_MUST_USE enum cm_status cm_tpm_pcr_read(struct cm_tpm *tpm, uint32_t pcr,
                                           uint8_t ret_value[static CM_DIGEST_BYTES],
                                           struct cm_error *err);
CM_MUST_USE enum cm_status cm_tpm_pcr_extend(struct cm_tpm *tpm, uint32_t pcr,
                                             const uint8_t digest[static CM_DIGEST_BYTES],
                                             struct cm_error *err);
/* The node's counter. Fails: TPM, also where there is none. */
CM_MUST_USE enum cm_status cm_tpm_counter_value(struct cm_tpm *tpm, uint64_t *ret_value,
                                                struct cm_error *err);
/* Step the node's counter by one. */
CM_MUST_USE enum cm_status cm_tpm_counter_step(struct cm_tpm *tpm, uint64_t *ret_value,
                                               struct cm_error *err);

#endif
