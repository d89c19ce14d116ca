/* The table of request fields, and what each applied field does.
 *
 * Ranges are those of the OpenAI specification, and of vLLM for its extensions. A field that would
 * change the reply and cannot be honoured is refused, never dropped in silence. */
#include <stdio.h>
#include <string.h>

#include "runtime/gateway/moderation.h"
#include "runtime/gateway/request.h"

#define TOKENS_MAX 1000000

static enum cm_status type_refuse(struct cm_api_error *error, const char *name, const char *wanted)
{
    return cm_api_error_field(error, 400, "invalid_type", name, "'%s' must be %s.", name, wanted);
}

static enum cm_status value_refuse(struct cm_api_error *error, const char *name, const char *wanted)
{
    return cm_api_error_field(error, 400, "invalid_value", name, "'%s' must be %s.", name, wanted);
}

/* ------------------------------------------------------------------ scalars */

static enum cm_status number_read(const char *name, const json_t *value, double least, double most,
                                  bool open_below, float *ret_number, struct cm_api_error *error)
{
    if (!json_is_number(value)) {
        return type_refuse(error, name, "a number");
    }
    double number = json_number_value(value);
    /* As a float: a double above the bound may round to it. */
    if (!(number >= least && number <= most) || (open_below && !((double)(float)number > least))) {
        return cm_api_error_field(error, 400, "invalid_value", name,
                                  "'%s' must be %s %g and at most %g.", name,
                                  open_below ? "above" : "at least", least, most);
    }
    *ret_number = (float)number;
    return CM_OK;
}

static enum cm_status integer_read(const char *name, const json_t *value, int64_t least,
                                   int64_t most, uint32_t *ret_number, struct cm_api_error *error)
{
    if (!json_is_integer(value)) {
        return type_refuse(error, name, "an integer");
    }
    json_int_t number = json_integer_value(value);
    if (number != least && least == most) {
        return cm_api_error_field(error, 400, "invalid_value", name, "'%s' can only be %lld.", name,
                                  (long long)least);
    }
    if (number < least || number > most) {
        return cm_api_error_field(error, 400, "invalid_value", name,
                                  "'%s' must be between %lld and %lld.", name, (long long)least,
                                  (long long)most);
    }
    *ret_number = (uint32_t)number;
    return CM_OK;
}

#define APPLY(name)                                                                                \
    static enum cm_status apply_##name(struct cm_request *request, const char *name_text,          \
                                       const json_t *value, struct cm_api_error *error)
#define SAMPLING (&request->wire.sampling)

APPLY(temperature)
{
    return number_read(name_text, value, 0, 2, false, &SAMPLING->temperature, error);
}

APPLY(top_p)
{
    return number_read(name_text, value, 0, 1, true, &SAMPLING->top_p, error);
}

APPLY(min_p)
{
    return number_read(name_text, value, 0, 1, false, &SAMPLING->min_p, error);
}

APPLY(frequency_penalty)
{
    return number_read(name_text, value, -2, 2, false, &SAMPLING->frequency_penalty, error);
}

APPLY(presence_penalty)
{
    return number_read(name_text, value, -2, 2, false, &SAMPLING->presence_penalty, error);
}

APPLY(repetition_penalty)
{
    return number_read(name_text, value, 0, 4, true, &SAMPLING->repetition_penalty, error);
}

APPLY(top_k)
{
    if (json_is_integer(value) && json_integer_value(value) == -1) {
        SAMPLING->top_k = 0; /* vLLM's way to say "off" */
        return CM_OK;
    }
    return integer_read(name_text, value, 0, TOKENS_MAX, &SAMPLING->top_k, error);
}

APPLY(seed)
{
    if (!json_is_integer(value)) {
        return type_refuse(error, name_text, "an integer");
    }
    SAMPLING->seed = (uint64_t)json_integer_value(value);
    request->seed_given = true;
    return CM_OK;
}

APPLY(max_tokens)
{
    uint32_t tokens = 0;
    enum cm_status status = integer_read(name_text, value, 1, TOKENS_MAX, &tokens, error);
    if (status != CM_OK) {
        return status;
    }
    if (request->max_tokens_given && tokens != request->wire.max_tokens) {
        return value_refuse(error, name_text, "equal to its other spelling where both are given");
    }
    request->wire.max_tokens = tokens;
    request->max_tokens_given = true;
    return CM_OK;
}

APPLY(min_tokens)
{
    return integer_read(name_text, value, 0, TOKENS_MAX, &request->wire.min_tokens, error);
}

