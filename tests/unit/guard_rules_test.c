/* The rule compiler: every built-in rule finds its samples and nothing else does; what is refused,
 * and for which reason. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/guard/guard.h"
#include "policies/guard/rules.h"

static struct cm_error err;

static struct cm_guard_pack *pack_of(struct cm_rules *rules)
{
    uint8_t *bytes;
    size_t size;
    struct cm_guard_pack *pack;
    cr_assert_eq(cm_rules_compile(rules, &bytes, &size, &err), CM_OK, "%s %s", err.id, err.text);
    cr_assert_eq(cm_guard_pack_new(bytes, size, &pack, &err), CM_OK, "%s", err.text);
    free(bytes);
    return pack;
}

/* Spans of one rule in a whole text; *ret_first: the first one. */
static uint32_t found(const struct cm_guard_pack *pack, uint16_t rule, enum cm_guard_class stage,
                      const struct cm_rules_text *text)
{
    struct cm_guard_state state;
    uint8_t out[3 * CM_RULES_SAMPLE_BYTES];
    uint32_t used = 0, count = 0;
    cm_guard_begin(&state, stage);
    if (cm_guard_feed(pack, &state, text->bytes, text->size, out, &used)) {
        (void)cm_guard_finish(pack, &state, CM_GUARD_TEXT_END, NULL, 0, out, &used);
    }
    for (uint32_t i = 0; i < state.verdict_count; i++) {
        count += state.verdicts[i].rule == rule;
    }
    return count;
}

Test(guard_rules, every_built_in_rule_finds_its_samples)
{
    struct cm_rules rules = {0};
    cr_assert_eq(cm_rules_built_in(&rules, &err), CM_OK, "%s", err.text);
    struct cm_guard_pack *pack = pack_of(&rules);
    cr_assert_geq(rules.count, 25);
    for (uint32_t i = 0; i < rules.count; i++) {
        const struct cm_rule *rule = &rules.rules[i];
        enum cm_guard_class stage = CM_GUARD_OUTPUT;
        if ((rule->classes & CM_GUARD_OUTPUT) == 0) {
            continue; /* guard_classify_test */
        }
        for (uint32_t k = 0; k < rule->positive_count; k++) {
            cr_expect_gt(found(pack, (uint16_t)i, stage, &rule->positive[k]), 0,
                         "%s does not find %s", rule->id, rule->positive[k].bytes);
        }
        for (uint32_t k = 0; k < rule->negative_count; k++) {
            cr_expect_eq(found(pack, (uint16_t)i, stage, &rule->negative[k]), 0, "%s finds %s",
                         rule->id, rule->negative[k].bytes);
        }
        cr_expect(rule->hold_bytes > 0 && rule->hold_bytes <= CM_GUARD_HOLD_MAX, "%s", rule->id);
    }
    cm_guard_pack_free(pack);
    cm_rules_free(&rules);
}

static enum cm_status compile_text(const char *text, uint8_t **ret_bytes, size_t *ret_size)
{
    struct cm_rules rules = {0};
    bool built_in;
    *ret_bytes = NULL;
    enum cm_status status =
        cm_rules_read(&rules, "rules.yaml", (const uint8_t *)text, strlen(text), &built_in, &err);
    if (status == CM_OK) {
        status = cm_rules_compile(&rules, ret_bytes, ret_size, &err);
    }
    cm_rules_free(&rules);
    return status;
}

/* A rule of this pattern, and more lines. */
static enum cm_status compile_pattern(const char *pattern, const char *more)
{
    char text[4096];
    uint8_t *bytes;
    size_t size;
    snprintf(text, sizeof(text),
             "rules:\n  - id: one\n    class: output\n    category: test\n    pattern: '%s'\n"
             "    action: redact\n    replacement: '#'\n    positive: [a]\n    negative: [b]\n%s",
             pattern, more);
    enum cm_status status = compile_text(text, &bytes, &size);
    free(bytes);
    return status;
}

