/* Control frames: what roles say to the supervisor over descriptor 3, and the descriptor table.
 *
 * One SOCK_SEQPACKET socketpair per child; one frame a packet: header, fixed payload, descriptors
 * by SCM_RIGHTS. cm_frames below is the whole protocol: type, sender, receiver, phase, once or
 * many, least and greatest payload, descriptors. A frame that is not in the table, comes from the
 * wrong side, in the wrong phase, with the wrong size or a second time is a protocol violation:
 * the receiver fails with CM-FRAME-… and the supervisor ends the child. docs/wire.md is generated
 * from this table. All processes are of one build on one machine: payloads are plain structs. */
#ifndef CASEMATE_RUNTIME_BASE_FRAME_H
#define CASEMATE_RUNTIME_BASE_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/role_end.h"
#include "runtime/base/secret.h"

/* Descriptors at fixed numbers in every role (design section 3). */
enum cm_fd {
    CM_FD_CONTROL = 3,
    CM_FD_LOG = 4,
    CM_FD_INPUT =
        5, /* gateway: listener; worker: package; keeper: head memfd; devtpm: state file */
    CM_FD_REQUEST_DATA = 6,   /* ring gateway -> worker: producer's memfd */
    CM_FD_REQUEST_CURSOR = 7, /* its consumer's cursor memfd */
    CM_FD_RESPONSE_DATA = 8,  /* ring worker -> gateway */
    CM_FD_RESPONSE_CURSOR = 9,
    CM_FD_REQUEST_EVENT = 10,  /* eventfd: the worker has requests, or room for responses */
    CM_FD_RESPONSE_EVENT = 11, /* eventfd: the gateway has responses, or room for requests */
    CM_FD_TPM = 13,            /* keeper: TPM; devtpm: its end of the keeper's socketpair */
    CM_FD_COUNT
};

/* Indexed by enum cm_fd: which roles may hold it, and as what. 0 to 2 are /dev/null in every role.
 */
struct cm_fd_row {
    const char *name;
    uint32_t roles; /* enum cm_role bits */
    const char *meaning;
};
extern const struct cm_fd_row cm_fd_rows[CM_FD_COUNT];

#define CM_RING_FD_COUNT 6 /* CM_FD_REQUEST_DATA .. CM_FD_RESPONSE_EVENT, in this order */

enum cm_role {
    CM_ROLE_SUPERVISOR = 1,
    CM_ROLE_GATEWAY = 2,
    CM_ROLE_KEEPER = 4,
    CM_ROLE_WORKER = 8,
    CM_ROLE_DEVTPM = 16,
    CM_ROLE_ANY_CHILD = 2 | 4 | 8 | 16,
};

enum cm_phase { CM_PHASE_START = 1, CM_PHASE_SERVE = 2, CM_PHASE_DRAIN = 4 };

enum cm_frame_type {
    CM_FRAME_CONFIG = 1,     /* S -> child: the role's configuration; first frame of all */
    CM_FRAME_READY,          /* child -> S: the role serves, so confined; phase becomes SERVE */
    CM_FRAME_FAILED,         /* child -> S: struct cm_error; the child exits after it */
    CM_FRAME_PROGRESS,       /* worker -> S: load progress */
    CM_FRAME_STATE,          /* S -> gateway: what the probes answer */
    CM_FRAME_RINGS,          /* S -> gateway, worker: six descriptors of a fresh pair of rings */
    CM_FRAME_KEY_REQUEST,    /* S -> keeper: package key page for a worker generation */
    CM_FRAME_KEY_PAGE,       /* keeper -> S -> worker: its descriptor */
    CM_FRAME_TLS_REQUEST,    /* S -> keeper: TLS key page for a gateway generation */
    CM_FRAME_TLS_PAGE,       /* keeper -> S -> gateway: its descriptor, and the certificate */
    CM_FRAME_LOADED,         /* worker -> S -> keeper: key page wiped; the keeper checks that */
    CM_FRAME_KEYS,           /* S -> gateway: sealed memfd with the table of API keys */
    CM_FRAME_HEARTBEAT,      /* child -> S, once a second: alive, with figures */
    CM_FRAME_DRAIN,          /* S -> gateway, worker: finish by the deadline */
    CM_FRAME_DRAINED,        /* gateway, worker -> S: nothing is left in flight */
    CM_FRAME_STOP,           /* S -> child: exit now with 0 */
    CM_FRAME_MEASURE,        /* S -> keeper: a sealed file that belongs into the next event */
    CM_FRAME_UNSEAL,         /* S -> keeper: everything is measured; extend, unseal */
    CM_FRAME_QUOTE,          /* gateway -> S -> keeper: evidence for a nonce; S: its own (id 0) */
    CM_FRAME_EVIDENCE,       /* keeper -> S -> gateway: it, in a sealed memfd */
    CM_FRAME_RULES,          /* S -> worker: the rule pack, sealed; CONFIG says whether it comes */
    CM_FRAME_QUOTE_FAILED,   /* keeper -> S -> gateway: why there is none */
    CM_FRAME_BROKEN,         /* gateway, worker -> S: the other one broke the wire's rules */
    CM_FRAME_ADAPTER_OPEN,   /* S -> keeper: an adapter's head: unseal its key and keep it */
    CM_FRAME_ADAPTER_KEY,    /* S -> keeper: hand its key out in the key page */
    CM_FRAME_ADAPTER_ANSWER, /* keeper -> S: unsealed, or why one of the two cannot be */
    CM_FRAME_ADAPTER_PAGE,   /* keeper -> S: the page */
    CM_FRAME_ADAPTER_CLOSE,  /* S -> keeper: the load is over, the page wiped; or: forget the key */
    CM_FRAME_ADAPTER_LOAD,   /* S -> worker: the page, with its key: load it */
    CM_FRAME_ADAPTER_READ,   /* worker -> S: it wants these bytes of the file */
    CM_FRAME_ADAPTER_BYTES,  /* S -> worker: they, in sealed memory */
    CM_FRAME_ADAPTER_UNLOAD, /* S -> worker: finish with it, wipe it */
    CM_FRAME_ADAPTER_STATE,  /* worker -> S: loaded, failed, unloaded */
    CM_FRAME_TLS_IDENTITY,   /* keeper -> S -> next keeper: TLS key page and certificate, to stay */
    CM_FRAME_TYPE_COUNT
};

