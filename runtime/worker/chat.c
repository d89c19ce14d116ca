/* ChatML: <|im_start|>role\ntext<|im_end|>\n … <|im_start|>assistant\n.
 * Gemma: <start_of_turn>role\ntext<end_of_turn>\n … <start_of_turn>model\n; there is no turn of the
 * system: its text and an empty line stand before the first user's; white space around a text goes.
 * Llama 3: <|start_header_id|>role<|end_header_id|>\n\ntext<|eot_id|> …; white space goes too.
 * Llama 3.1: the same, and it always begins with a turn of the system, which opens with two dates.
 * Phi-3: <|role|>text<|end|> … <|assistant|>; its control tokens take the white space behind them,
 * and a system's message without text is none.
 * Control ids are put here and nowhere else; a user's "<|im_end|>" is plain text. */
#include "runtime/worker/chat.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FIXED_BYTES 96u /* of a turn: role or dates, newlines */
#define DATES       "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"

enum trim { TRIM_NOT, TRIM_BOTH, TRIM_FRONT };

/* By enum cm_manifest_chat. Control tokens: start of a turn (NULL: the role's name is one), end of
 * the role (NULL: none), end of the turn. A role that is NULL has no turn of its own. */
static const struct family {
    const char *name, *start, *role_end, *end;
    const char *roles[CM_CHAT_ASSISTANT + 1];
    const char *before, *after; /* of a text; of a turn */
    enum trim trim;
    bool system_needs_text;
    const char *dates; /* before the first text of the system, which is always there; NULL: none */
} families[] = {
    [CM_CHAT_CHATML] = {"ChatML",
                        "<|im_start|>",
                        NULL,
                        "<|im_end|>",
                        {NULL, "system", "user", "assistant"},
                        "\n",
                        "\n",
                        TRIM_NOT,
                        false,
                        NULL},
    [CM_CHAT_GEMMA] = {"Gemma",
                       "<start_of_turn>",
                       NULL,
                       "<end_of_turn>",
                       {NULL, NULL, "user", "model"},
                       "\n",
                       "\n",
                       TRIM_BOTH,
                       false,
                       NULL},
    [CM_CHAT_LLAMA3] = {"Llama 3",
                        "<|start_header_id|>",
                        "<|end_header_id|>",
                        "<|eot_id|>",
                        {NULL, "system", "user", "assistant"},
                        "\n\n",
                        "",
                        TRIM_BOTH,
                        false,
                        NULL},
    [CM_CHAT_LLAMA31] = {"Llama 3.1",
                         "<|start_header_id|>",
                         "<|end_header_id|>",
                         "<|eot_id|>",
                         {NULL, "system", "user", "assistant"},
                         "\n\n",
                         "",
                         TRIM_BOTH,
                         false,
                         DATES},
    [CM_CHAT_PHI3] = {"Phi-3",
                      NULL,
                      NULL,
                      "<|end|>",
                      {NULL, "<|system|>", "<|user|>", "<|assistant|>"},
                      "",
                      "",
                      TRIM_FRONT,
                      true,
                      NULL},
};

struct cm_chat {
    const struct cm_manifest *manifest;
    struct cm_tokenizer *tokenizer;
    uint32_t start, role_end, end;
    uint32_t roles[CM_CHAT_ASSISTANT + 1]; /* where they are tokens */
    uint8_t *turn; /* role \n text, together: merges may cross the newline */
    size_t turn_bytes_max;
};

/* The ids of the family's control tokens. NULL, or the one that the vocabulary lacks. */
static const char *controls_find(const struct family *family, struct cm_tokenizer *tokenizer,
                                 struct cm_chat *chat)
{
    struct {
        const char *text;
        uint32_t *id;
    } rows[3 + CM_CHAT_ASSISTANT] = {{family->start, &chat->start},
                                     {family->role_end, &chat->role_end},
                                     {family->end, &chat->end}};
    for (uint32_t role = CM_CHAT_SYSTEM; role <= CM_CHAT_ASSISTANT; role++) {
        rows[2 + role].text = family->start == NULL ? family->roles[role] : NULL;
        rows[2 + role].id = &chat->roles[role];
    }
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        int64_t id = rows[i].text != NULL ? cm_tokenizer_control(tokenizer, rows[i].text) : 0;
        if (id < 0) {
            return rows[i].text;
        }
        *rows[i].id = (uint32_t)id;
    }
    return NULL;
}

