/* Chat templates: the ChatML family by its structure, official ones by their digest. No template
 * language is run, here or on the host; what is not recognised is refused. */
#include "loader/pack/plan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>

#include "loader/pack/commands.h"
#include "runtime/base/hex.h"

#define TURN                                                                                       \
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"       \
    "{% endfor %}"
#define GENERATION "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

/* Text before and after the default system prompt; `after` NULL: the template has none. */
static const struct {
    const char *before;
    const char *after;
} templates[] = {
    {"{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
     "{{ '<|im_start|>system\n",
     "<|im_end|>\n' }}{% endif %}" TURN GENERATION},
    {"{% for message in messages %}" TURN GENERATION, NULL},
};

/* Other templates are known by what they are, to the byte: SHA-256 with newlines undone. Each makes
 * what its family makes (tests/tokenizer/templates). CM_CHAT_NONE: known, and refused, since
 * whoever writes a message could write the text that ends it. */
#define PLAIN "the chat template of Mistral before v3 marks turns by plain text, [INST]"
static const struct {
    const char *digest;
    uint32_t chat;
    const char *system; /* where a chat has none; of CM_CHAT_NONE: what is wrong */
} known[] = {
    {"ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6", /* gemma2 */
     CM_CHAT_GEMMA, ""},
    {"7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4", /* gemma3 */
     CM_CHAT_GEMMA, ""},
    {"ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122", /* llama3 */
     CM_CHAT_LLAMA3, ""},
    {"0bbb09d8e36178819242ba3d428bdc0d8fcbeb5401138ee29d8eaea990815d1c", /* llama3.2 */
     CM_CHAT_LLAMA31, ""},
    {"ae74f5e5025c8c38a71378f6995ebb6da0094706d775ba854509cb8e8a032def", /* llama3.1, 3.3 */
     CM_CHAT_LLAMA31, ""},
    {"e0170a5550e8731f0cccc8ce488b963ded59a1802e4c58952d4a11ae2e1743f6", /* mistral-v3 */
     CM_CHAT_MISTRAL, ""},
    {"0629d5949741e94e60070d7c97c051ce33b79f8104a97ba71b9b0322f9280b17", /* mistral-tekken */
     CM_CHAT_TEKKEN, ""},
    {"26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7", /* mistral-v0 */
     CM_CHAT_NONE, PLAIN},
    {"b331048f5175d0503d49953299743dd93d34756f18b5c6af79ad82f3359fb48a", /* mistral-v1 */
     CM_CHAT_NONE, PLAIN},
    {"268b6082ceb7176dc6ed80557a2f7837f9f0339592fbee677d405a553af15f88", /* phi3 */
     CM_CHAT_PHI3, ""},
    {"dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa", /* phi3.1 */
     CM_CHAT_PHI3, ""},
    {"78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90", /* phi3.5 */
     CM_CHAT_PHI3, ""},
    {"f4493c9d8880ed8c45ba8298b3a158949f9e3c1a6b6d57169b91941b7beafbfa", /* qwen2.5 */
     CM_CHAT_CHATML, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    {"3a19070ffe8c408d38692fb9224fdcca36fce79ebc17006fb4d0f0a3717eb3be", /* qwen2.5-7b */
     CM_CHAT_CHATML, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    {"2df317a15cbc983d9602cc391d33be17237d47ec7eb11ead80fae277143958aa", /* qwen3 */
     CM_CHAT_QWEN3, ""},
};

#define HASH_BYTES 32u /* of SHA-256 */
#define KNOWN      (sizeof(known) / sizeof(known[0]))

/* Hexadecimal SHA-256 of a text. False: OpenSSL can't. */
static bool text_digest(const char *text, size_t size, char ret_hex[2 * HASH_BYTES + 1])
{
    uint8_t digest[HASH_BYTES];
    bool ok = EVP_Digest(text, size, digest, NULL, EVP_sha256(), NULL) == 1;
    cm_hex_write(digest, sizeof(digest), ret_hex);
    return ok;
}

/* In a Jinja string the two characters \n mean a newline; both spellings are one template. */
static size_t newlines_undo(struct cm_source_text text, char *ret)
{
    size_t used = 0;
    for (size_t i = 0; i < text.size; i++) {
        bool escape = text.bytes[i] == '\\' && i + 1 < text.size && text.bytes[i + 1] == 'n';
        ret[used++] = escape ? '\n' : text.bytes[i];
        i += escape ? 1 : 0;
    }
    return used;
}

/* May this text stand in a Jinja string literal and mean itself? */
static bool system_plain(const char *text, size_t size)
{
    return memchr(text, '\'', size) == NULL && memchr(text, '\\', size) == NULL &&
           memchr(text, '\0', size) == NULL && size <= CM_MANIFEST_TEXT_BYTES_MAX;
}

static bool template_match(const char *text, size_t size, const char **ret_system,
                           size_t *ret_system_bytes)
{
    for (size_t i = 0; i < sizeof(templates) / sizeof(templates[0]); i++) {
        size_t before = strlen(templates[i].before);
        size_t after = templates[i].after != NULL ? strlen(templates[i].after) : 0;
        if (size < before + after || memcmp(text, templates[i].before, before) != 0 ||
            (after == 0 && size != before)) {
            continue;
        }
        if (after == 0 || (memcmp(text + size - after, templates[i].after, after) == 0 &&
                           system_plain(text + before, size - before - after))) {
            *ret_system = text + before;
            *ret_system_bytes = size - before - after;
            return true;
        }
    }
    return false;
}

static enum cm_status system_set(struct cm_plan *plan, const char *text, size_t size,
                                 struct cm_error *err)
{
    plan->default_system = malloc(size + 1);
    if (plan->default_system == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "default system prompt");
    }
    if (size > 0) {
        memcpy(plan->default_system, text, size);
    }
    plan->manifest.default_system = (struct cm_manifest_text){plan->default_system, (uint32_t)size};
    return CM_OK;
}

#define FAMILY_ROW(name, chat) {name, chat},
static const struct {
    const char *name;
    uint32_t chat;
} formats[] = {CM_CHAT_FAMILIES(FAMILY_ROW){"none", CM_CHAT_NONE}};

static enum cm_status format_given(const struct cm_plan_options *options, struct cm_plan *plan,
                                   struct cm_error *err)
{
    const char *system = options->default_system != NULL ? options->default_system : "";
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        if (strcmp(options->chat_format, formats[i].name) == 0) {
            plan->manifest.chat = formats[i].chat;
            return system_set(plan, system, formats[i].chat == CM_CHAT_NONE ? 0 : strlen(system),
                              err);
        }
    }
    return cm_error_set(err, CM_E_USAGE, "CM-PACK-CHAT",
                        "--chat-format '%s' is unknown; there are: " CM_CHAT_FORMATS,
                        options->chat_format);
}

