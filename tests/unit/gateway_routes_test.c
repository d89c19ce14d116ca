/* Who may reach what: every route with every kind of credential, paths and methods that are none,
 * and tables of keys that are not taken. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime/gateway/keys.h"

#define NOW        1000000u
#define ROWS       3
#define KEY_A      "cm-00000000000000aa-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA1"
#define KEY_B      "cm-00000000000000bb-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA2"
#define KEY_C      "cm-00000000000000cc-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA3"
#define KEY_GONE   "cm-00000000000000dd-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA4"
#define ALL_SEALED (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

static struct cm_keys keys;
static struct cm_error err;

static struct cm_span span(const char *text)
{
    return (struct cm_span){text, strlen(text)};
}

static struct cm_api_key row_make(uint8_t last, const char *text, uint64_t expires_unix_s)
{
    struct cm_api_key row = {.id = {[7] = last}, .expires_unix_s = expires_unix_s};
    SHA256((const uint8_t *)text, strlen(text), row.hash);
    snprintf(row.name, sizeof(row.name), "key-%02x", last);
    return row;
}

static enum cm_status table_load(const struct cm_api_key *rows, size_t bytes, uint32_t count,
                                 uint64_t generation, int seals)
{
    const struct cm_keys_info info = {.generation = generation, .count = count};
    int fd = memfd_create("keys", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    cr_assert(fd >= 0 && write(fd, rows, bytes) == (ssize_t)bytes);
    cr_assert_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    enum cm_status status = cm_keys_load(&keys, fd, &info, &err);
    close(fd);
    return status;
}

/* a: for ever; b: expires at NOW; c: a second later. KEY_GONE stood in an older table. */
static void table_make(struct cm_api_key rows[static ROWS])
{
    rows[0] = row_make(0xaa, KEY_A, 0);
    rows[1] = row_make(0xbb, KEY_B, NOW);
    rows[2] = row_make(0xcc, KEY_C, NOW + 1);
}

static void setup(void)
{
    const struct cm_api_key old = row_make(0xdd, KEY_GONE, 0);
    struct cm_api_key rows[ROWS];
    table_make(rows);
    cr_assert_eq(table_load(&old, sizeof(old), 1, 1, ALL_SEALED), CM_OK);
    cr_assert_eq(table_load(rows, sizeof(rows), ROWS, 2, ALL_SEALED), CM_OK);
}

static void teardown(void)
{
    cm_keys_free(&keys);
}

/* What an Authorization field can say; "" is none at all. */
static const struct {
    const char *what, *value;
    bool valid;
} credentials[] = {
    {"none", "", false},
    {"a scheme alone", "Bearer ", false},
    {"no scheme", KEY_A, false},
    {"another scheme", "Basic  " KEY_A, false},
    {"valid", "Bearer " KEY_A, true},
    {"valid, the scheme in other letters", "bEARER " KEY_A, true},
    {"about to expire", "Bearer " KEY_C, true},
    {"expired", "Bearer " KEY_B, false},
    {"revoked", "Bearer " KEY_GONE, false},
    {"another id",
     "Bearer cm-00000000000000ab" /* of nobody */
     "-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA1",
     false},
    {"the secret of another",
     "Bearer cm-00000000000000aa"
     "-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA3",
     false},
    {"another last byte",
     "Bearer cm-00000000000000aa"
     "-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA2",
     false},
    {"too long", "Bearer " KEY_A "A", false},
    {"too short", "Bearer cm-00000000000000aa-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", false},
    {"two spaces", "Bearer  " KEY_A, false},
    {"a tab", "Bearer\t" KEY_A, false},
    {"the id in capitals",
     "Bearer cm-00000000000000AA"
     "-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA1",
     false},
    {"an id that is no number",
     "Bearer cm-00000000000000ag"
     "-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA1",
     false},
    {"two keys", "Bearer " KEY_A "," KEY_C, false},
};
#define CREDENTIAL_COUNT (sizeof(credentials) / sizeof(credentials[0]))

