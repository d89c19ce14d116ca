/* A chat is turns. ChatML: <|im_start|>role\ntext<|im_end|>\n … <|im_start|>assistant\n.
 * Gemma: <start_of_turn>role\ntext<end_of_turn>\n … <start_of_turn>model\n; there is no turn of the
 * system: its text and an empty line stand before the first user's; white space around a text goes.
 * Llama 3: <|start_header_id|>role<|end_header_id|>\n\ntext<|eot_id|> …; white space goes too.
 * Llama 3.1: the same, and it always begins with a turn of the system, which opens with two dates.
 * Phi-3: <|role|>text<|end|> … <|assistant|>; its control tokens take the white space behind them,
 * and a system's message without text is none.
 * Mistral from v3 on: [INST] text[/INST] answer</s>[INST] …; the system's text and an empty line
 * stand before the *last* user's. Tekken's has no spaces, and the others' are no more than written.
 * Qwen 3: ChatML, whose answers begin with thoughts: <think>\n…\n</think>\n\n. Those of answers
 * before the last question go; where the model shall not think, its turn opens with empty ones.
 * Control ids are put here and nowhere else; a user's "<|im_end|>" is plain text. */
#include "runtime/worker/chat.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FIXED_BYTES 96u /* of a turn: role or dates, thoughts' borders, newlines */
#define DATES       "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"
#define THINK       "<think>"
#define THINK_END   "</think>"

enum trim { TRIM_NOT, TRIM_BOTH, TRIM_FRONT };

/* A role's turn: control tokens that open and close it (NULL: none), the role's name. name NULL:
 * the role has no turn of its own. */
struct turn {
    const char *open, *name, *close;
    enum trim trim; /* white space of its text that goes */
};

static const struct turn chatml[] = {
    [CM_CHAT_SYSTEM] = {"<|im_start|>", "system", "<|im_end|>", TRIM_NOT},
    [CM_CHAT_USER] = {"<|im_start|>", "user", "<|im_end|>", TRIM_NOT},
    [CM_CHAT_ASSISTANT] = {"<|im_start|>", "assistant", "<|im_end|>", TRIM_NOT},
};
static const struct turn gemma[] = {
    [CM_CHAT_USER] = {"<start_of_turn>", "user", "<end_of_turn>", TRIM_BOTH},
    [CM_CHAT_ASSISTANT] = {"<start_of_turn>", "model", "<end_of_turn>", TRIM_BOTH},
};
static const struct turn llama3[] = {
    [CM_CHAT_SYSTEM] = {"<|start_header_id|>", "system", "<|eot_id|>", TRIM_BOTH},
    [CM_CHAT_USER] = {"<|start_header_id|>", "user", "<|eot_id|>", TRIM_BOTH},
    [CM_CHAT_ASSISTANT] = {"<|start_header_id|>", "assistant", "<|eot_id|>", TRIM_BOTH},
};
static const struct turn phi3[] = {
    [CM_CHAT_SYSTEM] = {"<|system|>", "", "<|end|>", TRIM_FRONT},
    [CM_CHAT_USER] = {"<|user|>", "", "<|end|>", TRIM_FRONT},
    [CM_CHAT_ASSISTANT] = {"<|assistant|>", "", "<|end|>", TRIM_FRONT},
};
static const struct turn mistral[] = {
    [CM_CHAT_USER] = {"[INST]", "", "[/INST]", TRIM_NOT},
    [CM_CHAT_ASSISTANT] = {NULL, "", "</s>", TRIM_BOTH},
};
static const struct turn tekken[] = {
    [CM_CHAT_USER] = {"[INST]", "", "[/INST]", TRIM_NOT},
    [CM_CHAT_ASSISTANT] = {NULL, "", "</s>", TRIM_NOT},
};

