/* Who may write into the state folder decides which keys are let in, and which TPM is believed. */
#include <errno.h>
#include <sys/stat.h>

#include "policies/config/config.h"

enum cm_status cm_config_state_check(const char *path, struct cm_error *err)
{
    struct stat facts;
    if (stat(path, &facts) != 0) {
        return cm_error_errno(err, errno, "CM-CFG-STATE",
                              "cannot look at %s (`casemate init` makes it)", path);
    }
    if ((facts.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CFG-STATE",
                            "%s has mode %04o, others than its owner may write there: chmod 700 %s",
                            path, facts.st_mode & 07777, path);
    }
    return CM_OK;
}
