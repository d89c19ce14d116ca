/* casemate-supervisor: starts the roles, watches them, replaces them, ends them.
 *
 * It parses the configuration and nothing else; request bytes, weights and keys never pass through
 * it, descriptors do. */
#include <fcntl.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#include "policies/config/arguments.h"
#include "runtime/supervisor/supervisor_internal.h"

/* The role programs lie in the folder that `casemate serve` has opened for us. */
static enum cm_status programs_take(int *ret_fd, struct cm_error *err)
{
    struct stat facts;
    if (fstat(CM_IMAGE_FD_FOLDER, &facts) != 0 || !S_ISDIR(facts.st_mode) ||
        fcntl(CM_IMAGE_FD_FOLDER, F_SETFD, FD_CLOEXEC) != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-SUP-PROGRAM",
                            "the folder of the programs is not open: start with `casemate serve`");
    }
    *ret_fd = CM_IMAGE_FD_FOLDER;
    return CM_OK;
}

int main(int argc, char **argv)
{
    static struct service service; /* holds frames and log lines: too large for a stack */
    static struct cm_configuration configuration;
    static struct cm_config_arguments arguments;
    struct cm_error err;
    int programs_fd = -1;
    (void)prctl(PR_SET_NAME, "casemate-supervisor"); /* else the loader's descriptor number */
    enum cm_status status = programs_take(&programs_fd, &err);
    if (status == CM_OK) {
        status = cm_config_arguments_load(argc - 1, argv + 1, &arguments, &configuration, &err);
    }
    if (status == CM_OK) {
        status = cm_config_complete(&configuration, arguments.path, &err);
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
