/* Formats of model files: 32 weights at a time, as floats and as quants of a stored kind. */
#include "loader/pack/quant.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "loader/pack/half.h"
#include "runtime/base/error.h"

#define SUPER 256u /* weights of a K block */

static uint16_t u16_at(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] | bytes[1] << 8);
}

static float half_at(const uint8_t *bytes)
{
    return cm_half_to_float(u16_at(bytes));
}

static void f32_values(const uint8_t *row, uint64_t index, float ret[CM_TILE_COLUMNS])
{
    memcpy(ret, row + index * CM_TILE_COLUMNS * sizeof(float), CM_TILE_COLUMNS * sizeof(float));
}

static void f16_values(const uint8_t *row, uint64_t index, float ret[CM_TILE_COLUMNS])
{
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        ret[k] = half_at(row + 2 * (index * CM_TILE_COLUMNS + k));
    }
}

static void bf16_values(const uint8_t *row, uint64_t index, float ret[CM_TILE_COLUMNS])
{
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        uint32_t bits = (uint32_t)u16_at(row + 2 * (index * CM_TILE_COLUMNS + k)) << 16;
        memcpy(&ret[k], &bits, sizeof(bits));
    }
}

/* ---------------------------------------------------------------- quants that a kind holds */

static void nibbles(const uint8_t *bytes, uint8_t ret[CM_TILE_COLUMNS])
{
    for (uint32_t k = 0; k < 16; k++) {
        ret[k] = bytes[k] & 15u;
        ret[k + 16] = (uint8_t)(bytes[k] >> 4);
    }
}

/* Add the fifth bits: bit k of a little-endian word is weight k's. */
static void fifth_bits(const uint8_t *bytes, uint8_t q[CM_TILE_COLUMNS])
{
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        q[k] = (uint8_t)(q[k] | ((bytes[k / 8] >> k % 8) & 1u) << 4);
    }
}

static void q4_0_carry(const uint8_t *row, uint64_t index, struct cm_quant_block *ret)
{
    const uint8_t *block = row + index * 18;
    *ret = (struct cm_quant_block){.d = u16_at(block)};
    nibbles(block + 2, ret->q);
}

static void q4_1_carry(const uint8_t *row, uint64_t index, struct cm_quant_block *ret)
{
    const uint8_t *block = row + index * 20;
    *ret = (struct cm_quant_block){.d = u16_at(block), .m = u16_at(block + 2)};
    nibbles(block + 4, ret->q);
}

static void q5_0_carry(const uint8_t *row, uint64_t index, struct cm_quant_block *ret)
{
    const uint8_t *block = row + index * 22;
    *ret = (struct cm_quant_block){.d = u16_at(block)};
    nibbles(block + 6, ret->q);
    fifth_bits(block + 2, ret->q);
}

static void q5_1_carry(const uint8_t *row, uint64_t index, struct cm_quant_block *ret)
{
    const uint8_t *block = row + index * 24;
    *ret = (struct cm_quant_block){.d = u16_at(block), .m = u16_at(block + 2)};
    nibbles(block + 8, ret->q);
    fifth_bits(block + 4, ret->q);
}

static void q8_0_carry(const uint8_t *row, uint64_t index, struct cm_quant_block *ret)
{
    const uint8_t *block = row + index * 34;
    *ret = (struct cm_quant_block){.d = u16_at(block)};
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        ret->q[k] = (uint8_t)(block[2 + k] ^ 0x80); /* int8 + 128 */
    }
}

/* Scale and least value of sub-block `j` of 32, out of the twelve bytes that hold eight pairs of
 * six bits: the first four pairs whole, the others' high bits above the first ones'. */
static void k_scales(const uint8_t *packed, uint32_t j, float *ret_scale, float *ret_least)
{
    uint32_t scale, least;
    if (j < 4) {
        scale = packed[j] & 63u;
        least = packed[j + 4] & 63u;
    } else {
        scale = (packed[j + 4] & 15u) | (uint32_t)(packed[j - 4] >> 6) << 4;
        least = (uint32_t)(packed[j + 4] >> 4) | (uint32_t)(packed[j] >> 6) << 4;
    }
    *ret_scale = (float)scale;
    *ret_least = (float)least;
}

