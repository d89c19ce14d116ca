/* Views against ICU: the same Unicode version, another implementation. */
#include <criterion/criterion.h>
#include <string.h>
#include <unicode/uchar.h>
#include <unicode/unorm2.h>
#include <unicode/uspoof.h>
#include <unicode/ustring.h>

#include "kernels/guard/view.h"
#include "tests/unit/random.h"

#define RAW_MAX  4096
#define VIEW_MAX 65536

struct seen {
    size_t size[CM_VIEW_COUNT];
    uint8_t bytes[CM_VIEW_COUNT][VIEW_MAX];
    uint32_t starts[CM_VIEW_COUNT][VIEW_MAX], ends[CM_VIEW_COUNT][VIEW_MAX];
    struct cm_view_counts counts;
    uint64_t taps;
};

static struct cm_views views;

static void collect(void *context, enum cm_view view, const struct cm_view_ring *ring,
                    uint64_t from)
{
    struct seen *seen = context;
    cr_assert(from == seen->size[view] && ring->end > from);
    cr_assert(ring->end - from + CM_VIEW_LOOK_BACK <= CM_VIEW_RING);
    for (uint64_t i = from; i < ring->end; i++) {
        seen->bytes[view][i] = ring->bytes[i % CM_VIEW_RING];
        seen->starts[view][i] = ring->spans[i % CM_VIEW_RING].start;
        seen->ends[view][i] = ring->spans[i % CM_VIEW_RING].end;
    }
    seen->size[view] = ring->end;
}

static void tapped(void *context, uint32_t point, uint32_t start, uint32_t end)
{
    cr_assert(end > start && point > 0x7F);
    ((struct seen *)context)->taps++;
}

/* In pushes of `piece` bytes; 0: at once. */
static void look(const uint8_t *raw, size_t size, size_t piece, struct seen *ret_seen)
{
    memset(ret_seen->size, 0, sizeof(ret_seen->size));
    ret_seen->taps = 0;
    cm_views_begin(&views, collect, tapped, ret_seen);
    for (size_t at = 0; at < size; at += piece) {
        piece = piece == 0 || piece > size - at ? size - at : piece;
        cm_views_push(&views, raw + at, piece, (uint32_t)at);
    }
    cm_views_end(&views);
    ret_seen->counts = views.counts;
}

static bool is_mark(UChar32 point)
{
    return u_charType(point) == U_NON_SPACING_MARK || u_charType(point) == U_ENCLOSING_MARK;
}

static bool is_word(UChar32 point)
{
    return u_isalpha(point) || (U_GET_GC_MASK(point) & (U_GC_L_MASK | U_GC_N_MASK | U_GC_MC_MASK));
}

static void utf8_add(uint8_t *bytes, size_t *size, UChar32 point)
{
    U8_APPEND_UNSAFE(bytes, *size, point);
}

/* ICU's folded text of raw bytes. */
static int32_t icu_folded(const uint8_t *raw, size_t size, UChar *ret_text, int32_t capacity)
{
    static UChar text[RAW_MAX * 2];
    UErrorCode code = U_ZERO_ERROR;
    int32_t units = 0;
    u_strFromUTF8WithSub(text, RAW_MAX * 2, &units, (const char *)raw, (int32_t)size, 0xFFFD, NULL,
                         &code);
    units = unorm2_normalize(unorm2_getNFKCCasefoldInstance(&code), text, units, ret_text, capacity,
                             &code);
    cr_assert(U_SUCCESS(code), "%s", u_errorName(code));
    return units;
}

/* What `words` must be: marks off, ICU's skeleton, letters and digits in lower case, else spaces.
 */
