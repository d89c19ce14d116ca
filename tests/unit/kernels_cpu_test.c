/* The CPU device: sampling against a slow reference, what a slot releases, and what a device
 * refuses. Its arithmetic: kernels_paths_test.c. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu_internal.h"
#include "policies/guard/rules.h"

static float uniform(void)
{
    return (float)rand() / (float)RAND_MAX * 2.0f - 1.0f;
}

static struct cm_error err;

/* ------------------------------------------------------------------ numbers */

Test(kernels_cpu, philox_known_answers)
{
    /* Random123's kat_vectors, philox4x32 with 10 rounds: zeros, ones. */
    uint32_t out[4];
    const uint32_t zeros[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    cm_philox(0, 0, out);
    cr_assert_eq(memcmp(out, zeros, sizeof(out)), 0);
}

Test(kernels_cpu, exp_is_within_two_ulp)
{
    for (float x = -86.9f; x < 88.0f; x += 0.0137f) {
        double wanted = exp((double)x);
        double error = fabs((double)cm_expf(x) - wanted) / wanted;
        cr_assert_lt(error, 2.5e-7, "exp(%g)", (double)x);
    }
}

/* Whole cache lines; they live until the test's process ends. */
static void *lines_new(size_t bytes)
{
    static void *kept[256];
    static size_t count;
    void *lines = aligned_alloc(64, (bytes + 63) / 64 * 64);
    cr_assert(lines != NULL && count < 256);
    return kept[count++] = lines;
}

/* ------------------------------------------------------------------ sampling */

static struct cm_slot *slot_new(uint32_t vocabulary)
{
    struct cm_slot *slot = lines_new(sizeof(*slot));
    memset(slot, 0, sizeof(*slot));
    slot->sampling = (struct cm_sampling){.top_p = 1.0f, .repetition_penalty = 1.0f};
    slot->generated = memset(lines_new(vocabulary * 2ul), 0, vocabulary * 2ul);
    slot->seen = memset(lines_new(vocabulary), 0, vocabulary);
    return slot;
}

/* The slow reference: sort everything, then cut. */
struct ranked {
    float weight;
    uint32_t token;
};

static int rank_compare(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    if (x->weight != y->weight) {
        return x->weight > y->weight ? -1 : 1;
    }
    return x->token < y->token ? -1 : 1;
}

static uint32_t sample_slowly(const struct cm_slot *slot, const float *logits, uint32_t n)
{
    const struct cm_sampling *s = &slot->sampling;
    struct ranked all[512];
    float greatest = -INFINITY;
    uint32_t random[4], count = n;
    for (uint32_t i = 0; i < n; i++) {
        greatest = logits[i] > greatest ? logits[i] : greatest;
    }
    for (uint32_t i = 0; i < n; i++) {
        all[i] = (struct ranked){cm_expf((logits[i] - greatest) / s->temperature), i};
    }
    bool filtered = s->top_k != 0 || s->min_p > 0 || s->top_p < 1;
    if (filtered) {
        qsort(all, n, sizeof(all[0]), rank_compare);
        count = s->top_k != 0 && s->top_k < n ? s->top_k : n;
        while (count > 0 && all[count - 1].weight < s->min_p * all[0].weight) {
            count--;
        }
        double total = 0, kept = 0;
        uint32_t keep = 0;
        for (uint32_t i = 0; i < count; i++) {
            total += (double)all[i].weight;
        }
        while (s->top_p < 1 && keep < count && kept < (double)s->top_p * total) {
            kept += (double)all[keep++].weight;
        }
        count = s->top_p < 1 ? keep : count;
    }
    double total = 0, sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        total += (double)all[i].weight;
    }
    cm_philox(s->seed, slot->drawn, random);
    double draw = ((double)random[0] + (double)random[1] * 0x1p-32) * 0x1p-32 * total;
    for (uint32_t i = 0; i < count; i++) {
        sum += (double)all[i].weight;
        if (draw < sum) {
            return all[i].token;
        }
    }
    return all[0].token;
}

