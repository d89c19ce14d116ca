/* The control protocol: what the table permits passes, everything else is refused. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "runtime/base/frame.h"

static const struct cm_ready ready = {.probed = 1};
static struct cm_frame frame; /* 8 KiB: kept off the stack */

static void channels_open(struct cm_channel *supervisor, struct cm_channel *child,
                          enum cm_role role)
{
    int ends[2];
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    cm_channel_init(supervisor, ends[0], CM_ROLE_SUPERVISOR, role);
    cm_channel_init(child, ends[1], role, CM_ROLE_SUPERVISOR);
}

Test(base_frame, config_ready_and_a_descriptor_pass)
{
    struct cm_channel supervisor, child;
    struct cm_error err;
    struct cm_config_worker config = {.threads = 2};
    channels_open(&supervisor, &child, CM_ROLE_KEEPER);
    cr_assert_eq(
        cm_channel_send(&supervisor, CM_FRAME_CONFIG, &config, sizeof(config), NULL, 0, &err),
        CM_OK);
    cr_assert_eq(cm_channel_wait(&child, &frame, 1000, &err), CM_OK);
    cr_assert_eq(frame.type, CM_FRAME_CONFIG);
    cr_assert_eq(memcmp(frame.payload, &config, sizeof(config)), 0);
    cr_assert_eq(cm_channel_send(&child, CM_FRAME_READY, &ready, sizeof(ready), NULL, 0, &err),
                 CM_OK);
    cr_assert_eq(cm_channel_wait(&supervisor, &frame, 1000, &err), CM_OK);
    cr_assert_eq(supervisor.phase, CM_PHASE_SERVE);
    struct cm_key_page_info info = {.generation = 1};
    int fd = open("/dev/null", O_RDONLY);
    cr_assert_eq(cm_channel_send(&child, CM_FRAME_KEY_PAGE, &info, sizeof(info), &fd, 1, &err),
                 CM_OK);
    cr_assert_eq(cm_channel_wait(&supervisor, &frame, 1000, &err), CM_OK);
    cr_assert_eq(frame.fd_count, 1u);
    cr_assert(fcntl(frame.fds[0], F_GETFD) & FD_CLOEXEC);
    cm_frame_close_fds(&frame);
}

Test(base_frame, wrong_way_phase_size_count_and_repetition_are_refused_on_both_sides)
{
    struct cm_channel supervisor, child;
    struct cm_error err;
    struct cm_drain drain = {.deadline_ms = 1};
    channels_open(&supervisor, &child, CM_ROLE_GATEWAY);
    /* Not in this phase, wrong direction, wrong size, descriptors missing. */
    cr_assert_eq(cm_channel_send(&supervisor, CM_FRAME_DRAIN, &drain, sizeof(drain), NULL, 0, &err),
                 CM_E_BUG);
    cr_assert_eq(cm_channel_send(&supervisor, CM_FRAME_READY, &ready, sizeof(ready), NULL, 0, &err),
                 CM_E_BUG);
    cr_assert_eq(cm_channel_send(&child, CM_FRAME_READY, &drain, sizeof(drain) - 1, NULL, 0, &err),
                 CM_E_BUG);
    cr_assert_eq(cm_channel_send(&supervisor, CM_FRAME_RINGS, NULL, 0, NULL, 0, &err), CM_E_BUG);
    /* A child that ignores the table: raw packets. */
    struct {
        uint16_t type, fds;
        uint32_t bytes;
    } raw[] = {{99, 0, 0},
               {CM_FRAME_CONFIG, 0, 0},
               {CM_FRAME_KEY_PAGE, 0, 0},
               {CM_FRAME_READY, 0, 4},
               {CM_FRAME_READY, 1, 0},
               {0, 0, 0}};
    for (size_t i = 0; i < sizeof(raw) / sizeof(raw[0]); i++) {
        cr_assert_eq(send(child.fd, &raw[i], sizeof(raw[i]), 0), (ssize_t)sizeof(raw[i]));
        cr_assert_eq(cm_channel_wait(&supervisor, &frame, 1000, &err), CM_E_INPUT, "row %zu", i);
    }
    cr_assert_eq(send(child.fd, "abc", 3, 0), 3);
    cr_assert_eq(cm_channel_wait(&supervisor, &frame, 1000, &err), CM_E_INPUT);
    cr_assert_eq(cm_channel_send(&child, CM_FRAME_READY, &ready, sizeof(ready), NULL, 0, &err),
                 CM_OK);
    cr_assert_eq(cm_channel_wait(&supervisor, &frame, 1000, &err), CM_OK);
    cr_assert_eq(send(child.fd, &raw[3], 8, 0), 8);
    cr_assert_eq(cm_channel_wait(&supervisor, &frame, 1000, &err), CM_E_INPUT);
}

