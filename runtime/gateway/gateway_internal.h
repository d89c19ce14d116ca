/* The gateway's own structs. One thread, one event loop; no locks anywhere.
 *
 * gateway ─ connections ─ (at most one) flight ─ worker, by request id over the rings. A flight
 * outlives its connection until the worker has said that it is over: so the bound on requests is
 * the worker's true load. */
#ifndef CASEMATE_RUNTIME_GATEWAY_INTERNAL_H
#define CASEMATE_RUNTIME_GATEWAY_INTERNAL_H

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <openssl/ssl.h>
#include <sys/queue.h>

#include "runtime/base/frame.h"
#include "runtime/base/log.h"
#include "runtime/base/ring.h"
#include "runtime/base/wire.h"
#include "runtime/gateway/api_error.h"
#include "runtime/gateway/http.h"
#include "runtime/gateway/keys.h"
#include "runtime/gateway/metrics.h"
#include "runtime/gateway/moderation.h"
#include "runtime/gateway/quarantine.h"
#include "runtime/gateway/request.h"
#include "runtime/gateway/routes.h"
#include "sandbox/confine.h"

#define REQUEST_ID_BYTES 65
#define REPLY_ID_BYTES   40
#define TICK_MS          100
#define LINGER_MS        1000
#define PING_MS          15000
#define OUTPUT_BYTES_MAX (1u << 20) /* unread stream per connection: then it is too slow */
#define REPLY_BYTES_MAX  (4u << 20) /* text of a whole reply */
#define WORKER_SILENT_MS 10000      /* without STATS: not ready */
#define WORKER_DEAD_MS   60000      /* without STATS: not alive */
#define STEP_STALLED_MS  30000      /* work is pending and no step ends */
#define RETRY_LOAD_S     5
#define RETRY_QUEUE_S    1
#define PROBATION_MS     2000 /* a suspect that lives so long has company again */

enum connection_state {
    CONNECTION_PEEK, /* is it TLS at all? */
    CONNECTION_HEAD, /* handshake, then the head of a request; also idle */
    CONNECTION_BODY,
    CONNECTION_WAIT,  /* a flight is under way */
    CONNECTION_FLUSH, /* the reply is complete and on its way out */
    CONNECTION_LINGER /* all is written; the peer may still be sending */
};

struct gateway;
struct flight;

struct connection {
    TAILQ_ENTRY(connection) entry;
    struct gateway *gateway;
    int fd;
    struct event *raw;       /* PEEK, and LINGER of a plain connection */
    struct bufferevent *tls; /* from the first TLS byte on */
    enum connection_state state;
    bool dead;        /* freed by the reaper, not before */
    bool handshaken;  /* TLS stands */
    bool close_after; /* no further request after this reply */
    bool head_only;   /* HEAD: a reply without body */
    bool chunked_out; /* a stream is open */
    uint64_t deadline_ms;
    uint64_t progress_ms; /* last time output moved, or began to wait */
    uint64_t served;
    size_t scanned;
    /* the current exchange */
    const struct cm_route *route;
    const struct cm_api_key *key; /* only valid within one call: the table may change */
    char key_name[sizeof(((struct cm_api_key *)0)->name)];
    uint8_t key_id[8];
    char request_id[REQUEST_ID_BYTES];
    char parameter[CM_NAME_BYTES];
    uint64_t started_us;
    bool chunked_in;
    struct cm_http_chunks chunks;
    uint64_t body_left;
    struct evbuffer *body;
    struct flight *flight;
};
TAILQ_HEAD(connection_list, connection);

enum flight_state {
    FLIGHT_BODY,   /* admitted; the body is still coming */
    FLIGHT_QUEUED, /* the ring had no room yet */
    FLIGHT_SENT
};

