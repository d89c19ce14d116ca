/* casemate sandbox report: what holds for each running role, and who says so.
 *
 * "read": from /proc, from outside. "probed": the role tried it before its filter closed and was
 * refused. The calls are counted from the filters that the kernel has installed, not from policies.
 */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "runtime/cli/cli_internal.h"
#include "sandbox/report.h"

static long long number_of(const json_t *object, const char *name)
{
    return json_integer_value(json_object_get(object, name));
}

/* {"layer", "holds", "by"} for each layer that can be told. */
static json_t *layers_json(const struct cm_observed *seen, uint32_t probed)
{
    json_t *rows = json_array();
    for (uint32_t i = 0; i < CM_LAYER_COUNT; i++) {
        const uint32_t bit = CM_LAYER_BIT(i);
        /* A role has an identity of its own, or a user namespace instead. */
        if ((i == CM_LAYER_USER_NS && (seen->layers & CM_LAYER_BIT(CM_LAYER_IDENTITY)) != 0) ||
            (i == CM_LAYER_IDENTITY && (seen->layers & CM_LAYER_BIT(CM_LAYER_USER_NS)) != 0)) {
            continue;
        }
        const bool tells = (seen->readable & bit) != 0, said = (probed & bit) != 0;
        const char *by = tells ? "read" : (said ? "probed" : "not known");
        const bool holds = tells ? (seen->layers & bit) != 0 : said;
        json_array_append_new(rows, json_pack("{s:s, s:s, s:b, s:s}", "layer",
                                              cm_layer_word((enum cm_confine_layer)i), "name",
                                              cm_layer_name((enum cm_confine_layer)i), "holds",
                                              holds, "by", by));
    }
    return rows;
}

static json_t *limit_json(uint64_t limit)
{
    return limit == UINT64_MAX ? json_null() : json_integer((json_int_t)limit);
}

static json_t *calls_json(const struct cm_call_set *calls)
{
    json_t *names = json_array();
    for (uint32_t number = 0; number < CM_CALLS_MAX; number++) {
        if (calls->allowed[number]) {
            json_array_append_new(names, json_string(cm_call_name(number)));
        }
    }
    return names;
}

static json_t *role_json(const char *name, const json_t *role)
{
    static struct cm_call_set calls;
    struct cm_observed seen;
    const pid_t pid = (pid_t)number_of(role, "pid");
    cm_observe(pid, name, &seen);
    json_t *row = json_pack("{s:i, s:i, s:o}", "pid", (int)pid, "filters", (int)seen.filters,
                            "layers", layers_json(&seen, (uint32_t)number_of(role, "probed")));
    json_object_set_new(row, "uid", json_integer(seen.uid));
    json_object_set_new(row, "file_bytes_max", limit_json(seen.file_bytes));
    json_object_set_new(row, "files_max", limit_json(seen.files));
    json_object_set_new(row, "memory_bytes_max", limit_json(seen.memory_bytes));
    if (cm_calls_read(pid, &calls)) {
        json_object_set_new(row, "calls", json_integer(calls.count));
        json_object_set_new(row, "calls_by", json_string("read"));
        json_object_set_new(row, "call_names", calls_json(&calls));
    } else {
        json_object_set_new(row, "calls", json_null());
        json_object_set_new(row, "calls_by", json_string("not readable: needs root"));
    }
    return row;
}

static void role_print(const char *name, const json_t *row)
{
    const json_t *calls = json_object_get(row, "calls");
    const json_t *names = json_object_get(row, "call_names");
    size_t i;
    json_t *layer;
    printf("%s (pid %lld, uid %lld)%s\n", name, number_of(row, "pid"), number_of(row, "uid"),
           strcmp(name, "supervisor") == 0
               ? ": opens and watches for the others; its filter is what holds it"
               : "");
    json_array_foreach(json_object_get(row, "layers"), i, layer)
    {
        const char *by = json_string_value(json_object_get(layer, "by"));
        const char *holds = json_is_true(json_object_get(layer, "holds")) ? "yes"
                            : strcmp(by, "not known") == 0                ? "?"
                                                                          : "no";
        printf("  %-4s %-40s %s\n", holds, json_string_value(json_object_get(layer, "name")), by);
    }
    if (json_is_integer(calls)) {
        printf("  %-4lld %-40s read:", (long long)json_integer_value(calls),
               "system calls allowed, of all");
        json_array_foreach(names, i, layer)
        {
            printf(" %s", json_string_value(layer));
        }
        printf("\n");
    } else {
        printf("  ?    system calls allowed: %s\n",
               json_string_value(json_object_get(row, "calls_by")));
    }
}

static enum cm_status report(const char *state, bool as_json, struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + 32];
    const char *name;
    json_t *role, *all = json_object();
    snprintf(path, sizeof(path), "%s/run/status.json", state);
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, NULL);
    bool runs = root != NULL && cli_service_runs(state);
    json_object_foreach(json_object_get(root, "roles"), name, role)
    {
        if (runs && number_of(role, "pid") > 0) {
            json_object_set_new(all, name, role_json(name, role));
        }
    }
    json_t *lacks = json_object_get(json_object_get(root, "sandbox"), "lacks");
    if (runs && as_json) {
        json_t *whole = json_pack("{s:O, s:O?}", "roles", all, "lacks", lacks);
        json_dumpf(whole, stdout, JSON_INDENT(1));
        puts("");
        json_decref(whole);
    } else if (runs) {
        size_t i;
        json_object_foreach(all, name, role)
        {
            role_print(name, role);
        }
        json_array_foreach(lacks, i, role)
        {
            printf("this machine lacks: %s\n", json_string_value(role));
        }
    }
    json_decref(all);
    json_decref(root);
    return runs ? CM_OK
                : cm_error_set(err, CM_E_SYSTEM, "CM-CLI-STOPPED",
                               "no service runs from %.200s: there is nothing to report. Start: "
                               "casemate serve --state %.200s",
                               state, state);
}

enum cm_status command_sandbox(struct words *words, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct cm_configuration configuration;
    bool as_json = words_flag_take(words, "json");
    if (words->count < 1 || strcmp(words->at[0], "report") != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "casemate sandbox knows: report");
    }
    enum cm_status status =
        cm_config_arguments_load(words->count - 1, words->at + 1, &arguments, &configuration, err);
    return status == CM_OK ? report(configuration.state, as_json, err) : status;
}
