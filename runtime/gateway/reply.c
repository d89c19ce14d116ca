/* The only writer of HTTP replies. */
#include <time.h>

#include "runtime/gateway/gateway_internal.h"
#include "runtime/gateway/text.h"

static void head_write(struct connection *connection, const struct reply *reply)
{
    struct evbuffer *out = connection_output(connection);
    char date[40];
    time_t now = time(NULL);
    struct tm day;
    gmtime_r(&now, &day);
    /* IMF-fixdate; the process never sets a locale, so the names are English. */
    strftime(date, sizeof(date), "%a, %d %b %Y %H:%M:%S GMT", &day);
    cm_text_format(out,
                   "HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: %s\r\nCache-Control: no-store\r\n"
                   "X-Content-Type-Options: nosniff\r\n",
                   reply->status, cm_http_reason(reply->status), date,
                   reply->content_type != NULL ? reply->content_type : "application/json");
    if (connection->request_id[0] != '\0') {
        cm_text_format(out, "X-Request-ID: %s\r\n", connection->request_id);
    }
    if (reply->allow != NULL) {
        cm_text_format(out, "Allow: %s\r\n", reply->allow);
    }
    if (reply->status == 401) {
        cm_text_put(out, "WWW-Authenticate: Bearer\r\n");
    }
    if (reply->retry_after_s > 0) {
        cm_text_format(out, "Retry-After: %u\r\n", reply->retry_after_s);
    }
    if (reply->no_retry) {
        cm_text_put(out, "x-should-retry: false\r\n");
    }
    if (connection->gateway->draining) {
        connection->close_after = true;
    }
    if (connection->close_after) {
        cm_text_put(out, "Connection: close\r\n");
    }
}

/* Takes the bytes out of `body`. */
void reply_send(struct connection *connection, const struct reply *reply, struct evbuffer *body)
{
    struct evbuffer *out = connection_output(connection);
    head_write(connection, reply);
    cm_text_format(out, "Content-Length: %zu\r\n\r\n", evbuffer_get_length(body));
    if (!connection->head_only) {
        CM_ASSERT(evbuffer_add_buffer(out, body) == 0);
    }
    connection_replied(connection);
}

void reply_error_send(struct connection *connection, const struct cm_api_error *error,
                      const char *allow)
{
    const struct reply reply = {.status = error->status,
                                .allow = allow,
                                .retry_after_s = error->retry_after_s,
                                .no_retry = error->no_retry};
    struct evbuffer *body = evbuffer_new();
    CM_ASSERT(body != NULL);
    cm_api_error_write(error, body);
    reply_send(connection, &reply, body);
    evbuffer_free(body);
}

void reply_error(struct connection *connection, const struct cm_api_error *error, const char *allow)
{
    struct flight *flight = connection->flight;
    exchange_finish(connection, error->status, CM_END_REQUEST);
    if (flight != NULL) { /* its body was refused or never came: the worker knows nothing of it */
        connection->flight = NULL;
        flight->connection = NULL;
        flight_free(flight);
    }
    reply_error_send(connection, error, allow);
}

void reply_continue(struct connection *connection)
{
    cm_text_put(connection_output(connection), "HTTP/1.1 100 Continue\r\n\r\n");
}

void reply_stream_begin(struct connection *connection)
{
    const struct reply reply = {.status = 200, .content_type = "text/event-stream; charset=utf-8"};
    head_write(connection, &reply);
    cm_text_put(connection_output(connection),
                "X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n");
    connection->chunked_out = true;
}

/* One event, one chunk. Takes the bytes out of `event`. */
void reply_stream_event(struct connection *connection, struct evbuffer *event)
{
    struct evbuffer *out = connection_output(connection);
    cm_text_format(out, "%zx\r\n", evbuffer_get_length(event));
    CM_ASSERT(evbuffer_add_buffer(out, event) == 0);
    cm_text_put(out, "\r\n");
    if (evbuffer_get_length(out) > OUTPUT_BYTES_MAX) {
        connection_close(connection, CM_END_SLOW);
    }
}

void reply_stream_end(struct connection *connection)
{
    cm_text_put(connection_output(connection), "0\r\n\r\n");
    connection->chunked_out = false;
    connection_replied(connection);
}