struct flight {
    TAILQ_ENTRY(flight) entry;
    struct gateway *gateway;
    struct connection *connection; /* NULL: the client is gone or has been answered */
    enum flight_state state;
    uint64_t id;
    uint8_t key_id[8];
    enum cm_endpoint endpoint;
    bool stream, include_usage, continuous_usage;
    bool moderated; /* asked for verdicts, also where there are none */
    bool accepted;
    bool begun; /* a byte of the reply has left */
    bool cancel_due, cancel_sent;
    uint8_t digest[CM_QUARANTINE_DIGEST_BYTES]; /* of the prompt, once it is QUEUED */
    bool suspect;                               /* a worker died over this prompt */
    uint64_t sent_ms;
    struct cm_wire_generate wire;
    char model[CM_NAME_BYTES]; /* as it was asked for: the model, or one of its adapters */
    uint8_t *payload;          /* until it is in the ring */
    size_t payload_bytes;
    struct cm_wire_accepted usage;
    struct cm_moderation moderation;
    uint32_t completion_tokens;
    uint64_t created_unix_s;
    uint64_t started_us, first_us, last_us, pinged_ms;
    struct evbuffer *text; /* whole replies */
    char reply_id[REPLY_ID_BYTES];
};
TAILQ_HEAD(flight_list, flight);

struct worker_link {
    struct cm_ring requests;
    struct cm_ring responses;
    int request_event_fd;
    int response_event_fd;
    struct event *readable;
    bool open;
    bool broken; /* the worker broke the rules: nothing more is read from this ring */
    bool hello_seen;
    bool stats_seen;
    struct cm_wire_hello hello;
    struct cm_wire_stats stats;
    uint64_t heard_ms;
    uint8_t *payload;
    size_t payload_bytes;
};

struct attestation { /* the one quote in flight */
    uint64_t id;     /* 0: none */
    uint64_t last_id;
    uint64_t until_ms;
    struct connection *connection; /* who asked; NULL: gone */
};

struct gateway {
    struct cm_confinement confinement;
    struct event_base *base;
    struct cm_log log;
    struct cm_channel channel;
    struct cm_frame frame;
    struct cm_config_gateway config;
    SSL_CTX *tls;
    struct evconnlistener *listener;
    struct event *control;
    struct event *tick;
    struct event *later; /* pump and reap, after the current callback */
    struct worker_link link;
    struct attestation attestation;
    struct cm_quarantine quarantine;
    struct cm_keys keys;
    struct cm_state state;
    struct cm_metrics metrics;
    struct connection_list connections;
    struct connection_list graves;
    struct flight_list flights;
    uint32_t connection_count;
    uint32_t flight_count;
    uint64_t next_id;
    uint64_t started_ms;
    uint64_t beat_ms;
    uint64_t beats;
    uint64_t log_second, log_lines, log_suppressed;
    bool startup_done;
    bool draining;
    bool drained_sent;
    uint64_t drain_deadline_ms;
    int exit_code;
};

uint64_t clock_us(void);
uint64_t clock_ms(void);

/* server.c */
CM_MUST_USE enum cm_status gateway_start(struct gateway *gateway, bool *ret_stop,
                                         struct cm_error *err);
void gateway_free(struct gateway *gateway);
/* Soon, but in no caller's frame: put what waits into the ring, and free closed connections. So no
 * loop over flights or connections sees one disappear that it did not end itself. */
void gateway_later(struct gateway *gateway);
void gateway_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *address,
                    int address_bytes, void *context);

/* tls.c, in whose place the bench links bench/plain.c */
CM_MUST_USE enum cm_status tls_context_new(SSL_CTX **ret_context, struct cm_error *err);
/* Takes the page, and wipes it in any case. */
CM_MUST_USE enum cm_status tls_identity_set(SSL_CTX *context, int key_page_fd,
                                            const uint8_t *certificate, size_t certificate_bytes,
                                            struct cm_error *err);
bool tls_begins(uint8_t first_byte);
/* Owns the socket; NULL: no memory. on_event hears when the handshake is done. */
struct bufferevent *tls_accept(struct connection *connection);
void tls_goodbye(struct bufferevent *tls); /* close_notify */

/* control.c */
CM_MUST_USE enum cm_status control_configure(struct gateway *gateway, struct cm_error *err);
/* The TLS_PAGE frame, however long the TPM takes; or STOP. */
CM_MUST_USE enum cm_status control_tls_wait(struct gateway *gateway, bool *ret_stop,
                                            struct cm_error *err);
void control_receive(struct gateway *gateway);
void control_beat(struct gateway *gateway);
/* The worker broke the rules of the rings: the supervisor replaces it. */
void control_broken(struct gateway *gateway);
void control_drained(struct gateway *gateway);
void control_fail(struct gateway *gateway, const struct cm_error *err);

