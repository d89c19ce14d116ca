/* The order of restriction, from a role's first instruction to its filters. */
#include "sandbox/confine.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/capability.h>

#include "runtime/base/sealed.h"
#include "sandbox/steps.h"

#ifndef PR_GET_MDWE
#define PR_GET_MDWE 66
#endif
#define CANARY_CALL SYS_getppid /* harmless, and in no policy */

bool cm_confine_sanitized(void)
{
#if defined(__SANITIZE_ADDRESS__)
    return true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
    return true;
#else
    return false;
#endif
#else
    return false;
#endif
}

static bool has(const struct cm_confinement *wanted, enum cm_confine_layer layer)
{
    return (wanted->layers & CM_LAYER_BIT(layer)) != 0;
}

/* Nothing in the permitted set: nothing to lower, and no right to lower it. */
static bool powerless(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}, {0}};
    return syscall(SYS_capget, &head, data) == 0 && (data[0].permitted | data[1].permitted) == 0;
}

static int capabilities_lower(const struct cm_confinement *wanted, int *ret_identity)
{
    const bool lower = has(wanted, CM_LAYER_CAPABILITIES);
    *ret_identity = 0;
    if (lower && powerless()) {
        return 0;
    }
    int error_number = lower ? cm_step_bounding_drop() : 0;
    if (has(wanted, CM_LAYER_IDENTITY)) {
        /* Without the securebits of the bounding step the kernel itself drops all here. */
        (void)prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0);
        *ret_identity = cm_step_identity(wanted->uid);
    }
    if (lower && error_number == 0) {
        error_number = cm_step_capabilities(0);
    }
    return error_number;
}

/* Changing identity has cleared it; a supervisor that died meanwhile would leave us alone. */
static void parent_bind(void)
{
    struct pollfd control = {.fd = CM_FD_CONTROL};
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (poll(&control, 1, 0) == 1 && (control.revents & (POLLHUP | POLLERR)) != 0) {
        _exit(127);
    }
}

uint32_t cm_confine_apply(const struct cm_confinement *wanted, int ret_errors[CM_LAYER_COUNT])
{
    memset(ret_errors, 0, CM_LAYER_COUNT * sizeof(*ret_errors));
    if (has(wanted, CM_LAYER_USER_NS)) {
        ret_errors[CM_LAYER_USER_NS] = cm_step_user_namespaces(wanted->layers);
    }
    if (has(wanted, CM_LAYER_ROOT)) {
        ret_errors[CM_LAYER_ROOT] = cm_step_root();
    }
    if (has(wanted, CM_LAYER_LIMITS)) {
        ret_errors[CM_LAYER_LIMITS] = cm_step_limits(wanted);
    }
    ret_errors[CM_LAYER_CAPABILITIES] = capabilities_lower(wanted, &ret_errors[CM_LAYER_IDENTITY]);
    parent_bind();
    if (has(wanted, CM_LAYER_NO_NEW) && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
        ret_errors[CM_LAYER_NO_NEW] = errno;
    }
    if (has(wanted, CM_LAYER_MDWE)) {
        ret_errors[CM_LAYER_MDWE] = cm_step_mdwe();
    }
    if (has(wanted, CM_LAYER_DUMP) && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0) {
        ret_errors[CM_LAYER_DUMP] = errno;
    }
    if (has(wanted, CM_LAYER_LANDLOCK)) {
        ret_errors[CM_LAYER_LANDLOCK] = cm_step_landlock(wanted->landlock_abi);
    }
    uint32_t held = wanted->layers;
    for (uint32_t i = 0; i < CM_LAYER_COUNT; i++) {
        held &= ret_errors[i] != 0 ? ~CM_LAYER_BIT(i) : UINT32_MAX;
    }
    return held;
}

static enum cm_status refuse(struct cm_error *err, int error_number, const char *what)
{
    (void)cm_error_errno(err, error_number, "CM-SANDBOX-STEP", "cannot confine this role: %s",
                         what);
    err->status = CM_E_SANDBOX;
    return CM_E_SANDBOX;
}

/* Exactly the descriptors that were given. */
static enum cm_status descriptors_check(uint32_t expected, struct cm_error *err)
{
    uint64_t found = 0, wanted = 7u | expected; /* 0 to 2: /dev/null, and the log */
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;
    while (folder != NULL && (entry = readdir(folder)) != NULL) {
        long number = strtol(entry->d_name, NULL, 10);
        if (entry->d_name[0] != '.' && number != dirfd(folder)) {
            found |= 1ull << (number < 63 ? number : 63);
        }
    }
    if (folder == NULL) {
        return refuse(err, errno, "its descriptors cannot be listed");
    }
    closedir(folder);
    return found == wanted ? CM_OK
                           : cm_error_set(err, CM_E_SANDBOX, "CM-SANDBOX-DESCRIPTORS",
                                          "descriptors 0x%llx are open, expected 0x%llx",
                                          (unsigned long long)found, (unsigned long long)wanted);
}

