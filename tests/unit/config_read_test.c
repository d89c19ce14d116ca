/* Configuration: every refusal names its line; precedence holds; public keys by form. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "policies/config/config.h"

static struct cm_configuration configuration;
static struct cm_error err;

static enum cm_status text_load(const char *text, const struct cm_config_override *overrides,
                                size_t count, char *const *environment)
{
    char path[] = "/tmp/casemate-config-XXXXXX";
    int fd = mkstemp(path);
    cr_assert(fd >= 0);
    cr_assert_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    enum cm_status status =
        cm_config_load(path, overrides, count, environment, &configuration, &err);
    unlink(path);
    return status;
}

struct refusal {
    const char *text;
    const char *wanted[3]; /* all stand in the error */
};

Test(config_read, every_refusal_names_its_line)
{
    static const struct refusal rows[] = {
        {"site:\n  threds: 4\n", {":2:", "threds", "\"threads\""}},
        {"site:\n  zzzzzzzzzzzzzzz: 4\n", {":2:", "unknown key", ""}},
        {"site:\n  threads: four\n", {":2:", "whole number", "four"}},
        {"site:\n  threads: 04\n", {":2:", "whole number", "04"}},
        {"site:\n  threads: -1\n", {":2:", "whole number", "-1"}},
        {"site:\n  threads: 1025\n", {":2:", "0 to 1024", "1025"}},
        {"site:\n  header_timeout_ms: 99\n", {":2:", "100 to 600000 ms", "99"}},
        {"site:\n  threads: 99999999999999999999999\n", {":2:", "0 to 1024", "9999"}},
        {"site:\n  threads: \"4\"\n", {":2:", "a number", "quotes"}},
        {"site:\n\n  threads: [4]\n", {":3:", "one value", "a list"}},
        {"site:\n  threads: {a: 1}\n", {":2:", "one value", "a mapping"}},
        {"site:\n  metrics_unauthenticated: yes\n", {":2:", "true or false", "yes"}},
        {"site:\n  listen: localhost:8443\n", {":2:", "127.0.0.1:8443", "localhost"}},
        {"site:\n  listen: 127.0.0.1:65536\n", {":2:", "an address", "65536"}},
        {"site:\n  tls_names: localhost\n", {":2:", "a list", "a value"}},
        {"site:\n  tls_names: [a b]\n", {":2:", "host names", "a b"}},
        {"site:\n  tls_names: [a,b,c,d,e,f,g,h,i]\n", {":2:", "1 to 8", ""}},
        {"site:\n  threads: 1\n  threads: 2\n", {":3:", "twice", "line 2"}},
        {"site:\n  threads: 1\nsite:\n  queue_max: 2\n", {":3:", "twice", "site"}},
        {"site:\n  package: x\n", {":2:", "\"sealed:\"", "package"}},
        {"sealed:\n  device: gpu\n", {":2:", "one of cpu", "gpu"}},
        {"sealed:\n  attest_mode: lax\n", {":2:", "one of strict|restartable", "lax"}},
        {"threads: 4\n", {":1:", "stands under site:", "threads"}},
        {"other:\n  a: 1\n", {":1:", "unknown section", "other"}},
        {"site: &a\n  threads: 1\n", {":1:", "anchors", ""}},
        {"site:\n  threads: *a\n", {":2:", "aliases", ""}},
        {"site:\n  threads: !!int 4\n", {":2:", "tags", ""}},
        {"site:\n  threads: 1\n---\nsite:\n  threads: 2\n", {":3:", "second document", ""}},
        {"site:\n  threads: [1\n", {":3:", "not YAML", ""}},
        {"- a\n", {":1:", "sections", ""}},
        {"site:\n  kv_bytes: 1048576\n  kv_pages: 4\n", {"line 2", "line 3", "one of them"}},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        cr_assert_eq(text_load(rows[i].text, NULL, 0, NULL), CM_E_CONFIG, "row %zu", i);
        for (size_t j = 0; j < 3; j++) {
            cr_assert(strstr(err.text, rows[i].wanted[j]) != NULL, "row %zu: \"%s\" lacks \"%s\"",
                      i, err.text, rows[i].wanted[j]);
        }
    }
}

