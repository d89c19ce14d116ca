/* casemate doctor: is this host fit to keep what Casemate promises? One row a matter: what was
 * found, and what to do about it. Reads /proc, /sys and /dev, asks the kernel, changes nothing.
 *
 * --root DIR looks at a copy of those trees instead; what only a system call can tell is then read
 * from DIR/probes, lines of "name value". So each row can be tested both ways. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <linux/landlock.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timex.h>
#include <unistd.h>

#include "runtime/cli/cli_internal.h"

#ifndef PR_GET_MDWE
#define PR_GET_MDWE 66
#endif
#define CAP_SYS_RESOURCE_BIT 24
#define TEXT_BYTES           65536

enum level { LEVEL_PASS, LEVEL_WARN, LEVEL_FAIL };

struct finding {
    enum level level;
    char found[200];
    const char *next; /* what to do; "" where it passes */
};

struct host {
    const char *root; /* "" : this machine */
    char probes[TEXT_BYTES];
    char text[TEXT_BYTES]; /* the file that was read last */
};

/* ------------------------------------------------------------------ looking */

/* The file's text in host->text, "" if there is none. Kernel files have no size: read to the end.
 */
static bool host_read(struct host *host, const char *path)
{
    char whole[4096];
    size_t used = 0;
    ssize_t got = 0;
    snprintf(whole, sizeof(whole), "%s%s", host->root, path);
    int fd = open(whole, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    host->text[0] = '\0';
    if (fd < 0) {
        return false;
    }
    while (used < TEXT_BYTES - 1 &&
           (got = read(fd, host->text + used, TEXT_BYTES - 1 - used)) > 0) {
        used += (size_t)got;
    }
    close(fd);
    host->text[used] = '\0';
    return got >= 0;
}

/* As it is here, or as DIR/probes says; -1 where that says nothing. */
static long probe(const struct host *host, const char *name, long here)
{
    size_t size = strlen(name);
    if (host->root[0] == '\0') {
        return here;
    }
    for (const char *at = host->probes; *at != '\0'; at++) {
        if (strncmp(at, name, size) == 0 && at[size] == ' ') {
            return strtol(at + size, NULL, 10);
        }
        at += strcspn(at, "\n");
        if (*at == '\0') {
            break;
        }
    }
    return -1;
}

/* A whole word of host->text. */
static bool has_word(const struct host *host, const char *word)
{
    size_t size = strlen(word);
    for (const char *at = host->text; (at = strstr(at, word)) != NULL; at += size) {
        bool begins = at == host->text || strchr(" \t\n,[", at[-1]) != NULL;
        if (begins && (at[size] == '\0' || strchr(" \t\n,]", at[size]) != NULL)) {
            return true;
        }
    }
    return false;
}

static bool host_exists(const struct host *host, const char *path, struct stat *ret_facts)
{
    char whole[4096];
    snprintf(whole, sizeof(whole), "%s%s", host->root, path);
    return stat(whole, ret_facts) == 0;
}

CM_PRINTF(4, 5)
static void finding_set(struct finding *finding, enum level level, const char *next,
                        const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(finding->found, sizeof(finding->found), format, args);
    va_end(args);
    finding->level = level;
    finding->next = next;
}

/* ------------------------------------------------------------------ memory */

static bool swap_on(struct host *host)
{
    const char *end = host_read(host, "/proc/swaps") ? strchr(host->text, '\n') : NULL;
    return end != NULL && end[1] != '\0';
}

/* Bytes that a worker may lock; UINT64_MAX: as much as it likes. It has no capability any more when
 * it locks, so the limit decides, which its start raises where it may. */
static uint64_t lockable_bytes(struct host *host)
{
    const char *at = host_read(host, "/proc/self/status") ? strstr(host->text, "CapEff:") : NULL;
    if (at != NULL && (strtoull(at + 7, NULL, 16) >> CAP_SYS_RESOURCE_BIT & 1) == 1) {
        return UINT64_MAX;
    }
    at = host_read(host, "/proc/self/limits") ? strstr(host->text, "Max locked memory") : NULL;
    at = at != NULL ? at + strlen("Max locked memory") : "0";
    at += strspn(at, " ");
    return strncmp(at, "unlimited", 9) == 0 ? UINT64_MAX : strtoull(at, NULL, 10);
}

static void swap_check(struct host *host, struct finding *finding)
{
    if (!swap_on(host)) {
        finding_set(finding, LEVEL_PASS, "", "no swap");
    } else if (lockable_bytes(host) == UINT64_MAX) {
        finding_set(finding, LEVEL_WARN,
                    "swapoff -a: weights are locked, prompts and replies are not",
                    "swap is on, memory can be locked");
    } else {
        finding_set(finding, LEVEL_FAIL,
                    "swapoff -a, or let the service lock its memory (LimitMEMLOCK=infinity)",
                    "swap is on, and memory cannot be locked: weights could reach the disk");
    }
}

static void memlock_check(struct host *host, struct finding *finding)
{
    uint64_t bytes = lockable_bytes(host);
    if (bytes == UINT64_MAX) {
        finding_set(finding, LEVEL_PASS, "", "memory can be locked without limit");
    } else {
        finding_set(finding, LEVEL_WARN,
                    "LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited as root",
                    "at most %llu KiB can be locked: the weights will not be",
                    (unsigned long long)(bytes >> 10));
    }
}

static void ksm_check(struct host *host, struct finding *finding)
{
    bool on = host_read(host, "/sys/kernel/mm/ksm/run") && host->text[0] == '1';
    finding_set(finding, on ? LEVEL_WARN : LEVEL_PASS, on ? "echo 2 >/sys/kernel/mm/ksm/run" : "",
                on ? "pages are merged: what is equal can be told by its timing"
                   : "no page merging");
}

static void huge_pages_check(struct host *host, struct finding *finding)
{
    bool known = host_read(host, "/sys/kernel/mm/transparent_hugepage/enabled");
    bool on = known &&
              (strstr(host->text, "[always]") != NULL || strstr(host->text, "[madvise]") != NULL);
    finding_set(finding, on ? LEVEL_PASS : LEVEL_WARN,
                on ? "" : "echo madvise >/sys/kernel/mm/transparent_hugepage/enabled",
                on ? "transparent huge pages" : "no transparent huge pages: decode is slower");
}

/* ------------------------------------------------------------------ kernel */

static void kernel_check(struct host *host, struct finding *finding)
{
    int major = 0, minor = 0;
    host_read(host, "/proc/sys/kernel/osrelease");
    host->text[strcspn(host->text, "\n")] = '\0';
    bool known = sscanf(host->text, "%d.%d", &major, &minor) == 2;
    int version = major * 1000 + minor;
    if (!known || version < 5014) {
        finding_set(finding, LEVEL_FAIL, "a kernel of 5.14 or later; 6.1 is what is tested",
                    "kernel %.60s", known ? host->text : "unknown");
    } else {
        finding_set(finding, version < 6001 ? LEVEL_WARN : LEVEL_PASS,
                    version < 6001 ? "6.1 is the oldest kernel that is tested" : "", "kernel %.60s",
                    host->text);
    }
}

static void seccomp_check(struct host *host, struct finding *finding)
{
    bool good =
        host_read(host, "/proc/sys/kernel/seccomp/actions_avail") && has_word(host, "kill_process");
    finding_set(finding, good ? LEVEL_PASS : LEVEL_FAIL,
                good ? "" : "a kernel with CONFIG_SECCOMP_FILTER",
                good ? "system-call filters" : "no system-call filters that kill a process");
}

static void landlock_check(struct host *host, struct finding *finding)
{
    long abi =
        probe(host, "landlock",
              syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION));
    if (abi < 1) {
        finding_set(finding, LEVEL_WARN, "boot with lsm=landlock,… (CONFIG_SECURITY_LANDLOCK)",
                    "no Landlock: namespaces and filters alone keep roles from files");
    } else {
        finding_set(finding, LEVEL_PASS, "", "Landlock ABI %ld", abi);
    }
}

