/* Making control groups on whatever generation is mounted. */
#include "sandbox/cgroup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>

enum hierarchy { UNIFIED, MEMORY, PIDS };

static bool word_in(const char *list, const char *word, const char *separators)
{
    size_t size = strlen(word);
    for (const char *at = list; *at != '\0'; at += strspn(at, separators)) {
        size_t part = strcspn(at, separators);
        if (part == size && memcmp(at, word, size) == 0) {
            return true;
        }
        at += part;
    }
    return false;
}

static bool put(const char *folder, const char *file, const char *text)
{
    char path[CM_CGROUP_PATH_BYTES + 64];
    snprintf(path, sizeof(path), "%s/%s", folder, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool good = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0) {
        close(fd);
    }
    return good;
}

static bool put_number(const char *folder, const char *file, uint64_t number)
{
    char text[24];
    snprintf(text, sizeof(text), "%llu", (unsigned long long)number);
    return put(folder, file, text);
}

/* Where our own process is in a hierarchy, as mounted: "" if it is not mounted or not ours. */
static void own_folder(const char *controller, char ret_folder[static CM_CGROUP_PATH_BYTES])
{
    char *line = NULL, mount[256] = "", path[256] = "";
    size_t size = 0;
    FILE *mounts = fopen("/proc/self/mounts", "re"), *own = fopen("/proc/self/cgroup", "re");
    while (mounts != NULL && getline(&line, &size, mounts) > 0) {
        char point[256], type[32], options[256];
        if (sscanf(line, "%*s %255s %31s %255s", point, type, options) == 3 &&
            (controller == NULL
                 ? strcmp(type, "cgroup2") == 0
                 : strcmp(type, "cgroup") == 0 && word_in(options, controller, ","))) {
            snprintf(mount, sizeof(mount), "%s", point);
        }
    }
    while (own != NULL && getline(&line, &size, own) > 0) {
        char *names = strchr(line, ':'), *rest = names != NULL ? strchr(names + 1, ':') : NULL;
        if (rest == NULL) {
            continue;
        }
        *rest++ = '\0';
        rest[strcspn(rest, "\n")] = '\0';
        if (controller == NULL ? names[1] == '\0' : word_in(names + 1, controller, ",")) {
            snprintf(path, sizeof(path), "%s", strcmp(rest, "/") == 0 ? "" : rest);
        }
    }
    if (mounts != NULL) {
        fclose(mounts);
    }
    if (own != NULL) {
        fclose(own);
    }
    free(line);
    snprintf(ret_folder, CM_CGROUP_PATH_BYTES, "%s%s", mount, mount[0] != '\0' ? path : "");
}

/* From a folder to the one above it. False: it was the last. */
static bool folder_up(char *folder)
{
    char *slash = strrchr(folder, '/');
    if (slash != NULL) {
        *slash = '\0';
    }
    return slash != NULL && folder[0] != '\0';
}

/* Up to two numbers of a group's file; returns how many there are. "max" is no number, and no
 * limit. */
static int numbers_read(const char *folder, const char *file, long long ret[2])
{
    char path[CM_CGROUP_PATH_BYTES + 64];
    snprintf(path, sizeof(path), "%s/%s", folder, file);
    FILE *in = fopen(path, "re");
    int count = in != NULL ? fscanf(in, "%lld %lld", &ret[0], &ret[1]) : 0;
    if (in != NULL) {
        fclose(in);
    }
    return count;
}

uint64_t cm_cgroup_least(const char *folder, const char *file)
{
    uint64_t least = UINT64_MAX;
    char at[CM_CGROUP_PATH_BYTES];
    snprintf(at, sizeof(at), "%s", folder);
    for (bool more = at[0] != '\0'; more; more = folder_up(at)) {
        long long numbers[2];
        if (numbers_read(at, file, numbers) >= 1 && (uint64_t)numbers[0] < least) {
            least = (uint64_t)numbers[0];
        }
    }
    return least;
}

/* A group's CPU time and the period that it is for, as either version writes them. */
static bool quota_read(const char *folder, long long *ret_quota, long long *ret_period)
{
    long long both[2], period[2];
    bool found = numbers_read(folder, "cpu.max", both) == 2;
    if (!found && numbers_read(folder, "cpu.cfs_quota_us", both) >= 1 &&
        numbers_read(folder, "cpu.cfs_period_us", period) >= 1) {
        both[1] = period[0];
        found = true;
    }
    if (found) {
        *ret_quota = both[0];
        *ret_period = both[1];
    }
    return found && both[0] > 0 && both[1] > 0; /* version 1 says -1 for none */
}

