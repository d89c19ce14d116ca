/* A connection from accept to close: TLS or not, deadlines, bounded buffers, lingering close.
 *
 * Nothing here is freed where it is used: connection_close only buries, the reaper frees at the end
 * of the turn of the event loop. */
#include <errno.h>
#include <event2/bufferevent.h>
#include <netinet/in.h>
#include <openssl/err.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "runtime/gateway/gateway_internal.h"
#include "runtime/gateway/text.h"

#define READ_SLACK 16384

struct evbuffer *connection_output(struct connection *connection)
{
    return bufferevent_get_output(connection->tls);
}

void connection_close(struct connection *connection, enum cm_end why)
{
    struct gateway *gateway = connection->gateway;
    if (connection->dead) {
        return;
    }
    connection->dead = true;
    attestation_forget(connection);
    if (connection->flight != NULL) {
        exchange_finish(connection, 499, why);
        flight_detach(connection->flight, why);
    }
    if (connection->tls != NULL) {
        bufferevent_disable(connection->tls, EV_READ | EV_WRITE);
        bufferevent_setcb(connection->tls, NULL, NULL, NULL, NULL);
    }
    if (connection->raw != NULL) {
        event_del(connection->raw);
    }
    TAILQ_REMOVE(&gateway->connections, connection, entry);
    TAILQ_INSERT_TAIL(&gateway->graves, connection, entry);
    gateway->connection_count--;
    gateway_later(gateway);
}

void connection_reap(struct gateway *gateway)
{
    struct connection *connection;
    while ((connection = TAILQ_FIRST(&gateway->graves)) != NULL) {
        TAILQ_REMOVE(&gateway->graves, connection, entry);
        if (connection->raw != NULL) {
            event_free(connection->raw);
        }
        if (connection->tls != NULL) {
            bufferevent_free(connection->tls); /* and its socket */
        } else {
            close(connection->fd);
        }
        if (connection->body != NULL) {
            evbuffer_free(connection->body);
        }
        free(connection);
    }
}

/* All is written. Say so (close_notify, FIN), then let the peer finish sending: closing with unread
 * bytes would reset the connection and could destroy the reply on its way. */
static void linger(struct connection *connection)
{
    tls_goodbye(connection->tls);
    shutdown(connection->fd, SHUT_WR);
    connection->state = CONNECTION_LINGER;
    connection->deadline_ms = clock_ms() + LINGER_MS;
}

static void flushed(struct connection *connection)
{
    connection->served++;
    if (connection->close_after) {
        linger(connection);
        return;
    }
    exchange_reset(connection);
    connection->state = CONNECTION_HEAD;
    connection->deadline_ms = clock_ms() + connection->gateway->config.header_timeout_ms;
    exchange_input(connection);
}

void connection_replied(struct connection *connection)
{
    connection->state = CONNECTION_FLUSH;
    if (evbuffer_get_length(connection_output(connection)) == 0) {
        flushed(connection);
    }
}

static void on_write(struct bufferevent *tls, void *context)
{
    struct connection *connection = context;
    (void)tls;
    if (connection->state == CONNECTION_FLUSH &&
        evbuffer_get_length(connection_output(connection)) == 0) {
        flushed(connection);
    }
}

static void on_read(struct bufferevent *tls, void *context)
{
    struct connection *connection = context;
    struct evbuffer *input = bufferevent_get_input(tls);
    if (connection->state == CONNECTION_LINGER) {
        evbuffer_drain(input, evbuffer_get_length(input));
        return;
    }
    if (connection->state == CONNECTION_WAIT || connection->state == CONNECTION_FLUSH) {
        /* The next request may wait here; more than a head's worth is a flood. */
        if (!connection->close_after &&
            evbuffer_get_length(input) > connection->gateway->config.header_bytes_max) {
            connection_close(connection, CM_END_CLIENT);
        } else if (connection->close_after) {
            evbuffer_drain(input, evbuffer_get_length(input));
        }
        return;
    }
    exchange_input(connection);
}

static void on_event(struct bufferevent *tls, short what, void *context)
{
    struct connection *connection = context;
    (void)tls;
    if ((what & BEV_EVENT_CONNECTED) != 0) {
        connection->handshaken = true;
        return;
    }
    if (!connection->handshaken) {
        connection->gateway->metrics.tls_failures++;
    }
    ERR_clear_error();
    connection_close(connection, CM_END_CLIENT);
}

/* Progress of writing, for the write time-out: bytes that left, or the first that wait. */
static void on_output(struct evbuffer *output, const struct evbuffer_cb_info *info, void *context)
{
    struct connection *connection = context;
    (void)output;
    if (info->n_deleted > 0 || info->orig_size == 0) {
        connection->progress_ms = clock_ms();
    }
}

static void tls_begin(struct connection *connection)
{
    struct gateway *gateway = connection->gateway;
    event_free(connection->raw);
    connection->raw = NULL;
    connection->tls = tls_accept(connection);
    if (connection->tls == NULL) {
        connection_close(connection, CM_END_CLIENT);
        return;
    }
    bufferevent_setcb(connection->tls, on_read, on_write, on_event, connection);
    bufferevent_setwatermark(connection->tls, EV_READ, 0,
                             gateway->config.header_bytes_max + READ_SLACK);
    CM_ASSERT(evbuffer_add_cb(connection_output(connection), on_output, connection) != NULL);
    connection->state = CONNECTION_HEAD; /* the deadline runs on from accept */
    bufferevent_enable(connection->tls, EV_READ | EV_WRITE);
}

