/* The control protocol's table, and the code that holds both sides to it. */
#include "runtime/base/frame.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "runtime/base/kill_point.h"

#define S  CM_ROLE_SUPERVISOR
#define G  CM_ROLE_GATEWAY
#define K  CM_ROLE_KEEPER
#define W  CM_ROLE_WORKER
#define C  CM_ROLE_ANY_CHILD
#define P0 CM_PHASE_START
#define P1 CM_PHASE_SERVE
#define P2 CM_PHASE_DRAIN

#define EXACT(type) sizeof(type), sizeof(type)

#define HEARTBEAT_MS 1000

const struct cm_frame_row cm_frames[CM_FRAME_TYPE_COUNT] = {
    [CM_FRAME_CONFIG] = {"config", S, C, P0, true, sizeof(struct cm_config_devtpm),
                         CM_FRAME_PAYLOAD_BYTES, 0, "the role's configuration, first of all"},
    [CM_FRAME_READY] = {"ready", C, S, P0, true, EXACT(struct cm_ready), 0,
                        "the role serves from now on, under the confinement that it has tried"},
    [CM_FRAME_FAILED] = {"failed", C, S, P0 | P1 | P2, true, EXACT(struct cm_error), 0,
                         "why the role is about to exit"},
    [CM_FRAME_PROGRESS] = {"progress", W, S, P0, false, EXACT(struct cm_progress), 0,
                           "how far the load is, for /startupz and the log"},
    [CM_FRAME_STATE] = {"state", S, G, P0 | P1 | P2, false, EXACT(struct cm_state), 0,
                        "what the probes answer of the other roles"},
    [CM_FRAME_RINGS] = {"rings", S, G | W, P0 | P1 | P2, false, 0, 0, CM_RING_FD_COUNT,
                        "the neighbour was replaced: a fresh pair of rings"},
    [CM_FRAME_KEY_REQUEST] = {"key_request", S, K, P1, false, EXACT(struct cm_key_request), 0,
                              "a worker generation needs the package key"},
    [CM_FRAME_KEY_PAGE] = {"key_page", K | S, S | W, P0 | P1, false, EXACT(struct cm_key_page_info),
                           1, "the page, passed on unmapped"},
    [CM_FRAME_TLS_REQUEST] = {"tls_request", S, K, P1, false, EXACT(struct cm_key_request), 0,
                              "a gateway generation needs the TLS key"},
    [CM_FRAME_TLS_PAGE] = {"tls_page", K | S, S | G, P0 | P1, false, EXACT(struct cm_tls_page), 1,
                           "the page and the public certificate"},
    [CM_FRAME_LOADED] = {"loaded", W | S, S | K, P0 | P1, false, EXACT(struct cm_loaded), 0,
                         "the weights are in; the key page is wiped"},
    [CM_FRAME_KEYS] = {"keys", S, G, P0 | P1 | P2, false, EXACT(struct cm_keys_info), 1,
                       "table of API keys, a new generation"},
    [CM_FRAME_HEARTBEAT] = {"heartbeat", C, S, P0 | P1 | P2, false, EXACT(struct cm_heartbeat), 0,
                            "alive, once a second"},
    [CM_FRAME_DRAIN] = {"drain", S, G | W, P1, true, EXACT(struct cm_drain), 0,
                        "take nothing new, finish by the deadline"},
    [CM_FRAME_DRAINED] = {"drained", G | W, S, P1 | P2, true, 0, 0, 0, "nothing is left in flight"},
    [CM_FRAME_MEASURE] = {"measure", S, K, P0, false, EXACT(struct cm_measure), 1,
                          "what runs and what is configured, as sealed descriptors, in order"},
    [CM_FRAME_UNSEAL] = {"unseal", S, K, P0, true, 0, 0, 0,
                         "all is measured: extend the PCR, then unseal"},
    [CM_FRAME_QUOTE] = {"quote", G | S, S | K, P1 | P2, false, EXACT(struct cm_quote_request), 0,
                        "evidence for a client's nonce and connection, or the service's own"},
    [CM_FRAME_EVIDENCE] = {"evidence", K | S, S | G, P1 | P2, false, EXACT(struct cm_evidence_info),
                           1, "the evidence, in a sealed memfd"},
    [CM_FRAME_RULES] = {"rules", S, W, P0, true, EXACT(struct cm_rules_info), 1,
                        "the compiled guard rules, in a sealed memfd"},
    [CM_FRAME_QUOTE_FAILED] = {"quote_failed", K | S, S | G, P1 | P2, false,
                               EXACT(struct cm_quote_failed), 0, "why there is no evidence"},
    [CM_FRAME_BROKEN] = {"broken", G | W, S, P1 | P2, false, 0, 0, 0,
                         "the neighbour broke the rules of the rings: it is replaced"},
    [CM_FRAME_ADAPTER_OPEN] = {"adapter_open", S, K, P1, false, EXACT(struct cm_adapter_open), 1,
                               "an adapter's head and policy list: unseal its key and keep it"},
    [CM_FRAME_ADAPTER_KEY] = {"adapter_key", S, K, P1, false, EXACT(struct cm_adapter_step), 0,
                              "hand its key out in the key page"},
    [CM_FRAME_ADAPTER_ANSWER] = {"adapter_answer", K, S, P1 | P2, false,
                                 EXACT(struct cm_adapter_answer), 0,
                                 "its key is unsealed, or why it is not unsealed or handed out"},
    [CM_FRAME_ADAPTER_PAGE] = {"adapter_page", K, S, P1 | P2, false, EXACT(struct cm_adapter_step),
                               1, "the page with its key, passed on unmapped"},
    [CM_FRAME_ADAPTER_CLOSE] = {"adapter_close", S, K, P1, false, EXACT(struct cm_adapter_step), 0,
                                "a load is over, its page wiped; or the key is to be forgotten"},
    [CM_FRAME_ADAPTER_LOAD] = {"adapter_load", S, W, P1, false, EXACT(struct cm_adapter_load), 1,
                               "the page, with an adapter's key: load it"},
    [CM_FRAME_ADAPTER_READ] = {"adapter_read", W, S, P1 | P2, false, EXACT(struct cm_adapter_chunk),
                               0, "the worker wants these bytes of the adapter's file"},
    [CM_FRAME_ADAPTER_BYTES] = {"adapter_bytes", S, W, P1, false, EXACT(struct cm_adapter_chunk), 1,
                                "they, in sealed memory"},
    [CM_FRAME_ADAPTER_UNLOAD] = {"adapter_unload", S, W, P1, false, EXACT(struct cm_adapter_step),
                                 0, "begin nothing more with it, finish, wipe it"},
    [CM_FRAME_ADAPTER_STATE] = {"adapter_state", W, S, P1 | P2, false,
                                EXACT(struct cm_adapter_told), 0,
                                "it serves, was refused, or is gone"},
    [CM_FRAME_TLS_IDENTITY] = {"tls_identity", K | S, S | K, P0, true, EXACT(struct cm_tls_page), 1,
                               "the service's TLS key and certificate, from keeper to keeper"},
    [CM_FRAME_STOP] = {"stop", S, C, P0 | P1 | P2, true, 0, 0, 0, "exit now with 0"},
};