Test(base_frame, silence_is_busy_and_a_closed_peer_is_epipe)
{
    struct cm_channel supervisor, child;
    struct cm_error err;
    channels_open(&supervisor, &child, CM_ROLE_WORKER);
    cr_assert_eq(cm_channel_receive(&supervisor, &frame, &err), CM_E_BUSY);
    cr_assert_eq(cm_channel_wait(&supervisor, &frame, 10, &err), CM_E_BUSY);
    close(child.fd);
    cr_assert_eq(cm_channel_wait(&supervisor, &frame, 1000, &err), CM_E_SYSTEM);
    cr_assert_eq(err.subcode, 32 /* EPIPE */);
    cr_assert_eq(cm_channel_send(&supervisor, CM_FRAME_STOP, NULL, 0, NULL, 0, &err), CM_E_SYSTEM);
}

static enum cm_status other_count(void *context, struct cm_frame *other, struct cm_error *err)
{
    (void)err;
    *(int *)context += other->type == CM_FRAME_RINGS;
    cm_frame_close_fds(other);
    return CM_OK;
}

Test(base_frame, a_child_that_waits_shows_life_and_takes_what_comes, .timeout = 10)
{
    struct cm_channel supervisor, child;
    struct cm_error err;
    struct cm_key_page_info info = {.generation = 1};
    int other = 0, fd = open("/dev/null", O_RDONLY), fds[CM_RING_FD_COUNT];
    for (int i = 0; i < CM_RING_FD_COUNT; i++) {
        fds[i] = fd;
    }
    channels_open(&supervisor, &child, CM_ROLE_WORKER);
    if (fork() == 0) {
        bool beat = cm_channel_wait(&supervisor, &frame, 5000, &err) == CM_OK &&
                    frame.type == CM_FRAME_HEARTBEAT;
        bool sent = cm_channel_send(&supervisor, CM_FRAME_RINGS, NULL, 0, fds, CM_RING_FD_COUNT,
                                    &err) == CM_OK &&
                    cm_channel_send(&supervisor, CM_FRAME_KEY_PAGE, &info, sizeof(info), &fd, 1,
                                    &err) == CM_OK &&
                    cm_channel_send(&supervisor, CM_FRAME_STOP, NULL, 0, NULL, 0, &err) == CM_OK;
        _exit(beat && sent ? 0 : 1);
    }
    cr_assert_eq(cm_channel_await(&child, CM_FRAME_KEY_PAGE, other_count, &other, &frame, &err),
                 CM_OK);
    cr_assert(frame.type == CM_FRAME_KEY_PAGE && frame.fd_count == 1 && other == 1);
    cm_frame_close_fds(&frame);
    cr_assert_eq(cm_channel_await(&child, CM_FRAME_KEY_PAGE, other_count, &other, &frame, &err),
                 CM_OK);
    cr_assert_eq(frame.type, CM_FRAME_STOP);
    close(supervisor.fd);
    cr_assert_eq(cm_channel_await(&child, CM_FRAME_KEY_PAGE, other_count, &other, &frame, &err),
                 CM_E_SYSTEM);
}