enum cm_status cm_plan_chat(struct cm_source_text text, const struct cm_plan_options *options,
                            struct cm_plan *plan, struct cm_error *err)
{
    enum cm_status status;
    const char *system;
    size_t system_bytes;
    if (options->chat_format != NULL) {
        return format_given(options, plan, err);
    }
    if (text.size == 0) {
        plan->manifest.chat = CM_CHAT_NONE;
        return system_set(plan, "", 0, err);
    }
    char *normal = malloc(text.size + 1);
    if (normal == NULL) {
        return cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "chat template");
    }
    size_t size = newlines_undo(text, normal);
    char digest[2 * HASH_BYTES + 1];
    size_t row = 0;
    bool hashed = text_digest(normal, size, digest);
    while (hashed && row < KNOWN && strcmp(digest, known[row].digest) != 0) {
        row++;
    }
    if (!hashed) {
        status = cm_error_set(err, CM_E_SYSTEM, "CM-SYS-HASH", "chat template: no SHA-256");
    } else if (row < KNOWN && known[row].chat == CM_CHAT_NONE) {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TEMPLATE",
                              "model: %s, so that whoever writes a message could write the end of "
                              "it; --chat-format none packs the model for completions",
                              known[row].system);
    } else if (row < KNOWN) {
        plan->manifest.chat = known[row].chat;
        status = system_set(plan, known[row].system, strlen(known[row].system), err);
    } else if (template_match(normal, size, &system, &system_bytes)) {
        plan->manifest.chat = CM_CHAT_CHATML;
        status = system_set(plan, system, system_bytes, err);
    } else {
        status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-TEMPLATE",
                              "model: the chat template is of no known family; say which one with "
                              "--chat-format (and --default-system): " CM_CHAT_FORMATS);
    }
    free(normal);
    return status;
}
