/* The attempts, by what they are after. */
#include "tests/escape/attempts.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/keyctl.h>
#include <linux/openat2.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <linux/capability.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

/* errno of a call that returns -1 on failure */
static int of(long value)
{
    return value >= 0 ? 0 : errno;
}

#define TRY(name, expression)                                                                      \
    static int name(const struct world *w)                                                         \
    {                                                                                              \
        (void)w;                                                                                   \
        return of(expression);                                                                     \
    }

/* ------------------------------------------------------------------ files */

TRY(open_read, open(w->file, O_RDONLY))
TRY(open_write, open(w->file, O_WRONLY))
TRY(open_legacy, syscall(SYS_open, w->file, O_RDONLY))
TRY(open_root, open("/", O_RDONLY | O_DIRECTORY))
TRY(open_path, open("/etc", O_PATH))
TRY(open_mem, open("/proc/self/mem", O_RDWR))
TRY(open_null, open("/dev/null", O_RDWR))
TRY(truncate_path, truncate(w->file, 4))
TRY(stat_path, syscall(SYS_stat, w->file, &(struct stat){0}))
TRY(statx_path, syscall(SYS_statx, AT_FDCWD, w->file, 0, 0x7ff, (uint8_t[256]){0}))
TRY(access_path, access(w->file, R_OK))
TRY(chmod_path, chmod(w->file, 0666))
TRY(chown_path, chown(w->file, 0, 0))
TRY(utime_path, utimensat(AT_FDCWD, w->file, NULL, 0))
TRY(readlink_path, readlink("/proc/self/exe", (char[64]){0}, 64))
TRY(statfs_path, statfs("/proc", &(struct statfs){0}))
TRY(setxattr_path, syscall(SYS_setxattr, w->file, "trusted.casemate", "x", 1, 0))
TRY(inotify_path, inotify_add_watch(inotify_init1(0), "/etc", IN_OPEN))
TRY(fanotify_start, fanotify_init(FAN_CLASS_NOTIF, O_RDONLY))

static int openat2_read(const struct world *w)
{
    struct open_how how = {.flags = O_RDONLY};
    return of(syscall(SYS_openat2, AT_FDCWD, w->file, &how, sizeof(how)));
}

static int file_make(const struct world *w)
{
    char path[80];
    snprintf(path, sizeof(path), "%s.%d", w->file, (int)w->parent);
    int fd = open(path, O_WRONLY | O_CREAT, 0600), error_number = errno;
    unlink(path);
    return fd >= 0 ? 0 : error_number;
}

static int folder_make(const struct world *w)
{
    char path[80];
    snprintf(path, sizeof(path), "%s.d", w->file);
    int made = mkdir(path, 0700), error_number = errno;
    rmdir(path);
    return made == 0 ? 0 : error_number;
}

static int link_make(const struct world *w)
{
    char path[80];
    snprintf(path, sizeof(path), "%s.l", w->file);
    int made = symlink("/etc/passwd", path), error_number = errno;
    unlink(path);
    return made == 0 ? 0 : error_number;
}

static int node_make(const struct world *w)
{
    char path[80];
    snprintf(path, sizeof(path), "%s.n", w->file);
    int made = mknod(path, S_IFIFO | 0600, 0), error_number = errno;
    unlink(path);
    return made == 0 ? 0 : error_number;
}

static int file_grow(const struct world *w)
{
    (void)w;
    signal(SIGXFSZ, SIG_IGN);
    int fd = memfd_create("big", 0);
    return fd < 0 ? errno : of(ftruncate(fd, 1ll << 30));
}

/* ------------------------------------------------------------------ programs and processes */

static int exec_path(const struct world *w)
{
    char *const arguments[] = {(char *)"true", NULL};
    (void)w;
    execv("/bin/true", arguments); /* success is exit code 0 */
    return errno;
}

