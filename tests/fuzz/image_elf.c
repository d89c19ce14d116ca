/* Fuzz target: an ELF file that is about to be measured and run. */
#include "sandbox/elf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cm_elf elf;
    struct cm_error err;
    (void)!cm_elf_read(data, size, "fuzzed", &elf, &err);
    return 0;
}
