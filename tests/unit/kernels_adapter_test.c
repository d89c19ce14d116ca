/* Adapters on the device: each sequence gets its own and no other's, on every path, among any
 * neighbours; what does not fit is refused by name; what is unbound is gone. */
#include "tests/unit/tiny_adapter.h"

#include "kernels/cpu/cpu_internal.h"

enum { SEQUENCES = 6, PROMPT = 53, REPLY = 8, SPACE = 4, ALL_TARGETS = 127, CHUNK_MAX = 64 };

static const char *const paths[] = {"avx2", "avx512vnni", "amx"};
static struct tiny_adapter small, large, partial;

static void adapters_make(void)
{
    model_make();
    adapter_make(&small, 21, 3, ALL_TARGETS);
    adapter_make(&large, 22, 17, ALL_TARGETS);
    adapter_make(&partial, 23, 8, 1u << CM_TARGET_V | 1u << CM_TARGET_DOWN);
}

TestSuite(kernels_adapter, .init = adapters_make);

static struct cm_device *device_of(const struct cm_device_options *options, uint32_t regions)
{
    struct cm_device_reserve reserve =
        reserve_of(SEQUENCES, SEQUENCES * SPACE, CONTEXT, SEQUENCES * CHUNK_MAX);
    reserve.adapters = regions;
    reserve.adapter_bytes = regions > 0 ? ADAPTER_BYTES : 0;
    reserve.adapter_rank_max = regions > 0 ? 32 : 0;
    struct cm_device *device = device_load_with(options, &reserve);
    cr_assert_eq(cm_device_model_bind(device, &model, &err), CM_OK, "%s", err.text);
    return device;
}

static struct cm_device *device_plain(uint32_t regions)
{
    return device_of(&(const struct cm_device_options){.threads = 1}, regions);
}

/* ------------------------------------------------------------------ sequences */

struct sequence {
    uint32_t slot, at, next;
    uint32_t prompt[PROMPT], pages[SPACE];
};

struct outcome {
    float logits[PROMPT][VOCABULARY];
    uint32_t tokens[REPLY];
    enum cm_finish ends[REPLY];
};

static void sequence_open(struct cm_device *device, struct sequence *s, uint32_t number,
                          uint32_t adapter)
{
    const struct cm_slot_params params = {.sampling = {.top_p = 1, .repetition_penalty = 1},
                                          .max_tokens = UINT32_MAX,
                                          .ignore_eos = true,
                                          .adapter = adapter};
    *s = (struct sequence){.at = 0};
    cr_assert_eq(cm_device_slot_open(device, &params, &s->slot, &err), CM_OK, "%s", err.text);
    for (uint32_t i = 0; i < PROMPT; i++) {
        s->prompt[i] = (i * 31 + i * i * 7) % (VOCABULARY - 1); /* all say the same */
    }
    for (uint32_t p = 0; p < SPACE; p++) {
        s->pages[p] = number * SPACE + p;
    }
}

/* All of them, in chunks of any size, then a reply; what the step computed goes to all[i]. */
static void sequences_run(struct cm_device *device, struct sequence *all, uint32_t count,
                          uint32_t chunk, struct outcome *ret)
{
    static float probe[SEQUENCES * CHUNK_MAX][VOCABULARY];
    static struct cm_step_result results[SEQUENCES];
    struct cm_step_entry entries[SEQUENCES];
    device->probe = &probe[0][0];
    while (all[0].at < PROMPT + REPLY) {
        uint32_t at = all[0].at, left = at < PROMPT ? PROMPT - at : 1;
        uint32_t take = left < chunk ? left : chunk;
        for (uint32_t s = 0; s < count; s++) {
            entries[s] =
                (struct cm_step_entry){.slot = all[s].slot,
                                       .position = at,
                                       .token_count = take,
                                       .tokens = at < PROMPT ? all[s].prompt + at : &all[s].next,
                                       .pages = all[s].pages,
                                       .page_count = SPACE,
                                       .sample = at + take >= PROMPT};
        }
        cr_assert_eq(cm_device_step_submit(device, entries, count, &err), CM_OK, "%s", err.text);
        cr_assert_eq(cm_device_step_wait(device, results, count, &err), CM_OK);
        for (uint32_t s = 0; s < count; s++) {
            all[s].at += take;
            all[s].next = results[s].token;
            if (at < PROMPT) {
                memcpy(ret[s].logits[at], probe[s * take], take * sizeof(probe[0]));
            } else {
                ret[s].tokens[at - PROMPT] = results[s].token;
                ret[s].ends[at - PROMPT] = results[s].finish;
            }
        }
    }
    device->probe = NULL;
}

