/* Byte-pair encoding: the pair of lowest rank first, leftmost among equals (Sennrich et al. 2016),
 * with a linked list and a heap, so that a long word costs n log n.
 *
 * Byte-level: nodes start as bytes, a pair is one of the manifest's merges; where the manifest says
 * so, a piece that is a token is taken whole before any merge. SentencePiece (Kudo and
 * Richardson 2018): nodes start as characters, a pair is whatever spells a token together, that
 * token's rank counts, and characters that no token spells end as tokens of their bytes. Tokens of
 * the user kind are matched whole, the longest at each place, before anything else. */
#include "runtime/worker/tokenizer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/worker/normal.h"
#include "runtime/worker/split.h"

#define PIECE_BYTES_MAX 65536u
#define NONE            0xffffffffu
#define SPACE           "\xe2\x96\x81" /* SentencePiece's, U+2581 */

struct node {
    uint32_t previous, next; /* NONE at the ends */
    uint32_t id;             /* NONE: merged away; SentencePiece: or not a token */
    uint32_t at, bytes;      /* in the piece */
};

struct pair { /* a heap entry; stale if the nodes have changed */
    uint32_t rank;
    uint32_t at;          /* left node */
    uint32_t left, right; /* bytes of the two nodes */
    uint32_t id;          /* what they become */
};

struct merge { /* open addressing by (left, right) */
    uint32_t left, right;
    uint32_t rank; /* NONE: free place */
    uint32_t id;
};

/* Token bytes → id of a normal token. */
struct byte_map {
    const struct cm_manifest *manifest;
    uint32_t *places; /* id + 1 */
    uint32_t mask;
};

struct cm_tokenizer {
    const struct cm_manifest *manifest;
    uint32_t byte_ids[256];
    struct byte_map map;  /* SentencePiece, and where pieces are taken whole */
    struct merge *merges; /* byte-level */
    uint32_t mask;
    uint32_t *user_ids;               /* tokens of the user kind by first byte, the longest first */
    uint32_t user_first[256 + 1];     /* where a byte's begin */
    const uint8_t *piece;             /* being encoded */
    struct cm_normalizer *normalizer; /* NULL: texts stay as they are */
    uint8_t *spaced;                  /* [PIECE_BYTES_MAX] SentencePiece: with its own spaces */
    struct node *nodes;               /* [PIECE_BYTES_MAX] */
    struct pair *heap;                /* [3 * PIECE_BYTES_MAX] */
    uint32_t heap_size;
    bool within; /* the text being encoded stands behind a control token */
};

static uint32_t pair_hash(uint32_t left, uint32_t right)
{
    uint64_t x = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15ull;
    return (uint32_t)(x >> 32);
}

static const struct merge *merge_find(const struct cm_tokenizer *t, uint32_t left, uint32_t right)
{
    uint32_t at = pair_hash(left, right) & t->mask;
    for (; t->merges[at].rank != NONE; at = (at + 1) & t->mask) {
        if (t->merges[at].left == left && t->merges[at].right == right) {
            return &t->merges[at];
        }
    }
    return NULL;
}

static uint32_t bytes_hash(const uint8_t *bytes, uint32_t size)
{
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (uint32_t i = 0; i < size; i++) {
        hash = (hash ^ bytes[i]) * 16777619u;
    }
    return hash;
}

static const uint8_t *token_bytes(const struct cm_manifest *m, uint32_t id, uint32_t *ret_size)
{
    *ret_size = m->token_offsets[id + 1] - m->token_offsets[id];
    return m->token_bytes + m->token_offsets[id];
}

static uint32_t map_find(const struct byte_map *map, const uint8_t *bytes, uint32_t size)
{
    uint32_t at = bytes_hash(bytes, size) & map->mask;
    for (; map->places[at] != 0; at = (at + 1) & map->mask) {
        uint32_t found_size;
        const uint8_t *found = token_bytes(map->manifest, map->places[at] - 1, &found_size);
        if (found_size == size && memcmp(found, bytes, size) == 0) {
            return map->places[at] - 1;
        }
    }
    return NONE;
}

