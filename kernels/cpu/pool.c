/* Threads that run one program together: each executes the same phases, takes chunks of each phase
 * and meets the others in a barrier. A thread that waits spins for a bounded time and then sleeps
 * on a futex, so that an idle device costs no CPU, and a core that was taken away gets its thread
 * back sooner: the sleeper's core is free for it. */
#include "kernels/cpu/cpu_internal.h"
#include "runtime/base/clock.h"

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

/* Waits within a step last microseconds. A thread spins for somewhat longer, then sleeps: the core
 * may be the one that the late thread is queued on. */
#define SPIN_PHASE_NS 50000u
#define SPIN_STEP_NS  150000u

/* A core half stolen makes all threads wait for the one on it. Once such waits (over LATE_NS each)
 * have taken a quarter of WINDOW_NS, the program runs with a thread less, which no longer meets the
 * thief; later all threads are tried again, each time after twice as long. */
#define LATE_NS     100000u
#define WINDOW_NS   16000000u
#define REST_NS     20000000u
#define REST_NS_MAX 1280000000u

/* A word that threads wait on. */
struct gate {
    _Alignas(64) _Atomic uint32_t word;
    _Atomic uint32_t sleepers;
};

/* Where a thread's own range of the phase stands: phase number << 32 | next unit. */
struct cursor {
    _Alignas(64) _Atomic uint64_t at;
};

/* When to run with fewer threads. Kept by the caller's thread. */
struct pace {
    uint64_t window_ns; /* run time since the window began */
    uint64_t rest_ns, rest_until_ns;
};

struct cm_pool {
    struct gate start[CM_THREADS_MAX]; /* of each helper: the programs that it has been given */
    struct gate phase;                 /* the barrier's number */
    _Alignas(64) _Atomic uint32_t arrived;
    _Alignas(64) _Atomic uint32_t busy; /* helpers inside the program */
    struct gate done;
    _Atomic uint32_t ending;
    _Alignas(64) _Atomic uint64_t late_ns; /* of this window, all threads */
    cm_pool_program program;
    void *context;
    uint32_t threads;
    uint32_t active; /* threads of the running program */
    struct pace pace;
    struct cursor cursors[CM_THREADS_MAX];
    struct cm_worker workers[CM_THREADS_MAX];
    pthread_t ids[CM_THREADS_MAX];
};

/* Wait until the gate's word differs from value. Returns for how long, 0 if it was short. */
static uint64_t gate_wait(struct gate *gate, uint32_t value, uint64_t spin_ns)
{
    uint64_t begun = 0;
    for (uint32_t i = 1; atomic_load_explicit(&gate->word, memory_order_acquire) == value; i++) {
        _mm_pause();
        if (i % 64 != 0) {
            continue;
        }
        uint64_t now = cm_clock_ns();
        begun = begun == 0 ? now : begun;
        if (now < begun + spin_ns) {
            continue;
        }
        atomic_fetch_add(&gate->sleepers, 1);
        while (atomic_load(&gate->word) == value) {
            syscall(SYS_futex, &gate->word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
        }
        atomic_fetch_sub(&gate->sleepers, 1);
    }
    return begun == 0 ? 0 : cm_clock_ns() - begun;
}

static void gate_open(struct gate *gate)
{
    atomic_fetch_add(&gate->word, 1);
    if (atomic_load(&gate->sleepers) != 0) {
        syscall(SYS_futex, &gate->word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    }
}

void cm_pool_barrier(struct cm_worker *worker)
{
    struct cm_pool *pool = worker->pool;
    uint32_t phase = worker->phase++;
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) + 1 == pool->active) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        gate_open(&pool->phase);
        return;
    }
    uint64_t waited = gate_wait(&pool->phase, phase, SPIN_PHASE_NS);
    if (waited > LATE_NS) {
        atomic_fetch_add_explicit(&pool->late_ns, waited, memory_order_relaxed);
    }
}

static uint32_t share(uint32_t count, uint32_t part, uint32_t parts)
{
    return (uint32_t)((uint64_t)count * part / parts);
}

/* Own units first, in the order of memory; then those that another thread has not come to. The
 * phase number in the cursor keeps a late thread's old range from being taken again. */
void cm_pool_phase(struct cm_worker *worker, uint32_t count)
{
    worker->count = count;
    worker->victim = 0;
    atomic_store_explicit(&worker->pool->cursors[worker->index].at,
                          (uint64_t)worker->phase << 32 |
                              share(count, worker->index, worker->pool->active),
                          memory_order_release);
}

static bool range_take(struct cm_worker *worker, uint32_t owner, uint32_t want, uint32_t *ret_first,
                       uint32_t *ret_last)
{
    struct cursor *cursor = &worker->pool->cursors[owner];
    uint32_t end = share(worker->count, owner + 1, worker->pool->active);
    uint64_t at = atomic_load_explicit(&cursor->at, memory_order_acquire);
    if (at >> 32 != worker->phase || (uint32_t)at >= end) {
        return false;
    }
    uint32_t first = (uint32_t)atomic_fetch_add_explicit(&cursor->at, want, memory_order_acq_rel);
    *ret_first = first;
    *ret_last = end - first < want ? end : first + want;
    return first < end;
}

