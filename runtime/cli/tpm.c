/* Commands that ask the node's TPM: revoke and answer; and a look at it for `policy explain`. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "loader/tpm/enrolment.h"
#include "runtime/cli/cli_internal.h"

/* The node's TPM, nobody else using it: its path, or the development TPM's state. */
struct node_tpm {
    const char *path;
    char state[CM_CONFIG_TEXT_BYTES + 32];
    const char *development; /* its state file; NULL for a real TPM */
    int lock;
};

/* A development TPM is one program with one file: not while the service runs it. */
static enum cm_status state_lock(const char *state, int *ret_fd, struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + 16];
    snprintf(path, sizeof(path), "%s/run/lock", state);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0) {
        close(fd);
        return cm_error_set(err, CM_E_SYSTEM, "CM-SUP-TWICE",
                            "a casemate serves from %s with its development TPM; stop it first",
                            state);
    }
    *ret_fd = fd; /* -1: never served, nothing to lock */
    return CM_OK;
}

static enum cm_status node_tpm_open(const struct cm_configuration *configuration,
                                    struct node_tpm *tpm, struct cm_error *err)
{
    *tpm = (struct node_tpm){.path = configuration->tpm, .lock = -1};
    if (!cm_config_tpm_development(configuration->tpm)) {
        return CM_OK;
    }
    snprintf(tpm->state, sizeof(tpm->state), "%s/devtpm.state", configuration->state);
    tpm->development = tpm->state;
    return state_lock(configuration->state, &tpm->lock, err);
}

static void node_tpm_close(struct node_tpm *tpm)
{
    if (tpm->lock >= 0) {
        close(tpm->lock);
    }
}

enum cm_status cli_tpm_look(const struct cm_configuration *configuration,
                            struct cli_tpm_facts *ret_facts, struct cm_error *err)
{
    struct node_tpm tpm;
    enum cm_status status = node_tpm_open(configuration, &tpm, err);
    if (status == CM_OK) {
        status = cli_keeper_look(tpm.path, tpm.development, ret_facts, err);
    }
    node_tpm_close(&tpm);
    return status;
}

/* Would anything unseal after the step? An operator who finds out at the next start has an outage.
 */
static enum cm_status survivors_check(struct words *words, struct cm_error *err)
{
    struct cm_error cause = {.status = CM_OK};
    uint32_t survivors = 0;
    enum cm_status status = cli_policy_survivors(words, &survivors, &cause);
    if (status == CM_OK && survivors > 0) {
        return CM_OK;
    }
    if (status == CM_E_SYSTEM || status == CM_E_TPM) {
        *err = cause;
        return status;
    }
    return cm_error_set(err, CM_E_POLICY, "CM-CLI-REVOKE",
                        "after this step no start would unseal here (%.200s): put the list that "
                        "`casemate-pack policy-revoke` signs beside the package first, or say "
                        "--anyway",
                        status != CM_OK ? cause.text
                                        : "no state is signed for the next value of the counter");
}

enum cm_status command_revoke(struct words *words, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct cm_configuration configuration;
    struct node_tpm tpm = {.lock = -1};
    uint64_t counter = 0;
    bool anyway = words_flag_take(words, "anyway");
    enum cm_status status =
        cm_config_arguments_load(words->count, words->at, &arguments, &configuration, err);
    if (status == CM_OK && !anyway) {
        status = survivors_check(words, err);
    }
    if (status == CM_OK) {
        status = node_tpm_open(&configuration, &tpm, err);
    }
    if (status == CM_OK) {
        status = cli_counter_step(tpm.path, tpm.development, &counter, err);
    }
    node_tpm_close(&tpm);
    if (status == CM_OK) {
        printf(
            "the counter is %llu now: states signed for less unseal no more; a service that runs "
            "goes on until it stops\n",
            (unsigned long long)counter);
    }
    return status;
}

enum cm_status command_answer(struct words *words, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct cm_configuration configuration;
    struct node_tpm tpm = {.lock = -1};
    uint8_t challenge[CM_CREDENTIAL_BYTES_MAX + 1], secret[CM_DIGEST_BYTES];
    size_t size = 0;
    const char *out = words_value_take(words, "out");
    if (words->count == 0 || words->at[0][0] == '-' || out == NULL) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "expected answer CHALLENGE --out FILE");
    }
    const char *path = words->at[0];
    words->count--;
    memmove(words->at, words->at + 1, (size_t)words->count * sizeof(words->at[0]));
    enum cm_status status = cli_file_read(path, challenge, sizeof(challenge), &size, err);
    if (status == CM_OK) {
        status = cm_config_arguments_load(words->count, words->at, &arguments, &configuration, err);
    }
    if (status == CM_OK) {
        status = node_tpm_open(&configuration, &tpm, err);
    }
    if (status == CM_OK) {
        status = cli_challenge_answer(tpm.path, tpm.development, challenge, size, secret, err);
    }
    node_tpm_close(&tpm);
    if (status == CM_OK) {
        status = cli_file_write(out, secret, sizeof(secret), 0600, err);
    }
    if (status == CM_OK) {
        printf("answered: give %s to the model's owner\n", out);
    }
    return status;
}
