/* Documents and views into the input machines of a pack. */
#include "kernels/guard/classify.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FEED_BYTES 128u /* between two looks at what was found */

_Static_assert(CM_GUARD_HOLD_MAX + 2 * FEED_BYTES <= CM_VIEW_LOOK_BACK,
               "a match's first byte is still in the view's ring when it is said");

struct cm_classifier {
    const struct cm_guard_pack *pack;
    struct cm_findings *findings;
    struct cm_documents documents;
    struct cm_guard_state raw;
    struct cm_guard_state states[CM_DOCUMENT_COUNT][CM_VIEW_COUNT];
};

enum cm_status cm_classifier_new(struct cm_classifier **ret_classifier, struct cm_error *err)
{
    *ret_classifier = calloc(1, sizeof(**ret_classifier));
    return *ret_classifier != NULL ? CM_OK
                                   : cm_error_errno(err, ENOMEM, "CM-SYS-MEMORY", "classifier");
}

void cm_classifier_free(struct cm_classifier *classifier)
{
    if (classifier != NULL) {
        explicit_bzero(classifier, sizeof(*classifier));
        free(classifier);
    }
}

static uint8_t place_of(enum cm_document document)
{
    return document == CM_DOCUMENT_TEXT    ? CM_GUARD_IN_TEXT
           : document < CM_DOCUMENT_BASE64 ? CM_GUARD_IN_HIDDEN
                                           : CM_GUARD_IN_ENCODED;
}

/* ------------------------------------------------------------------ findings */

static bool known(const struct cm_findings *findings, const struct cm_finding *finding)
{
    for (uint32_t i = 0; i < findings->count; i++) {
        const struct cm_finding *other = &findings->each[i];
        if (strcmp(other->rule, finding->rule) == 0 && other->start < finding->end &&
            finding->start < other->end) {
            return true; /* once more, in another view or document */
        }
    }
    return false;
}

/* Where there is no room, a report gives way to what refuses. */
static void finding_add(struct cm_findings *findings, const struct cm_finding *finding)
{
    bool refuses = finding->action == CM_VERDICT_REFUSE;
    if (known(findings, finding)) {
        return;
    }
    if (findings->count < CM_FINDINGS_MAX) {
        findings->each[findings->count++] = *finding;
    } else {
        findings->lost++;
        if (refuses && !findings->refused) {
            findings->each[CM_FINDINGS_MAX - 1] = *finding;
        }
    }
    findings->refused = findings->refused || refuses;
}

/* More at once than the machine has room for. */
static void overflow_add(struct cm_findings *findings, struct cm_finding *finding)
{
    static const char rule[] = "overflow", category[] = "guard";
    memcpy(finding->rule, rule, sizeof(rule));
    memcpy(finding->category, category, sizeof(category));
    finding->action = CM_VERDICT_REFUSE;
    finding_add(findings, finding);
}

/* Raw bytes of positions [from, to) of a view, without the spaces around them. In a reversed
 * document the last position came first. */
static void span_map(const struct cm_view_ring *ring, uint64_t from, uint64_t to,
                     struct cm_finding *finding)
{
    uint64_t oldest = ring->end > CM_VIEW_RING ? ring->end - CM_VIEW_RING : 0;
    from = from > oldest ? from : oldest;
    while (to - from > 1 && ring->bytes[from % CM_VIEW_RING] == ' ') {
        from++;
    }
    while (to - from > 1 && ring->bytes[(to - 1) % CM_VIEW_RING] == ' ') {
        to--;
    }
    struct cm_view_span first = ring->spans[from % CM_VIEW_RING];
    struct cm_view_span last = ring->spans[(to - 1) % CM_VIEW_RING];
    finding->start = first.start < last.start ? first.start : last.start;
    finding->end = first.end > last.end ? first.end : last.end;
}

