/* Weights into compute layout: tiles of 16 rows × 32 columns, a quant plane, then a scale plane. */
#include "loader/pack/plan.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/model.h"
#include "loader/pack/half.h"

/* One block of 32 weights, as integers with scales. value = d * (q - zero) + m. */
struct block {
    uint8_t q[CM_TILE_COLUMNS];
    uint16_t d, m; /* fp16 bits */
};

static uint16_t u16_at(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] | bytes[1] << 8);
}

static float f32_at(const uint8_t *bytes)
{
    float value;
    memcpy(&value, bytes, sizeof(value));
    return value;
}

/* Values of block `b` of a row, whatever its type. False: NaN or infinite. */
static bool block_floats(uint32_t type, const uint8_t *row, uint64_t b, uint32_t columns,
                         float ret[CM_TILE_COLUMNS])
{
    bool finite = true;
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        uint64_t at = b * CM_TILE_COLUMNS + k;
        float value = 0.0f;
        uint32_t nibble;
        const uint8_t *block;
        uint32_t bits;
        if (at < columns) {
            switch (type) {
            case CM_GGUF_F32:
                value = f32_at(row + 4 * at);
                break;
            case CM_GGUF_F16:
                value = cm_half_to_float(u16_at(row + 2 * at));
                break;
            case CM_GGUF_BF16:
                bits = (uint32_t)u16_at(row + 2 * at) << 16;
                memcpy(&value, &bits, sizeof(value));
                break;
            case CM_GGUF_Q8_0:
                block = row + b * 34;
                value = cm_half_to_float(u16_at(block)) * (float)(int8_t)block[2 + k];
                break;
            case CM_GGUF_Q4_0:
                block = row + b * 18;
                nibble = k < 16 ? block[2 + k] & 15u : block[2 + k - 16] >> 4;
                value = cm_half_to_float(u16_at(block)) * ((float)nibble - 8.0f);
                break;
            default: /* CM_GGUF_Q4_1 */
                block = row + b * 20;
                nibble = k < 16 ? block[4 + k] & 15u : block[4 + k - 16] >> 4;
                value = cm_half_to_float(u16_at(block)) * (float)nibble +
                        cm_half_to_float(u16_at(block + 2));
                break;
            }
        }
        finite = finite && isfinite(value);
        ret[k] = value;
    }
    return finite;
}

/* Quants and scales carried over as they are. False: NaN or infinite scale. */
static bool block_exact(uint32_t type, const uint8_t *row, uint64_t b, struct block *ret)
{
    const uint8_t *block = row + b * (type == CM_GGUF_Q8_0   ? 34u
                                      : type == CM_GGUF_Q4_0 ? 18u
                                                             : 20u);
    const uint8_t *quants = block + (type == CM_GGUF_Q4_1 ? 4 : 2);
    ret->d = u16_at(block);
    ret->m = type == CM_GGUF_Q4_1 ? u16_at(block + 2) : 0;
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        if (type == CM_GGUF_Q8_0) {
            ret->q[k] = (uint8_t)(quants[k] ^ 0x80); /* int8 + 128 */
        } else {
            ret->q[k] = k < 16 ? quants[k] & 15u : (uint8_t)(quants[k - 16] >> 4);
        }
    }
    return cm_half_finite(ret->d) && cm_half_finite(ret->m);
}

/* Quantise 32 values to u8 symmetric: d = max|x| / 127. */
static bool block_quantise(const float values[CM_TILE_COLUMNS], struct block *ret,
                           struct cm_convert_loss *loss)
{
    float greatest = 0.0f;
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        greatest = fmaxf(greatest, fabsf(values[k]));
    }
    ret->d = cm_half_from_float(greatest / 127.0f);
    ret->m = 0;
    float d = cm_half_to_float(ret->d);
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        float q = d > 0.0f ? rintf(values[k] / d) : 0.0f;
        q = fminf(fmaxf(q, -127.0f), 127.0f);
        ret->q[k] = (uint8_t)((int)q + 128);
        double error = (double)d * (double)q - (double)values[k];
        loss->error_square += error * error;
        loss->square += (double)values[k] * (double)values[k];
    }
    return cm_half_finite(ret->d);
}

/* Put one row's block into its tile (FORMAT.md, "Compute layout"). */
static void tile_put(uint32_t kind, uint32_t r, const struct block *block, uint8_t *quants,
                     uint8_t *scales)
{
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        if (kind == CM_TENSOR_U8S) {
            quants[64 * (k / 4) + 4 * r + k % 4] = block->q[k];
        } else {
            uint8_t *at = &quants[64 * ((k % 16) / 4) + 4 * r + k % 4];
            *at = (uint8_t)(*at | (k < 16 ? block->q[k] : block->q[k] << 4));
        }
    }
    memcpy(scales + 2 * r, &block->d, 2);
    if (kind == CM_TENSOR_U4A) {
        memcpy(scales + 32 + 2 * r, &block->m, 2);
    }
}

/* Which source row fills stored row `row`? */
static void row_find(const struct cm_plan_source *source, uint64_t row,
                     const struct cm_gguf_tensor **ret_tensor, uint64_t *ret_row)
{
    if (source->weave == CM_WEAVE_ALTERNATE_TILES) {
        uint64_t tile = row / CM_TILE_ROWS;
        *ret_tensor = source->tensors[tile % 2];
        *ret_row = tile / 2 * CM_TILE_ROWS + row % CM_TILE_ROWS;
        return;
    }
    uint32_t i = 0;
    while (row >= source->tensors[i]->rows) {
        row -= source->tensors[i++]->rows;
    }
    *ret_tensor = source->tensors[i];
    *ret_row = row;
}

