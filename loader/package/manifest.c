/* The manifest: a tagged binary, every field known, bounded and checked. */
#include "loader/package/manifest_internal.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/base/cursor.h"

enum { ADD_BEGIN = 1u, WHOLE_PIECES = 2u }; /* flags of the tokenizer */

struct parser {
    struct cm_manifest *manifest;
    uint64_t payload_bytes;
    uint64_t payload_used; /* end of the last tensor */
    uint32_t *offsets;
    uint32_t *merges;
    uint32_t *ranks;
    struct cm_manifest_tensor *tensors;
    uint32_t tensor_room;
    size_t at; /* offset of the record, for errors */
    uint16_t tag;
    struct cm_error *err;
};

static enum cm_status refuse(const struct parser *parser, const char *what)
{
    return cm_error_set(parser->err, CM_E_PACKAGE, "CM-PKG-MANIFEST",
                        "manifest record %u at offset %zu: %s", parser->tag, parser->at, what);
}

/* UTF-8 without NUL and without overlong forms or surrogates (RFC 3629). */
static bool text_ok(const uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size;) {
        uint8_t lead = bytes[i];
        size_t more = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
        if (lead == 0 || (lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || more >= size - i) {
            return false;
        }
        for (size_t k = 1; k <= more; k++) {
            if ((bytes[i + k] & 0xc0) != 0x80) {
                return false;
            }
        }
        if ((lead == 0xe0 && bytes[i + 1] < 0xa0) || (lead == 0xed && bytes[i + 1] > 0x9f) ||
            (lead == 0xf0 && bytes[i + 1] < 0x90) || (lead == 0xf4 && bytes[i + 1] > 0x8f)) {
            return false;
        }
        i += more + 1;
    }
    return true;
}

bool cm_manifest_text_read(struct cm_cursor *body, struct cm_manifest_text *ret_text)
{
    size_t size = cm_cursor_left(body);
    const uint8_t *bytes = cm_cursor_take(body, size);
    *ret_text = (struct cm_manifest_text){(const char *)bytes, (uint32_t)size};
    return size <= CM_MANIFEST_TEXT_BYTES_MAX && text_ok(bytes, size);
}

bool cm_manifest_name_read(struct cm_cursor *body, struct cm_manifest_text *ret_name)
{
    bool ok = cm_manifest_text_read(body, ret_name) && ret_name->size >= 1 && ret_name->size <= 63;
    for (uint32_t i = 0; ok && i < ret_name->size; i++) {
        char c = ret_name->bytes[i];
        ok = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
             c == '.' || c == '_' || c == '-';
    }
    return ok;
}

static enum cm_status text_parse(struct parser *parser, struct cm_cursor *body,
                                 struct cm_manifest_text *ret_text)
{
    return cm_manifest_text_read(body, ret_text) ? CM_OK
                                                 : refuse(parser, "text is too long or not UTF-8");
}

static enum cm_status name_parse(struct parser *parser, struct cm_cursor *body)
{
    return cm_manifest_name_read(body, &parser->manifest->model_name)
               ? CM_OK
               : refuse(parser, "model name is not [A-Za-z0-9._-]{1,63}");
}

static enum cm_status license_parse(struct parser *parser, struct cm_cursor *body)
{
    return text_parse(parser, body, &parser->manifest->license);
}

static enum cm_status origin_parse(struct parser *parser, struct cm_cursor *body)
{
    return text_parse(parser, body, &parser->manifest->origin);
}

static bool within(uint32_t value, uint32_t least, uint32_t greatest)
{
    return value >= least && value <= greatest;
}

