/* Fuzz target: a connection's bytes through head, body and request fields, as the gateway reads
 * them. The first byte says where they are cut; what is accepted must read back within bounds. */
#include <jansson.h>

#include "runtime/base/cursor.h"
#include "runtime/gateway/request.h"
#include "runtime/gateway/routes.h"
#include "tests/fuzz/seed.h"

#define HEAD_MAX   512 /* small: so that inputs reach them */
#define BODY_MAX   1024
#define RECORD_MAX 64

static const struct cm_request_limits limits = {
    .model = "m", .max_tokens_default = 16, .record_bytes_max = RECORD_MAX};

static const uint8_t *seed_make(size_t *ret_size)
{
    static const char json[] =
        "{\"model\":\"m\",\"messages\":[{\"role\":\"system\",\"content\":\"hello\"},{\"role\":"
        "\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\",\"text\":"
        "\"b\"}],"
        "\"name\":\"n\"}],\"temperature\":0.5,\"top_p\":0.9,\"top_k\":-1,\"min_p\":0,\"seed\":7,"
        "\"frequency_penalty\":0,\"presence_penalty\":0,\"repetition_penalty\":1,\"max_tokens\":9,"
        "\"max_completion_tokens\":9,\"min_tokens\":1,\"stop\":[\"x\"],\"stream\":true,"
        "\"stream_options\":{\"include_usage\":true,\"include_obfuscation\":false,"
        "\"continuous_usage_stats\":null},\"ignore_eos\":true,\"n\":1,\"logprobs\":false,"
        "\"skip_special_tokens\":true,\"response_format\":{\"type\":\"text\"},\"modalities\":"
        "[\"text\"],\"tool_choice\":\"none\",\"user\":\"u\",\"tools\":null}";
    static char seed[2048];
    *ret_size = (size_t)snprintf(
        seed, sizeof(seed),
        "\x10POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: a:1\r\nContent-Type: "
        "application/json\r\n"
        "Authorization: Bearer cm-0\r\nX-Request-ID: r-1\r\nConnection: keep-alive, close\r\n"
        "Expect: 100-continue\r\nContent-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n"
        "%x\r\n%.100s\r\n%zX\r\n%s\r\n0\r\n\r\n",
        100u, json, sizeof(json) - 101, json + 100);
    return (const uint8_t *)seed;
}

static void check(bool condition)
{
    if (!condition) {
        abort();
    }
}

static void fields_read(const void *body, size_t size, enum cm_endpoint endpoint)
{
    struct cm_request request;
    struct cm_api_error error;
    uint8_t *bytes = NULL;
    size_t encoded = 0;
    if (cm_request_parse(endpoint, body, size, &limits, &request, &error) != CM_OK) {
        check(error.status >= 400 && error.message[0] != '\0');
        return;
    }
    if (cm_request_encode(&request, RECORD_MAX, &bytes, &encoded, &error) == CM_OK) {
        struct cm_cursor cursor = cm_cursor_init(bytes, encoded);
        for (uint32_t i = 0; i < request.wire.stop_count + request.wire.part_count; i++) {
            cm_cursor_skip(&cursor, i < request.wire.stop_count ? 0 : sizeof(uint32_t));
            cm_cursor_skip(&cursor, cm_cursor_u32(&cursor));
        }
        check(cm_cursor_ok(&cursor) && cm_cursor_left(&cursor) == 0);
        free(bytes);
    }
    cm_request_free(&request);
}

/* The size of a chunked body, or -1 if it is refused or not whole. */
static long chunks_read(const uint8_t *bytes, size_t size, size_t cut, uint8_t *ret_body)
{
    struct cm_http_chunks chunks;
    enum cm_http_chunk result = CM_HTTP_CHUNK_MORE;
    const size_t ends[] = {cut < size ? cut : size, size};
    size_t from = 0;
    size_t used = 0;
    cm_http_chunks_init(&chunks, BODY_MAX);
    for (size_t i = 0; i < 2 && result == CM_HTTP_CHUNK_MORE; i++) {
        struct cm_cursor cursor = cm_cursor_init(bytes + from, ends[i] - from);
        do {
            const uint8_t *data = NULL;
            size_t data_bytes = 0;
            result = cm_http_chunks_next(&chunks, &cursor, &data, &data_bytes);
            check(data_bytes <= BODY_MAX - used);
            if (data_bytes > 0) {
                memcpy(ret_body + used, data, data_bytes);
            }
            used += data_bytes;
        } while (result == CM_HTTP_CHUNK_DATA);
        from += cursor.offset;
    }
    return result == CM_HTTP_CHUNK_END ? (long)used : -1;
}

static void head_check(const struct cm_http_head *head)
{
    const struct cm_route *route = NULL;
    struct cm_span parameter;
    const char *allow = NULL;
    char decoded[64];
    check(!head->chunked || !head->has_length);
    check(head->path.size > 0 && head->path.at[0] == '/');
    if (cm_route_find(head->method, head->path, &route, &parameter, &allow) == 200) {
        (void)cm_http_percent_decode(parameter, decoded, sizeof(decoded));
    }
}

static void request_read(const uint8_t *bytes, size_t size, size_t cut)
{
    static uint8_t body[BODY_MAX];
    struct cm_http_refusal refusal = {0, NULL};
    struct cm_http_head head;
    size_t scanned = 0;
    long end = cm_http_head_end(bytes, cut < size ? cut : size, HEAD_MAX, &scanned, &refusal);
    if (end == 0) {
        end = cm_http_head_end(bytes, size, HEAD_MAX, &scanned, &refusal);
    }
    if (end <= 0 || cm_http_head_parse(bytes, (size_t)end, &head, &refusal) != CM_OK) {
        check(end == 0 || (refusal.status >= 400 && refusal.message != NULL));
        return;
    }
    head_check(&head);
    size_t there = size - (size_t)end;
    enum cm_endpoint endpoint =
        cm_span_is(head.path, "/v1/completions") ? CM_ENDPOINT_TEXT : CM_ENDPOINT_CHAT;
    if (head.chunked) {
        long body_bytes = chunks_read(bytes + end, there, cut, body);
        if (body_bytes >= 0) {
            fields_read(body, (size_t)body_bytes, endpoint);
        }
    } else if (head.content_length <= there) {
        fields_read(bytes + end, (size_t)head.content_length, endpoint);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    json_object_seed(1); /* the same input, the same way */
    if (size > 0) {
        request_read(data + 1, size - 1, data[0]);
        fields_read(data, size, (data[0] & 1) != 0 ? CM_ENDPOINT_TEXT : CM_ENDPOINT_CHAT);
    }
    return 0;
}
