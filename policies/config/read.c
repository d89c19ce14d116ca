/* YAML by libyaml: one plain document of two sections. An event pass refuses what the document API
 * hides (anchors, aliases, tags, several documents); the document pass reads keys and values. */
#include "policies/config/config.h"

#include <stdio.h>
#include <string.h>
#include <yaml.h>

#define DEPTH_MAX 4

struct reader {
    struct cm_configuration *configuration;
    const char *name;
    const char *folder;
    yaml_document_t document;
};

static enum cm_status refuse(const struct reader *reader, size_t line, const char *text,
                             struct cm_error *err)
{
    return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-FORM", "%s:%zu: %s", reader->name, line + 1,
                        text);
}

static enum cm_status syntax_refuse(const struct reader *reader, const yaml_parser_t *parser,
                                    struct cm_error *err)
{
    char text[160];
    snprintf(text, sizeof(text), "not YAML: %s", parser->problem != NULL ? parser->problem : "?");
    return refuse(reader, parser->problem_mark.line, text, err);
}

/* What is wrong with one event, or NULL. */
static const char *event_refusal(const yaml_event_t *event, size_t *documents, size_t *depth)
{
    const yaml_char_t *anchor = NULL;
    const yaml_char_t *tag = NULL;
    switch (event->type) {
    case YAML_ALIAS_EVENT:
        return "aliases are refused: write the value out";
    case YAML_DOCUMENT_START_EVENT:
        return ++*documents > 1 ? "a second document is refused" : NULL;
    case YAML_SCALAR_EVENT:
        anchor = event->data.scalar.anchor;
        tag = event->data.scalar.tag;
        break;
    case YAML_SEQUENCE_START_EVENT:
        anchor = event->data.sequence_start.anchor;
        tag = event->data.sequence_start.tag;
        ++*depth;
        break;
    case YAML_MAPPING_START_EVENT:
        anchor = event->data.mapping_start.anchor;
        tag = event->data.mapping_start.tag;
        ++*depth;
        break;
    case YAML_SEQUENCE_END_EVENT:
    case YAML_MAPPING_END_EVENT:
        --*depth;
        break;
    case YAML_NO_EVENT:
    case YAML_STREAM_START_EVENT:
    case YAML_STREAM_END_EVENT:
    case YAML_DOCUMENT_END_EVENT:
        break;
    }
    if (anchor != NULL) {
        return "anchors are refused: write the value out";
    }
    if (tag != NULL) {
        return "tags are refused";
    }
    return *depth > DEPTH_MAX ? "nested too deep" : NULL;
}

static enum cm_status events_check(const struct reader *reader, const uint8_t *text, size_t bytes,
                                   struct cm_error *err)
{
    enum cm_status status = CM_OK;
    yaml_parser_t parser;
    size_t documents = 0;
    size_t depth = 0;
    CM_ASSERT(yaml_parser_initialize(&parser) == 1);
    yaml_parser_set_input_string(&parser, text, bytes);
    for (bool end = false; !end && status == CM_OK;) {
        yaml_event_t event;
        if (!yaml_parser_parse(&parser, &event)) {
            status = syntax_refuse(reader, &parser, err);
            break;
        }
        const char *refusal = event_refusal(&event, &documents, &depth);
        if (refusal != NULL) {
            status = refuse(reader, event.start_mark.line, refusal, err);
        }
        end = event.type == YAML_STREAM_END_EVENT;
        yaml_event_delete(&event);
    }
    yaml_parser_delete(&parser);
    return status;
}

static const char *node_word(const yaml_node_t *node)
{
    return node->type == YAML_MAPPING_NODE    ? "a mapping"
           : node->type == YAML_SEQUENCE_NODE ? "a list"
                                              : "a value";
}

