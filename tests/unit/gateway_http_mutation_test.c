/* Requests by an attacker: valid ones with their lines, lengths, cases, spaces and ends changed.
 * What is accepted must be what an oracle of regular expressions over whole lines accepts, with the
 * same head, the same framing and the same body. */
#include <criterion/criterion.h>
#include <ctype.h>
#include <locale.h>
#include <regex.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "runtime/gateway/http.h"
#include "tests/unit/random.h"

#define MUTATIONS 60000
#define INPUT_MAX 4096
#define HEAD_MAX  512
#define BODY_MAX  64
#define LINES_MAX 80
#define TOKEN     "[!#$%&'*+.^_`|~0-9A-Za-z-]+"

struct text {
    char at[INPUT_MAX];
    size_t size;
};

/* What came of an input. */
struct outcome {
    bool accepted;
    int status; /* of the refusal; 0: bytes are missing */
    size_t head_bytes;
    bool chunked;
    uint64_t length;
    size_t body_bytes;
    uint8_t body[BODY_MAX];
};

/* ------------------------------------------------------------------ the oracle */

static regex_t request_line, field_line, host_value, digits_value, size_line;

static void patterns_make(void)
{
    const struct {
        regex_t *regex;
        const char *pattern;
    } patterns[] = {
        {&request_line, "^" TOKEN " /[]!\"$-Z\\^_`a-z{|}~[]* HTTP/1\\.1$"},
        {&field_line, "^" TOKEN ":[^\x01-\x08\x0a-\x1f\x7f]*$"},
        {&host_value, "^[][a-zA-Z0-9.~_!$&'()*+,;=:%-]+$"},
        {&digits_value, "^[0-9]{1,18}$"},
        {&size_line, "^[0-9a-fA-F]{1,8}$"},
    };
    for (size_t i = 0; i < sizeof(patterns) / sizeof(patterns[0]); i++) {
        cr_assert_eq(regcomp(patterns[i].regex, patterns[i].pattern, REG_EXTENDED | REG_NOSUB), 0);
    }
}

static bool matches(const regex_t *regex, const char *line)
{
    return regexec(regex, line, 0, NULL, 0) == 0;
}

/* The value of a line if it is the named field, without spaces around; else NULL. */
static char *field_value(char *line, const char *name)
{
    size_t size = strlen(name);
    if (strncasecmp(line, name, size) != 0 || line[size] != ':') {
        return NULL;
    }
    char *value = line + size + 1;
    value += strspn(value, " \t");
    for (char *end = value + strlen(value); end > value && strchr(" \t", end[-1]) != NULL;) {
        *--end = '\0';
    }
    return value;
}

static bool head_lines_sound(char **lines, size_t count, struct outcome *ret)
{
    static const char *const names[] = {"host",         "content-length",  "transfer-encoding",
                                        "expect",       "authorization",   "content-type",
                                        "x-request-id", "content-encoding"};
    size_t seen[8] = {0};
    bool sound = count > 0 && count <= CM_HTTP_FIELDS_MAX + 1 && matches(&request_line, lines[0]);
    for (size_t i = 1; i < count && sound; i++) {
        sound = matches(&field_line, lines[i]);
        for (size_t k = 0; k < 8 && sound; k++) {
            char *value = field_value(lines[i], names[k]);
            if (value == NULL) {
                continue;
            }
            seen[k]++;
            sound = k == 0   ? matches(&host_value, value)
                    : k == 1 ? matches(&digits_value, value)
                    : k == 2 ? strcasecmp(value, "chunked") == 0
                    : k == 3 ? strcasecmp(value, "100-continue") == 0
                    : k == 7 ? strcasecmp(value, "identity") == 0
                             : true;
            ret->length = k == 1 ? strtoull(value, NULL, 10) : ret->length;
            break;
        }
    }
    for (size_t k = 0; k < 8; k++) {
        sound = sound && seen[k] <= 1;
    }
    ret->chunked = seen[2] > 0;
    return sound && seen[0] == 1 && seen[1] + seen[2] <= 1;
}

