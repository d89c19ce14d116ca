/* What rounding costs, as the mean KL divergence of the next token: the decoder in float, twice
 * over a fixed text, once with the file's weights and once with the stored ones. Plain and slow on
 * purpose: it runs once for a model, on the owner's machine. Vectors of all positions lie side by
 * side, [element][position]. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/model.h"
#include "loader/pack/plan.h"

#define POSITIONS CM_LOSS_POSITIONS

static const char text[] =
    "The old lighthouse stood at the end of the pier, and every evening its keeper climbed the "
    "stairs "
    "to light the lamp. \"If the wind turns,\" she said, \"we will see the ships before "
    "midnight.\" "
    "def area(width, height):\n    return width * height\n\n1. Read the question. 2. Answer it.";

struct arm {    /* one run of the decoder; all [..][POSITIONS] */
    float *x;   /* residual */
    float *in;  /* what goes into a product */
    float *out; /* what comes out; as large as the largest */
    float *logits;
};

struct run {
    const struct cm_plan *plan;
    struct arm arms[2]; /* the file's weights, the stored ones */
    uint32_t next;      /* tensor of the payload, in the order of execution */
    struct cm_error *err;
};

/* Tokens of the text by longest match: not how it would be cut, but tokens of the vocabulary. */
static uint32_t text_cut(const struct cm_manifest *m, uint32_t ret_tokens[POSITIONS])
{
    uint32_t count = 0;
    for (size_t at = 0; at + 1 < sizeof(text) && count < POSITIONS;) {
        uint32_t best = 0, longest = 0;
        for (uint32_t i = 0; i < m->vocabulary; i++) {
            uint32_t size = m->token_offsets[i + 1] - m->token_offsets[i];
            if (size > longest && size < sizeof(text) - at &&
                m->token_types[i] == CM_TOKEN_NORMAL &&
                memcmp(text + at, m->token_bytes + m->token_offsets[i], size) == 0) {
                best = i;
                longest = size;
            }
        }
        if (longest > 0) {
            ret_tokens[count++] = best;
        }
        at += longest > 0 ? longest : 1;
    }
    return count;
}

/* ------------------------------------------------------------------ products */

static void row_dot(const float *weights, uint32_t columns, const float *in, float *out)
{
    float sum[POSITIONS] = {0};
    for (uint32_t k = 0; k < columns; k++) {
        for (uint32_t p = 0; p < POSITIONS; p++) {
            sum[p] += weights[k] * in[(size_t)k * POSITIONS + p];
        }
    }
    memcpy(out, sum, sizeof(sum));
}

/* The next tensor of the plan times both arms' input. */
static enum cm_status multiply(struct run *run, bool logits)
{
    uint32_t index = run->next++;
    const struct cm_manifest_tensor *tensor = &run->plan->manifest.tensors[index];
    struct cm_plan_rows rows;
    enum cm_status status = cm_plan_rows_open(run->plan, index, &rows, run->err);
    for (uint32_t row = 0; status == CM_OK && row < tensor->rows; row++) {
        status = cm_plan_rows_next(&rows, run->err);
        for (uint32_t a = 0; status == CM_OK && a < 2; a++) {
            struct arm *arm = &run->arms[a];
            row_dot(a == 0 ? rows.source : rows.stored, tensor->columns, arm->in,
                    (logits ? arm->logits : arm->out) + (size_t)row * POSITIONS);
        }
    }
    cm_plan_rows_close(&rows);
    return status;
}

/* The next tensor of the plan, a vector. The caller frees. */
static enum cm_status vector_next(struct run *run, float **ret_vector)
{
    uint32_t index = run->next++;
    struct cm_convert_loss none;
    float *vector = malloc((size_t)run->plan->manifest.tensors[index].bytes);
    if (vector == NULL) {
        return cm_error_errno(run->err, ENOMEM, "CM-SYS-MEMORY", "a vector");
    }
    enum cm_status status = cm_plan_convert(run->plan, index, (uint8_t *)vector, &none, run->err);
    if (status != CM_OK) {
        free(vector);
        return status;
    }
    *ret_vector = vector;
    return CM_OK;
}

/* ------------------------------------------------------------------ parts of a layer */

