/* The configuration: one table of keys, read from casemate.yaml, the environment and the command
 * line. The table (table.c) is the schema: name, section, kind, range, unit, default, help.
 *
 * Precedence: command line > CASEMATE_<KEY> > file > default. `sealed:` is measured by later
 * attestation, `site:` is not. The file is the operator's, yet it is read as untrusted: every
 * refusal names file, line and key. */
#ifndef CASEMATE_POLICIES_CONFIG_CONFIG_H
#define CASEMATE_POLICIES_CONFIG_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/frame.h"

#define CM_CONFIG_TEXT_BYTES 512
#define CM_CONFIG_TLS_NAMES  8 /* as in struct cm_config_keeper */
#define CM_CONFIG_FILE_BYTES (256u << 10)

enum cm_config_kind {
    CM_CONFIG_NUMBER,  /* whole number in [least, most] */
    CM_CONFIG_BOOL,    /* true or false */
    CM_CONFIG_TEXT,    /* printable text, most bytes */
    CM_CONFIG_PATH,    /* relative ones count from the file's folder, or the working directory */
    CM_CONFIG_CHOICE,  /* one of `choices` */
    CM_CONFIG_ADDRESS, /* IPv4:port or [IPv6]:port */
    CM_CONFIG_NAMES,   /* up to CM_CONFIG_TLS_NAMES host names or addresses */
};

enum cm_config_section { CM_CONFIG_SEALED, CM_CONFIG_SITE };

enum cm_config_source {
    CM_CONFIG_FROM_DEFAULT,
    CM_CONFIG_FROM_FILE,
    CM_CONFIG_FROM_ENVIRONMENT,
    CM_CONFIG_FROM_COMMAND_LINE,
};

struct cm_config_row {
    const char *name;
    enum cm_config_section section;
    enum cm_config_kind kind;
    uint64_t least, most;     /* numbers: value; texts: bytes */
    const char *unit;         /* "" if none */
    const char *default_text; /* as it would be written; "" = not set */
    const char *choices;      /* CHOICE: "a|b" */
    size_t offset;            /* in struct cm_configuration */
    const char *help;
};

struct cm_config_names {
    uint32_t count;
    char names[CM_CONFIG_TLS_NAMES][CM_NAME_BYTES];
};

#define CM_CONFIG_ROW_COUNT 43

struct cm_configuration {
    /* sealed */
    char package[CM_CONFIG_TEXT_BYTES];
    char package_owner[CM_CONFIG_TEXT_BYTES];
    char policy_authority[CM_CONFIG_TEXT_BYTES];
    char device[CM_CONFIG_TEXT_BYTES], prompts[CM_CONFIG_TEXT_BYTES];
    char tpm[CM_CONFIG_TEXT_BYTES];
    char attest_mode[CM_CONFIG_TEXT_BYTES];
    char require_sandbox[CM_CONFIG_TEXT_BYTES];
    char guard[CM_CONFIG_TEXT_BYTES], guard_rules[CM_CONFIG_TEXT_BYTES];
    char kv_kind[CM_CONFIG_TEXT_BYTES];
    uint64_t adapters_max, adapter_bytes_max, adapter_rank_max;
    char adapter_owners[CM_CONFIG_TEXT_BYTES];
    /* site */
    char state[CM_CONFIG_TEXT_BYTES];
    char listen[CM_CONFIG_TEXT_BYTES];
    char model_name[CM_CONFIG_TEXT_BYTES];
    char adapter_access[CM_CONFIG_TEXT_BYTES];
    struct cm_config_names tls_names;
    uint64_t header_bytes_max, body_bytes_max, connections_max;
    uint64_t requests_max, requests_per_key_max, queue_max, sequences_max;
    uint64_t kv_bytes, kv_pages, context_max, step_tokens_max, threads;
    uint64_t prefix_cache;
    uint64_t header_timeout_ms, body_timeout_ms, write_timeout_ms, request_timeout_ms;
    uint64_t drain_timeout_ms, watchdog_timeout_ms, max_tokens_default, metrics_unauthenticated;
    uint64_t evidence_refresh_ms, evidence_lifetime_ms;
    /* where each value came from, by row; file lines count from 1 */
    uint8_t sources[CM_CONFIG_ROW_COUNT];
    uint32_t lines[CM_CONFIG_ROW_COUNT];
};