/* Lines between CRLFs up to the empty one; no other control byte that ends or hides a line. */
static bool head_sound(const struct text *input, struct outcome *ret)
{
    char copy[INPUT_MAX];
    char *lines[LINES_MAX];
    size_t count = 0;
    const char *end = memmem(input->at, input->size, "\r\n\r\n", 4);
    if (end == NULL || (size_t)(end - input->at) + 4 > HEAD_MAX) {
        return false;
    }
    size_t size = (size_t)(end - input->at);
    memcpy(copy, input->at, size);
    copy[size] = '\0';
    ret->head_bytes = size + 4;
    if (strlen(copy) != size) {
        return false; /* NUL */
    }
    for (char *line = copy; line != NULL && count < LINES_MAX;) {
        char *next = strstr(line, "\r\n");
        if (next != NULL) {
            *next = '\0';
            next += 2;
        }
        lines[count++] = line;
        if (strpbrk(line, "\r\n") != NULL) {
            return false;
        }
        line = next;
    }
    return head_lines_sound(lines, count, ret);
}

static bool chunks_sound(const char *at, size_t size, struct outcome *ret)
{
    for (;;) {
        char line[16];
        const char *end = memmem(at, size, "\r\n", 2);
        if (end == NULL || end - at >= (long)sizeof(line)) {
            return false;
        }
        memcpy(line, at, (size_t)(end - at));
        line[end - at] = '\0';
        bool whole = strlen(line) == (size_t)(end - at); /* no NUL in it */
        size -= (size_t)(end - at) + 2;
        at = end + 2;
        size_t bytes = strtoull(line, NULL, 16);
        if (!whole || !matches(&size_line, line) || bytes > BODY_MAX - ret->body_bytes ||
            size < bytes + 2 || memcmp(at + bytes, "\r\n", 2) != 0) {
            return false;
        }
        if (bytes == 0) {
            return true;
        }
        memcpy(ret->body + ret->body_bytes, at, bytes);
        ret->body_bytes += bytes;
        at += bytes + 2;
        size -= bytes + 2;
    }
}

static struct outcome oracle(const struct text *input)
{
    struct outcome told = {0};
    if (head_sound(input, &told)) {
        const char *body = input->at + told.head_bytes;
        size_t there = input->size - told.head_bytes;
        told.accepted = told.chunked ? chunks_sound(body, there, &told)
                                     : told.length <= BODY_MAX && there >= told.length;
    }
    return told;
}

/* ------------------------------------------------------------------ the subject */

/* The chunked body behind the head, in the pieces that `cut` makes. */
static void chunks_read(const uint8_t *bytes, size_t size, size_t cut, struct outcome *ret)
{
    struct cm_http_chunks chunks;
    enum cm_http_chunk result = CM_HTTP_CHUNK_MORE;
    const size_t ends[] = {cut < size ? cut : size, size};
    size_t from = 0;
    cm_http_chunks_init(&chunks, BODY_MAX);
    for (size_t i = 0; i < 2 && result == CM_HTTP_CHUNK_MORE; i++) {
        struct cm_cursor cursor = cm_cursor_init(bytes + from, ends[i] - from);
        do {
            const uint8_t *data = NULL;
            size_t data_bytes = 0;
            result = cm_http_chunks_next(&chunks, &cursor, &data, &data_bytes);
            cr_assert_leq(data_bytes, BODY_MAX - ret->body_bytes, "a body over its limit");
            memcpy(ret->body + ret->body_bytes, data != NULL ? data : bytes, data_bytes);
            ret->body_bytes += data_bytes;
        } while (result == CM_HTTP_CHUNK_DATA);
        from += cursor.offset;
    }
    ret->accepted = result == CM_HTTP_CHUNK_END;
    ret->status = result == CM_HTTP_CHUNK_BAD ? 400 : result == CM_HTTP_CHUNK_LARGE ? 413 : 0;
}

