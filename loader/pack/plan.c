/* The plan: hyper-parameters, the tensors of a llama, and their places in the payload. */
#include "loader/pack/plan.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/model.h"

/* One stored tensor of a layer (or of none) and the GGUF tensors that it is made of. */
static const struct {
    uint32_t role;
    enum cm_plan_weave weave;
    const char *parts[3];
} layer_rows[] = {
    {CM_LAYER_ATTENTION_NORM, CM_WEAVE_CONCATENATE, {"attn_norm"}},
    {CM_LAYER_QKV, CM_WEAVE_CONCATENATE, {"attn_q", "attn_k", "attn_v"}},
    {CM_LAYER_ATTENTION_OUT, CM_WEAVE_CONCATENATE, {"attn_output"}},
    {CM_LAYER_FFN_NORM, CM_WEAVE_CONCATENATE, {"ffn_norm"}},
    {CM_LAYER_GATE_UP, CM_WEAVE_ALTERNATE_TILES, {"ffn_gate", "ffn_up"}},
    {CM_LAYER_DOWN, CM_WEAVE_CONCATENATE, {"ffn_down"}},
};

static bool type_is_vector(uint32_t role, uint32_t layer)
{
    return layer == CM_MANIFEST_NO_LAYER
               ? role == CM_GLOBAL_OUT_NORM
               : role == CM_LAYER_ATTENTION_NORM || role == CM_LAYER_FFN_NORM;
}

uint32_t cm_plan_kind(const struct cm_plan_source *source)
{
    uint32_t type = source->tensors[0]->type;
    for (uint32_t i = 1; i < source->count; i++) {
        if (source->tensors[i]->type != type) {
            return CM_TENSOR_U8S;
        }
    }
    return type == CM_GGUF_Q4_1 ? CM_TENSOR_U4A
                                : (type == CM_GGUF_Q4_0 ? CM_TENSOR_U4S : CM_TENSOR_U8S);
}

/* Rows and columns that this model must have at a role. */
static void shape_expect(const struct cm_manifest *m, uint32_t layer, uint32_t role,
                         uint32_t *ret_rows, uint32_t *ret_columns)
{
    const uint32_t attention = m->heads * m->head_width;
    const uint32_t rows[CM_LAYER_ROLE_COUNT] = {
        m->width, attention + 2 * m->kv_heads * m->head_width, m->width, m->width, 2 * m->ffn_width,
        m->width};
    const uint32_t columns[CM_LAYER_ROLE_COUNT] = {1, m->width, attention,
                                                   1, m->width, m->ffn_width};
    if (layer == CM_MANIFEST_NO_LAYER) {
        *ret_rows = role == CM_GLOBAL_OUT_NORM ? m->width : m->vocabulary;
        *ret_columns = role == CM_GLOBAL_OUT_NORM ? 1 : m->width;
    } else {
        *ret_rows = rows[role];
        *ret_columns = columns[role];
    }
}

