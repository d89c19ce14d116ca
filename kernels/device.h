/* The device: the only way to compute. Opaque types, plain C, no CUDA type in sight.
 *
 * Order of use, one thread at a time:
 *   open → describe → ( prepare → ) guard_bind → reserve → segment_submit × n → load_finish
 *        → model_bind → ( slot_open → step_submit → step_wait … → slot_close ) × n → scrub → close
 * After model_bind, between steps, for each region as often as wanted:
 *   adapter_submit × n → adapter_bind → … → adapter_unbind
 *
 * `reserve` allocates everything; nothing is allocated afterwards. A device decrypts into its own
 * arena; nothing in the arena can be used before load_finish has seen every segment pass, and any
 * failure wipes it. Without guard_bind nothing is filtered.
 *
 * A slot is one sequence's state that survives preemption: random counter, penalties, stop
 * and guard automata, held-back bytes. KV pages belong to the caller's scheduler, which names them
 * in every step; the device only reads and writes where it is told. Numbers: kernels/NUMERICS.md.
 */
#ifndef CASEMATE_KERNELS_DEVICE_H
#define CASEMATE_KERNELS_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/model.h"
#include "runtime/base/error.h"
#include "runtime/base/wire.h"

#define CM_KV_PAGE_POSITIONS 32u
/* What K and V are kept as. */
enum cm_kv_kind { CM_KV_FP16, CM_KV_INT8, CM_KV_KIND_COUNT };
#define CM_STEP_ENTRIES_MAX  64u
#define CM_STEP_BYTES_MAX    6144u /* released bytes of one entry in one step */
#define CM_STEP_VERDICTS_MAX 8u

struct cm_device;

/* How tokens of prompts are computed (kernels/NUMERICS.md); those of replies are exact always. */
enum cm_prompts {
    CM_PROMPTS_EXACT = 0, /* class D, as replies */
    CM_PROMPTS_BF16,      /* class P */
};

struct cm_device_options {
    uint32_t threads;  /* 0: as many as affinity, cpu.max and cpus_max allow */
    uint32_t cpus_max; /* of a quota that this process cannot see itself; 0: none */
    const char *path;  /* NULL: best there is; else "avx2", "avx512vnni", "amx" (tests) */
    enum cm_prompts prompts;
};

struct cm_device_facts {
    char name[64]; /* "cpu: …" */
    char path[32]; /* instruction path in use */
    enum cm_prompts prompts;
    uint32_t threads;
    uint32_t arena_locked; /* 1: arena is mlocked */
    uint64_t arena_bytes;
    uint64_t kv_page_bytes;
};

/* backend "cpu" or NULL (best there is). Fails: CONFIG unknown backend, or prompts wanted in a way
 * that this machine cannot; DEVICE missing instructions. */
CM_MUST_USE enum cm_status cm_device_open(const char *backend,
                                          const struct cm_device_options *options,
                                          struct cm_device **ret_device, struct cm_error *err);
/* Wipes the arena; NULL is fine. */
void cm_device_close(struct cm_device *device);
void cm_device_describe(const struct cm_device *device, struct cm_device_facts *ret_facts);

struct cm_device_reserve {
    const struct cm_model *model; /* shapes; token tables need not be set yet */
    uint64_t payload_bytes;       /* plaintext of all segments */
    uint32_t segment_bytes;       /* of every segment but the last */
    uint32_t slots;               /* sequences at once, <= CM_STEP_ENTRIES_MAX */
    uint32_t kv_pages;
    enum cm_kv_kind kv_kind;
    uint32_t context_max;     /* positions of one sequence */
    uint32_t step_tokens_max; /* tokens of one mixed step */
    uint32_t adapters; /* regions, <= CM_ADAPTER_REGIONS_MAX; 0: none, and the two below are 0 */
    uint64_t adapter_bytes;    /* plaintext that one region can hold */
    uint32_t adapter_rank_max; /* <= CM_ADAPTER_RANK_MAX */
};

/* Bytes that `reserve` would take, and of one KV page; for the scheduler's budget. */
CM_MUST_USE enum cm_status cm_device_need(const struct cm_device *device,
                                          const struct cm_device_reserve *reserve,
                                          uint64_t *ret_arena_bytes, uint64_t *ret_page_bytes,
                                          struct cm_error *err);
/* Before a model's shapes are known: take and populate `bytes` of what `reserve` will want, which
 * then adds what is missing and gives back what is too much. Where it cannot, nothing is done:
 * `reserve` says why. Once, or not at all. */
