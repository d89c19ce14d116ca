/* The least limits of a tree of groups, memory's and CPU time's, as both versions write them. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "sandbox/cgroup.h"

static char root[64];

static void folder_make(const char *name, const char *file, const char *text)
{
    char path[256];
    snprintf(path, sizeof(path), "%s%s", root, name);
    cr_assert(mkdir(path, 0700) == 0 || errno == EEXIST);
    snprintf(path, sizeof(path), "%s%s/%s", root, name, file);
    FILE *out = fopen(path, "w");
    cr_assert_not_null(out);
    fputs(text, out);
    fclose(out);
}

/* An empty tree of groups; returns the path of its leaf, which folder_make makes. */
static const char *tree_begin(void)
{
    static char leaf[sizeof(root) + 4];
    snprintf(root, sizeof(root), "/tmp/casemate-cgroup-XXXXXX");
    cr_assert_not_null(mkdtemp(root));
    snprintf(leaf, sizeof(leaf), "%s/a/b", root);
    return leaf;
}

static void tree_end(void)
{
    char command[sizeof(root) + 8];
    snprintf(command, sizeof(command), "rm -rf %s", root);
    cr_assert_eq(system(command), 0);
}

Test(sandbox_cgroup, the_least_limit_of_a_group_and_those_above_it_holds)
{
    static const struct {
        const char *top, *middle, *leaf;
        uint64_t least;
    } rows[] = {
        {"max\n", "max\n", "max\n", UINT64_MAX},
        {"max\n", "1000\n", "max\n", 1000},
        {"900\n", "1000\n", "2000\n", 900},
        {"max\n", "1000\n", "800\n", 800},
        {"9223372036854771712\n", "9223372036854771712\n", "4096\n", 4096}, /* version 1: none */
        {"max\n", "\n", "0\n", 0},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const char *leaf = tree_begin();
        folder_make("", "memory.max", rows[i].top);
        folder_make("/a", "memory.max", rows[i].middle);
        folder_make("/a/b", "memory.max", rows[i].leaf);
        cr_assert_eq(cm_cgroup_least(leaf, "memory.max"), rows[i].least, "row %zu", i);
        cr_assert_eq(cm_cgroup_least(leaf, "memory.none"), UINT64_MAX);
        tree_end();
    }
    cr_assert_eq(cm_cgroup_least("", "memory.max"), UINT64_MAX);
    cr_assert_gt(cm_cgroup_memory_limit(), 1ull << 20);
    cr_assert_lt(cm_cgroup_memory_limit(), 1ull << 50,
                 "the machine's own memory is the least bound");
}

Test(sandbox_cgroup, the_least_quota_of_a_group_and_those_above_it_holds)
{
    static const struct {
        const char *top, *middle, *leaf; /* version 2 */
        const char *quota;               /* version 1, in the middle; periods are 50000 */
        uint32_t cpus;
    } rows[] = {
        {"max 100000\n", "max 100000\n", "max 100000\n", "-1\n", 0},
        {"max 100000\n", "200000 100000\n", "max 100000\n", "-1\n", 2},
        {"100000 100000\n", "200000 100000\n", "400000 100000\n", "-1\n", 1},
        {"400000 100000\n", "max 100000\n", "350000 100000\n", "-1\n", 3}, /* rounded down */
        {"max 100000\n", "max 100000\n", "1000 100000\n", "-1\n", 1},      /* but never to none */
        {"150000 50000\n", "\n", "max\n", "-1\n", 3},
        {"", "", "", "-1\n", 0},
        {"", "", "", "125000\n", 2},
        {"", "", "", "10000\n", 1},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const char *leaf = tree_begin();
        folder_make("", "cpu.max", rows[i].top);
        folder_make("/a", "cpu.max", rows[i].middle);
        folder_make("/a", "cpu.cfs_quota_us", rows[i].quota);
        folder_make("/a", "cpu.cfs_period_us", "50000\n");
        folder_make("/a/b", "cpu.max", rows[i].leaf);
        cr_expect_eq(cm_cgroup_least_cpus(leaf), rows[i].cpus, "row %zu: %u", i,
                     cm_cgroup_least_cpus(leaf));
        tree_end();
    }
    cr_assert_eq(cm_cgroup_least_cpus(""), 0u);
}
