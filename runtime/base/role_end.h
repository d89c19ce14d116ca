/* How a role's process ended, as the supervisor judges it. The word is a value in log, status and
 * /metrics, the id a stable name for alerts and for docs/operating.md; neither changes meaning. */
#ifndef CASEMATE_RUNTIME_BASE_ROLE_END_H
#define CASEMATE_RUNTIME_BASE_ROLE_END_H

enum cm_role_end {
    CM_ROLE_END_STOPPED,     /* told to stop, and did */
    CM_ROLE_END_EXIT,        /* exited unasked, without a reason */
    CM_ROLE_END_FAILED,      /* said why, while serving */
    CM_ROLE_END_START,       /* said why or exited before it served */
    CM_ROLE_END_POLICY,      /* killed by its system-call filter */
    CM_ROLE_END_MEMORY,      /* killed by the kernel for want of memory */
    CM_ROLE_END_SIGNAL,      /* by a signal that was not ours: a fault of its own, or an operator */
    CM_ROLE_END_WATCHDOG,    /* killed by us: no sign of life */
    CM_ROLE_END_STUCK,       /* killed by us: it did not go, or answer, when asked */
    CM_ROLE_END_PROTOCOL,    /* killed by us: it broke the control protocol */
    CM_ROLE_END_INTERRUPTED, /* killed by us: a second signal to the supervisor */
    CM_ROLE_END_COUNT
};

struct cm_role_end_row {
    const char *word;
    const char *id;
    const char *next; /* what the operator does about it; "" : nothing */
};

/* Indexed by enum cm_role_end. */
extern const struct cm_role_end_row cm_role_ends[CM_ROLE_END_COUNT];

#endif
