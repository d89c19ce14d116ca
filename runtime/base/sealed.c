/* Sealed memory files (memfd_create(2)). */
#include "runtime/base/sealed.h"

#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

int cm_memfd_sealed(const char *name, const void *bytes, size_t size)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    size_t used = 0;
    while (fd >= 0 && used < size) {
        ssize_t put = write(fd, (const uint8_t *)bytes + used, size - used);
        if (put <= 0 && errno != EINTR) {
            break;
        }
        used += put > 0 ? (size_t)put : 0;
    }
    if (fd >= 0 && (used < size || fcntl(fd, F_ADD_SEALS, CM_SEALS_ALL) != 0)) {
        int error_number = errno;
        close(fd);
        errno = error_number;
        return -1;
    }
    return fd;
}
