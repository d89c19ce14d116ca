/* Sealed copies of what will run, and the exec of exactly these copies. */
#include "sandbox/image.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "runtime/base/kill_point.h"
#include "runtime/base/sealed.h"

#ifndef MFD_EXEC /* Linux 6.3; older kernels refuse it, and make every memfd executable */
#define MFD_EXEC 0x0010U
#endif

#define FILE_BYTES_MAX (256u << 20)

static const char *const folders[] = {
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
};

static int memfd_make(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC);
    return fd >= 0 || errno != EINVAL ? fd : memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
}

/* A sealed copy of an open file. */
static enum cm_status copy_seal(int source, const char *name, int *ret_fd, struct cm_error *err)
{
    struct stat facts;
    off_t offset = 0;
    ssize_t moved = 1;
    int fd = memfd_make(name);
    if (fd < 0 || fstat(source, &facts) != 0) {
        goto failed;
    }
    if (!S_ISREG(facts.st_mode) || facts.st_size <= 0 || facts.st_size > FILE_BYTES_MAX) {
        close(fd);
        return cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-FILE", "%s is no program or library", name);
    }
    while (offset < facts.st_size && moved > 0) {
        moved = sendfile(fd, source, &offset, (size_t)(facts.st_size - offset));
    }
    /* A file that shrank meanwhile is sealed as it was read: its digest is then unknown. */
    if (moved < 0 || cm_memfd_seal(fd) != 0) {
        goto failed;
    }
    *ret_fd = fd;
    return CM_OK;
failed:
    moved = errno;
    if (fd >= 0) {
        close(fd);
    }
    return cm_error_errno(err, (int)moved, "CM-IMAGE-COPY", "cannot copy %s", name);
}

static enum cm_status elf_load(int fd, const char *name, struct cm_elf *ret_elf,
                               struct cm_error *err)
{
    struct stat facts;
    void *bytes = fstat(fd, &facts) == 0
                      ? mmap(NULL, (size_t)facts.st_size, PROT_READ, MAP_PRIVATE, fd, 0)
                      : MAP_FAILED;
    if (bytes == MAP_FAILED) {
        return cm_error_errno(err, errno, "CM-IMAGE-COPY", "cannot look into %s", name);
    }
    enum cm_status status = cm_elf_read(bytes, (size_t)facts.st_size, name, ret_elf, err);
    munmap(bytes, (size_t)facts.st_size);
    return status;
}

/* Take a sealed file into the store, which owns it from then on. */
static enum cm_status store_take(struct cm_image_store *store, int fd, const char *name,
                                 uint8_t *ret_index, struct cm_error *err)
{
    struct cm_image_file *file = &store->files[store->count];
    if (store->count == CM_STORE_FILES_MAX || strlen(name) >= sizeof(file->name)) {
        return cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-FILE", "too many files, or name: %s", name);
    }
    enum cm_status status = elf_load(fd, name, &file->elf, err);
    if (status == CM_OK) {
        snprintf(file->name, sizeof(file->name), "%s", name);
        file->fd = fd;
        *ret_index = (uint8_t)store->count++;
    }
    return status;
}

/* Copy an open file into the store; closes source. */
static enum cm_status store_add(struct cm_image_store *store, int source, const char *name,
                                uint8_t *ret_index, struct cm_error *err)
{
    int fd = -1;
    enum cm_status status = copy_seal(source, name, &fd, err);
    close(source);
    if (status == CM_OK) {
        status = store_take(store, fd, name, ret_index, err);
        if (status != CM_OK) {
            close(fd);
        }
    }
    return status;
}

static enum cm_status library_find(struct cm_image_store *store, const char *name,
                                   uint8_t *ret_index, struct cm_error *err)
{
    char path[CM_ELF_NAME_BYTES + 64];
    for (uint32_t i = 0; i < store->count; i++) {
        if (strcmp(store->files[i].name, name) == 0) {
            *ret_index = (uint8_t)i;
            return CM_OK;
        }
    }
    for (size_t i = 0; i < sizeof(folders) / sizeof(folders[0]); i++) {
        snprintf(path, sizeof(path), "%s/%s", folders[i], name);
        int source = open(path, O_RDONLY | O_CLOEXEC);
        if (source >= 0) {
            return store_add(store, source, name, ret_index, err);
        }
    }
    return cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-LIBRARY",
                        "library %s is in none of the system's folders: install it there", name);
}

