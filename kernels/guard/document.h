/* A message as documents: its text, and what is hidden or encoded in it, one layer deep.
 *
 *   hidden   what renders as nothing and a model still reads: tag characters (U+E0020..E007E are
 *            ASCII), variation selectors (U+FE00.. are bytes 0.., U+E0100.. bytes 16..), bits
 *            written in pairs of invisible characters (U+200B/U+200C, U+2062/U+2064, eight to a
 *            byte, highest first; 0 and 1 also exchanged)
 *   encoded  base64 and base64url runs of 16 and more, hexadecimal of 16 bytes and more (also with
 *            separators), percent escapes, and text between a right-to-left override and its end,
 *            in the order in which it is shown
 *
 * Hidden channels are read before the views drop them. What is decoded is shorter than what it came
 * from and is not decoded again, so all documents together have at most 5 times the bytes of the
 * text, in constant memory and linear time. Each byte's origin in the raw text is kept. */
#ifndef CASEMATE_KERNELS_GUARD_DOCUMENT_H
#define CASEMATE_KERNELS_GUARD_DOCUMENT_H

#include <stdbool.h>

#include "kernels/guard/view.h"

enum cm_document {
    CM_DOCUMENT_TEXT,
    CM_DOCUMENT_TAGS,
    CM_DOCUMENT_SELECTORS,
    CM_DOCUMENT_BITS,
    CM_DOCUMENT_BITS_EXCHANGED,
    CM_DOCUMENT_BASE64,
    CM_DOCUMENT_HEX,
    CM_DOCUMENT_PERCENT,
    CM_DOCUMENT_REVERSED,
    CM_DOCUMENT_COUNT
};
const char *cm_document_name(enum cm_document document);

/* Positions from..end-1 of one view of one document are new. */
typedef void (*cm_document_sink)(void *context, enum cm_document document, enum cm_view view,
                                 const struct cm_view_ring *ring, uint64_t from);

struct cm_documents {
    cm_document_sink sink;
    void *context;
    const uint8_t *text;
    uint32_t size;
    uint32_t reversed_end; /* overrides before it are inside of one */
    struct {
        uint32_t value, count, start;
    } bits[2];
    struct cm_document_views {
        struct cm_documents *owner;
        enum cm_document document;
        bool open;
        struct cm_views views;
    } each[CM_DOCUMENT_COUNT];
};

/* All views of all documents of one message go to the sink. size < 2^32. */
void cm_documents_read(struct cm_documents *documents, const uint8_t *text, size_t size,
                       cm_document_sink sink, void *context);

#endif