#define CM_FRAME_PAYLOAD_BYTES 8192
#define CM_FRAME_FDS           CM_RING_FD_COUNT

struct cm_frame_row {
    const char *name;
    uint32_t senders;   /* enum cm_role bits */
    uint32_t receivers; /* enum cm_role bits */
    uint32_t phases;    /* enum cm_phase bits: when the receiver permits it */
    bool once;          /* at most one per connection and direction */
    uint32_t bytes_min; /* payload */
    uint32_t bytes_max;
    uint32_t fds;       /* exact number of descriptors */
    const char *reason; /* for docs/wire.md */
};

/* Indexed by enum cm_frame_type; row 0 is empty. */
extern const struct cm_frame_row cm_frames[CM_FRAME_TYPE_COUNT];

/* One end of a control channel. */
struct cm_channel {
    int fd;
    enum cm_role self;
    enum cm_role peer;
    enum cm_phase phase;
    uint64_t sent_once;     /* bits by type */
    uint64_t received_once; /* bits by type */
};

struct cm_frame {
    uint16_t type;
    uint32_t bytes;
    uint32_t fd_count;
    int fds[CM_FRAME_FDS]; /* received descriptors are O_CLOEXEC and owned by the receiver */
    uint8_t payload[CM_FRAME_PAYLOAD_BYTES] __attribute__((aligned(8)));
};

void cm_channel_init(struct cm_channel *channel, int fd, enum cm_role self, enum cm_role peer);

/* Send one frame; fds are borrowed. Fails: SYSTEM (EPIPE: the peer is gone), BUSY (socket full),
 * BUG (the table does not permit it). */
CM_MUST_USE enum cm_status cm_channel_send(struct cm_channel *channel, enum cm_frame_type type,
                                           const void *payload, size_t bytes, const int *fds,
                                           size_t fd_count, struct cm_error *err);

/* Receive one frame without blocking. CM_E_BUSY: nothing there. CM_E_SYSTEM with subcode EPIPE: the
 * peer has closed. CM_E_INPUT: protocol violation (all received descriptors are closed). */
CM_MUST_USE enum cm_status cm_channel_receive(struct cm_channel *channel, struct cm_frame *frame,
                                              struct cm_error *err);

/* As receive, but waits up to timeout_ms (-1: for ever). CM_E_BUSY on timeout. */
CM_MUST_USE enum cm_status cm_channel_wait(struct cm_channel *channel, struct cm_frame *frame,
                                           int timeout_ms, struct cm_error *err);

/* Wait for a frame of type `wanted`, or for STOP, as long as it takes: a HEARTBEAT each second
 * meanwhile. Every other frame goes to `other`, which takes its descriptors or closes them. */
typedef enum cm_status (*cm_frame_other)(void *context, struct cm_frame *frame,
                                         struct cm_error *err);
