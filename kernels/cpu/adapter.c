/* Adapters: regions of the arena that are filled, bound and wiped while the device serves. */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>
#include <string.h>

struct cm_adapter_region *cm_adapter_region_of(struct cm_device *device, uint32_t region)
{
    return device->reserved && region >= 1 && region <= device->limits.adapters
               ? &device->regions[region - 1]
               : NULL;
}

static void region_wipe(struct cm_device *device, struct cm_adapter_region *region)
{
    const struct cm_device_reserve *limits = &device->limits;
    explicit_bzero(region->payload, limits->adapter_bytes);
    explicit_bzero(region->segment_seen, limits->adapter_bytes / limits->segment_bytes + 1);
    explicit_bzero(region->layers, device->model.layers * sizeof(*region->layers));
    region->bytes = 0;
    region->bound = false;
    region->rank = 0;
    region->scale = 0.0f;
}

/* ------------------------------------------------------------------ filling */

uint8_t *cm_device_adapter_place(struct cm_device *device, uint32_t number, uint64_t index)
{
    struct cm_adapter_region *region = cm_adapter_region_of(device, number);
    const struct cm_device_reserve *limits = &device->limits;
    return region != NULL && index < (limits->adapter_bytes + limits->segment_bytes - 1) /
                                         limits->segment_bytes
               ? region->payload + index * limits->segment_bytes
               : NULL;
}

/* Claim the segments that `bytes` from `index` on span. False: too many, or one came twice. */
static bool segments_claim(const struct cm_device *device, struct cm_adapter_region *region,
                           uint64_t index, size_t bytes)
{
    const uint64_t segment = device->limits.segment_bytes;
    const uint64_t left = device->limits.adapter_bytes - index * segment;
    if (bytes == 0 || bytes > left) {
        return false;
    }
    for (uint64_t i = index; i < index + (bytes + segment - 1) / segment; i++) {
        if (region->segment_seen[i] != 0) {
            return false;
        }
        region->segment_seen[i] = 1;
    }
    region->bytes += bytes;
    return true;
}

enum cm_status cm_device_adapter_submit(struct cm_device *device,
                                        const struct cm_device_cipher *cipher, uint32_t number,
                                        uint64_t index, const uint8_t *ciphertext, size_t bytes,
                                        struct cm_error *err)
{
    struct cm_adapter_region *region = cm_adapter_region_of(device, number);
    uint8_t *place = cm_device_adapter_place(device, number, index);
    if (device->poisoned || !device->bound || region == NULL || region->bound || region->failed) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "adapter segment %llu out of order",
                            (unsigned long long)index);
    }
    enum cm_status status;
    if (place == NULL || !segments_claim(device, region, index, bytes)) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-DEV-SEGMENT",
                              "adapter segment %llu came twice, or the adapter is larger than the "
                              "%llu bytes reserved for one",
                              (unsigned long long)index,
                              (unsigned long long)device->limits.adapter_bytes);
    } else {
        status = cipher->open(cipher->context, index, ciphertext, bytes, place, err);
    }
    if (status != CM_OK) {
        region_wipe(device, region);
        region->failed = true;
    }
    return status;
}

void cm_device_adapter_unbind(struct cm_device *device, uint32_t number)
{
    struct cm_adapter_region *region = cm_adapter_region_of(device, number);
    CM_ASSERT(region != NULL);
    for (uint32_t i = 0; i < device->limits.slots; i++) {
        CM_ASSERT(!device->slots[i].open || device->slots[i].adapter != number);
    }
    region_wipe(device, region);
    region->failed = false;
}

/* ------------------------------------------------------------------ binding */

static enum cm_status refuse(const struct cm_tensor *tensor, const char *what, struct cm_error *err)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-TENSOR",
                        "adapter tensor '%.63s' at payload offset %llu: %s", tensor->name,
                        (unsigned long long)tensor->offset, what);
}

static enum cm_status factor_bind(const struct cm_adapter_region *region, uint64_t payload_bytes,
                                  const struct cm_tensor *tensor, uint32_t rows, uint32_t columns,
                                  const uint16_t **ret_factor, struct cm_error *err)
{
    uint64_t bytes, none;
    if (tensor->kind != CM_TENSOR_F16 || tensor->rows != rows || tensor->columns != columns ||
        !cm_tensor_layout(tensor->kind, rows, columns, &bytes, &none)) {
        return refuse(tensor, "shape or kind is not what the model needs", err);
    }
    if (tensor->offset % CM_TENSOR_ALIGN != 0 || tensor->bytes != bytes ||
        tensor->offset > payload_bytes || bytes > payload_bytes - tensor->offset) {
        return refuse(tensor, "place is outside the payload", err);
    }
    if (!cm_halves_finite(region->payload + tensor->offset, bytes / 2)) {
        return refuse(tensor, "a value is NaN or infinite", err);
    }
    *ret_factor = (const uint16_t *)(const void *)(region->payload + tensor->offset);
    return CM_OK;
}

