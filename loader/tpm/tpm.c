/* Opening the TPM, and the small operations that the others share. */
#include "loader/tpm/tpm_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <tss2/tss2_mu.h>
#include <tss2/tss2_rc.h>

/* Part 2, table 7.5. (The header's own macros shift into the sign bit.) */
#define TRANSIENT_FIRST 0x80000000u
#define SESSIONS_FIRST  0x02000000u

enum cm_status cm_tpm_result(TSS2_RC code, const char *command, struct cm_error *err)
{
    if (code == TSS2_RC_SUCCESS) {
        return CM_OK;
    }
    enum cm_status status =
        cm_error_set(err, CM_E_TPM, (code & 0xffu) == 0x21 ? "CM-TPM-LOCKOUT" : "CM-TPM-COMMAND",
                     "%s: TPM response 0x%x (%.180s)", command, code, Tss2_RC_Decode(code));
    if (err != NULL) {
        err->subcode = (int32_t)code;
    }
    return status;
}

/* Flush by raw handle: objects and sessions of a user who is gone are unknown to ESYS. */
static enum cm_status handle_flush(TSS2_TCTI_CONTEXT *tcti, TPM2_HANDLE handle,
                                   struct cm_error *err)
{
    uint8_t command[14] = {0x80, 0x01, 0, 0, 0, 14, 0, 0, 0x01, 0x65}, response[64];
    size_t size = sizeof(response);
    for (int i = 0; i < 4; i++) {
        command[10 + i] = (uint8_t)(handle >> (24 - 8 * i));
    }
    TSS2_RC code = Tss2_Tcti_Transmit(tcti, sizeof(command), command);
    if (code == TSS2_RC_SUCCESS) {
        code = Tss2_Tcti_Receive(tcti, &size, response, TSS2_TCTI_TIMEOUT_BLOCK);
    }
    return cm_tpm_result(code, "FlushContext", err);
}

static enum cm_status stale_flush(struct cm_tpm *tpm, TPM2_HANDLE first, struct cm_error *err)
{
    TPMS_CAPABILITY_DATA *found = NULL;
    TPMI_YES_NO more;
    enum cm_status status =
        cm_tpm_result(Esys_GetCapability(tpm->esys, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE,
                                         TPM2_CAP_HANDLES, first, 32, &more, &found),
                      "GetCapability", err);
    for (uint32_t i = 0; status == CM_OK && i < found->data.handles.count; i++) {
        status = handle_flush(tpm->tcti, found->data.handles.handle[i], err);
    }
    Esys_Free(found);
    return status;
}

enum cm_status cm_tpm_open(int fd, struct cm_tpm **ret_tpm, struct cm_error *err)
{
    struct cm_tpm *tpm = calloc(1, sizeof(*tpm));
    if (tpm == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "TPM");
    }
    /* tss2 logs secrets at its highest levels; whatever the environment says, it must not. */
    setenv("TSS2_LOG", "all+NONE", 1);
    unsetenv("TSS2_LOGFILE");
    tpm->fd = fd;
    enum cm_status status = cm_tcti_new(fd, &tpm->tcti, err);
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_Initialize(&tpm->esys, tpm->tcti, NULL), "open", err);
    }
    if (status == CM_OK) {
        status = stale_flush(tpm, TRANSIENT_FIRST, err);
    }
    if (status == CM_OK) {
        status = stale_flush(tpm, SESSIONS_FIRST, err);
    }
    if (status != CM_OK) {
        cm_tpm_close(tpm);
        return status;
    }
    *ret_tpm = tpm;
    return CM_OK;
}

void cm_tpm_close(struct cm_tpm *tpm)
{
    if (tpm != NULL) {
        Esys_Finalize(&tpm->esys);
        if (tpm->tcti != NULL) {
            cm_tcti_free(tpm->tcti);
        }
        free(tpm);
    }
}

void cm_tpm_flush(struct cm_tpm *tpm, ESYS_TR *handle)
{
    if (*handle != ESYS_TR_NONE) {
        (void)Esys_FlushContext(tpm->esys, *handle);
        *handle = ESYS_TR_NONE;
    }
}