extern const struct cm_config_row cm_config_rows[CM_CONFIG_ROW_COUNT];

struct cm_config_override {
    const char *name; /* snake_case; borrowed */
    const char *value;
};

/* The row of a name (its first `size` bytes), or -1. */
int cm_config_row_find(const char *name, size_t size);
/* The known key nearest to a wrong one (edit distance), or NULL if none is near. */
const char *cm_config_nearest(const char *name, size_t size);

/* Read everything in order of precedence. path NULL: no file. environment: as environ, or NULL.
 * Fails: CONFIG (file:line and key in the text), USAGE (command line), SYSTEM. */
CM_MUST_USE enum cm_status cm_config_load(const char *path,
                                          const struct cm_config_override *overrides, size_t count,
                                          char *const *environment,
                                          struct cm_configuration *ret_configuration,
                                          struct cm_error *err);

/* One value from its text into *configuration. `place` stands before the key in errors; `folder` is
 * where relative paths count from, or NULL. Fails: CONFIG with what was expected and found. */
CM_MUST_USE enum cm_status cm_config_value_set(struct cm_configuration *configuration, size_t row,
                                               const char *text, size_t bytes, const char *folder,
                                               const char *place, struct cm_error *err);

/* Read a YAML text (already in memory) over *configuration; `name` stands in errors. */
CM_MUST_USE enum cm_status cm_config_text_read(struct cm_configuration *configuration,
                                               const uint8_t *text, size_t bytes, const char *name,
                                               const char *folder, struct cm_error *err);

/* Is a `tpm:` the development TPM, which protects nothing? */
bool cm_config_tpm_development(const char *tpm);
/* "strict" or "restartable": as written, or the development TPM's default. */
const char *cm_config_attest_mode(const struct cm_configuration *configuration);

/* Whose adapters may be loaded: the keys of `adapter_owners:`; none where adapters_max is 0. Fails:
 * CONFIG. */
CM_MUST_USE enum cm_status cm_config_owners_read(const struct cm_configuration *configuration,
                                                 struct cm_adapter_owners *ret_owners,
                                                 struct cm_error *err);

/* The `sealed:` part as it is measured: one "key value" line each, keys by content and not by path.
 * The package itself is measured by its core digest. */
#define CM_CONFIG_SEALED_BYTES 2048
CM_MUST_USE enum cm_status cm_config_sealed_text(const struct cm_configuration *configuration,
                                                 const uint8_t owner[static CM_PUBLIC_KEY_BYTES],
                                                 const uint8_t policy[static CM_PUBLIC_KEY_BYTES],
                                                 const struct cm_adapter_owners *owners,
                                                 char ret_text[static CM_CONFIG_SEALED_BYTES],
                                                 size_t *ret_bytes, struct cm_error *err);

/* Open the TPM at a path: a device, or the data socket of an swtpm. Fails: TPM CM-TPM-OPEN. */
CM_MUST_USE enum cm_status cm_config_tpm_open(const char *path, int *ret_fd, struct cm_error *err);

/* Ring size that carries the greatest body: a power of two. */
uint32_t cm_config_ring_bytes(const struct cm_configuration *configuration);

/* "127.0.0.1:8443" or "[::1]:8443" into host and port. False if malformed. */
bool cm_config_address_split(const char *text, char ret_host[static CM_NAME_BYTES],
                             uint16_t *ret_port);

/* A PEM public key (SubjectPublicKeyInfo, P-256, uncompressed: RFC 5480, RFC 7468) into its point.
 * Checks form only, not that the point is on the curve: whoever verifies with it does. */
CM_MUST_USE enum cm_status cm_config_point_parse(const char *pem, size_t bytes,
                                                 uint8_t ret_point[static CM_PUBLIC_KEY_BYTES],
                                                 struct cm_error *err);
CM_MUST_USE enum cm_status cm_config_point_read(const char *path,
                                                uint8_t ret_point[static CM_PUBLIC_KEY_BYTES],
                                                struct cm_error *err);

/* Nobody but its owner may write into the state folder. Fails: CONFIG; SYSTEM if it
 * cannot be looked at. */
CM_MUST_USE enum cm_status cm_config_state_check(const char *path, struct cm_error *err);

#endif
