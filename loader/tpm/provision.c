/* Enrolment of a node: its keys, its counter, and the record that tells the outside of them. */
#include "loader/tpm/tpm_internal.h"

#include <stdio.h>
#include <string.h>

#define NV_PIECE_BYTES 512u      /* TPM_PT_NV_BUFFER_MAX is at least that */
#define RC_LAYER       0xff0000u /* 0: the TPM itself answered */
#define RC_FORMAT_ONE  0xbfu /* Part 2, section 6.6: the code without the number of the handle */

static const TPM2B_DATA no_data = {.size = 0};
static const TPML_PCR_SELECTION no_pcrs = {.count = 0};
static const TPM2B_SENSITIVE_CREATE no_sensitive = {.size = 0};

static bool persistent_open(struct cm_tpm *tpm, TPM2_HANDLE handle, ESYS_TR *ret)
{
    return Esys_TR_FromTPMPublic(tpm->esys, handle, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE,
                                 ret) == TSS2_RC_SUCCESS;
}

/* Make a transient key persistent; the transient one is flushed. */
static enum cm_status key_keep(struct cm_tpm *tpm, ESYS_TR *transient, TPM2_HANDLE handle,
                               ESYS_TR *ret, struct cm_error *err)
{
    enum cm_status status =
        cm_tpm_result(Esys_EvictControl(tpm->esys, ESYS_TR_RH_OWNER, *transient, ESYS_TR_PASSWORD,
                                        ESYS_TR_NONE, ESYS_TR_NONE, handle, ret),
                      "EvictControl", err);
    cm_tpm_flush(tpm, transient);
    return status;
}

static enum cm_status srk_make(struct cm_tpm *tpm, ESYS_TR *ret, struct cm_error *err)
{
    const TPM2B_PUBLIC template = cm_tpm_ecc_template(CM_TPM_SRK_ATTRIBUTES, false);
    ESYS_TR transient = ESYS_TR_NONE;
    if (persistent_open(tpm, CM_SRK_HANDLE, ret)) {
        return CM_OK;
    }
    enum cm_status status =
        cm_tpm_primary_create(tpm, ESYS_TR_RH_OWNER, &template, "CreatePrimary of the storage key",
                              &transient, NULL, err);
    return status == CM_OK ? key_keep(tpm, &transient, CM_SRK_HANDLE, ret, err) : status;
}

static enum cm_status ak_make(struct cm_tpm *tpm, ESYS_TR srk, ESYS_TR *ret, struct cm_error *err)
{
    TPM2B_PUBLIC template = cm_tpm_ecc_template(CM_TPM_AK_ATTRIBUTES, true), *public = NULL;
    TPM2B_PRIVATE *private = NULL;
    TPM2B_CREATION_DATA *creation = NULL;
    TPM2B_DIGEST *hash = NULL;
    TPMT_TK_CREATION *ticket = NULL;
    ESYS_TR transient = ESYS_TR_NONE;
    if (persistent_open(tpm, CM_AK_HANDLE, ret)) {
        return CM_OK;
    }
    enum cm_status status = cm_tpm_result(
        Esys_Create(tpm->esys, srk, ESYS_TR_PASSWORD, ESYS_TR_NONE, ESYS_TR_NONE, &no_sensitive,
                    &template, &no_data, &no_pcrs, &private, &public, &creation, &hash, &ticket),
        "Create of the attestation key", err);
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_Load(tpm->esys, srk, ESYS_TR_PASSWORD, ESYS_TR_NONE,
                                         ESYS_TR_NONE, private, public, &transient),
                               "Load of the attestation key", err);
    }
    if (status == CM_OK) {
        status = key_keep(tpm, &transient, CM_AK_HANDLE, ret, err);
    }
    Esys_Free(private);
    Esys_Free(public);
    Esys_Free(creation);
    Esys_Free(hash);
    Esys_Free(ticket);
    return status;
}