static struct outcome subject_bytes(const uint8_t *bytes, size_t size, size_t cut)
{
    struct outcome told = {0};
    struct cm_http_refusal refusal = {0, NULL};
    struct cm_http_head head;
    size_t scanned = 0;
    long end = cm_http_head_end(bytes, cut, HEAD_MAX, &scanned, &refusal);
    if (end == 0) {
        end = cm_http_head_end(bytes, size, HEAD_MAX, &scanned, &refusal);
    }
    told.head_bytes = end > 0 ? (size_t)end : 0;
    if (end < 0 || (end > 0 && cm_http_head_parse(bytes, (size_t)end, &head, &refusal) != CM_OK)) {
        told.status = refusal.status;
        cr_assert(told.status >= 400 && refusal.message != NULL);
    } else if (end > 0) {
        told.chunked = head.chunked;
        told.length = head.content_length;
        if (head.chunked) {
            chunks_read(bytes + end, size - (size_t)end, below(8), &told);
        } else {
            told.status = head.content_length > BODY_MAX ? 413 : 0;
            told.accepted = told.status == 0 && size - (size_t)end >= head.content_length;
        }
    }
    return told;
}

/* In memory of its exact size, so that a sanitizer sees each read beyond it. */
static struct outcome subject(const struct text *input, size_t cut)
{
    uint8_t *bytes = malloc(input->size + 1);
    memcpy(bytes + 1, input->at, input->size);
    struct outcome told = subject_bytes(bytes + 1, input->size, cut);
    free(bytes);
    return told;
}

/* ------------------------------------------------------------------ mutations */