/* connection.c */
void connection_new(struct gateway *gateway, int fd);
void connection_close(struct connection *connection, enum cm_end why);
void connection_tick(struct connection *connection, uint64_t now_ms);
void connection_replied(struct connection *connection); /* output holds a whole reply now */
void connection_reap(struct gateway *gateway);
struct evbuffer *connection_output(struct connection *connection);

/* exchange.c: from bytes to a handler */
void exchange_input(struct connection *connection);
void exchange_reset(struct connection *connection);
void exchange_finish(struct connection *connection, int status, enum cm_end end);
/* Log a verdict of the flight under way: rule and place, never text. */
void exchange_verdict(struct connection *connection, const struct cm_wire_verdict *verdict);
/* A head that cannot be understood or never came whole: answer, and close. */
void exchange_refuse_head(struct connection *connection, int status, const char *code,
                          const char *message);

/* reply.c */
struct reply {
    int status;
    const char *content_type; /* NULL: JSON */
    const char *allow;        /* 405 */
    uint32_t retry_after_s;
    bool no_retry;
};
void reply_send(struct connection *connection, const struct reply *reply, struct evbuffer *body);
/* End the exchange with an error, and with it a flight that the worker has not seen. */
void reply_error(struct connection *connection, const struct cm_api_error *error,
                 const char *allow);
/* The reply alone; the caller has finished the exchange. */
void reply_error_send(struct connection *connection, const struct cm_api_error *error,
                      const char *allow);
void reply_continue(struct connection *connection);
void reply_stream_begin(struct connection *connection);
void reply_stream_event(struct connection *connection, struct evbuffer *event);
void reply_stream_end(struct connection *connection);

/* probes.c */
void probe_answer(struct connection *connection);
size_t gateway_reasons(const struct gateway *gateway, uint64_t now_ms, const char *ret_reasons[8]);
bool gateway_servable(const struct gateway *gateway, uint64_t now_ms);

/* attestation.c */
bool attestation_nonce(struct cm_span query, uint8_t ret_nonce[static 32]);
void attestation_begin(struct connection *connection, struct cm_span query);
void attestation_answer(struct gateway *gateway);
void attestation_failed(struct gateway *gateway);
void attestation_forget(struct connection *connection);
void attestation_tick(struct gateway *gateway, uint64_t now_ms);

/* flight.c */
struct flight *flight_new(struct connection *connection, enum cm_endpoint endpoint);
bool flight_admit(struct connection *connection, struct cm_api_error *ret_error);
void flight_submit(struct flight *flight, struct evbuffer *body);
void flight_detach(struct flight *flight, enum cm_end why); /* the client is gone */
void flight_fail(struct flight *flight, const struct cm_api_error *error, enum cm_end why);
void flight_free(struct flight *flight);
void flights_fail_all(struct gateway *gateway);
/* The worker is gone: whom it had is suspect from now on, or refused. Before flights_fail_all. */
void flights_blame(struct gateway *gateway);
/* A suspect is under way that has neither lived PROBATION_MS nor said a word. */
bool flights_probation(const struct gateway *gateway, uint64_t now_ms);
void flights_tick(struct gateway *gateway, uint64_t now_ms);
void flights_check_keys(struct gateway *gateway);
const char *flight_record(struct gateway *gateway, const struct cm_record *record,
                          const uint8_t *payload);

/* completion.c: the JSON of replies */
void completion_role(const struct flight *flight, struct evbuffer *out);
void completion_text(const struct flight *flight, const uint8_t *text, size_t bytes,
                     struct evbuffer *out);
void completion_end(const struct flight *flight, const struct cm_wire_done *done,
                    struct evbuffer *out);
void completion_whole(const struct flight *flight, const struct cm_wire_done *done,
                      struct evbuffer *out);

/* link.c */
CM_MUST_USE enum cm_status link_open(struct gateway *gateway, const int fds[CM_RING_FD_COUNT],
                                     struct cm_error *err);
void link_close(struct gateway *gateway);
void link_pump(struct gateway *gateway);
void link_scrub(struct gateway *gateway);
bool link_pending(const struct gateway *gateway);

#endif
