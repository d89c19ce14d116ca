/* Structure-aware mutations by an attacker who holds the package key and the owner's key: fields
 * are changed, then digests, MACs, checksums and the signature are made right again, so that the
 * deep checks are reached. Nothing may crash, and nothing but the sealed content may be accepted.
 */
#include <math.h>

#include "tests/fuzz/manifest_seed.h"
#include "tests/unit/mutate.h"
#include "tests/unit/package_sample.h"

#include "loader/package/internal.h"
#include "runtime/base/cursor.h"

#define MUTATIONS 12000

static struct sample sample;

static void core_seal_again(uint8_t *head)
{
    struct cm_error err;
    uint8_t *core = head + CM_PACKAGE_CORE_OFFSET;
    struct cm_package_core fields = {.suite = core[12]};
    memcpy(fields.salt, core + 40, sizeof(fields.salt));
    cr_assert_eq(cm_sha256(core, CM_CORE_SIGNED_BYTES, fields.core_digest, &err), CM_OK);
    cr_assert_eq(sample_sign(sample.owner, fields.core_digest, core + 256, &err), CM_OK);
    cr_assert_eq(cm_header_mac(sample.key, &fields, core + 320, &err), CM_OK);
    for (int copy = 0; copy < 2; copy++) {
        uint8_t *slots = head + (copy ? CM_PACKAGE_SLOTS_B_OFFSET : CM_PACKAGE_SLOTS_A_OFFSET);
        uint8_t digest[CM_DIGEST_BYTES];
        cr_assert_eq(cm_sha256(slots, CM_SLOTS_MAC_OFFSET, digest, &err), CM_OK);
        cr_assert_eq(cm_slots_mac(sample.key, &fields, digest, slots + CM_SLOTS_MAC_OFFSET, &err),
                     CM_OK);
        cr_assert_eq(cm_sha256(slots, CM_SLOTS_SUM_OFFSET, slots + CM_SLOTS_SUM_OFFSET, &err),
                     CM_OK);
    }
}

/* Offsets and sizes of the core header's numbers, and of the slot region's. */
static const struct {
    uint32_t offset, size;
} fields[] = {{8, 4},         {12, 4},        {16, 4},        {20, 4},        {24, 8},
              {32, 4},        {36, 4},        {72, 8},        {80, 8},        {88, 8},
              {96, 8},        {104, 8},       {112, 8},       {120, 8},       {128, 1},
              {160, 1},       {192, 1},       {352, 4},       {4096 + 8, 8},  {4096 + 16, 4},
              {4096 + 20, 4}, {4096 + 24, 4}, {4096 + 28, 4}, {4096 + 95, 1}, {4096 + 32020, 8}};

Test(package_mutation, resealed_heads)
{
    struct cm_error err;
    size_t size;
    unsigned accepted = 0;
    srand(11);
    sample_make(&sample, CM_SUITE_AES_256_GCM, 4096, "model.cmpkg");
    uint8_t *bytes = file_load(sample.path, &size);
    uint8_t *work = malloc(size);
    char path[128];
    snprintf(path, sizeof(path), "%s/changed", sample.folder);
    for (int i = 0; i < MUTATIONS; i++) {
        memcpy(work, bytes, size);
        for (int k = 0; k <= rand() % 3; k++) {
            size_t row = (size_t)rand() % (sizeof(fields) / sizeof(fields[0]));
            uint8_t *core = work + CM_PACKAGE_CORE_OFFSET;
            value_mutate(core + fields[row].offset, fields[row].size);
        }
        core_seal_again(work);
        file_save(path, work, rand() % 50 == 0 ? size - (size_t)(rand() % 5000) : size);
        /* sample_open asserts that an accepted payload is the sealed one. */
        enum cm_status status = sample_open(&sample, path, &err);
        cr_assert(status == CM_OK || status == CM_E_PACKAGE, "%s: %s", err.id, err.text);
        accepted += status == CM_OK;
    }
    /* Neutral by design: revision, least host version, a slot's label, a copy's generation. */
    cr_assert_lt(accepted, (unsigned)MUTATIONS * 6 / 10);
    printf("package_mutation: %d heads, %u with neutral changes accepted\n", MUTATIONS, accepted);
    free(work);
    free(bytes);
    sample_done(&sample);
}

Test(package_mutation, manifests)
{
    struct cm_error err;
    uint8_t *bytes;
    size_t size;
    unsigned accepted = 0;
    srand(12);
    sample_make(&sample, CM_SUITE_AES_256_GCM, 4096 * 9, "model.cmpkg");
    cr_assert_eq(cm_manifest_encode(&sample.manifest, &bytes, &size, &err), CM_OK);
    for (int i = 0; i < MUTATIONS * 4; i++) {
        /* Exact-sized copies, so that a sanitizer sees the first byte read too far. */
        size_t cut = rand() % 4 == 0 ? (size_t)rand() % (size + 1) : size;
        uint8_t *work = malloc(cut == 0 ? 1 : cut);
        struct cm_manifest manifest;
        memcpy(work, bytes, cut);
        for (int k = 0; k <= rand() % 3 && cut > 8; k++) {
            size_t width = (size_t)1 << (rand() % 4);
            value_mutate(work + (size_t)rand() % (cut - width), width);
        }
        enum cm_status status = cm_manifest_parse(work, cut, 4096 * 9, &manifest, &err);
        if (status == CM_OK) {
            accepted++;
            cr_assert_leq(manifest.tensors[manifest.tensor_count - 1].offset, 4096u * 9);
            cm_manifest_done(&manifest);
        }
        free(work);
    }
    printf("package_mutation: %d manifests, %u still well-formed\n", MUTATIONS * 4, accepted);
    free(bytes);
    sample_done(&sample);
}

