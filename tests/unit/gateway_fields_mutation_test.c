/* JSON bodies by an attacker: tokens dropped, doubled, exchanged and replaced, bytes changed. What
 * is accepted gives a record within the wire's bounds; what is refused, an error that is JSON. */
#include <criterion/criterion.h>
#include <event2/buffer.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/base/cursor.h"
#include "runtime/gateway/request.h"
#include "runtime/gateway/text.h"
#include "tests/unit/random.h"

#define MUTATIONS  60000
#define BODY_MAX   8192
#define TOKENS_MAX 256
#define RECORD_MAX 600

static const struct cm_request_limits limits = {
    .model = "m", .max_tokens_default = 50, .record_bytes_max = RECORD_MAX};

static const char *const samples[] = {
    "{\"model\":\"m\",\"messages\":[{\"role\":\"system\",\"content\":\"be brief\"},{\"role\":"
    "\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\\u00e4\\n\"},{\"type\":\"text\","
    "\"text\":\"b\"}],\"name\":\"n\"}],\"temperature\":0.5,\"stop\":[\"x\",\"yz\"],\"stream\":true,"
    "\"stream_options\":{\"include_usage\":true},\"max_tokens\":9,\"min_tokens\":2,\"n\":1}",
    "{\"model\":\"m\",\"prompt\":\"once upon a time\",\"top_p\":0.9,\"top_k\":40,\"min_p\":0.1,"
    "\"frequency_penalty\":-1,\"presence_penalty\":1,\"repetition_penalty\":1.5,\"seed\":7,"
    "\"stop\":\"end\",\"echo\":false,\"user\":\"u\",\"ignore_eos\":true,\"best_of\":1}",
};

static const char *const hostile[] = {
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1e999",
    "1e-320",
    "-0.0",
    "4294967296",
    "1.5",
    "9223372036854775807",
    "9223372036854775808",
    "\"\"",
    "\"m\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"\\ud83d\\ude00\"",
    "\"\xff\"",
    "\"text\"",
    "\"user\"",
    "{}",
    "[]",
    "[null]",
    "[[[[]]]]",
    "{\"type\":\"text\"}",
    "{\"type\":\"text\",\"text\":\"\"}",
    "[\"a\",\"b\",\"c\",\"d\",\"e\"]",
    "\"tools\"",
    "\"max_completion_tokens\"",
    "\"messages\"",
    "\"prompt\"",
    "\"stop\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
    "xxxxxxxxxxxxxxxxxxxx\""};
#define HOSTILE_COUNT (sizeof(hostile) / sizeof(hostile[0]))
#define WELL_FORMED   33 /* the first of them, most */

struct token {
    const char *at;
    size_t size;
};

/* Strings, numbers and words, punctuation: enough of JSON to cut it at its joints. */
static size_t tokens_cut(const char *text, struct token *ret_tokens)
{
    size_t count = 0;
    while (*text != '\0') {
        size_t size = 1;
        if (*text == '"') {
            while (text[size] != '"') {
                size += text[size] == '\\' ? 2 : 1;
            }
            size++;
        } else if (strchr("{}[],:", *text) == NULL) {
            size = strcspn(text, "{}[],:\"");
        }
        ret_tokens[count++] = (struct token){text, size};
        text += size;
    }
    return count;
}

static void tokens_mutate(struct token *tokens, size_t *count)
{
    size_t at = below(*count);
    size_t other = below(*count);
    struct token kept = tokens[at];
    const char *text = hostile[below(below(4) != 0 ? WELL_FORMED : HOSTILE_COUNT)];
    switch (below(24)) {
    case 0: /* drop one, or a whole pair */
    case 1: {
        size_t gone = at + 4 < *count && *tokens[at + 1].at == ':' ? 4 : 1;
        memmove(tokens + at, tokens + at + gone, (*count - at - gone) * sizeof(*tokens));
        *count -= gone;
        return;
    }
    case 2: /* twice */
        memmove(tokens + other + 1, tokens + other, (*count - other) * sizeof(*tokens));
        tokens[other] = kept;
        ++*count;
        return;
    case 3: /* exchange */
        tokens[at] = tokens[other];
        tokens[other] = kept;
        return;
    default: /* replace a value; seldom something else */
        if (at > 0 && (*tokens[at - 1].at == ':' || below(16) == 0)) {
            tokens[at] = (struct token){text, strlen(text)};
        }
    }
}

static size_t body_make(const char *sample, char ret_body[static BODY_MAX])
{
    struct token tokens[TOKENS_MAX];
    size_t count = tokens_cut(sample, tokens);
    size_t size = 0;
    for (size_t k = 1 + below(4); k > 0; k--) {
        tokens_mutate(tokens, &count);
    }
    for (size_t i = 0; i < count; i++) {
        memcpy(ret_body + size, tokens[i].at, tokens[i].size);
        size += tokens[i].size;
    }
    if (below(16) == 0) {
        ret_body[below(size)] ^= (char)(1 << below(8));
    }
    return below(16) == 0 ? below(size + 1) : size;
}

