/* Continuous batching, paged KV, preemption. */
#include "runtime/worker/scheduler.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/worker/pages.h"
#include "runtime/base/clock.h"

enum state { FREE = 0, WAITING, RUNNING };

struct request {
    enum state state;
    bool ended; /* DONE is still to be emitted; nothing more is computed */
    uint64_t id;
    struct cm_pages_of of; /* tenant, and the generation of the adapter that answers */
    uint64_t order;        /* of arrival */
    uint64_t admitted;     /* of admission: the latest is preempted first */
    uint32_t slot;
    bool has_slot;
    struct cm_slot_params params;
    uint8_t stops[CM_STOPS_MAX][CM_STOP_BYTES_MAX];
    uint8_t before[CM_SLOT_BEFORE_MAX]; /* of a prompt that the reply goes on from */
    uint32_t *tokens;                   /* [context_max] prompt, then reply */
    uint32_t prompt_count, count;
    uint32_t computed; /* tokens whose KV is there */
    uint32_t counted;  /* tokens that the device had before a preemption: stepped or drawn */
    uint32_t *pages;   /* [pages per context] */
    uint32_t page_count;
    uint32_t kept_pages;              /* the first ones, that equal prefixes find */
    uint32_t cached_tokens;           /* of the prompt, not computed for this request */
    uint32_t held_bytes, held_tokens; /* text that the ring had no room for */
    uint8_t held[2 * CM_STEP_BYTES_MAX];
    uint32_t verdict_count, verdict_said; /* what the guard found, to be said before text and end */
    struct cm_step_verdict verdicts[CM_STEP_VERDICTS_MAX];
    struct cm_wire_done done;
    uint64_t arrived_us, started_us, first_us;
};

struct cm_scheduler {
    struct cm_device *device;
    struct cm_scheduler_limits limits;
    enum cm_prompts prompts; /* the device's */
    cm_scheduler_emit emit;
    void *emit_context;
    struct request *requests; /* [sequences_max + queue_max] */
    uint32_t request_count;
    uint32_t *token_memory, *page_memory;
    uint32_t pages_per_context;
    struct cm_pages *pages;
    uint64_t next_order, next_admission;
    uint64_t last_tenant;
    uint64_t decodes_ns, prompt_token_ns; /* of late: a step of decodes alone, and what a prompt
                                             token adds; 0 unknown */
    struct cm_step_entry entries[CM_STEP_ENTRIES_MAX];
    struct request *entry_owner[CM_STEP_ENTRIES_MAX];
    struct cm_step_result results[CM_STEP_ENTRIES_MAX];
    struct cm_wire_stats stats;
};

static uint32_t pages_for(uint32_t positions)
{
    return (positions + CM_KV_PAGE_POSITIONS - 1) / CM_KV_PAGE_POSITIONS;
}

enum cm_status cm_scheduler_new(struct cm_device *device, const struct cm_scheduler_limits *limits,
                                cm_scheduler_emit emit, void *emit_context,
                                struct cm_scheduler **ret_scheduler, struct cm_error *err)
{
    struct cm_scheduler *s = calloc(1, sizeof(*s));
    if (s == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "scheduler");
    }
    struct cm_device_facts facts;
    cm_device_describe(device, &facts);
    s->device = device;
    s->prompts = facts.prompts;
    s->limits = *limits;
    s->emit = emit;
    s->emit_context = emit_context;
    s->request_count = limits->sequences_max + limits->queue_max;
    s->pages_per_context = pages_for(limits->context_max);
    s->requests = calloc(s->request_count, sizeof(*s->requests));
    s->token_memory = calloc((size_t)s->request_count * limits->context_max, sizeof(uint32_t));
    s->page_memory = calloc((size_t)s->request_count * s->pages_per_context, sizeof(uint32_t));
    if (s->requests == NULL || s->token_memory == NULL || s->page_memory == NULL) {
        cm_scheduler_free(s);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "scheduler");
    }
    enum cm_status status =
        cm_pages_new(device, limits->kv_pages, limits->prefix_cache, &s->pages, err);
    if (status != CM_OK) {
        cm_scheduler_free(s);
        return status;
    }
    /* Touched now, so that it is there later: a compiler may not leave this out. */
    explicit_bzero(s->requests, s->request_count * sizeof(*s->requests));
    explicit_bzero(s->token_memory,
                   (size_t)s->request_count * limits->context_max * sizeof(uint32_t));
    explicit_bzero(s->page_memory,
                   (size_t)s->request_count * s->pages_per_context * sizeof(uint32_t));
    for (uint32_t i = 0; i < s->request_count; i++) {
        s->requests[i].tokens = s->token_memory + (size_t)i * limits->context_max;
        s->requests[i].pages = s->page_memory + (size_t)i * s->pages_per_context;
    }
    s->stats.kv_pages = limits->kv_pages;
    *ret_scheduler = s;
    return CM_OK;
}

