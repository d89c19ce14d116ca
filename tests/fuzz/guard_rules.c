/* Fuzz target: rule files and patterns, and what compiles is run over its own text. */
#include "kernels/guard/guard.h"
#include "policies/guard/rules.h"
#include "tests/fuzz/seed.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct cm_guard_state state;
    static uint8_t out[3 * 4096 + 4096];
    struct cm_rules rules = {0};
    struct cm_guard_pack *pack;
    struct cm_error err;
    uint8_t *bytes = NULL;
    size_t pack_size;
    bool built_in;
    if (cm_rules_read(&rules, "fuzz", data, size, &built_in, &err) == CM_OK &&
        cm_rules_compile(&rules, &bytes, &pack_size, &err) == CM_OK) {
        uint32_t used = 0;
        if (cm_guard_pack_new(bytes, pack_size, &pack, &err) != CM_OK) {
            abort(); /* our own packs are good */
        }
        cm_guard_begin(&state, CM_GUARD_OUTPUT);
        if (cm_guard_feed(pack, &state, data, size < 4096 ? size : 4096, out, &used)) {
            (void)!cm_guard_finish(pack, &state, CM_GUARD_CUT, data, size < 64 ? size : 64, out,
                                   &used);
        }
        cm_guard_pack_free(pack);
    }
    free(bytes);
    cm_rules_free(&rules);
    return 0;
}

static const uint8_t *seed_make(size_t *ret_size)
{
    static const char text[] =
        "rules:\n  - id: one\n    class: both\n    category: secret\n"
        "    pattern: '(?i)(?<![a-z])sk-([A-Z]|\\d{2,3}|x?)[^a]{4,}'\n    validator: entropy\n"
        "    entropy: 200\n    action: redact\n    replacement: '#'\n    positive: [a]\n"
        "    negative: [b]\n  - id: two\n    class: output\n    category: key\n"
        "    pattern: 'BEGIN [A-Z]{2}'\n    until: 'END'\n    action: refuse\n    firm_byte: 'N'\n"
        "    positive: [a]\n    negative: [b]\n";
    *ret_size = sizeof(text) - 1;
    return (const uint8_t *)text;
}