TestSuite(gateway_routes, .init = setup, .fini = teardown);

/* The paths, written down a second time: a route that is added or opened shows here. */
static const struct {
    const char *method, *path;
    char who; /* o: open, k: a key, m: a key unless metrics are open */
    bool body;
} wanted[CM_ROUTE_COUNT] = {
    {"POST", "/v1/chat/completions", 'k', true},
    {"POST", "/v1/completions", 'k', true},
    {"GET", "/v1/models", 'k', false},
    {"GET", "/v1/models/some-id", 'k', false},
    {"GET", "/livez", 'o', false},
    {"GET", "/readyz", 'o', false},
    {"GET", "/startupz", 'o', false},
    {"GET", "/health", 'o', false},
    {"GET", "/version", 'o', false},
    {"GET", "/metrics", 'm', false},
    {"GET", "/v1/attestation", 'o', false},
};

static int find(const char *method, const char *path, const struct cm_route **ret_route,
                struct cm_span *ret_parameter)
{
    const char *allow = NULL;
    *ret_route = NULL;
    int status = cm_route_find(span(method), span(path), ret_route, ret_parameter, &allow);
    cr_expect_eq(status == 200, *ret_route != NULL);
    cr_expect_eq(status == 405, allow != NULL, "%s %s", method, path);
    return status;
}

Test(gateway_routes, each_route_with_each_credential)
{
    size_t passed = 0;
    for (size_t i = 0; i < CM_ROUTE_COUNT * CREDENTIAL_COUNT * 2; i++) {
        size_t at = i % CM_ROUTE_COUNT;
        size_t credential = i / CM_ROUTE_COUNT % CREDENTIAL_COUNT;
        bool metrics_open = i / CM_ROUTE_COUNT / CREDENTIAL_COUNT != 0;
        const struct cm_route *route;
        const struct cm_api_key *key = NULL;
        struct cm_span parameter;
        cr_assert_eq(find(wanted[at].method, wanted[at].path, &route, &parameter), 200);
        cr_expect_eq(route->body, wanted[at].body);
        enum cm_admission admission = cm_keys_admit(&keys, route, metrics_open,
                                                    span(credentials[credential].value), NOW, &key);
        bool open = wanted[at].who == 'o' || (wanted[at].who == 'm' && metrics_open);
        cr_expect_eq(
            admission, open || credentials[credential].valid ? CM_ADMITTED : CM_UNAUTHORISED,
            "%s with a credential that is: %s", wanted[at].path, credentials[credential].what);
        cr_expect_eq(key != NULL, admission == CM_ADMITTED && !open);
        passed += admission == CM_ADMITTED;
    }
    cr_expect_eq(passed, 2 * 6 * CREDENTIAL_COUNT + CREDENTIAL_COUNT + 9 * 3u);
}

Test(gateway_routes, what_is_not_in_the_table)
{
    static const char *const none[] = {"/",
                                       "/v1",
                                       "/v1/",
                                       "/v1/models/",
                                       "/v1/models/a/b",
                                       "/v1/models//",
                                       "/v1/modelsx",
                                       "/v1/chat/completions/",
                                       "//v1/models",
                                       "/V1/models",
                                       "/v1/chat%2fcompletions",
                                       "/v1/./models",
                                       "/v1/embeddings",
                                       "/livez/",
                                       "/livezx",
                                       "/live",
                                       "/metrics/",
                                       "/admin",
                                       "/.."};
    const struct cm_route *route;
    struct cm_span parameter;
    for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
        cr_expect_eq(find("GET", none[i], &route, &parameter), 404, "%s", none[i]);
        cr_expect_eq(find("POST", none[i], &route, &parameter), 404, "%s", none[i]);
    }
    const char *allow = NULL;
    cr_expect_eq(cm_route_find(span("GET"), (struct cm_span){"/v1/models\0", 11}, &route,
                               &parameter, &allow),
                 404);
}

