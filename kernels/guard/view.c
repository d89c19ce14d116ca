/* Raw bytes → code points → folded and decomposed → canonical order → the views. */
#include "kernels/guard/view.h"

#include <stdbool.h>
#include <string.h>

#include "kernels/guard/unicode.h"
#include "runtime/base/guard_pack.h"

#define REPLACEMENT 0xFFFDu
#define SINK_BYTES  512u /* new bytes of a view that make it sink */
#define RUN_BYTES   256u /* ASCII bytes between two looks at that; two view bytes each at most */
_Static_assert(SINK_BYTES + 2 * RUN_BYTES + CM_VIEW_LOOK_BACK <= CM_VIEW_RING, "the ring holds it");

/* ------------------------------------------------------------------ into the rings */

static void sink(struct cm_views *views, enum cm_view view)
{
    struct cm_view_ring *ring = &views->rings[view];
    if (ring->end > ring->sunk) {
        views->sink(views->context, view, ring, ring->sunk);
        ring->sunk = ring->end;
    }
}

static void sink_full(struct cm_views *views)
{
    for (enum cm_view view = 0; view < CM_VIEW_COUNT; view++) {
        if (views->rings[view].end - views->rings[view].sunk >= SINK_BYTES) {
            sink(views, view);
        }
    }
}

/* Write a byte; whether it counts is the caller's to say, so that fast paths need not branch. */
static inline void byte_set(struct cm_view_ring *ring, uint32_t byte, uint32_t start, uint32_t end)
{
    uint32_t at = (uint32_t)ring->end & (CM_VIEW_RING - 1);
    ring->bytes[at] = (uint8_t)byte;
    ring->spans[at] = (struct cm_view_span){start, end};
}

static void byte_put(struct cm_view_ring *ring, uint32_t byte, uint32_t start, uint32_t end)
{
    byte_set(ring, byte, start, end);
    ring->end++;
}

static void point_put(struct cm_view_ring *ring, uint32_t point, uint32_t start, uint32_t end)
{
    if (point < 0x80) {
        byte_put(ring, point, start, end);
        return;
    }
    if (point < 0x800) {
        byte_put(ring, 0xC0 | point >> 6, start, end);
    } else {
        if (point < 0x10000) {
            byte_put(ring, 0xE0 | point >> 12, start, end);
        } else {
            byte_put(ring, 0xF0 | point >> 18, start, end);
            byte_put(ring, 0x80 | (point >> 12 & 63), start, end);
        }
        byte_put(ring, 0x80 | (point >> 6 & 63), start, end);
    }
    byte_put(ring, 0x80 | (point & 63), start, end);
}

/* ------------------------------------------------------------------ words and squeezed */

static inline void ascii_words(struct cm_views *views, uint32_t c, uint32_t start, uint32_t end)
{
    struct cm_view_ring *words = &views->rings[CM_VIEW_WORDS];
    struct cm_view_ring *squeezed = &views->rings[CM_VIEW_SQUEEZED];
    uint32_t word = (uint8_t)cm_guard_word_bytes[c], bare = (uint8_t)cm_guard_squeezed_bytes[c];
    uint32_t last = words->bytes[(uint32_t)(words->end - 1) & (CM_VIEW_RING - 1)];
    byte_set(words, word, start, end);
    words->end += !(word == ' ' && last == ' ');
    byte_set(squeezed, bare, start, end);
    squeezed->end += bare != 0;
    if (c == 'm') {
        byte_put(words, 'n', start, end);
        byte_put(squeezed, 'n', start, end);
    }
}

/* Letters that NFKC leaves alone: negative circled, negative squared, regional indicators. */
static uint32_t letter_of(uint32_t point)
{
    static const uint32_t alphabets[] = {0x1F150, 0x1F170, 0x1F1E6};
    for (uint32_t i = 0; i < 3; i++) {
        if (point - alphabets[i] < 26) {
            return 'a' + point - alphabets[i];
        }
    }
    return point;
}

static uint32_t flags_of(uint32_t point)
{
    return cm_unicode_kinds[CM_UNICODE_ENTRY(kind, point)].flags;
}

/* A decomposed code point by its prototype. */
static void words_put(struct cm_views *views, const struct cm_view_point *in)
{
    uint32_t point = letter_of(in->point);
    if (point < 0x80) {
        ascii_words(views, point, in->start, in->end);
        return;
    }
    if ((flags_of(point) & CM_UNICODE_MARK) != 0) {
        return;
    }
    uint32_t entry = CM_UNICODE_ENTRY(look, point);
    uint32_t count = entry != 0 ? cm_unicode_pool[entry] : 1;
    const uint32_t *look = entry != 0 ? &cm_unicode_pool[entry + 1] : &point;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t flags = flags_of(look[i]);
        uint32_t lower = look[i] - 'A' < 26 ? look[i] + 32 : look[i];
        if ((flags & CM_UNICODE_MARK) != 0) {
            continue;
        }
        if (lower < 0x80 || (flags & CM_UNICODE_WORD) == 0) {
            ascii_words(views, lower < 0x80 ? lower : ' ', in->start, in->end);
        } else {
            point_put(&views->rings[CM_VIEW_WORDS], look[i], in->start, in->end);
            point_put(&views->rings[CM_VIEW_SQUEEZED], look[i], in->start, in->end);
        }
    }
}

