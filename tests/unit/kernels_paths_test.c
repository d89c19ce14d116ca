/* Every path of the CPU device against the plain definitions, bit by bit, and the threads that run
 * them: each unit once, whatever the number of threads. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/cpu/cpu_internal.h"
#include "runtime/base/clock.h"

static struct cm_error err;
static const char *const names[] = {"avx2", "avx512vnni", "amx"};
#define PATHS (sizeof(names) / sizeof(names[0]))

static float uniform(void)
{
    return (float)rand() / (float)RAND_MAX * 2.0f - 1.0f;
}

static void floats_fill(float *x, size_t count, float scale)
{
    for (size_t i = 0; i < count; i++) {
        x[i] = uniform() * scale;
    }
}

/* Whole cache lines; they live until the test's process ends. */
static void *lines_new(size_t bytes)
{
    static void *kept[2048];
    static size_t count;
    void *lines = aligned_alloc(64, (bytes + 127) / 64 * 64);
    cr_assert(lines != NULL && count < sizeof(kept) / sizeof(kept[0]));
    return kept[count++] = lines;
}

static struct cm_activations activations_new(uint32_t kind, uint32_t columns, uint32_t tokens)
{
    size_t blocks = (size_t)tokens * columns / 32;
    return (struct cm_activations){.x = kind == CM_TENSOR_BF16 ? lines_new(blocks * 128) : NULL,
                                   .q = lines_new(blocks * 32),
                                   .scale = lines_new(blocks * 4),
                                   .sum = lines_new(blocks * 4),
                                   .count = lines_new(blocks * 4),
                                   .columns = columns,
                                   .tokens = tokens};
}

static struct cm_matrix matrix_new(uint32_t kind, uint32_t rows, uint32_t columns)
{
    uint64_t quant, scale;
    cr_assert(cm_tensor_layout(kind, rows, columns, &quant, &scale));
    uint8_t *bytes = lines_new(quant + scale + 8192);
    for (uint64_t i = 0; i < quant; i++) {
        bytes[i] = (uint8_t)rand();
    }
    for (uint64_t i = 0; kind == CM_TENSOR_BF16 && i < quant / 2; i++) {
        const float value = uniform();
        memcpy(bytes + 2 * i, (const uint8_t *)&value + 2, 2);
    }
    for (uint64_t i = 0; i < scale / 2; i++) {
        uint16_t half = cm_half_of(uniform() * 0.05f);
        memcpy(bytes + quant + 2 * i, &half, 2);
    }
    return (struct cm_matrix){kind,         rows,  cm_padded(rows, 32) / 16,
                              columns / 32, bytes, bytes + quant};
}

/* ------------------------------------------------------------------ vectors */

Test(kernels_paths, quantiser_rounds_to_even_and_keeps_zero)
{
    for (size_t p = 0; p < PATHS; p++) {
        const struct cm_path *path = cm_path_choose(names[p]);
        struct cm_activations act = activations_new(CM_TENSOR_U8S, 64, 1);
        float x[64] = {127.0f, 0.5f, 1.5f, -2.5f};
        if (path == NULL) {
            continue;
        }
        path->quantise(x, &act, 0, 0, 2);
        cr_assert_eq(act.q[0], 127);
        cr_assert_eq(act.q[1], 0);
        cr_assert_eq(act.q[2], 2);
        cr_assert_eq(act.q[3], -2);
        cr_assert_eq(act.count[0], 127);
        cr_assert_float_eq(act.sum[0], 127.0f, 0);
        cr_assert_float_eq(act.scale[1], 0.0f, 0);
        cr_assert_eq(act.count[1], 0);
    }
}

static void norm_plain(const float *x, const float *weight, uint32_t size, float *ret)
{
    float lane[16] = {0};
    for (uint32_t i = 0; i < size; i++) {
        lane[i % 16] = fmaf(x[i], x[i], lane[i % 16]);
    }
    for (uint32_t step = 8; step > 0; step /= 2) {
        for (uint32_t l = 0; l < step; l++) {
            lane[l] += lane[l + step];
        }
    }
    float r = 1.0f / sqrtf(lane[0] / (float)size + 1e-5f);
    for (uint32_t i = 0; i < size; i++) {
        ret[i] = (x[i] * r) * weight[i];
    }
}

static void quantise_plain(const float *x, uint32_t columns, int8_t *q, float *scale, int32_t *n)
{
    for (uint32_t b = 0; b < columns / 32; b++) {
        float most = 0;
        for (uint32_t k = 0; k < 32; k++) {
            most = fabsf(x[32 * b + k]) > most ? fabsf(x[32 * b + k]) : most;
        }
        n[b] = 0;
        for (uint32_t k = 0; k < 32; k++) {
            q[32 * b + k] = (int8_t)rintf(x[32 * b + k] * (most > 0 ? 127.0f / most : 0));
            n[b] += q[32 * b + k];
        }
        scale[b] = most / 127.0f;
    }
}

