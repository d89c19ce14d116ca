/* `casemate-pack adapter`: a directory of peft in, a sealed adapter out. The base's architecture is
 * sealed in its package, so its public config.json says the shape; the host compares both. */
#include "loader/pack/commands.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loader/pack/directory.h"
#include "loader/pack/half.h"
#include "loader/pack/peft.h"
#include "loader/pack/quant.h"
#include "runtime/base/hex.h"

/* A row's last block may be read beyond its columns. */
#define ROW_SPARE_BYTES (CM_TILE_COLUMNS * sizeof(float))

struct made { /* the adapter in compute layout */
    struct cm_manifest_adapter manifest;
    struct cm_manifest_tensor *tensors;
    char (*names)[64];
    uint8_t *payload;
    uint64_t payload_bytes;
    double error_square, square; /* of what rounding changed, and of the source */
};

static enum cm_status base_shape_read(const char *path, struct cm_plan *ret_base,
                                      struct cm_error *err)
{
    json_t *config = NULL;
    enum cm_status status = cm_directory_json(AT_FDCWD, path, false, &config, err);
    if (status == CM_OK) {
        status = cm_directory_shape(config, ret_base, err);
    }
    json_decref(config);
    return status;
}

/* ------------------------------------------------------------------ the plan */

static void tensor_plan(struct made *made, uint32_t layer, uint32_t role, uint32_t rows,
                        uint32_t columns)
{
    static const char *const targets[CM_TARGET_COUNT] = {
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};
    const uint32_t index = made->manifest.tensor_count++;
    uint64_t bytes, none;
    bool fits = cm_tensor_layout(CM_TENSOR_F16, rows, columns, &bytes, &none);
    CM_ASSERT(fits);
    uint64_t offset =
        (made->payload_bytes + CM_TENSOR_ALIGN - 1) / CM_TENSOR_ALIGN * CM_TENSOR_ALIGN;
    snprintf(made->names[index], sizeof(made->names[index]), "blk.%u.%s.%s", layer,
             targets[role / 2], role % 2 == 0 ? "lora_a" : "lora_b");
    made->tensors[index] = (struct cm_manifest_tensor){
        .name = {made->names[index], (uint32_t)strlen(made->names[index])},
        .layer = layer,
        .role = role,
        .kind = CM_TENSOR_F16,
        .rows = rows,
        .columns = columns,
        .offset = offset,
        .bytes = bytes};
    made->payload_bytes = offset + bytes;
}

static enum cm_status tensors_plan(const struct cm_peft *peft, const struct cm_manifest *base,
                                   struct made *made, struct cm_error *err)
{
    const size_t room = (size_t)base->layers * CM_MANIFEST_ADAPTER_ROLES;
    made->tensors = calloc(room, sizeof(*made->tensors));
    made->names = calloc(room, sizeof(*made->names));
    if (made->tensors == NULL || made->names == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tensors");
    }
    for (uint32_t layer = 0; layer < base->layers; layer++) {
        for (uint32_t t = 0; t < CM_TARGET_COUNT; t++) {
            uint32_t rows, columns;
            if (cm_peft_layers(peft)[layer].a[t] != NULL) {
                cm_peft_target_shape(base, t, &rows, &columns);
                tensor_plan(made, layer, 2 * t, cm_peft_rank(peft), columns);
                tensor_plan(made, layer, 2 * t + 1, rows, cm_peft_rank(peft));
            }
        }
    }
    made->payload = calloc(1, made->payload_bytes);
    return made->payload != NULL
               ? CM_OK
               : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "adapter of %llu bytes",
                                (unsigned long long)made->payload_bytes);
}

/* ------------------------------------------------------------------ the values */

/* One stored row; `half` is where its first value lies, the others follow 16 halves apart. */
static enum cm_status row_store(struct made *made, const struct cm_source_tensor *source,
                                uint64_t source_row, const uint8_t *bytes, uint8_t *half,
                                struct cm_error *err)
{
    const struct cm_quant *quant = cm_quant_find(source->type);
    float values[CM_TILE_COLUMNS];
    for (uint64_t k = 0; k < source->columns; k++) {
        if (k % CM_TILE_COLUMNS == 0) {
            quant->values(bytes, k / CM_TILE_COLUMNS, values);
        }
        const float value = values[k % CM_TILE_COLUMNS];
        const uint16_t stored = cm_half_from_float(value);
        if (!isfinite(value) || !cm_half_finite(stored)) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-PEFT-TENSOR",
                                "adapter tensor '%.*s', row %llu, column %llu: the value is NaN, "
                                "infinite or beyond fp16's 65504",
                                (int)source->name.size, source->name.bytes,
                                (unsigned long long)source_row, (unsigned long long)k);
        }
        memcpy(half + k * CM_TILE_ROWS * 2, &stored, sizeof(stored));
        const double error = (double)cm_half_to_float(stored) - (double)value;
        made->error_square += error * error;
        made->square += (double)value * (double)value;
    }
    return CM_OK;
}

static enum cm_status tensor_store(struct made *made, const struct cm_manifest *base,
                                   const struct cm_manifest_tensor *stored,
                                   const struct cm_source_tensor *source, struct cm_error *err)
{
    const bool turned = stored->role == 2 * CM_TARGET_Q + 1 || stored->role == 2 * CM_TARGET_K + 1;
    uint8_t *bytes = calloc(1, (size_t)source->row_bytes + ROW_SPARE_BYTES);
    enum cm_status status =
        bytes != NULL ? CM_OK : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "a row");
    for (uint64_t row = 0; status == CM_OK && row < stored->rows; row++) {
        const uint64_t from = turned ? cm_plan_pair_row(base, row) : row;
        const uint64_t at =
            row / CM_TILE_ROWS * stored->columns * CM_TILE_ROWS + row % CM_TILE_ROWS;
        status = cm_source_rows_read(source, from, 1, bytes, err);
        if (status == CM_OK) {
            status =
                row_store(made, source, from, bytes, made->payload + stored->offset + 2 * at, err);
        }
    }
    free(bytes);
    return status;
}

