/* From a model's files to what a package holds: the plan (manifest, and where each weight comes
 * from), and the conversion of one tensor at a time into compute layout (FORMAT.md). */
#ifndef CASEMATE_LOADER_PACK_PLAN_H
#define CASEMATE_LOADER_PACK_PLAN_H

#include "loader/pack/gguf.h"
#include "loader/package/manifest.h"

struct cm_plan_options {
    const char *name;           /* NULL: from general.name */
    const char *chat_format;    /* NULL: from the template; a name of chat.c */
    const char *default_system; /* with chat_format */
    const char *origin;         /* recorded in the manifest */
    uint32_t floats_kind;       /* of matrices that the file has as floats; NONE: u8 */
};

/* How source rows fill the stored rows. */
enum cm_plan_weave { CM_WEAVE_CONCATENATE, CM_WEAVE_ALTERNATE_TILES };

/* Rows of one source tensor; of a vector, its elements. */
struct cm_plan_part {
    const struct cm_source_tensor *tensor;
    uint64_t first, rows;
    bool turned; /* rows of heads that RoPE turns: pairs that lie apart come together */
};

struct cm_plan_source {
    struct cm_plan_part parts[3];
    uint32_t count;
    enum cm_plan_weave weave;
};

struct cm_plan {
    struct cm_manifest manifest;
    bool pairs_apart;               /* RoPE pairs are (i, i + rope_width / 2) in the files */
    uint32_t floats_kind;           /* of the options */
    float norm_added;               /* 1 where norms are stored as weight - 1 */
    float rope_attention;           /* turned queries and keys are multiplied; 0: by nothing */
    struct cm_plan_source *sources; /* [manifest.tensor_count] */
    uint64_t payload_bytes;
    /* owned by the plan, borrowed by the manifest */
    struct cm_manifest_tensor *tensors;
    uint32_t *token_offsets;
    uint8_t *token_bytes;
    uint8_t *token_types;
    uint32_t *merges;
    uint32_t *ranks;
    char (*tensor_names)[64];
    char name[64];
    char *default_system;
};

/* Read keys, tokenizer, template and tensor list; lay the payload out. Fails: PACKAGE, one line. */
CM_MUST_USE enum cm_status cm_plan_make(const struct cm_gguf *gguf,
                                        const struct cm_plan_options *options,
                                        struct cm_plan *ret_plan, struct cm_error *err);
void cm_plan_done(struct cm_plan *plan);

struct cm_convert_loss {
    double error_square; /* sum over all weights of (stored - source)^2 */
    double square;       /* sum of source^2 */
    bool exact;          /* every weight is what it was */
};

/* Convert tensor `index` into bytes of manifest.tensors[index].bytes. Refuses NaN and infinity by
 * the tensor's name. */
CM_MUST_USE enum cm_status cm_plan_convert(const struct cm_plan *plan, uint32_t index,
                                           uint8_t *ret_bytes, struct cm_convert_loss *ret_loss,
                                           struct cm_error *err);

/* The row of a tensor whose heads' RoPE pairs lie apart that belongs at `row` where they are
 * adjacent. */
uint64_t cm_plan_pair_row(const struct cm_manifest *m, uint64_t row);

/* One tensor row by row, in stored order: what the file has, and what a device will make of it. Set
 * `row` to go elsewhere. close is fine after a failed open. */
struct cm_plan_rows {
    const struct cm_plan *plan;
    uint32_t index;
    uint64_t row; /* the next one */
    uint8_t *bytes;
    float *source, *stored; /* [columns padded to 32] of the last one */
};
CM_MUST_USE enum cm_status cm_plan_rows_open(const struct cm_plan *plan, uint32_t index,
                                             struct cm_plan_rows *ret_rows, struct cm_error *err);
CM_MUST_USE enum cm_status cm_plan_rows_next(struct cm_plan_rows *rows, struct cm_error *err);
void cm_plan_rows_close(struct cm_plan_rows *rows);

/* Is every weight carried over as it is? */
bool cm_plan_exact(const struct cm_plan *plan);
/* Mean KL divergence of the next token over CM_LOSS_POSITIONS positions of a fixed text, of the
 * stored weights from the file's. *ret_positions 0: the vocabulary does not know the text. */
#define CM_LOSS_POSITIONS 32u
CM_MUST_USE enum cm_status cm_plan_loss(const struct cm_plan *plan, float *ret_divergence,
                                        uint32_t *ret_positions, struct cm_error *err);

/* What the readers of model files share: they fill shape, decoder, texts, vocabulary and chat, then
 * the tensors are found and laid out. */
