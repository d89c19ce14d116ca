/* casemate-pack: the model owner's offline tool. Runs on the owner's machine, never on a node. */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "loader/pack/commands.h"

#define FIELD(name) offsetof(struct cm_pack_arguments, name)

struct option_row {
    const char *flag;
    size_t field;
    const char *value;
    const char *help;
};

static const struct option_row option_rows[] = {
    {"--out", FIELD(out), "FILE", "package to write (replaced only when it is complete)"},
    {"--owner", FIELD(owner), "DIR", "folder of the owner's keys"},
    {"--name", FIELD(name), "NAME", "served model name, [A-Za-z0-9._-]"},
    {"--suite", FIELD(suite), "SUITE", "aes-256-gcm (default) or chacha20-poly1305"},
    {"--revision", FIELD(revision), "N", "the model's revision, monotonic (default 1)"},
    {"--base", FIELD(base), "BASE",
     "an adapter's base: its package, or the core digest that `inspect` prints of it"},
    {"--config", FIELD(config), "FILE",
     "the base model's config.json (its shape is in no package "
     "that can be read without its key)"},
    {"--chat-format", FIELD(chat_format), "F",
     CM_CHAT_FORMATS "; default: from the model's template"},
    {"--default-system", FIELD(default_system), "TEXT", "system prompt where a chat has none"},
    {"--matrices", FIELD(matrices), "KIND",
     "of matrices that the file has as floats: u8 (default) or bf16, twice as large"},
    {"--recovery", FIELD(recovery), "FILE", "detached recovery file; keep it off the nodes"},
    {"--passphrase-file", FIELD(passphrase_file), "FILE", "its passphrase, first line"},
    {"--policy-ref", FIELD(policy_ref), "REF", "what the policy is for (default: casemate)"},
    {"--measurement", FIELD(measurement), "FILE",
     "what the nodes measure: `casemate measure --out FILE` there"},
    {"--counter", FIELD(counter), "N",
     "the node's counter may stand at most at N (default: as in the list, or as enrolled)"},
    {"--label", FIELD(label), "NAME", "name of the node whose slot is meant"},
    {"--ek-authority", FIELD(ek_authority), "FILE",
     "PEM certificates of TPM makers: refuse nodes whose TPM none of them vouches for"},
};

