/* Nodes: sealing a package's key to them, and the signed list of their allowed states. */
#include "loader/pack/commands.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "loader/pack/nodes.h"
#include "loader/pack/owner.h"
#include "runtime/base/hex.h"

#define POLICY_REF_DEFAULT "casemate"

static const char *policy_ref(const struct cm_pack_arguments *arguments)
{
    return arguments->policy_ref != NULL ? arguments->policy_ref : POLICY_REF_DEFAULT;
}

enum cm_status cm_file_read(const char *path, uint8_t *bytes, size_t room, size_t *ret_size,
                            struct cm_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd >= 0 ? read(fd, bytes, room) : -1;
    int error_number = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (size < 0) {
        return cm_error_errno(err, error_number, "CM-PACK-READ", "cannot read %s", path);
    }
    *ret_size = (size_t)size;
    return CM_OK;
}

/* The certificates of a PEM file, as DER. */
enum cm_status cm_authorities_read(const char *path, struct cm_ek_authorities *ret,
                                   struct cm_error *err)
{
    X509 *certificate = NULL;
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return cm_error_errno(err, errno, "CM-PACK-READ", "cannot read %s", path);
    }
    ret->count = 0;
    bool good = true;
    while (good && (certificate = PEM_read_X509(file, NULL, NULL, NULL)) != NULL) {
        uint8_t *der = ret->rows[ret->count % CM_EK_AUTHORITIES_MAX].der;
        int size = i2d_X509(certificate, NULL);
        good = ret->count < CM_EK_AUTHORITIES_MAX && size > 0 && size <= (int)CM_EK_CERTIFICATE_MAX;
        if (good) {
            ret->rows[ret->count++].bytes = (uint32_t)i2d_X509(certificate, &der);
        }
        X509_free(certificate);
    }
    fclose(file);
    return good && ret->count > 0
               ? CM_OK
               : cm_error_set(
                     err, CM_E_USAGE, "CM-PACK-AUTHORITY",
                     "%s: expected 1 to %u X.509 certificates in PEM, each at most %u bytes", path,
                     CM_EK_AUTHORITIES_MAX, CM_EK_CERTIFICATE_MAX);
}

/* A node's record; where authorities are named, one of them must vouch for its TPM. */
enum cm_status cm_node_read(const struct cm_pack_arguments *arguments, const char *path,
                            struct cm_enrolment *ret_enrolment, struct cm_error *err)
{
    static struct cm_ek_authorities authorities;
    uint8_t bytes[CM_ENROLMENT_BYTES_MAX];
    size_t size = 0;
    enum cm_status status = cm_file_read(path, bytes, sizeof(bytes), &size, err);
    if (status == CM_OK) {
        status = cm_enrolment_parse(bytes, size, ret_enrolment, err);
        if (status != CM_OK && err != NULL) {
            status = cm_error_wrap(err, "%s", path);
        }
    }
    if (status == CM_OK && arguments->ek_authority != NULL) {
        status = cm_authorities_read(arguments->ek_authority, &authorities, err);
        if (status == CM_OK) {
            status =
                cm_ek_certificate_check(ret_enrolment, &authorities, (uint64_t)time(NULL), err);
        }
    }
    return status;
}

static enum cm_status key_load(const struct cm_pack_arguments *arguments,
                               struct cm_owner_key **ret_key,
                               uint8_t ret_point[CM_PUBLIC_KEY_BYTES], struct cm_error *err)
{
    enum cm_status status = cm_owner_load(arguments->owner, "policy", ret_key, err);
    if (status == CM_OK) {
        cm_owner_public(*ret_key, ret_point);
    }
    return status;
}

