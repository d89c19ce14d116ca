/* Weights into compute layout: tiles of 16 rows × 32 columns, a quant plane, then a scale plane. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/model.h"
#include "loader/pack/half.h"
#include "loader/pack/plan.h"
#include "loader/pack/quant.h"

/* A row's last block may be read beyond its columns. */
#define ROW_SPARE_BYTES (CM_TILE_COLUMNS * sizeof(float))

static void bits_add(uint8_t *at, uint32_t bits, uint32_t shift)
{
    *at = (uint8_t)(*at | bits << shift);
}

/* Put one row's block into its tile (FORMAT.md, "Compute layout"). */
static void tile_put(uint32_t kind, uint32_t r, const struct cm_quant_block *block, uint8_t *quants,
                     uint8_t *scales)
{
    const struct cm_tile_shape shape = cm_tile_shape(kind);
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        const uint32_t column = 4 * r + k % 4; /* of a line of 64 bytes */
        if (shape.bits == 16) {
            memcpy(&quants[64 * (k / 2) + 4 * r + 2 * (k % 2)], &block->w[k], 2);
        } else if (shape.bits == 8) {
            quants[64 * (k / 4) + column] = block->q[k];
        } else {
            const uint8_t low = block->q[k] & 15u;
            bits_add(&quants[64 * ((k % 16) / 4) + column], low, k < 16 ? 0 : 4);
        }
        if (shape.bits == 5) {
            bits_add(&quants[256 + column], block->q[k] >> 4, k / 4);
        }
    }
    if (shape.scale_bytes > 0) {
        memcpy(scales + 2 * r, &block->d, 2);
    }
    if (shape.affine) {
        memcpy(scales + 32 + 2 * r, &block->m, 2);
    }
}

/* 2i comes from i, 2i + 1 from i + rope_width / 2; what RoPE does not turn stays. */
uint64_t cm_plan_pair_row(const struct cm_manifest *m, uint64_t row)
{
    uint64_t head = row / m->head_width * m->head_width, r = row % m->head_width;
    if (r < m->rope_width) {
        r = r % 2 * (m->rope_width / 2) + r / 2;
    }
    return head + r;
}

/* Which source row fills stored row `row`? */
static void row_find(const struct cm_plan *plan, const struct cm_plan_source *source, uint64_t row,
                     const struct cm_source_tensor **ret_tensor, uint64_t *ret_row)
{
    uint32_t i = 0;
    if (source->weave == CM_WEAVE_ALTERNATE_TILES) {
        uint64_t tile = row / CM_TILE_ROWS;
        i = (uint32_t)(tile % 2);
        row = tile / 2 * CM_TILE_ROWS + row % CM_TILE_ROWS;
    } else {
        while (row >= source->parts[i].rows) {
            row -= source->parts[i++].rows;
        }
    }
    if (source->parts[i].turned && plan->pairs_apart) {
        row = cm_plan_pair_row(&plan->manifest, row);
    }
    *ret_tensor = source->parts[i].tensor;
    *ret_row = source->parts[i].first + row;
}

static enum cm_status refuse_value(const struct cm_source_tensor *tensor, uint64_t row,
                                   uint64_t block, struct cm_error *err)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-VALUE",
                        "model file at offset %llu: tensor '%.*s', row %llu, block %llu: NaN or "
                        "infinite value",
                        (unsigned long long)(tensor->offset + row * tensor->row_bytes),
                        (int)tensor->name.size, tensor->name.bytes, (unsigned long long)row,
                        (unsigned long long)block);
}

static bool all_finite(const float values[CM_TILE_COLUMNS])
{
    bool finite = true;
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        finite = finite && isfinite(values[k]);
    }
    return finite;
}

/* The whole of a vector as floats; the caller frees. */
static enum cm_status vector_read(const struct cm_source_tensor *tensor, float **ret_values,
                                  struct cm_error *err)
{
    const struct cm_quant *quant = cm_quant_find(tensor->type);
    uint64_t blocks = (tensor->columns + CM_TILE_COLUMNS - 1) / CM_TILE_COLUMNS;
    uint8_t *row = calloc(1, (size_t)tensor->row_bytes + ROW_SPARE_BYTES);
    float *values = calloc(blocks, CM_TILE_COLUMNS * sizeof(*values));
    enum cm_status status = row != NULL && values != NULL
                                ? cm_source_rows_read(tensor, 0, 1, row, err)
                                : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "a row");
    for (uint64_t b = 0; status == CM_OK && b < blocks; b++) {
        quant->values(row, b, values + b * CM_TILE_COLUMNS);
        if (!all_finite(values + b * CM_TILE_COLUMNS)) {
            status = refuse_value(tensor, 0, b, err);
        }
    }
    free(row);
    if (status != CM_OK) {
        free(values);
        return status;
    }
    *ret_values = values;
    return CM_OK;
}

