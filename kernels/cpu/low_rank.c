/* Products with the factors of adapters, in the order of kernels/NUMERICS.md. Compiled once for
 * each path. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/lanes.h"

#define PARTS 4u

/* A tile's 16 rows for `tokens` tokens at once: column j, j + 4, … ascending in part j. */
static inline void tile_product(const uint16_t *tile, uint32_t columns, const float *x,
                                size_t stride, const uint32_t tokens, lanes ret[])
{
    lanes part[LANES_LOW_RANK_TOKENS][PARTS];
    uint32_t k = 0;
    for (uint32_t t = 0; t < tokens; t++) {
        for (uint32_t j = 0; j < PARTS; j++) {
            part[t][j] = lanes_set(0.0f);
        }
    }
    for (; k + PARTS <= columns; k += PARTS) {
        for (uint32_t j = 0; j < PARTS; j++) {
            lanes w = lanes_half_load(tile + (size_t)(k + j) * LANES);
            for (uint32_t t = 0; t < tokens; t++) {
                part[t][j] = lanes_fma(w, lanes_set(x[t * stride + k + j]), part[t][j]);
            }
        }
    }
    for (uint32_t j = 0; j < columns - k; j++) {
        lanes w = lanes_half_load(tile + (size_t)(k + j) * LANES);
        for (uint32_t t = 0; t < tokens; t++) {
            part[t][j] = lanes_fma(w, lanes_set(x[t * stride + k + j]), part[t][j]);
        }
    }
    for (uint32_t t = 0; t < tokens; t++) {
        ret[t] = lanes_add(lanes_add(part[t][0], part[t][1]), lanes_add(part[t][2], part[t][3]));
    }
}

/* A block of bf16 as floats. */
static inline void lanes_bfloats(const uint16_t *from, float to[CM_TILE_COLUMNS])
{
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        const uint32_t bits = (uint32_t)from[k] << 16;
        memcpy(to + k, &bits, sizeof(bits));
    }
}

void LANES_NAME(shrink)(const uint16_t *tile, const struct cm_activations *x, uint32_t token,
                        uint32_t tokens, uint32_t block, uint32_t blocks, float *ret, size_t stride)
{
    float wide[LANES_LOW_RANK_TOKENS][CM_LOW_RANK_COLUMNS];
    lanes product[LANES_LOW_RANK_TOKENS];
    for (uint32_t first = 0; first < tokens; first += LANES_LOW_RANK_TOKENS) {
        const uint32_t left = tokens - first;
        const uint32_t count = left < LANES_LOW_RANK_TOKENS ? left : LANES_LOW_RANK_TOKENS;
        for (uint32_t t = 0; t < count; t++) {
            for (uint32_t b = 0; b < blocks; b++) {
                size_t at = cm_activation_at(x, token + first + t, block + b);
                float *to = wide[t] + b * CM_TILE_COLUMNS;
                if (x->rounded != NULL) {
                    lanes_bfloats(x->rounded + at * CM_TILE_COLUMNS, to);
                    continue;
                }
                if (x->x != NULL) {
                    memcpy(to, x->x + at * CM_TILE_COLUMNS, CM_TILE_COLUMNS * sizeof(float));
                    continue;
                }
                const int8_t *q = x->q + at * CM_TILE_COLUMNS;
                lanes scale = lanes_set(x->scale[at]);
                lanes_store(to, lanes_mul(lanes_bytes_load(q), scale));
                lanes_store(to + LANES, lanes_mul(lanes_bytes_load(q + LANES), scale));
            }
        }
        if (count == LANES_LOW_RANK_TOKENS) {
            tile_product(tile, blocks * CM_TILE_COLUMNS, wide[0], CM_LOW_RANK_COLUMNS,
                         LANES_LOW_RANK_TOKENS, product);
        }
        for (uint32_t t = 0; t < count; t++) {
            if (count < LANES_LOW_RANK_TOKENS) {
                tile_product(tile, blocks * CM_TILE_COLUMNS, wide[t], 0, 1, product + t);
            }
            lanes_store(ret + (first + t) * stride, product[t]);
        }
    }
}

void LANES_NAME(expand)(const uint16_t *tile, uint32_t rank, uint32_t tiles, const float *u,
                        float *y, size_t step)
{
    for (uint32_t i = 0; i < tiles; i++) {
        lanes product;
        tile_product(tile + (size_t)i * rank * LANES, rank, u, 0, 1, &product);
        lanes_store(y + i * step, lanes_add(lanes_load(y + i * step), product));
    }
}
