/* casemate check: configuration, keys, package, enrolment and address, without starting anything.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <jansson.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "loader/package/package.h"
#include "loader/tpm/enrolment.h"
#include "runtime/cli/cli_internal.h"

struct report {
    bool as_json;
    json_t *rows;
    enum cm_status worst; /* the first failure decides the exit code */
    struct cm_error first;
};

static void report_add(struct report *report, const char *what, const char *subject,
                       enum cm_status status, const struct cm_error *err)
{
    bool good = status == CM_OK;
    if (!good && report->worst == CM_OK) {
        report->worst = status;
        report->first = *err;
    }
    if (report->as_json) {
        json_array_append_new(report->rows,
                              json_pack("{s:s, s:s, s:b, s:s, s:s}", "check", what, "subject",
                                        subject, "ok", good, "id", good ? "" : err->id, "text",
                                        good ? "" : err->text));
    } else {
        printf("%-6s %-14s %s\n", good ? "ok" : "FAILED", what, good ? subject : err->text);
    }
}

static enum cm_status package_check(const struct cm_configuration *configuration,
                                    const uint8_t *owner, struct cm_error *err)
{
    static struct cm_package_head head;
    enum cm_status status = cli_package_head(configuration->package, &head, err);
    if (status == CM_OK && owner != NULL &&
        memcmp(head.core.owner_key, owner, CM_PUBLIC_KEY_BYTES) != 0) {
        status =
            cm_error_set(err, CM_E_PACKAGE, "CM-PKG-OWNER",
                         "%s is signed by another owner than package_owner %s: pin the key of who "
                         "sealed it, or take the package from the pinned owner",
                         configuration->package, configuration->package_owner);
    }
    return status;
}

/* Can be listened on, or this node's running service does already. */
static enum cm_status address_check(const char *text, const char *state, struct cm_error *err)
{
    char host[CM_NAME_BYTES];
    uint16_t port = 0;
    int on = 1;
    struct sockaddr_in four = {.sin_family = AF_INET};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6};
    if (!cm_config_address_split(text, host, &port)) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-VALUE", "listen: %.100s", text);
    }
    bool is_six = text[0] == '[';
    four.sin_port = six.sin6_port = htons(port);
    inet_pton(is_six ? AF_INET6 : AF_INET, host,
              is_six ? (void *)&six.sin6_addr : (void *)&four.sin_addr);
    int fd = socket(is_six ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int error_number = 0;
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
        bind(fd, is_six ? (struct sockaddr *)&six : (struct sockaddr *)&four,
             is_six ? sizeof(six) : sizeof(four)) != 0) {
        error_number = errno;
    }
    if (fd >= 0) {
        close(fd);
    }
    if (error_number == 0 || (error_number == EADDRINUSE && cli_service_listens(state, text))) {
        return CM_OK;
    }
    return cm_error_errno(err, error_number, "CM-CLI-LISTEN",
                          "cannot listen on %.100s (choose with --listen)", text);
}

static enum cm_status file_check(const char *path, enum cm_status kind, struct cm_error *err)
{
    if (access(path, R_OK) == 0) {
        return CM_OK;
    }
    return cm_error_set(err, kind, "CM-CLI-FILE", "cannot read %s: %s", path,
                        strerrordesc_np(errno));
}

static void files_check(struct report *report, const struct cm_configuration *configuration)
{
    static struct cm_policy_list list;
    uint8_t owner[CM_PUBLIC_KEY_BYTES];
    uint8_t authority[CM_PUBLIC_KEY_BYTES];
    char path[CM_CONFIG_TEXT_BYTES + 32];
    struct cm_error err;
    enum cm_status status = cm_config_point_read(configuration->package_owner, owner, &err);
    bool owner_known = status == CM_OK;
    report_add(report, "package owner", configuration->package_owner, status, &err);
    status = cm_config_point_read(configuration->policy_authority, authority, &err);
    report_add(report, "policy key", configuration->policy_authority, status, &err);
    if (configuration->adapters_max > 0) {
        struct cm_adapter_owners owners;
        status = cm_config_owners_read(configuration, &owners, &err);
        report_add(report, "adapter owners", configuration->adapter_owners, status, &err);
    }
    status = package_check(configuration, owner_known ? owner : NULL, &err);
    report_add(report, "package head", configuration->package, status, &err);
    snprintf(path, sizeof(path), "%s.policy", configuration->package);
    status = cli_policy_list(configuration, &list, &err);
    report_add(report, "policy list", path, status, &err);
    snprintf(path, sizeof(path), "%s/enrolment.bin", configuration->state);
    report_add(report, "enrolment", path, file_check(path, CM_E_CONFIG, &err), &err);
    report_add(report, "state folder", configuration->state,
               cm_config_state_check(configuration->state, &err), &err);
    if (!cm_config_tpm_development(configuration->tpm)) {
        status = file_check(configuration->tpm, CM_E_TPM, &err);
        report_add(report, "tpm", configuration->tpm, status, &err);
    }
    report_add(report, "address", configuration->listen,
               address_check(configuration->listen, configuration->state, &err), &err);
}

static void keys_print(void)
{
    static const char *const kinds[] = {"number", "true|false", "text", "path",
                                        "choice", "address",    "list"};
    for (size_t i = 0; i < CM_CONFIG_ROW_COUNT; i++) {
        const struct cm_config_row *row = &cm_config_rows[i];
        char range[64] = "";
        if (row->kind == CM_CONFIG_NUMBER) {
            snprintf(range, sizeof(range), " %llu..%llu%s%s", (unsigned long long)row->least,
                     (unsigned long long)row->most, row->unit[0] != '\0' ? " " : "", row->unit);
        }
        printf("%s.%s: %s%s%s%s; default %s\n    %s\n",
               row->section == CM_CONFIG_SEALED ? "sealed" : "site", row->name, kinds[row->kind],
               range, row->choices[0] != '\0' ? " " : "", row->choices,
               row->default_text[0] != '\0' ? row->default_text : "(none)", row->help);
    }
}

enum cm_status command_check(struct words *words, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    static struct cm_configuration configuration;
    struct report report = {.as_json = words_flag_take(words, "json")};
    if (words_flag_take(words, "keys")) {
        keys_print();
        return CM_OK;
    }
    report.rows = json_array();
    enum cm_status status =
        cm_config_arguments_load(words->count, words->at, &arguments, &configuration, err);
    if (status == CM_OK) {
        status = cm_config_complete(&configuration, arguments.path, err);
    }
    if (status != CM_E_USAGE) {
        report_add(&report, "configuration", arguments.path, status, err);
    }
    if (status == CM_OK) {
        files_check(&report, &configuration);
    }
    if (report.as_json && status != CM_E_USAGE) {
        json_t *root = json_pack("{s:b, s:O}", "ok", report.worst == CM_OK, "checks", report.rows);
        json_dumpf(root, stdout, JSON_INDENT(1));
        printf("\n");
        json_decref(root);
    }
    json_decref(report.rows);
    if (status == CM_OK && report.worst != CM_OK) {
        *err = report.first;
        status = report.worst;
    }
    return status;
}
