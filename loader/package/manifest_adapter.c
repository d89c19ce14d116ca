/* The manifest of an adapter. It is read by a worker that serves: nothing is allocated. */
#include "loader/package/manifest_internal.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ADAPTER_BYTES (CM_DIGEST_BYTES + 10u * 4u)

_Static_assert(CM_MANIFEST_ADAPTER_ROLES <= 32, "roles of a layer are bits of a word");

struct parser {
    struct cm_manifest_adapter *adapter;
    struct cm_manifest_tensor *tensors;
    uint32_t room;
    uint64_t payload_bytes, payload_used;
};

static bool within(uint32_t value, uint32_t least, uint32_t greatest)
{
    return value >= least && value <= greatest;
}

static const char *name_parse(struct parser *parser, struct cm_cursor *body)
{
    return cm_manifest_name_read(body, &parser->adapter->name)
               ? NULL
               : "adapter's name is not [A-Za-z0-9._-]{1,63}";
}

static const char *license_parse(struct parser *parser, struct cm_cursor *body)
{
    return cm_manifest_text_read(body, &parser->adapter->license) ? NULL
                                                                  : "text is too long or not UTF-8";
}

static const char *origin_parse(struct parser *parser, struct cm_cursor *body)
{
    return cm_manifest_text_read(body, &parser->adapter->origin) ? NULL
                                                                 : "text is too long or not UTF-8";
}

static const char *adapter_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest_adapter *a = parser->adapter;
    const uint8_t *digest = cm_cursor_take(body, CM_DIGEST_BYTES);
    if (!cm_cursor_ok(body)) {
        return "record has the wrong size";
    }
    memcpy(a->base_digest, digest, CM_DIGEST_BYTES);
    a->rank = cm_cursor_u32(body);
    a->scale = cm_cursor_f32(body);
    a->rounding = cm_cursor_f32(body);
    a->layers = cm_cursor_u32(body);
    a->width = cm_cursor_u32(body);
    a->heads = cm_cursor_u32(body);
    a->kv_heads = cm_cursor_u32(body);
    a->head_width = cm_cursor_u32(body);
    a->rope_width = cm_cursor_u32(body);
    a->ffn_width = cm_cursor_u32(body);
    if (!within(a->rank, 1, CM_MANIFEST_ADAPTER_RANK_MAX) || !isfinite(a->scale) ||
        a->scale <= 0.0f || !isfinite(a->rounding) || signbit(a->rounding)) {
        return "rank, scale or rounding is impossible";
    }
    if (!within(a->layers, 1, CM_MANIFEST_LAYERS_MAX) || !within(a->width, 32, 1u << 17) ||
        !within(a->heads, 1, 1024) || !within(a->kv_heads, 1, a->heads) ||
        a->heads % a->kv_heads != 0 || !within(a->head_width, 2, 1024) || a->head_width % 2 != 0 ||
        !within(a->rope_width, 2, a->head_width) || a->rope_width % 2 != 0 ||
        !within(a->ffn_width, 16, 1u << 18)) {
        return "shape is out of bounds";
    }
    return NULL;
}

/* B follows its A. */
static bool pair_follows(const struct cm_manifest_tensor *before,
                         const struct cm_manifest_tensor *tensor)
{
    if (tensor->role % 2 == 1) {
        return before != NULL && before->layer == tensor->layer && before->role + 1 == tensor->role;
    }
    return before == NULL || (before->role % 2 == 1 &&
                              (before->layer < tensor->layer ||
                               (before->layer == tensor->layer && before->role < tensor->role)));
}

static const char *tensor_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest_adapter *a = parser->adapter;
    if (a->tensor_count >= parser->room) {
        return "too many tensors";
    }
    struct cm_manifest_tensor *tensor = &parser->tensors[a->tensor_count];
    const char *refusal =
        cm_manifest_tensor_read(body, parser->payload_bytes, &parser->payload_used, tensor);
    if (refusal != NULL) {
        return refusal;
    }
    if (tensor->layer >= a->layers || tensor->role >= CM_MANIFEST_ADAPTER_ROLES) {
        return "tensor of a layer or a role that does not exist";
    }
    if (!pair_follows(a->tensor_count > 0 ? tensor - 1 : NULL, tensor)) {
        return "tensors are out of order, or half of a pair is missing";
    }
    a->tensor_count++;
    return NULL;
}