static bool map_make(struct byte_map *map, const struct cm_manifest *m)
{
    uint32_t size = 16;
    while (size < m->vocabulary * 2) {
        size *= 2;
    }
    map->manifest = m;
    map->mask = size - 1;
    map->places = calloc(size, sizeof(*map->places));
    for (uint32_t i = 0; map->places != NULL && i < m->vocabulary; i++) {
        uint32_t bytes;
        const uint8_t *text = token_bytes(m, i, &bytes);
        if (m->token_types[i] != CM_TOKEN_NORMAL || map_find(map, text, bytes) != NONE) {
            continue;
        }
        uint32_t at = bytes_hash(text, bytes) & map->mask;
        while (map->places[at] != 0) {
            at = (at + 1) & map->mask;
        }
        map->places[at] = i + 1;
    }
    return map->places != NULL;
}

static enum cm_status merges_fill(struct cm_tokenizer *t, const struct byte_map *map,
                                  struct cm_error *err)
{
    const struct cm_manifest *m = t->manifest;
    uint8_t joined[2 * CM_MANIFEST_TOKEN_BYTES_MAX];
    for (uint32_t i = 0; i <= t->mask; i++) {
        t->merges[i].rank = NONE;
    }
    for (uint32_t rank = 0; rank < m->merge_count; rank++) {
        uint32_t left = m->merges[2 * rank], right = m->merges[2 * rank + 1], sizes[2];
        const uint8_t *bytes = token_bytes(m, left, &sizes[0]);
        memcpy(joined, bytes, sizes[0]);
        bytes = token_bytes(m, right, &sizes[1]);
        memcpy(joined + sizes[0], bytes, sizes[1]);
        uint32_t id = map_find(map, joined, sizes[0] + sizes[1]);
        if (id == NONE) {
            return cm_error_set(err, CM_E_PACKAGE, "CM-WRK-MERGE",
                                "manifest: merge %u makes no token of the vocabulary", rank);
        }
        if (merge_find(t, left, right) != NULL) {
            continue; /* the first rank counts */
        }
        uint32_t at = pair_hash(left, right) & t->mask;
        while (t->merges[at].rank != NONE) {
            at = (at + 1) & t->mask;
        }
        t->merges[at] = (struct merge){left, right, rank, id};
    }
    return CM_OK;
}

static enum cm_status merges_make(struct cm_tokenizer *t, const struct byte_map *map,
                                  struct cm_error *err)
{
    uint32_t size = 16;
    while (size < t->manifest->merge_count * 2) {
        size *= 2;
    }
    t->mask = size - 1;
    t->merges = malloc(size * sizeof(*t->merges));
    return t->merges != NULL ? merges_fill(t, map, err)
                             : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "merges");
}

/* A byte's token: the one of the byte kind, else a normal one that spells it. */
static void bytes_fill(struct cm_tokenizer *t, const struct byte_map *map)
{
    const struct cm_manifest *m = t->manifest;
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint8_t value = (uint8_t)byte;
        t->byte_ids[byte] = map_find(map, &value, 1);
    }
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        uint32_t size;
        const uint8_t *bytes = token_bytes(m, i, &size);
        if (m->token_types[i] == CM_TOKEN_BYTE && size == 1) {
            t->byte_ids[bytes[0]] = i;
        }
    }
}

/* Sort tokens of the user kind into rows by their first byte; insertion keeps the longest first. */
static enum cm_status users_make(struct cm_tokenizer *t, struct cm_error *err)
{
    const struct cm_manifest *m = t->manifest;
    uint32_t size, filled[256] = {0};
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        const uint8_t *bytes = token_bytes(m, i, &size);
        if (m->token_types[i] == CM_TOKEN_USER && size > 0) {
            t->user_first[bytes[0] + 1]++;
        }
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        t->user_first[byte + 1] += t->user_first[byte];
    }
    t->user_ids = calloc((size_t)t->user_first[256] + 1, sizeof(*t->user_ids));
    if (t->user_ids == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tokenizer");
    }
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        const uint8_t *bytes = token_bytes(m, i, &size);
        if (m->token_types[i] == CM_TOKEN_USER && size > 0) {
            uint32_t *row = t->user_ids + t->user_first[bytes[0]], at = filled[bytes[0]]++, other;
            while (at > 0 && (token_bytes(m, row[at - 1], &other), other < size)) {
                row[at] = row[at - 1];
                at--;
            }
            row[at] = i;
        }
    }
    return CM_OK;
}

