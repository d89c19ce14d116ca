/* Rules → automata → one pack: FORMAT.md. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policies/guard/rules_internal.h"
#include "runtime/base/cursor.h"

enum cm_status rule_refuse(const struct cm_rule *rule, const char *id, const char *text,
                           struct cm_error *err)
{
    return cm_error_set(err, CM_E_CONFIG, id, "%s:%u: rule '%s': %s", rule->file, rule->line,
                        rule->id, text);
}

struct pack {
    struct cm_rules *rules;
    struct compiled *compiled; /* [count] */
    uint32_t *map_of;          /* [count] index of a rule's byte map */
    const uint8_t **maps;      /* [map_count] */
    uint32_t map_count, cell_count, flag_count, hold_bytes;
    struct machine machines[CM_GUARD_MACHINES];
    uint8_t *bytes;
    size_t size;
    struct cm_writer writer;
};

/* What only all parts together show. */
static enum cm_status rule_limits(struct cm_rule *rule, const struct automaton *a,
                                  struct cm_error *err)
{
    char text[200];
    rule->hold_bytes = a->hold_bytes;
    rule->least_bytes = a->least_bytes;
    rule->states = a->states;
    rule->trigger_bytes = trigger_length(a);
    if (rule->firm_bytes == 0) { /* a beginning of literals is evidence enough */
        rule->firm_bytes = rule->firm_byte == 0 ? 1 : CM_GUARD_HOLD_MAX;
    }
    if (rule->replacement.size > 3 * (size_t)a->least_bytes) {
        snprintf(
            text, sizeof(text),
            "its replacement has %zu bytes, its shortest match %u: at most three times as long",
            rule->replacement.size, a->least_bytes);
        return rule_refuse(rule, "CM-RULES-SIZE", text, err);
    }
    return CM_OK;
}

static enum cm_status rule_compile(struct pack *pack, uint32_t index, struct cm_error *err)
{
    struct positions positions;
    struct cm_rule *rule = &pack->rules->rules[index];
    struct compiled *to = &pack->compiled[index];
    enum cm_status status = positions_make(rule, &positions, err);
    if (status != CM_OK) {
        return status;
    }
    status = automaton_make(rule, &positions, &to->automaton, err);
    to->has_right = positions.has_right;
    memcpy(to->left, positions.left, sizeof(to->left));
    memcpy(to->right, positions.right, sizeof(to->right));
    positions_free(&positions);
    if (status == CM_OK) {
        status = rule_limits(rule, &to->automaton, err);
    }
    if (status == CM_OK) {
        status = phrase_prove(rule, &to->automaton, err);
    }
    return status;
}

/* Many rules share the map of a common class. */
static void map_place(struct pack *pack, uint32_t index)
{
    const uint8_t *map = pack->compiled[index].automaton.map;
    for (uint32_t i = 0; i < pack->map_count; i++) {
        if (memcmp(pack->maps[i], map, 256) == 0) {
            pack->map_of[index] = i;
            return;
        }
    }
    pack->map_of[index] = pack->map_count;
    pack->maps[pack->map_count++] = map;
}

/* ------------------------------------------------------------------ replacements */

/* Does a rule find a span in these bytes, wherever it stands? Conditions and validators are left
 * out: a replacement must not come near. */
static bool finds(const struct automaton *a, const uint8_t *bytes, size_t size)
{
    for (size_t start = 0; start < size; start++) {
        uint32_t state = 1;
        for (size_t at = start; at < size && state != 0; at++) {
            state = a->next[(size_t)state * a->columns + a->map[bytes[at]]];
            if ((a->flags[state] & CM_GUARD_STATE_ACCEPT) != 0) {
                return true;
            }
        }
    }
    return false;
}

static enum cm_status replacements_check(const struct pack *pack, struct cm_error *err)
{
    const struct cm_rules *rules = pack->rules;
    for (uint32_t i = 0; i < rules->count; i++) {
        const struct cm_rules_text *text = &rules->rules[i].replacement;
        if (text->size == 0 ||
            (i > 0 && text->size == rules->rules[i - 1].replacement.size &&
             memcmp(text->bytes, rules->rules[i - 1].replacement.bytes, text->size) == 0)) {
            continue; /* none, or as the one before */
        }
        for (uint32_t k = 0; k < rules->count; k++) {
            if (finds(&pack->compiled[k].automaton, text->bytes, text->size)) {
                char why[160];
                snprintf(why, sizeof(why), "its replacement is itself found by rule '%s'",
                         rules->rules[k].id);
                return rule_refuse(&rules->rules[i], "CM-RULES-REPLACEMENT", why, err);
            }
        }
    }
    return CM_OK;
}

/* ------------------------------------------------------------------ writing */

static void text_write(struct cm_writer *w, const void *text, size_t size, size_t field)
{
    static const uint8_t zeros[CM_GUARD_REPLACEMENT_MAX];
    cm_writer_bytes(w, text, size);
    cm_writer_bytes(w, zeros, field - size);
}

