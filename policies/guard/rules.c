/* Rule files: the schema, one row for each key, and the one reader of it. */
#include "policies/guard/rules.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "policies/document.h"
#include "policies/guard/rules_internal.h"

#define DEPTH_MAX 5

struct choice {
    const char *name;
    uint8_t value;
};

static const struct choice classes[] = {{"output", CM_GUARD_OUTPUT},
                                        {"input", CM_GUARD_INPUT},
                                        {"both", CM_GUARD_OUTPUT | CM_GUARD_INPUT},
                                        {NULL, 0}};
static const struct choice views[] = {{"raw", 0},
                                      {"folded", CM_GUARD_FOLDED},
                                      {"words", CM_GUARD_WORDS},
                                      {"squeezed", CM_GUARD_SQUEEZED},
                                      {NULL, 0}};
static const struct choice places[] = {{"anywhere", CM_GUARD_ANYWHERE},
                                       {"text", CM_GUARD_IN_TEXT},
                                       {"hidden", CM_GUARD_IN_HIDDEN},
                                       {"encoded", CM_GUARD_IN_ENCODED},
                                       {"unseen", CM_GUARD_IN_HIDDEN | CM_GUARD_IN_ENCODED},
                                       {NULL, 0}};
static const struct choice actions[] = {{"report", CM_VERDICT_REPORT},
                                        {"redact", CM_VERDICT_REDACT},
                                        {"refuse", CM_VERDICT_REFUSE},
                                        {NULL, 0}};
static const struct choice validators[] = {{"luhn", CM_GUARD_VALID_LUHN},
                                           {"iban", CM_GUARD_VALID_IBAN},
                                           {"entropy", CM_GUARD_VALID_ENTROPY},
                                           {NULL, 0}};

enum kind { NAME, CHOICE, NUMBER, TEXT, TEXTS };

struct row {
    const char *key;
    enum kind kind;
    bool required;
    size_t most; /* NAME, TEXT: bytes; NUMBER: value */
    size_t offset;
    size_t count_offset;          /* TEXTS */
    const struct choice *choices; /* CHOICE */
    const char *expected;
};

#define AT(field) offsetof(struct cm_rule, field)

static const struct row rows[] = {
    {"id", NAME, true, CM_RULE_ID_BYTES - 1, AT(id), 0, NULL, "1 to 47 of a-z, 0-9 and '-'"},
    {"class", CHOICE, true, 0, AT(classes), 0, classes, "output, input or both"},
    {"category", NAME, true, CM_CATEGORY_BYTES - 1, AT(category), 0, NULL,
     "1 to 31 of a-z, 0-9, '-' and '/'"},
    {"action", CHOICE, true, 0, AT(action), 0, actions, "report, redact or refuse"},
    {"view", CHOICE, false, 0, AT(view), 0, views, "raw, folded, words or squeezed"},
    {"where", CHOICE, false, 0, AT(where), 0, places, "anywhere, text, hidden, encoded or unseen"},
    {"pattern", TEXT, true, CM_RULES_PATTERN_BYTES, AT(pattern), 0, NULL, "1 to 2048 bytes"},
    {"until", TEXT, false, CM_RULES_PATTERN_BYTES, AT(until), 0, NULL, "1 to 2048 bytes"},
    {"validator", CHOICE, false, 0, AT(validator), 0, validators, "luhn, iban or entropy"},
    {"entropy", NUMBER, false, 800, AT(argument), 0, NULL, "hundredths of a bit a byte, 1 to 800"},
    {"firm_bytes", NUMBER, false, CM_GUARD_HOLD_MAX, AT(firm_bytes), 0, NULL, "1 to 640"},
    {"firm_byte", CHOICE, false, 0, AT(firm_byte), 0, NULL, "one printable character"},
    {"replacement", TEXT, false, CM_GUARD_REPLACEMENT_MAX, AT(replacement), 0, NULL,
     "1 to 64 printable ASCII characters"},
    {"positive", TEXTS, true, CM_RULES_SAMPLE_BYTES, AT(positive), AT(positive_count), NULL,
     "a list of 1 to 32 texts that the rule finds something in"},
    {"negative", TEXTS, true, CM_RULES_SAMPLE_BYTES, AT(negative), AT(negative_count), NULL,
     "a list of 1 to 32 texts that the rule finds nothing in"},
};
#define ROW_COUNT (sizeof(rows) / sizeof(rows[0]))

struct reader {
    struct cm_document document;
    struct cm_rules *rules;
};

