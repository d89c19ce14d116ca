/* Small files in memory that nobody can change any more: what one role hands another. */
#ifndef CASEMATE_RUNTIME_BASE_SEALED_H
#define CASEMATE_RUNTIME_BASE_SEALED_H

#include <fcntl.h>
#include <stddef.h>

#define CM_SEALS_ALL (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* Seal a memfd that is written: 0, or -1 and errno. While the kernel itself holds one of its pages
 * (migration, a list that is not drained yet) sealing is EBUSY (fcntl(2)): that passes, and is
 * waited for. */
int cm_memfd_seal(int fd);
/* A close-on-exec memfd of these bytes, sealed; its offset is at the end; -1 and errno on error. */
int cm_memfd_sealed(const char *name, const void *bytes, size_t size);

#endif
