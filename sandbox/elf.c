/* ELF64: program headers, interpreter, dynamic section. */
#include "sandbox/elf.h"

#include <elf.h>
#include <string.h>

#include "runtime/base/cursor.h"

#define SEGMENTS_MAX 64u
#define DYNAMICS_MAX 4096u

struct segment {
    uint32_t type;
    uint64_t offset, address, bytes;
};

struct reader {
    const uint8_t *bytes;
    size_t size;
    uint32_t segment_count;
    struct segment segments[SEGMENTS_MAX];
};

static struct cm_cursor cursor_at(const struct reader *reader, uint64_t offset)
{
    struct cm_cursor cursor = cm_cursor_init(reader->bytes, reader->size);
    if (offset > reader->size) {
        cursor.failed = true;
    } else {
        cursor.offset = (size_t)offset;
    }
    return cursor;
}

static const char *segments_read(struct reader *reader)
{
    struct cm_cursor cursor = cm_cursor_init(reader->bytes, reader->size);
    const uint8_t *mark = cm_cursor_take(&cursor, EI_NIDENT);
    if (mark == NULL || memcmp(mark, ELFMAG, SELFMAG) != 0 || mark[EI_CLASS] != ELFCLASS64 ||
        mark[EI_DATA] != ELFDATA2LSB) {
        return "it is no little-endian ELF64";
    }
    cm_cursor_skip(&cursor, offsetof(Elf64_Ehdr, e_phoff) - EI_NIDENT);
    uint64_t headers = cm_cursor_u64(&cursor);
    cm_cursor_skip(&cursor, offsetof(Elf64_Ehdr, e_phentsize) - offsetof(Elf64_Ehdr, e_shoff));
    uint16_t header_bytes = cm_cursor_u16(&cursor);
    uint16_t count = cm_cursor_u16(&cursor);
    if (!cm_cursor_ok(&cursor) || header_bytes != sizeof(Elf64_Phdr) || count > SEGMENTS_MAX) {
        return "its header is malformed";
    }
    cursor = cursor_at(reader, headers);
    for (uint16_t i = 0; i < count; i++) {
        struct segment *segment = &reader->segments[i];
        segment->type = cm_cursor_u32(&cursor);
        cm_cursor_skip(&cursor, 4);
        segment->offset = cm_cursor_u64(&cursor);
        segment->address = cm_cursor_u64(&cursor);
        cm_cursor_skip(&cursor, 8);
        segment->bytes = cm_cursor_u64(&cursor);
        cm_cursor_skip(&cursor, 16);
    }
    reader->segment_count = count;
    return cm_cursor_ok(&cursor) ? NULL : "its program headers are cut";
}

static const struct segment *segment_find(const struct reader *reader, uint32_t type)
{
    for (uint32_t i = 0; i < reader->segment_count; i++) {
        if (reader->segments[i].type == type) {
            return &reader->segments[i];
        }
    }
    return NULL;
}

/* File offset of an address; UINT64_MAX if no segment holds it. */
static uint64_t address_offset(const struct reader *reader, uint64_t address)
{
    for (uint32_t i = 0; i < reader->segment_count; i++) {
        const struct segment *segment = &reader->segments[i];
        if (segment->type == PT_LOAD && address >= segment->address &&
            address - segment->address < segment->bytes) {
            return segment->offset + (address - segment->address);
        }
    }
    return UINT64_MAX;
}

/* A terminated name of 1 to CM_ELF_NAME_BYTES - 1 bytes. */
static bool name_read(const struct reader *reader, uint64_t offset,
                      char ret_name[static CM_ELF_NAME_BYTES])
{
    struct cm_cursor cursor = cursor_at(reader, offset);
    size_t left = cm_cursor_left(&cursor);
    size_t most = left < CM_ELF_NAME_BYTES ? left : CM_ELF_NAME_BYTES;
    const uint8_t *at = cm_cursor_take(&cursor, most);
    const uint8_t *end = at != NULL ? memchr(at, '\0', most) : NULL;
    if (end == NULL || end == at) {
        return false;
    }
    memcpy(ret_name, at, (size_t)(end - at) + 1);
    return true;
}

static const char *needed_read(const struct reader *reader, const struct segment *dynamic,
                               struct cm_elf *elf)
{
    uint64_t names[CM_ELF_NEEDED_MAX], table = UINT64_MAX;
    struct cm_cursor cursor = cursor_at(reader, dynamic->offset);
    for (uint32_t i = 0; i < DYNAMICS_MAX; i++) {
        uint64_t tag = cm_cursor_u64(&cursor);
        uint64_t value = cm_cursor_u64(&cursor);
        if (!cm_cursor_ok(&cursor) || tag == DT_NULL) {
            break;
        }
        if (tag == DT_STRTAB) {
            table = address_offset(reader, value);
        } else if (tag == DT_NEEDED && elf->needed_count == CM_ELF_NEEDED_MAX) {
            return "it needs too many libraries";
        } else if (tag == DT_NEEDED) {
            names[elf->needed_count++] = value;
        }
    }
    for (uint32_t i = 0; i < elf->needed_count; i++) {
        uint64_t offset;
        if (table == UINT64_MAX || !cm_cursor_ok(&cursor) ||
            __builtin_add_overflow(table, names[i], &offset) ||
            !name_read(reader, offset, elf->needed[i]) || strchr(elf->needed[i], '/') != NULL) {
            return "its dynamic section is malformed";
        }
    }
    return NULL;
}

enum cm_status cm_elf_read(const uint8_t *bytes, size_t size, const char *name,
                           struct cm_elf *ret_elf, struct cm_error *err)
{
    struct reader reader = {.bytes = bytes, .size = size};
    memset(ret_elf, 0, sizeof(*ret_elf));
    const char *refusal = segments_read(&reader);
    const struct segment *interpreter = segment_find(&reader, PT_INTERP);
    const struct segment *dynamic = segment_find(&reader, PT_DYNAMIC);
    if (refusal == NULL && interpreter != NULL &&
        !name_read(&reader, interpreter->offset, ret_elf->interpreter)) {
        refusal = "its interpreter's name is malformed";
    }
    if (refusal == NULL && dynamic != NULL) {
        refusal = needed_read(&reader, dynamic, ret_elf);
    }
    return refusal == NULL
               ? CM_OK
               : cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-ELF",
                              "cannot load %s: %s: install Casemate again", name, refusal);
}
