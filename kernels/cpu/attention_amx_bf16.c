/* Class P of kernels/NUMERICS.md: attention of a prompt by AMX-bf16, for one KV head, K and V fp16.
 * A chunk's K and V become tiles once for all rows (query heads of the group × tokens); 16 rows at
 * a time then get their scores, weights and values, so that scores never leave the core's caches.
 * What a row gets depends on the positions alone: those that it does not see weigh 0 in it. */
#include "kernels/cpu/amx_bf16.h"
#include "kernels/cpu/attention_rows.h"

#define PAGE        CM_KV_PAGE_POSITIONS
#define CHUNK       CM_ATTENTION_CHUNK
#define CHUNK_PAGES (CHUNK / PAGE)
#define ROWS        16u      /* of a tile */
#define VALUE_MOST  65504.0f /* so that 0 × a value is 0, whatever another token's values are */
#define INLINE      static inline __attribute__((always_inline))

struct work {
    const struct cm_attention *a;
    uint32_t rows;
    uint32_t blocks, columns; /* of the head's width, padded: of 32 each, of 16 each */
    uint8_t *query;           /* [tile of rows][block] of TILE_BYTES */
    uint8_t *keys;            /* [page of the chunk][block][half of its positions] */
    uint8_t *values;          /* [page of the chunk][column] */
    uint8_t *weights;         /* [page of the chunk], of the rows at work */
    float *scores;            /* [ROWS][CHUNK] of the rows at work */
    float *part;              /* [ROWS][padded width] of the rows at work */
    float *whole;             /* [rows][padded width] merged so far */
    float *most, *total;      /* [rows] merged so far */
};

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static void work_lay(struct work *w, const struct cm_attention *a)
{
    uint8_t *at = (uint8_t *)a->scratch;
    w->a = a;
    w->rows = a->tokens * a->group;
    w->blocks = cm_padded(a->head_width, 32) / 32;
    w->columns = 2 * w->blocks;
    const size_t padded = (size_t)w->columns * ROWS, tiles = cm_padded(w->rows, ROWS) / ROWS;
    w->query = at;
    w->keys = w->query + tiles * w->blocks * TILE_BYTES;
    w->values = w->keys + (size_t)CHUNK_PAGES * w->columns * TILE_BYTES;
    w->weights = w->values + (size_t)CHUNK_PAGES * w->columns * TILE_BYTES;
    w->scores = (float *)(void *)(w->weights + (size_t)CHUNK_PAGES * TILE_BYTES);
    w->part = w->scores + (size_t)ROWS * CHUNK;
    w->whole = w->part + ROWS * padded;
    w->most = w->whole + tiles * ROWS * padded;
    w->total = w->most + tiles * ROWS;
}

/* The first `count` of 16 halves or floats. */
INLINE __mmask16 first_of(uint32_t count)
{
    return (__mmask16)(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

INLINE __m512 halves_load(const uint16_t *at, __mmask16 mask)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at));
}

/* ------------------------------------------------------------------ tiles */

