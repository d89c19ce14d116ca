/* Attention of one KV head over chunks of 256 positions. Compiled once for each path.
 *
 * All rows (query heads of the group × tokens) share each load of K and V, as in flash-decoding
 * (Dao et al., 2023); a prompt's tokens go through in tiles. K lies transposed in its page
 * ([width][32 positions]), so that scores come 16 positions at a time without horizontal sums. K of
 * int8 is multiplied as int8, four of the width at a time, and so is V, four positions at a time.
 * The order of every sum is that of kernels/NUMERICS.md and depends on the positions alone. */
#include "kernels/cpu/attention_rows.h"

#define PAGE   CM_KV_PAGE_POSITIONS
#define CHUNK  CM_ATTENTION_CHUNK
#define INLINE static inline __attribute__((always_inline))

struct work { /* of one call; all rows have `padded` floats of output */
    const struct cm_attention *a;
    uint32_t rows, padded;
    float *scores;       /* [rows][CHUNK] */
    float *part;         /* [rows][padded] */
    float *page;         /* [width][PAGE] or [PAGE][padded]: K or V as floats */
    int8_t *query;       /* [rows][blocks][32], where K is int8 */
    float *query_scale;  /* [rows][blocks], of the turned query ÷ 32 */
    int32_t *query_sum;  /* [rows][blocks] */
    uint32_t blocks;     /* of 32, of the head's width */
    float *whole;        /* [rows][padded] merged so far */
    float *most, *total; /* [rows] merged so far */
    float *sums;         /* [rows] of this chunk */
    float *tops;
};

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* The first page of a chunk that some row sees. */
static uint32_t page_first(const struct work *w, uint32_t first)
{
    return row_begin(w->a, 0) > first ? row_begin(w->a, 0) / PAGE * PAGE : first;
}

/* K or V of one page. Few rows read halfs as they are kept, and the page after it ahead: pages lie
 * anywhere, so no prefetcher of the CPU follows. Many rows read floats that were converted once.
 * int8 is never converted. */
struct source {
    enum { FLOATS, HALFS, KEY_BYTES, VALUE_BYTES } form;
    uint32_t position; /* of the page's first */
    const uint8_t *page, *next;
    const float *whole; /* FLOATS */
};

static const uint16_t *halfs_of(const uint8_t *page)
{
    return (const uint16_t *)(const void *)page;
}

static void page_floats(const uint16_t *from, float *to, uint32_t count)
{
    for (uint32_t i = 0; i < count; i += LANES) {
        lanes_store(to + i, lanes_half_load(from + i));
    }
}

/* 16 floats of HALFS or FLOATS. */
INLINE lanes page_lanes(struct source from, size_t at)
{
    return from.form == HALFS ? lanes_half_load(halfs_of(from.page) + at)
                              : lanes_load(from.whole + at);
}

/* The scales of a block of a page of int8. */
INLINE const uint16_t *scales_of(const struct work *w, const uint8_t *page, uint32_t block)
{
    return halfs_of(page + cm_kv_scales_offset(w->a->head_width)) + (size_t)block * PAGE;
}

/* One vector of 32 int8 for each row, their sum and their scale. */
struct bytes {
    int8_t *quants; /* [rows][32], rows `stride` bytes apart */
    size_t stride;
    int32_t total[LANES_SCORE_ROWS];
    float scale[LANES_SCORE_ROWS];
};

/* Exact sums over 32: of the rows' bytes with each of 32 columns of a block, [8][32][4]. */
INLINE void block_sums(const struct work *w, struct source from, uint32_t block,
                       const struct bytes *bytes, uint32_t count,
                       lanes_sums sums[LANES_SCORE_ROWS][2])
{
    _mm_prefetch((const char *)scales_of(w, from.next, block), _MM_HINT_T0);
    for (uint32_t r = 0; r < count; r++) {
        sums[r][0] = sums[r][1] = lanes_sums_begin(bytes->total[r]);
    }
    for (uint32_t i = 0; i < CM_TILE_COLUMNS; i += 4) {
        const size_t at = (size_t)(block * CM_TILE_COLUMNS + i) * PAGE;
        const lanes_quads low = lanes_quads_load((const int8_t *)from.page + at),
                          high = lanes_quads_load((const int8_t *)from.page + at + 64);
        _mm_prefetch((const char *)from.next + at, _MM_HINT_T0);
        _mm_prefetch((const char *)from.next + at + 64, _MM_HINT_T0);
        for (uint32_t r = 0; r < count; r++) {
            int32_t four;
            memcpy(&four, bytes->quants + r * bytes->stride + i, sizeof(four));
            sums[r][0] = lanes_sums_add(sums[r][0], low, four);
            sums[r][1] = lanes_sums_add(sums[r][1], high, four);
        }
    }
}

