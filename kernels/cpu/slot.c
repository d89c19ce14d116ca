/* What a slot releases. One way, three stages: stop strings (nothing that may still become one goes
 * on) → the guard (nothing that may still be forbidden goes on) → whole UTF-8 characters. */
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

/* Start of the stop string that is complete first, the longest of those that end together, and its
 * bytes; held_bytes and 0 if there is none. By the end and not by the start: so the cut does not
 * depend on how the text came in tokens. */
static uint32_t stop_find(const struct cm_slot *slot, uint32_t *ret_bytes)
{
    *ret_bytes = 0;
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
            *ret_bytes = longest;
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

/* Bytes out as UTF-8; each malformed part becomes one U+FFFD. Returns bytes consumed: less than
 * `size` where a character may still be completed and this is not the end. */
static uint32_t text_move(const uint8_t *bytes, uint32_t size, bool last, uint8_t *ret_text,
                          uint32_t *ret_bytes)
{
    uint32_t at = 0, used = 0;
    while (at < size) {
        uint32_t part;
        enum sequence found = sequence_read(bytes + at, size - at, &part);
        if (found == UNFINISHED && !last) {
            break;
        }
        const void *from = found == WHOLE ? (const void *)(bytes + at) : "\xef\xbf\xbd";
        uint32_t moved = found == WHOLE ? part : 3;
        memcpy(ret_text + used, from, moved);
        used += moved;
        at += part;
    }
    *ret_bytes = used;
    return at;
}

#define CHARACTER_REST 3u /* bytes of a character that is not whole yet */
#define RAW_MAX                                                                                    \
    (CHARACTER_REST + CM_GUARD_REPLACEMENT_MAX +                                                   \
     CM_GUARD_OUT_BYTES(CM_SLOT_HELD_MAX + CM_GUARD_HELD_MAX))

_Static_assert(CM_GUARD_REPLACEMENT_MAX +
                       3 * (CHARACTER_REST + CM_SLOT_HELD_MAX + CM_GUARD_HELD_MAX) <=
                   CM_STEP_BYTES_MAX,
               "all that is held fits into one release: three bytes for each at most, and the "
               "replacement of a span that began before the reply");

/* What passed the stop strings, through the guard. False: a refuse rule ends the reply. */
static bool guard_pass(const struct cm_guard_pack *guard, struct cm_slot *slot, uint32_t limit,
                       enum cm_slot_end end, uint32_t stop_bytes, uint8_t *raw, uint32_t *used)
{
    if (guard == NULL) {
        memcpy(raw + *used, slot->held, limit);
        *used += limit;
        return true;
    }
    return cm_guard_feed(guard, &slot->guard, slot->held, limit, raw, used) &&
           (end == CM_SLOT_GOES_ON ||
            cm_guard_finish(guard, &slot->guard,
                            end == CM_SLOT_TEXT_END ? CM_GUARD_TEXT_END : CM_GUARD_CUT,
                            slot->held + limit, stop_bytes, raw, used));
}

enum cm_finish cm_slot_release(const struct cm_guard_pack *guard, struct cm_slot *slot,
                               const uint8_t *bytes, uint32_t size, enum cm_slot_end end,
                               uint8_t *ret_text, uint32_t *ret_bytes)
{
    uint8_t raw[RAW_MAX];
    uint32_t used = slot->rest_bytes, stop_bytes;
    CM_ASSERT(size <= CM_SLOT_HELD_MAX - slot->held_bytes);
    if (size > 0) {
        memcpy(slot->held + slot->held_bytes, bytes, size);
        slot->held_bytes += size;
    }
    uint32_t limit = stop_find(slot, &stop_bytes);
    if (stop_bytes > 0) {
        end = CM_SLOT_CUT;
    } else if (end == CM_SLOT_GOES_ON) {
        limit = stop_begins(slot);
    }
    memcpy(raw, slot->rest, used);
    bool open = guard_pass(guard, slot, limit, end, stop_bytes, raw, &used);
    bool last = end != CM_SLOT_GOES_ON || !open;
    uint32_t moved = text_move(raw, used, last, ret_text, ret_bytes);
    slot->rest_bytes = used - moved;
    memcpy(slot->rest, raw + moved, slot->rest_bytes);
    memmove(slot->held, slot->held + limit, slot->held_bytes - limit);
    slot->held_bytes = last ? 0 : slot->held_bytes - limit;
    explicit_bzero(raw, used);
    return !open ? CM_FINISH_FILTER : stop_bytes > 0 ? CM_FINISH_STOP : CM_FINISH_NONE;
}
