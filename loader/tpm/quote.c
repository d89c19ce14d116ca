/* Quotes, and knowing whether this is still the boot that we started in. */
#include "loader/tpm/tpm_internal.h"

#include <string.h>

#include <tss2/tss2_mu.h>

#define QUOTE_TRIES 8

static enum cm_status ak_open(struct cm_tpm *tpm, const struct cm_enrolment *enrolment,
                              ESYS_TR *ret_ak, struct cm_error *err)
{
    uint8_t public[CM_ENROLMENT_PUBLIC_MAX];
    uint32_t size = 0;
    TPM2B_PUBLIC *found = NULL;
    enum cm_status status =
        cm_tpm_result(Esys_TR_FromTPMPublic(tpm->esys, CM_AK_HANDLE, ESYS_TR_NONE, ESYS_TR_NONE,
                                            ESYS_TR_NONE, ret_ak),
                      "ReadPublic of the attestation key", err);
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_ReadPublic(tpm->esys, *ret_ak, ESYS_TR_NONE, ESYS_TR_NONE,
                                               ESYS_TR_NONE, &found, NULL, NULL),
                               "ReadPublic of the attestation key", err);
    }
    if (status == CM_OK) {
        status = cm_tpm_public_marshal(found, public, &size, err);
    }
    if (status == CM_OK &&
        (size != enrolment->ak_public_bytes || memcmp(public, enrolment->ak_public, size) != 0)) {
        status = cm_error_set(err, CM_E_POLICY, "CM-SEAL-NODE",
                              "this TPM's attestation key is not the enrolled one: enrol the node "
                              "again with `casemate init`");
    }
    Esys_Free(found);
    return status;
}

static enum cm_status quote_once(struct cm_tpm *tpm, ESYS_TR ak,
                                 const TPML_PCR_SELECTION *selection,
                                 const uint8_t data[static CM_DIGEST_BYTES],
                                 struct cm_tpm_quote *ret, TPM2B_DIGEST *ret_pcr_digest,
                                 struct cm_error *err)
{
    const TPMT_SIG_SCHEME scheme = {.scheme = TPM2_ALG_NULL};
    TPM2B_DATA qualifying = {.size = CM_DIGEST_BYTES};
    TPM2B_ATTEST *attest = NULL;
    TPMT_SIGNATURE *signature = NULL;
    TPMS_ATTEST parsed;
    size_t used = 0;
    memcpy(qualifying.buffer, data, CM_DIGEST_BYTES);
    enum cm_status status =
        cm_tpm_result(Esys_Quote(tpm->esys, ak, ESYS_TR_PASSWORD, ESYS_TR_NONE, ESYS_TR_NONE,
                                 &qualifying, &scheme, selection, &attest, &signature),
                      "Quote", err);
    if (status == CM_OK && attest->size > sizeof(ret->attest)) {
        status = cm_error_set(err, CM_E_TPM, "CM-TPM-QUOTE", "the quote is too long");
    }
    if (status == CM_OK) {
        status = cm_tpm_result(
            Tss2_MU_TPMS_ATTEST_Unmarshal(attest->attestationData, attest->size, &used, &parsed),
            "unmarshal of the quote", err);
    }
    if (status == CM_OK) {
        status = cm_tpm_signature_take(signature, ret->signature, err);
    }
    if (status == CM_OK) {
        memcpy(ret->attest, attest->attestationData, attest->size);
        ret->attest_bytes = attest->size;
        ret->reset_count = parsed.clockInfo.resetCount;
        ret->restart_count = parsed.clockInfo.restartCount;
        *ret_pcr_digest = parsed.attested.quote.pcrDigest;
    }
    Esys_Free(attest);
    Esys_Free(signature);
    return status;
}

/* The values after the quote; true if they are the quoted ones. */
static enum cm_status values_match(struct cm_tpm *tpm, const uint32_t *pcrs, uint32_t count,
                                   const TPM2B_DIGEST *quoted, struct cm_tpm_quote *ret,
                                   bool *ret_match, struct cm_error *err)
{
    uint8_t digest[CM_DIGEST_BYTES];
    enum cm_status status = CM_OK;
    for (uint32_t i = 0; status == CM_OK && i < count; i++) {
        status = cm_tpm_pcr_read(tpm, pcrs[i], ret->pcr_values[i], err);
    }
    if (status == CM_OK) {
        size_t size = (size_t)count * CM_DIGEST_BYTES;
        struct cm_be all = {ret->pcr_values[0], size, size, false};
        status = cm_tpm_hash(digest, err, &all, NULL);
    }
    *ret_match = status == CM_OK && quoted->size == sizeof(digest) &&
                 memcmp(quoted->buffer, digest, sizeof(digest)) == 0;
    return status;
}

