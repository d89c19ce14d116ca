/* Marked points on the ways of messages, at which a test kills the process: before and after each
 * control frame, ring record and TPM command (tests/faults). A build without CASEMATE_KILL_POINTS,
 * that is, every build that is installed, has none of them: a test looks for their name. */
#ifndef CASEMATE_RUNTIME_BASE_KILL_POINT_H
#define CASEMATE_RUNTIME_BASE_KILL_POINT_H

#ifdef CASEMATE_KILL_POINTS

/* One point: "before", "send", "ready". Ends the process if it is the one that was asked for. */
void cm_kill_point(const char *when, const char *what, const char *name);
/* The "after" point of what was received: reached when the process next sends or receives. */
void cm_kill_point_after(const char *what, const char *name);
void cm_kill_point_now(void);
/* The environment of a role: which point, in its first generation only. */
char *const *cm_kill_point_environment(const char *program, char *const *environment);

#define CM_KILL_POINT(when, what, name)               cm_kill_point(when, what, name)
#define CM_KILL_POINT_AFTER(what, name)               cm_kill_point_after(what, name)
#define CM_KILL_POINT_NOW()                           cm_kill_point_now()
#define CM_KILL_POINT_ENVIRONMENT(program, otherwise) cm_kill_point_environment(program, otherwise)

#else

#define CM_KILL_POINT(when, what, name)               ((void)0)
#define CM_KILL_POINT_AFTER(what, name)               ((void)0)
#define CM_KILL_POINT_NOW()                           ((void)0)
#define CM_KILL_POINT_ENVIRONMENT(program, otherwise) (otherwise)

#endif

#endif
