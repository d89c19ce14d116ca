/* A device with a tiny seeded model of one layer, whole in one page of source: for tests that need
 * real steps and real tokens, not a real model. A token's text is one character. */
#ifndef CASEMATE_TESTS_UNIT_TINY_DEVICE_H
#define CASEMATE_TESTS_UNIT_TINY_DEVICE_H

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/device.h"

#define VOCABULARY    64u
#define WIDTH         64u
#define CONTEXT       256u
#define SEGMENT_BYTES 4096u

static struct cm_layer layer;
static uint32_t token_offsets[VOCABULARY + 1];
static uint8_t token_bytes[VOCABULARY], token_control[VOCABULARY];
static struct cm_model model = {.vocabulary = VOCABULARY,
                                .width = WIDTH,
                                .layers = 1,
                                .heads = 2,
                                .kv_heads = 1,
                                .head_width = 32,
                                .rope_width = 32,
                                .ffn_width = 64,
                                .context_max = CONTEXT,
                                .rope_base = 10000,
                                .norm_epsilon = 1e-5f,
                                .tied_head = true,
                                .layer = &layer,
                                .token_offsets = token_offsets,
                                .token_bytes = token_bytes,
                                .token_control = token_control,
                                .end_tokens = {VOCABULARY - 1},
                                .end_token_count = 1};
static uint8_t payload[32 * SEGMENT_BYTES];
static uint64_t payload_bytes;
static enum cm_kv_kind kv_kind; /* of the devices to come */
static uint32_t attention_kind = CM_TENSOR_U8S, ffn_kind = CM_TENSOR_U8S; /* of the matrices */
static struct cm_error err;

static inline void tensor_make(struct cm_tensor *tensor, const char *name, uint32_t kind,
                               uint32_t rows, uint32_t columns)
{
    uint64_t quant, scale;
    cr_assert(cm_tensor_layout(kind, rows, columns, &quant, &scale));
    *tensor = (struct cm_tensor){.kind = kind,
                                 .rows = rows,
                                 .columns = columns,
                                 .offset = payload_bytes,
                                 .scale_offset = scale > 0 ? payload_bytes + quant : 0,
                                 .bytes = quant + scale};
    snprintf(tensor->name, sizeof(tensor->name), "%s", name);
    for (uint64_t i = 0; i < quant; i++) {
        payload[payload_bytes + i] = (uint8_t)rand();
    }
    for (uint64_t i = 0; i < scale / 2; i++) {
        uint16_t half = (uint16_t)(0x2000 + rand() % 0x400); /* 0.008 to 0.016 */
        memcpy(payload + payload_bytes + quant + 2 * i, &half, sizeof(half));
    }
    for (uint64_t i = 0; kind == CM_TENSOR_BF16 && i < quant / 2; i++) {
        uint16_t bits = (uint16_t)(0x3d00 + rand() % 0x100 + (rand() % 2 << 15)); /* 0.03 to 0.13 */
        memcpy(payload + payload_bytes + 2 * i, &bits, sizeof(bits));
    }
    for (uint64_t i = 0; kind == CM_TENSOR_F32 && i < rows; i++) {
        const float one = 1.0f;
        memcpy(payload + payload_bytes + 4 * i, &one, sizeof(one));
    }
    payload_bytes =
        (payload_bytes + quant + scale + CM_TENSOR_ALIGN - 1) / CM_TENSOR_ALIGN * CM_TENSOR_ALIGN;
    cr_assert_leq(payload_bytes, sizeof(payload));
}

static inline void model_make(void)
{
    struct cm_tensor *t = layer.tensors;
    srand(11);
    payload_bytes = 0;
    for (uint32_t i = 0; i < VOCABULARY; i++) {
        token_offsets[i + 1] = i + 1;
        token_bytes[i] = (uint8_t)('0' + i); /* a reply's text is its tokens */
    }
    tensor_make(&model.embedding, "embedding", attention_kind, VOCABULARY, WIDTH);
    tensor_make(&model.out_norm, "out_norm", CM_TENSOR_F32, WIDTH, 1);
    tensor_make(&t[CM_LAYER_ATTENTION_NORM], "attention_norm", CM_TENSOR_F32, WIDTH, 1);
    tensor_make(&t[CM_LAYER_QKV], "qkv", attention_kind, 128, WIDTH);
    tensor_make(&t[CM_LAYER_ATTENTION_OUT], "attention_out", attention_kind, WIDTH, 64);
    tensor_make(&t[CM_LAYER_FFN_NORM], "ffn_norm", CM_TENSOR_F32, WIDTH, 1);
    tensor_make(&t[CM_LAYER_GATE_UP], "gate_up", ffn_kind, 128, WIDTH);
    tensor_make(&t[CM_LAYER_DOWN], "down", ffn_kind, WIDTH, 64);
}

static inline enum cm_status segment_copy(void *context, uint64_t index, const uint8_t *ciphertext,
                                          size_t bytes, uint8_t *plaintext,
                                          struct cm_error *failure)
{
    (void)context;
    (void)index;
    (void)failure;
    memcpy(plaintext, ciphertext, bytes);
    return CM_OK;
}

/* All steps of a load; binding is the caller's. */
static inline struct cm_device *device_load_with(const struct cm_device_options *options,
                                                 const struct cm_device_reserve *reserve)
{
    struct cm_device *device;
    const struct cm_device_cipher cipher = {segment_copy, NULL};
    cr_assert_eq(cm_device_open("cpu", options, &device, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_device_reserve(device, reserve, &err), CM_OK, "%s", err.text);
    for (uint64_t i = 0; i * SEGMENT_BYTES < payload_bytes; i++) {
        cr_assert_eq(cm_device_segment_submit(device, &cipher, i, payload + i * SEGMENT_BYTES,
                                              SEGMENT_BYTES, &err),
                     CM_OK);
    }
    cr_assert_eq(cm_device_load_finish(device, &err), CM_OK, "%s", err.text);
    return device;
}

static inline struct cm_device_reserve reserve_of(uint32_t slots, uint32_t kv_pages,
                                                  uint32_t context_max, uint32_t step_tokens_max)
{
    return (struct cm_device_reserve){.model = &model,
                                      .payload_bytes = payload_bytes,
                                      .segment_bytes = SEGMENT_BYTES,
                                      .slots = slots,
                                      .kv_pages = kv_pages,
                                      .kv_kind = kv_kind,
                                      .context_max = context_max,
                                      .step_tokens_max = step_tokens_max};
}

static inline struct cm_device *device_load_by(const struct cm_device_options *options,
                                               uint32_t slots, uint32_t kv_pages,
                                               uint32_t context_max, uint32_t step_tokens_max)
{
    const struct cm_device_reserve reserve =
        reserve_of(slots, kv_pages, context_max, step_tokens_max);
    return device_load_with(options, &reserve);
}

static inline struct cm_device *device_load(uint32_t slots, uint32_t kv_pages, uint32_t context_max,
                                            uint32_t step_tokens_max)
{
    const struct cm_device_options options = {.threads = 1};
    return device_load_by(&options, slots, kv_pages, context_max, step_tokens_max);
}

#endif
