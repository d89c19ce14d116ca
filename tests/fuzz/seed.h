/* What every fuzz target shares: `<target> --seed FILE` writes a well-formed first input. */
#ifndef CASEMATE_TESTS_FUZZ_SEED_H
#define CASEMATE_TESTS_FUZZ_SEED_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

/* The target's own: a buffer that lives until exit. */
static const uint8_t *seed_make(size_t *ret_size);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    if (*argc == 3 && strcmp((*argv)[1], "--seed") == 0) {
        size_t size;
        const uint8_t *bytes = seed_make(&size);
        FILE *file = fopen((*argv)[2], "wbe");
        if (file == NULL || fwrite(bytes, 1, size, file) != size || fclose(file) != 0) {
            perror((*argv)[2]);
            exit(1);
        }
        exit(0);
    }
    return 0;
}

#endif
