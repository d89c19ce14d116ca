/* config.json is the decoder's numbers; tensors get the names that GGUF gives them. */
#include "loader/pack/directory.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loader/pack/safetensors.h"

struct shard {
    int fd;
    struct cm_safetensors *file;
};

struct cm_directory {
    int fd;
    json_t *config, *tokenizer, *tokenizer_config;
    struct shard *shards;
    uint32_t shard_count;
    struct cm_source_tensor *tensors; /* of all shards, renamed */
    char (*names)[64];
    uint32_t tensor_count;
};

static enum cm_status refuse(struct cm_error *err, const char *file, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-DIR-MODEL", "model directory: %s: %s", file, what);
}

/* ------------------------------------------------------------------ files */

enum cm_status cm_directory_json(int folder, const char *name, bool optional, json_t **ret_value,
                                 struct cm_error *err)
{
    struct stat facts;
    json_error_t cause;
    int fd = openat(folder, name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 && optional && errno == ENOENT) {
        return CM_OK;
    }
    if (fd < 0 || fstat(fd, &facts) != 0 || facts.st_size > (off_t)CM_DIRECTORY_JSON_MAX) {
        int error_number = fd < 0 ? errno : EFBIG;
        if (fd >= 0) {
            close(fd);
        }
        return cm_error_errno(err, error_number, "CM-GGUF-READ", "model directory: cannot read %s",
                              name);
    }
    char *text = malloc((size_t)facts.st_size + 1);
    enum cm_status status = text != NULL
                                ? cm_source_bytes_read(fd, 0, text, (size_t)facts.st_size, err)
                                : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "%s", name);
    if (status == CM_OK) {
        *ret_value = json_loadb(text, (size_t)facts.st_size, JSON_REJECT_DUPLICATES, &cause);
        if (*ret_value == NULL || !json_is_object(*ret_value)) {
            status = refuse(err, name, *ret_value == NULL ? cause.text : "it is no object");
        }
    }
    free(text);
    close(fd);
    return status;
}

static enum cm_status shard_open(struct cm_directory *d, const char *name, struct cm_error *err)
{
    if (name == NULL || strchr(name, '/') != NULL || d->shard_count >= CM_DIRECTORY_SHARDS_MAX) {
        return refuse(err, "model.safetensors.index.json", "a shard's name is impossible");
    }
    struct shard *more = realloc(d->shards, (d->shard_count + 1) * sizeof(*more));
    if (more == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "shards");
    }
    d->shards = more;
    struct shard *shard = &d->shards[d->shard_count];
    *shard = (struct shard){.fd = openat(d->fd, name, O_RDONLY | O_CLOEXEC)};
    if (shard->fd < 0) {
        return cm_error_errno(err, errno, "CM-GGUF-READ", "model directory: cannot open %s", name);
    }
    d->shard_count++;
    return cm_safetensors_read(shard->fd, name, &shard->file, err);
}

/* One file, or those that the index names. */
static enum cm_status shards_open(struct cm_directory *d, struct cm_error *err)
{
    json_t *index = NULL, *seen = json_object();
    const char *tensor;
    json_t *file;
    if (faccessat(d->fd, "model.safetensors", F_OK, 0) == 0) {
        json_decref(seen);
        return shard_open(d, "model.safetensors", err);
    }
    enum cm_status status =
        cm_directory_json(d->fd, "model.safetensors.index.json", false, &index, err);
    json_object_foreach(json_object_get(index, "weight_map"), tensor, file)
    {
        const char *name = json_string_value(file);
        if (status == CM_OK && (name == NULL || json_object_get(seen, name) == NULL)) {
            status = shard_open(d, name, err);
            json_object_set_new(seen, name != NULL ? name : "", json_true());
        }
    }
    json_decref(seen);
    json_decref(index);
    return status;
}

/* ------------------------------------------------------------------ names */

