/* Inside of the CPU device. Tests of kernels/ may include it. */
#ifndef CASEMATE_KERNELS_CPU_INTERNAL_H
#define CASEMATE_KERNELS_CPU_INTERNAL_H

#include <stdatomic.h>

#include "kernels/device.h"
#include "kernels/guard/classify.h"
#include "kernels/guard/guard.h"

#define CM_ATTENTION_CHUNK  256u
#define CM_ATTENTION_ROWS   48u /* query rows (tokens × group) that share loads of K and V */
#define CM_PROMPT_ROWS      96u /* the same in class P, where K and V are converted for them */
#define CM_THREADS_MAX      64u
#define CM_GELU_SCALE       0x1.988454p+0f /* 2 sqrt(2 / pi) */
#define CM_PANEL            16u            /* tokens whose activations lie together */
#define CM_BLOCK_TOKENS     128u           /* tokens of one work item of a matrix product */
#define CM_PROMPT_TOKENS    512u           /* the same in class P, where unpacking weighs more */
#define CM_LOW_RANK_COLUMNS 256u           /* of an adapter's A that one work item takes */
#define CM_LOW_RANK_TOKENS  16u            /* the most of them that it serves */
#define CM_FETCH_BLOCKS     16u            /* read ahead of a product while its input is made */
#define CM_TAKES            4u /* pieces in which a thread takes its own share of a phase */

/* Padded rows of a matrix, columns of a vector. */
static inline uint32_t cm_padded(uint32_t value, uint32_t to)
{
    return (value + to - 1) / to * to;
}

/* ---------------------------------------------------------------- matrices */

struct cm_matrix { /* a bound weight matrix */
    uint32_t kind;
    uint32_t rows; /* logical */
    uint32_t row_tiles;
    uint32_t blocks;
    const uint8_t *quants;
    const uint8_t *scales;
};

/* Activations of `tokens` rows of `columns` (a multiple of 32), quantised; or, for bf16 matrices,
 * as they are; or, in class P, rounded to bf16. Tokens lie in panels of 16 (the last one may be
 * narrower); within a panel: [block][token], so that a block's activations of all tokens of a panel
 * are one piece. */
struct cm_activations {
    uint16_t *rounded; /* [panel][block][token of the panel][32]; NULL: not of class P */
    float *x;          /* the same; NULL: quantised */
    int8_t *q;         /* the same */
    float *scale;      /* [panel][block][token of the panel]: d */
    float *sum;        /* s = d * n */
    int32_t *count;    /* n */
    uint32_t columns;
    uint32_t tokens;
};

/* Index of (token, block) in scale, sum and count, and in q in units of 32. */
static inline size_t cm_activation_at(const struct cm_activations *x, uint32_t token,
                                      uint32_t block)
{
    uint32_t first = token / CM_PANEL * CM_PANEL;
    uint32_t width = x->tokens - first < CM_PANEL ? x->tokens - first : CM_PANEL;
    return (size_t)first * (x->columns / CM_TILE_COLUMNS) + (size_t)block * width + token - first;
}

/* What a matrix multiplies in a step: tokens of class D first, then those of class P. */
enum cm_class { CM_CLASS_D, CM_CLASS_P, CM_CLASSES };
struct cm_inputs {
    struct cm_activations of[CM_CLASSES]; /* of the same columns */
};

/* Part of a product: tokens [token_first, token_last), the first a multiple of 16, the last one too
 * or the end; row tiles [tile_first, tile_last). */
struct cm_span {
    uint32_t token_first, token_last, tile_first, tile_last;
};

/* y[token - token_first][row - 16 * tile_first], rows of y `stride` floats apart. */
typedef void (*cm_gemm)(const struct cm_matrix *matrix, const struct cm_activations *x,
                        struct cm_span span, float *y, size_t stride);

