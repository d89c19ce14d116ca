/* What the guard found in a request, kept for its client, for the log and for /metrics. Rule ids,
 * categories and places; never text. */
#ifndef CASEMATE_RUNTIME_GATEWAY_MODERATION_H
#define CASEMATE_RUNTIME_GATEWAY_MODERATION_H

#include <event2/buffer.h>
#include <stdbool.h>
#include <stdint.h>

#include "runtime/base/wire.h"

#define CM_MODERATION_VERDICTS 16 /* kept of one request; all are counted */
#define CM_MODERATION_MODEL    "casemate-guard"

struct cm_moderation {
    uint64_t total;
    uint32_t count;
    struct cm_wire_verdict verdicts[CM_MODERATION_VERDICTS];
};

/* Are the texts terminated and of their alphabet, the numbers in range? */
bool cm_verdict_sound(const struct cm_wire_verdict *verdict);
const char *cm_verdict_action_name(uint32_t action);
const char *cm_verdict_stage_name(uint32_t stage);

void cm_moderation_add(struct cm_moderation *moderation, const struct cm_wire_verdict *verdict);
/* The one that refuses at this stage, or NULL. */
const struct cm_wire_verdict *cm_moderation_refusing(const struct cm_moderation *moderation,
                                                     enum cm_verdict_stage stage);
/* {"input":{…},"output":{…}}: the `moderation` object of the OpenAI API's replies. Each result has
 * one extension, `verdicts`: rule, action, message, offset and bytes of each span. */
void cm_moderation_write(const struct cm_moderation *moderation, struct evbuffer *out);

#endif
