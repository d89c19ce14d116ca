/* A supervisor and a scripted worker around a real casemate-gateway, for tests/gateway_scene.py.
 *
 *     gateway_harness GATEWAY FOLDER [name=value …]
 *
 * Makes a TLS key page, a self-signed certificate (FOLDER/certificate.pem), rings, the key table
 * and a listener on 127.0.0.1; the gateway's log goes to FOLDER/gateway.log. Events leave as JSON
 * lines on stdout, commands come as lines on stdin. What the worker does, the first word of the
 * last message says. Built for tests only, never installed. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/sha.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "runtime/base/cursor.h"
#include "runtime/base/frame.h"
#include "runtime/base/ring.h"
#include "runtime/base/sealed.h"
#include "runtime/base/wire.h"
#include "sandbox/confine.h"

#define JOBS_MAX  256
#define KEYS_MAX  16
#define WORD_MAX  1000
#define TEXT_MAX  (1u << 20)
#define STATS_MS  500
#define PAGE_MODE 0600

struct job {
    bool used, silent, stubborn;
    uint64_t id;
    char *text; /* the script's rest */
    size_t offset;
    uint32_t sent, count, max_tokens;
    uint64_t next_ms, interval_ms;
    uint32_t finish;
    bool die;
};

static struct cm_config_gateway config = {
    .header_bytes_max = 16384,
    .body_bytes_max = 65536,
    .connections_max = 64,
    .requests_max = 8,
    .requests_per_key_max = 6,
    .header_timeout_ms = 2000,
    .body_timeout_ms = 2000,
    .write_timeout_ms = 2000,
    .request_timeout_ms = 20000,
    .ring_data_bytes = 1u << 20,
    .version = "harness",
};
static struct cm_state state = {.ready = 1, .load = {.stage = CM_LOAD_READY}};
static struct cm_channel channel;
static struct cm_frame frame;
static struct cm_error err;
static struct cm_ring requests, responses;
static int request_event = -1, response_event = -1;
static struct cm_api_key keys[KEYS_MAX];
static uint32_t key_count;
static uint64_t key_generation = 1;
static struct job jobs[JOBS_MAX];
static struct cm_wire_stats stats = {.kv_pages = 100, .kv_pages_used = 25};
static bool stats_on = true, hello_on = true;
static uint64_t stats_ms, beats;
static pid_t gateway = -1;
static uint8_t *record_bytes;
static const char *folder;

static void die(const char *what)
{
    fprintf(stderr, "gateway_harness: %s: %s\n", what, strerror(errno));
    if (gateway > 0) {
        kill(gateway, SIGKILL);
    }
    exit(1);
}

static void check(bool condition, const char *what)
{
    if (!condition) {
        die(what);
    }
}

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

static uint64_t now_ms(void)
{
    return now_us() / 1000u;
}

__attribute__((format(printf, 2, 3))) static void event(const char *name, const char *format, ...)
{
    va_list args;
    printf("{\"t\":%.6f,\"event\":\"%s\"", (double)now_us() / 1e6, name);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("}\n");
    fflush(stdout);
}

/* ------------------------------------------------------------------ the worker */

static bool put(uint32_t type, uint64_t id, const void *a, size_t a_bytes, const void *b,
                size_t b_bytes)
{
    const uint64_t one = 1;
    enum cm_status status = cm_ring_put(&responses, type, id, a, a_bytes, b, b_bytes, &err);
    check(status == CM_OK || status == CM_E_BUSY, err.text);
    ssize_t written = write(response_event, &one, sizeof(one));
    (void)written;
    return status == CM_OK;
}

static void hello_put(void)
{
    struct cm_wire_hello hello = {.context_max = 2048,
                                  .vocabulary = 1000,
                                  .sequences_max = 4,
                                  .queue_max = 4,
                                  .kv_pages = 100,
                                  .kv_page_positions = 32,
                                  .created_unix_s = 1700000000};
    snprintf(hello.model_name, sizeof(hello.model_name), "test-model");
    memset(hello.package_digest, 'a', sizeof(hello.package_digest) - 1);
    snprintf(hello.device, sizeof(hello.device), "none");
    if (hello_on) {
        check(put(CM_WIRE_HELLO, 0, &hello, sizeof(hello), NULL, 0), "hello");
        stats.last_step_us = now_us();
        check(put(CM_WIRE_STATS, 0, &stats, sizeof(stats), NULL, 0), "stats");
    }
}