void cm_scheduler_wipe(struct cm_scheduler *s)
{
    if (s->token_memory != NULL) {
        explicit_bzero(s->token_memory,
                       (size_t)s->request_count * s->limits.context_max * sizeof(uint32_t));
    }
    if (s->requests != NULL) {
        explicit_bzero(s->requests, s->request_count * sizeof(*s->requests));
    }
}

void cm_scheduler_free(struct cm_scheduler *s)
{
    if (s == NULL) {
        return;
    }
    cm_scheduler_wipe(s);
    free(s->requests);
    free(s->token_memory);
    free(s->page_memory);
    cm_pages_free(s->pages);
    free(s);
}

/* ------------------------------------------------------------------ coming and going */

/* There is one for each slot and each place in the queue: a burst between two steps is not refused
 * while slots are free. */
static struct request *free_find(struct cm_scheduler *s)
{
    for (uint32_t i = 0; i < s->request_count; i++) {
        if (s->requests[i].state == FREE) {
            return &s->requests[i];
        }
    }
    return NULL;
}

uint32_t *cm_scheduler_prompt(struct cm_scheduler *s)
{
    struct request *request = free_find(s);
    return request != NULL ? request->tokens : NULL;
}

static void pages_return(struct cm_scheduler *s, struct request *r)
{
    cm_pages_release(s->pages, r->pages, r->page_count);
    r->page_count = r->kept_pages = 0;
}

/* Back to nothing; tokens and held text are wiped. */
static void request_drop(struct cm_scheduler *s, struct request *r)
{
    uint32_t *tokens = r->tokens, *pages = r->pages;
    pages_return(s, r);
    if (r->has_slot) {
        cm_device_slot_close(s->device, r->slot);
    }
    explicit_bzero(tokens, s->limits.context_max * sizeof(*tokens));
    explicit_bzero(r, sizeof(*r));
    r->tokens = tokens;
    r->pages = pages;
}

static void refuse(struct cm_scheduler *s, uint64_t id, enum cm_refusal reason, uint32_t tokens,
                   uint32_t limit)
{
    struct cm_wire_refused refused = {
        .reason = (uint32_t)reason, .prompt_tokens = tokens, .limit = limit};
    /* The caller submits only while there is room for this. */
    (void)s->emit(s->emit_context, CM_WIRE_REFUSED, id, &refused, sizeof(refused), NULL, 0);
}

