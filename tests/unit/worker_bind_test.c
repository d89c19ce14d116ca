/* A model's manifest on its way to the device: parser, worker, device. Each tensor record of each
 * kind of weights is taken as the packer writes it, and with a wrong number it is refused by name.
 */
#include <stddef.h>

#include "runtime/worker/bind.h"
#include "tests/unit/mutate.h"
#include "tests/unit/tiny_device.h"

#define TENSORS   8u
#define MUTATIONS 2000

static struct cm_manifest_tensor tensors[TENSORS];
static struct cm_manifest manifest;
static const uint32_t kinds[] = {CM_TENSOR_U4A,  CM_TENSOR_U4S, CM_TENSOR_U8S,
                                 CM_TENSOR_BF16, CM_TENSOR_U5A, CM_TENSOR_U5S};

static struct cm_manifest_tensor record_of(const struct cm_tensor *tensor, uint32_t at_layer,
                                           uint32_t role)
{
    return (struct cm_manifest_tensor){.name = {tensor->name, (uint32_t)strlen(tensor->name)},
                                       .layer = at_layer,
                                       .role = role,
                                       .kind = tensor->kind,
                                       .rows = tensor->rows,
                                       .columns = tensor->columns,
                                       .offset = tensor->offset,
                                       .scale_offset = tensor->scale_offset,
                                       .bytes = tensor->bytes};
}

/* The tiny device's model with matrices of `kind`, as a manifest: its payload's order. */
static void manifest_make(uint32_t kind)
{
    static const uint32_t roles[] = {CM_LAYER_ATTENTION_NORM, CM_LAYER_QKV,
                                     CM_LAYER_ATTENTION_OUT,  CM_LAYER_FFN_NORM,
                                     CM_LAYER_GATE_UP,        CM_LAYER_DOWN};
    static uint8_t types[VOCABULARY];
    static const uint32_t no_merges[2];
    attention_kind = ffn_kind = kind;
    model_make();
    memset(types, CM_TOKEN_NORMAL, sizeof(types));
    tensors[0] = record_of(&model.embedding, CM_MANIFEST_NO_LAYER, CM_GLOBAL_EMBEDDING);
    tensors[1] = record_of(&model.out_norm, CM_MANIFEST_NO_LAYER, CM_GLOBAL_OUT_NORM);
    for (uint32_t i = 0; i < 6; i++) {
        tensors[2 + i] = record_of(&layer.tensors[roles[i]], 0, roles[i]);
    }
    manifest = (struct cm_manifest){.model_name = {"tiny", 4},
                                    .architecture = CM_ARCH_LLAMA,
                                    .vocabulary = model.vocabulary,
                                    .width = model.width,
                                    .layers = model.layers,
                                    .heads = model.heads,
                                    .kv_heads = model.kv_heads,
                                    .head_width = model.head_width,
                                    .rope_width = model.rope_width,
                                    .ffn_width = model.ffn_width,
                                    .context_max = model.context_max,
                                    .rope_base = model.rope_base,
                                    .norm_epsilon = model.norm_epsilon,
                                    .tied_head = model.tied_head,
                                    .tokenizer = CM_TOKENIZER_BYTE_BPE,
                                    .split = CM_SPLIT_GPT2,
                                    .end_token_count = 1,
                                    .token_offsets = token_offsets,
                                    .token_bytes = token_bytes,
                                    .token_types = types,
                                    .merges = no_merges,
                                    .tensors = tensors,
                                    .tensor_count = TENSORS};
}

/* Sealed as it is, then parsed, made and bound. */
static enum cm_status taken(void)
{
    struct cm_manifest parsed;
    struct cm_worker_model made;
    uint8_t *bytes;
    size_t size;
    cr_assert_eq(cm_manifest_encode(&manifest, &bytes, &size, &err), CM_OK, "%s", err.text);
    enum cm_status status = cm_manifest_parse(bytes, size, payload_bytes, &parsed, &err);
    if (status == CM_OK) {
        status = cm_worker_model_make(&parsed, 0, &made, &err);
        if (status == CM_OK) {
            struct cm_device *device = device_load(1, 1, 32, 32);
            status = cm_device_model_bind(device, &made.model, &err);
            cm_device_close(device);
            cm_worker_model_done(&made);
        }
        cm_manifest_done(&parsed);
    }
    free(bytes);
    return status;
}

static void refused(const struct cm_manifest_tensor *tensor, const char *id, const char *says)
{
    cr_assert_eq(taken(), CM_E_PACKAGE, "kind %u of %s: %s", tensor->kind, tensor->name.bytes,
                 says);
    cr_assert_str_eq(err.id, id, "kind %u: %s", tensor->kind, err.text);
    cr_assert_not_null(strstr(err.text, says), "%s", err.text);
}