static bool text_put(struct job *job, const char *text, size_t bytes)
{
    struct cm_wire_text head = {job->sent + 1, (uint32_t)bytes};
    return put(CM_WIRE_TEXT, job->id, &head, sizeof(head), text, bytes);
}

static void done_put(struct job *job, uint32_t finish)
{
    struct cm_wire_done done = {
        .finish = finish, .prompt_tokens = 7, .completion_tokens = job->sent, .cached_tokens = 3};
    if (put(CM_WIRE_DONE, job->id, &done, sizeof(done), NULL, 0)) {
        free(job->text);
        *job = (struct job){0};
    }
}

static void accept_put(uint64_t id, uint32_t max_tokens)
{
    struct cm_wire_accepted accepted = {.prompt_tokens = 7, .max_tokens = max_tokens};
    check(put(CM_WIRE_ACCEPTED, id, &accepted, sizeof(accepted), NULL, 0), "accepted");
}

static void verdict_put(uint64_t id, uint32_t stage, uint32_t action, const char *rule)
{
    struct cm_wire_verdict verdict = {
        .category = "test/one", .action = action, .stage = stage, .offset = 7, .bytes = 5};
    snprintf(verdict.rule, sizeof(verdict.rule), "%s", rule);
    check(put(CM_WIRE_VERDICT, id, &verdict, sizeof(verdict), NULL, 0), "verdict");
}

static void refuse(uint64_t id, const char *why)
{
    static const char *const names[] = {"",      "context", "queue", "input",
                                        "drain", "failed",  "empty", "filter"};
    struct cm_wire_refused refused = {.prompt_tokens = 5000, .limit = 2048};
    for (uint32_t i = 1; i < 8; i++) {
        if (strncmp(why, names[i], strlen(names[i])) == 0) {
            refused.reason = i;
        }
    }
    if (refused.reason == CM_REFUSAL_FILTER) {
        verdict_put(id, CM_VERDICT_INPUT, CM_VERDICT_REPORT, "a-report");
        verdict_put(id, CM_VERDICT_INPUT, CM_VERDICT_REFUSE, "a-refusal");
    }
    check(put(CM_WIRE_REFUSED, id, &refused, sizeof(refused), NULL, 0), "refused");
}

/* Records that no honest worker writes. */
static void hostile(uint64_t id, const char *how)
{
    struct cm_wire_text head = {1, 3};
    struct cm_wire_done done = {.finish = 99};
    if (strncmp(how, "early", 5) == 0) {
        put(CM_WIRE_TEXT, id, &head, sizeof(head), "abc", 3);
        return;
    }
    accept_put(id, 10);
    if (strncmp(how, "verdict", 7) == 0) {
        verdict_put(id, CM_VERDICT_INPUT, CM_VERDICT_REPORT, how + 8);
        return;
    }
    if (strncmp(how, "utf8", 4) == 0) {
        put(CM_WIRE_TEXT, id, &head, sizeof(head), "a\xff\xfe", 3);
    } else if (strncmp(how, "cut", 3) == 0) {
        put(CM_WIRE_TEXT, id, &head, sizeof(head), "ab\xc3", 3);
    } else if (strncmp(how, "length", 6) == 0) {
        put(CM_WIRE_TEXT, id, &head, sizeof(head), "abcdef", 6);
    } else if (strncmp(how, "short", 5) == 0) {
        put(CM_WIRE_TEXT, id, &head, 4, NULL, 0);
    } else if (strncmp(how, "long", 4) == 0) {
        done.finish = CM_FINISH_STOP;
        put(CM_WIRE_DONE, id, &done, sizeof(done), "x", 1);
    } else if (strncmp(how, "type", 4) == 0) {
        put(77, id, NULL, 0, NULL, 0);
    } else if (strncmp(how, "generate", 8) == 0) {
        put(CM_WIRE_CANCEL, id, NULL, 0, NULL, 0);
    } else if (strncmp(how, "unknown", 7) == 0) {
        put(CM_WIRE_TEXT, id + 1000, &head, sizeof(head), "abc", 3);
    } else if (strncmp(how, "finish", 6) == 0) {
        put(CM_WIRE_DONE, id, &done, sizeof(done), NULL, 0);
    } else if (strncmp(how, "hello", 5) == 0) {
        hello_put();
    } else if (strncmp(how, "cursor", 6) == 0) {
        *(volatile uint64_t *)(void *)responses.data = UINT64_MAX / 2;
        uint64_t one = 1;
        ssize_t written = write(response_event, &one, sizeof(one));
        (void)written;
    } else if (strncmp(how, "count", 5) == 0) {
        head.completion_tokens = 5;
        put(CM_WIRE_TEXT, id, &head, sizeof(head), "abc", 3);
        head.completion_tokens = 4;
        put(CM_WIRE_TEXT, id, &head, sizeof(head), "abc", 3);
    }
}

