/* The schema of casemate.yaml: every key there is, one row each. */
#include "policies/config/config.h"

#include <stdio.h>
#include <string.h>

#include "runtime/base/hex.h"

#define AT(field) offsetof(struct cm_configuration, field)
#define SEALED    CM_CONFIG_SEALED
#define SITE      CM_CONFIG_SITE
#define NUMBER(field, least, most, unit, text, help)                                               \
    {                                                                                              \
#field, SITE, CM_CONFIG_NUMBER, least, most, unit, text, "", AT(field), help               \
    }

/* clang-format off */
const struct cm_config_row cm_config_rows[CM_CONFIG_ROW_COUNT] = {
    {"package", SEALED, CM_CONFIG_PATH, 1, CM_CONFIG_TEXT_BYTES - 1, "", "", "", AT(package), "the sealed package; its policy list lies beside it as <package>.policy"},
    {"package_owner", SEALED, CM_CONFIG_PATH, 1, CM_CONFIG_TEXT_BYTES - 1, "", "", "", AT(package_owner), "PEM public key (P-256) of who signs packages"},
    {"policy_authority", SEALED, CM_CONFIG_PATH, 1, CM_CONFIG_TEXT_BYTES - 1, "", "", "", AT(policy_authority), "PEM public key (P-256) of who signs allowed states"},
    {"device", SEALED, CM_CONFIG_CHOICE, 1, 16, "", "cpu", "cpu", AT(device), "where the model computes"},
    {"prompts", SEALED, CM_CONFIG_CHOICE, 1, 16, "", "exact", "exact|bf16", AT(prompts), "exact: prompts are computed as replies are; bf16: in bf16, about twice as fast, where the CPU has AMX-bf16 (kernels/NUMERICS.md, class P)"},
    {"tpm", SEALED, CM_CONFIG_TEXT, 1, 107, "", "development", "", AT(tpm), "development, /dev/tpmrm0, or the Unix socket of an swtpm; the development TPM protects nothing"},
    {"attest_mode", SEALED, CM_CONFIG_CHOICE, 1, 16, "", "", "strict|restartable", AT(attest_mode), "strict: one start per boot, then a cap; restartable: the same state may start again. Must be said for a real TPM"},
    {"require_sandbox", SEALED, CM_CONFIG_CHOICE, 1, 16, "", "full", "full|best", AT(require_sandbox), "full: refuse to start where nothing holds one of the sandbox's promises; best: take what the machine has"},
    {"guard", SEALED, CM_CONFIG_CHOICE, 1, 16, "", "on", "on|off", AT(guard), "off: prompts and replies pass no rules"},
    {"guard_rules", SEALED, CM_CONFIG_PATH, 1, CM_CONFIG_TEXT_BYTES - 1, "", "", "", AT(guard_rules), "YAML file of more guard rules, or of other ones (policies/guard/README.md); empty: the built-in ones alone"},
    {"kv_kind", SEALED, CM_CONFIG_CHOICE, 1, 16, "", "fp16", "fp16|int8", AT(kv_kind), "what keys and values are kept as; int8: nearly twice the positions in kv_bytes, and other tokens (bench/README.md has the loss)"},
    {"adapters_max", SEALED, CM_CONFIG_NUMBER, 0, CM_ADAPTERS_MAX, "", "0", "", AT(adapters_max), "adapters (LoRA) that may be loaded at once; 0: none"},
    {"adapter_bytes_max", SEALED, CM_CONFIG_NUMBER, 65536, 4ull << 30, "bytes", "67108864", "", AT(adapter_bytes_max), "weights of one adapter; memory for adapters_max of them is taken at the start"},
    {"adapter_rank_max", SEALED, CM_CONFIG_NUMBER, 1, 64, "", "64", "", AT(adapter_rank_max), "rank of an adapter"},
    {"adapter_owners", SEALED, CM_CONFIG_PATH, 1, CM_CONFIG_TEXT_BYTES - 1, "", "", "", AT(adapter_owners), "PEM file with two public keys (P-256) for each owner whose adapters are loaded: who signs packages, then who signs states"},
    {"state", SITE, CM_CONFIG_PATH, 1, 400, "", "", "", AT(state), "folder of keys, enrolment record and status"},
    {"listen", SITE, CM_CONFIG_ADDRESS, 1, 63, "", "127.0.0.1:8443", "", AT(listen), "address and port of the API"},
    {"tls_names", SITE, CM_CONFIG_NAMES, 1, CM_NAME_BYTES - 1, "", "localhost,127.0.0.1", "", AT(tls_names), "names in the server's certificate"},
    {"model_name", SITE, CM_CONFIG_TEXT, 0, CM_NAME_BYTES - 1, "", "", "", AT(model_name), "name that clients use; empty: the package's own"},
    {"adapter_access", SITE, CM_CONFIG_CHOICE, 1, 16, "", "granted", "granted|all", AT(adapter_access), "granted: an API key uses the adapters that `casemate keys` grants it; all: every key uses every adapter"},
    NUMBER(header_bytes_max, 1024, 1048576, "bytes", "16384", "largest head of a request"),
    NUMBER(body_bytes_max, 1024, 8388608, "bytes", "1048576", "largest body of a request"),
    NUMBER(connections_max, 1, 65536, "", "256", "open connections"),
    NUMBER(requests_max, 1, 65536, "", "64", "requests running and waiting, together"),
    NUMBER(requests_per_key_max, 1, 65536, "", "32", "requests of one API key at once"),
    NUMBER(queue_max, 1, 65536, "", "64", "requests waiting in the worker"),
    NUMBER(sequences_max, 1, 256, "", "8", "sequences generated at once"),
    NUMBER(kv_bytes, 0, 1ull << 40, "bytes", "268435456", "memory of the key-value cache; 0: from kv_pages"),
    NUMBER(kv_pages, 0, 1u << 24, "", "0", "the same in pages of 32 positions; 0: from kv_bytes"),
    NUMBER(context_max, 0, 1u << 20, "", "0", "longest prompt and reply, in tokens; 0: the model's"),
    NUMBER(step_tokens_max, 1, 8192, "", "256", "tokens in one mixed step"),
    {"prefix_cache", SITE, CM_CONFIG_BOOL, 0, 1, "", "true", "", AT(prefix_cache), "reuse a prompt's beginning that the same API key has sent before"},
    NUMBER(threads, 0, 1024, "", "0", "computing threads; 0: from the cores that are allowed"),
    NUMBER(header_timeout_ms, 100, 600000, "ms", "10000", "for the whole head of a request"),
    NUMBER(body_timeout_ms, 100, 600000, "ms", "30000", "for the whole body of a request"),
    NUMBER(write_timeout_ms, 100, 600000, "ms", "30000", "without progress towards a client"),
    NUMBER(request_timeout_ms, 0, 86400000, "ms", "600000", "for a whole generation; 0: none"),
    NUMBER(drain_timeout_ms, 0, 3600000, "ms", "30000", "for requests in flight when the service stops"),
    NUMBER(watchdog_timeout_ms, 2000, 600000, "ms", "30000", "a role that shows no life for so long is replaced"),
    NUMBER(max_tokens_default, 0, 1u << 20, "", "0", "reply length where the client names none; 0: up to the context"),
    NUMBER(evidence_refresh_ms, 1000, 3600000, "ms", "300000", "between two quotes of the service's own"),
    NUMBER(evidence_lifetime_ms, 1000, 3600000, "ms", "600000", "age of its last quote at which the service stops being ready"),
    {"metrics_unauthenticated", SITE, CM_CONFIG_BOOL, 0, 1, "", "false", "", AT(metrics_unauthenticated), "GET /metrics needs no key"},
};
/* clang-format on */

