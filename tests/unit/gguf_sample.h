/* A complete, tiny GGUF llama in memory, and the place of every number in it. */
#ifndef CASEMATE_TESTS_GGUF_SAMPLE_H
#define CASEMATE_TESTS_GGUF_SAMPLE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "loader/pack/plan.h"
#include "loader/pack/quant.h"

#define GGUF_SAMPLE_BYTES (256u << 10)
#define GGUF_MARKS_MAX    4096

enum gguf_mark_kind {
    GGUF_MARK_LENGTH,
    GGUF_MARK_COUNT,
    GGUF_MARK_TYPE,
    GGUF_MARK_VALUE,
    GGUF_MARK_NAME
};

struct gguf_mark {
    uint32_t offset;
    uint32_t size; /* 1, 4 or 8; of a name: its bytes */
    enum gguf_mark_kind kind;
};

struct gguf_sample {
    uint8_t bytes[GGUF_SAMPLE_BYTES];
    uint32_t size, header;
    struct gguf_mark marks[GGUF_MARKS_MAX];
    uint32_t mark_count;
    uint32_t keys, tensors; /* so far */
    uint64_t data;          /* bytes of tensor data so far */
};

static inline void gguf_put(struct gguf_sample *s, const void *bytes, uint32_t size)
{
    if (size > GGUF_SAMPLE_BYTES - s->size) {
        abort();
    }
    memcpy(s->bytes + s->size, bytes, size);
    s->size += size;
}

static inline void gguf_number(struct gguf_sample *s, uint64_t value, uint32_t size,
                               enum gguf_mark_kind kind)
{
    if (s->mark_count < GGUF_MARKS_MAX) {
        s->marks[s->mark_count++] = (struct gguf_mark){s->size, size, kind};
    }
    gguf_put(s, &value, size);
}

static inline void gguf_words(struct gguf_sample *s, const char *text, enum gguf_mark_kind kind)
{
    uint32_t size = (uint32_t)strlen(text);
    gguf_number(s, size, 8, GGUF_MARK_LENGTH);
    if (kind == GGUF_MARK_NAME && s->mark_count < GGUF_MARKS_MAX) {
        s->marks[s->mark_count++] = (struct gguf_mark){s->size, size, kind};
    }
    gguf_put(s, text, size);
}

static inline void gguf_key(struct gguf_sample *s, const char *name, uint32_t type)
{
    s->keys++;
    gguf_words(s, name, GGUF_MARK_NAME);
    gguf_number(s, type, 4, GGUF_MARK_TYPE);
}

static inline void gguf_key_u32(struct gguf_sample *s, const char *name, uint32_t value)
{
    gguf_key(s, name, CM_GGUF_VALUE_U32);
    gguf_number(s, value, 4, GGUF_MARK_VALUE);
}

static inline void gguf_key_f32(struct gguf_sample *s, const char *name, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    gguf_key(s, name, CM_GGUF_VALUE_F32);
    gguf_number(s, bits, 4, GGUF_MARK_VALUE);
}

static inline void gguf_key_text(struct gguf_sample *s, const char *name, const char *value)
{
    gguf_key(s, name, CM_GGUF_VALUE_STRING);
    gguf_words(s, value, GGUF_MARK_VALUE);
}

static inline void gguf_key_array(struct gguf_sample *s, const char *name, uint32_t element,
                                  uint64_t count)
{
    gguf_key(s, name, CM_GGUF_VALUE_ARRAY);
    gguf_number(s, element, 4, GGUF_MARK_TYPE);
    gguf_number(s, count, 8, GGUF_MARK_COUNT);
}

/* gpt2's byte alphabet as UTF-8: printable bytes are themselves, the others follow from 256. */
static inline void gguf_alphabet(uint32_t byte, char ret[4])
{
    uint32_t point = 256;
    for (uint32_t b = 0; b <= byte; b++) {
        bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
        if (b == byte && plain) {
            point = b;
        } else if (b < byte && !plain) {
            point++;
        }
    }
    if (point < 0x80) {
        snprintf(ret, 4, "%c", (char)point);
    } else {
        snprintf(ret, 4, "%c%c", (char)(0xc0 | point >> 6), (char)(0x80 | (point & 0x3f)));
    }
}

static inline void gguf_vocabulary(struct gguf_sample *s)
{
    static const char *const extra[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "th", "the"};
    uint32_t count = 256 + 5;
    gguf_key_text(s, "tokenizer.ggml.model", "gpt2");
    gguf_key_text(s, "tokenizer.ggml.pre", "gpt-2");
    gguf_key_array(s, "tokenizer.ggml.tokens", CM_GGUF_VALUE_STRING, count);
    for (uint32_t i = 0; i < count; i++) {
        char text[4] = "";
        if (i >= 3 && i < 259) {
            gguf_alphabet(i - 3, text);
        }
        gguf_words(s, i < 3 ? extra[i] : i < 259 ? text : extra[i - 256], GGUF_MARK_VALUE);
    }
    gguf_key_array(s, "tokenizer.ggml.token_type", CM_GGUF_VALUE_I32, count);
    for (uint32_t i = 0; i < count; i++) {
        gguf_number(s, i < 3 ? 3 : 1, 4, GGUF_MARK_VALUE);
    }
    gguf_key_array(s, "tokenizer.ggml.merges", CM_GGUF_VALUE_STRING, 2);
    gguf_words(s, "t h", GGUF_MARK_VALUE);
    gguf_words(s, "th e", GGUF_MARK_VALUE);
    gguf_key_u32(s, "tokenizer.ggml.bos_token_id", 1);
    gguf_key_u32(s, "tokenizer.ggml.eos_token_id", 2);
    gguf_key_text(s, "tokenizer.chat_template",
                  "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
                  "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
                  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}");
}

