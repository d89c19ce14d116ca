/* From a GGUF model to what a package holds: the plan (manifest, and where each weight comes from),
 * and the conversion of one tensor at a time into compute layout (FORMAT.md). */
#ifndef CASEMATE_LOADER_PACK_PLAN_H
#define CASEMATE_LOADER_PACK_PLAN_H

#include "loader/pack/gguf.h"
#include "loader/package/manifest.h"

struct cm_plan_options {
    const char *name;           /* NULL: from general.name */
    const char *chat_format;    /* NULL: from the template; "chatml", "none" */
    const char *default_system; /* with chat_format */
    const char *origin;         /* recorded in the manifest */
};

/* How source rows fill the stored rows. */
enum cm_plan_weave { CM_WEAVE_CONCATENATE, CM_WEAVE_ALTERNATE_TILES };

struct cm_plan_source {
    const struct cm_gguf_tensor *tensors[3];
    uint32_t count;
    enum cm_plan_weave weave;
};

struct cm_plan {
    struct cm_manifest manifest;
    struct cm_plan_source *sources; /* [manifest.tensor_count] */
    uint64_t payload_bytes;
    /* owned by the plan, borrowed by the manifest */
    struct cm_manifest_tensor *tensors;
    uint32_t *token_offsets;
    uint8_t *token_bytes;
    uint8_t *token_types;
    uint32_t *merges;
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
    bool exact;          /* quants and scales were carried over unchanged */
};

/* Convert tensor `index` into bytes of manifest.tensors[index].bytes. Refuses NaN and infinity by
 * the tensor's name. */
CM_MUST_USE enum cm_status cm_plan_convert(const struct cm_gguf *gguf, const struct cm_plan *plan,
                                           uint32_t index, uint8_t *ret_bytes,
                                           struct cm_convert_loss *ret_loss, struct cm_error *err);

/* Stored kind for a set of sources (enum cm_tensor_kind). */
uint32_t cm_plan_kind(const struct cm_plan_source *source);

/* tokenizer.ggml.* → manifest (vocabulary.c). */
CM_MUST_USE enum cm_status cm_plan_vocabulary(const struct cm_gguf *gguf, struct cm_plan *plan,
                                              struct cm_error *err);
/* tokenizer.chat_template → manifest (chat.c). */
CM_MUST_USE enum cm_status cm_plan_chat(const struct cm_gguf *gguf,
                                        const struct cm_plan_options *options, struct cm_plan *plan,
                                        struct cm_error *err);

#endif
