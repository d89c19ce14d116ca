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

/* A core half stolen: the thread on it loses the core for the scheduler's slice, mostly with units
 * in its hands, and the others wait for it. One of them brings it to its own core and sleeps.
 * A thread whose time of computing has not grown for STILL_NS is not on any core. */
#define STILL_NS 20000u
static const struct timespec look_again = {0, 250000};

/* A helper without a core of its own can only slow another thread down. It asks again, unless the
 * program is over by then. */
static const struct timespec retry = {0, 8000000};

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

#define MEMBERS_OPEN 0x80000000u

struct cm_pool {
    struct gate start[CM_THREADS_MAX]; /* of each helper: the programs that it has been given */
    struct gate phase;                 /* number of the phase that is being computed */
    _Alignas(64) _Atomic uint64_t finished; /* phase number << 32 | its finished units */
    _Alignas(64) _Atomic uint32_t members;  /* helpers inside the program, MEMBERS_OPEN: join */
    struct gate left;                       /* programs whose last helper left after the caller */
    _Atomic uint32_t ending;
    _Alignas(64) cm_pool_program program;
    void *context;
    uint32_t first_phase; /* of the running program */
    uint32_t threads;
    cpu_set_t cores; /* that all of them may use */
    struct cursor cursors[CM_THREADS_MAX];
    struct cm_worker workers[CM_THREADS_MAX];
};

static void gate_sleep(struct gate *gate, uint32_t value, const struct timespec *timeout)
{
    atomic_fetch_add(&gate->sleepers, 1);
    if (atomic_load(&gate->word) == value) {
        syscall(SYS_futex, &gate->word, FUTEX_WAIT_PRIVATE, value, timeout, NULL, 0);
    }
    atomic_fetch_sub(&gate->sleepers, 1);
}

/* Spin until the gate's word differs from value. False: it does not, so far. */
static bool gate_spin(const struct gate *gate, uint32_t value, uint64_t spin_ns)
{
    uint64_t begun = 0;
    for (uint32_t i = 1; atomic_load_explicit(&gate->word, memory_order_acquire) == value; i++) {
        _mm_pause();
        if (i % 64 != 0) {
            continue;
        }
        uint64_t now = cm_clock_ns();
        begun = begun == 0 ? now : begun;
        if (now >= begun + spin_ns) {
            return false;
        }
    }
    return true;
}

