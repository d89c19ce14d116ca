/* Writing packages: streamed and atomic; replacing slots so that a torn write loses nothing. */
#include "loader/package/write.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <openssl/rand.h>

#include "loader/package/internal.h"
#include "runtime/base/cursor.h"

struct cm_package_writer {
    struct cm_package_write_options options;
    struct cm_package_slot slots[CM_PACKAGE_SLOTS_MAX];
    char path[4096];
    char partial[4096 + 16];
    int fd;
    struct cm_package_core core;
    struct cm_secret *key;
    uint8_t data_key[CM_AEAD_KEY_BYTES]; /* of shard `data_key_shard` */
    uint32_t data_key_shard;
    struct cm_secret *staging; /* plaintext of the segment being filled: segment_bytes */
    size_t staged;
    uint8_t *ciphertext; /* [segment_bytes] */
    uint8_t *table;
    uint64_t segment; /* next */
};

enum cm_status cm_write_exact(int fd, const void *bytes, size_t size, uint64_t offset,
                              const char *part, struct cm_error *err)
{
    size_t done = 0;
    while (done < size) {
        ssize_t put =
            pwrite(fd, (const uint8_t *)bytes + done, size - done, (off_t)(offset + done));
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            return cm_error_errno(err, put < 0 ? errno : ENOSPC, "CM-PKG-WRITE",
                                  "%s: %zu of %zu bytes written at offset %llu", part, done, size,
                                  (unsigned long long)offset);
        }
        done += (size_t)put;
    }
    return CM_OK;
}

static void core_encode(const struct cm_package_core *core, uint8_t bytes[CM_PACKAGE_CORE_BYTES])
{
    struct cm_writer writer = cm_writer_init(bytes, CM_PACKAGE_CORE_BYTES);
    cm_writer_bytes(&writer, "CMCORE\0", 8);
    cm_writer_u32(&writer, core->format_version);
    cm_writer_u32(&writer, core->suite);
    cm_writer_u32(&writer, core->segment_bytes);
    cm_writer_u32(&writer, core->shard_count);
    cm_writer_u64(&writer, core->revision);
    cm_writer_u32(&writer, core->host_version_min);
    cm_writer_u32(&writer, 0);
    cm_writer_bytes(&writer, core->salt, sizeof(core->salt));
    cm_writer_u64(&writer, core->manifest_offset);
    cm_writer_u64(&writer, core->manifest_bytes);
    cm_writer_u64(&writer, core->table_offset);
    cm_writer_u64(&writer, core->segment_count);
    cm_writer_u64(&writer, core->payload_offset);
    cm_writer_u64(&writer, core->payload_bytes);
    cm_writer_u64(&writer, core->file_bytes);
    cm_writer_bytes(&writer, core->manifest_digest, CM_DIGEST_BYTES);
    cm_writer_bytes(&writer, core->table_digest, CM_DIGEST_BYTES);
    cm_writer_bytes(&writer, core->owner_key + 1, CM_PUBLIC_KEY_BYTES - 1);
    CM_ASSERT(!writer.failed && writer.offset == CM_CORE_SIGNED_BYTES);
    cm_writer_bytes(&writer, core->signature, sizeof(core->signature));
    cm_writer_bytes(&writer, core->header_mac, sizeof(core->header_mac));
}

enum cm_status cm_slots_encode(const uint8_t key[static CM_KEY_BYTES],
                               const struct cm_package_core *core, uint64_t generation,
                               const struct cm_package_slot *slots, uint32_t slot_count,
                               uint8_t *ret_bytes, struct cm_error *err)
{
    uint8_t digest[CM_DIGEST_BYTES];
    CM_ASSERT(slot_count <= CM_PACKAGE_SLOTS_MAX);
    memset(ret_bytes, 0, CM_PACKAGE_SLOTS_BYTES);
    struct cm_writer writer = cm_writer_init(ret_bytes, CM_PACKAGE_SLOTS_BYTES);
    cm_writer_bytes(&writer, "CMSLOTS", 8);
    cm_writer_u64(&writer, generation);
    cm_writer_u32(&writer, slot_count);
    cm_writer_u32(&writer, 0);
    for (uint32_t i = 0; i < slot_count; i++) {
        size_t start = writer.offset;
        CM_ASSERT(slots[i].payload_bytes <= CM_PACKAGE_SLOT_PAYLOAD_MAX);
        cm_writer_u32(&writer, slots[i].kind);
        cm_writer_u32(&writer, slots[i].payload_bytes);
        cm_writer_bytes(&writer, slots[i].label, sizeof(slots[i].label));
        cm_writer_bytes(&writer, slots[i].node, sizeof(slots[i].node));
        cm_writer_bytes(&writer, slots[i].payload, slots[i].payload_bytes);
        writer.offset = start + CM_SLOT_BYTES;
    }
    CM_ASSERT(!writer.failed && writer.offset <= CM_SLOTS_MAC_OFFSET);
    enum cm_status status = cm_sha256(ret_bytes, CM_SLOTS_MAC_OFFSET, digest, err);
    if (status == CM_OK) {
        status = cm_slots_mac(key, core, digest, ret_bytes + CM_SLOTS_MAC_OFFSET, err);
    }
    if (status == CM_OK) {
        status = cm_sha256(ret_bytes, CM_SLOTS_SUM_OFFSET, ret_bytes + CM_SLOTS_SUM_OFFSET, err);
    }
    return status;
}