static enum cm_status boolean_read(const char *name, const json_t *value, bool *ret_value,
                                   struct cm_api_error *error)
{
    if (!json_is_boolean(value)) {
        return type_refuse(error, name, "true or false");
    }
    *ret_value = json_is_true(value);
    return CM_OK;
}

APPLY(stream)
{
    return boolean_read(name_text, value, &request->stream, error);
}

APPLY(ignore_eos)
{
    bool on = false;
    enum cm_status status = boolean_read(name_text, value, &on, error);
    request->wire.ignore_eos = on;
    return status;
}

/* ------------------------------------------------------------------ one accepted value only */

APPLY(one)
{
    (void)request;
    uint32_t number = 0;
    return integer_read(name_text, value, 1, 1, &number, error);
}

APPLY(false)
{
    bool on = false;
    (void)request;
    enum cm_status status = boolean_read(name_text, value, &on, error);
    return status == CM_OK && on ? value_refuse(error, name_text, "false: it is not supported")
                                 : status;
}

APPLY(true)
{
    bool on = false;
    (void)request;
    enum cm_status status = boolean_read(name_text, value, &on, error);
    return status == CM_OK && !on
               ? value_refuse(error, name_text, "true: nothing else is supported")
               : status;
}

APPLY(response_format)
{
    (void)request;
    const char *type = json_string_value(json_object_get(value, "type"));
    if (!json_is_object(value) || type == NULL) {
        return type_refuse(error, name_text, "an object with a 'type'");
    }
    if (strcmp(type, "text") != 0 || json_object_size(value) != 1) {
        return cm_api_error_field(error, 400, "unsupported_parameter", name_text,
                                  "'response_format' can only be {\"type\":\"text\"}.");
    }
    return CM_OK;
}

APPLY(modalities)
{
    (void)request;
    const char *only = json_string_value(json_array_get(value, 0));
    if (!json_is_array(value) || json_array_size(value) != 1 || only == NULL ||
        strcmp(only, "text") != 0) {
        return value_refuse(error, name_text, "[\"text\"]");
    }
    return CM_OK;
}

/* The rules decide for everyone: a request may ask to see verdicts, not to change them. */
static enum cm_status moderation_policy_check(const json_t *policy, struct cm_api_error *error)
{
    const char *stage;
    json_t *value;
    if (!json_is_object(policy)) {
        return type_refuse(error, "moderation.policy", "an object");
    }
    json_object_foreach((json_t *)policy, stage, value)
    {
        const char *mode = json_string_value(json_object_get(value, "mode"));
        bool known = strcmp(stage, "input") == 0 || strcmp(stage, "output") == 0;
        if (!known || (!json_is_null(value) && (mode == NULL || strcmp(mode, "block") != 0))) {
            return cm_api_error_field(error, 400, "unsupported_parameter", "moderation.policy",
                                      "'moderation.policy' can only hold 'input' and 'output' with "
                                      "the mode \"block\": this server's rules decide.");
        }
    }
    return CM_OK;
}

APPLY(moderation)
{
    const char *key;
    json_t *part;
    if (!json_is_object(value)) {
        return type_refuse(error, name_text, "an object");
    }
    json_object_foreach((json_t *)value, key, part)
    {
        if (strcmp(key, "model") != 0 && strcmp(key, "policy") != 0) {
            return cm_api_error_field(error, 400, "unknown_parameter", "moderation",
                                      "Unknown parameter: 'moderation.%.40s'.", key);
        }
    }
    const char *model = json_string_value(json_object_get(value, "model"));
    if (model == NULL || strcmp(model, CM_MODERATION_MODEL) != 0) {
        return value_refuse(error, "moderation.model", "\"" CM_MODERATION_MODEL "\"");
    }
    request->moderated = true;
    part = json_object_get(value, "policy");
    return part == NULL || json_is_null(part) ? CM_OK : moderation_policy_check(part, error);
}

APPLY(tool_choice)
{
    (void)request;
    const char *choice = json_string_value(value);
    if (choice == NULL || (strcmp(choice, "none") != 0 && strcmp(choice, "auto") != 0)) {
        return cm_api_error_field(error, 400, "unsupported_parameter", name_text,
                                  "'tool_choice' can only be \"none\" or \"auto\": tools are not "
                                  "supported.");
    }
    return CM_OK;
}

/* ------------------------------------------------------------------ texts */