/* The kinds of quants: a path has a product for each. */
#define CM_QUANT_KINDS(X)                                                                          \
    X(CM_TENSOR_U4A) X(CM_TENSOR_U4S) X(CM_TENSOR_U5A) X(CM_TENSOR_U5S) X(CM_TENSOR_U8S)

/* Each count of tokens up to 4, up to a panel: a product unrolls for a count that is constant. */
#define CM_COUNTS_4(X) X(1) X(2) X(3) X(4)
#define CM_COUNTS_16(X)                                                                            \
    CM_COUNTS_4(X) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16)

/* Row `row` of a matrix as floats (embedding look-up). */
void cm_matrix_row(const struct cm_matrix *matrix, uint32_t row, float *ret, uint32_t columns);

/* ---------------------------------------------------------------- vectors and attention */

/* A KV head's K or V of one page. Kept as fp16: K [head_width][32 positions], V [32 positions]
 * [head_width]. As int8, in blocks of 32 of the width: quants, K [blocks][8][32 positions][4], V
 * [blocks][8][32 of the width][4 positions], and behind them fp16 scales [blocks][32 positions]. */
static inline uint32_t cm_kv_blocks(uint32_t head_width)
{
    return (head_width + CM_TILE_COLUMNS - 1) / CM_TILE_COLUMNS;
}
static inline size_t cm_kv_scales_offset(uint32_t head_width)
{
    return (size_t)cm_kv_blocks(head_width) * CM_TILE_COLUMNS * CM_KV_PAGE_POSITIONS;
}
static inline size_t cm_kv_head_bytes(enum cm_kv_kind kind, uint32_t head_width)
{
    const size_t scales = sizeof(uint16_t) * cm_kv_blocks(head_width) * CM_KV_PAGE_POSITIONS;
    return kind == CM_KV_INT8 ? cm_kv_scales_offset(head_width) + scales
                              : sizeof(uint16_t) * CM_KV_PAGE_POSITIONS * head_width;
}

/* One KV head. Token i of `tokens` stands at position + i and sees positions 0 .. position + i, or
 * the last `window` of them. */
struct cm_attention {
    const float *query; /* [tokens][query_stride]: [group][head_width] each */
    size_t query_stride;
    uint32_t tokens;
    uint32_t group; /* query heads per KV head */
    uint32_t head_width;
    uint32_t position;
    const uint32_t *pages;
    const uint8_t *kv; /* base of all pages */
    size_t page_bytes;
    enum cm_kv_kind kv_kind;
    size_t k_offset; /* in a page: K of this layer and head */
    size_t v_offset; /* V */
    float scale;
    float cap;       /* of scores; 0: none */
    uint32_t window; /* 0: none */
    float *out;      /* [tokens][out_stride]: [group][head_width] each */
    size_t out_stride;
    float *scratch; /* cm_attention_floats(tokens * group, head_width) */
};

static inline size_t cm_attention_floats(uint32_t rows, uint32_t head_width)
{
    size_t padded = cm_padded(head_width, 16);
    size_t blocks = cm_kv_blocks(head_width); /* int8: of a query 8 floats' space, scale and sum */
    return rows * (CM_ATTENTION_CHUNK + 2 * padded + 4 + blocks * 10) +
           padded * CM_KV_PAGE_POSITIONS;
}

/* Of class P: cm_amx_bf16_attend. */
static inline size_t cm_prompt_attention_floats(uint32_t rows, uint32_t head_width)
{
    const size_t padded = cm_padded(head_width, 32), whole = cm_padded(rows, 16);
    return whole * (padded / 2 + padded + 2) + 2 * CM_ATTENTION_CHUNK / 2 * padded +
           CM_ATTENTION_CHUNK / 2 * 16 + 16 * (CM_ATTENTION_CHUNK + padded);
}

/* One chunk's result for one token: [group][16 + padded head width]: greatest, sum, values. */
static inline size_t cm_partial_floats(uint32_t group, uint32_t head_width)
{
    return (size_t)group * (16 + cm_padded(head_width, 16));
}