Test(gateway_routes, other_methods)
{
    static const char *const methods[] = {"GET",     "POST",    "PUT",   "PATCH", "DELETE", "HEAD",
                                          "OPTIONS", "CONNECT", "TRACE", "get",   "post",   "GETX"};
    for (size_t i = 0; i < CM_ROUTE_COUNT; i++) {
        for (size_t k = 0; k < sizeof(methods) / sizeof(methods[0]); k++) {
            const struct cm_route *route = NULL;
            struct cm_span parameter;
            const char *allow = NULL;
            int status =
                cm_route_find(span(methods[k]), span(wanted[i].path), &route, &parameter, &allow);
            if (strcmp(methods[k], wanted[i].method) == 0) {
                cr_expect_eq(status, 200);
                continue;
            }
            cr_expect(status == 405 && route == NULL, "%s %s", methods[k], wanted[i].path);
            cr_expect_str_eq(allow, wanted[i].method);
        }
    }
}

Test(gateway_routes, the_parameter_of_a_path)
{
    const struct cm_route *route;
    struct cm_span parameter;
    cr_assert_eq(find("GET", "/v1/models/a%2Fb", &route, &parameter), 200);
    cr_expect(route->handler == CM_HANDLER_MODEL && cm_span_is(parameter, "a%2Fb"));
    cr_assert_eq(find("GET", "/v1/models", &route, &parameter), 200);
    cr_expect(route->handler == CM_HANDLER_MODELS && parameter.size == 0);
}

/* Nobody but on open routes, whatever is shown. */
static void nobody_is_admitted(enum cm_admission wanted_admission)
{
    for (size_t i = 0; i < CM_ROUTE_COUNT; i++) {
        for (size_t k = 0; k < CREDENTIAL_COUNT; k++) {
            const struct cm_api_key *key = NULL;
            enum cm_admission admission =
                cm_keys_admit(&keys, &cm_routes[i], false, span(credentials[k].value), NOW, &key);
            bool open = cm_routes[i].permission == CM_PERMISSION_OPEN;
            cr_expect_eq(admission, open ? CM_ADMITTED : wanted_admission);
            cr_expect_null(key);
        }
    }
}

Test(gateway_routes, without_a_table_nobody_is_admitted)
{
    cm_keys_free(&keys);
    nobody_is_admitted(CM_KEYS_MISSING);
    cr_assert_eq(table_load(NULL, 0, 0, 3, ALL_SEALED), CM_OK);
    nobody_is_admitted(CM_UNAUTHORISED);
}

/* A zero id and a zero hash are what a credential of the wrong shape is compared with. */
Test(gateway_routes, a_row_of_zeros_admits_nobody)
{
    const struct cm_api_key zeros = {.name = "zeros"};
    const char nothing[CM_KEY_TEXT_BYTES] = {0};
    struct cm_api_key row = {.name = "zeros"};
    SHA256((const uint8_t *)nothing, sizeof(nothing), row.hash);
    cr_assert_eq(table_load(&zeros, sizeof(zeros), 1, 3, ALL_SEALED), CM_OK);
    nobody_is_admitted(CM_UNAUTHORISED);
    cr_assert_eq(table_load(&row, sizeof(row), 1, 4, ALL_SEALED), CM_OK);
    nobody_is_admitted(CM_UNAUTHORISED);
}

