/* One model, every path, one thread and two, alone and among eight, in chunks of any size: the same
 * logits and tokens, bit by bit. */
#include "tests/unit/tiny_device.h"

#include "kernels/cpu/cpu_internal.h"

enum { SEQUENCES = 8, PROMPT = 67, REPLY = 12, SPACE = 256 / CM_KV_PAGE_POSITIONS };

static const char *const paths[] = {"avx2", "avx512vnni", "amx"};

/* A way to run: what must not change anything. */
struct way {
    const char *path;
    uint32_t threads, sequences, chunk;
};

struct outcome {
    float logits[PROMPT][VOCABULARY]; /* of sequence 0's prompt */
    uint32_t tokens[REPLY];
};

static struct cm_device *device_open_for(const struct way *way)
{
    const struct cm_device_options options = {.threads = way->threads, .path = way->path};
    struct cm_device *device =
        device_load_by(&options, SEQUENCES, SEQUENCES * SPACE, CONTEXT, SEQUENCES * 64);
    cr_assert_eq(cm_device_model_bind(device, &model, &err), CM_OK, "%s", err.text);
    return device;
}

struct sequence {
    uint32_t slot, at;
    uint32_t prompt[PROMPT];
    uint32_t pages[SPACE];
    uint32_t next;
};

static void sequences_open(struct cm_device *device, struct sequence *all, uint32_t count)
{
    const struct cm_slot_params params = {.sampling = {.top_p = 1, .repetition_penalty = 1},
                                          .max_tokens = UINT32_MAX,
                                          .ignore_eos = true};
    for (uint32_t s = 0; s < count; s++) {
        all[s] = (struct sequence){.at = 0};
        cr_assert_eq(cm_device_slot_open(device, &params, &all[s].slot, &err), CM_OK);
        for (uint32_t i = 0; i < PROMPT; i++) {
            all[s].prompt[i] = (i * 31 + s * 17 + i * i * 7) % (VOCABULARY - 1);
        }
        for (uint32_t p = 0; p < SPACE; p++) {
            all[s].pages[p] = p * SEQUENCES + (s + p) % SEQUENCES;
        }
    }
}

static struct cm_step_entry entry_of(const struct sequence *s, const uint32_t *tokens,
                                     uint32_t count, bool sample)
{
    return (struct cm_step_entry){.slot = s->slot,
                                  .position = s->at,
                                  .token_count = count,
                                  .tokens = tokens,
                                  .pages = s->pages,
                                  .page_count = SPACE,
                                  .sample = sample};
}

static void step(struct cm_device *device, struct sequence *all, struct cm_step_entry *entries,
                 uint32_t count)
{
    static struct cm_step_result results[SEQUENCES];
    cr_assert_eq(cm_device_step_submit(device, entries, count, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_device_step_wait(device, results, count, &err), CM_OK, "%s", err.text);
    for (uint32_t s = 0; s < count; s++) {
        all[s].at += entries[s].token_count;
        all[s].next = results[s].token;
    }
}

static void way_run(const struct way *way, struct outcome *ret)
{
    static float probe[SEQUENCES * 64][VOCABULARY];
    static struct sequence all[SEQUENCES];
    struct cm_step_entry entries[SEQUENCES];
    struct cm_device *device = device_open_for(way);
    sequences_open(device, all, way->sequences);
    while (all[0].at < PROMPT) {
        uint32_t at = all[0].at, left = PROMPT - at, take = left < way->chunk ? left : way->chunk;
        for (uint32_t s = 0; s < way->sequences; s++) {
            entries[s] = entry_of(&all[s], all[s].prompt + at, take, take == left);
        }
        device->probe = &probe[0][0];
        step(device, all, entries, way->sequences);
        memcpy(ret->logits[at], probe, take * sizeof(probe[0]));
    }
    device->probe = NULL;
    for (uint32_t i = 0; i < REPLY; i++) {
        ret->tokens[i] = all[0].next;
        for (uint32_t s = 0; s < way->sequences; s++) {
            entries[s] = entry_of(&all[s], &all[s].next, 1, true);
        }
        step(device, all, entries, way->sequences);
    }
    cm_device_close(device);
}

static void ways_compare(uint32_t attention, uint32_t ffn)
{
    static struct outcome wanted, found;
    const uint32_t chunks[] = {1, 7, 16, 64};
    uint32_t runs = 0;
    attention_kind = attention;
    ffn_kind = ffn;
    model_make();
    way_run(&(struct way){"avx2", 1, 1, 64}, &wanted);
    cr_assert_neq(memcmp(wanted.logits[0], wanted.logits[1], sizeof(wanted.logits[0])), 0);
    for (size_t p = 0; p < sizeof(paths) / sizeof(paths[0]); p++) {
        for (uint32_t i = 0; cm_path_choose(paths[p]) != NULL && i < 16; i++) {
            struct way way = {paths[p], 1 + i % 2, i / 2 % 2 ? SEQUENCES : 1, chunks[i / 4]};
            memset(&found, 0, sizeof(found));
            way_run(&way, &found);
            cr_assert_eq(memcmp(&found, &wanted, sizeof(found)), 0,
                         "%s, %u threads, %u sequences, chunks of %u", way.path, way.threads,
                         way.sequences, way.chunk);
            runs++;
        }
    }
    cr_assert_geq(runs, 16u);
}

Test(kernels_forward, nothing_changes_a_bit)
{
    ways_compare(CM_TENSOR_U8S, CM_TENSOR_U8S);
    ways_compare(CM_TENSOR_U5A, CM_TENSOR_U5S);
}

Test(kernels_forward, nothing_changes_a_bit_with_keys_and_values_of_int8)
{
    kv_kind = CM_KV_INT8;
    ways_compare(CM_TENSOR_U8S, CM_TENSOR_U8S);
    ways_compare(CM_TENSOR_BF16, CM_TENSOR_U8S);
}

/* Activations are floats for some matrices and quants for others. */
Test(kernels_forward, nothing_changes_a_bit_with_bf16)
{
    ways_compare(CM_TENSOR_BF16, CM_TENSOR_BF16);
    ways_compare(CM_TENSOR_BF16, CM_TENSOR_U8S);
    ways_compare(CM_TENSOR_U8S, CM_TENSOR_BF16);
}