/* A vector's parts one after the other; norms may be stored as weight - 1. */
static enum cm_status vector_convert(const struct cm_plan *plan,
                                     const struct cm_manifest_tensor *stored,
                                     const struct cm_plan_source *source, uint8_t *ret_bytes,
                                     struct cm_error *err)
{
    float *parts[3] = {NULL};
    bool norm = stored->layer == CM_MANIFEST_NO_LAYER || stored->role != CM_LAYER_QKV_BIAS;
    enum cm_status status = CM_OK;
    for (uint32_t i = 0; status == CM_OK && i < source->count; i++) {
        status = vector_read(source->parts[i].tensor, &parts[i], err);
    }
    for (uint64_t row = 0; status == CM_OK && row < stored->rows; row++) {
        const struct cm_source_tensor *tensor;
        uint64_t from;
        uint32_t i = 0;
        row_find(plan, source, row, &tensor, &from);
        while (source->parts[i].tensor != tensor) {
            i++;
        }
        float value = parts[i][from] + (norm ? plan->norm_added : 0.0f);
        memcpy(ret_bytes + row * sizeof(value), &value, sizeof(value));
    }
    for (uint32_t i = 0; i < source->count; i++) {
        free(parts[i]);
    }
    return status;
}

/* One block of a row as quants of the stored kind, and what that costs. False: not finite. */
static bool block_convert(const struct cm_quant *quant, uint32_t kind, const uint8_t *row,
                          uint64_t b, uint64_t columns, struct cm_quant_block *ret,
                          struct cm_convert_loss *loss)
{
    float values[CM_TILE_COLUMNS], stored[CM_TILE_COLUMNS];
    quant->values(row, b, values);
    for (uint64_t k = columns - b * CM_TILE_COLUMNS; k < CM_TILE_COLUMNS; k++) {
        values[k] = 0.0f;
    }
    if (!all_finite(values)) {
        return false;
    }
    bool fits = cm_quant_fits(quant, kind) ? cm_quant_carry(quant, kind, row, b, ret)
                                           : cm_quant_round(kind, values, ret);
    cm_quant_values(kind, ret, stored);
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        double error = (double)stored[k] - (double)values[k];
        loss->error_square += error * error;
        loss->square += (double)values[k] * (double)values[k];
    }
    return fits;
}

static enum cm_status row_convert(const struct cm_manifest_tensor *stored,
                                  const struct cm_source_tensor *tensor, uint64_t source_row,
                                  const uint8_t *bytes, uint64_t row, uint8_t *ret_bytes,
                                  struct cm_convert_loss *loss, struct cm_error *err)
{
    uint64_t blocks = (stored->columns + CM_TILE_COLUMNS - 1) / CM_TILE_COLUMNS;
    const struct cm_tile_shape shape = cm_tile_shape(stored->kind);
    for (uint64_t b = 0; b < blocks; b++) {
        uint64_t tile = row / CM_TILE_ROWS * blocks + b;
        struct cm_quant_block block;
        if (!block_convert(cm_quant_find(tensor->type), stored->kind, bytes, b, stored->columns,
                           &block, loss)) {
            return refuse_value(tensor, source_row, b, err);
        }
        uint8_t *scales =
            shape.scale_bytes > 0 ? ret_bytes + (stored->scale_offset - stored->offset) : ret_bytes;
        tile_put(stored->kind, (uint32_t)(row % CM_TILE_ROWS), &block,
                 ret_bytes + tile * shape.quant_bytes, scales + tile * shape.scale_bytes);
    }
    return CM_OK;
}

static uint64_t source_row_bytes(const struct cm_plan_source *source)
{
    uint64_t row_bytes = 0;
    for (uint32_t i = 0; i < source->count; i++) {
        uint64_t bytes = source->parts[i].tensor->row_bytes;
        row_bytes = bytes > row_bytes ? bytes : row_bytes;
    }
    return row_bytes;
}

