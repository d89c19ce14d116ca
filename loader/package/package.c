/* An opened package: head, manifest and table authenticated; segments opened one by one. */
#include "loader/package/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

struct cm_package {
    struct cm_package_head head;
    struct cm_secret *data_keys; /* [shard_count][CM_AEAD_KEY_BYTES] */
    uint8_t *manifest;           /* own mapping: locked where possible, never dumped */
    size_t manifest_bytes, manifest_room;
    uint8_t *table;         /* [segment_count][48] */
    uint64_t segments_room; /* of a package that comes in parts */
};

enum cm_status cm_package_head_read(int fd, struct cm_package_head *ret_head, struct cm_error *err)
{
    struct stat facts;
    uint8_t *bytes = malloc(CM_PACKAGE_HEAD_BYTES);
    if (bytes == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "head of the package");
    }
    enum cm_status status = cm_read_exact(fd, bytes, CM_PACKAGE_HEAD_BYTES, 0, "head", err);
    if (status == CM_OK) {
        status = cm_package_head_parse(bytes, CM_PACKAGE_HEAD_BYTES, ret_head, err);
    }
    free(bytes);
    if (status != CM_OK) {
        return status;
    }
    if (fstat(fd, &facts) != 0) {
        return cm_error_errno(err, errno, "CM-PKG-READ", "size of the package");
    }
    if ((uint64_t)facts.st_size != ret_head->core.file_bytes) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-LENGTH",
                            "the file has %llu bytes, the header says %llu: copy it again",
                            (unsigned long long)facts.st_size,
                            (unsigned long long)ret_head->core.file_bytes);
    }
    return CM_OK;
}

/* A part that the signed header names by its SHA-256, and the zeros between it and the next 4 KiB
 * border. */
static enum cm_status part_check(const uint8_t *bytes, uint64_t offset, size_t size,
                                 const uint8_t *digest, const char *part, const char *id,
                                 struct cm_error *err)
{
    uint8_t found[CM_DIGEST_BYTES];
    enum cm_status status = cm_sha256(bytes, size, found, err);
    if (status == CM_OK && memcmp(found, digest, sizeof(found)) != 0) {
        status = cm_error_set(err, CM_E_PACKAGE, id,
                              "%s at offset %llu: SHA-256 is not the one in the core header", part,
                              (unsigned long long)offset);
    }
    return status;
}

static enum cm_status zeros_check(const uint8_t *bytes, uint64_t from, size_t size,
                                  const char *part, struct cm_error *err)
{
    for (size_t i = 0; i < size; i++) {
        if (bytes[i] != 0) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-RESERVED",
                                "%s at offset %llu: padding is not zero", part,
                                (unsigned long long)(from + i));
        }
    }
    return CM_OK;
}

static enum cm_status part_read(int fd, uint64_t offset, size_t size, const uint8_t *digest,
                                const char *part, const char *id, uint8_t *ret_bytes,
                                struct cm_error *err)
{
    uint8_t padding[CM_PACKAGE_ALIGN];
    size_t behind = (size_t)(cm_align_up(offset + size) - offset - size);
    enum cm_status status = cm_read_exact(fd, ret_bytes, size, offset, part, err);
    if (status == CM_OK) {
        status = part_check(ret_bytes, offset, size, digest, part, id, err);
    }
    if (status == CM_OK) {
        status = cm_read_exact(fd, padding, behind, offset + size, part, err);
    }
    return status == CM_OK ? zeros_check(padding, offset + size, behind, part, err) : status;
}

static enum cm_status table_load(struct cm_package *package, int fd, struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    size_t size = (size_t)core->segment_count * CM_PACKAGE_TABLE_ENTRY_BYTES;
    package->table = malloc(size);
    if (package->table == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tag table of %zu bytes", size);
    }
    return part_read(fd, core->table_offset, size, core->table_digest, "tag table", "CM-PKG-TABLE",
                     package->table, err);
}

/* The manifest's plaintext: never in a core file, in memory where that may be locked (beyond
 * RLIMIT_MEMLOCK it may fail: there is no swap then). */
static enum cm_status manifest_map(struct cm_package *package, size_t bytes, struct cm_error *err)
{
    uint8_t *plain = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (plain == MAP_FAILED) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "manifest of %zu bytes", bytes);
    }
    (void)madvise(plain, bytes, MADV_DONTDUMP);
    (void)mlock(plain, bytes);
    package->manifest = plain;
    package->manifest_room = bytes;
    return CM_OK;
}