/* A child under the role's filters makes one call that no policy has, and must not survive it. */
static enum cm_status canary(const struct cm_confinement *c, struct cm_error *err)
{
    int status = 0;
    const enum cm_filter_id last = (enum cm_filter_id)c->filter_serve;
    pid_t child = fork();
    if (child == 0) {
        bool installed = cm_filter_install((enum cm_filter_id)c->filter_start, NULL) == CM_OK &&
                         cm_filter_install(last, NULL) == CM_OK;
        if (installed) {
            syscall(CANARY_CALL);
        }
        _exit(installed ? 1 : 2);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) {
        return refuse(err, errno, "the canary cannot be started");
    }
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSYS) {
        return cm_error_set(err, CM_E_SANDBOX, "CM-SANDBOX-CANARY",
                            "filter %s: the canary survived a forbidden call (status 0x%x)",
                            cm_filters[last].name, (unsigned)status);
    }
    return CM_OK;
}

/* Is there a network? In an empty namespace loopback is down. */
static bool network_up(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool up =
        fd >= 0 && ioctl(fd, SIOCGIFFLAGS, &request) == 0 && (request.ifr_flags & IFF_UP) != 0;
    if (fd >= 0) {
        close(fd);
    }
    return up;
}

/* What can be tried from inside. `made`: namespaces that the kernel has just given this process; of
 * an ordinary user's role nobody outside can read them. */
static uint32_t layers_probe(uint32_t made)
{
    uint32_t held = made & (CM_LAYER_BIT(CM_LAYER_USER_NS) | CM_LAYER_BIT(CM_LAYER_OTHER_NS));
    if (!network_up()) {
        held |= CM_LAYER_BIT(CM_LAYER_NET_NS);
    }
    if (access("/proc", F_OK) != 0 && errno == ENOENT) {
        held |= CM_LAYER_BIT(CM_LAYER_ROOT);
    }
    int root = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0 && errno == EACCES) {
        held |= CM_LAYER_BIT(CM_LAYER_LANDLOCK); /* the mode of the root would permit it */
    }
    if (root >= 0) {
        close(root);
    }
    if (prctl(PR_GET_MDWE, 0, 0, 0, 0) > 0) {
        held |= CM_LAYER_BIT(CM_LAYER_MDWE);
    }
    if (prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0) {
        held |= CM_LAYER_BIT(CM_LAYER_DUMP);
    }
    return held;
}

enum cm_status cm_confine_begin(const char *name, struct cm_confinement *ret_confinement,
                                struct cm_error *err)
{
    struct cm_confinement c;
    int errors[CM_LAYER_COUNT];
    if (pread(CM_CONFINEMENT_FD, &c, sizeof(c), 0) != (ssize_t)sizeof(c) ||
        c.filter_start >= CM_FILTER_COUNT || c.filter_serve >= CM_FILTER_COUNT) {
        if (fcntl(CM_FD_CONTROL, F_GETFD) < 0) { /* by hand: no supervisor hears the error */
            dprintf(STDERR_FILENO, "%s is started by casemate-supervisor\n", name);
        }
        return cm_error_set(err, CM_E_SANDBOX, "CM-SANDBOX-NONE",
                            "this role was started without a confinement");
    }
    (void)close_range(CM_FD_COUNT, ~0u, 0);
    tzset();                        /* else the first log line would look for /etc/localtime */
    (void)prctl(PR_SET_NAME, name); /* the loader's descriptor number stands there otherwise */
    enum cm_status status = c.layers != 0 ? descriptors_check(c.descriptors, err) : CM_OK;
    if (status == CM_OK) {
        uint32_t held = cm_confine_apply(&c, errors);
        for (uint32_t i = 0; i < CM_LAYER_COUNT && held != c.layers; i++) {
            if ((c.layers & ~held & CM_LAYER_BIT(i)) != 0) {
                return refuse(err, errors[i], cm_layer_name((enum cm_confine_layer)i));
            }
        }
        c.probed = layers_probe(has(&c, CM_LAYER_USER_NS) ? held : 0);
    }
    if (status == CM_OK && has(&c, CM_LAYER_FILTER)) {
        status = canary(&c, err);
        if (status == CM_OK) {
            status = cm_filter_install((enum cm_filter_id)c.filter_start, err);
        }
    }
    if (status == CM_OK) {
        *ret_confinement = c;
    }
    return status;
}

bool cm_confinement_none_place(void)
{
    const struct cm_confinement none = {.layers = 0};
    int fd = cm_memfd_sealed("confinement", &none, sizeof(none));
    bool placed = fd >= 0 && dup2(fd, CM_CONFINEMENT_FD) == CM_CONFINEMENT_FD;
    if (fd >= 0 && fd != CM_CONFINEMENT_FD) {
        close(fd);
    }
    return placed;
}

enum cm_status cm_confine_serve(const struct cm_confinement *confinement, struct cm_error *err)
{
    return has(confinement, CM_LAYER_FILTER)
               ? cm_filter_install((enum cm_filter_id)confinement->filter_serve, err)
               : CM_OK;
}