static void query_round(const struct work *w)
{
    const uint32_t width = w->a->head_width;
    for (uint32_t row = 0; row < cm_padded(w->rows, ROWS); row++) {
        const float *query = row_query(w->a, least(row, w->rows - 1));
        for (uint32_t b = 0; b < w->blocks; b++) {
            const uint32_t left = width - 32 * b;
            const __m512 low = _mm512_maskz_loadu_ps(first_of(left), query + 32 * b);
            const __m512 high =
                _mm512_maskz_loadu_ps(first_of(left > 16 ? left - 16 : 0), query + 32 * b + 16);
            uint8_t *tile = w->query + ((size_t)(row / ROWS) * w->blocks + b) * TILE_BYTES;
            _mm512_store_si512(tile + (size_t)(row % ROWS) * 64,
                               (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* Pairs of neighbours in the head's width: those of 16 positions are a line. */
static void page_keys(const struct work *w, const uint16_t *page, uint8_t *tiles)
{
    const uint32_t width = w->a->head_width;
    for (uint32_t i = 0; i < 32 * w->blocks; i += 2) {
        uint8_t *line = tiles + (size_t)(i / 32) * 2 * TILE_BYTES + (size_t)(i % 32) * 32;
        const __mmask16 first = i < width ? 0xffff : 0, second = i + 1 < width ? 0xffff : 0;
        for (uint32_t half = 0; half < 2; half++) {
            const uint16_t *at = page + (size_t)i * PAGE + 16 * half;
            _mm512_store_si512(line + half * TILE_BYTES,
                               pairs_of(halves_load(at, first), halves_load(at + PAGE, second)));
        }
    }
}

INLINE __m512 values_load(const uint16_t *at, __mmask16 mask)
{
    const __m512 most = _mm512_set1_ps(VALUE_MOST), least_of_all = _mm512_set1_ps(-VALUE_MOST);
    return _mm512_max_ps(_mm512_min_ps(halves_load(at, mask), most), least_of_all);
}

/* Pairs of neighbouring positions, of which `count` are there: those of 16 columns are a line. */
static void page_values(const struct work *w, const uint16_t *page, uint32_t count, uint8_t *tiles)
{
    const uint32_t width = w->a->head_width;
    for (uint32_t t = 0; t < PAGE; t += 2) {
        const uint16_t *first = page + (size_t)t * width, *second = first + width;
        for (uint32_t c = 0; c < w->columns; c++) {
            const __mmask16 mask = first_of(width > 16 * c ? width - 16 * c : 0);
            _mm512_store_si512(
                tiles + (size_t)c * TILE_BYTES + (size_t)t * 32,
                pairs_of(values_load(first + (size_t)16 * c, t < count ? mask : 0),
                         values_load(second + (size_t)16 * c, t + 1 < count ? mask : 0)));
        }
    }
}

static const uint16_t *halves_of(const struct cm_attention *a, uint32_t position, size_t offset)
{
    return (const uint16_t *)(const void *)position_page(a, position, offset);
}

/* All of a chunk that some row sees. */
static void chunk_take(const struct work *w, uint32_t first, uint32_t begin, uint32_t last)
{
    const struct cm_attention *a = w->a;
    for (uint32_t t = begin / PAGE * PAGE; t < last; t += PAGE) {
        const size_t at = (size_t)(t - first) / PAGE * w->columns * TILE_BYTES;
        page_keys(w, halves_of(a, t, a->k_offset), w->keys + at);
        page_values(w, halves_of(a, t, a->v_offset), least(last - t, PAGE), w->values + at);
    }
    __asm__ volatile("" ::: "memory"); /* the tile unit reads what was just written */
}

/* ------------------------------------------------------------------ sixteen rows */

/* Pages first .. last - 1 of the chunk. */
struct pages {
    uint32_t first, last;
};

static void rows_scores(const struct work *w, const uint8_t *query, struct pages pages)
{
    for (uint32_t p = pages.first; p < pages.last; p++) {
        const uint8_t *keys = w->keys + (size_t)p * w->columns * TILE_BYTES;
        _tile_zero(0);
        _tile_zero(1);
        for (uint32_t b = 0; b < w->blocks; b++, keys += (size_t)2 * TILE_BYTES) {
            _tile_loadd(4, query + (size_t)b * TILE_BYTES, 64);
            _tile_loadd(5, keys, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, keys + TILE_BYTES, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, w->scores + (size_t)p * PAGE, CHUNK * sizeof(float));
        _tile_stored(1, w->scores + (size_t)p * PAGE + 16, CHUNK * sizeof(float));
    }
    __asm__ volatile("" ::: "memory");
}

/* Sixteen scores from `at` on of a row that sees [hidden, count) of the chunk; others are `rest`.
 */
INLINE lanes seen_only(lanes x, uint32_t at, uint32_t hidden, uint32_t count, float rest)
{
    x = lanes_first(x, count > at ? count - at : 0, rest);
    return at < hidden ? lanes_after(x, hidden - at, rest) : x;
}

/* Scores of a row become weights exp(score - greatest), as bf16. Returns the greatest. */
static float row_weights(const struct work *w, uint32_t first, uint32_t row, struct pages pages,
                         float *ret_sum)
{
    const struct cm_attention *a = w->a;
    const uint32_t seen = row_seen(a, row), begin = row_begin(a, row);
    const uint32_t count = seen > first ? least(seen - first, CHUNK) : 0;
    const uint32_t hidden = begin > first ? least(begin - first, CHUNK) : 0;
    const uint32_t from = pages.first * PAGE, to = pages.last * PAGE;
    float *scores = w->scores + (size_t)(row % ROWS) * CHUNK;
    const lanes scale = lanes_set(a->scale);
    lanes most = lanes_set(-INFINITY), sum = lanes_set(0.0f);
    for (uint32_t i = from; i < to; i += LANES) {
        lanes s = lanes_mul(lanes_load(scores + i), scale);
        s = a->cap > 0.0f ? lanes_cap(s, a->cap) : s;
        lanes_store(scores + i, s);
        most = lanes_max(most, seen_only(s, i, hidden, count, -INFINITY));
    }
    const float top = lanes_greatest(most);
    for (uint32_t i = from; i < to; i += PAGE) {
        lanes e[2];
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t at = i + half * LANES;
            e[half] = lanes_exp(lanes_add(lanes_load(scores + at), lanes_set(-top)));
            e[half] = seen_only(e[half], at, hidden, count, 0.0f);
            sum = lanes_add(sum, e[half]);
        }
        _mm512_store_si512(w->weights + (size_t)(i / PAGE) * TILE_BYTES + (size_t)(row % ROWS) * 64,
                           (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
    }
    *ret_sum = lanes_sum(sum);
    return top;
}

/* part = weights × values, of two or four columns of 16. */
INLINE void columns_values(const struct work *w, struct pages pages, uint32_t column,
                           uint32_t count)
{
    const size_t stride = (size_t)w->columns * 16 * sizeof(float);
    float *part = w->part + (size_t)column * 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (uint32_t p = pages.first; p < pages.last; p++) {
        const uint8_t *values = w->values + ((size_t)p * w->columns + column) * TILE_BYTES;
        _tile_loadd(4, w->weights + (size_t)p * TILE_BYTES, 64);
        _tile_loadd(5, values, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, values + TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 6);
        if (count > 2) {
            _tile_loadd(7, values + (size_t)2 * TILE_BYTES, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, values + (size_t)3 * TILE_BYTES, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, part, stride);
    _tile_stored(1, part + 16, stride);
    if (count > 2) {
        _tile_stored(2, part + 32, stride);
        _tile_stored(3, part + 48, stride);
    }
}

static void rows_values(const struct work *w, struct pages pages)
{
    uint32_t column = 0;
    __asm__ volatile("" ::: "memory");
    for (; column + 4 <= w->columns; column += 4) {
        columns_values(w, pages, column, 4);
    }
    if (column < w->columns) {
        columns_values(w, pages, column, 2);
    }
    __asm__ volatile("" ::: "memory");
}

/* One chunk of rows row .. row + 15, as far as they are there and see some of it. */
static void rows_run(const struct work *w, uint32_t first, uint32_t row)
{
    const struct cm_attention *a = w->a;
    const uint32_t last_row = least(row + ROWS, w->rows) - 1, padded = w->columns * 16;
    const uint32_t end = least(row_seen(a, last_row), first + CHUNK);
    const uint32_t begin = row_begin(a, row) > first ? row_begin(a, row) - first : 0;
    const struct pages pages = {begin / PAGE, end > first ? (end - first + PAGE - 1) / PAGE : 0};
    float tops[ROWS], sums[ROWS];
    if (pages.first >= pages.last) {
        return;
    }
    rows_scores(w, w->query + (size_t)(row / ROWS) * w->blocks * TILE_BYTES, pages);
    for (uint32_t r = row; r <= last_row; r++) {
        tops[r - row] = row_weights(w, first, r, pages, &sums[r - row]);
    }
    rows_values(w, pages);
    for (uint32_t r = row; r <= last_row; r++) {
        const float *part = w->part + (size_t)(r - row) * padded;
        float *whole = w->whole + (size_t)r * padded;
        const uint32_t start = row_begin(a, r);
        if (first == start / CHUNK * CHUNK) {
            memcpy(whole, part, padded * sizeof(float));
            w->most[r] = tops[r - row];
            w->total[r] = sums[r - row];
        } else if (row_seen(a, r) > first && first > start) {
            row_merge(&w->most[r], &w->total[r], whole, tops[r - row], sums[r - row], part, padded);
        }
    }
}

void cm_amx_bf16_attend(const struct cm_attention *a)
{
    static const struct tile_config config = {.palette = 1,
                                              .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                              .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    struct work w;
    work_lay(&w, a);
    query_round(&w);
    memset(w.weights, 0, (size_t)CHUNK_PAGES * TILE_BYTES); /* lines of rows that are not there */
    _tile_loadconfig(&config);
    const uint32_t end = row_seen(a, w.rows - 1), begin = row_begin(a, 0);
    for (uint32_t first = begin / CHUNK * CHUNK; first < end; first += CHUNK) {
        chunk_take(&w, first, begin > first ? begin : first, least(first + CHUNK, end));
        for (uint32_t row = 0; row < w.rows; row += ROWS) {
            rows_run(&w, first, row);
        }
    }
    _tile_release();
    for (uint32_t row = 0; row < w.rows; row++) {
        row_out(w.whole + (size_t)row * w.columns * 16, w.total[row], a->head_width,
                a->out + (row / a->group) * a->out_stride +
                    (size_t)(row % a->group) * a->head_width);
    }
}