static void rope_plain(float *x, const float *c, const float *s, uint32_t width)
{
    for (uint32_t i = 0; i < width; i += 2) {
        float a = x[i], b = x[i + 1];
        x[i] = fmaf(a, c[i / 2], -(b * s[i / 2]));
        x[i + 1] = fmaf(b, c[i / 2], a * s[i / 2]);
    }
}

Test(kernels_paths, vectors_equal_the_definitions)
{
    enum { N = 1536 };
    static float x[N], w[N], ret[N], wanted[N], plain[N], scale[N / 32];
    static int8_t q[N];
    int32_t n[N / 32];
    srand(7);
    for (int round = 0; round < 200; round++) {
        const struct cm_path *path = cm_path_choose(names[round % PATHS]);
        uint32_t size = round % 3 ? 32u * (1u + (uint32_t)rand() % (N / 32)) : 40;
        if (path == NULL) {
            continue;
        }
        floats_fill(x, N, 9.0f);
        floats_fill(w, N, 2.0f);
        norm_plain(x, w, size, wanted);
        path->norm(x, w, size, 1e-5f, ret);
        cr_assert_arr_eq(ret, wanted, size * sizeof(float), "%s norm %u", path->name, size);
        uint32_t columns = size / 32 * 32;
        struct cm_activations act = activations_new(CM_TENSOR_U8S, columns, 1);
        quantise_plain(x, columns, q, scale, n);
        path->quantise(x, &act, 0, 0, columns / 32);
        cr_assert_arr_eq(act.q, q, columns);
        cr_assert_arr_eq(act.scale, scale, columns / 32 * sizeof(float));
        cr_assert_arr_eq(act.count, n, columns / 32 * sizeof(int32_t));
        for (uint32_t i = 0; i < columns / 2; i++) {
            float gate = x[i / 16 * 32 + i % 16], up = x[i / 16 * 32 + 16 + i % 16];
            float turn =
                round % 2 ? gate : (gate * fmaf(gate * gate, 0.044715f, 1.0f)) * CM_GELU_SCALE;
            plain[i] = (gate / (1.0f + cm_expf(-turn))) * up;
        }
        path->gate(x, columns / 2, round % 2 ? CM_ACTIVATION_SILU : CM_ACTIVATION_GELU, ret);
        cr_assert_arr_eq(ret, plain, columns / 2 * sizeof(float), "%s gate", path->name);
        for (uint32_t i = 0; i < columns; i++) {
            wanted[i] = cm_capf(x[i], 3.0f);
            cr_assert_float_eq(wanted[i], 3.0 * tanh((double)x[i] / 3.0), 2e-6);
        }
        memcpy(ret, x, sizeof(x));
        path->cap(ret, columns, 3.0f);
        cr_assert_arr_eq(ret, wanted, columns * sizeof(float), "%s cap", path->name);
        memcpy(wanted, x, sizeof(x));
        rope_plain(wanted, w, w + N / 2, size);
        path->rope(x, w, w + N / 2, size);
        cr_assert_arr_eq(x, wanted, sizeof(x), "%s rope %u", path->name, size);
        uint32_t best = 0;
        for (uint32_t i = 1; i < size; i++) {
            best = x[i] > x[best] ? i : best;
        }
        cr_assert_eq(path->greatest(x, size), best);
    }
}

/* Wherever it stands: in the first of the pieces that are searched, in a later one, in the rest. */
Test(kernels_paths, greatest_is_the_first_of_equals)
{
    enum { N = 4133 };
    static float x[N];
    static const uint32_t places[][2] = {{0, 4132},    {15, 16},     {1023, 1024}, {1024, 1025},
                                         {2047, 4096}, {3000, 4131}, {4127, 4128}, {4131, 4132}};
    for (uint32_t p = 0; p < PATHS; p++) {
        const struct cm_path *path = cm_path_choose(names[p]);
        for (uint32_t i = 0; path != NULL && i < sizeof(places) / sizeof(places[0]); i++) {
            floats_fill(x, N, 1.0f);
            x[places[i][0]] = x[places[i][1]] = 2.0f;
            cr_assert_eq(path->greatest(x, N), places[i][0], "%s, %u", path->name, i);
            x[places[i][0]] = 0.0f;
            cr_assert_eq(path->greatest(x, N), places[i][1], "%s, %u", path->name, i);
        }
        for (uint32_t i = 0; i < N; i++) {
            x[i] = -INFINITY;
        }
        cr_assert(path == NULL || path->greatest(x, N) == 0);
    }
}

