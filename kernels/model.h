/* The model as the device sees it: shapes, and where each tensor lies in the payload.
 *
 * Plain data, filled from a package's manifest by the worker. One decoder serves every family by
 * parameters (design section 6). Weights lie in compute layout (loader/package/FORMAT.md): tiles of
 * 16 rows × 32 columns, a quant plane, then a scale plane. */
#ifndef CASEMATE_KERNELS_MODEL_H
#define CASEMATE_KERNELS_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#define CM_LAYERS_MAX        256u
#define CM_VOCABULARY_MAX    (1u << 20)
#define CM_END_TOKENS_MAX    8u
#define CM_TENSOR_NAME_BYTES 64u

#define CM_TILE_ROWS    16u
#define CM_TILE_COLUMNS 32u
#define CM_ROWS_PAD     32u
#define CM_COLUMNS_PAD  32u
#define CM_TENSOR_ALIGN 4096u

#define CM_ADAPTER_REGIONS_MAX 8u
#define CM_ADAPTER_NONE        0u /* regions of adapters are numbered from 1 */
#define CM_ADAPTER_RANK_MAX    64u

/* Stored kinds; the numbers are part of the package format. */
enum cm_tensor_kind {
    CM_TENSOR_NONE = 0,
    CM_TENSOR_F32 = 1,  /* plain vector [rows], little-endian, cols = 1 (norms) */
    CM_TENSOR_U4A = 2,  /* u4 affine: w = d*q + m, q 0..15; fp16 d[16], m[16] per tile */
    CM_TENSOR_U4S = 3,  /* u4 symmetric: w = d*(q-8); fp16 d[16] per tile */
    CM_TENSOR_U8S = 4,  /* u8 symmetric: w = d*(q-128); fp16 d[16] per tile */
    CM_TENSOR_BF16 = 5, /* bf16: pairs of columns [16][16][2] per tile, no scale plane */
    CM_TENSOR_F16 = 6,  /* fp16 [row tile][columns][16 rows], no scale plane (adapters) */
    CM_TENSOR_U5A = 7,  /* u5 affine: w = d*q + m, q 0..31; fp16 d[16], m[16] per tile */
    CM_TENSOR_U5S = 8,  /* u5 symmetric: w = d*(q-16); fp16 d[16] per tile */
    CM_TENSOR_KIND_COUNT
};

/* A tile of a matrix kind: w = d * (q - zero), or d * q + m. */
struct cm_tile_shape {
    uint32_t quant_bytes, scale_bytes;
    uint32_t bits; /* of a quant; 16: bf16 */
    int32_t zero;
    bool affine; /* has m */
};

/* quant_bytes 0: the kind's tensors are not made of tiles. Inline, so that a constant kind folds.
 */
static inline struct cm_tile_shape cm_tile_shape(uint32_t kind)
{
    static const struct cm_tile_shape shapes[CM_TENSOR_KIND_COUNT] = {
        [CM_TENSOR_U4A] = {256, 64, 4, 0, true},    [CM_TENSOR_U4S] = {256, 32, 4, 8, false},
        [CM_TENSOR_U8S] = {512, 32, 8, 128, false}, [CM_TENSOR_BF16] = {1024, 0, 16, 0, false},
        [CM_TENSOR_U5A] = {320, 64, 5, 0, true},    [CM_TENSOR_U5S] = {320, 32, 5, 16, false},
    };
    return kind < CM_TENSOR_KIND_COUNT ? shapes[kind] : shapes[CM_TENSOR_NONE];
}

struct cm_tensor {
    char name[CM_TENSOR_NAME_BYTES]; /* terminated; for errors and `inspect` */
    uint32_t kind;                   /* enum cm_tensor_kind; NONE: absent */
    uint32_t rows;                   /* logical; stored padded to CM_ROWS_PAD with zero rows */
    uint32_t columns;                /* logical; stored padded to CM_COLUMNS_PAD */
    uint32_t reserved;
    uint64_t offset;       /* of the quant plane (or the vector) in the payload, 4 KiB-aligned */
    uint64_t scale_offset; /* of the scale plane; 0 where the kind has none */
    uint64_t bytes;        /* from offset to the end of the last plane */
};

enum cm_tensor_role { /* of one layer; numbers are part of the package format */
                      CM_LAYER_ATTENTION_NORM = 0, /* F32 [width] */
                      CM_LAYER_QKV =
                          1, /* [(heads + 2*kv_heads) * head_width, width]; Q, K, V rows in turn */
                      CM_LAYER_ATTENTION_OUT = 2, /* [width, heads * head_width] */
                      CM_LAYER_FFN_NORM = 3,      /* F32 [width] */
                      CM_LAYER_GATE_UP =
                          4, /* [2 * ffn_width, width]; gate and up alternate by row tile of 16 */
                      CM_LAYER_DOWN = 5, /* [width, ffn_width] */
                      /* NONE unless the decoder has them; F32 */
                      CM_LAYER_QKV_BIAS = 6,            /* [rows of QKV] */
                      CM_LAYER_Q_NORM = 7,              /* [head_width] */
                      CM_LAYER_K_NORM = 8,              /* [head_width] */
                      CM_LAYER_POST_ATTENTION_NORM = 9, /* [width] */
                      CM_LAYER_POST_FFN_NORM = 10,      /* [width] */
                      CM_LAYER_ROLE_COUNT
};

