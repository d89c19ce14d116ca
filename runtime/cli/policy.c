/* casemate policy explain: would a start unseal, and if not, what differs? Asks before a restart, a
 * reboot or an upgrade. Asks the TPM too, where it can; starts nothing. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

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
    bool asked;                   /* the TPM; else `silent` says why not */
    struct cli_tpm_facts tpm;
    struct cm_error silent;
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

enum cm_status cli_policy_list(const struct cm_configuration *configuration,
                               struct cm_policy_list *ret_list, struct cm_error *err)
{
    static uint8_t bytes[CM_POLICY_LIST_BYTES_MAX];
    char path[CM_CONFIG_TEXT_BYTES + 16];
    uint8_t authority[CM_PUBLIC_KEY_BYTES];
    size_t used = 0;
    enum cm_status status = cm_config_point_read(configuration->policy_authority, authority, err);
    snprintf(path, sizeof(path), "%s.policy", configuration->package);
    if (status == CM_OK && access(path, F_OK) != 0) {
        status = cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                              "there is no policy list beside the package (%s): copy it there, it "
                              "comes from `casemate-pack`",
                              path);
    }
    if (status == CM_OK) {
        status = cli_file_read(path, bytes, sizeof(bytes), &used, err);
    }
    return status == CM_OK ? cm_policy_list_parse(bytes, used, authority, ret_list, err) : status;
}