static bool begins(const char *text, const char *word, const char **ret_rest)
{
    size_t size = strlen(word);
    if (strncmp(text, word, size) != 0 || (text[size] != ' ' && text[size] != '\0')) {
        return false;
    }
    *ret_rest = text[size] == ' ' ? text + size + 1 : text + size;
    return true;
}

static void job_start(uint64_t id, const struct cm_wire_generate *wire, const char *text)
{
    const char *rest = text;
    struct job *job = NULL;
    if (begins(text, "refuse", &rest)) {
        refuse(id, rest);
        return;
    }
    if (begins(text, "hostile", &rest)) {
        hostile(id, rest);
        return;
    }
    for (size_t i = 0; i < JOBS_MAX && job == NULL; i++) {
        job = jobs[i].used ? NULL : &jobs[i];
    }
    check(job != NULL, "too many jobs");
    *job = (struct job){.used = true, .id = id, .finish = CM_FINISH_STOP, .count = UINT32_MAX};
    job->max_tokens = wire->max_tokens != 0 ? wire->max_tokens : 2000;
    if (begins(text, "silent", &rest)) { /* waits in the queue for ever */
        job->silent = true;
        return;
    }
    accept_put(id, job->max_tokens);
    if (begins(text, "slow", &rest)) {
        job->interval_ms = 50;
        job->count = (uint32_t)atoi(rest);
    } else if (begins(text, "hang", &rest)) {
        job->silent = true;
    } else if (begins(text, "stubborn", &rest)) {
        job->silent = true;
        job->stubborn = true;
    } else if (begins(text, "flood", &rest)) {
        job->count = (uint32_t)atoi(rest);
        job->interval_ms = UINT64_MAX;
    } else if (begins(text, "fail", &rest)) {
        job->count = (uint32_t)atoi(rest);
        job->finish = CM_FINISH_FAILED;
    } else if (begins(text, "giveup", &rest)) {
        job->count = (uint32_t)atoi(rest);
        job->finish = CM_FINISH_CANCELLED;
    } else if (begins(text, "filter", &rest)) {
        verdict_put(id, CM_VERDICT_OUTPUT, CM_VERDICT_REFUSE, "an-end");
        job->count = 1;
        job->finish = CM_FINISH_FILTER;
    } else if (begins(text, "die", &rest)) {
        job->count = (uint32_t)atoi(rest);
        job->die = true;
        job->interval_ms = 20;
    } else {
        (void)begins(text, "echo", &rest);
        job->text = strdup(rest);
    }
}

static void rings_send(void);

/* Next piece of a reply: the echoed words, or numbered ones. */
static void job_step(struct job *job)
{
    static char block[WORD_MAX];
    char word[32];
    if (job->silent || now_ms() < job->next_ms) {
        return;
    }
    bool over = job->text != NULL ? job->text[job->offset] == '\0' : job->sent >= job->count;
    if (over && job->die) {
        event("died", ",\"id\":%llu", (unsigned long long)job->id);
        rings_send();
        return;
    }
    if (over || job->sent >= job->max_tokens) {
        done_put(job, over ? job->finish : CM_FINISH_LENGTH);
        return;
    }
    if (job->text != NULL) {
        const char *from = job->text + job->offset;
        size_t bytes = strcspn(from + 1, " ") + 1; /* a word and the space before it */
        if (text_put(job, from, bytes)) {
            job->offset += bytes;
            job->sent++;
        }
        return;
    }
    if (job->interval_ms == UINT64_MAX) { /* flood */
        memset(block, 'x', sizeof(block));
        while (job->sent < job->count && text_put(job, block, sizeof(block))) {
            job->sent++;
        }
        return;
    }
    int size = snprintf(word, sizeof(word), "%s%u", job->sent > 0 ? " " : "", job->sent);
    if (text_put(job, word, (size_t)size)) {
        job->sent++;
        job->next_ms = now_ms() + job->interval_ms;
    }
}

