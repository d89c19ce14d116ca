/* Switches of the sandbox that only tests and the bench have. The service is linked with
 * switches.c, where all are zero; tests/harness/switches.c reads the environment instead. */
#ifndef CASEMATE_SANDBOX_SWITCHES_H
#define CASEMATE_SANDBOX_SWITCHES_H

#include <stdbool.h>
#include <stdint.h>

struct cm_switches {
    uint32_t off;              /* layers not to apply although the machine has them */
    uint32_t lacks;            /* layers to take as missing from this machine */
    uint32_t landlock_abi_max; /* 0: the kernel's */
    bool accept;               /* serve in spite of `off` (bench) */
    bool swap;                 /* as if this machine had swap that memory can go to */
};
struct cm_switches cm_switches_get(void);

#endif
