/* What is measured is what runs: a file that somebody exchanges while it is copied gives the old
 * bytes or the new ones, sealed, and never what could still change. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/image.h"

#define ROUNDS 10000

static struct cm_error err;
static uint8_t *good;
static size_t good_bytes;
static char folder[] = "/tmp/casemate-image-XXXXXX";
static int folder_fd;

/* The loader itself: an ELF that needs nothing. */
static void setup(void)
{
    struct stat facts;
    int fd = open("/lib64/ld-linux-x86-64.so.2", O_RDONLY | O_CLOEXEC);
    cr_assert(fd >= 0 && fstat(fd, &facts) == 0);
    good_bytes = (size_t)facts.st_size;
    good = malloc(good_bytes + 1);
    cr_assert_eq(read(fd, good, good_bytes), (ssize_t)good_bytes);
    close(fd);
    cr_assert_not_null(mkdtemp(folder));
    folder_fd = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

static void teardown(void)
{
    char command[64];
    snprintf(command, sizeof(command), "rm -rf %s", folder);
    cr_assert_eq(system(command), 0);
    close(folder_fd);
    free(good);
}

TestSuite(sandbox_image, .init = setup, .fini = teardown);

static void file_write(const char *name, size_t bytes)
{
    int fd = openat(folder_fd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0700);
    cr_assert(fd >= 0 && write(fd, good, bytes) == (ssize_t)bytes);
    close(fd);
}

static atomic_bool over;

/* a (the original) and b (one byte longer) take turns as "program". */
static void *exchange(void *context)
{
    (void)context;
    while (!atomic_load(&over)) {
        good[good_bytes] = 0;
        file_write("a", good_bytes);
        (void)renameat(folder_fd, "a", folder_fd, "program");
        file_write("b", good_bytes + 1);
        (void)renameat(folder_fd, "b", folder_fd, "program");
    }
    return NULL;
}

Test(sandbox_image, ten_thousand_exchanges_while_it_is_copied, .timeout = 120)
{
    pthread_t thread;
    unsigned old = 0, fresh = 0;
    uint8_t *read_back = malloc(good_bytes + 2);
    good[good_bytes] = 0;
    file_write("program", good_bytes);
    cr_assert_eq(pthread_create(&thread, NULL, exchange, NULL), 0);
    for (int i = 0; i < ROUNDS; i++) {
        struct cm_image_store store = {.count = 0};
        struct cm_image image;
        cr_assert_eq(cm_image_load(&store, folder_fd, "program", &image, &err), CM_OK, "%s",
                     err.text);
        int fd = store.files[image.files[0]].fd;
        cr_assert_eq(fcntl(fd, F_GET_SEALS) & (F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK),
                     F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK);
        ssize_t size = pread(fd, read_back, good_bytes + 2, 0);
        cr_assert(size == (ssize_t)good_bytes || size == (ssize_t)good_bytes + 1);
        cr_assert_eq(memcmp(read_back, good, (size_t)size), 0, "mixed bytes in round %d", i);
        cr_assert(write(fd, "x", 1) < 0 && ftruncate(fd, 1) < 0, "the copy can be changed");
        old += size == (ssize_t)good_bytes;
        fresh += size != (ssize_t)good_bytes;
        cm_image_store_close(&store);
    }
    atomic_store(&over, true);
    pthread_join(thread, NULL);
    printf("sandbox_image: %u times the one, %u times the other\n", old, fresh);
    cr_assert(old > ROUNDS / 100 && fresh > ROUNDS / 100, "the exchange never met the copy");
    free(read_back);
}

Test(sandbox_image, what_is_no_program_is_refused)
{
    struct cm_image_store store = {.count = 0};
    struct cm_image image;
    cr_assert_eq(cm_image_load(&store, folder_fd, "absent", &image, &err), CM_E_SYSTEM);
    file_write("empty", 0);
    cr_assert_eq(cm_image_load(&store, folder_fd, "empty", &image, &err), CM_E_CONFIG);
    file_write("short", 100);
    cr_assert_eq(cm_image_load(&store, folder_fd, "short", &image, &err), CM_E_CONFIG);
    cr_assert_str_eq(err.id, "CM-IMAGE-ELF");
    cm_image_store_close(&store);
}

Test(sandbox_image, a_program_brings_its_loader_and_each_library_once)
{
    struct cm_image_store store = {.count = 0};
    struct cm_image image, again;
    int bin = open("/bin", O_PATH | O_DIRECTORY | O_CLOEXEC);
    cr_assert_eq(cm_image_load(&store, bin, "bash", &image, &err), CM_OK, "%s", err.text);
    cr_assert(image.dynamic && image.count >= 4);
    cr_assert_str_eq(store.files[image.files[1]].name, "ld-linux-x86-64.so.2");
    uint32_t files = store.count;
    cr_assert_eq(cm_image_load(&store, bin, "true", &again, &err), CM_OK, "%s", err.text);
    cr_assert_eq(store.count, files + 1, "libc was copied twice");
    cm_image_store_close(&store);
    close(bin);
}
