/* The part of the command line that names configuration: --config FILE, --state DIR, --<key> VALUE.
 */
#ifndef CASEMATE_POLICIES_CONFIG_ARGUMENTS_H
#define CASEMATE_POLICIES_CONFIG_ARGUMENTS_H

#include "policies/config/config.h"

#define CM_CONFIG_OVERRIDES_MAX 64

struct cm_config_arguments {
    char path[CM_CONFIG_TEXT_BYTES]; /* the configuration file */
    struct cm_config_override overrides[CM_CONFIG_OVERRIDES_MAX];
    size_t override_count;
    char names[CM_CONFIG_OVERRIDES_MAX][40];
};

/* Default state folder: /var/lib/casemate for root, else XDG. */
void cm_config_state_default(char ret_path[static CM_CONFIG_TEXT_BYTES]);

/* Parse argv[0..count): every one must be an option with a value. Finds the file: --config, else
 * CASEMATE_CONFIG, else <--state>/casemate.yaml, else /etc/casemate/casemate.yaml if there, else
 * the default state folder's. Borrows argv. Fails: USAGE. */
CM_MUST_USE enum cm_status cm_config_arguments_parse(int count, char *const *argv,
                                                     struct cm_config_arguments *ret_arguments,
                                                     struct cm_error *err);

/* Parse, load, and settle `state`. */
CM_MUST_USE enum cm_status cm_config_arguments_load(int count, char *const *argv,
                                                    struct cm_config_arguments *ret_arguments,
                                                    struct cm_configuration *ret_configuration,
                                                    struct cm_error *err);

/* package, package_owner and policy_authority are set, and the bounds fit each other. */
CM_MUST_USE enum cm_status cm_config_complete(const struct cm_configuration *configuration,
                                              const char *path, struct cm_error *err);

#endif
