/* Generation requests between a connection and the worker. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "runtime/base/hex.h"
#include "runtime/gateway/gateway_internal.h"
#include "runtime/gateway/text.h"

/* ------------------------------------------------------------------ begin and end */

static uint32_t flights_of_key(const struct gateway *gateway, const uint8_t id[static 8])
{
    const struct flight *flight;
    uint32_t count = 0;
    TAILQ_FOREACH(flight, &gateway->flights, entry)
    {
        count += memcmp(flight->key_id, id, sizeof(flight->key_id)) == 0;
    }
    return count;
}

/* Before the body is read: so memory for bodies is bounded by requests_max. */
bool flight_admit(struct connection *connection, struct cm_api_error *ret_error)
{
    struct gateway *gateway = connection->gateway;
    const char *reasons[8];
    uint64_t now = clock_ms();
    if (!gateway_servable(gateway, now)) {
        size_t count = gateway_reasons(gateway, now, reasons);
        cm_api_error_set(ret_error, 503, count > 0 ? reasons[0] : "not_ready",
                         "The service is not ready: %s.", count > 0 ? reasons[0] : "not_ready");
        ret_error->retry_after_s = RETRY_LOAD_S;
        return false;
    }
    if (gateway->flight_count >= gateway->config.requests_max) {
        cm_api_error_set(ret_error, 429, "queue_full", "The service is at its limit of requests.");
        ret_error->retry_after_s = RETRY_QUEUE_S;
        return false;
    }
    if (flights_of_key(gateway, connection->key_id) >= gateway->config.requests_per_key_max) {
        cm_api_error_set(ret_error, 429, "key_limit",
                         "This key is at its limit of %u requests at once.",
                         gateway->config.requests_per_key_max);
        ret_error->retry_after_s = RETRY_QUEUE_S;
        return false;
    }
    return true;
}

struct flight *flight_new(struct connection *connection, enum cm_endpoint endpoint)
{
    struct gateway *gateway = connection->gateway;
    uint8_t random[12] = {0};
    struct flight *flight = calloc(1, sizeof(*flight));
    CM_ASSERT(flight != NULL);
    flight->gateway = gateway;
    flight->connection = connection;
    flight->endpoint = endpoint;
    flight->id = gateway->next_id++;
    flight->started_us = connection->started_us;
    flight->created_unix_s = (uint64_t)time(NULL);
    memcpy(flight->key_id, connection->key_id, sizeof(flight->key_id));
    ssize_t got = getrandom(random, sizeof(random), 0);
    (void)got;
    _Static_assert(sizeof("chatcmpl-") + 2 * sizeof(random) <= REPLY_ID_BYTES, "the id fits");
    int used = snprintf(flight->reply_id, REPLY_ID_BYTES, "%s",
                        endpoint == CM_ENDPOINT_CHAT ? "chatcmpl-" : "cmpl-");
    cm_hex_write(random, sizeof(random), flight->reply_id + used);
    TAILQ_INSERT_TAIL(&gateway->flights, flight, entry);
    gateway->flight_count++;
    return flight;
}

void flight_free(struct flight *flight)
{
    struct gateway *gateway = flight->gateway;
    CM_ASSERT(flight->connection == NULL);
    TAILQ_REMOVE(&gateway->flights, flight, entry);
    gateway->flight_count--;
    free(flight->payload);
    if (flight->text != NULL) {
        evbuffer_free(flight->text);
    }
    free(flight);
    control_drained(gateway);
}

/* The client will get no more: stop the worker, or forget what it never saw. */
static void flight_cancel(struct flight *flight)
{
    if (flight->state != FLIGHT_SENT) {
        flight_free(flight);
        return;
    }
    flight->cancel_due = true;
    gateway_later(flight->gateway);
}

void flight_detach(struct flight *flight, enum cm_end why)
{
    (void)why;
    flight->connection->flight = NULL;
    flight->connection = NULL;
    flight_cancel(flight);
}

