/* casemate-gateway: started by the supervisor with its descriptors; by hand only for --version and
 * --print-api. */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "runtime/gateway/gateway_internal.h"

static int usage(void)
{
    fputs("casemate-gateway is started by casemate-supervisor.\n"
          "usage: casemate-gateway --version | --print-api\n",
          stderr);
    return cm_status_exit_code(CM_E_USAGE);
}

static int serve(void)
{
    static struct gateway gateway = {
        .log = {.fd = CM_FD_LOG, .role = "gateway", .level = CM_LOG_INFO}};
    struct cm_error err;
    bool stop = false;
    TAILQ_INIT(&gateway.connections);
    TAILQ_INIT(&gateway.graves);
    TAILQ_INIT(&gateway.flights);
    signal(SIGPIPE, SIG_IGN);
    /* A log that nobody reads costs lines, never the service. */
    (void)fcntl(CM_FD_LOG, F_SETFL, O_WRONLY | O_NONBLOCK);
    cm_channel_init(&gateway.channel, CM_FD_CONTROL, CM_ROLE_GATEWAY, CM_ROLE_SUPERVISOR);
    if (cm_confine_begin("casemate-gateway", &gateway.confinement, &err) != CM_OK ||
        gateway_start(&gateway, &stop, &err) != CM_OK) {
        control_fail(&gateway, &err);
    } else if (!stop) {
        event_base_dispatch(gateway.base);
    }
    gateway_free(&gateway);
    return gateway.exit_code;
}

int main(int argc, char **argv)
{
    if (argc == 1) {
        /* Without the supervisor's socket there is nothing to talk to. */
        return fcntl(CM_FD_CONTROL, F_GETFD) >= 0 ? serve() : usage();
    }
    if (argc == 2 && strcmp(argv[1], "--version") == 0) {
        puts("casemate-gateway " CASEMATE_VERSION);
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "--print-api") == 0) {
        cm_print_api();
        return 0;
    }
    return usage();
}