CM_MUST_USE enum cm_status cm_channel_await(struct cm_channel *channel, enum cm_frame_type wanted,
                                            cm_frame_other other, void *context,
                                            struct cm_frame *frame, struct cm_error *err);

void cm_frame_close_fds(struct cm_frame *frame);

/* [A-Za-z0-9._-]{1,63}, not beginning with a dot: nodes, adapters, their files. */
bool cm_name_valid(const char *name);

/* ------------------------------------------------------------------ payloads */

#define CM_NAME_BYTES       64 /* terminated: model name, node name */
#define CM_PUBLIC_KEY_BYTES 65 /* uncompressed P-256 point */
#define CM_DIGEST_BYTES     32

struct cm_ready {
    uint32_t probed; /* layers of sandbox/layers.h that the role itself has tried */
    uint32_t reserved;
};

#define CM_ADAPTERS_MAX       8u
#define CM_ADAPTER_OWNERS_MAX 4u

/* Whose adapters may be loaded; pinned in `sealed:`. */
struct cm_adapter_owner {
    uint8_t package[CM_PUBLIC_KEY_BYTES]; /* who signs packages */
    uint8_t policy[CM_PUBLIC_KEY_BYTES];  /* who signs the states that may unseal them */
};
struct cm_adapter_owners {
    uint32_t count;
    struct cm_adapter_owner each[CM_ADAPTER_OWNERS_MAX];
};

struct cm_config_gateway { /* CM_FRAME_CONFIG to the gateway */
    uint32_t header_bytes_max;
    uint32_t body_bytes_max;
    uint32_t connections_max;
    uint32_t requests_max; /* in flight and queued in the worker, together */
    uint32_t requests_per_key_max;
    uint32_t header_timeout_ms; /* from accept or previous reply to the full head */
    uint32_t body_timeout_ms;
    uint32_t write_timeout_ms;        /* no progress on a blocked write */
    uint32_t request_timeout_ms;      /* whole generation; 0 = none */
    uint32_t max_tokens_default;      /* when the client names none; 0 = up to the context */
    uint32_t unauthenticated_metrics; /* 1: GET /metrics needs no key */
    uint32_t ring_data_bytes;
    uint32_t adapters_max;
    uint32_t every_adapter;         /* 1: a key needs no grant to use an adapter */
    char model_name[CM_NAME_BYTES]; /* served name; the worker's HELLO must agree */
    char version[CM_NAME_BYTES];
};

struct cm_config_worker {
    uint32_t threads;       /* 0: from cpus_max and affinity */
    uint32_t sequences_max; /* running at once: slots */
    uint32_t queue_max;     /* waiting requests */
    uint32_t kv_pages;      /* pages of 32 positions; 0: from kv_bytes */
    uint64_t kv_bytes;
    uint64_t memory_bytes_max; /* what control groups and the machine allow */
    uint32_t context_max;      /* 0: the model's */
    uint32_t step_tokens_max;  /* prompt tokens and decodes in one mixed step */
    uint32_t prefix_cache;     /* 1: keep KV pages for equal prefixes of one tenant */
    uint32_t ring_data_bytes;
    uint32_t guard; /* 1: a RULES frame follows, and every reply passes its rules */
    uint32_t adapters_max;
    uint32_t adapter_rank_max;
    uint32_t kv_int8;      /* 1: keys and values are kept as int8; 0: fp16 */
    uint32_t prompts_bf16; /* 1: class P of kernels/NUMERICS.md */
    uint32_t cpus_max;     /* what control groups allow by quota; 0: no quota */
    uint64_t adapter_bytes_max;
    struct cm_adapter_owners adapter_owners;
    char device[CM_NAME_BYTES];             /* "cpu" */
    char model_name[CM_NAME_BYTES];         /* "" : the package's own */
    uint8_t owner_key[CM_PUBLIC_KEY_BYTES]; /* package owner, pinned in `sealed:` */
};

#define CM_ENROLMENT_BYTES_MAX 4096

struct cm_config_keeper {
    uint8_t owner_key[CM_PUBLIC_KEY_BYTES];
    uint8_t policy_key[CM_PUBLIC_KEY_BYTES]; /* policy authority, pinned in `sealed:` */
    uint32_t development_tpm;                /* 1: descriptor 13 is casemate-devtpm */
    uint32_t strict;                         /* attest mode: 1 strict, 0 restartable */
    uint32_t head_bytes;   /* of the memfd at CM_FD_INPUT: [package head][policy list] … */
    uint32_t policy_bytes; /* … the policy list follows the head; 0: none */
    uint32_t enrolment_bytes;
    uint8_t enrolment[CM_ENROLMENT_BYTES_MAX];
    uint32_t tls_given;      /* 1: an earlier keeper's TLS_IDENTITY is the next frame */
    uint32_t tls_name_count; /* subject alternative names of the certificate */
    char tls_names[8][CM_NAME_BYTES];
    struct cm_adapter_owners adapter_owners;
};
/* Another keeper may follow it within this boot. */
bool cm_keeper_replaceable(const struct cm_config_keeper *config);

