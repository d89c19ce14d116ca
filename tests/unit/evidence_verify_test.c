/* One negative vector for each check of the verifier, made by an attacker who holds the node's own
 * attestation key, so that the signature is right wherever it is not the thing that is wrong. */
#include <criterion/criterion.h>

#include <openssl/x509v3.h>

#include "loader/evidence/verify.h"
#include "loader/tpm/internal.h"
#include "tests/unit/p256.h"

#define NOW 1800000000u

struct scene {
    EVP_PKEY *ak, *owner, *ek, *tenant;
    struct cm_enrolment enrolment;
    struct cm_measurement log;
    struct cm_evidence evidence;
    struct cm_trust trust;
    struct cm_evidence_live live;
    struct cm_evidence_last last;
    struct cm_evidence_question question;
    /* of the quote */
    uint32_t magic, type, hash, selected, banks;
    bool data_wrong, digest_wrong;
};

static struct scene s;
static struct cm_error err;

static uint32_t public_make(EVP_PKEY *key, uint32_t attributes, bool decrypts, uint8_t *ret)
{
    uint8_t point[CM_PUBLIC_KEY_BYTES], area[256];
    struct cm_be body = {area, sizeof(area), 0, false}, whole = {ret, 512, 0, false};
    p256_point(key, point);
    cm_be_u16(&body, CM_TPM_ALG_ECC);
    cm_be_u16(&body, CM_TPM_ALG_SHA256);
    cm_be_u32(&body, attributes);
    cm_be_u16(&body, 0);
    cm_be_u16(&body, decrypts ? CM_TPM_ALG_AES : CM_TPM_ALG_NULL);
    if (decrypts) {
        cm_be_u16(&body, 128);
        cm_be_u16(&body, CM_TPM_ALG_CFB);
    }
    cm_be_u16(&body, CM_TPM_ALG_NULL);
    cm_be_u16(&body, CM_TPM_ECC_P256);
    cm_be_u16(&body, CM_TPM_ALG_NULL);
    cm_be_sized(&body, point + 1, 32);
    cm_be_sized(&body, point + 33, 32);
    cm_be_sized(&whole, area, body.used);
    return (uint32_t)whole.used;
}

static void enrolment_make(uint32_t ak_attributes)
{
    struct cm_enrolment *e = &s.enrolment;
    EVP_PKEY *ek = s.ek, *srk = EVP_EC_gen("P-256");
    uint8_t name[CM_TPM_NAME_BYTES], digest[CM_DIGEST_BYTES];
    *e = (struct cm_enrolment){.node_name = "node", .pcr = 14, .counter_value = 1};
    e->ek_public_bytes = public_make(ek, CM_TPM_EK_ATTRIBUTES, true, e->ek_public);
    e->srk_public_bytes = public_make(srk, CM_TPM_SRK_ATTRIBUTES, true, e->srk_public);
    e->ak_public_bytes = public_make(s.ak, ak_attributes, false, e->ak_public);
    cr_assert_eq(cm_tpm_name(e->ek_public, e->ek_public_bytes, name, &err), CM_OK);
    memcpy(e->node, name + 2, CM_DIGEST_BYTES);
    cr_assert_eq(cm_tpm_counter_name(e->counter_handle, e->node, e->counter_name, &err), CM_OK);
    cr_assert_eq(cm_enrolment_digest(e, digest, &err), CM_OK);
    p256_sign(s.ak, digest, e->signature);
    EVP_PKEY_free(srk);
}

static void enrolment_sign(void)
{
    uint8_t digest[CM_DIGEST_BYTES];
    cr_assert_eq(cm_enrolment_digest(&s.enrolment, digest, &err), CM_OK);
    p256_sign(s.ak, digest, s.enrolment.signature);
}

static void extension_add(X509 *certificate, int kind, const char *value)
{
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, NULL, kind, value);
    cr_assert(extension != NULL && X509_add_ext(certificate, extension, -1) == 1);
    X509_EXTENSION_free(extension);
}

