/* casemate-worker: load the sealed model into the device, then serve the rings. Holds the device,
 * for the time of loading the package and its key; never network, TPM, writable files or paths. */
#include <string.h>
#include <unistd.h>

#include "runtime/worker/worker.h"

#define CONFIG_WAIT_MS 10000

static enum cm_status config_wait(struct cm_worker *worker, struct cm_error *err)
{
    static struct cm_frame frame;
    enum cm_status status = cm_channel_wait(&worker->channel, &frame, CONFIG_WAIT_MS, err);
    if (status == CM_OK &&
        (frame.type != CM_FRAME_CONFIG || frame.bytes != sizeof(worker->config))) {
        status =
            cm_error_set(err, CM_E_BUG, "CM-WRK-CONFIG", "the first frame is no configuration");
    }
    if (status == CM_OK) {
        memcpy(&worker->config, frame.payload, sizeof(worker->config));
        worker->config.device[CM_NAME_BYTES - 1] = '\0';
        worker->config.model_name[CM_NAME_BYTES - 1] = '\0';
    }
    return status;
}

static enum cm_status load_and_serve(struct cm_worker *worker, struct cm_error *err)
{
    enum cm_status status = cm_worker_load(worker, err);
    if (status == CM_OK) {
        status = cm_worker_rings_open(worker, worker->ring_fds, err);
    }
    if (status == CM_OK) {
        status = cm_confine_serve(&worker->confinement, err);
    }
    if (status == CM_OK) {
        const struct cm_ready ready = {.probed = worker->confinement.probed};
        status =
            cm_channel_send(&worker->channel, CM_FRAME_READY, &ready, sizeof(ready), NULL, 0, err);
    }
    return status == CM_OK ? cm_worker_serve(worker, err) : status;
}

int main(void)
{
    static struct cm_worker worker = {.key_page = -1,
                                      .ring_fds = {CM_FD_REQUEST_DATA, CM_FD_REQUEST_CURSOR,
                                                   CM_FD_RESPONSE_DATA, CM_FD_RESPONSE_CURSOR,
                                                   CM_FD_REQUEST_EVENT, CM_FD_RESPONSE_EVENT}};
    struct cm_error err = {.status = CM_OK};
    worker.log = (struct cm_log){CM_FD_LOG, "worker", CM_LOG_INFO};
    cm_channel_init(&worker.channel, CM_FD_CONTROL, CM_ROLE_WORKER, CM_ROLE_SUPERVISOR);
    enum cm_status status = cm_confine_begin("casemate-worker", &worker.confinement, &err);
    if (status == CM_OK) {
        cm_log_write(&worker.log, CM_LOG_INFO, "confined", NULL);
        status = config_wait(&worker, &err);
    }
    if (status == CM_OK) {
        status = cm_worker_rules_take(&worker, &err);
    }
    if (status == CM_OK) {
        status = cm_worker_prepare(&worker, &err);
    }
    if (status == CM_OK) {
        status = cm_worker_key_wait(&worker, &err);
    }
    if (status == CM_OK && !worker.stopping) {
        status = load_and_serve(&worker, &err);
    }
    cm_worker_wipe(&worker);
    if (status != CM_OK) {
        cm_log_error(&worker.log, "failed", &err);
        (void)!cm_channel_send(&worker.channel, CM_FRAME_FAILED, &err, sizeof(err), NULL, 0, NULL);
    }
    _exit(cm_status_exit_code(status)); /* to free and to join threads takes calls that are gone */
}
