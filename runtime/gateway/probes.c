/* What needs no worker: models, probes, version, metrics. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "runtime/gateway/gateway_internal.h"
#include "runtime/gateway/text.h"

#define ADAPTER_NAMES_BYTES (CM_ADAPTERS_MAX * CM_NAME_BYTES + 1)

static const char *const stage_names[CM_LOAD_STAGE_COUNT] = {
    [CM_LOAD_START] = "start",     [CM_LOAD_UNSEAL] = "unseal",   [CM_LOAD_HEAD] = "head",
    [CM_LOAD_RESERVE] = "reserve", [CM_LOAD_WEIGHTS] = "weights", [CM_LOAD_BIND] = "bind",
    [CM_LOAD_READY] = "ready"};

/* Work is pending, and no step has ended for long: decode hangs, whatever else looks well. */
static bool stalled(const struct gateway *gateway)
{
    const struct cm_wire_stats *stats = &gateway->link.stats;
    uint64_t now = clock_us();
    return gateway->link.stats_seen && stats->running > 0 && stats->last_step_us != 0 &&
           now > stats->last_step_us + STEP_STALLED_MS * 1000ull;
}

size_t gateway_reasons(const struct gateway *gateway, uint64_t now_ms, const char *ret_reasons[8])
{
    const struct worker_link *link = &gateway->link;
    size_t count = 0;
    if (gateway->draining) {
        ret_reasons[count++] = "draining";
    } else if (gateway->state.ready == 0) {
        ret_reasons[count++] =
            gateway->state.reason[0] != '\0' ? gateway->state.reason : "not_ready";
    }
    if (link->broken) {
        ret_reasons[count++] = "worker_protocol";
    } else if (!link->hello_seen) {
        if (gateway->state.ready != 0) {
            ret_reasons[count++] = "worker_gone";
        }
    } else if (link->stats_seen && now_ms > link->heard_ms + WORKER_SILENT_MS) {
        ret_reasons[count++] = "worker_silent";
    } else if (stalled(gateway)) {
        ret_reasons[count++] = "worker_stalled";
    }
    if (!gateway->keys.present) {
        ret_reasons[count++] = "keys_missing";
    }
    return count;
}

/* May a generation begin? */
bool gateway_servable(const struct gateway *gateway, uint64_t now_ms)
{
    const char *reasons[8];
    return gateway_reasons(gateway, now_ms, reasons) == 0;
}

static void reasons_write(const struct gateway *gateway, struct evbuffer *out)
{
    const char *reasons[8];
    size_t count = gateway_reasons(gateway, clock_ms(), reasons);
    cm_text_format(out, "{\"ready\":%s,\"reasons\":[", count == 0 ? "true" : "false");
    for (size_t i = 0; i < count; i++) {
        cm_text_put(out, i > 0 ? "," : "");
        cm_json_text(out, reasons[i]);
    }
    cm_text_put(out, "]}\n");
}

static int livez(const struct gateway *gateway, struct evbuffer *out)
{
    const struct worker_link *link = &gateway->link;
    uint64_t age = clock_ms() - link->heard_ms;
    bool dead = link->hello_seen && link->stats_seen && age > WORKER_DEAD_MS;
    cm_text_format(out, "{\"alive\":%s,\"reasons\":[%s]}\n", dead ? "false" : "true",
                   dead ? "\"worker_silent\"" : "");
    return dead ? 503 : 200;
}

