/* Tensors of a model as its files store them, whatever the file format: GGUF and safetensors
 * readers fill these, plan and conversion read them. Names are GGUF's. */
#ifndef CASEMATE_LOADER_PACK_SOURCE_H
#define CASEMATE_LOADER_PACK_SOURCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"

struct cm_source_text {
    const char *bytes; /* not terminated */
    size_t size;
};

struct cm_source_tensor {
    struct cm_source_text name;
    uint32_t type;    /* enum cm_quant_type */
    uint64_t columns; /* contiguous */
    uint64_t rows;
    int fd;
    uint64_t offset; /* in the file */
    uint64_t bytes;
    uint64_t row_bytes;
};

struct cm_source { /* borrowed from the reader of the file */
    const struct cm_source_tensor *tensors;
    uint32_t count;
};

/* NULL if there is none of that name. */
const struct cm_source_tensor *cm_source_find(const struct cm_source *source, const char *name);

/* Read rows [first, first + count) as stored; the range must exist. Fails: SYSTEM with the offset.
 */
CM_MUST_USE enum cm_status cm_source_rows_read(const struct cm_source_tensor *tensor,
                                               uint64_t first, uint64_t count, void *ret_bytes,
                                               struct cm_error *err);

/* Read exactly `size` bytes. `format` names the kind of file in the error. */
CM_MUST_USE enum cm_status cm_source_bytes_read(int fd, uint64_t offset, void *ret_bytes,
                                                size_t size, struct cm_error *err);

bool cm_source_text_is(struct cm_source_text text, const char *wanted);

/* Set row_bytes and bytes from type, columns and rows. False: unknown type, a row that does not
 * divide into blocks, or sizes that overflow. */
bool cm_source_tensor_size(struct cm_source_tensor *tensor);

#endif
