/* Time since some fixed point, for intervals: CLOCK_MONOTONIC, which nobody can set back. */
#ifndef CASEMATE_RUNTIME_BASE_CLOCK_H
#define CASEMATE_RUNTIME_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t cm_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint64_t cm_clock_us(void)
{
    return cm_clock_ns() / 1000u;
}

#endif
