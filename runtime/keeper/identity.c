/* The TLS identity is the service's, not the keeper's. Where another keeper may follow, the first
 * one leaves it with the supervisor: key in a page that the supervisor holds and never maps, as it
 * does with the pages that it passes on. So evidence names the key that the gateway serves with,
 * whichever keeper made it, and neither a connection nor a client that has pinned the certificate
 * notices that a keeper died. Where none may follow (strict mode, a real TPM), nothing is left. */
#include "runtime/keeper/keeper.h"

#include <string.h>

#define WAIT_MS 10000

static enum cm_status identity_take(struct cm_keeper *keeper, struct cm_frame *frame,
                                    struct cm_error *err)
{
    static struct cm_tls_page certificate;
    struct cm_page *page = &keeper->identity_page;
    enum cm_status status = cm_channel_wait(&keeper->channel, frame, WAIT_MS, err);
    if (status == CM_OK && frame->type != CM_FRAME_TLS_IDENTITY) {
        cm_frame_close_fds(frame);
        status = cm_error_set(err, CM_E_BUG, "CM-KEEPER-CONFIG",
                              "frame %u came instead of the TLS identity", frame->type);
    }
    if (status == CM_OK) {
        memcpy(&certificate, frame->payload, sizeof(certificate));
        page->fd = frame->fds[0];
        frame->fd_count = 0; /* taken */
        status = cm_key_page_map(page->fd, &page->bytes, err);
    }
    return status == CM_OK ? cm_tls_identity_take(page->bytes, &certificate, &keeper->tls, err)
                           : status;
}

enum cm_status cm_keeper_identity(struct cm_keeper *keeper, struct cm_frame *frame,
                                  struct cm_error *err)
{
    uint32_t names = keeper->config.tls_name_count;
    if (keeper->config.tls_given == 1) {
        return identity_take(keeper, frame, err);
    }
    if (names > sizeof(keeper->config.tls_names) / sizeof(keeper->config.tls_names[0])) {
        return cm_error_set(err, CM_E_BUG, "CM-KEEPER-CONFIG", "too many names");
    }
    return cm_tls_identity_make(keeper->config.tls_names, names, &keeper->tls, err);
}

enum cm_status cm_keeper_identity_leave(struct cm_keeper *keeper, struct cm_error *err)
{
    static struct cm_tls_page frame;
    struct cm_page *page = &keeper->identity_page;
    if (!cm_keeper_replaceable(&keeper->config) || keeper->config.tls_given == 1) {
        return CM_OK;
    }
    enum cm_status status = cm_keeper_page_make(page, err);
    if (status != CM_OK) {
        return status;
    }
    memcpy(page->bytes, cm_secret_view(keeper->tls.key), cm_secret_size(keeper->tls.key));
    frame.certificate_bytes = keeper->tls.certificate_bytes;
    memcpy(frame.certificate, keeper->tls.certificate, keeper->tls.certificate_bytes);
    return cm_channel_send(&keeper->channel, CM_FRAME_TLS_IDENTITY, &frame, sizeof(frame),
                           &page->fd, 1, err);
}
