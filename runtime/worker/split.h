/* Pre-tokenizers: cut text into the pieces that byte-pair merges never cross. */
#ifndef CASEMATE_RUNTIME_WORKER_SPLIT_H
#define CASEMATE_RUNTIME_WORKER_SPLIT_H

#include <stddef.h>
#include <stdint.h>

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

/* Size of the next piece at the start of valid UTF-8 text, 1 .. size. split: enum
 * cm_manifest_split.
 */
size_t cm_split_next(uint32_t split, const uint8_t *text, size_t size);

#endif
