/* Loading an adapter between two steps, a chunk at a time. */
#include "runtime/worker/adapters.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "runtime/base/clock.h"
#include "runtime/base/hex.h"
#include "runtime/worker/bind.h"
#include "runtime/worker/worker.h"

_Static_assert(CM_ADAPTERS_MAX <= CM_ADAPTER_REGIONS_MAX, "each adapter has a region");

#define HEAP_BYTES  (1u << 20) /* what libcrypto takes for a signature is some ten KiB */
#define TENSORS_MAX CM_MANIFEST_ADAPTER_TENSORS_MAX

static uint32_t region_of(uint32_t place)
{
    return place + 1;
}

enum cm_status cm_adapters_make(struct cm_worker *worker, struct cm_error *err)
{
    struct cm_worker_adapters *a = &worker->adapters;
    const struct cm_package_core *core = &cm_package_head_of(worker->package)->core;
    a->max = worker->config.adapters_max < CM_ADAPTERS_MAX ? worker->config.adapters_max
                                                           : CM_ADAPTERS_MAX;
    if (a->max == 0) {
        return CM_OK;
    }
    const size_t tensor_bytes = TENSORS_MAX * sizeof(*a->tensors);
    const size_t layer_bytes = worker->model.model.layers * sizeof(*a->layers);
    a->tensors = malloc(tensor_bytes);
    a->layers = malloc(layer_bytes);
    if (a->tensors == NULL || a->layers == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "adapters");
    }
    /* Touched now, so that it is there later. */
    explicit_bzero(a->tensors, tensor_bytes);
    explicit_bzero(a->layers, layer_bytes);
    uint64_t segments =
        (worker->config.adapter_bytes_max + core->segment_bytes - 1) / core->segment_bytes;
    enum cm_status status =
        cm_package_room(CM_ADAPTER_MANIFEST_BYTES_MAX, segments, &a->package, err);
    if (status != CM_OK) {
        return status;
    }
    /* From here on malloc only takes from what is there and never gives back. */
    void *heap = mallopt(M_TRIM_THRESHOLD, INT32_MAX) == 1 &&
                         mallopt(M_MMAP_THRESHOLD, 4 * (int)HEAP_BYTES) == 1
                     ? malloc(HEAP_BYTES)
                     : NULL;
    if (heap == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "heap for the cipher library");
    }
    explicit_bzero(heap, HEAP_BYTES);
    free(heap);
    return CM_OK;
}

uint32_t cm_adapters_region(const struct cm_worker_adapters *a, uint64_t generation)
{
    for (uint32_t i = 0; i < a->max; i++) {
        if (a->each[i].state == CM_ADAPTER_SERVING && a->each[i].generation == generation) {
            return region_of(i);
        }
    }
    return CM_ADAPTER_NONE;
}

/* ------------------------------------------------------------------ what the supervisor hears */

static void tell(struct cm_worker *worker, struct cm_adapter_told *told)
{
    struct cm_error err;
    if (cm_channel_send(&worker->channel, CM_FRAME_ADAPTER_STATE, told, sizeof(*told), NULL, 0,
                        &err) != CM_OK) {
        cm_log_error(&worker->log, "adapter_untold", &err);
    }
}

/* The next chunk: `bytes` from `offset` on, or as much of it as the file has. */
static void want(struct cm_worker *worker, uint64_t offset)
{
    struct cm_worker_adapters *a = &worker->adapters;
    const uint64_t left = a->load.file_bytes - offset;
    struct cm_error err;
    a->wanted = (struct cm_adapter_chunk){
        .serial = a->load.serial,
        .offset = offset,
        .bytes = (uint32_t)(left < CM_ADAPTER_CHUNK_BYTES ? left : CM_ADAPTER_CHUNK_BYTES)};
    if (cm_channel_send(&worker->channel, CM_FRAME_ADAPTER_READ, &a->wanted, sizeof(a->wanted),
                        NULL, 0, &err) != CM_OK) {
        cm_log_error(&worker->log, "adapter_untold", &err);
    }
}