Test(config_read, values_ranges_and_relative_paths_are_taken)
{
    cr_assert_eq(text_load("sealed:\n  package: model.cmp\n  package_owner: /etc/owner.pem\n"
                           "site:\n  threads: 1024\n  header_timeout_ms: 100\n"
                           "  tls_names: [node-1, '::1']\n  listen: '[::1]:0'\n"
                           "  metrics_unauthenticated: true\n  model_name: 'x: y'\n",
                           NULL, 0, NULL),
                 CM_OK, "%s", err.text);
    cr_assert_str_eq(configuration.package, "/tmp/model.cmp");
    cr_assert_str_eq(configuration.package_owner, "/etc/owner.pem");
    cr_assert_eq(configuration.threads, 1024u);
    cr_assert_eq(configuration.tls_names.count, 2u);
    cr_assert_str_eq(configuration.tls_names.names[1], "::1");
    cr_assert_eq(configuration.metrics_unauthenticated, 1u);
    cr_assert_str_eq(configuration.model_name, "x: y");
    cr_assert_eq(configuration.lines[cm_config_row_find("threads", 7)], 5u);
    cr_assert_eq(text_load("", NULL, 0, NULL), CM_OK);
    cr_assert_str_eq(configuration.listen, "127.0.0.1:8443");
    cr_assert_eq(text_load("site:\nsealed:\n", NULL, 0, NULL), CM_OK);
}

Test(config_read, command_line_beats_environment_beats_file_beats_default)
{
    const char *text = "site:\n  threads: 2\n  queue_max: 2\n  sequences_max: 2\n";
    char *environment[] = {"CASEMATE_THREADS=3", "CASEMATE_QUEUE_MAX=3", "CASEMATE_PORT=tcp://1",
                           "OTHER=1", NULL};
    struct cm_config_override overrides[] = {{"threads", "4"}};
    cr_assert_eq(text_load(text, overrides, 1, environment), CM_OK, "%s", err.text);
    cr_assert_eq(configuration.threads, 4u);
    cr_assert_eq(configuration.queue_max, 3u);
    cr_assert_eq(configuration.sequences_max, 2u);
    cr_assert_eq(configuration.connections_max, 256u);
    cr_assert_eq(configuration.sources[cm_config_row_find("threads", 7)],
                 CM_CONFIG_FROM_COMMAND_LINE);
    environment[0] = "CASEMATE_THREADS=x";
    cr_assert_eq(text_load(text, NULL, 0, environment), CM_E_CONFIG);
    cr_assert(strstr(err.text, "CASEMATE_THREADS") != NULL);
    overrides[0].name = "thread";
    cr_assert_eq(text_load(text, overrides, 1, NULL), CM_E_USAGE);
    cr_assert(strstr(err.text, "--threads") != NULL);
    overrides[0] = (struct cm_config_override){"kv_pages", "16"};
    cr_assert_eq(text_load("site:\n  kv_bytes: 4096\n", overrides, 1, NULL), CM_OK);
    cr_assert_eq(configuration.kv_bytes, 0u);
    cr_assert_eq(configuration.kv_pages, 16u);
}