struct cm_rules_info { /* CM_FRAME_RULES; its descriptor: policies/guard/FORMAT.md */
    uint32_t bytes;
    uint32_t reserved;
};

struct cm_measure {    /* CM_FRAME_MEASURE; its descriptor: the bytes that are measured and used */
    uint32_t type;     /* enum cm_event_type of loader/tpm/measure.h */
    uint32_t complete; /* 1: the event is whole with this file */
    char name[CM_NAME_BYTES];
};

/* Shared by gateway, keeper and verifier: loader/evidence/FORMAT.md. */
enum cm_quote_kind { CM_QUOTE_BOOT = 1, CM_QUOTE_SESSION = 2 };
#define CM_EVIDENCE_BYTES_MAX (32u << 10)
#define CM_EVIDENCE_EXPORTER  "EXPORTER-casemate-attestation"

struct cm_quote_request {
    uint64_t id;   /* the gateway's, never 0; 0: the supervisor's own */
    uint32_t kind; /* enum cm_quote_kind */
    uint32_t reserved;
    uint8_t nonce[32];
    uint8_t exporter[32]; /* of the client's TLS connection */
};

struct cm_evidence_info {
    uint64_t id;
    uint32_t bytes;
    uint32_t reserved;
};

struct cm_quote_failed {
    uint64_t id;
    struct cm_error error;
};

struct cm_config_devtpm {
    uint32_t reserved;
};

enum cm_load_stage {
    CM_LOAD_START = 0, /* no worker, or not configured */
    CM_LOAD_UNSEAL,
    CM_LOAD_HEAD,    /* header, signature, manifest, table */
    CM_LOAD_RESERVE, /* arena */
    CM_LOAD_WEIGHTS, /* read, verify, decrypt */
    CM_LOAD_BIND,    /* tensors checked; tokenizer and scheduler made */
    CM_LOAD_READY,
    CM_LOAD_STAGE_COUNT
};

struct cm_progress {
    uint32_t stage; /* enum cm_load_stage */
    uint32_t reserved;
    uint64_t bytes_done;
    uint64_t bytes_total;
    uint64_t elapsed_us;
    uint64_t stage_us[CM_LOAD_STAGE_COUNT]; /* spent in each so far */
};

enum cm_adapter_state {
    CM_ADAPTER_ABSENT = 0, /* the place is free */
    CM_ADAPTER_WAITING,    /* wanted; its key is not unsealed yet */
    CM_ADAPTER_UNSEALED,   /* the keeper has its key */
    CM_ADAPTER_LOADING,    /* the worker reads it */
    CM_ADAPTER_SERVING,
    CM_ADAPTER_UNLOADING, /* no longer wanted; the worker finishes what it has begun with it */
    CM_ADAPTER_REFUSED,   /* its `why` says the reason; one that may pass is tried again */
    CM_ADAPTER_STATE_COUNT
};
extern const char *const cm_adapter_state_names[CM_ADAPTER_STATE_COUNT];

/* One row of <state>/adapters.table, behind "CMADAP1\0" and a u64 generation, by name: what shall
 * be loaded. Its file is <state>/adapters/<name>.cmpkg; a file that was replaced has another
 * serial. */
struct cm_adapter_row {
    uint64_t serial;
    char name[CM_NAME_BYTES]; /* cm_name_valid */
};

/* What the gateway is told of one. */
struct cm_adapter_info {
    char name[CM_NAME_BYTES];
    uint32_t state; /* enum cm_adapter_state */
    uint32_t reserved;
    uint64_t generation;        /* SERVING: requests name it by this number, never used twice */
    char id[CM_ERROR_ID_BYTES]; /* REFUSED: why */
};

struct cm_adapter_open { /* its descriptor: [package head][policy list], read from where it stands
                          */
    uint64_t serial;
    uint32_t place; /* 0 .. adapters_max - 1 */
    uint32_t head_bytes;
    uint32_t policy_bytes;
    uint32_t reserved;
    char name[CM_NAME_BYTES]; /* for the evidence; the worker holds it against the manifest */
};

