/* KV pages with reference counts, and the tree of kept prefixes over them. */
#include "runtime/worker/pages.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

struct page {
    uint32_t holders;
    bool kept;
    uint32_t parent, children; /* of kept ones */
    uint32_t next;             /* in its bucket */
    uint32_t older, newer;     /* in the list of kept ones that nobody holds */
    struct cm_pages_of of;
    uint32_t bucket;
    uint32_t tokens[CM_KV_PAGE_POSITIONS];
};

struct cm_pages {
    struct cm_device *device;
    bool keep;
    uint32_t count;
    struct page *page; /* [count] */
    uint32_t *wiped;   /* [count] free ones */
    uint32_t wiped_count;
    uint32_t idle_count; /* kept, nobody holds them */
    uint32_t oldest, newest;
    uint32_t *buckets; /* [bucket_count], a power of two */
    uint32_t bucket_count;
    uint8_t key[16];
};

/* ------------------------------------------------------------------ the hash */

static inline uint64_t turn(uint64_t x, int bits)
{
    return x << bits | x >> (64 - bits);
}

static void sip_rounds(uint64_t v[4], int rounds)
{
    for (int i = 0; i < rounds; i++) {
        v[0] += v[1];
        v[2] += v[3];
        v[1] = turn(v[1], 13) ^ v[0];
        v[3] = turn(v[3], 16) ^ v[2];
        v[0] = turn(v[0], 32);
        v[2] += v[1];
        v[0] += v[3];
        v[1] = turn(v[1], 17) ^ v[2];
        v[3] = turn(v[3], 21) ^ v[0];
        v[2] = turn(v[2], 32);
    }
}

/* Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012), section 2. */
uint64_t cm_siphash(const uint8_t key[static 16], const void *bytes, size_t size)
{
    uint64_t k[2], word;
    memcpy(k, key, sizeof(k));
    uint64_t v[4] = {k[0] ^ 0x736f6d6570736575ull, k[1] ^ 0x646f72616e646f6dull,
                     k[0] ^ 0x6c7967656e657261ull, k[1] ^ 0x7465646279746573ull};
    for (size_t at = 0; at <= size; at += 8) {
        bool last = size - at < 8;
        word = last ? (uint64_t)size << 56 : 0;
        memcpy(&word, (const uint8_t *)bytes + at, last ? size - at : 8);
        v[3] ^= word;
        sip_rounds(v, 2);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    sip_rounds(v, 4);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

static uint32_t bucket_of(const struct cm_pages *p, struct cm_pages_of of, uint32_t parent,
                          const uint32_t *tokens)
{
    struct {
        struct cm_pages_of of;
        uint64_t parent;
        uint32_t tokens[CM_KV_PAGE_POSITIONS];
    } whole = {.of = of, .parent = parent};
    memcpy(whole.tokens, tokens, sizeof(whole.tokens));
    return (uint32_t)cm_siphash(p->key, &whole, sizeof(whole)) & (p->bucket_count - 1);
}

/* ------------------------------------------------------------------ coming and going */

enum cm_status cm_pages_new(struct cm_device *device, uint32_t count, bool keep,
                            struct cm_pages **ret_pages, struct cm_error *err)
{
    struct cm_pages *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "KV pages");
    }
    *p = (struct cm_pages){.device = device,
                           .keep = keep,
                           .count = count,
                           .oldest = CM_PAGE_NONE,
                           .newest = CM_PAGE_NONE,
                           .bucket_count = 1};
    while (p->bucket_count < count) {
        p->bucket_count *= 2;
    }
    p->page = calloc(count, sizeof(*p->page));
    p->wiped = calloc(count, sizeof(*p->wiped));
    p->buckets = calloc(p->bucket_count, sizeof(*p->buckets));
    if (p->page == NULL || p->wiped == NULL || p->buckets == NULL) {
        cm_pages_free(p);
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "table of %u KV pages", count);
    }
    if (getrandom(p->key, sizeof(p->key), 0) != (ssize_t)sizeof(p->key)) {
        cm_pages_free(p);
        return cm_error_errno(err, EIO, "CM-SYS-RANDOM", "key of the prefix cache");
    }
    memset(p->buckets, 0xff, p->bucket_count * sizeof(*p->buckets)); /* CM_PAGE_NONE each */
    while (p->wiped_count < count) {
        p->wiped[p->wiped_count] = count - 1 - p->wiped_count;
        p->wiped_count++;
    }
    *ret_pages = p;
    return CM_OK;
}

void cm_pages_free(struct cm_pages *p)
{
    if (p == NULL) {
        return;
    }
    if (p->page != NULL) {
        explicit_bzero(p->page, p->count * sizeof(*p->page));
    }
    free(p->page);
    free(p->wiped);
    free(p->buckets);
    explicit_bzero(p, sizeof(*p));
    free(p);
}

uint32_t cm_pages_available(const struct cm_pages *p)
{
    return p->wiped_count + p->idle_count;
}

/* ------------------------------------------------------------------ the list of idle ones */

static void idle_remove(struct cm_pages *p, uint32_t index)
{
    const struct page *page = &p->page[index];
    *(page->older != CM_PAGE_NONE ? &p->page[page->older].newer : &p->oldest) = page->newer;
    *(page->newer != CM_PAGE_NONE ? &p->page[page->newer].older : &p->newest) = page->older;
    p->idle_count--;
}