/* One sequence alone on a device with this adapter, or none. */
static void alone_run(const struct tiny_adapter *adapter, struct outcome *ret)
{
    struct cm_device *device =
        device_of(&(const struct cm_device_options){.threads = 1, .path = "avx2"}, adapter != NULL);
    struct sequence s;
    if (adapter != NULL) {
        cr_assert_eq(adapter_load(device, 1, adapter), CM_OK, "%s", err.text);
    }
    sequence_open(device, &s, 0, adapter != NULL ? 1 : CM_ADAPTER_NONE);
    sequences_run(device, &s, 1, CHUNK_MAX, ret);
    cm_device_close(device);
}

static void neighbours_run(void)
{
    static struct outcome wanted[4], found[SEQUENCES];
    static struct sequence all[SEQUENCES];
    const struct tiny_adapter *adapters[] = {NULL, &small, &large, &partial};
    const uint32_t chunks[] = {1, 7, 16, 64};
    uint32_t runs = 0;
    for (uint32_t i = 0; i < 4; i++) {
        alone_run(adapters[i], &wanted[i]);
        for (uint32_t k = 0; k < i; k++) {
            cr_assert_neq(memcmp(&wanted[i].logits, &wanted[k].logits, sizeof(wanted[i].logits)),
                          0);
        }
    }
    for (size_t p = 0; p < sizeof(paths) / sizeof(paths[0]); p++) {
        for (uint32_t i = 0; cm_path_choose(paths[p]) != NULL && i < 16; i++) {
            const struct cm_device_options options = {.threads = 1 + i % 2, .path = paths[p]};
            struct cm_device *device = device_of(&options, 3);
            const uint32_t count = i / 2 % 2 == 0 ? SEQUENCES : 3;
            for (uint32_t r = 1; r <= 3; r++) {
                cr_assert_eq(adapter_load(device, r, adapters[r]), CM_OK, "%s", err.text);
            }
            for (uint32_t s = 0; s < count; s++) { /* 1 1 0 2 3 1, from another place each time */
                sequence_open(device, &all[s], s,
                              (const uint32_t[]){1, 1, 0, 2, 3, 1}[(s + i) % 6]);
            }
            sequences_run(device, all, count, chunks[i / 4], found);
            for (uint32_t s = 0; s < count; s++) {
                uint32_t adapter = (const uint32_t[]){1, 1, 0, 2, 3, 1}[(s + i) % 6];
                cr_assert_eq(memcmp(&found[s], &wanted[adapter], sizeof(found[s])), 0,
                             "%s, %u threads, chunks of %u, sequence %u of %u, adapter %u",
                             paths[p], options.threads, chunks[i / 4], s, count, adapter);
                runs++;
            }
            cm_device_close(device);
        }
    }
    cr_assert_geq(runs, 72u);
}

Test(kernels_adapter, each_sequence_gets_its_own_on_every_path_among_any_neighbours)
{
    neighbours_run();
}

Test(kernels_adapter, each_gets_its_own_over_bf16_too)
{
    attention_kind = ffn_kind = CM_TENSOR_BF16;
    model_make();
    neighbours_run();
}

Test(kernels_adapter, each_gets_its_own_over_keys_and_values_of_int8_too)
{
    kv_kind = CM_KV_INT8;
    neighbours_run();
}

