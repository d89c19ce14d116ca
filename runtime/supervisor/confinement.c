/* What each role may, what this machine offers of it, and whether it then holds. */
#include <errno.h>
#include <linux/capability.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"
#include "sandbox/report.h"
#include "sandbox/steps.h"
#include "sandbox/violation.h"

#define MIB      (1ull << 20)
#define DYING_MS 100

/* By enum child_index. */
static const struct role_row {
    enum cm_filter_id start, serve;
    uint64_t file_bytes;   /* RLIMIT_FSIZE: what its own memory files need */
    uint64_t memory_bytes; /* 0: from the package and the configuration */
    uint32_t files, processes;
} rows[CHILD_COUNT] = {
    [CHILD_GATEWAY] = {CM_FILTER_GATEWAY_START, CM_FILTER_GATEWAY, 0, 0, 64, 4},
    [CHILD_WORKER] = {CM_FILTER_WORKER_LOAD, CM_FILTER_WORKER_SERVE, 0, 0, 32, 0},
    [CHILD_KEEPER] = {CM_FILTER_KEEPER_START, CM_FILTER_KEEPER, 64u << 10, 256 * MIB, 32, 4},
    [CHILD_DEVTPM] = {CM_FILTER_DEVTPM_START, CM_FILTER_DEVTPM, 8 * MIB, 256 * MIB, 24, 4},
};

/* What callers can make it hold, by the limits that the configuration sets them: for each
 * connection an unread reply, of small events that take three times their bytes, and a head; for
 * each request its body, read and in one piece, its record, and a whole reply in the making; and
 * once the parsed form of a body, at worst ("{},{},…") 81 bytes for each of its own. Beyond it an
 * allocation would fail, and with it the role. */
static uint64_t gateway_memory(const struct cm_configuration *configuration)
{
    uint64_t body = configuration->body_bytes_max;
    return 256 * MIB + 4 * (uint64_t)cm_config_ring_bytes(configuration) + 96 * body +
           configuration->connections_max * (4 * MIB + 4 * configuration->header_bytes_max) +
           configuration->requests_max * (4 * MIB + 4 * body);
}

/* The arena is the payload, the cache and scratch that grows with neither; twice the package covers
 * ciphertext that is being read. */
static uint64_t worker_memory(const struct service *service)
{
    const struct cm_configuration *configuration = service->configuration;
    struct stat facts = {.st_size = 0};
    (void)fstat(service->package_fd, &facts);
    return 2 * (uint64_t)facts.st_size + configuration->kv_bytes +
           configuration->kv_pages * 16 * MIB + 2048 * MIB;
}

static uint64_t memory_bound(const struct service *service, size_t child)
{
    if (rows[child].memory_bytes != 0) {
        return rows[child].memory_bytes;
    }
    return child == CHILD_GATEWAY ? gateway_memory(service->configuration) : worker_memory(service);
}

static uint32_t process_bound(const struct service *service, size_t child)
{
    return rows[child].processes != 0 ? rows[child].processes
                                      : 2 * (uint32_t)sysconf(_SC_NPROCESSORS_CONF) +
                                            2 * (uint32_t)service->configuration->threads + 8;
}

void confinement_make(const struct service *service, const struct child *child, uint32_t fds,
                      struct cm_confinement *ret_confinement)
{
    size_t index = (size_t)(child - service->children);
    const struct role_row *row = &rows[index];
    uint64_t connections = index == CHILD_GATEWAY ? service->configuration->connections_max : 0;
    *ret_confinement = (struct cm_confinement){
        .layers = service->sandbox.wanted,
        .landlock_abi = service->sandbox.host.landlock_abi,
        .role = (uint32_t)child->role,
        .uid = CM_CONFINE_UID + (uint32_t)index,
        .descriptors = fds,
        .files_max = row->files + connections,
        .file_bytes_max = row->file_bytes,
        .memory_bytes_max = memory_bound(service, index),
        .memory_data = index == CHILD_WORKER,
        .filter_start = row->start,
        .filter_serve = row->serve,
    };
}