/* ------------------------------------------------------------------ composition (UAX #15) */

static void composed_flush(struct cm_views *views)
{
    for (uint32_t i = 0; i < views->composed_count; i++) {
        const struct cm_view_point *p = &views->composed[i];
        point_put(&views->rings[CM_VIEW_FOLDED], p->point, p->start, p->end);
    }
    views->composed_count = 0;
}

/* The next code point in canonical order. It is blocked from the starter by anything between that
 * has a class not below its own. */
static void composed_add(struct cm_views *views, const struct cm_view_point *in)
{
    struct cm_view_point *starter = &views->composed[0];
    uint32_t count = views->composed_count;
    bool blocked = count == 0 || starter->combining != 0 ||
                   (count > 1 && views->composed[count - 1].combining >= in->combining);
    uint32_t kind = CM_UNICODE_ENTRY(kind, in->point);
    if (!blocked && (cm_unicode_kinds[kind].flags & CM_UNICODE_BACK) != 0) {
        uint32_t both = cm_unicode_compose(starter->point, in->point);
        if (both != 0) {
            starter->point = both;
            starter->end = in->end > starter->end ? in->end : starter->end;
            return;
        }
    }
    if (in->combining == 0) {
        composed_flush(views);
    }
    views->composed[views->composed_count++] = *in;
}

/* ------------------------------------------------------------------ canonical order */

static void held_flush(struct cm_views *views)
{
    for (uint32_t i = 0; i < views->held_count; i++) {
        composed_add(views, &views->held[i]);
        words_put(views, &views->held[i]);
    }
    if (views->held_count > 0 && views->held[0].combining != 0) {
        composed_flush(views); /* marks without a base */
    }
    views->held_count = 0;
    sink_full(views);
}

static void decomposed_add(struct cm_views *views, uint32_t point, uint32_t start, uint32_t end)
{
    uint32_t combining = cm_unicode_kinds[CM_UNICODE_ENTRY(kind, point)].combining;
    struct cm_view_point next = {point, start, end, combining};
    if (combining == 0) {
        held_flush(views);
    }
    uint32_t at = views->held_count;
    if (at == CM_VIEW_MARKS_MAX + (views->held[0].combining == 0)) {
        views->counts.marks++;
        return;
    }
    for (; at > 0 && views->held[at - 1].combining > combining; at--) {
        views->held[at] = views->held[at - 1];
    }
    views->held[at] = next;
    views->held_count++;
}

static void point_take(struct cm_views *views, uint32_t point, uint32_t start, uint32_t end)
{
    uint32_t flags = flags_of(point);
    if ((flags & CM_UNICODE_IGNORABLE) != 0) {
        views->counts.ignorable++;
        views->counts.bidi += (flags & CM_UNICODE_BIDI) != 0;
        if (views->tap != NULL) {
            views->tap(views->context, point, start, end);
        }
    }
    uint32_t entry = CM_UNICODE_ENTRY(fold, point);
    if (entry == 0) {
        uint32_t letters[3] = {point};
        uint32_t count = cm_unicode_hangul_decompose(point, letters);
        for (uint32_t i = 0; i < (count > 0 ? count : 1); i++) {
            decomposed_add(views, letters[i], start, end);
        }
        return;
    }
    for (uint32_t i = 0; i < cm_unicode_pool[entry]; i++) {
        decomposed_add(views, cm_unicode_pool[entry + 1 + i], start, end);
    }
}

/* ------------------------------------------------------------------ UTF-8 */

static void partial_replace(struct cm_views *views)
{
    views->missing = 0;
    views->counts.malformed++;
    point_take(views, REPLACEMENT, views->partial_start, views->partial_end);
}

/* The first byte of a sequence, by table 3-7 of the standard. */
static void lead_take(struct cm_views *views, uint32_t byte, uint32_t start, uint32_t end)
{
    views->partial_start = start;
    views->partial_end = end;
    views->least = 0x80;
    views->most = 0xBF;
    if (byte < 0x80) {
        point_take(views, byte, start, end);
    } else if (byte >= 0xC2 && byte <= 0xDF) {
        views->missing = 1;
        views->partial = byte & 0x1F;
    } else if (byte >= 0xE0 && byte <= 0xEF) {
        views->missing = 2;
        views->partial = byte & 0x0F;
        views->least = byte == 0xE0 ? 0xA0 : 0x80;
        views->most = byte == 0xED ? 0x9F : 0xBF;
    } else if (byte >= 0xF0 && byte <= 0xF4) {
        views->missing = 3;
        views->partial = byte & 0x07;
        views->least = byte == 0xF0 ? 0x90 : 0x80;
        views->most = byte == 0xF4 ? 0x8F : 0xBF;
    } else {
        partial_replace(views);
    }
}

