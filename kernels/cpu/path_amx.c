/* Matrix product with AMX int8, for whole panels of 16 tokens; what is left goes to AVX-512 VNNI.
 * One tile instruction makes the exact block sums of 16 tokens × 16 rows × 32 columns; the scales
 * follow in AVX-512, so the results are those of every other path. A unit of 8 blocks (256 columns,
 * one chunk of NUMERICS.md) is unpacked once for all panels of the span. Measured on Granite
 * Rapids: 0.8 TOPS a core, where VNNI makes 0.41; the scales take half of the time. */
#include "kernels/cpu/amx.h"
#include "kernels/cpu/avx512.h"

#define CHUNK_BLOCKS 8u
#define AHEAD        4u /* blocks that the tile unit runs before the scales: tiles 0 .. 3 */
#define TILE_FLOATS  (CM_PANEL * CM_TILE_ROWS)

/* Sums 0 .. 3; activations 4, 5: 16 tokens × 32 columns; weights 6, 7: 8 × (16 rows × 4 columns).
 */
static const struct tile_config config = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 32, 32, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 8, 8},
};

struct chunk { /* of one row tile: up to 8 blocks, as bytes and floats */
    _Alignas(64) uint8_t bytes[CHUNK_BLOCKS][512];
    _Alignas(64) float d[CHUNK_BLOCKS][CM_TILE_ROWS];
    _Alignas(64) float m[CHUNK_BLOCKS][CM_TILE_ROWS];
    _Alignas(64) int32_t sums[2 * AHEAD][TILE_FLOATS];
    uint32_t blocks;
};

#define TILE_STEP(sum, tokens, rows)                                                               \
    do {                                                                                           \
        _tile_zero(sum);                                                                           \
        _tile_loadd(tokens, q, CM_TILE_COLUMNS);                                                   \
        _tile_loadd(rows, bytes, 64);                                                              \
        _tile_dpbsud(sum, tokens, rows);                                                           \
        _tile_stored(sum, to, 64);                                                                 \
    } while (0)

/* Block sums number `step` of this chunk; q: the panel's activations of that block. */
INLINE void sums_make(struct chunk *chunk, uint32_t step, uint32_t block, const int8_t *q)
{
    const uint8_t *bytes = chunk->bytes[block];
    int32_t *to = chunk->sums[step % (2 * AHEAD)];
    switch (step % 4) {
    case 0:
        TILE_STEP(0, 4, 6);
        break;
    case 1:
        TILE_STEP(1, 5, 7);
        break;
    case 2:
        TILE_STEP(2, 4, 6);
        break;
    default:
        TILE_STEP(3, 5, 7);
    }
    __asm__ volatile("" ::: "memory");
}

INLINE void chunk_unpack(struct cm_tile_shape shape, struct chunk *chunk, const uint8_t *quants,
                         const uint8_t *scales)
{
    for (uint32_t b = 0; b < chunk->blocks; b++) {
        __m512i w[8];
        unpack(shape, quants + b * shape.quant_bytes, w);
        for (uint32_t j = 0; j < 8; j++) {
            _mm512_store_si512(chunk->bytes[b] + 64 * j, w[j]);
        }
        _mm512_store_ps(chunk->d[b], half16(scales + b * shape.scale_bytes));
        if (shape.affine) {
            _mm512_store_ps(chunk->m[b], half16(scales + b * shape.scale_bytes + 32));
        }
    }
}

/* p of 16 tokens, one more block. at: of the panel's block in the activations' planes. */
INLINE void scales_apply(struct cm_tile_shape shape, const struct chunk *chunk, uint32_t step,
                         uint32_t block, const struct cm_activations *x, size_t at, __m512 p[16])
{
    const int32_t *sums = chunk->sums[step % (2 * AHEAD)];
    const __m512 d = _mm512_load_ps(chunk->d[block]);
    const __m512 m = shape.affine ? _mm512_load_ps(chunk->m[block]) : d;
#pragma GCC unroll 16
    for (uint32_t c = 0; c < CM_PANEL; c++) {
        __m512i sum = _mm512_load_si512(sums + c * CM_TILE_ROWS);
        if (shape.zero != 0) {
            sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(shape.zero * x->count[at + c]));
        }
        p[c] = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(x->scale[at + c])),
                               _mm512_cvtepi32_ps(sum), p[c]);
        if (shape.affine) {
            p[c] = _mm512_fmadd_ps(m, _mm512_set1_ps(x->sum[at + c]), p[c]);
        }
    }
}

