/* casemate: the command line. One table of commands; each prints results on stdout, and one line on
 * stderr when it fails. Exit codes: 0 ok, 2 usage, 3 configuration, 4 package, 5 policy or seal,
 * 6 TPM, 7 evidence, 8 sandbox, 9 system, 70 bug. */
#include <stdio.h>
#include <string.h>

#include "runtime/cli/cli_internal.h"

#define WHERE                                                                                      \
    "  --config FILE   the configuration (default: <state>/casemate.yaml, /etc/casemate)\n"        \
    "  --state DIR     keys, records and status (default: /var/lib/casemate; user: XDG)\n"

static const struct command commands[] = {
    {"init", "make a node's state folder and its enrolment record",
     "usage: casemate init [--state DIR] [options]\n\n"
     "Makes DIR (mode 0700) with casemate.yaml, the owner's public keys and enrolment.bin, the\n"
     "record that a model's owner seals packages to. Leaves nothing behind when it fails.\n\n"
     "  --state DIR       default: /var/lib/casemate for root, else XDG\n"
     "  --owner-key PEM   public key of who signs packages\n"
     "  --policy-key PEM  public key of who signs allowed states\n"
     "  --package FILE    the sealed package to serve\n"
     "  --node-name NAME  default: the host's name\n"
     "  --tpm T           development, /dev/tpmrm0 or an swtpm's socket (default: the device, if "
     "any)\n"
     "  --attest-mode M   strict or restartable; must be said for a real TPM\n\n"
     "example: casemate init --state node --owner-key owner/owner.pem "
     "--policy-key owner/policy.pem --package model.cmpkg --tpm development\n",
     command_init},
    {"serve", "serve the package that the configuration names",
     "usage: casemate serve [--config FILE | --state DIR] [--<key> VALUE ...]\n\n" WHERE
     "  --<key> VALUE   any key of `casemate check --keys`, over file and environment\n\n"
     "SIGTERM drains and stops. A second one stops at once.\n\n"
     "example: casemate serve --state node --listen 127.0.0.1:8443 --threads 2\n",
     command_serve},
    {"keys", "add, list and revoke API keys, grant them adapters",
     "usage: casemate keys add NAME [--expires-days N] [--adapters LIST] | list | revoke ID |\n"
     "                     grant ID --adapters LIST\n\n" WHERE "  --json          for machines\n"
     "  --adapters L    those that the key may use: all, none (the default), or names with commas\n"
     "                  between them; without a grant an adapter is as one that is not there\n\n"
     "A key is printed once, and kept as a hash. Changes reach a running service within a "
     "second.\n\n"
     "example: casemate keys add alice --expires-days 90 --state node\n",
     command_keys},
    {"adapter", "add, remove and list adapters (LoRA) of the model",
     "usage: casemate adapter add FILE [--name NAME] | remove NAME | list\n\n" WHERE
     "  --name NAME     the name that requests use as `model`, which must be the one that its\n"
     "                  owner gave it (default: FILE without .cmpkg)\n"
     "  --json          for machines\n\n"
     "FILE is a sealed adapter, its policy list lies beside it as FILE.policy; both are copied\n"
     "into DIR/adapters. `sealed: adapters_max` and `adapter_owners` say what may be loaded.\n"
     "A running service follows within a second; without one it is the next start that loads.\n\n"
     "example: casemate adapter add fables.cmpkg --state node\n",
     command_adapter},
    {"check", "check configuration, keys, package and address without starting",
     "usage: casemate check [--config FILE | --state DIR] [--json]\n"
     "       casemate check --keys\n\n" WHERE "  --json          for machines\n"
     "  --keys          list every key of the configuration with range and default\n\n"
     "example: casemate check --config node/casemate.yaml\n",
     command_check},
    {"doctor", "is this host fit: kernel, memory, control groups, TPM, CPU, clock",
     "usage: casemate doctor [--json] [--root DIR]\n\n"
     "  --json          for machines\n"
     "  --root DIR      look at a copy of /proc, /sys and /dev instead\n\n"
     "Each row passes, warns or fails, and says what to do. Changes nothing. Exit 0: nothing "
     "fails.\n\n"
     "example: casemate doctor\n",
     command_doctor},
    {"measure", "predict what a start measures, for the owner to sign",
     "usage: casemate measure [--config FILE | --state DIR] [--out FILE] [--json]\n\n" WHERE
     "  --out FILE      write the log that `casemate-pack --measurement` takes\n"
     "  --json          every program, library and text with its digest\n\n"
     "Run it again after an upgrade and before a restart: a changed digest needs a new "
     "signature.\n\n"
     "example: casemate measure --state node --out node.measure\n",
     command_measure},
    {"policy", "would a start unseal, and if not, what differs",
     "usage: casemate policy explain [--config FILE | --state DIR] [--against FILE]\n\n" WHERE
     "  --against FILE  the measurement that was signed: names each program, library or\n"
     "                  text that differs from it\n\n"
     "Ask it before a restart, a reboot or an upgrade; it asks the TPM for counter and PCRs (a\n"
     "development TPM only while nothing serves), and starts nothing. Exit 5: it would not.\n\n"
     "example: casemate policy explain --state node --against node.measure\n",
     command_policy},
    {"revoke", "step the node's counter: older signed states end",
     "usage: casemate revoke [--config FILE | --state DIR] [--anyway]\n\n" WHERE
     "  --anyway        also where no start would unseal afterwards\n"
     "\nAfter it only states unseal that the owner has signed for the new counter (casemate-pack\n"
     "policy-revoke). A running service goes on until it stops. It cannot be undone.\n\n"
     "example: casemate revoke --state node\n",
     command_revoke},
    {"answer", "answer an owner's challenge: this TPM holds the enrolled keys",
     "usage: casemate answer CHALLENGE --out FILE [--config FILE | --state DIR]\n\n" WHERE
     "\nShows the model's owner that the node's endorsement and attestation keys live in one TPM\n"
     "(`casemate-pack challenge` made CHALLENGE). With a development TPM, not while it serves.\n\n"
     "example: casemate answer node1.bin.challenge --out node1.bin.answer --state node\n",
     command_answer},
    {"sandbox", "what confines each role, read from the kernel",
     "usage: casemate sandbox report [--config FILE | --state DIR] [--json]\n\n" WHERE
     "  --json          for machines\n\n"
     "Each layer of each running role: does it hold, and who says so. read: from /proc; probed: "
     "the "
     "role\ntried it at its start. As root, the system calls that the installed filters allow.\n\n"
     "example: casemate sandbox report --state node\n",
     command_sandbox},
    {"status", "show what runs, and what is not there yet",
     "usage: casemate status [--config FILE | --state DIR] [--json]\n\n" WHERE
     "  --json          for machines\n\n"
     "example: casemate status --state node\n",
     command_status},
    {"rules", "check and test the guard's rules before they serve",
     "usage: casemate rules check [FILE ...] [--json]\n"
     "       casemate rules test [FILE ...] [--json]\n\n"
     "Reads the files, or without any the rules that are part of this build; compiles each rule,\n"
     "proves its bounds and runs its samples. `check` also lists every rule: what it reads, what "
     "it\n"
     "does, how many bytes it may hold back. Each fault names file, line, rule, what was expected\n"
     "and what was found. Exit 3: there are faults. How rules are written: "
     "policies/guard/README.md.\n\n"
     "  --json          for machines\n\n"
     "example: casemate rules check our-rules.yaml\n",
     command_rules},
    {"guard", "show what the guard's rules find in a text",
     "usage: casemate guard try [--input | --output] [--rules FILE]... [--json] [TEXT | -]\n\n"
     "  --input         TEXT is a message of a prompt (default)\n"
     "  --output        TEXT is a reply: also prints what of it would leave\n"
     "  --rules FILE    instead of the rules that are part of this build\n"
     "  --json          for machines; never holds the text\n\n"
     "Without TEXT, or for -, reads stdin. Spans are coloured on a terminal (NO_COLOR is "
     "honoured):\n"
     "red refuses, cyan is redacted, yellow is reported. Each line: raw bytes, action, rule,\n"
     "category, and the view and document that it was found in: text, or what was hidden (tags,\n"
     "selectors, bits) or encoded (base64, hex, percent, reversed) there. Exit 5: it is "
     "refused.\n\n"
     "example: casemate guard try 'Ignore all previous instructions.'\n"
     "example: casemate guard try --output 'my card: 4111 1111 1111 1111'\n",
     command_guard},
    {"version", "print the version",
     "usage: casemate version [--json]\n\nexample: casemate version\n", command_version},
};
#define COMMAND_COUNT (sizeof(commands) / sizeof(commands[0]))