/* ------------------------------------------------------------------ matrices */

#define KIND(kind) kind,
static const uint32_t kinds[] = {CM_QUANT_KINDS(KIND) CM_TENSOR_BF16};
enum { KINDS = sizeof(kinds) / sizeof(kinds[0]) };

Test(kernels_paths, products_equal_the_definition)
{
    const uint32_t shapes[][3] = {{32, 32, 1},   {64, 256, 3},  {96, 288, 8}, {33, 576, 13},
                                  {960, 64, 16}, {64, 320, 35}, {32, 96, 130}};
    srand(1);
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]) * KINDS; i++) {
        const uint32_t *shape = shapes[i / KINDS], tokens = shape[2], columns = shape[1];
        struct cm_matrix matrix = matrix_new(kinds[i % KINDS], shape[0], columns);
        struct cm_activations act = activations_new(kinds[i % KINDS], columns, tokens);
        float *row = lines_new(columns * 4ul);
        for (uint32_t t = 0; t < tokens; t++) {
            floats_fill(row, columns, 3.0f);
            cm_path_choose("avx2")->quantise(row, &act, t, 0, columns / 32);
        }
        size_t stride = (size_t)matrix.row_tiles * 16, bytes = stride * tokens * 4;
        float *plain = lines_new(bytes), *fast = lines_new(bytes);
        struct cm_span all = {0, tokens, 0, matrix.row_tiles};
        cm_plain_gemm(&matrix, &act, all, plain, stride);
        for (size_t p = 0; p < PATHS; p++) {
            const struct cm_path *path = cm_path_choose(names[p]);
            if (path == NULL) {
                continue;
            }
            memset(fast, 0xff, bytes);
            path->gemm(&matrix, &act, all, fast, stride);
            cr_assert_arr_eq(plain, fast, bytes, "%s, shape %zu, kind %u", path->name, i / KINDS,
                             kinds[i % KINDS]);
            /* A part of it: the same values. */
            struct cm_span part = {tokens / 32 * 16, tokens, 1, matrix.row_tiles};
            memset(fast, 0xff, bytes);
            path->gemm(&matrix, &act, part, fast, stride);
            cr_assert_arr_eq(plain + part.token_first * stride + 16, fast, (stride - 16) * 4);
        }
    }
}

/* The greatest quants times the greatest activations: no sum of any width is cut off. */
Test(kernels_paths, greatest_products_are_not_cut_off)
{
    enum { COLUMNS = 64, TOKENS = 17, ROWS = 32 };
    static float row[COLUMNS], found[TOKENS][ROWS];
    for (uint32_t i = 0; i < 2 * PATHS * KINDS; i++) {
        const struct cm_path *path = cm_path_choose(names[i / 2 % PATHS]);
        const uint32_t kind = kinds[i / 2 / PATHS];
        const struct cm_tile_shape shape = cm_tile_shape(kind);
        const uint16_t one = cm_half_of(1.0f), none = 0;
        if (path == NULL || shape.bits == 16) {
            continue;
        }
        struct cm_matrix matrix = matrix_new(kind, ROWS, COLUMNS);
        struct cm_activations act = activations_new(kind, COLUMNS, TOKENS);
        memset((uint8_t *)(uintptr_t)matrix.quants, 0xff, 4ul * shape.quant_bytes);
        for (uint32_t k = 0; k < 2 * shape.scale_bytes; k++) { /* d is 1, m is 0 */
            const uint16_t *half = shape.affine && k / 16 % 2 == 1 ? &none : &one;
            memcpy((uint8_t *)(uintptr_t)matrix.scales + 2ul * k, half, 2);
        }
        for (uint32_t k = 0; k < COLUMNS; k++) {
            row[k] = i % 2 ? 127.0f : -127.0f;
        }
        for (uint32_t t = 0; t < TOKENS; t++) {
            path->quantise(row, &act, t, 0, COLUMNS / 32);
        }
        path->gemm(&matrix, &act, (struct cm_span){0, TOKENS, 0, 2}, found[0], ROWS);
        const float quant = (float)((1 << shape.bits) - 1 - shape.zero);
        for (uint32_t at = 0; at < TOKENS * ROWS; at++) {
            cr_assert_float_eq(found[at / ROWS][at % ROWS], quant * row[0] * COLUMNS, 0,
                               "%s, kind %u: %g", path->name, kind, (double)found[0][at]);
        }
    }
}

/* ------------------------------------------------------------------ class P */

