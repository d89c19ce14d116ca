/* From JSON to a wire record. What each field means stands in fields.c. */
#include "runtime/gateway/request.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "runtime/base/cursor.h"
#include "runtime/gateway/keys.h"

uint32_t cm_json_depth(const void *bytes, size_t size)
{
    const char *at = bytes;
    uint32_t depth = 0;
    uint32_t deepest = 0;
    bool string = false;
    for (size_t i = 0; i < size; i++) {
        if (string) {
            if (at[i] == '\\') {
                i++;
            } else if (at[i] == '"') {
                string = false;
            }
        } else if (at[i] == '"') {
            string = true;
        } else if (at[i] == '{' || at[i] == '[') {
            depth++;
            deepest = depth > deepest ? depth : deepest;
        } else if ((at[i] == '}' || at[i] == ']') && depth > 0) {
            depth--;
        }
    }
    return deepest;
}

void cm_request_free(struct cm_request *request)
{
    json_decref(request->root);
    request->root = NULL;
}

static const struct cm_field_row *field_find(const char *name, enum cm_endpoint endpoint)
{
    for (size_t i = 0; i < cm_field_count; i++) {
        if ((cm_field_rows[i].endpoints & (uint32_t)endpoint) != 0 &&
            strcmp(cm_field_rows[i].name, name) == 0) {
            return &cm_field_rows[i];
        }
    }
    return NULL;
}

static enum cm_status field_apply(struct cm_request *request, const char *name, const json_t *value,
                                  struct cm_api_error *ret_error)
{
    const struct cm_field_row *row = field_find(name, request->endpoint);
    if (row == NULL) {
        return cm_api_error_field(ret_error, 400, "unknown_parameter", name,
                                  "Unknown parameter: '%.64s'.", name);
    }
    if (json_is_null(value)) {
        return CM_OK; /* SDKs write null for "not set" */
    }
    switch (row->fate) {
    case CM_FIELD_APPLIED:
        return row->apply(request, name, value, ret_error);
    case CM_FIELD_IGNORED:
        return CM_OK;
    case CM_FIELD_REFUSED:
        return cm_api_error_field(ret_error, 400, "unsupported_parameter", name,
                                  "'%s' is not supported by this server: %s.", name, row->note);
    }
    return CM_OK;
}

static enum cm_status body_load(const void *body, size_t bytes, json_t **ret_root,
                                struct cm_api_error *ret_error)
{
    json_error_t where;
    if (cm_json_depth(body, bytes) > CM_JSON_DEPTH_MAX) {
        return cm_api_error_set(ret_error, 400, "invalid_json",
                                "The body is nested deeper than %d levels.", CM_JSON_DEPTH_MAX);
    }
    json_t *root = json_loadb(body, bytes, JSON_REJECT_DUPLICATES, &where);
    if (root == NULL) {
        const char *what = "it is not valid JSON";
        switch (json_error_code(&where)) {
        case json_error_duplicate_key:
            what = "a key stands twice in one object";
            break;
        case json_error_invalid_utf8:
            what = "it is not valid UTF-8";
            break;
        case json_error_null_character:
        case json_error_null_byte_in_key:
            what = "NUL characters are not accepted";
            break;
        case json_error_numeric_overflow:
            what = "a number is too large";
            break;
        case json_error_premature_end_of_input:
            what = "it ends too early";
            break;
        default:
            break;
        }
        return cm_api_error_set(ret_error, 400, "invalid_json",
                                "The body was not understood at line %d, column %d: %s.",
                                where.line, where.column, what);
    }
    if (!json_is_object(root)) {
        json_decref(root);
        return cm_api_error_set(ret_error, 400, "invalid_json", "The body must be a JSON object.");
    }
    *ret_root = root;
    return CM_OK;
}

