/* read → SHA-256 → tag → decrypt, a run of segments at a time per thread, in the device's memory.
 */
#include "loader/stream/stream_internal.h"
#include "runtime/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#define THREADS_MAX 16u
#define RUN         16u /* segments: as many as are hashed side by side; 4 MiB stay in cache */

struct load {
    const struct cm_stream_source *source;
    const struct cm_stream_options *options;
    struct cm_device *device;
    uint64_t segments;
    uint32_t threads;
    bool drop_behind;
    pthread_t caller;
    _Atomic uint64_t next; /* segment */
    _Atomic uint64_t bytes_done;
    _Atomic uint64_t read_ns, verify_ns, decrypt_ns;
    _Atomic bool failed;
    pthread_mutex_t note; /* over the two below */
    enum cm_status status;
    struct cm_error error;
};

/* The first failure is the one that is told. "Out of order" (BUG) is what other threads hear from a
 * device that has just failed, and one of them may be here before the thread that knows why. */
static void failure_note(struct load *load, enum cm_status status, const struct cm_error *err)
{
    if (status == CM_OK) {
        return;
    }
    pthread_mutex_lock(&load->note);
    if (load->status == CM_OK || (load->status == CM_E_BUG && status != CM_E_BUG)) {
        load->status = status;
        load->error = *err;
    }
    pthread_mutex_unlock(&load->note);
    atomic_store(&load->failed, true);
}

/* The device's cipher: the whole run is hashed, then segment by segment tag and decryption. */
static enum cm_status run_open(void *context, uint64_t index, const uint8_t *ciphertext,
                               size_t bytes, uint8_t *plaintext, struct cm_error *err)
{
    struct load *load = context;
    const struct cm_stream_source *source = load->source;
    const uint64_t segment = source->segment_bytes;
    enum cm_status status = CM_OK;
    if (source->verify == NULL) {
        if (plaintext != ciphertext) {
            memcpy(plaintext, ciphertext, bytes);
        }
        return CM_OK;
    }
    uint64_t start = cm_clock_ns();
    status =
        source->verify(source->context, index, (bytes + segment - 1) / segment, ciphertext, err);
    uint64_t verified = cm_clock_ns();
    for (size_t at = 0; status == CM_OK && at < bytes; at += segment) {
        size_t size = bytes - at < segment ? bytes - at : segment;
        status = source->decrypt(source->context, index + at / segment, ciphertext + at, size,
                                 plaintext + at, err);
    }
    atomic_fetch_add(&load->verify_ns, verified - start);
    atomic_fetch_add(&load->decrypt_ns, cm_clock_ns() - verified);
    failure_note(load, status, err);
    return status;
}

static enum cm_status run_read(struct load *load, uint64_t offset, uint8_t *bytes, size_t size,
                               struct cm_error *err)
{
    const struct cm_stream_source *source = load->source;
    uint64_t start = cm_clock_ns();
    /* The other threads' next runs, so that a cold disk has work while this one computes. */
    (void)posix_fadvise(source->fd, (off_t)(offset + load->threads * size), (off_t)size,
                        POSIX_FADV_WILLNEED);
    for (size_t done = 0; done < size;) {
        ssize_t got = source->read(source->fd, bytes + done, size - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return cm_error_errno(err, errno, "CM-PKG-READ", "payload at offset %llu",
                                  (unsigned long long)(offset + done));
        }
        if (got == 0) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-LENGTH",
                                "payload: the file ends at offset %llu: it was cut while loading",
                                (unsigned long long)(offset + done));
        }
        done += (size_t)got;
    }
    atomic_fetch_add(&load->read_ns, cm_clock_ns() - start);
    return CM_OK;
}

static enum cm_status run_load(struct load *load, uint64_t index, uint8_t *staging,
                               struct cm_error *err)
{
    const struct cm_stream_source *source = load->source;
    const struct cm_device_cipher cipher = {run_open, load};
    const uint64_t start = index * source->segment_bytes, left = source->payload_bytes - start;
    const size_t bytes =
        (size_t)(left < RUN * source->segment_bytes ? left : RUN * source->segment_bytes);
    if (load->options->stop != NULL && *load->options->stop != 0) {
        return cm_error_set(err, CM_E_BUSY, "CM-STREAM-STOP", "loading was stopped");
    }
    uint8_t *place = staging != NULL ? staging : cm_device_segment_place(load->device, index);
    enum cm_status status = run_read(load, source->payload_offset + start, place, bytes, err);
    if (status == CM_OK) {
        status = cm_device_segment_submit(load->device, &cipher, index, place, bytes, err);
    }
    if (status == CM_OK) {
        if (load->drop_behind) {
            (void)posix_fadvise(source->fd, (off_t)(source->payload_offset + start), (off_t)bytes,
                                POSIX_FADV_DONTNEED);
        }
        atomic_fetch_add(&load->bytes_done, bytes);
    }
    return status;
}

