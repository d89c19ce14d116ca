/* A text is read as decomposed code points. A starter waits for what composes with it; the marks
 * behind it are put in order of their class by counting (a run of them may be as long as the text),
 * then each that is not blocked from the starter is tried against it. */
#include "runtime/worker/normal.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/guard/unicode.h"
#include "runtime/worker/split.h"

#define GROWTH     3u /* UTF-8 in form C or D is no more than that many times as long (UAX #15) */
#define PLAIN_LAST 0x2ffu /* up to here form C leaves all, and nothing combines */
#define CLASSES    256u
#define POINTS_MAX 4u /* that one code point decomposes into; make_unicode.py asserts it */
#define POINT_MAX  4u /* bytes of one code point */

struct cm_normalizer {
    size_t bytes_max;
    size_t touched;   /* the longest text so far: what is in use, and to be wiped */
    uint8_t *out;     /* [GROWTH * bytes_max + POINT_MAX] */
    uint32_t *marks;  /* [bytes_max] a run in order: a code point has no more marks than bytes */
    uint32_t starter; /* waits; 0: none (no text holds NUL) */
    size_t used;      /* of out */
};

/* The text, code point by code point, decomposed. */
struct source {
    const uint8_t *text;
    size_t size, at;
    uint32_t points[POINTS_MAX];
    uint32_t count, next;
};

enum cm_status cm_normalizer_new(size_t text_bytes_max, struct cm_normalizer **ret_normalizer,
                                 struct cm_error *err)
{
    struct cm_normalizer *n = calloc(1, sizeof(*n));
    if (n == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "normalizer");
    }
    n->bytes_max = text_bytes_max;
    n->out = malloc(GROWTH * text_bytes_max + POINT_MAX);
    n->marks = calloc(text_bytes_max + 1, sizeof(*n->marks));
    if (n->out == NULL || n->marks == NULL) {
        cm_normalizer_free(n);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "normalizer");
    }
    *ret_normalizer = n;
    return CM_OK;
}

void cm_normalizer_free(struct cm_normalizer *n)
{
    if (n == NULL) {
        return;
    }
    if (n->out != NULL) {
        explicit_bzero(n->out, GROWTH * n->touched + POINT_MAX);
    }
    if (n->marks != NULL) {
        explicit_bzero(n->marks, n->touched * sizeof(*n->marks));
    }
    free(n->out);
    free(n->marks);
    free(n);
}

/* ------------------------------------------------------------------ decomposition */

static const struct cm_unicode_pair *canonical_find(uint32_t point)
{
    uint32_t low = 0, high = cm_canonical_count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (cm_canonical[middle].composed < point) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < cm_canonical_count && cm_canonical[low].composed == point ? &cm_canonical[low]
                                                                           : NULL;
}

/* What a code point stands for, last first: only the first part decomposes further. */
static void decompose(struct source *s, uint32_t point)
{
    uint32_t last[POINTS_MAX], count = 0;
    const struct cm_unicode_pair *pair;
    s->next = 0;
    s->count = cm_unicode_hangul_decompose(point, s->points);
    if (s->count > 0) {
        return;
    }
    while ((pair = canonical_find(point)) != NULL) {
        if (pair->second != 0) {
            last[count++] = pair->second;
        }
        point = pair->first;
    }
    s->points[s->count++] = point;
    while (count > 0) {
        s->points[s->count++] = last[--count];
    }
}

/* Look at the next code point and its class. False: the text is at its end. */
static bool peek(struct source *s, uint32_t *ret_point, uint32_t *ret_class)
{
    if (s->next == s->count) {
        size_t bytes;
        if (s->at == s->size) {
            return false;
        }
        uint32_t point = cm_point_read(s->text + s->at, s->size - s->at, &bytes);
        s->at += bytes;
        decompose(s, point);
    }
    *ret_point = s->points[s->next];
    *ret_class = cm_character_find(cm_combining_ranges, cm_combining_range_count, *ret_point);
    return true;
}

