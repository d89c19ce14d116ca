/* Runs every attempt inside a role's real confinement, and outside as a control.
 *
 *     escape control              each attempt as we are
 *     escape gateway|worker|keeper|devtpm
 *
 * The role's confinement comes from the supervisor's own table and goes the supervisor's own way:
 * launcher, clone3, exec of a sealed image. What runs there is this program again, by another name:
 * it confines itself as a role does, and then lets one child after another install the role's
 * filters and make an attempt. CASEMATE_TEST_OFF leaves layers out (tests/harness/switches.c).
 * One JSON line an attempt. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/msg.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/base/sealed.h"
#include "runtime/supervisor/supervisor_internal.h"
#include "sandbox/confine.h"
#include "tests/escape/attempts.h"

static uint64_t word = 0x5ec2e7;

static void die(const char *what)
{
    dprintf(2, "escape: %s: %s\n", what, strerror(errno));
    _exit(1);
}

/* ------------------------------------------------------------------ one attempt */

static void result_print(int out, const char *role, const char *name, int status)
{
    char event[32];
    if (WIFSIGNALED(status)) {
        snprintf(event, sizeof(event), "SIG%s", sigabbrev_np(WTERMSIG(status)));
    } else if (WEXITSTATUS(status) == 0) {
        snprintf(event, sizeof(event), "done");
    } else {
        const char *error = strerrorname_np(WEXITSTATUS(status));
        snprintf(event, sizeof(event), "%s", error != NULL ? error : "?");
    }
    dprintf(out, "{\"role\":\"%s\",\"attempt\":\"%s\",\"event\":\"%s\"}\n", role, name, event);
}

static void attempts_make(int out, const char *role, const struct cm_confinement *c,
                          const struct world *world)
{
    for (size_t i = 0; i < attempt_count; i++) {
        int status = 0;
        pid_t pid = fork();
        if (pid == 0) {
            if ((c->layers & CM_LAYER_BIT(CM_LAYER_FILTER)) != 0 &&
                (cm_filter_install((enum cm_filter_id)c->filter_start, NULL) != CM_OK ||
                 cm_filter_install((enum cm_filter_id)c->filter_serve, NULL) != CM_OK)) {
                _exit(255);
            }
            _exit(attempts[i].run(world));
        }
        if (pid < 0 || waitpid(pid, &status, 0) != pid) {
            die("fork");
        }
        result_print(out, role, attempts[i].name, status);
    }
}

/* ------------------------------------------------------------------ inside */

static int inside(const char *role)
{
    struct cm_confinement c;
    struct world world;
    int errors[CM_LAYER_COUNT];
    if (pread(CM_CONFINEMENT_FD, &c, sizeof(c), 0) != (ssize_t)sizeof(c) ||
        pread(CM_FD_INPUT, &world, sizeof(world), 0) != (ssize_t)sizeof(world)) {
        die("no confinement");
    }
    (void)close_range(CM_FD_COUNT, ~0u, 0);
    uint32_t held = cm_confine_apply(&c, errors);
    uint32_t lost = c.layers & ~held;
    if (lost != 0) {
        errno = errors[__builtin_ctz(lost)];
        die(cm_layer_name((enum cm_confine_layer)__builtin_ctz(lost)));
    }
    world.parent = getpid();
    attempts_make(CM_FD_LOG, role, &c, &world);
    return 0;
}

/* ------------------------------------------------------------------ outside */

static void listeners_make(struct world *world)
{
    struct sockaddr_in tcp = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    socklen_t size = sizeof(tcp);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&tcp, size) != 0 || listen(fd, 64) != 0 ||
        getsockname(fd, (struct sockaddr *)&tcp, &size) != 0) {
        die("listen");
    }
    world->tcp_port = ntohs(tcp.sin_port);
    snprintf(world->abstract_name, sizeof(world->abstract_name), "casemate-escape-%d", getpid());
    size_t length = strlen(world->abstract_name);
    memcpy(name.sun_path + 1, world->abstract_name, length);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 ||
        bind(fd, (struct sockaddr *)&name,
             (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)) != 0 ||
        listen(fd, 64) != 0) {
        die("listen");
    }
}

