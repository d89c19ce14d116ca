/* Evidence: a fresh quote with everything that a verifier needs beside it, in a sealed memfd. */
#include "loader/evidence/evidence.h"
#include "runtime/keeper/keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* The same boot, and a PCR that nobody else has touched? */
enum cm_status cm_keeper_boot_check(struct cm_keeper *keeper, struct cm_error *err)
{
    struct cm_tpm_boot boot;
    uint8_t pcr[CM_DIGEST_BYTES], expected[CM_DIGEST_BYTES];
    memset(&boot, 0, sizeof(boot));
    enum cm_status status = cm_tpm_boot_read(keeper->tpm, &boot, err);
    if (status == CM_OK && memcmp(&boot, &keeper->boot, sizeof(boot)) != 0) {
        return cm_error_set(err, CM_E_POLICY, "CM-SEAL-RESET",
                            "the TPM was reset while the service ran (reset count %u, was %u): "
                            "start it again after you know why",
                            boot.reset_count, keeper->boot.reset_count);
    }
    memcpy(expected, keeper->enrolment.pcr_value, sizeof(expected));
    if (status == CM_OK) {
        status = cm_measurement_replay(&keeper->measurement, 0, keeper->measurement.count, expected,
                                       err);
    }
    if (status == CM_OK) {
        status = cm_tpm_pcr_read(keeper->tpm, keeper->enrolment.pcr, pcr, err);
    }
    if (status == CM_OK && memcmp(pcr, expected, sizeof(pcr)) != 0) {
        status = cm_error_set(err, CM_E_POLICY, "CM-SEAL-RESET",
                              "PCR %u was extended by somebody else while the service ran: reboot "
                              "to start again",
                              keeper->enrolment.pcr);
    }
    return status;
}

/* Those whose keys are held: each of them the worker has, or may get. By serial. */
static void adapters_fill(const struct cm_keeper *keeper, struct cm_evidence *evidence)
{
    for (uint32_t i = 0; i < CM_ADAPTERS_MAX; i++) {
        const struct cm_evidence_adapter *facts = &keeper->adapters[i].facts;
        uint32_t at = evidence->adapter_count;
        if (facts->serial == 0) {
            continue;
        }
        for (; at > 0 && evidence->adapters[at - 1].serial > facts->serial; at--) {
            evidence->adapters[at] = evidence->adapters[at - 1];
        }
        evidence->adapters[at] = *facts;
        evidence->adapter_count++;
    }
}

static enum cm_status evidence_fill(struct cm_keeper *keeper,
                                    const struct cm_quote_request *request,
                                    struct cm_evidence *evidence, struct cm_error *err)
{
    size_t used = 0;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(evidence, 0, sizeof(*evidence));
    evidence->kind = request->kind;
    evidence->mode = keeper->config.strict == 1 ? CM_ATTEST_STRICT : CM_ATTEST_RESTARTABLE;
    evidence->made_unix_s = (uint64_t)now.tv_sec;
    memcpy(evidence->nonce, request->nonce, sizeof(evidence->nonce));
    memcpy(evidence->exporter, request->exporter, sizeof(evidence->exporter));
    memcpy(evidence->tls_key_digest, keeper->tls.key_digest, CM_DIGEST_BYTES);
    memcpy(evidence->core_digest, keeper->head.core.core_digest, CM_DIGEST_BYTES);
    memcpy(evidence->owner_key, keeper->head.core.owner_key, CM_PUBLIC_KEY_BYTES);
    memcpy(evidence->owner_signature, keeper->head.core.signature,
           sizeof(evidence->owner_signature));
    memcpy(evidence->enrolment, keeper->config.enrolment, keeper->config.enrolment_bytes);
    evidence->enrolment_bytes = keeper->config.enrolment_bytes;
    adapters_fill(keeper, evidence);
    enum cm_status status = cm_measurement_encode(&keeper->measurement, evidence->log,
                                                  sizeof(evidence->log), &used, err);
    evidence->log_bytes = (uint32_t)used;
    return status;
}