void violation_take(struct service *service, struct child *child, const siginfo_t *how)
{
    uint32_t call = 0;
    child->forbidden = NULL;
    if (how->si_code != CLD_EXITED && how->si_status == SIGSYS &&
        cm_violation_find(service->violation_fd, child->pid, &call)) {
        child->forbidden = cm_call_name(call);
    }
}

static void groups_open(struct service *service)
{
    struct cm_cgroup_limits limits[CHILD_COUNT];
    struct sandbox *sandbox = &service->sandbox;
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        limits[i] = (struct cm_cgroup_limits){service->children[i].name, memory_bound(service, i),
                                              process_bound(service, i)};
    }
    service->memory_limit = cm_cgroup_memory_limit();
    service->cpus = cm_cgroup_cpus();
    cm_cgroups_make(limits, CHILD_COUNT, &service->groups);
    if (service->groups.lacks[0] == '\0') {
        sandbox->host.available |= CM_LAYER_BIT(CM_LAYER_CGROUP);
    }
}

/* A layer that this user, kernel or build cannot have is named once, with the reason. */
static void missing_log(const struct service *service)
{
    const struct sandbox *sandbox = &service->sandbox;
    for (uint32_t i = 0; i < CM_LAYER_COUNT; i++) {
        if ((sandbox->missing & CM_LAYER_BIT(i)) != 0) {
            const char *why = i == CM_LAYER_CGROUP && service->groups.lacks[0] != '\0'
                                  ? service->groups.lacks
                                  : strerrordesc_np(sandbox->host.errors[i]);
            CM_LOG(&service->log, CM_LOG_WARN, "sandbox_lacks",
                   CM_LOG_S("layer", cm_layer_name((enum cm_confine_layer)i)),
                   CM_LOG_S("why", why));
        }
    }
}

static enum cm_status promises_check(const struct service *service, struct cm_error *err)
{
    const struct sandbox *sandbox = &service->sandbox;
    bool full = strcmp(service->configuration->require_sandbox, "full") == 0;
    for (size_t i = 0; i < CM_PROMISE_COUNT; i++) {
        const struct cm_promise *promise = &cm_promises[i];
        if ((promise->layers & sandbox->host.available) != 0) {
            continue;
        }
        if (full) {
            return cm_error_set(err, CM_E_SANDBOX, "CM-SANDBOX-PROMISE",
                                "nothing on this machine holds the promise \"a role %s\", and "
                                "require_sandbox is full; `casemate doctor` says what is missing",
                                promise->text);
        }
        CM_LOG(&service->log, CM_LOG_WARN, "sandbox_promise_open",
               CM_LOG_S("promise", promise->word));
    }
    return CM_OK;
}

/* No swap in this machine, or none for the worker's group. */
static bool swap_absent(const struct service *service)
{
    char line[256];
    int lines = 0;
    FILE *file = fopen("/proc/swaps", "re");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        lines++;
    }
    if (file != NULL) {
        fclose(file);
    }
    return lines == 1 || (service->groups.groups[CHILD_WORKER].born_fd >= 0 &&
                          service->groups.groups[CHILD_WORKER].swap);
}

