/* Binding a model: every tensor against its shape and the payload, scales and norms for NaN. */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static enum cm_status refuse(const struct cm_tensor *tensor, const char *what, struct cm_error *err)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-TENSOR",
                        "tensor '%.63s' at payload offset %llu: %s", tensor->name,
                        (unsigned long long)tensor->offset, what);
}

/* No NaN or infinity among `count` floats of 16 bits (their exponent is all ones), four at a time:
 * there are millions of scales. Adding one to an exponent of all ones, and to no other, carries
 * into the sign's place, which was cleared. */
static inline __attribute__((always_inline)) bool words_finite(const uint8_t *words, uint64_t count,
                                                               uint64_t exponents, uint64_t ones)
{
    uint64_t found = 0, four = 0;
    uint64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        memcpy(&four, words + 2 * i, sizeof(four));
        found |= (four & exponents) + ones;
    }
    four = 0;
    memcpy(&four, words + 2 * i, 2 * (count - i));
    found |= (four & exponents) + ones;
    return (found & 0x8000800080008000ull) == 0;
}

bool cm_halves_finite(const uint8_t *halves, uint64_t count)
{
    return words_finite(halves, count, 0x7c007c007c007c00ull, 0x0400040004000400ull);
}

static bool bfloats_finite(const uint8_t *bfloats, uint64_t count)
{
    return words_finite(bfloats, count, 0x7f807f807f807f80ull, 0x0080008000800080ull);
}

static enum cm_status place_check(const struct cm_device *device, const struct cm_tensor *tensor,
                                  uint32_t rows, uint32_t columns, struct cm_error *err)
{
    uint64_t quant, scale;
    if (tensor->rows != rows || tensor->columns != columns ||
        !cm_tensor_layout(tensor->kind, rows, columns, &quant, &scale)) {
        return refuse(tensor, "shape or kind is not what the model needs", err);
    }
    uint64_t payload = device->limits.payload_bytes;
    if (tensor->offset % CM_TENSOR_ALIGN != 0 || tensor->bytes != quant + scale ||
        tensor->offset > payload || tensor->bytes > payload - tensor->offset ||
        tensor->scale_offset != (scale > 0 ? tensor->offset + quant : 0)) {
        return refuse(tensor, "place is outside the payload or planes do not follow each other",
                      err);
    }
    return CM_OK;
}

static enum cm_status matrix_bind(const struct cm_device *device, const struct cm_tensor *tensor,
                                  uint32_t rows, uint32_t columns, struct cm_matrix *ret_matrix,
                                  struct cm_error *err)
{
    enum cm_status status = place_check(device, tensor, rows, columns, err);
    if (status != CM_OK) {
        return status;
    }
    if (cm_tile_shape(tensor->kind).quant_bytes == 0) {
        return refuse(tensor, "this device has no kernel for the kind", err);
    }
    const uint8_t *quants = device->payload + tensor->offset;
    const uint8_t *scales = device->payload + tensor->scale_offset;
    if (tensor->kind == CM_TENSOR_BF16) {
        if (!device->bfloats) {
            return refuse(tensor, "is bf16, and the model that was reserved for had none", err);
        }
        if (!bfloats_finite(quants, tensor->bytes / 2)) {
            return refuse(tensor, "a weight is NaN or infinite", err);
        }
        scales = NULL;
    } else if (!cm_halves_finite(scales,
                                 (tensor->offset + tensor->bytes - tensor->scale_offset) / 2)) {
        return refuse(tensor, "a scale is NaN or infinite", err);
    }
    *ret_matrix = (struct cm_matrix){.kind = tensor->kind,
                                     .rows = rows,
                                     .row_tiles = cm_padded(rows, CM_ROWS_PAD) / CM_TILE_ROWS,
                                     .blocks = columns / CM_TILE_COLUMNS,
                                     .quants = quants,
                                     .scales = scales};
    return CM_OK;
}

static enum cm_status vector_bind(const struct cm_device *device, const struct cm_tensor *tensor,
                                  uint32_t rows, const float **ret_vector, struct cm_error *err)
{
    enum cm_status status = place_check(device, tensor, rows, 1, err);
    if (status != CM_OK) {
        return status;
    }
    if (tensor->kind != CM_TENSOR_F32) {
        return refuse(tensor, "a norm or a bias must be F32", err);
    }
    const float *vector = (const float *)(const void *)(device->payload + tensor->offset);
    for (uint32_t i = 0; i < rows; i++) {
        if (!isfinite(vector[i])) {
            return refuse(tensor, "a weight is NaN or infinite", err);
        }
    }
    *ret_vector = vector;
    return CM_OK;
}