bool cm_pool_take(struct cm_worker *worker, uint32_t *ret_first, uint32_t *ret_last)
{
    uint32_t threads = worker->pool->active;
    uint32_t want = worker->count / (threads * CM_TAKES);
    if (range_take(worker, worker->index, want > 1 ? want : 1, ret_first, ret_last)) {
        return true;
    }
    for (; worker->victim + 1 < threads; worker->victim++) {
        uint32_t owner = (worker->index + 1 + worker->victim) % threads;
        if (range_take(worker, owner, 1, ret_first, ret_last)) {
            return true;
        }
    }
    return false;
}

static void program_run(struct cm_pool *pool, struct cm_worker *worker)
{
    worker->phase = atomic_load(&pool->phase.word);
    pool->program(pool->context, worker);
}

static void *helper_main(void *argument)
{
    struct cm_worker *worker = argument;
    struct cm_pool *pool = worker->pool;
    for (uint32_t round = 0;; round++) {
        gate_wait(&pool->start[worker->index], round, SPIN_STEP_NS);
        if (atomic_load_explicit(&pool->ending, memory_order_acquire) != 0) {
            return NULL;
        }
        program_run(pool, worker);
        if (atomic_fetch_sub_explicit(&pool->busy, 1, memory_order_acq_rel) == 1) {
            gate_open(&pool->done);
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
    for (uint32_t i = 0; i < threads; i++) {
        pool->workers[i] = (struct cm_worker){.pool = pool, .index = i};
        atomic_store(&pool->cursors[i].at, UINT64_MAX); /* no phase yet */
    }
    pool->threads = 1;
    pool->pace.rest_ns = REST_NS;
    /* Signals belong to the role's own thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    for (uint32_t i = 1; failed == 0 && i < threads; i++) {
        failed = pthread_create(&pool->ids[i], NULL, helper_main, &pool->workers[i]);
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
    for (uint32_t i = 1; i < pool->threads; i++) {
        gate_open(&pool->start[i]);
        pthread_join(pool->ids[i], NULL);
    }
    free(pool);
}

/* How many threads the next program gets. */
static uint32_t pace_choose(struct cm_pool *pool, uint64_t now)
{
    return pool->threads > 1 && now < pool->pace.rest_until_ns ? pool->threads - 1 : pool->threads;
}

static void pace_keep(struct cm_pool *pool, uint64_t took)
{
    struct pace *pace = &pool->pace;
    if (pool->active < pool->threads || pool->threads == 1) {
        return;
    }
    /* What each waiting thread lost; a long step's phases may end unevenly without any thief. */
    uint64_t late =
        atomic_load_explicit(&pool->late_ns, memory_order_relaxed) / (pool->threads - 1);
    pace->window_ns += took;
    bool slow = late >= WINDOW_NS / 4 && late >= pace->window_ns / 4;
    if (!slow && pace->window_ns < WINDOW_NS) {
        return;
    }
    if (slow) {
        pace->rest_until_ns = cm_clock_ns() + pace->rest_ns;
        pace->rest_ns = pace->rest_ns < REST_NS_MAX ? 2 * pace->rest_ns : REST_NS_MAX;
    } else {
        pace->rest_ns = REST_NS;
    }
    pace->window_ns = 0;
    atomic_store_explicit(&pool->late_ns, 0, memory_order_relaxed);
}

void cm_pool_run(struct cm_pool *pool, cm_pool_program program, void *context)
{
    uint32_t done = atomic_load(&pool->done.word);
    uint64_t begun = cm_clock_ns();
    pool->program = program;
    pool->context = context;
    pool->active = pace_choose(pool, begun);
    atomic_store_explicit(&pool->busy, pool->active - 1, memory_order_release);
    for (uint32_t i = 1; i < pool->active; i++) {
        gate_open(&pool->start[i]);
    }
    program_run(pool, &pool->workers[0]);
    if (pool->active > 1) {
        gate_wait(&pool->done, done, SPIN_PHASE_NS);
    }
    pace_keep(pool, cm_clock_ns() - begun);
}

uint32_t cm_pool_threads(const struct cm_pool *pool)
{
    return pool->threads;
}

/* Whole CPUs that a cgroup quota allows; 0: no quota found. Rounded down: a thread too many runs
 * into the quota and stalls everybody for the rest of the period. Both generations of cgroups. */
static uint32_t quota_read(void)
{
    long long quota = 0, period = 0;
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (file != NULL) {
        if (fscanf(file, "%lld %lld", &quota, &period) != 2) {
            quota = 0; /* "max" */
        }
        fclose(file);
    } else {
        long long *const values[2] = {&quota, &period};
        const char *const paths[2] = {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
                                      "/sys/fs/cgroup/cpu/cpu.cfs_period_us"};
        for (int i = 0; i < 2; i++) {
            file = fopen(paths[i], "re");
            if (file == NULL || fscanf(file, "%lld", values[i]) != 1) {
                *values[i] = 0;
            }
            if (file != NULL) {
                fclose(file);
            }
        }
    }
    if (quota <= 0 || period <= 0) {
        return 0;
    }
    return quota < period ? 1 : (uint32_t)(quota / period);
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
