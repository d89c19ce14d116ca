/* Prometheus text format 0.0.4. */
#include "runtime/gateway/metrics.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "runtime/gateway/moderation.h"
#include "runtime/gateway/text.h"

/* opentelemetry semantic conventions, gen_ai.server.* explicit bucket boundaries, seconds */
static const double first_token_bounds[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                            0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10};
static const double duration_bounds[] = {0.01, 0.02, 0.04, 0.08,  0.16,  0.32,  0.64,
                                         1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92};
static const double output_token_bounds[] = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2,
                                             0.3,  0.4,   0.5,  0.75,  1,   2.5};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const int statuses[CM_STATUS_SLOTS] = {200, 400, 401, 404, 405, 408, 409, 411, 413, 415,
                                              417, 422, 429, 431, 499, 500, 501, 503, 504, 505};

static const char *const end_names[CM_END_COUNT] = {
    [CM_END_STOP] = "stop",
    [CM_END_LENGTH] = "length",
    [CM_END_FILTER] = "content_filter",
    [CM_END_REFUSED] = "refused",
    [CM_END_CLIENT] = "client_gone",
    [CM_END_SLOW] = "client_slow",
    [CM_END_TIMEOUT] = "timeout",
    [CM_END_REVOKED] = "key_revoked",
    [CM_END_WORKER] = "worker_lost",
    [CM_END_REQUEST] = "bad_request",
};

const char *cm_end_name(enum cm_end end)
{
    return end_names[end];
}

static void observe(struct cm_histogram *histogram, const double *bounds, size_t count,
                    double seconds)
{
    size_t at = 0;
    while (at < count && seconds > bounds[at]) {
        at++;
    }
    histogram->counts[at]++;
    histogram->sum += seconds;
}

void cm_metrics_first_token(struct cm_metrics *metrics, double seconds)
{
    observe(&metrics->time_to_first_token, first_token_bounds, COUNT(first_token_bounds), seconds);
}

void cm_metrics_duration(struct cm_metrics *metrics, double seconds)
{
    observe(&metrics->request_duration, duration_bounds, COUNT(duration_bounds), seconds);
}

void cm_metrics_output_token(struct cm_metrics *metrics, double seconds)
{
    observe(&metrics->time_per_output_token, output_token_bounds, COUNT(output_token_bounds),
            seconds);
}

void cm_metrics_response(struct cm_metrics *metrics, const struct cm_route *route, int status)
{
    size_t row = route != NULL ? (size_t)route->handler : CM_ROUTE_COUNT;
    for (size_t i = 0; i < CM_STATUS_SLOTS; i++) {
        if (statuses[i] == status) {
            metrics->responses[row][i]++;
            return;
        }
    }
    CM_ASSERT(false && "a status outside the table");
}

/* The rows that the rules in use need are few; a worker gone wild fills one more, not memory. */
void cm_metrics_verdict(struct cm_metrics *metrics, const struct cm_wire_verdict *verdict)
{
    struct cm_verdict_row *row = metrics->verdicts;
    const struct cm_verdict_row *end = row + metrics->verdict_rows;
    while (row < end && (row->action != verdict->action || row->stage != verdict->stage ||
                         strcmp(row->category, verdict->category) != 0)) {
        row++;
    }
    if (row == end && metrics->verdict_rows < CM_VERDICT_ROWS) {
        metrics->verdict_rows++;
        row->action = verdict->action;
        row->stage = verdict->stage;
        snprintf(row->category, sizeof(row->category), "%s", verdict->category);
    }
    row->count++;
}

static void head(struct evbuffer *out, const char *name, const char *kind, const char *help)
{
    cm_text_format(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind);
}

static void single(struct evbuffer *out, const char *name, const char *kind, const char *help,
                   double value)
{
    head(out, name, kind, help);
    cm_text_format(out, "%s %.17g\n", name, value);
}

static void counter(struct evbuffer *out, const char *name, const char *help, uint64_t value)
{
    head(out, name, "counter", help);
    cm_text_format(out, "%s %" PRIu64 "\n", name, value);
}

static void histogram_write(struct evbuffer *out, const char *name, const char *help,
                            const struct cm_histogram *histogram, const double *bounds,
                            size_t count)
{
    uint64_t total = 0;
    head(out, name, "histogram", help);
    for (size_t i = 0; i < count; i++) {
        total += histogram->counts[i];
        cm_text_format(out, "%s_bucket{le=\"%g\"} %" PRIu64 "\n", name, bounds[i], total);
    }
    total += histogram->counts[count];
    cm_text_format(out, "%s_bucket{le=\"+Inf\"} %" PRIu64 "\n%s_sum %.9g\n%s_count %" PRIu64 "\n",
                   name, total, name, histogram->sum, name, total);
}

/* A label value: quotes, backslashes and line breaks escaped. */
static void label(struct evbuffer *out, const char *value)
{
    cm_json_text(out, value); /* the same escapes for all that a sound name can hold */
}

