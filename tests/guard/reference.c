/* Whole texts, PCRE2, and no automaton of ours. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tests/guard/reference.h"

#include <math.h>
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ENDS_MAX  1024
#define WORKSPACE 20000

struct reference_rule {
    const struct cm_rule *rule;
    pcre2_code *whole; /* as written */
    pcre2_code *open;  /* without the condition on the right: can it go on? */
    pcre2_code *until;
};

struct reference {
    uint32_t count;
    struct reference_rule *rules;
    pcre2_match_data *match;
    int *workspace;
};

static pcre2_code *compile(const uint8_t *pattern, size_t size)
{
    int number;
    PCRE2_SIZE at;
    pcre2_code *code = pcre2_compile(
        pattern, size, PCRE2_ANCHORED | PCRE2_NO_AUTO_POSSESS | PCRE2_NO_START_OPTIMIZE, &number,
        &at, NULL);
    if (code == NULL) {
        PCRE2_UCHAR text[200];
        pcre2_get_error_message(number, text, sizeof(text));
        fprintf(stderr, "PCRE2 refuses %.*s at %zu: %s\n", (int)size, pattern, at, text);
        abort();
    }
    return code;
}

/* Bytes of the pattern before its condition on the right. */
static size_t open_size(const struct cm_rules_text *pattern)
{
    const char *text = (const char *)pattern->bytes;
    size_t size = pattern->size;
    for (size_t at = size; at-- > 0;) {
        if (size - at >= 3 && memcmp(text + at, "(?!", 3) == 0) {
            return at;
        }
    }
    return size >= 2 && memcmp(text + size - 2, "\\b", 2) == 0 ? size - 2 : size;
}

struct reference *reference_new(const struct cm_rules *rules)
{
    struct reference *reference = calloc(1, sizeof(*reference));
    reference->rules = calloc(rules->count, sizeof(*reference->rules));
    reference->count = rules->count;
    reference->match = pcre2_match_data_create(ENDS_MAX, NULL);
    reference->workspace = calloc(WORKSPACE, sizeof(int));
    for (uint32_t i = 0; i < rules->count; i++) {
        struct reference_rule *to = &reference->rules[i];
        to->rule = &rules->rules[i];
        to->whole = compile(to->rule->pattern.bytes, to->rule->pattern.size);
        to->open = compile(to->rule->pattern.bytes, open_size(&to->rule->pattern));
        if (to->rule->until.size > 0) {
            to->until = compile(to->rule->until.bytes, to->rule->until.size);
        }
    }
    return reference;
}

void reference_free(struct reference *reference)
{
    for (uint32_t i = 0; i < reference->count; i++) {
        pcre2_code_free(reference->rules[i].whole);
        pcre2_code_free(reference->rules[i].open);
        pcre2_code_free(reference->rules[i].until);
    }
    pcre2_match_data_free(reference->match);
    free(reference->workspace);
    free(reference->rules);
    free(reference);
}

static int run(const struct reference *r, const pcre2_code *code, const uint8_t *text, size_t size,
               size_t start, uint32_t options)
{
    return pcre2_dfa_match(code, text, size, start, options | PCRE2_ANCHORED, r->match, NULL,
                           r->workspace, WORKSPACE);
}

/* ------------------------------------------------------------------ validators, otherwise */

static bool luhn(const uint8_t *text, size_t size)
{
    int digits[64], count = 0, sum = 0;
    for (size_t i = 0; i < size; i++) {
        if (text[i] >= '0' && text[i] <= '9') {
            digits[count++] = text[i] - '0';
        }
    }
    for (int i = 0; i < count; i++) {
        int twice = 2 * digits[i];
        sum += (count - i) % 2 == 0 ? twice / 10 + twice % 10 : digits[i];
    }
    return count > 1 && sum % 10 == 0;
}

