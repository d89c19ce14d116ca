/* Sizes of tensors in compute layout. */
#include "kernels/model.h"

bool cm_tensor_layout(uint32_t kind, uint64_t rows, uint64_t columns, uint64_t *ret_quant_bytes,
                      uint64_t *ret_scale_bytes)
{
    if (kind == CM_TENSOR_NONE || kind >= CM_TENSOR_KIND_COUNT || rows == 0 || columns == 0 ||
        rows > (1u << 24) || columns > (1u << 20)) {
        return false;
    }
    if (kind == CM_TENSOR_F32) {
        *ret_quant_bytes = rows * columns * 4;
        *ret_scale_bytes = 0;
        return columns == 1;
    }
    if (kind == CM_TENSOR_F16) {
        *ret_quant_bytes = (rows + CM_TILE_ROWS - 1) / CM_TILE_ROWS * CM_TILE_ROWS * columns * 2;
        *ret_scale_bytes = 0;
        return true;
    }
    uint64_t row_tiles = (rows + CM_ROWS_PAD - 1) / CM_ROWS_PAD * (CM_ROWS_PAD / CM_TILE_ROWS);
    const struct cm_tile_shape tile = cm_tile_shape(kind);
    uint64_t blocks = (columns + CM_COLUMNS_PAD - 1) / CM_COLUMNS_PAD;
    *ret_quant_bytes = row_tiles * blocks * tile.quant_bytes;
    *ret_scale_bytes = row_tiles * blocks * tile.scale_bytes;
    return true;
}
