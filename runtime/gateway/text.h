/* Output text: JSON and UTF-8 helpers over an evbuffer. */
#ifndef CASEMATE_RUNTIME_GATEWAY_TEXT_H
#define CASEMATE_RUNTIME_GATEWAY_TEXT_H

#include <event2/buffer.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/status.h"

/* Bytes of the well-formed UTF-8 character at the start (RFC 3629: no overlong forms, no
 * surrogates), or 0. */
size_t cm_utf8_length(const uint8_t *bytes, size_t size);
bool cm_utf8_valid(const uint8_t *bytes, size_t size);

/* Append a literal, a format, or a JSON string with its quotes; what is not UTF-8 in it becomes
 * U+FFFD, so that what leaves is always valid JSON. */
void cm_text_put(struct evbuffer *out, const char *text);
CM_PRINTF(2, 3) void cm_text_format(struct evbuffer *out, const char *format, ...);
void cm_json_string(struct evbuffer *out, const void *bytes, size_t size);
void cm_json_text(struct evbuffer *out, const char *text); /* terminated */

#endif
