/* The tokenizer of a GGUF file into the manifest's tables: byte-level BPE only.
 *
 * GGUF keeps tokens in GPT-2's printable byte alphabet: 188 bytes stand for themselves, the other
 * 68 become U+0100 … U+0143 in order. Here that is undone, so that the host needs no alphabet. */
#include "loader/pack/plan.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Next code point of checked-or-not UTF-8; -1 at a malformed byte. */
static int32_t code_point_next(const uint8_t *bytes, size_t size, size_t *at)
{
    uint8_t lead = bytes[*at];
    size_t more = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    int32_t point = more == 0 ? lead : lead & (0x3f >> more);
    if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || more >= size - *at) {
        return -1;
    }
    for (size_t i = 1; i <= more; i++) {
        point = point << 6 | (bytes[*at + i] & 0x3f);
    }
    *at += more + 1;
    return point;
}

/* Byte that a code point of the alphabet stands for; -1: none. */
static int alphabet_byte(int32_t point)
{
    bool plain = (point >= '!' && point <= '~') || (point >= 0xa1 && point <= 0xac) ||
                 (point >= 0xae && point <= 0xff);
    if (plain) {
        return point;
    }
    int32_t rank = point - 0x100;
    for (int byte = 0; rank >= 0 && byte < 256; byte++) {
        bool other = byte < '!' || (byte > '~' && byte < 0xa1) || byte == 0xad;
        if (other && rank-- == 0) {
            return byte;
        }
    }
    return -1;
}

/* Decode one token into ret_bytes (room for text.size); -1 if it leaves the alphabet. */
static long token_decode(struct cm_gguf_text text, uint8_t *ret_bytes)
{
    size_t at = 0, used = 0;
    while (at < text.size) {
        int32_t point = code_point_next((const uint8_t *)text.bytes, text.size, &at);
        int byte = point < 0 ? -1 : alphabet_byte(point);
        if (byte < 0) {
            return -1;
        }
        ret_bytes[used++] = (uint8_t)byte;
    }
    return (long)used;
}

static enum cm_status refuse(struct cm_error *err, uint64_t index, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TOKENIZER", "GGUF tokenizer, entry %llu: %s",
                        (unsigned long long)index, what);
}

static enum cm_status tokens_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                  struct cm_gguf_text **ret_texts, struct cm_error *err)
{
    struct cm_cursor tokens, kinds;
    uint64_t count, kind_count;
    enum cm_status status =
        cm_gguf_array(gguf, "tokenizer.ggml.tokens", CM_GGUF_VALUE_STRING, &tokens, &count, err);
    if (status == CM_OK) {
        status = cm_gguf_array(gguf, "tokenizer.ggml.token_type", CM_GGUF_VALUE_I32, &kinds,
                               &kind_count, err);
    }
    if (status != CM_OK) {
        return status;
    }
    if (count < 2 || count > CM_MANIFEST_VOCABULARY_MAX || kind_count != count) {
        return refuse(err, count, "impossible vocabulary size, or not one type for each token");
    }
    plan->manifest.vocabulary = (uint32_t)count;
    plan->token_offsets = calloc(count + 1, sizeof(*plan->token_offsets));
    plan->token_types = calloc(count, 1);
    plan->token_bytes = malloc(cm_cursor_left(&tokens) + 1);
    struct cm_gguf_text *texts = calloc(count, sizeof(*texts));
    *ret_texts = texts;
    if (plan->token_offsets == NULL || plan->token_types == NULL || plan->token_bytes == NULL ||
        texts == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "vocabulary");
    }
    uint32_t used = 0;
    for (uint32_t i = 0; i < count; i++) {
        texts[i] = cm_gguf_next_text(&tokens);
        uint32_t kind = cm_cursor_u32(&kinds);
        if (kind < CM_TOKEN_NORMAL || kind > CM_TOKEN_BYTE ||
            texts[i].size > CM_MANIFEST_TOKEN_BYTES_MAX) {
            return refuse(err, i, "unknown token type, or a token longer than 1024 bytes");
        }
        /* Control and user tokens are plain text; so is whatever leaves the alphabet. */
        long size = kind == CM_TOKEN_NORMAL ? token_decode(texts[i], plan->token_bytes + used) : -1;
        if (size < 0) {
            if (kind == CM_TOKEN_NORMAL) {
                return refuse(err, i, "a token is not written in the byte alphabet");
            }
            memcpy(plan->token_bytes + used, texts[i].bytes, texts[i].size);
            size = (long)texts[i].size;
        }
        plan->token_types[i] = (uint8_t)kind;
        used += (uint32_t)size;
        plan->token_offsets[i + 1] = used;
    }
    return CM_OK;
}

