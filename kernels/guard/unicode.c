/* Composition, of the views and of form C in the worker. */
#include "kernels/guard/unicode.h"

#define HANGUL_S       0xAC00u
#define HANGUL_L       0x1100u
#define HANGUL_V       0x1161u
#define HANGUL_T       0x11A7u
#define HANGUL_L_COUNT 19u
#define HANGUL_V_COUNT 21u
#define HANGUL_T_COUNT 28u
#define HANGUL_S_COUNT (HANGUL_L_COUNT * HANGUL_V_COUNT * HANGUL_T_COUNT)

static uint32_t hangul_compose(uint32_t first, uint32_t second)
{
    if (first - HANGUL_L < HANGUL_L_COUNT && second - HANGUL_V < HANGUL_V_COUNT) {
        return HANGUL_S +
               ((first - HANGUL_L) * HANGUL_V_COUNT + second - HANGUL_V) * HANGUL_T_COUNT;
    }
    if (first - HANGUL_S < HANGUL_S_COUNT && (first - HANGUL_S) % HANGUL_T_COUNT == 0 &&
        second - HANGUL_T - 1 < HANGUL_T_COUNT - 1) {
        return first + second - HANGUL_T;
    }
    return 0;
}

uint32_t cm_unicode_compose(uint32_t first, uint32_t second)
{
    uint32_t low = 0, high = cm_unicode_pair_count;
    while (low < high) {
        uint32_t at = (low + high) / 2;
        const struct cm_unicode_pair *pair = &cm_unicode_pairs[at];
        if (pair->first == first && pair->second == second) {
            return pair->composed;
        }
        if (pair->first < first || (pair->first == first && pair->second < second)) {
            low = at + 1;
        } else {
            high = at;
        }
    }
    return hangul_compose(first, second);
}

uint32_t cm_unicode_hangul_decompose(uint32_t point, uint32_t ret_letters[3])
{
    const uint32_t index = point - HANGUL_S, tail = index % HANGUL_T_COUNT;
    if (index >= HANGUL_S_COUNT) {
        return 0;
    }
    ret_letters[0] = HANGUL_L + index / HANGUL_T_COUNT / HANGUL_V_COUNT;
    ret_letters[1] = HANGUL_V + index / HANGUL_T_COUNT % HANGUL_V_COUNT;
    ret_letters[2] = HANGUL_T + tail;
    return tail != 0 ? 3 : 2;
}
