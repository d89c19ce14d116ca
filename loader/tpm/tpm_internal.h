/* Shared by the tss2 half of this folder. */
#ifndef CASEMATE_LOADER_TPM_TPM_INTERNAL_H
#define CASEMATE_LOADER_TPM_TPM_INTERNAL_H

#include <tss2/tss2_esys.h>

#include "loader/tpm/internal.h"
#include "loader/tpm/tpm.h"

#define CM_SRK_HANDLE     0x81000001u /* TCG: the storage root key's handle */
#define CM_AK_HANDLE      0x81000002u
#define CM_COUNTER_HANDLE 0x0180CA5Eu
#define CM_EK_CERTIFICATE_HANDLE                                                                   \
    0x01C0000Au /* TCG EK Credential Profile: of the P-256 template                                \
                 */
#define CM_PCR_DEFAULT 14u

struct cm_tcti;

struct cm_tpm {
    int fd;
    TSS2_TCTI_CONTEXT *tcti;
    ESYS_CONTEXT *esys;
};

CM_MUST_USE enum cm_status cm_tcti_new(int fd, TSS2_TCTI_CONTEXT **ret_tcti, struct cm_error *err);
const struct cm_tpm_times *cm_tcti_times(const TSS2_TCTI_CONTEXT *tcti);
void cm_tcti_free(TSS2_TCTI_CONTEXT *tcti);

/* CM_OK for code 0, else an error of class TPM that names the command and the response code. */
enum cm_status cm_tpm_result(TSS2_RC code, const char *command, struct cm_error *err);

/* PCRs of the SHA-256 bank as a selection. */
TPML_PCR_SELECTION cm_tpm_selection(const uint32_t *pcrs, uint32_t count);
/* ECDSA over SHA-256 as r ‖ s. Fails: TPM CM-TPM-QUOTE. */
CM_MUST_USE enum cm_status cm_tpm_signature_take(const TPMT_SIGNATURE *signature,
                                                 uint8_t ret[static 64], struct cm_error *err);
/* A P-256 template: restricted signing by ECDSA, or restricted decryption by AES-128-CFB. */
TPM2B_PUBLIC cm_tpm_ecc_template(uint32_t attributes, bool signing);
/* CreatePrimary without data or PCRs; `what` stands in errors. *ret_public may be NULL. */
CM_MUST_USE enum cm_status cm_tpm_primary_create(struct cm_tpm *tpm, ESYS_TR hierarchy,
                                                 const TPM2B_PUBLIC *template, const char *what,
                                                 ESYS_TR *ret_key, TPM2B_PUBLIC **ret_public,
                                                 struct cm_error *err);

void cm_tpm_flush(struct cm_tpm *tpm, ESYS_TR *handle); /* NONE is fine; sets NONE */

/* The endorsement key, made anew from its template (the same key each time). */
CM_MUST_USE enum cm_status cm_tpm_ek_create(struct cm_tpm *tpm, ESYS_TR *ret_ek,
                                            TPM2B_PUBLIC **ret_public, struct cm_error *err);
/* A policy session that satisfies the EK's policy once. */
CM_MUST_USE enum cm_status cm_tpm_ek_session(struct cm_tpm *tpm, ESYS_TR *ret_session,
                                             struct cm_error *err);
CM_MUST_USE enum cm_status cm_tpm_counter_read(struct cm_tpm *tpm, ESYS_TR counter,
                                               uint64_t *ret_value, struct cm_error *err);
/* Marshalled TPM2B_PUBLIC. */
CM_MUST_USE enum cm_status cm_tpm_public_marshal(const TPM2B_PUBLIC *public,
                                                 uint8_t ret_bytes[CM_ENROLMENT_PUBLIC_MAX],
                                                 uint32_t *ret_size, struct cm_error *err);

#endif