void cm_scheduler_submit(struct cm_scheduler *s, const struct cm_scheduler_request *request,
                         uint32_t prompt_tokens)
{
    struct request *r = free_find(s);
    uint64_t room = (uint64_t)s->limits.kv_pages * CM_KV_PAGE_POSITIONS;
    uint32_t limit = room < s->limits.context_max ? (uint32_t)room : s->limits.context_max;
    if (r == NULL) {
        refuse(s, request->id, CM_REFUSAL_QUEUE, prompt_tokens, s->limits.queue_max);
        return;
    }
    if (prompt_tokens == 0 || prompt_tokens >= limit) {
        refuse(s, request->id, prompt_tokens == 0 ? CM_REFUSAL_EMPTY : CM_REFUSAL_CONTEXT,
               prompt_tokens, limit);
        explicit_bzero(r->tokens, s->limits.context_max * sizeof(*r->tokens));
        return;
    }
    uint32_t left = limit - prompt_tokens;
    uint32_t most =
        request->max_tokens == 0 || request->max_tokens > left ? left : request->max_tokens;
    struct cm_wire_accepted accepted = {.prompt_tokens = prompt_tokens, .max_tokens = most};
    if (!s->emit(s->emit_context, CM_WIRE_ACCEPTED, request->id, &accepted, sizeof(accepted), NULL,
                 0)) {
        /* The gateway reads nothing: it is not there any more. */
        explicit_bzero(r->tokens, s->limits.context_max * sizeof(*r->tokens));
        return;
    }
    r->state = WAITING;
    r->id = request->id;
    r->of = (struct cm_pages_of){request->tenant, request->adapter, s->prompts};
    r->order = s->next_order++;
    r->params = request->slot;
    r->params.max_tokens = most;
    for (uint32_t i = 0; i < r->params.stop_count; i++) {
        memcpy(r->stops[i], request->slot.stops[i], request->slot.stop_bytes[i]);
        r->params.stops[i] = r->stops[i];
    }
    CM_ASSERT(r->params.before_bytes <= sizeof(r->before));
    if (r->params.before_bytes > 0) {
        memcpy(r->before, request->slot.before, r->params.before_bytes);
        r->params.before = r->before;
    }
    r->prompt_count = r->count = prompt_tokens;
    r->arrived_us = cm_clock_us();
    s->stats.prompt_tokens_total += prompt_tokens;
}

void cm_scheduler_cancel_all(struct cm_scheduler *s)
{
    for (uint32_t i = 0; i < s->request_count; i++) {
        if (s->requests[i].state != FREE) {
            request_drop(s, &s->requests[i]);
        }
    }
}

bool cm_scheduler_busy(const struct cm_scheduler *s)
{
    for (uint32_t i = 0; i < s->request_count; i++) {
        if (s->requests[i].state != FREE) {
            return true;
        }
    }
    return false;
}

bool cm_scheduler_uses(const struct cm_scheduler *s, uint64_t adapter)
{
    for (uint32_t i = 0; i < s->request_count; i++) {
        const struct request *r = &s->requests[i];
        if (r->state != FREE && r->of.adapter == adapter) {
            return true;
        }
    }
    return false;
}

void cm_scheduler_forget(struct cm_scheduler *s, uint64_t adapter)
{
    cm_pages_forget(s->pages, adapter);
}

/* ------------------------------------------------------------------ text out */

static bool verdicts_flush(struct cm_scheduler *s, struct request *r)
{
    for (; r->verdict_said < r->verdict_count; r->verdict_said++) {
        const struct cm_step_verdict *from = &r->verdicts[r->verdict_said];
        struct cm_wire_verdict verdict = {.action = from->action,
                                          .stage = CM_VERDICT_OUTPUT,
                                          .offset = from->offset,
                                          .bytes = from->bytes};
        cm_device_guard_name(s->device, from->rule, &verdict);
        if (!s->emit(s->emit_context, CM_WIRE_VERDICT, r->id, &verdict, sizeof(verdict), NULL, 0)) {
            return false;
        }
    }
    r->verdict_count = r->verdict_said = 0;
    return true;
}

/* Offer verdicts, held text, then DONE. True: nothing is held any more. */
static bool held_flush(struct cm_scheduler *s, struct request *r)
{
    if (!verdicts_flush(s, r)) {
        return false;
    }
    if (r->held_bytes > 0) {
        struct cm_wire_text text = {r->held_tokens, r->held_bytes};
        if (!s->emit(s->emit_context, CM_WIRE_TEXT, r->id, &text, sizeof(text), r->held,
                     r->held_bytes)) {
            return false;
        }
        r->held_bytes = 0;
    }
    if (r->ended) {
        if (!s->emit(s->emit_context, CM_WIRE_DONE, r->id, &r->done, sizeof(r->done), NULL, 0)) {
            return false;
        }
        request_drop(s, r);
    }
    return true;
}