#define T CM_ROLE_DEVTPM

const struct cm_fd_row cm_fd_rows[CM_FD_COUNT] = {
    [CM_FD_CONTROL] = {"control", C, "the channel to the supervisor"},
    [CM_FD_LOG] = {"log", C, "JSON lines out"},
    [CM_FD_INPUT] = {"input", C,
                     "gateway: listener; worker: package; keeper: head and policy list in a "
                     "memfd; devtpm: state file"},
    [CM_FD_REQUEST_DATA] = {"request_data", G | W, "request ring: records"},
    [CM_FD_REQUEST_CURSOR] = {"request_cursor", G | W, "request ring: how far the worker has read"},
    [CM_FD_RESPONSE_DATA] = {"response_data", G | W, "response ring: records"},
    [CM_FD_RESPONSE_CURSOR] = {"response_cursor", G | W,
                               "response ring: how far the gateway has read"},
    [CM_FD_REQUEST_EVENT] = {"request_event", G | W, "eventfd that wakes the worker"},
    [CM_FD_RESPONSE_EVENT] = {"response_event", G | W, "eventfd that wakes the gateway"},
    [CM_FD_TPM] = {"tpm", K | T, "raw TPM frames"},
};

const char *const cm_adapter_state_names[CM_ADAPTER_STATE_COUNT] = {
    [CM_ADAPTER_ABSENT] = "absent",     [CM_ADAPTER_WAITING] = "waiting",
    [CM_ADAPTER_UNSEALED] = "unsealed", [CM_ADAPTER_LOADING] = "loading",
    [CM_ADAPTER_SERVING] = "serving",   [CM_ADAPTER_UNLOADING] = "unloading",
    [CM_ADAPTER_REFUSED] = "refused",
};