APPLY(model)
{
    if (!json_is_string(value) || json_string_length(value) == 0) {
        return type_refuse(error, name_text, "a non-empty string");
    }
    request->model_given = true; /* the value is compared when all fields are read */
    return CM_OK;
}

APPLY(prompt)
{
    if (json_is_array(value)) {
        return cm_api_error_field(error, 400, "unsupported_parameter", name_text,
                                  "'prompt' must be one string: lists of prompts and token ids are "
                                  "not supported.");
    }
    if (!json_is_string(value)) {
        return type_refuse(error, name_text, "a string");
    }
    request->prompt = value;
    request->prompt_given = true;
    request->wire.part_count = 1;
    return CM_OK;
}

static enum cm_status stop_add(struct cm_request *request, const char *name, const json_t *value,
                               struct cm_api_error *error)
{
    if (!json_is_string(value)) {
        return type_refuse(error, name, "a string or a list of strings");
    }
    if (json_string_length(value) == 0 || json_string_length(value) > CM_STOP_BYTES_MAX) {
        return cm_api_error_field(error, 400, "invalid_value", name,
                                  "Each stop string must have 1 to %d bytes.", CM_STOP_BYTES_MAX);
    }
    request->stops[request->wire.stop_count++] = json_string_value(value);
    return CM_OK;
}

APPLY(stop)
{
    if (!json_is_array(value)) {
        return stop_add(request, name_text, value, error);
    }
    if (json_array_size(value) > CM_STOPS_MAX) {
        return cm_api_error_field(error, 400, "invalid_value", name_text,
                                  "At most %d stop strings are accepted.", CM_STOPS_MAX);
    }
    for (size_t i = 0; i < json_array_size(value); i++) {
        enum cm_status status = stop_add(request, name_text, json_array_get(value, i), error);
        if (status != CM_OK) {
            return status;
        }
    }
    return CM_OK;
}

APPLY(stream_options)
{
    const char *key;
    json_t *option;
    if (!json_is_object(value)) {
        return type_refuse(error, name_text, "an object");
    }
    request->stream_options_given = true;
    json_object_foreach((json_t *)value, key, option)
    {
        char param[64];
        bool on = false;
        snprintf(param, sizeof(param), "stream_options.%.40s", key);
        bool usage = strcmp(key, "include_usage") == 0;
        bool continuous = strcmp(key, "continuous_usage_stats") == 0;
        bool obfuscation = strcmp(key, "include_obfuscation") == 0;
        if (!usage && !continuous && !obfuscation) {
            return cm_api_error_field(error, 400, "unknown_parameter", param,
                                      "Unknown parameter: '%s'.", param);
        }
        if (json_is_null(option)) {
            continue;
        }
        enum cm_status status = obfuscation ? apply_false(request, param, option, error)
                                            : boolean_read(param, option, &on, error);
        if (status != CM_OK) {
            return status;
        }
        request->include_usage = request->include_usage || (usage && on);
        request->continuous_usage = request->continuous_usage || (continuous && on);
    }
    return CM_OK;
}

/* ------------------------------------------------------------------ messages */

static enum cm_status parts_check(const json_t *content, size_t index, struct cm_api_error *error)
{
    char param[64];
    if (json_array_size(content) == 0) {
        snprintf(param, sizeof(param), "messages[%zu].content", index);
        return value_refuse(error, param, "a string or a non-empty list of text parts");
    }
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *part = json_array_get(content, i);
        const char *type = json_string_value(json_object_get(part, "type"));
        snprintf(param, sizeof(param), "messages[%zu].content[%zu]", index, i);
        if (type != NULL && strcmp(type, "text") != 0) {
            return cm_api_error_field(error, 400, "unsupported_parameter", param,
                                      "Only content parts of type 'text' are supported.");
        }
        if (type == NULL || !json_is_string(json_object_get(part, "text")) ||
            json_object_size(part) != 2) {
            return type_refuse(error, param, "{\"type\":\"text\",\"text\":string}");
        }
    }
    return CM_OK;
}

static enum cm_status role_check(const json_t *message, size_t index, struct cm_api_error *error)
{
    static const char *const roles[] = {"system", "developer", "user", "assistant"};
    const char *role = json_string_value(json_object_get(message, "role"));
    char param[64];
    snprintf(param, sizeof(param), "messages[%zu].role", index);
    for (size_t i = 0; role != NULL && i < sizeof(roles) / sizeof(roles[0]); i++) {
        if (strcmp(role, roles[i]) == 0) {
            return CM_OK;
        }
    }
    return value_refuse(error, param, "one of system, developer, user, assistant");
}