static void writer_free(struct cm_package_writer *writer)
{
    if (writer->fd >= 0) {
        close(writer->fd);
    }
    cm_secret_free(writer->key);
    cm_secret_free(writer->staging);
    cm_wipe(writer->data_key, sizeof(writer->data_key));
    free(writer->ciphertext);
    free(writer->table);
    free(writer);
}

void cm_package_write_abort(struct cm_package_writer *writer)
{
    if (writer != NULL) {
        if (writer->fd >= 0) {
            unlink(writer->partial);
        }
        writer_free(writer);
    }
}

static enum cm_status core_plan(struct cm_package_core *core,
                                const struct cm_package_write_options *options,
                                size_t manifest_bytes, uint64_t payload_bytes, struct cm_error *err)
{
    *core = (struct cm_package_core){.format_version = CM_FORMAT_VERSION,
                                     .suite = options->suite,
                                     .segment_bytes = CM_PACKAGE_SEGMENT_BYTES,
                                     .revision = options->revision,
                                     .host_version_min = options->host_version_min,
                                     .manifest_offset = CM_PACKAGE_HEAD_BYTES,
                                     .manifest_bytes = manifest_bytes + CM_AEAD_TAG_BYTES,
                                     .payload_bytes = payload_bytes};
    memcpy(core->owner_key, options->owner_key, CM_PUBLIC_KEY_BYTES);
    core->segment_count = (payload_bytes + CM_PACKAGE_SEGMENT_BYTES - 1) / CM_PACKAGE_SEGMENT_BYTES;
    core->shard_count = (uint32_t)((payload_bytes + CM_SHARD_BYTES - 1) / CM_SHARD_BYTES);
    core->table_offset = cm_align_up(core->manifest_offset + core->manifest_bytes);
    core->payload_offset =
        cm_align_up(core->table_offset + core->segment_count * CM_PACKAGE_TABLE_ENTRY_BYTES);
    core->file_bytes = core->payload_offset + payload_bytes;
    if (RAND_bytes(core->salt, sizeof(core->salt)) != 1) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-RANDOM", "no random bytes for the salt");
    }
    return CM_OK;
}

/* What a writer seals is what a reader takes. */
static enum cm_status manifest_check(const uint8_t *bytes, size_t size, uint64_t payload_bytes,
                                     struct cm_error *err)
{
    struct cm_manifest model;
    struct cm_manifest_adapter adapter;
    if (!cm_manifest_is_adapter(bytes, size)) {
        enum cm_status status = cm_manifest_parse(bytes, size, payload_bytes, &model, err);
        if (status == CM_OK) {
            cm_manifest_done(&model);
        }
        return status;
    }
    struct cm_manifest_tensor *tensors = calloc(CM_MANIFEST_ADAPTER_TENSORS_MAX, sizeof(*tensors));
    if (tensors == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tensors");
    }
    enum cm_status status = cm_manifest_adapter_parse(
        bytes, size, payload_bytes, tensors, CM_MANIFEST_ADAPTER_TENSORS_MAX, &adapter, err);
    free(tensors);
    return status;
}

