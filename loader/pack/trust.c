/* What casemate-verify is to believe of nodes, and the challenge by which they show that their keys
 * live in one TPM. Without it a maker's certificate says nothing about who signs the quotes:
 * anybody can put a certified endorsement key beside an attestation key of his own. */
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <stdio.h>
#include <string.h>

#include "loader/pack/nodes.h"
#include "runtime/base/hex.h"

#define EXPECTED_LABEL "casemate-challenge-v1"

/* What is kept of a challenge: a digest over its secret and both keys, so that an answer counts for
 * the record alone that it was made for. */
static enum cm_status expected_make(const struct cm_enrolment *enrolment,
                                    const uint8_t secret[static CM_DIGEST_BYTES],
                                    uint8_t ret_digest[static CM_DIGEST_BYTES],
                                    struct cm_error *err)
{
    uint8_t bytes[sizeof(EXPECTED_LABEL) + 3 * CM_DIGEST_BYTES];
    uint8_t *at = bytes + sizeof(EXPECTED_LABEL);
    memcpy(bytes, EXPECTED_LABEL, sizeof(EXPECTED_LABEL));
    memcpy(at, enrolment->node, CM_DIGEST_BYTES);
    memcpy(at + 2 * CM_DIGEST_BYTES, secret, CM_DIGEST_BYTES);
    enum cm_status status = cm_enrolment_ak_digest(enrolment, at + CM_DIGEST_BYTES, err);
    if (status == CM_OK &&
        EVP_Digest(bytes, sizeof(bytes), ret_digest, NULL, EVP_sha256(), NULL) != 1) {
        status = cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "SHA-256 failed");
    }
    cm_wipe(bytes, sizeof(bytes));
    return status;
}

static enum cm_status beside(const char *path, const char *suffix, char ret[static 4096],
                             struct cm_error *err)
{
    return (size_t)snprintf(ret, 4096, "%s.%s", path, suffix) < 4096
               ? CM_OK
               : cm_error_set(err, CM_E_USAGE, "CM-PACK-PATH", "path is too long: %s", path);
}

static enum cm_status challenge_write(const struct cm_pack_arguments *arguments, const char *path,
                                      struct cm_error *err)
{
    struct cm_enrolment enrolment;
    uint8_t secret[CM_DIGEST_BYTES], expected[CM_DIGEST_BYTES], challenge[CM_CREDENTIAL_BYTES_MAX];
    char challenge_path[4096], expected_path[4096];
    uint32_t used = 0;
    enum cm_status status = beside(path, "challenge", challenge_path, err);
    if (status == CM_OK) {
        status = beside(path, "expected", expected_path, err);
    }
    if (status == CM_OK) {
        status = cm_node_read(arguments, path, &enrolment, err);
    }
    if (status == CM_OK && RAND_priv_bytes(secret, sizeof(secret)) != 1) {
        status = cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "no randomness");
    }
    if (status == CM_OK) {
        status = cm_credential_make(&enrolment, secret, challenge, &used, err);
    }
    if (status == CM_OK) {
        status = expected_make(&enrolment, secret, expected, err);
    }
    if (status == CM_OK) {
        status = cm_file_put(expected_path, expected, sizeof(expected), 0600, err);
    }
    if (status == CM_OK) {
        status = cm_file_put(challenge_path, challenge, used, 0644, err);
    }
    cm_wipe(secret, sizeof(secret));
    if (status == CM_OK && !arguments->json) {
        printf("%s: give it to node %s, whose `casemate answer` makes %s.answer of it\n",
               challenge_path, enrolment.node_name, path);
    }
    return status;
}

enum cm_status cm_command_challenge(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    for (uint32_t i = 0; status == CM_OK && i < arguments->node_count; i++) {
        status = challenge_write(arguments, arguments->nodes[i], err);
    }
    if (status == CM_OK && arguments->json) {
        printf("{\"challenges\": %u}\n", arguments->node_count);
    }
    return status;
}

