/* Stream a package's payload into a device: read → (hash, tag, decrypt by the device) → in place.
 *
 * Worker only. pread into a staging buffer of a few segments, never mmap; any failure leaves the
 * device poisoned and wiped (device.h). Ciphertext is dropped from the page cache behind. */
#ifndef CASEMATE_LOADER_STREAM_STREAM_H
#define CASEMATE_LOADER_STREAM_STREAM_H

#include "kernels/device.h"
#include "loader/package/package.h"

struct cm_stream_times {
    uint64_t read_us;
    uint64_t verify_us;  /* SHA-256 */
    uint64_t decrypt_us; /* with the tag */
    uint64_t total_us;
    uint64_t bytes;
};

/* Called after each segment. */
typedef void (*cm_stream_progress)(void *context, uint64_t bytes_done, uint64_t bytes_total);

/* Device must be reserved. Ends with cm_device_load_finish. `stop` (may be NULL) is read between
 * segments: non-zero gives up with CM_E_BUSY and wipes. */
CM_MUST_USE enum cm_status cm_stream_load(const struct cm_package *package, int fd,
                                          struct cm_device *device, uint32_t threads,
                                          cm_stream_progress progress, void *progress_context,
                                          const volatile int *stop,
                                          struct cm_stream_times *ret_times, struct cm_error *err);

#endif
