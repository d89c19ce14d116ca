/* The switches of the sandbox, from the environment. Linked into the tests' supervisor alone.
 *
 * CASEMATE_TEST_OFF      layers not applied: words of sandbox/layers.c joined by ',', or "all"
 * CASEMATE_TEST_LACKS    layers that the machine is said to lack
 * CASEMATE_TEST_KERNEL   "6.1": lacks MDWE, Landlock ABI 2
 * CASEMATE_TEST_ACCEPT   serve without what is off (bench)
 * CASEMATE_TEST_SWAP     the machine is said to have swap */
#include "sandbox/switches.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sandbox/layers.h"

static uint32_t layers_of(const char *variable)
{
    const char *text = getenv(variable);
    uint32_t layers = 0;
    char copy[512], *save = NULL;
    if (text == NULL || strcmp(text, "all") == 0) {
        return text == NULL ? 0 : CM_LAYERS_ALL;
    }
    snprintf(copy, sizeof(copy), "%s", text);
    for (char *word = strtok_r(copy, ",", &save); word != NULL; word = strtok_r(NULL, ",", &save)) {
        uint32_t before = layers;
        for (uint32_t i = 0; i < CM_LAYER_COUNT; i++) {
            layers |=
                strcmp(word, cm_layer_word((enum cm_confine_layer)i)) == 0 ? CM_LAYER_BIT(i) : 0;
        }
        if (layers == before) {
            fprintf(stderr, "%s: no layer \"%s\"\n", variable, word);
            exit(2);
        }
    }
    return layers;
}

struct cm_switches cm_switches_get(void)
{
    const char *kernel = getenv("CASEMATE_TEST_KERNEL");
    struct cm_switches switches = {.off = layers_of("CASEMATE_TEST_OFF"),
                                   .lacks = layers_of("CASEMATE_TEST_LACKS"),
                                   .accept = getenv("CASEMATE_TEST_ACCEPT") != NULL,
                                   .swap = getenv("CASEMATE_TEST_SWAP") != NULL};
    if (kernel != NULL && strcmp(kernel, "6.1") == 0) {
        switches.lacks |= CM_LAYER_BIT(CM_LAYER_MDWE);
        switches.landlock_abi_max = 2;
    }
    return switches;
}
