/* Guarded secret memory and key pages. */
#include "runtime/base/secret.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SECRET_BYTES_MAX (1u << 20)

/* Lives at the start of the mapping's first data page; the secret follows it. The mapping is
 * [guard page][data pages][guard page]. */
struct cm_secret {
    size_t size;
    size_t mapped; /* with both guard pages */
    uint8_t bytes[];
};

static size_t page_bytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

void cm_wipe(void *bytes, size_t size)
{
    if (size > 0) {
        explicit_bzero(bytes, size);
    }
}

bool cm_ct_equal(const void *a, const void *b, size_t size)
{
    const volatile uint8_t *left = a;
    const volatile uint8_t *right = b;
    uint8_t difference = 0;
    for (size_t i = 0; i < size; i++) {
        difference = (uint8_t)(difference | (left[i] ^ right[i]));
    }
    return difference == 0;
}

enum cm_status cm_secret_new(size_t size, struct cm_secret **ret_secret, struct cm_error *err)
{
    CM_ASSERT(size > 0 && size <= SECRET_BYTES_MAX);
    size_t page = page_bytes();
    size_t data = (sizeof(struct cm_secret) + size + page - 1) / page * page;
    size_t mapped = data + 2 * page;
    uint8_t *base = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        return cm_error_errno(err, errno, "CM-SYS-MMAP", "no memory for a secret of %zu bytes",
                              size);
    }
    uint8_t *start = base + page;
    if (mprotect(start, data, PROT_READ | PROT_WRITE) != 0 || mlock(start, data) != 0 ||
        madvise(start, data, MADV_DONTDUMP) != 0 || madvise(start, data, MADV_WIPEONFORK) != 0) {
        int error_number = errno;
        munmap(base, mapped);
        return cm_error_errno(err, error_number, "CM-SYS-SECRET",
                              "cannot lock %zu bytes for a secret (raise RLIMIT_MEMLOCK)", data);
    }
    struct cm_secret *secret = (struct cm_secret *)start;
    secret->size = size;
    secret->mapped = mapped;
    *ret_secret = secret;
    return CM_OK;
}

void cm_secret_free(struct cm_secret *secret)
{
    if (secret == NULL) {
        return;
    }
    size_t mapped = secret->mapped;
    cm_wipe(secret->bytes, secret->size);
    munmap((uint8_t *)secret - page_bytes(), mapped);
}

uint8_t *cm_secret_bytes(struct cm_secret *secret)
{
    return secret->bytes;
}

const uint8_t *cm_secret_view(const struct cm_secret *secret)
{
    return secret->bytes;
}

size_t cm_secret_size(const struct cm_secret *secret)
{
    return secret->size;
}

enum cm_status cm_key_page_new(int *ret_fd, bool *ret_secret_memory, struct cm_error *err)
{
    bool secret_memory = true;
    int fd = (int)syscall(SYS_memfd_secret, O_CLOEXEC);
    if (fd < 0) {
        /* Kernels before 6.5 need secretmem.enable=1 on the command line. */
        secret_memory = false;
        fd = memfd_create("casemate-key-page", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    }
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-SYS-KEYPAGE", "cannot make a key page");
    }
    if (ftruncate(fd, CM_KEY_PAGE_BYTES) != 0) {
        int error_number = errno;
        close(fd);
        return cm_error_errno(err, error_number, "CM-SYS-KEYPAGE", "cannot size a key page");
    }
    if (!secret_memory) {
        (void)fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    }
    *ret_fd = fd;
    *ret_secret_memory = secret_memory;
    return CM_OK;
}

enum cm_status cm_key_page_map(int fd, uint8_t **ret_bytes, struct cm_error *err)
{
    enum cm_status status = cm_key_page_map_late(fd, ret_bytes, err);
    if (status == CM_OK) {
        /* memfd_secret pages are locked by nature; this holds for the memfd fallback. */
        (void)mlock(*ret_bytes, CM_KEY_PAGE_BYTES);
        (void)madvise(*ret_bytes, CM_KEY_PAGE_BYTES, MADV_DONTDUMP);
    }
    return status;
}

enum cm_status cm_key_page_map_late(int fd, uint8_t **ret_bytes, struct cm_error *err)
{
    uint8_t *bytes = mmap(NULL, CM_KEY_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED) {
        return cm_error_errno(err, errno, "CM-SYS-KEYPAGE", "cannot map the key page");
    }
    *ret_bytes = bytes;
    return CM_OK;
}

void cm_key_page_unmap(uint8_t *bytes)
{
    if (bytes != NULL) {
        munmap(bytes, CM_KEY_PAGE_BYTES);
    }
}
