/* Inside of the CPU device. Tests of kernels/ may include it. */
#ifndef CASEMATE_KERNELS_CPU_INTERNAL_H
#define CASEMATE_KERNELS_CPU_INTERNAL_H

#include <stdatomic.h>

#include "kernels/device.h"

#define CM_ATTENTION_CHUNK 256u
#define CM_THREADS_MAX     64u
#define CM_GEMM_TOKENS     8u /* tokens that one pass over a weight tile serves */
#define CM_LANES           16u

/* ---------------------------------------------------------------- matrices */

struct cm_matrix { /* a bound weight matrix */
    uint32_t kind;
    uint32_t rows; /* logical */
    uint32_t row_tiles;
    uint32_t blocks;
    const uint8_t *quants;
    const uint8_t *scales;
};

/* Quantised activations of `tokens` rows of `columns` (a multiple of 32). */
struct cm_activations {
    int8_t *q;      /* [tokens][columns] */
    float *scale;   /* [tokens][columns / 32]: d */
    float *sum;     /* [tokens][columns / 32]: s = d * n */
    int32_t *count; /* [tokens][columns / 32]: n */
    uint32_t columns;
    uint32_t tokens;
};

/* y[t][row] for row tiles [first, last); y has stride `stride` floats and holds padded rows. */
typedef void (*cm_gemm)(const struct cm_matrix *matrix, const struct cm_activations *x, float *y,
                        size_t stride, uint32_t first, uint32_t last);

struct cm_path {
    const char *name;
    cm_gemm gemm;
    bool (*available)(void);
};

void cm_gemm_avx2(const struct cm_matrix *matrix, const struct cm_activations *x, float *y,
                  size_t stride, uint32_t first, uint32_t last);
void cm_gemm_avx512vnni(const struct cm_matrix *matrix, const struct cm_activations *x, float *y,
                        size_t stride, uint32_t first, uint32_t last);
/* Plain C: the definition that the others must equal bit by bit. */
void cm_gemm_plain(const struct cm_matrix *matrix, const struct cm_activations *x, float *y,
                   size_t stride, uint32_t first, uint32_t last);

/* ---------------------------------------------------------------- vectors */

void cm_vector_quantise(const float *x, uint32_t columns, int8_t *q, float *scale, float *sum,
                        int32_t *count);
void cm_vector_norm(const float *x, const float *weight, uint32_t size, float epsilon, float *ret);
void cm_vector_gate(const float *gate_up, uint32_t ffn_width, float *ret);
void cm_vector_rope(float *x, const float *cosine, const float *sine, uint32_t rope_width);
void cm_vector_to_half(const float *x, uint16_t *ret, uint32_t size);
float cm_half_float(uint16_t half);
float cm_expf(float x);
/* Row `row` of a matrix as floats (embedding look-up). */
void cm_matrix_row(const struct cm_matrix *matrix, uint32_t row, float *ret, uint32_t columns);

struct cm_attention {
    const float *query; /* [group][head_width] of one KV head */
    uint32_t group;     /* query heads per KV head, <= 16 */
    uint32_t head_width;
    uint32_t positions; /* 0 .. positions-1 are seen */
    const uint32_t *pages;
    const uint8_t *kv; /* base of all pages */
    size_t page_bytes;
    size_t k_offset, v_offset; /* of this layer and KV head within a page */
    float scale;
    float *out; /* [group][head_width] */
};
void cm_attention_run(const struct cm_attention *attention);

/* ---------------------------------------------------------------- threads */

struct cm_pool;
typedef void (*cm_pool_task)(void *context, uint32_t thread, uint32_t threads);
CM_MUST_USE enum cm_status cm_pool_new(uint32_t threads, struct cm_pool **ret_pool,
                                       struct cm_error *err);
void cm_pool_free(struct cm_pool *pool);
/* Every thread (the caller is number 0) runs task once; returns when all have. */
void cm_pool_run(struct cm_pool *pool, cm_pool_task task, void *context);
uint32_t cm_pool_threads(const struct cm_pool *pool);
/* From affinity and the cgroup's CPU quota. */
uint32_t cm_threads_available(void);

