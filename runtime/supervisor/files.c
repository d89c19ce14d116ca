/* Files that the supervisor reads and writes: package head and policy list into a memfd, the table
 * of API keys, run/tls-certificate.pem. It parses neither package nor policy. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "loader/package/package.h"
#include "loader/tpm/enrolment.h"
#include "runtime/base/cursor.h"
#include "runtime/base/sealed.h"
#include "runtime/supervisor/supervisor_internal.h"

#define KEYS_HEADER_BYTES 16u

int file_look(const char *path, struct stat *ret_facts)
{
    memset(ret_facts, 0, sizeof(*ret_facts));
    errno = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    if (fd >= 0 && (fstat(fd, ret_facts) != 0 || !S_ISREG(ret_facts->st_mode))) {
        close(fd);
        memset(ret_facts, 0, sizeof(*ret_facts));
        return -1;
    }
    return fd;
}

bool file_same(const struct stat *a, const struct stat *b)
{
    return a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

ssize_t file_read(int fd, uint8_t *bytes, size_t size, uint64_t offset)
{
    size_t used = 0;
    while (used < size) {
        ssize_t got = pread(fd, bytes + used, size - used, (off_t)(offset + used));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return -1;
        }
        if (got == 0) {
            break;
        }
        used += (size_t)got;
    }
    return (ssize_t)used;
}

static bool file_write(int fd, const void *bytes, size_t size)
{
    for (size_t used = 0; used < size;) {
        ssize_t put = write(fd, (const uint8_t *)bytes + used, size - used);
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            return false;
        }
        used += (size_t)put;
    }
    return true;
}

static enum cm_status policy_read(const char *package_path, uint8_t *bytes, size_t size,
                                  size_t *ret_used, struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + 16];
    snprintf(path, sizeof(path), "%s.policy", package_path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) {
        *ret_used = 0; /* the keeper says what that means */
        return CM_OK;
    }
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-SUP-POLICY", "cannot open %s", path);
    }
    ssize_t got = file_read(fd, bytes, size, 0);
    int error_number = errno;
    close(fd);
    if (got < 0) {
        return cm_error_errno(err, error_number, "CM-SUP-POLICY", "cannot read %s", path);
    }
    if ((size_t)got == size) {
        return cm_error_set(err, CM_E_POLICY, "CM-SUP-POLICY", "%s is longer than %u bytes", path,
                            CM_POLICY_LIST_BYTES_MAX);
    }
    *ret_used = (size_t)got;
    return CM_OK;
}

enum cm_status head_memfd_make(int package_fd, const char *package_path, int *ret_fd,
                               uint32_t *ret_head_bytes, uint32_t *ret_policy_bytes,
                               struct cm_error *err)
{
    /* Static: adapters come once the filter is closed. */
    static uint8_t bytes[CM_PACKAGE_HEAD_BYTES + CM_POLICY_LIST_BYTES_MAX + 1];
    size_t policy_bytes = 0;
    ssize_t got = file_read(package_fd, bytes, CM_PACKAGE_HEAD_BYTES, 0);
    enum cm_status status = CM_OK;
    if (got < 0) {
        status = cm_error_errno(err, errno, "CM-SUP-PACKAGE", "cannot read %s", package_path);
    } else if ((size_t)got < CM_PACKAGE_HEAD_BYTES) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-PKG-SHORT",
                              "%s: %zd bytes, shorter than a package's head of %u", package_path,
                              got, CM_PACKAGE_HEAD_BYTES);
    } else {
        status = policy_read(package_path, bytes + CM_PACKAGE_HEAD_BYTES,
                             CM_POLICY_LIST_BYTES_MAX + 1, &policy_bytes, err);
    }
    if (status == CM_OK) {
        int fd = cm_memfd_sealed("casemate-head", bytes, CM_PACKAGE_HEAD_BYTES + policy_bytes);
        if (fd < 0) {
            status = cm_error_errno(err, errno, "CM-SUP-MEMFD", "cannot make head memory");
        } else {
            *ret_fd = fd;
            *ret_head_bytes = CM_PACKAGE_HEAD_BYTES;
            *ret_policy_bytes = (uint32_t)policy_bytes;
        }
    }
    return status;
}

