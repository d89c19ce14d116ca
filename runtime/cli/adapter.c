/* adapter: what shall be loaded beside the model. Files lie in <state>/adapters, the table of what
 * is wanted is <state>/adapters.table (runtime/base/frame.h); the service looks at it by itself. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "loader/package/package.h"
#include "runtime/base/cursor.h"
#include "runtime/cli/cli_internal.h"

#define PATH_BYTES  (CM_CONFIG_TEXT_BYTES + CM_NAME_BYTES + 32)
#define TABLE_BYTES (16u + CM_ADAPTERS_MAX * sizeof(struct cm_adapter_row))

struct table {
    uint64_t generation; /* also the last serial that was given */
    uint32_t count;
    struct cm_adapter_row rows[CM_ADAPTERS_MAX]; /* by name */
};

static struct cm_configuration configuration;

static enum cm_status table_read(struct table *table, struct cm_error *err)
{
    char path[PATH_BYTES];
    uint8_t bytes[TABLE_BYTES + 1];
    size_t size = 0;
    struct timespec now;
    snprintf(path, sizeof(path), "%s/adapters.table", configuration.state);
    memset(table, 0, sizeof(*table));
    if (access(path, F_OK) != 0) {
        /* No serial of a table that was deleted comes again. */
        clock_gettime(CLOCK_REALTIME, &now);
        table->generation = (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000;
        return CM_OK;
    }
    enum cm_status status = cli_file_read(path, bytes, sizeof(bytes), &size, err);
    if (status != CM_OK) {
        return status;
    }
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    const uint8_t *magic = cm_cursor_take(&cursor, 8);
    table->generation = cm_cursor_u64(&cursor);
    bool good = cm_cursor_ok(&cursor) && memcmp(magic, "CMADAP1", 8) == 0 &&
                cm_cursor_left(&cursor) % sizeof(table->rows[0]) == 0;
    table->count = (uint32_t)(cm_cursor_left(&cursor) / sizeof(table->rows[0]));
    for (uint32_t i = 0; good && i < table->count; i++) {
        cm_cursor_copy(&cursor, &table->rows[i], sizeof(table->rows[i]));
        good = cm_name_valid(table->rows[i].name);
    }
    return good ? CM_OK
                : cm_error_set(err, CM_E_CONFIG, "CM-CLI-ADAPTERS",
                               "%s is damaged: remove it, and add the adapters again", path);
}

static enum cm_status table_write(struct table *table, struct cm_error *err)
{
    char path[PATH_BYTES];
    uint8_t bytes[TABLE_BYTES];
    struct cm_writer writer = cm_writer_init(bytes, sizeof(bytes));
    cm_writer_bytes(&writer, "CMADAP1", 8);
    cm_writer_u64(&writer, table->generation);
    cm_writer_bytes(&writer, table->rows, table->count * sizeof(table->rows[0]));
    CM_ASSERT(!writer.failed);
    snprintf(path, sizeof(path), "%s/adapters.table", configuration.state);
    return cli_file_write(path, bytes, writer.offset, 0600, err);
}

/* Held until the descriptor is closed: one change at a time. */
static enum cm_status table_lock(int *ret_fd, struct cm_error *err)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof(path), "%s/adapters.lock", configuration.state);
    *ret_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (*ret_fd < 0 || flock(*ret_fd, LOCK_EX) != 0) {
        return cm_error_errno(err, errno, "CM-CLI-ADAPTERS",
                              "cannot open %s; `casemate init` makes the folder", path);
    }
    return CM_OK;
}

static void adapter_path(char ret_path[static PATH_BYTES], const char *name, const char *end)
{
    snprintf(ret_path, PATH_BYTES, "%s/adapters/%s.cmpkg%s", configuration.state, name, end);
}

static enum cm_status file_copy(const char *from, const char *to, struct cm_error *err)
{
    static uint8_t bytes[1u << 20];
    char partial[PATH_BYTES + 16];
    snprintf(partial, sizeof(partial), "%s.partial", to);
    int in = open(from, O_RDONLY | O_CLOEXEC);
    int out = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    bool good = in >= 0 && out >= 0;
    for (ssize_t got = 1; good && got > 0;) {
        got = read(in, bytes, sizeof(bytes));
        good = got >= 0;
        for (ssize_t used = 0; good && used < got;) {
            ssize_t put = write(out, bytes + used, (size_t)(got - used));
            good = put > 0;
            used += good ? put : 0;
        }
    }
    cli_owner_follow(partial);
    good = good && fsync(out) == 0 && rename(partial, to) == 0;
    int error_number = errno;
    if (in >= 0) {
        close(in);
    }
    if (out >= 0) {
        close(out);
        if (!good) {
            unlink(partial);
        }
    }
    return good ? CM_OK
                : cm_error_errno(err, error_number, "CM-CLI-WRITE", "cannot copy %s to %s", from,
                                 to);
}

