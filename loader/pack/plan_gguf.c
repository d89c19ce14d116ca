/* A plan from a GGUF file: its keys are the decoder's numbers. */
#include "loader/pack/plan.h"

#include <stdio.h>
#include <string.h>

struct keys {
    const struct cm_gguf *gguf;
    struct cm_source_text family; /* what keys begin with */
    char name[160];
};

static const char *key(struct keys *keys, const char *rest)
{
    snprintf(keys->name, sizeof(keys->name), "%.*s.%s", (int)keys->family.size, keys->family.bytes,
             rest);
    return keys->name;
}

/* A number in 1 … greatest. Optional ones keep their value where the key is missing. */
static enum cm_status number_read(struct keys *keys, const char *rest, bool optional,
                                  uint32_t greatest, uint32_t *value, struct cm_error *err)
{
    const char *name = key(keys, rest);
    if (optional && !cm_gguf_has(keys->gguf, name)) {
        return CM_OK;
    }
    enum cm_status status = cm_gguf_u32(keys->gguf, name, value, err);
    if (status == CM_OK && (*value == 0 || *value > greatest)) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE",
                              "GGUF: key '%s' is %u, expected 1 to %u", name, *value, greatest);
    }
    return status;
}

static enum cm_status real_read(struct keys *keys, const char *rest, float *value,
                                struct cm_error *err)
{
    const char *name = key(keys, rest);
    return cm_gguf_has(keys->gguf, name) ? cm_gguf_f32(keys->gguf, name, value, err) : CM_OK;
}

static enum cm_status numbers_read(struct keys *keys, struct cm_manifest *m, struct cm_error *err)
{
    struct {
        const char *key;
        bool optional;
        uint32_t greatest;
        uint32_t *value;
    } rows[] = {{"embedding_length", false, 1u << 17, &m->width},
                {"block_count", false, CM_MANIFEST_LAYERS_MAX, &m->layers},
                {"attention.head_count", false, 1024, &m->heads},
                {"feed_forward_length", false, 1u << 18, &m->ffn_width},
                {"context_length", false, 1u << 22, &m->context_max},
                {"attention.head_count_kv", true, 1024, &m->kv_heads},
                {"attention.key_length", true, 1024, &m->head_width},
                {"rope.dimension_count", true, 1024, &m->rope_width},
                {"attention.sliding_window", true, 1u << 22, &m->decoder.window}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        enum cm_status status =
            number_read(keys, rows[i].key, rows[i].optional, rows[i].greatest, rows[i].value, err);
        if (status != CM_OK) {
            return status;
        }
    }
    uint32_t value_width;
    m->kv_heads = m->kv_heads == 0 ? m->heads : m->kv_heads;
    m->head_width = m->head_width == 0 ? m->width / m->heads : m->head_width;
    m->rope_width = m->rope_width == 0 ? m->head_width : m->rope_width;
    value_width = m->head_width;
    enum cm_status status =
        number_read(keys, "attention.value_length", true, 1024, &value_width, err);
    if (status == CM_OK && value_width != m->head_width) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-SHAPE",
                              "GGUF: keys are %u wide and values %u: not supported", m->head_width,
                              value_width);
    }
    return status;
}

/* Linear scaling divides positions. */
static enum cm_status linear_read(struct keys *keys, struct cm_plan *plan, struct cm_error *err)
{
    float factor = 1.0f;
    enum cm_status status = real_read(keys, "rope.scaling.factor", &factor, err);
    if (status == CM_OK && !(factor >= 1.0f && factor <= 1024.0f)) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                              "GGUF: RoPE scaling factor %g is not in 1 … 1024", (double)factor);
    }
    plan->manifest.decoder.rope_scale = status == CM_OK && factor > 1.0f ? 1.0f / factor : 0.0f;
    return status;
}

/* attn_factor stands beside what follows from the factor. */
static enum cm_status yarn_read(struct keys *keys, struct cm_plan *plan, struct cm_error *err)
{
    static const char *const absent[] = {"rope.scaling.yarn_log_multiplier",
                                         "rope.scaling.yarn_ext_factor",
                                         "rope.scaling.yarn_attn_factor"};
    struct cm_rope_yarn numbers = {.factor = 0.0f};
    float attention = 1.0f;
    uint32_t context = 0;
    const struct {
        const char *key;
        float *value;
    } rows[] = {{"rope.scaling.factor", &numbers.factor},
                {"rope.scaling.attn_factor", &attention},
                {"rope.scaling.yarn_beta_fast", &numbers.fast},
                {"rope.scaling.yarn_beta_slow", &numbers.slow}};
    for (size_t i = 0; i < sizeof(absent) / sizeof(absent[0]); i++) {
        if (cm_gguf_has(keys->gguf, key(keys, absent[i]))) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                                "GGUF: key '%s' is not supported", keys->name);
        }
    }
    enum cm_status status =
        number_read(keys, "rope.scaling.original_context_length", true, 1u << 22, &context, err);
    for (size_t i = 0; status == CM_OK && i < sizeof(rows) / sizeof(rows[0]); i++) {
        status = real_read(keys, rows[i].key, rows[i].value, err);
    }
    numbers.context = (float)context;
    /* What is not positive is refused with the rest; 0 would mean that nothing was said. */
    numbers.attention =
        attention > 0.0f ? attention * cm_rope_yarn_attention(numbers.factor, 1.0f) : -1.0f;
    return status == CM_OK ? cm_rope_yarn(&numbers, plan, err) : status;
}

