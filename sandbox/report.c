/* Reading /proc/PID. */
#include "sandbox/report.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define TEXT_BYTES 8192

static bool text_read(pid_t pid, const char *name, char ret_text[static TEXT_BYTES])
{
    char path[64];
    size_t used = 0;
    ssize_t got = 1;
    snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && got > 0 && used < TEXT_BYTES - 1) {
        got = read(fd, ret_text + used, TEXT_BYTES - 1 - used);
        used += got > 0 ? (size_t)got : 0;
    }
    if (fd >= 0) {
        close(fd);
    }
    ret_text[used] = '\0';
    return used > 0;
}

/* The rest of the line that begins with this word; NULL if there is none. */
static const char *line_of(const char *text, const char *word)
{
    size_t size = strlen(word);
    while (text != NULL && strncmp(text, word, size) != 0) {
        text = strchr(text, '\n');
        text = text != NULL ? text + 1 : NULL;
    }
    return text != NULL ? text + size : NULL;
}

static uint64_t number_of(const char *text, const char *word, int base)
{
    const char *line = line_of(text, word);
    return line != NULL ? strtoull(line, NULL, base) : UINT64_MAX;
}

/* Another namespace than ours? -1: it cannot be told. */
static int namespace_differs(pid_t pid, const char *name)
{
    char path[64];
    struct stat own, other;
    snprintf(path, sizeof(path), "/proc/self/ns/%s", name);
    if (stat(path, &own) != 0) {
        return -1;
    }
    snprintf(path, sizeof(path), "/proc/%d/ns/%s", (int)pid, name);
    return stat(path, &other) != 0 ? -1 : own.st_ino != other.st_ino;
}

static void note(struct cm_observed *seen, enum cm_confine_layer layer, int holds)
{
    seen->readable |= holds >= 0 ? CM_LAYER_BIT(layer) : 0;
    seen->layers |= holds > 0 ? CM_LAYER_BIT(layer) : 0;
}

static void status_observe(pid_t pid, uint32_t filters_least, struct cm_observed *seen)
{
    static const char *const sets[] = {"CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"};
    char text[TEXT_BYTES];
    uint64_t capabilities = 0;
    if (!text_read(pid, "status", text)) {
        return;
    }
    for (size_t i = 0; i < sizeof(sets) / sizeof(sets[0]); i++) {
        capabilities |= i == 3 && getauxval(AT_EUID) != 0 ? 0 : number_of(text, sets[i], 16);
    }
    seen->uid = (uint32_t)number_of(text, "Uid:", 10);
    seen->filters = (uint32_t)number_of(text, "Seccomp_filters:", 10);
    note(seen, CM_LAYER_CAPABILITIES, capabilities == 0);
    note(seen, CM_LAYER_IDENTITY, seen->uid != getauxval(AT_EUID) && seen->uid != 0);
    note(seen, CM_LAYER_NO_NEW, number_of(text, "NoNewPrivs:", 10) == 1);
    note(seen, CM_LAYER_FILTER,
         number_of(text, "Seccomp:", 10) == 2 && seen->filters >= filters_least);
}

/* "Max core file size   0   0   bytes": the hard limit. */
static uint64_t limit_of(const char *text, const char *name)
{
    const char *line = line_of(text, name);
    char soft[32], hard[32];
    if (line == NULL || sscanf(line, "%31s %31s", soft, hard) != 2) {
        return UINT64_MAX;
    }
    return strcmp(hard, "unlimited") == 0 ? UINT64_MAX : strtoull(hard, NULL, 10);
}

