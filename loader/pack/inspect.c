/* `casemate-pack inspect`: explain a package, without its key or with it. */
#include "loader/pack/commands.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loader/package/internal.h"
#include "runtime/base/hex.h"

static const char *suite_name(uint32_t suite)
{
    return suite == CM_SUITE_AES_256_GCM ? "aes-256-gcm" : "chacha20-poly1305";
}

static json_t *part(const char *name, uint64_t offset, uint64_t bytes, const char *state)
{
    return json_pack("{s:s, s:I, s:I, s:s}", "part", name, "offset_bytes", (json_int_t)offset,
                     "size_bytes", (json_int_t)bytes, "protection", state);
}

static json_t *parts_describe(const struct cm_package_core *core)
{
    json_t *parts = json_array();
    json_array_append_new(parts, part("prologue", 0, CM_PACKAGE_PROLOGUE_BYTES, "fixed value"));
    json_array_append_new(parts, part("core header", CM_PACKAGE_CORE_OFFSET, CM_PACKAGE_CORE_BYTES,
                                      "signature, MAC"));
    json_array_append_new(
        parts, part("slots A", CM_PACKAGE_SLOTS_A_OFFSET, CM_PACKAGE_SLOTS_BYTES, "checksum, MAC"));
    json_array_append_new(
        parts, part("slots B", CM_PACKAGE_SLOTS_B_OFFSET, CM_PACKAGE_SLOTS_BYTES, "checksum, MAC"));
    json_array_append_new(parts, part("manifest", core->manifest_offset, core->manifest_bytes,
                                      "encrypted, digest in the core header"));
    json_array_append_new(parts, part("tag table", core->table_offset,
                                      core->segment_count * CM_PACKAGE_TABLE_ENTRY_BYTES,
                                      "digest in the core header"));
    json_array_append_new(parts, part("payload", core->payload_offset, core->payload_bytes,
                                      "encrypted, tag and SHA-256 per segment"));
    return parts;
}

static json_t *head_describe(const struct cm_package_head *head, uint64_t file_bytes)
{
    const struct cm_package_core *core = &head->core;
    char digest[2 * CM_DIGEST_BYTES + 1], owner[2 * CM_PUBLIC_KEY_BYTES + 1];
    cm_hex_write(core->core_digest, CM_DIGEST_BYTES, digest);
    cm_hex_write(core->owner_key, CM_PUBLIC_KEY_BYTES, owner);
    bool signed_well =
        cm_signature_check(core->owner_key, core->core_digest, core->signature, NULL) == CM_OK;
    json_t *slots = json_array();
    for (uint32_t i = 0; i < head->slot_count; i++) {
        char node[2 * CM_DIGEST_BYTES + 1];
        cm_hex_write(head->slots[i].node, CM_DIGEST_BYTES, node);
        json_array_append_new(slots,
                              json_pack("{s:s, s:s, s:s, s:i}", "kind",
                                        head->slots[i].kind == CM_SLOT_TPM ? "tpm" : "broker",
                                        "label", head->slots[i].label, "node", node, "size_bytes",
                                        (int)head->slots[i].payload_bytes));
    }
    return json_pack("{s:i, s:s, s:I, s:s, s:s, s:b, s:I, s:b, s:i, s:I, s:s, s:b, s:o, s:o}",
                     "format_version", (int)core->format_version, "suite", suite_name(core->suite),
                     "revision", (json_int_t)core->revision, "core_digest", digest, "owner_key",
                     owner, "signature_valid", signed_well, "file_bytes", (json_int_t)file_bytes,
                     "length_right", file_bytes == core->file_bytes, "segment_bytes",
                     (int)core->segment_bytes, "segments", (json_int_t)core->segment_count,
                     "slots_copy", head->slots_copy == 0 ? "A" : "B", "slots_torn",
                     head->slots_torn, "slots", slots, "parts", parts_describe(core));
}

static enum cm_status model_describe(const uint8_t *manifest, size_t bytes, uint64_t payload_bytes,
                                     json_t *facts, struct cm_error *err)
{
    struct cm_manifest m;
    enum cm_status status = cm_manifest_parse(manifest, bytes, payload_bytes, &m, err);
    if (status == CM_OK) {
        json_object_set_new(facts, "model",
                            json_pack("{s:s%, s:s%, s:i, s:i, s:i, s:i, s:i, s:i, s:f}", "name",
                                      m.model_name.bytes, (size_t)m.model_name.size, "origin",
                                      m.origin.bytes, (size_t)m.origin.size, "architecture",
                                      (int)m.architecture, "layers", (int)m.layers, "width",
                                      (int)m.width, "vocabulary", (int)m.vocabulary, "context",
                                      (int)m.context_max, "kl_positions", (int)m.loss_positions,
                                      "kl_divergence", (double)m.loss_divergence));
        cm_manifest_done(&m);
    }
    return status;
}