static const struct {
    const char *name, *gguf;
    bool gemma; /* the row is for Gemma alone; it comes before the others' */
} layer_names[] = {
    {"post_attention_layernorm.weight", "post_attention_norm.weight", true},
    {"pre_feedforward_layernorm.weight", "ffn_norm.weight", true},
    {"post_feedforward_layernorm.weight", "post_ffw_norm.weight", true},
    {"input_layernorm.weight", "attn_norm.weight", false},
    {"self_attn.q_proj.weight", "attn_q.weight", false},
    {"self_attn.k_proj.weight", "attn_k.weight", false},
    {"self_attn.v_proj.weight", "attn_v.weight", false},
    {"self_attn.qkv_proj.weight", "attn_qkv.weight", false},
    {"self_attn.q_proj.bias", "attn_q.bias", false},
    {"self_attn.k_proj.bias", "attn_k.bias", false},
    {"self_attn.v_proj.bias", "attn_v.bias", false},
    {"self_attn.q_norm.weight", "attn_q_norm.weight", false},
    {"self_attn.k_norm.weight", "attn_k_norm.weight", false},
    {"self_attn.o_proj.weight", "attn_output.weight", false},
    {"post_attention_layernorm.weight", "ffn_norm.weight", false},
    {"mlp.gate_proj.weight", "ffn_gate.weight", false},
    {"mlp.up_proj.weight", "ffn_up.weight", false},
    {"mlp.gate_up_proj.weight", "ffn_up.weight", false},
    {"mlp.down_proj.weight", "ffn_down.weight", false},
};
static const struct {
    const char *name, *gguf;
} global_names[] = {{"model.embed_tokens.weight", "token_embd.weight"},
                    {"model.norm.weight", "output_norm.weight"},
                    {"lm_head.weight", "output.weight"}};

static bool name_make(const char *name, bool gemma, char ret[64])
{
    unsigned layer;
    int used = 0;
    for (size_t i = 0; i < sizeof(global_names) / sizeof(global_names[0]); i++) {
        if (strcmp(name, global_names[i].name) == 0) {
            snprintf(ret, 64, "%s", global_names[i].gguf);
            return true;
        }
    }
    if (sscanf(name, "model.layers.%4u.%n", &layer, &used) != 1 || used == 0) {
        return false;
    }
    for (size_t i = 0; i < sizeof(layer_names) / sizeof(layer_names[0]); i++) {
        if ((gemma || !layer_names[i].gemma) && strcmp(name + used, layer_names[i].name) == 0) {
            snprintf(ret, 64, "blk.%u.%s", layer, layer_names[i].gguf);
            return true;
        }
    }
    return false;
}

/* All shards' tensors under GGUF's names. A head beside a tied embedding is the embedding again. */
static enum cm_status tensors_name(struct cm_directory *d, bool gemma, bool tied,
                                   struct cm_error *err)
{
    uint32_t room = 1;
    for (uint32_t i = 0; i < d->shard_count; i++) {
        room += cm_safetensors_tensors(d->shards[i].file).count;
    }
    d->tensors = calloc(room, sizeof(*d->tensors));
    d->names = calloc(room, sizeof(*d->names));
    if (d->tensors == NULL || d->names == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tensors");
    }
    for (uint32_t i = 0; i < d->shard_count; i++) {
        struct cm_source source = cm_safetensors_tensors(d->shards[i].file);
        for (uint32_t k = 0; k < source.count; k++) {
            char *name = d->names[d->tensor_count];
            if (!name_make(source.tensors[k].name.bytes, gemma, name)) {
                return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TENSOR",
                                    "model: tensor '%.80s' is not part of a decoder that this "
                                    "host runs",
                                    source.tensors[k].name.bytes);
            }
            if (tied && strcmp(name, "output.weight") == 0) {
                continue;
            }
            const struct cm_source so_far = {d->tensors, d->tensor_count};
            if (cm_source_find(&so_far, name) != NULL) {
                return refuse(err, source.tensors[k].name.bytes, "two shards have it");
            }
            d->tensors[d->tensor_count] = source.tensors[k];
            d->tensors[d->tensor_count++].name = (struct cm_source_text){name, strlen(name)};
        }
    }
    return CM_OK;
}

/* ------------------------------------------------------------------ config.json */

/* A whole number in 1 … greatest. Optional ones that are missing or null keep their value. */
static enum cm_status number_read(const json_t *config, const char *key, bool optional,
                                  uint32_t greatest, uint32_t *value, struct cm_error *err)
{
    const json_t *found = json_object_get(config, key);
    if (optional && (found == NULL || json_is_null(found))) {
        return CM_OK;
    }
    json_int_t number = json_integer_value(found);
    if (!json_is_integer(found) || number < 1 || number > (json_int_t)greatest) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-DIR-CONFIG",
                            "config.json: '%s' must be a whole number from 1 to %u", key, greatest);
    }
    *value = (uint32_t)number;
    return CM_OK;
}

