/* What has to happen next, and the one loop that makes it happen.
 *
 * Nothing here remembers a plan: after every event `reconcile` looks at which role is absent, which
 * may come, and asks for what it needs. Start and replacement are the same code. */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "runtime/supervisor/supervisor_internal.h"

#define TICK_MS 250

static void phase_stop(struct service *service)
{
    service->phase = SERVICE_STOP;
    state_reason_set(service, "stopping");
}

/* The service ends for this reason; the first one counts. */
void service_fail(struct service *service, const struct cm_error *why)
{
    if (service->end.status == CM_OK) {
        service->end = *why;
        cm_log_error(&service->log, "service_failed", why);
    }
    if (service->phase != SERVICE_STOP) {
        phase_stop(service);
    }
}

static void rings_renew(struct service *service, struct child *survivor)
{
    struct ring_set fresh;
    struct cm_error err;
    int view[CM_RING_FD_COUNT];
    if (rings_ask(service, cm_config_ring_bytes(service->configuration), &fresh, &err) != CM_OK) {
        service_fail(service, &err);
        return;
    }
    rings_close(&service->rings);
    service->rings = fresh;
    if (survivor->role == CM_ROLE_GATEWAY) {
        rings_view_gateway(&fresh, view);
    } else {
        rings_view_worker(&fresh, view);
    }
    frame_send(service, survivor, CM_FRAME_RINGS, NULL, 0, view, CM_RING_FD_COUNT);
}

/* Causes that another try cannot mend. */
static bool error_is_final(const struct cm_error *err)
{
    switch ((enum cm_status)err->status) {
    case CM_E_USAGE:
    case CM_E_CONFIG:
    case CM_E_PACKAGE:
    case CM_E_POLICY:
    case CM_E_EVIDENCE:
    case CM_E_SANDBOX:
        return true;
    case CM_OK:
    case CM_E_TPM:
    case CM_E_SYSTEM:
    case CM_E_INPUT:
    case CM_E_BUSY:
    case CM_E_DEVICE:
    case CM_E_BUG:
    case CM_STATUS_COUNT:
        break;
    }
    return false;
}

static void child_retry(struct service *service, struct child *child)
{
    uint64_t now = clock_ms();
    uint64_t delay = 0;
    uint32_t random = 0;
    ssize_t got = getrandom(&random, sizeof(random), GRND_NONBLOCK);
    (void)got; /* without randomness the delay is merely less spread */
    if (!backoff_next(&child->backoff, child->started_ms, now, random, &delay)) {
        struct cm_error why;
        cm_error_set(&why, (enum cm_status)child->error.status, "CM-SUP-LOOP",
                     "%s failed %u times within a minute; last: %s: %.280s", child->name,
                     BUDGET_DEATHS + 1, child->error.id, child->error.text);
        service_fail(service, &why);
        return;
    }
    child->restarts++;
    child->due_ms = now + delay;
    CM_LOG(&service->log, CM_LOG_WARN, "role_restarts", CM_LOG_S("name", child->name),
           CM_LOG_I("restarts", child->restarts), CM_LOG_I("delay_ms", delay),
           CM_LOG_S("id", child->error.id));
}

/* A filter that kills once may have met a bug. Twice within an hour somebody is trying. */
static bool policy_killed_again(struct child *child, uint64_t now)
{
    bool again = child->policy_ms != 0 && now - child->policy_ms < POLICY_WINDOW_MS;
    if (child->end != CM_ROLE_END_POLICY) {
        return false;
    }
    child->policy_ms = now;
    return again;
}

/* It is not replaced: the service ends, or goes on ending. */
static bool end_is_final(struct service *service, struct child *child)
{
    bool needed_once =
        child->role == CM_ROLE_DEVTPM ||
        (child->role == CM_ROLE_KEEPER && !cm_keeper_replaceable(&service->keeper_config));
    struct cm_error why;
    if (policy_killed_again(child, clock_ms())) {
        cm_error_set(&why, CM_E_SANDBOX, cm_role_ends[CM_ROLE_END_POLICY].id,
                     "%s was killed by its filter twice within an hour: %s; last: %.200s",
                     child->name, cm_role_ends[CM_ROLE_END_POLICY].next, child->error.text);
    } else if (child->end != CM_ROLE_END_POLICY && error_is_final(&child->error)) {
        why = child->error;
    } else if (needed_once) {
        cm_error_set(&why, CM_E_TPM, "CM-SUP-TPM-GONE",
                     "%s is gone, and with it this boot's measurements: %.300s", child->name,
                     child->error.text);
    } else {
        return false;
    }
    service_fail(service, &why);
    return true;
}

