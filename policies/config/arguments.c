/* --config, --state and --<key> on the command line; where the file lies if nobody says. */
#include "policies/config/arguments.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void cm_config_state_default(char ret_path[static CM_CONFIG_TEXT_BYTES])
{
    const char *xdg = getenv("XDG_STATE_HOME");
    const char *home = getenv("HOME");
    if (geteuid() == 0) {
        snprintf(ret_path, CM_CONFIG_TEXT_BYTES, "/var/lib/casemate");
    } else if (xdg != NULL && xdg[0] == '/') {
        snprintf(ret_path, CM_CONFIG_TEXT_BYTES, "%.400s/casemate", xdg);
    } else {
        snprintf(ret_path, CM_CONFIG_TEXT_BYTES, "%.400s/.local/state/casemate",
                 home != NULL ? home : "");
    }
}

/* "--kv-bytes=1" or "--kv-bytes" "1" into a name (snake_case) and a value; returns how many words
 * were used, 0 if it is no option with a value. */
static int option_take(int count, char *const *argv, char ret_name[static 40],
                       const char **ret_value)
{
    const char *word = argv[0];
    if (strncmp(word, "--", 2) != 0 || word[2] == '\0') {
        return 0;
    }
    const char *equals = strchr(word, '=');
    size_t size = equals != NULL ? (size_t)(equals - word) - 2 : strlen(word) - 2;
    if (size >= 40 || (equals == NULL && count < 2)) {
        return 0;
    }
    for (size_t i = 0; i < size; i++) {
        ret_name[i] = word[2 + i] == '-' ? '_' : word[2 + i];
    }
    ret_name[size] = '\0';
    *ret_value = equals != NULL ? equals + 1 : argv[1];
    return equals != NULL ? 1 : 2;
}

/* A word that is no option with a value: say which of the two it lacks. */
static enum cm_status option_refuse(const char *word, struct cm_error *err)
{
    if (strncmp(word, "--", 2) != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CONFIG-OPTION",
                            "expected --option VALUE, found \"%.64s\"", word);
    }
    return cm_error_set(err, CM_E_USAGE, "CM-CONFIG-OPTION",
                        "%.64s is unknown here, or needs a value after it", word);
}

static void path_settle(struct cm_config_arguments *arguments, const char *config,
                        const char *state)
{
    static const char system_path[] = "/etc/casemate/casemate.yaml";
    char folder[CM_CONFIG_TEXT_BYTES];
    if (config == NULL) {
        config = getenv("CASEMATE_CONFIG");
    }
    if (config != NULL) {
        snprintf(arguments->path, sizeof(arguments->path), "%s", config);
        return;
    }
    if (state == NULL) {
        state = getenv("CASEMATE_STATE");
    }
    if (state == NULL && access(system_path, F_OK) == 0) {
        snprintf(arguments->path, sizeof(arguments->path), "%s", system_path);
        return;
    }
    cm_config_state_default(folder);
    snprintf(arguments->path, sizeof(arguments->path), "%.480s/casemate.yaml",
             state != NULL ? state : folder);
}

enum cm_status cm_config_arguments_parse(int count, char *const *argv,
                                         struct cm_config_arguments *ret_arguments,
                                         struct cm_error *err)
{
    const char *config = NULL;
    const char *state = NULL;
    struct cm_config_arguments *arguments = ret_arguments;
    memset(arguments, 0, sizeof(*arguments));
    for (int i = 0; i < count;) {
        if (arguments->override_count == CM_CONFIG_OVERRIDES_MAX) {
            return cm_error_set(err, CM_E_USAGE, "CM-CONFIG-OPTION", "too many options");
        }
        char *name = arguments->names[arguments->override_count];
        const char *value = NULL;
        int used = option_take(count - i, argv + i, name, &value);
        if (used == 0) {
            return option_refuse(argv[i], err);
        }
        i += used;
        if (strcmp(name, "config") == 0) {
            config = value;
            continue;
        }
        if (strcmp(name, "state") == 0) {
            state = value;
        }
        arguments->overrides[arguments->override_count++] =
            (struct cm_config_override){name, value};
    }
    path_settle(arguments, config, state);
    return CM_OK;
}

enum cm_status cm_config_arguments_load(int count, char *const *argv,
                                        struct cm_config_arguments *ret_arguments,
                                        struct cm_configuration *ret_configuration,
                                        struct cm_error *err)
{
    enum cm_status status = cm_config_arguments_parse(count, argv, ret_arguments, err);
    if (status != CM_OK) {
        return status;
    }
    status = cm_config_load(ret_arguments->path, ret_arguments->overrides,
                            ret_arguments->override_count, environ, ret_configuration, err);
    if (status == CM_OK && ret_configuration->state[0] == '\0') {
        cm_config_state_default(ret_configuration->state);
    }
    return status;
}

enum cm_status cm_config_complete(const struct cm_configuration *configuration, const char *path,
                                  struct cm_error *err)
{
    const struct {
        const char *name;
        const char *value;
    } needed[] = {{"package", configuration->package},
                  {"package_owner", configuration->package_owner},
                  {"policy_authority", configuration->policy_authority}};
    for (size_t i = 0; i < sizeof(needed) / sizeof(needed[0]); i++) {
        if (needed[i].value[0] == '\0') {
            return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-MISSING",
                                "%s: sealed: %s is missing; write it there or give --%s PATH", path,
                                needed[i].name, needed[i].name);
        }
    }
    bool development = cm_config_tpm_development(configuration->tpm);
    if (!development && configuration->tpm[0] != '/') {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-VALUE",
                            "%s: sealed: tpm is %.64s, expected development or an absolute path",
                            path, configuration->tpm);
    }
    if (!development && configuration->attest_mode[0] == '\0') {
        return cm_error_set(
            err, CM_E_CONFIG, "CM-CONFIG-MISSING",
            "%s: sealed: attest_mode is missing: choose strict (one start per boot) or "
            "restartable for the TPM %s",
            path, configuration->tpm);
    }
    if (configuration->requests_per_key_max > configuration->requests_max) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-BOUNDS",
                            "%s: requests_per_key_max %llu is larger than requests_max %llu", path,
                            (unsigned long long)configuration->requests_per_key_max,
                            (unsigned long long)configuration->requests_max);
    }
    return CM_OK;
}
