/* Everything that needs a path, opened before any child exists. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

/* One service per state folder: two would answer for each other's TPM. */
static enum cm_status state_open(struct service *service, struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + 16];
    snprintf(path, sizeof(path), "%s/run", service->state_path);
    enum cm_status status = cm_config_state_check(service->state_path, err);
    if (status != CM_OK) {
        return status;
    }
    if (mkdir(path, 0755) != 0 && errno != EEXIST) {
        return cm_error_errno(err, errno, "CM-SUP-STATE",
                              "cannot make %s; `casemate init --state DIR` makes the folder", path);
    }
    service->run_fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (service->run_fd < 0) {
        return cm_error_errno(err, errno, "CM-SUP-STATE", "cannot open %s", path);
    }
    service->lock_fd = openat(service->run_fd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (service->lock_fd < 0) {
        return cm_error_errno(err, errno, "CM-SUP-STATE", "cannot open %s/lock", path);
    }
    if (flock(service->lock_fd, LOCK_EX | LOCK_NB) != 0) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SUP-TWICE",
                            "another casemate serves from %s; stop it first", service->state_path);
    }
    return CM_OK;
}

static enum cm_status enrolment_open(struct service *service, struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + 32];
    snprintf(path, sizeof(path), "%s/enrolment.bin", service->state_path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-SUP-ENROLMENT",
                            "cannot open %s: %s; `casemate init --state %s` enrols this node", path,
                            strerrordesc_np(errno), service->state_path);
    }
    uint8_t bytes[CM_ENROLMENT_BYTES_MAX + 1];
    ssize_t got = read(fd, bytes, sizeof(bytes));
    close(fd);
    if (got <= 0 || got > CM_ENROLMENT_BYTES_MAX) {
        return cm_error_set(err, CM_E_CONFIG, "CM-SUP-ENROLMENT", "%s: %zd bytes, expected 1 to %d",
                            path, got, CM_ENROLMENT_BYTES_MAX);
    }
    memcpy(service->keeper_config.enrolment, bytes, (size_t)got);
    service->keeper_config.enrolment_bytes = (uint32_t)got;
    return CM_OK;
}

static enum cm_status package_open(struct service *service, struct cm_error *err)
{
    const char *path = service->configuration->package;
    service->package_fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (service->package_fd < 0) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-OPEN", "cannot open package %s: %s", path,
                            strerrordesc_np(errno));
    }
    return head_memfd_make(service->package_fd, path, &service->head_fd,
                           &service->keeper_config.head_bytes, &service->keeper_config.policy_bytes,
                           err);
}

static enum cm_status tpm_open(struct service *service, struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + 32];
    int ends[2];
    if (!cm_config_tpm_development(service->configuration->tpm)) {
        return cm_config_tpm_open(service->configuration->tpm, &service->tpm_fd, err);
    }
    service->keeper_config.development_tpm = 1;
    service->state.development_tpm = 1;
    snprintf(path, sizeof(path), "%s/devtpm.state", service->state_path);
    service->devtpm_state_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (service->devtpm_state_fd < 0) {
        return cm_error_errno(err, errno, "CM-TPM-OPEN", "cannot open %s", path);
    }
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        return cm_error_errno(err, errno, "CM-TPM-OPEN", "cannot make the TPM's channel");
    }
    service->tpm_fd = ends[0];
    service->devtpm_end_fd = ends[1];
    return CM_OK;
}

static enum cm_status listener_open(struct service *service, struct cm_error *err)
{
    char host[CM_NAME_BYTES];
    uint16_t port = 0;
    int on = 1;
    union {
        struct sockaddr any;
        struct sockaddr_in four;
        struct sockaddr_in6 six;
    } address = {.six = {.sin6_family = AF_UNSPEC}};
    socklen_t size = sizeof(address);
    const char *text = service->configuration->listen;
    CM_ASSERT(cm_config_address_split(text, host, &port));
    bool six = text[0] == '[';
    if (six) {
        address.six = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(port)};
        inet_pton(AF_INET6, host, &address.six.sin6_addr);
    } else {
        address.four = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
        inet_pton(AF_INET, host, &address.four.sin_addr);
        size = sizeof(address.four);
    }
    int fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    service->listener_fd = fd;
    /* TCP_NODELAY is inherited by accepted sockets, so the gateway needs no setsockopt. */
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) != 0 ||
        bind(fd, &address.any, size) != 0 || listen(fd, 1024) != 0 ||
        getsockname(fd, &address.any, &size) != 0) {
        return cm_error_errno(err, errno, "CM-SUP-LISTEN",
                              "cannot listen on %s (choose with --listen)", text);
    }
    snprintf(service->address, sizeof(service->address), six ? "[%s]:%u" : "%s:%u", host,
             ntohs(six ? address.six.sin6_port : address.four.sin_port));
    return CM_OK;
}

static enum cm_status signals_open(struct service *service, struct cm_error *err)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP, SIG_IGN); /* reload is not there yet; a closed terminal must not end a service */
    sigprocmask(SIG_BLOCK, &set, NULL);
    service->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (service->signal_fd < 0) {
        return cm_error_errno(err, errno, "CM-SUP-SIGNALS", "cannot receive signals");
    }
    return CM_OK;
}

static void names_copy(struct service *service)
{
    const struct cm_config_names *names = &service->configuration->tls_names;
    service->keeper_config.tls_name_count = names->count;
    memcpy(service->keeper_config.tls_names, names->names, sizeof(names->names));
}

enum cm_status service_files_open(struct service *service, struct cm_error *err)
{
    enum cm_status status = cm_config_point_read(service->configuration->package_owner,
                                                 service->keeper_config.owner_key, err);
    if (status == CM_OK) {
        status = cm_config_point_read(service->configuration->policy_authority,
                                      service->keeper_config.policy_key, err);
    }
    if (status == CM_OK) {
        status = cm_config_owners_read(service->configuration,
                                       &service->keeper_config.adapter_owners, err);
    }
    if (status == CM_OK) {
        status = state_open(service, err);
    }
    if (status == CM_OK) {
        status = enrolment_open(service, err);
    }
    if (status == CM_OK) {
        status = package_open(service, err);
    }
    if (status == CM_OK) {
        status = listener_open(service, err);
    }
    if (status == CM_OK) {
        status = tpm_open(service, err);
    }
    if (status == CM_OK) {
        status = signals_open(service, err);
    }
    if (status == CM_OK) {
        status = rings_make(cm_config_ring_bytes(service->configuration), &service->rings, err);
    }
    names_copy(service);
    return status;
}
