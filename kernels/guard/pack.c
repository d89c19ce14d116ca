/* A rule pack into flat arrays: policies/guard/FORMAT.md. */
#include "kernels/guard/guard.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/base/cursor.h"

struct parse {
    struct cm_cursor cursor;
    struct cm_guard_pack *pack;
    size_t used, size; /* of pack->memory */
    uint32_t map_count, cell_count, flag_count;
    const char *refusal; /* the first thing that is wrong; NULL: nothing yet */
};

static void refuse(struct parse *parse, const char *why)
{
    parse->refusal = parse->refusal != NULL ? parse->refusal : why;
}

/* Room for `count` things, each at least as large in the pack as `stored` bytes: so that a count
 * can ask for no more than the pack is long. NULL: refused. */
static void *room(struct parse *parse, uint64_t count, size_t stored, size_t size)
{
    size_t at = (parse->used + 15) / 16 * 16;
    if (count > cm_cursor_left(&parse->cursor) / stored || at > parse->size ||
        count * size > parse->size - at) {
        refuse(parse, "it is cut");
        return NULL;
    }
    parse->used = at + count * size;
    return parse->pack->memory + at;
}

static uint8_t *bytes_read(struct parse *parse, uint64_t count)
{
    uint8_t *to = room(parse, count, 1, 1);
    if (to != NULL) {
        cm_cursor_copy(&parse->cursor, to, count);
    }
    return to;
}

/* Numbers below `limit`. */
static uint16_t *words_read(struct parse *parse, uint64_t count, uint32_t limit)
{
    uint16_t *to = room(parse, count, 2, 2);
    for (uint64_t i = 0; to != NULL && i < count; i++) {
        to[i] = cm_cursor_u16(&parse->cursor);
        if (to[i] >= limit) {
            refuse(parse, "a number is out of its range");
        }
    }
    return to;
}

static bool text_good(const char *text, size_t size)
{
    const char *end = memchr(text, '\0', size);
    return end != NULL && end != text;
}

static void rule_read(struct parse *parse, struct cm_guard_rule *rule)
{
    struct cm_cursor *cursor = &parse->cursor;
    cm_cursor_copy(cursor, rule->id, sizeof(rule->id));
    cm_cursor_copy(cursor, rule->category, sizeof(rule->category));
    cm_cursor_copy(cursor, rule->replacement, sizeof(rule->replacement));
    rule->replacement_bytes = cm_cursor_u16(cursor);
    rule->classes = cm_cursor_u8(cursor);
    rule->action = cm_cursor_u8(cursor);
    rule->validator = cm_cursor_u8(cursor);
    uint8_t has_right = cm_cursor_u8(cursor);
    rule->has_right = has_right != 0;
    rule->firm_byte = cm_cursor_u8(cursor);
    rule->where = cm_cursor_u8(cursor);
    rule->firm_bytes = cm_cursor_u16(cursor);
    rule->states = cm_cursor_u16(cursor);
    rule->columns = cm_cursor_u16(cursor);
    uint16_t reserved_too = cm_cursor_u16(cursor);
    rule->argument = cm_cursor_u32(cursor);
    rule->hold_bytes = cm_cursor_u32(cursor);
    rule->least_bytes = cm_cursor_u32(cursor);
    rule->map = cm_cursor_u32(cursor);
    rule->cells = cm_cursor_u32(cursor);
    rule->flags = cm_cursor_u32(cursor);
    cm_cursor_copy(cursor, rule->left, sizeof(rule->left));
    cm_cursor_copy(cursor, rule->right, sizeof(rule->right));
    if (!text_good(rule->id, sizeof(rule->id)) ||
        !text_good(rule->category, sizeof(rule->category)) ||
        rule->replacement_bytes > CM_GUARD_REPLACEMENT_MAX || rule->classes == 0 ||
        rule->classes >= 1u << CM_GUARD_MACHINES || rule->where == 0 ||
        rule->where > CM_GUARD_ANYWHERE || rule->action < CM_VERDICT_REPORT ||
        rule->action > CM_VERDICT_REFUSE || rule->validator > CM_GUARD_VALID_ENTROPY ||
        rule->argument > 800 || has_right > 1 || reserved_too != 0 ||
        rule->hold_bytes > CM_GUARD_HOLD_MAX || rule->least_bytes == 0 ||
        rule->replacement_bytes > 3 * (uint64_t)rule->least_bytes) {
        refuse(parse, "a rule is out of its bounds");
    }
}

