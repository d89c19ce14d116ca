/* Heads and bodies of HTTP/1.1 requests: a table of good and bad ones, cut at every byte. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/gateway/http.h"

#define HEAD_MAX 512
#define BODY_MAX 64
#define GET      "GET /livez HTTP/1.1\r\nHost: a\r\n"
#define POST     "POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
#define CHUNKED  POST "Transfer-Encoding: chunked\r\n\r\n"
#define MISSING  0   /* no refusal, more bytes are waited for */
#define TAKEN    200 /* head and body are whole */

/* Bytes as they come in, read the way a connection reads them. */
struct reading {
    size_t scanned;
    size_t head_bytes;
    size_t body_from; /* of the input: what is taken of it so far */
    size_t body_bytes;
    uint8_t body[BODY_MAX];
    struct cm_http_head head;
    struct cm_http_chunks chunks;
    int status;
};

static void body_read(struct reading *reading, const uint8_t *bytes, size_t size)
{
    size_t there = size - reading->body_from;
    if (!reading->head.chunked) {
        bool large = reading->head.content_length > BODY_MAX;
        reading->status = large ? 413 : there >= reading->head.content_length ? TAKEN : MISSING;
        return;
    }
    struct cm_cursor cursor = cm_cursor_init(bytes + reading->body_from, there);
    enum cm_http_chunk result = CM_HTTP_CHUNK_DATA;
    while (result == CM_HTTP_CHUNK_DATA) {
        const uint8_t *data = NULL;
        size_t data_bytes = 0;
        result = cm_http_chunks_next(&reading->chunks, &cursor, &data, &data_bytes);
        cr_assert_leq(reading->body_bytes + data_bytes, BODY_MAX, "a body over its limit");
        if (data_bytes > 0) {
            memcpy(reading->body + reading->body_bytes, data, data_bytes);
        }
        reading->body_bytes += data_bytes;
    }
    reading->body_from += cursor.offset;
    reading->status = result == CM_HTTP_CHUNK_END     ? TAKEN
                      : result == CM_HTTP_CHUNK_BAD   ? 400
                      : result == CM_HTTP_CHUNK_LARGE ? 413
                                                      : MISSING;
}

/* `bytes` is all that has come so far; a copy of its exact size, so that a sanitizer sees each read
 * beyond it. */
static void read_on(struct reading *reading, const void *bytes, size_t size)
{
    struct cm_http_refusal refusal = {0, NULL};
    uint8_t *copy = malloc(size + (size == 0));
    memcpy(copy, bytes, size);
    if (reading->head_bytes == 0 && reading->status == MISSING) {
        long end = cm_http_head_end(copy, size, HEAD_MAX, &reading->scanned, &refusal);
        if (end > 0) {
            reading->head_bytes = reading->body_from = (size_t)end;
            cr_assert_leq(reading->head_bytes, HEAD_MAX);
            cm_http_chunks_init(&reading->chunks, BODY_MAX);
            if (cm_http_head_parse(copy, (size_t)end, &reading->head, &refusal) != CM_OK) {
                end = -1;
            }
        }
        if (end < 0) {
            cr_assert_not_null(refusal.message, "refused without a word");
            reading->status = refusal.status;
        }
    }
    if (reading->head_bytes > 0 && reading->status == MISSING) {
        body_read(reading, copy, size);
    }
    free(copy);
}

static int status_of(const void *bytes, size_t size)
{
    struct reading reading = {0};
    read_on(&reading, bytes, size);
    return reading.status;
}