/* `sealed` has passed its digest. */
static enum cm_status manifest_open(struct cm_package *package, const uint8_t *sealed,
                                    const uint8_t *key, struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    size_t bytes = (size_t)core->manifest_bytes - CM_AEAD_TAG_BYTES;
    uint8_t manifest_key[CM_AEAD_KEY_BYTES] = {0};
    enum cm_status status = cm_key_derive(key, core->salt, core->suite, CM_PURPOSE_MANIFEST, 0,
                                          manifest_key, sizeof(manifest_key), err);
    if (status == CM_OK) {
        status = cm_aead_open(core->suite, manifest_key, 0, sealed, bytes, sealed + bytes,
                              package->manifest, err);
    }
    cm_wipe(manifest_key, sizeof(manifest_key));
    package->manifest_bytes = status == CM_OK ? bytes : 0;
    return status;
}

static enum cm_status manifest_load(struct cm_package *package, int fd, const uint8_t *key,
                                    struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    size_t sealed_bytes = (size_t)core->manifest_bytes;
    uint8_t *sealed = malloc(sealed_bytes);
    if (sealed == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "manifest of %zu bytes", sealed_bytes);
    }
    enum cm_status status = manifest_map(package, sealed_bytes - CM_AEAD_TAG_BYTES, err);
    if (status == CM_OK) {
        status = part_read(fd, core->manifest_offset, sealed_bytes, core->manifest_digest,
                           "manifest", "CM-PKG-MANIFEST", sealed, err);
    }
    if (status == CM_OK) {
        status = manifest_open(package, sealed, key, err);
    }
    free(sealed);
    return status;
}

static enum cm_status data_keys_derive(struct cm_package *package, const uint8_t *key,
                                       struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    enum cm_status status = CM_OK;
    for (uint32_t shard = 0; status == CM_OK && shard < core->shard_count; shard++) {
        status = cm_key_derive(key, core->salt, core->suite, CM_PURPOSE_DATA, shard,
                               cm_secret_bytes(package->data_keys) + shard * CM_AEAD_KEY_BYTES,
                               CM_AEAD_KEY_BYTES, err);
    }
    return status;
}

enum cm_status cm_package_open(int fd, const uint8_t key[static CM_KEY_BYTES],
                               const uint8_t owner_key[static CM_PUBLIC_KEY_BYTES],
                               struct cm_package **ret_package, struct cm_error *err)
{
    struct cm_package *package = calloc(1, sizeof(*package));
    if (package == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "package");
    }
    enum cm_status status = cm_package_head_read(fd, &package->head, err);
    if (status == CM_OK) {
        status = cm_package_head_authenticate(&package->head, key, owner_key, err);
    }
    if (status == CM_OK) {
        status = table_load(package, fd, err);
    }
    if (status == CM_OK) {
        status = manifest_load(package, fd, key, err);
    }
    if (status == CM_OK) {
        status = cm_secret_new((size_t)package->head.core.shard_count * CM_AEAD_KEY_BYTES,
                               &package->data_keys, err);
    }
    if (status == CM_OK) {
        status = data_keys_derive(package, key, err);
    }
    if (status != CM_OK) {
        cm_package_close(package);
        return status;
    }
    *ret_package = package;
    return CM_OK;
}

enum cm_status cm_package_room(size_t manifest_bytes, uint64_t segments,
                               struct cm_package **ret_package, struct cm_error *err)
{
    struct cm_package *package = calloc(1, sizeof(*package));
    if (package == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "package");
    }
    const size_t table_bytes = (size_t)segments * CM_PACKAGE_TABLE_ENTRY_BYTES;
    package->segments_room = segments;
    package->table = malloc(table_bytes);
    enum cm_status status = manifest_map(package, manifest_bytes, err);
    if (status == CM_OK && package->table == NULL) {
        status =
            cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tag table of %zu bytes", table_bytes);
    }
    if (status == CM_OK) {
        status = cm_secret_new(CM_AEAD_KEY_BYTES, &package->data_keys, err);
    }
    if (status != CM_OK) {
        cm_package_close(package);
        return status;
    }
    /* Touched now, so that it is there later. */
    explicit_bzero(package->manifest, manifest_bytes);
    explicit_bzero(package->table, table_bytes);
    *ret_package = package;
    return CM_OK;
}

/* Does it fit into the room, and is all before the payload there? */
static enum cm_status front_fits(const struct cm_package *package, size_t size, uint64_t file_bytes,
                                 struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    if (core->file_bytes != file_bytes) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-LENGTH",
                            "the file has %llu bytes, the header says %llu: copy it again",
                            (unsigned long long)file_bytes, (unsigned long long)core->file_bytes);
    }
    if (core->shard_count != 1 || core->segment_count > package->segments_room ||
        core->manifest_bytes - CM_AEAD_TAG_BYTES > package->manifest_room ||
        core->payload_offset > size) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-ROOM",
                            "manifest of %llu bytes and %llu segments: there is room for %zu and "
                            "%llu (adapter_bytes_max)",
                            (unsigned long long)core->manifest_bytes,
                            (unsigned long long)core->segment_count, package->manifest_room,
                            (unsigned long long)package->segments_room);
    }
    return CM_OK;
}

