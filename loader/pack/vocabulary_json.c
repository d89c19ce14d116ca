/* tokenizer.json of the `tokenizers` library: BPE over bytes, or over characters with byte
 * fallback. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loader/pack/directory.h"

#define SPARE_BYTES 16u /* of the text of a token that the tokenizer does not have */

static enum cm_status refuse(struct cm_error *err, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-DIR-TOKENIZER", "tokenizer.json: %s", what);
}

static bool is(const json_t *object, const char *key, const char *wanted)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text != NULL && strcmp(text, wanted) == 0;
}

/* The part of that type: the value itself, or one of a Sequence's. NULL: there is none. */
static const json_t *part_find(const json_t *value, const char *list, const char *type)
{
    size_t i;
    json_t *part;
    if (is(value, "type", type)) {
        return value;
    }
    json_array_foreach(json_object_get(value, list), i, part)
    {
        if (is(part, "type", type)) {
            return part;
        }
    }
    return NULL;
}

#define LATER(numbers)                                                                             \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" numbers                    \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define FIRST "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LAST  "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define CAPITALS(ending, numbers)                                                                  \
    "[^\\r\\n\\p{L}\\p{N}]?" FIRST "*" LAST "+" ending "|[^\\r\\n\\p{L}\\p{N}]?" FIRST "+" LAST    \
    "*" ending "|\\p{N}" numbers "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* Which of our splits a byte-level pre-tokenizer is. */
