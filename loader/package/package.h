/* The sealed package: layout constants, the parsed head, and reading.
 *
 * loader/package/FORMAT.md is the specification. The head (prologue, core header, both slot copies)
 * is exactly CM_PACKAGE_HEAD_BYTES, so a process that must not parse it can still pass it on.
 * Who uses what:
 *   keeper   head_parse → slot_select → (unseal) → head_authenticate
 *   worker   package_open (head_parse, head_authenticate, manifest, table) → loader/stream
 *   packer   loader/package/write.h
 *   inspect  head_parse alone: no key */
#ifndef CASEMATE_LOADER_PACKAGE_PACKAGE_H
#define CASEMATE_LOADER_PACKAGE_PACKAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/frame.h" /* key and digest sizes */

#define CM_PACKAGE_PROLOGUE_BYTES     4096u
#define CM_PACKAGE_CORE_BYTES         4096u
#define CM_PACKAGE_SLOTS_BYTES        32768u /* one copy of the slot region */
#define CM_PACKAGE_CORE_OFFSET        4096u
#define CM_PACKAGE_SLOTS_A_OFFSET     8192u
#define CM_PACKAGE_SLOTS_B_OFFSET     40960u
#define CM_PACKAGE_HEAD_BYTES         73728u
#define CM_PACKAGE_ALIGN              4096u
#define CM_PACKAGE_SEGMENT_BYTES      (256u << 10)
#define CM_PACKAGE_TABLE_ENTRY_BYTES  48u /* tag[16] ‖ SHA-256(ciphertext)[32] */
#define CM_PACKAGE_MANIFEST_BYTES_MAX (64u << 20)
#define CM_PACKAGE_SEGMENTS_MAX       (1u << 24)
#define CM_PACKAGE_SLOTS_MAX          8u
#define CM_PACKAGE_SLOT_PAYLOAD_MAX   3072u
#define CM_PACKAGE_SALT_BYTES         32u
#define CM_PACKAGE_SIGNATURE_BYTES    64u /* ECDSA P-256, r ‖ s, big-endian */

enum cm_suite { CM_SUITE_AES_256_GCM = 1, CM_SUITE_CHACHA20_POLY1305 = 2 };
enum cm_slot_kind { CM_SLOT_TPM = 1, CM_SLOT_BROKER = 2 };

/* The core header, in the clear, every field checked for form by head_parse. */
struct cm_package_core {
    uint32_t format_version;
    uint32_t suite;
    uint32_t segment_bytes;
    uint32_t shard_count;
    uint64_t revision;         /* monotonic per model, by the owner */
    uint32_t host_version_min; /* major << 16 | minor */
    uint8_t salt[CM_PACKAGE_SALT_BYTES];
    uint64_t manifest_offset, manifest_bytes; /* sealed, with its tag */
    uint64_t table_offset, segment_count;
    uint64_t payload_offset, payload_bytes; /* plaintext bytes = ciphertext bytes */
    uint64_t file_bytes;
    uint8_t manifest_digest[CM_DIGEST_BYTES];      /* SHA-256 of the sealed manifest */
    uint8_t table_digest[CM_DIGEST_BYTES];         /* SHA-256 of the tag table */
    uint8_t owner_key[CM_PUBLIC_KEY_BYTES];        /* who signed; must equal the pinned one */
    uint8_t signature[CM_PACKAGE_SIGNATURE_BYTES]; /* over the core digest */
    uint8_t header_mac[CM_DIGEST_BYTES];           /* over the core digest, by the package key */
    uint8_t core_digest[CM_DIGEST_BYTES];          /* computed: SHA-256 of the signed part */
};

struct cm_package_slot {
    uint32_t kind;
    char label[CM_NAME_BYTES];     /* node name, terminated */
    uint8_t node[CM_DIGEST_BYTES]; /* digest of the enrolment's EK public; finds "mine" */
    uint32_t payload_bytes;
    uint8_t payload[CM_PACKAGE_SLOT_PAYLOAD_MAX];
};

struct cm_package_head {
    struct cm_package_core core;
    uint32_t slots_copy; /* 0: A, 1: B — the one in use */
    bool slots_torn;     /* the other copy is damaged or older */
    uint64_t slots_generation;
    uint32_t slot_count;
    struct cm_package_slot slots[CM_PACKAGE_SLOTS_MAX];
    uint8_t slots_mac[CM_DIGEST_BYTES];
    uint8_t slots_digest[CM_DIGEST_BYTES]; /* what slots_mac covers */
};