static void hex_print(const uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        printf("%02x", bytes[i]);
    }
}

/* Reads the record as the worker must, and tells what it says. */
static void on_generate(uint64_t id, size_t bytes)
{
    struct cm_wire_generate wire;
    struct cm_cursor cursor = cm_cursor_init(record_bytes, bytes);
    const uint8_t *at = NULL;
    uint32_t size = 0;
    cm_cursor_copy(&cursor, &wire, sizeof(wire));
    const struct cm_sampling *s = &wire.sampling;
    printf("{\"t\":%.6f,\"event\":\"generate\",\"id\":%llu,\"kind\":%u,\"max_tokens\":%u,"
           "\"min_tokens\":%u,\"ignore_eos\":%u,\"tenant\":\"%016llx\",\"temperature\":%.9g,"
           "\"top_p\":%.9g,\"min_p\":%.9g,\"top_k\":%u,\"frequency_penalty\":%.9g,"
           "\"presence_penalty\":%.9g,\"repetition_penalty\":%.9g,\"seed\":%llu,\"stops\":[",
           (double)now_us() / 1e6, (unsigned long long)id, wire.prompt_kind, wire.max_tokens,
           wire.min_tokens, wire.ignore_eos, (unsigned long long)wire.tenant,
           (double)s->temperature, (double)s->top_p, (double)s->min_p, s->top_k,
           (double)s->frequency_penalty, (double)s->presence_penalty, (double)s->repetition_penalty,
           (unsigned long long)s->seed);
    for (uint32_t i = 0; i < wire.stop_count; i++) {
        size = cm_cursor_u32(&cursor);
        at = cm_cursor_take(&cursor, size);
        check(at != NULL, "stop beyond the record");
        printf("%s\"", i > 0 ? "," : "");
        hex_print(at, size);
        printf("\"");
    }
    printf("],\"parts\":[");
    for (uint32_t i = 0; i < wire.part_count; i++) {
        uint32_t role = cm_cursor_u32(&cursor);
        size = cm_cursor_u32(&cursor);
        at = cm_cursor_take(&cursor, size);
        check(at != NULL, "part beyond the record");
        printf("%s[%u,\"", i > 0 ? "," : "", role);
        hex_print(at, size < 4096 ? size : 4096);
        printf("\"]");
    }
    printf("],\"exact\":%s}\n", cm_cursor_left(&cursor) == 0 ? "true" : "false");
    fflush(stdout);
    char *text = strndup((const char *)at, size);
    job_start(id, &wire, text);
    free(text);
}

static void on_cancel(uint64_t id)
{
    event("cancel", ",\"id\":%llu", (unsigned long long)id);
    for (size_t i = 0; i < JOBS_MAX; i++) {
        if (jobs[i].used && jobs[i].id == id && !jobs[i].stubborn) {
            jobs[i].silent = true;
            done_put(&jobs[i], CM_FINISH_CANCELLED);
        }
    }
}

static void requests_read(void)
{
    struct cm_record record;
    uint64_t count;
    const uint64_t one = 1;
    ssize_t got = read(request_event, &count, sizeof(count));
    (void)got;
    while (cm_ring_get(&requests, &record, record_bytes, TEXT_MAX, &err) == CM_OK) {
        if (record.type == CM_WIRE_GENERATE) {
            on_generate(record.request, record.bytes);
        } else if (record.type == CM_WIRE_CANCEL) {
            on_cancel(record.request);
        } else {
            die("a record of an unknown type");
        }
        got = write(response_event, &one, sizeof(one));
    }
}

/* ------------------------------------------------------------------ the supervisor */

/* Fresh rings; both ends of the old ones are forgotten, and with them all jobs. */
static void rings_make(int ret_gateway[CM_RING_FD_COUNT])
{
    int fds[8];
    check(cm_ring_make(config.ring_data_bytes, &fds[0], &fds[1], &fds[2], &fds[3], &err) == CM_OK &&
              cm_ring_make(config.ring_data_bytes, &fds[4], &fds[5], &fds[6], &fds[7], &err) ==
                  CM_OK,
          "rings");
    if (request_event >= 0) {
        cm_ring_close(&requests);
        cm_ring_close(&responses);
        close(request_event);
        close(response_event);
    }
    for (size_t i = 0; i < JOBS_MAX; i++) {
        free(jobs[i].text);
        jobs[i] = (struct job){0};
    }
    request_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    response_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    check(cm_ring_open_consumer(&requests, fds[1], fds[2], &err) == CM_OK &&
              cm_ring_open_producer(&responses, fds[4], fds[7], &err) == CM_OK,
          "mapping");
    const int view[CM_RING_FD_COUNT] = {fds[0], fds[3],        fds[5],
                                        fds[6], request_event, response_event};
    memcpy(ret_gateway, view, sizeof(view));
    close(fds[1]);
    close(fds[2]);
    close(fds[4]);
    close(fds[7]);
}

