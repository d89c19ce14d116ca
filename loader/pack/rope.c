/* Factors that divide the turns of RoPE's pairs: from Llama 3.1's four numbers, from YaRN's, or as
 * files have them: GGUF's rope_freqs, LongRoPE's two rows. */
#include <math.h>
#include <string.h>

#include "loader/pack/plan.h"
#include "loader/pack/quant.h"

#define FREQUENCIES   "rope_freqs.weight"
#define FACTORS_SHORT "rope_factors_short.weight"
#define FACTORS_LONG  "rope_factors_long.weight"

bool cm_rope_tensor_is(struct cm_source_text name)
{
    return cm_source_text_is(name, FREQUENCIES) || cm_source_text_is(name, FACTORS_SHORT) ||
           cm_source_text_is(name, FACTORS_LONG);
}

bool cm_rope_tensors_long(const struct cm_source *source)
{
    return cm_source_find(source, FACTORS_SHORT) != NULL ||
           cm_source_find(source, FACTORS_LONG) != NULL;
}

/* Factors of 1 alone are no factors: one model, one encoding. */
static void factors_settle(struct cm_manifest *m, uint32_t count)
{
    m->rope_factor_count = 0;
    for (uint32_t i = 0; i < count; i++) {
        m->rope_factor_count = m->rope_factors[i] == 1.0f ? m->rope_factor_count : count;
    }
}

/* Waves longer than `context / low` positions are stretched by the factor, those shorter than
 * `context / high` stay, what lies between goes over smoothly (transformers,
 * modeling_rope_utils.py, `_compute_llama3_parameters`). */
enum cm_status cm_rope_llama3(const struct cm_rope_scaling *s, struct cm_manifest *m,
                              struct cm_error *err)
{
    const double low = (double)s->low, high = (double)s->high, context = (double)s->context;
    const double factor = (double)s->factor;
    const uint32_t count = m->rope_width / 2;
    bool ok = factor >= 1.0 && factor <= 1024.0 && low > 0.0 && high > low && high <= 1024.0 &&
              context >= 1.0 && context <= 0x1p22 && count <= CM_MANIFEST_ROPE_PAIRS_MAX;
    for (uint32_t i = 0; ok && i < count; i++) {
        double turn = pow((double)m->rope_base, -2.0 * i / m->rope_width);
        double waves = context * turn / (2.0 * M_PI); /* in the context */
        double smooth = (waves - low) / (high - low);
        double kept = smooth < 0.0 ? 0.0 : (smooth > 1.0 ? 1.0 : smooth);
        m->rope_factors[i] = (float)(1.0 / ((1.0 - kept) / factor + kept));
    }
    if (!ok) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "model: RoPE scaled by 'llama3' with factor %g, low_freq_factor %g, "
                            "high_freq_factor %g, original_max_position_embeddings %g: out of "
                            "bounds",
                            factor, low, high, context);
    }
    factors_settle(m, count);
    return CM_OK;
}

/* Attention's scale is one for all layers, and for what RoPE leaves alone too. */
static enum cm_status attention_check(const struct cm_manifest *m, const char *scaled_by,
                                      struct cm_error *err)
{
    return m->rope_width == m->head_width && m->decoder.window_rope_base == 0.0f
               ? CM_OK
               : cm_error_set(
                     err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                     "model: RoPE scaled by '%s' and turning %u of %u values of a head, or "
                     "another RoPE of layers with a window: not supported",
                     scaled_by, m->rope_width, m->head_width);
}

float cm_rope_yarn_attention(float factor, float weight)
{
    return factor > 1.0f ? 0.1f * weight * logf(factor) + 1.0f : 1.0f;
}

/* The pair, counted as a real number, that turns `turns` times in the context. */
static double yarn_pair(const struct cm_manifest *m, double context, double turns)
{
    return m->rope_width * log(context / (turns * 2.0 * M_PI)) / (2.0 * log((double)m->rope_base));
}

static bool yarn_ok(const struct cm_rope_yarn *s, const struct cm_manifest *m)
{
    return s->factor >= 1.0f && s->factor <= 1024.0f && s->context >= 1.0f &&
           s->factor * s->context <= 0x1p22f && s->slow > 0.0f && s->fast > s->slow &&
           s->fast <= 1024.0f && s->attention >= 0x1p-4f && s->attention <= 16.0f &&
           m->rope_base > 1.0f && m->rope_width / 2 <= CM_MANIFEST_ROPE_PAIRS_MAX;
}

/* Pairs that turn more than `fast` times in the context that the model was trained on stay, those
 * that turn less than `slow` times are stretched by the factor, between them it goes over in a
 * straight line (Peng et al. 2023; transformers, modeling_rope_utils.py,
 * `_compute_yarn_parameters`). */