static enum cm_status shape_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    m->architecture = cm_cursor_u32(body);
    m->vocabulary = cm_cursor_u32(body);
    m->width = cm_cursor_u32(body);
    m->layers = cm_cursor_u32(body);
    m->heads = cm_cursor_u32(body);
    m->kv_heads = cm_cursor_u32(body);
    m->head_width = cm_cursor_u32(body);
    m->rope_width = cm_cursor_u32(body);
    m->ffn_width = cm_cursor_u32(body);
    m->context_max = cm_cursor_u32(body);
    uint32_t tied = cm_cursor_u32(body);
    m->rope_base = cm_cursor_f32(body);
    m->norm_epsilon = cm_cursor_f32(body);
    m->tied_head = tied == 1;
    if (!within(m->architecture, CM_ARCH_LLAMA, CM_ARCH_PHI3)) {
        return refuse(parser, "unknown architecture");
    }
    if (!within(m->vocabulary, 2, CM_MANIFEST_VOCABULARY_MAX) || !within(m->width, 32, 1u << 17) ||
        !within(m->layers, 1, CM_MANIFEST_LAYERS_MAX) || !within(m->heads, 1, 1024) ||
        !within(m->kv_heads, 1, m->heads) || m->heads % m->kv_heads != 0 ||
        !within(m->head_width, 2, 1024) || m->head_width % 2 != 0 ||
        !within(m->rope_width, 2, m->head_width) || m->rope_width % 2 != 0 ||
        !within(m->ffn_width, 16, 1u << 18) || !within(m->context_max, 1, 1u << 22) || tied > 1) {
        return refuse(parser, "shape is out of bounds");
    }
    if (!isfinite(m->rope_base) || m->rope_base < 1.0f || !isfinite(m->norm_epsilon) ||
        m->norm_epsilon <= 0.0f || m->norm_epsilon > 1.0f) {
        return refuse(parser, "rope base or norm epsilon is impossible");
    }
    return CM_OK;
}

/* Absent where it is llama's: one model, one encoding. */
static enum cm_status decoder_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest_decoder *d = &parser->manifest->decoder;
    uint32_t *const flags[] = {&d->qk_norm, &d->post_norms, &d->qkv_bias};
    float *const reals[] = {&d->embedding_scale, &d->attention_scale,  &d->attention_cap,
                            &d->logits_cap,      &d->window_rope_base, &d->rope_scale};
    bool ok = true, other = false;
    d->activation = cm_cursor_u32(body);
    ok = d->activation <= CM_MANIFEST_GELU;
    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
        *flags[i] = cm_cursor_u32(body);
        ok = ok && *flags[i] <= 1;
        other = other || *flags[i] != 0;
    }
    d->window = cm_cursor_u32(body);
    d->window_period = cm_cursor_u32(body);
    ok = ok && d->window <= 1u << 22 && d->window_period <= CM_MANIFEST_LAYERS_MAX &&
         (d->window != 0 || (d->window_period == 0));
    for (size_t i = 0; i < sizeof(reals) / sizeof(reals[0]); i++) {
        *reals[i] = cm_cursor_f32(body);
        ok = ok && isfinite(*reals[i]) && *reals[i] >= 0.0f && !signbit(*reals[i]);
        other = other || *reals[i] > 0.0f;
    }
    ok = ok && (d->window_rope_base == 0.0f || (d->window != 0 && d->window_rope_base >= 1.0f));
    return ok && (other || d->activation != 0 || d->window != 0)
               ? CM_OK
               : refuse(parser, "decoder is out of bounds, or is llama's");
}

static enum cm_status loss_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    m->loss_positions = cm_cursor_u32(body);
    m->loss_divergence = cm_cursor_f32(body);
    return within(m->loss_positions, 1, 1u << 20) && isfinite(m->loss_divergence) &&
                   !signbit(m->loss_divergence)
               ? CM_OK
               : refuse(parser, "loss is out of bounds");
}

bool cm_manifest_rope_factor_ok(float factor)
{
    return factor >= 0x1p-10f && factor <= 0x1p20f;
}

/* One for each pair. False: they are not that many, or out of bounds. */
static bool factors_read(const struct cm_manifest *m, struct cm_cursor *body, float *ret_factors)
{
    bool ok = cm_cursor_left(body) == (size_t)m->rope_width * 2 &&
              m->rope_width / 2 <= CM_MANIFEST_ROPE_PAIRS_MAX;
    for (uint32_t i = 0; ok && i < m->rope_width / 2; i++) {
        ret_factors[i] = cm_cursor_f32(body);
        ok = cm_manifest_rope_factor_ok(ret_factors[i]);
    }
    return ok;
}

static enum cm_status rope_factors_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    const bool ok = factors_read(m, body, m->rope_factors);
    bool other = false;
    m->rope_factor_count = m->rope_width / 2;
    for (uint32_t i = 0; ok && i < m->rope_factor_count; i++) {
        other = other || m->rope_factors[i] != 1.0f;
    }
    return ok && other ? CM_OK : refuse(parser, "RoPE factors are out of bounds, or all 1");
}

