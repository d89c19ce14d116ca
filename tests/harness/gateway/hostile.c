/* Records that no honest worker writes: each breaks one rule of runtime/base/wire.h. */
#include "tests/harness/gateway/harness.h"

static const struct cm_wire_text three = {.completion_tokens = 1, .bytes = 3};
static const struct cm_wire_done finish_unknown = {.finish = 99};
static const struct cm_wire_done finish_stop = {.finish = CM_FINISH_STOP};

/* A head, what follows it, and to which request the record belongs. */
static const struct {
    const char *how;
    uint32_t type;
    const void *head;
    size_t head_bytes;
    const char *rest;
    size_t rest_bytes;
    uint64_t id_beyond;
} rows[] = {
    {"early", CM_WIRE_TEXT, &three, sizeof(three), "abc", 3, 0}, /* before ACCEPTED */
    {"utf8", CM_WIRE_TEXT, &three, sizeof(three), "a\xff\xfe", 3, 0},
    {"cut", CM_WIRE_TEXT, &three, sizeof(three), "ab\xc3", 3, 0}, /* inside a character */
    {"length", CM_WIRE_TEXT, &three, sizeof(three), "abcdef", 6, 0},
    {"short", CM_WIRE_TEXT, &three, 4, NULL, 0, 0},
    {"long", CM_WIRE_DONE, &finish_stop, sizeof(finish_stop), "x", 1, 0},
    {"type", 77, NULL, 0, NULL, 0, 0},
    {"generate", CM_WIRE_CANCEL, NULL, 0, NULL, 0, 0}, /* the gateway's to write */
    {"unknown", CM_WIRE_TEXT, &three, sizeof(three), "abc", 3, 1000},
    {"finish", CM_WIRE_DONE, &finish_unknown, sizeof(finish_unknown), NULL, 0, 0},
};

static void cursor_spoil(struct worker *worker)
{
    *(volatile uint64_t *)(void *)worker->responses.data = UINT64_MAX / 2;
    record_bell(worker);
}

/* The count of tokens goes back. */
static void count_put(struct worker *worker, uint64_t id)
{
    for (uint32_t count = 5; count >= 4; count--) {
        const struct cm_wire_text head = {.completion_tokens = count, .bytes = 3};
        record_put(worker, CM_WIRE_TEXT, id, &head, sizeof(head), "abc", 3);
    }
}

void hostile_put(struct worker *worker, uint64_t id, const char *how)
{
    const char *rest = "";
    if (!begins(how, "early", &rest)) {
        accepted_put(worker, id, 10);
    }
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        if (begins(how, rows[i].how, &rest)) {
            record_put(worker, rows[i].type, id + rows[i].id_beyond, rows[i].head,
                       rows[i].head_bytes, rows[i].rest, rows[i].rest_bytes);
            return;
        }
    }
    if (begins(how, "verdict", &rest)) { /* of a rule with such a name */
        verdict_put(worker, id, CM_VERDICT_INPUT, CM_VERDICT_REPORT, rest);
    } else if (begins(how, "hello", &rest)) {
        hello_put(worker);
    } else if (begins(how, "cursor", &rest)) {
        cursor_spoil(worker);
    } else if (begins(how, "count", &rest)) {
        count_put(worker, id);
    } else {
        die(how);
    }
}