CM_MUST_USE enum cm_status cm_plan_tensors(const struct cm_source *source, struct cm_plan *plan,
                                           struct cm_error *err);
/* The architecture's number, and what sets its decoder apart where the file does not say it. */
CM_MUST_USE enum cm_status cm_plan_family(struct cm_source_text name, struct cm_plan *plan,
                                          struct cm_error *err);
/* What depends on several of the numbers; called when all of them are known. */
CM_MUST_USE enum cm_status cm_plan_shape_check(struct cm_plan *plan, struct cm_error *err);
/* The last step: on success, and if a host could load it, the plan moves to the caller; otherwise
 * it is done with. */
CM_MUST_USE enum cm_status cm_plan_finish(enum cm_status status, struct cm_plan *plan,
                                          struct cm_plan *ret_plan, struct cm_error *err);
void cm_plan_texts(const struct cm_plan_options *options, struct cm_source_text name,
                   struct cm_source_text license, struct cm_plan *plan);

/* rope.c: what RoPE's turns are divided by: Llama 3.1's numbers of config.json, YaRN's, or GGUF's
 * tensor of them, if there is one. */
struct cm_rope_scaling {
    float factor, low, high, context;
};
/* Numbers that are 0 are as YaRN's authors have them: context the model's, fast 32, slow 1,
 * attention by the factor. */
struct cm_rope_yarn {
    float factor, context, fast, slow, attention;
    bool between; /* the bounds of the ramp may lie between two pairs */
};
/* What YaRN multiplies attention by, of which the factor's logarithm has that weight. */
float cm_rope_yarn_attention(float factor, float weight);
/* LongRoPE: factors and contexts are in the plan's manifest; rope_attention is of the plan, too.
 * Drops the long factors where the model's context is not longer. */
CM_MUST_USE enum cm_status cm_rope_long(struct cm_plan *plan, struct cm_error *err);
/* What LongRoPE multiplies queries and keys by: sqrt(1 + ln(factor) / ln(context)). */
float cm_rope_long_attention(double factor, double context);
/* RoPE's base, width and the context must be known. The context grows to what YaRN makes of it. */
CM_MUST_USE enum cm_status cm_rope_yarn(const struct cm_rope_yarn *scaling, struct cm_plan *plan,
                                        struct cm_error *err);
CM_MUST_USE enum cm_status cm_rope_llama3(const struct cm_rope_scaling *scaling,
                                          struct cm_manifest *m, struct cm_error *err);
/* A file's tensors of factors: rope_freqs, or LongRoPE's pair where the plan has its context. */
CM_MUST_USE enum cm_status cm_rope_tensors(const struct cm_source *source, struct cm_plan *plan,
                                           struct cm_error *err);
bool cm_rope_tensors_long(const struct cm_source *source);
bool cm_rope_tensor_is(struct cm_source_text name);

/* A tokenizer as its file has it. Texts are borrowed from the file. */
struct cm_merge_text {
    struct cm_source_text left, right;
};

struct cm_vocabulary {
    uint32_t tokenizer, split; /* of the manifest */
    uint32_t count;
    struct cm_source_text *texts;
    uint8_t *kinds; /* enum cm_manifest_token_type */
    uint32_t merge_count;
    struct cm_merge_text *merges; /* in order of rank */
    float *scores;                /* SentencePiece: of each token; NULL: ranks follow from merges */
    uint32_t ends[CM_MANIFEST_END_TOKENS_MAX];
    uint32_t end_count;
    uint32_t begin;
    bool add_begin, whole_pieces;
    char *spare; /* memory of texts that no file has */
};

/* Room for so many tokens and merges. */
CM_MUST_USE enum cm_status cm_vocabulary_new(uint32_t count, uint32_t merges,
                                             struct cm_vocabulary *ret, struct cm_error *err);
void cm_vocabulary_done(struct cm_vocabulary *v);
/* → manifest (vocabulary.c). */
CM_MUST_USE enum cm_status cm_plan_vocabulary(const struct cm_vocabulary *v, struct cm_plan *plan,
                                              struct cm_error *err);
/* tokenizer.ggml.* → manifest. */
CM_MUST_USE enum cm_status cm_vocabulary_gguf(const struct cm_gguf *gguf, struct cm_plan *plan,
                                              struct cm_error *err);
/* A chat template (size 0: none) → manifest (chat.c). */
CM_MUST_USE enum cm_status cm_plan_chat(struct cm_source_text text,
                                        const struct cm_plan_options *options, struct cm_plan *plan,
                                        struct cm_error *err);

#endif