enum cm_status cm_tpm_public_marshal(const TPM2B_PUBLIC *public,
                                     uint8_t ret_bytes[CM_ENROLMENT_PUBLIC_MAX], uint32_t *ret_size,
                                     struct cm_error *err)
{
    size_t used = 0;
    enum cm_status status = cm_tpm_result(
        Tss2_MU_TPM2B_PUBLIC_Marshal(public, ret_bytes, CM_ENROLMENT_PUBLIC_MAX, &used), "marshal",
        err);
    if (status == CM_OK) {
        *ret_size = (uint32_t)used;
    }
    return status;
}

TPML_PCR_SELECTION cm_tpm_selection(const uint32_t *pcrs, uint32_t count)
{
    TPML_PCR_SELECTION selection = {
        .count = 1, .pcrSelections = {{.hash = TPM2_ALG_SHA256, .sizeofSelect = 3}}};
    for (uint32_t i = 0; i < count; i++) {
        BYTE *bits = &selection.pcrSelections[0].pcrSelect[pcrs[i] / 8];
        *bits = (BYTE)(*bits | 1u << (pcrs[i] % 8));
    }
    return selection;
}

enum cm_status cm_tpm_signature_take(const TPMT_SIGNATURE *signature, uint8_t ret[static 64],
                                     struct cm_error *err)
{
    const TPMS_SIGNATURE_ECC *ecc = &signature->signature.ecdsa;
    if (signature->sigAlg != TPM2_ALG_ECDSA || ecc->hash != TPM2_ALG_SHA256 ||
        ecc->signatureR.size > 32 || ecc->signatureS.size > 32) {
        return cm_error_set(err, CM_E_TPM, "CM-TPM-QUOTE",
                            "the TPM's signature is not ECDSA P-256 with SHA-256");
    }
    memset(ret, 0, 64);
    memcpy(ret + 32 - ecc->signatureR.size, ecc->signatureR.buffer, ecc->signatureR.size);
    memcpy(ret + 64 - ecc->signatureS.size, ecc->signatureS.buffer, ecc->signatureS.size);
    return CM_OK;
}

TPM2B_PUBLIC cm_tpm_ecc_template(uint32_t attributes, bool signing)
{
    TPM2B_PUBLIC made = {.publicArea = {.type = TPM2_ALG_ECC,
                                        .nameAlg = TPM2_ALG_SHA256,
                                        .objectAttributes = attributes,
                                        .parameters.eccDetail = {.curveID = TPM2_ECC_NIST_P256,
                                                                 .kdf.scheme = TPM2_ALG_NULL}}};
    TPMS_ECC_PARMS *ecc = &made.publicArea.parameters.eccDetail;
    if (signing) {
        ecc->symmetric.algorithm = TPM2_ALG_NULL;
        ecc->scheme.scheme = TPM2_ALG_ECDSA;
        ecc->scheme.details.ecdsa.hashAlg = TPM2_ALG_SHA256;
    } else {
        ecc->symmetric = (TPMT_SYM_DEF_OBJECT){
            .algorithm = TPM2_ALG_AES, .keyBits.aes = 128, .mode.aes = TPM2_ALG_CFB};
        ecc->scheme.scheme = TPM2_ALG_NULL;
    }
    return made;
}

enum cm_status cm_tpm_primary_create(struct cm_tpm *tpm, ESYS_TR hierarchy,
                                     const TPM2B_PUBLIC *template, const char *what,
                                     ESYS_TR *ret_key, TPM2B_PUBLIC **ret_public,
                                     struct cm_error *err)
{
    const TPM2B_SENSITIVE_CREATE nothing = {.size = 0};
    const TPM2B_DATA data = {.size = 0};
    const TPML_PCR_SELECTION none = {.count = 0};
    TPM2B_PUBLIC *public = NULL;
    TPM2B_CREATION_DATA *creation = NULL;
    TPM2B_DIGEST *hash = NULL;
    TPMT_TK_CREATION *ticket = NULL;
    enum cm_status status =
        cm_tpm_result(Esys_CreatePrimary(tpm->esys, hierarchy, ESYS_TR_PASSWORD, ESYS_TR_NONE,
                                         ESYS_TR_NONE, &nothing, template, &data, &none, ret_key,
                                         &public, &creation, &hash, &ticket),
                      what, err);
    if (status == CM_OK && ret_public != NULL) {
        *ret_public = public;
        public = NULL;
    }
    Esys_Free(public);
    Esys_Free(creation);
    Esys_Free(hash);
    Esys_Free(ticket);
    return status;
}

