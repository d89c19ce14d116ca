/* tokenizer.ggml.* of a GGUF file. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "loader/pack/plan.h"

static enum cm_status refuse(struct cm_error *err, uint64_t index, const char *what)
{
    return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TOKENIZER", "GGUF tokenizer, entry %llu: %s",
                        (unsigned long long)index, what);
}

/* Pairs of tokenizer.ggml.model and .pre that the host has. */
static const struct {
    const char *model, *pre;
    uint32_t tokenizer, split;
    bool whole; /* pieces; with llama.cpp these names add a begin token too, where no key says it */
} tokenizers[] = {
    {"gpt2", "smollm", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_SMOLLM, false},
    {"gpt2", "gpt2", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_GPT2, false},
    {"gpt2", "gpt-2", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_GPT2, false},
    {"gpt2", "qwen2", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_QWEN2_NFC, false},
    {"gpt2", "deepseek-r1-qwen", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_QWEN2, false},
    {"gpt2", "llama-bpe", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_LLAMA3, true},
    {"gpt2", "llama-v3", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_LLAMA3, true},
    {"gpt2", "llama3", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_LLAMA3, true},
    {"gpt2", "smaug-bpe", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_LLAMA3, false},
    {"gpt2", "tekken", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_TEKKEN, true},
    {"gpt2", "gpt-4o", CM_TOKENIZER_BYTE_BPE, CM_SPLIT_GPT4O, false},
    {"llama", "default", CM_TOKENIZER_SENTENCEPIECE, CM_SPLIT_SPACE_FIRST, false},
};
#define SUPPORTED                                                                                  \
    "gpt2 / smollm, gpt2, qwen2, deepseek-r1-qwen, llama-bpe, smaug-bpe, tekken, gpt-4o; llama / " \
    "default"

static enum cm_status kinds_read(const struct cm_gguf *gguf, struct cm_vocabulary *v,
                                 struct cm_error *err)
{
    struct cm_source_text model, pre = {"default", 7};
    bool space_first = true;
    enum cm_status status = cm_gguf_text(gguf, "tokenizer.ggml.model", &model, err);
    if (status == CM_OK && cm_gguf_has(gguf, "tokenizer.ggml.pre")) {
        status = cm_gguf_text(gguf, "tokenizer.ggml.pre", &pre, err);
    }
    if (status == CM_OK && cm_gguf_has(gguf, "tokenizer.ggml.add_space_prefix")) {
        status = cm_gguf_bool(gguf, "tokenizer.ggml.add_space_prefix", &space_first, err);
    }
    for (size_t i = 0; status == CM_OK && i < sizeof(tokenizers) / sizeof(tokenizers[0]); i++) {
        if (cm_source_text_is(model, tokenizers[i].model) &&
            cm_source_text_is(pre, tokenizers[i].pre)) {
            v->tokenizer = tokenizers[i].tokenizer;
            v->whole_pieces = tokenizers[i].whole;
            v->split = tokenizers[i].split == CM_SPLIT_SPACE_FIRST && !space_first
                           ? (uint32_t)CM_SPLIT_WHOLE
                           : tokenizers[i].split;
            return CM_OK;
        }
    }
    return status != CM_OK ? status
                           : cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TOKENIZER",
                                          "GGUF: tokenizer '%.*s' / '%.*s' is not supported; this "
                                          "host reads: " SUPPORTED,
                                          (int)(model.size < 32 ? model.size : 32), model.bytes,
                                          (int)(pre.size < 32 ? pre.size : 32), pre.bytes);
}

static enum cm_status scores_read(const struct cm_gguf *gguf, struct cm_vocabulary *v,
                                  struct cm_error *err)
{
    struct cm_cursor cursor;
    uint64_t count;
    enum cm_status status =
        cm_gguf_array(gguf, "tokenizer.ggml.scores", CM_GGUF_VALUE_F32, &cursor, &count, err);
    if (status == CM_OK && count != v->count) {
        status = refuse(err, count, "not one score for each token");
    }
    if (status == CM_OK && (v->scores = calloc(count, sizeof(*v->scores))) == NULL) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "scores");
    }
    for (uint64_t i = 0; status == CM_OK && i < count; i++) {
        v->scores[i] = cm_cursor_f32(&cursor);
    }
    return status;
}