static void gate_open(struct gate *gate)
{
    atomic_fetch_add(&gate->word, 1);
    if (atomic_load(&gate->sleepers) != 0) {
        syscall(SYS_futex, &gate->word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    }
}

/* What the thread has computed since it began. */
static uint64_t ran_ns(pthread_t thread)
{
    clockid_t clock;
    struct timespec ran = {0, 0};
    if (pthread_getcpuclockid(thread, &clock) == 0) {
        clock_gettime(clock, &ran);
    }
    return (uint64_t)ran.tv_sec * 1000000000u + (uint64_t)ran.tv_nsec;
}

/* Have a thread run on one of these cores now. It keeps its right to all of them. */
static bool thread_move(struct cm_worker *worker, const cpu_set_t *cores)
{
    const cpu_set_t *all = &worker->pool->cores;
    cpu_set_t some;
    CPU_AND(&some, all, cores);
    return CPU_COUNT(&some) > 0 &&
           pthread_setaffinity_np(worker->thread, sizeof(some), &some) == 0 &&
           pthread_setaffinity_np(worker->thread, sizeof(*all), all) == 0;
}

/* Have a thread go to a core that no other thread of the program computes on. False: there is none.
 */
static bool core_change(struct cm_worker *worker)
{
    struct cm_pool *pool = worker->pool;
    cpu_set_t cores;
    memset(&cores, 0xff, sizeof(cores));
    for (uint32_t i = 0; i < pool->threads; i++) {
        const int core = atomic_load_explicit(&pool->workers[i].core, memory_order_relaxed);
        if (i != worker->index && core >= 0) {
            CPU_CLR((size_t)core, &cores);
        }
    }
    if (!thread_move(worker, &cores)) {
        return false;
    }
    atomic_store_explicit(&worker->core, -1, memory_order_relaxed); /* until it runs there */
    return true;
}

/* Put the late thread on this thread's core, which will be free for it. */
static bool thread_bring(struct cm_worker *late)
{
    const int core = sched_getcpu();
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET((size_t)core, &cores);
    if (core < 0 || !thread_move(late, &cores)) {
        return false;
    }
    atomic_store_explicit(&late->core, core, memory_order_relaxed);
    return true;
}

static bool thread_still(const struct cm_worker *worker)
{
    const uint64_t ran = ran_ns(worker->thread), end = cm_clock_ns() + STILL_NS;
    while (cm_clock_ns() < end) {
        _mm_pause();
    }
    return ran_ns(worker->thread) == ran;
}

/* A thread of this stage at least, on another core, that is not computing though it could. */
static struct cm_worker *late_find(const struct cm_worker *worker, enum cm_worker_stage stage)
{
    struct cm_pool *pool = worker->pool;
    const int core = sched_getcpu();
    for (uint32_t i = 0; i < pool->threads; i++) {
        struct cm_worker *late = &pool->workers[i];
        if (late != worker && atomic_load_explicit(&late->core, memory_order_relaxed) != core &&
            atomic_load_explicit(&late->stage, memory_order_relaxed) >= stage &&
            thread_still(late) &&
            atomic_load_explicit(&late->stage, memory_order_relaxed) >= stage) {
            return late;
        }
    }
    return NULL;
}

/* Wait until the gate's word differs from value: others, who are in this stage, will open it. Of
 * two threads on one core the helper with the higher number is sent away after that. */
static void gate_await(struct cm_worker *worker, struct gate *gate, uint32_t value,
                       enum cm_worker_stage stage)
{
    struct cm_worker *other = NULL;
    if (gate_spin(gate, value, SPIN_PHASE_NS)) {
        return;
    }
    while (atomic_load_explicit(&gate->word, memory_order_acquire) == value) {
        struct cm_worker *late = late_find(worker, stage);
        if (late != NULL && thread_bring(late)) {
            other = late->index > worker->index ? late : worker;
        }
        gate_sleep(gate, value, &look_again);
    }
    if (other != NULL) {
        core_change(other);
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
    atomic_store_explicit(&worker->stage, CM_WORKER_IN, memory_order_relaxed);
    uint32_t phase = worker->phase++;
    if (last) {
        gate_open(&pool->phase);
        return;
    }
    gate_await(worker, &pool->phase, phase, CM_WORKER_HOLDS);
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
    const uint32_t start = share(worker->count, owner, worker->pool->threads);
    const uint32_t end = share(worker->count, owner + 1, worker->pool->threads);
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
    atomic_store_explicit(&worker->stage, CM_WORKER_HOLDS, memory_order_relaxed);
    *ret_first = first;
    *ret_last = last;
    return true;
}

/* Own units first, in the order of memory; then those that another thread has not come to. */
bool cm_pool_take(struct cm_worker *worker, uint32_t *ret_first, uint32_t *ret_last)
{
    uint32_t threads = worker->pool->threads;
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

/* Has this member a core of its own? */
static bool member_fits(struct cm_pool *pool, const struct cm_worker *worker)
{
    const int core = sched_getcpu();
    bool own = true;
    for (uint32_t i = 0; core >= 0 && i < worker->index; i++) {
        own = own && atomic_load_explicit(&pool->workers[i].core, memory_order_relaxed) != core;
    }
    return own;
}

/* Become a member of the program that runs. False: it is over. */
static bool member_enter(struct cm_pool *pool)
{
    uint32_t members = atomic_load(&pool->members);
    do {
        if ((members & MEMBERS_OPEN) == 0) {
            return false;
        }
    } while (!atomic_compare_exchange_weak(&pool->members, &members, members + 1));
    return true;
}

/* Run the program as a member of it. False: it goes on without this thread for now. The stage is
 * told before and after: who waits for members finds each of them. */
static bool program_join(struct cm_pool *pool, struct cm_worker *worker)
{
    bool done = true;
    atomic_store_explicit(&worker->stage, CM_WORKER_IN, memory_order_relaxed);
    if (member_enter(pool)) {
        done = member_fits(pool, worker);
        if (done) {
            program_run(pool, worker);
        }
        if (atomic_fetch_sub(&pool->members, 1) == 1) {
            gate_open(&pool->left);
        }
    }
    atomic_store_explicit(&worker->stage, CM_WORKER_OUT, memory_order_relaxed);
    return done;
}

/* The caller may have lost its core between two programs: then none would begin. If it only waits
 * for work, this does nothing to it. */
static void caller_look(const struct cm_worker *worker)
{
    struct cm_worker *caller = &worker->pool->workers[0];
    if (worker->index == 1 && thread_still(caller)) {
        thread_bring(caller);
    }
}

static void *helper_main(void *argument)
{
    struct cm_worker *worker = argument;
    struct cm_pool *pool = worker->pool;
    struct gate *start = &pool->start[worker->index];
    for (uint32_t round = 0;;) {
        if (!gate_spin(start, round, SPIN_STEP_NS)) {
            caller_look(worker);
        }
        while (atomic_load_explicit(&start->word, memory_order_acquire) == round) {
            gate_sleep(start, round, NULL);
        }
        round = atomic_load(&start->word);
        if (atomic_load_explicit(&pool->ending, memory_order_acquire) != 0) {
            return NULL;
        }
        while (!program_join(pool, worker) && atomic_load(&start->word) == round) {
            if (!core_change(worker)) {
                gate_sleep(start, round, &retry);
            }
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
    if (sched_getaffinity(0, sizeof(pool->cores), &pool->cores) != 0) {
        CPU_ZERO(&pool->cores); /* more than a set holds: nobody is moved */
    }
    pool->workers[0].thread = pthread_self();
    pool->threads = 1;
    /* Signals belong to the role's own thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    for (uint32_t i = 1; failed == 0 && i < threads; i++) {
        failed = pthread_create(&pool->workers[i].thread, NULL, helper_main, &pool->workers[i]);
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
        pthread_join(pool->workers[i].thread, NULL);
    }
    free(pool);
}

void cm_pool_run(struct cm_pool *pool, cm_pool_program program, void *context)
{
    const uint32_t left = atomic_load(&pool->left.word);
    struct cm_worker *caller = &pool->workers[0];
    CM_ASSERT(pthread_equal(caller->thread, pthread_self()));
    pool->program = program;
    pool->context = context;
    pool->first_phase = atomic_load(&pool->phase.word);
    atomic_store_explicit(&caller->stage, CM_WORKER_IN, memory_order_relaxed);
    atomic_store_explicit(&caller->core, sched_getcpu(), memory_order_relaxed);
    for (uint32_t i = 0; i < pool->threads; i++) {
        atomic_store_explicit(&pool->cursors[i].at, (uint64_t)(pool->first_phase - 1) << 32,
                              memory_order_relaxed);
    }
    atomic_store(&pool->members, MEMBERS_OPEN);
    for (uint32_t i = 1; i < pool->threads; i++) {
        gate_open(&pool->start[i]);
    }
    program_run(pool, caller);
    if (atomic_fetch_and(&pool->members, ~MEMBERS_OPEN) != MEMBERS_OPEN) {
        gate_await(caller, &pool->left, left, CM_WORKER_IN);
    }
    atomic_store_explicit(&caller->stage, CM_WORKER_OUT, memory_order_relaxed);
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