bool cm_name_valid(const char *name)
{
    size_t size = strnlen(name, CM_NAME_BYTES);
    return size >= 1 && size < CM_NAME_BYTES && name[0] != '.' &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") ==
               size;
}

bool cm_keeper_replaceable(const struct cm_config_keeper *config)
{
    return config->development_tpm == 1 && config->strict == 0;
}

struct header {
    uint16_t type;
    uint16_t fd_count;
    uint32_t bytes;
};

void cm_channel_init(struct cm_channel *channel, int fd, enum cm_role self, enum cm_role peer)
{
    *channel = (struct cm_channel){.fd = fd, .self = self, .peer = peer, .phase = CM_PHASE_START};
}

/* Both ends follow the phase through the frames that change it. */
static void channel_advance(struct cm_channel *channel, enum cm_frame_type type)
{
    if (type == CM_FRAME_READY) {
        channel->phase = CM_PHASE_SERVE;
    } else if (type == CM_FRAME_DRAIN) {
        channel->phase = CM_PHASE_DRAIN;
    }
}

/* NULL if the table permits this frame now, else the reason. */
static const char *frame_refusal(const struct cm_channel *channel, uint16_t type, uint32_t sender,
                                 uint32_t receiver, uint64_t seen, size_t bytes, size_t fds)
{
    if (type == 0 || type >= CM_FRAME_TYPE_COUNT) {
        return "unknown type";
    }
    const struct cm_frame_row *row = &cm_frames[type];
    if ((row->senders & sender) == 0 || (row->receivers & receiver) == 0) {
        return "wrong direction";
    }
    if ((row->phases & (uint32_t)channel->phase) == 0) {
        return "wrong phase";
    }
    if (bytes < row->bytes_min || bytes > row->bytes_max) {
        return "wrong size";
    }
    if (fds != row->fds) {
        return "wrong number of descriptors";
    }
    if (row->once && (seen & (1ull << type)) != 0) {
        return "sent twice";
    }
    return NULL;
}

enum cm_status cm_channel_send(struct cm_channel *channel, enum cm_frame_type type,
                               const void *payload, size_t bytes, const int *fds, size_t fd_count,
                               struct cm_error *err)
{
    const char *refusal =
        frame_refusal(channel, (uint16_t)type, (uint32_t)channel->self, (uint32_t)channel->peer,
                      channel->sent_once, bytes, fd_count);
    if (refusal != NULL) {
        return cm_error_set(err, CM_E_BUG, "CM-FRAME-SEND", "frame %d not permitted: %s", (int)type,
                            refusal);
    }
    struct header header = {(uint16_t)type, (uint16_t)fd_count, (uint32_t)bytes};
    struct iovec parts[2] = {{&header, sizeof(header)}, {(void *)payload, bytes}};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * CM_FRAME_FDS)];
    } control = {.bytes = {0}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = bytes > 0 ? 2 : 1};
    if (fd_count > 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(rights), fds, sizeof(int) * fd_count);
    }
    ssize_t sent;
    CM_KILL_POINT("before", "send", cm_frames[type].name);
    do {
        sent = sendmsg(channel->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0 && (errno == EAGAIN || errno == ENOBUFS)) {
        return cm_error_set(err, CM_E_BUSY, "CM-FRAME-FULL", "control socket full at frame %s",
                            cm_frames[type].name);
    }
    if (sent < 0) {
        return cm_error_errno(err, errno, "CM-FRAME-SEND", "cannot send frame %s",
                              cm_frames[type].name);
    }
    CM_KILL_POINT("after", "send", cm_frames[type].name);
    channel->sent_once |= 1ull << type;
    channel_advance(channel, type);
    return CM_OK;
}

void cm_frame_close_fds(struct cm_frame *frame)
{
    for (uint32_t i = 0; i < frame->fd_count; i++) {
        close(frame->fds[i]);
    }
    frame->fd_count = 0;
}