/* Which projections an adapter has in any layer. */
static json_t *targets_describe(const struct cm_manifest_adapter *m)
{
    static const char *const names[] = {"q", "k", "v", "o", "gate", "up", "down"};
    json_t *targets = json_array();
    for (uint32_t t = 0; t < sizeof(names) / sizeof(names[0]); t++) {
        uint32_t layers = 0;
        for (uint32_t i = 0; i < m->tensor_count; i++) {
            layers += m->tensors[i].role == 2 * t;
        }
        if (layers > 0) {
            json_array_append_new(targets, json_string(names[t]));
        }
    }
    return targets;
}

static enum cm_status adapter_describe(const uint8_t *manifest, size_t bytes,
                                       uint64_t payload_bytes, json_t *facts, struct cm_error *err)
{
    struct cm_manifest_adapter m;
    char base[2 * CM_DIGEST_BYTES + 1];
    struct cm_manifest_tensor *tensors = calloc(CM_MANIFEST_ADAPTER_TENSORS_MAX, sizeof(*tensors));
    if (tensors == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tensors");
    }
    enum cm_status status = cm_manifest_adapter_parse(manifest, bytes, payload_bytes, tensors,
                                                      CM_MANIFEST_ADAPTER_TENSORS_MAX, &m, err);
    if (status == CM_OK) {
        cm_hex_write(m.base_digest, CM_DIGEST_BYTES, base);
        json_object_set_new(facts, "adapter",
                            json_pack("{s:s%, s:s%, s:s, s:i, s:f, s:i, s:o, s:i, s:f}", "name",
                                      m.name.bytes, (size_t)m.name.size, "origin", m.origin.bytes,
                                      (size_t)m.origin.size, "base", base, "rank", (int)m.rank,
                                      "scale", (double)m.scale, "layers", (int)m.layers, "targets",
                                      targets_describe(&m), "tensors", (int)m.tensor_count,
                                      "relative_rms_error", (double)m.rounding));
    }
    free(tensors);
    return status;
}

/* What only the key shows, as more rows of the facts. */
static enum cm_status content_describe(const struct cm_pack_arguments *arguments, int fd,
                                       json_t *facts, struct cm_error *err)
{
    static struct cm_package_head head;
    struct cm_secret *key = NULL;
    struct cm_package *package = NULL;
    size_t bytes;
    enum cm_status status = cm_recovery_open(arguments, fd, &head, &key, err);
    if (status == CM_OK) {
        status = cm_package_open(fd, cm_secret_view(key), head.core.owner_key, &package, err);
    }
    cm_secret_free(key);
    if (status == CM_OK) {
        const uint8_t *manifest = cm_package_manifest(package, &bytes);
        status = (cm_manifest_is_adapter(manifest, bytes) ? adapter_describe : model_describe)(
            manifest, bytes, head.core.payload_bytes, facts, err);
    }
    cm_package_close(package);
    return status;
}

static void model_print(const json_t *model)
{
    printf("\nmodel %s: %lld layers, width %lld, vocabulary %lld, context %lld\n",
           json_string_value(json_object_get(model, "name")),
           json_integer_value(json_object_get(model, "layers")),
           json_integer_value(json_object_get(model, "width")),
           json_integer_value(json_object_get(model, "vocabulary")),
           json_integer_value(json_object_get(model, "context")));
    json_int_t positions = json_integer_value(json_object_get(model, "kl_positions"));
    if (positions > 0) {
        printf("rounding its weights cost a mean KL divergence of %.6f over %lld positions\n",
               json_real_value(json_object_get(model, "kl_divergence")), positions);
    } else {
        printf(
            "no loss is recorded: its weights are what they were, or the loss was not measured\n");
    }
}

static void adapter_print(const json_t *adapter)
{
    size_t i;
    json_t *target;
    printf("\nadapter %s to the package %s\nrank %lld, scale %g, in %lld layers at",
           json_string_value(json_object_get(adapter, "name")),
           json_string_value(json_object_get(adapter, "base")),
           json_integer_value(json_object_get(adapter, "rank")),
           json_real_value(json_object_get(adapter, "scale")),
           json_integer_value(json_object_get(adapter, "layers")));
    json_array_foreach(json_object_get(adapter, "targets"), i, target)
    {
        printf(" %s", json_string_value(target));
    }
    double rounding = json_real_value(json_object_get(adapter, "relative_rms_error"));
    if (rounding > 0.0) {
        printf("\nrounding to fp16 changed its values by %.6f (relative RMS)\n", rounding);
    } else {
        printf("\nits values are what they were\n");
    }
}

