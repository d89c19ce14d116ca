/* Sealing and unsealing against the real development TPM process: each refusal beside the success
 * that differs in that one thing. */
#include "tests/unit/tpm_scene.h"

static void refused(struct scene *s, const char *id)
{
    struct cm_error err = {.status = CM_OK};
    cr_assert_eq(unseal(s, &err), CM_E_POLICY, "%s: %s", err.id, err.text);
    cr_assert_str_eq(err.id, id, "%s: %s", err.id, err.text);
}

static struct scene scene;

Test(tpm_seal, provisioning_twice_gives_the_same_node_and_a_record_that_stands)
{
    struct cm_error err;
    struct cm_enrolment again, parsed;
    uint8_t bytes[CM_ENROLMENT_BYTES_MAX];
    size_t used;
    scene_make(&scene, state_new());
    cr_assert_eq(cm_tpm_provision(scene.tpm, "node", true, &again, &err), CM_OK, "%s", err.text);
    cr_assert_eq(memcmp(again.node, scene.enrolment.node, CM_DIGEST_BYTES), 0);
    cr_assert_eq(memcmp(again.ak_public, scene.enrolment.ak_public, again.ak_public_bytes), 0);
    cr_assert_eq(again.counter_value, scene.enrolment.counter_value);
    cr_assert_eq(cm_enrolment_encode(&again, bytes, sizeof(bytes), &used, &err), CM_OK);
    cr_assert_eq(cm_enrolment_parse(bytes, used, &parsed, &err), CM_OK, "%s", err.text);
    for (size_t at = 0; at < used; at++) {
        bytes[at] ^= 1;
        cr_assert_neq(cm_enrolment_parse(bytes, used, &parsed, &err), CM_OK, "byte %zu", at);
        bytes[at] ^= 1;
        cr_assert_neq(cm_enrolment_parse(bytes, at, &parsed, &err), CM_OK, "cut at %zu", at);
    }
    scene_done(&scene);
}

Test(tpm_seal, a_changed_pcr_is_refused)
{
    struct cm_error err;
    const uint8_t event[CM_DIGEST_BYTES] = {1};
    scene_make(&scene, state_new());
    cr_assert_eq(unseal(&scene, &err), CM_OK, "%s", err.text);
    cr_assert_eq(unseal(&scene, &err), CM_OK, "a second time: %s", err.text);
    cr_assert_eq(cm_tpm_pcr_extend(scene.tpm, 13, event, &err), CM_OK);
    cr_assert_eq(unseal(&scene, &err), CM_OK, "another PCR: %s", err.text);
    cr_assert_eq(cm_tpm_pcr_extend(scene.tpm, scene.enrolment.pcr, event, &err), CM_OK);
    refused(&scene, "CM-SEAL-PCR");
    /* The authority signs the new state: it opens again. */
    cr_assert_eq(
        cm_tpm_pcr_read(scene.tpm, scene.enrolment.pcr, scene.list.states[0].pcr_values[0], &err),
        CM_OK);
    state_sign(&scene, &scene.list.states[0]);
    cr_assert_eq(unseal(&scene, &err), CM_OK, "%s", err.text);
    scene_done(&scene);
}

Test(tpm_seal, a_stepped_counter_revokes_and_a_new_signature_restores)
{
    struct cm_error err;
    scene_make(&scene, state_new());
    uint64_t counter;
    cr_assert_eq(cm_tpm_counter_step(scene.tpm, &counter, &err), CM_OK);
    cr_assert_eq(counter, scene.enrolment.counter_value + 1);
    refused(&scene, "CM-SEAL-COUNTER");
    scene.list.states[0].counter_max++;
    refused(&scene, "CM-SEAL-SIGNATURE"); /* a state that nobody signed */
    state_sign(&scene, &scene.list.states[0]);
    cr_assert_eq(unseal(&scene, &err), CM_OK, "%s", err.text);
    scene_done(&scene);
}

Test(tpm_seal, another_authority_an_empty_list_and_a_foreign_reference_are_refused)
{
    struct cm_error err;
    scene_make(&scene, state_new());
    EVP_PKEY *right = scene.authority;
    scene.authority = EVP_EC_gen("P-256");
    state_sign(&scene, &scene.list.states[0]);
    refused(&scene, "CM-SEAL-SIGNATURE");
    EVP_PKEY_free(scene.authority);
    scene.authority = right;
    state_sign(&scene, &scene.list.states[0]);
    cr_assert_eq(unseal(&scene, &err), CM_OK);
    scene.list.count = 0;
    refused(&scene, "CM-SEAL-POLICY");
    scene.list.count = 1;
    strcpy(scene.list.states[0].policy_ref, "elsewhere");
    state_sign(&scene, &scene.list.states[0]);
    refused(&scene, "CM-SEAL-POLICY");
    scene_done(&scene);
}

