/* Twin arms of loading: the sealed package, and the same layout that is not encrypted, through the
 * same pipeline. load PACKAGE KEYFILE PLAINFILE ROUNDS [cold] prints JSON. PLAINFILE is written
 * where it is missing; it holds plaintext weights, so this is for tests and benches alone.
 *
 * An arm is a load as the worker does it: head, arena (populated, locked), payload, bind. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "loader/package/internal.h"
#include "loader/stream/stream_internal.h"
#include "runtime/worker/bind.h"

#define ROUNDS_MAX 64u
#define KV_PAGES   364u /* 256 MiB of the test model: the default of casemate.yaml */
#define THREADS    2u

static struct cm_error err;

static void must(enum cm_status status)
{
    if (status != CM_OK) {
        fprintf(stderr, "load: %s (%s)\n", err.text, err.id);
        exit(cm_status_exit_code(status));
    }
}

static void need(bool ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(9);
    }
}

static double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

enum figure { TOTAL, HEAD, RESERVE, STREAM, READ, VERIFY, DECRYPT, BIND, FIGURES };
static const char *const names[FIGURES] = {"total",    "head",       "reserve",     "stream",
                                           "read_sum", "verify_sum", "decrypt_sum", "bind"};

struct inputs {
    int fd, plain_fd;
    uint8_t key[CM_KEY_BYTES];
    uint8_t owner_key[CM_PUBLIC_KEY_BYTES];
};

/* One whole load; `plain`: the payload of the other file, and nothing to check or decrypt. */
static void load_one(const struct inputs *in, bool plain, double ret_ms[FIGURES])
{
    struct cm_package *package;
    struct cm_manifest manifest;
    struct cm_worker_model model;
    struct cm_device *device;
    struct cm_stream_source source;
    struct cm_stream_times times;
    const struct cm_device_options options = {.threads = THREADS};
    const struct cm_stream_options stream = {.threads = THREADS};
    size_t bytes;
    double start = now_ms();
    must(cm_package_open(in->fd, in->key, in->owner_key, &package, &err));
    const struct cm_package_core *core = &cm_package_head_of(package)->core;
    const uint8_t *sealed = cm_package_manifest(package, &bytes);
    must(cm_manifest_parse(sealed, bytes, core->payload_bytes, &manifest, &err));
    must(cm_worker_model_make(&manifest, 0, &model, &err));
    double head = now_ms();
    const struct cm_device_reserve reserve = {.model = &model.model,
                                              .payload_bytes = core->payload_bytes,
                                              .segment_bytes = core->segment_bytes,
                                              .slots = 8,
                                              .kv_pages = KV_PAGES,
                                              .context_max = model.model.context_max,
                                              .step_tokens_max = 256};
    must(cm_device_open("cpu", &options, &device, &err));
    must(cm_device_reserve(device, &reserve, &err));
    double reserved = now_ms();
    cm_stream_package_source(package, in->fd, &source);
    if (plain) {
        source.fd = in->plain_fd;
        source.payload_offset = 0;
        source.verify = NULL;
        source.decrypt = NULL;
    }
    must(cm_stream_run(&source, device, &stream, &times, &err));
    double streamed = now_ms();
    must(cm_device_model_bind(device, &model.model, &err));
    double bound = now_ms();
    ret_ms[TOTAL] = bound - start;
    ret_ms[HEAD] = head - start;
    ret_ms[RESERVE] = reserved - head;
    ret_ms[STREAM] = streamed - reserved;
    ret_ms[READ] = (double)times.read_us / 1e3;
    ret_ms[VERIFY] = (double)times.verify_us / 1e3;
    ret_ms[DECRYPT] = (double)times.decrypt_us / 1e3;
    ret_ms[BIND] = bound - streamed;
    cm_device_close(device);
    cm_worker_model_done(&model);
    cm_manifest_done(&manifest);
    cm_package_close(package);
}

/* The owner's key is read from the head: a bench has no pin to compare it with. */
static void owner_read(struct inputs *in)
{
    uint8_t *head = malloc(CM_PACKAGE_HEAD_BYTES);
    struct cm_package_head *parsed = malloc(sizeof(*parsed));
    need(head != NULL && parsed != NULL, "memory");
    must(cm_read_exact(in->fd, head, CM_PACKAGE_HEAD_BYTES, 0, "head", &err));
    must(cm_package_head_parse(head, CM_PACKAGE_HEAD_BYTES, parsed, &err));
    memcpy(in->owner_key, parsed->core.owner_key, sizeof(in->owner_key));
    free(parsed);
    free(head);
}

