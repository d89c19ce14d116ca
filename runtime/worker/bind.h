/* From a package's manifest to the device's model: the same facts in two structs, because neither
 * folder may know the other. */
#ifndef CASEMATE_RUNTIME_WORKER_BIND_H
#define CASEMATE_RUNTIME_WORKER_BIND_H

#include "kernels/model.h"
#include "loader/package/manifest.h"

struct cm_worker_model {
    struct cm_model model;
    struct cm_layer *layers;
    uint8_t *token_control;
};

/* context_max: of the configuration, 0: the model's. Where it is longer than what LongRoPE's short
 * factors are for, the long ones serve every request, short ones too: K is kept turned, and what is
 * kept of one prompt begins another. Fails: PACKAGE if a tensor is missing or comes twice. The
 * manifest must outlive the result. */
CM_MUST_USE enum cm_status cm_worker_model_make(const struct cm_manifest *manifest,
                                                uint32_t context_max,
                                                struct cm_worker_model *ret_model,
                                                struct cm_error *err);
/* An adapter to a model of `layers` layers; `ret_layers`, one for each, becomes its tensors. Fails:
 * PACKAGE if it is for another number of layers, or a tensor has no place in them. */
CM_MUST_USE enum cm_status cm_worker_adapter_make(const struct cm_manifest_adapter *manifest,
                                                  uint32_t layers,
                                                  struct cm_adapter_layer *ret_layers,
                                                  struct cm_adapter *ret_adapter,
                                                  struct cm_error *err);
void cm_worker_model_done(struct cm_worker_model *model);

#endif