/* What differs from one kind of CPU to another: same arithmetic, other instructions. */
struct cm_path {
    const char *name;
    bool (*available)(void);
    cm_gemm gemm;
    /* Blocks [block_first, block_first + count) of a token; x is the first block's. */
    void (*quantise)(const float *x, const struct cm_activations *act, uint32_t token,
                     uint32_t block_first, uint32_t count);
    void (*norm)(const float *x, const float *weight, uint32_t size, float epsilon, float *ret);
    /* activation(gate) × up; they alternate by 16. size: a multiple of 16, of ret. */
    void (*gate)(const float *gate_up, uint32_t size, uint32_t activation, float *ret);
    void (*rope)(float *x, const float *cosine, const float *sine, uint32_t rope_width);
    void (*add)(float *x, const float *y, uint32_t size); /* a multiple of 16 */
    void (*cap)(float *x, uint32_t size, float cap);      /* a multiple of 16 */
    void (*key_put)(enum cm_kv_kind kind, const float *key, uint32_t head_width, uint8_t *page,
                    uint32_t position);
    void (*value_put)(enum cm_kv_kind kind, const float *value, uint32_t head_width, uint8_t *page,
                      uint32_t position);
    void (*attend)(const struct cm_attention *attention);
    /* One token in pieces: each chunk's partial, then all of them in order. */
    void (*attend_chunk)(const struct cm_attention *attention, uint32_t chunk, float *partial);
    void (*attend_merge)(const struct cm_attention *attention, uint32_t chunks, float *partials);
    uint32_t (*greatest)(const float *x, uint32_t size); /* index; the lowest of equals */
    /* Adapters. 16 rows of A, of which `tile` is the part from column 32 * block on, times these
     * blocks (at most CM_LOW_RANK_COLUMNS) of the tokens; ret[token][16], `stride` floats apart. */
    void (*shrink)(const uint16_t *tile, const struct cm_activations *x, uint32_t token,
                   uint32_t tokens, uint32_t block, uint32_t blocks, float *ret, size_t stride);
    /* y[16] += B's rows times u[rank], for `tiles` row tiles; y moves on by `step`. */
    void (*expand)(const uint16_t *tile, uint32_t rank, uint32_t tiles, const float *u, float *y,
                   size_t step);
};

#define CM_PATH_DECLARE(path)                                                                      \
    void cm_##path##_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,          \
                          struct cm_span span, float *y, size_t stride);                           \
    void cm_##path##_bfloat_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,   \
                                 struct cm_span span, float *y, size_t stride);                    \
    void cm_##path##_quantise(const float *x, const struct cm_activations *act, uint32_t token,    \
                              uint32_t block_first, uint32_t count);                               \
    void cm_##path##_norm(const float *x, const float *weight, uint32_t size, float epsilon,       \
                          float *ret);                                                             \
    void cm_##path##_gate(const float *gate_up, uint32_t size, uint32_t activation, float *ret);   \
    void cm_##path##_rope(float *x, const float *cosine, const float *sine, uint32_t rope_width);  \
    void cm_##path##_add(float *x, const float *y, uint32_t size);                                 \
    void cm_##path##_cap(float *x, uint32_t size, float cap);                                      \
    void cm_##path##_key_put(enum cm_kv_kind kind, const float *key, uint32_t head_width,          \
                             uint8_t *page, uint32_t position);                                    \
    void cm_##path##_value_put(enum cm_kv_kind kind, const float *value, uint32_t head_width,      \
                               uint8_t *page, uint32_t position);                                  \
    void cm_##path##_attend(const struct cm_attention *attention);                                 \
    void cm_##path##_attend_chunk(const struct cm_attention *attention, uint32_t chunk,            \
                                  float *partial);                                                 \
    void cm_##path##_attend_merge(const struct cm_attention *attention, uint32_t chunks,           \
                                  float *partials);                                                \
    void cm_##path##_shrink(const uint16_t *tile, const struct cm_activations *x, uint32_t token,  \
                            uint32_t tokens, uint32_t block, uint32_t blocks, float *ret,          \
                            size_t stride);                                                        \
    void cm_##path##_expand(const uint16_t *tile, uint32_t rank, uint32_t tiles, const float *u,   \
                            float *y, size_t step);                                                \
    uint32_t cm_##path##_greatest(const float *x, uint32_t size)

