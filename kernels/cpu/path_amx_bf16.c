/* Class P of kernels/NUMERICS.md: products of prompts by AMX-bf16. Weights become bf16
 * once for all panels of a span (bf16 matrices lie as tiles already); two panels × two row
 * tiles are the most that eight tiles can multiply without loading anything twice. What a token
 * gets depends on no other: a row of a tile is a token, and a panel with fewer than 16 has tiles of
 * fewer rows. */
#include "kernels/cpu/amx_bf16.h"
#include "kernels/cpu/avx512.h"

#define CHUNK_BLOCKS 24u /* 768 columns: two row tiles of them fit a core's caches */
#define AT_ONCE      2u  /* panels, and row tiles */

/* One block as a tile: pair of columns k, k + 1 of all 16 rows in line k / 2. */
INLINE void block_round(struct cm_tile_shape shape, const uint8_t *quants, const uint8_t *scales,
                        uint8_t *to)
{
    const __m512i byte = _mm512_set1_epi32(255);
    const __m512 d = half16(scales);
    const __m512 m =
        shape.affine ? half16(scales + 32) : _mm512_mul_ps(d, _mm512_set1_ps(-(float)shape.zero));
    __m512i w[8];
    unpack(shape, quants, w);
#pragma GCC unroll 8
    for (uint32_t j = 0; j < 8; j++) {
        __m512 column[4];
#pragma GCC unroll 4
        for (uint32_t c = 0; c < 4; c++) {
            __m512i q = _mm512_and_si512(_mm512_srli_epi32(w[j], 8 * c), byte);
            column[c] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(q), m);
        }
        _mm512_store_si512(to + 128 * j, pairs_of(column[0], column[1]));
        _mm512_store_si512(to + 128 * j + 64, pairs_of(column[2], column[3]));
    }
}

struct weights { /* of up to two row tiles, CHUNK_BLOCKS blocks */
    _Alignas(64) uint8_t rounded[AT_ONCE][CHUNK_BLOCKS][TILE_BYTES];
    const uint8_t *tile[AT_ONCE]; /* [blocks][TILE_BYTES] */
    uint32_t blocks;
};

INLINE void weights_take(uint32_t kind, const struct cm_matrix *matrix, uint32_t tile,
                         uint32_t tiles, uint32_t first, struct weights *w)
{
    const struct cm_tile_shape shape = cm_tile_shape(kind);
    w->blocks = matrix->blocks - first < CHUNK_BLOCKS ? matrix->blocks - first : CHUNK_BLOCKS;
    for (uint32_t i = 0; i < tiles; i++) {
        const size_t at = (size_t)(tile + i) * matrix->blocks + first;
        if (kind == CM_TENSOR_BF16) {
            w->tile[i] = matrix->quants + at * TILE_BYTES;
            continue;
        }
        w->tile[i] = w->rounded[i][0];
        for (uint32_t b = 0; b < w->blocks; b++) {
            block_round(shape, matrix->quants + (at + b) * shape.quant_bytes,
                        matrix->scales + (at + b) * shape.scale_bytes, w->rounded[i][b]);
        }
    }
    __asm__ volatile("" ::: "memory"); /* the tile unit reads what was just written */
}

/* Sums 0 .. 3: [panel][row tile]; activations 4, 5; weights 6, 7. */
static void panels_config(uint32_t first, uint32_t second)
{
    struct tile_config config = {.palette = 1,
                                 .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                 .rows = {(uint8_t)first, (uint8_t)first, (uint8_t)second,
                                          (uint8_t)second, (uint8_t)first, (uint8_t)second,
                                          CM_PANEL, CM_PANEL}};
    __asm__ volatile("" ::"m"(config));
    _tile_loadconfig(&config);
}

struct panels {                 /* one or two of a span */
    const uint16_t *x[AT_ONCE]; /* the chunk's first block */
    size_t x_step[AT_ONCE];     /* from block to block, in bytes */
    float *y[AT_ONCE];          /* the first row tile's */
    size_t y_step;              /* from token to token, in bytes */
};

