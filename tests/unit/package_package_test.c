/* Sealed packages: what was written comes back; anything else is refused by part and offset. */
#include "tests/unit/package_sample.h"

#include <sys/resource.h>
#include <signal.h>

#include "loader/package/internal.h"

static struct sample sample;

Test(package, round_trip_of_both_suites_around_segment_borders)
{
    const uint64_t segment = CM_PACKAGE_SEGMENT_BYTES;
    const uint64_t sizes[] = {1,           4096,        segment - 1,     segment,
                              segment + 1, segment * 3, segment * 3 + 17};
    struct cm_error err;
    for (uint32_t suite = 1; suite <= 2; suite++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            sample_make(&sample, suite, sizes[i], "model.cmpkg");
            cr_assert_eq(sample_open(&sample, sample.path, &err), CM_OK, "%s", err.text);
        }
    }
    sample_done(&sample);
}

static const char *changed_path(void)
{
    static char path[128];
    snprintf(path, sizeof(path), "%s/changed", sample.folder);
    return path;
}

static enum cm_status open_changed(const uint8_t *bytes, size_t size, struct cm_error *err)
{
    file_save(changed_path(), bytes, size);
    return sample_open(&sample, changed_path(), err);
}

/* Where a flipped byte may be neutral: in the slot copy that is not in use. */
static bool flip_neutral(size_t at)
{
    return at >= CM_PACKAGE_SLOTS_A_OFFSET && at < CM_PACKAGE_HEAD_BYTES;
}

Test(package, every_flipped_byte_is_refused)
{
    struct cm_error err;
    size_t size, neutral = 0;
    sample_make(&sample, CM_SUITE_AES_256_GCM, CM_PACKAGE_SEGMENT_BYTES + 4096, "model.cmpkg");
    uint8_t *bytes = file_load(sample.path, &size);
    /* Every byte of the fields, every 61st of long zero runs and of the payload. */
    for (size_t at = 0; at < size; at++) {
        bool dense = at < 32 || (at >= 4096 && at < 4096 + 360) ||
                     (at >= CM_PACKAGE_HEAD_BYTES && at < CM_PACKAGE_HEAD_BYTES + 1200);
        if (!dense && at % 997 != 0) {
            continue;
        }
        bytes[at] ^= (uint8_t)(1u << (at % 8));
        enum cm_status status = open_changed(bytes, size, &err);
        bytes[at] ^= (uint8_t)(1u << (at % 8));
        if (status == CM_OK) {
            cr_assert(flip_neutral(at), "byte %zu flipped and accepted", at);
            neutral++;
        } else {
            cr_assert_eq(status, CM_E_PACKAGE);
            cr_assert_eq(strncmp(err.id, "CM-PKG-", 7), 0);
            cr_assert_not_null(strstr(err.text, "offset"), "no offset in: %s", err.text);
        }
    }
    cr_assert_gt(neutral, 0u); /* one copy of the slots may be lost */
    free(bytes);
    sample_done(&sample);
}

