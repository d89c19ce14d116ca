/* Verdicts in the `moderation` shape. */
#include "runtime/gateway/moderation.h"

#include <inttypes.h>
#include <string.h>

#include "runtime/gateway/text.h"

/* Terminated, not empty, [a-z0-9-/]: so they may stand in JSON, logs and labels as they are. */
static bool name_sound(const char *name, size_t size)
{
    size_t used = strnlen(name, size);
    return used > 0 && used < size &&
           strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-/") == used;
}

bool cm_verdict_sound(const struct cm_wire_verdict *verdict)
{
    return name_sound(verdict->rule, sizeof(verdict->rule)) &&
           name_sound(verdict->category, sizeof(verdict->category)) &&
           verdict->action >= CM_VERDICT_REPORT && verdict->action <= CM_VERDICT_REFUSE &&
           verdict->stage >= CM_VERDICT_INPUT && verdict->stage <= CM_VERDICT_OUTPUT &&
           verdict->part < CM_MESSAGES_MAX;
}

const char *cm_verdict_action_name(uint32_t action)
{
    static const char *const names[] = {"", "report", "redact", "refuse"};
    return names[action];
}

const char *cm_verdict_stage_name(uint32_t stage)
{
    static const char *const names[] = {"", "input", "output"};
    return names[stage];
}

/* When there is no more room, the last one gives way, unless it refuses: the reason is kept. */
void cm_moderation_add(struct cm_moderation *moderation, const struct cm_wire_verdict *verdict)
{
    struct cm_wire_verdict *last = &moderation->verdicts[CM_MODERATION_VERDICTS - 1];
    moderation->total++;
    if (moderation->count < CM_MODERATION_VERDICTS) {
        moderation->verdicts[moderation->count++] = *verdict;
    } else if (last->action != CM_VERDICT_REFUSE) {
        *last = *verdict;
    }
}

const struct cm_wire_verdict *cm_moderation_refusing(const struct cm_moderation *moderation,
                                                     enum cm_verdict_stage stage)
{
    for (uint32_t i = moderation->count; i > 0; i--) {
        const struct cm_wire_verdict *verdict = &moderation->verdicts[i - 1];
        if (verdict->stage == stage && verdict->action == CM_VERDICT_REFUSE) {
            return verdict;
        }
    }
    return NULL;
}

/* The categories of a stage, each once: "name":value. */
static void categories_write(const struct cm_moderation *moderation, enum cm_verdict_stage stage,
                             const char *value, struct evbuffer *out)
{
    const struct cm_wire_verdict *verdicts = moderation->verdicts;
    bool any = false;
    cm_text_put(out, "{");
    for (uint32_t i = 0; i < moderation->count; i++) {
        bool wanted = verdicts[i].stage == stage;
        for (uint32_t k = 0; k < i && wanted; k++) {
            wanted = verdicts[k].stage != stage ||
                     strcmp(verdicts[k].category, verdicts[i].category) != 0;
        }
        if (wanted) {
            cm_text_format(out, "%s\"%s\":%s", any ? "," : "", verdicts[i].category, value);
            any = true;
        }
    }
    cm_text_put(out, "}");
}

static void verdicts_write(const struct cm_moderation *moderation, enum cm_verdict_stage stage,
                           struct evbuffer *out)
{
    bool any = false;
    cm_text_put(out, "[");
    for (uint32_t i = 0; i < moderation->count; i++) {
        const struct cm_wire_verdict *verdict = &moderation->verdicts[i];
        if (verdict->stage == stage) {
            cm_text_format(out,
                           "%s{\"rule\":\"%s\",\"action\":\"%s\",\"message\":%u,\"offset\":%" PRIu64
                           ",\"bytes\":%" PRIu64 "}",
                           any ? "," : "", verdict->rule, cm_verdict_action_name(verdict->action),
                           verdict->part, verdict->offset, verdict->bytes);
            any = true;
        }
    }
    cm_text_put(out, "]");
}

static void stage_write(const struct cm_moderation *moderation, enum cm_verdict_stage stage,
                        struct evbuffer *out)
{
    bool flagged = false;
    for (uint32_t i = 0; i < moderation->count; i++) {
        flagged = flagged || moderation->verdicts[i].stage == stage;
    }
    cm_text_format(out,
                   "{\"type\":\"moderation_results\",\"model\":\"%s\",\"results\":[{"
                   "\"type\":\"moderation_result\",\"model\":\"%s\",\"flagged\":%s,"
                   "\"categories\":",
                   CM_MODERATION_MODEL, CM_MODERATION_MODEL, flagged ? "true" : "false");
    categories_write(moderation, stage, "true", out);
    cm_text_put(out, ",\"category_applied_input_types\":");
    categories_write(moderation, stage, "[\"text\"]", out);
    cm_text_put(out, ",\"category_scores\":");
    categories_write(moderation, stage, "1.0", out);
    cm_text_put(out, ",\"verdicts\":");
    verdicts_write(moderation, stage, out);
    cm_text_put(out, "}]}");
}

void cm_moderation_write(const struct cm_moderation *moderation, struct evbuffer *out)
{
    cm_text_put(out, "{\"input\":");
    stage_write(moderation, CM_VERDICT_INPUT, out);
    cm_text_put(out, ",\"output\":");
    stage_write(moderation, CM_VERDICT_OUTPUT, out);
    cm_text_put(out, "}");
}