static void mdwe_check(struct host *host, struct finding *finding)
{
    bool good = probe(host, "mdwe", prctl(PR_GET_MDWE, 0, 0, 0, 0)) >= 0;
    finding_set(finding, good ? LEVEL_PASS : LEVEL_WARN,
                good ? "" : "kernel 6.3 or later; until then the filters alone refuse it",
                good ? "the kernel refuses new executable memory (MDWE)"
                     : "no MDWE: new executable memory");
}

static long secret_memory_try(void)
{
    int fd = (int)syscall(SYS_memfd_secret, 0u);
    if (fd >= 0) {
        close(fd);
    }
    return fd >= 0;
}

static void secret_memory_check(struct host *host, struct finding *finding)
{
    bool good = probe(host, "memfd_secret", secret_memory_try()) == 1;
    finding_set(finding, good ? LEVEL_PASS : LEVEL_WARN, good ? "" : "boot with secretmem.enable=1",
                good ? "secret memory for keys"
                     : "no memfd_secret: keys lie in ordinary locked memory");
}

/* "0" in a file that exists; what such a file says of a kernel that lacks it is unknown. */
static bool says(struct host *host, const char *path, const char *value)
{
    return host_read(host, path) && strncmp(host->text, value, strlen(value)) == 0 &&
           (host->text[strlen(value)] == '\n' || host->text[strlen(value)] == '\0');
}

