/* casemate-supervisor: starts the roles, watches them, replaces them, ends them.
 *
 * It parses the configuration and nothing else; request bytes, weights and keys never pass through
 * it, descriptors do. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "policies/config/arguments.h"
#include "runtime/supervisor/supervisor_internal.h"

/* The role programs lie beside our own executable. */
static enum cm_status programs_open(int *ret_fd, struct cm_error *err)
{
    char path[4096];
    ssize_t size = readlink("/proc/self/exe", path, sizeof(path) - 1);
    if (size <= 0) {
        return cm_error_errno(err, errno, "CM-SUP-PROGRAM", "cannot find our own folder");
    }
    path[size] = '\0';
    *strrchr(path, '/') = '\0';
    int fd = open(path[0] != '\0' ? path : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-SUP-PROGRAM", "cannot open %s", path);
    }
    *ret_fd = fd;
    return CM_OK;
}

int main(int argc, char **argv)
{
    static struct service service; /* holds frames and log lines: too large for a stack */
    static struct cm_configuration configuration;
    static struct cm_config_arguments arguments;
    struct cm_error err;
    int programs_fd = -1;
    enum cm_status status =
        cm_config_arguments_load(argc - 1, argv + 1, &arguments, &configuration, &err);
    if (status == CM_OK) {
        status = cm_config_complete(&configuration, arguments.path, &err);
    }
    if (status == CM_OK) {
        status = programs_open(&programs_fd, &err);
    }
    if (status == CM_OK) {
        status = service_open(&service, &configuration, programs_fd, &err);
        if (status == CM_OK) {
            status = service_run(&service, &err);
        }
        service_close(&service);
    }
    if (status != CM_OK) {
        fprintf(stderr, "casemate: %s: %s\n", err.id, err.text);
    }
    return cm_status_exit_code(status);
}