enum cm_status cm_nodes_seal(const struct cm_pack_arguments *arguments,
                             const uint8_t key[static CM_KEY_BYTES],
                             struct cm_package_slot slots[CM_PACKAGE_SLOTS_MAX],
                             uint32_t *ret_count, struct cm_error *err)
{
    struct cm_owner_key *policy = NULL;
    uint8_t point[CM_PUBLIC_KEY_BYTES];
    enum cm_status status =
        arguments->node_count > 0 ? key_load(arguments, &policy, point, err) : CM_OK;
    for (uint32_t i = 0; status == CM_OK && i < arguments->node_count; i++) {
        struct cm_enrolment enrolment;
        struct cm_package_slot *slot = &slots[i];
        *slot = (struct cm_package_slot){.kind = CM_SLOT_TPM};
        status = cm_node_read(arguments, arguments->nodes[i], &enrolment, err);
        if (status == CM_OK) {
            memcpy(slot->label, enrolment.node_name, sizeof(slot->label));
            memcpy(slot->node, enrolment.node, sizeof(slot->node));
            status = cm_seal_to_node(&enrolment, point, policy_ref(arguments), key, slot->payload,
                                     sizeof(slot->payload), &slot->payload_bytes, err);
        }
    }
    cm_owner_free(policy);
    if (status == CM_OK) {
        *ret_count = arguments->node_count;
    }
    return status;
}

/* What the nodes measure before the package: the log that `casemate measure --out` wrote there. */
enum cm_status cm_nodes_measurement_read(const char *path, struct cm_measurement *ret_measurement,
                                         struct cm_error *err)
{
    static uint8_t bytes[CM_LOG_BYTES_MAX];
    size_t size = 0;
    if (path == NULL) {
        return cm_error_set(
            err, CM_E_USAGE, "CM-PACK-USAGE",
            "--measurement is missing: run `casemate measure --out FILE` on the node "
            "and give FILE");
    }
    enum cm_status status = cm_file_read(path, bytes, sizeof(bytes), &size, err);
    if (status == CM_OK) {
        status = cm_measurement_parse(bytes, size, ret_measurement, err);
    }
    if (status == CM_OK &&
        (ret_measurement->count == 0 ||
         ret_measurement->events[ret_measurement->count - 1].type >= CM_EVENT_PACKAGE)) {
        status = cm_error_set(err, CM_E_POLICY, "CM-PACK-MEASUREMENT",
                              "%s is no prediction: it is empty or has the package in it", path);
    }
    return status;
}

/* Read the head of the package that the states are for, and add its event to what comes before. */
enum cm_status cm_package_measure(const char *package, struct cm_measurement *measurement,
                                  struct cm_package_head *ret_head, struct cm_error *err)
{
    static uint8_t bytes[CM_PACKAGE_HEAD_BYTES];
    size_t size = 0;
    enum cm_status status = cm_file_read(package, bytes, sizeof(bytes), &size, err);
    if (status == CM_OK) {
        status = cm_package_head_parse(bytes, size, ret_head, err);
    }
    return status == CM_OK ? cm_measurement_add(measurement, CM_EVENT_PACKAGE,
                                                ret_head->core.core_digest, CM_DIGEST_BYTES, err)
                           : status;
}

/* An adapter is used where its base is: that is the package which a node measures. */
static enum cm_status base_measure(const char *base, struct cm_measurement *measurement,
                                   struct cm_error *err)
{
    uint8_t digest[CM_DIGEST_BYTES];
    enum cm_status status = cm_pack_base_digest(base, digest, err);
    return status == CM_OK
               ? cm_measurement_add(measurement, CM_EVENT_PACKAGE, digest, sizeof(digest), err)
               : status;
}

static bool counter_parse(const char *text, uint64_t otherwise, uint64_t *ret_value)
{
    char *end;
    if (text == NULL) {
        *ret_value = otherwise;
        return true;
    }
    errno = 0;
    *ret_value = strtoull(text, &end, 10);
    return errno == 0 && end != text && *end == '\0' && text[0] != '-';
}

/* "N=64 hex digits" into its ascending place. */
static enum cm_status pcr_add(const char *text, struct cm_policy_state *state, struct cm_error *err)
{
    uint8_t value[CM_DIGEST_BYTES];
    char *hex;
    unsigned long pcr = strtoul(text, &hex, 10);
    bool ok = hex != text && pcr <= 23 && *hex == '=' &&
              cm_hex_read(hex + 1, strlen(hex + 1), value, sizeof(value));
    uint32_t at = 0;
    while (ok && at < state->pcr_count && state->pcrs[at] < pcr) {
        at++;
    }
    if (!ok || state->pcr_count == CM_POLICY_PCRS_MAX ||
        (at < state->pcr_count && state->pcrs[at] == pcr)) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE",
                            "--pcr %.80s: expected N=64 hex digits, each PCR once and not "
                            "ours",
                            text);
    }
    memmove(&state->pcrs[at + 1], &state->pcrs[at],
            (state->pcr_count - at) * sizeof(state->pcrs[0]));
    memmove(state->pcr_values[at + 1], state->pcr_values[at],
            (state->pcr_count - at) * sizeof(state->pcr_values[0]));
    state->pcrs[at] = (uint32_t)pcr;
    memcpy(state->pcr_values[at], value, sizeof(value));
    state->pcr_count++;
    return CM_OK;
}

