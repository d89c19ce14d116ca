/* casemate-pack's commands, and what the command line says. */
#ifndef CASEMATE_LOADER_PACK_COMMANDS_H
#define CASEMATE_LOADER_PACK_COMMANDS_H

#include <stdbool.h>
#include <stdint.h>

#include "runtime/base/error.h"

struct cm_pack_arguments {
    const char *input; /* model or package */
    const char *out;
    const char *owner; /* folder of keys */
    const char *name;
    const char *suite;
    const char *chat_format;
    const char *default_system;
    const char *recovery;
    const char *passphrase_file;
    const char *revision;
    bool json;
};

CM_MUST_USE enum cm_status cm_command_keygen(const struct cm_pack_arguments *arguments,
                                             struct cm_error *err);
CM_MUST_USE enum cm_status cm_command_pack(const struct cm_pack_arguments *arguments,
                                           struct cm_error *err);
CM_MUST_USE enum cm_status cm_command_inspect(const struct cm_pack_arguments *arguments,
                                              struct cm_error *err);
/* Open a package with its recovery file and check every segment. */
CM_MUST_USE enum cm_status cm_command_recover(const struct cm_pack_arguments *arguments,
                                              struct cm_error *err);

#endif