/* End the exchange with an error; where the reply has begun, as the last event of the stream. The
 * flight stays as it is. */
static void answer_error(struct flight *flight, const struct cm_api_error *error, enum cm_end why)
{
    struct connection *connection = flight->connection;
    exchange_finish(connection, flight->begun ? 200 : error->status, why);
    connection->flight = NULL;
    flight->connection = NULL;
    if (!flight->begun) {
        reply_error_send(connection, error, NULL);
        return;
    }
    struct evbuffer *event = evbuffer_new();
    CM_ASSERT(event != NULL);
    cm_text_put(event, "event: error\ndata: ");
    cm_api_error_write(error, event);
    cm_text_put(event, "\n\n");
    connection->close_after = true;
    reply_stream_event(connection, event);
    evbuffer_free(event);
    if (!connection->dead) {
        reply_stream_end(connection);
    }
}

void flight_fail(struct flight *flight, const struct cm_api_error *error, enum cm_end why)
{
    if (flight->connection != NULL) {
        answer_error(flight, error, why);
        flight_cancel(flight);
    }
}

static bool on_probation(const struct flight *flight, uint64_t now_ms)
{
    return flight->state == FLIGHT_SENT && flight->suspect && flight->completion_tokens == 0 &&
           now_ms < flight->sent_ms + PROBATION_MS;
}

bool flights_probation(const struct gateway *gateway, uint64_t now_ms)
{
    const struct flight *flight;
    TAILQ_FOREACH(flight, &gateway->flights, entry)
    {
        if (on_probation(flight, now_ms)) {
            return true;
        }
    }
    return false;
}

void flights_blame(struct gateway *gateway)
{
    const struct flight *flight;
    uint64_t now = clock_ms();
    uint32_t blamed[CM_SUSPICION_REFUSED + 1] = {0};
    bool culprit = flights_probation(gateway, now);
    TAILQ_FOREACH(flight, &gateway->flights, entry)
    {
        if (flight->state == FLIGHT_SENT && (!culprit || on_probation(flight, now))) {
            blamed[cm_quarantine_died(&gateway->quarantine, flight->digest, now)]++;
        }
    }
    CM_LOG(&gateway->log, CM_LOG_WARN, "worker_lost", CM_LOG_I("requests", gateway->flight_count),
           CM_LOG_I("suspects", blamed[CM_SUSPICION_SUSPECT]),
           CM_LOG_I("quarantined", blamed[CM_SUSPICION_REFUSED]));
}

void flights_fail_all(struct gateway *gateway)
{
    struct cm_api_error error;
    struct flight *flight;
    cm_api_error_set(&error, 503, "worker_gone", "The worker was lost; try again.");
    error.retry_after_s = RETRY_QUEUE_S;
    /* The ring is gone, and with it all that the old worker could still say. Flights whose body is
     * still coming go to the next one. */
    struct flight *next;
    for (flight = TAILQ_FIRST(&gateway->flights); flight != NULL; flight = next) {
        next = TAILQ_NEXT(flight, entry);
        if (flight->state == FLIGHT_BODY) {
            continue;
        }
        if (flight->connection != NULL) {
            answer_error(flight, &error, CM_END_WORKER);
        }
        flight_free(flight);
    }
}

void flights_check_keys(struct gateway *gateway)
{
    struct cm_api_error error;
    struct flight *flight;
    struct flight *next;
    cm_api_error_set(&error, 401, "invalid_api_key", "A valid API key is required.");
    for (flight = TAILQ_FIRST(&gateway->flights); flight != NULL; flight = next) {
        next = TAILQ_NEXT(flight, entry);
        if (flight->connection != NULL && cm_keys_find(&gateway->keys, flight->key_id) == NULL) {
            flight->connection->close_after = true;
            flight_fail(flight, &error, CM_END_REVOKED);
        }
    }
}

