/* A CPU without AVX-512 and VAES, for one arm of the bench: linked in the place of
 * loader/package/cpu.c. */
#include "loader/package/internal.h"

bool cm_sha256_lanes_available(void)
{
    return false;
}

bool cm_gcm_vaes_available(void)
{
    return false;
}
