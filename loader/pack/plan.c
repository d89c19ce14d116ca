/* The plan: which tensors a decoder is made of, and their places in the payload. */
#include "loader/pack/plan.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/model.h"
#include "loader/pack/quant.h"

/* One stored tensor of a layer and the source tensors that it is made of. */
static const struct layer_row {
    uint32_t role;
    enum cm_plan_weave weave;
    const char *parts[3];
    const char *fused; /* one tensor with all the parts' rows; NULL: there is no such form */
    const char *suffix;
    bool vector;
    uint32_t turned; /* so many of the parts are rows of heads that RoPE turns */
} layer_rows[] = {
    /* in the order of execution */
    {CM_LAYER_ATTENTION_NORM, CM_WEAVE_CONCATENATE, {"attn_norm"}, NULL, "weight", true, 0},
    {CM_LAYER_QKV,
     CM_WEAVE_CONCATENATE,
     {"attn_q", "attn_k", "attn_v"},
     "attn_qkv",
     "weight",
     false,
     2},
    {CM_LAYER_QKV_BIAS,
     CM_WEAVE_CONCATENATE,
     {"attn_q", "attn_k", "attn_v"},
     "attn_qkv",
     "bias",
     true,
     2},
    {CM_LAYER_Q_NORM, CM_WEAVE_CONCATENATE, {"attn_q_norm"}, NULL, "weight", true, 1},
    {CM_LAYER_K_NORM, CM_WEAVE_CONCATENATE, {"attn_k_norm"}, NULL, "weight", true, 1},
    {CM_LAYER_ATTENTION_OUT, CM_WEAVE_CONCATENATE, {"attn_output"}, NULL, "weight", false, 0},
    {CM_LAYER_POST_ATTENTION_NORM,
     CM_WEAVE_CONCATENATE,
     {"post_attention_norm"},
     NULL,
     "weight",
     true,
     0},
    {CM_LAYER_FFN_NORM, CM_WEAVE_CONCATENATE, {"ffn_norm"}, NULL, "weight", true, 0},
    {CM_LAYER_GATE_UP,
     CM_WEAVE_ALTERNATE_TILES,
     {"ffn_gate", "ffn_up"},
     "ffn_up",
     "weight",
     false,
     0},
    {CM_LAYER_DOWN, CM_WEAVE_CONCATENATE, {"ffn_down"}, NULL, "weight", false, 0},
    {CM_LAYER_POST_FFN_NORM, CM_WEAVE_CONCATENATE, {"post_ffw_norm"}, NULL, "weight", true, 0},
};
#define LAYER_ROWS (sizeof(layer_rows) / sizeof(layer_rows[0]))

/* Does this decoder have the tensor? */
static bool role_wanted(const struct cm_manifest_decoder *decoder, uint32_t role)
{
    switch (role) {
    case CM_LAYER_QKV_BIAS:
        return decoder->qkv_bias == 1;
    case CM_LAYER_Q_NORM:
    case CM_LAYER_K_NORM:
        return decoder->qk_norm == 1;
    case CM_LAYER_POST_ATTENTION_NORM:
    case CM_LAYER_POST_FFN_NORM:
        return decoder->post_norms == 1;
    default:
        return true;
    }
}

static const struct {
    const char *name; /* general.architecture of GGUF, model_type of config.json */
    uint32_t architecture;
    bool pairs_apart;
    struct cm_manifest_decoder decoder; /* what the file's keys do not say */
} families[] = {
    {"llama", CM_ARCH_LLAMA, false, {0}},
    {"mistral", CM_ARCH_MISTRAL, true, {0}},
    {"qwen2", CM_ARCH_QWEN2, true, {.qkv_bias = 1}},
    {"qwen3", CM_ARCH_QWEN3, true, {.qk_norm = 1}},
    {"gemma2",
     CM_ARCH_GEMMA2,
     true,
     {.activation = CM_MANIFEST_GELU, .post_norms = 1, .window_period = 2}},
    {"gemma3",
     CM_ARCH_GEMMA3,
     true,
     {.activation = CM_MANIFEST_GELU,
      .qk_norm = 1,
      .post_norms = 1,
      .window_period = 6,
      .window_rope_base = 10000.0f}},
    {"phi3", CM_ARCH_PHI3, true, {0}},
};

enum cm_status cm_plan_family(struct cm_source_text name, struct cm_plan *plan,
                              struct cm_error *err)
{
    for (size_t i = 0; i < sizeof(families) / sizeof(families[0]); i++) {
        if (cm_source_text_is(name, families[i].name)) {
            plan->manifest.architecture = families[i].architecture;
            plan->manifest.decoder = families[i].decoder;
            plan->pairs_apart = families[i].pairs_apart;
            return CM_OK;
        }
    }
    return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ARCHITECTURE",
                        "model: architecture '%.*s' is not supported; this host runs: llama, "
                        "mistral, qwen2, qwen3, gemma2, gemma3, phi3",
                        (int)(name.size < 64 ? name.size : 64), name.bytes);
}