Test(guard_rules, patterns_outside_the_subset_are_refused_with_their_place)
{
    static const struct {
        const char *pattern, *more, *id, *word;
    } rows[] = {
        {"ab(?=c)", "", "CM-RULES-PATTERN", "kind of group"},
        {"(a)\\1", "", "CM-RULES-PATTERN", "escape"},
        {"^ab", "", "CM-RULES-PATTERN", "anchors"},
        {"ab$", "", "CM-RULES-PATTERN", "anchors"},
        {"ab*?c", "", "CM-RULES-PATTERN", "lazy"},
        {"ab++", "", "CM-RULES-PATTERN", "possessive"},
        {"a{3,2}", "", "CM-RULES-PATTERN", "repeat must read"},
        {"a{0}", "", "CM-RULES-PATTERN", "repeat must read"},
        {"a{2000}", "", "CM-RULES-PATTERN", "1024"},
        {"[a", "", "CM-RULES-PATTERN", "not closed"},
        {"[z-a]", "", "CM-RULES-PATTERN", "backwards"},
        {"[[:alpha:]]", "", "CM-RULES-PATTERN", "named classes"},
        {"(ab", "", "CM-RULES-PATTERN", "not closed"},
        {"ab)", "", "CM-RULES-PATTERN", "goes on"},
        {"a?", "", "CM-RULES-PATTERN", "accepts nothing"},
        {"(?<!x)a|b", "", "CM-RULES-PATTERN", "group"},
        {"a|b(?!x)", "", "CM-RULES-PATTERN", "group"},
        {"a(?!xy)", "", "CM-RULES-PATTERN", "one byte or class"},
        {"\\b-a", "", "CM-RULES-PATTERN", "\\b stands"},
        {"a\\b-", "", "CM-RULES-PATTERN", "goes on"},
        {"ab", "    until: 'c?'\n", "CM-RULES-PATTERN", "accepts nothing"},
        {"ab", "    until: 'c(?!d)'\n", "CM-RULES-PATTERN", "no conditions"},
        {"ab(?!c)", "    until: 'c'\n", "CM-RULES-PATTERN", "no condition on its right"},
        /* bounds */
        {"a[bc]*d", "", "CM-RULES-HOLD", "without end"},
        {"ab+(?!b)", "", "CM-RULES-HOLD", "condition on the right"},
        {"4[0-9]+", "    validator: luhn\n", "CM-RULES-HOLD", "check digit"},
        {"a.{640}b", "", "CM-RULES-HOLD", "641 bytes"},
        {"(a{1024}){1024}", "", "CM-RULES-STATES", "2048"},
        {"[ab]*a[ab]{12}", "", "CM-RULES-STATES", "4096 states"},
        {"a{1024,}", "", "CM-RULES-HOLD", "1023 bytes"},
        {"[^]]a", "", "CM-RULES-PATTERN", "empty class"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        cr_expect_eq(compile_pattern(rows[i].pattern, rows[i].more), CM_E_CONFIG, "%s",
                     rows[i].pattern);
        cr_expect_str_eq(err.id, rows[i].id, "%s: %s", rows[i].pattern, err.text);
        cr_expect(strstr(err.text, rows[i].word) != NULL &&
                      strstr(err.text, "rules.yaml:2") != NULL && strstr(err.text, "one") != NULL,
                  "%s: %s", rows[i].pattern, err.text);
    }
    /* their neighbours are good */
    static const char *const good[] = {"ab(?!c)",         "a[bc]{0,9}d", "ab+",        "a.{639}b",
                                       "(?<!x)(a|b)",     "\\bab\\b",    "[a^-]b",     "a{640,}",
                                       "[ab]{9}a[ab]{7}", "(?i)a",       "(?:a|bc)?d", "\\x61\\."};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        cr_expect_eq(compile_pattern(good[i], ""), CM_OK, "%s: %s", good[i], err.text);
    }
}

#define HEAD "rules:\n  - id: one\n    class: output\n    category: test\n    pattern: ab\n"
#define TAIL "    positive: [ab]\n    negative: [b]\n"

