/* Patterns: the safe subset of Perl's syntax that README.md describes, over bytes. What is accepted
 * means the same to PCRE2 (no UTF mode); everything else is refused with its place. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policies/guard/rules_internal.h"

#define NODES_MAX  4096u
#define DEPTH_MAX  32u
#define REPEAT_MAX 1024u
#define UNBOUNDED  UINT32_MAX
#define NO_NODE    UINT32_MAX

enum kind { EMPTY, SET, CAT, ALT, REPEAT };

struct node {
    enum kind kind;
    uint32_t left, right; /* REPEAT: left is the child */
    uint32_t least, most;
    uint8_t set[32];
};

struct parser {
    const uint8_t *text;
    size_t size, at;
    bool fold;           /* (?i) */
    uint8_t view;        /* of cm_rule: how literals are spelled */
    const char *refusal; /* NULL: none yet */
    uint32_t depth, node_count;
    struct node *nodes; /* [NODES_MAX] */
    bool word_left, word_right, has_left, has_right;
    uint8_t left[32], right[32];
};

static uint32_t refuse(struct parser *p, const char *why)
{
    p->refusal = p->refusal != NULL ? p->refusal : why;
    return NO_NODE;
}

static void set_add(uint8_t set[static 32], uint32_t byte)
{
    set[byte >> 3] |= (uint8_t)(1u << (byte & 7));
}

static bool set_has(const uint8_t set[static 32], uint32_t byte)
{
    return (set[byte >> 3] >> (byte & 7) & 1) != 0;
}

static void set_range(uint8_t set[static 32], uint32_t first, uint32_t last)
{
    for (uint32_t byte = first; byte <= last; byte++) {
        set_add(set, byte);
    }
}

static void set_invert(uint8_t set[static 32])
{
    for (int i = 0; i < 32; i++) {
        set[i] = (uint8_t)~set[i];
    }
}

static void set_fold(uint8_t set[static 32])
{
    for (uint32_t letter = 'a'; letter <= 'z'; letter++) {
        if (set_has(set, letter) || set_has(set, letter - 32)) {
            set_add(set, letter);
            set_add(set, letter - 32);
        }
    }
}

static void set_word(uint8_t set[static 32])
{
    set_range(set, '0', '9');
    set_range(set, 'A', 'Z');
    set_range(set, 'a', 'z');
    set_add(set, '_');
}

static bool more(const struct parser *p)
{
    return p->at < p->size && p->refusal == NULL;
}

static bool take(struct parser *p, const char *literal)
{
    size_t size = strlen(literal);
    if (p->size - p->at < size || memcmp(p->text + p->at, literal, size) != 0) {
        return false;
    }
    p->at += size;
    return true;
}

static int hex_value(uint8_t byte)
{
    return byte >= '0' && byte <= '9'   ? byte - '0'
           : byte >= 'a' && byte <= 'f' ? byte - 'a' + 10
           : byte >= 'A' && byte <= 'F' ? byte - 'A' + 10
                                        : -1;
}