/* Gemma's two largest models scale scores by width / heads, not by the head's width. */
static void gemma_finish(struct cm_manifest *m)
{
    bool largest = (m->architecture == CM_ARCH_GEMMA2 && m->layers == 46) ||
                   (m->architecture == CM_ARCH_GEMMA3 && m->layers == 62);
    m->decoder.embedding_scale = sqrtf((float)m->width);
    if (largest && m->decoder.attention_scale == 0.0f) {
        m->decoder.attention_scale = 1.0f / sqrtf((float)m->width / (float)m->heads);
    }
}

enum cm_status cm_plan_shape_check(struct cm_plan *plan, struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    struct cm_manifest_decoder *d = &m->decoder;
    if (m->architecture == CM_ARCH_GEMMA2 || m->architecture == CM_ARCH_GEMMA3) {
        gemma_finish(m);
    }
    if (d->window == 0 && d->window_period != 0) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-KEY",
                            "model: this architecture has layers with a window, and the file does "
                            "not say how wide it is");
    }
    if (d->window >= m->context_max && d->window_rope_base == 0.0f) { /* it hides nothing */
        d->window = d->window_period = 0;
    }
    if (plan->rope_attention > 0.0f) { /* of queries and of keys */
        float scale =
            d->attention_scale > 0.0f ? d->attention_scale : 1.0f / sqrtf((float)m->head_width);
        d->attention_scale = scale * plan->rope_attention * plan->rope_attention;
    }
    if (d->attention_scale == 1.0f / sqrtf((float)m->head_width)) {
        d->attention_scale = 0.0f;
    }
    if (m->heads % m->kv_heads != 0 || m->ffn_width % CM_TILE_ROWS != 0 ||
        m->width % CM_TILE_COLUMNS != 0 || m->ffn_width % CM_TILE_COLUMNS != 0 ||
        m->heads * m->head_width % CM_TILE_COLUMNS != 0 || m->rope_width > m->head_width) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE",
                            "model: width %u, heads %u of %u, KV heads %u, RoPE width %u, FFN "
                            "width %u do not divide",
                            m->width, m->heads, m->head_width, m->kv_heads, m->rope_width,
                            m->ffn_width);
    }
    return CM_OK;
}

/* A kind that quants of both fit into, or eight bits. */
static uint32_t kind_join(uint32_t a, uint32_t b)
{
    const struct cm_tile_shape first = cm_tile_shape(a), second = cm_tile_shape(b);
    if (first.affine != second.affine) {
        return CM_TENSOR_U8S;
    }
    return first.bits >= second.bits ? a : b;
}

/* A kind that all parts' quants fit into, else the one for floats, or eight bits. */
static uint32_t kind_choose(const struct cm_plan *plan, const struct cm_plan_source *source)
{
    uint32_t kind = CM_TENSOR_NONE;
    bool floats = true;
    for (uint32_t i = 0; i < source->count; i++) {
        const struct cm_quant *quant = cm_quant_find(source->parts[i].tensor->type);
        kind = i > 0 ? kind_join(kind, quant->kind) : quant->kind;
        floats = floats && quant->block == 1;
    }
    return floats && plan->floats_kind != CM_TENSOR_NONE ? plan->floats_kind : kind;
}

/* Rows and columns that this model must have at a role. */
static void shape_expect(const struct cm_manifest *m, uint32_t layer, uint32_t role,
                         uint32_t *ret_rows, uint32_t *ret_columns)
{
    const uint32_t attention = m->heads * m->head_width;
    const uint32_t qkv = attention + 2 * m->kv_heads * m->head_width;
    const uint32_t shapes[CM_LAYER_ROLE_COUNT][2] = {
        [CM_LAYER_ATTENTION_NORM] = {m->width, 1},
        [CM_LAYER_QKV] = {qkv, m->width},
        [CM_LAYER_ATTENTION_OUT] = {m->width, attention},
        [CM_LAYER_FFN_NORM] = {m->width, 1},
        [CM_LAYER_GATE_UP] = {2 * m->ffn_width, m->width},
        [CM_LAYER_DOWN] = {m->width, m->ffn_width},
        [CM_LAYER_QKV_BIAS] = {qkv, 1},
        [CM_LAYER_Q_NORM] = {m->head_width, 1},
        [CM_LAYER_K_NORM] = {m->head_width, 1},
        [CM_LAYER_POST_ATTENTION_NORM] = {m->width, 1},
        [CM_LAYER_POST_FFN_NORM] = {m->width, 1},
    };
    if (layer == CM_MANIFEST_NO_LAYER) {
        *ret_rows = role == CM_GLOBAL_OUT_NORM ? m->width : m->vocabulary;
        *ret_columns = role == CM_GLOBAL_OUT_NORM ? 1 : m->width;
    } else {
        *ret_rows = shapes[role][0];
        *ret_columns = shapes[role][1];
    }
}

