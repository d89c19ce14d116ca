/* casemate rules, casemate guard: rules before they serve, and what they say of a text. */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/cli/rules_internal.h"

void cli_rules_free(struct cli_rules *trial)
{
    cm_guard_pack_free(trial->pack);
    cm_classifier_free(trial->classifier);
    cm_rules_free(&trial->rules);
    json_decref(trial->rows);
}

const char *cli_class_name(uint32_t class)
{
    return class == CM_GUARD_OUTPUT     ? "output"
           : class == CM_GUARD_INPUT    ? "input"
           : class == CM_GUARD_FOLDED   ? "folded"
           : class == CM_GUARD_WORDS    ? "words"
           : class == CM_GUARD_SQUEEZED ? "squeezed"
                                        : "both";
}

const char *cli_action_name(uint32_t action)
{
    static const char *const names[] = {"", "report", "redact", "refuse"};
    return names[action];
}

static void fault_add(struct cli_rules *trial, const struct cm_error *err)
{
    if (trial->faults++ == 0) {
        trial->first = *err;
    }
    if (trial->as_json) {
        json_array_append_new(trial->rows,
                              json_pack("{s:s, s:s}", "error", err->id, "text", err->text));
    } else {
        fprintf(stderr, "casemate: %s: %s\n", err->id, err->text);
    }
}

/* The rules of the files; without any, the built-in ones. A file that cannot be read is one fault.
 */
static enum cm_status rules_read(struct cli_rules *trial, const struct words *files,
                                 struct cm_error *err)
{
    enum cm_status status = CM_OK;
    if (files->count == 0) {
        return cm_rules_built_in(&trial->rules, err);
    }
    uint8_t *text = malloc(CM_RULES_FILE_BYTES + 1);
    if (text == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rules");
    }
    for (int i = 0; i < files->count && status == CM_OK; i++) {
        size_t used = 0;
        bool built_in;
        status = cli_file_read(files->at[i], text, CM_RULES_FILE_BYTES + 1, &used, err);
        if (status == CM_OK) {
            status = cm_rules_read(&trial->rules, files->at[i], text, used, &built_in, err);
        }
    }
    free(text);
    return status;
}

/* Each rule alone, so that each fault is told; then all of them. */
static void rules_compile(struct cli_rules *trial)
{
    struct cm_error err;
    uint8_t *bytes = NULL;
    for (uint32_t i = 0; i < trial->rules.count; i++) {
        struct cm_rules one = {.rules = &trial->rules.rules[i], .count = 1, .capacity = 1};
        if (cm_rules_compile(&one, &bytes, &trial->pack_bytes, &err) == CM_OK) {
            free(bytes);
        } else {
            fault_add(trial, &err);
        }
    }
    if (trial->faults > 0) {
        return;
    }
    if (cm_rules_compile(&trial->rules, &bytes, &trial->pack_bytes, &err) != CM_OK) {
        fault_add(trial, &err);
        return;
    }
    if (cm_guard_pack_new(bytes, trial->pack_bytes, &trial->pack, &err) != CM_OK ||
        cm_classifier_new(&trial->classifier, &err) != CM_OK) {
        fault_add(trial, &err);
    }
    free(bytes);
}

enum cm_status cli_rules_load(struct cli_rules *trial, const struct words *files,
                              struct cm_error *err)
{
    enum cm_status status = rules_read(trial, files, err);
    if (status == CM_OK) {
        rules_compile(trial);
    }
    return status;
}

/* ------------------------------------------------------------------ what rules find */

static void finding_of(const struct cm_guard_pack *pack, const struct cm_guard_verdict *verdict,
                       struct cm_finding *ret_finding)
{
    memset(ret_finding, 0, sizeof(*ret_finding));
    ret_finding->action = verdict->action;
    ret_finding->class = CM_GUARD_OUTPUT;
    ret_finding->start = (uint32_t)verdict->start;
    ret_finding->end = (uint32_t)verdict->end;
    snprintf(ret_finding->rule, sizeof(ret_finding->rule), "%s",
             verdict->rule < pack->rule_count ? pack->rules[verdict->rule].id : "overflow");
    snprintf(ret_finding->category, sizeof(ret_finding->category), "%s",
             verdict->rule < pack->rule_count ? pack->rules[verdict->rule].category : "guard");
}

bool cli_output_read(const struct cm_guard_pack *pack, const uint8_t *text, size_t size,
                     uint8_t *ret_out, uint32_t *ret_used, cli_finding_each each, void *context)
{
    struct cm_guard_state state;
    struct cm_finding finding;
    bool open = true, over = false;
    *ret_used = 0;
    cm_guard_begin(&state, CM_GUARD_OUTPUT);
    for (size_t at = 0; !over;) {
        size_t take = size - at < CM_GUARD_SLICE ? size - at : CM_GUARD_SLICE;
        open = take > 0
                   ? cm_guard_feed(pack, &state, text + at, take, ret_out, ret_used)
                   : cm_guard_finish(pack, &state, CM_GUARD_TEXT_END, NULL, 0, ret_out, ret_used);
        for (uint32_t i = 0; i < state.verdict_count; i++) {
            finding_of(pack, &state.verdicts[i], &finding);
            each(context, &finding);
        }
        state.verdict_count = 0;
        over = !open || take == 0;
        at += take;
    }
    return open;
}

struct wanted {
    const char *rule;
    bool found;
};