/* y += w x of one chunk. The counts are constants. */
INLINE void panels_add(const struct weights *w, const struct panels *p, uint32_t panels,
                       uint32_t tiles, bool fresh)
{
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, p->y[0], p->y_step);
        if (tiles > 1) {
            _tile_loadd(1, p->y[0] + CM_TILE_ROWS, p->y_step);
        }
        if (panels > 1) {
            _tile_loadd(2, p->y[1], p->y_step);
        }
        if (panels > 1 && tiles > 1) {
            _tile_loadd(3, p->y[1] + CM_TILE_ROWS, p->y_step);
        }
    }
    for (uint32_t b = 0; b < w->blocks; b++) {
        _tile_loadd(4, (const uint8_t *)p->x[0] + b * p->x_step[0], 64);
        _tile_loadd(6, w->tile[0] + b * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (tiles > 1) {
            _tile_loadd(7, w->tile[1] + b * TILE_BYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (panels > 1) {
            _tile_loadd(5, (const uint8_t *)p->x[1] + b * p->x_step[1], 64);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (panels > 1 && tiles > 1) {
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, p->y[0], p->y_step);
    if (tiles > 1) {
        _tile_stored(1, p->y[0] + CM_TILE_ROWS, p->y_step);
    }
    if (panels > 1) {
        _tile_stored(2, p->y[1], p->y_step);
    }
    if (panels > 1 && tiles > 1) {
        _tile_stored(3, p->y[1] + CM_TILE_ROWS, p->y_step);
    }
    __asm__ volatile("" ::: "memory");
}

struct span_run {
    const struct cm_activations *x;
    struct cm_span span;
    float *y; /* of the row tiles at work */
    size_t stride;
};

static uint32_t panel_width(const struct span_run *run, uint32_t token)
{
    return run->span.token_last - token < CM_PANEL ? run->span.token_last - token : CM_PANEL;
}

/* All panels of the span, two at a time. */
INLINE void chunk_run(const struct span_run *run, const struct weights *w, uint32_t tiles,
                      uint32_t block)
{
    for (uint32_t t = run->span.token_first; t < run->span.token_last; t += AT_ONCE * CM_PANEL) {
        const uint32_t first = panel_width(run, t), other = t + CM_PANEL;
        const uint32_t second = other < run->span.token_last ? panel_width(run, other) : 0;
        struct panels p = {.y_step = run->stride * sizeof(float)};
        for (uint32_t i = 0; i < AT_ONCE && t + i * CM_PANEL < run->span.token_last; i++) {
            const uint32_t token = t + i * CM_PANEL;
            p.x[i] = run->x->rounded + cm_activation_at(run->x, token, block) * CM_TILE_COLUMNS;
            p.x_step[i] = (size_t)panel_width(run, token) * CM_TILE_COLUMNS * sizeof(uint16_t);
            p.y[i] = run->y + (size_t)(token - run->span.token_first) * run->stride;
        }
        if (first < CM_PANEL || second < CM_PANEL) {
            panels_config(first, second > 0 ? second : CM_PANEL);
        }
        if (second > 0) {
            panels_add(w, &p, 2, tiles, block == 0);
        } else {
            panels_add(w, &p, 1, tiles, block == 0);
        }
    }
    if ((run->span.token_last - run->span.token_first) % CM_PANEL != 0) {
        panels_config(CM_PANEL, CM_PANEL);
    }
}

INLINE void kind_run(uint32_t kind, const struct cm_matrix *matrix, struct span_run run)
{
    struct weights w;
    panels_config(CM_PANEL, CM_PANEL);
    for (uint32_t tile = run.span.tile_first; tile < run.span.tile_last; tile += AT_ONCE) {
        const uint32_t tiles = run.span.tile_last - tile > 1 ? 2 : 1;
        for (uint32_t block = 0; block < matrix->blocks; block += CHUNK_BLOCKS) {
            weights_take(kind, matrix, tile, tiles, block, &w);
            if (tiles > 1) {
                chunk_run(&run, &w, 2, block);
            } else {
                chunk_run(&run, &w, 1, block);
            }
        }
        run.y += (size_t)AT_ONCE * CM_TILE_ROWS;
    }
    _tile_release();
}

#define KIND(kind)                                                                                 \
    case kind:                                                                                     \
        kind_run(kind, matrix, run);                                                               \
        return;

void cm_amx_bf16_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                      struct cm_span span, float *y, size_t stride)
{
    const struct span_run run = {x, span, y, stride};
    switch (matrix->kind) {
        CM_QUANT_KINDS(KIND)
        KIND(CM_TENSOR_BF16)
    default:
        CM_ASSERT(false);
    }
}

void cm_amx_bf16_round(const float *x, const struct cm_activations *act, uint32_t token,
                       uint32_t block_first, uint32_t count)
{
    for (uint32_t b = 0; b < count; b++, x += CM_TILE_COLUMNS) {
        const size_t at = cm_activation_at(act, token, block_first + b);
        _mm512_storeu_si512(
            act->rounded + at * CM_TILE_COLUMNS,
            (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + CM_TILE_ROWS), _mm512_loadu_ps(x)));
    }
}