/* Two texts with a space between. */
static bool merge_split(struct cm_source_text text, struct cm_merge_text *ret)
{
    const char *space = text.size > 2 ? memchr(text.bytes + 1, ' ', text.size - 2) : NULL;
    if (space == NULL) {
        return false;
    }
    ret->left = (struct cm_source_text){text.bytes, (size_t)(space - text.bytes)};
    ret->right = (struct cm_source_text){space + 1, text.size - ret->left.size - 1};
    return true;
}

static enum cm_status tables_read(const struct cm_gguf *gguf, struct cm_vocabulary *v,
                                  struct cm_error *err)
{
    struct cm_cursor tokens, kinds, merges = {.bytes = NULL};
    uint64_t count, kind_count, merge_count = 0;
    enum cm_status status =
        cm_gguf_array(gguf, "tokenizer.ggml.tokens", CM_GGUF_VALUE_STRING, &tokens, &count, err);
    if (status == CM_OK) {
        status = cm_gguf_array(gguf, "tokenizer.ggml.token_type", CM_GGUF_VALUE_I32, &kinds,
                               &kind_count, err);
    }
    if (status == CM_OK && v->tokenizer == CM_TOKENIZER_BYTE_BPE) {
        status = cm_gguf_array(gguf, "tokenizer.ggml.merges", CM_GGUF_VALUE_STRING, &merges,
                               &merge_count, err);
    }
    if (status == CM_OK && (count > CM_MANIFEST_VOCABULARY_MAX || kind_count != count ||
                            merge_count > CM_MANIFEST_MERGES_MAX)) {
        status = refuse(err, count, "impossible vocabulary size, or not one type for each token");
    }
    if (status == CM_OK) {
        status = cm_vocabulary_new((uint32_t)count, (uint32_t)merge_count, v, err);
    }
    for (uint64_t i = 0; status == CM_OK && i < count; i++) {
        uint32_t kind = cm_cursor_u32(&kinds);
        v->texts[i] = cm_gguf_next_text(&tokens);
        v->kinds[i] = kind <= CM_TOKEN_BYTE ? (uint8_t)kind : 0;
    }
    for (uint64_t i = 0; status == CM_OK && i < merge_count; i++) {
        if (!merge_split(cm_gguf_next_text(&merges), &v->merges[i])) {
            status = refuse(err, i, "a merge is not two texts with a space between");
        }
    }
    return status == CM_OK && v->tokenizer == CM_TOKENIZER_SENTENCEPIECE ? scores_read(gguf, v, err)
                                                                         : status;
}

static enum cm_status ids_read(const struct cm_gguf *gguf, struct cm_vocabulary *v,
                               struct cm_error *err)
{
    v->end_count = 1;
    enum cm_status status = cm_gguf_u32(gguf, "tokenizer.ggml.eos_token_id", &v->ends[0], err);
    /* What llama.cpp does where the key is missing. */
    v->add_begin = v->tokenizer == CM_TOKENIZER_SENTENCEPIECE || v->whole_pieces;
    if (status == CM_OK && cm_gguf_has(gguf, "tokenizer.ggml.add_bos_token")) {
        status = cm_gguf_bool(gguf, "tokenizer.ggml.add_bos_token", &v->add_begin, err);
    }
    if (status == CM_OK && cm_gguf_has(gguf, "tokenizer.ggml.bos_token_id")) {
        status = cm_gguf_u32(gguf, "tokenizer.ggml.bos_token_id", &v->begin, err);
    }
    return status;
}

enum cm_status cm_vocabulary_gguf(const struct cm_gguf *gguf, struct cm_plan *plan,
                                  struct cm_error *err)
{
    struct cm_vocabulary v = {.count = 0};
    enum cm_status status = kinds_read(gguf, &v, err);
    if (status == CM_OK) {
        status = tables_read(gguf, &v, err);
    }
    if (status == CM_OK) {
        status = ids_read(gguf, &v, err);
    }
    if (status == CM_OK) {
        status = cm_plan_vocabulary(&v, plan, err);
    }
    cm_vocabulary_done(&v);
    return status;
}
