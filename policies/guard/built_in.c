/* The rules that are part of this build, as bytes: policies/guard/ *.yaml beside this file. */
#include "policies/guard/rules.h"

#define EMBED(name, path)                                                                          \
    __asm__(".pushsection .rodata\n.global cm_rules_" #name "\ncm_rules_" #name                    \
            ":\n.incbin \"" path "\"\n.global cm_rules_" #name "_end\ncm_rules_" #name             \
            "_end:\n.popsection\n");                                                               \
    extern const uint8_t cm_rules_##name[], cm_rules_##name##_end[]

EMBED(injection, "policies/guard/injection.yaml");
EMBED(personal, "policies/guard/personal.yaml");
EMBED(secrets, "policies/guard/secrets.yaml");

enum cm_status cm_rules_built_in(struct cm_rules *rules, struct cm_error *err)
{
    static const struct {
        const char *name;
        const uint8_t *text, *end;
    } files[] = {
        {"built-in injection.yaml", cm_rules_injection, cm_rules_injection_end},
        {"built-in personal.yaml", cm_rules_personal, cm_rules_personal_end},
        {"built-in secrets.yaml", cm_rules_secrets, cm_rules_secrets_end},
    };
    enum cm_status status = CM_OK;
    for (size_t i = 0; status == CM_OK && i < sizeof(files) / sizeof(files[0]); i++) {
        bool more;
        status = cm_rules_read(rules, files[i].name, files[i].text,
                               (size_t)(files[i].end - files[i].text), &more, err);
    }
    return status;
}
