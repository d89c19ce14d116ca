/* The wire between gateway and worker: record types and payloads on the two rings.
 *
 * Same build on both sides, so payloads are plain structs followed by bytes; the worker still
 * treats every field as hostile (the gateway parses the network), and the gateway treats the
 * worker's the same way. docs/wire.md is generated from cm_wire_rows. */
#ifndef CASEMATE_RUNTIME_BASE_WIRE_H
#define CASEMATE_RUNTIME_BASE_WIRE_H

#include <stdint.h>

enum cm_wire_type {
    CM_WIRE_GENERATE = 1, /* gateway -> worker: struct cm_wire_generate, then stops, then parts */
    CM_WIRE_CANCEL,       /* gateway -> worker: no payload; unknown ids are ignored */
    CM_WIRE_HELLO,        /* worker -> gateway: struct cm_wire_hello; first record of each ring */
    CM_WIRE_ACCEPTED,     /* worker -> gateway: struct cm_wire_accepted */
    CM_WIRE_REFUSED,      /* worker -> gateway: struct cm_wire_refused; the request is over */
    CM_WIRE_TEXT,         /* worker -> gateway: struct cm_wire_text, then released UTF-8 */
    CM_WIRE_DONE,         /* worker -> gateway: struct cm_wire_done; the request is over */
    CM_WIRE_STATS,        /* worker -> gateway, about once a second: struct cm_wire_stats */
    CM_WIRE_VERDICT,      /* worker -> gateway: struct cm_wire_verdict; before the REFUSED, TEXT or
                             DONE that it explains */
    CM_WIRE_TYPE_COUNT
};

struct cm_wire_row {
    const char *name;
    const char *way;
    uint32_t bytes_min;
    uint32_t bytes_max; /* UINT32_MAX: bounded by the ring's payload_max */
    const char *meaning;
};
extern const struct cm_wire_row cm_wire_rows[CM_WIRE_TYPE_COUNT];

#define CM_STOPS_MAX      4   /* stop strings per request */
#define CM_STOP_BYTES_MAX 256 /* each */
#define CM_MESSAGES_MAX   256 /* messages per request */

/* How the next token is chosen. Order: penalties, temperature, top-k, min-p, top-p, draw by
 * Philox(seed, index of the token in the reply). temperature 0 = greedy, the rest is then without
 * effect but penalties. */
struct cm_sampling {
    float temperature;        /* 0 .. 2 */
    float top_p;              /* (0, 1]; 1: off */
    float min_p;              /* [0, 1]; 0: off */
    uint32_t top_k;           /* 0: off */
    float frequency_penalty;  /* -2 .. 2 */
    float presence_penalty;   /* -2 .. 2 */
    float repetition_penalty; /* (0, 4]; 1: off; applies to prompt and reply */
    uint32_t reserved;
    uint64_t seed;
};

enum cm_prompt_kind { CM_PROMPT_CHAT = 1, CM_PROMPT_TEXT = 2 };
enum cm_chat_role { CM_CHAT_SYSTEM = 1, CM_CHAT_USER = 2, CM_CHAT_ASSISTANT = 3 };

/* Followed by: stop_count × (u32 bytes, bytes), then part_count × (u32 enum cm_chat_role, u32
 * bytes, bytes), nothing else. A text prompt is one part of role 0. Text is UTF-8, checked by both.
 */
struct cm_wire_generate {
    uint32_t prompt_kind;
    uint32_t part_count;
    uint32_t stop_count;
    uint32_t max_tokens; /* 0: up to the context */
    uint32_t min_tokens;
    uint32_t ignore_eos;
    uint64_t tenant;  /* from the authenticated key, never from the client */
    uint64_t adapter; /* generation of the adapter that answers; 0: the model alone */
    struct cm_sampling sampling;
};