/* Find or define the node's counter; a new one is stepped once, so that its name is final. */
static enum cm_status counter_make(struct cm_tpm *tpm, const uint8_t node[static CM_DIGEST_BYTES],
                                   ESYS_TR *ret, struct cm_error *err)
{
    const TPM2B_AUTH no_auth = {.size = 0};
    TPM2B_NV_PUBLIC public = {.nvPublic = {.nvIndex = CM_COUNTER_HANDLE,
                                           .nameAlg = TPM2_ALG_SHA256,
                                           .attributes = CM_TPM_COUNTER_ATTRIBUTES,
                                           .dataSize = 8}};
    if (persistent_open(tpm, CM_COUNTER_HANDLE, ret)) {
        return CM_OK;
    }
    public.nvPublic.authPolicy.size = CM_DIGEST_BYTES; /* see cm_tpm_counter_name */
    memcpy(public.nvPublic.authPolicy.buffer, node, CM_DIGEST_BYTES);
    enum cm_status status =
        cm_tpm_result(Esys_NV_DefineSpace(tpm->esys, ESYS_TR_RH_OWNER, ESYS_TR_PASSWORD,
                                          ESYS_TR_NONE, ESYS_TR_NONE, &no_auth, &public, ret),
                      "NV_DefineSpace of the counter", err);
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_NV_Increment(tpm->esys, ESYS_TR_RH_OWNER, *ret,
                                                 ESYS_TR_PASSWORD, ESYS_TR_NONE, ESYS_TR_NONE),
                               "NV_Increment", err);
    }
    return status;
}

static enum cm_status name_take(struct cm_tpm *tpm, ESYS_TR object,
                                uint8_t ret_name[CM_TPM_NAME_BYTES], struct cm_error *err)
{
    TPM2B_NAME *name = NULL;
    enum cm_status status = cm_tpm_result(Esys_TR_GetName(tpm->esys, object, &name), "name", err);
    if (status == CM_OK && name->size != CM_TPM_NAME_BYTES) {
        status = cm_error_set(err, CM_E_TPM, "CM-TPM-NAME", "a TPM object has no SHA-256 name");
    }
    if (status == CM_OK) {
        memcpy(ret_name, name->name, CM_TPM_NAME_BYTES);
    }
    Esys_Free(name);
    return status;
}

static enum cm_status public_take(struct cm_tpm *tpm, ESYS_TR object, uint8_t *ret_bytes,
                                  uint32_t *ret_size, struct cm_error *err)
{
    TPM2B_PUBLIC *public = NULL;
    TPM2B_NAME *name = NULL, *qualified = NULL;
    enum cm_status status =
        cm_tpm_result(Esys_ReadPublic(tpm->esys, object, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE,
                                      &public, &name, &qualified),
                      "ReadPublic", err);
    if (status == CM_OK) {
        status = cm_tpm_public_marshal(public, ret_bytes, ret_size, err);
    }
    Esys_Free(public);
    Esys_Free(name);
    Esys_Free(qualified);
    return status;
}

/* Sign the record. The key is restricted: the TPM must hash the data itself to give a ticket. */
static enum cm_status record_sign(struct cm_tpm *tpm, ESYS_TR ak, struct cm_enrolment *e,
                                  struct cm_error *err)
{
    uint8_t bytes[CM_ENROLMENT_BYTES_MAX];
    size_t used = 0;
    TPM2B_MAX_BUFFER data = {.size = 0};
    TPM2B_DIGEST *digest = NULL;
    TPMT_TK_HASHCHECK *ticket = NULL;
    TPMT_SIGNATURE *signature = NULL;
    const TPMT_SIG_SCHEME scheme = {.scheme = TPM2_ALG_NULL};
    enum cm_status status = cm_enrolment_encode(e, bytes, sizeof(bytes), &used, err);
    used -= sizeof(e->signature) + e->ek_certificate_bytes; /* neither is signed */
    if (status == CM_OK && used > sizeof(data.buffer)) {
        status = cm_error_set(err, CM_E_BUG, "CM-SEAL-FORM", "record too long for one TPM2_Hash");
    }
    if (status == CM_OK) {
        data.size = (UINT16)used;
        memcpy(data.buffer, bytes, used);
        status = cm_tpm_result(Esys_Hash(tpm->esys, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE, &data,
                                         TPM2_ALG_SHA256, ESYS_TR_RH_OWNER, &digest, &ticket),
                               "Hash", err);
    }
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_Sign(tpm->esys, ak, ESYS_TR_PASSWORD, ESYS_TR_NONE,
                                         ESYS_TR_NONE, digest, &scheme, ticket, &signature),
                               "Sign", err);
    }
    if (status == CM_OK) {
        status = cm_tpm_signature_take(signature, e->signature, err);
    }
    Esys_Free(digest);
    Esys_Free(ticket);
    Esys_Free(signature);
    return status;
}