static void head_print(const json_t *facts)
{
    size_t i;
    json_t *row;
    printf("Casemate package, format version %lld, suite %s, revision %lld\n",
           json_integer_value(json_object_get(facts, "format_version")),
           json_string_value(json_object_get(facts, "suite")),
           json_integer_value(json_object_get(facts, "revision")));
    printf(
        "core digest  %s\nowner        %s\nsignature    %s (by the key above; compare it with the "
        "owner's)\n",
        json_string_value(json_object_get(facts, "core_digest")),
        json_string_value(json_object_get(facts, "owner_key")),
        json_is_true(json_object_get(facts, "signature_valid")) ? "valid" : "WRONG");
    printf("length       %lld bytes, %s\n\n",
           json_integer_value(json_object_get(facts, "file_bytes")),
           json_is_true(json_object_get(facts, "length_right")) ? "as the header says"
                                                                : "NOT what the header says");
    printf("%-12s %14s %14s  %s\n", "part", "offset", "bytes", "protected by");
    json_array_foreach(json_object_get(facts, "parts"), i, row)
    {
        printf("%-12s %14lld %14lld  %s\n", json_string_value(json_object_get(row, "part")),
               json_integer_value(json_object_get(row, "offset_bytes")),
               json_integer_value(json_object_get(row, "size_bytes")),
               json_string_value(json_object_get(row, "protection")));
    }
    printf("\n%zu slot(s), copy %s in use%s\n", json_array_size(json_object_get(facts, "slots")),
           json_string_value(json_object_get(facts, "slots_copy")),
           json_is_true(json_object_get(facts, "slots_torn"))
               ? "; the other copy is torn or older (the next slot write mends it)"
               : "");
    json_array_foreach(json_object_get(facts, "slots"), i, row)
    {
        printf("  %-8s %-20s node %.16s…  %lld bytes\n",
               json_string_value(json_object_get(row, "kind")),
               json_string_value(json_object_get(row, "label")),
               json_string_value(json_object_get(row, "node")),
               json_integer_value(json_object_get(row, "size_bytes")));
    }
    if (json_object_get(facts, "model") != NULL) {
        model_print(json_object_get(facts, "model"));
    } else if (json_object_get(facts, "adapter") != NULL) {
        adapter_print(json_object_get(facts, "adapter"));
    } else {
        printf("\nModel or adapter, tokenizer and shapes are sealed: only the key opens them.\n");
    }
}

enum cm_status cm_command_inspect(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    struct stat facts;
    if ((arguments->recovery != NULL) != (arguments->passphrase_file != NULL)) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE",
                            "--recovery and --passphrase-file go together");
    }
    struct cm_package_head *head = calloc(1, sizeof(*head));
    uint8_t *bytes = malloc(CM_PACKAGE_HEAD_BYTES);
    int fd = open(arguments->input, O_RDONLY | O_CLOEXEC);
    enum cm_status status = CM_OK;
    if (head == NULL || bytes == NULL) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "inspect");
    } else if (fd < 0 || fstat(fd, &facts) != 0) {
        status = cm_error_errno(err, errno, "CM-PKG-READ", "cannot open %s", arguments->input);
    }
    if (status == CM_OK) {
        status = cm_read_exact(fd, bytes, CM_PACKAGE_HEAD_BYTES, 0, "head", err);
        if (status == CM_OK) {
            status = cm_package_head_parse(bytes, CM_PACKAGE_HEAD_BYTES, head, err);
        }
        status = status == CM_OK ? CM_OK : cm_error_wrap(err, "%.200s", arguments->input);
    }
    if (status == CM_OK) {
        json_t *described = head_describe(head, (uint64_t)facts.st_size);
        if (arguments->recovery != NULL) {
            status = content_describe(arguments, fd, described, err);
        }
        if (status != CM_OK) {
            /* the caller says why */
        } else if (arguments->json) {
            json_dumpf(described, stdout, JSON_INDENT(2));
            printf("\n");
        } else {
            head_print(described);
        }
        json_decref(described);
    }
    if (fd >= 0) {
        close(fd);
    }
    free(head);
    free(bytes);
    return status;
}