static void frame_send(enum cm_frame_type type, const void *payload, size_t bytes, const int *fds,
                       size_t count)
{
    check(cm_channel_send(&channel, type, payload, bytes, fds, count, &err) == CM_OK, err.text);
}

static void rings_send(void)
{
    int fds[CM_RING_FD_COUNT];
    rings_make(fds);
    frame_send(CM_FRAME_RINGS, NULL, 0, fds, CM_RING_FD_COUNT);
    for (size_t i = 0; i < 4; i++) {
        close(fds[i]);
    }
    hello_put();
}

static int key_order(const void *a, const void *b)
{
    return memcmp(((const struct cm_api_key *)a)->id, ((const struct cm_api_key *)b)->id, 8);
}

/* `names`: which keys the table holds (" a b "); NULL: all. */
static void keys_send(const char *names, bool disorder)
{
    struct cm_api_key rows[KEYS_MAX];
    struct cm_keys_info info = {.generation = key_generation++};
    for (uint32_t i = 0; i < key_count; i++) {
        if (names == NULL || strstr(names, keys[i].name) != NULL) {
            rows[info.count++] = keys[i];
        }
    }
    qsort(rows, info.count, sizeof(rows[0]), key_order);
    if (disorder) {
        struct cm_api_key first = rows[0];
        rows[0] = rows[1];
        rows[1] = first;
    }
    int fd = memfd_create("keys", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    size_t bytes = info.count * sizeof(rows[0]);
    check(fd >= 0 && write(fd, rows, bytes) == (ssize_t)bytes &&
              fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) == 0,
          "keys");
    frame_send(CM_FRAME_KEYS, &info, sizeof(info), &fd, 1);
    close(fd);
}

/* key=<text>:<name>:<expires_unix_s> */
static void key_add(char *value)
{
    struct cm_api_key *row = &keys[key_count++];
    char *name = strchr(value, ':');
    check(key_count <= KEYS_MAX && name != NULL, "key");
    *name++ = '\0';
    char *expires = strchr(name, ':');
    check(expires != NULL, "key expiry");
    *expires++ = '\0';
    for (size_t i = 0; i < 8; i++) {
        unsigned byte = 0;
        check(sscanf(value + 3 + 2 * i, "%2x", &byte) == 1, "key id");
        row->id[i] = (uint8_t)byte;
    }
    SHA256((const uint8_t *)value, strlen(value), row->hash);
    row->expires_unix_s = strtoull(expires, NULL, 10);
    snprintf(row->name, sizeof(row->name), "%s", name);
}

static void option(char *text)
{
    static const struct {
        const char *name;
        uint32_t *value;
    } numbers[] = {
        {"header_bytes_max", &config.header_bytes_max},
        {"body_bytes_max", &config.body_bytes_max},
        {"connections_max", &config.connections_max},
        {"requests_max", &config.requests_max},
        {"requests_per_key_max", &config.requests_per_key_max},
        {"header_timeout_ms", &config.header_timeout_ms},
        {"body_timeout_ms", &config.body_timeout_ms},
        {"write_timeout_ms", &config.write_timeout_ms},
        {"request_timeout_ms", &config.request_timeout_ms},
        {"max_tokens_default", &config.max_tokens_default},
        {"unauthenticated_metrics", &config.unauthenticated_metrics},
        {"ring_data_bytes", &config.ring_data_bytes},
    };
    char *value = strchr(text, '=');
    check(value != NULL, "option");
    *value++ = '\0';
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        if (strcmp(text, numbers[i].name) == 0) {
            *numbers[i].value = (uint32_t)strtoul(value, NULL, 10);
            return;
        }
    }
    if (strcmp(text, "key") == 0) {
        key_add(value);
    } else if (strcmp(text, "model_name") == 0) {
        snprintf(config.model_name, sizeof(config.model_name), "%s", value);
    } else {
        die(text);
    }
}

