/* The manifest of an adapter: what is written is read, and each thing that it must not say is
 * refused. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/base/cursor.h"
#include "tests/fuzz/manifest_seed.h"

static struct cm_error err;
static struct cm_manifest_tensor tensors[ADAPTER_SEED_TENSORS];
static struct cm_manifest_adapter adapter;

static enum cm_status parse(const uint8_t *bytes, size_t size, uint64_t payload_bytes,
                            uint32_t room)
{
    /* An exact-sized copy: a sanitizer sees the first byte read too far. */
    uint8_t *copy = memcpy(malloc(size), bytes, size);
    enum cm_status status =
        cm_manifest_adapter_parse(copy, size, payload_bytes, tensors, room, &adapter, &err);
    free(copy);
    return status;
}

static uint8_t *encode(const struct cm_manifest_adapter *from, size_t *ret_size)
{
    uint8_t *bytes;
    cr_assert_eq(cm_manifest_adapter_encode(from, &bytes, ret_size, &err), CM_OK, "%s", err.text);
    return bytes;
}

Test(package_adapter, what_is_written_is_read)
{
    const struct cm_manifest_adapter seed = adapter_seed();
    struct cm_manifest model;
    size_t size;
    uint8_t *bytes = encode(&seed, &size);
    cr_assert(cm_manifest_is_adapter(bytes, size));
    cr_assert_eq(cm_manifest_adapter_parse(bytes, size, ADAPTER_SEED_PAYLOAD, tensors,
                                           ADAPTER_SEED_TENSORS, &adapter, &err),
                 CM_OK, "%s", err.text);
    cr_assert_arr_eq(adapter.name.bytes, "adapter", 7);
    cr_assert_arr_eq(adapter.base_digest, seed.base_digest, CM_DIGEST_BYTES);
    cr_assert(adapter.rank == 4 && adapter.scale == 2.0f && adapter.rounding == 0.0f);
    cr_assert(adapter.layers == 2 && adapter.width == 64 && adapter.heads == 2 &&
              adapter.kv_heads == 1 && adapter.head_width == 32 && adapter.rope_width == 32 &&
              adapter.ffn_width == 64);
    cr_assert_eq(adapter.tensor_count, ADAPTER_SEED_TENSORS);
    cr_assert(tensors[5].layer == 1 && tensors[5].role == 13 && tensors[5].offset == 5 * 4096);
    cr_assert_eq(cm_manifest_parse(bytes, size, ADAPTER_SEED_PAYLOAD, &model, &err), CM_E_PACKAGE);
    cr_assert_not_null(strstr(err.text, "holds an adapter"), "%s", err.text);
    free(bytes);
}

Test(package_adapter, a_models_manifest_is_none)
{
    const struct cm_manifest model = manifest_seed();
    uint8_t *bytes;
    size_t size;
    cr_assert_eq(cm_manifest_encode(&model, &bytes, &size, &err), CM_OK);
    cr_assert_not(cm_manifest_is_adapter(bytes, size));
    cr_assert_eq(parse(bytes, size, SEED_PAYLOAD_BYTES, ADAPTER_SEED_TENSORS), CM_E_PACKAGE);
    cr_assert_not_null(strstr(err.text, "holds a model"), "%s", err.text);
    free(bytes);
}

static void refused(const struct cm_manifest_adapter *from, const char *why)
{
    size_t size;
    uint8_t *bytes = encode(from, &size);
    cr_assert_eq(parse(bytes, size, ADAPTER_SEED_PAYLOAD, ADAPTER_SEED_TENSORS), CM_E_PACKAGE, "%s",
                 why);
    cr_assert_not_null(strstr(err.text, why), "%s: %s", why, err.text);
    free(bytes);
}

Test(package_adapter, numbers_that_are_out_of_bounds_are_refused)
{
    const struct cm_manifest_adapter good = adapter_seed();
    const uint32_t ranks[] = {0, CM_MANIFEST_ADAPTER_RANK_MAX + 1};
    const float scales[] = {0.0f, -1.0f, NAN, INFINITY}, roundings[] = {-1.0f, NAN, INFINITY};
    struct cm_manifest_adapter bad;
    for (size_t i = 0; i < 2; i++) {
        bad = good;
        bad.rank = ranks[i];
        refused(&bad, "rank, scale or rounding");
    }
    for (size_t i = 0; i < 4; i++) {
        bad = good;
        bad.scale = scales[i];
        refused(&bad, "rank, scale or rounding");
    }
    for (size_t i = 0; i < 3; i++) {
        bad = good;
        bad.rounding = roundings[i];
        refused(&bad, "rank, scale or rounding");
    }
    uint32_t *const fields[] = {&bad.layers,     &bad.width,      &bad.heads,    &bad.kv_heads,
                                &bad.head_width, &bad.rope_width, &bad.ffn_width};
    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
        for (uint32_t wild = 0; wild < 2; wild++) {
            bad = good;
            *fields[i] = wild != 0 ? 1u << 30 : 0;
            refused(&bad, "shape is out of bounds");
        }
    }
    bad = good;
    bad.name = (struct cm_manifest_text){"a/b", 3};
    refused(&bad, "name is not");
}

