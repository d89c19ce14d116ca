/* adapter_config.json says rank and scale, the tensors' names say what they belong to. */
#include "loader/pack/peft.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "loader/pack/directory.h"
#include "loader/pack/safetensors.h"

#define CONFIG  "adapter_config.json"
#define TENSORS "adapter_model.safetensors"

struct cm_peft {
    json_t *config;
    int fd; /* of the tensors' file */
    struct cm_safetensors *file;
    struct cm_peft_layer *layers;
    uint32_t rank;
    float scale;
};

static const char *const modules[CM_TARGET_COUNT] = {
    [CM_TARGET_Q] = "self_attn.q_proj", [CM_TARGET_K] = "self_attn.k_proj",
    [CM_TARGET_V] = "self_attn.v_proj", [CM_TARGET_ATTENTION_OUT] = "self_attn.o_proj",
    [CM_TARGET_GATE] = "mlp.gate_proj", [CM_TARGET_UP] = "mlp.up_proj",
    [CM_TARGET_DOWN] = "mlp.down_proj",
};

void cm_peft_target_shape(const struct cm_manifest *base, uint32_t target, uint32_t *ret_rows,
                          uint32_t *ret_columns)
{
    const uint32_t query = base->heads * base->head_width;
    const uint32_t kv = base->kv_heads * base->head_width;
    const uint32_t rows[CM_TARGET_COUNT] = {
        query, kv, kv, base->width, base->ffn_width, base->ffn_width, base->width};
    *ret_rows = rows[target];
    *ret_columns = target == CM_TARGET_ATTENTION_OUT ? query
                   : target == CM_TARGET_DOWN        ? base->ffn_width
                                                     : base->width;
}

/* ------------------------------------------------------------------ adapter_config.json */

static enum cm_status config_refuse(struct cm_error *err, const char *key, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-PEFT-CONFIG", "%s: '%.60s' %s", CONFIG, key, what);
}

/* Keys that change nothing about a trained adapter of the kind that is taken, or that the code
 * below reads. Every other key must say no: null, false, "none" or empty. */
static const char *const keys_known[] = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
};

static const struct {
    const char *key, *why;
} keys_refused[] = {
    {"bias", "trains biases of the model: only \"none\" is supported"},
    {"lora_bias", "adds a bias to B: it is not supported"},
    {"use_dora", "asks for DoRA, which rescales the model's own weights: it is not supported"},
    {"modules_to_save", "replaces whole modules of the model: it is not supported"},
    {"rank_pattern", "gives modules ranks of their own: it is not supported"},
    {"alpha_pattern", "gives modules scales of their own: it is not supported"},
    {"fan_in_fan_out", "says that weights are transposed: it is not supported"},
    {"layer_replication", "repeats layers of the model: it is not supported"},
    {"trainable_token_indices", "trains rows of the embedding: it is not supported"},
    {"target_parameters", "names parameters instead of modules: it is not supported"},
};

static bool says_no(const json_t *value)
{
    return json_is_null(value) || json_is_false(value) ||
           (json_is_string(value) && strcmp(json_string_value(value), "none") == 0) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0);
}

static bool known(const char *key)
{
    for (size_t i = 0; i < sizeof(keys_known) / sizeof(keys_known[0]); i++) {
        if (strcmp(key, keys_known[i]) == 0) {
            return true;
        }
    }
    return false;
}

static enum cm_status keys_check(json_t *config, struct cm_error *err)
{
    const char *key;
    json_t *value;
    json_object_foreach(config, key, value)
    {
        const char *why = "is not known here, and says more than no: what it changes is unknown";
        if (known(key) || says_no(value)) {
            continue;
        }
        for (size_t i = 0; i < sizeof(keys_refused) / sizeof(keys_refused[0]); i++) {
            why = strcmp(key, keys_refused[i].key) == 0 ? keys_refused[i].why : why;
        }
        return config_refuse(err, key, why);
    }
    return CM_OK;
}

/* Some ways to begin take from the model's weights what they give to the adapter: it fits only the
 * model that is left. */
static enum cm_status start_check(const json_t *config, struct cm_error *err)
{
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal"};
    const json_t *start = json_object_get(config, "init_lora_weights");
    const char *name = json_string_value(start);
    bool ok = start == NULL || json_is_null(start) || json_is_boolean(start);
    for (size_t i = 0; name != NULL && i < sizeof(harmless) / sizeof(harmless[0]); i++) {
        ok = ok || strcmp(name, harmless[i]) == 0;
    }
    return ok ? CM_OK
              : config_refuse(err, "init_lora_weights",
                              "changes the model's own weights (PiSSA, OLoRA, CorDA, LoftQ): let "
                              "peft convert the adapter when it saves it");
}

