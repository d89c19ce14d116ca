/* The rule pack: what compiled guard rules look like between the compiler (policies/guard) and
 * whoever runs them (kernels/guard). Layout: policies/guard/FORMAT.md. Numbers are part of the
 * format. */
#ifndef CASEMATE_RUNTIME_BASE_GUARD_PACK_H
#define CASEMATE_RUNTIME_BASE_GUARD_PACK_H

#include <stdint.h>

#include "runtime/base/wire.h"

#define CM_GUARD_MARK            "CMGUARD"
#define CM_GUARD_VERSION         1u
#define CM_GUARD_PACK_BYTES_MAX  (24u << 20)
#define CM_GUARD_RULES_MAX       4096u
#define CM_GUARD_STATES_MAX      4096u /* of one rule */
#define CM_GUARD_HOLD_MAX        640u  /* bytes that a rule may hold back */
#define CM_GUARD_TRIGGER_MAX     8u    /* bytes of a trigger */
#define CM_GUARD_STARTS_MAX      64u   /* rules that begin with a class, in one machine */
#define CM_GUARD_REPLACEMENT_MAX 64u
#define CM_GUARD_NODES_MAX       65535u /* of one machine's trigger automaton */
#define CM_GUARD_RULE_OVERFLOW                                                                     \
    0x7fffu                        /* no rule: more candidates at once than there is room for      \
                                    */
#define CM_GUARD_STATE_ACCEPT   1u /* the bytes so far are a span */
#define CM_GUARD_STATE_TERMINAL 2u /* no byte leads on */

/* Bits: what a rule reads, each with a machine of its own in the pack. Of a prompt: its raw bytes,
 * or one of the views of kernels/guard/view.h. */
enum cm_guard_class {
    CM_GUARD_OUTPUT = 1,
    CM_GUARD_INPUT = 2,
    CM_GUARD_FOLDED = 4,
    CM_GUARD_WORDS = 8,
    CM_GUARD_SQUEEZED = 16,
};
#define CM_GUARD_MACHINES 5u

/* Bits: where in a prompt. A rule that names hidden or encoded text alone leaves plain text be. */
enum cm_guard_where {
    CM_GUARD_IN_TEXT = 1,
    CM_GUARD_IN_HIDDEN = 2,
    CM_GUARD_IN_ENCODED = 4,
    CM_GUARD_ANYWHERE = 7,
};

/* How the views "words" and "squeezed" show lower-case ASCII; defined once, for the views and for
 * who writes patterns in plain words. Digits that look like letters are those letters, m looks like
 * r and n (the r stands here, an n follows), what is no letter or digit is a space, or nothing. */
/* clang-format off */
static const char cm_guard_word_bytes[] = "                " "                "
                                          "                " "ol23456789      "
                                          "                " "                "
                                          " abcdefghijklrno" "pqrstuvwxyz     ";
static const char cm_guard_squeezed_bytes[] =
    "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    "\0i\0\0s\0\0\0\0\0\0t\0\0\0\0" "oi2eas6t89\0\0\0\0\0\0"
    "a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    "\0abcdefghijkirno" "pqrstuvwxyz\0i\0\0\0";
/* clang-format on */
_Static_assert(sizeof(cm_guard_word_bytes) == 129 && sizeof(cm_guard_squeezed_bytes) == 129,
               "all of ASCII");

enum cm_guard_validator {
    CM_GUARD_VALID_ALWAYS = 0,
    CM_GUARD_VALID_LUHN = 1,    /* ISO/IEC 7812-1, over the span's digits */
    CM_GUARD_VALID_IBAN = 2,    /* ISO 13616: length of the country, mod 97 */
    CM_GUARD_VALID_ENTROPY = 3, /* of the shortest span, at least argument / 100 bits a byte */
};

#endif
