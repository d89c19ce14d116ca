/* Reading policy texts, and deciding by them. */
#include "sandbox/compile/policy.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/futex.h>
#include <sched.h>
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "runtime/base/frame.h"

#define X32_BIT 0x40000000

struct constant {
    const char *name;
    uint64_t value;
};

/* clang-format off */
static const struct constant constants[] = {
    {"PROT_EXEC", PROT_EXEC}, {"F_GETFL", F_GETFL}, {"F_SETFL", F_SETFL}, {"F_GETFD", F_GETFD},
    {"F_SETFD", F_SETFD}, {"F_ADD_SEALS", F_ADD_SEALS}, {"F_GET_SEALS", F_GET_SEALS}, {"F_DUPFD_CLOEXEC", F_DUPFD_CLOEXEC},
    {"FUTEX_WAIT_PRIVATE", FUTEX_WAIT_PRIVATE}, {"FUTEX_WAKE_PRIVATE", FUTEX_WAKE_PRIVATE},
    {"FUTEX_WAIT_BITSET_ANY", FUTEX_WAIT_BITSET_PRIVATE | FUTEX_CLOCK_REALTIME},
    {"FUTEX_WAIT_JOIN", FUTEX_WAIT_BITSET | FUTEX_CLOCK_REALTIME},
    {"MADV_DONTNEED", MADV_DONTNEED}, {"MADV_DONTDUMP", MADV_DONTDUMP}, {"MADV_WIPEONFORK", MADV_WIPEONFORK},
    {"MADV_HUGEPAGE", MADV_HUGEPAGE}, {"MADV_POPULATE_WRITE", 23}, {"MREMAP_MAYMOVE", MREMAP_MAYMOVE},
    {"MFD_CLOEXEC", MFD_CLOEXEC}, {"MFD_ALLOW_SEALING", MFD_ALLOW_SEALING}, {"MFD_EXEC", 0x10},
    {"P_PIDFD", P_PIDFD}, {"SIGKILL", 9}, {"SIGTERM", 15},
    {"MSG_NOSIGNAL", MSG_NOSIGNAL}, {"MSG_DONTWAIT", MSG_DONTWAIT}, {"MSG_PEEK", MSG_PEEK}, {"MSG_CMSG_CLOEXEC", MSG_CMSG_CLOEXEC},
    {"SOCK_CLOEXEC", SOCK_CLOEXEC}, {"SOCK_NONBLOCK", SOCK_NONBLOCK}, {"SOCK_SEQPACKET", SOCK_SEQPACKET},
    {"AF_UNIX", AF_UNIX}, {"SOL_SOCKET", SOL_SOCKET}, {"SO_ERROR", SO_ERROR}, {"SEEK_SET", 0}, {"SEEK_END", 2},
    {"O_CLOEXEC", O_CLOEXEC}, {"O_NONBLOCK", O_NONBLOCK}, {"O_ACCMODE_CREAT", O_ACCMODE | O_CREAT},
    {"CLONE_THREAD_FLAGS", CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
        CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID},
    {"FD_CONTROL", CM_FD_CONTROL}, {"FD_LOG", CM_FD_LOG}, {"FD_INPUT", CM_FD_INPUT}, {"FD_TPM", CM_FD_TPM},
    {"PR_SET_VMA", 0x53564d41},
    {"SECCOMP_SET_MODE_FILTER", 1}, {"EACCES", EACCES}, {"ENOSYS", ENOSYS}, {"ENOENT", ENOENT}, {"EPERM", EPERM}, {"ENOMEM", ENOMEM},
};
/* clang-format on */

static bool value_word(const char *word, size_t size, uint64_t *ret_value)
{
    char text[64], *end;
    if (size == 0 || size >= sizeof(text)) {
        return false;
    }
    memcpy(text, word, size);
    text[size] = '\0';
    if (isdigit((unsigned char)text[0])) {
        errno = 0;
        *ret_value = strtoull(text, &end, 0);
        return *end == '\0' && errno == 0;
    }
    for (size_t i = 0; i < sizeof(constants) / sizeof(constants[0]); i++) {
        if (strcmp(constants[i].name, text) == 0) {
            *ret_value = constants[i].value;
            return true;
        }
    }
    return false;
}