/* Rows and columns of W at each target. */
static void target_shapes(const struct cm_model *m, uint32_t shapes[CM_TARGET_COUNT][2])
{
    const uint32_t query = m->heads * m->head_width, kv = m->kv_heads * m->head_width;
    const uint32_t wanted[CM_TARGET_COUNT][2] = {[CM_TARGET_Q] = {query, m->width},
                                                 [CM_TARGET_K] = {kv, m->width},
                                                 [CM_TARGET_V] = {kv, m->width},
                                                 [CM_TARGET_ATTENTION_OUT] = {m->width, query},
                                                 [CM_TARGET_GATE] = {m->ffn_width, m->width},
                                                 [CM_TARGET_UP] = {m->ffn_width, m->width},
                                                 [CM_TARGET_DOWN] = {m->width, m->ffn_width}};
    memcpy(shapes, wanted, sizeof(wanted));
}

static enum cm_status layer_bind(const struct cm_device *device,
                                 const struct cm_adapter_region *region,
                                 const struct cm_adapter *adapter, uint64_t payload_bytes,
                                 uint32_t index, struct cm_error *err)
{
    const struct cm_adapter_layer *layer = &adapter->layer[index];
    uint32_t shapes[CM_TARGET_COUNT][2];
    enum cm_status status = CM_OK;
    target_shapes(&device->model, shapes);
    for (uint32_t t = 0; status == CM_OK && t < CM_TARGET_COUNT; t++) {
        const struct cm_tensor *a = &layer->a[t], *b = &layer->b[t];
        struct cm_low_rank *to = &region->layers[index][t];
        if (a->kind == CM_TENSOR_NONE && b->kind == CM_TENSOR_NONE) {
            continue;
        }
        status = factor_bind(region, payload_bytes, a, adapter->rank, shapes[t][1], &to->a, err);
        if (status == CM_OK) {
            status =
                factor_bind(region, payload_bytes, b, shapes[t][0], adapter->rank, &to->b, err);
        }
    }
    return status;
}

/* The shape says more than the tensors' sizes do: where heads begin, and what RoPE turns. */
static enum cm_status shape_check(const struct cm_device *device, const struct cm_adapter *a,
                                  struct cm_error *err)
{
    const struct cm_model *m = &device->model;
    if (a->layers != m->layers || a->width != m->width || a->heads != m->heads ||
        a->kv_heads != m->kv_heads || a->head_width != m->head_width ||
        a->rope_width != m->rope_width || a->ffn_width != m->ffn_width) {
        return cm_error_set(
            err, CM_E_PACKAGE, "CM-DEV-ADAPTER",
            "the adapter was made for another shape: layers %u, width %u, heads %u and %u of %u, "
            "RoPE %u, FFN %u; the model has %u, %u, %u and %u of %u, %u, %u",
            a->layers, a->width, a->heads, a->kv_heads, a->head_width, a->rope_width, a->ffn_width,
            m->layers, m->width, m->heads, m->kv_heads, m->head_width, m->rope_width, m->ffn_width);
    }
    if (a->rank < 1 || a->rank > device->limits.adapter_rank_max || !isfinite(a->scale)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-ADAPTER",
                            "the adapter's rank is %u, its scale %g; this device was reserved for "
                            "ranks from 1 to %u",
                            a->rank, (double)a->scale, device->limits.adapter_rank_max);
    }
    if (m->kv_heads * m->head_width % CM_TILE_ROWS != 0) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-ADAPTER",
                            "the model's K has %u rows, no multiple of 16: adapters do not fit it",
                            m->kv_heads * m->head_width);
    }
    return CM_OK;
}

static enum cm_status region_bind(struct cm_device *device, struct cm_adapter_region *region,
                                  const struct cm_adapter *adapter, uint64_t payload_bytes,
                                  struct cm_error *err)
{
    const uint64_t segment = device->limits.segment_bytes;
    if (region->bytes != payload_bytes) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-SEGMENT",
                            "%llu of the adapter's %llu bytes came",
                            (unsigned long long)region->bytes, (unsigned long long)payload_bytes);
    }
    for (uint64_t i = 0; i * segment < payload_bytes; i++) {
        if (region->segment_seen[i] == 0) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-SEGMENT",
                                "adapter segment %llu never came", (unsigned long long)i);
        }
    }
    enum cm_status status = shape_check(device, adapter, err);
    for (uint32_t i = 0; status == CM_OK && i < adapter->layers; i++) {
        status = layer_bind(device, region, adapter, payload_bytes, i, err);
    }
    return status;
}

enum cm_status cm_device_adapter_bind(struct cm_device *device, uint32_t number,
                                      const struct cm_adapter *adapter, uint64_t payload_bytes,
                                      struct cm_error *err)
{
    struct cm_adapter_region *region = cm_adapter_region_of(device, number);
    if (device->poisoned || !device->bound || region == NULL || region->bound || region->failed) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "adapter_bind out of order");
    }
    enum cm_status status = region_bind(device, region, adapter, payload_bytes, err);
    if (status != CM_OK) {
        region_wipe(device, region);
        region->failed = true;
        return status;
    }
    region->rank = adapter->rank;
    region->scale = adapter->scale;
    region->bound = true;
    return CM_OK;
}