/* One record with each number wrong by the least that matters. */
static void record_break(struct cm_manifest_tensor *tensor)
{
    const struct cm_manifest_tensor kept = *tensor;
    const char *name = kept.name.bytes;
    const uint64_t end = kept.offset + kept.bytes;
    const struct {
        const char *id, *says;
        struct cm_manifest_tensor with;
    } rows[] = {
#define WITH(field, value)                                                                         \
    ({                                                                                             \
        struct cm_manifest_tensor with = kept;                                                     \
        with.field = (value);                                                                      \
        with;                                                                                      \
    })
        {"CM-DEV-TENSOR", name, WITH(rows, kept.rows + 1)},
        {"CM-DEV-TENSOR", name, WITH(rows, kept.rows - 1)},
        {"CM-DEV-TENSOR", name, WITH(columns, kept.columns + 32)},
        {"CM-DEV-TENSOR", name, WITH(columns, 0)},
        {"CM-DEV-TENSOR", name, WITH(bytes, kept.bytes - 1)},
        {"CM-DEV-TENSOR", name, WITH(bytes, kept.bytes - 32)},
        {"CM-DEV-TENSOR", name, WITH(kind, CM_TENSOR_F16)},
        {"CM-DEV-TENSOR", name, WITH(kind, CM_TENSOR_KIND_COUNT)},
        {"CM-DEV-TENSOR", name, WITH(kind, UINT32_MAX)},
        {"CM-DEV-TENSOR", name, WITH(scale_offset, kept.offset + 16)},
        {"CM-WRK-TENSOR", name, WITH(kind, CM_TENSOR_NONE)},
        {"CM-WRK-TENSOR", name, WITH(role, CM_LAYER_ROLE_COUNT)},
        {"CM-PKG-MANIFEST", "layer that does not exist", WITH(layer, 1)},
        {"CM-PKG-MANIFEST", "not aligned", WITH(offset, kept.offset + 32)},
        {"CM-PKG-MANIFEST", "overlaps", WITH(offset, kept.offset - 4096)},
        {"CM-PKG-MANIFEST", "outside the payload", WITH(offset, ~(uint64_t)4095)},
        {"CM-PKG-MANIFEST", "outside the payload", WITH(scale_offset, end)},
        {"CM-PKG-MANIFEST", "outside the payload", WITH(bytes, payload_bytes)},
        {"CM-PKG-MANIFEST", "outside the payload", WITH(bytes, 0)},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        *tensor = rows[i].with;
        refused(tensor, rows[i].id, rows[i].says);
    }
    *tensor = kept;
}

Test(worker_bind, a_wrong_number_in_a_record_of_any_kind_is_refused_by_name)
{
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        manifest_make(kinds[i]);
        cr_assert_eq(taken(), CM_OK, "kind %u: %s", kinds[i], err.text);
        record_break(&tensors[3]); /* Q, K and V */
        record_break(&tensors[7]); /* down: the last */
        cr_assert_eq(taken(), CM_OK, "kind %u: %s", kinds[i], err.text);
    }
}

/* LongRoPE's factors by the context that is served: the long ones where it is longer, by one. */
Test(worker_bind, factors_by_context)
{
    static const struct {
        uint32_t context_max, original;
        bool is_long;
    } rows[] = {{0, 100, true},
                {100, 100, false},
                {101, 100, true},
                {0, CONTEXT - 1, true},
                {CONTEXT - 1, CONTEXT - 1, false},
                {1u << 20, 100, true}};
    manifest_make(CM_TENSOR_U8S);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct cm_worker_model made;
        manifest.rope_long_context = rows[i].original;
        cr_assert_eq(cm_worker_model_make(&manifest, rows[i].context_max, &made, &err), CM_OK);
        cr_assert_eq(made.model.rope_factors, rows[i].is_long ? manifest.rope_long_factors : NULL,
                     "row %zu", i);
        cm_worker_model_done(&made);
    }
}

/* A kind's planes under another kind's number, though their bytes are made to fit it. */
Test(worker_bind, no_kind_is_read_as_another)
{
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
            manifest_make(kinds[i]);
            tensors[7].kind = kinds[k];
            cr_assert_eq(taken() == CM_OK, i == k, "%u as %u", kinds[i], kinds[k]);
        }
    }
}

/* Numbers changed as an attacker would who can seal: what is taken lies where its kind says. */
Test(worker_bind, mutated_records)
{
    static const struct {
        size_t offset, size;
    } fields[] = {
        {offsetof(struct cm_manifest_tensor, kind), 4},
        {offsetof(struct cm_manifest_tensor, rows), 4},
        {offsetof(struct cm_manifest_tensor, columns), 4},
        {offsetof(struct cm_manifest_tensor, layer), 4},
        {offsetof(struct cm_manifest_tensor, role), 4},
        {offsetof(struct cm_manifest_tensor, offset), 8},
        {offsetof(struct cm_manifest_tensor, scale_offset), 8},
        {offsetof(struct cm_manifest_tensor, bytes), 8},
    };
    unsigned accepted = 0;
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        manifest_make(kinds[i]);
        srand((unsigned)i);
        for (unsigned n = 0; n < MUTATIONS; n++) {
            struct cm_manifest_tensor kept[TENSORS];
            memcpy(kept, tensors, sizeof(kept));
            for (int k = 0; k <= rand() % 3; k++) {
                uint8_t *record = (uint8_t *)&tensors[(size_t)rand() % TENSORS];
                const size_t row = (size_t)rand() % (sizeof(fields) / sizeof(fields[0]));
                value_mutate(record + fields[row].offset, fields[row].size);
            }
            enum cm_status status = taken();
            cr_assert(status == CM_OK || status == CM_E_PACKAGE, "%s: %s", err.id, err.text);
            for (uint32_t t = 0; status == CM_OK && t < TENSORS; t++) {
                uint64_t quant, scale;
                cr_assert(cm_tensor_layout(tensors[t].kind, kept[t].rows, kept[t].columns, &quant,
                                           &scale));
                cr_assert_eq(tensors[t].bytes, quant + scale);
                cr_assert_leq(tensors[t].offset + tensors[t].bytes, payload_bytes);
            }
            accepted += status == CM_OK;
            memcpy(tensors, kept, sizeof(kept));
        }
    }
    cr_assert_lt(accepted, sizeof(kinds) / sizeof(kinds[0]) * MUTATIONS / 4);
    printf("worker_bind: %zu records mutated, %u as good as before\n",
           sizeof(kinds) / sizeof(kinds[0]) * MUTATIONS, accepted);
}
