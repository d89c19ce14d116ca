/* One value: from its text into its field, with its range; and precedence over all of them. */
#include "policies/config/config.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char *field_text(struct cm_configuration *configuration, const struct cm_config_row *row)
{
    return (char *)configuration + row->offset;
}

/* A value as it is shown in an error: printable, shortened. */
static void shown_set(char ret_shown[static 72], const char *text, size_t bytes)
{
    size_t used = 0;
    for (size_t i = 0; i < bytes && used < 64; i++) {
        ret_shown[used++] = text[i] >= 0x20 && text[i] < 0x7f ? text[i] : '?';
    }
    memcpy(ret_shown + used, bytes > used ? "..." : "", bytes > used ? 4 : 1);
}

static enum cm_status refuse(const struct cm_config_row *row, const char *place,
                             const char *expected, const char *text, size_t bytes,
                             struct cm_error *err)
{
    char shown[72];
    shown_set(shown, text, bytes);
    return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-VALUE", "%s: %s: expected %s, found \"%s\"",
                        place, row->name, expected, shown);
}

static enum cm_status number_set(struct cm_configuration *configuration,
                                 const struct cm_config_row *row, const char *text, size_t bytes,
                                 const char *place, struct cm_error *err)
{
    uint64_t value = 0;
    bool good = bytes > 0 && bytes <= 19 && (bytes == 1 || text[0] != '0');
    for (size_t i = 0; good && i < bytes; i++) {
        good = text[i] >= '0' && text[i] <= '9';
        value = value * 10 + (uint64_t)(text[i] - '0');
    }
    if (!good || value < row->least || value > row->most) {
        char expected[128];
        snprintf(expected, sizeof(expected), "a whole number from %llu to %llu%s%s",
                 (unsigned long long)row->least, (unsigned long long)row->most,
                 row->unit[0] != '\0' ? " " : "", row->unit);
        return refuse(row, place, expected, text, bytes, err);
    }
    memcpy((char *)configuration + row->offset, &value, sizeof(value));
    return CM_OK;
}

static enum cm_status bool_set(struct cm_configuration *configuration,
                               const struct cm_config_row *row, const char *text, size_t bytes,
                               const char *place, struct cm_error *err)
{
    uint64_t value = bytes == 4 && memcmp(text, "true", 4) == 0;
    if (value == 0 && !(bytes == 5 && memcmp(text, "false", 5) == 0)) {
        return refuse(row, place, "true or false", text, bytes, err);
    }
    memcpy((char *)configuration + row->offset, &value, sizeof(value));
    return CM_OK;
}

static bool text_printable(const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f) {
            return false;
        }
    }
    return true;
}

static enum cm_status text_set(struct cm_configuration *configuration,
                               const struct cm_config_row *row, const char *text, size_t bytes,
                               const char *folder, const char *place, struct cm_error *err)
{
    char joined[2 * CM_CONFIG_TEXT_BYTES + 2];
    char expected[96];
    snprintf(expected, sizeof(expected), "printable text of %llu to %llu bytes",
             (unsigned long long)row->least, (unsigned long long)row->most);
    if (bytes < row->least || bytes > row->most || !text_printable(text, bytes)) {
        return refuse(row, place, expected, text, bytes, err);
    }
    bool relative = row->kind == CM_CONFIG_PATH && text[0] != '/' && folder != NULL;
    int used = snprintf(joined, sizeof(joined), "%s%s%.*s", relative ? folder : "",
                        relative ? "/" : "", (int)bytes, text);
    if (used < 0 || (size_t)used >= CM_CONFIG_TEXT_BYTES) {
        return refuse(row, place, "a shorter path", text, bytes, err);
    }
    memcpy(field_text(configuration, row), joined, (size_t)used + 1);
    return CM_OK;
}

