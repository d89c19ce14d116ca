/* Binding a model: a weight that is no number is refused by its tensor's name, wherever it lies. */
#include "tests/unit/tiny_device.h"

#include <math.h>

#include "kernels/cpu/cpu_internal.h"

static enum cm_status bind(void)
{
    struct cm_device *device = device_load(1, 1, 32, 32);
    enum cm_status status = cm_device_model_bind(device, &model, &err);
    cm_device_close(device);
    return status;
}

TestSuite(kernels_bind, .init = model_make);

/* One value of one tensor is replaced; refused by name, and taken again when it is back. */
static void planted(const struct cm_tensor *tensor, uint64_t at, const void *value, size_t size)
{
    uint8_t kept[4];
    memcpy(kept, payload + at, size);
    memcpy(payload + at, value, size);
    cr_assert_eq(bind(), CM_E_PACKAGE, "%s at %lu", tensor->name, at);
    cr_assert_str_eq(err.id, "CM-DEV-TENSOR");
    cr_assert_not_null(strstr(err.text, tensor->name), "%s", err.text);
    memcpy(payload + at, kept, size);
}

Test(kernels_bind, a_scale_that_is_nan_or_infinite_is_refused_by_name)
{
    static const uint16_t bad[] = {0x7c00, 0xfc00, 0x7e00, 0xffff, 0x7c01};
    static const uint16_t good[] = {0x7bff, 0xfbff, 0x0000, 0x8000, 0x03ff};
    const struct cm_tensor *tensors[] = {&model.embedding, &layer.tensors[CM_LAYER_DOWN]};
    for (size_t t = 0; t < 2; t++) {
        const uint64_t from = tensors[t]->scale_offset,
                       halves = (tensors[t]->offset + tensors[t]->bytes - from) / 2;
        const uint64_t places[] = {0, 1, 2, 3, 4, halves / 2, halves - 2, halves - 1};
        for (size_t p = 0; p < sizeof(places) / sizeof(places[0]); p++) {
            planted(tensors[t], from + 2 * places[p], &bad[p % 5], sizeof(bad[0]));
        }
    }
    cr_assert_eq(bind(), CM_OK, "%s", err.text);
    for (size_t i = 0; i < 5; i++) { /* the greatest, the least and zero are numbers */
        memcpy(payload + model.embedding.scale_offset + 2 * i, &good[i], sizeof(good[i]));
    }
    cr_assert_eq(bind(), CM_OK, "%s", err.text);
}

Test(kernels_bind, a_bf16_weight_that_is_nan_or_infinite_is_refused_by_name)
{
    static const uint16_t bad[] = {0x7f80, 0xff80, 0x7fc0, 0xffff, 0x7f81};
    static const uint16_t good[] = {0x7f7f, 0xff7f, 0x0000, 0x8000, 0x7c00};
    attention_kind = ffn_kind = CM_TENSOR_BF16;
    model_make();
    const struct cm_tensor *tensors[] = {&model.embedding, &layer.tensors[CM_LAYER_DOWN]};
    for (size_t t = 0; t < 2; t++) {
        const uint64_t weights = tensors[t]->bytes / 2;
        const uint64_t places[] = {0, 1, 2, 3, weights / 2, weights - 2, weights - 1};
        for (size_t p = 0; p < sizeof(places) / sizeof(places[0]); p++) {
            planted(tensors[t], tensors[t]->offset + 2 * places[p], &bad[p % 5], sizeof(bad[0]));
        }
    }
    for (size_t i = 0; i < 5; i++) {
        memcpy(payload + model.embedding.offset + 2 * i, &good[i], sizeof(good[i]));
    }
    cr_assert_eq(bind(), CM_OK, "%s", err.text);
}

Test(kernels_bind, bf16_that_was_not_reserved_for_is_refused)
{
    attention_kind = CM_TENSOR_BF16;
    model_make();
    const struct cm_tensor kept = layer.tensors[CM_LAYER_QKV], embedding = model.embedding,
                           out = layer.tensors[CM_LAYER_ATTENTION_OUT];
    model.embedding.kind = layer.tensors[CM_LAYER_QKV].kind =
        layer.tensors[CM_LAYER_ATTENTION_OUT].kind = CM_TENSOR_U8S;
    struct cm_device *device = device_load(1, 1, 32, 32);
    model.embedding = embedding;
    layer.tensors[CM_LAYER_QKV] = kept;
    layer.tensors[CM_LAYER_ATTENTION_OUT] = out;
    cr_assert_eq(cm_device_model_bind(device, &model, &err), CM_E_PACKAGE);
    cr_assert_not_null(strstr(err.text, "reserved for had none"), "%s", err.text);
    cm_device_close(device);
}