static inline void gguf_tensor(struct gguf_sample *s, const char *name, uint64_t columns,
                               uint64_t rows, uint32_t type, uint32_t block_bytes)
{
    uint64_t bytes = type == CM_QUANT_F32 ? columns * rows * 4 : columns / 32 * rows * block_bytes;
    s->tensors++;
    gguf_words(s, name, GGUF_MARK_NAME);
    gguf_number(s, rows > 1 ? 2 : 1, 4, GGUF_MARK_COUNT);
    gguf_number(s, columns, 8, GGUF_MARK_COUNT);
    if (rows > 1) {
        gguf_number(s, rows, 8, GGUF_MARK_COUNT);
    }
    gguf_number(s, type, 4, GGUF_MARK_TYPE);
    gguf_number(s, s->data, 8, GGUF_MARK_VALUE);
    s->data += (bytes + 31) / 32 * 32;
}

static inline void gguf_sample_make(struct gguf_sample *s)
{
    memset(s, 0, sizeof(*s));
    gguf_put(s, "GGUF", 4);
    gguf_number(s, 3, 4, GGUF_MARK_VALUE);
    gguf_number(s, 0, 8, GGUF_MARK_COUNT); /* set below */
    gguf_number(s, 0, 8, GGUF_MARK_COUNT);
    gguf_key_text(s, "general.architecture", "llama");
    gguf_key_text(s, "general.name", "sample");
    gguf_key_u32(s, "llama.context_length", 64);
    gguf_key_u32(s, "llama.embedding_length", 32);
    gguf_key_u32(s, "llama.block_count", 1);
    gguf_key_u32(s, "llama.feed_forward_length", 64);
    gguf_key_u32(s, "llama.attention.head_count", 2);
    gguf_key_u32(s, "llama.attention.head_count_kv", 1);
    gguf_key_u32(s, "llama.rope.dimension_count", 16);
    gguf_key_f32(s, "llama.rope.freq_base", 10000.0f);
    gguf_key_f32(s, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_vocabulary(s);
    gguf_tensor(s, "token_embd.weight", 32, 261, CM_QUANT_Q8_0, 34);
    gguf_tensor(s, "blk.0.attn_norm.weight", 32, 1, CM_QUANT_F32, 0);
    gguf_tensor(s, "blk.0.attn_q.weight", 32, 32, CM_QUANT_Q4_1, 20);
    gguf_tensor(s, "blk.0.attn_k.weight", 32, 16, CM_QUANT_Q4_1, 20);
    gguf_tensor(s, "blk.0.attn_v.weight", 32, 16, CM_QUANT_Q4_0, 18);
    gguf_tensor(s, "blk.0.attn_output.weight", 32, 32, CM_QUANT_F16, 64);
    gguf_tensor(s, "blk.0.ffn_norm.weight", 32, 1, CM_QUANT_F32, 0);
    gguf_tensor(s, "blk.0.ffn_gate.weight", 32, 64, CM_QUANT_BF16, 64);
    gguf_tensor(s, "blk.0.ffn_up.weight", 32, 64, CM_QUANT_Q4_0, 18);
    gguf_tensor(s, "blk.0.ffn_down.weight", 64, 32, CM_QUANT_Q8_0, 34);
    gguf_tensor(s, "output_norm.weight", 32, 1, CM_QUANT_F32, 0);
    memcpy(s->bytes + 8, &(uint64_t){s->tensors}, 8);
    memcpy(s->bytes + 16, &(uint64_t){s->keys}, 8);
    s->size = (s->size + 31) / 32 * 32;
    s->header = s->size;
    for (uint64_t i = 0; i < s->data; i++) {
        gguf_put(s, &(uint8_t){(uint8_t)(i * 37 % 29)}, 1); /* as fp16, bf16 or fp32: finite */
    }
}

/* The packer's whole way over one file in memory: parse, plan, convert each tensor into a buffer
 * of exactly its size. The plan is left to the caller where the status is CM_OK. */
static inline enum cm_status gguf_way(const uint8_t *bytes, size_t size, struct cm_plan *ret_plan,
                                      struct cm_error *err)
{
    const struct cm_plan_options options = {.origin = "test"};
    struct cm_gguf *gguf;
    struct cm_convert_loss loss;
    char path[64];
    int fd = memfd_create("gguf", MFD_CLOEXEC);
    if (fd < 0 || write(fd, bytes, size) != (ssize_t)size) {
        abort();
    }
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    enum cm_status status = cm_gguf_open(path, &gguf, err);
    close(fd);
    if (status != CM_OK) {
        return status;
    }
    status = cm_plan_make(gguf, &options, ret_plan, err);
    for (uint32_t i = 0; status == CM_OK && i < ret_plan->manifest.tensor_count; i++) {
        uint8_t *room = malloc(ret_plan->manifest.tensors[i].bytes);
        status = cm_plan_convert(ret_plan, i, room, &loss, err);
        free(room);
        if (status != CM_OK) {
            cm_plan_done(ret_plan);
        }
    }
    cm_gguf_close(gguf);
    return status;
}

#endif
