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
    size_t manifest_bytes;
    uint8_t *table; /* [segment_count][48] */
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

/* Read a part, compare its SHA-256 with what the signed header says. */
static enum cm_status part_read(int fd, uint64_t offset, size_t size, const uint8_t *digest,
                                const char *part, const char *id, uint8_t *ret_bytes,
                                struct cm_error *err)
{
    uint8_t found[CM_DIGEST_BYTES];
    enum cm_status status = cm_read_exact(fd, ret_bytes, size, offset, part, err);
    if (status == CM_OK) {
        status = cm_sha256(ret_bytes, size, found, err);
    }
    if (status == CM_OK && memcmp(found, digest, sizeof(found)) != 0) {
        status = cm_error_set(err, CM_E_PACKAGE, id,
                              "%s at offset %llu: SHA-256 is not the one in the core header", part,
                              (unsigned long long)offset);
    }
    return status;
}

/* The zeros between a part and the next 4 KiB border. */
static enum cm_status padding_check(int fd, uint64_t from, const char *part, struct cm_error *err)
{
    uint8_t bytes[CM_PACKAGE_ALIGN];
    size_t size = (size_t)(cm_align_up(from) - from);
    enum cm_status status = cm_read_exact(fd, bytes, size, from, part, err);
    for (size_t i = 0; status == CM_OK && i < size; i++) {
        if (bytes[i] != 0) {
            status = cm_error_set(err, CM_E_PACKAGE, "CM-PKG-RESERVED",
                                  "%s at offset %llu: padding is not zero", part,
                                  (unsigned long long)(from + i));
        }
    }
    return status;
}

static enum cm_status table_load(struct cm_package *package, int fd, struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    size_t size = (size_t)core->segment_count * CM_PACKAGE_TABLE_ENTRY_BYTES;
    package->table = malloc(size);
    if (package->table == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tag table of %zu bytes", size);
    }
    enum cm_status status = part_read(fd, core->table_offset, size, core->table_digest, "tag table",
                                      "CM-PKG-TABLE", package->table, err);
    return status == CM_OK ? padding_check(fd, core->table_offset + size, "tag table", err)
                           : status;
}

static enum cm_status manifest_load(struct cm_package *package, int fd, const uint8_t *key,
                                    struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    size_t sealed_bytes = (size_t)core->manifest_bytes;
    size_t bytes = sealed_bytes - CM_AEAD_TAG_BYTES;
    uint8_t manifest_key[CM_AEAD_KEY_BYTES] = {0};
    uint8_t *sealed = malloc(sealed_bytes);
    uint8_t *plain = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    enum cm_status status;
    if (sealed == NULL || plain == MAP_FAILED) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "manifest of %zu bytes", bytes);
        goto out;
    }
    (void)madvise(plain, bytes, MADV_DONTDUMP);
    (void)mlock(plain, bytes); /* beyond RLIMIT_MEMLOCK it may fail: there is no swap then */
    status = part_read(fd, core->manifest_offset, sealed_bytes, core->manifest_digest, "manifest",
                       "CM-PKG-MANIFEST", sealed, err);
    if (status == CM_OK) {
        status = padding_check(fd, core->manifest_offset + sealed_bytes, "manifest", err);
    }
    if (status == CM_OK) {
        status = cm_key_derive(key, core->salt, core->suite, CM_PURPOSE_MANIFEST, 0, manifest_key,
                               sizeof(manifest_key), err);
    }
    if (status == CM_OK) {
        status =
            cm_aead_open(core->suite, manifest_key, 0, sealed, bytes, sealed + bytes, plain, err);
    }
    if (status == CM_OK) {
        package->manifest = plain;
        package->manifest_bytes = bytes;
        plain = MAP_FAILED;
    }
out:
    cm_wipe(manifest_key, sizeof(manifest_key));
    free(sealed);
    if (plain != MAP_FAILED) {
        cm_wipe(plain, bytes);
        munmap(plain, bytes);
    }
    return status;
}

static enum cm_status data_keys_derive(struct cm_package *package, const uint8_t *key,
                                       struct cm_error *err)
{
    const struct cm_package_core *core = &package->head.core;
    enum cm_status status =
        cm_secret_new((size_t)core->shard_count * CM_AEAD_KEY_BYTES, &package->data_keys, err);
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
        status = data_keys_derive(package, key, err);
    }
    if (status != CM_OK) {
        cm_package_close(package);
        return status;
    }
    *ret_package = package;
    return CM_OK;
}

void cm_package_close(struct cm_package *package)
{
    if (package == NULL) {
        return;
    }
    if (package->manifest != NULL) {
        cm_wipe(package->manifest, package->manifest_bytes);
        munmap(package->manifest, package->manifest_bytes);
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

/* Lanes cost the same whether all are used or not: below this one message after the other is
 * faster (2.0 against 4.3 GB/s over 16). */
#define LANES_LEAST 8u

/* `count` whole segments side by side; lanes that are left over hash the first one again. */
static enum cm_status lanes_verify(const struct cm_package *package, uint64_t first, uint64_t count,
                                   const uint8_t *ciphertext, struct cm_error *err)
{
    const uint8_t *lanes[CM_SHA256_LANES];
    uint8_t found[CM_SHA256_LANES][CM_DIGEST_BYTES];
    enum cm_status status = CM_OK;
    for (uint64_t i = 0; i < CM_SHA256_LANES; i++) {
        lanes[i] = ciphertext + (i < count ? i : 0) * CM_PACKAGE_SEGMENT_BYTES;
    }
    cm_sha256_lanes(lanes, CM_PACKAGE_SEGMENT_BYTES, found);
    for (uint64_t i = 0; status == CM_OK && i < count; i++) {
        status = digest_check(package, first + i, CM_PACKAGE_SEGMENT_BYTES, found[i], err);
    }
    return status;
}

enum cm_status cm_package_segments_verify(const struct cm_package *package, uint64_t first,
                                          uint64_t count, const uint8_t *ciphertext,
                                          struct cm_error *err)
{
    const bool lanes = cm_sha256_lanes_available();
    enum cm_status status = CM_OK;
    for (uint64_t i = 0; status == CM_OK && i < count;) {
        uint8_t found[CM_DIGEST_BYTES];
        const uint8_t *at = ciphertext + i * CM_PACKAGE_SEGMENT_BYTES;
        uint64_t offset;
        size_t bytes;
        cm_package_segment_place(package, first + count - 1, &offset, &bytes);
        uint64_t whole = count - i - (bytes < CM_PACKAGE_SEGMENT_BYTES);
        if (lanes && whole >= LANES_LEAST) {
            uint64_t take = whole < CM_SHA256_LANES ? whole : CM_SHA256_LANES;
            status = lanes_verify(package, first + i, take, at, err);
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
