/* Small manifests: of a model that has a tensor of each kind, and of an adapter with two layers. */
#ifndef CASEMATE_TESTS_FUZZ_MANIFEST_SEED_H
#define CASEMATE_TESTS_FUZZ_MANIFEST_SEED_H

#include "loader/package/manifest.h"

#define SEED_TENSORS       7u
#define SEED_PAYLOAD_BYTES (SEED_TENSORS * 4096ull)

/* A vector, then one matrix of each kind: two tiles of 16 x 32, as FORMAT.md gives their bytes. */
static inline const struct cm_manifest_tensor *seed_tensors(void)
{
    static struct cm_manifest_tensor tensors[SEED_TENSORS];
    static const struct {
        uint32_t kind, quant_bytes, scale_bytes;
    } kinds[] = {{1, 256, 0},  {2, 256, 64}, {3, 256, 32}, {4, 512, 32},
                 {5, 1024, 0}, {7, 320, 64}, {8, 320, 32}};
    for (uint32_t i = 0; i < SEED_TENSORS; i++) {
        const uint32_t tiles = i == 0 ? 1 : 2;
        const uint64_t offset = i * 4096ull, quants = tiles * kinds[i].quant_bytes;
        tensors[i] = (struct cm_manifest_tensor){.name = {"t", 1},
                                                 .layer = 0,
                                                 .role = i,
                                                 .kind = kinds[i].kind,
                                                 .rows = i == 0 ? 64 : 32,
                                                 .columns = i == 0 ? 1 : 32,
                                                 .offset = offset,
                                                 .scale_offset =
                                                     kinds[i].scale_bytes > 0 ? offset + quants : 0,
                                                 .bytes = quants + tiles * kinds[i].scale_bytes};
    }
    return tensors;
}

static inline struct cm_manifest manifest_seed(void)
{
    static const uint8_t token_bytes[] = "ab", types[] = {1, 1};
    static const uint32_t offsets[] = {0, 1, 2}, merges[] = {0, 1};
    return (struct cm_manifest){.model_name = {"seed", 4},
                                .architecture = CM_ARCH_LLAMA,
                                .vocabulary = 2,
                                .width = 64,
                                .layers = 1,
                                .heads = 2,
                                .kv_heads = 1,
                                .head_width = 32,
                                .rope_width = 32,
                                .ffn_width = 64,
                                .context_max = 128,
                                .rope_base = 10000.0f,
                                .norm_epsilon = 1e-5f,
                                .tokenizer = CM_TOKENIZER_BYTE_BPE,
                                .split = CM_SPLIT_GPT2,
                                .end_token_count = 1,
                                .token_offsets = offsets,
                                .token_bytes = token_bytes,
                                .token_types = types,
                                .merges = merges,
                                .merge_count = 1,
                                .tensors = seed_tensors(),
                                .tensor_count = SEED_TENSORS};
}

#define ADAPTER_SEED_TENSORS 6u
#define ADAPTER_SEED_PAYLOAD (ADAPTER_SEED_TENSORS * 4096ull)

/* Q in the first layer, Q and down in the second. */
static inline struct cm_manifest_adapter adapter_seed(void)
{
    static struct cm_manifest_tensor tensors[ADAPTER_SEED_TENSORS];
    static const uint32_t layers[] = {0, 0, 1, 1, 1, 1}, roles[] = {0, 1, 0, 1, 12, 13};
    for (uint32_t i = 0; i < ADAPTER_SEED_TENSORS; i++) {
        tensors[i] = (struct cm_manifest_tensor){.name = {"t", 1},
                                                 .layer = layers[i],
                                                 .role = roles[i],
                                                 .kind = 6,
                                                 .rows = i % 2 == 0 ? 4 : 64,
                                                 .columns = i % 2 == 0 ? 64 : 4,
                                                 .offset = i * 4096ull,
                                                 .bytes = i % 2 == 0 ? 2048 : 512};
    }
    return (struct cm_manifest_adapter){.name = {"adapter", 7},
                                        .license = {"none", 4},
                                        .origin = {"", 0},
                                        .base_digest = {1, 2, 3},
                                        .rank = 4,
                                        .scale = 2.0f,
                                        .layers = 2,
                                        .width = 64,
                                        .heads = 2,
                                        .kv_heads = 1,
                                        .head_width = 32,
                                        .rope_width = 32,
                                        .ffn_width = 64,
                                        .tensors = tensors,
                                        .tensor_count = ADAPTER_SEED_TENSORS};
}

#endif
