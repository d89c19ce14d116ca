/* What both classes' attention share: which positions a row (query head of a token) sees, and how
 * its chunks are joined. For files that are compiled for a path. */
#ifndef CASEMATE_KERNELS_CPU_ATTENTION_ROWS_H
#define CASEMATE_KERNELS_CPU_ATTENTION_ROWS_H

#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/lanes.h"

/* Positions that a row sees end here: rows are [token][group]. */
static inline uint32_t row_seen(const struct cm_attention *a, uint32_t row)
{
    return a->position + row / a->group + 1;
}

/* The first of them. */
static inline uint32_t row_begin(const struct cm_attention *a, uint32_t row)
{
    uint32_t window = a->window, end = row_seen(a, row);
    return window != 0 && end > window ? end - window : 0;
}

static inline const float *row_query(const struct cm_attention *a, uint32_t row)
{
    return a->query + (row / a->group) * a->query_stride + (size_t)(row % a->group) * a->head_width;
}

/* K or V of the page of a position. */
static inline const uint8_t *position_page(const struct cm_attention *a, uint32_t position,
                                           size_t offset)
{
    return a->kv + (size_t)a->pages[position / CM_KV_PAGE_POSITIONS] * a->page_bytes + offset;
}

/* (M, L, O) of one row, joined with a later chunk's (m, l, o). */
static inline void row_merge(float *most, float *total, float *whole, float top, float sum,
                             const float *part, uint32_t size)
{
    float both = top > *most ? top : *most;
    float old = cm_expf(*most - both), new = cm_expf(top - both);
    *total = fmaf(*total, old, sum * new);
    *most = both;
    for (uint32_t i = 0; i < size; i += LANES) {
        lanes_store(whole + i, lanes_fma(lanes_load(whole + i), lanes_set(old),
                                         lanes_mul(lanes_load(part + i), lanes_set(new))));
    }
}

static inline void row_out(const float *whole, float total, uint32_t width, float *out)
{
    float last[LANES];
    uint32_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        lanes_store(out + i, lanes_div(lanes_load(whole + i), lanes_set(total)));
    }
    if (i < width) {
        lanes_store(last, lanes_div(lanes_load(whole + i), lanes_set(total)));
        memcpy(out + i, last, (width - i) * sizeof(float));
    }
}

#endif