/* Scores of `count` rows for the 32 positions of a page of int8. */
INLINE void page_dots(const struct work *w, uint32_t row, uint32_t count, struct source from,
                      float *to)
{
    lanes dots[LANES_SCORE_ROWS][2];
    for (uint32_t r = 0; r < count; r++) {
        dots[r][0] = dots[r][1] = lanes_set(0.0f);
    }
    for (uint32_t b = 0; b < w->blocks; b++) {
        lanes_sums sums[LANES_SCORE_ROWS][2];
        const size_t place = (size_t)row * w->blocks + b;
        struct bytes query = {.quants = w->query + place * CM_TILE_COLUMNS,
                              .stride = (size_t)w->blocks * CM_TILE_COLUMNS};
        for (uint32_t r = 0; r < count; r++) {
            query.total[r] = w->query_sum[place + r * w->blocks];
            query.scale[r] = w->query_scale[place + r * w->blocks];
        }
        block_sums(w, from, b, &query, count, sums);
        const lanes d0 = lanes_half_load(scales_of(w, from.page, b)),
                    d1 = lanes_half_load(scales_of(w, from.page, b) + LANES);
        for (uint32_t r = 0; r < count; r++) {
            const lanes q = lanes_set(query.scale[r]);
            dots[r][0] = lanes_fma(lanes_mul(d0, q), lanes_sums_float(sums[r][0]), dots[r][0]);
            dots[r][1] = lanes_fma(lanes_mul(d1, q), lanes_sums_float(sums[r][1]), dots[r][1]);
        }
    }
    const lanes scale = lanes_set(w->a->scale);
    for (uint32_t r = 0; r < count; r++) {
        lanes_store(to + (size_t)(row + r) * CHUNK, lanes_mul(dots[r][0], scale));
        lanes_store(to + (size_t)(row + r) * CHUNK + LANES, lanes_mul(dots[r][1], scale));
    }
}

static uint32_t within(uint32_t position, uint32_t page)
{
    return position > page ? least(position - page, PAGE) : 0;
}

/* A row's weights of the 16 positions from `at` of a page on, with V's scales; 0 where the row sees
 * nothing, whatever stands there. */
INLINE lanes scaled_weights(const struct work *w, uint32_t row, uint32_t page, uint32_t at,
                            const float *weights, lanes scales)
{
    const uint32_t end = within(row_seen(w->a, row), page),
                   start = within(row_begin(w->a, row), page);
    lanes e = lanes_mul(lanes_load(weights + (size_t)row * CHUNK + at), scales);
    e = lanes_first(e, end > at ? end - at : 0, 0.0f);
    return start > at ? lanes_after(e, start - at, 0.0f) : e;
}

/* part[row] += weights × V of a page of int8: the weights, with V's scales in them, become int8. */
INLINE void page_blend(const struct work *w, uint32_t row, uint32_t count, struct source from,
                       const float *weights)
{
    int8_t quants[LANES_SCORE_ROWS][CM_TILE_COLUMNS];
    for (uint32_t b = 0; b < w->blocks; b++) {
        lanes_sums sums[LANES_SCORE_ROWS][2];
        struct bytes scaled = {.quants = quants[0], .stride = CM_TILE_COLUMNS};
        const lanes d0 = lanes_half_load(scales_of(w, from.page, b)),
                    d1 = lanes_half_load(scales_of(w, from.page, b) + LANES);
        for (uint32_t r = 0; r < count; r++) {
            lanes low = scaled_weights(w, row + r, from.position, 0, weights, d0),
                  high = scaled_weights(w, row + r, from.position, LANES, weights, d1);
            scaled.total[r] =
                lanes_quantise(low, high, CM_BYTES_LEAST, quants[r], &scaled.scale[r]);
        }
        block_sums(w, from, b, &scaled, count, sums);
        for (uint32_t r = 0; r < count; r++) {
            float *to = w->part + (size_t)(row + r) * w->padded + (size_t)b * CM_TILE_COLUMNS;
            for (uint32_t h = 0; h < 2 && b * CM_TILE_COLUMNS + h * LANES < w->padded; h++) {
                lanes_store(to + h * LANES,
                            lanes_fma(lanes_set(scaled.scale[r]), lanes_sums_float(sums[r][h]),
                                      lanes_load(to + h * LANES)));
            }
        }
    }
}