void cm_device_prepare(struct cm_device *device, uint64_t bytes);
/* Allocate, lock and populate the arena. Once. Fails: CONFIG with the bytes wanted and the limit
 * that is below them, SYSTEM. */
CM_MUST_USE enum cm_status cm_device_reserve(struct cm_device *device,
                                             const struct cm_device_reserve *reserve,
                                             struct cm_error *err);

/* How a host-side device opens a run of segments: check each SHA-256, then each tag, then write
 * plaintext; ciphertext and plaintext may be the same memory. Given by loader/stream; kernels/ know
 * no cipher library. Must be callable from several threads. */
struct cm_device_cipher {
    enum cm_status (*open)(void *context, uint64_t index, const uint8_t *ciphertext, size_t bytes,
                           uint8_t *plaintext, struct cm_error *err);
    void *context;
};

/* Where segment `index` will lie, so that its ciphertext can be read to there and opened in place.
 * NULL: this device's memory is not the host's, or nothing is reserved. */
uint8_t *cm_device_segment_place(struct cm_device *device, uint64_t index);
/* Open the segments from `index` on that `bytes` span (whole ones; the last may be shorter) into
 * their place. Any order, each once. On failure the device is poisoned: the arena is wiped and
 * every later call but close fails. */
CM_MUST_USE enum cm_status cm_device_segment_submit(struct cm_device *device,
                                                    const struct cm_device_cipher *cipher,
                                                    uint64_t index, const uint8_t *ciphertext,
                                                    size_t bytes, struct cm_error *err);
/* All segments passed? Then the payload becomes usable. Fails: PACKAGE with the first one missing.
 */
CM_MUST_USE enum cm_status cm_device_load_finish(struct cm_device *device, struct cm_error *err);
/* Check every tensor against its shape and the payload's size, refuse NaN and infinite scales and
 * norms by the tensor's name, and bind. `model` and what it points to is copied. */
CM_MUST_USE enum cm_status cm_device_model_bind(struct cm_device *device,
                                                const struct cm_model *model, struct cm_error *err);

/* Adapters: regions 1 .. adapters of the arena, each free, being filled, or bound.
 *
 * Where a segment of the region's adapter will lie; as cm_device_segment_place. */
uint8_t *cm_device_adapter_place(struct cm_device *device, uint32_t region, uint64_t index);
/* As cm_device_segment_submit, into a region that is not bound; segments are as long as the
 * model's. On failure the region alone is wiped, and takes nothing more until adapter_unbind: the
 * device and all others go on. */
CM_MUST_USE enum cm_status cm_device_adapter_submit(struct cm_device *device,
                                                    const struct cm_device_cipher *cipher,
                                                    uint32_t region, uint64_t index,
                                                    const uint8_t *ciphertext, size_t bytes,
                                                    struct cm_error *err);
/* All `payload_bytes` came? Then check every tensor's place and its shape against the bound model,
 * refuse NaN and infinity by the tensor's name, and bind. Nothing is allocated; `adapter` and what
 * it points to is copied. On failure the region is wiped, as above. Fails: PACKAGE. */
CM_MUST_USE enum cm_status cm_device_adapter_bind(struct cm_device *device, uint32_t region,
                                                  const struct cm_adapter *adapter,
                                                  uint64_t payload_bytes, struct cm_error *err);
/* Wipe the region, whatever is in it, and free it. No open slot may use it. */
void cm_device_adapter_unbind(struct cm_device *device, uint32_t region);

/* Bind a rule pack (policies/guard/FORMAT.md): from now on every slot's reply passes its output
 * rules. Once, before the first slot_open; the bytes are copied. Fails: CONFIG CM-RULES-PACK. */
CM_MUST_USE enum cm_status cm_device_guard_bind(struct cm_device *device, const uint8_t *pack,
                                                size_t bytes, struct cm_error *err);
/* Fill rule and category of a verdict on rule `rule` of the pack. */
void cm_device_guard_name(const struct cm_device *device, uint32_t rule,
                          struct cm_wire_verdict *verdict);

#define CM_PROMPT_VERDICTS_MAX 16u /* kept of one prompt; what refuses is kept first */

struct cm_prompt_verdicts {
    uint32_t count;
    bool refused;
    struct cm_wire_verdict each[CM_PROMPT_VERDICTS_MAX];
};

/* Classify one message of a prompt by the pack's input rules (kernels/guard/classify.h), before it
 * is computed; nothing of it is kept. Verdicts are added to those of the messages before. Without
 * guard_bind there are none. */