static void rule_write(struct pack *pack, uint32_t index, uint32_t cells, uint32_t flags)
{
    const struct cm_rule *rule = &pack->rules->rules[index];
    const struct compiled *compiled = &pack->compiled[index];
    struct cm_writer *w = &pack->writer;
    text_write(w, rule->id, strlen(rule->id), CM_RULE_ID_BYTES);
    text_write(w, rule->category, strlen(rule->category), CM_CATEGORY_BYTES);
    text_write(w, rule->replacement.bytes, rule->replacement.size, CM_GUARD_REPLACEMENT_MAX);
    cm_writer_u16(w, (uint16_t)rule->replacement.size);
    cm_writer_u8(w, rule->classes);
    cm_writer_u8(w, rule->action);
    cm_writer_u8(w, rule->validator);
    cm_writer_u8(w, compiled->has_right);
    cm_writer_u8(w, rule->firm_byte);
    cm_writer_u8(w, rule->where);
    cm_writer_u16(w, (uint16_t)rule->firm_bytes);
    cm_writer_u16(w, (uint16_t)compiled->automaton.states);
    cm_writer_u16(w, (uint16_t)compiled->automaton.columns);
    cm_writer_u16(w, 0);
    cm_writer_u32(w, rule->argument);
    cm_writer_u32(w, rule->hold_bytes);
    cm_writer_u32(w, rule->least_bytes);
    cm_writer_u32(w, pack->map_of[index]);
    cm_writer_u32(w, cells);
    cm_writer_u32(w, flags);
    cm_writer_bytes(w, compiled->left, 32);
    cm_writer_bytes(w, compiled->right, 32);
}

static void words_write(struct cm_writer *w, const uint16_t *words, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        cm_writer_u16(w, words[i]);
    }
}

static void rules_write(struct pack *pack)
{
    struct cm_writer *w = &pack->writer;
    uint32_t cells = 0, flags = 0;
    for (uint32_t i = 0; i < pack->rules->count; i++) {
        const struct automaton *a = &pack->compiled[i].automaton;
        rule_write(pack, i, cells, flags);
        cells += a->states * a->columns;
        flags += a->states;
    }
    for (uint32_t i = 0; i < pack->map_count; i++) {
        cm_writer_bytes(w, pack->maps[i], 256);
    }
    for (uint32_t i = 0; i < pack->rules->count; i++) {
        const struct automaton *a = &pack->compiled[i].automaton;
        words_write(w, a->next, (size_t)a->states * a->columns);
    }
    for (uint32_t i = 0; i < pack->rules->count; i++) {
        cm_writer_bytes(w, pack->compiled[i].automaton.flags, pack->compiled[i].automaton.states);
    }
}

static void hits_write(struct cm_writer *w, const struct machine *m)
{
    uint32_t first = 0;
    for (int pass = 0; pass < 2; pass++) { /* where each node's hits begin, then the hits */
        for (uint32_t node = 0; node < m->nodes; node++) {
            if (pass == 0) {
                cm_writer_u32(w, first);
            }
            for (uint32_t at = node; at != 0; at = m->fail[at]) {
                for (uint32_t i = m->ends[at]; i != 0; i = m->triggers[i - 1].after) {
                    const struct trigger *trigger = &m->triggers[i - 1];
                    first++;
                    if (pass == 1) {
                        cm_writer_u16(w, trigger->rule);
                        cm_writer_u16(w, trigger->state);
                        cm_writer_u16(w, trigger->length);
                    }
                }
            }
        }
        if (pass == 0) {
            cm_writer_u32(w, first);
        }
    }
}

/* Does this rule begin with this byte? */
static bool begins(const struct automaton *a, uint32_t byte)
{
    return a->next[a->columns + a->map[byte]] != 0;
}

static uint32_t starts_count(const struct pack *pack, const struct machine *m, uint32_t byte_end)
{
    uint32_t count = 0;
    for (uint32_t byte = 0; byte < byte_end; byte++) {
        for (uint32_t i = 0; i < m->start_count; i++) {
            count += begins(&pack->compiled[m->starts[i]].automaton, byte);
        }
    }
    return count;
}

static void machine_write(struct pack *pack, const struct machine *m)
{
    struct cm_writer *w = &pack->writer;
    cm_writer_u32(w, m->nodes);
    cm_writer_u32(w, m->columns);
    cm_writer_u32(w, m->hit_count);
    cm_writer_u32(w, starts_count(pack, m, 256));
    cm_writer_bytes(w, m->column, 256);
    words_write(w, m->next, (size_t)m->nodes * m->columns);
    cm_writer_bytes(w, m->depth, m->nodes);
    hits_write(w, m);
    for (uint32_t byte = 0; byte <= 256; byte++) {
        cm_writer_u16(w, (uint16_t)starts_count(pack, m, byte));
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        for (uint32_t i = 0; i < m->start_count; i++) {
            if (begins(&pack->compiled[m->starts[i]].automaton, byte)) {
                cm_writer_u16(w, m->starts[i]);
            }
        }
    }
}