/* Vectors that only some decoders have; what a decoder does not have must not be there. */
static enum cm_status extras_bind(const struct cm_device *device, const struct cm_model *m,
                                  const struct cm_layer *layer, struct cm_bound_layer *ret,
                                  struct cm_error *err)
{
    const struct cm_decoder *d = &m->decoder;
    const struct {
        uint32_t role;
        bool wanted;
        uint32_t rows;
        const float **vector;
    } rows[] = {
        {CM_LAYER_QKV_BIAS, d->qkv_bias, (m->heads + 2 * m->kv_heads) * m->head_width,
         &ret->qkv_bias},
        {CM_LAYER_Q_NORM, d->qk_norm, m->head_width, &ret->q_norm},
        {CM_LAYER_K_NORM, d->qk_norm, m->head_width, &ret->k_norm},
        {CM_LAYER_POST_ATTENTION_NORM, d->post_norms, m->width, &ret->post_attention_norm},
        {CM_LAYER_POST_FFN_NORM, d->post_norms, m->width, &ret->post_ffn_norm},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const struct cm_tensor *tensor = &layer->tensors[rows[i].role];
        if (!rows[i].wanted && tensor->kind != CM_TENSOR_NONE) {
            return refuse(tensor, "this decoder has no such tensor", err);
        }
        enum cm_status status =
            rows[i].wanted ? vector_bind(device, tensor, rows[i].rows, rows[i].vector, err) : CM_OK;
        if (status != CM_OK) {
            return status;
        }
    }
    return CM_OK;
}

/* Does layer `index` see a window only? */
static bool windowed(const struct cm_decoder *d, uint32_t index)
{
    return d->window != 0 && (d->window_period == 0 || (index + 1) % d->window_period != 0);
}

static enum cm_status layer_bind(const struct cm_device *device, const struct cm_model *m,
                                 const struct cm_layer *layer, struct cm_bound_layer *ret,
                                 struct cm_error *err)
{
    const struct cm_tensor *t = layer->tensors;
    uint32_t attention = m->heads * m->head_width;
    uint32_t qkv = attention + 2 * m->kv_heads * m->head_width;
    enum cm_status status =
        vector_bind(device, &t[CM_LAYER_ATTENTION_NORM], m->width, &ret->attention_norm, err);
    if (status == CM_OK) {
        status = vector_bind(device, &t[CM_LAYER_FFN_NORM], m->width, &ret->ffn_norm, err);
    }
    if (status == CM_OK) {
        status = extras_bind(device, m, layer, ret, err);
    }
    if (status == CM_OK) {
        status = matrix_bind(device, &t[CM_LAYER_QKV], qkv, m->width, &ret->qkv, err);
    }
    if (status == CM_OK) {
        status = matrix_bind(device, &t[CM_LAYER_ATTENTION_OUT], m->width, attention,
                             &ret->attention_out, err);
    }
    if (status == CM_OK) {
        status = matrix_bind(device, &t[CM_LAYER_GATE_UP], 2 * m->ffn_width, m->width,
                             &ret->gate_up, err);
    }
    if (status == CM_OK) {
        status = matrix_bind(device, &t[CM_LAYER_DOWN], m->width, m->ffn_width, &ret->down, err);
    }
    return status;
}

/* Token tables are copied: a wrong offset must not be read later. */
static enum cm_status tokens_bind(struct cm_device *device, const struct cm_model *m,
                                  struct cm_error *err)
{
    uint32_t total = m->token_offsets[m->vocabulary];
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        if (m->token_offsets[i] > m->token_offsets[i + 1] ||
            m->token_offsets[i + 1] - m->token_offsets[i] > 1024) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-TOKENS",
                                "token %u has no possible length", i);
        }
    }
    if (m->end_token_count > CM_END_TOKENS_MAX) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-TOKENS", "too many end tokens");
    }
    for (uint32_t i = 0; i < m->end_token_count; i++) {
        if (m->end_tokens[i] >= m->vocabulary) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-DEV-TOKENS", "end token %u does not exist",
                                m->end_tokens[i]);
        }
    }
    size_t offsets_bytes = ((size_t)m->vocabulary + 1) * sizeof(uint32_t);
    device->tables = malloc(offsets_bytes + m->vocabulary + total + 1);
    if (device->tables == NULL) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-MEMORY", "no memory for the token tables");
    }
    memcpy(device->tables, m->token_offsets, offsets_bytes);
    memcpy(device->tables + offsets_bytes, m->token_control, m->vocabulary);
    memcpy(device->tables + offsets_bytes + m->vocabulary, m->token_bytes, total);
    device->model.token_offsets = (const uint32_t *)(const void *)device->tables;
    device->model.token_control = device->tables + offsets_bytes;
    device->model.token_bytes = device->tables + offsets_bytes + m->vocabulary;
    return CM_OK;
}