/* Two sub-blocks share 32 bytes: the even one has the low nibbles. */
static void k_nibbles(const uint8_t *quants, uint32_t j, uint8_t ret[CM_TILE_COLUMNS])
{
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        uint8_t byte = quants[j / 2 * 32 + k];
        ret[k] = j % 2 == 0 ? byte & 15u : (uint8_t)(byte >> 4);
    }
}

/* 32 weights of a K format: value = d * q + m. */
struct k_parts {
    uint8_t q[CM_TILE_COLUMNS];
    float d, m;
};

/* A K block begins with its two halves and the scales. */
static void k_scaled(const uint8_t *block, uint32_t j, struct k_parts *ret)
{
    float scale, least;
    k_scales(block + 4, j, &scale, &least);
    ret->d = half_at(block) * scale;
    ret->m = -half_at(block + 2) * least;
}

static void q4_k_parts(const uint8_t *row, uint64_t index, struct k_parts *ret)
{
    const uint8_t *block = row + index / 8 * 144;
    const uint32_t j = (uint32_t)(index % 8);
    k_scaled(block, j, ret);
    k_nibbles(block + 16, j, ret->q);
}

static void q5_k_parts(const uint8_t *row, uint64_t index, struct k_parts *ret)
{
    const uint8_t *block = row + index / 8 * 176;
    const uint32_t j = (uint32_t)(index % 8);
    k_scaled(block, j, ret);
    k_nibbles(block + 48, j, ret->q);
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        ret->q[k] = (uint8_t)(ret->q[k] | (block[16 + k] >> j & 1) << 4);
    }
}

/* The quants are exact; a product of a half and six bits is rounded to a half. */
#define K_FORMAT(type)                                                                             \
    static void type##_carry(const uint8_t *row, uint64_t index, struct cm_quant_block *ret)       \
    {                                                                                              \
        struct k_parts parts;                                                                      \
        type##_parts(row, index, &parts);                                                          \
        memcpy(ret->q, parts.q, sizeof(ret->q));                                                   \
        ret->d = cm_half_from_float(parts.d);                                                      \
        ret->m = cm_half_from_float(parts.m);                                                      \
    }                                                                                              \
    static void type##_values(const uint8_t *row, uint64_t index, float ret[CM_TILE_COLUMNS])      \
    {                                                                                              \
        struct k_parts parts;                                                                      \
        type##_parts(row, index, &parts);                                                          \
        for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {                                           \
            ret[k] = parts.d * (float)parts.q[k] + parts.m;                                        \
        }                                                                                          \
    }
K_FORMAT(q4_k)
K_FORMAT(q5_k)

/* ---------------------------------------------------------------- quants that must be rounded */

/* 256 weights in two halves of 128; in a half, weight 32 * g + l has its low four bits in byte
 * l + 32 * (g % 2) (low nibble for g < 2) and its high two at bits 2 * g of byte l. One signed
 * scale for each 16. */
static void q6_k_values(const uint8_t *row, uint64_t index, float ret[CM_TILE_COLUMNS])
{
    const uint8_t *block = row + index / 8 * 210;
    uint32_t half = (uint32_t)(index % 8) / 4, g = (uint32_t)(index % 4);
    const uint8_t *low = block + 64 * half, *high = block + 128 + 32 * half;
    const uint8_t *scales = block + 192 + 8 * half + 2 * g;
    float d = half_at(block + 208);
    for (uint32_t l = 0; l < CM_TILE_COLUMNS; l++) {
        uint32_t nibble = (low[l + 32 * (g % 2)] >> (g < 2 ? 0 : 4)) & 15u;
        int q = (int)(nibble | ((high[l] >> (2 * g)) & 3u) << 4) - 32;
        ret[l] = d * (float)(int8_t)scales[l / 16] * (float)q;
    }
}

#define CARRIED(type, kind)                                                                        \
    static void type##_values(const uint8_t *row, uint64_t index, float ret[CM_TILE_COLUMNS])      \
    {                                                                                              \
        struct cm_quant_block block;                                                               \
        type##_carry(row, index, &block);                                                          \
        cm_quant_values(kind, &block, ret);                                                        \
    }