/* A number that is not negative; missing or null: *value stays. */
static enum cm_status real_read(const json_t *config, const char *key, float *value,
                                struct cm_error *err)
{
    const json_t *found = json_object_get(config, key);
    if (found == NULL || json_is_null(found)) {
        return CM_OK;
    }
    double number = json_number_value(found);
    if (!json_is_number(found) || !(number >= 0.0) || !isfinite((float)number)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-DIR-CONFIG",
                            "config.json: '%s' must be a number that is not negative", key);
    }
    *value = (float)number;
    return CM_OK;
}

static enum cm_status numbers_read(const json_t *config, struct cm_manifest *m,
                                   struct cm_error *err)
{
    struct {
        const char *key;
        bool optional;
        uint32_t greatest;
        uint32_t *value;
    } rows[] = {{"hidden_size", false, 1u << 17, &m->width},
                {"num_hidden_layers", false, CM_MANIFEST_LAYERS_MAX, &m->layers},
                {"num_attention_heads", false, 1024, &m->heads},
                {"intermediate_size", false, 1u << 18, &m->ffn_width},
                {"max_position_embeddings", false, 1u << 22, &m->context_max},
                {"num_key_value_heads", true, 1024, &m->kv_heads},
                {"head_dim", true, 1024, &m->head_width}};
    enum cm_status status = CM_OK;
    for (size_t i = 0; status == CM_OK && i < sizeof(rows) / sizeof(rows[0]); i++) {
        status = number_read(config, rows[i].key, rows[i].optional, rows[i].greatest, rows[i].value,
                             err);
    }
    if (status != CM_OK) {
        return status;
    }
    m->kv_heads = m->kv_heads == 0 ? m->heads : m->kv_heads;
    m->head_width = m->head_width == 0 ? m->width / m->heads : m->head_width;
    float part = 1.0f;
    status = real_read(config, "partial_rotary_factor", &part, err);
    m->rope_width = (uint32_t)((float)m->head_width * part);
    return status;
}

static enum cm_status llama3_read(const json_t *scaling, struct cm_manifest *m,
                                  struct cm_error *err)
{
    struct cm_rope_scaling numbers = {0};
    const struct {
        const char *key;
        float *value;
    } rows[] = {{"factor", &numbers.factor},
                {"low_freq_factor", &numbers.low},
                {"high_freq_factor", &numbers.high},
                {"original_max_position_embeddings", &numbers.context}};
    enum cm_status status = CM_OK;
    for (size_t i = 0; status == CM_OK && i < sizeof(rows) / sizeof(rows[0]); i++) {
        status = real_read(scaling, rows[i].key, rows[i].value, err);
    }
    return status == CM_OK ? cm_rope_llama3(&numbers, m, err) : status;
}

static enum cm_status yarn_read(const json_t *scaling, struct cm_plan *plan, struct cm_error *err)
{
    struct cm_rope_yarn numbers = {.between = json_is_false(json_object_get(scaling, "truncate"))};
    float weight = 0.0f, weight_all = 0.0f;
    const struct {
        const char *key;
        float *value;
    } rows[] = {{"factor", &numbers.factor},
                {"original_max_position_embeddings", &numbers.context},
                {"beta_fast", &numbers.fast},
                {"beta_slow", &numbers.slow},
                {"attention_factor", &numbers.attention},
                {"mscale", &weight},
                {"mscale_all_dim", &weight_all}};
    enum cm_status status = CM_OK;
    for (size_t i = 0; status == CM_OK && i < sizeof(rows) / sizeof(rows[0]); i++) {
        status = real_read(scaling, rows[i].key, rows[i].value, err);
    }
    if (numbers.attention == 0.0f && weight > 0.0f && weight_all > 0.0f) {
        numbers.attention = cm_rope_yarn_attention(numbers.factor, weight) /
                            cm_rope_yarn_attention(numbers.factor, weight_all);
    }
    return status == CM_OK ? cm_rope_yarn(&numbers, plan, err) : status;
}

/* One factor for each pair that RoPE turns. */
static enum cm_status factors_read(const json_t *scaling, const char *key, uint32_t count,
                                   float *ret_factors, struct cm_error *err)
{
    const json_t *found = json_object_get(scaling, key);
    bool ok = json_array_size(found) == count && count <= CM_MANIFEST_ROPE_PAIRS_MAX;
    for (uint32_t i = 0; ok && i < count; i++) {
        ok = json_is_number(json_array_get(found, i));
        ret_factors[i] = (float)json_number_value(json_array_get(found, i));
    }
    return ok ? CM_OK
              : cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                             "config.json: RoPE scaled by 'longrope': '%s' is not %u numbers, one "
                             "for each pair that RoPE turns",
                             key, count);
}