/* Pages, slot, tokens and held text go at once; what is left is the record that says so, which the
 * gateway waits for: until then the request counts against its limits. */
void cm_scheduler_cancel(struct cm_scheduler *s, uint64_t id)
{
    for (uint32_t i = 0; i < s->request_count; i++) {
        struct request *r = &s->requests[i];
        if (r->state == FREE || r->id != id || r->ended) {
            continue;
        }
        struct request left = {.state = WAITING,
                               .ended = true,
                               .id = r->id,
                               .done = {.finish = CM_FINISH_CANCELLED,
                                        .prompt_tokens = r->prompt_count,
                                        .cached_tokens = r->cached_tokens,
                                        .completion_tokens = r->held_tokens}};
        request_drop(s, r);
        left.tokens = r->tokens;
        left.pages = r->pages;
        *r = left;
        (void)held_flush(s, r);
    }
}

static void result_take(struct cm_scheduler *s, struct request *r,
                        const struct cm_step_result *result)
{
    CM_ASSERT(result->bytes <= sizeof(r->held) - r->held_bytes);
    if (result->bytes > 0) {
        memcpy(r->held + r->held_bytes, result->text, result->bytes);
        r->held_bytes += result->bytes;
    }
    CM_ASSERT(r->verdict_count == 0); /* it is not stepped while something waits */
    memcpy(r->verdicts, result->verdicts, result->verdict_count * sizeof(r->verdicts[0]));
    r->verdict_count = result->verdict_count;
    r->held_tokens = result->completion_tokens;
    s->stats.completion_tokens_total += result->finish != CM_FINISH_FAILED;
    uint64_t now = cm_clock_us();
    r->first_us = r->first_us == 0 ? now : r->first_us;
    if (result->finish == CM_FINISH_NONE) {
        r->tokens[r->count++] = result->token;
    } else {
        r->ended = true;
        r->done = (struct cm_wire_done){.finish = (uint32_t)result->finish,
                                        .prompt_tokens = r->prompt_count,
                                        .cached_tokens = r->cached_tokens,
                                        .completion_tokens = result->completion_tokens,
                                        .queue_us = r->started_us - r->arrived_us,
                                        .prefill_us = r->first_us - r->started_us,
                                        .decode_us = now - r->first_us};
        pages_return(s, r);
    }
    (void)held_flush(s, r);
}

/* ------------------------------------------------------------------ a step */

/* The waiting request to admit next: preempted ones first, then the tenant after the last served
 * one, then the oldest. */
static struct request *waiting_next(const struct cm_scheduler *s)
{
    struct request *best = NULL;
    for (uint32_t i = 0; i < s->request_count; i++) {
        struct request *r = &s->requests[i];
        if (r->state != WAITING || r->ended) {
            continue;
        }
        if (best == NULL || r->has_slot != best->has_slot) {
            best = best == NULL || r->has_slot ? r : best;
            continue;
        }
        uint64_t turn = r->of.tenant - s->last_tenant - 1,
                 best_turn = best->of.tenant - s->last_tenant - 1;
        bool earlier = r->has_slot
                           ? r->order < best->order
                           : turn < best_turn || (turn == best_turn && r->order < best->order);
        best = earlier ? r : best;
    }
    return best;
}

/* Of a request's first `count` tokens those whose pages are kept and looked for. Where prompts are
 * of a class of their own, a page with tokens of a reply in it is nobody's prompt's. */
static uint32_t kept_most(const struct cm_scheduler *s, const struct request *r, uint32_t count)
{
    const bool prompts_alone = s->prompts != CM_PROMPTS_EXACT;
    return prompts_alone && count > r->prompt_count ? r->prompt_count : count;
}