static const struct {
    const char *what;
    const char *bytes;
    int status;
    size_t size; /* 0: up to the NUL */
} rows[] = {
    {"the least request", GET "\r\n", 200, 0},
    {"a query", "GET /livez?a=b&c HTTP/1.1\r\nHost: a\r\n\r\n", 200, 0},
    {"names in any case", "GET /x HTTP/1.1\r\nhOST: a\r\n\r\n", 200, 0},
    {"no space after the colon", "GET /x HTTP/1.1\r\nHost:a\r\n\r\n", 200, 0},
    {"spaces and tabs around a value", "GET /x HTTP/1.1\r\nHost: \t a \t\r\n\r\n", 200, 0},
    {"a tab and obs-text in a value", GET "X-A: a\tb \xc3\xa4\r\n\r\n", 200, 0},
    {"an empty value", GET "X-A:\r\n\r\n", 200, 0},
    {"a field twice that may repeat", GET "X-A: 1\r\nX-A: 2\r\n\r\n", 200, 0},
    {"a host with a port", "GET /x HTTP/1.1\r\nHost: node-1.example:8443\r\n\r\n", 200, 0},
    {"a host that is an IPv6 address", "GET /x HTTP/1.1\r\nHost: [::1]:8443\r\n\r\n", 200, 0},
    {"a body", POST "Content-Length: 2\r\n\r\n{}", 200, 0},
    {"a body of no bytes", POST "Content-Length: 0\r\n\r\n", 200, 0},
    {"zeros before a length", POST "Content-Length: 0002\r\n\r\n{}", 200, 0},
    {"a body at the limit", POST "Content-Length: 64\r\n\r\n", 0, 0},
    {"a body over the limit", POST "Content-Length: 65\r\n\r\n", 413, 0},
    {"chunks", CHUNKED "2\r\n{}\r\n0\r\n\r\n", 200, 0},
    {"a coding in any case", POST "Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n", 200, 0},
    {"expectation", POST "Content-Length: 0\r\nExpect: 100-Continue\r\n\r\n", 200, 0},
    {"identity", POST "Content-Length: 0\r\nContent-Encoding: identity\r\n\r\n", 200, 0},

    {"half a head", GET, 0, 0},
    {"half a body", POST "Content-Length: 3\r\n\r\n{}", 0, 0},
    {"half a chunk", CHUNKED "3\r\n{}", 0, 0},

    {"lengths that differ", POST "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, 0},
    {"a length twice", POST "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400, 0},
    {"a length twice, in other cases", POST "content-length: 2\r\nCONTENT-LENGTH: 2\r\n\r\n{}", 400,
     0},
    {"a list of lengths", POST "Content-Length: 2, 2\r\n\r\n{}", 400, 0},
    {"length, then coding", POST "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     400, 0},
    {"coding, then length", POST "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
     400, 0},
    {"a coding twice", POST "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400,
     0},
    {"a coding that is not last", POST "Transfer-Encoding: chunked, gzip\r\n\r\n", 501, 0},
    {"two codings", POST "Transfer-Encoding: gzip, chunked\r\n\r\n", 501, 0},
    {"chunked twice in a list", POST "Transfer-Encoding: chunked, chunked\r\n\r\n", 501, 0},
    {"a coding with more", POST "Transfer-Encoding: chunked;a=b\r\n\r\n", 501, 0},
    {"identity as a coding", POST "Transfer-Encoding: identity\r\n\r\n", 501, 0},
    {"a vertical tab in a coding", POST "Transfer-Encoding: \vchunked\r\n\r\n", 400, 0},
    {"an empty coding", POST "Transfer-Encoding:\r\n\r\n", 501, 0},
    {"an empty length", POST "Content-Length:\r\n\r\n", 400, 0},
    {"a length with a sign", POST "Content-Length: +2\r\n\r\n{}", 400, 0},
    {"a length below 0", POST "Content-Length: -1\r\n\r\n{}", 400, 0},
    {"a length in hex", POST "Content-Length: 0x2\r\n\r\n{}", 400, 0},
    {"a length with a space", POST "Content-Length: 1 2\r\n\r\n{}", 400, 0},
    {"a length that wraps", POST "Content-Length: 18446744073709551618\r\n\r\n{}", 400, 0},
    {"a length in other digits", POST "Content-Length: \xd9\xa2\r\n\r\n{}", 400, 0},

    {"a chunk extension", CHUNKED "2;a=b\r\n{}\r\n0\r\n\r\n", 400, 0},
    {"a space after a size", CHUNKED "2 \r\n{}\r\n0\r\n\r\n", 400, 0},
    {"a space before a size", CHUNKED " 2\r\n{}\r\n0\r\n\r\n", 400, 0},
    {"a size with a sign", CHUNKED "+2\r\n{}\r\n0\r\n\r\n", 400, 0},
    {"a size with 0x", CHUNKED "0x2\r\n{}\r\n0\r\n\r\n", 400, 0},
    {"a size that is no number", CHUNKED "g\r\n{}\r\n0\r\n\r\n", 400, 0},
    {"no size", CHUNKED "\r\n{}\r\n0\r\n\r\n", 400, 0},
    {"a size of 8 digits", CHUNKED "00000002\r\n{}\r\n0\r\n\r\n", 200, 0},
    {"a size of 9 digits", CHUNKED "000000002\r\n{}\r\n0\r\n\r\n", 400, 0},
    {"a size that would wrap", CHUNKED "fffffffffffffffe\r\n{}\r\n0\r\n\r\n", 400, 0},
    {"a size over the limit", CHUNKED "ffffffff\r\n{}", 413, 0},
    {"sizes over the limit together", CHUNKED "2\r\n{}\r\n3f\r\n", 413, 0},
    {"a chunk longer than said", CHUNKED "2\r\n{}}\r\n0\r\n\r\n", 400, 0},
    {"a bare LF after a size", CHUNKED "2\n{}\r\n0\r\n\r\n", 400, 0},
    {"a bare LF after a chunk", CHUNKED "2\r\n{}\n0\r\n\r\n", 400, 0},
    {"a bare CR after a size", CHUNKED "2\r{}\r\n0\r\n\r\n", 400, 0},
    {"a bare LF at the end", CHUNKED "0\r\n\n", 400, 0},
    {"a trailer", CHUNKED "0\r\nX-A: 1\r\n\r\n", 400, 0},

    {"a folded field", GET "X-A: 1\r\n  2\r\n\r\n", 400, 0},
    {"a folded field with a tab", GET "X-A: 1\r\n\t2\r\n\r\n", 400, 0},
    {"a fold after the request line", "GET /x HTTP/1.1\r\n Host: a\r\n\r\n", 400, 0},
    {"a bare LF after the request line", "GET /x HTTP/1.1\nHost: a\r\n\r\n", 400, 0},
    {"a bare LF after a field", GET "X-A: 1\n\r\n", 400, 0},
    {"bare LFs at the end", "GET /x HTTP/1.1\nHost: a\n\n", 400, 0},
    {"a bare CR in a value", GET "X-A: 1\r2\r\n\r\n", 400, 0},
    {"a bare CR in the target", "GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"a bare CR, told at once", GET "X-A: 1\r2", 400, 0},
    {"two CRs", GET "X-A: 1\r\r\n\r\n", 400, 0},
    {"an empty line first", "\r\n" GET "\r\n", 400, 0},
    {"an LF first", "\n" GET "\r\n", 400, 0},
    {"NUL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", 400, 33},
    {"NUL first", "\0", 400, 1},
    {"a control byte in a value", GET "X-A: \x01\r\n\r\n", 400, 0},
    {"DEL in a value", GET "X-A: \x7f\r\n\r\n", 400, 0},

    {"a space before the colon", GET "X-A : 1\r\n\r\n", 400, 0},
    {"a length with a space before the colon", POST "Content-Length : 2\r\n\r\n{}", 400, 0},
    {"a field without a colon", GET "X-A\r\n\r\n", 400, 0},
    {"a field without a name", GET ": 1\r\n\r\n", 400, 0},
    {"a name that is no token", GET "X(A): 1\r\n\r\n", 400, 0},
    {"a name beyond ASCII", GET "X-\xc3\xa4: 1\r\n\r\n", 400, 0},

    {"Host is missing", "GET /x HTTP/1.1\r\nX-A: 1\r\n\r\n", 400, 0},
    {"Host twice", GET "Host: a\r\n\r\n", 400, 0},
    {"an empty Host", "GET /x HTTP/1.1\r\nHost:\r\n\r\n", 400, 0},
    {"a Host with a space", "GET /x HTTP/1.1\r\nHost: a b\r\n\r\n", 400, 0},
    {"a Host with a path", "GET /x HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, 0},
    {"a Host with a user", "GET /x HTTP/1.1\r\nHost: u@a\r\n\r\n", 400, 0},
    {"a Host beyond ASCII", "GET /x HTTP/1.1\r\nHost: \xc3\xa4\r\n\r\n", 400, 0},
    {"a credential twice", GET "Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n", 400,
     0},
    {"an id twice", GET "X-Request-ID: a\r\nX-Request-ID: b\r\n\r\n", 400, 0},
    {"a type twice", GET "Content-Type: a/b\r\nContent-Type: a/b\r\n\r\n", 400, 0},
    {"another expectation", POST "Expect: 200-ok\r\n\r\n", 417, 0},
    {"a compressed body", POST "Content-Encoding: gzip\r\n\r\n", 415, 0},

    {"HTTP/1.0", "GET /x HTTP/1.0\r\nHost: a\r\n\r\n", 505, 0},
    {"HTTP/2.0", "GET /x HTTP/2.0\r\nHost: a\r\n\r\n", 505, 0},
    {"HTTP/1.10", "GET /x HTTP/1.10\r\nHost: a\r\n\r\n", 400, 0},
    {"a version in small letters", "GET /x http/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"no version", "GET /x\r\nHost: a\r\n\r\n", 400, 0},
    {"the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, 0},
    {"two spaces", "GET  /x HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"a space after the version", "GET /x HTTP/1.1 \r\nHost: a\r\n\r\n", 400, 0},
    {"a tab between", "GET\t/x\tHTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"a space first", " GET /x HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"a method that is no token", "G@T /x HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"an absolute target", "GET https://a/x HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"an authority as target", "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"an asterisk as target", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"a fragment", "GET /x#y HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
    {"a target beyond ASCII", "GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n", 400, 0},
};
#define ROW_COUNT (sizeof(rows) / sizeof(rows[0]))

static size_t row_size(size_t i)
{
    return rows[i].size != 0 ? rows[i].size : strlen(rows[i].bytes);
}

Test(gateway_http, good_and_bad_requests)
{
    for (size_t i = 0; i < ROW_COUNT; i++) {
        cr_expect_eq(status_of(rows[i].bytes, row_size(i)), rows[i].status, "%s: %d, not %d",
                     rows[i].what, status_of(rows[i].bytes, row_size(i)), rows[i].status);
    }
}

/* Where the bytes are cut on their way changes nothing. */
Test(gateway_http, cut_at_every_byte)
{
    for (size_t i = 0; i < ROW_COUNT; i++) {
        struct reading slow = {0};
        for (size_t cut = 0; cut <= row_size(i); cut++) {
            struct reading reading = {0};
            read_on(&reading, rows[i].bytes, cut);
            read_on(&reading, rows[i].bytes, row_size(i));
            cr_assert_eq(reading.status, rows[i].status, "%s: cut at %zu: %d", rows[i].what, cut,
                         reading.status);
            read_on(&slow, rows[i].bytes, cut); /* and byte by byte */
        }
        cr_assert_eq(slow.status, rows[i].status, "%s: byte by byte: %d", rows[i].what,
                     slow.status);
    }
}

Test(gateway_http, a_head_of_the_largest_size)
{
    char bytes[HEAD_MAX + 2];
    size_t before = strlen(GET "X-A: ");
    for (size_t size = HEAD_MAX - 1; size <= HEAD_MAX + 1; size++) {
        memset(bytes, 'x', sizeof(bytes));
        memcpy(bytes, GET "X-A: ", before);
        memcpy(bytes + size - 4, "\r\n\r\n", 4);
        cr_expect_eq(status_of(bytes, size), size <= HEAD_MAX ? TAKEN : 431, "%zu bytes", size);
    }
    memset(bytes, 'x', sizeof(bytes));
    cr_expect_eq(status_of(bytes, HEAD_MAX - 1), MISSING);
    cr_expect_eq(status_of(bytes, HEAD_MAX), 431, "no more than the limit is waited for");
}

Test(gateway_http, as_many_fields_as_are_permitted)
{
    char bytes[HEAD_MAX];
    for (int count = CM_HTTP_FIELDS_MAX - 1; count <= CM_HTTP_FIELDS_MAX + 1; count++) {
        size_t used = (size_t)snprintf(bytes, sizeof(bytes), GET);
        for (int i = 1; i < count; i++) {
            used += (size_t)snprintf(bytes + used, sizeof(bytes) - used, "a:b\r\n");
        }
        used += (size_t)snprintf(bytes + used, sizeof(bytes) - used, "\r\n");
        cr_expect_eq(status_of(bytes, used), count <= CM_HTTP_FIELDS_MAX ? TAKEN : 431, "%d fields",
                     count);
    }
}

Test(gateway_http, what_a_head_says)
{
    static const char bytes[] =
        "POST /v1/x%20y?q=1 HTTP/1.1\r\nHost: a\r\nAUTHORIZATION: \tBearer k "
        "\r\nContent-Type: application/json;charset=utf-8\r\nx-request-id: "
        "r-1\r\nConnection: x, Close\r\nContent-Length: 12\r\n\r\n";
    struct reading reading = {0};
    struct cm_http_refusal refusal;
    struct cm_http_head head;
    read_on(&reading, bytes, sizeof(bytes) - 1);
    cr_assert_eq(reading.head_bytes, sizeof(bytes) - 1);
    cr_assert_eq(cm_http_head_parse((const uint8_t *)bytes, sizeof(bytes) - 1, &head, &refusal),
                 CM_OK);
    cr_expect(cm_span_is(head.method, "POST") && cm_span_is(head.path, "/v1/x%20y"));
    cr_expect(cm_span_is(head.authorization, "Bearer k") && cm_span_is(head.request_id, "r-1"));
    cr_expect(cm_span_is(head.content_type, "application/json;charset=utf-8"));
    cr_expect(head.has_length && head.content_length == 12 && !head.chunked);
    cr_expect(!head.keep_alive && !head.expect_continue);
}

Test(gateway_http, percent_decoding)
{
    static const struct {
        const char *in;
        const char *out; /* NULL: refused */
    } pairs[] = {{"a%2Fb", "a/b"},       {"%41%7a", "Az"},   {"", ""},      {"%c3%A4", "\xc3\xa4"},
                 {"1234567", "1234567"}, {"12345678", NULL}, {"%00", NULL}, {"%0a", NULL},
                 {"%7F", NULL},          {"%", NULL},        {"%4", NULL},  {"a%4", NULL},
                 {"%4g", NULL},          {"%%41", NULL}};
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) {
        char out[8];
        size_t size = strlen(pairs[i].in);
        char *in = malloc(size + (size == 0)); /* no NUL behind it */
        memcpy(in, pairs[i].in, size);
        bool done = cm_http_percent_decode((struct cm_span){in, size}, out, sizeof(out));
        cr_expect_eq(done, pairs[i].out != NULL, "%s", pairs[i].in);
        cr_expect(!done || strcmp(out, pairs[i].out) == 0, "%s", pairs[i].in);
        free(in);
    }
}
