/* casemate-devtpm: a development TPM. libtpms behind raw TPM frames on a stream socket, its state
 * in one file. It protects nothing: whoever reads the file has every secret. Its start is the boot.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <libtpms/tpm_memory.h>
#include <libtpms/tpm_nvfilename.h>
#include <libtpms/tpm_types.h>

#include "runtime/base/frame.h"
#include "runtime/base/kill_point.h"
#include "runtime/base/log.h"
#include "runtime/devtpm/state.h"
#include "sandbox/confine.h"

#define TPM_FRAME_BYTES 4096u
#define TPM_HEADER      10u
#define CONFIG_WAIT_MS  10000

/* libtpms calls back without a context: the one place where this program has globals. */
static struct cm_state_file state_file = {.fd = CM_FD_INPUT};
static uint8_t state_bytes[CM_STATE_BYTES_MAX];
static struct cm_log logger = {CM_FD_LOG, "devtpm", CM_LOG_INFO};

static TPM_RESULT nvram_init(void)
{
    return TPM_SUCCESS;
}

static TPM_RESULT state_load(unsigned char **data, uint32_t *length, uint32_t tpm, const char *name)
{
    struct cm_error err;
    size_t size;
    (void)tpm;
    if (strcmp(name, TPM_PERMANENT_ALL_NAME) != 0) {
        return TPM_RETRY; /* volatile state is not kept: each start is a boot */
    }
    if (cm_state_load(&state_file, state_bytes, &size, &err) != CM_OK) {
        cm_log_error(&logger, "state", &err);
        return TPM_FAIL;
    }
    if (size == 0) {
        return TPM_RETRY;
    }
    if (TPM_Malloc(data, (uint32_t)size) != TPM_SUCCESS) {
        return TPM_FAIL;
    }
    memcpy(*data, state_bytes, size);
    *length = (uint32_t)size;
    return TPM_SUCCESS;
}

static TPM_RESULT state_store(const unsigned char *data, uint32_t length, uint32_t tpm,
                              const char *name)
{
    struct cm_error err;
    (void)tpm;
    if (strcmp(name, TPM_PERMANENT_ALL_NAME) != 0) {
        return TPM_SUCCESS;
    }
    if (cm_state_store(&state_file, data, length, &err) != CM_OK) {
        cm_log_error(&logger, "state", &err);
        return TPM_FAIL;
    }
    return TPM_SUCCESS;
}

static TPM_RESULT state_delete(uint32_t tpm, const char *name, TPM_BOOL must_exist)
{
    (void)tpm;
    (void)name;
    (void)must_exist;
    return TPM_SUCCESS;
}

static TPM_RESULT io_init(void)
{
    return TPM_SUCCESS;
}

static TPM_RESULT io_locality(TPM_MODIFIER_INDICATOR *locality, uint32_t tpm)
{
    (void)tpm;
    *locality = 0;
    return TPM_SUCCESS;
}

static TPM_RESULT io_presence(TPM_BOOL *presence, uint32_t tpm)
{
    (void)tpm;
    *presence = 0;
    return TPM_SUCCESS;
}

static enum cm_status command_run(const uint8_t *command, uint32_t size, unsigned char **response,
                                  uint32_t *response_size, uint32_t *capacity, struct cm_error *err)
{
    uint8_t copy[TPM_FRAME_BYTES];
    memcpy(copy, command, size);
    if (TPMLIB_Process(response, response_size, capacity, copy, size) != TPM_SUCCESS) {
        return cm_error_set(err, CM_E_TPM, "CM-TPM-FAILED", "development TPM: libtpms failed");
    }
    return CM_OK;
}

static enum cm_status tpm_start(struct cm_error *err)
{
    static const uint8_t startup[] = {0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x44, 0, 0};
    struct libtpms_callbacks callbacks = {.sizeOfStruct = sizeof(callbacks),
                                          .tpm_nvram_init = nvram_init,
                                          .tpm_nvram_loaddata = state_load,
                                          .tpm_nvram_storedata = state_store,
                                          .tpm_nvram_deletename = state_delete,
                                          .tpm_io_init = io_init,
                                          .tpm_io_getlocality = io_locality,
                                          .tpm_io_getphysicalpresence = io_presence};
    unsigned char *response = NULL;
    uint32_t size = 0, capacity = 0;
    size_t state_size;
    if (cm_state_load(&state_file, state_bytes, &state_size, err) != CM_OK) {
        return CM_E_TPM; /* libtpms would write to stderr as no filter allows, and not say why */
    }
    if (TPMLIB_RegisterCallbacks(&callbacks) != TPM_SUCCESS ||
        TPMLIB_ChooseTPMVersion(TPMLIB_TPM_VERSION_2) != TPM_SUCCESS ||
        TPMLIB_MainInit() != TPM_SUCCESS) {
        return cm_error_set(err, CM_E_TPM, "CM-TPM-START",
                            "development TPM: libtpms does not start");
    }
    enum cm_status status = command_run(startup, sizeof(startup), &response, &size, &capacity, err);
    if (status == CM_OK && (size < TPM_HEADER || memcmp(response + 6, "\0\0\0\0", 4) != 0)) {
        status =
            cm_error_set(err, CM_E_TPM, "CM-TPM-START", "development TPM: TPM2_Startup failed");
    }
    free(response);
    return status;
}