/* Scores of `count` rows for the 32 positions of a page of floats or halfs. */
INLINE void page_scores(const struct work *w, uint32_t row, uint32_t count, struct source from,
                        float *to)
{
    lanes low[LANES_SCORE_ROWS], high[LANES_SCORE_ROWS];
    const float *query[LANES_SCORE_ROWS];
    for (uint32_t r = 0; r < count; r++) {
        low[r] = high[r] = lanes_set(0.0f);
        query[r] = row_query(w->a, row + r);
    }
    for (uint32_t i = 0; i < w->a->head_width; i++) {
        if (from.form == HALFS) {
            _mm_prefetch((const char *)(halfs_of(from.next) + (size_t)i * PAGE), _MM_HINT_T0);
        }
        lanes k0 = page_lanes(from, i * PAGE), k1 = page_lanes(from, i * PAGE + LANES);
        for (uint32_t r = 0; r < count; r++) {
            lanes q = lanes_set(query[r][i]);
            low[r] = lanes_fma(q, k0, low[r]);
            high[r] = lanes_fma(q, k1, high[r]);
        }
    }
    const lanes scale = lanes_set(w->a->scale);
    for (uint32_t r = 0; r < count; r++) {
        lanes_store(to + (size_t)(row + r) * CHUNK, lanes_mul(low[r], scale));
        lanes_store(to + (size_t)(row + r) * CHUNK + LANES, lanes_mul(high[r], scale));
    }
}

/* part[row][column ..] += e × V over positions [first, last) of a page. */
INLINE void page_values(const struct work *w, uint32_t row, uint32_t count, uint32_t column,
                        uint32_t vectors, struct source from, const float *weights, uint32_t first,
                        uint32_t last)
{
    lanes out[LANES_VALUE_ROWS][4];
    const uint32_t stride = from.form == HALFS ? w->a->head_width : w->padded;
    for (uint32_t r = 0; r < count; r++) {
        for (uint32_t v = 0; v < vectors; v++) {
            out[r][v] = lanes_load(w->part + (size_t)(row + r) * w->padded + column + v * LANES);
        }
    }
    for (uint32_t t = first; t < last; t++) {
        lanes value[4];
        for (uint32_t v = 0; v < vectors; v++) {
            size_t at = (size_t)t * stride + column + v * LANES;
            if (from.form == HALFS && v % 2 == 0) {
                _mm_prefetch((const char *)(halfs_of(from.next) + at), _MM_HINT_T0);
            }
            value[v] = page_lanes(from, at);
        }
        for (uint32_t r = 0; r < count; r++) {
            lanes e = lanes_set(weights[(size_t)(row + r) * CHUNK + t]);
            for (uint32_t v = 0; v < vectors; v++) {
                out[r][v] = lanes_fma(e, value[v], out[r][v]);
            }
        }
    }
    for (uint32_t r = 0; r < count; r++) {
        for (uint32_t v = 0; v < vectors; v++) {
            lanes_store(w->part + (size_t)(row + r) * w->padded + column + v * LANES, out[r][v]);
        }
    }
}

/* A page and `count` rows: K gives their scores, V of int8 adds what their weights make of it. */
INLINE void page_take(const struct work *w, uint32_t row, uint32_t count, struct source from,
                      float *to)
{
    if (from.form == KEY_BYTES) {
        page_dots(w, row, count, from, to);
    } else if (from.form == VALUE_BYTES) {
        page_blend(w, row, count, from, to);
    } else {
        page_scores(w, row, count, from, to);
    }
}