static enum cm_status refuse_value(const struct cm_gguf_tensor *tensor, uint64_t row,
                                   uint64_t block, struct cm_error *err)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-VALUE",
                        "GGUF at offset %llu: tensor '%.*s', row %llu, block %llu: NaN or infinite "
                        "value",
                        (unsigned long long)(tensor->offset + row * tensor->row_bytes),
                        (int)tensor->name.size, tensor->name.bytes, (unsigned long long)row,
                        (unsigned long long)block);
}

static enum cm_status vector_convert(const struct cm_gguf *gguf,
                                     const struct cm_gguf_tensor *tensor, uint8_t *ret_bytes,
                                     struct cm_error *err)
{
    uint8_t *row = malloc((size_t)tensor->row_bytes);
    if (row == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "a row");
    }
    enum cm_status status = cm_gguf_rows_read(gguf, tensor, 0, 1, row, err);
    for (uint64_t b = 0; status == CM_OK && b * CM_TILE_COLUMNS < tensor->columns; b++) {
        float values[CM_TILE_COLUMNS];
        uint64_t left = tensor->columns - b * CM_TILE_COLUMNS;
        size_t count = left < CM_TILE_COLUMNS ? (size_t)left : CM_TILE_COLUMNS;
        if (!block_floats(tensor->type, row, b, (uint32_t)tensor->columns, values)) {
            status = refuse_value(tensor, 0, b, err);
        }
        memcpy(ret_bytes + b * CM_TILE_COLUMNS * 4, values, count * 4);
    }
    free(row);
    return status;
}

static enum cm_status row_convert(const struct cm_manifest_tensor *stored,
                                  const struct cm_gguf_tensor *tensor, uint64_t source_row,
                                  const uint8_t *bytes, uint64_t row, bool exact,
                                  uint8_t *ret_bytes, struct cm_convert_loss *loss,
                                  struct cm_error *err)
{
    uint64_t blocks = (stored->columns + CM_TILE_COLUMNS - 1) / CM_TILE_COLUMNS;
    uint64_t quant_tile, scale_tile;
    /* A single tile's sizes: half of the least padded tensor of 32 rows. */
    bool known =
        cm_tensor_layout(stored->kind, CM_ROWS_PAD, CM_COLUMNS_PAD, &quant_tile, &scale_tile);
    CM_ASSERT(known);
    quant_tile /= 2;
    scale_tile /= 2;
    for (uint64_t b = 0; b < blocks; b++) {
        uint64_t tile = row / CM_TILE_ROWS * blocks + b;
        struct block block;
        float values[CM_TILE_COLUMNS];
        bool finite = exact ? block_exact(tensor->type, bytes, b, &block)
                            : block_floats(tensor->type, bytes, b, stored->columns, values) &&
                                  block_quantise(values, &block, loss);
        if (!finite) {
            return refuse_value(tensor, source_row, b, err);
        }
        tile_put(stored->kind, (uint32_t)(row % CM_TILE_ROWS), &block,
                 ret_bytes + tile * quant_tile,
                 ret_bytes + (stored->scale_offset - stored->offset) + tile * scale_tile);
    }
    return CM_OK;
}

enum cm_status cm_plan_convert(const struct cm_gguf *gguf, const struct cm_plan *plan,
                               uint32_t index, uint8_t *ret_bytes, struct cm_convert_loss *ret_loss,
                               struct cm_error *err)
{
    const struct cm_manifest_tensor *stored = &plan->manifest.tensors[index];
    const struct cm_plan_source *source = &plan->sources[index];
    struct cm_convert_loss loss = {.exact = true};
    memset(ret_bytes, 0, (size_t)stored->bytes);
    if (stored->kind == CM_TENSOR_F32) {
        *ret_loss = loss;
        return vector_convert(gguf, source->tensors[0], ret_bytes, err);
    }
    uint32_t type = source->tensors[0]->type;
    for (uint32_t i = 0; i < source->count; i++) {
        loss.exact = loss.exact && source->tensors[i]->type == type &&
                     (type == CM_GGUF_Q4_0 || type == CM_GGUF_Q4_1 || type == CM_GGUF_Q8_0);
    }
    uint64_t row_bytes = 0;
    for (uint32_t i = 0; i < source->count; i++) {
        uint64_t bytes = source->tensors[i]->row_bytes;
        row_bytes = bytes > row_bytes ? bytes : row_bytes;
    }
    /* Padding scales of u8 and u4 symmetric stay 0, so padded rows and columns add nothing. */
    uint8_t *row_buffer = malloc((size_t)row_bytes);
    if (row_buffer == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "a row");
    }
    enum cm_status status = CM_OK;
    for (uint64_t row = 0; status == CM_OK && row < stored->rows; row++) {
        const struct cm_gguf_tensor *tensor;
        uint64_t source_row;
        row_find(source, row, &tensor, &source_row);
        status = cm_gguf_rows_read(gguf, tensor, source_row, 1, row_buffer, err);
        if (status == CM_OK) {
            status = row_convert(stored, tensor, source_row, row_buffer, row, loss.exact, ret_bytes,
                                 &loss, err);
        }
    }
    free(row_buffer);
    *ret_loss = loss;
    return status;
}
