/* The control channel to the supervisor. */
#include <string.h>
#include <unistd.h>

#include "runtime/gateway/gateway_internal.h"

#define CONFIGURE_TIMEOUT_MS 10000
#define FRAMES_PER_TURN      64

/* The supervisor is gone, or speaks another protocol: there is nothing to serve for. */
static void control_end(struct gateway *gateway, int exit_code)
{
    gateway->exit_code = exit_code;
    event_base_loopbreak(gateway->base);
}

void control_fail(struct gateway *gateway, const struct cm_error *err)
{
    struct cm_error ignored;
    cm_log_error(&gateway->log, "failed", err);
    enum cm_status sent =
        cm_channel_send(&gateway->channel, CM_FRAME_FAILED, err, sizeof(*err), NULL, 0, &ignored);
    (void)sent;
    gateway->exit_code = cm_status_exit_code((enum cm_status)err->status);
}

static void send_frame(struct gateway *gateway, enum cm_frame_type type, const void *payload,
                       size_t bytes)
{
    struct cm_error err;
    enum cm_status status = cm_channel_send(&gateway->channel, type, payload, bytes, NULL, 0, &err);
    if (status != CM_OK && status != CM_E_BUSY) {
        cm_log_error(&gateway->log, "control_lost", &err);
        control_end(gateway, cm_status_exit_code(status));
    }
}

static bool terminated(const char *text, size_t bytes)
{
    return memchr(text, '\0', bytes) != NULL;
}

enum cm_status control_configure(struct gateway *gateway, struct cm_error *err)
{
    struct cm_frame *frame = &gateway->frame;
    struct cm_config_gateway *config = &gateway->config;
    enum cm_status status = cm_channel_wait(&gateway->channel, frame, CONFIGURE_TIMEOUT_MS, err);
    if (status != CM_OK) {
        return status;
    }
    if (frame->type != CM_FRAME_CONFIG || frame->bytes != sizeof(*config)) {
        cm_frame_close_fds(frame);
        return cm_error_set(err, CM_E_INPUT, "CM-GW-CONFIG", "the first frame is not config");
    }
    memcpy(config, frame->payload, sizeof(*config));
    if (!terminated(config->model_name, sizeof(config->model_name)) ||
        !terminated(config->version, sizeof(config->version)) || config->header_bytes_max < 256 ||
        config->body_bytes_max == 0 || config->connections_max == 0 || config->requests_max == 0 ||
        config->requests_per_key_max == 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-GW-CONFIG", "the configuration is malformed");
    }
    return CM_OK;
}

/* The worker was replaced: its new rings are the ones to open. */
static enum cm_status waiting_take(void *context, struct cm_frame *frame, struct cm_error *err)
{
    if (frame->type != CM_FRAME_RINGS) {
        cm_frame_close_fds(frame);
        return cm_error_set(err, CM_E_INPUT, "CM-GW-FRAME", "frame %u came instead of the TLS page",
                            frame->type);
    }
    return link_open(context, frame->fds, err);
}

/* The key page is imported, and wiped. */
enum cm_status control_tls_wait(struct gateway *gateway, bool *ret_stop, struct cm_error *err)
{
    static struct cm_tls_page page;
    struct cm_frame *frame = &gateway->frame;
    enum cm_status status =
        cm_channel_await(&gateway->channel, CM_FRAME_TLS_PAGE, waiting_take, gateway, frame, err);
    *ret_stop = status == CM_OK && frame->type == CM_FRAME_STOP;
    if (status != CM_OK || *ret_stop) {
        return status;
    }
    memcpy(&page, frame->payload, sizeof(page));
    frame->fd_count = 0; /* taken */
    if (page.certificate_bytes > sizeof(page.certificate)) {
        close(frame->fds[0]);
        return cm_error_set(err, CM_E_CONFIG, "CM-GW-CONFIG", "a certificate of %u bytes",
                            page.certificate_bytes);
    }
    return tls_identity_set(gateway->tls, frame->fds[0], page.certificate, page.certificate_bytes,
                            err);
}

static void on_state(struct gateway *gateway)
{
    struct cm_state *state = &gateway->state;
    memcpy(state, gateway->frame.payload, sizeof(*state));
    /* The reason becomes a code in replies: only what codes are made of. */
    state->reason[sizeof(state->reason) - 1] = '\0';
    if (strspn(state->reason, "abcdefghijklmnopqrstuvwxyz0123456789_") != strlen(state->reason)) {
        memcpy(state->reason, "not_ready", sizeof("not_ready"));
    }
    for (size_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        struct cm_adapter_info *adapter = &state->adapters[i];
        adapter->id[sizeof(adapter->id) - 1] = '\0';
        if (adapter->state >= CM_ADAPTER_STATE_COUNT || !cm_name_valid(adapter->name)) {
            *adapter = (struct cm_adapter_info){.state = CM_ADAPTER_ABSENT};
        }
    }
    gateway->startup_done = gateway->startup_done || state->ready != 0;
}