/* Constant counts keep all sums in registers. */
INLINE void rows_page(const struct work *w, uint32_t row, uint32_t count, struct source from,
                      float *to)
{
    switch (count) {
    case 1:
        page_take(w, row, 1, from, to);
        return;
    case 2:
        page_take(w, row, 2, from, to);
        return;
#if LANES_SCORE_ROWS > 2
    case 3:
        page_take(w, row, 3, from, to);
        return;
    case 4:
        page_take(w, row, 4, from, to);
        return;
    case 5:
        page_take(w, row, 5, from, to);
        return;
    default:
        page_take(w, row, 6, from, to);
#endif
    }
}

INLINE void rows_values(const struct work *w, uint32_t row, uint32_t count, uint32_t column,
                        uint32_t vectors, struct source from, const float *weights, uint32_t first,
                        uint32_t last)
{
    switch (count) {
    case 1:
        page_values(w, row, 1, column, vectors, from, weights, first, last);
        return;
#if LANES_VALUE_ROWS > 1
    case 2:
        page_values(w, row, 2, column, vectors, from, weights, first, last);
        return;
    case 3:
        page_values(w, row, 3, column, vectors, from, weights, first, last);
        return;
    case 4:
        page_values(w, row, 4, column, vectors, from, weights, first, last);
        return;
    case 5:
        page_values(w, row, 5, column, vectors, from, weights, first, last);
        return;
    default:
        page_values(w, row, 6, column, vectors, from, weights, first, last);
#endif
    }
}

/* What to read ahead behind the page of position t: the next of K, or of V. */
static const uint8_t *next_of(const struct work *w, uint32_t t, uint32_t first, uint32_t last,
                              bool values)
{
    const struct cm_attention *a = w->a;
    if (t + PAGE < last) {
        return position_page(a, t + PAGE, values ? a->v_offset : a->k_offset);
    }
    if (!values) {
        return position_page(a, first, a->v_offset);
    }
    return position_page(a, last < row_seen(w->a, w->rows - 1) ? last : t, a->k_offset);
}

/* All rows that see something of the page at position t: their scores, or int8 V. */
INLINE void page_run(const struct work *w, uint32_t t, struct source from, float *to)
{
    for (uint32_t row = 0; row < w->rows; row += LANES_SCORE_ROWS) {
        uint32_t count = least(LANES_SCORE_ROWS, w->rows - row);
        if (row_seen(w->a, row + count - 1) > t && row_begin(w->a, row) < t + PAGE) {
            rows_page(w, row, count, from, to);
        }
    }
}

static void chunk_scores(const struct work *w, uint32_t first, uint32_t last)
{
    const struct cm_attention *a = w->a;
    for (uint32_t t = page_first(w, first); t < last; t += PAGE) {
        struct source from = {.page = position_page(a, t, a->k_offset),
                              .next = next_of(w, t, first, last, false),
                              .whole = w->page};
        float *to = w->scores + (t - first);
        if (a->kv_kind == CM_KV_INT8) {
            from.form = KEY_BYTES;
            page_run(w, t, from, to);
        } else if (w->rows <= LANES_SCORE_ROWS) {
            from.form = HALFS;
            rows_page(w, 0, w->rows, from, to);
        } else {
            from.form = FLOATS;
            page_floats(halfs_of(from.page), w->page, a->head_width * PAGE);
            page_run(w, t, from, to);
        }
    }
}

