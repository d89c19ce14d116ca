/* The GPT-2 pattern by hand, over Unicode categories:
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * (Radford et al. 2019). SmolLM first cuts every number character off by itself. Qwen 2 and Llama 3
 * have a later one (numbers in ones, in threes at most):
 *     (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n]*|
 *     \s*[\r\n]+|\s+(?!\S)|\s+
 * Tekken (tokenizer.json of Mistral-Nemo-2407) and GPT-4o (o200k_base of tiktoken) cut words at
 * their capitals too: with F for Lu, Lt, Lm, Lo and M, and L for Ll, Lm, Lo and M,
 *     [^\r\n\p{L}\p{N}]?F*L+e?|[^\r\n\p{L}\p{N}]?F+L*e?|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n/]*|
 *     \s*[\r\n]+|\s+(?!\S)|\s+
 * where e is GPT-4o's (?i:'s|'t|'re|'ve|'m|'ll|'d); Tekken has none. */
#include "runtime/worker/split.h"

#include <stdbool.h>
#include <string.h>
#include <strings.h>

#include "loader/package/manifest.h"

uint32_t cm_character_find(const struct cm_character_range *ranges, uint32_t count,
                           uint32_t code_point)
{
    uint32_t low = 0, high = count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (code_point > ranges[middle].last) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && code_point >= ranges[low].first ? ranges[low].kind : 0;
}

enum cm_character cm_character_kind(uint32_t code_point)
{
    return (enum cm_character)cm_character_find(cm_character_ranges, cm_character_range_count,
                                                code_point);
}

uint32_t cm_point_read(const uint8_t *text, size_t size, size_t *ret_bytes)
{
    uint8_t lead = text[0];
    size_t bytes = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    bytes = bytes > size ? size : bytes;
    uint32_t point = bytes == 1 ? lead : lead & (0x7fu >> bytes);
    for (size_t i = 1; i < bytes; i++) {
        point = point << 6 | (text[i] & 0x3fu);
    }
    *ret_bytes = bytes;
    return point;
}

/* Kind and size of the character at `at`; the text is valid UTF-8. */
static enum cm_character kind_at(const uint8_t *text, size_t size, size_t at, size_t *ret_bytes)
{
    if (at >= size) {
        *ret_bytes = 0;
        return CM_CHARACTER_END;
    }
    return cm_character_kind(cm_point_read(text + at, size - at, ret_bytes));
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

/* In any case: U+017F, the long s, is a lower case of S. */
static size_t contraction_size(const uint8_t *text, size_t size, bool any_case)
{
    if (any_case && size >= 3 && memcmp(text, "'\xc5\xbf", 3) == 0) {
        return 3;
    }
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        size_t bytes = strlen(endings[i]);
        if (bytes <= size && (any_case ? strncasecmp((const char *)text, endings[i], bytes) == 0
                                       : memcmp(text, endings[i], bytes) == 0)) {
            return bytes;
        }
    }
    return 0;
}

/* Does the text end at `at` for what stands before it? SmolLM's numbers are cut off before all
 * else, so a text ends at one as it does at its end. */
static bool ends_at(const uint8_t *text, size_t size, size_t at, bool numbers_apart)
{
    size_t bytes;
    return at == size || (numbers_apart && kind_at(text, size, at, &bytes) == CM_CHARACTER_NUMBER);
}

/* A run of white space: the end, but for a last one that is left to what follows. */
static size_t spaces_end(const uint8_t *text, size_t size, bool numbers_apart)
{
    size_t last, end = run_end(text, size, 0, CM_CHARACTER_SPACE, &last);
    return !ends_at(text, size, end, numbers_apart) && last > 0 ? last : end;
}

/* numbers_apart: each number is a piece of its own. */
static size_t gpt2_next(const uint8_t *text, size_t size, bool numbers_apart)
{
    size_t bytes, next_bytes, last;
    size_t contraction = contraction_size(text, size, false);
    if (contraction > 0) {
        return contraction;
    }
    enum cm_character kind = kind_at(text, size, 0, &bytes);
    if (kind != CM_CHARACTER_SPACE) {
        const bool one = numbers_apart && kind == CM_CHARACTER_NUMBER;
        return one ? bytes : run_end(text, size, 0, kind, &last);
    }
    enum cm_character next = kind_at(text, size, bytes, &next_bytes);
    if (text[0] == ' ' && next != CM_CHARACTER_SPACE &&
        !ends_at(text, size, bytes, numbers_apart)) {
        return run_end(text, size, bytes, next, &last);
    }
    return spaces_end(text, size, numbers_apart);
}

/* White space up to the last line end in it; 0: there is none. */
static size_t lines_end(const uint8_t *text, size_t size)
{
    size_t last, end = run_end(text, size, 0, CM_CHARACTER_SPACE, &last);
    while (end > 0 && text[end - 1] != '\n' && text[end - 1] != '\r') {
        end--;
    }
    return end;
}

/* The numbers at the start, `greatest` at most. */
static size_t numbers_end(const uint8_t *text, size_t size, uint32_t greatest)
{
    size_t at = 0, bytes;
    for (uint32_t i = 0; i < greatest && kind_at(text, size, at, &bytes) == CM_CHARACTER_NUMBER;
         i++) {
        at += bytes;
    }
    return at;
}

