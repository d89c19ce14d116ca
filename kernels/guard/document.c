/* Hidden and encoded text as documents beside the text. */
#include "kernels/guard/document.h"

#include <string.h>

#include "runtime/base/error.h"

#define BASE64_CHARACTERS_MIN 16u
#define HEX_BYTES_MIN         16u
#define PERCENT_MIN           3u
#define NOWHERE               UINT32_MAX

#define TAG_FIRST       0xE0020u
#define TAG_COUNT       95u
#define SELECTOR_FIRST  0xFE00u
#define SELECTOR_COUNT  16u
#define SELECTOR2_FIRST 0xE0100u
#define SELECTOR2_COUNT 240u
#define OVERRIDE        0x202Eu /* right to left, to the pop or the end of the line */

const char *cm_document_name(enum cm_document document)
{
    static const char *const names[] = {"text",   "tags", "selectors", "bits",    "bits-exchanged",
                                        "base64", "hex",  "percent",   "reversed"};
    return names[document];
}

/* ------------------------------------------------------------------ into a document */

static void on_views(void *context, enum cm_view view, const struct cm_view_ring *ring,
                     uint64_t from)
{
    struct cm_document_views *each = context;
    each->owner->sink(each->owner->context, each->document, view, ring, from);
}

static struct cm_views *document_open(struct cm_documents *documents, enum cm_document document,
                                      cm_view_tap tap)
{
    struct cm_document_views *each = &documents->each[document];
    if (!each->open) {
        each->owner = documents;
        each->document = document;
        each->open = true;
        cm_views_begin(&each->views, on_views, tap, each);
    }
    return &each->views;
}

static void byte_put(struct cm_documents *documents, enum cm_document document, uint32_t byte,
                     uint32_t start, uint32_t end)
{
    cm_views_push_byte(document_open(documents, document, NULL), byte,
                       (struct cm_view_span){start, end});
}

/* ------------------------------------------------------------------ hidden channels */

static void bit_take(struct cm_documents *documents, size_t pair, uint32_t bit, uint32_t start,
                     uint32_t end)
{
    if (documents->bits[pair].count == 0) {
        documents->bits[pair].start = start;
    }
    documents->bits[pair].value = documents->bits[pair].value << 1 | bit;
    if (++documents->bits[pair].count == 8) {
        uint32_t value = documents->bits[pair].value & 0xFF, from = documents->bits[pair].start;
        documents->bits[pair].count = 0;
        byte_put(documents, CM_DOCUMENT_BITS, value, from, end);
        byte_put(documents, CM_DOCUMENT_BITS_EXCHANGED, value ^ 0xFF, from, end);
    }
}

/* The text between an override and its end, last character first. The bytes may be malformed. */
static void reversed_read(struct cm_documents *documents, uint32_t from)
{
    const uint8_t *text = documents->text;
    uint32_t end = from;
    while (end < documents->size && text[end] != '\n' &&
           !(documents->size - end >= 3 && memcmp(text + end, "\xE2\x80\xAC", 3) == 0)) {
        end++;
    }
    documents->reversed_end = end;
    byte_put(documents, CM_DOCUMENT_REVERSED, ' ', from, from);
    for (uint32_t last = end; last > from;) {
        uint32_t first = last - 1;
        while (first > from && last - first < 4 && (text[first] & 0xC0) == 0x80) {
            first--;
        }
        for (uint32_t i = first; i < last; i++) {
            byte_put(documents, CM_DOCUMENT_REVERSED, text[i], first, last);
        }
        last = first;
    }
}

static void on_ignorable(void *context, uint32_t point, uint32_t start, uint32_t end)
{
    struct cm_documents *documents = ((struct cm_document_views *)context)->owner;
    if (point - TAG_FIRST < TAG_COUNT) {
        byte_put(documents, CM_DOCUMENT_TAGS, point - TAG_FIRST + ' ', start, end);
    } else if (point - SELECTOR_FIRST < SELECTOR_COUNT) {
        byte_put(documents, CM_DOCUMENT_SELECTORS, point - SELECTOR_FIRST, start, end);
    } else if (point - SELECTOR2_FIRST < SELECTOR2_COUNT) {
        byte_put(documents, CM_DOCUMENT_SELECTORS, point - SELECTOR2_FIRST + SELECTOR_COUNT, start,
                 end);
    } else if (point == 0x200B || point == 0x200C) {
        bit_take(documents, 0, point - 0x200B, start, end);
    } else if (point == 0x2062 || point == 0x2064) {
        bit_take(documents, 1, point == 0x2064, start, end);
    } else if (point == OVERRIDE && start >= documents->reversed_end) {
        reversed_read(documents, end);
    }
}

