/* Tokenizer for tests: a plain dump of a vocabulary (oracles.py) in argv[1]; on stdin records of
 * u32 kind (0 text, 1 chat), u32 parts, parts × (u32 role, u32 bytes, bytes); on stdout per record
 * u32 count and ids. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/worker/chat.h"

static uint32_t u32_read(FILE *file)
{
    uint32_t value;
    if (fread(&value, sizeof(value), 1, file) != 1) {
        exit(3);
    }
    return value;
}

static void *bytes_read(FILE *file, size_t size)
{
    void *bytes = malloc(size + 1);
    if (bytes == NULL || fread(bytes, 1, size, file) != size) {
        exit(3);
    }
    return bytes;
}

int main(int count, char **words)
{
    static struct cm_manifest m;
    static uint32_t ids[1 << 20];
    struct cm_error err;
    struct cm_tokenizer *tokenizer;
    struct cm_chat *chat;
    FILE *dump = count == 2 ? fopen(words[1], "rb") : NULL;
    if (dump == NULL) {
        return 2;
    }
    m.tokenizer = u32_read(dump);
    m.split = u32_read(dump);
    m.chat = u32_read(dump);
    m.vocabulary = u32_read(dump);
    m.merge_count = u32_read(dump);
    m.default_system.size = u32_read(dump);
    m.whole_pieces = u32_read(dump) != 0;
    m.default_system.bytes = bytes_read(dump, m.default_system.size);
    m.token_offsets = bytes_read(dump, (m.vocabulary + 1) * 4ull);
    m.token_bytes = bytes_read(dump, m.token_offsets[m.vocabulary]);
    m.token_types = bytes_read(dump, m.vocabulary);
    m.merges = bytes_read(dump, m.merge_count * 8ull);
    m.ranks =
        m.tokenizer == CM_TOKENIZER_SENTENCEPIECE ? bytes_read(dump, m.vocabulary * 4ull) : NULL;
    fclose(dump);
    if (cm_tokenizer_new(&m, cm_chat_text_bytes(&m, 1 << 20), &tokenizer, &err) != CM_OK ||
        cm_chat_new(&m, tokenizer, 1 << 20, &chat, &err) != CM_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 4;
    }
    uint32_t kind;
    while (fread(&kind, sizeof(kind), 1, stdin) == 1) {
        struct cm_chat_part parts[64];
        struct cm_token_list list = {ids, 1 << 20, 0};
        uint32_t part_count = u32_read(stdin);
        for (uint32_t i = 0; i < part_count && i < 64; i++) {
            parts[i].role = u32_read(stdin);
            parts[i].bytes = u32_read(stdin);
            parts[i].text = bytes_read(stdin, parts[i].bytes);
            if (!cm_text_valid(parts[i].text, parts[i].bytes)) {
                return 5;
            }
        }
        if (kind == 0) {
            cm_tokenizer_text(tokenizer, parts[0].text, parts[0].bytes, &list);
        } else if (!cm_chat_render(chat, parts, part_count, &list)) {
            return 6;
        }
        fwrite(&list.count, sizeof(list.count), 1, stdout);
        fwrite(ids, sizeof(ids[0]), list.count, stdout);
        for (uint32_t i = 0; i < part_count && i < 64; i++) {
            free((void *)parts[i].text);
        }
    }
    return 0;
}