/* What sets the later patterns apart. */
struct later {
    uint32_t numbers; /* in a piece, at most */
    bool capitals;    /* cut words; else contractions do */
    bool endings;     /* a word takes a contraction along */
};

/* What comes after words: numbers, other characters (with capitals, slashes too follow them), white
 * space. */
static size_t rest_next(const struct later *l, const uint8_t *text, size_t size)
{
    size_t bytes, next_bytes, last, end;
    enum cm_character kind = kind_at(text, size, 0, &bytes);
    enum cm_character next = kind_at(text, size, bytes, &next_bytes);
    if (kind == CM_CHARACTER_NUMBER) {
        return numbers_end(text, size, l->numbers);
    }
    if (kind == CM_CHARACTER_OTHER || (text[0] == ' ' && next == CM_CHARACTER_OTHER)) {
        end =
            run_end(text, size, kind == CM_CHARACTER_OTHER ? 0 : bytes, CM_CHARACTER_OTHER, &last);
        while (end < size &&
               (text[end] == '\r' || text[end] == '\n' || (l->capitals && text[end] == '/'))) {
            end++;
        }
        return end;
    }
    end = lines_end(text, size);
    return end > 0 ? end : spaces_end(text, size, false);
}

/* The end of a word; a character may stand before it that is no letter, number or line end. 0:
 * there is none. */
static size_t letters_next(const uint8_t *text, size_t size)
{
    size_t bytes, next_bytes, last;
    enum cm_character kind = kind_at(text, size, 0, &bytes);
    bool line_end = text[0] == '\r' || text[0] == '\n';
    if (kind == CM_CHARACTER_LETTER) {
        return run_end(text, size, 0, CM_CHARACTER_LETTER, &last);
    }
    return kind != CM_CHARACTER_NUMBER && !line_end &&
                   kind_at(text, size, bytes, &next_bytes) == CM_CHARACTER_LETTER
               ? run_end(text, size, bytes, CM_CHARACTER_LETTER, &last)
               : 0;
}

/* Runs of a word that a character may stand in (enum cm_word); 0: none, or the end of the text. */
static uint32_t word_at(const uint8_t *text, size_t size, size_t at, size_t *ret_bytes)
{
    *ret_bytes = 0;
    return at < size ? cm_character_find(cm_word_ranges, cm_word_range_count,
                                         cm_point_read(text + at, size - at, ret_bytes))
                     : 0;
}

/* F*L+ at `at`: its end, 0: there is none. F* gives back to L+ what it may: the last of F that is L
 * too. */
static size_t small_end(const uint8_t *text, size_t size, size_t at)
{
    size_t bytes, given = 0;
    uint32_t runs;
    while (((runs = word_at(text, size, at, &bytes)) & CM_WORD_FIRST) != 0) {
        at += bytes;
        given = (runs & CM_WORD_LAST) != 0 ? at : given;
    }
    if ((runs & CM_WORD_LAST) == 0) {
        return given;
    }
    while ((word_at(text, size, at, &bytes) & CM_WORD_LAST) != 0) {
        at += bytes;
    }
    return at;
}

/* F+L* at `at`, where F*L+ is not: no L follows. */
static size_t capitals_end(const uint8_t *text, size_t size, size_t at)
{
    size_t bytes, end = at;
    while ((word_at(text, size, end, &bytes) & CM_WORD_FIRST) != 0) {
        end += bytes;
    }
    return end > at ? end : 0;
}

/* Both alternatives, each first with a character before it: that one may be a mark, which is part
 * of a word, too. */
static size_t capitals_next(const struct later *l, const uint8_t *text, size_t size)
{
    size_t bytes, end = 0;
    enum cm_character kind = kind_at(text, size, 0, &bytes);
    const bool before = kind != CM_CHARACTER_LETTER && kind != CM_CHARACTER_NUMBER &&
                        text[0] != '\r' && text[0] != '\n';
    size_t (*const alternatives[])(const uint8_t *, size_t, size_t) = {small_end, capitals_end};
    for (size_t i = 0; end == 0 && i < 2; i++) {
        end = before ? alternatives[i](text, size, bytes) : 0;
        end = end == 0 ? alternatives[i](text, size, 0) : end;
    }
    return end > 0 && l->endings ? end + contraction_size(text + end, size - end, true) : end;
}

static size_t later_next(const struct later *l, const uint8_t *text, size_t size)
{
    size_t end = l->capitals ? 0 : contraction_size(text, size, true);
    if (end == 0) {
        end = l->capitals ? capitals_next(l, text, size) : letters_next(text, size);
    }
    return end > 0 ? end : rest_next(l, text, size);
}

size_t cm_split_next(uint32_t split, const uint8_t *text, size_t size)
{
    static const struct later laters[] = {
        [CM_SPLIT_QWEN2] = {1, false, false},  [CM_SPLIT_QWEN2_NFC] = {1, false, false},
        [CM_SPLIT_LLAMA3] = {3, false, false}, [CM_SPLIT_TEKKEN] = {1, true, false},
        [CM_SPLIT_GPT4O] = {3, true, true},
    };
    if (split < sizeof(laters) / sizeof(laters[0]) && laters[split].numbers > 0) {
        return later_next(&laters[split], text, size);
    }
    return gpt2_next(text, size, split == CM_SPLIT_SMOLLM);
}
