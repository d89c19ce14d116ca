/* The supervisor's side of the control channel: what it hands the gateway, and what it hears. */
#include "tests/harness/gateway/harness.h"

#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/base/sealed.h"
#include "runtime/supervisor/supervisor_internal.h"

void frame_put(struct harness *harness, enum cm_frame_type type, const void *payload, size_t bytes,
               const int *fds, size_t count)
{
    struct cm_error err;
    check(cm_channel_send(&harness->channel, type, payload, bytes, fds, count, &err) == CM_OK,
          err.text);
}

static void on_failed(const struct cm_frame *frame)
{
    struct cm_error failed;
    memcpy(&failed, frame->payload, sizeof(failed));
    cm_error_sanitise(&failed);
    event("failed", ",\"id\":\"%s\"", failed.id);
    fprintf(stderr, "gateway failed: %s\n", failed.text);
}

void frame_take(struct harness *harness)
{
    static struct cm_frame frame;
    struct cm_error err;
    enum cm_status got = cm_channel_receive(&harness->channel, &frame, &err);
    if (got != CM_OK) { /* one that is gone is noticed by its end */
        check(got != CM_E_INPUT, err.text);
        return;
    }
    switch (frame.type) {
    case CM_FRAME_READY:
        identity_report(harness->page_fd);
        event("ready", "%s", "");
        break;
    case CM_FRAME_BROKEN:
        event("broken", "%s", "");
        break;
    case CM_FRAME_DRAINED:
        event("drained", "%s", "");
        break;
    case CM_FRAME_HEARTBEAT:
        harness->beats++;
        break;
    case CM_FRAME_FAILED:
        on_failed(&frame);
        break;
    default:
        die("an unexpected frame");
    }
}

void rings_renew(struct harness *harness, int ret_gateway[static CM_RING_FD_COUNT])
{
    struct ring_set rings;
    struct cm_error err;
    int worker[CM_RING_FD_COUNT];
    check(rings_make(harness->config.ring_data_bytes, &rings, &err) == CM_OK, err.text);
    rings_view_worker(&rings, worker);
    rings_view_gateway(&rings, ret_gateway);
    worker_attach(&harness->worker, worker);
    for (size_t i = 0; i < 4; i++) {
        close(worker[i]);
    }
}

void rings_put(struct harness *harness)
{
    int fds[CM_RING_FD_COUNT];
    rings_renew(harness, fds);
    frame_put(harness, CM_FRAME_RINGS, NULL, 0, fds, CM_RING_FD_COUNT);
    for (size_t i = 0; i < 4; i++) {
        close(fds[i]);
    }
    hello_put(&harness->worker);
}

void key_add(struct harness *harness, char *value)
{
    check(harness->key_count < KEYS_MAX, "too many keys");
    struct cm_api_key *row = &harness->keys[harness->key_count++];
    char *name = strchr(value, ':');
    char *expires = name != NULL ? strchr(name + 1, ':') : NULL;
    check(expires != NULL, "a key without name or expiry");
    *name++ = '\0';
    *expires++ = '\0';
    for (size_t i = 0; i < sizeof(row->id); i++) { /* cm-<16 hex id>-<secret> */
        unsigned byte = 0;
        check(sscanf(value + 3 + 2 * i, "%2x", &byte) == 1, "key id");
        row->id[i] = (uint8_t)byte;
    }
    SHA256((const uint8_t *)value, strlen(value), row->hash);
    row->expires_unix_s = strtoull(expires, NULL, 10);
    snprintf(row->name, sizeof(row->name), "%s", name);
}

static int key_order(const void *a, const void *b)
{
    const struct cm_api_key *first = a, *second = b;
    return memcmp(first->id, second->id, sizeof(first->id));
}

void keys_put(struct harness *harness, const char *names, bool disorder)
{
    struct cm_api_key rows[KEYS_MAX];
    struct cm_keys_info info = {.generation = ++harness->key_generation};
    for (uint32_t i = 0; i < harness->key_count; i++) {
        if (names == NULL || strstr(names, harness->keys[i].name) != NULL) {
            rows[info.count++] = harness->keys[i];
        }
    }
    qsort(rows, info.count, sizeof(rows[0]), key_order);
    if (disorder) {
        check(info.count >= 2, "disorder of less than two keys");
        struct cm_api_key first = rows[0];
        rows[0] = rows[1];
        rows[1] = first;
    }
    int fd = cm_memfd_sealed("keys", rows, info.count * sizeof(rows[0]));
    check(fd >= 0, "keys");
    frame_put(harness, CM_FRAME_KEYS, &info, sizeof(info), &fd, 1);
    close(fd);
}

void state_put(struct harness *harness)
{
    frame_put(harness, CM_FRAME_STATE, &harness->state, sizeof(harness->state), NULL, 0);
}