static bool bytes_read(uint8_t *bytes, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t got = read(CM_FD_TPM, bytes + done, size - done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return false;
        }
        done += (size_t)got;
    }
    return true;
}

/* One command in, one response out. False: the peer is gone or talks nonsense. */
static bool frame_serve(struct cm_error *err)
{
    static unsigned char *response;
    static uint32_t capacity;
    uint8_t command[TPM_FRAME_BYTES];
    uint32_t size, response_size = 0;
    if (!bytes_read(command, TPM_HEADER)) {
        return false;
    }
    size = (uint32_t)command[2] << 24 | (uint32_t)command[3] << 16 | (uint32_t)command[4] << 8 |
           command[5];
    CM_KILL_POINT("before", "handle", "tpm command");
    if (size < TPM_HEADER || size > sizeof(command) ||
        !bytes_read(command + TPM_HEADER, size - TPM_HEADER) ||
        command_run(command, size, &response, &response_size, &capacity, err) != CM_OK) {
        return false;
    }
    explicit_bzero(command, sizeof(command));
    CM_KILL_POINT("before", "send", "tpm response");
    for (uint32_t done = 0; done < response_size;) {
        ssize_t put = write(CM_FD_TPM, response + done, response_size - done);
        if (put <= 0 && errno != EINTR) {
            return false;
        }
        done += put > 0 ? (uint32_t)put : 0;
    }
    explicit_bzero(response, response_size);
    CM_KILL_POINT("after", "send", "tpm response");
    return true;
}

static void heartbeat_send(struct cm_channel *channel, uint64_t *counter, time_t *last)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec != *last) {
        struct cm_heartbeat heartbeat = {.counter = (*counter)++};
        *last = now.tv_sec;
        (void)!cm_channel_send(channel, CM_FRAME_HEARTBEAT, &heartbeat, sizeof(heartbeat), NULL, 0,
                               NULL);
    }
}

static void serve(struct cm_channel *channel, struct cm_frame *frame)
{
    struct pollfd polled[2] = {{.fd = channel->fd, .events = POLLIN},
                               {.fd = CM_FD_TPM, .events = POLLIN}};
    struct cm_error err;
    uint64_t counter = 0;
    time_t last = 0;
    for (;;) {
        heartbeat_send(channel, &counter, &last);
        if (poll(polled, 2, 500) < 0 && errno != EINTR) {
            return;
        }
        enum cm_status status = cm_channel_receive(channel, frame, &err);
        if ((status == CM_OK && frame->type == CM_FRAME_STOP) ||
            (status != CM_OK && status != CM_E_BUSY)) {
            return;
        }
        if ((polled[1].revents & (POLLIN | POLLHUP)) != 0 && !frame_serve(&err)) {
            polled[1].fd = -1; /* no keeper any more; STOP will come */
        }
    }
}

int main(void)
{
    static struct cm_frame frame;
    struct cm_channel channel;
    struct cm_confinement confinement;
    struct cm_error err = {.status = CM_OK};
    cm_channel_init(&channel, CM_FD_CONTROL, CM_ROLE_DEVTPM, CM_ROLE_SUPERVISOR);
    enum cm_status status = cm_confine_begin("casemate-devtpm", &confinement, &err);
    if (status == CM_OK) {
        cm_log_write(&logger, CM_LOG_INFO, "confined", NULL);
        status = cm_channel_wait(&channel, &frame, CONFIG_WAIT_MS, &err);
    }
    if (status == CM_OK) {
        status = tpm_start(&err);
    }
    if (status == CM_OK) {
        status = cm_confine_serve(&confinement, &err);
    }
    if (status == CM_OK) {
        const struct cm_ready ready = {.probed = confinement.probed};
        status = cm_channel_send(&channel, CM_FRAME_READY, &ready, sizeof(ready), NULL, 0, &err);
    }
    if (status == CM_OK) {
        serve(&channel, &frame);
        TPMLIB_Terminate();
    } else {
        cm_log_error(&logger, "failed", &err);
        (void)!cm_channel_send(&channel, CM_FRAME_FAILED, &err, sizeof(err), NULL, 0, NULL);
    }
    return cm_status_exit_code(status);
}
