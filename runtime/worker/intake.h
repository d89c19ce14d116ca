/* Requests off the ring: hostile bytes to a prompt's token ids and slot parameters. */
#ifndef CASEMATE_RUNTIME_WORKER_INTAKE_H
#define CASEMATE_RUNTIME_WORKER_INTAKE_H

#include "runtime/worker/chat.h"
#include "runtime/worker/scheduler.h"

struct cm_intake {
    struct cm_device *device; /* classifies; NULL in tests without one */
    struct cm_chat *chat;
    struct cm_tokenizer *tokenizer;
    const struct cm_manifest *manifest;
};

/* Parse a GENERATE payload, classify its messages but those of the system, whose text is the
 * operator's, and tokenise its prompt into `list` (capacity: the context). Stops point into the
 * payload. NONE, or why it is refused: INPUT, malformed, nothing is to be trusted; FILTER, by the
 * guard, for *ret_verdicts; then nothing was tokenised. Verdicts that only report are there too. */
enum cm_refusal cm_intake_parse(const struct cm_intake *intake, const uint8_t *payload, size_t size,
                                struct cm_scheduler_request *ret_request,
                                struct cm_token_list *list,
                                struct cm_prompt_verdicts *ret_verdicts);

#endif
