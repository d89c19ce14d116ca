/* casemate measure: what a start would measure, without starting. The owner signs states from it.
 */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "loader/tpm/enrolment.h"
#include "loader/tpm/measure.h"
#include "policies/guard/rules.h"
#include "runtime/base/hex.h"
#include "runtime/base/sealed.h"
#include "runtime/cli/cli_internal.h"
#include "sandbox/filter.h"
#include "sandbox/image.h"

/* In the order in which the supervisor sends them. */
static const char *const programs[] = {"casemate-supervisor", "casemate-gateway", "casemate-worker",
                                       "casemate-keeper", "casemate-devtpm"};

static enum cm_status program_add(struct cm_image_store *store, struct cm_digest_cache *digests,
                                  int folder, const char *program,
                                  struct cm_measurement *measurement, struct cm_error *err)
{
    struct cm_image image;
    struct cm_event event = {.bytes = 0};
    enum cm_status status = cm_image_load(store, folder, program, &image, err);
    for (uint32_t i = 0; status == CM_OK && i < image.count; i++) {
        const struct cm_image_file *file = &store->files[image.files[i]];
        status = cm_event_file_add(&event, file->name, file->fd, digests, err);
    }
    return status == CM_OK
               ? cm_measurement_add(measurement, CM_EVENT_PROGRAM, event.data, event.bytes, err)
               : status;
}

/* Bytes that the supervisor measures as a sealed file of this name. */
static enum cm_status bytes_add(enum cm_event_type type, const char *name, const uint8_t *bytes,
                                size_t size, struct cm_digest_cache *digests,
                                struct cm_measurement *measurement, struct cm_error *err)
{
    struct cm_event event = {.bytes = 0};
    int fd = cm_memfd_sealed(name, bytes, size);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-CLI-MEASURE", "cannot measure the %s", name);
    }
    enum cm_status status = cm_event_file_add(&event, name, fd, digests, err);
    close(fd);
    return status == CM_OK
               ? cm_measurement_add(measurement, (uint32_t)type, event.data, event.bytes, err)
               : status;
}

/* All filters of the roles, as the supervisor sends them. */
static enum cm_status filters_add(struct cm_digest_cache *digests,
                                  struct cm_measurement *measurement, struct cm_error *err)
{
    static uint8_t bytes[CM_FILTERS_BYTES_MAX];
    return bytes_add(CM_EVENT_FILTERS, "filters", bytes, cm_filters_encode(bytes, sizeof(bytes)),
                     digests, measurement, err);
}

/* The guard's rules as the supervisor will give them to workers. */
static enum cm_status rules_add(const char *path, struct cm_digest_cache *digests,
                                struct cm_measurement *measurement, struct cm_error *err)
{
    uint8_t *pack = NULL;
    size_t bytes = 0;
    enum cm_status status = cm_rules_pack(path, &pack, &bytes, err);
    if (status == CM_OK) {
        status = bytes_add(CM_EVENT_RULES, "rules", pack, bytes, digests, measurement, err);
    }
    free(pack);
    return status;
}

enum cm_status cli_measure(const struct cm_configuration *configuration,
                           struct cm_measurement *ret_measurement, struct cm_error *err)
{
    static struct cm_image_store store;
    struct cm_digest_cache digests = {.count = 0};
    uint8_t owner[CM_PUBLIC_KEY_BYTES], policy[CM_PUBLIC_KEY_BYTES];
    struct cm_adapter_owners owners;
    char text[CM_CONFIG_SEALED_BYTES];
    size_t bytes = 0;
    int folder = -1;
    bool development = cm_config_tpm_development(configuration->tpm);
    size_t count = sizeof(programs) / sizeof(programs[0]) - (development ? 0 : 1);
    ret_measurement->count = 0;
    enum cm_status status = cli_programs_open(&folder, err);
    for (size_t i = 0; status == CM_OK && i < count; i++) {
        status = program_add(&store, &digests, folder, programs[i], ret_measurement, err);
    }
    if (status == CM_OK) {
        status = filters_add(&digests, ret_measurement, err);
    }
    if (status == CM_OK) {
        status = cm_config_point_read(configuration->package_owner, owner, err);
    }
    if (status == CM_OK) {
        status = cm_config_point_read(configuration->policy_authority, policy, err);
    }
    if (status == CM_OK) {
        status = cm_config_owners_read(configuration, &owners, err);
    }
    if (status == CM_OK) {
        status = cm_config_sealed_text(configuration, owner, policy, &owners, text, &bytes, err);
    }
    if (status == CM_OK) {
        status = cm_measurement_add(ret_measurement, CM_EVENT_CONFIGURATION, text, bytes, err);
    }
    if (status == CM_OK && strcmp(configuration->guard, "on") == 0) {
        status = rules_add(configuration->guard_rules, &digests, ret_measurement, err);
    }
    if (status == CM_OK) {
        status = cm_measurement_add(ret_measurement, CM_EVENT_DEVICE, configuration->device,
                                    strlen(configuration->device), err);
    }
    cm_image_store_close(&store);
    if (folder >= 0) {
        close(folder);
    }
    return status;
}

