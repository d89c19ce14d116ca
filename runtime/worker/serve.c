/* Serving: rings, control frames, and one scheduler step after another while there is work. */
#include "runtime/worker/worker.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "runtime/worker/intake.h"
#include "runtime/base/clock.h"

#define TICK_US 1000000u

static void gateway_wake(struct cm_worker *worker)
{
    uint64_t one = 1;
    if (worker->wake && worker->rings_open) {
        ssize_t written = write(worker->response_event, &one, sizeof(one));
        (void)written; /* EAGAIN: it is awake already */
    }
    worker->wake = false;
}

static void record_put(struct cm_worker *worker, enum cm_wire_type type, uint64_t request,
                       const void *bytes, size_t size)
{
    /* HELLO goes into an empty ring; STATS may be lost when it is full. */
    if (cm_ring_put(&worker->responses, (uint32_t)type, request, bytes, size, NULL, 0, NULL) ==
        CM_OK) {
        worker->wake = true;
    }
}

enum cm_status cm_worker_rings_open(struct cm_worker *worker, const int fds[CM_RING_FD_COUNT],
                                    struct cm_error *err)
{
    struct cm_ring requests = {.data = NULL}, responses = {.data = NULL};
    enum cm_status status = cm_ring_open_consumer(&requests, fds[0], fds[1], err);
    if (status == CM_OK) {
        status = cm_ring_open_producer(&responses, fds[2], fds[3], err);
    }
    if (status != CM_OK) {
        cm_ring_close(&requests);
        return status;
    }
    if (worker->requests.data != NULL) { /* also where the gateway broke it */
        cm_scheduler_cancel_all(worker->scheduler);
        cm_ring_close(&worker->requests);
        cm_ring_close(&worker->responses);
        close(worker->request_event);
        close(worker->response_event);
    }
    worker->requests = requests;
    worker->responses = responses;
    worker->request_event = fds[4];
    worker->response_event = fds[5];
    worker->rings_open = true;
    for (int i = 0; i < 4; i++) {
        close(fds[i]);
    }
    record_put(worker, CM_WIRE_HELLO, 0, &worker->hello, sizeof(worker->hello));
    gateway_wake(worker);
    return CM_OK;
}

static void refuse(struct cm_worker *worker, uint64_t id, enum cm_refusal reason)
{
    struct cm_wire_refused refused = {.reason = (uint32_t)reason};
    record_put(worker, CM_WIRE_REFUSED, id, &refused, sizeof(refused));
}

/* Whatever becomes of it, the payload is wiped; so is a prompt that is not submitted. What the
 * guard found is said first. */
static void generate_take(struct cm_worker *worker, uint64_t id, size_t bytes)
{
    const struct cm_intake intake = {worker->device, worker->chat, worker->tokenizer,
                                     &worker->manifest};
    struct cm_scheduler_request request = {.id = id};
    struct cm_prompt_verdicts verdicts;
    struct cm_token_list list = {.ids = cm_scheduler_prompt(worker->scheduler),
                                 .capacity = worker->limits.context_max};
    if (worker->draining || list.ids == NULL) {
        refuse(worker, id, worker->draining ? CM_REFUSAL_DRAIN : CM_REFUSAL_QUEUE);
        explicit_bzero(worker->payload, bytes);
        return;
    }
    enum cm_refusal refusal =
        cm_intake_parse(&intake, worker->payload, bytes, &request, &list, &verdicts);
    for (uint32_t i = 0; i < verdicts.count; i++) {
        record_put(worker, CM_WIRE_VERDICT, id, &verdicts.each[i], sizeof(verdicts.each[i]));
    }
    if (refusal == CM_REFUSAL_NONE && request.adapter != 0) {
        request.slot.adapter = cm_adapters_region(&worker->adapters, request.adapter);
        refusal = request.slot.adapter == CM_ADAPTER_NONE ? CM_REFUSAL_ADAPTER : CM_REFUSAL_NONE;
    }
    if (refusal == CM_REFUSAL_NONE) {
        cm_scheduler_submit(worker->scheduler, &request, list.count);
    } else {
        refuse(worker, id, refusal);
        explicit_bzero(list.ids, list.capacity * sizeof(*list.ids));
    }
    explicit_bzero(worker->payload, bytes);
}

/* A refusal must not be lost: nothing is taken that could not be refused. The gateway wakes us when
 * it has read. */
static bool refusal_fits(const struct cm_worker *worker)
{
    return cm_ring_pending(&worker->responses) <= worker->responses.capacity / 2;
}

/* Take all records that are there. A ring that breaks its rules is given up, and its gateway by the
 * supervisor. */
static void requests_take(struct cm_worker *worker)
{
    struct cm_record record;
    struct cm_error err;
    enum cm_status status = CM_E_BUSY;
    while (refusal_fits(worker) &&
           (status = cm_ring_get(&worker->requests, &record, worker->payload, worker->payload_bytes,
                                 &err)) == CM_OK) {
        if (record.type == CM_WIRE_GENERATE) {
            generate_take(worker, record.request, record.bytes);
        } else if (record.type == CM_WIRE_CANCEL) {
            cm_scheduler_cancel(worker->scheduler, record.request);
        } else {
            CM_LOG(&worker->log, CM_LOG_WARN, "unknown_record", CM_LOG_I("type", record.type));
        }
    }
    if (status != CM_E_BUSY && status != CM_OK) {
        cm_log_error(&worker->log, "ring_broken", &err);
        cm_scheduler_cancel_all(worker->scheduler);
        worker->rings_open = false;
        (void)!cm_channel_send(&worker->channel, CM_FRAME_BROKEN, NULL, 0, NULL, 0, NULL);
    }
}

