/* The automata against their reference, in a few seconds (`./run guard` is the long form), and what
 * no reference shows: room that runs out, packs that lie, wiping. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "tests/guard/cases.h"

static struct cm_error err;
static struct cm_guard_state state;
static uint8_t out[1 << 16];
static uint32_t used;

static uint8_t *pack_bytes(const char *yaml, size_t *ret_size)
{
    struct cm_rules rules = {0};
    uint8_t *bytes;
    bool built_in;
    cr_assert_eq(
        cm_rules_read(&rules, "test", (const uint8_t *)yaml, strlen(yaml), &built_in, &err), CM_OK,
        "%s", err.text);
    cr_assert_eq(cm_rules_compile(&rules, &bytes, ret_size, &err), CM_OK, "%s", err.text);
    cm_rules_free(&rules);
    return bytes;
}

static struct cm_guard_pack *pack_of(const char *yaml)
{
    size_t size;
    struct cm_guard_pack *pack;
    uint8_t *bytes = pack_bytes(yaml, &size);
    cr_assert_eq(cm_guard_pack_new(bytes, size, &pack, &err), CM_OK, "%s", err.text);
    free(bytes);
    return pack;
}

#define RULE(id, pattern, more)                                                                    \
    "  - id: " id "\n    class: output\n    category: test\n    pattern: '" pattern "'\n" more     \
    "    positive: [x]\n    negative: [y]\n"
#define REDACT "    action: redact\n    replacement: '#'\n"
#define REFUSE "    action: refuse\n"

static bool feed(const struct cm_guard_pack *pack, const char *text)
{
    bool open = cm_guard_feed(pack, &state, (const uint8_t *)text, strlen(text), out, &used);
    out[used] = '\0';
    return open;
}

Test(guard_filter, all_short_texts_as_by_the_reference)
{
    static struct cases cases;
    cr_assert(cases_exhaustive(&cases, 5), "%s", cases.failure);
    cr_assert_gt(cases.runs, 440000);
    cr_assert(cases.redacted > 5000 && cases.refused > 5000);
}

Test(guard_filter, random_texts_and_rules_as_by_the_reference)
{
    static struct cases cases;
    cr_assert(cases_random(&cases, 20000, 3), "%s", cases.failure);
    cr_assert(cases.redacted > 1000 && cases.refused > 1000 && cases.cut > 1000);
}

/* More candidates at once than there is room for: the reply ends before the first that found none.
 */
Test(guard_filter, too_many_candidates_end_the_reply)
{
    struct cm_guard_pack *pack =
        pack_of("rules:\n" RULE("digits", "[0-9a]{80}(?![0-9])", "    validator: luhn\n" REDACT));
    char wanted[64] = "before ";
    memset(wanted + 7, '1', CM_GUARD_CANDIDATES_MAX);
    cm_guard_begin(&state, CM_GUARD_OUTPUT);
    used = 0;
    cr_assert(feed(pack, "before "));
    bool open = true;
    for (int i = 0; i < 200 && open; i++) {
        open = feed(pack, "1");
    }
    cr_assert_not(open);
    cr_assert_str_eq((char *)out, wanted);
    cr_assert_eq(state.verdicts[0].rule, CM_GUARD_RULE_OVERFLOW);
    cr_assert_eq(state.verdicts[0].action, CM_VERDICT_REFUSE);
    cr_assert_not(cm_guard_finish(pack, &state, CM_GUARD_TEXT_END, NULL, 0, out, &used));
    cr_assert_str_eq((char *)out, wanted);
    cm_guard_pack_free(pack);
}

/* Tails that swallow each other are one candidate: no overflow, however often a key begins. */
Test(guard_filter, candidates_of_one_future_are_one)
{
    struct cm_guard_pack *pack = pack_of("rules:\n" RULE("key", "k-[a-z-]{4,}", REDACT));
    cm_guard_begin(&state, CM_GUARD_OUTPUT);
    used = 0;
    for (int i = 0; i < 500; i++) {
        cr_assert(feed(pack, "k-abc"));
    }
    cr_assert(cm_guard_finish(pack, &state, CM_GUARD_TEXT_END, NULL, 0, out, &used));
    cr_assert_eq(used, 1);
    cm_guard_pack_free(pack);
}

/* What was held is not in the state any more once the reply is over. */
Test(guard_filter, an_ended_stream_holds_no_text)
{
    static const char secret[] = "sk-held-back-bytes";
    struct cm_guard_pack *pack = pack_of("rules:\n" RULE("long", "sk-[a-z-]{60}", REDACT));
    cm_guard_begin(&state, CM_GUARD_OUTPUT);
    used = 0;
    cr_assert(feed(pack, secret));
    cr_assert(memmem(&state, sizeof(state), secret, 10) != NULL, "control");
    cr_assert(cm_guard_finish(pack, &state, CM_GUARD_CUT, NULL, 0, out, &used));
    cr_assert_eq(used, 0);
    cr_assert_null(memmem(&state, sizeof(state), secret, 10));
    cm_guard_pack_free(pack);
}

