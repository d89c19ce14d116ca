/* Cursors: the only way a parser reads untrusted bytes and a writer fills a bounded buffer.
 *
 * A reader that runs past its end sets `failed`, returns zeros from then on, and never moves
 * again; callers check cm_cursor_ok once after a group of reads. All integers little-endian
 * unless the name says be. */
#ifndef CASEMATE_RUNTIME_BASE_CURSOR_H
#define CASEMATE_RUNTIME_BASE_CURSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct cm_cursor {
    const uint8_t *bytes; /* borrowed */
    size_t size;
    size_t offset;
    bool failed;
};

static inline struct cm_cursor cm_cursor_init(const void *bytes, size_t size)
{
    return (struct cm_cursor){.bytes = (const uint8_t *)bytes, .size = size};
}

static inline bool cm_cursor_ok(const struct cm_cursor *cursor)
{
    return !cursor->failed;
}

static inline size_t cm_cursor_left(const struct cm_cursor *cursor)
{
    return cursor->failed ? 0 : cursor->size - cursor->offset;
}

/* Borrow the next `size` bytes; NULL (and failed) if there are fewer. */
static inline const uint8_t *cm_cursor_take(struct cm_cursor *cursor, size_t size)
{
    if (cursor->failed || size > cursor->size - cursor->offset) {
        cursor->failed = true;
        return NULL;
    }
    const uint8_t *at = cursor->bytes + cursor->offset;
    cursor->offset += size;
    return at;
}

static inline void cm_cursor_skip(struct cm_cursor *cursor, size_t size)
{
    (void)cm_cursor_take(cursor, size);
}

/* Copy the next `size` bytes out; fills with zeros on failure. */
static inline void cm_cursor_copy(struct cm_cursor *cursor, void *ret_bytes, size_t size)
{
    const uint8_t *at = cm_cursor_take(cursor, size);
    if (at != NULL) {
        memcpy(ret_bytes, at, size);
    } else {
        memset(ret_bytes, 0, size);
    }
}

#define CM_CURSOR_READ(type, name)                                                                 \
    static inline type cm_cursor_##name(struct cm_cursor *cursor)                                  \
    {                                                                                              \
        type value = 0;                                                                            \
        const uint8_t *at = cm_cursor_take(cursor, sizeof(type));                                  \
        for (size_t i = 0; at != NULL && i < sizeof(type); i++) {                                  \
            value = (type)(value | (type)((type)at[i] << (8 * i)));                                \
        }                                                                                          \
        return value;                                                                              \
    }
CM_CURSOR_READ(uint8_t, u8)
CM_CURSOR_READ(uint16_t, u16)
CM_CURSOR_READ(uint32_t, u32)
CM_CURSOR_READ(uint64_t, u64)
#undef CM_CURSOR_READ

static inline float cm_cursor_f32(struct cm_cursor *cursor)
{
    uint32_t bits = cm_cursor_u32(cursor);
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* A bounded writer; on overflow sets `failed` and writes nothing more. */
struct cm_writer {
    uint8_t *bytes; /* borrowed */
    size_t size;
    size_t offset;
    bool failed;
};

static inline struct cm_writer cm_writer_init(void *bytes, size_t size)
{
    return (struct cm_writer){.bytes = (uint8_t *)bytes, .size = size};
}

static inline void cm_writer_bytes(struct cm_writer *writer, const void *bytes, size_t size)
{
    if (writer->failed || size > writer->size - writer->offset) {
        writer->failed = true;
        return;
    }
    if (size > 0) {
        memcpy(writer->bytes + writer->offset, bytes, size);
    }
    writer->offset += size;
}

#define CM_WRITER_PUT(type, name)                                                                  \
    static inline void cm_writer_##name(struct cm_writer *writer, type value)                      \
    {                                                                                              \
        uint8_t out[sizeof(type)];                                                                 \
        for (size_t i = 0; i < sizeof(type); i++) {                                                \
            out[i] = (uint8_t)(value >> (8 * i));                                                  \
        }                                                                                          \
        cm_writer_bytes(writer, out, sizeof(out));                                                 \
    }
CM_WRITER_PUT(uint8_t, u8)
CM_WRITER_PUT(uint16_t, u16)
CM_WRITER_PUT(uint32_t, u32)
CM_WRITER_PUT(uint64_t, u64)
#undef CM_WRITER_PUT

/* Size arithmetic that cannot wrap: true and *ret_sum/_product set, or false. */
static inline bool cm_size_add(uint64_t a, uint64_t b, uint64_t *ret_sum)
{
    return !__builtin_add_overflow(a, b, ret_sum);
}

static inline bool cm_size_multiply(uint64_t a, uint64_t b, uint64_t *ret_product)
{
    return !__builtin_mul_overflow(a, b, ret_product);
}

#endif