static void norm(const float *x, const float *weight, uint32_t size, float epsilon, float *ret)
{
    for (uint32_t p = 0; p < POSITIONS; p++) {
        float sum = 0.0f;
        for (uint32_t i = 0; i < size; i++) {
            float value = x[(size_t)i * POSITIONS + p];
            sum += value * value;
        }
        float scale = 1.0f / sqrtf(sum / (float)size + epsilon);
        for (uint32_t i = 0; i < size; i++) {
            size_t at = (size_t)i * POSITIONS + p;
            ret[at] = x[at] * scale * weight[i];
        }
    }
}

/* Norm both arms' `from` (residual or result) with the next vector, into `to`. */
enum place { PLACE_X, PLACE_IN, PLACE_OUT };

static float *place_of(struct arm *arm, enum place place)
{
    return place == PLACE_X ? arm->x : place == PLACE_IN ? arm->in : arm->out;
}

static enum cm_status norm_next(struct run *run, enum place from, uint32_t first, uint32_t count,
                                uint32_t size, enum place to)
{
    float *weight = NULL;
    enum cm_status status = vector_next(run, &weight);
    for (uint32_t a = 0; status == CM_OK && a < 2; a++) {
        for (uint32_t i = first; i < first + count; i++) {
            size_t at = (size_t)i * size * POSITIONS;
            norm(place_of(&run->arms[a], from) + at, weight, size, run->plan->manifest.norm_epsilon,
                 place_of(&run->arms[a], to) + at);
        }
    }
    free(weight);
    return status;
}

static enum cm_status bias_next(struct run *run, uint32_t rows)
{
    float *bias = NULL;
    enum cm_status status = vector_next(run, &bias);
    for (uint32_t a = 0; status == CM_OK && a < 2; a++) {
        for (size_t i = 0; i < (size_t)rows * POSITIONS; i++) {
            run->arms[a].out[i] += bias[i / POSITIONS];
        }
    }
    free(bias);
    return status;
}

static bool windowed(const struct cm_manifest_decoder *d, uint32_t layer)
{
    return d->window != 0 && (d->window_period == 0 || (layer + 1) % d->window_period != 0);
}