static enum cm_status matrix_convert(const struct cm_plan *plan,
                                     const struct cm_manifest_tensor *stored,
                                     const struct cm_plan_source *source, uint8_t *ret_bytes,
                                     struct cm_convert_loss *loss, struct cm_error *err)
{
    uint8_t *row_buffer = calloc(1, (size_t)source_row_bytes(source) + ROW_SPARE_BYTES);
    if (row_buffer == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "a row");
    }
    enum cm_status status = CM_OK;
    for (uint64_t row = 0; status == CM_OK && row < stored->rows; row++) {
        const struct cm_source_tensor *tensor;
        uint64_t from;
        row_find(plan, source, row, &tensor, &from);
        status = cm_source_rows_read(tensor, from, 1, row_buffer, err);
        if (status == CM_OK) {
            status = row_convert(stored, tensor, from, row_buffer, row, ret_bytes, loss, err);
        }
    }
    free(row_buffer);
    return status;
}

enum cm_status cm_plan_rows_open(const struct cm_plan *plan, uint32_t index,
                                 struct cm_plan_rows *ret_rows, struct cm_error *err)
{
    const struct cm_manifest_tensor *stored = &plan->manifest.tensors[index];
    size_t columns = ((size_t)stored->columns + CM_TILE_COLUMNS - 1) / CM_TILE_COLUMNS;
    *ret_rows = (struct cm_plan_rows){
        .plan = plan,
        .index = index,
        .bytes = calloc(1, (size_t)source_row_bytes(&plan->sources[index]) + ROW_SPARE_BYTES),
        .source = calloc(columns, CM_TILE_COLUMNS * sizeof(float)),
        .stored = calloc(columns, CM_TILE_COLUMNS * sizeof(float))};
    return ret_rows->bytes != NULL && ret_rows->source != NULL && ret_rows->stored != NULL
               ? CM_OK
               : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "a row");
}

enum cm_status cm_plan_rows_next(struct cm_plan_rows *rows, struct cm_error *err)
{
    const struct cm_manifest_tensor *stored = &rows->plan->manifest.tensors[rows->index];
    const struct cm_source_tensor *tensor;
    uint64_t from;
    struct cm_convert_loss none = {.square = 0.0};
    row_find(rows->plan, &rows->plan->sources[rows->index], rows->row++, &tensor, &from);
    const struct cm_quant *quant = cm_quant_find(tensor->type);
    enum cm_status status = cm_source_rows_read(tensor, from, 1, rows->bytes, err);
    for (uint64_t b = 0; status == CM_OK && b * CM_TILE_COLUMNS < stored->columns; b++) {
        struct cm_quant_block block;
        quant->values(rows->bytes, b, rows->source + b * CM_TILE_COLUMNS);
        if (block_convert(quant, stored->kind, rows->bytes, b, stored->columns, &block, &none)) {
            cm_quant_values(stored->kind, &block, rows->stored + b * CM_TILE_COLUMNS);
        } else {
            status = refuse_value(tensor, from, b, err);
        }
    }
    return status;
}

void cm_plan_rows_close(struct cm_plan_rows *rows)
{
    free(rows->bytes);
    free(rows->source);
    free(rows->stored);
}

bool cm_plan_exact(const struct cm_plan *plan)
{
    bool exact = true;
    for (uint32_t i = 0; i < plan->manifest.tensor_count; i++) {
        uint32_t kind = plan->manifest.tensors[i].kind;
        for (uint32_t p = 0; kind != CM_TENSOR_F32 && p < plan->sources[i].count; p++) {
            const struct cm_quant *quant = cm_quant_find(plan->sources[i].parts[p].tensor->type);
            bool carried = quant->exact && cm_quant_fits(quant, kind);
            bool same = quant->type == CM_QUANT_BF16 && kind == CM_TENSOR_BF16;
            exact = exact && (carried || same);
        }
    }
    return exact;
}

enum cm_status cm_plan_convert(const struct cm_plan *plan, uint32_t index, uint8_t *ret_bytes,
                               struct cm_convert_loss *ret_loss, struct cm_error *err)
{
    const struct cm_manifest_tensor *stored = &plan->manifest.tensors[index];
    const struct cm_plan_source *source = &plan->sources[index];
    struct cm_convert_loss loss = {.exact = true};
    /* Padding scales of u8 and u4 symmetric stay 0, so padded rows and columns add nothing. */
    memset(ret_bytes, 0, (size_t)stored->bytes);
    enum cm_status status = stored->kind == CM_TENSOR_F32
                                ? vector_convert(plan, stored, source, ret_bytes, err)
                                : matrix_convert(plan, stored, source, ret_bytes, &loss, err);
    loss.exact = !(loss.error_square > 0.0);
    *ret_loss = loss;
    return status;
}
