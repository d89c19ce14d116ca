/* One plain YAML document: what every policy file is read through.
 *
 * An event pass refuses what libyaml's document API hides (anchors, aliases, tags, several
 * documents, depth); then the document is loaded. Errors name file and line. */
#ifndef CASEMATE_POLICIES_DOCUMENT_H
#define CASEMATE_POLICIES_DOCUMENT_H

#include <yaml.h>

#include "runtime/base/error.h"

struct cm_document {
    yaml_document_t yaml;
    const char *name;     /* of the file, for errors; borrowed */
    const char *error_id; /* borrowed */
};

/* Fails: CONFIG with the document's error id. On CM_OK the caller closes it. */
CM_MUST_USE enum cm_status cm_document_open(struct cm_document *document, const uint8_t *text,
                                            size_t bytes, size_t depth_max, struct cm_error *err);
void cm_document_close(struct cm_document *document);
/* Set the error: "<name>:<line>: <text>"; line counts from 0, as libyaml's marks do. */
CM_MUST_USE enum cm_status cm_document_refuse(const struct cm_document *document, size_t line,
                                              const char *text, struct cm_error *err);

#endif
