/* Fuzz target: an adapter's directory as peft writes it. u16 size of adapter_config.json ‖ it ‖
 * adapter_model.safetensors. */
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "loader/pack/peft.h"
#include "tests/fuzz/seed.h"

static const struct cm_manifest base = {.width = 64,
                                        .layers = 2,
                                        .heads = 2,
                                        .kv_heads = 1,
                                        .head_width = 32,
                                        .rope_width = 32,
                                        .ffn_width = 96};

static void must(bool condition)
{
    if (!condition) {
        __builtin_trap();
    }
}

static const uint8_t *seed_make(size_t *ret_size)
{
    static const char config[] =
        "{\"peft_type\":\"LORA\",\"task_type\":\"CAUSAL_LM\",\"r\":2,\"lora_alpha\":4,\"bias\":"
        "\"none\","
        "\"use_rslora\":false,\"use_dora\":false,\"init_lora_weights\":true,\"rank_pattern\":{},"
        "\"modules_to_save\":null,\"target_modules\":[\"v_proj\"]}";
    static const char header[] =
        "{\"base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight\":{\"dtype\":\"F16\","
        "\"shape\":[2,64],\"data_offsets\":[0,256]},"
        "\"base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight\":{\"dtype\":\"F16\","
        "\"shape\":[32,2],\"data_offsets\":[256,384]}}";
    static uint8_t seed[2048];
    const size_t config_bytes = strlen(config), header_bytes = strlen(header);
    seed[0] = (uint8_t)config_bytes;
    seed[1] = (uint8_t)(config_bytes >> 8);
    memcpy(seed + 2, config, config_bytes);
    uint8_t *tensors = seed + 2 + config_bytes;
    tensors[0] = (uint8_t)header_bytes;
    tensors[1] = (uint8_t)(header_bytes >> 8);
    memcpy(tensors + 8, header, header_bytes);
    *ret_size = 2 + config_bytes + 8 + header_bytes + 384;
    return seed;
}

static void file_put(int folder, const char *name, const uint8_t *bytes, size_t size)
{
    int fd = openat(folder, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    must(fd >= 0 && write(fd, bytes, size) == (ssize_t)size && close(fd) == 0);
}

/* Shapes are the base model's, both halves are there, and each row can be read. */
static void half_check(const struct cm_source_tensor *half, uint64_t rows, uint64_t columns)
{
    struct cm_error err;
    must(half->rows == rows && half->columns == columns);
    uint8_t *row = malloc((size_t)half->row_bytes);
    must(row != NULL && cm_source_rows_read(half, half->rows - 1, 1, row, &err) == CM_OK);
    free(row);
}

static void peft_check(const struct cm_peft *peft)
{
    const uint32_t rank = cm_peft_rank(peft);
    uint32_t found = 0;
    must(rank >= 1 && rank <= CM_ADAPTER_RANK_MAX);
    must(isfinite(cm_peft_scale(peft)) && cm_peft_scale(peft) > 0.0f);
    for (uint32_t layer = 0; layer < base.layers; layer++) {
        for (uint32_t t = 0; t < CM_TARGET_COUNT; t++) {
            const struct cm_source_tensor *a = cm_peft_layers(peft)[layer].a[t];
            const struct cm_source_tensor *b = cm_peft_layers(peft)[layer].b[t];
            uint32_t rows, columns;
            cm_peft_target_shape(&base, t, &rows, &columns);
            must((a == NULL) == (b == NULL));
            if (a != NULL) {
                half_check(a, rank, columns);
                half_check(b, rows, rank);
                found++;
            }
        }
    }
    must(found > 0);
}

static char path[] = "/tmp/casemate-fuzz-peft-XXXXXX";

static void folder_remove(void)
{
    (void)rmdir(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int folder = -1;
    struct cm_peft *peft;
    struct cm_error err;
    if (folder < 0) {
        must(mkdtemp(path) != NULL);
        must(atexit(folder_remove) == 0);
        folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    }
    size_t config = size >= 2 ? (size_t)data[0] | (size_t)data[1] << 8 : 0;
    if (size < 2 || config > size - 2) {
        return 0;
    }
    file_put(folder, "adapter_config.json", data + 2, config);
    file_put(folder, "adapter_model.safetensors", data + 2 + config, size - 2 - config);
    if (cm_peft_open(path, &base, &peft, &err) == CM_OK) {
        peft_check(peft);
        cm_peft_close(peft);
    }
    unlinkat(folder, "adapter_config.json", 0);
    unlinkat(folder, "adapter_model.safetensors", 0);
    return 0;
}