/* Some tokens so small that products and sums become denormal, which the tile unit takes for 0. */
static void row_fill(float *row, uint32_t columns, uint32_t token)
{
    const float scales[] = {3.0f, 1e-18f, 1e-37f, 3e-39f};
    floats_fill(row, columns, scales[token % 9 == 4 ? token / 9 % 4 : 0]);
    for (uint32_t k = 0; token % 5 == 3 && k < columns; k++) {
        row[k] *= scales[rand() % 4];
    }
}

static void bfloats_shrink(struct cm_matrix *matrix)
{
    uint16_t *weights = (uint16_t *)(uintptr_t)matrix->quants;
    for (uint32_t i = 0; i < matrix->row_tiles * matrix->blocks * 512; i += 3) {
        weights[i] &= (uint16_t)(rand() % 2 ? 0x807f : 0x90ff); /* 2^-126 and less, 2^-94 */
    }
}

static void prompts_compare(const struct cm_prompt_path *path, uint32_t kind, uint32_t rows,
                            uint32_t columns, uint32_t tokens)
{
    struct cm_matrix matrix = matrix_new(kind, rows, columns);
    struct cm_activations act = activations_new(kind, columns, tokens);
    float *row = lines_new(columns * 4ul);
    act.rounded = lines_new((size_t)tokens * columns * 2);
    if (kind == CM_TENSOR_BF16) {
        bfloats_shrink(&matrix);
    }
    for (uint32_t t = 0; t < tokens; t++) {
        row_fill(row, columns, t);
        path->round(row, &act, t, 0, columns / 32);
        for (uint32_t k = 0; k < columns; k++) {
            cr_assert_eq(act.rounded[cm_activation_at(&act, t, k / 32) * 32 + k % 32],
                         cm_bfloat_of(row[k]), "%a", (double)row[k]);
        }
    }
    const size_t stride = (size_t)matrix.row_tiles * 16, bytes = stride * tokens * 4;
    float *plain = lines_new(bytes), *fast = lines_new(bytes);
    struct cm_span all = {0, tokens, 0, matrix.row_tiles};
    cm_plain_bf16_gemm(&matrix, &act, all, plain, stride);
    memset(fast, 0xff, bytes);
    path->gemm(&matrix, &act, all, fast, stride);
    cr_assert_arr_eq(plain, fast, bytes, "%u x %u, kind %u", rows, columns, kind);
    for (uint32_t first = 0; first < tokens; first += 16) { /* a part: the same values */
        struct cm_span part = {first, first + 16 < tokens ? first + 16 : tokens, 1,
                               matrix.row_tiles};
        memset(fast, 0xff, bytes);
        path->gemm(&matrix, &act, part, fast, stride);
        cr_assert_arr_eq(plain + first * stride + 16, fast, (stride - 16) * 4);
    }
}

Test(kernels_paths, products_of_prompts_equal_the_definition)
{
    const uint32_t shapes[][3] = {{32, 32, 1},   {64, 256, 3},   {96, 288, 16}, {33, 576, 33},
                                  {96, 800, 48}, {64, 1600, 35}, {32, 96, 130}};
    const struct cm_prompt_path *path = cm_prompt_path_choose();
    if (path == NULL) {
        cr_skip_test("this machine lacks AMX-bf16");
    }
    srand(8);
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        for (size_t k = 0; k < KINDS; k++) {
            prompts_compare(path, kinds[k], shapes[i][0], shapes[i][1], shapes[i][2]);
        }
    }
}

/* ------------------------------------------------------------------ adapters */

static uint16_t *factor_new(size_t tiles, uint32_t columns)
{
    uint16_t *factor = lines_new(tiles * columns * 16 * 2);
    for (size_t i = 0; i < tiles * columns * 16; i++) {
        factor[i] = cm_half_of(uniform());
    }
    return factor;
}

