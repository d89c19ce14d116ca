/* The ring protocol's table: the sizes that both sides check, and the source of docs/wire.md. */
#include "runtime/base/wire.h"

#define EXACT(type) sizeof(struct type), sizeof(struct type)
#define OPEN(type)  sizeof(struct type), UINT32_MAX
#define TO_WORKER   "gateway → worker"
#define TO_GATEWAY  "worker → gateway"

const struct cm_wire_row cm_wire_rows[CM_WIRE_TYPE_COUNT] = {
    [CM_WIRE_GENERATE] = {"generate", TO_WORKER, OPEN(cm_wire_generate), "a new request"},
    [CM_WIRE_CANCEL] = {"cancel", TO_WORKER, 0, 0, "the client is gone: free it within one step"},
    [CM_WIRE_HELLO] = {"hello", TO_GATEWAY, EXACT(cm_wire_hello), "what is served, first of all"},
    [CM_WIRE_ACCEPTED] = {"accepted", TO_GATEWAY, EXACT(cm_wire_accepted),
                          "tokenised and admitted"},
    [CM_WIRE_REFUSED] = {"refused", TO_GATEWAY, EXACT(cm_wire_refused), "over, with the reason"},
    [CM_WIRE_TEXT] = {"text", TO_GATEWAY, OPEN(cm_wire_text), "released bytes"},
    [CM_WIRE_DONE] = {"done", TO_GATEWAY, EXACT(cm_wire_done), "over, with usage and times"},
    [CM_WIRE_STATS] = {"stats", TO_GATEWAY, EXACT(cm_wire_stats),
                       "figures for /metrics and /readyz"},
    [CM_WIRE_VERDICT] = {"verdict", TO_GATEWAY, EXACT(cm_wire_verdict),
                         "what a rule of the guard found, and what came of it"},
};
