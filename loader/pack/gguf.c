/* GGUF header parsing over the cursor, and bounded reads of tensor data. */
#include "loader/pack/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loader/pack/quant.h"

struct key {
    struct cm_source_text name;
    uint32_t type;
    uint32_t element; /* of an array */
    uint64_t count;
    size_t offset; /* of the value (array: of the first element) in the header */
    size_t bytes;
};

struct cm_gguf {
    int fd;
    uint64_t file_bytes;
    uint8_t *header;
    size_t header_bytes;
    struct key *keys;
    uint32_t key_count;
    struct cm_source_tensor *tensors;
    uint32_t tensor_count;
};

static const uint8_t value_bytes[CM_GGUF_VALUE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static enum cm_status refuse(struct cm_error *err, const char *id, size_t offset,
                             struct cm_source_text name, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, id, "GGUF at offset %zu: '%.*s': %s", offset,
                        (int)(name.size < 80 ? name.size : 80), name.bytes, what);
}

static const struct cm_source_text nameless = {"header", 6};

struct cm_source_text cm_gguf_next_text(struct cm_cursor *cursor)
{
    uint64_t size = cm_cursor_u64(cursor);
    if (size > cm_cursor_left(cursor)) {
        cursor->failed = true;
        return (struct cm_source_text){"", 0};
    }
    const uint8_t *bytes = cm_cursor_take(cursor, (size_t)size);
    return (struct cm_source_text){(const char *)bytes, (size_t)size};
}

static bool text_equal(struct cm_source_text a, struct cm_source_text b)
{
    return a.size == b.size && memcmp(a.bytes, b.bytes, a.size) == 0;
}

/* Step over one array's elements. */
static void array_skip(struct cm_cursor *cursor, uint32_t element, uint64_t count)
{
    if (element == CM_GGUF_VALUE_STRING) {
        for (uint64_t i = 0; i < count && cm_cursor_ok(cursor); i++) {
            (void)cm_gguf_next_text(cursor);
        }
        return;
    }
    uint64_t bytes;
    if (!cm_size_multiply(count, value_bytes[element], &bytes) || bytes > cm_cursor_left(cursor)) {
        cursor->failed = true;
        return;
    }
    cm_cursor_skip(cursor, (size_t)bytes);
}

static enum cm_status key_parse(struct cm_cursor *cursor, struct key *key, struct cm_error *err)
{
    size_t start = cursor->offset;
    key->name = cm_gguf_next_text(cursor);
    key->type = cm_cursor_u32(cursor);
    if (!cm_cursor_ok(cursor)) {
        return CM_OK; /* the caller sees the failed cursor */
    }
    if (key->name.size == 0 || key->name.size > 256) {
        return refuse(err, "CM-GGUF-KEY", start, nameless, "key of impossible length");
    }
    if (key->type >= CM_GGUF_VALUE_COUNT) {
        return refuse(err, "CM-GGUF-TYPE", start, key->name, "unknown value type");
    }
    if (key->type == CM_GGUF_VALUE_ARRAY) {
        key->element = cm_cursor_u32(cursor);
        key->count = cm_cursor_u64(cursor);
        if (cm_cursor_ok(cursor) &&
            (key->element >= CM_GGUF_VALUE_COUNT || key->element == CM_GGUF_VALUE_ARRAY)) {
            return refuse(err, "CM-GGUF-TYPE", start, key->name, "unknown or nested array type");
        }
        key->offset = cursor->offset;
        if (cm_cursor_ok(cursor)) {
            array_skip(cursor, key->element, key->count);
        }
    } else if (key->type == CM_GGUF_VALUE_STRING) {
        key->offset = cursor->offset;
        (void)cm_gguf_next_text(cursor);
    } else {
        key->offset = cursor->offset;
        cm_cursor_skip(cursor, value_bytes[key->type]);
    }
    key->bytes = cursor->offset - key->offset;
    return CM_OK;
}

/* dims and type to rows, columns and sizes. */
static enum cm_status tensor_size(struct cm_source_tensor *tensor, const uint64_t *dims,
                                  uint32_t dim_count, size_t at, struct cm_error *err)
{
    if (cm_quant_find(tensor->type) == NULL) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TENSOR-TYPE",
                            "GGUF at offset %zu: tensor '%.*s' has type %u; this packer reads F32, "
                            "F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K: convert "
                            "the model first",
                            at, (int)tensor->name.size, tensor->name.bytes, tensor->type);
    }
    tensor->columns = dims[0];
    tensor->rows = 1;
    bool fits = true;
    for (uint32_t i = 1; i < dim_count; i++) {
        fits = fits && cm_size_multiply(tensor->rows, dims[i], &tensor->rows);
    }
    fits = fits && cm_source_tensor_size(tensor);
    return fits
               ? CM_OK
               : refuse(err, "CM-GGUF-SHAPE", at, tensor->name, "shape is impossible or overflows");
}