static void *load_main(void *argument)
{
    struct load *load = argument;
    const struct cm_stream_options *options = load->options;
    struct cm_error err = {.status = CM_OK};
    enum cm_status status = CM_OK;
    uint8_t *staging = NULL;
    /* Only a device with memory of its own needs a place for the ciphertext. */
    if (cm_device_segment_place(load->device, 0) == NULL &&
        (staging = malloc(RUN * load->source->segment_bytes)) == NULL) {
        status = cm_error_errno(&err, ENOMEM, "CM-SYS-MEMORY", "staging");
    }
    while (status == CM_OK && !atomic_load(&load->failed)) {
        uint64_t index = atomic_fetch_add(&load->next, RUN);
        if (index >= load->segments) {
            break;
        }
        if (options->progress != NULL && pthread_equal(pthread_self(), load->caller)) {
            options->progress(options->progress_context, atomic_load(&load->bytes_done),
                              load->source->payload_bytes);
        }
        status = run_load(load, index, staging, &err);
    }
    failure_note(load, status, &err);
    free(staging);
    return NULL;
}

enum cm_status cm_stream_run(const struct cm_stream_source *source, struct cm_device *device,
                             const struct cm_stream_options *options,
                             struct cm_stream_times *ret_times, struct cm_error *err)
{
    struct load load = {.source = source,
                        .options = options,
                        .device = device,
                        .segments = (source->payload_bytes + source->segment_bytes - 1) /
                                    source->segment_bytes,
                        .threads = options->threads < THREADS_MAX ? options->threads : THREADS_MAX,
                        .drop_behind = source->payload_bytes > source->keep_bytes_max,
                        .caller = pthread_self(),
                        .note = PTHREAD_MUTEX_INITIALIZER};
    pthread_t helpers[THREADS_MAX];
    uint32_t started = 0;
    uint64_t start = cm_clock_ns();
    /* Fewer threads than wished for load slower, nothing else. */
    while (started + 1 < load.threads &&
           pthread_create(&helpers[started], NULL, load_main, &load) == 0) {
        started++;
    }
    (void)load_main(&load);
    for (uint32_t i = 0; i < started; i++) {
        pthread_join(helpers[i], NULL);
    }
    if (atomic_load(&load.failed)) {
        cm_device_scrub(device); /* others may have written after the failure's own wipe */
        if (err != NULL) {
            *err = load.error;
        }
        return load.status;
    }
    enum cm_status status = cm_device_load_finish(device, err);
    if (status == CM_OK) {
        if (options->progress != NULL) {
            options->progress(options->progress_context, source->payload_bytes,
                              source->payload_bytes);
        }
        *ret_times = (struct cm_stream_times){.read_us = load.read_ns / 1000,
                                              .verify_us = load.verify_ns / 1000,
                                              .decrypt_us = load.decrypt_ns / 1000,
                                              .total_us = (cm_clock_ns() - start) / 1000,
                                              .bytes = source->payload_bytes};
    }
    return status;
}

static enum cm_status package_verify(void *context, uint64_t first, uint64_t count,
                                     const uint8_t *ciphertext, struct cm_error *err)
{
    return cm_package_segments_verify(context, first, count, ciphertext, err);
}

static enum cm_status package_decrypt(void *context, uint64_t index, const uint8_t *ciphertext,
                                      size_t bytes, uint8_t *plaintext, struct cm_error *err)
{
    return cm_package_segment_decrypt(context, index, ciphertext, bytes, plaintext, err);
}

/* Ciphertext is of use once, but a worker that is replaced reads it again, at memory speed if it is
 * still cached. It is dropped where keeping it would cost others: above an eighth of the memory. */
static uint64_t keep_bytes_max(void)
{
    struct sysinfo facts;
    return sysinfo(&facts) == 0 ? (uint64_t)facts.totalram * facts.mem_unit / 8 : 0;
}

void cm_stream_package_source(const struct cm_package *package, int fd,
                              struct cm_stream_source *ret_source)
{
    const struct cm_package_core *core = &cm_package_head_of(package)->core;
    *ret_source = (struct cm_stream_source){.fd = fd,
                                            .payload_offset = core->payload_offset,
                                            .payload_bytes = core->payload_bytes,
                                            .segment_bytes = core->segment_bytes,
                                            .keep_bytes_max = keep_bytes_max(),
                                            .read = pread,
                                            .verify = package_verify,
                                            .decrypt = package_decrypt,
                                            .context = (void *)package};
}

enum cm_status cm_stream_load(const struct cm_package *package, int fd, struct cm_device *device,
                              const struct cm_stream_options *options,
                              struct cm_stream_times *ret_times, struct cm_error *err)
{
    struct cm_stream_source source;
    cm_stream_package_source(package, fd, &source);
    return cm_stream_run(&source, device, options, ret_times, err);
}