static enum cm_status rope_long_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    m->rope_long_context = cm_cursor_u32(body);
    return within(m->rope_long_context, 1, m->context_max - 1) &&
                   factors_read(m, body, m->rope_long_factors)
               ? CM_OK
               : refuse(parser,
                        "RoPE factors of a longer context are out of bounds, or it is none");
}

/* Is it one of that kind's pre-tokenizers? */
static bool split_ok(uint32_t tokenizer, uint32_t split)
{
    switch ((enum cm_manifest_split)split) {
    case CM_SPLIT_SMOLLM:
    case CM_SPLIT_GPT2:
    case CM_SPLIT_QWEN2:
    case CM_SPLIT_LLAMA3:
    case CM_SPLIT_QWEN2_NFC:
    case CM_SPLIT_TEKKEN:
    case CM_SPLIT_GPT4O:
        return tokenizer == CM_TOKENIZER_BYTE_BPE;
    case CM_SPLIT_WHOLE:
    case CM_SPLIT_SPACE_FIRST:
    case CM_SPLIT_SPACE_ONE:
        return tokenizer == CM_TOKENIZER_SENTENCEPIECE;
    }
    return false;
}

static enum cm_status tokenizer_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    m->tokenizer = cm_cursor_u32(body);
    m->split = cm_cursor_u32(body);
    uint32_t flags = cm_cursor_u32(body);
    uint32_t flags_all =
        m->tokenizer == CM_TOKENIZER_BYTE_BPE ? ADD_BEGIN | WHOLE_PIECES : ADD_BEGIN;
    m->add_begin = (flags & ADD_BEGIN) != 0;
    m->whole_pieces = (flags & WHOLE_PIECES) != 0;
    m->begin_token = cm_cursor_u32(body);
    m->end_token_count = cm_cursor_u32(body);
    if (!split_ok(m->tokenizer, m->split) || (flags & ~flags_all) != 0 ||
        m->begin_token >= m->vocabulary ||
        !within(m->end_token_count, 1, CM_MANIFEST_END_TOKENS_MAX)) {
        return refuse(parser, "tokenizer's kind or token ids are impossible");
    }
    for (uint32_t i = 0; i < CM_MANIFEST_END_TOKENS_MAX; i++) {
        m->end_tokens[i] = cm_cursor_u32(body);
        if (i < m->end_token_count ? m->end_tokens[i] >= m->vocabulary : m->end_tokens[i] != 0) {
            return refuse(parser, "end token is not in the vocabulary");
        }
    }
    return CM_OK;
}

static enum cm_status lengths_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    if (cm_cursor_left(body) != (size_t)m->vocabulary * 2) {
        return refuse(parser, "not one length for each token");
    }
    parser->offsets = calloc((size_t)m->vocabulary + 1, sizeof(*parser->offsets));
    if (parser->offsets == NULL) {
        return cm_error_errno(parser->err, ENOMEM, "CM-SYS-MEMORY", "token offsets");
    }
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        uint16_t length = cm_cursor_u16(body);
        if (length > CM_MANIFEST_TOKEN_BYTES_MAX) {
            return refuse(parser, "a token is longer than 1024 bytes");
        }
        parser->offsets[i + 1] = parser->offsets[i] + length;
    }
    return CM_OK;
}

static enum cm_status token_bytes_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    size_t size = cm_cursor_left(body);
    if (size != parser->offsets[m->vocabulary]) {
        return refuse(parser, "token bytes and lengths differ");
    }
    m->token_bytes = cm_cursor_take(body, size);
    return CM_OK;
}

static enum cm_status types_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    if (cm_cursor_left(body) != m->vocabulary) {
        return refuse(parser, "not one type for each token");
    }
    m->token_types = cm_cursor_take(body, m->vocabulary);
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        if (!within(m->token_types[i], CM_TOKEN_NORMAL, CM_TOKEN_BYTE)) {
            return refuse(parser, "unknown token type");
        }
    }
    return CM_OK;
}

