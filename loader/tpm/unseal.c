/* Unsealing: import, policy, release. The way, with what each step needs of the TPM's three
 * sessions and three object places: policy session, salted to the storage key (its key is pinned:
 * an impostor cannot answer) → EK → Import → Load (object) → flush EK → PolicyPCR → PolicyNV →
 * PolicyCommandCode: the digest must be that of a signed state → LoadExternal (authority) →
 * VerifySignature → PolicyAuthorize → flush authority → Unseal: the session both authorises and
 * encrypts the answer */
#include "loader/tpm/tpm_internal.h"

#include <stdio.h>
#include <string.h>

#include <tss2/tss2_mu.h>

#define ATTEMPTS       5
#define RC_PCR_CHANGED 0x128u
#define RC_POLICY_FAIL 0x99du
#define RC_NUMBER      0xf40u /* of the handle, parameter or session: TPM 2.0 Part 2, 6.6.2 */
#define EO_UNSIGNED_LE 0x0009u
#define OBJECT_PLACES  3

struct unsealing {
    struct cm_tpm *tpm;
    const struct cm_enrolment *enrolment;
    const struct cm_policy_state *state;
    struct cm_tpm_sealed sealed;
    ESYS_TR srk, counter, session, ek, object, authority;
};

static enum cm_status refuse(struct cm_error *err, const char *id, const char *what)
{
    return cm_error_set(err, CM_E_POLICY, id, "%s", what);
}

static enum cm_status object_open(struct unsealing *u, uint32_t handle, const char *what,
                                  ESYS_TR *ret, struct cm_error *err)
{
    TSS2_RC code =
        Esys_TR_FromTPMPublic(u->tpm->esys, handle, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE, ret);
    /* Only the TPM's own "no such handle" says so; one that fails or goes says nothing of the node.
     */
    if ((code & ~RC_NUMBER) == TPM2_RC_HANDLE) {
        return cm_error_set(
            err, CM_E_POLICY, "CM-SEAL-NODE",
            "the TPM has no %s at 0x%x: it was cleared or is another one; enrol the "
            "node again with `casemate init`",
            what, handle);
    }
    return cm_tpm_result(code, what, err);
}

/* Is this the TPM of the enrolment record? Names of the storage key and the counter say so. */
static enum cm_status node_check(struct unsealing *u, struct cm_error *err)
{
    uint8_t wanted[CM_TPM_NAME_BYTES];
    TPM2B_NAME *srk = NULL, *counter = NULL;
    enum cm_status status = object_open(u, CM_SRK_HANDLE, "storage key", &u->srk, err);
    if (status == CM_OK) {
        status = object_open(u, u->enrolment->counter_handle, "counter", &u->counter, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_name(u->enrolment->srk_public, u->enrolment->srk_public_bytes, wanted, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_TR_GetName(u->tpm->esys, u->srk, &srk), "name", err);
    }
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_TR_GetName(u->tpm->esys, u->counter, &counter), "name", err);
    }
    if (status == CM_OK &&
        (srk->size != sizeof(wanted) || counter->size != sizeof(wanted) ||
         memcmp(srk->name, wanted, sizeof(wanted)) != 0 ||
         memcmp(counter->name, u->enrolment->counter_name, sizeof(wanted)) != 0)) {
        status =
            refuse(err, "CM-SEAL-NODE",
                   "this is not the TPM of the enrolment record: use the node's own record, or "
                   "enrol it again with `casemate init`");
    }
    Esys_Free(srk);
    Esys_Free(counter);
    return status;
}

