/* Strict HTTP/1.1 request heads and chunked bodies. */
#include "runtime/gateway/http.h"

#include <string.h>
#include <strings.h>

#include "runtime/base/hex.h"

static enum cm_status refuse(struct cm_http_refusal *ret_refusal, int status, const char *message)
{
    *ret_refusal = (struct cm_http_refusal){status, message};
    return CM_E_INPUT;
}

bool cm_span_is(struct cm_span span, const char *text)
{
    return strlen(text) == span.size && memcmp(span.at, text, span.size) == 0;
}

bool cm_span_is_nocase(struct cm_span span, const char *text)
{
    return strlen(text) == span.size && strncasecmp(span.at, text, span.size) == 0;
}

static bool token_byte(uint8_t byte)
{
    return (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') ||
           (byte >= 'A' && byte <= 'Z') ||
           (byte != '\0' && strchr("!#$%&'*+-.^_`|~", byte) != NULL);
}

/* field-vchar, SP, HTAB; obs-text (0x80 up) stays opaque (RFC 9110 5.5) */
static bool value_byte(uint8_t byte)
{
    return byte == '\t' || (byte >= 0x20 && byte != 0x7f);
}

long cm_http_head_end(const uint8_t *bytes, size_t size, size_t bytes_max, size_t *scanned,
                      struct cm_http_refusal *ret_refusal)
{
    for (size_t i = *scanned; i < size && i < bytes_max; i++) {
        if (bytes[i] == '\n' && (i == 0 || bytes[i - 1] != '\r')) {
            refuse(ret_refusal, 400, "a line of the head ends without CR");
            return -1;
        }
        if (i > 0 && bytes[i - 1] == '\r' && bytes[i] != '\n') {
            refuse(ret_refusal, 400, "CR inside a line of the head");
            return -1;
        }
        if (bytes[i] == '\0') {
            refuse(ret_refusal, 400, "NUL in the head");
            return -1;
        }
        if (i == 1 && bytes[i] == '\n') {
            refuse(ret_refusal, 400, "empty line before the request line");
            return -1;
        }
        if (bytes[i] == '\n' && i >= 3 && bytes[i - 2] == '\n') {
            return (long)(i + 1);
        }
        *scanned = i + 1;
    }
    if (size >= bytes_max) {
        refuse(ret_refusal, 431, "the head of the request is too large");
        return -1;
    }
    return 0;
}

/* The next line without CRLF; head_end has made sure that each CR stands before an LF. */
static bool line_take(struct cm_cursor *cursor, struct cm_span *ret_line)
{
    const uint8_t *from = cursor->bytes + cursor->offset;
    const uint8_t *end = memchr(from, '\r', cm_cursor_left(cursor));
    if (end == NULL) {
        return false;
    }
    size_t size = (size_t)(end - from);
    const uint8_t *line = cm_cursor_take(cursor, size + 2);
    if (line == NULL || line[size + 1] != '\n') {
        return false;
    }
    *ret_line = (struct cm_span){(const char *)line, size};
    return true;
}

static enum cm_status target_parse(struct cm_span target, struct cm_http_head *head,
                                   struct cm_http_refusal *ret_refusal)
{
    if (target.size == 0 || target.at[0] != '/') {
        return refuse(ret_refusal, 400, "the target must begin with '/'");
    }
    for (size_t i = 0; i < target.size; i++) {
        uint8_t byte = (uint8_t)target.at[i];
        if (byte <= 0x20 || byte >= 0x7f || byte == '#') {
            return refuse(ret_refusal, 400, "byte not permitted in the target");
        }
    }
    const char *query = memchr(target.at, '?', target.size);
    head->path = target;
    if (query != NULL) {
        head->path.size = (size_t)(query - target.at);
        head->query = (struct cm_span){query + 1, target.size - head->path.size - 1};
    }
    return CM_OK;
}

static enum cm_status request_line_parse(struct cm_span line, struct cm_http_head *head,
                                         struct cm_http_refusal *ret_refusal)
{
    const char *first = memchr(line.at, ' ', line.size);
    if (first == NULL || first == line.at) {
        return refuse(ret_refusal, 400, "malformed request line");
    }
    head->method = (struct cm_span){line.at, (size_t)(first - line.at)};
    for (size_t i = 0; i < head->method.size; i++) {
        if (!token_byte((uint8_t)head->method.at[i])) {
            return refuse(ret_refusal, 400, "malformed method");
        }
    }
    const char *rest = first + 1;
    size_t left = line.size - head->method.size - 1;
    const char *second = memchr(rest, ' ', left);
    if (second == NULL) {
        return refuse(ret_refusal, 400, "malformed request line");
    }
    struct cm_span target = {rest, (size_t)(second - rest)};
    struct cm_span version = {second + 1, left - target.size - 1};
    if (version.size != 8 || memcmp(version.at, "HTTP/", 5) != 0 || version.at[5] < '0' ||
        version.at[5] > '9' || version.at[6] != '.' || version.at[7] < '0' || version.at[7] > '9') {
        return refuse(ret_refusal, 400, "malformed version");
    }
    if (!cm_span_is(version, "HTTP/1.1")) {
        return refuse(ret_refusal, 505, "only HTTP/1.1 is served here");
    }
    return target_parse(target, head, ret_refusal);
}

static enum cm_status length_parse(struct cm_span value, struct cm_http_head *head,
                                   struct cm_http_refusal *ret_refusal)
{
    uint64_t length = 0;
    if (value.size == 0 || value.size > 18) { /* 18 digits cannot overflow */
        return refuse(ret_refusal, 400, "malformed Content-Length");
    }
    for (size_t i = 0; i < value.size; i++) {
        if (value.at[i] < '0' || value.at[i] > '9') {
            return refuse(ret_refusal, 400, "malformed Content-Length");
        }
        length = length * 10 + (uint64_t)(value.at[i] - '0');
    }
    head->content_length = length;
    head->has_length = true;
    return CM_OK;
}

static struct cm_span trimmed(struct cm_span span)
{
    while (span.size > 0 && (span.at[0] == ' ' || span.at[0] == '\t')) {
        span.at++;
        span.size--;
    }
    while (span.size > 0 && (span.at[span.size - 1] == ' ' || span.at[span.size - 1] == '\t')) {
        span.size--;
    }
    return span;
}

static void connection_parse(struct cm_span value, struct cm_http_head *head)
{
    while (value.size > 0) {
        const char *comma = memchr(value.at, ',', value.size);
        size_t size = comma != NULL ? (size_t)(comma - value.at) : value.size;
        if (cm_span_is_nocase(trimmed((struct cm_span){value.at, size}), "close")) {
            head->keep_alive = false;
        }
        size_t used = comma != NULL ? size + 1 : size;
        value.at += used;
        value.size -= used;
    }
}

/* Fields that may stand once; `seen` has a bit for each. */
enum singleton {
    FIELD_HOST,
    FIELD_LENGTH,
    FIELD_ENCODING,
    FIELD_AUTHORIZATION,
    FIELD_TYPE,
    FIELD_EXPECT,
    FIELD_REQUEST_ID,
    FIELD_CONTENT_ENCODING,
    FIELD_SINGLETONS
};
static const char *const singleton_names[FIELD_SINGLETONS] = {
    "host",         "content-length", "transfer-encoding", "authorization",
    "content-type", "expect",         "x-request-id",      "content-encoding"};

/* uri-host [":" port] by its bytes, RFC 9112 3.2: what is not must be refused, though no route here
 * depends on it. */
static bool host_sound(struct cm_span value)
{
    for (size_t i = 0; i < value.size; i++) {
        uint8_t byte = (uint8_t)value.at[i];
        if (byte >= 0x7f || (!token_byte(byte) && strchr("()=,;:[]", byte) == NULL) ||
            strchr("#^`|", byte) != NULL) {
            return false;
        }
    }
    return value.size > 0;
}

static enum cm_status singleton_apply(enum singleton field, struct cm_span value,
                                      struct cm_http_head *head,
                                      struct cm_http_refusal *ret_refusal)
{
    switch (field) {
    case FIELD_HOST:
        return host_sound(value) ? CM_OK : refuse(ret_refusal, 400, "malformed Host");
    case FIELD_LENGTH:
        return length_parse(value, head, ret_refusal);
    case FIELD_ENCODING:
        head->chunked = cm_span_is_nocase(value, "chunked");
        return head->chunked ? CM_OK
                             : refuse(ret_refusal, 501, "Transfer-Encoding must be chunked");
    case FIELD_AUTHORIZATION:
        head->authorization = value;
        return CM_OK;
    case FIELD_TYPE:
        head->content_type = value;
        return CM_OK;
    case FIELD_EXPECT:
        head->expect_continue = cm_span_is_nocase(value, "100-continue");
        return head->expect_continue ? CM_OK : refuse(ret_refusal, 417, "unknown expectation");
    case FIELD_REQUEST_ID:
        head->request_id = value;
        return CM_OK;
    case FIELD_CONTENT_ENCODING:
        return cm_span_is_nocase(value, "identity")
                   ? CM_OK
                   : refuse(ret_refusal, 415, "compressed bodies are not accepted");
    case FIELD_SINGLETONS:
        break;
    }
    return CM_OK;
}

static enum cm_status field_parse(struct cm_span line, uint32_t *seen, struct cm_http_head *head,
                                  struct cm_http_refusal *ret_refusal)
{
    if (line.at[0] == ' ' || line.at[0] == '\t') {
        return refuse(ret_refusal, 400, "folded header field");
    }
    const char *colon = memchr(line.at, ':', line.size);
    if (colon == NULL || colon == line.at) {
        return refuse(ret_refusal, 400, "header field without a name");
    }
    struct cm_span name = {line.at, (size_t)(colon - line.at)};
    for (size_t i = 0; i < name.size; i++) {
        if (!token_byte((uint8_t)name.at[i])) {
            return refuse(ret_refusal, 400, "byte not permitted in a header name");
        }
    }
    struct cm_span value = trimmed((struct cm_span){colon + 1, line.size - name.size - 1});
    for (size_t i = 0; i < value.size; i++) {
        if (!value_byte((uint8_t)value.at[i])) {
            return refuse(ret_refusal, 400, "byte not permitted in a header value");
        }
    }
    if (cm_span_is_nocase(name, "connection")) {
        connection_parse(value, head);
        return CM_OK;
    }
    for (uint32_t i = 0; i < FIELD_SINGLETONS; i++) {
        if (!cm_span_is_nocase(name, singleton_names[i])) {
            continue;
        }
        if ((*seen & (1u << i)) != 0) {
            return refuse(ret_refusal, 400, "a header field that may stand once is repeated");
        }
        *seen |= 1u << i;
        return singleton_apply((enum singleton)i, value, head, ret_refusal);
    }
    return CM_OK;
}

enum cm_status cm_http_head_parse(const uint8_t *bytes, size_t size, struct cm_http_head *ret_head,
                                  struct cm_http_refusal *ret_refusal)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    struct cm_http_head head = {.keep_alive = true};
    struct cm_span line;
    uint32_t seen = 0;
    uint32_t count = 0;
    if (!line_take(&cursor, &line)) {
        return refuse(ret_refusal, 400, "malformed request line");
    }
    enum cm_status status = request_line_parse(line, &head, ret_refusal);
    if (status != CM_OK) {
        return status;
    }
    for (;;) {
        if (!line_take(&cursor, &line)) {
            return refuse(ret_refusal, 400, "unfinished head");
        }
        if (line.size == 0) {
            break;
        }
        if (++count > CM_HTTP_FIELDS_MAX) {
            return refuse(ret_refusal, 431, "too many header fields");
        }
        status = field_parse(line, &seen, &head, ret_refusal);
        if (status != CM_OK) {
            return status;
        }
    }
    if (cm_cursor_left(&cursor) != 0) {
        return refuse(ret_refusal, 400, "bytes behind the head");
    }
    if ((seen & (1u << FIELD_HOST)) == 0) {
        return refuse(ret_refusal, 400, "Host is missing");
    }
    if (head.chunked && head.has_length) {
        return refuse(ret_refusal, 400, "Transfer-Encoding beside Content-Length");
    }
    *ret_head = head;
    return CM_OK;
}

