/* The tokenizer of a GGUF file into the manifest's tables: byte-level BPE, or SentencePiece.
 *
 * Byte-level BPE keeps tokens in GPT-2's printable byte alphabet: 188 bytes stand for themselves,
 * the other 68 become U+0100 … U+0143 in order. SentencePiece (Kudo and Richardson 2018) writes a
 * space as U+2581 and a byte as <0x41>. Here both are undone, so that the host needs no alphabet.
 */
#include "loader/pack/plan.h"

#include <errno.h>
#include <math.h>
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

/* Undo the byte alphabet into ret_bytes (room for text.size); -1 if the text leaves it. */
static long alphabet_decode(struct cm_source_text text, uint8_t *ret_bytes)
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

/* Undo SentencePiece's spaces. */
static long spaces_decode(struct cm_source_text text, uint8_t *ret_bytes)
{
    size_t used = 0;
    for (size_t at = 0; at < text.size; at++) {
        bool space = text.size - at >= 3 && memcmp(text.bytes + at, "\xe2\x96\x81", 3) == 0;
        ret_bytes[used++] = space ? ' ' : (uint8_t)text.bytes[at];
        at += space ? 2 : 0;
    }
    return (long)used;
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : (c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1);
}

/* <0x41>; -1: it is not written so. */
static long byte_decode(struct cm_source_text text, uint8_t *ret_bytes)
{
    if (text.size != 6 || memcmp(text.bytes, "<0x", 3) != 0 || text.bytes[5] != '>' ||
        hex_digit(text.bytes[3]) < 0 || hex_digit(text.bytes[4]) < 0) {
        return -1;
    }
    ret_bytes[0] = (uint8_t)(hex_digit(text.bytes[3]) * 16 + hex_digit(text.bytes[4]));
    return 1;
}

/* Control and user tokens are plain text. */
static long token_decode(uint32_t tokenizer, uint32_t kind, struct cm_source_text text,
                         uint8_t *ret_bytes)
{
    bool pieces = tokenizer == CM_TOKENIZER_SENTENCEPIECE;
    if (kind == CM_TOKEN_NORMAL) {
        return pieces ? spaces_decode(text, ret_bytes) : alphabet_decode(text, ret_bytes);
    }
    if (kind == CM_TOKEN_BYTE && pieces) {
        return byte_decode(text, ret_bytes);
    }
    memcpy(ret_bytes, text.bytes, text.size);
    return (long)text.size;
}

static enum cm_status refuse(struct cm_error *err, uint64_t index, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TOKENIZER", "GGUF tokenizer, entry %llu: %s",
                        (unsigned long long)index, what);
}

static enum cm_status tokens_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                  struct cm_source_text **ret_texts, struct cm_error *err)
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
    struct cm_source_text *texts = calloc(count, sizeof(*texts));
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
        long size =
            token_decode(plan->manifest.tokenizer, kind, texts[i], plan->token_bytes + used);
        if (size < 0) {
            return refuse(err, i, "a token is not written in the tokenizer's alphabet");
        }
        plan->token_types[i] = (uint8_t)kind;
        used += (uint32_t)size;
        plan->token_offsets[i + 1] = used;
    }
    return CM_OK;
}

/* Text → id: open addressing, twice as many places as tokens. */
struct text_map {
    const struct cm_source_text *texts;
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

static bool map_make(struct text_map *map, const struct cm_source_text *texts, uint32_t count)
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
        const struct cm_source_text *text = &map->texts[map->places[at] - 1];
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
        struct cm_source_text text = cm_gguf_next_text(&cursor);
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

/* End tokens: the file's own, and those that chat formats end with. */
static enum cm_status ends_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                const struct text_map *map, struct cm_error *err)
{
    static const char *const names[] = {"<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|end|>"};
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
    /* What llama.cpp does where the key is missing. */
    m->add_begin = m->tokenizer == CM_TOKENIZER_SENTENCEPIECE || m->split == CM_SPLIT_LLAMA3;
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

struct scored {
    float score;
    uint32_t id;
};

static int score_compare(const void *a, const void *b)
{
    const struct scored *left = a, *right = b;
    if (left->score != right->score) {
        return left->score > right->score ? -1 : 1;
    }
    return (left->id > right->id) - (left->id < right->id);
}

/* Scores to ranks: the greatest score first, equal ones alike. Only normal tokens are merged into.
 */
static enum cm_status ranks_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                 struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    struct cm_cursor cursor;
    uint64_t count;
    uint32_t normal = 0, rank = 0;
    enum cm_status status =
        cm_gguf_array(gguf, "tokenizer.ggml.scores", CM_GGUF_VALUE_F32, &cursor, &count, err);
    if (status != CM_OK) {
        return status;
    }
    if (count != m->vocabulary) {
        return refuse(err, count, "not one score for each token");
    }
    struct scored *scored = calloc(m->vocabulary, sizeof(*scored));
    plan->ranks = calloc(m->vocabulary, sizeof(*plan->ranks));
    if (scored == NULL || plan->ranks == NULL) {
        free(scored);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "scores");
    }
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        float score = cm_cursor_f32(&cursor);
        plan->ranks[i] = CM_MANIFEST_NO_RANK;
        if (plan->token_types[i] == CM_TOKEN_NORMAL) {
            scored[normal++] = (struct scored){isnan(score) ? -INFINITY : score, i};
        }
    }
    qsort(scored, normal, sizeof(*scored), score_compare);
    for (uint32_t i = 0; i < normal; i++) {
        rank += i > 0 && scored[i].score < scored[i - 1].score;
        plan->ranks[scored[i].id] = rank;
    }
    free(scored);
    return CM_OK;
}

