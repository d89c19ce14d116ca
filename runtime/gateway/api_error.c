/* Error objects. */
#include "runtime/gateway/api_error.h"

#include <stdarg.h>
#include <stdio.h>

#include "runtime/gateway/moderation.h"
#include "runtime/gateway/text.h"

static const struct {
    int status;
    const char *reason;
    const char *type;
} rows[] = {
    {200, "OK", ""},
    {400, "Bad Request", "invalid_request_error"},
    {401, "Unauthorized", "authentication_error"},
    {404, "Not Found", "invalid_request_error"},
    {405, "Method Not Allowed", "invalid_request_error"},
    {408, "Request Timeout", "invalid_request_error"},
    {409, "Conflict", "invalid_request_error"},
    {411, "Length Required", "invalid_request_error"},
    {413, "Content Too Large", "invalid_request_error"},
    {415, "Unsupported Media Type", "invalid_request_error"},
    {417, "Expectation Failed", "invalid_request_error"},
    {422, "Unprocessable Content", "invalid_request_error"},
    {429, "Too Many Requests", "rate_limit_error"},
    {431, "Request Header Fields Too Large", "invalid_request_error"},
    {500, "Internal Server Error", "server_error"},
    {501, "Not Implemented", "invalid_request_error"},
    {503, "Service Unavailable", "service_unavailable_error"},
    {504, "Gateway Timeout", "server_error"},
    {505, "HTTP Version Not Supported", "invalid_request_error"},
};

#define ROW_COUNT (sizeof(rows) / sizeof(rows[0]))

const char *cm_http_reason(int status)
{
    for (size_t i = 0; i < ROW_COUNT; i++) {
        if (rows[i].status == status) {
            return rows[i].reason;
        }
    }
    return "Error";
}

static void fill(struct cm_api_error *error, int status, const char *code, const char *param,
                 const char *format, va_list args)
{
    *error = (struct cm_api_error){.status = status, .type = "server_error", .code = code};
    for (size_t i = 0; i < ROW_COUNT; i++) {
        if (rows[i].status == status) {
            error->type = rows[i].type;
        }
    }
    vsnprintf(error->message, sizeof(error->message), format, args);
    snprintf(error->param, sizeof(error->param), "%s", param);
}

enum cm_status cm_api_error_set(struct cm_api_error *error, int status, const char *code,
                                const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fill(error, status, code, "", format, args);
    va_end(args);
    return CM_E_INPUT;
}

enum cm_status cm_api_error_field(struct cm_api_error *error, int status, const char *code,
                                  const char *param, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fill(error, status, code, param, format, args);
    va_end(args);
    return CM_E_INPUT;
}

static void text_or_null(struct evbuffer *out, const char *text)
{
    if (text == NULL || text[0] == '\0') {
        cm_text_put(out, "null");
    } else {
        cm_json_text(out, text);
    }
}

void cm_api_error_write(const struct cm_api_error *error, struct evbuffer *out)
{
    cm_text_put(out, "{\"error\":{\"message\":");
    cm_json_text(out, error->message);
    cm_text_put(out, ",\"type\":");
    cm_json_text(out, error->type);
    cm_text_put(out, ",\"param\":");
    text_or_null(out, error->param);
    cm_text_put(out, ",\"code\":");
    text_or_null(out, error->code);
    cm_text_put(out, "}");
    if (error->moderation != NULL) {
        cm_text_put(out, ",\"moderation\":");
        cm_moderation_write(error->moderation, out);
    }
    cm_text_put(out, "}");
}
