/* casemate-pack's commands, and what the command line says. */
#ifndef CASEMATE_LOADER_PACK_COMMANDS_H
#define CASEMATE_LOADER_PACK_COMMANDS_H

#include <stdbool.h>
#include <stdint.h>

#include "loader/pack/owner.h"
#include "loader/package/write.h"
#include "loader/tpm/enrolment.h"
#include "runtime/base/error.h"
#include "runtime/base/secret.h"

/* What --chat-format knows: X(name, enum cm_manifest_chat), and none; the names in one text. */
#define CM_CHAT_FAMILIES(X)                                                                        \
    X("chatml", CM_CHAT_CHATML)                                                                    \
    X("gemma", CM_CHAT_GEMMA)                                                                      \
    X("llama3", CM_CHAT_LLAMA3)                                                                    \
    X("llama3.1", CM_CHAT_LLAMA31)                                                                 \
    X("mistral", CM_CHAT_MISTRAL)                                                                  \
    X("mistral-tekken", CM_CHAT_TEKKEN)                                                            \
    X("phi3", CM_CHAT_PHI3)                                                                        \
    X("qwen3", CM_CHAT_QWEN3)                                                                      \
    X("qwen3-direct", CM_CHAT_QWEN3_DIRECT)
#define CM_CHAT_FAMILY_NAME(name, chat) name ", "
#define CM_CHAT_FORMATS                 CM_CHAT_FAMILIES(CM_CHAT_FAMILY_NAME) "none"

struct cm_pack_arguments {
    const char *input; /* model or package */
    const char *out;
    const char *owner; /* folder of keys */
    const char *name;
    const char *suite;
    const char *chat_format;
    const char *default_system;
    const char *matrices;
    const char *recovery;
    const char *passphrase_file;
    const char *revision;
    const char *policy_ref;
    const char *nodes[CM_PACKAGE_SLOTS_MAX]; /* enrolment records */
    uint32_t node_count;
    const char *pcrs[CM_POLICY_PCRS_MAX]; /* "N=HEX": of the boot chain */
    uint32_t pcr_count;
    const char *counter;      /* greatest value at which the state may be used */
    const char *measurement;  /* of the nodes: `casemate measure --out` */
    const char *label;        /* of a slot */
    const char *base;         /* of an adapter: its package, or the hex of its core digest */
    const char *config;       /* of an adapter: config.json of its base */
    const char *ek_authority; /* PEM certificates of TPM makers: nodes must be theirs */
    bool json;
    bool allow_development; /* trust */
};

CM_MUST_USE enum cm_status cm_command_keygen(const struct cm_pack_arguments *arguments,
                                             struct cm_error *err);
CM_MUST_USE enum cm_status cm_command_pack(const struct cm_pack_arguments *arguments,
                                           struct cm_error *err);
/* Seal a LoRA adapter, a directory as peft writes it. */
CM_MUST_USE enum cm_status cm_command_adapter(const struct cm_pack_arguments *arguments,
                                              struct cm_error *err);
CM_MUST_USE enum cm_status cm_command_inspect(const struct cm_pack_arguments *arguments,
                                              struct cm_error *err);
/* Open a package with its recovery file and check every segment. */
CM_MUST_USE enum cm_status cm_command_recover(const struct cm_pack_arguments *arguments,
                                              struct cm_error *err);
/* Change or show who a package is sealed to; needs no node and no TPM. */
CM_MUST_USE enum cm_status cm_command_slots_add(const struct cm_pack_arguments *arguments,
                                                struct cm_error *err);
CM_MUST_USE enum cm_status cm_command_slots_remove(const struct cm_pack_arguments *arguments,
                                                   struct cm_error *err);
/* Sign the state of each node's enrolment record anew into <package>.policy. */
CM_MUST_USE enum cm_status cm_command_policy_sign(const struct cm_pack_arguments *arguments,
                                                  struct cm_error *err);
CM_MUST_USE enum cm_status cm_command_policy_revoke(const struct cm_pack_arguments *arguments,
                                                    struct cm_error *err);

/* Write <record>.challenge for each node, and <record>.expected to judge its answer by. */
CM_MUST_USE enum cm_status cm_command_challenge(const struct cm_pack_arguments *arguments,
                                                struct cm_error *err);
/* A trust file on standard output (loader/evidence/FORMAT.md). */
CM_MUST_USE enum cm_status cm_command_trust(const struct cm_pack_arguments *arguments,
                                            struct cm_error *err);

/* seal.c: what sealing a package of either kind takes, before and after it is written. Check comes
 * before anything is read, done in every case. */
struct cm_pack_seal {
    struct cm_secret *key;
    struct cm_owner_key *owner;
    struct cm_package_slot slots[CM_PACKAGE_SLOTS_MAX];
    struct cm_package_write_options options; /* points to owner and slots */
};
CM_MUST_USE enum cm_status cm_pack_seal_check(const struct cm_pack_arguments *arguments,
                                              struct cm_error *err);
CM_MUST_USE enum cm_status cm_pack_seal_begin(const struct cm_pack_arguments *arguments,
                                              struct cm_pack_seal *seal, struct cm_error *err);
CM_MUST_USE enum cm_status cm_pack_seal_finish(const struct cm_pack_arguments *arguments,
                                               const struct cm_pack_seal *seal,
                                               struct cm_error *err);
void cm_pack_seal_done(struct cm_pack_seal *seal);
/* The head of the package at `path`. */
CM_MUST_USE enum cm_status cm_pack_head_load(const char *path, struct cm_package_head *ret_head,
                                             struct cm_error *err);
/* --base: 64 hex digits, or a package whose core digest it is. */
CM_MUST_USE enum cm_status cm_pack_base_digest(const char *base,
                                               uint8_t ret_digest[static CM_DIGEST_BYTES],
                                               struct cm_error *err);

/* nodes.c: seal a key to the nodes named in the arguments; write the policy list beside the
 * package. */
CM_MUST_USE enum cm_status cm_nodes_seal(const struct cm_pack_arguments *arguments,
                                         const uint8_t key[static CM_KEY_BYTES],
                                         struct cm_package_slot slots[CM_PACKAGE_SLOTS_MAX],
                                         uint32_t *ret_count, struct cm_error *err);
CM_MUST_USE enum cm_status cm_nodes_policy_write(const struct cm_pack_arguments *arguments,
                                                 const char *package, bool keep_others,
                                                 uint64_t steps, struct cm_error *err);
/* Fails where a --node has no usable --measurement: before anything is written. */
CM_MUST_USE enum cm_status cm_nodes_check(const struct cm_pack_arguments *arguments,
                                          struct cm_error *err);
/* The key by the recovery file; *ret_head is the package's. fd stays the caller's. */
CM_MUST_USE enum cm_status cm_recovery_open(const struct cm_pack_arguments *arguments, int fd,
                                            struct cm_package_head *ret_head,
                                            struct cm_secret **ret_key, struct cm_error *err);

#endif