static void namespaces_check(struct host *host, struct finding *finding)
{
    struct stat facts;
    bool root = probe(host, "uid", (long)geteuid()) == 0;
    bool closed = says(host, "/proc/sys/user/max_user_namespaces", "0") ||
                  says(host, "/proc/sys/kernel/unprivileged_userns_clone", "0") ||
                  says(host, "/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1");
    if (!host_exists(host, "/proc/self/ns/pid", &facts) ||
        !host_exists(host, "/proc/self/ns/net", &facts)) {
        finding_set(finding, LEVEL_FAIL, "a kernel with CONFIG_PID_NS and CONFIG_NET_NS",
                    "no namespaces");
    } else if (!root && closed) {
        finding_set(finding, LEVEL_WARN,
                    "start as root, or sysctl kernel.unprivileged_userns_clone=1 and "
                    "kernel.apparmor_restrict_unprivileged_userns=0",
                    "an ordinary user may not make namespaces");
    } else {
        finding_set(finding, LEVEL_PASS, "", root ? "namespaces, as root" : "user namespaces");
    }
}

/* ------------------------------------------------------------------ control groups */

/* Our own group in the unified tree, "" if there is none. */
static void own_group(struct host *host, char ret_path[static 512])
{
    const char *at = host_read(host, "/proc/self/cgroup") ? strstr(host->text, "0::/") : NULL;
    ret_path[0] = '\0';
    if (at != NULL) {
        int size = (int)strcspn(at + 3, "\n");
        snprintf(ret_path, 512, "%.*s", size < 400 ? size : 400, at + 3);
    }
}

static void cgroup_check(struct host *host, struct finding *finding)
{
    static const char *const trees[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"};
    char group[512], path[1024];
    struct stat facts;
    own_group(host, group);
    snprintf(path, sizeof(path), "%s%s/cgroup.controllers", trees[0], group);
    if (host_read(host, path)) {
        bool whole = has_word(host, "memory") && has_word(host, "pids");
        finding_set(finding, whole ? LEVEL_PASS : LEVEL_WARN,
                    whole ? "" : "Delegate=yes in the unit, or run under systemd-run",
                    "cgroup v2, %s",
                    whole ? "memory and pids are delegated"
                          : "memory and pids are not delegated to this group");
        return;
    }
    if (host_exists(host, "/sys/fs/cgroup/memory/memory.limit_in_bytes", &facts) &&
        host_exists(host, "/sys/fs/cgroup/pids", &facts)) {
        bool hybrid = host_exists(host, trees[1], &facts);
        finding_set(finding, LEVEL_PASS, "", "cgroup v1 memory and pids%s",
                    hybrid ? ", v2 beside it" : "");
        return;
    }
    finding_set(finding, LEVEL_WARN, "mount cgroup2 on /sys/fs/cgroup with memory and pids",
                "no cgroup limits: only rlimits bound memory and processes");
}

/* ------------------------------------------------------------------ processor, clock */

static void vulnerabilities_check(struct host *host, struct finding *finding)
{
    char path[4096], list[160] = "";
    size_t used = 0;
    snprintf(path, sizeof(path), "%s/sys/devices/system/cpu/vulnerabilities", host->root);
    DIR *folder = opendir(path);
    const struct dirent *entry;
    while (folder != NULL && (entry = readdir(folder)) != NULL) {
        char one[512];
        snprintf(one, sizeof(one), "/sys/devices/system/cpu/vulnerabilities/%.200s", entry->d_name);
        if (entry->d_name[0] != '.' && host_read(host, one) &&
            (strncmp(host->text, "Vulnerable", 10) == 0 ||
             strstr(host->text, "SMT vulnerable") != NULL) &&
            used < sizeof(list) - 40) {
            used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%.30s",
                                     used > 0 ? ", " : "", entry->d_name);
        }
    }
    if (folder == NULL) {
        finding_set(finding, LEVEL_WARN, "mount /sys", "the kernel tells no CPU vulnerabilities");
        return;
    }
    closedir(folder);
    finding_set(finding, used > 0 ? LEVEL_WARN : LEVEL_PASS,
                used > 0 ? "install microcode and kernel updates; nosmt where SMT is named" : "",
                used > 0 ? "vulnerable: %s" : "CPU vulnerabilities are mitigated%s", list);
}

