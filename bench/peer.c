/* llama.cpp as an arm of the bench, on the library that llama-cpp-python 0.3.36 brings.
 *
 *   peer MODEL THREADS        answers lines as every arm does (arm.h)
 *   peer quantise IN OUT      the same weights as Q4_0, the 4-bit format that it repacks
 *
 * Built by peers.sh beside the library, not by CMake: our own build does not know it. */
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/arm.h"

static struct llama_context *alone, *many; /* sequence 0; sequences 1 .. ARM_STREAMS */

static void quiet(enum ggml_log_level level, const char *text, void *context)
{
    (void)context;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static void evaluate(struct llama_context *context, struct llama_batch batch)
{
    if (llama_decode(context, batch) != 0) {
        fprintf(stderr, "peer: llama_decode failed\n");
        exit(9);
    }
    /* Wait for the result, and look at it as a sampler would. */
    const float *logits = llama_get_logits_ith(context, -1);
    static volatile float sink;
    sink = logits[0];
    (void)sink;
}

static void put(struct llama_batch *batch, uint32_t token, uint32_t position, int32_t sequence,
                bool logits)
{
    int32_t i = batch->n_tokens++;
    batch->token[i] = (llama_token)token;
    batch->pos[i] = (llama_pos)position;
    batch->n_seq_id[i] = 1;
    batch->seq_id[i][0] = sequence;
    batch->logits[i] = logits;
}

static struct llama_context *context_of(uint32_t sequence, int32_t *ret_sequence)
{
    *ret_sequence = sequence == 0 ? 0 : (int32_t)sequence - 1;
    return sequence == 0 ? alone : many;
}

void arm_prompt(uint32_t sequence, uint32_t position, const uint32_t *tokens, uint32_t count)
{
    int32_t id;
    struct llama_context *context = context_of(sequence, &id);
    llama_memory_seq_rm(llama_get_memory(context), id, (llama_pos)position, -1);
    for (uint32_t at = 0; at < count; at += 512) {
        uint32_t take = count - at < 512 ? count - at : 512;
        struct llama_batch batch = llama_batch_init(512, 0, 1);
        for (uint32_t i = 0; i < take; i++) {
            put(&batch, tokens[at + i], position + at + i, id,
                at + i + 1 == count || i + 1 == take);
        }
        evaluate(context, batch);
        llama_batch_free(batch);
    }
}

void arm_step(uint32_t first, uint32_t count, uint32_t position, uint32_t token)
{
    static struct llama_batch batch;
    int32_t id;
    struct llama_context *context = context_of(first, &id);
    if (batch.token == NULL) {
        batch = llama_batch_init(ARM_STREAMS, 0, 1);
    }
    batch.n_tokens = 0;
    for (uint32_t i = 0; i < count; i++) {
        context_of(first + i, &id);
        /* A step may repeat a position of an earlier round. */
        llama_memory_seq_rm(llama_get_memory(context), id, (llama_pos)position, -1);
        put(&batch, token, position, id, true);
    }
    evaluate(context, batch);
}

static struct llama_context *context_new(struct llama_model *model, uint32_t positions,
                                         uint32_t sequences, int32_t threads)
{
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = positions * sequences;
    params.n_batch = params.n_ubatch = 512;
    params.n_seq_max = sequences;
    params.n_threads = params.n_threads_batch = threads;
    params.no_perf = true;
    return llama_init_from_model(model, params);
}

static int quantise(const char *from, const char *to)
{
    struct llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
    params.allow_requantize = true;
    params.pure = true;
    return llama_model_quantize(from, to, &params) == 0 ? 0 : 9;
}

int main(int count, char **words)
{
    llama_log_set(quiet, NULL);
    llama_backend_init();
    if (count == 4 && strcmp(words[1], "quantise") == 0) {
        return quantise(words[2], words[3]);
    }
    if (count != 3) {
        fprintf(stderr, "usage: peer MODEL THREADS | peer quantise IN OUT\n");
        return 2;
    }
    struct llama_model *model = llama_model_load_from_file(words[1], llama_model_default_params());
    if (model == NULL) {
        return 4;
    }
    alone = context_new(model, ARM_CONTEXT, 1, atoi(words[2]));
    many = context_new(model, ARM_STREAM_SPACE, ARM_STREAMS, atoi(words[2]));
    if (alone == NULL || many == NULL) {
        return 9;
    }
    printf("{\"name\": \"llama.cpp: %s\"}\n", llama_print_system_info());
    fflush(stdout);
    return arm_serve((uint32_t)llama_vocab_n_tokens(llama_model_get_vocab(model)));
}