static void frame_take_fds(struct cm_frame *frame, struct msghdr *message)
{
    frame->fd_count = 0;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(message); at != NULL; at = CMSG_NXTHDR(message, at)) {
        if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        size_t count = (at->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(at) + i * sizeof(int), sizeof(int));
            if (frame->fd_count < CM_FRAME_FDS) {
                frame->fds[frame->fd_count++] = fd;
            } else {
                close(fd);
            }
        }
    }
}

enum cm_status cm_channel_receive(struct cm_channel *channel, struct cm_frame *frame,
                                  struct cm_error *err)
{
    struct header header;
    struct iovec parts[2] = {{&header, sizeof(header)}, {frame->payload, sizeof(frame->payload)}};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * CM_FRAME_FDS)];
    } control;
    struct msghdr message = {.msg_iov = parts,
                             .msg_iovlen = 2,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    ssize_t size;
    CM_KILL_POINT_NOW();
    do {
        size = recvmsg(channel->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (size < 0 && errno == EINTR);
    if (size < 0 && errno == EAGAIN) {
        return cm_error_set(err, CM_E_BUSY, "CM-FRAME-EMPTY", "no control frame");
    }
    if (size == 0 || (size < 0 && errno == ECONNRESET)) {
        return cm_error_errno(err, EPIPE, "CM-FRAME-CLOSED", "control channel closed");
    }
    if (size < 0) {
        return cm_error_errno(err, errno, "CM-FRAME-RECEIVE", "cannot receive a control frame");
    }
    frame_take_fds(frame, &message);
    const char *refusal = NULL;
    if ((message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 || (size_t)size < sizeof(header) ||
        header.bytes != (size_t)size - sizeof(header) || header.fd_count != frame->fd_count) {
        refusal = "broken header";
    } else {
        refusal =
            frame_refusal(channel, header.type, (uint32_t)channel->peer, (uint32_t)channel->self,
                          channel->received_once, header.bytes, frame->fd_count);
    }
    if (refusal != NULL) {
        cm_frame_close_fds(frame);
        return cm_error_set(err, CM_E_INPUT, "CM-FRAME-PROTOCOL", "control frame refused: %s",
                            refusal);
    }
    CM_KILL_POINT("before", "handle", cm_frames[header.type].name);
    CM_KILL_POINT_AFTER("handle", cm_frames[header.type].name);
    frame->type = header.type;
    frame->bytes = header.bytes;
    channel->received_once |= 1ull << header.type;
    channel_advance(channel, (enum cm_frame_type)header.type);
    return CM_OK;
}

enum cm_status cm_channel_wait(struct cm_channel *channel, struct cm_frame *frame, int timeout_ms,
                               struct cm_error *err)
{
    struct pollfd poller = {.fd = channel->fd, .events = POLLIN};
    int ready;
    do {
        ready = poll(&poller, 1, timeout_ms);
    } while (ready < 0 && errno == EINTR);
    if (ready < 0) {
        return cm_error_errno(err, errno, "CM-FRAME-RECEIVE", "cannot wait for a control frame");
    }
    if (ready == 0) {
        return cm_error_set(err, CM_E_BUSY, "CM-FRAME-TIMEOUT", "no control frame within %d ms",
                            timeout_ms);
    }
    return cm_channel_receive(channel, frame, err);
}

enum cm_status cm_channel_await(struct cm_channel *channel, enum cm_frame_type wanted,
                                cm_frame_other other, void *context, struct cm_frame *frame,
                                struct cm_error *err)
{
    struct cm_heartbeat heartbeat = {.counter = 0};
    for (;;) {
        enum cm_status status = cm_channel_wait(channel, frame, HEARTBEAT_MS, err);
        if (status == CM_OK && (frame->type == wanted || frame->type == CM_FRAME_STOP)) {
            return CM_OK;
        }
        if (status == CM_OK) {
            status = other(context, frame, err);
        } else if (status == CM_E_BUSY) {
            heartbeat.counter++;
            status = cm_channel_send(channel, CM_FRAME_HEARTBEAT, &heartbeat, sizeof(heartbeat),
                                     NULL, 0, err);
        }
        if (status != CM_OK) {
            return status;
        }
    }
}
