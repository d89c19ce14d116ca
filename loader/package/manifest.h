/* The manifest: what is sealed beside the weights. Encoding: FORMAT.md ("Manifest"), a tagged
 * binary, every field known, bounded and checked; unknown tags are refused.
 *
 * Parsing borrows: strings and token bytes point into the caller's buffer (the decrypted manifest),
 * which must outlive the struct; arrays are allocated and freed by cm_manifest_done. */
#ifndef CASEMATE_LOADER_PACKAGE_MANIFEST_H
#define CASEMATE_LOADER_PACKAGE_MANIFEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/frame.h" /* digest size */

#define CM_MANIFEST_ROPE_PAIRS_MAX  512u
#define CM_MANIFEST_LAYERS_MAX      256u
#define CM_MANIFEST_TENSORS_MAX     4096u
#define CM_MANIFEST_VOCABULARY_MAX  (1u << 20)
#define CM_MANIFEST_MERGES_MAX      (1u << 20)
#define CM_MANIFEST_TOKEN_BYTES_MAX 1024u /* one token */
#define CM_MANIFEST_TEXT_BYTES_MAX  (64u << 10)
#define CM_MANIFEST_END_TOKENS_MAX  8u

/* Only a name: what a decoder computes is said by shape and struct cm_manifest_decoder. */
enum cm_manifest_architecture {
    CM_ARCH_LLAMA = 1,
    CM_ARCH_MISTRAL = 2,
    CM_ARCH_QWEN2 = 3,
    CM_ARCH_QWEN3 = 4,
    CM_ARCH_GEMMA2 = 5,
    CM_ARCH_GEMMA3 = 6,
    CM_ARCH_PHI3 = 7,
};
enum cm_manifest_tokenizer {
    CM_TOKENIZER_BYTE_BPE = 1,      /* pairs of bytes, merged in order of rank */
    CM_TOKENIZER_SENTENCEPIECE = 2, /* pairs of characters, into the token of least rank */
};
enum cm_manifest_split { /* pre-tokenizer */
                         CM_SPLIT_SMOLLM = 1,
                         CM_SPLIT_GPT2 = 2,
                         CM_SPLIT_QWEN2 = 3,
                         CM_SPLIT_LLAMA3 = 4,
                         CM_SPLIT_WHOLE = 5, /* SentencePiece: none */
                         CM_SPLIT_SPACE_FIRST =
                             6, /* SentencePiece: none, and a space before the text */
                         CM_SPLIT_SPACE_ONE =
                             7, /* the same, where the text does not begin with one */
                         CM_SPLIT_QWEN2_NFC = 8, /* Qwen 2's, of the text in form C */
                         CM_SPLIT_TEKKEN = 9,
                         CM_SPLIT_GPT4O = 10,
};
enum cm_manifest_chat {
    CM_CHAT_NONE = 0,
    CM_CHAT_CHATML = 1,
    CM_CHAT_GEMMA = 2,
    CM_CHAT_LLAMA3 = 3,
    CM_CHAT_PHI3 = 4,
    CM_CHAT_LLAMA31 = 5,
    CM_CHAT_MISTRAL = 6,
    CM_CHAT_TEKKEN = 7,
    CM_CHAT_QWEN3 = 8,
    CM_CHAT_QWEN3_DIRECT = 9, /* its answers begin without thoughts */
};
#define CM_CHAT_LAST CM_CHAT_QWEN3_DIRECT
enum cm_manifest_activation { CM_MANIFEST_SILU = 0, CM_MANIFEST_GELU = 1 /* by tanh */ };
#define CM_MANIFEST_NO_RANK 0xffffffffu /* no pair becomes this token */
enum cm_manifest_token_type {           /* as in GGUF, renumbered */
                              CM_TOKEN_NORMAL = 1,
                              CM_TOKEN_UNKNOWN = 2,
                              CM_TOKEN_CONTROL = 3,
                              CM_TOKEN_USER = 4, /* user-defined: matched whole in text, shown */
                              CM_TOKEN_UNUSED = 5,
                              CM_TOKEN_BYTE = 6,
};

