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

enum cm_guard_class { CM_GUARD_OUTPUT = 1, CM_GUARD_INPUT = 2 }; /* bits */

enum cm_guard_validator {
    CM_GUARD_VALID_ALWAYS = 0,
    CM_GUARD_VALID_LUHN = 1,    /* ISO/IEC 7812-1, over the span's digits */
    CM_GUARD_VALID_IBAN = 2,    /* ISO 13616: length of the country, mod 97 */
    CM_GUARD_VALID_ENTROPY = 3, /* of the shortest span, at least argument / 100 bits a byte */
};

#endif
