/* The scheduler: requests in, mixed steps to the device, released bytes out.
 *
 * Continuous batching over paged KV. A request waits, runs (a device slot and KV pages are its
 * own), may be preempted (pages go back, the slot stays, its tokens are computed again later) and
 * ends. All memory is taken in _new. Single-threaded. What it says goes out through `emit`, which
 * may answer "no room": then the sequence keeps its bytes and is not stepped until there is room.
 */
#ifndef CASEMATE_RUNTIME_WORKER_SCHEDULER_H
#define CASEMATE_RUNTIME_WORKER_SCHEDULER_H

#include "kernels/device.h"
#include "runtime/base/wire.h"

struct cm_scheduler;

struct cm_scheduler_limits {
    uint32_t sequences_max; /* device slots */
    uint32_t queue_max;     /* requests beyond those */
    uint32_t kv_pages;
    uint32_t context_max;
    uint32_t step_tokens_max;
    bool prefix_cache;  /* keep full KV pages for equal prefixes of one tenant (pages.h) */
    bool steps_bounded; /* prompts fill a step only so far that decodes are not held up (batch_make)
                         */
};

/* One record for the gateway. False: no room now; the same record is offered again later. */
typedef bool (*cm_scheduler_emit)(void *context, enum cm_wire_type type, uint64_t request,
                                  const void *part1, size_t bytes1, const void *part2,
                                  size_t bytes2);

/* Borrows the device, which must be bound. */
CM_MUST_USE enum cm_status cm_scheduler_new(struct cm_device *device,
                                            const struct cm_scheduler_limits *limits,
                                            cm_scheduler_emit emit, void *emit_context,
                                            struct cm_scheduler **ret_scheduler,
                                            struct cm_error *err);
/* Prompts and requests; only free is allowed after it. */
void cm_scheduler_wipe(struct cm_scheduler *scheduler);
void cm_scheduler_free(struct cm_scheduler *scheduler); /* wipes tokens; NULL is fine */

struct cm_scheduler_request {
    uint64_t id;
    uint64_t tenant;
    uint64_t adapter;           /* generation of slot.adapter; 0: none. Equal prefixes are of one */
    uint32_t max_tokens;        /* 0: up to the context */
    struct cm_slot_params slot; /* max_tokens is set by the scheduler */
};

/* Where the next request's prompt may be tokenised to: room for context_max ids, or NULL if the
 * queue is full. Stays valid until submit. */
uint32_t *cm_scheduler_prompt(struct cm_scheduler *scheduler);
/* Submit what lies in cm_scheduler_prompt. Emits ACCEPTED, or REFUSED with the reason: there must
 * be room for one record. */
void cm_scheduler_submit(struct cm_scheduler *scheduler, const struct cm_scheduler_request *request,
                         uint32_t prompt_tokens);
/* Free what a request has, wherever it is, and emit DONE (CANCELLED), now or when there is room.
 * Ids that are unknown, or whose DONE is on its way, are ignored. */
void cm_scheduler_cancel(struct cm_scheduler *scheduler, uint64_t id);
/* Forget all; emits nothing: whoever asked them is gone. */
void cm_scheduler_cancel_all(struct cm_scheduler *scheduler);

/* Does any request, running or waiting, use the adapter of this generation? */
bool cm_scheduler_uses(const struct cm_scheduler *scheduler, uint64_t adapter);
/* It is used by none any more: what is kept of it is wiped. */
void cm_scheduler_forget(struct cm_scheduler *scheduler, uint64_t adapter);
/* Anything to do? False: step would do nothing. */
bool cm_scheduler_busy(const struct cm_scheduler *scheduler);
/* One mixed step. Fails only where the device fails: every request is then over. */
CM_MUST_USE enum cm_status cm_scheduler_step(struct cm_scheduler *scheduler, struct cm_error *err);

/* Prompt tokens for a step with decodes, from what those take and what a prompt token adds (0: not
 * known yet); at most `most`. */
uint32_t cm_scheduler_prompt_share(uint64_t decodes_ns, uint64_t prompt_token_ns, uint32_t most);

void cm_scheduler_stats(const struct cm_scheduler *scheduler, struct cm_wire_stats *ret_stats);

#endif
