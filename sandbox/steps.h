/* Single steps of the confinement; confine.c has their order. Each returns 0 or an errno. */
#ifndef CASEMATE_SANDBOX_STEPS_H
#define CASEMATE_SANDBOX_STEPS_H

#include <stdbool.h>
#include <stdint.h>

#include "sandbox/confine.h"

int cm_step_root(void); /* mount namespace is ours alone by now */
int cm_step_limits(const struct cm_confinement *wanted);
int cm_step_bounding_drop(void); /* bounding set and securebits */
int cm_step_identity(uint32_t uid);
int cm_step_capabilities(uint64_t keep); /* what of it there is; nothing else */
int cm_step_mdwe(void);
int cm_step_landlock(uint32_t abi_max);
uint32_t cm_landlock_abi(void); /* of the kernel; 0: none */

#endif