Test(kernels_cpu, sampling_equals_the_slow_reference)
{
    enum { N = 300 };
    struct cm_slot *slot = slot_new(N);
    struct cm_candidate scratch[N];
    float logits[N], copy[N];
    unsigned different = 0;
    const struct cm_path *path = cm_path_choose(NULL);
    srand(2);
    for (int i = 0; i < 20000; i++) {
        for (uint32_t k = 0; k < N; k++) {
            logits[k] = uniform() * 6.0f;
        }
        slot->sampling.temperature = 0.2f + (float)(rand() % 18) / 10.0f;
        slot->sampling.top_k = rand() % 2 ? 0 : (uint32_t)(rand() % 50 + 1);
        slot->sampling.top_p = rand() % 2 ? 1.0f : (float)(rand() % 99 + 1) / 100.0f;
        slot->sampling.min_p = rand() % 2 ? 0.0f : (float)(rand() % 50) / 100.0f;
        slot->sampling.seed = (uint64_t)rand() << 32 | (uint64_t)rand();
        slot->drawn = (uint32_t)rand() % 1000;
        memcpy(copy, logits, sizeof(copy));
        uint32_t wanted = sample_slowly(slot, logits, N);
        /* Sums in another order may differ in the last bit at a border. */
        different += cm_sample(slot, path, copy, N, NULL, 0, scratch) != wanted;
    }
    cr_assert_leq(different, 2u, "%u of 20000 differ", different);
}

Test(kernels_cpu, greedy_penalties_and_masks)
{
    struct cm_slot *slot = slot_new(8);
    struct cm_candidate scratch[8];
    float logits[8] = {1, 5, 5, 3, 0, 0, 0, 0};
    const struct cm_path *path = cm_path_choose("avx2");
    const uint32_t masked[] = {1, 2};
    cr_assert_eq(cm_sample(slot, path, logits, 8, NULL, 0, scratch), 1u); /* ties: the lower id */
    cr_assert_eq(cm_sample(slot, path, logits, 8, masked, 2, scratch), 3u);
    float again[8] = {1, 5, 5, 3, 0, 0, 0, 0};
    slot->generated[1] = 3;
    slot->sampling.frequency_penalty = 0.5f;
    cr_assert_eq(cm_sample(slot, path, again, 8, NULL, 0, scratch), 2u);
    float third[8] = {1, 5, 4.9f, 3, 0, 0, 0, 0};
    slot->sampling.frequency_penalty = 0;
    slot->seen[1] = 1;
    slot->sampling.repetition_penalty = 1.5f;
    cr_assert_eq(cm_sample(slot, path, third, 8, NULL, 0, scratch), 2u);
    float fourth[8] = {-2, -1, -3, -3, -9, -9, -9, -9};
    slot->sampling.repetition_penalty = 3.0f;
    cr_assert_eq(cm_sample(slot, path, fourth, 8, NULL, 0, scratch),
                 0u); /* negative logits sink too */
    float fifth[8] = {1, 5, 4.9f, 3, 0, 0, 0, 0};
    slot->sampling.repetition_penalty = 1.0f;
    slot->sampling.presence_penalty = 0.2f;
    cr_assert_eq(cm_sample(slot, path, fifth, 8, NULL, 0, scratch), 2u);
}

/* ------------------------------------------------------------------ released bytes */

/* Feed text in pieces; returns what was released, terminated. */
static const char *release(const char *text, size_t size, size_t piece, const char *stop,
                           bool *ret_stopped)
{
    static char out[8192];
    static struct cm_slot slot;
    size_t used = 0;
    memset(&slot, 0, sizeof(slot));
    if (stop != NULL) {
        slot.stop_count = 1;
        slot.stop_bytes[0] = (uint32_t)strlen(stop);
        memcpy(slot.stops[0], stop, strlen(stop));
    }
    *ret_stopped = false;
    for (size_t at = 0; at < size && !*ret_stopped; at += piece) {
        uint32_t take = (uint32_t)(size - at < piece ? size - at : piece), bytes;
        *ret_stopped = cm_slot_release(NULL, &slot, (const uint8_t *)text + at, take,
                                       at + take == size ? CM_SLOT_TEXT_END : CM_SLOT_GOES_ON,
                                       (uint8_t *)out + used, &bytes) == CM_FINISH_STOP;
        used += bytes;
    }
    out[used] = '\0';
    return out;
}

