/* Fuzz target: a decrypted manifest of an adapter. The last 8 bytes of the input are the payload's
 * size. */
#include "tests/fuzz/manifest_seed.h"

#include "tests/fuzz/seed.h"

static const uint8_t *seed_make(size_t *ret_size)
{
    const struct cm_manifest_adapter adapter = adapter_seed();
    struct cm_error err;
    uint8_t *bytes, *seed;
    size_t size;
    if (cm_manifest_adapter_encode(&adapter, &bytes, &size, &err) != CM_OK) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    seed = calloc(1, size + 8);
    memcpy(seed, bytes, size);
    memcpy(seed + size, &(uint64_t){ADAPTER_SEED_PAYLOAD}, 8);
    *ret_size = size + 8;
    free(bytes);
    return seed;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    enum { ROOM = 16 };
    struct cm_manifest_tensor tensors[ROOM];
    struct cm_manifest_adapter adapter;
    struct cm_manifest model;
    struct cm_error err;
    uint64_t payload;
    if (size < 8) {
        return 0;
    }
    memcpy(&payload, data + size - 8, 8);
    bool taken =
        cm_manifest_adapter_parse(data, size - 8, payload, tensors, ROOM, &adapter, &err) == CM_OK;
    /* A package holds a model or an adapter, and it can be told which. */
    if (taken && (!cm_manifest_is_adapter(data, size - 8) ||
                  cm_manifest_parse(data, size - 8, payload, &model, &err) == CM_OK)) {
        abort();
    }
    return 0;
}
