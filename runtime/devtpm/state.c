/* Two-copy state file. */
#include "runtime/devtpm/state.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define MARK 0x314D5054564544ull /* "DEVTPM1" */

struct head {
    uint64_t mark, generation, size, checksum;
};

/* FNV-1a, 64 bits: finds a torn write; it protects against nothing else, and need not. */
static uint64_t checksum(const struct head *head, const uint8_t *bytes)
{
    uint64_t sum = 14695981039346656037ull;
    const uint8_t *at = (const uint8_t *)&head->generation;
    for (size_t i = 0; i < 16; i++) {
        sum = (sum ^ at[i]) * 1099511628211ull;
    }
    for (uint64_t i = 0; i < head->size; i++) {
        sum = (sum ^ bytes[i]) * 1099511628211ull;
    }
    return sum;
}

/* 0: no good copy here. */
static uint64_t copy_read(int fd, unsigned copy, uint8_t *bytes, size_t *ret_size)
{
    struct head head;
    off_t at = (off_t)copy * CM_STATE_COPY_BYTES;
    if (pread(fd, &head, sizeof(head), at) != (ssize_t)sizeof(head) || head.mark != MARK ||
        head.size > CM_STATE_BYTES_MAX ||
        pread(fd, bytes, head.size, at + (off_t)sizeof(head)) != (ssize_t)head.size ||
        checksum(&head, bytes) != head.checksum) {
        return 0;
    }
    *ret_size = head.size;
    return head.generation;
}

enum cm_status cm_state_load(struct cm_state_file *file, uint8_t *ret_bytes, size_t *ret_size,
                             struct cm_error *err)
{
    uint64_t generations[2];
    size_t size = 0;
    for (unsigned copy = 0; copy < 2; copy++) {
        generations[copy] = copy_read(file->fd, copy, ret_bytes, &size);
    }
    unsigned newest = generations[1] > generations[0] ? 1 : 0;
    file->generation = copy_read(file->fd, newest, ret_bytes, &size);
    if (file->generation == 0 && lseek(file->fd, 0, SEEK_END) > 0) {
        return cm_error_set(
            err, CM_E_TPM, "CM-TPM-STATE",
            "development TPM: both copies of its state are damaged: restore the file, "
            "or remove it and enrol the node again");
    }
    *ret_size = file->generation == 0 ? 0 : size;
    return CM_OK;
}

static bool write_all(int fd, const void *bytes, size_t size, off_t at)
{
    for (size_t done = 0; done < size;) {
        ssize_t put = pwrite(fd, (const char *)bytes + done, size - done, at + (off_t)done);
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            return false;
        }
        done += (size_t)put;
    }
    return true;
}

enum cm_status cm_state_store(struct cm_state_file *file, const uint8_t *bytes, size_t size,
                              struct cm_error *err)
{
    struct head head = {.mark = MARK, .generation = file->generation + 1, .size = size};
    off_t at = (off_t)(head.generation % 2) * CM_STATE_COPY_BYTES;
    if (size > CM_STATE_BYTES_MAX) {
        return cm_error_set(err, CM_E_TPM, "CM-TPM-STATE", "development TPM: state of %zu bytes",
                            size);
    }
    head.checksum = checksum(&head, bytes);
    if (!write_all(file->fd, bytes, size, at + (off_t)sizeof(head)) ||
        !write_all(file->fd, &head, sizeof(head), at) || fsync(file->fd) != 0) {
        return cm_error_errno(err, errno, "CM-TPM-STATE",
                              "development TPM: cannot write its state");
    }
    file->generation = head.generation;
    return CM_OK;
}
