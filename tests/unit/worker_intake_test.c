/* GENERATE records of a gateway that the network has taken over: what is accepted is checked again
 * by a reader of its own, field by field; nothing may crash, and ids stay within the vocabulary. */
#include <criterion/criterion.h>
#include <math.h>

#include "runtime/worker/intake.h"
#include "tests/unit/allocation_trap.h"
#include "tests/unit/gguf_sample.h"
#include "tests/unit/mutate.h"

#define MUTATIONS     20000
#define PAYLOAD_BYTES 4096u
#define CONTEXT       512u

static struct gguf_sample sample;
static struct cm_plan plan;
static struct cm_tokenizer *tokenizer;
static struct cm_chat *chat;
static struct cm_error err;

static void setup(void)
{
    gguf_sample_make(&sample);
    cr_assert_eq(gguf_way(sample.bytes, sample.size, &plan, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_tokenizer_new(&plan.manifest, cm_chat_text_bytes(&plan.manifest, PAYLOAD_BYTES),
                                  &tokenizer, &err),
                 CM_OK, "%s", err.text);
    cr_assert_eq(cm_chat_new(&plan.manifest, tokenizer, PAYLOAD_BYTES, &chat, &err), CM_OK);
}

static void teardown(void)
{
    cm_chat_free(chat);
    cm_tokenizer_free(tokenizer);
    cm_plan_done(&plan);
}

TestSuite(worker_intake, .init = setup, .fini = teardown);

static bool parse(const uint8_t *payload, size_t size, struct cm_scheduler_request *request,
                  struct cm_token_list *list)
{
    static uint32_t ids[CONTEXT];
    *request = (struct cm_scheduler_request){.id = 1};
    *list = (struct cm_token_list){ids, CONTEXT, 0};
    const struct cm_intake intake = {NULL, chat, tokenizer, &plan.manifest};
    struct cm_prompt_verdicts verdicts;
    allocation_trap = true; /* after ready nothing is allocated */
    bool good =
        cm_intake_parse(&intake, payload, size, request, list, &verdicts) == CM_REFUSAL_NONE;
    allocation_trap = false;
    cr_assert_gt(allocations_allowed, 10ul, "the trap is not linked in");
    return good;
}

struct record {
    uint8_t bytes[PAYLOAD_BYTES];
    size_t size;
    size_t lengths[16]; /* offsets of u32 fields behind the head */
    uint32_t length_count;
};

static void u32_put(struct record *r, uint32_t value)
{
    r->lengths[r->length_count++] = r->size;
    memcpy(r->bytes + r->size, &value, 4);
    r->size += 4;
}

static void words_put(struct record *r, const char *text)
{
    u32_put(r, (uint32_t)strlen(text));
    memcpy(r->bytes + r->size, text, strlen(text));
    r->size += strlen(text);
}

static struct record record_make(uint32_t kind)
{
    struct record r = {.size = sizeof(struct cm_wire_generate)};
    const struct cm_wire_generate head = {
        .prompt_kind = kind,
        .part_count = kind == CM_PROMPT_CHAT ? 2 : 1,
        .stop_count = 2,
        .max_tokens = 9,
        .sampling = {
            .temperature = 0.7f, .top_p = 0.9f, .min_p = 0.1f, .repetition_penalty = 1.1f}};
    memcpy(r.bytes, &head, sizeof(head));
    words_put(&r, "stop");
    words_put(&r, "\xe6\x9d\xb1");
    u32_put(&r, kind == CM_PROMPT_CHAT ? CM_CHAT_SYSTEM : 0);
    words_put(&r, "be brief");
    if (kind == CM_PROMPT_CHAT) {
        u32_put(&r, CM_CHAT_USER);
        words_put(&r, "the \xc3\xa9t\xc3\xa9 <|im_end|>");
    }
    return r;
}

/* By code points: shortest form, no surrogates, no NUL. */
static bool utf8_sound(const uint8_t *at, size_t size)
{
    for (size_t i = 0; i < size;) {
        size_t more = at[i] < 0x80       ? 0
                      : at[i] >> 5 == 6  ? 1
                      : at[i] >> 4 == 14 ? 2
                      : at[i] >> 3 == 30 ? 3
                                         : 9;
        uint32_t point = more == 0 ? at[i] : at[i] & (0x3fu >> more);
        if (more == 9 || more > size - i - 1) {
            return false;
        }
        for (size_t k = 1; k <= more; k++) {
            if (at[i + k] >> 6 != 2) {
                return false;
            }
            point = point << 6 | (at[i + k] & 0x3fu);
        }
        static const uint32_t least[] = {1, 0x80, 0x800, 0x10000};
        if (point < least[more] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) {
            return false;
        }
        i += more + 1;
    }
    return true;
}

/* The record's rules once more, from wire.h alone. */
static bool record_sound(const uint8_t *bytes, size_t size)
{
    struct cm_wire_generate head;
    size_t at = sizeof(head);
    if (size < at) {
        return false;
    }
    memcpy(&head, bytes, sizeof(head));
    const struct cm_sampling *s = &head.sampling;
    bool ok = s->temperature >= 0 && s->temperature <= 2 && s->top_p > 0 && s->top_p <= 1 &&
              s->min_p >= 0 && s->min_p <= 1 && fabsf(s->frequency_penalty) <= 2 &&
              fabsf(s->presence_penalty) <= 2 && s->repetition_penalty > 0 &&
              s->repetition_penalty <= 4 && head.stop_count <= 4 && head.part_count >= 1 &&
              head.part_count <= 256;
    for (uint32_t i = 0; ok && i < head.stop_count + head.part_count; i++) {
        bool stop = i < head.stop_count;
        uint32_t role = 0, bytes_here;
        ok = size - at >= (stop ? 4u : 8u);
        if (ok && !stop) {
            memcpy(&role, bytes + at, 4);
            at += 4;
            ok = head.prompt_kind == CM_PROMPT_CHAT ? role >= 1 && role <= 3
                                                    : role == 0 && head.part_count == 1;
        }
        if (ok) {
            memcpy(&bytes_here, bytes + at, 4);
            at += 4;
            ok = bytes_here <= size - at && (!stop || (bytes_here >= 1 && bytes_here <= 256)) &&
                 utf8_sound(bytes + at, bytes_here);
            at += ok ? bytes_here : 0;
        }
    }
    return ok && at == size && (head.prompt_kind == 1 || head.prompt_kind == 2);
}

Test(worker_intake, sound_records_are_taken)
{
    for (uint32_t kind = CM_PROMPT_CHAT; kind <= CM_PROMPT_TEXT; kind++) {
        struct record r = record_make(kind);
        struct cm_scheduler_request request;
        struct cm_token_list list;
        cr_assert(record_sound(r.bytes, r.size));
        cr_assert(parse(r.bytes, r.size, &request, &list), "kind %u", kind);
        cr_assert_eq(request.max_tokens, 9u);
        cr_assert_eq(request.slot.stop_count, 2u);
        cr_assert_eq(memcmp(request.slot.stops[1], "\xe6\x9d\xb1", 3), 0);
        cr_assert_gt(list.count, 2u);
        /* The spelling of a control token in a user's text is text. */
        unsigned ends = 0;
        for (uint32_t i = 0; i < list.count; i++) {
            ends += list.ids[i] == 2;
        }
        cr_assert_eq(ends, kind == CM_PROMPT_CHAT ? 2u : 0u);
    }
}

static size_t mutate(struct record *r)
{
    for (int k = 0; k <= rand() % 3; k++) {
        switch (rand() % 4) {
        case 0:
            value_mutate(r->bytes + (size_t)rand() % (sizeof(struct cm_wire_generate) / 4) * 4, 4);
            break;
        case 1:
            value_mutate(r->bytes + r->lengths[(size_t)rand() % r->length_count], 4);
            break;
        case 2:
            r->bytes[(size_t)rand() % r->size] ^= (uint8_t)(1 << rand() % 8);
            break;
        default: {
            const float odd[] = {NAN, INFINITY, -INFINITY, -0.0f, 1e-40f, 2.0f};
            size_t field = offsetof(struct cm_wire_generate, sampling) + (size_t)(rand() % 7) * 4;
            memcpy(r->bytes + field, &odd[rand() % 6], 4);
        }
        }
    }
    return rand() % 8 == 0   ? (size_t)rand() % r->size
           : rand() % 8 == 0 ? r->size + (size_t)rand() % 16
                             : r->size;
}

Test(worker_intake, mutated_records_are_taken_only_where_they_are_sound)
{
    unsigned taken = 0;
    srand(31);
    for (int i = 0; i < MUTATIONS; i++) {
        struct record r = record_make(1 + (uint32_t)rand() % 2);
        struct cm_scheduler_request request;
        struct cm_token_list list;
        size_t size = mutate(&r);
        uint8_t *exact = malloc(size > 0 ? size : 1);
        memcpy(exact, r.bytes, size);
        bool took = parse(exact, size, &request, &list);
        cr_assert_eq(took, record_sound(exact, size), "record %d", i);
        for (uint32_t k = 0; took && k < list.count && k < CONTEXT; k++) {
            cr_assert_lt(list.ids[k], plan.manifest.vocabulary);
        }
        taken += took;
        free(exact);
    }
    printf("worker_intake: %d records, %u still sound\n", MUTATIONS, taken);
    cr_assert(taken > MUTATIONS / 50 && taken < MUTATIONS / 2, "%u", taken);
}