CM_PATH_DECLARE(avx2);
CM_PATH_DECLARE(avx512vnni);
void cm_amx_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                 struct cm_span span, float *y, size_t stride);

/* Class P of kernels/NUMERICS.md: prompts through bf16 tiles. */
struct cm_prompt_path {
    const char *name;
    bool (*available)(void);
    cm_gemm gemm; /* of activations that are rounded */
    /* Blocks [block_first, block_first + count) of a token; x is the first block's. */
    void (*round)(const float *x, const struct cm_activations *act, uint32_t token,
                  uint32_t block_first, uint32_t count);
    void (*attend)(const struct cm_attention *attention);
};
void cm_amx_bf16_attend(const struct cm_attention *attention);
void cm_amx_bf16_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                      struct cm_span span, float *y, size_t stride);
void cm_amx_bf16_round(const float *x, const struct cm_activations *act, uint32_t token,
                       uint32_t block_first, uint32_t count);

/* path.c: the best path that this CPU has, or the one of that name; NULL: there is none. */
const struct cm_path *cm_path_choose(const char *name);
/* Class P, NULL where this CPU or this kernel has none. */
const struct cm_prompt_path *cm_prompt_path_choose(void);

/* plain.c: the definitions, which the paths must equal bit by bit. */
float cm_half_float(uint16_t half);
uint16_t cm_half_of(float x);
float cm_expf(float x);
float cm_capf(float x, float cap); /* cap * tanh(x / cap) */
void cm_plain_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                   struct cm_span span, float *y, size_t stride);
/* Attention by a class's own score of a position, and sum of the values of [first, last), whose
 * chunk begins at `chunk`, by weights[position - chunk]. */
struct cm_plain_attention {
    float (*score)(const struct cm_attention *a, const float *query, uint32_t position);
    void (*values)(const struct cm_attention *a, const float *weights, uint32_t chunk,
                   uint32_t first, uint32_t last, float *ret);
};
void cm_plain_attend_by(const struct cm_plain_attention *by, const struct cm_attention *attention);
/* K or V of the page of a position. */
const uint8_t *cm_plain_page(const struct cm_attention *a, uint32_t position, size_t offset);
void cm_plain_attend(const struct cm_attention *attention);
void cm_plain_shrink(const uint16_t *tile, const struct cm_activations *x, uint32_t token,
                     uint32_t tokens, uint32_t block, uint32_t blocks, float *ret, size_t stride);
void cm_plain_expand(const uint16_t *tile, uint32_t rank, uint32_t tiles, const float *u, float *y,
                     size_t step);

/* plain_bf16.c: those of class P. */
#define CM_PLAIN_COLUMNS_MAX 2048u
uint16_t cm_bfloat_of(float x);
float cm_bfloat_float(uint16_t bfloat);
void cm_plain_bf16_attend(const struct cm_attention *attention);
void cm_plain_bf16_gemm(const struct cm_matrix *matrix, const struct cm_activations *x,
                        struct cm_span span, float *y, size_t stride);

/* ---------------------------------------------------------------- threads */