void flights_tick(struct gateway *gateway, uint64_t now_ms)
{
    struct cm_api_error error;
    struct flight *flight;
    struct flight *next;
    uint64_t limit_ms = gateway->config.request_timeout_ms;
    bool drain_over = gateway->draining && now_ms >= gateway->drain_deadline_ms;
    for (flight = TAILQ_FIRST(&gateway->flights); flight != NULL; flight = next) {
        next = TAILQ_NEXT(flight, entry);
        bool late = limit_ms != 0 && now_ms > flight->started_us / 1000 + limit_ms;
        if (flight->connection == NULL || (!late && !drain_over)) {
            continue;
        }
        flight->connection->close_after = true;
        if (drain_over) {
            cm_api_error_set(&error, 503, "draining", "The service is stopping.");
            error.retry_after_s = RETRY_LOAD_S;
        } else {
            cm_api_error_set(&error, 504, "generation_timeout",
                             "The generation took longer than this server permits.");
            error.no_retry = true;
        }
        flight_fail(flight, &error, CM_END_TIMEOUT);
    }
}

/* ------------------------------------------------------------------ to the worker */

/* False: workers have died over this prompt, and no other shall. */
static bool quarantine_pass(struct flight *flight, struct cm_api_error *ret_error)
{
    struct gateway *gateway = flight->gateway;
    uint64_t left_ms = 0;
    cm_quarantine_digest(&gateway->quarantine, flight->payload, flight->payload_bytes,
                         flight->digest);
    enum cm_suspicion is =
        cm_quarantine_look(&gateway->quarantine, flight->digest, clock_ms(), &left_ms);
    flight->suspect = is == CM_SUSPICION_SUSPECT;
    if (is != CM_SUSPICION_REFUSED) {
        return true;
    }
    gateway->metrics.quarantine_refusals++;
    cm_api_error_set(ret_error, 422, "request_quarantined",
                     "The worker was lost %u times while it had this prompt; it is refused for "
                     "another %llu s.",
                     CM_QUARANTINE_DEATHS, (unsigned long long)(left_ms / 1000 + 1));
    ret_error->no_retry = true;
    return false;
}

void flight_submit(struct flight *flight, struct evbuffer *body)
{
    struct gateway *gateway = flight->gateway;
    struct connection *connection = flight->connection;
    struct cm_api_error error;
    struct cm_request request;
    if (!gateway->link.hello_seen) { /* lost while the body came */
        cm_api_error_set(&error, 503, "worker_gone", "The worker was lost; try again.");
        error.retry_after_s = RETRY_QUEUE_S;
        reply_error(connection, &error, NULL);
        return;
    }
    const struct cm_request_limits limits = {
        .model = gateway->link.hello.model_name,
        .adapters = gateway->state.adapters,
        .key = cm_keys_find(&gateway->keys, flight->key_id),
        .every_adapter = gateway->config.every_adapter == 1,
        .max_tokens_default = gateway->config.max_tokens_default,
        .record_bytes_max =
            cm_ring_payload_max(&gateway->link.requests) - sizeof(struct cm_wire_generate),
    };
    size_t size = evbuffer_get_length(body);
    const void *bytes = size > 0 ? evbuffer_pullup(body, -1) : (const void *)"";
    enum cm_status status =
        cm_request_parse(flight->endpoint, bytes, size, &limits, &request, &error);
    if (status == CM_OK) {
        status = cm_request_encode(&request, limits.record_bytes_max, &flight->payload,
                                   &flight->payload_bytes, &error);
        flight->wire = request.wire;
        snprintf(flight->model, sizeof(flight->model), "%s",
                 request.adapter != NULL ? request.adapter->name : limits.model);
        flight->stream = request.stream;
        flight->include_usage = request.include_usage;
        flight->continuous_usage = request.continuous_usage;
        flight->moderated = request.moderated;
        cm_request_free(&request);
    }
    evbuffer_drain(body, size);
    if (status != CM_OK) {
        reply_error(connection, &error, NULL);
        return;
    }
    if (!quarantine_pass(flight, &error)) {
        reply_error(connection, &error, NULL);
        return;
    }
    memcpy(&flight->wire.tenant, flight->key_id, sizeof(flight->wire.tenant));
    flight->state = FLIGHT_QUEUED;
    gateway_later(gateway);
}