static enum cm_status tensor_parse(struct cm_cursor *cursor, struct cm_source_tensor *tensor,
                                   struct cm_error *err)
{
    size_t at = cursor->offset;
    uint64_t dims[4] = {0};
    tensor->name = cm_gguf_next_text(cursor);
    uint32_t dim_count = cm_cursor_u32(cursor);
    if (!cm_cursor_ok(cursor)) {
        return CM_OK;
    }
    if (tensor->name.size == 0 || tensor->name.size > 63 || dim_count < 1 || dim_count > 4) {
        return refuse(err, "CM-GGUF-SHAPE", at, nameless,
                      "tensor's name or number of dimensions is impossible");
    }
    for (uint32_t i = 0; i < dim_count; i++) {
        dims[i] = cm_cursor_u64(cursor);
    }
    tensor->type = cm_cursor_u32(cursor);
    tensor->offset = cm_cursor_u64(cursor);
    return cm_cursor_ok(cursor) ? tensor_size(tensor, dims, dim_count, at, err) : CM_OK;
}

static int name_compare(const void *a, const void *b)
{
    const struct cm_source_text *left = *(const struct cm_source_text *const *)a;
    const struct cm_source_text *right = *(const struct cm_source_text *const *)b;
    size_t shorter = left->size < right->size ? left->size : right->size;
    int order = memcmp(left->bytes, right->bytes, shorter);
    return order != 0 ? order : (left->size > right->size) - (left->size < right->size);
}

/* Any name twice? Sorted, so that 65536 of them cost no square. */
static enum cm_status names_unique(const void *first, size_t stride, uint32_t count,
                                   const char *what, struct cm_error *err)
{
    if (count == 0) {
        return CM_OK;
    }
    const struct cm_source_text **names = malloc(count * sizeof(*names));
    if (names == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "names");
    }
    for (uint32_t i = 0; i < count; i++) {
        names[i] = (const struct cm_source_text *)(const void *)((const char *)first + i * stride);
    }
    qsort(names, count, sizeof(*names), name_compare);
    enum cm_status status = CM_OK;
    for (uint32_t i = 1; status == CM_OK && i < count; i++) {
        if (text_equal(*names[i - 1], *names[i])) {
            status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-DUPLICATE",
                                  "GGUF header: %s '%.*s' appears twice", what, (int)names[i]->size,
                                  names[i]->bytes);
        }
    }
    free(names);
    return status;
}

static enum cm_status tensors_place(struct cm_gguf *gguf, uint64_t data, uint32_t alignment,
                                    struct cm_error *err)
{
    for (uint32_t i = 0; i < gguf->tensor_count; i++) {
        struct cm_source_tensor *tensor = &gguf->tensors[i];
        uint64_t end;
        tensor->fd = gguf->fd;
        if (tensor->offset % alignment != 0) {
            return refuse(err, "CM-GGUF-ALIGN", (size_t)data, tensor->name, "data is not aligned");
        }
        if (!cm_size_add(tensor->offset, data, &tensor->offset) ||
            !cm_size_add(tensor->offset, tensor->bytes, &end) || end > gguf->file_bytes) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-LENGTH",
                                "GGUF tensor '%.*s' ends at offset %llu, the file at %llu: it is "
                                "cut or wrong",
                                (int)tensor->name.size, tensor->name.bytes,
                                (unsigned long long)(tensor->offset + tensor->bytes),
                                (unsigned long long)gguf->file_bytes);
        }
    }
    return CM_OK;
}