/* Scores become weights exp(score - greatest); positions not seen weigh 0. */
static void chunk_weights(const struct work *w, uint32_t first)
{
    for (uint32_t row = 0; row < w->rows; row++) {
        uint32_t end = row_seen(w->a, row), count = end > first ? least(end - first, CHUNK) : 0;
        uint32_t hidden =
            row_begin(w->a, row) > first ? least(row_begin(w->a, row) - first, CHUNK) : 0;
        const uint32_t start = hidden / LANES * LANES;
        float *scores = w->scores + (size_t)row * CHUNK;
        lanes most = lanes_set(-INFINITY), sum = lanes_set(0.0f);
        for (uint32_t i = start; i < count; i += LANES) {
            lanes s = lanes_load(scores + i);
            if (w->a->cap > 0.0f) {
                s = lanes_cap(s, w->a->cap);
                lanes_store(scores + i, s);
            }
            s = lanes_first(s, count - i, -INFINITY);
            most = lanes_max(most, i < hidden ? lanes_after(s, hidden - i, -INFINITY) : s);
        }
        w->tops[row] = lanes_greatest(most);
        most = lanes_set(-w->tops[row]);
        for (uint32_t i = start; i < count; i += LANES) {
            lanes e = lanes_exp(lanes_add(lanes_load(scores + i), most));
            e = lanes_first(e, count - i, 0.0f);
            e = i < hidden ? lanes_after(e, hidden - i, 0.0f) : e;
            sum = lanes_add(sum, e);
            lanes_store(scores + i, e);
        }
        w->sums[row] = lanes_sum(sum);
    }
}

/* Values of one page for rows [row, row + count): what all of them see together in one pass, what
 * only some see before and after it. */
INLINE void block_values(const struct work *w, uint32_t row, uint32_t count, uint32_t column,
                         uint32_t vectors, struct source from, const float *weights, uint32_t page)
{
    uint32_t end = within(row_seen(w->a, row), page),
             start = within(row_begin(w->a, row + count - 1), page);
    start = least(start, end);
    for (uint32_t r = row; r < row + count; r++) {
        uint32_t own = within(row_begin(w->a, r), page);
        if (own < start) {
            rows_values(w, r, 1, column, vectors, from, weights, own, start);
        }
    }
    rows_values(w, row, count, column, vectors, from, weights, start, end);
    for (uint32_t r = row; r < row + count; r++) {
        uint32_t own = within(row_begin(w->a, r), page), last = within(row_seen(w->a, r), page);
        if (last > end) {
            rows_values(w, r, 1, column, vectors, from, weights, own > end ? own : end, last);
        }
    }
}

INLINE void page_add(const struct work *w, uint32_t column, uint32_t vectors, struct source from,
                     const float *weights, uint32_t page)
{
    for (uint32_t row = 0; row < w->rows; row += LANES_VALUE_ROWS) {
        uint32_t count = least(LANES_VALUE_ROWS, w->rows - row);
        block_values(w, row, count, column, vectors, from, weights, page);
    }
}

INLINE void page_values_all(const struct work *w, struct source from, const float *weights,
                            uint32_t page)
{
    uint32_t column = 0;
    for (; column + 4 * LANES <= w->padded; column += 4 * LANES) {
        page_add(w, column, 4, from, weights, page);
    }
    for (; column < w->padded; column += LANES) {
        page_add(w, column, 1, from, weights, page);
    }
}

static void chunk_values(const struct work *w, uint32_t first, uint32_t last)
{
    const struct cm_attention *a = w->a;
    memset(w->part, 0, (size_t)w->rows * w->padded * sizeof(float));
    for (uint32_t t = page_first(w, first); t < last; t += PAGE) {
        struct source from = {.position = t,
                              .page = position_page(a, t, a->v_offset),
                              .next = next_of(w, t, first, last, true),
                              .whole = w->page};
        float *weights = w->scores + (t - first);
        if (a->kv_kind == CM_KV_INT8) {
            from.form = VALUE_BYTES;
            page_run(w, t, from, weights);
        } else if (w->rows <= LANES_VALUE_ROWS) {
            from.form = HALFS;
            page_values_all(w, from, weights, t);
        } else {
            from.form = FLOATS;
            for (uint32_t i = 0; i < PAGE; i++) {
                page_floats(halfs_of(from.page) + (size_t)i * a->head_width,
                            w->page + (size_t)i * w->padded, a->head_width);
            }
            page_values_all(w, from, weights, t);
        }
    }
}

static void queries_quantise(struct work *w)
{
    for (uint32_t row = 0; row < w->rows; row++) {
        for (uint32_t b = 0; b < w->blocks; b++) {
            const uint32_t first = b * CM_TILE_COLUMNS, i = row * w->blocks + b;
            float scale;
            w->query_sum[i] =
                lanes_quantise_head(row_query(w->a, row) + first, w->a->head_width - first, true,
                                    w->query + (size_t)i * CM_TILE_COLUMNS, &scale);
            w->query_scale[i] = scale / CM_TILE_COLUMNS;
        }
    }
}

