/* The head of a package: parse untrusted bytes, choose a slot copy, authenticate. */
#include "loader/package/internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "runtime/base/cursor.h"
#include "runtime/base/hex.h"

enum cm_status cm_read_exact(int fd, void *bytes, size_t size, uint64_t offset, const char *part,
                             struct cm_error *err)
{
    size_t done = 0;
    while (done < size) {
        ssize_t got = pread(fd, (uint8_t *)bytes + done, size - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return cm_error_errno(err, errno, "CM-PKG-READ", "%s at offset %llu", part,
                                  (unsigned long long)(offset + done));
        }
        if (got == 0) {
            return cm_error_set(
                err, CM_E_PACKAGE, "CM-PKG-LENGTH",
                "%s: the file ends at offset %llu, %zu bytes too early: copy it again", part,
                (unsigned long long)(offset + done), size - done);
        }
        done += (size_t)got;
    }
    return CM_OK;
}

static enum cm_status refuse(struct cm_error *err, const char *id, const char *part,
                             uint64_t offset, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, id, "%s at offset %llu: %s", part,
                        (unsigned long long)offset, what);
}

/* Offset of the first non-zero byte, or size. */
static size_t first_non_zero(const uint8_t *bytes, size_t size)
{
    size_t at = 0;
    while (at < size && bytes[at] == 0) {
        at++;
    }
    return at;
}

static enum cm_status zeros_check(const uint8_t *bytes, size_t size, const char *part,
                                  uint64_t offset, struct cm_error *err)
{
    size_t at = first_non_zero(bytes, size);
    return at == size
               ? CM_OK
               : refuse(err, "CM-PKG-RESERVED", part, offset + at, "reserved byte is not zero");
}

static enum cm_status prologue_parse(const uint8_t *bytes, struct cm_error *err)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, CM_PACKAGE_PROLOGUE_BYTES);
    if (memcmp(cm_cursor_take(&cursor, 8), "CASEMATE", 8) != 0) {
        return refuse(err, "CM-PKG-MAGIC", "prologue", 0, "this is not a Casemate package");
    }
    uint32_t version = cm_cursor_u32(&cursor);
    if (version != CM_FORMAT_VERSION) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-VERSION",
                            "prologue at offset 8: format version %u, this build reads %u: use a "
                            "newer host or pack again",
                            version, CM_FORMAT_VERSION);
    }
    if (cm_cursor_u32(&cursor) != CM_PACKAGE_HEAD_BYTES) {
        return refuse(err, "CM-PKG-CORE", "prologue", 12, "head size is not that of this version");
    }
    return zeros_check(bytes + 16, CM_PACKAGE_PROLOGUE_BYTES - 16, "prologue", 16, err);
}

static uint64_t ceil_divide(uint64_t value, uint64_t by)
{
    return value / by + (value % by != 0);
}

/* Every field by itself, then the layout: parts follow each other with no gap but the padding. */
static enum cm_status core_check(const struct cm_package_core *core, struct cm_error *err)
{
    const uint64_t at = CM_PACKAGE_CORE_OFFSET;
    if (core->format_version != CM_FORMAT_VERSION) {
        return refuse(err, "CM-PKG-VERSION", "core header", at + 8, "unknown format version");
    }
    if (core->suite != CM_SUITE_AES_256_GCM && core->suite != CM_SUITE_CHACHA20_POLY1305) {
        return refuse(err, "CM-PKG-SUITE", "core header", at + 12, "unknown cipher suite");
    }
    if (core->segment_bytes != CM_PACKAGE_SEGMENT_BYTES) {
        return refuse(err, "CM-PKG-CORE", "core header", at + 16, "segment size is not 262144");
    }
    if (core->manifest_bytes <= CM_AEAD_TAG_BYTES ||
        core->manifest_bytes > CM_PACKAGE_MANIFEST_BYTES_MAX ||
        core->manifest_offset != CM_PACKAGE_HEAD_BYTES) {
        return refuse(err, "CM-PKG-CORE", "core header", at + 72, "manifest's place is impossible");
    }
    if (core->segment_count == 0 || core->segment_count > CM_PACKAGE_SEGMENTS_MAX ||
        core->table_offset != cm_align_up(core->manifest_offset + core->manifest_bytes)) {
        return refuse(err, "CM-PKG-CORE", "core header", at + 88,
                      "tag table's place is impossible");
    }
    uint64_t table_bytes = core->segment_count * CM_PACKAGE_TABLE_ENTRY_BYTES;
    if (core->payload_offset != cm_align_up(core->table_offset + table_bytes) ||
        core->payload_bytes > CM_PACKAGE_SEGMENTS_MAX * (uint64_t)CM_PACKAGE_SEGMENT_BYTES ||
        ceil_divide(core->payload_bytes, core->segment_bytes) != core->segment_count ||
        core->file_bytes != core->payload_offset + core->payload_bytes) {
        return refuse(err, "CM-PKG-CORE", "core header", at + 104, "payload's place is impossible");
    }
    if (core->shard_count != ceil_divide(core->payload_bytes, CM_SHARD_BYTES)) {
        return refuse(err, "CM-PKG-CORE", "core header", at + 20, "shard count does not fit");
    }
    return CM_OK;
}