static void factors_compare(uint32_t kind, bool prompts)
{
    enum { COLUMNS = 576, TOKENS = 37, TILES = 5 };
    struct cm_activations act = activations_new(kind, COLUMNS, TOKENS);
    static float row[COLUMNS], plain[TOKENS][20], fast[TOKENS][20];
    static float u[CM_ADAPTER_RANK_MAX], wanted[TILES * 32], found[TILES * 32];
    srand(4);
    act.rounded = prompts ? lines_new(TOKENS * COLUMNS * 2ul) : NULL;
    for (uint32_t t = 0; t < TOKENS; t++) {
        floats_fill(row, COLUMNS, 3.0f);
        cm_path_choose("avx2")->quantise(row, &act, t, 0, COLUMNS / 32);
        for (uint32_t k = 0; prompts && k < COLUMNS; k++) {
            act.rounded[cm_activation_at(&act, t, k / 32) * 32 + k % 32] = cm_bfloat_of(row[k]);
        }
    }
    for (uint32_t i = 0; i < 64 * PATHS; i++) {
        const struct cm_path *path = cm_path_choose(names[i % PATHS]);
        const uint32_t rank = 1 + i / PATHS, block = rank % 11, blocks = 1 + rank % 8;
        const uint32_t token = rank % 20, tokens = 1 + rank % 16;
        uint16_t *a = factor_new(1, blocks * 32), *b = factor_new(TILES, rank);
        if (path == NULL) {
            continue;
        }
        memset(plain, 0, sizeof(plain));
        memset(fast, 0, sizeof(fast));
        cm_plain_shrink(a, &act, token, tokens, block, blocks, plain[0], 20);
        path->shrink(a, &act, token, tokens, block, blocks, fast[0], 20);
        cr_assert_arr_eq(fast, plain, sizeof(fast), "%s shrink %u", path->name, rank);
        cr_assert_neq(plain[tokens - 1][15], 0.0f);
        floats_fill(u, rank, 1.0f);
        floats_fill(wanted, TILES * 32, 1.0f);
        memcpy(found, wanted, sizeof(found));
        cm_plain_expand(b, rank, TILES, u, wanted, 32);
        path->expand(b, rank, TILES, u, found, 32);
        cr_assert_arr_eq(found, wanted, sizeof(found), "%s expand %u", path->name, rank);
    }
}

Test(kernels_paths, factors_of_adapters_equal_the_definition)
{
    factors_compare(CM_TENSOR_U8S, false);
    factors_compare(CM_TENSOR_BF16, false);
    factors_compare(CM_TENSOR_U8S, true);
}

/* ------------------------------------------------------------------ attention */

struct scene {
    struct cm_attention a;
    uint32_t pages[40];
    uint8_t *kv;
    float *query, *out;
};

/* Keys and values of all positions, put by path after path; what follows them in the last page is
 * NaN, or all bits. */
static void scene_make(struct scene *s, enum cm_kv_kind kind, uint32_t group, uint32_t head_width,
                       uint32_t position, uint32_t tokens)
{
    static float key[1024 + 32], value[1024 + 32];
    size_t half_page = cm_kv_head_bytes(kind, head_width), stride = (size_t)group * head_width;
    uint32_t positions = position + tokens, pages = (positions + 31) / 32;
    s->kv = memset(lines_new(pages * 2 * half_page + 64), 0xff, pages * 2 * half_page);
    s->query = lines_new(tokens * stride * 4);
    s->out = lines_new(tokens * stride * 4);
    floats_fill(s->query, tokens * stride, 2.0f);
    for (uint32_t i = 0; i < pages; i++) {
        s->pages[i] = pages - 1 - i;
    }
    for (uint32_t t = 0; t < positions; t++) {
        const struct cm_path *path = cm_path_choose(t % 2 == 0 ? NULL : "avx2");
        uint8_t *page = s->kv + s->pages[t / 32] * 2 * half_page;
        floats_fill(key, head_width, t % 5 == 4 ? 1e-3f : 3.0f);
        floats_fill(value, head_width, 1.0f);
        path->key_put(kind, key, head_width, page, t % 32);
        path->value_put(kind, value, head_width, page + half_page, t % 32);
    }
    s->a = (struct cm_attention){.query = s->query,
                                 .query_stride = stride,
                                 .tokens = tokens,
                                 .group = group,
                                 .head_width = head_width,
                                 .position = position,
                                 .pages = s->pages,
                                 .kv = s->kv,
                                 .page_bytes = 2 * half_page,
                                 .kv_kind = kind,
                                 .v_offset = half_page,
                                 .scale = 0.125f,
                                 .out = s->out,
                                 .out_stride = stride};
    s->a.scratch = lines_new(cm_attention_floats(tokens * group, head_width) * 4);
}

static void chunks_attend(const struct cm_path *path, const struct cm_attention *a)
{
    uint32_t chunks = a->position / CM_ATTENTION_CHUNK + 1;
    size_t floats = cm_partial_floats(a->group, a->head_width);
    float *partials = lines_new(chunks * floats * 4);
    for (uint32_t c = chunks; c-- > 0;) {
        path->attend_chunk(a, c, partials + c * floats);
    }
    path->attend_merge(a, chunks, partials);
}

/* One quant and its scale, of a block of `count` floats. Keys are turned: the transform's matrix
 * has -1 where the numbers of row and column have an odd count of ones in common. */