/* Parse what is in memory. *ret_short: the header goes on beyond it. */
static enum cm_status header_parse(struct cm_gguf *gguf, bool *ret_short, struct cm_error *err)
{
    struct cm_cursor cursor = cm_cursor_init(gguf->header, gguf->header_bytes);
    *ret_short = false;
    const uint8_t *magic = cm_cursor_take(&cursor, 4);
    if (magic == NULL || memcmp(magic, "GGUF", 4) != 0) {
        return refuse(err, "CM-GGUF-MAGIC", 0, nameless, "this is not a GGUF file");
    }
    uint32_t version = cm_cursor_u32(&cursor);
    uint64_t tensor_count = cm_cursor_u64(&cursor);
    uint64_t key_count = cm_cursor_u64(&cursor);
    if (version != 2 && version != 3) {
        return refuse(err, "CM-GGUF-VERSION", 4, nameless, "only versions 2 and 3 are read");
    }
    if (tensor_count > CM_GGUF_TENSORS_MAX || key_count > CM_GGUF_KEYS_MAX) {
        return refuse(err, "CM-GGUF-COUNT", 8, nameless, "impossible number of tensors or keys");
    }
    gguf->key_count = (uint32_t)key_count;
    gguf->tensor_count = (uint32_t)tensor_count;
    gguf->keys = calloc(key_count + 1, sizeof(*gguf->keys));
    gguf->tensors = calloc(tensor_count + 1, sizeof(*gguf->tensors));
    if (gguf->keys == NULL || gguf->tensors == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "GGUF header");
    }
    enum cm_status status = CM_OK;
    for (uint32_t i = 0; status == CM_OK && cm_cursor_ok(&cursor) && i < key_count; i++) {
        status = key_parse(&cursor, &gguf->keys[i], err);
    }
    for (uint32_t i = 0; status == CM_OK && cm_cursor_ok(&cursor) && i < tensor_count; i++) {
        status = tensor_parse(&cursor, &gguf->tensors[i], err);
    }
    if (status != CM_OK || !cm_cursor_ok(&cursor)) {
        *ret_short = status == CM_OK;
        return status;
    }
    status = names_unique(gguf->keys, sizeof(*gguf->keys), gguf->key_count, "key", err);
    if (status == CM_OK) {
        status =
            names_unique(gguf->tensors, sizeof(*gguf->tensors), gguf->tensor_count, "tensor", err);
    }
    uint32_t alignment = 32;
    if (status == CM_OK && cm_gguf_has(gguf, "general.alignment")) {
        status = cm_gguf_u32(gguf, "general.alignment", &alignment, err);
    }
    if (status == CM_OK && (alignment == 0 || alignment > 65536 || (alignment & (alignment - 1)))) {
        status = refuse(err, "CM-GGUF-ALIGN", 0, nameless, "alignment is not a power of two");
    }
    if (status == CM_OK) {
        uint64_t data = (cursor.offset + alignment - 1) / alignment * alignment;
        status = tensors_place(gguf, data, alignment, err);
    }
    return status;
}

static void header_drop(struct cm_gguf *gguf)
{
    free(gguf->keys);
    free(gguf->tensors);
    free(gguf->header);
    gguf->keys = NULL;
    gguf->tensors = NULL;
    gguf->header = NULL;
    gguf->key_count = gguf->tensor_count = 0;
}

/* Read a first piece; a header that goes on beyond it is read again, four times as long. */
static enum cm_status header_load(struct cm_gguf *gguf, struct cm_error *err)
{
    for (uint64_t want = 4u << 20;; want *= 4) {
        bool goes_on;
        gguf->header_bytes = (size_t)(want < gguf->file_bytes ? want : gguf->file_bytes);
        gguf->header = malloc(gguf->header_bytes == 0 ? 1 : gguf->header_bytes);
        if (gguf->header == NULL) {
            return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "GGUF header");
        }
        enum cm_status status =
            cm_source_bytes_read(gguf->fd, 0, gguf->header, gguf->header_bytes, err);
        if (status == CM_OK) {
            status = header_parse(gguf, &goes_on, err);
        }
        if (status != CM_OK || !goes_on) {
            return status;
        }
        if (gguf->header_bytes == gguf->file_bytes || want >= CM_GGUF_HEADER_MAX) {
            return cm_error_set(
                err, CM_E_PACKAGE, "CM-GGUF-LENGTH",
                "GGUF: a length in the header points beyond offset %zu: the file is "
                "cut or wrong",
                gguf->header_bytes);
        }
        header_drop(gguf);
    }
}

enum cm_status cm_gguf_open(const char *path, struct cm_gguf **ret_gguf, struct cm_error *err)
{
    struct stat facts;
    struct cm_gguf *gguf = calloc(1, sizeof(*gguf));
    if (gguf == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "GGUF");
    }
    gguf->fd = open(path, O_RDONLY | O_CLOEXEC);
    enum cm_status status = CM_OK;
    if (gguf->fd < 0 || fstat(gguf->fd, &facts) != 0) {
        status = cm_error_errno(err, errno, "CM-GGUF-READ", "cannot open %s", path);
    } else if (!S_ISREG(facts.st_mode)) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-READ", "%s is not a file", path);
    } else {
        gguf->file_bytes = (uint64_t)facts.st_size;
        status = header_load(gguf, err);
    }
    if (status != CM_OK) {
        cm_gguf_close(gguf);
        return status;
    }
    *ret_gguf = gguf;
    return CM_OK;
}