enum cm_status cm_tpm_ek_create(struct cm_tpm *tpm, ESYS_TR *ret_ek, TPM2B_PUBLIC **ret_public,
                                struct cm_error *err)
{
    /* TCG EK Credential Profile, template L-2: the unique fields are 32 zero bytes each. */
    TPM2B_PUBLIC template = cm_tpm_ecc_template(CM_TPM_EK_ATTRIBUTES, false);
    template.publicArea.authPolicy.size = CM_DIGEST_BYTES;
    memcpy(template.publicArea.authPolicy.buffer, cm_tpm_ek_policy, CM_DIGEST_BYTES);
    template.publicArea.unique.ecc.x.size = template.publicArea.unique.ecc.y.size = 32;
    return cm_tpm_primary_create(tpm, ESYS_TR_RH_ENDORSEMENT, &template,
                                 "CreatePrimary of the endorsement key", ret_ek, ret_public, err);
}

enum cm_status cm_tpm_ek_session(struct cm_tpm *tpm, ESYS_TR *ret_session, struct cm_error *err)
{
    const TPMT_SYM_DEF none = {.algorithm = TPM2_ALG_NULL};
    TPM2B_TIMEOUT *timeout = NULL;
    TPMT_TK_AUTH *ticket = NULL;
    ESYS_TR session = ESYS_TR_NONE;
    enum cm_status status = cm_tpm_result(
        Esys_StartAuthSession(tpm->esys, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE,
                              ESYS_TR_NONE, NULL, TPM2_SE_POLICY, &none, TPM2_ALG_SHA256, &session),
        "StartAuthSession for the endorsement key", err);
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_PolicySecret(tpm->esys, ESYS_TR_RH_ENDORSEMENT, session,
                                                 ESYS_TR_PASSWORD, ESYS_TR_NONE, ESYS_TR_NONE, NULL,
                                                 NULL, NULL, 0, &timeout, &ticket),
                               "PolicySecret", err);
    }
    Esys_Free(timeout);
    Esys_Free(ticket);
    if (status != CM_OK) {
        cm_tpm_flush(tpm, &session);
        return status;
    }
    *ret_session = session;
    return CM_OK;
}

enum cm_status cm_tpm_pcr_read(struct cm_tpm *tpm, uint32_t pcr,
                               uint8_t ret_value[static CM_DIGEST_BYTES], struct cm_error *err)
{
    const TPML_PCR_SELECTION wanted = cm_tpm_selection(&pcr, 1);
    TPML_PCR_SELECTION *got = NULL;
    TPML_DIGEST *values = NULL;
    UINT32 counter;
    enum cm_status status =
        cm_tpm_result(Esys_PCR_Read(tpm->esys, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE, &wanted,
                                    &counter, &got, &values),
                      "PCR_Read", err);
    if (status == CM_OK && (values->count != 1 || values->digests[0].size != CM_DIGEST_BYTES)) {
        status = cm_error_set(err, CM_E_TPM, "CM-TPM-BANK",
                              "the TPM has no SHA-256 bank: enable it in the firmware");
    }
    if (status == CM_OK) {
        memcpy(ret_value, values->digests[0].buffer, CM_DIGEST_BYTES);
    }
    Esys_Free(got);
    Esys_Free(values);
    return status;
}

enum cm_status cm_tpm_counter_read(struct cm_tpm *tpm, ESYS_TR counter, uint64_t *ret_value,
                                   struct cm_error *err)
{
    TPM2B_MAX_NV_BUFFER *data = NULL;
    enum cm_status status =
        cm_tpm_result(Esys_NV_Read(tpm->esys, counter, counter, ESYS_TR_PASSWORD, ESYS_TR_NONE,
                                   ESYS_TR_NONE, 8, 0, &data),
                      "NV_Read of the counter", err);
    if (status == CM_OK && data->size != 8) {
        status = cm_error_set(err, CM_E_TPM, "CM-TPM-COUNTER", "the counter is not 8 bytes");
    }
    if (status == CM_OK) {
        *ret_value = 0;
        for (int i = 0; i < 8; i++) {
            *ret_value = *ret_value << 8 | data->buffer[i];
        }
    }
    Esys_Free(data);
    return status;
}

