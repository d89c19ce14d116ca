/* Fuzz target: rule packs. What passes the checks is run: it must stay within its tables, its ring
 * and its room, whatever it says about itself. */
#include "kernels/guard/guard.h"
#include "policies/guard/rules.h"
#include "tests/fuzz/seed.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct cm_guard_state state;
    static uint8_t out[CM_GUARD_OUT_BYTES(CM_GUARD_RING + 64) + CM_GUARD_REPLACEMENT_MAX];
    struct cm_guard_pack *pack;
    struct cm_error err;
    if (cm_guard_pack_new(data, size, &pack, &err) != CM_OK) {
        return 0;
    }
    for (int stage = 0; stage < 2; stage++) {
        bool open = true;
        cm_guard_begin(&state, stage == 0 ? CM_GUARD_OUTPUT : CM_GUARD_INPUT);
        for (size_t at = 0; at < size && at < 8192 && open; at += 64) {
            uint32_t used = 0;
            open =
                cm_guard_feed(pack, &state, data + at, size - at < 64 ? size - at : 64, out, &used);
            state.verdict_count = 0;
        }
        uint32_t used = 0;
        (void)!cm_guard_finish(pack, &state, CM_GUARD_TEXT_END, NULL, 0, out, &used);
    }
    cm_guard_pack_free(pack);
    return 0;
}

static const uint8_t *seed_make(size_t *ret_size)
{
    static const char text[] = "rules:\n  - id: one\n    class: both\n    category: secret\n"
                               "    pattern: '(?<![a-z])sk-[a-z]{4,}'\n    action: refuse\n"
                               "    positive: [a]\n    negative: [b]\n"
                               "  - id: two\n    class: output\n    category: card\n"
                               "    pattern: '[45][0-9]{3}(?![0-9])'\n    validator: luhn\n"
                               "    action: redact\n    replacement: '#'\n"
                               "    positive: [a]\n    negative: [b]\n";
    struct cm_rules rules = {0};
    struct cm_error err;
    uint8_t *bytes;
    bool built_in;
    if (cm_rules_read(&rules, "seed", (const uint8_t *)text, sizeof(text) - 1, &built_in, &err) !=
            CM_OK ||
        cm_rules_compile(&rules, &bytes, ret_size, &err) != CM_OK) {
        abort();
    }
    cm_rules_free(&rules);
    return bytes;
}