static enum cm_status files_copy(const char *file, const char *name, struct cm_error *err)
{
    char to[PATH_BYTES], policy[PATH_BYTES];
    snprintf(to, sizeof(to), "%s/adapters", configuration.state);
    if (mkdir(to, 0700) != 0 && errno != EEXIST) {
        return cm_error_errno(err, errno, "CM-CLI-ADAPTERS", "cannot make %s", to);
    }
    cli_owner_follow(to);
    if (snprintf(policy, sizeof(policy), "%s.policy", file) >= (int)sizeof(policy) ||
        access(policy, R_OK) != 0) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                            "there is no policy list beside %s (%.200s): copy it there, it comes "
                            "with the adapter",
                            file, policy);
    }
    adapter_path(to, name, ".policy");
    enum cm_status status = file_copy(policy, to, err);
    if (status == CM_OK) {
        adapter_path(to, name, "");
        status = file_copy(file, to, err);
    }
    return status;
}

/* What the service would refuse at once is refused here. */
static enum cm_status file_check(const char *file, struct cm_error *err)
{
    static struct cm_package_head head;
    struct cm_adapter_owners owners;
    const struct cm_adapter_owner *owner = NULL;
    enum cm_status status = cm_config_owners_read(&configuration, &owners, err);
    if (status == CM_OK) {
        status = cli_package_head(file, &head, err);
    }
    if (status == CM_OK) {
        status = cm_package_owner_find(&head, &owners, &owner, err);
    }
    if (status == CM_OK && head.core.payload_bytes > configuration.adapter_bytes_max) {
        status = cm_error_set(err, CM_E_CONFIG, "CM-CLI-ADAPTERS",
                              "%s holds %llu bytes of weights, adapter_bytes_max is %llu", file,
                              (unsigned long long)head.core.payload_bytes,
                              (unsigned long long)configuration.adapter_bytes_max);
    }
    return status;
}

/* "there/fables.cmpkg" -> "fables" */
static void name_of_file(const char *file, char ret_name[static CM_NAME_BYTES])
{
    const char *slash = strrchr(file, '/');
    snprintf(ret_name, CM_NAME_BYTES, "%.63s", slash != NULL ? slash + 1 : file);
    char *end = strstr(ret_name, ".cmpkg");
    if (end != NULL && strcmp(end, ".cmpkg") == 0) {
        *end = '\0';
    }
}

static enum cm_status row_insert(struct table *table, const char *name, struct cm_error *err)
{
    uint32_t at = 0;
    if (configuration.adapters_max == 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CLI-ADAPTERS",
                            "this node loads no adapters: `sealed: adapters_max` is 0");
    }
    if (table->count >= configuration.adapters_max) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CLI-ADAPTERS",
                            "there are %u adapters, and adapters_max is %llu: remove one first",
                            table->count, (unsigned long long)configuration.adapters_max);
    }
    while (at < table->count && strcmp(table->rows[at].name, name) < 0) {
        at++;
    }
    if (at < table->count && strcmp(table->rows[at].name, name) == 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-ADAPTERS",
                            "%s is there already: `casemate adapter remove %s` first", name, name);
    }
    memmove(&table->rows[at + 1], &table->rows[at], (table->count - at) * sizeof(table->rows[0]));
    table->rows[at] = (struct cm_adapter_row){.serial = ++table->generation};
    snprintf(table->rows[at].name, sizeof(table->rows[at].name), "%s", name);
    table->count++;
    return CM_OK;
}

static enum cm_status adapter_add(struct table *table, const char *file, const char *given,
                                  struct cm_error *err)
{
    char name[CM_NAME_BYTES];
    name_of_file(file, name);
    if (given != NULL) {
        snprintf(name, sizeof(name), "%.63s", given);
    }
    if (!cm_name_valid(name)) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "\"%.63s\" is no name of an adapter ([A-Za-z0-9._-]{1,63}); give "
                            "--name",
                            name);
    }
    enum cm_status status = row_insert(table, name, err);
    if (status == CM_OK) {
        status = file_check(file, err);
    }
    if (status == CM_OK) {
        status = files_copy(file, name, err);
    }
    if (status == CM_OK) {
        status = table_write(table, err);
    }
    if (status == CM_OK) {
        printf("casemate: %s is added; a running service loads it now (casemate adapter list)\n",
               name);
    }
    return status;
}

