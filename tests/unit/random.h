/* Seeded numbers for tests: splitmix64 (Steele, Lea, Flood, OOPSLA 2014). */
#ifndef CASEMATE_TESTS_RANDOM_H
#define CASEMATE_TESTS_RANDOM_H

#include <stddef.h>
#include <stdint.h>

static uint64_t random_state; /* the seed; each test sets its own */

static size_t below(size_t bound)
{
    uint64_t value = random_state += 0x9e3779b97f4a7c15;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return (size_t)((value ^ value >> 31) % bound);
}

#endif
