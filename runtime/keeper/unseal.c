/* Start of the keeper: from a package's head to its key. */
#include "runtime/keeper/keeper.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Head and enrolment into the keeper, the policy list into *ret_list. */
static enum cm_status inputs_read(struct cm_keeper *keeper, struct cm_policy_list *ret_list,
                                  struct cm_error *err)
{
    const struct cm_config_keeper *config = &keeper->config;
    size_t size = (size_t)config->head_bytes + config->policy_bytes;
    if (config->head_bytes != CM_PACKAGE_HEAD_BYTES ||
        config->policy_bytes > CM_POLICY_LIST_BYTES_MAX ||
        config->enrolment_bytes > CM_ENROLMENT_BYTES_MAX) {
        return cm_error_set(err, CM_E_BUG, "CM-KEEPER-CONFIG", "sizes in the configuration");
    }
    uint8_t *bytes = malloc(size);
    if (bytes == NULL || pread(CM_FD_INPUT, bytes, size, 0) != (ssize_t)size) {
        int error_number = errno;
        free(bytes);
        return cm_error_errno(err, error_number, "CM-KEEPER-INPUT",
                              "cannot read the package's head");
    }
    enum cm_status status =
        cm_enrolment_parse(config->enrolment, config->enrolment_bytes, &keeper->enrolment, err);
    if (status == CM_OK) {
        status = cm_package_head_parse(bytes, config->head_bytes, &keeper->head, err);
    }
    if (status == CM_OK && config->policy_bytes == 0) {
        status =
            cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                         "there is no policy list beside the package (<package>.policy): copy it "
                         "there, it comes from `casemate-pack pack`");
    }
    if (status == CM_OK) {
        status = cm_policy_list_parse(bytes + config->head_bytes, config->policy_bytes,
                                      config->policy_key, ret_list, err);
    }
    free(bytes);
    return status;
}

enum cm_status cm_keeper_unseal(struct cm_keeper *keeper, struct cm_error *err)
{
    static struct cm_policy_list list;
    const struct cm_package_slot *slot = NULL;
    const struct cm_enrolment *enrolment = &keeper->enrolment;
    struct cm_secret *key = NULL;
    enum cm_status status = inputs_read(keeper, &list, err);
    if (status == CM_OK && enrolment->development != (keeper->config.development_tpm != 0)) {
        status =
            cm_error_set(err, CM_E_POLICY, "CM-SEAL-NODE",
                         "the enrolment record is of a %s TPM, the configuration says otherwise",
                         enrolment->development ? "development" : "real");
    }
    if (status == CM_OK) {
        status = cm_package_slot_select(&keeper->head, CM_SLOT_TPM, enrolment->node, &slot, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_open(CM_FD_TPM, &keeper->tpm, err);
    }
    if (status == CM_OK) {
        status = cm_keeper_extend(keeper, err);
    }
    if (status == CM_OK) {
        status = cm_secret_new(CM_KEY_BYTES, &key, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_unseal(keeper->tpm, enrolment, slot->payload, slot->payload_bytes, &list,
                               keeper->config.policy_key, key, &keeper->state, err);
    }
    if (status == CM_OK) {
        memset(&keeper->boot, 0, sizeof(keeper->boot));
        status = cm_tpm_boot_read(keeper->tpm, &keeper->boot, err);
    }
    if (status == CM_OK) {
        status = cm_package_head_authenticate(&keeper->head, cm_secret_view(key),
                                              keeper->config.owner_key, err);
    }
    if (status != CM_OK) {
        cm_secret_free(key);
        return status;
    }
    keeper->package_key = key;
    return CM_OK;
}
