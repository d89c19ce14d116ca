/* What sealing a model and sealing an adapter share: owner, key, slots, policy list, recovery. */
#include "loader/pack/commands.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <openssl/rand.h>

#include "loader/package/internal.h"
#include "runtime/base/hex.h"

#define PASSPHRASE_BYTES_MAX 1024

static enum cm_status passphrase_read(const char *path, char ret_text[PASSPHRASE_BYTES_MAX + 1],
                                      struct cm_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, ret_text, PASSPHRASE_BYTES_MAX);
    if (size < 0) {
        int error_number = errno;
        if (fd >= 0) {
            close(fd);
        }
        return cm_error_errno(err, error_number, "CM-PACK-PASSPHRASE", "cannot read %s", path);
    }
    close(fd);
    ret_text[size] = '\0';
    ret_text[strcspn(ret_text, "\r\n")] = '\0';
    if (strlen(ret_text) < 8) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-PASSPHRASE",
                            "the passphrase in %s is shorter than 8 bytes", path);
    }
    return CM_OK;
}

static enum cm_status suite_parse(const char *name, uint32_t *ret_suite, struct cm_error *err)
{
    if (name == NULL || strcmp(name, "aes-256-gcm") == 0) {
        *ret_suite = CM_SUITE_AES_256_GCM;
    } else if (strcmp(name, "chacha20-poly1305") == 0) {
        *ret_suite = CM_SUITE_CHACHA20_POLY1305;
    } else {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-SUITE",
                            "--suite '%s' is unknown; there are: aes-256-gcm, chacha20-poly1305",
                            name);
    }
    return CM_OK;
}

enum cm_status cm_pack_head_load(const char *path, struct cm_package_head *ret_head,
                                 struct cm_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-PKG-READ", "cannot open %s", path);
    }
    enum cm_status status = cm_package_head_read(fd, ret_head, err);
    close(fd);
    return status;
}

enum cm_status cm_pack_base_digest(const char *base, uint8_t ret_digest[static CM_DIGEST_BYTES],
                                   struct cm_error *err)
{
    struct cm_package_head *head = malloc(sizeof(*head));
    if (head == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "head");
    }
    if (cm_hex_read(base, strlen(base), ret_digest, CM_DIGEST_BYTES)) {
        free(head);
        return CM_OK;
    }
    enum cm_status status = cm_pack_head_load(base, head, err);
    if (status == CM_OK) {
        memcpy(ret_digest, head->core.core_digest, CM_DIGEST_BYTES);
    } else {
        status =
            cm_error_wrap(err, "--base takes a package or the 64 hex digits of its core digest");
    }
    free(head);
    return status;
}

/* The recovery file is bound to the core digest, so it is written from the finished package. */
static enum cm_status recovery_make(const struct cm_pack_arguments *arguments,
                                    const struct cm_secret *key, struct cm_error *err)
{
    char passphrase[PASSPHRASE_BYTES_MAX + 1];
    struct cm_package_head *head = malloc(sizeof(*head));
    if (head == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "head");
    }
    enum cm_status status = passphrase_read(arguments->passphrase_file, passphrase, err);
    if (status == CM_OK) {
        status = cm_pack_head_load(arguments->out, head, err);
    }
    if (status == CM_OK) {
        status = cm_recovery_write(arguments->recovery, passphrase, head->core.core_digest,
                                   cm_secret_view(key), err);
    }
    cm_wipe(passphrase, sizeof(passphrase));
    free(head);
    return status;
}

