/* Vector arithmetic in the order of kernels/NUMERICS.md: plain loops over 16 lanes, which the
 * compiler turns into AVX2; the order is in the source, so every compiler gives the same bits. */
#include "kernels/cpu/cpu_internal.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

static float lanes_sum(float lanes[CM_LANES])
{
    for (uint32_t step = CM_LANES / 2; step > 0; step /= 2) {
        for (uint32_t l = 0; l < step; l++) {
            lanes[l] += lanes[l + step];
        }
    }
    return lanes[0];
}

float cm_half_float(uint16_t half)
{
    return _cvtsh_ss(half);
}

void cm_vector_to_half(const float *x, uint16_t *ret, uint32_t size)
{
    for (uint32_t i = 0; i < size; i++) {
        ret[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
}

float cm_expf(float x)
{
    const float log2_e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
    float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(clamped * log2_e);
    float r = fmaf(n, -ln2_low, fmaf(n, -ln2_high, clamped));
    /* Taylor coefficients up to r^6: |r| <= ln2 / 2, error below 2 ulp. */
    float p = 0x1.6c16c2p-10f;
    p = fmaf(p, r, 0x1.111112p-7f);
    p = fmaf(p, r, 0x1.555556p-5f);
    p = fmaf(p, r, 0x1.555556p-3f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof(power));
    return p * power;
}

void cm_vector_quantise(const float *x, uint32_t columns, int8_t *q, float *scale, float *sum,
                        int32_t *count)
{
    for (uint32_t b = 0; b < columns / CM_TILE_COLUMNS; b++) {
        const float *from = x + b * CM_TILE_COLUMNS;
        int8_t *to = q + b * CM_TILE_COLUMNS;
        float greatest = 0.0f;
        int32_t n = 0;
        for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
            float magnitude = fabsf(from[k]);
            greatest = magnitude > greatest ? magnitude : greatest;
        }
        float inverse = greatest > 0.0f ? 127.0f / greatest : 0.0f;
        for (uint32_t k = 0; k < CM_TILE_COLUMNS; k++) {
            int32_t value = (int32_t)rintf(from[k] * inverse);
            to[k] = (int8_t)value;
            n += value;
        }
        scale[b] = greatest / 127.0f;
        count[b] = n;
        sum[b] = scale[b] * (float)n;
    }
}

void cm_vector_norm(const float *x, const float *weight, uint32_t size, float epsilon, float *ret)
{
    float lanes[CM_LANES] = {0};
    for (uint32_t i = 0; i < size; i += CM_LANES) {
        for (uint32_t l = 0; l < CM_LANES; l++) {
            lanes[l] = fmaf(x[i + l], x[i + l], lanes[l]);
        }
    }
    float r = 1.0f / sqrtf(lanes_sum(lanes) / (float)size + epsilon);
    for (uint32_t i = 0; i < size; i++) {
        ret[i] = (x[i] * r) * weight[i];
    }
}

void cm_vector_gate(const float *gate_up, uint32_t ffn_width, float *ret)
{
    for (uint32_t tile = 0; tile < ffn_width / CM_TILE_ROWS; tile++) {
        const float *gate = gate_up + tile * 2 * CM_TILE_ROWS;
        const float *up = gate + CM_TILE_ROWS;
        for (uint32_t r = 0; r < CM_TILE_ROWS; r++) {
            ret[tile * CM_TILE_ROWS + r] = (gate[r] / (1.0f + cm_expf(-gate[r]))) * up[r];
        }
    }
}

void cm_vector_rope(float *x, const float *cosine, const float *sine, uint32_t rope_width)
{
    for (uint32_t i = 0; i < rope_width / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = fmaf(a, cosine[i], -(b * sine[i]));
        x[2 * i + 1] = fmaf(a, sine[i], b * cosine[i]);
    }
}

void cm_matrix_row(const struct cm_matrix *matrix, uint32_t row, float *ret, uint32_t columns)
{
    uint32_t tile = row / CM_TILE_ROWS, r = row % CM_TILE_ROWS;
    for (uint32_t k = 0; k < columns; k++) {
        size_t at = (size_t)tile * matrix->blocks + k / CM_TILE_COLUMNS;
        uint32_t c = k % CM_TILE_COLUMNS;
        const uint16_t *scales = (const uint16_t *)(const void *)matrix->scales;
        if (matrix->kind == CM_TENSOR_U8S) {
            uint8_t q = matrix->quants[at * 512 + 64 * (c / 4) + 4 * r + c % 4];
            ret[k] = cm_half_float(scales[at * 16 + r]) * (float)((int32_t)q - 128);
            continue;
        }
        uint8_t pair = matrix->quants[at * 256 + 64 * ((c % 16) / 4) + 4 * r + c % 4];
        int32_t q = c < 16 ? pair & 15 : pair >> 4;
        if (matrix->kind == CM_TENSOR_U4A) {
            ret[k] = fmaf(cm_half_float(scales[at * 32 + r]), (float)q,
                          cm_half_float(scales[at * 32 + 16 + r]));
        } else {
            ret[k] = cm_half_float(scales[at * 16 + r]) * (float)(q - 8);
        }
    }
}

/* ------------------------------------------------------------------ attention */

static float half_dot(const float *query, const uint16_t *key, uint32_t size)
{
    float lanes[CM_LANES] = {0};
    uint32_t i = 0;
    __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
    for (; i + CM_LANES <= size; i += CM_LANES) {
        __m256 k0 = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(key + i)));
        __m256 k1 = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(key + i + 8)));
        low = _mm256_fmadd_ps(_mm256_loadu_ps(query + i), k0, low);
        high = _mm256_fmadd_ps(_mm256_loadu_ps(query + i + 8), k1, high);
    }
    _mm256_storeu_ps(lanes, low);
    _mm256_storeu_ps(lanes + 8, high);
    for (uint32_t l = 0; i < size; i++, l++) {
        lanes[l] = fmaf(query[i], _cvtsh_ss(key[i]), lanes[l]);
    }
    return lanes_sum(lanes);
}

