/* Stream a package's payload into a device: read into its place, hash, check the tag, decrypt
 * there.
 *
 * Worker only. pread, never mmap; any failure leaves the device poisoned and wiped (device.h). */
#ifndef CASEMATE_LOADER_STREAM_STREAM_H
#define CASEMATE_LOADER_STREAM_STREAM_H

#include "kernels/device.h"
#include "loader/package/package.h"

struct cm_stream_times { /* read, verify and decrypt are sums over the threads */
    uint64_t read_us;
    uint64_t verify_us;  /* SHA-256 */
    uint64_t decrypt_us; /* with the tag */
    uint64_t total_us;
    uint64_t bytes;
};

/* Called between two runs of segments by the calling thread, and at the end. */
typedef void (*cm_stream_progress)(void *context, uint64_t bytes_done, uint64_t bytes_total);

struct cm_stream_options {
    uint32_t threads;            /* the caller is one of them; 0 is 1 */
    cm_stream_progress progress; /* may be NULL */
    void *progress_context;
    const volatile int *stop; /* may be NULL; not 0: give up with CM_E_BUSY and wipe */
};

/* Device must be reserved. Ends with cm_device_load_finish. */
CM_MUST_USE enum cm_status cm_stream_load(const struct cm_package *package, int fd,
                                          struct cm_device *device,
                                          const struct cm_stream_options *options,
                                          struct cm_stream_times *ret_times, struct cm_error *err);

#endif