/* Append one stored tensor to the plan. */
static enum cm_status tensor_add(struct cm_plan *plan, const char *name, uint32_t layer,
                                 uint32_t role, const struct cm_plan_source *source,
                                 struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    uint64_t rows = 0, quant, scale;
    uint32_t want_rows, want_columns;
    bool vector = type_is_vector(role, layer);
    uint64_t columns = vector ? 1 : source->tensors[0]->columns;
    for (uint32_t i = 0; i < source->count; i++) {
        const struct cm_gguf_tensor *part = source->tensors[i];
        bool fits = vector ? part->rows == 1 : part->columns == columns;
        rows += vector ? part->columns : part->rows;
        if (!fits) {
            rows = 0;
        }
    }
    shape_expect(m, layer, role, &want_rows, &want_columns);
    if (rows != want_rows || columns != want_columns) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE",
                            "GGUF tensor '%s' has %llu rows of %llu, this model needs %u of %u",
                            name, (unsigned long long)rows, (unsigned long long)columns, want_rows,
                            want_columns);
    }
    uint32_t kind = vector ? (uint32_t)CM_TENSOR_F32 : cm_plan_kind(source);
    if (!cm_tensor_layout(kind, rows, columns, &quant, &scale)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE", "GGUF tensor '%s' is too large",
                            name);
    }
    uint32_t index = m->tensor_count++;
    snprintf(plan->tensor_names[index], 64, "%s", name);
    uint64_t offset =
        (plan->payload_bytes + CM_TENSOR_ALIGN - 1) / CM_TENSOR_ALIGN * CM_TENSOR_ALIGN;
    plan->tensors[index] = (struct cm_manifest_tensor){
        .name = {plan->tensor_names[index], (uint32_t)strlen(plan->tensor_names[index])},
        .layer = layer,
        .role = role,
        .kind = kind,
        .rows = want_rows,
        .columns = want_columns,
        .offset = offset,
        .scale_offset = scale > 0 ? offset + quant : 0,
        .bytes = quant + scale};
    plan->sources[index] = *source;
    plan->payload_bytes = offset + quant + scale;
    return CM_OK;
}

static enum cm_status part_find(const struct cm_gguf *gguf, const char *name,
                                const struct cm_gguf_tensor **ret_tensor, struct cm_error *err)
{
    *ret_tensor = cm_gguf_tensor_find(gguf, name);
    return *ret_tensor != NULL ? CM_OK
                               : cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TENSOR",
                                              "GGUF: tensor '%s' is missing", name);
}

static enum cm_status global_add(const struct cm_gguf *gguf, struct cm_plan *plan, const char *name,
                                 uint32_t role, struct cm_error *err)
{
    struct cm_plan_source source = {.count = 1};
    enum cm_status status = part_find(gguf, name, &source.tensors[0], err);
    return status == CM_OK ? tensor_add(plan, name, CM_MANIFEST_NO_LAYER, role, &source, err)
                           : status;
}

static enum cm_status layer_add(const struct cm_gguf *gguf, struct cm_plan *plan, uint32_t layer,
                                struct cm_error *err)
{
    for (size_t row = 0; row < sizeof(layer_rows) / sizeof(layer_rows[0]); row++) {
        struct cm_plan_source source = {.weave = layer_rows[row].weave};
        char name[64];
        enum cm_status status = CM_OK;
        for (uint32_t i = 0; status == CM_OK && i < 3 && layer_rows[row].parts[i] != NULL; i++) {
            snprintf(name, sizeof(name), "blk.%u.%s.weight", layer, layer_rows[row].parts[i]);
            status = part_find(gguf, name, &source.tensors[source.count++], err);
        }
        if (status == CM_OK) {
            snprintf(name, sizeof(name), "blk.%u.%s.weight", layer, layer_rows[row].parts[0]);
            status = tensor_add(plan, name, layer, layer_rows[row].role, &source, err);
        }
        if (status != CM_OK) {
            return status;
        }
    }
    return CM_OK;
}

/* A tensor that nothing uses would be a silent change of the model. */
static enum cm_status tensors_all_used(const struct cm_gguf *gguf, const struct cm_plan *plan,
                                       struct cm_error *err)
{
    uint32_t used = 0;
    for (uint32_t i = 0; i < plan->manifest.tensor_count; i++) {
        used += plan->sources[i].count;
    }
    for (uint32_t i = 0; used != cm_gguf_tensor_count(gguf) && i < cm_gguf_tensor_count(gguf);
         i++) {
        const struct cm_gguf_tensor *tensor = cm_gguf_tensor(gguf, i);
        bool found = false;
        for (uint32_t k = 0; !found && k < plan->manifest.tensor_count; k++) {
            for (uint32_t p = 0; p < plan->sources[k].count; p++) {
                found = found || plan->sources[k].tensors[p] == tensor;
            }
        }
        if (!found) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TENSOR",
                                "GGUF: tensor '%.*s' is not part of a llama that this host runs",
                                (int)tensor->name.size, tensor->name.bytes);
        }
    }
    return CM_OK;
}

