/* One GENERATE record. The gateway is the role that the network may have taken over. */
#include "runtime/worker/intake.h"

#include <math.h>

#include "runtime/base/cursor.h"

static bool sampling_valid(const struct cm_sampling *s)
{
    return s->temperature >= 0.0f && s->temperature <= 2.0f && s->top_p > 0.0f &&
           s->top_p <= 1.0f && s->min_p >= 0.0f && s->min_p <= 1.0f &&
           fabsf(s->frequency_penalty) <= 2.0f && fabsf(s->presence_penalty) <= 2.0f &&
           s->repetition_penalty > 0.0f && s->repetition_penalty <= 4.0f;
}

static bool stops_parse(struct cm_cursor *cursor, uint32_t count, struct cm_slot_params *slot)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t bytes = cm_cursor_u32(cursor);
        const uint8_t *text = cm_cursor_take(cursor, bytes);
        if (text == NULL || bytes == 0 || bytes > CM_STOP_BYTES_MAX ||
            !cm_text_valid(text, bytes)) {
            return false;
        }
        slot->stops[i] = text;
        slot->stop_bytes[i] = bytes;
    }
    slot->stop_count = count;
    return true;
}

static bool parts_parse(struct cm_cursor *cursor, uint32_t count, struct cm_chat_part *parts)
{
    for (uint32_t i = 0; i < count; i++) {
        parts[i].role = cm_cursor_u32(cursor);
        parts[i].bytes = cm_cursor_u32(cursor);
        parts[i].text = cm_cursor_take(cursor, parts[i].bytes);
        if (parts[i].text == NULL || !cm_text_valid(parts[i].text, parts[i].bytes)) {
            return false;
        }
    }
    return cm_cursor_left(cursor) == 0;
}

static bool head_valid(const struct cm_wire_generate *head)
{
    bool kind = head->prompt_kind == CM_PROMPT_CHAT ||
                (head->prompt_kind == CM_PROMPT_TEXT && head->part_count == 1);
    return kind && head->stop_count <= CM_STOPS_MAX && head->part_count > 0 &&
           head->part_count <= CM_MESSAGES_MAX && sampling_valid(&head->sampling);
}

static bool parts_classify(const struct cm_intake *intake, const struct cm_chat_part *parts,
                           uint32_t count, struct cm_prompt_verdicts *verdicts)
{
    verdicts->count = 0;
    verdicts->refused = false;
    for (uint32_t i = 0; i < count && intake->device != NULL; i++) {
        if (parts[i].role != CM_CHAT_SYSTEM) {
            cm_device_classify(intake->device, i, parts[i].text, parts[i].bytes, verdicts);
        }
    }
    return !verdicts->refused;
}

static bool tokenise(const struct cm_intake *intake, const struct cm_wire_generate *head,
                     const struct cm_chat_part *parts, struct cm_token_list *list)
{
    if (intake->manifest->add_begin) {
        cm_token_add(list, intake->manifest->begin_token);
    }
    if (head->prompt_kind == CM_PROMPT_CHAT) {
        return cm_chat_render(intake->chat, parts, head->part_count, list);
    }
    cm_tokenizer_text(intake->tokenizer, parts[0].text, parts[0].bytes, list);
    return parts[0].role == 0;
}

/* A text is gone on from as it stands: a key may begin in it and end in the reply. A chat's reply
 * is a message of its own. */
static void before_set(const struct cm_wire_generate *head, const struct cm_chat_part *part,
                       struct cm_slot_params *slot)
{
    if (head->prompt_kind == CM_PROMPT_TEXT) {
        size_t most = CM_SLOT_BEFORE_MAX;
        slot->before_bytes = (uint32_t)(part->bytes < most ? part->bytes : most);
        slot->before = part->text + part->bytes - slot->before_bytes;
    }
}

enum cm_refusal cm_intake_parse(const struct cm_intake *intake, const uint8_t *payload, size_t size,
                                struct cm_scheduler_request *ret_request,
                                struct cm_token_list *list, struct cm_prompt_verdicts *ret_verdicts)
{
    struct cm_wire_generate head;
    struct cm_chat_part parts[CM_MESSAGES_MAX];
    struct cm_scheduler_request request = {.id = ret_request->id};
    struct cm_cursor cursor = cm_cursor_init(payload, size);
    cm_cursor_copy(&cursor, &head, sizeof(head));
    ret_verdicts->count = 0;
    if (!cm_cursor_ok(&cursor) || !head_valid(&head) ||
        !stops_parse(&cursor, head.stop_count, &request.slot) ||
        !parts_parse(&cursor, head.part_count, parts)) {
        return CM_REFUSAL_INPUT;
    }
    if (!parts_classify(intake, parts, head.part_count, ret_verdicts)) {
        return CM_REFUSAL_FILTER;
    }
    request.tenant = head.tenant;
    request.adapter = head.adapter;
    request.max_tokens = head.max_tokens;
    request.slot.sampling = head.sampling;
    request.slot.min_tokens = head.min_tokens;
    request.slot.ignore_eos = head.ignore_eos != 0;
    before_set(&head, &parts[0], &request.slot);
    if (!tokenise(intake, &head, parts, list)) {
        return CM_REFUSAL_INPUT;
    }
    *ret_request = request;
    return CM_REFUSAL_NONE;
}
