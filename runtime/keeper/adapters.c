/* Keys of adapters: each under its own slot, its own owner and the policy of that owner; unsealed
 * once, kept as the package's own is, and handed out through the same page. */
#include "runtime/keeper/keeper.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum cm_status cm_keeper_adapters_prepare(struct cm_keeper *keeper, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    bool any = keeper->config.adapter_owners.count > 0;
    for (uint32_t i = 0; any && status == CM_OK && i < CM_ADAPTERS_MAX; i++) {
        status = cm_secret_new(CM_KEY_BYTES, &keeper->adapters[i].key, err);
    }
    return status;
}

static void adapter_forget(struct cm_keeper_adapter *adapter)
{
    if (adapter->key != NULL) {
        cm_wipe(cm_secret_bytes(adapter->key), CM_KEY_BYTES);
    }
    memset(&adapter->facts, 0, sizeof(adapter->facts));
}

void cm_keeper_adapters_wipe(struct cm_keeper *keeper)
{
    for (uint32_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        adapter_forget(&keeper->adapters[i]);
    }
}

/* From where the descriptor stands: it was opened for us. */
static enum cm_status input_read(int fd, uint8_t *bytes, size_t size, struct cm_error *err)
{
    for (size_t used = 0; used < size;) {
        ssize_t got = read(fd, bytes + used, size - used);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return cm_error_errno(err, got < 0 ? errno : EIO, "CM-KEEPER-INPUT",
                                  "cannot read the adapter's head");
        }
        used += (size_t)got;
    }
    return CM_OK;
}

/* Head and list of states, each checked for form; the list under its owner's policy key. */
static enum cm_status input_parse(const struct cm_keeper *keeper,
                                  const struct cm_adapter_open *open, int fd,
                                  struct cm_package_head *head, struct cm_policy_list *list,
                                  const struct cm_adapter_owner **ret_owner, struct cm_error *err)
{
    static uint8_t bytes[CM_PACKAGE_HEAD_BYTES + CM_POLICY_LIST_BYTES_MAX];
    if (open->head_bytes != CM_PACKAGE_HEAD_BYTES ||
        open->policy_bytes > CM_POLICY_LIST_BYTES_MAX) {
        return cm_error_set(err, CM_E_BUG, "CM-KEEPER-INPUT", "sizes of an adapter's head");
    }
    enum cm_status status =
        input_read(fd, bytes, (size_t)open->head_bytes + open->policy_bytes, err);
    if (status == CM_OK) {
        status = cm_package_head_parse(bytes, open->head_bytes, head, err);
    }
    if (status == CM_OK) {
        status = cm_package_owner_find(head, &keeper->config.adapter_owners, ret_owner, err);
    }
    if (status == CM_OK && open->policy_bytes == 0) {
        status = cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                              "there is no policy list beside it: copy <package>.policy too, it "
                              "comes from `casemate-pack adapter`");
    }
    return status == CM_OK ? cm_policy_list_parse(bytes + open->head_bytes, open->policy_bytes,
                                                  (*ret_owner)->policy, list, err)
                           : status;
}

/* What the key has just authenticated, and the name that the supervisor gave it. */
static void facts_take(const struct cm_adapter_open *open, const struct cm_package_core *core,
                       struct cm_evidence_adapter *ret_facts)
{
    *ret_facts = (struct cm_evidence_adapter){.serial = open->serial};
    snprintf(ret_facts->name, sizeof(ret_facts->name), "%.63s", open->name);
    memcpy(ret_facts->core_digest, core->core_digest, sizeof(ret_facts->core_digest));
    memcpy(ret_facts->owner_key, core->owner_key, sizeof(ret_facts->owner_key));
    memcpy(ret_facts->owner_signature, core->signature, sizeof(ret_facts->owner_signature));
}

/* On failure the key is wiped, and there are no facts. */
static enum cm_status adapter_unseal(struct cm_keeper *keeper, const struct cm_adapter_open *open,
                                     int fd, struct cm_keeper_adapter *adapter,
                                     struct cm_error *err)
{
    struct cm_secret *key = adapter->key;
    static struct cm_package_head head;
    static struct cm_policy_list list;
    const struct cm_adapter_owner *owner = NULL;
    const struct cm_package_slot *slot = NULL;
    struct cm_policy_state state;
    if (keeper->capped) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-CAPPED",
                            "attest_mode is strict: nothing is unsealed after the start; it is "
                            "loaded by the next start, after a reboot");
    }
    enum cm_status status = input_parse(keeper, open, fd, &head, &list, &owner, err);
    if (status == CM_OK) {
        status = cm_package_slot_select(&head, CM_SLOT_TPM, keeper->enrolment.node, &slot, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_unseal(keeper->tpm, &keeper->enrolment, slot->payload, slot->payload_bytes,
                               &list, owner->policy, key, &state, err);
    }
    if (status == CM_OK) {
        status = cm_package_head_authenticate(&head, cm_secret_view(key), owner->package, err);
    }
    if (status != CM_OK) {
        adapter_forget(adapter);
        return status;
    }
    facts_take(open, &head.core, &adapter->facts);
    return CM_OK;
}

