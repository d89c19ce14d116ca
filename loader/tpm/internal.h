/* Marshalling of the few TPM 2.0 structures that both halves of this folder need. Big-endian, as in
 * TPM 2.0 Library Part 2. */
#ifndef CASEMATE_LOADER_TPM_INTERNAL_H
#define CASEMATE_LOADER_TPM_INTERNAL_H

#include <stdbool.h>

#include "loader/tpm/enrolment.h"

#define CM_TPM_ALG_AES       0x0006u
#define CM_TPM_ALG_KEYEDHASH 0x0008u
#define CM_TPM_ALG_SHA256    0x000Bu
#define CM_TPM_ALG_NULL      0x0010u
#define CM_TPM_ALG_ECDSA     0x0018u
#define CM_TPM_ALG_ECC       0x0023u
#define CM_TPM_ALG_CFB       0x0043u
#define CM_TPM_ECC_P256      0x0003u
#define CM_TPM_NAME_BYTES    34u /* nameAlg ‖ SHA-256 */

/* Attributes (Part 2, section 8.3). */
#define CM_TPMA_FIXED_TPM      0x00000002u
#define CM_TPMA_FIXED_PARENT   0x00000010u
#define CM_TPMA_ORIGIN         0x00000020u
#define CM_TPMA_USER_WITH_AUTH 0x00000040u
#define CM_TPMA_ADMIN_POLICY   0x00000080u
#define CM_TPMA_NO_DA          0x00000400u
#define CM_TPMA_RESTRICTED     0x00010000u
#define CM_TPMA_DECRYPT        0x00020000u
#define CM_TPMA_SIGN           0x00040000u

#define CM_TPM_EK_ATTRIBUTES                                                                       \
    (CM_TPMA_FIXED_TPM | CM_TPMA_FIXED_PARENT | CM_TPMA_ORIGIN | CM_TPMA_ADMIN_POLICY |            \
     CM_TPMA_RESTRICTED | CM_TPMA_DECRYPT)
#define CM_TPM_SRK_ATTRIBUTES                                                                      \
    (CM_TPMA_FIXED_TPM | CM_TPMA_FIXED_PARENT | CM_TPMA_ORIGIN | CM_TPMA_USER_WITH_AUTH |          \
     CM_TPMA_NO_DA | CM_TPMA_RESTRICTED | CM_TPMA_DECRYPT)
#define CM_TPM_AK_ATTRIBUTES                                                                       \
    (CM_TPMA_FIXED_TPM | CM_TPMA_FIXED_PARENT | CM_TPMA_ORIGIN | CM_TPMA_USER_WITH_AUTH |          \
     CM_TPMA_NO_DA | CM_TPMA_RESTRICTED | CM_TPMA_SIGN)

#define CM_TPM_CC_UNSEAL 0x0000015Eu

/* The node's counter (Part 2, section 13.4): a counter written by the owner, read by anybody,
 * outside the lock-out; WRITTEN is set by the first step. */
#define CM_TPM_COUNTER_ATTRIBUTES 0x02060012u
#define CM_TPM_NV_WRITTEN         0x20000000u

/* Policy of the endorsement key: PolicySecret(endorsement). TCG EK Credential Profile, section B.3.
 */
extern const uint8_t cm_tpm_ek_policy[CM_DIGEST_BYTES];

/* A bounded big-endian writer: overflow sets failed. */
struct cm_be {
    uint8_t *bytes;
    size_t size, used;
    bool failed;
};
void cm_be_bytes(struct cm_be *be, const void *bytes, size_t size);
void cm_be_u16(struct cm_be *be, uint32_t value);
void cm_be_u32(struct cm_be *be, uint32_t value);
void cm_be_u64(struct cm_be *be, uint64_t value);
void cm_be_sized(struct cm_be *be, const void *bytes, size_t size); /* TPM2B */

uint16_t cm_be_u16_at(const uint8_t *bytes);

/* A P-256 key in a TPM2B_PUBLIC: its attributes and point (uncompressed). False if it is anything
 * else. */
bool cm_tpm_ecc_public(const uint8_t *bytes, size_t size, uint32_t *ret_attributes,
                       uint8_t ret_point[static CM_PUBLIC_KEY_BYTES]);
/* TPM2B_PUBLIC of the policy authority's key as it is loaded for VerifySignature. */
void cm_tpm_authority_public(const uint8_t point[static CM_PUBLIC_KEY_BYTES], struct cm_be *be);
/* nameAlg ‖ SHA-256(TPMT_PUBLIC), of a TPM2B_PUBLIC. */
CM_MUST_USE enum cm_status cm_tpm_name(const uint8_t *public_bytes, size_t size,
                                       uint8_t ret_name[static CM_TPM_NAME_BYTES],
                                       struct cm_error *err);
/* nameAlg ‖ SHA-256 of the public area of a node's counter, once it was stepped. An index with
 * other attributes, that could go back, has another name. The node's digest stands in the area as a
 * policy that nothing asks for, so that each node's counter has a name of its own: a state that is
 * signed for one node's counter is then for no other's. */
CM_MUST_USE enum cm_status cm_tpm_counter_name(uint32_t handle,
                                               const uint8_t node[static CM_DIGEST_BYTES],
                                               uint8_t ret_name[static CM_TPM_NAME_BYTES],
                                               struct cm_error *err);
/* SHA-256 over up to four parts; part NULL ends. */
CM_MUST_USE enum cm_status cm_tpm_hash(uint8_t ret_digest[static CM_DIGEST_BYTES],
                                       struct cm_error *err, const struct cm_be *part1,
                                       const struct cm_be *part2);
/* ECDSA P-256 over a digest, r ‖ s. */
bool cm_tpm_signature_good(const uint8_t point[static CM_PUBLIC_KEY_BYTES],
                           const uint8_t digest[static CM_DIGEST_BYTES],
                           const uint8_t signature[static 64]);

/* The parts of a challenge, borrowed: contents of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET. */
#define CM_CREDENTIAL_MARK "CMCRED1"
struct cm_credential {
    const uint8_t *object, *seed;
    uint16_t object_size, seed_size;
};
bool cm_credential_parse(const uint8_t *bytes, size_t size, struct cm_credential *ret);

/* The parts of a slot's payload, borrowed. */
struct cm_tpm_sealed {
    const uint8_t *public_bytes, *duplicate,
        *seed; /* TPM2B_PUBLIC; TPM2B_PRIVATE's, TPM2B_ENCRYPTED_SECRET's content */
    uint16_t public_size, duplicate_size, seed_size;
    char policy_ref[CM_POLICY_REF_BYTES_MAX];
};
CM_MUST_USE enum cm_status cm_tpm_sealed_parse(const uint8_t *payload, size_t size,
                                               struct cm_tpm_sealed *ret_sealed,
                                               struct cm_error *err);

#endif