static void adapter_frame_take(struct cm_worker *worker, struct cm_frame *frame)
{
    union {
        struct cm_adapter_load load;
        struct cm_adapter_chunk chunk;
        struct cm_adapter_step step;
    } payload;
    memcpy(&payload, frame->payload, frame->bytes); /* the table has held it to its size */
    if (frame->type == CM_FRAME_ADAPTER_LOAD) {
        cm_adapters_load(worker, &payload.load, frame->fds[0]);
    } else if (frame->type == CM_FRAME_ADAPTER_BYTES) {
        cm_adapters_bytes(worker, &payload.chunk, frame->fds[0]);
    } else {
        cm_adapters_unload(worker, &payload.step);
    }
    cm_frame_close_fds(frame);
}

static enum cm_status frame_take(struct cm_worker *worker, struct cm_frame *frame,
                                 struct cm_error *err)
{
    switch (frame->type) {
    case CM_FRAME_RINGS:
        return cm_worker_rings_open(worker, frame->fds, err);
    case CM_FRAME_DRAIN:
        worker->draining = true;
        return CM_OK;
    case CM_FRAME_STOP:
        worker->stopping = true;
        return CM_OK;
    case CM_FRAME_ADAPTER_LOAD:
    case CM_FRAME_ADAPTER_BYTES:
    case CM_FRAME_ADAPTER_UNLOAD:
        adapter_frame_take(worker, frame);
        return CM_OK;
    default:
        cm_frame_close_fds(frame);
        return cm_error_set(err, CM_E_BUG, "CM-WRK-FRAME", "frame %u has no handler", frame->type);
    }
}

static enum cm_status control_take(struct cm_worker *worker, struct cm_error *err)
{
    static struct cm_frame frame;
    enum cm_status status;
    while ((status = cm_channel_receive(&worker->channel, &frame, err)) == CM_OK) {
        status = frame_take(worker, &frame, err);
        if (status != CM_OK) {
            return status;
        }
    }
    if (status == CM_E_SYSTEM && err->subcode == EPIPE) {
        worker->stopping = true; /* no supervisor, no service */
        return CM_OK;
    }
    return status == CM_E_BUSY ? CM_OK : status;
}

/* Once a second: alive to the supervisor, figures to the gateway. */
static void tick(struct cm_worker *worker)
{
    struct cm_wire_stats stats;
    uint64_t now = cm_clock_us();
    if (now - worker->heartbeat_us < TICK_US) {
        return;
    }
    worker->heartbeat_us = now;
    cm_scheduler_stats(worker->scheduler, &stats);
    struct cm_heartbeat heartbeat = {.counter = worker->heartbeats++,
                                     .last_step_us = stats.last_step_us,
                                     .running = stats.running,
                                     .waiting = stats.waiting};
    (void)!cm_channel_send(&worker->channel, CM_FRAME_HEARTBEAT, &heartbeat, sizeof(heartbeat),
                           NULL, 0, NULL);
    if (worker->rings_open) {
        cm_ring_scrub(&worker->responses);
        record_put(worker, CM_WIRE_STATS, 0, &stats, sizeof(stats));
    }
}

/* Nothing in flight, nothing unread by the gateway. */
static void drained_say(struct cm_worker *worker)
{
    bool empty = !worker->rings_open || cm_ring_pending(&worker->responses) == 0;
    if (worker->draining && !worker->drained && !cm_scheduler_busy(worker->scheduler) && empty) {
        worker->drained =
            cm_channel_send(&worker->channel, CM_FRAME_DRAINED, NULL, 0, NULL, 0, NULL) == CM_OK;
    }
}

/* Wait for something to do; with work at hand only look. */
static void wait_for_work(struct cm_worker *worker, bool busy)
{
    struct pollfd polled[2] = {
        {.fd = worker->channel.fd, .events = POLLIN},
        {.fd = worker->rings_open ? worker->request_event : -1, .events = POLLIN}};
    uint64_t count;
    int timeout = busy ? 0 : (worker->draining && !worker->drained ? 10 : 500);
    if (poll(polled, 2, timeout) > 0 && (polled[1].revents & POLLIN) != 0) {
        ssize_t got = read(worker->request_event, &count, sizeof(count));
        (void)got;
    }
}

enum cm_status cm_worker_serve(struct cm_worker *worker, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    uint64_t steps = 0;
    while (status == CM_OK && !worker->stopping) {
        struct cm_wire_stats stats;
        bool busy = worker->rings_open && cm_scheduler_busy(worker->scheduler);
        wait_for_work(worker, busy);
        status = control_take(worker, err);
        if (status == CM_OK && worker->rings_open) {
            requests_take(worker);
        }
        if (status == CM_OK && cm_scheduler_busy(worker->scheduler)) {
            status = cm_scheduler_step(worker->scheduler, err);
            cm_scheduler_stats(worker->scheduler, &stats);
            if (stats.steps_total == steps) {
                (void)poll(NULL, 0, 1); /* all sequences wait for room in the ring */
            }
            steps = stats.steps_total;
        }
        cm_adapters_tick(worker);
        tick(worker);
        gateway_wake(worker);
        drained_say(worker);
    }
    return status;
}
