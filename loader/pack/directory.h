/* A model's directory as `transformers` writes it: config.json, tokenizer.json, model.safetensors
 * or model.safetensors.index.json with its shards, and, if there, tokenizer_config.json. */
#ifndef CASEMATE_LOADER_PACK_DIRECTORY_H
#define CASEMATE_LOADER_PACK_DIRECTORY_H

#include <jansson.h>

#include "loader/pack/plan.h"

#define CM_DIRECTORY_JSON_MAX   (256u << 20)
#define CM_DIRECTORY_SHARDS_MAX 512u

struct cm_directory;

CM_MUST_USE enum cm_status cm_directory_open(const char *path, struct cm_directory **ret_directory,
                                             struct cm_error *err);
void cm_directory_close(struct cm_directory *directory); /* NULL is fine */

/* A JSON object in the file `name` of an open folder. An optional one that is not there leaves
 * NULL.
 */
CM_MUST_USE enum cm_status cm_directory_json(int folder, const char *name, bool optional,
                                             json_t **ret_value, struct cm_error *err);
/* config.json → family and shape of the plan's manifest. */
CM_MUST_USE enum cm_status cm_directory_shape(const json_t *config, struct cm_plan *plan,
                                              struct cm_error *err);

/* As cm_plan_make; the directory must stay open as long as the plan is used. */
CM_MUST_USE enum cm_status cm_directory_plan(struct cm_directory *directory,
                                             const struct cm_plan_options *options,
                                             struct cm_plan *ret_plan, struct cm_error *err);

/* tokenizer.json → manifest (vocabulary_json.c). count: entries of the embedding, which may be more
 * than the tokenizer has. config: NULL, or tokenizer_config.json. v has begin and end ids already.
 */
CM_MUST_USE enum cm_status cm_vocabulary_json(const json_t *tokenizer, const json_t *config,
                                              uint32_t count, struct cm_vocabulary *v,
                                              struct cm_plan *plan, struct cm_error *err);

#endif
