/* The supervisor's inside: one struct of everything, one file per matter.
 *
 * spawn.c    the launcher of roles          rings.c    ring memory and its two views
 * child.c    channel, log, death, back-off  files.c    package head, key table, certificate
 * frames.c   what children say              status.c   status.json
 * ends.c     how a role ended               notify.c   the service manager
 * service.c  what has to happen next; the loop */
#ifndef CASEMATE_RUNTIME_SUPERVISOR_INTERNAL_H
#define CASEMATE_RUNTIME_SUPERVISOR_INTERNAL_H

#include <signal.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "policies/config/config.h"
#include "runtime/base/frame.h"
#include "runtime/base/log.h"
#include "sandbox/cgroup.h"
#include "sandbox/image.h"
#include "sandbox/switches.h"

#define LOG_LINE_BYTES   4096
#define BACKOFF_LEAST_MS 100u
#define BACKOFF_MOST_MS  30000u
#define BUDGET_DEATHS    5u
#define BUDGET_WINDOW_MS 60000u
#define STOP_WAIT_MS     3000u    /* from STOP to SIGKILL */
#define ANSWER_WAIT_MS   30000u   /* keeper: from a request to its page */
#define START_WAIT_MS    120000u  /* from one sign of life to the next before READY */
#define POLICY_WINDOW_MS 3600000u /* a second policy kill within it ends the service */
#define END_RECORDS      16       /* the last ends of roles, in status.json */

enum child_index { CHILD_GATEWAY, CHILD_WORKER, CHILD_KEEPER, CHILD_DEVTPM, CHILD_COUNT };

enum child_state {
    CHILD_ABSENT = 0,
    CHILD_STARTING, /* spawned and configured, not READY */
    CHILD_SERVING,
    CHILD_KILLED, /* we sent SIGKILL; not reaped yet */
};

/* Back-off and budget of one role: times of its last deaths. */
struct backoff {
    uint64_t deaths_ms[BUDGET_DEATHS];
    uint32_t death_count; /* ever */
    uint32_t streak;      /* deaths without a healthy minute between them */
};

struct child {
    enum cm_role role;
    const char *name;
    const char *program;
    struct cm_image image; /* what runs, and what was measured */
    enum child_state state;
    pid_t pid;
    int pidfd;
    struct cm_channel channel;
    int log_fd;
    char log_line[LOG_LINE_BYTES];
    size_t log_used;
    bool log_cut; /* the line was longer: the rest is dropped up to its end */
    uint32_t generation;
    uint32_t restarts;
    uint64_t started_ms, ready_ms, heard_ms; /* heard: any frame */
    uint64_t due_ms;                         /* absent: not before this */
    uint64_t stop_ms;                        /* killed when this is over; 0: never */
    uint64_t killed_ms;
    bool closed; /* it has closed its channel */
    bool keyed;  /* gateway, worker: it has been given its key page */
    bool stop_sent, drain_sent, drained, error_set;
    struct cm_error error; /* why it went, or is about to */
    enum cm_role_end kill; /* KILLED: what for */
    enum cm_role_end end;  /* of the last generation, once reaped */
    uint32_t probed;       /* layers that it tried before READY */
    const char *forbidden; /* call that its filter killed it for, NULL: not known */
    uint64_t memory_kills; /* of its group, as counted at the last end */
    uint64_t policy_ms;    /* the last policy kill; 0: none */
    struct backoff backoff;
    uint64_t resident_bytes;
};

/* One end of one role, as it stands in status.json. */
struct end_record {
    int64_t unix_s;
    const char *name;
    enum cm_role_end end;
    pid_t pid;
    uint32_t generation;
    int code;                       /* exit code, or signal */
    bool by_signal, dumped, served; /* dumped: it left a core file, which must not be */
    uint64_t life_ms;
    char cause[CM_ERROR_ID_BYTES];
    char text[200];
};

/* One pair of rings: memory, read-only views, events. All owned; -1 when absent. */
struct ring_set {
    int request_data, request_data_read, request_cursor, request_cursor_read;
    int response_data, response_data_read, response_cursor, response_cursor_read;
    int request_event, response_event;
};