static void byte_take(struct cm_views *views, uint32_t byte, uint32_t start, uint32_t end)
{
    if (views->missing > 0 && (byte < views->least || byte > views->most)) {
        partial_replace(views);
    }
    if (views->missing == 0) {
        lead_take(views, byte, start, end);
        return;
    }
    views->partial = views->partial << 6 | (byte & 0x3F);
    views->partial_end = end;
    views->least = 0x80;
    views->most = 0xBF;
    if (--views->missing == 0) {
        point_take(views, views->partial, views->partial_start, end);
    }
}

/* ------------------------------------------------------------------ pushes */

static size_t ascii_run(const uint8_t *bytes, size_t size)
{
    size_t at = 0;
    uint64_t eight;
    for (; at + sizeof(eight) <= size; at += sizeof(eight)) {
        memcpy(&eight, bytes + at, sizeof(eight));
        if ((eight & 0x8080808080808080u) != 0) {
            break;
        }
    }
    while (at < size && bytes[at] < 0x80) {
        at++;
    }
    return at;
}

struct run { /* a ring's end, in a register */
    struct cm_view_ring *ring;
    uint64_t end;
};

static inline void run_put(struct run *run, uint32_t byte, uint32_t start, bool counts)
{
    uint32_t at = (uint32_t)run->end & (CM_VIEW_RING - 1);
    run->ring->bytes[at] = (uint8_t)byte;
    run->ring->spans[at] = (struct cm_view_span){start, start + 1};
    run->end += counts;
}

/* As point_take for each, without what ASCII does not need: it neither decomposes nor combines. The
 * last one is left to the caller: a mark may follow it. */
static void ascii_take(struct cm_views *views, const uint8_t *bytes, size_t size, uint32_t base)
{
    held_flush(views);
    composed_flush(views);
    struct cm_view_ring *rings = views->rings;
    struct run folded = {&rings[CM_VIEW_FOLDED], rings[CM_VIEW_FOLDED].end};
    struct run words = {&rings[CM_VIEW_WORDS], rings[CM_VIEW_WORDS].end};
    struct run squeezed = {&rings[CM_VIEW_SQUEEZED], rings[CM_VIEW_SQUEEZED].end};
    uint32_t last = words.ring->bytes[(uint32_t)(words.end - 1) & (CM_VIEW_RING - 1)];
    for (size_t i = 0; i < size; i++) {
        uint32_t start = base + (uint32_t)i, c = bytes[i];
        c += (c - 'A' < 26) * 32u;
        uint32_t word = (uint8_t)cm_guard_word_bytes[c], bare = (uint8_t)cm_guard_squeezed_bytes[c];
        run_put(&folded, c, start, true);
        run_put(&words, word, start, word != ' ' || last != ' ');
        run_put(&squeezed, bare, start, bare != 0);
        last = word;
        if (c == 'm') {
            run_put(&words, 'n', start, true);
            run_put(&squeezed, 'n', start, true);
        }
    }
    folded.ring->end = folded.end;
    words.ring->end = words.end;
    squeezed.ring->end = squeezed.end;
    sink_full(views);
}

void cm_views_push(struct cm_views *views, const uint8_t *bytes, size_t size, uint32_t base)
{
    size_t at = 0;
    while (at < size) {
        size_t left = size - at < RUN_BYTES ? size - at : RUN_BYTES;
        size_t run = views->missing == 0 ? ascii_run(bytes + at, left) : 0;
        if (run > 1) {
            ascii_take(views, bytes + at, run - 1, base + (uint32_t)at);
            at += run - 1;
        }
        byte_take(views, bytes[at], base + (uint32_t)at, base + (uint32_t)at + 1);
        at++;
    }
}

void cm_views_push_byte(struct cm_views *views, uint32_t byte, struct cm_view_span span)
{
    byte_take(views, byte, span.start, span.end);
}

void cm_views_begin(struct cm_views *views, cm_view_sink to, cm_view_tap tap, void *context)
{
    for (enum cm_view view = 0; view < CM_VIEW_COUNT; view++) {
        views->rings[view].end = views->rings[view].sunk = 0;
    }
    views->sink = to;
    views->tap = tap;
    views->context = context;
    views->counts = (struct cm_view_counts){0};
    views->missing = 0;
    views->held_count = views->composed_count = 0;
    byte_put(&views->rings[CM_VIEW_WORDS], ' ', 0, 0);
}

void cm_views_end(struct cm_views *views)
{
    if (views->missing > 0) {
        partial_replace(views);
    }
    uint32_t end = views->partial_end;
    held_flush(views);
    composed_flush(views);
    ascii_words(views, ' ', end, end);
    for (enum cm_view view = 0; view < CM_VIEW_COUNT; view++) {
        sink(views, view);
    }
}