/* Is merged = left ‖ right present is for the tokenizer to look up; here: ids and count. */
static enum cm_status merges_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    size_t size = cm_cursor_left(body);
    if (size % 8 != 0 || size / 8 > CM_MANIFEST_MERGES_MAX) {
        return refuse(parser, "merges are not pairs, or too many");
    }
    m->merge_count = (uint32_t)(size / 8);
    parser->merges = calloc(m->merge_count == 0 ? 1 : (size_t)m->merge_count * 2, sizeof(uint32_t));
    if (parser->merges == NULL) {
        return cm_error_errno(parser->err, ENOMEM, "CM-SYS-MEMORY", "merges");
    }
    for (uint32_t i = 0; i < m->merge_count * 2; i++) {
        parser->merges[i] = cm_cursor_u32(body);
        if (parser->merges[i] >= m->vocabulary) {
            return refuse(parser, "a merge names a token that does not exist");
        }
    }
    return CM_OK;
}

static enum cm_status ranks_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    if (m->tokenizer != CM_TOKENIZER_SENTENCEPIECE ||
        cm_cursor_left(body) != (size_t)m->vocabulary * 4) {
        return refuse(parser, "not one rank for each token, or the tokenizer has none");
    }
    parser->ranks = calloc(m->vocabulary, sizeof(*parser->ranks));
    if (parser->ranks == NULL) {
        return cm_error_errno(parser->err, ENOMEM, "CM-SYS-MEMORY", "ranks");
    }
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        parser->ranks[i] = cm_cursor_u32(body);
    }
    return CM_OK;
}

static enum cm_status chat_parse(struct parser *parser, struct cm_cursor *body)
{
    struct cm_manifest *m = parser->manifest;
    m->chat = cm_cursor_u32(body);
    if (!cm_cursor_ok(body) || m->chat > CM_CHAT_LAST) {
        return refuse(parser, "unknown chat family");
    }
    return text_parse(parser, body, &m->default_system);
}

static enum cm_status tensor_grow(struct parser *parser)
{
    if (parser->manifest->tensor_count < parser->tensor_room) {
        return CM_OK;
    }
    if (parser->tensor_room >= CM_MANIFEST_TENSORS_MAX) {
        return refuse(parser, "too many tensors");
    }
    uint32_t room = parser->tensor_room == 0 ? 256 : parser->tensor_room * 2;
    struct cm_manifest_tensor *more = realloc(parser->tensors, room * sizeof(*more));
    if (more == NULL) {
        return cm_error_errno(parser->err, ENOMEM, "CM-SYS-MEMORY", "tensor list");
    }
    parser->tensors = more;
    parser->tensor_room = room;
    return CM_OK;
}

const char *cm_manifest_tensor_read(struct cm_cursor *body, uint64_t payload_bytes,
                                    uint64_t *payload_used, struct cm_manifest_tensor *tensor)
{
    uint64_t end;
    tensor->layer = cm_cursor_u32(body);
    tensor->role = cm_cursor_u32(body);
    tensor->kind = cm_cursor_u32(body);
    tensor->rows = cm_cursor_u32(body);
    tensor->columns = cm_cursor_u32(body);
    uint32_t reserved = cm_cursor_u32(body);
    tensor->offset = cm_cursor_u64(body);
    tensor->scale_offset = cm_cursor_u64(body);
    tensor->bytes = cm_cursor_u64(body);
    if (!cm_cursor_ok(body) || reserved != 0) {
        return "tensor record is malformed";
    }
    if (tensor->offset % PAYLOAD_ALIGN != 0 || tensor->bytes == 0 ||
        tensor->offset < *payload_used || !cm_size_add(tensor->offset, tensor->bytes, &end) ||
        end > payload_bytes ||
        (tensor->scale_offset != 0 &&
         (tensor->scale_offset <= tensor->offset || tensor->scale_offset >= end))) {
        return "tensor lies outside the payload, overlaps or is not aligned";
    }
    if (cm_cursor_left(body) == 0 || cm_cursor_left(body) > 63 ||
        !cm_manifest_text_read(body, &tensor->name)) {
        return "tensor's name is empty, longer than 63 bytes or not UTF-8";
    }
    *payload_used = end;
    return NULL;
}

static enum cm_status tensor_parse(struct parser *parser, struct cm_cursor *body)
{
    enum cm_status status = tensor_grow(parser);
    if (status != CM_OK) {
        return status;
    }
    struct cm_manifest_tensor *tensor = &parser->tensors[parser->manifest->tensor_count];
    const char *refusal =
        cm_manifest_tensor_read(body, parser->payload_bytes, &parser->payload_used, tensor);
    if (refusal != NULL) {
        return refuse(parser, refusal);
    }
    if (tensor->layer != CM_MANIFEST_NO_LAYER && tensor->layer >= parser->manifest->layers) {
        return refuse(parser, "tensor of a layer that does not exist");
    }
    parser->manifest->tensor_count++;
    return CM_OK;
}