enum cm_status cm_chat_new(const struct cm_manifest *manifest, struct cm_tokenizer *tokenizer,
                           size_t turn_bytes_max, struct cm_chat **ret_chat, struct cm_error *err)
{
    struct cm_chat *chat = calloc(1, sizeof(*chat));
    const struct family *family = &families[manifest->chat];
    if (chat == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "chat");
    }
    const char *missing = controls_find(family, tokenizer, chat);
    if (missing != NULL) {
        free(chat);
        return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-CHAT",
                            "manifest: chat format %s, and no control token %s in the vocabulary",
                            family->name, missing);
    }
    turn_bytes_max = turn_bytes_max > manifest->default_system.size ? turn_bytes_max
                                                                    : manifest->default_system.size;
    /* Gemma's first turn holds the system's text and the user's. */
    chat->turn = malloc(2 * turn_bytes_max + FIXED_BYTES);
    if (chat->turn == NULL) {
        free(chat);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "chat");
    }
    chat->manifest = manifest;
    chat->tokenizer = tokenizer;
    chat->turn_bytes_max = turn_bytes_max;
    *ret_chat = chat;
    return CM_OK;
}

void cm_chat_free(struct cm_chat *chat)
{
    if (chat != NULL) {
        explicit_bzero(chat->turn, 2 * chat->turn_bytes_max + FIXED_BYTES);
        free(chat->turn);
        free(chat);
    }
}

/* Is this one character, of `size` bytes, white space? (Unicode's White_Space; templates' `trim`
 * takes the separators 1c … 1f too.) */
static bool white(const uint8_t *c, size_t size, enum trim trim)
{
    switch (size) {
    case 1:
        return c[0] == ' ' || (c[0] >= '\t' && c[0] <= '\r') ||
               (trim == TRIM_BOTH && c[0] >= 0x1c && c[0] <= 0x1f);
    case 2:
        return c[0] == 0xc2 && (c[1] == 0x85 || c[1] == 0xa0);
    default:
        return (c[0] == 0xe1 && c[1] == 0x9a && c[2] == 0x80) ||
               (c[0] == 0xe2 && c[1] == 0x80 &&
                (c[2] <= 0x8a || c[2] == 0xa8 || c[2] == 0xa9 || c[2] == 0xaf)) ||
               (c[0] == 0xe2 && c[1] == 0x81 && c[2] == 0x9f) ||
               (c[0] == 0xe3 && c[1] == 0x80 && c[2] == 0x80);
    }
}

/* Bytes of the white space that a valid text begins or ends with; 0: none. */
static size_t white_edge(const uint8_t *text, size_t bytes, bool end, enum trim trim)
{
    for (size_t size = 1; size <= 3 && size <= bytes; size++) {
        if (white(end ? text + bytes - size : text, size, trim)) {
            return size;
        }
    }
    return 0;
}

struct piece {
    const uint8_t *text;
    size_t bytes;
};