/* The stop string decides about what stands before it, and is not released. */
Test(guard_filter, a_stop_string_decides)
{
    struct cm_guard_pack *pack = pack_of(
        "rules:\n" RULE("mail", "(?<![a-z])[a-z]{1,9}@[a-z]{2}", "    firm_byte: '@'\n" REDACT));
    static const struct {
        const char *text, *stop, *wanted;
    } rows[] = {{"see joe", "\n", "see joe"},
                {"see joe", "@", "see "},
                {"see joe@", "xy", "see #"},
                {"see joe@x", "\n", "see joe@x"},
                {"see joe@xy", "z", "see #"}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        cm_guard_begin(&state, CM_GUARD_OUTPUT);
        used = 0;
        cr_assert(feed(pack, rows[i].text));
        cr_assert(cm_guard_finish(pack, &state, CM_GUARD_CUT, (const uint8_t *)rows[i].stop,
                                  strlen(rows[i].stop), out, &used));
        out[used] = '\0';
        cr_assert_str_eq((char *)out, rows[i].wanted, "%s before %s", rows[i].text, rows[i].stop);
    }
    cm_guard_pack_free(pack);
}

/* A pack of one wrong bit is refused, or runs within its bounds: nothing else under sanitizers. */
Test(guard_filter, damaged_packs_do_no_harm)
{
    size_t size;
    uint8_t *good = pack_bytes(
        "rules:\n" RULE("one", "ab[cd]{2,9}e", REDACT) RULE("two", "[xy]{3}z+", REFUSE), &size);
    uint8_t *bad = malloc(size);
    static const char text[] = "abcdcdcdcdcdcdeabcdcde xyxzzz ab";
    uint32_t refused = 0;
    struct cm_guard_pack *pack;
    for (size_t cut = 0; cut < size; cut++) {
        cr_assert_eq(cm_guard_pack_new(good, cut, &pack, &err), CM_E_CONFIG, "cut at %zu", cut);
    }
    for (size_t at = 0; at < size * 8; at++) {
        memcpy(bad, good, size);
        bad[at / 8] ^= (uint8_t)(1 << (at % 8));
        if (cm_guard_pack_new(bad, size, &pack, &err) != CM_OK) {
            refused++;
            continue;
        }
        cm_guard_begin(&state, CM_GUARD_OUTPUT);
        used = 0;
        for (int i = 0; i < 40; i++) {
            used = 0;
            (void)feed(pack, text);
        }
        cm_guard_begin(&state, CM_GUARD_OUTPUT);
        for (const char *byte = text; *byte != '\0'; byte++) { /* each is decided at once */
            used = 0;
            (void)feed(pack, (char[]){*byte, '\0'});
        }
        used = 0;
        (void)!cm_guard_finish(pack, &state, CM_GUARD_TEXT_END, NULL, 0, out, &used);
        cm_guard_pack_free(pack);
    }
    cr_assert_gt(refused, 100);
    free(bad);
    free(good);
}

/* A replacement has room because the shortest span is known: one that is shorter ends the reply. */
Test(guard_filter, a_span_shorter_than_its_rule_says_ends_the_reply)
{
    const size_t room = CM_GUARD_REPLACEMENT_MAX;
    size_t size;
    struct cm_guard_pack *pack;
    uint8_t *bytes = pack_bytes(
        "rules:\n" RULE("one", "abc", "    action: redact\n    replacement: '@#@'\n"), &size);
    uint8_t *replacement = memmem(bytes, size, "@#@", 3);
    cr_assert_not_null(replacement);
    memset(replacement, '@', room);
    replacement[room] =
        (uint8_t)room; /* its bytes; 24 bytes further on the least bytes of a span */
    cr_assert_eq(replacement[room + 24], 3, "control: least bytes");
    replacement[room + 24] = (uint8_t)room;
    cr_assert_eq(cm_guard_pack_new(bytes, size, &pack, &err), CM_OK, "%s", err.text);
    cm_guard_begin(&state, CM_GUARD_OUTPUT);
    used = 0;
    cr_assert_not(feed(pack, "xyabc."));
    cr_assert_leq(used, CM_GUARD_OUT_BYTES(6));
    cr_assert_str_eq((char *)out, "xy");
    cm_guard_pack_free(pack);
    free(bytes);
}

/* ------------------------------------------------------------------ a text that is gone on from */

/* What of text[from, size) may leave, by the spans that the reference finds in the whole text. */
static void wanted_after(const struct reference_result *whole, const char *text, size_t from,
                         char *ret)
{
    bool inside = false;
    for (size_t at = from; text[at] != '\0'; at++) {
        bool forbidden = false;
        for (uint32_t i = 0; i < whole->verdict_count; i++) {
            forbidden =
                forbidden || (whole->verdicts[i].start <= at && at < whole->verdicts[i].end);
        }
        if (!forbidden || !inside) {
            *ret++ = forbidden ? '#' : text[at];
        }
        inside = forbidden;
    }
    *ret = '\0';
}

