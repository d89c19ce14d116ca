/* Bytes as hexadecimal text, and back. */
#ifndef CASEMATE_RUNTIME_BASE_HEX_H
#define CASEMATE_RUNTIME_BASE_HEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline int cm_hex_digit(char c)
{
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Exactly 2 * size digits; on false ret_bytes is undefined. */
static inline bool cm_hex_read(const char *text, size_t text_size, uint8_t *ret_bytes, size_t size)
{
    if (text_size != 2 * size) {
        return false;
    }
    for (size_t i = 0; i < size; i++) {
        int high = cm_hex_digit(text[2 * i]), low = cm_hex_digit(text[2 * i + 1]);
        if (high < 0 || low < 0) {
            return false;
        }
        ret_bytes[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

/* ret_text holds 2 * size + 1 bytes. */
static inline void cm_hex_write(const uint8_t *bytes, size_t size, char *ret_text)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < size; i++) {
        ret_text[2 * i] = digits[bytes[i] >> 4];
        ret_text[2 * i + 1] = digits[bytes[i] & 15];
    }
    ret_text[2 * size] = '\0';
}

#endif
