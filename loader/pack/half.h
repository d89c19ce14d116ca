/* IEEE 754 binary16 to and from binary32, in integers: the same on every compiler. */
#ifndef CASEMATE_LOADER_PACK_HALF_H
#define CASEMATE_LOADER_PACK_HALF_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

static inline bool cm_half_finite(uint16_t half)
{
    return (half & 0x7c00u) != 0x7c00u;
}

static inline float cm_half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 31u;
    uint32_t fraction = half & 0x3ffu;
    uint32_t bits;
    float value;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        /* Subnormal: fraction * 2^-24, exact in binary32. */
        value = (float)fraction * 0x1p-24f;
        memcpy(&bits, &value, sizeof(bits));
        bits |= sign;
    }
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* Round to nearest, ties to even; beyond the greatest half it becomes infinite. */
static inline uint16_t cm_half_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x47800000u) {
        return (uint16_t)(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
    }
    if (magnitude < 0x38800000u) {
        /* Subnormal: let the adder round at 2^-24. */
        float rounded;
        uint32_t out;
        memcpy(&rounded, &magnitude, sizeof(rounded));
        rounded += 0.5f;
        memcpy(&out, &rounded, sizeof(out));
        return (uint16_t)(sign | (out - 0x3f000000u));
    }
    uint32_t odd = (magnitude >> 13) & 1u;
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

#endif
