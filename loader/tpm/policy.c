/* Policy digests computed without a TPM, and the list of signed states.
 *
 * Formulae: TPM 2.0 Library Part 3, PolicyPCR (23.7), PolicyNV (23.9), PolicyCommandCode (23.11),
 * PolicyAuthorize (23.16). */
#include "loader/tpm/internal.h"

#include <string.h>

#include "runtime/base/cursor.h"

#define CC_POLICY_NV           0x00000149u
#define CC_POLICY_AUTHORIZE    0x0000016Au
#define CC_POLICY_COMMAND_CODE 0x0000016Cu
#define CC_POLICY_PCR          0x0000017Fu
#define EO_UNSIGNED_LE         0x0009u
#define LIST_VERSION           1u

/* digest := H(digest ‖ what be holds) */
static enum cm_status extend(uint8_t digest[static CM_DIGEST_BYTES], const struct cm_be *be,
                             struct cm_error *err)
{
    uint8_t old[CM_DIGEST_BYTES];
    memcpy(old, digest, sizeof(old));
    struct cm_be before = {old, sizeof(old), sizeof(old), false};
    return cm_tpm_hash(digest, err, &before, be);
}

enum cm_status cm_policy_authorize_digest(const uint8_t policy_key[static CM_PUBLIC_KEY_BYTES],
                                          const char *policy_ref,
                                          uint8_t ret_digest[static CM_DIGEST_BYTES],
                                          struct cm_error *err)
{
    uint8_t area[160], name[CM_TPM_NAME_BYTES], bytes[128];
    struct cm_be public = {area, sizeof(area), 0, false};
    cm_tpm_authority_public(policy_key, &public);
    enum cm_status status = cm_tpm_name(area, public.used, name, err);
    memset(ret_digest, 0, CM_DIGEST_BYTES);
    struct cm_be part = {bytes, sizeof(bytes), 0, false};
    cm_be_u32(&part, CC_POLICY_AUTHORIZE);
    cm_be_bytes(&part, name, sizeof(name));
    if (status == CM_OK) {
        status = extend(ret_digest, &part, err);
    }
    part.used = 0;
    cm_be_bytes(&part, policy_ref, strnlen(policy_ref, CM_POLICY_REF_BYTES_MAX - 1));
    return status == CM_OK ? extend(ret_digest, &part, err) : status;
}

static enum cm_status pcr_extend(const struct cm_policy_state *state,
                                 uint8_t digest[static CM_DIGEST_BYTES], struct cm_error *err)
{
    uint8_t values[CM_POLICY_PCRS_MAX * CM_DIGEST_BYTES], value_digest[CM_DIGEST_BYTES], bytes[64];
    uint8_t bitmap[3] = {0};
    struct cm_be all = {values, sizeof(values), 0, false};
    for (uint32_t i = 0; i < state->pcr_count; i++) {
        bitmap[state->pcrs[i] / 8] =
            (uint8_t)(bitmap[state->pcrs[i] / 8] | 1u << (state->pcrs[i] % 8));
        cm_be_bytes(&all, state->pcr_values[i], CM_DIGEST_BYTES);
    }
    enum cm_status status = cm_tpm_hash(value_digest, err, &all, NULL);
    struct cm_be part = {bytes, sizeof(bytes), 0, false};
    cm_be_u32(&part, CC_POLICY_PCR);
    cm_be_u32(&part, 1); /* one bank */
    cm_be_u16(&part, CM_TPM_ALG_SHA256);
    cm_be_bytes(&part, "\3", 1);
    cm_be_bytes(&part, bitmap, sizeof(bitmap));
    cm_be_bytes(&part, value_digest, sizeof(value_digest));
    return status == CM_OK ? extend(digest, &part, err) : status;
}

static enum cm_status counter_extend(const struct cm_policy_state *state,
                                     uint8_t digest[static CM_DIGEST_BYTES], struct cm_error *err)
{
    uint8_t operand[16], operand_digest[CM_DIGEST_BYTES], bytes[128];
    struct cm_be arguments = {operand, sizeof(operand), 0, false};
    cm_be_u64(&arguments, state->counter_max);
    cm_be_u16(&arguments, 0); /* offset */
    cm_be_u16(&arguments, EO_UNSIGNED_LE);
    enum cm_status status = cm_tpm_hash(operand_digest, err, &arguments, NULL);
    struct cm_be part = {bytes, sizeof(bytes), 0, false};
    cm_be_u32(&part, CC_POLICY_NV);
    cm_be_bytes(&part, operand_digest, sizeof(operand_digest));
    cm_be_bytes(&part, state->counter_name, sizeof(state->counter_name));
    return status == CM_OK ? extend(digest, &part, err) : status;
}

enum cm_status cm_policy_state_digest(const struct cm_policy_state *state,
                                      uint8_t ret_digest[static CM_DIGEST_BYTES],
                                      struct cm_error *err)
{
    uint8_t bytes[16];
    memset(ret_digest, 0, CM_DIGEST_BYTES);
    enum cm_status status = pcr_extend(state, ret_digest, err);
    if (status == CM_OK) {
        status = counter_extend(state, ret_digest, err);
    }
    struct cm_be part = {bytes, sizeof(bytes), 0, false};
    cm_be_u32(&part, CC_POLICY_COMMAND_CODE);
    cm_be_u32(&part, CM_TPM_CC_UNSEAL);
    return status == CM_OK ? extend(ret_digest, &part, err) : status;
}

