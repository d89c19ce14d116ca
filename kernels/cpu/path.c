/* The paths of this backend, best first, and which of them this CPU has. Compiled for any CPU. */
#include "kernels/cpu/cpu_internal.h"

#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* arch/x86/include/uapi/asm/prctl.h; the tiles' state is feature 18 of XSAVE. */
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_TILE_DATA  18

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

/* The CPU has tiles of this kind and the kernel lets this process use them (threads made later as
 * well). */
static bool tiles_available(uint32_t kind)
{
    uint32_t a, b, c, d;
    const uint32_t tile = 1u << 24;
    return avx512vnni_available() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 &&
           (d & tile) != 0 && (d & kind) != 0 &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
}

static bool amx_available(void)
{
    return tiles_available(1u << 25); /* int8 */
}

static bool amx_bf16_available(void)
{
    return tiles_available(1u << 22) && __builtin_cpu_supports("avx512bf16");
}

/* A path's own product, and all else of a body that may be another's. */
#define PATH(path, body)                                                                           \
    {                                                                                              \
        .name = #path, .available = path##_available, .gemm = cm_##path##_gemm,                    \
        .quantise = cm_##body##_quantise, .norm = cm_##body##_norm, .gate = cm_##body##_gate,      \
        .rope = cm_##body##_rope, .add = cm_##body##_add, .cap = cm_##body##_cap,                  \
        .key_put = cm_##body##_key_put, .value_put = cm_##body##_value_put,                        \
        .attend = cm_##body##_attend, .attend_chunk = cm_##body##_attend_chunk,                    \
        .attend_merge = cm_##body##_attend_merge, .greatest = cm_##body##_greatest,                \
        .shrink = cm_##body##_shrink, .expand = cm_##body##_expand,                                \
    }

static const struct cm_path paths[] = {PATH(amx, avx512vnni), PATH(avx512vnni, avx512vnni),
                                       PATH(avx2, avx2)};

const struct cm_path *cm_path_choose(const char *name)
{
    for (size_t i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
        if ((name == NULL || strcmp(name, paths[i].name) == 0) && paths[i].available()) {
            return &paths[i];
        }
    }
    return NULL;
}

const struct cm_prompt_path *cm_prompt_path_choose(void)
{
    static const struct cm_prompt_path path = {"amx-bf16", amx_bf16_available, cm_amx_bf16_gemm,
                                               cm_amx_bf16_round, cm_amx_bf16_attend};
    return path.available() ? &path : NULL;
}
