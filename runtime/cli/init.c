/* casemate init: a state folder with configuration, public keys and this node's enrolment record.
 *
 * Everything is made in a hidden folder inside and moved into place at the end, casemate.yaml last:
 * its presence says that the node is initialised. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/cli/cli_internal.h"

#define PATH_BYTES (CM_CONFIG_TEXT_BYTES + 64)

struct plan {
    char state[CM_CONFIG_TEXT_BYTES];
    char work[PATH_BYTES]; /* <state>/.init-XXXXXX */
    const char *owner_key, *policy_key, *package, *node_name, *tpm, *attest_mode;
    char node_name_own[CM_NAME_BYTES];
    bool made; /* the folder was not there before */
};

/* In the order of moving in. */
static const char *const files[] = {"devtpm.state", "enrolment.bin", "owner.pem", "policy.pem",
                                    "casemate.yaml"};
#define FILE_COUNT (sizeof(files) / sizeof(files[0]))

static enum cm_status plan_read(struct words *words, struct plan *plan, struct cm_error *err)
{
    const char *state = words_value_take(words, "state");
    plan->owner_key = words_value_take(words, "owner-key");
    plan->policy_key = words_value_take(words, "policy-key");
    plan->package = words_value_take(words, "package");
    plan->node_name = words_value_take(words, "node-name");
    plan->tpm = words_value_take(words, "tpm");
    const char *words_mode = words_value_take(words, "attest-mode");
    if (words->count != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "init does not know \"%.64s\"",
                            words->at[0]);
    }
    if (plan->tpm == NULL) {
        plan->tpm = access("/dev/tpmrm0", F_OK) == 0 ? "/dev/tpmrm0" : "development";
    }
    bool development = cm_config_tpm_development(plan->tpm);
    if (!development && plan->tpm[0] != '/') {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "--tpm is \"development\" or an absolute path, not \"%.64s\"",
                            plan->tpm);
    }
    plan->attest_mode = words_mode != NULL ? words_mode : development ? "restartable" : "";
    if (strcmp(plan->attest_mode, "strict") != 0 && strcmp(plan->attest_mode, "restartable") != 0) {
        return cm_error_set(
            err, CM_E_USAGE, "CM-CLI-USAGE",
            "--attest-mode: say strict (one start per boot) or restartable for the TPM "
            "%s",
            plan->tpm);
    }
    if (plan->node_name == NULL) {
        gethostname(plan->node_name_own, sizeof(plan->node_name_own) - 1);
        plan->node_name = plan->node_name_own;
    }
    size_t size = strlen(plan->node_name);
    if (size == 0 || size >= CM_NAME_BYTES ||
        strspn(plan->node_name,
               "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") != size) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "--node-name: 1 to 63 letters, digits, '-', '.', '_'");
    }
    if (state == NULL) {
        cm_config_state_default(plan->state);
    } else if (strlen(state) > 400) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "--state: path too long");
    } else {
        snprintf(plan->state, sizeof(plan->state), "%s", state);
    }
    return CM_OK;
}

static void path_join(char ret_path[static PATH_BYTES], const char *folder, const char *name)
{
    snprintf(ret_path, PATH_BYTES, "%.500s/%.60s", folder, name);
}

static enum cm_status folder_make(struct plan *plan, struct cm_error *err)
{
    char path[PATH_BYTES];
    plan->made = mkdir(plan->state, 0700) == 0;
    if (!plan->made && errno != EEXIST) {
        return cm_error_errno(err, errno, "CM-CLI-INIT", "cannot make the folder %s", plan->state);
    }
    path_join(path, plan->state, "casemate.yaml");
    if (access(path, F_OK) == 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CLI-INIT",
                            "%s is there: this node is initialised; nothing was changed", path);
    }
    snprintf(plan->work, sizeof(plan->work), "%.500s/.init-XXXXXX", plan->state);
    if (mkdtemp(plan->work) == NULL) {
        int error_number = errno;
        plan->work[0] = '\0';
        return cm_error_errno(err, error_number, "CM-CLI-INIT", "cannot write in %s", plan->state);
    }
    return CM_OK;
}

/* Check the form, then copy: only public keys may lie on a node. */
static enum cm_status public_key_copy(const struct plan *plan, const char *from, const char *name,
                                      struct cm_error *err)
{
    uint8_t point[CM_PUBLIC_KEY_BYTES];
    uint8_t pem[4096];
    char path[PATH_BYTES];
    size_t used = 0;
    if (from == NULL) {
        return CM_OK;
    }
    enum cm_status status = cm_config_point_read(from, point, err);
    if (status == CM_OK) {
        status = cli_file_read(from, pem, sizeof(pem), &used, err);
    }
    if (status == CM_OK) {
        path_join(path, plan->work, name);
        status = cli_file_write(path, pem, used, 0644, err);
    }
    return status;
}

