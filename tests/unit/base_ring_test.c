/* Rings between two sides that do not trust each other. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime/base/ring.h"

struct pair {
    struct cm_ring producer, consumer;
    int fds[4];
};

static void pair_open(struct pair *pair, uint64_t capacity)
{
    struct cm_error err;
    memset(pair, 0, sizeof(*pair));
    cr_assert_eq(
        cm_ring_make(capacity, &pair->fds[0], &pair->fds[1], &pair->fds[2], &pair->fds[3], &err),
        CM_OK);
    cr_assert_eq(cm_ring_open_producer(&pair->producer, pair->fds[0], pair->fds[3], &err), CM_OK);
    cr_assert_eq(cm_ring_open_consumer(&pair->consumer, pair->fds[1], pair->fds[2], &err), CM_OK);
}

static void pair_close(struct pair *pair)
{
    cm_ring_close(&pair->producer);
    cm_ring_close(&pair->consumer);
    for (int i = 0; i < 4; i++) {
        close(pair->fds[i]);
    }
}

Test(base_ring, records_come_out_as_they_went_in_over_many_wraps)
{
    struct pair pair;
    struct cm_error err;
    pair_open(&pair, CM_RING_CAPACITY_MIN);
    static uint8_t in[16384], out[16384];
    srand(1);
    uint64_t put = 0, got = 0;
    while (got < 20000) {
        size_t bytes = (size_t)(rand() % 16384);
        memset(in, (int)(put & 255), bytes);
        if (put < 20000 && cm_ring_put(&pair.producer, 7, put, in, bytes / 2, in + bytes / 2,
                                       bytes - bytes / 2, &err) == CM_OK) {
            put++;
        }
        struct cm_record record;
        if (rand() % 2 == 0 &&
            cm_ring_get(&pair.consumer, &record, out, sizeof(out), &err) == CM_OK) {
            cr_assert_eq(record.type, 7u);
            cr_assert_eq(record.request, got);
            for (uint32_t i = 0; i < record.bytes; i++) {
                cr_assert_eq(out[i], (uint8_t)(got & 255));
            }
            got++;
        }
    }
    cr_assert_eq(cm_ring_pending(&pair.producer), 0u);
    pair_close(&pair);
}

Test(base_ring, full_and_empty_are_busy)
{
    struct pair pair;
    struct cm_error err;
    struct cm_record record;
    static uint8_t bytes[16384];
    pair_open(&pair, CM_RING_CAPACITY_MIN);
    cr_assert_eq(cm_ring_get(&pair.consumer, &record, bytes, sizeof(bytes), &err), CM_E_BUSY);
    int count = 0;
    while (cm_ring_put(&pair.producer, 1, 0, bytes, 16000, NULL, 0, &err) == CM_OK) {
        count++;
    }
    cr_assert_eq(err.status, CM_E_BUSY);
    cr_assert_eq(count, 4);
    cr_assert_eq(cm_ring_get(&pair.consumer, &record, bytes, sizeof(bytes), &err), CM_OK);
    cr_assert_eq(cm_ring_put(&pair.producer, 1, 0, bytes, 16000, NULL, 0, &err), CM_OK);
    pair_close(&pair);
}

Test(base_ring, a_lying_producer_is_refused)
{
    struct pair pair;
    struct cm_error err;
    struct cm_record record;
    uint8_t bytes[64];
    uint64_t heads[] = {8, 17, CM_RING_CAPACITY_MIN + 16, UINT64_MAX};
    for (size_t i = 0; i < sizeof(heads) / sizeof(heads[0]); i++) {
        pair_open(&pair, CM_RING_CAPACITY_MIN);
        memcpy(pair.producer.data, &heads[i], sizeof(heads[i]));
        cr_assert_eq(cm_ring_get(&pair.consumer, &record, bytes, sizeof(bytes), &err), CM_E_INPUT);
        pair_close(&pair);
    }
    pair_open(&pair, CM_RING_CAPACITY_MIN);
    cr_assert_eq(cm_ring_put(&pair.producer, 1, 0, bytes, 64, NULL, 0, &err), CM_OK);
    uint32_t lie = 0x7fffffff;
    memcpy(pair.producer.data + CM_RING_CURSOR_BYTES, &lie, sizeof(lie));
    cr_assert_eq(cm_ring_get(&pair.consumer, &record, bytes, sizeof(bytes), &err), CM_E_INPUT);
    pair_close(&pair);
}

Test(base_ring, a_lying_consumer_is_refused_and_neither_side_can_write_the_others_part)
{
    struct pair pair;
    struct cm_error err;
    pair_open(&pair, CM_RING_CAPACITY_MIN);
    uint64_t tail = 4096; /* ahead of the producer */
    memcpy(pair.consumer.cursor, &tail, sizeof(tail));
    cr_assert_eq(cm_ring_put(&pair.producer, 1, 0, "x", 1, NULL, 0, &err), CM_E_INPUT);
    cr_assert_neq(mprotect(pair.consumer.data, 4096, PROT_READ | PROT_WRITE), 0);
    cr_assert_neq(mprotect(pair.producer.cursor, 4096, PROT_READ | PROT_WRITE), 0);
    cr_assert_eq(mprotect(pair.producer.data, 4096, PROT_READ | PROT_WRITE), 0);
    pair_close(&pair);
}