static enum cm_status core_parse(const uint8_t *bytes, struct cm_package_core *core,
                                 struct cm_error *err)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, CM_PACKAGE_CORE_BYTES);
    if (memcmp(cm_cursor_take(&cursor, 8), "CMCORE\0", 8) != 0) {
        return refuse(err, "CM-PKG-MAGIC", "core header", CM_PACKAGE_CORE_OFFSET, "wrong mark");
    }
    core->format_version = cm_cursor_u32(&cursor);
    core->suite = cm_cursor_u32(&cursor);
    core->segment_bytes = cm_cursor_u32(&cursor);
    core->shard_count = cm_cursor_u32(&cursor);
    core->revision = cm_cursor_u64(&cursor);
    core->host_version_min = cm_cursor_u32(&cursor);
    if (cm_cursor_u32(&cursor) != 0) {
        return refuse(err, "CM-PKG-RESERVED", "core header", CM_PACKAGE_CORE_OFFSET + 36,
                      "reserved byte is not zero");
    }
    cm_cursor_copy(&cursor, core->salt, sizeof(core->salt));
    core->manifest_offset = cm_cursor_u64(&cursor);
    core->manifest_bytes = cm_cursor_u64(&cursor);
    core->table_offset = cm_cursor_u64(&cursor);
    core->segment_count = cm_cursor_u64(&cursor);
    core->payload_offset = cm_cursor_u64(&cursor);
    core->payload_bytes = cm_cursor_u64(&cursor);
    core->file_bytes = cm_cursor_u64(&cursor);
    cm_cursor_copy(&cursor, core->manifest_digest, CM_DIGEST_BYTES);
    cm_cursor_copy(&cursor, core->table_digest, CM_DIGEST_BYTES);
    core->owner_key[0] = 4; /* SEC 1: uncompressed point */
    cm_cursor_copy(&cursor, core->owner_key + 1, CM_PUBLIC_KEY_BYTES - 1);
    CM_ASSERT(cursor.offset == CM_CORE_SIGNED_BYTES);
    cm_cursor_copy(&cursor, core->signature, sizeof(core->signature));
    cm_cursor_copy(&cursor, core->header_mac, sizeof(core->header_mac));
    CM_ASSERT(cm_cursor_ok(&cursor));
    enum cm_status status =
        zeros_check(bytes + cursor.offset, CM_PACKAGE_CORE_BYTES - cursor.offset, "core header",
                    CM_PACKAGE_CORE_OFFSET + cursor.offset, err);
    if (status == CM_OK) {
        status = core_check(core, err);
    }
    return status == CM_OK ? cm_sha256(bytes, CM_CORE_SIGNED_BYTES, core->core_digest, err)
                           : status;
}

/* Is this copy whole (written to its end)? */
static bool slots_whole(const uint8_t *bytes, uint64_t *ret_generation)
{
    uint8_t sum[CM_DIGEST_BYTES];
    struct cm_cursor cursor = cm_cursor_init(bytes, CM_PACKAGE_SLOTS_BYTES);
    bool marked = memcmp(cm_cursor_take(&cursor, 8), "CMSLOTS", 8) == 0;
    *ret_generation = cm_cursor_u64(&cursor);
    return marked && cm_sha256(bytes, CM_SLOTS_SUM_OFFSET, sum, NULL) == CM_OK &&
           memcmp(sum, bytes + CM_SLOTS_SUM_OFFSET, sizeof(sum)) == 0;
}