/* As an array of {name, sha256}. */
static json_t *files_json(const struct cm_event *event)
{
    json_t *files = json_array();
    const char *name;
    const uint8_t *digest;
    char hex[2 * CM_DIGEST_BYTES + 1];
    for (uint32_t at = 0; cm_event_file_next(event, &at, &name, &digest);) {
        cm_hex_write(digest, CM_DIGEST_BYTES, hex);
        json_array_append_new(files, json_pack("{s:s, s:s}", "name", name, "sha256", hex));
    }
    return files;
}

static enum cm_status measurement_json(const struct cm_measurement *measurement,
                                       struct cm_error *err)
{
    json_t *events = json_array();
    for (uint32_t i = 0; i < measurement->count; i++) {
        const struct cm_event *event = &measurement->events[i];
        uint8_t digest[CM_DIGEST_BYTES];
        char hex[2 * CM_DIGEST_BYTES + 1];
        enum cm_status status = cm_event_digest(event, digest, err);
        if (status != CM_OK) {
            json_decref(events);
            return status;
        }
        cm_hex_write(digest, sizeof(digest), hex);
        json_t *row = json_pack("{s:s, s:s}", "type", cm_event_name(event->type), "digest", hex);
        if (event->type == CM_EVENT_PROGRAM || event->type == CM_EVENT_FILTERS ||
            event->type == CM_EVENT_RULES) {
            json_object_set_new(row, "files", files_json(event));
        } else {
            json_object_set_new(row, "text", json_stringn((const char *)event->data, event->bytes));
        }
        json_array_append_new(events, row);
    }
    json_t *whole = json_pack("{s:o}", "events", events);
    json_dumpf(whole, stdout, JSON_INDENT(1));
    puts("");
    json_decref(whole);
    return CM_OK;
}

static void measurement_print(const struct cm_measurement *measurement)
{
    for (uint32_t i = 0; i < measurement->count; i++) {
        const struct cm_event *event = &measurement->events[i];
        const char *subject =
            event->type != CM_EVENT_CONFIGURATION ? (const char *)event->data : "sealed:";
        printf("%2u  %-14s %.*s\n", i + 1, cm_event_name(event->type),
               (int)strnlen(subject, event->bytes), subject);
    }
    puts("then the package's core digest; `--out FILE` writes this for the model's owner");
}

enum cm_status command_measure(struct words *words, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct cm_configuration configuration;
    static struct cm_measurement measurement;
    static uint8_t bytes[CM_LOG_BYTES_MAX];
    size_t size = 0;
    bool as_json = words_flag_take(words, "json");
    const char *out = words_value_take(words, "out");
    enum cm_status status =
        cm_config_arguments_load(words->count, words->at, &arguments, &configuration, err);
    if (status == CM_OK) {
        status = cm_config_complete(&configuration, arguments.path, err);
    }
    if (status == CM_OK) {
        status = cli_measure(&configuration, &measurement, err);
    }
    if (status == CM_OK && out != NULL) {
        status = cm_measurement_encode(&measurement, bytes, sizeof(bytes), &size, err);
    }
    if (status == CM_OK && out != NULL) {
        status = cli_file_write(out, bytes, size, 0644, err);
    }
    if (status == CM_OK && as_json) {
        status = measurement_json(&measurement, err);
    } else if (status == CM_OK) {
        measurement_print(&measurement);
    }
    return status;
}