static void child_ended(struct service *service, struct child *child)
{
    struct child *gateway = &service->children[CHILD_GATEWAY];
    struct child *worker = &service->children[CHILD_WORKER];
    frames_receive(service, child); /* its last words */
    child_reap(service, child);
    if (child->role == CM_ROLE_KEEPER) {
        service->tls_pending = service->key_pending = false;
        evidence_keeper_lost(service);
        adapters_keeper_lost(service);
    } else if (child->role == CM_ROLE_WORKER) {
        adapters_worker_lost(service);
    }
    if (service->phase == SERVICE_STOP) {
        return;
    }
    if (child->role == CM_ROLE_WORKER) {
        service->state.load = (struct cm_progress){.stage = CM_LOAD_START};
        state_reason_set(service, "worker_gone");
        rings_renew(service, gateway);
        state_send(service, true);
    } else if (child->role == CM_ROLE_GATEWAY) {
        if (service->state.ready == 1) {
            state_reason_set(service, "gateway_gone");
        }
        rings_renew(service, worker);
    }
    if (service->phase == SERVICE_DRAIN) {
        return; /* nobody is replaced any more */
    }
    if (!end_is_final(service, child)) {
        child_retry(service, child);
    }
    status_write(service, clock_ms()); /* whoever looks now sees why */
}

/* What a keeper died over must not answer the next one's first command. */
static void tpm_drain(struct service *service)
{
    uint8_t stale[4096];
    if (service->keeper_config.development_tpm == 1) {
        struct pollfd late = {.fd = service->tpm_fd, .events = POLLIN};
        while (poll(&late, 1, 0) == 1 && read(service->tpm_fd, stale, sizeof(stale)) > 0) {
        }
    }
}

static void devtpm_start(struct service *service, struct child *devtpm)
{
    struct cm_error err;
    struct cm_config_devtpm config = {.reserved = 0};
    if (child_start(service, devtpm, service->devtpm_state_fd, NULL, service->devtpm_end_fd,
                    &err) != CM_OK) {
        service_fail(service, &err);
        return;
    }
    /* Only the child holds its end now: its death is the end of the stream. */
    close(service->devtpm_end_fd);
    service->devtpm_end_fd = -1;
    frame_send(service, devtpm, CM_FRAME_CONFIG, &config, sizeof(config), NULL, 0);
}

static void keeper_start(struct service *service, struct child *keeper)
{
    struct cm_error err;
    tpm_drain(service);
    if (child_start(service, keeper, service->head_fd, NULL, service->tpm_fd, &err) != CM_OK) {
        service_fail(service, &err);
        return;
    }
    service->keeper_config.tls_given = service->identity_fd >= 0;
    frame_send(service, keeper, CM_FRAME_CONFIG, &service->keeper_config,
               sizeof(service->keeper_config), NULL, 0);
    if (service->identity_fd >= 0) {
        frame_send(service, keeper, CM_FRAME_TLS_IDENTITY, &service->tls, sizeof(service->tls),
                   &service->identity_fd, 1);
    }
    measure_send(service, keeper);
}

static void gateway_configure(struct service *service, struct child *gateway)
{
    const struct cm_configuration *from = service->configuration;
    struct cm_config_gateway config = {
        .header_bytes_max = (uint32_t)from->header_bytes_max,
        .body_bytes_max = (uint32_t)from->body_bytes_max,
        .connections_max = (uint32_t)from->connections_max,
        .requests_max = (uint32_t)from->requests_max,
        .requests_per_key_max = (uint32_t)from->requests_per_key_max,
        .header_timeout_ms = (uint32_t)from->header_timeout_ms,
        .body_timeout_ms = (uint32_t)from->body_timeout_ms,
        .write_timeout_ms = (uint32_t)from->write_timeout_ms,
        .request_timeout_ms = (uint32_t)from->request_timeout_ms,
        .max_tokens_default = (uint32_t)from->max_tokens_default,
        .unauthenticated_metrics = (uint32_t)from->metrics_unauthenticated,
        .ring_data_bytes = cm_config_ring_bytes(from),
        .adapters_max = (uint32_t)from->adapters_max,
        .every_adapter = strcmp(from->adapter_access, "all") == 0,
    };
    snprintf(config.model_name, sizeof(config.model_name), "%.63s", from->model_name);
    snprintf(config.version, sizeof(config.version), "%s", CASEMATE_VERSION);
    frame_send(service, gateway, CM_FRAME_CONFIG, &config, sizeof(config), NULL, 0);
}