/* An adapter that is there, but not to be had now. */
static enum cm_status adapter_refuse(const struct cm_adapter_info *adapter,
                                     struct cm_api_error *ret_error)
{
    if (adapter->state == CM_ADAPTER_REFUSED) {
        (void)cm_api_error_field(ret_error, 409, "model_refused", "model",
                                 "The adapter '%.63s' could not be loaded: %.31s.", adapter->name,
                                 adapter->id);
        ret_error->no_retry = true;
        return CM_E_INPUT;
    }
    bool leaves = adapter->state == CM_ADAPTER_UNLOADING;
    (void)cm_api_error_field(ret_error, 409, leaves ? "model_unloading" : "model_loading", "model",
                             "The adapter '%.63s' is being %s.", adapter->name,
                             leaves ? "unloaded" : "loaded; try again");
    ret_error->no_retry = leaves;
    ret_error->retry_after_s = leaves ? 0 : 1;
    return CM_E_INPUT;
}

/* The model, or one of its adapters. One that was not granted is as one that is not there. */
static enum cm_status model_choose(struct cm_request *request,
                                   const struct cm_request_limits *limits, const char *model,
                                   struct cm_api_error *ret_error)
{
    if (strcmp(model, limits->model) == 0) {
        return CM_OK;
    }
    for (size_t i = 0; limits->adapters != NULL && i < CM_ADAPTERS_MAX; i++) {
        const struct cm_adapter_info *adapter = &limits->adapters[i];
        if (adapter->state == CM_ADAPTER_ABSENT || strcmp(adapter->name, model) != 0 ||
            !cm_keys_adapter_granted(limits->key, limits->every_adapter, model)) {
            continue;
        }
        if (adapter->state != CM_ADAPTER_SERVING) {
            return adapter_refuse(adapter, ret_error);
        }
        request->adapter = adapter;
        request->wire.adapter = adapter->generation;
        return CM_OK;
    }
    return cm_api_error_field(ret_error, 404, "model_not_found", "model",
                              "The model '%.64s' does not exist here; see GET /v1/models.", model);
}

/* What no single field can see. */
static enum cm_status request_complete(struct cm_request *request,
                                       const struct cm_request_limits *limits,
                                       struct cm_api_error *ret_error)
{
    const char *prompt = request->endpoint == CM_ENDPOINT_CHAT ? "messages" : "prompt";
    if (!request->model_given) {
        return cm_api_error_field(ret_error, 400, "missing_required_parameter", "model",
                                  "'model' is required.");
    }
    const char *model = json_string_value(json_object_get(request->root, "model"));
    enum cm_status status = model_choose(request, limits, model, ret_error);
    if (status != CM_OK) {
        return status;
    }
    if (!request->prompt_given) {
        return cm_api_error_field(ret_error, 400, "missing_required_parameter", prompt,
                                  "'%s' is required.", prompt);
    }
    if (request->stream_options_given && !request->stream) {
        return cm_api_error_field(ret_error, 400, "invalid_value", "stream_options",
                                  "'stream_options' needs 'stream': true.");
    }
    if (!request->max_tokens_given) {
        request->wire.max_tokens = limits->max_tokens_default;
        if (request->wire.max_tokens == 0 && request->endpoint == CM_ENDPOINT_TEXT) {
            request->wire.max_tokens = 16; /* as the OpenAI specification has it */
        }
    }
    if (request->wire.max_tokens != 0 && request->wire.min_tokens > request->wire.max_tokens) {
        return cm_api_error_field(ret_error, 400, "invalid_value", "min_tokens",
                                  "'min_tokens' is larger than the largest number of tokens (%u).",
                                  request->wire.max_tokens);
    }
    if (!request->seed_given &&
        getrandom(&request->wire.sampling.seed, sizeof(uint64_t), 0) != (ssize_t)sizeof(uint64_t)) {
        return cm_api_error_set(ret_error, 500, "internal_error", "No random seed is available.");
    }
    return CM_OK;
}