static bool text_is(const json_t *config, const char *key, const char *wanted, bool optional)
{
    const json_t *value = json_object_get(config, key);
    return (optional && (value == NULL || json_is_null(value))) ||
           (json_is_string(value) && strcmp(json_string_value(value), wanted) == 0);
}

static enum cm_status numbers_read(struct cm_peft *peft, struct cm_error *err)
{
    const json_t *rank = json_object_get(peft->config, "r");
    const json_t *alpha = json_object_get(peft->config, "lora_alpha");
    const json_t *rooted = json_object_get(peft->config, "use_rslora");
    if (!json_is_integer(rank) || json_integer_value(rank) < 1 ||
        json_integer_value(rank) > CM_ADAPTER_RANK_MAX) {
        return config_refuse(err, "r", "must be a whole number from 1 to 64");
    }
    if (rooted != NULL && !json_is_boolean(rooted) && !json_is_null(rooted)) {
        return config_refuse(err, "use_rslora", "must be true or false");
    }
    double divisor = (double)json_integer_value(rank);
    divisor = json_is_true(rooted) ? sqrt(divisor) : divisor;
    peft->rank = (uint32_t)json_integer_value(rank);
    peft->scale = (float)(json_number_value(alpha) / divisor);
    return json_is_number(alpha) && isfinite(peft->scale) && peft->scale > 0.0f
               ? CM_OK
               : config_refuse(err, "lora_alpha", "must be a number greater than 0");
}

static enum cm_status config_read(struct cm_peft *peft, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    if (!text_is(peft->config, "peft_type", "LORA", false)) {
        status = config_refuse(err, "peft_type", "must be LORA");
    } else if (!text_is(peft->config, "task_type", "CAUSAL_LM", true)) {
        status = config_refuse(err, "task_type", "must be CAUSAL_LM");
    }
    if (status == CM_OK) {
        status = keys_check(peft->config, err);
    }
    if (status == CM_OK) {
        status = start_check(peft->config, err);
    }
    return status == CM_OK ? numbers_read(peft, err) : status;
}

/* ------------------------------------------------------------------ tensors */

static enum cm_status tensor_refuse(struct cm_error *err, const struct cm_source_tensor *tensor,
                                    const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-PEFT-TENSOR", "%s: tensor '%.*s' %s", TENSORS,
                        (int)(tensor->name.size < 100 ? tensor->name.size : 100),
                        tensor->name.bytes, what);
}

/* base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight. Names of safetensors are
 * terminated. */
static bool name_parse(const char *name, uint32_t layers, uint32_t *ret_layer, uint32_t *ret_target,
                       bool *ret_b)
{
    unsigned layer;
    int used = 0;
    if (sscanf(name, "base_model.model.model.layers.%4u.%n", &layer, &used) != 1 || used == 0 ||
        layer >= layers) {
        return false;
    }
    for (uint32_t t = 0; t < CM_TARGET_COUNT; t++) {
        const size_t size = strlen(modules[t]);
        const char *rest = name + used;
        if (strncmp(rest, modules[t], size) == 0) {
            *ret_layer = layer;
            *ret_target = t;
            *ret_b = strcmp(rest + size, ".lora_B.weight") == 0;
            return *ret_b || strcmp(rest + size, ".lora_A.weight") == 0;
        }
    }
    return false;
}

static enum cm_status tensor_place(struct cm_peft *peft, const struct cm_manifest *base,
                                   const struct cm_source_tensor *tensor, struct cm_error *err)
{
    uint32_t layer, target, rows, columns;
    bool b;
    if (!name_parse(tensor->name.bytes, base->layers, &layer, &target, &b)) {
        return tensor_refuse(err, tensor,
                             "is no lora_A or lora_B of a projection that this host adapts (q, k, "
                             "v, o, gate, up, down) in a layer of the base model");
    }
    cm_peft_target_shape(base, target, &rows, &columns);
    rows = b ? rows : peft->rank;
    columns = b ? peft->rank : columns;
    if (tensor->rows != rows || tensor->columns != columns) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PEFT-TENSOR",
                            "%s: tensor '%.100s' has %llu rows of %llu; rank %u of this base model "
                            "needs %u of %u",
                            TENSORS, tensor->name.bytes, (unsigned long long)tensor->rows,
                            (unsigned long long)tensor->columns, peft->rank, rows, columns);
    }
    (b ? peft->layers[layer].b : peft->layers[layer].a)[target] = tensor;
    return CM_OK;
}

