/* What a slot releases: whole UTF-8 characters, and nothing that may still become a stop string. */
#include "kernels/cpu/cpu_internal.h"

#include <string.h>

/* Bytes of the UTF-8 sequence at `at` (1..4) if it is whole and well-formed (RFC 3629); 0 if it is
 * not; -1 if it may become so with more bytes. */
static int sequence_size(const uint8_t *at, uint32_t left)
{
    uint8_t lead = at[0];
    if (lead < 0x80) {
        return 1;
    }
    if (lead < 0xc2 || lead > 0xf4) {
        return 0;
    }
    uint32_t size = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (uint32_t i = 1; i < size; i++) {
        if (i >= left) {
            return -1;
        }
        if (at[i] < low || at[i] > high) {
            return 0;
        }
        low = 0x80;
        high = 0xbf;
    }
    return (int)size;
}

/* Earliest complete stop string in the held bytes; held_bytes if there is none. */
static uint32_t stop_find(const struct cm_slot *slot)
{
    for (uint32_t at = 0; at < slot->held_bytes; at++) {
        for (uint32_t s = 0; s < slot->stop_count; s++) {
            uint32_t size = slot->stop_bytes[s];
            if (size <= slot->held_bytes - at &&
                memcmp(slot->held + at, slot->stops[s], size) == 0) {
                return at;
            }
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

/* Move held bytes before `limit` out as UTF-8; malformed bytes become U+FFFD. Returns bytes
 * consumed: less than limit where a character may still be completed and this is not the end. */
static uint32_t text_move(const struct cm_slot *slot, uint32_t limit, bool last, uint8_t *ret_text,
                          uint32_t *ret_bytes)
{
    uint32_t at = 0, used = 0;
    while (at < limit) {
        int size = sequence_size(slot->held + at, limit - at);
        if (size < 0 && !last) {
            break;
        }
        if (size <= 0) {
            memcpy(ret_text + used, "\xef\xbf\xbd", 3);
            used += 3;
            at += 1;
        } else {
            memcpy(ret_text + used, slot->held + at, (size_t)size);
            used += (uint32_t)size;
            at += (uint32_t)size;
        }
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