/* Where a run over panels × blocks of one chunk stands. */
struct walk {
    const struct cm_activations *x;
    size_t at;     /* of the chunk's first block in the first panel, in the activations' planes */
    size_t stride; /* from panel to panel */
    uint32_t panels, panel, block, step;
};

INLINE size_t walk_at(const struct walk *walk)
{
    return walk->at + walk->panel * walk->stride + (size_t)walk->block * CM_PANEL;
}

/* The tile unit's next block, if there is one left. */
INLINE void walk_sums(struct chunk *chunk, struct walk *walk)
{
    if (walk->panel < walk->panels) {
        sums_make(chunk, walk->step++, walk->block, walk->x->q + walk_at(walk) * CM_TILE_COLUMNS);
        walk->block = walk->block + 1 == chunk->blocks ? 0 : walk->block + 1;
        walk->panel += walk->block == 0;
    }
}

/* One chunk of one row tile for all panels: y += p. The tile unit runs AHEAD blocks before the
 * scales. */
INLINE void chunk_run(struct cm_tile_shape shape, struct chunk *chunk, struct walk walk, bool first,
                      float *y, size_t stride)
{
    struct walk ahead = walk;
    for (uint32_t i = 0; i < AHEAD; i++) {
        walk_sums(chunk, &ahead);
    }
    for (; walk.panel < walk.panels; walk.panel++) {
        __m512 p[CM_PANEL];
        float *to = y + walk.panel * CM_PANEL * stride;
        for (uint32_t c = 0; c < CM_PANEL; c++) {
            p[c] = _mm512_setzero_ps();
        }
        for (walk.block = 0; walk.block < chunk->blocks; walk.block++, walk.step++) {
            walk_sums(chunk, &ahead);
            scales_apply(shape, chunk, walk.step, walk.block, walk.x, walk_at(&walk), p);
        }
        for (uint32_t c = 0; c < CM_PANEL; c++, to += stride) {
            const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
            _mm512_storeu_ps(to, _mm512_add_ps(before, p[c]));
        }
    }
}

INLINE void kind_run(uint32_t kind, const struct cm_matrix *matrix, const struct cm_activations *x,
                     struct cm_span span, float *y, size_t stride)
{
    const struct cm_tile_shape shape = cm_tile_shape(kind);
    const uint32_t blocks = matrix->blocks;
    struct chunk chunk;
    struct walk walk = {.x = x,
                        .stride = (size_t)blocks * CM_PANEL,
                        .panels = (span.token_last - span.token_first) / CM_PANEL};
    for (uint32_t tile = span.tile_first; tile < span.tile_last; tile++) {
        for (uint32_t b = 0; b < blocks; b += CHUNK_BLOCKS) {
            size_t block = (size_t)tile * blocks + b;
            chunk.blocks = blocks - b < CHUNK_BLOCKS ? blocks - b : CHUNK_BLOCKS;
            chunk_unpack(shape, &chunk, matrix->quants + block * shape.quant_bytes,
                         matrix->scales + block * shape.scale_bytes);
            walk.at = cm_activation_at(x, span.token_first, b);
            chunk_run(shape, &chunk, walk, b == 0, y + (tile - span.tile_first) * CM_TILE_ROWS,
                      stride);
        }
    }
}

#define KIND(kind)                                                                                 \
    case kind:                                                                                     \
        kind_run(kind, matrix, x, whole, y, stride);                                               \
        break;

void cm_amx_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                 struct cm_span span, float *y, size_t stride)
{
    struct cm_span whole = span, rest = span;
    if (matrix->kind == CM_TENSOR_BF16) { /* the tile unit adds in an order of its own */
        cm_avx512vnni_bfloat_gemm(matrix, x, span, y, stride);
        return;
    }
    whole.token_last -= (span.token_last - span.token_first) % CM_PANEL;
    rest.token_first = whole.token_last;
    if (whole.token_first < whole.token_last) {
        _tile_loadconfig(&config);
        switch (matrix->kind) {
            CM_QUANT_KINDS(KIND)
        default:
            CM_ASSERT(false);
        }
        _tile_release();
    }
    if (rest.token_first < rest.token_last) {
        cm_avx512vnni_gemm(matrix, x, rest,
                           y + (size_t)(rest.token_first - span.token_first) * stride, stride);
    }
}
