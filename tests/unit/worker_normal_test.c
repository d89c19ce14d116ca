/* Form C beside ICU's: each code point, each pair that meets, random texts, hostile runs. The
 * tables are of the version of `tokenizers`' form C, Unicode 9: what came later is left to it
 * (tests/e2e/test_tokenizer.py). */
#include <criterion/criterion.h>
#include <string.h>
#include <time.h>
#include <unicode/uchar.h>
#include <unicode/unorm2.h>
#include <unicode/ustring.h>
#include <unicode/utf8.h>

#include "runtime/worker/normal.h"
#include "runtime/worker/split.h"
#include "tests/unit/random.h"

#define TEXT_MAX 4096

static struct cm_normalizer *normalizer_of(size_t bytes)
{
    struct cm_normalizer *made = NULL;
    struct cm_error err;
    cr_assert_eq(cm_normalizer_new(bytes, &made, &err), CM_OK);
    return made;
}

static void same_as_icu(struct cm_normalizer *normalizer, const UChar32 *points, size_t count)
{
    static uint8_t text[TEXT_MAX], wanted[3 * TEXT_MAX];
    static UChar units[TEXT_MAX], made[4 * TEXT_MAX];
    UErrorCode code = U_ZERO_ERROR;
    int32_t bytes = 0, unit_count, made_count, wanted_bytes;
    for (size_t i = 0; i < count; i++) {
        U8_APPEND_UNSAFE(text, bytes, points[i]);
    }
    u_strFromUTF8(units, TEXT_MAX, &unit_count, (const char *)text, bytes, &code);
    made_count = unorm2_normalize(unorm2_getNFCInstance(&code), units, unit_count, made,
                                  4 * TEXT_MAX, &code);
    u_strToUTF8((char *)wanted, sizeof(wanted), &wanted_bytes, made, made_count, &code);
    cr_assert(U_SUCCESS(code));
    size_t size;
    const uint8_t *found = cm_normalizer_run(normalizer, text, (size_t)bytes, &size);
    cr_assert(size == (size_t)wanted_bytes && memcmp(found, wanted, size) == 0,
              "%zu points, the first U+%04X, the last U+%04X", count, (unsigned)points[0],
              (unsigned)points[count - 1]);
}

static bool known(UChar32 point)
{
    UVersionInfo age;
    u_charAge(point, age);
    return point > 0 && !U_IS_SURROGATE(point) && age[0] > 0 && age[0] <= 9;
}

Test(worker_normal, each_code_point_is_as_icu_makes_it, .timeout = 120)
{
    struct cm_normalizer *normalizer = normalizer_of(TEXT_MAX);
    for (UChar32 point = 1; point < 0x110000; point++) {
        const UChar32 alone[] = {point}, within[] = {'a', point, 0x301, 0x327, point, 0x1161};
        if (known(point)) {
            same_as_icu(normalizer, alone, 1);
            same_as_icu(normalizer, within, 6);
        }
    }
    cm_normalizer_free(normalizer);
}

/* Each that decomposes or combines beside each other that composes. */
Test(worker_normal, pairs_are_as_icu_makes_them, .timeout = 240)
{
    struct cm_normalizer *normalizer = normalizer_of(TEXT_MAX);
    for (uint32_t i = 0; i < cm_canonical_count; i++) {
        for (uint32_t k = 0; k < cm_combining_range_count; k++) {
            const UChar32 mark = (UChar32)cm_combining_ranges[k].first;
            const UChar32 whole = (UChar32)cm_canonical[i].composed;
            const UChar32 front[] = {whole, mark}, back[] = {mark, whole, mark};
            if (known(mark) && known(whole)) {
                same_as_icu(normalizer, front, 2);
                same_as_icu(normalizer, back, 3);
            }
        }
    }
    for (uint32_t i = 0; i < cm_unicode_pair_count; i++) {
        const struct cm_unicode_pair *pair = &cm_unicode_pairs[i];
        const UChar32 parts[] = {(UChar32)pair->first, (UChar32)pair->second, 0x300, 0x345};
        const UChar32 apart[] = {(UChar32)pair->first, 0x327, (UChar32)pair->second};
        if (known(parts[0]) && known(parts[1]) && known((UChar32)pair->composed)) {
            same_as_icu(normalizer, parts, 4);
            same_as_icu(normalizer, apart, 3);
        }
    }
    cm_normalizer_free(normalizer);
}