/* A maker's certificate over a key; usage NULL: an authority's, for itself or (under) another. */
static uint32_t certificate_make(EVP_PKEY *key, EVP_PKEY *maker, const char *name,
                                 const char *issuer, const char *usage, long from, long until,
                                 uint8_t *ret_der)
{
    X509 *certificate = X509_new();
    uint8_t *at = ret_der;
    X509_set_version(certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC,
                               (const uint8_t *)name, -1, -1, 0);
    X509_NAME_add_entry_by_txt(X509_get_issuer_name(certificate), "CN", MBSTRING_ASC,
                               (const uint8_t *)issuer, -1, -1, 0);
    ASN1_TIME_set(X509_getm_notBefore(certificate), (time_t)NOW + from);
    ASN1_TIME_set(X509_getm_notAfter(certificate), (time_t)NOW + until);
    X509_set_pubkey(certificate, key);
    extension_add(certificate, NID_basic_constraints,
                  usage == NULL ? "critical,CA:TRUE" : "critical,CA:FALSE");
    if (usage != NULL && usage[0] != '\0') {
        extension_add(certificate, NID_ext_key_usage, usage);
    }
    cr_assert_gt(X509_sign(certificate, maker, EVP_sha256()), 0);
    int size = i2d_X509(certificate, NULL);
    cr_assert(size > 0 && size <= (int)CM_EK_CERTIFICATE_MAX);
    i2d_X509(certificate, &at);
    X509_free(certificate);
    return (uint32_t)size;
}

/* A root that the trust file names, and its certificate for the EK. The AK alone is pinned. */
struct ek_scene {
    const char *usage; /* of the EK's certificate */
    long from, until;
    bool other_key, other_root, itself_root;
};
static void ek_certified(struct ek_scene how)
{
    EVP_PKEY *root = EVP_EC_gen("P-256"), *stranger = EVP_EC_gen("P-256");
    struct cm_ek_authorities *authorities = &s.trust.ek_authorities;
    struct cm_enrolment *e = &s.enrolment;
    authorities->count = 1;
    authorities->rows[0].bytes = certificate_make(root, root, "maker", "maker", NULL, -1000,
                                                  1000000, authorities->rows[0].der);
    e->ek_certificate_bytes = certificate_make(
        how.other_key ? stranger : s.ek, how.other_root ? stranger : root, "", "maker",
        how.itself_root ? NULL : how.usage, how.from, how.until, e->ek_certificate);
    enrolment_sign();
    s.trust.node_count = 0;
    s.trust.ak_count = 1;
    cr_assert_eq(cm_enrolment_ak_digest(e, s.trust.aks[0], &err), CM_OK);
    EVP_PKEY_free(root);
    EVP_PKEY_free(stranger);
}

static void log_make(void)
{
    struct cm_measurement *m = &s.log;
    m->count = 0;
    cr_assert_eq(cm_measurement_add(m, CM_EVENT_PROGRAM, "program", 8, &err), CM_OK);
    cr_assert_eq(cm_measurement_add(m, CM_EVENT_CONFIGURATION, "text", 4, &err), CM_OK);
    cr_assert_eq(cm_measurement_add(m, CM_EVENT_PACKAGE, s.evidence.core_digest, 32, &err), CM_OK);
}