static enum cm_status refuse(const struct reader *reader, const yaml_node_t *node, const char *key,
                             const char *text, struct cm_error *err)
{
    char whole[300];
    snprintf(whole, sizeof(whole), "%s%s%s", key, key[0] != '\0' ? ": " : "", text);
    return cm_document_refuse(&reader->document, node->start_mark.line, whole, err);
}

static const yaml_node_t *node_at(struct reader *reader, int index)
{
    return yaml_document_get_node(&reader->document.yaml, index);
}

static const char *scalar(const yaml_node_t *node, size_t *ret_size)
{
    *ret_size = node->type == YAML_SCALAR_NODE ? node->data.scalar.length : 0;
    return node->type == YAML_SCALAR_NODE ? (const char *)node->data.scalar.value : "";
}

static bool name_good(const char *text, size_t size, size_t most, bool slash)
{
    bool good = size > 0 && size <= most;
    for (size_t i = 0; good && i < size; i++) {
        good = (text[i] >= 'a' && text[i] <= 'z') || (text[i] >= '0' && text[i] <= '9') ||
               text[i] == '-' || (slash && text[i] == '/');
    }
    return good;
}

static bool printable(const char *text, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        if (text[i] < 0x20 || text[i] > 0x7e) {
            return false;
        }
    }
    return size > 0;
}

static enum cm_status text_copy(const char *text, size_t size, struct cm_rules_text *ret,
                                struct cm_error *err)
{
    ret->bytes = malloc(size + 1);
    if (ret->bytes == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rules");
    }
    memcpy(ret->bytes, text, size);
    ret->bytes[size] = '\0';
    ret->size = size;
    return CM_OK;
}

static bool number_read(const char *text, size_t size, size_t most, uint32_t *ret_value)
{
    uint32_t value = 0;
    bool good = size > 0 && size <= 4 && text[0] != '0';
    for (size_t i = 0; good && i < size; i++) {
        good = text[i] >= '0' && text[i] <= '9';
        value = value * 10 + (uint32_t)(text[i] - '0');
    }
    *ret_value = value;
    return good && value <= most;
}

static enum cm_status texts_read(struct reader *reader, const struct row *row,
                                 const yaml_node_t *node, struct cm_rule *rule,
                                 struct cm_error *err)
{
    struct cm_rules_text *texts = (void *)((char *)rule + row->offset);
    uint32_t *count = (void *)((char *)rule + row->count_offset);
    if (node->type != YAML_SEQUENCE_NODE) {
        return refuse(reader, node, row->key, row->expected, err);
    }
    yaml_node_item_t *item = node->data.sequence.items.start;
    for (; item < node->data.sequence.items.top; item++) {
        size_t size;
        const yaml_node_t *entry = node_at(reader, *item);
        const char *text = scalar(entry, &size);
        if (*count == CM_RULES_SAMPLES_MAX || size == 0 || size > row->most) {
            return refuse(reader, entry, row->key, row->expected, err);
        }
        enum cm_status status = text_copy(text, size, &texts[*count], err);
        if (status != CM_OK) {
            return status;
        }
        ++*count;
    }
    return *count > 0 ? CM_OK : refuse(reader, node, row->key, row->expected, err);
}

/* A choice's number, or the byte itself where the row has no list. False: none of them. */
static bool choice_read(const struct row *row, const char *text, size_t size, uint8_t *ret_value)
{
    if (row->choices == NULL) {
        *ret_value = (uint8_t)text[0];
        return size == 1 && printable(text, size);
    }
    for (const struct choice *choice = row->choices; choice->name != NULL; choice++) {
        if (strlen(choice->name) == size && memcmp(choice->name, text, size) == 0) {
            *ret_value = choice->value;
            return true;
        }
    }
    return false;
}

static enum cm_status value_read(struct reader *reader, const struct row *row,
                                 const yaml_node_t *node, struct cm_rule *rule,
                                 struct cm_error *err)
{
    size_t size;
    const char *text = scalar(node, &size);
    void *to = (char *)rule + row->offset;
    bool good = size > 0;
    switch (row->kind) {
    case NAME:
        good = name_good(text, size, row->most, row->offset == AT(category));
        if (good) {
            memcpy(to, text, size);
        }
        break;
    case CHOICE:
        good = choice_read(row, text, size, to);
        break;
    case NUMBER:
        good = number_read(text, size, row->most, to);
        break;
    case TEXT:
        good = size > 0 && size <= row->most &&
               (row->offset != AT(replacement) || printable(text, size));
        if (good) {
            return text_copy(text, size, to, err);
        }
        break;
    case TEXTS:
        return texts_read(reader, row, node, rule, err);
    }
    return good ? CM_OK : refuse(reader, node, row->key, row->expected, err);
}

