/* API keys as the supervisor hands them over, and the check of a credential.
 *
 * A key reads cm-<16 hex id>-<43 base64url>. Only SHA-256 of the whole text is known here. */
#ifndef CASEMATE_RUNTIME_GATEWAY_KEYS_H
#define CASEMATE_RUNTIME_GATEWAY_KEYS_H

#include "runtime/base/frame.h"
#include "runtime/gateway/http.h"
#include "runtime/gateway/routes.h"

#define CM_KEY_TEXT_BYTES 63

struct cm_keys {
    struct cm_api_key *rows; /* sorted by id */
    uint32_t count;
    uint64_t generation;
    bool present; /* a table has arrived; without one nobody is admitted */
};

/* Replace the table by the one in a sealed memfd (borrowed). Whatever is wrong with it (seals,
 * size, order, names, an older generation): INPUT, and from then on nobody is admitted until a
 * sound table arrives. */
CM_MUST_USE enum cm_status cm_keys_load(struct cm_keys *keys, int fd,
                                        const struct cm_keys_info *info, struct cm_error *err);
void cm_keys_free(struct cm_keys *keys);

/* The row that an Authorization value proves, or NULL. The same work is done for every value, and
 * nothing tells why it was refused. */
const struct cm_api_key *cm_keys_check(const struct cm_keys *keys, struct cm_span authorization,
                                       uint64_t now_unix_s);
const struct cm_api_key *cm_keys_find(const struct cm_keys *keys, const uint8_t id[8]);

/* Has this key (NULL: none) been granted the adapter? `every`: the configuration asks for no grant.
 */
bool cm_keys_adapter_granted(const struct cm_api_key *key, bool every, const char *adapter);

enum cm_admission { CM_ADMITTED, CM_UNAUTHORISED, CM_KEYS_MISSING };

/* May this caller use the route? *ret_key is the proven key, or NULL on open routes. */
enum cm_admission cm_keys_admit(const struct cm_keys *keys, const struct cm_route *route,
                                bool metrics_open, struct cm_span authorization,
                                uint64_t now_unix_s, const struct cm_api_key **ret_key);

#endif
