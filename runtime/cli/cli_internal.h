/* casemate's inside: one function per command, one file per matter. */
#ifndef CASEMATE_RUNTIME_CLI_INTERNAL_H
#define CASEMATE_RUNTIME_CLI_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "policies/config/arguments.h"
#include "runtime/base/error.h"
#include "runtime/base/frame.h"

/* The words after the command; options are taken out as they are understood. */
struct words {
    int count;
    char *at[128];
};

/* Take "--name" out; true if it was there. */
bool words_flag_take(struct words *words, const char *name);
/* Take "--name VALUE" or "--name=VALUE" out; NULL if it was not there. */
const char *words_value_take(struct words *words, const char *name);

struct command {
    const char *name;
    const char *summary;
    const char *help; /* whole text of --help, with an example */
    enum cm_status (*run)(struct words *words, struct cm_error *err);
};

enum cm_status command_init(struct words *words, struct cm_error *err);
enum cm_status command_serve(struct words *words, struct cm_error *err);
enum cm_status command_keys(struct words *words, struct cm_error *err);
enum cm_status command_check(struct words *words, struct cm_error *err);
enum cm_status command_doctor(struct words *words, struct cm_error *err);
enum cm_status command_sandbox(struct words *words, struct cm_error *err);
enum cm_status command_status(struct words *words, struct cm_error *err);
enum cm_status command_measure(struct words *words, struct cm_error *err);
enum cm_status command_policy(struct words *words, struct cm_error *err);
enum cm_status command_revoke(struct words *words, struct cm_error *err);
enum cm_status command_answer(struct words *words, struct cm_error *err);
enum cm_status command_rules(struct words *words, struct cm_error *err);
enum cm_status command_guard(struct words *words, struct cm_error *err);
enum cm_status command_adapter(struct words *words, struct cm_error *err);
enum cm_status command_version(struct words *words, struct cm_error *err);

/* status.c: the supervisor of that state folder lives: it holds its lock as long. */
bool cli_service_runs(const char *state);
/* That it lives and listens there. */
bool cli_service_listens(const char *state, const char *address);

/* files.c: whole small files; writing is beside, fsync, rename. */
CM_MUST_USE enum cm_status cli_file_read(const char *path, uint8_t *bytes, size_t size,
                                         size_t *ret_used, struct cm_error *err);
CM_MUST_USE enum cm_status cli_file_write(const char *path, const void *bytes, size_t size,
                                          unsigned mode, struct cm_error *err);
/* What root writes into the folder of the service's user belongs to that user, as the folder does.
 */
void cli_owner_follow(const char *path);
/* Folder of our own executable plus name. */
CM_MUST_USE enum cm_status cli_program_path(const char *name, char *ret_path, size_t size,
                                            struct cm_error *err);
/* That folder, as a close-on-exec O_PATH descriptor. */
CM_MUST_USE enum cm_status cli_programs_open(int *ret_fd, struct cm_error *err);

/* The head of the package at `path`, parsed, and the file as long as it says; authenticates
 * nothing. Fails: PACKAGE. */
struct cm_package_head;
CM_MUST_USE enum cm_status cli_package_head(const char *path, struct cm_package_head *ret_head,
                                            struct cm_error *err);

/* provision.c: run the keeper once (and a development TPM for it) and take the enrolment record.
 * development_state: path of the state file to make, or NULL for a device at tpm_path. */
CM_MUST_USE enum cm_status cli_provision(const char *node_name, const char *tpm_path,
                                         const char *development_state,
                                         uint8_t ret_record[static CM_ENROLMENT_BYTES_MAX],
                                         size_t *ret_bytes, struct cm_error *err);

/* Step the node's counter once: every state signed for less is over. */
CM_MUST_USE enum cm_status cli_counter_step(const char *tpm_path, const char *development_state,
                                            uint64_t *ret_counter, struct cm_error *err);

/* The secret that a challenge holds for this TPM's keys alone. */
CM_MUST_USE enum cm_status cli_challenge_answer(const char *tpm_path, const char *development_state,
                                                const uint8_t *challenge, size_t size,
                                                uint8_t ret_secret[static CM_DIGEST_BYTES],
                                                struct cm_error *err);

/* What the TPM says of itself now. */
struct cli_tpm_facts {
    uint64_t counter;
    uint8_t pcrs[24][CM_DIGEST_BYTES]; /* SHA-256 bank */
};
CM_MUST_USE enum cm_status cli_keeper_look(const char *tpm_path, const char *development_state,
                                           struct cli_tpm_facts *ret_facts, struct cm_error *err);
/* tpm.c: the same by the configuration. Fails: SYSTEM while a development TPM serves. */
CM_MUST_USE enum cm_status cli_tpm_look(const struct cm_configuration *configuration,
                                        struct cli_tpm_facts *ret_facts, struct cm_error *err);
/* policy.c: the list beside the package, each state signed by the pinned authority. Fails: POLICY.
 */
struct cm_policy_list;
CM_MUST_USE enum cm_status cli_policy_list(const struct cm_configuration *configuration,
                                           struct cm_policy_list *ret_list, struct cm_error *err);
/* Signed states that a start would match after one more step of the counter. */
CM_MUST_USE enum cm_status cli_policy_survivors(struct words *words, uint32_t *ret_count,
                                                struct cm_error *err);

/* measure.c: the events before the package's, as a start would measure them. */
struct cm_measurement;
CM_MUST_USE enum cm_status cli_measure(const struct cm_configuration *configuration,
                                       struct cm_measurement *ret_measurement,
                                       struct cm_error *err);

/* keystore.c: SQLite holds the truth, keys.table is what the supervisor passes on. */
struct key_store;
#define CLI_KEY_TEXT_BYTES 72 /* cm-<16>-<43>, terminated */
struct key_entry {
    char id[17];
    char name[40];
    int64_t created_unix_s, expires_unix_s, revoked_unix_s; /* 0: never */
    const char *adapters; /* as they were granted; borrowed for the call */
};

CM_MUST_USE enum cm_status key_store_open(const char *state, struct key_store **ret_store,
                                          struct cm_error *err);
void key_store_close(struct key_store *store);
/* The secret text is written once into ret_text; only its hash is kept. adapters: which ones the
 * key may use: "none", "all", or at most CM_ADAPTERS_MAX names with commas between them. */
CM_MUST_USE enum cm_status key_store_add(struct key_store *store, const char *name,
                                         int64_t expires_unix_s, const char *adapters,
                                         char ret_text[static CLI_KEY_TEXT_BYTES],
                                         struct cm_error *err);
/* The adapters of a valid key, in place of those that it had. */
CM_MUST_USE enum cm_status key_store_grant(struct key_store *store, const char *id,
                                           const char *adapters, struct cm_error *err);
CM_MUST_USE enum cm_status key_store_revoke(struct key_store *store, const char *id,
                                            struct cm_error *err);
CM_MUST_USE enum cm_status
key_store_list(struct key_store *store, void (*each)(void *context, const struct key_entry *entry),
               void *context, struct cm_error *err);
/* Write keys.table from the store. */
CM_MUST_USE enum cm_status key_store_publish(struct key_store *store, struct cm_error *err);

#endif