/* Parse the first CM_PACKAGE_HEAD_BYTES of a package. Authenticates nothing. Chooses the newer slot
 * copy whose own checksum holds. Fails: PACKAGE with part and offset. */
CM_MUST_USE enum cm_status cm_package_head_parse(const uint8_t *bytes, size_t size,
                                                 struct cm_package_head *ret_head,
                                                 struct cm_error *err);

/* The same from a file, which must be as long as its head says. Fails: PACKAGE, SYSTEM. */
CM_MUST_USE enum cm_status cm_package_head_read(int fd, struct cm_package_head *ret_head,
                                                struct cm_error *err);

/* Find the slot for a node. Fails: POLICY CM-PKG-SLOT naming the labels there are. */
CM_MUST_USE enum cm_status cm_package_slot_select(const struct cm_package_head *head, uint32_t kind,
                                                  const uint8_t node[static CM_DIGEST_BYTES],
                                                  const struct cm_package_slot **ret_slot,
                                                  struct cm_error *err);

/* Which of these owners claims to have signed this package. Fails: POLICY CM-PKG-OWNER. */
CM_MUST_USE enum cm_status cm_package_owner_find(const struct cm_package_head *head,
                                                 const struct cm_adapter_owners *owners,
                                                 const struct cm_adapter_owner **ret_owner,
                                                 struct cm_error *err);

/* Check header MAC, slots MAC and the owner's signature under the pinned owner key. */
CM_MUST_USE enum cm_status cm_package_head_authenticate(
    const struct cm_package_head *head, const uint8_t key[static CM_KEY_BYTES],
    const uint8_t owner_key[static CM_PUBLIC_KEY_BYTES], struct cm_error *err);

/* An opened package: authenticated head, decrypted manifest, checked table. Borrows fd. */
struct cm_package;

CM_MUST_USE enum cm_status cm_package_open(int fd, const uint8_t key[static CM_KEY_BYTES],
                                           const uint8_t owner_key[static CM_PUBLIC_KEY_BYTES],
                                           struct cm_package **ret_package, struct cm_error *err);
/* The same of a package that comes in parts, for who may take no memory any more: room for one
 * whose manifest and count of segments are at most these; then, as often as wanted, open (from the
 * file's first bytes, the payload's beginning at least, of a file of file_bytes, signed by one of
 * the owners) and wipe. On failure the room is wiped. */
CM_MUST_USE enum cm_status cm_package_room(size_t manifest_bytes, uint64_t segments,
                                           struct cm_package **ret_package, struct cm_error *err);
CM_MUST_USE enum cm_status cm_package_room_open(struct cm_package *package, const uint8_t *front,
                                                size_t size, uint64_t file_bytes,
                                                const uint8_t key[static CM_KEY_BYTES],
                                                const struct cm_adapter_owners *owners,
                                                struct cm_error *err);
void cm_package_room_wipe(struct cm_package *package);
void cm_package_close(struct cm_package *package); /* wipes keys and manifest; NULL is fine */
const struct cm_package_head *cm_package_head_of(const struct cm_package *package);
/* The decrypted manifest's bytes, for cm_manifest_parse (manifest.h). Valid until close. */
const uint8_t *cm_package_manifest(const struct cm_package *package, size_t *ret_bytes);

/* Open one segment: SHA-256 of the ciphertext against the table, then decrypt, then the tag. Thread
 * safe. On failure `plaintext` is wiped. Fails: PACKAGE with the segment's index and file offset.
 */
CM_MUST_USE enum cm_status cm_package_segment_open(const struct cm_package *package, uint64_t index,
                                                   const uint8_t *ciphertext, size_t bytes,
                                                   uint8_t *plaintext, struct cm_error *err);
/* The two halves of segment_open, for callers that time them or have several segments at hand.
 * Verify takes `count` whole segments from `first` on that lie one after the other, and hashes them
 * side by side where the CPU can. Decrypt is for a segment that passed; in place is fine. */
CM_MUST_USE enum cm_status cm_package_segments_verify(const struct cm_package *package,
                                                      uint64_t first, uint64_t count,
                                                      const uint8_t *ciphertext,
                                                      struct cm_error *err);
CM_MUST_USE enum cm_status cm_package_segment_decrypt(const struct cm_package *package,
                                                      uint64_t index, const uint8_t *ciphertext,
                                                      size_t bytes, uint8_t *plaintext,
                                                      struct cm_error *err);
/* File offset and size of a segment. */
void cm_package_segment_place(const struct cm_package *package, uint64_t index,
                              uint64_t *ret_offset, size_t *ret_bytes);

#endif