static bool iban(const uint8_t *text, size_t size)
{
    static const struct {
        const char *country;
        size_t length;
    } known[] = {{"DE", 22}, {"GB", 22}, {"NL", 18}, {"FR", 27}, {"ES", 24}, {"NO", 15}};
    char plain[128], number[300];
    size_t count = 0, used = 0;
    for (size_t i = 0; i < size && count < sizeof(plain); i++) {
        uint8_t upper = text[i] >= 'a' && text[i] <= 'z' ? text[i] - 32 : text[i];
        if ((upper >= 'A' && upper <= 'Z') || (upper >= '0' && upper <= '9')) {
            plain[count++] = (char)upper;
        }
    }
    bool length = false;
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        length = length || (count == known[i].length && memcmp(plain, known[i].country, 2) == 0);
    }
    if (!length) {
        return false;
    }
    for (size_t i = 0; i < count;
         i++) { /* the number as decimal text, then nine digits at a time */
        char c = plain[(i + 4) % count];
        used += (size_t)sprintf(number + used, "%d", c >= 'A' ? c - 'A' + 10 : c - '0');
    }
    unsigned long rest = 0;
    for (size_t at = 0; at < used; at += 7) {
        char part[32];
        snprintf(part, sizeof(part), "%lu%.7s", rest, number + at);
        rest = strtoul(part, NULL, 10) % 97;
    }
    return rest == 1;
}

static bool entropy(const uint8_t *text, size_t size, uint32_t floor_hundredths)
{
    double bits = 0;
    for (int byte = 0; byte < 256; byte++) {
        double count = 0;
        for (size_t i = 0; i < size; i++) {
            count += text[i] == byte;
        }
        bits -= count > 0 ? count / (double)size * log2(count / (double)size) : 0;
    }
    return bits * 100 >= floor_hundredths;
}

static bool valid(const struct cm_rule *rule, const uint8_t *text, size_t size)
{
    switch (rule->validator) {
    case CM_GUARD_VALID_LUHN:
        return luhn(text, size);
    case CM_GUARD_VALID_IBAN:
        return iban(text, size);
    case CM_GUARD_VALID_ENTROPY:
        return entropy(text, size, rule->argument);
    default:
        return true;
    }
}

/* ------------------------------------------------------------------ spans */

/* First end of the `until` pattern at or behind `from`; size if there is none. */
static size_t until_end(const struct reference *r, const struct reference_rule *rule,
                        const uint8_t *text, size_t size, size_t from)
{
    size_t best = size;
    for (size_t start = from; start < best; start++) {
        int ends = run(r, rule->until, text, size, start, 0);
        size_t end = ends > 0 ? pcre2_get_ovector_pointer(r->match)[2 * ends - 1] : size;
        best = end < best ? end : best;
    }
    return best;
}

/* End of the span that starts here; 0: none. *ret_dead: the rule has given this start up. */
static size_t span_end(const struct reference *r, const struct reference_rule *rule,
                       const uint8_t *text, size_t size, size_t start, bool *ret_dead)
{
    int ends = run(r, rule->whole, text, size, start, 0);
    const PCRE2_SIZE *vector = pcre2_get_ovector_pointer(r->match);
    *ret_dead = false;
    if (ends == 0) {
        abort(); /* more ends than ENDS_MAX */
    }
    if (ends < 0) {
        return 0;
    }
    if (rule->until != NULL) {
        return until_end(r, rule, text, size, vector[2 * ends - 1]);
    }
    if (rule->rule->validator == CM_GUARD_VALID_ENTROPY) { /* asked of the shortest */
        *ret_dead = !valid(rule->rule, text + start, vector[2 * ends - 1] - start);
        return *ret_dead ? 0 : vector[1];
    }
    for (int i = 0; i < ends; i++) { /* longest first */
        if (valid(rule->rule, text + start, vector[2 * i + 1] - start)) {
            return vector[2 * i + 1];
        }
    }
    return 0;
}

/* Could more text make the span that starts here longer, or begin one? */
static bool goes_on(const struct reference *r, const struct reference_rule *rule,
                    const uint8_t *text, size_t size, size_t start)
{
    /* `until`: once the shortest beginning is there, as long as its end has not come */
    int ends = rule->until != NULL ? run(r, rule->whole, text, size, start, 0) : -1;
    if (ends > 0) {
        size_t from = pcre2_get_ovector_pointer(r->match)[2 * ends - 1];
        for (size_t at = from; at < size; at++) {
            if (run(r, rule->until, text, size, at, 0) > 0) {
                return false;
            }
        }
        return true;
    }
    return run(r, rule->open, text, size, start, PCRE2_PARTIAL_HARD) == PCRE2_ERROR_PARTIAL;
}