/* U+11938 is of Unicode 13: its parts were nothing to compose before. */
Test(worker_normal, what_a_later_version_composes_stays_apart)
{
    static const uint8_t parts[] = "\xf0\x91\xa4\xb5\xf0\x91\xa4\xb0";
    struct cm_normalizer *normalizer = normalizer_of(TEXT_MAX);
    size_t size;
    const uint8_t *found = cm_normalizer_run(normalizer, parts, sizeof(parts) - 1, &size);
    cr_assert(size == sizeof(parts) - 1 && memcmp(found, parts, size) == 0);
    cm_normalizer_free(normalizer);
}

Test(worker_normal, random_texts_are_as_icu_makes_them, .timeout = 120)
{
    struct cm_normalizer *normalizer = normalizer_of(TEXT_MAX);
    random_state = 11;
    for (uint32_t round = 0; round < 200000; round++) {
        UChar32 points[40];
        size_t count = 1 + below(40);
        for (size_t i = 0; i < count;) {
            const uint32_t roll = (uint32_t)below(UINT32_MAX);
            const struct cm_character_range *mark =
                &cm_combining_ranges[(roll >> 8) % cm_combining_range_count];
            const struct cm_unicode_pair *pair = &cm_canonical[(roll >> 8) % cm_canonical_count];
            const UChar32 choices[] = {
                (UChar32)(mark->first + (roll >> 20) % (mark->last - mark->first + 1)),
                (UChar32)pair->first,
                (UChar32)pair->second,
                (UChar32)pair->composed,
                (UChar32)(0x1100 + (roll >> 8) % 0x100),
                (UChar32)(0xac00 + (roll >> 8) % 11172),
                (UChar32)('a' + (roll >> 8) % 26),
                (UChar32)((roll >> 8) % 0x110000)};
            points[i] = choices[roll % 8];
            i += known(points[i]);
        }
        same_as_icu(normalizer, points, count);
    }
    cm_normalizer_free(normalizer);
}

/* A run of marks as long as the text, all classes mixed: in order, and in proportion to its length.
 */
Test(worker_normal, a_run_of_marks_costs_no_square, .timeout = 60)
{
    const size_t bytes = 1 << 20;
    struct cm_normalizer *normalizer = normalizer_of(bytes);
    uint8_t *text = malloc(bytes);
    size_t size, at = 0, i = 0;
    while (at + 4 <= bytes) {
        const struct cm_character_range *mark =
            &cm_combining_ranges[i++ % cm_combining_range_count];
        U8_APPEND_UNSAFE(text, at, mark->first);
    }
    const clock_t begun = clock();
    const uint8_t *made = cm_normalizer_run(normalizer, text, at, &size);
    cr_assert_lt(clock() - begun, 2 * CLOCKS_PER_SEC);
    uint32_t last = 0, class = 0;
    for (size_t k = 0, step; k < size; k += step, last = class) {
        class = cm_character_find(cm_combining_ranges, cm_combining_range_count,
                                  cm_point_read(made + k, size - k, &step));
        cr_assert(class >= last && class > 0);
    }
    free(text);
    cm_normalizer_free(normalizer);
}

Test(worker_normal, plain_text_stays_where_it_is)
{
    struct cm_normalizer *normalizer = normalizer_of(64);
    const uint8_t text[] = "naïve Ærøskøbing ʒ";
    size_t size;
    cr_assert_eq(cm_normalizer_run(normalizer, text, sizeof(text) - 1, &size), text);
    cr_assert_eq(size, sizeof(text) - 1);
    cm_normalizer_free(normalizer);
}
