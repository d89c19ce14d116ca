/* A TPM that fails: each response of a whole unseal in turn is exchanged, damaged, cut, doubled,
 * late or never comes. Either the right key or a stable cause; and the TPM is as good as before. */
#include "tests/unit/tpm_scene.h"

#include <pthread.h>

#define RESPONSES 52u /* more than an unseal has: the rest shows that nothing was counted wrong */

enum fault {
    FAULT_CODE,
    FAULT_FLIP,
    FAULT_CUT,
    FAULT_GONE,
    FAULT_TWICE,
    FAULT_LATE,
    FAULT_REPLAY, /* the answer of the command before, in place of this one's */
    FAULT_BEHIND, /* from here on each command gets the answer of the one before */
    FAULT_SWAP,   /* this answer after the next one */
    FAULT_COUNT
};

/* Part 2, section 6.6: what chips answer when they are unwell. */
static const uint32_t codes[] = {0x101, 0x921, 0x902, 0x903, 0x98e, 0x128, 0x922, 0x908, 0x1df};

struct proxy {
    int keeper, tpm; /* our end towards the keeper; the TPM's */
    enum fault fault;
    uint32_t at, seen, code;
    unsigned seed;
    bool quotes;        /* a quote is asked for, not the key */
    uint8_t held[4096]; /* an answer that is kept back */
    size_t held_size;
    uint8_t *tap; /* all bytes both ways, TAP_BYTES; or NULL */
    size_t tapped;
};
#define TAP_BYTES (1u << 20)

static void tap(struct proxy *proxy, const uint8_t *bytes, size_t size)
{
    if (proxy->tap != NULL && size <= TAP_BYTES - proxy->tapped) {
        memcpy(proxy->tap + proxy->tapped, bytes, size);
        proxy->tapped += size;
    }
}

static size_t frame_read(int fd, uint8_t frame[4096])
{
    size_t used = 0, size = 10;
    while (used < size) {
        ssize_t got = read(fd, frame + used, size - used);
        if (got <= 0) {
            return 0;
        }
        used += (size_t)got;
        if (used == 10 && size == 10) {
            size =
                (size_t)frame[2] << 24 | (size_t)frame[3] << 16 | (size_t)frame[4] << 8 | frame[5];
            cr_assert(size >= 10 && size <= 4096);
        }
    }
    return size;
}

static void exchange(struct proxy *proxy, uint8_t frame[4096], size_t *size)
{
    uint8_t taken[4096];
    size_t taken_size = *size;
    memcpy(taken, frame, taken_size);
    memcpy(frame, proxy->held, proxy->held_size);
    *size = proxy->held_size;
    memcpy(proxy->held, taken, taken_size);
    proxy->held_size = taken_size;
}

/* Answers out of their order; nothing is changed in any of them. */
static void order_spoil(struct proxy *proxy, uint8_t frame[4096], size_t *size)
{
    bool before = proxy->seen < proxy->at;
    bool behind = proxy->fault == FAULT_BEHIND && proxy->seen >= proxy->at;
    bool swap = proxy->fault == FAULT_SWAP && proxy->seen <= proxy->at + 1 && !before;
    if (before || proxy->held_size == 0) {
        memcpy(proxy->held, frame, *size);
        proxy->held_size = *size;
    } else if (behind || swap || (proxy->fault == FAULT_REPLAY && proxy->seen == proxy->at)) {
        exchange(proxy, frame, size);
    }
}

