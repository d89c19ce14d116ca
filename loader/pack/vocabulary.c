/* A tokenizer into the manifest's tables: byte-level BPE, or SentencePiece.
 *
 * Byte-level BPE keeps tokens in GPT-2's printable byte alphabet: 188 bytes stand for themselves,
 * the other 68 become U+0100 … U+0143 in order. SentencePiece (Kudo and Richardson 2018) writes a
 * space as U+2581 and a byte as <0x41>. Here both are undone, so that the host needs no alphabet.
 */
#include "loader/pack/plan.h"

#include <errno.h>
#include <math.h>
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
    return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TOKENIZER", "model: tokenizer, entry %llu: %s",
                        (unsigned long long)index, what);
}

static enum cm_status tokens_make(const struct cm_vocabulary *v, struct cm_plan *plan,
                                  struct cm_error *err)
{
    size_t room = 1;
    if (v->count < 2 || v->count > CM_MANIFEST_VOCABULARY_MAX) {
        return refuse(err, v->count, "impossible vocabulary size");
    }
    for (uint32_t i = 0; i < v->count; i++) {
        if (v->kinds[i] < CM_TOKEN_NORMAL || v->kinds[i] > CM_TOKEN_BYTE ||
            v->texts[i].size > CM_MANIFEST_TOKEN_BYTES_MAX) {
            return refuse(err, i, "unknown token type, or a token longer than 1024 bytes");
        }
        room += v->texts[i].size;
    }
    plan->manifest.vocabulary = v->count;
    plan->token_offsets = calloc((size_t)v->count + 1, sizeof(*plan->token_offsets));
    plan->token_types = calloc(v->count, 1);
    plan->token_bytes = malloc(room);
    if (plan->token_offsets == NULL || plan->token_types == NULL || plan->token_bytes == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "vocabulary");
    }
    uint32_t used = 0;
    for (uint32_t i = 0; i < v->count; i++) {
        long size = token_decode(plan->manifest.tokenizer, v->kinds[i], v->texts[i],
                                 plan->token_bytes + used);
        if (size < 0) {
            return refuse(err, i, "a token is not written in the tokenizer's alphabet");
        }
        plan->token_types[i] = v->kinds[i];
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

static enum cm_status merges_make(const struct cm_vocabulary *v, struct cm_plan *plan,
                                  const struct text_map *map, struct cm_error *err)
{
    char joined[2 * CM_MANIFEST_TOKEN_BYTES_MAX];
    if (v->merge_count > CM_MANIFEST_MERGES_MAX) {
        return refuse(err, v->merge_count, "too many merges");
    }
    plan->merges = calloc((size_t)v->merge_count * 2 + 1, sizeof(*plan->merges));
    if (plan->merges == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "merges");
    }
    for (uint32_t i = 0; i < v->merge_count; i++) {
        const struct cm_source_text left = v->merges[i].left, right = v->merges[i].right;
        long left_id = map_find(map, left.bytes, left.size);
        long right_id = map_find(map, right.bytes, right.size);
        if (left_id < 0 || right_id < 0) {
            return refuse(err, i, "a merge names a token that is not in the vocabulary");
        }
        memcpy(joined, left.bytes, left.size); /* both are tokens: no longer than one may be */
        memcpy(joined + left.size, right.bytes, right.size);
        long id = map_find(map, joined, left.size + right.size);
        if (id < 0) {
            return refuse(err, i, "a merge makes no token of the vocabulary");
        }
        plan->merges[(size_t)i * 2] = (uint32_t)left_id;
        plan->merges[(size_t)i * 2 + 1] = (uint32_t)right_id;
    }
    plan->manifest.merge_count = v->merge_count;
    return CM_OK;
}

static int pair_compare(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left > right) - (left < right);
}

/* The host merges whatever two neighbours spell a token; so must the file: each way to cut a token
 * in two must be one of its merges. */
static enum cm_status merges_closed(const struct cm_vocabulary *v, const struct cm_plan *plan,
                                    const struct text_map *map, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    uint64_t *pairs = calloc((size_t)v->merge_count + 1, sizeof(*pairs));
    if (pairs == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "merges");
    }
    for (uint32_t i = 0; i < v->merge_count; i++) {
        pairs[i] = (uint64_t)plan->merges[(size_t)i * 2] << 32 | plan->merges[(size_t)i * 2 + 1];
    }
    qsort(pairs, v->merge_count, sizeof(*pairs), pair_compare);
    for (uint32_t i = 0; status == CM_OK && i < v->count; i++) {
        const struct cm_source_text text = v->texts[i];
        for (size_t cut = 1; plan->ranks[i] != CM_MANIFEST_NO_RANK && cut < text.size; cut++) {
            long left = map_find(map, text.bytes, cut);
            long right = map_find(map, text.bytes + cut, text.size - cut);
            uint64_t pair = (uint64_t)left << 32 | (uint64_t)right;
            if (left >= 0 && right >= 0 && plan->token_types[left] == CM_TOKEN_NORMAL &&
                plan->token_types[right] == CM_TOKEN_NORMAL &&
                bsearch(&pair, pairs, v->merge_count, sizeof(*pairs), pair_compare) == NULL) {
                status = refuse(err, i, "its merges leave out one way to make this token");
                break;
            }
        }
    }
    free(pairs);
    return status;
}