static bool yarn_fill(const struct cm_rope_yarn *s, struct cm_manifest *m)
{
    double low = yarn_pair(m, (double)s->context, (double)s->fast);
    double high = yarn_pair(m, (double)s->context, (double)s->slow);
    low = fmax(s->between ? low : floor(low), 0.0);
    high = fmin(s->between ? high : ceil(high), m->rope_width - 1.0);
    const double wide = high - low == 0.0 ? 0.001 : high - low;
    for (uint32_t i = 0; i < m->rope_width / 2; i++) {
        double stretched = fmin(fmax((i - low) / wide, 0.0), 1.0);
        m->rope_factors[i] = (float)(1.0 / (stretched / (double)s->factor + 1.0 - stretched));
    }
    return low <= high;
}

enum cm_status cm_rope_yarn(const struct cm_rope_yarn *scaling, struct cm_plan *plan,
                            struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    struct cm_rope_yarn s = *scaling;
    s.context = s.context != 0.0f ? s.context : (float)m->context_max;
    s.fast = s.fast != 0.0f ? s.fast : 32.0f;
    s.slow = s.slow != 0.0f ? s.slow : 1.0f;
    s.attention = s.attention != 0.0f ? s.attention : cm_rope_yarn_attention(s.factor, 1.0f);
    if (!yarn_ok(&s, m) || !yarn_fill(&s, m)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "model: RoPE scaled by 'yarn' with factor %g, original context %g, "
                            "beta_fast %g, beta_slow %g, attention factor %g: out of bounds",
                            (double)s.factor, (double)s.context, (double)s.fast, (double)s.slow,
                            (double)s.attention);
    }
    enum cm_status status = attention_check(m, "yarn", err);
    if (status != CM_OK) {
        return status;
    }
    factors_settle(m, m->rope_width / 2);
    plan->rope_attention = s.attention;
    const uint32_t context = (uint32_t)(s.factor * s.context);
    m->context_max = m->context_max > context ? m->context_max : context;
    return CM_OK;
}

/* Ding et al. 2024; transformers, modeling_rope_utils.py, `_compute_longrope_parameters`. */
float cm_rope_long_attention(double factor, double context)
{
    return factor > 1.0 && context > 1.0 ? (float)sqrt(1.0 + log(factor) / log(context)) : 1.0f;
}

enum cm_status cm_rope_long(struct cm_plan *plan, struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    const uint32_t count = m->rope_width / 2;
    uint32_t bad = 0;
    while (bad < count && cm_manifest_rope_factor_ok(m->rope_factors[bad]) &&
           cm_manifest_rope_factor_ok(m->rope_long_factors[bad])) {
        bad++;
    }
    if (m->rope_long_context == 0 || bad < count ||
        !(plan->rope_attention >= 0x1p-4f && plan->rope_attention <= 16.0f)) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "model: RoPE scaled by 'longrope' with original context %u, attention "
                            "factor %g, short and long factors %g and %g of pair %u: out of bounds",
                            m->rope_long_context, (double)plan->rope_attention,
                            (double)m->rope_factors[bad < count ? bad : 0],
                            (double)m->rope_long_factors[bad < count ? bad : 0],
                            bad < count ? bad : 0);
    }
    factors_settle(m, count);
    m->rope_long_context = m->rope_long_context < m->context_max ? m->rope_long_context : 0;
    return attention_check(m, "longrope", err);
}

static enum cm_status tensor_read(const struct cm_source *source, const char *name,
                                  const struct cm_manifest *m, float *ret_factors,
                                  struct cm_error *err)
{
    const struct cm_source_tensor *tensor = cm_source_find(source, name);
    const uint32_t count = m->rope_width / 2;
    if (tensor == NULL || tensor->type != CM_QUANT_F32 || tensor->rows != 1 ||
        tensor->columns != count || count > CM_MANIFEST_ROPE_PAIRS_MAX) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "model: tensor '%s' is not %u F32 values, one for each pair that RoPE "
                            "turns",
                            name, count);
    }
    enum cm_status status = cm_source_rows_read(tensor, 0, 1, ret_factors, err);
    for (uint32_t i = 0; status == CM_OK && i < count; i++) {
        if (!cm_manifest_rope_factor_ok(ret_factors[i])) {
            status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                                  "model: tensor '%s' has %g at %u, which can't divide a turn",
                                  name, (double)ret_factors[i], i);
        }
    }
    return status;
}

enum cm_status cm_rope_tensors(const struct cm_source *source, struct cm_plan *plan,
                               struct cm_error *err)
{
    struct cm_manifest *m = &plan->manifest;
    const bool one = cm_source_find(source, FREQUENCIES) != NULL;
    const bool two = cm_rope_tensors_long(source);
    if (one && two) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "model: tensor '%s' beside LongRoPE's: not supported", FREQUENCIES);
    }
    enum cm_status status = CM_OK;
    if (one || two) {
        status = tensor_read(source, one ? FREQUENCIES : FACTORS_SHORT, m, m->rope_factors, err);
    }
    if (status == CM_OK && two) {
        status = tensor_read(source, FACTORS_LONG, m, m->rope_long_factors, err);
    }
    if (status == CM_OK && two) {
        return cm_rope_long(plan, err);
    }
    if (status == CM_OK && one) {
        factors_settle(m, m->rope_width / 2);
    }
    return status;
}
