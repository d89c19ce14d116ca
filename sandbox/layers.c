/* Names of layers, and which promise each holds. */
#include "sandbox/layers.h"

struct names {
    const char *word, *name;
};

static const struct names layer_names[CM_LAYER_COUNT] = {
    [CM_LAYER_USER_NS] = {"user_ns", "user namespace"},
    [CM_LAYER_PID_NS] = {"pid_ns", "process namespace"},
    [CM_LAYER_NET_NS] = {"net_ns", "network namespace"},
    [CM_LAYER_OTHER_NS] = {"other_ns", "IPC, host name and cgroup namespaces"},
    [CM_LAYER_ROOT] = {"root", "empty root file system"},
    [CM_LAYER_IDENTITY] = {"identity", "user id of its own"},
    [CM_LAYER_CAPABILITIES] = {"capabilities", "no capabilities"},
    [CM_LAYER_LIMITS] = {"limits", "resource limits"},
    [CM_LAYER_NO_NEW] = {"no_new_privs", "no new privileges"},
    [CM_LAYER_MDWE] = {"mdwe", "no new executable memory"},
    [CM_LAYER_DUMP] = {"dump", "not dumpable"},
    [CM_LAYER_LANDLOCK] = {"landlock", "Landlock"},
    [CM_LAYER_CGROUP] = {"cgroup", "control group"},
    [CM_LAYER_FILTER] = {"filter", "system call filter"},
};

const char *cm_layer_name(enum cm_confine_layer layer)
{
    return layer < CM_LAYER_COUNT ? layer_names[layer].name : "?";
}

const char *cm_layer_word(enum cm_confine_layer layer)
{
    return layer < CM_LAYER_COUNT ? layer_names[layer].word : "?";
}

#define L(layer) CM_LAYER_BIT(CM_LAYER_##layer)

const struct cm_promise cm_promises[CM_PROMISE_COUNT] = {
    {"no_exec", "runs no other program", L(FILTER)}, /* from memory, too: that takes no path */
    {"no_files", "opens and makes no file", L(FILTER) | L(ROOT) | L(LANDLOCK)},
    {"no_network", "makes no connection of its own", L(FILTER) | L(NET_NS)},
    {"no_foreign_memory", "reads no other process", L(FILTER) | L(PID_NS) | L(IDENTITY)},
    {"no_dump", "leaves no core file", L(DUMP) | L(LIMITS)},
    {"bounded_memory", "takes no more memory than it may", L(LIMITS) | L(CGROUP)},
};
