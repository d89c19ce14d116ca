/* Reading safetensors files: u64 bytes of a JSON header, the header, then the tensors' data. Every
 * offset is checked against type, shape and file; data without a tensor is refused. Source of the
 * format: huggingface/safetensors, README. */
#ifndef CASEMATE_LOADER_PACK_SAFETENSORS_H
#define CASEMATE_LOADER_PACK_SAFETENSORS_H

#include "loader/pack/source.h"

#define CM_SAFETENSORS_HEADER_MAX  (64u << 20)
#define CM_SAFETENSORS_TENSORS_MAX 65536u

struct cm_safetensors;

/* fd stays the caller's, and open as long as tensors are read. `name` is for errors. */
CM_MUST_USE enum cm_status cm_safetensors_read(int fd, const char *name,
                                               struct cm_safetensors **ret_file,
                                               struct cm_error *err);
void cm_safetensors_free(struct cm_safetensors *file); /* NULL is fine */
/* Its tensors, under the names in the file; borrowed. */
struct cm_source cm_safetensors_tensors(const struct cm_safetensors *file);

#endif