static void plain_write(const struct inputs *in)
{
    struct cm_package *package;
    static uint8_t segment[CM_PACKAGE_SEGMENT_BYTES];
    must(cm_package_open(in->fd, in->key, in->owner_key, &package, &err));
    for (uint64_t i = 0; i < cm_package_head_of(package)->core.segment_count; i++) {
        uint64_t offset;
        size_t bytes;
        cm_package_segment_place(package, i, &offset, &bytes);
        must(cm_read_exact(in->fd, segment, bytes, offset, "payload", &err));
        must(cm_package_segment_open(package, i, segment, bytes, segment, &err));
        must(cm_write_exact(in->plain_fd, segment, bytes, i * sizeof(segment), "plain", &err));
    }
    cm_package_close(package);
    need(fsync(in->plain_fd) == 0, "fsync");
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void arm_print(const char *arm, double (*ms)[FIGURES], uint32_t rounds, const char *end)
{
    printf("\"%s_ms\": {", arm);
    for (int f = 0; f < FIGURES; f++) {
        double sorted[ROUNDS_MAX];
        for (uint32_t i = 0; i < rounds; i++) {
            sorted[i] = ms[i][f];
        }
        qsort(sorted, rounds, sizeof(double), by_value);
        printf("%s\"%s\": {\"median\": %.3f, \"least\": %.3f, \"greatest\": %.3f}",
               f > 0 ? ", " : "", names[f], sorted[rounds / 2], sorted[0], sorted[rounds - 1]);
    }
    printf("}%s", end);
}

/* One core, text in cache: GB/s of what a load spends its time on, ours and OpenSSL's. */
static void kernels_print(void)
{
    static uint8_t text[CM_SHA256_LANES][CM_PACKAGE_SEGMENT_BYTES];
    static uint8_t digests[CM_SHA256_LANES][CM_DIGEST_BYTES];
    const uint8_t *lanes[CM_SHA256_LANES];
    uint8_t key[CM_AEAD_KEY_BYTES] = {1}, tag[CM_AEAD_TAG_BYTES];
    double best[5] = {1e9, 1e9, 1e9, 1e9, 1e9};
    const double gigabytes = sizeof(text) / 1e9, one = sizeof(text[0]) / 1e9;
    for (uint32_t i = 0; i < CM_SHA256_LANES; i++) {
        lanes[i] = text[i];
    }
    for (int round = 0; round < 20; round++) {
        double at[6];
        must(cm_aead_seal(CM_SUITE_AES_256_GCM, key, 0, text[0], sizeof(text[0]), text[1], tag,
                          &err));
        at[0] = now_ms();
        must(cm_aead_open(CM_SUITE_AES_256_GCM, key, 0, text[1], sizeof(text[0]), tag, text[2],
                          &err));
        at[1] = now_ms();
        must(cm_aead_open_evp(CM_SUITE_AES_256_GCM, key, 0, text[1], sizeof(text[0]), tag, text[2],
                              &err));
        at[2] = now_ms();
        if (cm_sha256_lanes_available()) {
            cm_sha256_lanes(lanes, sizeof(text[0]), digests);
        }
        at[3] = now_ms();
        for (uint32_t i = 0; i < CM_SHA256_LANES; i++) {
            must(cm_sha256(text[i], sizeof(text[i]), digests[i], &err));
        }
        at[4] = now_ms();
        for (uint32_t i = 0; cm_sha256_pair_available() && i < CM_SHA256_LANES;
             i += CM_SHA256_PAIR) {
            cm_sha256_pair(lanes + i, sizeof(text[i]), digests + i);
        }
        at[5] = now_ms();
        for (int k = 0; k < 5; k++) {
            best[k] = at[k + 1] - at[k] < best[k] ? at[k + 1] - at[k] : best[k];
        }
    }
    printf(
        "\"kernels_gb_per_s\": {\"aes_256_gcm\": %.2f, \"aes_256_gcm_openssl\": %.2f, "
        "\"sha_256_lanes\": %.2f, \"sha_256_pair\": %.2f, \"sha_256_openssl\": %.2f, \"vaes\": %s}",
        1e3 * one / best[0], 1e3 * one / best[1],
        cm_sha256_lanes_available() ? 1e3 * gigabytes / best[2] : 0.0,
        cm_sha256_pair_available() ? 1e3 * gigabytes / best[4] : 0.0, 1e3 * gigabytes / best[3],
        cm_gcm_vaes_available() ? "true" : "false");
}

int main(int count, char **words)
{
    static double sealed[ROUNDS_MAX][FIGURES], plain[ROUNDS_MAX][FIGURES];
    struct inputs in;
    struct stat facts;
    if (count < 5) {
        fprintf(stderr, "usage: load PACKAGE KEYFILE PLAINFILE ROUNDS [cold]\n");
        return 2;
    }
    uint32_t rounds = (uint32_t)atoi(words[4]);
    bool cold = count > 5 && strcmp(words[5], "cold") == 0;
    int key_fd = open(words[2], O_RDONLY);
    in.fd = open(words[1], O_RDONLY);
    in.plain_fd = open(words[3], O_RDWR | O_CREAT, 0600);
    need(in.fd >= 0 && in.plain_fd >= 0 && read(key_fd, in.key, sizeof(in.key)) == CM_KEY_BYTES,
         "inputs");
    need(rounds >= 1 && rounds <= ROUNDS_MAX && fstat(in.plain_fd, &facts) == 0, "rounds");
    owner_read(&in);
    if (facts.st_size == 0) {
        plain_write(&in);
    }
    for (uint32_t i = 0; i <= rounds; i++) { /* the first round warms up */
        uint32_t at = i > 0 ? i - 1 : 0;
        for (int arm = 0; arm < 2; arm++) {
            if (cold) {
                posix_fadvise(in.fd, 0, 0, POSIX_FADV_DONTNEED);
                posix_fadvise(in.plain_fd, 0, 0, POSIX_FADV_DONTNEED);
            }
            load_one(&in, arm == 1, arm == 0 ? sealed[at] : plain[at]);
        }
    }
    printf("{\"cold\": %s, \"payload_bytes\": %lld, ", cold ? "true" : "false",
           (long long)facts.st_size);
    arm_print("sealed", sealed, rounds, ", ");
    arm_print("plain", plain, rounds, ", ");
    kernels_print();
    printf("}\n");
    return 0;
}
