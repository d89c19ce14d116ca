/* KV pages: nothing is lost, held twice or found by the wrong one, through any order of use; what
 * is given up is wiped. The model is a list of what should be there, kept by the test. */
#include "kernels/cpu/cpu_internal.h"
#include "runtime/worker/pages.h"
#include "tests/unit/tiny_device.h"

#define PAGES      24u
#define PAGE       CM_KV_PAGE_POSITIONS
#define SEQUENCES  6u
#define OF(number) ((struct cm_pages_of){.tenant = (number)})
#define DEPTH      6u

static struct cm_device *device;
static struct cm_pages *pages;

static void begin(bool keep)
{
    model_make();
    device = device_load(1, PAGES, 32, 32);
    cr_assert_eq(cm_device_model_bind(device, &model, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_pages_new(device, PAGES, keep, &pages, &err), CM_OK);
}

static void end(void)
{
    cm_pages_free(pages);
    cm_device_close(device);
}

/* A page's content stands for what was computed: tenant and prefix. */
static void page_write(uint32_t page, uint64_t mark)
{
    uint8_t *at = device->kv + page * device->page_bytes;
    memcpy(at, &mark, sizeof(mark));
    memcpy(at + device->page_bytes - sizeof(mark), &mark, sizeof(mark));
}

static uint64_t page_read(uint32_t page)
{
    uint64_t mark, last;
    const uint8_t *at = device->kv + page * device->page_bytes;
    memcpy(&mark, at, sizeof(mark));
    memcpy(&last, at + device->page_bytes - sizeof(last), sizeof(last));
    cr_assert_eq(mark, last, "page %u is of two", page);
    return mark;
}

/* Sequence `which` of few different ones, so that prefixes meet: page i has one of two contents. */
static void tokens_make(uint32_t which, uint32_t tokens[DEPTH * PAGE])
{
    for (uint32_t i = 0; i < DEPTH * PAGE; i++) {
        tokens[i] = (which >> (i / PAGE) & 1) * 10 + i % 7;
    }
}

static uint64_t mark_of(uint64_t tenant, uint32_t which, uint32_t depth)
{
    return 1 + tenant * 1000000 + depth * 1000 + (which & ((1u << (depth + 1)) - 1));
}

Test(worker_pages, siphash_is_the_papers)
{
    static const uint8_t key[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uint8_t bytes[64];
    for (uint8_t i = 0; i < 64; i++) {
        bytes[i] = i;
    }
    /* The paper's appendix A, and the first rows of the reference implementation's vectors. */
    cr_assert_eq(cm_siphash(key, bytes, 15), 0xa129ca6149be45e5ull);
    cr_assert_eq(cm_siphash(key, bytes, 0), 0x726fdb47dd0e0e31ull);
    cr_assert_eq(cm_siphash(key, bytes, 1), 0x74f839c593dc67fdull);
    cr_assert_eq(cm_siphash(key, bytes, 8), 0x93f5f5799a932462ull);
}

Test(worker_pages, each_page_is_given_once_and_comes_back_wiped)
{
    uint32_t taken[PAGES];
    for (uint32_t round = 0; round < 6; round++) {
        kv_kind = round < 3 ? CM_KV_FP16 : CM_KV_INT8;
        if (round % 3 == 0) {
            begin(false);
        }
        for (uint32_t i = 0; i < PAGES; i++) {
            cr_assert_eq(cm_pages_available(pages), PAGES - i);
            taken[i] = cm_pages_take(pages);
            cr_assert_eq(page_read(taken[i]), 0);
            for (uint32_t k = 0; k < i; k++) {
                cr_assert_neq(taken[k], taken[i]);
            }
            page_write(taken[i], 7);
        }
        cm_pages_release(pages, taken, PAGES);
        if (round % 3 == 2) {
            end();
        }
    }
}

Test(worker_pages, the_exact_prefix_of_the_same_tenant_is_found_and_nothing_else)
{
    uint32_t tokens[DEPTH * PAGE], other[DEPTH * PAGE], own[DEPTH], found[DEPTH];
    begin(true);
    tokens_make(5, tokens);
    for (uint32_t i = 0; i < 3; i++) {
        own[i] = cm_pages_take(pages);
        own[i] = cm_pages_keep(pages, OF(1), i > 0 ? own[i - 1] : CM_PAGE_NONE, tokens + i * PAGE,
                               own[i]);
    }
    for (uint32_t held = 0; held < 2; held++) {
        cr_assert_eq(cm_pages_match(pages, OF(1), tokens, DEPTH * PAGE, found), 3u);
        cr_assert_eq(memcmp(found, own, sizeof(own[0]) * 3), 0);
        cm_pages_release(pages, found, 3);
        cr_assert_eq(cm_pages_match(pages, OF(1), tokens, 2 * PAGE + 31, found), 2u);
        cm_pages_release(pages, found, 2);
        cr_assert_eq(cm_pages_match(pages, OF(1), tokens, 31, found), 0u);
        cr_assert_eq(cm_pages_match(pages, OF(2), tokens, DEPTH * PAGE, found), 0u,
                     "another tenant");
        const struct cm_pages_of adapted = {.tenant = 1, .adapter = 1};
        cr_assert_eq(cm_pages_match(pages, adapted, tokens, DEPTH * PAGE, found), 0u, "an adapter");
        const struct cm_pages_of rounded = {.tenant = 1, .prompts = CM_PROMPTS_BF16};
        cr_assert_eq(cm_pages_match(pages, rounded, tokens, DEPTH * PAGE, found), 0u, "a class");
        for (uint32_t at = 0; at < 3 * PAGE; at++) { /* one token differs */
            memcpy(other, tokens, sizeof(other));
            other[at] ^= 1;
            cr_assert_eq(cm_pages_match(pages, OF(1), other, DEPTH * PAGE, found), at / PAGE);
            cm_pages_release(pages, found, at / PAGE);
        }
        /* The second page's tokens at the beginning: another parent. */
        cr_assert_eq(cm_pages_match(pages, OF(1), tokens + PAGE, 2 * PAGE, found), 0u);
        if (held == 0) {
            cm_pages_release(pages, own, 3);
        }
    }
    end();
}

/* Two trees of the same tokens, one of an adapter: it goes, with what it held, and nothing else. */
Test(worker_pages, what_is_kept_of_an_adapter_is_wiped_with_it)
{
    uint32_t tokens[DEPTH * PAGE], own[2][DEPTH], found[DEPTH];
    const struct cm_pages_of of[2] = {{.tenant = 1}, {.tenant = 1, .adapter = 9}};
    begin(true);
    tokens_make(5, tokens);
    for (uint32_t which = 0; which < 2; which++) {
        for (uint32_t i = 0; i < 4; i++) {
            own[which][i] = cm_pages_take(pages);
            page_write(own[which][i], 77);
            cr_assert_eq(cm_pages_keep(pages, of[which], i > 0 ? own[which][i - 1] : CM_PAGE_NONE,
                                       tokens + i * PAGE, own[which][i]),
                         own[which][i]);
        }
    }
    cm_pages_release(pages, own[1], 4);
    cm_pages_release(pages, own[0], 4);
    cm_pages_forget(pages, 8);
    cr_assert_eq(cm_pages_match(pages, of[1], tokens, 4 * PAGE, found), 4u);
    cm_pages_release(pages, found, 4);
    cm_pages_forget(pages, 9);
    cr_assert_eq(cm_pages_match(pages, of[1], tokens, 4 * PAGE, found), 0u);
    for (uint32_t i = 0; i < 4; i++) {
        cr_assert_eq(page_read(own[1][i]), 0u, "wiped");
        cr_assert_eq(page_read(own[0][i]), 77u);
    }
    cr_assert_eq(cm_pages_available(pages), PAGES);
    cr_assert_eq(cm_pages_match(pages, of[0], tokens, 4 * PAGE, found), 4u);
    cm_pages_release(pages, found, 4);
    uint32_t all[PAGES];
    for (uint32_t i = 0; i < PAGES; i++) { /* each is there once */
        all[i] = cm_pages_take(pages);
        for (uint32_t before = 0; before < i; before++) {
            cr_assert_neq(all[i], all[before]);
        }
    }
    cm_pages_release(pages, all, PAGES);
    end();
}

Test(worker_pages, equal_pages_become_one)
{
    uint32_t tokens[DEPTH * PAGE];
    begin(true);
    tokens_make(1, tokens);
    uint32_t a = cm_pages_take(pages), b = cm_pages_take(pages);
    cr_assert_eq(cm_pages_keep(pages, OF(1), CM_PAGE_NONE, tokens, a), a);
    page_write(b, 9);
    cr_assert_eq(cm_pages_keep(pages, OF(1), CM_PAGE_NONE, tokens, b), a);
    cr_assert_eq(page_read(b), 0, "the one that was given back is wiped");
    cr_assert_eq(cm_pages_available(pages), PAGES - 1);
    cm_pages_release(pages, &a, 1);
    cr_assert_eq(cm_pages_available(pages), PAGES - 1, "the other one holds it");
    cm_pages_release(pages, &a, 1);
    cr_assert_eq(cm_pages_available(pages), PAGES);
    end();
}

Test(worker_pages, the_least_recently_used_leaf_goes_first)
{
    uint32_t tokens[3][DEPTH * PAGE], page[3][2], found[DEPTH], rest[PAGES];
    begin(true);
    for (uint32_t s = 0; s < 3; s++) {
        tokens_make(s, tokens[s]);
        tokens[s][0] = 50 + s; /* three trees of two pages */
        for (uint32_t i = 0; i < 2; i++) {
            page[s][i] = cm_pages_take(pages);
            (void)cm_pages_keep(pages, OF(1), i > 0 ? page[s][0] : CM_PAGE_NONE,
                                tokens[s] + i * PAGE, page[s][i]);
            page_write(page[s][i], 100 + s);
        }
        cm_pages_release(pages, page[s], 2);
    }
    cr_assert_eq(cm_pages_match(pages, OF(1), tokens[0], 2 * PAGE, found), 2u); /* used again */
    cm_pages_release(pages, found, 2);
    for (uint32_t i = 0; i < PAGES - 6 + 3; i++) {
        rest[i] = cm_pages_take(pages);
        cr_assert_eq(page_read(rest[i]), 0, "wiped");
    }
    cr_assert_eq(cm_pages_match(pages, OF(1), tokens[1], 2 * PAGE, found), 0u);
    cr_assert_eq(cm_pages_match(pages, OF(1), tokens[2], 2 * PAGE, found), 1u, "its leaf is gone");
    cm_pages_release(pages, found, 1);
    cr_assert_eq(cm_pages_match(pages, OF(1), tokens[0], 2 * PAGE, found), 2u);
    cm_pages_release(pages, found, 2);
    cm_pages_release(pages, rest, PAGES - 3);
    end();
}

/* ------------------------------------------------------------------ any order of use */

struct sequence {
    bool on;
    uint64_t tenant;
    uint32_t which, full; /* pages that are computed to their end */
    uint32_t page[DEPTH], count;
};

/* As a scheduler would: match, take the rest, fill page by page, let go. Every page that was
 * matched must hold what its tenant computed for that prefix. */
static void sequence_begin(struct sequence *s)
{
    uint32_t tokens[DEPTH * PAGE];
    *s = (struct sequence){
        .on = true, .tenant = (uint64_t)rand() % 2, .which = (uint32_t)rand() % 8};
    tokens_make(s->which, tokens);
    s->count = s->full = cm_pages_match(pages, OF(s->tenant), tokens, DEPTH * PAGE, s->page);
    for (uint32_t i = 0; i < s->count; i++) {
        cr_assert_eq(page_read(s->page[i]), mark_of(s->tenant, s->which, i));
    }
}

static void sequence_grow(struct sequence *s)
{
    uint32_t tokens[DEPTH * PAGE];
    if (s->full == DEPTH || (s->count == s->full && cm_pages_available(pages) == 0)) {
        return;
    }
    if (s->count == s->full) {
        s->page[s->count++] = cm_pages_take(pages);
        cr_assert_eq(page_read(s->page[s->full]), 0);
        return;
    }
    tokens_make(s->which, tokens);
    page_write(s->page[s->full], mark_of(s->tenant, s->which, s->full));
    s->page[s->full] =
        cm_pages_keep(pages, OF(s->tenant), s->full > 0 ? s->page[s->full - 1] : CM_PAGE_NONE,
                      tokens + s->full * PAGE, s->page[s->full]);
    s->full++;
}

Test(worker_pages, any_order_of_turns_lose_nothing)
{
    static struct sequence all[SEQUENCES];
    uint64_t matched = 0, refused = 0;
    begin(true);
    srand(5);
    for (uint32_t turn = 0; turn < 300000; turn++) {
        struct sequence *s = &all[rand() % SEQUENCES];
        bool held[PAGES] = {false};
        uint32_t held_count = 0;
        if (!s->on) {
            sequence_begin(s);
            matched += s->count;
        } else if (rand() % 6 == 0) {
            cm_pages_release(pages, s->page, s->count);
            s->on = false;
        } else {
            refused += cm_pages_available(pages) == 0;
            sequence_grow(s);
        }
        for (uint32_t i = 0; i < SEQUENCES; i++) {
            for (uint32_t k = 0; all[i].on && k < all[i].count; k++) {
                held_count += !held[all[i].page[k]];
                held[all[i].page[k]] = true;
                cr_assert(k >= all[i].full ||
                          page_read(all[i].page[k]) == mark_of(all[i].tenant, all[i].which, k));
            }
        }
        cr_assert_eq(cm_pages_available(pages), PAGES - held_count, "turn %u", turn);
    }
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        cm_pages_release(pages, all[i].page, all[i].on ? all[i].count : 0);
    }
    cr_assert_eq(cm_pages_available(pages), PAGES);
    printf("worker_pages: %lu pages reused, %lu turns without a page\n", matched, refused);
    cr_assert(matched > 10000 && refused > 100);
    end();
}