/* Has the TPM of this record answered? */
static enum cm_status answer_check(const char *path, const struct cm_enrolment *enrolment,
                                   struct cm_error *err)
{
    uint8_t expected[CM_DIGEST_BYTES + 1], answer[CM_DIGEST_BYTES + 1], made[CM_DIGEST_BYTES];
    size_t expected_size = 0, answer_size = 0;
    char expected_path[4096], answer_path[4096];
    enum cm_status status = beside(path, "expected", expected_path, err);
    if (status == CM_OK) {
        status = beside(path, "answer", answer_path, err);
    }
    if (status != CM_OK) {
        return status;
    }
    if (cm_file_read(expected_path, expected, sizeof(expected), &expected_size, NULL) != CM_OK ||
        cm_file_read(answer_path, answer, sizeof(answer), &answer_size, NULL) != CM_OK) {
        return cm_error_set(err, CM_E_POLICY, "CM-PACK-UNPROVEN",
                            "node %s has not shown that its attestation key lives in the certified "
                            "TPM: `casemate-pack challenge --node %.80s`, and its answer beside it",
                            enrolment->node_name, path);
    }
    status = expected_make(enrolment, answer, made, err);
    if (status == CM_OK && (expected_size != CM_DIGEST_BYTES || answer_size != CM_DIGEST_BYTES ||
                            !cm_ct_equal(made, expected, CM_DIGEST_BYTES))) {
        status =
            cm_error_set(err, CM_E_POLICY, "CM-PACK-UNPROVEN",
                         "node %s: %.80s is not the answer to the challenge of this record: its "
                         "keys are of two TPMs, or the challenge was made anew",
                         enrolment->node_name, answer_path);
    }
    return status;
}

static void hex_print(const uint8_t *bytes, size_t size, const char *end)
{
    char hex[2 * CM_PUBLIC_KEY_BYTES + 1];
    CM_ASSERT(size <= CM_PUBLIC_KEY_BYTES);
    cm_hex_write(bytes, size, hex);
    printf("%s%s", hex, end);
}

static enum cm_status node_trust_print(const struct cm_pack_arguments *arguments, const char *path,
                                       const struct cm_measurement *measurement,
                                       struct cm_error *err)
{
    struct cm_enrolment enrolment;
    uint8_t ak[CM_DIGEST_BYTES], pcr[CM_DIGEST_BYTES];
    enum cm_status status = cm_node_read(arguments, path, &enrolment, err);
    if (status == CM_OK && arguments->ek_authority != NULL) {
        status = answer_check(path, &enrolment, err);
    }
    if (status == CM_OK) {
        status = cm_enrolment_ak_digest(&enrolment, ak, err);
    }
    memcpy(pcr, enrolment.pcr_value, sizeof(pcr));
    if (status == CM_OK) {
        status = cm_measurement_replay(measurement, 0, measurement->count, pcr, err);
    }
    if (status != CM_OK) {
        return status;
    }
    printf("# %s\n", enrolment.node_name);
    if (arguments->ek_authority == NULL) {
        printf("node ");
        hex_print(enrolment.node, sizeof(enrolment.node), " ");
    }
    printf("ak ");
    hex_print(ak, sizeof(ak), "\n");
    printf("pcr %u ", enrolment.pcr);
    hex_print(pcr, sizeof(pcr), "\n");
    if (enrolment.development) {
        puts(arguments->allow_development
                 ? "development allowed"
                 : "# its TPM is a development TPM: refused without `development allowed`");
    }
    return CM_OK;
}

/* The authorities themselves, so that the trust file stands alone. */
static enum cm_status authorities_print(const char *path, struct cm_error *err)
{
    static struct cm_ek_authorities authorities;
    char text[4 * (CM_EK_CERTIFICATE_MAX / 3 + 1) + 1];
    enum cm_status status = cm_authorities_read(path, &authorities, err);
    for (uint32_t i = 0; status == CM_OK && i < authorities.count; i++) {
        EVP_EncodeBlock((uint8_t *)text, authorities.rows[i].der, (int)authorities.rows[i].bytes);
        printf("ek-authority %s\n", text);
    }
    return status;
}

enum cm_status cm_command_trust(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    static struct cm_measurement measurement;
    static struct cm_package_head head;
    enum cm_status status = cm_nodes_measurement_read(arguments->measurement, &measurement, err);
    if (status == CM_OK) {
        status = cm_package_measure(arguments->input, &measurement, &head, err);
    }
    for (uint32_t i = 0; status == CM_OK && i < arguments->node_count; i++) {
        status = node_trust_print(arguments, arguments->nodes[i], &measurement, err);
    }
    if (status == CM_OK && arguments->ek_authority != NULL) {
        status = authorities_print(arguments->ek_authority, err);
    }
    for (uint32_t i = 0; status == CM_OK && i < arguments->pcr_count; i++) {
        const char *equals = strchr(arguments->pcrs[i], '=');
        printf("pcr %.*s %s\n", equals != NULL ? (int)(equals - arguments->pcrs[i]) : 0,
               arguments->pcrs[i], equals != NULL ? equals + 1 : "");
    }
    if (status == CM_OK) {
        printf("package ");
        hex_print(head.core.core_digest, CM_DIGEST_BYTES, "\nowner ");
        hex_print(head.core.owner_key, CM_PUBLIC_KEY_BYTES, "\n");
    }
    return status;
}
