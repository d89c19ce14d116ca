/* Threads that run one program together. Each goes through the same phases and takes chunks of
 * each; a phase is over when all its units are finished, whoever computed them. So only a thread
 * that holds a chunk is ever waited for: one that the scheduler has taken off its core elsewhere,
 * or that has not come yet, finds its part done and catches up.
 *
 * Why this is free of races: a unit is taken once, by compare-and-swap of a cursor that carries its
 * phase's number, and a phase cannot end before the units taken in it are finished. What a phase
 * reads and writes is touched between a take and the barrier alone, so it happens after the phase
 * before and before the one behind: each thread's count of finished units is added to `finished`
 * (release), the last one opens the gate, and who passes the gate has seen it open (acquire). A
 * thread that comes late finds cursors of a later phase, takes nothing and touches nothing. The
 * step's own fields are read while the thread is a member of the program; the caller lets nobody in
 * any more, and waits for all members to leave, before it returns.
 *
 * A thread that waits spins for a bounded time and then sleeps on a futex, so that an idle device
 * costs no CPU, and a core that was taken away gets its thread back sooner: the sleeper's core is
 * free for it. */
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

/* A core half stolen: the thread on it loses the core for the scheduler's slice, mostly with a
 * chunk in its hands, and all others wait. Once such waits (over LATE_NS each) have taken
 * LATE_NS_MIN and a quarter of the time, at most WINDOW_NS, or a helper has found no core of its
 * own, programs run with a thread less, which no longer meets the thief; later all threads are
 * tried again, each time after twice as long. */
#define LATE_NS     100000u
#define LATE_NS_MIN 2000000u
#define WINDOW_NS   16000000u
#define REST_NS     20000000u
#define REST_NS_MAX 160000000u

/* A helper that was woken on the core of another of our threads can only slow that one down. While
 * a thief is about, one that was kept waiting for its core would likely lose it again within the
 * step. Both ask again after RETRY_NS: a long step is worth it. */
#define JOIN_NS  1000000u
#define RETRY_NS 8000000u

/* A word that threads wait on. */
struct gate {
    _Alignas(64) _Atomic uint32_t word;
    _Atomic uint32_t sleepers;
};

/* Where a thread's own range of the phase stands: phase number << 32 | next unit. A number before
 * the phase's own: nobody has taken any of it yet. */
struct cursor {
    _Alignas(64) _Atomic uint64_t at;
};

/* When to run with fewer threads. Kept by the caller's thread. */
struct pace {
    uint64_t window_ns; /* run time since the window began */
    uint64_t rest_ns, rest_until_ns;
};

#define MEMBERS_OPEN 0x80000000u

struct cm_pool {
    struct gate start[CM_THREADS_MAX]; /* of each helper: the programs that it has been given */
    struct gate phase;                 /* number of the phase that is being computed */
    _Alignas(64) _Atomic uint64_t finished; /* phase number << 32 | its finished units */
    _Alignas(64) _Atomic uint32_t members;  /* helpers inside the program, MEMBERS_OPEN: join */
    struct gate left;                       /* programs whose last helper left after the caller */
    _Atomic uint32_t ending;
    _Alignas(64) _Atomic uint64_t late_ns; /* of this window, all threads */
    _Atomic uint32_t crowded;              /* in this program a helper found no core of its own */
    _Alignas(64) cm_pool_program program;
    void *context;
    uint64_t begun_ns;    /* of the running program */
    uint32_t first_phase; /* of the running program */
    uint32_t active;      /* threads that it may have */
    bool wary;            /* a thread was left out lately */
    uint32_t threads;
    struct pace pace;
    struct cursor cursors[CM_THREADS_MAX];
    struct cm_worker workers[CM_THREADS_MAX];
    pthread_t ids[CM_THREADS_MAX];
};

static void gate_sleep(struct gate *gate, uint32_t value, const struct timespec *timeout)
{
    atomic_fetch_add(&gate->sleepers, 1);
    if (atomic_load(&gate->word) == value) {
        syscall(SYS_futex, &gate->word, FUTEX_WAIT_PRIVATE, value, timeout, NULL, 0);
    }
    atomic_fetch_sub(&gate->sleepers, 1);
}

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
        gate_sleep(gate, value, NULL);
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

/* Count this thread's units as finished. True: they were the phase's last. */
static bool units_finish(struct cm_worker *worker)
{
    _Atomic uint64_t *finished = &worker->pool->finished;
    uint64_t at = atomic_load_explicit(finished, memory_order_relaxed), next;
    do {
        uint32_t before = at >> 32 == worker->phase ? (uint32_t)at : 0;
        next = (uint64_t)worker->phase << 32 | (before + worker->taken);
    } while (!atomic_compare_exchange_weak_explicit(finished, &at, next, memory_order_acq_rel,
                                                    memory_order_relaxed));
    return (uint32_t)next == worker->count;
}