static X509 *certificate_make(EVP_PKEY *key)
{
    X509 *made = X509_new();
    X509_NAME *name = X509_get_subject_name(made);
    X509V3_CTX context;
    static const struct {
        int kind;
        const char *value;
    } rows[] = {{NID_subject_alt_name, "IP:127.0.0.1,DNS:localhost"},
                {NID_key_usage, "critical,digitalSignature,keyCertSign"},
                {NID_basic_constraints, "critical,CA:TRUE"},
                {NID_ext_key_usage, "serverAuth"}};
    X509_set_version(made, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(made), 1);
    X509_gmtime_adj(X509_getm_notBefore(made), -60);
    X509_gmtime_adj(X509_getm_notAfter(made), 86400);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const uint8_t *)"harness", -1, -1, 0);
    X509_set_issuer_name(made, name);
    X509_set_pubkey(made, key);
    X509V3_set_ctx(&context, made, made, NULL, NULL, 0);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        X509_EXTENSION *extension =
            X509V3_EXT_conf_nid(NULL, &context, rows[i].kind, rows[i].value);
        check(extension != NULL, rows[i].value);
        X509_add_ext(made, extension, -1);
        X509_EXTENSION_free(extension);
    }
    check(X509_sign(made, key, EVP_sha256()) > 0, "signing");
    char path[4096];
    snprintf(path, sizeof(path), "%s/certificate.pem", folder);
    FILE *file = fopen(path, "w");
    check(file != NULL && PEM_write_X509(file, made) == 1 && fclose(file) == 0, path);
    return made;
}

/* The key page as the keeper makes it, and the certificate. */
static int identity_make(struct cm_tls_page *ret_page)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = certificate_make(key);
    PKCS8_PRIV_KEY_INFO *info = EVP_PKEY2PKCS8(key);
    uint8_t *der = NULL;
    int size = i2d_PKCS8_PRIV_KEY_INFO(info, &der);
    uint8_t *page = NULL;
    bool secret = false;
    int fd = -1;
    check(size > 0 && cm_key_page_new(&fd, &secret, &err) == CM_OK &&
              cm_key_page_map(fd, &page, &err) == CM_OK,
          "key page");
    struct cm_writer writer = cm_writer_init(page, CM_KEY_PAGE_BYTES);
    cm_writer_u32(&writer, (uint32_t)size);
    cm_writer_bytes(&writer, der, (size_t)size);
    cm_key_page_unmap(page);
    OPENSSL_free(der);
    PKCS8_PRIV_KEY_INFO_free(info);
    der = NULL;
    size = i2d_X509(certificate, &der);
    check(size > 0 && (size_t)size <= sizeof(ret_page->certificate), "certificate");
    *ret_page = (struct cm_tls_page){.generation = 1, .certificate_bytes = (uint32_t)size};
    memcpy(ret_page->certificate, der, (size_t)size);
    OPENSSL_free(der);
    X509_free(certificate);
    EVP_PKEY_free(key);
    return fd;
}

static int listener_make(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof(address);
    const int on = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    check(fd >= 0 && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0 &&
              bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(fd, 128) == 0 &&
              getsockname(fd, (struct sockaddr *)&address, &bytes) == 0,
          "listener");
    event("port", ",\"port\":%u", ntohs(address.sin_port));
    return fd;
}

/* The gateway's filters and nothing else: what it does in any test, its policies must allow. */
static bool confinement_place(const int fds[CM_FD_COUNT])
{
    struct cm_confinement c = {.layers =
                                   CM_LAYER_BIT(CM_LAYER_NO_NEW) | CM_LAYER_BIT(CM_LAYER_FILTER),
                               .role = CM_ROLE_GATEWAY,
                               .filter_start = CM_FILTER_GATEWAY_START,
                               .filter_serve = CM_FILTER_GATEWAY};
    for (int i = CM_FD_CONTROL; i < CM_FD_COUNT; i++) {
        c.descriptors |= fds[i] >= 0 ? 1u << i : 0;
    }
    if (cm_confine_sanitized()) {
        c.layers = 0;
    }
    int fd = cm_memfd_sealed("confinement", &c, sizeof(c));
    return fd >= 0 && dup2(fd, CM_CONFINEMENT_FD) == CM_CONFINEMENT_FD && close(fd) == 0;
}

