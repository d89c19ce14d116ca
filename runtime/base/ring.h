/* Rings: one-way queues of records in shared memory between two processes that do not trust each
 * other.
 *
 * The producer writes data and its own cursor into one memfd; the consumer gets that memfd
 * read-only, and writes its cursor into a memfd of its own, which the producer has read-only. So
 * neither can move the other's cursor. The reader copies each record out once and checks the copy.
 * A peer that breaks the rules yields CM_E_INPUT, after which the ring must not be used again. A
 * ring that a dead process has touched is never reused: the supervisor makes new ones.
 *
 * Data memfd: [4096 bytes: u64 head at 0][capacity bytes], capacity a power of two. Cursor memfd:
 * [u64 tail at 0]. Head and tail count bytes since the start and never wrap. A record is a
 * struct cm_record, its payload, zeros up to a multiple of 16; a record never wraps around the end:
 * type CM_RECORD_PAD fills the rest. */
#ifndef CASEMATE_RUNTIME_BASE_RING_H
#define CASEMATE_RUNTIME_BASE_RING_H

#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"

struct cm_record {
    uint32_t bytes; /* payload */
    uint32_t type;  /* enum cm_wire_type (wire.h) */
    uint64_t request;
};

#define CM_RECORD_PAD        0u
#define CM_RING_CURSOR_BYTES 4096u
#define CM_RING_CAPACITY_MIN (64u << 10)
#define CM_RING_CAPACITY_MAX (64u << 20)

struct cm_ring {
    uint8_t *data;     /* mapped data memfd */
    size_t data_bytes; /* mapped size */
    uint8_t *cursor;   /* mapped cursor memfd */
    uint64_t capacity;
    uint64_t mine;  /* this side's own cursor; shared memory only mirrors it */
    uint64_t wiped; /* producer: records before it are zeros again */
};

/* Supervisor: make both memfds of one ring, sized and sealed against resizing. Returned descriptors
 * are read-write; the *_read ones are read-only views of the same memory for the other side. The
 * caller closes all four. */
CM_MUST_USE enum cm_status cm_ring_make(uint64_t capacity, int *ret_data, int *ret_data_read,
                                        int *ret_cursor, int *ret_cursor_read,
                                        struct cm_error *err);

/* Map one side; descriptors are borrowed and may be closed afterwards. Checks size and seals. */
CM_MUST_USE enum cm_status cm_ring_open_producer(struct cm_ring *ring, int data_fd,
                                                 int cursor_read_fd, struct cm_error *err);
CM_MUST_USE enum cm_status cm_ring_open_consumer(struct cm_ring *ring, int data_read_fd,
                                                 int cursor_fd, struct cm_error *err);
void cm_ring_close(struct cm_ring *ring); /* also fine on a zeroed struct */

/* Largest payload that a ring takes: capacity / 4. */
size_t cm_ring_payload_max(const struct cm_ring *ring);

/* Producer: append one record made of two parts (either may be empty). BUSY: no room now. INPUT:
 * the consumer's cursor is impossible. */
CM_MUST_USE enum cm_status cm_ring_put(struct cm_ring *ring, uint32_t type, uint64_t request,
                                       const void *part1, size_t bytes1, const void *part2,
                                       size_t bytes2, struct cm_error *err);

/* Consumer: copy the next record out. BUSY: empty. INPUT: malformed record or cursor. */
CM_MUST_USE enum cm_status cm_ring_get(struct cm_ring *ring, struct cm_record *ret_record,
                                       void *payload, size_t payload_size, struct cm_error *err);

/* Producer: bytes of records not yet consumed (0 = drained). */
uint64_t cm_ring_pending(const struct cm_ring *ring);

/* Producer: overwrite what was consumed with zeros. Each put does it too; called when idle, it
 * bounds how long prompts and replies stay in shared memory. */
void cm_ring_scrub(struct cm_ring *ring);

#endif