/* After a backslash: adds the bytes it stands for. Returns the byte, or -1 if it is a class. */
static int escape_read(struct parser *p, uint8_t set[static 32])
{
    static const char controls[] = "t\tn\nr\rf\fe\033";
    uint8_t members[32] = {0};
    if (!more(p)) {
        refuse(p, "it ends with a backslash");
        return -1;
    }
    uint8_t c = p->text[p->at++];
    int byte = -1;
    if (c == 'x' && p->size - p->at >= 2 && hex_value(p->text[p->at]) >= 0 &&
        hex_value(p->text[p->at + 1]) >= 0) {
        byte = hex_value(p->text[p->at]) * 16 + hex_value(p->text[p->at + 1]);
        p->at += 2;
    } else if (strchr("dDwWsS", c) != NULL && c != 0) {
        if (c == 'd' || c == 'D') {
            set_range(members, '0', '9');
        } else if (c == 'w' || c == 'W') {
            set_word(members);
        } else {
            set_range(members, '\t', '\r');
            set_add(members, ' ');
        }
        if (c < 'a') {
            set_invert(members);
        }
        for (int i = 0; i < 32; i++) {
            set[i] |= members[i];
        }
        return -1;
    } else if ((c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
               c >= 0x80) {
        for (size_t i = 0; i + 1 < sizeof(controls); i += 2) {
            byte = c == (uint8_t)controls[i] ? controls[i + 1] : byte;
        }
        if (byte < 0) {
            refuse(p, "this escape is not in the subset");
            return -1;
        }
    } else {
        byte = c;
    }
    set_add(set, (uint32_t)byte);
    return byte;
}

/* One member of a class; -1: it was a class of its own. */
static int member_read(struct parser *p, uint8_t set[static 32])
{
    uint8_t c = p->text[p->at++];
    if (c == '[' && p->at < p->size && strchr(":.=", p->text[p->at]) != NULL) {
        refuse(p, "named classes are not in the subset: write the range");
        return -1;
    }
    if (c == '\\') {
        return escape_read(p, set);
    }
    set_add(set, c);
    return c;
}

/* Behind '[' up to and with ']'. */
static void class_read(struct parser *p, uint8_t ret_set[static 32])
{
    uint8_t set[32] = {0};
    bool inverted = take(p, "^");
    if (more(p) && p->text[p->at] == ']') {
        refuse(p, "an empty class, or a ']' that needs a backslash");
    }
    while (more(p) && p->text[p->at] != ']') {
        int first = member_read(p, set);
        if (p->size - p->at >= 2 && p->text[p->at] == '-' && p->text[p->at + 1] != ']') {
            p->at++;
            int last = member_read(p, set);
            if (first < 0 || last < first) {
                refuse(p, "a range in a class runs backwards, or ends in a class");
                return;
            }
            set_range(set, (uint32_t)first, (uint32_t)last);
        }
    }
    if (!take(p, "]")) {
        refuse(p, "a class is not closed");
    }
    if (p->fold) {
        set_fold(set);
    }
    if (inverted) {
        set_invert(set);
    }
    memcpy(ret_set, set, sizeof(set));
}

static uint32_t node_new(struct parser *p, enum kind kind, uint32_t left, uint32_t right)
{
    if (p->node_count == NODES_MAX) {
        return refuse(p, "it is too long");
    }
    p->nodes[p->node_count] = (struct node){.kind = kind, .left = left, .right = right};
    return p->node_count++;
}

static uint32_t alternatives_read(struct parser *p);

static uint32_t group_read(struct parser *p)
{
    (void)take(p, "?:");
    if (more(p) && p->text[p->at] == '?') {
        return refuse(p, "this kind of group is not in the subset: only ( ) and (?: )");
    }
    if (++p->depth > DEPTH_MAX) {
        return refuse(p, "groups are nested too deep");
    }
    uint32_t node = alternatives_read(p);
    p->depth--;
    if (!take(p, ")")) {
        return refuse(p, "a group is not closed");
    }
    return node;
}

static uint32_t byte_node(struct parser *p, uint32_t byte)
{
    uint32_t node = node_new(p, SET, NO_NODE, NO_NODE);
    if (node != NO_NODE) {
        set_add(p->nodes[node].set, byte);
    }
    return node;
}

/* A literal of a view, written in plain lower-case words, as the view shows it. */
static uint32_t spelled_read(struct parser *p, uint8_t c)
{
    bool word = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == ' ';
    if (!word) {
        return refuse(p, "words are written in a-z, 0-9 and spaces");
    }
    uint8_t first =
        (uint8_t)(p->view == CM_GUARD_WORDS ? cm_guard_word_bytes[c] : cm_guard_squeezed_bytes[c]);
    uint32_t node = first != 0 ? byte_node(p, first) : node_new(p, EMPTY, NO_NODE, NO_NODE);
    return c == 'm' ? node_new(p, CAT, node, byte_node(p, 'n')) : node;
}

static uint32_t atom_read(struct parser *p)
{
    uint8_t c = p->text[p->at++];
    if (c == '(') {
        return group_read(p);
    }
    bool literal = strchr("[.\\^$*+?{}", c) == NULL || c == 0;
    if (literal && (p->view == CM_GUARD_WORDS || p->view == CM_GUARD_SQUEEZED)) {
        return spelled_read(p, c);
    }
    if (literal && p->view == CM_GUARD_FOLDED && c >= 'A' && c <= 'Z') {
        return refuse(p, "folded text has no capitals");
    }
    uint32_t node = node_new(p, SET, NO_NODE, NO_NODE);
    if (node == NO_NODE) {
        return NO_NODE;
    }
    uint8_t *set = p->nodes[node].set;
    if (c == '[') {
        class_read(p, set);
        return node;
    }
    if (c == '.') {
        set_add(set, '\n');
        set_invert(set);
    } else if (c == '\\') {
        (void)escape_read(p, set);
    } else if (strchr("^$*+?{}", c) != NULL && c != 0) {
        return refuse(p, c == '^' || c == '$' ? "anchors are not in the subset"
                                              : "a quantifier stands alone, or needs a backslash");
    } else {
        set_add(set, c);
    }
    if (p->fold) {
        set_fold(set);
    }
    return node;
}

static uint32_t number_read(struct parser *p, uint32_t otherwise)
{
    uint32_t value = 0;
    size_t from = p->at;
    while (more(p) && p->text[p->at] >= '0' && p->text[p->at] <= '9') {
        value = value * 10 + (uint32_t)(p->text[p->at++] - '0');
        if (value > REPEAT_MAX) {
            return refuse(p, "it repeats more than 1024 times");
        }
    }
    return p->at > from ? value : otherwise;
}

static bool bounds_read(struct parser *p, uint32_t *least, uint32_t *most)
{
    *least = 0;
    *most = UNBOUNDED;
    if (take(p, "?")) {
        *most = 1;
    } else if (take(p, "+")) {
        *least = 1;
    } else if (take(p, "{")) {
        *least = number_read(p, NO_NODE);
        *most = take(p, ",") ? number_read(p, UNBOUNDED) : *least;
        if (*least == NO_NODE || *most < *least || *most == 0 || !take(p, "}")) {
            refuse(p, "a repeat must read {n}, {n,} or {n,m}");
        }
    } else if (!take(p, "*")) {
        return false;
    }
    if (more(p) && strchr("?+*{", p->text[p->at]) != NULL) {
        refuse(p, "lazy, possessive and doubled quantifiers are not in the subset");
    }
    return true;
}

/* A condition on the right may only end the pattern. */
static bool right_ahead(const struct parser *p)
{
    return p->depth == 0 && p->size - p->at >= 3 && memcmp(p->text + p->at, "(?!", 3) == 0;
}

static bool boundary_ahead(const struct parser *p)
{
    return p->size - p->at >= 2 && memcmp(p->text + p->at, "\\b", 2) == 0;
}

static uint32_t sequence_read(struct parser *p)
{
    uint32_t whole = node_new(p, EMPTY, NO_NODE, NO_NODE), least, most;
    while (more(p) && p->text[p->at] != '|' && p->text[p->at] != ')' && !right_ahead(p) &&
           !boundary_ahead(p)) {
        uint32_t item = atom_read(p);
        if (item != NO_NODE && bounds_read(p, &least, &most)) {
            item = node_new(p, REPEAT, item, NO_NODE);
            if (item != NO_NODE) {
                p->nodes[item].least = least;
                p->nodes[item].most = most;
            }
        }
        whole = node_new(p, CAT, whole, item);
    }
    return whole;
}

static uint32_t alternatives_read(struct parser *p)
{
    uint32_t whole = sequence_read(p);
    while (p->refusal == NULL && take(p, "|")) {
        if (p->depth == 0 && (p->has_left || p->word_left)) {
            return refuse(p, "a condition binds to one alternative: put them into a group");
        }
        uint32_t other = sequence_read(p);
        whole = node_new(p, ALT, whole, other);
        if (p->depth == 0 && more(p) && p->text[p->at] != '|') {
            return refuse(p, "a condition binds to one alternative: put them into a group");
        }
    }
    return whole;
}

/* "[…])" of a condition, or one escaped or plain byte. */
static void condition_read(struct parser *p, uint8_t set[static 32])
{
    if (take(p, "[")) {
        class_read(p, set);
    } else if (take(p, "\\")) {
        (void)escape_read(p, set);
    } else if (more(p) && strchr("()[]{}*+?|^$.", p->text[p->at]) == NULL) {
        set_add(set, p->text[p->at++]);
    }
    if (!take(p, ")")) {
        refuse(p, "a condition takes one byte or class: (?<![…]) before, (?![…]) after");
    }
    if (p->fold) {
        set_fold(set);
    }
}

static uint32_t pattern_read(struct parser *p)
{
    p->fold = take(p, "(?i)");
    if (take(p, "(?<!")) {
        condition_read(p, p->left);
        p->has_left = true;
    } else {
        p->word_left = take(p, "\\b");
    }
    uint32_t root = alternatives_read(p);
    if (p->refusal == NULL && take(p, "(?!")) {
        condition_read(p, p->right);
        p->has_right = true;
    } else if (p->refusal == NULL) {
        p->word_right = take(p, "\\b");
    }
    if (p->refusal == NULL && p->at < p->size) {
        refuse(p, "it goes on where it should end; \\b and conditions stand at its ends alone");
    }
    return p->refusal == NULL ? root : NO_NODE;
}

/* ------------------------------------------------------------------ positions */

struct fragment {
    uint64_t first[WORDS_MAX], last[WORDS_MAX];
    bool nullable;
};

/* At most POSITIONS_MAX + 1. */
static uint64_t positions_count(const struct parser *p, uint32_t node)
{
    const struct node *n = &p->nodes[node];
    uint64_t count = n->kind == SET;
    if (n->kind == CAT || n->kind == ALT) {
        count = positions_count(p, n->left) + positions_count(p, n->right);
    } else if (n->kind == REPEAT) {
        uint64_t most = n->most != UNBOUNDED ? n->most : n->least > 0 ? n->least : 1;
        count = most * positions_count(p, n->left);
    }
    return count < POSITIONS_MAX + 1 ? count : POSITIONS_MAX + 1;
}

static void join(uint64_t *to, const uint64_t *from, uint32_t words)
{
    for (uint32_t i = 0; i < words; i++) {
        to[i] |= from[i];
    }
}

/* Each position of `from` may be followed by each of `to`. */
static void link_all(struct positions *positions, const uint64_t *from, const uint64_t *to)
{
    for (uint32_t w = 0; w < positions->words; w++) {
        for (uint64_t left = from[w]; left != 0; left &= left - 1) {
            uint32_t position = w * 64 + (uint32_t)__builtin_ctzll(left);
            join(positions->follow + (size_t)position * positions->words, to, positions->words);
        }
    }
}

static void build(const struct parser *p, uint32_t node, struct positions *positions,
                  struct fragment *ret);

static void build_repeat(const struct parser *p, const struct node *n, struct positions *positions,
                         struct fragment *ret)
{
    struct fragment copy;
    uint64_t carry[WORDS_MAX] = {0};
    uint32_t copies = n->most != UNBOUNDED ? n->most : n->least > 0 ? n->least : 1;
    ret->nullable = n->least == 0;
    if (positions_count(p, n->left) == 0) {
        ret->nullable = true;
        return;
    }
    for (uint32_t k = 1; k <= copies; k++) {
        build(p, n->left, positions, &copy);
        link_all(positions, carry, copy.first);
        if (k == 1 || copy.nullable) {
            join(ret->first, copy.first, positions->words);
        }
        if (k >= n->least || copy.nullable) {
            join(ret->last, copy.last, positions->words);
        }
        if (!copy.nullable) {
            memset(carry, 0, sizeof(carry));
        }
        join(carry, copy.last, positions->words);
        ret->nullable = ret->nullable || copy.nullable;
    }
    if (n->most == UNBOUNDED) {
        link_all(positions, copy.last, copy.first);
    }
}

static void build(const struct parser *p, uint32_t node, struct positions *positions,
                  struct fragment *ret)
{
    const struct node *n = &p->nodes[node];
    struct fragment right;
    memset(ret, 0, sizeof(*ret));
    switch (n->kind) {
    case EMPTY:
        ret->nullable = true;
        return;
    case SET:
        memcpy(positions->sets[positions->count], n->set, sizeof(n->set));
        ret->first[positions->count / 64] = ret->last[positions->count / 64] =
            1ull << (positions->count % 64);
        positions->count++;
        return;
    case CAT:
        build(p, n->left, positions, ret);
        build(p, n->right, positions, &right);
        link_all(positions, ret->last, right.first);
        if (ret->nullable) {
            join(ret->first, right.first, positions->words);
        }
        if (!right.nullable) {
            memset(ret->last, 0, sizeof(ret->last));
        }
        join(ret->last, right.last, positions->words);
        ret->nullable = ret->nullable && right.nullable;
        return;
    case ALT:
        build(p, n->left, positions, ret);
        build(p, n->right, positions, &right);
        join(ret->first, right.first, positions->words);
        join(ret->last, right.last, positions->words);
        ret->nullable = ret->nullable || right.nullable;
        return;
    case REPEAT:
        build_repeat(p, n, positions, ret);
        return;
    }
}

/* All bytes that the positions in `bits` take are word characters? */
static bool all_word(const struct positions *positions, const uint64_t *bits)
{
    uint8_t word[32] = {0};
    set_word(word);
    for (uint32_t i = 0; i < positions->count; i++) {
        for (int b = 0; (bits[i / 64] >> (i % 64) & 1) != 0 && b < 32; b++) {
            if ((positions->sets[i][b] & ~word[b]) != 0) {
                return false;
            }
        }
    }
    return true;
}

static void conditions_set(struct parser *p, struct positions *positions)
{
    if ((p->word_left && !all_word(positions, positions->first)) ||
        (p->word_right && !all_word(positions, positions->accept))) {
        refuse(p, "\\b stands where the pattern has other than word characters: say which bytes "
                  "may not stand there, (?<![…]) or (?![…])");
        return;
    }
    if (p->word_left) {
        set_word(p->left);
    }
    if (p->word_right) {
        set_word(p->right);
    }
    positions->has_right = p->has_right || p->word_right;
    memcpy(positions->left, p->left, sizeof(p->left));
    memcpy(positions->right, p->right, sizeof(p->right));
}

/* The tail of an `until` rule: any bytes, up to the first end of the second pattern. */
static void until_build(struct parser *p, uint32_t root, const struct fragment *body,
                        struct positions *positions)
{
    struct fragment end;
    uint64_t any[WORDS_MAX] = {0}, entry[WORDS_MAX];
    uint32_t at = positions->count++;
    memset(positions->sets[at], 0xff, 32);
    any[at / 64] = 1ull << (at % 64);
    build(p, root, positions, &end);
    if (end.nullable) {
        refuse(p, "'until' accepts nothing at all");
    }
    memcpy(entry, end.first, sizeof(entry));
    join(entry, any, positions->words);
    link_all(positions, body->last, entry);
    link_all(positions, any, entry);
    for (uint32_t i = at; i < positions->count; i++) { /* from the body's end on all is a span */
        positions->accept[i / 64] |= 1ull << (i % 64);
    }
    memcpy(positions->stop, end.last, sizeof(positions->stop));
}

static enum cm_status positions_new(const struct cm_rule *rule, uint64_t count,
                                    struct positions *ret, struct cm_error *err)
{
    char text[96];
    if (count > POSITIONS_MAX) {
        snprintf(text, sizeof(text), "its repeats come to more than %u bytes", POSITIONS_MAX);
        return rule_refuse(rule, "CM-RULES-STATES", text, err);
    }
    ret->words = (uint32_t)(count + 63) / 64 + (count == 0);
    ret->sets = calloc(count + 1, sizeof(*ret->sets));
    ret->follow = calloc((count + 1) * ret->words, sizeof(*ret->follow));
    return ret->sets != NULL && ret->follow != NULL
               ? CM_OK
               : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rule '%s'", rule->id);
}

static enum cm_status pattern_refused(const struct cm_rule *rule, const struct parser *p,
                                      const char *which, struct cm_error *err)
{
    char text[300];
    snprintf(text, sizeof(text), "%s, after %zu bytes: %s", which, p->at, p->refusal);
    return rule_refuse(rule, "CM-RULES-PATTERN", text, err);
}

static void body_build(struct parser *p, uint32_t root, struct parser *until, uint32_t until_root,
                       struct positions *positions)
{
    struct fragment body;
    build(p, root, positions, &body);
    memcpy(positions->first, body.first, sizeof(positions->first));
    memcpy(positions->accept, body.last, sizeof(positions->accept));
    if (body.nullable) {
        refuse(p, "it accepts nothing at all");
    }
    conditions_set(p, positions);
    if (until_root != NO_NODE && positions->has_right) {
        refuse(p, "a rule with 'until' has no condition on its right");
    } else if (until_root != NO_NODE) {
        until_build(until, until_root, &body, positions);
    }
}

enum cm_status positions_make(const struct cm_rule *rule, struct positions *ret,
                              struct cm_error *err)
{
    struct parser p = {.text = rule->pattern.bytes, .size = rule->pattern.size, .view = rule->view};
    struct parser until = {.text = rule->until.bytes, .size = rule->until.size};
    uint32_t until_root = NO_NODE;
    enum cm_status status = CM_OK;
    memset(ret, 0, sizeof(*ret));
    p.nodes = calloc(NODES_MAX, sizeof(*p.nodes));
    until.nodes = calloc(until.size > 0 ? NODES_MAX : 1, sizeof(*until.nodes));
    if (p.nodes == NULL || until.nodes == NULL) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rule '%s'", rule->id);
        goto out;
    }
    uint32_t root = pattern_read(&p);
    if (until.size > 0) {
        until_root = pattern_read(&until);
        if (until.has_left || until.has_right || until.word_left || until.word_right) {
            refuse(&until, "it has no conditions");
        }
    }
    if (p.refusal == NULL && until.refusal == NULL) {
        uint64_t count = positions_count(&p, root);
        count += until_root != NO_NODE ? 1 + positions_count(&until, until_root) : 0;
        status = positions_new(rule, count, ret, err);
        if (status == CM_OK) {
            body_build(&p, root, &until, until_root, ret);
        }
    }
    if (status == CM_OK && p.refusal != NULL) {
        status = pattern_refused(rule, &p, "pattern", err);
    } else if (status == CM_OK && until.refusal != NULL) {
        status = pattern_refused(rule, &until, "until", err);
    }
out:
    free(p.nodes);
    free(until.nodes);
    if (status != CM_OK) {
        positions_free(ret);
    }
    return status;
}

void positions_free(struct positions *positions)
{
    free(positions->sets);
    free(positions->follow);
    positions->sets = NULL;
    positions->follow = NULL;
}