/* Seal the manifest into its place; its digest goes into the core header. */
static enum cm_status manifest_write(struct cm_package_writer *writer, const uint8_t *plain,
                                     size_t bytes, uint64_t payload_bytes, struct cm_error *err)
{
    uint8_t *sealed = NULL;
    uint8_t key[CM_AEAD_KEY_BYTES] = {0};
    enum cm_status status = manifest_check(plain, bytes, payload_bytes, err);
    if (status == CM_OK) {
        status = core_plan(&writer->core, &writer->options, bytes, payload_bytes, err);
    }
    struct cm_package_core *core = &writer->core;
    if (status == CM_OK) {
        sealed = malloc(bytes + CM_AEAD_TAG_BYTES);
        status = sealed != NULL
                     ? cm_key_derive(cm_secret_view(writer->key), core->salt, core->suite,
                                     CM_PURPOSE_MANIFEST, 0, key, sizeof(key), err)
                     : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "manifest of %zu bytes", bytes);
    }
    if (status == CM_OK) {
        status = cm_aead_seal(core->suite, key, 0, plain, bytes, sealed, sealed + bytes, err);
    }
    if (status == CM_OK) {
        status = cm_sha256(sealed, bytes + CM_AEAD_TAG_BYTES, core->manifest_digest, err);
    }
    if (status == CM_OK) {
        status = cm_write_exact(writer->fd, sealed, bytes + CM_AEAD_TAG_BYTES,
                                core->manifest_offset, "manifest", err);
    }
    cm_wipe(key, sizeof(key));
    free(sealed);
    return status;
}

static enum cm_status writer_allocate(struct cm_package_writer *writer, const uint8_t *key,
                                      struct cm_error *err)
{
    enum cm_status status = cm_secret_new(CM_KEY_BYTES, &writer->key, err);
    if (status == CM_OK) {
        memcpy(cm_secret_bytes(writer->key), key, CM_KEY_BYTES);
        status = cm_secret_new(CM_PACKAGE_SEGMENT_BYTES, &writer->staging, err);
    }
    writer->ciphertext = malloc(CM_PACKAGE_SEGMENT_BYTES);
    if (status == CM_OK && writer->ciphertext == NULL) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "package writer");
    }
    return status;
}

static enum cm_status partial_open(struct cm_package_writer *writer, struct cm_error *err)
{
    int fd = open(writer->partial, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-PKG-CREATE",
                              "cannot create %s (left over from a killed run? remove it)",
                              writer->partial);
    }
    writer->fd = fd;
    return CM_OK;
}

static enum cm_status write_begin(const struct cm_package_write_options *options,
                                  const uint8_t key[static CM_KEY_BYTES], const uint8_t *manifest,
                                  size_t manifest_bytes, uint64_t payload_bytes,
                                  struct cm_package_writer **ret_writer, struct cm_error *err)
{
    if (payload_bytes == 0 ||
        payload_bytes > CM_PACKAGE_SEGMENTS_MAX * (uint64_t)CM_PACKAGE_SEGMENT_BYTES ||
        options->slot_count > CM_PACKAGE_SLOTS_MAX || strlen(options->path) >= 4096 ||
        (options->suite != CM_SUITE_AES_256_GCM && options->suite != CM_SUITE_CHACHA20_POLY1305)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-CORE",
                            "payload of %llu bytes, %u slots, suite %u: out of bounds",
                            (unsigned long long)payload_bytes, options->slot_count, options->suite);
    }
    struct cm_package_writer *writer = calloc(1, sizeof(*writer));
    if (writer == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "package writer");
    }
    writer->fd = -1;
    writer->data_key_shard = UINT32_MAX;
    writer->options = *options;
    if (options->slot_count > 0) {
        memcpy(writer->slots, options->slots, options->slot_count * sizeof(writer->slots[0]));
    }
    writer->options.slots = writer->slots;
    snprintf(writer->path, sizeof(writer->path), "%s", options->path);
    snprintf(writer->partial, sizeof(writer->partial), "%s.partial", options->path);
    enum cm_status status = writer_allocate(writer, key, err);
    if (status == CM_OK) {
        status = partial_open(writer, err);
    }
    if (status == CM_OK) {
        status = manifest_write(writer, manifest, manifest_bytes, payload_bytes, err);
    }
    if (status == CM_OK) {
        writer->table = calloc(writer->core.segment_count, CM_PACKAGE_TABLE_ENTRY_BYTES);
        if (writer->table == NULL) {
            status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tag table");
        }
    }
    if (status != CM_OK) {
        cm_package_write_abort(writer);
        return status;
    }
    *ret_writer = writer;
    return CM_OK;
}

enum cm_status cm_package_write_begin(const struct cm_package_write_options *options,
                                      const uint8_t key[static CM_KEY_BYTES],
                                      const struct cm_manifest *manifest, uint64_t payload_bytes,
                                      struct cm_package_writer **ret_writer, struct cm_error *err)
{
    uint8_t *bytes;
    size_t size;
    enum cm_status status = cm_manifest_encode(manifest, &bytes, &size, err);
    if (status == CM_OK) {
        status = write_begin(options, key, bytes, size, payload_bytes, ret_writer, err);
        cm_wipe(bytes, size);
        free(bytes);
    }
    return status;
}

