/* The paths of this backend, best first, and which of them this CPU has. Compiled for any CPU. */
#include "kernels/cpu/cpu_internal.h"

#include <string.h>

static bool avx2_available(void) /* each CPU with AVX2 has F16C too */
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool avx512vnni_available(void)
{
    return avx2_available() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

#define PATH(path)                                                                                 \
    {                                                                                              \
        .name = #path, .available = path##_available, .gemm = cm_##path##_gemm,                    \
        .quantise = cm_##path##_quantise, .norm = cm_##path##_norm, .gate = cm_##path##_gate,      \
        .rope = cm_##path##_rope, .add = cm_##path##_add, .key_put = cm_##path##_key_put,          \
        .value_put = cm_##path##_value_put, .attend = cm_##path##_attend,                          \
        .attend_chunk = cm_##path##_attend_chunk, .attend_merge = cm_##path##_attend_merge,        \
        .greatest = cm_##path##_greatest,                                                          \
    }

static const struct cm_path paths[] = {PATH(avx512vnni), PATH(avx2)};

const struct cm_path *cm_path_choose(const char *name)
{
    for (size_t i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
        if ((name == NULL || strcmp(name, paths[i].name) == 0) && paths[i].available()) {
            return &paths[i];
        }
    }
    return NULL;
}