static void half_accumulate(float weight, const uint16_t *value, float *out, uint32_t size)
{
    uint32_t i = 0;
    __m256 w = _mm256_set1_ps(weight);
    for (; i + 8 <= size; i += 8) {
        __m256 v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(value + i)));
        _mm256_storeu_ps(out + i, _mm256_fmadd_ps(w, v, _mm256_loadu_ps(out + i)));
    }
    for (; i < size; i++) {
        out[i] = fmaf(weight, _cvtsh_ss(value[i]), out[i]);
    }
}

static const uint16_t *page_row(const struct cm_attention *a, uint32_t position, size_t offset)
{
    const uint8_t *page = a->kv + (size_t)a->pages[position / CM_KV_PAGE_POSITIONS] * a->page_bytes;
    return (const uint16_t *)(const void *)(page + offset) +
           (size_t)(position % CM_KV_PAGE_POSITIONS) * a->head_width;
}

/* One chunk of positions for one query head: its greatest score, sum and weighted values. */
static float chunk_run(const struct cm_attention *a, const float *query, uint32_t first,
                       uint32_t last, float *ret_sum, float *out)
{
    float scores[CM_ATTENTION_CHUNK];
    float greatest = -INFINITY, sum = 0.0f;
    for (uint32_t t = first; t < last; t++) {
        float score = half_dot(query, page_row(a, t, a->k_offset), a->head_width) * a->scale;
        scores[t - first] = score;
        greatest = score > greatest ? score : greatest;
    }
    for (uint32_t t = 0; t < last - first; t++) {
        scores[t] = cm_expf(scores[t] - greatest);
    }
    memset(out, 0, a->head_width * sizeof(*out));
    for (uint32_t t = first; t < last; t++) {
        sum += scores[t - first];
        half_accumulate(scores[t - first], page_row(a, t, a->v_offset), out, a->head_width);
    }
    *ret_sum = sum;
    return greatest;
}

void cm_attention_run(const struct cm_attention *a)
{
    float part[1024];
    for (uint32_t h = 0; h < a->group; h++) {
        const float *query = a->query + (size_t)h * a->head_width;
        float *out = a->out + (size_t)h * a->head_width;
        float total;
        uint32_t last = a->positions < CM_ATTENTION_CHUNK ? a->positions : CM_ATTENTION_CHUNK;
        float greatest = chunk_run(a, query, 0, last, &total, out);
        for (uint32_t first = last; first < a->positions; first = last) {
            float sum;
            last = a->positions - first < CM_ATTENTION_CHUNK ? a->positions
                                                             : first + CM_ATTENTION_CHUNK;
            float most = chunk_run(a, query, first, last, &sum, part);
            float both = most > greatest ? most : greatest;
            float old = cm_expf(greatest - both), new = cm_expf(most - both);
            total = fmaf(total, old, sum * new);
            for (uint32_t i = 0; i < a->head_width; i++) {
                out[i] = fmaf(out[i], old, part[i] * new);
            }
            greatest = both;
        }
        for (uint32_t i = 0; i < a->head_width; i++) {
            out[i] = out[i] / total;
        }
    }
}