/* The context that the model was trained on stands beside rope_scaling, which counts, or within. */
static enum cm_status long_read(const json_t *config, const json_t *scaling, struct cm_plan *plan,
                                struct cm_error *err)
{
    static const char *const absent[] = {"short_mscale", "long_mscale"};
    static const char original[] = "original_max_position_embeddings";
    struct cm_manifest *m = &plan->manifest;
    const uint32_t count = m->rope_width / 2;
    float factor = 0.0f;
    for (size_t i = 0; i < sizeof(absent) / sizeof(absent[0]); i++) {
        if (json_object_get(scaling, absent[i]) != NULL) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                                "config.json: RoPE scaled by 'longrope' with '%s' is not supported",
                                absent[i]);
        }
    }
    enum cm_status status =
        number_read(scaling, original, true, 1u << 22, &m->rope_long_context, err);
    if (status == CM_OK) {
        status = number_read(config, original, true, 1u << 22, &m->rope_long_context, err);
    }
    if (status == CM_OK) {
        status = real_read(scaling, "factor", &factor, err);
    }
    if (status == CM_OK) {
        status = real_read(scaling, "attention_factor", &plan->rope_attention, err);
    }
    if (status == CM_OK) {
        status = factors_read(scaling, "short_factor", count, m->rope_factors, err);
    }
    if (status == CM_OK) {
        status = factors_read(scaling, "long_factor", count, m->rope_long_factors, err);
    }
    if (status == CM_OK && plan->rope_attention == 0.0f) {
        const double context = m->rope_long_context;
        plan->rope_attention = cm_rope_long_attention(
            factor > 0.0f ? (double)factor : m->context_max / context, context);
    }
    return status == CM_OK ? cm_rope_long(plan, err) : status;
}

/* rope_theta and rope_scaling, or the newer rope_parameters, which may differ by kind of layer. */
static enum cm_status rope_read(const json_t *config, struct cm_plan *plan, struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    const json_t *scaling = json_object_get(config, "rope_scaling");
    const json_t *all = json_object_get(config, "rope_parameters");
    const json_t *local = json_object_get(all, "sliding_attention");
    const json_t *whole = json_object_get(all, "full_attention");
    float factor = 0.0f;
    whole = whole != NULL ? whole : all;
    scaling = json_is_object(whole) ? whole : scaling;
    m->rope_base = 10000.0f;
    enum cm_status status = real_read(config, "rope_theta", &m->rope_base, err);
    if (status == CM_OK) {
        status = real_read(config, "rope_local_base_freq", &m->decoder.window_rope_base, err);
    }
    if (status == CM_OK) {
        status = real_read(whole, "rope_theta", &m->rope_base, err);
    }
    if (status == CM_OK) {
        status = real_read(local, "rope_theta", &m->decoder.window_rope_base, err);
    }
    const json_t *type = json_object_get(scaling, "rope_type");
    const char *name = json_string_value(type != NULL ? type : json_object_get(scaling, "type"));
    if (status != CM_OK || name == NULL || strcmp(name, "default") == 0) {
        return status;
    }
    if (strcmp(name, "llama3") == 0) {
        return llama3_read(scaling, m, err);
    }
    if (strcmp(name, "yarn") == 0) {
        return yarn_read(scaling, plan, err);
    }
    if (strcmp(name, "longrope") == 0 || strcmp(name, "su") == 0) { /* its first name */
        return long_read(config, scaling, plan, err);
    }
    status = real_read(scaling, "factor", &factor, err);
    if (status == CM_OK && (strcmp(name, "linear") != 0 || factor < 1.0f || factor > 1024.0f)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "config.json: RoPE scaled by '%.32s', factor %g, is not supported",
                            name, (double)factor);
    }
    m->decoder.rope_scale = factor > 1.0f ? 1.0f / factor : 0.0f;
    return status;
}