static enum cm_status choice_set(struct cm_configuration *configuration,
                                 const struct cm_config_row *row, const char *text, size_t bytes,
                                 const char *place, struct cm_error *err)
{
    for (const char *at = row->choices; *at != '\0';) {
        size_t size = strcspn(at, "|");
        if (size == bytes && memcmp(at, text, bytes) == 0) {
            char *field = field_text(configuration, row);
            memcpy(field, text, bytes);
            field[bytes] = '\0';
            return CM_OK;
        }
        at += size + (at[size] == '|' ? 1 : 0);
    }
    char expected[128];
    snprintf(expected, sizeof(expected), "one of %s", row->choices);
    return refuse(row, place, expected, text, bytes, err);
}

bool cm_config_address_split(const char *text, char ret_host[static CM_NAME_BYTES],
                             uint16_t *ret_port)
{
    const char *colon = strrchr(text, ':');
    if (colon == NULL) {
        return false;
    }
    const char *host = text;
    size_t host_bytes = (size_t)(colon - text);
    bool six = host[0] == '[';
    if (six) {
        if (host_bytes < 3 || host[host_bytes - 1] != ']') {
            return false;
        }
        host++;
        host_bytes -= 2;
    }
    uint32_t port = 0;
    size_t digits = strlen(colon + 1);
    for (size_t i = 1; i <= digits && digits <= 5; i++) {
        if (colon[i] < '0' || colon[i] > '9') {
            return false;
        }
        port = port * 10 + (uint32_t)(colon[i] - '0');
    }
    char name[CM_NAME_BYTES];
    uint8_t address[sizeof(struct in6_addr)];
    if (digits == 0 || digits > 5 || port > 65535 || host_bytes >= sizeof(name)) {
        return false;
    }
    memcpy(name, host, host_bytes);
    name[host_bytes] = '\0';
    if (inet_pton(six ? AF_INET6 : AF_INET, name, address) != 1) {
        return false;
    }
    memcpy(ret_host, name, sizeof(name));
    *ret_port = (uint16_t)port;
    return true;
}

static enum cm_status address_set(struct cm_configuration *configuration,
                                  const struct cm_config_row *row, const char *text, size_t bytes,
                                  const char *place, struct cm_error *err)
{
    char copy[CM_NAME_BYTES];
    char host[CM_NAME_BYTES];
    uint16_t port;
    size_t kept = bytes < sizeof(copy) ? bytes : sizeof(copy) - 1;
    memcpy(copy, text, kept);
    copy[kept] = '\0';
    if (kept != bytes || strlen(copy) != bytes || !cm_config_address_split(copy, host, &port)) {
        return refuse(row, place, "an address like 127.0.0.1:8443 or [::1]:8443", text, bytes, err);
    }
    memcpy(field_text(configuration, row), copy, bytes + 1);
    return CM_OK;
}

/* Host names and literal addresses, comma between them (a YAML list arrives joined). */
static enum cm_status names_set(struct cm_configuration *configuration,
                                const struct cm_config_row *row, const char *text, size_t bytes,
                                const char *place, struct cm_error *err)
{
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.:_";
    struct cm_config_names names = {.count = 0};
    for (size_t at = 0; at <= bytes;) {
        size_t end = at;
        while (end < bytes && text[end] != ',') {
            if (memchr(allowed, text[end], sizeof(allowed) - 1) == NULL) {
                return refuse(row, place, "host names or addresses", text, bytes, err);
            }
            end++;
        }
        if (end == at || end - at >= CM_NAME_BYTES || names.count == CM_CONFIG_TLS_NAMES) {
            return refuse(row, place, "1 to 8 names of 1 to 63 bytes", text, bytes, err);
        }
        memcpy(names.names[names.count++], text + at, end - at);
        at = end + 1;
    }
    memcpy((char *)configuration + row->offset, &names, sizeof(names));
    return CM_OK;
}

