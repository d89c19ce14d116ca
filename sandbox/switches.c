/* No switches. */
#include "sandbox/switches.h"

struct cm_switches cm_switches_get(void)
{
    return (struct cm_switches){.off = 0};
}