/* ------------------------------------------------------------------ chunked bodies */

enum { CHUNK_SIZE, CHUNK_SIZE_LF, CHUNK_DATA, CHUNK_CR, CHUNK_LF, CHUNK_LAST_CR, CHUNK_LAST_LF };

void cm_http_chunks_init(struct cm_http_chunks *chunks, uint64_t total_max)
{
    *chunks = (struct cm_http_chunks){.total_max = total_max, .state = CHUNK_SIZE};
}

/* One byte of a size line. At most 8 digits: no overflow, and no line that never ends. */
static enum cm_http_chunk size_byte(struct cm_http_chunks *chunks, uint8_t byte)
{
    int digit = cm_hex_digit((char)byte);
    if (digit >= 0 && chunks->digits < 8) {
        chunks->left = chunks->left * 16 + (uint64_t)digit;
        chunks->digits++;
        return CM_HTTP_CHUNK_MORE;
    }
    if (byte != '\r' || chunks->digits == 0) {
        return CM_HTTP_CHUNK_BAD; /* extensions too: nobody needs them, smugglers do */
    }
    chunks->state = CHUNK_SIZE_LF;
    return CM_HTTP_CHUNK_MORE;
}

/* After the size line; the total is checked before a byte of the chunk is taken. */
static enum cm_http_chunk size_end(struct cm_http_chunks *chunks)
{
    chunks->digits = 0;
    if (chunks->left == 0) {
        chunks->state = CHUNK_LAST_CR;
        return CM_HTTP_CHUNK_MORE;
    }
    if (chunks->left > chunks->total_max - chunks->total) {
        return CM_HTTP_CHUNK_LARGE;
    }
    chunks->total += chunks->left;
    chunks->state = CHUNK_DATA;
    return CM_HTTP_CHUNK_MORE;
}

