/* Shared by the readers and writers of this folder; tests of this folder may include it. */
#ifndef CASEMATE_LOADER_PACKAGE_INTERNAL_H
#define CASEMATE_LOADER_PACKAGE_INTERNAL_H

#include "loader/package/package.h"
#include "runtime/base/secret.h"

#define CM_FORMAT_VERSION    1u
#define CM_CORE_SIGNED_BYTES 256u
#define CM_SLOT_BYTES        4000u
#define CM_SLOTS_MAC_OFFSET  32704u
#define CM_SLOTS_SUM_OFFSET  32736u
#define CM_SHARD_BYTES       (64ull << 30)
#define CM_AEAD_TAG_BYTES    16u
#define CM_AEAD_NONCE_BYTES  12u
#define CM_AEAD_KEY_BYTES    36u /* key ‖ nonce prefix */

enum cm_purpose {
    CM_PURPOSE_HEADER_MAC = 1,
    CM_PURPOSE_MANIFEST = 2,
    CM_PURPOSE_DATA = 3,
    CM_PURPOSE_SLOTS = 4,
};

/* FORMAT.md "Keys". ret_key is wiped by the caller. */
CM_MUST_USE enum cm_status cm_key_derive(const uint8_t key[static CM_KEY_BYTES],
                                         const uint8_t salt[static CM_PACKAGE_SALT_BYTES],
                                         uint32_t suite, enum cm_purpose purpose, uint32_t shard,
                                         uint8_t *ret_key, size_t size, struct cm_error *err);

CM_MUST_USE enum cm_status cm_hmac_sha256(const uint8_t key[static CM_KEY_BYTES], const void *part1,
                                          size_t bytes1, const void *part2, size_t bytes2,
                                          uint8_t ret_mac[static CM_DIGEST_BYTES],
                                          struct cm_error *err);
CM_MUST_USE enum cm_status cm_sha256(const void *bytes, size_t size,
                                     uint8_t ret_digest[static CM_DIGEST_BYTES],
                                     struct cm_error *err);
/* key: CM_AEAD_KEY_BYTES from cm_key_derive. */
CM_MUST_USE enum cm_status cm_aead_seal(uint32_t suite, const uint8_t *key, uint64_t index,
                                        const uint8_t *plaintext, size_t bytes, uint8_t *ciphertext,
                                        uint8_t ret_tag[static CM_AEAD_TAG_BYTES],
                                        struct cm_error *err);
/* Wipes plaintext and fails with CM_E_PACKAGE CM-PKG-TAG if the tag is wrong. */
CM_MUST_USE enum cm_status cm_aead_open(uint32_t suite, const uint8_t *key, uint64_t index,
                                        const uint8_t *ciphertext, size_t bytes,
                                        const uint8_t tag[static CM_AEAD_TAG_BYTES],
                                        uint8_t *plaintext, struct cm_error *err);
/* The same by OpenSSL alone: what cm_aead_open falls back to, and its oracle in the tests. */
CM_MUST_USE enum cm_status cm_aead_open_evp(uint32_t suite, const uint8_t *key, uint64_t index,
                                            const uint8_t *ciphertext, size_t bytes,
                                            const uint8_t tag[static CM_AEAD_TAG_BYTES],
                                            uint8_t *plaintext, struct cm_error *err);

/* cpu.c: what this CPU has for those below. */
bool cm_gcm_vaes_available(void);
bool cm_sha256_lanes_available(void);
/* crypto.c: the SHA instructions. */
bool cm_sha256_pair_available(void);
/* gcm_vaes.c. AES-256-GCM whose tag is checked before anything is written: in place is fine. False:
 * the tag is wrong, plaintext is untouched. */
bool cm_gcm_vaes_open(const uint8_t key[static CM_KEY_BYTES],
                      const uint8_t nonce[static CM_AEAD_NONCE_BYTES], const uint8_t *ciphertext,
                      size_t bytes, const uint8_t tag[static CM_AEAD_TAG_BYTES],
                      uint8_t *plaintext);
#define CM_SHA256_PAIR 2u
/* sha256_lanes.c, for both ways: FIPS 180-4, 4.2.2 and 5.3.3. */
extern const uint32_t cm_sha256_constants[64];
extern const uint32_t cm_sha256_beginning[8];
/* The block behind a message of whole blocks: FIPS 180-4, 5.1.1. */
void cm_sha256_padding(size_t message_bytes, uint8_t ret_block[static 64]);

/* sha256_pair.c. Digests of two messages of one length, a multiple of 64. */
void cm_sha256_pair(const uint8_t *const messages[CM_SHA256_PAIR], size_t bytes,
                    uint8_t ret_digests[CM_SHA256_PAIR][CM_DIGEST_BYTES]);
#define CM_SHA256_LANES 16u
/* sha256_lanes.c. Digests of CM_SHA256_LANES messages of one length, a multiple of 64. */
void cm_sha256_lanes(const uint8_t *const messages[CM_SHA256_LANES], size_t bytes,
                     uint8_t ret_digests[CM_SHA256_LANES][CM_DIGEST_BYTES]);

/* ECDSA P-256 over a digest; key = uncompressed point. */
CM_MUST_USE enum cm_status cm_signature_check(
    const uint8_t key[static CM_PUBLIC_KEY_BYTES], const uint8_t digest[static CM_DIGEST_BYTES],
    const uint8_t signature[static CM_PACKAGE_SIGNATURE_BYTES], struct cm_error *err);

/* Header MAC and slots MAC keys of one package. */
CM_MUST_USE enum cm_status cm_header_mac(const uint8_t key[static CM_KEY_BYTES],
                                         const struct cm_package_core *core,
                                         uint8_t ret_mac[static CM_DIGEST_BYTES],
                                         struct cm_error *err);
/* Covers core digest ‖ slots_digest, the SHA-256 of a copy's first CM_SLOTS_MAC_OFFSET bytes. */
CM_MUST_USE enum cm_status cm_slots_mac(const uint8_t key[static CM_KEY_BYTES],
                                        const struct cm_package_core *core,
                                        const uint8_t slots_digest[static CM_DIGEST_BYTES],
                                        uint8_t ret_mac[static CM_DIGEST_BYTES],
                                        struct cm_error *err);

/* Encode one copy of the slot region with MAC and checksum into CM_PACKAGE_SLOTS_BYTES. */
CM_MUST_USE enum cm_status cm_slots_encode(const uint8_t key[static CM_KEY_BYTES],
                                           const struct cm_package_core *core, uint64_t generation,
                                           const struct cm_package_slot *slots, uint32_t slot_count,
                                           uint8_t *ret_bytes, struct cm_error *err);

/* Read exactly; short reads and EOF are errors naming the part. */
CM_MUST_USE enum cm_status cm_read_exact(int fd, void *bytes, size_t size, uint64_t offset,
                                         const char *part, struct cm_error *err);
CM_MUST_USE enum cm_status cm_write_exact(int fd, const void *bytes, size_t size, uint64_t offset,
                                          const char *part, struct cm_error *err);

static inline uint64_t cm_align_up(uint64_t value)
{
    return (value + CM_PACKAGE_ALIGN - 1) / CM_PACKAGE_ALIGN * CM_PACKAGE_ALIGN;
}

#endif