/* A table that is not sound leaves none: the old one, too, is no longer believed. */
Test(gateway_routes, tables_that_are_not_taken)
{
    static const int partly[] = {0, F_SEAL_SHRINK | F_SEAL_GROW, F_SEAL_GROW | F_SEAL_WRITE,
                                 F_SEAL_SHRINK | F_SEAL_WRITE};
    struct cm_api_key rows[ROWS];
    for (size_t fault = 0; fault < 18; fault++) {
        table_make(rows);
        cr_assert_eq(table_load(rows, sizeof(rows), ROWS, 2, ALL_SEALED), CM_OK);
        uint32_t count = ROWS;
        uint64_t generation = 3;
        int seals = ALL_SEALED;
        size_t bytes = sizeof(rows);
        switch (fault) {
        case 0:
        case 1:
        case 2:
        case 3:
            seals = partly[fault];
            break;
        case 4:
            count = ROWS - 1;
            break;
        case 5:
            count = ROWS + 1;
            break;
        case 6:
            bytes -= 1;
            break;
        case 7:
            count = UINT32_MAX;
            break;
        case 8:
            generation = 1;
            break;
        case 9: /* not in order */
            rows[0].id[0] = 1;
            break;
        case 10: /* an id twice */
            rows[1].id[7] = rows[0].id[7];
            break;
        case 11:
            memset(rows[1].name, 'x', sizeof(rows[1].name));
            break;
        case 12:
            rows[2].name[1] = '"';
            break;
        case 13: /* more grants than there is room for */
            rows[1].adapter_count = CM_ADAPTERS_MAX + 1;
            break;
        case 14: /* a grant without a name */
            rows[1].adapter_count = 1;
            break;
        case 15:
            rows[1].adapter_count = 1;
            memset(rows[1].adapters[0], 'x', sizeof(rows[1].adapters[0]));
            break;
        case 16:
            rows[1].adapter_count = 2;
            memcpy(rows[1].adapters, "ok", 3);
            memcpy(rows[1].adapters[1], "../x", 5);
            break;
        default:
            rows[2].name[1] = '\n';
            break;
        }
        cr_expect_eq(table_load(rows, bytes, count, generation, seals), CM_E_INPUT, "fault %zu",
                     fault);
        nobody_is_admitted(CM_KEYS_MISSING);
        cr_expect_eq(keys.generation, 2u);
        cm_keys_free(&keys);
    }
}

Test(gateway_routes, tables_with_grants_are_taken)
{
    struct cm_api_key rows[ROWS];
    table_make(rows);
    rows[0].adapter_count = CM_API_KEY_EVERY_ADAPTER;
    rows[1].adapter_count = CM_ADAPTERS_MAX;
    for (uint32_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        snprintf(rows[1].adapters[i], sizeof(rows[1].adapters[i]), "a%u", i);
    }
    cr_assert_eq(table_load(rows, sizeof(rows), ROWS, 3, ALL_SEALED), CM_OK);
    static const bool wanted_of[ROWS] = {true, true, false};
    for (size_t i = 0; i < ROWS; i++) {
        const struct cm_api_key *key = cm_keys_find(&keys, rows[i].id);
        cr_assert_not_null(key);
        cr_expect_eq(cm_keys_adapter_granted(key, false, "a7"), wanted_of[i]);
        cr_expect_eq(cm_keys_adapter_granted(key, false, "a"), i == 0);
        cr_expect(cm_keys_adapter_granted(key, true, "a"));
    }
    cr_expect_not(cm_keys_adapter_granted(NULL, false, "a7"));
}

Test(gateway_routes, a_closed_descriptor_is_no_table)
{
    const struct cm_keys_info info = {.generation = 3, .count = 0};
    cr_expect_eq(cm_keys_load(&keys, -1, &info, &err), CM_E_INPUT);
    nobody_is_admitted(CM_KEYS_MISSING);
}

Test(gateway_routes, as_many_keys_as_are_permitted)
{
    struct cm_api_key *rows = calloc(CM_API_KEYS_MAX + 1, sizeof(*rows));
    for (uint32_t i = 0; i <= CM_API_KEYS_MAX; i++) {
        rows[i].id[0] = (uint8_t)(i >> 8);
        rows[i].id[1] = (uint8_t)i;
    }
    for (uint32_t count = CM_API_KEYS_MAX - 1; count <= CM_API_KEYS_MAX + 1; count++) {
        cr_expect_eq(table_load(rows, count * sizeof(*rows), count, 3, ALL_SEALED),
                     count <= CM_API_KEYS_MAX ? CM_OK : CM_E_INPUT, "%u keys", count);
    }
    free(rows);
}