uint32_t cm_cgroup_least_cpus(const char *folder)
{
    uint32_t least = 0;
    char at[CM_CGROUP_PATH_BYTES];
    snprintf(at, sizeof(at), "%s", folder);
    for (bool more = at[0] != '\0'; more; more = folder_up(at)) {
        long long quota, period;
        if (quota_read(at, &quota, &period)) {
            const long long cpus = quota < period ? 1 : quota / period;
            least = least == 0 || cpus < least ? (uint32_t)cpus : least;
        }
    }
    return least;
}

uint32_t cm_cgroup_cpus(void)
{
    char folder[CM_CGROUP_PATH_BYTES];
    own_folder(NULL, folder);
    uint32_t unified = cm_cgroup_least_cpus(folder);
    own_folder("cpu", folder);
    uint32_t first = cm_cgroup_least_cpus(folder);
    return unified == 0 || (first != 0 && first < unified) ? first : unified;
}

uint64_t cm_cgroup_memory_limit(void)
{
    struct sysinfo facts;
    char folder[CM_CGROUP_PATH_BYTES];
    uint64_t least = sysinfo(&facts) == 0 ? (uint64_t)facts.totalram * facts.mem_unit : UINT64_MAX;
    own_folder(NULL, folder);
    uint64_t unified = cm_cgroup_least(folder, "memory.max");
    own_folder("memory", folder);
    uint64_t first = cm_cgroup_least(folder, "memory.limit_in_bytes");
    least = unified < least ? unified : least;
    return first < least ? first : least;
}

static bool controllers_have(const char *folder, const char *word)
{
    char path[CM_CGROUP_PATH_BYTES + 32], text[256] = "";
    snprintf(path, sizeof(path), "%s/cgroup.controllers", folder);
    FILE *file = fopen(path, "re");
    bool read = file != NULL && fgets(text, sizeof(text), file) != NULL;
    if (file != NULL) {
        fclose(file);
    }
    return read && word_in(text, word, " \n");
}

/* A group with processes of its own cannot hand controllers down: we move into a leaf first. */
static void unified_delegate(const char *own)
{
    char leaf[CM_CGROUP_PATH_BYTES + 32];
    if (!controllers_have(own, "memory") && !controllers_have(own, "pids")) {
        return;
    }
    snprintf(leaf, sizeof(leaf), "%s/casemate-supervisor", own);
    if ((mkdir(leaf, 0755) == 0 || errno == EEXIST) && put(leaf, "cgroup.procs", "0")) {
        (void)put(own, "cgroup.subtree_control", "+memory");
        (void)put(own, "cgroup.subtree_control", "+pids");
    }
}

static void service_folder(enum hierarchy which, struct cm_cgroups *groups)
{
    static const char *const controllers[] = {NULL, "memory", "pids"};
    char own[CM_CGROUP_PATH_BYTES];
    char *folder = groups->folders[which];
    own_folder(controllers[which], own);
    if (own[0] == '\0' || strlen(own) + 64 >= CM_CGROUP_PATH_BYTES) {
        return;
    }
    if (which == UNIFIED) {
        unified_delegate(own);
    }
    snprintf(folder, CM_CGROUP_PATH_BYTES, "%.440s/casemate-%d", own, (int)getpid());
    if (mkdir(folder, 0755) != 0) {
        folder[0] = '\0';
    } else if (which == UNIFIED) {
        (void)put(folder, "cgroup.subtree_control", "+memory");
        (void)put(folder, "cgroup.subtree_control", "+pids");
    }
}

static int file_open(const char *folder, const char *file, int flags)
{
    char path[CM_CGROUP_PATH_BYTES + 96];
    snprintf(path, sizeof(path), "%s/%s", folder, file);
    return open(path, flags | O_CLOEXEC);
}

static void group_unified(const char *path, const struct cm_cgroup_limits *limits,
                          struct cm_cgroup *group)
{
    group->born_fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    group->memory = put_number(path, "memory.max", limits->memory_bytes);
    group->swap = put(path, "memory.swap.max", "0");
    group->processes = put_number(path, "pids.max", limits->processes);
    (void)put(path, "memory.oom.group", "1");
    if (group->memory) {
        group->oom_fd = file_open(path, "memory.events", O_RDONLY);
    }
}

