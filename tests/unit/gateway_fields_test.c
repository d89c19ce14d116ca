/* Each row of the field table: values that pass at the edge of what is permitted, values that do
 * not, wrong JSON types, and what an applied field does to the record for the worker. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/gateway/request.h"

#define BODY_BYTES 65536
#define MESSAGE(x) "[{\"role\":\"user\",\"content\":" x "}]"
#define X16        "xxxxxxxxxxxxxxxx"
#define X64        X16 X16 X16 X16
#define X256       X64 X64 X64 X64

static const struct cm_request_limits limits = {
    .model = "m", .max_tokens_default = 100, .record_bytes_max = 4096};
static char body[BODY_BYTES];
static struct cm_request request;
static struct cm_api_error error;

/* A whole body in which `name` has `value`; stream_options need a stream. */
static size_t body_make(enum cm_endpoint endpoint, const char *name, const char *value)
{
    const char *prompt = endpoint == CM_ENDPOINT_CHAT ? "messages" : "prompt";
    size_t used = (size_t)snprintf(body, BODY_BYTES, "{\"%s\":%s", name, value);
    if (strcmp(name, "model") != 0) {
        used += (size_t)snprintf(body + used, BODY_BYTES - used, ",\"model\":\"m\"");
    }
    if (strcmp(name, prompt) != 0) {
        used += (size_t)snprintf(body + used, BODY_BYTES - used, ",\"%s\":%s", prompt,
                                 endpoint == CM_ENDPOINT_CHAT ? MESSAGE("\"hi\"") : "\"hi\"");
    }
    if (strcmp(name, "stream_options") == 0) {
        used += (size_t)snprintf(body + used, BODY_BYTES - used, ",\"stream\":true");
    }
    return used + (size_t)snprintf(body + used, BODY_BYTES - used, "}");
}

/* On CM_OK the caller frees `request`. */
static enum cm_status parse(enum cm_endpoint endpoint, const char *name, const char *value)
{
    memset(&error, 0, sizeof(error));
    return cm_request_parse(endpoint, body, body_make(endpoint, name, value), &limits, &request,
                            &error);
}

static void passes(enum cm_endpoint endpoint, const char *name, const char *value)
{
    enum cm_status status = parse(endpoint, name, value);
    cr_expect_eq(status, CM_OK, "%s: %s: %s", name, value, error.message);
    if (status == CM_OK) {
        cm_request_free(&request);
    }
}

/* `code` NULL: any. The parameter is the field, or a place in it. */
static void fails(enum cm_endpoint endpoint, const char *name, const char *value, const char *code)
{
    enum cm_status status = parse(endpoint, name, value);
    cr_expect_eq(status, CM_E_INPUT, "%s: %s passed", name, value);
    if (status == CM_OK) {
        cm_request_free(&request);
        return;
    }
    bool model = error.status == 404 && strcmp(error.code, "model_not_found") == 0;
    cr_expect(error.status == 400 || model, "%s: %s: %d", name, value, error.status);
    cr_expect(code == NULL || strcmp(error.code, code) == 0, "%s: %s: %s", name, value, error.code);
    cr_expect_eq(strncmp(error.param, name, strlen(name)), 0, "%s: %s: param %s", name, value,
                 error.param);
    cr_expect(error.message[0] != '\0' && strcmp(error.type, "invalid_request_error") == 0);
}

#define VALUES_MAX 16
#define OBJECT     1u
#define LIST       2u
#define STRING     4u
#define INTEGER    8u
#define REAL       16u
#define BOOLEAN    32u
#define NUMBER     (INTEGER | REAL)

