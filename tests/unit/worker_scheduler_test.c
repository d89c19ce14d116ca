/* The scheduler over a tiny model on the CPU device: the same tokens however they are batched,
 * chunked, preempted or held back; nothing lost, nothing twice, nobody starved, all given back. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu_internal.h"
#include "runtime/worker/scheduler.h"
#include "tests/unit/allocation_trap.h"
#include "tests/unit/tiny_device.h"

#define SLOTS      8u
#define PAGES_MANY (SLOTS * CONTEXT / CM_KV_PAGE_POSITIONS)
#define IDS_MAX    4096u
#define STEPS_MAX  100000u

static enum cm_prompts prompt_class; /* of every device from now on */

static struct cm_device *device_new(const struct cm_scheduler_limits *limits)
{
    const struct cm_device_options options = {.threads = 1, .prompts = prompt_class};
    struct cm_device *device = device_load_by(&options, limits->sequences_max, limits->kv_pages,
                                              limits->context_max, limits->step_tokens_max);
    cr_assert_eq(cm_device_model_bind(device, &model, &err), CM_OK, "%s", err.text);
    return device;
}

/* ------------------------------------------------------------------ what a gateway would see */

struct reply {
    uint32_t accepted, refused, done; /* records */
    struct cm_wire_accepted terms;
    struct cm_wire_refused refusal;
    struct cm_wire_done end;
    uint64_t done_step;
    uint32_t bytes;
    char text[CONTEXT + 1];
};

struct scene {
    struct cm_device *device;
    struct cm_scheduler *scheduler;
    struct cm_scheduler_limits limits;
    int room_percent; /* of offers that find room; 100: all */
    uint64_t steps, last_id, done_count;
    struct reply replies[IDS_MAX];
};
static struct scene scene;

static bool emit(void *context, enum cm_wire_type type, uint64_t id, const void *part1,
                 size_t bytes1, const void *part2, size_t bytes2)
{
    struct scene *s = context;
    struct reply *r = &s->replies[id];
    struct cm_wire_text text;
    cr_assert_lt(id, IDS_MAX);
    cr_assert(r->done == 0 && r->refused == 0, "request %lu: a record after the last", id);
    if (type != CM_WIRE_ACCEPTED && rand() % 100 >= s->room_percent) {
        return false;
    }
    switch (type) {
    case CM_WIRE_ACCEPTED:
        cr_assert_eq(bytes1, sizeof(r->terms));
        memcpy(&r->terms, part1, bytes1);
        r->accepted++;
        break;
    case CM_WIRE_REFUSED:
        cr_assert_eq(bytes1, sizeof(r->refusal));
        memcpy(&r->refusal, part1, bytes1);
        r->refused++;
        break;
    case CM_WIRE_TEXT:
        memcpy(&text, part1, sizeof(text));
        cr_assert(bytes1 == sizeof(text) && text.bytes == bytes2 && bytes2 > 0);
        cr_assert_leq(r->bytes + bytes2, CONTEXT, "request %lu: more text than context", id);
        memcpy(r->text + r->bytes, part2, bytes2);
        r->bytes += (uint32_t)bytes2;
        break;
    case CM_WIRE_DONE:
        cr_assert_eq(bytes1, sizeof(r->end));
        memcpy(&r->end, part1, bytes1);
        r->done++;
        r->done_step = s->steps;
        s->done_count++;
        break;
    default:
        cr_assert_fail("record of type %d", (int)type);
    }
    return true;
}

static void scene_begin(const struct cm_scheduler_limits *limits)
{
    memset(&scene, 0, sizeof(scene));
    scene.limits = *limits;
    scene.room_percent = 100;
    scene.device = device_new(limits);
    cr_assert_eq(cm_scheduler_new(scene.device, limits, emit, &scene, &scene.scheduler, &err),
                 CM_OK);
}

/* Nothing runs, waits or holds pages, and every device slot can be had. */
static void empty_assert(void)
{
    struct cm_wire_stats stats;
    const struct cm_slot_params params = {.sampling = {.top_p = 1, .repetition_penalty = 1},
                                          .max_tokens = 1};
    uint32_t slot;
    cr_assert_not(cm_scheduler_busy(scene.scheduler));
    cm_scheduler_stats(scene.scheduler, &stats);
    cr_assert_eq(stats.running, 0u);
    cr_assert_eq(stats.waiting, 0u);
    cr_assert_eq(stats.kv_pages_used, 0u);
    for (uint32_t i = 0; i < scene.limits.sequences_max; i++) {
        cr_assert_eq(cm_device_slot_open(scene.device, &params, &slot, &err), CM_OK, "slot %u", i);
    }
    for (uint32_t i = 0; i < scene.limits.sequences_max; i++) {
        cm_device_slot_close(scene.device, i);
    }
}

