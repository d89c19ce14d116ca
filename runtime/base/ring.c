/* Single-producer, single-consumer rings over sealed memfds. */
#include "runtime/base/ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/base/kill_point.h"
#include "runtime/base/wire.h"

#define ALIGN 16u

static uint64_t record_bytes(uint64_t payload)
{
    return (sizeof(struct cm_record) + payload + ALIGN - 1) / ALIGN * ALIGN;
}

static uint64_t cursor_load(const uint8_t *at)
{
    return atomic_load_explicit((const _Atomic uint64_t *)(const void *)at, memory_order_acquire);
}

static void cursor_store(uint8_t *at, uint64_t value)
{
    atomic_store_explicit((_Atomic uint64_t *)(void *)at, value, memory_order_release);
}

#ifdef CASEMATE_KILL_POINTS
static const char *record_name(uint32_t type)
{
    return type > 0 && type < CM_WIRE_TYPE_COUNT ? cm_wire_rows[type].name : "pad";
}
#endif

static enum cm_status memfd_make(const char *name, uint64_t size, int *ret_fd, int *ret_read,
                                 struct cm_error *err)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-RING-MAKE", "cannot make ring memory");
    }
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    int read_fd = -1;
    if (ftruncate(fd, (off_t)size) != 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 ||
        (read_fd = open(path, O_RDONLY | O_CLOEXEC)) < 0) {
        int error_number = errno;
        close(fd);
        return cm_error_errno(err, error_number, "CM-RING-MAKE",
                              "cannot size and seal ring memory");
    }
    *ret_fd = fd;
    *ret_read = read_fd;
    return CM_OK;
}

enum cm_status cm_ring_make(uint64_t capacity, int *ret_data, int *ret_data_read, int *ret_cursor,
                            int *ret_cursor_read, struct cm_error *err)
{
    if (capacity < CM_RING_CAPACITY_MIN || capacity > CM_RING_CAPACITY_MAX ||
        (capacity & (capacity - 1)) != 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-RING-SIZE",
                            "ring of %llu bytes: must be a power of two, 64 KiB to 64 MiB",
                            (unsigned long long)capacity);
    }
    int data, data_read, cursor, cursor_read;
    enum cm_status status =
        memfd_make("casemate-ring", CM_RING_CURSOR_BYTES + capacity, &data, &data_read, err);
    if (status != CM_OK) {
        return status;
    }
    status = memfd_make("casemate-cursor", CM_RING_CURSOR_BYTES, &cursor, &cursor_read, err);
    if (status != CM_OK) {
        close(data);
        close(data_read);
        return status;
    }
    *ret_data = data;
    *ret_data_read = data_read;
    *ret_cursor = cursor;
    *ret_cursor_read = cursor_read;
    return CM_OK;
}

/* Size of a ring memfd whose size can no longer change; 0 if it is not one. */
static uint64_t memfd_sealed_size(int fd)
{
    struct stat facts;
    int seals = fcntl(fd, F_GET_SEALS);
    int wanted = F_SEAL_SHRINK | F_SEAL_GROW;
    if (seals < 0 || (seals & wanted) != wanted || fstat(fd, &facts) != 0 || facts.st_size <= 0) {
        return 0;
    }
    return (uint64_t)facts.st_size;
}

static enum cm_status ring_open(struct cm_ring *ring, int data_fd, int cursor_fd, bool producer,
                                struct cm_error *err)
{
    uint64_t data_bytes = memfd_sealed_size(data_fd);
    uint64_t capacity = data_bytes - CM_RING_CURSOR_BYTES;
    if (data_bytes < CM_RING_CURSOR_BYTES + CM_RING_CAPACITY_MIN ||
        capacity > CM_RING_CAPACITY_MAX || (capacity & (capacity - 1)) != 0 ||
        memfd_sealed_size(cursor_fd) != CM_RING_CURSOR_BYTES) {
        return cm_error_set(err, CM_E_INPUT, "CM-RING-SHAPE",
                            "descriptors %d and %d are not a sealed ring", data_fd, cursor_fd);
    }
    int data_protection = producer ? PROT_READ | PROT_WRITE : PROT_READ;
    int cursor_protection = producer ? PROT_READ : PROT_READ | PROT_WRITE;
    /* Populated: a ring is memory that is there before it is needed, not when it first turns. */
    void *data = mmap(NULL, data_bytes, data_protection, MAP_SHARED | MAP_POPULATE, data_fd, 0);
    void *cursor = mmap(NULL, CM_RING_CURSOR_BYTES, cursor_protection, MAP_SHARED, cursor_fd, 0);
    if (data == MAP_FAILED || cursor == MAP_FAILED) {
        int error_number = errno;
        if (data != MAP_FAILED) {
            munmap(data, data_bytes);
        }
        if (cursor != MAP_FAILED) {
            munmap(cursor, CM_RING_CURSOR_BYTES);
        }
        return cm_error_errno(err, error_number, "CM-RING-MAP", "cannot map a ring");
    }
    *ring = (struct cm_ring){
        .data = data, .data_bytes = data_bytes, .cursor = cursor, .capacity = capacity};
    return CM_OK;
}

enum cm_status cm_ring_open_producer(struct cm_ring *ring, int data_fd, int cursor_read_fd,
                                     struct cm_error *err)
{
    return ring_open(ring, data_fd, cursor_read_fd, true, err);
}

