/* casemate policy explain: would a start unseal, and if not, what differs? Asks before a reboot or
 * an upgrade; needs no TPM and starts nothing. */
#include <stdio.h>
#include <string.h>

#include "loader/package/package.h"
#include "loader/tpm/enrolment.h"
#include "loader/tpm/measure.h"
#include "runtime/base/hex.h"
#include "runtime/cli/cli_internal.h"

struct explanation {
    struct cm_configuration configuration;
    struct cm_enrolment enrolment;
    struct cm_policy_list list;
    struct cm_measurement now, signed_then;
    bool has_signed;
    uint8_t pcr[CM_DIGEST_BYTES]; /* ours after all events */
    uint32_t matching;            /* states of this node with that value */
};

static enum cm_status enrolment_load(struct explanation *x, struct cm_error *err)
{
    char path[CM_CONFIG_TEXT_BYTES + 32];
    uint8_t bytes[CM_ENROLMENT_BYTES_MAX];
    size_t used = 0;
    snprintf(path, sizeof(path), "%s/enrolment.bin", x->configuration.state);
    enum cm_status status = cli_file_read(path, bytes, sizeof(bytes), &used, err);
    return status == CM_OK ? cm_enrolment_parse(bytes, used, &x->enrolment, err) : status;
}

/* The policy list beside the package, under the pinned authority; and the package's event. */
static enum cm_status package_load(struct explanation *x, struct cm_error *err)
{
    static uint8_t list[CM_POLICY_LIST_BYTES_MAX];
    static struct cm_package_head head;
    char path[CM_CONFIG_TEXT_BYTES + 16];
    uint8_t authority[CM_PUBLIC_KEY_BYTES];
    size_t used = 0;
    enum cm_status status = cli_package_head(x->configuration.package, &head, err);
    if (status == CM_OK) {
        status = cm_measurement_add(&x->now, CM_EVENT_PACKAGE, head.core.core_digest,
                                    CM_DIGEST_BYTES, err);
    }
    if (status == CM_OK) {
        status = cm_config_point_read(x->configuration.policy_authority, authority, err);
    }
    snprintf(path, sizeof(path), "%s.policy", x->configuration.package);
    if (status == CM_OK) {
        status = cli_file_read(path, list, sizeof(list), &used, err);
    }
    return status == CM_OK ? cm_policy_list_parse(list, used, authority, &x->list, err) : status;
}

static enum cm_status signed_load(struct explanation *x, const char *path, struct cm_error *err)
{
    static uint8_t bytes[CM_LOG_BYTES_MAX];
    size_t used = 0;
    if (path == NULL) {
        return CM_OK;
    }
    enum cm_status status = cli_file_read(path, bytes, sizeof(bytes), &used, err);
    if (status == CM_OK) {
        status = cm_measurement_parse(bytes, used, &x->signed_then, err);
    }
    x->has_signed = status == CM_OK;
    return status;
}

static void states_print(struct explanation *x)
{
    char hex[2 * CM_DIGEST_BYTES + 1];
    cm_hex_write(x->pcr, sizeof(x->pcr), hex);
    printf("a start would lead PCR %u to %s\n", x->enrolment.pcr, hex);
    for (uint32_t i = 0; i < x->list.count; i++) {
        const struct cm_policy_state *state = &x->list.states[i];
        bool ours = memcmp(state->counter_name, x->enrolment.counter_name,
                           sizeof(state->counter_name)) == 0;
        bool same = false;
        for (uint32_t k = 0; k < state->pcr_count; k++) {
            same = same || (state->pcrs[k] == x->enrolment.pcr &&
                            memcmp(state->pcr_values[k], x->pcr, CM_DIGEST_BYTES) == 0);
        }
        x->matching += ours && same;
        printf("signed state %u: %s, counter up to %llu%s\n", i + 1,
               !ours  ? "of another node"
               : same ? "this one"
                      : "of this node, with another PCR value",
               (unsigned long long)state->counter_max,
               ours && state->pcr_count > 1 ? ", and PCRs of the boot chain" : "");
    }
}

static const uint8_t *file_find(const struct cm_event *event, const char *name)
{
    const char *here;
    const uint8_t *digest;
    for (uint32_t at = 0; cm_event_file_next(event, &at, &here, &digest);) {
        if (strcmp(here, name) == 0) {
            return digest;
        }
    }
    return NULL;
}

static void program_compare(const struct cm_event *now, const struct cm_event *then)
{
    const char *name;
    const uint8_t *digest;
    for (uint32_t at = 0; cm_event_file_next(now, &at, &name, &digest);) {
        const uint8_t *was = file_find(then, name);
        if (was == NULL || memcmp(was, digest, CM_DIGEST_BYTES) != 0) {
            printf("differs: %s of program %s %s\n", name, (const char *)now->data,
                   was == NULL ? "was not there" : "has other bytes");
        }
    }
}

/* What was signed against what is here, event by event. */
static void events_compare(const struct explanation *x)
{
    uint32_t count = x->now.count - 1; /* without the package */
    for (uint32_t i = 0; i < count && i < x->signed_then.count; i++) {
        const struct cm_event *now = &x->now.events[i], *then = &x->signed_then.events[i];
        bool same = now->type == then->type && now->bytes == then->bytes &&
                    memcmp(now->data, then->data, now->bytes) == 0;
        if (!same && now->type == CM_EVENT_PROGRAM && then->type == CM_EVENT_PROGRAM) {
            program_compare(now, then);
        } else if (!same) {
            printf("differs: %s\n", cm_event_name(now->type));
        }
    }
    if (count != x->signed_then.count) {
        printf("differs: %u events, signed were %u\n", count, x->signed_then.count);
    }
}

enum cm_status command_policy(struct words *words, struct cm_error *err)
{
    static struct explanation x;
    static struct cm_config_arguments arguments;
    if (words->count == 0 || strcmp(words->at[0], "explain") != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "policy knows: explain");
    }
    words->count--;
    memmove(words->at, words->at + 1, (size_t)words->count * sizeof(words->at[0]));
    const char *against = words_value_take(words, "against");
    enum cm_status status =
        cm_config_arguments_load(words->count, words->at, &arguments, &x.configuration, err);
    if (status == CM_OK) {
        status = cm_config_complete(&x.configuration, arguments.path, err);
    }
    if (status == CM_OK) {
        status = enrolment_load(&x, err);
    }
    if (status == CM_OK) {
        status = cli_measure(&x.configuration, &x.now, err);
    }
    if (status == CM_OK) {
        status = package_load(&x, err);
    }
    if (status == CM_OK) {
        status = signed_load(&x, against, err);
    }
    memcpy(x.pcr, x.enrolment.pcr_value, sizeof(x.pcr));
    if (status == CM_OK) {
        status = cm_measurement_replay(&x.now, 0, x.now.count, x.pcr, err);
    }
    if (status != CM_OK) {
        return status;
    }
    states_print(&x);
    if (x.has_signed) {
        events_compare(&x);
    }
    if (x.matching > 0) {
        puts("it would unseal, if the TPM's counter and boot chain are as signed");
        return CM_OK;
    }
    return cm_error_set(
        err, CM_E_POLICY, "CM-SEAL-PCR",
        "no signed state has this PCR value: `casemate measure --out FILE`, and let "
        "the owner sign it (casemate-pack policy-sign)%s",
        x.has_signed ? "" : "; --against the FILE that was signed names what differs");
}
