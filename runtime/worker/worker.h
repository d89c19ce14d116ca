/* The worker role: loads once, then serves until it is told to stop. */
#ifndef CASEMATE_RUNTIME_WORKER_WORKER_H
#define CASEMATE_RUNTIME_WORKER_WORKER_H

#include "kernels/device.h"
#include "loader/package/manifest.h"
#include "loader/package/package.h"
#include "loader/stream/stream.h"
#include "runtime/base/frame.h"
#include "runtime/base/log.h"
#include "runtime/base/ring.h"
#include "runtime/worker/adapters.h"
#include "runtime/worker/bind.h"
#include "runtime/worker/chat.h"
#include "runtime/worker/scheduler.h"
#include "sandbox/confine.h"

struct cm_worker {
    struct cm_channel channel;
    struct cm_log log;
    struct cm_confinement confinement;
    struct cm_config_worker config;
    uint8_t *rules; /* the rule pack; NULL: the guard is off */
    uint32_t rules_bytes;
    struct cm_package *package;
    struct cm_manifest manifest;
    struct cm_worker_model model;
    struct cm_device *device;
    struct cm_tokenizer *tokenizer;
    struct cm_chat *chat;
    struct cm_scheduler *scheduler;
    struct cm_worker_adapters adapters;
    struct cm_scheduler_limits limits;
    struct cm_wire_hello hello;
    struct cm_ring requests, responses;
    int request_event, response_event;
    int ring_fds[CM_RING_FD_COUNT]; /* until rings_open takes them */
    int key_page;                   /* -1: none */
    bool rings_open;
    uint8_t *payload; /* one request record */
    size_t payload_bytes;
    bool wake; /* something was put since the gateway was last woken */
    bool draining, drained, stopping;
    uint64_t heartbeats, heartbeat_us, stats_us;
};

/* The RULES frame, where the configuration says that it comes. */
CM_MUST_USE enum cm_status cm_worker_rules_take(struct cm_worker *worker, struct cm_error *err);
/* What needs no key: the device, its memory, the rules. It goes on beside the TPM. */
CM_MUST_USE enum cm_status cm_worker_prepare(struct cm_worker *worker, struct cm_error *err);
/* The KEY_PAGE frame, however long the TPM takes; or STOP, which sets `stopping`. */
CM_MUST_USE enum cm_status cm_worker_key_wait(struct cm_worker *worker, struct cm_error *err);
/* Key page → package → device → scheduler. On return the key page is wiped, and it and descriptor 5
 * are closed, whatever happened. Sends PROGRESS and, on success, LOADED. */
CM_MUST_USE enum cm_status cm_worker_load(struct cm_worker *worker, struct cm_error *err);
/* Rings at their fixed descriptors or from a RINGS frame; the first record is HELLO. */
CM_MUST_USE enum cm_status cm_worker_rings_open(struct cm_worker *worker,
                                                const int fds[CM_RING_FD_COUNT],
                                                struct cm_error *err);
/* Until STOP, or the supervisor is gone. */
CM_MUST_USE enum cm_status cm_worker_serve(struct cm_worker *worker, struct cm_error *err);
/* Wipe weights, prompts and replies; the process ends after it. */
void cm_worker_wipe(struct cm_worker *worker);

#endif
