/* A pair of rings, and what each side may do with it. */
#include "runtime/base/ring.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

void rings_init(struct ring_set *rings)
{
    *rings = (struct ring_set){-1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
}

void rings_close(struct ring_set *rings)
{
    const int fds[] = {rings->request_data,    rings->request_data_read,
                       rings->request_cursor,  rings->request_cursor_read,
                       rings->response_data,   rings->response_data_read,
                       rings->response_cursor, rings->response_cursor_read,
                       rings->request_event,   rings->response_event};
    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    rings_init(rings);
}

enum cm_status rings_make(uint32_t capacity, struct ring_set *ret_rings, struct cm_error *err)
{
    struct ring_set rings;
    rings_init(&rings);
    enum cm_status status = cm_ring_make(capacity, &rings.request_data, &rings.request_data_read,
                                         &rings.request_cursor, &rings.request_cursor_read, err);
    if (status == CM_OK) {
        status = cm_ring_make(capacity, &rings.response_data, &rings.response_data_read,
                              &rings.response_cursor, &rings.response_cursor_read, err);
    }
    if (status == CM_OK) {
        rings.request_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        rings.response_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (rings.request_event < 0 || rings.response_event < 0) {
            status = cm_error_errno(err, errno, "CM-SUP-RINGS", "cannot make ring events");
        }
    }
    if (status != CM_OK) {
        rings_close(&rings);
        return status;
    }
    *ret_rings = rings;
    return CM_OK;
}

void rings_view_gateway(const struct ring_set *rings, int ret_fds[static CM_RING_FD_COUNT])
{
    ret_fds[0] = rings->request_data;
    ret_fds[1] = rings->request_cursor_read;
    ret_fds[2] = rings->response_data_read;
    ret_fds[3] = rings->response_cursor;
    ret_fds[4] = rings->request_event;
    ret_fds[5] = rings->response_event;
}

void rings_view_worker(const struct ring_set *rings, int ret_fds[static CM_RING_FD_COUNT])
{
    ret_fds[0] = rings->request_data_read;
    ret_fds[1] = rings->request_cursor;
    ret_fds[2] = rings->response_data;
    ret_fds[3] = rings->response_cursor_read;
    ret_fds[4] = rings->request_event;
    ret_fds[5] = rings->response_event;
}