static void scene_end(void)
{
    cm_scheduler_free(scene.scheduler);
    cm_device_close(scene.device);
}

static void step(void)
{
    scene.steps++;
    cr_assert_lt(scene.steps, STEPS_MAX, "no end");
    allocation_trap = true; /* after ready nothing is allocated */
    enum cm_status status = cm_scheduler_step(scene.scheduler, &err);
    allocation_trap = false;
    cr_assert_eq(status, CM_OK, "%s", err.text);
    cr_assert_gt(allocations_allowed, 5ul, "the trap is not linked in");
}

static void run_to_end(void)
{
    while (cm_scheduler_busy(scene.scheduler)) {
        step();
    }
}

/* ------------------------------------------------------------------ requests */

struct ask {
    uint32_t prompt_tokens, max_tokens, which; /* which: content and sampling */
    uint64_t tenant;
};

/* Submit one, whose last tokens are the characters of `end`; its id. */
static uint64_t submit_ending(const struct ask *ask, const char *end)
{
    uint64_t random = ask->which * 2654435761u + 1;
    struct cm_scheduler_request request = {.id = ++scene.last_id,
                                           .tenant = ask->tenant,
                                           .max_tokens = ask->max_tokens,
                                           .slot = {.ignore_eos = true}};
    static const struct cm_sampling ways[] = {
        {.temperature = 0, .top_p = 1, .repetition_penalty = 1.5f},
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = 7},
        {.temperature = 1.5f, .top_p = 0.9f, .repetition_penalty = 1.3f, .seed = 8},
        {.temperature = 0.8f, .top_p = 1, .repetition_penalty = 1.2f, .frequency_penalty = 0.5f},
    };
    uint32_t *room = cm_scheduler_prompt(scene.scheduler);
    request.slot.sampling = ways[ask->which % 4];
    for (uint32_t i = 0; room != NULL && i < ask->prompt_tokens && i < CONTEXT; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        room[i] = (uint32_t)(random >> 40) % (VOCABULARY - 1);
    }
    for (size_t i = 0, size = strlen(end); room != NULL && i < size; i++) {
        room[ask->prompt_tokens - size + i] = (uint32_t)(end[i] - '0');
    }
    allocation_trap = true;
    cm_scheduler_submit(scene.scheduler, &request, ask->prompt_tokens);
    allocation_trap = false;
    return request.id;
}

static uint64_t submit(const struct ask *ask)
{
    return submit_ending(ask, "");
}

#define ASKS 8u
static const struct ask asks[ASKS] = {{1, 60, 0, 0},   {5, 60, 1, 0},  {33, 60, 2, 1},
                                      {100, 60, 3, 0}, {64, 60, 4, 2}, {31, 60, 5, 0},
                                      {17, 60, 6, 1},  {70, 60, 8, 0}};
static char alone[ASKS][CONTEXT + 1]; /* each by itself, in one chunk */

static void setup(void)
{
    const struct cm_scheduler_limits limits = {SLOTS, 8, PAGES_MANY, CONTEXT, CONTEXT, true, false};
    model_make();
    scene_begin(&limits);
    for (uint32_t i = 0; i < ASKS; i++) {
        uint64_t id = submit(&asks[i]);
        run_to_end();
        cr_assert_eq(scene.replies[id].bytes, 60u);
        memcpy(alone[i], scene.replies[id].text, sizeof(alone[i]));
    }
    cr_assert_str_neq(alone[0], alone[1]);
    empty_assert();
    scene_end();
    srand(12);
}

TestSuite(worker_scheduler, .init = setup);

/* Pages of either kind are shared, kept, given up and filled again alike. */
static void kinds_run(void (*work)(void))
{
    char halfs[CONTEXT + 1];
    memcpy(halfs, alone[4], sizeof(halfs));
    work();
    kv_kind = CM_KV_INT8;
    setup();
    cr_assert_str_neq(halfs, alone[4], "what is kept makes no difference");
    work();
}