static const char *const samples[] = {
    "GET /v1/models?x=1 HTTP/1.1\r\nHost: node:8443\r\nAuthorization: Bearer cm-0\r\n"
    "Accept: */*\r\nConnection: keep-alive\r\n\r\n",
    "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    "X-Request-ID: r-1\r\nContent-Length: 16\r\n\r\n{\"prompt\": \"abc\"}",
    "POST /v1/chat/completions HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n"
    "Content-Encoding: identity\r\nExpect: 100-continue\r\n\r\n"
    "5\r\n{\"a\":\r\n0A\r\n [1, 2, 3]\r\n1\r\n}\r\n0\r\n\r\n",
};
static const char *const hostile[] = {"Content-Length: 3\r\n",
                                      "Content-Length: 16\r\n",
                                      "Transfer-Encoding: chunked\r\n",
                                      "Transfer-Encoding: gzip\r\n",
                                      "Host: b\r\n",
                                      "Content-Length : 1\r\n",
                                      " folded\r\n",
                                      "X: \r\n",
                                      "x\r\n",
                                      ":\r\n",
                                      "X: \x01\r\n",
                                      "Expect: x\r\n",
                                      "0\r\n",
                                      "\r\n",
                                      "\n",
                                      "\r",
                                      "\r\n\r\n",
                                      "1;a=b\r\n",
                                      ",",
                                      ";",
                                      "\t",
                                      " ",
                                      "%00",
                                      "HTTP/1.0",
                                      "ffffffff\r\n",
                                      "99999999999999999999",
                                      "\xff"};

static void splice(struct text *input, size_t from, size_t cut, const char *bytes, size_t size)
{
    if (input->size - cut + size <= INPUT_MAX && from + cut <= input->size) {
        memmove(input->at + from + size, input->at + from + cut, input->size - from - cut);
        memcpy(input->at + from, bytes, size);
        input->size += size - cut;
    }
}

/* A line with its end, chosen at random. */
static void line_choose(const struct text *input, size_t *ret_from, size_t *ret_size)
{
    size_t at = below(input->size + 1);
    while (at > 0 && input->at[at - 1] != '\n') {
        at--;
    }
    const char *end = memchr(input->at + at, '\n', input->size - at);
    *ret_from = at;
    *ret_size = (end != NULL ? (size_t)(end - input->at) + 1 : input->size) - at;
}

static void lines_mutate(struct text *input)
{
    char line[INPUT_MAX];
    size_t from, size, to, other;
    line_choose(input, &from, &size);
    line_choose(input, &to, &other);
    memcpy(line, input->at + from, size);
    switch (below(4)) {
    case 0: /* drop */
        splice(input, from, size, "", 0);
        break;
    case 1: /* twice */
        splice(input, to, 0, line, size);
        break;
    case 2: /* in another place */
        splice(input, from, size, "", 0);
        splice(input, to <= input->size ? to : 0, 0, line, size);
        break;
    default: { /* a hostile one */
        const char *text = hostile[below(sizeof(hostile) / sizeof(hostile[0]))];
        splice(input, from, 0, text, strlen(text));
        break;
    }
    }
}

static void bytes_mutate(struct text *input)
{
    static const char ends[] = "\r\n\0 \t:;,x0\x7f";
    size_t at = below(input->size + 1);
    const char *text = hostile[below(sizeof(hostile) / sizeof(hostile[0]))];
    char byte = ends[below(sizeof(ends) - 1)];
    switch (below(5)) {
    case 0:
        splice(input, at, 0, below(2) ? text : &byte, 1);
        break;
    case 1:
        splice(input, at, 1 + below(3), "", 0);
        break;
    case 2:
        splice(input, at, 1, &byte, 1);
        break;
    case 3:
        splice(input, at, 0, text, strlen(text));
        break;
    default:
        if (at < input->size) {
            input->at[at] = (char)(input->at[at] ^ 1 << below(8));
        }
    }
}

/* Digits, letter cases and CRLFs: what framing is made of. */
static void framing_mutate(struct text *input)
{
    size_t kind = below(3);
    size_t start = below(input->size + 1);
    for (size_t k = 0; k < input->size; k++) {
        char *at = &input->at[(start + k) % input->size];
        if (kind == 0 && isdigit((unsigned char)*at)) {
            *at = "0123456789aF+-x "[below(16)];
            return;
        }
        if (kind == 1 && isalpha((unsigned char)*at)) {
            *at ^= 0x20;
            return;
        }
        if (kind == 2 && *at == '\r') {
            size_t cut = 1 + below(2);
            splice(input, (size_t)(at - input->at), cut, "\n\r ", below(3));
            return;
        }
    }
}

static void mutate(struct text *input)
{
    const char *other = samples[below(3)];
    switch (below(16)) {
    case 0: /* cut short */
        input->size = below(input->size + 1);
        return;
    case 1: { /* a part of another request in the middle */
        size_t from = below(20);
        size_t size = below(strlen(other) - 20);
        splice(input, below(input->size + 1), 0, other + from, size);
        return;
    }
    case 2:
    case 3:
    case 4:
    case 5:
        framing_mutate(input);
        return;
    case 6:
    case 7:
    case 8:
    case 9:
        bytes_mutate(input);
        return;
    default:
        lines_mutate(input);
    }
}

static void compare(const struct text *input, const struct outcome *got, const struct outcome *told)
{
    bool same = got->accepted == told->accepted;
    if (same && got->accepted) {
        same = got->head_bytes == told->head_bytes && got->chunked == told->chunked &&
               got->length == told->length && got->body_bytes == told->body_bytes &&
               memcmp(got->body, told->body, told->body_bytes) == 0;
    }
    cr_assert(same, "%s, the oracle %s (status %d):\n%.*s", got->accepted ? "accepted" : "refused",
              told->accepted ? "accepts" : "does not", got->status, (int)input->size, input->at);
}

Test(gateway_http, mutated_requests_against_an_oracle)
{
    size_t accepted = 0, refused = 0, missing = 0;
    setlocale(LC_ALL, "C");
    patterns_make();
    random_state = 20240607;
    for (int i = 0; i < MUTATIONS; i++) {
        struct text input = {.size = strlen(samples[i % 3])};
        memcpy(input.at, samples[i % 3], input.size);
        for (size_t k = below(4); k > 0; k--) {
            mutate(&input);
        }
        struct outcome told = oracle(&input);
        struct outcome got = subject(&input, input.size);
        struct outcome again = subject(&input, below(input.size + 1));
        compare(&input, &got, &told);
        cr_assert(got.accepted == again.accepted && got.status == again.status,
                  "a cut changes the outcome:\n%.*s", (int)input.size, input.at);
        accepted += got.accepted;
        refused += got.status != 0;
        missing += !got.accepted && got.status == 0;
    }
    cr_log_info("%zu accepted, %zu refused, %zu unfinished", accepted, refused, missing);
    cr_assert(accepted > MUTATIONS / 5 && refused > MUTATIONS / 5 && missing > MUTATIONS / 50);
}
