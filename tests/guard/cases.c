/* Generators, and the one comparison that they all end in. */
#include "tests/guard/cases.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OUT_MAX        (4 * REFERENCE_TEXT_MAX)
#define EXHAUSTIVE_MAX 16 /* bytes of a text of which every split is tried */

struct set { /* rules, compiled both ways */
    struct cm_rules rules;
    struct cm_guard_pack *pack;
    struct reference *reference;
};

static uint64_t random_next(struct cases *cases)
{
    uint64_t x = cases->random; /* xorshift64* */
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    cases->random = x;
    return x * 0x2545f4914f6cdd1du;
}

static uint32_t below(struct cases *cases, uint32_t limit)
{
    return (uint32_t)((random_next(cases) >> 33) % limit);
}

/* ------------------------------------------------------------------ one run */

struct way { /* how a text comes and how it ends */
    const char *name;
    const uint32_t *pieces; /* bytes of each; the last one takes the rest */
    uint32_t piece_count;
    bool cut;
    const uint8_t *unseen;
    size_t unseen_size;
};

static void show(char *to, size_t room, const uint8_t *text, size_t size)
{
    size_t used = 0;
    for (size_t i = 0; i < size && used + 5 < room; i++) {
        used += (size_t)snprintf(to + used, room - used,
                                 text[i] >= 0x20 && text[i] < 0x7f ? "%c" : "\\x%02x", text[i]);
    }
    to[used] = '\0';
}

static bool fail(struct cases *cases, const struct set *set, const struct way *way,
                 const uint8_t *text, size_t size, const struct reference_result *wanted,
                 const uint8_t *out, size_t used, const char *what)
{
    char shown[3][900];
    size_t at = 0;
    show(shown[0], sizeof(shown[0]), text, size);
    show(shown[1], sizeof(shown[1]), wanted->text, wanted->bytes);
    show(shown[2], sizeof(shown[2]), out, used);
    at += (size_t)snprintf(cases->failure, sizeof(cases->failure),
                           "%s (%s, cut %d, %zu unseen)\ntext   %s\nwanted %s%s\ngot    %s\n", what,
                           way->name, way->cut, way->unseen_size, shown[0], shown[1],
                           wanted->refused ? " (refused)" : "", shown[2]);
    for (uint32_t i = 0; i < set->rules.count && i < 8 && at < sizeof(cases->failure); i++) {
        at += (size_t)snprintf(
            cases->failure + at, sizeof(cases->failure) - at,
            "rule %u: %s until %s action %u validator %u firm %u\n", i,
            set->rules.rules[i].pattern.bytes,
            set->rules.rules[i].until.size > 0 ? (char *)set->rules.rules[i].until.bytes : "-",
            set->rules.rules[i].action, set->rules.rules[i].validator,
            set->rules.rules[i].firm_bytes);
    }
    return false;
}

struct said {
    uint32_t count;
    bool lost;
    struct cm_guard_verdict verdicts[REFERENCE_VERDICTS_MAX];
};

static void verdicts_take(struct cm_guard_state *state, struct said *said)
{
    for (uint32_t i = 0; i < state->verdict_count && said->count < REFERENCE_VERDICTS_MAX; i++) {
        said->verdicts[said->count++] = state->verdicts[i];
    }
    said->lost = said->lost || state->verdicts_lost > 0;
    state->verdict_count = 0;
}

static int verdict_order(const void *a, const void *b)
{
    const struct cm_guard_verdict *x = a, *y = b;
    if (x->rule != y->rule) {
        return x->rule < y->rule ? -1 : 1;
    }
    return x->start < y->start ? -1 : x->start > y->start;
}

static bool verdicts_equal(struct said *said, const struct reference_result *wanted)
{
    if (said->lost || wanted->refused || wanted->verdict_count > 6) {
        return true; /* more than there is room for may come in parts */
    }
    qsort(said->verdicts, said->count, sizeof(said->verdicts[0]), verdict_order);
    bool same = said->count == wanted->verdict_count;
    for (uint32_t i = 0; same && i < said->count; i++) {
        same = said->verdicts[i].rule == wanted->verdicts[i].rule &&
               said->verdicts[i].start == wanted->verdicts[i].start &&
               said->verdicts[i].end == wanted->verdicts[i].end;
    }
    return same;
}