/* Every applied field. */
static const struct {
    const char *name;
    unsigned types; /* others are refused, whatever their value */
    const char *good[VALUES_MAX];
    const char *bad[VALUES_MAX];
} applied[] = {
    {"model", STRING, {"\"m\""}, {"\"\"", "\"M\"", "\"m \"", "\"other\""}},
    {"messages",
     LIST,
     {MESSAGE("\"\""), MESSAGE("[{\"type\":\"text\",\"text\":\"a\"}]"),
      "[{\"role\":\"developer\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\","
      "\"name\":\"n\",\"tool_calls\":null}]"},
     {"[]", "[1]", "[[]]", "[{}]", "[{\"role\":\"user\"}]", "[{\"content\":\"a\"}]",
      "[{\"role\":\"tool\",\"content\":\"a\"}]", "[{\"role\":1,\"content\":\"a\"}]",
      MESSAGE("null"), MESSAGE("1"), MESSAGE("[]"), MESSAGE("[\"a\"]"),
      MESSAGE("[{\"type\":\"image_url\",\"image_url\":\"u\"}]"),
      MESSAGE("[{\"type\":\"text\",\"text\":1}]"),
      MESSAGE("[{\"type\":\"text\",\"text\":\"a\",\"x\":1}]"),
      "[{\"role\":\"user\",\"content\":\"a\",\"tool_calls\":[]}]"}},
    {"prompt", STRING, {"\"\"", "\"a\""}, {0}},
    {"max_tokens", INTEGER, {"1", "1000000"}, {"0", "-1", "1000001", "4294967297"}},
    {"max_completion_tokens", INTEGER, {"1", "1000000"}, {"0", "-1", "1000001"}},
    {"min_tokens", INTEGER, {"0", "100"}, {"-1", "101", "1000001"}},
    {"temperature", NUMBER, {"0", "2", "0.5", "2.0", "-0.0"}, {"-0.001", "2.001", "3", "1e30"}},
    {"top_p", NUMBER, {"1", "0.001", "1e-30"}, {"0", "0.0", "-1", "1.001", "1e-300"}},
    {"top_k", INTEGER, {"-1", "0", "1", "1000000"}, {"-2", "1000001"}},
    {"min_p", NUMBER, {"0", "1"}, {"-0.001", "1.001"}},
    {"frequency_penalty", NUMBER, {"-2", "2", "0"}, {"-2.001", "2.001"}},
    {"presence_penalty", NUMBER, {"-2", "2", "0"}, {"-2.001", "2.001"}},
    {"repetition_penalty", NUMBER, {"4", "0.001"}, {"0", "4.001", "-1", "1e-300"}},
    {"seed", INTEGER, {"0", "-9223372036854775808", "9223372036854775807"}, {0}},
    {"stop",
     STRING | LIST,
     {"\"a\"", "[]", "[\"a\",\"b\",\"c\",\"d\"]", "\"" X256 "\"", "[\"" X256 "\"]"},
     {"\"\"", "[\"\"]", "[1]", "[null]", "[[\"a\"]]", "[\"a\",\"b\",\"c\",\"d\",\"e\"]",
      "\"" X256 "x\"", "[\"a\",\"" X256 "x\"]"}},
    {"stream", BOOLEAN, {"true", "false"}, {0}},
    {"stream_options",
     OBJECT,
     {"{}", "{\"include_usage\":true,\"continuous_usage_stats\":false}",
      "{\"include_usage\":null,\"include_obfuscation\":false}"},
     {"{\"include_usage\":1}", "{\"include_obfuscation\":true}", "{\"other\":true}"}},
    {"ignore_eos", BOOLEAN, {"true", "false"}, {0}},
    {"n", INTEGER, {"1"}, {"0", "2", "-1"}},
    {"best_of", INTEGER, {"1"}, {"0", "2"}},
    {"echo", BOOLEAN, {"false"}, {"true"}},
    {"logprobs", BOOLEAN, {"false"}, {"true"}},
    {"use_beam_search", BOOLEAN, {"false"}, {"true"}},
    {"include_stop_str_in_output", BOOLEAN, {"false"}, {"true"}},
    {"continue_final_message", BOOLEAN, {"false"}, {"true"}},
    {"return_tokens_as_token_ids", BOOLEAN, {"false"}, {"true"}},
    {"add_generation_prompt", BOOLEAN, {"true"}, {"false"}},
    {"skip_special_tokens", BOOLEAN, {"true"}, {"false"}},
    {"spaces_between_special_tokens", BOOLEAN, {"true"}, {"false"}},
    {"response_format",
     OBJECT,
     {"{\"type\":\"text\"}"},
     {"{}", "{\"type\":\"json_object\"}", "{\"type\":1}", "{\"type\":\"text\",\"x\":1}"}},
    {"modalities", LIST, {"[\"text\"]"}, {"[]", "[\"audio\"]", "[\"text\",\"audio\"]", "[1]"}},
    {"tool_choice", STRING, {"\"none\"", "\"auto\""}, {"\"required\"", "\"\""}},
    {"moderation",
     OBJECT,
     {"{\"model\":\"casemate-guard\"}", "{\"model\":\"casemate-guard\",\"policy\":null}",
      "{\"model\":\"casemate-guard\",\"policy\":{\"input\":{\"mode\":\"block\"},\"output\":null}}"},
     {"{}", "{\"model\":\"m\"}", "{\"model\":\"casemate-guard\",\"x\":1}",
      "{\"model\":\"casemate-guard\",\"policy\":1}",
      "{\"model\":\"casemate-guard\",\"policy\":{\"input\":{\"mode\":\"score\"}}}",
      "{\"model\":\"casemate-guard\",\"policy\":{\"all\":{\"mode\":\"block\"}}}"}},
};
#define APPLIED_COUNT (sizeof(applied) / sizeof(applied[0]))