/* Everything right, and not yet sealed. */
static void scene_make(void)
{
    uint8_t digest[CM_DIGEST_BYTES];
    memset(&s, 0, sizeof(s));
    s.ak = EVP_EC_gen("P-256");
    s.owner = EVP_EC_gen("P-256");
    s.ek = EVP_EC_gen("P-256");
    s.tenant = EVP_EC_gen("P-256");
    s.magic = 0xff544347u;
    s.type = 0x8018u;
    s.hash = CM_TPM_ALG_SHA256;
    s.banks = 1;
    s.selected = 1u << 14 | 1u << 7;
    struct cm_evidence *e = &s.evidence;
    *e = (struct cm_evidence){.kind = CM_QUOTE_SESSION,
                              .mode = CM_ATTEST_RESTARTABLE,
                              .made_unix_s = NOW,
                              .pcr_count = 2,
                              .pcrs = {7, 14}};
    memset(e->nonce, 1, 32);
    memset(e->tls_key_digest, 2, 32);
    memset(e->exporter, 3, 32);
    memset(e->core_digest, 4, 32);
    p256_point(s.owner, e->owner_key);
    p256_sign(s.owner, e->core_digest, e->owner_signature);
    enrolment_make(CM_TPM_AK_ATTRIBUTES);
    log_make();
    memcpy(s.live.nonce, e->nonce, 32);
    memcpy(s.live.tls_key_digest, e->tls_key_digest, 32);
    memcpy(s.live.exporter, e->exporter, 32);
    struct cm_trust *t = &s.trust;
    memcpy(t->nodes[0].ek, s.enrolment.node, 32);
    cr_assert_eq(cm_enrolment_ak_digest(&s.enrolment, t->nodes[0].ak, &err), CM_OK);
    memcpy(t->owners[0], e->owner_key, CM_PUBLIC_KEY_BYTES);
    t->node_count = t->owner_count = 1;
    t->pcrs[0].pcr = 14;
    memset(digest, 0, sizeof(digest));
    cr_assert_eq(cm_measurement_replay(&s.log, 0, s.log.count, digest, &err), CM_OK);
    memcpy(t->pcrs[0].value, digest, 32);
    t->pcrs[1].pcr = 7;
    t->pcr_count = 2;
    s.question = (struct cm_evidence_question){
        .evidence = e, .trust = t, .live = &s.live, .last = &s.last, .now_unix_s = NOW};
}

/* Log, PCR values, quote, signature: as a TPM of the attacker's choice would. */
static void scene_seal(void)
{
    struct cm_evidence *e = &s.evidence;
    struct cm_be be = {e->attest, sizeof(e->attest), 0, false};
    uint8_t data[CM_DIGEST_BYTES], digest[CM_DIGEST_BYTES];
    size_t used;
    cr_assert_eq(cm_enrolment_encode(&s.enrolment, e->enrolment, sizeof(e->enrolment), &used, &err),
                 CM_OK);
    e->enrolment_bytes = (uint32_t)used;
    cr_assert_eq(cm_measurement_encode(&s.log, e->log, sizeof(e->log), &used, &err), CM_OK);
    e->log_bytes = (uint32_t)used;
    memset(e->pcr_values[1], 0, 32);
    cr_assert_eq(cm_measurement_replay(&s.log, 0, s.log.count, e->pcr_values[1], &err), CM_OK);
    cr_assert_eq(cm_evidence_quote_data(e, data, &err), CM_OK);
    data[0] = (uint8_t)(data[0] ^ s.data_wrong);
    EVP_Digest(e->pcr_values, e->pcr_count * 32ul, digest, NULL, EVP_sha256(), NULL);
    digest[0] = (uint8_t)(digest[0] ^ s.digest_wrong);
    cm_be_u32(&be, s.magic);
    cm_be_u16(&be, s.type);
    cm_be_sized(&be, "signer", 6);
    cm_be_sized(&be, data, 32);
    cm_be_u64(&be, 1000);
    cm_be_u32(&be, 5);
    cm_be_u32(&be, 0);
    cm_be_bytes(&be, "\1firmware", 9);
    cm_be_u32(&be, s.banks);
    for (uint32_t i = 0; i < s.banks; i++) {
        const uint8_t bits[] = {3, (uint8_t)s.selected, (uint8_t)(s.selected >> 8),
                                (uint8_t)(s.selected >> 16)};
        cm_be_u16(&be, i == 0 ? s.hash : 4 /* SHA-1 */);
        cm_be_bytes(&be, bits, 4);
    }
    cm_be_sized(&be, digest, 32);
    e->attest_bytes = (uint32_t)be.used;
    EVP_Digest(e->attest, e->attest_bytes, digest, NULL, EVP_sha256(), NULL);
    p256_sign(s.ak, digest, e->attest_signature);
}

static void scene_done(void)
{
    EVP_PKEY_free(s.ak);
    EVP_PKEY_free(s.owner);
    EVP_PKEY_free(s.ek);
    EVP_PKEY_free(s.tenant);
}