Test(tpm_seal, a_sealed_key_of_another_authority_is_refused_by_the_tpm_itself)
{
    struct cm_error err;
    scene_make(&scene, state_new());
    uint8_t other[CM_PUBLIC_KEY_BYTES];
    size_t used;
    EVP_PKEY *key = EVP_EC_gen("P-256");
    EVP_PKEY_get_octet_string_param(key, OSSL_PKEY_PARAM_PUB_KEY, other, sizeof(other), &used);
    cr_assert_eq(cm_seal_to_node(&scene.enrolment, other, "test", scene.key, scene.payload,
                                 sizeof(scene.payload), &scene.payload_bytes, &err),
                 CM_OK);
    refused(&scene, "CM-SEAL-POLICY");
    EVP_PKEY_free(key);
    scene_done(&scene);
}

Test(tpm_seal, every_flipped_byte_of_the_sealed_key_is_refused)
{
    struct cm_error err;
    scene_make(&scene, state_new());
    for (uint32_t at = 0; at < scene.payload_bytes; at += 3) {
        scene.payload[at] ^= 1;
        cr_assert_neq(unseal(&scene, &err), CM_OK, "byte %u", at);
        scene.payload[at] ^= 1;
    }
    cr_assert_eq(unseal(&scene, &err), CM_OK, "%s", err.text);
    scene_done(&scene);
}

Test(tpm_seal, another_tpm_is_refused)
{
    static struct scene other;
    struct cm_error err;
    scene_make(&scene, state_new());
    scene_make(&other, state_new());
    struct cm_tpm *right = scene.tpm;
    scene.tpm = other.tpm;
    refused(&scene, "CM-SEAL-NODE");
    /* Even with the other node's own record: the object is wrapped to the first TPM. */
    struct cm_enrolment enrolment = scene.enrolment;
    scene.enrolment = other.enrolment;
    struct cm_policy_list list = scene.list;
    memcpy(scene.list.states[0].counter_name, other.enrolment.counter_name, 34);
    state_sign(&scene, &scene.list.states[0]);
    refused(&scene, "CM-SEAL-OBJECT");
    scene.enrolment = enrolment;
    scene.list = list;
    scene.tpm = right;
    cr_assert_eq(unseal(&scene, &err), CM_OK, "%s", err.text);
    scene_done(&other);
    scene_done(&scene);
}

/* Counters of two nodes stand at different values: what is signed for the one must not reach the
 * other, or a state that was revoked there lives on under the greater number. */
Test(tpm_seal, a_state_signed_for_one_node_serves_no_other)
{
    static struct scene other;
    struct cm_error err;
    uint64_t counter;
    scene_make(&scene, state_new());
    scene_make(&other, state_new());
    struct cm_policy_state *state = &scene.list.states[0];
    cr_assert_eq(cm_tpm_counter_step(scene.tpm, &counter, &err), CM_OK);
    state->counter_max = counter + 100;
    memcpy(state->counter_name, other.enrolment.counter_name, 34);
    state_sign(&scene, state);
    refused(&scene, "CM-SEAL-POLICY");
    memcpy(state->counter_name, scene.enrolment.counter_name, 34);
    refused(&scene, "CM-SEAL-SIGNATURE"); /* the name is signed, and the TPM checks it too */
    state_sign(&scene, state);
    cr_assert_eq(unseal(&scene, &err), CM_OK, "%s", err.text);
    scene_done(&other);
    scene_done(&scene);
}

/* TPM_PT_LOCKOUT_COUNTER: failed tries that count towards the lock-out. */
static uint32_t lockout_count(struct scene *s)
{
    TPMS_CAPABILITY_DATA *found = NULL;
    TPMI_YES_NO more;
    cr_assert_eq(Esys_GetCapability(s->tpm->esys, ESYS_TR_NONE, ESYS_TR_NONE, ESYS_TR_NONE,
                                    TPM2_CAP_TPM_PROPERTIES, TPM2_PT_LOCKOUT_COUNTER, 1, &more,
                                    &found),
                 TSS2_RC_SUCCESS);
    uint32_t count = found->data.tpmProperties.tpmProperty[0].value;
    cr_assert_eq(found->data.tpmProperties.tpmProperty[0].property, TPM2_PT_LOCKOUT_COUNTER);
    Esys_Free(found);
    return count;
}