static void microcode_check(struct host *host, struct finding *finding)
{
    const char *at = host_read(host, "/proc/cpuinfo") ? strstr(host->text, "microcode") : NULL;
    at = at != NULL ? strchr(at, ':') : NULL;
    if (at == NULL) {
        finding_set(finding, LEVEL_WARN, "ask who runs the hypervisor", "no microcode is told");
        return;
    }
    bool hidden = strtoul(at + 1, NULL, 16) == 0xffffffff || strtoul(at + 1, NULL, 16) <= 1;
    finding_set(finding, hidden ? LEVEL_WARN : LEVEL_PASS,
                hidden ? "ask who runs the hypervisor which microcode the machine has" : "",
                "microcode %.*s%s", (int)strcspn(at + 2, "\n"), at + 2,
                hidden ? " (a virtual machine's placeholder)" : "");
}

static void cpu_check(struct host *host, struct finding *finding)
{
    host_read(host, "/proc/cpuinfo");
    bool vector = has_word(host, "avx2") && has_word(host, "fma") && has_word(host, "f16c");
    bool crypto = has_word(host, "aes") && has_word(host, "pclmulqdq");
    if (!vector) {
        finding_set(finding, LEVEL_WARN, "a CPU with AVX2, FMA and F16C",
                    "no AVX2: replies come many times slower");
    } else if (!crypto) {
        finding_set(finding, LEVEL_WARN, "a CPU with AES-NI, or packages in suite 2 (ChaCha20)",
                    "no AES-NI: packages of suite 1 load slowly");
    } else {
        finding_set(finding, LEVEL_PASS, "", "AVX2%s%s, AES%s%s",
                    has_word(host, "avx512_vnni") ? ", AVX-512 VNNI" : "",
                    has_word(host, "amx_bf16") ? ", AMX" : "",
                    has_word(host, "vaes") ? ", VAES" : "",
                    has_word(host, "sha_ni") ? ", SHA" : "");
    }
}

static void clock_check(struct host *host, struct finding *finding)
{
    struct timex state = {.modes = 0};
    long synchronised = probe(host, "clock_synchronised",
                              adjtimex(&state) != TIME_ERROR && (state.status & STA_UNSYNC) == 0);
    host_read(host, "/sys/devices/system/clocksource/clocksource0/current_clocksource");
    host->text[strcspn(host->text, "\n")] = '\0';
    bool fast = strcmp(host->text, "tsc") == 0 || strcmp(host->text, "kvm-clock") == 0 ||
                strncmp(host->text, "hyperv", 6) == 0 || strncmp(host->text, "arch_", 5) == 0;
    if (!fast) {
        finding_set(finding, LEVEL_WARN, "boot with clocksource=tsc if the CPU's is stable",
                    "clock source %.40s needs a system call for each look",
                    host->text[0] != '\0' ? host->text : "(none)");
    } else if (synchronised != 1) {
        finding_set(finding, LEVEL_WARN, "run chrony or systemd-timesyncd",
                    "the clock is not synchronised: keys and certificates expire by it");
    } else {
        finding_set(finding, LEVEL_PASS, "", "clock source %.40s, synchronised", host->text);
    }
}

/* ------------------------------------------------------------------ devices */

static void tpm_check(struct host *host, struct finding *finding)
{
    struct stat facts;
    if (!host_exists(host, "/dev/tpmrm0", &facts)) {
        finding_set(finding, LEVEL_WARN,
                    "switch the TPM on in the firmware, or give the virtual machine one",
                    "no TPM: only the development TPM, which protects nothing");
        return;
    }
    long refused =
        probe(host, "tpm_access", access("/dev/tpmrm0", R_OK | W_OK) == 0 ? 0 : (long)errno);
    if (!says(host, "/sys/class/tpm/tpm0/tpm_version_major", "2")) {
        finding_set(finding, LEVEL_FAIL, "switch the firmware from TPM 1.2 to 2.0",
                    "/dev/tpmrm0 is not a TPM 2.0");
    } else if (refused != 0) {
        finding_set(finding, LEVEL_FAIL, "put the service's user into the group of /dev/tpmrm0",
                    "/dev/tpmrm0: %s", strerrordesc_np((int)refused));
    } else {
        finding_set(finding, LEVEL_PASS, "", "TPM 2.0 at /dev/tpmrm0");
    }
}

