/* The TLS identity, made as the keeper makes it: the gateway is given what it gets in a node. */
#include "tests/harness/gateway/harness.h"

#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <string.h>

#include "runtime/keeper/keeper.h"

/* What the test's clients trust. */
static void certificate_write(const char *folder, const struct cm_tls_page *page)
{
    char path[4096];
    const uint8_t *der = page->certificate;
    X509 *certificate = d2i_X509(NULL, &der, (long)page->certificate_bytes);
    snprintf(path, sizeof(path), "%s/certificate.pem", folder);
    FILE *file = fopen(path, "we");
    check(certificate != NULL && file != NULL && PEM_write_X509(file, certificate) == 1 &&
              fclose(file) == 0,
          path);
    X509_free(certificate);
}

int identity_make(const char *folder, struct cm_tls_page *ret_page)
{
    static struct cm_tls_identity identity;
    struct cm_error err;
    uint8_t *bytes = NULL;
    bool secret = false;
    int fd = -1;
    check(cm_tls_identity_make(NULL, 0, &identity, &err) == CM_OK &&
              cm_key_page_new(&fd, &secret, &err) == CM_OK &&
              cm_key_page_map(fd, &bytes, &err) == CM_OK,
          err.text);
    memcpy(bytes, cm_secret_view(identity.key), cm_secret_size(identity.key));
    cm_key_page_unmap(bytes);
    cm_secret_free(identity.key);
    *ret_page =
        (struct cm_tls_page){.generation = 1, .certificate_bytes = identity.certificate_bytes};
    memcpy(ret_page->certificate, identity.certificate, identity.certificate_bytes);
    certificate_write(folder, ret_page);
    return fd;
}

void identity_report(int page_fd)
{
    struct cm_error err;
    uint8_t *bytes = NULL;
    bool wiped = true;
    check(cm_key_page_map(page_fd, &bytes, &err) == CM_OK, err.text);
    for (size_t i = 0; i < CM_KEY_PAGE_BYTES; i++) {
        wiped = wiped && bytes[i] == 0;
    }
    cm_key_page_unmap(bytes);
    event("page", ",\"wiped\":%s", wiped ? "true" : "false");
}
