/* What the two manifests, of a model and of an adapter, share: records, texts, tensors. */
#ifndef CASEMATE_LOADER_PACKAGE_MANIFEST_INTERNAL_H
#define CASEMATE_LOADER_PACKAGE_MANIFEST_INTERNAL_H

#include "loader/package/manifest.h"
#include "runtime/base/cursor.h"

enum tag {
    TAG_NAME = 1,
    TAG_LICENSE = 2,
    TAG_ORIGIN = 3,
    TAG_SHAPE = 4,
    TAG_DECODER = 5,
    TAG_LOSS = 6,
    TAG_ADAPTER = 7,
    TAG_TOKENIZER = 8,
    TAG_TOKEN_LENGTHS = 9,
    TAG_TOKEN_BYTES = 10,
    TAG_TOKEN_TYPES = 11,
    TAG_MERGES = 12,
    TAG_RANKS = 13,
    TAG_ROPE_FACTORS = 14,
    TAG_ROPE_LONG = 15,
    TAG_CHAT = 16,
    TAG_TENSOR = 32,
};

#define TENSOR_FIXED_BYTES 48u
#define PAYLOAD_ALIGN      4096u

/* The next record's tag and body. False: cut or malformed. */
bool cm_manifest_record_read(struct cm_cursor *cursor, uint16_t *ret_tag,
                             struct cm_cursor *ret_body);
/* The rest of the body as text or as a name. False: it is none. */
bool cm_manifest_text_read(struct cm_cursor *body, struct cm_manifest_text *ret_text);
bool cm_manifest_name_read(struct cm_cursor *body, struct cm_manifest_text *ret_name);
/* A tensor behind *payload_used, which moves on. NULL, or why it is refused. */
const char *cm_manifest_tensor_read(struct cm_cursor *body, uint64_t payload_bytes,
                                    uint64_t *payload_used, struct cm_manifest_tensor *ret_tensor);

void cm_manifest_record_put(struct cm_writer *writer, uint16_t tag, size_t size);
void cm_manifest_text_put(struct cm_writer *writer, uint16_t tag,
                          const struct cm_manifest_text *text);
void cm_manifest_f32_put(struct cm_writer *writer, float value);
void cm_manifest_tensors_put(struct cm_writer *writer, const struct cm_manifest_tensor *tensors,
                             uint32_t count);

#endif