enum presence { ONCE, MAYBE, MANY };

static const struct {
    uint16_t tag;
    enum presence presence;
    enum cm_status (*parse)(struct parser *parser, struct cm_cursor *body);
} records[] = {
    {TAG_NAME, ONCE, name_parse},
    {TAG_LICENSE, ONCE, license_parse},
    {TAG_ORIGIN, ONCE, origin_parse},
    {TAG_SHAPE, ONCE, shape_parse},
    {TAG_DECODER, MAYBE, decoder_parse},
    {TAG_LOSS, MAYBE, loss_parse},
    {TAG_TOKENIZER, ONCE, tokenizer_parse},
    {TAG_TOKEN_LENGTHS, ONCE, lengths_parse},
    {TAG_TOKEN_BYTES, ONCE, token_bytes_parse},
    {TAG_TOKEN_TYPES, ONCE, types_parse},
    {TAG_MERGES, ONCE, merges_parse},
    {TAG_RANKS, MAYBE, ranks_parse},
    {TAG_ROPE_FACTORS, MAYBE, rope_factors_parse},
    {TAG_ROPE_LONG, MAYBE, rope_long_parse},
    {TAG_CHAT, ONCE, chat_parse},
    {TAG_TENSOR, MANY, tensor_parse},
};
#define RECORD_COUNT (sizeof(records) / sizeof(records[0]))

bool cm_manifest_record_read(struct cm_cursor *cursor, uint16_t *ret_tag,
                             struct cm_cursor *ret_body)
{
    *ret_tag = cm_cursor_u16(cursor);
    uint16_t reserved = cm_cursor_u16(cursor);
    uint32_t size = cm_cursor_u32(cursor);
    const uint8_t *bytes = cm_cursor_take(cursor, size);
    *ret_body = cm_cursor_init(bytes, cm_cursor_ok(cursor) ? size : 0);
    return cm_cursor_ok(cursor) && reserved == 0;
}

/* Records come in the table's order, as often as it says. */
static enum cm_status records_parse(struct parser *parser, struct cm_cursor *cursor)
{
    size_t row = 0;
    bool seen_many = false;
    while (cm_cursor_left(cursor) > 0) {
        struct cm_cursor body;
        parser->at = cursor->offset;
        if (!cm_manifest_record_read(cursor, &parser->tag, &body)) {
            return refuse(parser, "record is cut or malformed");
        }
        if (parser->tag == TAG_ADAPTER) {
            return refuse(parser, "the package holds an adapter, and a model is wanted");
        }
        while (row < RECORD_COUNT && records[row].presence == MAYBE &&
               records[row].tag != parser->tag) {
            row++;
        }
        if (row == RECORD_COUNT || records[row].tag != parser->tag) {
            return refuse(parser, "unknown, missing, repeated or out of order");
        }
        enum cm_status status = records[row].parse(parser, &body);
        if (status != CM_OK) {
            return status;
        }
        if (!cm_cursor_ok(&body) || cm_cursor_left(&body) != 0) {
            return refuse(parser, "record has the wrong size");
        }
        seen_many = seen_many || records[row].presence == MANY;
        row += records[row].presence == MANY ? 0 : 1;
    }
    if (!seen_many) {
        return refuse(parser, "the manifest ends too early");
    }
    bool pieces = parser->manifest->tokenizer == CM_TOKENIZER_SENTENCEPIECE;
    return pieces == (parser->ranks != NULL) && (!pieces || parser->manifest->merge_count == 0)
               ? CM_OK
               : refuse(parser, "the tokenizer has no ranks, or merges beside them");
}

enum cm_status cm_manifest_parse(const uint8_t *bytes, size_t size, uint64_t payload_bytes,
                                 struct cm_manifest *ret_manifest, struct cm_error *err)
{
    struct cm_manifest manifest = {.tensor_count = 0};
    struct parser parser = {.manifest = &manifest, .payload_bytes = payload_bytes, .err = err};
    struct cm_cursor cursor = cm_cursor_init(bytes, size);
    enum cm_status status = records_parse(&parser, &cursor);
    manifest.token_offsets = parser.offsets;
    manifest.merges = parser.merges;
    manifest.ranks = parser.ranks;
    manifest.tensors = parser.tensors;
    if (status != CM_OK) {
        cm_manifest_done(&manifest);
        return status;
    }
    *ret_manifest = manifest;
    return CM_OK;
}

