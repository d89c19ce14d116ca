/* A double of every role, for tests of the supervisor: it speaks the control protocol and writes
 * what it sees into `events` beside its executable. Which role it is, its name says; how it
 * behaves, the first word of `<role>.mode` beside it. Built for tests only, never installed. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "runtime/base/frame.h"
#include "runtime/base/ring.h"
#include "sandbox/image.h"

static char folder[4096];
static const char *role = "";
static char mode[64];
static struct cm_frame frame;
static struct cm_channel channel;
static struct cm_error err;

__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
    char path[4200];
    char line[1024];
    va_list args;
    va_start(args, format);
    int used = snprintf(line, sizeof(line), "%s %d ", role, (int)getpid());
    used += vsnprintf(line + used, sizeof(line) - (size_t)used - 1, format, args);
    va_end(args);
    line[used++] = '\n';
    snprintf(path, sizeof(path), "%s/events", folder);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    ssize_t written = write(fd, line, (size_t)used);
    (void)written;
    close(fd);
}

static void mode_read(void)
{
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s.mode", folder, role);
    FILE *file = fopen(path, "re");
    if (file != NULL) {
        if (fscanf(file, "%63s", mode) != 1) {
            mode[0] = '\0';
        }
        fclose(file);
    }
}

static void descriptors_note(void)
{
    char list[256] = "";
    size_t used = 0;
    DIR *at = opendir("/proc/self/fd");
    struct dirent *entry;
    while (at != NULL && (entry = readdir(at)) != NULL) {
        if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(at)) {
            used += (size_t)snprintf(list + used, sizeof(list) - used, "%s,", entry->d_name);
        }
    }
    closedir(at);
    struct rlimit core;
    int death = 0;
    getrlimit(RLIMIT_CORE, &core);
    prctl(PR_GET_PDEATHSIG, &death);
    note("start fds=%s env=%d core=%llu death=%d leader=%d", list, environ[0] != NULL,
         (unsigned long long)core.rlim_cur, death, getsid(0) == getpid());
}

static void send_frame(enum cm_frame_type type, const void *payload, size_t bytes, const int *fd)
{
    if (cm_channel_send(&channel, type, payload, bytes, fd, fd != NULL ? 1 : 0, &err) != CM_OK) {
        note("send_failed %s", err.text);
        _exit(9);
    }
}

static void fail(enum cm_status status, const char *id)
{
    struct cm_error why;
    cm_error_set(&why, status, id, "the double was told to fail");
    send_frame(CM_FRAME_FAILED, &why, sizeof(why), NULL);
    _exit(cm_status_exit_code(status));
}

static void rings_check(const int fds[CM_RING_FD_COUNT])
{
    struct cm_ring produced = {0};
    struct cm_ring consumed = {0};
    bool gateway = strcmp(role, "gateway") == 0;
    enum cm_status out =
        cm_ring_open_producer(&produced, fds[gateway ? 0 : 2], fds[gateway ? 1 : 3], &err);
    enum cm_status in =
        cm_ring_open_consumer(&consumed, fds[gateway ? 2 : 0], fds[gateway ? 3 : 1], &err);
    uint8_t bytes[64];
    struct cm_record record;
    if (out == CM_OK && in == CM_OK) {
        enum cm_status put = cm_ring_put(&produced, 1, (uint64_t)getpid(), "x", 1, NULL, 0, &err);
        enum cm_status got = cm_ring_get(&consumed, &record, bytes, sizeof(bytes), &err);
        note("rings put=%d got=%d from=%d", put, got, got == CM_OK ? (int)record.request : 0);
    } else {
        note("rings broken out=%d in=%d", out, in);
    }
    cm_ring_close(&produced);
    cm_ring_close(&consumed);
}

static void page_send(enum cm_frame_type type)
{
    struct cm_key_request request;
    int page = -1;
    bool secret = false;
    memcpy(&request, frame.payload, sizeof(request));
    if (cm_key_page_new(&page, &secret, &err) != CM_OK) {
        fail(CM_E_SYSTEM, "CM-DOUBLE-PAGE");
    }
    if (type == CM_FRAME_KEY_PAGE) {
        struct cm_key_page_info info = {request.generation, secret};
        if (strcmp(mode, "fail_policy") == 0) {
            fail(CM_E_POLICY, "CM-TPM-POLICY");
        }
        send_frame(type, &info, sizeof(info), &page);
    } else {
        struct cm_tls_page tls = {.generation = request.generation, .certificate_bytes = 100};
        memset(tls.certificate, 0x5a, 100);
        send_frame(type, &tls, sizeof(tls), &page);
    }
    close(page);
}

static void evidence_send(void)
{
    struct cm_quote_request request;
    struct cm_evidence_info info = {.bytes = 1};
    int fd = memfd_create("evidence", MFD_CLOEXEC);
    if (strcmp(mode, "slow_quote") == 0) {
        usleep(20000);
    }
    memcpy(&request, frame.payload, sizeof(request));
    info.id = request.id;
    if (fd < 0 || write(fd, "e", 1) != 1) {
        fail(CM_E_SYSTEM, "CM-DOUBLE-EVIDENCE");
    }
    send_frame(CM_FRAME_EVIDENCE, &info, sizeof(info), &fd);
    close(fd);
}

/* A taken-over gateway: more questions than any queue takes. */
static void quotes_flood(void)
{
    for (uint64_t i = 1; i <= 2000; i++) {
        struct cm_quote_request request = {.id = i, .kind = CM_QUOTE_SESSION};
        while (cm_channel_send(&channel, CM_FRAME_QUOTE, &request, sizeof(request), NULL, 0,
                               &err) == CM_E_BUSY) {
            usleep(1000);
        }
    }
}

