/* Fuzz target: a safetensors file. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "loader/pack/quant.h"
#include "loader/pack/safetensors.h"
#include "tests/fuzz/seed.h"

static const uint8_t *seed_make(size_t *ret_size)
{
    static uint8_t seed[512];
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F16\",\"shape\":[2,32],"
        "\"data_offsets\":[0,128]},\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[128,"
        "144]}}";
    seed[0] = (uint8_t)strlen(header);
    memcpy(seed + 8, header, strlen(header));
    *ret_size = 8 + strlen(header) + 144;
    return seed;
}

/* Every row of what is accepted can be read. */
static void rows_read(struct cm_source source)
{
    struct cm_error err;
    for (uint32_t i = 0; i < source.count; i++) {
        const struct cm_source_tensor *tensor = &source.tensors[i];
        uint8_t *row = malloc((size_t)tensor->row_bytes);
        if (cm_source_rows_read(tensor, tensor->rows - 1, 1, row, &err) != CM_OK) {
            abort();
        }
        free(row);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cm_safetensors *file;
    struct cm_error err;
    int fd = memfd_create("safetensors", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) {
        abort();
    }
    if (cm_safetensors_read(fd, "fuzz", &file, &err) == CM_OK) {
        rows_read(cm_safetensors_tensors(file));
        cm_safetensors_free(file);
    }
    close(fd);
    return 0;
}