/* Pages for all of a request's tokens: kept ones of an equal prefix, then fresh ones. The last
 * token is always computed, for its logits. False: too few are available, nothing was taken. */
static bool pages_begin(struct cm_scheduler *s, struct request *r)
{
    const uint32_t wanted = pages_for(r->count + 1);
    r->page_count =
        cm_pages_match(s->pages, r->of, r->tokens, kept_most(s, r, r->count - 1), r->pages);
    if (wanted - r->page_count > cm_pages_available(s->pages)) {
        pages_return(s, r);
        return false;
    }
    r->kept_pages = r->page_count;
    r->computed = r->page_count * CM_KV_PAGE_POSITIONS;
    while (r->page_count < wanted) {
        r->pages[r->page_count++] = cm_pages_take(s->pages);
    }
    return true;
}

/* What was matched is not stepped: the device counts it, unless it had it before a preemption. */
static void matched_skip(struct cm_scheduler *s, struct request *r)
{
    if (r->computed > r->counted) {
        cm_device_slot_skip(s->device, r->slot, r->tokens + r->counted, r->computed - r->counted);
    }
}

/* Start waiting requests while a slot and pages for all their tokens are free. */
static void admit(struct cm_scheduler *s)
{
    for (;;) {
        struct request *r = waiting_next(s);
        if (r == NULL || !pages_begin(s, r)) {
            return;
        }
        if (!r->has_slot) {
            if (cm_device_slot_open(s->device, &r->params, &r->slot, NULL) != CM_OK) {
                pages_return(s, r);
                return;
            }
            r->has_slot = true;
            r->started_us = cm_clock_us();
            r->cached_tokens = r->computed;
            s->last_tenant = r->of.tenant;
        }
        matched_skip(s, r);
        r->state = RUNNING;
        r->admitted = s->next_admission++;
    }
}

/* The latest admitted running request gives its pages back and waits again. False: it was `self`.
 */
static bool preempt_latest(struct cm_scheduler *s, const struct request *self)
{
    struct request *latest = NULL;
    for (uint32_t i = 0; i < s->request_count; i++) {
        struct request *r = &s->requests[i];
        if (r->state == RUNNING && !r->ended &&
            (latest == NULL || r->admitted > latest->admitted)) {
            latest = r;
        }
    }
    CM_ASSERT(latest != NULL);
    pages_return(s, latest);
    latest->state = WAITING;
    latest->counted = latest->count > latest->prompt_count ? latest->count
                      : latest->computed > latest->counted ? latest->computed
                                                           : latest->counted;
    latest->computed = 0;
    s->stats.preemptions_total++;
    return latest != self;
}

/* Make sure that the next token of a running request has a page. False: it was preempted itself. */
static bool page_ensure(struct cm_scheduler *s, struct request *r)
{
    if (pages_for(r->count) <= r->page_count) {
        return true;
    }
    while (cm_pages_available(s->pages) == 0) {
        if (!preempt_latest(s, r)) {
            return false;
        }
    }
    r->pages[r->page_count++] = cm_pages_take(s->pages);
    return true;
}

static void entry_add(struct cm_scheduler *s, struct request *r, uint32_t take, uint32_t *count)
{
    s->entries[*count] = (struct cm_step_entry){.slot = r->slot,
                                                .position = r->computed,
                                                .token_count = take,
                                                .tokens = r->tokens + r->computed,
                                                .pages = r->pages,
                                                .page_count = r->page_count,
                                                .prompt = r->computed < r->prompt_count,
                                                .replay = r->computed < r->counted,
                                                .sample = r->computed + take == r->count};
    s->entry_owner[(*count)++] = r;
}