/* ------------------------------------------------------------------ encodings */

static int base64_digit(uint8_t c)
{
    if (c >= 'A' && c <= 'Z') {
        return c - 'A';
    }
    if (c >= 'a' && c <= 'z') {
        return c - 'a' + 26;
    }
    if (c >= '0' && c <= '9') {
        return c - '0' + 52;
    }
    return c == '+' || c == '-' ? 62 : c == '/' || c == '_' ? 63 : -1;
}

static int hex_digit(uint8_t c)
{
    return c >= '0' && c <= '9'              ? c - '0'
           : (uint8_t)((c | 0x20) - 'a') < 6 ? (c | 0x20) - 'a' + 10
                                             : -1;
}

/* Bytes of `value` when `count` of four digits are there; a last digit alone says nothing. */
static void quantum_put(struct cm_documents *documents, uint32_t value, uint32_t count,
                        const uint32_t digits[4])
{
    for (uint32_t k = 0; k + 1 < count; k++) {
        byte_put(documents, CM_DOCUMENT_BASE64, value >> (6 * count - 8 * (k + 1)) & 0xFF,
                 digits[k], digits[k + 1] + 1);
    }
}

/* Digits of a run, its line breaks left out. */
static void base64_read(struct cm_documents *documents, uint32_t at, uint32_t end)
{
    uint32_t value = 0, count = 0, digits[4] = {0};
    byte_put(documents, CM_DOCUMENT_BASE64, ' ', at, at);
    for (; at < end; at++) {
        int digit = base64_digit(documents->text[at]);
        if (digit >= 0) {
            value = value << 6 | (uint32_t)digit;
            digits[count++] = at;
            if (count == 4) {
                quantum_put(documents, value, count, digits);
                value = count = 0;
            }
        }
    }
    quantum_put(documents, value, count, digits);
}

/* The end of a run of base64 from `at`: lines of a run's length may follow one another. */
static uint32_t base64_end(const struct cm_documents *documents, uint32_t at)
{
    const uint8_t *text = documents->text;
    uint32_t end = at, line = at;
    while (at < documents->size) {
        if (base64_digit(text[at]) >= 0) {
            end = ++at;
            continue;
        }
        uint32_t next = at + (text[at] == '\r' && at + 1 < documents->size);
        if (text[next] != '\n' || at - line < BASE64_CHARACTERS_MIN) {
            break;
        }
        line = at = next + 1;
    }
    return end;
}

static bool is_letter_or_digit(uint8_t c)
{
    return (uint8_t)((c | 0x20) - 'a') < 26 || (uint8_t)(c - '0') < 10;
}

/* A run of so many covers each so-manieth byte: look there first, and from there backwards. */
static void base64_scan(struct cm_documents *documents)
{
    const uint8_t *text = documents->text;
    uint32_t at = 0, run = BASE64_CHARACTERS_MIN;
    while (documents->size - at >= run) {
        uint32_t back = run;
        while (back > 0 && base64_digit(text[at + back - 1]) >= 0) {
            back--;
        }
        if (back > 0) {
            at += back;
            continue;
        }
        while (at < documents->size && !is_letter_or_digit(text[at])) {
            at++; /* a run may follow "/" or "-" */
        }
        uint32_t end = base64_end(documents, at);
        if (end - at >= run) {
            base64_read(documents, at, end);
        }
        at = end > at ? end : at + 1;
        at = at < documents->size ? at : documents->size;
    }
}

/* Where the next byte of hexadecimal stands: at once, or after a blank, ":", ",", a line break, and
 * after one blank more, and after "\x" or "0x". */