static enum cm_status answer_send(struct cm_keeper *keeper, uint64_t serial, enum cm_status status,
                                  const struct cm_error *why, struct cm_error *err)
{
    struct cm_adapter_answer answer = {.serial = serial};
    if (status != CM_OK) {
        answer.error = *why;
        cm_log_error(&keeper->log, "adapter_refused", why);
    }
    return cm_channel_send(&keeper->channel, CM_FRAME_ADAPTER_ANSWER, &answer, sizeof(answer), NULL,
                           0, err);
}

/* What is wrong with an adapter is told; what is wrong with this boot is the end. */
enum cm_status cm_keeper_adapter_open(struct cm_keeper *keeper, struct cm_frame *frame,
                                      struct cm_error *err)
{
    struct cm_adapter_open open;
    struct cm_error why;
    memcpy(&open, frame->payload, sizeof(open));
    if (open.place >= CM_ADAPTERS_MAX || keeper->adapters[open.place].key == NULL ||
        open.serial == 0 || memchr(open.name, '\0', sizeof(open.name)) == NULL ||
        !cm_name_valid(open.name)) {
        cm_frame_close_fds(frame);
        return cm_error_set(err, CM_E_BUG, "CM-KEEPER-FRAME",
                            "an adapter without a place or a name");
    }
    struct cm_keeper_adapter *adapter = &keeper->adapters[open.place];
    adapter_forget(adapter);
    enum cm_status status = adapter_unseal(keeper, &open, frame->fds[0], adapter, &why);
    cm_frame_close_fds(frame);
    if (status == CM_OK) {
        CM_LOG(&keeper->log, CM_LOG_INFO, "adapter_unsealed", CM_LOG_I("place", open.place),
               CM_LOG_I("serial", open.serial));
    }
    return answer_send(keeper, open.serial, status, &why, err);
}

/* In the page that the package's own key was handed out in: it must be free, and wiped. */
enum cm_status cm_keeper_adapter_key(struct cm_keeper *keeper, const struct cm_frame *frame,
                                     struct cm_error *err)
{
    static const uint8_t zeros[CM_KEY_PAGE_BYTES];
    struct cm_adapter_step step;
    struct cm_error why;
    memcpy(&step, frame->payload, sizeof(step));
    if (step.place >= CM_ADAPTERS_MAX || step.serial == 0 ||
        keeper->adapters[step.place].facts.serial != step.serial) {
        (void)cm_error_set(&why, CM_E_BUSY, "CM-KEEPER-ADAPTER", "its key is not here any more");
        return answer_send(keeper, step.serial, CM_E_BUSY, &why, err);
    }
    struct cm_keeper_adapter *adapter = &keeper->adapters[step.place];
    enum cm_status status = cm_keeper_rate_check(&adapter->rate, &why);
    if (status == CM_OK && !cm_ct_equal(keeper->key_page.bytes, zeros, sizeof(zeros))) {
        status = cm_error_set(&why, CM_E_BUSY, "CM-KEEPER-PAGE", "the key page is in use");
    }
    if (status == CM_OK) {
        status = cm_keeper_boot_check(keeper, &why);
        if (status == CM_E_POLICY) {
            *err = why;
            return status;
        }
    }
    if (status != CM_OK) {
        return answer_send(keeper, step.serial, status, &why, err);
    }
    memcpy(keeper->key_page.bytes, cm_secret_view(adapter->key), CM_KEY_BYTES);
    return cm_channel_send(&keeper->channel, CM_FRAME_ADAPTER_PAGE, &step, sizeof(step),
                           &keeper->key_page.fd, 1, err);
}

void cm_keeper_adapter_close(struct cm_keeper *keeper, const struct cm_frame *frame)
{
    struct cm_adapter_step step;
    memcpy(&step, frame->payload, sizeof(step));
    if (step.place < CM_ADAPTERS_MAX && keeper->adapters[step.place].facts.serial == step.serial &&
        step.how == CM_ADAPTER_CLOSE_FORGET) {
        adapter_forget(&keeper->adapters[step.place]);
    }
    if (step.how == CM_ADAPTER_CLOSE_UNUSED) {
        cm_wipe(keeper->key_page.bytes, CM_KEY_PAGE_BYTES);
    }
    cm_keeper_page_check(keeper);
}