/* The smallest program: exit(0). From memory, without a path. */
static int exec_memory(const struct world *w)
{
    static const uint8_t program[] = {
        0x7f, 'E',  'L',  'F',  2,    1,    1, 0,    0,    0,    0, 0,    0, 0, 0,    0,    2,
        0,    62,   0,    1,    0,    0,    0, 0x78, 0,    0x40, 0, 0,    0, 0, 0,    0x40, 0,
        0,    0,    0,    0,    0,    0,    0, 0,    0,    0,    0, 0,    0, 0, 0,    0,    0,
        0,    0x40, 0,    0x38, 0,    1,    0, 0,    0,    0,    0, 0,    0, 1, 0,    0,    0,
        5,    0,    0,    0,    0,    0,    0, 0,    0,    0,    0, 0,    0, 0, 0x40, 0,    0,
        0,    0,    0,    0,    0,    0x40, 0, 0,    0,    0,    0, 0x81, 0, 0, 0,    0,    0,
        0,    0,    0x81, 0,    0,    0,    0, 0,    0,    0,    0, 0x10, 0, 0, 0,    0,    0,
        0,    0x31, 0xff, 0xb8, 0x3c, 0,    0, 0,    0x0f, 0x05};
    char *const none[] = {NULL};
    (void)w;
    int fd = memfd_create("program", MFD_CLOEXEC);
    if (fd < 0 || write(fd, program, sizeof(program)) != (ssize_t)sizeof(program)) {
        return errno;
    }
    syscall(SYS_execveat, fd, "", none, none, AT_EMPTY_PATH);
    return errno;
}

static int fork_one(const struct world *w)
{
    (void)w;
    pid_t pid = fork();
    if (pid == 0) {
        _exit(0);
    }
    return of(pid);
}

static int clone3_one(const struct world *w)
{
    struct clone_args args = {.exit_signal = SIGCHLD};
    (void)w;
    long pid = syscall(SYS_clone3, &args, sizeof(args));
    if (pid == 0) {
        _exit(0);
    }
    return of(pid);
}

TRY(kill_victim, kill(w->victim, 0))
TRY(tgkill_victim, syscall(SYS_tgkill, w->victim, w->victim, 0))
TRY(sigqueue_victim, sigqueue(w->victim, SIGWINCH, (union sigval){0}))
TRY(pidfd_victim, syscall(SYS_pidfd_open, w->victim, 0))
TRY(ptrace_victim, ptrace(PTRACE_SEIZE, w->victim, 0, 0))
TRY(prlimit_victim, prlimit(w->victim, RLIMIT_CORE, NULL, &(struct rlimit){0}))
TRY(affinity_victim, sched_getaffinity(w->victim, sizeof(cpu_set_t), &(cpu_set_t){0}))
TRY(robust_victim, syscall(SYS_get_robust_list, w->victim, &(void *){0}, &(size_t){0}))
TRY(session_victim, getsid(w->victim))
TRY(kcmp_victim, syscall(SYS_kcmp, w->victim, w->parent, 0, 0, 0))
TRY(priority_victim, setpriority(PRIO_PROCESS, (id_t)w->victim, 5))

static int memory_victim(const struct world *w)
{
    uint64_t word;
    struct iovec local = {&word, sizeof(word)};
    struct iovec remote = {(void *)(uintptr_t)w->victim_word, sizeof(word)};
    return of(process_vm_readv(w->victim, &local, 1, &remote, 1, 0));
}

static int memory_write_victim(const struct world *w)
{
    uint64_t word = 1;
    struct iovec local = {&word, sizeof(word)};
    struct iovec remote = {(void *)(uintptr_t)w->victim_word, sizeof(word)};
    return of(process_vm_writev(w->victim, &local, 1, &remote, 1, 0));
}

static int descriptor_victim(const struct world *w)
{
    int pidfd = (int)syscall(SYS_pidfd_open, w->victim, 0);
    return pidfd < 0 ? errno : of(syscall(SYS_pidfd_getfd, pidfd, 0, 0));
}

/* ------------------------------------------------------------------ memory that executes */

