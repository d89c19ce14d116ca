/* read → SHA-256 → decrypt into the arena, one segment at a time per thread. */
#include "loader/stream/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define THREADS_MAX 16u

struct load {
    const struct cm_package *package;
    int fd;
    struct cm_device *device;
    uint64_t segments;
    const volatile int *stop;
    _Atomic uint64_t next;
    _Atomic uint64_t bytes_done;
    _Atomic uint64_t read_ns, verify_ns, decrypt_ns;
    _Atomic int failed; /* the first failure's owner writes error and status */
    enum cm_status status;
    struct cm_error error;
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* The device's cipher: verify, then decrypt, each on its own clock. */
static enum cm_status segment_open(void *context, uint64_t index, const uint8_t *ciphertext,
                                   size_t bytes, uint8_t *plaintext, struct cm_error *err)
{
    struct load *load = context;
    uint64_t start = now_ns();
    enum cm_status status = cm_package_segment_verify(load->package, index, ciphertext, bytes, err);
    uint64_t verified = now_ns();
    if (status == CM_OK) {
        status =
            cm_package_segment_decrypt(load->package, index, ciphertext, bytes, plaintext, err);
    }
    atomic_fetch_add(&load->verify_ns, verified - start);
    atomic_fetch_add(&load->decrypt_ns, now_ns() - verified);
    return status;
}

static enum cm_status segment_read(struct load *load, uint64_t offset, uint8_t *bytes, size_t size,
                                   struct cm_error *err)
{
    uint64_t start = now_ns();
    for (size_t done = 0; done < size;) {
        ssize_t got = pread(load->fd, bytes + done, size - done, (off_t)(offset + done));
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
    atomic_fetch_add(&load->read_ns, now_ns() - start);
    return CM_OK;
}

static enum cm_status segment_load(struct load *load, uint64_t index, uint8_t *staging,
                                   struct cm_error *err)
{
    const struct cm_device_cipher cipher = {segment_open, load};
    uint64_t offset;
    size_t bytes;
    cm_package_segment_place(load->package, index, &offset, &bytes);
    if (load->stop != NULL && *load->stop != 0) {
        return cm_error_set(err, CM_E_BUSY, "CM-STREAM-STOP", "loading was stopped");
    }
    enum cm_status status = segment_read(load, offset, staging, bytes, err);
    if (status == CM_OK) {
        status = cm_device_segment_submit(load->device, &cipher, index, staging, bytes, err);
    }
    if (status == CM_OK) {
        /* Ciphertext was of use once; the page cache has better things to keep. */
        (void)posix_fadvise(load->fd, (off_t)offset, (off_t)bytes, POSIX_FADV_DONTNEED);
        atomic_fetch_add(&load->bytes_done, bytes);
    }
    return status;
}

static void *load_main(void *argument)
{
    struct load *load = argument;
    struct cm_error err = {.status = CM_OK};
    enum cm_status status = CM_OK;
    uint8_t *staging = malloc(CM_PACKAGE_SEGMENT_BYTES);
    if (staging == NULL) {
        status = cm_error_errno(&err, ENOMEM, "CM-SYS-MEMORY", "staging");
    }
    while (status == CM_OK && atomic_load(&load->failed) == 0) {
        uint64_t index = atomic_fetch_add(&load->next, 1);
        if (index >= load->segments) {
            break;
        }
        status = segment_load(load, index, staging, &err);
    }
    int none = 0;
    if (status != CM_OK && atomic_compare_exchange_strong(&load->failed, &none, 1)) {
        load->status = status;
        load->error = err;
    }
    free(staging);
    return NULL;
}

enum cm_status cm_stream_load(const struct cm_package *package, int fd, struct cm_device *device,
                              uint32_t threads, cm_stream_progress progress, void *progress_context,
                              const volatile int *stop, struct cm_stream_times *ret_times,
                              struct cm_error *err)
{
    const struct cm_package_core *core = &cm_package_head_of(package)->core;
    struct load load = {.package = package,
                        .fd = fd,
                        .device = device,
                        .segments = core->segment_count,
                        .stop = stop};
    pthread_t helpers[THREADS_MAX];
    uint32_t started = 0;
    uint64_t start = now_ns();
    threads = threads < 1 ? 1 : (threads > THREADS_MAX ? THREADS_MAX : threads);
    while (started < threads && pthread_create(&helpers[started], NULL, load_main, &load) == 0) {
        started++;
    }
    if (started == 0) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-THREAD", "cannot start a loading thread");
    }
    /* This thread reports while the others work. */
    while (progress != NULL && atomic_load(&load.failed) == 0 &&
           atomic_load(&load.bytes_done) < core->payload_bytes) {
        progress(progress_context, atomic_load(&load.bytes_done), core->payload_bytes);
        usleep(10000);
    }
    for (uint32_t i = 0; i < started; i++) {
        pthread_join(helpers[i], NULL);
    }
    if (atomic_load(&load.failed) != 0) {
        cm_device_scrub(device);
        if (err != NULL) {
            *err = load.error;
        }
        return load.status;
    }
    enum cm_status status = cm_device_load_finish(device, err);
    if (status == CM_OK) {
        if (progress != NULL) {
            progress(progress_context, core->payload_bytes, core->payload_bytes);
        }
        *ret_times = (struct cm_stream_times){.read_us = load.read_ns / 1000,
                                              .verify_us = load.verify_ns / 1000,
                                              .decrypt_us = load.decrypt_ns / 1000,
                                              .total_us = (now_ns() - start) / 1000,
                                              .bytes = core->payload_bytes};
    }
    return status;
}
