/* The records that an honest worker writes. Figures are constants: tests find them again in replies
 * and metrics. */
#include "tests/harness/gateway/harness.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

void record_bell(struct worker *worker)
{
    const uint64_t one = 1;
    ssize_t written = write(worker->response_event, &one, sizeof(one));
    (void)written; /* fails only where the event is set already */
}

bool record_put(struct worker *worker, uint32_t type, uint64_t id, const void *a, size_t a_bytes,
                const void *b, size_t b_bytes)
{
    struct cm_error err;
    enum cm_status status = cm_ring_put(&worker->responses, type, id, a, a_bytes, b, b_bytes, &err);
    check(status == CM_OK || status == CM_E_BUSY, err.text);
    record_bell(worker);
    return status == CM_OK;
}

bool stats_put(struct worker *worker)
{
    worker->stats.last_step_us = now_us();
    return record_put(worker, CM_WIRE_STATS, 0, &worker->stats, sizeof(worker->stats), NULL, 0);
}

void hello_put(struct worker *worker)
{
    struct cm_wire_hello hello = {.context_max = 2048,
                                  .vocabulary = 1000,
                                  .sequences_max = 4,
                                  .queue_max = 4,
                                  .kv_pages = 100,
                                  .kv_page_positions = 32,
                                  .created_unix_s = 1700000000};
    snprintf(hello.model_name, sizeof(hello.model_name), "test-model");
    memset(hello.package_digest, 'a', sizeof(hello.package_digest) - 1);
    snprintf(hello.device, sizeof(hello.device), "none");
    if (worker->hello_on) {
        check(record_put(worker, CM_WIRE_HELLO, 0, &hello, sizeof(hello), NULL, 0), "hello");
        check(stats_put(worker), "stats");
    }
}

void accepted_put(struct worker *worker, uint64_t id, uint32_t max_tokens)
{
    struct cm_wire_accepted accepted = {.prompt_tokens = 7, .max_tokens = max_tokens};
    check(record_put(worker, CM_WIRE_ACCEPTED, id, &accepted, sizeof(accepted), NULL, 0),
          "accepted");
}

void verdict_put(struct worker *worker, uint64_t id, uint32_t stage, uint32_t action,
                 const char *rule)
{
    struct cm_wire_verdict verdict = {
        .category = "test/one", .action = action, .stage = stage, .offset = 7, .bytes = 5};
    snprintf(verdict.rule, sizeof(verdict.rule), "%s", rule);
    check(record_put(worker, CM_WIRE_VERDICT, id, &verdict, sizeof(verdict), NULL, 0), "verdict");
}

void refused_put(struct worker *worker, uint64_t id, const char *why)
{
    static const char *const reasons[] = {
        [CM_REFUSAL_CONTEXT] = "context", [CM_REFUSAL_QUEUE] = "queue",
        [CM_REFUSAL_INPUT] = "input",     [CM_REFUSAL_DRAIN] = "drain",
        [CM_REFUSAL_FAILED] = "failed",   [CM_REFUSAL_EMPTY] = "empty",
        [CM_REFUSAL_FILTER] = "filter"};
    struct cm_wire_refused refused = {.prompt_tokens = 5000, .limit = 2048};
    const char *rest = why;
    for (uint32_t i = CM_REFUSAL_CONTEXT; i < sizeof(reasons) / sizeof(reasons[0]); i++) {
        if (begins(why, reasons[i], &rest)) {
            refused.reason = i;
        }
    }
    check(refused.reason != CM_REFUSAL_NONE, "a refusal without its reason");
    if (refused.reason == CM_REFUSAL_FILTER) {
        verdict_put(worker, id, CM_VERDICT_INPUT, CM_VERDICT_REPORT, "a-report");
        verdict_put(worker, id, CM_VERDICT_INPUT, CM_VERDICT_REFUSE, "a-refusal");
    }
    check(record_put(worker, CM_WIRE_REFUSED, id, &refused, sizeof(refused), NULL, 0), "refused");
}
