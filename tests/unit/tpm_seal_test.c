/* Sealing and unsealing against the real development TPM process: each refusal beside the success
 * that differs in that one thing. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/ecdsa.h>
#include <openssl/evp.h>

#include "loader/package/package.h"
#include "loader/tpm/tpm.h"
#include "loader/tpm/tpm_internal.h"

struct scene {
    pid_t pid;
    int tpm_fd;
    struct cm_channel channel;
    struct cm_tpm *tpm;
    struct cm_enrolment enrolment;
    EVP_PKEY *authority;
    uint8_t authority_key[CM_PUBLIC_KEY_BYTES];
    struct cm_policy_list list;
    uint8_t key[CM_KEY_BYTES];
    uint8_t payload[CM_PACKAGE_SLOT_PAYLOAD_MAX];
    uint32_t payload_bytes;
};

/* Start casemate-devtpm on an unlinked (or given) state file. */
static void tpm_start(struct scene *s, int state_fd)
{
    static struct cm_frame frame;
    struct cm_config_devtpm config = {0};
    struct cm_error err;
    int control[2], wire[2];
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control), 0);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, wire), 0);
    s->pid = fork();
    cr_assert_geq(s->pid, 0);
    if (s->pid == 0) {
        int from[4] = {fcntl(control[1], F_DUPFD, 50), fcntl(STDERR_FILENO, F_DUPFD, 50),
                       fcntl(state_fd, F_DUPFD, 50), fcntl(wire[1], F_DUPFD, 50)};
        dup2(from[0], CM_FD_CONTROL);
        dup2(from[1], CM_FD_LOG);
        dup2(from[2], CM_FD_INPUT);
        dup2(from[3], CM_FD_TPM);
        for (int fd = 14; fd < 100; fd++) {
            close(fd);
        }
        execl(CASEMATE_DEVTPM, "casemate-devtpm", (char *)NULL);
        _exit(127);
    }
    close(control[1]);
    close(wire[1]);
    s->tpm_fd = wire[0];
    cm_channel_init(&s->channel, control[0], CM_ROLE_SUPERVISOR, CM_ROLE_DEVTPM);
    cr_assert_eq(
        cm_channel_send(&s->channel, CM_FRAME_CONFIG, &config, sizeof(config), NULL, 0, &err),
        CM_OK);
    cr_assert_eq(cm_channel_wait(&s->channel, &frame, 10000, &err), CM_OK, "%s", err.text);
    while (frame.type == CM_FRAME_HEARTBEAT) {
        cr_assert_eq(cm_channel_wait(&s->channel, &frame, 10000, &err), CM_OK);
    }
    cr_assert_eq(frame.type, CM_FRAME_READY);
    cr_assert_eq(cm_tpm_open(s->tpm_fd, &s->tpm, &err), CM_OK, "%s", err.text);
}

static void tpm_stop(struct scene *s, int signal_number)
{
    int status;
    cm_tpm_close(s->tpm);
    kill(s->pid, signal_number);
    waitpid(s->pid, &status, 0);
    close(s->tpm_fd);
    close(s->channel.fd);
}

static int state_new(void)
{
    char path[] = "/tmp/casemate-devtpm-XXXXXX";
    int fd = mkostemp(path, O_CLOEXEC);
    cr_assert_geq(fd, 0);
    unlink(path);
    return fd;
}

static void sign(EVP_PKEY *key, const uint8_t digest[CM_DIGEST_BYTES], uint8_t ret[64])
{
    uint8_t der[80];
    size_t size = sizeof(der);
    EVP_PKEY_CTX *signer = EVP_PKEY_CTX_new(key, NULL);
    cr_assert(EVP_PKEY_sign_init(signer) == 1 &&
              EVP_PKEY_sign(signer, der, &size, digest, CM_DIGEST_BYTES) == 1);
    EVP_PKEY_CTX_free(signer);
    const uint8_t *at = der;
    ECDSA_SIG *pair = d2i_ECDSA_SIG(NULL, &at, (long)size);
    BN_bn2binpad(ECDSA_SIG_get0_r(pair), ret, 32);
    BN_bn2binpad(ECDSA_SIG_get0_s(pair), ret + 32, 32);
    ECDSA_SIG_free(pair);
}

static void state_sign(struct scene *s, struct cm_policy_state *state)
{
    uint8_t digest[CM_DIGEST_BYTES];
    cr_assert_eq(cm_policy_state_to_sign(state, digest, NULL), CM_OK);
    sign(s->authority, digest, state->signature);
}

static void scene_make(struct scene *s, int state_fd)
{
    struct cm_error err;
    size_t used;
    memset(s, 0, sizeof(*s));
    tpm_start(s, state_fd);
    cr_assert_eq(cm_tpm_provision(s->tpm, "node", true, &s->enrolment, &err), CM_OK, "%s",
                 err.text);
    s->authority = EVP_EC_gen("P-256");
    EVP_PKEY_get_octet_string_param(s->authority, OSSL_PKEY_PARAM_PUB_KEY, s->authority_key,
                                    CM_PUBLIC_KEY_BYTES, &used);
    memset(s->key, 0x77, sizeof(s->key));
    cr_assert_eq(cm_seal_to_node(&s->enrolment, s->authority_key, "test", s->key, s->payload,
                                 sizeof(s->payload), &s->payload_bytes, &err),
                 CM_OK);
    struct cm_policy_state *state = &s->list.states[0];
    s->list.count = 1;
    state->pcr_count = 1;
    state->pcrs[0] = s->enrolment.pcr;
    memcpy(state->pcr_values[0], s->enrolment.pcr_value, CM_DIGEST_BYTES);
    state->counter_max = s->enrolment.counter_value;
    memcpy(state->counter_name, s->enrolment.counter_name, sizeof(state->counter_name));
    strcpy(state->policy_ref, "test");
    state_sign(s, state);
}

static void scene_done(struct scene *s)
{
    tpm_stop(s, SIGTERM);
    EVP_PKEY_free(s->authority);
}

static enum cm_status unseal(struct scene *s, struct cm_error *err)
{
    struct cm_secret *key = NULL;
    struct cm_policy_state released;
    enum cm_status status = cm_tpm_unseal(s->tpm, &s->enrolment, s->payload, s->payload_bytes,
                                          &s->list, s->authority_key, &key, &released, err);
    if (status == CM_OK) {
        cr_assert_eq(memcmp(cm_secret_view(key), s->key, CM_KEY_BYTES), 0);
        cm_secret_free(key);
    }
    return status;
}

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

Test(tpm_seal, fifty_unclean_ends_lock_nobody_out_and_a_torn_write_loses_nothing, .timeout = 60)
{
    struct cm_error err;
    uint8_t byte = 0xff;
    int state = state_new();
    scene_make(&scene, state);
    for (int i = 0; i < 50; i++) {
        tpm_stop(&scene, SIGKILL);
        tpm_start(&scene, state);
    }
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
