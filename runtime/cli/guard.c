/* casemate guard try: what the rules say of a text, shown in it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/guard/unicode.h"
#include "runtime/cli/rules_internal.h"

#define TEXT_BYTES_MAX (16u << 20)
#define FINDINGS_MAX   256u

struct
try {
    struct cli_rules rules;
    bool output, as_json, colour;
    const uint8_t *text;
    size_t size;
    uint8_t *read; /* what came from stdin */
    uint8_t *out;  /* what of a reply would leave */
    uint32_t used;
    bool refused;
    uint32_t count, lost;
    struct cm_finding findings[FINDINGS_MAX];
};

static void finding_add(void *context, const struct cm_finding *finding)
{
    struct try *try = context;
    try->refused = try->refused || finding->action == CM_VERDICT_REFUSE;
    if (try->count < FINDINGS_MAX) {
        try->findings[try->count++] = *finding;
    } else {
        try->lost++;
    }
}

/* The words, or stdin for "-" and for none. */
static enum cm_status text_take(struct try *try, const struct words *words, struct cm_error *err)
{
    if (words->count > 1) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "one text, quoted, or - for stdin");
    }
    if (words->count == 1 && strcmp(words->at[0], "-") != 0) {
        try->text = (const uint8_t *)words->at[0];
        try->size = strlen(words->at[0]);
        return CM_OK;
    }
    try->read = malloc(TEXT_BYTES_MAX + 1);
    if (try->read == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "text");
    }
    try->size = fread(try->read, 1, TEXT_BYTES_MAX + 1, stdin);
    if (ferror(stdin) || try->size > TEXT_BYTES_MAX) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "stdin: %s",
                            ferror(stdin) ? "cannot be read" : "more than 16 MiB");
    }
    try->text = try->read;
    return CM_OK;
}

static enum cm_status text_judge(struct try *try, struct cm_error *err)
{
    static struct cm_findings findings;
    if (try->output) {
        try->out = malloc(CM_GUARD_OUT_BYTES(try->size) + CM_GUARD_REPLACEMENT_MAX);
        if (try->out == NULL) {
            return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "text");
        }
        (void)cli_output_read(try->rules.pack, try->text, try->size, try->out, &try->used,
                              finding_add, try);
        return CM_OK;
    }
    cm_classify(try->rules.classifier, try->rules.pack, try->text, try->size, &findings);
    for (uint32_t i = 0; i < findings.count; i++) {
        finding_add(try, &findings.each[i]);
    }
    try->lost += findings.lost;
    return CM_OK;
}

/* ------------------------------------------------------------------ shown */

/* The gravest action over a byte, 0 for none. */
static uint8_t action_at(const struct try *try, size_t offset)
{
    uint8_t action = 0;
    for (uint32_t i = 0; i < try->count; i++) {
        const struct cm_finding *f = &try->findings[i];
        bool over = offset >= f->start && offset < f->end;
        action = over && f->action > action ? f->action : action;
    }
    return action;
}

/* Bytes of the character at `at`, and its code point; malformed: 1 and UINT32_MAX. */
static uint32_t point_read(const uint8_t *at, size_t left, uint32_t *ret_point)
{
    uint32_t size = at[0] < 0x80 ? 1 : at[0] >= 0xF0 ? 4 : at[0] >= 0xE0 ? 3 : 2;
    uint32_t point = size == 1 ? at[0] : at[0] & (0x7Fu >> size);
    bool whole = size <= left && (at[0] < 0x80 || (at[0] >= 0xC2 && at[0] <= 0xF4));
    for (uint32_t i = 1; whole && i < size; i++) {
        whole = (at[i] & 0xC0) == 0x80;
        point = point << 6 | (at[i] & 0x3F);
    }
    *ret_point = whole && point < 0x110000 ? point : UINT32_MAX;
    return whole ? size : 1;
}

/* Nothing that steers a terminal or cannot be seen gets through as it is. */
static void character_print(const uint8_t *at, uint32_t size, uint32_t point)
{
    if (point == UINT32_MAX || (point < 0x20 && point != '\n' && point != '\t') ||
        (point >= 0x7F && point < 0xA0)) {
        printf("\\x%02x", at[0]);
    } else if ((cm_unicode_kinds[CM_UNICODE_ENTRY(kind, point)].flags & CM_UNICODE_IGNORABLE) !=
               0) {
        printf("<U+%04X>", point);
    } else {
        fwrite(at, 1, size, stdout);
    }
}