/* ------------------------------------------------------------------ what must hold */

static void wire_check(const struct cm_wire_generate *wire)
{
    const struct cm_sampling *s = &wire->sampling;
    cr_assert(s->temperature >= 0 && s->temperature <= 2 && s->top_p > 0 && s->top_p <= 1);
    cr_assert(s->min_p >= 0 && s->min_p <= 1 && s->top_k <= 1000000);
    cr_assert(s->frequency_penalty >= -2 && s->frequency_penalty <= 2);
    cr_assert(s->presence_penalty >= -2 && s->presence_penalty <= 2);
    cr_assert(s->repetition_penalty > 0 && s->repetition_penalty <= 4 && s->reserved == 0);
    cr_assert(wire->max_tokens >= 1 && wire->max_tokens <= 1000000);
    cr_assert(wire->min_tokens <= wire->max_tokens && wire->ignore_eos <= 1 && wire->tenant == 0);
    cr_assert(wire->stop_count <= CM_STOPS_MAX);
    cr_assert(wire->part_count >= 1 && wire->part_count <= CM_MESSAGES_MAX);
}

/* The record's tail read back as the worker must. */
static void record_check(const struct cm_request *request, enum cm_endpoint endpoint)
{
    const struct cm_wire_generate *wire = &request->wire;
    struct cm_api_error error;
    uint8_t *bytes = NULL;
    size_t size = 0;
    if (cm_request_encode(request, RECORD_MAX, &bytes, &size, &error) != CM_OK) {
        cr_assert_eq(error.status, 413);
        return;
    }
    cr_assert_leq(size, RECORD_MAX);
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    for (uint32_t i = 0; i < wire->stop_count + wire->part_count; i++) {
        bool stop = i < wire->stop_count;
        uint32_t role = stop ? 0 : cm_cursor_u32(&cursor);
        uint32_t text_bytes = cm_cursor_u32(&cursor);
        const uint8_t *text = cm_cursor_take(&cursor, text_bytes);
        cr_assert_not_null(text);
        cr_assert(cm_utf8_valid(text, text_bytes) && memchr(text, 0, text_bytes) == NULL);
        cr_assert(!stop || (text_bytes >= 1 && text_bytes <= CM_STOP_BYTES_MAX));
        cr_assert(stop || endpoint == CM_ENDPOINT_TEXT
                      ? role == 0
                      : role >= CM_CHAT_SYSTEM && role <= CM_CHAT_ASSISTANT);
    }
    cr_assert(cm_cursor_ok(&cursor) && cm_cursor_left(&cursor) == 0);
    free(bytes);
}

static void error_check(const struct cm_api_error *error)
{
    static const char *const names[] = {"message", "type", "param", "code"};
    struct evbuffer *out = evbuffer_new();
    cm_api_error_write(error, out);
    size_t size = evbuffer_get_length(out);
    json_t *root = json_loadb((const char *)evbuffer_pullup(out, -1), size, 0, NULL);
    json_t *object = json_object_get(root, "error");
    cr_assert(json_object_size(root) == 1 && json_object_size(object) == 4, "%.*s", (int)size,
              (const char *)evbuffer_pullup(out, -1));
    for (size_t i = 0; i < 4; i++) {
        const json_t *value = json_object_get(object, names[i]);
        cr_assert(json_is_string(value) || (i == 2 && json_is_null(value)));
    }
    cr_assert(error->status == 400 || error->status == 404);
    json_decref(root);
    evbuffer_free(out);
}

Test(gateway_fields, mutated_bodies)
{
    static char body[BODY_MAX];
    size_t accepted = 0, understood = 0;
    random_state = 7;
    json_object_seed(1);
    for (int i = 0; i < MUTATIONS; i++) {
        struct cm_request request;
        struct cm_api_error error;
        enum cm_endpoint endpoint = i % 2 == 0 ? CM_ENDPOINT_CHAT : CM_ENDPOINT_TEXT;
        size_t size = body_make(samples[i % 2], body);
        char *bytes = malloc(size + 1); /* of its exact size, behind one byte */
        memcpy(bytes + 1, body, size);
        if (cm_request_parse(endpoint, bytes + 1, size, &limits, &request, &error) == CM_OK) {
            wire_check(&request.wire);
            record_check(&request, endpoint);
            cm_request_free(&request);
            accepted++;
        } else {
            error_check(&error);
            understood += strcmp(error.code, "invalid_json") != 0;
        }
        free(bytes);
    }
    cr_log_info("%zu accepted, %zu refused for a field", accepted, understood);
    cr_assert(accepted > MUTATIONS / 4 && understood > MUTATIONS / 10);
}