/* The service manager's socket, and what it has been told. */
struct notify {
    int fd; /* -1: there is no manager */
    bool ready, stopping;
    uint64_t watchdog_ms; /* 0: none is wanted */
    uint64_t petted_ms, extended_ms;
    char status[320];
};

/* What this machine offers of the confinement, and what of it is used. */
struct sandbox {
    struct cm_host host;
    uint32_t wanted;   /* layers that roles get */
    uint32_t missing;  /* layers that this machine lacks */
    bool swapless;     /* what cannot be locked still never reaches a disk */
    uint32_t accepted; /* layers that may be off although it has them: tests and bench alone */
};

/* One place for an adapter: a region of the worker's device. */
struct adapter {
    enum cm_adapter_state state;
    uint64_t serial; /* of its row in the table; 0: the place is free */
    char name[CM_NAME_BYTES];
    int fd; /* its file, while it is being loaded; else -1 */
    uint64_t file_bytes;
    bool key_held; /* the keeper has its key */
    bool unload_sent;
    uint64_t generation, bytes;           /* SERVING */
    char digest[2 * CM_DIGEST_BYTES + 1]; /* of its package, as the worker has checked it */
    struct cm_error why;                  /* REFUSED, or about to be */
    uint64_t again_ms;                    /* REFUSED: when it is tried again; 0: never */
    uint32_t refusals;                    /* for passing reasons, since it served last */
};

enum adapter_question { ADAPTER_ASK_NOTHING, ADAPTER_ASK_OPEN, ADAPTER_ASK_KEY, ADAPTER_ASK_LOAD };

struct adapters {
    struct adapter each[CM_ADAPTERS_MAX];
    struct cm_adapter_row rows[CM_ADAPTERS_MAX]; /* what shall be loaded */
    uint32_t row_count;
    struct stat seen;
    bool known;
    enum adapter_question question; /* what is under way, of keeper or worker */
    struct adapter *asked;
    uint64_t asked_ms; /* or of the worker's last sign that it goes on */
};

enum service_phase { SERVICE_RUN, SERVICE_DRAIN, SERVICE_STOP };

struct service {
    const struct cm_configuration *configuration;
    struct cm_log log;
    int programs_fd; /* folder of the role programs */
    struct cm_image_store store;
    struct cm_image image; /* that we were started from, to be measured */
    /* what is measured beside programs; rules -1: no guard */
    int sealed_fd, device_id_fd, filters_fd, rules_fd;
    uint32_t rules_bytes;
    int listener_fd, package_fd, tpm_fd, devtpm_end_fd, devtpm_state_fd, head_fd, signal_fd;
    int run_fd; /* <state>/run */
    int lock_fd;
    char state_path[CM_CONFIG_TEXT_BYTES];
    char address[CM_NAME_BYTES + 16]; /* as bound */
    struct cm_config_keeper keeper_config;
    struct sandbox sandbox;
    struct cm_cgroups groups;
    uint64_t memory_limit; /* of all roles together, by control groups or the machine */
    uint32_t cpus;         /* of all roles together, by quota; 0: no quota */
    int launcher_fd, violation_fd;
    pid_t launcher_pid, pid; /* pid: our own */
    struct ring_set rings;
    struct child children[CHILD_COUNT];
    /* pages on their way from the keeper */
    bool tls_pending, key_pending;
    uint64_t tls_asked_ms, key_asked_ms;
    uint64_t client_quote; /* id of the one that the keeper works on for a client; 0: none */
    bool quote_pending;
    uint64_t quote_asked_ms, evidence_ms; /* 0: none yet */
    bool evidence_due;                    /* its adapters are others now */
    uint64_t client_quote_ms;             /* since when; one at a time, whatever the gateway asks */
    uint32_t tls_generation, key_generation; /* of the pages that were asked for last */
    uint32_t tls_gateway, key_worker;        /* generations of the roles that they are for */
    struct cm_tls_page tls;                  /* the certificate */
    int identity_fd; /* its key page, for the keeper's successor; -1: none was left */
    /* API keys */
    struct stat keys_seen;
    bool keys_known;
    int keys_fd;
    struct cm_keys_info keys_info;
    uint64_t keys_checked_ms;
    struct adapters adapters;
    /* what the probes answer */
    struct cm_state state;
    bool state_dirty;
    uint64_t state_sent_ms, status_written_ms, progress_logged_ms;
    struct cm_loaded loaded;
    bool announced;
    struct notify notify;
    struct end_record ends[END_RECORDS]; /* a ring: end_count % END_RECORDS is the next */
    uint64_t end_count;
    /* the end */
    enum service_phase phase;
    uint32_t signals;
    uint64_t drain_until_ms;
    struct cm_error end; /* status CM_OK: a clean end */
    bool over;           /* nothing runs any more */
    struct cm_frame frame;
};