static void worker_load(void)
{
    if (strcmp(mode, "fail_package") == 0) {
        fail(CM_E_PACKAGE, "CM-PKG-TAG");
    }
    if (strcmp(mode, "crash") == 0) {
        raise(SIGKILL);
    }
    for (uint64_t i = 1; i <= 3; i++) {
        struct cm_progress progress = {CM_LOAD_WEIGHTS, 0, i, 3, i, {0}};
        send_frame(CM_FRAME_PROGRESS, &progress, sizeof(progress), NULL);
        usleep(150000);
    }
    struct cm_loaded loaded = {.bytes = 3, .total_us = 450000};
    send_frame(CM_FRAME_LOADED, &loaded, sizeof(loaded), NULL);
}

static enum cm_status waiting_take(void *context, struct cm_frame *other, struct cm_error *why)
{
    (void)context;
    (void)why;
    note("waiting frame %u", other->type);
    cm_frame_close_fds(other);
    return CM_OK;
}

static void page_wait(enum cm_frame_type type)
{
    note("waits");
    if (cm_channel_await(&channel, type, waiting_take, NULL, &frame, &err) != CM_OK) {
        note("lost %s", err.text);
        _exit(9);
    }
    if (frame.type == CM_FRAME_STOP) {
        note("stop");
        _exit(0);
    }
    note("key page");
    cm_frame_close_fds(&frame);
}

/* A keeper is ready once all is measured. */
static void measured_wait(void)
{
    unsigned files = 0, events = 0;
    do {
        if (cm_channel_wait(&channel, &frame, 5000, &err) != CM_OK) {
            fail(CM_E_BUG, "CM-DOUBLE-MEASURE");
        }
        files += frame.type == CM_FRAME_MEASURE;
        events += frame.type == CM_FRAME_MEASURE &&
                  ((const struct cm_measure *)(const void *)frame.payload)->complete == 1;
        cm_frame_close_fds(&frame);
    } while (frame.type == CM_FRAME_MEASURE);
    note("measured files=%u events=%u", files, events);
    if (strcmp(mode, "refuse") == 0) {
        fail(CM_E_POLICY, "CM-SEAL-BOOT");
    }
    while (strcmp(mode, "hold") == 0) { /* a slow TPM: until the word is another */
        usleep(10000);
        mode_read();
    }
}