static void wanted_look(void *context, const struct cm_finding *finding)
{
    struct wanted *wanted = context;
    wanted->found = wanted->found || strcmp(finding->rule, wanted->rule) == 0;
}

static bool rule_finds(struct cli_rules *trial, const struct cm_rule *rule,
                       const struct cm_rules_text *text)
{
    static uint8_t out[CM_GUARD_OUT_BYTES(CM_RULES_SAMPLE_BYTES) + CM_GUARD_REPLACEMENT_MAX];
    static struct cm_findings findings;
    struct wanted wanted = {.rule = rule->id};
    uint32_t used;
    if ((rule->classes & CM_GUARD_OUTPUT) != 0) {
        (void)cli_output_read(trial->pack, text->bytes, text->size, out, &used, wanted_look,
                              &wanted);
        return wanted.found;
    }
    cm_classify(trial->classifier, trial->pack, text->bytes, text->size, &findings);
    for (uint32_t i = 0; i < findings.count; i++) {
        wanted_look(&wanted, &findings.each[i]);
    }
    return wanted.found;
}

static uint32_t samples_run(struct cli_rules *trial, const struct cm_rule *rule)
{
    struct cm_error err;
    uint32_t count = rule->positive_count + rule->negative_count;
    for (uint32_t i = 0; i < count; i++) {
        bool positive = i < rule->positive_count;
        uint32_t at = positive ? i : i - rule->positive_count;
        const struct cm_rules_text *text = positive ? &rule->positive[at] : &rule->negative[at];
        if (rule_finds(trial, rule, text) != positive) {
            (void)cm_error_set(&err, CM_E_CONFIG, "CM-RULES-SAMPLE",
                               "%s:%u: rule '%s': %s sample %u: expected %s, found %s: \"%.60s\"",
                               rule->file, rule->line, rule->id, positive ? "positive" : "negative",
                               at + 1, positive ? "a match" : "none", positive ? "none" : "a match",
                               (const char *)text->bytes);
            fault_add(trial, &err);
        }
    }
    return count;
}

/* ------------------------------------------------------------------ rules check, rules test */

static void rule_print(struct cli_rules *trial, const struct cm_rule *rule, uint32_t samples)
{
    if (trial->as_json) {
        json_array_append_new(
            trial->rows,
            json_pack("{s:s, s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i}", "id", rule->id, "place",
                      rule->file, "class", cli_class_name(rule->classes), "category",
                      rule->category, "action", cli_action_name(rule->action), "line", rule->line,
                      "hold_bytes", rule->hold_bytes, "states", rule->states, "samples", samples));
    } else {
        printf("%-28s %-8s %-7s holds %3u bytes  %4u states  %2u samples\n", rule->id,
               cli_class_name(rule->classes), cli_action_name(rule->action), rule->hold_bytes,
               rule->states, samples);
    }
}

static enum cm_status rules_run(struct cli_rules *trial, bool each, const struct words *files,
                                struct cm_error *err)
{
    uint32_t samples = 0;
    enum cm_status status = cli_rules_load(trial, files, err);
    if (status != CM_OK) {
        return status;
    }
    for (uint32_t i = 0; trial->faults == 0 && i < trial->rules.count; i++) {
        if (each) {
            rule_print(trial, &trial->rules.rules[i],
                       trial->rules.rules[i].positive_count + trial->rules.rules[i].negative_count);
        }
    }
    for (uint32_t i = 0; trial->pack != NULL && i < trial->rules.count; i++) {
        samples += samples_run(trial, &trial->rules.rules[i]);
    }
    if (trial->as_json) {
        json_t *whole = json_pack("{s:i, s:i, s:I, s:i, s:O}", "rules", trial->rules.count,
                                  "samples", samples, "pack_bytes", (json_int_t)trial->pack_bytes,
                                  "faults", trial->faults, "rows", trial->rows);
        json_dumpf(whole, stdout, JSON_INDENT(2));
        putchar('\n');
        json_decref(whole);
    } else {
        printf("%u rules, %u samples, a pack of %zu bytes: %u faults\n", trial->rules.count,
               samples, trial->pack_bytes, trial->faults);
    }
    if (trial->faults > 0) {
        return cm_error_set(err, (enum cm_status)trial->first.status, trial->first.id,
                            "%u faults in %u rules", trial->faults, trial->rules.count);
    }
    return CM_OK;
}

const char *words_verb_take(struct words *words)
{
    const char *verb = words->count > 0 ? words->at[0] : "";
    if (words->count > 0) {
        words->count--;
        memmove(words->at, words->at + 1, (size_t)words->count * sizeof(words->at[0]));
    }
    return verb;
}

enum cm_status words_options_refuse(const struct words *words, struct cm_error *err)
{
    for (int i = 0; i < words->count; i++) {
        if (strncmp(words->at[i], "--", 2) == 0) {
            return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "there is no option %.64s",
                                words->at[i]);
        }
    }
    return CM_OK;
}

enum cm_status command_rules(struct words *words, struct cm_error *err)
{
    struct cli_rules trial = {.as_json = words_flag_take(words, "json")};
    const char *verb = words_verb_take(words);
    bool check = strcmp(verb, "check") == 0;
    if (!check && strcmp(verb, "test") != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "rules knows: check, test");
    }
    enum cm_status status = words_options_refuse(words, err);
    if (status == CM_OK) {
        trial.rows = json_array();
        status = rules_run(&trial, check, words, err);
    }
    cli_rules_free(&trial);
    return status;
}
