/* serve, keys and version. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "runtime/cli/cli_internal.h"
#include "sandbox/image.h"

#define ENVIRONMENT_MAX 256u

enum cm_status command_version(struct words *words, struct cm_error *err)
{
    bool as_json = words_flag_take(words, "json");
    if (words->count != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "version does not know \"%.64s\"",
                            words->at[0]);
    }
    printf(as_json ? "{\"version\": \"%s\", \"compiler\": \"%s\"}\n"
                   : "casemate %s (compiler %s)\n",
           CASEMATE_VERSION, __VERSION__);
    return CM_OK;
}

/* What the supervisor may know of our environment. An allow list: the loader and libc obey others,
 * and would bring in code or behaviour that nobody has measured. */
static bool environment_passes(const char *entry)
{
    static const char *const names[] = {"CASEMATE_",      "HOME=",         "XDG_STATE_HOME=",
                                        "NOTIFY_SOCKET=", "WATCHDOG_PID=", "WATCHDOG_USEC="};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strncmp(entry, names[i], strlen(names[i])) == 0) {
            return true;
        }
    }
    return false;
}

/* Execute a sealed copy of the supervisor, which measures the descriptors that it runs from. */
static enum cm_status supervisor_exec(char *const *arguments, struct cm_error *err)
{
    static struct cm_image_store store;
    static char *environment[ENVIRONMENT_MAX + 1];
    struct cm_image image;
    int folder = -1, fds[CM_IMAGE_FILES_MAX], high[CM_IMAGE_FILES_MAX + 1];
    size_t used = 0;
    enum cm_status status = cli_programs_open(&folder, err);
    if (status == CM_OK) {
        status = cm_image_load(&store, folder, arguments[0], &image, err);
    }
    if (status != CM_OK) {
        return status;
    }
    for (char **entry = environ; *entry != NULL && used < ENVIRONMENT_MAX; entry++) {
        if (environment_passes(*entry)) {
            environment[used++] = *entry;
        }
    }
    uint32_t count = cm_image_fds(&store, &image, fds);
    /* Out of the way first: no order of dup2 can then clobber. */
    bool good = true;
    for (uint32_t i = 0; i <= count; i++) {
        high[i] = fcntl(i < count ? fds[i] : folder, F_DUPFD_CLOEXEC, CM_IMAGE_FD_FIRST + 64);
        good = good && high[i] >= 0;
    }
    for (uint32_t i = 0; good && i < count; i++) {
        good = dup2(high[i], CM_IMAGE_FD_FIRST + (int)i) >= 0;
    }
    good = good && dup2(high[count], CM_IMAGE_FD_FOLDER) >= 0 &&
           close_range(CM_IMAGE_FD_FIRST + count, ~0u, 0) == 0;
    if (good) {
        cm_image_exec(&image, arguments, environment);
    }
    return cm_error_errno(err, errno, "CM-CLI-EXEC", "cannot run %s", arguments[0]);
}

enum cm_status command_serve(struct words *words, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct cm_configuration configuration;
    struct key_store *store = NULL;
    enum cm_status status =
        cm_config_arguments_load(words->count, words->at, &arguments, &configuration, err);
    if (status == CM_OK) {
        status = cm_config_complete(&configuration, arguments.path, err);
    }
    if (status == CM_OK) {
        status = key_store_open(configuration.state, &store, err);
    }
    if (status == CM_OK) {
        status = key_store_publish(store, err);
    }
    key_store_close(store);
    if (status != CM_OK) {
        return status;
    }
    char *argv[CM_IMAGE_ARGUMENTS_MAX] = {(char *)"casemate-supervisor"};
    memcpy(argv + 1, words->at, (size_t)words->count * sizeof(char *));
    return supervisor_exec(argv, err);
}

/* The state folder of --config/--state and the like. */
static enum cm_status state_find(struct words *words, char ret_state[static CM_CONFIG_TEXT_BYTES],
                                 struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct cm_configuration configuration;
    enum cm_status status =
        cm_config_arguments_load(words->count, words->at, &arguments, &configuration, err);
    if (status == CM_OK) {
        memcpy(ret_state, configuration.state, CM_CONFIG_TEXT_BYTES);
    }
    return status;
}

static const char *entry_word(const struct key_entry *entry)
{
    return entry->revoked_unix_s != 0                                          ? "revoked"
           : entry->expires_unix_s != 0 && entry->expires_unix_s <= time(NULL) ? "expired"
                                                                               : "valid";
}