/* A rule's automaton lies in the tables, and never leaves itself. */
static void rule_check(struct parse *parse, const struct cm_guard_rule *rule)
{
    const struct cm_guard_pack *pack = parse->pack;
    uint64_t cells = (uint64_t)rule->states * rule->columns;
    if (rule->states < 2 || rule->states > CM_GUARD_STATES_MAX || rule->columns == 0 ||
        rule->columns > 256 || rule->map >= parse->map_count || rule->cells > parse->cell_count ||
        cells > parse->cell_count - rule->cells || rule->flags > parse->flag_count ||
        rule->states > parse->flag_count - rule->flags) {
        refuse(parse, "a rule's automaton is outside the tables");
        return;
    }
    for (uint64_t i = 0; i < cells; i++) {
        if (pack->cells[rule->cells + i] >= rule->states) {
            refuse(parse, "a rule's automaton leaves its states");
        }
    }
    for (uint32_t i = 0; i < 256; i++) {
        if (pack->maps[rule->map * 256u + i] >= rule->columns) {
            refuse(parse, "a rule's byte map leaves its columns");
        }
    }
}

/* No node claims more text than was seen on every way to it, and none ends a trigger that began
 * before what it claims: that could have left already. */
static void depths_check(struct parse *parse, const struct cm_guard_machine *m)
{
    bool good = m->depth[0] == 0;
    for (uint64_t i = 0; i < (uint64_t)m->nodes * m->columns; i++) {
        good = good && m->depth[m->next[i]] <= m->depth[i / m->columns] + 1u;
    }
    for (uint32_t i = 0; i < m->nodes; i++) {
        good = good && m->depth[i] <= CM_GUARD_TRIGGER_MAX;
        for (uint32_t hit = m->hit_first[i]; hit < m->hit_first[i + 1]; hit++) {
            good = good && m->hits[hit].length <= m->depth[i];
        }
    }
    if (!good) {
        refuse(parse, "a trigger is longer than its text");
    }
}

static void hits_read(struct parse *parse, struct cm_guard_machine *m, uint32_t count)
{
    m->hit_first = room(parse, (uint64_t)m->nodes + 1, 4, sizeof(*m->hit_first));
    for (uint32_t i = 0; m->hit_first != NULL && i <= m->nodes; i++) {
        m->hit_first[i] = cm_cursor_u32(&parse->cursor);
        if (m->hit_first[i] > count || (i > 0 && m->hit_first[i] < m->hit_first[i - 1])) {
            refuse(parse, "triggers are out of order");
        }
    }
    m->hits = room(parse, count, 6, sizeof(*m->hits));
    for (uint32_t i = 0; m->hits != NULL && i < count; i++) {
        m->hits[i].rule = cm_cursor_u16(&parse->cursor);
        m->hits[i].state = cm_cursor_u16(&parse->cursor);
        m->hits[i].length = cm_cursor_u16(&parse->cursor);
        if (m->hits[i].rule >= parse->pack->rule_count ||
            m->hits[i].state >= parse->pack->rules[m->hits[i].rule].states ||
            m->hits[i].length == 0 || m->hits[i].length > CM_GUARD_TRIGGER_MAX) {
            refuse(parse, "a trigger starts no rule");
        }
    }
}

/* The starts as bits, so that a byte asks all of them at once. */
static void starts_index(struct parse *parse, struct cm_guard_machine *m)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        for (uint32_t i = m->start_first[byte]; i < m->start_first[byte + 1]; i++) {
            uint32_t at = 0;
            while (at < m->start_count && m->starts[at] != m->start_rules[i]) {
                at++;
            }
            if (at == CM_GUARD_STARTS_MAX) {
                refuse(parse, "more rules begin with a class than there is room for");
                return;
            }
            m->start_count += at == m->start_count;
            m->starts[at] = m->start_rules[i];
            m->begin_with[byte] |= 1ull << at;
        }
    }
    for (uint32_t at = 0; at < m->start_count; at++) {
        const uint8_t *left = parse->pack->rules[m->starts[at]].left;
        for (uint32_t byte = 0; byte < 256; byte++) {
            m->stand_after[byte] |= (uint64_t)((left[byte >> 3] >> (byte & 7) & 1) == 0) << at;
        }
    }
}

static void machine_read(struct parse *parse, struct cm_guard_machine *m)
{
    m->nodes = cm_cursor_u32(&parse->cursor);
    m->columns = cm_cursor_u32(&parse->cursor);
    uint32_t hits = cm_cursor_u32(&parse->cursor), starts = cm_cursor_u32(&parse->cursor);
    if (m->nodes == 0 || m->nodes > CM_GUARD_NODES_MAX || m->columns == 0 || m->columns > 256 ||
        starts > 256 * CM_GUARD_STARTS_MAX) {
        refuse(parse, "a trigger automaton is out of its bounds");
        return;
    }
    cm_cursor_copy(&parse->cursor, m->column, sizeof(m->column));
    m->next = words_read(parse, (uint64_t)m->nodes * m->columns, m->nodes);
    m->depth = bytes_read(parse, m->nodes);
    hits_read(parse, m, hits);
    for (uint32_t i = 0; i < 257; i++) {
        m->start_first[i] = cm_cursor_u16(&parse->cursor);
        if (m->start_first[i] > starts || (i > 0 && m->start_first[i] < m->start_first[i - 1])) {
            refuse(parse, "starts are out of order");
        }
    }
    m->start_rules = words_read(parse, starts, parse->pack->rule_count);
    for (uint32_t i = 0; i < 256; i++) {
        if (m->column[i] >= m->columns) {
            refuse(parse, "a trigger's byte map leaves its columns");
        }
    }
    if (parse->refusal == NULL) {
        depths_check(parse, m);
        starts_index(parse, m);
    }
}