static enum cm_status message_check(const json_t *message, size_t index, struct cm_api_error *error)
{
    char param[96];
    const char *key;
    json_t *value;
    snprintf(param, sizeof(param), "messages[%zu]", index);
    if (!json_is_object(message)) {
        return type_refuse(error, param, "an object");
    }
    json_object_foreach((json_t *)message, key, value)
    {
        bool known = strcmp(key, "role") == 0 || strcmp(key, "content") == 0;
        bool ignored = strcmp(key, "name") == 0 || json_is_null(value);
        if (!known && !ignored) {
            snprintf(param, sizeof(param), "messages[%zu].%.40s", index, key);
            return cm_api_error_field(error, 400, "unsupported_parameter", param,
                                      "'%s' is not supported by this server.", param);
        }
    }
    enum cm_status status = role_check(message, index, error);
    if (status != CM_OK) {
        return status;
    }
    const json_t *content = json_object_get(message, "content");
    if (json_is_array(content)) {
        return parts_check(content, index, error);
    }
    snprintf(param, sizeof(param), "messages[%zu].content", index);
    return json_is_string(content) ? CM_OK
                                   : type_refuse(error, param, "a string or a list of text parts");
}

APPLY(messages)
{
    if (!json_is_array(value)) {
        return type_refuse(error, name_text, "a list of messages");
    }
    size_t count = json_array_size(value);
    if (count == 0 || count > CM_MESSAGES_MAX) {
        return cm_api_error_field(error, 400, "invalid_value", name_text,
                                  "'messages' must hold 1 to %d messages.", CM_MESSAGES_MAX);
    }
    for (size_t i = 0; i < count; i++) {
        enum cm_status status = message_check(json_array_get(value, i), i, error);
        if (status != CM_OK) {
            return status;
        }
    }
    request->prompt = value;
    request->prompt_given = true;
    request->wire.part_count = (uint32_t)count;
    return CM_OK;
}

/* ------------------------------------------------------------------ the table */

#define C CM_ENDPOINT_CHAT
#define T CM_ENDPOINT_TEXT
#define B (CM_ENDPOINT_CHAT | CM_ENDPOINT_TEXT)

#define APPLIED(name, endpoints, function, note)                                                   \
    {                                                                                              \
        name, endpoints, CM_FIELD_APPLIED, apply_##function, note                                  \
    }
#define IGNORED(name, endpoints, note)                                                             \
    {                                                                                              \
        name, endpoints, CM_FIELD_IGNORED, NULL, note                                              \
    }
#define REFUSED(name, endpoints, note)                                                             \
    {                                                                                              \
        name, endpoints, CM_FIELD_REFUSED, NULL, note                                              \
    }

