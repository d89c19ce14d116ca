/* The rings to and from the worker.
 *
 * The worker is treated as hostile: each record's type, size, order and text is checked. One that
 * breaks the rules is not listened to again; the requests under way end, readiness falls with
 * `worker_protocol`, and everything waits for the supervisor to bring fresh rings. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/gateway/gateway_internal.h"
#include "runtime/gateway/text.h"

#define RECORDS_PER_TURN 512 /* then connections have their turn */

void link_close(struct gateway *gateway)
{
    struct worker_link *link = &gateway->link;
    if (link->readable != NULL) {
        event_free(link->readable);
    }
    if (link->open) {
        cm_ring_close(&link->requests);
        cm_ring_close(&link->responses);
        close(link->request_event_fd);
        close(link->response_event_fd);
    }
    free(link->payload);
    *link = (struct worker_link){.request_event_fd = -1, .response_event_fd = -1};
}

static void link_break(struct gateway *gateway, const char *why)
{
    struct worker_link *link = &gateway->link;
    struct cm_error err;
    cm_error_set(&err, CM_E_INPUT, "CM-GW-WORKER", "the worker broke the wire protocol: %s", why);
    cm_log_error(&gateway->log, "worker_protocol", &err);
    gateway->metrics.worker_violations++;
    link->broken = true;
    link->hello_seen = false;
    event_del(link->readable);
    control_broken(gateway);
    flights_blame(gateway);
    flights_fail_all(gateway);
}

static void worker_wake(const struct worker_link *link)
{
    const uint64_t one = 1;
    ssize_t written = write(link->request_event_fd, &one, sizeof(one));
    (void)written; /* full means that it is awake already */
}

static bool put(struct gateway *gateway, struct flight *flight, uint32_t type, const void *part1,
                size_t bytes1, const void *part2, size_t bytes2)
{
    struct cm_error err;
    enum cm_status status =
        cm_ring_put(&gateway->link.requests, type, flight->id, part1, bytes1, part2, bytes2, &err);
    if (status == CM_E_INPUT) {
        link_break(gateway, err.text); /* frees flights: nothing is touched after it */
    }
    return status == CM_OK;
}

static bool pending(const struct flight *flight)
{
    return flight->state == FLIGHT_QUEUED || (flight->cancel_due && !flight->cancel_sent);
}

bool link_pending(const struct gateway *gateway)
{
    const struct flight *flight;
    TAILQ_FOREACH(flight, &gateway->flights, entry)
    {
        if (pending(flight)) {
            return true;
        }
    }
    return false;
}

/* Put what waits into the ring, in order, as far as there is room. */
void link_pump(struct gateway *gateway)
{
    struct flight *flight;
    uint64_t now = clock_ms();
    bool woken = false;
    if (!gateway->link.open || gateway->link.broken) {
        return;
    }
    TAILQ_FOREACH(flight, &gateway->flights, entry)
    {
        if (!pending(flight)) {
            continue;
        }
        if (flight->state == FLIGHT_QUEUED) {
            if (flight->suspect && flights_probation(gateway, now)) {
                continue; /* one suspect at a time; all others pass */
            }
            if (!put(gateway, flight, CM_WIRE_GENERATE, &flight->wire, sizeof(flight->wire),
                     flight->payload, flight->payload_bytes)) {
                break;
            }
            flight->state = FLIGHT_SENT;
            flight->sent_ms = now;
            OPENSSL_cleanse(flight->payload, flight->payload_bytes);
            free(flight->payload);
            flight->payload = NULL;
        } else if (put(gateway, flight, CM_WIRE_CANCEL, NULL, 0, NULL, 0)) {
            flight->cancel_sent = true;
        } else {
            break;
        }
        woken = true;
    }
    if (woken && gateway->link.open) {
        worker_wake(&gateway->link);
    }
}

/* Prompts leave shared memory soon after the worker has read them. */
void link_scrub(struct gateway *gateway)
{
    if (gateway->link.open && !gateway->link.broken) {
        cm_ring_scrub(&gateway->link.requests);
    }
}

static bool text_sound(const char *text, size_t bytes)
{
    size_t size = strnlen(text, bytes);
    return size < bytes && cm_utf8_valid((const uint8_t *)text, size);
}

