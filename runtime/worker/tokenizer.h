/* Text to token ids over a manifest's tables: byte-level byte-pair encoding, or SentencePiece's.
 *
 * Text never yields a control id, whatever it spells; only cm_tokenizer_control does. All memory is
 * taken in _new. */
#ifndef CASEMATE_RUNTIME_WORKER_TOKENIZER_H
#define CASEMATE_RUNTIME_WORKER_TOKENIZER_H

#include "loader/package/manifest.h"

struct cm_tokenizer;

/* Where ids go. count goes on beyond capacity, so that a refusal can name the length. */
struct cm_token_list {
    uint32_t *ids;
    uint32_t capacity;
    uint32_t count;
};

/* Borrows the manifest. text_bytes_max: of the longest text that _text will be given. Fails:
 * PACKAGE if a merge makes no token. */
CM_MUST_USE enum cm_status cm_tokenizer_new(const struct cm_manifest *manifest,
                                            size_t text_bytes_max,
                                            struct cm_tokenizer **ret_tokenizer,
                                            struct cm_error *err);
void cm_tokenizer_free(struct cm_tokenizer *tokenizer); /* NULL is fine */

/* Append the ids of valid UTF-8 text. A piece without any border of 64 KiB and more is cut there.
 */
void cm_tokenizer_text(struct cm_tokenizer *tokenizer, const uint8_t *text, size_t size,
                       struct cm_token_list *list);
/* The same of a text that stands behind a control token: SentencePiece puts no space before it. */
void cm_tokenizer_text_within(struct cm_tokenizer *tokenizer, const uint8_t *text, size_t size,
                              struct cm_token_list *list);
/* Append one id. */
void cm_token_add(struct cm_token_list *list, uint32_t id);
/* Id of the control token with this spelling; -1: none. */
int64_t cm_tokenizer_control(const struct cm_tokenizer *tokenizer, const char *spelling);

/* Valid UTF-8 without NUL (RFC 3629)? */
bool cm_text_valid(const uint8_t *text, size_t size);

#endif
