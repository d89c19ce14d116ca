/* casemate.yaml: two sections of keys and values. */
#include "policies/config/config.h"

#include <stdio.h>
#include <string.h>

#include "policies/document.h"

#define DEPTH_MAX 4

struct reader {
    struct cm_configuration *configuration;
    const char *folder;
    struct cm_document document;
};

static enum cm_status refuse(const struct reader *reader, size_t line, const char *text,
                             struct cm_error *err)
{
    return cm_document_refuse(&reader->document, line, text, err);
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
    snprintf(place, sizeof(place), "%s:%zu", reader->document.name, node->start_mark.line + 1);
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
        const yaml_node_t *entry = yaml_document_get_node(&reader->document.yaml, *item);
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
    snprintf(place, sizeof(place), "%s:%zu", reader->document.name, node->start_mark.line + 1);
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
        status =
            pair_read(reader, section, yaml_document_get_node(&reader->document.yaml, pair->key),
                      yaml_document_get_node(&reader->document.yaml, pair->value), err);
    }
    return status;
}

static enum cm_status root_read(struct reader *reader, struct cm_error *err)
{
    const yaml_node_t *root = yaml_document_get_root_node(&reader->document.yaml);
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
        const yaml_node_t *key = yaml_document_get_node(&reader->document.yaml, pair->key);
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
                              yaml_document_get_node(&reader->document.yaml, pair->value), err);
    }
    return status;
}

enum cm_status cm_config_text_read(struct cm_configuration *configuration, const uint8_t *text,
                                   size_t bytes, const char *name, const char *folder,
                                   struct cm_error *err)
{
    struct reader reader = {.configuration = configuration,
                            .folder = folder,
                            .document = {.name = name, .error_id = "CM-CONFIG-FORM"}};
    enum cm_status status = cm_document_open(&reader.document, text, bytes, DEPTH_MAX, err);
    if (status == CM_OK) {
        status = root_read(&reader, err);
        cm_document_close(&reader.document);
    }
    return status;
}