enum cm_status cm_package_write_begin_adapter(const struct cm_package_write_options *options,
                                              const uint8_t key[static CM_KEY_BYTES],
                                              const struct cm_manifest_adapter *adapter,
                                              uint64_t payload_bytes,
                                              struct cm_package_writer **ret_writer,
                                              struct cm_error *err)
{
    uint8_t *bytes;
    size_t size;
    enum cm_status status = cm_manifest_adapter_encode(adapter, &bytes, &size, err);
    if (status == CM_OK) {
        status = write_begin(options, key, bytes, size, payload_bytes, ret_writer, err);
        cm_wipe(bytes, size);
        free(bytes);
    }
    return status;
}

static enum cm_status segment_flush(struct cm_package_writer *writer, struct cm_error *err)
{
    const struct cm_package_core *core = &writer->core;
    const uint64_t per_shard = CM_SHARD_BYTES / CM_PACKAGE_SEGMENT_BYTES;
    uint32_t shard = (uint32_t)(writer->segment / per_shard);
    uint8_t *entry = writer->table + writer->segment * CM_PACKAGE_TABLE_ENTRY_BYTES;
    enum cm_status status = CM_OK;
    if (shard != writer->data_key_shard) {
        status =
            cm_key_derive(cm_secret_view(writer->key), core->salt, core->suite, CM_PURPOSE_DATA,
                          shard, writer->data_key, sizeof(writer->data_key), err);
        writer->data_key_shard = shard;
    }
    if (status == CM_OK) {
        status = cm_aead_seal(core->suite, writer->data_key, writer->segment % per_shard,
                              cm_secret_view(writer->staging), writer->staged, writer->ciphertext,
                              entry, err);
    }
    if (status == CM_OK) {
        status = cm_sha256(writer->ciphertext, writer->staged, entry + CM_AEAD_TAG_BYTES, err);
    }
    if (status == CM_OK) {
        status = cm_write_exact(writer->fd, writer->ciphertext, writer->staged,
                                core->payload_offset + writer->segment * core->segment_bytes,
                                "payload", err);
    }
    writer->segment++;
    writer->staged = 0;
    return status;
}

enum cm_status cm_package_write_append(struct cm_package_writer *writer, const uint8_t *plaintext,
                                       size_t bytes, struct cm_error *err)
{
    uint64_t before = writer->segment * (uint64_t)CM_PACKAGE_SEGMENT_BYTES + writer->staged;
    if (bytes > writer->core.payload_bytes - before) {
        return cm_error_set(err, CM_E_BUG, "CM-PKG-PAYLOAD", "more payload than was planned");
    }
    while (bytes > 0) {
        size_t room = CM_PACKAGE_SEGMENT_BYTES - writer->staged;
        size_t take = bytes < room ? bytes : room;
        memcpy(cm_secret_bytes(writer->staging) + writer->staged, plaintext, take);
        writer->staged += take;
        plaintext += take;
        bytes -= take;
        if (writer->staged == CM_PACKAGE_SEGMENT_BYTES) {
            enum cm_status status = segment_flush(writer, err);
            if (status != CM_OK) {
                return status;
            }
        }
    }
    return CM_OK;
}

/* Digests, signature, MACs, then head and both slot copies. */
static enum cm_status head_write(struct cm_package_writer *writer, struct cm_error *err)
{
    struct cm_package_core *core = &writer->core;
    const uint8_t *key = cm_secret_view(writer->key);
    uint8_t *head = calloc(1, CM_PACKAGE_HEAD_BYTES);
    if (head == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "head");
    }
    struct cm_writer prologue = cm_writer_init(head, CM_PACKAGE_PROLOGUE_BYTES);
    cm_writer_bytes(&prologue, "CASEMATE", 8);
    cm_writer_u32(&prologue, CM_FORMAT_VERSION);
    cm_writer_u32(&prologue, CM_PACKAGE_HEAD_BYTES);
    core_encode(core, head + CM_PACKAGE_CORE_OFFSET);
    enum cm_status status =
        cm_sha256(head + CM_PACKAGE_CORE_OFFSET, CM_CORE_SIGNED_BYTES, core->core_digest, err);
    if (status == CM_OK) {
        status = writer->options.sign(writer->options.sign_context, core->core_digest,
                                      core->signature, err);
    }
    if (status == CM_OK) {
        status = cm_signature_check(core->owner_key, core->core_digest, core->signature, err);
    }
    if (status == CM_OK) {
        status = cm_header_mac(key, core, core->header_mac, err);
    }
    if (status == CM_OK) {
        core_encode(core, head + CM_PACKAGE_CORE_OFFSET);
        status = cm_slots_encode(key, core, 1, writer->slots, writer->options.slot_count,
                                 head + CM_PACKAGE_SLOTS_A_OFFSET, err);
    }
    if (status == CM_OK) {
        memcpy(head + CM_PACKAGE_SLOTS_B_OFFSET, head + CM_PACKAGE_SLOTS_A_OFFSET,
               CM_PACKAGE_SLOTS_BYTES);
        status = cm_write_exact(writer->fd, head, CM_PACKAGE_HEAD_BYTES, 0, "head", err);
    }
    free(head);
    return status;
}

