/* The JSON of replies, as the OpenAI SDKs read it. */
#include <inttypes.h>

#include "runtime/gateway/gateway_internal.h"
#include "runtime/gateway/text.h"

#define FINGERPRINT_DIGITS 12

static void common(const struct flight *flight, const char *object, struct evbuffer *out)
{
    const struct cm_wire_hello *hello = &flight->gateway->link.hello;
    cm_text_format(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%" PRIu64 ",\"model\":",
                   flight->reply_id, object, flight->created_unix_s);
    cm_json_text(out, flight->model);
    /* Of the sealed package: the same weights and chat format have the same fingerprint. */
    cm_text_format(out, ",\"system_fingerprint\":\"fp_%.*s\",\"choices\":", FINGERPRINT_DIGITS,
                   hello->package_digest);
}

static void usage(const struct flight *flight, uint32_t prompt_tokens, uint32_t completion_tokens,
                  struct evbuffer *out)
{
    cm_text_format(out,
                   "{\"prompt_tokens\":%u,\"completion_tokens\":%u,\"total_tokens\":%" PRIu64
                   ",\"prompt_tokens_details\":{\"cached_tokens\":%u}}",
                   prompt_tokens, completion_tokens,
                   (uint64_t)prompt_tokens + (uint64_t)completion_tokens,
                   flight->usage.cached_tokens);
}

/* The tail of a chunk: running usage if asked for; null, as the specification has it, where usage
 * comes in a chunk of its own. */
static void chunk_end(const struct flight *flight, struct evbuffer *out)
{
    if (flight->continuous_usage) {
        cm_text_put(out, ",\"usage\":");
        usage(flight, flight->usage.prompt_tokens, flight->completion_tokens, out);
    } else if (flight->include_usage) {
        cm_text_put(out, ",\"usage\":null");
    }
    cm_text_put(out, "}\n\n");
}

/* What the guard found: where it was asked for, or where there is something to say. */
static void moderation(const struct flight *flight, struct evbuffer *out)
{
    if (flight->moderated || flight->moderation.total > 0) {
        cm_text_put(out, ",\"moderation\":");
        cm_moderation_write(&flight->moderation, out);
    }
}

static const char *chunk_object(const struct flight *flight)
{
    return flight->endpoint == CM_ENDPOINT_CHAT ? "chat.completion.chunk" : "text_completion";
}

void completion_role(const struct flight *flight, struct evbuffer *out)
{
    cm_text_put(out, "data: ");
    common(flight, chunk_object(flight), out);
    cm_text_put(out, "[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
                     "\"logprobs\":null,\"finish_reason\":null}]");
    chunk_end(flight, out);
}

void completion_text(const struct flight *flight, const uint8_t *text, size_t bytes,
                     struct evbuffer *out)
{
    bool chat = flight->endpoint == CM_ENDPOINT_CHAT;
    cm_text_put(out, "data: ");
    common(flight, chunk_object(flight), out);
    cm_text_put(out, chat ? "[{\"index\":0,\"delta\":{\"content\":" : "[{\"index\":0,\"text\":");
    cm_json_string(out, text, bytes);
    cm_text_format(out, "%s,\"logprobs\":null,\"finish_reason\":null}]", chat ? "}" : "");
    chunk_end(flight, out);
}

static const char *finish_reason(uint32_t finish)
{
    switch ((enum cm_finish)finish) {
    case CM_FINISH_LENGTH:
        return "length";
    case CM_FINISH_FILTER:
        return "content_filter";
    case CM_FINISH_NONE:
    case CM_FINISH_STOP:
    case CM_FINISH_CANCELLED:
    case CM_FINISH_FAILED:
        break;
    }
    return "stop";
}

void completion_end(const struct flight *flight, const struct cm_wire_done *done,
                    struct evbuffer *out)
{
    bool chat = flight->endpoint == CM_ENDPOINT_CHAT;
    cm_text_put(out, "data: ");
    common(flight, chunk_object(flight), out);
    cm_text_format(out, "[{\"index\":0,%s,\"logprobs\":null,\"finish_reason\":\"%s\"}]",
                   chat ? "\"delta\":{}" : "\"text\":\"\"", finish_reason(done->finish));
    moderation(flight, out);
    chunk_end(flight, out);
    if (flight->include_usage) {
        cm_text_put(out, "data: ");
        common(flight, chunk_object(flight), out);
        cm_text_put(out, "[],\"usage\":");
        usage(flight, done->prompt_tokens, done->completion_tokens, out);
        cm_text_put(out, "}\n\n");
    }
    cm_text_put(out, "data: [DONE]\n\n");
}

void completion_whole(const struct flight *flight, const struct cm_wire_done *done,
                      struct evbuffer *out)
{
    bool chat = flight->endpoint == CM_ENDPOINT_CHAT;
    size_t bytes = flight->text != NULL ? evbuffer_get_length(flight->text) : 0;
    const void *text = bytes > 0 ? evbuffer_pullup(flight->text, -1) : (const void *)"";
    common(flight, chat ? "chat.completion" : "text_completion", out);
    cm_text_put(out, chat ? "[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
                          : "[{\"index\":0,\"text\":");
    cm_json_string(out, text, bytes);
    cm_text_format(out, "%s,\"logprobs\":null,\"finish_reason\":\"%s\"}],\"usage\":",
                   chat ? ",\"refusal\":null}" : "", finish_reason(done->finish));
    usage(flight, done->prompt_tokens, done->completion_tokens, out);
    moderation(flight, out);
    cm_text_put(out, "}");
}