/* A scalar's text. Quotes make it text in YAML, so a quoted number or truth value is refused. */
static enum cm_status scalar_read(struct reader *reader, const yaml_node_t *node, size_t row,
                                  struct cm_error *err)
{
    char place[CM_CONFIG_TEXT_BYTES];
    const struct cm_config_row *schema = &cm_config_rows[row];
    bool plain = node->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
    const char *text = (const char *)node->data.scalar.value;
    size_t bytes = node->data.scalar.length;
    if (!plain && (schema->kind == CM_CONFIG_NUMBER || schema->kind == CM_CONFIG_BOOL)) {
        char what[160];
        snprintf(what, sizeof(what), "%s: expected %s, found quoted text; leave the quotes out",
                 schema->name, schema->kind == CM_CONFIG_NUMBER ? "a number" : "true or false");
        return refuse(reader, node->start_mark.line, what, err);
    }
    snprintf(place, sizeof(place), "%s:%zu", reader->name, node->start_mark.line + 1);
    return cm_config_value_set(reader->configuration, row, text, bytes, reader->folder, place, err);
}

/* A list of names, joined by commas for the one value parser. */
static enum cm_status list_read(struct reader *reader, const yaml_node_t *node, size_t row,
                                struct cm_error *err)
{
    char joined[CM_CONFIG_TLS_NAMES * CM_NAME_BYTES];
    char place[CM_CONFIG_TEXT_BYTES];
    size_t used = 0;
    yaml_node_item_t *item = node->data.sequence.items.start;
    for (; item < node->data.sequence.items.top; item++) {
        const yaml_node_t *entry = yaml_document_get_node(&reader->document, *item);
        if (entry == NULL || entry->type != YAML_SCALAR_NODE ||
            memchr(entry->data.scalar.value, ',', entry->data.scalar.length) != NULL ||
            entry->data.scalar.length + 1 > sizeof(joined) - used) {
            return refuse(reader, entry != NULL ? entry->start_mark.line : node->start_mark.line,
                          "tls_names: expected 1 to 8 names of 1 to 63 bytes", err);
        }
        if (item > node->data.sequence.items.start) {
            joined[used++] = ',';
        }
        memcpy(joined + used, entry->data.scalar.value, entry->data.scalar.length);
        used += entry->data.scalar.length;
    }
    snprintf(place, sizeof(place), "%s:%zu", reader->name, node->start_mark.line + 1);
    return cm_config_value_set(reader->configuration, row, joined, used, NULL, place, err);
}

static enum cm_status unknown_refuse(const struct reader *reader, const yaml_node_t *key,
                                     struct cm_error *err)
{
    const char *name = (const char *)key->data.scalar.value;
    const char *near = cm_config_nearest(name, key->data.scalar.length);
    char text[256];
    snprintf(text, sizeof(text), "unknown key \"%.64s\"%s%s%s", name,
             near != NULL ? "; did you mean \"" : "", near != NULL ? near : "",
             near != NULL ? "\"?" : "");
    return refuse(reader, key->start_mark.line, text, err);
}

static enum cm_status pair_read(struct reader *reader, enum cm_config_section section,
                                const yaml_node_t *key, const yaml_node_t *value,
                                struct cm_error *err)
{
    static const char *const sections[] = {"sealed", "site"};
    char text[256];
    if (key->type != YAML_SCALAR_NODE) {
        return refuse(reader, key->start_mark.line, "a key must be a plain word", err);
    }
    int row = cm_config_row_find((const char *)key->data.scalar.value, key->data.scalar.length);
    if (row < 0) {
        return unknown_refuse(reader, key, err);
    }
    const struct cm_config_row *schema = &cm_config_rows[row];
    if (schema->section != section) {
        snprintf(text, sizeof(text), "%s stands under \"%s:\", not \"%s:\"", schema->name,
                 sections[schema->section], sections[section]);
        return refuse(reader, key->start_mark.line, text, err);
    }
    if (reader->configuration->lines[row] != 0) {
        snprintf(text, sizeof(text), "%s is given twice, first in line %u", schema->name,
                 reader->configuration->lines[row]);
        return refuse(reader, key->start_mark.line, text, err);
    }
    reader->configuration->lines[row] = (uint32_t)key->start_mark.line + 1;
    reader->configuration->sources[row] = CM_CONFIG_FROM_FILE;
    if (value->type == YAML_SCALAR_NODE && schema->kind != CM_CONFIG_NAMES) {
        return scalar_read(reader, value, (size_t)row, err);
    }
    if (value->type == YAML_SEQUENCE_NODE && schema->kind == CM_CONFIG_NAMES) {
        return list_read(reader, value, (size_t)row, err);
    }
    snprintf(text, sizeof(text), "%s: expected %s, found %s", schema->name,
             schema->kind == CM_CONFIG_NAMES ? "a list" : "one value", node_word(value));
    return refuse(reader, value->start_mark.line, text, err);
}