static void gpu_check(struct host *host, struct finding *finding)
{
    struct stat facts;
    bool node = host_exists(host, "/dev/nvidiactl", &facts) ||
                host_exists(host, "/proc/driver/nvidia/version", &facts);
    finding_set(finding, node ? LEVEL_WARN : LEVEL_PASS,
                node ? "nothing to do: this build has no CUDA backend and serves from the CPU" : "",
                node ? "an NVIDIA GPU that stays unused" : "no GPU: the CPU serves");
}

/* ------------------------------------------------------------------ the report */

static const struct {
    const char *name;
    void (*check)(struct host *host, struct finding *finding);
    enum cm_status status; /* of a failure */
} rows[] = {
    {"kernel", kernel_check, CM_E_SYSTEM},
    {"seccomp", seccomp_check, CM_E_SANDBOX},
    {"landlock", landlock_check, CM_E_SANDBOX},
    {"mdwe", mdwe_check, CM_E_SANDBOX},
    {"secret_memory", secret_memory_check, CM_E_SANDBOX},
    {"namespaces", namespaces_check, CM_E_SANDBOX},
    {"cgroup", cgroup_check, CM_E_SANDBOX},
    {"swap", swap_check, CM_E_SYSTEM},
    {"memlock", memlock_check, CM_E_SYSTEM},
    {"page_merging", ksm_check, CM_E_SYSTEM},
    {"huge_pages", huge_pages_check, CM_E_SYSTEM},
    {"cpu", cpu_check, CM_E_SYSTEM},
    {"microcode", microcode_check, CM_E_SYSTEM},
    {"vulnerabilities", vulnerabilities_check, CM_E_SYSTEM},
    {"clock", clock_check, CM_E_SYSTEM},
    {"tpm", tpm_check, CM_E_TPM},
    {"gpu", gpu_check, CM_E_DEVICE},
};
#define ROW_COUNT (sizeof(rows) / sizeof(rows[0]))

static const char *const level_words[] = {"pass", "warn", "FAIL"};

static void row_print(const char *name, const struct finding *finding)
{
    printf("%-4s  %-15s  %s\n", level_words[finding->level], name, finding->found);
    if (finding->next[0] != '\0') {
        printf("%-4s  %-15s  -> %s\n", "", "", finding->next);
    }
}

static json_t *row_json(const char *name, const struct finding *finding)
{
    static const char *const levels[] = {"pass", "warn", "fail"};
    return json_pack("{s:s, s:s, s:s, s:s}", "check", name, "level", levels[finding->level],
                     "found", finding->found, "next", finding->next);
}

enum cm_status command_doctor(struct words *words, struct cm_error *err)
{
    static struct host host;
    unsigned counts[3] = {0};
    enum cm_status worst = CM_OK;
    bool as_json = words_flag_take(words, "json");
    const char *root = words_value_take(words, "root");
    if (words->count != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "doctor does not know \"%.64s\"",
                            words->at[0]);
    }
    if (root != NULL && access(root, X_OK) != 0) {
        return cm_error_errno(err, errno, "CM-CLI-OPEN", "cannot look into --root %s", root);
    }
    host.root = root != NULL ? root : "";
    if (root != NULL && host_read(&host, "/probes")) {
        memcpy(host.probes, host.text, sizeof(host.probes));
    }
    json_t *list = json_array();
    for (size_t i = 0; i < ROW_COUNT; i++) {
        struct finding finding = {.next = ""};
        rows[i].check(&host, &finding);
        counts[finding.level]++;
        if (finding.level == LEVEL_FAIL && worst == CM_OK) {
            worst = cm_error_set(err, rows[i].status, "CM-CLI-DOCTOR", "%s: %s; %s", rows[i].name,
                                 finding.found, finding.next);
        }
        if (as_json) {
            json_array_append_new(list, row_json(rows[i].name, &finding));
        } else {
            row_print(rows[i].name, &finding);
        }
    }
    if (as_json) {
        json_t *report = json_pack("{s:b, s:i, s:i, s:i, s:O}", "ok", worst == CM_OK, "pass",
                                   (int)counts[LEVEL_PASS], "warn", (int)counts[LEVEL_WARN], "fail",
                                   (int)counts[LEVEL_FAIL], "checks", list);
        json_dumpf(report, stdout, JSON_INDENT(1));
        printf("\n");
        json_decref(report);
    } else {
        printf("%u pass, %u warn, %u fail\n", counts[LEVEL_PASS], counts[LEVEL_WARN],
               counts[LEVEL_FAIL]);
    }
    json_decref(list);
    return worst;
}