struct cm_pool;
struct cm_worker { /* one thread in a program */
    _Alignas(64) struct cm_pool *pool;
    uint32_t index;
    uint32_t phase; /* phases passed */
    uint32_t count; /* units of this phase */
    uint32_t taken; /* by this thread */
    uint32_t victim;
    _Atomic int core; /* that it computes on; -1: none */
};
typedef void (*cm_pool_program)(void *context, struct cm_worker *worker);
CM_MUST_USE enum cm_status cm_pool_new(uint32_t threads, struct cm_pool **ret_pool,
                                       struct cm_error *err);
void cm_pool_free(struct cm_pool *pool);
/* The caller (number 0) and the other threads run the program once; returns when all have. A thread
 * that comes late may take no part in it, and one that keeps coming late is left out for a while,
 * so work is shared by phase and take alone, never by a count of threads. */
void cm_pool_run(struct cm_pool *pool, cm_pool_program program, void *context);
/* In a program. All threads come through the same phases: phase(count), take until false, barrier.
 * Each unit 0 .. count-1 is taken once, and none of the next phase's before all are finished. What
 * phases write may be read or written after a take, and nowhere else: a thread that has taken
 * nothing may be far behind. The barrier is needed even after the last phase. */
void cm_pool_phase(struct cm_worker *worker, uint32_t count);
bool cm_pool_take(struct cm_worker *worker, uint32_t *ret_first, uint32_t *ret_last);
void cm_pool_barrier(struct cm_worker *worker);
uint32_t cm_pool_threads(const struct cm_pool *pool); /* the most that a program gets */
/* From affinity and the cgroup's CPU quota. */
uint32_t cm_threads_available(void);

/* ---------------------------------------------------------------- slots and sampling */

#define CM_SLOT_HELD_MAX (CM_STOP_BYTES_MAX + 1024u + 8u)

struct cm_slot {
    bool open;
    struct cm_sampling sampling;
    uint32_t max_tokens, min_tokens;
    bool ignore_eos;
    uint32_t adapter; /* region, or CM_ADAPTER_NONE */
    uint32_t stop_count;
    uint32_t stop_bytes[CM_STOPS_MAX];
    uint8_t stops[CM_STOPS_MAX][CM_STOP_BYTES_MAX];
    uint32_t drawn; /* completion tokens so far */
    uint32_t held_bytes;
    uint8_t held[CM_SLOT_HELD_MAX]; /* may become a stop string */
    uint32_t rest_bytes;
    uint8_t rest[3]; /* the beginning of a character */
    struct cm_guard_state guard;
    uint16_t *generated; /* [vocabulary] times drawn */
    uint8_t *seen;       /* [vocabulary] in prompt or reply */
};

enum cm_slot_end {
    CM_SLOT_GOES_ON = 0,
    CM_SLOT_TEXT_END, /* the model ended its text */
    CM_SLOT_CUT,      /* max_tokens */
};

/* Add a token's bytes; released UTF-8 goes to ret_text (room CM_STEP_BYTES_MAX). guard NULL: none.
 * STOP: a stop string was completed; FILTER: a refuse rule ended the reply; else NONE. At an end,
 * and after these two, nothing is held any more. */
enum cm_finish cm_slot_release(const struct cm_guard_pack *guard, struct cm_slot *slot,
                               const uint8_t *bytes, uint32_t size, enum cm_slot_end end,
                               uint8_t *ret_text, uint32_t *ret_bytes);

struct cm_candidate {
    float weight; /* unnormalised probability */
    uint32_t token;
};

/* Choose the next token. logits [vocabulary] are changed in place; scratch [vocabulary]. */
uint32_t cm_sample(const struct cm_slot *slot, const struct cm_path *path, float *logits,
                   uint32_t vocabulary, const uint32_t *masked, uint32_t masked_count,
                   struct cm_candidate *scratch);
void cm_philox(uint64_t seed, uint64_t counter, uint32_t ret[4]);

/* ---------------------------------------------------------------- the device */

