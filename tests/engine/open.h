/* A sealed package on a device without roles: what the test engine and the bench share. */
#ifndef CASEMATE_TESTS_ENGINE_OPEN_H
#define CASEMATE_TESTS_ENGINE_OPEN_H

#include "kernels/cpu/cpu_internal.h"
#include "loader/stream/stream.h"
#include "runtime/worker/bind.h"

struct engine {
    struct cm_device *device;
    struct cm_package *package;
    struct cm_manifest manifest;
    struct cm_worker_model model;
    struct cm_stream_times times;
    uint32_t *pages; /* [page_count] in no order of memory */
    uint32_t page_count;
    uint32_t adapter; /* that new slots get; CM_ADAPTER_NONE */
};

struct engine_limits {
    uint32_t slots, context, pages, step_tokens;
};

/* CASEMATE_ADAPTER and CASEMATE_ADAPTER_KEY name an adapter's package and key: it is bound, and
 * slots get it. CASEMATE_CPU and CASEMATE_THREADS force path and threads, CASEMATE_KV=int8 what K
 * and V are kept as, CASEMATE_PROMPTS=bf16 class P, CASEMATE_CONTEXT the context of a
 * configuration, by which RoPE's factors are chosen. Errors end the process with their text and
 * exit code. */
void engine_must(enum cm_status status, const struct cm_error *err);
void engine_open(struct engine *e, const char *path, const char *key_path,
                 const struct engine_limits *limits);
void engine_close(struct engine *e);
/* A greedy slot that never ends by itself. */
uint32_t engine_slot(struct engine *e);

#endif