enum cm_status cm_config_value_set(struct cm_configuration *configuration, size_t row_index,
                                   const char *text, size_t bytes, const char *folder,
                                   const char *place, struct cm_error *err)
{
    CM_ASSERT(row_index < CM_CONFIG_ROW_COUNT);
    const struct cm_config_row *row = &cm_config_rows[row_index];
    switch (row->kind) {
    case CM_CONFIG_NUMBER:
        return number_set(configuration, row, text, bytes, place, err);
    case CM_CONFIG_BOOL:
        return bool_set(configuration, row, text, bytes, place, err);
    case CM_CONFIG_TEXT:
    case CM_CONFIG_PATH:
        return text_set(configuration, row, text, bytes, folder, place, err);
    case CM_CONFIG_CHOICE:
        return choice_set(configuration, row, text, bytes, place, err);
    case CM_CONFIG_ADDRESS:
        return address_set(configuration, row, text, bytes, place, err);
    case CM_CONFIG_NAMES:
        return names_set(configuration, row, text, bytes, place, err);
    }
    return cm_error_set(err, CM_E_BUG, "CM-CONFIG-KIND", "row %zu has no kind", row_index);
}

static enum cm_status defaults_set(struct cm_configuration *configuration, struct cm_error *err)
{
    for (size_t i = 0; i < CM_CONFIG_ROW_COUNT; i++) {
        const char *text = cm_config_rows[i].default_text;
        if (text[0] == '\0') {
            continue; /* stays empty: not set */
        }
        enum cm_status status =
            cm_config_value_set(configuration, i, text, strlen(text), NULL, "default", err);
        if (status != CM_OK) {
            return status;
        }
    }
    return CM_OK;
}

static enum cm_status file_read(struct cm_configuration *configuration, const char *path,
                                struct cm_error *err)
{
    enum cm_status status = CM_OK;
    uint8_t *text = NULL;
    size_t used = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-OPEN",
                            "cannot open the configuration %s (%s); %s", path,
                            strerrordesc_np(errno),
                            errno == EACCES ? "be the user that the service runs as, or root"
                                            : "`casemate init` writes one");
    }
    text = malloc(CM_CONFIG_FILE_BYTES + 1);
    CM_ASSERT(text != NULL);
    for (ssize_t got = 1; got > 0 && used <= CM_CONFIG_FILE_BYTES; used += (size_t)got) {
        got = read(fd, text + used, CM_CONFIG_FILE_BYTES + 1 - used);
        if (got < 0) {
            status = cm_error_errno(err, errno, "CM-CONFIG-READ", "cannot read %s", path);
            goto out;
        }
    }
    if (used > CM_CONFIG_FILE_BYTES) {
        status = cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-SIZE", "%s: larger than %u bytes", path,
                              CM_CONFIG_FILE_BYTES);
        goto out;
    }
    char folder[CM_CONFIG_TEXT_BYTES];
    const char *slash = strrchr(path, '/');
    snprintf(folder, sizeof(folder), "%.*s", slash != NULL ? (int)(slash - path) : 1,
             slash != NULL ? path : ".");
    status = cm_config_text_read(configuration, text, used, path, folder, err);
out:
    free(text);
    close(fd);
    return status;
}

static enum cm_status environment_read(struct cm_configuration *configuration,
                                       char *const *environment, struct cm_error *err)
{
    for (size_t i = 0; environment != NULL && environment[i] != NULL; i++) {
        static const char prefix[] = "CASEMATE_";
        const char *entry = environment[i];
        const char *equals = strchr(entry, '=');
        if (strncmp(entry, prefix, sizeof(prefix) - 1) != 0 || equals == NULL) {
            continue;
        }
        char name[64];
        char place[96];
        size_t size = (size_t)(equals - entry) - (sizeof(prefix) - 1);
        if (size >= sizeof(name)) {
            continue;
        }
        for (size_t j = 0; j < size; j++) {
            char c = entry[sizeof(prefix) - 1 + j];
            name[j] = c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : '\0';
            name[j] = c == '_' ? '_' : name[j];
        }
        /* Unknown names are left alone: Kubernetes injects CASEMATE_PORT and the like for a service
         * called casemate. */
        int row = cm_config_row_find(name, size);
        if (row < 0) {
            continue;
        }
        snprintf(place, sizeof(place), "environment CASEMATE_%.*s", (int)size,
                 entry + sizeof(prefix) - 1);
        enum cm_status status = cm_config_value_set(configuration, (size_t)row, equals + 1,
                                                    strlen(equals + 1), NULL, place, err);
        if (status != CM_OK) {
            return status;
        }
        configuration->sources[row] = CM_CONFIG_FROM_ENVIRONMENT;
    }
    return CM_OK;
}

