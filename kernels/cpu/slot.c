/* What a slot releases: whole UTF-8 characters, and nothing that may still become a stop string. */
#include "kernels/cpu/cpu_internal.h"

#include <string.h>

enum sequence { WHOLE, MALFORMED, UNFINISHED };

/* What begins at `at` (RFC 3629), and its bytes: of the character, or of the longest part that a
 * character begins with (The Unicode Standard 16, section 3.9, "maximal subpart"), at least 1. */
static enum sequence sequence_read(const uint8_t *at, uint32_t left, uint32_t *ret_bytes)
{
    uint8_t lead = at[0];
    *ret_bytes = 1;
    if (lead < 0x80) {
        return WHOLE;
    }
    if (lead < 0xc2 || lead > 0xf4) {
        return MALFORMED;
    }
    uint32_t size = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (uint32_t i = 1; i < size; i++) {
        if (i >= left) {
            return UNFINISHED;
        }
        if (at[i] < low || at[i] > high) {
            return MALFORMED;
        }
        *ret_bytes = i + 1;
        low = 0x80;
        high = 0xbf;
    }
    return WHOLE;
}

/* Start of the stop string that is complete first, the longest of those that end together;
 * held_bytes if there is none. By the end and not by the start: so the cut does not depend on how
 * the text came in tokens. */
static uint32_t stop_find(const struct cm_slot *slot)
{
    for (uint32_t end = 1; end <= slot->held_bytes; end++) {
        uint32_t longest = 0;
        for (uint32_t s = 0; s < slot->stop_count; s++) {
            uint32_t size = slot->stop_bytes[s];
            if (size > longest && size <= end &&
                memcmp(slot->held + end - size, slot->stops[s], size) == 0) {
                longest = size;
            }
        }
        if (longest > 0) {
            return end - longest;
        }
    }
    return slot->held_bytes;
}

/* Start of the longest tail that a stop string begins with; held_bytes if there is none. */
static uint32_t stop_begins(const struct cm_slot *slot)
{
    for (uint32_t at = 0; at < slot->held_bytes; at++) {
        uint32_t tail = slot->held_bytes - at;
        for (uint32_t s = 0; s < slot->stop_count; s++) {
            if (tail < slot->stop_bytes[s] && memcmp(slot->held + at, slot->stops[s], tail) == 0) {
                return at;
            }
        }
    }
    return slot->held_bytes;
}

/* Move held bytes before `limit` out as UTF-8; each malformed part becomes one U+FFFD. Returns
 * bytes consumed: less than limit where a character may still be completed and this is not the end.
 */
static uint32_t text_move(const struct cm_slot *slot, uint32_t limit, bool last, uint8_t *ret_text,
                          uint32_t *ret_bytes)
{
    uint32_t at = 0, used = 0;
    while (at < limit) {
        uint32_t size;
        enum sequence found = sequence_read(slot->held + at, limit - at, &size);
        if (found == UNFINISHED && !last) {
            break;
        }
        const void *from = found == WHOLE ? (const void *)(slot->held + at) : "\xef\xbf\xbd";
        uint32_t bytes = found == WHOLE ? size : 3;
        memcpy(ret_text + used, from, bytes);
        used += bytes;
        at += size;
    }
    *ret_bytes = used;
    return at;
}

bool cm_slot_release(struct cm_slot *slot, const uint8_t *bytes, uint32_t size, bool last,
                     uint8_t *ret_text, uint32_t *ret_bytes)
{
    _Static_assert(CM_SLOT_HELD_MAX * 3 <= CM_STEP_BYTES_MAX,
                   "all held bytes fit into one release");
    CM_ASSERT(size <= CM_SLOT_HELD_MAX - slot->held_bytes);
    if (size > 0) {
        memcpy(slot->held + slot->held_bytes, bytes, size);
        slot->held_bytes += size;
    }
    uint32_t stop = stop_find(slot);
    bool stopped = stop < slot->held_bytes;
    uint32_t limit = stopped ? stop : (last ? slot->held_bytes : stop_begins(slot));
    uint32_t moved = text_move(slot, limit, last || stopped, ret_text, ret_bytes);
    if (last || stopped) {
        moved = slot->held_bytes;
    }
    memmove(slot->held, slot->held + moved, slot->held_bytes - moved);
    slot->held_bytes -= moved;
    return stopped;
}