/* ------------------------------------------------------------------ from the worker */

static const char *on_accepted(struct flight *flight, const struct cm_wire_accepted *accepted)
{
    if (flight->accepted) {
        return "accepted twice";
    }
    if (accepted->cached_tokens > accepted->prompt_tokens) {
        return "more cached than prompt tokens";
    }
    flight->accepted = true;
    flight->usage = *accepted;
    return NULL;
}

/* Which category, and where: never what. */
static void filter_fill(const struct flight *flight, struct cm_api_error *ret_error)
{
    const struct cm_wire_verdict *verdict =
        cm_moderation_refusing(&flight->moderation, CM_VERDICT_INPUT);
    cm_api_error_set(ret_error, 400, "content_filter",
                     "The prompt was refused by the guard: %s (rule %s).",
                     verdict != NULL ? verdict->category : "unknown",
                     verdict != NULL ? verdict->rule : "unknown");
    if (flight->endpoint == CM_ENDPOINT_CHAT && verdict != NULL) {
        snprintf(ret_error->param, sizeof(ret_error->param), "messages[%u].content", verdict->part);
    } else if (flight->endpoint == CM_ENDPOINT_TEXT) {
        snprintf(ret_error->param, sizeof(ret_error->param), "prompt");
    }
    ret_error->moderation = &flight->moderation;
}

static void refusal_fill(const struct flight *flight, const struct cm_wire_refused *refused,
                         struct cm_api_error *ret_error)
{
    switch ((enum cm_refusal)refused->reason) {
    case CM_REFUSAL_CONTEXT:
        cm_api_error_set(ret_error, 400, "context_length_exceeded",
                         "The prompt has %u tokens; this model's context holds %u, the reply "
                         "included.",
                         refused->prompt_tokens, refused->limit);
        return;
    case CM_REFUSAL_QUEUE:
        cm_api_error_set(ret_error, 429, "queue_full",
                         "The queue is full. Try again after as many seconds as Retry-After says.");
        ret_error->retry_after_s = RETRY_QUEUE_S;
        return;
    case CM_REFUSAL_INPUT:
        cm_api_error_set(ret_error, 400, "invalid_prompt", "The worker refused the prompt.");
        return;
    case CM_REFUSAL_DRAIN:
        cm_api_error_set(ret_error, 503, "draining", "The service is stopping.");
        ret_error->retry_after_s = RETRY_LOAD_S;
        return;
    case CM_REFUSAL_EMPTY:
        cm_api_error_set(ret_error, 400, "empty_prompt", "The prompt has no tokens.");
        return;
    case CM_REFUSAL_FILTER:
        filter_fill(flight, ret_error);
        return;
    case CM_REFUSAL_ADAPTER:
        cm_api_error_field(ret_error, 409, "model_unloading", "model",
                           "The adapter '%.63s' was unloaded.", flight->model);
        ret_error->no_retry = true;
        return;
    case CM_REFUSAL_NONE:
    case CM_REFUSAL_FAILED:
        break;
    }
    cm_api_error_set(ret_error, 500, "worker_failed", "The worker failed at this request.");
}

/* It is over and the worker is not; of a prompt that was cut short nobody knows. */
static void flight_lived(const struct flight *flight)
{
    cm_quarantine_lived(&flight->gateway->quarantine, flight->digest);
}

static const char *on_refused(struct flight *flight, const struct cm_wire_refused *refused)
{
    struct cm_api_error error;
    if (flight->accepted) {
        return "refused after it was accepted";
    }
    if (refused->reason < CM_REFUSAL_CONTEXT || refused->reason > CM_REFUSAL_ADAPTER) {
        return "unknown refusal";
    }
    if (flight->connection != NULL) {
        refusal_fill(flight, refused, &error);
        answer_error(flight, &error,
                     refused->reason == CM_REFUSAL_FILTER ? CM_END_FILTER : CM_END_REFUSED);
    }
    flight_lived(flight);
    flight_free(flight);
    return NULL;
}