/* words joined by '|' */
static bool value_parse(const char *text, uint64_t *ret_value)
{
    uint64_t all = 0, one;
    for (;;) {
        size_t size = strcspn(text, "|");
        if (!value_word(text, size, &one)) {
            return false;
        }
        all |= one;
        if (text[size] == '\0') {
            *ret_value = all;
            return true;
        }
        text += size + 1;
    }
}

/* "a2 == V" or "a2 & M == V" */
static bool condition_parse(char *text, struct policy_condition *ret_condition)
{
    char *words[5], *save = NULL;
    size_t count = 0;
    for (char *word = strtok_r(text, " \t", &save); word != NULL && count < 5;
         word = strtok_r(NULL, " \t", &save)) {
        words[count++] = word;
    }
    bool masked = count == 5 && strcmp(words[1], "&") == 0 && strcmp(words[3], "==") == 0;
    bool plain = count == 3 && strcmp(words[1], "==") == 0;
    if ((!masked && !plain) || words[0][0] != 'a' || words[0][1] < '0' || words[0][1] > '5' ||
        words[0][2] != '\0') {
        return false;
    }
    ret_condition->argument = (uint32_t)(words[0][1] - '0');
    ret_condition->mask = UINT64_MAX;
    return value_parse(words[count - 1], &ret_condition->value) &&
           (plain || value_parse(words[2], &ret_condition->mask)) &&
           (ret_condition->value & ~ret_condition->mask) == 0;
}

static char *trim(char *text)
{
    while (isspace((unsigned char)*text)) {
        text++;
    }
    for (size_t size = strlen(text); size > 0 && isspace((unsigned char)text[size - 1]);) {
        text[--size] = '\0';
    }
    return text;
}

static const char *conditions_parse(char *text, struct policy_rule *rule)
{
    char *save = NULL;
    snprintf(rule->condition_text, sizeof(rule->condition_text), "%s", text);
    for (char *part = strtok_r(text, ",", &save); part != NULL; part = strtok_r(NULL, ",", &save)) {
        if (rule->condition_count == POLICY_CONDITIONS_MAX) {
            return "too many conditions";
        }
        if (!condition_parse(part, &rule->conditions[rule->condition_count++])) {
            return "a condition is `aN == VALUE` or `aN & MASK == VALUE`";
        }
    }
    return NULL;
}

/* NULL, or what is wrong with the line. */
static const char *rule_parse(char *line, struct policy_rule *rule)
{
    uint64_t error_number = 0;
    char *reason = strstr(line, " : ");
    char *arrow = strstr(line, "->");
    if (reason == NULL || trim(reason + 3)[0] == '\0') {
        return "a rule ends with ` : reason`";
    }
    *reason = '\0';
    reason = trim(reason + 3);
    if (arrow != NULL && arrow < reason) {
        *arrow = '\0';
        if (!value_parse(trim(arrow + 2), &error_number) || error_number == 0 ||
            error_number > 4095) {
            return "an errno follows ->";
        }
    }
    line = trim(line);
    size_t size = strcspn(line, " \t");
    if (size == 0 || size >= sizeof(rule->name) || strlen(reason) >= sizeof(rule->reason)) {
        return "name or reason is empty or too long";
    }
    memcpy(rule->name, line, size);
    memcpy(rule->reason, reason, strlen(reason) + 1);
    rule->error_number = (uint32_t)error_number;
    rule->number = seccomp_syscall_resolve_name_arch(SCMP_ARCH_X86_64, rule->name);
    if (rule->number < 0) {
        return "no such system call on x86-64";
    }
    return conditions_parse(trim(line + size), rule);
}