static void work_lay(struct work *w, const struct cm_attention *a)
{
    float *at = a->scratch;
    w->a = a;
    w->rows = a->tokens * a->group;
    w->padded = cm_padded(a->head_width, LANES);
    w->scores = at;
    w->page = w->scores + (size_t)w->rows * CHUNK;
    w->part = w->page + (size_t)w->padded * PAGE;
    w->whole = w->part + (size_t)w->rows * w->padded;
    w->most = w->whole + (size_t)w->rows * w->padded;
    w->total = w->most + w->rows;
    w->sums = w->total + w->rows;
    w->tops = w->sums + w->rows;
    w->blocks = cm_kv_blocks(a->head_width);
    w->query_scale = w->tops + w->rows;
    w->query_sum = (int32_t *)(void *)(w->query_scale + (size_t)w->rows * w->blocks);
    w->query = (int8_t *)(w->query_sum + (size_t)w->rows * w->blocks);
    if (a->kv_kind == CM_KV_INT8) {
        queries_quantise(w);
    }
}

static void chunk_run(const struct work *w, uint32_t first)
{
    uint32_t last = least(first + CHUNK, row_seen(w->a, w->rows - 1));
    chunk_scores(w, first, last);
    chunk_weights(w, first);
    chunk_values(w, first, last);
}

void LANES_NAME(attend)(const struct cm_attention *a)
{
    struct work w;
    work_lay(&w, a);
    for (uint32_t first = row_begin(w.a, 0) / CHUNK * CHUNK; first < row_seen(w.a, w.rows - 1);
         first += CHUNK) {
        chunk_run(&w, first);
        for (uint32_t row = 0; row < w.rows; row++) {
            const float *part = w.part + (size_t)row * w.padded;
            float *whole = w.whole + (size_t)row * w.padded;
            if (first == row_begin(w.a, row) / CHUNK * CHUNK) {
                memcpy(whole, part, w.padded * sizeof(float));
                w.most[row] = w.tops[row];
                w.total[row] = w.sums[row];
            } else if (row_seen(w.a, row) > first && first > row_begin(w.a, row)) {
                row_merge(&w.most[row], &w.total[row], whole, w.tops[row], w.sums[row], part,
                          w.padded);
            }
        }
    }
    for (uint32_t row = 0; row < w.rows; row++) {
        row_out(w.whole + (size_t)row * w.padded, w.total[row], a->head_width,
                a->out + (row / a->group) * a->out_stride +
                    (size_t)(row % a->group) * a->head_width);
    }
}

void LANES_NAME(attend_chunk)(const struct cm_attention *a, uint32_t chunk, float *partial)
{
    struct work w;
    work_lay(&w, a);
    if (row_begin(w.a, 0) >= (chunk + 1) * CHUNK) {
        return; /* the window hides it */
    }
    chunk_run(&w, chunk * CHUNK);
    for (uint32_t row = 0; row < w.rows; row++) {
        float *to = partial + row * (w.padded + LANES);
        to[0] = w.tops[row];
        to[1] = w.sums[row];
        memcpy(to + LANES, w.part + (size_t)row * w.padded, w.padded * sizeof(float));
    }
}

void LANES_NAME(attend_merge)(const struct cm_attention *a, uint32_t chunks, float *partials)
{
    const uint32_t padded = cm_padded(a->head_width, LANES);
    const size_t row_floats = padded + LANES, chunk_floats = a->group * row_floats;
    const struct work w = {.a = a};
    const uint32_t first = row_begin(w.a, 0) / CHUNK;
    for (uint32_t row = 0; row < a->group; row++) {
        float *whole = partials + first * chunk_floats + row * row_floats;
        for (uint32_t c = 1; c < chunks - first; c++) {
            const float *next = whole + c * chunk_floats;
            row_merge(&whole[0], &whole[1], whole + LANES, next[0], next[1], next + LANES, padded);
        }
        row_out(whole + LANES, whole[1], a->head_width, a->out + (size_t)row * a->head_width);
    }
}
