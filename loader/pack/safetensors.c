/* The header is JSON: jansson parses it, with duplicates refused. */
#include "loader/pack/safetensors.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "loader/pack/quant.h"
#include "runtime/base/cursor.h"

#define SHAPE_MAX 4u

struct cm_safetensors {
    json_t *header; /* owns the names */
    struct cm_source_tensor *tensors;
    uint32_t count;
};

struct reader {
    const char *name;
    int fd;
    uint64_t data;  /* offset of the data */
    uint64_t bytes; /* of data */
    struct cm_error *err;
};

static enum cm_status refuse(const struct reader *reader, const char *tensor, const char *what)
{
    return cm_error_set(reader->err, CM_E_PACKAGE, "CM-SAFETENSORS", "%.100s: '%.80s': %s",
                        reader->name, tensor, what);
}

static bool type_find(const char *name, uint32_t *ret_type)
{
    static const struct {
        const char *name;
        uint32_t type;
    } types[] = {{"F32", CM_QUANT_F32}, {"F16", CM_QUANT_F16}, {"BF16", CM_QUANT_BF16}};
    for (size_t i = 0; name != NULL && i < sizeof(types) / sizeof(types[0]); i++) {
        if (strcmp(name, types[i].name) == 0) {
            *ret_type = types[i].type;
            return true;
        }
    }
    return false;
}

/* A whole number that is not negative. */
static bool number_of(const json_t *value, uint64_t *ret_number)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0) {
        return false;
    }
    *ret_number = (uint64_t)json_integer_value(value);
    return true;
}

static enum cm_status tensor_read(struct reader *reader, const char *name, const json_t *facts,
                                  struct cm_source_tensor *tensor)
{
    const json_t *shape = json_object_get(facts, "shape");
    const json_t *offsets = json_object_get(facts, "data_offsets");
    const size_t dims = json_array_size(shape);
    uint64_t begin, end, size;
    *tensor = (struct cm_source_tensor){
        .name = {name, strlen(name)}, .columns = 1, .rows = 1, .fd = reader->fd};
    if (!type_find(json_string_value(json_object_get(facts, "dtype")), &tensor->type)) {
        return refuse(reader, name, "its type is none of F32, F16, BF16");
    }
    bool fits = json_is_array(shape) && dims >= 1 && dims <= SHAPE_MAX &&
                json_array_size(offsets) == 2 && number_of(json_array_get(offsets, 0), &begin) &&
                number_of(json_array_get(offsets, 1), &end) && begin <= end;
    for (size_t i = 0; fits && i < dims; i++) {
        fits = number_of(json_array_get(shape, i), &size);
        if (fits && i + 1 == dims) {
            tensor->columns = size;
        } else {
            fits = fits && cm_size_multiply(tensor->rows, size, &tensor->rows);
        }
    }
    if (!fits || !cm_source_tensor_size(tensor)) {
        return refuse(reader, name, "shape or data_offsets are impossible");
    }
    if (end > reader->bytes || end - begin != tensor->bytes) {
        return refuse(reader, name,
                      "its data lie outside the file, or are not as long as its shape");
    }
    tensor->offset = reader->data + begin;
    return CM_OK;
}

static int offset_compare(const void *a, const void *b)
{
    const struct cm_source_tensor *left = a, *right = b;
    return (left->offset > right->offset) - (left->offset < right->offset);
}

/* Tensors follow each other without a gap, from the first byte of data to the last. */
static enum cm_status tensors_follow(const struct reader *reader, struct cm_safetensors *file)
{
    uint64_t at = reader->data;
    qsort(file->tensors, file->count, sizeof(*file->tensors), offset_compare);
    for (uint32_t i = 0; i < file->count; i++) {
        if (file->tensors[i].offset != at) {
            return refuse(reader, file->tensors[i].name.bytes, "its data overlap, or leave a gap");
        }
        at += file->tensors[i].bytes;
    }
    return at == reader->data + reader->bytes
               ? CM_OK
               : refuse(reader, "header", "the file goes on behind the last tensor");
}

static enum cm_status tensors_read(struct reader *reader, struct cm_safetensors *file)
{
    const char *name;
    json_t *facts;
    if (!json_is_object(file->header) ||
        json_object_size(file->header) > CM_SAFETENSORS_TENSORS_MAX) {
        return refuse(reader, "header", "it is no object, or has too many tensors");
    }
    file->tensors = calloc(json_object_size(file->header) + 1, sizeof(*file->tensors));
    if (file->tensors == NULL) {
        return cm_error_errno(reader->err, ENOMEM, "CM-SYS-MEMORY", "tensors");
    }
    json_object_foreach(file->header, name, facts)
    {
        if (strcmp(name, "__metadata__") == 0) {
            continue;
        }
        enum cm_status status = tensor_read(reader, name, facts, &file->tensors[file->count]);
        if (status != CM_OK) {
            return status;
        }
        file->count++;
    }
    return tensors_follow(reader, file);
}

static enum cm_status header_read(struct reader *reader, uint64_t file_bytes, json_t **ret_header)
{
    uint8_t prefix[8];
    json_error_t cause;
    enum cm_status status =
        file_bytes >= sizeof(prefix)
            ? cm_source_bytes_read(reader->fd, 0, prefix, sizeof(prefix), reader->err)
            : refuse(reader, "header", "the file is too short");
    if (status != CM_OK) {
        return status;
    }
    struct cm_cursor cursor = cm_cursor_init(prefix, sizeof(prefix));
    uint64_t bytes = cm_cursor_u64(&cursor);
    if (bytes < 2 || bytes > CM_SAFETENSORS_HEADER_MAX || bytes > file_bytes - sizeof(prefix)) {
        return refuse(reader, "header", "its length is impossible");
    }
    char *text = malloc((size_t)bytes);
    if (text == NULL) {
        return cm_error_errno(reader->err, ENOMEM, "CM-SYS-MEMORY", "header");
    }
    status = cm_source_bytes_read(reader->fd, sizeof(prefix), text, (size_t)bytes, reader->err);
    if (status == CM_OK) {
        *ret_header = json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, &cause);
        status = *ret_header != NULL ? CM_OK : refuse(reader, "header", cause.text);
    }
    free(text);
    reader->data = sizeof(prefix) + bytes;
    reader->bytes = file_bytes - reader->data;
    return status;
}

enum cm_status cm_safetensors_read(int fd, const char *name, struct cm_safetensors **ret_file,
                                   struct cm_error *err)
{
    struct stat facts;
    struct reader reader = {.name = name, .fd = fd, .err = err};
    struct cm_safetensors *file = calloc(1, sizeof(*file));
    enum cm_status status = CM_OK;
    if (file == NULL || fstat(fd, &facts) != 0) {
        status = cm_error_errno(err, errno, "CM-GGUF-READ", "cannot read %s", name);
    }
    if (status == CM_OK) {
        status = header_read(&reader, (uint64_t)facts.st_size, &file->header);
    }
    if (status == CM_OK) {
        status = tensors_read(&reader, file);
    }
    if (status != CM_OK) {
        cm_safetensors_free(file);
        return status;
    }
    *ret_file = file;
    return CM_OK;
}

void cm_safetensors_free(struct cm_safetensors *file)
{
    if (file != NULL) {
        json_decref(file->header);
        free(file->tensors);
        free(file);
    }
}

struct cm_source cm_safetensors_tensors(const struct cm_safetensors *file)
{
    return (struct cm_source){file->tensors, file->count};
}