Test(kernels_bind, each_kind_of_quants_is_taken_and_no_other_kind)
{
#define KIND(kind) kind,
    static const uint32_t good[] = {CM_QUANT_KINDS(KIND)};
    static const uint32_t bad[] = {CM_TENSOR_NONE, CM_TENSOR_F32, CM_TENSOR_F16,
                                   CM_TENSOR_KIND_COUNT, UINT32_MAX};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        attention_kind = ffn_kind = good[i];
        model_make();
        cr_assert_eq(bind(), CM_OK, "%s", err.text);
        /* Its planes are not those of another kind, but for U4 and U5 with as many scales. */
        struct cm_tensor *tensor = &layer.tensors[CM_LAYER_DOWN];
        for (size_t k = 0; k < sizeof(good) / sizeof(good[0]); k++) {
            tensor->kind = good[k];
            cr_assert_eq(bind(), k == i ? CM_OK : CM_E_PACKAGE, "%u as %u", good[i], good[k]);
        }
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct cm_tensor *tensor = &layer.tensors[CM_LAYER_DOWN];
        uint64_t quant = 0, scale = 0;
        tensor->kind = bad[i];
        if (cm_tensor_layout(bad[i], tensor->rows, tensor->columns, &quant, &scale)) {
            tensor->bytes = quant; /* of a right size, where that kind has one */
        }
        cr_assert_eq(bind(), CM_E_PACKAGE, "kind %u", bad[i]);
        cr_assert_str_eq(err.id, "CM-DEV-TENSOR");
        cr_assert_not_null(strstr(err.text, "down"), "%s", err.text);
    }
}

Test(kernels_bind, a_norm_that_is_nan_or_infinite_is_refused_by_name)
{
    static const uint32_t bad[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001};
    for (size_t i = 0; i < 4; i++) {
        planted(&model.out_norm, model.out_norm.offset + 4 * (i * 21), &bad[i], sizeof(bad[0]));
        planted(&layer.tensors[CM_LAYER_FFN_NORM],
                layer.tensors[CM_LAYER_FFN_NORM].offset + 4 * (63 - i), &bad[i], sizeof(bad[0]));
    }
    cr_assert_eq(bind(), CM_OK, "%s", err.text);
}

/* The tables are filled in parts by several threads: each value is the definition's. */
static void tables_compare(const float *factors)
{
    struct cm_device *device;
    model.rope_factors = factors;
    for (uint32_t threads = 1; threads <= 3; threads++) {
        const struct cm_device_options options = {.threads = threads};
        const struct cm_device_cipher cipher = {segment_copy, NULL};
        const struct cm_device_reserve reserve = {.model = &model,
                                                  .payload_bytes = payload_bytes,
                                                  .segment_bytes = SEGMENT_BYTES,
                                                  .slots = 1,
                                                  .kv_pages = 1,
                                                  .context_max = 101,
                                                  .step_tokens_max = 32};
        cr_assert_eq(cm_device_open("cpu", &options, &device, &err), CM_OK);
        cr_assert_eq(cm_device_reserve(device, &reserve, &err), CM_OK);
        cr_assert_eq(cm_device_segment_submit(device, &cipher, 0, payload, payload_bytes, &err),
                     CM_OK);
        cr_assert_eq(cm_device_load_finish(device, &err), CM_OK);
        cr_assert_eq(cm_device_model_bind(device, &model, &err), CM_OK, "%s", err.text);
        for (uint32_t t = 0; t < 101; t++) {
            for (uint32_t i = 0; i < 16; i++) {
                double turn =
                    pow(10000.0, -2.0 * i / 32) / (factors != NULL ? (double)factors[i] : 1.0);
                turn *= (double)t;
                cr_assert_eq(device->cosine[t * 16 + i], (float)cos(turn), "%u %u", t, i);
                cr_assert_eq(device->sine[t * 16 + i], (float)sin(turn), "%u %u", t, i);
            }
        }
        cm_device_close(device);
    }
}

Test(kernels_bind, rope_tables_are_the_definition_rounded_once)
{
    float factors[16];
    for (uint32_t i = 0; i < 16; i++) {
        factors[i] = 1.0f + (float)i * 0.37f;
    }
    tables_compare(NULL);
    tables_compare(factors);
}