Test(kernels_cpu, utf8_is_never_split_and_malformed_bytes_are_replaced)
{
    const char *text = "aé東🎉z";
    /* As bytes.decode("utf-8", "replace") in Python. */
    static const char *const malformed[][2] = {
        {"a\xff\xc3(\xe6\x9d", "a\xef\xbf\xbd\xef\xbf\xbd(\xef\xbf\xbd"},
        {"\xe2\x82\x41", "\xef\xbf\xbd\x41"},
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"\xf0\x9f\x8e\xe6\x9d\xb1", "\xef\xbf\xbd\xe6\x9d\xb1"},
        {"\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd"},
        {"\x80z", "\xef\xbf\xbdz"},
    };
    bool stopped;
    for (size_t piece = 1; piece <= strlen(text); piece++) {
        cr_assert_str_eq(release(text, strlen(text), piece, NULL, &stopped), text, "%zu", piece);
    }
    for (size_t piece = 1; piece <= 4; piece++) {
        for (size_t i = 0; i < sizeof(malformed) / sizeof(malformed[0]); i++) {
            cr_assert_str_eq(
                release(malformed[i][0], strlen(malformed[i][0]), piece, NULL, &stopped),
                malformed[i][1], "row %zu, pieces of %zu", i, piece);
        }
    }
    /* No release ever ends inside a character. */
    struct cm_slot slot = {.open = true};
    uint8_t out[CM_STEP_BYTES_MAX];
    uint32_t bytes;
    cm_slot_release(NULL, &slot, (const uint8_t *)"\xe6\x9d", 2, CM_SLOT_GOES_ON, out, &bytes);
    cr_assert_eq(bytes, 0u);
    cm_slot_release(NULL, &slot, (const uint8_t *)"\xb1", 1, CM_SLOT_GOES_ON, out, &bytes);
    cr_assert_eq(bytes, 3u);
}

/* All texts up to 8 bytes over 3 letters, all stops up to 3, all piece sizes: as by strstr. */
Test(kernels_cpu, stop_strings_exhaustively)
{
    char text[9], stop[4], wanted[9];
    bool stopped;
    for (int stop_size = 1; stop_size <= 3; stop_size++) {
        for (int s = 0; s < 27; s++) {
            for (int i = 0, rest = s; i < stop_size; i++, rest /= 3) {
                stop[i] = (char)('a' + rest % 3);
            }
            stop[stop_size] = '\0';
            for (int t = 0; t < 6561; t += 1 + t % 2) {
                for (int i = 0, rest = t; i < 8; i++, rest /= 3) {
                    text[i] = (char)('a' + rest % 3);
                }
                text[8] = '\0';
                const char *found = strstr(text, stop);
                snprintf(wanted, sizeof(wanted), "%.*s", found ? (int)(found - text) : 8, text);
                for (size_t piece = 1; piece <= 3; piece++) {
                    cr_assert_str_eq(release(text, 8, piece, stop, &stopped), wanted, "%s in %s",
                                     stop, text);
                    cr_assert_eq(stopped, found != NULL);
                }
            }
        }
    }
}

/* Two stops that overlap: the one complete first wins, however the bytes come. */
Test(kernels_cpu, of_two_stops_the_first_complete_wins)
{
    static const char *const rows[][4] = {/* stops, text, released */
                                          {"abcd", "bc", "xabcdz", "xa"},
                                          {"abc", "bc", "xabcz", "x"},
                                          {"abcd", "ce", "xabcez", "xab"}};
    for (size_t r = 0; r < sizeof(rows) / sizeof(rows[0]); r++) {
        for (uint32_t piece = 1; piece <= 6; piece++) {
            struct cm_slot slot = {.open = true, .stop_count = 2};
            uint8_t out[CM_STEP_BYTES_MAX + 64];
            uint32_t used = 0, bytes, size = (uint32_t)strlen(rows[r][2]);
            bool stopped = false;
            for (uint32_t s = 0; s < 2; s++) {
                slot.stop_bytes[s] = (uint32_t)strlen(rows[r][s]);
                memcpy(slot.stops[s], rows[r][s], slot.stop_bytes[s]);
            }
            for (uint32_t at = 0; at < size && !stopped; at += piece) {
                uint32_t take = size - at < piece ? size - at : piece;
                stopped = cm_slot_release(NULL, &slot, (const uint8_t *)rows[r][2] + at, take,
                                          at + take == size ? CM_SLOT_TEXT_END : CM_SLOT_GOES_ON,
                                          out + used, &bytes) == CM_FINISH_STOP;
                used += bytes;
            }
            cr_assert(stopped);
            cr_assert_eq(used, strlen(rows[r][3]), "row %zu, pieces of %u", r, piece);
            cr_assert_eq(memcmp(out, rows[r][3], used), 0);
        }
    }
}

/* ------------------------------------------------------------------ a slot with a guard */

