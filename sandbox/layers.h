/* The layers of the confinement, and the promises that they hold.
 *
 * A layer is one mechanism of the kernel. A promise is what the operator reads: each is held by
 * several layers, so that one that a machine lacks, or one that fails, opens nothing. */
#ifndef CASEMATE_SANDBOX_LAYERS_H
#define CASEMATE_SANDBOX_LAYERS_H

#include <stdint.h>

enum cm_confine_layer {
    CM_LAYER_USER_NS,      /* where the service is an ordinary user: what the rest needs */
    CM_LAYER_PID_NS,       /* sees, signals and traces no other process */
    CM_LAYER_NET_NS,       /* no interface, no address, no abstract socket */
    CM_LAYER_OTHER_NS,     /* IPC, host name, cgroup tree */
    CM_LAYER_ROOT,         /* an empty, read-only root file system */
    CM_LAYER_IDENTITY,     /* a user id of its own (where the service is root) */
    CM_LAYER_CAPABILITIES, /* none, and none to be had */
    CM_LAYER_LIMITS,       /* core, file size, descriptors, memory */
    CM_LAYER_NO_NEW,       /* no_new_privs */
    CM_LAYER_MDWE,         /* memory that was writable never becomes executable */
    CM_LAYER_DUMP,         /* not dumpable: no core, no ptrace by equals */
    CM_LAYER_LANDLOCK,     /* no path, no TCP port, no signal outside */
    CM_LAYER_CGROUP,       /* memory, swap and processes bounded by the kernel */
    CM_LAYER_FILTER,       /* the system calls of the role's policy, all others kill */
    CM_LAYER_COUNT
};

#define CM_LAYER_BIT(layer) (1u << (layer))
#define CM_LAYERS_ALL       ((1u << CM_LAYER_COUNT) - 1)

/* "pid namespace" … as in reports; "?" for what is none. */
const char *cm_layer_name(enum cm_confine_layer layer);
/* "pid_ns" …: the short word that switches and JSON use. */
const char *cm_layer_word(enum cm_confine_layer layer);

struct cm_promise {
    const char *word; /* "no_exec" */
    const char *text;
    uint32_t layers; /* any of these holds it */
};
#define CM_PROMISE_COUNT 6
extern const struct cm_promise cm_promises[CM_PROMISE_COUNT];

#endif
