/* The machine's own limits, for the same run: probe THREADS, then lines in, JSON out.
 *
 *   read BYTES    stream that many bytes, shared by the threads, again and again for a quarter of
 *                 a second: GB/s over all of it, as a decode's rate is over all its tokens. A
 *                 neighbour on a virtual machine's host may halve it from one moment to the next.
 *   int8          multiply-adds of the best integer instruction in registers: TOPS
 *
 * Memory lies in huge pages and is read ahead as weights are. */
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "kernels/cpu/cpu_internal.h"

#define PIECE        (256u << 10)
#define AHEAD        4096
#define INT8_RUNS    2000000u
#define READ_SECONDS 0.25

struct probe {
    const uint8_t *memory;
    uint64_t bytes;
    uint32_t threads;
    uint64_t sums[CM_THREADS_MAX][8];
};

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

__attribute__((target("avx2"))) static uint64_t piece_read(const uint8_t *from, uint64_t bytes)
{
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                      _mm256_setzero_si256()};
    for (uint64_t i = 0; i < bytes; i += 128) {
        _mm_prefetch((const char *)from + i + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)from + i + AHEAD + 64, _MM_HINT_T0);
        for (uint64_t k = 0; k < 4; k++) {
            sum[k] = _mm256_add_epi64(
                sum[k], _mm256_loadu_si256((const __m256i *)(const void *)(from + i + 32 * k)));
        }
    }
    sum[0] = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
    return (uint64_t)_mm256_extract_epi64(sum[0], 0);
}

static void read_program(void *context, struct cm_worker *worker)
{
    struct probe *probe = context;
    uint32_t first, last;
    cm_pool_phase(worker, (uint32_t)(probe->bytes / PIECE));
    while (cm_pool_take(worker, &first, &last)) {
        probe->sums[worker->index][0] +=
            piece_read(probe->memory + (uint64_t)first * PIECE, (uint64_t)(last - first) * PIECE);
    }
    cm_pool_barrier(worker);
}

/* Tied to their registers, or the compiler keeps sums in memory between turns. */
#define IN_REGISTERS(s, class)                                                                     \
    __asm__ volatile(""                                                                            \
                     : "+" class((s)[0]), "+" class((s)[1]), "+" class((s)[2]), "+" class((s)[3]), \
                       "+" class((s)[4]), "+" class((s)[5]), "+" class((s)[6]), "+" class((s)[7]), \
                       "+" class((s)[8]), "+" class((s)[9]))

/* 64 multiply-adds an instruction; ten sums hide the latency. */
__attribute__((target("avx512f,avx512vnni"))) static uint64_t int8_run512(void)
{
    __m512i sums[10];
    const __m512i x = _mm512_set1_epi8(3);
#pragma GCC unroll 10
    for (uint32_t i = 0; i < 10; i++) {
        sums[i] = _mm512_setzero_si512();
    }
    for (uint32_t n = 0; n < INT8_RUNS; n++) {
#pragma GCC unroll 10
        for (uint32_t i = 0; i < 10; i++) {
            sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
        }
        IN_REGISTERS(sums, "v");
    }
    uint64_t total = 0;
#pragma GCC unroll 10
    for (uint32_t i = 0; i < 10; i++) {
        total += (uint32_t)_mm512_reduce_add_epi32(sums[i]);
    }
    return total;
}

__attribute__((target("avx2"))) static uint64_t int8_run256(void)
{
    __m256i sums[10];
    const __m256i x = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
#pragma GCC unroll 10
    for (uint32_t i = 0; i < 10; i++) {
        sums[i] = _mm256_setzero_si256();
    }
    for (uint32_t n = 0; n < INT8_RUNS; n++) {
#pragma GCC unroll 10
        for (uint32_t i = 0; i < 10; i++) {
            __m256i y = _mm256_xor_si256(x, sums[i]);
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), one));
        }
        IN_REGISTERS(sums, "x");
    }
    uint64_t total = 0;
#pragma GCC unroll 10
    for (uint32_t i = 0; i < 10; i++) {
        total += (uint64_t)_mm256_extract_epi64(sums[i], 0);
    }
    return total;
}

static void int8_program(void *context, struct cm_worker *worker)
{
    struct probe *probe = context;
    bool wide = cm_path_choose("avx512vnni") != NULL;
    uint32_t first, last;
    cm_pool_phase(worker, probe->threads);
    while (cm_pool_take(worker, &first, &last)) {
        probe->sums[worker->index][0] += wide ? int8_run512() : int8_run256();
    }
    cm_pool_barrier(worker);
}

static void read_answer(struct cm_pool *pool, struct probe *probe, uint64_t bytes)
{
    double begun = seconds(), took = 0, least = 1e9;
    uint32_t runs = 0;
    probe->bytes = bytes / PIECE * PIECE;
    for (; took < READ_SECONDS; runs++) {
        double before = took;
        cm_pool_run(pool, read_program, probe);
        took = seconds() - begun;
        least = took - before < least ? took - before : least;
    }
    double gigabytes = (double)probe->bytes / 1e9;
    printf("{\"gb_per_s\": %.2f, \"gb_per_s_best\": %.2f, \"bytes\": %llu}\n",
           gigabytes * runs / took, gigabytes / least, (unsigned long long)probe->bytes);
}

static void int8_answer(struct cm_pool *pool, struct probe *probe)
{
    double lanes = cm_path_choose("avx512vnni") != NULL ? 64 : 32, begun = seconds();
    cm_pool_run(pool, int8_program, probe);
    double took = seconds() - begun;
    printf("{\"tops\": %.3f}\n",
           2.0 * lanes * 10 * INT8_RUNS * cm_pool_threads(pool) / took / 1e12);
}

int main(int count, char **words)
{
    static struct probe probe;
    struct cm_error err;
    struct cm_pool *pool;
    char line[128];
    unsigned long long bytes, room = 2ull << 30;
    if (count != 2 || cm_pool_new((uint32_t)atoi(words[1]), &pool, &err) != CM_OK) {
        fprintf(stderr, "usage: probe THREADS\n");
        return 2;
    }
    uint8_t *memory = mmap(NULL, room, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return 9;
    }
    (void)madvise(memory, room, MADV_HUGEPAGE);
    probe.memory = memory;
    probe.threads = cm_pool_threads(pool);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        if (sscanf(line, "read %llu", &bytes) == 1 && bytes >= PIECE && bytes <= room - AHEAD) {
            memset(memory, 1, bytes);
            read_answer(pool, &probe, bytes);
        } else {
            int8_answer(pool, &probe);
        }
        fflush(stdout);
    }
    cm_pool_free(pool);
    return 0;
}
