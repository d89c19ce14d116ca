/* Requests that the worker answers as their scripts say. A script is the first word of the last
 * message, with the number of pieces of the reply after it; any other text is echoed. */
#include "tests/harness/gateway/harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define JOBS_MAX    256
#define BLOCK_BYTES 1000
#define TOKENS_MAX  2000 /* where the request names no limit */

struct script {
    const char *word;
    uint32_t finish;
    uint64_t interval_ms; /* between two pieces */
    bool silent;          /* accepted, and never a piece of a reply */
    bool queued;          /* nor accepted */
    bool stubborn;        /* deaf to CANCEL */
    bool flood;           /* blocks, as many as the ring takes */
    bool dies;            /* after its pieces, the worker with it */
};

static const struct script scripts[] = {
    {.word = "slow", .finish = CM_FINISH_STOP, .interval_ms = 50},
    {.word = "hang", .silent = true},
    {.word = "silent", .silent = true, .queued = true},
    {.word = "stubborn", .silent = true, .stubborn = true},
    {.word = "flood", .finish = CM_FINISH_STOP, .flood = true},
    {.word = "fail", .finish = CM_FINISH_FAILED},
    {.word = "giveup", .finish = CM_FINISH_CANCELLED},
    {.word = "filter", .finish = CM_FINISH_FILTER},
    {.word = "die", .interval_ms = 20, .dies = true},
};
static const struct script echo = {.word = "echo", .finish = CM_FINISH_STOP};

struct job {
    const struct script *script; /* NULL: free */
    uint64_t id;
    char *text; /* to be echoed; NULL: numbered words or blocks */
    size_t offset;
    uint32_t sent, count, max_tokens; /* pieces; of an echo, its text is the count */
    uint64_t next_ms;
    bool silent;
};

struct job *jobs_new(void)
{
    struct job *jobs = calloc(JOBS_MAX, sizeof(*jobs));
    check(jobs != NULL, "jobs");
    return jobs;
}

static void job_free(struct job *job)
{
    free(job->text);
    *job = (struct job){0};
}

void jobs_forget(struct worker *worker)
{
    for (size_t i = 0; i < JOBS_MAX; i++) {
        job_free(&worker->jobs[i]);
    }
}

static struct job *job_new(struct worker *worker)
{
    for (size_t i = 0; i < JOBS_MAX; i++) {
        if (worker->jobs[i].script == NULL) {
            return &worker->jobs[i];
        }
    }
    die("too many jobs");
}

static const struct script *script_find(const char *text, const char **ret_rest)
{
    for (size_t i = 0; i < sizeof(scripts) / sizeof(scripts[0]); i++) {
        if (begins(text, scripts[i].word, ret_rest)) {
            return &scripts[i];
        }
    }
    (void)begins(text, echo.word, ret_rest);
    return &echo;
}

void jobs_start(struct worker *worker, uint64_t id, const struct cm_wire_generate *wire,
                const char *text)
{
    const char *rest = text;
    if (begins(text, "refuse", &rest)) {
        refused_put(worker, id, rest);
        return;
    }
    if (begins(text, "hostile", &rest)) {
        hostile_put(worker, id, rest);
        return;
    }
    struct job *job = job_new(worker);
    const struct script *script = script_find(text, &rest);
    *job = (struct job){.script = script,
                        .id = id,
                        .max_tokens = wire->max_tokens != 0 ? wire->max_tokens : TOKENS_MAX,
                        .silent = script->silent};
    if (script->queued) {
        return;
    }
    accepted_put(worker, id, job->max_tokens);
    if (script == &echo) {
        job->text = strdup(rest);
        check(job->text != NULL, "text");
    } else if (script->finish == CM_FINISH_FILTER) { /* the verdict comes before what it explains */
        verdict_put(worker, id, CM_VERDICT_OUTPUT, CM_VERDICT_REFUSE, "an-end");
        job->count = 1;
    } else {
        job->count = (uint32_t)atoi(rest);
    }
}

static bool text_put(struct worker *worker, struct job *job, const char *text, size_t bytes)
{
    struct cm_wire_text head = {job->sent + 1, (uint32_t)bytes};
    bool taken = record_put(worker, CM_WIRE_TEXT, job->id, &head, sizeof(head), text, bytes);
    job->sent += taken;
    return taken;
}

static void done_put(struct worker *worker, struct job *job, uint32_t finish)
{
    struct cm_wire_done done = {
        .finish = finish, .prompt_tokens = 7, .completion_tokens = job->sent, .cached_tokens = 3};
    if (record_put(worker, CM_WIRE_DONE, job->id, &done, sizeof(done), NULL, 0)) {
        job_free(job);
    }
}

void jobs_cancel(struct worker *worker, uint64_t id)
{
    for (size_t i = 0; i < JOBS_MAX; i++) {
        struct job *job = &worker->jobs[i];
        if (job->script != NULL && job->id == id && !job->script->stubborn) {
            job->silent = true;
            done_put(worker, job, CM_FINISH_CANCELLED);
        }
    }
}

static void piece_put(struct worker *worker, struct job *job)
{
    static char block[BLOCK_BYTES];
    char word[32];
    if (job->text != NULL) {
        const char *from = job->text + job->offset;
        size_t bytes = strcspn(from + 1, " ") + 1; /* a word and the space before it */
        job->offset += text_put(worker, job, from, bytes) ? bytes : 0;
    } else if (job->script->flood) {
        memset(block, 'x', sizeof(block));
        while (job->sent < job->count && text_put(worker, job, block, sizeof(block))) {
        }
    } else {
        int size = snprintf(word, sizeof(word), "%s%u", job->sent > 0 ? " " : "", job->sent);
        if (text_put(worker, job, word, (size_t)size)) {
            job->next_ms = now_ms() + job->script->interval_ms;
        }
    }
}

/* False: its script has come to where the worker dies. */
static bool job_step(struct worker *worker, struct job *job)
{
    if (job->script == NULL || job->silent || now_ms() < job->next_ms) {
        return true;
    }
    bool over = job->text != NULL ? job->text[job->offset] == '\0' : job->sent >= job->count;
    if (over && job->script->dies) {
        event("died", ",\"id\":%llu", (unsigned long long)job->id);
        return false;
    }
    if (over || job->sent >= job->max_tokens) {
        done_put(worker, job, over ? job->script->finish : CM_FINISH_LENGTH);
    } else {
        piece_put(worker, job);
    }
    return true;
}

bool jobs_step(struct worker *worker)
{
    for (size_t i = 0; i < JOBS_MAX; i++) {
        if (!job_step(worker, &worker->jobs[i])) {
            return false;
        }
    }
    return true;
}

bool jobs_active(const struct worker *worker)
{
    for (size_t i = 0; i < JOBS_MAX; i++) {
        if (worker->jobs[i].script != NULL && !worker->jobs[i].silent) {
            return true;
        }
    }
    return false;
}