static void expect(const char *id)
{
    struct cm_evidence_facts facts;
    enum cm_status status = cm_evidence_verify(&s.question, &facts, &err);
    if (id == NULL) {
        cr_assert_eq(status, CM_OK, "%s: %s", err.id, err.text);
        return;
    }
    cr_assert_eq(status, CM_E_EVIDENCE);
    cr_assert_str_eq(err.id, id, "%s: %s", err.id, err.text);
    cr_assert(strchr(err.text, '\n') == NULL && strlen(err.text) > 20);
}

/* ------------------------------------------------------------------ before the seal */

static void nothing(void)
{
}
static void magic(void)
{
    s.magic ^= 1;
}
static void type(void)
{
    s.type = 0x8017;
}
static void bank(void)
{
    s.hash = 4;
} /* SHA-1 */
static void bank_more(void)
{
    s.banks = 2;
}
static void selection(void)
{
    s.selected = 1u << 23 | 1u << 7;
} /* the PCR that anyone resets */
static void selection_more(void)
{
    s.selected |= 1u << 3;
}
static void quote_data(void)
{
    s.data_wrong = true;
}
static void pcr_digest(void)
{
    s.digest_wrong = true;
}
static void ak_loose(void)
{
    enrolment_make(CM_TPM_AK_ATTRIBUTES & ~CM_TPMA_RESTRICTED);
}
static void node_unknown(void)
{
    s.trust.nodes[0].ek[0] ^= 1;
}
static void ak_other(void)
{
    s.trust.nodes[0].ak[0] ^= 1;
}
static void boot_kind(void)
{
    s.evidence.kind = CM_QUOTE_BOOT;
}
static void nonce_other(void)
{
    s.evidence.nonce[0] ^= 1;
}
static void tls_other(void)
{
    s.evidence.tls_key_digest[0] ^= 1;
}
static void exporter_other(void)
{
    s.evidence.exporter[0] ^= 1;
}
static void package_other(void)
{
    s.log.events[2].data[0] ^= 1;
}
static void package_none(void)
{
    s.log.count = 2;
}
static void later_event(void)
{
    cr_assert_eq(cm_measurement_add(&s.log, CM_EVENT_READY, NULL, 0, &err), CM_OK);
}
static void strict_uncapped(void)
{
    s.evidence.mode = CM_ATTEST_STRICT;
}
static void strict_other_key(void)
{
    const uint8_t other[32] = {9};
    s.evidence.mode = CM_ATTEST_STRICT;
    cr_assert_eq(cm_measurement_add(&s.log, CM_EVENT_TLS_KEY, other, 32, &err), CM_OK);
    later_event();
}
static void strict_good(void)
{
    s.evidence.mode = CM_ATTEST_STRICT;
    cr_assert_eq(cm_measurement_add(&s.log, CM_EVENT_TLS_KEY, s.evidence.tls_key_digest, 32, &err),
                 CM_OK);
    later_event();
}
static void program_other(void)
{
    s.log.events[0].data[0] ^= 1;
}
static void boot_chain_other(void)
{
    s.evidence.pcr_values[0][0] ^= 1;
}
static void pcr_not_quoted(void)
{
    s.trust.pcrs[1].pcr = 4;
}
static void owner_unknown(void)
{
    s.trust.owners[0][1] ^= 1;
}
static void owner_unsigned(void)
{
    s.evidence.owner_signature[40] ^= 1;
}
static void package_unknown(void)
{
    s.trust.package_count = 1;
}
static void old(void)
{
    s.evidence.made_unix_s = NOW - 601;
}
static void young(void)
{
    s.evidence.made_unix_s = NOW + 61;
}
static void clock_back(void)
{
    s.last = (struct cm_evidence_last){5, 0, 1001};
}
static void reset_back(void)
{
    s.last = (struct cm_evidence_last){6, 0, 0};
}
static void development(void)
{
    s.enrolment.development = true;
    enrolment_sign();
}
static void counter_that_goes_back(void)
{
    s.enrolment.counter_name[9] ^= 1; /* the name of an index with other attributes */
    enrolment_sign();
}
static void development_allowed(void)
{
    development();
    s.trust.development = true;
}