/* Firmware and boot loader (4) or unified kernel (11), and the secure-boot state (7). */
static bool boot_chain_named(const struct cm_policy_state *state)
{
    uint32_t bits = 0;
    for (uint32_t i = 0; i < state->pcr_count; i++) {
        bits |= 1u << state->pcrs[i];
    }
    return (bits & 1u << 7) != 0 && (bits & (1u << 4 | 1u << 11)) != 0;
}

/* One state: our PCR after all events, the counter at most as given. */
static enum cm_status state_sign(const struct cm_pack_arguments *arguments,
                                 const struct cm_enrolment *enrolment,
                                 const struct cm_measurement *measurement, uint64_t counter,
                                 struct cm_owner_key *policy, struct cm_policy_state *ret_state,
                                 struct cm_error *err)
{
    struct cm_policy_state state = {.pcr_count = 1, .pcrs = {enrolment->pcr}};
    uint8_t digest[CM_DIGEST_BYTES];
    if (!counter_parse(arguments->counter, counter, &state.counter_max)) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE", "--counter takes a whole number");
    }
    memcpy(state.pcr_values[0], enrolment->pcr_value, CM_DIGEST_BYTES);
    memcpy(state.counter_name, enrolment->counter_name, sizeof(state.counter_name));
    if (strlen(policy_ref(arguments)) >= sizeof(state.policy_ref)) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE",
                            "--policy-ref is longer than 63 bytes");
    }
    snprintf(state.policy_ref, sizeof(state.policy_ref), "%s", policy_ref(arguments));
    enum cm_status status =
        cm_measurement_replay(measurement, 0, measurement->count, state.pcr_values[0], err);
    for (uint32_t i = 0; status == CM_OK && i < arguments->pcr_count; i++) {
        status = pcr_add(arguments->pcrs[i], &state, err);
    }
    if (status == CM_OK && !enrolment->development && !boot_chain_named(&state)) {
        status = cm_error_set(
            err, CM_E_POLICY, "CM-PACK-BOOT-CHAIN",
            "node %s has a real TPM, and PCR %u alone only says what we say of "
            "ourselves: name its boot chain with --pcr 7=HEX and --pcr 4=HEX or 11=HEX",
            enrolment->node_name, enrolment->pcr);
    }
    if (status == CM_OK) {
        status = cm_policy_state_to_sign(&state, digest, err);
    }
    if (status == CM_OK) {
        status = cm_owner_sign(policy, digest, state.signature, err);
    }
    if (status == CM_OK) {
        *ret_state = state;
    }
    return status;
}

static bool state_same(const struct cm_policy_state *a, const struct cm_policy_state *b)
{
    return memcmp(a->counter_name, b->counter_name, sizeof(a->counter_name)) == 0 &&
           a->pcr_count == b->pcr_count &&
           memcmp(a->pcrs, b->pcrs, a->pcr_count * sizeof(a->pcrs[0])) == 0 &&
           memcmp(a->pcr_values, b->pcr_values, a->pcr_count * sizeof(a->pcr_values[0])) == 0;
}

/* Put a state into the list: an update adds one, the same state is signed anew in its place. */
static enum cm_status state_put(struct cm_policy_list *list, const struct cm_policy_state *state,
                                struct cm_error *err)
{
    uint32_t at = 0;
    while (at < list->count && !state_same(&list->states[at], state)) {
        at++;
    }
    if (at == CM_POLICY_ENTRIES_MAX) {
        return cm_error_set(err, CM_E_POLICY, "CM-PACK-POLICY", "a policy list takes %u states",
                            CM_POLICY_ENTRIES_MAX);
    }
    list->count += at == list->count;
    list->states[at] = *state;
    return CM_OK;
}

