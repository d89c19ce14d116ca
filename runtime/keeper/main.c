/* casemate-keeper: holds the package key and the TPM, and nothing else. `--provision` enrols a
 * node. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "runtime/base/hex.h"
#include "runtime/keeper/keeper.h"

#define CONFIG_WAIT_MS 10000

static enum cm_status restrict_early(struct cm_error *err)
{
    const struct rlimit none = {0, 0};
    if (prctl(PR_SET_DUMPABLE, 0) != 0 || setrlimit(RLIMIT_CORE, &none) != 0) {
        return cm_error_errno(err, errno, "CM-KEEPER-RESTRICT", "cannot forbid core dumps");
    }
    return CM_OK;
}

/* TPM at descriptor 13, the record to standard output. */
static enum cm_status provision(const char *node_name, bool development, struct cm_error *err)
{
    struct cm_tpm *tpm = NULL;
    struct cm_enrolment enrolment;
    uint8_t bytes[CM_ENROLMENT_BYTES_MAX];
    size_t size = 0;
    if (!cm_name_valid(node_name)) {
        return cm_error_set(err, CM_E_USAGE, "CM-KEEPER-NAME",
                            "node name '%s' is not [A-Za-z0-9._-]{1,63}", node_name);
    }
    enum cm_status status = cm_tpm_open(CM_FD_TPM, &tpm, err);
    if (status == CM_OK) {
        status = cm_tpm_provision(tpm, node_name, development, &enrolment, err);
    }
    cm_tpm_close(tpm);
    if (status == CM_OK) {
        status = cm_enrolment_encode(&enrolment, bytes, sizeof(bytes), &size, err);
    }
    /* What we hand out must stand its own check. */
    if (status == CM_OK) {
        status = cm_enrolment_parse(bytes, size, &enrolment, err);
    }
    if (status == CM_OK && write(STDOUT_FILENO, bytes, size) != (ssize_t)size) {
        status = cm_error_errno(err, errno, "CM-KEEPER-WRITE", "cannot write the enrolment record");
    }
    return status;
}

/* Step the counter, its new value to standard output. */
static enum cm_status counter_step(struct cm_error *err)
{
    struct cm_tpm *tpm = NULL;
    uint64_t value = 0;
    enum cm_status status = cm_tpm_open(CM_FD_TPM, &tpm, err);
    if (status == CM_OK) {
        status = cm_tpm_counter_step(tpm, &value, err);
    }
    cm_tpm_close(tpm);
    if (status == CM_OK) {
        printf("%llu\n", (unsigned long long)value);
    }
    return status;
}

/* The counter (u64) and all 24 PCRs of the SHA-256 bank, as they stand, to standard output. */
static enum cm_status look(struct cm_error *err)
{
    struct cm_tpm *tpm = NULL;
    uint8_t facts[sizeof(uint64_t) + 24 * CM_DIGEST_BYTES];
    uint64_t counter = 0;
    enum cm_status status = cm_tpm_open(CM_FD_TPM, &tpm, err);
    if (status == CM_OK) {
        status = cm_tpm_counter_value(tpm, &counter, err);
    }
    memcpy(facts, &counter, sizeof(counter));
    for (uint32_t i = 0; status == CM_OK && i < 24; i++) {
        status = cm_tpm_pcr_read(tpm, i, facts + sizeof(counter) + i * CM_DIGEST_BYTES, err);
    }
    cm_tpm_close(tpm);
    if (status == CM_OK && write(STDOUT_FILENO, facts, sizeof(facts)) != (ssize_t)sizeof(facts)) {
        status = cm_error_errno(err, errno, "CM-KEEPER-WRITE", "cannot write what the TPM says");
    }
    return status;
}

/* Answer a challenge, given in hex, to standard output: that EK and AK are of this TPM. */
static enum cm_status challenge_answer(const char *hex, struct cm_error *err)
{
    struct cm_tpm *tpm = NULL;
    uint8_t challenge[CM_CREDENTIAL_BYTES_MAX], secret[CM_DIGEST_BYTES];
    size_t size = strlen(hex) / 2;
    if (size > sizeof(challenge) || !cm_hex_read(hex, strlen(hex), challenge, size)) {
        return cm_error_set(err, CM_E_USAGE, "CM-KEEPER-USAGE", "the challenge is not hex");
    }
    enum cm_status status = cm_tpm_open(CM_FD_TPM, &tpm, err);
    if (status == CM_OK) {
        status = cm_tpm_credential_answer(tpm, challenge, size, secret, err);
    }
    cm_tpm_close(tpm);
    if (status == CM_OK &&
        write(STDOUT_FILENO, secret, sizeof(secret)) != (ssize_t)sizeof(secret)) {
        status = cm_error_errno(err, errno, "CM-KEEPER-WRITE", "cannot write the answer");
    }
    return status;
}

