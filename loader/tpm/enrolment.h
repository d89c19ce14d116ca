/* Enrolment record and sealing: the software half of loader/tpm. No tss2 here; the packer links it.
 *
 * The record is what a node tells the outside of itself: made and signed (by its attestation key)
 * in `casemate-keeper --provision`; binary, fixed order, cursor-read. Sealing makes a duplicate
 * blob under the node's EK that only this TPM can import, with the policy of design section 8:
 *   authPolicy = PolicyAuthorize(policy authority, policy_ref)
 *   signed     = PolicyPCR(pcrs) ∧ PolicyNV(counter ≤ N, unsigned) ∧ PolicyCommandCode(Unseal)
 * Methods: TPM 2.0 Library, Part 1 (duplication, KDFe, KDFa), Part 3 (policy commands). */
#ifndef CASEMATE_LOADER_TPM_ENROLMENT_H
#define CASEMATE_LOADER_TPM_ENROLMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/frame.h"

#define CM_ENROLMENT_PUBLIC_MAX 512u /* a marshalled TPM2B_PUBLIC */
#define CM_EK_CERTIFICATE_MAX   3072u
#define CM_POLICY_REF_BYTES_MAX 64u
#define CM_POLICY_PCRS_MAX      8u
#define CM_POLICY_ENTRIES_MAX   16u

struct cm_enrolment {
    char node_name[CM_NAME_BYTES];
    bool development;              /* made by casemate-devtpm */
    uint8_t node[CM_DIGEST_BYTES]; /* SHA-256 of the EK's TPMT_PUBLIC: the slot's `node` */
    uint8_t ek_public[CM_ENROLMENT_PUBLIC_MAX]; /* TPM2B_PUBLIC */
    uint32_t ek_public_bytes;
    uint8_t srk_public[CM_ENROLMENT_PUBLIC_MAX];
    uint32_t srk_public_bytes;
    uint8_t ak_public[CM_ENROLMENT_PUBLIC_MAX];
    uint32_t ak_public_bytes;
    uint8_t counter_name[34]; /* nameAlg ‖ digest of the NV index, WRITTEN set */
    uint32_t counter_handle;
    uint64_t counter_value;             /* at enrolment */
    uint32_t pcr;                       /* ours: 14 */
    uint8_t pcr_value[CM_DIGEST_BYTES]; /* its value before any of our events */
    uint8_t signature[64];              /* r ‖ s by the AK over SHA-256 of all bytes before it */
    uint8_t ek_certificate[CM_EK_CERTIFICATE_MAX]; /* X.509, DER, as the TPM holds it */
    uint32_t ek_certificate_bytes;                 /* 0: the TPM holds none */
};

CM_MUST_USE enum cm_status cm_enrolment_encode(const struct cm_enrolment *enrolment,
                                               uint8_t *ret_bytes, size_t size, size_t *ret_used,
                                               struct cm_error *err);
/* Parse, check form, `node` digest and the AK's signature. Fails: POLICY. */
CM_MUST_USE enum cm_status cm_enrolment_parse(const uint8_t *bytes, size_t size,
                                              struct cm_enrolment *ret_enrolment,
                                              struct cm_error *err);
/* Bytes that the AK signs (everything before the signature). */
CM_MUST_USE enum cm_status cm_enrolment_digest(const struct cm_enrolment *enrolment,
                                               uint8_t ret_digest[static CM_DIGEST_BYTES],
                                               struct cm_error *err);

/* SHA-256 of the AK's public area: its name without the algorithm. */
CM_MUST_USE enum cm_status cm_enrolment_ak_digest(const struct cm_enrolment *enrolment,
                                                  uint8_t ret_digest[static CM_DIGEST_BYTES],
                                                  struct cm_error *err);

/* Certificates of TPM makers whose word is believed: roots, or one of the authorities below them.
 */
#define CM_EK_AUTHORITIES_MAX 8u
struct cm_ek_authorities {
    uint32_t count;
    struct {
        uint8_t der[CM_EK_CERTIFICATE_MAX];
        uint32_t bytes;
    } rows[CM_EK_AUTHORITIES_MAX];
};