int cm_config_row_find(const char *name, size_t size)
{
    for (int i = 0; i < CM_CONFIG_ROW_COUNT; i++) {
        if (strlen(cm_config_rows[i].name) == size &&
            memcmp(cm_config_rows[i].name, name, size) == 0) {
            return i;
        }
    }
    return -1;
}

static size_t least_of(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* Edit distance (insert, delete, replace) by one row of the usual table. */
static size_t distance(const char *a, size_t a_size, const char *b, size_t b_size)
{
    size_t costs[65];
    for (size_t j = 0; j <= b_size; j++) {
        costs[j] = j;
    }
    for (size_t i = 1; i <= a_size; i++) {
        size_t diagonal = costs[0];
        costs[0] = i;
        for (size_t j = 1; j <= b_size; j++) {
            size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
            diagonal = costs[j];
            costs[j] = least_of(replaced, least_of(costs[j], costs[j - 1]) + 1);
        }
    }
    return costs[b_size];
}

const char *cm_config_nearest(const char *name, size_t size)
{
    const char *nearest = NULL;
    size_t best = size / 2 + 1;
    if (size > 64) {
        return NULL;
    }
    for (size_t i = 0; i < CM_CONFIG_ROW_COUNT; i++) {
        const char *known = cm_config_rows[i].name;
        size_t apart = distance(name, size, known, strlen(known));
        if (apart < best) {
            best = apart;
            nearest = known;
        }
    }
    return nearest;
}

/* What may be loaded beside the model: the same state without adapters has none of these lines. */
static int adapters_put(const struct cm_configuration *configuration,
                        const struct cm_adapter_owners *owners, char *text, size_t size)
{
    char owner[2 * CM_PUBLIC_KEY_BYTES + 1], policy[2 * CM_PUBLIC_KEY_BYTES + 1];
    int used = snprintf(text, size,
                        "adapters_max %llu\nadapter_bytes_max %llu\n"
                        "adapter_rank_max %llu\n",
                        (unsigned long long)configuration->adapters_max,
                        (unsigned long long)configuration->adapter_bytes_max,
                        (unsigned long long)configuration->adapter_rank_max);
    for (uint32_t i = 0; i < owners->count && used > 0 && (size_t)used < size; i++) {
        cm_hex_write(owners->each[i].package, CM_PUBLIC_KEY_BYTES, owner);
        cm_hex_write(owners->each[i].policy, CM_PUBLIC_KEY_BYTES, policy);
        used += snprintf(text + used, size - (size_t)used, "adapter_owner %s %s\n", owner, policy);
    }
    return used;
}

enum cm_status cm_config_sealed_text(const struct cm_configuration *configuration,
                                     const uint8_t owner[static CM_PUBLIC_KEY_BYTES],
                                     const uint8_t policy[static CM_PUBLIC_KEY_BYTES],
                                     const struct cm_adapter_owners *owners,
                                     char ret_text[static CM_CONFIG_SEALED_BYTES],
                                     size_t *ret_bytes, struct cm_error *err)
{
    char owner_hex[2 * CM_PUBLIC_KEY_BYTES + 1], policy_hex[2 * CM_PUBLIC_KEY_BYTES + 1];
    cm_hex_write(owner, CM_PUBLIC_KEY_BYTES, owner_hex);
    cm_hex_write(policy, CM_PUBLIC_KEY_BYTES, policy_hex);
    int bytes =
        snprintf(ret_text, CM_CONFIG_SEALED_BYTES,
                 "package_owner %s\npolicy_authority %s\ndevice %s\ntpm %s\nattest_mode %s\n"
                 "require_sandbox %s\nguard %s\nkv_kind %s\n",
                 owner_hex, policy_hex, configuration->device, configuration->tpm,
                 cm_config_attest_mode(configuration), configuration->require_sandbox,
                 configuration->guard, configuration->kv_kind);
    if (bytes > 0 && bytes < CM_CONFIG_SEALED_BYTES &&
        strcmp(configuration->prompts, "exact") != 0) { /* as above: nothing new where it is off */
        bytes += snprintf(ret_text + bytes, CM_CONFIG_SEALED_BYTES - (size_t)bytes, "prompts %s\n",
                          configuration->prompts);
    }
    if (bytes > 0 && bytes < CM_CONFIG_SEALED_BYTES && configuration->adapters_max > 0) {
        bytes += adapters_put(configuration, owners, ret_text + bytes,
                              CM_CONFIG_SEALED_BYTES - (size_t)bytes);
    }
    if (bytes <= 0 || bytes >= CM_CONFIG_SEALED_BYTES) {
        return cm_error_set(err, CM_E_CONFIG, "CM-CONFIG-SIZE", "sealed: is too long to measure");
    }
    *ret_bytes = (size_t)bytes;
    return CM_OK;
}

const char *cm_config_attest_mode(const struct cm_configuration *configuration)
{
    return configuration->attest_mode[0] != '\0' ? configuration->attest_mode : "restartable";
}