/* Choose the signed state that the machine is in, and say what differs if there is none. */
static enum cm_status state_choose(struct unsealing *u, const struct cm_policy_list *list,
                                   struct cm_error *err)
{
    uint64_t counter;
    enum cm_status status = cm_tpm_counter_read(u->tpm, u->counter, &counter, err);
    enum cm_status answer = refuse(err != NULL && status == CM_OK ? err : NULL, "CM-SEAL-POLICY",
                                   "no signed policy for this node and package: put the owner's "
                                   "policy list beside the package (<package>.policy)");
    for (uint32_t i = 0; status == CM_OK && i < list->count; i++) {
        const struct cm_policy_state *state = &list->states[i];
        bool same = true;
        if (strcmp(state->policy_ref, u->sealed.policy_ref) != 0 ||
            memcmp(state->counter_name, u->enrolment->counter_name, CM_TPM_NAME_BYTES) != 0) {
            continue;
        }
        for (uint32_t k = 0; status == CM_OK && same && k < state->pcr_count; k++) {
            uint8_t value[CM_DIGEST_BYTES];
            status = cm_tpm_pcr_read(u->tpm, state->pcrs[k], value, err);
            same = status == CM_OK && memcmp(value, state->pcr_values[k], sizeof(value)) == 0;
            if (status == CM_OK && !same) {
                answer = cm_error_set(
                    err, CM_E_POLICY, "CM-SEAL-PCR",
                    "PCR %u is %02x%02x%02x%02x..., the signed state has "
                    "%02x%02x%02x%02x... (`casemate policy explain --against FILE` names what "
                    "differs): reboot into the approved state, or ask the owner to sign this one",
                    state->pcrs[k], value[0], value[1], value[2], value[3], state->pcr_values[k][0],
                    state->pcr_values[k][1], state->pcr_values[k][2], state->pcr_values[k][3]);
            }
        }
        if (same && counter <= state->counter_max) {
            u->state = state;
            return CM_OK;
        }
        if (same) {
            answer =
                cm_error_set(err, CM_E_POLICY, "CM-SEAL-COUNTER",
                             "the node's counter is %llu, the policy is signed up to %llu: it was "
                             "revoked; ask the owner for a new policy list",
                             (unsigned long long)counter, (unsigned long long)state->counter_max);
        }
    }
    return status == CM_OK ? answer : status;
}

static enum cm_status session_start(struct unsealing *u, struct cm_error *err)
{
    const TPMT_SYM_DEF aes = {
        .algorithm = TPM2_ALG_AES, .keyBits.aes = 128, .mode.aes = TPM2_ALG_CFB};
    enum cm_status status =
        cm_tpm_result(Esys_StartAuthSession(u->tpm->esys, u->srk, ESYS_TR_NONE, ESYS_TR_NONE,
                                            ESYS_TR_NONE, ESYS_TR_NONE, NULL, TPM2_SE_POLICY, &aes,
                                            TPM2_ALG_SHA256, &u->session),
                      "StartAuthSession", err);
    if (status == CM_OK) {
        const TPMA_SESSION attributes = TPMA_SESSION_CONTINUESESSION | TPMA_SESSION_ENCRYPT;
        status = cm_tpm_result(
            Esys_TRSess_SetAttributes(u->tpm->esys, u->session, attributes, attributes),
            "session attributes", err);
    }
    return status;
}

static enum cm_status sealed_refused(TSS2_RC code, const char *command, struct cm_error *err)
{
    enum cm_status status = cm_tpm_result(code, command, err);
    if (status != CM_OK && (code & 0xfc0000u) == 0) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-OBJECT",
                            "%s refused the sealed key (TPM response 0x%x): the package's slot was "
                            "changed, or is for another TPM",
                            command, code);
    }
    return status;
}

static enum cm_status parts_unmarshal(const struct cm_tpm_sealed *sealed, TPM2B_PUBLIC *ret_public,
                                      TPM2B_PRIVATE *ret_duplicate,
                                      TPM2B_ENCRYPTED_SECRET *ret_seed, struct cm_error *err)
{
    size_t used = 0;
    if (sealed->duplicate_size > sizeof(ret_duplicate->buffer) ||
        sealed->seed_size > sizeof(ret_seed->secret) ||
        Tss2_MU_TPM2B_PUBLIC_Unmarshal(sealed->public_bytes, sealed->public_size, &used,
                                       ret_public) != TSS2_RC_SUCCESS ||
        used != sealed->public_size) {
        return refuse(err, "CM-SEAL-FORM", "the sealed key in the package's slot is malformed");
    }
    /* A policy means nothing beside USERWITHAUTH: only NODA may be set. */
    if (ret_public->publicArea.type != TPM2_ALG_KEYEDHASH ||
        ret_public->publicArea.objectAttributes != CM_TPMA_NO_DA) {
        return refuse(err, "CM-SEAL-OBJECT",
                      "the sealed object's attributes are not those of a sealed "
                      "key: it would open without its policy");
    }
    ret_duplicate->size = sealed->duplicate_size;
    memcpy(ret_duplicate->buffer, sealed->duplicate, sealed->duplicate_size);
    ret_seed->size = sealed->seed_size;
    memcpy(ret_seed->secret, sealed->seed, sealed->seed_size);
    return CM_OK;
}