/* All texts of up to seven bytes, cut anywhere into what stands before and the reply. */
Test(guard_filter, a_span_may_begin_in_what_stands_before)
{
    static const char yaml[] = "rules:\n" RULE("one", "k[ab]{2,}", REDACT)
        RULE("two", "(?<!a)bb(?!k)", REDACT) RULE("three", "ab{2}k", REDACT);
    static struct reference_result whole;
    struct cm_rules rules = {0};
    struct cm_guard_pack *pack = pack_of(yaml);
    uint8_t *bytes;
    size_t size;
    bool built_in;
    uint32_t reaching = 0;
    cr_assert_eq(
        cm_rules_read(&rules, "test", (const uint8_t *)yaml, strlen(yaml), &built_in, &err), CM_OK);
    cr_assert_eq(cm_rules_compile(&rules, &bytes, &size, &err), CM_OK);
    struct reference *reference = reference_new(&rules);
    for (uint32_t number = 0; number < 2187; number++) {
        char text[8] = "", wanted[16];
        uint32_t rest = number;
        for (int i = 0; i < 7; i++, rest /= 3) {
            text[i] = "abk"[rest % 3];
        }
        reference_run(reference, (const uint8_t *)text, 7, false, NULL, 0, &whole);
        for (size_t from = 0; from <= 7; from++) {
            wanted_after(&whole, text, from, wanted);
            for (int follow = 1; follow >= 0; follow--) {
                cm_guard_begin(&state, CM_GUARD_OUTPUT);
                if (follow) {
                    cm_guard_follow(pack, &state, (const uint8_t *)text, from);
                }
                used = 0;
                for (size_t at = from; at < 7; at++) {
                    cr_assert(feed(pack, (char[]){text[at], '\0'}));
                }
                cr_assert(cm_guard_finish(pack, &state, CM_GUARD_TEXT_END, NULL, 0, out, &used));
                out[used] = '\0';
                if (follow) {
                    cr_assert_str_eq((char *)out, wanted, "%s from %zu", text, from);
                }
            }
            reaching += strcmp((char *)out, wanted) != 0;
        }
    }
    cr_assert_gt(reaching, 1000, "control: without what stands before, other bytes leave");
    reference_free(reference);
    cm_guard_pack_free(pack);
    cm_rules_free(&rules);
    free(bytes);
}

/* A refuse rule, a validator, a cut, and more beginnings than there is room for. */
Test(guard_filter, what_stands_before_refuses_holds_and_overflows)
{
    static const struct {
        const char *before, *text, *wanted;
        bool cut, open;
    } rows[] = {
        {"a bo", "mb x", "", false, false},
        {"a bomb", " x", " x", false, true},
        {"4111 1111 1111 1", "111 x", "# x", false, true},
        {"4111 1111 1111 1", "112 x", "112 x", false, true},
        {"k-12", "3", "", true, true},
        {"k-12", "3", "3", false, true},
        {"k-1234", "56 x", "# x", false, true},
        {"k-1234", " x", " x", true, true},
    };
    struct cm_guard_pack *pack =
        pack_of("rules:\n" RULE("bomb", "bomb", REFUSE) RULE("key", "k-[0-9]{4,}", REDACT)
                    RULE("card", "4[0-9]{3}( [0-9]{4}){3}", "    validator: luhn\n" REDACT));
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        cm_guard_begin(&state, CM_GUARD_OUTPUT);
        cm_guard_follow(pack, &state, (const uint8_t *)rows[i].before, strlen(rows[i].before));
        used = 0;
        bool open = feed(pack, rows[i].text) &&
                    cm_guard_finish(pack, &state, rows[i].cut ? CM_GUARD_CUT : CM_GUARD_TEXT_END,
                                    NULL, 0, out, &used);
        out[used] = '\0';
        cr_expect_str_eq((char *)out, rows[i].wanted, "row %zu: %s", i, out);
        cr_expect_eq(open, rows[i].open, "row %zu", i);
    }
    cm_guard_pack_free(pack);
    pack =
        pack_of("rules:\n" RULE("digits", "[0-9a]{80}(?![0-9])", "    validator: luhn\n" REDACT));
    char before[CM_GUARD_HELD_MAX];
    memset(before, '1', sizeof(before));
    cm_guard_begin(&state, CM_GUARD_OUTPUT);
    cm_guard_follow(pack, &state, (const uint8_t *)before, sizeof(before));
    used = 0;
    cr_assert(!feed(pack, "x y") && used == 0);
    cr_assert_eq(state.verdicts[0].rule, CM_GUARD_RULE_OVERFLOW);
    cm_guard_pack_free(pack);
}
