/* Sealed memory files (memfd_create(2)). */
#include "runtime/base/sealed.h"

#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#define SEAL_TRIES 8 /* each waits in the kernel for some 0.1 s */

int cm_memfd_seal(int fd)
{
    int result = fcntl(fd, F_ADD_SEALS, CM_SEALS_ALL);
    for (int i = 1; i < SEAL_TRIES && result != 0 && errno == EBUSY; i++) {
        result = fcntl(fd, F_ADD_SEALS, CM_SEALS_ALL);
    }
    return result;
}

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
    if (fd >= 0 && (used < size || cm_memfd_seal(fd) != 0)) {
        int error_number = errno;
        close(fd);
        errno = error_number;
        return -1;
    }
    return fd;
}
