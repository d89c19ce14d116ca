/* Unicode's normalization form C (UAX #15; tables as old as those of `tokenizers`), which Qwen's
 * tokenizers bring a text to. */
#ifndef CASEMATE_RUNTIME_WORKER_NORMAL_H
#define CASEMATE_RUNTIME_WORKER_NORMAL_H

#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"

struct cm_normalizer; /* memory for one text */

/* text_bytes_max: of the longest text. */
CM_MUST_USE enum cm_status cm_normalizer_new(size_t text_bytes_max,
                                             struct cm_normalizer **ret_normalizer,
                                             struct cm_error *err);
void cm_normalizer_free(struct cm_normalizer *normalizer); /* NULL is fine; wipes */

/* Valid UTF-8 of no more bytes than text_bytes_max in form C: the text itself, or the normalizer's
 * until its next run. Takes time in proportion to the text, whatever it holds. */
const uint8_t *cm_normalizer_run(struct cm_normalizer *normalizer, const uint8_t *text, size_t size,
                                 size_t *ret_size);

#endif