/* Cosines and sines in binary64, rounded once. */
struct rope_table {
    const struct cm_device *device;
    double base, scale;
    const float *factors; /* NULL: none */
    float *cosine, *sine;
};

static void rope_fill(void *context, struct cm_worker *worker)
{
    const struct rope_table *table = context;
    const struct cm_device *device = table->device;
    const struct cm_model *m = &device->model;
    const uint32_t half = m->rope_width / 2;
    uint32_t first, last;
    cm_pool_phase(worker, device->limits.context_max);
    while (cm_pool_take(worker, &first, &last)) {
        for (uint32_t i = 0; i < half; i++) {
            const double factor = table->factors != NULL ? (double)table->factors[i] : 1.0;
            const double turn = table->scale * pow(table->base, -2.0 * i / m->rope_width) / factor;
            for (size_t t = first; t < last; t++) {
                table->cosine[t * half + i] = (float)cos((double)t * turn);
                table->sine[t * half + i] = (float)sin((double)t * turn);
            }
        }
    }
    cm_pool_barrier(worker);
}

/* Windows and RoPE tables of all layers. */
static void positions_bind(struct cm_device *device)
{
    const struct cm_model *m = &device->model;
    const struct cm_decoder *d = &m->decoder;
    const bool two = device->window_cosine != NULL;
    struct rope_table tables[2] = {{device, (double)m->rope_base,
                                    d->rope_scale > 0.0f ? (double)d->rope_scale : 1.0,
                                    m->rope_factors, device->cosine, device->sine},
                                   {device, (double)d->window_rope_base, 1.0, NULL,
                                    device->window_cosine, device->window_sine}};
    for (uint32_t i = 0; i < (two ? 2u : 1u); i++) {
        cm_pool_run(device->pool, rope_fill, &tables[i]);
    }
    for (uint32_t i = 0; i < m->layers; i++) {
        const bool window = windowed(d, i);
        device->layers[i].window = window ? d->window : 0;
        device->layers[i].cosine = window && two ? device->window_cosine : device->cosine;
        device->layers[i].sine = window && two ? device->window_sine : device->sine;
    }
}

enum cm_status cm_device_model_bind(struct cm_device *device, const struct cm_model *model,
                                    struct cm_error *err)
{
    if (device->poisoned || !device->loaded || device->bound) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "model_bind out of order");
    }
    const struct cm_model *planned = &device->model;
    if (model->vocabulary != planned->vocabulary || model->width != planned->width ||
        model->layers != planned->layers || model->heads != planned->heads ||
        model->kv_heads != planned->kv_heads || model->head_width != planned->head_width ||
        model->ffn_width != planned->ffn_width || model->rope_width != planned->rope_width ||
        model->decoder.post_norms != planned->decoder.post_norms ||
        model->decoder.window_rope_base != planned->decoder.window_rope_base ||
        model->decoder.rope_scale != planned->decoder.rope_scale) {
        return cm_error_set(err, CM_E_BUG, "CM-DEV-ORDER", "another model was reserved for");
    }
    device->layers = calloc(model->layers, sizeof(*device->layers));
    if (device->layers == NULL) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-MEMORY", "no memory for the layers");
    }
    enum cm_status status = matrix_bind(device, &model->embedding, model->vocabulary, model->width,
                                        &device->embedding, err);
    if (status == CM_OK && model->tied_head) {
        device->head = device->embedding;
    } else if (status == CM_OK) {
        status =
            matrix_bind(device, &model->head, model->vocabulary, model->width, &device->head, err);
    }
    if (status == CM_OK) {
        status = vector_bind(device, &model->out_norm, model->width, &device->out_norm, err);
    }
    for (uint32_t i = 0; status == CM_OK && i < model->layers; i++) {
        status = layer_bind(device, model, &model->layer[i], &device->layers[i], err);
    }
    if (status == CM_OK) {
        device->model = *model;
        device->model.layer = NULL;
        status = tokens_bind(device, model, err);
    }
    if (status == CM_OK) {
        positions_bind(device);
        device->model.rope_factors = NULL;
        device->bound = true;
    }
    return status;
}
