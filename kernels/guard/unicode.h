/* What the views know of Unicode 15.0: two-stage tables, blocks of 128 code points, made by
 * tests/guard/make_unicode.py. Plain arrays, so that every backend reads the same. */
#ifndef CASEMATE_KERNELS_GUARD_UNICODE_H
#define CASEMATE_KERNELS_GUARD_UNICODE_H

#include <stdint.h>

#define CM_UNICODE_MARK      1u  /* Mn, Me */
#define CM_UNICODE_WORD      2u  /* letters, numbers, spacing marks */
#define CM_UNICODE_IGNORABLE 4u  /* Default_Ignorable_Code_Point */
#define CM_UNICODE_BIDI      8u  /* Bidi_Control */
#define CM_UNICODE_BACK      16u /* may compose with what stands before it (NFC_QC=Maybe) */

struct cm_unicode_kind {
    uint8_t combining; /* Canonical_Combining_Class; 0: a starter */
    uint8_t flags;
};

struct cm_unicode_pair {
    uint32_t first, second, composed;
};

/* Expansions: a count, then code points. Entry 0 means "as it is". */
extern const uint32_t cm_unicode_pool[];
/* NFKC_Casefold, then full canonical decomposition, not yet in canonical order. Hangul apart. */
extern const uint8_t cm_unicode_fold_index[];
extern const uint16_t cm_unicode_fold[];
/* UTS #39 prototypes, decomposed. */
extern const uint8_t cm_unicode_look_index[];
extern const uint16_t cm_unicode_look[];
extern const uint8_t cm_unicode_kind_index[];
extern const uint8_t cm_unicode_kind[];
extern const struct cm_unicode_kind cm_unicode_kinds[];
/* Primary composites in order of (first, second). Hangul apart. */
extern const struct cm_unicode_pair cm_unicode_pairs[];
extern const uint32_t cm_unicode_pair_count;

/* What two code points compose to, by cm_unicode_pairs and by Hangul's arithmetic (UAX #15). 0:
 * they do not. */
uint32_t cm_unicode_compose(uint32_t first, uint32_t second);
/* A Hangul syllable's two or three letters; 0: it is none. */
uint32_t cm_unicode_hangul_decompose(uint32_t point, uint32_t ret_letters[3]);

#define CM_UNICODE_ENTRY(table, point)                                                             \
    cm_unicode_##table[((uint32_t)cm_unicode_##table##_index[(point) >> 7] << 7) | ((point)&127u)]

#endif
