/* What the keeper measures: the sealed copies that run, the sealed configuration, the device. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loader/tpm/measure.h"
#include "policies/guard/rules.h"
#include "runtime/base/sealed.h"
#include "runtime/supervisor/supervisor_internal.h"

static enum cm_status text_seal(const char *name, const char *text, size_t bytes, int *ret_fd,
                                struct cm_error *err)
{
    *ret_fd = cm_memfd_sealed(name, text, bytes);
    return *ret_fd >= 0 ? CM_OK
                        : cm_error_errno(err, errno, "CM-SUP-MEASURE", "cannot seal the %s", name);
}

/* The guard's rules, once: every worker gets the same bytes, and they are measured. */
static enum cm_status rules_seal(struct service *service, struct cm_error *err)
{
    uint8_t *pack = NULL;
    size_t bytes = 0;
    enum cm_status status = cm_rules_pack(service->configuration->guard_rules, &pack, &bytes, err);
    if (status == CM_OK) {
        status = text_seal("rule pack", (const char *)pack, bytes, &service->rules_fd, err);
        service->rules_bytes = (uint32_t)bytes;
    }
    if (status == CM_OK) {
        CM_LOG(&service->log, CM_LOG_INFO, "guard", CM_LOG_I("bytes", bytes));
    }
    free(pack);
    return status;
}

enum cm_status measure_open(struct service *service, struct cm_error *err)
{
    static uint8_t bytes_of_filters[CM_FILTERS_BYTES_MAX];
    char text[CM_CONFIG_SEALED_BYTES];
    size_t bytes = 0;
    const char *device = service->configuration->device;
    enum cm_status status = cm_config_sealed_text(
        service->configuration, service->keeper_config.owner_key, service->keeper_config.policy_key,
        &service->keeper_config.adapter_owners, text, &bytes, err);
    service->keeper_config.strict =
        strcmp(cm_config_attest_mode(service->configuration), "strict") == 0;
    if (status == CM_OK) {
        status = text_seal("configuration", text, bytes, &service->sealed_fd, err);
    }
    if (status == CM_OK) {
        size_t filters = cm_filters_encode(bytes_of_filters, sizeof(bytes_of_filters));
        status = text_seal("filters", (const char *)bytes_of_filters, filters, &service->filters_fd,
                           err);
    }
    if (status == CM_OK) {
        status = text_seal("device", device, strlen(device), &service->device_id_fd, err);
    }
    if (status == CM_OK && strcmp(service->configuration->guard, "on") == 0) {
        status = rules_seal(service, err);
    } else if (status == CM_OK) {
        CM_LOG(&service->log, CM_LOG_WARN, "guard_off", CM_LOG_I("rules", 0));
    }
    return status;
}

static void file_send(struct service *service, struct child *keeper, uint32_t type,
                      const char *name, bool complete, int fd)
{
    struct cm_measure measure = {.type = type, .complete = complete};
    snprintf(measure.name, sizeof(measure.name), "%s", name);
    frame_send(service, keeper, CM_FRAME_MEASURE, &measure, sizeof(measure), &fd, 1);
}

static void image_send(struct service *service, struct child *keeper, const struct cm_image *image)
{
    for (uint32_t i = 0; i < image->count; i++) {
        const struct cm_image_file *file = &service->store.files[image->files[i]];
        file_send(service, keeper, CM_EVENT_PROGRAM, file->name, i + 1 == image->count, file->fd);
    }
}

void measure_send(struct service *service, struct child *keeper)
{
    image_send(service, keeper, &service->image);
    for (size_t i = 0; i < CHILD_COUNT; i++) {
        image_send(service, keeper, &service->children[i].image);
    }
    file_send(service, keeper, CM_EVENT_FILTERS, "filters", true, service->filters_fd);
    file_send(service, keeper, CM_EVENT_CONFIGURATION, "", true, service->sealed_fd);
    if (service->rules_fd >= 0) {
        file_send(service, keeper, CM_EVENT_RULES, "rules", true, service->rules_fd);
    }
    file_send(service, keeper, CM_EVENT_DEVICE, "", true, service->device_id_fd);
    frame_send(service, keeper, CM_FRAME_UNSEAL, NULL, 0, NULL, 0);
}