/* False: the connection ends here. */
static bool response_spoil(struct proxy *proxy, uint8_t frame[4096], size_t *size)
{
    const uint8_t failure[10] = {
        0x80, 1, 0, 0, 0, 10, 0, 0, (uint8_t)(proxy->code >> 8), (uint8_t)proxy->code};
    switch (proxy->fault) {
    case FAULT_CODE:
        memcpy(frame, failure, sizeof(failure));
        *size = sizeof(failure);
        return true;
    case FAULT_FLIP:
        frame[6 + (size_t)rand_r(&proxy->seed) % (*size - 6)] ^=
            (uint8_t)(1 << rand_r(&proxy->seed) % 8);
        return true;
    case FAULT_CUT:
        cr_assert_geq(write(proxy->keeper, frame, *size / 2), 0);
        return false;
    case FAULT_GONE:
        return false;
    case FAULT_TWICE:
        cr_assert_geq(write(proxy->keeper, frame, *size), 0);
        return true;
    case FAULT_LATE:
        usleep(proxy->at == 20 ? 800000 : 30000); /* the slowest chips take most of a second */
        return true;
    case FAULT_REPLAY:
    case FAULT_BEHIND:
    case FAULT_SWAP:
        return true; /* order_spoil has done it */
    case FAULT_COUNT:
        break;
    }
    return false;
}

static void *proxy_run(void *context)
{
    struct proxy *proxy = context;
    uint8_t frame[4096];
    size_t size;
    bool alive = true;
    while (alive && (size = frame_read(proxy->keeper, frame)) > 0) {
        tap(proxy, frame, size);
        cr_assert_eq(write(proxy->tpm, frame, size), (ssize_t)size);
        size = frame_read(proxy->tpm, frame);
        tap(proxy, frame, size);
        proxy->seen++;
        if (size > 0 && proxy->fault >= FAULT_REPLAY) {
            order_spoil(proxy, frame, &size);
        }
        alive = size > 0 && (proxy->seen != proxy->at || response_spoil(proxy, frame, &size)) &&
                write(proxy->keeper, frame, size) == (ssize_t)size;
    }
    shutdown(proxy->keeper, SHUT_RDWR);
    return NULL;
}

/* What comes is signed by the node's key and answers this question, by OpenSSL's word. */
static enum cm_status quote(struct scene *s, struct cm_error *err)
{
    static uint8_t question[CM_DIGEST_BYTES];
    struct cm_tpm_quote got;
    uint8_t digest[CM_DIGEST_BYTES], ak[CM_PUBLIC_KEY_BYTES];
    uint32_t attributes;
    question[0]++;
    enum cm_status status =
        cm_tpm_quote(s->tpm, &s->enrolment, &s->enrolment.pcr, 1, question, &got, err);
    if (status == CM_OK) {
        EVP_Digest(got.attest, got.attest_bytes, digest, NULL, EVP_sha256(), NULL);
        cr_assert(cm_tpm_ecc_public(s->enrolment.ak_public, s->enrolment.ak_public_bytes,
                                    &attributes, ak) &&
                  cm_tpm_signature_good(ak, digest, got.signature));
        cr_assert_not_null(memmem(got.attest, got.attest_bytes, question, sizeof(question)),
                           "an older quote");
    }
    return status;
}

/* One keeper's life over a spoilt wire. */
static enum cm_status try_once(struct scene *s, struct proxy *proxy, struct cm_error *err)
{
    int wire[2];
    pthread_t thread;
    struct cm_tpm *direct = s->tpm;
    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, wire), 0);
    proxy->keeper = wire[1];
    proxy->tpm = s->tpm_fd;
    proxy->seen = 0;
    proxy->held_size = 0;
    cr_assert_eq(pthread_create(&thread, NULL, proxy_run, proxy), 0);
    enum cm_status status = cm_tpm_open(wire[0], &s->tpm, err);
    if (status == CM_OK) {
        /* Either asserts that what came is right. */
        status = proxy->quotes ? quote(s, err) : unseal(s, err);
        cm_tpm_close(s->tpm);
    }
    s->tpm = direct;
    shutdown(wire[0], SHUT_RDWR);
    pthread_join(thread, NULL);
    close(wire[0]);
    close(wire[1]);
    return status;
}

static void healthy(struct scene *s)
{
    struct cm_error err;
    struct proxy plain = {.at = 0};
    cr_assert_eq(try_once(s, &plain, &err), CM_OK, "%s", err.text);
}