/* Which layers have a window: each n-th has none, in one of three spellings. */
static enum cm_status window_read(const json_t *config, struct cm_manifest *m, struct cm_error *err)
{
    struct cm_manifest_decoder *d = &m->decoder;
    const json_t *types = json_object_get(config, "layer_types");
    const bool qwen = m->architecture == CM_ARCH_QWEN2 || m->architecture == CM_ARCH_QWEN3;
    if (qwen) {
        return json_is_true(json_object_get(config, "use_sliding_window"))
                   ? refuse(err, "config.json", "use_sliding_window is not supported")
                   : CM_OK;
    }
    enum cm_status status = number_read(config, "sliding_window", true, 1u << 22, &d->window, err);
    const char *const keys[] = {"sliding_window_pattern", "_sliding_window_pattern"};
    for (size_t i = 0; status == CM_OK && i < 2; i++) {
        status = number_read(config, keys[i], true, CM_MANIFEST_LAYERS_MAX, &d->window_period, err);
    }
    for (size_t i = 0; status == CM_OK && i < json_array_size(types); i++) {
        const char *type = json_string_value(json_array_get(types, i));
        bool full = d->window == 0 || (d->window_period != 0 && (i + 1) % d->window_period == 0);
        if (type == NULL || strcmp(type, full ? "full_attention" : "sliding_attention") != 0) {
            status = refuse(err, "config.json", "layer_types are not every n-th one whole");
        }
    }
    return status;
}

/* What this host's decoders do not have must not be asked for. */
static enum cm_status rest_read(const json_t *config, struct cm_manifest *m, struct cm_error *err)
{
    static const char *const absent[] = {"attention_bias", "mlp_bias"};
    struct cm_manifest_decoder *d = &m->decoder;
    const bool gelu = d->activation == CM_MANIFEST_GELU;
    const json_t *given = json_object_get(config, "hidden_activation");
    given = json_is_string(given) ? given : json_object_get(config, "hidden_act");
    const char *activation = json_string_value(given);
    float query = 0.0f;
    if (activation != NULL && strcmp(activation, gelu ? "gelu_pytorch_tanh" : "silu") != 0) {
        return refuse(err, "config.json", "this activation is not supported");
    }
    for (size_t i = 0; i < sizeof(absent) / sizeof(absent[0]); i++) {
        if (json_is_true(json_object_get(config, absent[i]))) {
            return refuse(err, "config.json", "biases of this kind are not supported");
        }
    }
    enum cm_status status = real_read(config, "rms_norm_eps", &m->norm_epsilon, err);
    if (status == CM_OK) {
        status = real_read(config, "attn_logit_softcapping", &d->attention_cap, err);
    }
    if (status == CM_OK) {
        status = real_read(config, "final_logit_softcapping", &d->logits_cap, err);
    }
    if (status == CM_OK) {
        status = real_read(config, "query_pre_attn_scalar", &query, err);
    }
    d->attention_scale = query > 0.0f ? 1.0f / sqrtf(query) : 0.0f;
    return status;
}

enum cm_status cm_directory_shape(const json_t *config, struct cm_plan *plan, struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    const char *name = json_string_value(json_object_get(config, "model_type"));
    name = name == NULL ? "" : strcmp(name, "gemma3_text") == 0 ? "gemma3" : name;
    enum cm_status status = cm_plan_family((struct cm_source_text){name, strlen(name)}, plan, err);
    plan->pairs_apart = true;
    if (m->architecture == CM_ARCH_GEMMA2 || m->architecture == CM_ARCH_GEMMA3) {
        plan->norm_added = 1.0f;
    }
    if (status == CM_OK) {
        status = numbers_read(config, m, err);
    }
    if (status == CM_OK) {
        status = rope_read(config, plan, err);
    }
    if (status == CM_OK) {
        status = window_read(config, m, err);
    }
    if (status == CM_OK) {
        status = rest_read(config, m, err);
    }
    return status == CM_OK ? cm_plan_shape_check(plan, err) : status;
}

/* ------------------------------------------------------------------ the plan */

/* begin and end ids: numbers, the end also a list of them. */
static enum cm_status ids_read(const json_t *config, struct cm_vocabulary *v, struct cm_error *err)
{
    const json_t *begin = json_object_get(config, "bos_token_id");
    const json_t *ends = json_object_get(config, "eos_token_id");
    const size_t count = json_is_array(ends) ? json_array_size(ends) : 1;
    for (size_t i = 0; i < count; i++) {
        const json_t *end = json_is_array(ends) ? json_array_get(ends, i) : ends;
        json_int_t id = json_integer_value(end);
        if (!json_is_integer(end) || id < 0 || id > UINT32_MAX ||
            v->end_count >= CM_MANIFEST_END_TOKENS_MAX) {
            return refuse(err, "config.json", "eos_token_id is no token, nor a few");
        }
        v->ends[v->end_count++] = (uint32_t)id;
    }
    json_int_t id = json_integer_value(begin);
    v->begin = json_is_integer(begin) && id >= 0 && id <= UINT32_MAX ? (uint32_t)id : 0;
    return CM_OK;
}

