/* Requests off the ring: hostile bytes to a prompt's token ids and slot parameters. */
#ifndef CASEMATE_RUNTIME_WORKER_INTAKE_H
#define CASEMATE_RUNTIME_WORKER_INTAKE_H

#include "runtime/worker/chat.h"
#include "runtime/worker/scheduler.h"

/* Parse a GENERATE payload and tokenise its prompt into `list` (capacity: the context). Stops point
 * into the payload. False: malformed; nothing is to be trusted. */
bool cm_intake_parse(const uint8_t *payload, size_t size, struct cm_chat *chat,
                     struct cm_tokenizer *tokenizer, const struct cm_manifest *manifest,
                     struct cm_scheduler_request *ret_request, struct cm_token_list *list);

#endif
