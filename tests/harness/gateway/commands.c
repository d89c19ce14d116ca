/* What a test may ask for while the gateway serves: a word, and what it needs. */
#include "tests/harness/gateway/harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* "ready", or why not. */
static void on_state(struct harness *harness, const char *rest)
{
    struct cm_state *state = &harness->state;
    state->ready = strcmp(rest, "ready") == 0;
    snprintf(state->reason, sizeof(state->reason), "%s", state->ready ? "" : rest);
    state_put(harness);
}

static void on_progress(struct harness *harness, const char *rest)
{
    (void)rest;
    harness->state.load =
        (struct cm_progress){CM_LOAD_WEIGHTS, 0, 25, 100, 1500000, {0, 0, 300000, 450000, 750000}};
    on_state(harness, "loading");
}

static void on_keys(struct harness *harness, const char *names)
{
    keys_put(harness, names, false);
}

static void on_disorder(struct harness *harness, const char *rest)
{
    (void)rest;
    keys_put(harness, NULL, true);
}

static void on_rings(struct harness *harness, const char *rest)
{
    (void)rest;
    rings_put(harness);
}

static void on_hello(struct harness *harness, const char *rest)
{
    harness->worker.hello_on = strcmp(rest, "on") == 0;
}

static void on_stats(struct harness *harness, const char *rest)
{
    harness->worker.stats_on = strcmp(rest, "on") == 0;
}

static void on_drain(struct harness *harness, const char *rest)
{
    const struct cm_drain drain = {.deadline_ms = (uint32_t)atoi(rest)};
    frame_put(harness, CM_FRAME_DRAIN, &drain, sizeof(drain), NULL, 0);
}

static void on_memory(struct harness *harness, const char *rest)
{
    (void)rest;
    gateway_report(harness->beats);
}

static void on_stop(struct harness *harness, const char *rest)
{
    (void)rest;
    frame_put(harness, CM_FRAME_STOP, NULL, 0, NULL, 0);
}

static const struct {
    const char *word;
    void (*run)(struct harness *harness, const char *rest);
} commands[] = {
    {"state", on_state},       {"progress", on_progress}, {"keys", on_keys},
    {"disorder", on_disorder}, {"rings", on_rings},       {"hello", on_hello},
    {"stats", on_stats},       {"drain", on_drain},       {"memory", on_memory},
    {"stop", on_stop},
};

static void command(struct harness *harness, const char *line)
{
    const char *rest = "";
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        if (begins(line, commands[i].word, &rest)) {
            commands[i].run(harness, rest);
            event("did", ",\"command\":\"%s\"", line);
            return;
        }
    }
    die(line);
}

void commands_read(struct harness *harness)
{
    static char bytes[4096];
    static size_t used;
    ssize_t got = read(0, bytes + used, sizeof(bytes) - 1 - used);
    if (got <= 0) { /* the test is gone */
        exit(0);
    }
    used += (size_t)got;
    bytes[used] = '\0';
    char *newline;
    while ((newline = strchr(bytes, '\n')) != NULL) {
        *newline = '\0';
        command(harness, bytes);
        used -= (size_t)(newline + 1 - bytes);
        memmove(bytes, newline + 1, used + 1);
    }
}