enum cm_status cm_recovery_open(const struct cm_pack_arguments *arguments, int fd,
                                struct cm_package_head *ret_head, struct cm_secret **ret_key,
                                struct cm_error *err)
{
    char passphrase[PASSPHRASE_BYTES_MAX + 1];
    struct cm_secret *key = NULL;
    enum cm_status status =
        fd >= 0 ? passphrase_read(arguments->passphrase_file, passphrase, err)
                : cm_error_errno(err, errno, "CM-PKG-READ", "cannot open %s", arguments->input);
    if (status == CM_OK) {
        status = cm_pack_head_load(arguments->input, ret_head, err);
    }
    if (status == CM_OK) {
        status = cm_secret_new(CM_KEY_BYTES, &key, err);
    }
    if (status == CM_OK) {
        status = cm_recovery_read(arguments->recovery, passphrase, ret_head->core.core_digest,
                                  cm_secret_bytes(key), err);
    }
    cm_wipe(passphrase, sizeof(passphrase));
    if (status != CM_OK) {
        cm_secret_free(key);
        return status;
    }
    *ret_key = key;
    return CM_OK;
}

/* Before the hours of packing: a package whose recovery file fails at the end has lost its key. */
static enum cm_status recovery_check(const struct cm_pack_arguments *arguments,
                                     struct cm_error *err)
{
    char passphrase[PASSPHRASE_BYTES_MAX + 1], folder[PATH_MAX];
    enum cm_status status = passphrase_read(arguments->passphrase_file, passphrase, err);
    cm_wipe(passphrase, sizeof(passphrase));
    if (status != CM_OK) {
        return status;
    }
    snprintf(folder, sizeof(folder), "%s", arguments->recovery);
    if (access(dirname(folder), W_OK | X_OK) != 0) {
        return cm_error_errno(err, errno, "CM-PKG-CREATE", "cannot write %s", arguments->recovery);
    }
    return CM_OK;
}

enum cm_status cm_pack_seal_check(const struct cm_pack_arguments *arguments, struct cm_error *err)
{
    if ((arguments->recovery != NULL) != (arguments->passphrase_file != NULL)) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE",
                            "--recovery and --passphrase-file go together");
    }
    enum cm_status status = arguments->recovery != NULL ? recovery_check(arguments, err) : CM_OK;
    return status == CM_OK ? cm_nodes_check(arguments, err) : status;
}

enum cm_status cm_pack_seal_begin(const struct cm_pack_arguments *arguments,
                                  struct cm_pack_seal *seal, struct cm_error *err)
{
    seal->options = (struct cm_package_write_options){
        .slots = seal->slots,
        .path = arguments->out,
        .revision = arguments->revision != NULL ? strtoull(arguments->revision, NULL, 10) : 1,
        .host_version_min = 1,
        .sign = cm_owner_sign};
    enum cm_status status = cm_secret_new(CM_KEY_BYTES, &seal->key, err);
    if (status == CM_OK && RAND_priv_bytes(cm_secret_bytes(seal->key), CM_KEY_BYTES) != 1) {
        status = cm_error_set(err, CM_E_SYSTEM, "CM-SYS-RANDOM", "no random bytes for the key");
    }
    if (status == CM_OK) {
        status = suite_parse(arguments->suite, &seal->options.suite, err);
    }
    if (status == CM_OK) {
        status = cm_owner_load(arguments->owner, "owner", &seal->owner, err);
    }
    if (status == CM_OK) {
        seal->options.sign_context = seal->owner;
        cm_owner_public(seal->owner, seal->options.owner_key);
        status = cm_nodes_seal(arguments, cm_secret_view(seal->key), seal->slots,
                               &seal->options.slot_count, err);
    }
    return status;
}

enum cm_status cm_pack_seal_finish(const struct cm_pack_arguments *arguments,
                                   const struct cm_pack_seal *seal, struct cm_error *err)
{
    enum cm_status status = arguments->node_count > 0
                                ? cm_nodes_policy_write(arguments, arguments->out, false, 0, err)
                                : CM_OK;
    return status == CM_OK && arguments->recovery != NULL ? recovery_make(arguments, seal->key, err)
                                                          : status;
}

void cm_pack_seal_done(struct cm_pack_seal *seal)
{
    cm_secret_free(seal->key);
    cm_owner_free(seal->owner);
}
