/* casemate-verify: evidence in, verdict out. No TPM library; believes the trust file alone. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "loader/evidence/boot_log.h"
#include "loader/evidence/live.h"
#include "loader/evidence/verify.h"
#include "runtime/base/hex.h"

struct arguments {
    const char *subject, *trust, *nonce, *last, *at, *boot_log;
    bool json;
};

static const char help[] =
    "usage: casemate-verify https://HOST:PORT | FILE --trust TRUST [options]\n\n"
    "Asks a host for evidence of what it runs, bound to this connection and a fresh nonce, or\n"
    "reads it from a file; believes only what the trust file says (`casemate-pack trust`).\n\n"
    "  --trust FILE   nodes, owners, packages, adapters and PCR values to believe\n"
    "                 (required)\n"
    "  --nonce HEX    a file's evidence must answer this nonce\n"
    "  --last FILE    remember the TPM's clock there: evidence of an older one is refused\n"
    "  --at SECONDS   judge age as at this Unix time (for archived evidence)\n"
    "  --boot-log FILE  the firmware's log (binary_bios_measurements) must lead to the quoted "
    "PCRs\n"
    "  --json         evidence and verdict for machines\n\n"
    "Exit codes: 0 believed, 2 usage, 3 trust file, 7 refused, 9 network or file.\n"
    "example: casemate-verify https://127.0.0.1:8443 --trust node1.trust\n";

static enum cm_status arguments_read(int count, char **words, struct arguments *arguments,
                                     struct cm_error *err)
{
    const struct {
        const char *name;
        const char **value;
    } rows[] = {{"--trust", &arguments->trust},
                {"--nonce", &arguments->nonce},
                {"--last", &arguments->last},
                {"--at", &arguments->at},
                {"--boot-log", &arguments->boot_log}};
    for (int i = 1; i < count; i++) {
        size_t row = 0;
        while (row < sizeof(rows) / sizeof(rows[0]) && strcmp(words[i], rows[row].name) != 0) {
            row++;
        }
        if (row < sizeof(rows) / sizeof(rows[0]) && i + 1 < count) {
            *rows[row].value = words[++i];
        } else if (strcmp(words[i], "--json") == 0) {
            arguments->json = true;
        } else if (words[i][0] != '-' && arguments->subject == NULL) {
            arguments->subject = words[i];
        } else {
            return cm_error_set(err, CM_E_USAGE, "CM-EVD-USAGE", "do not know '%.80s'", words[i]);
        }
    }
    return arguments->subject != NULL && arguments->trust != NULL
               ? CM_OK
               : cm_error_set(err, CM_E_USAGE, "CM-EVD-USAGE",
                              "a host or file and --trust are needed");
}

static enum cm_status file_read(const char *path, void *bytes, size_t size, size_t *ret_used,
                                struct cm_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t used = 0;
    ssize_t got = fd >= 0 ? 1 : -1;
    while (got > 0 && used < size) { /* the kernel gives its log in pieces */
        got = read(fd, (uint8_t *)bytes + used, size - used);
        used += got > 0 ? (size_t)got : 0;
    }
    int error_number = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (got < 0) {
        return cm_error_errno(err, error_number, "CM-EVD-READ", "cannot read %s", path);
    }
    *ret_used = used;
    return CM_OK;
}

static enum cm_status trust_load(const char *path, struct cm_trust *ret_trust, struct cm_error *err)
{
    static char text[CM_TRUST_BYTES_MAX];
    size_t used = 0;
    enum cm_status status = file_read(path, text, sizeof(text), &used, err);
    return status == CM_OK ? cm_trust_parse(text, used, path, ret_trust, err) : status;
}

/* "reset restart clock"; a file that is not there yet is no memory. */
static bool last_load(const char *path, struct cm_evidence_last *last)
{
    char text[128] = "", *at = text;
    size_t used = 0;
    if (path == NULL || file_read(path, text, sizeof(text) - 1, &used, NULL) != CM_OK) {
        return false;
    }
    last->reset_count = (uint32_t)strtoul(at, &at, 10);
    last->restart_count = (uint32_t)strtoul(at, &at, 10);
    last->clock_ms = strtoull(at, &at, 10);
    return at != text;
}