static enum cm_status tensors_place(struct cm_peft *peft, const struct cm_manifest *base,
                                    struct cm_error *err)
{
    const struct cm_source source = cm_safetensors_tensors(peft->file);
    enum cm_status status = CM_OK;
    peft->layers = calloc(base->layers, sizeof(*peft->layers));
    if (peft->layers == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "layers");
    }
    for (uint32_t i = 0; status == CM_OK && i < source.count; i++) {
        status = tensor_place(peft, base, &source.tensors[i], err);
    }
    for (uint32_t l = 0; status == CM_OK && l < base->layers; l++) {
        for (uint32_t t = 0; status == CM_OK && t < CM_TARGET_COUNT; t++) {
            const struct cm_source_tensor *a = peft->layers[l].a[t], *b = peft->layers[l].b[t];
            if ((a == NULL) != (b == NULL)) {
                status = tensor_refuse(err, a != NULL ? a : b, "has no other half");
            }
        }
    }
    return status != CM_OK || source.count > 0
               ? status
               : cm_error_set(err, CM_E_PACKAGE, "CM-PEFT-TENSOR", "%s: no tensors", TENSORS);
}

static bool target_used(const struct cm_peft *peft, uint32_t layers, uint32_t target)
{
    for (uint32_t l = 0; l < layers; l++) {
        if (peft->layers[l].a[target] != NULL) {
            return true;
        }
    }
    return false;
}

/* The target that a module's last name stands for; CM_TARGET_COUNT: none. */
static uint32_t module_target(const char *name)
{
    const char *last = name != NULL && strrchr(name, '.') != NULL ? strrchr(name, '.') + 1 : name;
    uint32_t t = 0;
    while (t < CM_TARGET_COUNT &&
           (last == NULL || strcmp(strchr(modules[t], '.') + 1, last) != 0)) {
        t++;
    }
    return t;
}

/* A list of modules and the tensors must be of one mind; a pattern cannot be compared. */
static enum cm_status modules_check(const struct cm_peft *peft, uint32_t layers,
                                    struct cm_error *err)
{
    const json_t *list = json_object_get(peft->config, "target_modules");
    bool named[CM_TARGET_COUNT] = {false};
    if (json_is_string(list)) {
        return CM_OK;
    }
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        uint32_t target = module_target(name);
        if (target == CM_TARGET_COUNT) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-PEFT-CONFIG",
                                "%s: 'target_modules' has '%.60s'; this host adapts q_proj, "
                                "k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj",
                                CONFIG, name != NULL ? name : "what is no text");
        }
        named[target] = true;
    }
    for (uint32_t t = 0; t < CM_TARGET_COUNT; t++) {
        if (named[t] != target_used(peft, layers, t)) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-PEFT-CONFIG",
                                "%s: 'target_modules' %s %s, and %s has %s of it", CONFIG,
                                named[t] ? "has" : "lacks", modules[t], TENSORS,
                                named[t] ? "no tensor" : "tensors");
        }
    }
    return CM_OK;
}

/* ------------------------------------------------------------------ the directory */

enum cm_status cm_peft_open(const char *path, const struct cm_manifest *base,
                            struct cm_peft **ret_peft, struct cm_error *err)
{
    struct cm_peft *peft = calloc(1, sizeof(*peft));
    if (peft == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "adapter");
    }
    peft->fd = -1;
    int folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    enum cm_status status =
        folder >= 0
            ? cm_directory_json(folder, CONFIG, false, &peft->config, err)
            : cm_error_errno(err, errno, "CM-PEFT-READ", "cannot open the directory %s", path);
    if (status == CM_OK) {
        status = config_read(peft, err);
    }
    if (status == CM_OK) {
        peft->fd = openat(folder, TENSORS, O_RDONLY | O_CLOEXEC);
        status = peft->fd >= 0 ? cm_safetensors_read(peft->fd, TENSORS, &peft->file, err)
                               : cm_error_errno(err, errno, "CM-PEFT-READ", "cannot open %s/%s",
                                                path, TENSORS);
    }
    if (status == CM_OK) {
        status = tensors_place(peft, base, err);
    }
    if (status == CM_OK) {
        status = modules_check(peft, base->layers, err);
    }
    if (folder >= 0) {
        close(folder);
    }
    if (status != CM_OK) {
        cm_peft_close(peft);
        return status;
    }
    *ret_peft = peft;
    return CM_OK;
}

void cm_peft_close(struct cm_peft *peft)
{
    if (peft == NULL) {
        return;
    }
    json_decref(peft->config);
    cm_safetensors_free(peft->file);
    if (peft->fd >= 0) {
        close(peft->fd);
    }
    free(peft->layers);
    free(peft);
}

uint32_t cm_peft_rank(const struct cm_peft *peft)
{
    return peft->rank;
}

float cm_peft_scale(const struct cm_peft *peft)
{
    return peft->scale;
}

const struct cm_peft_layer *cm_peft_layers(const struct cm_peft *peft)
{
    return peft->layers;
}