/* Text → id: open addressing, twice as many places as tokens. */
struct text_map {
    const struct cm_gguf_text *texts;
    uint32_t *places; /* id + 1; 0: free */
    uint32_t mask;
};

static uint32_t text_hash(const char *bytes, size_t size)
{
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < size; i++) {
        hash = (hash ^ (uint8_t)bytes[i]) * 16777619u;
    }
    return hash;
}

static bool map_make(struct text_map *map, const struct cm_gguf_text *texts, uint32_t count)
{
    uint32_t size = 16;
    while (size < count * 2) {
        size *= 2;
    }
    map->texts = texts;
    map->mask = size - 1;
    map->places = calloc(size, sizeof(*map->places));
    for (uint32_t i = 0; map->places != NULL && i < count; i++) {
        uint32_t at = text_hash(texts[i].bytes, texts[i].size) & map->mask;
        while (map->places[at] != 0) {
            at = (at + 1) & map->mask;
        }
        map->places[at] = i + 1;
    }
    return map->places != NULL;
}

/* The first token of that text; -1: none. */
static long map_find(const struct text_map *map, const char *bytes, size_t size)
{
    uint32_t at = text_hash(bytes, size) & map->mask;
    for (; map->places[at] != 0; at = (at + 1) & map->mask) {
        const struct cm_gguf_text *text = &map->texts[map->places[at] - 1];
        if (text->size == size && memcmp(text->bytes, bytes, size) == 0) {
            return (long)map->places[at] - 1;
        }
    }
    return -1;
}

static enum cm_status merges_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                  const struct text_map *map, struct cm_error *err)
{
    struct cm_cursor cursor;
    uint64_t count;
    enum cm_status status =
        cm_gguf_array(gguf, "tokenizer.ggml.merges", CM_GGUF_VALUE_STRING, &cursor, &count, err);
    if (status != CM_OK) {
        return status;
    }
    if (count > CM_MANIFEST_MERGES_MAX) {
        return refuse(err, count, "too many merges");
    }
    plan->merges = calloc(count * 2 + 1, sizeof(*plan->merges));
    char *joined = malloc(cm_cursor_left(&cursor) + 1);
    if (plan->merges == NULL || joined == NULL) {
        free(joined);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "merges");
    }
    for (uint64_t i = 0; status == CM_OK && i < count; i++) {
        struct cm_gguf_text text = cm_gguf_next_text(&cursor);
        const char *space = text.size > 2 ? memchr(text.bytes + 1, ' ', text.size - 2) : NULL;
        if (space == NULL) {
            status = refuse(err, i, "a merge is not two texts with a space between");
            break;
        }
        size_t left = (size_t)(space - text.bytes), right = text.size - left - 1;
        memcpy(joined, text.bytes, left);
        memcpy(joined + left, space + 1, right);
        long left_id = map_find(map, text.bytes, left);
        long right_id = map_find(map, space + 1, right);
        if (left_id < 0 || right_id < 0 || map_find(map, joined, left + right) < 0) {
            status = refuse(err, i, "a merge names a token that is not in the vocabulary");
            break;
        }
        plan->merges[i * 2] = (uint32_t)left_id;
        plan->merges[i * 2 + 1] = (uint32_t)right_id;
    }
    plan->manifest.merge_count = (uint32_t)count;
    free(joined);
    return status;
}