static void plain_refuse(struct connection *connection)
{
    static const char reply[] = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n"
                                "Content-Length: 42\r\nConnection: close\r\n\r\n"
                                "This port speaks TLS only: use https://.\r\n";
    connection->gateway->metrics.plain_http++;
    ssize_t sent = write(connection->fd, reply, sizeof(reply) - 1); /* nonblocking */
    (void)sent; /* best effort: a fresh socket has room */
    shutdown(connection->fd, SHUT_WR);
    connection->state = CONNECTION_LINGER;
    connection->deadline_ms = clock_ms() + LINGER_MS;
}

static void on_raw(evutil_socket_t fd, short what, void *context)
{
    struct connection *connection = context;
    uint8_t bytes[4096];
    (void)what;
    bool lingering = connection->state == CONNECTION_LINGER;
    ssize_t got = lingering ? read(fd, bytes, sizeof(bytes)) : recv(fd, bytes, 1, MSG_PEEK);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (got <= 0) {
        connection_close(connection, CM_END_CLIENT);
    } else if (lingering) {
        return; /* discarded */
    } else if (tls_begins(bytes[0])) {
        tls_begin(connection);
    } else if (bytes[0] >= 'A' && bytes[0] <= 'Z') {
        plain_refuse(connection);
    } else {
        connection->gateway->metrics.tls_failures++;
        connection_close(connection, CM_END_CLIENT);
    }
}

/* At the cap the connection that has been without a whole head for longest gives way, idle, silent
 * or slow: who holds sockets alone cannot keep out who sends requests. While each has a request, a
 * new one is refused. */
static bool room_make(struct gateway *gateway)
{
    struct connection *longest = NULL;
    struct connection *at;
    if (gateway->connection_count < gateway->config.connections_max) {
        return true;
    }
    TAILQ_FOREACH(at, &gateway->connections, entry)
    {
        if ((at->state == CONNECTION_PEEK || at->state == CONNECTION_HEAD) &&
            (longest == NULL || at->deadline_ms < longest->deadline_ms)) {
            longest = at;
        }
    }
    if (longest != NULL) {
        connection_close(longest, CM_END_CLIENT);
    }
    return longest != NULL;
}

static void connection_refuse(struct gateway *gateway, int fd, struct event *raw,
                              struct connection *connection)
{
    gateway->metrics.connections_refused++;
    if (raw != NULL) {
        event_free(raw);
    }
    free(connection);
    close(fd);
}

void connection_new(struct gateway *gateway, int fd)
{
    gateway->metrics.connections++;
    if (!room_make(gateway)) {
        connection_refuse(gateway, fd, NULL, NULL);
        return;
    }
    struct connection *connection = calloc(1, sizeof(*connection));
    struct event *raw = connection != NULL
                            ? event_new(gateway->base, fd, EV_READ | EV_PERSIST, on_raw, connection)
                            : NULL;
    if (raw == NULL || event_add(raw, NULL) != 0) { /* no memory for one more */
        connection_refuse(gateway, fd, raw, connection);
        return;
    }
    connection->gateway = gateway;
    connection->fd = fd;
    connection->raw = raw;
    connection->state = CONNECTION_PEEK;
    connection->deadline_ms = clock_ms() + gateway->config.header_timeout_ms;
    TAILQ_INSERT_TAIL(&gateway->connections, connection, entry);
    gateway->connection_count++;
}

static void head_late(struct connection *connection)
{
    if (!connection->handshaken ||
        evbuffer_get_length(bufferevent_get_input(connection->tls)) == 0) {
        connection_close(connection, CM_END_CLIENT); /* idle: nobody waits for an answer */
        return;
    }
    exchange_refuse_head(connection, 408, "request_timeout",
                         "The head of the request came too slowly.");
}

static void body_late(struct connection *connection)
{
    struct cm_api_error error;
    connection->close_after = true;
    cm_api_error_set(&error, 408, "request_timeout", "The body of the request came too slowly.");
    reply_error(connection, &error, NULL);
}

static void output_tick(struct connection *connection, uint64_t now_ms)
{
    struct flight *flight = connection->flight;
    size_t waiting = evbuffer_get_length(connection_output(connection));
    if (waiting > 0 &&
        now_ms > connection->progress_ms + connection->gateway->config.write_timeout_ms) {
        connection_close(connection, CM_END_SLOW);
        return;
    }
    if (connection->chunked_out && waiting == 0 && flight != NULL &&
        now_ms > flight->pinged_ms + PING_MS && now_ms > connection->progress_ms + PING_MS) {
        /* An SSE comment: keeps proxies from closing a stream that only waits. */
        cm_text_put(connection_output(connection), "8\r\n: ping\n\n\r\n");
        flight->pinged_ms = now_ms;
    }
}

void connection_tick(struct connection *connection, uint64_t now_ms)
{
    bool late = now_ms > connection->deadline_ms;
    switch (connection->state) {
    case CONNECTION_PEEK:
    case CONNECTION_LINGER:
        if (late) {
            connection_close(connection, CM_END_CLIENT);
        }
        return;
    case CONNECTION_HEAD:
        if (late) {
            head_late(connection);
        }
        return;
    case CONNECTION_BODY:
        if (late) {
            body_late(connection);
        }
        return;
    case CONNECTION_WAIT:
    case CONNECTION_FLUSH:
        output_tick(connection, now_ms);
        return;
    }
}