/* What one key alone does not show. */
static const char *rule_refusal(const struct cm_rule *rule)
{
    if (rule->action == CM_VERDICT_REDACT && (rule->classes & CM_GUARD_OUTPUT) == 0) {
        return "a prompt is refused or reported, never redacted";
    }
    if ((rule->view != 0 || rule->where != 0) && rule->classes != CM_GUARD_INPUT) {
        return "'view' and 'where' go with the class input, and with it alone";
    }
    if (rule->view != 0 && (rule->validator != CM_GUARD_VALID_ALWAYS || rule->until.size > 0)) {
        return "'validator' and 'until' are asked of raw bytes, not of a view";
    }
    if ((rule->action == CM_VERDICT_REDACT) != (rule->replacement.size > 0)) {
        return "'replacement' goes with the action redact, and with it alone";
    }
    if ((rule->validator == CM_GUARD_VALID_ENTROPY) != (rule->argument > 0)) {
        return "'entropy' goes with the validator entropy, and with it alone";
    }
    if (rule->until.size > 0 && rule->validator != CM_GUARD_VALID_ALWAYS) {
        return "a rule with 'until' has no validator";
    }
    return NULL;
}

static enum cm_status rule_finish(struct reader *reader, const yaml_node_t *node,
                                  struct cm_rule *rule, const bool seen[static ROW_COUNT],
                                  struct cm_error *err)
{
    for (size_t i = 0; i < ROW_COUNT; i++) {
        if (rows[i].required && !seen[i]) {
            char text[64];
            snprintf(text, sizeof(text), "a rule without '%s'", rows[i].key);
            return refuse(reader, node, rule->id, text, err);
        }
    }
    if (rule_refusal(rule) != NULL) {
        return refuse(reader, node, rule->id, rule_refusal(rule), err);
    }
    rule->where = rule->where != 0 ? rule->where : CM_GUARD_ANYWHERE;
    rule->classes = rule->view != 0 ? rule->view : rule->classes;
    for (uint32_t i = 0; i + 1 < reader->rules->count; i++) {
        if (strcmp(reader->rules->rules[i].id, rule->id) == 0) {
            return refuse(reader, node, rule->id, "another rule has this id", err);
        }
    }
    return CM_OK;
}

static enum cm_status rule_new(struct reader *reader, const yaml_node_t *node,
                               struct cm_rule **ret_rule, struct cm_error *err)
{
    struct cm_rules *rules = reader->rules;
    if (rules->count == CM_GUARD_RULES_MAX) {
        return refuse(reader, node, "rules", "more than 4096 rules", err);
    }
    if (rules->count == rules->capacity) {
        uint32_t capacity = rules->capacity == 0 ? 64 : 2 * rules->capacity;
        struct cm_rule *larger = realloc(rules->rules, capacity * sizeof(*larger));
        if (larger == NULL) {
            return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rules");
        }
        rules->rules = larger;
        rules->capacity = capacity;
    }
    struct cm_rule *rule = &rules->rules[rules->count++];
    memset(rule, 0, sizeof(*rule));
    snprintf(rule->file, sizeof(rule->file), "%.255s", reader->document.name);
    rule->line = (uint32_t)node->start_mark.line + 1;
    *ret_rule = rule;
    return CM_OK;
}

static enum cm_status rule_read(struct reader *reader, const yaml_node_t *node,
                                struct cm_error *err)
{
    bool seen[ROW_COUNT] = {false};
    struct cm_rule *rule = NULL;
    enum cm_status status = rule_new(reader, node, &rule, err);
    if (status == CM_OK && node->type != YAML_MAPPING_NODE) {
        return refuse(reader, node, "rules", "each rule is a mapping of keys", err);
    }
    yaml_node_pair_t *pair = status == CM_OK ? node->data.mapping.pairs.start : NULL;
    for (; status == CM_OK && pair < node->data.mapping.pairs.top; pair++) {
        size_t size, row = 0;
        const yaml_node_t *key = node_at(reader, pair->key);
        const char *name = scalar(key, &size);
        while (row < ROW_COUNT &&
               (strlen(rows[row].key) != size || memcmp(rows[row].key, name, size) != 0)) {
            row++;
        }
        if (row == ROW_COUNT || seen[row]) {
            char text[120];
            snprintf(text, sizeof(text), "%s key '%.40s' in a rule",
                     row == ROW_COUNT ? "unknown" : "twice the", name);
            return refuse(reader, key, rule->id, text, err);
        }
        seen[row] = true;
        status = value_read(reader, &rows[row], node_at(reader, pair->value), rule, err);
    }
    return status == CM_OK ? rule_finish(reader, node, rule, seen, err) : status;
}

