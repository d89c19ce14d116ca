/* Fuzz target: a message as documents and views. Whatever the bytes: the views say the same however
 * the text is cut, every byte's origin lies in the text, and the work is bounded by it. */
#include <stdlib.h>

#include "kernels/guard/document.h"
#include "tests/fuzz/seed.h"

static const uint8_t *seed_make(size_t *ret_size)
{
    static const char seed[] =
        "Ignore \xF3\xA0\x81\xA1\xF3\xA0\x81\xA2 \xEF\xBC\xA1\xCC\x81 %41%42%43 "
        "QUJDREVGR0hJSktMTU5PUA== 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f 50 "
        "\xE2\x80\xAE"
        "abc\xE2\x80\xAC \xE2\x80\x8B\xE2\x80\x8C\xFF";
    *ret_size = sizeof(seed) - 1;
    return (const uint8_t *)seed;
}

static struct cm_documents documents;
static struct cm_views views;
static struct {
    uint64_t hash[CM_VIEW_COUNT], bytes;
    size_t size;
} seen;

static void views_take(void *context, enum cm_view view, const struct cm_view_ring *ring,
                       uint64_t from)
{
    (void)context;
    for (uint64_t i = from; i < ring->end; i++) {
        uint32_t at = (uint32_t)i % CM_VIEW_RING;
        if (ring->spans[at].end > seen.size || ring->spans[at].start > ring->spans[at].end) {
            abort();
        }
        seen.hash[view] = (seen.hash[view] ^ ring->bytes[at] ^ (uint64_t)ring->spans[at].end << 8) *
                          0x100000001b3u;
        seen.bytes++;
    }
}

static void documents_take(void *context, enum cm_document document, enum cm_view view,
                           const struct cm_view_ring *ring, uint64_t from)
{
    (void)document;
    views_take(context, view, ring, from);
}

static void cut_read(const uint8_t *data, size_t size, size_t cut, uint64_t ret_hash[CM_VIEW_COUNT])
{
    seen.bytes = seen.hash[0] = seen.hash[1] = seen.hash[2] = 0;
    cm_views_begin(&views, views_take, NULL, NULL);
    cm_views_push(&views, data, cut, 0);
    cm_views_push(&views, data + cut, size - cut, (uint32_t)cut);
    cm_views_end(&views);
    for (size_t i = 0; i < CM_VIEW_COUNT; i++) {
        ret_hash[i] = seen.hash[i];
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint64_t whole[CM_VIEW_COUNT], cut[CM_VIEW_COUNT];
    seen.size = size;
    cut_read(data, size, size, whole);
    cut_read(data, size, size > 0 ? data[0] % size : 0, cut);
    for (size_t i = 0; i < CM_VIEW_COUNT; i++) {
        if (whole[i] != cut[i]) {
            abort();
        }
    }
    seen.bytes = 0;
    cm_documents_read(&documents, data, size, documents_take, NULL);
    if (seen.bytes > 64 + 200 * (uint64_t)size) {
        abort();
    }
    return 0;
}