static bool run(struct cases *cases, const struct set *set, const struct way *way,
                const uint8_t *text, size_t size, const struct reference_result *wanted)
{
    static struct cm_guard_state state;
    static struct said said;
    static uint8_t out[OUT_MAX];
    uint32_t used = 0;
    bool open = true;
    said.count = 0;
    said.lost = false;
    cm_guard_begin(&state, CM_GUARD_OUTPUT);
    for (size_t at = 0, i = 0; at < size && open; i++) {
        size_t take = i < way->piece_count ? way->pieces[i] : size - at;
        take = take < size - at ? take : size - at;
        open = cm_guard_feed(set->pack, &state, text + at, take, out, &used);
        verdicts_take(&state, &said);
        if (used > wanted->bytes || memcmp(out, wanted->text, used) != 0) {
            return fail(cases, set, way, text, size, wanted, out, used, "released too early");
        }
        at += take;
    }
    if (open) {
        open = cm_guard_finish(set->pack, &state, way->cut ? CM_GUARD_CUT : CM_GUARD_TEXT_END,
                               way->unseen, way->unseen_size, out, &used);
        verdicts_take(&state, &said);
    }
    cases->runs++;
    if (open == wanted->refused || used != wanted->bytes || memcmp(out, wanted->text, used) != 0) {
        return fail(cases, set, way, text, size, wanted, out, used, "another text");
    }
    if (!verdicts_equal(&said, wanted)) {
        return fail(cases, set, way, text, size, wanted, out, used, "other verdicts");
    }
    for (uint32_t i = 0; wanted->refused && i < said.count; i++) {
        if (said.verdicts[i].rule == CM_GUARD_RULE_OVERFLOW) {
            return fail(cases, set, way, text, size, wanted, out, used, "overflow");
        }
    }
    cases->refused += wanted->refused;
    return true;
}

/* ------------------------------------------------------------------ rule sets */

static void rule_add(struct cm_rules *rules, const char *pattern, const char *until, uint8_t action,
                     uint8_t validator, uint32_t argument, uint32_t firm_bytes)
{
    static const char *const replacements[] = {"#", "<>", "[X]"};
    const char *replacement = action == CM_VERDICT_REDACT ? replacements[rules->count % 3] : "";
    rules->rules = realloc(rules->rules, (rules->count + 1) * sizeof(*rules->rules));
    struct cm_rule *rule = &rules->rules[rules->count++];
    memset(rule, 0, sizeof(*rule));
    snprintf(rule->id, sizeof(rule->id), "rule-%u", rules->count);
    snprintf(rule->category, sizeof(rule->category), "test");
    snprintf(rule->file, sizeof(rule->file), "test");
    rule->classes = CM_GUARD_OUTPUT;
    rule->where = CM_GUARD_ANYWHERE;
    rule->action = action;
    rule->validator = validator;
    rule->argument = argument;
    rule->firm_bytes = firm_bytes;
    rule->pattern = (struct cm_rules_text){(uint8_t *)strdup(pattern), strlen(pattern)};
    rule->until = (struct cm_rules_text){(uint8_t *)strdup(until), strlen(until)};
    rule->replacement = (struct cm_rules_text){(uint8_t *)strdup(replacement), strlen(replacement)};
}

static bool set_close_up(struct set *set)
{
    struct cm_error err;
    uint8_t *bytes;
    size_t size;
    if (cm_rules_compile(&set->rules, &bytes, &size, &err) != CM_OK) {
        cm_rules_free(&set->rules);
        return false;
    }
    if (cm_guard_pack_new(bytes, size, &set->pack, &err) != CM_OK) {
        fprintf(stderr, "our own pack is refused: %s\n", err.text);
        abort();
    }
    free(bytes);
    set->reference = reference_new(&set->rules);
    return true;
}

static void set_free(struct set *set)
{
    cm_guard_pack_free(set->pack);
    reference_free(set->reference);
    cm_rules_free(&set->rules);
}

enum { RP = CM_VERDICT_REPORT, RD = CM_VERDICT_REDACT, RF = CM_VERDICT_REFUSE };

/* Small rules with every trait that could go wrong: overlap, nesting, prefixes of each other,
 * tails, conditions, what is decided late, what covers an earlier refusal. */
