/* Opening the TPM that the configuration names. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "policies/config/config.h"

bool cm_config_tpm_development(const char *tpm)
{
    return strcmp(tpm, "development") == 0;
}

static int socket_open(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (strlen(path) >= sizeof(address.sun_path)) {
        errno = ENAMETOOLONG;
    } else {
        snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
        if (fd >= 0 && connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0) {
            return fd;
        }
    }
    int error_number = errno;
    if (fd >= 0) {
        close(fd);
    }
    errno = error_number;
    return -1;
}

enum cm_status cm_config_tpm_open(const char *path, int *ret_fd, struct cm_error *err)
{
    struct stat facts;
    bool is_socket = stat(path, &facts) == 0 && S_ISSOCK(facts.st_mode);
    int fd = is_socket ? socket_open(path) : open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_set(err, CM_E_TPM, "CM-TPM-OPEN",
                            "cannot open %s: %s; `tpm: development` needs no device, and protects "
                            "nothing",
                            path, strerrordesc_np(errno));
    }
    *ret_fd = fd;
    return CM_OK;
}