static enum cm_status yaml_write(const struct plan *plan, struct cm_error *err)
{
    char package[PATH_MAX] = "model.cmpkg";
    char text[PATH_MAX + 4096];
    char path[PATH_BYTES];
    if (plan->package != NULL && plan->package[0] == '/') {
        snprintf(package, sizeof(package), "%s", plan->package);
    } else if (plan->package != NULL) {
        char here[PATH_MAX / 2];
        if (getcwd(here, sizeof(here)) == NULL) {
            return cm_error_errno(err, errno, "CM-CLI-INIT", "cannot name the working directory");
        }
        snprintf(package, sizeof(package), "%s/%.2000s", here, plan->package);
    }
    if (strlen(package) >= CM_CONFIG_TEXT_BYTES || strpbrk(package, "'\n\r") != NULL) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "--package: the path is too long or holds a quote");
    }
    int used = snprintf(
        text, sizeof(text),
        "# Casemate's configuration. `casemate check --config FILE` reads it without starting.\n"
        "# Relative paths count from this file's folder. Every key, its range and default:\n"
        "# `casemate check --keys`. Command line > CASEMATE_<KEY> > this file > default.\n"
        "\n"
        "# Measured before the weights unseal: changing it changes what this node is.\n"
        "sealed:\n"
        "  package: '%s'\n"
        "  package_owner: owner.pem       # public key of who signs packages\n"
        "  policy_authority: policy.pem   # public key of who signs allowed states\n"
        "  device: cpu\n"
        "  tpm: %s%s\n"
        "  attest_mode: %s\n"
        "\n"
        "# Yours: ports, limits, names.\n"
        "site:\n"
        "  state: .\n"
        "  listen: 127.0.0.1:8443\n"
        "  tls_names: [localhost, 127.0.0.1]\n"
        "  # model_name: name-that-clients-use\n"
        "  # sequences_max: 8\n"
        "  # kv_bytes: 268435456\n"
        "  # threads: 0\n"
        "  # drain_timeout_ms: 30000\n",
        package, plan->tpm,
        cm_config_tpm_development(plan->tpm) ? "               # protects nothing" : "",
        plan->attest_mode);
    path_join(path, plan->work, "casemate.yaml");
    return cli_file_write(path, text, (size_t)used, 0644, err);
}

static enum cm_status enrol(const struct plan *plan, struct cm_error *err)
{
    uint8_t record[CM_ENROLMENT_BYTES_MAX];
    size_t used = 0;
    char state[PATH_BYTES];
    char path[PATH_BYTES];
    path_join(state, plan->work, "devtpm.state");
    path_join(path, plan->work, "enrolment.bin");
    bool development = cm_config_tpm_development(plan->tpm);
    enum cm_status status =
        cli_provision(plan->node_name, plan->tpm, development ? state : NULL, record, &used, err);
    return status == CM_OK ? cli_file_write(path, record, used, 0644, err) : status;
}

static enum cm_status files_move(const struct plan *plan, struct cm_error *err)
{
    for (size_t i = 0; i < FILE_COUNT; i++) {
        char from[PATH_BYTES];
        char to[PATH_BYTES];
        path_join(from, plan->work, files[i]);
        path_join(to, plan->state, files[i]);
        if (rename(from, to) != 0 && errno != ENOENT) {
            return cm_error_errno(err, errno, "CM-CLI-INIT", "cannot write %s", to);
        }
    }
    int folder = open(plan->state, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0 || fsync(folder) != 0) {
        int error_number = errno;
        if (folder >= 0) {
            close(folder);
        }
        return cm_error_errno(err, error_number, "CM-CLI-INIT", "cannot sync %s", plan->state);
    }
    close(folder);
    return CM_OK;
}

static void work_remove(const struct plan *plan, bool failed)
{
    static const char *const more[] = {"enrolment.bin.partial", "owner.pem.partial",
                                       "policy.pem.partial", "casemate.yaml.partial"};
    char path[PATH_BYTES];
    if (plan->work[0] != '\0') {
        for (size_t i = 0; i < FILE_COUNT; i++) {
            path_join(path, plan->work, files[i]);
            unlink(path);
        }
        for (size_t i = 0; i < sizeof(more) / sizeof(more[0]); i++) {
            path_join(path, plan->work, more[i]);
            unlink(path);
        }
        rmdir(plan->work);
    }
    if (failed && plan->made) {
        rmdir(plan->state); /* only if empty */
    }
}

static void next_steps_print(const struct plan *plan)
{
    printf("casemate: %s holds this node's state; enrolment record: %s/enrolment.bin\n",
           plan->state, plan->state);
    if (cm_config_tpm_development(plan->tpm)) {
        printf("casemate: the development TPM protects nothing: for trials only\n");
    }
    if (plan->owner_key == NULL || plan->policy_key == NULL) {
        printf("next: put the owner's public keys there as owner.pem and policy.pem\n");
    }
    printf("next: casemate measure --state %s --out node.measure\n"
           "next: give enrolment.bin and node.measure to the model's owner, who seals a package to "
           "them (casemate-pack --help)\n"
           "next: casemate serve --state %s\n",
           plan->state, plan->state);
}

enum cm_status command_init(struct words *words, struct cm_error *err)
{
    struct plan plan = {.made = false};
    enum cm_status status = plan_read(words, &plan, err);
    if (status != CM_OK) {
        return status;
    }
    umask(077);
    status = folder_make(&plan, err);
    if (status == CM_OK) {
        status = public_key_copy(&plan, plan.owner_key, "owner.pem", err);
    }
    if (status == CM_OK) {
        status = public_key_copy(&plan, plan.policy_key, "policy.pem", err);
    }
    if (status == CM_OK) {
        status = yaml_write(&plan, err);
    }
    if (status == CM_OK) {
        status = enrol(&plan, err);
    }
    if (status == CM_OK) {
        status = files_move(&plan, err);
    }
    work_remove(&plan, status != CM_OK);
    if (status == CM_OK) {
        next_steps_print(&plan);
    }
    return status;
}
