/* Fuzz target: a GGUF file through the packer's whole way. */
#include "tests/unit/gguf_sample.h"

#include "tests/fuzz/seed.h"

static const uint8_t *seed_make(size_t *ret_size)
{
    static struct gguf_sample sample;
    gguf_sample_make(&sample);
    *ret_size = sample.size;
    return sample.bytes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cm_plan plan;
    struct cm_error err;
    if (gguf_way(data, size, &plan, &err) == CM_OK) {
        cm_plan_done(&plan);
    }
    return 0;
}
