/* A supervisor and a scripted worker around a real casemate-gateway, for tests/gateway_scene.py:
 * what the sources of this folder share.
 *
 *     main.c        options, start, loop          tell.c      events, and the end on a failure
 *     supervisor.c  frames, rings, the key table  commands.c  what a test may ask for
 *     identity.c    TLS key page and certificate  process.c   the gateway's process
 *     worker.c      what the gateway asks         records.c   what an honest worker writes
 *     jobs.c        replies as scripts say        hostile.c   what no honest worker writes
 *
 * State is in struct harness alone, but for what one source keeps to itself. A step that fails ends
 * the harness: a test must never go on with half a scene. */
#ifndef CASEMATE_TESTS_HARNESS_GATEWAY_HARNESS_H
#define CASEMATE_TESTS_HARNESS_GATEWAY_HARNESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/frame.h"
#include "runtime/base/ring.h"
#include "runtime/base/wire.h"

#define KEYS_MAX         16
#define RECORD_BYTES_MAX (1u << 20)

struct job; /* jobs.c */

struct worker {
    struct cm_ring requests, responses;
    int request_event, response_event; /* -1 before the first rings */
    uint8_t *record;                   /* [RECORD_BYTES_MAX], the request that is read */
    struct job *jobs;                  /* [JOBS_MAX] */
    bool hello_on;                     /* false: as one that hangs before its first record */
    bool stats_on;
    struct cm_wire_stats stats;
    uint64_t stats_ms; /* when they were last written */
};

struct harness {
    struct cm_config_gateway config;
    struct cm_state state;
    struct cm_channel channel;
    struct cm_api_key keys[KEYS_MAX]; /* all that may be in a table, in the order of the options */
    uint32_t key_count;
    uint64_t key_generation; /* of the last table that was sent */
    int page_fd;             /* the TLS key page, to see whether the gateway has wiped it */
    uint64_t beats;
    struct worker worker;
};

/* ------------------------------------------------------------------ tell.c */

/* One JSON line on stdout: time, name and more fields, each with its comma before it. A longer
 * event is printed between the two halves. */
__attribute__((format(printf, 2, 3))) void event(const char *name, const char *format, ...);
void event_begin(const char *name);
void event_end(void);

_Noreturn void die(const char *what);
void check(bool condition, const char *what);

uint64_t now_us(void); /* CLOCK_MONOTONIC, as the tests' time.monotonic() */
uint64_t now_ms(void);

/* `text` is `word`, alone or with more after a space; *ret_rest is untouched where it is not. */
bool begins(const char *text, const char *word, const char **ret_rest);

/* ------------------------------------------------------------------ the worker */

void worker_init(struct worker *worker);
void worker_done(struct worker *worker);
/* As a worker that was just started: the old rings are forgotten, and with them all jobs. Takes
 * the two events; the memory's descriptors stay the caller's. */
void worker_attach(struct worker *worker, const int fds[static CM_RING_FD_COUNT]);
void worker_read(struct worker *worker);
/* A step of each job, and statistics when they are due. False: it died, by a script's word. */
bool worker_turn(struct worker *worker);

/* False: the ring is full. */
bool record_put(struct worker *worker, uint32_t type, uint64_t id, const void *a, size_t a_bytes,
                const void *b, size_t b_bytes);
void record_bell(struct worker *worker); /* wake the gateway */
void hello_put(struct worker *worker);
bool stats_put(struct worker *worker);
void accepted_put(struct worker *worker, uint64_t id, uint32_t max_tokens);
void verdict_put(struct worker *worker, uint64_t id, uint32_t stage, uint32_t action,
                 const char *rule);
void refused_put(struct worker *worker, uint64_t id, const char *why);
void hostile_put(struct worker *worker, uint64_t id, const char *how);

struct job *jobs_new(void);
void jobs_forget(struct worker *worker);
/* What is done with the request, the first word of `text` says. */
void jobs_start(struct worker *worker, uint64_t id, const struct cm_wire_generate *wire,
                const char *text);
void jobs_cancel(struct worker *worker, uint64_t id);
bool jobs_step(struct worker *worker); /* false: the worker is to die now */
bool jobs_active(const struct worker *worker);

/* ------------------------------------------------------------------ the supervisor */

void frame_put(struct harness *harness, enum cm_frame_type type, const void *payload, size_t bytes,
               const int *fds, size_t count);
void frame_take(struct harness *harness);
/* Fresh rings, one side the worker's; the caller closes the four of memory in the gateway's. */
void rings_renew(struct harness *harness, int ret_gateway[static CM_RING_FD_COUNT]);
void rings_put(struct harness *harness);
/* `value`: <text>:<name>:<expires_unix_s>; it is cut up. */
void key_add(struct harness *harness, char *value);
/* `names`: which keys the table holds (" a b "), NULL for all. With disorder its first two rows
 * stand the wrong way round. */
void keys_put(struct harness *harness, const char *names, bool disorder);
void state_put(struct harness *harness);

/* A key page as the keeper hands it out, and its certificate, also to `folder`/certificate.pem.
 * Returns the page's descriptor. */
int identity_make(const char *folder, struct cm_tls_page *ret_page);
void identity_report(int page_fd);

/* Commands as lines on stdin. Its end is the test's, and then the harness's too. */
void commands_read(struct harness *harness);

/* Starts it with these descriptors, behind its filters. When the harness exits, it is killed. */
void gateway_spawn(const char *program, const int fds[static CM_FD_COUNT]);
bool gateway_ended(void); /* it was told to the test, too */
void gateway_report(uint64_t beats);

#endif
