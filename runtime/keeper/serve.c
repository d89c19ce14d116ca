/* The keeper's life after the unseal: answer two requests, check one promise. */
#include "runtime/keeper/keeper.h"
#include "runtime/base/clock.h"

#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#define RATE_WINDOW_US 60000000ull /* at most 8 hand-outs a minute: a crash loop gains nothing */
#define HEAP_BYTES     (4 << 20)   /* TPM commands and quotes take some ten KiB */

enum cm_status cm_keeper_rate_check(struct cm_keeper_rate *rate, struct cm_error *err)
{
    uint64_t *oldest = &rate->at_us[rate->next % CM_KEEPER_RATE_COUNT];
    uint64_t now = cm_clock_us();
    if (*oldest != 0 && now - *oldest < RATE_WINDOW_US) {
        return cm_error_set(err, CM_E_BUSY, "CM-KEEPER-RATE",
                            "more than %u key pages a minute: the worker is in a crash loop",
                            CM_KEEPER_RATE_COUNT);
    }
    *oldest = now;
    rate->next++;
    return CM_OK;
}

enum cm_status cm_keeper_page_make(struct cm_page *page, struct cm_error *err)
{
    enum cm_status status = cm_key_page_new(&page->fd, &page->secret_memory, err);
    return status == CM_OK ? cm_key_page_map(page->fd, &page->bytes, err) : status;
}

enum cm_status cm_keeper_prepare(struct cm_keeper *keeper, struct cm_error *err)
{
    enum cm_status status = cm_keeper_page_make(&keeper->key_page, err);
    if (status == CM_OK) {
        status = cm_keeper_page_make(&keeper->tls_page, err);
    }
    if (status == CM_OK) {
        status = cm_keeper_evidence_prepare(keeper, err);
    }
    if (status == CM_OK) {
        status = cm_keeper_adapters_prepare(keeper, err);
    }
    if (status == CM_OK) {
        status = cm_keeper_identity_leave(keeper, err);
    }
    /* From here on malloc only takes from what is there and never gives back. */
    if (mallopt(M_TRIM_THRESHOLD, INT32_MAX) != 1 || mallopt(M_MMAP_THRESHOLD, HEAP_BYTES) != 1) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-KEEPER-HEAP", "cannot fix the heap's size");
    }
    void *heap = malloc(HEAP_BYTES / 2);
    if (heap == NULL) {
        return cm_error_errno(err, errno, "CM-KEEPER-HEAP", "no memory for the heap");
    }
    free(heap);
    return status;
}

static enum cm_status key_hand_out(struct cm_keeper *keeper, uint32_t generation,
                                   struct cm_error *err)
{
    struct cm_page *page = &keeper->key_page;
    struct cm_key_page_info info = {generation, page->secret_memory};
    enum cm_status status = cm_keeper_rate_check(&keeper->rate, err);
    if (status == CM_OK) {
        status = cm_keeper_boot_check(keeper, err);
    }
    cm_wipe(page->bytes, CM_KEY_PAGE_BYTES); /* a worker that died before LOADED left it full */
    if (status != CM_OK) {
        return status;
    }
    memcpy(page->bytes, cm_secret_view(keeper->package_key), CM_KEY_BYTES);
    status = cm_channel_send(&keeper->channel, CM_FRAME_KEY_PAGE, &info, sizeof(info), &page->fd, 1,
                             err);
    keeper->handed_generation = generation;
    CM_LOG(&keeper->log, CM_LOG_INFO, "key_page", CM_LOG_I("generation", generation),
           CM_LOG_S("memory", page->secret_memory ? "memfd_secret" : "memfd"));
    return status;
}

static enum cm_status tls_hand_out(struct cm_keeper *keeper, uint32_t generation,
                                   struct cm_error *err)
{
    static struct cm_tls_page frame;
    struct cm_page *page = &keeper->tls_page;
    /* The first follows the unseal, which has just looked. */
    enum cm_status status = keeper->tls_handed ? cm_keeper_boot_check(keeper, err) : CM_OK;
    cm_wipe(page->bytes, CM_KEY_PAGE_BYTES);
    if (status != CM_OK) {
        return status;
    }
    keeper->tls_handed = true;
    /* The gateway wipes it; the key stays here in its own secret. */
    memcpy(page->bytes, cm_secret_view(keeper->tls.key), cm_secret_size(keeper->tls.key));
    frame.generation = generation;
    frame.certificate_bytes = keeper->tls.certificate_bytes;
    memcpy(frame.certificate, keeper->tls.certificate, keeper->tls.certificate_bytes);
    return cm_channel_send(&keeper->channel, CM_FRAME_TLS_PAGE, &frame, sizeof(frame), &page->fd, 1,
                           err);
}