static void gateway_spawn(const char *program, const int fds[CM_FD_COUNT])
{
    int high[CM_FD_COUNT];
    gateway = fork();
    check(gateway >= 0, "fork");
    if (gateway > 0) {
        return;
    }
    for (int i = CM_FD_CONTROL; i < CM_FD_COUNT; i++) {
        high[i] = fds[i] >= 0 ? fcntl(fds[i], F_DUPFD_CLOEXEC, 100) : -1;
    }
    for (int i = CM_FD_CONTROL; i < CM_FD_COUNT; i++) {
        close(i);
        if (high[i] >= 0) {
            dup2(high[i], i);
        }
    }
    int null_fd = open("/dev/null", O_RDWR);
    dup2(null_fd, 0);
    close(null_fd);
    dup2(0, 1);
    dup2(CM_FD_LOG, 2);
    syscall(SYS_close_range, CM_FD_COUNT, ~0u, 0);
    check(confinement_place(fds), "confinement");
    execl(program, "casemate-gateway", (char *)NULL);
    _exit(127);
}

static void page_report(int fd)
{
    uint8_t *page = NULL;
    bool wiped = true;
    check(cm_key_page_map(fd, &page, &err) == CM_OK, "key page");
    for (size_t i = 0; i < CM_KEY_PAGE_BYTES; i++) {
        wiped = wiped && page[i] == 0;
    }
    cm_key_page_unmap(page);
    event("page", ",\"wiped\":%s", wiped ? "true" : "false");
}

static void on_frame(int page_fd)
{
    struct cm_error failed;
    switch (frame.type) {
    case CM_FRAME_READY:
        page_report(page_fd);
        event("ready", "%s", "");
        break;
    case CM_FRAME_BROKEN:
        event("broken", "%s", "");
        break;
    case CM_FRAME_DRAINED:
        event("drained", "%s", "");
        break;
    case CM_FRAME_HEARTBEAT:
        beats++;
        break;
    case CM_FRAME_FAILED:
        memcpy(&failed, frame.payload, sizeof(failed));
        cm_error_sanitise(&failed);
        event("failed", ",\"id\":\"%s\"", failed.id);
        fprintf(stderr, "gateway failed: %s\n", failed.text);
        break;
    default:
        die("an unexpected frame");
    }
}

static void memory_report(void)
{
    char path[64];
    char line[256];
    long resident = 0;
    long descriptors = 0;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)gateway);
    FILE *file = fopen(path, "r");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        (void)sscanf(line, "VmRSS: %ld", &resident);
        (void)sscanf(line, "FDSize: %ld", &descriptors);
    }
    if (file != NULL) {
        fclose(file);
    }
    event("memory", ",\"kib\":%ld,\"beats\":%llu", resident, (unsigned long long)beats);
}

static void state_command(const char *rest)
{
    state.ready = strcmp(rest, "ready") == 0;
    snprintf(state.reason, sizeof(state.reason), "%s", state.ready ? "" : rest);
    frame_send(CM_FRAME_STATE, &state, sizeof(state), NULL, 0);
}

static void command(char *line)
{
    const char *rest = "";
    struct cm_drain drain = {0};
    line[strcspn(line, "\n")] = '\0';
    if (begins(line, "state", &rest)) {
        state_command(rest);
    } else if (begins(line, "progress", &rest)) {
        state.load = (struct cm_progress){
            CM_LOAD_WEIGHTS, 0, 25, 100, 1500000, {0, 0, 300000, 450000, 750000}};
        state_command("loading");
    } else if (begins(line, "keys", &rest)) {
        keys_send(rest, false);
    } else if (begins(line, "disorder", &rest)) {
        keys_send(NULL, true);
    } else if (begins(line, "rings", &rest)) {
        rings_send();
    } else if (begins(line, "hello", &rest)) {
        hello_on = strcmp(rest, "on") == 0;
    } else if (begins(line, "stats", &rest)) {
        stats_on = strcmp(rest, "on") == 0;
    } else if (begins(line, "drain", &rest)) {
        drain.deadline_ms = (uint32_t)atoi(rest);
        frame_send(CM_FRAME_DRAIN, &drain, sizeof(drain), NULL, 0);
    } else if (begins(line, "memory", &rest)) {
        memory_report();
    } else if (begins(line, "stop", &rest)) {
        frame_send(CM_FRAME_STOP, NULL, 0, NULL, 0);
    } else {
        die(line);
    }
    event("did", ",\"command\":\"%s\"", line);
}

