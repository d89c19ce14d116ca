/* docs/api.md, from the tables that the gateway serves by. */
#include <stdio.h>

#include "runtime/gateway/request.h"
#include "runtime/gateway/routes.h"

static const char *permission_name(enum cm_permission permission)
{
    switch (permission) {
    case CM_PERMISSION_OPEN:
        return "none";
    case CM_PERMISSION_KEY:
        return "API key";
    case CM_PERMISSION_METRICS:
        return "API key, unless `metrics_unauthenticated`";
    }
    return "";
}

static void routes_print(void)
{
    puts("## Paths\n\nWhat is not here is refused: another path with 404, another method with "
         "405.\n\n| method | path | credential | answers |\n|---|---|---|---|");
    for (size_t i = 0; i < CM_ROUTE_COUNT; i++) {
        const struct cm_route *route = &cm_routes[i];
        printf("| %s | `%s%s` | %s | %s |\n", route->method, route->path,
               route->handler == CM_HANDLER_MODEL ? "{id}" : "", permission_name(route->permission),
               route->purpose);
    }
}

static void fields_print(enum cm_endpoint endpoint, const char *title)
{
    static const char *const fates[] = {"applied", "ignored", "refused (400)"};
    printf("\n## Fields of %s\n\n| field | is | note |\n|---|---|---|\n", title);
    for (size_t fate = 0; fate < 3; fate++) {
        for (size_t i = 0; i < cm_field_count; i++) {
            const struct cm_field_row *row = &cm_field_rows[i];
            if ((size_t)row->fate == fate && (row->endpoints & (uint32_t)endpoint) != 0) {
                printf("| `%s` | %s | %s |\n", row->name, fates[fate], row->note);
            }
        }
    }
}

void cm_print_api(void)
{
    puts(
        "# The API\n\nPrinted by `casemate-gateway --print-api` from the tables it serves by.\n\n"
        "TLS 1.3 and HTTP/1.1. `Authorization: Bearer cm-…`; bodies are `application/json`, UTF-8, "
        "without repeated keys, at most 16 levels deep. `null` is the same as absent. A field that "
        "is not listed is refused with 400 and its name in `param`.\n");
    routes_print();
    fields_print(CM_ENDPOINT_CHAT, "POST /v1/chat/completions");
    fields_print(CM_ENDPOINT_TEXT, "POST /v1/completions");
    puts(
        "\n## Errors\n\n"
        "`{\"error\":{\"message\",\"type\",\"param\",\"code\"}}`, always. `Retry-After` stands "
        "where another try can help, `x-should-retry: false` where it cannot.\n\n"
        "| status | codes |\n|---|---|\n"
        "| 400 | `invalid_json` `invalid_type` `invalid_value` `missing_required_parameter` "
        "`unknown_parameter` `unsupported_parameter` `context_length_exceeded` `invalid_prompt` "
        "`empty_prompt` `bad_request` `content_filter` |\n"
        "| 401 | `invalid_api_key`: missing, wrong, expired and revoked are not told apart |\n"
        "| 404 | `not_found` `model_not_found` |\n| 405 | `method_not_allowed` |\n"
        "| 408 | `request_timeout` |\n"
        "| 409 | `model_loading` (Retry-After) `model_unloading` `model_refused`: an adapter |\n"
        "| 411 | `length_required` |\n| 413 | `request_too_large` |\n"
        "| 415 | `unsupported_media_type` |\n| 422 | `request_quarantined`: two workers died over "
        "this prompt |\n"
        "| 429 | `queue_full` `key_limit` |\n"
        "| 500 | `worker_failed` `reply_too_large` `internal_error` |\n"
        "| 503 | the reason code of `/readyz`: `loading` `worker_gone` `worker_silent` "
        "`worker_stalled` `worker_protocol` `keys_missing` `draining` … |\n"
        "| 504 | `generation_timeout` |\n\n"
        "A reply that has begun as a stream ends with `event: error` and the same object, without "
        "`[DONE]`, and the connection closes.\n\n"
        "## The guard\n\nRules of the guard read the messages of users and assistants, and replies "
        "as "
        "they are written. A prompt that a rule refuses gives 400 with code `content_filter`: the "
        "message "
        "names category and rule, `param` the message, never its text; nothing of a stream has "
        "begun. A "
        "reply that a rule ends has `finish_reason` `content_filter`; one that it redacts goes on. "
        "Wherever a rule matched, and wherever `moderation` asked for it, the reply (in a stream: "
        "the "
        "chunk with `finish_reason`; in an error: beside `error`) carries `moderation` in the "
        "shape of "
        "the OpenAI specification: `input` and `output`, each `moderation_results` of model "
        "`casemate-guard` with one result. `categories` holds what matched; each score is 1. The "
        "result's "
        "`verdicts` are this server's extension: rule, action (report, redact, refuse), message, "
        "offset "
        "and bytes of the span in the raw text.\n\n"
        "## HTTP\n\nRefused, because readers differ about them: folded header fields, bare LF or "
        "CR, repeated `Content-Length`, `Transfer-Encoding` beside `Content-Length`, chunk "
        "extensions, trailers, absolute targets, HTTP/1.0. One request may wait behind the one "
        "under way, not more. A client that closes its side ends its generation at once.");
}