static void text_print(const struct try *try)
{
    static const char *const colours[] = {"\033[0m", "\033[30;43m", "\033[30;46m", "\033[97;41m"};
    uint8_t last = 0;
    for (size_t at = 0; at < try->size;) {
        uint32_t point, size = point_read(try->text + at, try->size - at, &point);
        uint8_t action = action_at(try, at);
        if (try->colour && action != last) {
            fputs(colours[action], stdout);
        }
        last = action;
        character_print(try->text + at, size, point);
        at += size;
    }
    puts(try->colour && last != 0 ? colours[0] : "");
}

static void findings_print(const struct try *try)
{
    text_print(try);
    for (uint32_t i = 0; i < try->count; i++) {
        const struct cm_finding *f = &try->findings[i];
        printf("%8u..%-8u %-7s %-26s %-24s %s%s%s\n", f->start, f->end, cli_action_name(f->action),
               f->rule, f->category, cli_class_name(f->class), try->output ? "" : " of ",
               try->output ? "" : cm_document_name((enum cm_document)f->document));
    }
    if (try->lost > 0) {
        printf("%u more were not kept\n", try->lost);
    }
    if (try->output && try->count > 0) {
        printf("what would leave: ");
        for (size_t at = 0; at < try->used;) {
            uint32_t point, size = point_read(try->out + at, try->used - at, &point);
            character_print(try->out + at, size, point);
            at += size;
        }
        putchar('\n');
    }
    if (try->count == 0) {
        puts("no rule finds anything");
    }
}

static void findings_json(const struct try *try)
{
    json_t *rows = json_array();
    for (uint32_t i = 0; i < try->count; i++) {
        const struct cm_finding *f = &try->findings[i];
        json_t *row = json_pack("{s:s, s:s, s:s, s:s, s:i, s:i}", "rule", f->rule, "category",
                                f->category, "action", cli_action_name(f->action), "view",
                                cli_class_name(f->class), "start", f->start, "end", f->end);
        if (!try->output) {
            json_object_set_new(row, "document",
                                json_string(cm_document_name((enum cm_document)f->document)));
        }
        json_array_append_new(rows, row);
    }
    json_t *whole = json_pack("{s:s, s:b, s:i, s:o}", "stage", try->output ? "output" : "input",
                              "refused", try->refused, "lost", try->lost, "findings", rows);
    json_dumpf(whole, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(whole);
}

/* ------------------------------------------------------------------ the command */

static enum cm_status try_run(struct try *try, const struct words *files, const struct words *words,
                              struct cm_error *err)
{
    enum cm_status status = cli_rules_load(&try->rules, files, err);
    if (status == CM_OK && try->rules.pack == NULL) {
        *err = try->rules.first;
        return (enum cm_status)err->status;
    }
    if (status == CM_OK) {
        status = text_take(try, words, err);
    }
    if (status == CM_OK) {
        status = text_judge(try, err);
    }
    if (status != CM_OK) {
        return status;
    }
    try->as_json ? findings_json(try) : findings_print(try);
    for (uint32_t i = 0; i < try->count; i++) {
        if (try->findings[i].action == CM_VERDICT_REFUSE) {
            return cm_error_set(err, CM_E_POLICY, "CM-GUARD-REFUSED",
                                "the guard %s this text (rule %s)",
                                try->output ? "ends a reply of" : "refuses", try->findings[i].rule);
        }
    }
    return CM_OK;
}

enum cm_status command_guard(struct words *words, struct cm_error *err)
{
    static struct try try;
    struct words files = {.count = 0};
    const char *file;
    try.as_json = words_flag_take(words, "json");
    bool input = words_flag_take(words, "input");
    try.output = words_flag_take(words, "output");
    const char *plain = getenv("NO_COLOR"); /* https://no-color.org */
    try.colour = isatty(STDOUT_FILENO) == 1 && (plain == NULL || plain[0] == '\0');
    while ((file = words_value_take(words, "rules")) != NULL && files.count < 16) {
        files.at[files.count++] = (char *)file;
    }
    if (strcmp(words_verb_take(words), "try") != 0 || (input && try.output)) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE",
                            "guard knows: try, with --input or --output");
    }
    enum cm_status status = words_options_refuse(words, err);
    if (status == CM_OK) {
        try.rules.rows = json_array();
        status = try_run(&try, &files, words, err);
    }
    cli_rules_free(&try.rules);
    free(try.read);
    free(try.out);
    return status;
}