static void kept_check(const struct cm_path *path, const float *block, uint32_t count, uint32_t k,
                       bool turned, int8_t quant, const uint8_t *scale)
{
    double most = 0.0, value = 0.0;
    uint16_t half;
    for (uint32_t i = 0; i < 32; i++) {
        double sum = turned || i >= count ? 0.0 : (double)block[i];
        for (uint32_t j = 0; turned && j < count; j++) {
            sum += (double)block[j] * (__builtin_popcount(i & j) % 2 == 0 ? 1.0 : -1.0);
        }
        most = fabs(sum) > most ? fabs(sum) : most;
        value = i == k ? sum : value;
    }
    memcpy(&half, scale, sizeof(half));
    const double d = (double)cm_half_float(half);
    cr_assert(fabs(d - most / 127.0) <= d / 2000.0, "%s: scale %g of %g", path->name, d, most);
    cr_assert(fabs(quant * most / 127.0 - value) <= 0.5002 * most / 127.0 + 1e-9,
              "%s: %d of %g at %g", path->name, quant, value, most);
}

/* What is kept of a head, as the definition in kernels/NUMERICS.md reads it. */
Test(kernels_paths, keys_and_values_are_kept_as_defined)
{
    enum { MOST = 256 };
    static const uint32_t widths[] = {8, 24, 32, 64, 80, 256};
    static float x[MOST + 32];
    srand(8);
    for (size_t i = 0; i < 6 * 32 * PATHS; i++) {
        const struct cm_path *path = cm_path_choose(names[i % PATHS]);
        const uint32_t width = widths[i / PATHS / 32], t = i / PATHS % 32;
        const size_t bytes = cm_kv_head_bytes(CM_KV_INT8, width), blocks = (width + 31) / 32;
        if (path == NULL) {
            continue;
        }
        cr_assert_eq(bytes, blocks * (32 * 32 + 64));
        uint8_t *key = memset(lines_new(bytes), 0, bytes), *value = lines_new(bytes);
        memset(value, 0, bytes);
        floats_fill(x, width, t == 7 ? 0.0f : 5.0f);
        path->key_put(CM_KV_INT8, x, width, key, t);
        path->value_put(CM_KV_INT8, x, width, value, t);
        for (uint32_t k = 0; k < blocks * 32; k++) {
            const float *block = x + k / 32 * 32;
            const uint32_t count = width - k / 32 * 32 < 32 ? width - k / 32 * 32 : 32;
            const size_t scale = blocks * 1024 + (k / 32 * 32 + t) * 2;
            kept_check(path, block, count, k % 32, false,
                       (int8_t)value[k / 32 * 1024 + t / 4 * 128 + k % 32 * 4 + t % 4],
                       value + scale);
            kept_check(path, block, count, k % 32, true, (int8_t)key[(k / 4 * 32 + t) * 4 + k % 4],
                       key + scale);
        }
    }
}

Test(kernels_paths, attention_equals_the_definition)
{
    /* group, head width, position, tokens */
    const uint32_t rows[][4] = {
        {3, 64, 0, 1},    {3, 64, 37, 1},   {3, 64, 255, 1},   {3, 64, 256, 1}, {3, 64, 777, 1},
        {1, 8, 0, 40},    {2, 24, 5, 9},    {4, 128, 250, 12}, {3, 64, 0, 16},  {3, 64, 500, 16},
        {1, 64, 240, 48}, {8, 256, 600, 1}, {9, 32, 1000, 5},  {16, 80, 90, 3}};
    const uint32_t windows[] = {0, 1, 7, 32, 45, 256, 300, 700};
    const size_t count = sizeof(rows) / sizeof(rows[0]);
    srand(3);
    for (size_t i = 0; i < count * 16; i++) {
        struct scene s;
        const uint32_t *row = rows[i % count];
        const enum cm_kv_kind kind = i / count < 8 ? CM_KV_FP16 : CM_KV_INT8;
        scene_make(&s, kind, row[0], row[1], row[2], row[3]);
        s.a.window = windows[i / count % 8];
        s.a.cap = i % 3 == 2 ? 1.5f : 0.0f;
        s.a.scale = i % 5 == 4 ? 16.0f : 0.125f; /* some weights as small as can be */
        size_t bytes = s.a.tokens * s.a.out_stride * 4;
        cm_plain_attend(&s.a);
        float *wanted = memcpy(lines_new(bytes), s.out, bytes);
        for (size_t p = 0; p < PATHS; p++) {
            const struct cm_path *path = cm_path_choose(names[p]);
            if (path == NULL) {
                continue;
            }
            memset(s.out, 0, bytes);
            path->attend(&s.a);
            cr_assert_arr_eq(s.out, wanted, bytes, "%s, kind %d, row %zu, window %u, cap %g",
                             path->name, (int)kind, i % count, s.a.window, (double)s.a.cap);
            if (s.a.tokens == 1) {
                memset(s.out, 0, bytes);
                chunks_attend(path, &s.a);
                cr_assert_arr_eq(s.out, wanted, bytes, "%s in chunks, kind %d, row %zu, window %u",
                                 path->name, (int)kind, i % count, s.a.window);
            }
        }
    }
}

