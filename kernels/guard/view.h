/* Views of a text: what it looks like to a reader who is not fooled, with a map to its raw bytes.
 *
 *   folded    NFKC_Casefold (UAX #31, UTR #36): case, width, fonts, ligatures, ignorables gone
 *   words     UTS #39 skeleton of folded, marks dropped, lower case, everything that is no letter
 *             or digit one space; it begins and ends with a space
 *   squeezed  words without spaces, over a quotient alphabet: i l 1 ! |, o 0, e 3, a 4 @, s 5 $,
 *             t 7 +. Only long phrases may match there.
 *
 * A stream: any number of pushes, constant memory, linear time, nothing cut off. Integer only, the
 * same tables for every backend. Malformed UTF-8 becomes U+FFFD, one for each maximal subpart
 * (Unicode 15.0, section 3.9), and is counted. More than CM_VIEW_MARKS_MAX combining marks on one
 * base are dropped and counted: the one place where "folded" differs from NFKC_Casefold. */
#ifndef CASEMATE_KERNELS_GUARD_VIEW_H
#define CASEMATE_KERNELS_GUARD_VIEW_H

#include <stddef.h>
#include <stdint.h>

enum cm_view { CM_VIEW_FOLDED, CM_VIEW_WORDS, CM_VIEW_SQUEEZED, CM_VIEW_COUNT };

#define CM_VIEW_RING      2048u
#define CM_VIEW_LOOK_BACK 1024u /* bytes before the new ones that the map still knows */
#define CM_VIEW_MARKS_MAX 30u   /* as Stream-Safe Text (UAX #15) */

struct cm_view_span { /* raw offsets of the character that a byte came from, and of its end */
    uint32_t start, end;
};

/* One view's latest bytes, by position modulo CM_VIEW_RING. */
struct cm_view_ring {
    uint64_t end;  /* positions made so far */
    uint64_t sunk; /* positions that the sink has seen */
    uint8_t bytes[CM_VIEW_RING];
    struct cm_view_span spans[CM_VIEW_RING];
};

struct cm_view_counts {
    uint64_t malformed; /* maximal subparts replaced */
    uint64_t ignorable; /* default-ignorables dropped */
    uint64_t bidi;      /* bidirectional controls among them */
    uint64_t marks;     /* combining marks over the cap */
};

/* Positions from..end-1 of the view are new. */
typedef void (*cm_view_sink)(void *context, enum cm_view view, const struct cm_view_ring *ring,
                             uint64_t from);
/* A default-ignorable code point, before it is dropped. */
typedef void (*cm_view_tap)(void *context, uint32_t point, uint32_t start, uint32_t end);

struct cm_view_point {
    uint32_t point, start, end;
    uint32_t combining;
};

struct cm_views {
    cm_view_sink sink;
    cm_view_tap tap; /* may be NULL */
    void *context;
    struct cm_view_counts counts;
    /* UTF-8: a sequence under way */
    uint32_t partial, partial_start, partial_end;
    uint8_t missing, least, most;
    /* canonical order: a starter, if any, and its marks */
    uint32_t held_count;
    struct cm_view_point held[1 + CM_VIEW_MARKS_MAX];
    /* composition: a starter, if any, and what did not compose with it */
    uint32_t composed_count;
    struct cm_view_point composed[2 + CM_VIEW_MARKS_MAX];
    struct cm_view_ring rings[CM_VIEW_COUNT];
};

void cm_views_begin(struct cm_views *views, cm_view_sink sink, cm_view_tap tap, void *context);
/* Bytes that stand at raw offset `base`, or one byte that came from `span`. */
void cm_views_push(struct cm_views *views, const uint8_t *bytes, size_t size, uint32_t base);
void cm_views_push_byte(struct cm_views *views, uint32_t byte, struct cm_view_span span);
/* The last bytes go to the sink. */
void cm_views_end(struct cm_views *views);

#endif
