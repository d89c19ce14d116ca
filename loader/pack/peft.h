/* An adapter's directory as `peft` writes it: adapter_config.json and adapter_model.safetensors.
 * What would change the result beyond W + scale * B A is refused by name. */
#ifndef CASEMATE_LOADER_PACK_PEFT_H
#define CASEMATE_LOADER_PACK_PEFT_H

#include "kernels/model.h"
#include "loader/pack/source.h"
#include "loader/package/manifest.h"

struct cm_peft;

/* NULL, both of a pair: the target is as it was. */
struct cm_peft_layer {
    const struct cm_source_tensor *a[CM_TARGET_COUNT]; /* [rank, columns of the target] */
    const struct cm_source_tensor *b[CM_TARGET_COUNT]; /* [rows of the target, rank] */
};

/* `base`: the shape of the model that it was made for. Fails: PACKAGE with file and key or tensor.
 */
CM_MUST_USE enum cm_status cm_peft_open(const char *path, const struct cm_manifest *base,
                                        struct cm_peft **ret_peft, struct cm_error *err);
void cm_peft_close(struct cm_peft *peft); /* NULL is fine */
uint32_t cm_peft_rank(const struct cm_peft *peft);
float cm_peft_scale(const struct cm_peft *peft);
/* [layers of the base]; borrowed. */
const struct cm_peft_layer *cm_peft_layers(const struct cm_peft *peft);

/* Rows and columns of a target's W. */
void cm_peft_target_shape(const struct cm_manifest *base, uint32_t target, uint32_t *ret_rows,
                          uint32_t *ret_columns);

#endif
