/* Sealing memory files whose pages somebody holds for a while. */
#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime/base/sealed.h"

static int ends[2];
static uint8_t page[4096];

/* A page of the file lies in the pipe until it is read. */
static int held_make(void)
{
    int fd = memfd_create("held", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    off_t at = 0;
    cr_assert_eq(write(fd, page, sizeof(page)), (ssize_t)sizeof(page));
    cr_assert_eq(pipe(ends), 0);
    cr_assert_eq(splice(fd, &at, ends[1], NULL, sizeof(page), 0), (ssize_t)sizeof(page));
    return fd;
}

static void *release(void *argument)
{
    (void)argument;
    usleep(400000);
    return read(ends[0], page, sizeof(page)) == (ssize_t)sizeof(page) ? page : NULL;
}

Test(base_sealed, a_page_that_is_held_for_a_while_is_waited_for, .timeout = 20)
{
    pthread_t helper;
    void *released = NULL;
    int fd = held_make();
    cr_assert_eq(fcntl(fd, F_ADD_SEALS, CM_SEALS_ALL), -1);
    cr_assert_eq(errno, EBUSY);
    cr_assert_eq(pthread_create(&helper, NULL, release, NULL), 0);
    cr_expect_eq(cm_memfd_seal(fd), 0);
    cr_assert_eq(pthread_join(helper, &released), 0);
    cr_assert_not_null(released);
    cr_assert_eq(fcntl(fd, F_GET_SEALS), CM_SEALS_ALL);
}

Test(base_sealed, a_page_that_is_held_on_is_an_error, .timeout = 20)
{
    int fd = held_make();
    cr_assert_eq(cm_memfd_seal(fd), -1);
    cr_assert_eq(errno, EBUSY);
    cr_assert_eq(fcntl(fd, F_GET_SEALS), 0);
}
