/* The keeper role: unseal once, hand out key pages, own the TLS key. */
#ifndef CASEMATE_RUNTIME_KEEPER_KEEPER_H
#define CASEMATE_RUNTIME_KEEPER_KEEPER_H

#include "loader/evidence/evidence.h"
#include "loader/package/package.h"
#include "loader/tpm/measure.h"
#include "loader/tpm/tpm.h"
#include "runtime/base/frame.h"
#include "runtime/base/log.h"
#include "sandbox/confine.h"

#define CM_TLS_KEY_BYTES_MAX 1024u

/* The service's TLS identity: PKCS#8 DER in secret memory, certificate DER in the clear. */
struct cm_tls_identity {
    struct cm_secret *key; /* u32 LE size ‖ PKCS#8 DER */
    uint8_t certificate[CM_CERTIFICATE_BYTES_MAX];
    uint32_t certificate_bytes;
    uint8_t key_digest[CM_DIGEST_BYTES]; /* SHA-256 of the SubjectPublicKeyInfo */
};

/* A fresh P-256 key and a self-signed certificate for the names (DNS names or IP addresses), 90
 * days. */
CM_MUST_USE enum cm_status cm_tls_identity_make(const char (*names)[CM_NAME_BYTES], uint32_t count,
                                                struct cm_tls_identity *ret_identity,
                                                struct cm_error *err);

/* That of an earlier keeper: u32 LE size ‖ PKCS#8 DER, and the certificate, by which the key is
 * named. Whether the two match the gateway checks, which serves with both. Fails: INPUT. */
CM_MUST_USE enum cm_status cm_tls_identity_take(const uint8_t page[static CM_KEY_PAGE_BYTES],
                                                const struct cm_tls_page *certificate,
                                                struct cm_tls_identity *ret_identity,
                                                struct cm_error *err);

/* A key page, made before the filter closes and filled for each generation of its receiver: whoever
 * had it before is dead when the supervisor asks again. */
struct cm_page {
    int fd;
    uint8_t *bytes; /* mapped for the keeper's life; zero but between hand-out and the wipe */
    bool secret_memory;
};

#define CM_KEEPER_RATE_COUNT 8u
struct cm_keeper_rate { /* times of the last hand-outs */
    uint64_t at_us[CM_KEEPER_RATE_COUNT];
    uint32_t next;
};

struct cm_keeper_adapter {
    struct cm_secret *key;
    struct cm_keeper_rate rate;
    /* what evidence says of it; serial 0: there is no key here */
    struct cm_evidence_adapter facts;
};

/* Memory that others read evidence from: made before the filter closes, written by us alone. One
 * for the service's own and one for a client's, so that neither is overwritten while it is read. */
struct cm_keeper_evidence_memory {
    int fd;
    uint8_t *bytes; /* CM_EVIDENCE_BYTES_MAX */
};

struct cm_keeper {
    struct cm_channel channel;
    struct cm_confinement confinement;
    struct cm_log log;
    struct cm_config_keeper config;
    struct cm_tpm *tpm; /* open for the keeper's life */
    struct cm_package_head head;
    struct cm_enrolment enrolment;
    struct cm_measurement measurement;
    struct cm_event event; /* a program under construction */
    struct cm_digest_cache digests;
    bool capped, tls_handed;
    struct cm_policy_state state; /* that unsealed: its PCRs are what is quoted */
    struct cm_tpm_boot boot;
    bool quoted; /* the counts of the first quote */
    uint32_t quoted_reset_count, quoted_restart_count;
    struct cm_secret *package_key;
    struct cm_tls_identity tls;
    struct cm_page key_page, tls_page;
    struct cm_page identity_page; /* the TLS key, for the next keeper; none follows: not made */
    struct cm_keeper_evidence_memory evidence[2]; /* by kind, from CM_QUOTE_BOOT on */
    uint32_t handed_generation;
    struct cm_keeper_rate rate;
    struct cm_keeper_adapter adapters[CM_ADAPTERS_MAX];
};