/* red is the package owner's, blue a tenant's */
static void adapters_two(void)
{
    EVP_PKEY *const owners[] = {s.owner, s.tenant};
    static const char *const names[] = {"red", "blue"};
    for (uint32_t i = 0; i < 2; i++) {
        struct cm_evidence_adapter *adapter = &s.evidence.adapters[i];
        *adapter = (struct cm_evidence_adapter){.serial = 7 + i};
        snprintf(adapter->name, sizeof(adapter->name), "%s", names[i]);
        memset(adapter->core_digest, 0x60 + (int)i, sizeof(adapter->core_digest));
        p256_point(owners[i], adapter->owner_key);
        p256_sign(owners[i], adapter->core_digest, adapter->owner_signature);
    }
    s.evidence.adapter_count = 2;
}
static void adapters_none_asked(void)
{
    s.trust.adapters_judged = true;
}
static void adapters_refused(void)
{
    adapters_two();
    adapters_none_asked();
}
static void adapter_unsigned(void)
{
    adapters_two();
    s.evidence.adapters[1].owner_signature[40] ^= 1;
}
static void adapter_signed_by_another(void)
{
    adapters_two();
    memcpy(s.evidence.adapters[1].owner_key, s.evidence.owner_key, CM_PUBLIC_KEY_BYTES);
}
static void adapter_owner_known(void)
{
    adapters_refused();
    memcpy(s.trust.adapter_owners[0], s.evidence.adapters[1].owner_key, CM_PUBLIC_KEY_BYTES);
    s.trust.adapter_owner_count = 1;
}
static void adapters_known(void) /* one by its digest, one by its owner */
{
    adapter_owner_known();
    memcpy(s.trust.adapters[0], s.evidence.adapters[0].core_digest, CM_DIGEST_BYTES);
    s.trust.adapter_count = 1;
}
static void adapter_other(void)
{
    adapters_known();
    s.trust.adapters[0][31] ^= 1;
}

#define EK_USAGE "2.23.133.8.1"
static void ek_good(void)
{
    ek_certified((struct ek_scene){.usage = EK_USAGE, .from = -9, .until = 9});
}
static void ek_good_without_usage(void)
{
    ek_certified((struct ek_scene){.usage = "", .from = -9, .until = 9});
}
static void ek_expired(void)
{
    ek_certified((struct ek_scene){.usage = EK_USAGE, .from = -9, .until = -1});
}
static void ek_too_early(void)
{
    ek_certified((struct ek_scene){.usage = EK_USAGE, .from = 1, .until = 9});
}
static void ek_other_key(void)
{
    ek_certified((struct ek_scene){.usage = EK_USAGE, .from = -9, .until = 9, .other_key = true});
}
static void ek_other_root(void)
{
    ek_certified((struct ek_scene){.usage = EK_USAGE, .from = -9, .until = 9, .other_root = true});
}
static void ek_for_servers(void)
{
    ek_certified((struct ek_scene){.usage = "serverAuth", .from = -9, .until = 9});
}
static void ek_an_authority(void)
{
    ek_certified((struct ek_scene){.from = -9, .until = 9, .itself_root = true});
}
static void ek_absent(void)
{
    ek_good();
    s.enrolment.ek_certificate_bytes = 0;
    enrolment_sign();
}
static void ek_longer(void)
{
    ek_good();
    s.enrolment.ek_certificate[s.enrolment.ek_certificate_bytes++] = 0;
    enrolment_sign();
}
static void ek_other_ak(void)
{
    ek_good();
    s.trust.aks[0][0] ^= 1;
}

/* ------------------------------------------------------------------ after it */

static void ek_certificate_changed(void)
{
    s.evidence.enrolment[s.evidence.enrolment_bytes - 1] ^= 1;
}

static void signature_changed(void)
{
    s.evidence.attest_signature[9] ^= 1;
}
static void enrolment_changed(void)
{
    s.evidence.enrolment[90] ^= 1;
}
static void attest_longer(void)
{
    uint8_t digest[CM_DIGEST_BYTES];
    s.evidence.attest[s.evidence.attest_bytes++] = 0;
    EVP_Digest(s.evidence.attest, s.evidence.attest_bytes, digest, NULL, EVP_sha256(), NULL);
    p256_sign(s.ak, digest, s.evidence.attest_signature);
}
static void adapter_left_out(void)
{
    s.evidence.adapter_count = 1;
}
static void adapter_added(void)
{
    adapters_two();
}
static void adapter_renamed(void)
{
    s.evidence.adapters[0].name[0] = 't';
}
static void log_cut(void)
{
    s.evidence.log_bytes--;
}
static void log_event_changed(void)
{
    s.evidence.log[16 + 8] ^= 1;
}
static void log_type_changed(void)
{
    s.evidence.log[16] ^= 2;
} /* program becomes configuration */