static int startupz(const struct gateway *gateway, struct evbuffer *out)
{
    const struct cm_progress *load = &gateway->state.load;
    const char *phase = load->stage < CM_LOAD_STAGE_COUNT ? stage_names[load->stage] : "start";
    double percent =
        load->bytes_total > 0 ? 100.0 * (double)load->bytes_done / (double)load->bytes_total : 0.0;
    if (load->stage == CM_LOAD_READY) {
        percent = 100.0;
    }
    cm_text_format(out,
                   "{\"started\":%s,\"phase\":\"%s\",\"percent\":%.1f,\"bytes_done\":%" PRIu64
                   ",\"bytes_total\":%" PRIu64 ",\"elapsed_seconds\":%.3f,\"stages\":{",
                   gateway->startup_done ? "true" : "false", phase, percent, load->bytes_done,
                   load->bytes_total, (double)load->elapsed_us / 1e6);
    /* What the worker has been through: seconds, and the share of its elapsed time. */
    for (size_t i = CM_LOAD_HEAD; i <= CM_LOAD_BIND; i++) {
        double spent = (double)load->stage_us[i];
        cm_text_format(out, "%s\"%s\":{\"seconds\":%.4f,\"share\":%.3f}",
                       i > CM_LOAD_HEAD ? "," : "", stage_names[i], spent / 1e6,
                       load->elapsed_us > 0 ? spent / (double)load->elapsed_us : 0.0);
    }
    cm_text_put(out, "}}\n");
    return gateway->startup_done ? 200 : 503;
}

/* The model, or one of its adapters, whose parent it is. */
static void model_write(const struct gateway *gateway, const struct cm_adapter_info *adapter,
                        struct evbuffer *out)
{
    const struct cm_wire_hello *hello = &gateway->link.hello;
    const char *name = adapter != NULL ? adapter->name : hello->model_name;
    cm_text_put(out, "{\"id\":");
    cm_json_text(out, name);
    cm_text_format(out, ",\"object\":\"model\",\"created\":%" PRIu64 ",\"owned_by\":\"casemate\",",
                   hello->created_unix_s);
    cm_text_put(out, "\"root\":");
    cm_json_text(out, name);
    cm_text_put(out, ",\"parent\":");
    if (adapter != NULL) {
        cm_json_text(out, hello->model_name);
    } else {
        cm_text_put(out, "null");
    }
    cm_text_format(out, ",\"max_model_len\":%u}", hello->context_max);
}

/* It serves, and who asks may use it. */
static bool adapter_shown(const struct connection *connection,
                          const struct cm_adapter_info *adapter)
{
    const struct gateway *gateway = connection->gateway;
    return adapter->state == CM_ADAPTER_SERVING &&
           strcmp(adapter->name, gateway->link.hello.model_name) != 0 &&
           cm_keys_adapter_granted(connection->key, gateway->config.every_adapter == 1,
                                   adapter->name);
}

static void models_write(const struct connection *connection, struct evbuffer *out)
{
    const struct gateway *gateway = connection->gateway;
    cm_text_put(out, "{\"object\":\"list\",\"data\":[");
    model_write(gateway, NULL, out);
    for (size_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        if (adapter_shown(connection, &gateway->state.adapters[i])) {
            cm_text_put(out, ",");
            model_write(gateway, &gateway->state.adapters[i], out);
        }
    }
    cm_text_put(out, "]}");
}

/* The status, or 0 with *ret_error. */
static int models(const struct connection *connection, struct evbuffer *out,
                  struct cm_api_error *ret_error)
{
    const struct gateway *gateway = connection->gateway;
    const char *reasons[8];
    size_t count = gateway_reasons(gateway, clock_ms(), reasons);
    if (count > 0) {
        cm_api_error_set(ret_error, 503, reasons[0], "The service is not ready: %s.", reasons[0]);
        ret_error->retry_after_s = RETRY_LOAD_S;
        return 0;
    }
    if (connection->route->handler == CM_HANDLER_MODELS) {
        models_write(connection, out);
        return 200;
    }
    const struct cm_adapter_info *adapter = NULL;
    for (size_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        const struct cm_adapter_info *each = &gateway->state.adapters[i];
        if (adapter_shown(connection, each) && strcmp(connection->parameter, each->name) == 0) {
            adapter = each;
        }
    }
    if (adapter == NULL && strcmp(connection->parameter, gateway->link.hello.model_name) != 0) {
        cm_api_error_field(ret_error, 404, "model_not_found", "model",
                           "The model '%.63s' does not exist here; see GET /v1/models.",
                           connection->parameter);
        return 0;
    }
    model_write(gateway, adapter, out);
    return 200;
}

