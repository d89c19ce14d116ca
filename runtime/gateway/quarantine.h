/* Requests that a worker died over.
 *
 * The gateway alone knows which requests a dead worker had; it keeps a keyed hash of each. One that
 * was there is a suspect: sent again by its client, it runs with no other suspect beside it, so
 * that a second death has one culprit. One that was there twice is refused for an hour. Whatever
 * ends well is forgotten. No request is ever sent again by us.
 *
 * The hash is of the prompt, not of who sent it: the same poison through ten keys is one poison.
 * Its key is random and lives as long as the gateway. The table is bounded; suspects go first. */
#ifndef CASEMATE_RUNTIME_GATEWAY_QUARANTINE_H
#define CASEMATE_RUNTIME_GATEWAY_QUARANTINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"

#define CM_QUARANTINE_ROWS         256
#define CM_QUARANTINE_DIGEST_BYTES 16
#define CM_QUARANTINE_DEATHS       2        /* with so many it is refused */
#define CM_QUARANTINE_SUSPECT_MS   600000u  /* from its first death */
#define CM_QUARANTINE_REFUSE_MS    3600000u /* from its second */

enum cm_suspicion { CM_SUSPICION_NONE, CM_SUSPICION_SUSPECT, CM_SUSPICION_REFUSED };

struct cm_quarantine_row {
    uint8_t digest[CM_QUARANTINE_DIGEST_BYTES];
    uint32_t deaths;  /* 0: the row is free */
    uint64_t died_ms; /* the last death; CLOCK_MONOTONIC */
    uint64_t until_ms;
};

struct cm_quarantine {
    uint8_t key[32];
    struct cm_quarantine_row rows[CM_QUARANTINE_ROWS];
};

/* Empty, with a fresh key. Fails: SYSTEM. */
CM_MUST_USE enum cm_status cm_quarantine_init(struct cm_quarantine *quarantine,
                                              struct cm_error *err);
/* HMAC-SHA-256 (RFC 2104), its first 16 bytes. */
void cm_quarantine_digest(const struct cm_quarantine *quarantine, const void *prompt, size_t bytes,
                          uint8_t ret_digest[static CM_QUARANTINE_DIGEST_BYTES]);
/* *ret_left_ms: for how long, where it is not NONE. */
enum cm_suspicion cm_quarantine_look(const struct cm_quarantine *quarantine,
                                     const uint8_t digest[static CM_QUARANTINE_DIGEST_BYTES],
                                     uint64_t now_ms, uint64_t *ret_left_ms);
/* A worker died while it had this one; tells what it is now. Calls with one now_ms are one death:
 * a prompt that it had twice is blamed once. */
enum cm_suspicion cm_quarantine_died(struct cm_quarantine *quarantine,
                                     const uint8_t digest[static CM_QUARANTINE_DIGEST_BYTES],
                                     uint64_t now_ms);
/* It ended, and the worker lives. */
void cm_quarantine_lived(struct cm_quarantine *quarantine,
                         const uint8_t digest[static CM_QUARANTINE_DIGEST_BYTES]);
/* Rows that are `suspicion` now. */
uint32_t cm_quarantine_count(const struct cm_quarantine *quarantine, enum cm_suspicion suspicion,
                             uint64_t now_ms);

#endif