/* What the start cost in the TPM, command by command: users wait for it. */
static void times_log(struct cm_keeper *keeper)
{
    const struct cm_tpm_times *times = cm_tpm_times(keeper->tpm);
    uint64_t us = 0, calls = 0;
    for (uint32_t i = 0; i < times->count; i++) {
        const struct cm_tpm_time *row = &times->rows[i];
        CM_LOG(&keeper->log, CM_LOG_INFO, "tpm_command",
               CM_LOG_S("command", cm_tpm_command_name(row->command)),
               CM_LOG_I("calls", row->calls), CM_LOG_I("us", row->us));
        us += row->us;
        calls += row->calls;
    }
    CM_LOG(&keeper->log, CM_LOG_INFO, "unsealed",
           CM_LOG_S("tpm", keeper->config.development_tpm ? "development" : "real"),
           CM_LOG_I("tpm_calls", calls), CM_LOG_I("tpm_us", us));
}

static enum cm_status serve(struct cm_keeper *keeper, struct cm_error *err)
{
    static struct cm_frame frame;
    keeper->log = (struct cm_log){CM_FD_LOG, "keeper", CM_LOG_INFO};
    cm_channel_init(&keeper->channel, CM_FD_CONTROL, CM_ROLE_KEEPER, CM_ROLE_SUPERVISOR);
    enum cm_status status = cm_confine_begin("casemate-keeper", &keeper->confinement, err);
    if (status == CM_OK) {
        cm_log_write(&keeper->log, CM_LOG_INFO, "confined", NULL);
        status = cm_channel_wait(&keeper->channel, &frame, CONFIG_WAIT_MS, err);
    }
    if (status == CM_OK &&
        (frame.type != CM_FRAME_CONFIG || frame.bytes != sizeof(keeper->config))) {
        status =
            cm_error_set(err, CM_E_BUG, "CM-KEEPER-CONFIG", "the first frame is no configuration");
    }
    if (status == CM_OK) {
        memcpy(&keeper->config, frame.payload, sizeof(keeper->config));
        status = cm_keeper_identity(keeper, &frame, err);
    }
    if (status == CM_OK) {
        status = cm_keeper_measure(keeper, err);
    }
    if (status == CM_OK) {
        status = cm_keeper_unseal(keeper, err);
    }
    if (status == CM_OK) {
        status = cm_keeper_prepare(keeper, err);
    }
    if (status == CM_OK) {
        status = cm_confine_serve(&keeper->confinement, err);
    }
    if (status == CM_OK) {
        const struct cm_ready ready = {.probed = keeper->confinement.probed};
        status =
            cm_channel_send(&keeper->channel, CM_FRAME_READY, &ready, sizeof(ready), NULL, 0, err);
    }
    if (status == CM_OK) {
        times_log(keeper);
        status = cm_keeper_serve(keeper, err);
    }
    cm_keeper_wipe(keeper, status == CM_OK);
    if (status != CM_OK) {
        cm_log_error(&keeper->log, "failed", err);
        (void)!cm_channel_send(&keeper->channel, CM_FRAME_FAILED, err, sizeof(*err), NULL, 0, NULL);
    }
    return status;
}

int main(int count, char **words)
{
    static struct cm_keeper keeper;
    struct cm_error err = {.status = CM_OK};
    enum cm_status status = count == 1 ? CM_OK : restrict_early(&err); /* serve confines itself */
    bool enrols =
        count >= 4 && strcmp(words[1], "--provision") == 0 && strcmp(words[2], "--node-name") == 0;
    bool serves = count == 1;
    if (status == CM_OK && enrols) {
        bool development = count == 5 && strcmp(words[4], "--development") == 0;
        status = provision(words[3], development, &err);
    } else if (status == CM_OK && count == 2 && strcmp(words[1], "--revoke") == 0) {
        status = counter_step(&err);
    } else if (status == CM_OK && count == 2 && strcmp(words[1], "--look") == 0) {
        status = look(&err);
    } else if (status == CM_OK && count == 3 && strcmp(words[1], "--answer") == 0) {
        status = challenge_answer(words[2], &err);
    } else if (status == CM_OK && serves) {
        _exit(cm_status_exit_code(serve(&keeper, &err))); /* to free takes calls that are gone */
    } else if (status == CM_OK) {
        fprintf(stderr, "casemate-keeper is started by casemate-supervisor, or as\n"
                        "casemate-keeper --provision --node-name NAME [--development] 13<>TPM\n"
                        "casemate-keeper --revoke 13<>TPM\n"
                        "casemate-keeper --look 13<>TPM\n"
                        "casemate-keeper --answer HEX 13<>TPM\n");
        return cm_status_exit_code(CM_E_USAGE);
    }
    if (status != CM_OK && !serves) {
        fprintf(stderr, "casemate-keeper: %s (%s)\n", err.text, err.id);
    }
    return cm_status_exit_code(status);
}