static void group_memory(const char *path, const struct cm_cgroup_limits *limits,
                         struct cm_cgroup *group)
{
    if (group->memory) {
        return; /* version 2 does it */
    }
    group->join_fds[0] = file_open(path, "cgroup.procs", O_WRONLY);
    group->memory =
        group->join_fds[0] >= 0 && put_number(path, "memory.limit_in_bytes", limits->memory_bytes);
    (void)put(path, "memory.swappiness", "0");
    group->swap = put_number(path, "memory.memsw.limit_in_bytes", limits->memory_bytes);
    if (group->memory) {
        group->oom_fd = file_open(path, "memory.oom_control", O_RDONLY);
    }
}

static void group_pids(const char *path, const struct cm_cgroup_limits *limits,
                       struct cm_cgroup *group)
{
    if (!group->processes) {
        group->join_fds[1] = file_open(path, "cgroup.procs", O_WRONLY);
        group->processes =
            group->join_fds[1] >= 0 && put_number(path, "pids.max", limits->processes);
    }
}

void cm_cgroups_make(const struct cm_cgroup_limits *limits, uint32_t count,
                     struct cm_cgroups *ret_groups)
{
    static void (*const makers[])(const char *, const struct cm_cgroup_limits *,
                                  struct cm_cgroup *) = {group_unified, group_memory, group_pids};
    bool memory = true, processes = true;
    memset(ret_groups, 0, sizeof(*ret_groups));
    ret_groups->count = count;
    for (uint32_t i = 0; i < count; i++) {
        struct cm_cgroup *group = &ret_groups->groups[i];
        *group = (struct cm_cgroup){.born_fd = -1, .join_fds = {-1, -1, -1}, .oom_fd = -1};
        snprintf(ret_groups->names[i], sizeof(ret_groups->names[i]), "%s", limits[i].name);
    }
    for (int which = UNIFIED; which <= PIDS; which++) {
        service_folder((enum hierarchy)which, ret_groups);
        for (uint32_t i = 0; i < count && ret_groups->folders[which][0] != '\0'; i++) {
            char path[CM_CGROUP_PATH_BYTES + 40];
            snprintf(path, sizeof(path), "%s/%s", ret_groups->folders[which], limits[i].name);
            if (mkdir(path, 0755) == 0) {
                makers[which](path, &limits[i], &ret_groups->groups[i]);
            }
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        memory = memory && ret_groups->groups[i].memory;
        processes = processes && ret_groups->groups[i].processes;
    }
    snprintf(ret_groups->lacks, sizeof(ret_groups->lacks), "%s%s%s",
             memory ? "" : "memory is not bounded by a control group",
             memory || processes ? "" : "; ",
             processes ? "" : "processes are not bounded by a control group");
}

uint64_t cm_cgroup_oom_kills(const struct cm_cgroup *group)
{
    char text[512];
    unsigned long long kills = 0;
    if (group->oom_fd < 0) {
        return 0;
    }
    ssize_t got = pread(group->oom_fd, text, sizeof(text) - 1, 0);
    text[got > 0 ? got : 0] = '\0';
    const char *line = strstr(text, "oom_kill ");
    return line != NULL && sscanf(line, "oom_kill %llu", &kills) == 1 ? kills : 0;
}

bool cm_cgroups_remove(const struct cm_cgroups *groups)
{
    bool good = true;
    for (int which = UNIFIED; which <= PIDS; which++) {
        char path[CM_CGROUP_PATH_BYTES + 40];
        for (uint32_t i = 0; i < groups->count && groups->folders[which][0] != '\0'; i++) {
            snprintf(path, sizeof(path), "%s/%s", groups->folders[which], groups->names[i]);
            good = (rmdir(path) == 0 || errno == ENOENT) && good;
        }
        if (groups->folders[which][0] != '\0') {
            good = (rmdir(groups->folders[which]) == 0 || errno == ENOENT) && good;
        }
    }
    return good;
}

void cm_cgroups_close(struct cm_cgroups *groups)
{
    for (uint32_t i = 0; i < groups->count; i++) {
        struct cm_cgroup *group = &groups->groups[i];
        const int fds[] = {group->born_fd, group->join_fds[0], group->join_fds[1],
                           group->join_fds[2], group->oom_fd};
        for (size_t k = 0; k < sizeof(fds) / sizeof(fds[0]); k++) {
            if (fds[k] >= 0) {
                close(fds[k]);
            }
        }
    }
    groups->count = 0;
}