/* The table's rows and generation; false if the file is not a whole, sorted table. */
static bool keys_parse(const uint8_t *bytes, size_t size, struct cm_keys_info *ret_info)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    const uint8_t *magic = cm_cursor_take(&cursor, 8);
    uint64_t generation = cm_cursor_u64(&cursor);
    size_t left = cm_cursor_left(&cursor);
    if (!cm_cursor_ok(&cursor) || memcmp(magic, "CMKEYS2", 8) != 0 ||
        left % sizeof(struct cm_api_key) != 0) {
        return false;
    }
    size_t count = left / sizeof(struct cm_api_key);
    struct cm_api_key previous = {.name = {0}};
    for (size_t i = 0; i < count; i++) {
        struct cm_api_key row;
        cm_cursor_copy(&cursor, &row, sizeof(row));
        if (memchr(row.name, '\0', sizeof(row.name)) == NULL ||
            (i > 0 && memcmp(previous.id, row.id, sizeof(row.id)) >= 0)) {
            return false;
        }
        previous = row;
    }
    *ret_info = (struct cm_keys_info){.generation = generation, .count = (uint32_t)count};
    return true;
}

static bool keys_load(struct service *service, int fd)
{
    /* Static: once the filter is closed there is no more memory to be had. */
    static uint8_t bytes[KEYS_HEADER_BYTES + CM_API_KEYS_MAX * sizeof(struct cm_api_key) + 1];
    const size_t most = sizeof(bytes) - 1;
    struct cm_keys_info info = {.generation = 0};
    memset(bytes, 0, KEYS_HEADER_BYTES);
    ssize_t got = fd >= 0 ? file_read(fd, bytes, most + 1, 0) : 0;
    bool good =
        fd < 0 || (got >= 0 && (size_t)got <= most && keys_parse(bytes, (size_t)got, &info));
    if (!good) {
        /* Closed, not open: a table that cannot be read admits nobody. */
        CM_LOG(&service->log, CM_LOG_ERROR, "keys_refused",
               CM_LOG_S("text", "keys.table is damaged: no key is accepted until `casemate keys` "
                                "writes it again"));
    }
    int memory = cm_memfd_sealed("casemate-keys", bytes + KEYS_HEADER_BYTES,
                                 info.count * sizeof(struct cm_api_key));
    if (memory < 0) {
        return false;
    }
    if (service->keys_fd >= 0) {
        close(service->keys_fd);
    }
    service->keys_fd = memory;
    service->keys_info = info;
    return true;
}

bool keys_refresh(struct service *service)
{
    char path[CM_CONFIG_TEXT_BYTES + 16];
    struct stat facts;
    snprintf(path, sizeof(path), "%s/keys.table", service->state_path);
    int fd = file_look(path, &facts);
    bool same = service->keys_known && file_same(&facts, &service->keys_seen);
    bool changed = !same && keys_load(service, fd);
    if (changed) {
        service->keys_seen = facts;
        service->keys_known = true;
        CM_LOG(&service->log, CM_LOG_INFO, "keys",
               CM_LOG_I("generation", service->keys_info.generation),
               CM_LOG_I("count", service->keys_info.count));
    }
    if (fd >= 0) {
        close(fd);
    }
    return changed;
}

/* Write beside, then rename: a reader sees the old or the new file, never half of one. */
void run_file_write(struct service *service, const char *name, const void *bytes, size_t size)
{
    char partial[64];
    snprintf(partial, sizeof(partial), "%s.partial", name);
    int fd = openat(service->run_fd, partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) {
        return; /* a full disk must not end the service; status then grows old, which shows */
    }
    bool good = file_write(fd, bytes, size);
    close(fd);
    if (good) { /* half a file stays beside, and is written over next time */
        (void)renameat(service->run_fd, partial, service->run_fd, name);
    }
}

void certificate_write(struct service *service)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char pem[CM_CERTIFICATE_BYTES_MAX * 2];
    const uint8_t *der = service->tls.certificate;
    size_t size = service->tls.certificate_bytes;
    size_t used = (size_t)snprintf(pem, sizeof(pem), "-----BEGIN CERTIFICATE-----\n");
    for (size_t i = 0; i < size; i += 3) {
        size_t left = size - i;
        uint32_t bits = (uint32_t)der[i] << 16 | (left > 1 ? (uint32_t)der[i + 1] << 8 : 0) |
                        (left > 2 ? der[i + 2] : 0u);
        pem[used++] = digits[bits >> 18];
        pem[used++] = digits[bits >> 12 & 63];
        pem[used++] = left > 1 ? digits[bits >> 6 & 63] : '=';
        pem[used++] = left > 2 ? digits[bits & 63] : '=';
        if (i % 48 == 45 || left <= 3) {
            pem[used++] = '\n';
        }
    }
    used += (size_t)snprintf(pem + used, sizeof(pem) - used, "-----END CERTIFICATE-----\n");
    run_file_write(service, "tls-certificate.pem", pem, used);
}