static enum cm_http_chunk control_byte(struct cm_http_chunks *chunks, uint8_t byte)
{
    if (chunks->state == CHUNK_SIZE) {
        return size_byte(chunks, byte);
    }
    bool wants_cr = chunks->state == CHUNK_CR || chunks->state == CHUNK_LAST_CR;
    if (byte != (wants_cr ? '\r' : '\n')) {
        return CM_HTTP_CHUNK_BAD;
    }
    switch (chunks->state) {
    case CHUNK_SIZE_LF:
        return size_end(chunks);
    case CHUNK_LF:
        chunks->state = CHUNK_SIZE;
        return CM_HTTP_CHUNK_MORE;
    case CHUNK_LAST_LF:
        return CM_HTTP_CHUNK_END;
    default:
        chunks->state++; /* CR is always followed by its LF */
        return CM_HTTP_CHUNK_MORE;
    }
}

enum cm_http_chunk cm_http_chunks_next(struct cm_http_chunks *chunks, struct cm_cursor *in,
                                       const uint8_t **ret_data, size_t *ret_bytes)
{
    while (cm_cursor_left(in) > 0) {
        if (chunks->state == CHUNK_DATA) {
            size_t bytes =
                chunks->left < cm_cursor_left(in) ? (size_t)chunks->left : cm_cursor_left(in);
            *ret_data = cm_cursor_take(in, bytes);
            *ret_bytes = bytes;
            chunks->left -= bytes;
            if (chunks->left == 0) {
                chunks->state = CHUNK_CR;
            }
            return CM_HTTP_CHUNK_DATA;
        }
        enum cm_http_chunk result = control_byte(chunks, cm_cursor_u8(in));
        if (result != CM_HTTP_CHUNK_MORE) {
            return result;
        }
    }
    return CM_HTTP_CHUNK_MORE;
}

bool cm_http_percent_decode(struct cm_span in, char *out, size_t out_size)
{
    size_t used = 0;
    for (size_t i = 0; i < in.size; i++) {
        uint8_t byte = (uint8_t)in.at[i];
        if (byte == '%') {
            int high = in.size - i > 2 ? cm_hex_digit(in.at[i + 1]) : -1;
            int low = in.size - i > 2 ? cm_hex_digit(in.at[i + 2]) : -1;
            if (high < 0 || low < 0) {
                return false;
            }
            byte = (uint8_t)(high * 16 + low);
            i += 2;
        }
        if (byte < 0x20 || byte == 0x7f || used + 1 >= out_size) {
            return false;
        }
        out[used++] = (char)byte;
    }
    out[used] = '\0';
    return true;
}