/* Replies 1 .. ASKS are those of `asks`, whole and once. */
static void replies_assert(const char *when)
{
    for (uint32_t i = 0; i < ASKS; i++) {
        const struct reply *r = &scene.replies[i + 1];
        cr_assert(r->accepted == 1 && r->refused == 0 && r->done == 1, "%s: request %u", when, i);
        cr_assert_str_eq(r->text, alone[i], "%s: request %u", when, i);
        cr_assert_eq(r->end.finish, CM_FINISH_LENGTH);
        cr_assert_eq(r->end.prompt_tokens, asks[i].prompt_tokens);
        cr_assert_eq(r->end.completion_tokens, 60u);
    }
}

static void same_tokens_however_they_are_batched_chunked_preempted_or_held_back(void)
{
    static const uint32_t chunks[] = {1, 3, 16, 200}, slots[] = {1, 3, SLOTS},
                          pages[] = {PAGES_MANY, 12, 6};
    unsigned preempted = 0, runs = 0;
    for (size_t i = 0; i < 4 * 3 * 3 * 2 * 2; i++) {
        const struct cm_scheduler_limits limits = {
            slots[i % 3], 8, pages[i / 3 % 3], CONTEXT, chunks[i / 9 % 4], i < 72, i % 5 == 0};
        struct cm_wire_stats stats;
        char when[96];
        scene_begin(&limits);
        scene.room_percent = i / 36 % 2 == 1 ? 40 : 100;
        snprintf(when, sizeof(when), "%u slots, %u pages, %u tokens a step, %d %% room",
                 limits.sequences_max, limits.kv_pages, limits.step_tokens_max, scene.room_percent);
        for (uint32_t k = 0; k < ASKS; k++) {
            submit(&asks[k]);
        }
        run_to_end();
        replies_assert(when);
        cm_scheduler_stats(scene.scheduler, &stats);
        cr_assert_eq(stats.completion_tokens_total, 60u * ASKS, "%s", when);
        cr_assert_eq(stats.prompt_tokens_total, 321u);
        preempted += stats.preemptions_total > 0;
        runs++;
        empty_assert();
        scene_end();
    }
    printf("worker_scheduler: %u runs, %u with preemptions\n", runs, preempted);
    cr_assert_geq(preempted, 24u);
}

Test(worker_scheduler, same_tokens_however_they_are_batched_chunked_preempted_or_held_back)
{
    kinds_run(same_tokens_however_they_are_batched_chunked_preempted_or_held_back);
}

/* What follows is in class P; replies were made anew in it. */
static void prompts_round(void)
{
    if (cm_prompt_path_choose() == NULL) {
        cr_skip_test("this machine lacks AMX-bf16");
    }
    prompt_class = CM_PROMPTS_BF16;
    setup();
}

Test(worker_scheduler, the_same_with_prompts_in_bf16)
{
    prompts_round();
    same_tokens_however_they_are_batched_chunked_preempted_or_held_back();
}

/* ------------------------------------------------------------------ limits */

Test(worker_scheduler, prompts_at_the_context_and_replies_at_their_limits)
{
    static const struct {
        uint32_t pages, prompt, max_tokens, refusal, terms; /* refusal 0: accepted with terms */
    } rows[] = {
        {PAGES_MANY, 0, 5, CM_REFUSAL_EMPTY, 0},
        {PAGES_MANY, CONTEXT - 1, 5, 0, 1},
        {PAGES_MANY, CONTEXT, 5, CM_REFUSAL_CONTEXT, 0},
        {PAGES_MANY, CONTEXT + 1, 5, CM_REFUSAL_CONTEXT, 0},
        {PAGES_MANY, CONTEXT - 4, 3, 0, 3},
        {PAGES_MANY, CONTEXT - 4, 4, 0, 4},
        {PAGES_MANY, CONTEXT - 4, 5, 0, 4},
        {PAGES_MANY, CONTEXT - 4, 0, 0, 4},
        {PAGES_MANY, CONTEXT - 4, UINT32_MAX, 0, 4},
        {PAGES_MANY, 1, 1, 0, 1},
        {2, 63, 0, 0, 1}, /* fewer pages than the context: they are the limit */
        {2, 64, 0, CM_REFUSAL_CONTEXT, 0},
        {1, 1, 0, 0, 31},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const struct cm_scheduler_limits limits = {2, 2, rows[i].pages, CONTEXT, 64, true, false};
        const struct ask ask = {rows[i].prompt, rows[i].max_tokens, 1, 0};
        scene_begin(&limits);
        const struct reply *r = &scene.replies[submit(&ask)];
        cr_assert_eq(r->refusal.reason, rows[i].refusal, "row %zu", i);
        cr_assert_eq(r->accepted + r->refused, 1u);
        if (rows[i].refusal == CM_REFUSAL_CONTEXT) {
            uint32_t limit = rows[i].pages == 2 ? 64 : CONTEXT;
            cr_assert_eq(r->refusal.prompt_tokens, rows[i].prompt, "row %zu", i);
            cr_assert_eq(r->refusal.limit, limit, "row %zu", i);
        }
        run_to_end();
        cr_assert_eq(r->done, rows[i].refusal == 0 ? 1u : 0u, "row %zu", i);
        if (r->done == 1) {
            cr_assert_eq(r->terms.max_tokens, rows[i].terms, "row %zu", i);
            cr_assert_eq(r->bytes, rows[i].terms, "row %zu", i);
            cr_assert_eq(r->end.finish, CM_FINISH_LENGTH);
        }
        empty_assert();
        scene_end();
    }
}

