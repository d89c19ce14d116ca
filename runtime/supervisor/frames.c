/* What children say, and what the supervisor says back. Anything outside the protocol's table, or
 * inside it but not asked for, ends the child. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "runtime/supervisor/supervisor_internal.h"

void frame_send(struct service *service, struct child *child, enum cm_frame_type type,
                const void *payload, size_t bytes, const int *fds, size_t fd_count)
{
    struct cm_error err;
    if (!child_alive(child)) {
        return;
    }
    enum cm_status status =
        cm_channel_send(&child->channel, type, payload, bytes, fds, fd_count, &err);
    /* A closed channel is followed by the child's death, which says more. */
    if (status != CM_OK && !(status == CM_E_SYSTEM && err.subcode == EPIPE)) {
        cm_error_wrap(&err, "%s", child->name);
        child_kill(service, child, CM_ROLE_END_STUCK, &err);
    }
}

void state_reason_set(struct service *service, const char *reason)
{
    snprintf(service->state.reason, sizeof(service->state.reason), "%s", reason);
    service->state.ready = reason[0] == '\0';
    service->state_dirty = true;
}

/* The gateway learns of a change; not more often than each 100 ms unless `now`. */
void state_send(struct service *service, bool now)
{
    struct child *gateway = &service->children[CHILD_GATEWAY];
    struct cm_error err;
    uint64_t at = clock_ms();
    if (!child_alive(gateway) || !gateway->keyed || !service->state_dirty ||
        (!now && at - service->state_sent_ms < 100)) {
        return;
    }
    service->state.worker_generation = service->children[CHILD_WORKER].generation;
    service->state.worker_restarts = service->children[CHILD_WORKER].restarts;
    service->state.gateway_restarts = gateway->restarts;
    enum cm_status status = cm_channel_send(&gateway->channel, CM_FRAME_STATE, &service->state,
                                            sizeof(service->state), NULL, 0, &err);
    if (status == CM_OK) { /* else: again with the next tick */
        service->state_dirty = false;
        service->state_sent_ms = at;
    }
}

static void violation(struct service *service, struct child *child, const char *what)
{
    struct cm_error err;
    cm_error_set(&err, CM_E_INPUT, "CM-FRAME-PROTOCOL", "%s broke the control protocol: %s",
                 child->name, what);
    child_kill(service, child, CM_ROLE_END_PROTOCOL, &err);
}

static void announce(struct service *service)
{
    const struct cm_configuration *configuration = service->configuration;
    uint64_t resident = 0;
    char context[32];
    const char *slash = strrchr(configuration->package, '/');
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        resident += service->children[i].resident_bytes;
    }
    snprintf(context, sizeof(context), "%llu", (unsigned long long)configuration->context_max);
    printf("casemate: ready: model %s, device %s, memory %llu MiB, context %s, slots %llu, "
           "https://%s, attested: %s, %s\n",
           configuration->model_name[0] != '\0' ? configuration->model_name
           : slash != NULL                      ? slash + 1
                                                : configuration->package,
           configuration->device, (unsigned long long)(resident >> 20),
           configuration->context_max != 0 ? context : "of the model",
           (unsigned long long)configuration->sequences_max, service->address,
           service->keeper_config.development_tpm == 1 ? "development TPM (protects nothing)"
                                                       : configuration->tpm,
           cm_config_attest_mode(configuration));
    fflush(stdout);
}

/* Ready: both serve, and the evidence is fresh. */
void ready_check(struct service *service)
{
    uint64_t now = clock_ms();
    bool serving = service->children[CHILD_WORKER].state == CHILD_SERVING &&
                   service->children[CHILD_GATEWAY].state == CHILD_SERVING;
    if (!serving || service->phase != SERVICE_RUN) {
        return;
    }
    if (!evidence_fresh(service, now)) {
        state_reason_set(service, service->evidence_ms == 0 ? "no_evidence" : "evidence_stale");
        return;
    }
    state_reason_set(service, "");
    state_send(service, true); /* before anybody else hears of it, and asks */
    status_write(service, now);
    if (!service->announced) {
        announce(service);
        service->announced = true;
    }
}

static void on_ready(struct service *service, struct child *child)
{
    struct cm_ready ready;
    struct cm_error err;
    uint64_t now = clock_ms();
    memcpy(&ready, service->frame.payload, sizeof(ready));
    child->probed = ready.probed;
    if (!confinement_holds(service, child, ready.probed, &err)) {
        child_kill(service, child, CM_ROLE_END_START, &err);
        return;
    }
    child->state = CHILD_SERVING;
    child->ready_ms = now;
    CM_LOG(&service->log, CM_LOG_INFO, "role_ready", CM_LOG_S("name", child->name),
           CM_LOG_I("start_ms", now - child->started_ms));
    if (child->role == CM_ROLE_WORKER) {
        service->state.load.stage = CM_LOAD_READY;
    }
    ready_check(service);
    state_send(service, true);
}

