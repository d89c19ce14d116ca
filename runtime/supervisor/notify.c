/* What a service manager is told, by the documented protocol of sd_notify(3): datagrams of
 * "NAME=value" lines to the socket that NOTIFY_SOCKET names. Written here because it is these few
 * lines: libsystemd would bring its own libraries into the one process that holds every
 * descriptor, and into what is measured. Without the variable all of it does nothing. */
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

#define EXTEND_EVERY_MS 5000u
#define EXTEND_BY_US    "30000000"
#define UNREAPED_MS     10000u /* killed for so long, and still not gone: the kernel holds it */

static void notify_send(const struct notify *notify, const char *text)
{
    struct iovec part = {(void *)text, strlen(text)};
    const struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (notify->fd >= 0) {
        /* A manager that cannot be told is not our fault to end for. */
        ssize_t sent = sendmsg(notify->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        (void)sent;
    }
}

/* Only where it is meant for this process. */
static uint64_t watchdog_ms(void)
{
    const char *pid = getenv("WATCHDOG_PID");
    const char *us = getenv("WATCHDOG_USEC");
    bool ours = pid == NULL || strtol(pid, NULL, 10) == (long)getpid();
    return us != NULL && ours ? strtoull(us, NULL, 10) / 1000 : 0;
}

void notify_open(struct notify *notify, const struct cm_log *log)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    *notify = (struct notify){.fd = -1, .watchdog_ms = watchdog_ms()};
    size_t size = path != NULL ? strlen(path) : 0;
    if (size == 0) {
        return;
    }
    if ((path[0] != '/' && path[0] != '@') || size >= sizeof(address.sun_path)) {
        CM_LOG(log, CM_LOG_WARN, "notify_refused", CM_LOG_S("socket", path));
        return;
    }
    memcpy(address.sun_path, path, size);
    if (path[0] == '@') {
        address.sun_path[0] = '\0'; /* the abstract namespace */
    }
    notify->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (notify->fd < 0 ||
        connect(notify->fd, (const struct sockaddr *)&address,
                (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size)) != 0) {
        CM_LOG(log, CM_LOG_WARN, "notify_refused", CM_LOG_S("socket", path),
               CM_LOG_S("text", strerrordesc_np(errno)));
        notify_close(notify);
    }
}

void notify_close(struct notify *notify)
{
    if (notify->fd >= 0) {
        close(notify->fd);
    }
    notify->fd = -1;
}

/* One line for people: what `systemctl status` shows. */
static void status_text(const struct service *service, char *out, size_t size)
{
    static const char *const stages[CM_LOAD_STAGE_COUNT] = {
        [CM_LOAD_START] = "waiting for the worker",
        [CM_LOAD_UNSEAL] = "unsealing the key",
        [CM_LOAD_HEAD] = "reading the package's head",
        [CM_LOAD_RESERVE] = "reserving memory",
        [CM_LOAD_WEIGHTS] = "loading weights",
        [CM_LOAD_BIND] = "binding the model",
        [CM_LOAD_READY] = "loaded"};
    const struct cm_progress *load = &service->state.load;
    uint32_t restarts = 0;
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        restarts += service->children[i].restarts;
    }
    if (service->end.status != CM_OK) {
        snprintf(out, size, "ending: %s: %.200s", service->end.id, service->end.text);
    } else if (service->state.ready == 1) {
        snprintf(out, size, "ready on https://%s, %u role restarts", service->address, restarts);
    } else if (service->phase == SERVICE_RUN && load->stage < CM_LOAD_READY) {
        snprintf(out, size, "%s: %s, %llu of %llu MiB, %u role restarts", service->state.reason,
                 stages[load->stage], (unsigned long long)(load->bytes_done >> 20),
                 (unsigned long long)(load->bytes_total >> 20), restarts);
    } else {
        snprintf(out, size, "not ready: %s, %u role restarts", service->state.reason, restarts);
    }
}

/* Every wait of the loop has its own deadline; what is left is a child that the kernel cannot end.
 */
static bool stuck(const struct service *service, uint64_t now)
{
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        const struct child *child = &service->children[i];
        if (child->state == CHILD_KILLED && now - child->killed_ms >= UNREAPED_MS) {
            return true;
        }
    }
    return false;
}

static void status_tell(struct service *service)
{
    struct notify *notify = &service->notify;
    char text[320], line[400];
    status_text(service, text, sizeof(text));
    if (strcmp(text, notify->status) != 0) {
        snprintf(notify->status, sizeof(notify->status), "%s", text);
        snprintf(line, sizeof(line), "STATUS=%s", text);
        notify_send(notify, line);
    }
}

void notify_tick(struct service *service, uint64_t now)
{
    struct notify *notify = &service->notify;
    if (notify->fd < 0) {
        return;
    }
    status_tell(service);
    if (service->state.ready == 1 && !notify->ready) {
        notify->ready = true;
        notify_send(notify, "READY=1");
    }
    if (service->phase != SERVICE_RUN && !notify->stopping) {
        notify->stopping = true;
        notify_send(notify, "STOPPING=1");
    }
    if (stuck(service, now)) {
        return; /* the manager's patience ends, and it sees to the rest */
    }
    if (!notify->ready && service->phase == SERVICE_RUN &&
        now - notify->extended_ms >= EXTEND_EVERY_MS) {
        notify->extended_ms = now;
        notify_send(notify, "EXTEND_TIMEOUT_USEC=" EXTEND_BY_US);
    }
    if (notify->watchdog_ms != 0 && now - notify->petted_ms >= notify->watchdog_ms / 3) {
        notify->petted_ms = now;
        notify_send(notify, "WATCHDOG=1");
    }
}
