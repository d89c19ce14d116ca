/* Adapters: loaded, bound, drained and wiped while the worker serves.
 *
 * One at a time is loaded: its key comes in the key page, which is wiped as soon as the file's
 * front is opened with it; its file comes in chunks of sealed memory from the supervisor, as they
 * are asked for. Nothing of it is believed before it has passed, in this order: owner, header MAC,
 * slots MAC, signature, table, manifest, name and base, each segment's SHA-256 and tag, every
 * tensor. All memory is taken before READY. */
#ifndef CASEMATE_RUNTIME_WORKER_ADAPTERS_H
#define CASEMATE_RUNTIME_WORKER_ADAPTERS_H

#include "kernels/device.h"
#include "loader/package/manifest.h"
#include "loader/package/package.h"
#include "runtime/base/frame.h"

struct cm_worker;

#define CM_ADAPTER_MANIFEST_BYTES_MAX (512u << 10)

struct cm_worker_adapter {
    enum cm_adapter_state state; /* ABSENT, LOADING, SERVING, UNLOADING */
    uint64_t serial;             /* the supervisor's */
    uint64_t generation;         /* ours, never used twice: requests and kept pages name it */
};

struct cm_worker_adapters {
    uint32_t max; /* regions 1 .. max of the device; 0: there are none */
    struct cm_worker_adapter each[CM_ADAPTERS_MAX];
    uint64_t generations;
    /* the one that is being loaded */
    uint8_t *key_page; /* NULL: it has done its work */
    struct cm_package *package;
    struct cm_manifest_tensor *tensors;
    struct cm_adapter_layer *layers; /* [layers of the model] */
    struct cm_manifest_adapter manifest;
    struct cm_adapter_load load;
    struct cm_adapter_chunk wanted;
    uint64_t begun_us;
};

/* Take all memory; the device is reserved. */
CM_MUST_USE enum cm_status cm_adapters_make(struct cm_worker *worker, struct cm_error *err);
/* ADAPTER_LOAD, ADAPTER_BYTES and ADAPTER_UNLOAD. */
void cm_adapters_load(struct cm_worker *worker, const struct cm_adapter_load *load, int page);
void cm_adapters_bytes(struct cm_worker *worker, const struct cm_adapter_chunk *chunk, int fd);
void cm_adapters_unload(struct cm_worker *worker, const struct cm_adapter_step *step);
/* Wipe those that nobody uses any more. */
void cm_adapters_tick(struct cm_worker *worker);
/* The region of a generation, or CM_ADAPTER_NONE: it is not loaded, or about to go. */
uint32_t cm_adapters_region(const struct cm_worker_adapters *adapters, uint64_t generation);
void cm_adapters_wipe(struct cm_worker_adapters *adapters);

#endif