static struct cm_guard_pack *guard_of(const char *yaml)
{
    struct cm_rules rules = {0};
    uint8_t *bytes;
    size_t size;
    bool built_in;
    struct cm_guard_pack *pack;
    cr_assert_eq(
        cm_rules_read(&rules, "test", (const uint8_t *)yaml, strlen(yaml), &built_in, &err), CM_OK,
        "%s", err.text);
    cr_assert_eq(cm_rules_compile(&rules, &bytes, &size, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_guard_pack_new(bytes, size, &pack, &err), CM_OK, "%s", err.text);
    cm_rules_free(&rules);
    free(bytes);
    return pack;
}

/* Stop strings first, then the guard, then characters; however the bytes come. */
Test(kernels_cpu, a_slot_releases_what_stops_and_rules_leave)
{
    static const struct {
        const char *text, *stop;
        enum cm_slot_end end;
        const char *released;
        enum cm_finish finish;
    } rows[] = {
        {"my key k-1234 here", NULL, CM_SLOT_TEXT_END, "my key [k] here", CM_FINISH_NONE},
        {"my key k-123", NULL, CM_SLOT_TEXT_END, "my key k-123", CM_FINISH_NONE},
        {"my key k-123", NULL, CM_SLOT_CUT, "my key ", CM_FINISH_NONE},
        {"my key k-1234", NULL, CM_SLOT_CUT, "my key [k]", CM_FINISH_NONE},
        {"my key k-12END34", "END", CM_SLOT_TEXT_END, "my key k-12", CM_FINISH_STOP},
        {"my key k-1234567", "34", CM_SLOT_TEXT_END, "my key [k]", CM_FINISH_STOP},
        {"my key k-1234567", "12", CM_SLOT_TEXT_END, "my key ", CM_FINISH_STOP},
        {"é東k-1234東\xe6\x9d", NULL, CM_SLOT_TEXT_END, "é東[k]東\xef\xbf\xbd", CM_FINISH_NONE},
        {"\xe6k-1234\x9d\xb1", NULL, CM_SLOT_TEXT_END, "\xef\xbf\xbd[k]\xef\xbf\xbd\xef\xbf\xbd",
         CM_FINISH_NONE},
        {"one\xe6 bomb two", NULL, CM_SLOT_TEXT_END, "one\xef\xbf\xbd ", CM_FINISH_FILTER},
        {"k-1234bomb", NULL, CM_SLOT_TEXT_END, "[k]", CM_FINISH_FILTER},
        {"a bomSTOPb", "STOP", CM_SLOT_TEXT_END, "a bom", CM_FINISH_STOP},
    };
    struct cm_guard_pack *guard = guard_of(
        "rules:\n  - id: key\n    class: output\n    category: test\n    pattern: 'k-[0-9]{4,}'\n"
        "    action: redact\n    replacement: '[k]'\n    positive: [a]\n    negative: [b]\n"
        "  - id: bomb\n    class: output\n    category: test\n    pattern: 'bomb'\n"
        "    action: refuse\n    positive: [a]\n    negative: [b]\n");
    static struct cm_slot slot;
    static uint8_t out[2 * CM_STEP_BYTES_MAX];
    for (size_t r = 0; r < sizeof(rows) / sizeof(rows[0]); r++) {
        for (uint32_t piece = 1; piece <= strlen(rows[r].text); piece++) {
            uint32_t used = 0, bytes, size = (uint32_t)strlen(rows[r].text);
            enum cm_finish finish = CM_FINISH_NONE;
            memset(&slot, 0, sizeof(slot));
            cm_guard_begin(&slot.guard, CM_GUARD_OUTPUT);
            slot.stop_count = rows[r].stop != NULL;
            slot.stop_bytes[0] = rows[r].stop != NULL ? (uint32_t)strlen(rows[r].stop) : 0;
            memcpy(slot.stops[0], rows[r].stop != NULL ? rows[r].stop : "", slot.stop_bytes[0]);
            for (uint32_t at = 0; at < size && finish == CM_FINISH_NONE; at += piece) {
                uint32_t take = size - at < piece ? size - at : piece;
                finish = cm_slot_release(guard, &slot, (const uint8_t *)rows[r].text + at, take,
                                         at + take == size ? rows[r].end : CM_SLOT_GOES_ON,
                                         out + used, &bytes);
                used += bytes;
            }
            out[used] = '\0';
            cr_expect_str_eq((char *)out, rows[r].released, "row %zu, pieces of %u: %s", r, piece,
                             out);
            cr_expect_eq(finish, rows[r].finish, "row %zu, pieces of %u", r, piece);
        }
    }
    cm_guard_pack_free(guard);
}

/* The most that can come out of one release fits: everything held, everything malformed. */
Test(kernels_cpu, the_longest_release_fits)
{
    struct cm_guard_pack *guard = guard_of(
        "rules:\n  - id: key\n    class: output\n    category: test\n    pattern: "
        "'(?<!\\xff)\\xff{639}k'\n"
        "    action: redact\n    replacement: '[k]'\n    positive: [a]\n    negative: [b]\n");
    static struct cm_slot slot;
    static uint8_t out[CM_STEP_BYTES_MAX];
    uint8_t bad[1024];
    uint32_t bytes;
    memset(bad, 0xff, sizeof(bad));
    memset(&slot, 0, sizeof(slot));
    cm_guard_begin(&slot.guard, CM_GUARD_OUTPUT);
    slot.stop_count = 1;
    slot.stop_bytes[0] = CM_STOP_BYTES_MAX;
    memset(slot.stops[0], 0xff, CM_STOP_BYTES_MAX);
    slot.stops[0][CM_STOP_BYTES_MAX - 1] = 'z';
    cr_assert_eq(cm_slot_release(guard, &slot, bad, 638 + 255, CM_SLOT_GOES_ON, out, &bytes),
                 CM_FINISH_NONE);
    cr_assert_eq(bytes, 0);
    cr_assert_eq(cm_slot_release(guard, &slot, bad, 1024, CM_SLOT_TEXT_END, out, &bytes),
                 CM_FINISH_NONE);
    cr_assert_eq(bytes, 3 * (638 + 255 + 1024));
    cm_guard_pack_free(guard);
}

/* ------------------------------------------------------------------ the device's refusals */

static enum cm_status copy_open(void *context, uint64_t index, const uint8_t *ciphertext,
                                size_t bytes, uint8_t *plaintext, struct cm_error *failure)
{
    (void)index;
    if (*(int *)context != 0) {
        return cm_error_set(failure, CM_E_PACKAGE, "CM-PKG-TAG", "wrong");
    }
    memcpy(plaintext, ciphertext, bytes);
    return CM_OK;
}

static const struct cm_model shape = {.vocabulary = 64,
                                      .width = 64,
                                      .layers = 1,
                                      .heads = 2,
                                      .kv_heads = 1,
                                      .head_width = 32,
                                      .rope_width = 32,
                                      .ffn_width = 64,
                                      .context_max = 64,
                                      .rope_base = 10000,
                                      .norm_epsilon = 1e-5f,
                                      .tied_head = true};

static struct cm_device *device_new(uint64_t payload, uint64_t prepared)
{
    struct cm_device *device;
    const struct cm_device_options options = {.threads = 1};
    struct cm_device_reserve reserve = {.model = &shape,
                                        .payload_bytes = payload,
                                        .segment_bytes = 4096,
                                        .slots = 2,
                                        .kv_pages = 4,
                                        .context_max = 64,
                                        .step_tokens_max = 16};
    cr_assert_eq(cm_device_open("cpu", &options, &device, &err), CM_OK, "%s", err.text);
    if (prepared > 0) {
        cm_device_prepare(device, prepared);
    }
    cr_assert_eq(cm_device_reserve(device, &reserve, &err), CM_OK, "%s", err.text);
    return device;
}

/* A head of 32: 32 × 32 quants and 32 scales of fp16 in place of 32 × 32 fp16, for K and for V. */
Test(kernels_cpu, pages_of_int8_are_half_as_large)
{
    struct cm_device *device = device_new(4096, 0);
    struct cm_device_reserve reserve = device->limits;
    uint64_t arena, page[2];
    reserve.model = &shape;
    for (uint32_t kind = 0; kind < 2; kind++) {
        reserve.kv_kind = (enum cm_kv_kind)kind;
        cr_assert_eq(cm_device_need(device, &reserve, &arena, &page[kind], &err), CM_OK);
    }
    cr_assert_eq(page[CM_KV_FP16], 2u * 32 * 32 * 2);
    cr_assert_eq(page[CM_KV_INT8], 2u * (32 * 32 + 32 * 2));
    reserve.kv_kind = CM_KV_KIND_COUNT;
    cr_assert_eq(cm_device_need(device, &reserve, &arena, &page[0], &err), CM_E_CONFIG);
    cm_device_close(device);
}

/* Too little, enough, too much, and so little that its range does not reach: the arena is the same.
 */
Test(kernels_cpu, memory_that_was_prepared_becomes_the_arena)
{
    const uint64_t mib = 1ull << 20, prepared[] = {0, 2 * mib, 64 * mib, 600 * mib, 1ull << 60};
    const uint64_t payload[] = {3 * 4096, 600 * mib};
    for (size_t k = 0; k < 2; k++) {
        struct cm_device *plain = device_new(payload[k], 0);
        for (size_t i = 0; i < sizeof(prepared) / sizeof(prepared[0]); i++) {
            struct cm_device *device = device_new(payload[k], prepared[i]);
            cr_assert_eq(device->arena_bytes, plain->arena_bytes);
            cr_assert_eq(device->arena_populated, plain->arena_bytes);
            cr_assert_eq((uintptr_t)device->arena % (2 * mib), 0u);
            memset(device->arena, 1, device->arena_bytes);
            cm_device_prepare(device, 4 * mib); /* too late: nothing happens */
            cr_assert_eq(device->arena_bytes, plain->arena_bytes);
            cm_device_close(device);
        }
        cm_device_close(plain);
    }
}

Test(kernels_cpu, loading_refuses_gaps_repeats_sizes_and_wipes_on_failure)
{
    uint8_t segment[4096];
    int fails = 0;
    const struct cm_device_cipher cipher = {copy_open, &fails};
    memset(segment, 0x5a, sizeof(segment));
    struct cm_device *device = device_new(4096 * 3, 0);
    cr_assert_eq(cm_device_segment_submit(device, &cipher, 0, segment, 4096, &err), CM_OK);
    cr_assert_eq(cm_device_load_finish(device, &err), CM_E_PACKAGE); /* two are missing */
    cr_assert_eq(device->payload[0], 0);
    cr_assert_neq(cm_device_segment_submit(device, &cipher, 1, segment, 4096, &err), CM_OK);
    cm_device_close(device);
    device = device_new(4096 * 3, 0);
    cr_assert_eq(cm_device_segment_submit(device, &cipher, 1, segment, 4096, &err), CM_OK);
    cr_assert_eq(cm_device_segment_submit(device, &cipher, 1, segment, 4096, &err), CM_E_PACKAGE);
    cr_assert_eq(device->payload[4096], 0);
    cm_device_close(device);
    device = device_new(4096 * 3, 0);
    cr_assert_eq(cm_device_segment_submit(device, &cipher, 1, segment, 4096, &err), CM_OK);
    fails = 1;
    cr_assert_eq(cm_device_segment_submit(device, &cipher, 2, segment, 4096, &err), CM_E_PACKAGE);
    for (size_t i = 0; i < 4096 * 3; i++) {
        cr_assert_eq(device->payload[i], 0, "plaintext left at %zu", i);
    }
    cm_device_close(device);
    fails = 0;
    device = device_new(4096 * 2, 0);
    cr_assert_eq(cm_device_segment_submit(device, &cipher, 1, segment, 4096, &err), CM_OK);
    cr_assert_eq(cm_device_segment_submit(device, &cipher, 0, segment, 4096, &err), CM_OK);
    cr_assert_eq(cm_device_load_finish(device, &err), CM_OK);
    cm_device_close(device);
}

Test(kernels_cpu, binding_names_the_tensor_that_is_wrong)
{
    uint8_t segment[4096] = {0};
    int fails = 0;
    const struct cm_device_cipher cipher = {copy_open, &fails};
    struct cm_device *device = device_new(4096, 0);
    static struct cm_layer layer;
    struct cm_model model = shape;
    model.layer = &layer;
    model.embedding = (struct cm_tensor){"embedding", CM_TENSOR_U8S, 64, 64, 0, 4096, 8192, 4352};
    cr_assert_eq(cm_device_segment_submit(device, &cipher, 0, segment, 4096, &err), CM_OK);
    cr_assert_eq(cm_device_model_bind(device, &model, &err), CM_E_BUG); /* not finished */
    cr_assert_eq(cm_device_load_finish(device, &err), CM_OK);
    cr_assert_eq(cm_device_model_bind(device, &model, &err), CM_E_PACKAGE);
    cr_assert_not_null(strstr(err.text, "embedding"), "%s", err.text);
    cm_device_close(device);
}

Test(kernels_cpu, opening_refuses_what_is_not_there)
{
    struct cm_device *device;
    const struct cm_device_options none = {.path = "sse9"};
    cr_assert_eq(cm_device_open("abacus", &none, &device, &err), CM_E_CONFIG);
    cr_assert_eq(cm_device_open("cpu", &none, &device, &err), CM_E_DEVICE);
}