enum cm_adapter_close {
    CM_ADAPTER_CLOSE_WIPED = 0,  /* a load is over: the worker has wiped the page */
    CM_ADAPTER_CLOSE_UNUSED = 1, /* nobody got the page */
    CM_ADAPTER_CLOSE_FORGET = 2, /* as WIPED; and its key is not wanted any more */
};

struct cm_adapter_step { /* ADAPTER_KEY, ADAPTER_PAGE, ADAPTER_CLOSE, ADAPTER_UNLOAD */
    uint64_t serial;
    uint32_t place;
    uint32_t how; /* ADAPTER_CLOSE: enum cm_adapter_close */
};

struct cm_adapter_answer {
    uint64_t serial;
    struct cm_error error; /* status CM_OK: done */
};

struct cm_adapter_load { /* its descriptor: CM_KEY_BYTES of key at offset 0 */
    uint64_t serial;
    uint32_t place;
    uint32_t reserved;
    uint64_t file_bytes;
    char name[CM_NAME_BYTES]; /* the manifest's must be the same */
};

#define CM_ADAPTER_CHUNK_BYTES (1u << 20)
struct cm_adapter_chunk { /* ADAPTER_READ, ADAPTER_BYTES */
    uint64_t serial;
    uint64_t offset; /* in the file */
    uint32_t bytes;  /* 1 .. CM_ADAPTER_CHUNK_BYTES */
    uint32_t reserved;
};

struct cm_adapter_told { /* ADAPTER_STATE */
    uint64_t serial;
    uint32_t state; /* SERVING, REFUSED or ABSENT */
    uint32_t reserved;
    uint64_t generation;                  /* SERVING */
    uint64_t bytes;                       /* of its weights */
    char digest[2 * CM_DIGEST_BYTES + 8]; /* hex of its core digest, terminated */
    struct cm_error error;                /* REFUSED */
};

/* What /livez, /readyz, /startupz and /metrics answer of the other roles, and what is served. */
struct cm_state {
    struct cm_progress load;
    uint32_t ready; /* 1: requests are accepted */
    uint32_t draining;
    uint32_t worker_generation;
    uint32_t worker_restarts;
    uint32_t gateway_restarts;
    uint32_t development_tpm;
    char reason[CM_NAME_BYTES]; /* why not ready: "loading", "worker_gone", "draining", … */
    uint64_t resident_bytes[5]; /* supervisor, gateway, keeper, worker, devtpm; 0 unknown */
    uint32_t ends[4][CM_ROLE_END_COUNT]; /* gateway, keeper, worker, devtpm */
    struct cm_adapter_info adapters[CM_ADAPTERS_MAX];
};

struct cm_key_request {
    uint32_t generation;
    uint32_t reserved;
};

#define CM_CERTIFICATE_BYTES_MAX 4096
struct cm_tls_page { /* key page: u32 size, PKCS#8 DER private key */
    uint32_t generation;
    uint32_t certificate_bytes;
    uint8_t certificate[CM_CERTIFICATE_BYTES_MAX]; /* DER */
};

struct cm_key_page_info { /* CM_FRAME_KEY_PAGE; the page: CM_KEY_BYTES of package key at offset 0 */
    uint32_t generation;
    uint32_t secret_memory; /* 1: memfd_secret */
};

struct cm_loaded {
    uint32_t generation;
    uint32_t arena_locked;
    uint64_t bytes;
    uint64_t read_us, verify_us, decrypt_us, total_us;
};

struct cm_keys_info {
    uint64_t generation;
    uint32_t count;
    uint32_t reserved;
};

#define CM_API_KEY_EVERY_ADAPTER UINT32_MAX

/* One row of the sealed memfd of CM_FRAME_KEYS. A key reads cm-<16 hex id>-<43 base64url secret>;
 * hash = SHA-256 of the whole text. Rows are sorted by id. */
struct cm_api_key {
    uint8_t id[8];
    uint8_t hash[CM_DIGEST_BYTES];
    uint64_t expires_unix_s; /* 0: never */
    char name[40];           /* terminated; the tenant in logs and metrics */
    uint32_t adapter_count;  /* that it may use, named below; or CM_API_KEY_EVERY_ADAPTER */
    uint32_t reserved;
    char adapters[CM_ADAPTERS_MAX][CM_NAME_BYTES]; /* cm_name_valid */
};
#define CM_API_KEYS_MAX 4096

struct cm_heartbeat {
    uint64_t counter;
    uint64_t last_step_us; /* CLOCK_MONOTONIC of the last finished step; worker only */
    uint32_t running;
    uint32_t waiting;
};

struct cm_drain {
    uint32_t deadline_ms;
    uint32_t reserved;
};

#endif