enum cm_status confinement_open(struct service *service, struct cm_error *err)
{
    struct sandbox *sandbox = &service->sandbox;
    const struct cm_switches switches = cm_switches_get();
    cm_host_probe(&sandbox->host);
    service->violation_fd = cm_violation_open();
    groups_open(service);
    sandbox->swapless = swap_absent(service) && !switches.swap;
    for (uint32_t i = 0; i < CM_LAYER_COUNT; i++) {
        if ((switches.lacks & CM_LAYER_BIT(i)) != 0) {
            sandbox->host.errors[i] = ENOSYS;
        }
    }
    sandbox->host.available &= ~switches.lacks;
    if (switches.landlock_abi_max != 0 && sandbox->host.landlock_abi > switches.landlock_abi_max) {
        sandbox->host.landlock_abi = switches.landlock_abi_max;
    }
    sandbox->wanted = sandbox->host.available & ~switches.off;
    sandbox->accepted = switches.accept ? switches.off : 0;
    /* Root needs no user namespace, an ordinary user can have no other identity. */
    const uint32_t either = CM_LAYER_BIT(CM_LAYER_USER_NS) | CM_LAYER_BIT(CM_LAYER_IDENTITY);
    sandbox->missing = CM_LAYERS_ALL & ~sandbox->host.available;
    if ((sandbox->host.available & either) != 0) {
        sandbox->missing &= ~either;
    }
    missing_log(service);
    CM_LOG(&service->log, CM_LOG_INFO, "sandbox", CM_LOG_I("layers", sandbox->wanted),
           CM_LOG_I("landlock_abi", sandbox->host.landlock_abi),
           CM_LOG_S("switched_off", switches.off != 0 ? "yes" : "no"));
    return promises_check(service, err);
}

/* What is left: to end roles of other users, to look at their namespaces, and to write its files
 * whoever owns the folder. */
#define OWN_CAPABILITIES (1ull << CAP_KILL | 1ull << CAP_SYS_PTRACE | 1ull << CAP_DAC_OVERRIDE)

enum cm_status confinement_self(struct service *service, struct cm_error *err)
{
    static char ready_line[1024];
    const uint32_t wanted = service->sandbox.wanted;
    const struct rlimit none = {0, 0};
    int failed = 0;
    setvbuf(stdout, ready_line, _IOFBF,
            sizeof(ready_line)); /* else it takes memory when it is used */
    if ((wanted & CM_LAYER_BIT(CM_LAYER_LIMITS)) != 0 && setrlimit(RLIMIT_CORE, &none) != 0) {
        failed = errno;
    }
    if ((wanted & CM_LAYER_BIT(CM_LAYER_CAPABILITIES)) != 0 && geteuid() == 0 && failed == 0) {
        failed = cm_step_bounding_drop();
        failed = failed == 0 ? cm_step_capabilities(OWN_CAPABILITIES) : failed;
    }
    if ((wanted & CM_LAYER_BIT(CM_LAYER_NO_NEW)) != 0 && failed == 0 &&
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
        failed = errno;
    }
    if (failed != 0) {
        (void)cm_error_errno(err, failed, "CM-SANDBOX-STEP", "cannot confine the supervisor");
        err->status = CM_E_SANDBOX;
        return CM_E_SANDBOX;
    }
    return (wanted & CM_LAYER_BIT(CM_LAYER_FILTER)) != 0
               ? cm_filter_install(CM_FILTER_SUPERVISOR, err)
               : CM_OK;
}

bool confinement_holds(struct service *service, const struct child *child, uint32_t probed,
                       struct cm_error *err)
{
    struct cm_observed seen;
    const struct sandbox *sandbox = &service->sandbox;
    cm_observe(child->pid, child->name, &seen);
    uint32_t held = seen.layers | (probed & ~seen.readable);
    uint32_t lost = sandbox->host.available & ~held & ~sandbox->accepted;
    struct pollfd ended = {.fd = child->pidfd, .events = POLLIN};
    if (lost == 0 || poll(&ended, 1, DYING_MS) == 1) {
        return true; /* of one that is dying nothing can be read: its end says more */
    }
    uint32_t first = (uint32_t)__builtin_ctz(lost);
    (void)cm_error_set(err, CM_E_SANDBOX, "CM-SANDBOX-HOLDS",
                       "%s is ready, but a layer that this machine has is not in force: %s",
                       child->name, cm_layer_name((enum cm_confine_layer)first));
    return false;
}