/* End tokens: the file's own, and the two that chat formats end with. */
static enum cm_status ends_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                const struct text_map *map, struct cm_error *err)
{
    static const char *const names[] = {"<|im_end|>", "<|endoftext|>"};
    struct cm_manifest *m = &plan->manifest;
    enum cm_status status =
        cm_gguf_u32(gguf, "tokenizer.ggml.eos_token_id", &m->end_tokens[0], err);
    m->end_token_count = 1;
    if (status == CM_OK && m->end_tokens[0] >= m->vocabulary) {
        return refuse(err, m->end_tokens[0], "the end token is not in the vocabulary");
    }
    for (size_t i = 0; status == CM_OK && i < sizeof(names) / sizeof(names[0]); i++) {
        long id = map_find(map, names[i], strlen(names[i]));
        if (id >= 0 && plan->token_types[id] == CM_TOKEN_CONTROL &&
            (uint32_t)id != m->end_tokens[0]) {
            m->end_tokens[m->end_token_count++] = (uint32_t)id;
        }
    }
    if (status == CM_OK && cm_gguf_has(gguf, "tokenizer.ggml.add_bos_token")) {
        status = cm_gguf_bool(gguf, "tokenizer.ggml.add_bos_token", &m->add_begin, err);
    }
    if (status == CM_OK && cm_gguf_has(gguf, "tokenizer.ggml.bos_token_id")) {
        status = cm_gguf_u32(gguf, "tokenizer.ggml.bos_token_id", &m->begin_token, err);
    }
    if (status == CM_OK && m->begin_token >= m->vocabulary) {
        status = refuse(err, m->begin_token, "the begin token is not in the vocabulary");
    }
    return status;
}

static bool text_is(struct cm_gguf_text text, const char *wanted)
{
    return text.size == strlen(wanted) && memcmp(text.bytes, wanted, text.size) == 0;
}

static enum cm_status kinds_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                 struct cm_error *err)
{
    struct cm_gguf_text model, pre;
    enum cm_status status = cm_gguf_text(gguf, "tokenizer.ggml.model", &model, err);
    if (status == CM_OK) {
        status = cm_gguf_text(gguf, "tokenizer.ggml.pre", &pre, err);
    }
    if (status != CM_OK) {
        return status;
    }
    bool smollm = text_is(pre, "smollm");
    if (!text_is(model, "gpt2") || (!smollm && !text_is(pre, "gpt2") && !text_is(pre, "gpt-2"))) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TOKENIZER",
                            "GGUF: tokenizer '%.*s' / '%.*s' is not supported; this host reads: "
                            "gpt2 / smollm, gpt2 / gpt-2",
                            (int)(model.size < 32 ? model.size : 32), model.bytes,
                            (int)(pre.size < 32 ? pre.size : 32), pre.bytes);
    }
    plan->manifest.tokenizer = CM_TOKENIZER_BYTE_BPE;
    plan->manifest.split = smollm ? CM_SPLIT_SMOLLM : CM_SPLIT_GPT2;
    return CM_OK;
}

enum cm_status cm_plan_vocabulary(const struct cm_gguf *gguf, struct cm_plan *plan,
                                  struct cm_error *err)
{
    struct cm_gguf_text *texts = NULL;
    struct text_map map = {.places = NULL};
    enum cm_status status = kinds_read(gguf, plan, err);
    if (status == CM_OK) {
        status = tokens_read(gguf, plan, &texts, err);
    }
    if (status == CM_OK && !map_make(&map, texts, plan->manifest.vocabulary)) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "vocabulary");
    }
    if (status == CM_OK) {
        status = merges_read(gguf, plan, &map, err);
    }
    if (status == CM_OK) {
        status = ends_read(gguf, plan, &map, err);
    }
    plan->manifest.token_offsets = plan->token_offsets;
    plan->manifest.token_bytes = plan->token_bytes;
    plan->manifest.token_types = plan->token_types;
    plan->manifest.merges = plan->merges;
    free(map.places);
    free(texts);
    return status;
}
