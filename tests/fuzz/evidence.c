/* Fuzz target: everything that a verifier or a keeper parses of others. The first byte chooses.
 * What is accepted must encode to the same bytes. */
#include <string.h>

#include "loader/evidence/boot_log.h"
#include "loader/evidence/evidence.h"
#include "loader/evidence/trust.h"
#include "loader/evidence/verify.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool condition)
{
    if (!condition) {
        __builtin_trap();
    }
}

static void evidence_one(const uint8_t *data, size_t size)
{
    static struct cm_evidence evidence;
    static uint8_t again[CM_EVIDENCE_BYTES_MAX];
    struct cm_error err;
    size_t used = 0;
    if (cm_evidence_parse(data, size, &evidence, &err) == CM_OK) {
        must(cm_evidence_encode(&evidence, again, sizeof(again), &used, &err) == CM_OK);
        must(used == size && memcmp(again, data, size) == 0);
    }
}

static void log_one(const uint8_t *data, size_t size)
{
    static struct cm_measurement log;
    static uint8_t again[CM_LOG_BYTES_MAX];
    struct cm_error err;
    size_t used = 0;
    if (cm_measurement_parse(data, size, &log, &err) == CM_OK) {
        must(cm_measurement_encode(&log, again, sizeof(again), &used, &err) == CM_OK);
        must(used == size && memcmp(again, data, size) == 0);
    }
}

static void attest_one(const uint8_t *data, size_t size)
{
    struct cm_attest attest;
    struct cm_error err;
    (void)!cm_attest_parse(data, size, &attest, &err);
}

static void enrolment_one(const uint8_t *data, size_t size)
{
    struct cm_enrolment enrolment;
    struct cm_error err;
    (void)!cm_enrolment_parse(data, size, &enrolment, &err);
}

static void policy_one(const uint8_t *data, size_t size)
{
    static struct cm_policy_list list;
    static uint8_t again[CM_POLICY_LIST_BYTES_MAX];
    struct cm_error err;
    size_t used = 0;
    if (cm_policy_list_parse(data, size, NULL, &list, &err) == CM_OK) {
        must(cm_policy_list_encode(&list, again, sizeof(again), &used, &err) == CM_OK);
        must(used == size && memcmp(again, data, size) == 0);
    }
}

static void trust_one(const uint8_t *data, size_t size)
{
    static struct cm_trust trust;
    struct cm_error err;
    (void)!cm_trust_parse((const char *)data, size, "trust", &trust, &err);
}

static void boot_log_one(const uint8_t *data, size_t size)
{
    static struct cm_boot_log log;
    struct cm_error err;
    must(cm_boot_log_parse(data, size, &log, &err) != CM_OK || log.count <= CM_BOOT_LOG_EVENTS_MAX);
}

/* A certificate that a TPM holds may be anything. */
static void ek_one(const uint8_t *data, size_t size)
{
    static struct cm_enrolment enrolment;
    static struct cm_ek_authorities authorities;
    struct cm_error err;
    size_t used = size < CM_EK_CERTIFICATE_MAX ? size : CM_EK_CERTIFICATE_MAX;
    memcpy(enrolment.ek_certificate, data, used);
    enrolment.ek_certificate_bytes = (uint32_t)used;
    must(cm_ek_certificate_check(&enrolment, &authorities, 0, &err) != CM_OK);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const ones[])(const uint8_t *data, size_t size) = {
        evidence_one, log_one,   attest_one,   enrolment_one,
        policy_one,   trust_one, boot_log_one, ek_one};
    if (size > 0) {
        ones[data[0] % (sizeof(ones) / sizeof(ones[0]))](data + 1, size - 1);
    }
    return 0;
}
