/* Secret memory: the only place where key material may live.
 *
 * A cm_secret is its own mapping between guard pages, locked (failure is an error), not dumped,
 * wiped on fork, and wiped when freed. A key page is one page of memfd_secret that can be handed
 * to another process by descriptor; both sides see the same bytes, so a wipe holds for both. */
#ifndef CASEMATE_RUNTIME_BASE_SECRET_H
#define CASEMATE_RUNTIME_BASE_SECRET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"

#define CM_KEY_BYTES      32
#define CM_KEY_PAGE_BYTES 4096

struct cm_secret;

/* New zeroed secret of `size` bytes (1 .. 1 MiB). Caller frees. Fails: SYSTEM. */
CM_MUST_USE enum cm_status cm_secret_new(size_t size, struct cm_secret **ret_secret,
                                         struct cm_error *err);
/* Wipe and unmap; NULL is fine. */
void cm_secret_free(struct cm_secret *secret);
uint8_t *cm_secret_bytes(struct cm_secret *secret);
const uint8_t *cm_secret_view(const struct cm_secret *secret);
size_t cm_secret_size(const struct cm_secret *secret);

/* Overwrite with zeros; never optimised away. */
void cm_wipe(void *bytes, size_t size);
/* Constant-time comparison of equal-sized buffers. */
bool cm_ct_equal(const void *a, const void *b, size_t size);

/* Make a key page of CM_KEY_PAGE_BYTES zeros. Owner closes the descriptor. *ret_secret_memory says
 * whether memfd_secret served (else a sealed memfd, which `status` reports). Fails: SYSTEM. */
CM_MUST_USE enum cm_status cm_key_page_new(int *ret_fd, bool *ret_secret_memory,
                                           struct cm_error *err);
/* Map a key page that was received; unmap wipes nothing, cm_wipe first. Fails: SYSTEM. */
CM_MUST_USE enum cm_status cm_key_page_map(int fd, uint8_t **ret_bytes, struct cm_error *err);
/* The same behind a filter that lets nothing be locked: pages of memfd_secret(2) are by nature. */
CM_MUST_USE enum cm_status cm_key_page_map_late(int fd, uint8_t **ret_bytes, struct cm_error *err);
void cm_key_page_unmap(uint8_t *bytes);

#endif