/* ring NULL: positions are raw offsets. */
static void verdicts_take(struct cm_classifier *classifier, struct cm_guard_state *state,
                          enum cm_document document, enum cm_guard_class class,
                          const struct cm_view_ring *ring)
{
    for (uint32_t i = 0; i < state->verdict_count; i++) {
        const struct cm_guard_verdict *verdict = &state->verdicts[i];
        struct cm_finding finding = {.class = (uint8_t) class,
                                     .document = (uint8_t)document,
                                     .start = (uint32_t)verdict->start,
                                     .end = (uint32_t)verdict->end};
        if (ring != NULL) {
            span_map(ring, verdict->start, verdict->end, &finding);
        }
        if (verdict->rule == CM_GUARD_RULE_OVERFLOW) {
            overflow_add(classifier->findings, &finding);
            continue;
        }
        const struct cm_guard_rule *rule = &classifier->pack->rules[verdict->rule];
        memcpy(finding.rule, rule->id, sizeof(finding.rule));
        memcpy(finding.category, rule->category, sizeof(finding.category));
        finding.action = rule->action;
        finding_add(classifier->findings, &finding);
    }
    state->verdict_count = 0;
    classifier->findings->lost += state->verdicts_lost; /* never all that refuse */
    state->verdicts_lost = 0;
}

/* ------------------------------------------------------------------ feeding */

static bool idle(const struct cm_guard_pack *pack, enum cm_guard_class class)
{
    const struct cm_guard_machine *machine = &pack->machines[__builtin_ctz((uint32_t) class)];
    return machine->nodes <= 1 && machine->start_first[256] == 0;
}

static void on_view(void *context, enum cm_document document, enum cm_view view,
                    const struct cm_view_ring *ring, uint64_t from)
{
    struct cm_classifier *classifier = context;
    enum cm_guard_class class = (enum cm_guard_class)(CM_GUARD_FOLDED << view);
    struct cm_guard_state *state = &classifier->states[document][view];
    if (idle(classifier->pack, class)) {
        return;
    }
    if (from == 0) {
        cm_guard_begin(state, class);
        state->where = place_of(document);
    }
    while (from < ring->end) {
        uint32_t at = (uint32_t)from & (CM_VIEW_RING - 1), take = FEED_BYTES;
        take = take < CM_VIEW_RING - at ? take : CM_VIEW_RING - at;
        take = take < ring->end - from ? take : (uint32_t)(ring->end - from);
        (void)cm_guard_feed(classifier->pack, state, ring->bytes + at, take, NULL, NULL);
        verdicts_take(classifier, state, document, class, ring);
        from += take;
    }
}

static void raw_feed(struct cm_classifier *classifier, const uint8_t *text, size_t size)
{
    struct cm_guard_state *state = &classifier->raw;
    cm_guard_begin(state, CM_GUARD_INPUT);
    state->where = CM_GUARD_IN_TEXT;
    for (size_t at = 0; at < size; at += FEED_BYTES) {
        size_t take = size - at < FEED_BYTES ? size - at : FEED_BYTES;
        (void)cm_guard_feed(classifier->pack, state, text + at, take, NULL, NULL);
        verdicts_take(classifier, state, CM_DOCUMENT_TEXT, CM_GUARD_INPUT, NULL);
    }
    (void)cm_guard_finish(classifier->pack, state, CM_GUARD_TEXT_END, NULL, 0, NULL, NULL);
    verdicts_take(classifier, state, CM_DOCUMENT_TEXT, CM_GUARD_INPUT, NULL);
}

/* What is still open is decided by the end of the text; then the document is wiped. */
static void document_finish(struct cm_classifier *classifier, enum cm_document document)
{
    struct cm_document_views *each = &classifier->documents.each[document];
    if (!each->open) {
        return;
    }
    for (enum cm_view view = 0; view < CM_VIEW_COUNT; view++) {
        struct cm_guard_state *state = &classifier->states[document][view];
        if (state->count > 0) {
            (void)cm_guard_finish(classifier->pack, state, CM_GUARD_TEXT_END, NULL, 0, NULL, NULL);
            verdicts_take(classifier, state, document,
                          (enum cm_guard_class)(CM_GUARD_FOLDED << view), &each->views.rings[view]);
        }
    }
    explicit_bzero(classifier->states[document], sizeof(classifier->states[document]));
    explicit_bzero(each, sizeof(*each));
}

void cm_classify(struct cm_classifier *classifier, const struct cm_guard_pack *pack,
                 const uint8_t *text, size_t size, struct cm_findings *ret_findings)
{
    memset(ret_findings, 0, sizeof(*ret_findings));
    classifier->pack = pack;
    classifier->findings = ret_findings;
    if (!idle(pack, CM_GUARD_INPUT)) {
        raw_feed(classifier, text, size);
    }
    cm_documents_read(&classifier->documents, text, size, on_view, classifier);
    for (enum cm_document document = 0; document < CM_DOCUMENT_COUNT; document++) {
        document_finish(classifier, document);
    }
    explicit_bzero(&classifier->raw, sizeof(classifier->raw));
}