/* LongRoPE's factors are tensors, which are read with the others. Converters of Phi-3 leave the
 * type out. */
static enum cm_status long_read(struct keys *keys, struct cm_plan *plan, struct cm_error *err)
{
    const struct cm_source source = cm_gguf_tensors(keys->gguf);
    if (!cm_rope_tensors_long(&source)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "GGUF: RoPE scaled by 'longrope' without tensors of its factors");
    }
    enum cm_status status = number_read(keys, "rope.scaling.original_context_length", false,
                                        1u << 22, &plan->manifest.rope_long_context, err);
    plan->rope_attention = 1.0f;
    return status == CM_OK ? real_read(keys, "rope.scaling.attn_factor", &plan->rope_attention, err)
                           : status;
}

static enum cm_status rope_scaling_read(struct keys *keys, struct cm_plan *plan,
                                        struct cm_error *err)
{
    struct cm_source_text type;
    const struct cm_source source = cm_gguf_tensors(keys->gguf);
    if (!cm_gguf_has(keys->gguf, key(keys, "rope.scaling.type"))) {
        return cm_rope_tensors_long(&source) ? long_read(keys, plan, err) : CM_OK;
    }
    enum cm_status status = cm_gguf_text(keys->gguf, keys->name, &type, err);
    if (status == CM_OK && cm_source_text_is(type, "longrope")) {
        return long_read(keys, plan, err);
    }
    if (status == CM_OK && cm_rope_tensors_long(&source)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "GGUF: key '%s' is not 'longrope', and there are tensors of LongRoPE's "
                            "factors",
                            keys->name);
    }
    if (status != CM_OK || cm_source_text_is(type, "none")) {
        return status;
    }
    if (cm_source_text_is(type, "linear")) {
        return linear_read(keys, plan, err);
    }
    if (cm_source_text_is(type, "yarn")) {
        return yarn_read(keys, plan, err);
    }
    return cm_error_set(
        err, CM_E_PACKAGE, "CM-GGUF-ROPE",
        "GGUF: key '%s' is '%.*s'; RoPE scaled other than linear, by yarn or by longrope is "
        "not supported",
        keys->name, (int)(type.size < 32 ? type.size : 32), type.bytes);
}

static enum cm_status shape_read(struct keys *keys, struct cm_plan *plan, struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    enum cm_status status = numbers_read(keys, m, err);
    m->rope_base = 10000.0f;
    if (status == CM_OK) {
        status = cm_gguf_f32(keys->gguf, key(keys, "attention.layer_norm_rms_epsilon"),
                             &m->norm_epsilon, err);
    }
    const struct {
        const char *key;
        float *value;
    } rows[] = {{"rope.freq_base", &m->rope_base},
                {"rope.freq_base_swa", &m->decoder.window_rope_base},
                {"attn_logit_softcapping", &m->decoder.attention_cap},
                {"final_logit_softcapping", &m->decoder.logits_cap}};
    for (size_t i = 0; status == CM_OK && i < sizeof(rows) / sizeof(rows[0]); i++) {
        status = real_read(keys, rows[i].key, rows[i].value, err);
    }
    if (status == CM_OK) {
        status = rope_scaling_read(keys, plan, err);
    }
    return status == CM_OK ? cm_plan_shape_check(plan, err) : status;
}

static enum cm_status text_maybe(const struct cm_gguf *gguf, const char *name,
                                 struct cm_source_text *text, struct cm_error *err)
{
    return cm_gguf_has(gguf, name) ? cm_gguf_text(gguf, name, text, err) : CM_OK;
}

static enum cm_status texts_read(const struct cm_gguf *gguf, const struct cm_plan_options *options,
                                 struct cm_plan *plan, struct cm_error *err)
{
    struct cm_source_text name = {"model", 5}, license = {"", 0}, chat = {"", 0};
    enum cm_status status = text_maybe(gguf, "general.name", &name, err);
    if (status == CM_OK) {
        status = text_maybe(gguf, "general.license", &license, err);
    }
    if (status == CM_OK) {
        status = text_maybe(gguf, "tokenizer.chat_template", &chat, err);
    }
    if (status != CM_OK) {
        return status;
    }
    cm_plan_texts(options, name, license, plan);
    return cm_plan_chat(chat, options, plan, err);
}

enum cm_status cm_plan_make(const struct cm_gguf *gguf, const struct cm_plan_options *options,
                            struct cm_plan *ret_plan, struct cm_error *err)
{
    struct cm_plan plan = {.floats_kind = options->floats_kind};
    struct keys keys = {.gguf = gguf};
    struct cm_source source = cm_gguf_tensors(gguf);
    enum cm_status status = cm_gguf_text(gguf, "general.architecture", &keys.family, err);
    if (status == CM_OK) {
        status = cm_plan_family(keys.family, &plan, err);
    }
    if (status == CM_OK) {
        status = shape_read(&keys, &plan, err);
    }
    if (status == CM_OK) {
        status = cm_vocabulary_gguf(gguf, &plan, err);
    }
    if (status == CM_OK) {
        status = texts_read(gguf, options, &plan, err);
    }
    if (status == CM_OK) {
        status = cm_plan_tensors(&source, &plan, err);
    }
    return cm_plan_finish(status, &plan, ret_plan, err);
}