static enum cm_status tables_make(struct cm_tokenizer *t, struct cm_error *err)
{
    const struct byte_map *map = &t->map;
    t->nodes = malloc(PIECE_BYTES_MAX * sizeof(*t->nodes));
    t->heap = malloc(3 * PIECE_BYTES_MAX * sizeof(*t->heap));
    t->spaced = malloc(PIECE_BYTES_MAX);
    enum cm_status status = CM_OK;
    if (t->spaced == NULL || t->nodes == NULL || t->heap == NULL ||
        !map_make(&t->map, t->manifest)) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tokenizer");
    }
    bytes_fill(t, map);
    status = users_make(t, err);
    if (t->manifest->tokenizer == CM_TOKENIZER_SENTENCEPIECE) {
        return status;
    }
    if (status == CM_OK) {
        status = merges_make(t, map, err);
    }
    if (!t->manifest->whole_pieces) {
        free(t->map.places);
        t->map.places = NULL;
    }
    return status;
}

enum cm_status cm_tokenizer_new(const struct cm_manifest *manifest, size_t text_bytes_max,
                                struct cm_tokenizer **ret_tokenizer, struct cm_error *err)
{
    struct cm_tokenizer *tokenizer = calloc(1, sizeof(*tokenizer));
    if (tokenizer == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tokenizer");
    }
    tokenizer->manifest = manifest;
    enum cm_status status = tables_make(tokenizer, err);
    if (status == CM_OK && manifest->split == CM_SPLIT_QWEN2_NFC) {
        status = cm_normalizer_new(text_bytes_max, &tokenizer->normalizer, err);
    }
    if (status != CM_OK) {
        cm_tokenizer_free(tokenizer);
        return status;
    }
    *ret_tokenizer = tokenizer;
    return CM_OK;
}

void cm_tokenizer_free(struct cm_tokenizer *tokenizer)
{
    if (tokenizer != NULL) {
        free(tokenizer->map.places);
        cm_normalizer_free(tokenizer->normalizer);
        free(tokenizer->user_ids);
        free(tokenizer->spaced);
        free(tokenizer->merges);
        free(tokenizer->nodes);
        free(tokenizer->heap);
        free(tokenizer);
    }
}

/* ------------------------------------------------------------------ the heap of pairs */

static bool before(const struct pair *a, const struct pair *b)
{
    return a->rank < b->rank || (a->rank == b->rank && a->at < b->at);
}

static void heap_push(struct cm_tokenizer *t, struct pair pair)
{
    uint32_t at = t->heap_size++;
    while (at > 0 && before(&pair, &t->heap[(at - 1) / 2])) {
        t->heap[at] = t->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    t->heap[at] = pair;
}

static struct pair heap_pop(struct cm_tokenizer *t)
{
    struct pair top = t->heap[0], last = t->heap[--t->heap_size];
    uint32_t at = 0;
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child + 1 < t->heap_size && before(&t->heap[child + 1], &t->heap[child])) {
            child++;
        }
        if (child >= t->heap_size || !before(&t->heap[child], &last)) {
            break;
        }
        t->heap[at] = t->heap[child];
        at = child;
    }
    t->heap[at] = last;
    return top;
}

/* Offer the pair of a node and its next one, if they become a token. */
static void pair_offer(struct cm_tokenizer *t, uint32_t at)
{
    uint32_t next = at == NONE ? NONE : t->nodes[at].next;
    if (next == NONE) {
        return;
    }
    const struct node *left = &t->nodes[at], *right = &t->nodes[next];
    struct pair pair = {NONE, at, left->bytes, right->bytes, NONE};
    if (t->merges == NULL) {
        pair.id = map_find(&t->map, t->piece + left->at, left->bytes + right->bytes);
        pair.rank = pair.id != NONE ? t->manifest->ranks[pair.id] : NONE;
    } else {
        const struct merge *merge = merge_find(t, left->id, right->id);
        pair.id = merge != NULL ? merge->id : NONE;
        pair.rank = merge != NULL ? merge->rank : NONE;
    }
    if (pair.rank != NONE) {
        heap_push(t, pair);
    }
}