CARRIED(q4_0, CM_TENSOR_U4S)
CARRIED(q4_1, CM_TENSOR_U4A)
CARRIED(q5_0, CM_TENSOR_U5S)
CARRIED(q5_1, CM_TENSOR_U5A)
CARRIED(q8_0, CM_TENSOR_U8S)

static const struct cm_quant quants[] = {
    {CM_QUANT_F32, "F32", 1, 4, CM_TENSOR_U8S, false, f32_values, NULL},
    {CM_QUANT_F16, "F16", 1, 2, CM_TENSOR_U8S, false, f16_values, NULL},
    {CM_QUANT_BF16, "BF16", 1, 2, CM_TENSOR_U8S, false, bf16_values, NULL},
    {CM_QUANT_Q4_0, "Q4_0", 32, 18, CM_TENSOR_U4S, true, q4_0_values, q4_0_carry},
    {CM_QUANT_Q4_1, "Q4_1", 32, 20, CM_TENSOR_U4A, true, q4_1_values, q4_1_carry},
    {CM_QUANT_Q5_0, "Q5_0", 32, 22, CM_TENSOR_U5S, true, q5_0_values, q5_0_carry},
    {CM_QUANT_Q5_1, "Q5_1", 32, 24, CM_TENSOR_U5A, true, q5_1_values, q5_1_carry},
    {CM_QUANT_Q8_0, "Q8_0", 32, 34, CM_TENSOR_U8S, true, q8_0_values, q8_0_carry},
    {CM_QUANT_Q4_K, "Q4_K", SUPER, 144, CM_TENSOR_U4A, false, q4_k_values, q4_k_carry},
    {CM_QUANT_Q5_K, "Q5_K", SUPER, 176, CM_TENSOR_U5A, false, q5_k_values, q5_k_carry},
    {CM_QUANT_Q6_K, "Q6_K", SUPER, 210, CM_TENSOR_U8S, false, q6_k_values, NULL},
};

const struct cm_quant *cm_quant_find(uint32_t type)
{
    for (size_t i = 0; i < sizeof(quants) / sizeof(quants[0]); i++) {
        if (quants[i].type == type) {
            return &quants[i];
        }
    }
    return NULL;
}

bool cm_quant_fits(const struct cm_quant *quant, uint32_t kind)
{
    const struct cm_tile_shape own = cm_tile_shape(quant->kind), other = cm_tile_shape(kind);
    return quant->carry != NULL && other.affine == own.affine && other.bits >= own.bits &&
           other.bits <= 8;
}

bool cm_quant_carry(const struct cm_quant *quant, uint32_t kind, const uint8_t *row, uint64_t index,
                    struct cm_quant_block *ret)
{
    CM_ASSERT(cm_quant_fits(quant, kind));
    /* d * (q - 16) is d * ((q + 112) - 128). */
    const int32_t more = cm_tile_shape(kind).zero - cm_tile_shape(quant->kind).zero;
    quant->carry(row, index, ret);
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        ret->q[k] = (uint8_t)(ret->q[k] + more);
    }
    return cm_half_finite(ret->d) && cm_half_finite(ret->m);
}

/* To nearest, ties to even; what lies beyond the greatest becomes infinite. */
static uint16_t bfloat_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

bool cm_quant_round(uint32_t kind, const float values[CM_TILE_COLUMNS], struct cm_quant_block *ret)
{
    float greatest = 0.0f;
    bool finite = true;
    if (kind == CM_TENSOR_BF16) {
        *ret = (struct cm_quant_block){.d = 0};
        for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
            ret->w[k] = bfloat_of(values[k]);
            finite = finite && (ret->w[k] & 0x7f80u) != 0x7f80u;
        }
        return finite;
    }
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
    }
    return cm_half_finite(ret->d);
}

void cm_quant_values(uint32_t kind, const struct cm_quant_block *block, float ret[CM_TILE_COLUMNS])
{
    float zero = (float)cm_tile_shape(kind).zero;
    float d = cm_half_to_float(block->d), m = cm_half_to_float(block->m);
    if (kind == CM_TENSOR_BF16) {
        bf16_values((const uint8_t *)block->w, 0, ret);
        return;
    }
    for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
        ret[k] = d * ((float)block->q[k] - zero) + m;
    }
}