/* By enum cm_manifest_chat. */
static const struct family {
    const char *name;
    const struct turn *roles;   /* by role */
    const char *role_end;       /* control token behind the role's name; NULL: none */
    const char *before, *after; /* of a text; of a turn */
    const char *dates; /* before the first text of the system, which is always there; NULL: none */
    const char *thoughts;   /* what opens the model's turn before its answer; NULL: it has none */
    bool system_needs_text; /* a message of the system without one is none */
    bool system_last;       /* it stands before the last user's, not before the first */
    bool as_written;        /* no spaces but these, whatever the tokenizer puts before a text */
} families[] = {
    [CM_CHAT_CHATML] = {.name = "ChatML", .roles = chatml, .before = "\n", .after = "\n"},
    [CM_CHAT_GEMMA] = {.name = "Gemma", .roles = gemma, .before = "\n", .after = "\n"},
    [CM_CHAT_LLAMA3] = {.name = "Llama 3",
                        .roles = llama3,
                        .role_end = "<|end_header_id|>",
                        .before = "\n\n",
                        .after = ""},
    [CM_CHAT_LLAMA31] = {.name = "Llama 3.1",
                         .roles = llama3,
                         .role_end = "<|end_header_id|>",
                         .before = "\n\n",
                         .after = "",
                         .dates = DATES},
    [CM_CHAT_PHI3] =
        {.name = "Phi-3", .roles = phi3, .before = "", .after = "", .system_needs_text = true},
    [CM_CHAT_MISTRAL] = {.name = "Mistral v3",
                         .roles = mistral,
                         .before = " ",
                         .after = "",
                         .system_last = true,
                         .as_written = true},
    [CM_CHAT_TEKKEN] = {.name = "Mistral v3 (Tekken)",
                        .roles = tekken,
                        .before = "",
                        .after = "",
                        .system_last = true,
                        .as_written = true},
    [CM_CHAT_QWEN3] =
        {.name = "Qwen 3", .roles = chatml, .before = "\n", .after = "\n", .thoughts = ""},
    [CM_CHAT_QWEN3_DIRECT] = {.name = "Qwen 3 without thoughts",
                              .roles = chatml,
                              .before = "\n",
                              .after = "\n",
                              .thoughts = THINK "\n\n" THINK_END "\n\n"},
};

struct cm_chat {
    const struct cm_manifest *manifest;
    struct cm_tokenizer *tokenizer;
    uint32_t open[CM_CHAT_ASSISTANT + 1], close[CM_CHAT_ASSISTANT + 1], role_end;
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
    } rows[1 + 2 * CM_CHAT_ASSISTANT] = {{family->role_end, &chat->role_end}};
    size_t count = 1;
    for (uint32_t role = CM_CHAT_SYSTEM; family->roles != NULL && role <= CM_CHAT_ASSISTANT;
         role++) {
        rows[count].text = family->roles[role].open;
        rows[count++].id = &chat->open[role];
        rows[count].text = family->roles[role].close;
        rows[count++].id = &chat->close[role];
    }
    for (size_t i = 0; i < count; i++) {
        int64_t id = rows[i].text != NULL ? cm_tokenizer_control(tokenizer, rows[i].text) : 0;
        if (id < 0) {
            return rows[i].text;
        }
        *rows[i].id = (uint32_t)id;
    }
    return NULL;
}

/* Gemma's first turn holds the system's text and the user's. */
static size_t turn_room(size_t turn_bytes_max)
{
    return 2 * turn_bytes_max + FIXED_BYTES;
}

static size_t message_room(const struct cm_manifest *manifest, size_t message_bytes_max)
{
    const size_t standing = manifest->default_system.size;
    return message_bytes_max > standing ? message_bytes_max : standing;
}