/* Rows of all parts, or 0 if a part has another shape than the columns say. */
static uint64_t rows_count(const struct cm_plan_source *source, bool vector, uint64_t columns)
{
    uint64_t rows = 0;
    for (uint32_t i = 0; i < source->count; i++) {
        const struct cm_plan_part *part = &source->parts[i];
        const struct cm_source_tensor *tensor = part->tensor;
        uint64_t have = vector ? tensor->columns : tensor->rows;
        if ((vector ? tensor->rows != 1 : tensor->columns != columns) || part->first > have ||
            part->rows > have - part->first) {
            return 0;
        }
        rows += part->rows;
    }
    return rows;
}

/* Append one stored tensor to the plan. */
static enum cm_status tensor_add(struct cm_plan *plan, const char *name, uint32_t layer,
                                 uint32_t role, bool vector, const struct cm_plan_source *source,
                                 struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    uint64_t quant, scale;
    uint32_t want_rows, want_columns;
    uint64_t columns = vector ? 1 : source->parts[0].tensor->columns;
    uint64_t rows = rows_count(source, vector, columns);
    shape_expect(m, layer, role, &want_rows, &want_columns);
    if (rows != want_rows || columns != want_columns) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE",
                            "model: tensor '%s' has %llu rows of %llu, this model needs %u of %u",
                            name, (unsigned long long)rows, (unsigned long long)columns, want_rows,
                            want_columns);
    }
    uint32_t kind = vector ? (uint32_t)CM_TENSOR_F32 : kind_choose(plan, source);
    if (!cm_tensor_layout(kind, rows, columns, &quant, &scale)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE", "model: tensor '%s' is too large",
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

static enum cm_status refuse_missing(const char *name, struct cm_error *err)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TENSOR", "model: tensor '%s' is missing", name);
}

static enum cm_status global_add(const struct cm_source *from, struct cm_plan *plan,
                                 const char *name, uint32_t role, struct cm_error *err)
{
    const struct cm_source_tensor *tensor = cm_source_find(from, name);
    bool vector = role == CM_GLOBAL_OUT_NORM;
    if (tensor == NULL) {
        return refuse_missing(name, err);
    }
    struct cm_plan_source source = {.count = 1};
    source.parts[0] =
        (struct cm_plan_part){.tensor = tensor, .rows = vector ? tensor->columns : tensor->rows};
    return tensor_add(plan, name, CM_MANIFEST_NO_LAYER, role, vector, &source, err);
}

/* One tensor that holds the rows of all parts: Q, K and V, or gate and up. */
static void fused_split(const struct cm_manifest *m, const struct cm_source_tensor *tensor,
                        struct cm_plan_source *source)
{
    const uint64_t kv = (uint64_t)m->kv_heads * m->head_width;
    const uint64_t qkv[] = {(uint64_t)m->heads * m->head_width, kv, kv};
    uint64_t first = 0;
    for (uint32_t i = 0; i < source->count; i++) {
        uint64_t rows = source->count == 3 ? qkv[i] : m->ffn_width;
        source->parts[i].tensor = tensor;
        source->parts[i].first = first;
        source->parts[i].rows = rows;
        first += rows;
    }
}

static enum cm_status row_add(const struct cm_source *from, struct cm_plan *plan, uint32_t layer,
                              const struct layer_row *row, struct cm_error *err)
{
    struct cm_plan_source source = {.weave = row->weave};
    char first[64], name[64];
    snprintf(first, sizeof(first), "blk.%u.%s.%s", layer, row->parts[0], row->suffix);
    for (; source.count < 3 && row->parts[source.count] != NULL; source.count++) {
        struct cm_plan_part *part = &source.parts[source.count];
        snprintf(name, sizeof(name), "blk.%u.%s.%s", layer, row->parts[source.count], row->suffix);
        part->tensor = cm_source_find(from, name);
        part->turned = source.count < row->turned;
        if (part->tensor == NULL && (source.count > 0 || row->fused == NULL)) {
            return refuse_missing(name, err);
        }
        if (part->tensor != NULL) {
            part->rows = row->vector ? part->tensor->columns : part->tensor->rows;
        } else {
            snprintf(name, sizeof(name), "blk.%u.%s.%s", layer, row->fused, row->suffix);
            const struct cm_source_tensor *fused = cm_source_find(from, name);
            if (fused == NULL) {
                return refuse_missing(first, err);
            }
            while (source.count < 3 && row->parts[source.count] != NULL) {
                source.parts[source.count].turned = source.count < row->turned;
                source.count++;
            }
            fused_split(&plan->manifest, fused, &source);
            return tensor_add(plan, name, layer, row->role, row->vector, &source, err);
        }
    }
    return tensor_add(plan, first, layer, row->role, row->vector, &source, err);
}