static void on_failed(struct service *service, struct child *child)
{
    struct cm_error err;
    memcpy(&err, service->frame.payload, sizeof(err));
    cm_error_sanitise(&err);
    child->error = err;
    child->error_set = true;
    cm_log_error(&service->log, "role_failed", &err);
}

static void on_progress(struct service *service)
{
    struct cm_progress progress;
    uint64_t now = clock_ms();
    memcpy(&progress, service->frame.payload, sizeof(progress));
    if (progress.stage >= CM_LOAD_READY || progress.bytes_done > progress.bytes_total) {
        violation(service, &service->children[CHILD_WORKER], "impossible progress");
        return;
    }
    service->state.load = progress;
    service->state_dirty = true;
    state_send(service, false);
    if (now - service->progress_logged_ms >= 5000) {
        service->progress_logged_ms = now;
        CM_LOG(&service->log, CM_LOG_INFO, "loading", CM_LOG_I("stage", progress.stage),
               CM_LOG_I("done_bytes", progress.bytes_done),
               CM_LOG_I("total_bytes", progress.bytes_total),
               CM_LOG_I("elapsed_us", progress.elapsed_us));
    }
}

static void on_tls_page(struct service *service, struct child *keeper)
{
    struct cm_tls_page page;
    struct child *gateway = &service->children[CHILD_GATEWAY];
    memcpy(&page, service->frame.payload, sizeof(page));
    if (!service->tls_pending || page.generation != service->tls_generation ||
        page.certificate_bytes == 0 || page.certificate_bytes > CM_CERTIFICATE_BYTES_MAX) {
        violation(service, keeper, "a TLS page that was not asked for");
        return;
    }
    service->tls_pending = false;
    service->tls = page;
    certificate_write(service);
    /* As with the worker's key: the gateway that it was for may have gone. */
    if (gateway->generation != service->tls_gateway || gateway->keyed) {
        return;
    }
    gateway->keyed = true;
    frame_send(service, gateway, CM_FRAME_TLS_PAGE, &page, sizeof(page), service->frame.fds, 1);
    if (service->keys_fd >= 0) {
        frame_send(service, gateway, CM_FRAME_KEYS, &service->keys_info, sizeof(service->keys_info),
                   &service->keys_fd, 1);
    }
    service->state_dirty = true;
    state_send(service, true);
}

/* The page stays unmapped here, as those that are passed on. */
static void on_tls_identity(struct service *service, struct child *keeper)
{
    if (!cm_keeper_replaceable(&service->keeper_config) || service->identity_fd >= 0) {
        violation(service, keeper, "a TLS identity that cannot be its own");
        return;
    }
    memcpy(&service->tls, service->frame.payload, sizeof(service->tls));
    service->identity_fd = service->frame.fds[0];
    service->frame.fd_count = 0; /* taken */
}

static void on_key_page(struct service *service, struct child *keeper)
{
    struct cm_key_page_info info;
    struct child *worker = &service->children[CHILD_WORKER];
    memcpy(&info, service->frame.payload, sizeof(info));
    if (!service->key_pending || info.generation != service->key_generation) {
        violation(service, keeper, "a key page that was not asked for");
        return;
    }
    service->key_pending = false;
    /* The worker that it was for may have gone meanwhile: the next one has its own asked for. */
    if (worker->generation == service->key_worker && !worker->keyed) {
        worker->keyed = true;
        frame_send(service, worker, CM_FRAME_KEY_PAGE, &info, sizeof(info), service->frame.fds, 1);
    }
}

/* The worker sees no /proc: whether there is a disk to swap to is ours to know. */
const char *weights_word(const struct service *service)
{
    return service->loaded.arena_locked == 1 ? "locked" : "not locked; there is no swap";
}

/* Weights never reach a disk: memory that could is not served from. */
static bool weights_stay(const struct service *service, struct cm_error *err)
{
    if (service->loaded.arena_locked == 1 || service->sandbox.swapless) {
        return true;
    }
    (void)cm_error_set(err, CM_E_SANDBOX, "CM-SUP-SWAP",
                       "the weights could not be locked in memory, and swap may take them to a "
                       "disk: raise the memlock limit (systemd: LimitMEMLOCK), or switch swap off "
                       "for this service (cgroup memory.swap.max 0, or swapoff)");
    return false;
}

static void on_loaded(struct service *service)
{
    struct cm_error err;
    memcpy(&service->loaded, service->frame.payload, sizeof(service->loaded));
    /* The keeper counts key pages, by our count and not by the worker's word. */
    service->loaded.generation = service->key_generation;
    if (!weights_stay(service, &err)) {
        service_fail(service, &err);
        return;
    }
    frame_send(service, &service->children[CHILD_KEEPER], CM_FRAME_LOADED, &service->loaded,
               sizeof(service->loaded), NULL, 0);
    CM_LOG(&service->log, CM_LOG_INFO, "loaded", CM_LOG_I("bytes", service->loaded.bytes),
           CM_LOG_I("read_us", service->loaded.read_us),
           CM_LOG_I("verify_us", service->loaded.verify_us),
           CM_LOG_I("decrypt_us", service->loaded.decrypt_us),
           CM_LOG_I("total_us", service->loaded.total_us),
           CM_LOG_S("weights", weights_word(service)));
    evidence_tick(service, clock_ms());
}