static const struct {
    const char *id; /* NULL: believed */
    void (*before)(void), (*after)(void);
} vectors[] = {
    {NULL, nothing, nothing},
    {NULL, strict_good, nothing},
    {NULL, development_allowed, nothing},
    {"CM-EVD-ENROLMENT", nothing, enrolment_changed},
    {"CM-EVD-ENROLMENT", ak_loose, nothing},
    {"CM-EVD-ENROLMENT", counter_that_goes_back, nothing},
    {"CM-EVD-NODE", node_unknown, nothing},
    {"CM-EVD-AK", ak_other, nothing},
    {"CM-EVD-DEVELOPMENT", development, nothing},
    {"CM-EVD-MAGIC", magic, nothing},
    {"CM-EVD-TYPE", type, nothing},
    {"CM-EVD-ATTEST", nothing, attest_longer},
    {"CM-EVD-SELECTION", bank, nothing},
    {"CM-EVD-SELECTION", bank_more, nothing},
    {"CM-EVD-SELECTION", selection, nothing},
    {"CM-EVD-SELECTION", selection_more, nothing},
    {"CM-EVD-SIGNATURE", nothing, signature_changed},
    {"CM-EVD-KIND", boot_kind, nothing},
    {"CM-EVD-NONCE", nonce_other, nothing},
    {"CM-EVD-TLS-KEY", tls_other, nothing},
    {"CM-EVD-EXPORTER", exporter_other, nothing},
    {"CM-EVD-QUOTE-DATA", quote_data, nothing},
    {"CM-EVD-PCR-DIGEST", pcr_digest, nothing},
    {"CM-EVD-LOG", nothing, log_cut},
    {"CM-EVD-REPLAY", nothing, log_event_changed},
    {"CM-EVD-LOG", nothing, log_type_changed}, /* two configurations: out of order */
    {"CM-EVD-PACKAGE", package_other, nothing},
    {"CM-EVD-PACKAGE", package_none, nothing},
    {"CM-EVD-LATER-EVENT", later_event, nothing},
    {"CM-EVD-LATER-EVENT", strict_uncapped, nothing},
    {"CM-EVD-MODE", strict_other_key, nothing},
    {"CM-EVD-PCR-VALUE", program_other, nothing},
    {"CM-EVD-PCR-VALUE", boot_chain_other, nothing},
    {"CM-EVD-PCR-VALUE", pcr_not_quoted, nothing},
    {"CM-EVD-OWNER", owner_unknown, nothing},
    {"CM-EVD-OWNER-SIGNATURE", owner_unsigned, nothing},
    {"CM-EVD-UNKNOWN-PACKAGE", package_unknown, nothing},
    {"CM-EVD-AGE", old, nothing},
    {"CM-EVD-FUTURE", young, nothing},
    {NULL, ek_good, nothing},
    {NULL, ek_good_without_usage, nothing},
    {"CM-EK-EXPIRED", ek_expired, nothing},
    {"CM-EK-EXPIRED", ek_too_early, nothing},
    {"CM-EK-KEY", ek_other_key, nothing},
    {"CM-EK-CHAIN", ek_other_root, nothing},
    {"CM-EK-PURPOSE", ek_for_servers, nothing},
    {"CM-EK-PURPOSE", ek_an_authority, nothing},
    {"CM-EK-ABSENT", ek_absent, nothing},
    {"CM-EK-FORM", ek_longer, nothing},
    {"CM-EVD-NODE", ek_other_ak, nothing},
    {"CM-EVD-ENROLMENT", ek_good, ek_certificate_changed},
    {NULL, adapters_two, nothing},
    {NULL, adapters_none_asked, nothing},
    {NULL, adapters_known, nothing},
    {"CM-EVD-ADAPTER", adapters_refused, nothing},
    {"CM-EVD-ADAPTER", adapter_owner_known, nothing}, /* of one, not of the other */
    {"CM-EVD-ADAPTER", adapter_other, nothing},
    {"CM-EVD-ADAPTER-SIGNATURE", adapter_unsigned, nothing},
    {"CM-EVD-ADAPTER-SIGNATURE", adapter_signed_by_another, nothing},
    {"CM-EVD-QUOTE-DATA", adapters_two, adapter_left_out},
    {"CM-EVD-QUOTE-DATA", nothing, adapter_added},
    {"CM-EVD-QUOTE-DATA", adapters_two, adapter_renamed},
    {"CM-EVD-CLOCK", clock_back, nothing},
    {"CM-EVD-CLOCK", reset_back, nothing},
};