/* A step reads one cell and knows whether there is more to look at. */
static void cells_flag(struct cm_guard_pack *pack)
{
    _Static_assert(CM_GUARD_STATES_MAX <= CM_GUARD_CELL_STATE + 1u, "a state and flags in a cell");
    for (uint32_t r = 0; r < pack->rule_count; r++) {
        const struct cm_guard_rule *rule = &pack->rules[r];
        for (uint32_t i = 0; i < (uint32_t)rule->states * rule->columns; i++) {
            uint16_t *cell = &pack->cells[rule->cells + i];
            uint16_t state = *cell & CM_GUARD_CELL_STATE;
            /* within the rule even in a pack whose rules share cells */
            uint16_t flags = state < rule->states ? pack->flags[rule->flags + state] & 0xfu : 0;
            *cell = (uint16_t)(*cell | flags << CM_GUARD_CELL_FLAGS);
        }
    }
}

static void tables_read(struct parse *parse)
{
    struct cm_guard_pack *pack = parse->pack;
    pack->rules = room(parse, pack->rule_count, 200, sizeof(*pack->rules));
    for (uint32_t i = 0; parse->refusal == NULL && i < pack->rule_count; i++) {
        rule_read(parse, &pack->rules[i]);
    }
    pack->maps = bytes_read(parse, (uint64_t)parse->map_count * 256);
    pack->cells = words_read(parse, parse->cell_count, CM_GUARD_STATES_MAX);
    pack->flags = bytes_read(parse, parse->flag_count);
    for (uint32_t i = 0; parse->refusal == NULL && i < pack->rule_count; i++) {
        rule_check(parse, &pack->rules[i]);
    }
    for (uint32_t i = 0; parse->refusal == NULL && i < CM_GUARD_MACHINES; i++) {
        machine_read(parse, &pack->machines[i]);
    }
    if (!cm_cursor_ok(&parse->cursor) || cm_cursor_left(&parse->cursor) != 0) {
        refuse(parse, "it is cut, or followed by more");
    }
    if (parse->refusal == NULL) {
        cells_flag(pack);
    }
}

static void head_read(struct parse *parse, size_t size)
{
    struct cm_cursor *cursor = &parse->cursor;
    const uint8_t *mark = cm_cursor_take(cursor, 8);
    if (mark == NULL || memcmp(mark, CM_GUARD_MARK, 8) != 0 ||
        cm_cursor_u32(cursor) != CM_GUARD_VERSION || cm_cursor_u32(cursor) != size ||
        size > CM_GUARD_PACK_BYTES_MAX) {
        refuse(parse, "no rule pack of this version and size");
    }
    parse->pack->rule_count = cm_cursor_u32(cursor);
    parse->map_count = cm_cursor_u32(cursor);
    parse->cell_count = cm_cursor_u32(cursor);
    parse->flag_count = cm_cursor_u32(cursor);
    parse->pack->hold_bytes = cm_cursor_u32(cursor);
    if (parse->pack->rule_count > CM_GUARD_RULES_MAX || parse->map_count > CM_GUARD_RULES_MAX ||
        cm_cursor_u32(cursor) != 0) {
        refuse(parse, "a count is out of its bounds");
    }
}

enum cm_status cm_guard_pack_new(const uint8_t *bytes, size_t size, struct cm_guard_pack **ret_pack,
                                 struct cm_error *err)
{
    struct parse parse = {.cursor = cm_cursor_init(bytes, size)};
    struct cm_guard_pack *pack = calloc(1, sizeof(*pack));
    parse.pack = pack;
    if (pack != NULL) {
        head_read(&parse, size);
    }
    /* Nothing but the rules is larger here than in the pack, and each piece is aligned. */
    if (pack != NULL && parse.refusal == NULL) {
        parse.size = size + pack->rule_count * sizeof(struct cm_guard_rule) + 16 * 32;
        pack->memory = calloc(1, parse.size);
    }
    if (pack == NULL || (parse.refusal == NULL && pack->memory == NULL)) {
        free(pack);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rule pack of %zu bytes", size);
    }
    if (parse.refusal == NULL) {
        tables_read(&parse);
    }
    if (parse.refusal != NULL) {
        cm_guard_pack_free(pack);
        return cm_error_set(err, CM_E_CONFIG, "CM-RULES-PACK",
                            "rule pack of %zu bytes refused near offset %zu: %s", size,
                            parse.cursor.offset, parse.refusal);
    }
    *ret_pack = pack;
    return CM_OK;
}

void cm_guard_pack_free(struct cm_guard_pack *pack)
{
    if (pack != NULL) {
        free(pack->memory);
        free(pack);
    }
}
