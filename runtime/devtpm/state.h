/* The development TPM's state file: two copies in one file, so that a torn write loses nothing.
 *
 * Copy k lies at k * CM_STATE_COPY_BYTES: u64 mark · u64 generation · u64 size · u64 checksum ·
 * bytes. A write goes to the copy that is not the newest, then syncs. */
#ifndef CASEMATE_RUNTIME_DEVTPM_STATE_H
#define CASEMATE_RUNTIME_DEVTPM_STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"

#define CM_STATE_COPY_BYTES (256u << 10)
#define CM_STATE_BYTES_MAX  (CM_STATE_COPY_BYTES - 32u)

struct cm_state_file {
    int fd;
    uint64_t generation; /* of the newest copy; 0: none yet */
};

/* Read the newest good copy into ret_bytes (room CM_STATE_BYTES_MAX); size 0 if the file is new.
 * Fails: TPM if the file has content but no good copy. */
CM_MUST_USE enum cm_status cm_state_load(struct cm_state_file *file, uint8_t *ret_bytes,
                                         size_t *ret_size, struct cm_error *err);
CM_MUST_USE enum cm_status cm_state_store(struct cm_state_file *file, const uint8_t *bytes,
                                          size_t size, struct cm_error *err);

#endif
