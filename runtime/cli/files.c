/* Whole small files, and the folder that our programs lie in. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loader/package/package.h"
#include "runtime/cli/cli_internal.h"

enum cm_status cli_file_read(const char *path, uint8_t *bytes, size_t size, size_t *ret_used,
                             struct cm_error *err)
{
    size_t used = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-CLI-OPEN", "cannot open %s", path);
    }
    for (ssize_t got = 1; got > 0 && used < size; used += (size_t)got) {
        got = read(fd, bytes + used, size - used);
        if (got < 0) {
            int error_number = errno;
            close(fd);
            return cm_error_errno(err, error_number, "CM-CLI-READ", "cannot read %s", path);
        }
    }
    close(fd);
    if (used == size) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CLI-READ", "%s is longer than %zu bytes", path,
                            size - 1);
    }
    *ret_used = used;
    return CM_OK;
}

void cli_owner_follow(const char *path)
{
    char folder[CM_CONFIG_TEXT_BYTES + 32];
    struct stat facts;
    snprintf(folder, sizeof(folder), "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash == NULL || geteuid() != 0) {
        return;
    }
    slash[1] = '\0';
    if (stat(folder, &facts) == 0 && facts.st_uid != 0) {
        /* If it fails the service cannot read the file, and says which. */
        int done = lchown(path, facts.st_uid, facts.st_gid);
        (void)done;
    }
}

enum cm_status cli_file_write(const char *path, const void *bytes, size_t size, unsigned mode,
                              struct cm_error *err)
{
    char partial[CM_CONFIG_TEXT_BYTES + 32];
    snprintf(partial, sizeof(partial), "%s.partial", path);
    int fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, (mode_t)mode);
    bool good = fd >= 0 && fchmod(fd, (mode_t)mode) == 0;
    for (size_t used = 0; good && used < size;) {
        ssize_t put = write(fd, (const uint8_t *)bytes + used, size - used);
        good = put > 0;
        used += good ? (size_t)put : 0;
    }
    cli_owner_follow(partial);
    good = good && fsync(fd) == 0 && rename(partial, path) == 0;
    int error_number = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (!good) {
        unlink(partial);
        return cm_error_errno(err, error_number, "CM-CLI-WRITE", "cannot write %s", path);
    }
    return CM_OK;
}

enum cm_status cli_program_path(const char *name, char *ret_path, size_t size, struct cm_error *err)
{
    char own[4096];
    ssize_t used = readlink("/proc/self/exe", own, sizeof(own) - 1);
    if (used <= 0) {
        return cm_error_errno(err, errno, "CM-CLI-PROGRAM", "cannot find our own folder");
    }
    own[used] = '\0';
    *strrchr(own, '/') = '\0';
    if (snprintf(ret_path, size, "%s/%s", own, name) >= (int)size || access(ret_path, X_OK) != 0) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-CLI-PROGRAM",
                            "cannot run %s beside casemate in %s", name, own);
    }
    return CM_OK;
}

enum cm_status cli_programs_open(int *ret_fd, struct cm_error *err)
{
    char path[4200];
    enum cm_status status = cli_program_path("", path, sizeof(path), err);
    if (status == CM_OK) {
        *ret_fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        status = *ret_fd >= 0 ? CM_OK
                              : cm_error_errno(err, errno, "CM-CLI-OPEN", "cannot open %s", path);
    }
    return status;
}

enum cm_status cli_package_head(const char *path, struct cm_package_head *ret_head,
                                struct cm_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-OPEN", "cannot open package %s: %s", path,
                            strerrordesc_np(errno));
    }
    enum cm_status status = cm_package_head_read(fd, ret_head, err);
    close(fd);
    return status == CM_OK ? CM_OK : cm_error_wrap(err, "%.200s", path);
}