Test(config_read, the_table_is_sound)
{
    for (size_t i = 0; i < CM_CONFIG_ROW_COUNT; i++) {
        const struct cm_config_row *row = &cm_config_rows[i];
        cr_assert_eq(cm_config_row_find(row->name, strlen(row->name)), (int)i, "%s", row->name);
        cr_assert(row->help[0] != '\0');
        cr_assert(row->least <= row->most);
    }
    cr_assert_eq(cm_config_row_find("nothing", 7), -1);
    cr_assert_str_eq(cm_config_nearest("listn", 5), "listen");
    cr_assert_null(cm_config_nearest("qqqqqqqq", 8));
    memset(&configuration, 0, sizeof(configuration));
    configuration.body_bytes_max = 8388608;
    cr_assert_eq(cm_config_ring_bytes(&configuration), 64u << 20);
    configuration.body_bytes_max = 1024;
    cr_assert_eq(cm_config_ring_bytes(&configuration), 1u << 20);
}

/* openssl ecparam -name prime256v1 -genkey | openssl ec -pubout; point by -text -noout */
#define HEAD "-----BEGIN PUBLIC KEY-----\n"
#define TAIL "-----END PUBLIC KEY-----\n"
static const char good[] = "-----BEGIN PUBLIC KEY-----\n"
                           "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEpQvWi6HPSA8gDMsIXA28NQQo0mCZ\n"
                           "jtHHHZP+r+5STd/waa8GvuuQ6NxhwmpAG+zcdY42U1JZYZHf4L13DJ0mNg==\n"
                           "-----END PUBLIC KEY-----\n";
static const char p384[] = "-----BEGIN PUBLIC KEY-----\n"
                           "MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEjjNYZC0Pkeaf8bd75+SE6R7sDsJ2s8Cl\n"
                           "rsT0m46cOCaSJkA8jaewXsamxNh1KNUHsm/blTEJQpgWVUw4fT/6vvs/f6SmG9Ea\n"
                           "tM8OeYr7giVv3sA2XyiE42kaM1Y+xvny\n"
                           "-----END PUBLIC KEY-----\n";
static const uint8_t expected[CM_PUBLIC_KEY_BYTES] = {
    0x04, 0xa5, 0x0b, 0xd6, 0x8b, 0xa1, 0xcf, 0x48, 0x0f, 0x20, 0x0c, 0xcb, 0x08,
    0x5c, 0x0d, 0xbc, 0x35, 0x04, 0x28, 0xd2, 0x60, 0x99, 0x8e, 0xd1, 0xc7, 0x1d,
    0x93, 0xfe, 0xaf, 0xee, 0x52, 0x4d, 0xdf, 0xf0, 0x69, 0xaf, 0x06, 0xbe, 0xeb,
    0x90, 0xe8, 0xdc, 0x61, 0xc2, 0x6a, 0x40, 0x1b, 0xec, 0xdc, 0x75, 0x8e, 0x36,
    0x53, 0x52, 0x59, 0x61, 0x91, 0xdf, 0xe0, 0xbd, 0x77, 0x0c, 0x9d, 0x26, 0x36};

Test(config_point, a_p256_key_parses_and_everything_else_is_refused)
{
    uint8_t point[CM_PUBLIC_KEY_BYTES];
    cr_assert_eq(cm_config_point_parse(good, strlen(good), point, &err), CM_OK, "%s", err.text);
    cr_assert_eq(memcmp(point, expected, sizeof(expected)), 0);
    char broken[512];
    size_t size = strlen(good);
    for (size_t i = sizeof(HEAD) - 1; i < sizeof(HEAD) - 1 + 30; i++) {
        memcpy(broken, good, size);
        broken[i] = broken[i] == 'A' ? 'B' : 'A';
        cr_assert_eq(cm_config_point_parse(broken, size, point, &err), CM_E_CONFIG, "byte %zu", i);
    }
    static const char *const wrong[] = {
        "", "x", HEAD TAIL, TAIL HEAD, HEAD "MFkw\n" TAIL, HEAD "MFkw*\n" TAIL, p384};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        cr_assert_eq(cm_config_point_parse(wrong[i], strlen(wrong[i]), point, &err), CM_E_CONFIG,
                     "row %zu", i);
    }
    const char *private_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    cr_assert_eq(cm_config_point_parse(private_key, strlen(private_key), point, &err), CM_E_CONFIG);
    cr_assert_str_eq(err.id, "CM-CONFIG-PRIVATE");
}