static void responses_write(const struct cm_metrics *metrics, struct evbuffer *out)
{
    head(out, "casemate_http_requests_total", "counter", "Replies by route and status.");
    for (size_t row = 0; row <= CM_ROUTE_COUNT; row++) {
        for (size_t i = 0; i < CM_STATUS_SLOTS; i++) {
            if (metrics->responses[row][i] > 0) {
                cm_text_format(
                    out, "casemate_http_requests_total{route=\"%s\",code=\"%d\"} %" PRIu64 "\n",
                    row < CM_ROUTE_COUNT ? cm_routes[row].path : "none", statuses[i],
                    metrics->responses[row][i]);
            }
        }
    }
    head(out, "casemate_generations_total", "counter", "Generation requests by how they ended.");
    for (size_t i = 0; i < CM_END_COUNT; i++) {
        cm_text_format(out, "casemate_generations_total{end=\"%s\"} %" PRIu64 "\n", end_names[i],
                       metrics->ends[i]);
    }
}

static void verdicts_write(const struct cm_metrics *metrics, struct evbuffer *out)
{
    head(out, "casemate_guard_verdicts_total", "counter",
         "What rules of the guard found, by category, action and stage.");
    for (uint32_t i = 0; i < metrics->verdict_rows; i++) {
        const struct cm_verdict_row *row = &metrics->verdicts[i];
        cm_text_format(out,
                       "casemate_guard_verdicts_total{category=\"%s\",action=\"%s\",stage=\"%s\"} "
                       "%" PRIu64 "\n",
                       row->category, cm_verdict_action_name(row->action),
                       cm_verdict_stage_name(row->stage), row->count);
    }
    if (metrics->verdicts[CM_VERDICT_ROWS].count > 0) {
        cm_text_format(out,
                       "casemate_guard_verdicts_total{category=\"other\",action=\"\",stage=\"\"} "
                       "%" PRIu64 "\n",
                       metrics->verdicts[CM_VERDICT_ROWS].count);
    }
}

static void counters_write(const struct cm_metrics *metrics, struct evbuffer *out)
{
    counter(out, "casemate_connections_total", "Connections accepted.", metrics->connections);
    counter(out, "casemate_connections_refused_total",
            "Connections over connections_max, or without memory.", metrics->connections_refused);
    counter(out, "casemate_tls_failures_total", "Handshakes that failed.", metrics->tls_failures);
    counter(out, "casemate_plain_http_total", "Plain text on the TLS port.", metrics->plain_http);
    counter(out, "casemate_key_refusals_total", "Requests without a valid key.",
            metrics->key_refusals);
    counter(out, "casemate_prompt_tokens_total", "Prompt tokens of finished requests.",
            metrics->prompt_tokens);
    counter(out, "casemate_cached_tokens_total", "Prompt tokens that were reused.",
            metrics->cached_tokens);
    counter(out, "casemate_completion_tokens_total", "Tokens generated for finished requests.",
            metrics->completion_tokens);
    counter(out, "casemate_worker_violations_total", "Malformed records from the worker.",
            metrics->worker_violations);
    counter(out, "casemate_quarantine_refusals_total", "Prompts refused that workers died over.",
            metrics->quarantine_refusals);
    histogram_write(out, "casemate_time_to_first_token_seconds",
                    "From the full head of the request to the first released text.",
                    &metrics->time_to_first_token, first_token_bounds, COUNT(first_token_bounds));
    histogram_write(out, "casemate_request_duration_seconds",
                    "From the full head of the request to its end.", &metrics->request_duration,
                    duration_bounds, COUNT(duration_bounds));
    histogram_write(out, "casemate_time_per_output_token_seconds",
                    "Mean time per token after the first, per request.",
                    &metrics->time_per_output_token, output_token_bounds,
                    COUNT(output_token_bounds));
}

static void ends_write(const struct cm_state *state, struct evbuffer *out)
{
    static const char *const roles[] = {"gateway", "keeper", "worker", "devtpm"};
    head(out, "casemate_role_ends_total", "counter", "Processes of roles by how they ended.");
    for (size_t role = 0; role < COUNT(roles); role++) {
        for (size_t end = 0; end < CM_ROLE_END_COUNT; end++) {
            cm_text_format(out, "casemate_role_ends_total{role=\"%s\",end=\"%s\"} %u\n",
                           roles[role], cm_role_ends[end].word, state->ends[role][end]);
        }
    }
}