/* ------------------------------------------------------------------ composition */

/* The guard's table is of a later version: what composes to a code point that is not known here
 * stays apart. */
static uint32_t compose(uint32_t first, uint32_t second)
{
    uint32_t letters[POINTS_MAX];
    const uint32_t both = cm_unicode_compose(first, second);
    const bool known = both != 0 && (canonical_find(both) != NULL ||
                                     cm_unicode_hangul_decompose(both, letters) > 0);
    return known ? both : 0;
}

static size_t point_put(uint8_t *out, uint32_t point)
{
    size_t size = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    for (size_t i = size - 1; i > 0; i--, point >>= 6) {
        out[i] = (uint8_t)(0x80 | (point & 0x3f));
    }
    out[0] = (uint8_t)(size == 1 ? point : (0xf00u >> size & 0xffu) | point);
    return size;
}

static void starter_flush(struct cm_normalizer *n)
{
    n->used += n->starter != 0 ? point_put(n->out + n->used, n->starter) : 0;
    n->starter = 0;
}

/* Count the marks ahead by class, and put them into n->marks in order of it: equal ones stay in
 * theirs. */
static uint32_t marks_order(struct cm_normalizer *n, struct source *s)
{
    uint32_t point, class;
    if (!peek(s, &point, &class) || class == 0) {
        return 0;
    }
    uint32_t starts[CLASSES + 1] = {0};
    for (struct source ahead = *s; peek(&ahead, &point, &class) && class != 0; ahead.next++) {
        starts[class + 1]++;
    }
    for (uint32_t i = 0; i < CLASSES; i++) {
        starts[i + 1] += starts[i];
    }
    for (; peek(s, &point, &class) && class != 0; s->next++) {
        n->marks[starts[class]++] = point;
    }
    return starts[CLASSES];
}

/* The marks that do not compose follow the starter, which may yet change its size: room is left. */
static void marks_add(struct cm_normalizer *n, uint32_t count)
{
    uint8_t *const out = n->out + n->used + POINT_MAX;
    uint32_t blocked = 0; /* the class of the last mark that stayed */
    size_t bytes = 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t mark = n->marks[i];
        uint32_t class = cm_character_find(cm_combining_ranges, cm_combining_range_count, mark);
        uint32_t both = n->starter == 0 || class == blocked ? 0 : compose(n->starter, mark);
        if (both != 0) {
            n->starter = both;
        } else {
            bytes += point_put(out + bytes, mark);
            blocked = class;
        }
    }
    if (bytes > 0) {
        starter_flush(n);
        memmove(n->out + n->used, out, bytes);
        n->used += bytes;
    }
}

static void starter_add(struct cm_normalizer *n, uint32_t point)
{
    uint32_t both = n->starter != 0 ? compose(n->starter, point) : 0;
    if (both == 0) {
        starter_flush(n);
    }
    n->starter = both != 0 ? both : point;
}

static bool plain(const uint8_t *text, size_t size)
{
    static const uint8_t lead_after = 0xc0 | (PLAIN_LAST + 1) >> 6;
    for (size_t i = 0; i < size; i++) {
        if (text[i] >= lead_after) {
            return false;
        }
    }
    return true;
}

const uint8_t *cm_normalizer_run(struct cm_normalizer *n, const uint8_t *text, size_t size,
                                 size_t *ret_size)
{
    struct source source = {.text = text, .size = size};
    uint32_t point, class;
    CM_ASSERT(size <= n->bytes_max);
    *ret_size = size;
    if (plain(text, size)) {
        return text;
    }
    n->touched = size > n->touched ? size : n->touched;
    n->used = 0;
    n->starter = 0;
    while (peek(&source, &point, &class)) {
        if (class == 0) {
            starter_add(n, point);
            source.next++;
        }
        marks_add(n, marks_order(n, &source));
    }
    starter_flush(n);
    *ret_size = n->used;
    return n->out;
}
