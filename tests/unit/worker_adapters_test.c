/* An adapter's way into a worker that serves and out again, good ones and refused ones, with a
 * scripted supervisor: nothing is allocated on it, and nothing of a refused one stays. */
#include <sys/mman.h>
#include <sys/socket.h>

#include "runtime/base/sealed.h"
#include "runtime/worker/worker.h"
#include "tests/unit/allocation_trap.h"
#include "tests/unit/package_sample.h"
#include "tests/unit/tiny_adapter.h"

#define RANK  5u
#define PLACE 1u

static struct cm_worker worker;
static struct cm_channel supervisor;
static struct sample base;
static struct tiny_adapter tiny;
static uint8_t adapter_key[CM_KEY_BYTES];
static uint8_t *file;
static size_t file_bytes;
static uint64_t serial;

/* The sanitizers' allocator has no options to set; the trap is stricter than those in any case. */
int __wrap_mallopt(int option, int value);
int __wrap_mallopt(int option, int value)
{
    (void)option, (void)value;
    return 1;
}

/* ------------------------------------------------------------------ the adapter's file */

static struct cm_manifest_adapter manifest_make(struct cm_manifest_tensor *tensors)
{
    struct cm_manifest_adapter manifest = {.name = {"red", 3},
                                           .license = {"", 0},
                                           .origin = {"", 0},
                                           .rank = RANK,
                                           .scale = 2.0f,
                                           ADAPTER_SHAPE,
                                           .tensors = tensors};
    memcpy(manifest.base_digest, cm_package_head_of(worker.package)->core.core_digest,
           CM_DIGEST_BYTES);
    for (uint32_t role = 0; role < 2 * CM_TARGET_COUNT; role++) {
        const struct cm_tensor *from =
            role % 2 == 0 ? &tiny.layer.a[role / 2] : &tiny.layer.b[role / 2];
        tensors[role] = (struct cm_manifest_tensor){.name = {from->name, strlen(from->name)},
                                                    .layer = 0,
                                                    .role = role,
                                                    .kind = from->kind,
                                                    .rows = from->rows,
                                                    .columns = from->columns,
                                                    .offset = from->offset,
                                                    .bytes = from->bytes};
    }
    manifest.tensor_count = 2 * CM_TARGET_COUNT;
    return manifest;
}

static void file_make(void)
{
    struct cm_manifest_tensor tensors[2 * CM_TARGET_COUNT];
    struct cm_package_writer *writer;
    char path[96];
    adapter_make(&tiny, 3, RANK, 127);
    const struct cm_manifest_adapter manifest = manifest_make(tensors);
    snprintf(path, sizeof(path), "%s/red.cmpkg", base.folder);
    struct cm_package_write_options options = {.path = path,
                                               .suite = CM_SUITE_AES_256_GCM,
                                               .revision = 1,
                                               .host_version_min = 1,
                                               .sign = sample_sign,
                                               .sign_context = base.owner};
    memcpy(options.owner_key, base.owner_key, CM_PUBLIC_KEY_BYTES);
    memset(adapter_key, 7, sizeof(adapter_key));
    cr_assert_eq(cm_package_write_begin_adapter(&options, adapter_key, &manifest,
                                                tiny.payload_bytes, &writer, &err),
                 CM_OK, "%s", err.text);
    cr_assert_eq(cm_package_write_append(writer, tiny.payload, tiny.payload_bytes, &err), CM_OK);
    cr_assert_eq(cm_package_write_finish(writer, &err), CM_OK, "%s", err.text);
    FILE *from = fopen(path, "rbe");
    file = malloc(1u << 20);
    cr_assert_not_null(from);
    file_bytes = fread(file, 1, 1u << 20, from);
    fclose(from);
}

/* ------------------------------------------------------------------ a worker that serves */

