/* JSON strings and UTF-8. */
#include "runtime/gateway/text.h"

#include <stdarg.h>
#include <string.h>

#include "runtime/base/error.h"

size_t cm_utf8_length(const uint8_t *bytes, size_t size)
{
    if (size == 0 || bytes[0] < 0x80) {
        return size == 0 ? 0 : 1;
    }
    size_t length = bytes[0] >= 0xf0 ? 4 : bytes[0] >= 0xe0 ? 3 : 2;
    if (bytes[0] < 0xc2 || bytes[0] > 0xf4 || size < length) {
        return 0;
    }
    for (size_t i = 1; i < length; i++) {
        if ((bytes[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    if ((bytes[0] == 0xe0 && bytes[1] < 0xa0) || (bytes[0] == 0xed && bytes[1] > 0x9f) ||
        (bytes[0] == 0xf0 && bytes[1] < 0x90) || (bytes[0] == 0xf4 && bytes[1] > 0x8f)) {
        return 0;
    }
    return length;
}

bool cm_utf8_valid(const uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size;) {
        size_t length = cm_utf8_length(bytes + i, size - i);
        if (length == 0) {
            return false;
        }
        i += length;
    }
    return true;
}

static void put(struct evbuffer *out, const void *bytes, size_t size)
{
    /* Fails only without memory; a reply with a hole would be worse than the end. */
    CM_ASSERT(size == 0 || evbuffer_add(out, bytes, size) == 0);
}

void cm_text_put(struct evbuffer *out, const char *text)
{
    put(out, text, strlen(text));
}

void cm_text_format(struct evbuffer *out, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int written = evbuffer_add_vprintf(out, format, args);
    va_end(args);
    CM_ASSERT(written >= 0);
}

static const char *short_escape(uint8_t byte)
{
    switch (byte) {
    case '"':
        return "\\\"";
    case '\\':
        return "\\\\";
    case '\n':
        return "\\n";
    case '\r':
        return "\\r";
    case '\t':
        return "\\t";
    default:
        return NULL;
    }
}

void cm_json_string(struct evbuffer *out, const void *bytes, size_t size)
{
    const uint8_t *at = bytes;
    size_t plain = 0; /* start of the run that is copied as it is */
    put(out, "\"", 1);
    for (size_t i = 0; i < size;) {
        size_t length = cm_utf8_length(at + i, size - i);
        bool control = at[i] < 0x20 || at[i] == 0x7f;
        if (length > 0 && !control && at[i] != '"' && at[i] != '\\') {
            i += length;
            continue;
        }
        put(out, at + plain, i - plain);
        const char *escape = short_escape(at[i]);
        if (escape != NULL) {
            cm_text_put(out, escape);
        } else if (length == 0) {
            cm_text_put(out, "\xef\xbf\xbd");
        } else {
            cm_text_format(out, "\\u%04x", at[i]);
        }
        plain = ++i;
    }
    put(out, at + plain, size - plain);
    put(out, "\"", 1);
}

void cm_json_text(struct evbuffer *out, const char *text)
{
    cm_json_string(out, text, strlen(text));
}