Test(package_adapter, tensors_that_are_no_pairs_in_order_are_refused)
{
    struct cm_manifest_tensor changed[ADAPTER_SEED_TENSORS];
    struct cm_manifest_adapter bad = adapter_seed();
    const struct cm_manifest_tensor *good = bad.tensors;
    bad.tensors = changed;
    const struct {
        uint32_t index, layer, role;
        const char *why;
    } rows[] = {{1, 0, 2, "out of order"},
                {1, 1, 1, "out of order"},
                {2, 0, 0, "out of order"},
                {3, 1, 3, "out of order"},
                {4, 1, 0, "out of order"},
                {4, 0, 12, "out of order"},
                {5, 2, 13, "does not exist"},
                {5, 1, 14, "does not exist"},
                {5, CM_MANIFEST_NO_LAYER, 13, "does not exist"}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        memcpy(changed, good, sizeof(changed));
        changed[rows[i].index].layer = rows[i].layer;
        changed[rows[i].index].role = rows[i].role;
        refused(&bad, rows[i].why);
    }
    memcpy(changed, good, sizeof(changed));
    changed[3].offset = 2 * 4096;
    refused(&bad, "overlaps");
    memcpy(changed, good, sizeof(changed));
    changed[5].offset = ADAPTER_SEED_PAYLOAD;
    refused(&bad, "outside the payload");
    memcpy(changed, good, sizeof(changed));
    bad.tensor_count--;
    refused(&bad, "ends too early");
    bad.tensor_count = 0;
    refused(&bad, "ends too early");
}

Test(package_adapter, more_tensors_than_there_is_room_for_are_refused)
{
    const struct cm_manifest_adapter good = adapter_seed();
    size_t size;
    uint8_t *bytes = encode(&good, &size);
    cr_assert_eq(parse(bytes, size, ADAPTER_SEED_PAYLOAD, ADAPTER_SEED_TENSORS), CM_OK);
    cr_assert_eq(parse(bytes, size, ADAPTER_SEED_PAYLOAD, ADAPTER_SEED_TENSORS - 2), CM_E_PACKAGE);
    cr_assert_not_null(strstr(err.text, "too many"));
    free(bytes);
}

/* Records that are unknown, twice, missing, too long, or a model's beside an adapter's. */
Test(package_adapter, records_that_do_not_belong_are_refused)
{
    const struct cm_manifest_adapter good = adapter_seed();
    size_t size, at = 0;
    uint8_t *bytes = encode(&good, &size);
    uint8_t *work = malloc(2 * size);
    for (uint32_t record = 0; record < 4; record++) { /* name, licence, origin, adapter */
        uint32_t body;
        memcpy(&body, bytes + at + 4, 4);
        const size_t whole = 8 + body;
        /* without it */
        memcpy(work, bytes, at);
        memcpy(work + at, bytes + at + whole, size - at - whole);
        cr_assert_eq(parse(work, size - whole, ADAPTER_SEED_PAYLOAD, ADAPTER_SEED_TENSORS),
                     CM_E_PACKAGE);
        /* twice */
        memcpy(work, bytes, at + whole);
        memcpy(work + at + whole, bytes + at, size - at);
        cr_assert_eq(parse(work, size + whole, ADAPTER_SEED_PAYLOAD, ADAPTER_SEED_TENSORS),
                     CM_E_PACKAGE);
        /* under each other tag */
        for (uint16_t tag = 0; tag < 40; tag++) {
            memcpy(work, bytes, size);
            memcpy(work + at, &tag, 2);
            enum cm_status status = parse(work, size, ADAPTER_SEED_PAYLOAD, ADAPTER_SEED_TENSORS);
            cr_assert_eq(status == CM_OK, memcmp(work, bytes, size) == 0, "record %u as %u", record,
                         tag);
        }
        at += whole;
    }
    memcpy(work, bytes, size); /* and one more that nobody knows, behind the last */
    memcpy(work + size, (const uint8_t[8]){33}, 8);
    cr_assert_eq(parse(work, size + 8, ADAPTER_SEED_PAYLOAD, ADAPTER_SEED_TENSORS), CM_E_PACKAGE);
    free(work);
    free(bytes);
}