static int mapped(void *at)
{
    return at != MAP_FAILED ? 0 : errno;
}

static int map_executable(const struct world *w)
{
    (void)w;
    return mapped(
        mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

static int protect_executable(const struct world *w)
{
    (void)w;
    void *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? errno : of(mprotect(at, 4096, PROT_READ | PROT_EXEC));
}

static int stack_executable(const struct world *w)
{
    (void)w;
    uintptr_t here = (uintptr_t)&w & ~(uintptr_t)4095;
    return of(mprotect((void *)here, 4096, PROT_READ | PROT_WRITE | PROT_EXEC));
}

static int memory_large(const struct world *w)
{
    (void)w;
    return mapped(mmap(NULL, 1ull << 36, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

/* ------------------------------------------------------------------ network and IPC */

static struct sockaddr_in address_of(const struct world *w)
{
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons(w->tcp_port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static int tcp_connect(const struct world *w)
{
    struct sockaddr_in address = address_of(w);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    return fd < 0 ? errno : of(connect(fd, (struct sockaddr *)&address, sizeof(address)));
}

static int udp_send(const struct world *w)
{
    struct sockaddr_in address = address_of(w);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    return fd < 0 ? errno : of(sendto(fd, "x", 1, 0, (struct sockaddr *)&address, sizeof(address)));
}

/* Does loopback lead anywhere? In an empty network namespace it is down. */
static int interface_up(const struct world *w)
{
    struct ifreq request = {.ifr_name = "lo"};
    (void)w;
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &request) != 0) {
        return errno;
    }
    return (request.ifr_flags & IFF_UP) != 0 ? 0 : ENETDOWN;
}

TRY(raw_socket, socket(AF_INET, SOCK_RAW, IPPROTO_ICMP))
TRY(packet_socket, socket(AF_PACKET, SOCK_RAW, 0))

static int abstract_connect(const struct world *w)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t size = strlen(w->abstract_name);
    memcpy(address.sun_path + 1, w->abstract_name, size);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return fd < 0 ? errno
                  : of(connect(fd, (struct sockaddr *)&address,
                               (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + size)));
}

TRY(shared_memory, shmget(w->ipc_key, 4096, 0))
TRY(message_queue, msgget(w->ipc_key, 0))
TRY(key_find, syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING, "user", w->key_name, 0))

/* ------------------------------------------------------------------ rights */

TRY(mount_tmpfs, mount("x", "/tmp", "tmpfs", 0, NULL) == 0 ? umount2("/tmp", MNT_DETACH) : -1)
TRY(remount_root, mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL))
TRY(new_mounts, syscall(SYS_fsopen, "tmpfs", 0))
TRY(change_root, chroot("/"))
TRY(user_become, setresuid(0, 0, 0))
TRY(group_become, setresgid(0, 0, 0))
TRY(groups_set, syscall(SYS_setgroups, 1, &(gid_t){0}))
TRY(unshare_net, unshare(CLONE_NEWNET))
TRY(unshare_user, unshare(CLONE_NEWUSER))
TRY(host_name, sethostname("localhost", 9))
TRY(core_allow, setrlimit(RLIMIT_CORE, &(struct rlimit){1 << 20, 1 << 20}))
TRY(realtime, sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1}))
TRY(priority_raise, setpriority(PRIO_PROCESS, 0, -10))
TRY(kernel_log, syscall(SYS_syslog, 3, (char[16]){0}, 16))
TRY(descriptor_high, fcntl(0, F_DUPFD, 4500))
TRY(dup_high, dup2(0, 4500))

static int capabilities_take(const struct world *w)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {
        {.effective = 1u << CAP_KILL, .permitted = 1u << CAP_KILL}};
    (void)w;
    return of(syscall(SYS_capset, &head, data));
}

/* ------------------------------------------------------------------ the kernel's wide doors */

static int ring_setup(const struct world *w)
{
    struct io_uring_params params = {.flags = 0};
    (void)w;
    return of(syscall(SYS_io_uring_setup, 2, &params));
}