static const struct {
    const char *name;
    enum cm_status (*run)(const struct cm_pack_arguments *arguments, struct cm_error *err);
    const char *positional; /* NULL: none */
    const char *needs;      /* flags that must be there, with spaces around */
    const char *takes;      /* flags that may be there */
    const char *help;
    const char *example;
} commands[] = {
    {"keygen", cm_command_keygen, NULL, " --owner ", "",
     "make the owner's and the policy authority's keys", "casemate-pack keygen --owner owner"},
    {"pack", cm_command_pack, "MODEL", " --out --owner ",
     " --node --measurement --name --suite --revision --chat-format --default-system --matrices "
     "--recovery "
     "--passphrase-file --policy-ref --ek-authority ",
     "convert a model (a GGUF file, or a directory with safetensors, config.json and "
     "tokenizer.json) and seal it into a package for nodes",
     "casemate-pack pack model.gguf --out model.cmpkg --owner owner --node node1.bin --measurement "
     "node1.measure"},
    {"adapter", cm_command_adapter, "DIRECTORY", " --base --config --name --out --owner ",
     " --node --measurement --suite --revision --recovery --passphrase-file --policy-ref "
     "--ek-authority ",
     "seal a LoRA adapter (adapter_config.json and adapter_model.safetensors, as peft writes them) "
     "into a package of its own, for nodes that serve its base",
     "casemate-pack adapter lora/ --base model.cmpkg --config model/config.json --name support "
     "--out support.cmpkg --owner owner --node node1.bin --measurement node1.measure"},
    {"inspect", cm_command_inspect, "PACKAGE", "", " --recovery --passphrase-file ",
     "explain a package; with its recovery file the model too, and what rounding cost",
     "casemate-pack inspect model.cmpkg"},
    {"recover", cm_command_recover, "PACKAGE", " --recovery --passphrase-file ", "",
     "prove that a recovery file opens a package",
     "casemate-pack recover model.cmpkg --recovery model.recovery --passphrase-file pass.txt"},
    {"slots-add", cm_command_slots_add, "PACKAGE",
     " --node --measurement --owner --recovery --passphrase-file ",
     " --base --policy-ref --ek-authority ",
     "seal an existing package to further nodes (of an adapter: with --base)",
     "casemate-pack slots-add model.cmpkg --node node2.bin --measurement node2.measure --owner "
     "owner --recovery m.recovery --passphrase-file pass.txt"},
    {"slots-remove", cm_command_slots_remove, "PACKAGE", " --label --recovery --passphrase-file ",
     "", "take a node's slot away (no revocation: it has had the key)",
     "casemate-pack slots-remove model.cmpkg --label node2 --recovery m.recovery "
     "--passphrase-file pass.txt"},
    {"policy-sign", cm_command_policy_sign, "PACKAGE", " --node --measurement --owner ",
     " --base --policy-ref --counter ",
     "sign one more state of nodes into PACKAGE.policy (of an adapter: with --base)",
     "casemate-pack policy-sign model.cmpkg --node node1.bin --measurement new.measure --owner "
     "owner"},
    {"policy-revoke", cm_command_policy_revoke, "PACKAGE", " --node --measurement --owner ",
     " --base --policy-ref --counter ",
     "sign this state alone, for one counter step more; then `casemate revoke` on the node ends "
     "all "
     "older states",
     "casemate-pack policy-revoke model.cmpkg --node node1.bin --measurement new.measure --owner "
     "owner"},
    {"challenge", cm_command_challenge, NULL, " --node ", " --ek-authority ",
     "ask nodes to show that the keys of their record live in one TPM: writes RECORD.challenge for "
     "`casemate answer` on the node, and RECORD.expected for `trust`",
     "casemate-pack challenge --node node1.bin --ek-authority makers.pem"},
    {"trust", cm_command_trust, "PACKAGE", " --node --measurement ", " --ek-authority ",
     "print what casemate-verify is to believe of these nodes (--allow-development: even where "
     "their "
     "TPM is a development TPM)",
     "casemate-pack trust model.cmpkg --node node1.bin --measurement node1.measure >node1.trust"},
};
#define COMMAND_COUNT (sizeof(commands) / sizeof(commands[0]))
#define OPTION_COUNT  (sizeof(option_rows) / sizeof(option_rows[0]))

static int listed(const char *list, const char *flag)
{
    char word[64];
    snprintf(word, sizeof(word), " %s ", flag);
    return strstr(list, word) != NULL;
}

static void command_help(size_t row)
{
    printf("usage: casemate-pack %s%s%s [options]\n\n%s\n\n", commands[row].name,
           commands[row].positional ? " " : "",
           commands[row].positional ? commands[row].positional : "", commands[row].help);
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        int needed = listed(commands[row].needs, option_rows[i].flag);
        if (needed || listed(commands[row].takes, option_rows[i].flag)) {
            printf("  %-18s %-6s %s%s\n", option_rows[i].flag, option_rows[i].value,
                   option_rows[i].help, needed ? " (required)" : "");
        }
    }
    if (listed(commands[row].needs, "--node") || listed(commands[row].takes, "--node")) {
        printf("  %-18s %-6s %s%s\n", "--node", "FILE",
               "a node's enrolment record; repeat for more",
               listed(commands[row].needs, "--node") ? " (required)" : "");
        printf("  %-18s %-6s %s\n", "--pcr", "N=HEX",
               "a PCR of the nodes' boot chain; repeat; needed for real TPMs (7, and 4 or 11)");
    }
    printf("  %-18s %-6s %s\n\nexample: %s\n", "--json", "", "answer for a machine",
           commands[row].example);
}

static void help(void)
{
    printf("casemate-pack %s: seal models, offline, on the owner's machine\n\n", CASEMATE_VERSION);
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        printf("  %-12s %s\n               %s\n", commands[i].name, commands[i].help,
               commands[i].example);
    }
    printf("\ncasemate-pack COMMAND --help says more. Exit codes: 0 ok, 2 usage, 4 model or "
           "package, 5 policy, seal or a TPM that nobody vouches for, 9 system.\n");
}