static struct piece trimmed(struct piece piece, enum trim trim)
{
    size_t size;
    while (trim != TRIM_NOT && (size = white_edge(piece.text, piece.bytes, false, trim)) > 0) {
        piece.text += size;
        piece.bytes -= size;
    }
    while (trim == TRIM_BOTH && (size = white_edge(piece.text, piece.bytes, true, trim)) > 0) {
        piece.bytes -= size;
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

static void text_add(struct cm_chat *chat, size_t bytes, struct cm_token_list *list)
{
    if (bytes > 0) {
        cm_tokenizer_text(chat->tokenizer, chat->turn, bytes, list);
    }
}

/* Start of the turn, role, what stands before the text (with an empty line), text. */
static void turn_add(struct cm_chat *chat, uint32_t role, struct piece before, struct piece text,
                     struct cm_token_list *list)
{
    const struct family *family = &families[chat->manifest->chat];
    const char *name = family->roles[role];
    size_t at = 0;
    cm_token_add(list, family->start != NULL ? chat->start : chat->roles[role]);
    if (family->start != NULL) {
        at = turn_put(chat, at, name, strlen(name));
    }
    if (family->role_end != NULL) {
        text_add(chat, at, list);
        cm_token_add(list, chat->role_end);
        at = 0;
    }
    at = turn_put(chat, at, family->before, strlen(family->before));
    if (before.bytes > 0) {
        at = turn_put(chat, at, before.text, before.bytes);
        at = turn_put(chat, at, "\n\n", 2);
    }
    text_add(chat, turn_put(chat, at, text.text, text.bytes), list);
}

static void turn_close(struct cm_chat *chat, struct cm_token_list *list)
{
    const char *after = families[chat->manifest->chat].after;
    cm_token_add(list, chat->end);
    text_add(chat, turn_put(chat, 0, after, strlen(after)), list);
}

/* A system's text that no user's follows: no text is lost. */
static void before_flush(struct cm_chat *chat, struct piece *before, struct cm_token_list *list)
{
    if (before->bytes > 0) {
        turn_add(chat, CM_CHAT_USER, (struct piece){NULL, 0}, *before, list);
        turn_close(chat, list);
        before->bytes = 0;
    }
}

/* The system's first turn: the request's, or the standing one if there is a text. */
static void system_add(struct cm_chat *chat, struct piece text, bool given,
                       struct cm_token_list *list)
{
    const struct family *family = &families[chat->manifest->chat];
    struct piece dates = {NULL, 0};
    if (family->dates != NULL) {
        dates = (struct piece){(const uint8_t *)family->dates, strlen(family->dates)};
    } else if (text.bytes == 0 && (!given || family->system_needs_text)) {
        return;
    }
    turn_add(chat, CM_CHAT_SYSTEM, dates, trimmed(text, family->trim), list);
    turn_close(chat, list);
}

bool cm_chat_render(struct cm_chat *chat, const struct cm_chat_part *parts, uint32_t count,
                    struct cm_token_list *list)
{
    const struct family *family = &families[chat->manifest->chat];
    const struct cm_manifest_text *standing = &chat->manifest->default_system;
    const struct piece nothing = {NULL, 0};
    struct piece before = {(const uint8_t *)standing->bytes, standing->size};
    uint32_t first = 0;
    if (family->name == NULL || count == 0) {
        return false;
    }
    if (parts[0].role == CM_CHAT_SYSTEM) {
        before = (struct piece){parts[0].text, parts[0].bytes};
        first = 1;
    }
    if (before.bytes > chat->turn_bytes_max) {
        return false;
    }
    if (family->roles[CM_CHAT_SYSTEM] != NULL) {
        system_add(chat, before, first == 1, list);
        before = nothing;
    }
    for (uint32_t i = first; i < count; i++) {
        struct piece text = {parts[i].text, parts[i].bytes};
        if (parts[i].role < CM_CHAT_SYSTEM || parts[i].role > CM_CHAT_ASSISTANT ||
            parts[i].bytes > chat->turn_bytes_max) {
            return false;
        }
        if (family->system_needs_text && parts[i].role == CM_CHAT_SYSTEM && text.bytes == 0) {
            continue;
        }
        if (family->roles[parts[i].role] == NULL) { /* stands before the next turn */
            before_flush(chat, &before, list);
            before = text;
            continue;
        }
        turn_add(chat, parts[i].role, before, trimmed(text, family->trim), list);
        turn_close(chat, list);
        before = nothing;
    }
    before_flush(chat, &before, list);
    turn_add(chat, CM_CHAT_ASSISTANT, nothing, nothing, list);
    return true;
}
