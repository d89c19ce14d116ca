/* A small sealed package to test with: known key, owner, manifest and payload. */
#ifndef CASEMATE_TESTS_UNIT_PACKAGE_SAMPLE_H
#define CASEMATE_TESTS_UNIT_PACKAGE_SAMPLE_H

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loader/package/write.h"
#include "tests/unit/p256.h"

#define SAMPLE_VOCABULARY 8u

struct sample {
    char folder[64];
    char path[96];
    uint8_t key[CM_KEY_BYTES];
    uint8_t owner_key[CM_PUBLIC_KEY_BYTES];
    EVP_PKEY *owner;
    uint8_t *payload;
    uint64_t payload_bytes;
    struct cm_manifest manifest;
    struct cm_manifest_tensor tensors[3];
    uint32_t offsets[SAMPLE_VOCABULARY + 1];
    uint8_t types[SAMPLE_VOCABULARY];
    uint32_t merges[2];
    struct cm_package_slot slots[2];
};

static inline enum cm_status sample_sign(void *context, const uint8_t digest[CM_DIGEST_BYTES],
                                         uint8_t ret_signature[CM_PACKAGE_SIGNATURE_BYTES],
                                         struct cm_error *err)
{
    (void)err;
    p256_sign(context, digest, ret_signature);
    return CM_OK;
}

static inline void sample_manifest(struct sample *sample)
{
    static const uint8_t token_bytes[] = "abcdefgh";
    for (uint32_t i = 0; i < SAMPLE_VOCABULARY; i++) {
        sample->offsets[i + 1] = i + 1;
        sample->types[i] = CM_TOKEN_NORMAL;
    }
    sample->merges[1] = 1;
    uint64_t third = sample->payload_bytes / 3 / 4096 * 4096;
    for (uint32_t i = 0; i < 3; i++) {
        bool one = third == 0;
        sample->tensors[i] =
            (struct cm_manifest_tensor){.name = {"tensor", 6},
                                        .layer = i == 0 ? 0 : CM_MANIFEST_NO_LAYER,
                                        .role = i,
                                        .kind = 1,
                                        .rows = 64,
                                        .columns = 1,
                                        .offset = i * third,
                                        .bytes = one ? sample->payload_bytes : third};
    }
    sample->manifest = (struct cm_manifest){.model_name = {"sample", 6},
                                            .license = {"none", 4},
                                            .origin = {"", 0},
                                            .architecture = CM_ARCH_LLAMA,
                                            .vocabulary = SAMPLE_VOCABULARY,
                                            .width = 64,
                                            .layers = 1,
                                            .heads = 2,
                                            .kv_heads = 1,
                                            .head_width = 32,
                                            .rope_width = 32,
                                            .ffn_width = 64,
                                            .context_max = 128,
                                            .rope_base = 10000.0f,
                                            .norm_epsilon = 1e-5f,
                                            .tokenizer = CM_TOKENIZER_BYTE_BPE,
                                            .split = CM_SPLIT_GPT2,
                                            .end_tokens = {2},
                                            .end_token_count = 1,
                                            .token_offsets = sample->offsets,
                                            .token_bytes = token_bytes,
                                            .token_types = sample->types,
                                            .merges = sample->merges,
                                            .merge_count = 1,
                                            .chat = CM_CHAT_CHATML,
                                            .default_system = {"be brief", 8},
                                            .tensors = sample->tensors,
                                            .tensor_count = third == 0 ? 1 : 3};
}