static bool image_has(const struct cm_image *image, uint8_t index)
{
    return memchr(image->files, index, image->count) != NULL;
}

static enum cm_status image_add(struct cm_image *image, uint8_t index, struct cm_error *err)
{
    if (image_has(image, index)) {
        return CM_OK;
    }
    if (image->count == CM_IMAGE_FILES_MAX) {
        return cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-LIBRARY", "a program needs too many files");
    }
    image->files[image->count++] = index;
    return CM_OK;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

/* Breadth first: the list grows while it is walked. */
static enum cm_status needed_add(struct cm_image_store *store, struct cm_image *image,
                                 struct cm_error *err)
{
    enum cm_status status = CM_OK;
    for (uint32_t at = 0; status == CM_OK && at < image->count; at++) {
        const struct cm_elf *elf = &store->files[image->files[at]].elf;
        for (uint32_t i = 0; status == CM_OK && i < elf->needed_count; i++) {
            uint8_t index;
            status = library_find(store, elf->needed[i], &index, err);
            if (status == CM_OK) {
                status = image_add(image, index, err);
            }
        }
    }
    return status;
}

enum cm_status cm_image_load(struct cm_image_store *store, int folder_fd, const char *program,
                             struct cm_image *ret_image, struct cm_error *err)
{
    struct cm_image image = {.count = 0};
    uint8_t index;
    int source = openat(folder_fd, program, O_RDONLY | O_CLOEXEC);
    if (source < 0 || faccessat(folder_fd, program, X_OK, 0) != 0) {
        int error_number = errno;
        if (source >= 0) {
            close(source);
        }
        return cm_error_errno(err, error_number, "CM-SUP-PROGRAM",
                              "cannot run %s beside the supervisor", program);
    }
    enum cm_status status = store_add(store, source, base_name(program), &index, err);
    if (status == CM_OK) {
        status = image_add(&image, index, err);
    }
    if (status == CM_OK && store->files[index].elf.interpreter[0] != '\0') {
        image.dynamic = true;
        status = library_find(store, base_name(store->files[index].elf.interpreter), &index, err);
        if (status == CM_OK) {
            status = image_add(&image, index, err);
        }
    }
    if (status == CM_OK) {
        status = needed_add(store, &image, err);
    }
    if (status == CM_OK) {
        *ret_image = image;
    }
    return status;
}

void cm_image_store_close(struct cm_image_store *store)
{
    for (uint32_t i = 0; i < store->count; i++) {
        close(store->files[i].fd);
    }
    store->count = 0;
}

uint32_t cm_image_fds(const struct cm_image_store *store, const struct cm_image *image,
                      int ret_fds[static CM_IMAGE_FILES_MAX])
{
    for (uint32_t i = 0; i < image->count; i++) {
        ret_fds[i] = store->files[image->files[i]].fd;
    }
    return image->count;
}

void cm_image_exec(const struct cm_image *image, char *const *arguments, char *const *environment)
{
    char preload[CM_IMAGE_FILES_MAX * 20] = "", path[32];
    char *loaded[CM_IMAGE_ARGUMENTS_MAX + 8] = {
        arguments[0], "--inhibit-cache", "--preload", preload, "--argv0", arguments[0], path};
    size_t used = 0;
    environment = CM_KILL_POINT_ENVIRONMENT(arguments[0], environment);
    for (size_t i = 1; arguments[i] != NULL; i++) {
        if (i == CM_IMAGE_ARGUMENTS_MAX) {
            errno = E2BIG;
            return;
        }
        loaded[6 + i] = arguments[i];
    }
    for (uint32_t i = 2; i < image->count; i++) {
        used += (size_t)snprintf(preload + used, sizeof(preload) - used, "%s/proc/self/fd/%u",
                                 i == 2 ? "" : ":", CM_IMAGE_FD_FIRST + i);
    }
    snprintf(path, sizeof(path), "/proc/self/fd/%d", CM_IMAGE_FD_FIRST);
    syscall(SYS_execveat, CM_IMAGE_FD_FIRST + (image->dynamic ? 1 : 0), "",
            image->dynamic ? loaded : arguments, environment, AT_EMPTY_PATH);
}

static enum cm_status own_refuse(struct cm_error *err, const char *what)
{
    return cm_error_set(err, CM_E_POLICY, "CM-IMAGE-OWN",
                        "this program does not run from its sealed, measured copy (%s): start it "
                        "with `casemate serve`",
                        what);
}

/* The name that a memfd was made with: "/memfd:NAME (deleted)". */
static bool memfd_name(int fd, char ret_name[static CM_ELF_NAME_BYTES])
{
    static const char before[] = "/memfd:", after[] = " (deleted)";
    char path[32], link[CM_ELF_NAME_BYTES + sizeof(before) + sizeof(after)];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    ssize_t size = readlink(path, link, sizeof(link));
    ssize_t name = size - (ssize_t)(sizeof(before) - 1) - (ssize_t)(sizeof(after) - 1);
    if (name <= 0 || name >= (ssize_t)CM_ELF_NAME_BYTES ||
        memcmp(link, before, sizeof(before) - 1) != 0 ||
        memcmp(link + size - (sizeof(after) - 1), after, sizeof(after) - 1) != 0) {
        return false;
    }
    memcpy(ret_name, link + sizeof(before) - 1, (size_t)name);
    ret_name[name] = '\0';
    return true;
}

/* Which file of the image holds this mapped code; -1: none. */
static int mapping_find(const struct cm_image_store *store, const struct cm_image *image, dev_t dev,
                        unsigned long long inode)
{
    struct stat facts;
    for (uint32_t i = 0; i < image->count; i++) {
        if (fstat(store->files[image->files[i]].fd, &facts) == 0 && facts.st_dev == dev &&
            facts.st_ino == inode) {
            return (int)i;
        }
    }
    return -1;
}

/* All code of this process is the image's, and this very function is the program's. */
static enum cm_status mappings_check(const struct cm_image_store *store,
                                     const struct cm_image *image, struct cm_error *err)
{
    char line[512];
    bool found = false;
    enum cm_status status = CM_OK;
    FILE *maps = fopen("/proc/self/maps", "re");
    if (maps == NULL) {
        return cm_error_errno(err, errno, "CM-IMAGE-OWN", "cannot read our mappings");
    }
    while (status == CM_OK && fgets(line, sizeof(line), maps) != NULL) {
        unsigned long begin, end;
        unsigned major, minor;
        unsigned long long inode;
        char permissions[5], path[256] = "";
        if (sscanf(line, "%lx-%lx %4s %*x %x:%x %llu %255[^\n]", &begin, &end, permissions, &major,
                   &minor, &inode, path) < 6 ||
            permissions[2] != 'x' || strcmp(path, "[vdso]") == 0 ||
            strcmp(path, "[vsyscall]") == 0) {
            continue;
        }
        int file = mapping_find(store, image, makedev(major, minor), inode);
        unsigned long here = (unsigned long)(uintptr_t)&mappings_check;
        found = found || (file == 0 && here >= begin && here < end);
        if (file < 0) {
            status = own_refuse(err, path[0] != '\0' ? path : "code that no file holds");
        }
    }
    fclose(maps);
    return status == CM_OK && !found ? own_refuse(err, "the program is another") : status;
}

enum cm_status cm_image_adopt(struct cm_image_store *store, struct cm_image *ret_image,
                              struct cm_error *err)
{
    struct cm_image image = {.count = 0};
    enum cm_status status = CM_OK;
    for (int fd = CM_IMAGE_FD_FIRST; status == CM_OK && fcntl(fd, F_GETFD) >= 0; fd++) {
        char name[CM_ELF_NAME_BYTES];
        int seals = fcntl(fd, F_GET_SEALS);
        uint8_t index;
        if (seals < 0 || (seals & CM_SEALS_ALL) != CM_SEALS_ALL || !memfd_name(fd, name) ||
            fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
            return own_refuse(err, "a descriptor of it is not sealed memory");
        }
        status = store_take(store, fd, name, &index, err);
        if (status == CM_OK) {
            status = image_add(&image, index, err);
        }
    }
    if (status == CM_OK && image.count == 0) {
        status = own_refuse(err, "it was started by its path");
    }
    if (status == CM_OK) {
        image.dynamic = store->files[image.files[0]].elf.interpreter[0] != '\0';
        status = mappings_check(store, &image, err);
    }
    if (status == CM_OK) {
        *ret_image = image;
    }
    return status;
}
