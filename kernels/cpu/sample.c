/* The next token: penalties, temperature, top-k, min-p, top-p, draw (kernels/NUMERICS.md). */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>

/* Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
 * 2011. */
void cm_philox(uint64_t seed, uint64_t counter, uint32_t ret[4])
{
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t x[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0};
    for (int round = 0; round < 10; round++) {
        uint64_t a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ x[1] ^ key[0], (uint32_t)b,
                            (uint32_t)(a >> 32) ^ x[3] ^ key[1], (uint32_t)a};
        for (int i = 0; i < 4; i++) {
            x[i] = next[i];
        }
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++) {
        ret[i] = x[i];
    }
}

static void penalties_apply(const struct cm_slot *slot, float *logits, uint32_t vocabulary)
{
    const struct cm_sampling *s = &slot->sampling;
    if (s->repetition_penalty != 1.0f) {
        for (uint32_t i = 0; i < vocabulary; i++) {
            if (slot->seen[i] != 0) {
                logits[i] = logits[i] > 0.0f ? logits[i] / s->repetition_penalty
                                             : logits[i] * s->repetition_penalty;
            }
        }
    }
    if (s->frequency_penalty != 0.0f || s->presence_penalty != 0.0f) {
        for (uint32_t i = 0; i < vocabulary; i++) {
            if (slot->generated[i] != 0) {
                logits[i] = fmaf(-s->frequency_penalty, (float)slot->generated[i], logits[i]) -
                            s->presence_penalty;
            }
        }
    }
}

static bool before(struct cm_candidate a, struct cm_candidate b)
{
    return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

static void heap_sink(struct cm_candidate *heap, uint32_t size, uint32_t at)
{
    for (;;) {
        uint32_t best = at, left = 2 * at + 1;
        for (uint32_t child = left; child < left + 2 && child < size; child++) {
            best = before(heap[child], heap[best]) ? child : best;
        }
        if (best == at) {
            return;
        }
        struct cm_candidate swap = heap[at];
        heap[at] = heap[best];
        heap[best] = swap;
        at = best;
    }
}

/* Order the best candidates at the end of the array, best last; returns how many survive. */
static uint32_t survivors_order(const struct cm_sampling *s, struct cm_candidate *all,
                                uint32_t vocabulary, double *ret_total)
{
    uint32_t size = vocabulary, limit = s->top_k == 0 ? vocabulary : s->top_k;
    bool cut_first = s->top_k != 0 || s->min_p > 0.0f; /* then top-p sees only what they leave */
    double total = 0.0, all_total = 0.0;
    for (uint32_t i = 0; i < vocabulary; i++) {
        all_total += (double)all[i].weight;
    }
    for (uint32_t i = vocabulary / 2; i-- > 0;) {
        heap_sink(all, size, i);
    }
    float floor = s->min_p * all[0].weight;
    while (size > 0 && vocabulary - size < limit && all[0].weight >= floor &&
           (cut_first || total < (double)s->top_p * all_total)) {
        struct cm_candidate top = all[0];
        all[0] = all[--size];
        all[size] = top;
        total += (double)top.weight;
        heap_sink(all, size, 0);
    }
    uint32_t count = vocabulary - size;
    if (cut_first && s->top_p < 1.0f) {
        double kept = 0.0, whole = total;
        uint32_t keep = 0;
        while (keep < count && kept < (double)s->top_p * whole) {
            kept += (double)all[vocabulary - 1 - keep++].weight;
        }
        count = keep;
        total = kept;
    }
    *ret_total = total;
    return count;
}

uint32_t cm_sample(const struct cm_slot *slot, const struct cm_path *path, float *logits,
                   uint32_t vocabulary, const uint32_t *masked, uint32_t masked_count,
                   struct cm_candidate *scratch)
{
    const struct cm_sampling *s = &slot->sampling;
    uint32_t random[4];
    double total = 0.0;
    penalties_apply(slot, logits, vocabulary);
    for (uint32_t i = 0; i < masked_count; i++) {
        logits[masked[i]] = -INFINITY;
    }
    uint32_t best = path->greatest(logits, vocabulary);
    if (s->temperature <= 0.0f) {
        return best;
    }
    float greatest = logits[best];
    for (uint32_t i = 0; i < vocabulary; i++) {
        float weight =
            logits[i] == -INFINITY ? 0.0f : cm_expf((logits[i] - greatest) / s->temperature);
        scratch[i] = (struct cm_candidate){weight, i};
        total += (double)weight;
    }
    bool filtered = s->top_k != 0 || s->min_p > 0.0f || s->top_p < 1.0f;
    uint32_t count = filtered ? survivors_order(s, scratch, vocabulary, &total) : vocabulary;
    cm_philox(s->seed, slot->drawn, random);
    double draw = ((double)random[0] + (double)random[1] * 0x1p-32) * 0x1p-32 * total;
    double sum = 0.0;
    for (uint32_t i = 0; i < count; i++) {
        const struct cm_candidate *at = filtered ? &scratch[vocabulary - 1 - i] : &scratch[i];
        sum += (double)at->weight;
        if (draw < sum) {
            return at->token;
        }
    }
    return best; /* rounding left the draw at the very end */
}