void cm_token_add(struct cm_token_list *list, uint32_t id)
{
    if (list->count < list->capacity) {
        list->ids[list->count] = id;
    }
    list->count += list->count < UINT32_MAX;
}

/* The first nodes: bytes, or characters. A byte that the vocabulary lacks is left out, as by the
 * peers: some byte-level vocabularies have no token for a few control characters. */
static uint32_t nodes_make(struct cm_tokenizer *t, uint32_t bytes)
{
    uint32_t size = 0, step;
    for (uint32_t i = 0; i < bytes; i += step) {
        uint8_t lead = t->piece[i];
        uint32_t id = t->byte_ids[lead];
        step = 1;
        if (t->merges == NULL) {
            step = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
            step = step < bytes - i ? step : bytes - i;
            id = map_find(&t->map, t->piece + i, step);
        } else if (id == NONE) {
            continue;
        }
        t->nodes[size] = (struct node){size == 0 ? NONE : size - 1, size + 1, id, i, step};
        size++;
    }
    if (size > 0) {
        t->nodes[size - 1].next = NONE;
    }
    return size;
}

/* A node as tokens: its own, or those of its bytes. */
static void node_add(struct cm_tokenizer *t, const struct node *node, struct cm_token_list *list)
{
    if (node->id != NONE) {
        cm_token_add(list, node->id);
        return;
    }
    for (uint32_t i = 0; i < node->bytes; i++) {
        uint32_t id = t->byte_ids[t->piece[node->at + i]];
        if (id != NONE) {
            cm_token_add(list, id);
        }
    }
}

static void piece_encode(struct cm_tokenizer *t, const uint8_t *text, uint32_t bytes,
                         struct cm_token_list *list)
{
    const uint32_t whole = t->manifest->whole_pieces ? map_find(&t->map, text, bytes) : NONE;
    if (whole != NONE) {
        cm_token_add(list, whole);
        return;
    }
    t->piece = text;
    uint32_t size = nodes_make(t, bytes);
    t->heap_size = 0;
    for (uint32_t i = 0; i + 1 < size; i++) {
        pair_offer(t, i);
    }
    while (t->heap_size > 0) {
        struct pair pair = heap_pop(t);
        struct node *left = &t->nodes[pair.at];
        if (left->bytes != pair.left || left->next == NONE ||
            t->nodes[left->next].bytes != pair.right) {
            continue; /* stale */
        }
        struct node *right = &t->nodes[left->next];
        left->id = pair.id;
        left->next = right->next;
        left->bytes += right->bytes;
        right->bytes = 0;
        if (left->next != NONE) {
            t->nodes[left->next].previous = pair.at;
        }
        pair_offer(t, left->previous);
        pair_offer(t, pair.at);
    }
    for (uint32_t at = size > 0 ? 0 : NONE; at != NONE; at = t->nodes[at].next) {
        node_add(t, &t->nodes[at], list);
    }
}

/* Text between tokens of the user kind: normalized, split, and each piece encoded. */
static void plain_encode(struct cm_tokenizer *t, const uint8_t *text, size_t size,
                         struct cm_token_list *list)
{
    if (t->normalizer != NULL) {
        text = cm_normalizer_run(t->normalizer, text, size, &size);
    }
    for (size_t at = 0; at < size;) {
        const size_t end = at + cm_split_next(t->manifest->split, text + at, size - at);
        for (size_t part; at < end; at += part) {
            part = end - at < PIECE_BYTES_MAX ? end - at : PIECE_BYTES_MAX;
            piece_encode(t, text + at, (uint32_t)part, list);
        }
    }
}

