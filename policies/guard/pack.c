/* The pack of the built-in rules, compiled when this build was made: most nodes have no others, and
 * their start need not compile anything. built_in_compile.c has written it. */
#include <stdlib.h>
#include <string.h>

#include "policies/guard/rules.h"

__asm__(".pushsection .rodata\n.global cm_rules_packed\ncm_rules_packed:\n"
        ".incbin \"built_in.pack\"\n.global cm_rules_packed_end\ncm_rules_packed_end:\n"
        ".popsection\n");
extern const uint8_t cm_rules_packed[], cm_rules_packed_end[];

static enum cm_status compile(const char *path, uint8_t **ret_pack, size_t *ret_bytes,
                              struct cm_error *err)
{
    struct cm_rules rules = {.count = 0};
    enum cm_status status = cm_rules_load(&rules, path, err);
    if (status == CM_OK) {
        status = cm_rules_compile(&rules, ret_pack, ret_bytes, err);
    }
    cm_rules_free(&rules);
    return status;
}

enum cm_status cm_rules_pack(const char *path, uint8_t **ret_pack, size_t *ret_bytes,
                             struct cm_error *err)
{
    const size_t bytes = (size_t)(cm_rules_packed_end - cm_rules_packed);
    if (path[0] != '\0') {
        return compile(path, ret_pack, ret_bytes, err);
    }
    uint8_t *pack = malloc(bytes);
    if (pack == NULL) {
        return cm_error_set(err, CM_E_SYSTEM, "CM-SYS-MEMORY", "rule pack of %zu bytes", bytes);
    }
    memcpy(pack, cm_rules_packed, bytes);
    *ret_pack = pack;
    *ret_bytes = bytes;
    return CM_OK;
}