struct cm_wire_hello {
    char model_name[64];
    char package_digest[65]; /* hex of the core digest, terminated */
    char device[63];
    uint32_t context_max;
    uint32_t vocabulary;
    uint32_t sequences_max;
    uint32_t queue_max;
    uint32_t kv_pages;
    uint32_t kv_page_positions;
    uint32_t kv_int8; /* 1: keys and values are kept as int8; 0: fp16 */
    uint32_t reserved;
    uint64_t kv_page_bytes;
    uint64_t created_unix_s;
};

struct cm_wire_accepted {
    uint32_t prompt_tokens;
    uint32_t cached_tokens;
    uint32_t max_tokens; /* as bounded by the context */
    uint32_t reserved;
};

enum cm_refusal {
    CM_REFUSAL_NONE = 0,    /* never sent */
    CM_REFUSAL_CONTEXT = 1, /* prompt_tokens over limit: 400 */
    CM_REFUSAL_QUEUE = 2,   /* 429 */
    CM_REFUSAL_INPUT = 3,   /* malformed: 400 */
    CM_REFUSAL_DRAIN = 4,   /* 503 */
    CM_REFUSAL_FAILED = 5,  /* 500 */
    CM_REFUSAL_EMPTY = 6,   /* the prompt has no token: 400 */
    CM_REFUSAL_FILTER = 7,  /* the guard refused the prompt: 400 content_filter */
    CM_REFUSAL_ADAPTER = 8, /* its adapter is not loaded any more: 409 */
};

struct cm_wire_refused {
    uint32_t reason; /* enum cm_refusal */
    uint32_t prompt_tokens;
    uint32_t limit;
    uint32_t reserved;
};

struct cm_wire_text {
    uint32_t completion_tokens; /* so far */
    uint32_t bytes;             /* of UTF-8 that follow; never ends inside a character */
};

/* What a rule of the guard found, and what came of it. Never the text itself. */
#define CM_RULE_ID_BYTES  48 /* terminated, [a-z0-9-] */
#define CM_CATEGORY_BYTES 32 /* terminated, [a-z0-9-/] */

enum cm_verdict_action {
    CM_VERDICT_REPORT = 1, /* nothing was changed */
    CM_VERDICT_REDACT = 2, /* output: the span was replaced */
    CM_VERDICT_REFUSE = 3, /* the prompt was refused, or the reply ends before the span */
};
enum cm_verdict_stage { CM_VERDICT_INPUT = 1, CM_VERDICT_OUTPUT = 2 };

struct cm_wire_verdict {
    char rule[CM_RULE_ID_BYTES];
    char category[CM_CATEGORY_BYTES];
    uint32_t action; /* enum cm_verdict_action */
    uint32_t stage;  /* enum cm_verdict_stage */
    uint32_t part;   /* input: index of the message; output: 0 */
    uint32_t reserved;
    uint64_t offset; /* of the span, in bytes of the message or of the unfiltered reply */
    uint64_t bytes;
};

enum cm_finish {
    CM_FINISH_NONE = 0,
    CM_FINISH_STOP = 1, /* end token or stop string */
    CM_FINISH_LENGTH = 2,
    CM_FINISH_FILTER = 3, /* content_filter */
    CM_FINISH_CANCELLED = 4,
    CM_FINISH_FAILED = 5, /* the device or the worker failed in mid-reply */
};

struct cm_wire_done {
    uint32_t finish; /* enum cm_finish */
    uint32_t prompt_tokens;
    uint32_t completion_tokens;
    uint32_t cached_tokens;
    uint64_t queue_us, prefill_us, decode_us;
};

struct cm_wire_stats {
    uint32_t running;
    uint32_t waiting;
    uint32_t kv_pages_used;
    uint32_t kv_pages;
    uint64_t prompt_tokens_total;
    uint64_t completion_tokens_total;
    uint64_t steps_total;
    uint64_t preemptions_total;
    uint64_t last_step_us; /* CLOCK_MONOTONIC */
};

#endif