/* Take MEASURE frames until UNSEAL. */
CM_MUST_USE enum cm_status cm_keeper_measure(struct cm_keeper *keeper, struct cm_error *err);
/* Add the package's event and bring the PCR to the end of all events. Fails: POLICY CM-SEAL-BOOT.
 */
CM_MUST_USE enum cm_status cm_keeper_extend(struct cm_keeper *keeper, struct cm_error *err);
/* Strict mode, after the load: TLS key and "ready"; nothing unseals in this boot any more. */
CM_MUST_USE enum cm_status cm_keeper_cap(struct cm_keeper *keeper, struct cm_error *err);

/* Fails: POLICY CM-SEAL-RESET where the TPM or our PCR is not as it was at the unseal. */
CM_MUST_USE enum cm_status cm_keeper_boot_check(struct cm_keeper *keeper, struct cm_error *err);
/* The two pieces of evidence memory. */
CM_MUST_USE enum cm_status cm_keeper_evidence_prepare(struct cm_keeper *keeper,
                                                      struct cm_error *err);
/* Evidence into the memory of its kind; *ret_fd stays ours. Checks the boot first. */
CM_MUST_USE enum cm_status cm_keeper_evidence(struct cm_keeper *keeper,
                                              const struct cm_quote_request *request, int *ret_fd,
                                              uint32_t *ret_bytes, struct cm_error *err);

/* Read head and policy list from CM_FD_INPUT, unseal, authenticate the head. */
CM_MUST_USE enum cm_status cm_keeper_unseal(struct cm_keeper *keeper, struct cm_error *err);
CM_MUST_USE enum cm_status cm_keeper_page_make(struct cm_page *page, struct cm_error *err);
/* identity.c: the service's TLS identity, taken from an earlier keeper or made. `frame`: room. */
CM_MUST_USE enum cm_status cm_keeper_identity(struct cm_keeper *keeper, struct cm_frame *frame,
                                              struct cm_error *err);
/* Leave it for the next keeper, if one may follow. Not before what is measured has been received:
 * the kernel counts the descriptors under way of all of a user's processes, and an ordinary user's
 * roles share one (ETOOMANYREFS, sendmsg(2)). */
CM_MUST_USE enum cm_status cm_keeper_identity_leave(struct cm_keeper *keeper, struct cm_error *err);

/* What serving needs and the serving filter does not let it make: two pages, heap enough. */
CM_MUST_USE enum cm_status cm_keeper_prepare(struct cm_keeper *keeper, struct cm_error *err);
/* Until STOP, or the supervisor is gone. */
CM_MUST_USE enum cm_status cm_keeper_serve(struct cm_keeper *keeper, struct cm_error *err);
/* At most CM_KEEPER_RATE_COUNT hand-outs of one key a minute. Fails: BUSY CM-KEEPER-RATE. */
CM_MUST_USE enum cm_status cm_keeper_rate_check(struct cm_keeper_rate *rate, struct cm_error *err);
/* The worker says that it has wiped the page: look, and wipe it in any case. */
void cm_keeper_page_check(struct cm_keeper *keeper);

/* adapters.c: memory for their keys; the three frames about them. */
CM_MUST_USE enum cm_status cm_keeper_adapters_prepare(struct cm_keeper *keeper,
                                                      struct cm_error *err);
void cm_keeper_adapters_wipe(struct cm_keeper *keeper);
CM_MUST_USE enum cm_status cm_keeper_adapter_open(struct cm_keeper *keeper, struct cm_frame *frame,
                                                  struct cm_error *err);
CM_MUST_USE enum cm_status
cm_keeper_adapter_key(struct cm_keeper *keeper, const struct cm_frame *frame, struct cm_error *err);
void cm_keeper_adapter_close(struct cm_keeper *keeper, const struct cm_frame *frame);

/* Wipe keys and pages; the process ends after it. over: so does the service, and no keeper needs
 * the identity any more. */
void cm_keeper_wipe(struct cm_keeper *keeper, bool over);

#endif