uint64_t clock_ms(void);

/* spawn.c. The launcher keeps images and groups as they are when it is opened. */
CM_MUST_USE enum cm_status launcher_open(struct service *service, struct cm_error *err);
void launcher_close(struct service *service);
struct spawned {
    pid_t pid;
    int pidfd, control_fd, log_fd; /* owned */
};
/* fds[number] or -1 become the role's descriptors 5..; the launcher makes its channel and log, and
 * all others are closed there. Fails: SYSTEM. */
CM_MUST_USE enum cm_status spawn(struct service *service, const struct child *child,
                                 const int fds[static CM_FD_COUNT], struct spawned *ret_spawned,
                                 struct cm_error *err);
/* rings_make, in the launcher. */
CM_MUST_USE enum cm_status rings_ask(struct service *service, uint32_t capacity,
                                     struct ring_set *ret_rings, struct cm_error *err);

/* confinement.c: find out what the machine offers and make the groups. Fails: SANDBOX. */
CM_MUST_USE enum cm_status confinement_open(struct service *service, struct cm_error *err);
void confinement_make(const struct service *service, const struct child *child, uint32_t fds,
                      struct cm_confinement *ret_confinement);
/* A role has ended: if its filter killed it, which call was it? Into child->forbidden. */
void violation_take(struct service *service, struct child *child, const siginfo_t *how);
/* Everything is open and the launcher runs: the supervisor's own capabilities and filter. */
CM_MUST_USE enum cm_status confinement_self(struct service *service, struct cm_error *err);
/* A role is ready: does each layer hold that this machine has? `probed`: as the role tells. */
CM_MUST_USE bool confinement_holds(struct service *service, const struct child *child,
                                   uint32_t probed, struct cm_error *err);

/* rings.c */
void rings_init(struct ring_set *rings);
void rings_close(struct ring_set *rings);
CM_MUST_USE enum cm_status rings_make(uint32_t capacity, struct ring_set *ret_rings,
                                      struct cm_error *err);
/* Borrowed descriptors in the order of CM_FD_REQUEST_DATA .. CM_FD_RESPONSE_EVENT. */
void rings_view_gateway(const struct ring_set *rings, int ret_fds[static CM_RING_FD_COUNT]);
void rings_view_worker(const struct ring_set *rings, int ret_fds[static CM_RING_FD_COUNT]);

/* child.c */
void child_init(struct child *child, enum cm_role role, const char *name, const char *program);
/* Spawn with input (descriptor 5), rings (6..11 or NULL) and tpm (13), -1 for none. */
CM_MUST_USE enum cm_status child_start(struct service *service, struct child *child, int input,
                                       const int *rings, int tpm, struct cm_error *err);
void child_kill(struct service *service, struct child *child, enum cm_role_end end,
                const struct cm_error *why);
void child_log_copy(struct child *child);
/* The process is gone: reap it, close everything, record how it ended. */
void child_reap(struct service *service, struct child *child);
bool child_alive(const struct child *child);
/* Note a death at now_ms; false: the budget is used up. Else *ret_delay_ms until the next try.
 * `random` is any number. */
bool backoff_next(struct backoff *backoff, uint64_t started_ms, uint64_t now_ms, uint32_t random,
                  uint64_t *ret_delay_ms);