/* Import and load under the endorsement key; each needs its policy satisfied afresh. */
static enum cm_status object_load(struct unsealing *u, struct cm_error *err)
{
    TPM2B_PUBLIC public = {.size = 0}, *ek_public = NULL;
    TPM2B_PRIVATE duplicate = {.size = 0}, *private = NULL;
    TPM2B_ENCRYPTED_SECRET seed = {.size = 0};
    const TPM2B_DATA no_key = {.size = 0};
    const TPMT_SYM_DEF_OBJECT no_wrapper = {.algorithm = TPM2_ALG_NULL};
    ESYS_TR session = ESYS_TR_NONE;
    enum cm_status status = parts_unmarshal(&u->sealed, &public, &duplicate, &seed, err);
    if (status == CM_OK) {
        status = cm_tpm_ek_create(u->tpm, &u->ek, &ek_public, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_ek_session(u->tpm, &session, err);
    }
    if (status == CM_OK) {
        status =
            sealed_refused(Esys_Import(u->tpm->esys, u->ek, session, ESYS_TR_NONE, ESYS_TR_NONE,
                                       &no_key, &public, &duplicate, &seed, &no_wrapper, &private),
                           "Import", err);
    }
    cm_tpm_flush(u->tpm, &session);
    if (status == CM_OK) {
        status = cm_tpm_ek_session(u->tpm, &session, err);
    }
    if (status == CM_OK) {
        status = sealed_refused(Esys_Load(u->tpm->esys, u->ek, session, ESYS_TR_NONE, ESYS_TR_NONE,
                                          private, &public, &u->object),
                                "Load", err);
    }
    cm_tpm_flush(u->tpm, &session);
    cm_tpm_flush(u->tpm, &u->ek);
    Esys_Free(private);
    Esys_Free(ek_public);
    return status;
}

/* The inner policy in the session; its digest must be that of the chosen state. */
static enum cm_status state_prove(struct unsealing *u, TPM2B_DIGEST *ret_digest,
                                  struct cm_error *err)
{
    const TPML_PCR_SELECTION selection = cm_tpm_selection(u->state->pcrs, u->state->pcr_count);
    const TPM2B_DIGEST any = {.size = 0};
    TPM2B_OPERAND operand = {.size = 8};
    TPM2B_DIGEST *found = NULL;
    uint8_t wanted[CM_DIGEST_BYTES];
    ESYS_CONTEXT *esys = u->tpm->esys;
    for (int i = 0; i < 8; i++) {
        operand.buffer[i] = (BYTE)(u->state->counter_max >> (56 - 8 * i));
    }
    TSS2_RC code = Esys_PolicyPCR(esys, u->session, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE, &any,
                                  &selection);
    if (code == TSS2_RC_SUCCESS) {
        code = Esys_PolicyNV(esys, u->counter, u->counter, u->session, ESYS_TR_PASSWORD,
                             ESYS_TR_NONE, ESYS_TR_NONE, &operand, 0, EO_UNSIGNED_LE);
    }
    if (code == TSS2_RC_SUCCESS) {
        code = Esys_PolicyCommandCode(esys, u->session, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE,
                                      TPM2_CC_Unseal);
    }
    if (code == TSS2_RC_SUCCESS) {
        code = Esys_PolicyGetDigest(esys, u->session, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE,
                                    &found);
    }
    enum cm_status status = cm_tpm_result(code, "policy", err);
    if (status == CM_OK) {
        status = cm_policy_state_digest(u->state, wanted, err);
    }
    if (status == CM_OK &&
        (found->size != sizeof(wanted) || memcmp(found->buffer, wanted, sizeof(wanted)) != 0)) {
        status = refuse(err, "CM-SEAL-PCR",
                        "the TPM's policy digest is not the signed state's: the "
                        "machine changed while it was asked; try again");
    }
    if (status == CM_OK) {
        *ret_digest = *found;
    }
    Esys_Free(found);
    return status;
}

static enum cm_status state_authorize(struct unsealing *u, const TPM2B_DIGEST *approved,
                                      const uint8_t policy_key[static CM_PUBLIC_KEY_BYTES],
                                      struct cm_error *err)
{
    uint8_t area[160], to_sign[CM_DIGEST_BYTES];
    struct cm_be marshalled = {area, sizeof(area), 0, false};
    TPM2B_PUBLIC public = {.size = 0};
    TPM2B_DIGEST digest = {.size = CM_DIGEST_BYTES};
    TPM2B_NONCE ref = {.size = (UINT16)strlen(u->state->policy_ref)};
    TPMT_SIGNATURE signature = {.sigAlg = TPM2_ALG_ECDSA};
    TPMT_TK_VERIFIED *ticket = NULL;
    TPM2B_NAME *name = NULL;
    size_t used = 0;
    ESYS_CONTEXT *esys = u->tpm->esys;
    cm_tpm_authority_public(policy_key, &marshalled);
    enum cm_status status = cm_tpm_result(
        Tss2_MU_TPM2B_PUBLIC_Unmarshal(area, marshalled.used, &used, &public), "unmarshal", err);
    if (status == CM_OK) {
        status = cm_policy_state_to_sign(u->state, to_sign, err);
    }
    memcpy(digest.buffer, to_sign, sizeof(to_sign));
    memcpy(ref.buffer, u->state->policy_ref, ref.size);
    signature.signature.ecdsa.hash = TPM2_ALG_SHA256;
    signature.signature.ecdsa.signatureR.size = 32;
    signature.signature.ecdsa.signatureS.size = 32;
    memcpy(signature.signature.ecdsa.signatureR.buffer, u->state->signature, 32);
    memcpy(signature.signature.ecdsa.signatureS.buffer, u->state->signature + 32, 32);
    if (status == CM_OK) {
        /* In the owner hierarchy: a ticket of the null hierarchy would be refused (0x4c4). */
        status = cm_tpm_result(Esys_LoadExternal(esys, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE,
                                                 NULL, &public, ESYS_TR_RH_OWNER, &u->authority),
                               "LoadExternal", err);
    }
    if (status == CM_OK &&
        Esys_VerifySignature(esys, u->authority, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE, &digest,
                             &signature, &ticket) != TSS2_RC_SUCCESS) {
        status =
            refuse(err, "CM-SEAL-SIGNATURE", "the policy is not signed by the pinned authority");
    }
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_TR_GetName(esys, u->authority, &name), "name", err);
    }
    if (status == CM_OK) {
        status = cm_tpm_result(Esys_PolicyAuthorize(esys, u->session, ESYS_TR_NONE, ESYS_TR_NONE,
                                                    ESYS_TR_NONE, approved, &ref, name, ticket),
                               "PolicyAuthorize", err);
    }
    Esys_Free(ticket);
    Esys_Free(name);
    cm_tpm_flush(u->tpm, &u->authority);
    return status;
}

