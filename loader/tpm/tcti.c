/* Our own TCTI: raw TPM frames over an inherited descriptor, with a time limit. No TCTI library is
 * loaded. TCG TSS 2.0 TPM Command Transmission Interface specification. */
#include "loader/tpm/tpm_internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/base/kill_point.h"
#include "runtime/base/clock.h"

#define MAGIC        0x434D5443544931ull
#define RESPONSE_MAX 4096u
#define HEADER       10u
#define TIMEOUT_MS   90000 /* a slow chip making an RSA key; ours are faster */

struct context {
    TSS2_TCTI_CONTEXT_COMMON_V1 common;
    int fd;
    uint8_t response[RESPONSE_MAX];
    size_t response_bytes; /* 0: none read yet */
    /* how long each kind of command took */
    struct cm_tpm_times times;
    uint32_t command; /* in flight */
    uint64_t sent_us;
};

static void command_note(struct context *context, const uint8_t *command, size_t size)
{
    context->command = size >= HEADER ? (uint32_t)command[6] << 24 | (uint32_t)command[7] << 16 |
                                            (uint32_t)command[8] << 8 | command[9]
                                      : 0;
    context->sent_us = cm_clock_us();
}

/* One row for each kind, in the order of first use; what finds no row is counted in the last. */
static void response_note(struct context *context)
{
    struct cm_tpm_times *times = &context->times;
    uint32_t row = 0;
    while (row < times->count && times->rows[row].command != context->command) {
        row++;
    }
    if (row == times->count && row < CM_TPM_TIMES_MAX) {
        times->rows[times->count++] = (struct cm_tpm_time){.command = context->command};
    }
    row = row < CM_TPM_TIMES_MAX ? row : CM_TPM_TIMES_MAX - 1;
    times->rows[row].calls++;
    times->rows[row].us += cm_clock_us() - context->sent_us;
}

const struct cm_tpm_times *cm_tcti_times(const TSS2_TCTI_CONTEXT *tcti)
{
    return &((const struct context *)(const void *)tcti)->times;
}

static struct context *context_of(TSS2_TCTI_CONTEXT *tcti)
{
    struct context *context = (struct context *)tcti;
    return context != NULL && context->common.magic == MAGIC ? context : NULL;
}

static TSS2_RC transmit(TSS2_TCTI_CONTEXT *tcti, size_t size, const uint8_t *command)
{
    struct context *context = context_of(tcti);
    if (context == NULL || command == NULL) {
        return TSS2_TCTI_RC_BAD_REFERENCE;
    }
    context->response_bytes = 0;
    command_note(context, command, size);
    CM_KILL_POINT("before", "send", "tpm command");
    for (size_t done = 0; done < size;) {
        ssize_t put = write(context->fd, command + done, size - done);
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            return TSS2_TCTI_RC_IO_ERROR;
        }
        done += (size_t)put;
    }
    CM_KILL_POINT("after", "send", "tpm command");
    return TSS2_RC_SUCCESS;
}

/* More bytes of the response, within the limit. */
static TSS2_RC bytes_await(struct context *context, int timeout_ms)
{
    struct pollfd polled = {.fd = context->fd, .events = POLLIN};
    int ready;
    do {
        ready = poll(&polled, 1, timeout_ms);
    } while (ready < 0 && errno == EINTR);
    if (ready == 0) {
        return TSS2_TCTI_RC_TRY_AGAIN;
    }
    ssize_t got = ready < 0 ? -1
                            : read(context->fd, context->response + context->response_bytes,
                                   RESPONSE_MAX - context->response_bytes);
    if (got <= 0) {
        return TSS2_TCTI_RC_IO_ERROR;
    }
    context->response_bytes += (size_t)got;
    return TSS2_RC_SUCCESS;
}

static size_t frame_size(const struct context *context)
{
    const uint8_t *at = context->response + 2;
    return (size_t)at[0] << 24 | (size_t)at[1] << 16 | (size_t)at[2] << 8 | at[3];
}

static TSS2_RC receive(TSS2_TCTI_CONTEXT *tcti, size_t *size, uint8_t *response, int32_t timeout)
{
    struct context *context = context_of(tcti);
    int limit = timeout == TSS2_TCTI_TIMEOUT_BLOCK ? TIMEOUT_MS : timeout;
    if (context == NULL || size == NULL) {
        return TSS2_TCTI_RC_BAD_REFERENCE;
    }
    while (context->response_bytes < HEADER || context->response_bytes < frame_size(context)) {
        if (context->response_bytes >= HEADER &&
            (frame_size(context) < HEADER || frame_size(context) > RESPONSE_MAX)) {
            return TSS2_TCTI_RC_MALFORMED_RESPONSE;
        }
        TSS2_RC code = bytes_await(context, limit);
        if (code != TSS2_RC_SUCCESS) {
            return code == TSS2_TCTI_RC_TRY_AGAIN && timeout == TSS2_TCTI_TIMEOUT_BLOCK
                       ? TSS2_TCTI_RC_IO_ERROR
                       : code;
        }
    }
    if (context->response_bytes != frame_size(context)) {
        return TSS2_TCTI_RC_MALFORMED_RESPONSE;
    }
    if (response == NULL) {
        *size = context->response_bytes;
        return TSS2_RC_SUCCESS;
    }
    if (*size < context->response_bytes) {
        return TSS2_TCTI_RC_INSUFFICIENT_BUFFER;
    }
    response_note(context);
    memcpy(response, context->response, context->response_bytes);
    *size = context->response_bytes;
    explicit_bzero(context->response, context->response_bytes);
    context->response_bytes = 0;
    return TSS2_RC_SUCCESS;
}

static void finalize(TSS2_TCTI_CONTEXT *tcti)
{
    struct context *context = context_of(tcti);
    if (context != NULL) {
        explicit_bzero(context->response, sizeof(context->response));
    }
}

static TSS2_RC refuse_cancel(TSS2_TCTI_CONTEXT *tcti)
{
    (void)tcti;
    return TSS2_TCTI_RC_NOT_IMPLEMENTED;
}

static TSS2_RC refuse_locality(TSS2_TCTI_CONTEXT *tcti, uint8_t locality)
{
    (void)tcti;
    (void)locality;
    return TSS2_TCTI_RC_NOT_IMPLEMENTED;
}

enum cm_status cm_tcti_new(int fd, TSS2_TCTI_CONTEXT **ret_tcti, struct cm_error *err)
{
    struct context *context = calloc(1, sizeof(*context));
    if (context == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "TCTI");
    }
    context->common.magic = MAGIC;
    context->common.version = 1;
    context->common.transmit = transmit;
    context->common.receive = receive;
    context->common.finalize = finalize;
    context->common.cancel = refuse_cancel;
    context->common.setLocality = refuse_locality;
    context->fd = fd;
    *ret_tcti = (TSS2_TCTI_CONTEXT *)context;
    return CM_OK;
}

void cm_tcti_free(TSS2_TCTI_CONTEXT *tcti)
{
    finalize(tcti);
    free(tcti);
}
