/* ChatML: <|im_start|>role\ntext<|im_end|>\n … <|im_start|>assistant\n. Control ids are put here
 * and nowhere else; a user's "<|im_end|>" is plain text. */
#include "runtime/worker/chat.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ROLE_BYTES 16u

struct cm_chat {
    const struct cm_manifest *manifest;
    struct cm_tokenizer *tokenizer;
    uint32_t start, end;
    uint8_t *turn; /* role \n text, together: merges may cross the newline */
    size_t turn_bytes_max;
};

enum cm_status cm_chat_new(const struct cm_manifest *manifest, struct cm_tokenizer *tokenizer,
                           size_t turn_bytes_max, struct cm_chat **ret_chat, struct cm_error *err)
{
    struct cm_chat *chat = calloc(1, sizeof(*chat));
    int64_t start = 0, end = 0;
    if (manifest->chat == CM_CHAT_CHATML) {
        start = cm_tokenizer_control(tokenizer, "<|im_start|>");
        end = cm_tokenizer_control(tokenizer, "<|im_end|>");
    }
    if (start < 0 || end < 0) {
        free(chat);
        return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-CHAT",
                            "manifest: chat format ChatML without <|im_start|> and <|im_end|>");
    }
    turn_bytes_max = turn_bytes_max > manifest->default_system.size ? turn_bytes_max
                                                                    : manifest->default_system.size;
    uint8_t *turn = chat != NULL ? malloc(turn_bytes_max + ROLE_BYTES) : NULL;
    if (turn == NULL) {
        free(chat);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "chat");
    }
    *chat =
        (struct cm_chat){manifest, tokenizer, (uint32_t)start, (uint32_t)end, turn, turn_bytes_max};
    *ret_chat = chat;
    return CM_OK;
}

void cm_chat_free(struct cm_chat *chat)
{
    if (chat != NULL) {
        explicit_bzero(chat->turn, chat->turn_bytes_max + ROLE_BYTES);
        free(chat->turn);
        free(chat);
    }
}

static void turn_add(struct cm_chat *chat, const char *role, const uint8_t *text, size_t bytes,
                     struct cm_token_list *list)
{
    size_t role_bytes = strlen(role);
    memcpy(chat->turn, role, role_bytes);
    chat->turn[role_bytes] = '\n';
    if (bytes > 0) {
        memcpy(chat->turn + role_bytes + 1, text, bytes);
    }
    cm_token_add(list, chat->start);
    cm_tokenizer_text(chat->tokenizer, chat->turn, role_bytes + 1 + bytes, list);
}

static void turn_close(struct cm_chat *chat, struct cm_token_list *list)
{
    cm_token_add(list, chat->end);
    cm_tokenizer_text(chat->tokenizer, (const uint8_t *)"\n", 1, list);
}

bool cm_chat_render(struct cm_chat *chat, const struct cm_chat_part *parts, uint32_t count,
                    struct cm_token_list *list)
{
    static const char *const roles[] = {
        [CM_CHAT_SYSTEM] = "system", [CM_CHAT_USER] = "user", [CM_CHAT_ASSISTANT] = "assistant"};
    const struct cm_manifest_text *system = &chat->manifest->default_system;
    if (chat->manifest->chat != CM_CHAT_CHATML || count == 0) {
        return false;
    }
    if (parts[0].role != CM_CHAT_SYSTEM && system->size > 0) {
        turn_add(chat, "system", (const uint8_t *)system->bytes, system->size, list);
        turn_close(chat, list);
    }
    for (uint32_t i = 0; i < count; i++) {
        if (parts[i].role < CM_CHAT_SYSTEM || parts[i].role > CM_CHAT_ASSISTANT ||
            parts[i].bytes > chat->turn_bytes_max) {
            return false;
        }
        turn_add(chat, roles[parts[i].role], parts[i].text, parts[i].bytes, list);
        turn_close(chat, list);
    }
    turn_add(chat, "assistant", NULL, 0, list);
    return true;
}
