/* GGUF files by an attacker: every number, name and length of a well-formed file changed, cut and
 * moved. One line or success; what is accepted must be a package that its reader accepts. */
#include <criterion/criterion.h>

#include "tests/unit/gguf_sample.h"
#include "tests/unit/mutate.h"

#define MUTATIONS 12000

static struct gguf_sample sample;
static struct cm_error err;

Test(pack_gguf, the_sample_is_a_model)
{
    struct cm_plan plan;
    gguf_sample_make(&sample);
    cr_assert_eq(gguf_way(sample.bytes, sample.size, &plan, &err), CM_OK, "%s", err.text);
    cr_assert_eq(plan.manifest.tensor_count, 8u);
    cm_plan_done(&plan);
}

/* What the packer would write must be what the package's reader takes, within the payload. */
static void accepted_check(const struct cm_plan *plan)
{
    uint8_t *bytes;
    size_t size;
    struct cm_manifest again;
    cr_assert_eq(cm_manifest_encode(&plan->manifest, &bytes, &size, &err), CM_OK, "%s", err.text);
    cr_assert_eq(cm_manifest_parse(bytes, size, plan->payload_bytes, &again, &err), CM_OK, "%s",
                 err.text);
    cr_assert_eq(again.tensor_count, plan->manifest.tensor_count);
    cm_manifest_done(&again);
    free(bytes);
}

static void name_mutate(uint8_t *work, const struct gguf_mark *mark)
{
    const struct gguf_mark *other = &sample.marks[(size_t)rand() % sample.mark_count];
    if (other->kind == GGUF_MARK_NAME && other->size == mark->size && rand() % 2) {
        memcpy(work + mark->offset, work + other->offset, mark->size); /* a duplicate */
    } else {
        work[mark->offset + (uint32_t)rand() % mark->size] ^= (uint8_t)(1u << rand() % 8);
    }
}

/* Exchange two numbers of one size: counts for lengths, offsets for types. */
static void marks_swap(uint8_t *work, const struct gguf_mark *a, const struct gguf_mark *b)
{
    uint8_t kept[8];
    if (a->kind != GGUF_MARK_NAME && b->kind != GGUF_MARK_NAME && a->size == b->size) {
        memcpy(kept, work + a->offset, a->size);
        memcpy(work + a->offset, work + b->offset, a->size);
        memcpy(work + b->offset, kept, a->size);
    }
}

/* The vocabulary has most of the marks: half of the changes go elsewhere. */
static const struct gguf_mark *mark_choose(void)
{
    const struct gguf_mark *mark;
    bool outside = rand() % 2;
    do {
        mark = &sample.marks[(size_t)rand() % sample.mark_count];
    } while (outside && mark->offset > 900 && mark->offset + 1600 < sample.header);
    return mark;
}

static size_t mutate(uint8_t *work)
{
    for (int k = 0; k <= rand() % 3; k++) {
        const struct gguf_mark *mark = mark_choose();
        if (mark->kind == GGUF_MARK_NAME) {
            name_mutate(work, mark);
        } else if (rand() % 8 == 0) {
            marks_swap(work, mark, mark_choose());
        } else {
            value_mutate(work + mark->offset, mark->size);
        }
    }
    if (rand() % 16 == 0) { /* weights: NaN and infinity among them */
        uint32_t at = sample.header + (uint32_t)rand() % (sample.size - sample.header - 4);
        memset(work + at, rand() % 2 ? 0xff : 0x7c, (size_t)rand() % 4 + 1);
    }
    return rand() % 8 == 0 ? (size_t)rand() % sample.size : sample.size;
}

Test(pack_gguf, mutated_files_are_refused_in_one_line_or_are_models)
{
    uint32_t refused[64] = {0}, accepted = 0, kinds = 0;
    char ids[64][CM_ERROR_ID_BYTES];
    srand(21);
    gguf_sample_make(&sample);
    for (int i = 0; i < MUTATIONS; i++) {
        struct cm_plan plan;
        uint8_t *work = malloc(sample.size);
        memcpy(work, sample.bytes, sample.size);
        size_t size = mutate(work);
        enum cm_status status = gguf_way(work, size, &plan, &err);
        free(work);
        if (status == CM_OK) {
            accepted++;
            accepted_check(&plan);
            cm_plan_done(&plan);
            continue;
        }
        cr_assert_eq(status, CM_E_PACKAGE, "%s: %s", err.id, err.text);
        cr_assert(err.text[0] != '\0' && strchr(err.text, '\n') == NULL);
        uint32_t k = 0;
        while (k < kinds && strcmp(ids[k], err.id) != 0) {
            k++;
        }
        if (k == kinds && kinds < 64) {
            snprintf(ids[kinds++], sizeof(ids[0]), "%s", err.id);
        }
        refused[k < 64 ? k : 63]++;
    }
    cr_assert_geq(kinds, 12u, "the mutations reach only %u kinds of refusal", kinds);
    printf("pack_gguf: %d files, %u accepted, %u kinds of refusal:", MUTATIONS, accepted, kinds);
    for (uint32_t k = 0; k < kinds; k++) {
        printf(" %s %u", ids[k], refused[k]);
    }
    printf("\n");
}