/* Does one of the authorities vouch for the record's endorsement key, at this time? TCG EK
 * Credential Profile 2.5. It says that the EK lives in a TPM of that maker, not that the AK does:
 * the AK is pinned, or bound by a credential. Fails: POLICY CM-EK-ABSENT, -FORM, -KEY, -PURPOSE,
 * -EXPIRED, -CHAIN. */
CM_MUST_USE enum cm_status cm_ek_certificate_check(const struct cm_enrolment *enrolment,
                                                   const struct cm_ek_authorities *authorities,
                                                   uint64_t now_unix_s, struct cm_error *err);

/* A challenge that shows that EK and AK of a record live in one TPM: TPM2_MakeCredential, in
 * software. `secret` comes back from that TPM alone (cm_tpm_credential_answer). Mark ‖
 * TPM2B_ID_OBJECT ‖ TPM2B_ENCRYPTED_SECRET. */
#define CM_CREDENTIAL_BYTES_MAX 256u
CM_MUST_USE enum cm_status cm_credential_make(const struct cm_enrolment *enrolment,
                                              const uint8_t secret[static CM_DIGEST_BYTES],
                                              uint8_t ret_bytes[static CM_CREDENTIAL_BYTES_MAX],
                                              uint32_t *ret_used, struct cm_error *err);

/* One allowed state, signed by the policy authority. */
struct cm_policy_state {
    uint32_t pcr_count; /* ascending, SHA-256 bank */
    uint32_t pcrs[CM_POLICY_PCRS_MAX];
    uint8_t pcr_values[CM_POLICY_PCRS_MAX][CM_DIGEST_BYTES];
    uint64_t counter_max; /* N */
    uint8_t counter_name[34];
    char policy_ref[CM_POLICY_REF_BYTES_MAX];
    uint8_t signature[64]; /* over H(approvedPolicy ‖ policyRef), r ‖ s */
};

struct cm_policy_list { /* the file beside the package: <package>.policy */
    uint32_t count;
    struct cm_policy_state states[CM_POLICY_ENTRIES_MAX];
};

/* authPolicy of the sealed object for an authority's P-256 public key and a policy_ref. */
CM_MUST_USE enum cm_status
cm_policy_authorize_digest(const uint8_t policy_key[static CM_PUBLIC_KEY_BYTES],
                           const char *policy_ref, uint8_t ret_digest[static CM_DIGEST_BYTES],
                           struct cm_error *err);
/* Digest of the inner policy of a state. */
CM_MUST_USE enum cm_status cm_policy_state_digest(const struct cm_policy_state *state,
                                                  uint8_t ret_digest[static CM_DIGEST_BYTES],
                                                  struct cm_error *err);
/* What the authority signs for a state: H(inner digest ‖ policy_ref). */
CM_MUST_USE enum cm_status cm_policy_state_to_sign(const struct cm_policy_state *state,
                                                   uint8_t ret_digest[static CM_DIGEST_BYTES],
                                                   struct cm_error *err);
CM_MUST_USE enum cm_status cm_policy_list_encode(const struct cm_policy_list *list,
                                                 uint8_t *ret_bytes, size_t size, size_t *ret_used,
                                                 struct cm_error *err);
/* Form only; signatures are checked under the policy key that is given (NULL: not checked). */
CM_MUST_USE enum cm_status cm_policy_list_parse(const uint8_t *bytes, size_t size,
                                                const uint8_t *policy_key,
                                                struct cm_policy_list *ret_list,
                                                struct cm_error *err);
#define CM_POLICY_LIST_BYTES_MAX 16384u

/* Seal 32 bytes to a node: fills a package slot's payload (objectPublic ‖ duplicate ‖ seed ‖
 * policy_ref, each length-prefixed). Software only. */
CM_MUST_USE enum cm_status cm_seal_to_node(const struct cm_enrolment *enrolment,
                                           const uint8_t policy_key[static CM_PUBLIC_KEY_BYTES],
                                           const char *policy_ref,
                                           const uint8_t key[static CM_KEY_BYTES],
                                           uint8_t *ret_payload, size_t size, uint32_t *ret_bytes,
                                           struct cm_error *err);

#endif