Test(base_ring, unsealed_memory_and_odd_sizes_are_refused)
{
    struct cm_error err;
    struct cm_ring ring = {0};
    int fds[4];
    int plain = memfd_create("plain", 0);
    cr_assert_eq(ftruncate(plain, CM_RING_CURSOR_BYTES + CM_RING_CAPACITY_MIN), 0);
    cr_assert_eq(cm_ring_open_consumer(&ring, plain, plain, &err), CM_E_INPUT);
    cr_assert_eq(cm_ring_make(CM_RING_CAPACITY_MIN + 1, &fds[0], &fds[1], &fds[2], &fds[3], &err),
                 CM_E_CONFIG);
    cr_assert_eq(cm_ring_make(CM_RING_CAPACITY_MIN / 2, &fds[0], &fds[1], &fds[2], &fds[3], &err),
                 CM_E_CONFIG);
    close(plain);
}

static size_t bytes_that_are(const struct cm_ring *ring, uint8_t value)
{
    size_t count = 0;
    for (size_t i = CM_RING_CURSOR_BYTES; i < ring->data_bytes; i++) {
        count += ring->data[i] == value;
    }
    return count;
}

Test(base_ring, what_was_consumed_is_wiped_and_nothing_else)
{
    struct pair pair;
    struct cm_error err;
    struct cm_record record;
    static uint8_t in[6000], out[16384];
    memset(in, 0xa5, sizeof(in));
    pair_open(&pair, CM_RING_CAPACITY_MIN);
    for (int round = 0; round < 40; round++) { /* over several wraps */
        cr_assert_eq(cm_ring_put(&pair.producer, 1, 1, in, sizeof(in), NULL, 0, &err), CM_OK);
        cr_assert_eq(cm_ring_put(&pair.producer, 1, 2, in, sizeof(in), NULL, 0, &err), CM_OK);
        cm_ring_scrub(&pair.producer);
        cr_assert_eq(bytes_that_are(&pair.producer, 0xa5), 2 * sizeof(in), "round %d", round);
        cr_assert_eq(cm_ring_get(&pair.consumer, &record, out, sizeof(out), &err), CM_OK);
        cm_ring_scrub(&pair.producer);
        cr_assert_eq(bytes_that_are(&pair.producer, 0xa5), sizeof(in));
        cr_assert_eq(cm_ring_get(&pair.consumer, &record, out, sizeof(out), &err), CM_OK);
        cr_assert_eq(memcmp(out, in, sizeof(in)), 0);
    }
    cm_ring_scrub(&pair.producer);
    cr_assert_eq(bytes_that_are(&pair.producer, 0), pair.producer.capacity);
    /* A consumer that lies can wipe no more than what it was given. */
    cr_assert_eq(cm_ring_put(&pair.producer, 1, 3, in, sizeof(in), NULL, 0, &err), CM_OK);
    const uint64_t lies[] = {0, UINT64_MAX, pair.producer.mine + 16,
                             pair.producer.mine + (1 << 20)};
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        memcpy(pair.consumer.cursor, &lies[i], sizeof(lies[i]));
        cm_ring_scrub(&pair.producer);
        cr_assert_eq(bytes_that_are(&pair.producer, 0xa5), sizeof(in), "lie %zu", i);
    }
    pair_close(&pair);
}
