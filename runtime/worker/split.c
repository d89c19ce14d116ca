/* The GPT-2 pattern by hand, over Unicode categories:
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * (Radford et al. 2019). SmolLM first cuts every number character off by itself. */
#include "runtime/worker/split.h"

#include <stdbool.h>
#include <string.h>

#include "loader/package/manifest.h"

enum cm_character cm_character_kind(uint32_t code_point)
{
    uint32_t low = 0, high = cm_character_range_count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (code_point > cm_character_ranges[middle].last) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    bool inside = low < cm_character_range_count && code_point >= cm_character_ranges[low].first;
    return inside ? (enum cm_character)cm_character_ranges[low].kind : CM_CHARACTER_OTHER;
}

/* Kind and size of the character at `at`; the text is valid UTF-8. */
static enum cm_character kind_at(const uint8_t *text, size_t size, size_t at, size_t *ret_bytes)
{
    if (at >= size) {
        *ret_bytes = 0;
        return CM_CHARACTER_END;
    }
    uint8_t lead = text[at];
    size_t bytes = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    bytes = bytes > size - at ? size - at : bytes;
    uint32_t point = bytes == 1 ? lead : lead & (0x7fu >> bytes);
    for (size_t i = 1; i < bytes; i++) {
        point = point << 6 | (text[at + i] & 0x3fu);
    }
    *ret_bytes = bytes;
    return cm_character_kind(point);
}

/* End of the run of one kind that starts at `at`. */
static size_t run_end(const uint8_t *text, size_t size, size_t at, enum cm_character kind,
                      size_t *ret_last)
{
    size_t bytes;
    *ret_last = at;
    while (kind_at(text, size, at, &bytes) == kind) {
        *ret_last = at;
        at += bytes;
    }
    return at;
}

static size_t contraction_size(const uint8_t *text, size_t size)
{
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        size_t bytes = strlen(endings[i]);
        if (bytes <= size && memcmp(text, endings[i], bytes) == 0) {
            return bytes;
        }
    }
    return 0;
}

static size_t gpt2_next(const uint8_t *text, size_t size)
{
    size_t bytes, next_bytes, last;
    size_t contraction = contraction_size(text, size);
    if (contraction > 0) {
        return contraction;
    }
    enum cm_character kind = kind_at(text, size, 0, &bytes);
    if (kind != CM_CHARACTER_SPACE) {
        return run_end(text, size, 0, kind, &last);
    }
    enum cm_character next = kind_at(text, size, bytes, &next_bytes);
    if (text[0] == ' ' && next != CM_CHARACTER_SPACE && next != CM_CHARACTER_END) {
        return run_end(text, size, bytes, next, &last);
    }
    size_t end = run_end(text, size, 0, CM_CHARACTER_SPACE, &last);
    /* Before something else, the run leaves its last space to that, unless it is all there is. */
    return end < size && last > 0 ? last : end;
}

size_t cm_split_next(uint32_t split, const uint8_t *text, size_t size)
{
    if (split == CM_SPLIT_SMOLLM) {
        size_t at = 0, bytes;
        enum cm_character kind;
        while ((kind = kind_at(text, size, at, &bytes)) != CM_CHARACTER_END &&
               kind != CM_CHARACTER_NUMBER) {
            at += bytes;
        }
        if (at == 0) {
            return bytes;
        }
        size = at;
    }
    return gpt2_next(text, size);
}