/* The running requests in the order of their admission. */
static uint32_t running_list(struct cm_scheduler *s, struct request *list[CM_STEP_ENTRIES_MAX])
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < s->request_count && count < CM_STEP_ENTRIES_MAX; i++) {
        struct request *r = &s->requests[i];
        if (r->state == RUNNING && !r->ended) {
            uint32_t at = count++;
            for (; at > 0 && list[at - 1]->admitted > r->admitted; at--) {
                list[at] = list[at - 1];
            }
            list[at] = r;
        }
    }
    return count;
}

static bool decodes(const struct request *r)
{
    return r->count > r->prompt_count && r->computed + 1 == r->count;
}

/* A mixed step is to last at most twice as long as the decodes in it, so that no reply stutters
 * when others begin; but prompts always get this much, so that they begin in bounded time. */
#define PROMPT_TOKENS_LEAST 16u

uint32_t cm_scheduler_prompt_share(uint64_t decodes_ns, uint64_t prompt_token_ns, uint32_t most)
{
    uint64_t fits =
        prompt_token_ns > 0 ? decodes_ns - decodes_ns / 8 : 0; /* an eighth less: times vary */
    fits = prompt_token_ns > 0 ? fits / prompt_token_ns : 0;
    fits = fits < PROMPT_TOKENS_LEAST ? PROMPT_TOKENS_LEAST : fits;
    return fits < most ? (uint32_t)fits : most;
}

/* One step's time goes into the two figures, the latest with a quarter of the weight. */
static void times_note(struct cm_scheduler *s, uint64_t step_ns, uint32_t decode_tokens,
                       uint32_t prompt_tokens)
{
    uint64_t *figure = prompt_tokens == 0 ? &s->decodes_ns : &s->prompt_token_ns;
    uint64_t base = prompt_tokens > 0 && decode_tokens > 0 ? s->decodes_ns : 0;
    uint64_t value =
        step_ns > base ? (step_ns - base) / (prompt_tokens > 0 ? prompt_tokens : 1) : 1;
    *figure = *figure == 0 ? value : (3 * *figure + value) / 4;
}

/* Up to where one entry may reach: its tokens are all of the prompt or all of the reply, and all
 * new to the device or none. */
static uint32_t part_end(const struct request *r)
{
    const uint32_t end = r->computed < r->counted ? r->counted : r->count;
    return r->computed < r->prompt_count && end > r->prompt_count ? r->prompt_count : end;
}

/* From the order of admission to the order in which prompts are computed: each tenant's first, then
 * each one's second, and so on. Who asks for little waits for one prompt of another tenant, not for
 * all of them; the oldest of all stays the first. */
static void prompts_order(struct request **list, uint32_t count)
{
    uint32_t turns[CM_STEP_ENTRIES_MAX];
    for (uint32_t i = 0; i < count; i++) {
        struct request *r = list[i];
        uint32_t turn = 0, at = i;
        for (uint32_t k = 0; k < i && !decodes(r); k++) {
            turn += !decodes(list[k]) && list[k]->of.tenant == r->of.tenant;
        }
        for (; at > 0 && turns[at - 1] > turn; at--) {
            list[at] = list[at - 1];
            turns[at] = turns[at - 1];
        }
        list[at] = r;
        turns[at] = turn;
    }
}

/* Decodes first, so that replies go on; prompts fill the rest, in the order of tenants' turns, of
 * which the first admitted goes first: however small a step is, the oldest prompt gets what decodes
 * leave, and while it waits no later one becomes a decode, so nobody starves. */