static void on_keys(struct gateway *gateway)
{
    struct cm_keys_info info;
    struct cm_error err;
    memcpy(&info, gateway->frame.payload, sizeof(info));
    if (cm_keys_load(&gateway->keys, gateway->frame.fds[0], &info, &err) != CM_OK) {
        cm_log_error(&gateway->log, "keys_refused", &err);
    } else {
        CM_LOG(&gateway->log, CM_LOG_INFO, "keys", CM_LOG_I("generation", info.generation),
               CM_LOG_I("count", info.count));
    }
    flights_check_keys(gateway);
}

static void on_rings(struct gateway *gateway)
{
    struct cm_error err;
    enum cm_status status = link_open(gateway, gateway->frame.fds, &err);
    gateway->frame.fd_count = 0; /* taken */
    if (status != CM_OK) {
        control_fail(gateway, &err);
        control_end(gateway, gateway->exit_code);
    }
}

static void on_drain(struct gateway *gateway)
{
    struct cm_drain drain;
    memcpy(&drain, gateway->frame.payload, sizeof(drain));
    gateway->draining = true;
    gateway->drain_deadline_ms = clock_ms() + drain.deadline_ms;
    CM_LOG(&gateway->log, CM_LOG_INFO, "draining", CM_LOG_I("requests", gateway->flight_count),
           CM_LOG_I("deadline_ms", drain.deadline_ms));
    control_drained(gateway);
}

/* All is answered, and what was answered has left. A client that does not read holds nobody up for
 * longer than the deadline and a second. */
void control_drained(struct gateway *gateway)
{
    const struct connection *connection;
    if (!gateway->draining || gateway->drained_sent) {
        return;
    }
    bool patience = clock_ms() < gateway->drain_deadline_ms + LINGER_MS;
    if (gateway->flight_count > 0 && patience) {
        return;
    }
    TAILQ_FOREACH(connection, &gateway->connections, entry)
    {
        if (connection->state == CONNECTION_FLUSH && patience) {
            return;
        }
    }
    gateway->drained_sent = true;
    send_frame(gateway, CM_FRAME_DRAINED, NULL, 0);
}

void control_broken(struct gateway *gateway)
{
    send_frame(gateway, CM_FRAME_BROKEN, NULL, 0);
}

void control_beat(struct gateway *gateway)
{
    struct cm_heartbeat beat = {.counter = ++gateway->beats, .running = gateway->flight_count};
    send_frame(gateway, CM_FRAME_HEARTBEAT, &beat, sizeof(beat));
}

static void frame_handle(struct gateway *gateway)
{
    switch ((enum cm_frame_type)gateway->frame.type) {
    case CM_FRAME_STATE:
        on_state(gateway);
        return;
    case CM_FRAME_KEYS:
        on_keys(gateway);
        return;
    case CM_FRAME_RINGS:
        on_rings(gateway);
        return;
    case CM_FRAME_EVIDENCE:
        attestation_answer(gateway);
        return;
    case CM_FRAME_QUOTE_FAILED:
        attestation_failed(gateway);
        return;
    case CM_FRAME_DRAIN:
        on_drain(gateway);
        return;
    case CM_FRAME_TLS_PAGE: /* a second one: there is no other key to serve with */
        control_end(gateway, cm_status_exit_code(CM_E_BUG));
        return;
    case CM_FRAME_STOP:
        control_end(gateway, 0);
        return;
    case CM_FRAME_CONFIG:
    case CM_FRAME_READY:
    case CM_FRAME_FAILED:
    case CM_FRAME_PROGRESS:
    case CM_FRAME_KEY_REQUEST:
    case CM_FRAME_KEY_PAGE:
    case CM_FRAME_TLS_REQUEST:
    case CM_FRAME_LOADED:
    case CM_FRAME_HEARTBEAT:
    case CM_FRAME_DRAINED:
    case CM_FRAME_MEASURE:
    case CM_FRAME_RULES:
    case CM_FRAME_UNSEAL:
    case CM_FRAME_QUOTE:
    case CM_FRAME_BROKEN:
    case CM_FRAME_ADAPTER_OPEN:
    case CM_FRAME_ADAPTER_KEY:
    case CM_FRAME_ADAPTER_ANSWER:
    case CM_FRAME_ADAPTER_PAGE:
    case CM_FRAME_ADAPTER_CLOSE:
    case CM_FRAME_ADAPTER_LOAD:
    case CM_FRAME_ADAPTER_READ:
    case CM_FRAME_ADAPTER_BYTES:
    case CM_FRAME_ADAPTER_UNLOAD:
    case CM_FRAME_ADAPTER_STATE:
    case CM_FRAME_TLS_IDENTITY:
    case CM_FRAME_TYPE_COUNT:
        break; /* the channel's table lets none of these through */
    }
}

void control_receive(struct gateway *gateway)
{
    for (int i = 0; i < FRAMES_PER_TURN && !event_base_got_break(gateway->base); i++) {
        struct cm_error err;
        enum cm_status status = cm_channel_receive(&gateway->channel, &gateway->frame, &err);
        if (status == CM_E_BUSY) {
            return;
        }
        if (status != CM_OK) {
            control_fail(gateway, &err);
            control_end(gateway, gateway->exit_code);
            return;
        }
        frame_handle(gateway);
        cm_frame_close_fds(&gateway->frame);
    }
}