static void state_write(const struct cm_metrics_now *now, struct evbuffer *out)
{
    static const char *const roles[] = {"supervisor", "gateway", "keeper", "worker", "devtpm"};
    const struct cm_state *state = now->state;
    single(out, "casemate_ready", "gauge", "1: requests are accepted.", now->ready);
    single(out, "casemate_draining", "gauge", "1: the service is stopping.", now->draining);
    single(out, "casemate_uptime_seconds", "gauge", "Age of this gateway.", now->uptime_seconds);
    single(out, "casemate_connections", "gauge", "Open connections.", now->connections);
    single(out, "casemate_requests_in_flight", "gauge", "Generation requests in flight.",
           now->requests);
    single(out, "casemate_suspects", "gauge", "Prompts that one worker died over.", now->suspects);
    single(out, "casemate_quarantined", "gauge", "Prompts that are refused: two workers died.",
           now->quarantined);
    single(out, "casemate_keys", "gauge", "API keys that are admitted.", now->keys);
    single(out, "casemate_keys_generation", "gauge", "Generation of the key table.",
           (double)now->keys_generation);
    single(out, "casemate_load_bytes", "gauge", "Bytes of weights loaded.",
           (double)state->load.bytes_done);
    single(out, "casemate_load_seconds", "gauge", "Time spent on the load.",
           (double)state->load.elapsed_us / 1e6);
    counter(out, "casemate_worker_restarts_total", "Replaced workers.", state->worker_restarts);
    counter(out, "casemate_gateway_restarts_total", "Replaced gateways.", state->gateway_restarts);
    single(out, "casemate_development_tpm", "gauge", "1: sealed to a development TPM only.",
           state->development_tpm);
    head(out, "casemate_resident_bytes", "gauge", "Resident memory by role.");
    for (size_t i = 0; i < COUNT(roles); i++) {
        if (state->resident_bytes[i] > 0) {
            cm_text_format(out, "casemate_resident_bytes{role=\"%s\"} %" PRIu64 "\n", roles[i],
                           state->resident_bytes[i]);
        }
    }
    ends_write(state, out);
}

static void worker_write(const struct cm_metrics_now *now, struct evbuffer *out)
{
    const struct cm_wire_stats *stats = now->stats;
    counter(out, "casemate_worker_steps_total", "Steps of the device.", stats->steps_total);
    counter(out, "casemate_worker_preemptions_total", "Requests that gave way for memory.",
            stats->preemptions_total);
    counter(out, "casemate_worker_prompt_tokens_total", "Prompt tokens computed.",
            stats->prompt_tokens_total);
    counter(out, "casemate_worker_completion_tokens_total", "Tokens generated.",
            stats->completion_tokens_total);
    single(out, "casemate_kv_pages", "gauge", "Pages of the key-value cache.", stats->kv_pages);
    single(out, "casemate_kv_pages_used", "gauge", "Pages in use.", stats->kv_pages_used);
    single(out, "casemate_kv_page_bytes", "gauge", "Of one page.",
           (double)now->hello->kv_page_bytes);
    if (now->last_step_age_seconds >= 0) {
        single(out, "casemate_last_step_age_seconds", "gauge", "Since the last finished step.",
               now->last_step_age_seconds);
    }
}

static void compatible(struct evbuffer *out, const char *name, const char *help, const char *model,
                       double value)
{
    head(out, name, "gauge", help);
    cm_text_format(out, "%s{model_name=", name);
    label(out, model);
    cm_text_format(out, "} %.9g\n", value);
}

static void compatibility_write(const struct cm_metrics_now *now, struct evbuffer *out)
{
    const struct cm_wire_stats *stats = now->stats;
    double used =
        stats->kv_pages > 0 ? (double)stats->kv_pages_used / (double)stats->kv_pages : 0.0;
    compatible(out, "vllm:num_requests_running", "Requests in the running batch.", now->model,
               stats->running);
    compatible(out, "vllm:num_requests_waiting", "Requests waiting.", now->model, stats->waiting);
    compatible(out, "vllm:kv_cache_usage_perc", "Key-value cache in use, 0 to 1.", now->model,
               used);
    head(out, "vllm:cache_config_info", "gauge", "Shape of the key-value cache.");
    cm_text_format(
        out,
        "vllm:cache_config_info{block_size=\"%u\",cache_dtype=\"%s\",num_gpu_blocks=\"%u\"} 1\n",
        now->hello->kv_page_positions, now->hello->kv_int8 == 1 ? "int8" : "fp16",
        now->hello->kv_pages);
    if (now->adapters_max > 0) {
        head(out, "vllm:lora_requests_info", "gauge", "Adapters that requests use now.");
        cm_text_format(out, "vllm:lora_requests_info{max_lora=\"%u\",running_lora_adapters=",
                       now->adapters_max);
        label(out, now->adapters_running);
        cm_text_put(out, ",waiting_lora_adapters=");
        label(out, now->adapters_waiting);
        cm_text_format(out, "} %lld\n", (long long)time(NULL));
    }
}

void cm_metrics_write(const struct cm_metrics *metrics, const struct cm_metrics_now *now,
                      struct evbuffer *out)
{
    head(out, "casemate_build_info", "gauge", "The build.");
    cm_text_put(out, "casemate_build_info{version=");
    label(out, now->version);
    cm_text_put(out, "} 1\n");
    responses_write(metrics, out);
    verdicts_write(metrics, out);
    counters_write(metrics, out);
    state_write(now, out);
    if (now->hello != NULL && now->stats != NULL) {
        worker_write(now, out);
        compatibility_write(now, out);
    }
}