static enum cm_status last_save(const char *path, const struct cm_attest *attest,
                                struct cm_error *err)
{
    char partial[4096 + 16];
    if (path == NULL || strlen(path) >= 4096) {
        return CM_OK;
    }
    snprintf(partial, sizeof(partial), "%s.partial", path);
    FILE *file = fopen(partial, "we");
    bool ok =
        file != NULL && fprintf(file, "%u %u %llu\n", attest->reset_count, attest->restart_count,
                                (unsigned long long)attest->clock_ms) > 0;
    ok = (file == NULL || fclose(file) == 0) && ok && rename(partial, path) == 0;
    return ok ? CM_OK : cm_error_errno(err, errno, "CM-EVD-WRITE", "cannot write %s", path);
}

static void hex_print(const char *name, const uint8_t *bytes, size_t size)
{
    char hex[2 * CM_PUBLIC_KEY_BYTES + 1];
    CM_ASSERT(size <= CM_PUBLIC_KEY_BYTES);
    cm_hex_write(bytes, size, hex);
    printf(" \"%s\": \"%s\",\n", name, hex);
}

/* Text as a JSON string; anything that is not plain ASCII as \u00XX. */
static void text_print(const char *text, size_t size)
{
    putchar('"');
    for (size_t i = 0; i < size && text[i] != '\0'; i++) {
        uint8_t byte = (uint8_t)text[i];
        if (byte < 0x20 || byte > 0x7e || byte == '"' || byte == '\\') {
            printf("\\u%04x", byte);
        } else {
            putchar(byte);
        }
    }
    putchar('"');
}

static void events_print(const struct cm_measurement *log)
{
    printf(" \"events\": [");
    for (uint32_t i = 0; i < log->count; i++) {
        const struct cm_event *event = &log->events[i];
        bool named = event->type <= CM_EVENT_FILTERS || event->type == CM_EVENT_DEVICE;
        printf("%s{\"type\": \"%s\", \"name\": ", i > 0 ? ", " : "", cm_event_name(event->type));
        text_print((const char *)event->data, named ? event->bytes : 0);
        printf("}");
    }
    printf("],\n");
}

static void adapters_print(const struct cm_evidence *e)
{
    printf(" \"adapters\": [");
    for (uint32_t i = 0; i < e->adapter_count; i++) {
        const struct cm_evidence_adapter *adapter = &e->adapters[i];
        printf("%s{\n \"name\": ", i > 0 ? ", " : "");
        text_print(adapter->name, sizeof(adapter->name));
        printf(",\n");
        hex_print("core_digest", adapter->core_digest, sizeof(adapter->core_digest));
        hex_print("owner", adapter->owner_key, sizeof(adapter->owner_key));
        printf(" \"serial\": %llu}", (unsigned long long)adapter->serial);
    }
    printf("],\n");
}

static void json_print(const struct cm_evidence *e, const struct cm_evidence_facts *facts,
                       enum cm_status status, const struct cm_error *err)
{
    printf("{\n \"kind\": \"%s\",\n \"mode\": \"%s\",\n \"made_unix_s\": %llu,\n",
           e->kind == CM_QUOTE_SESSION ? "session" : "boot",
           e->mode == CM_ATTEST_STRICT ? "strict" : "restartable",
           (unsigned long long)e->made_unix_s);
    hex_print("nonce", e->nonce, sizeof(e->nonce));
    hex_print("tls_key_sha256", e->tls_key_digest, sizeof(e->tls_key_digest));
    hex_print("core_digest", e->core_digest, sizeof(e->core_digest));
    hex_print("owner", e->owner_key, sizeof(e->owner_key));
    hex_print("node", facts->enrolment.node, sizeof(facts->enrolment.node));
    for (uint32_t i = 0; i < e->pcr_count; i++) {
        char name[16];
        snprintf(name, sizeof(name), "pcr%u", e->pcrs[i]);
        hex_print(name, e->pcr_values[i], CM_DIGEST_BYTES);
    }
    adapters_print(e);
    events_print(&facts->log);
    printf(" \"believed\": %s,\n \"id\": \"%s\",\n \"text\": ", status == CM_OK ? "true" : "false",
           status == CM_OK ? "" : err->id);
    text_print(status == CM_OK ? "" : err->text, CM_ERROR_TEXT_BYTES);
    printf("\n}\n");
}