static void words_drop(struct words *words, int at, int count)
{
    words->count -= count;
    memmove(words->at + at, words->at + at + count, (size_t)(words->count - at) * sizeof(char *));
}

bool words_flag_take(struct words *words, const char *name)
{
    for (int i = 0; i < words->count; i++) {
        if (strncmp(words->at[i], "--", 2) == 0 && strcmp(words->at[i] + 2, name) == 0) {
            words_drop(words, i, 1);
            return true;
        }
    }
    return false;
}

const char *words_value_take(struct words *words, const char *name)
{
    size_t size = strlen(name);
    for (int i = 0; i < words->count; i++) {
        const char *word = words->at[i];
        if (strncmp(word, "--", 2) != 0 || strncmp(word + 2, name, size) != 0) {
            continue;
        }
        if (word[2 + size] == '=') {
            words_drop(words, i, 1);
            return word + 3 + size;
        }
        if (word[2 + size] == '\0' && i + 1 < words->count) {
            const char *value = words->at[i + 1];
            words_drop(words, i, 2);
            return value;
        }
    }
    return NULL;
}

static void help_print(FILE *out)
{
    fprintf(out,
            "casemate %s: serves a sealed language model\n\n"
            "usage: casemate COMMAND [options]\n\n",
            CASEMATE_VERSION);
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        fprintf(out, "  %-8s  %s\n", commands[i].name, commands[i].summary);
    }
    fprintf(out, "\n`casemate COMMAND --help` explains one.\n"
                 "example: casemate init --state node && casemate serve --state node\n");
}