/* The policy list beside the package; and the package's event. */
static enum cm_status package_load(struct explanation *x, struct cm_error *err)
{
    static struct cm_package_head head;
    enum cm_status status = cli_package_head(x->configuration.package, &head, err);
    if (status == CM_OK) {
        status = cm_measurement_add(&x->now, CM_EVENT_PACKAGE, head.core.core_digest,
                                    CM_DIGEST_BYTES, err);
    }
    return status == CM_OK ? cli_policy_list(&x->configuration, &x->list, err) : status;
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

/* Why a start would not unseal by this state: the worst that is wrong, or STATE_GOOD. */
enum state_fit { STATE_GOOD, STATE_REVOKED, STATE_BOOT_CHAIN, STATE_PCR, STATE_OTHER_NODE };

static enum state_fit state_fit(const struct explanation *x, const struct cm_policy_state *state)
{
    enum state_fit fit =
        x->asked && x->tpm.counter > state->counter_max ? STATE_REVOKED : STATE_GOOD;
    if (memcmp(state->counter_name, x->enrolment.counter_name, sizeof(state->counter_name)) != 0) {
        return STATE_OTHER_NODE;
    }
    for (uint32_t k = 0; k < state->pcr_count; k++) {
        bool ours = state->pcrs[k] == x->enrolment.pcr;
        const uint8_t *value = ours ? x->pcr : x->tpm.pcrs[state->pcrs[k]];
        if ((ours || x->asked) && memcmp(state->pcr_values[k], value, CM_DIGEST_BYTES) != 0) {
            fit = ours ? STATE_PCR : fit == STATE_PCR ? fit : STATE_BOOT_CHAIN;
        }
    }
    return fit;
}

static void boot_chain_print(const struct explanation *x, const struct cm_policy_state *state)
{
    char is[2 * CM_DIGEST_BYTES + 1], was[2 * CM_DIGEST_BYTES + 1];
    for (uint32_t k = 0; k < state->pcr_count; k++) {
        uint32_t pcr = state->pcrs[k];
        if (pcr != x->enrolment.pcr &&
            memcmp(state->pcr_values[k], x->tpm.pcrs[pcr], CM_DIGEST_BYTES) != 0) {
            cm_hex_write(x->tpm.pcrs[pcr], CM_DIGEST_BYTES, is);
            cm_hex_write(state->pcr_values[k], CM_DIGEST_BYTES, was);
            printf("differs: PCR %u is %s in this boot, signed is %s\n", pcr, is, was);
        }
    }
}

/* Each signed state, and the best fit among them. */
static enum state_fit states_print(const struct explanation *x)
{
    static const char *const words[] = {"this one",
                                        "this one, but revoked: the counter is beyond it",
                                        "this one, but another boot chain",
                                        "of this node, with another PCR value", "of another node"};
    char hex[2 * CM_DIGEST_BYTES + 1];
    enum state_fit best = STATE_OTHER_NODE;
    cm_hex_write(x->pcr, sizeof(x->pcr), hex);
    printf("a start would lead PCR %u to %s\n", x->enrolment.pcr, hex);
    if (x->asked) {
        printf("the TPM's counter is %llu\n", (unsigned long long)x->tpm.counter);
    } else {
        printf("the TPM was not asked (%s): counter and boot chain may differ\n", x->silent.text);
    }
    for (uint32_t i = 0; i < x->list.count; i++) {
        const struct cm_policy_state *state = &x->list.states[i];
        enum state_fit fit = state_fit(x, state);
        best = fit < best ? fit : best;
        printf("signed state %u: %s; counter up to %llu%s\n", i + 1, words[fit],
               (unsigned long long)state->counter_max,
               state->pcr_count > 1 ? ", with PCRs of the boot chain" : "");
        if (fit == STATE_BOOT_CHAIN) {
            boot_chain_print(x, state);
        }
    }
    return best;
}

/* Our PCR belongs to a boot: what stands in it now must be a beginning of what a start extends. */
static bool boot_fits(const struct explanation *x)
{
    const uint8_t *now = x->tpm.pcrs[x->enrolment.pcr];
    uint8_t pcr[CM_DIGEST_BYTES];
    memcpy(pcr, x->enrolment.pcr_value, sizeof(pcr));
    bool strict = strcmp(cm_config_attest_mode(&x->configuration), "strict") == 0;
    bool fits = memcmp(pcr, now, sizeof(pcr)) == 0;
    for (uint32_t i = 0; !strict && !fits && i < x->now.count; i++) {
        fits = cm_measurement_replay(&x->now, i, 1, pcr, NULL) == CM_OK &&
               memcmp(pcr, now, sizeof(pcr)) == 0;
    }
    return fits;
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

/* Lines of the one text that the other has not. */
static void lines_print(const struct cm_event *of, const struct cm_event *against, const char *sign)
{
    char line[CM_CONFIG_TEXT_BYTES + 64];
    for (uint32_t at = 0; at < of->bytes;) {
        const uint8_t *end = memchr(of->data + at, '\n', of->bytes - at);
        size_t size = end != NULL ? (size_t)(end - of->data) - at + 1 : of->bytes - at;
        if (memmem(against->data, against->bytes, of->data + at, size) == NULL) {
            snprintf(line, sizeof(line), "%.*s", (int)size, (const char *)of->data + at);
            line[strcspn(line, "\n")] = '\0';
            printf("differs: %s %s\n", sign, line);
        }
        at += (uint32_t)size;
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
            lines_print(now, then, "here is");
            lines_print(then, now, "signed was");
        }
    }
    if (count != x->signed_then.count) {
        printf("differs: %u events, signed were %u\n", count, x->signed_then.count);
    }
}

static enum cm_status explanation_load(struct words *words, const char *against,
                                       struct explanation *x, struct cm_error *err)
{
    static struct cm_config_arguments arguments;
    memset(x, 0, sizeof(*x));
    enum cm_status status =
        cm_config_arguments_load(words->count, words->at, &arguments, &x->configuration, err);
    if (status == CM_OK) {
        status = cm_config_complete(&x->configuration, arguments.path, err);
    }
    if (status == CM_OK) {
        status = enrolment_load(x, err);
    }
    if (status == CM_OK) {
        status = cli_measure(&x->configuration, &x->now, err);
    }
    if (status == CM_OK) {
        status = package_load(x, err);
    }
    if (status == CM_OK) {
        status = signed_load(x, against, err);
    }
    memcpy(x->pcr, x->enrolment.pcr_value, sizeof(x->pcr));
    if (status == CM_OK) {
        status = cm_measurement_replay(&x->now, 0, x->now.count, x->pcr, err);
    }
    if (status == CM_OK) {
        x->asked = cli_tpm_look(&x->configuration, &x->tpm, &x->silent) == CM_OK;
    }
    return status;
}

enum cm_status cli_policy_survivors(struct words *words, uint32_t *ret_count, struct cm_error *err)
{
    static struct explanation x;
    enum cm_status status = explanation_load(words, NULL, &x, err);
    if (status == CM_OK && !x.asked) {
        *err = x.silent;
        status = (enum cm_status)x.silent.status;
    }
    *ret_count = 0;
    x.tpm.counter++;
    for (uint32_t i = 0; status == CM_OK && i < x.list.count; i++) {
        *ret_count += state_fit(&x, &x.list.states[i]) == STATE_GOOD;
    }
    if (status == CM_OK) {
        *err = (struct cm_error){.status = CM_OK};
    }
    return status;
}

static enum cm_status verdict(const struct explanation *x, enum state_fit fit, struct cm_error *err)
{
    switch (fit) {
    case STATE_GOOD:
        if (x->asked && !boot_fits(x)) {
            return cm_error_set(err, CM_E_POLICY, "CM-SEAL-BOOT",
                                "it would unseal after a reboot; in this boot PCR %u holds another "
                                "start already",
                                x->enrolment.pcr);
        }
        puts(x->asked ? "it would unseal"
                      : "it would unseal, if the TPM's counter and boot chain are as signed");
        return CM_OK;
    case STATE_REVOKED:
        return cm_error_set(
            err, CM_E_POLICY, "CM-SEAL-COUNTER",
            "this state was revoked (the counter is %llu): ask the owner to sign it "
            "for that (casemate-pack policy-revoke --counter %llu)",
            (unsigned long long)x->tpm.counter, (unsigned long long)x->tpm.counter);
    case STATE_BOOT_CHAIN:
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-PCR",
                            "the machine booted another way than was signed: reboot as before, or "
                            "ask the owner to sign these values (casemate-pack policy-sign --pcr)");
    case STATE_PCR:
    case STATE_OTHER_NODE:
        break;
    }
    return cm_error_set(
        err, CM_E_POLICY, "CM-SEAL-PCR",
        "no signed state has this PCR value: `casemate measure --out FILE`, and let "
        "the owner sign it (casemate-pack policy-sign)%s",
        x->has_signed ? "" : "; --against the FILE that was signed names what differs");
}

enum cm_status command_policy(struct words *words, struct cm_error *err)
{
    static struct explanation x;
    if (words->count == 0 || strcmp(words->at[0], "explain") != 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-CLI-USAGE", "policy knows: explain");
    }
    words->count--;
    memmove(words->at, words->at + 1, (size_t)words->count * sizeof(words->at[0]));
    const char *against = words_value_take(words, "against");
    enum cm_status status = explanation_load(words, against, &x, err);
    if (status != CM_OK) {
        return status;
    }
    enum state_fit fit = states_print(&x);
    if (x.has_signed) {
        events_compare(&x);
    }
    return verdict(&x, fit, err);
}