static uint32_t hex_next(const struct cm_documents *documents, uint32_t at)
{
    const uint8_t *text = documents->text;
    uint32_t size = documents->size;
    if (at < size && (text[at] == ' ' || text[at] == ':' || text[at] == ',' || text[at] == '\n')) {
        at++;
        at += at < size && text[at] == ' ';
    }
    if (size - at >= 2 && (text[at] == '\\' || text[at] == '0') && (text[at + 1] | 0x20) == 'x') {
        at += 2;
    }
    return size - at >= 2 && hex_digit(text[at]) >= 0 && hex_digit(text[at + 1]) >= 0 ? at
                                                                                      : NOWHERE;
}

static void hex_scan(struct cm_documents *documents)
{
    const uint8_t *text = documents->text;
    for (uint32_t at = 0; at < documents->size;) {
        uint32_t first = hex_next(documents, at), count = 0, end = at;
        for (uint32_t next = first; next != NOWHERE; next = hex_next(documents, end)) {
            end = next + 2;
            count++;
        }
        if (count >= HEX_BYTES_MIN) {
            byte_put(documents, CM_DOCUMENT_HEX, ' ', first, first);
            for (uint32_t next = first; count > 0; count--, next = hex_next(documents, next + 2)) {
                int byte = hex_digit(text[next]) << 4 | hex_digit(text[next + 1]);
                byte_put(documents, CM_DOCUMENT_HEX, (uint32_t)byte, next, next + 2);
            }
        }
        at = end > at ? end : at + 1;
        while (at < documents->size && is_letter_or_digit(text[at - 1])) { /* no run begins there */
            at++;
        }
    }
}

static bool is_space(uint8_t c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static bool is_escape(const struct cm_documents *documents, uint32_t at)
{
    return documents->size - at >= 3 && documents->text[at] == '%' &&
           hex_digit(documents->text[at + 1]) >= 0 && hex_digit(documents->text[at + 2]) >= 0;
}

/* A word with enough percent escapes, decoded. */
static void percent_read(struct cm_documents *documents, uint32_t at, uint32_t end)
{
    const uint8_t *text = documents->text;
    uint32_t escapes = 0;
    for (uint32_t i = at; i < end; i++) {
        escapes += is_escape(documents, i);
    }
    if (escapes < PERCENT_MIN) {
        return;
    }
    byte_put(documents, CM_DOCUMENT_PERCENT, ' ', at, at);
    while (at < end) {
        bool escape = is_escape(documents, at);
        int byte = escape ? hex_digit(text[at + 1]) << 4 | hex_digit(text[at + 2]) : text[at];
        byte_put(documents, CM_DOCUMENT_PERCENT, (uint32_t)byte, at, at + (escape ? 3 : 1));
        at += escape ? 3 : 1;
    }
}

static void percent_scan(struct cm_documents *documents)
{
    const uint8_t *text = documents->text;
    for (uint32_t at = 0, from = 0; at < documents->size;) {
        const uint8_t *sign = memchr(text + at, '%', documents->size - at);
        if (sign == NULL) {
            return;
        }
        uint32_t begin = (uint32_t)(sign - text), end = begin;
        while (begin > from && !is_space(text[begin - 1])) {
            begin--;
        }
        while (end < documents->size && !is_space(text[end])) {
            end++;
        }
        percent_read(documents, begin, end);
        at = from = end;
    }
}

/* ------------------------------------------------------------------ a message */

void cm_documents_read(struct cm_documents *documents, const uint8_t *text, size_t size,
                       cm_document_sink sink, void *context)
{
    CM_ASSERT(size < UINT32_MAX);
    documents->sink = sink;
    documents->context = context;
    documents->text = text;
    documents->size = (uint32_t)size;
    documents->reversed_end = 0;
    memset(documents->bits, 0, sizeof(documents->bits));
    for (size_t i = 0; i < CM_DOCUMENT_COUNT; i++) {
        documents->each[i].open = false;
    }
    cm_views_push(document_open(documents, CM_DOCUMENT_TEXT, on_ignorable), text, size, 0);
    base64_scan(documents);
    hex_scan(documents);
    percent_scan(documents);
    for (size_t i = 0; i < CM_DOCUMENT_COUNT; i++) {
        if (documents->each[i].open) {
            cm_views_end(&documents->each[i].views);
        }
    }
    documents->text = NULL;
}