/* For both sides at once. */
static void page_wipe(struct cm_worker_adapters *a)
{
    if (a->key_page != NULL) {
        cm_wipe(a->key_page, CM_KEY_PAGE_BYTES);
        cm_key_page_unmap(a->key_page);
        a->key_page = NULL;
    }
}

/* No load is under way any more: keys, manifest and the page are wiped. */
static void load_end(struct cm_worker_adapters *a)
{
    page_wipe(a);
    cm_package_room_wipe(a->package);
    cm_wipe(a->tensors, TENSORS_MAX * sizeof(*a->tensors));
    memset(&a->manifest, 0, sizeof(a->manifest));
    memset(&a->load, 0, sizeof(a->load));
    memset(&a->wanted, 0, sizeof(a->wanted));
}

/* Nothing of it stays; the service goes on. */
static void load_fail(struct cm_worker *worker, enum cm_adapter_state state,
                      const struct cm_error *why)
{
    struct cm_worker_adapters *a = &worker->adapters;
    const uint32_t place = a->load.place;
    struct cm_adapter_told told = {.serial = a->load.serial, .state = (uint32_t)state};
    if (why != NULL) {
        told.error = *why;
        (void)cm_error_wrap(&told.error, "adapter %s", a->load.name);
        cm_log_error(&worker->log, "adapter_refused", &told.error);
    }
    cm_device_adapter_unbind(worker->device, region_of(place));
    a->each[place] = (struct cm_worker_adapter){.state = CM_ADAPTER_ABSENT};
    load_end(a);
    tell(worker, &told);
}

/* ------------------------------------------------------------------ the front: all but weights */

/* An adapter for this model, under its own name? */
static enum cm_status manifest_check(const struct cm_worker *worker, struct cm_error *err)
{
    const struct cm_worker_adapters *a = &worker->adapters;
    const struct cm_manifest_adapter *m = &a->manifest;
    const uint8_t *base = cm_package_head_of(worker->package)->core.core_digest;
    char wanted[2 * CM_DIGEST_BYTES + 1], found[2 * CM_DIGEST_BYTES + 1];
    if (memcmp(m->base_digest, base, CM_DIGEST_BYTES) != 0) {
        cm_hex_write(m->base_digest, CM_DIGEST_BYTES, wanted);
        cm_hex_write(base, CM_DIGEST_BYTES, found);
        return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-BASE",
                            "made for the package %s; this service has loaded %s: ask its owner "
                            "for one for this base",
                            wanted, found);
    }
    if (m->name.size != strlen(a->load.name) ||
        memcmp(m->name.bytes, a->load.name, m->name.size) != 0) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-NAME",
                            "its owner named it %.*s: add it under that name", (int)m->name.size,
                            m->name.bytes);
    }
    return CM_OK;
}

static enum cm_status front_take(struct cm_worker *worker, const uint8_t *bytes, size_t size,
                                 struct cm_error *err)
{
    struct cm_worker_adapters *a = &worker->adapters;
    size_t manifest_bytes;
    enum cm_status status = cm_package_room_open(a->package, bytes, size, a->load.file_bytes,
                                                 a->key_page, &worker->config.adapter_owners, err);
    page_wipe(a);
    if (status != CM_OK) {
        return status;
    }
    const uint8_t *manifest = cm_package_manifest(a->package, &manifest_bytes);
    const struct cm_package_core *core = &cm_package_head_of(a->package)->core;
    if (core->segment_bytes != cm_package_head_of(worker->package)->core.segment_bytes ||
        !cm_manifest_is_adapter(manifest, manifest_bytes)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-KIND",
                            "the package holds a model, no adapter");
    }
    status = cm_manifest_adapter_parse(manifest, manifest_bytes, core->payload_bytes, a->tensors,
                                       TENSORS_MAX, &a->manifest, err);
    return status == CM_OK ? manifest_check(worker, err) : status;
}

/* ------------------------------------------------------------------ the weights */

