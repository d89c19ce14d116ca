/* Logs: one JSON object a line, built in a fixed buffer, written with one write.
 *
 * No prompt, reply, key or token may ever be a field's value; a test serves requests and searches
 * the log for their text. Roles log to descriptor 4 (the supervisor's pipe). */
#ifndef CASEMATE_RUNTIME_BASE_LOG_H
#define CASEMATE_RUNTIME_BASE_LOG_H

#include <stdint.h>

#include "runtime/base/error.h"

enum cm_log_level { CM_LOG_DEBUG, CM_LOG_INFO, CM_LOG_WARN, CM_LOG_ERROR };

enum cm_log_kind { CM_LOG_END = 0, CM_LOG_TEXT, CM_LOG_NUMBER, CM_LOG_REAL };

struct cm_log_field {
    enum cm_log_kind kind;
    const char *name; /* snake_case, unit last */
    const char *text;
    int64_t number;
    double real;
};

#define CM_LOG_S(field_name, value)                                                                \
    {                                                                                              \
        .kind = CM_LOG_TEXT, .name = (field_name), .text = (value)                                 \
    }
#define CM_LOG_I(field_name, value)                                                                \
    {                                                                                              \
        .kind = CM_LOG_NUMBER, .name = (field_name), .number = (int64_t)(value)                    \
    }
#define CM_LOG_F(field_name, value)                                                                \
    {                                                                                              \
        .kind = CM_LOG_REAL, .name = (field_name), .real = (value)                                 \
    }

struct cm_log {
    int fd;
    const char *role; /* static string */
    enum cm_log_level level;
};

/* Write one line: {"time":…,"level":…,"role":…,"event":…,fields…}. `fields` ends with kind END, or
 * is NULL. Lines longer than 2 KiB are cut at a field border. Never fails, never blocks long. */
void cm_log_write(const struct cm_log *log, enum cm_log_level level, const char *event,
                  const struct cm_log_field *fields);
/* Log an error object: id, status, subcode, text. */
void cm_log_error(const struct cm_log *log, const char *event, const struct cm_error *err);

#define CM_LOG(log, level, event, ...)                                                             \
    cm_log_write((log), (level), (event), (const struct cm_log_field[]){__VA_ARGS__, {0}})

#endif