static void worker_configure(struct service *service, struct child *worker)
{
    const struct cm_configuration *from = service->configuration;
    struct cm_config_worker config = {
        .threads = (uint32_t)from->threads,
        .sequences_max = (uint32_t)from->sequences_max,
        .queue_max = (uint32_t)from->queue_max,
        .kv_pages = (uint32_t)from->kv_pages,
        .kv_bytes = from->kv_bytes,
        .memory_bytes_max = service->memory_limit,
        .cpus_max = service->cpus,
        .context_max = (uint32_t)from->context_max,
        .step_tokens_max = (uint32_t)from->step_tokens_max,
        .prefix_cache = (uint32_t)from->prefix_cache,
        .ring_data_bytes = cm_config_ring_bytes(from),
        .guard = service->rules_fd >= 0,
        .adapters_max = (uint32_t)from->adapters_max,
        .adapter_rank_max = (uint32_t)from->adapter_rank_max,
        .kv_int8 = strcmp(from->kv_kind, "int8") == 0,
        .prompts_bf16 = strcmp(from->prompts, "bf16") == 0,
        .adapter_bytes_max = from->adapter_bytes_max,
        .adapter_owners = service->keeper_config.adapter_owners,
    };
    struct cm_rules_info rules = {.bytes = service->rules_bytes};
    snprintf(config.device, sizeof(config.device), "%.63s", from->device);
    snprintf(config.model_name, sizeof(config.model_name), "%.63s", from->model_name);
    memcpy(config.owner_key, service->keeper_config.owner_key, sizeof(config.owner_key));
    frame_send(service, worker, CM_FRAME_CONFIG, &config, sizeof(config), NULL, 0);
    if (config.guard == 1) {
        frame_send(service, worker, CM_FRAME_RULES, &rules, sizeof(rules), &service->rules_fd, 1);
    }
}

/* Long before their keys are there: everything that needs no key goes on beside the TPM. */
static void gateway_start(struct service *service, struct child *gateway)
{
    struct cm_error err;
    int rings[CM_RING_FD_COUNT];
    rings_view_gateway(&service->rings, rings);
    if (child_start(service, gateway, service->listener_fd, rings, -1, &err) != CM_OK) {
        service_fail(service, &err);
        return;
    }
    gateway_configure(service, gateway);
}

static void worker_start(struct service *service, struct child *worker)
{
    struct cm_error err;
    int rings[CM_RING_FD_COUNT];
    rings_view_worker(&service->rings, rings);
    if (child_start(service, worker, service->package_fd, rings, -1, &err) != CM_OK) {
        service_fail(service, &err);
        return;
    }
    worker_configure(service, worker);
    service->state.load.stage = CM_LOAD_UNSEAL;
    service->state_dirty = true;
}

static void pages_request(struct service *service, struct child *keeper, uint64_t now)
{
    struct child *gateway = &service->children[CHILD_GATEWAY];
    struct child *worker = &service->children[CHILD_WORKER];
    if (child_alive(gateway) && !gateway->keyed && !service->tls_pending) {
        struct cm_key_request request = {.generation = ++service->tls_generation};
        service->tls_pending = true;
        service->tls_asked_ms = now;
        service->tls_gateway = gateway->generation;
        frame_send(service, keeper, CM_FRAME_TLS_REQUEST, &request, sizeof(request), NULL, 0);
    }
    /* In strict mode nothing unseals once the worker has loaded: adapters first. */
    bool adapters_first = service->keeper_config.strict == 1 && !adapters_unsealed(service);
    if (child_alive(worker) && !worker->keyed && !service->key_pending && !adapters_first &&
        !adapters_key_out(service)) {
        struct cm_key_request request = {.generation = ++service->key_generation};
        service->key_pending = true;
        service->key_asked_ms = now;
        service->key_worker = worker->generation;
        frame_send(service, keeper, CM_FRAME_KEY_REQUEST, &request, sizeof(request), NULL, 0);
    }
}