static const struct {
    unsigned type;
    const char *value;
} of_type[] = {{OBJECT, "{}"},   {OBJECT, "{\"a\":1}"}, {LIST, "[]"},      {LIST, "[1]"},
               {STRING, "\"\""}, {STRING, "\"1\""},     {INTEGER, "1"},    {INTEGER, "0"},
               {REAL, "0.5"},    {REAL, "1.0"},         {BOOLEAN, "true"}, {BOOLEAN, "false"}};
#define TYPED_COUNT (sizeof(of_type) / sizeof(of_type[0]))

static void applied_check(size_t row, enum cm_endpoint endpoint)
{
    const char *name = applied[row].name;
    for (size_t i = 0; i < VALUES_MAX && applied[row].good[i] != NULL; i++) {
        passes(endpoint, name, applied[row].good[i]);
    }
    for (size_t i = 0; i < VALUES_MAX && applied[row].bad[i] != NULL; i++) {
        fails(endpoint, name, applied[row].bad[i], NULL);
    }
    for (size_t i = 0; i < TYPED_COUNT; i++) {
        if ((applied[row].types & of_type[i].type) == 0) {
            fails(endpoint, name, of_type[i].value, NULL);
        }
    }
}

static bool required(const char *name)
{
    return strcmp(name, "model") == 0 || strcmp(name, "messages") == 0 ||
           strcmp(name, "prompt") == 0;
}

/* One row of the table at one endpoint; where it does not stand, its name is unknown. */
static void row_check(const struct cm_field_row *row, enum cm_endpoint endpoint)
{
    bool known = false;
    if (!required(row->name)) {
        passes(endpoint, row->name, "null"); /* as if it were not there */
    } else {
        fails(endpoint, row->name, "null", "missing_required_parameter");
    }
    switch (row->fate) {
    case CM_FIELD_APPLIED:
        for (size_t i = 0; i < APPLIED_COUNT; i++) {
            if (strcmp(applied[i].name, row->name) == 0) {
                known = true;
                applied_check(i, endpoint);
            }
        }
        cr_expect(known, "%s has no cases in this test", row->name);
        return;
    case CM_FIELD_IGNORED:
    case CM_FIELD_REFUSED:
        for (size_t i = 0; i < TYPED_COUNT; i++) {
            if (row->fate == CM_FIELD_IGNORED) {
                passes(endpoint, row->name, of_type[i].value);
            } else {
                fails(endpoint, row->name, of_type[i].value, "unsupported_parameter");
                cr_expect_not_null(strstr(error.message, row->note), "%s: why?", row->name);
            }
        }
        return;
    }
}

