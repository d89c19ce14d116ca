/* The owner's keys: P-256, PEM files in one folder, made once.
 *   owner.key  signs packages     owner.pub   pinned by nodes (`sealed: package_owner`)
 *   policy.key signs policies     policy.pub  pinned by nodes (`sealed: policy_authority`) */
#ifndef CASEMATE_LOADER_PACK_OWNER_H
#define CASEMATE_LOADER_PACK_OWNER_H

#include "loader/package/package.h"

struct cm_owner_key; /* a private key */

/* Make the four files; nothing is overwritten, and on failure nothing is left behind. */
CM_MUST_USE enum cm_status cm_owner_make(const char *folder, struct cm_error *err);
/* which: "owner" or "policy". */
CM_MUST_USE enum cm_status cm_owner_load(const char *folder, const char *which,
                                         struct cm_owner_key **ret_key, struct cm_error *err);
void cm_owner_free(struct cm_owner_key *key); /* NULL is fine */
void cm_owner_public(const struct cm_owner_key *key, uint8_t ret_point[static CM_PUBLIC_KEY_BYTES]);
/* ECDSA over a digest; context is a struct cm_owner_key (see cm_package_write_options). */
enum cm_status cm_owner_sign(void *context, const uint8_t digest[CM_DIGEST_BYTES],
                             uint8_t ret_signature[CM_PACKAGE_SIGNATURE_BYTES],
                             struct cm_error *err);

#endif