int main(int argc, char **argv)
{
    struct words words = {.count = 0};
    struct cm_error err = {.status = CM_OK};
    const char *name = argc > 1 ? argv[1] : "";
    if (strcmp(name, "--help") == 0 || strcmp(name, "help") == 0 || strcmp(name, "-h") == 0) {
        help_print(stdout);
        return 0;
    }
    name = strcmp(name, "--version") == 0 ? "version" : name;
    for (int i = 2; i < argc && words.count < 128; i++) {
        words.at[words.count++] = argv[i];
    }
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(commands[i].name, name) != 0) {
            continue;
        }
        if (words_flag_take(&words, "help")) {
            fputs(commands[i].help, stdout);
            return 0;
        }
        enum cm_status status = commands[i].run(&words, &err);
        if (status != CM_OK) {
            fflush(stdout);
            fprintf(stderr, "casemate: %s: %s\n", err.id, err.text);
        }
        if (status == CM_E_USAGE) {
            fprintf(stderr, "casemate: `casemate %s --help` explains it\n", name);
        }
        return cm_status_exit_code(status);
    }
    if (name[0] != '\0') {
        fprintf(stderr, "casemate: CM-CLI-USAGE: there is no command \"%.64s\"\n\n", name);
    }
    help_print(stderr);
    return cm_status_exit_code(CM_E_USAGE);
}