void cm_keeper_page_check(struct cm_keeper *keeper)
{
    static const uint8_t zeros[CM_KEY_PAGE_BYTES];
    if (!cm_ct_equal(keeper->key_page.bytes, zeros, sizeof(zeros))) {
        CM_LOG(&keeper->log, CM_LOG_ERROR, "key_page_not_wiped",
               CM_LOG_I("generation", keeper->handed_generation));
    }
    cm_wipe(keeper->key_page.bytes, CM_KEY_PAGE_BYTES);
}

/* A quote that fails is an answer; a reset is the end. */
static enum cm_status quote_answer(struct cm_keeper *keeper, const struct cm_frame *frame,
                                   struct cm_error *err)
{
    struct cm_quote_request request;
    struct cm_quote_failed failed = {.id = 0};
    int fd = -1;
    uint32_t bytes = 0;
    memcpy(&request, frame->payload, sizeof(request));
    enum cm_status status = cm_keeper_evidence(keeper, &request, &fd, &bytes, err);
    if (status == CM_OK) {
        const struct cm_evidence_info info = {.id = request.id, .bytes = bytes};
        return cm_channel_send(&keeper->channel, CM_FRAME_EVIDENCE, &info, sizeof(info), &fd, 1,
                               err);
    }
    if (status == CM_E_POLICY) {
        return status;
    }
    failed.id = request.id;
    failed.error = *err;
    return cm_channel_send(&keeper->channel, CM_FRAME_QUOTE_FAILED, &failed, sizeof(failed), NULL,
                           0, err);
}

static enum cm_status frame_take(struct cm_keeper *keeper, struct cm_frame *frame, bool *ret_stop,
                                 struct cm_error *err)
{
    struct cm_key_request request;
    switch (frame->type) {
    case CM_FRAME_KEY_REQUEST:
        memcpy(&request, frame->payload, sizeof(request));
        return key_hand_out(keeper, request.generation, err);
    case CM_FRAME_TLS_REQUEST:
        memcpy(&request, frame->payload, sizeof(request));
        return tls_hand_out(keeper, request.generation, err);
    case CM_FRAME_QUOTE:
        return quote_answer(keeper, frame, err);
    case CM_FRAME_LOADED:
        cm_keeper_page_check(keeper);
        return keeper->config.strict == 1 && !keeper->capped ? cm_keeper_cap(keeper, err) : CM_OK;
    case CM_FRAME_ADAPTER_OPEN:
        return cm_keeper_adapter_open(keeper, frame, err);
    case CM_FRAME_ADAPTER_KEY:
        return cm_keeper_adapter_key(keeper, frame, err);
    case CM_FRAME_ADAPTER_CLOSE:
        cm_keeper_adapter_close(keeper, frame);
        return CM_OK;
    case CM_FRAME_STOP:
        *ret_stop = true;
        return CM_OK;
    default:
        return cm_error_set(err, CM_E_BUG, "CM-KEEPER-FRAME", "frame %u has no handler",
                            frame->type);
    }
}

enum cm_status cm_keeper_serve(struct cm_keeper *keeper, struct cm_error *err)
{
    static struct cm_frame frame;
    bool stop = false;
    uint64_t counter = 0;
    while (!stop) {
        enum cm_status status = cm_channel_wait(&keeper->channel, &frame, 1000, err);
        if (status == CM_OK) {
            status = frame_take(keeper, &frame, &stop, err);
        } else if (status == CM_E_SYSTEM && err->subcode == EPIPE) {
            return CM_OK;
        } else if (status == CM_E_BUSY) {
            struct cm_heartbeat heartbeat = {.counter = counter++};
            status = cm_channel_send(&keeper->channel, CM_FRAME_HEARTBEAT, &heartbeat,
                                     sizeof(heartbeat), NULL, 0, err);
        }
        if (status != CM_OK) {
            return status;
        }
    }
    return CM_OK;
}

void cm_keeper_wipe(struct cm_keeper *keeper, bool over)
{
    cm_keeper_adapters_wipe(keeper);
    uint8_t *const pages[] = {keeper->key_page.bytes, keeper->tls_page.bytes,
                              over ? keeper->identity_page.bytes : NULL};
    struct cm_secret *const secrets[] = {keeper->package_key, keeper->tls.key};
    for (size_t i = 0; i < sizeof(pages) / sizeof(pages[0]); i++) {
        if (pages[i] != NULL) {
            cm_wipe(pages[i], CM_KEY_PAGE_BYTES);
        }
    }
    for (size_t i = 0; i < sizeof(secrets) / sizeof(secrets[0]); i++) {
        if (secrets[i] != NULL) {
            cm_wipe(cm_secret_bytes(secrets[i]), cm_secret_size(secrets[i]));
        }
    }
}