/* The stream's first bytes: head and role. False: the connection is gone. */
static bool stream_begin(struct flight *flight, struct evbuffer *event)
{
    struct connection *connection = flight->connection;
    if (flight->begun) {
        return true;
    }
    flight->begun = true;
    reply_stream_begin(connection);
    if (flight->endpoint == CM_ENDPOINT_CHAT) {
        completion_role(flight, event);
        reply_stream_event(connection, event);
    }
    return !connection->dead;
}

static void text_deliver(struct flight *flight, const uint8_t *text, size_t bytes)
{
    struct cm_api_error error;
    if (!flight->stream) {
        if (flight->text == NULL) {
            flight->text = evbuffer_new();
            CM_ASSERT(flight->text != NULL);
        }
        CM_ASSERT(bytes == 0 || evbuffer_add(flight->text, text, bytes) == 0);
        if (evbuffer_get_length(flight->text) > REPLY_BYTES_MAX) {
            cm_api_error_set(&error, 500, "reply_too_large",
                             "The reply is too large to be sent whole; use 'stream'.");
            error.no_retry = true;
            flight_fail(flight, &error, CM_END_TIMEOUT);
        }
        return;
    }
    struct evbuffer *event = evbuffer_new();
    CM_ASSERT(event != NULL);
    if (stream_begin(flight, event) && bytes > 0) {
        completion_text(flight, text, bytes, event);
        reply_stream_event(flight->connection, event); /* a slow reader is closed in here */
    }
    evbuffer_free(event);
}

static const char *on_text(struct flight *flight, const uint8_t *payload, size_t bytes)
{
    struct cm_wire_text text;
    memcpy(&text, payload, sizeof(text));
    if (text.bytes != bytes - sizeof(text)) {
        return "text of another length than said";
    }
    if (!flight->accepted) {
        return "text before accepted";
    }
    if (text.completion_tokens < flight->completion_tokens) {
        return "the count of tokens fell";
    }
    if (!cm_utf8_valid(payload + sizeof(text), text.bytes)) {
        return "text is not UTF-8";
    }
    flight->completion_tokens = text.completion_tokens;
    if (text.bytes > 0) {
        flight->last_us = clock_us();
        flight->first_us = flight->first_us != 0 ? flight->first_us : flight->last_us;
    }
    if (flight->connection != NULL) {
        text_deliver(flight, payload + sizeof(text), text.bytes);
    }
    return NULL;
}

static void metrics_done(struct flight *flight, const struct cm_wire_done *done)
{
    struct cm_metrics *metrics = &flight->gateway->metrics;
    metrics->prompt_tokens += done->prompt_tokens;
    metrics->cached_tokens += done->cached_tokens;
    metrics->completion_tokens += done->completion_tokens;
    if (flight->first_us == 0) {
        return;
    }
    cm_metrics_first_token(metrics, (double)(flight->first_us - flight->started_us) / 1e6);
    if (done->completion_tokens > 1) {
        cm_metrics_output_token(metrics, (double)(flight->last_us - flight->first_us) / 1e6 /
                                             (double)(done->completion_tokens - 1));
    }
}