static enum cm_status segments_open(void *context, uint64_t index, const uint8_t *ciphertext,
                                    size_t bytes, uint8_t *plaintext, struct cm_error *err)
{
    const struct cm_package *package = context;
    const size_t segment = cm_package_head_of(package)->core.segment_bytes;
    enum cm_status status = cm_package_segments_verify(
        package, index, (bytes + segment - 1) / segment, ciphertext, err);
    for (size_t at = 0; status == CM_OK && at < bytes; at += segment) {
        size_t size = bytes - at < segment ? bytes - at : segment;
        status = cm_package_segment_decrypt(package, index + at / segment, ciphertext + at, size,
                                            plaintext + at, err);
    }
    return status;
}

static enum cm_status bind(struct cm_worker *worker, struct cm_error *err)
{
    struct cm_worker_adapters *a = &worker->adapters;
    struct cm_adapter adapter;
    enum cm_status status =
        cm_worker_adapter_make(&a->manifest, worker->model.model.layers, a->layers, &adapter, err);
    return status == CM_OK
               ? cm_device_adapter_bind(worker->device, region_of(a->load.place), &adapter,
                                        cm_package_head_of(a->package)->core.payload_bytes, err)
               : status;
}

static void load_done(struct cm_worker *worker)
{
    struct cm_worker_adapters *a = &worker->adapters;
    struct cm_worker_adapter *adapter = &a->each[a->load.place];
    const struct cm_package_core *core = &cm_package_head_of(a->package)->core;
    adapter->state = CM_ADAPTER_SERVING;
    adapter->generation = ++a->generations;
    struct cm_adapter_told told = {.serial = adapter->serial,
                                   .state = CM_ADAPTER_SERVING,
                                   .generation = adapter->generation,
                                   .bytes = core->payload_bytes};
    cm_hex_write(core->core_digest, CM_DIGEST_BYTES, told.digest);
    CM_LOG(&worker->log, CM_LOG_INFO, "adapter_loaded", CM_LOG_S("adapter", a->load.name),
           CM_LOG_S("package", told.digest), CM_LOG_I("rank", a->manifest.rank),
           CM_LOG_I("bytes", core->payload_bytes), CM_LOG_I("us", cm_clock_us() - a->begun_us));
    load_end(a);
    tell(worker, &told);
}

static enum cm_status weights_take(struct cm_worker *worker, const uint8_t *bytes,
                                   struct cm_error *err)
{
    struct cm_worker_adapters *a = &worker->adapters;
    const struct cm_package_core *core = &cm_package_head_of(a->package)->core;
    const struct cm_device_cipher cipher = {segments_open, a->package};
    return cm_device_adapter_submit(worker->device, &cipher, region_of(a->load.place),
                                    (a->wanted.offset - core->payload_offset) / core->segment_bytes,
                                    bytes, a->wanted.bytes, err);
}

/* ------------------------------------------------------------------ frames */

/* Nobody may change it while we read it, nor after. */
static enum cm_status chunk_map(int fd, size_t size, const uint8_t **ret_bytes,
                                struct cm_error *err)
{
    const int wanted = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
    struct stat facts;
    if ((fcntl(fd, F_GET_SEALS) & wanted) != wanted || fstat(fd, &facts) != 0 ||
        (uint64_t)facts.st_size != size) {
        return cm_error_set(err, CM_E_BUG, "CM-WRK-CHUNK",
                            "a chunk is not sealed, or not of the %zu bytes that were asked for",
                            size);
    }
    void *bytes = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED) {
        return cm_error_errno(err, errno, "CM-WRK-CHUNK", "cannot map a chunk of %zu bytes", size);
    }
    *ret_bytes = bytes;
    return CM_OK;
}