static void rope(const struct cm_manifest *m, bool window, float *head)
{
    const struct cm_manifest_decoder *d = &m->decoder;
    const bool other = window && d->window_rope_base > 0.0f; /* and nothing scales it */
    float base = other ? d->window_rope_base : m->rope_base;
    float scale = !other && d->rope_scale > 0.0f ? d->rope_scale : 1.0f;
    bool factors = !other && m->rope_factor_count > 0;
    for (uint32_t i = 0; i < m->rope_width / 2; i++) {
        for (uint32_t p = 0; p < POSITIONS; p++) {
            float *a = head + (size_t)2 * i * POSITIONS + p, *b = a + POSITIONS;
            double turn = (double)p * scale * pow(base, -2.0 * i / m->rope_width);
            turn /= factors ? (double)m->rope_factors[i] : 1.0;
            float c = (float)cos(turn), s = (float)sin(turn), x = *a, y = *b;
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}

static float capped(float x, float cap)
{
    return cap > 0.0f ? cap * tanhf(x / cap) : x;
}

/* One position of one head; q, k and v are [width][POSITIONS]. */
static void position_attend(const struct cm_manifest *m, bool window, uint32_t p, const float *q,
                            const float *k, const float *v, float *out)
{
    const struct cm_manifest_decoder *d = &m->decoder;
    float scale =
        d->attention_scale > 0.0f ? d->attention_scale : 1.0f / sqrtf((float)m->head_width);
    uint32_t first = window && p + 1 > d->window ? p + 1 - d->window : 0;
    float weights[POSITIONS], greatest = -INFINITY, sum = 0.0f;
    for (uint32_t t = first; t <= p; t++) {
        float score = 0.0f;
        for (uint32_t i = 0; i < m->head_width; i++) {
            score += q[(size_t)i * POSITIONS + p] * k[(size_t)i * POSITIONS + t];
        }
        weights[t] = capped(score * scale, d->attention_cap);
        greatest = fmaxf(greatest, weights[t]);
    }
    for (uint32_t t = first; t <= p; t++) {
        weights[t] = expf(weights[t] - greatest);
        sum += weights[t];
    }
    for (uint32_t i = 0; i < m->head_width; i++) {
        float value = 0.0f;
        for (uint32_t t = first; t <= p; t++) {
            value += weights[t] * v[(size_t)i * POSITIONS + t];
        }
        out[(size_t)i * POSITIONS + p] = value / sum;
    }
}

/* Q, K, V in `out` → heads' results in `in`. */
static void attend(const struct cm_manifest *m, bool window, struct arm *arm)
{
    const size_t head = (size_t)m->head_width * POSITIONS;
    for (uint32_t h = 0; h < m->heads + m->kv_heads; h++) {
        rope(m, window, arm->out + h * head);
    }
    for (uint32_t h = 0; h < m->heads; h++) {
        const float *k = arm->out + (m->heads + h / (m->heads / m->kv_heads)) * head;
        for (uint32_t p = 0; p < POSITIONS; p++) {
            position_attend(m, window, p, arm->out + h * head, k, k + m->kv_heads * head,
                            arm->in + h * head);
        }
    }
}

/* Gate and up alternate by 16 rows in `out` → their product in `in`. */
static void gate(const struct cm_manifest *m, struct arm *arm)
{
    for (uint32_t row = 0; row < m->ffn_width; row++) {
        size_t from = (size_t)(row / CM_TILE_ROWS * 2 * CM_TILE_ROWS + row % CM_TILE_ROWS);
        for (uint32_t p = 0; p < POSITIONS; p++) {
            float g = arm->out[from * POSITIONS + p];
            float up = arm->out[(from + CM_TILE_ROWS) * POSITIONS + p];
            float turn = m->decoder.activation == CM_MANIFEST_SILU
                             ? g
                             : 1.5957691f * (g + 0.044715f * g * g * g);
            arm->in[(size_t)row * POSITIONS + p] = g / (1.0f + expf(-turn)) * up;
        }
    }
}

/* ------------------------------------------------------------------ the decoder */

/* out into the residual, through a norm if the decoder has one. */
static enum cm_status result_add(struct run *run)
{
    const struct cm_manifest *m = &run->plan->manifest;
    enum cm_status status =
        m->decoder.post_norms == 1 ? norm_next(run, PLACE_OUT, 0, 1, m->width, PLACE_OUT) : CM_OK;
    for (uint32_t a = 0; status == CM_OK && a < 2; a++) {
        for (size_t i = 0; i < (size_t)m->width * POSITIONS; i++) {
            run->arms[a].x[i] += run->arms[a].out[i];
        }
    }
    return status;
}

static enum cm_status attention_run(struct run *run, uint32_t layer)
{
    const struct cm_manifest *m = &run->plan->manifest;
    enum cm_status status = norm_next(run, PLACE_X, 0, 1, m->width, PLACE_IN);
    if (status == CM_OK) {
        status = multiply(run, false);
    }
    if (status == CM_OK && m->decoder.qkv_bias == 1) {
        status = bias_next(run, (m->heads + 2 * m->kv_heads) * m->head_width);
    }
    if (status == CM_OK && m->decoder.qk_norm == 1) {
        status = norm_next(run, PLACE_OUT, 0, m->heads, m->head_width, PLACE_OUT);
    }
    if (status == CM_OK && m->decoder.qk_norm == 1) {
        status = norm_next(run, PLACE_OUT, m->heads, m->kv_heads, m->head_width, PLACE_OUT);
    }
    for (uint32_t a = 0; status == CM_OK && a < 2; a++) {
        attend(m, windowed(&m->decoder, layer), &run->arms[a]);
    }
    if (status == CM_OK) {
        status = multiply(run, false);
    }
    return status == CM_OK ? result_add(run) : status;
}

static enum cm_status feed_forward_run(struct run *run)
{
    const struct cm_manifest *m = &run->plan->manifest;
    enum cm_status status = norm_next(run, PLACE_X, 0, 1, m->width, PLACE_IN);
    if (status == CM_OK) {
        status = multiply(run, false);
    }
    for (uint32_t a = 0; status == CM_OK && a < 2; a++) {
        gate(m, &run->arms[a]);
    }
    if (status == CM_OK) {
        status = multiply(run, false);
    }
    return status == CM_OK ? result_add(run) : status;
}

/* Rows of the embedding, the plan's first tensor. */
static enum cm_status embed(struct run *run, const uint32_t tokens[POSITIONS])
{
    const struct cm_manifest *m = &run->plan->manifest;
    float scale = m->decoder.embedding_scale > 0.0f ? m->decoder.embedding_scale : 1.0f;
    struct cm_plan_rows rows;
    enum cm_status status = cm_plan_rows_open(run->plan, 0, &rows, run->err);
    for (uint32_t p = 0; status == CM_OK && p < POSITIONS; p++) {
        rows.row = tokens[p];
        status = cm_plan_rows_next(&rows, run->err);
        for (uint32_t i = 0; status == CM_OK && i < m->width; i++) {
            run->arms[0].x[(size_t)i * POSITIONS + p] = rows.source[i] * scale;
            run->arms[1].x[(size_t)i * POSITIONS + p] = rows.stored[i] * scale;
        }
    }
    cm_plan_rows_close(&rows);
    run->next = 1;
    return status;
}

static enum cm_status decoder_run(struct run *run, const uint32_t tokens[POSITIONS])
{
    const struct cm_manifest *m = &run->plan->manifest;
    enum cm_status status = embed(run, tokens);
    for (uint32_t layer = 0; status == CM_OK && layer < m->layers; layer++) {
        status = attention_run(run, layer);
        if (status == CM_OK) {
            status = feed_forward_run(run);
        }
    }
    if (status == CM_OK) {
        status = norm_next(run, PLACE_X, 0, 1, m->width, PLACE_IN);
    }
    run->next = m->tied_head ? 0 : run->next;
    return status == CM_OK ? multiply(run, true) : status;
}

/* log sum exp of a position's logits, after the cap. */
static double logits_total(const struct cm_manifest *m, float *logits, uint32_t p)
{
    double greatest = -INFINITY, sum = 0.0;
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        float *at = logits + (size_t)i * POSITIONS + p;
        *at = capped(*at, m->decoder.logits_cap);
        greatest = fmax(greatest, (double)*at);
    }
    for (uint32_t i = 0; i < m->vocabulary; i++) {
        sum += exp((double)logits[(size_t)i * POSITIONS + p] - greatest);
    }
    return greatest + log(sum);
}

static double divergence(const struct run *run)
{
    const struct cm_manifest *m = &run->plan->manifest;
    double total = 0.0;
    for (uint32_t p = 0; p < POSITIONS; p++) {
        float *source = run->arms[0].logits, *stored = run->arms[1].logits;
        double a = logits_total(m, source, p), b = logits_total(m, stored, p);
        for (uint32_t i = 0; i < m->vocabulary; i++) {
            double x = (double)source[(size_t)i * POSITIONS + p] - a;
            double y = (double)stored[(size_t)i * POSITIONS + p] - b;
            total += exp(x) * (x - y);
        }
    }
    return total / POSITIONS;
}

static bool arm_make(const struct cm_manifest *m, struct arm *arm)
{
    size_t attention = (size_t)m->heads * m->head_width;
    size_t widest = m->width > m->ffn_width ? m->width : m->ffn_width;
    size_t rows = attention + 2 * (size_t)m->kv_heads * m->head_width;
    widest = attention > widest ? attention : widest;
    rows = 2 * (size_t)m->ffn_width > rows ? 2 * (size_t)m->ffn_width : rows;
    rows = m->width > rows ? m->width : rows;
    arm->x = calloc(m->width, POSITIONS * sizeof(float));
    arm->in = calloc(widest, POSITIONS * sizeof(float));
    arm->out = calloc(rows, POSITIONS * sizeof(float));
    arm->logits = calloc(m->vocabulary, POSITIONS * sizeof(float));
    return arm->x != NULL && arm->in != NULL && arm->out != NULL && arm->logits != NULL;
}

static void arm_free(struct arm *arm)
{
    free(arm->x);
    free(arm->in);
    free(arm->out);
    free(arm->logits);
}

enum cm_status cm_plan_loss(const struct cm_plan *plan, float *ret_divergence,
                            uint32_t *ret_positions, struct cm_error *err)
{
    struct run run = {.plan = plan, .err = err};
    uint32_t tokens[POSITIONS] = {0};
    enum cm_status status = CM_OK;
    if (!arm_make(&plan->manifest, &run.arms[0]) || !arm_make(&plan->manifest, &run.arms[1])) {
        status = cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "the loss");
    }
    if (status == CM_OK && text_cut(&plan->manifest, tokens) == POSITIONS) {
        status = decoder_run(&run, tokens);
        *ret_positions = POSITIONS;
        *ret_divergence = status == CM_OK ? fmaxf((float)divergence(&run), 0.0f) : 0.0f;
    } else {
        *ret_positions = 0;
        *ret_divergence = 0.0f;
    }
    arm_free(&run.arms[0]);
    arm_free(&run.arms[1]);
    return status;
}