/* Pairs of tokenizer.ggml.model and .pre that the host has. */
static const struct {
    const char *model, *pre;
    uint32_t tokenizer, split;
} tokenizers[] = {
    {"gpt2", "smollm", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_SMOLLM},
    {"gpt2", "gpt2", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_GPT2},
    {"gpt2", "gpt-2", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_GPT2},
    {"gpt2", "qwen2", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_QWEN2},
    {"gpt2", "llama-bpe", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_LLAMA3},
    {"llama", "default", CM_TOKENIZER_SENTENCEPIECE, CM_SPLIT_SPACE_FIRST},
};

static enum cm_status kinds_read(const struct cm_gguf *gguf, struct cm_plan *plan,
                                 struct cm_error *err)
{
    struct cm_source_text model, pre = {"default", 7};
    bool space_first = true;
    enum cm_status status = cm_gguf_text(gguf, "tokenizer.ggml.model", &model, err);
    if (status == CM_OK && cm_gguf_has(gguf, "tokenizer.ggml.pre")) {
        status = cm_gguf_text(gguf, "tokenizer.ggml.pre", &pre, err);
    }
    if (status == CM_OK && cm_gguf_has(gguf, "tokenizer.ggml.add_space_prefix")) {
        status = cm_gguf_bool(gguf, "tokenizer.ggml.add_space_prefix", &space_first, err);
    }
    for (size_t i = 0; status == CM_OK && i < sizeof(tokenizers) / sizeof(tokenizers[0]); i++) {
        if (cm_source_text_is(model, tokenizers[i].model) &&
            cm_source_text_is(pre, tokenizers[i].pre)) {
            plan->manifest.tokenizer = tokenizers[i].tokenizer;
            plan->manifest.split = tokenizers[i].split == CM_SPLIT_SPACE_FIRST && !space_first
                                       ? (uint32_t)CM_SPLIT_WHOLE
                                       : tokenizers[i].split;
            return CM_OK;
        }
    }
    return status != CM_OK
               ? status
               : cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TOKENIZER",
                              "GGUF: tokenizer '%.*s' / '%.*s' is not supported; this host reads: "
                              "gpt2 / smollm, gpt2, qwen2, llama-bpe; llama / default",
                              (int)(model.size < 32 ? model.size : 32), model.bytes,
                              (int)(pre.size < 32 ? pre.size : 32), pre.bytes);
}

enum cm_status cm_plan_vocabulary(const struct cm_gguf *gguf, struct cm_plan *plan,
                                  struct cm_error *err)
{
    struct cm_source_text *texts = NULL;
    struct text_map map = {.places = NULL};
    enum cm_status status = kinds_read(gguf, plan, err);
    if (status == CM_OK) {
        status = tokens_read(gguf, plan, &texts, err);
    }
    if (status == CM_OK && !map_make(&map, texts, plan->manifest.vocabulary)) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "vocabulary");
    }
    if (status == CM_OK) {
        status = plan->manifest.tokenizer == CM_TOKENIZER_SENTENCEPIECE
                     ? ranks_read(gguf, plan, err)
                     : merges_read(gguf, plan, &map, err);
    }
    if (status == CM_OK) {
        status = ends_read(gguf, plan, &map, err);
    }
    plan->manifest.token_offsets = plan->token_offsets;
    plan->manifest.token_bytes = plan->token_bytes;
    plan->manifest.token_types = plan->token_types;
    plan->manifest.merges = plan->merges;
    plan->manifest.ranks = plan->ranks;
    free(map.places);
    free(texts);
    return status;
}
