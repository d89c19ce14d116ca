/* A node with its real development TPM process, a sealed key and a signed state. */
#ifndef CASEMATE_TESTS_TPM_SCENE_H
#define CASEMATE_TESTS_TPM_SCENE_H

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "loader/package/package.h"
#include "loader/tpm/tpm.h"
#include "loader/tpm/tpm_internal.h"
#include "sandbox/confine.h"
#include "tests/unit/p256.h"

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
static inline void tpm_start(struct scene *s, int state_fd)
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
        if (!cm_confinement_none_place()) {
            _exit(126);
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

static inline void tpm_stop(struct scene *s, int signal_number)
{
    int status;
    cm_tpm_close(s->tpm);
    kill(s->pid, signal_number);
    waitpid(s->pid, &status, 0);
    close(s->tpm_fd);
    close(s->channel.fd);
}

static inline int state_new(void)
{
    char path[] = "/tmp/casemate-devtpm-XXXXXX";
    int fd = mkostemp(path, O_CLOEXEC);
    cr_assert_geq(fd, 0);
    unlink(path);
    return fd;
}

static inline void state_sign(struct scene *s, struct cm_policy_state *state)
{
    uint8_t digest[CM_DIGEST_BYTES];
    cr_assert_eq(cm_policy_state_to_sign(state, digest, NULL), CM_OK);
    p256_sign(s->authority, digest, state->signature);
}

static inline void scene_make(struct scene *s, int state_fd)
{
    struct cm_error err;
    memset(s, 0, sizeof(*s));
    tpm_start(s, state_fd);
    cr_assert_eq(cm_tpm_provision(s->tpm, "node", true, &s->enrolment, &err), CM_OK, "%s",
                 err.text);
    s->authority = EVP_EC_gen("P-256");
    p256_point(s->authority, s->authority_key);
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

static inline void scene_done(struct scene *s)
{
    tpm_stop(s, SIGTERM);
    EVP_PKEY_free(s->authority);
}

static inline enum cm_status unseal(struct scene *s, struct cm_error *err)
{
    struct cm_secret *key = NULL;
    struct cm_policy_state released;
    cr_assert_eq(cm_secret_new(CM_KEY_BYTES, &key, err), CM_OK);
    enum cm_status status = cm_tpm_unseal(s->tpm, &s->enrolment, s->payload, s->payload_bytes,
                                          &s->list, s->authority_key, key, &released, err);
    static const uint8_t nothing[CM_KEY_BYTES];
    cr_assert_eq(memcmp(cm_secret_view(key), status == CM_OK ? s->key : nothing, CM_KEY_BYTES), 0);
    cm_secret_free(key);
    return status;
}

#endif