struct cm_manifest_text { /* UTF-8, not terminated */
    const char *bytes;
    uint32_t size;
};

/* layer = CM_MANIFEST_NO_LAYER for embedding, head and out_norm. role: enum cm_tensor_role of
 * kernels/model.h within a layer, else enum cm_manifest_global. kind: enum cm_tensor_kind. */
#define CM_MANIFEST_NO_LAYER 0xffffffffu
enum cm_manifest_global { CM_GLOBAL_EMBEDDING = 0, CM_GLOBAL_HEAD = 1, CM_GLOBAL_OUT_NORM = 2 };

struct cm_manifest_tensor {
    struct cm_manifest_text name;
    uint32_t layer;
    uint32_t role;
    uint32_t kind;
    uint32_t rows;
    uint32_t columns;
    uint64_t offset;       /* in the payload */
    uint64_t scale_offset; /* 0: none */
    uint64_t bytes;
};

/* What sets a decoder apart from llama's; all zero is llama's. */
struct cm_manifest_decoder {
    uint32_t activation;    /* of the gate; enum cm_manifest_activation */
    uint32_t qk_norm;       /* 1: every head of Q and K is normed before RoPE */
    uint32_t post_norms;    /* 1: attention's and FFN's results are normed before they are added */
    uint32_t qkv_bias;      /* 1: Q, K and V have a bias */
    uint32_t window;        /* positions that a layer with a window sees, itself included; 0: all */
    uint32_t window_period; /* each n-th layer has no window; 0: all layers have one */
    float embedding_scale;  /* 0: 1 */
    float attention_scale;  /* 0: 1 / sqrt(head_width) */
    float attention_cap;    /* scores become cap * tanh(score / cap); 0: they do not */
    float logits_cap;       /* the same of the logits */
    float window_rope_base; /* of layers with a window; 0: rope_base */
    float rope_scale;       /* positions are multiplied, where the base is rope_base; 0: 1 */
};

struct cm_manifest {
    struct cm_manifest_text model_name; /* [a-zA-Z0-9._-]{1,63} */
    struct cm_manifest_text license;
    struct cm_manifest_text origin; /* free text: source file's name and SHA-256 */
    uint32_t architecture;
    uint32_t vocabulary, width, layers, heads, kv_heads, head_width, rope_width, ffn_width;
    uint32_t context_max;
    float rope_base, norm_epsilon;
    bool tied_head;
    struct cm_manifest_decoder decoder;
    /* what the turns of RoPE's pairs are divided by, where the base is rope_base; 0: by nothing,
     * else rope_width / 2 of them */
    uint32_t rope_factor_count;
    float rope_factors[CM_MANIFEST_ROPE_PAIRS_MAX];
    /* LongRoPE: a host that serves a longer context than this many positions divides by these
     * instead; 0: there are none, else rope_width / 2 of them */
    uint32_t rope_long_context;
    float rope_long_factors[CM_MANIFEST_ROPE_PAIRS_MAX];
    /* what rounding the weights cost: mean KL divergence of the next token; 0 positions: not
     * measured, or nothing was rounded */
    uint32_t loss_positions;
    float loss_divergence;
    /* tokenizer */
    uint32_t tokenizer; /* enum cm_manifest_tokenizer */
    uint32_t split;     /* enum cm_manifest_split */
    bool add_begin;     /* put begin_token before every prompt */
    bool whole_pieces;  /* a piece that spells a token is that token, whatever merges make of it */
    uint32_t begin_token;
    uint32_t end_tokens[CM_MANIFEST_END_TOKENS_MAX];
    uint32_t end_token_count;
    const uint32_t *token_offsets; /* [vocabulary + 1] into token_bytes; allocated */
    const uint8_t *token_bytes;    /* raw bytes (byte-level alphabet already undone) */
    const uint8_t *token_types;    /* [vocabulary] enum cm_manifest_token_type */
    const uint32_t *merges;        /* [merge_count][2] token ids in order of rank; allocated */
    uint32_t merge_count;
    const uint32_t *ranks; /* SentencePiece: [vocabulary], least first; else NULL; allocated */
    /* chat */
    uint32_t chat;                          /* enum cm_manifest_chat */
    struct cm_manifest_text default_system; /* size 0: none is added */
    /* weights, in payload order */
    const struct cm_manifest_tensor *tensors; /* allocated */
    uint32_t tensor_count;
};