static enum cm_status slot_parse(const uint8_t *bytes, uint64_t offset,
                                 struct cm_package_slot *slot, struct cm_error *err)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, CM_SLOT_BYTES);
    slot->kind = cm_cursor_u32(&cursor);
    slot->payload_bytes = cm_cursor_u32(&cursor);
    cm_cursor_copy(&cursor, slot->label, sizeof(slot->label));
    cm_cursor_copy(&cursor, slot->node, sizeof(slot->node));
    if ((slot->kind != CM_SLOT_TPM && slot->kind != CM_SLOT_BROKER) ||
        slot->payload_bytes > CM_PACKAGE_SLOT_PAYLOAD_MAX ||
        memchr(slot->label, '\0', sizeof(slot->label)) == NULL) {
        return refuse(err, "CM-PKG-SLOTS", "slot", offset, "kind, size or label is impossible");
    }
    for (const char *at = slot->label; *at != '\0'; at++) {
        if ((unsigned char)*at < 0x21 || (unsigned char)*at > 0x7e) {
            return refuse(err, "CM-PKG-SLOTS", "slot", offset, "label is not printable");
        }
    }
    cm_cursor_copy(&cursor, slot->payload, slot->payload_bytes);
    return zeros_check(bytes + cursor.offset, CM_SLOT_BYTES - cursor.offset, "slot",
                       offset + cursor.offset, err);
}

static enum cm_status slots_parse(const uint8_t *bytes, uint64_t offset,
                                  struct cm_package_head *head, struct cm_error *err)
{
    struct cm_cursor cursor = cm_cursor_init(bytes, CM_PACKAGE_SLOTS_BYTES);
    cm_cursor_skip(&cursor, 8);
    head->slots_generation = cm_cursor_u64(&cursor);
    head->slot_count = cm_cursor_u32(&cursor);
    if (head->slot_count > CM_PACKAGE_SLOTS_MAX || cm_cursor_u32(&cursor) != 0) {
        return refuse(err, "CM-PKG-SLOTS", "slots", offset + 16, "slot count is impossible");
    }
    for (uint32_t i = 0; i < head->slot_count; i++) {
        enum cm_status status =
            slot_parse(cm_cursor_take(&cursor, CM_SLOT_BYTES),
                       offset + cursor.offset - CM_SLOT_BYTES, &head->slots[i], err);
        if (status != CM_OK) {
            return status;
        }
    }
    enum cm_status status = zeros_check(bytes + cursor.offset, CM_SLOTS_MAC_OFFSET - cursor.offset,
                                        "slots", offset + cursor.offset, err);
    memcpy(head->slots_mac, bytes + CM_SLOTS_MAC_OFFSET, CM_DIGEST_BYTES);
    return status == CM_OK ? cm_sha256(bytes, CM_SLOTS_MAC_OFFSET, head->slots_digest, err)
                           : status;
}

enum cm_status cm_package_head_parse(const uint8_t *bytes, size_t size,
                                     struct cm_package_head *ret_head, struct cm_error *err)
{
    if (size < CM_PACKAGE_HEAD_BYTES) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-LENGTH",
                            "head: %zu bytes, expected %u: the file is cut", size,
                            CM_PACKAGE_HEAD_BYTES);
    }
    struct cm_package_head head = {.slots_copy = 0};
    enum cm_status status = prologue_parse(bytes, err);
    if (status == CM_OK) {
        status = core_parse(bytes + CM_PACKAGE_CORE_OFFSET, &head.core, err);
    }
    if (status != CM_OK) {
        return status;
    }
    static const uint64_t offsets[2] = {CM_PACKAGE_SLOTS_A_OFFSET, CM_PACKAGE_SLOTS_B_OFFSET};
    uint64_t generations[2];
    bool whole[2];
    for (int copy = 0; copy < 2; copy++) {
        whole[copy] = slots_whole(bytes + offsets[copy], &generations[copy]);
    }
    if (!whole[0] && !whole[1]) {
        return refuse(err, "CM-PKG-SLOTS", "slots", offsets[0],
                      "both copies are damaged: restore the head from the owner's copy");
    }
    head.slots_copy = !whole[0] || (whole[1] && generations[1] > generations[0]) ? 1 : 0;
    head.slots_torn = !whole[0] || !whole[1] || generations[0] != generations[1];
    status = slots_parse(bytes + offsets[head.slots_copy], offsets[head.slots_copy], &head, err);
    if (status == CM_OK) {
        *ret_head = head;
    }
    return status;
}