Test(package, cut_extended_swapped_and_spliced_files_are_refused)
{
    struct cm_error err;
    size_t size, other_size;
    const size_t segment = CM_PACKAGE_SEGMENT_BYTES;
    sample_make(&sample, CM_SUITE_CHACHA20_POLY1305, segment * 3, "other.cmpkg");
    uint8_t *other = file_load(sample.path, &other_size);
    sample_make(&sample, CM_SUITE_CHACHA20_POLY1305, segment * 3, "model.cmpkg");
    uint8_t *bytes = file_load(sample.path, &size);
    cr_assert_eq(size, other_size);
    for (size_t cut = 0; cut < size; cut += 4096 * 7) {
        cr_assert_eq(open_changed(bytes, cut, &err), CM_E_PACKAGE);
        cr_assert_str_eq(err.id, "CM-PKG-LENGTH");
    }
    uint8_t *longer = malloc(size + 1);
    memcpy(longer, bytes, size);
    longer[size] = 0;
    cr_assert_eq(open_changed(longer, size + 1, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-LENGTH");
    free(longer);
    size_t payload = size - segment * 3;
    uint8_t *work = malloc(size);
    memcpy(work, bytes, size); /* two segments swapped */
    memcpy(work + payload, bytes + payload + segment, segment);
    memcpy(work + payload + segment, bytes + payload, segment);
    cr_assert_eq(open_changed(work, size, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-HASH");
    cr_assert_not_null(strstr(err.text, "segment 0"));
    memcpy(work, bytes, size); /* a segment of another package */
    memcpy(work + payload + segment, other + payload + segment, segment);
    cr_assert_eq(open_changed(work, size, &err), CM_E_PACKAGE);
    cr_assert_not_null(strstr(err.text, "segment 1"));
    memcpy(work, bytes, size); /* head of one with the rest of the other */
    memcpy(work, other, CM_PACKAGE_HEAD_BYTES);
    cr_assert_eq(open_changed(work, size, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-MAC");
    memcpy(work, bytes, size); /* slots of another package */
    memcpy(work + 8192, other + 8192, 65536);
    cr_assert_eq(open_changed(work, size, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-SLOTS-MAC");
    memcpy(work, bytes, size); /* tag table and manifest of another */
    memcpy(work + CM_PACKAGE_HEAD_BYTES, other + CM_PACKAGE_HEAD_BYTES,
           payload - CM_PACKAGE_HEAD_BYTES);
    cr_assert_eq(open_changed(work, size, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-TABLE");
    free(work);
    free(bytes);
    free(other);
    sample_done(&sample);
}

Test(package, wrong_key_wrong_owner_and_wrong_node_are_refused)
{
    struct cm_error err;
    const struct cm_package_slot *slot;
    static struct cm_package_head head;
    uint8_t node[CM_DIGEST_BYTES] = {9};
    size_t size;
    sample_make(&sample, CM_SUITE_AES_256_GCM, 4096, "model.cmpkg");
    sample.key[0] ^= 1;
    cr_assert_eq(sample_open(&sample, sample.path, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-MAC");
    sample.key[0] ^= 1;
    sample.owner_key[1] ^= 1;
    cr_assert_eq(sample_open(&sample, sample.path, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-OWNER");
    sample.owner_key[1] ^= 1;
    cr_assert_eq(sample_open(&sample, sample.path, &err), CM_OK);
    uint8_t *bytes = file_load(sample.path, &size);
    cr_assert_eq(cm_package_head_parse(bytes, size, &head, &err), CM_OK);
    cr_assert_eq(cm_package_slot_select(&head, CM_SLOT_TPM, node, &slot, &err), CM_E_POLICY);
    cr_assert_not_null(strstr(err.text, "node-a, node-b"));
    node[0] = 2;
    cr_assert_eq(cm_package_slot_select(&head, CM_SLOT_TPM, node, &slot, &err), CM_OK);
    cr_assert_str_eq(slot->label, "node-b");
    free(bytes);
    sample_done(&sample);
}

/* Write slots_replace's bytes only up to `stop` writes of 512 bytes, as a crash would. */
Test(package, a_torn_slot_write_recovers_from_the_other_copy)
{
    struct cm_error err;
    static struct cm_package_head head;
    size_t size, changed_size;
    sample_make(&sample, CM_SUITE_AES_256_GCM, 4096, "model.cmpkg");
    uint8_t *before = file_load(sample.path, &size);
    int fd = open(sample.path, O_RDWR | O_CLOEXEC);
    cr_assert_eq(cm_package_slots_replace(fd, sample.key, sample.slots, 1, &err), CM_OK);
    close(fd);
    uint8_t *after = file_load(sample.path, &changed_size);
    cr_assert_eq(sample_open(&sample, sample.path, &err), CM_OK);
    uint8_t *torn = malloc(size);
    for (size_t order = 0; order < 2; order++) {
        size_t first = order == 0 ? CM_PACKAGE_SLOTS_B_OFFSET : CM_PACKAGE_SLOTS_A_OFFSET;
        memcpy(torn, order == 0 ? before : torn, size);
        for (size_t done = 0; done < CM_PACKAGE_SLOTS_BYTES; done += 512) {
            memcpy(torn + first + done, after + first + done, 512);
            cr_assert_eq(open_changed(torn, size, &err), CM_OK, "torn at %zu: %s", done, err.text);
            cr_assert_eq(cm_package_head_parse(torn, size, &head, &err), CM_OK);
            bool complete = order == 1 || done + 512 == CM_PACKAGE_SLOTS_BYTES;
            cr_assert_eq(head.slot_count, complete ? 1u : 2u);
            cr_assert(head.slots_torn || (order == 1 && done + 512 == CM_PACKAGE_SLOTS_BYTES));
        }
    }
    memset(torn + CM_PACKAGE_SLOTS_A_OFFSET + 100, 0xff, 1);
    memset(torn + CM_PACKAGE_SLOTS_B_OFFSET + 100, 0xff, 1);
    cr_assert_eq(open_changed(torn, size, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-SLOTS");
    free(torn);
    free(before);
    free(after);
    sample_done(&sample);
}

Test(package, a_full_disk_leaves_no_partial_file_and_the_old_package)
{
    struct cm_error err;
    struct cm_package_writer *writer;
    size_t size;
    sample_make(&sample, CM_SUITE_AES_256_GCM, 1u << 20, "model.cmpkg");
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {.rlim_cur = 600000, .rlim_max = RLIM_INFINITY};
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    struct cm_package_write_options options = {.path = sample.path,
                                               .suite = CM_SUITE_AES_256_GCM,
                                               .sign = sample_sign,
                                               .sign_context = sample.owner};
    memcpy(options.owner_key, sample.owner_key, CM_PUBLIC_KEY_BYTES);
    cr_assert_eq(
        cm_package_write_begin(&options, sample.key, &sample.manifest, 1u << 20, &writer, &err),
        CM_OK);
    enum cm_status status = cm_package_write_append(writer, sample.payload, 1u << 20, &err);
    cr_assert_eq(status, CM_E_SYSTEM);
    cr_assert_str_eq(err.id, "CM-PKG-WRITE");
    cm_package_write_abort(writer);
    char partial[128];
    snprintf(partial, sizeof(partial), "%s.partial", sample.path);
    cr_assert_neq(access(partial, F_OK), 0);
    limit.rlim_cur = RLIM_INFINITY;
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    cr_assert_eq(sample_open(&sample, sample.path, &err), CM_OK);
    free(file_load(sample.path, &size));
    sample_done(&sample);
}

Test(package, recovery_file_opens_with_its_passphrase_and_package_only)
{
    struct cm_error err;
    uint8_t digest[CM_DIGEST_BYTES] = {1}, found[CM_KEY_BYTES];
    char path[128];
    size_t size;
    sample_make(&sample, CM_SUITE_AES_256_GCM, 4096, "model.cmpkg");
    snprintf(path, sizeof(path), "%s/recovery", sample.folder);
    cr_assert_eq(cm_recovery_write(path, "correct horse", digest, sample.key, &err), CM_OK);
    cr_assert_eq(cm_recovery_read(path, "correct horse", digest, found, &err), CM_OK);
    cr_assert_eq(memcmp(found, sample.key, sizeof(found)), 0);
    cr_assert_eq(cm_recovery_read(path, "wrong horse", digest, found, &err), CM_E_PACKAGE);
    digest[0] = 2;
    cr_assert_eq(cm_recovery_read(path, "correct horse", digest, found, &err), CM_E_PACKAGE);
    digest[0] = 1;
    uint8_t *bytes = file_load(path, &size);
    const size_t flips[] = {0, 8, 16, 20, 24, 40, 60, 110, 140};
    for (size_t i = 0; i < sizeof(flips) / sizeof(flips[0]); i++) {
        bytes[flips[i]] ^= 1;
        file_save(path, bytes, size);
        cr_assert_eq(cm_recovery_read(path, "correct horse", digest, found, &err), CM_E_PACKAGE);
        bytes[flips[i]] ^= 1;
    }
    bytes[12] = 30; /* 2^30: would take 1 TiB; refused before scrypt runs */
    file_save(path, bytes, size);
    cr_assert_eq(cm_recovery_read(path, "correct horse", digest, found, &err), CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-RECOVERY");
    free(bytes);
    sample_done(&sample);
}

/* A package that comes as bytes: the same checks, into memory that was there before. */
Test(package, a_room_takes_what_fits_and_refuses_the_rest)
{
    struct cm_error err;
    struct cm_package *room = NULL;
    size_t size;
    sample_make(&sample, CM_SUITE_AES_256_GCM, CM_PACKAGE_SEGMENT_BYTES + 4096, "model.cmpkg");
    uint8_t *bytes = file_load(sample.path, &size);
    struct cm_adapter_owners owners = {.count = 2};
    memcpy(owners.each[1].package, sample.owner_key, CM_PUBLIC_KEY_BYTES);
    cr_assert_eq(cm_package_room(8192, 2, &room, &err), CM_OK);
    for (int round = 0; round < 2; round++) { /* once more in the same room */
        cr_assert_eq(cm_package_room_open(room, bytes, size, size, sample.key, &owners, &err),
                     CM_OK, "%s", err.text);
        const uint64_t offset = cm_package_head_of(room)->core.payload_offset;
        uint8_t *plain = malloc(sample.payload_bytes);
        for (uint64_t i = 0; i < 2; i++) {
            uint64_t at = i * CM_PACKAGE_SEGMENT_BYTES;
            cr_assert_eq(cm_package_segment_open(room, i, bytes + offset + at,
                                                 i == 0 ? CM_PACKAGE_SEGMENT_BYTES : 4096,
                                                 plain + at, &err),
                         CM_OK, "%s", err.text);
        }
        cr_assert_eq(memcmp(plain, sample.payload, sample.payload_bytes), 0);
        free(plain);
        cm_package_room_wipe(room);
        size_t manifest_bytes;
        const uint8_t *manifest = cm_package_manifest(room, &manifest_bytes);
        for (size_t i = 0; i < 8192; i++) {
            cr_assert_eq(manifest[i], 0);
        }
        cr_assert_eq(manifest_bytes, 0u);
    }
    const size_t front = CM_PACKAGE_HEAD_BYTES + 8192;
    for (size_t at = CM_PACKAGE_CORE_OFFSET; at < front; at += at < 4460 ? 1 : 37) {
        bytes[at] ^= 4;
        enum cm_status status =
            cm_package_room_open(room, bytes, size, size, sample.key, &owners, &err);
        bytes[at] ^= 4;
        cr_assert(status != CM_OK || flip_neutral(at), "byte %zu flipped and accepted", at);
    }
    cr_assert_neq(cm_package_room_open(room, bytes, size, size + 1, sample.key, &owners, &err),
                  CM_OK);
    cr_assert_neq(cm_package_room_open(room, bytes, CM_PACKAGE_HEAD_BYTES + 1, size, sample.key,
                                       &owners, &err),
                  CM_OK, "the front is cut");
    cr_assert_neq(cm_package_room_open(room, bytes, 100, size, sample.key, &owners, &err), CM_OK);
    owners.count = 1;
    cr_assert_eq(cm_package_room_open(room, bytes, size, size, sample.key, &owners, &err),
                 CM_E_POLICY);
    cr_assert_str_eq(err.id, "CM-PKG-OWNER");
    owners.count = 2;
    cm_package_close(room);
    cr_assert_eq(cm_package_room(8192, 1, &room, &err), CM_OK);
    cr_assert_eq(cm_package_room_open(room, bytes, size, size, sample.key, &owners, &err),
                 CM_E_PACKAGE, "one segment more than there is room for");
    cm_package_close(room);
    cr_assert_eq(cm_package_room(16, 2, &room, &err), CM_OK);
    cr_assert_eq(cm_package_room_open(room, bytes, size, size, sample.key, &owners, &err),
                 CM_E_PACKAGE, "a manifest larger than the room");
    cm_package_close(room);
    free(bytes);
    sample_done(&sample);
}