/* RoPE factors are read as written; those that divide nothing, or are all 1, are not. */
Test(package_mutation, rope_factors)
{
    static const float bad[] = {0.0f, -1.0f, 0x1p-11f, 0x1p21f, INFINITY, NAN};
    struct cm_error err;
    struct cm_manifest again;
    uint8_t *bytes;
    size_t size;
    sample_make(&sample, CM_SUITE_AES_256_GCM, 4096, "model.cmpkg");
    struct cm_manifest *m = &sample.manifest;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]) + 2; i++) {
        m->rope_factor_count = 16;
        for (uint32_t k = 0; k < 16; k++) {
            m->rope_factors[k] = i == 1 ? 1.0f : 1.0f + 0.5f * (float)k;
        }
        if (i > 1) {
            m->rope_factors[i] = bad[i - 2];
        }
        cr_assert_eq(cm_manifest_encode(m, &bytes, &size, &err), CM_OK);
        enum cm_status status = cm_manifest_parse(bytes, size, 4096, &again, &err);
        cr_assert_eq(status, i == 0 ? CM_OK : CM_E_PACKAGE, "case %zu", i);
        free(bytes);
        if (status == CM_OK) {
            cr_assert_eq(again.rope_factor_count, 16u);
            cr_assert_arr_eq(again.rope_factors, m->rope_factors, 16 * sizeof(float));
            cm_manifest_done(&again);
        }
    }
    m->rope_factor_count = 0;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]) + 4; i++) { /* those of a longer context */
        static const uint32_t contexts[] = {127, 128, 0xffffffffu, 1}; /* the model's is 128 */
        const bool good = i == 0 || i == 3;
        m->rope_long_context = i < 4 ? contexts[i] : 64;
        for (uint32_t k = 0; k < 16; k++) {
            m->rope_long_factors[k] = 1.0f + 0.25f * (float)k;
        }
        if (i >= 4) {
            m->rope_long_factors[15] = bad[i - 4];
        }
        cr_assert_eq(cm_manifest_encode(m, &bytes, &size, &err), CM_OK);
        enum cm_status status = cm_manifest_parse(bytes, size, 4096, &again, &err);
        cr_assert_eq(status, good ? CM_OK : CM_E_PACKAGE, "case %zu", i);
        free(bytes);
        if (status == CM_OK) {
            cr_assert_eq(again.rope_long_context, m->rope_long_context);
            cr_assert_arr_eq(again.rope_long_factors, m->rope_long_factors, 16 * sizeof(float));
            cm_manifest_done(&again);
        } else {
            cr_assert_not_null(strstr(err.text, "longer context"), "%s", err.text);
        }
    }
    m->rope_long_context = 0;
    m->rope_factor_count = 15; /* of 16 pairs */
    cr_assert_eq(cm_manifest_encode(m, &bytes, &size, &err), CM_OK);
    cr_assert_eq(cm_manifest_parse(bytes, size, 4096, &again, &err), CM_E_PACKAGE);
    free(bytes);
    sample_done(&sample);
}

/* An adapter's manifest: the same, and the parser that serves allocates nothing. */
Test(package_mutation, adapter_manifests)
{
    struct cm_error err;
    static struct cm_manifest_tensor tensors[ADAPTER_SEED_TENSORS];
    const struct cm_manifest_adapter seed = adapter_seed();
    uint8_t *bytes;
    size_t size;
    unsigned accepted = 0;
    srand(13);
    cr_assert_eq(cm_manifest_adapter_encode(&seed, &bytes, &size, &err), CM_OK);
    for (int i = 0; i < MUTATIONS * 4; i++) {
        size_t cut = rand() % 4 == 0 ? (size_t)rand() % (size + 1) : size;
        uint8_t *work = malloc(cut == 0 ? 1 : cut);
        struct cm_manifest_adapter adapter;
        struct cm_manifest model;
        memcpy(work, bytes, cut);
        for (int k = 0; k <= rand() % 3 && cut > 8; k++) {
            size_t width = (size_t)1 << (rand() % 4);
            value_mutate(work + (size_t)rand() % (cut - width), width);
        }
        (void)cm_manifest_is_adapter(work, cut);
        cr_assert_eq(cm_manifest_parse(work, cut, ADAPTER_SEED_PAYLOAD, &model, &err),
                     CM_E_PACKAGE);
        if (cm_manifest_adapter_parse(work, cut, ADAPTER_SEED_PAYLOAD, tensors,
                                      ADAPTER_SEED_TENSORS, &adapter, &err) == CM_OK) {
            accepted++;
            cr_assert_leq(adapter.tensor_count, ADAPTER_SEED_TENSORS);
            cr_assert(adapter.rank >= 1 && adapter.rank <= CM_MANIFEST_ADAPTER_RANK_MAX);
            cr_assert_lt(tensors[adapter.tensor_count - 1].layer, adapter.layers);
        }
        free(work);
    }
    printf("package_mutation: %d adapter manifests, %u still well-formed\n", MUTATIONS * 4,
           accepted);
    free(bytes);
}
