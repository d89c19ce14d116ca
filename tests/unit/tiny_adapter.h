/* Seeded adapters to the tiny model, and the way they get into a region. */
#ifndef CASEMATE_TESTS_UNIT_TINY_ADAPTER_H
#define CASEMATE_TESTS_UNIT_TINY_ADAPTER_H

#include "tests/unit/tiny_device.h"

#define ADAPTER_BYTES (16u * SEGMENT_BYTES)

/* What it is an adapter to; device and manifest call the parts of a shape alike. */
#define ADAPTER_SHAPE                                                                              \
    .layers = model.layers, .width = model.width, .heads = model.heads,                            \
    .kv_heads = model.kv_heads, .head_width = model.head_width, .rope_width = model.rope_width,    \
    .ffn_width = model.ffn_width

struct tiny_adapter {
    struct cm_adapter adapter;
    struct cm_adapter_layer layer;
    uint8_t payload[ADAPTER_BYTES];
    uint64_t payload_bytes;
};

static inline void factor_make(struct tiny_adapter *made, struct cm_tensor *tensor,
                               const char *name, uint32_t rows, uint32_t columns)
{
    uint64_t bytes, none;
    cr_assert(cm_tensor_layout(CM_TENSOR_F16, rows, columns, &bytes, &none));
    made->payload_bytes =
        (made->payload_bytes + CM_TENSOR_ALIGN - 1) / CM_TENSOR_ALIGN * CM_TENSOR_ALIGN;
    cr_assert_leq(made->payload_bytes + bytes, ADAPTER_BYTES);
    *tensor = (struct cm_tensor){.kind = CM_TENSOR_F16,
                                 .rows = rows,
                                 .columns = columns,
                                 .offset = made->payload_bytes,
                                 .bytes = bytes};
    snprintf(tensor->name, sizeof(tensor->name), "%s", name);
    for (uint64_t i = 0; i < bytes / 2; i++) {
        bool padding = i / (16 * (uint64_t)columns) * 16 + i % 16 >= rows;
        uint16_t half = (uint16_t)(0x2c00 + rand() % 0x400 + (rand() % 2) * 0x8000);
        half = padding ? 0 : half; /* else 1/16 to 1/8, or its negative */
        memcpy(made->payload + tensor->offset + 2 * i, &half, 2);
    }
    made->payload_bytes += bytes;
}

/* `targets`: bits by enum cm_adapter_target. */
static inline void adapter_make(struct tiny_adapter *made, uint32_t seed, uint32_t rank,
                                uint32_t targets)
{
    static const char *const names[] = {"q", "k", "v", "out", "gate", "up", "down"};
    const uint32_t rows[] = {64, 32, 32, 64, 64, 64, 64};
    memset(made, 0, sizeof(*made));
    srand(seed);
    for (uint32_t t = 0; t < CM_TARGET_COUNT; t++) {
        char name[16];
        if ((targets >> t & 1u) == 0) {
            continue;
        }
        snprintf(name, sizeof(name), "%s.a", names[t]);
        factor_make(made, &made->layer.a[t], name, rank, 64);
        snprintf(name, sizeof(name), "%s.b", names[t]);
        factor_make(made, &made->layer.b[t], name, rows[t], rank);
    }
    made->adapter = (struct cm_adapter){.rank = rank, .scale = 2.0f, ADAPTER_SHAPE};
}

static inline enum cm_status adapter_load(struct cm_device *device, uint32_t region,
                                          const struct tiny_adapter *made)
{
    const struct cm_device_cipher cipher = {segment_copy, NULL};
    struct cm_adapter adapter = made->adapter;
    enum cm_status status = CM_OK;
    adapter.layer = &made->layer; /* `made` may be a changed copy */
    for (uint64_t at = 0; status == CM_OK && at < made->payload_bytes; at += SEGMENT_BYTES) {
        uint64_t left = made->payload_bytes - at;
        status = cm_device_adapter_submit(device, &cipher, region, at / SEGMENT_BYTES,
                                          made->payload + at,
                                          left < SEGMENT_BYTES ? left : SEGMENT_BYTES, &err);
    }
    return status == CM_OK
               ? cm_device_adapter_bind(device, region, &adapter, made->payload_bytes, &err)
               : status;
}

#endif