static enum cm_status owners_load(const char *pem, struct cm_adapter_owners *ret_owners)
{
    char path[] = "/tmp/casemate-owners-XXXXXX";
    int fd = mkstemp(path);
    cr_assert(fd >= 0 && write(fd, pem, strlen(pem)) == (ssize_t)strlen(pem));
    close(fd);
    snprintf(configuration.adapter_owners, sizeof(configuration.adapter_owners), "%s", path);
    enum cm_status status = cm_config_owners_read(&configuration, ret_owners, &err);
    unlink(path);
    return status;
}

Test(config_point, owners_of_adapters_are_pairs_of_keys)
{
    struct cm_adapter_owners owners;
    char many[8192] = "";
    memset(&configuration, 0, sizeof(configuration));
    cr_assert_eq(owners_load("x", &owners), CM_OK, "no adapters: nobody reads it");
    cr_assert_eq(owners.count, 0u);
    configuration.adapters_max = 1;
    configuration.adapter_owners[0] = '\0';
    cr_assert_eq(cm_config_owners_read(&configuration, &owners, &err), CM_E_CONFIG);
    cr_assert(strstr(err.text, "adapter_owners") != NULL);
    for (uint32_t keys = 0; keys < 10; keys++) {
        bool good_count = keys > 0 && keys % 2 == 0 && keys <= 8;
        cr_assert_eq(owners_load(many, &owners), good_count ? CM_OK : CM_E_CONFIG, "%u keys", keys);
        for (uint32_t i = 0; good_count && i < keys / 2; i++) {
            cr_assert_eq(owners.count, keys / 2);
            cr_assert_eq(memcmp(owners.each[i].package, expected, sizeof(expected)), 0);
            cr_assert_eq(memcmp(owners.each[i].policy, expected, sizeof(expected)), 0);
        }
        strcat(many, good);
    }
    snprintf(many, sizeof(many), "%s%s", good, p384);
    cr_assert_eq(owners_load(many, &owners), CM_E_CONFIG);
}

/* What the base's owner signs: nothing is new where there are no adapters, all of it where there
 * are. */
Test(config_point, what_may_be_loaded_is_measured)
{
    struct cm_adapter_owners owners = {.count = 2};
    char without[CM_CONFIG_SEALED_BYTES], with[CM_CONFIG_SEALED_BYTES];
    size_t bytes[2];
    cr_assert_eq(text_load("", NULL, 0, NULL), CM_OK);
    memset(owners.each, 0xab, sizeof(owners.each));
    cr_assert_eq(cm_config_sealed_text(&configuration, expected, expected, &owners, without,
                                       &bytes[0], &err),
                 CM_OK);
    cr_assert_null(strstr(without, "adapter"));
    cr_assert_not_null(strstr(without, "\nkv_kind fp16\n"));
    configuration.adapters_max = 3;
    cr_assert_eq(
        cm_config_sealed_text(&configuration, expected, expected, &owners, with, &bytes[1], &err),
        CM_OK);
    cr_assert_eq(memcmp(with, without, bytes[0]), 0);
    cr_assert(strstr(with, "\nadapters_max 3\nadapter_bytes_max 67108864\nadapter_rank_max 64\n"
                           "adapter_owner abab") != NULL);
    cr_assert_null(strstr(with, "prompts"));
    snprintf(configuration.prompts, sizeof(configuration.prompts), "bf16");
    owners.count = CM_ADAPTER_OWNERS_MAX;
    cr_assert_eq(
        cm_config_sealed_text(&configuration, expected, expected, &owners, with, &bytes[1], &err),
        CM_OK, "the most there can be: %s", err.text);
    cr_assert(strstr(with, "\nprompts bf16\n") != NULL);
}
