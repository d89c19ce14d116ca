/* The TLS identity from keeper to keeper. */
#include <criterion/criterion.h>
#include <string.h>

#include "runtime/keeper/keeper.h"

static struct cm_error err;

/* As the first keeper leaves it: page and certificate. */
static void leave(const struct cm_tls_identity *identity, uint8_t page[static CM_KEY_PAGE_BYTES],
                  struct cm_tls_page *ret_certificate)
{
    memset(page, 0, CM_KEY_PAGE_BYTES);
    memcpy(page, cm_secret_view(identity->key), cm_secret_size(identity->key));
    memset(ret_certificate, 0, sizeof(*ret_certificate));
    ret_certificate->certificate_bytes = identity->certificate_bytes;
    memcpy(ret_certificate->certificate, identity->certificate, identity->certificate_bytes);
}

Test(keeper_tls, an_identity_that_was_left_is_the_same_one_when_it_is_taken)
{
    static struct cm_tls_identity made, other, taken;
    static struct cm_tls_page certificate;
    uint8_t page[CM_KEY_PAGE_BYTES];
    cr_assert_eq(cm_tls_identity_make(NULL, 0, &made, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_tls_identity_make(NULL, 0, &other, &err), CM_OK, "%s", err.text);
    cr_assert_neq(memcmp(made.key_digest, other.key_digest, sizeof(made.key_digest)), 0);
    leave(&made, page, &certificate);
    cr_assert_eq(cm_tls_identity_take(page, &certificate, &taken, &err), CM_OK, "%s", err.text);
    cr_expect_eq(memcmp(taken.key_digest, made.key_digest, sizeof(made.key_digest)), 0);
    cr_expect_eq(taken.certificate_bytes, made.certificate_bytes);
    cr_expect_eq(memcmp(taken.certificate, made.certificate, made.certificate_bytes), 0);
    cr_assert_eq(cm_secret_size(taken.key), cm_secret_size(made.key));
    cr_expect_eq(
        memcmp(cm_secret_view(taken.key), cm_secret_view(made.key), cm_secret_size(made.key)), 0);
}

static void refused(const uint8_t *page, const struct cm_tls_page *certificate, const char *what)
{
    struct cm_tls_identity taken = {.key = NULL};
    cr_expect_eq(cm_tls_identity_take(page, certificate, &taken, &err), CM_E_INPUT, "%s", what);
    cr_expect_str_eq(err.id, "CM-KEEPER-TLS", "%s", what);
    cr_expect_null(taken.key, "%s", what);
}

Test(keeper_tls, a_malformed_identity_is_refused)
{
    static const uint32_t sizes[] = {0, CM_TLS_KEY_BYTES_MAX + 1, CM_KEY_PAGE_BYTES, UINT32_MAX};
    static struct cm_tls_identity made;
    static struct cm_tls_page certificate;
    uint8_t page[CM_KEY_PAGE_BYTES];
    cr_assert_eq(cm_tls_identity_make(NULL, 0, &made, &err), CM_OK, "%s", err.text);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        leave(&made, page, &certificate);
        memcpy(page, &sizes[i], sizeof(sizes[i]));
        refused(page, &certificate, "size of the key");
    }
    leave(&made, page, &certificate);
    for (uint32_t bytes = 0; bytes < made.certificate_bytes; bytes += 7) {
        certificate.certificate_bytes = bytes;
        refused(page, &certificate, "a cut certificate");
    }
    certificate.certificate_bytes = CM_CERTIFICATE_BYTES_MAX + 1;
    refused(page, &certificate, "a certificate larger than its place");
}