static enum cm_status signature_check(const struct cm_enrolment *enrolment,
                                      const struct cm_tpm_quote *quote, struct cm_error *err)
{
    uint8_t ak[CM_PUBLIC_KEY_BYTES], digest[CM_DIGEST_BYTES];
    uint32_t attributes;
    struct cm_be signed_part = {(uint8_t *)quote->attest, quote->attest_bytes, quote->attest_bytes,
                                false};
    enum cm_status status = cm_tpm_hash(digest, err, &signed_part, NULL);
    if (status == CM_OK &&
        (!cm_tpm_ecc_public(enrolment->ak_public, enrolment->ak_public_bytes, &attributes, ak) ||
         !cm_tpm_signature_good(ak, digest, quote->signature))) {
        status = cm_error_set(err, CM_E_TPM, "CM-TPM-QUOTE",
                              "the quote is not signed by the enrolled attestation key: its answer "
                              "was changed on the way from the TPM");
    }
    return status;
}

enum cm_status cm_tpm_quote(struct cm_tpm *tpm, const struct cm_enrolment *enrolment,
                            const uint32_t *pcrs, uint32_t count,
                            const uint8_t data[static CM_DIGEST_BYTES],
                            struct cm_tpm_quote *ret_quote, struct cm_error *err)
{
    const TPML_PCR_SELECTION selection = cm_tpm_selection(pcrs, count);
    TPM2B_DIGEST quoted = {.size = 0};
    ESYS_TR ak = ESYS_TR_NONE;
    bool match = false;
    CM_ASSERT(count >= 1 && count <= CM_POLICY_PCRS_MAX);
    enum cm_status status = ak_open(tpm, enrolment, &ak, err);
    for (int i = 0; status == CM_OK && !match && i < QUOTE_TRIES; i++) {
        status = quote_once(tpm, ak, &selection, data, ret_quote, &quoted, err);
        if (status == CM_OK) {
            status = values_match(tpm, pcrs, count, &quoted, ret_quote, &match, err);
        }
    }
    if (ak != ESYS_TR_NONE) {
        (void)Esys_TR_Close(tpm->esys, &ak);
    }
    if (status == CM_OK && !match) {
        status = cm_error_set(err, CM_E_TPM, "CM-TPM-QUOTE",
                              "somebody extends the quoted PCRs all the time: no stable quote");
    }
    return status == CM_OK ? signature_check(enrolment, ret_quote, err) : status;
}

/* A primary key in the null hierarchy: its seed is fresh after each TPM reset. */
enum cm_status cm_tpm_boot_read(struct cm_tpm *tpm, struct cm_tpm_boot *ret_boot,
                                struct cm_error *err)
{
    const TPM2B_PUBLIC template = cm_tpm_ecc_template(CM_TPM_SRK_ATTRIBUTES, false);
    TPM2B_NAME *name = NULL;
    TPMS_TIME_INFO *time = NULL;
    ESYS_TR key = ESYS_TR_NONE;
    enum cm_status status = cm_tpm_primary_create(
        tpm, ESYS_TR_RH_NULL, &template, "CreatePrimary of the null hierarchy", &key, NULL, err);
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_TR_GetName(tpm->esys, key, &name), "name", err);
    }
    if (status == CM_OK) {
        status = cm_tpm_result(
            Esys_ReadClock(tpm->esys, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE, &time), "ReadClock",
            err);
    }
    if (status == CM_OK) {
        *ret_boot = (struct cm_tpm_boot){.reset_count = time->clockInfo.resetCount,
                                         .restart_count = time->clockInfo.restartCount};
        memcpy(ret_boot->null_name, name->name,
               name->size < sizeof(ret_boot->null_name) ? name->size : sizeof(ret_boot->null_name));
    }
    cm_tpm_flush(tpm, &key);
    Esys_Free(name);
    Esys_Free(time);
    return status;
}
