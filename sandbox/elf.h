/* The few facts of an ELF file that loading it needs: its loader, and the names it needs. Untrusted
 * bytes, read through the cursor. Source of the format: System V ABI, chapters 4 and 5. */
#ifndef CASEMATE_SANDBOX_ELF_H
#define CASEMATE_SANDBOX_ELF_H

#include <stddef.h>
#include <stdint.h>

#include "runtime/base/error.h"

#define CM_ELF_NAME_BYTES 64u
#define CM_ELF_NEEDED_MAX 24u

struct cm_elf {
    char interpreter[CM_ELF_NAME_BYTES]; /* path; "" for a library or a static program */
    uint32_t needed_count;
    char needed[CM_ELF_NEEDED_MAX][CM_ELF_NAME_BYTES];
};

/* Little-endian ELF64 only. `name` stands in errors. Fails: CONFIG CM-IMAGE-ELF. */
CM_MUST_USE enum cm_status cm_elf_read(const uint8_t *bytes, size_t size, const char *name,
                                       struct cm_elf *ret_elf, struct cm_error *err);

#endif