static const struct {
    const char *pattern, *until;
    uint8_t action, validator;
    uint32_t argument, firm_bytes;
} hand_made[][5] = {
    {{"ab", "", RD, 0, 0, 0}},
    {{"aba", "", RD, 0, 0, 0}},
    {{"a", "", RD, 0, 0, 0}, {"b", "", RD, 0, 0, 0}},
    {{"abc", "", RD, 0, 0, 0}, {"bca", "", RD, 0, 0, 0}, {"ca", "", RD, 0, 0, 0}},
    {{"aab", "", RF, 0, 0, 0}, {"ab", "", RD, 0, 0, 0}},
    {{"a{3}", "", RD, 0, 0, 0}, {"aaab", "", RF, 0, 0, 0}},
    {{"a{2,4}", "", RD, 0, 0, 0}},
    {{"a{2,}", "", RD, 0, 0, 0}, {"ca", "", RF, 0, 0, 0}},
    {{"ab[ab]*", "", RD, 0, 0, 0}, {"bb", "", RF, 0, 0, 0}},
    {{"ab(c|ab)*", "", RD, 0, 0, 0}},
    {{"(?<!a)ba", "", RD, 0, 0, 0}},
    {{"ba(?!a)", "", RD, 0, 0, 0}},
    {{"(?<!b)a{1,3}(?!b)", "", RD, 0, 0, 0}},
    {{"(?<!c)[ab]{2,4}(?![ab])", "", RD, 0, 0, 0}, {"ac", "", RD, 0, 0, 0}},
    {{"(ab|a)(?!c)", "", RD, 0, 0, 0}, {"cb", "", RF, 0, 0, 0}},
    {{"ab", "c", RD, 0, 0, 0}},
    {{"a", "ca", RD, 0, 0, 0}, {"bb", "", RF, 0, 0, 0}},
    {{"aa?b?", "cc", RD, 0, 0, 0}, {"cb", "", RD, 0, 0, 0}},
    {{"[ab]c", "", RD, 0, 0, 2}, {"c[ab]{3}", "", RD, 0, 0, 3}},
    {{"a[bc]{2}a", "", RD, 0, 0, 2}, {"b", "", RP, 0, 0, 0}, {"bc", "", RP, 0, 0, 0}},
    {{"[abc]{3,5}", "", RD, CM_GUARD_VALID_ENTROPY, 120, 0}},
    {{"a[abc]{2,}", "", RD, CM_GUARD_VALID_ENTROPY, 100, 0}, {"cc", "", RF, 0, 0, 0}},
    {{"a[abc]{3}(?!a)", "", RF, CM_GUARD_VALID_ENTROPY, 150, 0}, {"b", "", RD, 0, 0, 0}},
    {{"abcabca", "", RD, 0, 0, 0}, {"bca", "", RD, 0, 0, 0}, {"c", "", RD, 0, 0, 0}},
    {{"a(b|bc|bca)", "", RD, 0, 0, 0}, {"caa", "", RF, 0, 0, 0}},
    {{"[^a]a", "", RD, 0, 0, 1}, {"a[^b]", "", RP, 0, 0, 0}},
    {{"(a|b){4}c", "", RD, 0, 0, 3}, {"ba", "", RD, 0, 0, 0}},
    {{"bcb", "", RF, 0, 0, 0}, {"abcbc", "", RD, 0, 0, 0}, {"cbca", "", RF, 0, 0, 0}},
    {{"a.b", "", RD, 0, 0, 0}, {"b.a", "", RD, 0, 0, 0}, {"c.c", "", RF, 0, 0, 0}},
    {{"(?i)AB?C", "", RD, 0, 0, 0}},
    {{"a(ba)*b?", "", RD, 0, 0, 0}, {"bc", "", RD, 0, 0, 0}},
    {{"ab{0,3}c", "", RD, 0, 0, 2}, {"bb", "", RD, 0, 0, 0}},
};
#define HAND_MADE (sizeof(hand_made) / sizeof(hand_made[0]))

static bool set_hand_made(struct set *set, size_t index)
{
    memset(set, 0, sizeof(*set));
    for (size_t i = 0; i < 5 && hand_made[index][i].pattern != NULL; i++) {
        rule_add(&set->rules, hand_made[index][i].pattern, hand_made[index][i].until,
                 hand_made[index][i].action, hand_made[index][i].validator,
                 hand_made[index][i].argument, hand_made[index][i].firm_bytes);
    }
    return set_close_up(set);
}

/* ------------------------------------------------------------------ exhaustive */