static void summary_print(const struct arguments *arguments, const struct cm_evidence *e,
                          const struct cm_evidence_facts *facts)
{
    printf("believed: node %s runs package %02x%02x%02x%02x… in the signed state (%s)\n",
           facts->enrolment.node_name, e->core_digest[0], e->core_digest[1], e->core_digest[2],
           e->core_digest[3], e->mode == CM_ATTEST_STRICT ? "strict" : "restartable");
    for (uint32_t i = 0; i < e->adapter_count; i++) {
        const struct cm_evidence_adapter *adapter = &e->adapters[i];
        const uint8_t *digest = adapter->core_digest, *owner = adapter->owner_key + 1;
        printf("with adapter %s: package %02x%02x%02x%02x…, owner %02x%02x%02x%02x…\n",
               adapter->name, digest[0], digest[1], digest[2], digest[3], owner[0], owner[1],
               owner[2], owner[3]);
    }
    if (e->kind == CM_QUOTE_BOOT) {
        printf("%s is evidence of the start: it proves no connection\n", arguments->subject);
    }
    if (facts->enrolment.development) {
        printf("its TPM is a development TPM: this shows the plumbing and proves nothing\n");
    }
}

static enum cm_status boot_log_check(const char *path, const struct cm_evidence *evidence,
                                     struct cm_error *err)
{
    static uint8_t bytes[CM_BOOT_LOG_BYTES_MAX + 1];
    static struct cm_boot_log log;
    size_t used = 0;
    if (path == NULL) {
        return CM_OK;
    }
    enum cm_status status = file_read(path, bytes, sizeof(bytes), &used, err);
    if (status == CM_OK) {
        status = cm_boot_log_parse(bytes, used, &log, err);
    }
    return status == CM_OK ? cm_boot_log_check(&log, evidence, err) : status;
}

static enum cm_status verify(const struct arguments *arguments, struct cm_error *err)
{
    static struct cm_trust trust;
    static struct cm_evidence evidence;
    static struct cm_evidence_facts facts;
    static uint8_t bytes[CM_EVIDENCE_BYTES_MAX + 1];
    struct cm_evidence_live live;
    struct cm_evidence_last last;
    uint8_t nonce[CM_EVIDENCE_NONCE_BYTES];
    size_t used = 0;
    bool is_live = strstr(arguments->subject, "://") != NULL;
    struct cm_evidence_question question = {.evidence = &evidence, .trust = &trust};
    question.now_unix_s =
        arguments->at != NULL ? strtoull(arguments->at, NULL, 10) : (uint64_t)time(NULL);
    if (arguments->nonce != NULL &&
        (is_live ||
         !cm_hex_read(arguments->nonce, strlen(arguments->nonce), nonce, sizeof(nonce)))) {
        return cm_error_set(
            err, CM_E_USAGE, "CM-EVD-USAGE",
            "--nonce takes 64 hex digits, for a file (a live host gets a fresh one)");
    }
    question.nonce = arguments->nonce != NULL ? nonce : NULL;
    question.live = is_live ? &live : NULL;
    question.last = last_load(arguments->last, &last) ? &last : NULL;
    enum cm_status status = trust_load(arguments->trust, &trust, err);
    if (status == CM_OK) {
        status = is_live
                     ? cm_live_fetch(arguments->subject, bytes, sizeof(bytes), &used, &live, err)
                     : file_read(arguments->subject, bytes, sizeof(bytes), &used, err);
    }
    if (status == CM_OK) {
        status = cm_evidence_parse(bytes, used, &evidence, err);
    }
    if (status != CM_OK) {
        return status;
    }
    status = cm_evidence_verify(&question, &facts, err);
    if (status == CM_OK) {
        status = boot_log_check(arguments->boot_log, &evidence, err);
    }
    if (arguments->json) {
        json_print(&evidence, &facts, status, err);
    } else if (status == CM_OK) {
        summary_print(arguments, &evidence, &facts);
    }
    return status == CM_OK ? last_save(arguments->last, &facts.attest, err) : status;
}

int main(int argc, char **argv)
{
    struct arguments arguments = {.json = false};
    struct cm_error err = {.status = CM_OK};
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(help, stdout);
        return 0;
    }
    signal(SIGPIPE, SIG_IGN);
    enum cm_status status = arguments_read(argc, argv, &arguments, &err);
    if (status == CM_OK) {
        status = verify(&arguments, &err);
    }
    if (status != CM_OK) {
        fflush(stdout);
        fprintf(stderr, "casemate-verify: %s: %s\n", err.id, err.text);
    }
    if (status == CM_E_USAGE) {
        fputs("casemate-verify --help explains it\n", stderr);
    }
    return cm_status_exit_code(status);
}
