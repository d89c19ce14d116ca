/* The way of a request through the gateway: head → route → credential → limits → body → handler.
 * One direction; each refusal ends the exchange with one reply. */
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "runtime/base/hex.h"
#include "runtime/gateway/gateway_internal.h"
#include "runtime/gateway/text.h"

#define LOG_LINES_PER_SECOND 200

void exchange_reset(struct connection *connection)
{
    connection->scanned = 0;
    connection->route = NULL;
    connection->key = NULL;
    connection->key_name[0] = '\0';
    connection->parameter[0] = '\0';
    connection->request_id[0] = '\0';
    connection->head_only = false;
    connection->chunked_in = false;
    connection->chunked_out = false;
    connection->body_left = 0;
    if (connection->body != NULL) {
        evbuffer_drain(connection->body, evbuffer_get_length(connection->body));
    }
}

/* A client's id goes into our log and back to it: only harmless bytes, else we make one. */
static void request_id_set(struct connection *connection, struct cm_span given)
{
    static const char safe[] =
        "-_.:/+=ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    bool sound = given.size > 0 && given.size < REQUEST_ID_BYTES;
    for (size_t i = 0; i < given.size && sound; i++) {
        sound = given.at[i] != '\0' && strchr(safe, given.at[i]) != NULL;
    }
    if (sound) {
        memcpy(connection->request_id, given.at, given.size);
        connection->request_id[given.size] = '\0';
        return;
    }
    uint8_t random[12] = {0};
    ssize_t got = getrandom(random, sizeof(random), 0);
    (void)got;
    int used = snprintf(connection->request_id, REQUEST_ID_BYTES, "req-");
    cm_hex_write(random, sizeof(random), connection->request_id + used);
}

/* A flood of refusals must not become a flood of lines. */
static bool log_permitted(struct gateway *gateway)
{
    uint64_t second = clock_ms() / 1000;
    if (second != gateway->log_second) {
        if (gateway->log_suppressed > 0) {
            CM_LOG(&gateway->log, CM_LOG_WARN, "log_lines_suppressed",
                   CM_LOG_I("count", gateway->log_suppressed));
        }
        gateway->log_second = second;
        gateway->log_lines = 0;
        gateway->log_suppressed = 0;
    }
    if (gateway->log_lines++ < LOG_LINES_PER_SECOND) {
        return true;
    }
    gateway->log_suppressed++;
    return false;
}

/* Count and log an exchange; called exactly once for each. No text of prompt or reply, ever. */
void exchange_finish(struct connection *connection, int status, enum cm_end end)
{
    struct gateway *gateway = connection->gateway;
    const struct flight *flight = connection->flight;
    const struct cm_route *route = connection->route;
    double duration_ms = (double)(clock_us() - connection->started_us) / 1000.0;
    cm_metrics_response(&gateway->metrics, route, status);
    if (flight != NULL) {
        gateway->metrics.ends[end]++;
        cm_metrics_duration(&gateway->metrics, duration_ms / 1000.0);
    }
    if ((route != NULL && !route->logged) || !log_permitted(gateway)) {
        return;
    }
    const char *name = route != NULL ? route->path : "none";
    if (flight == NULL) {
        CM_LOG(&gateway->log, CM_LOG_INFO, "request",
               CM_LOG_S("request_id", connection->request_id), CM_LOG_S("route", name),
               CM_LOG_I("status", status), CM_LOG_F("duration_ms", duration_ms),
               CM_LOG_S("key", connection->key_name));
        return;
    }
    double first_ms =
        flight->first_us != 0 ? (double)(flight->first_us - flight->started_us) / 1000.0 : -1.0;
    CM_LOG(&gateway->log, CM_LOG_INFO, "request", CM_LOG_S("request_id", connection->request_id),
           CM_LOG_S("route", name), CM_LOG_I("status", status),
           CM_LOG_F("duration_ms", duration_ms), CM_LOG_S("key", connection->key_name),
           CM_LOG_S("end", cm_end_name(end)), CM_LOG_I("stream", flight->stream),
           CM_LOG_F("first_token_ms", first_ms),
           CM_LOG_I("prompt_tokens", flight->usage.prompt_tokens),
           CM_LOG_I("completion_tokens", flight->completion_tokens));
}

void exchange_verdict(struct connection *connection, const struct cm_wire_verdict *verdict)
{
    struct gateway *gateway = connection->gateway;
    if (log_permitted(gateway)) {
        CM_LOG(&gateway->log, CM_LOG_INFO, "verdict",
               CM_LOG_S("request_id", connection->request_id), CM_LOG_S("rule", verdict->rule),
               CM_LOG_S("category", verdict->category),
               CM_LOG_S("action", cm_verdict_action_name(verdict->action)),
               CM_LOG_S("stage", cm_verdict_stage_name(verdict->stage)),
               CM_LOG_I("message", verdict->part), CM_LOG_I("offset", verdict->offset),
               CM_LOG_I("bytes", verdict->bytes));
    }
}