static void reconcile_run(struct service *service, uint64_t now)
{
    struct child *devtpm = &service->children[CHILD_DEVTPM];
    struct child *keeper = &service->children[CHILD_KEEPER];
    struct child *worker = &service->children[CHILD_WORKER];
    struct child *gateway = &service->children[CHILD_GATEWAY];
    bool development = service->keeper_config.development_tpm == 1;
    if (development && devtpm->state == CHILD_ABSENT && devtpm->generation == 0) {
        devtpm_start(service, devtpm);
    }
    if (keeper->state == CHILD_ABSENT && now >= keeper->due_ms &&
        (!development || child_alive(devtpm))) {
        keeper_start(service, keeper);
    }
    if (gateway->state == CHILD_ABSENT && now >= gateway->due_ms) {
        gateway_start(service, gateway);
    }
    if (worker->state == CHILD_ABSENT && now >= worker->due_ms) {
        worker_start(service, worker);
    }
    adapters_step(service);
    if (keeper->state == CHILD_SERVING) {
        pages_request(service, keeper, now);
    }
}

static bool child_idle(const struct child *child)
{
    return child->drained || child->state != CHILD_SERVING;
}

static void drain_send(struct service *service, struct child *child, uint64_t now)
{
    struct cm_drain drain = {.deadline_ms = now < service->drain_until_ms
                                                ? (uint32_t)(service->drain_until_ms - now)
                                                : 0};
    if (child->state == CHILD_SERVING && !child->drain_sent) {
        child->drain_sent = true;
        frame_send(service, child, CM_FRAME_DRAIN, &drain, sizeof(drain), NULL, 0);
    }
}

/* First the gateway, so that what it has accepted still reaches the worker; then the worker. */
static void reconcile_drain(struct service *service, uint64_t now)
{
    struct child *gateway = &service->children[CHILD_GATEWAY];
    struct child *worker = &service->children[CHILD_WORKER];
    drain_send(service, gateway, now);
    if (child_idle(gateway)) {
        drain_send(service, worker, now);
    }
    /* Without a gateway there is nobody whom the worker's replies could reach. */
    bool alone = gateway->state == CHILD_ABSENT;
    bool idle = child_idle(gateway) && child_idle(worker);
    if (alone || idle || now >= service->drain_until_ms) {
        CM_LOG(&service->log, CM_LOG_INFO, "drained",
               CM_LOG_I("whole", gateway->drained || (idle && !alone)));
        phase_stop(service);
    }
}

/* In this order, each gone before the next is asked: gateway, worker, keeper, devtpm. */
static void reconcile_stop(struct service *service, uint64_t now)
{
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        struct child *child = &service->children[i];
        if (child->state == CHILD_ABSENT) {
            continue;
        }
        if (!child->stop_sent) {
            child->stop_sent = true;
            child->stop_ms = now + STOP_WAIT_MS;
            frame_send(service, child, CM_FRAME_STOP, NULL, 0, NULL, 0);
        }
        return;
    }
}

static void reconcile(struct service *service, uint64_t now)
{
    if (service->phase == SERVICE_RUN) {
        reconcile_run(service, now);
    }
    if (service->phase == SERVICE_DRAIN) {
        reconcile_drain(service, now);
    }
    if (service->phase == SERVICE_STOP) {
        reconcile_stop(service, now);
    }
}

static void child_watch(struct service *service, struct child *child, uint64_t now)
{
    struct cm_error why;
    uint64_t silence_ms =
        child->state == CHILD_SERVING ? service->configuration->watchdog_timeout_ms : START_WAIT_MS;
    if (!child_alive(child)) {
        return;
    }
    if (child->stop_ms != 0 && now >= child->stop_ms) {
        cm_error_set(&why, CM_E_SYSTEM, "CM-SUP-STUCK", "%s did not go when asked", child->name);
        child_kill(service, child, CM_ROLE_END_STUCK, &why);
    } else if (now - child->heard_ms >= silence_ms) {
        cm_error_set(&why, CM_E_SYSTEM, "CM-SUP-WATCHDOG",
                     "%s has shown no life for %llu ms while it %s", child->name,
                     (unsigned long long)silence_ms,
                     child->state == CHILD_SERVING ? "served" : "started");
        child_kill(service, child, CM_ROLE_END_WATCHDOG, &why);
    } else if (child->role == CM_ROLE_KEEPER &&
               ((service->tls_pending && now - service->tls_asked_ms >= ANSWER_WAIT_MS) ||
                (service->key_pending && now - service->key_asked_ms >= ANSWER_WAIT_MS))) {
        cm_error_set(&why, CM_E_TPM, "CM-SUP-KEEPER", "the keeper gave no key page within %u s",
                     ANSWER_WAIT_MS / 1000);
        child_kill(service, child, CM_ROLE_END_STUCK, &why);
    } else if (adapters_stuck(service, child->role, now)) {
        cm_error_set(&why, CM_E_SYSTEM, "CM-SUP-ADAPTER",
                     "%s has said nothing of an adapter for %u s", child->name,
                     ANSWER_WAIT_MS / 1000);
        child_kill(service, child, CM_ROLE_END_STUCK, &why);
    }
}

