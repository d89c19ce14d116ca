/* Where candidates begin: the literal beginnings of all rules in one automaton (Aho and Corasick,
 * 1975), and a list by first byte for the few rules that begin with a class. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policies/guard/rules_internal.h"

#define FEW_STRINGS  8u  /* the longest beginning that has so few spellings … */
#define SOME_STRINGS 96u /* … or else so few */
#define LEAST_BYTES  2u

struct column_bytes { /* of one automaton: how many bytes, and which */
    uint32_t count[256];
};

/* Spellings of the first `length` bytes, counted up to SOME_STRINGS + 1. */
static uint32_t spellings(const struct automaton *a, const struct column_bytes *bytes,
                          uint32_t state, uint32_t length)
{
    uint32_t count = 0;
    if (length == 0) {
        return 1;
    }
    for (uint32_t c = 0; c < a->columns && count <= SOME_STRINGS; c++) {
        uint32_t to = a->next[(size_t)state * a->columns + c];
        if (to != 0 && bytes->count[c] > SOME_STRINGS) {
            count = SOME_STRINGS + 1;
        } else if (to != 0) {
            count += bytes->count[c] * spellings(a, bytes, to, length - 1);
        }
    }
    return count <= SOME_STRINGS ? count : SOME_STRINGS + 1;
}

uint32_t trigger_length(const struct automaton *a)
{
    struct column_bytes bytes = {.count = {0}};
    uint32_t few = 0, some = 0;
    for (uint32_t byte = 0; byte < 256; byte++) {
        bytes.count[a->map[byte]]++;
    }
    for (uint32_t length = 1; length <= CM_GUARD_TRIGGER_MAX && length <= a->least_bytes;
         length++) {
        uint32_t count = spellings(a, &bytes, 1, length);
        few = count <= FEW_STRINGS ? length : few;
        some = count <= SOME_STRINGS ? length : some;
        if (count > SOME_STRINGS) {
            break;
        }
    }
    few = few >= LEAST_BYTES ? few : some;
    return few >= LEAST_BYTES ? few : 0;
}

struct spell {
    const struct automaton *automaton;
    struct machine *machine;
    struct trigger trigger; /* as far as it is spelt */
    uint32_t length;
};

static void spell_all(struct spell *spell, uint32_t state, uint32_t at)
{
    const struct automaton *a = spell->automaton;
    if (at == spell->length) {
        struct trigger *trigger = &spell->machine->triggers[spell->machine->trigger_count++];
        *trigger = spell->trigger;
        trigger->state = (uint16_t)state;
        trigger->length = (uint8_t)at;
        return;
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t to = a->next[(size_t)state * a->columns + a->map[byte]];
        if (to != 0) {
            spell->trigger.bytes[at] = (uint8_t)byte;
            spell_all(spell, to, at + 1);
        }
    }
}

static enum cm_status rule_begin(const struct cm_rules *rules, const struct compiled *compiled,
                                 uint32_t index, struct machine *machine, struct cm_error *err)
{
    char text[120];
    struct spell spell = {.automaton = &compiled[index].automaton,
                          .machine = machine,
                          .trigger = {.rule = (uint16_t)index},
                          .length = trigger_length(&compiled[index].automaton)};
    if (spell.length > 0) {
        spell_all(&spell, 1, 0);
        return CM_OK;
    }
    if (machine->start_count == CM_GUARD_STARTS_MAX) {
        snprintf(text, sizeof(text),
                 "more than %u rules begin with a class of bytes; begin with two bytes of at most "
                 "%u spellings",
                 CM_GUARD_STARTS_MAX, SOME_STRINGS);
        return rule_refuse(&rules->rules[index], "CM-RULES-SIZE", text, err);
    }
    machine->starts[machine->start_count++] = (uint16_t)index;
    return CM_OK;
}

static void columns_make(struct machine *machine)
{
    bool used[256] = {false};
    uint32_t used_count = 0;
    for (uint32_t i = 0; i < machine->trigger_count; i++) {
        for (uint32_t k = 0; k < machine->triggers[i].length; k++) {
            used[machine->triggers[i].bytes[k]] = true;
        }
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        used_count += used[byte];
    }
    machine->columns = used_count < 256; /* column 0: every byte of no trigger */
    for (uint32_t byte = 0; byte < 256; byte++) {
        machine->column[byte] = used[byte] ? (uint8_t)machine->columns++ : 0;
    }
}

