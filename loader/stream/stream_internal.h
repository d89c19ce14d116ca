/* Inside of the loader: where segments come from and what opens them, so that tests and twin arms
 * (the same layout, not encrypted) can put other parts in. */
#ifndef CASEMATE_LOADER_STREAM_STREAM_INTERNAL_H
#define CASEMATE_LOADER_STREAM_STREAM_INTERNAL_H

#include <sys/types.h>

#include "loader/stream/stream.h"

struct cm_stream_source {
    int fd;
    uint64_t payload_offset, payload_bytes;
    uint64_t segment_bytes;
    uint64_t keep_bytes_max; /* a payload above it leaves the page cache behind the load */
    ssize_t (*read)(int fd, void *bytes, size_t size, off_t offset); /* pread */
    /* Both NULL: the payload is not encrypted. They see whole segments from `first` on. */
    enum cm_status (*verify)(void *context, uint64_t first, uint64_t count,
                             const uint8_t *ciphertext, struct cm_error *err);
    enum cm_status (*decrypt)(void *context, uint64_t index, const uint8_t *ciphertext,
                              size_t bytes, uint8_t *plaintext, struct cm_error *err);
    void *context;
};

void cm_stream_package_source(const struct cm_package *package, int fd,
                              struct cm_stream_source *ret_source);
/* What cm_stream_load does for a package's source. */
CM_MUST_USE enum cm_status cm_stream_run(const struct cm_stream_source *source,
                                         struct cm_device *device,
                                         const struct cm_stream_options *options,
                                         struct cm_stream_times *ret_times, struct cm_error *err);

#endif