static void signals_take(struct service *service, uint64_t now)
{
    struct signalfd_siginfo info;
    while (read(service->signal_fd, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        service->signals++;
        CM_LOG(&service->log, CM_LOG_INFO, "signal", CM_LOG_I("number", info.ssi_signo),
               CM_LOG_I("count", service->signals));
        if (service->signals == 1 && service->phase == SERVICE_RUN) {
            service->phase = SERVICE_DRAIN;
            service->drain_until_ms = now + service->configuration->drain_timeout_ms;
            service->state.draining = 1;
            state_reason_set(service, "draining");
            state_send(service, true);
        }
    }
}

static void tick(struct service *service, uint64_t now)
{
    struct child *gateway = &service->children[CHILD_GATEWAY];
    if (now - service->keys_checked_ms >= TICK_MS) {
        service->keys_checked_ms = now;
        if (keys_refresh(service) && gateway->keyed) {
            frame_send(service, gateway, CM_FRAME_KEYS, &service->keys_info,
                       sizeof(service->keys_info), &service->keys_fd, 1);
        }
        adapters_refresh(service);
    }
    if (now - service->status_written_ms >= 1000) {
        status_write(service, now);
    }
    evidence_tick(service, now);
    notify_tick(service, now);
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        child_watch(service, &service->children[i], now);
    }
    state_send(service, false);
}

static int wait_ms(const struct service *service, uint64_t now)
{
    uint64_t wait = service->phase == SERVICE_RUN && !service->state_dirty ? TICK_MS : 50;
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        const struct child *child = &service->children[i];
        if (child->state == CHILD_ABSENT && child->due_ms > now && child->due_ms - now < wait) {
            wait = child->due_ms - now;
        }
    }
    return (int)wait;
}

static void events_wait(struct service *service)
{
    struct pollfd polls[1 + 3 * CHILD_COUNT];
    polls[0] = (struct pollfd){.fd = service->signal_fd, .events = POLLIN};
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        const struct child *child = &service->children[i];
        polls[1 + 3 * i] =
            (struct pollfd){.fd = child->closed ? -1 : child->channel.fd, .events = POLLIN};
        /* A log pipe that has hung up is read at the reap; polling it would spin. */
        polls[2 + 3 * i] = (struct pollfd){.fd = child->log_fd, .events = POLLIN};
        polls[3 + 3 * i] = (struct pollfd){.fd = child->pidfd, .events = POLLIN};
    }
    if (poll(polls, 1 + 3 * CHILD_COUNT, wait_ms(service, clock_ms())) < 0) {
        return;
    }
    if (polls[0].revents != 0) {
        signals_take(service, clock_ms());
    }
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        struct child *child = &service->children[i];
        if (polls[1 + 3 * i].revents != 0) {
            frames_receive(service, child);
        }
        if (polls[2 + 3 * i].revents != 0) {
            child_log_copy(child);
        }
        if (polls[3 + 3 * i].revents != 0) {
            child_ended(service, child);
        }
    }
}

static bool children_gone(const struct service *service)
{
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        if (service->children[i].state != CHILD_ABSENT) {
            return false;
        }
    }
    return true;
}

static void children_kill(struct service *service)
{
    struct cm_error why;
    cm_error_set(&why, CM_E_SYSTEM, "CM-SUP-INTERRUPTED", "ended at once by a second signal");
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        struct child *child = &service->children[i];
        child_kill(service, child, CM_ROLE_END_INTERRUPTED, &why);
        if (child->state != CHILD_ABSENT) {
            child_reap(service, child);
        }
    }
    service->end = why;
}