/* The greatest counter that anything is signed for here: a new state must not be dead on arrival.
 */
static uint64_t counter_base(const struct cm_policy_list *list,
                             const struct cm_enrolment *enrolment)
{
    uint64_t base = enrolment->counter_value;
    for (uint32_t i = 0; i < list->count; i++) {
        const struct cm_policy_state *state = &list->states[i];
        bool same_node =
            memcmp(state->counter_name, enrolment->counter_name, sizeof(state->counter_name)) == 0;
        base = same_node && state->counter_max > base ? state->counter_max : base;
    }
    return base;
}

/* Forget a node's states: what is revoked. */
static void states_drop(struct cm_policy_list *list, const struct cm_enrolment *enrolment)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        if (memcmp(list->states[i].counter_name, enrolment->counter_name,
                   sizeof(enrolment->counter_name)) != 0) {
            list->states[kept++] = list->states[i];
        }
    }
    list->count = kept;
}

enum cm_status cm_file_put(const char *path, const void *bytes, size_t size, unsigned mode,
                           struct cm_error *err)
{
    char partial[4096 + 16];
    enum cm_status status = CM_OK;
    snprintf(partial, sizeof(partial), "%s.partial", path);
    int fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, (mode_t)mode);
    if (fd < 0 || write(fd, bytes, size) != (ssize_t)size || fsync(fd) != 0 ||
        rename(partial, path) != 0) {
        status = cm_error_errno(err, errno, "CM-PACK-WRITE", "cannot write %s", path);
        unlink(partial);
    }
    if (fd >= 0) {
        close(fd);
    }
    return status;
}

static enum cm_status list_write(const char *path, const struct cm_policy_list *list,
                                 struct cm_error *err)
{
    static uint8_t bytes[CM_POLICY_LIST_BYTES_MAX];
    size_t size = 0;
    enum cm_status status = cm_policy_list_encode(list, bytes, sizeof(bytes), &size, err);
    return status == CM_OK ? cm_file_put(path, bytes, size, 0644, err) : status;
}

enum cm_status cm_nodes_policy_write(const struct cm_pack_arguments *arguments, const char *package,
                                     bool keep_others, uint64_t steps, struct cm_error *err)
{
    static struct cm_policy_list list;
    static uint8_t bytes[CM_POLICY_LIST_BYTES_MAX];
    struct cm_owner_key *policy = NULL;
    uint8_t point[CM_PUBLIC_KEY_BYTES];
    char path[4096];
    size_t size = 0;
    if (strlen(package) + 8 > sizeof(path)) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-PATH", "path is too long: %s", package);
    }
    snprintf(path, sizeof(path), "%s.policy", package);
    static struct cm_measurement measurement;
    static struct cm_package_head head;
    enum cm_status status = cm_nodes_measurement_read(arguments->measurement, &measurement, err);
    if (status == CM_OK) {
        status = arguments->base != NULL ? base_measure(arguments->base, &measurement, err)
                                         : cm_package_measure(package, &measurement, &head, err);
    }
    if (status == CM_OK) {
        status = key_load(arguments, &policy, point, err);
    }
    if (status == CM_OK && keep_others && access(path, F_OK) == 0) {
        status = cm_file_read(path, bytes, sizeof(bytes), &size, err);
        if (status == CM_OK) {
            status = cm_policy_list_parse(bytes, size, point, &list, err);
        }
    }
    for (uint32_t i = 0; status == CM_OK && i < arguments->node_count; i++) {
        struct cm_enrolment enrolment;
        struct cm_policy_state state;
        status = cm_node_read(arguments, arguments->nodes[i], &enrolment, err);
        if (status == CM_OK) {
            status = state_sign(arguments, &enrolment, &measurement,
                                counter_base(&list, &enrolment) + steps, policy, &state, err);
        }
        if (status == CM_OK && steps > 0) {
            states_drop(&list, &enrolment);
        }
        if (status == CM_OK) {
            status = state_put(&list, &state, err);
        }
    }
    cm_owner_free(policy);
    return status == CM_OK ? list_write(path, &list, err) : status;
}

enum cm_status cm_command_policy_sign(const struct cm_pack_arguments *arguments,
                                      struct cm_error *err)
{
    enum cm_status status = cm_nodes_policy_write(arguments, arguments->input, true, 0, err);
    if (status == CM_OK) {
        printf(arguments->json ? "{\"signed\": %u}\n" : "signed the states of %u node(s)\n",
               arguments->node_count);
    }
    return status;
}

