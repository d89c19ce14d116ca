/* KV pages: who holds which, and which full ones are kept for the same prefix of the same tenant.
 *
 * A page is wiped and free, held by one or more sequences, or kept: nobody holds it, but its
 * content is known (a tenant's tokens up to it, by the model or one adapter), so the next sequence
 * with that prefix takes it up instead of computing it. Kept pages form trees (a page's parent is
 * the page before it); they are given up from the leaves, least recently used first, when pages run
 * out, and wiped then. A page is found only by the exact tenant, adapter, class, parent and tokens;
 * the hash that finds its place is keyed anew at each start. All memory is taken in _new.
 * Single-threaded. */
#ifndef CASEMATE_RUNTIME_WORKER_PAGES_H
#define CASEMATE_RUNTIME_WORKER_PAGES_H

#include "kernels/device.h"

#define CM_PAGE_NONE UINT32_MAX

struct cm_pages;

/* Borrows the device, whose pages 0 .. count-1 it hands out. keep: false keeps nothing. */
CM_MUST_USE enum cm_status cm_pages_new(struct cm_device *device, uint32_t count, bool keep,
                                        struct cm_pages **ret_pages, struct cm_error *err);
void cm_pages_free(struct cm_pages *pages); /* forgets all tokens; NULL is fine */

/* Pages that cm_pages_take would give. */
uint32_t cm_pages_available(const struct cm_pages *pages);
/* A wiped page, held once. One must be available. */
uint32_t cm_pages_take(struct cm_pages *pages);
/* Whose pages are found: of one tenant, computed with one adapter (its generation, never used
 * again; 0: none), in one class (enum cm_prompts). */
struct cm_pages_of {
    uint64_t tenant, adapter, prompts;
};
/* The kept pages that hold the first whole pages of `tokens` for them, each held once more.
 * Returns how many; ret_page has room for count / CM_KV_PAGE_POSITIONS. */
uint32_t cm_pages_match(struct cm_pages *pages, struct cm_pages_of of, const uint32_t *tokens,
                        uint32_t count, uint32_t *ret_page);
/* `page` is computed to its end and holds `tokens` (one page full) after `parent` (CM_PAGE_NONE:
 * the first), which the caller holds too: keep it from now on. Returns the page to go on with:
 * itself, or an equal one that was kept before, and then `page` is given back. */
uint32_t cm_pages_keep(struct cm_pages *pages, struct cm_pages_of of, uint32_t parent,
                       const uint32_t *tokens, uint32_t page);
/* Wipe what is kept of an adapter, which nobody uses any more. */
void cm_pages_forget(struct cm_pages *pages, uint64_t adapter);
/* Hold them no more. */
void cm_pages_release(struct cm_pages *pages, const uint32_t *page, uint32_t count);

/* Keyed hash (SipHash-2-4); here for its test vectors. */
uint64_t cm_siphash(const uint8_t key[static 16], const void *bytes, size_t size);

#endif