static void commands_read(void)
{
    static char bytes[4096];
    static size_t used;
    ssize_t got = read(0, bytes + used, sizeof(bytes) - 1 - used);
    if (got <= 0) { /* the test is gone */
        kill(gateway, SIGKILL);
        exit(0);
    }
    used += (size_t)got;
    bytes[used] = '\0';
    char *newline;
    while ((newline = strchr(bytes, '\n')) != NULL) {
        *newline = '\0';
        command(bytes);
        used -= (size_t)(newline + 1 - bytes);
        memmove(bytes, newline + 1, used + 1);
    }
}

static void worker_turn(void)
{
    for (size_t i = 0; i < JOBS_MAX; i++) {
        if (jobs[i].used) {
            job_step(&jobs[i]);
        }
    }
    if (stats_on && hello_on && now_ms() - stats_ms > STATS_MS) {
        stats_ms = now_ms();
        stats.last_step_us = now_us();
        stats.steps_total++;
        put(CM_WIRE_STATS, 0, &stats, sizeof(stats), NULL, 0);
    }
}

static bool jobs_active(void)
{
    for (size_t i = 0; i < JOBS_MAX; i++) {
        if (jobs[i].used && !jobs[i].silent) {
            return true;
        }
    }
    return false;
}

static void serve(int page_fd)
{
    for (;;) {
        int status = 0;
        struct pollfd polls[3] = {{.fd = 0, .events = POLLIN},
                                  {.fd = channel.fd, .events = POLLIN},
                                  {.fd = request_event, .events = POLLIN}};
        poll(polls, 3, jobs_active() ? 1 : 100);
        if (waitpid(gateway, &status, WNOHANG) == gateway) {
            event("exit", ",\"code\":%d,\"signal\":%d",
                  WIFEXITED(status) ? WEXITSTATUS(status) : -1,
                  WIFSIGNALED(status) ? WTERMSIG(status) : 0);
            return;
        }
        if ((polls[1].revents & POLLIN) != 0) {
            enum cm_status got = cm_channel_receive(&channel, &frame, &err);
            if (got == CM_OK) {
                on_frame(page_fd);
            } else if (got == CM_E_INPUT) {
                die(err.text);
            }
        }
        if ((polls[2].revents & POLLIN) != 0) {
            requests_read();
        }
        if (polls[0].revents != 0) {
            commands_read();
        }
        worker_turn();
    }
}

int main(int argc, char **argv)
{
    static struct cm_tls_page page;
    int page_fd;
    int fds[CM_FD_COUNT];
    int pair[2];
    char path[4096];
    check(argc >= 3, "usage: gateway_harness GATEWAY FOLDER [name=value …]");
    folder = argv[2];
    signal(SIGPIPE, SIG_IGN);
    for (int i = 3; i < argc; i++) {
        option(argv[i]);
    }
    for (size_t i = 0; i < CM_FD_COUNT; i++) {
        fds[i] = -1;
    }
    record_bytes = malloc(TEXT_MAX);
    snprintf(path, sizeof(path), "%s/gateway.log", folder);
    check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
    fds[CM_FD_CONTROL] = pair[1];
    fds[CM_FD_LOG] = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, PAGE_MODE);
    page_fd = identity_make(&page);
    fds[CM_FD_INPUT] = listener_make();
    rings_make(&fds[CM_FD_REQUEST_DATA]);
    gateway_spawn(argv[1], fds);
    close(pair[1]);
    close(fds[CM_FD_INPUT]);
    for (int i = CM_FD_REQUEST_DATA; i <= CM_FD_RESPONSE_CURSOR; i++) {
        close(fds[i]);
    }
    cm_channel_init(&channel, pair[0], CM_ROLE_SUPERVISOR, CM_ROLE_GATEWAY);
    frame_send(CM_FRAME_CONFIG, &config, sizeof(config), NULL, 0);
    frame_send(CM_FRAME_TLS_PAGE, &page, sizeof(page), &page_fd, 1);
    keys_send(NULL, false);
    frame_send(CM_FRAME_STATE, &state, sizeof(state), NULL, 0);
    hello_put();
    serve(page_fd);
    free(record_bytes);
    return 0;
}
