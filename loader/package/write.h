/* Writing a package: streamed, atomic. Packer only.
 *
 * begin opens `<path>.partial` (O_EXCL) beside the target; append takes the payload's plaintext in
 * order, in pieces of any size; finish seals manifest and table, writes head and slots, fsyncs,
 * renames over `path` and fsyncs the folder. abort (or any failure) removes the partial file. */
#ifndef CASEMATE_LOADER_PACKAGE_WRITE_H
#define CASEMATE_LOADER_PACKAGE_WRITE_H

#include "loader/package/manifest.h"
#include "loader/package/package.h"

struct cm_package_writer;

struct cm_package_write_options {
    const char *path;
    uint32_t suite;
    uint64_t revision;
    uint32_t host_version_min;
    uint32_t slot_count;
    const struct cm_package_slot *slots;
    uint8_t owner_key[CM_PUBLIC_KEY_BYTES];
    /* Signs a core digest with the owner's key (which may sit in an HSM). */
    enum cm_status (*sign)(void *context, const uint8_t digest[CM_DIGEST_BYTES],
                           uint8_t ret_signature[CM_PACKAGE_SIGNATURE_BYTES], struct cm_error *err);
    void *sign_context;
};

/* `key` is the fresh package key, made by the caller; payload_bytes and manifest are known up front
 * (the packer plans the layout before it converts). */
CM_MUST_USE enum cm_status cm_package_write_begin(const struct cm_package_write_options *options,
                                                  const uint8_t key[static CM_KEY_BYTES],
                                                  const struct cm_manifest *manifest,
                                                  uint64_t payload_bytes,
                                                  struct cm_package_writer **ret_writer,
                                                  struct cm_error *err);
/* The same of an adapter. */
CM_MUST_USE enum cm_status
cm_package_write_begin_adapter(const struct cm_package_write_options *options,
                               const uint8_t key[static CM_KEY_BYTES],
                               const struct cm_manifest_adapter *adapter, uint64_t payload_bytes,
                               struct cm_package_writer **ret_writer, struct cm_error *err);
CM_MUST_USE enum cm_status cm_package_write_append(struct cm_package_writer *writer,
                                                   const uint8_t *plaintext, size_t bytes,
                                                   struct cm_error *err);
/* Consumes the writer in every case. */
CM_MUST_USE enum cm_status cm_package_write_finish(struct cm_package_writer *writer,
                                                   struct cm_error *err);
void cm_package_write_abort(struct cm_package_writer *writer);

/* Replace the slots of an existing package: write the older copy, fsync, then mirror, fsync. A
 * crash at any point leaves one good copy. The key authenticates the new slots. */
CM_MUST_USE enum cm_status cm_package_slots_replace(int fd, const uint8_t key[static CM_KEY_BYTES],
                                                    const struct cm_package_slot *slots,
                                                    uint32_t slot_count, struct cm_error *err);

/* Detached recovery file: the package key under a passphrase (scrypt with bounded N, r, p). Bound
 * to the core digest of one package. Atomic like the package. */
CM_MUST_USE enum cm_status cm_recovery_write(const char *path, const char *passphrase,
                                             const uint8_t core_digest[static CM_DIGEST_BYTES],
                                             const uint8_t key[static CM_KEY_BYTES],
                                             struct cm_error *err);
CM_MUST_USE enum cm_status cm_recovery_read(const char *path, const char *passphrase,
                                            const uint8_t core_digest[static CM_DIGEST_BYTES],
                                            uint8_t ret_key[static CM_KEY_BYTES],
                                            struct cm_error *err);

#endif