static enum cm_status section_read(struct reader *reader, enum cm_config_section section,
                                   const yaml_node_t *node, struct cm_error *err)
{
    if (node->type == YAML_SCALAR_NODE && node->data.scalar.length == 0) {
        return CM_OK; /* `site:` with nothing under it */
    }
    if (node->type != YAML_MAPPING_NODE) {
        return refuse(reader, node->start_mark.line, "a section holds `key: value` lines", err);
    }
    enum cm_status status = CM_OK;
    yaml_node_pair_t *pair = node->data.mapping.pairs.start;
    for (; status == CM_OK && pair < node->data.mapping.pairs.top; pair++) {
        status = pair_read(reader, section, yaml_document_get_node(&reader->document, pair->key),
                           yaml_document_get_node(&reader->document, pair->value), err);
    }
    return status;
}

static enum cm_status root_read(struct reader *reader, struct cm_error *err)
{
    const yaml_node_t *root = yaml_document_get_root_node(&reader->document);
    if (root == NULL) {
        return CM_OK; /* an empty file: defaults */
    }
    if (root->type != YAML_MAPPING_NODE) {
        return refuse(reader, root->start_mark.line,
                      "expected the sections sealed: and site:", err);
    }
    bool seen[2] = {false, false};
    enum cm_status status = CM_OK;
    yaml_node_pair_t *pair = root->data.mapping.pairs.start;
    for (; status == CM_OK && pair < root->data.mapping.pairs.top; pair++) {
        const yaml_node_t *key = yaml_document_get_node(&reader->document, pair->key);
        const char *name =
            key->type == YAML_SCALAR_NODE ? (const char *)key->data.scalar.value : "";
        bool sealed = strcmp(name, "sealed") == 0;
        char text[160];
        if (!sealed && strcmp(name, "site") != 0) {
            int row = cm_config_row_find(name, strlen(name));
            snprintf(text, sizeof(text), "unknown section \"%.64s\"; %s", name,
                     row < 0 ? "there are sealed: and site:"
                     : cm_config_rows[row].section == CM_CONFIG_SEALED
                         ? "this key stands under sealed:"
                         : "this key stands under site:");
            return refuse(reader, key->start_mark.line, text, err);
        }
        if (seen[sealed]) {
            snprintf(text, sizeof(text), "section \"%s\" is given twice", name);
            return refuse(reader, key->start_mark.line, text, err);
        }
        seen[sealed] = true;
        status = section_read(reader, sealed ? CM_CONFIG_SEALED : CM_CONFIG_SITE,
                              yaml_document_get_node(&reader->document, pair->value), err);
    }
    return status;
}

enum cm_status cm_config_text_read(struct cm_configuration *configuration, const uint8_t *text,
                                   size_t bytes, const char *name, const char *folder,
                                   struct cm_error *err)
{
    struct reader reader = {.configuration = configuration, .name = name, .folder = folder};
    enum cm_status status = events_check(&reader, text, bytes, err);
    if (status != CM_OK) {
        return status;
    }
    yaml_parser_t parser;
    CM_ASSERT(yaml_parser_initialize(&parser) == 1);
    yaml_parser_set_input_string(&parser, text, bytes);
    if (!yaml_parser_load(&parser, &reader.document)) {
        status = syntax_refuse(&reader, &parser, err);
    } else {
        status = root_read(&reader, err);
        yaml_document_delete(&reader.document);
    }
    yaml_parser_delete(&parser);
    return status;
}
