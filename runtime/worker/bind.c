/* Manifest → device model. */
#include "runtime/worker/bind.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct cm_tensor *tensor_place(struct cm_worker_model *made,
                                      const struct cm_manifest_tensor *tensor)
{
    if (tensor->layer != CM_MANIFEST_NO_LAYER) {
        return tensor->layer < made->model.layers && tensor->role < CM_LAYER_ROLE_COUNT
                   ? &made->layers[tensor->layer].tensors[tensor->role]
                   : NULL;
    }
    switch (tensor->role) {
    case CM_GLOBAL_EMBEDDING:
        return &made->model.embedding;
    case CM_GLOBAL_HEAD:
        return made->model.tied_head ? NULL : &made->model.head;
    case CM_GLOBAL_OUT_NORM:
        return &made->model.out_norm;
    default:
        return NULL;
    }
}

/* One tensor's facts, into zeroed memory. */
static void tensor_copy(const struct cm_manifest_tensor *from, struct cm_tensor *ret_tensor)
{
    const size_t most = sizeof(ret_tensor->name) - 1;
    memcpy(ret_tensor->name, from->name.bytes, from->name.size < most ? from->name.size : most);
    ret_tensor->kind = from->kind;
    ret_tensor->rows = from->rows;
    ret_tensor->columns = from->columns;
    ret_tensor->offset = from->offset;
    ret_tensor->scale_offset = from->scale_offset;
    ret_tensor->bytes = from->bytes;
}

static enum cm_status tensors_place(const struct cm_manifest *m, struct cm_worker_model *made,
                                    struct cm_error *err)
{
    for (uint32_t i = 0; i < m->tensor_count; i++) {
        const struct cm_manifest_tensor *from = &m->tensors[i];
        struct cm_tensor *to = tensor_place(made, from);
        if (to == NULL || to->kind != CM_TENSOR_NONE || from->kind == CM_TENSOR_NONE) {
            return cm_error_set(
                err, CM_E_PACKAGE, "CM-WRK-TENSOR",
                "manifest: tensor '%.*s' has no place in this model, or comes twice",
                (int)from->name.size, from->name.bytes);
        }
        tensor_copy(from, to);
    }
    const struct cm_manifest_decoder *d = &m->decoder;
    uint32_t layer = 6 + d->qkv_bias + 2 * d->qk_norm + 2 * d->post_norms;
    uint32_t wanted = m->layers * layer + (m->tied_head ? 2u : 3u);
    return m->tensor_count == wanted
               ? CM_OK
               : cm_error_set(err, CM_E_PACKAGE, "CM-WRK-TENSOR",
                              "manifest: %u tensors, this model has %u", m->tensor_count, wanted);
}

static struct cm_decoder decoder_make(const struct cm_manifest_decoder *d)
{
    return (struct cm_decoder){.activation = d->activation,
                               .qk_norm = d->qk_norm == 1,
                               .post_norms = d->post_norms == 1,
                               .qkv_bias = d->qkv_bias == 1,
                               .window = d->window,
                               .window_period = d->window_period,
                               .embedding_scale = d->embedding_scale,
                               .attention_scale = d->attention_scale,
                               .attention_cap = d->attention_cap,
                               .logits_cap = d->logits_cap,
                               .window_rope_base = d->window_rope_base,
                               .rope_scale = d->rope_scale};
}

/* NULL: none. */
static const float *rope_factors(const struct cm_manifest *m, uint32_t context_max)
{
    const uint32_t context =
        context_max != 0 && context_max < m->context_max ? context_max : m->context_max;
    if (m->rope_long_context > 0 && context > m->rope_long_context) {
        return m->rope_long_factors;
    }
    return m->rope_factor_count > 0 ? m->rope_factors : NULL;
}

enum cm_status cm_worker_model_make(const struct cm_manifest *m, uint32_t context_max,
                                    struct cm_worker_model *ret_model, struct cm_error *err)
{
    struct cm_worker_model made = {.layers = calloc(m->layers, sizeof(*made.layers)),
                                   .token_control = calloc(m->vocabulary, 1)};
    if (made.layers == NULL || made.token_control == NULL) {
        cm_worker_model_done(&made);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "model");
    }
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        made.token_control[i] =
            m->token_types[i] == CM_TOKEN_CONTROL || m->token_types[i] == CM_TOKEN_UNUSED;
    }
    made.model = (struct cm_model){.vocabulary = m->vocabulary,
                                   .width = m->width,
                                   .layers = m->layers,
                                   .heads = m->heads,
                                   .kv_heads = m->kv_heads,
                                   .head_width = m->head_width,
                                   .rope_width = m->rope_width,
                                   .ffn_width = m->ffn_width,
                                   .context_max = m->context_max,
                                   .rope_base = m->rope_base,
                                   .rope_factors = rope_factors(m, context_max),
                                   .norm_epsilon = m->norm_epsilon,
                                   .decoder = decoder_make(&m->decoder),
                                   .tied_head = m->tied_head,
                                   .layer = made.layers,
                                   .token_offsets = m->token_offsets,
                                   .token_bytes = m->token_bytes,
                                   .token_control = made.token_control,
                                   .end_token_count = m->end_token_count};
    memcpy(made.model.end_tokens, m->end_tokens, sizeof(made.model.end_tokens));
    enum cm_status status = tensors_place(m, &made, err);
    if (status != CM_OK) {
        cm_worker_model_done(&made);
        return status;
    }
    *ret_model = made;
    return CM_OK;
}

enum cm_status cm_worker_adapter_make(const struct cm_manifest_adapter *m, uint32_t layers,
                                      struct cm_adapter_layer *ret_layers,
                                      struct cm_adapter *ret_adapter, struct cm_error *err)
{
    if (m->layers != layers) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-TENSOR",
                            "the adapter is for %u layers, this model has %u", m->layers, layers);
    }
    memset(ret_layers, 0, layers * sizeof(*ret_layers));
    for (uint32_t i = 0; i < m->tensor_count; i++) {
        const struct cm_manifest_tensor *from = &m->tensors[i];
        if (from->layer >= layers || from->role >= CM_MANIFEST_ADAPTER_ROLES) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-TENSOR",
                                "tensor '%.*s' has no place in this model", (int)from->name.size,
                                from->name.bytes);
        }
        struct cm_adapter_layer *layer = &ret_layers[from->layer];
        tensor_copy(from, (from->role % 2 == 0 ? layer->a : layer->b) + from->role / 2);
    }
    *ret_adapter = (struct cm_adapter){.rank = m->rank,
                                       .scale = m->scale,
                                       .layers = m->layers,
                                       .width = m->width,
                                       .heads = m->heads,
                                       .kv_heads = m->kv_heads,
                                       .head_width = m->head_width,
                                       .rope_width = m->rope_width,
                                       .ffn_width = m->ffn_width,
                                       .layer = ret_layers};
    return CM_OK;
}

void cm_worker_model_done(struct cm_worker_model *model)
{
    free(model->layers);
    free(model->token_control);
    *model = (struct cm_worker_model){.layers = NULL};
}
