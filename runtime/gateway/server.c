/* The event loop: listener, control channel, tick. */
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "runtime/gateway/gateway_internal.h"

#define HEARTBEAT_MS 1000

uint64_t clock_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

uint64_t clock_ms(void)
{
    return clock_us() / 1000u;
}

void gateway_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *address,
                    int address_bytes, void *context)
{
    (void)listener;
    (void)address;
    (void)address_bytes;
    connection_new(context, fd);
}

/* Out of descriptors, most likely. Listening on would spin; the tick tries again. */
static void on_accept_error(struct evconnlistener *listener, void *context)
{
    struct gateway *gateway = context;
    struct cm_error err;
    cm_error_errno(&err, errno, "CM-GW-ACCEPT", "cannot accept a connection");
    cm_log_error(&gateway->log, "accept_failed", &err);
    evconnlistener_disable(listener);
}

static void on_control(evutil_socket_t fd, short what, void *context)
{
    (void)fd;
    (void)what;
    control_receive(context);
}

static void on_later(evutil_socket_t fd, short what, void *context)
{
    (void)fd;
    (void)what;
    link_pump(context);
    connection_reap(context);
}

void gateway_later(struct gateway *gateway)
{
    event_active(gateway->later, EV_TIMEOUT, 1);
}

static void on_tick(evutil_socket_t fd, short what, void *context)
{
    struct gateway *gateway = context;
    struct connection *connection;
    struct connection *next;
    uint64_t now = clock_ms();
    (void)fd;
    (void)what;
    /* A callee buries at most the connection it is given: `next` stays. */
    for (connection = TAILQ_FIRST(&gateway->connections); connection != NULL; connection = next) {
        next = TAILQ_NEXT(connection, entry);
        connection_tick(connection, now);
    }
    flights_tick(gateway, now);
    attestation_tick(gateway, now);
    link_pump(gateway);
    link_scrub(gateway);
    control_drained(gateway);
    evconnlistener_enable(gateway->listener);
    if (now - gateway->beat_ms >= HEARTBEAT_MS) {
        gateway->beat_ms = now;
        control_beat(gateway);
    }
}

static enum cm_status base_new(struct gateway *gateway, struct cm_error *err)
{
    struct event_config *config = event_config_new();
    if (config != NULL) {
        event_config_set_flag(config, EVENT_BASE_FLAG_NOLOCK | EVENT_BASE_FLAG_IGNORE_ENV);
        gateway->base = event_base_new_with_config(config);
        event_config_free(config);
    }
    return gateway->base != NULL
               ? CM_OK
               : cm_error_set(err, CM_E_SYSTEM, "CM-GW-LOOP", "cannot make the event loop");
}

static enum cm_status events_add(struct gateway *gateway, struct cm_error *err)
{
    const struct timeval tick = {0, TICK_MS * 1000};
    gateway->later = event_new(gateway->base, -1, 0, on_later, gateway);
    gateway->control =
        event_new(gateway->base, CM_FD_CONTROL, EV_READ | EV_PERSIST, on_control, gateway);
    gateway->tick = event_new(gateway->base, -1, EV_PERSIST, on_tick, gateway);
    evutil_make_socket_nonblocking(CM_FD_INPUT);
    gateway->listener =
        evconnlistener_new(gateway->base, gateway_accept, gateway,
                           LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_CLOSE_ON_FREE, 0, CM_FD_INPUT);
    if (gateway->later == NULL || gateway->control == NULL || gateway->tick == NULL ||
        gateway->listener == NULL || event_add(gateway->control, NULL) != 0 ||
        event_add(gateway->tick, &tick) != 0) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-GW-LOOP", "cannot listen on descriptor %d",
                            CM_FD_INPUT);
    }
    evconnlistener_set_error_cb(gateway->listener, on_accept_error);
    return CM_OK;
}

enum cm_status gateway_start(struct gateway *gateway, bool *ret_stop, struct cm_error *err)
{
    size_t seed = 0;
    const int rings[CM_RING_FD_COUNT] = {CM_FD_REQUEST_DATA,  CM_FD_REQUEST_CURSOR,
                                         CM_FD_RESPONSE_DATA, CM_FD_RESPONSE_CURSOR,
                                         CM_FD_REQUEST_EVENT, CM_FD_RESPONSE_EVENT};
    cm_log_write(&gateway->log, CM_LOG_INFO, "confined", NULL);
    /* Else jansson would open /dev/urandom at the first object. */
    if (getrandom(&seed, sizeof(seed), 0) != (ssize_t)sizeof(seed)) {
        return cm_error_errno(err, errno, "CM-GW-RANDOM", "no random bytes");
    }
    json_object_seed(seed | 1);
    gateway->started_ms = clock_ms();
    gateway->next_id = 1;
    enum cm_status status = cm_quarantine_init(&gateway->quarantine, err);
    if (status == CM_OK) {
        status = control_configure(gateway, err);
    }
    if (status == CM_OK) {
        status = base_new(gateway, err);
    }
    if (status == CM_OK) {
        status = events_add(gateway, err);
    }
    if (status == CM_OK) {
        status = link_open(gateway, rings, err);
    }
    if (status == CM_OK) {
        status = tls_context_new(&gateway->tls, err);
    }
    if (status == CM_OK) {
        cm_log_write(&gateway->log, CM_LOG_INFO, "prepared", NULL);
        status = control_tls_wait(gateway, ret_stop, err);
    }
    if (status != CM_OK || *ret_stop) {
        return status;
    }
    status = cm_confine_serve(&gateway->confinement, err);
    if (status == CM_OK) {
        const struct cm_ready ready = {.probed = gateway->confinement.probed};
        status =
            cm_channel_send(&gateway->channel, CM_FRAME_READY, &ready, sizeof(ready), NULL, 0, err);
    }
    return status;
}

void gateway_free(struct gateway *gateway)
{
    struct connection *connection;
    while ((connection = TAILQ_FIRST(&gateway->connections)) != NULL) {
        connection_close(connection, CM_END_CLIENT);
    }
    while (TAILQ_FIRST(&gateway->flights) != NULL) {
        flight_free(TAILQ_FIRST(&gateway->flights));
    }
    connection_reap(gateway);
    if (gateway->base != NULL) {
        link_close(gateway);
    }
    if (gateway->listener != NULL) {
        evconnlistener_free(gateway->listener);
    }
    struct event *const events[] = {gateway->control, gateway->tick, gateway->later};
    for (size_t i = 0; i < sizeof(events) / sizeof(events[0]); i++) {
        if (events[i] != NULL) {
            event_free(events[i]);
        }
    }
    cm_keys_free(&gateway->keys);
    SSL_CTX_free(gateway->tls);
    if (gateway->base != NULL) {
        event_base_free(gateway->base);
    }
}
