/* Records of type 1326 (AUDIT_SECCOMP) in /dev/kmsg; the format is that of the kernel's
 * audit_seccomp(). No part of it comes from the process but its name, which stands after the pid.
 */
#include "sandbox/violation.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PATIENCE_MS 20
#define RECORDS_MAX 4096

int cm_violation_open(void)
{
    int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && lseek(fd, 0, SEEK_END) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static bool record_is(const char *record, pid_t pid, uint32_t *ret_call)
{
    int found;
    unsigned call;
    const char *head = strstr(record, "audit: type=1326 ");
    const char *who = head != NULL ? strstr(head, " pid=") : NULL;
    const char *what = who != NULL ? strstr(who, " syscall=") : NULL;
    if (what == NULL || sscanf(who, " pid=%d", &found) != 1 || found != pid ||
        strstr(who, " sig=31 ") == NULL || sscanf(what, " syscall=%u", &call) != 1) {
        return false;
    }
    *ret_call = call;
    return true;
}

bool cm_violation_find(int fd, pid_t pid, uint32_t *ret_call)
{
    char record[1024];
    struct pollfd more = {.fd = fd, .events = POLLIN};
    for (int i = 0; fd >= 0 && i < RECORDS_MAX; i++) {
        ssize_t got = read(fd, record, sizeof(record) - 1);
        if (got < 0 && poll(&more, 1, PATIENCE_MS) != 1) {
            return false;
        }
        record[got > 0 ? got : 0] = '\0';
        if (record_is(record, pid, ret_call)) {
            return true;
        }
    }
    return false;
}