/* Parse and check a manifest against payload_bytes: every count, id, name, shape, offset, overlap
 * and alignment. On failure nothing is left allocated. Fails: PACKAGE with tag and offset. */
CM_MUST_USE enum cm_status cm_manifest_parse(const uint8_t *bytes, size_t size,
                                             uint64_t payload_bytes,
                                             struct cm_manifest *ret_manifest,
                                             struct cm_error *err);
/* Is it a number that a turn can be divided by? */
bool cm_manifest_rope_factor_ok(float factor);
void cm_manifest_done(struct cm_manifest *manifest);

/* An adapter's manifest: a package holds a model or an adapter. layer: 0 .. layers-1; role: 2 *
 * enum cm_adapter_target (kernels/model.h), + 1 for B. Tensors come by layer, then by role: a pair
 * is complete, and the same roles are in no layer twice. */
#define CM_MANIFEST_ADAPTER_ROLES       14u
#define CM_MANIFEST_ADAPTER_TENSORS_MAX (CM_MANIFEST_LAYERS_MAX * CM_MANIFEST_ADAPTER_ROLES)
#define CM_MANIFEST_ADAPTER_RANK_MAX    64u

struct cm_manifest_adapter {
    struct cm_manifest_text name; /* [a-zA-Z0-9._-]{1,63} */
    struct cm_manifest_text license;
    struct cm_manifest_text origin;
    uint8_t base_digest[CM_DIGEST_BYTES]; /* core digest of the package that it was made for */
    uint32_t rank;                        /* of all pairs, 1 .. CM_MANIFEST_ADAPTER_RANK_MAX */
    float scale;                          /* finite, > 0 */
    float rounding; /* relative RMS error of the stored values, 0: they are the source's */
    /* of the base, as far as an adapter depends on it */
    uint32_t layers, width, heads, kv_heads, head_width, rope_width, ffn_width;
    const struct cm_manifest_tensor *tensors; /* in payload order */
    uint32_t tensor_count;
};

/* Which of the two parsers a manifest is for. */
bool cm_manifest_is_adapter(const uint8_t *bytes, size_t size);
/* As cm_manifest_parse, but nothing is allocated: tensors go to the caller's `tensors` [room], and
 * more of them are refused. Texts borrow from `bytes`. Fails: PACKAGE with tag and offset. */
CM_MUST_USE enum cm_status
cm_manifest_adapter_parse(const uint8_t *bytes, size_t size, uint64_t payload_bytes,
                          struct cm_manifest_tensor *tensors, uint32_t room,
                          struct cm_manifest_adapter *ret_adapter, struct cm_error *err);
/* As cm_manifest_encode. */
CM_MUST_USE enum cm_status cm_manifest_adapter_encode(const struct cm_manifest_adapter *adapter,
                                                      uint8_t **ret_bytes, size_t *ret_size,
                                                      struct cm_error *err);

/* Encode (packer and tests). *ret_bytes is malloc'd, the caller frees. What it writes, parse reads.
 */
CM_MUST_USE enum cm_status cm_manifest_encode(const struct cm_manifest *manifest,
                                              uint8_t **ret_bytes, size_t *ret_size,
                                              struct cm_error *err);

#endif
