/* A supervisor and a scripted worker around a real casemate-gateway, for tests/gateway_scene.py.
 *
 *     gateway_harness GATEWAY FOLDER [name=value …]
 *
 * Makes a TLS key page, a self-signed certificate (FOLDER/certificate.pem), rings, the key table
 * and a listener on 127.0.0.1; the gateway's log goes to FOLDER/gateway.log. Events leave as JSON
 * lines on stdout, commands come as lines on stdin. What the worker does, the first word of the
 * last message says. Built for tests only, never installed. */
#include "tests/harness/gateway/harness.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define LOG_MODE 0600

static struct harness harness = {
    .config = {.header_bytes_max = 16384,
               .body_bytes_max = 65536,
               .connections_max = 64,
               .requests_max = 8,
               .requests_per_key_max = 6,
               .header_timeout_ms = 2000,
               .body_timeout_ms = 2000,
               .write_timeout_ms = 2000,
               .request_timeout_ms = 20000,
               .ring_data_bytes = 1u << 20,
               .version = "harness"},
    .state = {.ready = 1, .load = {.stage = CM_LOAD_READY}},
};

static void option(char *text)
{
    struct cm_config_gateway *config = &harness.config;
    const struct {
        const char *name;
        uint32_t *value;
    } numbers[] = {
        {"header_bytes_max", &config->header_bytes_max},
        {"body_bytes_max", &config->body_bytes_max},
        {"connections_max", &config->connections_max},
        {"requests_max", &config->requests_max},
        {"requests_per_key_max", &config->requests_per_key_max},
        {"header_timeout_ms", &config->header_timeout_ms},
        {"body_timeout_ms", &config->body_timeout_ms},
        {"write_timeout_ms", &config->write_timeout_ms},
        {"request_timeout_ms", &config->request_timeout_ms},
        {"max_tokens_default", &config->max_tokens_default},
        {"unauthenticated_metrics", &config->unauthenticated_metrics},
        {"ring_data_bytes", &config->ring_data_bytes},
    };
    char *value = strchr(text, '=');
    check(value != NULL, "option");
    *value++ = '\0';
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        if (strcmp(text, numbers[i].name) == 0) {
            *numbers[i].value = (uint32_t)strtoul(value, NULL, 10);
            return;
        }
    }
    if (strcmp(text, "key") == 0) {
        key_add(&harness, value);
    } else if (strcmp(text, "model_name") == 0) {
        snprintf(config->model_name, sizeof(config->model_name), "%s", value);
    } else {
        die(text);
    }
}

static int listener_make(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof(address);
    const int on = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    check(fd >= 0 && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0 &&
              bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(fd, 128) == 0 &&
              getsockname(fd, (struct sockaddr *)&address, &bytes) == 0,
          "listener");
    event("port", ",\"port\":%u", ntohs(address.sin_port));
    return fd;
}

static int log_open(const char *folder)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/gateway.log", folder);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, LOG_MODE);
    check(fd >= 0, path);
    return fd;
}

/* The gateway with all that the launcher gives it, then the frames that it starts with. */
static void scene_make(const char *program, const char *folder)
{
    static struct cm_tls_page page;
    int fds[CM_FD_COUNT];
    int pair[2];
    for (size_t i = 0; i < CM_FD_COUNT; i++) {
        fds[i] = -1;
    }
    check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
    cm_channel_init(&harness.channel, pair[0], CM_ROLE_SUPERVISOR, CM_ROLE_GATEWAY);
    harness.page_fd = identity_make(folder, &page);
    fds[CM_FD_CONTROL] = pair[1];
    fds[CM_FD_LOG] = log_open(folder);
    fds[CM_FD_INPUT] = listener_make();
    rings_renew(&harness, &fds[CM_FD_REQUEST_DATA]);
    gateway_spawn(program, fds);
    for (int i = CM_FD_CONTROL; i <= CM_FD_RESPONSE_CURSOR; i++) { /* the events are the worker's */
        close(fds[i]);
    }
    frame_put(&harness, CM_FRAME_CONFIG, &harness.config, sizeof(harness.config), NULL, 0);
    frame_put(&harness, CM_FRAME_TLS_PAGE, &page, sizeof(page), &harness.page_fd, 1);
    keys_put(&harness, NULL, false);
    state_put(&harness);
    hello_put(&harness.worker);
}

static void serve(void)
{
    struct worker *worker = &harness.worker;
    for (;;) {
        struct pollfd polls[3] = {{.fd = 0, .events = POLLIN},
                                  {.fd = harness.channel.fd, .events = POLLIN},
                                  {.fd = worker->request_event, .events = POLLIN}};
        poll(polls, 3, jobs_active(worker) ? 1 : 100);
        if (gateway_ended()) {
            return;
        }
        if ((polls[1].revents & POLLIN) != 0) {
            frame_take(&harness);
        }
        if ((polls[2].revents & POLLIN) != 0) {
            worker_read(worker);
        }
        if (polls[0].revents != 0) {
            commands_read(&harness);
        }
        if (!worker_turn(worker)) {
            rings_put(&harness); /* as after a new start */
        }
    }
}

int main(int argc, char **argv)
{
    check(argc >= 3, "usage: gateway_harness GATEWAY FOLDER [name=value …]");
    signal(SIGPIPE, SIG_IGN);
    worker_init(&harness.worker);
    for (int i = 3; i < argc; i++) {
        option(argv[i]);
    }
    scene_make(argv[1], argv[2]);
    serve();
    worker_done(&harness.worker);
    return 0;
}