enum cm_status cm_tpm_pcr_extend(struct cm_tpm *tpm, uint32_t pcr,
                                 const uint8_t digest[static CM_DIGEST_BYTES], struct cm_error *err)
{
    TPML_DIGEST_VALUES values = {.count = 1, .digests = {{.hashAlg = TPM2_ALG_SHA256}}};
    memcpy(values.digests[0].digest.sha256, digest, CM_DIGEST_BYTES);
    return cm_tpm_result(Esys_PCR_Extend(tpm->esys, ESYS_TR_PCR0 + pcr, ESYS_TR_PASSWORD,
                                         ESYS_TR_NONE, ESYS_TR_NONE, &values),
                         "PCR_Extend", err);
}

static enum cm_status counter_open(struct cm_tpm *tpm, ESYS_TR *ret, struct cm_error *err)
{
    return cm_tpm_result(Esys_TR_FromTPMPublic(tpm->esys, CM_COUNTER_HANDLE, ESYS_TR_NONE,
                                               ESYS_TR_NONE, ESYS_TR_NONE, ret),
                         "NV_ReadPublic of the counter", err);
}

enum cm_status cm_tpm_counter_value(struct cm_tpm *tpm, uint64_t *ret_value, struct cm_error *err)
{
    ESYS_TR counter = ESYS_TR_NONE;
    enum cm_status status = counter_open(tpm, &counter, err);
    if (status == CM_OK) {
        status = cm_tpm_counter_read(tpm, counter, ret_value, err);
        (void)Esys_TR_Close(tpm->esys, &counter);
    }
    return status;
}

enum cm_status cm_tpm_counter_step(struct cm_tpm *tpm, uint64_t *ret_value, struct cm_error *err)
{
    ESYS_TR counter = ESYS_TR_NONE;
    enum cm_status status = counter_open(tpm, &counter, err);
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_NV_Increment(tpm->esys, ESYS_TR_RH_OWNER, counter,
                                                 ESYS_TR_PASSWORD, ESYS_TR_NONE, ESYS_TR_NONE),
                               "NV_Increment", err);
    }
    if (status == CM_OK) {
        status = cm_tpm_counter_read(tpm, counter, ret_value, err);
    }
    if (counter != ESYS_TR_NONE) {
        (void)Esys_TR_Close(tpm->esys, &counter);
    }
    return status;
}

const struct cm_tpm_times *cm_tpm_times(const struct cm_tpm *tpm)
{
    return cm_tcti_times(tpm->tcti);
}

const char *cm_tpm_command_name(uint32_t command)
{
    static const struct {
        uint32_t command;
        const char *name;
    } rows[] = {{TPM2_CC_CreatePrimary, "CreatePrimary"},
                {TPM2_CC_StartAuthSession, "StartAuthSession"},
                {TPM2_CC_PolicySecret, "PolicySecret"},
                {TPM2_CC_PolicyPCR, "PolicyPCR"},
                {TPM2_CC_PolicyNV, "PolicyNV"},
                {TPM2_CC_PolicyCommandCode, "PolicyCommandCode"},
                {TPM2_CC_PolicyGetDigest, "PolicyGetDigest"},
                {TPM2_CC_PolicyAuthorize, "PolicyAuthorize"},
                {TPM2_CC_Import, "Import"},
                {TPM2_CC_Load, "Load"},
                {TPM2_CC_LoadExternal, "LoadExternal"},
                {TPM2_CC_VerifySignature, "VerifySignature"},
                {TPM2_CC_Unseal, "Unseal"},
                {TPM2_CC_GetRandom, "GetRandom"},
                {TPM2_CC_FlushContext, "FlushContext"},
                {TPM2_CC_PCR_Read, "PCR_Read"},
                {TPM2_CC_PCR_Extend, "PCR_Extend"},
                {TPM2_CC_NV_ReadPublic, "NV_ReadPublic"},
                {TPM2_CC_NV_Read, "NV_Read"},
                {TPM2_CC_ReadPublic, "ReadPublic"},
                {TPM2_CC_ReadClock, "ReadClock"},
                {TPM2_CC_GetCapability, "GetCapability"},
                {TPM2_CC_Quote, "Quote"}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        if (rows[i].command == command) {
            return rows[i].name;
        }
    }
    return "other";
}
