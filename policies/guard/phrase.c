/* The proof that a trigger word alone never refuses: least counts over every accepted string. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "policies/guard/rules_internal.h"

#define WORDS_LEAST 4u
#define SIGNS_LEAST 4u
#define BYTES_LEAST 12u
#define UNREACHED   UINT32_MAX

static bool is_plain(uint32_t byte)
{
    return (byte >= 'a' && byte <= 'z') || (byte >= '0' && byte <= '9') || byte == ' ' ||
           byte >= 0x80 || (byte >= '\t' && byte <= '\r');
}

static bool counts(const struct cm_rule *rule, uint32_t byte)
{
    return rule->view == CM_GUARD_WORDS    ? byte == ' '
           : rule->view == CM_GUARD_FOLDED ? !is_plain(byte)
                                           : true;
}

/* The least count of bytes on a way from the start to each state: Bellman and Ford. The counts are
 * whole and never rise, so it ends. */
static void least_counts(const struct cm_rule *rule, const struct automaton *a, uint32_t *least)
{
    bool changed = true;
    for (uint32_t i = 0; i < a->states; i++) {
        least[i] = i == 1 ? 0 : UNREACHED;
    }
    while (changed) {
        changed = false;
        for (uint32_t state = 1; state < a->states; state++) {
            for (uint32_t byte = 0; least[state] != UNREACHED && byte < 256; byte++) {
                uint32_t next = a->next[(size_t)state * a->columns + a->map[byte]];
                uint32_t count = least[state] + counts(rule, byte);
                if (next != 0 && count < least[next]) {
                    least[next] = count;
                    changed = true;
                }
            }
        }
    }
}

/* Does every match begin and end with a space? */
static bool between_spaces(const struct automaton *a)
{
    for (uint32_t state = 1; state < a->states; state++) {
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t next = a->next[(size_t)state * a->columns + a->map[byte]];
            bool accepts = next != 0 && (a->flags[next] & CM_GUARD_STATE_ACCEPT) != 0;
            if (byte != ' ' && ((state == 1 && next != 0) || accepts)) {
                return false;
            }
        }
    }
    return true;
}

enum cm_status phrase_prove(const struct cm_rule *rule, const struct automaton *automaton,
                            struct cm_error *err)
{
    char text[200];
    bool words = rule->view == CM_GUARD_WORDS;
    uint32_t found = UNREACHED;
    if (rule->view == 0 || rule->action != CM_VERDICT_REFUSE) {
        return CM_OK;
    }
    if (words && !between_spaces(automaton)) {
        return rule_refuse(rule, "CM-RULES-PHRASE",
                           "a pattern of whole words begins and ends with a space", err);
    }
    uint32_t *least = malloc(automaton->states * sizeof(*least));
    if (least == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rules");
    }
    least_counts(rule, automaton, least);
    for (uint32_t i = 1; i < automaton->states; i++) {
        bool accepts = (automaton->flags[i] & CM_GUARD_STATE_ACCEPT) != 0;
        found = accepts && least[i] < found ? least[i] : found;
    }
    free(least);
    found -= words; /* spaces around words are one more than words */
    uint32_t wanted = words                           ? WORDS_LEAST
                      : rule->view == CM_GUARD_FOLDED ? SIGNS_LEAST
                                                      : BYTES_LEAST;
    if (found >= wanted) {
        return CM_OK;
    }
    snprintf(
        text, sizeof(text),
        "its shortest match has %u %s; a rule that refuses needs %u, so that no word refuses alone",
        found,
        words                           ? "words"
        : rule->view == CM_GUARD_FOLDED ? "signs that are no letter, digit or space"
                                        : "letters",
        wanted);
    return rule_refuse(rule, "CM-RULES-PHRASE", text, err);
}