static struct cm_source_text text_of(const json_t *value)
{
    return (struct cm_source_text){json_is_string(value) ? json_string_value(value) : "",
                                   json_is_string(value) ? json_string_length(value) : 0};
}

static enum cm_status vocabulary_read(const struct cm_directory *d, const struct cm_source *source,
                                      struct cm_plan *plan, struct cm_error *err)
{
    struct cm_vocabulary v = {.count = 0};
    const struct cm_source_tensor *embedding = cm_source_find(source, "token_embd.weight");
    if (embedding == NULL || embedding->rows > CM_MANIFEST_VOCABULARY_MAX) {
        return refuse(err, "model.embed_tokens.weight", "it is missing, or too large");
    }
    enum cm_status status = ids_read(d->config, &v, err);
    if (status == CM_OK) {
        status = cm_vocabulary_json(d->tokenizer, d->tokenizer_config, (uint32_t)embedding->rows,
                                    &v, plan, err);
    }
    cm_vocabulary_done(&v);
    return status;
}

enum cm_status cm_directory_plan(struct cm_directory *d, const struct cm_plan_options *options,
                                 struct cm_plan *ret_plan, struct cm_error *err)
{
    struct cm_plan plan = {.floats_kind = options->floats_kind};
    struct cm_source source = {NULL, 0};
    enum cm_status status = cm_directory_shape(d->config, &plan, err);
    const bool gemma = plan.norm_added > 0.0f;
    const json_t *tie = json_object_get(d->config, "tie_word_embeddings");
    const bool tied = tie != NULL ? json_is_true(tie) : gemma;
    if (status == CM_OK) {
        status = tensors_name(d, gemma, tied, err);
        source = (struct cm_source){d->tensors, d->tensor_count};
    }
    if (status == CM_OK && !tied && cm_source_find(&source, "output.weight") == NULL) {
        status = refuse(err, "lm_head.weight", "it is missing, and the embedding is not tied");
    }
    if (status == CM_OK) {
        status = vocabulary_read(d, &source, &plan, err);
    }
    if (status == CM_OK) {
        const struct cm_source_text none = {"", 0};
        struct cm_source_text name = text_of(json_object_get(d->config, "_name_or_path"));
        cm_plan_texts(options, name.size > 0 ? name : (struct cm_source_text){"model", 5}, none,
                      &plan);
        status = cm_plan_chat(text_of(json_object_get(d->tokenizer_config, "chat_template")),
                              options, &plan, err);
    }
    if (status == CM_OK) {
        status = cm_plan_tensors(&source, &plan, err);
    }
    return cm_plan_finish(status, &plan, ret_plan, err);
}

enum cm_status cm_directory_open(const char *path, struct cm_directory **ret_directory,
                                 struct cm_error *err)
{
    struct cm_directory *d = calloc(1, sizeof(*d));
    if (d == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "model directory");
    }
    d->fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    enum cm_status status =
        d->fd >= 0 ? cm_directory_json(d->fd, "config.json", false, &d->config, err)
                   : cm_error_errno(err, errno, "CM-GGUF-READ", "cannot open %s", path);
    if (status == CM_OK) {
        status = cm_directory_json(d->fd, "tokenizer.json", false, &d->tokenizer, err);
    }
    if (status == CM_OK) {
        status = cm_directory_json(d->fd, "tokenizer_config.json", true, &d->tokenizer_config, err);
    }
    if (status == CM_OK) {
        status = shards_open(d, err);
    }
    if (status != CM_OK) {
        cm_directory_close(d);
        return status;
    }
    *ret_directory = d;
    return CM_OK;
}

void cm_directory_close(struct cm_directory *d)
{
    if (d == NULL) {
        return;
    }
    for (uint32_t i = 0; i < d->shard_count; i++) {
        cm_safetensors_free(d->shards[i].file);
        close(d->shards[i].fd);
    }
    json_decref(d->config);
    json_decref(d->tokenizer);
    json_decref(d->tokenizer_config);
    if (d->fd >= 0) {
        close(d->fd);
    }
    free(d->shards);
    free(d->tensors);
    free(d->names);
    free(d);
}