/* Every role that will run, copied and sealed once: replacements run the same bytes. */
static enum cm_status images_load(struct service *service, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    for (size_t i = 0; status == CM_OK && i < CHILD_COUNT; i++) {
        struct child *child = &service->children[i];
        if (child->role != CM_ROLE_DEVTPM || service->keeper_config.development_tpm == 1) {
            status = cm_image_load(&service->store, service->programs_fd, child->program,
                                   &child->image, err);
        }
    }
    return status;
}

enum cm_status service_open(struct service *service, const struct cm_configuration *configuration,
                            int programs_fd, struct cm_error *err)
{
    memset(service, 0, sizeof(*service));
    service->configuration = configuration;
    service->pid = getpid();
    service->log = (struct cm_log){STDERR_FILENO, "supervisor", CM_LOG_INFO};
    notify_open(&service->notify, &service->log);
    service->programs_fd = programs_fd;
    service->listener_fd = service->package_fd = service->tpm_fd = service->head_fd = -1;
    service->devtpm_end_fd = service->devtpm_state_fd = service->signal_fd = -1;
    service->run_fd = service->lock_fd = service->keys_fd = service->launcher_fd = -1;
    service->violation_fd = service->identity_fd = -1;
    service->sealed_fd = service->device_id_fd = service->filters_fd = service->rules_fd = -1;
    snprintf(service->state_path, sizeof(service->state_path), "%s", configuration->state);
    rings_init(&service->rings);
    adapters_init(service);
    child_init(&service->children[CHILD_GATEWAY], CM_ROLE_GATEWAY, "gateway", "casemate-gateway");
    child_init(&service->children[CHILD_WORKER], CM_ROLE_WORKER, "worker", "casemate-worker");
    child_init(&service->children[CHILD_KEEPER], CM_ROLE_KEEPER, "keeper", "casemate-keeper");
    child_init(&service->children[CHILD_DEVTPM], CM_ROLE_DEVTPM, "devtpm", "casemate-devtpm");
    state_reason_set(service, "loading");
    enum cm_status status = cm_image_adopt(&service->store, &service->image, err);
    if (status == CM_OK) {
        status = service_files_open(service, err);
    }
    if (status == CM_OK) {
        status = images_load(service, err);
    }
    if (status == CM_OK) {
        CM_LOG(&service->log, CM_LOG_INFO, "opened", CM_LOG_I("files", service->store.count));
        status = confinement_open(service, err);
    }
    if (status == CM_OK) {
        status = launcher_open(service, err);
    }
    if (status == CM_OK) {
        status = measure_open(service, err);
    }
    if (status == CM_OK) {
        keys_refresh(service);
        CM_LOG(&service->log, CM_LOG_INFO, "listening", CM_LOG_S("address", service->address));
    }
    if (status == CM_OK) {
        status = confinement_self(service, err);
    }
    return status;
}

enum cm_status service_run(struct service *service, struct cm_error *err)
{
    while (service->signals < 2) {
        uint64_t now = clock_ms();
        tick(service, now);
        reconcile(service, now);
        if (service->phase == SERVICE_STOP && children_gone(service)) {
            break;
        }
        events_wait(service);
    }
    if (service->signals >= 2 && !children_gone(service)) {
        children_kill(service);
    }
    service->over = true;
    state_reason_set(service, "stopped");
    status_write(service, clock_ms());
    notify_tick(service, clock_ms());
    if (service->end.status != CM_OK) {
        *err = service->end;
    }
    return (enum cm_status)service->end.status;
}

void service_close(struct service *service)
{
    const int fds[] = {
        service->listener_fd,     service->package_fd,   service->tpm_fd,    service->devtpm_end_fd,
        service->devtpm_state_fd, service->head_fd,      service->signal_fd, service->run_fd,
        service->lock_fd,         service->keys_fd,      service->sealed_fd, service->device_id_fd,
        service->filters_fd,      service->violation_fd, service->rules_fd,  service->identity_fd};
    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    notify_close(&service->notify);
    launcher_close(service);
    if (service->launcher_pid == 0) {
        (void)cm_cgroups_remove(&service->groups); /* else the launcher has done it */
    }
    cm_cgroups_close(&service->groups);
    rings_close(&service->rings);
    cm_image_store_close(&service->store);
}
