/* Weight formats of model files, and how each reaches a stored kind. Blocks of ggml: llama.cpp,
 * ggml-common.h (block_q4_0 … block_q6_K) names the layouts. */
#ifndef CASEMATE_LOADER_PACK_QUANT_H
#define CASEMATE_LOADER_PACK_QUANT_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/model.h"

enum cm_quant_type { /* ggml_type numbers; only these are read */
                     CM_QUANT_F32 = 0,
                     CM_QUANT_F16 = 1,
                     CM_QUANT_Q4_0 = 2,
                     CM_QUANT_Q4_1 = 3,
                     CM_QUANT_Q5_0 = 6,
                     CM_QUANT_Q5_1 = 7,
                     CM_QUANT_Q8_0 = 8,
                     CM_QUANT_Q4_K = 12,
                     CM_QUANT_Q5_K = 13,
                     CM_QUANT_Q6_K = 14,
                     CM_QUANT_BF16 = 30,
};

/* 32 weights as stored: value = d * (q - zero) + m, zero as cm_tile_shape has it. */
struct cm_quant_block {
    uint8_t q[CM_TILE_COLUMNS];
    uint16_t d, m;               /* fp16 bits */
    uint16_t w[CM_TILE_COLUMNS]; /* bf16: the weights; the others are unused then */
};

struct cm_quant {
    uint32_t type;
    const char *name;
    uint32_t block; /* weights in a block of the file */
    uint32_t block_bytes;
    uint32_t kind; /* the narrowest that carries its quants over; U8S also by rounding */
    bool exact;    /* carrying over changes no weight: its scales are halves */
    /* 32 weights of a row, from number 32 * index on. */
    void (*values)(const uint8_t *row, uint64_t index, float ret[CM_TILE_COLUMNS]);
    /* The same as quants of `kind`; NULL: they have to be rounded. */
    void (*carry)(const uint8_t *row, uint64_t index, struct cm_quant_block *ret);
};

/* NULL: not a type that is read. */
const struct cm_quant *cm_quant_find(uint32_t type);
/* Does `kind` hold quants of this type as they are? */
bool cm_quant_fits(const struct cm_quant *quant, uint32_t kind);
/* Those 32 weights of a row as quants of a kind that they fit. False: a scale is not finite. */
bool cm_quant_carry(const struct cm_quant *quant, uint32_t kind, const uint8_t *row, uint64_t index,
                    struct cm_quant_block *ret);
/* 32 values to the nearest of the kind: bf16, or u8 symmetric with d = max |value| / 127. False:
 * out of the kind's range. */
bool cm_quant_round(uint32_t kind, const float values[CM_TILE_COLUMNS], struct cm_quant_block *ret);
/* What a device will make of the block. */
void cm_quant_values(uint32_t kind, const struct cm_quant_block *block, float ret[CM_TILE_COLUMNS]);

#endif
