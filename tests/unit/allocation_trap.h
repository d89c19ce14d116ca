/* A trap in the allocator: while it is armed, taking memory ends the test. The program is linked
 * with --wrap for each call (runtime/worker/CMakeLists.txt), so all of our own code comes by here.
 * To map what another process hands over takes no memory. */
#ifndef CASEMATE_TESTS_UNIT_ALLOCATION_TRAP_H
#define CASEMATE_TESTS_UNIT_ALLOCATION_TRAP_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static bool allocation_trap;
static unsigned long allocations_allowed;

static inline void allocation_note(const char *call)
{
    if (allocation_trap) {
        fprintf(stderr, "allocation trap: %s after ready\n", call);
        abort();
    }
    allocations_allowed++;
}

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__real_aligned_alloc(size_t align, size_t size);
void *__real_mmap(void *at, size_t size, int protect, int flags, int fd, off_t offset);

void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size)
{
    allocation_note("malloc");
    return __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size)
{
    allocation_note("calloc");
    return __real_calloc(count, size);
}

void *__wrap_realloc(void *old, size_t size);
void *__wrap_realloc(void *old, size_t size)
{
    allocation_note("realloc");
    return __real_realloc(old, size);
}

void *__wrap_aligned_alloc(size_t align, size_t size);
void *__wrap_aligned_alloc(size_t align, size_t size)
{
    allocation_note("aligned_alloc");
    return __real_aligned_alloc(align, size);
}

void *__wrap_mmap(void *at, size_t size, int protect, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t size, int protect, int flags, int fd, off_t offset)
{
    if ((flags & MAP_SHARED) == 0) {
        allocation_note("mmap");
    }
    return __real_mmap(at, size, protect, flags, fd, offset);
}

#endif
