/* Measurement: what the supervisor runs and was told becomes events, then the PCR, before the
 * unseal.
 *
 * A PCR belongs to a boot. Untouched, it is extended; in restartable mode a PCR that already stands
 * at a beginning of the same events is extended by the rest; anything else is another state. */
#include "runtime/keeper/keeper.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define MEASURE_WAIT_MS 10000

/* Programs, libraries, filters and rules are measured by digest, texts by content. */
static enum cm_status file_take(struct cm_keeper *keeper, const struct cm_measure *measure, int fd,
                                struct cm_error *err)
{
    uint8_t text[CM_EVENT_BYTES_MAX];
    if (measure->type == CM_EVENT_PROGRAM || measure->type == CM_EVENT_FILTERS ||
        measure->type == CM_EVENT_RULES) {
        enum cm_status status =
            cm_event_file_add(&keeper->event, measure->name, fd, &keeper->digests, err);
        if (status == CM_OK && measure->complete == 1) {
            status = cm_measurement_add(&keeper->measurement, measure->type, keeper->event.data,
                                        keeper->event.bytes, err);
            keeper->event.bytes = 0;
        }
        return status;
    }
    ssize_t bytes = pread(fd, text, sizeof(text), 0);
    if (bytes < 0) {
        return cm_error_errno(err, errno, "CM-MEASURE-READ", "cannot read what is measured");
    }
    return cm_measurement_add(&keeper->measurement, measure->type, text, (size_t)bytes, err);
}

enum cm_status cm_keeper_measure(struct cm_keeper *keeper, struct cm_error *err)
{
    static struct cm_frame frame;
    enum cm_status status = CM_OK;
    while (status == CM_OK) {
        struct cm_measure measure;
        status = cm_channel_wait(&keeper->channel, &frame, MEASURE_WAIT_MS, err);
        if (status == CM_OK && frame.type == CM_FRAME_UNSEAL) {
            return keeper->event.bytes == 0
                       ? CM_OK
                       : cm_error_set(err, CM_E_BUG, "CM-MEASURE-ORDER", "an event is incomplete");
        }
        if (status == CM_OK && frame.type != CM_FRAME_MEASURE) {
            status = cm_error_set(err, CM_E_BUG, "CM-KEEPER-FRAME", "frame %u came while measuring",
                                  frame.type);
        }
        if (status == CM_OK) {
            memcpy(&measure, frame.payload, sizeof(measure));
            measure.name[sizeof(measure.name) - 1] = '\0';
            status = file_take(keeper, &measure, frame.fds[0], err);
        }
        cm_frame_close_fds(&frame);
    }
    return status;
}

/* How many events the PCR already holds; UINT32_MAX: it is at no beginning of them. */
static enum cm_status position_find(struct cm_keeper *keeper,
                                    const uint8_t pcr[static CM_DIGEST_BYTES],
                                    uint32_t *ret_position, struct cm_error *err)
{
    uint8_t at[CM_DIGEST_BYTES];
    memcpy(at, keeper->enrolment.pcr_value, sizeof(at));
    for (uint32_t i = 0; i <= keeper->measurement.count; i++) {
        if (memcmp(at, pcr, sizeof(at)) == 0) {
            *ret_position = i;
            return CM_OK;
        }
        if (i < keeper->measurement.count) {
            enum cm_status status = cm_measurement_replay(&keeper->measurement, i, 1, at, err);
            if (status != CM_OK) {
                return status;
            }
        }
    }
    *ret_position = UINT32_MAX;
    return CM_OK;
}

static enum cm_status event_extend(struct cm_keeper *keeper, uint32_t index, struct cm_error *err)
{
    uint8_t digest[CM_DIGEST_BYTES];
    enum cm_status status = cm_event_digest(&keeper->measurement.events[index], digest, err);
    return status == CM_OK ? cm_tpm_pcr_extend(keeper->tpm, keeper->enrolment.pcr, digest, err)
                           : status;
}

enum cm_status cm_keeper_extend(struct cm_keeper *keeper, struct cm_error *err)
{
    uint8_t pcr[CM_DIGEST_BYTES];
    uint32_t position = UINT32_MAX, pcr_index = keeper->enrolment.pcr;
    enum cm_status status = cm_measurement_add(&keeper->measurement, CM_EVENT_PACKAGE,
                                               keeper->head.core.core_digest, CM_DIGEST_BYTES, err);
    if (status == CM_OK) {
        status = cm_tpm_pcr_read(keeper->tpm, pcr_index, pcr, err);
    }
    if (status == CM_OK) {
        status = position_find(keeper, pcr, &position, err);
    }
    if (status == CM_OK && keeper->config.strict == 1 && position != 0) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-BOOT",
                            "PCR %u was extended since this machine booted, and attest_mode is "
                            "strict: one start per boot; reboot to start again",
                            pcr_index);
    }
    if (status == CM_OK && position == UINT32_MAX) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-BOOT",
                            "PCR %u was extended with something else since this machine booted (a "
                            "changed program or configuration): reboot to start again",
                            pcr_index);
    }
    for (uint32_t i = position; status == CM_OK && i < keeper->measurement.count; i++) {
        status = event_extend(keeper, i, err);
    }
    if (status == CM_OK) {
        CM_LOG(&keeper->log, CM_LOG_INFO, "measured", CM_LOG_I("events", keeper->measurement.count),
               CM_LOG_I("already", position), CM_LOG_I("pcr", pcr_index));
    }
    return status;
}

enum cm_status cm_keeper_cap(struct cm_keeper *keeper, struct cm_error *err)
{
    enum cm_status status = cm_measurement_add(&keeper->measurement, CM_EVENT_TLS_KEY,
                                               keeper->tls.key_digest, CM_DIGEST_BYTES, err);
    if (status == CM_OK) {
        status = cm_measurement_add(&keeper->measurement, CM_EVENT_READY, NULL, 0, err);
    }
    for (uint32_t i = keeper->measurement.count - 2;
         status == CM_OK && i < keeper->measurement.count; i++) {
        status = event_extend(keeper, i, err);
    }
    if (status == CM_OK) {
        keeper->capped = true;
        CM_LOG(&keeper->log, CM_LOG_INFO, "capped", CM_LOG_I("pcr", keeper->enrolment.pcr));
    }
    return status;
}
