/* Reading GGUF version 2 and 3 (the format of ggml model files), every length checked.
 *
 * The header is read into memory (bounded), tensor data by pread. Names and texts are borrowed from
 * the header until close. Errors name the byte offset and the key or tensor. Source of the format:
 * ggml, docs/gguf.md. */
#ifndef CASEMATE_LOADER_PACK_GGUF_H
#define CASEMATE_LOADER_PACK_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "loader/pack/source.h"
#include "runtime/base/cursor.h"
#include "runtime/base/error.h"

#define CM_GGUF_KEYS_MAX    65536u
#define CM_GGUF_TENSORS_MAX 65536u
#define CM_GGUF_HEADER_MAX  (256u << 20)

enum cm_gguf_value {
    CM_GGUF_VALUE_U8 = 0,
    CM_GGUF_VALUE_I8,
    CM_GGUF_VALUE_U16,
    CM_GGUF_VALUE_I16,
    CM_GGUF_VALUE_U32,
    CM_GGUF_VALUE_I32,
    CM_GGUF_VALUE_F32,
    CM_GGUF_VALUE_BOOL,
    CM_GGUF_VALUE_STRING,
    CM_GGUF_VALUE_ARRAY,
    CM_GGUF_VALUE_U64,
    CM_GGUF_VALUE_I64,
    CM_GGUF_VALUE_F64,
    CM_GGUF_VALUE_COUNT
};

struct cm_gguf;

CM_MUST_USE enum cm_status cm_gguf_open(const char *path, struct cm_gguf **ret_gguf,
                                        struct cm_error *err);
void cm_gguf_close(struct cm_gguf *gguf); /* NULL is fine */

/* Its tensors; borrowed until close. */
struct cm_source cm_gguf_tensors(const struct cm_gguf *gguf);

/* Typed values. has: is the key there? The readers fail with CM-GGUF-KEY (missing) or CM-GGUF-TYPE.
 */
bool cm_gguf_has(const struct cm_gguf *gguf, const char *key);
CM_MUST_USE enum cm_status cm_gguf_u32(const struct cm_gguf *gguf, const char *key,
                                       uint32_t *ret_value, struct cm_error *err);
CM_MUST_USE enum cm_status cm_gguf_f32(const struct cm_gguf *gguf, const char *key,
                                       float *ret_value, struct cm_error *err);
CM_MUST_USE enum cm_status cm_gguf_bool(const struct cm_gguf *gguf, const char *key,
                                        bool *ret_value, struct cm_error *err);
CM_MUST_USE enum cm_status cm_gguf_text(const struct cm_gguf *gguf, const char *key,
                                        struct cm_source_text *ret_text, struct cm_error *err);
/* An array of `type`: a cursor over its elements and their count. Texts: read them with
 * cm_gguf_next_text. */
CM_MUST_USE enum cm_status cm_gguf_array(const struct cm_gguf *gguf, const char *key,
                                         enum cm_gguf_value type, struct cm_cursor *ret_cursor,
                                         uint64_t *ret_count, struct cm_error *err);
struct cm_source_text cm_gguf_next_text(struct cm_cursor *cursor);

#endif
