/* ChatML: <|im_start|>role\ntext<|im_end|>\n … <|im_start|>assistant\n.
 * Gemma: <start_of_turn>role\ntext<end_of_turn>\n … <start_of_turn>model\n; there is no turn of the
 * system: its text and an empty line stand before the first user's; white space around a text goes.
 * Control ids are put here and nowhere else; a user's "<|im_end|>" is plain text. */
#include "runtime/worker/chat.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ROLE_BYTES 16u

/* By enum cm_manifest_chat. */
static const struct family {
    const char *name, *start, *end;
    const char *system, *user, *assistant; /* system NULL: no turn of its own */
    bool trim;
} families[] = {
    [CM_CHAT_CHATML] = {"ChatML", "<|im_start|>", "<|im_end|>", "system", "user", "assistant",
                        false},
    [CM_CHAT_GEMMA] = {"Gemma", "<start_of_turn>", "<end_of_turn>", NULL, "user", "model", true},
};

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
    const struct family *family = &families[manifest->chat];
    int64_t start = 0, end = 0;
    if (family->name != NULL) {
        start = cm_tokenizer_control(tokenizer, family->start);
        end = cm_tokenizer_control(tokenizer, family->end);
    }
    if (start < 0 || end < 0) {
        free(chat);
        return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-CHAT",
                            "manifest: chat format %s without %s and %s", family->name,
                            family->start, family->end);
    }
    turn_bytes_max = turn_bytes_max > manifest->default_system.size ? turn_bytes_max
                                                                    : manifest->default_system.size;
    /* Gemma's first turn holds the system's text and the user's. */
    uint8_t *turn = chat != NULL ? malloc(2 * turn_bytes_max + ROLE_BYTES) : NULL;
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
        explicit_bzero(chat->turn, 2 * chat->turn_bytes_max + ROLE_BYTES);
        free(chat->turn);
        free(chat);
    }
}

static bool white(uint8_t byte)
{
    return byte == ' ' || (byte >= '\t' && byte <= '\r');
}

struct piece {
    const uint8_t *text;
    size_t bytes;
};

static struct piece trimmed(struct piece piece)
{
    while (piece.bytes > 0 && white(piece.text[0])) {
        piece.text++;
        piece.bytes--;
    }
    while (piece.bytes > 0 && white(piece.text[piece.bytes - 1])) {
        piece.bytes--;
    }
    return piece;
}

static size_t turn_put(struct cm_chat *chat, size_t at, const void *text, size_t bytes)
{
    if (bytes > 0) {
        memcpy(chat->turn + at, text, bytes);
    }
    return at + bytes;
}

/* Start token, role, newline, what stands before the text (with an empty line), text. */
static void turn_add(struct cm_chat *chat, const char *role, struct piece before, struct piece text,
                     struct cm_token_list *list)
{
    size_t at = turn_put(chat, 0, role, strlen(role));
    at = turn_put(chat, at, "\n", 1);
    if (before.bytes > 0) {
        at = turn_put(chat, at, before.text, before.bytes);
        at = turn_put(chat, at, "\n\n", 2);
    }
    at = turn_put(chat, at, text.text, text.bytes);
    cm_token_add(list, chat->start);
    cm_tokenizer_text(chat->tokenizer, chat->turn, at, list);
}

static void turn_close(struct cm_chat *chat, struct cm_token_list *list)
{
    cm_token_add(list, chat->end);
    cm_tokenizer_text(chat->tokenizer, (const uint8_t *)"\n", 1, list);
}

/* A system's text that no user's follows: no text is lost. */
static void before_flush(struct cm_chat *chat, struct piece *before, struct cm_token_list *list)
{
    if (before->bytes > 0) {
        turn_add(chat, families[chat->manifest->chat].user, (struct piece){NULL, 0}, *before, list);
        turn_close(chat, list);
        before->bytes = 0;
    }
}

bool cm_chat_render(struct cm_chat *chat, const struct cm_chat_part *parts, uint32_t count,
                    struct cm_token_list *list)
{
    const struct family *family = &families[chat->manifest->chat];
    const char *const roles[] = {[CM_CHAT_SYSTEM] = family->system,
                                 [CM_CHAT_USER] = family->user,
                                 [CM_CHAT_ASSISTANT] = family->assistant};
    const struct cm_manifest_text *standing = &chat->manifest->default_system;
    const struct piece nothing = {NULL, 0};
    struct piece before = {(const uint8_t *)standing->bytes, standing->size};
    if (family->name == NULL || count == 0) {
        return false;
    }
    before = parts[0].role == CM_CHAT_SYSTEM ? nothing : before;
    if (family->system != NULL && before.bytes > 0) {
        turn_add(chat, family->system, nothing, before, list);
        turn_close(chat, list);
        before = nothing;
    }
    for (uint32_t i = 0; i < count; i++) {
        struct piece text = {parts[i].text, parts[i].bytes};
        if (parts[i].role < CM_CHAT_SYSTEM || parts[i].role > CM_CHAT_ASSISTANT ||
            parts[i].bytes > chat->turn_bytes_max) {
            return false;
        }
        if (roles[parts[i].role] == NULL) { /* stands before the next turn */
            before_flush(chat, &before, list);
            before = text;
            continue;
        }
        turn_add(chat, roles[parts[i].role], before, family->trim ? trimmed(text) : text, list);
        turn_close(chat, list);
        before = nothing;
    }
    before_flush(chat, &before, list);
    turn_add(chat, family->assistant, nothing, nothing, list);
    return true;
}
