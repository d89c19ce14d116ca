/* The worker's side of the rings: reads each request as the worker must, and tells what it says. */
#include "tests/harness/gateway/harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/base/cursor.h"

#define STATS_MS       500
#define PART_BYTES_MAX 4096 /* of a message that are told */

void worker_init(struct worker *worker)
{
    *worker = (struct worker){.request_event = -1,
                              .response_event = -1,
                              .record = malloc(RECORD_BYTES_MAX),
                              .jobs = jobs_new(),
                              .hello_on = true,
                              .stats_on = true,
                              .stats = {.kv_pages = 100, .kv_pages_used = 25}};
    check(worker->record != NULL, "record");
}

static void rings_forget(struct worker *worker)
{
    if (worker->request_event >= 0) {
        cm_ring_close(&worker->requests);
        cm_ring_close(&worker->responses);
        close(worker->request_event);
        close(worker->response_event);
    }
    jobs_forget(worker);
}

void worker_done(struct worker *worker)
{
    rings_forget(worker);
    free(worker->jobs);
    free(worker->record);
}

void worker_attach(struct worker *worker, const int fds[static CM_RING_FD_COUNT])
{
    struct cm_error err;
    rings_forget(worker);
    check(cm_ring_open_consumer(&worker->requests, fds[0], fds[1], &err) == CM_OK &&
              cm_ring_open_producer(&worker->responses, fds[2], fds[3], &err) == CM_OK,
          "mapping");
    worker->request_event = fds[4];
    worker->response_event = fds[5];
}

static void sampling_print(const struct cm_sampling *s)
{
    printf(",\"temperature\":%.9g,\"top_p\":%.9g,\"min_p\":%.9g,\"top_k\":%u,"
           "\"frequency_penalty\":%.9g,\"presence_penalty\":%.9g,\"repetition_penalty\":%.9g,"
           "\"seed\":%llu",
           (double)s->temperature, (double)s->top_p, (double)s->min_p, s->top_k,
           (double)s->frequency_penalty, (double)s->presence_penalty, (double)s->repetition_penalty,
           (unsigned long long)s->seed);
}

static void hex_print(const uint8_t *bytes, size_t size)
{
    printf("\"");
    for (size_t i = 0; i < size; i++) {
        printf("%02x", bytes[i]);
    }
    printf("\"");
}

static void on_generate(struct worker *worker, uint64_t id, size_t bytes)
{
    struct cm_wire_generate wire;
    struct cm_cursor cursor = cm_cursor_init(worker->record, bytes);
    const uint8_t *at = NULL;
    uint32_t size = 0;
    cm_cursor_copy(&cursor, &wire, sizeof(wire));
    event_begin("generate");
    printf(",\"id\":%llu,\"kind\":%u,\"max_tokens\":%u,\"min_tokens\":%u,\"ignore_eos\":%u,"
           "\"tenant\":\"%016llx\"",
           (unsigned long long)id, wire.prompt_kind, wire.max_tokens, wire.min_tokens,
           wire.ignore_eos, (unsigned long long)wire.tenant);
    sampling_print(&wire.sampling);
    printf(",\"stops\":[");
    for (uint32_t i = 0; i < wire.stop_count; i++) {
        size = cm_cursor_u32(&cursor);
        at = cm_cursor_take(&cursor, size);
        check(at != NULL, "stop beyond the record");
        printf("%s", i > 0 ? "," : "");
        hex_print(at, size);
    }
    printf("],\"parts\":[");
    for (uint32_t i = 0; i < wire.part_count; i++) {
        uint32_t role = cm_cursor_u32(&cursor);
        size = cm_cursor_u32(&cursor);
        at = cm_cursor_take(&cursor, size);
        check(at != NULL, "part beyond the record");
        printf("%s[%u,", i > 0 ? "," : "", role);
        hex_print(at, size < PART_BYTES_MAX ? size : PART_BYTES_MAX);
        printf("]");
    }
    printf("],\"exact\":%s", cm_cursor_left(&cursor) == 0 ? "true" : "false");
    event_end();
    check(wire.part_count > 0, "a request without a message");
    char *text = strndup((const char *)at, size);
    check(text != NULL, "text");
    jobs_start(worker, id, &wire, text);
    free(text);
}

static void on_cancel(struct worker *worker, uint64_t id)
{
    event("cancel", ",\"id\":%llu", (unsigned long long)id);
    jobs_cancel(worker, id);
}

void worker_read(struct worker *worker)
{
    struct cm_record record;
    struct cm_error err;
    uint64_t count;
    ssize_t got = read(worker->request_event, &count, sizeof(count));
    (void)got; /* the ring says what there is */
    while (cm_ring_get(&worker->requests, &record, worker->record, RECORD_BYTES_MAX, &err) ==
           CM_OK) {
        if (record.type == CM_WIRE_GENERATE) {
            on_generate(worker, record.request, record.bytes);
        } else if (record.type == CM_WIRE_CANCEL) {
            on_cancel(worker, record.request);
        } else {
            die("a record of an unknown type");
        }
        record_bell(worker); /* there is room again */
    }
}

bool worker_turn(struct worker *worker)
{
    if (!jobs_step(worker)) {
        return false;
    }
    if (worker->stats_on && worker->hello_on && now_ms() - worker->stats_ms > STATS_MS) {
        worker->stats_ms = now_ms();
        worker->stats.steps_total++;
        (void)stats_put(worker); /* a full ring may miss one */
    }
    return true;
}