/* Bit i of `borders`: a piece ends behind byte i. */
static uint32_t pieces_by_borders(uint32_t borders, size_t size, uint32_t *ret_pieces)
{
    uint32_t count = 0;
    for (uint32_t i = 0, from = 0; i < size; i++) {
        if ((borders >> i & 1) != 0 || i + 1 == size) {
            ret_pieces[count++] = i + 1 - from;
            from = i + 1;
        }
    }
    return count;
}

static bool text_exhaust(struct cases *cases, const struct set *set, const uint8_t *text,
                         size_t size)
{
    static const uint8_t stop[] = "ab";
    static struct reference_result wanted;
    uint32_t pieces[EXHAUSTIVE_MAX];
    for (int end = 0; end < 3; end++) {
        struct way way = {.name = "every split",
                          .pieces = pieces,
                          .cut = end > 0,
                          .unseen = end == 2 ? stop : NULL,
                          .unseen_size = end == 2 ? 2 : 0};
        reference_run(set->reference, text, size, way.cut, way.unseen, way.unseen_size, &wanted);
        cases->redacted += wanted.bytes != size;
        for (uint32_t borders = 0; borders < 1u << (size > 0 ? size - 1 : 0); borders++) {
            way.piece_count = pieces_by_borders(borders, size, pieces);
            if (!run(cases, set, &way, text, size, &wanted)) {
                return false;
            }
        }
    }
    return true;
}