/* A load that fails is the adapter's matter; a supervisor out of step is ours to refuse. */
void cm_adapters_load(struct cm_worker *worker, const struct cm_adapter_load *load, int page)
{
    struct cm_worker_adapters *a = &worker->adapters;
    struct cm_adapter_told told = {.serial = load->serial, .state = CM_ADAPTER_REFUSED};
    if (load->place >= a->max || load->serial == 0 || a->load.serial != 0 ||
        a->each[load->place].state != CM_ADAPTER_ABSENT ||
        memchr(load->name, '\0', sizeof(load->name)) == NULL || load->file_bytes == 0) {
        (void)cm_error_set(&told.error, CM_E_BUG, "CM-WRK-ADAPTER", "a load out of order");
        cm_log_error(&worker->log, "adapter_refused", &told.error);
        tell(worker, &told);
        return;
    }
    a->load = *load;
    a->begun_us = cm_clock_us();
    a->each[load->place] =
        (struct cm_worker_adapter){.state = CM_ADAPTER_LOADING, .serial = load->serial};
    if (cm_key_page_map_late(page, &a->key_page, &told.error) == CM_OK) {
        want(worker, 0);
    } else {
        load_fail(worker, CM_ADAPTER_REFUSED, &told.error);
    }
}

void cm_adapters_bytes(struct cm_worker *worker, const struct cm_adapter_chunk *chunk, int fd)
{
    struct cm_worker_adapters *a = &worker->adapters;
    const uint8_t *bytes = NULL;
    struct cm_error err;
    if (a->load.serial == 0 || memcmp(chunk, &a->wanted, sizeof(*chunk)) != 0) {
        return; /* of a load that was given up */
    }
    const uint64_t end = a->wanted.offset + a->wanted.bytes;
    uint64_t next = end;
    enum cm_status status = chunk_map(fd, chunk->bytes, &bytes, &err);
    if (status == CM_OK && chunk->offset == 0) {
        status = front_take(worker, bytes, chunk->bytes, &err);
        next = status == CM_OK ? cm_package_head_of(a->package)->core.payload_offset : 0;
    } else if (status == CM_OK) {
        status = weights_take(worker, bytes, &err);
    }
    if (bytes != NULL) {
        munmap((void *)bytes, chunk->bytes);
    }
    if (status == CM_OK && next < a->load.file_bytes) {
        want(worker, next);
        return;
    }
    if (status == CM_OK) {
        status = bind(worker, &err);
    }
    if (status == CM_OK) {
        load_done(worker);
    } else {
        load_fail(worker, CM_ADAPTER_REFUSED, &err);
    }
}

void cm_adapters_unload(struct cm_worker *worker, const struct cm_adapter_step *step)
{
    struct cm_worker_adapters *a = &worker->adapters;
    if (step->place >= a->max || a->each[step->place].state == CM_ADAPTER_ABSENT ||
        a->each[step->place].serial != step->serial) {
        struct cm_adapter_told told = {.serial = step->serial, .state = CM_ADAPTER_ABSENT};
        tell(worker, &told);
    } else if (a->each[step->place].state == CM_ADAPTER_LOADING) {
        load_fail(worker, CM_ADAPTER_ABSENT, NULL);
    } else {
        a->each[step->place].state = CM_ADAPTER_UNLOADING;
    }
}

void cm_adapters_tick(struct cm_worker *worker)
{
    struct cm_worker_adapters *a = &worker->adapters;
    for (uint32_t i = 0; i < a->max; i++) {
        struct cm_worker_adapter *adapter = &a->each[i];
        if (adapter->state != CM_ADAPTER_UNLOADING ||
            cm_scheduler_uses(worker->scheduler, adapter->generation)) {
            continue;
        }
        struct cm_adapter_told told = {.serial = adapter->serial, .state = CM_ADAPTER_ABSENT};
        cm_scheduler_forget(worker->scheduler, adapter->generation);
        cm_device_adapter_unbind(worker->device, region_of(i));
        CM_LOG(&worker->log, CM_LOG_INFO, "adapter_wiped", CM_LOG_I("region", region_of(i)),
               CM_LOG_I("generation", adapter->generation));
        *adapter = (struct cm_worker_adapter){.state = CM_ADAPTER_ABSENT};
        tell(worker, &told);
    }
}

void cm_adapters_wipe(struct cm_worker_adapters *a)
{
    page_wipe(a);
    if (a->package != NULL) {
        cm_package_room_wipe(a->package);
    }
}