/* Of the last token, whose neighbours in the tile do not see it. */
static void last_value_break(const struct scene *s)
{
    const uint32_t last = s->a.position + s->a.tokens - 1;
    uint8_t *page = s->kv + s->pages[last / 32] * s->a.page_bytes + s->a.v_offset;
    const uint16_t infinite = 0x7c00, not_a_number = 0x7e00;
    memcpy(page + (last % 32 * s->a.head_width) * 2ul, &infinite, 2);
    memcpy(page + (last % 32 * s->a.head_width + 1) * 2ul, &not_a_number, 2);
}

Test(kernels_paths, attention_of_prompts_equals_the_definition)
{
    /* group, head width, position, tokens */
    const uint32_t rows[][4] = {
        {3, 64, 0, 1},     {3, 64, 37, 1},   {3, 64, 0, 32},   {1, 8, 0, 40},    {2, 24, 5, 9},
        {4, 128, 250, 12}, {3, 64, 500, 32}, {1, 64, 240, 48}, {8, 256, 600, 1}, {9, 32, 1000, 5},
        {16, 80, 90, 3},   {1, 64, 200, 96}, {6, 96, 255, 16}};
    const uint32_t windows[] = {0, 1, 7, 32, 45, 256, 300, 700};
    const size_t count = sizeof(rows) / sizeof(rows[0]);
    const struct cm_prompt_path *path = cm_prompt_path_choose();
    if (path == NULL) {
        cr_skip_test("this machine lacks AMX-bf16");
    }
    srand(9);
    for (size_t i = 0; i < count * 8; i++) {
        struct scene s;
        const uint32_t *row = rows[i % count];
        scene_make(&s, CM_KV_FP16, row[0], row[1], row[2], row[3]);
        s.a.window = windows[i / count];
        s.a.cap = i % 3 == 2 ? 1.5f : 0.0f;
        s.a.scratch = lines_new(cm_prompt_attention_floats(row[0] * row[3], row[1]) * 4);
        if (i % 4 == 1) {
            last_value_break(&s);
        }
        const size_t bytes = s.a.tokens * s.a.out_stride * 4;
        cm_plain_bf16_attend(&s.a);
        float *wanted = memcpy(lines_new(bytes), s.out, bytes);
        memset(s.out, 0, bytes);
        path->attend(&s.a);
        cr_assert_arr_eq(s.out, wanted, bytes, "row %zu, window %u, cap %g", i % count, s.a.window,
                         (double)s.a.cap);
        for (uint32_t t = 0; t < s.a.tokens; t++) { /* each token by itself */
            struct cm_attention one = s.a;
            one.query += t * one.query_stride;
            one.out += t * one.out_stride;
            one.position += t;
            one.tokens = 1;
            path->attend(&one);
        }
        cr_assert_arr_eq(s.out, wanted, bytes, "row %zu one by one, window %u", i % count,
                         s.a.window);
    }
}

/* ------------------------------------------------------------------ threads */

enum { UNITS = 997, PHASES = 3000 };
struct counted {
    _Atomic uint32_t taken[UNITS];
    _Atomic uint32_t wrong;
};

static void count_program(void *context, struct cm_worker *worker)
{
    struct counted *counted = context;
    for (uint32_t phase = 0; phase < PHASES; phase++) {
        uint32_t first, last, count = phase % 7 == 0 ? 1 : (phase * 131) % UNITS;
        cm_pool_phase(worker, count);
        while (cm_pool_take(worker, &first, &last)) {
            counted->wrong += last > count || first >= last;
            for (uint32_t i = first; i < last; i++) {
                counted->taken[i]++;
            }
        }
        cm_pool_barrier(worker);
        cm_pool_phase(worker, 1);
        while (cm_pool_take(worker, &first, &last)) {
            for (uint32_t i = 0; i < count; i++) {
                counted->wrong += counted->taken[i] != 1;
                counted->taken[i] = 0;
            }
        }
        cm_pool_barrier(worker);
    }
}

Test(kernels_paths, each_unit_is_taken_once)
{
    static struct counted counted;
    for (uint32_t threads = 1; threads <= 5; threads++) {
        struct cm_pool *pool;
        cr_assert_eq(cm_pool_new(threads, &pool, &err), CM_OK, "%s", err.text);
        cm_pool_run(pool, count_program, &counted);
        cm_pool_run(pool, count_program, &counted);
        cm_pool_free(pool);
        cr_assert_eq(counted.wrong, 0u, "%u threads", threads);
    }
}

