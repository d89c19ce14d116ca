/* Reading tensors of model files. */
#include "loader/pack/source.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "loader/pack/quant.h"
#include "runtime/base/cursor.h"

bool cm_source_text_is(struct cm_source_text text, const char *wanted)
{
    return text.size == strlen(wanted) && memcmp(text.bytes, wanted, text.size) == 0;
}

const struct cm_source_tensor *cm_source_find(const struct cm_source *source, const char *name)
{
    for (uint32_t i = 0; i < source->count; i++) {
        if (cm_source_text_is(source->tensors[i].name, name)) {
            return &source->tensors[i];
        }
    }
    return NULL;
}

enum cm_status cm_source_bytes_read(int fd, uint64_t offset, void *ret_bytes, size_t size,
                                    struct cm_error *err)
{
    size_t done = 0;
    while (done < size) {
        ssize_t got = pread(fd, (char *)ret_bytes + done, size - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return cm_error_errno(err, got < 0 ? errno : EIO, "CM-GGUF-READ",
                                  "model file: cannot read at offset %llu",
                                  (unsigned long long)(offset + done));
        }
        done += (size_t)got;
    }
    return CM_OK;
}

enum cm_status cm_source_rows_read(const struct cm_source_tensor *tensor, uint64_t first,
                                   uint64_t count, void *ret_bytes, struct cm_error *err)
{
    CM_ASSERT(first <= tensor->rows && count <= tensor->rows - first);
    return cm_source_bytes_read(tensor->fd, tensor->offset + first * tensor->row_bytes, ret_bytes,
                                (size_t)(count * tensor->row_bytes), err);
}

bool cm_source_tensor_size(struct cm_source_tensor *tensor)
{
    const struct cm_quant *quant = cm_quant_find(tensor->type);
    return quant != NULL && tensor->columns > 0 && tensor->rows > 0 &&
           tensor->columns % quant->block == 0 &&
           cm_size_multiply(tensor->columns / quant->block, quant->block_bytes,
                            &tensor->row_bytes) &&
           cm_size_multiply(tensor->rows, tensor->row_bytes, &tensor->bytes);
}