static void on_config(void)
{
    note("config bytes=%u", frame.bytes);
    if (strcmp(role, "keeper") == 0) {
        measured_wait();
    }
    if (strcmp(role, "worker") == 0) {
        struct cm_config_worker config;
        memcpy(&config, frame.payload, sizeof(config));
        if (config.guard == 1) {
            bool came = cm_channel_wait(&channel, &frame, 5000, &err) == CM_OK &&
                        frame.type == CM_FRAME_RULES;
            note(came ? "rules" : "no rules");
            cm_frame_close_fds(&frame);
        }
        page_wait(CM_FRAME_KEY_PAGE);
        worker_load();
    }
    if (strcmp(role, "gateway") == 0) {
        int listening = 0;
        socklen_t size = sizeof(listening);
        getsockopt(CM_FD_INPUT, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size);
        note("listener %d", listening);
        page_wait(CM_FRAME_TLS_PAGE);
    }
    if (strcmp(role, "worker") == 0 || strcmp(role, "gateway") == 0) {
        const int fds[CM_RING_FD_COUNT] = {6, 7, 8, 9, 10, 11};
        rings_check(fds);
    }
    static const char line[] = "{\"role\":\"double\",\"event\":\"hello\"}\n";
    ssize_t written = write(CM_FD_LOG, line, sizeof(line) - 1);
    (void)written;
    const struct cm_ready ready = {.probed = 0};
    send_frame(CM_FRAME_READY, &ready, sizeof(ready), NULL);
    if (strcmp(mode, "violate") == 0) {
        uint8_t raw[8] = {99};
        send(CM_FD_CONTROL, raw, sizeof(raw), 0);
    }
    if (strncmp(mode, "raise", 5) == 0) {
        raise(atoi(mode + 5));
    }
    if (strcmp(mode, "accuse") == 0) {
        send_frame(CM_FRAME_BROKEN, NULL, 0, NULL);
    }
    if (strcmp(mode, "leave") == 0) {
        _exit(0);
    }
    if (strcmp(mode, "fail_serving") == 0) {
        fail(CM_E_DEVICE, "CM-DOUBLE-DEVICE");
    }
    if (strcmp(mode, "flood") == 0) {
        quotes_flood();
    }
    if (strcmp(mode, "unasked") == 0) {
        struct cm_key_page_info info = {.generation = 77};
        int page = open("/dev/null", O_RDONLY | O_CLOEXEC);
        send_frame(CM_FRAME_KEY_PAGE, &info, sizeof(info), &page);
    }
}

/* What a descriptor holds from where it stands, whether it can be written, and how it is sealed. */
static void memory_note(const char *what, uint64_t serial)
{
    static uint8_t bytes[CM_ADAPTER_CHUNK_BYTES + 1];
    int seals = fcntl(frame.fds[0], F_GET_SEALS);
    ssize_t size = strcmp(role, "worker") == 0 ? pread(frame.fds[0], bytes, sizeof(bytes), 0)
                                               : read(frame.fds[0], bytes, sizeof(bytes));
    uint32_t sum = 0;
    for (ssize_t i = 0; i < size; i++) {
        sum += bytes[i];
    }
    note("%s serial=%llu bytes=%zd sum=%u writes=%d sealed=%d", what, (unsigned long long)serial,
         size, sum, write(frame.fds[0], "x", 1) == 1,
         (seals & F_SEAL_WRITE) != 0 && (seals & F_SEAL_GROW) != 0);
}

static void adapter_answer(uint64_t serial)
{
    struct cm_adapter_answer answer = {.serial = serial};
    static bool asked;
    if (strcmp(mode, "busy_adapter") == 0 && !asked) {
        asked = true;
        cm_error_set(&answer.error, CM_E_BUSY, "CM-KEEPER-PAGE", "the key page is in use");
    } else if (strcmp(mode, "no_adapter") == 0) {
        cm_error_set(&answer.error, CM_E_POLICY, "CM-SEAL-PCR", "the double was told to refuse");
    }
    send_frame(CM_FRAME_ADAPTER_ANSWER, &answer, sizeof(answer), NULL);
}

static void adapter_page(void)
{
    int page = -1;
    bool secret;
    if (cm_key_page_new(&page, &secret, &err) != CM_OK) {
        fail(CM_E_SYSTEM, "CM-DOUBLE-PAGE");
    }
    send_frame(CM_FRAME_ADAPTER_PAGE, frame.payload, frame.bytes, &page);
    close(page);
}

/* Ask for the whole file; or for what is not there, or not ours. */
static void adapter_read(const struct cm_adapter_load *load)
{
    struct cm_adapter_chunk chunk = {.serial = load->serial, .bytes = (uint32_t)load->file_bytes};
    note("load %s serial=%llu bytes=%llu", load->name, (unsigned long long)load->serial,
         (unsigned long long)load->file_bytes);
    if (strcmp(mode, "read_beyond") == 0) {
        chunk.offset = 1;
    }
    if (strcmp(mode, "read_wide") == 0) {
        chunk.bytes = CM_ADAPTER_CHUNK_BYTES + 1;
    }
    if (strcmp(mode, "read_other") == 0) {
        chunk.serial++;
    }
    send_frame(CM_FRAME_ADAPTER_READ, &chunk, sizeof(chunk), NULL);
}