Test(worker_scheduler, a_full_queue_refuses_and_serves_all_that_it_took)
{
    const struct cm_scheduler_limits limits = {2, 3, PAGES_MANY, CONTEXT, 16, true, false};
    const struct ask ask = {10, 5, 2, 0};
    struct cm_wire_stats stats;
    scene_begin(&limits);
    for (uint32_t round = 0; round < 2; round++) { /* full before a step as after some */
        scene.done_count = 0;
        uint32_t first = (uint32_t)scene.last_id + 1;
        while (cm_scheduler_prompt(scene.scheduler) != NULL) {
            submit(&ask);
            for (uint32_t i = 0; i < round; i++) {
                step();
            }
        }
        cm_scheduler_stats(scene.scheduler, &stats);
        cr_assert_eq(stats.running + stats.waiting, 5u);
        const struct reply *r = &scene.replies[submit(&ask)];
        cr_assert_eq(r->refusal.reason, CM_REFUSAL_QUEUE);
        cr_assert_eq(r->accepted, 0u);
        run_to_end();
        for (uint64_t id = first; id < scene.last_id; id++) {
            cr_assert(scene.replies[id].done == 1 && scene.replies[id].bytes == 5);
        }
        empty_assert();
    }
    scene_end();
}

/* ------------------------------------------------------------------ leaving and failing */

Test(worker_scheduler, a_cancel_at_any_point_frees_everything_and_changes_no_other_reply)
{
    const struct cm_scheduler_limits limits = {4, 8, 12, CONTEXT, 16, true, false};
    uint64_t steps = 1;
    unsigned cancels = 0;
    for (uint64_t when = 0; when < steps; when += 1 + when / 16) {
        for (uint32_t victim = 1; victim <= ASKS; victim += 2) {
            scene_begin(&limits);
            scene.room_percent = when % 2 == 0 ? 100 : 50;
            for (uint32_t i = 0; i < ASKS; i++) {
                submit(&asks[i]);
            }
            while (scene.steps < when && cm_scheduler_busy(scene.scheduler)) {
                step();
            }
            struct reply *r = &scene.replies[victim];
            uint32_t bytes = r->bytes;
            cm_scheduler_cancel(scene.scheduler, victim);
            cm_scheduler_cancel(scene.scheduler, victim); /* unknown by now */
            run_to_end();
            bool over = r->end.finish == CM_FINISH_LENGTH; /* it had ended before */
            cr_assert_eq(r->done, 1u, "%u cancelled at %lu", victim, when);
            cr_assert(over || (r->end.finish == CM_FINISH_CANCELLED && r->bytes == bytes));
            steps = scene.steps > steps ? scene.steps : steps;
            for (uint32_t i = 0; i < ASKS; i++) {
                bool whole = i + 1 != victim || over;
                size_t size = whole ? 60 : scene.replies[i + 1].bytes;
                cr_assert_eq(strncmp(scene.replies[i + 1].text, alone[i], size), 0,
                             "%u cancelled at %lu: request %u", victim, when, i + 1);
            }
            cancels++;
            empty_assert();
            scene_end();
        }
    }
    printf("worker_scheduler: %u cancels within %lu steps\n", cancels, steps);
    cr_assert_gt(steps, 100u);
}

Test(worker_scheduler, cancelling_all_at_any_point_frees_everything)
{
    const struct cm_scheduler_limits limits = {4, 8, 12, CONTEXT, 16, true, false};
    scene_begin(&limits);
    for (uint32_t steps = 0; steps < 120; steps++) {
        memset(scene.replies, 0, sizeof(scene.replies));
        scene.last_id = 0;
        for (uint32_t i = 0; i < ASKS; i++) {
            submit(&asks[i]);
        }
        for (uint32_t i = 0; i < steps; i++) {
            step();
        }
        cm_scheduler_cancel_all(scene.scheduler);
        empty_assert();
    }
    scene_end();
}