static enum cm_status tensors_plan(const struct cm_gguf *gguf, struct cm_plan *plan,
                                   struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    size_t room = (size_t)m->layers * CM_LAYER_ROLE_COUNT + 3;
    plan->tensors = calloc(room, sizeof(*plan->tensors));
    plan->sources = calloc(room, sizeof(*plan->sources));
    plan->tensor_names = calloc(room, sizeof(*plan->tensor_names));
    if (plan->tensors == NULL || plan->sources == NULL || plan->tensor_names == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "plan");
    }
    m->tensors = plan->tensors;
    m->tied_head = cm_gguf_tensor_find(gguf, "output.weight") == NULL;
    enum cm_status status = global_add(gguf, plan, "token_embd.weight", CM_GLOBAL_EMBEDDING, err);
    for (uint32_t layer = 0; status == CM_OK && layer < m->layers; layer++) {
        status = layer_add(gguf, plan, layer, err);
    }
    if (status == CM_OK) {
        status = global_add(gguf, plan, "output_norm.weight", CM_GLOBAL_OUT_NORM, err);
    }
    if (status == CM_OK && !m->tied_head) {
        status = global_add(gguf, plan, "output.weight", CM_GLOBAL_HEAD, err);
    }
    return status == CM_OK ? tensors_all_used(gguf, plan, err) : status;
}

static enum cm_status shape_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                 struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    const struct {
        const char *key;
        uint32_t *value;
        uint32_t greatest;
    } rows[] = {{"llama.embedding_length", &m->width, 1u << 17},
                {"llama.block_count", &m->layers, CM_MANIFEST_LAYERS_MAX},
                {"llama.attention.head_count", &m->heads, 1024},
                {"llama.feed_forward_length", &m->ffn_width, 1u << 18},
                {"llama.context_length", &m->context_max, 1u << 22},
                {"llama.attention.head_count_kv", &m->kv_heads, 1024},
                {"llama.rope.dimension_count", &m->rope_width, 1024}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        enum cm_status status = cm_gguf_u32(gguf, rows[i].key, rows[i].value, err);
        if (status != CM_OK) {
            return status;
        }
        if (*rows[i].value == 0 || *rows[i].value > rows[i].greatest) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE",
                                "GGUF: key '%s' is %u, expected 1 to %u", rows[i].key,
                                *rows[i].value, rows[i].greatest);
        }
    }
    m->head_width = m->width / m->heads;
    m->rope_base = 10000.0f;
    enum cm_status status =
        cm_gguf_f32(gguf, "llama.attention.layer_norm_rms_epsilon", &m->norm_epsilon, err);
    if (status == CM_OK && cm_gguf_has(gguf, "llama.rope.freq_base")) {
        status = cm_gguf_f32(gguf, "llama.rope.freq_base", &m->rope_base, err);
    }
    if (status == CM_OK && cm_gguf_has(gguf, "llama.rope.scaling.type")) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                              "GGUF: key 'llama.rope.scaling.type': scaled RoPE is not supported");
    }
    if (status == CM_OK && (m->width % m->heads != 0 || m->heads % m->kv_heads != 0 ||
                            m->ffn_width % CM_TILE_ROWS != 0)) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE",
                              "GGUF: width %u, heads %u, KV heads %u, FFN width %u do not divide",
                              m->width, m->heads, m->kv_heads, m->ffn_width);
    }
    return status;
}

/* A served name: [A-Za-z0-9._-], the rest becomes '-'. */
static void name_make(struct cm_plan *plan, struct cm_gguf_text from)
{
    size_t size = from.size < 63 ? from.size : 63;
    for (size_t i = 0; i < size; i++) {
        char c = from.bytes[i];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                     c == '.' || c == '_' || c == '-';
        plan->name[i] = plain ? c : '-';
    }
    plan->manifest.model_name = (struct cm_manifest_text){plan->name, (uint32_t)size};
}