/* The boot by the TPM's signed word: whoever answers for the TPM on its bus cannot forge that. */
static enum cm_status quote_boot_check(struct cm_keeper *keeper, const struct cm_tpm_quote *quote,
                                       struct cm_error *err)
{
    if (!keeper->quoted) {
        keeper->quoted = true;
        keeper->quoted_reset_count = quote->reset_count;
        keeper->quoted_restart_count = quote->restart_count;
    }
    return quote->reset_count == keeper->quoted_reset_count &&
                   quote->restart_count == keeper->quoted_restart_count
               ? CM_OK
               : cm_error_set(err, CM_E_POLICY, "CM-SEAL-RESET",
                              "the TPM was reset while the service ran (signed reset count %u, was "
                              "%u): start it again after you know why",
                              quote->reset_count, keeper->quoted_reset_count);
}

static enum cm_status evidence_quote(struct cm_keeper *keeper, struct cm_evidence *evidence,
                                     struct cm_error *err)
{
    const struct cm_policy_state *state = &keeper->state;
    struct cm_tpm_quote quote;
    uint8_t data[CM_DIGEST_BYTES];
    enum cm_status status = cm_evidence_quote_data(evidence, data, err);
    if (status == CM_OK) {
        status = cm_tpm_quote(keeper->tpm, &keeper->enrolment, state->pcrs, state->pcr_count, data,
                              &quote, err);
    }
    if (status == CM_OK) {
        status = quote_boot_check(keeper, &quote, err);
    }
    if (status == CM_OK) {
        memcpy(evidence->attest, quote.attest, quote.attest_bytes);
        evidence->attest_bytes = quote.attest_bytes;
        memcpy(evidence->attest_signature, quote.signature, sizeof(quote.signature));
        evidence->pcr_count = state->pcr_count;
        memcpy(evidence->pcrs, state->pcrs, state->pcr_count * sizeof(state->pcrs[0]));
        memcpy(evidence->pcr_values, quote.pcr_values,
               state->pcr_count * sizeof(state->pcr_values[0]));
    }
    return status;
}

enum cm_status cm_keeper_evidence_prepare(struct cm_keeper *keeper, struct cm_error *err)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
    for (size_t i = 0; i < 2; i++) {
        struct cm_keeper_evidence_memory *memory = &keeper->evidence[i];
        memory->fd = memfd_create("casemate-evidence", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        void *bytes = MAP_FAILED;
        if (memory->fd >= 0 && ftruncate(memory->fd, CM_EVIDENCE_BYTES_MAX) == 0) {
            bytes = mmap(NULL, CM_EVIDENCE_BYTES_MAX, PROT_READ | PROT_WRITE, MAP_SHARED,
                         memory->fd, 0);
        }
        /* Sealed after it was mapped: whoever gets the descriptor can read. */
        if (bytes == MAP_FAILED || fcntl(memory->fd, F_ADD_SEALS, seals) != 0) {
            return cm_error_errno(err, errno, "CM-KEEPER-EVIDENCE", "no memory for evidence");
        }
        memory->bytes = bytes;
    }
    return CM_OK;
}

enum cm_status cm_keeper_evidence(struct cm_keeper *keeper, const struct cm_quote_request *request,
                                  int *ret_fd, uint32_t *ret_bytes, struct cm_error *err)
{
    static struct cm_evidence evidence;
    const struct cm_keeper_evidence_memory *memory =
        &keeper->evidence[request->kind == CM_QUOTE_SESSION];
    size_t used = 0;
    enum cm_status status = cm_keeper_boot_check(keeper, err);
    if (status == CM_OK) {
        status = evidence_fill(keeper, request, &evidence, err);
    }
    if (status == CM_OK) {
        status = evidence_quote(keeper, &evidence, err);
    }
    if (status == CM_OK) {
        status = cm_evidence_encode(&evidence, memory->bytes, CM_EVIDENCE_BYTES_MAX, &used, err);
    }
    *ret_bytes = (uint32_t)used;
    *ret_fd = memory->fd;
    return status;
}