/* Whoever of the two is right: the one that is accused has a neighbour that does not listen to it
 * any more, and comes back with new rings. The back-off bounds what a liar can do with it. */
static void on_broken(struct service *service, const struct child *accuser)
{
    struct child *accused =
        &service->children[accuser->role == CM_ROLE_GATEWAY ? CHILD_WORKER : CHILD_GATEWAY];
    struct cm_error err;
    cm_error_set(&err, CM_E_INPUT, "CM-SUP-WIRE", "%s broke the rules of the rings, says %s",
                 accused->name, accuser->name);
    child_kill(service, accused, CM_ROLE_END_PROTOCOL, &err);
}

static void adapter_frame_handle(struct service *service, struct child *child)
{
    const char *broken = service->frame.type == CM_FRAME_ADAPTER_READ ? on_adapter_read(service)
                                                                      : on_adapter_state(service);
    if (broken != NULL) {
        violation(service, child, broken);
    }
}

static void frame_handle(struct service *service, struct child *child)
{
    switch ((enum cm_frame_type)service->frame.type) {
    case CM_FRAME_READY:
        on_ready(service, child);
        return;
    case CM_FRAME_FAILED:
        on_failed(service, child);
        return;
    case CM_FRAME_PROGRESS:
        on_progress(service);
        return;
    case CM_FRAME_KEY_PAGE:
        on_key_page(service, child);
        return;
    case CM_FRAME_TLS_PAGE:
        on_tls_page(service, child);
        return;
    case CM_FRAME_TLS_IDENTITY:
        on_tls_identity(service, child);
        return;
    case CM_FRAME_LOADED:
        on_loaded(service);
        return;
    case CM_FRAME_QUOTE:
        on_quote(service);
        return;
    case CM_FRAME_EVIDENCE:
        on_evidence(service);
        return;
    case CM_FRAME_QUOTE_FAILED:
        on_quote_failed(service);
        return;
    case CM_FRAME_BROKEN:
        on_broken(service, child);
        return;
    case CM_FRAME_ADAPTER_ANSWER:
        on_adapter_answer(service);
        return;
    case CM_FRAME_ADAPTER_PAGE:
        on_adapter_page(service);
        return;
    case CM_FRAME_ADAPTER_READ:
    case CM_FRAME_ADAPTER_STATE:
        adapter_frame_handle(service, child);
        return;
    case CM_FRAME_HEARTBEAT:
        return; /* as each frame, a sign of life */
    case CM_FRAME_DRAINED:
        child->drained = true;
        return;
    case CM_FRAME_CONFIG:
    case CM_FRAME_STATE:
    case CM_FRAME_RINGS:
    case CM_FRAME_KEY_REQUEST:
    case CM_FRAME_TLS_REQUEST:
    case CM_FRAME_KEYS:
    case CM_FRAME_DRAIN:
    case CM_FRAME_STOP:
    case CM_FRAME_MEASURE:
    case CM_FRAME_RULES:
    case CM_FRAME_UNSEAL:
    case CM_FRAME_ADAPTER_OPEN:
    case CM_FRAME_ADAPTER_KEY:
    case CM_FRAME_ADAPTER_CLOSE:
    case CM_FRAME_ADAPTER_LOAD:
    case CM_FRAME_ADAPTER_BYTES:
    case CM_FRAME_ADAPTER_UNLOAD:
    case CM_FRAME_TYPE_COUNT:
        break;
    }
    violation(service, child, "a frame that children never send");
}

/* Up to 64 frames a call, so that one chatty child cannot hold the loop. */
void frames_receive(struct service *service, struct child *child)
{
    for (int i = 0; i < 64 && child_alive(child); i++) {
        struct cm_error err;
        enum cm_status status = cm_channel_receive(&child->channel, &service->frame, &err);
        if (status == CM_E_BUSY) {
            return;
        }
        if (status == CM_E_INPUT) {
            cm_error_wrap(&err, "%s", child->name);
            child_kill(service, child, CM_ROLE_END_PROTOCOL, &err);
            return;
        }
        if (status != CM_OK) {
            /* Closed: it exits within a second, or has closed its only way to be governed. */
            child->closed = true;
            if (child->stop_ms == 0) {
                child->stop_ms = clock_ms() + 1000;
            }
            return;
        }
        child->heard_ms = clock_ms();
        frame_handle(service, child);
        cm_frame_close_fds(&service->frame);
    }
}