Test(worker_scheduler, a_ring_without_room_stops_the_work_until_there_is_room)
{
    const struct cm_scheduler_limits limits = {SLOTS, 8, PAGES_MANY, CONTEXT, 16, true, false};
    struct cm_wire_stats before, after;
    scene_begin(&limits);
    for (uint32_t i = 0; i < ASKS; i++) {
        submit(&asks[i]);
    }
    scene.room_percent = 0;
    for (uint32_t i = 0; i < 100; i++) {
        step();
    }
    cm_scheduler_stats(scene.scheduler, &before);
    for (uint32_t i = 0; i < 100; i++) {
        step();
    }
    cm_scheduler_stats(scene.scheduler, &after);
    cr_assert_eq(before.completion_tokens_total, ASKS, "one token each, then they are held");
    cr_assert_eq(after.steps_total, before.steps_total);
    scene.room_percent = 100;
    run_to_end();
    replies_assert("after no room");
    empty_assert();
    scene_end();
}

Test(worker_scheduler, a_device_that_fails_ends_every_request)
{
    const struct cm_scheduler_limits limits = {2, 8, PAGES_MANY, CONTEXT, 16, true, false};
    scene_begin(&limits);
    for (uint32_t i = 0; i < ASKS; i++) {
        submit(&asks[i]);
    }
    step();
    cm_device_scrub(scene.device);
    cr_assert_neq(cm_scheduler_step(scene.scheduler, &err), CM_OK);
    for (uint32_t i = 1; i <= ASKS; i++) {
        cr_assert_eq(scene.replies[i].done, 1u);
        cr_assert_eq(scene.replies[i].end.finish, CM_FINISH_FAILED);
    }
    scene_end();
}

/* The same room is given to the next one: nothing of the last may lie there. */
Test(worker_scheduler, a_prompt_is_wiped_when_it_is_refused_cancelled_or_done)
{
    const struct cm_scheduler_limits limits = {1, 1, PAGES_MANY, CONTEXT, CONTEXT, true, false};
    static const uint32_t prompts[] = {CONTEXT, 200, 200};
    scene_begin(&limits);
    for (uint32_t i = 0; i < 3; i++) {
        const struct ask ask = {prompts[i], 4, 1, 0};
        uint64_t id = submit(&ask);
        if (i == 1) {
            cm_scheduler_cancel(scene.scheduler, id);
        }
        run_to_end();
        const uint32_t *room = cm_scheduler_prompt(scene.scheduler);
        for (uint32_t k = 0; k < CONTEXT; k++) {
            cr_assert_eq(room[k], 0u, "after request %u: token %u", i, k);
        }
    }
    scene_end();
}

/* ------------------------------------------------------------------ whose turn it is */

/* While `load` arrives before every step, as far as there is room: steps until request `id` is
 * done.
 */
static uint64_t steps_under_load(uint64_t id, const struct ask *load)
{
    while (scene.replies[id].done == 0) {
        while (scene.last_id < IDS_MAX - 2 && cm_scheduler_prompt(scene.scheduler) != NULL) {
            submit(load);
        }
        cr_assert_lt(scene.last_id, IDS_MAX - 2, "request %lu starves: %lu others are done", id,
                     scene.done_count);
        step();
    }
    return scene.steps;
}

Test(worker_scheduler, no_request_starves_under_a_constant_load)
{
    static const struct ask loads[] = {{1, 1, 1, 0}, {1, 40, 1, 0}, {16, 1, 1, 0}, {40, 20, 1, 0}};
    static const uint32_t chunks[] = {1, 3, 16, 64}, pages[] = {PAGES_MANY, 16, 8};
    uint64_t most = 0;
    for (size_t i = 0; i < 4 * 4 * 3 * 3 * 2; i++) {
        const struct cm_scheduler_limits limits = {
            4, i >= 144 ? 1 : 4, pages[i / 16 % 3], CONTEXT, chunks[i % 4], true, false};
        const struct ask old = {200, 20, 2, (uint64_t)0 - 1 + i / 48 % 3}; /* before, same, after */
        scene_begin(&limits);
        for (uint32_t k = 0; k < 4; k++) { /* the old one has some before it */
            submit(&loads[i / 4 % 4]);
        }
        uint64_t id = submit(&old);
        uint64_t steps = steps_under_load(id, &loads[i / 4 % 4]);
        /* What came before it and what it needs itself, token by token in the worst case. */
        uint64_t tokens = 4 * 60 + 220 + 8 * 60;
        cr_assert_leq(steps, 2 * tokens / limits.step_tokens_max + 120,
                      "%u tokens a step, %u pages", limits.step_tokens_max, limits.kv_pages);
        most = steps > most ? steps : most;
        scene_end();
    }
    printf("worker_scheduler: the oldest request is done after at most %lu steps\n", most);
}