static void refuse(struct connection *connection, int status, const char *code, const char *message)
{
    struct cm_api_error error;
    cm_api_error_set(&error, status, code, "%s", message);
    reply_error(connection, &error, NULL);
}

void exchange_refuse_head(struct connection *connection, int status, const char *code,
                          const char *message)
{
    connection->close_after = true; /* nobody knows where the next request would begin */
    connection->started_us = clock_us();
    request_id_set(connection, (struct cm_span){"", 0});
    refuse(connection, status, code, message);
}

/* ------------------------------------------------------------------ body */

static void body_complete(struct connection *connection)
{
    connection->state = CONNECTION_WAIT;
    flight_submit(connection->flight, connection->body);
}

/* Copied: to move would take the input's chains along, each of the size of a read, and a body that
 * comes one byte to a record would hold 32 KiB for each of its bytes. */
static void body_add(struct connection *connection, const uint8_t *bytes, size_t size)
{
    CM_ASSERT(size == 0 || evbuffer_add(connection->body, bytes, size) == 0);
}

/* With Content-Length. */
static void body_plain(struct connection *connection, struct evbuffer *input)
{
    size_t there = evbuffer_get_length(input);
    size_t bytes = there < connection->body_left ? there : (size_t)connection->body_left;
    body_add(connection, bytes > 0 ? evbuffer_pullup(input, (ev_ssize_t)bytes) : NULL, bytes);
    evbuffer_drain(input, bytes);
    connection->body_left -= bytes;
    if (connection->body_left == 0) {
        body_complete(connection);
    }
}

static void body_chunked(struct connection *connection, struct evbuffer *input)
{
    size_t there = evbuffer_get_length(input);
    const uint8_t *bytes = there > 0 ? evbuffer_pullup(input, -1) : NULL;
    struct cm_cursor cursor = cm_cursor_init(bytes, there);
    enum cm_http_chunk result = CM_HTTP_CHUNK_DATA;
    while (result == CM_HTTP_CHUNK_DATA) {
        const uint8_t *data = NULL;
        size_t size = 0;
        result = cm_http_chunks_next(&connection->chunks, &cursor, &data, &size);
        if (result == CM_HTTP_CHUNK_DATA) {
            body_add(connection, data, size);
        }
    }
    evbuffer_drain(input, cursor.offset);
    if (result == CM_HTTP_CHUNK_END) {
        body_complete(connection);
    } else if (result == CM_HTTP_CHUNK_BAD) {
        connection->close_after = true;
        refuse(connection, 400, "bad_request", "Malformed chunked body.");
    } else if (result == CM_HTTP_CHUNK_LARGE) {
        connection->close_after = true;
        refuse(connection, 413, "request_too_large",
               "The body is larger than this server accepts.");
    }
}

static void body_input(struct connection *connection)
{
    struct evbuffer *input = bufferevent_get_input(connection->tls);
    if (connection->chunked_in) {
        body_chunked(connection, input);
    } else {
        body_plain(connection, input);
    }
}

/* ------------------------------------------------------------------ head */

static bool media_is_json(struct cm_span type)
{
    const char *end = memchr(type.at, ';', type.size);
    struct cm_span media = {type.at, end != NULL ? (size_t)(end - type.at) : type.size};
    while (media.size > 0 &&
           (media.at[media.size - 1] == ' ' || media.at[media.size - 1] == '\t')) {
        media.size--;
    }
    return cm_span_is_nocase(media, "application/json");
}

/* True: a body may come. Else the reply is on its way. */
static bool body_permitted(struct connection *connection, const struct cm_http_head *head)
{
    uint32_t bytes_max = connection->gateway->config.body_bytes_max;
    if (!head->has_length && !head->chunked) {
        refuse(connection, 411, "length_required", "A body is required.");
    } else if (head->content_length > bytes_max) {
        refuse(connection, 413, "request_too_large",
               "The body is larger than this server accepts.");
    } else if (head->content_type.size == 0 || !media_is_json(head->content_type)) {
        refuse(connection, 415, "unsupported_media_type", "Content-Type must be application/json.");
    } else {
        return true;
    }
    return false;
}