static const struct cm_field_row *row_of(const char *name, enum cm_endpoint endpoint)
{
    const struct cm_field_row *found = NULL;
    for (size_t i = 0; i < cm_field_count; i++) {
        if (strcmp(cm_field_rows[i].name, name) == 0 &&
            (cm_field_rows[i].endpoints & endpoint) != 0) {
            cr_expect_null(found, "%s stands twice", name);
            found = &cm_field_rows[i];
        }
    }
    return found;
}

Test(gateway_fields, every_row_at_both_endpoints)
{
    static const enum cm_endpoint endpoints[] = {CM_ENDPOINT_CHAT, CM_ENDPOINT_TEXT};
    cr_assert_gt(cm_field_count, APPLIED_COUNT);
    for (size_t i = 0; i < cm_field_count; i++) {
        for (size_t k = 0; k < 2; k++) {
            const struct cm_field_row *row = row_of(cm_field_rows[i].name, endpoints[k]);
            if (row != NULL) {
                row_check(row, endpoints[k]);
            } else {
                fails(endpoints[k], cm_field_rows[i].name, "null", "unknown_parameter");
                fails(endpoints[k], cm_field_rows[i].name, "1", "unknown_parameter");
            }
        }
    }
}

/* ------------------------------------------------------------------ what fields do */

static enum cm_status parse_text(enum cm_endpoint endpoint, const char *text)
{
    memset(&error, 0, sizeof(error));
    return cm_request_parse(endpoint, text, strlen(text), &limits, &request, &error);
}

Test(gateway_fields, each_value_arrives)
{
    const char *text = "{\"model\":\"m\",\"messages\":" MESSAGE(
        "\"a\"") ",\"temperature\":0.25,"
                 "\"top_p\":0.5,\"top_k\":7,\"min_p\":0.125,\"frequency_penalty\":-1.5,"
                 "\"presence_penalty\":1.5,\"repetition_penalty\":2.5,\"seed\":-2,"
                 "\"max_completion_tokens\":9,\"min_tokens\":3,\"ignore_eos\":true,"
                 "\"stop\":[\"x\",\"yz\"],\"stream\":true,\"stream_options\":"
                 "{\"include_usage\":true,\"continuous_usage_stats\":true}}";
    cr_assert_eq(parse_text(CM_ENDPOINT_CHAT, text), CM_OK, "%s", error.message);
    const struct cm_wire_generate *wire = &request.wire;
    const struct cm_sampling *s = &wire->sampling;
    cr_expect(s->temperature == 0.25f && s->top_p == 0.5f && s->top_k == 7 && s->min_p == 0.125f);
    cr_expect(s->frequency_penalty == -1.5f && s->presence_penalty == 1.5f);
    cr_expect(s->repetition_penalty == 2.5f && s->seed == UINT64_MAX - 1);
    cr_expect(wire->max_tokens == 9 && wire->min_tokens == 3 && wire->ignore_eos == 1);
    cr_expect(wire->stop_count == 2 && strcmp(request.stops[1], "yz") == 0);
    cr_expect(wire->prompt_kind == CM_PROMPT_CHAT && wire->part_count == 1 && wire->tenant == 0);
    cr_expect(request.stream && request.include_usage && request.continuous_usage);
    cm_request_free(&request);
}

Test(gateway_fields, defaults)
{
    const struct cm_request_limits none = {.model = "m", .record_bytes_max = 4096};
    const char *text = "{\"model\":\"m\",\"prompt\":\"a\",\"top_k\":-1}";
    cr_assert_eq(parse_text(CM_ENDPOINT_TEXT, text), CM_OK);
    const struct cm_sampling *s = &request.wire.sampling;
    cr_expect(s->temperature == 1 && s->top_p == 1 && s->top_k == 0 && s->min_p == 0);
    cr_expect(s->frequency_penalty == 0 && s->presence_penalty == 0 && s->repetition_penalty == 1);
    cr_expect(!request.stream && !request.include_usage && request.wire.ignore_eos == 0);
    cr_expect_eq(request.wire.max_tokens, 100u, "the server's default");
    uint64_t seed = s->seed;
    cm_request_free(&request);
    cr_assert_eq(cm_request_parse(CM_ENDPOINT_TEXT, text, strlen(text), &none, &request, &error),
                 CM_OK);
    cr_expect_eq(request.wire.max_tokens, 16u, "as the specification has it");
    cr_expect_neq(request.wire.sampling.seed, seed, "a random seed is drawn anew");
    cm_request_free(&request);
    text = "{\"model\":\"m\",\"messages\":" MESSAGE("\"a\"") "}";
    cr_assert_eq(cm_request_parse(CM_ENDPOINT_CHAT, text, strlen(text), &none, &request, &error),
                 CM_OK);
    cr_expect_eq(request.wire.max_tokens, 0u, "up to the context");
    cm_request_free(&request);
}

