/* TLS 1.3, one certificate, a key that is read once from its page. No file is opened: neither a
 * configuration nor a store of authorities is loaded. */
#include <event2/bufferevent_ssl.h>
#include <openssl/err.h>
#include <openssl/x509.h>
#include <string.h>
#include <unistd.h>

#include "runtime/base/cursor.h"
#include "runtime/gateway/gateway_internal.h"

#define SECURE_HEAP_BYTES 65536
#define TLS_HANDSHAKE     0x16 /* first byte of a record with a ClientHello, RFC 8446 5.1 */

static enum cm_status refuse(struct cm_error *err, const char *what)
{
    char text[160];
    ERR_error_string_n(ERR_get_error(), text, sizeof(text));
    ERR_clear_error();
    return cm_error_set(err, CM_E_CONFIG, "CM-GW-TLS", "%s: %s", what, text);
}

/* Page: u32 size ‖ PKCS#8 DER. Wiped before anything is concluded from it. */
static enum cm_status key_import(int fd, EVP_PKEY **ret_key, struct cm_error *err)
{
    uint8_t *page = NULL;
    EVP_PKEY *key = NULL;
    enum cm_status status = cm_key_page_map(fd, &page, err);
    if (status != CM_OK) {
        return status;
    }
    struct cm_cursor cursor = cm_cursor_init(page, CM_KEY_PAGE_BYTES);
    uint32_t size = cm_cursor_u32(&cursor);
    const uint8_t *at = cm_cursor_take(&cursor, size);
    if (at != NULL && size > 0) {
        PKCS8_PRIV_KEY_INFO *info = d2i_PKCS8_PRIV_KEY_INFO(NULL, &at, (long)size);
        key = info != NULL ? EVP_PKCS82PKEY(info) : NULL;
        PKCS8_PRIV_KEY_INFO_free(info);
    }
    cm_wipe(page, CM_KEY_PAGE_BYTES);
    cm_key_page_unmap(page);
    close(fd);
    if (key == NULL) {
        return refuse(err, "the TLS key page holds no PKCS#8 key");
    }
    *ret_key = key;
    return CM_OK;
}

/* HTTP/1.1, or no common protocol: then the handshake ends (RFC 7301 3.2). */
static int alpn_select(SSL *ssl, const unsigned char **ret_protocol, unsigned char *ret_bytes,
                       const unsigned char *offered, unsigned int offered_bytes, void *context)
{
    static const unsigned char ours[] = "\x08http/1.1";
    unsigned char *chosen = NULL;
    (void)ssl;
    (void)context;
    if (SSL_select_next_proto(&chosen, ret_bytes, ours, sizeof(ours) - 1, offered, offered_bytes) !=
        OPENSSL_NPN_NEGOTIATED) {
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    }
    *ret_protocol = chosen;
    return SSL_TLSEXT_ERR_OK;
}

static bool context_set(SSL_CTX *context)
{
    SSL_CTX_set_options(context, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION);
    SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
    /* No tickets: a ticket key would be a second secret that opens past sessions. */
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_alpn_select_cb(context, alpn_select, NULL);
    return SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) == 1 &&
           SSL_CTX_set_num_tickets(context, 0) == 1;
}

enum cm_status tls_context_new(SSL_CTX **ret_context, struct cm_error *err)
{
    OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG, NULL);
    /* Private numbers live here: locked where the limits permit, not dumped, cleared when freed. */
    (void)CRYPTO_secure_malloc_init(SECURE_HEAP_BYTES, 32);
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    if (context == NULL || !context_set(context)) {
        SSL_CTX_free(context);
        return refuse(err, "TLS 1.3 cannot be served");
    }
    *ret_context = context;
    return CM_OK;
}

enum cm_status tls_identity_set(SSL_CTX *context, int key_page_fd, const uint8_t *certificate,
                                size_t certificate_bytes, struct cm_error *err)
{
    EVP_PKEY *key = NULL;
    X509 *parsed = NULL;
    enum cm_status status = key_import(key_page_fd, &key, err);
    if (status != CM_OK) {
        return status;
    }
    const uint8_t *at = certificate;
    parsed = d2i_X509(NULL, &at, (long)certificate_bytes);
    if (parsed == NULL || at != certificate + certificate_bytes) {
        status = refuse(err, "the certificate is malformed");
    } else if (SSL_CTX_use_certificate(context, parsed) != 1 ||
               SSL_CTX_use_PrivateKey(context, key) != 1 ||
               SSL_CTX_check_private_key(context) != 1) {
        status = refuse(err, "certificate and key do not serve TLS 1.3");
    }
    X509_free(parsed);
    EVP_PKEY_free(key);
    return status;
}

bool tls_begins(uint8_t first_byte)
{
    return first_byte == TLS_HANDSHAKE;
}

struct bufferevent *tls_accept(struct connection *connection)
{
    SSL *ssl = SSL_new(connection->gateway->tls);
    if (ssl == NULL) {
        return NULL;
    }
    struct bufferevent *tls =
        bufferevent_openssl_socket_new(connection->gateway->base, connection->fd, ssl,
                                       BUFFEREVENT_SSL_ACCEPTING, BEV_OPT_CLOSE_ON_FREE);
    if (tls == NULL) {
        SSL_free(ssl);
        return NULL;
    }
    bufferevent_openssl_set_allow_dirty_shutdown(tls, 1);
    return tls;
}

void tls_goodbye(struct bufferevent *tls)
{
    ERR_clear_error();
    SSL_shutdown(bufferevent_openssl_get_ssl(tls));
}
