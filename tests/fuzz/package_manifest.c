/* Fuzz target: a decrypted manifest. The last 8 bytes of the input are the payload's size. What is
 * accepted encodes to the same bytes: one model, one manifest. */
#include "tests/fuzz/manifest_seed.h"

#include "tests/fuzz/seed.h"

static const uint8_t *seed_make(size_t *ret_size)
{
    const struct cm_manifest manifest = manifest_seed();
    struct cm_error err;
    uint8_t *bytes, *seed;
    size_t size;
    if (cm_manifest_encode(&manifest, &bytes, &size, &err) != CM_OK) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    seed = calloc(1, size + 8);
    memcpy(seed, bytes, size);
    memcpy(seed + size, &(uint64_t){SEED_PAYLOAD_BYTES}, 8);
    *ret_size = size + 8;
    free(bytes);
    return seed;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cm_manifest manifest;
    struct cm_error err;
    uint64_t payload;
    if (size < 8) {
        return 0;
    }
    memcpy(&payload, data + size - 8, 8);
    if (cm_manifest_parse(data, size - 8, payload, &manifest, &err) == CM_OK) {
        uint8_t *again;
        size_t again_size;
        if (cm_manifest_encode(&manifest, &again, &again_size, &err) != CM_OK ||
            again_size != size - 8 || memcmp(again, data, again_size) != 0) {
            abort();
        }
        free(again);
        cm_manifest_done(&manifest);
    }
    return 0;
}