static const struct {
    uint16_t tag;
    const char *(*parse)(struct parser *parser, struct cm_cursor *body);
} records[] = {
    {TAG_NAME, name_parse},       {TAG_LICENSE, license_parse}, {TAG_ORIGIN, origin_parse},
    {TAG_ADAPTER, adapter_parse}, {TAG_TENSOR, tensor_parse}, /* the last one repeats */
};
#define RECORD_COUNT (sizeof(records) / sizeof(records[0]))

static enum cm_status refuse(struct cm_error *err, uint16_t tag, size_t at, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-MANIFEST",
                        "manifest record %u at offset %zu: %s", tag, at, what);
}

static enum cm_status records_parse(struct parser *parser, struct cm_cursor *cursor,
                                    struct cm_error *err)
{
    uint16_t tag = 0;
    size_t row = 0;
    while (cm_cursor_left(cursor) > 0) {
        size_t at = cursor->offset;
        struct cm_cursor body;
        if (!cm_manifest_record_read(cursor, &tag, &body)) {
            return refuse(err, tag, at, "record is cut or malformed");
        }
        if (tag == TAG_SHAPE) {
            return refuse(err, tag, at, "the package holds a model, and an adapter is wanted");
        }
        if (tag != records[row].tag) {
            return refuse(err, tag, at, "unknown, missing, repeated or out of order");
        }
        const char *refusal = records[row].parse(parser, &body);
        if (refusal == NULL && (!cm_cursor_ok(&body) || cm_cursor_left(&body) != 0)) {
            refusal = "record has the wrong size";
        }
        if (refusal != NULL) {
            return refuse(err, tag, at, refusal);
        }
        row += row + 1 < RECORD_COUNT ? 1 : 0;
    }
    return parser->adapter->tensor_count > 0 && parser->adapter->tensor_count % 2 == 0
               ? CM_OK
               : refuse(err, tag, cursor->offset, "the manifest ends too early");
}

bool cm_manifest_is_adapter(const uint8_t *bytes, size_t size)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, size), body;
    uint16_t tag = 0;
    while (tag < TAG_SHAPE && cm_cursor_left(&cursor) > 0 &&
           cm_manifest_record_read(&cursor, &tag, &body)) {
    }
    return tag == TAG_ADAPTER;
}

enum cm_status cm_manifest_adapter_parse(const uint8_t *bytes, size_t size, uint64_t payload_bytes,
                                         struct cm_manifest_tensor *tensors, uint32_t room,
                                         struct cm_manifest_adapter *ret_adapter,
                                         struct cm_error *err)
{
    struct cm_manifest_adapter adapter = {.tensors = tensors};
    struct parser parser = {
        .adapter = &adapter, .tensors = tensors, .room = room, .payload_bytes = payload_bytes};
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    enum cm_status status = records_parse(&parser, &cursor, err);
    if (status == CM_OK) {
        *ret_adapter = adapter;
    }
    return status;
}

enum cm_status cm_manifest_adapter_encode(const struct cm_manifest_adapter *adapter,
                                          uint8_t **ret_bytes, size_t *ret_size,
                                          struct cm_error *err)
{
    const uint32_t shape[] = {adapter->layers,   adapter->width,      adapter->heads,
                              adapter->kv_heads, adapter->head_width, adapter->rope_width,
                              adapter->ffn_width};
    size_t size = 4096 + (size_t)adapter->name.size + adapter->license.size + adapter->origin.size +
                  (size_t)adapter->tensor_count * (TENSOR_FIXED_BYTES + 8 + 64);
    uint8_t *bytes = malloc(size);
    if (bytes == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "manifest of %zu bytes", size);
    }
    struct cm_writer writer = cm_writer_init(bytes, size);
    cm_manifest_text_put(&writer, TAG_NAME, &adapter->name);
    cm_manifest_text_put(&writer, TAG_LICENSE, &adapter->license);
    cm_manifest_text_put(&writer, TAG_ORIGIN, &adapter->origin);
    cm_manifest_record_put(&writer, TAG_ADAPTER, ADAPTER_BYTES);
    cm_writer_bytes(&writer, adapter->base_digest, CM_DIGEST_BYTES);
    cm_writer_u32(&writer, adapter->rank);
    cm_manifest_f32_put(&writer, adapter->scale);
    cm_manifest_f32_put(&writer, adapter->rounding);
    for (size_t i = 0; i < sizeof(shape) / sizeof(shape[0]); i++) {
        cm_writer_u32(&writer, shape[i]);
    }
    cm_manifest_tensors_put(&writer, adapter->tensors, adapter->tensor_count);
    if (writer.failed) {
        free(bytes);
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-MANIFEST", "a manifest text is too long");
    }
    *ret_bytes = bytes;
    *ret_size = writer.offset;
    return CM_OK;
}