struct cm_layer {
    struct cm_tensor tensors[CM_LAYER_ROLE_COUNT];
};

enum cm_activation { CM_ACTIVATION_SILU = 0, CM_ACTIVATION_GELU = 1 /* by tanh */ };

/* What sets a decoder apart from llama's; all zero is llama's. */
struct cm_decoder {
    uint32_t activation; /* of the gate; enum cm_activation */
    bool qk_norm;        /* every head of Q and K is normed before RoPE */
    bool post_norms;     /* attention's and FFN's results are normed before they are added */
    bool qkv_bias;
    uint32_t window;        /* positions that a layer with a window sees, itself included; 0: all */
    uint32_t window_period; /* each n-th layer has no window; 0: all layers have one */
    float embedding_scale;  /* 0: 1 */
    float attention_scale;  /* 0: 1 / sqrt(head_width) */
    float attention_cap;    /* scores become cap * tanh(score / cap); 0: they do not */
    float logits_cap;       /* the same of the logits */
    float window_rope_base; /* of layers with a window; 0: rope_base */
    float rope_scale;       /* positions are multiplied, where the base is rope_base; 0: 1 */
};

struct cm_model {
    uint32_t vocabulary;
    uint32_t width; /* residual stream */
    uint32_t layers;
    uint32_t heads;
    uint32_t kv_heads;   /* divides heads */
    uint32_t head_width; /* multiple of 2; rope pairs (2i, 2i+1) are adjacent */
    uint32_t rope_width; /* dimensions rotated, <= head_width */
    uint32_t ffn_width;
    uint32_t context_max;
    float rope_base;
    float norm_epsilon;
    const float *rope_factors; /* [rope_width / 2], borrowed while binding: turns are divided by
                                  them where the base is rope_base; NULL: they are not */
    struct cm_decoder decoder;
    bool tied_head;               /* head is absent: the embedding serves */
    struct cm_tensor embedding;   /* [vocabulary, width] */
    struct cm_tensor head;        /* [vocabulary, width] or NONE */
    struct cm_tensor out_norm;    /* F32 [width] */
    const struct cm_layer *layer; /* [layers], borrowed */
    /* token id → bytes: token i is token_bytes[token_offsets[i] .. token_offsets[i+1]) */
    const uint32_t *token_offsets; /* [vocabulary + 1], borrowed */
    const uint8_t *token_bytes;
    const uint8_t *token_control; /* [vocabulary]; 1: never shown (control, unused) */
    uint32_t end_tokens[CM_END_TOKENS_MAX];
    uint32_t end_token_count;
};

/* What an adapter of low rank (LoRA, Hu et al. 2021) adds to: y = W x + scale * B (A x) for each
 * target that it has in a layer. */
enum cm_adapter_target { /* numbers are part of the package format */
                         CM_TARGET_Q = 0,
                         CM_TARGET_K = 1,
                         CM_TARGET_V = 2,
                         CM_TARGET_ATTENTION_OUT = 3,
                         CM_TARGET_GATE = 4,
                         CM_TARGET_UP = 5,
                         CM_TARGET_DOWN = 6,
                         CM_TARGET_COUNT
};

struct cm_adapter_layer {                /* F16; NONE, both of a pair: the target is as it was */
    struct cm_tensor a[CM_TARGET_COUNT]; /* [rank, columns of the target] */
    struct cm_tensor b[CM_TARGET_COUNT]; /* [rows of the target, rank]; of Q and K as W's rows lie:
                                            RoPE pairs adjacent */
};

/* Plain data as struct cm_model, filled from an adapter package's manifest. */
struct cm_adapter {
    uint32_t rank; /* of every pair, 1 .. CM_ADAPTER_RANK_MAX */
    float scale;   /* finite: alpha / rank, or alpha / sqrt(rank) */
    /* the shape that it was made for; must be the bound model's */
    uint32_t layers, width, heads, kv_heads, head_width, rope_width, ffn_width;
    const struct cm_adapter_layer *layer; /* [layers], borrowed */
};

/* Bytes of a tensor in compute layout: quant plane and scale plane, before alignment of the next.
 * False if the shape is out of bounds or the kind unknown. Both the packer and the device use it.
 */
bool cm_tensor_layout(uint32_t kind, uint64_t rows, uint64_t columns, uint64_t *ret_quant_bytes,
                      uint64_t *ret_scale_bytes);

#endif
