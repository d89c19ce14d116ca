/* A TLS 1.3 client for one request. */
#include "loader/evidence/live.h"

#include <errno.h>
#include <netdb.h>
#include <openssl/err.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "runtime/base/hex.h"

#define WAIT_S     10
#define HEAD_BYTES 8192

struct address {
    char host[256];
    char port[6];
};

/* https://HOST:PORT, or https://[V6]:PORT; nothing after it but one '/'. */
static bool url_split(const char *url, struct address *address)
{
    static const char scheme[] = "https://";
    if (strncmp(url, scheme, sizeof(scheme) - 1) != 0) {
        return false;
    }
    const char *at = url + sizeof(scheme) - 1;
    const char *host_end = at[0] == '[' ? strchr(at, ']') : strrchr(at, ':');
    const char *colon = at[0] == '[' && host_end != NULL ? host_end + 1 : host_end;
    at += at[0] == '[';
    if (host_end == NULL || *colon != ':' || host_end <= at ||
        (size_t)(host_end - at) >= sizeof(address->host)) {
        return false;
    }
    memcpy(address->host, at, (size_t)(host_end - at));
    address->host[host_end - at] = '\0';
    size_t digits = strspn(colon + 1, "0123456789");
    const char *rest = colon + 1 + digits;
    if (digits < 1 || digits > 5 || (strcmp(rest, "") != 0 && strcmp(rest, "/") != 0)) {
        return false;
    }
    memcpy(address->port, colon + 1, digits);
    address->port[digits] = '\0';
    return true;
}

static enum cm_status socket_open(const struct address *address, int *ret_fd, struct cm_error *err)
{
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    const struct timeval wait = {.tv_sec = WAIT_S};
    struct addrinfo *found = NULL;
    int fd = -1;
    int code = getaddrinfo(address->host, address->port, &hints, &found);
    if (code != 0) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-EVD-CONNECT", "%s: %s", address->host,
                            gai_strerror(code));
    }
    for (const struct addrinfo *at = found; at != NULL && fd < 0; at = at->ai_next) {
        fd = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol);
        if (fd >= 0 && (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait)) != 0 ||
                        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait)) != 0 ||
                        connect(fd, at->ai_addr, at->ai_addrlen) != 0)) {
            int error_number = errno;
            close(fd);
            fd = -1;
            errno = error_number;
        }
    }
    freeaddrinfo(found);
    if (fd < 0) {
        return cm_error_errno(err, errno, "CM-EVD-CONNECT", "cannot connect to %s port %s",
                              address->host, address->port);
    }
    *ret_fd = fd;
    return CM_OK;
}

static enum cm_status tls_open(int fd, const struct address *address, SSL_CTX **ret_context,
                               SSL **ret_tls, struct cm_error *err)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    SSL *tls = NULL;
    if (context != NULL && SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) == 1 &&
        (tls = SSL_new(context)) != NULL && SSL_set_fd(tls, fd) == 1 &&
        SSL_set_tlsext_host_name(tls, address->host) == 1 && SSL_connect(tls) == 1) {
        *ret_context = context;
        *ret_tls = tls;
        return CM_OK;
    }
    const char *why = ERR_reason_error_string(ERR_peek_last_error());
    enum cm_status status = cm_error_set(
        err, CM_E_SYSTEM, "CM-EVD-CONNECT", "no TLS 1.3 with %s port %s: %s", address->host,
        address->port, why != NULL ? why : "the host closed or is slow");
    SSL_free(tls);
    SSL_CTX_free(context);
    return status;
}

/* What this connection is: its peer's key and its exporter for our nonce. */
static enum cm_status facts_take(SSL *tls, struct cm_evidence_live *live, struct cm_error *err)
{
    X509 *certificate = SSL_get1_peer_certificate(tls);
    EVP_PKEY *key = certificate != NULL ? X509_get0_pubkey(certificate) : NULL;
    uint8_t *info = NULL;
    int size = key != NULL ? i2d_PUBKEY(key, &info) : 0;
    bool ok = size > 0 &&
              EVP_Digest(info, (size_t)size, live->tls_key_digest, NULL, EVP_sha256(), NULL) == 1 &&
              RAND_bytes(live->nonce, sizeof(live->nonce)) == 1 &&
              SSL_export_keying_material(tls, live->exporter, sizeof(live->exporter),
                                         CM_EVIDENCE_EXPORTER, strlen(CM_EVIDENCE_EXPORTER),
                                         live->nonce, sizeof(live->nonce), 1) == 1;
    OPENSSL_free(info);
    X509_free(certificate);
    return ok ? CM_OK
              : cm_error_set(err, CM_E_SYSTEM, "CM-SYS-CRYPTO", "cannot read the TLS connection");
}