Test(worker_scheduler, of_one_tenant_the_first_to_come_is_served_first)
{
    const struct cm_scheduler_limits limits = {1, 20, PAGES_MANY, CONTEXT, 16, true, false};
    uint64_t last = 0;
    scene_begin(&limits);
    for (uint32_t i = 0; i < 20; i++) {
        const struct ask ask = {1 + i * 7 % 11, 3, i, 5};
        submit(&ask);
    }
    cm_scheduler_cancel(scene.scheduler, 3);
    run_to_end();
    for (uint32_t i = 1; i <= 20; i++) {
        cr_assert_eq(scene.replies[i].done, 1u);
        cr_assert_eq(scene.replies[i].end.finish, i == 3 ? CM_FINISH_CANCELLED : CM_FINISH_LENGTH);
        cr_assert(i == 3 || scene.replies[i].done_step > last, "request %u was overtaken", i);
        last = i == 3 ? last : scene.replies[i].done_step;
    }
    scene_end();
}

Test(worker_scheduler, tenants_take_turns)
{
    const struct cm_scheduler_limits limits = {1, 20, PAGES_MANY, CONTEXT, 16, true, false};
    for (uint64_t quiet = 4; quiet <= 14; quiet += 10) {
        const struct ask many = {3, 3, 1, 9}, few = {3, 3, 1, quiet};
        scene_begin(&limits);
        for (uint32_t i = 0; i < 15; i++) {
            submit(&many);
        }
        submit(&few);
        submit(&few);
        run_to_end();
        for (uint32_t i = 0; i < 2; i++) {
            unsigned before = 0;
            for (uint64_t id = 1; id <= 15; id++) {
                before += scene.replies[id].done_step < scene.replies[16 + i].done_step;
            }
            cr_assert_leq(before, i + 1, "tenant %lu: request %u waited for %u", quiet, i, before);
        }
        scene_end();
    }
}

/* All slots but one are another tenant's, and their prompts come first by admission. */
Test(worker_scheduler, a_small_prompt_waits_for_one_large_one_of_another_tenant)
{
    const struct cm_scheduler_limits limits = {4, 20, PAGES_MANY, CONTEXT, 16, true, false};
    scene_begin(&limits);
    for (uint32_t i = 0; i < 3; i++) {
        submit(&(struct ask){170, 3, 10 + i, 9});
    }
    cr_assert_eq(cm_scheduler_step(scene.scheduler, &err), CM_OK);
    const uint64_t small = submit(&(struct ask){3, 3, 2, 4});
    run_to_end();
    for (uint64_t id = 2; id <= 3; id++) {
        cr_assert_lt(scene.replies[1].done_step, scene.replies[id].done_step);
        cr_assert_lt(scene.replies[small].done_step, scene.replies[id].done_step);
    }
    scene_end();
}

/* The latest loses its pages, the earliest gets them back: equal requests end as they came. */
Test(worker_scheduler, preemption_keeps_the_order)
{ /* without the cache: these requests are equal to the last token, and would share every page */
    const struct cm_scheduler_limits limits = {SLOTS, 8, 12, CONTEXT, 32, false, false};
    const struct ask ask = {33, 120, 1, 0};
    struct cm_wire_stats stats;
    scene_begin(&limits);
    for (uint32_t i = 0; i < 12; i++) {
        submit(&ask);
    }
    run_to_end();
    cm_scheduler_stats(scene.scheduler, &stats);
    cr_assert_gt(stats.preemptions_total, 5u);
    for (uint32_t id = 2; id <= 12; id++) {
        cr_assert_leq(scene.replies[id - 1].done_step, scene.replies[id].done_step, "request %u",
                      id);
    }
    scene_end();
}

/* ------------------------------------------------------------------ equal prefixes */

