/* At build time: the built-in rules into the pack that pack.c embeds. built_in_compile OUT */
#include <stdio.h>
#include <stdlib.h>

#include "policies/guard/rules.h"

int main(int count, char **words)
{
    struct cm_rules rules = {.count = 0};
    struct cm_error err;
    uint8_t *pack = NULL;
    size_t bytes = 0;
    enum cm_status status = cm_rules_built_in(&rules, &err);
    if (status == CM_OK) {
        status = cm_rules_compile(&rules, &pack, &bytes, &err);
    }
    if (status != CM_OK) {
        fprintf(stderr, "built_in_compile: %s (%s)\n", err.text, err.id);
        return cm_status_exit_code(status);
    }
    FILE *out = count == 2 ? fopen(words[1], "wb") : NULL;
    if (out == NULL || fwrite(pack, 1, bytes, out) != bytes || fclose(out) != 0) {
        perror("built_in_compile OUT");
        return cm_status_exit_code(CM_E_SYSTEM);
    }
    free(pack);
    cm_rules_free(&rules);
    return 0;
}
