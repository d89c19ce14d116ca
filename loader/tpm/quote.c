/* Quotes, and knowing whether this is still the boot that we started in. */
#include "loader/tpm/tpm_internal.h"

#include <string.h>

#include <tss2/tss2_mu.h>

#define QUOTE_TRIES 8

static TPML_PCR_SELECTION selection_make(const uint32_t *pcrs, uint32_t count)
{
    TPML_PCR_SELECTION selection = {
        .count = 1, .pcrSelections = {{.hash = TPM2_ALG_SHA256, .sizeofSelect = 3}}};
    for (uint32_t i = 0; i < count; i++) {
        BYTE *bits = &selection.pcrSelections[0].pcrSelect[pcrs[i] / 8];
        *bits = (BYTE)(*bits | 1u << (pcrs[i] % 8));
    }
    return selection;
}

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

static enum cm_status signature_take(const TPMT_SIGNATURE *signature, uint8_t ret[static 64],
                                     struct cm_error *err)
{
    const TPMS_SIGNATURE_ECC *ecc = &signature->signature.ecdsa;
    if (signature->sigAlg != TPM2_ALG_ECDSA || ecc->hash != TPM2_ALG_SHA256 ||
        ecc->signatureR.size > 32 || ecc->signatureS.size > 32) {
        return cm_error_set(err, CM_E_TPM, "CM-TPM-QUOTE",
                            "the quote's signature has another form");
    }
    memset(ret, 0, 64);
    memcpy(ret + 32 - ecc->signatureR.size, ecc->signatureR.buffer, ecc->signatureR.size);
    memcpy(ret + 64 - ecc->signatureS.size, ecc->signatureS.buffer, ecc->signatureS.size);
    return CM_OK;
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
        status = signature_take(signature, ret->signature, err);
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

enum cm_status cm_tpm_quote(struct cm_tpm *tpm, const struct cm_enrolment *enrolment,
                            const uint32_t *pcrs, uint32_t count,
                            const uint8_t data[static CM_DIGEST_BYTES],
                            struct cm_tpm_quote *ret_quote, struct cm_error *err)
{
    const TPML_PCR_SELECTION selection = selection_make(pcrs, count);
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
    return status;
}

/* A primary key in the null hierarchy: its seed is fresh after each TPM reset. */
enum cm_status cm_tpm_boot_read(struct cm_tpm *tpm, struct cm_tpm_boot *ret_boot,
                                struct cm_error *err)
{
    const TPM2B_SENSITIVE_CREATE nothing = {.size = 0};
    const TPM2B_DATA data = {.size = 0};
    const TPML_PCR_SELECTION none = {.count = 0};
    const TPM2B_PUBLIC template = {
        .publicArea = {.type = TPM2_ALG_ECC,
                       .nameAlg = TPM2_ALG_SHA256,
                       .objectAttributes = CM_TPM_SRK_ATTRIBUTES,
                       .parameters.eccDetail = {.symmetric = {.algorithm = TPM2_ALG_AES,
                                                              .keyBits.aes = 128,
                                                              .mode.aes = TPM2_ALG_CFB},
                                                .scheme.scheme = TPM2_ALG_NULL,
                                                .curveID = TPM2_ECC_NIST_P256,
                                                .kdf.scheme = TPM2_ALG_NULL}}};
    TPM2B_PUBLIC *public = NULL;
    TPM2B_CREATION_DATA *creation = NULL;
    TPM2B_DIGEST *hash = NULL;
    TPMT_TK_CREATION *ticket = NULL;
    TPM2B_NAME *name = NULL;
    TPMS_TIME_INFO *time = NULL;
    ESYS_TR key = ESYS_TR_NONE;
    enum cm_status status =
        cm_tpm_result(Esys_CreatePrimary(tpm->esys, ESYS_TR_RH_NULL, ESYS_TR_PASSWORD, ESYS_TR_NONE,
                                         ESYS_TR_NONE, &nothing, &template, &data, &none, &key,
                                         &public, &creation, &hash, &ticket),
                      "CreatePrimary of the null hierarchy", err);
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
    Esys_Free(public);
    Esys_Free(creation);
    Esys_Free(hash);
    Esys_Free(ticket);
    Esys_Free(name);
    Esys_Free(time);
    return status;
}