static enum cm_status trie_make(const struct cm_rules *rules, struct machine *m,
                                struct cm_error *err)
{
    m->nodes = 1;
    for (uint32_t i = 0; i < m->trigger_count; i++) {
        struct trigger *trigger = &m->triggers[i];
        uint32_t node = 0;
        for (uint32_t k = 0; k < trigger->length; k++) {
            uint16_t *next = &m->next[(size_t)node * m->columns + m->column[trigger->bytes[k]]];
            if (*next == 0 && m->nodes == CM_GUARD_NODES_MAX) {
                return rule_refuse(&rules->rules[trigger->rule], "CM-RULES-SIZE",
                                   "the beginnings of all rules together are too long", err);
            }
            if (*next == 0) {
                m->depth[m->nodes] = (uint8_t)(k + 1);
                *next = (uint16_t)m->nodes++;
            }
            node = *next;
        }
        trigger->after = m->ends[node];
        m->ends[node] = i + 1;
    }
    return CM_OK;
}

/* Breadth first: where a node has no child, go on as its longest proper tail would. */
static void fails_make(struct machine *m, uint16_t *queue)
{
    uint32_t head = 0, tail = 0;
    for (uint32_t c = 0; c < m->columns; c++) {
        if (m->next[c] != 0) {
            queue[tail++] = m->next[c];
        }
    }
    while (head < tail) {
        uint16_t node = queue[head++];
        for (uint32_t c = 0; c < m->columns; c++) {
            uint16_t *next = &m->next[(size_t)node * m->columns + c];
            uint16_t other = m->next[(size_t)m->fail[node] * m->columns + c];
            if (*next != 0) {
                m->fail[*next] = other;
                queue[tail++] = *next;
            } else {
                *next = other;
            }
        }
    }
    m->hit_count = 0;
    for (uint32_t node = 0; node < m->nodes; node++) {
        for (uint32_t at = node; at != 0; at = m->fail[at]) {
            for (uint32_t i = m->ends[at]; i != 0; i = m->triggers[i - 1].after) {
                m->hit_count++;
            }
        }
    }
}

enum cm_status machine_make(const struct cm_rules *rules, const struct compiled *compiled,
                            uint8_t class, struct machine *ret, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    uint16_t *queue = NULL;
    *ret = (struct machine){.nodes = 0};
    ret->triggers = calloc((size_t)rules->count * SOME_STRINGS + 1, sizeof(*ret->triggers));
    if (ret->triggers == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "triggers");
    }
    for (uint32_t i = 0; status == CM_OK && i < rules->count; i++) {
        if ((rules->rules[i].classes & class) != 0) {
            status = rule_begin(rules, compiled, i, ret, err);
        }
    }
    columns_make(ret);
    size_t most = (size_t)ret->trigger_count * CM_GUARD_TRIGGER_MAX + 1;
    most = most < CM_GUARD_NODES_MAX ? most : CM_GUARD_NODES_MAX;
    ret->next = calloc(most * ret->columns, sizeof(*ret->next));
    ret->depth = calloc(most, sizeof(*ret->depth));
    ret->ends = calloc(most, sizeof(*ret->ends));
    ret->fail = calloc(most, sizeof(*ret->fail));
    queue = calloc(most, sizeof(*queue));
    if (status == CM_OK && (ret->next == NULL || ret->depth == NULL || ret->ends == NULL ||
                            ret->fail == NULL || queue == NULL)) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "triggers");
    }
    if (status == CM_OK) {
        status = trie_make(rules, ret, err);
    }
    if (status == CM_OK) {
        fails_make(ret, queue);
    }
    free(queue);
    if (status != CM_OK) {
        machine_free(ret);
    }
    return status;
}

void machine_free(struct machine *machine)
{
    free(machine->triggers);
    free(machine->next);
    free(machine->depth);
    free(machine->ends);
    free(machine->fail);
    machine->triggers = NULL;
    machine->next = NULL;
    machine->depth = NULL;
    machine->ends = NULL;
    machine->fail = NULL;
}