Test(guard_rules, files_outside_the_schema_are_refused_with_their_line)
{
    static const char *const rows[][2] = {
        {"", "expected `rules:`"},
        {"rules: 3\n", "expected `rules:`"},
        {"rules: []\nmore: 1\n", "expected `rules:`"},
        {"rules: []\nrules: []\n", "each once"},
        {"built_in: perhaps\nrules: []\n", "built_in"},
        {"rules: [1]\n", "mapping"},
        {HEAD "    action: redact\n" TAIL, "'replacement' goes with"},
        {HEAD "    action: refuse\n    replacement: x\n" TAIL, "'replacement' goes with"},
        {HEAD "    action: refuse\n    validator: entropy\n" TAIL, "'entropy' goes with"},
        {HEAD "    action: refuse\n    entropy: 3\n" TAIL, "'entropy' goes with"},
        {HEAD "    action: refuse\n    until: c\n    validator: luhn\n" TAIL, "no validator"},
        {HEAD "    action: refuse\n    positive: [ab]\n", "without 'negative'"},
        {HEAD "    action: hide\n" TAIL, "report, redact or refuse"},
        {HEAD "    action: refuse\n    entropy: 801\n" TAIL, "entropy: hundredths"},
        {HEAD "    action: refuse\n    firm_bytes: 0\n" TAIL, "firm_bytes"},
        {HEAD "    action: refuse\n    firm_byte: xy\n" TAIL, "one printable"},
        {HEAD "    action: refuse\n    colour: red\n" TAIL, "unknown key 'colour'"},
        {HEAD "    action: refuse\n    action: refuse\n" TAIL, "twice the key 'action'"},
        {HEAD "    action: redact\n    replacement: \"\\n\"\n" TAIL, "printable ASCII"},
        {HEAD "    action: refuse\n    positive: []\n    negative: [b]\n", "list of 1 to 32"},
        {"rules:\n  - id: One\n", "1 to 47 of a-z"},
        {"rules:\n  - &a\n    id: one\n", "anchors"},
        {"rules:\n  - id: one\n    class: input\n    category: test\n    pattern: ab\n"
         "    action: redact\n    replacement: x\n" TAIL,
         "never redacted"},
        {HEAD "    action: refuse\n" TAIL "  - id: one\n    class: output\n    category: test\n"
              "    pattern: cd\n    action: refuse\n" TAIL,
         "another rule has this id"},
    };
    uint8_t *bytes;
    size_t size;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        cr_expect_eq(compile_text(rows[i][0], &bytes, &size), CM_E_CONFIG, "%s", rows[i][0]);
        cr_expect(strcmp(err.id, "CM-RULES-FORM") == 0 && strstr(err.text, rows[i][1]) != NULL &&
                      strncmp(err.text, "rules.yaml:", 11) == 0,
                  "%s: %s", rows[i][0], err.text);
    }
    cr_assert_eq(compile_text(HEAD "    action: refuse\n" TAIL, &bytes, &size), CM_OK, "%s",
                 err.text);
    free(bytes);
}

Test(guard_rules, replacements_fit_and_are_found_by_no_rule)
{
    cr_expect_eq(compile_pattern("#", ""), CM_E_CONFIG);
    cr_expect_str_eq(err.id, "CM-RULES-REPLACEMENT");
    uint8_t *bytes;
    size_t size;
    cr_expect_eq(
        compile_text(HEAD "    action: redact\n    replacement: '1234567'\n" TAIL, &bytes, &size),
        CM_E_CONFIG);
    cr_expect_str_eq(err.id, "CM-RULES-SIZE");
    cr_assert_eq(
        compile_text(HEAD "    action: redact\n    replacement: '123456'\n" TAIL, &bytes, &size),
        CM_OK, "%s", err.text);
    free(bytes);
}

Test(guard_rules, the_same_rules_compile_to_the_same_bytes)
{
    uint8_t *bytes[3];
    size_t size[3];
    for (int i = 0; i < 2; i++) {
        struct cm_rules rules = {0};
        cr_assert_eq(cm_rules_built_in(&rules, &err), CM_OK);
        cr_assert_eq(cm_rules_compile(&rules, &bytes[i], &size[i], &err), CM_OK);
        cm_rules_free(&rules);
    }
    /* Among them the pack that this build carries. */
    cr_assert_eq(cm_rules_pack("", &bytes[2], &size[2], &err), CM_OK);
    for (int i = 1; i < 3; i++) {
        cr_assert_eq(size[0], size[i]);
        cr_assert_eq(memcmp(bytes[0], bytes[i], size[0]), 0);
        free(bytes[i]);
    }
    free(bytes[0]);
}