/* What a single field cannot tell, and what is no object at all. */
Test(gateway_fields, whole_bodies)
{
#define CHAT(x) "{\"model\":\"m\",\"messages\":" MESSAGE("\"a\"") x "}"
#define DEEP    "[[[[[[[[[[[[[[[" /* 15 */
    static const struct {
        const char *text;
        const char *code; /* NULL: passes */
    } rows[] = {
        {CHAT(""), NULL},
        {" \r\n\t" CHAT(" ") "\n", NULL},
        {CHAT(",\"max_tokens\":5,\"max_completion_tokens\":5"), NULL},
        {CHAT(",\"max_tokens\":5,\"max_completion_tokens\":6"), "invalid_value"},
        {CHAT(",\"max_tokens\":5,\"min_tokens\":5"), NULL},
        {CHAT(",\"max_tokens\":5,\"min_tokens\":6"), "invalid_value"},
        {CHAT(",\"stream_options\":{}"), "invalid_value"},
        {CHAT(",\"stream\":false,\"stream_options\":{}"), "invalid_value"},
        {CHAT(",\"stream_options\":{},\"stream\":true"), NULL},
        {CHAT(",\"user\":\"\\u00e4\\ud83d\\ude00\""), NULL},
        {CHAT(",\"metadata\":" DEEP "]]]]]]]]]]]]]]]"), NULL},
        {CHAT(",\"metadata\":[" DEEP "]]]]]]]]]]]]]]]]"), "invalid_json"},
        {CHAT(",\"user\":\"[[[[[[[[[[[[[[[[[[[[\\\"[[[[[[[[[[[[[[[[[[[[\""), NULL},
        {CHAT(",\"nowhere\":1"), "unknown_parameter"},
        {CHAT(",\"\":1"), "unknown_parameter"},
        {CHAT(",\"Temperature\":1"), "unknown_parameter"},
        {CHAT(",\"model\":\"m\""), "invalid_json"},
        {CHAT(",\"user\":\"a\",\"user\":\"b\""), "invalid_json"},
        {CHAT(",\"metadata\":{\"a\":1,\"a\":2}"), "invalid_json"},
        {CHAT(",\"user\":\"\\u0000\""), "invalid_json"},
        {CHAT(",\"user\":\"\\ud800\""), "invalid_json"},
        {CHAT(",\"user\":\"\xff\""), "invalid_json"},
        {CHAT(",\"user\":\"\xc0\x80\""), "invalid_json"},
        {CHAT(",\"user\":\"\xed\xa0\x80\""), "invalid_json"},
        {CHAT(",\"user\":\"a\nb\""), "invalid_json"},
        {CHAT(",\"seed\":9223372036854775808"), "invalid_json"},
        {CHAT(",\"seed\":1e999"), "invalid_json"},
        {CHAT(",\"temperature\":NaN"), "invalid_json"},
        {CHAT(",\"temperature\":01"), "invalid_json"},
        {CHAT(",\"temperature\":.5"), "invalid_json"},
        {CHAT(","), "invalid_json"},
        {CHAT("") "x", "invalid_json"},
        {CHAT("") CHAT(""), "invalid_json"},
        {"\xef\xbb\xbf" CHAT(""), "invalid_json"},
        {"", "invalid_json"},
        {"{", "invalid_json"},
        {"null", "invalid_json"},
        {"[]", "invalid_json"},
        {"\"a\"", "invalid_json"},
        {"1", "invalid_json"},
        {"{}", "missing_required_parameter"},
        {"{\"model\":\"m\"}", "missing_required_parameter"},
        {"{\"messages\":" MESSAGE("\"a\"") "}", "missing_required_parameter"},
        {"{\"model\":\"x\",\"messages\":" MESSAGE("\"a\"") "}", "model_not_found"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        enum cm_status status = parse_text(CM_ENDPOINT_CHAT, rows[i].text);
        const char *code = status == CM_OK ? NULL : error.code;
        cr_expect((code == NULL) == (rows[i].code == NULL) &&
                      (code == NULL || strcmp(code, rows[i].code) == 0),
                  "%s: %s, not %s", rows[i].text, code, rows[i].code);
        if (status == CM_OK) {
            cm_request_free(&request);
        }
    }
}

Test(gateway_fields, as_many_messages_as_are_permitted)
{
    static char list[BODY_BYTES];
    for (size_t count = CM_MESSAGES_MAX - 1; count <= CM_MESSAGES_MAX + 1; count++) {
        size_t used = 0;
        for (size_t i = 0; i < count; i++) {
            used += (size_t)snprintf(list + used, sizeof(list) - used,
                                     "%c{\"role\":\"user\",\"content\":\"\"}", i > 0 ? ',' : '[');
        }
        snprintf(list + used, sizeof(list) - used, "]");
        if (count <= CM_MESSAGES_MAX) {
            passes(CM_ENDPOINT_CHAT, "messages", list);
        } else {
            fails(CM_ENDPOINT_CHAT, "messages", list, "invalid_value");
        }
    }
}

/* The bytes behind the record, as wire.h has them. */
Test(gateway_fields, the_encoded_record)
{
    static const uint8_t wanted[] = "\1\0\0\0x\2\0\0\0yz"
                                    "\1\0\0\0\1\0\0\0s\1\0\0\0\0\0\0\0"
                                    "\2\0\0\0\3\0\0\0a\nb\3\0\0\0\2\0\0\0\xc3\xa4";
    const size_t size = sizeof(wanted) - 1;
    uint8_t *bytes = NULL;
    size_t got = 0;
    cr_assert_eq(parse_text(CM_ENDPOINT_CHAT,
                            "{\"model\":\"m\",\"stop\":[\"x\",\"yz\"],\"messages\":["
                            "{\"role\":\"system\",\"content\":\"s\"},"
                            "{\"role\":\"developer\",\"content\":\"\"},"
                            "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},"
                            "{\"type\":\"text\",\"text\":\"b\"}]},"
                            "{\"role\":\"assistant\",\"content\":\"\\u00e4\"}]}"),
                 CM_OK, "%s", error.message);
    cr_assert_eq(cm_request_encode(&request, size, &bytes, &got, &error), CM_OK);
    cr_expect(got == size && memcmp(bytes, wanted, size) == 0);
    free(bytes);
    cr_expect_eq(cm_request_encode(&request, size - 1, &bytes, &got, &error), CM_E_INPUT);
    cr_expect(error.status == 413 && strcmp(error.code, "request_too_large") == 0);
    cm_request_free(&request);
}

/* By the state of the adapter that is named: a place that is free names none. */
Test(gateway_fields, a_model_is_chosen_by_name_among_the_adapters)
{
    struct cm_adapter_info adapters[CM_ADAPTERS_MAX] = {
        {.name = "m", .state = CM_ADAPTER_SERVING, .generation = 1},
        {.name = "waits", .state = CM_ADAPTER_WAITING},
        {.name = "loads", .state = CM_ADAPTER_LOADING},
        {.name = "serves", .state = CM_ADAPTER_SERVING, .generation = 7},
        {.name = "leaves", .state = CM_ADAPTER_UNLOADING, .generation = 6},
        {.name = "broken", .state = CM_ADAPTER_REFUSED, .id = "CM-PKG-MAC"},
        {.name = "gone", .state = CM_ADAPTER_ABSENT},
    };
    const struct cm_request_limits with = {
        .model = "m", .adapters = adapters, .every_adapter = true, .record_bytes_max = 4096};
    const struct {
        const char *name, *code;
        uint64_t generation;
        int status;
        bool again;
    } rows[] = {{"m", NULL, 0, 0, false},
                {"serves", NULL, 7, 0, false},
                {"waits", "model_loading", 0, 409, true},
                {"loads", "model_loading", 0, 409, true},
                {"leaves", "model_unloading", 0, 409, false},
                {"broken", "model_refused", 0, 409, false},
                {"gone", "model_not_found", 0, 404, false}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        int size = snprintf(body, BODY_BYTES, "{\"model\":\"%s\",\"prompt\":\"a\"}", rows[i].name);
        enum cm_status status =
            cm_request_parse(CM_ENDPOINT_TEXT, body, (size_t)size, &with, &request, &error);
        cr_assert_eq(status == CM_OK, rows[i].code == NULL, "%s", rows[i].name);
        if (status == CM_OK) {
            cr_expect_eq(request.wire.adapter, rows[i].generation);
            cr_expect_eq(request.adapter != NULL, rows[i].generation != 0);
            cm_request_free(&request);
            continue;
        }
        cr_expect_eq(error.status, rows[i].status);
        cr_expect_str_eq(error.code, rows[i].code);
        cr_expect_str_eq(error.param, "model");
        cr_expect_eq(error.retry_after_s != 0, rows[i].again, "%s", rows[i].name);
        cr_expect(strstr(error.message, rows[i].name) != NULL);
    }
}

/* Without a grant an adapter is as one that is not there, whatever its state; the model is for all.
 */
Test(gateway_fields, an_adapter_is_chosen_only_by_a_key_that_it_is_granted_to)
{
    struct cm_adapter_info adapters[CM_ADAPTERS_MAX] = {
        {.name = "red", .state = CM_ADAPTER_SERVING, .generation = 3},
        {.name = "blue", .state = CM_ADAPTER_LOADING},
        {.name = "redder", .state = CM_ADAPTER_SERVING, .generation = 4}};
    const struct cm_api_key none = {.name = "none"},
                            red = {.adapter_count = 1, .adapters = {"red"}},
                            both = {.adapter_count = 2, .adapters = {"blue", "red"}},
                            all = {.adapter_count = CM_API_KEY_EVERY_ADAPTER};
    const struct {
        const struct cm_api_key *key;
        bool every;
        int statuses[4]; /* of m, red, blue, redder; 0: taken */
    } rows[] = {{NULL, false, {0, 404, 404, 404}}, {&none, false, {0, 404, 404, 404}},
                {&red, false, {0, 0, 404, 404}},   {&both, false, {0, 0, 409, 404}},
                {&all, false, {0, 0, 409, 0}},     {&none, true, {0, 0, 409, 0}},
                {NULL, true, {0, 0, 409, 0}}};
    static const char *const names[] = {"m", "red", "blue", "redder"};
    for (size_t i = 0; i < 4 * sizeof(rows) / sizeof(rows[0]); i++) {
        const struct cm_request_limits of_key = {.model = "m",
                                                 .adapters = adapters,
                                                 .key = rows[i / 4].key,
                                                 .every_adapter = rows[i / 4].every,
                                                 .record_bytes_max = 4096};
        int wanted = rows[i / 4].statuses[i % 4];
        int size = snprintf(body, BODY_BYTES, "{\"model\":\"%s\",\"prompt\":\"a\"}", names[i % 4]);
        enum cm_status status =
            cm_request_parse(CM_ENDPOINT_TEXT, body, (size_t)size, &of_key, &request, &error);
        cr_assert_eq(status == CM_OK ? 0 : error.status, wanted, "row %zu, %s", i / 4,
                     names[i % 4]);
        if (status == CM_OK) {
            cm_request_free(&request);
        } else if (wanted == 404) {
            cr_expect_str_eq(error.code, "model_not_found");
        }
    }
}
