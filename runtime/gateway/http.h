/* The head of an HTTP/1.1 request, read strictly (RFC 9112), and strict chunked bodies.
 *
 * Pure: bytes in, facts out; no allocation, no socket. What a lenient parser would guess about is
 * refused, because two readers that guess differently are how requests are smuggled: obs-fold,
 * bare LF or CR, space before a colon, Transfer-Encoding beside Content-Length, repeated singleton
 * fields, lists in Content-Length, chunk extensions, trailers, targets other than origin-form. */
#ifndef CASEMATE_RUNTIME_GATEWAY_HTTP_H
#define CASEMATE_RUNTIME_GATEWAY_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/cursor.h"
#include "runtime/base/error.h"

#define CM_HTTP_FIELDS_MAX 64

struct cm_span { /* borrowed from the head's bytes */
    const char *at;
    size_t size;
};

struct cm_http_head {
    struct cm_span method;
    struct cm_span path;  /* without the query, still percent-encoded */
    struct cm_span query; /* after the '?'; empty if there is none */
    struct cm_span authorization;
    struct cm_span content_type;
    struct cm_span request_id;
    uint64_t content_length;
    bool has_length;
    bool chunked;
    bool keep_alive;
    bool expect_continue;
};

/* What the client is told; both are static strings. */
struct cm_http_refusal {
    int status;
    const char *message;
};

/* Looks for the end of a head. Returns its size (with the empty line), 0 if bytes are still
 * missing, or -1 with *ret_refusal as soon as the bytes cannot become a head. *scanned carries the
 * progress from call to call; start it at 0. */
long cm_http_head_end(const uint8_t *bytes, size_t size, size_t bytes_max, size_t *scanned,
                      struct cm_http_refusal *ret_refusal);

/* Parse exactly one head as cm_http_head_end found it. CM_E_INPUT: *ret_refusal says why. */
CM_MUST_USE enum cm_status cm_http_head_parse(const uint8_t *bytes, size_t size,
                                              struct cm_http_head *ret_head,
                                              struct cm_http_refusal *ret_refusal);

struct cm_http_chunks {
    uint64_t left;  /* of the current chunk's data */
    uint64_t total; /* data so far */
    uint64_t total_max;
    uint32_t digits; /* of the size line so far */
    uint32_t state;
};

enum cm_http_chunk {
    CM_HTTP_CHUNK_MORE, /* feed further bytes */
    CM_HTTP_CHUNK_DATA, /* *ret_data .. */
    CM_HTTP_CHUNK_END,
    CM_HTTP_CHUNK_BAD,  /* 400, close */
    CM_HTTP_CHUNK_LARGE /* 413, close */
};

void cm_http_chunks_init(struct cm_http_chunks *chunks, uint64_t total_max);
/* Take the next piece from `in`; what it has read is consumed there. */
enum cm_http_chunk cm_http_chunks_next(struct cm_http_chunks *chunks, struct cm_cursor *in,
                                       const uint8_t **ret_data, size_t *ret_bytes);

bool cm_span_is(struct cm_span span, const char *text);
bool cm_span_is_nocase(struct cm_span span, const char *text);
/* Percent-decode into out (terminated). False: bad escape, NUL, control byte, or no room. */
bool cm_http_percent_decode(struct cm_span in, char *out, size_t out_size);

#endif
