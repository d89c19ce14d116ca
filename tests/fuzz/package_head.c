/* Fuzz target: a package's head. Slot checksums are made right first, so that what lies behind them
 * is reached. First input: the head of a golden package. */
#include <string.h>

#include "loader/package/internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t head[CM_PACKAGE_HEAD_BYTES];
    static struct cm_package_head parsed;
    const struct cm_package_slot *slot;
    struct cm_error err;
    size_t taken = size < sizeof(head) ? size : sizeof(head);
    memset(head, 0, sizeof(head));
    memcpy(head, data, taken);
    for (int copy = 0; copy < 2; copy++) {
        uint8_t *slots = head + (copy ? CM_PACKAGE_SLOTS_B_OFFSET : CM_PACKAGE_SLOTS_A_OFFSET);
        (void)!cm_sha256(slots, CM_SLOTS_SUM_OFFSET, slots + CM_SLOTS_SUM_OFFSET, &err);
    }
    if (cm_package_head_parse(head, sizeof(head), &parsed, &err) == CM_OK) {
        (void)!cm_package_slot_select(&parsed, CM_SLOT_TPM, parsed.slots[0].node, &slot, &err);
    }
    return 0;
}
