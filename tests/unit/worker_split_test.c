/* Splits: SmolLM's by its definition over GPT-2's, and none that costs a square. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "runtime/worker/split.h"
#include "runtime/worker/tokenizer.h"
#include "tests/unit/random.h"

#define LONG_BYTES (8u << 20) /* body_bytes_max can be no more */

static const uint32_t splits[] = {CM_SPLIT_SMOLLM, CM_SPLIT_GPT2,   CM_SPLIT_QWEN2,
                                  CM_SPLIT_LLAMA3, CM_SPLIT_TEKKEN, CM_SPLIT_GPT4O};

static size_t first_number(const uint8_t *text, size_t size, size_t *ret_bytes)
{
    size_t at = 0;
    while (at < size && cm_character_kind(cm_point_read(text + at, size - at, ret_bytes)) !=
                            CM_CHARACTER_NUMBER) {
        at += *ret_bytes;
    }
    return at;
}

/* Numbers are cut off one by one; what stands between them is split as by GPT-2. */
static size_t smollm_next(const uint8_t *text, size_t size)
{
    size_t bytes, plain = first_number(text, size, &bytes);
    return plain == 0 ? bytes : cm_split_next(CM_SPLIT_GPT2, text, plain);
}

Test(worker_split, smollms_is_gpt2s_between_numbers, .timeout = 60)
{
    static const char *const parts[] = {"a",  "B",      "é", "你", " ", " ",  "  ", "\n",
                                        "\t", "\u00a0", "7", "42", "½", "'s", "'",  "!?"};
    random_state = 11;
    for (uint32_t round = 0; round < 200000; round++) {
        uint8_t text[64];
        size_t size = 0;
        for (size_t count = 1 + below(12); count > 0; count--) {
            const char *part = parts[below(sizeof(parts) / sizeof(parts[0]))];
            memcpy(text + size, part, strlen(part));
            size += strlen(part);
        }
        for (size_t at = 0, next; at < size; at += next) {
            next = cm_split_next(CM_SPLIT_SMOLLM, text + at, size - at);
            cr_assert_eq(next, smollm_next(text + at, size - at), "round %u, at %zu of '%.*s'",
                         round, at, (int)size, text);
        }
    }
}

static uint8_t *long_text(const char *unit)
{
    uint8_t *text = malloc(LONG_BYTES);
    cr_assert_not_null(text);
    for (size_t i = 0; i < LONG_BYTES; i++) {
        text[i] = (uint8_t)unit[i % strlen(unit)];
    }
    return text;
}

/* As long as a request can be, without what would end a search early. */
Test(worker_split, no_text_costs_a_square, .timeout = 120)
{
    static const char *const units[] = {
        "words without numbers, ", "a", " ", "\n ", "!", "1", "A", "你A", "\u0301A", "AAé"};
    for (size_t u = 0; u < sizeof(units) / sizeof(units[0]); u++) {
        uint8_t *text = long_text(units[u]);
        for (size_t s = 0; s < sizeof(splits) / sizeof(splits[0]); s++) {
            const clock_t begun = clock();
            for (size_t at = 0, pieces = 0; at < LONG_BYTES; pieces++) {
                at += cm_split_next(splits[s], text + at, LONG_BYTES - at);
                cr_assert(pieces % 1024 != 0 || clock() - begun < 10 * CLOCKS_PER_SEC,
                          "split %u of '%s'", splits[s], units[u]);
            }
        }
        free(text);
    }
}

/* A piece longer than what is encoded at once is found once, not again behind each cut. */
Test(worker_split, one_long_piece_costs_no_square, .timeout = 120)
{
    const uint32_t offsets[] = {0, 1};
    const uint8_t types[] = {CM_TOKEN_NORMAL};
    const struct cm_manifest manifest = {.tokenizer = CM_TOKENIZER_BYTE_BPE,
                                         .split = CM_SPLIT_GPT2,
                                         .vocabulary = 1,
                                         .token_offsets = offsets,
                                         .token_bytes = (const uint8_t *)"a",
                                         .token_types = types};
    struct cm_tokenizer *tokenizer;
    struct cm_error err;
    struct cm_token_list list = {.capacity = 0};
    uint8_t *text = long_text("a");
    cr_assert_eq(cm_tokenizer_new(&manifest, LONG_BYTES, &tokenizer, &err), CM_OK, "%s", err.text);
    const clock_t begun = clock();
    cm_tokenizer_text(tokenizer, text, LONG_BYTES, &list);
    const clock_t took = clock() - begun;
    cr_assert_eq(list.count, LONG_BYTES);
    cr_assert_lt(took, 2 * CLOCKS_PER_SEC, "%.1f s", (double)took / CLOCKS_PER_SEC);
    cm_tokenizer_free(tokenizer);
    free(text);
}
