/* Somebody who holds the package key forges a segment with the same GCM tag. The tag alone lets it
 * through (the control); the SHA-256 in the signed table does not.
 *
 * GCM's tag is mask + sum of C_i * H^(n-i) over GF(2^128) (SP 800-38D). Change block 1 by any D and
 * block 2 by D * H, and the tag stays. */
#include "tests/unit/package_sample.h"

#include "loader/package/internal.h"

static struct sample sample;

/* x * y in GCM's field, bits as in SP 800-38D section 6.3. */
static void field_multiply(const uint8_t x[16], const uint8_t y[16], uint8_t ret[16])
{
    uint8_t z[16] = {0}, v[16];
    memcpy(v, y, 16);
    for (int i = 0; i < 128; i++) {
        if ((x[i / 8] >> (7 - i % 8)) & 1) {
            for (int k = 0; k < 16; k++) {
                z[k] ^= v[k];
            }
        }
        int carry = v[15] & 1;
        for (int k = 15; k > 0; k--) {
            v[k] = (uint8_t)((v[k] >> 1) | (v[k - 1] << 7));
        }
        v[0] >>= 1;
        if (carry) {
            v[0] ^= 0xe1;
        }
    }
    memcpy(ret, z, 16);
}

static void hash_key(const uint8_t key[32], uint8_t ret_h[16])
{
    uint8_t zero[16] = {0};
    int used = 0;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    cr_assert_eq(EVP_EncryptInit_ex(context, EVP_aes_256_ecb(), NULL, key, NULL), 1);
    cr_assert_eq(EVP_EncryptUpdate(context, ret_h, &used, zero, 16), 1);
    EVP_CIPHER_CTX_free(context);
}

Test(package_forge, the_tag_binds_no_key_holder_but_the_hash_does)
{
    struct cm_error err;
    uint8_t data_key[CM_AEAD_KEY_BYTES], h[16], change[16] = "forged by a node", follow[16];
    size_t size, bytes;
    uint64_t offset;
    struct cm_package *package;
    sample_make(&sample, CM_SUITE_AES_256_GCM, CM_PACKAGE_SEGMENT_BYTES * 2, "model.cmpkg");
    int fd = open(sample.path, O_RDONLY | O_CLOEXEC);
    cr_assert_eq(cm_package_open(fd, sample.key, sample.owner_key, &package, &err), CM_OK);
    const struct cm_package_core *core = &cm_package_head_of(package)->core;
    cr_assert_eq(cm_key_derive(sample.key, core->salt, core->suite, CM_PURPOSE_DATA, 0, data_key,
                               sizeof(data_key), &err),
                 CM_OK);
    hash_key(data_key, h);
    field_multiply(change, h, follow);
    uint8_t *file = file_load(sample.path, &size);
    cm_package_segment_place(package, 1, &offset, &bytes);
    for (int i = 0; i < 16; i++) {
        file[offset + (size_t)i] ^= change[i];
        file[offset + 16 + (size_t)i] ^= follow[i];
    }
    uint8_t *plain = malloc(bytes);
    const uint8_t *entry = file + core->table_offset + CM_PACKAGE_TABLE_ENTRY_BYTES;
    /* Control: the tag accepts the forgery. */
    cr_assert_eq(cm_aead_open(core->suite, data_key, 1, file + offset, bytes, entry, plain, &err),
                 CM_OK);
    cr_assert_neq(memcmp(plain, sample.payload + CM_PACKAGE_SEGMENT_BYTES, 16), 0);
    /* The reader does not. */
    cr_assert_eq(cm_package_segment_open(package, 1, file + offset, bytes, plain, &err),
                 CM_E_PACKAGE);
    cr_assert_str_eq(err.id, "CM-PKG-HASH");
    cm_package_close(package);
    close(fd);
    free(plain);
    free(file);
    sample_done(&sample);
}
