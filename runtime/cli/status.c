/* casemate status: what the supervisor last wrote, and whether it still runs. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "runtime/cli/cli_internal.h"

bool cli_service_runs(const char *state)
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

bool cli_service_listens(const char *state, const char *address)
{
    char path[CM_CONFIG_TEXT_BYTES + 32];
    snprintf(path, sizeof(path), "%s/run/status.json", state);
    json_t *root = cli_service_runs(state) ? json_load_file(path, 0, NULL) : NULL;
    bool listens = root != NULL && strcmp(text_of(root, "listen"), address) == 0;
    json_decref(root);
    return listens;
}

static void roles_print(const json_t *roles)
{
    const char *name;
    json_t *role;
    printf("%-11s %-9s %7s %9s %9s %9s\n", "role", "state", "pid", "restarts", "start_ms", "MiB");
    json_object_foreach((json_t *)roles, name, role)
    {
        long long due_ms = number_of(role, "due_ms");
        printf("%-11s %-9s %7lld %9lld %9lld %9.1f", name, text_of(role, "state"),
               number_of(role, "pid"), number_of(role, "restarts"), number_of(role, "start_ms"),
               (double)number_of(role, "resident_bytes") / 1048576.0);
        due_ms > 0 ? printf("  again in %lld ms\n", due_ms) : printf("\n");
    }
}

/* What the machine lacks of the sandbox; `casemate sandbox report` has the rest. */
static void lacks_print(const json_t *lacks)
{
    const char *before = "sandbox:  lacks ";
    for (size_t i = 0; i < json_array_size(lacks); i++, before = ", ") {
        printf("%s%s", before, json_string_value(json_array_get(lacks, i)));
    }
    printf("%s\n", json_array_size(lacks) == 0 ? "sandbox:  whole" : "");
}

/* `casemate adapter list` says why one is refused. */
static void adapters_print(const json_t *root)
{
    const json_t *adapters = json_object_get(root, "adapters");
    long long most = number_of(root, "adapters_max");
    printf("adapters: %zu of %lld%s", json_array_size(adapters), most,
           json_array_size(adapters) > 0 ? ": " : "");
    for (size_t i = 0; i < json_array_size(adapters); i++) {
        const json_t *each = json_array_get(adapters, i);
        printf("%s%s %s", i > 0 ? ", " : "", text_of(each, "name"), text_of(each, "state"));
    }
    printf("\n");
}

static void time_text(long long unix_s, char ret_text[static 24])
{
    struct tm day;
    time_t at = (time_t)unix_s;
    strftime(ret_text, 24, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&at, &day));
}

/* The last ends that nobody asked for: when, who, how, why, and what to do about it. */
static void ends_print(const json_t *ends, size_t most)
{
    size_t count = json_array_size(ends);
    for (size_t i = count > most ? count - most : 0; i < count; i++) {
        const json_t *end = json_array_get(ends, i);
        char when[24];
        if (strcmp(text_of(end, "end"), cm_role_ends[CM_ROLE_END_STOPPED].word) == 0) {
            continue;
        }
        time_text(number_of(end, "unix_s"), when);
        printf("ended:    %s %s %s after %lld ms%s: %s: %s\n", when, text_of(end, "role"),
               text_of(end, "end"), number_of(end, "life_ms"),
               json_is_true(json_object_get(end, "served")) ? "" : ", before it served",
               text_of(end, "cause"), text_of(end, "text"));
        if (text_of(end, "next")[0] != '\0') {
            printf("          %s\n", text_of(end, "next"));
        }
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
        printf("load:     %lld bytes in %lld ms (read %lld, verify %lld, decrypt %lld)\n",
               number_of(load, "bytes"), number_of(load, "total_us") / 1000,
               number_of(load, "read_us") / 1000, number_of(load, "verify_us") / 1000,
               number_of(load, "decrypt_us") / 1000);
        printf("weights:  %s\n", text_of(load, "weights"));
    }
    adapters_print(root);
    lacks_print(json_object_get(json_object_get(root, "sandbox"), "lacks"));
    roles_print(json_object_get(root, "roles"));
    ends_print(json_object_get(root, "ends"), 5);
    for (size_t i = 0; i < json_array_size(not_yet); i++) {
        printf("not yet: %s\n", json_string_value(json_array_get(not_yet, i)));
    }
}

/* Nothing runs: what the last one left behind says why. root may be NULL. */
static enum cm_status stopped_explain(json_t *root, const char *state, bool as_json,
                                      struct cm_error *err)
{
    const json_t *over = json_object_get(root, "over");
    char last[512] = "none has run";
    if (over != NULL && number_of(over, "exit_code") == 0) {
        snprintf(last, sizeof(last), "the last one stopped as it was told");
    } else if (over != NULL) {
        snprintf(last, sizeof(last), "the last one ended with exit %lld, %s: %.400s",
                 number_of(over, "exit_code"), text_of(over, "id"), text_of(over, "text"));
    } else if (root != NULL) {
        snprintf(last, sizeof(last),
                 "the last one was killed from outside, or the machine went down under it");
    }
    if (as_json) {
        json_t *told = root != NULL ? json_incref(root) : json_object();
        json_object_set_new(told, "running", json_false());
        json_object_set_new(told, "ready", json_false());
        json_dumpf(told, stdout, JSON_INDENT(1));
        printf("\n");
        json_decref(told);
    } else if (over == NULL || number_of(over, "exit_code") != 0) {
        ends_print(json_object_get(root, "ends"), 5);
    }
    return cm_error_set(err, CM_E_SYSTEM, "CM-CLI-STOPPED",
                        "no service runs from %.100s: %.300s. Start: casemate serve --state %.100s",
                        state, last, state);
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
    bool runs = cli_service_runs(configuration.state);
    snprintf(path, sizeof(path), "%s/run/status.json", configuration.state);
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &where);
    if (!runs) {
        status = stopped_explain(root, configuration.state, as_json, err);
        json_decref(root);
        return status;
    }
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
