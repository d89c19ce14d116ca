/* casemate status: what the supervisor last wrote, and whether it still runs. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "runtime/cli/cli_internal.h"

/* The supervisor holds the lock as long as it lives. */
static bool service_runs(const char *state)
{
    char path[CM_CONFIG_TEXT_BYTES + 16];
    snprintf(path, sizeof(path), "%s/run/lock", state);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    bool held = flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    close(fd);
    return held;
}

static const char *text_of(const json_t *object, const char *name)
{
    const char *text = json_string_value(json_object_get(object, name));
    return text != NULL ? text : "";
}

static long long number_of(const json_t *object, const char *name)
{
    return json_integer_value(json_object_get(object, name));
}

static void roles_print(const json_t *roles)
{
    const char *name;
    json_t *role;
    printf("%-11s %-9s %7s %9s %9s %9s\n", "role", "state", "pid", "restarts", "start_ms", "MiB");
    json_object_foreach((json_t *)roles, name, role)
    {
        printf("%-11s %-9s %7lld %9lld %9lld %9.1f\n", name, text_of(role, "state"),
               number_of(role, "pid"), number_of(role, "restarts"), number_of(role, "start_ms"),
               (double)number_of(role, "resident_bytes") / 1048576.0);
    }
}

static void status_print(const json_t *root)
{
    const json_t *load = json_object_get(root, "load");
    const json_t *not_yet = json_object_get(root, "not_yet");
    bool ready = json_is_true(json_object_get(root, "ready"));
    printf("casemate %s: %s%s%s\n", text_of(root, "version"),
           ready ? "ready" : "not ready: ", ready ? "" : text_of(root, "reason"), "");
    printf("url:      https://%s/v1\n", text_of(root, "listen"));
    printf("package:  %s\n", text_of(root, "package"));
    printf("device:   %s\n", text_of(root, "device"));
    bool development = cm_config_tpm_development(text_of(root, "tpm"));
    printf("tpm:      %s%s\n", text_of(root, "tpm"), development ? " (protects nothing)" : "");
    printf("keys:     %lld\n", number_of(json_object_get(root, "keys"), "count"));
    if (ready) {
        bool locked = json_is_true(json_object_get(load, "arena_locked"));
        printf("load:     %lld bytes in %lld ms (read %lld, verify %lld, decrypt %lld)\n",
               number_of(load, "bytes"), number_of(load, "total_us") / 1000,
               number_of(load, "read_us") / 1000, number_of(load, "verify_us") / 1000,
               number_of(load, "decrypt_us") / 1000);
        printf("weights:  %s\n", locked ? "locked" : "not locked");
    }
    roles_print(json_object_get(root, "roles"));
    for (size_t i = 0; i < json_array_size(not_yet); i++) {
        printf("not yet: %s\n", json_string_value(json_array_get(not_yet, i)));
    }
}

enum cm_status command_status(struct words *words, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct cm_configuration configuration;
    char path[CM_CONFIG_TEXT_BYTES + 32];
    json_error_t where;
    bool as_json = words_flag_take(words, "json");
    enum cm_status status =
        cm_config_arguments_load(words->count, words->at, &arguments, &configuration, err);
    if (status != CM_OK) {
        return status;
    }
    if (!service_runs(configuration.state)) {
        if (as_json) {
            printf("{\"running\": false}\n");
        }
        return cm_error_set(err, CM_E_SYSTEM, "CM-CLI-STOPPED",
                            "no service runs from %s; casemate serve --state %s starts one",
                            configuration.state, configuration.state);
    }
    snprintf(path, sizeof(path), "%s/run/status.json", configuration.state);
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &where);
    if (root == NULL) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-CLI-STATUS", "cannot read %s: %s", path,
                            where.text);
    }
    if (as_json) {
        json_object_set_new(root, "running", json_true());
        json_dumpf(root, stdout, JSON_INDENT(1));
        printf("\n");
    } else {
        status_print(root);
    }
    json_decref(root);
    return CM_OK;
}