static const char *on_hello(struct gateway *gateway, const uint8_t *payload)
{
    struct worker_link *link = &gateway->link;
    struct cm_wire_hello hello;
    memcpy(&hello, payload, sizeof(hello));
    if (link->hello_seen) {
        return "hello twice";
    }
    if (!text_sound(hello.model_name, sizeof(hello.model_name)) || hello.model_name[0] == '\0' ||
        !text_sound(hello.package_digest, sizeof(hello.package_digest)) ||
        strspn(hello.package_digest, "0123456789abcdef") != strlen(hello.package_digest) ||
        !text_sound(hello.device, sizeof(hello.device))) {
        return "a malformed hello";
    }
    if (gateway->config.model_name[0] != '\0' &&
        strcmp(gateway->config.model_name, hello.model_name) != 0) {
        return "another model than configured";
    }
    link->hello = hello;
    link->hello_seen = true;
    CM_LOG(&gateway->log, CM_LOG_INFO, "worker_hello", CM_LOG_S("model", hello.model_name),
           CM_LOG_S("device", hello.device), CM_LOG_I("context_max", hello.context_max));
    return NULL;
}

static const char *record_handle(struct gateway *gateway, const struct cm_record *record)
{
    struct worker_link *link = &gateway->link;
    if (record->type == 0 || record->type >= CM_WIRE_TYPE_COUNT) {
        return "an unknown record type";
    }
    const struct cm_wire_row *row = &cm_wire_rows[record->type];
    if (record->bytes < row->bytes_min || record->bytes > row->bytes_max) {
        return "a record of the wrong size";
    }
    link->heard_ms = clock_ms();
    if (record->type == CM_WIRE_HELLO) {
        return on_hello(gateway, link->payload);
    }
    if (!link->hello_seen) {
        return "a record before hello";
    }
    if (record->type == CM_WIRE_STATS) {
        memcpy(&link->stats, link->payload, sizeof(link->stats));
        link->stats_seen = true;
        return NULL;
    }
    return flight_record(gateway, record, link->payload);
}

static void on_readable(evutil_socket_t fd, short what, void *context)
{
    struct gateway *gateway = context;
    struct worker_link *link = &gateway->link;
    uint64_t count;
    size_t taken = 0;
    (void)what;
    ssize_t got = read(fd, &count, sizeof(count)); /* before the ring: no wake-up is lost */
    (void)got;
    for (; taken < RECORDS_PER_TURN; taken++) {
        struct cm_record record;
        struct cm_error err;
        enum cm_status status =
            cm_ring_get(&link->responses, &record, link->payload, link->payload_bytes, &err);
        if (status == CM_E_BUSY) {
            break;
        }
        const char *violation = status == CM_OK ? record_handle(gateway, &record) : err.text;
        if (violation != NULL) {
            link_break(gateway, violation);
            return;
        }
        if (link->broken) { /* by a put on the way */
            return;
        }
    }
    if (taken == RECORDS_PER_TURN) {
        event_active(link->readable, EV_READ, 1);
    }
    if (taken > 0) {
        worker_wake(link); /* there is room again */
    }
    link_pump(gateway);
}

static enum cm_status link_map(struct worker_link *link, const int fds[CM_RING_FD_COUNT],
                               struct cm_error *err)
{
    enum cm_status status = cm_ring_open_producer(&link->requests, fds[0], fds[1], err);
    if (status != CM_OK) {
        return status;
    }
    status = cm_ring_open_consumer(&link->responses, fds[2], fds[3], err);
    if (status != CM_OK) {
        cm_ring_close(&link->requests);
    }
    return status;
}

/* Takes the six descriptors, whatever comes of it. */
enum cm_status link_open(struct gateway *gateway, const int fds[CM_RING_FD_COUNT],
                         struct cm_error *err)
{
    struct worker_link *link = &gateway->link;
    if (link->open && !link->broken) {
        flights_blame(gateway);
    }
    link_close(gateway);
    flights_fail_all(gateway);
    enum cm_status status = link_map(link, fds, err);
    for (size_t i = 0; i < CM_RING_FD_COUNT; i++) {
        if (i < 4 || status != CM_OK) {
            close(fds[i]);
        }
    }
    if (status != CM_OK) {
        return status;
    }
    link->request_event_fd = fds[4];
    link->response_event_fd = fds[5];
    link->open = true;
    link->heard_ms = clock_ms();
    link->payload_bytes = cm_ring_payload_max(&link->responses);
    link->payload = malloc(link->payload_bytes);
    evutil_make_socket_nonblocking(fds[4]);
    evutil_make_socket_nonblocking(fds[5]);
    link->readable = event_new(gateway->base, fds[5], EV_READ | EV_PERSIST, on_readable, gateway);
    CM_ASSERT(link->payload != NULL && link->readable != NULL &&
              event_add(link->readable, NULL) == 0);
    /* The worker may have written before we listened. */
    event_active(link->readable, EV_READ, 1);
    return CM_OK;
}
