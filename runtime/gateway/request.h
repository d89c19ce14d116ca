/* The body of POST /v1/chat/completions and /v1/completions: JSON in, a wire record out.
 *
 * One table says of every field of the API whether it is applied, ignored on purpose, or refused
 * by name; a field that is not in the table is refused too. docs/api.md is printed from it. */
#ifndef CASEMATE_RUNTIME_GATEWAY_REQUEST_H
#define CASEMATE_RUNTIME_GATEWAY_REQUEST_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/frame.h"
#include "runtime/base/wire.h"
#include "runtime/gateway/api_error.h"

#define CM_JSON_DEPTH_MAX 16

enum cm_endpoint { CM_ENDPOINT_CHAT = 1, CM_ENDPOINT_TEXT = 2 };

struct cm_request {
    enum cm_endpoint endpoint;
    bool stream;
    bool include_usage;
    bool continuous_usage;
    bool max_tokens_given;
    bool seed_given;
    bool prompt_given;
    bool stream_options_given;
    bool model_given;
    bool moderated;
    const struct cm_adapter_info *adapter; /* that answers; NULL: the model alone */
    struct cm_wire_generate wire;          /* without tenant */
    json_t *root;                          /* owned; texts below are borrowed from it */
    const json_t *prompt;                  /* array of messages, or a string */
    const char *stops[CM_STOPS_MAX];
};

enum cm_field_fate { CM_FIELD_APPLIED, CM_FIELD_IGNORED, CM_FIELD_REFUSED };

struct cm_field_row {
    const char *name;
    uint32_t endpoints; /* enum cm_endpoint bits */
    enum cm_field_fate fate;
    enum cm_status (*apply)(struct cm_request *request, const char *name, const json_t *value,
                            struct cm_api_error *error);
    const char *note; /* what is accepted, why it is ignored, what is missing */
};

extern const struct cm_field_row cm_field_rows[];
extern const size_t cm_field_count;

struct cm_request_limits {
    const char *model;                      /* the served name */
    const struct cm_adapter_info *adapters; /* [CM_ADAPTERS_MAX]; NULL: there are none */
    const struct cm_api_key *key;           /* who asks: its grants; NULL: has none */
    bool every_adapter;                     /* the configuration asks for no grant */
    uint32_t max_tokens_default;
    size_t record_bytes_max;
};

/* Parse and check. On CM_OK *ret_request owns memory: cm_request_free. INPUT: *ret_error. */
CM_MUST_USE enum cm_status cm_request_parse(enum cm_endpoint endpoint, const void *body,
                                            size_t bytes, const struct cm_request_limits *limits,
                                            struct cm_request *ret_request,
                                            struct cm_api_error *ret_error);
void cm_request_free(struct cm_request *request);

/* The tail of the GENERATE record (stops, then parts) as the wire wants it. Caller frees. */
CM_MUST_USE enum cm_status cm_request_encode(const struct cm_request *request, size_t bytes_max,
                                             uint8_t **ret_bytes, size_t *ret_size,
                                             struct cm_api_error *ret_error);

/* Deepest nesting of arrays and objects; jansson alone would go to 2048. */
uint32_t cm_json_depth(const void *bytes, size_t size);

/* The field tables, for docs/api.md. */
void cm_print_api(void);

#endif