static enum cm_status ek_take(struct cm_tpm *tpm, struct cm_enrolment *e, struct cm_error *err)
{
    ESYS_TR ek = ESYS_TR_NONE;
    TPM2B_PUBLIC *public = NULL;
    uint8_t name[CM_TPM_NAME_BYTES];
    enum cm_status status = cm_tpm_ek_create(tpm, &ek, &public, err);
    if (status == CM_OK) {
        status = cm_tpm_public_marshal(public, e->ek_public, &e->ek_public_bytes, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_name(e->ek_public, e->ek_public_bytes, name, err);
    }
    if (status == CM_OK) {
        memcpy(e->node, name + 2, CM_DIGEST_BYTES);
    }
    Esys_Free(public);
    cm_tpm_flush(tpm, &ek);
    return status;
}

/* Read an NV index that is as long as `size`, in pieces that every TPM takes. */
static enum cm_status index_read(struct cm_tpm *tpm, ESYS_TR index, ESYS_TR by, uint32_t size,
                                 uint8_t *ret_bytes, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    for (uint32_t at = 0; status == CM_OK && at < size;) {
        uint32_t piece = size - at < NV_PIECE_BYTES ? size - at : NV_PIECE_BYTES;
        TPM2B_MAX_NV_BUFFER *data = NULL;
        status = cm_tpm_result(Esys_NV_Read(tpm->esys, by, index, ESYS_TR_PASSWORD, ESYS_TR_NONE,
                                            ESYS_TR_NONE, (UINT16)piece, (UINT16)at, &data),
                               "NV_Read of the endorsement key's certificate", err);
        if (status == CM_OK && data->size != piece) {
            status = cm_error_set(err, CM_E_TPM, "CM-TPM-COMMAND", "NV_Read gave %u bytes of %u",
                                  data->size, piece);
        }
        if (status == CM_OK) {
            memcpy(ret_bytes + at, data->buffer, piece);
            at += piece;
        }
        Esys_Free(data);
    }
    return status;
}

/* What the TPM holds as certificate of its EK, if anything: a verifier judges it, not we. An index
 * may be longer than the certificate; its header says how long that is. */
static enum cm_status certificate_take(struct cm_tpm *tpm, struct cm_enrolment *e,
                                       struct cm_error *err)
{
    ESYS_TR index = ESYS_TR_NONE;
    TPM2B_NV_PUBLIC *public = NULL;
    uint8_t *der = e->ek_certificate;
    TSS2_RC code = Esys_TR_FromTPMPublic(tpm->esys, CM_EK_CERTIFICATE_HANDLE, ESYS_TR_NONE,
                                         ESYS_TR_NONE, ESYS_TR_NONE, &index);
    if ((code & RC_FORMAT_ONE) == TPM2_RC_HANDLE) {
        return CM_OK; /* there is none */
    }
    enum cm_status status = cm_tpm_result(code, "NV_ReadPublic of the certificate", err);
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_NV_ReadPublic(tpm->esys, index, ESYS_TR_NONE, ESYS_TR_NONE,
                                                  ESYS_TR_NONE, &public, NULL),
                               "NV_ReadPublic of the certificate", err);
    }
    if (status == CM_OK) {
        const TPMS_NV_PUBLIC *facts = &public->nvPublic;
        uint32_t size =
            facts->dataSize < CM_EK_CERTIFICATE_MAX ? facts->dataSize : CM_EK_CERTIFICATE_MAX;
        ESYS_TR by = (facts->attributes & TPMA_NV_AUTHREAD) != 0 ? index : ESYS_TR_RH_OWNER;
        status = index_read(tpm, index, by, size, der, err);
        uint32_t stated = size > 4 && der[0] == 0x30 && der[1] == 0x82
                              ? 4u + (uint32_t)(der[2] << 8 | der[3])
                              : size;
        e->ek_certificate_bytes = stated < size ? stated : size;
    }
    if (index != ESYS_TR_NONE) {
        (void)Esys_TR_Close(tpm->esys, &index);
    }
    Esys_Free(public);
    return status;
}

