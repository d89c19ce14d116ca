/* Chats to token ids: structured families, no template language. */
#ifndef CASEMATE_RUNTIME_WORKER_CHAT_H
#define CASEMATE_RUNTIME_WORKER_CHAT_H

#include "runtime/base/wire.h"
#include "runtime/worker/tokenizer.h"

struct cm_chat_part {
    uint32_t role; /* enum cm_chat_role */
    const uint8_t *text;
    size_t bytes;
};

struct cm_chat; /* the family, its control ids, and scratch for one turn */

/* Bytes of the longest text that a chat whose messages have up to message_bytes_max gives to the
 * tokenizer at once. */
size_t cm_chat_text_bytes(const struct cm_manifest *manifest, size_t message_bytes_max);

/* turn_bytes_max: the longest message. Fails: PACKAGE if a control token of the family is missing.
 */
CM_MUST_USE enum cm_status cm_chat_new(const struct cm_manifest *manifest,
                                       struct cm_tokenizer *tokenizer, size_t turn_bytes_max,
                                       struct cm_chat **ret_chat, struct cm_error *err);
void cm_chat_free(struct cm_chat *chat); /* NULL is fine; wipes the scratch */

/* Append a whole conversation and the opening of the assistant's turn. False: this model has no
 * chat format, or a role is unknown. */
bool cm_chat_render(struct cm_chat *chat, const struct cm_chat_part *parts, uint32_t count,
                    struct cm_token_list *list);

#endif