void cm_pool_barrier(struct cm_worker *worker)
{
    struct cm_pool *pool = worker->pool;
    if (worker->count == 0) {
        return;
    }
    bool last = worker->taken > 0 && units_finish(worker);
    uint32_t phase = worker->phase++;
    if (last) {
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

void cm_pool_phase(struct cm_worker *worker, uint32_t count)
{
    worker->count = count;
    worker->victim = 0;
    worker->taken = 0;
    atomic_store_explicit(&worker->core, sched_getcpu(), memory_order_relaxed);
}

static bool range_take(struct cm_worker *worker, uint32_t owner, uint32_t want, uint32_t *ret_first,
                       uint32_t *ret_last)
{
    _Atomic uint64_t *cursor = &worker->pool->cursors[owner].at;
    const uint32_t start = share(worker->count, owner, worker->pool->active);
    const uint32_t end = share(worker->count, owner + 1, worker->pool->active);
    uint64_t at = atomic_load_explicit(cursor, memory_order_acquire);
    uint32_t first, last;
    do {
        int32_t age = (int32_t)((uint32_t)(at >> 32) - worker->phase);
        first = age == 0 ? (uint32_t)at : start;
        if (age > 0 || first >= end) {
            return false; /* age > 0: this phase is over */
        }
        last = end - first < want ? end : first + want;
    } while (!atomic_compare_exchange_weak_explicit(cursor, &at,
                                                    (uint64_t)worker->phase << 32 | last,
                                                    memory_order_acq_rel, memory_order_acquire));
    worker->taken += last - first;
    *ret_first = first;
    *ret_last = last;
    return true;
}

/* Own units first, in the order of memory; then those that another thread has not come to. */
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
    worker->phase = pool->first_phase;
    pool->program(pool->context, worker);
    atomic_store_explicit(&worker->core, -1, memory_order_relaxed);
}

/* Has this member a core of its own, and likely for long enough? */
static bool member_fits(struct cm_pool *pool, const struct cm_worker *worker)
{
    const uint64_t age = cm_clock_ns() - pool->begun_ns;
    const int core = sched_getcpu();
    bool own = true;
    for (uint32_t i = 0; core >= 0 && i < worker->index; i++) {
        own = own && atomic_load_explicit(&pool->workers[i].core, memory_order_relaxed) != core;
    }
    if (!own) {
        atomic_store_explicit(&pool->crowded, 1, memory_order_relaxed);
    }
    return own && (!pool->wary || age <= JOIN_NS || age >= RETRY_NS);
}

/* Run the program as a member of it. False: it goes on without this thread for now. */
static bool program_join(struct cm_pool *pool, struct cm_worker *worker)
{
    uint32_t members = atomic_load(&pool->members);
    do {
        if ((members & MEMBERS_OPEN) == 0) {
            return true; /* it is over */
        }
    } while (!atomic_compare_exchange_weak(&pool->members, &members, members + 1));
    const bool wanted = worker->index < pool->active;
    const bool fits = wanted && member_fits(pool, worker);
    if (fits) {
        program_run(pool, worker);
    }
    if (atomic_fetch_sub(&pool->members, 1) == 1) {
        gate_open(&pool->left);
    }
    return fits || !wanted;
}

static void *helper_main(void *argument)
{
    static const struct timespec retry = {0, RETRY_NS};
    struct cm_worker *worker = argument;
    struct cm_pool *pool = worker->pool;
    struct gate *start = &pool->start[worker->index];
    for (uint32_t round = 0;;) {
        gate_wait(start, round, SPIN_STEP_NS);
        round = atomic_load(&start->word);
        if (atomic_load_explicit(&pool->ending, memory_order_acquire) != 0) {
            return NULL;
        }
        while (!program_join(pool, worker) && atomic_load(&start->word) == round) {
            gate_sleep(start, round, &retry);
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
        pool->workers[i] = (struct cm_worker){.pool = pool, .index = i, .core = -1};
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
    bool slow = (late >= LATE_NS_MIN && late >= pace->window_ns / 4) ||
                atomic_load_explicit(&pool->crowded, memory_order_relaxed) != 0;
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
    const uint32_t left = atomic_load(&pool->left.word);
    pool->begun_ns = cm_clock_ns();
    pool->program = program;
    pool->context = context;
    pool->active = pace_choose(pool, pool->begun_ns);
    pool->wary = pool->pace.rest_ns > REST_NS;
    pool->first_phase = atomic_load(&pool->phase.word);
    atomic_store_explicit(&pool->workers[0].core, sched_getcpu(), memory_order_relaxed);
    atomic_store_explicit(&pool->crowded, 0, memory_order_relaxed);
    for (uint32_t i = 0; i < pool->active; i++) {
        atomic_store_explicit(&pool->cursors[i].at, (uint64_t)(pool->first_phase - 1) << 32,
                              memory_order_relaxed);
    }
    atomic_store(&pool->members, MEMBERS_OPEN);
    for (uint32_t i = 1; i < pool->active; i++) {
        gate_open(&pool->start[i]);
    }
    program_run(pool, &pool->workers[0]);
    if (atomic_fetch_and(&pool->members, ~MEMBERS_OPEN) != MEMBERS_OPEN) {
        gate_wait(&pool->left, left, SPIN_PHASE_NS);
    }
    pace_keep(pool, cm_clock_ns() - pool->begun_ns);
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
