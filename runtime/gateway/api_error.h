/* What a client is told when something is refused: the four fields of the OpenAI error object, an
 * HTTP status, and whether another try can help. All error replies go through this struct. */
#ifndef CASEMATE_RUNTIME_GATEWAY_API_ERROR_H
#define CASEMATE_RUNTIME_GATEWAY_API_ERROR_H

#include <event2/buffer.h>
#include <stdbool.h>
#include <stdint.h>

#include "runtime/base/error.h"

struct cm_moderation;

struct cm_api_error {
    int status;
    const char *type; /* static */
    const char *code; /* static; NULL: null */
    char message[320];
    char param[96];         /* "": null */
    uint32_t retry_after_s; /* 0: no Retry-After */
    bool no_retry;          /* a try again would cost as much and fail the same way */
    const struct cm_moderation *moderation; /* stands beside the error; NULL: none */
};

/* Fill; `type` follows from the status. Returns CM_E_INPUT for `return cm_api_error_set(...)`. */
CM_PRINTF(4, 5)
enum cm_status cm_api_error_set(struct cm_api_error *error, int status, const char *code,
                                const char *format, ...);
/* As set, with the field that is meant. */
CM_PRINTF(5, 6)
enum cm_status cm_api_error_field(struct cm_api_error *error, int status, const char *code,
                                  const char *param, const char *format, ...);
/* {"error":{…}}, and "moderation" where the guard refused */
void cm_api_error_write(const struct cm_api_error *error, struct evbuffer *out);
const char *cm_http_reason(int status);

#endif
