/* The measurement log: what went into our PCR, in order. Software only; keeper, packer, command
 * line and verifier share it.
 *
 * An event is a type and data; its digest, which the PCR is extended with, is SHA-256(u32 type ‖
 * data), so a log can be replayed and no event can pass for one of another type. Encoded:
 * "CMLOG\0\0\0" · u32 version 1 · u32 count · count × (u32 type · u32 bytes · data). Method:
 * TPM 2.0 Library Part 1, section "PCR extend"; the order is that of README.md. */
#ifndef CASEMATE_LOADER_TPM_MEASURE_H
#define CASEMATE_LOADER_TPM_MEASURE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "runtime/base/frame.h"

#define CM_EVENT_BYTES_MAX 2048u
#define CM_EVENTS_MAX      24u
#define CM_LOG_BYTES_MAX   (16u << 10)

/* In the order in which they may come. */
enum cm_event_type {
    CM_EVENT_PROGRAM = 1,   /* name '\0' SHA-256, then the same of each needed library */
    CM_EVENT_FILTERS,       /* "filters" '\0' SHA-256 of all system call filters */
    CM_EVENT_CONFIGURATION, /* canonical text of `sealed:` */
    CM_EVENT_RULES,         /* "rules" '\0' SHA-256 of the rule pack; none where the guard is off */
    CM_EVENT_DEVICE,        /* its identity as text */
    CM_EVENT_PACKAGE,       /* core digest; the last before the unseal */
    CM_EVENT_TLS_KEY,       /* strict mode, after the load: SHA-256 of the SubjectPublicKeyInfo */
    CM_EVENT_READY,         /* strict mode, the cap: empty */
    CM_EVENT_TYPE_COUNT
};

struct cm_event {
    uint32_t type;
    uint32_t bytes;
    uint8_t data[CM_EVENT_BYTES_MAX];
};

struct cm_measurement {
    uint32_t count;
    struct cm_event events[CM_EVENTS_MAX];
};

const char *cm_event_name(uint32_t type); /* "program" …; "unknown" */

/* Append; types never go down, CM_EVENT_PACKAGE comes once. Fails: BUG. */
CM_MUST_USE enum cm_status cm_measurement_add(struct cm_measurement *measurement, uint32_t type,
                                              const void *data, size_t bytes, struct cm_error *err);
/* Digests of sealed memfds, by inode: a library that five programs need is hashed once. Zeroed at
 * first; whoever made the files must keep them while it is used. */
#define CM_DIGEST_CACHE_MAX 64u
struct cm_digest_cache {
    uint32_t count;
    struct {
        uint64_t device, inode;
        uint8_t digest[CM_DIGEST_BYTES];
    } rows[CM_DIGEST_CACHE_MAX];
};

/* Add a file's name and SHA-256 to the PROGRAM event under construction (data may be empty). */
CM_MUST_USE enum cm_status cm_event_file_add(struct cm_event *event, const char *name, int fd,
                                             struct cm_digest_cache *cache, struct cm_error *err);
/* The files of a PROGRAM event in turn, borrowed; *at begins at 0. False: no more, or malformed. */
bool cm_event_file_next(const struct cm_event *event, uint32_t *at, const char **ret_name,
                        const uint8_t **ret_digest);
CM_MUST_USE enum cm_status cm_event_digest(const struct cm_event *event,
                                           uint8_t ret_digest[static CM_DIGEST_BYTES],
                                           struct cm_error *err);
/* The PCR after events [first, first + count), from *pcr. */
CM_MUST_USE enum cm_status cm_measurement_replay(const struct cm_measurement *measurement,
                                                 uint32_t first, uint32_t count,
                                                 uint8_t pcr[static CM_DIGEST_BYTES],
                                                 struct cm_error *err);
CM_MUST_USE enum cm_status cm_measurement_encode(const struct cm_measurement *measurement,
                                                 uint8_t *ret_bytes, size_t size, size_t *ret_used,
                                                 struct cm_error *err);
/* Fails: EVIDENCE CM-EVD-LOG. What it accepts, encode gives back byte by byte. */
CM_MUST_USE enum cm_status cm_measurement_parse(const uint8_t *bytes, size_t size,
                                                struct cm_measurement *ret_measurement,
                                                struct cm_error *err);

#endif