/* Does the tokenizer put a space before this text? */
static bool space_first(const struct cm_tokenizer *t, const uint8_t *text, size_t size)
{
    const bool one = t->manifest->split == CM_SPLIT_SPACE_ONE;
    const bool begun = size > 0 && (text[0] == ' ' || (size >= 3 && memcmp(text, SPACE, 3) == 0));
    return !t->within && size > 0 &&
           (t->manifest->split == CM_SPLIT_SPACE_FIRST || (one && !begun));
}

/* SentencePiece: no pieces but what fits the buffer; U+2581 means a space, wherever it comes from.
 */
static void spaced_encode(struct cm_tokenizer *t, const uint8_t *text, size_t size,
                          struct cm_token_list *list)
{
    uint32_t used = 0;
    if (space_first(t, text, size)) {
        t->spaced[used++] = ' ';
    }
    for (size_t at = 0; at < size;) {
        size_t step = text[at] < 0x80 ? 1 : text[at] < 0xe0 ? 2 : text[at] < 0xf0 ? 3 : 4;
        step = step < size - at ? step : size - at;
        if (used + step > PIECE_BYTES_MAX) {
            piece_encode(t, t->spaced, used, list);
            used = 0;
        }
        if (step == 3 && memcmp(text + at, SPACE, 3) == 0) {
            t->spaced[used++] = ' ';
        } else {
            memcpy(t->spaced + used, text + at, step);
            used += (uint32_t)step;
        }
        at += step;
    }
    piece_encode(t, t->spaced, used, list);
}

/* The longest token of the user kind that the text starts with; NONE. */
static uint32_t user_match(const struct cm_tokenizer *t, const uint8_t *text, size_t size,
                           uint32_t *ret_bytes)
{
    for (uint32_t i = t->user_first[text[0]]; i < t->user_first[text[0] + 1]; i++) {
        const uint8_t *bytes = token_bytes(t->manifest, t->user_ids[i], ret_bytes);
        if (*ret_bytes <= size && memcmp(text, bytes, *ret_bytes) == 0) {
            return t->user_ids[i];
        }
    }
    return NONE;
}

/* Tokens of the user kind, and what stands between them. */
static void text_encode(struct cm_tokenizer *tokenizer, const uint8_t *text, size_t size,
                        struct cm_token_list *list)
{
    void (*encode)(struct cm_tokenizer *, const uint8_t *, size_t, struct cm_token_list *) =
        tokenizer->merges == NULL ? spaced_encode : plain_encode;
    size_t plain = 0, at = 0;
    while (at < size) {
        uint32_t bytes, id = user_match(tokenizer, text + at, size - at, &bytes);
        if (id == NONE) {
            at++;
            continue;
        }
        encode(tokenizer, text + plain, at - plain, list);
        cm_token_add(list, id);
        at += bytes;
        plain = at;
    }
    encode(tokenizer, text + plain, size - plain, list);
}

void cm_tokenizer_text(struct cm_tokenizer *tokenizer, const uint8_t *text, size_t size,
                       struct cm_token_list *list)
{
    tokenizer->within = false;
    text_encode(tokenizer, text, size, list);
}

void cm_tokenizer_text_within(struct cm_tokenizer *tokenizer, const uint8_t *text, size_t size,
                              struct cm_token_list *list)
{
    tokenizer->within = true;
    text_encode(tokenizer, text, size, list);
}

int64_t cm_tokenizer_control(const struct cm_tokenizer *tokenizer, const char *spelling)
{
    const struct cm_manifest *m = tokenizer->manifest;
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        uint32_t size;
        const uint8_t *bytes = token_bytes(m, i, &size);
        if (m->token_types[i] == CM_TOKEN_CONTROL && size == strlen(spelling) &&
            memcmp(bytes, spelling, size) == 0) {
            return i;
        }
    }
    return -1;
}

bool cm_text_valid(const uint8_t *text, size_t size)
{
    for (size_t i = 0; i < size;) {
        uint8_t lead = text[i];
        size_t more = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
        uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
        uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
        if (lead == 0 || (lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || more >= size - i) {
            return false;
        }
        for (size_t k = 1; k <= more; k++, low = 0x80, high = 0xbf) {
            if (text[i + k] < low || text[i + k] > high) {
                return false;
            }
        }
        i += more + 1;
    }
    return true;
}