/* Ranks of tokens out of merges: the first merge that makes one counts. */
static enum cm_status ranks_of_merges(const struct cm_vocabulary *v, struct cm_plan *plan,
                                      const struct text_map *map, struct cm_error *err)
{
    char joined[2 * CM_MANIFEST_TOKEN_BYTES_MAX];
    enum cm_status status = merges_make(v, plan, map, err);
    for (uint32_t i = 0; status == CM_OK && i < v->merge_count; i++) {
        const struct cm_source_text left = v->merges[i].left, right = v->merges[i].right;
        memcpy(joined, left.bytes, left.size);
        memcpy(joined + left.size, right.bytes, right.size);
        long id = map_find(map, joined, left.size + right.size);
        if (plan->token_types[id] == CM_TOKEN_NORMAL && plan->ranks[id] == CM_MANIFEST_NO_RANK) {
            plan->ranks[id] = i;
        }
    }
    plan->manifest.merge_count = 0;
    return status == CM_OK ? merges_closed(v, plan, map, err) : status;
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
static enum cm_status ranks_of_scores(const struct cm_vocabulary *v, struct cm_plan *plan,
                                      struct cm_error *err)
{
    uint32_t normal = 0, rank = 0;
    struct scored *scored = calloc(v->count, sizeof(*scored));
    if (scored == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "scores");
    }
    for (uint32_t i = 0; i < v->count; i++) {
        if (plan->token_types[i] == CM_TOKEN_NORMAL) {
            float score = isnan(v->scores[i]) ? -INFINITY : v->scores[i];
            scored[normal++] = (struct scored){score, i};
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

static enum cm_status ranks_make(const struct cm_vocabulary *v, struct cm_plan *plan,
                                 const struct text_map *map, struct cm_error *err)
{
    plan->ranks = malloc(v->count * sizeof(*plan->ranks));
    if (plan->ranks == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "ranks");
    }
    for (uint32_t i = 0; i < v->count; i++) {
        plan->ranks[i] = CM_MANIFEST_NO_RANK;
    }
    return v->scores != NULL ? ranks_of_scores(v, plan, err) : ranks_of_merges(v, plan, map, err);
}

/* End tokens: the file's own, and those that chat formats end with. */
static enum cm_status ends_make(const struct cm_vocabulary *v, struct cm_plan *plan,
                                const struct text_map *map, struct cm_error *err)
{
    static const char *const names[] = {"<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|end|>"};
    struct cm_manifest *m = &plan->manifest;
    for (uint32_t i = 0; i < v->end_count; i++) {
        if (v->ends[i] >= m->vocabulary) {
            return refuse(err, v->ends[i], "the end token is not in the vocabulary");
        }
        m->end_tokens[m->end_token_count++] = v->ends[i];
    }
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        long id = map_find(map, names[i], strlen(names[i]));
        bool known = id < 0 || plan->token_types[id] != CM_TOKEN_CONTROL;
        for (uint32_t k = 0; k < m->end_token_count; k++) {
            known = known || m->end_tokens[k] == (uint32_t)id;
        }
        if (!known && m->end_token_count < CM_MANIFEST_END_TOKENS_MAX) {
            m->end_tokens[m->end_token_count++] = (uint32_t)id;
        }
    }
    if (v->begin >= m->vocabulary) {
        return refuse(err, v->begin, "the begin token is not in the vocabulary");
    }
    m->begin_token = v->begin;
    m->add_begin = v->add_begin;
    m->whole_pieces = v->whole_pieces;
    return CM_OK;
}

enum cm_status cm_plan_vocabulary(const struct cm_vocabulary *v, struct cm_plan *plan,
                                  struct cm_error *err)
{
    struct text_map map = {.places = NULL};
    plan->manifest.tokenizer = v->tokenizer;
    plan->manifest.split = v->split;
    enum cm_status status = tokens_make(v, plan, err);
    if (status == CM_OK && !map_make(&map, v->texts, v->count)) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "vocabulary");
    }
    if (status == CM_OK) {
        status = v->tokenizer == CM_TOKENIZER_SENTENCEPIECE ? ranks_make(v, plan, &map, err)
                                                            : merges_make(v, plan, &map, err);
    }
    if (status == CM_OK) {
        status = ends_make(v, plan, &map, err);
    }
    plan->manifest.token_offsets = plan->token_offsets;
    plan->manifest.token_bytes = plan->token_bytes;
    plan->manifest.token_types = plan->token_types;
    plan->manifest.merges = plan->merges;
    plan->manifest.ranks = plan->ranks;
    free(map.places);
    return status;
}

enum cm_status cm_vocabulary_new(uint32_t count, uint32_t merges, struct cm_vocabulary *ret,
                                 struct cm_error *err)
{
    ret->count = count;
    ret->merge_count = merges;
    ret->texts = calloc((size_t)count + 1, sizeof(*ret->texts));
    ret->kinds = calloc((size_t)count + 1, 1);
    ret->merges = calloc((size_t)merges + 1, sizeof(*ret->merges));
    return ret->texts != NULL && ret->kinds != NULL && ret->merges != NULL
               ? CM_OK
               : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "vocabulary");
}

void cm_vocabulary_done(struct cm_vocabulary *v)
{
    free(v->texts);
    free(v->kinds);
    free(v->merges);
    free(v->scores);
    free(v->spare);
}