/* ends.c */
enum cm_role_end end_judge(const struct child *child, const siginfo_t *how, bool memory_kill);
/* Judge, count, record and log; fills child->end, and child->error if nobody gave a reason.
 * memory_kill: the kernel has counted a kill for want of memory in the child's group. */
void end_take(struct service *service, struct child *child, const siginfo_t *how, bool memory_kill);

/* frames.c */
void frames_receive(struct service *service, struct child *child);
/* Send, or kill the child if it does not take it. */
void frame_send(struct service *service, struct child *child, enum cm_frame_type type,
                const void *payload, size_t bytes, const int *fds, size_t fd_count);
void state_send(struct service *service, bool now);
void ready_check(struct service *service);
/* Where the weights may go: for log and status. */
const char *weights_word(const struct service *service);
void state_reason_set(struct service *service, const char *reason);

/* measure.c: what goes into the PCR, in the order of loader/tpm/README.md. */
CM_MUST_USE enum cm_status measure_open(struct service *service, struct cm_error *err);
void measure_send(struct service *service, struct child *keeper);

/* evidence.c */
bool evidence_fresh(const struct service *service, uint64_t now);
void evidence_tick(struct service *service, uint64_t now);
void on_quote(struct service *service);
void on_evidence(struct service *service);
void on_quote_failed(struct service *service);
/* The keeper is gone, and with it what it was asked for. */
void evidence_keeper_lost(struct service *service);

/* adapters.c */
void adapters_init(struct service *service);
/* Look at adapters.table. */
void adapters_refresh(struct service *service);
/* Do what comes next. */
void adapters_step(struct service *service);
/* Nothing waits for the keeper to unseal it. */
bool adapters_unsealed(const struct service *service);
/* The keeper holds the key of each that the worker may have: evidence names them all. */
bool adapters_told(const struct service *service);
/* The key page is on its way with an adapter's key: it is not free for the package's. */
bool adapters_key_out(const struct service *service);
/* This role owes an answer about an adapter for too long. */
bool adapters_stuck(const struct service *service, enum cm_role role, uint64_t now);
void on_adapter_answer(struct service *service);
void on_adapter_page(struct service *service);
/* NULL, or how the worker broke the protocol. */
const char *on_adapter_read(struct service *service);
const char *on_adapter_state(struct service *service);
void adapters_worker_lost(struct service *service);
void adapters_keeper_lost(struct service *service);

/* files.c */
/* Open a regular file for reading, whatever it may be replaced with; -1 and zeros: there is none.
 */
int file_look(const char *path, struct stat *ret_facts);
/* Nobody has written or replaced it. */
bool file_same(const struct stat *a, const struct stat *b);
/* Up to `size` bytes from `offset` on; short only at the end of the file. -1 on error. */
ssize_t file_read(int fd, uint8_t *bytes, size_t size, uint64_t offset);
CM_MUST_USE enum cm_status head_memfd_make(int package_fd, const char *package_path, int *ret_fd,
                                           uint32_t *ret_head_bytes, uint32_t *ret_policy_bytes,
                                           struct cm_error *err);
/* Look at keys.table; a change makes a new sealed memfd. True if there is something to send. */
bool keys_refresh(struct service *service);
void certificate_write(struct service *service);
/* A small file in <state>/run, beside and renamed. */
void run_file_write(struct service *service, const char *name, const void *bytes, size_t size);

/* status.c */
void status_write(struct service *service, uint64_t now_ms);

/* notify.c: sd_notify(3) */
void notify_open(struct notify *notify, const struct cm_log *log);
void notify_tick(struct service *service, uint64_t now_ms);
void notify_close(struct notify *notify);

/* service.c */
void service_fail(struct service *service, const struct cm_error *why);
CM_MUST_USE enum cm_status service_open(struct service *service,
                                        const struct cm_configuration *configuration,
                                        int programs_fd, struct cm_error *err);
enum cm_status service_run(struct service *service, struct cm_error *err);
void service_close(struct service *service);
/* open.c */
CM_MUST_USE enum cm_status service_files_open(struct service *service, struct cm_error *err);

#endif