static bool firm(const struct cm_rule *rule, const uint8_t *text, size_t size)
{
    return size >= rule->trigger_bytes &&
           (size >= rule->firm_bytes ||
            (rule->firm_byte != 0 && memchr(text, rule->firm_byte, size) != NULL));
}

struct marks {
    bool forbidden[REFERENCE_TEXT_MAX + 512];
    int starter[REFERENCE_TEXT_MAX + 512]; /* rule + 1 */
    size_t refused, hold;
};

static void verdict_add(struct reference_result *ret, uint32_t rule, size_t start, size_t end)
{
    struct reference_verdict *last =
        &ret->verdicts[ret->verdict_count > 0 ? ret->verdict_count - 1 : 0];
    if (ret->verdict_count > 0 && last->rule == rule && start <= last->end) {
        last->end = end > last->end ? end : last->end;
        return;
    }
    if (ret->verdict_count == REFERENCE_VERDICTS_MAX) {
        abort();
    }
    ret->verdicts[ret->verdict_count++] = (struct reference_verdict){rule, start, end};
}

static void rule_run(const struct reference *r, uint32_t index, const uint8_t *text, size_t size,
                     bool cut, struct marks *marks, struct reference_result *ret)
{
    const struct reference_rule *rule = &r->rules[index];
    bool report = rule->rule->action == CM_VERDICT_REPORT;
    for (size_t start = 0; start < size; start++) {
        bool dead;
        size_t end = span_end(r, rule, text, size, start, &dead);
        if (end > 0) {
            verdict_add(ret, index, start, end);
        }
        if (end > 0 && !report) {
            for (size_t at = start; at < end; at++) {
                marks->forbidden[at] = true;
            }
            marks->starter[start] =
                marks->starter[start] == 0 ? (int)index + 1 : marks->starter[start];
            if (rule->rule->action == CM_VERDICT_REFUSE && start < marks->refused) {
                marks->refused = start;
            }
        }
        size_t from = end > 0 ? end : start;
        if (cut && !report && !dead && from < marks->hold &&
            (end > 0 || firm(rule->rule, text + start, size - start)) &&
            goes_on(r, rule, text, size, start)) {
            marks->hold = from;
        }
    }
}

void reference_run(const struct reference *r, const uint8_t *text, size_t size, bool cut,
                   const uint8_t *unseen, size_t unseen_size, struct reference_result *ret)
{
    static struct marks marks;
    static uint8_t whole[REFERENCE_TEXT_MAX + 512];
    size_t total = size + unseen_size;
    memset(&marks, 0, sizeof(marks));
    marks.refused = marks.hold = SIZE_MAX;
    memcpy(whole, text, size);
    if (unseen_size > 0) {
        memcpy(whole + size, unseen, unseen_size);
    }
    ret->verdict_count = 0;
    for (uint32_t i = 0; i < r->count; i++) {
        rule_run(r, i, whole, total, cut, &marks, ret);
    }
    size_t to = cut && marks.hold < size ? marks.hold : size;
    ret->bytes = 0;
    ret->refused = marks.refused < to;
    to = ret->refused ? marks.refused : to;
    for (size_t at = 0; at < to; at++) {
        if (!marks.forbidden[at]) {
            ret->text[ret->bytes++] = text[at];
        } else if (at == 0 || !marks.forbidden[at - 1]) {
            const struct cm_rules_text *with = &r->rules[marks.starter[at] - 1].rule->replacement;
            memcpy(ret->text + ret->bytes, with->bytes, with->size);
            ret->bytes += with->size;
        }
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i < ret->verdict_count; i++) {
        struct reference_verdict verdict = ret->verdicts[i];
        if (verdict.start < size) {
            verdict.end = verdict.end < size ? verdict.end : size;
            ret->verdicts[kept++] = verdict;
        }
    }
    ret->verdict_count = kept;
}
