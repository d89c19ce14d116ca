/* YAML by libyaml: one plain document. */
#include "policies/document.h"

#include <stdbool.h>
#include <stdio.h>

enum cm_status cm_document_refuse(const struct cm_document *document, size_t line, const char *text,
                                  struct cm_error *err)
{
    return cm_error_set(err, CM_E_CONFIG, document->error_id, "%s:%zu: %s", document->name,
                        line + 1, text);
}

static enum cm_status syntax_refuse(const struct cm_document *document, const yaml_parser_t *parser,
                                    struct cm_error *err)
{
    char text[160];
    snprintf(text, sizeof(text), "not YAML: %s", parser->problem != NULL ? parser->problem : "?");
    return cm_document_refuse(document, parser->problem_mark.line, text, err);
}

/* What is wrong with one event, or NULL. */
static const char *event_refusal(const yaml_event_t *event, size_t *documents, size_t *depth,
                                 size_t depth_max)
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
    return *depth > depth_max ? "nested too deep" : NULL;
}

static enum cm_status events_check(const struct cm_document *document, const uint8_t *text,
                                   size_t bytes, size_t depth_max, struct cm_error *err)
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
            status = syntax_refuse(document, &parser, err);
            break;
        }
        const char *refusal = event_refusal(&event, &documents, &depth, depth_max);
        if (refusal != NULL) {
            status = cm_document_refuse(document, event.start_mark.line, refusal, err);
        }
        end = event.type == YAML_STREAM_END_EVENT;
        yaml_event_delete(&event);
    }
    yaml_parser_delete(&parser);
    return status;
}

enum cm_status cm_document_open(struct cm_document *document, const uint8_t *text, size_t bytes,
                                size_t depth_max, struct cm_error *err)
{
    enum cm_status status = events_check(document, text, bytes, depth_max, err);
    if (status != CM_OK) {
        return status;
    }
    yaml_parser_t parser;
    CM_ASSERT(yaml_parser_initialize(&parser) == 1);
    yaml_parser_set_input_string(&parser, text, bytes);
    if (!yaml_parser_load(&parser, &document->yaml)) {
        status = syntax_refuse(document, &parser, err);
    }
    yaml_parser_delete(&parser);
    return status;
}

void cm_document_close(struct cm_document *document)
{
    yaml_document_delete(&document->yaml);
}