static enum cm_status front_part(const uint8_t *front, uint64_t offset, size_t size,
                                 const uint8_t *digest, const char *part, const char *id,
                                 struct cm_error *err)
{
    const uint64_t end = offset + size;
    enum cm_status status = part_check(front + offset, offset, size, digest, part, id, err);
    return status == CM_OK
               ? zeros_check(front + end, end, (size_t)(cm_align_up(end) - end), part, err)
               : status;
}

enum cm_status cm_package_room_open(struct cm_package *package, const uint8_t *front, size_t size,
                                    uint64_t file_bytes, const uint8_t key[static CM_KEY_BYTES],
                                    const struct cm_adapter_owners *owners, struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    const struct cm_adapter_owner *owner = NULL;
    enum cm_status status =
        size < CM_PACKAGE_HEAD_BYTES
            ? cm_error_set(err, CM_E_PACKAGE, "CM-PKG-SHORT", "%zu bytes: no package", size)
            : cm_package_head_parse(front, CM_PACKAGE_HEAD_BYTES, &package->head, err);
    if (status == CM_OK) {
        status = cm_package_owner_find(&package->head, owners, &owner, err);
    }
    if (status == CM_OK) {
        status = cm_package_head_authenticate(&package->head, key, owner->package, err);
    }
    if (status == CM_OK) {
        status = front_fits(package, size, file_bytes, err);
    }
    if (status == CM_OK) {
        size_t bytes = (size_t)core->segment_count * CM_PACKAGE_TABLE_ENTRY_BYTES;
        status = front_part(front, core->table_offset, bytes, core->table_digest, "tag table",
                            "CM-PKG-TABLE", err);
        memcpy(package->table, front + core->table_offset, status == CM_OK ? bytes : 0);
    }
    if (status == CM_OK) {
        status = front_part(front, core->manifest_offset, (size_t)core->manifest_bytes,
                            core->manifest_digest, "manifest", "CM-PKG-MANIFEST", err);
    }
    if (status == CM_OK) {
        status = manifest_open(package, front + core->manifest_offset, key, err);
    }
    if (status == CM_OK) {
        status = data_keys_derive(package, key, err);
    }
    if (status != CM_OK) {
        cm_package_room_wipe(package);
    }
    return status;
}

void cm_package_room_wipe(struct cm_package *package)
{
    cm_wipe(package->manifest, package->manifest_room);
    cm_wipe(cm_secret_bytes(package->data_keys), CM_AEAD_KEY_BYTES);
    cm_wipe(package->table, (size_t)package->segments_room * CM_PACKAGE_TABLE_ENTRY_BYTES);
    memset(&package->head, 0, sizeof(package->head));
    package->manifest_bytes = 0;
}

void cm_package_close(struct cm_package *package)
{
    if (package == NULL) {
        return;
    }
    if (package->manifest != NULL) {
        cm_wipe(package->manifest, package->manifest_room);
        munmap(package->manifest, package->manifest_room);
    }
    cm_secret_free(package->data_keys);
    free(package->table);
    free(package);
}

const struct cm_package_head *cm_package_head_of(const struct cm_package *package)
{
    return &package->head;
}

const uint8_t *cm_package_manifest(const struct cm_package *package, size_t *ret_bytes)
{
    *ret_bytes = package->manifest_bytes;
    return package->manifest;
}

void cm_package_segment_place(const struct cm_package *package, uint64_t index,
                              uint64_t *ret_offset, size_t *ret_bytes)
{
    const struct cm_package_core *core = &package->head.core;
    CM_ASSERT(index < core->segment_count);
    uint64_t start = index * core->segment_bytes;
    uint64_t left = core->payload_bytes - start;
    *ret_offset = core->payload_offset + start;
    *ret_bytes = (size_t)(left < core->segment_bytes ? left : core->segment_bytes);
}

/* Put the segment's place before the text on the way up. */
static enum cm_status segment_refused(const struct cm_package *package, uint64_t index,
                                      enum cm_status status, struct cm_error *err)
{
    uint64_t offset;
    size_t bytes;
    cm_package_segment_place(package, index, &offset, &bytes);
    return status != CM_OK && err != NULL
               ? cm_error_wrap(err, "payload segment %llu at offset %llu",
                               (unsigned long long)index, (unsigned long long)offset)
               : status;
}