/* Use a key that the lock-out protects, as we never do. */
static void protected_key_use(struct scene *s)
{
    const TPM2B_PUBLIC template =
        cm_tpm_ecc_template(CM_TPM_SRK_ATTRIBUTES & ~CM_TPMA_NO_DA, false);
    TPM2B_PUBLIC child = cm_tpm_ecc_template(CM_TPM_AK_ATTRIBUTES, true), *public = NULL;
    const TPM2B_SENSITIVE_CREATE nothing = {.size = 0};
    const TPM2B_DATA data = {.size = 0};
    const TPML_PCR_SELECTION none = {.count = 0};
    TPM2B_PRIVATE *private = NULL;
    ESYS_TR key = ESYS_TR_NONE;
    struct cm_error err;
    cr_assert_eq(
        cm_tpm_primary_create(s->tpm, ESYS_TR_RH_OWNER, &template, "primary", &key, NULL, &err),
        CM_OK, "%s", err.text);
    cr_assert_eq(Esys_Create(s->tpm->esys, key, ESYS_TR_PASSWORD, ESYS_TR_NONE, ESYS_TR_NONE,
                             &nothing, &child, &data, &none, &private, &public, NULL, NULL, NULL),
                 TSS2_RC_SUCCESS);
    Esys_Free(private);
    Esys_Free(public);
    cm_tpm_flush(s->tpm, &key);
}

Test(tpm_seal, an_unclean_end_after_a_protected_key_counts, .timeout = 30)
{
    int state = state_new();
    scene_make(&scene, state);
    uint32_t before = lockout_count(&scene);
    protected_key_use(&scene);
    tpm_stop(&scene, SIGKILL);
    tpm_start(&scene, state);
    cr_assert_eq(lockout_count(&scene), before + 1, "the next test would see nothing");
    scene_done(&scene);
}

Test(tpm_seal, fifty_unclean_ends_lock_nobody_out_and_a_torn_write_loses_nothing, .timeout = 60)
{
    struct cm_error err;
    uint8_t byte = 0xff;
    int state = state_new();
    scene_make(&scene, state);
    uint32_t before = lockout_count(&scene);
    for (int i = 0; i < 50; i++) {
        struct cm_tpm_boot boot;
        cr_assert_eq(unseal(&scene, &err), CM_OK, "%s", err.text);
        cr_assert_eq(cm_tpm_boot_read(scene.tpm, &boot, &err), CM_OK);
        tpm_stop(&scene, SIGKILL);
        tpm_start(&scene, state);
    }
    cr_assert_eq(lockout_count(&scene), before);
    cr_assert_eq(unseal(&scene, &err), CM_OK, "%s", err.text);
    tpm_stop(&scene, SIGKILL);
    /* Damage one copy of the state file: the other serves, or is older and says so by its counter.
     */
    cr_assert_eq(pwrite(state, &byte, 1, 100), 1);
    tpm_start(&scene, state);
    struct cm_enrolment again;
    cr_assert_eq(cm_tpm_provision(scene.tpm, "node", true, &again, &err), CM_OK, "%s", err.text);
    cr_assert_eq(memcmp(again.node, scene.enrolment.node, CM_DIGEST_BYTES), 0);
    scene_done(&scene);
}

/* Lists and records with mutated bytes: refused or the same, never a crash. */
Test(tpm_seal, mutated_records_and_lists)
{
    static uint8_t bytes[CM_POLICY_LIST_BYTES_MAX];
    struct cm_error err;
    struct cm_policy_list list;
    struct cm_enrolment enrolment;
    size_t list_bytes, record_bytes;
    uint8_t record[CM_ENROLMENT_BYTES_MAX];
    scene_make(&scene, state_new());
    cr_assert_eq(cm_enrolment_encode(&scene.enrolment, record, sizeof(record), &record_bytes, &err),
                 CM_OK);
    cr_assert_eq(cm_policy_list_encode(&scene.list, bytes, sizeof(bytes), &list_bytes, &err),
                 CM_OK);
    srand(5);
    for (int i = 0; i < 20000; i++) {
        const uint8_t *from = i % 2 ? bytes : record;
        size_t size = i % 2 ? list_bytes : record_bytes;
        size_t cut = rand() % 8 == 0 ? (size_t)rand() % size : size;
        uint8_t *work = malloc(cut + 1);
        memcpy(work, from, cut);
        for (int k = 0; k <= rand() % 3 && cut > 0; k++) {
            work[(size_t)rand() % cut] = (uint8_t)(rand() % 3 ? rand() : 0xff);
        }
        bool same = cut == size && memcmp(work, from, size) == 0;
        enum cm_status status =
            i % 2 ? cm_policy_list_parse(work, cut, scene.authority_key, &list, &err)
                  : cm_enrolment_parse(work, cut, &enrolment, &err);
        cr_assert(status != CM_OK || same, "mutation %d accepted", i);
        free(work);
    }
    scene_done(&scene);
}
