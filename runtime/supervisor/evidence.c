/* The service's own evidence: asked for at start and again and again; without it nothing is ready.
 * Quotes for clients are passed on between gateway and keeper, one at a time. */
#include <string.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

bool evidence_fresh(const struct service *service, uint64_t now)
{
    return service->evidence_ms != 0 &&
           now - service->evidence_ms <= service->configuration->evidence_lifetime_ms;
}

static void evidence_request(struct service *service, uint64_t now)
{
    const struct cm_quote_request request = {.kind = CM_QUOTE_BOOT};
    service->quote_pending = true;
    service->quote_asked_ms = now;
    service->evidence_due = false;
    frame_send(service, &service->children[CHILD_KEEPER], CM_FRAME_QUOTE, &request, sizeof(request),
               NULL, 0);
}

/* Due: nothing is on its way, and the last is older than the interval, or of other adapters. */
void evidence_tick(struct service *service, uint64_t now)
{
    bool loaded = service->loaded.bytes != 0 && service->phase == SERVICE_RUN;
    bool old = service->evidence_ms == 0 || service->evidence_due ||
               now - service->evidence_ms >= service->configuration->evidence_refresh_ms;
    /* A try that brings nothing is repeated after the same patience as any answer of the keeper. */
    bool waiting = service->quote_pending && now - service->quote_asked_ms < ANSWER_WAIT_MS;
    if (loaded && old && !waiting && service->children[CHILD_KEEPER].state == CHILD_SERVING &&
        adapters_told(service)) {
        evidence_request(service, now);
    }
    if (service->state.ready == 1 && !evidence_fresh(service, now)) {
        state_reason_set(service, "evidence_stale");
        CM_LOG(&service->log, CM_LOG_ERROR, "evidence_stale",
               CM_LOG_I("age_ms", now - service->evidence_ms));
        state_send(service, true);
    }
}

/* Beside the status: what `casemate-verify` reads. */
static void evidence_write(struct service *service, int fd, uint32_t bytes)
{
    static uint8_t copy[CM_EVIDENCE_BYTES_MAX];
    if (bytes <= sizeof(copy) && pread(fd, copy, bytes, 0) == (ssize_t)bytes) {
        run_file_write(service, "evidence.bin", copy, bytes);
    }
}

void on_evidence(struct service *service)
{
    struct cm_evidence_info info;
    memcpy(&info, service->frame.payload, sizeof(info));
    if (info.id != 0) {
        service->client_quote = 0;
        frame_send(service, &service->children[CHILD_GATEWAY], CM_FRAME_EVIDENCE, &info,
                   sizeof(info), service->frame.fds, 1);
        return;
    }
    service->quote_pending = false;
    service->evidence_ms = clock_ms();
    evidence_write(service, service->frame.fds[0], info.bytes);
    CM_LOG(&service->log, CM_LOG_INFO, "evidence", CM_LOG_I("bytes", info.bytes),
           CM_LOG_I("took_ms", service->evidence_ms - service->quote_asked_ms));
    ready_check(service);
}

void on_quote_failed(struct service *service)
{
    struct cm_quote_failed failed;
    memcpy(&failed, service->frame.payload, sizeof(failed));
    cm_error_sanitise(&failed.error);
    cm_log_error(&service->log, "quote_failed", &failed.error);
    service->evidence_due = service->evidence_due || failed.id == 0;
    if (failed.id != 0) {
        service->client_quote = 0;
        frame_send(service, &service->children[CHILD_GATEWAY], CM_FRAME_QUOTE_FAILED, &failed,
                   sizeof(failed), NULL, 0);
    }
}

static void quote_refuse(struct service *service, uint64_t id, const char *why)
{
    struct cm_quote_failed failed = {.id = id};
    cm_error_set(&failed.error, CM_E_BUSY, "CM-SUP-KEEPER", "%s", why);
    frame_send(service, &service->children[CHILD_GATEWAY], CM_FRAME_QUOTE_FAILED, &failed,
               sizeof(failed), NULL, 0);
}

void evidence_keeper_lost(struct service *service)
{
    service->evidence_due = service->evidence_due || service->quote_pending;
    service->quote_pending = false;
    if (service->client_quote != 0) {
        quote_refuse(service, service->client_quote, "the keeper was lost while it made the quote");
        service->client_quote = 0;
    }
}

/* A client's nonce, on its way to the keeper. */
void on_quote(struct service *service)
{
    struct cm_quote_request request;
    struct child *keeper = &service->children[CHILD_KEEPER];
    uint64_t now = clock_ms();
    memcpy(&request, service->frame.payload, sizeof(request));
    request.kind = CM_QUOTE_SESSION; /* whatever the gateway says: it may be taken over */
    bool waiting = service->client_quote != 0 && now - service->client_quote_ms < ANSWER_WAIT_MS;
    bool told = adapters_told(service);
    if (request.id == 0 || keeper->state != CHILD_SERVING || waiting || !told) {
        quote_refuse(service, request.id,
                     waiting ? "another quote is being made"
                     : told  ? "there is no keeper now"
                             : "the keeper does not know all adapters yet");
        return;
    }
    service->client_quote = request.id;
    service->client_quote_ms = now;
    frame_send(service, keeper, CM_FRAME_QUOTE, &request, sizeof(request), NULL, 0);
}
