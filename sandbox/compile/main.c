/* policy_compile: the policies of policies/seccomp → filters as C data. Runs at build time.
 *
 *     policy_compile OUT.c POLICY…      in the order of enum cm_filter_id
 *     policy_compile --table POLICY…    the table of docs/sandbox.md, to standard output */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sandbox/compile/policy.h"
#include "sandbox/filter.h"

#define FILTERS_MAX 16

/* One filter's array; returns its length. */
static uint32_t filter_write(FILE *out, int index, const struct policy *policy)
{
    static struct sock_filter code[BPF_MAXINSNS];
    uint32_t count = 0;
    struct cm_error err;
    if (policy_emit(policy, code, &count, &err) != CM_OK) {
        fprintf(stderr, "policy_compile: %s\n", err.text);
        exit(1);
    }
    fprintf(out, "/* %s: %u calls */\nstatic const struct sock_filter filter_%d[] = {",
            policy->name, policy_calls(policy), index);
    for (uint32_t i = 0; i < count; i++) {
        fprintf(out, "%s{0x%02x, %u, %u, 0x%08xu},", i % 4 == 0 ? "\n    " : " ", code[i].code,
                code[i].jt, code[i].jf, code[i].k);
    }
    fprintf(out, "\n};\n\n");
    return count;
}

static void names_write(FILE *out)
{
    fprintf(out, "const char *const cm_call_names[CM_CALL_NAMES] = {\n");
    for (int number = 0; number < CM_CALL_NAMES; number++) {
        const char *name = policy_call_name(number);
        if (name != NULL) {
            fprintf(out, "    [%d] = \"%s\",\n", number, name);
        }
    }
    fprintf(out, "};\n");
}

static void filters_write(FILE *out, int count, char **paths)
{
    static struct policy policies[FILTERS_MAX];
    uint32_t lines[FILTERS_MAX];
    fprintf(out, "/* Made by policy_compile from policies/seccomp. */\n"
                 "#include \"sandbox/filter.h\"\n\n");
    for (int i = 0; i < count; i++) {
        policy_load(paths[i], &policies[i]);
        lines[i] = filter_write(out, i, &policies[i]);
    }
    fprintf(out, "const struct cm_filter cm_filters[CM_FILTER_COUNT] = {\n");
    for (int i = 0; i < count; i++) {
        fprintf(out, "    {\"%s\", {filter_%d, %u}},\n", policies[i].name, i, lines[i]);
    }
    fprintf(out, "};\n\n");
    names_write(out);
}

static void table_write(const char *path)
{
    static struct policy policy;
    policy_load(path, &policy);
    printf("\n### %s: %u calls\n\n| call | only if | why |\n|---|---|---|\n", policy.name,
           policy_calls(&policy));
    for (uint32_t i = 0; i < policy.count; i++) {
        const struct policy_rule *rule = &policy.rules[i];
        char name[64];
        snprintf(name, sizeof(name), rule->error_number == 0 ? "`%s`" : "`%s` is refused",
                 rule->name);
        printf("| %s | %s | %s |\n", name, rule->condition_text, rule->reason);
    }
}

int main(int argc, char **argv)
{
    if (argc >= 3 && strcmp(argv[1], "--table") == 0) {
        puts("# System calls, by role and stage\n\nMade by `./run docs` from policies/seccomp. "
             "What is "
             "not listed kills the process, as does\nevery other architecture. The first filter of "
             "a "
             "role holds from its confinement on, the second\nnarrows it when the role is ready. "
             "`casemate sandbox report` counts what the kernel has installed.");
        for (int i = 2; i < argc; i++) {
            table_write(argv[i]);
        }
        return 0;
    }
    FILE *out = argc >= 3 && argc - 2 <= FILTERS_MAX ? fopen(argv[1], "we") : NULL;
    if (out == NULL) {
        fprintf(stderr, "usage: policy_compile OUT.c POLICY… | --table POLICY…\n");
        return 2;
    }
    filters_write(out, argc - 2, argv + 2);
    return fclose(out) == 0 ? 0 : 1;
}
