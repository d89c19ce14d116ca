/* Errors: fixed size, never allocated, safe to send between processes as they are.
 *
 * Must never hold a secret, a prompt or a reply. Written only on failure. */
#ifndef CASEMATE_RUNTIME_BASE_ERROR_H
#define CASEMATE_RUNTIME_BASE_ERROR_H

#include <stdint.h>

#include "runtime/base/status.h"

#define CM_ERROR_ID_BYTES   32
#define CM_ERROR_TEXT_BYTES 472

struct cm_error {
    int32_t status;                 /* enum cm_status */
    int32_t subcode;                /* errno, TPM response code or 0 */
    char id[CM_ERROR_ID_BYTES];     /* stable cause: CM-<AREA>-<CAUSE>, upper case */
    char text[CM_ERROR_TEXT_BYTES]; /* what, on what (name, offset, expected, found), what next */
};

/* Fill *err (may be NULL) and return status, so that callers write `return cm_error_set(...)`. */
CM_PRINTF(4, 5)
enum cm_status cm_error_set(struct cm_error *err, enum cm_status status, const char *id,
                            const char *format, ...);

/* As cm_error_set with CM_E_SYSTEM; subcode = error_number, whose text is appended. */
CM_PRINTF(4, 5)
enum cm_status cm_error_errno(struct cm_error *err, int error_number, const char *id,
                              const char *format, ...);

/* Put "prefix: " before the text on the way up. Keeps status and id; returns err->status. */
CM_PRINTF(2, 3)
enum cm_status cm_error_wrap(struct cm_error *err, const char *format, ...);

/* Make an error that arrived from another process safe to use: known status, terminated and
 * printable text. */
void cm_error_sanitise(struct cm_error *err);

/* Programmer errors only; input is never asserted. Stays on in release builds. Exits with 70. */
#define CM_ASSERT(condition)                                                                       \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            cm_assert_failed(#condition, __FILE__, __LINE__);                                      \
        }                                                                                          \
    } while (0)

__attribute__((noreturn)) void cm_assert_failed(const char *condition, const char *file, int line);

#endif