static enum cm_status key_release(struct unsealing *u, struct cm_secret *key, struct cm_error *err)
{
    TPM2B_SENSITIVE_DATA *data = NULL;
    TPM2B_DIGEST *scrub = NULL;
    TSS2_RC code =
        Esys_Unseal(u->tpm->esys, u->object, u->session, ESYS_TR_NONE, ESYS_TR_NONE, &data);
    enum cm_status status = cm_tpm_result(code, "Unseal", err);
    if (code == RC_POLICY_FAIL) {
        status = refuse(err, "CM-SEAL-POLICY",
                        "the TPM refuses: the sealed key has another policy than the signed one");
    }
    if (status == CM_OK && data->size != CM_KEY_BYTES) {
        status = refuse(err, "CM-SEAL-OBJECT", "the sealed data is not a package key");
    }
    if (status == CM_OK) {
        memcpy(cm_secret_bytes(key), data->buffer, CM_KEY_BYTES);
    }
    if (data != NULL) {
        cm_wipe(data, sizeof(*data));
        Esys_Free(data);
    }
    /* ESYS keeps the decrypted answer in its buffer until the next command overwrites it. */
    if (Esys_GetRandom(u->tpm->esys, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE, 48, &scrub) ==
        TSS2_RC_SUCCESS) {
        Esys_Free(scrub);
    }
    return status;
}

