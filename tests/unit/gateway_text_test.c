/* UTF-8 as RFC 3629 has it, and JSON strings that any reader takes. */
#include <criterion/criterion.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/gateway/text.h"

/* The oracle writes: each code point's only form. */
static size_t encode(uint32_t point, uint8_t ret_bytes[static 4])
{
    if (point < 0x80) {
        ret_bytes[0] = (uint8_t)point;
        return 1;
    }
    size_t size = point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    for (size_t i = size; i-- > 1; point >>= 6) {
        ret_bytes[i] = (uint8_t)(0x80 | (point & 0x3f));
    }
    ret_bytes[0] = (uint8_t)((0xf00u >> size) | point);
    return size;
}

static bool surrogate(uint32_t point)
{
    return point >= 0xd800 && point <= 0xdfff;
}

/* In memory of its exact size. */
static size_t length_of(const uint8_t *bytes, size_t size)
{
    uint8_t *copy = malloc(size + 1);
    memcpy(copy + 1, bytes, size);
    size_t length = cm_utf8_length(copy + 1, size);
    free(copy);
    return length;
}

Test(gateway_text, each_character_and_no_part_of_one)
{
    uint8_t bytes[4];
    for (uint32_t point = 0; point <= 0x10ffff; point++) {
        size_t size = encode(point, bytes);
        cr_assert_eq(cm_utf8_length(bytes, size), surrogate(point) ? 0 : size, "U+%04x", point);
        if (point % 97 == 0 && size > 1) {
            cr_assert_eq(length_of(bytes, size - 1), 0u, "half of U+%04x", point);
        }
    }
}

/* As many sequences are well-formed as there are characters: no other form passes. */
Test(gateway_text, nothing_but_characters)
{
    size_t found[5] = {0};
    for (uint32_t i = 0; i < 0x10000; i++) {
        const uint8_t two[2] = {(uint8_t)(i >> 8), (uint8_t)i};
        found[2] += cm_utf8_length(two, 2) == 2;
    }
    for (uint32_t i = 0xc00000; i <= 0xffffff; i++) {
        const uint8_t three[3] = {(uint8_t)(i >> 16), (uint8_t)(i >> 8), (uint8_t)i};
        found[3] += cm_utf8_length(three, 3) == 3;
    }
    for (uint32_t i = 0xe00000; i <= 0xffffff; i++) { /* the last byte apart: any tail, or none */
        uint8_t four[4] = {(uint8_t)(i >> 16), (uint8_t)(i >> 8), (uint8_t)i, 0x80};
        found[4] += cm_utf8_length(four, 4) == 4;
        four[3] = 0x7f;
        cr_assert_neq(cm_utf8_length(four, 4), 4u);
    }
    cr_expect_eq(found[2], 0x800u - 0x80u);
    cr_expect_eq(found[3], 0x10000u - 0x800u - 0x800u);
    cr_expect_eq(found[4], 0x100000u / 64);
    for (uint32_t i = 0; i < 0x100; i++) {
        cr_expect_eq(cm_utf8_length((uint8_t[]){(uint8_t)i}, 1), i < 0x80 ? 1u : 0u);
    }
    cr_expect_eq(cm_utf8_length(NULL, 0), 0u);
    cr_expect(cm_utf8_valid(NULL, 0) && !cm_utf8_valid((const uint8_t *)"a\xc3", 2));
}

/* `bytes` as a JSON string, read by jansson. The caller drops the reference. */
static json_t *through_json(const void *bytes, size_t size)
{
    struct evbuffer *out = evbuffer_new();
    cm_json_string(out, bytes, size);
    size_t there = evbuffer_get_length(out);
    const char *text = (const char *)evbuffer_pullup(out, -1);
    for (size_t i = 0; i < there; i++) {
        cr_assert((uint8_t)text[i] >= 0x20 && text[i] != 0x7f, "a control byte leaves");
    }
    json_t *value = json_loadb(text, there, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    cr_assert_not_null(value, "%.*s", (int)there, text);
    evbuffer_free(out);
    return value;
}

Test(gateway_text, what_goes_in_comes_out)
{
    uint8_t text[4 + 2] = "a";
    for (uint32_t point = 0; point <= 0x10ffff; point += point < 0x3000 ? 1 : 61) {
        size_t size = surrogate(point) ? 0 : encode(point, text + 1);
        text[1 + size] = 'b';
        json_t *value = through_json(text, size + 2);
        cr_assert(json_string_length(value) == size + 2 &&
                      memcmp(json_string_value(value), text, size + 2) == 0,
                  "U+%04x", point);
        json_decref(value);
    }
}

Test(gateway_text, what_is_no_text_is_replaced)
{
    static const struct {
        const char *in, *out;
    } rows[] = {{"a\xff"
                 "b",
                 "a\xef\xbf\xbd"
                 "b"},
                {"\xc3", "\xef\xbf\xbd"},
                {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
                {"\xf0\x9f\x98", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
                {"\xc0\xaf\"", "\xef\xbf\xbd\xef\xbf\xbd\""}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        json_t *value = through_json(rows[i].in, strlen(rows[i].in));
        cr_expect_str_eq(json_string_value(value), rows[i].out, "row %zu", i);
        json_decref(value);
    }
}