static void limits_observe(pid_t pid, struct cm_observed *seen)
{
    char text[TEXT_BYTES];
    if (!text_read(pid, "limits", text)) {
        return;
    }
    uint64_t data = limit_of(text, "Max data size");
    uint64_t addresses = limit_of(text, "Max address space");
    seen->core_bytes = limit_of(text, "Max core file size");
    seen->file_bytes = limit_of(text, "Max file size");
    seen->files = limit_of(text, "Max open files");
    seen->memory_bytes = data < addresses ? data : addresses;
    note(seen, CM_LAYER_LIMITS,
         seen->core_bytes == 0 && seen->file_bytes != UINT64_MAX &&
             limit_of(text, "Max msgqueue size") == 0 && (seen->memory_bytes != UINT64_MAX));
}

static void group_observe(pid_t pid, const char *group, struct cm_observed *seen)
{
    char text[TEXT_BYTES], tail[64];
    bool found = false;
    if (!text_read(pid, "cgroup", text)) {
        return;
    }
    snprintf(tail, sizeof(tail), "/%s", group);
    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        size_t size = strlen(line);
        found = found || (strstr(line, "/casemate-") != NULL && size > strlen(tail) &&
                          strcmp(line + size - strlen(tail), tail) == 0);
    }
    note(seen, CM_LAYER_CGROUP, found);
}

void cm_observe(pid_t pid, const char *group, struct cm_observed *ret_observed)
{
    struct cm_observed seen = {.layers = 0};
    const int ipc = namespace_differs(pid, "ipc"), uts = namespace_differs(pid, "uts");
    note(&seen, CM_LAYER_USER_NS, namespace_differs(pid, "user"));
    note(&seen, CM_LAYER_PID_NS, namespace_differs(pid, "pid"));
    note(&seen, CM_LAYER_NET_NS, namespace_differs(pid, "net"));
    note(&seen, CM_LAYER_OTHER_NS, ipc < 0 || uts < 0 ? -1 : ipc > 0 && uts > 0);
    /* A role has two, one over the other; the supervisor has one. */
    status_observe(pid, strcmp(group, "supervisor") == 0 ? 1 : 2, &seen);
    limits_observe(pid, &seen);
    group_observe(pid, group, &seen);
    /* An empty root: nothing but itself is mounted. */
    char text[TEXT_BYTES];
    if (text_read(pid, "mountinfo", text)) {
        const char *first = strchr(text, '\n');
        const int own = namespace_differs(pid, "mnt");
        note(&seen, CM_LAYER_ROOT,
             own < 0
                 ? -1
                 : own > 0 && first != NULL && first[1] == '\0' && strstr(text, " / / ro") != NULL);
    }
    *ret_observed = seen;
}

/* ------------------------------------------------------------------ filters, out of the kernel */

#ifndef PTRACE_SECCOMP_GET_FILTER
#define PTRACE_SECCOMP_GET_FILTER 0x420c
#endif

static void calls_narrow(struct cm_bpf filter, struct cm_call_set *calls)
{
    calls->count = 0;
    for (uint32_t number = 0; number < CM_CALLS_MAX; number++) {
        calls->allowed[number] = calls->allowed[number] && cm_bpf_may_allow(filter, number);
        calls->count += calls->allowed[number];
    }
}

bool cm_calls_read(pid_t pid, struct cm_call_set *ret_calls)
{
    static struct sock_filter code[BPF_MAXINSNS];
    uintptr_t filters = 0;
    int status;
    if (ptrace(PTRACE_SEIZE, pid, NULL, NULL) != 0) {
        return false;
    }
    bool stopped = ptrace(PTRACE_INTERRUPT, pid, NULL, NULL) == 0 &&
                   waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status);
    memset(ret_calls->allowed, true, sizeof(ret_calls->allowed));
    while (stopped) {
        long lines = ptrace(PTRACE_SECCOMP_GET_FILTER, pid, (void *)filters, code);
        if (lines <= 0) {
            break;
        }
        filters++;
        calls_narrow((struct cm_bpf){code, (uint32_t)lines}, ret_calls);
    }
    if (stopped) {
        ptrace(PTRACE_DETACH, pid, NULL, NULL);
    }
    return filters > 0;
}
