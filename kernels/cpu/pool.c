/* Threads: made before ready, pinned to nothing, woken by a counter. A thread spins for a bounded
 * time and then sleeps on a futex, so that an idle device costs no CPU and a stolen core stalls
 * nobody for long. */
#include "kernels/cpu/cpu_internal.h"

#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPIN_PAUSES 4000

struct cm_pool {
    _Alignas(64) _Atomic uint32_t round; /* odd or even: a new value is a new task */
    _Alignas(64) _Atomic uint32_t busy;  /* helpers that have not finished */
    _Alignas(64) _Atomic uint32_t ending;
    cm_pool_task task;
    void *context;
    uint32_t threads;
    pthread_t ids[CM_THREADS_MAX];
    struct helper {
        struct cm_pool *pool;
        uint32_t index;
    } helpers[CM_THREADS_MAX];
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* Wait until *word differs from value. */
static void word_wait(_Atomic uint32_t *word, uint32_t value)
{
    for (int i = 0; i < SPIN_PAUSES; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) {
            return;
        }
        _mm_pause();
    }
    while (atomic_load_explicit(word, memory_order_acquire) == value) {
        futex_wait(word, value);
    }
}

static void *helper_main(void *argument)
{
    struct helper *helper = argument;
    struct cm_pool *pool = helper->pool;
    uint32_t round = 0;
    for (;;) {
        word_wait(&pool->round, round);
        round = atomic_load_explicit(&pool->round, memory_order_acquire);
        if (atomic_load_explicit(&pool->ending, memory_order_acquire) != 0) {
            return NULL;
        }
        pool->task(pool->context, helper->index, pool->threads);
        if (atomic_fetch_sub_explicit(&pool->busy, 1, memory_order_acq_rel) == 1) {
            futex_wake(&pool->busy);
        }
    }
}

enum cm_status cm_pool_new(uint32_t threads, struct cm_pool **ret_pool, struct cm_error *err)
{
    CM_ASSERT(threads >= 1 && threads <= CM_THREADS_MAX);
    struct cm_pool *pool = aligned_alloc(64, (sizeof(*pool) + 63) / 64 * 64);
    sigset_t all, before;
    if (pool == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "thread pool");
    }
    memset(pool, 0, sizeof(*pool));
    pool->threads = 1;
    /* Signals belong to the role's own thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    for (uint32_t i = 1; failed == 0 && i < threads; i++) {
        pool->helpers[i] = (struct helper){pool, i};
        failed = pthread_create(&pool->ids[i], NULL, helper_main, &pool->helpers[i]);
        pool->threads += failed == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed != 0) {
        cm_pool_free(pool);
        return cm_error_errno(err, failed, "CM-SYS-THREAD", "cannot start %u threads", threads);
    }
    *ret_pool = pool;
    return CM_OK;
}

void cm_pool_free(struct cm_pool *pool)
{
    if (pool == NULL) {
        return;
    }
    atomic_store_explicit(&pool->ending, 1, memory_order_release);
    atomic_fetch_add_explicit(&pool->round, 1, memory_order_acq_rel);
    futex_wake(&pool->round);
    for (uint32_t i = 1; i < pool->threads; i++) {
        pthread_join(pool->ids[i], NULL);
    }
    free(pool);
}

void cm_pool_run(struct cm_pool *pool, cm_pool_task task, void *context)
{
    if (pool->threads > 1) {
        pool->task = task;
        pool->context = context;
        atomic_store_explicit(&pool->busy, pool->threads - 1, memory_order_release);
        atomic_fetch_add_explicit(&pool->round, 1, memory_order_acq_rel);
        futex_wake(&pool->round);
    }
    task(context, 0, pool->threads);
    if (pool->threads > 1) {
        uint32_t busy;
        while ((busy = atomic_load_explicit(&pool->busy, memory_order_acquire)) != 0) {
            word_wait(&pool->busy, busy);
        }
    }
}

uint32_t cm_pool_threads(const struct cm_pool *pool)
{
    return pool->threads;
}

/* CPUs that a cgroup quota allows, rounded up; 0: no quota found. Both generations. */
static uint32_t quota_read(void)
{
    long long quota = 0, period = 0;
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (file != NULL) {
        int fields = fscanf(file, "%lld %lld", &quota, &period);
        fclose(file);
        return fields == 2 && quota > 0 && period > 0 ? (uint32_t)((quota + period - 1) / period)
                                                      : 0;
    }
    const char *const paths[2] = {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
                                  "/sys/fs/cgroup/cpu/cpu.cfs_period_us"};
    long long values[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
        file = fopen(paths[i], "re");
        if (file == NULL) {
            return 0;
        }
        if (fscanf(file, "%lld", &values[i]) != 1) {
            values[i] = 0;
        }
        fclose(file);
    }
    return values[0] > 0 && values[1] > 0 ? (uint32_t)((values[0] + values[1] - 1) / values[1]) : 0;
}

uint32_t cm_threads_available(void)
{
    cpu_set_t set;
    uint32_t count = 1;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        count = (uint32_t)CPU_COUNT(&set);
    }
    uint32_t quota = quota_read();
    count = quota > 0 && quota < count ? quota : count;
    return count < 1 ? 1 : (count > CM_THREADS_MAX ? CM_THREADS_MAX : count);
}