size_t cm_chat_text_bytes(const struct cm_manifest *manifest, size_t message_bytes_max)
{
    return turn_room(message_room(manifest, message_bytes_max));
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
    turn_bytes_max = message_room(manifest, turn_bytes_max);
    chat->turn = malloc(turn_room(turn_bytes_max));
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
        explicit_bzero(chat->turn, turn_room(chat->turn_bytes_max));
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

static struct piece piece_of(const char *text)
{
    return (struct piece){(const uint8_t *)text, strlen(text)};
}

/* One conversation on its way to ids. */
struct rendering {
    struct cm_chat *chat;
    const struct family *family;
    const struct cm_chat_part *parts;
    uint32_t count;
    struct piece before; /* a system's text that waits for a user's turn */
    struct cm_token_list *list;
};

static size_t turn_put(struct cm_chat *chat, size_t at, struct piece piece)
{
    if (piece.bytes > 0) {
        memcpy(chat->turn + at, piece.text, piece.bytes);
    }
    return at + piece.bytes;
}

static void text_add(struct rendering *r, size_t bytes)
{
    if (bytes > 0 && r->family->as_written) {
        cm_tokenizer_text_within(r->chat->tokenizer, r->chat->turn, bytes, r->list);
    } else if (bytes > 0) {
        cm_tokenizer_text(r->chat->tokenizer, r->chat->turn, bytes, r->list);
    }
}

/* Start of the turn, role, what stands before the text, the pieces of the text. */
static void turn_add(struct rendering *r, uint32_t role, const struct piece *pieces, size_t count)
{
    const struct turn *turn = &r->family->roles[role];
    if (turn->open != NULL) {
        cm_token_add(r->list, r->chat->open[role]);
    }
    size_t at = turn_put(r->chat, 0, piece_of(turn->name));
    if (r->family->role_end != NULL) {
        text_add(r, at);
        cm_token_add(r->list, r->chat->role_end);
        at = 0;
    }
    at = turn_put(r->chat, at, piece_of(r->family->before));
    for (size_t i = 0; i < count; i++) {
        at = turn_put(r->chat, at, pieces[i]);
    }
    text_add(r, at);
}

static void turn_close(struct rendering *r, uint32_t role)
{
    cm_token_add(r->list, r->chat->close[role]);
    text_add(r, turn_put(r->chat, 0, piece_of(r->family->after)));
}

/* A text, behind another one and an empty line if there is another. */
static void pair_add(struct rendering *r, uint32_t role, struct piece before, struct piece text)
{
    const struct piece pieces[] = {before, piece_of(before.bytes > 0 ? "\n\n" : ""), text};
    turn_add(r, role, pieces, 3);
    turn_close(r, role);
}

/* A system's text that no user's follows: no text is lost. */
static void before_flush(struct rendering *r)
{
    if (r->before.bytes > 0) {
        pair_add(r, CM_CHAT_USER, (struct piece){NULL, 0}, r->before);
        r->before.bytes = 0;
    }
}

/* The system's first turn: the request's, or the standing one if there is a text. */
static void system_add(struct rendering *r, bool given)
{
    const struct family *family = r->family;
    struct piece text = r->before;
    r->before.bytes = 0;
    if (family->dates == NULL && text.bytes == 0 && (!given || family->system_needs_text)) {
        return;
    }
    pair_add(r, CM_CHAT_SYSTEM, piece_of(family->dates != NULL ? family->dates : ""),
             trimmed(text, family->roles[CM_CHAT_SYSTEM].trim));
}

/* ------------------------------------------------------------------ Qwen 3's thoughts */

static struct piece lines_stripped(struct piece piece, bool front, bool end)
{
    while (front && piece.bytes > 0 && piece.text[0] == '\n') {
        piece.text++;
        piece.bytes--;
    }
    while (end && piece.bytes > 0 && piece.text[piece.bytes - 1] == '\n') {
        piece.bytes--;
    }
    return piece;
}

/* What stands behind the last `mark` of a text; the whole text where it has none. */
static struct piece behind(struct piece piece, const char *mark)
{
    const uint8_t *end = piece.text + piece.bytes, *found;
    while (piece.bytes > 0 &&
           (found = memmem(piece.text, piece.bytes, mark, strlen(mark))) != NULL) {
        piece.text = found + strlen(mark);
        piece.bytes = (size_t)(end - piece.text);
    }
    return piece;
}

/* The last message of a user that is no answer of a tool; where there is none, the last message. */
static uint32_t question_find(const struct rendering *r)
{
    static const char open[] = "<tool_response>", close[] = "</tool_response>";
    const size_t open_bytes = sizeof(open) - 1, close_bytes = sizeof(close) - 1;
    for (uint32_t i = r->count; i > 0; i--) {
        const struct cm_chat_part *part = &r->parts[i - 1];
        bool tool = part->bytes >= close_bytes && memcmp(part->text, open, open_bytes) == 0 &&
                    memcmp(part->text + part->bytes - close_bytes, close, close_bytes) == 0;
        if (part->role == CM_CHAT_USER && !tool) {
            return i - 1;
        }
    }
    return r->count - 1;
}

/* An answer of the model: thoughts are kept behind the last question alone. */
static void answer_add(struct rendering *r, uint32_t index)
{
    const struct piece whole = {r->parts[index].text, r->parts[index].bytes};
    struct piece thought = {whole.text, 0}, answer = whole;
    const uint8_t *end =
        whole.bytes > 0 ? memmem(whole.text, whole.bytes, THINK_END, strlen(THINK_END)) : NULL;
    if (end != NULL) {
        thought.bytes = (size_t)(end - whole.text);
        thought = behind(lines_stripped(thought, false, true), THINK);
        thought = lines_stripped(thought, true, false);
        answer = lines_stripped(behind(whole, THINK_END), true, false);
    }
    bool kept = index > question_find(r) && (index + 1 == r->count || thought.bytes > 0);
    const struct piece pieces[] = {piece_of(THINK "\n"), thought, piece_of("\n" THINK_END "\n\n"),
                                   lines_stripped(answer, kept, false)};
    turn_add(r, CM_CHAT_ASSISTANT, kept ? pieces : pieces + 3, kept ? 4 : 1);
    turn_close(r, CM_CHAT_ASSISTANT);
}

/* ------------------------------------------------------------------ conversations */

static void message_add(struct rendering *r, uint32_t index)
{
    const struct family *family = r->family;
    const uint32_t role = r->parts[index].role;
    const struct piece text = {r->parts[index].text, r->parts[index].bytes};
    if (family->system_needs_text && role == CM_CHAT_SYSTEM && text.bytes == 0) {
        return;
    }
    if (family->roles[role].name == NULL) { /* stands before a turn to come */
        before_flush(r);
        r->before = text;
        return;
    }
    if (family->thoughts != NULL && role == CM_CHAT_ASSISTANT) {
        answer_add(r, index);
        return;
    }
    bool waits = family->system_last && (role != CM_CHAT_USER || index + 1 < r->count);
    pair_add(r, role, waits ? (struct piece){NULL, 0} : r->before,
             trimmed(text, family->roles[role].trim));
    r->before.bytes = waits ? r->before.bytes : 0;
}

bool cm_chat_render(struct cm_chat *chat, const struct cm_chat_part *parts, uint32_t count,
                    struct cm_token_list *list)
{
    const struct cm_manifest_text *standing = &chat->manifest->default_system;
    struct rendering r = {chat,
                          &families[chat->manifest->chat],
                          parts,
                          count,
                          {(const uint8_t *)standing->bytes, standing->size},
                          list};
    if (r.family->name == NULL || count == 0) {
        return false;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (parts[i].role < CM_CHAT_SYSTEM || parts[i].role > CM_CHAT_ASSISTANT ||
            parts[i].bytes > chat->turn_bytes_max) {
            return false;
        }
    }
    const uint32_t first = parts[0].role == CM_CHAT_SYSTEM ? 1 : 0;
    if (first == 1) {
        r.before = (struct piece){parts[0].text, parts[0].bytes};
    }
    if (r.family->roles[CM_CHAT_SYSTEM].name != NULL) {
        system_add(&r, first == 1);
    }
    for (uint32_t i = first; i < count; i++) {
        message_add(&r, i);
    }
    before_flush(&r);
    if (r.family->roles[CM_CHAT_ASSISTANT].open != NULL) {
        const struct piece opening = piece_of(r.family->thoughts != NULL ? r.family->thoughts : "");
        turn_add(&r, CM_CHAT_ASSISTANT, &opening, 1);
    }
    return true;
}