static const uint8_t *table_entry(const struct cm_package *package, uint64_t index, size_t bytes)
{
    uint64_t offset;
    size_t expected;
    cm_package_segment_place(package, index, &offset, &expected);
    CM_ASSERT(bytes == expected);
    return package->table + index * CM_PACKAGE_TABLE_ENTRY_BYTES;
}

static enum cm_status digest_check(const struct cm_package *package, uint64_t index, size_t bytes,
                                   const uint8_t found[static CM_DIGEST_BYTES],
                                   struct cm_error *err)
{
    enum cm_status status = CM_OK;
    const uint8_t *wanted = table_entry(package, index, bytes) + CM_AEAD_TAG_BYTES;
    if (memcmp(found, wanted, CM_DIGEST_BYTES) != 0) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-PKG-HASH",
                              "SHA-256 is not the one in the table: copy the package again");
    }
    return segment_refused(package, index, status, err);
}

/* Lanes cost the same whether all are used or not: below this fewer at once are faster. */
#define LANES_LEAST 8u

/* How many of `whole` segments to hash at once. */
static uint64_t side_by_side(uint64_t whole)
{
    if (whole >= LANES_LEAST && cm_sha256_lanes_available()) {
        return whole < CM_SHA256_LANES ? whole : CM_SHA256_LANES;
    }
    return whole >= CM_SHA256_PAIR && cm_sha256_pair_available() ? CM_SHA256_PAIR : 1;
}

/* `count` whole segments side by side; lanes that are left over hash the first one again. */
static enum cm_status many_verify(const struct cm_package *package, uint64_t first, uint64_t count,
                                  const uint8_t *ciphertext, struct cm_error *err)
{
    const uint8_t *lanes[CM_SHA256_LANES];
    uint8_t found[CM_SHA256_LANES][CM_DIGEST_BYTES];
    enum cm_status status = CM_OK;
    for (uint64_t i = 0; i < CM_SHA256_LANES; i++) {
        lanes[i] = ciphertext + (i < count ? i : 0) * CM_PACKAGE_SEGMENT_BYTES;
    }
    if (count == CM_SHA256_PAIR) {
        cm_sha256_pair(lanes, CM_PACKAGE_SEGMENT_BYTES, found);
    } else {
        cm_sha256_lanes(lanes, CM_PACKAGE_SEGMENT_BYTES, found);
    }
    for (uint64_t i = 0; status == CM_OK && i < count; i++) {
        status = digest_check(package, first + i, CM_PACKAGE_SEGMENT_BYTES, found[i], err);
    }
    return status;
}

enum cm_status cm_package_segments_verify(const struct cm_package *package, uint64_t first,
                                          uint64_t count, const uint8_t *ciphertext,
                                          struct cm_error *err)
{
    enum cm_status status = CM_OK;
    for (uint64_t i = 0; status == CM_OK && i < count;) {
        uint8_t found[CM_DIGEST_BYTES];
        const uint8_t *at = ciphertext + i * CM_PACKAGE_SEGMENT_BYTES;
        uint64_t offset;
        size_t bytes;
        cm_package_segment_place(package, first + count - 1, &offset, &bytes);
        uint64_t whole = count - i - (bytes < CM_PACKAGE_SEGMENT_BYTES);
        const uint64_t take = side_by_side(whole);
        if (take > 1) {
            status = many_verify(package, first + i, take, at, err);
            i += take;
            continue;
        }
        cm_package_segment_place(package, first + i, &offset, &bytes);
        status = cm_sha256(at, bytes, found, err);
        if (status == CM_OK) {
            status = digest_check(package, first + i, bytes, found, err);
        }
        i++;
    }
    return status;
}

enum cm_status cm_package_segment_decrypt(const struct cm_package *package, uint64_t index,
                                          const uint8_t *ciphertext, size_t bytes,
                                          uint8_t *plaintext, struct cm_error *err)
{
    const uint64_t per_shard = CM_SHARD_BYTES / CM_PACKAGE_SEGMENT_BYTES;
    const uint8_t *entry = table_entry(package, index, bytes);
    const uint8_t *key = cm_secret_view(package->data_keys) + index / per_shard * CM_AEAD_KEY_BYTES;
    enum cm_status status = cm_aead_open(package->head.core.suite, key, index % per_shard,
                                         ciphertext, bytes, entry, plaintext, err);
    return segment_refused(package, index, status, err);
}

enum cm_status cm_package_segment_open(const struct cm_package *package, uint64_t index,
                                       const uint8_t *ciphertext, size_t bytes, uint8_t *plaintext,
                                       struct cm_error *err)
{
    enum cm_status status = cm_package_segments_verify(package, index, 1, ciphertext, err);
    if (status != CM_OK) {
        cm_wipe(plaintext, bytes);
        return status;
    }
    return cm_package_segment_decrypt(package, index, ciphertext, bytes, plaintext, err);
}