bool cases_exhaustive(struct cases *cases, uint32_t length)
{
    for (size_t index = 0; index < HAND_MADE; index++) {
        struct set set;
        bool good = true;
        if (!set_hand_made(&set, index)) {
            snprintf(cases->failure, sizeof(cases->failure), "set %zu is refused", index);
            return false;
        }
        for (uint32_t size = 0; good && size <= length; size++) {
            uint32_t count = 1;
            for (uint32_t i = 0; i < size; i++) {
                count *= 3;
            }
            for (uint32_t number = 0; good && number < count; number++) {
                uint8_t text[EXHAUSTIVE_MAX];
                uint32_t rest = number;
                for (uint32_t i = 0; i < size; i++, rest /= 3) {
                    text[i] = (uint8_t)('a' + rest % 3);
                }
                good = text_exhaust(cases, &set, text, size);
                cases->texts++;
            }
        }
        set_free(&set);
        if (!good) {
            return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------ random rules */

static size_t pattern_random(struct cases *cases, char *to, size_t room, int depth, bool inner)
{
    static const char *const atoms[] = {"a",    "b",    "c",    "a", "b",     "c",
                                        "[ab]", "[^a]", "[bc]", ".", "[abc]", "d"};
    static const char *const repeats[] = {"", "", "", "", "?", "{2}", "{1,3}", "{0,2}", "{2,4}"};
    size_t used = 0;
    uint32_t items = 1 + below(cases, 4);
    for (uint32_t i = 0; i < items && used + 80 < room; i++) {
        if (depth < 2 && below(cases, 5) == 0) {
            used += (size_t)snprintf(to + used, room - used, "(");
            used += pattern_random(cases, to + used, (room - used) / 2, depth + 1, true);
            if (below(cases, 2) == 0) {
                used += (size_t)snprintf(to + used, room - used, "|");
                used += pattern_random(cases, to + used, (room - used) / 2, depth + 1, true);
            }
            used += (size_t)snprintf(to + used, room - used, ")");
        } else {
            used += (size_t)snprintf(to + used, room - used, "%s", atoms[below(cases, 12)]);
        }
        bool tail = !inner && i + 1 == items && below(cases, 4) == 0;
        used += (size_t)snprintf(to + used, room - used, "%s",
                                 tail ? (below(cases, 2) == 0 ? "+" : "{2,}")
                                      : repeats[below(cases, 9)]);
    }
    return used;
}

static void set_random(struct cases *cases, struct set *set)
{
    for (;;) {
        uint32_t count = 1 + below(cases, 4);
        memset(set, 0, sizeof(*set));
        for (uint32_t i = 0; i < count; i++) {
            char pattern[700], until[200] = "";
            size_t used = 0;
            bool right = below(cases, 4) == 0, after = !right && below(cases, 8) == 0;
            if (below(cases, 3) == 0) {
                used += (size_t)snprintf(pattern, sizeof(pattern), "(?<![%s])",
                                         below(cases, 2) == 0 ? "a" : "bc");
            }
            used += pattern_random(cases, pattern + used, sizeof(pattern) - used - 20, 0, false);
            if (right) {
                snprintf(pattern + used, sizeof(pattern) - used, "(?![%s])",
                         below(cases, 2) == 0 ? "a" : "bd");
            }
            if (after) {
                pattern_random(cases, until, sizeof(until), 1, true);
            }
            uint32_t luck = below(cases, 10);
            uint8_t action = luck == 0 ? RP : luck < 3 ? RF : RD;
            bool entropy = !after && below(cases, 6) == 0;
            rule_add(&set->rules, pattern, until, action, entropy ? CM_GUARD_VALID_ENTROPY : 0,
                     entropy ? 40 + below(cases, 140) : 0,
                     below(cases, 2) == 0 ? 0 : 1 + below(cases, 5));
        }
        if (set_close_up(set)) {
            return;
        }
        cases->refused_rules++;
    }
}

static size_t text_random(struct cases *cases, uint8_t *text, size_t most)
{
    size_t size = below(cases, (uint32_t)most);
    uint32_t letters = 2 + below(cases, 4);
    for (size_t i = 0; i < size; i++) {
        text[i] = (uint8_t)('a' + below(cases, letters));
    }
    return size;
}

/* Prose with samples in it: whole, cut, with bytes exchanged, and run together. */
static size_t text_of_samples(struct cases *cases, const struct cm_rules *rules, uint8_t *text,
                              size_t most)
{
    static const char *const words[] = {"the ",  "key is ", "\n", "x@",   "4",   "DE",
                                        "-----", " ",       ": ", "sk-",  "eyJ", "é",
                                        "://",   ".",       "\"", "AKIA", "\xff"};
    size_t used = 0, parts = 1 + below(cases, 7);
    for (size_t i = 0; i < parts; i++) {
        const struct cm_rule *rule = &rules->rules[below(cases, rules->count)];
        bool positive = below(cases, 3) != 0;
        const struct cm_rules_text *sample =
            positive ? &rule->positive[below(cases, rule->positive_count)]
                     : &rule->negative[below(cases, rule->negative_count)];
        const char *word = words[below(cases, sizeof(words) / sizeof(words[0]))];
        size_t take =
            below(cases, 4) == 0 ? below(cases, (uint32_t)sample->size + 1) : sample->size;
        if (used + strlen(word) + take > most) {
            break;
        }
        memcpy(text + used, word, strlen(word));
        used += strlen(word);
        memcpy(text + used, sample->bytes, take);
        if (take > 0 && below(cases, 4) == 0) {
            text[used + below(cases, (uint32_t)take)] = (uint8_t)(' ' + below(cases, 95));
        }
        used += take;
    }
    return used;
}

/* One text: byte by byte, and in random pieces, with each kind of end, and cut short anywhere. */
static bool text_try(struct cases *cases, const struct set *set, const uint8_t *text, size_t size)
{
    static const uint32_t ones[REFERENCE_TEXT_MAX] = {[0 ... REFERENCE_TEXT_MAX - 1] = 1};
    static struct reference_result wanted;
    uint32_t pieces[64];
    for (int turn = 0; turn < 4; turn++) {
        size_t end = turn < 2 ? size : below(cases, (uint32_t)size + 1);
        size_t follow = turn != 3 ? 0 : size - end < 12 ? size - end : 12;
        struct way way = {.name = "byte by byte",
                          .pieces = ones,
                          .piece_count = REFERENCE_TEXT_MAX,
                          .cut = turn > 0,
                          .unseen = text + end,
                          .unseen_size = follow};
        reference_run(set->reference, text, end, way.cut, way.unseen, follow, &wanted);
        cases->redacted += wanted.bytes != end;
        cases->cut += way.cut;
        bool good = run(cases, set, &way, text, end, &wanted);
        way.name = "random pieces";
        way.pieces = pieces;
        way.piece_count = 64;
        for (int again = 0; good && again < 3; again++) {
            uint32_t longest = again == 0 ? 3 : again == 1 ? 12 : 400;
            for (int i = 0; i < 64; i++) {
                pieces[i] = 1 + below(cases, longest);
            }
            good = run(cases, set, &way, text, end, &wanted);
        }
        if (!good) {
            return false;
        }
    }
    cases->texts++;
    return true;
}

/* The reference knows replies alone. */
static void rules_of_replies(struct cm_rules *rules)
{
    for (uint32_t i = 0; i < rules->count;) {
        if ((rules->rules[i].classes & CM_GUARD_OUTPUT) != 0) {
            i++;
            continue;
        }
        struct cm_rules one = {.count = 1, .rules = malloc(sizeof(struct cm_rule))};
        one.rules[0] = rules->rules[i];
        cm_rules_free(&one);
        memmove(&rules->rules[i], &rules->rules[i + 1],
                (--rules->count - i) * sizeof(rules->rules[0]));
    }
}

static bool set_built_in(struct cases *cases, struct set *set)
{
    struct cm_error err = {.status = CM_OK};
    memset(set, 0, sizeof(*set));
    bool read = cm_rules_built_in(&set->rules, &err) == CM_OK;
    rules_of_replies(&set->rules);
    if (!read || !set_close_up(set)) {
        snprintf(cases->failure, sizeof(cases->failure), "built-in rules: %s", err.text);
        return false;
    }
    return true;
}

bool cases_random(struct cases *cases, uint64_t runs, uint64_t seed)
{
    static uint8_t text[REFERENCE_TEXT_MAX];
    struct set built_in;
    bool good = true;
    cases->random = seed * 2 + 1;
    if (!set_built_in(cases, &built_in)) {
        return false;
    }
    while (good && cases->runs < runs) {
        struct set set;
        set_random(cases, &set);
        for (int i = 0; good && i < 12 && cases->runs < runs; i++) {
            good = text_try(cases, &set, text, text_random(cases, text, 60));
        }
        set_free(&set);
        for (int i = 0; good && i < 2 && cases->runs < runs; i++) {
            size_t size = text_of_samples(cases, &built_in.rules, text, 700);
            good = text_try(cases, &built_in, text, size);
        }
    }
    set_free(&built_in);
    return good;
}

/* ------------------------------------------------------------------ tokens */

static int token_order(const void *a, const void *b)
{
    const struct cases_token *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, x->size < y->size ? x->size : y->size);
    return order != 0 ? order : (int)x->size - (int)y->size;
}

bool cases_vocabulary_read(struct cases_vocabulary *vocabulary, FILE *from)
{
    static char line[1 << 14];
    uint32_t room = 0;
    memset(vocabulary, 0, sizeof(*vocabulary));
    while (fgets(line, sizeof(line), from) != NULL) {
        size_t digits = strspn(line, "0123456789abcdef");
        struct cases_token token = {.size = (uint8_t)(digits / 2)};
        if (digits == 0 || digits % 2 != 0 || line[digits] != '\n') {
            return false;
        }
        if (digits / 2 > CASES_TOKEN_BYTES) {
            continue; /* no sample needs one: they are runs of blanks and of dashes */
        }
        for (size_t i = 0; i < digits / 2; i++) {
            unsigned byte;
            sscanf(line + 2 * i, "%2x", &byte);
            token.bytes[i] = (uint8_t)byte;
        }
        if (vocabulary->count == room) {
            room = room * 2 + 1024;
            vocabulary->tokens = realloc(vocabulary->tokens, room * sizeof(token));
        }
        vocabulary->tokens[vocabulary->count++] = token;
    }
    qsort(vocabulary->tokens, vocabulary->count, sizeof(struct cases_token), token_order);
    return vocabulary->count > 0;
}

/* Which tokens could come next, at each byte of a text: bit n - 1, one of n bytes. */
static void tokens_find(const struct cases_vocabulary *vocabulary, const uint8_t *text, size_t size,
                        uint64_t *ret_lengths)
{
    for (size_t at = 0; at < size; at++) {
        struct cases_token token = {.size = 0};
        ret_lengths[at] = 0;
        while (token.size < CASES_TOKEN_BYTES && at + token.size < size) {
            token.bytes[token.size] = text[at + token.size];
            token.size++;
            if (bsearch(&token, vocabulary->tokens, vocabulary->count, sizeof(token),
                        token_order) != NULL) {
                ret_lengths[at] |= 1ull << (token.size - 1);
            }
        }
    }
}

/* One of the ways in which tokens may say the text. `draws` more: longer tokens. 0: there is none.
 */
static uint32_t pieces_of_tokens(struct cases *cases, const uint64_t *lengths, size_t size,
                                 uint32_t draws, uint32_t *ret_pieces)
{
    uint32_t count = 0;
    for (size_t at = 0; at < size; at += ret_pieces[count++]) {
        uint32_t length = 0;
        if (lengths[at] == 0) {
            return 0;
        }
        for (uint32_t i = 0; i <= draws; i++) {
            uint64_t bits = lengths[at];
            for (uint32_t skip = below(cases, (uint32_t)__builtin_popcountll(bits)); skip > 0;
                 skip--) {
                bits &= bits - 1;
            }
            uint32_t drawn = (uint32_t)__builtin_ctzll(bits) + 1;
            length = drawn > length ? drawn : length;
        }
        ret_pieces[count] = length;
    }
    return count;
}

static bool tokens_try(struct cases *cases, const struct set *set,
                       const struct cases_vocabulary *vocabulary, const uint8_t *text, size_t size,
                       struct way way, uint32_t segmentations)
{
    static uint64_t lengths[REFERENCE_TEXT_MAX];
    static uint32_t pieces[REFERENCE_TEXT_MAX];
    static struct reference_result wanted;
    reference_run(set->reference, text, size, way.cut, way.unseen, way.unseen_size, &wanted);
    if (!way.cut && wanted.verdict_count == 0) {
        return fail(cases, set, &way, text, size, &wanted, NULL, 0, "nothing found in a sample");
    }
    cases->redacted += wanted.bytes != size;
    cases->cut += way.cut;
    cases->texts++;
    tokens_find(vocabulary, text, size, lengths);
    way.pieces = pieces;
    for (uint32_t i = 0; i < segmentations; i++) {
        way.piece_count = pieces_of_tokens(cases, lengths, size, i % 4, pieces);
        if (way.piece_count == 0 && size > 0) {
            return fail(cases, set, &way, text, size, &wanted, NULL, 0, "no tokens say this");
        }
        if (!run(cases, set, &way, text, size, &wanted)) {
            return false;
        }
    }
    return true;
}

/* A sample between two texts: whole, and cut twice anywhere with what follows known or not. */
static bool sample_try(struct cases *cases, const struct set *set,
                       const struct cases_vocabulary *vocabulary, const char *const frame[static 2],
                       const struct cm_rules_text *sample, uint32_t segmentations)
{
    uint8_t text[REFERENCE_TEXT_MAX];
    size_t before = strlen(frame[0]), after = strlen(frame[1]);
    size_t size = before + sample->size + after;
    if (size > sizeof(text)) {
        snprintf(cases->failure, sizeof(cases->failure), "a sample of %zu bytes", sample->size);
        return false;
    }
    memcpy(text, frame[0], before);
    memcpy(text + before, sample->bytes, sample->size);
    memcpy(text + before + sample->size, frame[1], after);
    struct way way = {.name = "tokens"};
    bool good = tokens_try(cases, set, vocabulary, text, size, way, segmentations);
    for (int turn = 0; good && turn < 2; turn++) {
        size_t end = before + below(cases, (uint32_t)(size - before) + 1);
        way.cut = true;
        way.unseen = text + end;
        way.unseen_size = turn == 0 ? 0 : size - end < 12 ? size - end : 12;
        good = tokens_try(cases, set, vocabulary, text, end, way, segmentations);
    }
    return good;
}

bool cases_tokens(struct cases *cases, const struct cases_vocabulary *vocabulary,
                  uint32_t segmentations, uint64_t seed)
{
    static const char *const frames[][2] = {
        {"Sure! Here is what you asked for: ", " and nothing else.\n"},
        {"```\nkey = ", "\n```\nKeep it safe"},
        {"caf\xc3\xa9 \xe2\x80\x94 ", " \xf0\x9f\x94\x91\n\n"},
    };
    struct set built_in;
    bool good = true;
    cases->random = seed * 2 + 1;
    if (!set_built_in(cases, &built_in)) {
        return false;
    }
    for (uint32_t i = 0; good && i < 3 * built_in.rules.count; i++) {
        const struct cm_rule *rule = &built_in.rules.rules[i / 3];
        for (uint32_t k = 0; good && k < rule->positive_count; k++) {
            good = sample_try(cases, &built_in, vocabulary, frames[i % 3], &rule->positive[k],
                              segmentations);
        }
    }
    set_free(&built_in);
    return good;
}