/* A tensor that nothing uses would be a silent change of the model. */
static enum cm_status tensors_all_used(const struct cm_source *from, const struct cm_plan *plan,
                                       struct cm_error *err)
{
    bool *used = calloc(from->count + 1, sizeof(*used));
    if (used == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tensors");
    }
    for (uint32_t i = 0; i < plan->manifest.tensor_count; i++) {
        for (uint32_t p = 0; p < plan->sources[i].count; p++) {
            used[plan->sources[i].parts[p].tensor - from->tensors] = true;
        }
    }
    enum cm_status status = CM_OK;
    for (uint32_t i = 0; status == CM_OK && i < from->count; i++) {
        const struct cm_source_text *name = &from->tensors[i].name;
        if (!used[i] && !cm_rope_tensor_is(*name)) {
            status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TENSOR",
                                  "model: tensor '%.*s' is not part of a decoder that this host "
                                  "runs",
                                  (int)name->size, name->bytes);
        }
    }
    free(used);
    return status;
}

enum cm_status cm_plan_tensors(const struct cm_source *from, struct cm_plan *plan,
                               struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    size_t room = (size_t)m->layers * LAYER_ROWS + 3;
    plan->tensors = calloc(room, sizeof(*plan->tensors));
    plan->sources = calloc(room, sizeof(*plan->sources));
    plan->tensor_names = calloc(room, sizeof(*plan->tensor_names));
    if (plan->tensors == NULL || plan->sources == NULL || plan->tensor_names == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "plan");
    }
    m->tensors = plan->tensors;
    m->tied_head = cm_source_find(from, "output.weight") == NULL;
    enum cm_status status = cm_rope_tensors(from, plan, err);
    if (status == CM_OK) {
        status = global_add(from, plan, "token_embd.weight", CM_GLOBAL_EMBEDDING, err);
    }
    for (uint32_t layer = 0; layer < m->layers; layer++) {
        for (size_t row = 0; status == CM_OK && row < LAYER_ROWS; row++) {
            if (role_wanted(&m->decoder, layer_rows[row].role)) {
                status = row_add(from, plan, layer, &layer_rows[row], err);
            }
        }
    }
    if (status == CM_OK) {
        status = global_add(from, plan, "output_norm.weight", CM_GLOBAL_OUT_NORM, err);
    }
    if (status == CM_OK && !m->tied_head) {
        status = global_add(from, plan, "output.weight", CM_GLOBAL_HEAD, err);
    }
    return status == CM_OK ? tensors_all_used(from, plan, err) : status;
}

/* A served name: [A-Za-z0-9._-], the rest becomes '-'. */
static void name_make(struct cm_plan *plan, struct cm_source_text from)
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

void cm_plan_texts(const struct cm_plan_options *options, struct cm_source_text name,
                   struct cm_source_text license, struct cm_plan *plan)
{
    const char *origin = options->origin != NULL ? options->origin : "";
    if (options->name != NULL) {
        name = (struct cm_source_text){options->name, strlen(options->name)};
    }
    name_make(plan, name);
    plan->manifest.license = (struct cm_manifest_text){
        license.bytes, (uint32_t)(license.size < 4096 ? license.size : 4096)};
    plan->manifest.origin = (struct cm_manifest_text){origin, (uint32_t)strlen(origin)};
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
    return cm_error_set(err, status, "CM-GGUF-MODEL", "model: no host could load it: %s",
                        cause.text);
}

enum cm_status cm_plan_finish(enum cm_status status, struct cm_plan *plan, struct cm_plan *ret_plan,
                              struct cm_error *err)
{
    if (status == CM_OK) {
        status = readable_check(plan, err);
    }
    if (status != CM_OK) {
        cm_plan_done(plan);
        return status;
    }
    /* plan.name moves with the struct; the manifest must point into the caller's copy. */
    *ret_plan = *plan;
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
    free(plan->ranks);
    free(plan->tensor_names);
    free(plan->default_system);
    *plan = (struct cm_plan){.payload_bytes = 0};
}