void cm_manifest_done(struct cm_manifest *manifest)
{
    free((void *)manifest->token_offsets);
    free((void *)manifest->merges);
    free((void *)manifest->ranks);
    free((void *)manifest->tensors);
    *manifest = (struct cm_manifest){0};
}

void cm_manifest_record_put(struct cm_writer *writer, uint16_t tag, size_t size)
{
    cm_writer_u16(writer, tag);
    cm_writer_u16(writer, 0);
    cm_writer_u32(writer, (uint32_t)size);
}

void cm_manifest_text_put(struct cm_writer *writer, uint16_t tag,
                          const struct cm_manifest_text *text)
{
    cm_manifest_record_put(writer, tag, text->size);
    cm_writer_bytes(writer, text->bytes, text->size);
}

void cm_manifest_f32_put(struct cm_writer *writer, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    cm_writer_u32(writer, bits);
}

static void tokenizer_put(struct cm_writer *writer, const struct cm_manifest *m)
{
    cm_manifest_record_put(writer, TAG_TOKENIZER, 4 * (5 + CM_MANIFEST_END_TOKENS_MAX));
    cm_writer_u32(writer, m->tokenizer);
    cm_writer_u32(writer, m->split);
    cm_writer_u32(writer, (m->add_begin ? ADD_BEGIN : 0) | (m->whole_pieces ? WHOLE_PIECES : 0));
    cm_writer_u32(writer, m->begin_token);
    cm_writer_u32(writer, m->end_token_count);
    for (uint32_t i = 0; i < CM_MANIFEST_END_TOKENS_MAX; i++) {
        cm_writer_u32(writer, i < m->end_token_count ? m->end_tokens[i] : 0);
    }
    cm_manifest_record_put(writer, TAG_TOKEN_LENGTHS, (size_t)m->vocabulary * 2);
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        cm_writer_u16(writer, (uint16_t)(m->token_offsets[i + 1] - m->token_offsets[i]));
    }
    cm_manifest_record_put(writer, TAG_TOKEN_BYTES, m->token_offsets[m->vocabulary]);
    cm_writer_bytes(writer, m->token_bytes, m->token_offsets[m->vocabulary]);
    cm_manifest_record_put(writer, TAG_TOKEN_TYPES, m->vocabulary);
    cm_writer_bytes(writer, m->token_types, m->vocabulary);
    cm_manifest_record_put(writer, TAG_MERGES, (size_t)m->merge_count * 8);
    for (uint32_t i = 0; i < m->merge_count * 2; i++) {
        cm_writer_u32(writer, m->merges[i]);
    }
    if (m->ranks != NULL) {
        cm_manifest_record_put(writer, TAG_RANKS, (size_t)m->vocabulary * 4);
        for (uint32_t i = 0; i < m->vocabulary; i++) {
            cm_writer_u32(writer, m->ranks[i]);
        }
    }
    if (m->rope_factor_count > 0) {
        cm_manifest_record_put(writer, TAG_ROPE_FACTORS, (size_t)m->rope_factor_count * 4);
        for (uint32_t i = 0; i < m->rope_factor_count; i++) {
            cm_manifest_f32_put(writer, m->rope_factors[i]);
        }
    }
    if (m->rope_long_context > 0) {
        cm_manifest_record_put(writer, TAG_ROPE_LONG, 4 + (size_t)m->rope_width / 2 * 4);
        cm_writer_u32(writer, m->rope_long_context);
        for (uint32_t i = 0; i < m->rope_width / 2; i++) {
            cm_manifest_f32_put(writer, m->rope_long_factors[i]);
        }
    }
}

