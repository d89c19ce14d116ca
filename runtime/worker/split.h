/* Pre-tokenizers: cut text into the pieces that byte-pair merges never cross. */
#ifndef CASEMATE_RUNTIME_WORKER_SPLIT_H
#define CASEMATE_RUNTIME_WORKER_SPLIT_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/guard/unicode.h"

enum cm_character { /* everything else is 0 */
                    CM_CHARACTER_OTHER = 0,
                    CM_CHARACTER_LETTER,
                    CM_CHARACTER_NUMBER,
                    CM_CHARACTER_SPACE,
                    CM_CHARACTER_END, /* past the end of the text */
};

struct cm_character_range {
    uint32_t first, last;
    uint32_t kind; /* enum cm_character */
};
extern const struct cm_character_range cm_character_ranges[];
extern const uint32_t cm_character_range_count;

enum cm_character cm_character_kind(uint32_t code_point);

/* Where in a word a character stands for patterns that cut words at their capitals: in its first
 * run, in its last, or in either. */
enum cm_word {
    CM_WORD_FIRST = 1, /* Lu, Lt */
    CM_WORD_LAST = 2,  /* Ll */
    CM_WORD_BOTH = 3,  /* Lm, Lo, M */
};
extern const struct cm_character_range cm_word_ranges[];
extern const uint32_t cm_word_range_count;

/* For form C (normal.c): canonical combining classes that are not 0; canonical decompositions in
 * order of what they compose (second 0: of one). */
extern const struct cm_character_range cm_combining_ranges[];
extern const uint32_t cm_combining_range_count;
extern const struct cm_unicode_pair cm_canonical[];
extern const uint32_t cm_canonical_count;

/* The kind of the range that a code point lies in; 0: none. */
uint32_t cm_character_find(const struct cm_character_range *ranges, uint32_t count,
                           uint32_t code_point);

/* The code point at the start of valid UTF-8 text that is not empty, and its bytes. */
uint32_t cm_point_read(const uint8_t *text, size_t size, size_t *ret_bytes);

/* Size of the next piece at the start of valid UTF-8 text, 1 .. size. split: enum
 * cm_manifest_split.
 */
size_t cm_split_next(uint32_t split, const uint8_t *text, size_t size);

#endif