void cm_gguf_close(struct cm_gguf *gguf)
{
    if (gguf != NULL) {
        header_drop(gguf);
        if (gguf->fd >= 0) {
            close(gguf->fd);
        }
        free(gguf);
    }
}

struct cm_source cm_gguf_tensors(const struct cm_gguf *gguf)
{
    return (struct cm_source){gguf->tensors, gguf->tensor_count};
}

static const struct key *key_find(const struct cm_gguf *gguf, const char *name)
{
    for (uint32_t i = 0; i < gguf->key_count; i++) {
        if (cm_source_text_is(gguf->keys[i].name, name)) {
            return &gguf->keys[i];
        }
    }
    return NULL;
}

bool cm_gguf_has(const struct cm_gguf *gguf, const char *key)
{
    return key_find(gguf, key) != NULL;
}

static enum cm_status key_get(const struct cm_gguf *gguf, const char *name, uint32_t type,
                              const struct key **ret_key, struct cm_cursor *ret_cursor,
                              struct cm_error *err)
{
    const struct key *key = key_find(gguf, name);
    if (key == NULL) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-KEY", "GGUF: key '%s' is missing", name);
    }
    if (key->type != type) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TYPE",
                            "GGUF at offset %zu: key '%s' has value type %u, expected %u",
                            key->offset, name, key->type, type);
    }
    *ret_key = key;
    *ret_cursor = cm_cursor_init(gguf->header + key->offset, key->bytes);
    return CM_OK;
}

enum cm_status cm_gguf_u32(const struct cm_gguf *gguf, const char *key, uint32_t *ret_value,
                           struct cm_error *err)
{
    const struct key *found;
    struct cm_cursor cursor;
    enum cm_status status = key_get(gguf, key, CM_GGUF_VALUE_U32, &found, &cursor, err);
    if (status == CM_OK) {
        *ret_value = cm_cursor_u32(&cursor);
    }
    return status;
}

enum cm_status cm_gguf_f32(const struct cm_gguf *gguf, const char *key, float *ret_value,
                           struct cm_error *err)
{
    const struct key *found;
    struct cm_cursor cursor;
    enum cm_status status = key_get(gguf, key, CM_GGUF_VALUE_F32, &found, &cursor, err);
    if (status == CM_OK) {
        *ret_value = cm_cursor_f32(&cursor);
    }
    return status;
}

enum cm_status cm_gguf_bool(const struct cm_gguf *gguf, const char *key, bool *ret_value,
                            struct cm_error *err)
{
    const struct key *found;
    struct cm_cursor cursor;
    enum cm_status status = key_get(gguf, key, CM_GGUF_VALUE_BOOL, &found, &cursor, err);
    if (status == CM_OK) {
        *ret_value = cm_cursor_u8(&cursor) != 0;
    }
    return status;
}

enum cm_status cm_gguf_text(const struct cm_gguf *gguf, const char *key,
                            struct cm_source_text *ret_text, struct cm_error *err)
{
    const struct key *found;
    struct cm_cursor cursor;
    enum cm_status status = key_get(gguf, key, CM_GGUF_VALUE_STRING, &found, &cursor, err);
    if (status == CM_OK) {
        *ret_text = cm_gguf_next_text(&cursor);
    }
    return status;
}

enum cm_status cm_gguf_array(const struct cm_gguf *gguf, const char *key, enum cm_gguf_value type,
                             struct cm_cursor *ret_cursor, uint64_t *ret_count,
                             struct cm_error *err)
{
    const struct key *found;
    struct cm_cursor cursor;
    enum cm_status status = key_get(gguf, key, CM_GGUF_VALUE_ARRAY, &found, &cursor, err);
    if (status == CM_OK && found->element != (uint32_t)type) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TYPE",
                              "GGUF at offset %zu: array '%s' has elements of type %u, expected %d",
                              found->offset, key, found->element, (int)type);
    }
    if (status == CM_OK) {
        *ret_cursor = cursor;
        *ret_count = found->count;
    }
    return status;
}
