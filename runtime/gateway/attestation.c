/* GET /v1/attestation?nonce=HEX: evidence for this nonce and this TLS connection. Open to all,
 * since who wants proof has no key yet; so one quote is in flight at a time, whoever asks. */
#include <openssl/ssl.h>

#include <event2/bufferevent_ssl.h>
#include <string.h>
#include <unistd.h>

#include "runtime/base/hex.h"
#include "runtime/gateway/gateway_internal.h"

#define QUERY     "nonce="
#define ANSWER_MS 15000

bool attestation_nonce(struct cm_span query, uint8_t ret_nonce[static 32])
{
    size_t prefix = strlen(QUERY);
    return query.size > prefix && memcmp(query.at, QUERY, prefix) == 0 &&
           cm_hex_read(query.at + prefix, query.size - prefix, ret_nonce, 32);
}

static void refuse(struct connection *connection, int status, const char *code, const char *message,
                   uint32_t retry_after_s)
{
    struct cm_api_error error;
    cm_api_error_set(&error, status, code, "%s", message);
    error.retry_after_s = retry_after_s;
    reply_error(connection, &error, NULL);
}

void attestation_begin(struct connection *connection, struct cm_span query)
{
    struct gateway *gateway = connection->gateway;
    struct attestation *attestation = &gateway->attestation;
    struct cm_quote_request request = {.kind = CM_QUOTE_SESSION};
    struct cm_error err;
    SSL *tls = bufferevent_openssl_get_ssl(connection->tls);
    uint64_t now = clock_ms();
    if (!attestation_nonce(query, request.nonce)) {
        refuse(connection, 400, "bad_nonce", "Give ?nonce= with 64 hexadecimal digits.", 0);
        return;
    }
    if (attestation->id != 0 && now < attestation->until_ms) {
        refuse(connection, 429, "quote_in_flight", "Another quote is being made; try again.",
               RETRY_QUEUE_S);
        return;
    }
    request.id = ++attestation->last_id;
    if (SSL_export_keying_material(tls, request.exporter, sizeof(request.exporter),
                                   CM_EVIDENCE_EXPORTER, strlen(CM_EVIDENCE_EXPORTER),
                                   request.nonce, sizeof(request.nonce), 1) != 1 ||
        cm_channel_send(&gateway->channel, CM_FRAME_QUOTE, &request, sizeof(request), NULL, 0,
                        &err) != CM_OK) {
        refuse(connection, 503, "no_quote", "No quote can be made now.", RETRY_LOAD_S);
        return;
    }
    attestation->id = request.id;
    attestation->until_ms = now + ANSWER_MS;
    attestation->connection = connection;
    connection->state = CONNECTION_WAIT;
}

/* The connection that waits for this answer; NULL if it is gone, or the answer is a late one. */
static struct connection *asker_take(struct gateway *gateway, uint64_t id)
{
    struct attestation *attestation = &gateway->attestation;
    struct connection *connection = attestation->connection;
    if (id != attestation->id) {
        return NULL;
    }
    attestation->id = 0;
    attestation->connection = NULL;
    return connection;
}

void attestation_answer(struct gateway *gateway)
{
    struct cm_evidence_info info;
    memcpy(&info, gateway->frame.payload, sizeof(info));
    struct connection *connection = asker_take(gateway, info.id);
    if (connection == NULL) {
        return;
    }
    static uint8_t bytes[CM_EVIDENCE_BYTES_MAX];
    const struct reply reply = {.status = 200, .content_type = "application/octet-stream"};
    if (info.bytes > sizeof(bytes) ||
        pread(gateway->frame.fds[0], bytes, info.bytes, 0) != (ssize_t)info.bytes) {
        refuse(connection, 503, "no_quote", "No quote can be made now.", RETRY_LOAD_S);
        return;
    }
    struct evbuffer *body = evbuffer_new();
    CM_ASSERT(body != NULL && evbuffer_add(body, bytes, info.bytes) == 0);
    exchange_finish(connection, 200, CM_END_STOP);
    reply_send(connection, &reply, body);
    evbuffer_free(body);
}

void attestation_failed(struct gateway *gateway)
{
    struct cm_quote_failed failed;
    memcpy(&failed, gateway->frame.payload, sizeof(failed));
    struct connection *connection = asker_take(gateway, failed.id);
    if (connection != NULL) {
        refuse(connection, 503, "no_quote", "No quote can be made now.", RETRY_LOAD_S);
    }
}

void attestation_forget(struct connection *connection)
{
    struct attestation *attestation = &connection->gateway->attestation;
    if (attestation->connection == connection) {
        attestation->connection = NULL; /* the quote is still in flight: nobody else's turn yet */
    }
}

void attestation_tick(struct gateway *gateway, uint64_t now_ms)
{
    struct attestation *attestation = &gateway->attestation;
    if (attestation->id != 0 && now_ms >= attestation->until_ms) {
        struct connection *connection = asker_take(gateway, attestation->id);
        if (connection != NULL) {
            refuse(connection, 503, "no_quote", "The TPM did not answer in time.", RETRY_LOAD_S);
        }
    }
}
