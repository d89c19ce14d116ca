/* Words and ids of the ways in which a role ends. */
#include "runtime/base/role_end.h"

const struct cm_role_end_row cm_role_ends[CM_ROLE_END_COUNT] = {
    [CM_ROLE_END_STOPPED] = {"stopped", "CM-END-STOPPED", ""},
    [CM_ROLE_END_EXIT] = {"exit", "CM-END-EXIT", "report it: a role gives a reason when it goes"},
    [CM_ROLE_END_FAILED] = {"failed", "CM-END-FAILED", "see the reason"},
    [CM_ROLE_END_START] = {"failed_start", "CM-END-START", "see the reason; casemate check"},
    [CM_ROLE_END_POLICY] = {"policy_kill", "CM-END-POLICY",
                            "take it for an attack until it is explained: keep the log, look at "
                            "the requests of that moment"},
    [CM_ROLE_END_MEMORY] = {"out_of_memory", "CM-END-MEMORY",
                            "lower kv_bytes or sequences_max, or give the host more memory"},
    [CM_ROLE_END_SIGNAL] = {"signal", "CM-END-SIGNAL",
                            "if nobody sent it, report it with the log around it"},
    [CM_ROLE_END_WATCHDOG] = {"watchdog", "CM-END-WATCHDOG",
                              "look for a stalled host (load, storage, device)"},
    [CM_ROLE_END_STUCK] = {"stuck", "CM-END-STUCK", "look for a stalled host (load, storage, TPM)"},
    [CM_ROLE_END_PROTOCOL] = {"protocol", "CM-END-PROTOCOL",
                              "take it for an attack until it is explained: keep the log"},
    [CM_ROLE_END_INTERRUPTED] = {"interrupted", "CM-END-INTERRUPTED", ""},
};