static void entry_print(void *context, const struct key_entry *entry)
{
    char created[32];
    char expires[32] = "never";
    struct tm day;
    (void)context;
    time_t at = entry->created_unix_s;
    strftime(created, sizeof(created), "%Y-%m-%d", gmtime_r(&at, &day));
    at = entry->expires_unix_s;
    if (at != 0) {
        strftime(expires, sizeof(expires), "%Y-%m-%d", gmtime_r(&at, &day));
    }
    printf("%-16s  %-8s  %-10s  %-10s  %-16s  %s\n", entry->id, entry_word(entry), created, expires,
           entry->name, entry->adapters);
}

static void entry_add(void *context, const struct key_entry *entry)
{
    json_array_append_new((json_t *)context,
                          json_pack("{s:s, s:s, s:s, s:s, s:I, s:I, s:I}", "id", entry->id, "name",
                                    entry->name, "adapters", entry->adapters, "status",
                                    entry_word(entry), "created_unix_s",
                                    (json_int_t)entry->created_unix_s, "expires_unix_s",
                                    (json_int_t)entry->expires_unix_s, "revoked_unix_s",
                                    (json_int_t)entry->revoked_unix_s));
}

static enum cm_status keys_list(struct key_store *store, bool as_json, struct cm_error *err)
{
    if (!as_json) {
        printf("%-16s  %-8s  %-10s  %-10s  %-16s  %s\n", "id", "status", "created", "expires",
               "name", "adapters");
        return key_store_list(store, entry_print, NULL, err);
    }
    json_t *list = json_array();
    enum cm_status status = key_store_list(store, entry_add, list, err);
    if (status == CM_OK) {
        json_dumpf(list, stdout, JSON_INDENT(1) | JSON_SORT_KEYS);
        printf("\n");
    }
    json_decref(list);
    return status;
}

static enum cm_status keys_add(struct key_store *store, const char *name, const char *days,
                               const char *adapters, bool as_json, struct cm_error *err)
{
    char text[CLI_KEY_TEXT_BYTES];
    char *end = NULL;
    int64_t expires = 0;
    size_t size = strlen(name);
    if (size == 0 || size > 39 ||
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._@") !=
            size) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "NAME: 1 to 39 letters, digits, '-', '.', '_', '@'");
    }
    if (days != NULL) {
        errno = 0;
        long count = strtol(days, &end, 10);
        if (errno != 0 || *end != '\0' || end == days || count < 1 || count > 36500) {
            return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "--expires-days: 1 to 36500");
        }
        expires = time(NULL) + (int64_t)count * 86400;
    }
    enum cm_status status = key_store_add(store, name, expires, adapters, text, err);
    if (status == CM_OK && as_json) {
        printf("{\"id\": \"%.16s\", \"key\": \"%s\", \"expires_unix_s\": %lld}\n", text + 3, text,
               (long long)expires);
    } else if (status == CM_OK) {
        printf("%s\n", text);
        fprintf(stderr,
                "casemate: shown once and not kept; revoke it with: casemate keys revoke "
                "%.16s\n",
                text + 3);
    }
    cm_wipe(text, sizeof(text));
    return status;
}

enum cm_status command_keys(struct words *words, struct cm_error *err)
{
    char state[CM_CONFIG_TEXT_BYTES];
    struct key_store *store = NULL;
    bool as_json = words_flag_take(words, "json");
    const char *days = words_value_take(words, "expires-days");
    const char *adapters = words_value_take(words, "adapters");
    const char *verb = words->count > 0 ? words->at[0] : "";
    bool add = strcmp(verb, "add") == 0;
    bool revoke = strcmp(verb, "revoke") == 0, grant = strcmp(verb, "grant") == 0;
    int used = add || revoke || grant ? 2 : 1;
    if ((!add && !revoke && !grant && strcmp(verb, "list") != 0) || words->count < used ||
        (used == 2 && words->at[1][0] == '-') || (days != NULL && !add) ||
        (adapters != NULL ? !add && !grant : grant)) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "expected keys add NAME [--expires-days N] [--adapters LIST], keys "
                            "grant ID --adapters LIST, keys list, or keys revoke ID");
    }
    const char *subject = used == 2 ? words->at[1] : "";
    words->count -= used;
    memmove(words->at, words->at + used, (size_t)words->count * sizeof(char *));
    enum cm_status status = state_find(words, state, err);
    if (status == CM_OK) {
        status = key_store_open(state, &store, err);
    }
    if (status == CM_OK) {
        status =
            add ? keys_add(store, subject, days, adapters != NULL ? adapters : "none", as_json, err)
            : revoke ? key_store_revoke(store, subject, err)
            : grant  ? key_store_grant(store, subject, adapters, err)
                     : keys_list(store, as_json, err);
    }
    if (status == CM_OK && revoke) {
        printf("casemate: %s is revoked; a running service refuses it within a second\n", subject);
    } else if (status == CM_OK && grant) {
        printf("casemate: %s may use of adapters: %s; a running service knows it within a second\n",
               subject, adapters);
    }
    key_store_close(store);
    return status;
}
