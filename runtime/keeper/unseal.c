/* Start of the keeper: from a package's head to its key. */
#include "runtime/keeper/keeper.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct inputs {
    uint8_t *bytes; /* head ‖ policy list */
    struct cm_package_head head;
    struct cm_enrolment enrolment;
    struct cm_policy_list list;
};

static enum cm_status inputs_read(const struct cm_config_keeper *config, struct inputs *in,
                                  struct cm_error *err)
{
    size_t size = (size_t)config->head_bytes + config->policy_bytes;
    if (config->head_bytes != CM_PACKAGE_HEAD_BYTES ||
        config->policy_bytes > CM_POLICY_LIST_BYTES_MAX ||
        config->enrolment_bytes > CM_ENROLMENT_BYTES_MAX) {
        return cm_error_set(err, CM_E_BUG, "CM-KEEPER-CONFIG", "sizes in the configuration");
    }
    in->bytes = malloc(size);
    if (in->bytes == NULL || pread(CM_FD_INPUT, in->bytes, size, 0) != (ssize_t)size) {
        return cm_error_errno(err, errno, "CM-KEEPER-INPUT", "cannot read the package's head");
    }
    enum cm_status status =
        cm_enrolment_parse(config->enrolment, config->enrolment_bytes, &in->enrolment, err);
    if (status == CM_OK) {
        status = cm_package_head_parse(in->bytes, config->head_bytes, &in->head, err);
    }
    if (status == CM_OK && config->policy_bytes == 0) {
        status =
            cm_error_set(err, CM_E_POLICY, "CM-SEAL-POLICY",
                         "there is no policy list beside the package (<package>.policy): copy it "
                         "there, it comes from `casemate-pack pack`");
    }
    if (status == CM_OK) {
        status = cm_policy_list_parse(in->bytes + config->head_bytes, config->policy_bytes,
                                      config->policy_key, &in->list, err);
    }
    return status;
}

enum cm_status cm_keeper_unseal(struct cm_keeper *keeper, struct cm_error *err)
{
    static struct inputs in;
    const struct cm_package_slot *slot;
    struct cm_tpm *tpm = NULL;
    struct cm_secret *key = NULL;
    enum cm_status status = inputs_read(&keeper->config, &in, err);
    if (status == CM_OK && in.enrolment.development != (keeper->config.development_tpm != 0)) {
        status =
            cm_error_set(err, CM_E_POLICY, "CM-SEAL-NODE",
                         "the enrolment record is of a %s TPM, the configuration says otherwise",
                         in.enrolment.development ? "development" : "real");
    }
    if (status == CM_OK) {
        status = cm_package_slot_select(&in.head, CM_SLOT_TPM, in.enrolment.node, &slot, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_open(CM_FD_TPM, &tpm, err);
    }
    if (status == CM_OK) {
        status = cm_tpm_unseal(tpm, &in.enrolment, slot->payload, slot->payload_bytes, &in.list,
                               keeper->config.policy_key, &key, err);
    }
    cm_tpm_close(tpm);
    if (status == CM_OK) {
        status = cm_package_head_authenticate(&in.head, cm_secret_view(key),
                                              keeper->config.owner_key, err);
    }
    free(in.bytes);
    in.bytes = NULL;
    if (status != CM_OK) {
        cm_secret_free(key);
        return status;
    }
    keeper->package_key = key;
    return CM_OK;
}