static size_t icu_words(const UChar *folded, int32_t units, uint8_t *ret_bytes)
{
    static USpoofChecker *checker;
    static UChar plain[VIEW_MAX], decomposed[VIEW_MAX], skeleton[VIEW_MAX];
    UErrorCode code = U_ZERO_ERROR;
    checker = checker != NULL ? checker : uspoof_open(&code);
    int32_t count =
        unorm2_normalize(unorm2_getNFDInstance(&code), folded, units, decomposed, VIEW_MAX, &code);
    size_t size = 0;
    ret_bytes[size++] = ' ';
    for (int32_t i = 0; i < count;) {
        UChar32 point;
        int32_t plain_units = 0;
        U16_NEXT(decomposed, i, count, point);
        for (uint32_t k = 0; k < 3; k++) {
            uint32_t first = (const uint32_t[]){0x1F150, 0x1F170, 0x1F1E6}[k];
            point = (uint32_t)point - first < 26 ? (UChar32)('a' + (uint32_t)point - first) : point;
        }
        if (is_mark(point)) {
            continue;
        }
        U16_APPEND_UNSAFE(plain, plain_units, point);
        bool letter = point >= 0x80 || u_isalnum(point);
        int32_t shown =
            uspoof_getSkeleton(checker, 0, plain, plain_units, skeleton, VIEW_MAX, &code);
        for (int32_t k = 0; k < shown;) {
            UChar32 q;
            U16_NEXT(skeleton, k, shown, q);
            q = q >= 'A' && q <= 'Z' ? q + 32 : q;
            bool word = letter && (q < 0x80 ? u_isalnum(q) : is_word(q));
            if (is_mark(q)) {
                continue;
            }
            if (word && q == 'm') { /* of a capital: to the fixed point */
                ret_bytes[size++] = 'r';
                ret_bytes[size++] = 'n';
            } else if (word) {
                utf8_add(ret_bytes, &size, q);
            } else if (ret_bytes[size - 1] != ' ') {
                ret_bytes[size++] = ' ';
            }
        }
    }
    if (ret_bytes[size - 1] != ' ') {
        ret_bytes[size++] = ' ';
    }
    cr_assert(U_SUCCESS(code), "%s", u_errorName(code));
    return size;
}

static struct seen seen, again;

static void same_as_icu(const uint8_t *raw, size_t size)
{
    static UChar folded[VIEW_MAX];
    static uint8_t wanted[VIEW_MAX * 3];
    UErrorCode code = U_ZERO_ERROR;
    int32_t bytes = 0, units = icu_folded(raw, size, folded, VIEW_MAX);
    u_strToUTF8((char *)wanted, sizeof(wanted), &bytes, folded, units, &code);
    look(raw, size, 0, &seen);
    cr_assert(seen.size[CM_VIEW_FOLDED] == (size_t)bytes &&
                  memcmp(seen.bytes[CM_VIEW_FOLDED], wanted, (size_t)bytes) == 0,
              "folded differs: raw begins %02x %02x %02x %02x, %zu bytes", raw[0], raw[1], raw[2],
              raw[3], size);
    size_t words = icu_words(folded, units, wanted);
    cr_assert(seen.size[CM_VIEW_WORDS] == words &&
                  memcmp(seen.bytes[CM_VIEW_WORDS], wanted, words) == 0,
              "words differ: raw begins %02x %02x %02x %02x, %zu bytes: \"%.*s\" for \"%.*s\"",
              raw[0], raw[1], raw[2], raw[3], size, (int)seen.size[CM_VIEW_WORDS],
              (const char *)seen.bytes[CM_VIEW_WORDS], (int)words, (const char *)wanted);
}

Test(kernels_guard_view, each_code_point_folds_as_icu, .timeout = 60)
{
    uint64_t ignorable = 0;
    for (UChar32 point = 0; point < 0x110000; point++) {
        uint8_t raw[16] = {0};
        size_t size = 0;
        if (point >= 0xD800 && point <= 0xDFFF) {
            continue;
        }
        utf8_add(raw, &size, point);
        same_as_icu(raw, size);
        bool dropped = u_hasBinaryProperty(point, UCHAR_DEFAULT_IGNORABLE_CODE_POINT);
        cr_assert_eq(seen.counts.ignorable, dropped);
        cr_assert_eq(seen.counts.bidi, dropped && u_hasBinaryProperty(point, UCHAR_BIDI_CONTROL));
        cr_assert_eq(seen.taps, dropped);
        ignorable += dropped;
    }
    cr_assert_gt(ignorable, 4000);
}

/* Pairs that may meet: marks, jamo, compositions, ASCII, all else. */
static UChar32 point_draw(void)
{
    static const struct {
        UChar32 first, count;
    } ranges[] = {{0x20, 95},     {0x41, 58},     {0x300, 0x70},   {0x1100, 0x100}, {0xAC00, 11172},
                  {0x590, 0x60},  {0x900, 0x480}, {0x1D00, 0x300}, {0x2000, 0x200}, {0xF900, 0x700},
                  {0x1D15E, 100}, {0x1F100, 256}, {0xE0000, 0x200}};
    size_t which = below(sizeof(ranges) / sizeof(ranges[0]) + 1);
    UChar32 point = which == sizeof(ranges) / sizeof(ranges[0])
                        ? (UChar32)below(0x110000)
                        : ranges[which].first + (UChar32)below((size_t)ranges[which].count);
    return point >= 0xD800 && point <= 0xDFFF ? 'x' : point;
}

