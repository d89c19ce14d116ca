/* Single steps of the confinement; confine.c has their order. Each returns 0 or an errno. */
#ifndef CASEMATE_SANDBOX_STEPS_H
#define CASEMATE_SANDBOX_STEPS_H

#include <stdbool.h>
#include <stdint.h>

#include "sandbox/confine.h"

/* clone(2) flags of the layers that are namespaces. */
uint64_t cm_step_namespaces(uint32_t layers);
/* For an ordinary user: a user namespace and the others in it, without processes. It is made after
 * the exec, because the memory of a program that was executed inside lies open to whoever owns the
 * namespace, dumpable or not (ptrace(2), "access mode checking"): to the very same user outside. */
int cm_step_user_namespaces(uint32_t layers);
int cm_step_root(void); /* mount namespace is ours alone by now */
int cm_step_limits(const struct cm_confinement *wanted);
int cm_step_bounding_drop(void); /* bounding set and securebits */
int cm_step_identity(uint32_t uid);
int cm_step_capabilities(uint64_t keep); /* what of it there is; nothing else */
int cm_step_mdwe(void);
int cm_step_landlock(uint32_t abi_max);
uint32_t cm_landlock_abi(void); /* of the kernel; 0: none */

#endif