void cm_device_classify(struct cm_device *device, uint32_t part, const uint8_t *text, size_t bytes,
                        struct cm_prompt_verdicts *verdicts);

/* What a span of a rule may reach back over. */
#define CM_SLOT_BEFORE_MAX 648u

struct cm_slot_params {
    struct cm_sampling sampling;
    uint32_t max_tokens; /* >= 1: finish LENGTH when reached */
    uint32_t min_tokens; /* end tokens are not drawn before */
    bool ignore_eos;
    uint32_t stop_count; /* <= CM_STOPS_MAX */
    const uint8_t *stops[CM_STOPS_MAX];
    uint32_t stop_bytes[CM_STOPS_MAX]; /* 1 .. CM_STOP_BYTES_MAX */
    const uint8_t *before;             /* end of a text that the reply goes on from as it stands */
    uint32_t before_bytes;             /* <= CM_SLOT_BEFORE_MAX; 0: the reply stands alone */
    uint32_t adapter;                  /* a bound region, or CM_ADAPTER_NONE (0) */
};

/* Take a free slot. BUSY: none. INPUT: no such adapter is bound. Prompt tokens count for the
 * repetition penalty as they are stepped.
 */
CM_MUST_USE enum cm_status cm_device_slot_open(struct cm_device *device,
                                               const struct cm_slot_params *params,
                                               uint32_t *ret_slot, struct cm_error *err);
/* Tokens that are not stepped because their KV lies in pages of an equal prefix: count them. */
void cm_device_slot_skip(struct cm_device *device, uint32_t slot, const uint32_t *tokens,
                         uint32_t count);
/* Wipe and free. */
void cm_device_slot_close(struct cm_device *device, uint32_t slot);

/* One sequence's part of a mixed step. */
struct cm_step_entry {
    uint32_t slot;
    uint32_t position;      /* of tokens[0] */
    uint32_t token_count;   /* prefill chunk, or 1 */
    const uint32_t *tokens; /* [token_count] */
    const uint32_t *pages;  /* [page_count] KV pages of positions 0 .. position+token_count-1 */
    uint32_t page_count;
    bool prompt; /* all of them are a prompt's; false: all are a reply's */
    bool replay; /* after preemption: these tokens were counted before */
    bool sample; /* draw a token after the last one */
};

struct cm_step_verdict {
    uint32_t rule;          /* for guard_name */
    uint32_t action;        /* enum cm_verdict_action */
    uint64_t offset, bytes; /* of the span, in the unfiltered reply */
};

struct cm_step_result {
    uint32_t slot;
    bool sampled;
    uint32_t token; /* drawn; the next step's input */
    enum cm_finish
        finish; /* NONE: goes on; STOP, LENGTH, FILTER: over, nothing is held any more;
                   FAILED: its numbers overflowed, no token, no text; the others are well */
    uint32_t completion_tokens;
    uint32_t verdict_count, verdicts_lost; /* what rules have found since the last step */
    struct cm_step_verdict verdicts[CM_STEP_VERDICTS_MAX];
    uint32_t bytes; /* released UTF-8, whole characters, never part of a stop string, nothing that a
                       rule forbids or still may */
    uint8_t text[CM_STEP_BYTES_MAX]; /* last: bytes behind `bytes` are not set */
};

/* Start a step over `count` entries (<= CM_STEP_ENTRIES_MAX, tokens <= step_tokens_max, each slot
 * at most once). Arguments are checked against what was reserved; inputs may be reused on return.
 */
CM_MUST_USE enum cm_status cm_device_step_submit(struct cm_device *device,
                                                 const struct cm_step_entry *entries,
                                                 uint32_t count, struct cm_error *err);
/* Wait for it; results[i] belongs to entries[i]. */
CM_MUST_USE enum cm_status cm_device_step_wait(struct cm_device *device,
                                               struct cm_step_result *results, uint32_t count,
                                               struct cm_error *err);

/* Wipe KV pages that change hands. */
void cm_device_scrub_pages(struct cm_device *device, const uint32_t *pages, uint32_t count);
/* Wipe weights, KV, slots, scratch; the device is then only good for close. */
void cm_device_scrub(struct cm_device *device);

struct cm_device_stats {
    uint64_t steps;
    uint64_t tokens;
    uint64_t step_ns_total;
    uint64_t segments;
    uint64_t decrypt_ns_total;
};
void cm_device_stats(const struct cm_device *device, struct cm_device_stats *ret_stats);

#endif