/* One whose numbers overflow fails, says so and says nothing; nobody beside it loses a bit. */
Test(kernels_adapter, a_sequence_that_overflows_fails_and_disturbs_no_neighbour)
{
    static struct outcome wanted[2], found[SEQUENCES];
    static struct sequence all[SEQUENCES];
    static struct tiny_adapter hot;
    hot = large;
    hot.adapter.scale = 3e38f;
    alone_run(NULL, &wanted[0]);
    alone_run(&small, &wanted[1]);
    for (uint32_t i = 0; i < 4 * sizeof(paths) / sizeof(paths[0]); i++) {
        const struct cm_device_options options = {.threads = 1 + i % 2, .path = paths[i / 4]};
        const uint32_t chunk = i % 4 < 2 ? 7 : 64;
        if (cm_path_choose(options.path) == NULL) {
            continue;
        }
        struct cm_device *device = device_of(&options, 2);
        cr_assert_eq(adapter_load(device, 1, &small), CM_OK, "%s", err.text);
        cr_assert_eq(adapter_load(device, 2, &hot), CM_OK, "%s", err.text);
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            sequence_open(device, &all[s], s, (s + i) % 3);
        }
        sequences_run(device, all, SEQUENCES, chunk, found);
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            if ((s + i) % 3 == 2) {
                cr_assert_eq(found[s].ends[0], CM_FINISH_FAILED, "%s, sequence %u", options.path,
                             s);
            } else {
                cr_assert_eq(memcmp(&found[s], &wanted[(s + i) % 3], sizeof(found[s])), 0,
                             "%s, %u threads, sequence %u", options.path, options.threads, s);
            }
        }
        cm_device_close(device);
    }
}

/* B of zeros adds nothing: the bits are the plain model's. */
Test(kernels_adapter, zeros_add_nothing)
{
    static struct outcome plain, found;
    for (uint32_t t = 0; t < CM_TARGET_COUNT; t++) {
        memset(large.payload + large.layer.b[t].offset, 0, large.layer.b[t].bytes);
    }
    alone_run(NULL, &plain);
    alone_run(&large, &found);
    cr_assert_eq(memcmp(&found, &plain, sizeof(found)), 0);
    large.payload[large.layer.b[CM_TARGET_DOWN].offset + 1] = 0x2c; /* and one value does */
    alone_run(&large, &found);
    cr_assert_neq(memcmp(&found, &plain, sizeof(found)), 0);
}

/* ------------------------------------------------------------------ refusals */

/* Refused for this reason; then nothing of it is left, nobody can use it, and the region takes
 * another one once it is unbound. */
static void refused(struct cm_device *device, const struct tiny_adapter *adapter, const char *id,
                    const char *names)
{
    const struct cm_slot_params params = {
        .sampling = {.top_p = 1, .repetition_penalty = 1}, .max_tokens = 1, .adapter = 1};
    const struct cm_adapter_region *region = cm_adapter_region_of(device, 1);
    uint32_t slot;
    cr_assert_eq(adapter_load(device, 1, adapter), CM_E_PACKAGE, "%s", names);
    cr_assert_str_eq(err.id, id, "%s", err.text);
    cr_assert_not_null(strstr(err.text, names), "%s", err.text);
    for (uint64_t i = 0; i < ADAPTER_BYTES; i++) {
        cr_assert_eq(region->payload[i], 0, "byte %lu", i);
    }
    cr_assert_eq(cm_device_slot_open(device, &params, &slot, &err), CM_E_INPUT);
    cr_assert_eq(adapter_load(device, 1, &small), CM_E_BUG);
    cm_device_adapter_unbind(device, 1);
    cr_assert_eq(adapter_load(device, 1, &small), CM_OK, "%s", err.text);
    cm_device_adapter_unbind(device, 1);
}

Test(kernels_adapter, what_does_not_fit_is_refused_by_name)
{
    struct cm_device *device = device_plain(1);
    static struct tiny_adapter bad;
    const uint16_t values[] = {0x7c00, 0xfc00, 0x7e01};
    for (uint32_t i = 0; i < 3; i++) {
        bad = large;
        const struct cm_tensor *tensor = i == 1 ? &bad.layer.b[CM_TARGET_UP] : &bad.layer.a[i];
        memcpy(bad.payload + tensor->offset + tensor->bytes - 2 * (i + 1), &values[i], 2);
        refused(device, &bad, "CM-DEV-TENSOR", tensor->name);
    }
    bad = large;
    bad.layer.b[CM_TARGET_K].rows = 64;
    refused(device, &bad, "CM-DEV-TENSOR", "k.b");
    bad = large;
    bad.layer.a[CM_TARGET_GATE].columns = 32;
    refused(device, &bad, "CM-DEV-TENSOR", "gate.a");
    bad = large;
    bad.layer.b[CM_TARGET_DOWN] = (struct cm_tensor){.kind = CM_TENSOR_NONE, .name = "down.b"};
    refused(device, &bad, "CM-DEV-TENSOR", "down.b");
    bad = large;
    bad.layer.a[CM_TARGET_Q].offset = large.payload_bytes / 4096 * 4096;
    refused(device, &bad, "CM-DEV-TENSOR", "outside the payload");
    bad = large;
    bad.layer.a[CM_TARGET_Q].kind = CM_TENSOR_BF16;
    refused(device, &bad, "CM-DEV-TENSOR", "q.a");
    bad = large;
    bad.adapter.head_width = 16; /* every tensor's size is right all the same */
    bad.adapter.heads = 4;
    bad.adapter.kv_heads = 2;
    refused(device, &bad, "CM-DEV-ADAPTER", "another shape");
    adapter_make(&bad, 3, 33, 1u << CM_TARGET_V);
    refused(device, &bad, "CM-DEV-ADAPTER", "rank is 33");
    cm_device_close(device);
}