static enum cm_status adapter_remove(struct table *table, const char *name, struct cm_error *err)
{
    char path[PATH_BYTES];
    uint32_t at = 0;
    while (at < table->count && strcmp(table->rows[at].name, name) != 0) {
        at++;
    }
    if (at == table->count) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-ADAPTERS",
                            "there is no adapter \"%.63s\"; `casemate adapter list` shows them",
                            name);
    }
    memmove(&table->rows[at], &table->rows[at + 1],
            (table->count - at - 1) * sizeof(table->rows[0]));
    table->count--;
    table->generation++;
    enum cm_status status = table_write(table, err);
    if (status == CM_OK) {
        adapter_path(path, name, "");
        unlink(path);
        adapter_path(path, name, ".policy");
        unlink(path);
        printf("casemate: %s is removed; a running service finishes what it has begun with it, "
               "and wipes it\n",
               name);
    }
    return status;
}

/* What the service says of a row: borrowed from `told`; NULL: it has not seen it yet. */
static const json_t *told_of(const json_t *told, const struct cm_adapter_row *row)
{
    for (size_t i = 0; i < json_array_size(told); i++) {
        const json_t *each = json_array_get(told, i);
        if ((uint64_t)json_integer_value(json_object_get(each, "serial")) == row->serial) {
            return each;
        }
    }
    return NULL;
}

static const char *text_of(const json_t *object, const char *name)
{
    const char *text = json_string_value(json_object_get(object, name));
    return text != NULL ? text : "";
}

static void adapter_list(const struct table *table, bool as_json)
{
    char path[PATH_BYTES];
    json_error_t where;
    snprintf(path, sizeof(path), "%s/run/status.json", configuration.state);
    json_t *root = cli_service_runs(configuration.state) ? json_load_file(path, 0, &where) : NULL;
    json_t *list = json_array();
    if (!as_json) {
        printf("%-24s  %-10s  %-16s  %s\n", "name", "state", "package", "why");
    }
    for (uint32_t i = 0; i < table->count; i++) {
        const struct cm_adapter_row *row = &table->rows[i];
        const json_t *told = told_of(json_object_get(root, "adapters"), row);
        const char *state = root == NULL   ? "no service"
                            : told != NULL ? text_of(told, "state")
                                           : "new";
        if (as_json) {
            json_array_append_new(list,
                                  json_pack("{s:s, s:I, s:s, s:s, s:s, s:s}", "name", row->name,
                                            "serial", (json_int_t)row->serial, "state", state,
                                            "package", text_of(told, "package"), "id",
                                            text_of(told, "id"), "text", text_of(told, "text")));
        } else {
            printf("%-24s  %-10s  %-16.16s  %s%s%s\n", row->name, state, text_of(told, "package"),
                   text_of(told, "id"), text_of(told, "id")[0] != '\0' ? ": " : "",
                   text_of(told, "text"));
        }
    }
    if (as_json) {
        json_dumpf(list, stdout, JSON_INDENT(1));
        printf("\n");
    }
    json_decref(list);
    json_decref(root);
}

enum cm_status command_adapter(struct words *words, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct table table;
    bool as_json = words_flag_take(words, "json");
    const char *name = words_value_take(words, "name");
    const char *verb = words->count > 0 ? words->at[0] : "";
    bool add = strcmp(verb, "add") == 0, remove = strcmp(verb, "remove") == 0;
    int used = add || remove ? 2 : 1, lock = -1;
    if ((!add && !remove && strcmp(verb, "list") != 0) || words->count < used ||
        (used == 2 && words->at[1][0] == '-') || (name != NULL && !add)) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "expected adapter add FILE [--name NAME], adapter remove NAME, or "
                            "adapter list");
    }
    const char *subject = used == 2 ? words->at[1] : "";
    enum cm_status status = cm_config_arguments_load(words->count - used, words->at + used,
                                                     &arguments, &configuration, err);
    if (status == CM_OK && used == 2) {
        status = table_lock(&lock, err);
    }
    if (status == CM_OK) {
        status = table_read(&table, err);
    }
    if (status == CM_OK && add) {
        status = adapter_add(&table, subject, name, err);
    } else if (status == CM_OK && remove) {
        status = adapter_remove(&table, subject, err);
    } else if (status == CM_OK) {
        adapter_list(&table, as_json);
    }
    if (lock >= 0) {
        close(lock);
    }
    return status;
}