static bool split_find(const json_t *tokenizer, uint32_t *ret_split)
{
    static const struct {
        const char *regex;
        uint32_t split;
    } patterns[] = {{LATER(""), CM_SPLIT_QWEN2},
                    {LATER("{1,3}"), CM_SPLIT_LLAMA3},
                    {CAPITALS("", ""), CM_SPLIT_TEKKEN},
                    {CAPITALS("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "{1,3}"), CM_SPLIT_GPT4O}};
    const json_t *pre = json_object_get(tokenizer, "pre_tokenizer");
    const json_t *level = part_find(pre, "pretokenizers", "ByteLevel");
    const json_t *digits = part_find(pre, "pretokenizers", "Digits");
    const json_t *split = part_find(pre, "pretokenizers", "Split");
    const size_t parts = json_array_size(json_object_get(pre, "pretokenizers"));
    if (level == NULL || json_is_true(json_object_get(level, "add_prefix_space")) ||
        (level != pre && parts != 1u + (digits != NULL) + (split != NULL))) {
        return false;
    }
    if (split != NULL) {
        const json_t *pattern = json_object_get(split, "pattern");
        const bool alone = digits == NULL && is(split, "behavior", "Isolated") &&
                           !json_is_true(json_object_get(split, "invert")) &&
                           json_is_false(json_object_get(level, "use_regex"));
        for (size_t i = 0; alone && i < sizeof(patterns) / sizeof(patterns[0]); i++) {
            if (is(pattern, "Regex", patterns[i].regex)) {
                *ret_split = patterns[i].split;
                return true;
            }
        }
        return false;
    }
    *ret_split = digits != NULL ? CM_SPLIT_SMOLLM : CM_SPLIT_GPT2;
    return json_is_true(json_object_get(level, "use_regex")) &&
           (digits == NULL || json_is_true(json_object_get(digits, "individual_digits")));
}

/* SentencePiece's spaces: a normalizer that puts one before each text between special tokens, or a
 * pre-tokenizer that can put one before what a prompt begins with alone. */
static enum cm_status spaces_find(const json_t *tokenizer, struct cm_vocabulary *v,
                                  struct cm_error *err)
{
    const json_t *normalizer = json_object_get(tokenizer, "normalizer");
    const json_t *pre = json_object_get(tokenizer, "pre_tokenizer");
    const json_t *meta = part_find(pre, "pretokenizers", "Metaspace");
    const bool before = part_find(normalizer, "normalizers", "Prepend") != NULL;
    if (meta == NULL && part_find(normalizer, "normalizers", "Replace") == NULL) {
        return refuse(err, "byte fallback without spaces that are replaced");
    }
    if (meta != NULL && ((normalizer != NULL && !json_is_null(normalizer)) ||
                         !is(meta, "replacement", "\xe2\x96\x81") ||
                         !json_is_false(json_object_get(meta, "split")))) {
        return refuse(err, "its Metaspace is not SentencePiece's, without a split");
    }
    v->split = before                                                 ? CM_SPLIT_SPACE_FIRST
               : meta != NULL && !is(meta, "prepend_scheme", "never") ? CM_SPLIT_SPACE_ONE
                                                                      : CM_SPLIT_WHOLE;
    return CM_OK;
}

/* No normalizer (a sequence of none is none), or form C before Qwen 2's split. */
static bool form_find(const json_t *normalizer, uint32_t *split)
{
    const json_t *parts = json_object_get(normalizer, "normalizers");
    const json_t *form = json_array_size(parts) == 1 ? json_array_get(parts, 0) : normalizer;
    if (normalizer == NULL || json_is_null(normalizer) ||
        (json_is_array(parts) && json_array_size(parts) == 0)) {
        return true;
    }
    if (!is(form, "type", "NFC") || *split != CM_SPLIT_QWEN2) {
        return false;
    }
    *split = CM_SPLIT_QWEN2_NFC;
    return true;
}

static enum cm_status kind_find(const json_t *tokenizer, const json_t *model,
                                struct cm_vocabulary *v, struct cm_error *err)
{
    if (!is(model, "type", "BPE")) {
        return refuse(err, "its model is not BPE");
    }
    if (json_is_true(json_object_get(model, "byte_fallback"))) {
        v->tokenizer = CM_TOKENIZER_SENTENCEPIECE;
        return spaces_find(tokenizer, v, err);
    }
    v->tokenizer = CM_TOKENIZER_BYTE_BPE;
    v->whole_pieces = json_is_true(json_object_get(model, "ignore_merges"));
    if (!split_find(tokenizer, &v->split)) {
        return refuse(err, "its pre-tokenizer is none of GPT-2's, SmolLM's, Qwen 2's, Llama 3's, "
                           "Tekken's, GPT-4o's");
    }
    return form_find(json_object_get(tokenizer, "normalizer"), &v->split)
               ? CM_OK
               : refuse(err, "its normalizer is not NFC before Qwen 2's pre-tokenizer");
}

static bool byte_spelling(const char *text)
{
    return strlen(text) == 6 && memcmp(text, "<0x", 3) == 0 && text[5] == '>';
}

static enum cm_status token_put(struct cm_vocabulary *v, const char *text, const json_t *id,
                                uint8_t kind, struct cm_error *err)
{
    json_int_t number = json_integer_value(id);
    if (!json_is_integer(id) || number < 0 || number >= (json_int_t)v->count || text == NULL) {
        return refuse(err, "a token's id is not one of the embedding's");
    }
    v->texts[number] = (struct cm_source_text){text, strlen(text)};
    v->kinds[number] = kind;
    return CM_OK;
}

static enum cm_status tokens_read(const json_t *tokenizer, const json_t *model,
                                  struct cm_vocabulary *v, struct cm_error *err)
{
    const char *text, *unknown = json_string_value(json_object_get(model, "unk_token"));
    const bool pieces = v->tokenizer == CM_TOKENIZER_SENTENCEPIECE;
    json_t *id, *added;
    size_t i;
    enum cm_status status = CM_OK;
    json_object_foreach(json_object_get(model, "vocab"), text, id)
    {
        bool is_unknown = unknown != NULL && strcmp(text, unknown) == 0;
        uint8_t kind = is_unknown                      ? CM_TOKEN_UNKNOWN
                       : pieces && byte_spelling(text) ? CM_TOKEN_BYTE
                                                       : CM_TOKEN_NORMAL;
        status = status == CM_OK ? token_put(v, text, id, kind, err) : status;
    }
    json_array_foreach(json_object_get(tokenizer, "added_tokens"), i, added)
    {
        text = json_string_value(json_object_get(added, "content"));
        bool special = json_is_true(json_object_get(added, "special"));
        bool is_unknown = unknown != NULL && text != NULL && strcmp(text, unknown) == 0;
        uint8_t kind = is_unknown ? CM_TOKEN_UNKNOWN : (special ? CM_TOKEN_CONTROL : CM_TOKEN_USER);
        status =
            status == CM_OK ? token_put(v, text, json_object_get(added, "id"), kind, err) : status;
    }
    return status;
}

/* A space at the start of a prompt alone, and tokens that cut texts in two: not what the host does.
 */
static enum cm_status first_check(const json_t *tokenizer, const struct cm_vocabulary *v,
                                  struct cm_error *err)
{
    const json_t *pre = json_object_get(tokenizer, "pre_tokenizer");
    const json_t *meta = part_find(pre, "pretokenizers", "Metaspace");
    if (meta != NULL && is(meta, "prepend_scheme", "first") &&
        memchr(v->kinds, CM_TOKEN_USER, v->count) != NULL) {
        return refuse(err, "prepend_scheme 'first' beside added tokens that are not special");
    }
    return CM_OK;
}

/* Entries of the embedding that no token uses. */
static enum cm_status spares_put(struct cm_vocabulary *v, struct cm_error *err)
{
    v->spare = calloc(v->count, SPARE_BYTES);
    if (v->spare == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "tokens");
    }
    for (uint32_t i = 0; i < v->count; i++) {
        if (v->kinds[i] == 0) {
            char *text = v->spare + (size_t)i * SPARE_BYTES;
            int size = snprintf(text, SPARE_BYTES, "[PAD%u]", i);
            v->texts[i] = (struct cm_source_text){text, (size_t)size};
            v->kinds[i] = CM_TOKEN_UNUSED;
        }
    }
    return CM_OK;
}

/* "a b", or ["a", "b"]. */
static bool merge_read(const json_t *value, struct cm_merge_text *ret)
{
    const char *left = json_string_value(json_array_get(value, 0));
    const char *right = json_string_value(json_array_get(value, 1));
    const char *text = json_string_value(value);
    const size_t size = json_string_length(value);
    if (left != NULL && right != NULL && json_array_size(value) == 2) {
        ret->left = (struct cm_source_text){left, strlen(left)};
        ret->right = (struct cm_source_text){right, strlen(right)};
        return true;
    }
    const char *space = text != NULL && size > 2 ? memchr(text + 1, ' ', size - 2) : NULL;
    if (space == NULL) {
        return false;
    }
    ret->left = (struct cm_source_text){text, (size_t)(space - text)};
    ret->right = (struct cm_source_text){space + 1, size - ret->left.size - 1};
    return true;
}

/* Is the begin token put before a text? tokenizer_config.json says it, or a template begins so. */
static bool begin_added(const json_t *tokenizer, const json_t *config,
                        const struct cm_vocabulary *v)
{
    const json_t *said = json_object_get(config, "add_bos_token");
    const json_t *post =
        part_find(json_object_get(tokenizer, "post_processor"), "processors", "TemplateProcessing");
    const json_t *first = json_array_get(json_object_get(post, "single"), 0);
    const json_t *special = json_object_get(first, "SpecialToken");
    const char *id = json_string_value(json_object_get(special, "id"));
    if (json_is_boolean(said)) {
        return json_is_true(said);
    }
    return id != NULL && v->begin < v->count && cm_source_text_is(v->texts[v->begin], id);
}

enum cm_status cm_vocabulary_json(const json_t *tokenizer, const json_t *config, uint32_t count,
                                  struct cm_vocabulary *v, struct cm_plan *plan,
                                  struct cm_error *err)
{
    const json_t *model = json_object_get(tokenizer, "model");
    const json_t *merges = json_object_get(model, "merges");
    const size_t merge_count = json_array_size(merges);
    enum cm_status status = merge_count <= CM_MANIFEST_MERGES_MAX
                                ? kind_find(tokenizer, model, v, err)
                                : refuse(err, "too many merges");
    if (status == CM_OK) {
        status = cm_vocabulary_new(count, (uint32_t)merge_count, v, err);
    }
    if (status == CM_OK) {
        status = tokens_read(tokenizer, model, v, err);
    }
    if (status == CM_OK) {
        status = first_check(tokenizer, v, err);
    }
    if (status == CM_OK) {
        status = spares_put(v, err);
    }
    for (size_t i = 0; status == CM_OK && i < merge_count; i++) {
        if (!merge_read(json_array_get(merges, i), &v->merges[i])) {
            status = refuse(err, "a merge is not two texts");
        }
    }
    if (status == CM_OK) {
        v->add_begin = begin_added(tokenizer, config, v);
        status = cm_plan_vocabulary(v, plan, err);
    }
    return status;
}