static enum cm_status segment_refuse(void *context, uint64_t index, const uint8_t *ciphertext,
                                     size_t bytes, uint8_t *plaintext, struct cm_error *failure)
{
    (void)context;
    memcpy(plaintext, ciphertext, bytes);
    return cm_error_set(failure, CM_E_PACKAGE, "CM-TEST", "segment %lu", index);
}

Test(kernels_adapter, a_segment_that_fails_wipes_the_region_and_nothing_else)
{
    static struct outcome wanted, found;
    const struct cm_device_cipher good = {segment_copy, NULL}, bad = {segment_refuse, NULL};
    struct cm_device *device = device_plain(2);
    const struct cm_adapter_region *region = cm_adapter_region_of(device, 2);
    struct sequence s;
    alone_run(&small, &wanted);
    cr_assert_eq(adapter_load(device, 1, &small), CM_OK);
    memset(large.payload, 0xa5, SEGMENT_BYTES);
    cr_assert_eq(cm_device_adapter_submit(device, &good, 2, 0, large.payload, SEGMENT_BYTES, &err),
                 CM_OK);
    cr_assert_eq(region->payload[0], 0xa5);
    cr_assert_eq(cm_device_adapter_submit(device, &bad, 2, 1, large.payload, SEGMENT_BYTES, &err),
                 CM_E_PACKAGE);
    for (uint64_t i = 0; i < ADAPTER_BYTES; i++) {
        cr_assert_eq(region->payload[i], 0);
    }
    cr_assert_eq(cm_device_adapter_submit(device, &good, 2, 2, large.payload, SEGMENT_BYTES, &err),
                 CM_E_BUG);
    cm_device_adapter_unbind(device, 2);
    cr_assert_eq(cm_device_adapter_submit(device, &good, 2, 2, large.payload, SEGMENT_BYTES, &err),
                 CM_OK);
    sequence_open(device, &s, 0, 1);
    sequences_run(device, &s, 1, 7, &found);
    cr_assert_eq(memcmp(&found, &wanted, sizeof(found)), 0);
    cm_device_close(device);
}