static uint32_t batch_make(struct cm_scheduler *s, uint32_t *ret_decode_tokens,
                           uint32_t *ret_prompt_tokens)
{
    struct request *running[CM_STEP_ENTRIES_MAX];
    uint32_t running_count = running_list(s, running), count = 0, tokens[2] = {0, 0};
    for (uint32_t i = 0; i < running_count; i++) {
        if (running[i]->state == RUNNING && decodes(running[i])) {
            (void)page_ensure(s, running[i]);
        }
    }
    prompts_order(running, running_count);
    uint32_t most = s->limits.step_tokens_max;
    for (uint32_t turn = 0; turn < 2; turn++) {
        for (uint32_t i = 0; i < running_count; i++) {
            struct request *r = running[i];
            if (r->state != RUNNING || r->held_bytes > 0 || r->verdict_count > 0 ||
                decodes(r) != (turn == 0)) {
                continue;
            }
            uint32_t left = most - tokens[turn];
            uint32_t end = part_end(r);
            uint32_t take = end - r->computed < left ? end - r->computed : left;
            if (take > 0) {
                entry_add(s, r, take, &count);
                tokens[turn] += take;
            }
        }
        most -= tokens[0]; /* what is left for prompts */
        if (s->limits.steps_bounded && tokens[0] > 0) {
            most = cm_scheduler_prompt_share(s->decodes_ns, s->prompt_token_ns, most);
        }
    }
    *ret_decode_tokens = tokens[0];
    *ret_prompt_tokens = tokens[1];
    return count;
}

/* Pages that a step has filled can be found from now on, by requests that come while this one still
 * runs, too. */
static void full_keep(struct cm_scheduler *s, struct request *r)
{
    const uint32_t most = kept_most(s, r, r->computed);
    for (; (r->kept_pages + 1) * CM_KV_PAGE_POSITIONS <= most; r->kept_pages++) {
        const uint32_t i = r->kept_pages;
        r->pages[i] = cm_pages_keep(s->pages, r->of, i > 0 ? r->pages[i - 1] : CM_PAGE_NONE,
                                    r->tokens + (size_t)i * CM_KV_PAGE_POSITIONS, r->pages[i]);
    }
}

static void all_failed(struct cm_scheduler *s)
{
    for (uint32_t i = 0; i < s->request_count; i++) {
        struct request *r = &s->requests[i];
        if (r->state != FREE) {
            struct cm_wire_done done = {.finish = CM_FINISH_FAILED,
                                        .prompt_tokens = r->prompt_count};
            (void)s->emit(s->emit_context, CM_WIRE_DONE, r->id, &done, sizeof(done), NULL, 0);
        }
    }
}

enum cm_status cm_scheduler_step(struct cm_scheduler *s, struct cm_error *err)
{
    for (uint32_t i = 0; i < s->request_count; i++) {
        if (s->requests[i].state != FREE) { /* a preempted one may hold text too */
            (void)held_flush(s, &s->requests[i]);
        }
    }
    admit(s);
    uint32_t decode_tokens, prompt_tokens;
    uint32_t count = batch_make(s, &decode_tokens, &prompt_tokens);
    if (count == 0) {
        return CM_OK;
    }
    const uint64_t begun = cm_clock_ns();
    enum cm_status status = cm_device_step_submit(s->device, s->entries, count, err);
    if (status == CM_OK) {
        status = cm_device_step_wait(s->device, s->results, count, err);
    }
    if (status != CM_OK) {
        all_failed(s);
        return status;
    }
    const uint64_t now = cm_clock_ns();
    times_note(s, now - begun, decode_tokens, prompt_tokens);
    s->stats.steps_total++;
    s->stats.last_step_us = now / 1000;
    for (uint32_t i = 0; i < count; i++) {
        struct request *r = s->entry_owner[i];
        r->computed += s->entries[i].token_count;
        full_keep(s, r);
        if (s->results[i].sampled) {
            result_take(s, r, &s->results[i]);
        }
    }
    explicit_bzero(s->results, count * sizeof(s->results[0]));
    return CM_OK;
}

void cm_scheduler_stats(const struct cm_scheduler *s, struct cm_wire_stats *ret_stats)
{
    *ret_stats = s->stats;
    for (uint32_t i = 0; i < s->request_count; i++) {
        ret_stats->running += s->requests[i].state == RUNNING;
        ret_stats->waiting += s->requests[i].state == WAITING && !s->requests[i].ended;
    }
    ret_stats->kv_pages_used = s->limits.kv_pages - cm_pages_available(s->pages);
}