/* One request, alone, to its end. */
static const struct reply *reply_of(const struct ask *ask)
{
    uint64_t id = submit(ask);
    run_to_end();
    return &scene.replies[id];
}

static void an_equal_prefix_is_computed_once_and_changes_no_token(void)
{
    const struct cm_scheduler_limits limits = {2, 2, PAGES_MANY, CONTEXT, 64, true, false};
    scene_begin(&limits);
    for (uint32_t i = 0; i < ASKS; i++) { /* with penalties: skipped tokens count for them too */
        uint32_t whole = (asks[i].prompt_tokens - 1) / CM_KV_PAGE_POSITIONS * CM_KV_PAGE_POSITIONS;
        for (uint32_t again = 0; again < 3; again++) {
            const struct reply *r = reply_of(&asks[i]);
            cr_assert_str_eq(r->text, alone[i], "request %u, time %u", i, again);
            cr_assert_eq(r->end.cached_tokens, again > 0 ? whole : 0u, "request %u, time %u: %u", i,
                         again, r->end.cached_tokens);
        }
    }
    empty_assert();
    scene_end();
}

Test(worker_scheduler, an_equal_prefix_is_computed_once_and_changes_no_token)
{
    kinds_run(an_equal_prefix_is_computed_once_and_changes_no_token);
}

Test(worker_scheduler, an_equal_prefix_in_bf16_is_computed_once_and_changes_no_token)
{
    prompts_round();
    an_equal_prefix_is_computed_once_and_changes_no_token();
}

/* A prompt that goes on from an earlier reply, as the next turn of a chat does: pages of the reply
 * are found where replies and prompts are of one class, and never where they are not. */
static void turns_compare(uint32_t cached)
{
    char whole[2][CONTEXT + 1];
    for (uint32_t cache = 0; cache < 2; cache++) {
        const struct cm_scheduler_limits limits = {2,  2,          PAGES_MANY, CONTEXT,
                                                   64, cache == 1, false};
        struct ask next = asks[3];
        scene_begin(&limits);
        cr_assert_str_eq(reply_of(&asks[3])->text, alone[3]);
        next.prompt_tokens += 60;
        const struct reply *r = &scene.replies[submit_ending(&next, alone[3])];
        run_to_end();
        cr_assert_eq(r->end.cached_tokens, cache == 1 ? cached : 0u, "%u", r->end.cached_tokens);
        memcpy(whole[cache], r->text, sizeof(whole[0]));
        empty_assert();
        scene_end();
    }
    cr_assert_str_eq(whole[0], whole[1]);
}

Test(worker_scheduler, the_next_turn_finds_the_reply_before_it)
{
    turns_compare(128);
}

Test(worker_scheduler, the_next_turn_in_bf16_finds_the_prompt_alone)
{
    prompts_round();
    turns_compare(96);
}

Test(worker_scheduler, without_the_cache_nothing_is_reused)
{
    const struct cm_scheduler_limits limits = {2, 2, PAGES_MANY, CONTEXT, 64, false, false};
    scene_begin(&limits);
    for (uint32_t again = 0; again < 3; again++) {
        const struct reply *r = reply_of(&asks[3]);
        cr_assert_str_eq(r->text, alone[3]);
        cr_assert_eq(r->end.cached_tokens, 0u);
    }
    scene_end();
}

/* The structural half of "no tenant learns from the time of its reply what another one asked". */
Test(worker_scheduler, no_tenant_finds_anothers_prefix)
{
    const struct cm_scheduler_limits limits = {2, 2, PAGES_MANY, CONTEXT, 64, true, false};
    struct ask ask = asks[3];
    scene_begin(&limits);
    for (uint32_t round = 0; round < 3; round++) {
        for (uint64_t tenant = 1; tenant <= 3; tenant++) {
            ask.tenant = tenant;
            const struct reply *r = reply_of(&ask);
            cr_assert_str_eq(r->text, alone[3]);
            cr_assert_eq(r->end.cached_tokens, round > 0 ? 96u : 0u, "tenant %lu, round %u", tenant,
                         round);
        }
    }
    scene_end();
}