static enum cm_status overrides_read(struct cm_configuration *configuration,
                                     const struct cm_config_override *overrides, size_t count,
                                     struct cm_error *err)
{
    for (size_t i = 0; i < count; i++) {
        size_t size = strlen(overrides[i].name);
        int row = cm_config_row_find(overrides[i].name, size);
        if (row < 0) {
            const char *near = cm_config_nearest(overrides[i].name, size);
            return cm_error_set(err, CM_E_USAGE, "CM-CONFIG-OPTION", "unknown option --%s%s%s%s",
                                overrides[i].name, near != NULL ? "; did you mean --" : "",
                                near != NULL ? near : "", near != NULL ? "?" : "");
        }
        enum cm_status status =
            cm_config_value_set(configuration, (size_t)row, overrides[i].value,
                                strlen(overrides[i].value), NULL, "command line", err);
        if (status != CM_OK) {
            return status;
        }
        configuration->sources[row] = CM_CONFIG_FROM_COMMAND_LINE;
    }
    return CM_OK;
}

/* kv_pages and kv_bytes say the same thing: the stronger source wins, both from one are refused. */
static enum cm_status kv_settle(struct cm_configuration *configuration, struct cm_error *err)
{
    int bytes_row = cm_config_row_find("kv_bytes", 8);
    int pages_row = cm_config_row_find("kv_pages", 8);
    uint8_t bytes_from = configuration->sources[bytes_row];
    uint8_t pages_from = configuration->sources[pages_row];
    if (configuration->kv_pages != 0 && configuration->kv_bytes != 0) {
        if (bytes_from == pages_from) {
            return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-KV",
                                "kv_bytes (line %u) and kv_pages (line %u): give one of them",
                                configuration->lines[bytes_row], configuration->lines[pages_row]);
        }
        if (pages_from > bytes_from) {
            configuration->kv_bytes = 0;
        } else {
            configuration->kv_pages = 0;
        }
    }
    if (configuration->kv_pages == 0 && configuration->kv_bytes == 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-KV",
                            "kv_bytes and kv_pages are both 0: give one of them");
    }
    return CM_OK;
}

enum cm_status cm_config_load(const char *path, const struct cm_config_override *overrides,
                              size_t count, char *const *environment,
                              struct cm_configuration *ret_configuration, struct cm_error *err)
{
    struct cm_configuration configuration;
    memset(&configuration, 0, sizeof(configuration));
    enum cm_status status = defaults_set(&configuration, err);
    if (status == CM_OK && path != NULL) {
        status = file_read(&configuration, path, err);
    }
    if (status == CM_OK) {
        status = environment_read(&configuration, environment, err);
    }
    if (status == CM_OK) {
        status = overrides_read(&configuration, overrides, count, err);
    }
    if (status == CM_OK) {
        status = kv_settle(&configuration, err);
    }
    if (status == CM_OK) {
        *ret_configuration = configuration;
    }
    return status;
}

uint32_t cm_config_ring_bytes(const struct cm_configuration *configuration)
{
    /* A record may fill a quarter of a ring; the head of a request and its options come on top of
     * its body. body_bytes_max is at most 8 MiB, so this ends at 64 MiB. */
    uint64_t wanted = 4 * (configuration->body_bytes_max + 65536);
    uint32_t bytes = 1u << 20;
    while (bytes < wanted && bytes < (64u << 20)) {
        bytes <<= 1;
    }
    return bytes;
}