/* Parse the words after the command. */
static enum cm_status arguments_parse(size_t row, int count, char **words,
                                      struct cm_pack_arguments *arguments, struct cm_error *err)
{
    for (int i = 0; i < count; i++) {
        size_t option = 0;
        while (option < OPTION_COUNT && strcmp(words[i], option_rows[option].flag) != 0) {
            option++;
        }
        if (strcmp(words[i], "--allow-development") == 0 && commands[row].run == cm_command_trust) {
            arguments->allow_development = true;
        } else if (strcmp(words[i], "--json") == 0) {
            arguments->json = true;
        } else if (strcmp(words[i], "--node") == 0 && i + 1 < count &&
                   arguments->node_count < CM_PACKAGE_SLOTS_MAX &&
                   (listed(commands[row].needs, "--node") ||
                    listed(commands[row].takes, "--node"))) {
            arguments->nodes[arguments->node_count++] = words[++i];
        } else if (strcmp(words[i], "--pcr") == 0 && i + 1 < count &&
                   arguments->pcr_count < CM_POLICY_PCRS_MAX &&
                   (listed(commands[row].needs, "--node") ||
                    listed(commands[row].takes, "--node"))) {
            arguments->pcrs[arguments->pcr_count++] = words[++i];
        } else if (option < OPTION_COUNT && (listed(commands[row].needs, words[i]) ||
                                             listed(commands[row].takes, words[i]))) {
            if (i + 1 == count) {
                return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE", "%s needs a value", words[i]);
            }
            char *field = (char *)arguments + option_rows[option].field;
            memcpy(field, &words[++i], sizeof(char *));
        } else if (words[i][0] != '-' && commands[row].positional != NULL &&
                   arguments->input == NULL) {
            arguments->input = words[i];
        } else {
            return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE",
                                "'%s' is not for `casemate-pack %s`; see --help", words[i],
                                commands[row].name);
        }
    }
    if (commands[row].positional != NULL && arguments->input == NULL) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE", "%s is missing",
                            commands[row].positional);
    }
    if (listed(commands[row].needs, "--node") && arguments->node_count == 0) {
        return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE", "--node is missing");
    }
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        const char *value;
        memcpy(&value, (const char *)arguments + option_rows[i].field, sizeof(value));
        if (listed(commands[row].needs, option_rows[i].flag) && value == NULL) {
            return cm_error_set(err, CM_E_USAGE, "CM-PACK-USAGE", "%s is missing",
                                option_rows[i].flag);
        }
    }
    return CM_OK;
}

int main(int count, char **words)
{
    struct cm_error err = {.status = CM_OK};
    struct cm_pack_arguments arguments = {.json = false};
    if (count < 2 || strcmp(words[1], "--help") == 0 || strcmp(words[1], "help") == 0) {
        help();
        return count < 2 ? cm_status_exit_code(CM_E_USAGE) : 0;
    }
    size_t row = 0;
    while (row < COMMAND_COUNT && strcmp(words[1], commands[row].name) != 0) {
        row++;
    }
    if (row == COMMAND_COUNT) {
        fprintf(stderr,
                "casemate-pack: CM-PACK-USAGE: unknown command '%s'; see casemate-pack --help\n",
                words[1]);
        return cm_status_exit_code(CM_E_USAGE);
    }
    for (int i = 2; i < count; i++) {
        if (strcmp(words[i], "--help") == 0) {
            command_help(row);
            return 0;
        }
    }
    enum cm_status status = arguments_parse(row, count - 2, words + 2, &arguments, &err);
    if (status == CM_OK) {
        status = commands[row].run(&arguments, &err);
    }
    if (status != CM_OK) {
        bool hint = strcmp(err.id, "CM-PACK-USAGE") == 0;
        fprintf(stderr, "casemate-pack: %s: %s%s%s%s\n", err.id, err.text,
                hint ? "; see casemate-pack " : "", hint ? words[1] : "", hint ? " --help" : "");
    }
    return cm_status_exit_code(status);
}
