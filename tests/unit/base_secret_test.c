/* Secrets: wiped, guarded, not inherited; key pages shared by descriptor. */
#include <criterion/criterion.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/base/secret.h"

Test(base_secret, a_child_sees_zeros_and_overrun_faults)
{
    struct cm_secret *secret;
    struct cm_error err;
    cr_assert_eq(cm_secret_new(4096 - 16, &secret, &err), CM_OK);
    memset(cm_secret_bytes(secret), 0xa5, cm_secret_size(secret));
    pid_t child = fork();
    if (child == 0) {
        /* WIPEONFORK zeroes the header too, so look at the bytes alone. */
        _exit(cm_secret_view(secret)[0] == 0 ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        cm_secret_bytes(secret)[4096 - 16] = 1; /* guard page */
        _exit(0);
    }
    waitpid(child, &status, 0);
    cr_assert(WIFSIGNALED(status));
    cm_secret_free(secret);
    cm_secret_free(NULL);
}

Test(base_secret, constant_time_compare_agrees_with_memcmp)
{
    uint8_t a[32] = {0}, b[32] = {0};
    cr_assert(cm_ct_equal(a, b, sizeof(a)));
    for (int bit = 0; bit < 256; bit++) {
        memset(b, 0, sizeof(b));
        b[bit / 8] = (uint8_t)(1 << (bit % 8));
        cr_assert_not(cm_ct_equal(a, b, sizeof(a)));
    }
}

Test(base_secret, a_wipe_of_a_key_page_holds_for_both_sides)
{
    int fd;
    bool secret_memory;
    uint8_t *left, *right;
    struct cm_error err;
    cr_assert_eq(cm_key_page_new(&fd, &secret_memory, &err), CM_OK);
    cr_assert_eq(cm_key_page_map(fd, &left, &err), CM_OK);
    cr_assert_eq(cm_key_page_map(fd, &right, &err), CM_OK);
    memset(left, 0x5a, 32);
    cr_assert_eq(right[31], 0x5a);
    cm_wipe(right, CM_KEY_PAGE_BYTES);
    cr_assert_eq(left[0], 0);
    cm_key_page_unmap(left);
    cm_key_page_unmap(right);
    close(fd);
}
