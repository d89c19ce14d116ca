/* Which call a filter killed a process for, as the kernel's log tells it. */
#ifndef CASEMATE_SANDBOX_VIOLATION_H
#define CASEMATE_SANDBOX_VIOLATION_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* The kernel's log from here on; -1 where it may not be read (dmesg_restrict, a container). The
 * caller closes it. */
int cm_violation_open(void);
/* Look for the record of this process; waits a moment for it. False: there is none, because the log
 * cannot be read, an audit daemon takes its records, or they come faster than the kernel prints. */
bool cm_violation_find(int fd, pid_t pid, uint32_t *ret_call);

#endif