static enum cm_status tensors_store(const struct cm_peft *peft, const struct cm_manifest *base,
                                    struct made *made, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    for (uint32_t i = 0; status == CM_OK && i < made->manifest.tensor_count; i++) {
        const struct cm_manifest_tensor *stored = &made->tensors[i];
        const struct cm_peft_layer *layer = &cm_peft_layers(peft)[stored->layer];
        status = tensor_store(made, base, stored,
                              (stored->role % 2 == 0 ? layer->a : layer->b)[stored->role / 2], err);
    }
    return status;
}

static enum cm_status adapter_make(const struct cm_pack_arguments *arguments,
                                   const struct cm_peft *peft, const struct cm_manifest *base,
                                   struct made *made, struct cm_error *err)
{
    made->manifest = (struct cm_manifest_adapter){
        .name = {arguments->name, (uint32_t)strlen(arguments->name)},
        .license = {"", 0},
        .origin = {arguments->input, (uint32_t)strlen(arguments->input)},
        .rank = cm_peft_rank(peft),
        .scale = cm_peft_scale(peft),
        .layers = base->layers,
        .width = base->width,
        .heads = base->heads,
        .kv_heads = base->kv_heads,
        .head_width = base->head_width,
        .rope_width = base->rope_width,
        .ffn_width = base->ffn_width};
    enum cm_status status = cm_pack_base_digest(arguments->base, made->manifest.base_digest, err);
    if (status == CM_OK && base->kv_heads * base->head_width % CM_TILE_ROWS != 0) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-PEFT-BASE",
                              "the base model's K has %u rows, no multiple of 16: this host has no "
                              "adapters to it",
                              base->kv_heads * base->head_width);
    }
    if (status == CM_OK) {
        status = tensors_plan(peft, base, made, err);
    }
    if (status == CM_OK) {
        status = tensors_store(peft, base, made, err);
    }
    made->manifest.tensors = made->tensors;
    made->manifest.rounding =
        made->square > 0.0 ? (float)sqrt(made->error_square / made->square) : 0.0f;
    return status;
}

/* ------------------------------------------------------------------ the command */

static enum cm_status adapter_seal(const struct cm_pack_arguments *arguments,
                                   const struct made *made, struct cm_error *err)
{
    struct cm_pack_seal seal = {.key = NULL};
    struct cm_package_writer *writer = NULL;
    enum cm_status status = cm_pack_seal_begin(arguments, &seal, err);
    if (status == CM_OK) {
        status = cm_package_write_begin_adapter(&seal.options, cm_secret_view(seal.key),
                                                &made->manifest, made->payload_bytes, &writer, err);
    }
    if (status == CM_OK) {
        status = cm_package_write_append(writer, made->payload, made->payload_bytes, err);
        if (status == CM_OK) {
            status = cm_package_write_finish(writer, err);
        } else {
            cm_package_write_abort(writer);
        }
    }
    if (status == CM_OK) {
        status = cm_pack_seal_finish(arguments, &seal, err);
    }
    cm_pack_seal_done(&seal);
    return status;
}

static void summary_print(const struct cm_pack_arguments *arguments, const struct made *made)
{
    const struct cm_manifest_adapter *m = &made->manifest;
    char base[2 * CM_DIGEST_BYTES + 1];
    cm_hex_write(m->base_digest, CM_DIGEST_BYTES, base);
    if (arguments->json) {
        json_t *facts = json_pack(
            "{s:s, s:s, s:s, s:i, s:f, s:i, s:I, s:b, s:f}", "package", arguments->out, "adapter",
            arguments->name, "base", base, "rank", (int)m->rank, "scale", (double)m->scale,
            "tensors", (int)m->tensor_count, "payload_bytes", (json_int_t)made->payload_bytes,
            "exact", made->error_square == 0.0, "relative_rms_error", (double)m->rounding);
        json_dumpf(facts, stdout, JSON_INDENT(2));
        printf("\n");
        json_decref(facts);
        return;
    }
    printf("%s: adapter %s to %.16s…, rank %u, scale %g, %u tensors, %.1f MB\n", arguments->out,
           arguments->name, base, m->rank, (double)m->scale, m->tensor_count,
           (double)made->payload_bytes / 1e6);
    if (made->error_square == 0.0) {
        printf("values are carried over exactly\n");
    } else {
        printf("some values were rounded to fp16: relative RMS error %.6f over the whole\n",
               (double)m->rounding);
    }
}

enum cm_status cm_command_adapter(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    struct cm_plan base = {.payload_bytes = 0};
    struct cm_peft *peft = NULL;
    struct made made = {.payload = NULL};
    enum cm_status status = cm_pack_seal_check(arguments, err);
    if (status == CM_OK) {
        status = base_shape_read(arguments->config, &base, err);
    }
    if (status == CM_OK) {
        status = cm_peft_open(arguments->input, &base.manifest, &peft, err);
    }
    if (status == CM_OK) {
        status = adapter_make(arguments, peft, &base.manifest, &made, err);
    }
    if (status == CM_OK) {
        status = adapter_seal(arguments, &made, err);
    }
    if (status == CM_OK) {
        summary_print(arguments, &made);
    }
    if (made.payload != NULL) {
        cm_wipe(made.payload, made.payload_bytes);
    }
    free(made.payload);
    free(made.tensors);
    free(made.names);
    cm_peft_close(peft);
    cm_plan_done(&base);
    return status;
}
