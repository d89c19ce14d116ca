/* The gateway without TLS, for the bench's twin arm alone: stands in the place of
 * runtime/gateway/tls.c. It is never installed, and another program is another measurement. */
#include <ctype.h>
#include <event2/bufferevent.h>
#include <unistd.h>

#include "runtime/gateway/gateway_internal.h"

enum cm_status tls_context_new(SSL_CTX **ret_context, struct cm_error *err)
{
    (void)err;
    *ret_context = NULL;
    return CM_OK;
}

enum cm_status tls_identity_set(SSL_CTX *context, int key_page_fd, const uint8_t *certificate,
                                size_t certificate_bytes, struct cm_error *err)
{
    uint8_t *page = NULL;
    (void)context;
    (void)certificate;
    (void)certificate_bytes;
    enum cm_status status = cm_key_page_map(key_page_fd, &page, err);
    if (status != CM_OK) {
        return status;
    }
    cm_wipe(page, CM_KEY_PAGE_BYTES);
    cm_key_page_unmap(page);
    close(key_page_fd);
    return CM_OK;
}

bool tls_begins(uint8_t first_byte)
{
    return isupper(first_byte) != 0; /* a method */
}

struct bufferevent *tls_accept(struct connection *connection)
{
    connection->handshaken = true;
    return bufferevent_socket_new(connection->gateway->base, connection->fd, BEV_OPT_CLOSE_ON_FREE);
}

void tls_goodbye(struct bufferevent *tls)
{
    (void)tls;
}