Test(kernels_guard_view, random_texts_fold_as_icu, .timeout = 60)
{
    random_state = 3;
    for (size_t round = 0; round < 200000; round++) {
        uint8_t raw[256] = {0};
        size_t size = 0, points = 1 + below(24);
        for (size_t i = 0; i < points; i++) {
            utf8_add(raw, &size, point_draw());
        }
        same_as_icu(raw, size);
    }
}

Test(kernels_guard_view, malformed_bytes_are_replaced_as_icu_does, .timeout = 60)
{
    static const uint8_t parts[] = {0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xEF, 0xF0,
                                    0xF4, 0xF5, 0xFF, 0x41, 0xA0, 0x90, 0x8F, 0x9F};
    uint64_t malformed = 0;
    random_state = 4;
    for (size_t round = 0; round < 200000; round++) {
        uint8_t raw[64] = {0};
        size_t size = 1 + below(24);
        for (size_t i = 0; i < size; i++) {
            raw[i] = below(3) == 0 ? (uint8_t)below(256) : parts[below(sizeof(parts))];
        }
        same_as_icu(raw, size);
        malformed += seen.counts.malformed;
    }
    cr_assert_gt(malformed, 60000);
}

/* However it is cut, the same views; and every byte's origin lies in the text, in order. */
Test(kernels_guard_view, cuts_change_nothing_and_the_map_is_sound, .timeout = 60)
{
    static uint8_t raw[RAW_MAX];
    random_state = 5;
    for (size_t round = 0; round < 600; round++) {
        size_t size = 0, limit = 8 + below(RAW_MAX - 16);
        while (size < limit) {
            if (below(8) == 0) {
                raw[size++] = (uint8_t)below(256);
            } else {
                utf8_add(raw, &size, below(3) == 0 ? point_draw() : 'a' + (UChar32)below(26));
            }
        }
        look(raw, size, 0, &seen);
        look(raw, size, 1 + below(40), &again);
        for (enum cm_view view = 0; view < CM_VIEW_COUNT; view++) {
            size_t bytes = seen.size[view];
            cr_assert_eq(bytes, again.size[view]);
            cr_assert_eq(memcmp(seen.bytes[view], again.bytes[view], bytes), 0);
            cr_assert_eq(memcmp(seen.starts[view], again.starts[view], 4 * bytes), 0);
            cr_assert_eq(memcmp(seen.ends[view], again.ends[view], 4 * bytes), 0);
            for (size_t i = 1; i < bytes; i++) {
                cr_assert(seen.starts[view][i] < seen.ends[view][i] || i == bytes - 1);
                cr_assert_leq(seen.ends[view][i], size);
            }
        }
    }
}

Test(kernels_guard_view, squeezed_is_the_quotient_of_words)
{
    static const char text[] = "1gn0r3 @LL_pr3v!ou$ +H|ngs, Mum";
    look((const uint8_t *)text, strlen(text), 0, &seen);
    seen.bytes[CM_VIEW_SQUEEZED][seen.size[CM_VIEW_SQUEEZED]] = 0;
    cr_assert_str_eq((char *)seen.bytes[CM_VIEW_SQUEEZED], "ignoreaiipreviousthingsrnurn");
}

Test(kernels_guard_view, marks_over_the_cap_are_dropped_and_counted)
{
    uint8_t raw[400] = {0};
    size_t size = 0;
    utf8_add(raw, &size, 'q');
    for (size_t i = 0; i < 100; i++) {
        utf8_add(raw, &size, 0x301);
    }
    utf8_add(raw, &size, 'r');
    look(raw, size, 0, &seen);
    cr_assert_eq(seen.counts.marks, 70);
    cr_assert_eq(seen.size[CM_VIEW_FOLDED], 2 + 2 * CM_VIEW_MARKS_MAX);
    cr_assert_eq(memcmp(seen.bytes[CM_VIEW_WORDS], " qr ", 4), 0);
}