enum cm_status cm_tpm_provision(struct cm_tpm *tpm, const char *node_name, bool development,
                                struct cm_enrolment *ret_enrolment, struct cm_error *err)
{
    struct cm_enrolment e = {
        .development = development, .counter_handle = CM_COUNTER_HANDLE, .pcr = CM_PCR_DEFAULT};
    ESYS_TR srk = ESYS_TR_NONE, ak = ESYS_TR_NONE, counter = ESYS_TR_NONE;
    snprintf(e.node_name, sizeof(e.node_name), "%s", node_name);
    enum cm_status status = cm_tpm_pcr_read(tpm, e.pcr, e.pcr_value, err);
    if (status == CM_OK) {
        status = ek_take(tpm, &e, err);
    }
    if (status == CM_OK) {
        status = certificate_take(tpm, &e, err);
    }
    if (status == CM_OK) {
        status = srk_make(tpm, &srk, err);
    }
    if (status == CM_OK) {
        status = public_take(tpm, srk, e.srk_public, &e.srk_public_bytes, err);
    }
    if (status == CM_OK) {
        status = ak_make(tpm, srk, &ak, err);
    }
    if (status == CM_OK) {
        status = public_take(tpm, ak, e.ak_public, &e.ak_public_bytes, err);
    }
    if (status == CM_OK) {
        status = counter_make(tpm, e.node, &counter, err);
    }
    /* Known anew, so that the name has its WRITTEN bit. */
    if (status == CM_OK) {
        (void)Esys_TR_Close(tpm->esys, &counter);
        status = persistent_open(tpm, CM_COUNTER_HANDLE, &counter)
                     ? name_take(tpm, counter, e.counter_name, err)
                     : cm_error_set(err, CM_E_TPM, "CM-TPM-COUNTER", "the counter is gone again");
    }
    if (status == CM_OK) {
        status = cm_tpm_counter_read(tpm, counter, &e.counter_value, err);
    }
    if (status == CM_OK) {
        status = record_sign(tpm, ak, &e, err);
    }
    if (status == CM_OK) {
        *ret_enrolment = e;
    }
    return status;
}

enum cm_status cm_tpm_credential_answer(struct cm_tpm *tpm, const uint8_t *bytes, size_t size,
                                        uint8_t ret_secret[static CM_DIGEST_BYTES],
                                        struct cm_error *err)
{
    struct cm_credential parts;
    TPM2B_ID_OBJECT object = {.size = 0};
    TPM2B_ENCRYPTED_SECRET seed = {.size = 0};
    TPM2B_PUBLIC *public = NULL;
    TPM2B_DIGEST *secret = NULL;
    ESYS_TR ek = ESYS_TR_NONE, ak = ESYS_TR_NONE, session = ESYS_TR_NONE;
    if (!cm_credential_parse(bytes, size, &parts) ||
        parts.object_size > sizeof(object.credential) || parts.seed_size > sizeof(seed.secret)) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-CHALLENGE",
                            "this is no challenge: `casemate-pack challenge` makes one");
    }
    object.size = parts.object_size;
    memcpy(object.credential, parts.object, parts.object_size);
    seed.size = parts.seed_size;
    memcpy(seed.secret, parts.seed, parts.seed_size);
    enum cm_status status = persistent_open(tpm, CM_AK_HANDLE, &ak)
                                ? CM_OK
                                : cm_error_set(err, CM_E_POLICY, "CM-SEAL-NODE",
                                               "the TPM has no attestation key: enrol the node "
                                               "with `casemate init`");
    if (status == CM_OK) {
        status = cm_tpm_ek_create(tpm, &ek, &public, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_ek_session(tpm, &session, err);
    }
    if (status == CM_OK) {
        TSS2_RC code = Esys_ActivateCredential(tpm->esys, ak, ek, ESYS_TR_PASSWORD, session,
                                               ESYS_TR_NONE, &object, &seed, &secret);
        status = cm_tpm_result(code, "ActivateCredential", err);
        if (status != CM_OK && (code & RC_LAYER) == 0) {
            status = cm_error_set(err, CM_E_POLICY, "CM-SEAL-CHALLENGE",
                                  "the challenge is for other keys than this TPM's (TPM response "
                                  "0x%x): was it made from this node's enrolment record?",
                                  code);
        }
    }
    if (status == CM_OK && secret->size != CM_DIGEST_BYTES) {
        status = cm_error_set(err, CM_E_POLICY, "CM-SEAL-CHALLENGE", "the secret has another size");
    }
    if (status == CM_OK) {
        memcpy(ret_secret, secret->buffer, CM_DIGEST_BYTES);
    }
    Esys_Free(secret);
    Esys_Free(public);
    cm_tpm_flush(tpm, &session);
    cm_tpm_flush(tpm, &ek);
    return status;
}
