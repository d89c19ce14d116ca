/* The single steps. Structures that are newer than Debian 12's headers are declared here. */
#include "sandbox/steps.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65 /* Linux 6.3 */
#endif
#define MDWE_REFUSE_EXEC_GAIN 1ul
#define STACK_BYTES           (8u << 20)

static int result(long value)
{
    return value == 0 ? 0 : errno;
}

uint64_t cm_step_namespaces(uint32_t layers)
{
    static const struct {
        enum cm_confine_layer layer;
        uint64_t flags;
    } rows[] = {
        {CM_LAYER_USER_NS, CLONE_NEWUSER},
        {CM_LAYER_PID_NS, CLONE_NEWPID},
        {CM_LAYER_NET_NS, CLONE_NEWNET},
        {CM_LAYER_OTHER_NS, CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP},
        {CM_LAYER_ROOT, CLONE_NEWNS},
    };
    uint64_t flags = 0;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        flags |= (layers & CM_LAYER_BIT(rows[i].layer)) != 0 ? rows[i].flags : 0;
    }
    return flags;
}

static bool file_put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool good = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0) {
        close(fd);
    }
    return good;
}

/* Root inside is the user outside and nobody else; no user namespace below this one. */
static bool user_map(uid_t uid, gid_t gid)
{
    char uids[32], gids[32];
    snprintf(uids, sizeof(uids), "0 %u 1", uid);
    snprintf(gids, sizeof(gids), "0 %u 1", gid);
    bool good = file_put("/proc/self/setgroups", "deny") && file_put("/proc/self/uid_map", uids) &&
                file_put("/proc/self/gid_map", gids);
    (void)file_put("/proc/sys/user/max_user_namespaces", "0"); /* else the filter alone says no */
    return good;
}

int cm_step_user_namespaces(uint32_t layers)
{
    const uid_t uid = geteuid();
    const gid_t gid = getegid();
    if (unshare((int)cm_step_namespaces(layers)) != 0) {
        return errno;
    }
    return user_map(uid, gid) ? 0 : EPERM;
}

/* tmpfs over /proc, which surely exists: that becomes the root, and nothing of the old one stays
 * (pivot_root(2), "pivot_root(".", ".")"). */
int cm_step_root(void)
{
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("casemate", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC,
              "size=4k,nr_inodes=2,mode=755") != 0 ||
        chdir("/proc") != 0 || syscall(SYS_pivot_root, ".", ".") != 0 ||
        umount2(".", MNT_DETACH) != 0 || chdir("/") != 0 ||
        mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC,
              NULL) != 0) {
        return errno;
    }
    return 0;
}

int cm_step_limits(const struct cm_confinement *wanted)
{
    const struct {
        int resource;
        rlim_t most;
    } limits[] = {
        {RLIMIT_CORE, 0},
        {RLIMIT_FSIZE, wanted->file_bytes_max},
        {RLIMIT_NOFILE, wanted->files_max},
        {RLIMIT_MSGQUEUE, 0},
        {RLIMIT_RTPRIO, 0},
        {RLIMIT_NICE, 0},
        {RLIMIT_SIGPENDING, 64},
        {RLIMIT_STACK, STACK_BYTES},
        {wanted->memory_data != 0 ? RLIMIT_DATA : RLIMIT_AS,
         cm_confine_sanitized() ? RLIM_INFINITY : wanted->memory_bytes_max},
    };
    if (wanted->memory_data != 0) {
        const struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
        (void)setrlimit(RLIMIT_MEMLOCK, &all); /* weights: what cannot be locked is reported */
    }
    for (size_t i = 0; i < sizeof(limits) / sizeof(limits[0]); i++) {
        struct rlimit now;
        if (getrlimit((__rlimit_resource_t)limits[i].resource, &now) != 0) {
            return errno;
        }
        /* What is lower already stays. */
        now.rlim_max = now.rlim_max < limits[i].most ? now.rlim_max : limits[i].most;
        now.rlim_cur = now.rlim_max;
        if (setrlimit((__rlimit_resource_t)limits[i].resource, &now) != 0) {
            return errno;
        }
    }
    return 0;
}

int cm_step_bounding_drop(void)
{
    const unsigned long bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP |
                               SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
                               SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
    for (unsigned long capability = 0; capability < 64; capability++) {
        int there = prctl(PR_CAPBSET_READ, capability, 0, 0, 0);
        if (there == 1 && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0) {
            return errno;
        }
    }
    (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    return result(prctl(PR_SET_SECUREBITS, bits, 0, 0, 0));
}

/* NO_SETUID_FIXUP is set: capabilities stay until cm_step_capabilities takes them. */
int cm_step_identity(uint32_t uid)
{
    return setgroups(0, NULL) != 0 || setresgid(uid, uid, uid) != 0 || setresuid(uid, uid, uid) != 0
               ? errno
               : 0;
}

int cm_step_capabilities(uint64_t keep)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2], now[2];
    if (syscall(SYS_capget, &head, now) != 0) {
        return errno;
    }
    for (int i = 0; i < 2; i++) {
        uint32_t bits = now[i].permitted & (uint32_t)(keep >> (32 * i));
        sets[i] = (struct __user_cap_data_struct){.effective = bits, .permitted = bits};
    }
    return result(syscall(SYS_capset, &head, sets));
}

int cm_step_mdwe(void)
{
    return result(prctl(PR_SET_MDWE, MDWE_REFUSE_EXEC_GAIN, 0, 0, 0));
}

/* ------------------------------------------------------------------ Landlock */

struct ruleset { /* struct landlock_ruleset_attr of ABI 6 */
    uint64_t handled_access_fs, handled_access_net, scoped;
};

uint32_t cm_landlock_abi(void)
{
    long abi =
        syscall(SYS_landlock_create_ruleset, NULL, 0, 1u /* LANDLOCK_CREATE_RULESET_VERSION */);
    return abi > 0 ? (uint32_t)abi : 0;
}

/* Handle every right that the ABI knows and allow nothing (landlock(7)). */
int cm_step_landlock(uint32_t abi_max)
{
    uint32_t abi = cm_landlock_abi();
    abi = abi < abi_max ? abi : abi_max;
    if (abi == 0) {
        return ENOSYS;
    }
    const struct ruleset rules = {
        .handled_access_fs = (1ull << (abi >= 5   ? 16
                                       : abi >= 3 ? 15
                                       : abi == 2 ? 14
                                                  : 13)) -
                             1,
        .handled_access_net = abi >= 4 ? 3 : 0, /* bind, connect */
        .scoped = abi >= 6 ? 3 : 0,             /* abstract sockets, signals */
    };
    int fd = (int)syscall(SYS_landlock_create_ruleset, &rules, sizeof(rules), 0);
    if (fd < 0) {
        return errno;
    }
    int error_number = result(syscall(SYS_landlock_restrict_self, fd, 0));
    close(fd);
    return error_number;
}
