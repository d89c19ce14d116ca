/* Attempts to leave a role's confinement. Each is one function that returns 0 if it had its effect,
 * else the errno; a filter may end the process instead. Outside, each of them succeeds as root:
 * that is the control. */
#ifndef CASEMATE_TESTS_ESCAPE_ATTEMPTS_H
#define CASEMATE_TESTS_ESCAPE_ATTEMPTS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What is there to be reached; made by escape.c before anything is confined. */
struct world {
    pid_t victim, parent;   /* a sleeping process outside; whoever forked the attempt */
    uint16_t tcp_port;      /* somebody listens on 127.0.0.1 */
    char abstract_name[32]; /* and on an abstract socket */
    int ipc_key;            /* a shared memory segment and a message queue of this key */
    char key_name[32];      /* a key in the session keyring */
    char file[64];          /* a file, readable and writable */
    uint64_t victim_word;   /* address of a word in the victim (the same program) */
};

struct attempt {
    const char *name;
    int (*run)(const struct world *world);
};
extern const struct attempt attempts[];
extern const size_t attempt_count;

#endif