enum cm_status cm_command_policy_revoke(const struct cm_pack_arguments *arguments,
                                        struct cm_error *err)
{
    enum cm_status status = cm_nodes_policy_write(arguments, arguments->input, true, 1, err);
    if (status == CM_OK) {
        printf(arguments->json
                   ? "{\"signed\": %u}\n"
                   : "signed this state of %u node(s) alone; copy the policy list there, "
                     "then `casemate revoke` on each ends the older states\n",
               arguments->node_count);
    }
    return status;
}

enum cm_status cm_nodes_check(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    static struct cm_measurement measurement;
    return arguments->node_count == 0
               ? CM_OK
               : cm_nodes_measurement_read(arguments->measurement, &measurement, err);
}

enum cm_status cm_command_slots_add(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    static struct cm_package_head head;
    static struct cm_package_slot slots[CM_PACKAGE_SLOTS_MAX];
    static struct cm_package_slot fresh[CM_PACKAGE_SLOTS_MAX];
    struct cm_secret *key = NULL;
    uint32_t added = 0, count = 0;
    int fd = open(arguments->input, O_RDWR | O_CLOEXEC);
    enum cm_status status = cm_nodes_check(arguments, err);
    if (status == CM_OK) {
        status = cm_recovery_open(arguments, fd, &head, &key, err);
    }
    if (status == CM_OK) {
        status = cm_nodes_seal(arguments, cm_secret_view(key), fresh, &added, err);
    }
    /* A node that is there already gets its new slot. */
    for (uint32_t i = 0; status == CM_OK && i < head.slot_count; i++) {
        bool replaced = false;
        for (uint32_t k = 0; k < added; k++) {
            replaced = replaced || memcmp(fresh[k].node, head.slots[i].node, CM_DIGEST_BYTES) == 0;
        }
        if (!replaced) {
            slots[count++] = head.slots[i];
        }
    }
    if (status == CM_OK && count + added > CM_PACKAGE_SLOTS_MAX) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-PACK-SLOTS", "a package has at most %u slots",
                              CM_PACKAGE_SLOTS_MAX);
    }
    if (status == CM_OK) {
        memcpy(&slots[count], fresh, added * sizeof(fresh[0]));
        status = cm_package_slots_replace(fd, cm_secret_view(key), slots, count + added, err);
    }
    if (status == CM_OK) {
        status = cm_nodes_policy_write(arguments, arguments->input, true, 0, err);
    }
    if (status == CM_OK) {
        printf(arguments->json ? "{\"slots\": %u}\n" : "the package has %u slot(s) now\n",
               count + added);
    }
    cm_secret_free(key);
    if (fd >= 0) {
        close(fd);
    }
    return status;
}

enum cm_status cm_command_slots_remove(const struct cm_pack_arguments *arguments,
                                       struct cm_error *err)
{
    static struct cm_package_head head;
    static struct cm_package_slot slots[CM_PACKAGE_SLOTS_MAX];
    struct cm_secret *key = NULL;
    uint32_t count = 0;
    int fd = open(arguments->input, O_RDWR | O_CLOEXEC);
    enum cm_status status = cm_recovery_open(arguments, fd, &head, &key, err);
    for (uint32_t i = 0; status == CM_OK && i < head.slot_count; i++) {
        if (strcmp(head.slots[i].label, arguments->label) != 0) {
            slots[count++] = head.slots[i];
        }
    }
    if (status == CM_OK && count == head.slot_count) {
        status = cm_error_set(err, CM_E_USAGE, "CM-PACK-SLOTS", "no slot is labelled '%s'",
                              arguments->label);
    }
    if (status == CM_OK) {
        status = cm_package_slots_replace(fd, cm_secret_view(key), slots, count, err);
    }
    if (status == CM_OK) {
        printf(arguments->json
                   ? "{\"slots\": %u}\n"
                   : "the package has %u slot(s) now; this revokes nothing: the node has "
                     "had the key\n",
               count);
    }
    cm_secret_free(key);
    if (fd >= 0) {
        close(fd);
    }
    return status;
}