Test(tpm_fault, every_response_spoilt_in_every_way, .timeout = 120)
{
    static struct scene s;
    unsigned released = 0, refused = 0;
    signal(SIGPIPE, SIG_IGN);
    scene_make(&s, state_new());
    for (uint32_t at = 1; at <= RESPONSES; at++) {
        for (int kind = 0; kind < FAULT_COUNT - 1 + (int)(sizeof(codes) / sizeof(codes[0]));
             kind++) {
            struct cm_error err = {.status = CM_OK};
            bool code = kind >= FAULT_COUNT - 1;
            struct proxy proxy = {.fault = code ? FAULT_CODE : (enum fault)(kind + 1),
                                  .at = at,
                                  .code = code ? codes[kind - (FAULT_COUNT - 1)] : 0,
                                  .seed = at * 100 + (unsigned)kind};
            enum cm_status status = try_once(&s, &proxy, &err);
            released += status == CM_OK;
            refused += status != CM_OK;
            if (status != CM_OK) {
                cr_assert(status == CM_E_TPM || status == CM_E_POLICY, "%u/%d: %s: %s", at, kind,
                          err.id, err.text);
                cr_assert(strncmp(err.id, "CM-TPM-", 7) == 0 ||
                          strncmp(err.id, "CM-SEAL-", 8) == 0);
                cr_assert_gt(strlen(err.text), 10u);
            }
            cr_assert(proxy.fault != FAULT_LATE || status == CM_OK, "late at %u: %s", at, err.text);
            /* The last commands only tidy up: a key that is out is not taken back for them. */
            cr_assert(at > 25 || proxy.fault != FAULT_GONE || status != CM_OK, "gone at %u", at);
        }
        healthy(&s); /* no lock-out, no session or object left in the way */
    }
    printf("tpm_fault: %u released, %u refused\n", released, refused);
    scene_done(&s);
}

/* Somebody on the TPM's bus sees signatures, and never the key. */
Test(tpm_fault, the_wire_never_carries_the_key)
{
    static struct scene s;
    struct cm_error err;
    struct proxy proxy = {.tap = malloc(TAP_BYTES)};
    scene_make(&s, state_new());
    for (size_t i = 0; i < sizeof(s.key); i++) {
        cr_assert_eq(s.key[i], 0x77);
    }
    cr_assert_eq(try_once(&s, &proxy, &err), CM_OK, "%s", err.text);
    cr_assert_gt(proxy.tapped, 2000u);
    cr_assert_not_null(memmem(proxy.tap, proxy.tapped, s.list.states[0].signature, 32),
                       "the control was not found: the tap does not work");
    cr_assert_null(memmem(proxy.tap, proxy.tapped, s.key, 8));
    free(proxy.tap);
    scene_done(&s);
}

Test(tpm_fault, a_spoilt_quote_is_handed_to_nobody, .timeout = 60)
{
    static struct scene s;
    unsigned came = 0, refused = 0;
    signal(SIGPIPE, SIG_IGN);
    scene_make(&s, state_new());
    for (uint32_t at = 1; at <= 12; at++) {
        for (unsigned round = 0; round < 40; round++) {
            struct cm_error err = {.status = CM_OK};
            struct proxy proxy = {.fault = round < 37 ? FAULT_FLIP : FAULT_REPLAY + (int)round - 37,
                                  .at = at,
                                  .seed = at * 1000 + round,
                                  .quotes = true};
            enum cm_status status = try_once(&s, &proxy, &err);
            came += status == CM_OK;
            refused += status != CM_OK;
            cr_assert(status == CM_OK || status == CM_E_TPM || status == CM_E_POLICY, "%s", err.id);
        }
    }
    printf("tpm_fault: %u quotes came, %u were refused\n", came, refused);
    cr_assert(came > 40 && refused > 40);
    healthy(&s);
    scene_done(&s);
}