static void world_make(struct world *world)
{
    memset(world, 0, sizeof(*world));
    world->parent = getpid();
    world->victim_word = (uintptr_t)&word;
    world->victim = fork();
    if (world->victim == 0) {
        for (;;) {
            pause();
        }
    }
    listeners_make(world);
    world->ipc_key = 0x0ca5e000 + getpid() % 4096;
    snprintf(world->key_name, sizeof(world->key_name), "casemate-escape-%d", getpid());
    snprintf(world->file, sizeof(world->file), "/tmp/casemate-escape-%d", getpid());
    int fd = open(world->file, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0 || write(fd, "escaped\n", 8) != 8 ||
        shmget(world->ipc_key, 4096, IPC_CREAT | 0666) < 0 ||
        msgget(world->ipc_key, IPC_CREAT | 0666) < 0 ||
        syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 ||
        syscall(SYS_add_key, "user", world->key_name, "k", 1, KEY_SPEC_SESSION_KEYRING) < 0) {
        die("world");
    }
    close(fd);
}

static void world_end(const struct world *world)
{
    kill(world->victim, SIGKILL);
    waitpid(world->victim, NULL, 0);
    unlink(world->file);
    shmctl(shmget(world->ipc_key, 4096, 0), IPC_RMID, NULL);
    msgctl(msgget(world->ipc_key, 0), IPC_RMID, NULL);
}

/* What the role writes goes on, until it ends. */
static void copy_out(int log_fd)
{
    char bytes[4096];
    ssize_t got = 1;
    struct pollfd more = {.fd = log_fd, .events = POLLIN};
    while (got > 0 && poll(&more, 1, 30000) == 1) {
        got = read(log_fd, bytes, sizeof(bytes));
        if (got > 0 && write(STDOUT_FILENO, bytes, (size_t)got) != got) {
            die("write");
        }
    }
}

static int confined(const char *role, const struct world *world)
{
    static struct service service;
    static struct cm_configuration configuration = {
        .require_sandbox = "best", .connections_max = 256, .kv_bytes = 256 << 20};
    struct cm_error err;
    siginfo_t how = {0};
    int fds[CM_FD_COUNT];
    struct spawned spawned;
    struct child *child = NULL;
    service = (struct service){.configuration = &configuration,
                               .log = {STDERR_FILENO, "escape", CM_LOG_INFO},
                               .package_fd = -1,
                               .launcher_fd = -1};
    const struct {
        enum cm_role role;
        const char *name;
    } names[CHILD_COUNT] = {[CHILD_GATEWAY] = {CM_ROLE_GATEWAY, "gateway"},
                            [CHILD_WORKER] = {CM_ROLE_WORKER, "worker"},
                            [CHILD_KEEPER] = {CM_ROLE_KEEPER, "keeper"},
                            [CHILD_DEVTPM] = {CM_ROLE_DEVTPM, "devtpm"}};
    char folder[4096] = "", program[64];
    snprintf(program, sizeof(program), "escape-%s", role);
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        child_init(&service.children[i], names[i].role, names[i].name, program);
        child = strcmp(names[i].name, role) == 0 ? &service.children[i] : child;
    }
    ssize_t size = readlink("/proc/self/exe", folder, sizeof(folder) - 1);
    if (child == NULL || size <= 0) {
        die(role);
    }
    *strrchr(folder, '/') = '\0';
    int folder_fd = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (cm_image_load(&service.store, folder_fd, "escape", &child->image, &err) != CM_OK ||
        confinement_open(&service, &err) != CM_OK || launcher_open(&service, &err) != CM_OK) {
        die(err.text);
    }
    memset(fds, 0xff, sizeof(fds));
    fds[CM_FD_INPUT] = cm_memfd_sealed("world", world, sizeof(*world));
    if (spawn(&service, child, fds, &spawned, &err) != CM_OK) {
        die(err.text);
    }
    copy_out(spawned.log_fd);
    waitid(P_PIDFD, (id_t)spawned.pidfd, &how, WEXITED);
    launcher_close(&service);
    return how.si_code == CLD_EXITED ? how.si_status : 1;
}

int main(int argc, char **argv)
{
    struct world world;
    if (argc == 1 && strncmp(argv[0], "escape-", 7) == 0) {
        return inside(argv[0] + 7);
    }
    if (argc != 2) {
        fprintf(stderr, "usage: escape control|gateway|worker|keeper|devtpm\n");
        return 2;
    }
    world_make(&world);
    int code = 0;
    if (strcmp(argv[1], "control") == 0) {
        const struct cm_confinement none = {.layers = 0};
        attempts_make(STDOUT_FILENO, "control", &none, &world);
    } else {
        code = confined(argv[1], &world);
    }
    world_end(&world);
    return code;
}