enum cm_status cm_ring_open_consumer(struct cm_ring *ring, int data_read_fd, int cursor_fd,
                                     struct cm_error *err)
{
    return ring_open(ring, data_read_fd, cursor_fd, false, err);
}

void cm_ring_close(struct cm_ring *ring)
{
    if (ring->data != NULL) {
        munmap(ring->data, ring->data_bytes);
        munmap(ring->cursor, CM_RING_CURSOR_BYTES);
    }
    *ring = (struct cm_ring){0};
}

size_t cm_ring_payload_max(const struct cm_ring *ring)
{
    return (size_t)(ring->capacity / 4);
}

static void record_write(struct cm_ring *ring, uint64_t at, const struct cm_record *record,
                         const void *part1, size_t bytes1, const void *part2, size_t bytes2)
{
    uint8_t *to = ring->data + CM_RING_CURSOR_BYTES + (at & (ring->capacity - 1));
    memcpy(to, record, sizeof(*record));
    to += sizeof(*record);
    if (bytes1 > 0) {
        memcpy(to, part1, bytes1);
    }
    if (bytes2 > 0) {
        memcpy(to + bytes1, part2, bytes2);
    }
}

void cm_ring_scrub(struct cm_ring *ring)
{
    uint64_t tail = cursor_load(ring->cursor);
    if (ring->mine - tail > ring->capacity || tail - ring->wiped > ring->capacity) {
        return; /* an impossible cursor: the next put says so */
    }
    while (ring->wiped != tail) {
        uint64_t at = ring->wiped & (ring->capacity - 1);
        uint64_t size =
            tail - ring->wiped < ring->capacity - at ? tail - ring->wiped : ring->capacity - at;
        memset(ring->data + CM_RING_CURSOR_BYTES + at, 0, size);
        ring->wiped += size;
    }
}

enum cm_status cm_ring_put(struct cm_ring *ring, uint32_t type, uint64_t request, const void *part1,
                           size_t bytes1, const void *part2, size_t bytes2, struct cm_error *err)
{
    CM_ASSERT(type != CM_RECORD_PAD);
    CM_ASSERT(bytes1 <= cm_ring_payload_max(ring) && bytes2 <= cm_ring_payload_max(ring) - bytes1);
    uint64_t tail = cursor_load(ring->cursor);
    uint64_t used = ring->mine - tail;
    if (used > ring->capacity) {
        return cm_error_set(err, CM_E_INPUT, "CM-RING-CURSOR", "consumer's cursor is impossible");
    }
    cm_ring_scrub(ring);
    uint64_t size = record_bytes(bytes1 + bytes2);
    uint64_t to_end = ring->capacity - (ring->mine & (ring->capacity - 1));
    uint64_t pad = size > to_end ? to_end : 0;
    if (pad + size > ring->capacity - used) {
        return cm_error_set(err, CM_E_BUSY, "CM-RING-FULL", "ring is full");
    }
    if (pad > 0) {
        struct cm_record filler = {.bytes = (uint32_t)(pad - sizeof(filler)),
                                   .type = CM_RECORD_PAD};
        record_write(ring, ring->mine, &filler, NULL, 0, NULL, 0);
    }
    struct cm_record record = {(uint32_t)(bytes1 + bytes2), type, request};
    CM_KILL_POINT("before", "put", record_name(type));
    record_write(ring, ring->mine + pad, &record, part1, bytes1, part2, bytes2);
    ring->mine += pad + size;
    cursor_store(ring->data, ring->mine);
    CM_KILL_POINT("after", "put", record_name(type));
    return CM_OK;
}

enum cm_status cm_ring_get(struct cm_ring *ring, struct cm_record *ret_record, void *payload,
                           size_t payload_size, struct cm_error *err)
{
    CM_KILL_POINT_NOW();
    for (;;) {
        uint64_t there = cursor_load(ring->data) - ring->mine;
        if (there == 0) {
            return cm_error_set(err, CM_E_BUSY, "CM-RING-EMPTY", "ring is empty");
        }
        uint64_t at = ring->mine & (ring->capacity - 1);
        uint64_t limit = there < ring->capacity - at ? there : ring->capacity - at;
        struct cm_record record;
        if (there > ring->capacity || there % ALIGN != 0 || limit < sizeof(record)) {
            return cm_error_set(err, CM_E_INPUT, "CM-RING-CURSOR",
                                "producer's cursor is impossible");
        }
        const uint8_t *from = ring->data + CM_RING_CURSOR_BYTES + at;
        memcpy(&record, from, sizeof(record)); /* once: the producer may change it under us */
        uint64_t size = record_bytes(record.bytes);
        if (size > limit || (record.type != CM_RECORD_PAD && record.bytes > payload_size)) {
            return cm_error_set(err, CM_E_INPUT, "CM-RING-RECORD",
                                "record of %u bytes is malformed", record.bytes);
        }
        if (record.type != CM_RECORD_PAD && record.bytes > 0) {
            memcpy(payload, from + sizeof(record), record.bytes);
        }
        CM_KILL_POINT("before", "take", record_name(record.type));
        ring->mine += size;
        cursor_store(ring->cursor, ring->mine);
        if (record.type != CM_RECORD_PAD) {
            CM_KILL_POINT_AFTER("take", record_name(record.type));
            *ret_record = record;
            return CM_OK;
        }
    }
}

uint64_t cm_ring_pending(const struct cm_ring *ring)
{
    return ring->mine - cursor_load(ring->cursor);
}