static void idle_add(struct cm_pages *p, uint32_t index)
{
    struct page *page = &p->page[index];
    page->older = p->newest;
    page->newer = CM_PAGE_NONE;
    *(p->newest != CM_PAGE_NONE ? &p->page[p->newest].newer : &p->oldest) = index;
    p->newest = index;
    p->idle_count++;
}

static void wipe(struct cm_pages *p, uint32_t index)
{
    cm_device_scrub_pages(p->device, &index, 1);
    explicit_bzero(&p->page[index], sizeof(p->page[index]));
    p->wiped[p->wiped_count++] = index;
}

/* An idle page without children: out of its bucket and its tree, and wiped. */
static void leaf_forget(struct cm_pages *p, uint32_t index)
{
    const struct page *page = &p->page[index];
    CM_ASSERT(page->children == 0 && page->holders == 0 && page->kept);
    uint32_t *at = &p->buckets[page->bucket];
    while (*at != index) {
        CM_ASSERT(*at != CM_PAGE_NONE);
        at = &p->page[*at].next;
    }
    *at = page->next;
    if (page->parent != CM_PAGE_NONE) {
        p->page[page->parent].children--;
    }
    idle_remove(p, index);
    wipe(p, index);
}

/* A sequence holds the parents of what it holds and lets go of the leaves first: so children are
 * older in the list than their parent, and the oldest idle page has none. */
static void oldest_forget(struct cm_pages *p)
{
    CM_ASSERT(p->oldest != CM_PAGE_NONE);
    leaf_forget(p, p->oldest);
}

void cm_pages_forget(struct cm_pages *p, uint64_t adapter)
{
    for (uint32_t index = p->oldest, next; index != CM_PAGE_NONE; index = next) {
        next = p->page[index].newer;
        if (p->page[index].of.adapter == adapter) {
            leaf_forget(p, index);
        }
    }
}

/* ------------------------------------------------------------------ use */

uint32_t cm_pages_take(struct cm_pages *p)
{
    if (p->wiped_count == 0) {
        oldest_forget(p);
    }
    const uint32_t index = p->wiped[--p->wiped_count];
    p->page[index].holders = 1;
    return index;
}

static void hold(struct cm_pages *p, uint32_t index)
{
    if (p->page[index].holders++ == 0) {
        idle_remove(p, index);
    }
}

static uint32_t find(const struct cm_pages *p, uint32_t bucket, struct cm_pages_of of,
                     uint32_t parent, const uint32_t *tokens)
{
    uint32_t index = p->buckets[bucket];
    while (index != CM_PAGE_NONE) {
        const struct page *page = &p->page[index];
        if (page->of.tenant == of.tenant && page->of.adapter == of.adapter &&
            page->of.prompts == of.prompts && page->parent == parent &&
            memcmp(page->tokens, tokens, sizeof(page->tokens)) == 0) {
            break;
        }
        index = page->next;
    }
    return index;
}

uint32_t cm_pages_match(struct cm_pages *p, struct cm_pages_of of, const uint32_t *tokens,
                        uint32_t count, uint32_t *ret_page)
{
    uint32_t found = 0, parent = CM_PAGE_NONE;
    while (p->keep && (found + 1) * CM_KV_PAGE_POSITIONS <= count) {
        const uint32_t *at = tokens + found * CM_KV_PAGE_POSITIONS;
        uint32_t index = find(p, bucket_of(p, of, parent, at), of, parent, at);
        if (index == CM_PAGE_NONE) {
            break;
        }
        hold(p, index);
        ret_page[found++] = parent = index;
    }
    return found;
}

uint32_t cm_pages_keep(struct cm_pages *p, struct cm_pages_of of, uint32_t parent,
                       const uint32_t *tokens, uint32_t index)
{
    struct page *page = &p->page[index];
    if (!p->keep || page->kept) {
        return index;
    }
    CM_ASSERT(page->holders == 1 && (parent == CM_PAGE_NONE || p->page[parent].kept));
    const uint32_t bucket = bucket_of(p, of, parent, tokens);
    uint32_t equal = find(p, bucket, of, parent, tokens);
    if (equal != CM_PAGE_NONE) {
        hold(p, equal);
        cm_pages_release(p, &index, 1);
        return equal;
    }
    page->kept = true;
    page->of = of;
    page->parent = parent;
    page->bucket = bucket;
    page->next = p->buckets[bucket];
    memcpy(page->tokens, tokens, sizeof(page->tokens));
    p->buckets[bucket] = index;
    if (parent != CM_PAGE_NONE) {
        p->page[parent].children++;
    }
    return index;
}

void cm_pages_release(struct cm_pages *p, const uint32_t *pages, uint32_t count)
{
    while (count-- > 0) { /* leaves first */
        struct page *page = &p->page[pages[count]];
        CM_ASSERT(page->holders > 0);
        if (--page->holders > 0) {
            continue;
        }
        if (page->kept) {
            idle_add(p, pages[count]);
        } else {
            wipe(p, pages[count]);
        }
    }
}