/* Each logit of each computed position, bit by bit, with and without reuse. */
static void logits_are_bit_equal_with_and_without_the_cache(void)
{
    static float probe[CONTEXT * VOCABULARY], first[CONTEXT * VOCABULARY];
    static bool computed[CONTEXT];
    for (uint32_t cache = 0; cache < 2; cache++) {
        const struct cm_scheduler_limits limits = {2,  2,          PAGES_MANY, CONTEXT,
                                                   24, cache == 1, false};
        uint32_t compared = 0, skipped = 0;
        scene_begin(&limits);
        scene.device->probe = probe;
        for (uint32_t again = 0; again < 2; again++) {
            memset(computed, 0, sizeof(computed));
            submit(&asks[3]);
            while (cm_scheduler_busy(scene.scheduler)) {
                step();
                for (uint32_t t = 0; t < scene.device->token_count; t++) {
                    const uint32_t position = scene.device->tokens[t].position;
                    float *row = first + (size_t)position * VOCABULARY;
                    const float *now = probe + (size_t)t * VOCABULARY;
                    if (cache == 0 && again == 0) {
                        memcpy(row, now, VOCABULARY * sizeof(float));
                    }
                    cr_assert_eq(memcmp(row, now, VOCABULARY * sizeof(float)), 0,
                                 "cache %u, time %u, position %u", cache, again, position);
                    computed[position] = true;
                    compared++;
                }
            }
            for (uint32_t position = 0; position < 100; position++) {
                skipped += !computed[position];
            }
        }
        cr_assert_eq(skipped, cache == 1 ? 96u : 0u);
        cr_assert_eq(compared, 2 * 159u - skipped);
        scene.device->probe = NULL;
        scene_end();
    }
}

Test(worker_scheduler, logits_are_bit_equal_with_and_without_the_cache)
{
    kinds_run(logits_are_bit_equal_with_and_without_the_cache);
}

/* What another one computes while it runs is found by who comes later. */
Test(worker_scheduler, a_running_requests_prefix_is_shared)
{
    const struct cm_scheduler_limits limits = {3, 3, PAGES_MANY, CONTEXT, 32, true, false};
    struct cm_wire_stats stats;
    scene_begin(&limits);
    submit(&asks[3]);
    for (uint32_t i = 0; i < 4; i++) {
        step(); /* all 100 tokens of the prompt */
    }
    submit(&asks[3]);
    step();
    cm_scheduler_stats(scene.scheduler, &stats);
    cr_assert_eq(stats.kv_pages_used, 5u, "4 pages, and one of its own: %u", stats.kv_pages_used);
    run_to_end();
    for (uint64_t id = 1; id <= 2; id++) {
        cr_assert_str_eq(scene.replies[id].text, alone[3]);
    }
    cr_assert_eq(scene.replies[2].end.cached_tokens, 96u);
    empty_assert();
    scene_end();
}

/* A neighbour that comes, is refused, cancelled, or ends changes nothing for the others. */
static void a_sequence_that_goes_away_disturbs_no_neighbour(void)
{
    for (uint32_t victim = 0; victim < ASKS; victim++) {
        const struct cm_scheduler_limits limits = {
            SLOTS, 8, victim % 2 == 0 ? PAGES_MANY : 14, CONTEXT, 32, victim % 4 < 2, false};
        scene_begin(&limits);
        for (uint32_t i = 0; i < ASKS; i++) {
            submit(&asks[i]);
        }
        for (uint32_t i = 0; i < 5 + 7 * victim; i++) {
            step();
        }
        cm_scheduler_cancel(scene.scheduler, victim + 1);
        run_to_end();
        for (uint32_t i = 0; i < ASKS; i++) {
            const struct reply *r = &scene.replies[i + 1];
            if (i != victim) {
                cr_assert_str_eq(r->text, alone[i], "victim %u, request %u", victim, i);
            } else {
                cr_assert_eq(strncmp(r->text, alone[i], r->bytes), 0);
            }
        }
        empty_assert();
        scene_end();
    }
}

Test(worker_scheduler, a_sequence_that_goes_away_disturbs_no_neighbour)
{
    kinds_run(a_sequence_that_goes_away_disturbs_no_neighbour);
}

Test(worker_scheduler, prompts_share_a_step_with_decodes_in_bounds)
{
    static const struct {
        uint64_t decodes_ns, token_ns;
        uint32_t most, share;
    } rows[] = {{0, 0, 256, 16},
                {8000, 0, 256, 16},
                {8000000, 100000, 256, 70},
                {8000000, 10, 256, 256},
                {8000000, 7000000, 256, 16},
                {8000000, 100000, 9, 9},
                {UINT64_MAX, 1, 256, 256},
                {0, 5, 8, 8}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        cr_assert_eq(cm_scheduler_prompt_share(rows[i].decodes_ns, rows[i].token_ns, rows[i].most),
                     rows[i].share, "row %zu", i);
    }
}
