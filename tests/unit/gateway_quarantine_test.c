/* The table of requests that workers died over. */
#include <criterion/criterion.h>
#include <string.h>

#include "runtime/gateway/quarantine.h"

static struct cm_quarantine quarantine;
static struct cm_error err;
static uint64_t left;

static const uint8_t *digest_of(uint32_t number)
{
    static uint8_t digest[CM_QUARANTINE_DIGEST_BYTES];
    memset(digest, 0, sizeof(digest));
    memcpy(digest, &number, sizeof(number));
    return digest;
}

Test(gateway_quarantine, the_second_death_refuses_and_time_forgives)
{
    cr_assert_eq(cm_quarantine_init(&quarantine, &err), CM_OK);
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(0), 5, &left), CM_SUSPICION_NONE);
    cr_assert_eq(cm_quarantine_died(&quarantine, digest_of(1), 1000), CM_SUSPICION_SUSPECT);
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(1), 1000, &left), CM_SUSPICION_SUSPECT);
    cr_assert_eq(left, CM_QUARANTINE_SUSPECT_MS);
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(2), 1000, &left), CM_SUSPICION_NONE);
    cr_assert_eq(cm_quarantine_died(&quarantine, digest_of(1), 2000), CM_SUSPICION_REFUSED);
    cr_assert_eq(cm_quarantine_count(&quarantine, CM_SUSPICION_REFUSED, 2000), 1u);
    uint64_t end = 2000 + CM_QUARANTINE_REFUSE_MS;
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(1), end - 1, &left),
                 CM_SUSPICION_REFUSED);
    cr_assert_eq(left, 1u);
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(1), end, &left), CM_SUSPICION_NONE);
    cr_assert_eq(cm_quarantine_died(&quarantine, digest_of(1), end), CM_SUSPICION_SUSPECT,
                 "an old count is over");
}

Test(gateway_quarantine, a_prompt_that_was_there_twice_is_blamed_once)
{
    cr_assert_eq(cm_quarantine_init(&quarantine, &err), CM_OK);
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(cm_quarantine_died(&quarantine, digest_of(3), 50), CM_SUSPICION_SUSPECT);
    }
    cr_assert_eq(cm_quarantine_died(&quarantine, digest_of(3), 51), CM_SUSPICION_REFUSED);
}

Test(gateway_quarantine, what_ends_well_is_forgotten)
{
    cr_assert_eq(cm_quarantine_init(&quarantine, &err), CM_OK);
    cm_quarantine_died(&quarantine, digest_of(7), 1);
    cm_quarantine_lived(&quarantine, digest_of(8));
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(7), 2, &left), CM_SUSPICION_SUSPECT);
    cm_quarantine_lived(&quarantine, digest_of(7));
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(7), 2, &left), CM_SUSPICION_NONE);
    cr_assert_eq(cm_quarantine_died(&quarantine, digest_of(7), 3), CM_SUSPICION_SUSPECT);
}

Test(gateway_quarantine, a_flood_of_suspects_displaces_no_refused_one)
{
    cr_assert_eq(cm_quarantine_init(&quarantine, &err), CM_OK);
    cm_quarantine_died(&quarantine, digest_of(1), 1);
    cm_quarantine_died(&quarantine, digest_of(1), 2);
    for (uint32_t i = 100; i < 100 + 4 * CM_QUARANTINE_ROWS; i++) {
        cr_assert_eq(cm_quarantine_died(&quarantine, digest_of(i), i), CM_SUSPICION_SUSPECT);
    }
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(1), 5000, &left), CM_SUSPICION_REFUSED);
    cr_assert_eq(cm_quarantine_look(&quarantine, digest_of(100), 5000, &left), CM_SUSPICION_NONE,
                 "the oldest suspect went");
    cr_assert_eq(
        cm_quarantine_look(&quarantine, digest_of(99 + 4 * CM_QUARANTINE_ROWS), 5000, &left),
        CM_SUSPICION_SUSPECT);
    cr_assert_eq(cm_quarantine_count(&quarantine, CM_SUSPICION_SUSPECT, 5000),
                 CM_QUARANTINE_ROWS - 1u);
}

Test(gateway_quarantine, the_digest_is_hmac_sha_256)
{
    /* RFC 4231, test case 2, with its key padded to our length by zeros: the same key by RFC 2104.
     */
    static const uint8_t wanted[CM_QUARANTINE_DIGEST_BYTES] = {0x5b, 0xdc, 0xc1, 0x46, 0xbf, 0x60,
                                                               0x75, 0x4e, 0x6a, 0x04, 0x24, 0x26,
                                                               0x08, 0x95, 0x75, 0xc7};
    uint8_t digest[CM_QUARANTINE_DIGEST_BYTES];
    memset(&quarantine, 0, sizeof(quarantine));
    memcpy(quarantine.key, "Jefe", 4);
    cm_quarantine_digest(&quarantine, "what do ya want for nothing?", 28, digest);
    cr_assert_arr_eq(digest, wanted, sizeof(wanted));
    struct cm_quarantine other;
    cr_assert_eq(cm_quarantine_init(&other, &err), CM_OK);
    cm_quarantine_digest(&other, "what do ya want for nothing?", 28, digest);
    cr_assert_neq(memcmp(digest, wanted, sizeof(wanted)), 0, "another start, another key");
}