static enum cm_status texts_read(const struct cm_gguf *gguf, const struct cm_plan_options *options,
                                 struct cm_plan *plan, struct cm_error *err)
{
    struct cm_gguf_text text = {"model", 5};
    enum cm_status status = CM_OK;
    if (options->name != NULL) {
        text = (struct cm_gguf_text){options->name, strlen(options->name)};
    } else if (cm_gguf_has(gguf, "general.name")) {
        status = cm_gguf_text(gguf, "general.name", &text, err);
    }
    name_make(plan, text);
    text = (struct cm_gguf_text){"", 0};
    if (status == CM_OK && cm_gguf_has(gguf, "general.license")) {
        status = cm_gguf_text(gguf, "general.license", &text, err);
    }
    plan->manifest.license =
        (struct cm_manifest_text){text.bytes, (uint32_t)(text.size < 4096 ? text.size : 4096)};
    if (options->origin != NULL) {
        plan->manifest.origin =
            (struct cm_manifest_text){options->origin, (uint32_t)strlen(options->origin)};
    } else {
        plan->manifest.origin = (struct cm_manifest_text){"", 0};
    }
    return status;
}

/* Nothing is sealed that the host's reader would refuse: its limits are the reader's own. */
static enum cm_status readable_check(const struct cm_plan *plan, struct cm_error *err)
{
    uint8_t *bytes = NULL;
    size_t size;
    struct cm_manifest again;
    struct cm_error cause = {.text = ""};
    enum cm_status status = cm_manifest_encode(&plan->manifest, &bytes, &size, err);
    if (status != CM_OK) {
        return status;
    }
    status = cm_manifest_parse(bytes, size, plan->payload_bytes, &again, &cause);
    free(bytes);
    if (status == CM_OK) {
        cm_manifest_done(&again);
        return CM_OK;
    }
    return cm_error_set(err, status, "CM-GGUF-MODEL", "GGUF: no host could load this model: %s",
                        cause.text);
}

enum cm_status cm_plan_make(const struct cm_gguf *gguf, const struct cm_plan_options *options,
                            struct cm_plan *ret_plan, struct cm_error *err)
{
    struct cm_plan plan = {.payload_bytes = 0};
    struct cm_gguf_text architecture;
    enum cm_status status = cm_gguf_text(gguf, "general.architecture", &architecture, err);
    if (status == CM_OK &&
        (architecture.size != 5 || memcmp(architecture.bytes, "llama", 5) != 0)) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ARCHITECTURE",
                              "GGUF: architecture '%.*s' is not supported; this host runs: llama",
                              (int)(architecture.size < 64 ? architecture.size : 64),
                              architecture.bytes);
    }
    plan.manifest.architecture = CM_ARCH_LLAMA;
    if (status == CM_OK) {
        status = shape_read(gguf, &plan, err);
    }
    if (status == CM_OK) {
        status = texts_read(gguf, options, &plan, err);
    }
    if (status == CM_OK) {
        status = cm_plan_vocabulary(gguf, &plan, err);
    }
    if (status == CM_OK) {
        status = cm_plan_chat(gguf, options, &plan, err);
    }
    if (status == CM_OK) {
        status = tensors_plan(gguf, &plan, err);
    }
    if (status == CM_OK) {
        status = readable_check(&plan, err);
    }
    if (status != CM_OK) {
        cm_plan_done(&plan);
        return status;
    }
    /* plan.name moves with the struct; the manifest must point into the caller's copy. */
    *ret_plan = plan;
    ret_plan->manifest.model_name.bytes = ret_plan->name;
    return CM_OK;
}

void cm_plan_done(struct cm_plan *plan)
{
    free(plan->sources);
    free(plan->tensors);
    free(plan->token_offsets);
    free(plan->token_bytes);
    free(plan->token_types);
    free(plan->merges);
    free(plan->tensor_names);
    free(plan->default_system);
    *plan = (struct cm_plan){.payload_bytes = 0};
}