static void decoder_put(struct cm_writer *writer, const struct cm_manifest_decoder *d)
{
    const uint32_t numbers[] = {d->activation, d->qk_norm, d->post_norms,
                                d->qkv_bias,   d->window,  d->window_period};
    const float reals[] = {d->embedding_scale, d->attention_scale,  d->attention_cap,
                           d->logits_cap,      d->window_rope_base, d->rope_scale};
    bool other = false;
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        other = other || numbers[i] != 0;
    }
    for (size_t i = 0; i < sizeof(reals) / sizeof(reals[0]); i++) {
        other = other || reals[i] != 0.0f;
    }
    if (!other) { /* llama's */
        return;
    }
    cm_manifest_record_put(writer, TAG_DECODER, sizeof(numbers) + sizeof(reals));
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        cm_writer_u32(writer, numbers[i]);
    }
    for (size_t i = 0; i < sizeof(reals) / sizeof(reals[0]); i++) {
        cm_manifest_f32_put(writer, reals[i]);
    }
}

void cm_manifest_tensors_put(struct cm_writer *writer, const struct cm_manifest_tensor *tensors,
                             uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        const struct cm_manifest_tensor *tensor = &tensors[i];
        cm_manifest_record_put(writer, TAG_TENSOR, TENSOR_FIXED_BYTES + tensor->name.size);
        cm_writer_u32(writer, tensor->layer);
        cm_writer_u32(writer, tensor->role);
        cm_writer_u32(writer, tensor->kind);
        cm_writer_u32(writer, tensor->rows);
        cm_writer_u32(writer, tensor->columns);
        cm_writer_u32(writer, 0);
        cm_writer_u64(writer, tensor->offset);
        cm_writer_u64(writer, tensor->scale_offset);
        cm_writer_u64(writer, tensor->bytes);
        cm_writer_bytes(writer, tensor->name.bytes, tensor->name.size);
    }
}

static void manifest_put(struct cm_writer *writer, const struct cm_manifest *m)
{
    cm_manifest_text_put(writer, TAG_NAME, &m->model_name);
    cm_manifest_text_put(writer, TAG_LICENSE, &m->license);
    cm_manifest_text_put(writer, TAG_ORIGIN, &m->origin);
    const uint32_t shape[] = {m->architecture, m->vocabulary,  m->width,      m->layers,
                              m->heads,        m->kv_heads,    m->head_width, m->rope_width,
                              m->ffn_width,    m->context_max, m->tied_head};
    cm_manifest_record_put(writer, TAG_SHAPE, sizeof(shape) + 8);
    for (size_t i = 0; i < sizeof(shape) / sizeof(shape[0]); i++) {
        cm_writer_u32(writer, shape[i]);
    }
    cm_manifest_f32_put(writer, m->rope_base);
    cm_manifest_f32_put(writer, m->norm_epsilon);
    decoder_put(writer, &m->decoder);
    if (m->loss_positions > 0) {
        cm_manifest_record_put(writer, TAG_LOSS, 8);
        cm_writer_u32(writer, m->loss_positions);
        cm_manifest_f32_put(writer, m->loss_divergence);
    }
    tokenizer_put(writer, m);
    cm_manifest_record_put(writer, TAG_CHAT, 4 + (size_t)m->default_system.size);
    cm_writer_u32(writer, m->chat);
    cm_writer_bytes(writer, m->default_system.bytes, m->default_system.size);
    cm_manifest_tensors_put(writer, m->tensors, m->tensor_count);
}

enum cm_status cm_manifest_encode(const struct cm_manifest *manifest, uint8_t **ret_bytes,
                                  size_t *ret_size, struct cm_error *err)
{
    size_t size = 4096 + sizeof(manifest->rope_factors) + sizeof(manifest->rope_long_factors) +
                  (size_t)manifest->model_name.size + manifest->license.size +
                  manifest->origin.size + manifest->default_system.size +
                  (size_t)manifest->vocabulary * 7 + manifest->token_offsets[manifest->vocabulary] +
                  (size_t)manifest->merge_count * 8 +
                  (size_t)manifest->tensor_count * (TENSOR_FIXED_BYTES + 8 + 64);
    uint8_t *bytes = malloc(size);
    if (bytes == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "manifest of %zu bytes", size);
    }
    struct cm_writer writer = cm_writer_init(bytes, size);
    manifest_put(&writer, manifest);
    if (writer.failed) {
        free(bytes);
        return cm_error_set(err, CM_E_PACKAGE, "CM-PKG-MANIFEST", "a manifest text is too long");
    }
    *ret_bytes = bytes;
    *ret_size = writer.offset;
    return CM_OK;
}