/* Rename over the target and make the rename durable. */
static enum cm_status file_publish(const char *partial, const char *path, int fd,
                                   struct cm_error *err)
{
    char folder[4096];
    snprintf(folder, sizeof(folder), "%s", path);
    if (fsync(fd) != 0) {
        return cm_error_errno(err, errno, "CM-PKG-WRITE", "cannot sync %s", partial);
    }
    if (rename(partial, path) != 0) {
        return cm_error_errno(err, errno, "CM-PKG-WRITE", "cannot rename %s to %s", partial, path);
    }
    int folder_fd = open(dirname(folder), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_fd < 0 || fsync(folder_fd) != 0) {
        int error_number = errno;
        if (folder_fd >= 0) {
            close(folder_fd);
        }
        return cm_error_errno(err, error_number, "CM-PKG-WRITE", "cannot sync the folder of %s",
                              path);
    }
    close(folder_fd);
    return CM_OK;
}

enum cm_status cm_package_write_finish(struct cm_package_writer *writer, struct cm_error *err)
{
    struct cm_package_core *core = &writer->core;
    enum cm_status status = CM_OK;
    size_t table_bytes = (size_t)core->segment_count * CM_PACKAGE_TABLE_ENTRY_BYTES;
    if (writer->staged > 0) {
        status = segment_flush(writer, err);
    }
    if (status == CM_OK && writer->segment != core->segment_count) {
        status = cm_error_set(err, CM_E_BUG, "CM-PKG-PAYLOAD", "less payload than was planned");
    }
    if (status == CM_OK) {
        status = cm_sha256(writer->table, table_bytes, core->table_digest, err);
    }
    if (status == CM_OK) {
        status = cm_write_exact(writer->fd, writer->table, table_bytes, core->table_offset,
                                "tag table", err);
    }
    if (status == CM_OK) {
        status = head_write(writer, err);
    }
    if (status == CM_OK) {
        status = file_publish(writer->partial, writer->path, writer->fd, err);
    }
    if (status != CM_OK) {
        cm_package_write_abort(writer);
        return status;
    }
    writer_free(writer);
    return CM_OK;
}

enum cm_status cm_package_slots_replace(int fd, const uint8_t key[static CM_KEY_BYTES],
                                        const struct cm_package_slot *slots, uint32_t slot_count,
                                        struct cm_error *err)
{
    static const uint64_t offsets[2] = {CM_PACKAGE_SLOTS_A_OFFSET, CM_PACKAGE_SLOTS_B_OFFSET};
    struct cm_package_head *parsed = malloc(sizeof(*parsed));
    uint8_t *bytes = malloc(CM_PACKAGE_HEAD_BYTES);
    enum cm_status status;
    if (parsed == NULL || bytes == NULL) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "slots");
        goto out;
    }
    status = cm_read_exact(fd, bytes, CM_PACKAGE_HEAD_BYTES, 0, "head", err);
    if (status == CM_OK) {
        status = cm_package_head_parse(bytes, CM_PACKAGE_HEAD_BYTES, parsed, err);
    }
    if (status == CM_OK) {
        status = cm_package_head_authenticate(parsed, key, parsed->core.owner_key, err);
    }
    if (status == CM_OK) {
        status = cm_slots_encode(key, &parsed->core, parsed->slots_generation + 1, slots,
                                 slot_count, bytes, err);
    }
    /* First the copy that is not in use; only when that is durable, the one that was. */
    for (uint32_t turn = 0; status == CM_OK && turn < 2; turn++) {
        uint64_t offset = offsets[parsed->slots_copy ^ 1u ^ turn];
        status = cm_write_exact(fd, bytes, CM_PACKAGE_SLOTS_BYTES, offset, "slots", err);
        if (status == CM_OK && fsync(fd) != 0) {
            status = cm_error_errno(err, errno, "CM-PKG-WRITE", "cannot sync the slots");
        }
    }
out:
    free(parsed);
    free(bytes);
    return status;
}