static int bpf_load(const struct world *w)
{
    struct bpf_insn code[] = {{.code = 0xb7}, {.code = 0x95}}; /* r0 = 0; exit */
    union bpf_attr attr = {.prog_type = BPF_PROG_TYPE_KPROBE,
                           .insn_cnt = 2,
                           .insns = (uintptr_t)code,
                           .license = (uintptr_t) "GPL"};
    (void)w;
    return of(syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr)));
}

static int perf_open(const struct world *w)
{
    struct perf_event_attr attr = {
        .type = PERF_TYPE_SOFTWARE, .size = sizeof(attr), .config = PERF_COUNT_SW_CPU_CLOCK};
    (void)w;
    return of(syscall(SYS_perf_event_open, &attr, -1, 0, -1, 0));
}

TRY(fault_handler, syscall(SYS_userfaultfd, O_CLOEXEC))
TRY(handle_open,
    syscall(SYS_name_to_handle_at, AT_FDCWD, w->file, (uint32_t[40]){128}, &(int){0}, 0))

/* The 32-bit door: open(2) of i386 by int 0x80, with its path in low memory. */
static int other_architecture(const struct world *w)
{
    long result;
    char *low =
        mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (low == MAP_FAILED) {
        return errno;
    }
    strcpy(low, w->file);
    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(5L), "b"(low), "c"(0L), "d"(0L)
                     : "memory", "r8", "r9", "r10", "r11");
    return (int)result >= 0 ? 0 : -(int)result;
}

#define ROW(name)                                                                                  \
    {                                                                                              \
#name, name                                                                                \
    }

const struct attempt attempts[] = {
    ROW(open_read),          ROW(open_write),       ROW(open_legacy),
    ROW(open_root),          ROW(open_path),        ROW(open_mem),
    ROW(open_null),          ROW(openat2_read),     ROW(truncate_path),
    ROW(stat_path),          ROW(statx_path),       ROW(access_path),
    ROW(chmod_path),         ROW(chown_path),       ROW(utime_path),
    ROW(readlink_path),      ROW(statfs_path),      ROW(setxattr_path),
    ROW(inotify_path),       ROW(fanotify_start),   ROW(file_make),
    ROW(folder_make),        ROW(link_make),        ROW(node_make),
    ROW(file_grow),          ROW(exec_path),        ROW(exec_memory),
    ROW(fork_one),           ROW(clone3_one),       ROW(kill_victim),
    ROW(tgkill_victim),      ROW(sigqueue_victim),  ROW(pidfd_victim),
    ROW(ptrace_victim),      ROW(prlimit_victim),   ROW(affinity_victim),
    ROW(robust_victim),      ROW(session_victim),   ROW(kcmp_victim),
    ROW(priority_victim),    ROW(memory_victim),    ROW(memory_write_victim),
    ROW(descriptor_victim),  ROW(map_executable),   ROW(protect_executable),
    ROW(stack_executable),   ROW(memory_large),     ROW(tcp_connect),
    ROW(udp_send),           ROW(interface_up),     ROW(raw_socket),
    ROW(packet_socket),      ROW(abstract_connect), ROW(shared_memory),
    ROW(message_queue),      ROW(key_find),         ROW(mount_tmpfs),
    ROW(remount_root),       ROW(new_mounts),       ROW(change_root),
    ROW(user_become),        ROW(group_become),     ROW(groups_set),
    ROW(unshare_net),        ROW(unshare_user),     ROW(host_name),
    ROW(core_allow),         ROW(realtime),         ROW(priority_raise),
    ROW(kernel_log),         ROW(descriptor_high),  ROW(dup_high),
    ROW(capabilities_take),  ROW(ring_setup),       ROW(bpf_load),
    ROW(perf_open),          ROW(fault_handler),    ROW(handle_open),
    ROW(other_architecture),
};
const size_t attempt_count = sizeof(attempts) / sizeof(attempts[0]);
