/* Factors that divide the turns of RoPE's pairs: from Llama 3.1's four numbers, or as GGUF has
 * them.
 */
#include <math.h>
#include <string.h>

#include "loader/pack/plan.h"
#include "loader/pack/quant.h"

#define FREQUENCIES "rope_freqs.weight"

bool cm_rope_tensor_is(struct cm_source_text name)
{
    return cm_source_text_is(name, FREQUENCIES);
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

enum cm_status cm_rope_tensor(const struct cm_source *source, struct cm_manifest *m,
                              struct cm_error *err)
{
    const struct cm_source_tensor *tensor = cm_source_find(source, FREQUENCIES);
    const uint32_t count = m->rope_width / 2;
    if (tensor == NULL) {
        return CM_OK;
    }
    if (tensor->type != CM_QUANT_F32 || tensor->rows != 1 || tensor->columns != count ||
        count > CM_MANIFEST_ROPE_PAIRS_MAX) {
        return cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                            "model: tensor '%s' is not %u F32 values, one for each pair that RoPE "
                            "turns",
                            FREQUENCIES, count);
    }
    enum cm_status status = cm_source_rows_read(tensor, 0, 1, m->rope_factors, err);
    for (uint32_t i = 0; status == CM_OK && i < count; i++) {
        if (!cm_manifest_rope_factor_ok(m->rope_factors[i])) {
            status = cm_error_set(err, CM_E_PACKAGE, "CM-GGUF-ROPE",
                                  "model: tensor '%s' has %g at %u, which can't divide a turn",
                                  FREQUENCIES, (double)m->rope_factors[i], i);
        }
    }
    if (status == CM_OK) {
        factors_settle(m, count);
    }
    return status;
}
