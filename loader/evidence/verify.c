/* The checks, in the order of the table at the end. Nothing later is looked at before what it rests
 * on: first whose word it is, then what was said, then whether it is accepted. */
#include "loader/evidence/verify.h"

#include <openssl/evp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "loader/tpm/internal.h"

struct verification {
    const struct cm_evidence_question *q;
    const struct cm_evidence *e;
    struct cm_evidence_facts *facts;
    uint8_t ak[CM_PUBLIC_KEY_BYTES];
    uint32_t package_event; /* its index in the log */
    struct cm_error *err;
};

__attribute__((format(printf, 3, 4))) static enum cm_status
refuse(struct verification *v, const char *id, const char *format, ...)
{
    char text[CM_ERROR_TEXT_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    return cm_error_set(v->err, CM_E_EVIDENCE, id, "%s", text);
}

/* First bytes of a digest, for people. */
struct brief {
    char text[20];
};
static struct brief brief(const uint8_t *digest)
{
    struct brief brief;
    snprintf(brief.text, sizeof(brief.text), "%02x%02x%02x%02x%02x%02x…", digest[0], digest[1],
             digest[2], digest[3], digest[4], digest[5]);
    return brief;
}

static bool same(const uint8_t *a, const uint8_t *b)
{
    return memcmp(a, b, CM_DIGEST_BYTES) == 0;
}

static bool zero(const uint8_t *bytes)
{
    static const uint8_t zeros[CM_DIGEST_BYTES];
    return same(bytes, zeros);
}

/* ------------------------------------------------------------------ whose word */

static enum cm_status check_enrolment(struct verification *v)
{
    struct cm_error cause;
    if (cm_enrolment_parse(v->e->enrolment, v->e->enrolment_bytes, &v->facts->enrolment, &cause) !=
        CM_OK) {
        return refuse(v, "CM-EVD-ENROLMENT", "%s", cause.text);
    }
    return CM_OK;
}

/* The AK is pinned; that its TPM is a real one, a maker says. */
static enum cm_status check_ek(struct verification *v)
{
    struct cm_error cause;
    if (cm_ek_certificate_check(&v->facts->enrolment, &v->q->trust->ek_authorities,
                                v->q->now_unix_s, &cause) != CM_OK) {
        return refuse(v, cause.id, "%s", cause.text);
    }
    return CM_OK;
}

static enum cm_status check_node(struct verification *v)
{
    const struct cm_enrolment *enrolment = &v->facts->enrolment;
    const struct cm_trust *trust = v->q->trust;
    uint8_t name[CM_TPM_NAME_BYTES];
    uint32_t attributes;
    if (cm_tpm_name(enrolment->ak_public, enrolment->ak_public_bytes, name, v->err) != CM_OK ||
        !cm_tpm_ecc_public(enrolment->ak_public, enrolment->ak_public_bytes, &attributes, v->ak)) {
        return refuse(v, "CM-EVD-ENROLMENT", "the attestation key is malformed");
    }
    for (uint32_t i = 0; i < trust->node_count; i++) {
        if (same(trust->nodes[i].ek, enrolment->node)) {
            return same(trust->nodes[i].ak, name + 2)
                       ? CM_OK
                       : refuse(v, "CM-EVD-AK",
                                "node %s has attestation key %s, the trust file says %s: it was "
                                "enrolled again, or is not this node",
                                enrolment->node_name, brief(name + 2).text,
                                brief(trust->nodes[i].ak).text);
        }
    }
    for (uint32_t i = 0; i < trust->ak_count; i++) {
        if (same(trust->aks[i], name + 2)) {
            return check_ek(v);
        }
    }
    return refuse(
        v, "CM-EVD-NODE",
        "the TPM with endorsement key %s (node %s) is not in the trust file: add it after "
        "you have enrolled it yourself",
        brief(enrolment->node).text, enrolment->node_name);
}

static enum cm_status check_development(struct verification *v)
{
    return !v->facts->enrolment.development || v->q->trust->development
               ? CM_OK
               : refuse(
                     v, "CM-EVD-DEVELOPMENT",
                     "the evidence is of a development TPM, which protects nothing: `development "
                     "allowed` in the trust file accepts it for a demonstration");
}

static enum cm_status check_attest(struct verification *v)
{
    return cm_attest_parse(v->e->attest, v->e->attest_bytes, &v->facts->attest, v->err);
}

static enum cm_status check_signature(struct verification *v)
{
    uint8_t digest[CM_DIGEST_BYTES];
    if (EVP_Digest(v->e->attest, v->e->attest_bytes, digest, NULL, EVP_sha256(), NULL) != 1 ||
        !cm_tpm_signature_good(v->ak, digest, v->e->attest_signature)) {
        return refuse(v, "CM-EVD-SIGNATURE",
                      "the quote is not signed by the node's attestation key: it was changed");
    }
    return CM_OK;
}

/* ------------------------------------------------------------------ for whom */

static enum cm_status check_kind(struct verification *v)
{
    bool session = v->e->kind == CM_QUOTE_SESSION;
    if ((v->q->live != NULL || v->q->nonce != NULL) && !session) {
        return refuse(v, "CM-EVD-KIND",
                      "evidence of kind boot answers no nonce: ask for a session's");
    }
    if (!session && (!zero(v->e->nonce) || !zero(v->e->exporter))) {
        return refuse(v, "CM-EVD-KIND", "evidence of kind boot carries a nonce or an exporter");
    }
    return CM_OK;
}

static enum cm_status check_nonce(struct verification *v)
{
    const uint8_t *wanted = v->q->live != NULL ? v->q->live->nonce : v->q->nonce;
    return wanted == NULL || same(wanted, v->e->nonce)
               ? CM_OK
               : refuse(v, "CM-EVD-NONCE",
                        "nonce is %s, expected %s: the evidence answers somebody else's question",
                        brief(v->e->nonce).text, brief(wanted).text);
}

static enum cm_status check_tls_key(struct verification *v)
{
    return v->q->live == NULL || same(v->q->live->tls_key_digest, v->e->tls_key_digest)
               ? CM_OK
               : refuse(v, "CM-EVD-TLS-KEY",
                        "the host attests TLS key %s, this connection's is %s: somebody stands "
                        "between",
                        brief(v->e->tls_key_digest).text, brief(v->q->live->tls_key_digest).text);
}

static enum cm_status check_exporter(struct verification *v)
{
    return v->q->live == NULL || same(v->q->live->exporter, v->e->exporter)
               ? CM_OK
               : refuse(v, "CM-EVD-EXPORTER",
                        "the evidence is bound to another TLS connection than this one: it was "
                        "relayed");
}

static enum cm_status check_quote_data(struct verification *v)
{
    uint8_t wanted[CM_DIGEST_BYTES];
    const struct cm_attest *attest = &v->facts->attest;
    if (cm_evidence_quote_data(v->e, wanted, v->err) != CM_OK ||
        attest->extra_bytes != sizeof(wanted) || !same(attest->extra, wanted)) {
        return refuse(
            v, "CM-EVD-QUOTE-DATA",
            "the quote covers other data than the evidence says: nonce, TLS key, exporter, "
            "package or adapters were changed");
    }
    return CM_OK;
}

/* ------------------------------------------------------------------ what was said */

static const uint8_t *pcr_value(const struct verification *v, uint32_t pcr)
{
    for (uint32_t i = 0; i < v->e->pcr_count; i++) {
        if (v->e->pcrs[i] == pcr) {
            return v->e->pcr_values[i];
        }
    }
    return NULL;
}

static enum cm_status check_selection(struct verification *v)
{
    uint32_t given = 0;
    for (uint32_t i = 0; i < v->e->pcr_count; i++) {
        given |= 1u << v->e->pcrs[i];
    }
    if (given != v->facts->attest.pcrs || pcr_value(v, v->facts->enrolment.pcr) == NULL) {
        return refuse(
            v, "CM-EVD-SELECTION",
            "the quote selects PCRs 0x%06x, the evidence gives values of 0x%06x, and PCR %u "
            "must be among them",
            v->facts->attest.pcrs, given, v->facts->enrolment.pcr);
    }
    return CM_OK;
}

static enum cm_status check_pcr_digest(struct verification *v)
{
    uint8_t digest[CM_DIGEST_BYTES];
    if (EVP_Digest(v->e->pcr_values, v->e->pcr_count * sizeof(v->e->pcr_values[0]), digest, NULL,
                   EVP_sha256(), NULL) != 1 ||
        !same(digest, v->facts->attest.pcr_digest)) {
        return refuse(v, "CM-EVD-PCR-DIGEST", "the PCR values are not those that were quoted");
    }
    return CM_OK;
}

static enum cm_status check_log(struct verification *v)
{
    return cm_measurement_parse(v->e->log, v->e->log_bytes, &v->facts->log, v->err);
}

static enum cm_status check_replay(struct verification *v)
{
    uint8_t pcr[CM_DIGEST_BYTES];
    const uint8_t *quoted = pcr_value(v, v->facts->enrolment.pcr);
    memcpy(pcr, v->facts->enrolment.pcr_value, sizeof(pcr));
    if (cm_measurement_replay(&v->facts->log, 0, v->facts->log.count, pcr, v->err) != CM_OK ||
        !same(pcr, quoted)) {
        return refuse(v, "CM-EVD-REPLAY",
                      "the log leads to PCR %u = %s, quoted is %s: an event is missing, added or "
                      "changed",
                      v->facts->enrolment.pcr, brief(pcr).text, brief(quoted).text);
    }
    return CM_OK;
}

static enum cm_status check_package(struct verification *v)
{
    const struct cm_measurement *log = &v->facts->log;
    for (uint32_t i = 0; i < log->count; i++) {
        const struct cm_event *event = &log->events[i];
        if (event->type == CM_EVENT_PACKAGE) {
            v->package_event = i;
            return event->bytes == CM_DIGEST_BYTES && same(event->data, v->e->core_digest)
                       ? CM_OK
                       : refuse(v, "CM-EVD-PACKAGE",
                                "the measured package is not the one that the evidence names");
        }
    }
    return refuse(v, "CM-EVD-PACKAGE", "no package was measured");
}

/* Strict: exactly the cap after the package. Restartable: nothing. */
static enum cm_status check_mode(struct verification *v)
{
    const struct cm_measurement *log = &v->facts->log;
    const struct cm_event *later = &log->events[v->package_event + 1];
    uint32_t count = log->count - v->package_event - 1;
    if (v->e->mode == CM_ATTEST_RESTARTABLE) {
        return count == 0
                   ? CM_OK
                   : refuse(v, "CM-EVD-LATER-EVENT",
                            "%u events follow the package in restartable mode, expected none",
                            count);
    }
    if (count != 2 || later[0].type != CM_EVENT_TLS_KEY || later[1].type != CM_EVENT_READY ||
        later[1].bytes != 0) {
        return refuse(v, "CM-EVD-LATER-EVENT",
                      "%u events follow the package in strict mode, expected tls-key and ready",
                      count);
    }
    if (later[0].bytes != CM_DIGEST_BYTES || !same(later[0].data, v->e->tls_key_digest)) {
        return refuse(v, "CM-EVD-MODE", "the measured TLS key is not the one that is attested");
    }
    return CM_OK;
}

/* ------------------------------------------------------------------ is it accepted */

static bool pcr_accepted(const struct cm_trust *trust, uint32_t pcr, const uint8_t *value,
                         bool *ret_named)
{
    *ret_named = false;
    for (uint32_t i = 0; i < trust->pcr_count; i++) {
        bool this_one = trust->pcrs[i].pcr == pcr;
        *ret_named = *ret_named || this_one;
        if (this_one && value != NULL && same(trust->pcrs[i].value, value)) {
            return true;
        }
    }
    return false;
}

static enum cm_status check_pcr_value(struct verification *v)
{
    uint8_t ours[CM_DIGEST_BYTES];
    uint32_t our_pcr = v->facts->enrolment.pcr;
    bool named;
    memcpy(ours, v->facts->enrolment.pcr_value, sizeof(ours));
    if (cm_measurement_replay(&v->facts->log, 0, v->package_event + 1, ours, v->err) != CM_OK) {
        return CM_E_EVIDENCE;
    }
    for (uint32_t pcr = 0; pcr < 24; pcr++) {
        const uint8_t *value = pcr == our_pcr ? ours : pcr_value(v, pcr);
        bool accepted = pcr_accepted(v->q->trust, pcr, value, &named);
        if ((named || pcr == our_pcr) && !accepted) {
            return refuse(v, "CM-EVD-PCR-VALUE",
                          "PCR %u is %s, which the trust file does not accept: ask `casemate "
                          "policy explain` on the node what differs",
                          pcr, value != NULL ? brief(value).text : "not quoted");
        }
    }
    return CM_OK;
}

static enum cm_status check_owner(struct verification *v)
{
    const struct cm_trust *trust = v->q->trust;
    bool known = false;
    for (uint32_t i = 0; i < trust->owner_count; i++) {
        known = known || memcmp(trust->owners[i], v->e->owner_key, CM_PUBLIC_KEY_BYTES) == 0;
    }
    if (!known) {
        return refuse(v, "CM-EVD-OWNER", "the package's owner %s is not in the trust file",
                      brief(v->e->owner_key + 1).text);
    }
    return cm_tpm_signature_good(v->e->owner_key, v->e->core_digest, v->e->owner_signature)
               ? CM_OK
               : refuse(v, "CM-EVD-OWNER-SIGNATURE", "the owner has not signed this package");
}

static enum cm_status check_package_known(struct verification *v)
{
    const struct cm_trust *trust = v->q->trust;
    bool known = trust->package_count == 0;
    for (uint32_t i = 0; i < trust->package_count; i++) {
        known = known || same(trust->packages[i], v->e->core_digest);
    }
    return known ? CM_OK
                 : refuse(v, "CM-EVD-UNKNOWN-PACKAGE", "package %s is not in the trust file",
                          brief(v->e->core_digest).text);
}

static bool adapter_accepted(const struct cm_trust *trust,
                             const struct cm_evidence_adapter *adapter)
{
    bool accepted = !trust->adapters_judged;
    for (uint32_t i = 0; i < trust->adapter_count; i++) {
        accepted = accepted || same(trust->adapters[i], adapter->core_digest);
    }
    for (uint32_t i = 0; i < trust->adapter_owner_count; i++) {
        accepted = accepted ||
                   memcmp(trust->adapter_owners[i], adapter->owner_key, CM_PUBLIC_KEY_BYTES) == 0;
    }
    return accepted;
}

static enum cm_status check_adapters(struct verification *v)
{
    for (uint32_t i = 0; i < v->e->adapter_count; i++) {
        const struct cm_evidence_adapter *adapter = &v->e->adapters[i];
        if (!cm_tpm_signature_good(adapter->owner_key, adapter->core_digest,
                                   adapter->owner_signature)) {
            return refuse(v, "CM-EVD-ADAPTER-SIGNATURE", "its owner has not signed the adapter %s",
                          adapter->name);
        }
        if (!adapter_accepted(v->q->trust, adapter)) {
            return refuse(
                v, "CM-EVD-ADAPTER",
                "the adapter %s (package %s, owner %s) can be loaded there, and the trust "
                "file accepts neither: have it removed, or add an `adapter` line",
                adapter->name, brief(adapter->core_digest).text,
                brief(adapter->owner_key + 1).text);
        }
    }
    return CM_OK;
}

static enum cm_status check_age(struct verification *v)
{
    uint64_t now = v->q->now_unix_s, made = v->e->made_unix_s;
    if (made > now && made - now > CM_EVIDENCE_FUTURE_MAX_S) {
        return refuse(v, "CM-EVD-FUTURE",
                      "the evidence was made %llu s from now: set a clock right",
                      (unsigned long long)(made - now));
    }
    if (made < now && now - made > CM_EVIDENCE_AGE_MAX_S) {
        return refuse(v, "CM-EVD-AGE", "the evidence is %llu s old, at most %u: fetch it anew",
                      (unsigned long long)(now - made), CM_EVIDENCE_AGE_MAX_S);
    }
    return CM_OK;
}

static enum cm_status check_clock(struct verification *v)
{
    const struct cm_evidence_last *last = v->q->last;
    const struct cm_attest *now = &v->facts->attest;
    if (last == NULL || now->reset_count > last->reset_count) {
        return CM_OK;
    }
    bool back = now->reset_count < last->reset_count || now->restart_count < last->restart_count ||
                now->clock_ms < last->clock_ms;
    return !back ? CM_OK
                 : refuse(v, "CM-EVD-CLOCK",
                          "the TPM's clock went back (reset %u, clock %llu ms; last time %u, %llu "
                          "ms): it was copied or its past was restored",
                          now->reset_count, (unsigned long long)now->clock_ms, last->reset_count,
                          (unsigned long long)last->clock_ms);
}

static enum cm_status (*const checks[])(struct verification *v) = {
    check_enrolment, check_node,       check_development, check_attest,        check_signature,
    check_kind,      check_nonce,      check_tls_key,     check_exporter,      check_quote_data,
    check_selection, check_pcr_digest, check_log,         check_replay,        check_package,
    check_mode,      check_pcr_value,  check_owner,       check_package_known, check_adapters,
    check_age,       check_clock,
};

enum cm_status cm_evidence_verify(const struct cm_evidence_question *question,
                                  struct cm_evidence_facts *ret_facts, struct cm_error *err)
{
    struct cm_error own;
    struct verification v = {.q = question,
                             .e = question->evidence,
                             .facts = ret_facts,
                             .err = err != NULL ? err : &own};
    memset(ret_facts, 0, sizeof(*ret_facts));
    for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++) {
        enum cm_status status = checks[i](&v);
        if (status != CM_OK) {
            return status;
        }
    }
    return CM_OK;
}