Test(evidence_verify, one_vector_for_each_check)
{
    for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++) {
        scene_make();
        vectors[i].before();
        scene_seal();
        vectors[i].after();
        expect(vectors[i].id);
        scene_done();
    }
}

/* Every byte of good evidence, flipped: refused, but where a bit of the time is within its
 * tolerance. */
Test(evidence_verify, every_flipped_byte_is_refused)
{
    static uint8_t bytes[CM_EVIDENCE_BYTES_MAX], changed[CM_EVIDENCE_BYTES_MAX];
    static struct cm_evidence parsed;
    size_t used;
    scene_make();
    ek_good();
    adapters_two();
    scene_seal();
    cr_assert_eq(cm_evidence_encode(&s.evidence, bytes, sizeof(bytes), &used, &err), CM_OK);
    s.question.evidence = &parsed;
    for (size_t at = 0; at < used; at++) {
        struct cm_evidence_facts facts;
        memcpy(changed, bytes, used);
        changed[at] ^= 1;
        bool taken = cm_evidence_parse(changed, used, &parsed, &err) == CM_OK &&
                     cm_evidence_verify(&s.question, &facts, &err) == CM_OK;
        cr_assert(!taken || at == 20, "byte %zu of %zu", at, used);
    }
    scene_done();
}

/* What evidence can say of adapters has one form. */
Test(evidence_verify, adapters_of_another_form_are_refused)
{
    static uint8_t bytes[CM_EVIDENCE_BYTES_MAX];
    static struct cm_evidence parsed;
    for (int fault = 0; fault < 8; fault++) {
        size_t used;
        scene_make();
        adapters_two();
        struct cm_evidence_adapter *adapters = s.evidence.adapters;
        switch (fault) {
        case 1:
            adapters[0].serial = 0;
            break;
        case 2: /* twice */
            adapters[1].serial = adapters[0].serial;
            break;
        case 3:
            adapters[0].serial = 9;
            break;
        case 4: /* something behind its end */
            adapters[1].name[CM_NAME_BYTES - 1] = 'x';
            break;
        case 5:
            memset(adapters[1].name, 'x', CM_NAME_BYTES);
            break;
        case 6:
            adapters[0].name[0] = '.';
            break;
        case 7:
            adapters[0].name[0] = '\0';
            break;
        default:
            break;
        }
        scene_seal();
        cr_assert_eq(cm_evidence_encode(&s.evidence, bytes, sizeof(bytes), &used, &err), CM_OK);
        enum cm_status status = cm_evidence_parse(bytes, used, &parsed, &err);
        cr_expect_eq(status, fault == 0 ? CM_OK : CM_E_EVIDENCE, "fault %d", fault);
        scene_done();
    }
    size_t used;
    scene_make();
    scene_seal();
    cr_assert_eq(cm_evidence_encode(&s.evidence, bytes, sizeof(bytes), &used, &err), CM_OK);
    bytes[used - 4] = CM_ADAPTERS_MAX + 1; /* the count, and nothing behind it */
    cr_expect_eq(cm_evidence_parse(bytes, used, &parsed, &err), CM_E_EVIDENCE);
    bytes[used - 4] = 0;
    cr_expect_eq(cm_evidence_parse(bytes, used, &parsed, &err), CM_OK);
    scene_done();
}