static enum cm_status attempt(struct unsealing *u, const struct cm_policy_list *list,
                              const uint8_t policy_key[static CM_PUBLIC_KEY_BYTES],
                              struct cm_secret *key, struct cm_error *err)
{
    TPM2B_DIGEST approved = {.size = 0};
    enum cm_status status = state_choose(u, list, err);
    if (status == CM_OK) {
        status = session_start(u, err);
    }
    if (status == CM_OK) {
        status = object_load(u, err);
    }
    if (status == CM_OK) {
        status = state_prove(u, &approved, err);
    }
    if (status == CM_OK) {
        status = state_authorize(u, &approved, policy_key, err);
    }
    if (status == CM_OK) {
        status = key_release(u, key, err);
    }
    cm_tpm_flush(u->tpm, &u->session);
    cm_tpm_flush(u->tpm, &u->object);
    cm_tpm_flush(u->tpm, &u->ek);
    cm_tpm_flush(u->tpm, &u->authority);
    return status;
}

/* The development TPM leaves a flushed object's secret in its place until another object comes
 * there, and its memory is ordinary memory: so fill all three places once. (A real TPM's memory is
 * its own.) */
static enum cm_status places_overwrite(struct cm_tpm *tpm, struct cm_error *err)
{
    ESYS_TR keys[OBJECT_PLACES] = {ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE};
    enum cm_status status = CM_OK;
    for (int i = 0; status == CM_OK && i < OBJECT_PLACES; i++) {
        TPM2B_PUBLIC *public = NULL;
        status = cm_tpm_ek_create(tpm, &keys[i], &public, err);
        Esys_Free(public);
    }
    for (int i = 0; i < OBJECT_PLACES; i++) {
        cm_tpm_flush(tpm, &keys[i]);
    }
    return status;
}

enum cm_status cm_tpm_unseal(struct cm_tpm *tpm, const struct cm_enrolment *enrolment,
                             const uint8_t *payload, size_t payload_bytes,
                             const struct cm_policy_list *list,
                             const uint8_t policy_key[static CM_PUBLIC_KEY_BYTES],
                             struct cm_secret *key, struct cm_policy_state *ret_state,
                             struct cm_error *err)
{
    struct unsealing u = {.tpm = tpm,
                          .enrolment = enrolment,
                          .srk = ESYS_TR_NONE,
                          .counter = ESYS_TR_NONE,
                          .session = ESYS_TR_NONE,
                          .ek = ESYS_TR_NONE,
                          .object = ESYS_TR_NONE,
                          .authority = ESYS_TR_NONE};
    struct cm_error local = {.status = CM_OK};
    enum cm_status status = cm_tpm_sealed_parse(payload, payload_bytes, &u.sealed, err);
    if (status == CM_OK) {
        status = node_check(&u, err);
    }
    if (status == CM_OK) {
        /* Any PCR extend by anybody ends a policy session: the whole of it is begun again. */
        for (int i = 0; i < ATTEMPTS; i++) {
            status = attempt(&u, list, policy_key, key, &local);
            if (status == CM_OK || (uint32_t)local.subcode != RC_PCR_CHANGED) {
                break;
            }
        }
        if (status != CM_OK && err != NULL) {
            *err = local;
        }
    }
    if (status == CM_OK && enrolment->development) {
        status = places_overwrite(tpm, err);
    }
    if (status != CM_OK) {
        cm_wipe(cm_secret_bytes(key), CM_KEY_BYTES);
        return status;
    }
    *ret_state = *u.state;
    return CM_OK;
}
