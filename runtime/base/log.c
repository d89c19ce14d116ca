/* JSON lines without allocation. */
#include "runtime/base/log.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE_BYTES 2048

struct line {
    char bytes[LINE_BYTES];
    size_t used;
    bool full;
};

static void line_put(struct line *line, const char *text, size_t size)
{
    /* Two bytes stay free for the closing brace and the newline. */
    if (line->full || size > LINE_BYTES - 2 - line->used) {
        line->full = true;
        return;
    }
    memcpy(line->bytes + line->used, text, size);
    line->used += size;
}

static void line_string(struct line *line, const char *text)
{
    static const char digits[] = "0123456789abcdef";
    line_put(line, "\"", 1);
    for (const unsigned char *at = (const unsigned char *)text; *at != '\0'; at++) {
        char escape[6] = {'\\', 'u', '0', '0', digits[*at >> 4], digits[*at & 15]};
        if (*at == '"' || *at == '\\') {
            char pair[2] = {'\\', (char)*at};
            line_put(line, pair, 2);
        } else if (*at < 0x20 || *at >= 0x7f) {
            line_put(line, escape, sizeof(escape));
        } else {
            line_put(line, (const char *)at, 1);
        }
    }
    line_put(line, "\"", 1);
}

static void line_field(struct line *line, const struct cm_log_field *field)
{
    size_t before = line->used;
    char number[40];
    line_put(line, ",", 1);
    line_string(line, field->name);
    line_put(line, ":", 1);
    if (field->kind == CM_LOG_TEXT) {
        line_string(line, field->text != NULL ? field->text : "");
    } else {
        int size = field->kind == CM_LOG_NUMBER
                       ? snprintf(number, sizeof(number), "%lld", (long long)field->number)
                       : snprintf(number, sizeof(number), "%.6g", field->real);
        line_put(line, number, (size_t)size);
    }
    if (line->full) {
        line->used = before;
    }
}

void cm_log_write(const struct cm_log *log, enum cm_log_level level, const char *event,
                  const struct cm_log_field *fields)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    if (level < log->level) {
        return;
    }
    struct line line = {.used = 0};
    struct timespec now;
    struct tm day;
    char time_text[64];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &day);
    int size =
        snprintf(time_text, sizeof(time_text), "{\"time\":\"%04d-%02d-%02dT%02d:%02d:%02d.%06ldZ\"",
                 day.tm_year + 1900, day.tm_mon + 1, day.tm_mday, day.tm_hour, day.tm_min,
                 day.tm_sec, now.tv_nsec / 1000);
    line_put(&line, time_text, (size_t)size);
    const struct cm_log_field head[] = {CM_LOG_S("level", names[level]),
                                        CM_LOG_S("role", log->role), CM_LOG_S("event", event)};
    for (size_t i = 0; i < sizeof(head) / sizeof(head[0]); i++) {
        line_field(&line, &head[i]);
    }
    for (; fields != NULL && fields->kind != CM_LOG_END && !line.full; fields++) {
        line_field(&line, fields);
    }
    line.bytes[line.used++] = '}';
    line.bytes[line.used++] = '\n';
    /* A log that cannot be written has nowhere to be reported. */
    ssize_t written = write(log->fd, line.bytes, line.used);
    (void)written;
}

void cm_log_error(const struct cm_log *log, const char *event, const struct cm_error *err)
{
    CM_LOG(log, CM_LOG_ERROR, event, CM_LOG_S("id", err->id),
           CM_LOG_S("status", cm_status_name((enum cm_status)err->status)),
           CM_LOG_I("subcode", err->subcode), CM_LOG_S("text", err->text));
}