static enum cm_status top_read(struct reader *reader, bool *ret_built_in, struct cm_error *err)
{
    const yaml_node_t *root = yaml_document_get_root_node(&reader->document.yaml);
    enum cm_status status = CM_OK;
    bool rules_seen = false, built_in_seen = false;
    *ret_built_in = true;
    if (root == NULL || root->type != YAML_MAPPING_NODE) {
        return cm_document_refuse(&reader->document, 0, "expected `rules:` with a list", err);
    }
    yaml_node_pair_t *pair = root->data.mapping.pairs.start;
    for (; status == CM_OK && pair < root->data.mapping.pairs.top; pair++) {
        size_t size, value_size;
        const yaml_node_t *key = node_at(reader, pair->key), *value = node_at(reader, pair->value);
        const char *name = scalar(key, &size), *text = scalar(value, &value_size);
        if (strcmp(name, "built_in") == 0 && !built_in_seen &&
            (strcmp(text, "true") == 0 || strcmp(text, "false") == 0)) {
            built_in_seen = true;
            *ret_built_in = strcmp(text, "true") == 0;
        } else if (strcmp(name, "rules") == 0 && !rules_seen && value->type == YAML_SEQUENCE_NODE) {
            rules_seen = true;
            yaml_node_item_t *item = value->data.sequence.items.start;
            for (; status == CM_OK && item < value->data.sequence.items.top; item++) {
                status = rule_read(reader, node_at(reader, *item), err);
            }
        } else {
            return refuse(reader, key, "",
                          "expected `rules:` with a list, and perhaps `built_in: false`, each once",
                          err);
        }
    }
    return status == CM_OK && !rules_seen
               ? cm_document_refuse(&reader->document, 0, "expected `rules:` with a list", err)
               : status;
}

enum cm_status cm_rules_read(struct cm_rules *rules, const char *name, const uint8_t *text,
                             size_t bytes, bool *ret_built_in, struct cm_error *err)
{
    struct reader reader = {.rules = rules,
                            .document = {.name = name, .error_id = "CM-RULES-FORM"}};
    enum cm_status status = cm_document_open(&reader.document, text, bytes, DEPTH_MAX, err);
    if (status == CM_OK) {
        status = top_read(&reader, ret_built_in, err);
        cm_document_close(&reader.document);
    }
    return status;
}

static enum cm_status file_read(const char *path, uint8_t **ret_text, size_t *ret_bytes,
                                struct cm_error *err)
{
    size_t used = 0;
    ssize_t got = 1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint8_t *text = malloc(CM_RULES_FILE_BYTES + 1);
    while (fd >= 0 && text != NULL && got > 0 && used <= CM_RULES_FILE_BYTES) {
        got = read(fd, text + used, CM_RULES_FILE_BYTES + 1 - used);
        used += got > 0 ? (size_t)got : 0;
    }
    int error_number = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (fd < 0 || text == NULL || got < 0 || used > CM_RULES_FILE_BYTES) {
        free(text);
        return cm_error_set(
            err, CM_E_CONFIG, "CM-RULES-OPEN", "cannot read the rules in %s: %s", path,
            used > CM_RULES_FILE_BYTES ? "more than 8 MiB" : strerrordesc_np(error_number));
    }
    *ret_text = text;
    *ret_bytes = used;
    return CM_OK;
}

enum cm_status cm_rules_load(struct cm_rules *rules, const char *path, struct cm_error *err)
{
    uint8_t *text = NULL;
    size_t bytes = 0;
    bool built_in = true;
    enum cm_status status = CM_OK;
    if (path[0] != '\0') {
        status = file_read(path, &text, &bytes, err);
        if (status == CM_OK) {
            status = cm_rules_read(rules, path, text, bytes, &built_in, err);
        }
        free(text);
    }
    return status == CM_OK && built_in ? cm_rules_built_in(rules, err) : status;
}

void cm_rules_free(struct cm_rules *rules)
{
    for (uint32_t i = 0; i < rules->count; i++) {
        struct cm_rule *rule = &rules->rules[i];
        free(rule->pattern.bytes);
        free(rule->until.bytes);
        free(rule->replacement.bytes);
        for (uint32_t k = 0; k < CM_RULES_SAMPLES_MAX; k++) {
            free(rule->positive[k].bytes);
            free(rule->negative[k].bytes);
        }
    }
    free(rules->rules);
    memset(rules, 0, sizeof(*rules));
}
