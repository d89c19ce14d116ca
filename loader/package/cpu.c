/* What this CPU has of what decrypts and hashes faster than OpenSSL does. A file of its own, so
 * that the bench can link another answer in its place (tests/engine/narrow.c). */
#include "loader/package/internal.h"

#ifdef __x86_64__
#include <cpuid.h>

static bool vaes_available(void)
{
#ifdef __clang__ /* clang 14 does not know the name */
    unsigned a, b, c = 0, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) == 1 && (c & 1u << 9) != 0;
#else
    return __builtin_cpu_supports("vaes");
#endif
}

bool cm_sha256_lanes_available(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}

bool cm_gcm_vaes_available(void)
{
    return cm_sha256_lanes_available() && __builtin_cpu_supports("vpclmulqdq") && vaes_available();
}
#endif
