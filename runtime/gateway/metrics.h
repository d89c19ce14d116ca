/* Counters and histograms, and the Prometheus text of them.
 *
 * Own names are casemate_…_seconds/_bytes/_total. Beside them stands a compatibility set under the
 * names that routers read from vLLM; it holds only what is true here. A test fixes both; a name is
 * never changed without both names for two releases. Bucket bounds are those of the OpenTelemetry
 * GenAI server metrics. */
#ifndef CASEMATE_RUNTIME_GATEWAY_METRICS_H
#define CASEMATE_RUNTIME_GATEWAY_METRICS_H

#include <event2/buffer.h>

#include "runtime/base/frame.h"
#include "runtime/base/wire.h"
#include "runtime/gateway/routes.h"

#define CM_BUCKETS_MAX 16

struct cm_histogram {
    uint64_t counts[CM_BUCKETS_MAX + 1]; /* last: above all bounds */
    double sum;
};

enum cm_end {
    CM_END_STOP,
    CM_END_LENGTH,
    CM_END_FILTER,
    CM_END_REFUSED, /* by the worker */
    CM_END_CLIENT,  /* the client went away */
    CM_END_SLOW,    /* the client did not read */
    CM_END_TIMEOUT, /* request_timeout_ms or drain deadline */
    CM_END_REVOKED, /* the key was revoked in mid-reply */
    CM_END_WORKER,  /* the worker died or failed */
    CM_END_REQUEST, /* the body was refused or never came */
    CM_END_COUNT
};
const char *cm_end_name(enum cm_end end);

#define CM_STATUS_SLOTS 20

#define CM_VERDICT_ROWS 64 /* categories by action and stage; beyond them "other" */
struct cm_verdict_row {
    char category[CM_CATEGORY_BYTES];
    uint32_t action, stage;
    uint64_t count;
};

struct cm_metrics {
    uint64_t responses[CM_ROUTE_COUNT + 1][CM_STATUS_SLOTS]; /* last row: no route */
    uint64_t ends[CM_END_COUNT];
    uint64_t connections;
    uint64_t connections_refused;
    uint64_t tls_failures;
    uint64_t plain_http;
    uint64_t key_refusals;
    uint64_t prompt_tokens;
    uint64_t cached_tokens;
    uint64_t completion_tokens;
    uint64_t worker_violations;
    uint32_t verdict_rows;
    struct cm_verdict_row verdicts[CM_VERDICT_ROWS + 1];
    uint64_t quarantine_refusals;
    struct cm_histogram time_to_first_token;
    struct cm_histogram request_duration;
    struct cm_histogram time_per_output_token;
};

/* What is read at the moment of a scrape; pointers may be NULL where nothing is known yet. */
struct cm_metrics_now {
    const char *version;
    const char *model;
    uint32_t connections;
    uint32_t requests;
    bool ready;
    bool draining;
    double uptime_seconds;
    uint64_t keys_generation;
    uint32_t suspects, quarantined;
    uint32_t keys;
    const struct cm_state *state;
    const struct cm_wire_hello *hello;
    const struct cm_wire_stats *stats;
    double last_step_age_seconds; /* < 0: unknown */
    uint32_t adapters_max;
    const char *adapters_running, *adapters_waiting; /* names that requests use, with commas */
};

void cm_metrics_response(struct cm_metrics *metrics, const struct cm_route *route, int status);
void cm_metrics_first_token(struct cm_metrics *metrics, double seconds);
void cm_metrics_duration(struct cm_metrics *metrics, double seconds);
void cm_metrics_output_token(struct cm_metrics *metrics, double seconds);
void cm_metrics_verdict(struct cm_metrics *metrics, const struct cm_wire_verdict *verdict);
void cm_metrics_write(const struct cm_metrics *metrics, const struct cm_metrics_now *now,
                      struct evbuffer *out);

#endif