static inline void sample_make(struct sample *sample, uint32_t suite, uint64_t payload_bytes,
                               const char *name)
{
    struct cm_error err;
    struct cm_package_writer *writer;
    if (sample->folder[0] == '\0') {
        snprintf(sample->folder, sizeof(sample->folder), "/tmp/casemate-package-XXXXXX");
        cr_assert_not_null(mkdtemp(sample->folder));
        sample->owner = EVP_EC_gen("P-256");
        p256_point(sample->owner, sample->owner_key);
    }
    snprintf(sample->path, sizeof(sample->path), "%s/%s", sample->folder, name);
    for (size_t i = 0; i < CM_KEY_BYTES; i++) {
        sample->key[i] = (uint8_t)rand();
    }
    free(sample->payload);
    sample->payload = malloc(payload_bytes);
    sample->payload_bytes = payload_bytes;
    for (uint64_t i = 0; i < payload_bytes; i++) {
        sample->payload[i] = (uint8_t)rand();
    }
    sample_manifest(sample);
    sample->slots[0] = (struct cm_package_slot){
        .kind = CM_SLOT_TPM, .label = "node-a", .payload_bytes = 3, .payload = "abc"};
    sample->slots[0].node[0] = 1;
    sample->slots[1] = (struct cm_package_slot){
        .kind = CM_SLOT_TPM, .label = "node-b", .payload_bytes = CM_PACKAGE_SLOT_PAYLOAD_MAX};
    sample->slots[1].node[0] = 2;
    struct cm_package_write_options options = {.path = sample->path,
                                               .suite = suite,
                                               .revision = 7,
                                               .host_version_min = 1,
                                               .slot_count = 2,
                                               .slots = sample->slots,
                                               .sign = sample_sign,
                                               .sign_context = sample->owner};
    memcpy(options.owner_key, sample->owner_key, CM_PUBLIC_KEY_BYTES);
    cr_assert_eq(cm_package_write_begin(&options, sample->key, &sample->manifest, payload_bytes,
                                        &writer, &err),
                 CM_OK, "%s", err.text);
    for (uint64_t at = 0; at < payload_bytes;) {
        uint64_t take = 1 + (uint64_t)rand() % 300000;
        take = take < payload_bytes - at ? take : payload_bytes - at;
        cr_assert_eq(cm_package_write_append(writer, sample->payload + at, take, &err), CM_OK);
        at += take;
    }
    cr_assert_eq(cm_package_write_finish(writer, &err), CM_OK, "%s", err.text);
}

static inline void sample_done(struct sample *sample)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -rf %s", sample->folder);
    cr_assert_eq(system(command), 0);
    EVP_PKEY_free(sample->owner);
    free(sample->payload);
}

/* Open everything; CM_OK only if manifest and payload are what was sealed. */
static inline enum cm_status sample_open(const struct sample *sample, const char *path,
                                         struct cm_error *err)
{
    struct cm_package *package = NULL;
    struct cm_manifest manifest;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    cr_assert_geq(fd, 0);
    uint8_t *cipher = malloc(CM_PACKAGE_SEGMENT_BYTES);
    uint8_t *plain = malloc(CM_PACKAGE_SEGMENT_BYTES);
    enum cm_status status = cm_package_open(fd, sample->key, sample->owner_key, &package, err);
    if (status == CM_OK) {
        const struct cm_package_core *core = &cm_package_head_of(package)->core;
        size_t bytes;
        const uint8_t *sealed = cm_package_manifest(package, &bytes);
        status = cm_manifest_parse(sealed, bytes, core->payload_bytes, &manifest, err);
        if (status == CM_OK) {
            cr_assert_eq(manifest.vocabulary, SAMPLE_VOCABULARY);
            cm_manifest_done(&manifest);
        }
        for (uint64_t i = 0; status == CM_OK && i < core->segment_count; i++) {
            uint64_t offset;
            cm_package_segment_place(package, i, &offset, &bytes);
            cr_assert_eq(pread(fd, cipher, bytes, (off_t)offset), (ssize_t)bytes);
            status = cm_package_segment_open(package, i, cipher, bytes, plain, err);
            if (status == CM_OK) {
                cr_assert_eq(memcmp(plain, sample->payload + i * core->segment_bytes, bytes), 0,
                             "wrong acceptance: segment %llu differs", (unsigned long long)i);
            } else {
                for (size_t k = 0; k < bytes; k++) {
                    cr_assert_eq(plain[k], 0, "plaintext of a refused segment is not wiped");
                }
            }
        }
    }
    cm_package_close(package);
    free(cipher);
    free(plain);
    close(fd);
    return status;
}

/* A file's bytes in memory, and back. */
static inline uint8_t *file_load(const char *path, size_t *ret_size)
{
    struct stat facts;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    cr_assert(fd >= 0 && fstat(fd, &facts) == 0);
    uint8_t *bytes = malloc((size_t)facts.st_size);
    cr_assert_eq(read(fd, bytes, (size_t)facts.st_size), facts.st_size);
    close(fd);
    *ret_size = (size_t)facts.st_size;
    return bytes;
}

static inline void file_save(const char *path, const uint8_t *bytes, size_t size)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    cr_assert_geq(fd, 0);
    cr_assert_eq(write(fd, bytes, size), (ssize_t)size);
    close(fd);
}

#endif