/* clang-format off */
const struct cm_field_row cm_field_rows[] = {
    APPLIED("model", B, model, "required; the served name, or that of an adapter of it (LoRA) that the key was granted"),
    APPLIED("messages", C, messages, "required; 1 to 256; roles system, developer (= system), user, assistant; content a string, or parts of type text, joined by a line break; `name` is ignored; other keys are refused unless null"),
    APPLIED("prompt", T, prompt, "required; one string"),
    APPLIED("max_tokens", B, max_tokens, "1 up; default: the server's, else the context (chat) or 16 (completions)"),
    APPLIED("max_completion_tokens", C, max_tokens, "as max_tokens; where both stand they must agree"),
    APPLIED("min_tokens", B, min_tokens, "0 up to max_tokens"),
    APPLIED("temperature", B, temperature, "0 to 2; default 1; 0 is greedy"),
    APPLIED("top_p", B, top_p, "above 0, to 1; default 1"),
    APPLIED("top_k", B, top_k, "0 or -1: off (default)"),
    APPLIED("min_p", B, min_p, "0 to 1; default 0"),
    APPLIED("frequency_penalty", B, frequency_penalty, "-2 to 2; default 0"),
    APPLIED("presence_penalty", B, presence_penalty, "-2 to 2; default 0"),
    APPLIED("repetition_penalty", B, repetition_penalty, "above 0, to 4; default 1"),
    APPLIED("seed", B, seed, "any 64-bit integer; default random; the same seed gives the same reply"),
    APPLIED("stop", B, stop, "a string or up to 4, each of 1 to 256 bytes"),
    APPLIED("stream", B, stream, "server-sent events; default false"),
    APPLIED("stream_options", B, stream_options, "with stream only; include_usage, continuous_usage_stats; include_obfuscation only false"),
    APPLIED("ignore_eos", B, ignore_eos, "go on after the end token"),
    APPLIED("n", B, one, "only 1"),
    APPLIED("best_of", T, one, "only 1"),
    APPLIED("echo", T, false, "only false"),
    APPLIED("logprobs", C, false, "only false"),
    APPLIED("use_beam_search", B, false, "only false"),
    APPLIED("include_stop_str_in_output", B, false, "only false"),
    APPLIED("continue_final_message", C, false, "only false"),
    APPLIED("return_tokens_as_token_ids", B, false, "only false"),
    APPLIED("add_generation_prompt", C, true, "only true"),
    APPLIED("skip_special_tokens", B, true, "only true"),
    APPLIED("spaces_between_special_tokens", B, true, "only true"),
    APPLIED("response_format", B, response_format, "only {\"type\":\"text\"}"),
    APPLIED("modalities", C, modalities, "only [\"text\"]"),
    APPLIED("tool_choice", C, tool_choice, "only \"none\" and \"auto\", which are the same without tools"),
    APPLIED("moderation", C, moderation, "{\"model\":\"casemate-guard\"}: the reply carries `moderation` also where no rule matched; policy modes only \"block\""),
    IGNORED("user", B, "who asks follows from the key alone"),
    IGNORED("metadata", B, "nothing is stored"),
    IGNORED("store", C, "nothing is ever stored"),
    IGNORED("service_tier", B, "there is one tier"),
    IGNORED("safety_identifier", C, "who asks follows from the key alone"),
    IGNORED("prompt_cache_key", C, "reuse follows from the text and the key's owner"),
    IGNORED("prompt_cache_retention", C, "as above"),
    IGNORED("prompt_cache_options", C, "as above"),
    IGNORED("parallel_tool_calls", C, "without effect where there are no tools"),
    IGNORED("prediction", C, "a hint for speed; the reply is the same without it"),
    IGNORED("request_id", B, "X-Request-ID serves this"),
    IGNORED("session_id", B, "a routing hint; this is one node"),
    REFUSED("tools", C, "there is no tool calling"),
    REFUSED("functions", C, "there is no tool calling"),
    REFUSED("function_call", C, "there is no tool calling"),
    REFUSED("logprobs", T, "probabilities are not returned"),
    REFUSED("top_logprobs", C, "probabilities are not returned"),
    REFUSED("prompt_logprobs", B, "probabilities are not returned"),
    REFUSED("logit_bias", B, "tokens cannot be biased one by one"),
    REFUSED("suffix", T, "there is no filling in the middle"),
    REFUSED("audio", C, "only text is generated"),
    REFUSED("reasoning_effort", C, "the effort cannot be set"),
    REFUSED("verbosity", C, "the length of replies cannot be steered by a field"),
    REFUSED("web_search_options", C, "nothing outside is reached"),
    REFUSED("stop_token_ids", B, "use stop with strings"),
    REFUSED("bad_words", B, "words cannot be excluded by request"),
    REFUSED("allowed_token_ids", B, "tokens cannot be restricted"),
    REFUSED("truncate_prompt_tokens", B, "a prompt is never cut in silence"),
    REFUSED("chat_template", C, "the template is part of the sealed package"),
    REFUSED("chat_template_kwargs", C, "the template is part of the sealed package"),
    REFUSED("documents", C, "put the texts into the messages"),
    REFUSED("structured_outputs", B, "replies cannot be constrained"),
    REFUSED("guided_json", B, "replies cannot be constrained"),
    REFUSED("guided_regex", B, "replies cannot be constrained"),
    REFUSED("guided_choice", B, "replies cannot be constrained"),
    REFUSED("guided_grammar", B, "replies cannot be constrained"),
    REFUSED("grammar", B, "replies cannot be constrained"),
    REFUSED("json_schema", B, "replies cannot be constrained"),
    REFUSED("length_penalty", B, "there is no beam search"),
    REFUSED("typical_p", B, "this sampler is not built in"),
    REFUSED("mirostat", B, "this sampler is not built in"),
    REFUSED("samplers", B, "the order of samplers is fixed"),
    REFUSED("cache_salt", B, "the salt follows from the key's owner"),
    REFUSED("priority", B, "priority does not follow from a request"),
    REFUSED("add_special_tokens", B, "the chat format decides"),
    REFUSED("id_slot", B, "slots are not chosen by clients"),
};
/* clang-format on */
const size_t cm_field_count = sizeof(cm_field_rows) / sizeof(cm_field_rows[0]);
