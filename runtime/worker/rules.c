/* The guard's rules: compiled by the supervisor, measured before the unseal, read here once. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/base/guard_pack.h"
#include "runtime/worker/worker.h"

#define RULES_WAIT_MS 10000

/* Nobody may change them any more: they are what was measured. */
static enum cm_status rules_read(struct cm_worker *worker, int fd, uint32_t bytes,
                                 struct cm_error *err)
{
    const int wanted = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
    uint32_t used = 0;
    ssize_t got = 1;
    if (bytes == 0 || bytes > CM_GUARD_PACK_BYTES_MAX ||
        (fcntl(fd, F_GET_SEALS) & wanted) != wanted) {
        return cm_error_set(err, CM_E_BUG, "CM-WRK-RULES",
                            "the rule pack of %u bytes is not sealed, or too large", bytes);
    }
    worker->rules = malloc(bytes);
    if (worker->rules == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "rule pack");
    }
    while (used < bytes && got > 0) {
        got = pread(fd, worker->rules + used, bytes - used, (off_t)used);
        used += got > 0 ? (uint32_t)got : 0;
    }
    worker->rules_bytes = used;
    return used == bytes ? CM_OK
                         : cm_error_errno(err, got < 0 ? errno : EIO, "CM-WRK-RULES",
                                          "cannot read the rule pack");
}

enum cm_status cm_worker_rules_take(struct cm_worker *worker, struct cm_error *err)
{
    static struct cm_frame frame;
    struct cm_rules_info info;
    if (worker->config.guard != 1) {
        return CM_OK;
    }
    enum cm_status status = cm_channel_wait(&worker->channel, &frame, RULES_WAIT_MS, err);
    if (status != CM_OK) {
        return status;
    }
    if (frame.type != CM_FRAME_RULES) {
        cm_frame_close_fds(&frame);
        return cm_error_set(err, CM_E_BUG, "CM-WRK-RULES", "frame %u came instead of the rules",
                            frame.type);
    }
    memcpy(&info, frame.payload, sizeof(info));
    status = rules_read(worker, frame.fds[0], info.bytes, err);
    cm_frame_close_fds(&frame);
    return status;
}
