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
    enum cm_prompts prompts;
    uint32_t first; /* which sequence comes first in a step, the others after it in a ring */
};

struct outcome { /* of one sequence */
    float logits[PROMPT][VOCABULARY];
    uint32_t tokens[REPLY];
};

static struct cm_device *device_open_for(const struct way *way)
{
    const struct cm_device_options options = {
        .threads = way->threads, .path = way->path, .prompts = way->prompts};
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

static uint32_t number_of(const struct way *way, uint32_t s)
{
    return (way->first + s) % SEQUENCES;
}

static void sequences_open(struct cm_device *device, struct sequence *all, const struct way *way)
{
    const struct cm_slot_params params = {.sampling = {.top_p = 1, .repetition_penalty = 1},
                                          .max_tokens = UINT32_MAX,
                                          .ignore_eos = true};
    for (uint32_t s = 0; s < way->sequences; s++) {
        const uint32_t number = number_of(way, s);
        all[s] = (struct sequence){.at = 0};
        cr_assert_eq(cm_device_slot_open(device, &params, &all[s].slot, &err), CM_OK);
        for (uint32_t i = 0; i < PROMPT; i++) {
            all[s].prompt[i] = (i * 31 + number * 17 + i * i * 7) % (VOCABULARY - 1);
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
                                  .prompt = s->at < PROMPT,
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

/* ret: of all sequences, by number; those that ran are written. */
static void way_run(const struct way *way, struct outcome ret[static SEQUENCES])
{
    static float probe[SEQUENCES * 64][VOCABULARY];
    static struct sequence all[SEQUENCES];
    struct cm_step_entry entries[SEQUENCES];
    struct cm_device *device = device_open_for(way);
    sequences_open(device, all, way);
    while (all[0].at < PROMPT) {
        uint32_t at = all[0].at, left = PROMPT - at, take = left < way->chunk ? left : way->chunk;
        for (uint32_t s = 0; s < way->sequences; s++) {
            entries[s] = entry_of(&all[s], all[s].prompt + at, take, take == left);
        }
        device->probe = &probe[0][0];
        step(device, all, entries, way->sequences);
        for (uint32_t s = 0; s < way->sequences; s++) {
            memcpy(ret[number_of(way, s)].logits[at], probe[s * take], take * sizeof(probe[0]));
        }
    }
    device->probe = NULL;
    for (uint32_t i = 0; i < REPLY; i++) {
        for (uint32_t s = 0; s < way->sequences; s++) {
            ret[number_of(way, s)].tokens[i] = all[s].next;
            entries[s] = entry_of(&all[s], &all[s].next, 1, true);
        }
        step(device, all, entries, way->sequences);
    }
    cm_device_close(device);
}

static void ways_compare(uint32_t attention, uint32_t ffn, enum cm_prompts prompts)
{
    static struct outcome wanted[SEQUENCES], found[SEQUENCES];
    const uint32_t chunks[] = {1, 7, 16, 64};
    uint32_t runs = 0;
    attention_kind = attention;
    ffn_kind = ffn;
    model_make();
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        way_run(&(struct way){"avx2", 1, 1, 64, prompts, s}, wanted);
        cr_assert_neq(memcmp(&wanted[s], &wanted[(s + 1) % SEQUENCES], sizeof(wanted[s])), 0);
    }
    for (size_t p = 0; p < sizeof(paths) / sizeof(paths[0]); p++) {
        for (uint32_t i = 0; cm_path_choose(paths[p]) != NULL && i < 16; i++) {
            const struct way way = {paths[p],      1 + i % 2, i / 2 % 2 ? SEQUENCES : 1,
                                    chunks[i / 4], prompts,   i % SEQUENCES};
            memset(found, 0, sizeof(found));
            way_run(&way, found);
            for (uint32_t s = 0; s < way.sequences; s++) {
                const uint32_t number = number_of(&way, s);
                cr_assert_eq(memcmp(&found[number], &wanted[number], sizeof(found[number])), 0,
                             "%s, %u threads, sequence %u of %u, chunks of %u", way.path,
                             way.threads, s, way.sequences, way.chunk);
            }
            runs++;
        }
    }
    cr_assert_geq(runs, 16u);
}

Test(kernels_forward, nothing_changes_a_bit)
{
    ways_compare(CM_TENSOR_U8S, CM_TENSOR_U8S, CM_PROMPTS_EXACT);
    ways_compare(CM_TENSOR_U5A, CM_TENSOR_U5S, CM_PROMPTS_EXACT);
}

Test(kernels_forward, nothing_changes_a_bit_with_keys_and_values_of_int8)
{
    kv_kind = CM_KV_INT8;
    ways_compare(CM_TENSOR_U8S, CM_TENSOR_U8S, CM_PROMPTS_EXACT);
    ways_compare(CM_TENSOR_BF16, CM_TENSOR_U8S, CM_PROMPTS_EXACT);
}

/* Activations are floats for some matrices and quants for others. */
Test(kernels_forward, nothing_changes_a_bit_with_bf16)
{
    ways_compare(CM_TENSOR_BF16, CM_TENSOR_BF16, CM_PROMPTS_EXACT);
    ways_compare(CM_TENSOR_BF16, CM_TENSOR_U8S, CM_PROMPTS_EXACT);
    ways_compare(CM_TENSOR_U8S, CM_TENSOR_BF16, CM_PROMPTS_EXACT);
}

static void prompts_need(void)
{
    if (cm_prompt_path_choose() == NULL) {
        cr_skip_test("this machine lacks AMX-bf16");
    }
}

Test(kernels_forward, nothing_changes_a_bit_with_prompts_in_bf16)
{
    prompts_need();
    ways_compare(CM_TENSOR_U8S, CM_TENSOR_U8S, CM_PROMPTS_BF16);
    ways_compare(CM_TENSOR_BF16, CM_TENSOR_BF16, CM_PROMPTS_BF16);
    ways_compare(CM_TENSOR_U4A, CM_TENSOR_BF16, CM_PROMPTS_BF16);
    ways_compare(CM_TENSOR_U5A, CM_TENSOR_U5S, CM_PROMPTS_BF16);
    kv_kind = CM_KV_INT8;
    ways_compare(CM_TENSOR_U8S, CM_TENSOR_U8S, CM_PROMPTS_BF16);
}

/* Sequence 0 reads its prompt in pieces of `chunk`, then replies; the others are in the middle of
 * their replies, or begin with it. */
static void mixed_run(const struct way *way, bool replies, struct outcome *ret)
{
    static float probe[SEQUENCES * 64][VOCABULARY];
    static struct sequence all[SEQUENCES];
    struct cm_step_entry entries[SEQUENCES];
    struct cm_device *device = device_open_for(way);
    sequences_open(device, all, way);
    for (uint32_t s = 1; replies && s < SEQUENCES; s++) {
        entries[0] = entry_of(&all[s], all[s].prompt, PROMPT, true);
        step(device, all + s, entries, 1);
    }
    device->probe = &probe[0][0];
    for (uint32_t at = 0, take; at < PROMPT; at += take) {
        take = PROMPT - at < way->chunk ? PROMPT - at : way->chunk;
        entries[0] = entry_of(&all[0], all[0].prompt + at, take, at + take == PROMPT);
        for (uint32_t s = 1; s < SEQUENCES; s++) {
            entries[s] = replies ? entry_of(&all[s], &all[s].next, 1, true)
                                 : entry_of(&all[s], all[s].prompt + at, take, false);
        }
        step(device, all, entries, SEQUENCES);
        memcpy(ret->logits[at], probe[device->entry_token[0]], take * sizeof(probe[0]));
    }
    device->probe = NULL;
    for (uint32_t i = 0; i < REPLY; i++) {
        ret->tokens[i] = all[0].next;
        entries[0] = entry_of(&all[0], &all[0].next, 1, true);
        step(device, all, entries, 1);
    }
    cm_device_close(device);
}

static void mixes_compare(const char *path, enum cm_prompts prompts)
{
    static struct outcome alone[SEQUENCES], found;
    const uint32_t chunks[] = {1, 7, 16, 33, 56};
    model_make();
    way_run(&(struct way){NULL, 1, 1, 64, prompts, 0}, alone);
    for (uint32_t i = 0; i < 20; i++) {
        const struct way way = {path, 1 + i / 2 % 2, SEQUENCES, chunks[i / 4], prompts, 0};
        mixed_run(&way, i % 2 == 0, &found);
        cr_assert_arr_eq(&found, &alone[0], sizeof(found), "%s, %u threads, chunks of %u, %s",
                         path != NULL ? path : "best", way.threads, way.chunk,
                         i % 2 == 0 ? "beside replies" : "beside prompts");
    }
}

Test(kernels_forward, steps_that_mix_replies_and_prompts_change_no_bit)
{
    uint32_t found = 0;
    for (size_t p = 0; p < sizeof(paths) / sizeof(paths[0]); p++) {
        if (cm_path_choose(paths[p]) != NULL) {
            mixes_compare(paths[p], CM_PROMPTS_EXACT);
            found++;
        }
    }
    cr_assert_geq(found, 1u);
}

Test(kernels_forward, steps_that_mix_replies_and_prompts_in_bf16_change_no_bit)
{
    prompts_need();
    mixes_compare(NULL, CM_PROMPTS_BF16);
}

/* After a preemption the prompt is read again as a prompt, the reply as a reply, many tokens a
 * step; the reply goes on as it would have. And the two classes differ, or this shows nothing. */
Test(kernels_forward, a_reply_that_is_computed_again_stays_exact)
{
    static struct sequence all[SEQUENCES];
    static struct outcome alone[SEQUENCES], exact[SEQUENCES];
    static uint32_t tokens[PROMPT + REPLY];
    struct cm_step_entry entry;
    prompts_need();
    model_make();
    way_run(&(struct way){NULL, 1, 1, 64, CM_PROMPTS_EXACT, 0}, exact);
    way_run(&(struct way){NULL, 1, 1, 64, CM_PROMPTS_BF16, 0}, alone);
    cr_assert_neq(memcmp(alone->logits, exact->logits, sizeof(exact->logits)), 0);
    for (uint32_t cut = 1; cut + 1 < REPLY; cut++) {
        const struct way way = {NULL, 2, 2, 64, CM_PROMPTS_BF16, 0};
        struct cm_device *device = device_open_for(&way);
        static float probe[2][64][VOCABULARY];
        sequences_open(device, all, &way);
        memcpy(tokens, all[0].prompt, sizeof(all[0].prompt));
        memcpy(tokens + PROMPT, alone->tokens, sizeof(alone->tokens));
        for (uint32_t s = 0; s < 2; s++) { /* token by token, and again at once */
            all[s].at = 0;
            entry = entry_of(&all[s], tokens, PROMPT, false);
            step(device, &all[s], &entry, 1);
            for (uint32_t at = 0, take; at <= cut; at += take) {
                take = s == 0 ? 1 : cut + 1;
                device->probe = probe[s][at];
                entry = entry_of(&all[s], tokens + PROMPT + at, take, at + take == cut + 1);
                step(device, &all[s], &entry, 1);
            }
            device->probe = NULL;
            cr_assert_eq(all[s].next, alone->tokens[cut + 1], "run %u, cut at %u", s, cut);
        }
        cr_assert_arr_eq(probe[1], probe[0], (cut + 1) * sizeof(probe[0][0]));
        cm_device_close(device);
    }
}

Test(kernels_forward, prompts_in_bf16_are_said_or_refused)
{
    const struct cm_device_options options = {.threads = 1, .prompts = CM_PROMPTS_BF16};
    struct cm_device *device = NULL;
    struct cm_device_facts facts;
    const enum cm_status status = cm_device_open("cpu", &options, &device, &err);
    if (cm_prompt_path_choose() == NULL) {
        cr_assert_eq(status, CM_E_CONFIG);
        cr_assert_str_eq(err.id, "CM-DEV-PROMPTS");
        cr_assert(strstr(err.text, "prompts: exact") != NULL, "%s", err.text);
        return;
    }
    cr_assert_eq(status, CM_OK, "%s", err.text);
    cm_device_describe(device, &facts);
    cr_assert_eq(facts.prompts, CM_PROMPTS_BF16);
    cr_assert(strstr(facts.name, "amx-bf16 prompts") != NULL, "%s", facts.name);
    cm_device_close(device);
}