struct cm_bound_layer {
    const float *attention_norm, *ffn_norm;
    const float *qkv_bias, *q_norm, *k_norm;          /* NULL: the decoder has none */
    const float *post_attention_norm, *post_ffn_norm; /* the same */
    uint32_t window;                                  /* 0: none */
    const float *cosine, *sine;                       /* [context_max][rope_width / 2] */
    struct cm_matrix qkv, attention_out, gate_up, down;
};

struct cm_low_rank { /* of one target in one layer; NULL: it is as it was */
    const uint16_t *a, *b;
};

struct cm_adapter_region {
    uint8_t *payload;      /* [limits.adapter_bytes] */
    uint8_t *segment_seen; /* [segments that a region can have] */
    struct cm_low_rank (*layers)[CM_TARGET_COUNT];
    uint64_t bytes; /* that came so far */
    bool failed, bound;
    uint32_t rank;
    float scale;
};

struct cm_low_rank_run { /* tokens of a step, side by side, with one adapter */
    uint32_t token, tokens;
    const struct cm_adapter_region *adapter;
};

struct cm_thread_scratch {           /* of one thread */
    float *row;                      /* [widest] */
    float *y;                        /* [CM_BLOCK_TOKENS][rows of a unit] */
    float *attention;                /* cm_attention_floats */
    struct cm_activations act;       /* of one token */
    struct cm_candidate *candidates; /* [vocabulary] */
};

struct cm_scratch {            /* of one step; pointers into the arena */
    float *x;                  /* [step_tokens][width] residual */
    float *query;              /* [step_tokens][heads * head_width] */
    float *attention;          /* [step_tokens][heads * head_width] */
    float *result;             /* [step_tokens][width] before its norm; decoders with post_norms */
    float *partials;           /* [CM_SPLITS * threads][chunks of a context] of cm_partial_floats */
    struct cm_activations act; /* [step_tokens][widest input] */
    struct cm_activations hidden; /* [step_tokens][ffn_width] */
    float *logits;                /* [slots][padded vocabulary] */
    float *low;                   /* adapters: [step_tokens][low_floats], parts of A x */
    struct cm_low_rank_run *runs; /* [step_tokens] */
    struct cm_thread_scratch *threads;
};

/* One KV head's attention of some tokens of a sequence: all of it, or one chunk of one token. */
struct cm_attention_item {
    uint32_t entry;
    uint32_t token; /* index in the step */
    uint32_t tokens;
    uint32_t chunk;   /* CM_CHUNKS_ALL, or the chunk */
    uint32_t partial; /* of the first chunk of this token; a multiple of the chunks of a context */
};
#define CM_CHUNKS_ALL UINT32_MAX
#define CM_SPLITS     4u /* sequences × KV heads per thread, below which positions are split */

struct cm_step_token { /* one token of the mixed batch */
    uint32_t entry;
    uint32_t token;
    uint32_t position;
    const struct cm_adapter_region *adapter; /* NULL: none */
};