enum cm_status cm_policy_state_to_sign(const struct cm_policy_state *state,
                                       uint8_t ret_digest[static CM_DIGEST_BYTES],
                                       struct cm_error *err)
{
    enum cm_status status = cm_policy_state_digest(state, ret_digest, err);
    size_t size = strnlen(state->policy_ref, sizeof(state->policy_ref));
    struct cm_be part = {(uint8_t *)state->policy_ref, size, size, false};
    return status == CM_OK ? extend(ret_digest, &part, err) : status;
}

/* ------------------------------------------------------------------ the list */

enum cm_status cm_policy_list_encode(const struct cm_policy_list *list, uint8_t *ret_bytes,
                                     size_t size, size_t *ret_used, struct cm_error *err)
{
    struct cm_writer writer = cm_writer_init(ret_bytes, size);
    cm_writer_bytes(&writer, "CMPOLCY", 8);
    cm_writer_u32(&writer, LIST_VERSION);
    cm_writer_u32(&writer, list->count);
    for (uint32_t i = 0; i < list->count; i++) {
        const struct cm_policy_state *state = &list->states[i];
        cm_writer_u32(&writer, state->pcr_count);
        for (uint32_t k = 0; k < state->pcr_count; k++) {
            cm_writer_u32(&writer, state->pcrs[k]);
            cm_writer_bytes(&writer, state->pcr_values[k], CM_DIGEST_BYTES);
        }
        cm_writer_u64(&writer, state->counter_max);
        cm_writer_bytes(&writer, state->counter_name, sizeof(state->counter_name));
        cm_writer_bytes(&writer, state->policy_ref, sizeof(state->policy_ref));
        cm_writer_bytes(&writer, state->signature, sizeof(state->signature));
    }
    if (writer.failed) {
        return cm_error_set(err, CM_E_BUG, "CM-SEAL-FORM", "no room for the policy list");
    }
    *ret_used = writer.offset;
    return CM_OK;
}

static bool state_take(struct cm_cursor *cursor, struct cm_policy_state *state)
{
    state->pcr_count = cm_cursor_u32(cursor);
    if (state->pcr_count < 1 || state->pcr_count > CM_POLICY_PCRS_MAX) {
        return false;
    }
    for (uint32_t k = 0; k < state->pcr_count; k++) {
        state->pcrs[k] = cm_cursor_u32(cursor);
        cm_cursor_copy(cursor, state->pcr_values[k], CM_DIGEST_BYTES);
        if (state->pcrs[k] > 23 || (k > 0 && state->pcrs[k] <= state->pcrs[k - 1])) {
            return false;
        }
    }
    state->counter_max = cm_cursor_u64(cursor);
    cm_cursor_copy(cursor, state->counter_name, sizeof(state->counter_name));
    cm_cursor_copy(cursor, state->policy_ref, sizeof(state->policy_ref));
    cm_cursor_copy(cursor, state->signature, sizeof(state->signature));
    /* Terminated, and zeros after that: one form only. */
    size_t used = strnlen(state->policy_ref, sizeof(state->policy_ref));
    for (size_t i = used; i < sizeof(state->policy_ref); i++) {
        used += state->policy_ref[i] != '\0' ? sizeof(state->policy_ref) : 0;
    }
    return cm_cursor_ok(cursor) && used < sizeof(state->policy_ref);
}

enum cm_status cm_policy_list_parse(const uint8_t *bytes, size_t size, const uint8_t *policy_key,
                                    struct cm_policy_list *ret_list, struct cm_error *err)
{
    struct cm_policy_list list = {.count = 0};
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    const uint8_t *mark = cm_cursor_take(&cursor, 8);
    if (mark == NULL || memcmp(mark, "CMPOLCY", 8) != 0 || cm_cursor_u32(&cursor) != LIST_VERSION) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                            "policy list: not a list of this version: ask the owner to sign again");
    }
    list.count = cm_cursor_u32(&cursor);
    if (list.count > CM_POLICY_ENTRIES_MAX) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                            "policy list: %u states, at most %u", list.count,
                            CM_POLICY_ENTRIES_MAX);
    }
    for (uint32_t i = 0; i < list.count; i++) {
        uint8_t digest[CM_DIGEST_BYTES];
        if (!state_take(&cursor, &list.states[i])) {
            return cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                                "policy list: state %u of %u is "
                                "cut or malformed",
                                i, list.count);
        }
        if (policy_key != NULL &&
            (cm_policy_state_to_sign(&list.states[i], digest, err) != CM_OK ||
             !cm_tpm_signature_good(policy_key, digest, list.states[i].signature))) {
            return cm_error_set(
                err, CM_E_POLICY, "CM-SEAL-SIGNATURE",
                "policy list: state %u is not signed by the pinned authority: sealed: "
                "policy_authority must name its public key",
                i);
        }
    }
    if (!cm_cursor_ok(&cursor) || cm_cursor_left(&cursor) != 0) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                            "policy list: it is cut, or bytes follow its end");
    }
    *ret_list = list;
    return CM_OK;
}