static void reply_complete(struct flight *flight, const struct cm_wire_done *done)
{
    static const enum cm_end ends[] = {[CM_FINISH_STOP] = CM_END_STOP,
                                       [CM_FINISH_LENGTH] = CM_END_LENGTH,
                                       [CM_FINISH_FILTER] = CM_END_FILTER};
    struct connection *connection = flight->connection;
    struct evbuffer *out = evbuffer_new();
    CM_ASSERT(out != NULL);
    flight->usage.cached_tokens = done->cached_tokens;
    if (flight->stream && stream_begin(flight, out)) {
        completion_end(flight, done, out);
        reply_stream_event(connection, out);
    }
    if (!connection->dead) {
        exchange_finish(connection, 200, ends[done->finish]);
        connection->flight = NULL;
        flight->connection = NULL;
        if (flight->stream) {
            reply_stream_end(connection);
        } else {
            const struct reply reply = {.status = 200};
            completion_whole(flight, done, out);
            reply_send(connection, &reply, out);
        }
    }
    evbuffer_free(out);
}

static const char *on_done(struct flight *flight, const struct cm_wire_done *done)
{
    struct cm_api_error error;
    bool whole = done->finish >= CM_FINISH_STOP && done->finish <= CM_FINISH_FILTER;
    if (done->finish < CM_FINISH_STOP || done->finish > CM_FINISH_FAILED) {
        return "unknown finish";
    }
    if (whole && !flight->accepted) {
        return "done before accepted";
    }
    if (done->completion_tokens < flight->completion_tokens ||
        done->cached_tokens > done->prompt_tokens) {
        return "impossible usage";
    }
    flight->completion_tokens = done->completion_tokens;
    if (flight->accepted) {
        metrics_done(flight, done);
    }
    if (whole) {
        flight_lived(flight);
    }
    if (flight->connection != NULL && whole) {
        reply_complete(flight, done);
    } else if (flight->connection != NULL) {
        bool failed = done->finish == CM_FINISH_FAILED;
        cm_api_error_set(&error, failed ? 500 : 503, failed ? "worker_failed" : "cancelled",
                         failed ? "The worker failed in the middle of the reply."
                                : "The worker gave the request up; try again.");
        error.retry_after_s = failed ? 0 : RETRY_QUEUE_S;
        answer_error(flight, &error, CM_END_WORKER);
    }
    flight_free(flight);
    return NULL;
}

static const char *on_verdict(struct flight *flight, const struct cm_wire_verdict *verdict)
{
    if (!cm_verdict_sound(verdict)) {
        return "a malformed verdict";
    }
    cm_moderation_add(&flight->moderation, verdict);
    cm_metrics_verdict(&flight->gateway->metrics, verdict);
    if (flight->connection != NULL) {
        exchange_verdict(flight->connection, verdict);
    }
    return NULL;
}

/* NULL, or how the record breaks the rules. The size was checked against the wire table. */
const char *flight_record(struct gateway *gateway, const struct cm_record *record,
                          const uint8_t *payload)
{
    struct flight *flight;
    TAILQ_FOREACH(flight, &gateway->flights, entry)
    {
        if (flight->id == record->request && flight->state == FLIGHT_SENT) {
            break;
        }
    }
    if (flight == NULL) {
        return "a request that is not under way";
    }
    switch ((enum cm_wire_type)record->type) {
    case CM_WIRE_ACCEPTED: {
        struct cm_wire_accepted accepted;
        memcpy(&accepted, payload, sizeof(accepted));
        return on_accepted(flight, &accepted);
    }
    case CM_WIRE_REFUSED: {
        struct cm_wire_refused refused;
        memcpy(&refused, payload, sizeof(refused));
        return on_refused(flight, &refused);
    }
    case CM_WIRE_TEXT:
        return on_text(flight, payload, record->bytes);
    case CM_WIRE_DONE: {
        struct cm_wire_done done;
        memcpy(&done, payload, sizeof(done));
        return on_done(flight, &done);
    }
    case CM_WIRE_VERDICT: {
        struct cm_wire_verdict verdict;
        memcpy(&verdict, payload, sizeof(verdict));
        return on_verdict(flight, &verdict);
    }
    case CM_WIRE_GENERATE:
    case CM_WIRE_CANCEL:
    case CM_WIRE_HELLO:
    case CM_WIRE_STATS:
    case CM_WIRE_TYPE_COUNT:
        break;
    }
    return "a type that workers do not send";
}
