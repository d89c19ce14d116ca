/* What a verifier believes: the trust file of FORMAT.md. */
#ifndef CASEMATE_LOADER_EVIDENCE_TRUST_H
#define CASEMATE_LOADER_EVIDENCE_TRUST_H

#include <stdbool.h>
#include <stdint.h>

#include "loader/tpm/enrolment.h"
#include "runtime/base/error.h"
#include "runtime/base/frame.h"

#define CM_TRUST_NODES_MAX    64u
#define CM_TRUST_OWNERS_MAX   8u
#define CM_TRUST_PACKAGES_MAX 64u
#define CM_TRUST_ADAPTERS_MAX 64u
#define CM_TRUST_PCRS_MAX     128u
#define CM_TRUST_BYTES_MAX    (64u << 10)

struct cm_trust {
    bool development;
    uint32_t node_count;
    struct {
        uint8_t ek[CM_DIGEST_BYTES], ak[CM_DIGEST_BYTES]; /* SHA-256 of the public areas */
    } nodes[CM_TRUST_NODES_MAX];
    uint32_t ak_count; /* nodes of which the AK alone is pinned: an authority vouches for the EK */
    uint8_t aks[CM_TRUST_NODES_MAX][CM_DIGEST_BYTES];
    struct cm_ek_authorities ek_authorities;
    uint32_t owner_count;
    uint8_t owners[CM_TRUST_OWNERS_MAX][CM_PUBLIC_KEY_BYTES];
    uint32_t package_count; /* 0: any that an owner signed */
    uint8_t packages[CM_TRUST_PACKAGES_MAX][CM_DIGEST_BYTES];
    bool adapters_judged; /* false: all are accepted, whosever they are */
    uint32_t adapter_count, adapter_owner_count;
    uint8_t adapters[CM_TRUST_ADAPTERS_MAX][CM_DIGEST_BYTES];
    uint8_t adapter_owners[CM_TRUST_OWNERS_MAX][CM_PUBLIC_KEY_BYTES];
    uint32_t pcr_count;
    struct {
        uint32_t pcr;
        uint8_t value[CM_DIGEST_BYTES];
    } pcrs[CM_TRUST_PCRS_MAX];
};

/* `name` stands in errors. Fails: CONFIG CM-TRUST-LINE with the line. A file that believes nothing
 * is refused. */
CM_MUST_USE enum cm_status cm_trust_parse(const char *text, size_t size, const char *name,
                                          struct cm_trust *ret_trust, struct cm_error *err);

#endif
