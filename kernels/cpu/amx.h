/* What users of the tile unit share: the form of LDTILECFG's operand (Intel SDM 18.3). */
#ifndef CASEMATE_KERNELS_CPU_AMX_H
#define CASEMATE_KERNELS_CPU_AMX_H

#include <stdint.h>

struct tile_config {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

#endif
