/* One number of a format, changed as an attacker would. Seeded by srand of the test. */
#ifndef CASEMATE_TESTS_MUTATE_H
#define CASEMATE_TESTS_MUTATE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline void value_mutate(uint8_t *at, size_t size)
{
    static const uint64_t odd[] = {0, 1, 0x7f, 0xff, 0x7fffffff, 0xffffffff, 1ull << 40, ~0ull};
    uint64_t value = 0;
    memcpy(&value, at, size);
    switch (rand() % 4) {
    case 0:
        value = odd[rand() % 8];
        break;
    case 1:
        value += (uint64_t)(rand() % 9) - 4;
        break;
    case 2:
        value ^= 1ull << (rand() % (int)(size * 8));
        break;
    default:
        value = value * 2 + 4096;
        break;
    }
    memcpy(at, &value, size);
}

#endif