static bool request_send(SSL *tls, const struct address *address,
                         const uint8_t nonce[static CM_EVIDENCE_NONCE_BYTES])
{
    char hex[2 * CM_EVIDENCE_NONCE_BYTES + 1], text[512];
    cm_hex_write(nonce, CM_EVIDENCE_NONCE_BYTES, hex);
    int size = snprintf(text, sizeof(text),
                        "GET /v1/attestation?nonce=%s HTTP/1.1\r\nHost: %s\r\nConnection: "
                        "close\r\n\r\n",
                        hex, address->host);
    return size > 0 && (size_t)size < sizeof(text) && SSL_write(tls, text, size) == size;
}

/* Everything up to the close or `size`. */
static size_t answer_read(SSL *tls, char *bytes, size_t size)
{
    size_t used = 0;
    while (used < size) {
        int got = SSL_read(tls, bytes + used, (int)(size - used));
        if (got <= 0) {
            break;
        }
        used += (size_t)got;
    }
    return used;
}

/* "HTTP/1.1 200" … "Content-Length: N" … and exactly N bytes. */
static enum cm_status body_find(const char *answer, size_t size, const char **ret_body,
                                size_t *ret_bytes, struct cm_error *err)
{
    const char *end = memmem(answer, size, "\r\n\r\n", 4);
    const char *length = NULL;
    if (end != NULL) {
        length = memmem(answer, (size_t)(end - answer) + 2, "\r\nContent-Length: ", 18);
    }
    if (size < 12 || memcmp(answer, "HTTP/1.1 ", 9) != 0 || end == NULL || length == NULL) {
        return cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-HTTP",
                            "the host's answer is no HTTP/1.1: is it a casemate?");
    }
    if (memcmp(answer + 9, "200", 3) != 0) {
        return cm_error_set(
            err, CM_E_EVIDENCE, "CM-EVD-HTTP",
            "the host answered %.3s: it gives no evidence now (503: not ready, 429: "
            "another quote is in flight, try again)",
            answer + 9);
    }
    unsigned long bytes = strtoul(length + 18, NULL, 10);
    *ret_body = end + 4;
    *ret_bytes = (size_t)(answer + size - *ret_body);
    return bytes == *ret_bytes
               ? CM_OK
               : cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-HTTP",
                              "the answer has %zu bytes of body, announced were %lu", *ret_bytes,
                              bytes);
}

enum cm_status cm_live_fetch(const char *url, uint8_t *ret_bytes, size_t size, size_t *ret_used,
                             struct cm_evidence_live *ret_live, struct cm_error *err)
{
    static char answer[HEAD_BYTES + CM_EVIDENCE_BYTES_MAX];
    struct address address;
    SSL_CTX *context = NULL;
    SSL *tls = NULL;
    const char *body = NULL;
    size_t bytes = 0;
    int fd = -1;
    if (!url_split(url, &address)) {
        return cm_error_set(err, CM_E_USAGE, "CM-EVD-URL", "%.100s is no https://HOST:PORT", url);
    }
    enum cm_status status = socket_open(&address, &fd, err);
    if (status == CM_OK) {
        status = tls_open(fd, &address, &context, &tls, err);
    }
    if (status == CM_OK) {
        status = facts_take(tls, ret_live, err);
    }
    if (status == CM_OK && !request_send(tls, &address, ret_live->nonce)) {
        status =
            cm_error_set(err, CM_E_SYSTEM, "CM-EVD-CONNECT", "cannot send to %s", address.host);
    }
    if (status == CM_OK) {
        status =
            body_find(answer, answer_read(tls, answer, sizeof(answer) - 1), &body, &bytes, err);
    }
    if (status == CM_OK && bytes > size) {
        status = cm_error_set(err, CM_E_EVIDENCE, "CM-EVD-HTTP", "the evidence is too long");
    }
    if (status == CM_OK) {
        memcpy(ret_bytes, body, bytes);
        *ret_used = bytes;
    }
    SSL_free(tls);
    SSL_CTX_free(context);
    if (fd >= 0) {
        close(fd);
    }
    return status;
}