Test(kernels_adapter, segments_that_are_missing_twice_or_too_many_are_refused)
{
    const struct cm_device_cipher cipher = {segment_copy, NULL};
    struct cm_device *device = device_plain(1);
    cr_assert_eq(
        cm_device_adapter_submit(device, &cipher, 1, 0, large.payload, SEGMENT_BYTES, &err), CM_OK);
    cr_assert_eq(
        cm_device_adapter_submit(device, &cipher, 1, 0, large.payload, SEGMENT_BYTES, &err),
        CM_E_PACKAGE);
    cm_device_adapter_unbind(device, 1);
    cr_assert_eq(cm_device_adapter_submit(device, &cipher, 1, ADAPTER_BYTES / SEGMENT_BYTES,
                                          large.payload, SEGMENT_BYTES, &err),
                 CM_E_PACKAGE);
    cm_device_adapter_unbind(device, 1);
    cr_assert_eq(
        cm_device_adapter_submit(device, &cipher, 1, 1, large.payload, SEGMENT_BYTES, &err), CM_OK);
    cr_assert_eq(cm_device_adapter_bind(device, 1, &large.adapter, large.payload_bytes, &err),
                 CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-DEV-SEGMENT");
    cr_assert_eq(
        cm_device_adapter_submit(device, &cipher, 2, 0, large.payload, SEGMENT_BYTES, &err),
        CM_E_BUG, "there is no region 2");
    cr_assert_null(cm_device_adapter_place(device, 0, 0));
    cr_assert_null(cm_device_adapter_place(device, 1, ADAPTER_BYTES / SEGMENT_BYTES));
    cm_device_close(device);
}

/* ------------------------------------------------------------------ unbinding */

static uint64_t arena_find(const struct cm_device *device, const uint8_t *needle, size_t size)
{
    uint64_t found = 0;
    const uint8_t *at = device->arena, *end = at + device->arena_bytes;
    while ((at = memmem(at, (size_t)(end - at), needle, size)) != NULL) {
        found++;
        at++;
    }
    return found;
}

Test(kernels_adapter, unbind_leaves_nothing_and_the_region_serves_again)
{
    static struct outcome before, after, wanted;
    struct cm_device *device = device_plain(2);
    const uint8_t *canary = large.payload + large.layer.b[CM_TARGET_GATE].offset;
    struct sequence s;
    cr_assert_eq(adapter_load(device, 1, &small), CM_OK);
    cr_assert_eq(adapter_load(device, 2, &large), CM_OK);
    sequence_open(device, &s, 0, 1);
    sequences_run(device, &s, 1, 16, &before);
    cm_device_slot_close(device, s.slot);
    cr_assert_eq(arena_find(device, canary, 32), 1u);
    cm_device_adapter_unbind(device, 2);
    cr_assert_eq(arena_find(device, canary, 32), 0u);
    sequence_open(device, &s, 0, 1);
    sequences_run(device, &s, 1, 16, &after);
    cr_assert_eq(memcmp(&after, &before, sizeof(after)), 0, "the neighbour");
    cm_device_slot_close(device, s.slot);
    cr_assert_eq(adapter_load(device, 2, &partial), CM_OK, "%s", err.text);
    sequence_open(device, &s, 0, 2);
    sequences_run(device, &s, 1, 16, &after);
    alone_run(&partial, &wanted);
    cr_assert_eq(memcmp(&after, &wanted, sizeof(after)), 0, "what was there before");
    cm_device_close(device);
}

/* A slot that is open would go on with what is not there any more. */
Test(kernels_adapter, unbind_under_an_open_slot_is_a_bug, .exit_code = 70)
{
    struct cm_device *device = device_plain(1);
    struct sequence s;
    cr_assert_eq(adapter_load(device, 1, &small), CM_OK);
    sequence_open(device, &s, 0, 1);
    cm_device_adapter_unbind(device, 1);
}

Test(kernels_adapter, regions_are_counted_and_bounded)
{
    struct cm_device *device = device_plain(0);
    struct cm_device_reserve reserve = reserve_of(1, 4, CONTEXT, 64);
    uint64_t without, with, page;
    cr_assert_eq(cm_device_need(device, &reserve, &without, &page, &err), CM_OK);
    reserve.adapters = CM_ADAPTER_REGIONS_MAX;
    reserve.adapter_bytes = 64u << 20;
    reserve.adapter_rank_max = CM_ADAPTER_RANK_MAX;
    cr_assert_eq(cm_device_need(device, &reserve, &with, &page, &err), CM_OK, "%s", err.text);
    cr_assert_geq(with - without, (uint64_t)CM_ADAPTER_REGIONS_MAX * (64u << 20));
    cr_assert_leq(with - without, (uint64_t)CM_ADAPTER_REGIONS_MAX * (64u << 20) + (8u << 20));
    const struct cm_device_reserve kept = reserve;
    reserve.adapters++;
    cr_assert_eq(cm_device_need(device, &reserve, &with, &page, &err), CM_E_CONFIG);
    reserve = kept;
    reserve.adapter_rank_max++;
    cr_assert_eq(cm_device_need(device, &reserve, &with, &page, &err), CM_E_CONFIG);
    reserve = kept;
    reserve.adapter_bytes = 0;
    cr_assert_eq(cm_device_need(device, &reserve, &with, &page, &err), CM_E_CONFIG);
    reserve = kept;
    reserve.adapters = 0;
    cr_assert_eq(cm_device_need(device, &reserve, &with, &page, &err), CM_E_CONFIG);
    cm_device_close(device);
}