enum cm_status cm_request_parse(enum cm_endpoint endpoint, const void *body, size_t bytes,
                                const struct cm_request_limits *limits,
                                struct cm_request *ret_request, struct cm_api_error *ret_error)
{
    struct cm_request request = {.endpoint = endpoint};
    request.wire.prompt_kind = endpoint == CM_ENDPOINT_CHAT ? CM_PROMPT_CHAT : CM_PROMPT_TEXT;
    request.wire.sampling =
        (struct cm_sampling){.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f};
    enum cm_status status = body_load(body, bytes, &request.root, ret_error);
    if (status != CM_OK) {
        return status;
    }
    const char *name;
    json_t *value;
    json_object_foreach(request.root, name, value)
    {
        status = field_apply(&request, name, value, ret_error);
        if (status != CM_OK) {
            goto out;
        }
    }
    status = request_complete(&request, limits, ret_error);
out:
    if (status != CM_OK) {
        cm_request_free(&request);
        return status;
    }
    *ret_request = request;
    return CM_OK;
}

/* ------------------------------------------------------------------ encoding */

/* Text of a message: a string, or text parts joined by a line break. Writer NULL: only measure. */
static size_t content_put(struct cm_writer *writer, const json_t *content)
{
    if (json_is_string(content)) {
        if (writer != NULL) {
            cm_writer_bytes(writer, json_string_value(content), json_string_length(content));
        }
        return json_string_length(content);
    }
    size_t total = 0;
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *text = json_object_get(json_array_get(content, i), "text");
        if (writer != NULL) {
            cm_writer_bytes(writer, "\n", i > 0 ? 1 : 0);
            cm_writer_bytes(writer, json_string_value(text), json_string_length(text));
        }
        total += json_string_length(text) + (i > 0 ? 1 : 0);
    }
    return total;
}

static uint32_t role_number(const json_t *message)
{
    const char *role = json_string_value(json_object_get(message, "role"));
    if (strcmp(role, "user") == 0) {
        return CM_CHAT_USER;
    }
    return strcmp(role, "assistant") == 0 ? CM_CHAT_ASSISTANT : CM_CHAT_SYSTEM;
}

static void part_put(struct cm_writer *writer, uint32_t role, const json_t *content)
{
    cm_writer_u32(writer, role);
    cm_writer_u32(writer, (uint32_t)content_put(NULL, content));
    content_put(writer, content);
}

static size_t encoded_bytes(const struct cm_request *request)
{
    size_t total = 0;
    for (uint32_t i = 0; i < request->wire.stop_count; i++) {
        total += sizeof(uint32_t) + strlen(request->stops[i]);
    }
    if (request->endpoint == CM_ENDPOINT_TEXT) {
        return total + 2 * sizeof(uint32_t) + content_put(NULL, request->prompt);
    }
    for (size_t i = 0; i < json_array_size(request->prompt); i++) {
        const json_t *message = json_array_get(request->prompt, i);
        total += 2 * sizeof(uint32_t) + content_put(NULL, json_object_get(message, "content"));
    }
    return total;
}

enum cm_status cm_request_encode(const struct cm_request *request, size_t bytes_max,
                                 uint8_t **ret_bytes, size_t *ret_size,
                                 struct cm_api_error *ret_error)
{
    size_t size = encoded_bytes(request); /* a sum of parts of one body: cannot wrap */
    if (size > bytes_max || size > UINT32_MAX) {
        return cm_api_error_set(ret_error, 413, "request_too_large",
                                "The prompt is larger than this server passes on.");
    }
    uint8_t *bytes = malloc(size + 1);
    CM_ASSERT(bytes != NULL);
    struct cm_writer writer = cm_writer_init(bytes, size);
    for (uint32_t i = 0; i < request->wire.stop_count; i++) {
        cm_writer_u32(&writer, (uint32_t)strlen(request->stops[i]));
        cm_writer_bytes(&writer, request->stops[i], strlen(request->stops[i]));
    }
    if (request->endpoint == CM_ENDPOINT_TEXT) {
        part_put(&writer, 0, request->prompt);
    }
    for (size_t i = 0;
         request->endpoint == CM_ENDPOINT_CHAT && i < json_array_size(request->prompt); i++) {
        const json_t *message = json_array_get(request->prompt, i);
        part_put(&writer, role_number(message), json_object_get(message, "content"));
    }
    CM_ASSERT(!writer.failed && writer.offset == size);
    *ret_bytes = bytes;
    *ret_size = size;
    return CM_OK;
}
