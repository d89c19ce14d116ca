/* What a service manager is told: sd_notify(3), against a socket of our own. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

static struct service service;
static struct cm_configuration configuration;
static int manager;

static void manager_open(const char *variable, const char *bound, size_t size)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, bound, size);
    manager = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    cr_assert_eq(bind(manager, (struct sockaddr *)&address,
                      (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size)),
                 0);
    memset(&service, 0, sizeof(service));
    service.log = (struct cm_log){STDERR_FILENO, "supervisor", CM_LOG_ERROR};
    service.configuration = &configuration;
    service.state.load.stage = CM_LOAD_WEIGHTS;
    service.state.load.bytes_done = 3 << 20;
    service.state.load.bytes_total = 9 << 20;
    snprintf(service.state.reason, sizeof(service.state.reason), "loading");
    setenv("NOTIFY_SOCKET", variable, 1);
    notify_open(&service.notify, &service.log);
    cr_assert_geq(service.notify.fd, 0);
}

/* All that was told, "|" after each; static. */
static const char *told(void)
{
    static char all[4096];
    size_t used = 0;
    ssize_t got;
    all[0] = '\0';
    while ((got = recv(manager, all + used, sizeof(all) - used - 2, 0)) > 0) {
        used += (size_t)got;
        all[used++] = '|';
        all[used] = '\0';
    }
    return all;
}

Test(supervisor_notify, start_ready_stop)
{
    char name[64];
    size_t size = (size_t)snprintf(name, sizeof(name), "@casemate-notify-%d", (int)getpid());
    char bound[64];
    memcpy(bound, name, size);
    bound[0] = '\0'; /* the abstract namespace */
    unsetenv("WATCHDOG_USEC");
    manager_open(name, bound, size);
    notify_tick(&service, 10000);
    cr_assert_str_eq(told(), "STATUS=loading: loading weights, 3 of 9 MiB, 0 role restarts|"
                             "EXTEND_TIMEOUT_USEC=30000000|");
    notify_tick(&service, 12000);
    cr_assert_str_eq(told(), "", "nothing new, nothing said");
    notify_tick(&service, 15000);
    cr_assert_str_eq(told(), "EXTEND_TIMEOUT_USEC=30000000|");
    service.state.ready = 1;
    snprintf(service.address, sizeof(service.address), "127.0.0.1:1");
    notify_tick(&service, 16000);
    cr_assert_str_eq(told(), "STATUS=ready on https://127.0.0.1:1, 0 role restarts|READY=1|");
    service.state.ready = 0;
    notify_tick(&service, 60000);
    service.state.ready = 1;
    notify_tick(&service, 61000);
    cr_assert_null(strstr(told(), "READY"), "once");
    service.phase = SERVICE_STOP;
    cm_error_set(&service.end, CM_E_TPM, "CM-SUP-TPM-GONE", "gone");
    notify_tick(&service, 62000);
    cr_assert_str_eq(told(), "STATUS=ending: CM-SUP-TPM-GONE: gone|STOPPING=1|");
    notify_close(&service.notify);
}

Test(supervisor_notify, the_watchdog_is_petted_only_while_nothing_is_beyond_killing)
{
    char path[64] = "/tmp/casemate-notify-XXXXXX";
    cr_assert_not_null(mkdtemp(path));
    strcat(path, "/socket");
    setenv("WATCHDOG_USEC", "3000000", 1);
    setenv("WATCHDOG_PID", "1", 1);
    manager_open(path, path, strlen(path));
    cr_assert_eq(service.notify.watchdog_ms, 0u, "meant for another process");
    notify_close(&service.notify);
    char pid[16];
    snprintf(pid, sizeof(pid), "%d", (int)getpid());
    setenv("WATCHDOG_PID", pid, 1);
    notify_open(&service.notify, &service.log);
    service.notify.ready = true;
    notify_tick(&service, 10000);
    cr_assert(strstr(told(), "WATCHDOG=1|"));
    notify_tick(&service, 10900);
    cr_assert_null(strstr(told(), "WATCHDOG"));
    notify_tick(&service, 11000);
    cr_assert(strstr(told(), "WATCHDOG=1|"), "each third of its time");
    service.children[CHILD_WORKER].state = CHILD_KILLED;
    service.children[CHILD_WORKER].killed_ms = 11000;
    notify_tick(&service, 20999);
    cr_assert(strstr(told(), "WATCHDOG=1|"));
    notify_tick(&service, 30000);
    cr_assert_null(strstr(told(), "WATCHDOG"), "the kernel does not end it");
    notify_close(&service.notify);
    unlink(path);
    *strrchr(path, '/') = '\0';
    rmdir(path);
}

Test(supervisor_notify, no_manager_and_a_wrong_one)
{
    memset(&service, 0, sizeof(service));
    service.log =
        (struct cm_log){open("/dev/null", O_WRONLY | O_CLOEXEC), "supervisor", CM_LOG_ERROR};
    const char *const wrong[] = {"", "relative", "vsock:2:1", "/nowhere/at/all"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        setenv("NOTIFY_SOCKET", wrong[i], 1);
        notify_open(&service.notify, &service.log);
        cr_assert_eq(service.notify.fd, -1, "%s", wrong[i]);
        notify_tick(&service, 1);
    }
    unsetenv("NOTIFY_SOCKET");
    notify_open(&service.notify, &service.log);
    cr_assert_eq(service.notify.fd, -1);
}