static void device_make(void)
{
    const struct cm_device_options options = {.threads = 1};
    const struct cm_device_cipher cipher = {segment_copy, NULL};
    struct cm_device_reserve reserve = reserve_of(2, 8, CONTEXT, 64);
    reserve.segment_bytes = CM_PACKAGE_SEGMENT_BYTES;
    reserve.adapters = worker.config.adapters_max;
    reserve.adapter_bytes = worker.config.adapter_bytes_max;
    reserve.adapter_rank_max = 32;
    cr_assert_eq(cm_device_open("cpu", &options, &worker.device, &err), CM_OK);
    cr_assert_eq(cm_device_reserve(worker.device, &reserve, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_device_segment_submit(worker.device, &cipher, 0, payload, payload_bytes, &err),
                 CM_OK);
    cr_assert_eq(cm_device_load_finish(worker.device, &err), CM_OK);
    cr_assert_eq(cm_device_model_bind(worker.device, &model, &err), CM_OK, "%s", err.text);
}

static bool emit_nothing(void *context, enum cm_wire_type type, uint64_t id, const void *part1,
                         size_t bytes1, const void *part2, size_t bytes2)
{
    (void)context, (void)type, (void)id, (void)part1, (void)bytes1, (void)part2, (void)bytes2;
    return true;
}

static void worker_make(void)
{
    const struct cm_scheduler_limits limits = {.sequences_max = 2,
                                               .queue_max = 2,
                                               .kv_pages = 8,
                                               .context_max = CONTEXT,
                                               .step_tokens_max = 64};
    int ends[2];
    model_make();
    sample_make(&base, CM_SUITE_AES_256_GCM, 8192, "base.cmpkg");
    int fd = open(base.path, O_RDONLY | O_CLOEXEC);
    cr_assert_eq(cm_package_open(fd, base.key, base.owner_key, &worker.package, &err), CM_OK);
    close(fd);
    worker.log = (struct cm_log){.fd = open("/dev/null", O_WRONLY | O_CLOEXEC), .role = "worker"};
    worker.model.model = model;
    worker.config = (struct cm_config_worker){.adapters_max = 2,
                                              .adapter_bytes_max = CM_PACKAGE_SEGMENT_BYTES,
                                              .adapter_owners = {.count = 1}};
    memcpy(worker.config.adapter_owners.each[0].package, base.owner_key, CM_PUBLIC_KEY_BYTES);
    device_make();
    cr_assert_eq(
        cm_scheduler_new(worker.device, &limits, emit_nothing, NULL, &worker.scheduler, &err),
        CM_OK);
    cr_assert_eq(cm_adapters_make(&worker, &err), CM_OK, "%s", err.text);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    cm_channel_init(&worker.channel, ends[0], CM_ROLE_WORKER, CM_ROLE_SUPERVISOR);
    cm_channel_init(&supervisor, ends[1], CM_ROLE_SUPERVISOR, CM_ROLE_WORKER);
    worker.channel.phase = supervisor.phase = CM_PHASE_SERVE;
    file_make();
}

static void worker_end(void)
{
    cm_scheduler_free(worker.scheduler);
    cm_device_close(worker.device);
    cm_package_close(worker.adapters.package);
    cm_package_close(worker.package);
    free(worker.adapters.tensors);
    free(worker.adapters.layers);
    close(worker.channel.fd);
    close(supervisor.fd);
    close(worker.log.fd);
    free(file);
    sample_done(&base);
}

TestSuite(worker_adapters, .init = worker_make, .fini = worker_end);

/* ------------------------------------------------------------------ the supervisor's side */

static int key_page_make(void)
{
    int fd = memfd_create("page", MFD_CLOEXEC);
    cr_assert(fd >= 0 && ftruncate(fd, CM_KEY_PAGE_BYTES) == 0);
    cr_assert_eq(pwrite(fd, adapter_key, sizeof(adapter_key), 0), CM_KEY_BYTES);
    return fd;
}

static void page_is_wiped(int fd)
{
    uint8_t bytes[CM_KEY_BYTES];
    cr_assert_eq(pread(fd, bytes, sizeof(bytes), 0), CM_KEY_BYTES);
    for (size_t i = 0; i < sizeof(bytes); i++) {
        cr_assert_eq(bytes[i], 0);
    }
}

/* What the worker says next; a READ is answered, out of the file as it is now. */
static struct cm_adapter_told told_next(void)
{
    static struct cm_frame frame;
    struct cm_adapter_told told;
    for (;;) {
        cr_assert_eq(cm_channel_receive(&supervisor, &frame, &err), CM_OK, "%s", err.text);
        if (frame.type != CM_FRAME_ADAPTER_READ) {
            break;
        }
        struct cm_adapter_chunk chunk;
        memcpy(&chunk, frame.payload, sizeof(chunk));
        cr_assert(chunk.offset + chunk.bytes <= file_bytes);
        int fd = cm_memfd_sealed("chunk", file + chunk.offset, chunk.bytes);
        cr_assert_geq(fd, 0);
        allocation_trap = true;
        cm_adapters_bytes(&worker, &chunk, fd);
        allocation_trap = false;
        close(fd);
    }
    cr_assert_eq(frame.type, CM_FRAME_ADAPTER_STATE);
    memcpy(&told, frame.payload, sizeof(told));
    cr_assert_eq(told.serial, serial);
    return told;
}

static struct cm_adapter_told load_as(const char *name)
{
    struct cm_adapter_load load = {.serial = ++serial, .place = PLACE, .file_bytes = file_bytes};
    int page = key_page_make();
    snprintf(load.name, sizeof(load.name), "%s", name);
    allocation_trap = true;
    cm_adapters_load(&worker, &load, page);
    allocation_trap = false;
    struct cm_adapter_told told = told_next();
    page_is_wiped(page);
    close(page);
    return told;
}

static void unload(void)
{
    const struct cm_adapter_step step = {.serial = serial, .place = PLACE};
    allocation_trap = true;
    cm_adapters_unload(&worker, &step);
    cm_adapters_tick(&worker);
    allocation_trap = false;
    cr_assert_eq(told_next().state, CM_ADAPTER_ABSENT);
}

/* ------------------------------------------------------------------ tests */

Test(worker_adapters, loading_and_unloading_allocate_nothing)
{
    unsigned long before = allocations_allowed;
    cr_assert_gt(before, 0ul, "the trap sees no call");
    for (uint64_t round = 1; round <= 3; round++) {
        struct cm_adapter_told told = load_as("red");
        cr_assert_eq(told.state, CM_ADAPTER_SERVING, "%s", told.error.text);
        cr_assert_eq(told.generation, round);
        cr_assert_eq(told.bytes, tiny.payload_bytes);
        cr_assert_eq(cm_adapters_region(&worker.adapters, round), PLACE + 1);
        unload();
        cr_assert_eq(cm_adapters_region(&worker.adapters, round), CM_ADAPTER_NONE);
    }
}

/* Of each part of the file, and of the name: refused for its own reason, and the next is taken. */
Test(worker_adapters, what_is_refused_allocates_nothing_and_leaves_nothing)
{
    const struct {
        size_t at; /* of a byte that is turned; 0: none */
        const char *name, *id;
    } rows[] = {{0, "blue", "CM-WRK-NAME"},
                {CM_PACKAGE_CORE_OFFSET + 40, "red", "CM-PKG-MAC"},
                {CM_PACKAGE_CORE_OFFSET + 256, "red", "CM-PKG-SIGNATURE"},
                {CM_PACKAGE_HEAD_BYTES + 8, "red", "CM-PKG-MANIFEST"},
                {file_bytes - 1, "red", "CM-PKG-HASH"}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        file[rows[i].at] ^= rows[i].at != 0;
        struct cm_adapter_told told = load_as(rows[i].name);
        file[rows[i].at] ^= rows[i].at != 0;
        cr_assert_eq(told.state, CM_ADAPTER_REFUSED, "row %zu", i);
        cr_assert_str_eq(told.error.id, rows[i].id, "row %zu: %s", i, told.error.text);
        cr_assert_eq(worker.adapters.each[PLACE].state, CM_ADAPTER_ABSENT);
        cr_assert_null(worker.adapters.key_page);
        told = load_as("red");
        cr_assert_eq(told.state, CM_ADAPTER_SERVING, "%s", told.error.text);
        unload();
    }
}

/* What the supervisor may not say is refused, and what is loading goes on. */
Test(worker_adapters, a_load_out_of_order_is_refused)
{
    struct cm_adapter_load load = {.serial = 9, .place = worker.config.adapters_max};
    snprintf(load.name, sizeof(load.name), "red");
    load.file_bytes = file_bytes;
    int page = key_page_make();
    allocation_trap = true;
    cm_adapters_load(&worker, &load, page);
    allocation_trap = false;
    serial = 9;
    cr_assert_str_eq(told_next().error.id, "CM-WRK-ADAPTER");
    close(page);
    cr_assert_eq(load_as("red").state, CM_ADAPTER_SERVING);
    unload();
}

static bool nothing_is_told(void)
{
    static struct cm_frame frame;
    return cm_channel_receive(&supervisor, &frame, &err) == CM_E_BUSY;
}

/* A request with the adapter that serves, or without one (generation 0), and its first step. */
static void request_begin(uint64_t id, uint64_t generation)
{
    const struct cm_scheduler_request request = {
        .id = id,
        .tenant = 1,
        .adapter = generation,
        .slot = {.sampling = {.top_p = 1, .repetition_penalty = 1},
                 .ignore_eos = true,
                 .adapter = generation != 0 ? cm_adapters_region(&worker.adapters, generation)
                                            : CM_ADAPTER_NONE}};
    uint32_t *prompt = cm_scheduler_prompt(worker.scheduler);
    cr_assert_not_null(prompt);
    prompt[0] = 1;
    cm_scheduler_submit(worker.scheduler, &request, 1);
    cr_assert_eq(cm_scheduler_step(worker.scheduler, &err), CM_OK, "%s", err.text);
    cr_assert(cm_scheduler_uses(worker.scheduler, generation));
}

/* What runs with an adapter ends first, however it ends; nothing new may use it meanwhile. */
Test(worker_adapters, an_adapter_in_use_goes_when_its_last_request_is_over)
{
    const uint64_t generation = load_as("red").generation;
    const struct cm_adapter_step step = {.serial = serial, .place = PLACE};
    request_begin(1, generation);
    request_begin(2, generation);
    cm_adapters_unload(&worker, &step);
    cm_adapters_tick(&worker);
    cr_assert_eq(cm_adapters_region(&worker.adapters, generation), CM_ADAPTER_NONE);
    cm_scheduler_cancel(worker.scheduler, 1);
    cm_adapters_unload(&worker, &step); /* said twice */
    cm_adapters_tick(&worker);
    cr_assert(nothing_is_told());
    cr_assert_eq(cm_scheduler_step(worker.scheduler, &err), CM_OK, "the other goes on");
    cm_scheduler_cancel(worker.scheduler, 2);
    cm_adapters_tick(&worker);
    cr_assert_eq(told_next().state, CM_ADAPTER_ABSENT);
    cr_assert_eq(load_as("red").generation, generation + 1);
    unload();
}

/* A place where nothing is: what the model alone is doing is none of its business. */
Test(worker_adapters, what_is_not_there_cannot_be_unloaded)
{
    request_begin(1, 0);
    serial = 0;
    unload();
    cr_assert_eq(worker.adapters.each[PLACE].state, CM_ADAPTER_ABSENT);
    cr_assert_eq(load_as("red").state, CM_ADAPTER_SERVING);
    cm_scheduler_cancel(worker.scheduler, 1);
    unload();
}

/* Its key is wiped, and what was read for it comes to nothing. */
Test(worker_adapters, a_load_is_given_up_in_the_middle)
{
    static struct cm_frame frame;
    struct cm_adapter_load load = {
        .serial = ++serial, .place = PLACE, .file_bytes = file_bytes, .name = "red"};
    struct cm_adapter_chunk chunk;
    int page = key_page_make();
    cm_adapters_load(&worker, &load, page);
    cr_assert_eq(cm_channel_receive(&supervisor, &frame, &err), CM_OK);
    cr_assert_eq(frame.type, CM_FRAME_ADAPTER_READ);
    memcpy(&chunk, frame.payload, sizeof(chunk));
    unload();
    page_is_wiped(page);
    close(page);
    int fd = cm_memfd_sealed("chunk", file, chunk.bytes);
    cm_adapters_bytes(&worker, &chunk, fd);
    close(fd);
    cr_assert(nothing_is_told());
    cr_assert_eq(load_as("red").state, CM_ADAPTER_SERVING);
    unload();
}