static size_t machine_bytes(const struct pack *pack, const struct machine *m)
{
    return 16 + 256 + 2 * (size_t)m->nodes * m->columns + m->nodes + 4 * ((size_t)m->nodes + 1) +
           6 * (size_t)m->hit_count + 2 * 257 + 2 * (size_t)starts_count(pack, m, 256);
}

static enum cm_status pack_write(struct pack *pack, struct cm_error *err)
{
    enum {
        HEAD = 40,
        RULE = CM_RULE_ID_BYTES + CM_CATEGORY_BYTES + CM_GUARD_REPLACEMENT_MAX + 104
    };
    pack->size = HEAD + (size_t)RULE * pack->rules->count + 256 * (size_t)pack->map_count +
                 2 * (size_t)pack->cell_count + pack->flag_count;
    for (uint32_t i = 0; i < CM_GUARD_MACHINES; i++) {
        pack->size += machine_bytes(pack, &pack->machines[i]);
    }
    if (pack->size > CM_GUARD_PACK_BYTES_MAX) {
        return cm_error_set(err, CM_E_CONFIG, "CM-RULES-SIZE",
                            "%u rules compile to %zu bytes; %u are allowed", pack->rules->count,
                            pack->size, CM_GUARD_PACK_BYTES_MAX);
    }
    pack->bytes = malloc(pack->size);
    if (pack->bytes == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rule pack");
    }
    pack->writer = cm_writer_init(pack->bytes, pack->size);
    struct cm_writer *w = &pack->writer;
    cm_writer_bytes(w, CM_GUARD_MARK, 8);
    cm_writer_u32(w, CM_GUARD_VERSION);
    cm_writer_u32(w, (uint32_t)pack->size);
    cm_writer_u32(w, pack->rules->count);
    cm_writer_u32(w, pack->map_count);
    cm_writer_u32(w, pack->cell_count);
    cm_writer_u32(w, pack->flag_count);
    cm_writer_u32(w, pack->hold_bytes);
    cm_writer_u32(w, 0);
    rules_write(pack);
    for (uint32_t i = 0; i < CM_GUARD_MACHINES; i++) {
        machine_write(pack, &pack->machines[i]);
    }
    CM_ASSERT(!w->failed && w->offset == pack->size);
    return CM_OK;
}

static enum cm_status pack_make(struct pack *pack, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    for (uint32_t i = 0; status == CM_OK && i < pack->rules->count; i++) {
        const struct automaton *a = &pack->compiled[i].automaton;
        status = rule_compile(pack, i, err);
        if (status == CM_OK) {
            map_place(pack, i);
            pack->cell_count += a->states * a->columns;
            pack->flag_count += a->states;
            pack->hold_bytes = a->hold_bytes > pack->hold_bytes ? a->hold_bytes : pack->hold_bytes;
        }
        if (status == CM_OK && pack->cell_count > CM_GUARD_PACK_BYTES_MAX / 2) {
            status =
                rule_refuse(&pack->rules->rules[i], "CM-RULES-SIZE",
                            "the automata of the rules up to here are too large together", err);
        }
    }
    if (status == CM_OK) {
        status = replacements_check(pack, err);
    }
    for (uint32_t i = 0; status == CM_OK && i < CM_GUARD_MACHINES; i++) {
        struct machine machine;
        status = machine_make(pack->rules, pack->compiled, (uint8_t)(1u << i), &machine, err);
        if (status == CM_OK) {
            pack->machines[i] = machine;
        }
    }
    return status == CM_OK ? pack_write(pack, err) : status;
}

enum cm_status cm_rules_compile(struct cm_rules *rules, uint8_t **ret_pack, size_t *ret_bytes,
                                struct cm_error *err)
{
    struct pack pack = {.rules = rules};
    enum cm_status status;
    pack.compiled = calloc(rules->count + 1, sizeof(*pack.compiled));
    pack.map_of = calloc(rules->count + 1, sizeof(*pack.map_of));
    pack.maps = calloc(rules->count + 1, sizeof(*pack.maps));
    if (pack.compiled == NULL || pack.map_of == NULL || pack.maps == NULL) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rules");
        goto out;
    }
    status = pack_make(&pack, err);
    if (status == CM_OK) {
        *ret_pack = pack.bytes;
        *ret_bytes = pack.size;
        pack.bytes = NULL;
    }
out:
    for (uint32_t i = 0; pack.compiled != NULL && i < rules->count; i++) {
        automaton_free(&pack.compiled[i].automaton);
    }
    for (uint32_t i = 0; i < CM_GUARD_MACHINES; i++) {
        machine_free(&pack.machines[i]);
    }
    free(pack.compiled);
    free(pack.map_of);
    free(pack.maps);
    free(pack.bytes);
    return status;
}