struct cm_device {
    const struct cm_path *path;
    const struct cm_prompt_path *prompts; /* class P; NULL: prompts are of class D too */
    struct cm_pool *pool;
    struct cm_device_reserve limits;
    struct cm_model model; /* shapes; pointers are our own copies after bind */
    bool reserved, loaded, bound, poisoned;
    bool bfloats; /* reserved for a model with bf16 matrices */
    bool arena_locked;
    uint8_t *arena;
    uint64_t arena_bytes;
    uint64_t arena_populated; /* from its start on; all of it once reserved */
    uint8_t *payload;
    uint64_t segment_count;
    uint32_t opening;      /* segments being opened at this moment, by several threads */
    uint8_t *segment_seen; /* [segment_count] */
    uint8_t *kv;
    size_t page_bytes;
    struct cm_slot *slots;
    struct cm_scratch scratch;
    float *cosine, *sine;               /* [context_max][rope_width / 2] */
    float *window_cosine, *window_sine; /* of layers with a window; NULL: the same */
    struct cm_bound_layer *layers;
    struct cm_adapter_region regions[CM_ADAPTER_REGIONS_MAX];
    struct cm_matrix embedding, head;
    const float *out_norm;
    uint8_t *tables;             /* copies of the token tables */
    struct cm_guard_pack *guard; /* NULL: nothing is filtered */
    struct cm_classifier *classifier;
    struct cm_findings findings;
    /* the step in flight */
    struct cm_step_entry entries[CM_STEP_ENTRIES_MAX];
    struct cm_step_result *results; /* [CM_STEP_ENTRIES_MAX] */
    uint32_t entry_count;
    uint32_t entry_token[CM_STEP_ENTRIES_MAX]; /* the first one's place in tokens */
    struct cm_step_token *tokens;              /* [step_tokens_max] class D, then class P */
    uint32_t token_count;
    uint32_t exact_count;            /* of class D */
    struct cm_attention_item *items; /* [step_tokens_max + chunks that are split] */
    uint32_t item_count;
    uint32_t run_count;                         /* of tokens with an adapter */
    uint32_t rank_tiles;                        /* the most of them */
    uint32_t low_floats;                        /* of one token */
    uint32_t splits;                            /* tokens whose chunks are items of their own */
    uint32_t chunks_max;                        /* of a context */
    uint32_t wanted[CM_STEP_ENTRIES_MAX];       /* entries that get a token */
    uint32_t wanted_token[CM_STEP_ENTRIES_MAX]; /* their last token in the step */
    uint32_t wanted_count;
    bool step_pending;
    float *probe; /* tests: logits of every token, [step_tokens][vocabulary]; NULL: off */
    struct cm_device_stats stats;
};

/* bind.c: is none of `count` halves NaN or infinite? */
bool cm_halves_finite(const uint8_t *halves, uint64_t count);

/* adapter.c: the region of that number, NULL if it does not exist. */
struct cm_adapter_region *cm_adapter_region_of(struct cm_device *device, uint32_t region);

/* Row tiles of A, and the work items that one of them is cut into. */
static inline uint32_t cm_rank_tiles(uint32_t rank)
{
    return (rank + CM_TILE_ROWS - 1) / CM_TILE_ROWS;
}
static inline uint32_t cm_low_rank_chunks(uint32_t columns)
{
    return (columns + CM_LOW_RANK_COLUMNS - 1) / CM_LOW_RANK_COLUMNS;
}

/* low_rank_step.c: which tokens have an adapter; A x of a site's targets, in so many work items (0:
 * no adapter is there); what B adds to a part of a product. */
enum cm_site { CM_SITE_QKV, CM_SITE_OUT, CM_SITE_GATE_UP, CM_SITE_DOWN };
void cm_low_rank_plan(struct cm_device *device);
uint32_t cm_low_rank_items(const struct cm_device *device, uint32_t layer, enum cm_site site,
                           const struct cm_inputs *inputs);
void cm_low_rank_shrink(const struct cm_device *device, uint32_t layer, enum cm_site site,
                        const struct cm_inputs *inputs, uint32_t item);
void cm_low_rank_expand(const struct cm_device *device, uint32_t layer, enum cm_site site,
                        struct cm_span span, float *y, size_t stride);

/* The class in which an entry's tokens are computed. */
static inline enum cm_class cm_entry_class(const struct cm_device *device,
                                           const struct cm_step_entry *entry)
{
    return device->prompts != NULL && entry->prompt ? CM_CLASS_P : CM_CLASS_D;
}

/* forward.c: run the step that device->entries and device->tokens describe. */
void cm_forward(struct cm_device *device);

/* Heads that one work item of the QKV product covers: whole heads and whole tiles. */
static inline uint32_t cm_heads_per_unit(uint32_t head_width)
{
    uint32_t heads = 1;
    while (heads * head_width % CM_TILE_ROWS != 0) {
        heads *= 2;
    }
    return heads;
}

#endif
