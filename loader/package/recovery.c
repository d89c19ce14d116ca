/* The detached recovery file: the package key under the owner's passphrase. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <openssl/evp.h>
#include <openssl/rand.h>

#include "loader/package/internal.h"
#include "loader/package/write.h"
#include "runtime/base/cursor.h"

#define LOG2_N_DEFAULT 17u
#define LOG2_N_MIN     14u
#define LOG2_N_MAX     20u
#define SCRYPT_R       8u
#define SCRYPT_P       1u
#define FILE_BYTES     148u
#define CLEAR_BYTES    100u /* mark .. core digest: the associated data */

/* scrypt (RFC 7914) to a 32-byte key. */
static enum cm_status passphrase_stretch(const char *passphrase, const uint8_t salt[32],
                                         uint32_t log2_n, uint8_t ret_key[CM_KEY_BYTES],
                                         struct cm_error *err)
{
    uint64_t memory = (128ull * SCRYPT_R << log2_n) + (2u << 20);
    if (EVP_PBE_scrypt(passphrase, strlen(passphrase), salt, 32, 1ull << log2_n, SCRYPT_R, SCRYPT_P,
                       memory, ret_key, CM_KEY_BYTES) != 1) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "scrypt failed (memory: %llu MiB)",
                            (unsigned long long)(memory >> 20));
    }
    return CM_OK;
}

/* AES-256-GCM of the key with the clear part as associated data; seal != 0 encrypts. */
static bool key_crypt(int seal, const uint8_t *kek, const uint8_t *clear, const uint8_t nonce[12],
                      const uint8_t *in, uint8_t *out, uint8_t tag[16])
{
    int used = 0;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    bool ok = context != NULL &&
              EVP_CipherInit_ex(context, EVP_aes_256_gcm(), NULL, kek, nonce, seal) == 1 &&
              (seal || EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, 16, tag) == 1) &&
              EVP_CipherUpdate(context, NULL, &used, clear, CLEAR_BYTES) == 1 &&
              EVP_CipherUpdate(context, out, &used, in, CM_KEY_BYTES) == 1 &&
              EVP_CipherFinal_ex(context, out + used, &used) == 1 &&
              (!seal || EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, 16, tag) == 1);
    EVP_CIPHER_CTX_free(context);
    return ok;
}

enum cm_status cm_recovery_write(const char *path, const char *passphrase,
                                 const uint8_t core_digest[static CM_DIGEST_BYTES],
                                 const uint8_t key[static CM_KEY_BYTES], struct cm_error *err)
{
    uint8_t file[FILE_BYTES], random[44], kek[CM_KEY_BYTES] = {0};
    char partial[4096];
    int fd = -1;
    if (strlen(path) + 16 > sizeof(partial)) {
        return cm_error_set(err, CM_E_USAGE, "CM-PKG-PATH", "recovery file's path is too long");
    }
    snprintf(partial, sizeof(partial), "%s.partial", path);
    if (RAND_bytes(random, sizeof(random)) != 1) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-RANDOM", "no random bytes");
    }
    struct cm_writer writer = cm_writer_init(file, sizeof(file));
    cm_writer_bytes(&writer, "CMRECOV", 8);
    cm_writer_u32(&writer, 1);
    cm_writer_u32(&writer, LOG2_N_DEFAULT);
    cm_writer_u32(&writer, SCRYPT_R);
    cm_writer_u32(&writer, SCRYPT_P);
    cm_writer_bytes(&writer, random, sizeof(random));
    cm_writer_bytes(&writer, core_digest, CM_DIGEST_BYTES);
    CM_ASSERT(writer.offset == CLEAR_BYTES);
    enum cm_status status = passphrase_stretch(passphrase, random, LOG2_N_DEFAULT, kek, err);
    if (status == CM_OK && !key_crypt(1, kek, file, random + 32, key, file + CLEAR_BYTES,
                                      file + CLEAR_BYTES + CM_KEY_BYTES)) {
        status = cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "cannot seal the recovery key");
    }
    if (status == CM_OK &&
        (fd = open(partial, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600)) < 0) {
        status = cm_error_errno(err, errno, "CM-PKG-CREATE", "cannot create %s", partial);
    }
    if (status == CM_OK) {
        status = cm_write_exact(fd, file, sizeof(file), 0, "recovery file", err);
        if (status == CM_OK && (fsync(fd) != 0 || rename(partial, path) != 0)) {
            status = cm_error_errno(err, errno, "CM-PKG-WRITE", "cannot finish %s", path);
        }
        if (status != CM_OK) {
            unlink(partial);
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    cm_wipe(kek, sizeof(kek));
    return status;
}

enum cm_status cm_recovery_read(const char *path, const char *passphrase,
                                const uint8_t core_digest[static CM_DIGEST_BYTES],
                                uint8_t ret_key[static CM_KEY_BYTES], struct cm_error *err)
{
    uint8_t file[FILE_BYTES], kek[CM_KEY_BYTES] = {0}, key[CM_KEY_BYTES] = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-PKG-READ", "cannot open %s", path);
    }
    enum cm_status status = cm_read_exact(fd, file, sizeof(file), 0, "recovery file", err);
    close(fd);
    if (status != CM_OK) {
        return status;
    }
    struct cm_cursor cursor = cm_cursor_init(file, sizeof(file));
    bool marked = memcmp(cm_cursor_take(&cursor, 8), "CMRECOV", 8) == 0;
    uint32_t version = cm_cursor_u32(&cursor);
    uint32_t log2_n = cm_cursor_u32(&cursor);
    uint32_t r = cm_cursor_u32(&cursor);
    uint32_t p = cm_cursor_u32(&cursor);
    if (!marked || version != 1 || log2_n < LOG2_N_MIN || log2_n > LOG2_N_MAX || r != SCRYPT_R ||
        p != SCRYPT_P) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-RECOVERY",
                            "%s is not a recovery file of this version", path);
    }
    const uint8_t *salt = cm_cursor_take(&cursor, 32);
    const uint8_t *nonce = cm_cursor_take(&cursor, 12);
    if (memcmp(cm_cursor_take(&cursor, CM_DIGEST_BYTES), core_digest, CM_DIGEST_BYTES) != 0) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-RECOVERY", "%s belongs to another package",
                            path);
    }
    status = passphrase_stretch(passphrase, salt, log2_n, kek, err);
    if (status == CM_OK && !key_crypt(0, kek, file, nonce, file + CLEAR_BYTES, key,
                                      file + CLEAR_BYTES + CM_KEY_BYTES)) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-PKG-RECOVERY",
                              "%s: wrong passphrase, or the file was changed", path);
    }
    if (status == CM_OK) {
        memcpy(ret_key, key, CM_KEY_BYTES);
    }
    cm_wipe(kek, sizeof(kek));
    cm_wipe(key, sizeof(key));
    return status;
}