static void body_begin(struct connection *connection, const struct cm_http_head *head)
{
    struct gateway *gateway = connection->gateway;
    struct cm_api_error error;
    if (!body_permitted(connection, head)) {
        return;
    }
    if (!flight_admit(connection, &error)) {
        reply_error(connection, &error, NULL);
        return;
    }
    if (connection->body == NULL) {
        connection->body = evbuffer_new();
        CM_ASSERT(connection->body != NULL);
    }
    connection->flight =
        flight_new(connection, connection->route->handler == CM_HANDLER_CHAT ? CM_ENDPOINT_CHAT
                                                                             : CM_ENDPOINT_TEXT);
    connection->chunked_in = head->chunked;
    connection->body_left = head->content_length;
    cm_http_chunks_init(&connection->chunks, gateway->config.body_bytes_max);
    connection->close_after = !head->keep_alive;
    connection->state = CONNECTION_BODY;
    connection->deadline_ms = clock_ms() + gateway->config.body_timeout_ms;
    if (head->expect_continue) {
        reply_continue(connection);
    }
}

/* False: refused, the reply is on its way. */
static bool credential_check(struct connection *connection, const struct cm_http_head *head)
{
    struct gateway *gateway = connection->gateway;
    struct cm_api_error error;
    enum cm_admission admission =
        cm_keys_admit(&gateway->keys, connection->route, gateway->config.unauthenticated_metrics,
                      head->authorization, (uint64_t)time(NULL), &connection->key);
    switch (admission) {
    case CM_ADMITTED:
        break;
    case CM_UNAUTHORISED:
        gateway->metrics.key_refusals++;
        refuse(connection, 401, "invalid_api_key", "A valid API key is required.");
        return false;
    case CM_KEYS_MISSING:
        cm_api_error_set(&error, 503, "keys_missing", "The table of API keys is not loaded yet.");
        error.retry_after_s = RETRY_QUEUE_S;
        reply_error(connection, &error, NULL);
        return false;
    }
    if (connection->key != NULL) {
        memcpy(connection->key_name, connection->key->name, sizeof(connection->key_name));
        memcpy(connection->key_id, connection->key->id, sizeof(connection->key_id));
    }
    return true;
}

static void route_refuse(struct connection *connection, int status, const char *allow)
{
    struct cm_api_error error;
    if (status == 405) {
        cm_api_error_set(&error, 405, "method_not_allowed", "Only %s is allowed here.", allow);
    } else {
        cm_api_error_set(&error, 404, "not_found", "There is no such path.");
    }
    reply_error(connection, &error, allow);
}

static void head_handle(struct connection *connection, const struct cm_http_head *head)
{
    struct cm_span parameter;
    const char *allow = NULL;
    request_id_set(connection, head->request_id);
    connection->head_only = cm_span_is(head->method, "HEAD");
    bool body = head->chunked || head->content_length > 0;
    /* Until a body is read whole, a reply ends the connection: its rest is not a request. */
    connection->close_after = !head->keep_alive || body;
    int status = cm_route_find(head->method, head->path, &connection->route, &parameter, &allow);
    if (status != 200) {
        route_refuse(connection, status, allow);
        return;
    }
    if (!credential_check(connection, head)) {
        return;
    }
    if (connection->route->body) {
        body_begin(connection, head);
        return;
    }
    if (body) {
        refuse(connection, 413, "request_too_large", "This path takes no body.");
        return;
    }
    if (!cm_http_percent_decode(parameter, connection->parameter, sizeof(connection->parameter))) {
        refuse(connection, 404, "model_not_found", "There is no such model.");
        return;
    }
    if (connection->route->handler == CM_HANDLER_ATTESTATION) {
        attestation_begin(connection, head->query);
        return;
    }
    probe_answer(connection);
}

/* True: go on with what follows. */
static bool head_input(struct connection *connection)
{
    struct evbuffer *input = bufferevent_get_input(connection->tls);
    struct cm_http_refusal refusal = {400, ""};
    struct cm_http_head head;
    size_t there = evbuffer_get_length(input);
    if (there == 0) {
        return false;
    }
    const uint8_t *bytes = evbuffer_pullup(input, -1);
    long size = cm_http_head_end(bytes, there, connection->gateway->config.header_bytes_max,
                                 &connection->scanned, &refusal);
    if (size == 0) {
        return false;
    }
    if (size < 0 || cm_http_head_parse(bytes, (size_t)size, &head, &refusal) != CM_OK) {
        exchange_refuse_head(connection, refusal.status, "bad_request", refusal.message);
        return false;
    }
    connection->started_us = clock_us();
    head_handle(connection, &head);
    if (!connection->dead) {
        evbuffer_drain(input, (size_t)size); /* the head's spans die here */
    }
    return true;
}

void exchange_input(struct connection *connection)
{
    if (connection->state == CONNECTION_HEAD && !head_input(connection)) {
        return;
    }
    if (!connection->dead && connection->state == CONNECTION_BODY) {
        body_input(connection);
    }
}