/* ---------------------------------------------------------------- slots and sampling */

#define CM_SLOT_HELD_MAX (CM_STOP_BYTES_MAX + 1024u + 8u)

struct cm_slot {
    bool open;
    struct cm_sampling sampling;
    uint32_t max_tokens, min_tokens;
    bool ignore_eos;
    uint32_t stop_count;
    uint32_t stop_bytes[CM_STOPS_MAX];
    uint8_t stops[CM_STOPS_MAX][CM_STOP_BYTES_MAX];
    uint32_t drawn; /* completion tokens so far */
    uint32_t held_bytes;
    uint8_t held[CM_SLOT_HELD_MAX];
    uint16_t *generated; /* [vocabulary] times drawn */
    uint8_t *seen;       /* [vocabulary] in prompt or reply */
};

/* Add a token's bytes; released UTF-8 goes to ret_text (room CM_STEP_BYTES_MAX). True: a stop
 * string was completed. `last`: release all that is held. */
bool cm_slot_release(struct cm_slot *slot, const uint8_t *bytes, uint32_t size, bool last,
                     uint8_t *ret_text, uint32_t *ret_bytes);

struct cm_candidate {
    float weight; /* unnormalised probability */
    uint32_t token;
};

/* Choose the next token. logits [vocabulary] are changed in place; scratch [vocabulary]. */
uint32_t cm_sample(const struct cm_slot *slot, float *logits, uint32_t vocabulary,
                   const uint32_t *masked, uint32_t masked_count, struct cm_candidate *scratch);
void cm_philox(uint64_t seed, uint64_t counter, uint32_t ret[4]);

/* ---------------------------------------------------------------- the device */

struct cm_bound_layer {
    const float *attention_norm, *ffn_norm;
    struct cm_matrix qkv, attention_out, gate_up, down;
};

struct cm_scratch {   /* of one step; pointers into the arena */
    float *x;         /* [step_tokens][width] residual */
    float *normed;    /* [step_tokens][widest] */
    float *wide;      /* [step_tokens][widest padded rows] */
    float *attention; /* [step_tokens][heads * head_width] */
    struct cm_activations act;
    float *last;                     /* [entries][width] rows that get logits */
    float *logits;                   /* [slots][padded vocabulary] */
    struct cm_candidate *candidates; /* [threads][vocabulary] */
};

struct cm_step_token { /* one token of the mixed batch */
    uint32_t entry;
    uint32_t token;
    uint32_t position;
};

struct cm_device {
    const struct cm_path *path;
    struct cm_pool *pool;
    struct cm_device_reserve limits;
    struct cm_model model; /* shapes; pointers are our own copies after bind */
    bool reserved, loaded, bound, poisoned;
    bool arena_locked;
    uint8_t *arena;
    uint64_t arena_bytes;
    uint8_t *payload;
    uint64_t segment_count;
    uint32_t opening;      /* segments being opened at this moment, by several threads */
    uint8_t *segment_seen; /* [segment_count] */
    uint8_t *kv;
    size_t page_bytes;
    struct cm_slot *slots;
    struct cm_scratch scratch;
    float *cosine, *sine; /* [context_max][rope_width / 2] */
    struct cm_bound_layer *layers;
    struct cm_matrix embedding, head;
    const float *out_norm;
    uint8_t *tables; /* copies of the token tables */
    /* the step in flight */
    struct cm_step_entry entries[CM_STEP_ENTRIES_MAX];
    struct cm_step_result *results; /* [CM_STEP_ENTRIES_MAX] */
    uint32_t entry_count;
    struct cm_step_token *tokens; /* [step_tokens_max] */
    uint32_t token_count;
    bool step_pending;
    float *probe; /* tests: logits of every token, [step_tokens][vocabulary]; NULL: off */
    struct cm_device_stats stats;
};

/* forward.c: run the step that device->entries and device->tokens describe. */
void cm_forward(struct cm_device *device);
/* Padded rows of a matrix: what y's stride must hold. */
static inline uint32_t cm_padded(uint32_t value, uint32_t to)
{
    return (value + to - 1) / to * to;
}

#endif