/* Names of the adapters that requests use, which the worker has accepted or not. */
static void adapters_used(const struct gateway *gateway, bool accepted,
                          char ret_names[static ADAPTER_NAMES_BYTES])
{
    size_t used = 0;
    ret_names[0] = '\0';
    for (size_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        const struct cm_adapter_info *adapter = &gateway->state.adapters[i];
        const struct flight *flight;
        bool found = false;
        TAILQ_FOREACH(flight, &gateway->flights, entry)
        {
            found = found || (adapter->generation != 0 && flight->accepted == accepted &&
                              flight->wire.adapter == adapter->generation);
        }
        if (found) {
            used += (size_t)snprintf(ret_names + used, ADAPTER_NAMES_BYTES - used, "%s%s",
                                     used > 0 ? "," : "", adapter->name);
        }
    }
}

static void metrics(const struct gateway *gateway, struct evbuffer *out)
{
    char running[ADAPTER_NAMES_BYTES], waiting[ADAPTER_NAMES_BYTES];
    adapters_used(gateway, true, running);
    adapters_used(gateway, false, waiting);
    const struct worker_link *link = &gateway->link;
    uint64_t now = clock_us();
    struct cm_metrics_now values = {
        .version = gateway->config.version,
        .model = link->hello.model_name,
        .connections = gateway->connection_count,
        .requests = gateway->flight_count,
        .ready = gateway_servable(gateway, clock_ms()),
        .draining = gateway->draining,
        .uptime_seconds = (double)(clock_ms() - gateway->started_ms) / 1000.0,
        .suspects = cm_quarantine_count(&gateway->quarantine, CM_SUSPICION_SUSPECT, clock_ms()),
        .quarantined = cm_quarantine_count(&gateway->quarantine, CM_SUSPICION_REFUSED, clock_ms()),
        .keys_generation = gateway->keys.generation,
        .keys = gateway->keys.count,
        .state = &gateway->state,
        .hello = link->hello_seen ? &link->hello : NULL,
        .stats = link->stats_seen ? &link->stats : NULL,
        .last_step_age_seconds = -1,
        .adapters_max = gateway->config.adapters_max,
        .adapters_running = running,
        .adapters_waiting = waiting,
    };
    if (link->stats_seen && link->stats.last_step_us != 0 && link->stats.last_step_us <= now) {
        values.last_step_age_seconds = (double)(now - link->stats.last_step_us) / 1e6;
    }
    cm_metrics_write(&gateway->metrics, &values, out);
}

void probe_answer(struct connection *connection)
{
    struct gateway *gateway = connection->gateway;
    struct reply reply = {.status = 200};
    struct cm_api_error error;
    struct evbuffer *body = evbuffer_new();
    CM_ASSERT(body != NULL);
    switch (connection->route->handler) {
    case CM_HANDLER_MODELS:
    case CM_HANDLER_MODEL:
        reply.status = models(connection, body, &error);
        break;
    case CM_HANDLER_LIVEZ:
        reply.status = livez(gateway, body);
        break;
    case CM_HANDLER_READYZ:
    case CM_HANDLER_HEALTH:
        reply.status = gateway_servable(gateway, clock_ms()) ? 200 : 503;
        reasons_write(gateway, body);
        break;
    case CM_HANDLER_STARTUPZ:
        reply.status = startupz(gateway, body);
        break;
    case CM_HANDLER_VERSION:
        cm_text_put(body, "{\"version\":");
        cm_json_text(body, gateway->config.version);
        cm_text_put(body, "}\n");
        break;
    case CM_HANDLER_METRICS:
        reply.content_type = "text/plain; version=0.0.4; charset=utf-8";
        metrics(gateway, body);
        break;
    case CM_HANDLER_CHAT:
    case CM_HANDLER_COMPLETIONS:
    case CM_HANDLER_ATTESTATION: /* attestation.c */
    case CM_HANDLER_COUNT:
        break;
    }
    if (reply.status == 0) {
        reply_error(connection, &error, NULL);
    } else {
        reply.retry_after_s = reply.status == 503 ? RETRY_QUEUE_S : 0;
        exchange_finish(connection, reply.status, CM_END_STOP);
        reply_send(connection, &reply, body);
    }
    evbuffer_free(body);
}