static void adapter_tell(uint64_t serial, enum cm_adapter_state state)
{
    struct cm_adapter_told told = {
        .serial = serial, .state = (uint32_t)state, .generation = 5, .digest = "abcd"};
    send_frame(CM_FRAME_ADAPTER_STATE, &told, sizeof(told), NULL);
}

static void on_adapter(void)
{
    uint64_t serial;
    struct cm_adapter_load load;
    struct cm_adapter_step step;
    memcpy(&serial, frame.payload, sizeof(serial)); /* first in all of them */
    switch (frame.type) {
    case CM_FRAME_ADAPTER_OPEN:
        memory_note("open", serial);
        adapter_answer(serial);
        break;
    case CM_FRAME_ADAPTER_KEY:
        adapter_page();
        break;
    case CM_FRAME_ADAPTER_CLOSE:
        memcpy(&step, frame.payload, sizeof(step));
        note("close how=%u", step.how);
        break;
    case CM_FRAME_ADAPTER_LOAD:
        memcpy(&load, frame.payload, sizeof(load));
        adapter_read(&load);
        break;
    case CM_FRAME_ADAPTER_BYTES:
        memory_note("bytes", serial);
        adapter_tell(serial, CM_ADAPTER_SERVING);
        break;
    default:
        note("unload");
        adapter_tell(serial, CM_ADAPTER_ABSENT);
        break;
    }
}

static void on_frame(void)
{
    struct cm_state state;
    struct cm_keys_info keys;
    switch (frame.type) {
    case CM_FRAME_CONFIG:
        on_config();
        break;
    case CM_FRAME_STATE:
        memcpy(&state, frame.payload, sizeof(state));
        note("state ready=%u stage=%u reason=%s", state.ready, state.load.stage, state.reason);
        break;
    case CM_FRAME_RINGS:
        rings_check(frame.fds);
        break;
    case CM_FRAME_KEY_REQUEST:
        page_send(CM_FRAME_KEY_PAGE);
        break;
    case CM_FRAME_TLS_REQUEST:
        page_send(CM_FRAME_TLS_PAGE);
        break;
    case CM_FRAME_QUOTE:
        evidence_send();
        break;
    case CM_FRAME_KEYS:
        memcpy(&keys, frame.payload, sizeof(keys));
        note("keys generation=%llu count=%u", (unsigned long long)keys.generation, keys.count);
        break;
    case CM_FRAME_ADAPTER_OPEN:
    case CM_FRAME_ADAPTER_KEY:
    case CM_FRAME_ADAPTER_CLOSE:
    case CM_FRAME_ADAPTER_LOAD:
    case CM_FRAME_ADAPTER_BYTES:
    case CM_FRAME_ADAPTER_UNLOAD:
        on_adapter();
        break;
    case CM_FRAME_DRAIN:
        note("drain");
        if (strcmp(mode, "hold_drain") != 0) {
            send_frame(CM_FRAME_DRAINED, NULL, 0, NULL);
        }
        break;
    case CM_FRAME_STOP:
        note("stop");
        if (strcmp(mode, "ignore_stop") != 0) {
            _exit(0);
        }
        break;
    default:
        note("frame %u", frame.type);
        break;
    }
}

int main(int argc, char **argv)
{
    char path[4200];
    (void)argc;
    (void)close_range(CM_FD_COUNT, ~0u, 0);
    (void)prctl(PR_SET_NAME, argv[0]);
    /* We run from sealed memory, as our parent does: the folder of the programs is open there. */
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)getppid(), CM_IMAGE_FD_FOLDER);
    ssize_t size = readlink(path, folder, sizeof(folder) - 1);
    folder[size > 0 ? size : 0] = '\0';
    role = strchr(argv[0], '-') + 1;
    mode_read();
    cm_channel_init(&channel, CM_FD_CONTROL,
                    role[0] == 'g'   ? CM_ROLE_GATEWAY
                    : role[0] == 'w' ? CM_ROLE_WORKER
                    : role[0] == 'k' ? CM_ROLE_KEEPER
                                     : CM_ROLE_DEVTPM,
                    CM_ROLE_SUPERVISOR);
    descriptors_note();
    for (;;) {
        enum cm_status status = cm_channel_wait(&channel, &frame, 300, &err);
        if (status == CM_E_BUSY) {
            const struct cm_heartbeat beat = {.counter = 1};
            send_frame(CM_FRAME_HEARTBEAT, &beat, sizeof(beat), NULL);
            continue;
        }
        if (status != CM_OK) {
            note("lost %s", err.text);
            return 9;
        }
        on_frame();
        cm_frame_close_fds(&frame);
    }
}