enum cm_status cm_package_slot_select(const struct cm_package_head *head, uint32_t kind,
                                      const uint8_t node[static CM_DIGEST_BYTES],
                                      const struct cm_package_slot **ret_slot, struct cm_error *err)
{
    char labels[160] = "none";
    size_t used = 0;
    for (uint32_t i = 0; i < head->slot_count; i++) {
        const struct cm_package_slot *slot = &head->slots[i];
        if (slot->kind == kind && memcmp(slot->node, node, CM_DIGEST_BYTES) == 0) {
            *ret_slot = slot;
            return CM_OK;
        }
        int more = snprintf(labels + used, sizeof(labels) - used, "%s%s", used > 0 ? ", " : "",
                            slot->label);
        used = used + (size_t)more < sizeof(labels) ? used + (size_t)more : sizeof(labels) - 1;
    }
    return cm_error_set(err, CM_E_POLICY, "CM-PKG-SLOT",
                        "the package is not sealed to this node (sealed to: %s): ask its owner for "
                        "`casemate-pack slots add` with this node's enrolment",
                        labels);
}

enum cm_status cm_package_owner_find(const struct cm_package_head *head,
                                     const struct cm_adapter_owners *owners,
                                     const struct cm_adapter_owner **ret_owner,
                                     struct cm_error *err)
{
    char found[2 * CM_PUBLIC_KEY_BYTES + 1];
    for (uint32_t i = 0; i < owners->count && i < CM_ADAPTER_OWNERS_MAX; i++) {
        if (memcmp(owners->each[i].package, head->core.owner_key, CM_PUBLIC_KEY_BYTES) == 0) {
            *ret_owner = &owners->each[i];
            return CM_OK;
        }
    }
    cm_hex_write(head->core.owner_key, CM_PUBLIC_KEY_BYTES, found);
    return cm_error_set(err, CM_E_POLICY, "CM-PKG-OWNER",
                        "signed by %.18s..., who is none of the %u in `sealed: adapter_owners`: "
                        "whoever signs the states of this node decides whose adapters it loads",
                        found, owners->count);
}

enum cm_status cm_package_head_authenticate(const struct cm_package_head *head,
                                            const uint8_t key[static CM_KEY_BYTES],
                                            const uint8_t owner_key[static CM_PUBLIC_KEY_BYTES],
                                            struct cm_error *err)
{
    uint8_t mac[CM_DIGEST_BYTES];
    enum cm_status status = cm_header_mac(key, &head->core, mac, err);
    if (status != CM_OK) {
        return status;
    }
    if (!cm_ct_equal(mac, head->core.header_mac, sizeof(mac))) {
        return refuse(err, "CM-PKG-MAC", "core header", CM_PACKAGE_CORE_OFFSET + 320,
                      "MAC is wrong: another file's key, or the header was changed");
    }
    status = cm_slots_mac(key, &head->core, head->slots_digest, mac, err);
    if (status != CM_OK) {
        return status;
    }
    if (!cm_ct_equal(mac, head->slots_mac, sizeof(mac))) {
        return refuse(
            err, "CM-PKG-SLOTS-MAC", "slots",
            (head->slots_copy == 0 ? CM_PACKAGE_SLOTS_A_OFFSET : CM_PACKAGE_SLOTS_B_OFFSET) +
                CM_SLOTS_MAC_OFFSET,
            "MAC is wrong");
    }
    if (memcmp(head->core.owner_key, owner_key, CM_PUBLIC_KEY_BYTES) != 0) {
        return refuse(err, "CM-PKG-OWNER", "core header", CM_PACKAGE_CORE_OFFSET + 192,
                      "signed by another owner than the configuration pins");
    }
    return cm_signature_check(owner_key, head->core.core_digest, head->core.signature, err);
}
