/* Status names, exit codes and the fixed-size error object. */
#include "runtime/base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name;
    int exit_code;
} statuses[CM_STATUS_COUNT] = {
    [CM_OK] = {"ok", 0},
    [CM_E_USAGE] = {"usage", 2},
    [CM_E_CONFIG] = {"config", 3},
    [CM_E_PACKAGE] = {"package", 4},
    [CM_E_POLICY] = {"policy", 5},
    [CM_E_TPM] = {"tpm", 6},
    [CM_E_EVIDENCE] = {"evidence", 7},
    [CM_E_SANDBOX] = {"sandbox", 8},
    [CM_E_SYSTEM] = {"system", 9},
    [CM_E_INPUT] = {"input", 9},
    [CM_E_BUSY] = {"busy", 9},
    [CM_E_DEVICE] = {"device", 9},
    [CM_E_BUG] = {"bug", 70},
};

static int status_known(int status)
{
    return status >= 0 && status < CM_STATUS_COUNT;
}

int cm_status_exit_code(enum cm_status status)
{
    return status_known((int)status) ? statuses[status].exit_code : 70;
}

const char *cm_status_name(enum cm_status status)
{
    return status_known((int)status) ? statuses[status].name : "bug";
}

static void error_fill(struct cm_error *err, enum cm_status status, int subcode, const char *id,
                       const char *format, va_list args)
{
    memset(err, 0, sizeof(*err));
    err->status = (int32_t)status;
    err->subcode = subcode;
    snprintf(err->id, sizeof(err->id), "%s", id);
    vsnprintf(err->text, sizeof(err->text), format, args);
}

enum cm_status cm_error_set(struct cm_error *err, enum cm_status status, const char *id,
                            const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        error_fill(err, status, 0, id, format, args);
        va_end(args);
    }
    return status;
}

enum cm_status cm_error_errno(struct cm_error *err, int error_number, const char *id,
                              const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        error_fill(err, CM_E_SYSTEM, error_number, id, format, args);
        va_end(args);
        size_t used = strlen(err->text);
        const char *name = strerrorname_np(error_number);
        const char *text = strerrordesc_np(error_number);
        snprintf(err->text + used, sizeof(err->text) - used, ": %s (%s)",
                 text != NULL ? text : "unknown error", name != NULL ? name : "?");
    }
    return CM_E_SYSTEM;
}

enum cm_status cm_error_wrap(struct cm_error *err, const char *format, ...)
{
    CM_ASSERT(err != NULL);
    char text[CM_ERROR_TEXT_BYTES];
    va_list args;
    va_start(args, format);
    int used = vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (used >= 0 && (size_t)used < sizeof(text)) {
        snprintf(text + used, sizeof(text) - (size_t)used, ": %.*s",
                 (int)(sizeof(text) - (size_t)used), err->text);
    }
    memcpy(err->text, text, sizeof(text));
    return (enum cm_status)err->status;
}

static void text_sanitise(char *text, size_t size)
{
    text[size - 1] = '\0';
    for (size_t i = 0; i < size && text[i] != '\0'; i++) {
        if ((unsigned char)text[i] < 0x20 || (unsigned char)text[i] > 0x7e) {
            text[i] = '?';
        }
    }
}

void cm_error_sanitise(struct cm_error *err)
{
    if (!status_known(err->status) || err->status == CM_OK) {
        err->status = CM_E_BUG;
    }
    text_sanitise(err->id, sizeof(err->id));
    text_sanitise(err->text, sizeof(err->text));
}

void cm_assert_failed(const char *condition, const char *file, int line)
{
    char text[512];
    int bytes =
        snprintf(text, sizeof(text), "casemate: bug: %s at %s:%d; please report this line\n",
                 condition, file, line);
    /* One write, no dprintf: that seeks first, which a role's filter answers by killing it before
     * its last words. */
    if (write(STDERR_FILENO, text, bytes < (int)sizeof(text) ? (size_t)bytes : sizeof(text) - 1) <
        0) {
        _exit(71); /* nobody hears it */
    }
    _exit(70);
}