enum cm_status policy_parse(const char *name, const char *text, struct policy *ret_policy,
                            struct cm_error *err)
{
    memset(ret_policy, 0, sizeof(*ret_policy));
    snprintf(ret_policy->name, sizeof(ret_policy->name), "%s", name);
    for (uint32_t number = 1; *text != '\0'; number++) {
        char line[512];
        size_t size = strcspn(text, "\n");
        const char *fault = size >= sizeof(line) ? "line too long" : NULL;
        if (fault == NULL) {
            memcpy(line, text, size);
            line[size] = '\0';
            char *rule = trim(line);
            if (rule[0] != '\0' && rule[0] != '#') {
                fault = ret_policy->count == POLICY_RULES_MAX
                            ? "too many rules"
                            : rule_parse(rule, &ret_policy->rules[ret_policy->count++]);
            }
        }
        if (fault != NULL) {
            return cm_error_set(err, CM_E_CONFIG, "CM-SANDBOX-POLICY", "%s:%u: %s", name, number,
                                fault);
        }
        text += size + (text[size] == '\n');
    }
    return CM_OK;
}

static bool rule_matches(const struct policy_rule *rule, const struct seccomp_data *data)
{
    if (rule->number != data->nr) {
        return false;
    }
    for (uint32_t i = 0; i < rule->condition_count; i++) {
        const struct policy_condition *condition = &rule->conditions[i];
        if ((data->args[condition->argument] & condition->mask) != condition->value) {
            return false;
        }
    }
    return true;
}

uint32_t policy_decide(const struct policy *policy, const struct seccomp_data *data)
{
    if (data->arch != AUDIT_ARCH_X86_64 || (uint32_t)data->nr >= X32_BIT) {
        return SECCOMP_RET_KILL_PROCESS;
    }
    for (uint32_t i = 0; i < policy->count; i++) {
        if (rule_matches(&policy->rules[i], data)) {
            uint32_t error_number = policy->rules[i].error_number;
            return error_number == 0 ? SECCOMP_RET_ALLOW : SECCOMP_RET_ERRNO | error_number;
        }
    }
    return SECCOMP_RET_KILL_PROCESS;
}

uint32_t policy_calls(const struct policy *policy)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < policy->count; i++) {
        bool first = policy->rules[i].error_number == 0;
        for (uint32_t k = 0; first && k < i; k++) {
            first = policy->rules[k].number != policy->rules[i].number ||
                    policy->rules[k].error_number != 0;
        }
        count += first;
    }
    return count;
}

const char *policy_call_name(int number)
{
    static char name[POLICY_NAME_BYTES];
    char *found = seccomp_syscall_resolve_num_arch(SCMP_ARCH_X86_64, number);
    if (found == NULL) {
        return NULL;
    }
    snprintf(name, sizeof(name), "%s", found);
    free(found);
    return name;
}

static void fault(const char *path, const char *what)
{
    fprintf(stderr, "%s: %s\n", path, what);
    exit(1);
}

/* Append a file to *text, its includes in their places. */
static void text_append(const char *path, char *text, size_t size, uint32_t depth)
{
    char line[512], other[512];
    FILE *file = fopen(path, "re");
    const char *slash = strrchr(path, '/');
    int folder = slash != NULL ? (int)(slash - path) + 1 : 0;
    if (file == NULL || depth > 2) {
        fault(path, file == NULL ? strerror(errno) : "includes too deep");
    }
    while (fgets(line, sizeof(line), file) != NULL) {
        if (strncmp(line, "include ", 8) == 0) {
            snprintf(other, sizeof(other), "%.*s%.64s.policy", folder, path, trim(line + 8));
            text_append(other, text, size, depth + 1);
        } else if (strlen(text) + strlen(line) >= size) {
            fault(path, "too long");
        } else {
            memcpy(text + strlen(text), line, strlen(line) + 1);
        }
    }
    fclose(file);
}

void policy_load(const char *path, struct policy *ret_policy)
{
    static char text[65536];
    char name[POLICY_NAME_BYTES];
    struct cm_error err;
    const char *base = strrchr(path, '/') != NULL ? strrchr(path, '/') + 1 : path;
    snprintf(name, sizeof(name), "%.*s", (int)strcspn(base, "."), base);
    text[0] = '\0';
    text_append(path, text, sizeof(text), 0);
    if (policy_parse(name, text, ret_policy, &err) != CM_OK) {
        fault(path, err.text);
    }
}