/* A helper sleeps at one point of one phase, as if the scheduler had taken its core away. Each cell
 * of a phase is made of two of the phase before. */
enum { CELLS = 64, NAP_PHASES = 6, TRIES = 100 };
#define SECOND_NS 1000000000u
enum point { BEFORE_PHASE, IN_A_UNIT, BEFORE_BARRIER, POINTS };
struct nap {
    enum point point;
    uint32_t at; /* the phase */
    _Atomic bool asleep, over, missed, held_up, early;
    _Atomic uint32_t begun; /* the last phase that a unit was begun of */
    uint64_t cells[NAP_PHASES + 1][CELLS];
};

/* Computing, as a thread that counts on its core does. */
static bool wait_until(_Atomic bool *flag, uint64_t most_ns)
{
    const uint64_t end = cm_clock_ns() + most_ns;
    while (!*flag && cm_clock_ns() < end) {
    }
    return *flag;
}

static void cell_make(uint64_t (*cells)[CELLS], uint32_t phase, uint32_t i)
{
    uint64_t x = cells[phase][i] * 31 + cells[phase][(i + 7) % CELLS] + phase;
    cells[phase + 1][i] = x * 0x9e3779b97f4a7c15u ^ x >> 29;
}

static void helper_sleeps(struct nap *nap, const struct cm_worker *worker, uint32_t phase,
                          enum point point)
{
    if (worker->index == 0 || phase != nap->at || point != nap->point || nap->asleep) {
        return;
    }
    nap->asleep = true;
    if (point == BEFORE_PHASE) { /* it holds nothing: the others come to the end without it */
        nap->held_up = !wait_until(&nap->over, 10u * (uint64_t)SECOND_NS);
        return;
    }
    usleep(5000); /* it holds units: nothing of the next phase begins */
    nap->early = nap->begun > phase;
}

static void nap_program(void *context, struct cm_worker *worker)
{
    struct nap *nap = context;
    for (uint32_t phase = 0; phase < NAP_PHASES; phase++) {
        uint32_t first, last;
        helper_sleeps(nap, worker, phase, BEFORE_PHASE);
        cm_pool_phase(worker, CELLS);
        while (cm_pool_take(worker, &first, &last)) {
            nap->begun = phase;
            helper_sleeps(nap, worker, phase, IN_A_UNIT);
            if (worker->index == 0 && phase == nap->at && !nap->missed) {
                nap->missed = !wait_until(&nap->asleep, SECOND_NS / 10);
            }
            for (uint32_t i = first; i < last; i++) {
                cell_make(nap->cells, phase, i);
            }
        }
        helper_sleeps(nap, worker, phase, BEFORE_BARRIER);
        cm_pool_barrier(worker);
    }
    nap->over = nap->over || worker->index == 0;
}

/* False: no helper found a core of its own. */
static bool nap_check(enum point point, uint32_t at, const uint64_t *expected)
{
    struct nap nap = {.point = point, .at = at, .cells = {{1}}};
    struct cm_pool *pool;
    cr_assert_eq(cm_pool_new(2, &pool, &err), CM_OK, "%s", err.text);
    cm_pool_run(pool, nap_program, &nap);
    cm_pool_free(pool);
    cr_assert(!nap.held_up, "phase %u waited for a thread that held nothing of it", at);
    cr_assert(!nap.early, "point %d: phase %u ended before its units", point, at);
    cr_assert_eq(memcmp(nap.cells[NAP_PHASES], expected, sizeof(nap.cells[0])), 0,
                 "point %d of phase %u", point, at);
    return nap.asleep;
}

Test(kernels_paths, a_sleeping_thread_holds_up_what_it_holds_alone)
{
    uint64_t cells[NAP_PHASES + 1][CELLS] = {{1}};
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2) {
        cr_skip_test("one core: no helper has a core of its own");
    }
    for (uint32_t i = 0; i < NAP_PHASES * CELLS; i++) {
        cell_make(cells, i / CELLS, i % CELLS);
    }
    for (uint32_t i = 0; i < POINTS * NAP_PHASES; i++) {
        uint32_t tries = 0;
        while (!nap_check(i / NAP_PHASES, i % NAP_PHASES, cells[NAP_PHASES])) {
            cr_assert_lt(++tries, TRIES, "point %u: no helper ever came", i);
        }
    }
}

/* A path that this machine lacks was not tested above: say so. */
Test(kernels_paths, every_path_is_here)
{
    for (size_t p = 0; p < PATHS; p++) {
        if (cm_path_choose(names[p]) == NULL) {
            cr_skip_test("this machine lacks the path %s", names[p]);
        }
    }
}
